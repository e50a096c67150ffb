"""Where each row of an optimizer step lies: documents read from a store and laid out in packs, several steps at once.

A step of 2,048 rows is a few dozen array operations, whose overhead exceeds their work. So ``Packer.blocks`` has many
steps laid out together. Each pack is then a view of arrays that hold the whole block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from csm_fast.packing.draws import select_lowest
from csm_fast.packing.fit import MAX_POSITIONS, Document, Store
from csm_fast.packing.pack import Pack, Segments

AUDIO, TARGET, TEXT = 1, 2, 4  # bits of a row's kind


@dataclass
class StepBatch:
    """The data of one optimizer step.

    Attributes:
        packs: the micro-batches, already weighted so that their losses add up to the step's loss.
        epoch, index: which epoch, and which step of it.
        conversations: ids in the store, for reporting.
        supervised, selected: supervised frames, and those the depth decoder sees.
    """

    packs: list[Pack]
    epoch: int
    index: int
    conversations: list[int] = field(default_factory=list)
    supervised: int = 0
    selected: int = 0

    @property
    def rows(self) -> int:
        return sum(pack.rows for pack in self.packs)

    @property
    def padded_rows(self) -> int:
        return sum(pack.tokens.shape[0] for pack in self.packs)

    @property
    def frames(self) -> int:
        return sum(pack.frames for pack in self.packs)


@dataclass(slots=True)
class TurnLengths:
    """What is known of a store's turns without reading them.

    Attributes:
        text, frames: int32 [n], lengths.
        masked: bool [n], turns without a loss.
        first: int64 [conversations + 1], each conversation's first turn.
    """

    text: np.ndarray
    frames: np.ndarray
    masked: np.ndarray
    first: np.ndarray


@dataclass(slots=True)
class PackLayout:
    """Which documents share a pack, and which packs a step, for consecutive optimizer steps.

    Attributes:
        documents: int32 [D, 4], the fields of ``Document``; pack after pack, step after step.
        packs: documents of each pack.
        steps: packs of each step.
    """

    documents: np.ndarray
    packs: list[int]
    steps: list[int]

    def list_documents(self) -> list[list[Document]]:
        """The documents of each pack as objects."""
        documents = [Document(*fields) for fields in self.documents.tolist()]
        ends = np.cumsum(self.packs).tolist()
        return [documents[end - n : end] for end, n in zip(ends, self.packs, strict=True)]


@dataclass(slots=True)
class Block:
    """The rows of a layout. Rows of a pack lie together, the documents of a pack in order of length.

    Attributes:
        documents: int64 [D, 4], the fields of ``Document``.
        tokens: int32 [R, K + 1].
        kinds: uint8 [R], bits AUDIO (EOS rows too), TARGET, TEXT; 0 for padding.
        positions: int32 [R].
        ends: bool [R], EOS rows.
        sizes, live, frames: [P], of each pack: rows, rows without padding, audio frames.
        pack, first: int64 [D], each document's pack and first row.
        lengths: int64 [D + P], segments; every pack's last is its padding, perhaps empty.
    """

    documents: np.ndarray
    tokens: np.ndarray
    kinds: np.ndarray
    positions: np.ndarray
    ends: np.ndarray
    sizes: np.ndarray
    live: np.ndarray
    frames: np.ndarray
    pack: np.ndarray
    first: np.ndarray
    lengths: np.ndarray


def fill_block(store: Store, turns: TurnLengths, layout: PackLayout, size: Callable[[int], int]) -> Block:
    """Read the documents of a layout and write their rows.

    Args:
        layout: none of its packs is empty.
        size: rows of a pack for its live rows.
    """
    packs = layout.packs
    pack = np.repeat(np.arange(len(packs)), packs)
    # Similar lengths side by side cost nothing, and attention can group them.
    documents = layout.documents
    order = np.lexsort((documents[:, 1], documents[:, 0], documents[:, 3], pack))
    documents = documents[order].astype(np.int64)
    conversation, first, last, rows = documents.T
    begins: np.ndarray = np.cumsum(packs) - packs
    live = np.add.reduceat(rows, begins)
    sizes = np.array([size(n) for n in live.tolist()])
    # Segments: the documents of each pack, then its padding, which is text that no other row attends to.
    place = np.arange(len(rows)) + pack
    padding = np.cumsum(packs) + np.arange(len(packs))
    lengths = np.empty(len(rows) + len(packs), dtype=np.int64)
    lengths[place], lengths[padding] = rows, sizes - live
    starts = np.cumsum(lengths) - lengths

    # Turns likewise: how many rows of text, then of audio, and of which kind.
    count = last - first
    first_turn = turns.first[conversation] + first
    turn = np.repeat(first_turn - (np.cumsum(count) - count), count) + np.arange(count.sum())
    turns_of_pack = np.add.reduceat(count, begins)
    turn_place = np.arange(len(turn)) + np.repeat(np.arange(len(packs)), turns_of_pack)
    turn_padding = np.cumsum(turns_of_pack) + np.arange(len(packs))
    frames = turns.frames[turn]
    spans = np.zeros((len(turn) + len(packs), 2), dtype=np.int64)
    spans[turn_place, 0], spans[turn_place, 1] = turns.text[turn], frames + 1
    spans[turn_padding, 0] = sizes - live
    kind_of_span = np.zeros(spans.shape, dtype=np.uint8)
    kind_of_span[turn_place] = (TEXT, AUDIO | TARGET)
    kind_of_span[turn_place[turns.masked[turn]], 1] = AUDIO
    kinds = np.repeat(kind_of_span.ravel(), spans.ravel())
    # The first row of a document cannot be a target: no row before it predicts it.
    kinds[starts[place]] &= ~np.uint8(TARGET)
    positions = np.arange(len(kinds), dtype=np.int32) - np.repeat(starts.astype(np.int32), lengths)
    # A pack's padding may be longer than the model's context. Its positions may wrap, because no other row reads it.
    if lengths.max() > MAX_POSITIONS:
        positions %= MAX_POSITIONS
    ends = np.zeros(len(kinds), dtype=bool)
    ends[np.cumsum(spans.sum(1))[turn_place] - 1] = True

    tokens = np.zeros((len(kinds), store.num_codebooks + 1), dtype=np.int32)
    text, codes = _read_tokens(store, documents, first_turn)
    tokens[np.flatnonzero(kinds & TEXT), -1] = text
    tokens[np.flatnonzero((kinds & AUDIO) > ends), :-1] = codes  # the EOS row is K zeros
    frames_of_pack = np.add.reduceat(frames, np.cumsum(turns_of_pack) - turns_of_pack)
    return Block(documents, tokens, kinds, positions, ends, sizes, live, frames_of_pack, pack, starts[place], lengths)


def _read_tokens(store: Store, documents: np.ndarray, first_turn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Text ids [N] and codes [F, K] of documents, end to end."""
    conversation, first, last, _ = documents.T
    if hasattr(store, "read_turns"):
        return store.read_turns(first_turn.tolist(), (first_turn + last - first).tolist())
    spans = zip(conversation.tolist(), first.tolist(), last.tolist(), strict=True)
    turns = [turn for c, begin, end in spans for turn in store.conversation(c)[begin:end]]
    return np.concatenate([t.text for t in turns]), np.concatenate([t.codes for t in turns])


