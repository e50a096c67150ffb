"""Optimizer steps from a token store: which conversations, which frames, in which packs.

Everything here is a function of (data, configuration, seed, epoch, step). Nothing depends on a worker, on what ran
before, or on how an optimizer step is cut into packs, so a run can stop and continue anywhere.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from csm_fast.config.train import DataSection, LossSection
from csm_fast.packing.draws import Purpose, make_step_keys, seeded_generator
from csm_fast.packing.fit import MAX_POSITIONS, Document, best_fit, best_fit_order, padded_rows, split_documents
from csm_fast.packing.layout import AUDIO, Draw, Plan, StepBatch, Turns, batches, fill
from csm_fast.system.errors import InputError

T = TypeVar("T")

# Rows of the steps that are laid out together: enough that what a row costs does not depend on the step's size, few
# enough to be ready in a millisecond or two. 2.5 MiB.
BLOCK_ROWS = 16_384


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
        masked = np.isin(self.turn_speakers, np.asarray(data.mask_speaker_ids, dtype=self.turn_speakers.dtype))
        if data.supervise == "last":
            masked |= np.append(np.asarray(conversation)[1:] == np.asarray(conversation)[:-1], False)
        count = store.num_conversations
        starts = np.searchsorted(conversation, np.arange(count + 1))
        self._turns = Turns(np.asarray(text, dtype=np.int32), np.asarray(frames, dtype=np.int32), masked, starts)
        totals = np.add.reduceat(rows, starts[:-1]) if count else np.zeros(0, dtype=np.int64)
        # Most conversations are one document; only the long ones need a look at their turns.
        split: dict[int, list[Document]] = {}
        for i in np.nonzero(totals > self.limit)[0].tolist():
            where = f"{getattr(store, 'path', 'tokens')}: "
            of_turns = slice(int(starts[i]), int(starts[i + 1]))
            split[i] = split_documents(i, rows[of_turns].tolist(), self.limit, where, limit)
        if not count:
            raise InputError("no conversations to train on", file=getattr(store, "path", None))
        if masked.all():
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
        of_step = data.batch_rows or int(totals.mean() * data.batch_size * data.gradient_accumulation)
        self._steps_of_block = max(1, BLOCK_ROWS // max(of_step, self._size(of_step)))
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
            order = seeded_generator(self.data.seed, Purpose.ORDER, epoch).permutation(self.store.num_conversations)
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
        shuffled = seeded_generator(self.data.seed, Purpose.ORDER, epoch, 1).permutation(len(starts) - 1)
        plan = _EpochPlan(np.concatenate(packed), starts, shuffled)
        self._steps[epoch] = -(-len(shuffled) // per_step)
        self._plans = _with_last(self._plans, epoch, plan)
        return plan

    def plan(self, epoch: int, index: int) -> list[list[Document]]:
        """The packs (lists of documents) of step ``index`` of ``epoch``."""
        planned = self._planned(epoch, index, 1)
        documents = [Document(*fields) for fields in planned.documents.tolist()]
        ends = np.cumsum(planned.packs).tolist()
        return [documents[end - n : end] for end, n in zip(ends, planned.packs, strict=True)]

    def _planned(self, epoch: int, index: int, count: int) -> Plan:
        """``count`` steps from step ``index`` of ``epoch`` on, all of that epoch."""
        if not 0 <= index <= index + count - 1 < self.steps_in_epoch(epoch):
            raise IndexError(f"step {index + count - 1} of {self.steps_in_epoch(epoch)}")
        if self.data.batch_rows is not None:
            plan, (_, per_step) = self._epoch_plan(epoch), self._budgets()
            chosen = plan.packs[index * per_step : (index + count) * per_step]
            first, last = plan.starts[chosen].tolist(), plan.starts[chosen + 1].tolist()
            spans = [plan.documents[a:b] for a, b in zip(first, last, strict=True)]
            steps = [per_step] * (count - 1)
            return Plan(
                self._documents[np.concatenate(spans)], [len(s) for s in spans], [*steps, len(spans) - sum(steps)]
            )
        per_step = self.data.batch_size * self.data.gradient_accumulation
        order = self.order(epoch)
        documents: list[np.ndarray] = []
        packs: list[int] = []
        steps = []
        for number in range(index, index + count):
            chosen = order[number * per_step : (number + 1) * per_step]
            first, many = self._first_document[chosen], self._first_document[chosen + 1]
            many -= first
            rows_of_table = np.repeat(first - (np.cumsum(many) - many), many) + np.arange(many.sum())
            some = self._documents[rows_of_table]
            place, sizes = self._packs_of(some[:, 3])
            documents.append(some if place is None else some[place])
            packs += sizes
            steps.append(len(sizes))
        return Plan(np.concatenate(documents), packs, steps)

    def _packs_of(self, rows: np.ndarray) -> tuple[np.ndarray | None, list[int]]:
        """Documents of these rows into as few packs as best-fit finds: their order (None: as it is), and how many of
        them each pack takes."""
        if rows.sum() <= self.data.pack_rows:
            return None, [len(rows)]
        order, counts = best_fit_order(rows.astype(np.int64), self.data.pack_rows)
        return order, counts.tolist()

    def group(self, documents: list[Document]) -> list[list[Document]]:
        """Documents into as few packs as best-fit finds."""
        return [[documents[i] for i in g] for g in best_fit([d.rows for d in documents], self.data.pack_rows)]

    # ---------------------------------------------------------------------------------------------------- building

    def step(self, epoch: int, index: int) -> StepBatch:
        """Read and lay out one optimizer step."""
        return self._laid_out(epoch, index, 1)[0]

    def blocks(self, epoch: int, index: int, limit: int | None = None) -> Iterator[list[StepBatch]]:
        """The optimizer steps from step ``index`` of ``epoch`` on, epoch after epoch, laid out several at a time.

        The first comes alone and the blocks grow from there, so that a slow drive does not hold up the beginning. A
        block that cannot be laid out is laid out step by step: what cannot be read concerns its own step.

        Args:
            limit: how many steps; without end without one.
        """
        count, left = 1, limit
        while left is None or left > 0:
            there = self.steps_in_epoch(epoch) - index
            if there < 1:
                raise IndexError(f"step {index} of {self.steps_in_epoch(epoch)}")
            many = min(count, there, *([] if left is None else [left]))
            try:
                block = self._laid_out(epoch, index, many)
            except Exception:
                if many == 1:
                    raise
                block = []
            yield from [block] if block else ([self.step(epoch, n)] for n in range(index, index + many))
            index += many
            left = None if left is None else left - many
            if index == self.steps_in_epoch(epoch):
                epoch, index = epoch + 1, 0
            count = min(2 * count, self._steps_of_block)

    def build(
        self, plan: list[list[Document]], epoch: int, index: int, purpose: tuple[int, ...] | None = None
    ) -> StepBatch:
        """Lay out any plan as one optimizer step. ``purpose`` names the draw of the depth decoder's frames, by default
        that of step ``index`` of ``epoch``."""
        fields = [(d.conversation, d.first, d.last, d.rows) for documents in plan for d in documents]
        chosen = Plan(np.array(fields, dtype=np.int32), [len(documents) for documents in plan], [len(plan)])
        return self._build(chosen, epoch, index, purpose or (Purpose.FRAMES, epoch))[0]

    def _laid_out(self, epoch: int, index: int, count: int) -> list[StepBatch]:
        return self._build(self._planned(epoch, index, count), epoch, index, (Purpose.FRAMES, epoch))

    def _build(self, plan: Plan, epoch: int, index: int, purpose: tuple[int, ...]) -> list[StepBatch]:
        block = fill(self.store, self._turns, plan.documents, plan.packs, self._size)
        numbers = make_step_keys(self.data.seed, *purpose)
        draws = Draw(numbers, self.loss.amortization_fraction, self.loss.eos_weight)
        return batches(block, plan.steps, draws, epoch, index)

    def _size(self, rows: int) -> int:
        return padded_rows(rows, self.data.pack_rows, self.pad)

    def rows_of(self, document: Document) -> tuple[np.ndarray, np.ndarray]:
        """tokens int32 [n, K + 1] and is_audio bool [n] of one document."""
        fields = (document.conversation, document.first, document.last, document.rows)
        block = fill(self.store, self._turns, np.array([fields], dtype=np.int32), [1], lambda rows: rows)
        return block.tokens, (block.kinds & AUDIO).view(bool)


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


def read_ahead(blocks: Iterator[list[T]], depth: int = 2) -> Generator[T, None, None]:
    """The items of blocks that a thread makes, ``depth`` blocks ahead (``prefetch``)."""
    with contextlib.closing(prefetch(blocks, depth)) as ready:
        for block in ready:
            yield from block
