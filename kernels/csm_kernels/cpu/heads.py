"""Many linear heads over the same few rows and their cross-entropies on a CPU: one call of the library built for this
processor (``heads.cpp``), in bf16 on processors with AMX or AVX512-BF16."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from csm_kernels.cpu import native
from csm_kernels.cpu.attention import LANES
from csm_kernels.cpu.passes import operator


def serves(hidden: Tensor, weight: Tensor, targets: Tensor, byte_budget: int) -> bool:
    """Whether ``heads_cross_entropy`` takes these: a head for every thread, and the logits of so many, which it has
    twice, within the budget."""
    rows, heads, width = hidden.shape
    threads = torch.get_num_threads()
    if native.function("heads_cross_entropy", hidden.dtype) is None or weight.dtype != hidden.dtype:
        return False
    few = 0 < rows and threads * rows * weight.shape[-1] * 4 <= byte_budget
    return few and heads >= max(2, threads) and width % LANES == 0 and weight.is_contiguous()


def _without_data(
    hidden: Tensor,
    weight: Tensor,
    targets: Any,
    weights: Any,
    scale: Any,
    wants_hidden: bool,
    wants_weight: bool,
    _: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    losses = hidden.new_empty(hidden.shape[1], dtype=torch.float32)
    return losses, *_results(hidden, weight, wants_hidden, wants_weight)


def _results(hidden: Tensor, weight: Tensor, wants_hidden: bool, wants_weight: bool) -> tuple[Tensor, Tensor]:
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
    grad_hidden, grad_weight = _results(hidden, weight, wants_hidden, wants_weight)
    run = native.library_function("heads_cross_entropy", hidden.dtype)
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
    run = native.library_function("heads_scratch", hidden.dtype)
    scratch = torch.empty(torch.get_num_threads() * run(*hidden.shape, weight.shape[-1]), dtype=torch.uint8)
    return _heads_cross_entropy(
        hidden, weight, targets.contiguous(), weights.contiguous(), scale, wants_hidden, wants_weight, scratch
    )


@register_flop_formula(torch.ops.csm_kernels.heads_cross_entropy)
def _flops(
    hidden: Any, weight: Any, targets: Any, weights: Any, scale: Any, wants_hidden: bool, wants_weight: bool, *_, **__
) -> int:
    rows, heads, width = hidden
    return 2 * rows * heads * width * weight[-1] * (1 + wants_hidden + wants_weight)
