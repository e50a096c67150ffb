"""Odd, but legal: paths, stores and choices of parts that must work, and a model that cannot."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from command_cases import hash_files, train_args
from safetensors.torch import load_file, save_file
from train_cases import (
    prepare,
    turn,
    write_model,
    write_store,
)

from csm_fast import CSM, cli
from csm_fast.config.parse import read_mapping
from csm_fast.config.shape import CSMConfig
from csm_fast.config.train import FREEZABLE

pytestmark = pytest.mark.usefixtures("home", "fresh_log")


@pytest.mark.slow
def test_paths_of_every_kind(tmp_path, monkeypatch):
    prepare(tmp_path / "a b" / "späße 日本")
    shutil.copytree(tmp_path / "a b" / "späße 日本", tmp_path / "plain")
    assert cli.main(train_args(tmp_path / "plain", max_steps=2, output_dir="first")) == 0
    wanted = hash_files(tmp_path / "first")["step-000002/model.safetensors"]
    for place, run in (
        (tmp_path / "a b" / "späße 日本", tmp_path / "a b" / "späße 日本" / "rün 'x'"),
        (Path("plain"), Path("../" + tmp_path.name) / "relative"),
        (Path("~/plain"), Path("~/at home")),
        (Path("~/plain"), Path("~/plain/tokens/inside")),
    ):
        assert cli.main(train_args(place, max_steps=2, output_dir=run)) == 0
        assert hash_files(run.expanduser())["step-000002/model.safetensors"] == wanted
    assert not (tmp_path / "~").exists()
    tuned = {"from_scratch": None, "model": "~/at home/best", "data": "~/plain/tokens", "max_steps": 1}
    assert cli.main(train_args(tmp_path / "plain", output_dir="tuned", **tuned)) == 0
    assert cli.main(train_args(tmp_path / "plain", max_steps=2, output_dir="plain/tokens")) == 0
    assert cli.main(train_args(tmp_path / "plain", max_steps=2, output_dir="second")) == 0  # the store is still one


@pytest.mark.slow
def test_small_and_uneven_stores(tmp_path):
    write_model(tmp_path / "model.yaml")
    rng = np.random.default_rng(0)
    write_store(tmp_path / "tokens" / "train", [[turn(rng, i) for i in range(40)]])  # one conversation, no val split
    for run, options in {
        "one": {"batch_size": 64},
        "in pieces": {"pack_rows": 40},
        "by rows": {"batch_rows": 100_000, "pack_rows": 40},
        "once": {"max_steps": 1, "overfit_one_batch": True, "warmup_steps": 1000, "learning_rate": 0},
        "quiet": {"log_every": 99, "val_every": 0, "save_every": 0},
    }.items():
        assert cli.main(train_args(tmp_path, output_dir=run, **options)) == 0, run
        assert os.readlink(tmp_path / run / "best") == os.readlink(tmp_path / run / "last")


@pytest.mark.slow
@pytest.mark.parametrize("part", FREEZABLE)
def test_any_single_part_can_be_trained_or_frozen(tmp_path, part):
    """Packs so small that some hold no frame for the depth decoder, and a speaker whose turns teach nothing."""
    small = {"pack_rows": 30, "amortization_fraction": 0.01, "batch_size": 2, "mask_speaker_ids": [1], "max_steps": 4}
    others = [name for name in FREEZABLE if name != part]
    for run, frozen in (("only", others), ("without", [part])):
        assert cli.main(train_args(prepare(tmp_path), output_dir=run, freeze=frozen, precision="bf16", **small)) == 0
        before = CSM(CSMConfig.from_dict(read_mapping(tmp_path / "model.yaml"))).init_weights().state_dict()
        after = load_file(tmp_path / run / "last" / "model.safetensors")
        assert {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])} == (
            {part} if run == "only" else set(others)
        )


def test_a_model_with_an_infinite_weight(tmp_path, model, capsys):
    """Every update is skipped and told of; the run gives up with what to do, and has saved nothing."""
    tensors = load_file(model / "model.safetensors")
    tensors["projection.weight"][0, 0] = torch.inf
    save_file(tensors, model / "model.safetensors")
    options = {"from_scratch": None, "model": model, "log_every": 1, "save_every": 1, "val_every": 4}
    assert cli.main(train_args(tmp_path, **options)) == 2
    said = capsys.readouterr().err
    assert "step 1: the loss or a gradient was not finite; the update was skipped. Data: turn" in said
    last = said.strip().splitlines()[-1]
    assert last.startswith("error: the last 10 updates were all skipped: step 10: ") and "lower --learning-rate" in last
    assert "Last good checkpoint: none yet; lower" in last and "Traceback" not in said
    assert not list((tmp_path / "run").glob("*step-*")) and not (tmp_path / "run" / "best").is_symlink()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON")) for line in lines]
    assert [row["step"] for row in rows] == list(range(10)) and rows[4]["train_loss"] is rows[4]["val_loss"] is None
