"""Llama-3's rotary embedding: its parameters, tables of angles, and the rotation."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from csm_fast import ops


@dataclass(frozen=True)
class RopeSpec:
    """Llama-3's scaled rotary embedding for one head width."""

    head_dim: int
    base: float
    scale_factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    old_context_len: int = 8192


def rope_spec(attn: Any) -> RopeSpec:
    """Rotary parameters of an attention module: ours, or torchtune's ``pos_embeddings``.

    Raises:
        ValueError: a rotary module without torchtune's attribute names.
    """
    if isinstance(getattr(attn, "rope", None), RopeSpec):
        return attn.rope
    rope = attn.pos_embeddings
    if not hasattr(rope, "base") or not hasattr(rope, "dim"):
        raise ValueError(f"cannot read the rotary parameters of {type(rope).__name__}")
    if not hasattr(rope, "scale_factor"):
        return RopeSpec(rope.dim, float(rope.base))
    return RopeSpec(
        rope.dim,
        float(rope.base),
        float(rope.scale_factor),
        float(getattr(rope, "low_freq_factor", 1)),
        float(getattr(rope, "high_freq_factor", 4)),
        int(getattr(rope, "old_context_len", 8192)),
    )


@functools.lru_cache(maxsize=16)
def rope_table(spec: RopeSpec, length: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines [length, head_dim / 2] in ``dtype`` (float32, or float64 for float64 models).

    The arithmetic follows Llama 3.1's reference step by step in ``dtype``: at position 2,000 a different rounding of
    the frequencies is an angle 1e-4 apart.
    """
    # A table made under inference_mode could not be used in training afterwards.
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
    """Rotate the pairs of [..., H, d]; ``cos`` and ``sin`` are broadcastable to [..., 1, d / 2]."""
    return ops.rotate_pairs(x, cos, sin)
