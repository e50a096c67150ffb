"""Writes adapters in the formats of other tools."""

from __future__ import annotations

import os
from pathlib import Path

from csm_fast.config.shape import CSMConfig
from csm_fast.system.errors import InputError
from csm_fast.weights.adapter_formats import read_adapter, write_csm_mlx, write_transformers
from csm_fast.weights.config_json import read_shape


def _shape_for(directory: str | os.PathLike[str], shape: CSMConfig | None) -> CSMConfig:
    found = shape or read_shape(Path(directory).expanduser())
    if found is None:
        raise InputError("does not say the shape of its base", file=Path(directory), mend="give shape=model.config")
    return found


def to_transformers(
    directory: str | os.PathLike[str], out: str | os.PathLike[str], shape: CSMConfig | None = None
) -> None:
    """Write an adapter as one that PEFT loads onto a transformers ``CsmForConditionalGeneration`` of the same base.

    ``shape``: of the base, if the directory has no config.json (other tools' adapters).
    """
    shape = _shape_for(directory, shape)
    write_transformers(read_adapter(directory, shape), shape, Path(out))


def to_csm_mlx(directory: str | os.PathLike[str], out: str | os.PathLike[str], shape: CSMConfig | None = None) -> None:
    """Write an adapter as csm-mlx's ``adapters.safetensors`` and ``adapter_config.json``."""
    write_csm_mlx(read_adapter(directory, _shape_for(directory, shape)), Path(out))
