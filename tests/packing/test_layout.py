"""Steps that are laid out together are the steps; what cannot be read concerns its own step alone."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from model_cases import MemoryStore
from train_cases import CODEC, TOKENIZER, conversations_of, write_store

from csm_fast import InputError
from csm_fast.config.train import DataSection, LossSection
from csm_fast.data.store_writer import TokenStoreWriter
from csm_fast.data.token_store import TokenStore
from csm_fast.packing import loader
from csm_fast.packing.draws import GAMMA, Purpose, make_step_keys, select_lowest, splitmix
from csm_fast.packing.fit import MAX_POSITIONS, padded_rows
from csm_fast.packing.loader import Packer, read_ahead

CASES = {
    "packs": {"batch_rows": 128, "pack_rows": 128},
    "several packs": {"batch_rows": 256, "pack_rows": 128},
    "conversations": {"batch_size": 3, "pack_rows": 4096},
    "conversations in packs": {"batch_size": 2, "gradient_accumulation": 2, "pack_rows": 64},
    "masked": {"batch_rows": 128, "pack_rows": 128, "mask_speaker_ids": [1]},
    "last turns": {"batch_size": 4, "supervise": "last"},
}


@pytest.fixture
def path(tmp_path) -> Path:
    return write_store(tmp_path / "train", conversations_of(60, seed=3))


def fields(step):
    """Everything about a step, to compare."""
    return (
        (step.epoch, step.index, step.conversations, step.supervised, step.selected),
        [(p.rows, p.frames, p.segments.lengths, p.segments.max_seqlen) for p in step.packs],
    )


def tensors(step):
    return [x for p in step.packs for x in (*p, p.segments.cu_seqlens) if isinstance(x, torch.Tensor)]


def assert_same(ours, theirs):
    assert fields(ours) == fields(theirs)
    for a, b in zip(tensors(ours), tensors(theirs), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("pad", ["", "cpu"])
def test_blocks_hold_the_steps_one_by_one(path, name, pad, monkeypatch):
    monkeypatch.setattr(loader, "BLOCK_ROWS", 700)
    loss = LossSection(eos_weight=2.5, amortization_fraction=0.25)
    packer = Packer(TokenStore.open(path), DataSection(**CASES[name]), loss, pad=pad)
    count = packer.steps_in_epoch(0)
    blocks = list(packer.blocks(0, 1, count + 2))
    sizes = [len(block) for block in blocks]
    assert sizes[0] == 1 and sizes[1] <= 2 and max(sizes) > 1 and sum(sizes) == count + 2
    steps = [step for block in blocks for step in block]
    places = [(0, i) for i in range(1, count)] + [(1, i) for i in range(3)]
    assert [(s.epoch, s.index) for s in steps] == places
    for step, place in zip(steps, places, strict=True):
        assert_same(step, packer.step(*place))
    assert [(s.epoch, s.index) for s in read_ahead(packer.blocks(0, 1, 4))] == places[:4]


def test_a_store_that_reads_conversations_gives_the_same_steps(path):
    store = TokenStore.open(path)
    slow = MemoryStore([store.conversation(i) for i in range(len(store))], store.num_codebooks)
    ours, theirs = (Packer(s, DataSection(batch_size=7), LossSection()) for s in (store, slow))
    for index in range(ours.steps_in_epoch(0)):
        assert_same(ours.step(0, index), theirs.step(0, index))


def frame_weights(step, loss):
    """Of the supervised frames, from the packs' own tokens."""
    rows = [pack.tokens[row] for pack in step.packs for row in pack.target_rows.tolist()]
    return np.array([1.0 if row.any() else loss.eos_weight for row in rows])


