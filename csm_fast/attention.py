"""Packed causal attention and rotary embedding: one function, one choice of implementation."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Segments within this factor of each other share one SDPA call, padded to the longest (padding on the right is
# harmless under a causal mask). Attention is a small part of the work at speech lengths, a call's overhead is not.
GROUP_RATIO, GROUP_SLACK = 1.25, 8


@dataclass(frozen=True)
class Segments:
    """Where the conversations of a pack lie: the attention pattern of the whole forward pass.

    Attributes:
        lengths: rows of each segment, on the host; they sum to T.
        cu_seqlens: [S + 1] int32 on the device, cumulative lengths from 0 to T.
        max_seqlen: upper bound on ``lengths``.
        groups: per group of similar lengths, a [g, L] int64 index of packed rows (clamped where padded).
        restore: [T] int64, where each packed row lies in the concatenation of the flattened groups; None when the
            single group is the pack itself.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    max_seqlen: int
    groups: tuple[Tensor, ...]
    restore: Tensor | None

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> Segments:
        """Plan the attention of segments that lie one after the other."""
        lengths = tuple(int(n) for n in lengths)
        if not lengths or min(lengths) < 1:
            raise ValueError("a pack needs at least one segment, none of them empty")
        size = torch.tensor(lengths)
        end = size.cumsum(0)
        start = end - size
        order = torch.argsort(size, stable=True)
        groups, restore, base, first = [], torch.empty(int(end[-1]), dtype=torch.long), 0, 0
        while first < len(lengths):
            shortest = int(size[order[first]])
            last = first
            while last < len(lengths) and int(size[order[last]]) <= shortest * GROUP_RATIO + GROUP_SLACK:
                last += 1
            members = order[first:last]
            width = int(size[members].max())
            column = torch.arange(width)
            live = column < size[members].unsqueeze(1)
            index = start[members].unsqueeze(1) + torch.minimum(column, size[members].unsqueeze(1) - 1)
            restore[index[live]] = base + live.flatten().nonzero().squeeze(1)
            groups.append(index.to(device))
            base += index.numel()
            first = last
        whole = len(groups) == 1 and groups[0].shape[0] == 1
        cu = torch.cat([torch.zeros(1, dtype=torch.long), end]).to(torch.int32)
        return cls(lengths, cu.to(device), max(lengths), tuple(groups), None if whole else restore.to(device))


def packed_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """Causal self-attention inside each segment, grouped-query.

    Args:
        q: [T, H, d].  k, v: [T, Hkv, d], with H a multiple of Hkv.
        segments: the pack's layout; sums to T.

    Returns:
        [T, H, d], scaled by 1/sqrt(d).
    """
    kernel = varlen_kernel(q.device.type, q.dtype)
    if kernel is not None:
        return kernel(q, k, v, segments.cu_seqlens, segments.max_seqlen)
    gqa = q.shape[1] != k.shape[1]
    outputs = []
    for index in segments.groups:
        g, width = index.shape
        # One segment is the pack itself; several are gathered.
        rows = (x if segments.restore is None else x.index_select(0, index.flatten()) for x in (q, k, v))
        qs, ks, vs = (x.view(g, width, *x.shape[1:]).transpose(1, 2) for x in rows)
        out = F.scaled_dot_product_attention(qs, ks, vs, is_causal=True, enable_gqa=gqa)
        outputs.append(out.transpose(1, 2).reshape(g * width, *q.shape[1:]))
    if segments.restore is None:
        return outputs[0]
    return torch.cat(outputs).index_select(0, segments.restore)


@functools.cache
def varlen_kernel(device_type: str, dtype: torch.dtype) -> Callable | None:
    """The variable-length kernel for this device and dtype, or None where SDPA over groups has to do."""
    if device_type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    try:
        from flash_attn import flash_attn_varlen_func

        return lambda q, k, v, cu, n: flash_attn_varlen_func(q, k, v, cu, cu, n, n, causal=True)
    except ImportError:
        pass
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        return lambda q, k, v, cu, n: varlen_attn(q, k, v, cu, cu, n, n, window_size=(-1, 0), enable_gqa=True)

    def expanded(q, k, v, cu, n):  # torch 2.11: equal head counts only
        repeat = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(repeat, 1) for x in (k, v))
        return varlen_attn(q, k, v, cu, cu, n, n, window_size=(-1, 0))

    return expanded


# ------------------------------------------------------------------------------------------------------- rotation


@dataclass(frozen=True)
class RopeSpec:
    """Llama-3's scaled rotary embedding for one head width."""

    head_dim: int
    base: float
    scale_factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    old_context_len: int = 8192


@functools.lru_cache(maxsize=16)
def rope_table(spec: RopeSpec, length: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines [length, head_dim / 2] in ``dtype`` (float32, or float64 for float64 models).

    The arithmetic follows Llama 3.1's reference step by step in ``dtype``: at position 2,000 a different rounding of
    the frequencies is an angle 1e-4 apart.
    """
    # A table first asked for under inference_mode must still serve training afterwards.
    with torch.inference_mode(False), torch.no_grad():
        return _rope_table(spec, length, dtype, device)


def _rope_table(spec: RopeSpec, length: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    half = torch.arange(0, spec.head_dim, 2)[: spec.head_dim // 2].to(dtype)
    freqs = 1.0 / (spec.base ** (half / spec.head_dim))
    if spec.scale_factor != 1.0:
        low_wavelen = spec.old_context_len / spec.low_freq_factor
        high_wavelen = spec.old_context_len / spec.high_freq_factor
        wavelen = 2 * math.pi / freqs
        smooth = (spec.old_context_len / wavelen - spec.low_freq_factor) / (
            spec.high_freq_factor - spec.low_freq_factor
        )
        blended = (1 - smooth) * freqs / spec.scale_factor + smooth * freqs
        scaled = torch.where(wavelen > low_wavelen, freqs / spec.scale_factor, blended)
        freqs = torch.where(wavelen < high_wavelen, freqs, scaled)
    angles = torch.arange(length, dtype=dtype).unsqueeze(1) * freqs
    return angles.cos().to(device), angles.sin().to(device)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate interleaved pairs (x[2i], x[2i+1]), Sesame's and Meta's convention.

    Args:
        x: [..., H, d].
        cos, sin: broadcastable to [..., 1, d / 2], in the table's dtype; the rotation is done in that dtype.

    Returns:
        Same shape and dtype as ``x``.
    """
    pairs = x.to(cos.dtype).unflatten(-1, (-1, 2))
    even, odd = pairs.unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2).to(x.dtype)
