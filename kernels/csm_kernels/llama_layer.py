"""A pre-norm Llama layer on a CPU in one autograd node, written with few calls and little kept.

A pack of a few hundred rows is so little work that PyTorch's calls, a few microseconds each and a thousand per layer,
take a quarter of the layer's time. Here a layer is some fifteen calls forward and thirty backward; sums go into the
products. Of the MLP the two products w1 y and w3 y are kept, of the norms the factors: silu, product and
normed rows are computed again, in less time than a wider layer's memory takes to come back.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import cpu_attention
from .cpu_attention import Kept, Order
from .cpu_linear import product
from .cpu_passes import norm, norm_backward, normed, swiglu, swiglu_backward


class LayerSetup(NamedTuple):
    """What a layer is, beside its weights.

    Attributes:
        head_dim: d.
        eps, mlp_eps: of the two norms.
        dtype: of the matrix products; the weights have it.
        recompute_mlp: keep nothing of the MLP but its input.
    """

    head_dim: int
    eps: float
    mlp_eps: float
    dtype: torch.dtype
    recompute_mlp: bool = False


class _LlamaLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, order, rows, setup, sa_norm, wq, wk, wv, wo, mlp_norm, w1, w2, w3):
        dtype, d = setup.dtype, setup.head_dim
        r, y = norm(x, sa_norm, setup.eps, dtype)
        q, k, v = product(y, wq.t()), product(y, wk.t()), product(y, wv.t())
        del y
        attention, attended = cpu_attention.forward(q, k, v, cos, sin, order, d)
        del q, k, v
        middle = x
        if rows is not None:
            attended, middle = attended.index_select(0, rows), x.index_select(0, rows)
        middle = product(attended, wo.t(), middle)
        mlp_r, y = norm(middle, mlp_norm, setup.mlp_eps, dtype)
        a, b = product(y, w1.t()), product(y, w3.t())
        del y
        out = product(swiglu(a, b), w2.t(), middle)
        kept = (None, None) if setup.recompute_mlp else (a, b)
        weights = (sa_norm, wq, wk, wv, wo, mlp_norm, w1, w2, w3)
        ctx.save_for_backward(x, r, cos, sin, *attention, attended, middle, mlp_r, *kept, rows, *weights)
        ctx.order, ctx.setup = order, setup
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, r, cos, sin, q, k, v, logs, attended, middle, mlp_r, a, b, rows, *weights = ctx.saved_tensors
        sa_norm, wq, wk, wv, wo, mlp_norm, w1, w2, w3 = weights
        order, setup = ctx.order, ctx.setup
        dtype = setup.dtype
        wants_x, wants = ctx.needs_input_grad[0], ctx.needs_input_grad[6:]
        grads: list[Tensor | None] = [None] * 9

        # The MLP.
        y = normed(middle, mlp_r, mlp_norm, dtype)
        if a is None:
            a, b = product(y, w1.t()), product(y, w3.t())
        narrow = grad.to(dtype)
        gated, da, db = swiglu_backward(product(narrow, w2), a, b)
        del a, b
        if wants[7]:
            grads[7] = product(narrow.t(), gated)
        del gated
        if wants[6]:
            grads[6] = product(da.t(), y)
        if wants[8]:
            grads[8] = product(db.t(), y)
        del y
        dy = product(db, w3, product(da, w1))
        del da, db
        grad, dscale = norm_backward(dy, middle, mlp_r, mlp_norm, grad, wants[5])
        grads[5] = dscale if wants[5] else None
        del dy

        # The attention.
        narrow = grad.to(dtype)
        if wants[4]:
            grads[4] = product(narrow.t(), attended)
        dout = product(narrow, wo)
        if rows is not None:
            grad = grad.new_zeros(x.shape).index_add_(0, rows, grad)
        attention = Kept(q, k, v, logs)
        dq, dk, dv = cpu_attention.backward(dout, attended, rows, attention, cos, sin, order, setup.head_dim)
        del dout, attention
        y = normed(x, r, sa_norm, dtype)
        for i, part in ((1, dq), (2, dk), (3, dv)):
            if wants[i]:
                grads[i] = product(part.t(), y)
        if not (wants_x or wants[0]):
            return None, None, None, None, None, None, *grads
        dy = product(dv, wv, product(dk, wk, product(dq, wq)))
        dx, dscale = norm_backward(dy, x, r, sa_norm, grad, wants[0])
        grads[0] = dscale if wants[0] else None
        return dx if wants_x else None, None, None, None, None, None, *grads


def llama_layer(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    order: Order,
    weights: tuple[Tensor, ...],
    setup: LayerSetup,
    rows: Tensor | None = None,
) -> Tensor:
    """One pre-norm Llama layer: x + attention(norm(x)), then that + MLP(norm of it).

    Args:
        x: [..., D] on a CPU, the rows in the order of the table; float32, float64, bf16 or fp16.
        cos, sin: [N or K, 1, d / 2] float32 (float64 for float64 layers), one per row, or per row of a frame.
        order: the attention's segments.
        weights: norm's scale [D], wq [H d, D], wk and wv [Hkv d, D], wo [D, H d], the MLP's norm's scale [D], w1
            [F, D], w2 [D, F], w3 [F, D]; the matrices in ``setup.dtype``.
        rows: [A] int64 of x [T, D], all different: those whose results are wanted, in that order.

    Returns:
        Like ``x``, or [A, D]. Norms, rotation and softmax are computed in float32 (float64 for float64). Gradients of
        first order only.
    """
    out = _LlamaLayer.apply(x.reshape(-1, x.shape[-1]), cos, sin, order, rows, setup, *weights)
    return out if rows is not None else out.view(x.shape)
