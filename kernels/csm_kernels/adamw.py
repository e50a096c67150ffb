"""AdamW in one pass over memory: the contract of the kernel for CUDA (``gpu.adamw``) and of the form for a CPU
(``cpu.adamw``). ``csm_fast.train.optim.adamw`` has the same update in PyTorch's operators.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from csm_kernels.gpu.adamw import BLOCK, launch_adamw_


class Moments(NamedTuple):
    """The moments of a weight of n elements, as they are kept.

    Attributes:
        exp_avg, exp_avg_sq: like the weight, in float32 or uint8.
        scales: of uint8 moments: the largest magnitude of each block of 256, [ceil(n / 256)] float32, of both.
        maps: of uint8 moments: the ascending values in [-1, 1] and [0, 1] of their codes, [2, 256] float32.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor
    scales: tuple[Tensor, Tensor] | None = None
    maps: Tensor | None = None


class Settings(NamedTuple):
    """The settings of one parameter's update.

    Attributes:
        draws: the keys of stochastic rounding's random bits (``csm_fast.train.optim.rounding``); None: round to
            nearest.
    """

    lr: float
    beta1: float
    beta2: float
    weight_decay: float
    eps: float
    draws: tuple[int, int, int] | None = None


def adamw_part(impl: str, weight: Tensor) -> int:
    """How many elements of a table ``adamw_`` updates or skips together: a row on a CPU, those of a program of the
    kernel on CUDA."""
    return weight.shape[-1] if impl == "cpu" else BLOCK


def adamw_(
    impl: str,
    weight: Tensor,
    grad: Tensor,
    moments: Moments,
    compensation: Tensor | None,
    live: Tensor | None,
    step: Tensor,
    found_inf: Tensor | None,
    grad_scale: Tensor | None,
    settings: Settings,
) -> None:
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101) in float32, in place; the mathematics of ``torch.optim.AdamW``.

    Args:
        impl: "triton", or "cpu", which takes moments in float32 only.
        weight: contiguous, bf16 or float32.
        grad: like ``weight``.
        compensation: like ``weight`` in bf16, what rounding took off it (Kahan); or None.
        live: uint8, a mark for each ``adamw_part`` elements; or None. Parts that never had a gradient are not updated,
            which changes nothing where weights do not decay. Parts that now have one are marked.
        step: [] float32, the number of this update, from 1.
        found_inf: [] float32; where it is 1, nothing happens.
        grad_scale: [] float32 that the gradient is divided by.

    Raises:
        ValueError, RuntimeError: tensors of other types or layouts, with "triton" and "cpu".
    """
    if impl == "triton":
        launch_adamw_(weight, grad, *moments, compensation, live, step, found_inf, grad_scale, **settings._asdict())
        return
    from csm_kernels.cpu import adamw

    rounding = (settings.draws is not None, *(settings.draws or (0, 0, 0)))
    scalars = (step, found_inf, grad_scale, *settings[:5], *rounding)
    adamw.adamw_(weight, grad, moments.exp_avg, moments.exp_avg_sq, compensation, live, *scalars)
