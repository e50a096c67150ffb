"""Loads models: full weights with Sesame's, transformers' or csm-mlx's names, and adapters with their bases.

The three loaders call each other: a directory may hold an adapter, whose base may be an adapter again. Tensors are
converted one at a time, so loading needs little more memory than the model.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

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
    device: torch.device | str = "cpu",
    dtype: torch.dtype | Callable[[str], torch.dtype] | None = None,
) -> CSM:
    """Load a CSM from a hub id, a directory or a ``.safetensors`` file.

    For a directory with an adapter, the result is the base that it names, with the adapter merged in float32.

    The weights may be sharded (``*.safetensors.index.json``), with Sesame's, transformers' or csm-mlx's names. From the
    hub only config.json and one set of weights is fetched.

    Args:
        name_or_path: such as ``sesame/csm-1b``, ``run/best`` or ``model.safetensors``.
        device: where the parameters go, one at a time.
        dtype: of the parameters, or a function from a parameter's name (Sesame's) to it; None means float32, the dtype
            of master weights.

    Raises:
        InputError: nothing there, unreadable or truncated files, tensors that are missing, unexpected or of another
            shape, a hub that does not answer.
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
        # Always a copy: the file may be replaced while the model is in use.
        kind = dtype(name) if callable(dtype) else dtype or torch.float32
        tensor = names.read(name, config).to(device=device, dtype=kind, copy=True)
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(tensor.contiguous()))
    return model


def _shape_of_weights(names: NameMap) -> CSMConfig:
    """The shape of ``NAMED_SHAPES`` that has exactly these parameters."""
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
    """The float32 base of an adapter with the adapter merged.

    ``base``: hub id or path; by default the one that the adapter names.

    Raises:
        InputError: the base cannot be loaded or is another one, or the adapter does not fit it.
    """
    model, saved = load_base(directory, base)
    replace_whole(model, saved)
    add_adapters(model, saved)
    return model


def load_base(directory: str | os.PathLike[str], base: str | None = None) -> tuple[CSM, SavedAdapter]:
    """The float32 base of an adapter, its hash checked, and the adapter.

    Args:
        base: hub id or path; by default the one that the adapter names. A base of random weights, named by its seed, is
            generated again.

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
