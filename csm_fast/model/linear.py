"""The weight of a linear layer, which may have 4 bits or an adapter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from csm_fast.system.optional import load_bitsandbytes


def is_quantized(layer: nn.Module) -> bool:
    """Whether ``layer`` holds 4-bit weights."""
    return getattr(getattr(layer, "weight", None), "quant_state", None) is not None


def dense_weight(layer: Any) -> Tensor:
    """The weight [out, in] of a linear layer; a 4-bit one is dequantised into the dtype of the layer's products."""
    if not is_quantized(layer):
        return layer.weight
    return load_bitsandbytes().functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def adapted_weight(layer: Any) -> Tensor:
    """The weight [out, in] of a linear layer with or without a PEFT adapter: W, or W + s B A; with DoRA, its rows are
    scaled to their magnitudes (the norm is a constant, as in section 4.3 of the paper).

    Differentiable. In the wider of both dtypes, also under autocast; without the adapter's dropout.
    """
    if not hasattr(layer, "lora_A"):
        return layer.weight
    weight = dense_weight(layer.base_layer)
    if layer.disable_adapters or layer.merged:
        return weight
    with torch.autocast(weight.device.type, enabled=False):
        for name in (n for n in layer.active_adapters if n in layer.lora_A):
            delta = layer.scaling[name] * (layer.lora_B[name].weight @ layer.lora_A[name].weight)
            weight = weight.to(torch.promote_types(weight.dtype, delta.dtype)) + delta
            if name in layer.lora_magnitude_vector:
                norm = torch.linalg.norm(weight.detach(), dim=1)
                weight = (layer.lora_magnitude_vector[name].weight / norm).unsqueeze(1) * weight
    return weight
