"""Adapter files: PEFT's with Sesame's or transformers' module names, and csm-mlx's; read into one form, and written.

    PEFT     adapter_model.safetensors, adapter_config.json: base_model.model.<module>.lora_A.weight [r, in],
             .lora_B.weight [out, r], .lora_magnitude_vector [out] (DoRA); scale alpha / r, rslora alpha / sqrt(r)
    csm-mlx  adapters.safetensors, adapter_config.json: <module>.lora_a [in, r], .lora_b [r, out], .m [out] (DoRA);
             its own scale

transformers orders the rows of each head's query and key projections differently (``names.split_rows``), so the rows of
B and the magnitudes are permuted; A is not.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from csm_fast.config.shape import CSMConfig
from csm_fast.config.train import AdapterSection
from csm_fast.model.csm import parameter_shapes
from csm_fast.system.errors import InputError
from csm_fast.system.files import read_json, write_file, writing_to
from csm_fast.system.tensors import Entry, read_entries, write_tensors
from csm_fast.system.version import __version__
from csm_fast.weights.files import ADAPTER_CONFIG, MLX_WEIGHTS, PEFT_WEIGHTS
from csm_fast.weights.names import (
    LAYER,
    detect_naming,
    interleave_rows,
    rotated_heads,
    sesame_name,
    sesame_to_transformers,
)

TRAINED = "trained.safetensors"
WHOLE = ("codebook0_head.weight", "audio_head", "text_embeddings.weight", "audio_embeddings.weight")
PARTS = ("lora_A", "lora_B", "magnitude")  # PEFT's keys of a module, with the suffixes below
_PEFT_SUFFIX = {"lora_A": ".lora_A.weight", "lora_B": ".lora_B.weight", "magnitude": ".lora_magnitude_vector"}
_MLX_SUFFIX = {"lora_A": ".lora_a", "lora_B": ".lora_b", "magnitude": ".m"}
_PEFT_PREFIX = "base_model.model."
_MLX_LEAF = {ours.removesuffix(".weight"): theirs.removesuffix(".weight") for theirs, ours in LAYER.items()}
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
_shapes = functools.lru_cache(maxsize=4)(parameter_shapes)


@dataclass
class SavedAdapter:
    """The content of an adapter's files, with Sesame's names and rotary convention.

    Attributes:
        section: method, rank, alpha, and what is trained besides; ``target_modules`` are words or names.
        modules: for each adapted layer its lora_A [r, in], lora_B [out, r] and, for DoRA, magnitude [out].
        whole: parameters trained besides, by name; or ``<name>.rows`` [R, D] and ``<name>.index`` [R] of a table.
        base, base_hash: name and ``adapters.weights_hash`` of the base; empty and None if the files do not say.
        compute_dtype: of the adapter's training; None if the files do not say (other tools').
        where: the directory, for messages.
    """

    section: AdapterSection
    modules: dict[str, dict[str, Tensor]]
    whole: dict[str, Tensor] = field(default_factory=dict)
    base: str = ""
    base_hash: str | None = None
    compute_dtype: torch.dtype | None = None
    where: Path = Path()

    @property
    def scale(self) -> float:
        rank = self.section.lora_rank
        return self.section.alpha / (math.sqrt(rank) if self.section.rslora else rank)


def read_adapter(directory: str | os.PathLike[str], shape: CSMConfig) -> SavedAdapter:
    """Read an adapter of a base of ``shape``; the names of the files say which tool wrote them.

    Tensors of the codec are ignored. Every other tensor must belong to the adapter.

    Raises:
        InputError: no adapter there, damaged files, an adapter of another kind than LoRA or DoRA, tensors that do not
            fit ``shape``.
    """
    path = Path(directory).expanduser()
    if (path / PEFT_WEIGHTS).is_file():
        saved = _read_peft(path, shape)
    elif (path / MLX_WEIGHTS).is_file():
        saved = _read_mlx(path, shape)
    else:
        raise InputError(
            "holds no adapter", file=path, mend=f"give a directory with {PEFT_WEIGHTS} and {ADAPTER_CONFIG}"
        )
    _check_shapes(saved, shape)
    return saved


def _check_shapes(saved: SavedAdapter, shape: CSMConfig) -> None:
    expected, rank, wrong = _shapes(shape), saved.section.lora_rank, []
    parts = set(PARTS if saved.section.method == "dora" else PARTS[:2])
    for module, tensors in saved.modules.items():
        out, inner = expected.get(f"{module}.weight", (0, 0))
        want = {"lora_A": (rank, inner), "lora_B": (out, rank), "magnitude": (out,)}
        wrong += [f"{module}: {part} is missing" for part in sorted(parts - tensors.keys())]
        wrong += [f"{module}: {part} is unexpected" for part in sorted(tensors.keys() - parts)]
        for part, tensor in tensors.items():
            if part in parts and tuple(tensor.shape) != want[part]:
                wrong.append(f"{module}: {part} is {list(tensor.shape)} instead of {list(want[part])}")
    for name, tensor in saved.whole.items():
        table, _, kind = name.rpartition(".")
        if kind == "index":
            fits = tensor.dim() == 1 and bool(((tensor >= 0) & (tensor < expected[table][0])).all())
        elif kind == "rows":
            fits = tuple(tensor.shape) == (len(saved.whole.get(f"{table}.index", ())), *expected[table][1:])
        else:
            fits = tuple(tensor.shape) == expected[name]
        if not fits:
            wrong.append(f"{name} {list(tensor.shape)} does not fit")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise InputError(
            f"{len(wrong)} of the adapter's tensors do not fit: {', '.join(wrong[:3])}{more}",
            file=saved.where,
            mend="give the adapter's own base, and all files of the adapter",
        )


def _module(name: str, style: str, shape: CSMConfig, where: Path) -> str | None:
    """A layer's name in Sesame's tree; None for the codec's."""
    ours = sesame_name(f"{name}.weight", style)
    if ours is None:
        return None
    if ours not in _shapes(shape) or ours in WHOLE[2:]:
        raise InputError(
            f"has an adapter on {name}, which this CSM does not have", file=where, mend="give the adapter of a CSM"
        )
    return ours.removesuffix(".weight")


