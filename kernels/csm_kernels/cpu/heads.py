"""Linear heads over the same rows and their cross-entropies on a CPU.

Many heads over few rows are one call of the C++ library (``heads.cpp``), in bf16 on processors with AMX or AVX512-BF16.
Other heads in bf16 on these processors go one after the other through the library's matrix products and softmax. What
the library does not multiply goes in chunks of several heads through PyTorch's products.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from csm_kernels import head_chunks
from csm_kernels.cpu import native
from csm_kernels.cpu.attention import LANES
from csm_kernels.cpu.linear import product, supports_products
from csm_kernels.cpu.passes import cross_entropy_, operator
from csm_kernels.head_chunks import chunk_sizes, slices


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
    """Arguments and results as in ``head_chunks.losses_and_gradients``."""
    if supports_heads(hidden, weight, byte_budget):
        return heads_cross_entropy(hidden, weight, targets, weights, scale, wants_hidden, wants_weight)
    inputs = (hidden, weight, targets, weights, scale, byte_budget, wants_hidden, wants_weight)
    if supports_products(hidden.dtype):
        return _one_by_one(*inputs)
    return head_chunks.losses_and_gradients(*inputs, cross_entropy_)


# --- one head after the other -----------------------------------------------------------------------------------------


def _one_by_one(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    scale: float,
    byte_budget: int,
    wants_hidden: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, heads, width = hidden.shape
    vocab, wide = weight.shape[-1], weights.dtype
    total_bytes = width * vocab * wide.itemsize if wants_weight else 0
    some_rows, _ = chunk_sizes(rows, heads, vocab * hidden.element_size(), 0, total_bytes, byte_budget)
    is_whole = some_rows == rows
    is_product = is_whole and heads == 1  # then one product is the gradient of the weight, and is not copied
    per_head = weights.new_zeros(heads)
    grad_hidden, grad_weight = head_chunks.empty_gradients(
        hidden, weight, wants_hidden, wants_weight and not is_product
    )
    for c in range(heads):
        w = weight[c]
        total = None if is_whole or not wants_weight else torch.zeros(w.shape, dtype=wide)
        for at in slices(rows, some_rows):
            h = hidden[at, c]
            logits = product(h, w)
            losses = cross_entropy_(logits, targets[at, c], weights[at, c], wants_hidden or wants_weight, scale)
            per_head[c] += losses.sum()
            if wants_hidden:
                grad_hidden[at, c] = product(logits, w.t())
            if total is not None:
                total += product(h.t(), logits)
            elif is_product and wants_weight:
                grad_weight = _weight_gradient(h, logits, w).unsqueeze(0)
            elif wants_weight:
                grad_weight[c] = _weight_gradient(h, logits, w)
        if total is not None:
            grad_weight[c] = total
    return per_head, grad_hidden, grad_weight


def _weight_gradient(h: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
    """h^T grad [D, V], with the strides of ``weight``."""
    return product(h.t(), grad) if weight.stride(-1) == 1 else product(grad.t(), h).t()


# --- many heads in one call -------------------------------------------------------------------------------------------


def supports_heads(hidden: Tensor, weight: Tensor, byte_budget: int) -> bool:
    """Whether ``heads_cross_entropy`` supports these: there is a head for every thread, and the logits of one head per
    thread, which it holds twice, fit the budget."""
    rows, heads, width = hidden.shape
    threads = torch.get_num_threads()
    if native.function("heads_cross_entropy", hidden.dtype) is None or weight.dtype != hidden.dtype:
        return False
    few = 0 < rows and threads * rows * weight.shape[-1] * 4 <= byte_budget
    return few and heads >= max(2, threads) and width % LANES == 0 and weight.is_contiguous()


def _without_data(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    scale: float,
    wants_hidden: bool,
    wants_weight: bool,
    _: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    losses = hidden.new_empty(hidden.shape[1], dtype=torch.float32)
    return losses, *_empty_gradients(hidden, weight, wants_hidden, wants_weight)


def _empty_gradients(hidden: Tensor, weight: Tensor, wants_hidden: bool, wants_weight: bool) -> tuple[Tensor, Tensor]:
    """As ``head_chunks.empty_gradients``, that of ``hidden`` always contiguous."""
    return (
        hidden.new_empty(hidden.shape if wants_hidden else 0),
        torch.empty_like(weight) if wants_weight else hidden.new_empty(0),
    )


@operator(
    "heads_cross_entropy(Tensor hidden, Tensor weight, Tensor targets, Tensor weights, float scale, bool wants_hidden, "
    "bool wants_weight, Tensor(a!) scratch) -> (Tensor, Tensor, Tensor)",
    fake=_without_data,
)
def _heads_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    scale: float,
    wants_hidden: bool,
    wants_weight: bool,
    scratch: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, heads, width = hidden.shape
    vocab = weight.shape[-1]
    losses = hidden.new_empty(heads, dtype=torch.float32)
    grad_hidden, grad_weight = _empty_gradients(hidden, weight, wants_hidden, wants_weight)
    run = native.required_function("heads_cross_entropy", hidden.dtype)
    bad = run(
        hidden.data_ptr(),
        hidden.stride(0),
        hidden.stride(1),
        weight.data_ptr(),
        targets.data_ptr(),
        weights.data_ptr(),
        scale,
        rows,
        heads,
        width,
        vocab,
        losses.data_ptr(),
        grad_hidden.data_ptr() if wants_hidden else None,
        grad_weight.data_ptr() if wants_weight else None,
        scratch.data_ptr(),
        torch.get_num_threads(),
    )
    if bad >= 0:
        raise RuntimeError(f"a target of row {bad} is out of bounds for {vocab} classes: {targets[bad].tolist()}")
    return losses, grad_hidden, grad_weight


def heads_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    scale: float,
    wants_hidden: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropies of the heads hidden[:, c] @ weight[c], rows weighted, and their gradients.

    Args:
        hidden: [M, C, D] bf16, D a multiple of 16.
        weight: [C, D, V] bf16, contiguous.
        targets: [M, C] int64, each in [0, V).
        weights: [M, C] float32.
        scale: of the gradients.

    Returns:
        Weighted sums per head [C] float32, the gradients of ``hidden`` and ``weight`` (empty where not wanted).

    Raises:
        RuntimeError: a target outside of [0, V).
    """
    hidden = hidden if hidden.stride(-1) == 1 else hidden.contiguous()
    run = native.required_function("heads_scratch", hidden.dtype)
    scratch = torch.empty(torch.get_num_threads() * run(*hidden.shape, weight.shape[-1]), dtype=torch.uint8)
    return _heads_cross_entropy(
        hidden, weight, targets.contiguous(), weights.contiguous(), scale, wants_hidden, wants_weight, scratch
    )


@register_flop_formula(torch.ops.csm_kernels.heads_cross_entropy)
def _flops(
    hidden: Sequence[int],
    weight: Sequence[int],
    targets: object,
    weights: object,
    scale: float,
    wants_hidden: bool,
    wants_weight: bool,
    *_: object,
    **__: object,
) -> int:
    """Of the tensors, the shapes are given."""
    rows, heads, width = hidden
    return 2 * rows * heads * width * weight[-1] * (1 + wants_hidden + wants_weight)
