"""Every flag, setting and public name of version 0.1 still exists (``tests/golden/interface.json`` lists them)."""

from __future__ import annotations

import argparse
import importlib
import json

import pytest
from paths import GOLDEN

from csm_fast import cli
from csm_fast.config import TrainConfig, commands
from csm_fast.config.parse import list_names, list_settings

INTERFACE = json.loads((GOLDEN / "interface.json").read_text(encoding="utf-8"))


class Parsing(Exception):
    """Carries the parser of a command out of it."""


@pytest.mark.parametrize("command", INTERFACE["commands"])
def test_every_flag(command, monkeypatch):
    def stop(parser, *_):
        raise Parsing(parser)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr("sys.argv", ["csm-fast", command])
    with pytest.raises(Parsing) as caught:
        cli.main()
    flags = {flag for action in caught.value.args[0]._actions for flag in action.option_strings}
    missing = set(INTERFACE["commands"][command]) - flags
    assert not missing


@pytest.mark.parametrize("config", INTERFACE["settings"])
def test_every_setting_of_a_config_file(config):
    found: dict[str, set[str]] = {}
    for section, field, _ in list_settings(TrainConfig if config == "TrainConfig" else getattr(commands, config)):
        found.setdefault(section or "", set()).update(list_names(field))
    missing = {
        (section, key)
        for section, keys in INTERFACE["settings"][config].items()
        for key in keys
        if key not in found.get(section, ())
    }
    assert not missing


@pytest.mark.parametrize("module", INTERFACE["names"])
def test_every_public_name(module):
    missing = [name for name in INTERFACE["names"][module] if not hasattr(importlib.import_module(module), name)]
    assert not missing
