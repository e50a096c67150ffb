"""Fixtures of the commands' tests: a home of their own, a model, and a command that must be refused."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from command_cases import hash_files
from train_cases import prepare

from csm_fast import CSM, cli, save_model
from csm_fast.config.parse import read_mapping
from csm_fast.config.shape import CSMConfig


@pytest.fixture
def fresh_log():
    """The command's log handler keeps the stream it was made with, which is another one in every test."""
    logging.getLogger("csm_fast").handlers.clear()


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Where a mistake would litter, and what ~ means. The cache stays, or each process would build the CPU library."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    monkeypatch.setenv("XDG_CACHE_HOME", cache)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def model(tmp_path):
    save_model(CSM(CSMConfig.from_dict(read_mapping(prepare(tmp_path) / "model.yaml"))).init_weights(), tmp_path / "m")
    return tmp_path / "m"


@pytest.fixture
def refused(capsys, tmp_path):
    """Run a command that must fail, and nothing may change under the folder; returns the one line."""

    def run(argv: list[str], *words: str, keep: Path | None = None) -> str:
        keep = keep or tmp_path
        before = hash_files(keep)
        capsys.readouterr()
        status = cli.main([str(part) for part in argv])
        said = capsys.readouterr().err
        lines = said.strip().splitlines()
        assert status not in (0, None), said
        assert lines[-1].startswith("error: ") and sum(line.startswith("error: ") for line in lines) == 1, said
        assert "Traceback" not in said and "Logging error" not in said, said
        for word in words:
            assert word in lines[-1], lines[-1]
        assert "; " in lines[-1], f"no mend: {lines[-1]}"
        assert len(lines[-1]) < 700, lines[-1]
        assert before.items() <= hash_files(keep).items()
        return lines[-1]

    return run