# ----------------------------------------------------------------------------------------------------------- PEFT


def _read_peft(path: Path, shape: CSMConfig) -> SavedAdapter:
    config = read_json(path / ADAPTER_CONFIG)
    ours = ((config.get("auto_mapping") or {}).get("csm_fast")) or {}
    _refuse_unknown(config, path)
    entries = {e.name.removeprefix(_PEFT_PREFIX): e for e in read_entries(path / PEFT_WEIGHTS)}
    style = detect_naming(entries)
    modules: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for name, entry in entries.items():
        part = next((p for p, suffix in _PEFT_SUFFIX.items() if name.endswith(suffix)), None)
        if part is None:
            theirs = sesame_name(name, style)
            if theirs is None or name.endswith(".base_layer.weight"):  # the codec's; a frozen copy of a head or table
                continue
            if theirs not in WHOLE:
                raise InputError(f"{entry.name} is unexpected", file=path / PEFT_WEIGHTS)
            whole[theirs] = entry.read()
            continue
        module = _module(name.removesuffix(_PEFT_SUFFIX[part]), style, shape, path / PEFT_WEIGHTS)
        if module is None:
            continue
        tensor = entry.read()
        heads = rotated_heads(f"{module}.weight", shape) if style == "transformers" and part != "lora_A" else None
        modules.setdefault(module, {})[part] = interleave_rows(tensor, heads) if heads else tensor
    if (path / TRAINED).is_file():
        whole |= _read_trained(path / TRAINED)
    try:
        section = AdapterSection(
            method=ours.get("method") or ("dora" if config.get("use_dora") else "lora"),
            lora_rank=config["r"],
            lora_alpha=config["lora_alpha"],
            lora_dropout=config.get("lora_dropout") or 0.0,
            rslora=bool(config.get("use_rslora")),
            target_modules=list(ours.get("target_modules") or sorted(modules)),
            train_heads=any(name in WHOLE[:2] for name in whole),
            train_embeddings=_tables(whole),
        )
        dtype = _DTYPES[ours["compute_dtype"]] if "compute_dtype" in ours else None
    except (KeyError, TypeError) as error:
        raise InputError(
            f"lacks or misuses {error}", file=path / ADAPTER_CONFIG, mend="copy or download it again"
        ) from None
    base = str(config.get("base_model_name_or_path") or "")
    return SavedAdapter(section, modules, whole, base, ours.get("base_hash"), dtype, path)


