"""Plans and packs: pure functions, no padding, nothing cut."""

import bisect
import itertools
import threading
import time

import numpy as np
import pytest
import torch
from model_cases import MemoryStore, padded, random_conversations
from paths import GOLDEN
from train_cases import conversations_of, write_store

from csm_fast import InputError
from csm_fast.config.shape import TransformerConfig
from csm_fast.config.train import DataSection, LossSection
from csm_fast.data.token_store import TokenStore
from csm_fast.model.layer import Attention
from csm_fast.model.rope import apply_rope, rope_table
from csm_fast.model.stacks import packed_attention
from csm_fast.ops import plan_segments
from csm_fast.packing.fit import best_fit, padded_rows, split_documents
from csm_fast.packing.loader import Packer, prefetch
from csm_fast.packing.pack import Segments, pack_padded

LENGTHS = np.loadtxt(GOLDEN / "clip_rows.txt", dtype=int)  # of a real corpus, in rows


class LengthsOnly:
    """A store of one-turn conversations that nobody reads."""

    num_codebooks, path = 4, "lengths"

    def __init__(self, rows):
        self.rows, self.num_conversations = np.asarray(rows), len(rows)

    def turn_lengths(self):
        n = len(self.rows)
        return np.full(n, 5), self.rows - 6, np.zeros(n, dtype=int), np.arange(n)


def best_fit_groups(sizes, budget):
    """best_fit as lists of indices."""
    order, counts = best_fit(np.asarray(sizes, dtype=np.int64), budget)
    return [group.tolist() for group in np.split(order, np.cumsum(counts)[:-1])] if len(counts) else []


