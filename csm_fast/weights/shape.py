"""A model's shape before its weights are read."""

from __future__ import annotations

from pathlib import Path

from csm_fast.config.parse import read_mapping
from csm_fast.config.shape import NAMED_SHAPES, CSMConfig
from csm_fast.config.train import TrainConfig
from csm_fast.system.errors import InputError
from csm_fast.system.files import read_json
from csm_fast.weights.config_json import config_from_json


def scratch_shape(name: str) -> CSMConfig:
    """The shape that ``--from-scratch --model name`` means."""
    if name in NAMED_SHAPES:
        return NAMED_SHAPES[name]()
    if name == "sesame/csm-1b":
        return CSMConfig.csm_1b()
    if name.endswith((".yaml", ".yml", ".json")):
        return CSMConfig.from_dict(read_mapping(name), file=name)
    raise InputError(
        f"--from-scratch needs a shape, {name} is none",
        mend="use --model " + ", ".join(NAMED_SHAPES) + " or a YAML file of a CSMConfig",
    )


def shape_beforehand(config: TrainConfig, resumed: Path | None) -> CSMConfig | None:
    """The shape of the model that a run will load, without loading it; None where only the weights tell."""
    name = config.model.model
    if resumed is None and config.model.from_scratch:
        return scratch_shape(name)
    if resumed is None and name == "sesame/csm-1b":
        return CSMConfig.csm_1b()
    path = resumed or Path(name).expanduser()
    file = (path if path.is_dir() else path.parent) / "config.json"
    return config_from_json(read_json(file), file) if file.is_file() else None


def model_shape(name: str) -> CSMConfig:
    """The shape that ``--model`` means; of a directory only its config.json is read."""
    if name == "sesame/csm-1b":
        return CSMConfig.csm_1b()
    path = Path(name).expanduser()
    if name in NAMED_SHAPES and not path.exists():
        return NAMED_SHAPES[name]()
    if name.endswith((".yaml", ".yml")):
        return CSMConfig.from_dict(read_mapping(name), file=name)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise InputError(
            f"--model {name}: no such shape, directory or file",
            mend="use " + ", ".join(NAMED_SHAPES) + ", a model's directory with config.json, or a YAML file",
        )
    values = read_json(file)
    return config_from_json(values, file) or CSMConfig.from_dict(values, file=str(file))
