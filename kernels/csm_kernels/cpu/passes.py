"""The operators between the matrix products on a CPU: norms, rotation, SwiGLU, softmax and cross-entropy.

In bf16 and float32 each is one pass over memory in the C++ library (``native``). Other types, and machines without a
compiler, use PyTorch's operators, with a pass for each.

Calls go past PyTorch's dispatcher, unless something observes it (a profiler, or a mode that counts memory or time).
Then they go to the registered operators, ``csm_kernels::norm`` and so on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from csm_kernels import head_chunks
from csm_kernels.cpu import native
from csm_kernels.cpu.native import threads
from csm_kernels.dtypes import wide_dtype

_LIBRARY = torch.library.Library("csm_kernels", "FRAGMENT")
_PLAIN = {Tensor, torch.nn.Parameter, int, float, bool, type(None), torch.dtype}


Operator = TypeVar("Operator", bound=Callable[..., Any])


def is_observed(*args: object) -> bool:
    """Whether a mode or a profiler observes operators, or an argument is of a tensor class that may have no memory."""
    modes = torch._C._len_torch_dispatch_stack() or torch.autograd._profiler_enabled()
    return bool(modes) or not _PLAIN.issuperset(map(type, args))


def operator(schema: str, fake: Callable[..., object] | None = None) -> Callable[[Operator], Operator]:
    """A decorator that registers a function under ``schema``.

    Args:
        fake: computes the results' shapes without data; by default the function's form in PyTorch's operators does.
    """

    def register(function: Operator) -> Operator:
        name = schema.split("(")[0]
        _LIBRARY.define(schema)
        _LIBRARY.impl(name, function, "CPU")
        registered = getattr(torch.ops.csm_kernels, name).default

        @torch.library.register_fake(f"csm_kernels::{name}", lib=_LIBRARY)
        def without_data(*args: object) -> object:
            if fake is not None:
                return fake(*args)
            with native.left_out():
                return function(*args)

        @functools.wraps(function)
        def call(*args: object) -> object:
            return registered(*args) if is_observed(*args) else function(*args)

        return cast(Operator, call)

    return register


def do_nothing(*_: object) -> None:
    """The ``fake`` of an operator that works in place."""


# --- RMS norm ---------------------------------------------------------------------------------------------------------


@operator("norm(Tensor x, Tensor scale, float eps, ScalarType dtype) -> (Tensor, Tensor)")
def norm(x: Tensor, scale: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """RMS norm of rows.

    Args:
        x: [N, d].  scale: [d].
        dtype: of the result.

    Returns:
        r = 1 / sqrt(mean(x^2) + eps), [N, 1] in the wide dtype, and y = round(x r) scale, [N, d]. As in Sesame's norm,
        x r is rounded to ``x``'s dtype.
    """
    if run := native.function("norm", x.dtype, dtype):
        x, wide_scale = x.contiguous(), scale.to(torch.float32).contiguous()
        rows, width = x.shape
        r, y = x.new_empty(rows, 1, dtype=torch.float32), torch.empty_like(x, dtype=dtype)
        n = threads(x.numel())
        run(x.data_ptr(), wide_scale.data_ptr(), eps, r.data_ptr(), y.data_ptr(), rows, width, 0, n)
        return r, y
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide_dtype(x.dtype))
    r = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return r, _normed(x, r, scale, dtype)


@operator("normed(Tensor x, Tensor r, Tensor scale, ScalarType dtype) -> Tensor")
def normed(x: Tensor, r: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``norm``'s y, recomputed from its r."""
    if run := native.function("norm", x.dtype, dtype):
        x, wide_scale = x.contiguous(), scale.to(torch.float32).contiguous()
        y = torch.empty_like(x, dtype=dtype)
        n = threads(x.numel())
        run(x.data_ptr(), wide_scale.data_ptr(), 0.0, r.data_ptr(), y.data_ptr(), *x.shape, 1, n)
        return y
    return _normed(x, r, scale, dtype)


