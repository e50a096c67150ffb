"""benchmarks.optimizers at the tiny shape: every way makes its own update, of the bytes that it needs."""

import importlib.util
import json
import sys

import pytest
import torch
from model_cases import MICRO

from benchmarks import optimizers
from benchmarks.report import parts as report_parts
from csm_fast import CSM, CSMConfig
from csm_fast.config.shape import NAMED_SHAPES


@pytest.mark.slow
def test_rows_of_all_ways(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(optimizers, "keep_freed_memory", lambda: None)  # it is for the whole process
    monkeypatch.setitem(NAMED_SHAPES, "tiny", lambda: MICRO)
    file = tmp_path / "rows.jsonl"
    monkeypatch.setattr(sys, "argv", ["optimizers", "--shape", "tiny", "--repeats", "2", "--results", str(file)])
    assert optimizers.main() == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    there = importlib.util.find_spec("bitsandbytes") is not None
    ways = [way for way in optimizers.WAYS if there or way.bits == 32]
    assert [tuple(row["way"]) for row in rows] == [way.name for way in ways]
    assert len({tuple(row["way"]) for row in rows}) == len(rows)
    assert all(len(row["seconds"]) == 2 and row["median_s"] > 0 for row in rows)
    assert "small updates" in capsys.readouterr().out
    text = report_parts.write_optimizers(rows)
    assert len([line for line in text.splitlines() if line.startswith("| csm_fast")]) == 7 - 2 * (not there)
    assert report_parts.write_optimizers([]) == "Not measured.\n"


@pytest.mark.slow
@pytest.mark.parametrize("way", optimizers.WAYS, ids=lambda way: ", ".join(way.name))
def test_a_way_is_what_it_says(way):
    if way.bits == 8:
        pytest.importorskip("bitsandbytes")
    model = CSM(CSMConfig.tiny()).init_weights(0).to(way.weights)
    parameters = list(model.parameters())
    optimizer = optimizers.make_optimizer(way, model)
    for p in parameters:
        p.grad = torch.randn_like(p)
    before = [p.detach().clone() for p in parameters]
    optimizers.make_update(way, optimizer, parameters)()
    assert any(not torch.equal(p, q) for p, q in zip(parameters, before, strict=True))
    assert all(p.dtype == way.weights for p in parameters)
    state = optimizer.state[model.text_embeddings.weight]
    held = sum(x.nbytes for name, x in state.items() if torch.is_tensor(x) and "map" not in name and x.numel() > 1)
    if way.rounding == "kahan":
        held -= state["compensation"].nbytes
    assert held / model.text_embeddings.weight.numel() == pytest.approx(way.moment_bytes, rel=0.02)
    # All of it needed, where every row is read: gradients twice, weights and moments there and back.
    each = 2 * way.weights.itemsize + 2 * (way.weights.itemsize + way.moment_bytes + 2 * (way.rounding == "kahan"))
    total = sum(p.numel() for p in parameters)
    assert optimizers.needed_bytes(way, model, (1.0, 1.0)) == pytest.approx(each * total)
    tables = model.text_embeddings.weight.numel() + model.audio_embeddings.weight.numel()
    rest = optimizers.needed_bytes(way, model, (0.0, 0.0))
    assert rest == pytest.approx(each * (total - tables) + 2 * way.weights.itemsize * tables)
