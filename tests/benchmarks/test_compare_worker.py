"""A system of benchmarks.compare: its loss, its parts, its memory, and the recordings that it trains on."""

import dataclasses
import sys
import time

import numpy as np
import pytest
import torch

from benchmarks.common.tracked import Tracked
from benchmarks.compare import __main__ as compare
from benchmarks.compare import systems
from benchmarks.compare import table as compare_table
from benchmarks.compare import worker as compare_worker
from benchmarks.compare.data import choose_recordings, draw_recordings, fill_table_gradients, pad_conversations
from benchmarks.compare.reference import compute_reference, expected_loss
from csm_fast import CSM, CSMConfig
from csm_fast.config.shape import NAMED_SHAPES
from csm_fast.packing.pack import pack_padded


@pytest.fixture(autouse=True)
def small_tables(monkeypatch):
    """Most of the 77 million weights of the tiny shape are in its tables and heads."""
    small = dataclasses.replace(CSMConfig.tiny(), text_vocab_size=500, audio_vocab_size=131, num_codebooks=8)
    monkeypatch.setitem(NAMED_SHAPES, "tiny", lambda: small)


def running(monkeypatch, name, *extra):
    settings = ["compare", "--synthetic", "6", "--shape", "tiny", "--batches", "3", "--allocator", "plain"]
    monkeypatch.setattr(sys, "argv", [*settings, *extra, "--worker", name])
    return compare_worker.Running(compare.parse_arguments())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["csm_fast-autocast", "csm_fast-lora", "padded-autocast"])
def test_recipes_lie_within_their_tolerance(monkeypatch, name):
    if name == "csm_fast-lora":
        pytest.importorskip("peft")
    system = running(monkeypatch, name)
    truth = expected_loss(name, compute_reference(system.args))
    assert system.check() == pytest.approx(truth, rel=systems.tolerance(name))


@pytest.mark.slow
def test_another_loss_is_not_ranked(monkeypatch):
    system = running(monkeypatch, "padded-fp32")
    truth = expected_loss("padded-fp32", compute_reference(system.args))
    assert system.check() == pytest.approx(truth, rel=1e-5)
    with torch.no_grad():
        system.model.decoder.layers[0].sa_norm.scale[0] += 0.2
    assert abs(system.check() - truth) > 1e-5 * truth
    row, other = (
        {"median_s": 2.0, "seconds": [1.9, 2.0, 2.4], "ranked": False},
        {"median_s": 1.0, "seconds": [0.8, 1.0]},
    )
    assert compare_table.ratio(row, other) == "not ranked"
    assert compare_table.ratio({**row, "ranked": True}, other) == "2.00x (1.9-3.0)"


def test_a_process_of_another_set_up_as_ours(monkeypatch):
    kept = []
    monkeypatch.setattr(compare_worker, "keep_freed_memory", lambda: kept.append(True))
    for name, allocator, wanted in [
        ("csm_fast", "own", True),
        ("padded", "own", False),
        ("padded-kept", "own", True),
        ("padded", "kept", True),
        ("padded-kept", "plain", False),
    ]:
        system = running(monkeypatch, name, "--allocator", allocator)
        assert bool(kept) == wanted == systems.keeps_memory(system.args, name), (name, allocator)
        kept.clear()


@pytest.mark.parametrize("longest", [True, False])
def test_parts_of_a_slow_system(monkeypatch, longest):
    """Where a batch takes a constant and so much a row, every part tells the seconds of all."""
    system = running(monkeypatch, "padded-fp32", "--synthetic", "24")
    (label,) = system.passes
    now, ran = [0.0], []

    def backward(batch, seed):
        ran.append(system._laid_out(batch))
        now[0] += 0.5 + 0.01 * ran[-1]
        return torch.zeros(())

    monkeypatch.setattr(system, "backward", backward)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    rows = sorted((system._laid_out(batch) for batch in system.passes[label]), reverse=True)
    assert len(rows) == 8 and rows[0] > 2 * rows[-1]
    every = sum(0.5 + 0.01 * n for n in rows)
    assert [system.run_part(label, part, 3, longest) for part in range(3)] == pytest.approx([every] * 3)
    assert sorted(ran, reverse=True) == (rows if longest else rows[1:])
    ran.clear()
    pieces = [system.run_part(label, part, 2, longest, piece, 3) for part in range(2) for piece in range(3)]
    assert pieces == pytest.approx([0.0, 0.0, every] * 2) and not system.timed
    assert sorted(ran, reverse=True) == (rows if longest else rows[1:])
    ran.clear()
    assert system.run(label) == pytest.approx(every)
    whole, ran[:] = list(ran), []
    assert sum(system.run(label, 1.0, piece, 3) for piece in range(3)) == pytest.approx(every)
    assert ran == whole[::3] + whole[1::3] + whole[2::3]


def test_batches_of_about_the_same_length_are_no_line():
    assert compare_worker.extrapolate([100, 100], [1.0, 2.0], [200, 50]) == [3.0, 0.75]


@pytest.mark.slow
def test_memory_besides_weights_and_gradients(monkeypatch):
    system = running(monkeypatch, "padded-fp32")
    figures = system.memory("batches of 3")
    parameters = sum(p.numel() * 4 for p in system.model.parameters())
    assert figures["weights"] == figures["gradients"] == parameters
    assert figures["besides"] + parameters < figures["peak"] <= figures["besides"] + 2 * parameters
    batch = system.passes["batches of 3"][1]
    with Tracked() as tracked:
        system.backward(batch, 0)
    assert figures["peak"] == parameters + tracked.peak


def test_synthetic_recordings_are_the_same_every_time():
    a, b = (draw_recordings(20, CSMConfig.tiny()) for _ in range(2))
    assert (a.conversation_rows == b.conversation_rows).all()
    assert all((x[0].codes == y[0].codes).all() for x, y in zip(a.turns, b.turns, strict=True))
    assert a.conversation_rows.min() >= 16 and a.conversation_rows.max() <= 400


def test_a_share_of_the_recordings_keeps_their_lengths():
    store = draw_recordings(40, CSMConfig.tiny())
    rows = np.sort(store.conversation_rows)
    share = choose_recordings(store.conversation_rows, 0.25, None)
    assert sorted(store.conversation_rows[share]) == rows[::4].tolist()
    middle = store.choose(choose_recordings(store.conversation_rows, 1.0, 4))
    assert middle.rows == rows[18:22].sum() and middle.frames < middle.rows


def test_every_token_has_a_gradient():
    config = CSMConfig.tiny()
    model = CSM(config).init_weights(0)
    recordings = draw_recordings(3, config)
    fill_table_gradients(model, [pack_padded(*pad_conversations(recordings, [0, 1, 2]), fraction=1.0)])
    turns = [turn for i in range(3) for turn in recordings.conversation(i)]
    text = np.unique(np.concatenate([turn.text for turn in turns]))
    books = np.arange(config.num_codebooks) * config.audio_vocab_size
    codes = np.unique(np.concatenate([*((turn.codes.astype(int) + books).ravel() for turn in turns), books]))
    for table, rows in ((model.text_embeddings.weight, text), (model.audio_embeddings.weight, codes)):
        assert table.grad.any(1).nonzero().flatten().tolist() == rows.tolist()
    model.text_embeddings.weight.requires_grad_(False)
    fill_table_gradients(model, [])
    assert model.text_embeddings.weight.grad is None and not model.audio_embeddings.weight.grad.any()
