"""The one rule that says which implementation of an operator runs.

``csm_fast.ops.choose`` applies it to every operator and passes the answer on. An operator that is called directly
applies it itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from csm_kernels.gpu import jit

IMPLS = ("auto", "triton", "torch")


class Choice(NamedTuple):
    """An answer.

    Attributes:
        impl: "triton": the kernel in ``gpu``; "cpu": the form in ``cpu``; "reference": PyTorch's operators on any
            device; for packed attention also "flash-attn" or "torch", the library of a variable-length kernel.
        why: the reason, for people.
    """

    impl: str
    why: str


def resolve(
    impl: str,
    device: torch.device,
    dtype: torch.dtype,
    why_unsupported: Callable[..., str] | None = None,
    *inputs: Tensor,
) -> Choice:
    """The implementation of an operator that has a Triton kernel.

    Args:
        impl: "triton" or "torch", which is then used; "auto": the kernel where it runs, and "torch" elsewhere; or an
            answer of this function, which is returned.
        device, dtype: of the tensors that the operator computes with.
        why_unsupported: called with ``inputs`` where all else speaks for the kernel: what the kernel asks of them and
            they are not, or an empty string.

    Raises:
        ValueError: an unknown ``impl``.
        ImportError: ``impl`` is "triton", and Triton is not installed.
    """
    if impl in ("cpu", "reference"):
        return Choice(impl, "asked for")
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, not {impl!r}")
    if impl == "triton":
        if jit.triton is None:
            raise ImportError("impl='triton' needs the package triton; install it, or use impl='torch'")
        return Choice("triton", "asked for")
    plain = "cpu" if device.type == "cpu" else "reference"
    if impl == "torch":
        return Choice(plain, "asked for")
    if dtype not in jit.KERNEL_DTYPES:
        return Choice(plain, f"{str(dtype).removeprefix('torch.')}: the kernels compute in float32")
    if device.type != "cuda":
        return Choice(plain, f"the kernels need a CUDA device, this is {device.type}")
    if jit.triton is None:
        return Choice(plain, "Triton is not installed")
    if inputs and why_unsupported is not None and (limit := why_unsupported(*inputs)):
        return Choice(plain, f"the kernel is for {limit}")
    return Choice("triton", "a CUDA device, and Triton is installed")
