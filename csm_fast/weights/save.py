"""Writes a model, and the record of its codec and tokenizer into its config.json."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from csm_fast.model.csm import parameter_shapes
from csm_fast.model.stacks import model_config
from csm_fast.system.files import replace_file, write_file, writing_to
from csm_fast.system.tensors import write_tensors
from csm_fast.weights.config_json import sesame_config


def save_model(model: nn.Module, directory: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> None:
    """Write ``model.safetensors`` (Sesame's names) and ``config.json`` into ``directory``, which is made if needed.

    Sesame's own ``Model.from_pretrained(directory)`` and ``load_model`` read them. Tensors are written one by one. Both
    files are fsynced, and replace older ones only when they are complete.

    Args:
        model: ``CSM`` or any module with Sesame's tree; buffers are not saved.
        dtype: of the file; None keeps each parameter's own.

    Raises:
        InputError: no space, or no permission to write.
        ValueError: the module's parameters are not those of Sesame's tree.
    """
    config, directory = model_config(model), Path(directory)
    parameters = {n.replace("_orig_mod.", ""): p.detach() for n, p in model.named_parameters()}
    if odd := sorted(parameters.keys() ^ parameter_shapes(config).keys()):
        raise ValueError(f"not the parameters of a CSM: {', '.join(odd[:3])} ({len(odd)} in all)")
    with writing_to(directory):
        directory.mkdir(parents=True, exist_ok=True)
        with replace_file(directory / "model.safetensors") as temporary:
            write_tensors(temporary, parameters, dtype)
        write_file(directory / "config.json", json.dumps(sesame_config(config), indent=2) + "\n")


def write_record(directory: Path, record: dict[str, Any]) -> None:
    """Add the codec and tokenizer to a saved model's ``config.json``, under ``csm_fast_data``."""
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["csm_fast_data"] = record
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_record(name_or_path: str) -> dict[str, Any]:
    """The codec and tokenizer that a local model was trained with; empty if that is not recorded."""
    path = Path(name_or_path).expanduser()
    path = (path if path.is_dir() else path.parent) / "config.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8")).get("csm_fast_data", {})
    except (OSError, ValueError, AttributeError):
        return {}
    return record if isinstance(record, dict) else {}