@pytest.mark.parametrize("name", ["several packs", "masked", "last turns"])
def test_weights_and_draws_by_their_definition(path, name):
    loss = LossSection(eos_weight=3.0, amortization_fraction=0.3)
    packer = Packer(TokenStore.open(path), DataSection(**CASES[name]), loss)
    seen = 0
    for step in itertools.chain.from_iterable(packer.blocks(0, 0, packer.steps_in_epoch(0))):
        weights = frame_weights(step, loss)
        seen += len(weights)
        assert step.supervised == len(weights)
        ours = torch.cat([p.target_weights for p in step.packs]).numpy()
        np.testing.assert_allclose(ours, weights / max(weights.sum(), 1e-300), rtol=1e-12)
        assert step.selected == sum(len(p.decoder_index) for p in step.packs)
        assert step.selected == min(len(weights), max(1, int(len(weights) * 0.3)))
        bounds = np.cumsum([0, *(len(p.target_rows) for p in step.packs)])
        picked = np.concatenate([b + p.decoder_index.numpy() for b, p in zip(bounds, step.packs, strict=False)])
        assert len(np.unique(picked)) == step.selected
        chosen = torch.cat([p.decoder_weights for p in step.packs]).numpy()
        np.testing.assert_allclose(chosen, weights[picked] / max(weights[picked].sum(), 1e-300), rtol=1e-12)
        # The draw goes over the step's frames in the order of the conversations' ids.
        if len(step.packs) == 1:
            documents = sorted(
                packer.layout_steps(0, step.index).list_documents()[0], key=lambda d: (d.rows, d.conversation, d.first)
            )
            owner = np.repeat(np.arange(len(documents)), [d.rows for d in documents])
            of = owner[step.packs[0].target_rows.numpy()]
            ids = np.array([(d.conversation, d.first) for d in documents])[of]
            canonical = np.lexsort((np.arange(len(of)), ids[:, 1], ids[:, 0]))
            numbers = make_step_keys(0, Purpose.FRAMES, 0)(np.array([step.index]), np.array([len(of)]))
            drawn = np.argsort(numbers)[: step.selected]
            np.testing.assert_array_equal(np.sort(canonical[drawn]), picked)
    assert seen > 100


def test_a_step_without_a_supervised_frame(tmp_path):
    path = write_store(tmp_path / "train", conversations_of(6, seed=3))
    store = TokenStore.open(path)
    speaker = store.conversation(0)[0].speaker
    packer = Packer(store, DataSection(batch_size=1, mask_speaker_ids=[speaker]), LossSection())
    steps = [s for block in packer.blocks(0, 0, 6) for s in block]
    quiet = [s for s in steps if not s.supervised]
    assert quiet and all(s.selected == 0 and len(s.packs[0].decoder_index) == 0 for s in quiet)
    assert all(len(s.packs[0].target_weights) == 0 and s.packs[0].rows > 0 for s in quiet)


def test_what_cannot_be_read_concerns_its_own_step(path):
    store = TokenStore.open(path)
    packer = Packer(store, DataSection(batch_size=2), LossSection())
    broken = packer.step(0, 9).conversations[0]
    read, first = store.read_turns, int(store._turn_starts[broken])

    def refusing(firsts, lasts):
        if first in list(firsts):
            raise InputError("is damaged", file="shard")
        return read(firsts, lasts)

    store.read_turns = refusing
    steps = read_ahead(packer.blocks(0, 0))
    assert [next(steps).index for _ in range(9)] == list(range(9))
    with pytest.raises(InputError, match="is damaged"):
        next(steps)


def test_what_is_read_the_second_time_disturbs_nobody(path):
    store = TokenStore.open(path)
    packer = Packer(store, DataSection(batch_size=2), LossSection())
    read, asked = store.read_turns, []

    def sometimes(firsts, lasts):
        asked.append(len(firsts))
        if len(firsts) > 4:
            raise OSError("too much at once")
        return read(firsts, lasts)

    store.read_turns = sometimes
    count = packer.steps_in_epoch(0)
    assert [s.index for s in read_ahead(packer.blocks(0, 0, count))] == list(range(count)) and max(asked) > 4
    with pytest.raises(IndexError, match=f"step {count} of {count}"):
        next(packer.blocks(0, count))


def test_turns_are_read_end_to_end_and_checked(tmp_path):
    with TokenStoreWriter(
        tmp_path / "train", codec=CODEC, text_tokenizer=TOKENIZER, resampler="none", shard_frames=60
    ) as writer:
        for conversation in conversations_of(30, seed=5):
            writer.add_conversation(conversation)
    store = TokenStore.open(tmp_path / "train")
    assert len(list((tmp_path / "train").glob("*.safetensors"))) > 2
    chosen = [29, 0, 17, 17]
    starts = store._turn_starts
    text, codes = store.read_turns(starts[chosen].tolist(), (starts[np.array(chosen) + 1]).tolist())
    turns = [t for c in chosen for t in store.conversation(c)]
    np.testing.assert_array_equal(text, np.concatenate([t.text for t in turns]))
    np.testing.assert_array_equal(codes, np.concatenate([t.codes for t in turns]))
    assert store.read_turns([], [])[1].shape == (0, store.num_codebooks)
    for wrong in (([-3], [-2]), ([0], [store.num_turns + 1]), ([-1], [0])):
        with pytest.raises(IndexError, match=f"of {store.num_turns}"):
            store.read_turns(*wrong)
    highest = {c: max(int(t.codes.max()) for t in store.conversation(c)) for c in chosen}
    store.codebook_size = max(highest.values())  # as if the file held a code too many
    bad = next(c for c in chosen if highest[c] == store.codebook_size)
    with pytest.raises(InputError, match=f"conversation {bad} has code {store.codebook_size} of {store.codebook_size}"):
        store.read_turns(starts[chosen].tolist(), (starts[np.array(chosen) + 1]).tolist())


