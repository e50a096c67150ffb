"""Causal attention of many short sequences on a CPU: ``attention`` as a registered operator."""

from __future__ import annotations

import torch
from torch import Tensor

from csm_kernels.cpu import attention as cpu_attention
from csm_kernels.cpu.attention import Kept, Order, uniform_order


def _attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Kept, Tensor, Order]:
    order = uniform_order(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    q, k, v = (x.reshape(-1, x.shape[2] * x.shape[3]) for x in (q, k, v))
    kept, out = cpu_attention.forward(q, k, v, None, None, order, q.shape[-1] // order.heads)
    return kept, out, order


@torch.library.custom_op("csm_kernels::short_attention", mutates_args=())
def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``short_attention``, as a registered operator."""
    return _attend(q, k, v)[1].view(q.shape)


@torch.library.custom_op("csm_kernels::short_attention_gradients", mutates_args=())
def backward(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``forward`` for q, k and v."""
    kept, out, order = _attend(q, k, v)
    grads = cpu_attention.backward(grad.reshape(out.shape), out, None, kept, None, None, order, q.shape[-1])
    dq, dk, dv = (g.view(x.shape) for g, x in zip(grads, (q, k, v), strict=True))
    return dq, dk, dv


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
