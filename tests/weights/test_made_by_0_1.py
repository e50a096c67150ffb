"""Token stores, checkpoints and adapters of version 0.1 load, resume and merge; ``tests/golden/README.md`` says how
they were made."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from paths import GOLDEN
from safetensors.torch import load_file

from csm_fast import TokenStore, cli, load_adapters, load_model

MADE = GOLDEN / "made_by_0.1"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy to work in; its files name each other by relative paths."""
    shutil.copytree(MADE, tmp_path / "made")
    monkeypatch.chdir(tmp_path / "made")
    return tmp_path / "made"


def assert_same(file: Path, wanted: Path) -> None:
    """Equal to the rounding of float32 products, which differ between processors."""
    got, want = load_file(file), load_file(wanted)
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_token_store_opens(folder):
    store = TokenStore.open(folder / "tokens" / "train")
    assert store.num_conversations == 10 and len(store.conversation(9)) >= 1


def test_a_run_is_resumed(folder, capsys):
    settings = {"model": "model.yaml", "precision": "fp32", "data": "tokens", "output-dir": "run", "device": "cpu"}
    settings |= {"batch-size": 4, "pack-rows": 64, "amortization-fraction": 0.5, "learning-rate": 1e-2, "threads": 1}
    settings |= {"n-epochs": 9, "max-steps": 6, "log-every": 1, "val-every": 3, "save-every": 3}
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    assert cli.main(["train", "--from-scratch", *flags]) == 0
    assert "step 4/6" in capsys.readouterr().err
    assert_same(folder / "run" / "last" / "model.safetensors", folder / "expected.safetensors")


def test_a_checkpoint_is_a_model(folder):
    model = load_model("run/step-000003")
    saved = load_file(folder / "run" / "step-000003" / "model.safetensors")
    assert all(torch.equal(parameter, saved[name]) for name, parameter in model.named_parameters())


def test_an_adapter_loads_and_merges(folder, capsys):
    load_adapters(load_model("run/step-000003"), "adapter")
    assert cli.main(["verify-adapter", "--adapter", "adapter", "--device", "cpu"]) == 0
    assert cli.main(["merge", "--adapter", "adapter", "--out", "merged"]) == 0
    assert_same(folder / "merged" / "model.safetensors", folder / "expected_merged.safetensors")
