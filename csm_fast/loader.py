"""Optimizer steps from a token store: which conversations, which frames, in which packs.

Everything here is a function of (data, configuration, seed, epoch, step). Nothing depends on a worker, on what ran
before, or on how an optimizer step is cut into packs, so a run can stop and continue anywhere.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch

from .attention import Segments
from .config import DataSection, LossSection
from .errors import InputError
from .packing import (
    FRAMES,
    MAX_POSITIONS,
    ORDER,
    Document,
    Pack,
    best_fit,
    best_fit_order,
    draw,
    padded_rows,
    split_documents,
)

T = TypeVar("T")


@dataclass(slots=True)
class _Part:
    """One document in its pack: the weights of its supervised rows, and which of these are picked."""

    document: Document
    weights: np.ndarray  # [targets] float64
    picked: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))  # [targets] bool


@dataclass(slots=True)
class _Layout:
    """A pack whose rows are filled in, and its documents in the order in which they lie there."""

    tokens: np.ndarray  # [T, K + 1] int32
    is_audio: np.ndarray  # [T] bool
    target: np.ndarray  # [T] bool
    lengths: list[int]  # of the segments
    parts: list[_Part] = field(default_factory=list)


@dataclass(slots=True)
class _EpochPlan:
    """Packs of an epoch: the documents of pack p are documents[starts[p] : starts[p + 1]]."""

    documents: np.ndarray  # [D] int32, rows of Packer._documents
    starts: np.ndarray  # [P + 1] int64
    packs: np.ndarray  # [P] int64, in the order of the steps


def _with_last(kept: dict[int, T], epoch: int, value: T) -> dict[int, T]:
    """The newest three: the epoch being trained, the one being read ahead, and the first, which a checkpoint's probe
    asks for. A new dict, because two threads ask."""
    return {**dict(list(kept.items())[-2:]), epoch: value}


@dataclass
class StepBatch:
    """What one optimizer step learns from.

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


