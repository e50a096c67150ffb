"""Triton where it is installed, and the decorator of its kernels.

Without Triton the modules of ``gpu`` still import, because their operators have other implementations. Their kernels
then stay plain Python functions, which nothing may launch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

__all__ = ["KERNEL_DTYPES", "jit", "tl", "triton"]

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def jit(*unspecialized: str) -> Callable[[Callable[..., Any]], Any]:
    """``triton.jit`` for a kernel or a device function.

    Args:
        unspecialized: integer arguments that change from call to call. Without being named here, a value that is 1 or
            a multiple of 16 would be compiled into a kernel of its own.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        return function if triton is None else triton.jit(function, do_not_specialize=list(unspecialized))

    return decorate
