"""Where the segments of a pack lie, and how segments of similar length share one call.

Every layer attends to the same segments, forward and backward. Their plan is made once, and found again by the bytes of
``cu_seqlens``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from csm_kernels.cpu.attention import Order
    from csm_kernels.cpu.folded_attention import Fold

# Segments whose lengths differ by less than this share one call: at speech lengths attention is a small part of the
# work, and the overhead of a call is not.
GROUP_RATIO, GROUP_SLACK = 1.25, 8


@dataclass(frozen=True)
class Groups:
    """Segments of similar length, padded to the longest of them, so that each group is one call.

    Attributes:
        shapes: (segments, width) of each group.
        index: [B] int64, the packed row that each row of the flattened groups reads; padding reads the segment's last.
        padding: [P] int64, the rows of the flattened groups that are padding.
        restore: [T] int64, where each packed row lies in the flattened groups; None where the one group is the pack.
    """

    shapes: tuple[tuple[int, int], ...]
    index: Tensor
    padding: Tensor
    restore: Tensor | None

    def to(self, device: torch.device) -> Groups:
        """A copy on ``device``."""
        restore = None if self.restore is None else self.restore.to(device)
        return Groups(self.shapes, self.index.to(device), self.padding.to(device), restore)


@dataclass(frozen=True)
class SegmentPlan:
    """Where the segments of a pack of T rows lie.

    Attributes:
        rows: T.
        bounds: [S + 1] int64 on the CPU, ``cu_seqlens``.
        longest: rows of the longest segment.
    """

    rows: int
    bounds: Tensor
    longest: int
    folds: dict[tuple[int, int], Fold] = field(default_factory=dict, repr=False, compare=False)
    copies: dict[torch.device, Groups] = field(default_factory=dict, repr=False, compare=False)

    @functools.cached_property
    def groups(self) -> Groups:
        """On the CPU; made on first use, because variable-length kernels and the C++ library do not need them."""
        return _groups(self.bounds.numpy())

    def groups_on(self, device: torch.device) -> Groups:
        """On ``device``. Copied once, because a copy from pageable memory waits for the device."""
        if device not in self.copies:
            self.copies[device] = self.groups.to(device)
        return self.copies[device]

    def fold(self, heads: int, kv_heads: int) -> Fold:
        """The order of rows in ``cpu.folded_attention``, made once."""
        if (heads, kv_heads) not in self.folds:
            from csm_kernels.cpu import folded_attention

            groups = self.groups
            with torch.inference_mode(False), torch.no_grad():
                live = torch.ones(len(groups.index), dtype=torch.bool).index_fill_(0, groups.padding, False)
                order = folded_attention.fold(groups.index, live, groups.shapes, heads, kv_heads)
            self.folds[heads, kv_heads] = order
        return self.folds[heads, kv_heads]

    def order(self, heads: int, kv_heads: int) -> Order:
        """The segments for ``cpu.attention``."""
        from csm_kernels.cpu.attention import Order

        return Order(self.bounds, self.longest, heads, kv_heads, lambda: self.fold(heads, kv_heads))


def plan_segments(cu_seqlens: Sequence[int] | Tensor) -> SegmentPlan:
    """The plan of a pack's segments, on the CPU.

    Args:
        cu_seqlens: [S + 1] cumulative lengths from 0 to the number of rows; segments may be empty. The host waits for a
            tensor on another device.

    Raises:
        ValueError: lengths that do not begin at 0, or decrease, or hold no row.
    """
    return _plan_from_bytes(torch.as_tensor(cu_seqlens, dtype=torch.int32, device="cpu").numpy().tobytes())


@functools.lru_cache(maxsize=64)
def _plan_from_bytes(cu_seqlens: bytes) -> SegmentPlan:
    cu = np.frombuffer(cu_seqlens or bytes(4), dtype=np.int32).astype(np.int64)
    size = np.diff(cu)
    if cu[0] != 0 or cu[-1] < 1 or size.min() < 0:
        raise ValueError("cu_seqlens must rise from 0 to the number of rows, of which there must be one")
    # Under inference_mode the tensors could not be used in training later.
    with torch.inference_mode(False), torch.no_grad():
        return SegmentPlan(int(cu[-1]), torch.from_numpy(cu), int(size.max()))


def _groups(cu: np.ndarray) -> Groups:
    size = np.diff(cu)
    start, size = cu[:-1][size > 0], size[size > 0]
    order = np.argsort(size, kind="stable")
    starts, ends = start[order, None], size[order, None]
    sorted_sizes = size[order].tolist()
    shapes: list[tuple[int, int]] = []
    index, live, first = [], [], 0
    while first < len(sorted_sizes):
        last = first
        while last < len(sorted_sizes) and sorted_sizes[last] <= sorted_sizes[first] * GROUP_RATIO + GROUP_SLACK:
            last += 1
        width = sorted_sizes[last - 1]
        column = np.arange(width)
        index.append((starts[first:last] + np.minimum(column, ends[first:last] - 1)).ravel())
        live.append((column < ends[first:last]).ravel())
        shapes.append((last - first, width))
        first = last
    rows, flat, is_live = int(cu[-1]), np.concatenate(index), np.concatenate(live)
    with torch.inference_mode(False), torch.no_grad():
        restore = None
        if shapes != [(1, rows)]:
            places = np.empty(rows, dtype=np.int64)
            places[flat[is_live]] = np.flatnonzero(is_live)
            restore = torch.from_numpy(places)
        padding = torch.from_numpy(np.flatnonzero(~is_live))
        return Groups(tuple(shapes), torch.from_numpy(flat), padding, restore)
