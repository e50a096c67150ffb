"""Saves and loads adapters: PEFT's files, and the parameters that are trained besides under Sesame's names.

    save_adapter(model, directory)         all that is trained of a model with adapters
    load_into(model, directory)            back into a model with the same adapters, bit for bit
    load_adapters(model, directory)        onto a plain model, with the settings in the directory

``export`` writes adapters for other tools; the functions above read those tools' adapters, too. A base is identified by
the hash of its weights (``adapters.weights_hash``), and an adapter of another base is refused.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from csm_fast.config.train import AdapterSection
from csm_fast.model import adapters
from csm_fast.model.adapters import ADAPTER, resolve_targets
from csm_fast.model.embedding_rows import EmbeddingRows
from csm_fast.model.run_options import Attached
from csm_fast.model.stacks import model_config
from csm_fast.system.errors import InputError
from csm_fast.system.files import write_file, writing_to
from csm_fast.weights.adapter_formats import TRAINED, SavedAdapter, check_base, read_adapter, write_peft
from csm_fast.weights.config_json import sesame_config
from csm_fast.weights.files import ADAPTER_CONFIG, MLX_WEIGHTS, PEFT_WEIGHTS


def save_adapter(model: Any, directory: str | os.PathLike[str]) -> None:
    """Write a model's adapters, and the other parameters that ``attach`` left trainable, into ``directory``.

    The directory is made if it does not exist. ``adapter_model.safetensors`` and ``adapter_config.json`` are PEFT's;
    ``trained.safetensors`` holds heads, tables or rows of tables; ``config.json`` is the base's shape. Tensors keep
    their dtype.

    Raises:
        InputError: no space, or no permission to write.
    """
    path = Path(directory)
    saved = _saved(model)
    write_peft(saved, path, _targets(model))
    config = json.dumps(sesame_config(model.adapter.shape), indent=2) + "\n"
    with writing_to(path):
        if not saved.whole:  # the file of an earlier adapter
            (path / TRAINED).unlink(missing_ok=True)
        write_file(path / "config.json", config)


def _saved(model: Any) -> SavedAdapter:
    """A model's adapters as ``SavedAdapter``. The tensors share memory with the model's."""
    attached = model.adapter
    modules = {}
    for name, slots in _slots(model).items():
        modules[name] = {part: parameter.detach() for part, parameter in slots.items()}
    whole = {name: model.get_parameter(name).detach() for name in attached.whole}
    if model.embedding_rows is not None:
        whole |= model.embedding_rows.tensors()
    return SavedAdapter(attached.section, modules, whole, attached.base, attached.base_hash, attached.compute_dtype)


def _slots(model: Any) -> dict[str, dict[str, torch.nn.Parameter]]:
    """The parameters that hold a model's adapters: module -> part -> parameter."""
    slots = {}
    for name in model.adapter.targets:
        layer = model.get_submodule(name)
        slots[name] = {"lora_A": layer.lora_A[ADAPTER].weight, "lora_B": layer.lora_B[ADAPTER].weight}
        if ADAPTER in layer.lora_magnitude_vector:
            slots[name]["magnitude"] = layer.lora_magnitude_vector[ADAPTER].weight
    return slots


def _targets(model: Any) -> list[str]:
    """The adapted layers by their last names, if these match no other layer, else by their full names; sorted."""
    targets = model.adapter.targets
    leaves = sorted({name.rpartition(".")[2] for name in targets})
    names = {n.removesuffix(".base_layer") for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    meant = {n for n in names if ".lora_" not in n and n.rpartition(".")[2] in leaves}
    return leaves if meant == set(targets) else list(targets)


def adapter_size(directory: str | os.PathLike[str]) -> dict[str, int]:
    """Bytes of each file of an adapter, by name, without other files of the directory."""
    names = (PEFT_WEIGHTS, MLX_WEIGHTS, TRAINED, ADAPTER_CONFIG, "config.json")
    paths = (Path(directory).expanduser() / name for name in names)
    return {path.name: path.stat().st_size for path in paths if path.is_file()}


# --------------------------------------------------------------------------------------------------------- loading


@torch.no_grad()
def load_into(model: Any, directory: str | os.PathLike[str]) -> None:
    """Load a saved adapter into a model with the same adapter, bit for bit.

    Raises:
        InputError: another base, other layers, ranks or trained parameters, damaged files. The model is unchanged,
            unless a file is damaged inside.
    """
    attached = model.adapter
    saved = read_adapter(directory, attached.shape)
    check_base(saved, attached.base_hash, attached.base)
    slots = _slots(model)
    wanted: dict[str, Tensor] = {f"{m} {part}": p for m, parts in slots.items() for part, p in parts.items()}
    given = {f"{m} {part}": t for m, parts in saved.modules.items() for part, t in parts.items()}
    whole = {name: t for name, t in saved.whole.items() if not name.endswith((".rows", ".index"))}
    ours = saved.compute_dtype is not None
    # Another tool's adapter may hold one of the two heads or tables; the other one stays the base's.
    wanted |= {name: model.get_parameter(name) for name in attached.whole if ours or name in whole}
    _fill(wanted, given | whole, saved)
    _load_rows(model, saved)


def _fill(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], saved: SavedAdapter) -> None:
    mend = "use the same settings of the adapter, or start a new run"
    if odd := sorted(given.keys() ^ wanted.keys()):
        what = "is not trained here" if odd[0] in given else "is missing"
        raise InputError(f"{odd[0]} {what} ({len(odd)} such tensors)", file=saved.where, mend=mend)
    for name, parameter in wanted.items():
        if parameter.shape != given[name].shape:
            have, want = list(given[name].shape), list(parameter.shape)
            raise InputError(f"{name} is {have} instead of {want}", file=saved.where, mend=mend)
    for name, parameter in wanted.items():
        parameter.copy_(given[name])


