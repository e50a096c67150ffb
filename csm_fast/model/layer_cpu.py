"""A plain layer on a CPU as one autograd node.

A layer is plain if its linear layers have no bias and no hooks, and weights of one dtype; frozen 4-bit weights and LoRA
adapters are plain, too. Every other layer (with DoRA, or with dropout of an adapter) runs as ``layer.run_layer`` is
written, and so does a layer that is compiled or must use the Triton kernels.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from csm_fast import ops
from csm_fast.model.linear import dense_weight, is_quantized
from csm_fast.system.optional import load_peft


def supports(layer: Any, x: Tensor, attend: Any) -> bool:
    """Whether ``run`` computes what ``layer.run_layer`` does."""
    if ops.choose("llama_layer", x.device, x.dtype).impl != "cpu" or not hasattr(attend, "order"):
        return False
    linears = [_parts(linear) for linear in _linears(layer)]
    if None in linears:
        return False
    types = {t for linear in linears for t in linear.types}  # type: ignore[union-attr]
    if torch.is_autocast_enabled("cpu") and x.dtype != torch.float64:
        return all(t.is_floating_point for t in types)
    return types == {x.dtype, layer.sa_norm.scale.dtype, layer.mlp_norm.scale.dtype}


def project(linear: Any, x: Tensor) -> Tensor:
    """``linear(x)``, with the product of ``ops.llama_layer`` if it supports the dtype. Autocast does not see that
    product, so both operands are cast here."""
    dtype = _compute_dtype(x)
    if ops.choose("linear", x.device, dtype).impl != "cpu" or not _is_plain(linear):
        return linear(x)
    weight = linear.weight
    is_cast = torch.is_autocast_enabled("cpu") and weight.dtype != torch.float64  # which autocast leaves alone
    if not (is_cast or weight.dtype == dtype):
        return linear(x)
    return ops.linear(x.to(dtype), weight.to(dtype))


def _linears(layer: Any) -> tuple[Any, ...]:
    attn, mlp = layer.attn, layer.mlp
    return attn.q_proj, attn.k_proj, attn.v_proj, attn.output_proj, mlp.w1, mlp.w2, mlp.w3


def _is_plain(linear: nn.Module) -> bool:
    """Whether this is an ``nn.Linear`` without bias or hooks, so that its weight can be used without calling it."""
    plain = type(linear) is nn.Linear and type(linear.weight) in (Tensor, nn.Parameter)
    return plain and linear.bias is None and not _has_hooks(linear)


class _Parts(NamedTuple):
    """What a linear layer computes with: the layer with the weight, and A, B and the factor of an adapter."""

    base: Any
    a: Tensor | None = None
    b: Tensor | None = None
    scaling: float = 1.0

    @property
    def types(self) -> set[torch.dtype]:
        weights = (self.base.weight, self.a, self.b)
        types = {weight.dtype for weight in weights if weight is not None and weight.dtype != torch.uint8}
        return types | {self.base.weight.quant_state.dtype} if is_quantized(self.base) else types


def _parts(linear: Any) -> _Parts | None:
    """The layer's parts if nothing else affects its output, else None."""
    if _is_plain(linear) or _is_plain_in_4_bits(linear):
        return _Parts(linear)
    if not _is_lora(linear) or _has_hooks(linear):
        return None
    base = linear.base_layer
    if not (_is_plain(base) or _is_plain_in_4_bits(base)):
        return None
    if linear.merged or linear.disable_adapters or len(linear.active_adapters) != 1:
        return None
    (name,) = linear.active_adapters
    variants = getattr(linear, "lora_variant", {}), linear.lora_magnitude_vector
    if name not in linear.lora_A or any(name in variant for variant in variants):
        return None
    a, b, dropout = linear.lora_A[name], linear.lora_B[name], linear.lora_dropout[name]
    drops = dropout.training and getattr(dropout, "p", 0.0) > 0
    if drops or _has_hooks(dropout) or not (_is_plain(a) and _is_plain(b)):
        return None
    return _Parts(base, a.weight, b.weight, linear.scaling[name])


def _is_lora(linear: Any) -> bool:
    """Whether a layer adds LoRA to its base and nothing else. Our class says so in ``fuses_on_cpu``; of PEFT's, two do.
    A class derived from these may compute something else, so it does not count."""
    kind = type(linear)
    return vars(kind).get("fuses_on_cpu", False) or (hasattr(linear, "lora_A") and kind in _peft_linears())


@functools.cache
def _peft_linears() -> tuple[type, ...]:
    peft = load_peft()
    kinds = (getattr(peft.tuners.lora, name, None) for name in ("Linear", "Linear4bit"))
    return tuple(kind for kind in kinds if kind is not None)


def _is_plain_in_4_bits(linear: Any) -> bool:
    adapted = hasattr(linear, "base_layer")  # a PEFT layer returns its base's weight as its own
    return not adapted and is_quantized(linear) and linear.bias is None and not _has_hooks(linear)


def _has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _compute_dtype(x: Tensor) -> torch.dtype:
    if torch.is_autocast_enabled("cpu") and x.dtype != torch.float64:
        return torch.get_autocast_dtype("cpu")
    return x.dtype


def run(
    layer: Any, x: Tensor, cos: Tensor, sin: Tensor, attend: Any, recompute_mlp: bool, rows: Tensor | None
) -> Tensor:
    """``layer.run_layer`` of a layer that ``supports`` accepts. Autocast does not see its products, so the weights are
    cast here."""
    dtype = _compute_dtype(x)
    linears: list[Any] = [_parts(linear) for linear in _linears(layer)]
    dense = tuple(functools.partial(dense_weight, p.base) if is_quantized(p.base) else None for p in linears)
    wq, wk, wv, wo, w1, w2, w3 = (None if is_quantized(p.base) else p.base.weight.to(dtype) for p in linears)
    attn = layer.attn
    setup = ops.LayerSetup(attn.head_dim, layer.sa_norm.eps, layer.mlp_norm.eps, dtype, recompute_mlp, dense)
    weights = (layer.sa_norm.scale, wq, wk, wv, wo, layer.mlp_norm.scale, w1, w2, w3)
    adapters = tuple(matrix for p in linears for matrix in _adapter(p, dtype))
    order = attend.order(x, attn.num_heads, attn.num_kv_heads)
    return ops.llama_layer(x, cos, sin, order, weights, setup, rows, adapters)


def _adapter(parts: _Parts, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """A, and B times the factor, multiplied before rounding to ``dtype``."""
    if parts.a is None or parts.b is None:
        return None, None
    b = parts.b if parts.scaling == 1 else parts.b * parts.scaling
    return parts.a.to(dtype), b.to(dtype)