class Packer:
    """Plans and builds the optimizer steps of a token store.

    Args:
        store: a ``TokenStore`` (or anything with its ``turn_lengths`` and ``conversation``).
        data: batch size and budgets.
        loss: amortization and EOS weight.
        pad: the device type to whose ladder of sizes packs are padded (``padded_rows``); exact sizes without one.
        limit: most rows of a document: the model's context.
    """

    def __init__(self, store: Any, data: DataSection, loss: LossSection, *, pad: str = "", limit=MAX_POSITIONS):
        self.store, self.data, self.loss, self.pad = store, data, loss, pad
        self.limit = min(limit, data.pack_rows)
        text, frames, speakers, conversation = store.turn_lengths()
        rows = np.asarray(text, dtype=np.int64) + np.asarray(frames) + 1
        self.turn_speakers = np.asarray(speakers)
        self.masked = np.isin(self.turn_speakers, np.asarray(data.mask_speaker_ids, dtype=self.turn_speakers.dtype))
        if data.supervise == "last":
            self.masked |= np.append(np.asarray(conversation)[1:] == np.asarray(conversation)[:-1], False)
        count = store.num_conversations
        starts = np.searchsorted(conversation, np.arange(count + 1))
        self.first_turn = starts
        totals = np.add.reduceat(rows, starts[:-1]) if count else np.zeros(0, dtype=np.int64)
        # Most conversations are one document; only the long ones need a look at their turns.
        split: dict[int, list[Document]] = {}
        for i in np.nonzero(totals > self.limit)[0].tolist():
            where = f"{getattr(store, 'path', 'tokens')}: "
            of_turns = slice(int(starts[i]), int(starts[i + 1]))
            split[i] = split_documents(i, rows[of_turns].tolist(), self.limit, where, limit)
        if not count:
            raise InputError("no conversations to train on", file=getattr(store, "path", None))
        if self.masked.all():
            raise InputError(
                "--mask-speaker-ids masks every turn",
                file=getattr(store, "path", None),
                mend="leave at least one speaker to learn from",
            )
        # A document is a row of numbers, because a million objects would be the largest part of the loader's memory.
        parts = np.ones(count, dtype=np.int64)
        parts[list(split)] = [len(documents) for documents in split.values()]
        self._first_document = np.concatenate([[0], np.cumsum(parts)])
        whole = (np.arange(count), np.zeros(count), np.diff(starts), totals)  # the fields of Document
        self._documents = np.repeat(np.stack(whole, axis=1).astype(np.int32), parts, axis=0)
        for i, documents in split.items():
            of_conversation = slice(int(self._first_document[i]), int(self._first_document[i + 1]))
            self._documents[of_conversation] = [(d.conversation, d.first, d.last, d.rows) for d in documents]
        self._orders: dict[int, np.ndarray] = {}
        self._plans: dict[int, _EpochPlan] = {}
        self._steps: dict[int, int] = {}

    # ---------------------------------------------------------------------------------------------------- planning

    def documents(self, conversation: int) -> list[Document]:
        """The documents of a conversation: one, unless it is longer than the limit."""
        first, last = self._first_document[conversation : conversation + 2].tolist()
        return [Document(*fields) for fields in self._documents[first:last].tolist()]

    def order(self, epoch: int) -> np.ndarray:
        """The epoch's order of conversations."""
        order = self._orders.get(epoch)
        if order is None:
            order = draw(self.data.seed, ORDER, epoch).permutation(self.store.num_conversations)
            self._orders = _with_last(self._orders, epoch, order)
        return order

    def steps_in_epoch(self, epoch: int) -> int:
        """Optimizer steps of an epoch, before anything is read."""
        if self.data.batch_rows is None:
            per_step = self.data.batch_size * self.data.gradient_accumulation
            return -(-self.store.num_conversations // per_step)
        if epoch not in self._steps:  # a whole run's are asked for, and the plans are not kept as long
            self._epoch_plan(epoch)
        return self._steps[epoch]

    def _budgets(self) -> tuple[int, int]:
        """batch_rows only: rows of a pack, packs of a step."""
        assert self.data.batch_rows is not None
        pack_rows = min(self.data.pack_rows, self.data.batch_rows)
        return pack_rows, max(1, self.data.batch_rows // pack_rows)

    def _epoch_plan(self, epoch: int) -> _EpochPlan:
        """batch_rows only: packs of documents, best-fit within windows of the shuffled order."""
        if (known := self._plans.get(epoch)) is not None:
            return known
        pack_rows, per_step = self._budgets()
        order, window = self.order(epoch), self.data.pack_window
        firsts, counts = self._first_document[order], np.diff(self._first_document)[order]
        packed: list[np.ndarray] = []
        sizes: list[np.ndarray] = []
        leftover = np.zeros(0, dtype=np.int64)
        for first in range(0, len(order), window):
            few = counts[first : first + window]
            offsets = np.arange(few.sum()) - np.repeat(np.cumsum(few) - few, few)
            documents = np.concatenate([leftover, np.repeat(firsts[first : first + window], few) + offsets])
            rows = self._documents[documents, 3].astype(np.int64)
            if rows.max() > pack_rows:
                conversation, _, _, most = self._documents[documents[np.argmax(rows > pack_rows)]].tolist()
                raise InputError(
                    f"conversation {conversation} needs {most:,} rows; --batch-rows is {pack_rows:,}",
                    mend=f"raise --batch-rows to at least {most}",
                )
            chosen, of_group = best_fit_order(rows, pack_rows)
            documents = documents[chosen]
            if first + window < len(order):
                # The emptiest pack of a window waits for the next one, so only an epoch's end leaves room.
                begins = np.cumsum(of_group) - of_group
                emptiest = int(np.argmin(np.add.reduceat(rows[chosen], begins)))
                hole = slice(int(begins[emptiest]), int(begins[emptiest] + of_group[emptiest]))
                leftover = documents[hole]
                documents, of_group = np.delete(documents, hole), np.delete(of_group, emptiest)
            packed.append(documents.astype(np.int32))
            sizes.append(of_group)
        starts = np.concatenate([[0], np.cumsum(np.concatenate(sizes))])
        # Best-fit deals out the longest conversations first; the order of the packs is drawn again.
        shuffled = draw(self.data.seed, ORDER, epoch, 1).permutation(len(starts) - 1)
        plan = _EpochPlan(np.concatenate(packed), starts, shuffled)
        self._steps[epoch] = -(-len(shuffled) // per_step)
        self._plans = _with_last(self._plans, epoch, plan)
        return plan

    def plan(self, epoch: int, index: int) -> list[list[Document]]:
        """The packs (lists of documents) of step ``index`` of ``epoch``."""
        if self.data.batch_rows is not None:
            plan, (_, per_step) = self._epoch_plan(epoch), self._budgets()
            packs = plan.packs[index * per_step : (index + 1) * per_step].tolist()
            if not packs or index < 0:
                raise IndexError(f"step {index} of {self.steps_in_epoch(epoch)}")
            chosen_documents = (plan.documents[plan.starts[p] : plan.starts[p + 1]] for p in packs)
            return [[Document(*fields) for fields in self._documents[d].tolist()] for d in chosen_documents]
        per_step = self.data.batch_size * self.data.gradient_accumulation
        chosen = self.order(epoch)[index * per_step : (index + 1) * per_step]
        return self.group([d for c in chosen.tolist() for d in self.documents(c)])

    def group(self, documents: list[Document]) -> list[list[Document]]:
        """Documents into as few packs as best-fit finds."""
        return [[documents[i] for i in g] for g in best_fit([d.rows for d in documents], self.data.pack_rows)]

    # ---------------------------------------------------------------------------------------------------- building

    def step(self, epoch: int, index: int) -> StepBatch:
        """Read and lay out one optimizer step. The frames' draw covers the whole step, in the order of the
        conversations' ids, so that it does not depend on how the step is cut into packs."""
        plan = self.plan(epoch, index)
        return self.build(plan, epoch, index, frames_seed=(FRAMES, epoch, index))

    def build(self, plan: list[list[Document]], epoch: int, index: int, frames_seed: tuple[int, ...]) -> StepBatch:
        """Lay out any plan; ``frames_seed`` names the draw of the depth decoder's frames."""
        layouts = [self._lay_out(documents) for documents in plan]
        parts = [part for layout in layouts for part in layout.parts]
        canonical = sorted(parts, key=lambda p: (p.document.conversation, p.document.first))
        supervised = sum(len(p.weights) for p in parts)
        picked = np.zeros(supervised, dtype=bool)
        if supervised:
            wanted = max(1, int(supervised * self.loss.amortization_fraction))
            picked[draw(self.data.seed, *frames_seed).permutation(supervised)[:wanted]] = True
        first = 0
        for part in canonical:
            part.picked = picked[first : first + len(part.weights)]
            first += len(part.weights)
        total = sum(float(p.weights.sum()) for p in parts)
        picked_total = sum(float(p.weights[p.picked].sum()) for p in parts)
        packs = [self._pack(layout, total, picked_total) for layout in layouts]
        conversations = sorted({p.document.conversation for p in parts})
        return StepBatch(packs, epoch, index, conversations, supervised, int(picked.sum()))

    def _lay_out(self, documents: list[Document]) -> _Layout:
        """The rows of a pack."""
        # Similar lengths side by side cost nothing and let attention group them.
        documents = sorted(documents, key=lambda d: (d.rows, d.conversation, d.first))
        lengths = [d.rows for d in documents]
        rows = sum(lengths)
        size = padded_rows(rows, self.data.pack_rows, self.pad)
        tokens = np.zeros((size, self.store.num_codebooks + 1), dtype=np.int32)
        is_audio, target = np.zeros(size, dtype=bool), np.zeros(size, dtype=bool)
        layout = _Layout(tokens, is_audio, target, lengths + [size - rows] * (size > rows))
        first = 0
        for document in documents:
            of = slice(first, first + document.rows)
            weights = self._fill(document, tokens[of], is_audio[of], target[of])
            layout.parts.append(_Part(document, weights[target[of]]))
            first += document.rows
        return layout

    def _rows(self, document: Document) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """tokens [n, K+1] int32, is_audio [n] bool, target [n] bool, weights [n] float64 of one document."""
        tokens = np.zeros((document.rows, self.store.num_codebooks + 1), dtype=np.int32)
        is_audio, target = np.zeros(document.rows, dtype=bool), np.zeros(document.rows, dtype=bool)
        return tokens, is_audio, target, self._fill(document, tokens, is_audio, target)

    def _fill(self, document: Document, tokens: np.ndarray, is_audio: np.ndarray, target: np.ndarray) -> np.ndarray:
        """Write a document's rows into zeros (shapes as in ``_rows``); returns their weights."""
        turns = self.store.conversation(document.conversation)[document.first : document.last]
        base = int(self.first_turn[document.conversation]) + document.first
        weights = np.ones(document.rows)
        row = 0
        for masked, turn in zip(self.masked[base : base + len(turns)].tolist(), turns, strict=True):
            text_end = row + len(turn.text)
            tokens[row:text_end, -1] = turn.text
            eos = text_end + len(turn.codes)
            tokens[text_end:eos, :-1] = turn.codes
            is_audio[text_end : eos + 1] = True  # the EOS row is K zeros
            target[text_end : eos + 1] = not masked
            weights[eos] = self.loss.eos_weight
            row = eos + 1
        # An audio row that opens a document has no row of its own to be predicted from.
        target[0] = False
        return weights

    def _pack(self, layout: _Layout, total: float, picked_total: float) -> Pack:
        lengths, parts = np.array(layout.lengths), layout.parts
        starts = (np.cumsum(lengths) - lengths).astype(np.int32)
        positions = np.arange(len(layout.tokens), dtype=np.int32) - np.repeat(starts, lengths)
        # The dummy document may be longer than the model's context; nothing reads it, so its positions may wrap.
        if lengths.max() > MAX_POSITIONS:
            positions %= MAX_POSITIONS
        weights = np.concatenate([p.weights for p in parts])
        index = np.flatnonzero(np.concatenate([p.picked for p in parts]))
        return Pack(
            torch.from_numpy(layout.tokens),
            torch.from_numpy(layout.is_audio),
            torch.from_numpy(positions),
            Segments.of(layout.lengths),
            torch.from_numpy(np.flatnonzero(layout.target)),
            torch.from_numpy(weights / max(total, 1e-300)),
            torch.from_numpy(index),
            torch.from_numpy(weights[index] / max(picked_total, 1e-300)),
            sum(p.document.rows for p in parts),
            int(layout.is_audio.sum()) - sum(p.document.last - p.document.first for p in parts),
        )


def prefetch(steps: Iterator[T], depth: int = 2) -> Generator[T, None, None]:
    """Run an iterator in a thread, ``depth`` steps ahead. Its exceptions surface at the step that they concern."""
    ready: queue.Queue = queue.Queue(maxsize=depth)
    stop = threading.Event()
    done = object()

    def put(item) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work():
        try:
            for step in steps:
                if not put(step):
                    return
            put(done)
        except BaseException as error:  # noqa: BLE001 - handed over to the consumer
            put(error)

    thread = threading.Thread(target=work, name="csm_fast-packer", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if item is done:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        # It ends at once, unless it reads from a drive that hangs, or waits for a lock that an interrupt in the middle
        # of ``get`` left taken. Neither may keep a run from ending; the thread is a daemon.
        thread.join(2.0)
