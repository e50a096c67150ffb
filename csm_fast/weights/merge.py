"""An adapter added to its base: the arithmetic."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from csm_fast.model.csm import CSM
from csm_fast.model.linear import adapted_weight, dense_weight, is_quantized
from csm_fast.weights.adapter_formats import SavedAdapter


@torch.no_grad()
def replace_whole(model: CSM, saved: SavedAdapter) -> None:
    """Put the parameters, and the rows of tables, that were trained besides the adapters in the place of the base's."""
    for name, values in saved.whole.items():
        table, _, kind = name.rpartition(".")
        if kind == "rows":
            parameter = model.get_parameter(table)
            parameter.index_copy_(0, saved.whole[f"{table}.index"].to(parameter.device), values.to(parameter))
        elif kind != "index":
            model.get_parameter(name).copy_(values)


@torch.no_grad()
def add_adapters(model: CSM, saved: SavedAdapter) -> None:
    """Add an adapter's layers to their base in place, in the base's dtype: W + s B A, with DoRA its rows scaled to
    their magnitudes."""
    for name, parts in saved.modules.items():
        weight = model.get_parameter(f"{name}.weight")
        a, b = (parts[part].to(weight) for part in ("lora_A", "lora_B"))
        weight.addmm_(b, a, alpha=saved.scale)
        if "magnitude" in parts:
            weight.mul_((parts["magnitude"].to(weight) / torch.linalg.norm(weight, dim=1)).unsqueeze(1))


@torch.no_grad()
def merge_into(model: Any) -> None:
    """Turn a model with adapters into a plain one, in place: every weight float32 and with its adapter added.

    4-bit weights become what their bits stand for, so the model's function stays (``load_merged`` takes the original
    weights instead).
    """
    for name, layer in list(model.named_modules()):
        if not (hasattr(layer, "lora_A") or is_quantized(layer)) or ".base_layer" in name:
            continue
        weight = adapted_weight(layer) if hasattr(layer, "lora_A") else dense_weight(layer)
        with torch.device("meta"):
            plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        plain.weight = nn.Parameter(weight.detach().float())
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, plain)
    if getattr(model, "embedding_rows", None) is not None:
        for table, masters, index in model.embedding_rows.pairs():
            table.data = table.data.float().index_copy(0, index, masters.float())
        del model.embedding_rows
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    del model.adapter
