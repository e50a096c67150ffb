"""benchmarks.step at the tiny shape: every system in its own process, the same losses, rows with all fields."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import step
from csm_fast import CSMConfig

ROOT = Path(__file__).resolve().parent.parent


def command(tmp_path, *extra):
    settings = ["--synthetic", "6", "--shape", "tiny", "--repeats", "1", "--batches", "3", *extra]
    return [sys.executable, "-m", "benchmarks.step", *settings, "--results", str(tmp_path / "step.jsonl")]


def test_a_race_of_three(tmp_path):
    done = subprocess.run(command(tmp_path), cwd=ROOT, capture_output=True, text=True, check=True)
    assert "at equal updates" in done.stdout and "freely packed" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "step.jsonl").read_text().splitlines()]
    assert [r["system"] for r in rows] == [
        "csm_fast, the same 3",
        "csm_fast, packs of 2,048 rows",
        "blog, buckets of 3",
        "transformers, buckets of 3",
    ]
    for row in rows:
        assert len(row["seconds"]) == 1 and row["median_s"] == row["seconds"][0] > 0
        assert row["recordings"] == 6 and row["rows"] > 100 and row["data"] == "synthetic"
        assert row["torch"] == torch.__version__ and row["commit"] is not None


def test_a_system_that_stops_is_told(tmp_path):
    done = subprocess.run(command(tmp_path, "--data", "nowhere", "--device", "cuda:99"), cwd=ROOT, capture_output=True)
    assert done.returncode == 1 and b"error: a system stopped" in done.stderr
    assert not (tmp_path / "step.jsonl").exists()


def test_all_systems_learn_the_same_from_the_same_frames(monkeypatch):
    """Equal updates are equal: losses of each batch agree, so the times are times of the same work."""
    losses = {}
    for system in ("csm_fast", "blog", "transformers"):
        settings = ["step", "--synthetic", "6", "--shape", "tiny", "--batches", "3", "--worker", system]
        monkeypatch.setattr(sys, "argv", settings)
        args = step.arguments()
        args.allocator = "plain"  # this process is not its own
        _, passes = step.prepare(args)
        losses[system] = next(iter(passes.values()))()
    assert len(losses["blog"]) == 2
    # Pure bf16 on the other side: two or three digits. transformers adds up both means with weight 1, not a half.
    assert losses["csm_fast"] == pytest.approx(losses["blog"], rel=1e-2)
    assert losses["csm_fast"] == pytest.approx([x / 2 for x in losses["transformers"]], rel=1e-2)


def test_synthetic_recordings_are_the_same_every_time():
    a, b = (step.Synthetic(20, CSMConfig.tiny()) for _ in range(2))
    assert (a.conversation_rows == b.conversation_rows).all()
    assert all((x[0].codes == y[0].codes).all() for x, y in zip(a.turns, b.turns, strict=True))
    assert a.conversation_rows.min() >= 16 and a.conversation_rows.max() <= 400
