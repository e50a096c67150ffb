"""Causal attention over the K codebooks of each frame, with the rotary embedding folded in.

The depth decoder's sequences have K = 32 positions, and there are thousands of them. General flash kernels are slow at
this shape, so CUDA has kernels of its own (``gpu.depth_attention``) and a CPU has batched matrix products
(``cpu.short_attention``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from csm_kernels.choice import resolve
from csm_kernels.gpu.depth_attention import launch_backward, launch_forward, why_unsupported
from csm_kernels.pointwise import rotate_pairs

# --- PyTorch's operators ----------------------------------------------------------------------------------------------


def _reference(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotation in the table's dtype, rounded to the inputs', then PyTorch's attention."""
    q, k = (rotate_pairs(x, cos.unsqueeze(1), sin.unsqueeze(1), "reference") for x in (q, k))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa).transpose(1, 2)


def _on_cpu(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    from csm_kernels.cpu.short_attention import short_attention

    q, k = (rotate_pairs(x, cos.unsqueeze(1), sin.unsqueeze(1)) for x in (q, k))
    return short_attention(q, k, v)


# --- registered operators ---------------------------------------------------------------------------------------------


@torch.library.custom_op("csm_kernels::depth_attention", mutates_args=())
def _depth_attention(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return launch_forward(q, k, v, cos, sin)


@_depth_attention.register_fake
def _(q, k, v, cos, sin):
    return q.new_empty(q.shape)


@torch.library.custom_op("csm_kernels::depth_attention_gradients", mutates_args=())
def _gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, wants_q: bool, wants_k: bool, wants_v: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return launch_backward(grad, q, k, v, cos, sin, (wants_q, wants_k, wants_v))


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


# --- public function --------------------------------------------------------------------------------------------------


def depth_attention(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, impl: str = "auto") -> Tensor:
    """Causal self-attention inside each frame, grouped-query: rotate q and k, then softmax(q k^T / sqrt(d)) v.

    The interleaved pairs (x[2i], x[2i + 1]) are rotated in the table's dtype and rounded to the inputs'.

    Args:
        q: [M, K, H, d], before rotation. Any strides; columns that are not contiguous are copied.
        k, v: [M, K, Hkv, d], same dtype as ``q``; H is a multiple of Hkv.
        cos, sin: [K, d / 2], no gradient; float32, or float64 for float64 inputs.
        impl: "triton": the kernels, for bfloat16, float16 and float32 on CUDA, K up to 64, d of 32, 64 or 128;
            "torch": PyTorch's operators; "auto": the kernels where they run; or an answer of
            ``csm_kernels.choice.resolve``.

    Returns:
        [M, K, H, d] in the inputs' dtype; softmax and sums in float32 (float64 for float64 inputs). Only the inputs are
        saved for the backward pass. Gradients are deterministic with the kernels.

    Raises:
        ValueError: shapes or dtypes that do not fit, an unknown ``impl``, or ``impl="triton"`` with inputs that the
            kernels do not support.
        ImportError: ``impl="triton"`` without Triton.
    """
    impl = resolve(impl, q.device, q.dtype, why_unsupported, q, cos).impl
    _check(q, k, v, cos, sin)
    if impl == "triton":
        return _depth_attention(q, k, v, cos, sin)
    return (_on_cpu if impl == "cpu" else _reference)(q, k, v, cos, sin)


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
