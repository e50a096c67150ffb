"""Which documents share a pack, and to which sizes packs are padded. No torch: the planner uses it."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from csm_fast.system.errors import InputError

MAX_POSITIONS = 2048  # csm-1b's context


class Store(Protocol):
    """What packing needs of a ``TokenStore``. With a ``read_turns`` as well, many turns are read at once."""

    num_conversations: int
    num_codebooks: int

    def turn_lengths(self) -> tuple[np.ndarray, ...]:
        """Four arrays [turns]: text ids, frames, speaker and conversation of each turn."""

    def conversation(self, index: int, /) -> Sequence[Any]:
        """The turns of a conversation, each with ``text`` int32 [n] and ``codes`` uint16 [frames, K]."""


class Document(NamedTuple):
    """Consecutive turns of one conversation that attend to each other: turns [first, last)."""

    conversation: int
    first: int
    last: int
    rows: int


def split_documents(
    conversation: int, turn_rows: Sequence[int], limit: int, where: str = "", context: int = MAX_POSITIONS
) -> list[Document]:
    """Cut a conversation at turn ends so that no document exceeds ``limit`` rows.

    Turns are taken greedily in order. A turn is never cut: one part would have no EOS row, or an invented one.

    Args:
        turn_rows: rows of each turn.
        limit: most rows of a document: the pack's, or the model's ``context`` where that is smaller.
        where: what errors begin with.

    Raises:
        InputError: one turn alone exceeds the limit.
    """
    documents, first, rows = [], 0, 0
    for turn, n in enumerate(turn_rows):
        if n > limit:
            what = f"{where}conversation {conversation}, turn {turn + 1} has {n:,} rows"
            if n <= context:
                mend = f"raise --pack-rows to at least {n}"
                raise InputError(f"{what}; a pack here holds {limit:,}", mend=mend)
            raise InputError(f"{what}; the model's context is {context:,}", mend="cut the recording with start and end")
        if rows + n > limit:
            documents.append(Document(conversation, first, turn, rows))
            first, rows = turn, 0
        rows += n
    documents.append(Document(conversation, first, len(turn_rows), rows))
    return documents


def best_fit(sizes: np.ndarray, budget: int) -> tuple[np.ndarray, np.ndarray]:
    """Best-fit decreasing: group items so that no group's sum of sizes exceeds ``budget``.

    The largest item goes first, each into the fullest group that still has room for it. O(n log n) look-ups.

    Args:
        sizes: int64 [n], each at most ``budget``.

    Returns:
        Indices of ``sizes``, group after group, int64 [n]; how many items each group has, int64 [groups].
    """
    order = np.argsort(-sizes, kind="stable")
    sizes = sizes[order]
    if len(sizes) and sizes[0] > budget:
        raise ValueError(f"an item of {sizes[0]} rows cannot fit a budget of {budget}")
    # A group with room is one number, its free rows above its index: sorted by room, then by age.
    bits = len(sizes).bit_length()
    room: list[int] = []
    keys: list[int] = []
    opened = 0
    for size in (sizes << bits).tolist():
        place = bisect.bisect_left(room, size)
        if place == len(room):
            key = (budget << bits) + opened
            opened += 1
        else:
            key = room.pop(place)
        key -= size
        bisect.insort(room, key)
        keys.append(key)
    groups = np.array(keys, dtype=np.int64) & ((1 << bits) - 1)
    return order[np.argsort(groups, kind="stable")], np.bincount(groups, minlength=opened)


# Sizes of packs per device: (multiple, largest step as a share of the size). Few different sizes mean that nothing
# recompiles on CUDA after the first steps. On a CPU, oneDNN builds each matrix product once per shape, in half a
# millisecond: for a pack of 340 rows and a new size, a fifth of the step's time.
LADDERS = {"cuda": (64, 0.12), "cpu": (16, 0.03)}


def padded_rows(rows: int, budget: int, device: str = "cuda") -> int:
    """The next size of the device's ladder of pack sizes, at most ``budget``; ``rows`` for a device without one."""
    if device not in LADDERS or rows > budget:
        return rows
    sizes = _list_sizes(device, budget)
    return sizes[bisect.bisect_left(sizes, rows)]


@functools.lru_cache(maxsize=16)
def _list_sizes(device: str, budget: int) -> list[int]:
    """Sizes up to the budget, which is the last."""
    multiple, step = LADDERS[device]
    sizes = [multiple]
    while sizes[-1] < budget:
        sizes.append(sizes[-1] + max(multiple, int(sizes[-1] * step) // multiple * multiple))
    return [*(size for size in sizes if size < budget), budget]
