"""The arithmetic of merging an adapter into its base."""

from __future__ import annotations

import torch

from csm_fast.model.csm import CSM
from csm_fast.weights.adapter_formats import SavedAdapter


@torch.no_grad()
def replace_whole(model: CSM, saved: SavedAdapter) -> None:
    """Replace the base's parameters, and rows of tables, that were trained besides the adapters."""
    for name, values in saved.whole.items():
        table, _, kind = name.rpartition(".")
        if kind == "rows":
            parameter = model.get_parameter(table)
            parameter.index_copy_(0, saved.whole[f"{table}.index"].to(parameter.device), values.to(parameter))
        elif kind != "index":
            model.get_parameter(name).copy_(values)


@torch.no_grad()
def add_adapters(model: CSM, saved: SavedAdapter) -> None:
    """Add an adapter to its base in place, in the base's dtype: W + s B A; with DoRA, the rows are then scaled to their
    magnitudes."""
    for name, parts in saved.modules.items():
        weight = model.get_parameter(f"{name}.weight")
        a, b = (parts[part].to(weight) for part in ("lora_A", "lora_B"))
        weight.addmm_(b, a, alpha=saved.scale)
        if "magnitude" in parts:
            weight.mul_((parts["magnitude"].to(weight) / torch.linalg.norm(weight, dim=1)).unsqueeze(1))
