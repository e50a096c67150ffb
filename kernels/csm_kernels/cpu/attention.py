"""Causal grouped-query attention of a pack on a CPU, with its rotation and without autograd.

In bf16 on processors with AMX or AVX512-BF16 it is one call of the C++ library (``attention.cpp``) on the rows in their
own order. Elsewhere it is batched matrix products of folded rows (``folded_attention``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from csm_kernels.cpu import folded_attention, native
from csm_kernels.cpu.folded_attention import Fold
from csm_kernels.cpu.passes import gathered, operator, rotated, rotated_back
from csm_kernels.dtypes import wide_dtype

LANES = 16  # floats of a register; the library needs heads whose width is a multiple


@dataclass(frozen=True)
class Order:
    """The segments of a pack.

    Attributes:
        bounds: [S + 1] int64 on the CPU, cumulative lengths from 0 to the number of rows T.
        longest: rows of the longest segment.
        heads, kv_heads: of the queries, and of keys and values.
        fold: returns the folded order of the rows.
    """

    bounds: Tensor
    longest: int
    heads: int
    kv_heads: int
    fold: Callable[[], Fold]


class Kept(NamedTuple):
    """What the backward pass needs, for ``save_for_backward``.

    Attributes:
        q, k, v: rotated, q scaled; rows in their own order, or folded.
        logs: [heads, T] float32, logarithms of the rows' sums of exponentials; None if rows are folded.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    logs: Tensor | None


@functools.lru_cache(maxsize=64)
def uniform_order(segments: int, rows: int, heads: int, kv_heads: int) -> Order:
    """The order of ``segments`` segments of ``rows`` rows each."""
    # Under inference_mode the tensor could not be used in training later.
    with torch.inference_mode(False), torch.no_grad():
        bounds = torch.arange(segments + 1) * rows
    return Order(bounds, rows, heads, kv_heads, lambda: folded_attention.uniform(segments, rows, heads, kv_heads))


# --- the library ------------------------------------------------------------------------------------------------------


def _supports_rows(q: Tensor, cos: Tensor | None, order: Order, width: int) -> bool:
    if width % LANES or (cos is not None and cos.dtype != torch.float32):
        return False
    # The library gives a segment and a key-value head to one thread. All threads share the batched products of a long
    # one.
    is_busy = 2 * (len(order.bounds) - 1) * order.kv_heads >= torch.get_num_threads() or order.longest <= 512
    return is_busy and native.function("attention_forward", q.dtype) is not None


