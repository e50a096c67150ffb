"""A model's shape before its weights are read. Does not import torch."""

from __future__ import annotations

from pathlib import Path

from csm_fast.config.parse import read_mapping
from csm_fast.config.shape import NAMED_SHAPES, CSMConfig
from csm_fast.config.train import TrainConfig
from csm_fast.system.errors import InputError
from csm_fast.system.files import read_json
from csm_fast.weights.config_json import config_from_json, read_shape

HUB_MODEL = "sesame/csm-1b"


def named_shape(name: str) -> CSMConfig | None:
    """The shape that a name means by itself: one of ``NAMED_SHAPES``, csm-1b's hub id, or a YAML file of a
    ``CSMConfig``; else None."""
    if name in NAMED_SHAPES:
        return NAMED_SHAPES[name]()
    if name == HUB_MODEL:
        return CSMConfig.csm_1b()
    return CSMConfig.from_dict(read_mapping(name), file=name) if name.endswith((".yaml", ".yml")) else None


def scratch_shape(name: str) -> CSMConfig:
    """The shape that ``--from-scratch --model name`` means: a named one, or a YAML or JSON file of a ``CSMConfig``.

    Raises:
        InputError: it means none.
    """
    shape = named_shape(name)
    if shape is None and name.endswith(".json"):
        shape = CSMConfig.from_dict(read_mapping(name), file=name)
    if shape is None:
        raise InputError(
            f"--from-scratch needs a shape, {name} is none",
            mend="use --model " + ", ".join(NAMED_SHAPES) + " or a YAML file of a CSMConfig",
        )
    return shape


def shape_beforehand(config: TrainConfig, resumed: Path | None) -> CSMConfig | None:
    """The shape of the model that a run will load; None where only the weights say it.

    ``resumed``: the checkpoint from which the run continues.
    """
    name = config.model.model
    if resumed is None and config.model.from_scratch:
        return scratch_shape(name)
    if resumed is None and name == HUB_MODEL:
        return CSMConfig.csm_1b()
    path = resumed or Path(name).expanduser()
    return read_shape(path if path.is_dir() else path.parent)


def model_shape(name: str) -> CSMConfig:
    """The shape that ``csm-fast plan --model name`` means: a named one, or that of a directory with a model, of its
    config.json, or of a YAML or JSON file of a ``CSMConfig``.

    Raises:
        InputError: no such shape, directory or file; a damaged file.
    """
    path = Path(name).expanduser()
    shape = None if name in NAMED_SHAPES and path.exists() else named_shape(name)
    if shape is not None:
        return shape
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise InputError(
            f"--model {name}: no such shape, directory or file",
            mend="use " + ", ".join(NAMED_SHAPES) + ", a model's directory with config.json, or a YAML file",
        )
    values = read_json(file)
    return config_from_json(values, file) or CSMConfig.from_dict(values, file=str(file))
