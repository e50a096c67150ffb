"""What lies between the large operators: rotation and RMS norm.

On CUDA the compiler turns the plain forms into one kernel each with their neighbours (``csm_fast.compile``). On a CPU
they run as they are, one pass over memory per operation, so there they are written with few passes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _few_passes(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate interleaved pairs (x[2i], x[2i+1]), Sesame's and Meta's convention.

    Args:
        x: [..., d].
        cos, sin: broadcastable to [..., d / 2]; the rotation is done in their dtype.

    Returns:
        Same shape and dtype as ``x``.
    """
    if _few_passes(x):
        # A complex product: the same four products and two sums in a quarter of the time.
        pairs = torch.view_as_complex(x.to(cos.dtype).contiguous().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(x.dtype)
    even, odd = x.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2).to(x.dtype)


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, in float32 (float64 for float64 inputs), rounded to ``x``'s
    dtype, then scaled.

    Args:
        x: [..., d].  scale: [d].
    """
    if _few_passes(x):
        return _RMSNorm.apply(x, scale, eps)
    return _rms_norm_reference(x, scale, eps)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _rms_norm_reference(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x.to(_wide(x)), (x.shape[-1],), eps=eps).to(x.dtype) * scale


def norm_factor(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last dimension, [..., 1] in the wide dtype."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_wide(x))
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def norm_backward(
    grad: Tensor, normed: Tensor, r: Tensor, scale: Tensor, wants_scale: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the norm's input, in the wide dtype, and of its scale.

    With n = r x and h = g scale: dscale = sum over rows of g n, dx = r (h - n mean(h n)). The product g n serves both
    sums.

    Args:
        grad: [N, d].  normed: [N, d] and r: [N, 1] in the wide dtype.  scale: [d].
    """
    wide = grad.to(r.dtype)
    product = wide * normed
    dscale = product.sum(0).to(scale.dtype) if wants_scale else None
    scale = scale.to(r.dtype)
    mean = (product @ scale).div_(normed.shape[-1]).unsqueeze(-1)
    return (wide * scale).addcmul_(normed, mean, value=-1).mul_(r), dscale


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, eps):
        r = norm_factor(x, eps)
        ctx.save_for_backward(x, r, scale)
        return (x.to(r.dtype) * r).to(x.dtype) * scale

    @staticmethod
    def backward(ctx, grad):
        x, r, scale = ctx.saved_tensors
        width = x.shape[-1]
        normed = x.to(r.dtype) * r
        wants_x, wants_scale = ctx.needs_input_grad[:2]
        dx, dscale = norm_backward(
            grad.reshape(-1, width), normed.reshape(-1, width), r.reshape(-1, 1), scale, wants_scale
        )
        return dx.to(x.dtype).view(x.shape) if wants_x else None, dscale, None
