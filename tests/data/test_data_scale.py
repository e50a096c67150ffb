"""The data path at scale: what is not read, not mapped, not kept and not made twice."""

import gc
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from paths import ROOT

from benchmarks.data_path import __main__ as data_path
from benchmarks.data_path import synthetic_store
from csm_fast import InputError
from csm_fast.config.train import DataSection, LossSection
from csm_fast.data.token_store import TokenStore
from csm_fast.packing import loader
from csm_fast.packing.loader import Packer, prefetch
from csm_fast.system.arrays import map_arrays

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux' /proc")


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Small and big: a few dozen and a few thousand turns."""
    folder = tmp_path_factory.mktemp("stores")
    for name, hours in (("small", 0.1), ("big", 8.0)):
        synthetic_store.write_store(folder / name, hours)
    return {name: folder / name for name in ("small", "big")}


def mapped_bytes(path: Path) -> int:
    """Bytes of a file that this process has in its page table."""
    inside, found = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = line.endswith(os.fspath(path))
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


@linux
def test_opening_and_streaming_map_no_codes(stores):
    store = TokenStore.open(stores["big"])
    assert store.num_turns > 2000
    (path, arrays), *others = store.shard_arrays()
    codes = arrays["codes"].nbytes
    assert not others and not arrays["codes"].flags.owndata and codes > 20e6
    packer = Packer(store, DataSection(batch_rows=16384, pack_rows=16384), LossSection())
    assert mapped_bytes(path) < codes / 10
    for index in range(packer.steps_in_epoch(0)):
        packer.step(0, index)
    assert mapped_bytes(path) < codes / 10
    arrays["codes"].max()  # the measure sees what is mapped
    assert mapped_bytes(path) > codes


@pytest.mark.parametrize("name", ["small", "big"])
@pytest.mark.parametrize("section", [{"batch_rows": 4096, "pack_rows": 2048}, {"batch_size": 24, "pack_rows": 2048}])
def test_batches_hold_what_the_store_holds_whatever_its_size(stores, name, section):
    store = TokenStore.open(stores[name])
    packer = Packer(store, DataSection(**section), LossSection(), pad="cpu")
    seen, rows, padded, supervised = [], 0, 0, 0
    for index in range(packer.steps_in_epoch(0)):
        layout, step = packer.layout_steps(0, index).list_documents(), packer.step(0, index)
        assert sum(float(p.target_weights.sum()) for p in step.packs) == pytest.approx(1)
        assert sum(float(p.decoder_weights.sum()) for p in step.packs) == pytest.approx(1)
        assert step.selected == max(1, step.supervised // 16)
        for documents, pack in zip(layout, step.packs, strict=True):
            assert pack.rows <= len(pack.tokens) <= 2048 and sum(pack.segments.lengths) == len(pack.tokens)
            expected = []
            for d in sorted(documents, key=lambda d: (d.rows, d.conversation, d.first)):
                for turn in store.conversation(d.conversation)[d.first : d.last]:
                    block = np.zeros((len(turn.text) + len(turn.codes) + 1, 33), dtype=np.int32)
                    block[: len(turn.text), 32] = turn.text
                    block[len(turn.text) : -1, :32] = turn.codes
                    expected.append(block)
                seen.append((d.conversation, d.first, d.last))
            np.testing.assert_array_equal(pack.tokens[: pack.rows], np.concatenate(expected))
        rows, padded, supervised = rows + step.rows, padded + step.padded_rows, supervised + step.supervised
    assert sorted({c for c, _, _ in seen}) == list(range(len(store))) and len(seen) == len(set(seen))
    assert sum(last - first for _, first, last in seen) == store.num_turns
    assert rows == store.conversation_rows.sum() and supervised == store.num_frames + store.num_turns
    assert 1 <= padded / rows < 1.1


class ManyLengths:
    """A store of which only the lengths are asked for."""

    num_codebooks, path = 32, "lengths"

    def __init__(self, count: int):
        rng = np.random.default_rng(0)
        self.num_conversations = count
        self.lengths = (rng.integers(10, 50, count), rng.integers(13, 250, count), np.zeros(count, int))

    def turn_lengths(self):
        return *self.lengths, np.arange(self.num_conversations)


@pytest.mark.slow
def test_a_packer_and_its_plans_take_a_hundred_bytes_per_conversation():
    """1,000 hours are 350,000 turns: 100 bytes each are 35 MB."""
    store, count = ManyLengths(30_000), 30_000
    tracemalloc.start()
    try:
        packer = Packer(store, DataSection(batch_rows=2048, pack_rows=2048), LossSection())
        steps = [packer.steps_in_epoch(epoch) for epoch in range(5)]
        gc.collect()
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(set(steps)) <= 3 and min(steps) > 1000
    assert kept < 100 * count


@pytest.mark.parametrize("section", [{"batch_rows": 2048, "pack_rows": 2048}, {"batch_size": 8}])
def test_an_epoch_is_planned_once_for_all_its_steps(stores, monkeypatch, section):
    drawn, draw = [], loader.seeded_generator
    monkeypatch.setattr(loader, "seeded_generator", lambda seed, *where: drawn.append(where) or draw(seed, *where))
    packer = Packer(TokenStore.open(stores["small"]), DataSection(**section), LossSection())
    for epoch in range(2):
        for index in range(packer.steps_in_epoch(epoch)):
            packer.step(epoch, index)
            packer.layout_steps(0, 0)  # as a checkpoint's probe does
    assert drawn.count((loader.Purpose.ORDER, 0)) == drawn.count((loader.Purpose.ORDER, 1)) == 1
    with pytest.raises(IndexError):
        Packer(packer.store, DataSection(batch_rows=2048), LossSection()).layout_steps(0, 10**6)


@pytest.mark.slow
def test_streaming_keeps_nothing(stores):
    packer = Packer(TokenStore.open(stores["big"]), DataSection(batch_rows=4096, pack_rows=4096), LossSection())
    batches = prefetch(packer.step(e, i) for e in range(3) for i in range(packer.steps_in_epoch(e)))
    kept = []
    tracemalloc.start()
    try:
        for number, batch in enumerate(batches):
            largest = batch.packs[0].tokens.numpy().nbytes
            if number in (10, 100, 190):
                gc.collect()
                kept.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert number > 190 and len(kept) == 3
    # Two steps wait, and one is being made; 90 steps would be 90 times their tokens.
    assert max(kept) < 20 * largest and kept[2] - kept[1] < 8 * largest


@pytest.mark.slow
@linux
def test_rows_are_read_without_a_mapping(stores, monkeypatch, tmp_path):
    (shard,) = stores["small"].glob("*.safetensors")
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(shard.read_bytes())
    gc.collect()  # what others left open is closed now, not below
    before = len(os.listdir("/proc/self/fd"))
    arrays = map_arrays(copy, keep_open=True)
    assert len(os.listdir("/proc/self/fd")) > before
    for name, array in arrays.items():
        rows = np.empty_like(array[3:11])
        arrays.read_into(rows, name, 3)
        np.testing.assert_array_equal(rows, array[3:11])
    read, offset = np.empty((2, 32), np.uint16), arrays.offsets["codes"]
    arrays.read_into(read[:0], "codes", 5)
    os.truncate(copy, offset + 64)
    with pytest.raises(InputError, match="cut off"):
        arrays.read_into(read, "codes", 0)
    del arrays, array
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
    monkeypatch.delattr(os, "preadv")  # as on Windows
    mapped = map_arrays(shard, keep_open=True)
    mapped.read_into(read, "codes", 3)
    np.testing.assert_array_equal(read, mapped["codes"][3:5])


@pytest.mark.slow
@linux
def test_the_benchmark_says_where_its_figures_come_from(tmp_path):
    command = [sys.executable, "-m", "benchmarks.data_path", "--hours", "0.05", "--pack-rows", "2048"]
    command += ["--parts", "stream"]
    command += ["--seconds", "0.01", "--repeats", "1", "--dir", tmp_path / "stores", "--results", tmp_path / "r.jsonl"]
    command += ["--step-rows-per-second", "5000"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "5,000 rows/s (--step-rows-per-second)" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [(r["kind"], r["by"], r["hours"], r["pack_rows"]) for r in rows] == [
        ("stream", "rows", 0.05, 2048),
        ("stream", "conversations", 0.05, 2048),
    ]
    for row in rows:
        assert row["stores"] in ("memory", "disk") and row["streamed_steps"] >= 50
        assert row["us_per_row"] > 0 and row["cpu_us_per_row"] > 0
        assert row["loader_share"] == pytest.approx(row["us_per_row"] * 5000e-6)
        assert 0.05 * 45_000 <= row["frames"] < 0.08 * 45_000 and row["commit"] is not None
    assert not list((tmp_path / "stores").iterdir())  # what it wrote is gone


def test_every_hour_of_a_synthetic_store_holds_the_same_conversations():
    def lengths(hours):
        return [sorted(len(t.codes) for t in c) for c in synthetic_store.draw_conversations(hours)]

    one, two = lengths(1.0), lengths(2.0)
    assert sorted(one * 2) == sorted(two) and sum(map(sum, one)) == synthetic_store.FRAMES_PER_HOUR
    assert two[: len(one)] != one and min(map(len, one)) == 1 and max(map(len, one)) > 3


def test_the_time_of_a_row_is_that_of_turns_which_nobody_disturbed():
    turns = data_path.Turns()
    for number, seconds in enumerate((1.0, 1.2, 1.1, 9.0, 0.9)):
        turns.add(seconds / 2, data_path.TURN_ROWS // 2)
        assert len(turns.ended) == number
        turns.add(seconds / 2, data_path.TURN_ROWS // 2)
        assert len(turns.ended) == number + 1
    turns.add(100.0, 1)  # a turn that is not over
    us, left_out = turns.us_per_row()
    assert left_out == 1 and us == pytest.approx(1e6 * 4.2 / (4 * data_path.TURN_ROWS))


def test_a_store_that_does_not_fit_is_refused_beforehand(tmp_path):
    with pytest.raises(InputError, match="hours need .* are free; choose another --dir"):
        synthetic_store.write_store(tmp_path / "huge", 1e9)
    assert not list(tmp_path.iterdir())
