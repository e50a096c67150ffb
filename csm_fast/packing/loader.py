"""Optimizer steps from a token store: which conversations, which frames, in which packs.

Everything here is a function of (data, configuration, seed, epoch, step). It depends neither on a thread, nor on
earlier steps, nor on how an optimizer step is cut into packs. So a run can stop and continue anywhere.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from csm_fast.config.train import DataSection, LossSection
from csm_fast.packing.draws import Purpose, make_step_keys, seeded_generator
from csm_fast.packing.fit import MAX_POSITIONS, Document, Store, best_fit, padded_rows, split_documents
from csm_fast.packing.layout import FrameChoice, PackLayout, StepBatch, TurnLengths, cut_steps, fill_block
from csm_fast.system.errors import InputError

T = TypeVar("T")

# Rows of the steps that are laid out together: enough that the cost of a row does not depend on the step's size, few
# enough to be ready in a millisecond or two. 2.5 MiB.
BLOCK_ROWS = 16_384


@dataclass(slots=True)
class EpochOrder:
    """Packs of an epoch: the documents of pack p are documents[starts[p] : starts[p + 1]]."""

    documents: np.ndarray  # [D] int32, rows of Packer._documents
    starts: np.ndarray  # [P + 1] int64
    packs: np.ndarray  # [P] int64, in the order of the steps


def _with_last(kept: dict[int, T], epoch: int, value: T) -> dict[int, T]:
    """The newest three: the epoch being trained, the one being read ahead, and the first, which the check of a saved
    adapter reads. Returns a new dict, so that two threads can call it at once."""
    return {**dict(list(kept.items())[-2:]), epoch: value}


class Packer:
    """Chooses and builds the optimizer steps of a token store.

    Args:
        store: a ``TokenStore``, or anything with the attributes of ``Store``.
        data: batch size and budgets.
        loss: amortization and EOS weight.
        pad: the device type to whose ladder of sizes packs are padded (``padded_rows``); exact sizes without one.
        limit: most rows of a document: the model's context.

    Raises:
        InputError: no conversations, none with a loss, or a turn that fits no pack.
    """

    def __init__(self, store: Store, data: DataSection, loss: LossSection, *, pad: str = "", limit=MAX_POSITIONS):
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
        self._turns = TurnLengths(np.asarray(text, dtype=np.int32), np.asarray(frames, dtype=np.int32), masked, starts)
        totals = np.add.reduceat(rows, starts[:-1]) if count else np.zeros(0, dtype=np.int64)
        # Most conversations are one document. Only those of the long ones depend on the lengths of their turns.
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
        # Rows of an array: a million Document objects would be the largest part of the loader's memory.
        parts = np.ones(count, dtype=np.int64)
        parts[list(split)] = [len(documents) for documents in split.values()]
        self._first_document = np.concatenate([[0], np.cumsum(parts)])
        whole = (np.arange(count), np.zeros(count), np.diff(starts), totals)  # the fields of Document
        self._documents = np.repeat(np.stack(whole, axis=1).astype(np.int32), parts, axis=0)
        for i, documents in split.items():
            self._documents[self._first_document[i] : self._first_document[i + 1]] = documents
        of_step = data.batch_rows or int(totals.mean() * data.batch_size * data.gradient_accumulation)
        self._steps_of_block = max(1, BLOCK_ROWS // max(of_step, self._pad(of_step)))
        self._conversations: dict[int, np.ndarray] = {}  # shuffled, by epoch
        self._orders: dict[int, EpochOrder] = {}
        self._steps: dict[int, int] = {}

    # ------------------------------------------------------------------------------------------------- which documents

    def steps_in_epoch(self, epoch: int) -> int:
        """Optimizer steps of an epoch, before anything is read."""
        if self.data.batch_rows is None:
            per_step = self.data.batch_size * self.data.gradient_accumulation
            return -(-self.store.num_conversations // per_step)
        if epoch not in self._steps:  # kept for all epochs: a run asks for all of them, and orders are not kept as long
            self._order_epoch(epoch)
        return self._steps[epoch]

    def layout_steps(self, epoch: int, index: int, count: int = 1) -> PackLayout:
        """``count`` steps from step ``index`` of ``epoch`` on, all of that epoch."""
        if not 0 <= index <= index + count - 1 < self.steps_in_epoch(epoch):
            raise IndexError(f"step {index + count - 1} of {self.steps_in_epoch(epoch)}")
        if self.data.batch_rows is not None:
            order, (_, per_step) = self._order_epoch(epoch), self._budgets()
            chosen = order.packs[index * per_step : (index + count) * per_step]
            first, last = order.starts[chosen].tolist(), order.starts[chosen + 1].tolist()
            spans = [order.documents[a:b] for a, b in zip(first, last, strict=True)]
            steps = [per_step] * (count - 1)
            steps.append(len(spans) - sum(steps))
            return PackLayout(self._documents[np.concatenate(spans)], [len(s) for s in spans], steps)
        per_step = self.data.batch_size * self.data.gradient_accumulation
        shuffled = self._shuffle_conversations(epoch)[index * per_step : (index + count) * per_step]
        layouts = [self.layout_conversations(shuffled[i : i + per_step]) for i in range(0, len(shuffled), per_step)]
        return PackLayout(
            np.concatenate([layout.documents for layout in layouts]),
            [n for layout in layouts for n in layout.packs],
            [n for layout in layouts for n in layout.steps],
        )

    def layout_conversations(self, conversations: Sequence[int] | np.ndarray) -> PackLayout:
        """One step of some conversations, in as few packs as best-fit finds."""
        documents = self._documents[self._document_rows(np.asarray(conversations))]
        rows = documents[:, 3].astype(np.int64)
        if rows.sum() <= self.data.pack_rows:
            return PackLayout(documents, [len(documents)], [1])
        order, counts = best_fit(rows, self.data.pack_rows)
        return PackLayout(documents[order], counts.tolist(), [len(counts)])

    def _document_rows(self, conversations: np.ndarray) -> np.ndarray:
        """Rows of ``_documents`` of some conversations, in their order."""
        first = self._first_document[conversations]
        count = self._first_document[conversations + 1] - first
        return np.repeat(first - (np.cumsum(count) - count), count) + np.arange(count.sum())

    def _shuffle_conversations(self, epoch: int) -> np.ndarray:
        shuffled = self._conversations.get(epoch)
        if shuffled is None:
            generator = seeded_generator(self.data.seed, Purpose.ORDER, epoch)
            shuffled = generator.permutation(self.store.num_conversations)
            self._conversations = _with_last(self._conversations, epoch, shuffled)
        return shuffled

    def _budgets(self) -> tuple[int, int]:
        """batch_rows only: rows of a pack, packs of a step."""
        assert self.data.batch_rows is not None
        pack_rows = min(self.data.pack_rows, self.data.batch_rows)
        return pack_rows, max(1, self.data.batch_rows // pack_rows)

    def _order_epoch(self, epoch: int) -> EpochOrder:
        """batch_rows only: packs of documents, best-fit within windows of the shuffled conversations."""
        if (known := self._orders.get(epoch)) is not None:
            return known
        pack_rows, per_step = self._budgets()
        shuffled, window = self._shuffle_conversations(epoch), self.data.pack_window
        packed: list[np.ndarray] = []
        sizes: list[np.ndarray] = []
        leftover = np.zeros(0, dtype=np.int64)
        for first in range(0, len(shuffled), window):
            documents = np.concatenate([leftover, self._document_rows(shuffled[first : first + window])])
            rows = self._documents[documents, 3].astype(np.int64)
            if rows.max() > pack_rows:
                conversation, _, _, most = self._documents[documents[np.argmax(rows > pack_rows)]].tolist()
                raise InputError(
                    f"conversation {conversation} needs {most:,} rows; --batch-rows is {pack_rows:,}",
                    mend=f"raise --batch-rows to at least {most}",
                )
            chosen, of_group = best_fit(rows, pack_rows)
            documents = documents[chosen]
            if first + window < len(shuffled):
                # The emptiest pack of a window waits for the next one, so only an epoch's end leaves room.
                begins = np.cumsum(of_group) - of_group
                emptiest = int(np.argmin(np.add.reduceat(rows[chosen], begins)))
                hole = slice(int(begins[emptiest]), int(begins[emptiest] + of_group[emptiest]))
                leftover = documents[hole]
                documents, of_group = np.delete(documents, hole), np.delete(of_group, emptiest)
            packed.append(documents.astype(np.int32))
            sizes.append(of_group)
        starts = np.concatenate([[0], np.cumsum(np.concatenate(sizes))])
        # Best-fit puts the longest conversations first, so the packs are shuffled again.
        packs = seeded_generator(self.data.seed, Purpose.ORDER, epoch, 1).permutation(len(starts) - 1)
        order = EpochOrder(np.concatenate(packed), starts, packs)
        self._steps[epoch] = -(-len(packs) // per_step)
        self._orders = _with_last(self._orders, epoch, order)
        return order

    # --------------------------------------------------------------------------------------------------- their rows

    def step(self, epoch: int, index: int) -> StepBatch:
        """Read and lay out one optimizer step."""
        return self.build_step(self.layout_steps(epoch, index), epoch, index)

    def blocks(self, epoch: int, index: int, limit: int | None = None) -> Iterator[list[StepBatch]]:
        """The optimizer steps from step ``index`` of ``epoch`` on, epoch after epoch, laid out several at a time.

        The first step comes alone and the blocks grow from there, so that a slow drive does not delay the beginning.
        A block that cannot be read is read again step by step: an error then surfaces at the step that it concerns.

        Args:
            limit: how many steps; None: without end.
        """
        count, left = 1, limit
        while left is None or left > 0:
            there = self.steps_in_epoch(epoch) - index
            if there < 1:
                raise IndexError(f"step {index} of {self.steps_in_epoch(epoch)}")
            many = min(count, there, *([] if left is None else [left]))
            try:
                block = self._build_steps(self.layout_steps(epoch, index, many), epoch, index, None)
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

    def build_step(
        self, layout: PackLayout, epoch: int, index: int, purpose: tuple[int, ...] | None = None
    ) -> StepBatch:
        """Read and lay out a layout of one step as step ``index`` of ``epoch``.

        Args:
            purpose: where the random choice of the depth decoder's frames is taken from, in place of that epoch's.
        """
        return self._build_steps(layout, epoch, index, purpose)[0]

    def _build_steps(
        self, layout: PackLayout, epoch: int, index: int, purpose: tuple[int, ...] | None
    ) -> list[StepBatch]:
        block = fill_block(self.store, self._turns, layout, self._pad)
        keys = make_step_keys(self.data.seed, *(purpose or (Purpose.FRAMES, epoch)))
        choice = FrameChoice(keys, self.loss.amortization_fraction, self.loss.eos_weight)
        return cut_steps(block, layout.steps, choice, epoch, index)

    def _pad(self, rows: int) -> int:
        return padded_rows(rows, self.data.pack_rows, self.pad)


class OneStepPacker(Packer):
    """A packer whose steps all have the conversations of the first one (``--overfit-one-batch``). The depth decoder's
    frames are chosen anew for each step."""

    def layout_steps(self, epoch: int, index: int, count: int = 1) -> PackLayout:
        first = super().layout_steps(0, 0)
        return PackLayout(np.tile(first.documents, (count, 1)), first.packs * count, first.steps * count)


def prefetch(steps: Iterator[T], depth: int = 2) -> Generator[T, None, None]:
    """Run an iterator in a thread, ``depth`` items ahead. Its exceptions surface at the item that they concern."""
    ready: queue.Queue[Any] = queue.Queue(maxsize=depth)
    stop = threading.Event()
    done = object()

    def put(item: Any) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
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
        # The thread ends at once, unless it reads from a drive that hangs, or waits for a lock that an interrupt in the
        # middle of ``get`` left taken. Neither may keep a run from ending; the thread is a daemon.
        thread.join(2.0)


def read_ahead(blocks: Iterator[list[T]], depth: int = 2) -> Generator[T, None, None]:
    """The items of blocks that a thread makes, ``depth`` blocks ahead (``prefetch``)."""
    with contextlib.closing(prefetch(blocks, depth)) as ready:
        for block in ready:
            yield from block
