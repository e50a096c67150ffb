"""Checkpoints in and out: Sesame's names on disk; transformers' and csm-mlx' names understood.

One tensor is converted at a time, so loading needs little more memory than the model itself.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from csm_fast.config.shape import NAMED_SHAPES, CSMConfig
from csm_fast.model import adapters
from csm_fast.model.csm import CSM, parameter_shapes
from csm_fast.model.stacks import model_config
from csm_fast.system.errors import InputError
from csm_fast.system.files import read_json
from csm_fast.system.tensors import Entry, read_entries
from csm_fast.weights.adapter_files import check_base
from csm_fast.weights.adapter_formats import SavedAdapter, read_adapter
from csm_fast.weights.config_json import config_from_json, sesame_config, transformers_config
from csm_fast.weights.files import ADAPTER_CONFIG, PEFT_WEIGHTS, is_adapter, locate, shards
from csm_fast.weights.merge import add_adapters, replace_whole
from csm_fast.weights.names import interleave_rows, naming, rotated_heads, sesame_name
from csm_fast.weights.save import save_model

__all__ = [
    "load_model",
    "model_config",
    "save_model",
    "sesame_config",
    "sesame_to_transformers",
    "transformers_config",
    "transformers_to_sesame",
]


# -------------------------------------------------------------------------------------------------------- loading


class _Plan:
    """Which tensors of a checkpoint make up which parameters."""

    def __init__(self, entries: list[Entry], where: str | os.PathLike[str]):
        self.where = where
        self.style = naming(entry.name for entry in entries)
        self.sources: dict[str, list[Entry]] = {}
        for entry in entries:
            name = sesame_name(entry.name, self.style)
            if name is not None:
                self.sources.setdefault(name, []).append(entry)

    def account(self, config: CSMConfig) -> None:
        """Compare names, shapes and dtypes with what ``config`` needs; one InputError for all differences."""
        expected = parameter_shapes(config)
        wrong = [f"{e.name} is unexpected" for n, entries in self.sources.items() if n not in expected for e in entries]
        for name, shape in expected.items():
            if name not in self.sources:
                wrong.append(f"{name} is missing")
            for entry in self.sources.get(name, ()):
                if tuple(entry.shape) != shape:
                    wrong.append(f"{entry.name} is {list(entry.shape)} instead of {list(shape)}")
                elif entry.dtype not in ("F64", "F32", "F16", "BF16"):
                    wrong.append(f"{entry.name} is {entry.dtype}, not a float")
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise InputError(
                f"{len(wrong)} of the tensors do not fit this CSM: {', '.join(wrong[:3])}{more}",
                file=self.where,
                mend="give a complete CSM checkpoint with its own config.json",
            )

    def read(self, name: str, config: CSMConfig) -> Tensor:
        """A parameter in Sesame's convention. May alias what the entry's ``read`` returned."""
        first, *others = self.sources[name]
        tensor = first.read()
        if any(not torch.equal(tensor, other.read()) for other in others):
            raise InputError(
                f"{first.name} and {others[0].name} differ, but CSM has one audio embedding",
                file=self.where,
                mend="some releases of transformers 5 left the backbone's copy random when loading; export the model "
                "again with a release that ties them",
            )
        heads = rotated_heads(name, config) if self.style == "transformers" else None
        return interleave_rows(tensor, heads) if heads else tensor


def load_model(
    name_or_path: str | os.PathLike[str],
    *,
    device: Any = "cpu",
    dtype: torch.dtype | Callable[[str], torch.dtype] | None = None,
) -> CSM:
    """Load a CSM from a hub id, a directory or a ``.safetensors`` file.

    A directory that holds an adapter gives the model that it names as its base, with the adapter merged in float32.

    The weights may be sharded (``*.safetensors.index.json``) and may carry Sesame's, transformers' or csm-mlx' names;
    which of them is read off the names. From the hub only config.json and one set of weights is fetched.

    Args:
        name_or_path: such as ``sesame/csm-1b``, ``run/best`` or ``model.safetensors``.
        device: where the parameters go, one at a time.
        dtype: of the parameters, or a function from a parameter's name (Sesame's) to it; None means float32, the dtype
            of master weights.

    Raises:
        InputError: nothing there, unreadable or truncated files, tensors that are missing, unexpected or of another
            shape, and a hub that does not answer. Nothing is half loaded.
    """
    if is_adapter(name_or_path):
        from csm_fast.weights.load import load_merged

        model = load_merged(name_or_path)
        for name, parameter in model.named_parameters():
            kind = dtype(name) if callable(dtype) else dtype or torch.float32
            parameter.data = parameter.data.to(device=device, dtype=kind)
        return model
    file = locate(os.fspath(name_or_path))
    plan = _Plan([entry for part in shards(file) for entry in read_entries(file.with_name(part))], file)
    config = _read_config(file.with_name("config.json"), plan)
    plan.account(config)
    with torch.device("meta"):
        model = CSM(config)
    for name in plan.sources:
        # A copy in every case: the file may be replaced while the model lives.
        kind = dtype(name) if callable(dtype) else dtype or torch.float32
        tensor = plan.read(name, config).to(device=device, dtype=kind, copy=True)
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(tensor.contiguous()))
    return model


def _read_config(file: Path, plan: _Plan) -> CSMConfig:
    """The shape from the config.json beside the weights, or, where it says nothing, from the weights' shapes."""
    config = config_from_json(read_json(file), file) if file.is_file() else None
    if config is not None:
        return config
    shapes = {name: tuple(entries[0].shape) for name, entries in plan.sources.items()}
    for make in NAMED_SHAPES.values():
        if shapes == parameter_shapes(make()):
            return make()
    raise InputError(
        "cannot tell the model's shape: no config.json of a CSM lies beside the weights, and they are not of the "
        f"known shapes ({', '.join(NAMED_SHAPES)})",
        file=plan.where,
        mend="put the config.json that came with the weights into the same directory",
    )


