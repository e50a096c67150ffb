"""An update of AdamW on a CPU in one pass over memory, and the norm of gradients, by the library built for this
processor (``cpu_adamw.cpp``). Where there is none, PyTorch's operators do both, in the callers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import native
from .cpu_passes import nothing, operator

BF16, FP32 = torch.bfloat16, torch.float32
SUMMED = 2**16  # numbers of a partial sum, as in cpu_adamw.cpp


def serves_adamw(weight: Tensor, grad: Tensor, exp_avg: Tensor) -> bool:
    """Whether ``adamw_`` takes these: on a CPU, bf16 or float32, with moments in float32."""
    there = weight.device.type == "cpu" and exp_avg.dtype == FP32
    return there and native.function("adamw", weight.dtype, grad.dtype) is not None


@operator(
    "adamw_(Tensor(a!) weight, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!)? compensation, "
    "Tensor(e!)? live, Tensor step, Tensor? found_inf, Tensor? grad_scale, float lr, float beta1, "
    "float beta2, float weight_decay, float eps, bool stochastic, int counters, int salt, int tiles) -> ()",
    fake=nothing,
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
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101) in float32, in place; the mathematics of ``torch.optim.AdamW``.

    Args:
        weight: any shape, contiguous, bf16 or float32.
        grad: like ``weight``.
        exp_avg, exp_avg_sq: like ``weight`` in float32.
        compensation: like ``weight`` in bf16, what rounding took off it (Kahan); or None.
        live: uint8 [rows] or None: rows of ``weight`` [rows, ...] that never had a gradient are not updated, which is
            the same where nothing decays. Those that now have one are marked.
        step: [] float32, the number of this update, from 1.
        found_inf: [] float32; where it is 1, nothing happens.
        grad_scale: [] float32 that the gradient is divided by.
        stochastic: round bf16 weights stochastically, by the draws of ``counters``, ``salt`` and ``tiles``
            (``csm_fast.adamw.Draws``), and else to nearest.

    Raises:
        RuntimeError: types that there is no form for, or tensors that are not contiguous.
    """
    run = native.library_function("adamw", weight.dtype, grad.dtype)
    tensors = weight, grad, exp_avg, exp_avg_sq, compensation, live
    if run is None or exp_avg.dtype != FP32 or exp_avg_sq.dtype != FP32:
        raise RuntimeError(f"there is no adamw_ for {weight.dtype} with gradients in {grad.dtype}")
    if not all(x is None or x.is_contiguous() for x in tensors) or grad.shape != weight.shape:
        raise RuntimeError("adamw_ takes contiguous tensors of one shape")
    if not weight.numel():
        return
    rows = weight.shape[0] if live is not None else 1
    run(
        *(None if x is None else x.data_ptr() for x in tensors),
        rows,
        weight.numel() // rows,
        *(None if x is None else x.data_ptr() for x in (step, found_inf, grad_scale)),
        *(lr, beta1, beta2, weight_decay, eps),
        *(stochastic, counters, salt, tiles),
        native.threads(weight.numel()),
    )


@operator("sum_of_squares(Tensor x, Tensor? rows) -> Tensor", fake=lambda x, _: x.new_empty((), dtype=torch.float64))
def sum_of_squares(x: Tensor, rows: Tensor | None) -> Tensor:
    """[] float64, the same for any number of threads.

    Args:
        x: contiguous, bf16 or float32 (``serves_sum``).
        rows: int64 [n], which rows of x [rows, d] are added up; None: all of x.
    """
    run = native.library_function("sums_of_squares", x.dtype)
    if run is None or not x.is_contiguous():
        raise RuntimeError(f"there is no sum_of_squares for {x.dtype}, or it is not contiguous")
    width = x.shape[-1] if rows is not None else 1
    count = x.numel() if rows is None else len(rows)
    sums = torch.empty(-(-count // SUMMED) if rows is None else count, dtype=torch.float64)
    index: Any = None if rows is None else rows.contiguous().data_ptr()
    run(x.data_ptr(), index, count, width, sums.data_ptr(), native.threads(count * width))
    return sums.sum()


def serves_sum(x: Tensor) -> bool:
    """Whether ``sum_of_squares`` takes it."""
    return x.device.type == "cpu" and x.is_contiguous() and native.function("sums_of_squares", x.dtype) is not None
