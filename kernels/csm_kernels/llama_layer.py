"""A pre-norm Llama layer on a CPU in one autograd node, written with few calls and little kept.

A pack of a few hundred rows is so little work that PyTorch's calls, a few microseconds each and a thousand per layer,
take a quarter of the layer's time. Here a layer is some forty calls forward and ninety backward; sums go into the
products (``addmm``). Of the MLP the two products w1 y and w3 y are kept, of the norms the factors: silu, product and
normed rows are computed again, in less time than a wider layer's memory takes to come back.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import folded_attention
from .folded_attention import Fold
from .pointwise import norm_backward, norm_factor


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


def _rotate(x: Tensor, rotation: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """Rotate interleaved pairs of [N, heads * d] by unit complex numbers [..., 1, d / 2] (N rows, or one per row of a
    frame); the result is [N, heads, d] in ``dtype``. Overwrites ``x`` where that is wide already."""
    wide = torch.float64 if rotation.dtype == torch.complex128 else torch.float32
    length, half = rotation.shape[0], rotation.shape[-1]
    pairs = torch.view_as_complex(x.to(wide).view(-1, length, heads, half, 2)).mul_(rotation)
    return torch.view_as_real(pairs).to(dtype).view(-1, heads, 2 * half)


def _normed(x: Tensor, r: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x r in the wide dtype, that rounded and scaled, in ``dtype``)."""
    normed = x.to(r.dtype) * r
    return normed, (normed.to(x.dtype) * scale).to(dtype)


def _sum_of_product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x + a b."""
    if x.dtype == a.dtype:
        return torch.addmm(x, a, b)
    return x + torch.mm(a, b)


class _LlamaLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, order, rows, setup, sa_norm, wq, wk, wv, wo, mlp_norm, w1, w2, w3):
        dtype, d = setup.dtype, setup.head_dim
        heads, kv_heads = wq.shape[0] // d, wk.shape[0] // d
        r = norm_factor(x, setup.eps)
        y = _normed(x, r, sa_norm, dtype)[1]
        rotation = torch.complex(cos, sin)
        q = _rotate(torch.mm(y, wq.t()), rotation * d**-0.5, heads, dtype)
        k = _rotate(torch.mm(y, wk.t()), rotation, kv_heads, dtype)
        folded = folded_attention.gather(q, k, torch.mm(y, wv.t()), order)
        del y, q, k
        attended = folded_attention.forward(*folded, order)
        middle = x
        if rows is not None:
            attended, middle = attended.index_select(0, rows), x.index_select(0, rows)
        middle = _sum_of_product(middle, attended, wo.t())
        mlp_r = norm_factor(middle, setup.mlp_eps)
        y = _normed(middle, mlp_r, mlp_norm, dtype)[1]
        a, b = torch.mm(y, w1.t()), torch.mm(y, w3.t())
        out = _sum_of_product(middle, F.silu(a).mul_(b), w2.t())
        kept = (None, None) if setup.recompute_mlp else (a, b)
        weights = (sa_norm, wq, wk, wv, wo, mlp_norm, w1, w2, w3)
        ctx.save_for_backward(x, r, cos, sin, *folded, attended, middle, mlp_r, *kept, rows, *weights)
        ctx.order, ctx.setup = order, setup
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, r, cos, sin, fq, fk, fv, attended, middle, mlp_r, a, b, rows, *weights = ctx.saved_tensors
        sa_norm, wq, wk, wv, wo, mlp_norm, w1, w2, w3 = weights
        order, setup = ctx.order, ctx.setup
        dtype, heads, kv_heads = setup.dtype, order.heads, order.kv_heads
        wants_x, wants = ctx.needs_input_grad[0], ctx.needs_input_grad[6:]
        grads: list[Tensor | None] = [None] * 9

        # The MLP.
        normed, y = _normed(middle, mlp_r, mlp_norm, dtype)
        if a is None:
            a, b = torch.mm(y, w1.t()), torch.mm(y, w3.t())
        narrow = grad.to(dtype)
        silu = F.silu(a)
        if wants[7]:
            grads[7] = torch.mm(narrow.t(), silu * b)
        up = torch.mm(narrow, w2)
        dsilu = torch.ops.aten.silu_backward(up * b, a)
        db = up.mul_(silu)
        del a, b, silu
        if wants[6]:
            grads[6] = torch.mm(dsilu.t(), y)
        if wants[8]:
            grads[8] = torch.mm(db.t(), y)
        dy = torch.addmm(torch.mm(dsilu, w1), db, w3)
        del dsilu, db, up, y
        dnorm, grads[5] = norm_backward(dy, normed, mlp_r, mlp_norm, wants[5])
        grad = dnorm.add_(grad).to(x.dtype)
        del dnorm, normed, dy

        # The attention.
        narrow = grad.to(dtype)
        if wants[4]:
            grads[4] = torch.mm(narrow.t(), attended)
        dout = torch.mm(narrow, wo)
        if rows is not None:
            dout = dout.new_zeros(len(x), dout.shape[1]).index_add_(0, rows, dout)
            grad = grad.new_zeros(x.shape).index_add_(0, rows, grad)
        dq, dk, dv = folded_attention.backward(dout, fq, fk, fv, order)
        del dout
        rotation = torch.complex(cos, -sin)
        dq = _rotate(dq, rotation * setup.head_dim**-0.5, heads, dtype).flatten(1)
        dk = _rotate(dk, rotation, kv_heads, dtype).flatten(1)
        dv = dv.view(len(x), wv.shape[0])
        normed, y = _normed(x, r, sa_norm, dtype)
        for i, part in ((1, dq), (2, dk), (3, dv)):
            if wants[i]:
                grads[i] = torch.mm(part.t(), y)
        if not (wants_x or wants[0]):
            return None, None, None, None, None, None, *grads
        dy = torch.addmm(torch.addmm(torch.mm(dq, wq), dk, wk), dv, wv)
        dnorm, grads[0] = norm_backward(dy, normed, r, sa_norm, wants[0])
        dx = dnorm.add_(grad).to(x.dtype) if wants_x else None
        return dx, None, None, None, None, None, *grads


def llama_layer(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    order: Fold,
    weights: tuple[Tensor, ...],
    setup: LayerSetup,
    rows: Tensor | None = None,
) -> Tensor:
    """One pre-norm Llama layer: x + attention(norm(x)), then that + MLP(norm of it).

    Args:
        x: [..., D] on a CPU, the rows in the order of the table; float32, float64, bf16 or fp16.
        cos, sin: [N or K, 1, d / 2] float32 (float64 for float64 layers), one per row, or per row of a frame.
        order: of the attention's segments.
        weights: norm's scale [D], wq [H d, D], wk and wv [Hkv d, D], wo [D, H d], the MLP's norm's scale [D], w1
            [F, D], w2 [D, F], w3 [F, D]; the matrices in ``setup.dtype``.
        rows: [A] int64 of x [T, D]: those whose results are wanted, in that order.

    Returns:
        Like ``x``, or [A, D]. Norms, rotation and softmax are computed in float32 (float64 for float64). Gradients of
        first order only.
    """
    out = _LlamaLayer.apply(x.reshape(-1, x.shape[-1]), cos, sin, order, rows, setup, *weights)
    return out if rows is not None else out.view(x.shape)