# --------------------------------------------------------------------------------------------------------- saving


def load_merged(directory: str | os.PathLike[str], base: str | None = None) -> CSM:
    """The float32 model that an adapter and its base make together.

    ``base``: hub id or path; by default the one that the adapter names.

    Raises:
        InputError: the base is not there or is another one, or the adapter does not fit it.
    """
    model, saved = load_base(directory, base)
    replace_whole(model, saved)
    add_adapters(model, saved)
    return model


def adapter_shape(directory: str | os.PathLike[str]) -> CSMConfig | None:
    """The base's shape, where the adapter's directory says it."""
    file = Path(directory).expanduser() / "config.json"
    return config_from_json(read_json(file), file) if file.is_file() else None


def load_base(directory: str | os.PathLike[str], base: str | None = None) -> tuple[CSM, SavedAdapter]:
    """The float32 base of an adapter, its hash checked, and the adapter.

    Args:
        base: hub id or path; by default the one that the adapter names. Random weights of a named seed are made again.

    Raises:
        InputError: the adapter names no base, it cannot be loaded, or it is another one.
    """
    path = Path(directory).expanduser()
    if not (path / ADAPTER_CONFIG).is_file():
        raise InputError(
            "holds no adapter", file=path, mend=f"give a directory with {PEFT_WEIGHTS} and {ADAPTER_CONFIG}"
        )
    config = read_json(path / ADAPTER_CONFIG)
    name = base or str(config.get("base_model_name_or_path") or "")
    if not name:
        raise InputError("does not name its base", file=path / ADAPTER_CONFIG, mend="give it with --base")
    seed = re.fullmatch(r".*, random, seed (\d+)", name)
    if seed and (shape := adapter_shape(path)):
        model = CSM(shape).init_weights(int(seed[1]))
    else:
        try:
            model = load_model(name)
        except InputError as error:
            if base:
                raise
            raise InputError(f"its base cannot be loaded: {error}", file=path, mend="give it with --base") from None
    saved = read_adapter(path, model.config)
    if saved.base_hash is not None:
        dtype = adapters.hash_dtype(saved.compute_dtype or torch.float32)
        check_base(saved, adapters.weights_hash(model, dtype), name)
    saved.base = name
    return model, saved
