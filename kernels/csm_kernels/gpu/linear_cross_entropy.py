"""The Triton kernel of ``linear_cross_entropy``, its launcher, and the chunks that use it."""

from __future__ import annotations

import torch
from torch import Tensor

from csm_kernels.constants import HEAD_COLUMNS
from csm_kernels.gpu.jit import jit, tl
from csm_kernels.head_chunks import chunk_sizes, empty_gradients, product, slices

# --- kernel -----------------------------------------------------------------------------------------------------------
# Prefixes: p_ pointer, o_ offsets, b_ block of values, i_ index. Compiled once per vocabulary and dtype.


@jit("rows", "scale")
def _softmax_cross_entropy_kernel(
    # data
    p_logits,  # [heads, rows, COLUMNS], of which VOCAB columns count; the gradient takes their place
    p_targets,  # [heads, rows]
    p_weights,  # [heads, rows] float32
    p_losses,  # [heads, rows] float32
    # sizes
    rows,
    # of the gradient
    scale,
    # meta
    VOCAB: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    WANTS_GRAD: tl.constexpr,
):
    """One program per (row, head): it reads a row of logits once and writes the gradient in its place."""
    i_row = tl.program_id(1).to(tl.int64) * rows + tl.program_id(0)
    p_row = p_logits + i_row * COLUMNS
    o_column = tl.arange(0, BLOCK)
    # Groups of 64 columns are loaded as a whole, so that loads are 16 bytes wide; VOCAB is odd.
    b_logits = tl.load(p_row + o_column, mask=o_column < COLUMNS, other=0.0).to(tl.float32)
    b_logits = tl.where(o_column < VOCAB, b_logits, float("-inf"))
    target = tl.load(p_targets + i_row)
    weight = tl.load(p_weights + i_row)
    highest = tl.max(b_logits, axis=0)
    b_exp = tl.exp(b_logits - highest)
    total = tl.sum(b_exp, axis=0)
    # The target's logit comes from the registers: another load would race with the store below.
    picked = tl.sum(tl.where(o_column == target, b_logits, 0.0), axis=0)
    tl.store(p_losses + i_row, (tl.log(total) + highest - picked) * weight)
    if WANTS_GRAD:
        b_grad = (b_exp / total - tl.where(o_column == target, 1.0, 0.0)) * (weight * scale)
        # The gradient of the padding is zero, so the matrix products that follow may read it.
        tl.store(p_row + o_column, b_grad.to(p_logits.dtype.element_ty), mask=o_column < COLUMNS)


# --- launchers --------------------------------------------------------------------------------------------------------


def launch_softmax_cross_entropy_(
    logits: Tensor, targets: Tensor, weights: Tensor, wants_grad: bool, vocab: int, scale: float
) -> Tensor:
    """Weighted cross-entropies [c, m] in float32 of padded logits [c, m, columns], whose ``vocab`` first columns count.
    The gradient times ``scale`` overwrites the logits where it is wanted."""
    heads, rows, columns = logits.shape
    losses = torch.empty(heads, rows, dtype=torch.float32, device=logits.device)
    if losses.numel():
        block, num_warps = launch_shape(columns)
        with torch.cuda.device_of(logits):
            _softmax_cross_entropy_kernel[(rows, heads)](
                logits,
                targets.contiguous(),
                weights.contiguous(),
                losses,
                rows,
                float(scale),
                VOCAB=vocab,
                COLUMNS=columns,
                BLOCK=block,
                WANTS_GRAD=wants_grad,
                num_warps=num_warps,
                enable_fp_fusion=True,  # not the default of Triton 3.10
            )
    return losses


def launch_shape(columns: int) -> tuple[int, int]:
    """(block of columns, warps): 16 logits per thread at V = 2051, so a row stays in registers between its uses."""
    block = max(16, 1 << (columns - 1).bit_length())
    return block, min(8, max(1, block // 512))


def losses_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    scale: float,
    byte_budget: int,
    wants_hidden: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as in ``head_chunks.losses_and_gradients``; the softmax is in float32.

    A chunk has its own copy of the weight, padded to a multiple of ``HEAD_COLUMNS`` columns.

    Raises:
        ValueError: float64.
    """
    if hidden.dtype == torch.float64:
        raise ValueError("the Triton kernels compute in float32; use impl='torch' for float64")
    rows, heads, width = hidden.shape
    vocab = weight.shape[-1]
    columns = -(-vocab // HEAD_COLUMNS) * HEAD_COLUMNS
    element = hidden.element_size()
    head_bytes = width * columns * element * (1 + wants_weight)
    total_bytes = width * columns * 4 if wants_weight else 0
    some_rows, some_heads = chunk_sizes(rows, heads, columns * element, head_bytes, total_bytes, byte_budget)
    per_head = torch.zeros(heads, dtype=torch.float32, device=hidden.device)
    grad_hidden, grad_weight = empty_gradients(hidden, weight, wants_hidden, wants_weight)
    for at_heads in slices(heads, some_heads):
        w = torch.nn.functional.pad(weight[at_heads], (0, columns - vocab))
        total = None if some_rows == rows else torch.zeros(w.shape, dtype=torch.float32, device=w.device)
        for at_rows in slices(rows, some_rows):
            h = hidden[at_rows, at_heads].transpose(0, 1)
            logits = product(h, w)
            target, row_weight = (x[at_rows, at_heads].t() for x in (targets, weights))
            losses = launch_softmax_cross_entropy_(
                logits, target, row_weight, wants_hidden or wants_weight, vocab, scale
            )
            per_head[at_heads] += losses.sum(-1)
            if wants_hidden:
                grad_hidden[at_rows, at_heads] = product(logits, w.transpose(1, 2)).transpose(0, 1)
            if wants_weight:
                part = product(h.transpose(1, 2), logits)
                total = part if total is None else total.add_(part)
        if wants_weight and total is not None:
            grad_weight[at_heads] = total[..., :vocab]
    return per_head, grad_hidden, grad_weight
