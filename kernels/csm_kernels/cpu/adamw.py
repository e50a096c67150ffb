"""An update of AdamW and sums of squares on a CPU, each in one pass over memory of the C++ library (``adamw.cpp``).
Without the library the callers use PyTorch's operators."""

from __future__ import annotations

import torch
from torch import Tensor

from csm_kernels.constants import PARTIAL_SUM
from csm_kernels.cpu import native
from csm_kernels.cpu.passes import do_nothing, operator

BF16, FP32 = torch.bfloat16, torch.float32
MATRIX_ROWS = 2**13  # of a linear layer's weight at most; a matrix with more is an embedding table


def supports_update(weight: torch.dtype, grad: torch.dtype | None = None, moments: torch.dtype = FP32) -> bool:
    """Whether ``adamw_`` updates weights of this dtype by gradients (``weight``'s dtype by default) and moments of
    these."""
    return moments == FP32 and native.function("adamw", weight, grad or weight) is not None


def _is(x: Tensor, dtype: torch.dtype, numel: int) -> bool:
    """Whether the library may read ``numel`` elements of this type from its memory."""
    return x.dtype == dtype and x.numel() == numel and x.is_contiguous() and x.device.type == "cpu"


@operator(
    "adamw_(Tensor(a!) weight, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!)? compensation, "
    "Tensor(e!)? live, Tensor step, Tensor? found_inf, Tensor? grad_scale, float lr, float beta1, float beta2, "
    "float weight_decay, float eps, bool stochastic, int counters, int salt, int tiles) -> ()",
    fake=do_nothing,
)
def adamw_(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    compensation: Tensor | None,
    live: Tensor | None,
    step: Tensor,
    found_inf: Tensor | None,
    grad_scale: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    stochastic: bool,
    counters: int,
    salt: int,
    tiles: int,
) -> None:
    """As in ``csm_kernels.adamw``, with moments in float32; ``live`` has a mark for each row of ``weight``.

    Raises:
        RuntimeError: types that the library does not support, or tensors that are not contiguous.
    """
    run = native.library_function("adamw", weight.dtype, grad.dtype)
    n = weight.numel()
    given: list[tuple[Tensor | None, torch.dtype, int]] = [
        (weight, weight.dtype, n),
        (grad, grad.dtype, n),
        (exp_avg, FP32, n),
        (exp_avg_sq, FP32, n),
        (compensation, BF16, n),
        (live, torch.uint8, weight.shape[0] if weight.dim() else 1),
        *((x, FP32, 1) for x in (step, found_inf, grad_scale)),
    ]
    if run is None or grad.shape != weight.shape or not all(x is None or _is(x, t, size) for x, t, size in given):
        raise RuntimeError(
            f"there is no adamw_ for {weight.dtype} {list(weight.shape)} with these gradients ({grad.dtype}), moments "
            f"({exp_avg.dtype}) and scalars: types, sizes, or not contiguous"
        )
    if not n:
        return
    rows = weight.shape[0] if live is not None else 1
    run(
        *(None if x is None else x.data_ptr() for x in (weight, grad, exp_avg, exp_avg_sq, compensation, live)),
        rows,
        n // rows,
        *(None if x is None else x.data_ptr() for x in (step, found_inf, grad_scale)),
        *(lr, beta1, beta2, weight_decay, eps),
        *(stochastic, counters, salt, tiles),
        native.threads(n),
    )


@operator("sum_of_squares(Tensor x) -> Tensor", fake=lambda x: x.new_empty((), dtype=torch.float64))
def sum_of_squares(x: Tensor) -> Tensor:
    """[] float64, the same for any number of threads: float32 sums of pieces, added up in float64. A piece is a row of
    an embedding table's gradient, where most rows are zero, and else ``PARTIAL_SUM`` numbers.

    Args:
        x: contiguous, bf16 or float32 (``supports_sums``).

    Raises:
        RuntimeError: another type, or not contiguous.
    """
    run = native.library_function("sums_of_squares", x.dtype)
    if run is None or not x.is_contiguous():
        raise RuntimeError(f"there is no sum_of_squares for {x.dtype}, or it is not contiguous")
    piece = x.shape[1] if x.dim() == 2 and len(x) > MATRIX_ROWS else PARTIAL_SUM
    sums = torch.empty(-(-x.numel() // piece), dtype=torch.float64, device=x.device)
    run(x.data_ptr(), x.numel(), piece, sums.data_ptr(), native.threads(x.numel()))
    return sums.sum()


def supports_sums(dtype: torch.dtype) -> bool:
    """Whether ``sum_of_squares`` adds up contiguous tensors of this dtype."""
    return native.function("sums_of_squares", dtype) is not None