def _load_rows(model: Any, saved: SavedAdapter) -> None:
    if saved.section.train_embeddings != "rows":
        return
    if model.embedding_rows is None:
        text, audio = (saved.whole[f"{name}.weight.index"] for name in ("text_embeddings", "audio_embeddings"))
        EmbeddingRows(model, text, audio)
    rows = model.embedding_rows
    tensors = rows.tensors()
    for name, tensor in tensors.items():
        if name.endswith(".index") and not torch.equal(tensor.cpu(), saved.whole[name]):
            raise InputError(
                f"{name.removesuffix('.index')}: other rows were trained then",
                file=saved.where,
                mend="continue with the same token store, or start a new run",
            )
    for name, tensor in tensors.items():
        if name.endswith(".rows"):
            tensor.copy_(saved.whole[name])
    rows.push()


def load_adapters(
    model: Any,
    directory: str | os.PathLike[str],
    *,
    compute_dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Attached:
    """Attach the adapter in ``directory`` to a plain model and load it, for use or for further training.

    The adapter may be ours, PEFT's (with Sesame's or transformers' names) or csm-mlx's. A qlora adapter quantises the
    stacks, as in its training.

    Args:
        model: ``CSM`` or any module with Sesame's tree, with the weights the adapter was trained on.
        compute_dtype: as for ``adapters.attach``; by default the one of its training, or the model's own.
        device: as for ``adapters.attach``.

    Raises:
        InputError: the adapter names another base, tensors do not fit, PEFT is not installed.
    """
    shape = model_config(model)
    saved = read_adapter(directory, shape)
    dtype = compute_dtype or saved.compute_dtype or model.codebook0_head.weight.dtype
    base_hash = adapters.weights_hash(model, adapters.hash_dtype(saved.compute_dtype or dtype))
    check_base(saved, base_hash, "")
    section = dataclasses.replace(saved.section, target_modules=_words(model, saved))
    attached = adapters.attach(model, section, compute_dtype=dtype, base=saved.base, base_hash=base_hash, device=device)
    load_into(model, directory)
    return attached


def _words(model: Any, saved: SavedAdapter) -> list[str]:
    """``target_modules`` as they were given, if they mean the saved layers, else the names of these layers."""
    try:
        if set(resolve_targets(model, saved.section.target_modules)) == saved.modules.keys():
            return saved.section.target_modules
    except InputError:
        pass
    return sorted(saved.modules)


def linear_to_lora_layers(model: Any, config: dict[str, Any], use_dora: bool = False) -> Attached:
    """Put new adapters on a model; csm-mlx's function of this name.

    Args:
        model: ``CSM`` or any module with Sesame's tree.
        config: ``rank``; ``scale`` or ``alpha`` (scale = alpha / rank); ``dropout``, by default 0; ``keys``, by default
            ``attn``: names within a layer or of the model (``self_attn.q_proj``, ``projection``, ``attn``).
        use_dora: DoRA instead of LoRA.

    Raises:
        InputError: ``rank`` is missing; both or neither of ``scale`` and ``alpha`` are given; a key matches nothing.
    """
    if "rank" not in config or ("scale" in config) == ("alpha" in config):
        raise InputError("the LoRA config needs rank, and either scale or alpha", mend="scale is alpha / rank")
    rank = int(config["rank"])
    section = AdapterSection(
        method="dora" if use_dora else "lora",
        lora_rank=rank,
        lora_alpha=float(config["alpha"] if "alpha" in config else config["scale"] * rank),
        lora_dropout=float(config.get("dropout", 0.0)),
        target_modules=sorted(config.get("keys") or ["attn"]),
    )
    return adapters.attach(model, section, compute_dtype=model.codebook0_head.weight.dtype)
