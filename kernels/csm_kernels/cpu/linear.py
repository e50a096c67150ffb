"""Matrix products of linear layers on a CPU, forward and backward.

In bf16 on processors with AMX or AVX512-BF16 the C++ library computes them (``linear.cpp``), elsewhere PyTorch.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from csm_kernels.cpu import native
from csm_kernels.cpu.passes import is_observed, operator

Size = tuple[int, ...]


class MatmulChoice(NamedTuple):
    """How the library is called for two matrices.

    Attributes:
        transposed_a, transposed_b: whether they are stored as their transposes.
        sizes: rows, inner, columns.
        strides: of the rows of both, as they are stored.
        scratch: bytes.
    """

    transposed_a: bool
    transposed_b: bool
    sizes: tuple[int, int, int]
    strides: tuple[int, int]
    scratch: int
    threads: int


def product(a: Tensor, b: Tensor, plus: Tensor | None = None) -> Tensor:
    """a b, or plus + a b.

    Args:
        a: [m, k].  b: [k, n]. Either may be a transposed view.
        plus: [m, n]. If its dtype is another one, the result has that dtype: plus is then added to the rounded product.
    """
    if plus is not None and plus.dtype != a.dtype:
        return plus + product(a, b)
    dtype = a.dtype
    run = native.function("product", dtype)
    fits = b.dtype == dtype and (plus is None or plus.is_contiguous())
    choice = None
    if run is not None and fits and a.device.type == "cpu":
        choice = _choose(a.shape, a.stride(), b.shape, b.stride(), dtype, torch.get_num_threads())
    if run is None or choice is None:
        return torch.mm(a, b) if plus is None else torch.addmm(plus, a, b)
    scratch = torch.empty(choice.scratch, dtype=torch.uint8)
    if is_observed(a, b, plus):
        return torch.ops.csm_kernels.product(a, b, plus, scratch)
    return _run(run, choice, a, b, plus, scratch)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return product(x, weight.t())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        wants_x, wants_weight = ctx.needs_input_grad
        return product(grad, weight) if wants_x else None, product(grad.t(), x) if wants_weight else None


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """A linear layer without bias.

    Args:
        x: [..., D] on a CPU.
        weight: [N, D], the same dtype.

    Returns:
        [..., N]. Gradients of first order only.
    """
    return _Linear.apply(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[0])


def supports_products(dtype: torch.dtype) -> bool:
    """Whether the library computes products of this dtype."""
    return native.function("product", dtype) is not None


@functools.lru_cache(maxsize=4096)
def _choose(
    a: Size, a_stride: Size, b: Size, b_stride: Size, dtype: torch.dtype, most_threads: int
) -> MatmulChoice | None:
    (rows, inner), columns = a, b[1]
    transposed_a, transposed_b = _is_transposed(a, a_stride), _is_transposed(b, b_stride)
    if transposed_a is None or transposed_b is None or not rows * inner * columns or b[0] != inner:
        return None
    threads = min(native.threads(rows * inner * columns), most_threads)
    scratch = native.required_function("product_scratch", dtype)(rows, inner, columns, transposed_a, threads)
    strides = a_stride[1 if transposed_a else 0], b_stride[1 if transposed_b else 0]
    return MatmulChoice(transposed_a, transposed_b, (rows, inner, columns), strides, scratch, threads)


def _is_transposed(shape: Size, stride: Size) -> bool | None:
    """False if the rows of a matrix are contiguous and apart, True if those of its transpose are, None if neither
    are."""
    (rows, columns), (down, across) = shape, stride
    if across == 1 and down >= columns:
        return False
    return True if down == 1 and across >= rows else None


def _run(
    run: native.Function, choice: MatmulChoice, a: Tensor, b: Tensor, plus: Tensor | None, scratch: Tensor
) -> Tensor:
    rows, inner, columns = choice.sizes
    out = torch.empty((rows, columns), dtype=a.dtype)
    run(
        a.data_ptr(),
        choice.strides[0],
        choice.transposed_a,
        b.data_ptr(),
        choice.strides[1],
        choice.transposed_b,
        rows,
        inner,
        columns,
        None if plus is None else plus.data_ptr(),
        out.data_ptr(),
        scratch.data_ptr(),
        choice.threads,
    )
    return out


def _without_data(a: Tensor, b: Tensor, *_: object) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


@operator("product(Tensor a, Tensor b, Tensor? plus, Tensor(a!) scratch) -> Tensor", fake=_without_data)
def _product(a: Tensor, b: Tensor, plus: Tensor | None, scratch: Tensor) -> Tensor:
    """``product`` of matrices that the library supports."""
    choice = _choose(a.shape, a.stride(), b.shape, b.stride(), a.dtype, torch.get_num_threads())
    if choice is None:
        raise ValueError("csm_kernels::product takes matrices whose rows are contiguous, or their transposes'")
    return _run(native.required_function("product", a.dtype), choice, a, b, plus, scratch)


@register_flop_formula(torch.ops.csm_kernels.product)
def _flops(a: Size, b: Size, *_: object, **__: object) -> int:
    return 2 * a[0] * a[1] * b[1]
