"""A disk that is full, read-only or limited: one line, and the earlier checkpoints stay."""

from __future__ import annotations

import errno
import importlib
import os
import resource

import pytest
from command_cases import hash_files, train_args
from train_cases import prepare, start

from csm_fast import cli
from csm_fast.train.checkpoint import read_if_complete

pytestmark = pytest.mark.usefixtures("home", "fresh_log")


@pytest.mark.parametrize("place", ["/dev/null/run", "/proc/run", "model.yaml", ""])
def test_places_that_cannot_be_written(tmp_path, refused, place):
    refused(train_args(prepare(tmp_path), output_dir=place), place or "--output-dir is empty", "; ")


def no_space(*args, **options):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.slow
@pytest.mark.parametrize(
    "place", ["system.arrays.os.fsync", "train.checkpoint.write_tensors", "train.checkpoint.os.symlink"]
)
def test_a_full_disk_while_saving(tmp_path, refused, monkeypatch, place):
    """The checkpoint before it stays, nothing half is left, and the same command goes on to the same end."""
    assert cli.main(train_args(prepare(tmp_path), max_steps=3, save_every=1, output_dir="alone")) == 0
    saved = tmp_path / "run" / "step-000001"
    module, _, name = place.rpartition(".")
    call = getattr(importlib.import_module("csm_fast." + module.removesuffix(".os")), name, None) or getattr(os, name)

    def full(*args, **options):
        return no_space() if saved.exists() and (tmp_path / "run" / "best").exists() else call(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(f"csm_fast.{place}", full)
        refused(
            train_args(tmp_path, max_steps=3, save_every=1),
            "run: the checkpoint could not be saved, the earlier ones are intact: the disk is full",
            "free some space and run the same command again",
            keep=saved,
        )
    assert read_if_complete(saved) and read_if_complete(tmp_path / "run" / "last")
    assert not list((tmp_path / "run").glob(".step*"))
    assert cli.main(train_args(tmp_path, max_steps=3, save_every=1)) == 0
    whole, pieces = hash_files(tmp_path / "alone"), hash_files(tmp_path / "run")
    for name in ("model", "optimizer"):
        assert whole[f"step-000003/{name}.safetensors"] == pieces[f"step-000003/{name}.safetensors"]


def test_a_full_disk_for_the_small_files(tmp_path, refused, monkeypatch):
    assert cli.main(train_args(prepare(tmp_path), max_steps=2)) == 0
    with monkeypatch.context() as patch:
        patch.setattr("csm_fast.report.metrics.write_file", no_space)
        refused(
            train_args(tmp_path, max_steps=2), "run: the run could not be started: the disk is full", "free some space"
        )
    with monkeypatch.context() as patch:
        patch.setattr("csm_fast.report.summary.plot", no_space)
        refused(
            train_args(tmp_path, max_steps=2),
            "run: the summary could not be written: the disk is full",
            "free",
            keep=tmp_path / "run/step-000002",
        )
    real = open

    def full(path, mode="r", **options):
        if mode == "a":
            no_space()
        return real(path, mode, **options)

    with monkeypatch.context() as patch:
        patch.setattr("csm_fast.report.metrics.open", full, raising=False)
        refused(
            train_args(tmp_path, max_steps=5),
            "run: metrics.jsonl could not be written: the disk is full",
            keep=tmp_path / "run/step-000002",
        )


@pytest.mark.slow
def test_a_file_size_limit(tmp_path):
    """The system call itself refusing, in a process of its own."""
    assert cli.main(train_args(prepare(tmp_path), max_steps=1)) == 0
    before = hash_files(tmp_path / "run" / "step-000001")
    limit = 300_000  # the model fits, the optimizer's state does not
    options = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))}
    child = start(train_args(tmp_path, max_steps=3), **options)
    said = child.communicate(timeout=60)[1]
    assert child.returncode == 2 and "Traceback" not in said, said
    last = said.strip().splitlines()[-1]
    assert last.startswith(f"error: {tmp_path / 'run'}: the checkpoint could not be saved, the earlier ones are intact")
    assert "a file-size limit was reached" in last and "run the same command again" in last
    assert hash_files(tmp_path / "run" / "step-000001") == before and not list((tmp_path / "run").glob(".step*"))
