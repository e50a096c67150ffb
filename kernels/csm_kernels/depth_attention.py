"""Causal attention over the K codebooks of each frame, with the rotary embedding folded in.

The depth decoder's sequences are K = 32 long and there are thousands of them, a shape that general flash kernels handle
badly. Here a program owns one (frame, KV head): the rotated K tile and the V tile stay on the chip, and the query heads
that share them pass by one at a time. A row of scores is whole within one tile, so nothing is saved for the backward
but the inputs: scores, maximum, sum and the row sums of p dp are recomputed from what the backward loads anyway.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from csm_kernels.cpu import short_attention
from csm_kernels.gpu.depth_attention import _launch_backward, _launch_forward, _why_not_triton, triton
from csm_kernels.pointwise import rotate_pairs

IMPLS = ("auto", "triton", "torch")

# --- reference ----------------------------------------------------------------------------------------------------


def _reference(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotation in the table's dtype, rounded to the inputs', then PyTorch's attention; on a CPU batched GEMMs,
    which sequences this short do not leave empty."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    q, k = rotate_pairs(q, cos, sin), rotate_pairs(k, cos, sin)
    if q.device.type == "cpu":
        return short_attention.short_attention(q, k, v)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa).transpose(1, 2)


# --- autograd -----------------------------------------------------------------------------------------------------


@torch.library.custom_op("csm_kernels::depth_attention", mutates_args=())
def _depth_attention(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _launch_forward(q, k, v, cos, sin)


@_depth_attention.register_fake
def _(q, k, v, cos, sin):
    return q.new_empty(q.shape)


@torch.library.custom_op("csm_kernels::depth_attention_gradients", mutates_args=())
def _gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, wants_q: bool, wants_k: bool, wants_v: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _launch_backward(grad, q, k, v, cos, sin, (wants_q, wants_k, wants_v))


@_gradients.register_fake
def _(grad, q, k, v, cos, sin, wants_q, wants_k, wants_v):
    wants = (wants_q, wants_k, wants_v)
    return tuple(x.new_empty(x.shape if wanted else 0) for x, wanted in zip((q, k, v), wants, strict=True))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    wants = ctx.needs_input_grad[:3]
    grads = _gradients(grad, *ctx.saved_tensors, *wants)
    return *(g if wanted else None for g, wanted in zip(grads, wants, strict=True)), None, None


_depth_attention.register_autograd(_backward, setup_context=_setup_context)


# --- public function ----------------------------------------------------------------------------------------------


def depth_attention(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, impl: str = "auto") -> Tensor:
    """Causal self-attention inside each frame, grouped-query: rotate q and k, then softmax(q k^T / sqrt(d)) v.

    The rotation turns the interleaved pairs (x[2i], x[2i + 1]) in the table's dtype and rounds to the inputs'.

    Args:
        q: [M, K, H, d], before rotation. Any strides; only columns that are not contiguous are copied.
        k, v: [M, K, Hkv, d], same dtype as ``q``; H is a multiple of Hkv.
        cos, sin: [K, d / 2], no gradient; float32, or float64 for float64 inputs.
        impl: ``"triton"``: the kernels, for bfloat16, float16 and float32 on CUDA, K up to 64, d of 32, 64 or 128;
            ``"torch"``: the rotation, then ``scaled_dot_product_attention``, on a CPU ``short_attention``; ``"auto"``:
            the kernels where they run.

    Returns:
        [M, K, H, d] in the inputs' dtype; softmax and sums in float32 (float64 for float64 inputs). Saved for the
        backward: the inputs. Gradients are deterministic with the kernels.

    Raises:
        ValueError: shapes or dtypes that do not fit, an unknown ``impl``, or ``"triton"`` where the kernels do not run.
        ImportError: ``"triton"`` without Triton.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, not {impl!r}")
    _check(q, k, v, cos, sin)
    if impl == "auto":
        impl = "triton" if triton is not None and q.is_cuda and not _why_not_triton(q, cos) else "torch"
    if impl == "torch":
        return _reference(q, k, v, cos, sin)
    if triton is None:
        raise ImportError("depth_attention: impl='triton' needs the package triton")
    return _depth_attention(q, k, v, cos, sin)


def _check(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> None:
    frames, length, heads, width = q.shape
    kv_heads = k.shape[2]
    if k.shape != (frames, length, kv_heads, width) or v.shape != k.shape or not kv_heads or heads % kv_heads:
        raise ValueError(f"depth_attention: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit")
    if cos.shape != (length, width // 2) or sin.shape != cos.shape:
        raise ValueError(
            f"depth_attention: the table is {tuple(cos.shape)} and {tuple(sin.shape)}, wanted {(length, width // 2)}"
        )
    if not q.dtype == k.dtype == v.dtype or cos.dtype != sin.dtype:
        raise ValueError(
            f"depth_attention: q, k and v are {q.dtype}, {k.dtype} and {v.dtype}, the table {cos.dtype}, {sin.dtype}"
        )