@dataclass(slots=True)
class FrameChoice:
    """How the depth decoder's frames are chosen, and the weight of end-of-speech frames.

    Attributes:
        step_keys: random keys of steps, from ``make_step_keys``. The frames with the lowest keys are chosen.
        fraction: share of the supervised frames; at least one.
        eos_weight: of end-of-speech frames; the others have 1.
    """

    step_keys: Callable[[np.ndarray, np.ndarray], np.ndarray]
    fraction: float
    eos_weight: float


def cut_steps(block: Block, steps: list[int], choice: FrameChoice, epoch: int, index: int) -> list[StepBatch]:
    """The optimizer steps ``index``, ``index + 1``, ... of ``epoch`` that a block holds.

    The depth decoder's frames are chosen among all frames of a step, in the order of the conversations' ids. So the
    choice does not depend on how the step is cut into packs.

    Args:
        steps: packs of each step.
    """
    conversation, first = block.documents[:, 0], block.documents[:, 1]
    targets = np.flatnonzero(block.kinds & TARGET)
    weights = np.ones(len(targets))
    weights[block.ends[targets]] = choice.eos_weight
    bounds = np.concatenate([[0], np.cumsum(block.sizes)])
    in_pack = np.searchsorted(targets, bounds)  # targets of pack p: in_pack[p] up to in_pack[p + 1]
    step_packs = np.concatenate([[0], np.cumsum(steps)])
    in_step = in_pack[step_packs]
    step_of_pack = np.repeat(np.arange(len(steps)), steps)

    # Targets step by step, in each the documents by id: the order in which keys are given out.
    step = step_of_pack[block.pack]
    canonical = np.lexsort((first, conversation, step))
    of_document = np.searchsorted(targets, block.first)
    count = np.diff(of_document, append=len(targets))[canonical]
    key_order = np.repeat(of_document[canonical] - (np.cumsum(count) - count), count) + np.arange(len(targets))
    picked = np.zeros(len(targets), dtype=bool)
    supervised = np.diff(in_step)
    some = np.maximum((supervised * choice.fraction).astype(np.int64), 1)
    wanted = np.minimum(some, supervised)  # at least one where there is one
    keys = choice.step_keys(np.arange(index, index + len(steps)), supervised)
    picked[key_order[select_lowest(keys, supervised, wanted)]] = True
    chosen = np.flatnonzero(picked)
    chosen_in_pack = np.searchsorted(chosen, in_pack)

    # Weights, which sum to 1 over a step.
    step_of_target = np.repeat(np.arange(len(steps)), supervised)
    chosen_step = step_of_target[chosen]
    total = np.bincount(step_of_target, weights, len(steps))
    chosen_total = np.bincount(chosen_step, weights[chosen], len(steps))
    weights_of = weights / np.maximum(total, 1e-300)[step_of_target]
    chosen_weights = weights[chosen] / np.maximum(chosen_total, 1e-300)[chosen_step]

    target_counts, chosen_counts = np.diff(in_pack), np.diff(chosen_in_pack)
    sizes, targets_of, chosen_of = block.sizes.tolist(), target_counts.tolist(), chosen_counts.tolist()
    fields = zip(
        _split_views(block.tokens, sizes),
        _split_views((block.kinds & AUDIO).view(bool), sizes),
        _split_views(block.positions, sizes),
        _list_segments(block, bounds),
        _split_views(targets - np.repeat(bounds[:-1], target_counts), targets_of),
        _split_views(weights_of, targets_of),
        _split_views(chosen - np.repeat(in_pack[:-1], chosen_counts), chosen_of),
        _split_views(chosen_weights, chosen_of),
        block.live.tolist(),
        block.frames.tolist(),
        strict=True,
    )
    packs = [Pack(*of_pack) for of_pack in fields]
    # A step's conversations, each once: several documents of one lie together.
    ids, step = conversation[canonical], step[canonical]
    once = np.flatnonzero(np.append(True, (ids[1:] != ids[:-1]) | (step[1:] != step[:-1])))
    ends = np.cumsum(np.bincount(step[once], minlength=len(steps))).tolist()
    ids = ids[once].tolist()
    return [
        StepBatch(packs[a:b], epoch, number, ids[c:d], *counts)
        for number, a, b, c, d, *counts in zip(
            range(index, index + len(steps)),
            step_packs.tolist(),
            step_packs[1:].tolist(),
            [0, *ends],
            ends,
            supervised.tolist(),
            wanted.tolist(),
            strict=False,
        )
    ]


