"""What lies between the large operators: rotation and RMS norm.

On CUDA the compiler turns the plain forms into one kernel each with their neighbours (``csm_fast.model.compile``). On
a CPU they run as they are, one pass over memory per operation, so there they are written with few passes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from csm_kernels.cpu import passes as cpu_passes
from csm_kernels.dtypes import wide_dtype


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


def _rms_norm_reference(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x.to(wide_dtype(x.dtype)), (x.shape[-1],), eps=eps).to(x.dtype) * scale


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, eps):
        dtype = torch.promote_types(x.dtype, scale.dtype)
        r, y = cpu_passes.norm(x.reshape(-1, x.shape[-1]), scale, eps, dtype)
        ctx.save_for_backward(x, r, scale)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx, grad):
        x, r, scale = ctx.saved_tensors
        width = x.shape[-1]
        wants_x, wants_scale = ctx.needs_input_grad[:2]
        dx, dscale = cpu_passes.norm_backward(
            grad.reshape(-1, width), x.reshape(-1, width), r, scale, None, wants_scale
        )
        return dx.view(x.shape) if wants_x else None, dscale if wants_scale else None, None