def _tables(whole: Mapping[str, Tensor]) -> Any:
    if any(name.endswith(".rows") for name in whole):
        return "rows"
    return "all" if any(name in WHOLE[2:] for name in whole) else "off"


def _read_trained(file: Path) -> dict[str, Tensor]:
    allowed = {*WHOLE, *(f"{name}.{kind}" for name in WHOLE[2:] for kind in ("rows", "index"))}
    entries: list[Entry] = read_entries(file)
    for entry in entries:
        if entry.name not in allowed:
            raise InputError(f"{entry.name} is unexpected", file=file, mend="give the files of one adapter")
    return {entry.name: entry.read() for entry in entries}


def _refuse_unknown(config: dict[str, Any], path: Path) -> None:
    """Refuse what PEFT can do to a model beyond LoRA and DoRA on linear layers."""
    start = config.get("init_lora_weights")
    odd = {
        f"peft_type {config.get('peft_type')}": config.get("peft_type") != "LORA",
        "adapters of several ranks or scales": bool(config.get("rank_pattern") or config.get("alpha_pattern")),
        "trained biases": config.get("bias", "none") != "none" or bool(config.get("lora_bias")),
        f"init_lora_weights {start}, which changes the base": isinstance(start, str)
        and start.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")),
        "adapters on parameters": bool(config.get("target_parameters")),
    }
    for what, found in odd.items():
        if found:
            raise InputError(f"has {what}", file=path / ADAPTER_CONFIG, mend="give a LoRA or DoRA of linear layers")


def write_peft(saved: SavedAdapter, directory: Path, targets: list[str] | None = None) -> None:
    """Write PEFT's two files with Sesame's names, and ``trained.safetensors`` if more than adapters was trained.

    ``targets``: what adapter_config.json lists; all modules' full names by default.
    """
    tensors = {
        _PEFT_PREFIX + module + _PEFT_SUFFIX[part]: parts[part]
        for module, parts in sorted(saved.modules.items())
        for part in PARTS
        if part in parts
    }
    dtype = next((name for name, kind in _DTYPES.items() if kind == saved.compute_dtype), "float32")
    section = saved.section
    extra = {
        "version": __version__,
        "method": section.method,
        "base_hash": saved.base_hash,
        "compute_dtype": dtype,
        "target_modules": section.target_modules,
    }
    config = _peft_config(saved, targets or sorted(saved.modules))
    # Every release of PEFT accepts this field; it would warn about a key of our own.
    config["auto_mapping"] = {"base_model_class": "CSM", "parent_library": "csm_fast.model", "csm_fast": extra}
    _write(directory, PEFT_WEIGHTS, tensors, config)
    if saved.whole:
        with writing_to(directory):
            write_tensors(directory / TRAINED, saved.whole, None)


def _peft_config(saved: SavedAdapter, targets: list[str]) -> dict[str, Any]:
    section = saved.section
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": saved.base or None,
        "inference_mode": True,
        "r": section.lora_rank,
        "lora_alpha": section.alpha,
        "lora_dropout": section.lora_dropout,
        "use_rslora": section.rslora,
        "use_dora": section.method == "dora",
        "bias": "none",
        "target_modules": targets,
    }


def _write(directory: Path, weights: str, tensors: Mapping[str, Tensor], config: dict[str, Any]) -> None:
    with writing_to(directory):
        directory.mkdir(parents=True, exist_ok=True)
        write_tensors(directory / weights, tensors, None)
        write_file(directory / ADAPTER_CONFIG, json.dumps(config, indent=2) + "\n")


def write_transformers(saved: SavedAdapter, shape: CSMConfig, directory: Path) -> None:
    """Write an adapter that PEFT loads onto a transformers ``CsmForConditionalGeneration`` of the same base.

    Heads and tables trained whole become PEFT's ``modules_to_save``.

    Raises:
        InputError: only rows of the tables were trained, which PEFT cannot store with transformers' tied names.
    """
    if saved.section.train_embeddings == "rows":
        raise InputError(
            "trains rows of the embedding tables, which have no form in a transformers adapter",
            file=saved.where,
            mend="merge it with csm-fast merge",
        )
    tensors, targets = {}, []
    for module, parts in sorted(saved.modules.items()):
        moved = {p: sesame_to_transformers({f"{module}.weight": t}, shape) for p, t in parts.items() if p != "lora_A"}
        theirs = next(iter(moved["lora_B"])).removesuffix(".weight")
        targets.append(theirs)
        for part in (p for p in PARTS if p in parts):
            values = parts[part] if part == "lora_A" else moved[part][f"{theirs}.weight"]
            tensors[_PEFT_PREFIX + theirs + _PEFT_SUFFIX[part]] = values
    config = _peft_config(saved, targets)
    whole = {
        n: t for name, values in saved.whole.items() for n, t in sesame_to_transformers({name: values}, shape).items()
    }
    if whole:
        tensors |= {_PEFT_PREFIX + name: values for name, values in whole.items()}
        config["modules_to_save"] = sorted(name.removesuffix(".weight") for name in whole)
    _write(directory, PEFT_WEIGHTS, tensors, config)


