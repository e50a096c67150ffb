"""Causal grouped-query attention inside the segments of a pack, in one operator: new segments recompile nothing.

On CUDA in half precision the variable-length kernel of flash-attn or of ``torch.nn.attention.varlen`` does the work.
Both are registered operators with their own backward, so they are called directly. Everywhere else
``csm_kernels::packed_attention`` reads the segments when it runs, not when it is traced: on a CPU it calls
``cpu.attention``; on other devices segments of similar length share one call of the reference, padded to the longest
(padding on the right is harmless under a causal mask). Every layer sees the same segments, forward and backward, so
their plan (``segments``) is made once.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from csm_kernels.choice import Choice
from csm_kernels.constants import GROUP_SCORES
from csm_kernels.dtypes import wide_dtype
from csm_kernels.segments import Groups, SegmentPlan, plan_segments

# --- reference --------------------------------------------------------------------------------------------------------
# One group: q, out [g, H, L, d]; k, v [g, Hkv, L, d]; lse [g, H, L]. Each [L, L] matrix of the group exists as a whole.


def attention_reference(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention, and the logarithm of each row's sum of exponentials in the wide dtype."""
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


# --- groups of segments -----------------------------------------------------------------------------------------------


def _plan_for(q: Tensor, cu_seqlens: Tensor) -> SegmentPlan:
    found = plan_segments(cu_seqlens)
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
    """``form`` of a group's tensors [g, heads or kv heads, length, ...], piece by piece.

    The first tensor has all heads. A piece has at most ``GROUP_SCORES`` scores, or one segment and one key-value head.
    """
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


# --- registered op ----------------------------------------------------------------------------------------------------


@torch.library.custom_op("csm_kernels::packed_attention", mutates_args=())
def _packed_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, on_cpu: bool) -> tuple[Tensor, Tensor]:
    """The attention's output [T, H, d], and [T, H] in the wide dtype for the backward pass. ``on_cpu``: by
    ``cpu.attention``."""
    plan = _plan_for(q, cu_seqlens)
    with torch.autocast(q.device.type, enabled=False):  # autocast would narrow what this widens
        if on_cpu:
            from csm_kernels.cpu import attention

            return attention.forward_with_sums(q, k, v, plan.order(q.shape[1], k.shape[1]))
        groups, kv_heads = plan.groups_on(q.device), k.shape[1]
        parts = zip(*(_split(_gather(x, groups), groups) for x in (q, k, v)), strict=True)
        outs, lses = zip(*(_in_pieces(attention_reference, kv_heads, *part) for part in parts), strict=True)
        return _join(outs, groups, q.dtype), _join(lses, groups, lses[0].dtype)


@_packed_attention.register_fake
def _(q, k, v, cu_seqlens, on_cpu):
    wide = wide_dtype(q.dtype)
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=wide)


@torch.library.custom_op("csm_kernels::packed_attention_backward", mutates_args=())
def _packed_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, out: Tensor, lse: Tensor, on_cpu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    plan = _plan_for(q, cu_seqlens)
    if on_cpu:
        from csm_kernels.cpu import attention

        return attention.backward_with_sums(grad, q, k, v, out, lse, plan.order(q.shape[1], k.shape[1]))
    groups, kv_heads = plan.groups_on(q.device), k.shape[1]
    grad = _gather(grad, groups)
    if groups.padding.numel():
        # Padding has no gradient. Its values reach no other row, and only have to be finite.
        grad.index_fill_(0, groups.padding, 0)
    inputs = (grad, *(_gather(x, groups) for x in (q, k, v, out, lse)))
    parts = zip(*(_split(x, groups) for x in inputs), strict=True)
    grads = zip(*(_in_pieces(attention_backward_reference, kv_heads, *part) for part in parts), strict=True)
    grad_q, grad_k, grad_v = (_join(results, groups, q.dtype) for results in grads)
    return grad_q, grad_k, grad_v


@_packed_attention_backward.register_fake
def _(grad, q, k, v, cu_seqlens, out, lse, on_cpu):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.on_cpu = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, grad, _):
    return *_packed_attention_backward(grad, *ctx.saved_tensors, ctx.on_cpu), None, None


_packed_attention.register_autograd(_backward, setup_context=_setup_context)

# --- variable-length kernels on CUDA ----------------------------------------------------------------------------------


@torch.compiler.assume_constant_result
def varlen_backend(device_type: str, dtype: torch.dtype) -> str:
    """The library of the variable-length kernel for this device and dtype: "flash-attn", "torch", or "" for none."""
    if device_type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return ""
    device = torch.cuda.current_device() if torch.cuda.is_available() else None
    return _varlen_library(device)


@functools.cache
def _varlen_library(device: int | None) -> str:
    if device is not None and torch.cuda.get_device_capability(device) < (8, 0):
        return ""  # both libraries are built for Ampere and later
    try:
        from flash_attn import flash_attn_varlen_func  # noqa: F401

        return "flash-attn"
    except ImportError:  # missing, or built for another version of PyTorch
        pass
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: F401
    except ImportError:
        return ""
    # Some builds have the function but not its kernel.
    built = getattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    return "torch" if device is None or built() else ""


@torch.compiler.assume_constant_result
def _needs_enable_gqa() -> bool:
    """Whether ``varlen_attn`` has this argument. In PyTorch 2.11 it has not, and accepts fewer heads of keys than of
    queries without it."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _varlen(backend: str, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    cu, n = cu_seqlens, max_seqlen
    if backend == "flash-attn":
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(q, k, v, cu, cu, n, n, causal=True)
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"window_size": (-1, 0)}
    if _needs_enable_gqa():
        options["enable_gqa"] = True
    out = varlen_attn(q, k, v, cu, cu, n, n, **options)
    return out if isinstance(out, Tensor) else out[0]


# --- public functions -------------------------------------------------------------------------------------------------


def choose_packed_attention(device: torch.device, dtype: torch.dtype) -> Choice:
    """The implementation for tensors like these: "flash-attn", "torch" (its variable-length kernel), "cpu" or
    "reference"."""
    if backend := varlen_backend(device.type, dtype):
        return Choice(backend, f"the variable-length kernel of {backend}")
    limit = "segments grouped by length: the variable-length kernels need CUDA from sm_80 on, and bf16 or fp16"
    return Choice("cpu" if device.type == "cpu" else "reference", limit)


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, impl: str = "auto"
) -> Tensor:
    """Causal self-attention inside each segment, grouped-query, scaled by 1/sqrt(d).

    Args:
        q: [T, H, d].
        k, v: [T, Hkv, d], with H a multiple of Hkv; same dtype as ``q``.
        cu_seqlens: [S + 1] int32, cumulative segment lengths from 0 to T; segments may be empty.
        max_seqlen: upper bound on a segment's length; only the variable-length kernels use it.
        impl: an answer of ``choose_packed_attention``, or "auto" for that of these tensors.

    Returns:
        [T, H, d].

    Raises:
        ValueError: without a variable-length kernel, ``cu_seqlens`` that do not rise from 0 to T.
    """
    if impl == "auto":
        impl = choose_packed_attention(q.device, q.dtype).impl
    if impl in ("cpu", "reference"):
        return _packed_attention(q, k, v, cu_seqlens, impl == "cpu")[0]
    return _varlen(impl, q, k, v, cu_seqlens, max_seqlen)