def _forward_without_data(
    q: Tensor, k: Tensor, v: Tensor, cos: object, sin: object, bounds: object, heads: int, *_: object
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(heads, q.shape[0], dtype=torch.float32)


@operator(
    "attention_rows(Tensor(a!) q, Tensor(b!) k, Tensor v, Tensor? cos, Tensor? sin, Tensor bounds, int heads, "
    "int kv_heads, float factor, Tensor(c!) scratch) -> (Tensor, Tensor)",
    fake=_forward_without_data,
)
def _attention_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    bounds: Tensor,
    heads: int,
    kv_heads: int,
    factor: float,
    scratch: Tensor,
) -> tuple[Tensor, Tensor]:
    """Rotates ``q`` and ``k`` in place, multiplies ``q`` by the factor, and returns (output, logs). All are contiguous
    bf16 [T, heads d], angles float32; ``factor`` is 1 without a rotation."""
    out, logs = torch.empty_like(q), q.new_empty(heads, q.shape[0], dtype=torch.float32)
    run = native.required_function("attention_forward", q.dtype)
    arguments = _arguments(cos, sin, bounds, heads, kv_heads, factor, q.shape[1] // heads)
    pointers = (x.data_ptr() for x in (q, k, v))
    run(
        *pointers,
        *arguments,
        out.data_ptr(),
        logs.data_ptr(),
        *_scratch_arguments(scratch, _threads(q, bounds, kv_heads)),
    )
    return out, logs


def _backward_without_data(
    grad: Tensor, out: Tensor, places: object, q: Tensor, k: Tensor, v: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


@operator(
    "attention_rows_backward(Tensor grad, Tensor out, Tensor? places, Tensor q, Tensor k, Tensor v, Tensor logs, "
    "Tensor? cos, Tensor? sin, Tensor bounds, int heads, int kv_heads, float factor, Tensor(a!) scratch)"
    " -> (Tensor, Tensor, Tensor)",
    fake=_backward_without_data,
)
def _attention_rows_backward(
    grad: Tensor,
    out: Tensor,
    places: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    logs: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    bounds: Tensor,
    heads: int,
    kv_heads: int,
    factor: float,
    scratch: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients from rotated q and k. ``places`` [T] int64: for each row the index of its row in grad and out, or
    -1."""
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    run = native.required_function("attention_backward", q.dtype)
    place = None if places is None else places.data_ptr()
    pointers = (x.data_ptr() for x in (q, k, v, logs))
    arguments = _arguments(cos, sin, bounds, heads, kv_heads, factor, q.shape[1] // heads)
    results = (x.data_ptr() for x in (dq, dk, dv))
    both = grad.data_ptr(), out.data_ptr()
    run(*both, place, *pointers, *arguments, *results, *_scratch_arguments(scratch, _threads(q, bounds, kv_heads)))
    return dq, dk, dv


def _scratch(order: Order, x: Tensor, width: int, backward: bool) -> Tensor:
    """Scratch memory, equally much for each thread."""
    size = native.required_function("attention_scratch", x.dtype)(order.longest, width, backward)
    return torch.empty(_threads(x, order.bounds, order.kv_heads) * size, dtype=torch.uint8)


def _threads(x: Tensor, bounds: Tensor, kv_heads: int) -> int:
    """How many threads work: each takes a segment and a key-value head at a time."""
    return max(1, min(native.threads(x.numel()), (len(bounds) - 1) * kv_heads))


def _scratch_arguments(scratch: Tensor, threads: int) -> tuple[int, int, int]:
    return scratch.data_ptr(), len(scratch) // threads, threads


def _arguments(
    cos: Tensor | None, sin: Tensor | None, bounds: Tensor, heads: int, kv_heads: int, factor: float, width: int
) -> tuple[int | float | None, ...]:
    angles = (None, None, 1) if cos is None or sin is None else (cos.data_ptr(), sin.data_ptr(), cos.shape[0])
    return *angles, factor, bounds.data_ptr(), len(bounds) - 1, heads, kv_heads, width


def _products_below_the_diagonal(bounds: Tensor, columns: int) -> int:
    """FLOPs of one product of all segments' scores with rows of ``columns`` elements."""
    sizes = bounds.diff()
    return columns * int((sizes * (sizes + 1)).sum())


@register_flop_formula(torch.ops.csm_kernels.attention_rows, get_raw=True)
def _forward_flops(
    q: Tensor, k: Tensor, v: Tensor, cos: object, sin: object, bounds: Tensor, *_: object, **__: object
) -> int:
    return 2 * _products_below_the_diagonal(bounds, q.shape[1])


@register_flop_formula(torch.ops.csm_kernels.attention_rows_backward, get_raw=True)
def _backward_flops(*args: Any, **_: Any) -> int:
    return 5 * _products_below_the_diagonal(args[9], args[0].shape[1])


# --- both forms -------------------------------------------------------------------------------------------------------


def keep(q: Tensor, k: Tensor, v: Tensor, logs: Tensor | None, order: Order, width: int) -> Kept:
    """What ``forward`` keeps of these arguments without a rotation, given its logs."""
    q = q * width**-0.5
    if logs is not None:
        return Kept(q, k.contiguous(), v.contiguous(), logs)
    return Kept(*folded_attention.gather(q.view(-1, width), k, v, order.fold()), None)


def forward(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, order: Order, width: int
) -> tuple[Kept, Tensor]:
    """Rotation, then softmax(q k^T / sqrt(d)) v inside each segment.

    Args:
        q: [T, heads d].  k, v: [T, kv_heads d]. A rotation may happen in place, so the caller must not need them later.
        cos, sin: [T or K, 1, d / 2] in the wide dtype; row t has the angles t modulo their number. None: no rotation.
        width: d.

    Returns:
        What ``backward`` needs, and the output [T, heads d].

    Raises:
        ValueError: segments that do not end at T.
    """
    if order.bounds[-1].item() != q.shape[0]:  # or the library would access memory after the rows
        raise ValueError(f"the segments end at {int(order.bounds[-1])}, but there are {q.shape[0]} rows")
    factor = width**-0.5
    if not _supports_rows(q, cos, order, width):
        return _forward_folded(q, k, v, cos, sin, order, width)
    if cos is None or sin is None:
        q, factor = q * factor, 1.0
    else:
        cos, sin = cos.contiguous(), sin.contiguous()
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    scratch = _scratch(order, q, width, False)
    out, logs = _attention_rows(q, k, v, cos, sin, order.bounds, order.heads, order.kv_heads, factor, scratch)
    return Kept(q, k, v, logs), out


def _forward_folded(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, order: Order, width: int
) -> tuple[Kept, Tensor]:
    fold = order.fold()
    if cos is None or sin is None:
        kept = keep(q, k, v, None, order, width)
    else:
        q, k = rotated(q, fold.queries, cos, sin, width**-0.5), rotated(k, fold.keys, cos, sin, 1.0)
        kept = Kept(q, k, gathered(v.view(-1, width), fold.keys), None)
    return kept, folded_attention.forward(kept.q, kept.k, kept.v, fold)


def backward(
    grad: Tensor,
    out: Tensor,
    rows: Tensor | None,
    kept: Kept,
    cos: Tensor | None,
    sin: Tensor | None,
    order: Order,
    width: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``forward`` for q, k and v as they were given.

    With P = softmax(S) and O = P V: dV = P^T dO, dP = dO V^T, dS = P (dP - rowsum(dO O)), dQ = dS K, dK = dS^T Q.

    Args:
        grad, out: [T, heads d], or only the rows ``rows`` [A] int64, all different; the others have no gradient.
    """
    q, k, v, logs = kept
    if logs is None:
        return _backward_folded(grad, rows, kept, cos, sin, order, width)
    places = None
    if rows is not None:
        places = rows.new_full((len(q),), -1).index_copy_(0, rows, torch.arange(len(rows)))
    if cos is not None and sin is not None:
        cos, sin = cos.contiguous(), sin.contiguous()
    grad, out, heads = grad.contiguous(), out.contiguous(), (order.heads, order.kv_heads)
    scratch, factor = _scratch(order, q, width, True), width**-0.5
    return _attention_rows_backward(grad, out, places, q, k, v, logs, cos, sin, order.bounds, *heads, factor, scratch)


def _backward_folded(
    grad: Tensor,
    rows: Tensor | None,
    kept: Kept,
    cos: Tensor | None,
    sin: Tensor | None,
    order: Order,
    width: int,
) -> tuple[Tensor, Tensor, Tensor]:
    fold, factor = order.fold(), width**-0.5
    if rows is not None:
        grad = grad.new_zeros(len(fold.queries_back) // order.heads, grad.shape[1]).index_add_(0, rows, grad)
    dq, dk, dv = folded_attention.backward(grad, kept.q, kept.k, kept.v, fold)
    dv = gathered(dv, fold.keys_back).view(-1, order.kv_heads * width)
    if cos is None or sin is None:
        dq = gathered(dq, fold.queries_back).view(-1, order.heads * width) * factor
        return dq, gathered(dk, fold.keys_back).view(dv.shape), dv
    dq = rotated_back(dq, fold.queries_back, cos, sin, factor, order.heads)
    return dq, rotated_back(dk, fold.keys_back, cos, sin, 1.0, order.kv_heads), dv


# --- for a registered operator, which keeps no ``Kept`` ---------------------------------------------------------------


def forward_with_sums(q: Tensor, k: Tensor, v: Tensor, order: Order) -> tuple[Tensor, Tensor]:
    """Attention of q [T, heads, d], k and v [T, kv_heads, d] -> [T, heads, d], and for ``backward_with_sums`` the
    logarithms of the rows' sums of exponentials, [T, heads] in the wide dtype: zeros where rows are folded."""
    kept, out = forward(q.flatten(1), k.flatten(1), v.flatten(1), None, None, order, q.shape[-1])
    wide = wide_dtype(q.dtype)
    sums = q.new_zeros(q.shape[:2], dtype=wide) if kept.logs is None else kept.logs.t().contiguous()
    return out.view(q.shape), sums


def backward_with_sums(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, order: Order
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``forward_with_sums`` for q, k and v."""
    width, logs = q.shape[-1], sums.t().contiguous() if sums.any() else None
    kept = keep(q.flatten(1), k.flatten(1), v.flatten(1), logs, order, width)
    grads = backward(grad.flatten(1), out.flatten(1), None, kept, None, None, order, width)
    dq, dk, dv = (g.view(x.shape) for g, x in zip(grads, (q, k, v), strict=True))
    return dq, dk, dv
