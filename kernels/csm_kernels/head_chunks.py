"""Heads and their cross-entropies chunk by chunk: the form in PyTorch's operators, and what all forms share.

A chunk is some heads and some rows: a batched matrix product to logits, one pass that turns logits into losses and
gradients in place, and a matrix product for each gradient that is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from csm_kernels.constants import SOFTMAX_BUDGET

CrossEntropy = Callable[[Tensor, Tensor, Tensor, bool, float], Tensor]


def chunk_sizes(
    rows: int, heads: int, row_bytes: int, head_bytes: int, total_bytes: int, budget: int
) -> tuple[int, int]:
    """(rows, heads) of a chunk. Whole heads come first: the weight gradient of a head is then finished within one chunk
    and needs no accumulator. If the rows of one head do not fit, a chunk is some rows of one head.

    Args:
        row_bytes: a row of one head's logits.
        head_bytes: what a head needs beside its logits: padded copies of its weight and of that one's gradient.
        total_bytes: the accumulator of one head's weight gradient.
        budget: of all these together. One row of one head is always allowed.
    """
    per_head = rows * row_bytes + head_bytes
    if per_head <= budget:
        return max(1, rows), max(1, min(heads, budget // max(1, per_head)))
    left = max(budget - total_bytes - head_bytes, budget // 4)
    return max(1, min(rows, left // row_bytes)), 1


def slices(length: int, step: int) -> Iterator[slice]:
    """The slices of ``step`` that make up ``length``; the last may be shorter."""
    return (slice(first, min(length, first + step)) for first in range(0, length, step))


def empty_gradients(hidden: Tensor, weight: Tensor, wants_hidden: bool, wants_weight: bool) -> tuple[Tensor, Tensor]:
    """Memory for the gradients of both, without elements where one is not wanted."""
    return (
        torch.empty_like(hidden) if wants_hidden else hidden.new_empty(0),
        torch.empty_like(weight) if wants_weight else hidden.new_empty(0),
    )


def cross_entropy_(logits: Tensor, targets: Tensor, weights: Tensor, wants_grad: bool, scale: float) -> Tensor:
    """Weighted cross-entropy of rows of logits, on any device. The gradient overwrites the logits where it is wanted.

    Args:
        logits: [m, V] contiguous.
        targets: [m] int64, each in [0, V).
        weights: [m] in the wide dtype.
        scale: of the gradient.

    Returns:
        [m] in the wide dtype.
    """
    losses = torch.empty_like(weights, memory_format=torch.contiguous_format)
    # So many bytes of logits exist in the wide dtype at a time. Other devices take more, because a launch costs them
    # more than a cache gains.
    piece_bytes = SOFTMAX_BUDGET if logits.device.type == "cpu" else 16 * SOFTMAX_BUDGET
    rows = max(1, piece_bytes // (logits.shape[1] * weights.element_size()))
    for some in slices(len(logits), rows):
        target, weight = targets[some].unsqueeze(1), weights[some].unsqueeze(1)
        piece = logits[some].to(weights.dtype)
        picked, highest = piece.gather(-1, target), piece.amax(-1, keepdim=True)
        p = piece.softmax(-1)
        # log sum exp from the largest probability, 1 / sum exp(x - highest), which is at least 1 / V.
        losses[some] = ((highest - p.amax(-1, keepdim=True).log() - picked) * weight).squeeze(1)
        if wants_grad:
            p.scatter_add_(-1, target, torch.full_like(target, -1, dtype=p.dtype))
            torch.mul(p, weight * scale, out=logits[some])
    return losses


def losses_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    scale: float,
    byte_budget: int,
    wants_hidden: bool,
    wants_weight: bool,
    cross_entropy: CrossEntropy = cross_entropy_,
) -> tuple[Tensor, Tensor, Tensor]:
    """In PyTorch's operators, on any device.

    Args:
        hidden: [M, C, D].
        weight: [C, D, V], any strides.
        targets: [M, C] int64, each in [0, V).
        weights: [M, C] in the wide dtype.
        scale: of the gradients.
        byte_budget: see ``chunk_sizes``.
        cross_entropy: as ``cross_entropy_``.

    Returns:
        The weighted losses per head [C] in the wide dtype, and the gradients of ``hidden`` and ``weight`` (without
        elements where they are not wanted).
    """
    rows, heads, width = hidden.shape
    vocab, wide = weight.shape[-1], weights.dtype
    total_bytes = width * vocab * wide.itemsize if wants_weight else 0
    some_rows, some_heads = chunk_sizes(rows, heads, vocab * hidden.element_size(), 0, total_bytes, byte_budget)
    per_head = weights.new_zeros(heads)
    grad_hidden, grad_weight = empty_gradients(hidden, weight, wants_hidden, wants_weight)
    for at_heads in slices(heads, some_heads):
        w = weight[at_heads]
        total = torch.zeros(w.shape, dtype=wide, device=w.device) if wants_weight and some_rows != rows else None
        for at_rows in slices(rows, some_rows):
            h = hidden[at_rows, at_heads].transpose(0, 1)
            logits = product(h, w)
            target, row_weight = (x[at_rows, at_heads].t() for x in (targets, weights))
            flat = logits.view(-1, vocab), target.reshape(-1), row_weight.reshape(-1)
            losses = cross_entropy(*flat, wants_hidden or wants_weight, scale)
            per_head[at_heads] += losses.view(target.shape).sum(-1)
            if wants_hidden:
                grad_hidden[at_rows, at_heads] = product(logits, w.transpose(1, 2)).transpose(0, 1)
            if total is not None:
                total += product(h.transpose(1, 2), logits)
            elif wants_weight:
                _write_weight_gradient(grad_weight[at_heads], h, logits)
        if total is not None:
            grad_weight[at_heads] = total
    return per_head, grad_hidden, grad_weight


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b for every head. One head is a plain product: on a CPU, PyTorch computes that twice as fast if b is
    transposed."""
    return torch.mm(a[0], b[0]).unsqueeze(0) if len(a) == 1 else torch.bmm(a, b)


def _write_weight_gradient(out: Tensor, h: Tensor, grad: Tensor) -> None:
    """out = h^T grad, written along the rows of memory: the weight of a linear layer comes as a transposed view, and
    PyTorch's bf16 product on a CPU is hundreds of times slower into one."""
    if out.stride(-1) == 1:
        torch.bmm(h.transpose(1, 2), grad, out=out)
    else:
        torch.bmm(grad.transpose(1, 2), h, out=out.transpose(1, 2))
