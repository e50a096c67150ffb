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
from torch import nn

from csm_fast.config.shape import NAMED_SHAPES, CSMConfig
from csm_fast.model import adapters
from csm_fast.model.csm import CSM, parameter_shapes
from csm_fast.system.errors import InputError
from csm_fast.system.files import read_json
from csm_fast.system.tensors import read_entries
from csm_fast.weights.adapter_formats import SavedAdapter, check_base, read_adapter
from csm_fast.weights.config_json import read_shape
from csm_fast.weights.files import ADAPTER_CONFIG, PEFT_WEIGHTS, is_adapter, list_shards, locate_weights
from csm_fast.weights.merge import add_adapters, replace_whole
from csm_fast.weights.names import NameMap


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
        model = load_merged(name_or_path)
        for name, parameter in model.named_parameters():
            kind = dtype(name) if callable(dtype) else dtype or torch.float32
            parameter.data = parameter.data.to(device=device, dtype=kind)
        return model
    file = locate_weights(os.fspath(name_or_path))
    names = NameMap([entry for part in list_shards(file) for entry in read_entries(file.with_name(part))], file)
    config = read_shape(file.parent) or _shape_of_weights(names)
    names.check_parameters(config)
    with torch.device("meta"):
        model = CSM(config)
    for name in names.sources:
        # A copy in every case: the file may be replaced while the model lives.
        kind = dtype(name) if callable(dtype) else dtype or torch.float32
        tensor = names.read(name, config).to(device=device, dtype=kind, copy=True)
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(tensor.contiguous()))
    return model


def _shape_of_weights(names: NameMap) -> CSMConfig:
    """The named shape whose parameters the weights are."""
    shapes = {name: tuple(entries[0].shape) for name, entries in names.sources.items()}
    for make in NAMED_SHAPES.values():
        if shapes == parameter_shapes(make()):
            return make()
    raise InputError(
        "cannot tell the model's shape: no config.json of a CSM lies beside the weights, and they are not of the "
        f"known shapes ({', '.join(NAMED_SHAPES)})",
        file=names.where,
        mend="put the config.json that came with the weights into the same directory",
    )


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
    if seed and (shape := read_shape(path)):
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