def test_a_padded_pack_longer_than_the_context_wraps_its_positions():
    packer = Packer(MemoryStore(conversations_of(1, seed=1)), DataSection(pack_rows=8192), LossSection())
    packer._pad = lambda rows: 8192
    (pack,) = packer.step(0, 0).packs
    assert len(pack.tokens) == 8192 and pack.segments.lengths == (pack.rows, 8192 - pack.rows)
    assert int(pack.positions.max()) == MAX_POSITIONS - 1
    assert pack.segments.cu_seqlens.tolist() == [0, pack.rows, 8192]


def test_numbered_draws_are_functions_of_their_place_and_number():
    draws = make_step_keys(7, Purpose.FRAMES, 3)
    numbers, counts = np.array([0, 1, 2, 500_000]), np.array([5, 0, 1000, 17])
    together = np.split(draws(numbers, counts), np.cumsum(counts)[:-1])
    assert len(np.unique(np.concatenate(together))) == counts.sum()
    for number, count, some in zip(numbers, counts, together, strict=True):
        alone = make_step_keys(7, Purpose.FRAMES, 3)(np.array([number]), np.array([count + 3]))
        np.testing.assert_array_equal(alone[:count], some)
    for place in ((8, Purpose.FRAMES, 3), (7, Purpose.FRAMES, 4), (7, 3, 3)):
        assert not np.isin(make_step_keys(*place)(numbers, counts), np.concatenate(together)).any()


def test_numbered_draws_are_splitmix64():
    # The first outputs for the seed 1234567, as the reference implementation by Vigna (public domain) gives them.
    states = np.uint64(1234567) + np.arange(1, 6, dtype=np.uint64) * GAMMA
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert splitmix(states).tolist() == expected


def test_every_frame_is_drawn_as_often_alone_and_in_pairs():
    steps, many, wanted = 20_000, 48, 3
    counts = np.full(steps, many)
    keys = make_step_keys(1, Purpose.FRAMES, 0)(np.arange(steps), counts)
    picked = (
        select_lowest(keys, counts, np.full(steps, wanted)).reshape(steps, wanted) - np.arange(steps)[:, None] * many
    )
    drawn = np.zeros((steps, many))
    np.put_along_axis(drawn, picked, 1.0, 1)
    assert (drawn.sum(1) == wanted).all()
    # Counts of frames, of pairs in a step and of frames in steps that follow each other, in standard deviations.
    share, pair = wanted / many, wanted * (wanted - 1) / (many * (many - 1))
    pairs, follow = drawn.T @ drawn, drawn[:-1].T @ drawn[1:]
    for got, chance, trials in (
        (drawn.sum(0), share, steps),
        (pairs[np.triu_indices(many, 1)], pair, steps),
        (follow.ravel(), share * share, steps - 1),
    ):
        off = (got - trials * chance) / np.sqrt(trials * chance * (1 - chance))
        assert np.abs(off).max() < 5 and 0.8 < off.std() < 1.2


@pytest.mark.parametrize("uniform", [True, False])
def test_lowest_is_a_sort_of_each_run(uniform):
    rng = np.random.default_rng(0)
    counts = np.array([0, 1, 1, 16, 17, 1000, 0, 5000, 64])
    wanted = np.array([0, 1, 0, 1, 17, 62, 0, 312, 40])
    # Large keys only, as no draw would give them, leave too few below the bound; equal keys are taken in order.
    least = 0 if uniform else (1 << 64) - (1 << 30)
    keys = rng.integers(least, 1 << 64, counts.sum(), dtype=np.uint64)
    expected, begin = [], 0
    for count, some in zip(counts, wanted, strict=True):
        order = np.argsort(keys[begin : begin + count] >> np.uint64(24), kind="stable")
        expected += (begin + order[:some]).tolist()
        begin += count
    assert select_lowest(keys, counts, wanted).tolist() == expected


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("budget", [100, 2048, 16384])
def test_sizes_of_packs_as_counted_up(device, budget):
    multiple, share = {"cuda": (64, 0.12), "cpu": (16, 0.03)}[device]
    for rows in {1, 16, 17, 63, 64, 65, 99, 100, 1000, 2047, 2048, 9999, 16384}:
        size = multiple
        while size < rows:
            size += max(multiple, int(size * share) // multiple * multiple)
        assert padded_rows(rows, budget, device) == max(rows, min(size, budget))
        assert padded_rows(rows, budget, "") == rows
