"""Causal attention of many short sequences on a CPU, as a registered operator over ``folded_attention``."""

from __future__ import annotations

import torch
from torch import Tensor

from . import folded_attention
from .folded_attention import Fold


def _folded(q: Tensor, k: Tensor, v: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], Fold]:
    order = folded_attention.uniform(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    return folded_attention.gather(q * q.shape[-1] ** -0.5, k, v, order), order


@torch.library.custom_op("csm_kernels::short_attention", mutates_args=())
def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``short_attention``, as a registered operator."""
    folded, order = _folded(q, k, v)
    return folded_attention.forward(*folded, order).view(q.shape)


@torch.library.custom_op("csm_kernels::short_attention_gradients", mutates_args=())
def backward(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``forward`` for q, k and v."""
    folded, order = _folded(q, k, v)
    gradients = folded_attention.backward(grad, *folded, order)
    dq, dk, dv = folded_attention.in_rows(*gradients, order)
    return (dq * q.shape[-1] ** -0.5).view(q.shape), dk.view(k.shape), dv.view(v.shape)


@forward.register_fake
def _(q, k, v):
    return q.new_empty(q.shape)


@backward.register_fake
def _(q, k, v, grad):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    return backward(*ctx.saved_tensors, grad)


forward.register_autograd(_backward, setup_context=_setup_context)


def short_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal self-attention of s sequences of n rows, grouped-query, scaled by 1/sqrt(d).

    Args:
        q: [s, n, H, d].  k, v: [s, n, Hkv, d], with H a multiple of Hkv; one dtype.

    Returns:
        [s, n, H, d].
    """
    return forward(q, k, v)
