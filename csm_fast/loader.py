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
    draw,
    padded_rows,
    split_documents,
)

T = TypeVar("T")


@dataclass
class _Part:
    """One document on its way into a pack: its rows, and which of them are supervised and picked."""

    pack: int
    document: Document
    tokens: np.ndarray  # [n, K + 1] int32
    is_audio: np.ndarray  # [n] bool
    target: np.ndarray  # [n] bool
    weights: np.ndarray  # [n] float64
    picked: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))  # [targets] bool


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
        self._split: dict[int, list[Document]] = {}
        self.totals = totals
        for i in np.nonzero(totals > self.limit)[0].tolist():
            where = f"{getattr(store, 'path', 'tokens')}: "
            of_turns = slice(int(starts[i]), int(starts[i + 1]))
            self._split[i] = split_documents(i, rows[of_turns].tolist(), self.limit, where, limit)
        if not count:
            raise InputError("no conversations to train on", file=getattr(store, "path", None))
        if self.masked.all():
            raise InputError(
                "--mask-speaker-ids masks every turn",
                file=getattr(store, "path", None),
                mend="leave at least one speaker to learn from",
            )
        self._plans: dict[int, list[list[list[Document]]]] = {}

    # ---------------------------------------------------------------------------------------------------- planning

    def documents(self, conversation: int) -> list[Document]:
        """The documents of a conversation: one, unless it is longer than the limit."""
        if conversation in self._split:
            return self._split[conversation]
        turns = int(self.first_turn[conversation + 1] - self.first_turn[conversation])
        return [Document(conversation, 0, turns, int(self.totals[conversation]))]

    def order(self, epoch: int) -> np.ndarray:
        """The epoch's order of conversations."""
        return draw(self.data.seed, ORDER, epoch).permutation(len(self.totals))

    def steps_in_epoch(self, epoch: int) -> int:
        """Optimizer steps of an epoch, before anything is read."""
        if self.data.batch_rows is None:
            per_step = self.data.batch_size * self.data.gradient_accumulation
            return -(-len(self.totals) // per_step)
        return len(self._epoch_plan(epoch))

    def _epoch_plan(self, epoch: int) -> list[list[list[Document]]]:
        """batch_rows only: steps of packs of documents, best-fit within windows of the shuffled order."""
        if epoch in self._plans:
            return self._plans[epoch]
        assert self.data.batch_rows is not None
        pack_rows = min(self.data.pack_rows, self.data.batch_rows)
        per_step = max(1, self.data.batch_rows // pack_rows)
        order = self.order(epoch)
        packs: list[list[Document]] = []
        leftover: list[Document] = []
        window = self.data.pack_window
        for first in range(0, len(order), window):
            documents = leftover + [d for c in order[first : first + window] for d in self.documents(int(c))]
            for d in documents:
                if d.rows > pack_rows:
                    raise InputError(
                        f"conversation {d.conversation} needs {d.rows:,} rows; --batch-rows is {pack_rows:,}",
                        mend=f"raise --batch-rows to at least {d.rows}",
                    )
            groups = [[documents[i] for i in g] for g in best_fit([d.rows for d in documents], pack_rows)]
            leftover = []
            if first + window < len(order):
                # The emptiest pack of a window waits for the next one, so only an epoch's end leaves room.
                fullness = [sum(d.rows for d in g) for g in groups]
                leftover = groups.pop(int(np.argmin(fullness)))
            packs += groups
        # Best-fit deals out the longest conversations first; the order of the packs is drawn again.
        shuffled = draw(self.data.seed, ORDER, epoch, 1).permutation(len(packs))
        packs = [packs[i] for i in shuffled]
        plan = [packs[i : i + per_step] for i in range(0, len(packs), per_step)]
        # The epoch being trained and the one being read ahead.
        self._plans = {**{e: p for e, p in self._plans.items() if e == epoch - 1}, epoch: plan}
        return plan

    def plan(self, epoch: int, index: int) -> list[list[Document]]:
        """The packs (lists of documents) of step ``index`` of ``epoch``."""
        if self.data.batch_rows is not None:
            return self._epoch_plan(epoch)[index]
        per_step = self.data.batch_size * self.data.gradient_accumulation
        chosen = self.order(epoch)[index * per_step : (index + 1) * per_step]
        return self.group([d for c in chosen for d in self.documents(int(c))])

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
        parts = [
            _Part(pack, document, *self._rows(document))
            for pack, documents in enumerate(plan)
            # Similar lengths side by side cost nothing and let attention group them.
            for document in sorted(documents, key=lambda d: (d.rows, d.conversation, d.first))
        ]
        canonical = sorted(parts, key=lambda p: (p.document.conversation, p.document.first))
        counts = [int(p.target.sum()) for p in canonical]
        supervised = sum(counts)
        picked = np.zeros(supervised, dtype=bool)
        if supervised:
            wanted = max(1, int(supervised * self.loss.amortization_fraction))
            picked[draw(self.data.seed, *frames_seed).permutation(supervised)[:wanted]] = True
        for part, some in zip(canonical, np.split(picked, np.cumsum(counts)[:-1]), strict=True):
            part.picked = some
        total = sum(float(p.weights[p.target].sum()) for p in parts)
        picked_total = sum(float(p.weights[p.target][p.picked].sum()) for p in parts)
        packs = [self._pack([p for p in parts if p.pack == i], total, picked_total) for i in range(len(plan))]
        conversations = sorted({p.document.conversation for p in parts})
        return StepBatch(packs, epoch, index, conversations, supervised, int(picked.sum()))

    def _rows(self, document: Document) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """tokens [n, K+1] int32, is_audio [n] bool, target [n] bool, weights [n] float64 of one document."""
        turns = self.store.conversation(document.conversation)[document.first : document.last]
        base = int(self.first_turn[document.conversation]) + document.first
        num_codebooks = self.store.num_codebooks
        tokens = np.zeros((document.rows, num_codebooks + 1), dtype=np.int32)
        is_audio = np.zeros(document.rows, dtype=bool)
        target = np.zeros(document.rows, dtype=bool)
        weights = np.ones(document.rows)
        row = 0
        for offset, turn in enumerate(turns):
            text_end = row + len(turn.text)
            tokens[row:text_end, -1] = turn.text
            eos = text_end + len(turn.codes)
            tokens[text_end:eos, :-1] = turn.codes
            is_audio[text_end : eos + 1] = True  # the EOS row is K zeros
            target[text_end : eos + 1] = not self.masked[base + offset]
            weights[eos] = self.loss.eos_weight
            row = eos + 1
        # An audio row that opens a document has no row of its own to be predicted from.
        target[0] = False
        return tokens, is_audio, target, weights

    def _pack(self, parts: list[_Part], total: float, picked_total: float) -> Pack:
        lengths = [p.document.rows for p in parts]
        rows = sum(lengths)
        size = padded_rows(rows, self.data.pack_rows, self.pad)
        if size > rows:
            lengths.append(size - rows)
        tokens = np.zeros((size, self.store.num_codebooks + 1), dtype=np.int32)
        is_audio = np.zeros(size, dtype=bool)
        # The dummy document may be longer than the model's context; nothing reads it, so its positions may wrap.
        positions = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]) % MAX_POSITIONS
        tokens[:rows] = np.concatenate([p.tokens for p in parts])
        is_audio[:rows] = np.concatenate([p.is_audio for p in parts])
        target = np.concatenate([p.target for p in parts])
        weights = np.concatenate([p.weights for p in parts])[target]
        index = np.nonzero(np.concatenate([p.picked for p in parts]))[0]
        return Pack(
            torch.from_numpy(tokens),
            torch.from_numpy(is_audio),
            torch.from_numpy(positions),
            Segments.of(lengths),
            torch.from_numpy(np.nonzero(target)[0]),
            torch.from_numpy(weights / max(total, 1e-300)),
            torch.from_numpy(index),
            torch.from_numpy(weights[index] / max(picked_total, 1e-300)),
            rows,
            int(is_audio.sum()) - sum(p.document.last - p.document.first for p in parts),
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
        thread.join()