def _normed(x: Tensor, r: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return ((x.to(r.dtype) * r).to(x.dtype) * scale).to(dtype)


@operator(
    "norm_backward(Tensor grad, Tensor x, Tensor r, Tensor scale, Tensor? residual, bool wants_scale)"
    " -> (Tensor, Tensor)"
)
def norm_backward(
    grad: Tensor, x: Tensor, r: Tensor, scale: Tensor, residual: Tensor | None, wants_scale: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of ``norm``'s x and scale.

    With n = r x and h = g scale: dscale = sum over rows of g n, dx = r (h - n mean(h n)), in the wide dtype.

    Args:
        grad: [N, d].  x: [N, d].  r: [N, 1].
        residual: [N, d] like ``x``, added to dx; or None.

    Returns:
        dx in ``x``'s dtype, dscale in ``scale``'s (empty where it is not wanted).
    """
    if run := native.function("norm_backward", x.dtype, grad.dtype):
        grad, x, wide_scale = grad.contiguous(), x.contiguous(), scale.to(torch.float32).contiguous()
        n = threads(x.numel())
        dx, sums = torch.empty_like(x), x.new_zeros(n if wants_scale else 0, x.shape[1], dtype=torch.float32)
        residual = None if residual is None else residual.to(x.dtype).contiguous()
        run(
            grad.data_ptr(),
            x.data_ptr(),
            r.data_ptr(),
            wide_scale.data_ptr(),
            None if residual is None else residual.data_ptr(),
            dx.data_ptr(),
            sums.data_ptr() if wants_scale else None,
            *x.shape,
            n,
        )
        return dx, sums.sum(0).to(scale.dtype) if wants_scale else scale.new_empty(0)
    wide, rescaled = grad.to(r.dtype), x.to(r.dtype) * r
    product = wide * rescaled
    dscale = product.sum(0).to(scale.dtype) if wants_scale else scale.new_empty(0)
    wide_scale = scale.to(r.dtype)
    mean = (product @ wide_scale).div_(x.shape[-1]).unsqueeze(-1)
    del product
    dx = (wide * wide_scale).addcmul_(rescaled, mean, value=-1).mul_(r)
    return (dx if residual is None else dx.add_(residual)).to(x.dtype), dscale


# --- SwiGLU -----------------------------------------------------------------------------------------------------------


@operator("swiglu(Tensor a, Tensor b) -> Tensor")
def swiglu(a: Tensor, b: Tensor) -> Tensor:
    """silu(a) b; both have one shape and dtype."""
    if run := native.function("swiglu", a.dtype, b.dtype):
        a, b = a.contiguous(), b.contiguous()
        out = torch.empty_like(a)
        run(a.data_ptr(), b.data_ptr(), out.data_ptr(), a.numel(), threads(a.numel()))
        return out
    return F.silu(a).mul_(b)


@operator("swiglu_backward(Tensor grad, Tensor a, Tensor b) -> (Tensor, Tensor, Tensor)")
def swiglu_backward(grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """silu(a) b, recomputed, and its gradients for a and b: with s = sigmoid(a), grad b (s + a s (1 - s)) and grad a s.

    Args:
        grad, a, b: one shape; if their dtypes differ, PyTorch's promotion applies.
    """
    if run := native.function("swiglu_backward", grad.dtype, a.dtype, b.dtype):
        grad, a, b = grad.contiguous(), a.contiguous(), b.contiguous()
        product, da, db = torch.empty_like(a), torch.empty_like(a), torch.empty_like(a)
        pointers = (x.data_ptr() for x in (grad, a, b, product, da, db))
        run(*pointers, a.numel(), threads(a.numel()))
        return product, da, db
    silu = F.silu(a)
    da = torch.ops.aten.silu_backward(grad * b, a)
    return silu * b, da, silu.mul_(grad)


# --- rotation and order -----------------------------------------------------------------------------------------------


@operator("gathered(Tensor x, Tensor index) -> Tensor")
def gathered(x: Tensor, index: Tensor) -> Tensor:
    """The rows ``index`` [B] int64 of x [A, d]. Indices in this module come from a ``Fold`` and are not checked."""
    if run := native.function("gather_rotated", x.dtype, index.dtype):
        x, index = x.contiguous(), index.contiguous()
        out = x.new_empty(index.shape[0], x.shape[1])
        n = threads(out.numel())
        run(x.data_ptr(), index.data_ptr(), 0, 0, 1.0, 1.0, 0, 1, 1, x.shape[1], out.data_ptr(), index.shape[0], n)
        return out
    return x.index_select(0, index)


@operator("rotated(Tensor x, Tensor index, Tensor cos, Tensor sin, float factor) -> Tensor")
def rotated(x: Tensor, index: Tensor, cos: Tensor, sin: Tensor, factor: float) -> Tensor:
    """Rows of heads, rotated, scaled and reordered.

    Interleaved pairs (x[2i], x[2i + 1]), the convention of Sesame and Meta, are rotated in the wide dtype.

    Args:
        x: [T, heads d].
        index: [B] int64, for each result its row among the T * heads rows of d.
        cos, sin: [T or K, 1, d / 2] in the wide dtype; row t has the angles t modulo their number.
        factor: of the result.

    Returns:
        [B, d].
    """
    width = 2 * cos.shape[-1]
    if run := native.function("gather_rotated", x.dtype, index.dtype, cos.dtype, sin.dtype):
        return _run_rotation(run, x, index, cos, sin, factor, 1.0, 1, x.shape[1] // width)
    return _rotate(x, cos, sin, factor).view(-1, width).index_select(0, index)


@operator("rotated_back(Tensor x, Tensor index, Tensor cos, Tensor sin, float factor, int heads) -> Tensor")
def rotated_back(x: Tensor, index: Tensor, cos: Tensor, sin: Tensor, factor: float, heads: int) -> Tensor:
    """The gradient of ``rotated``.

    Args:
        x: [B, d].
        index: [T heads] int64, where each of the T * heads rows lies in x.

    Returns:
        [T, heads d].
    """
    width = x.shape[-1]
    if run := native.function("gather_rotated", x.dtype, index.dtype, cos.dtype, sin.dtype):
        return _run_rotation(run, x, index, cos, sin, factor, -1.0, 0, heads).view(-1, heads * width)
    return _rotate(x.index_select(0, index).view(-1, heads * width), cos, -sin, factor)


def _run_rotation(
    run: native.Function,
    x: Tensor,
    index: Tensor,
    cos: Tensor,
    sin: Tensor,
    factor: float,
    sign: float,
    of_source: int,
    heads: int,
) -> Tensor:
    x, index, cos, sin = x.contiguous(), index.contiguous(), cos.contiguous(), sin.contiguous()
    width = 2 * cos.shape[-1]
    out = x.new_empty(index.shape[0], width)
    run(
        x.data_ptr(),
        index.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        factor,
        sign,
        of_source,
        heads,
        cos.shape[0],
        width,
        out.data_ptr(),
        index.shape[0],
        threads(out.numel()),
    )
    return out


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, factor: float) -> Tensor:
    """[T, heads d] rotated by unit complex numbers times the factor."""
    half = cos.shape[-1]
    wide, turn = x.to(cos.dtype), torch.complex(cos, sin) * factor
    pairs = torch.view_as_complex(wide.view(-1, cos.shape[0], x.shape[1] // (2 * half), half, 2))
    turned = pairs * turn if wide is x else pairs.mul_(turn)
    return torch.view_as_real(turned).to(x.dtype).view(x.shape)


# --- softmax ----------------------------------------------------------------------------------------------------------


@operator("causal_softmax_(Tensor(a!) scores, int block, int before) -> ()", fake=do_nothing)
def causal_softmax_(scores: Tensor, block: int, before: int) -> None:
    """Softmax over the scores that a row sees, in place; the others become 0.

    Args:
        scores: [n, repeat * block, m] contiguous. Row i of a block of ``block`` sees its first ``before`` + i + 1.
    """
    if run := native.function("causal_softmax", scores.dtype):
        m = scores.shape[-1]
        if scores.numel():
            run(scores.data_ptr(), scores.numel() // m, block, m, before, threads(scores.numel()))
        return
    blocks = scores.view(-1, block, scores.shape[-1])
    blocks[..., before:].add_(_mask(block, scores.shape[-1] - before, scores.dtype))
    if scores.dtype == torch.bfloat16 and scores.shape[-1] % 32:
        # PyTorch needs two to three times as long for a row of bf16 as for one of float32 if it is no multiple of 32.
        scores.copy_(scores.float().softmax(-1))
    else:
        torch.softmax(scores, -1, out=scores)


@functools.lru_cache(maxsize=64)
def _mask(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """[rows, columns]: 0 where row i sees a column up to i, minus infinity elsewhere."""
    with torch.inference_mode(False), torch.no_grad():
        return torch.full((rows, columns), -torch.inf, dtype=dtype).triu_(1)


@operator("causal_softmax_backward_(Tensor(a!) grad, Tensor p, int block, int before) -> ()", fake=do_nothing)
def causal_softmax_backward_(grad: Tensor, p: Tensor, block: int, before: int) -> None:
    """p (grad - sum of grad p) of each row, in place of ``grad``; both as in ``causal_softmax_``."""
    if run := native.function("causal_softmax_backward", grad.dtype, p.dtype):
        m = grad.shape[-1]
        if grad.numel():
            run(grad.data_ptr(), p.data_ptr(), grad.numel() // m, block, m, before, threads(grad.numel()))
        return
    torch.ops.aten._softmax_backward_data.out(grad, p, -1, p.dtype, grad_input=grad)


@operator("cross_entropy_(Tensor(a!) logits, Tensor targets, Tensor weights, bool wants_grad, float scale) -> Tensor")
def cross_entropy_(logits: Tensor, targets: Tensor, weights: Tensor, wants_grad: bool, scale: float) -> Tensor:
    """As ``head_chunks.cross_entropy_``.

    Raises:
        RuntimeError: a target outside of [0, V).
    """
    if run := native.function("cross_entropy", logits.dtype, targets.dtype, weights.dtype):
        losses = torch.empty_like(weights, memory_format=torch.contiguous_format)
        targets, weights = targets.contiguous(), weights.contiguous()
        pointers = (x.data_ptr() for x in (logits, targets, weights, losses))
        bad = run(*pointers, scale, wants_grad, *logits.shape, threads(logits.numel()))
        if bad >= 0:
            raise RuntimeError(f"target {targets[bad]} of row {bad} is out of bounds for {logits.shape[1]} classes")
        return losses
    return head_chunks.cross_entropy_(logits, targets, weights, wants_grad, scale)
