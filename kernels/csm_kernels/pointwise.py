"""The small operators between the large ones: rotation and RMS norm.

On CUDA torch.compile turns the reference of each into one kernel with its neighbours (``csm_fast.model.compile``). On a
CPU every PyTorch operator is a pass over memory, so the forms there make few passes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from csm_kernels.choice import Choice
from csm_kernels.dtypes import wide_dtype


def choose_pointwise(device: torch.device) -> Choice:
    """The implementation of the operators in this module for tensors on ``device``: "cpu" or "reference"."""
    if device.type != "cpu":
        return Choice("reference", "torch.compile fuses them with their neighbours")
    if torch.compiler.is_compiling():
        return Choice("reference", "torch.compile traces them")
    return Choice("cpu", "few passes over memory")


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor, impl: str = "auto") -> Tensor:
    """Rotate interleaved pairs (x[2i], x[2i+1]), the convention of Sesame and Meta.

    Args:
        x: [..., d].
        cos, sin: broadcastable to [..., d / 2]; the rotation is computed in their dtype.
        impl: "cpu", "reference", or "auto" for the answer of ``choose_pointwise``.

    Returns:
        Same shape and dtype as ``x``.
    """
    if (choose_pointwise(x.device).impl if impl == "auto" else impl) == "cpu":
        # A complex product: the same four products and two sums in a quarter of the time.
        pairs = torch.view_as_complex(x.to(cos.dtype).contiguous().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(x.dtype)
    even, odd = x.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2).to(x.dtype)


def rms_norm(x: Tensor, scale: Tensor, eps: float, impl: str = "auto") -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, in float32 (float64 for float64 inputs), rounded to ``x``'s
    dtype, then multiplied by ``scale``.

    Args:
        x: [..., d].
        scale: [d].
        impl: as in ``rotate_pairs``.

    Returns:
        [..., d], in the dtype to which those of ``x`` and ``scale`` promote.
    """
    if (choose_pointwise(x.device).impl if impl == "auto" else impl) == "cpu":
        return _RMSNorm.apply(x, scale, eps)
    return F.rms_norm(x.to(wide_dtype(x.dtype)), (x.shape[-1],), eps=eps).to(x.dtype) * scale


class _RMSNorm(torch.autograd.Function):
    """The form for a CPU."""

    @staticmethod
    def forward(ctx, x, scale, eps):
        from csm_kernels.cpu import passes

        dtype = torch.promote_types(x.dtype, scale.dtype)
        r, y = passes.norm(x.reshape(-1, x.shape[-1]), scale, eps, dtype)
        ctx.save_for_backward(x, r, scale)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx, grad):
        from csm_kernels.cpu import passes

        x, r, scale = ctx.saved_tensors
        width = x.shape[-1]
        wants_x, wants_scale = ctx.needs_input_grad[:2]
        dx, dscale = passes.norm_backward(grad.reshape(-1, width), x.reshape(-1, width), r, scale, None, wants_scale)
        return dx.view(x.shape) if wants_x else None, dscale if wants_scale else None, None
