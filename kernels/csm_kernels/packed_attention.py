"""Causal grouped-query attention inside the segments of a pack, in one operator: new segments recompile nothing.

On CUDA in half types the work goes to flash-attn's variable-length function or to ``torch.nn.attention.varlen``. Both
are registered operators with their own backward, so they are called as they are. Everywhere else
``csm_kernels::packed_attention`` reads the segments when it runs, not when it is traced: segments of similar length
share one call, padded to the longest (padding on the right is harmless under a causal mask), on a CPU through
``cpu_attention``, on other devices through the formulas of the reference. The same segments come once per layer,
forward and backward: their plan is made once and found again by the bytes of ``cu_seqlens``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from csm_kernels.constants import GROUP_SCORES
from csm_kernels.cpu import attention as cpu_attention
from csm_kernels.cpu import folded_attention
from csm_kernels.cpu.attention import Order
from csm_kernels.cpu.folded_attention import Fold
from csm_kernels.dtypes import wide_dtype

# Segments within this factor of each other share one call. Attention is a small part of the work at speech lengths, a
# call's overhead is not.
GROUP_RATIO, GROUP_SLACK = 1.25, 8

# --- plan -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Groups:
    """Segments of similar length, padded to the longest of them, so that each group is one call.

    Attributes:
        shapes: (segments, width) of each group.
        index: [B] int64, the packed row that each row of the flattened groups reads; padding reads the segment's last.
        padding: [P] int64, the rows of the flattened groups that are padding.
        restore: [T] int64, where each packed row lies in the flattened groups; None where the one group is the pack.
    """

    shapes: tuple[tuple[int, int], ...]
    index: Tensor
    padding: Tensor
    restore: Tensor | None

    def to(self, device: torch.device) -> Groups:
        restore = None if self.restore is None else self.restore.to(device)
        return Groups(self.shapes, self.index.to(device), self.padding.to(device), restore)


@dataclass(frozen=True)
class Plan:
    """Where the segments of a pack of T rows lie.

    Attributes:
        rows: T.
        bounds: [S + 1] int64 on the CPU, ``cu_seqlens``.
        longest: rows of the longest segment.
    """

    rows: int
    bounds: Tensor
    longest: int
    folds: dict[tuple[int, int], Fold] = field(default_factory=dict, repr=False, compare=False)
    copies: dict[torch.device, Groups] = field(default_factory=dict, repr=False, compare=False)

    @functools.cached_property
    def groups(self) -> Groups:
        """On the CPU; made on first use, because what runs on CUDA and the CPU's library do without."""
        return _groups(self.bounds.numpy())

    def groups_on(self, device: torch.device) -> Groups:
        """Copied there once: a copy from pageable memory waits for the device."""
        if device not in self.copies:
            self.copies[device] = self.groups.to(device)
        return self.copies[device]

    def fold(self, heads: int, kv_heads: int) -> Fold:
        """The order of rows in ``folded_attention``, made once."""
        if (heads, kv_heads) not in self.folds:
            groups = self.groups
            with torch.inference_mode(False), torch.no_grad():
                live = torch.ones(len(groups.index), dtype=torch.bool).index_fill_(0, groups.padding, False)
                order = folded_attention.fold(groups.index, live, groups.shapes, heads, kv_heads)
            self.folds[heads, kv_heads] = order
        return self.folds[heads, kv_heads]

    def order(self, heads: int, kv_heads: int) -> Order:
        """The segments for ``cpu_attention``."""
        return Order(self.bounds, self.longest, heads, kv_heads, lambda: self.fold(heads, kv_heads))


def plan(cu_seqlens: Sequence[int] | Tensor) -> Plan:
    """The plan of segments that end where ``cu_seqlens`` says, on the CPU. Empty segments are left out.

    Raises:
        ValueError: cumulative lengths that do not begin at 0, or decrease, or hold no row.
    """
    # A copy of a few hundred bytes; from another device it waits for it.
    return _plan(torch.as_tensor(cu_seqlens, dtype=torch.int32, device="cpu").numpy().tobytes())


