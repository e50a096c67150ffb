"""Matrix products of a CPU's linear layers, forward and backward.

In bf16, on processors with AVX512-BF16, by the library built for this processor (``cpu_linear.cpp``), elsewhere
PyTorch's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import native
from .cpu_passes import operator


def product(a: Tensor, b: Tensor, plus: Tensor | None = None) -> Tensor:
    """a b, or plus + a b.

    Args:
        a: [m, k].  b: [k, n]. Either may be a transposed view.
        plus: [m, n]; where its dtype is another, so is the result's: it is then added to the rounded product.
    """
    fits = plus is None or (plus.dtype == a.dtype and plus.is_contiguous())
    turned_a, turned_b = _turned(a, a.shape[1] % 2 == 0), _turned(b, True)
    if turned_a is None or turned_b is None or not fits or not _serves(a, b):
        if plus is None:
            return torch.mm(a, b)
        return torch.addmm(plus, a, b) if plus.dtype == a.dtype else plus + torch.mm(a, b)
    (rows, inner), columns, threads = a.shape, b.shape[1], native.threads(a.shape[0] * b.numel())
    size = native.library_function("product_scratch", a.dtype)(rows, inner, columns, turned_a, threads)
    scratch = torch.empty(size, dtype=torch.uint8)
    # Operators take tensors that lie as they say.
    return _product(a.t() if turned_a else a, turned_a, b.t() if turned_b else b, turned_b, plus, scratch)


def _serves(a: Tensor, b: Tensor) -> bool:
    same = a.dtype == b.dtype and a.device.type == "cpu" and a.numel() > 0 and b.numel() > 0
    return same and native.function("product", a.dtype) is not None


def _turned(x: Tensor, may_lie: bool) -> bool | None:
    """Whether the rows of ``x`` are contiguous and apart (False), or its transpose's (True), or none's. Rows as they
    lie are read two numbers at a time: of an odd number, the last would come with its neighbour."""
    (rows, columns), (down, across) = x.shape, x.stride()
    if may_lie and across == 1 and down >= columns:
        return False
    return True if down == 1 and across >= rows else None


def _without_data(a: Tensor, turned_a: bool, b: Tensor, turned_b: bool, *_: Any) -> Tensor:
    return a.new_empty(a.shape[1 if turned_a else 0], b.shape[0 if turned_b else 1])


@operator(
    "product(Tensor a, bool turned_a, Tensor b, bool turned_b, Tensor? plus, Tensor(a!) scratch) -> Tensor",
    fake=_without_data,
)
def _product(a: Tensor, turned_a: bool, b: Tensor, turned_b: bool, plus: Tensor | None, scratch: Tensor) -> Tensor:
    out = _without_data(a, turned_a, b, turned_b)
    rows, columns, inner = *out.shape, a.shape[0 if turned_a else 1]
    run = native.library_function("product", a.dtype)
    left, right = (a.data_ptr(), a.stride(0), turned_a), (b.data_ptr(), b.stride(0), turned_b)
    added = None if plus is None else plus.data_ptr()
    threads = native.threads(rows * b.numel())
    run(*left, *right, rows, inner, columns, added, out.data_ptr(), scratch.data_ptr(), threads)
    return out


@register_flop_formula(torch.ops.csm_kernels.product)
def _flops(a: Any, turned_a: bool, b: Any, turned_b: bool, *_: Any, **__: Any) -> int:
    return 2 * a[0] * a[1] * b[0 if turned_b else 1]
