"""The layers of both stacks on a CPU: one autograd node each, where a layer is plain.

Plain means linear layers without bias, hooks or adapters, with weights of one type. Everything else, and whatever is
compiled or forced onto the Triton kernels, runs as ``model.run_layer`` is written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import ops


def serves(layer: Any, x: Tensor, attend: Any) -> bool:
    """Whether ``run`` may take the place of ``model.run_layer``."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or not hasattr(attend, "order"):
        return False
    linears = _linears(layer)
    if ops.asked() == "triton" or not all(map(_is_plain, linears)):
        return False
    types = {linear.weight.dtype for linear in linears}
    if torch.is_autocast_enabled("cpu") and x.dtype != torch.float64:
        return all(t.is_floating_point for t in types)
    return types == {x.dtype, layer.sa_norm.scale.dtype, layer.mlp_norm.scale.dtype}


def project(linear: Any, x: Tensor) -> Tensor:
    """``linear(x)``, by the library that multiplies a layer's matrices where it does; under autocast both are cast
    here."""
    own = x.device.type == "cpu" and not torch.compiler.is_compiling() and ops.asked() != "triton" and _is_plain(linear)
    if not own:
        return linear(x)
    dtype, weight = _compute_dtype(x), linear.weight
    is_cast = torch.is_autocast_enabled("cpu") and weight.dtype != torch.float64  # which autocast leaves alone
    if not ops.multiplies(dtype) or not (is_cast or weight.dtype == dtype):
        return linear(x)
    return ops.linear(x.to(dtype), weight.to(dtype))


def _linears(layer: Any) -> tuple[Any, ...]:
    attn, mlp = layer.attn, layer.mlp
    return attn.q_proj, attn.k_proj, attn.v_proj, attn.output_proj, mlp.w1, mlp.w2, mlp.w3


def _is_plain(linear: Any) -> bool:
    """Its weight may be used without calling it: nothing is added to the product, and nothing listens."""
    listens = linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or linear._backward_pre_hooks
    plain = type(linear) is nn.Linear and type(linear.weight) in (Tensor, nn.Parameter)
    return plain and linear.bias is None and not listens


def _compute_dtype(x: Tensor) -> torch.dtype:
    if torch.is_autocast_enabled("cpu") and x.dtype != torch.float64:
        return torch.get_autocast_dtype("cpu")
    return x.dtype


def run(
    layer: Any, x: Tensor, cos: Tensor, sin: Tensor, attend: Any, recompute_mlp: bool, rows: Tensor | None
) -> Tensor:
    """``model.run_layer`` for a layer that ``serves``; under autocast its weights are cast here."""
    dtype = _compute_dtype(x)
    wq, wk, wv, wo, w1, w2, w3 = (linear.weight.to(dtype) for linear in _linears(layer))
    attn = layer.attn
    setup = ops.LayerSetup(attn.head_dim, layer.sa_norm.eps, layer.mlp_norm.eps, dtype, recompute_mlp)
    weights = (layer.sa_norm.scale, wq, wk, wv, wo, layer.mlp_norm.scale, w1, w2, w3)
    order = attend.order(x, attn.num_heads, attn.num_kv_heads)
    return ops.llama_layer(x, cos, sin, order, weights, setup, rows)