@functools.lru_cache(maxsize=64)
def _plan(cu_seqlens: bytes) -> Plan:
    cu = np.frombuffer(cu_seqlens or bytes(4), dtype=np.int32).astype(np.int64)
    size = np.diff(cu)
    if cu[0] != 0 or cu[-1] < 1 or size.min() < 0:
        raise ValueError("cu_seqlens must rise from 0 to the number of rows, of which there must be one")
    # A plan first made under inference_mode must still serve training afterwards.
    with torch.inference_mode(False), torch.no_grad():
        return Plan(int(cu[-1]), torch.from_numpy(cu), int(size.max()))


def _groups(cu: np.ndarray) -> Groups:
    size = np.diff(cu)
    start, size = cu[:-1][size > 0], size[size > 0]
    order = np.argsort(size, kind="stable")
    starts, ends = start[order, None], size[order, None]
    sorted_sizes = size[order].tolist()
    shapes: list[tuple[int, int]] = []
    index, live, first = [], [], 0
    while first < len(sorted_sizes):
        last = first
        while last < len(sorted_sizes) and sorted_sizes[last] <= sorted_sizes[first] * GROUP_RATIO + GROUP_SLACK:
            last += 1
        width = sorted_sizes[last - 1]
        column = np.arange(width)
        index.append((starts[first:last] + np.minimum(column, ends[first:last] - 1)).ravel())
        live.append((column < ends[first:last]).ravel())
        shapes.append((last - first, width))
        first = last
    rows, flat, is_live = int(cu[-1]), np.concatenate(index), np.concatenate(live)
    with torch.inference_mode(False), torch.no_grad():
        restore = None
        if shapes != [(1, rows)]:
            places = np.empty(rows, dtype=np.int64)
            places[flat[is_live]] = np.flatnonzero(is_live)
            restore = torch.from_numpy(places)
        padding = torch.from_numpy(np.flatnonzero(~is_live))
        return Groups(tuple(shapes), torch.from_numpy(flat), padding, restore)


# --- reference --------------------------------------------------------------------------------------------------------
# One group: q, out [g, H, L, d]; k, v [g, Hkv, L, d]; lse [g, H, L]. Every [L, L] matrix of the group is held at once.


