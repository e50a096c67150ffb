"""A pre-norm Llama layer on a CPU in one autograd node, with few calls and few saved tensors.

A pack of a few hundred rows is so little work that PyTorch's calls, a few microseconds each and a thousand per layer,
take a quarter of the layer's time. Here a layer is about fifteen calls forward and thirty backward, and sums are part
of the products. Of the MLP, the two products w1 y and w3 y are saved; of the norms, their factors. The backward pass
recomputes silu, its product and the normed rows, which takes less time than reading them from memory would.

Beside its weight W a linear layer may have an adapter of two matrices A and B: y W^T + (y A^T) B^T. Adapters with the
same input are multiplied by it together. The backward pass recomputes y A^T, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from csm_kernels.cpu import attention as cpu_attention
from csm_kernels.cpu.attention import Kept, Order
from csm_kernels.cpu.linear import product
from csm_kernels.cpu.passes import norm, norm_backward, normed, swiglu, swiglu_backward

Q, K, V, OUT, W1, W2, W3 = range(7)  # the linear layers
Dense = Callable[[], Tensor]


class LayerSetup(NamedTuple):
    """The settings of a layer.

    Attributes:
        head_dim: d.
        eps, mlp_eps: of the two norms.
        dtype: of the matrix products and the weights.
        recompute_mlp: save nothing of the MLP but its input.
        dense: for each linear layer None, or, if its weight is in 4 bits and frozen, a function that returns it as a
            dense tensor.
    """

    head_dim: int
    eps: float
    mlp_eps: float
    dtype: torch.dtype
    recompute_mlp: bool = False
    dense: tuple[Dense | None, ...] = (None,) * 7


class _Linears:
    """The seven linear layers of a layer, with their adapters."""

    def __init__(self, setup: LayerSetup, weights: tuple[Tensor | None, ...], adapters: tuple[Tensor | None, ...]):
        """``adapters``: A [r, in] and B [out, r] of each linear layer, or None twice."""
        self.setup, self.weights = setup, weights
        self.a, self.b = adapters[::2], adapters[1::2]

    def weight(self, i: int) -> Tensor:
        weight, dense = self.weights[i], self.setup.dense[i]
        if weight is None:
            assert dense is not None
            weight = dense().to(self.setup.dtype)
        return weight

    def project_down(self, y: Tensor, *which: int) -> list[Tensor | None]:
        """y A^T of each; None without an adapter."""
        there = [a for i in which if (a := self.a[i]) is not None]
        if not there:
            return [None] * len(which)
        parts = iter(product(y, _joined(there).t()).split([len(a) for a in there], 1))
        return [None if self.a[i] is None else next(parts) for i in which]

    def forward(self, y: Tensor, i: int, low: Tensor | None, plus: Tensor | None = None) -> Tensor:
        """The output of layer i for the input y, added to ``plus``. ``low``: its y A^T."""
        if low is not None:
            plus = product(low, self.b[i].t(), plus)  # type: ignore[union-attr]
        return product(y, self.weight(i).t(), plus)

    def low_gradients(self, out: dict[int, Tensor]) -> Tensor | None:
        """The gradients of y A^T, side by side, of the layers in ``out``: layer -> gradient of its output."""
        some = [product(grad, b) for i, grad in out.items() if (b := self.b[i]) is not None]
        return _joined(some, 1) if some else None

    def backward(
        self,
        y: Tensor,
        out: dict[int, Tensor],
        low_grads: Tensor | None,
        wants: tuple[bool, ...],
        grads: list[Tensor | None],
    ) -> None:
        """Write the gradients of weights and adapters of the layers in ``out``, whose input is y, to ``grads``.

        Args:
            wants, grads: for the weights, then for A and B of each layer.
        """
        for i, grad in out.items():
            if wants[i]:
                grads[i] = product(grad.t(), y)
        there = [(i, a) for i in out if (a := self.a[i]) is not None]
        if low_grads is None or not any(wants[7 + 2 * i] or wants[8 + 2 * i] for i, _ in there):
            return
        of_a = product(low_grads.t(), y).split([len(a) for _, a in there])
        for (i, _), low, grad in zip(there, self.project_down(y, *(i for i, _ in there)), of_a, strict=True):
            assert low is not None
            grads[7 + 2 * i], grads[8 + 2 * i] = grad, product(out[i].t(), low)

    def input_gradient(self, out: dict[int, Tensor], low_grads: Tensor | None) -> Tensor:
        """The gradient of the common input of the layers in ``out``."""
        total = None
        if low_grads is not None:
            total = product(low_grads, _joined([a for i in out if (a := self.a[i]) is not None]))
        for i, grad in out.items():
            total = product(grad, self.weight(i), total)
        assert total is not None
        return total


def _joined(parts: list[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


class _LlamaLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, order, rows, setup, sa_norm, mlp_norm, *matrices):
        dtype, d = setup.dtype, setup.head_dim
        linears = _Linears(setup, matrices[:7], matrices[7:])
        r, y = norm(x, sa_norm, setup.eps, dtype)
        q, k, v = (
            linears.forward(y, i, low) for i, low in zip((Q, K, V), linears.project_down(y, Q, K, V), strict=True)
        )
        del y
        attention, attended = cpu_attention.forward(q, k, v, cos, sin, order, d)
        del q, k, v
        middle = x
        if rows is not None:
            attended, middle = attended.index_select(0, rows), x.index_select(0, rows)
        (low,) = linears.project_down(attended, OUT)
        middle = linears.forward(attended, OUT, low, middle)
        mlp_r, y = norm(middle, mlp_norm, setup.mlp_eps, dtype)
        a, b = (linears.forward(y, i, low) for i, low in zip((W1, W3), linears.project_down(y, W1, W3), strict=True))
        del y
        gated = swiglu(a, b)
        (low,) = linears.project_down(gated, W2)
        out = linears.forward(gated, W2, low, middle)
        kept = (None, None) if setup.recompute_mlp else (a, b)
        ctx.save_for_backward(
            x, r, cos, sin, *attention, attended, middle, mlp_r, *kept, rows, sa_norm, mlp_norm, *matrices
        )
        ctx.order, ctx.setup = order, setup
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, r, cos, sin, q, k, v, logs, attended, middle, mlp_r, a, b, rows, *weights = ctx.saved_tensors
        sa_norm, mlp_norm, *matrices = weights
        order, setup = ctx.order, ctx.setup
        linears = _Linears(setup, matrices[:7], matrices[7:])
        dtype = setup.dtype
        wants_x, wants_norms, wants = ctx.needs_input_grad[0], ctx.needs_input_grad[6:8], ctx.needs_input_grad[8:]
        grads: list[Tensor | None] = [None] * len(matrices)

        # The MLP.
        y = normed(middle, mlp_r, mlp_norm, dtype)
        if a is None:
            a, b = (
                linears.forward(y, i, low) for i, low in zip((W1, W3), linears.project_down(y, W1, W3), strict=True)
            )
        narrow = grad.to(dtype)
        out = {W2: narrow}
        low_grads = linears.low_gradients(out)
        gated, da, db = swiglu_backward(linears.input_gradient(out, low_grads), a, b)
        del a, b
        linears.backward(gated, out, low_grads, wants, grads)
        del gated
        out = {W1: da, W3: db}
        low_grads = linears.low_gradients(out)
        linears.backward(y, out, low_grads, wants, grads)
        del y
        dy = linears.input_gradient(out, low_grads)
        del da, db, out
        grad, dscale = norm_backward(dy, middle, mlp_r, mlp_norm, grad, wants_norms[1])
        mlp_dscale = dscale if wants_norms[1] else None
        del dy

        # The attention.
        narrow = grad.to(dtype)
        out = {OUT: narrow}
        low_grads = linears.low_gradients(out)
        linears.backward(attended, out, low_grads, wants, grads)
        dout = linears.input_gradient(out, low_grads)
        if rows is not None:
            grad = grad.new_zeros(x.shape).index_add_(0, rows, grad)
        attention = Kept(q, k, v, logs)
        dq, dk, dv = cpu_attention.backward(dout, attended, rows, attention, cos, sin, order, setup.head_dim)
        del dout, attention
        out = {Q: dq, K: dk, V: dv}
        low_grads = linears.low_gradients(out)
        linears.backward(normed(x, r, sa_norm, dtype), out, low_grads, wants, grads)
        if not (wants_x or wants_norms[0]):
            return None, None, None, None, None, None, None, mlp_dscale, *grads
        dx, dscale = norm_backward(linears.input_gradient(out, low_grads), x, r, sa_norm, grad, wants_norms[0])
        sa_dscale = dscale if wants_norms[0] else None
        return dx if wants_x else None, None, None, None, None, None, sa_dscale, mlp_dscale, *grads


def llama_layer(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    order: Order,
    weights: tuple[Tensor | None, ...],
    setup: LayerSetup,
    rows: Tensor | None = None,
    adapters: tuple[Tensor | None, ...] = (None,) * 14,
) -> Tensor:
    """One pre-norm Llama layer: x + attention(norm(x)), then that + MLP(norm of it).

    Args:
        x: [..., D] on a CPU, the rows in the order of the table; float32, float64, bf16 or fp16.
        cos, sin: [N or K, 1, d / 2] float32 (float64 for float64 layers), for each row, or for each row of a frame.
        order: the attention's segments.
        weights: norm's scale [D], wq [H d, D], wk and wv [Hkv d, D], wo [D, H d], the MLP's norm's scale [D], w1
            [F, D], w2 [D, F], w3 [F, D]; the matrices in ``setup.dtype``, None where ``setup.dense`` returns one.
        rows: [A] int64, all different: the rows of x [T, D] whose results are wanted, in that order.
        adapters: in ``setup.dtype``, for each matrix in the order of ``weights`` A [r, in] and B [out, r], or None
            twice.

    Returns:
        Like ``x``, or [A, D]. Norms, rotation and softmax are computed in float32 (float64 for float64). Gradients of
        first order only.
    """
    sa_norm, wq, wk, wv, wo, mlp_norm, w1, w2, w3 = weights
    flat, matrices = x.reshape(-1, x.shape[-1]), (wq, wk, wv, wo, w1, w2, w3)
    out = _LlamaLayer.apply(flat, cos, sin, order, rows, setup, sa_norm, mlp_norm, *matrices, *adapters)
    return out if rows is not None else out.view(x.shape)