def _split_views(values: np.ndarray, sizes: list[int]) -> tuple[Tensor, ...]:
    # unsafe: autograd does not track that these are views.
    return torch.unsafe_split_with_sizes(torch.from_numpy(values), sizes)


def _list_segments(block: Block, bounds: np.ndarray) -> list[Segments]:
    """The segments of each pack, without empty padding."""
    count = np.bincount(block.pack, minlength=len(block.sizes)) + 1
    last = np.cumsum(count) - 1
    padded = block.lengths[last] > 0
    # Ends of the segments, and before those of each pack a 0.
    base = np.repeat(bounds[:-1], count)
    ends = np.zeros(len(block.lengths) + len(count), dtype=np.int32)
    ends[np.arange(len(block.lengths)) + np.repeat(np.arange(1, len(count) + 1), count)] = (
        np.cumsum(block.lengths) - base
    )
    lengths, first = block.lengths.tolist(), last - count + 1
    longest = np.maximum.reduceat(block.lengths, first).tolist()
    begins, many = first.tolist(), (count - ~padded).tolist()
    # Not views of one tensor: torch.compile would distinguish views with an offset from those without.
    return [
        Segments(tuple(lengths[a : a + n]), torch.from_numpy(ends[a + number : a + number + n + 1]), most)
        for number, (a, n, most) in enumerate(zip(begins, many, longest, strict=True))
    ]