def attention_reference(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention and the log of each row's sum of exponentials, in the wide dtype."""
    scores = _scores(q, k)
    lse = scores.logsumexp(-1)
    out = (scores - lse.unsqueeze(-1)).exp() @ v.to(scores.dtype).unsqueeze(2)
    return out.flatten(1, 2).to(q.dtype), lse.flatten(1, 2)


def attention_backward_reference(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v: with P the probabilities and S the scores,
    dV = P' dO, dS = P * (dO V' - rowsum(dO * O)), dQ = dS K, dK = dS' Q."""
    scores = _scores(q, k)
    kv_heads, wide = k.shape[1], scores.dtype
    q, grad, out = (x.to(wide).unflatten(1, (kv_heads, -1)) for x in (q, grad, out))
    k, v = (x.to(wide).unsqueeze(2) for x in (k, v))
    p = scores.sub_(lse.unflatten(1, (kv_heads, -1)).unsqueeze(-1)).exp_()
    grad_v = (p.transpose(-1, -2) @ grad).sum(2)
    grad_scores = (grad @ v.transpose(-1, -2)).sub_((grad * out).sum(-1, keepdim=True)).mul_(p)
    grad_scores.mul_(q.shape[-1] ** -0.5)
    return (grad_scores @ k).flatten(1, 2), (grad_scores.transpose(-1, -2) @ q).sum(2), grad_v


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """[g, Hkv, H / Hkv, L, L], masked, in the wide dtype."""
    wide = wide_dtype(q.dtype)
    length, head_dim = q.shape[-2:]
    scores = q.to(wide).unflatten(1, (k.shape[1], -1)) @ k.to(wide).unsqueeze(2).transpose(-1, -2) * head_dim**-0.5
    later = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(later, float("-inf"))


# --- launchers --------------------------------------------------------------------------------------------------------


def _plan_for(q: Tensor, cu_seqlens: Tensor) -> Plan:
    found = plan(cu_seqlens)
    if found.rows != q.shape[0]:
        raise ValueError(f"cu_seqlens ends at {found.rows}, but there are {q.shape[0]} rows")
    return found


def _gather(x: Tensor, groups: Groups) -> Tensor:
    return x.contiguous() if groups.restore is None else x.index_select(0, groups.index)


def _split(x: Tensor, groups: Groups) -> list[Tensor]:
    """[B, heads, ...] -> per group [segments, heads, width, ...], views."""
    parts = x.split([g * width for g, width in groups.shapes])
    return [part.unflatten(0, shape).transpose(1, 2) for part, shape in zip(parts, groups.shapes, strict=True)]


def _join(parts: Sequence[Tensor], groups: Groups, dtype: torch.dtype) -> Tensor:
    """The inverse of ``_gather`` and ``_split``."""
    rows = [part.transpose(1, 2).flatten(0, 1).to(dtype) for part in parts]
    if groups.restore is None:
        return rows[0].contiguous()
    return (rows[0] if len(rows) == 1 else torch.cat(rows)).index_select(0, groups.restore)


def _in_pieces(form: Callable[..., tuple[Tensor, ...]], kv_heads: int, *group: Tensor) -> tuple[Tensor, ...]:
    """What ``form`` makes of a group's tensors [g, heads or kv heads, length, ...], the first of them with all heads
    and no more than ``GROUP_SCORES`` scores at once, or those of one segment and one key-value head."""
    _, heads, length, _ = group[0].shape
    some = max(1, GROUP_SCORES // (heads * length * length))
    parts = min(kv_heads, -(-heads * length * length // GROUP_SCORES)) if some == 1 else 1
    while kv_heads % parts:
        parts += 1
    results = []
    for piece in zip(*(x.split(some) for x in group), strict=True):
        by_head = zip(*(x.chunk(parts, 1) for x in piece), strict=True)
        results.append(_joined([form(*few) for few in by_head], 1))
    return _joined(results, 0)


def _joined(results: list[tuple[Tensor, ...]], dim: int) -> tuple[Tensor, ...]:
    return results[0] if len(results) == 1 else tuple(torch.cat(some, dim) for some in zip(*results, strict=True))


def _on_cpu(q: Tensor) -> bool:
    return q.device.type == "cpu"


def _attend_on_cpu(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    order = plan.order(q.shape[1], k.shape[1])
    kept, out = cpu_attention.forward(q.flatten(1), k.flatten(1), v.flatten(1), None, None, order, q.shape[-1])
    wide = wide_dtype(q.dtype)
    sums = q.new_zeros(q.shape[:2], dtype=wide) if kept.logs is None else kept.logs.t().contiguous()
    return out.view(q.shape), sums


def _attend_on_cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, plan: Plan, out: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    order, width = plan.order(q.shape[1], k.shape[1]), q.shape[-1]
    logs = sums.t().contiguous() if sums.any() else None  # without sums the forward pass went over folded rows
    kept = cpu_attention.keep(q.flatten(1), k.flatten(1), v.flatten(1), logs, order, width)
    grads = cpu_attention.backward(grad.flatten(1), out.flatten(1), None, kept, None, None, order, width)
    dq, dk, dv = (g.view(x.shape) for g, x in zip(grads, (q, k, v), strict=True))
    return dq, dk, dv


# --- registered op ----------------------------------------------------------------------------------------------------


@torch.library.custom_op("csm_kernels::packed_attention", mutates_args=())
def _packed_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """The attention's output [T, H, d], and [T, H] for the backward pass in the wide dtype."""
    plan = _plan_for(q, cu_seqlens)
    with torch.autocast(q.device.type, enabled=False):  # which would narrow what is widened here
        if _on_cpu(q):
            return _attend_on_cpu(q, k, v, plan)
        groups, kv_heads = plan.groups_on(q.device), k.shape[1]
        parts = zip(*(_split(_gather(x, groups), groups) for x in (q, k, v)), strict=True)
        outs, lses = zip(*(_in_pieces(attention_reference, kv_heads, *part) for part in parts), strict=True)
        return _join(outs, groups, q.dtype), _join(lses, groups, lses[0].dtype)


@_packed_attention.register_fake
def _(q, k, v, cu_seqlens):
    wide = wide_dtype(q.dtype)
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=wide)


@torch.library.custom_op("csm_kernels::packed_attention_backward", mutates_args=())
def _packed_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    plan = _plan_for(q, cu_seqlens)
    if _on_cpu(q):
        return _attend_on_cpu_backward(grad, q, k, v, plan, out, lse)
    groups, kv_heads = plan.groups_on(q.device), k.shape[1]
    grad = _gather(grad, groups)
    if groups.padding.numel():
        # Nothing flows back from padding, so neither does anything into it: what it holds only has to be finite.
        grad.index_fill_(0, groups.padding, 0)
    inputs = (grad, *(_gather(x, groups) for x in (q, k, v, out, lse)))
    parts = zip(*(_split(x, groups) for x in inputs), strict=True)
    grads = zip(*(_in_pieces(attention_backward_reference, kv_heads, *part) for part in parts), strict=True)
    grad_q, grad_k, grad_v = (_join(results, groups, q.dtype) for results in grads)
    return grad_q, grad_k, grad_v


@_packed_attention_backward.register_fake
def _(grad, q, k, v, cu_seqlens, out, lse):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx, grad, _):
    q, k, v, cu_seqlens, out, lse = ctx.saved_tensors
    return *_packed_attention_backward(grad, q, k, v, cu_seqlens, out, lse), None


_packed_attention.register_autograd(_backward, setup_context=_setup_context)

# --- variable-length kernels on CUDA ----------------------------------------------------------------------------------


@torch.compiler.assume_constant_result
def varlen_backend(device_type: str, dtype: torch.dtype) -> str:
    """The library whose variable-length kernel serves this device and dtype: "flash-attn", "torch", or "" for none."""
    if device_type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return ""
    device = torch.cuda.current_device() if torch.cuda.is_available() else None
    return _varlen_library(device)


@functools.cache
def _varlen_library(device: int | None) -> str:
    if device is not None and torch.cuda.get_device_capability(device) < (8, 0):
        return ""  # both are built for Ampere and later
    try:
        from flash_attn import flash_attn_varlen_func  # noqa: F401

        return "flash-attn"
    except ImportError:  # missing, or built for another version of PyTorch
        pass
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: F401
    except ImportError:
        return ""
    # Some builds have the function and no kernel behind it.
    built = getattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    return "torch" if device is None or built() else ""


@torch.compiler.assume_constant_result
def _asks_for_gqa() -> bool:
    """PyTorch 2.11 does not: its kernel, FlashAttention 2, takes fewer heads of keys than of queries as they are."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _varlen(backend: str, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    cu, n = cu_seqlens, max_seqlen
    if backend == "flash-attn":
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(q, k, v, cu, cu, n, n, causal=True)
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"window_size": (-1, 0)}
    if _asks_for_gqa():
        options["enable_gqa"] = True
    out = varlen_attn(q, k, v, cu, cu, n, n, **options)
    return out if isinstance(out, Tensor) else out[0]


# --- public function --------------------------------------------------------------------------------------------------


def packed_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Causal self-attention inside each segment, grouped-query, scaled by 1/sqrt(d).

    Args:
        q: [T, H, d].  k, v: [T, Hkv, d], with H a multiple of Hkv; one dtype.
        cu_seqlens: [S + 1] int32, cumulative segment lengths from 0 to T; empty segments may be among them.
        max_seqlen: upper bound on a segment's length (only the variable-length kernels ask).

    Returns:
        [T, H, d].

    Raises:
        ValueError: where no variable-length kernel serves, ``cu_seqlens`` that do not rise from 0 to T.
    """
    backend = varlen_backend(q.device.type, q.dtype)
    if backend:
        return _varlen(backend, q, k, v, cu_seqlens, max_seqlen)
    return _packed_attention(q, k, v, cu_seqlens)[0]