# -------------------------------------------------------------------------------------------------------- csm-mlx


def _read_mlx(path: Path, shape: CSMConfig) -> SavedAdapter:
    config = read_json(path / ADAPTER_CONFIG)
    kind, given = config.get("fine_tune_type", "lora"), config.get("lora_parameters") or {}
    if kind not in ("lora", "dora"):
        raise InputError(
            f"fine_tune_type is {kind}", file=path / ADAPTER_CONFIG, mend="give an adapter, or load the model"
        )
    known = _shapes(shape)
    modules: dict[str, dict[str, Tensor]] = {}
    for entry in read_entries(path / MLX_WEIGHTS):
        part = next((p for p, suffix in _MLX_SUFFIX.items() if entry.name.endswith(suffix)), None)
        if part is None:
            # csm-mlx saves the frozen base beside the adapter; its adapted layers have one more name.
            if sesame_name(entry.name.replace(".linear.weight", ".weight"), "csm-mlx") in known:
                continue
            raise InputError(f"{entry.name} is unexpected", file=path / MLX_WEIGHTS, mend="give csm-mlx's adapter")
        module = _module(entry.name.removesuffix(_MLX_SUFFIX[part]), "csm-mlx", shape, path / MLX_WEIGHTS)
        assert module is not None, "csm-mlx has no codec"
        tensor = entry.read()
        modules.setdefault(module, {})[part] = tensor if part == "magnitude" else tensor.t().contiguous()
    try:
        rank = int(given["rank"])
        section = AdapterSection(
            method=kind,
            lora_rank=rank,
            lora_alpha=float(given["scale"]) * rank,
            lora_dropout=float(given.get("dropout") or 0.0),
            target_modules=sorted(modules),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"lora_parameters lacks or misuses {error}", file=path / ADAPTER_CONFIG) from None
    return SavedAdapter(section, modules, where=path)


def write_csm_mlx(saved: SavedAdapter, directory: Path) -> None:
    """Write csm-mlx's two files. They name kinds of layers, not single layers: if only some layers of a kind have an
    adapter, csm-mlx gives the others one without effect.

    Raises:
        InputError: heads or tables were trained whole, which csm-mlx's adapters cannot hold.
    """
    if saved.whole:
        raise InputError(
            "trains heads or tables whole, which csm-mlx's adapters do not hold",
            file=saved.where,
            mend="merge it with csm-fast merge",
        )
    tensors, keys = {}, set()
    for module, parts in sorted(saved.modules.items()):
        head, number, leaf = module.partition(".layers.")
        index, _, leaf = leaf.partition(".")
        key = _MLX_LEAF[leaf] if number else module
        keys.add(key)
        theirs = f"{head}.layers.{index}.{key}" if number else module
        for part, tensor in parts.items():
            tensors[theirs + _MLX_SUFFIX[part]] = tensor if part == "magnitude" else tensor.t().contiguous()
    section = saved.section
    given = {"rank": section.lora_rank, "scale": saved.scale, "dropout": section.lora_dropout, "keys": sorted(keys)}
    kind = "dora" if section.method == "dora" else "lora"
    _write(directory, MLX_WEIGHTS, tensors, {"fine_tune_type": kind, "lora_parameters": given})


def check_base(saved: SavedAdapter, base_hash: str, base: str) -> None:
    """Refuse an adapter of another base, unless the adapter does not say its base."""
    if saved.base_hash is not None and saved.base_hash != base_hash:
        raise InputError(
            f"belongs to the base {saved.base or 'without a name'} (weights {saved.base_hash[:16]}), not to "
            f"{base or 'the given model'} (weights {base_hash[:16]})",
            file=saved.where,
            mend="give the base it was trained on",
        )
