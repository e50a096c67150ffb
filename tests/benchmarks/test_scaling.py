"""benchmarks.scaling: packs are what the axes say, exponents are slopes, memory adds up."""

import json
import subprocess
import sys

import pytest
import torch
from paths import ROOT

from benchmarks import scaling
from csm_fast import CSMConfig


def test_exponent_is_the_slope():
    values = [1.0, 2.0, 4.0, 8.0]
    assert scaling.fit_exponent(values, [3 * v**1.5 for v in values]) == pytest.approx(1.5)


@pytest.mark.parametrize("mix", scaling.MIXES)
def test_packs_hold_the_rows_and_frames_of_their_point(mix):
    config = CSMConfig.tiny()
    pack = scaling.make_pack(config, scaling.Point(rows=700, mix=mix, fraction=0.25))
    assert 699 <= pack.rows <= 700
    documents = pack.segments.lengths[:-1] if pack.tokens.shape[0] > pack.rows else pack.segments.lengths
    longest = sum(text + audio for text, audio in scaling.MIXES[mix])
    assert max(documents) == min(700, longest)
    assert len(pack.decoder_index) == len(pack.target_rows) // 4


def test_memory_adds_up_and_its_parts_are_named():
    case = scaling.Case("tiny", scaling.Point(rows=128), torch.device("cpu"), False)
    memory = case.memory()
    parts = {name: size for name, size in memory.items() if name != "besides"}
    assert sum(parts.values()) == memory["besides"]
    assert parts.keys() <= {"embedding sum", "backbone", "depth decoder", "heads and loss", "backward pass"}
    assert parts["backbone"] > 128 * case.model.config.backbone.embed_dim * 2


@pytest.mark.slow
def test_a_run_records_every_point(tmp_path):
    out = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "benchmarks.scaling", "--shape", "tiny", "--repeats", "1", "--axes", "rows"]
    done = subprocess.run(
        [*command, "--rows", "64", "128", "--results", str(out)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["value"] for row in rows] == [64, 128] and all(row["median_s"] > 0 for row in rows)
    assert rows[0]["exponent"] == rows[1]["exponent"] and "time ~ rows^" in done.stdout