def test_best_fit_holds_everything_once_within_the_budget():
    rng = np.random.default_rng(0)
    for _ in range(50):
        sizes = rng.integers(1, 100, rng.integers(1, 200)).tolist()
        groups = best_fit_groups(sizes, 100)
        assert sorted(i for g in groups for i in g) == list(range(len(sizes)))
        assert all(sum(sizes[i] for i in g) <= 100 for g in groups)
        # Best-fit decreasing needs at most 11/9 of the best plus one.
        assert len(groups) <= 11 / 9 * -(-sum(sizes) // 100) + 1 + sum(s > 50 for s in sizes)
    with pytest.raises(ValueError, match="101 rows cannot fit"):
        best_fit(np.array([101]), 100)


def best_fit_by_the_book(sizes, budget):
    groups, room = [], []
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        place = bisect.bisect_left(room, (sizes[item], -1))
        free, group = room.pop(place) if place < len(room) else (budget, len(groups))
        if group == len(groups):
            groups.append([])
        groups[group].append(item)
        bisect.insort(room, (free - sizes[item], group))
    return groups


def test_best_fit_is_the_one_by_the_book():
    rng = np.random.default_rng(0)
    for n in [0, 1, 2, 3, 4, 7, 8, *rng.integers(1, 600, 60).tolist()]:
        budget = int(rng.integers(20, 5000))
        sizes = rng.integers(1, int(rng.integers(1, budget + 1)) + 1, n).tolist()
        assert best_fit_groups(sizes, budget) == best_fit_by_the_book(sizes, budget)


@pytest.mark.parametrize("share", [1.0, 0.9, 0.5])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_real_corpus_wastes_under_two_percent(share, seed):
    """Any split, 10 epochs, 2,048-row packs; what is left at an epoch's end does not count."""
    rng = np.random.default_rng(seed)
    lengths = rng.permutation(LENGTHS)[: int(share * len(LENGTHS))]
    packer = Packer(LengthsOnly(lengths), DataSection(batch_rows=2048, pack_rows=2048, seed=seed), LossSection())
    for epoch in range(10):
        steps = [packer.layout_steps(epoch, i).list_documents() for i in range(packer.steps_in_epoch(epoch))]
        packs = [p for step in steps for p in step]
        assert sorted(d.conversation for p in packs for d in p) == list(range(len(lengths)))
        rows = sorted(sum(d.rows for d in p) for p in packs)
        assert max(rows) <= 2048
        wasted = 1 - sum(rows[1:]) / (2048 * (len(rows) - 1))
        assert wasted < 0.02, f"epoch {epoch}: {100 * wasted:.2f} %"


def test_windows_hold_back_what_is_not_full():
    lengths = np.random.default_rng(0).integers(20, 400, 3000)
    packer = Packer(LengthsOnly(lengths), DataSection(batch_rows=4096, pack_rows=2048, pack_window=300), LossSection())
    packs = [p for i in range(packer.steps_in_epoch(0)) for p in packer.layout_steps(0, i).list_documents()]
    assert sorted(d.conversation for p in packs for d in p) == list(range(3000))
    rows = sorted(sum(d.rows for d in p) for p in packs)
    assert 1 - sum(rows[1:]) / (2048 * (len(rows) - 1)) < 0.02
    assert len(packer.layout_steps(0, 0).packs) == 2


def test_plans_are_functions_of_seed_and_epoch_and_a_step_does_not_know_its_packs():
    store = MemoryStore(random_conversations([[(4, 9, 0)], [(3, 5, 1), (2, 7, 0)], [(6, 20, 0)], [(1, 3, 1)]] * 3))

    def steps(seed, pack_rows, epoch=1):
        packer = Packer(store, DataSection(batch_size=5, pack_rows=pack_rows, seed=seed), LossSection())
        return [packer.step(epoch, i) for i in range(packer.steps_in_epoch(epoch))]

    def picked(step):
        """The frames that the depth decoder sees, by content."""
        return sorted(
            tuple(p.tokens[int(p.target_rows[i])].tolist()) for p in step.packs for i in p.decoder_index.tolist()
        )

    wide, narrow, again, other = steps(0, 4096), steps(0, 32), steps(0, 32), steps(1, 32)
    assert [len(s.packs) for s in wide] == [1, 1, 1] and max(len(s.packs) for s in narrow) > 1
    for a, b, c in zip(wide, narrow, again, strict=True):
        assert a.conversations == b.conversations and picked(a) == picked(b)
        assert all(torch.equal(x.tokens, y.tokens) for x, y in zip(b.packs, c.packs, strict=True))
        for step in (a, b):
            assert sum(float(p.target_weights.sum()) for p in step.packs) == pytest.approx(1)
            assert sum(float(p.decoder_weights.sum()) for p in step.packs) == pytest.approx(1)
    assert [s.conversations for s in narrow] != [s.conversations for s in other]
    # Each step stands alone: asking out of order changes nothing.
    packer = Packer(store, DataSection(batch_size=5, pack_rows=32), LossSection())
    assert torch.equal(packer.step(1, 2).packs[0].tokens, narrow[2].packs[0].tokens)


def test_layout_of_a_pack():
    conversation = [(2, 3, 0), (1, 1, 7)]
    store = MemoryStore(random_conversations([conversation]))
    packer = Packer(
        store, DataSection(mask_speaker_ids=[7]), LossSection(eos_weight=3.0, amortization_fraction=1.0), pad="cuda"
    )
    (pack,) = packer.step(0, 0).packs
    assert pack.tokens.shape == (64, 7) and pack.rows == 9 and pack.frames == 4
    assert pack.segments.lengths == (9, 55) and pack.segments.cu_seqlens.tolist() == [0, 9, 64]
    assert pack.is_audio[:9].tolist() == [False] * 2 + [True] * 4 + [False] + [True] * 2
    assert not pack.is_audio[9:].any() and not pack.tokens[9:].any()
    assert pack.positions.tolist() == [*range(9), *range(55)]
    assert pack.target_rows.tolist() == [2, 3, 4, 5]  # the masked turn is context
    assert not pack.tokens[5].any()  # EOS
    assert pack.target_weights.tolist() == pytest.approx([1 / 6, 1 / 6, 1 / 6, 3 / 6])
    assert sorted(pack.decoder_index.tolist()) == [0, 1, 2, 3]


def test_conversations_split_at_turn_ends_only():
    parts = split_documents(3, [10, 10, 10, 5], 20)
    assert [(d.first, d.last, d.rows) for d in parts] == [(0, 2, 20), (2, 4, 15)]
    with pytest.raises(InputError, match="conversation 3, turn 2 has 30 rows; a pack here holds 20.*--pack-rows"):
        split_documents(3, [10, 30], 20)
    with pytest.raises(InputError, match="cut the recording"):
        split_documents(3, [10, 3000], 2048)


def test_ladder_of_pack_sizes():
    sizes = sorted({padded_rows(n, 4096) for n in range(1, 4097)})
    assert len(sizes) < 45 and sizes[-1] == 4096
    assert all(size % 64 == 0 for size in sizes)
    assert all(b - a <= max(64, 0.12 * a) for a, b in itertools.pairwise(sizes))
    assert all(padded_rows(n, 4096) >= n for n in range(1, 4097))


def test_prefetch_keeps_order_passes_errors_and_stops():
    assert list(prefetch(iter(range(20)))) == list(range(20))

    def broken():
        yield 1
        raise InputError("bad shard")

    steps = prefetch(broken())
    assert next(steps) == 1
    with pytest.raises(InputError, match="bad shard"):
        next(steps)
    taken = []

    def endless():
        for i in itertools.count():
            taken.append(i)
            yield i

    steps = prefetch(endless())
    next(steps)
    steps.close()
    count = len(taken)
    time.sleep(0.05)
    assert len(taken) == count <= 5


@pytest.mark.slow
def test_prefetch_ends_though_reading_hangs():
    hanging = threading.Event()

    def stuck():
        yield 1
        hanging.wait()

    steps = prefetch(stuck())
    assert next(steps) == 1
    steps.close()
    hanging.set()


@pytest.mark.parametrize("lengths", [(5,), (3, 3, 3), (1, 40, 7, 8, 1, 2, 100)])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
def test_packed_attention_is_attention_within_each_segment(lengths, heads):
    torch.manual_seed(0)
    q = torch.randn(sum(lengths), heads[0], 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(sum(lengths), heads[1], 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    segments = Segments.of(lengths)
    out = packed_attention(q, k, v, segments)
    start, expected = 0, []
    for n in lengths:
        some = slice(start, start + n)
        kk, vv = (x[some].repeat_interleave(heads[0] // heads[1], 1) for x in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q[some], kk) / 8**0.5
        scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
        expected.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), vv))
        start += n
    torch.testing.assert_close(out, torch.cat(expected))
    grad = torch.randn_like(out)
    ours = torch.autograd.grad(out, (q, k, v), grad)
    theirs = torch.autograd.grad(torch.cat(expected), (q, k, v), grad)
    torch.testing.assert_close(ours, theirs)
    assert plan_segments(segments.cu_seqlens).groups.index.numel() <= 1.4 * sum(lengths) + 8 * len(lengths)


def test_rope_is_llama_3s():
    """Against the formula of Llama 3.1's reference, in float64, at both ends of the wavelengths."""
    spec = Attention(TransformerConfig(1, 1, 1, 128, 8)).rope
    cos, sin = rope_table(spec, 2048, torch.float64, torch.device("cpu"))
    for i in (0, 10, 25, 30, 40, 63):
        freq = 500_000.0 ** (-2 * i / 128)
        wavelen = 2 * np.pi / freq
        if wavelen > 8192:
            freq /= 32
        elif wavelen > 8192 / 4:
            smooth = (8192 / wavelen - 1) / 3
            freq = (1 - smooth) * freq / 32 + smooth * freq
        np.testing.assert_allclose(cos[:, i], np.cos(np.arange(2048) * freq), atol=1e-9)
        np.testing.assert_allclose(sin[:, i], np.sin(np.arange(2048) * freq), atol=1e-9)
    x = torch.randn(7, 2, 128, dtype=torch.float64)
    turned = apply_rope(x, cos[:7, None], sin[:7, None])
    as_complex = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.complex(cos[:7, None], sin[:7, None])
    torch.testing.assert_close(turned, torch.view_as_real(as_complex).flatten(-2))


def test_packs_from_a_real_store(tmp_path):
    conversations = conversations_of(9, seed=1)
    store = TokenStore.open(write_store(tmp_path / "train", conversations))
    packer = Packer(store, DataSection(batch_size=100, pack_rows=64), LossSection())
    step = packer.step(0, 0)
    assert step.rows == sum(len(t.text) + len(t.codes) + 1 for c in conversations for t in c)
    assert step.frames == sum(len(t.codes) for c in conversations for t in c)
    assert step.supervised == sum(len(t.codes) + 1 for c in conversations for t in c)


def test_a_pack_that_is_there_stays(monkeypatch):
    """Without an index a device is the current one of its kind, and a tensor on it cannot be pinned again."""
    pack = pack_padded(*padded(random_conversations([[(3, 5, 0)]])), 1.0)
    monkeypatch.setattr(torch.Tensor, "device", torch.device("cuda:1"))
    assert pack.to("cuda") is pack and pack.to("cuda:1") is pack
