"""Which tensor memory a stretch of code asks for: every allocation, and the most bytes alive at once.

    with Tracked() as t:
        loss = packed_loss(model, pack, 0.5, 0.5)[0]
        loss.backward()
    t.peak, t.current, max(t.allocations), t.peak_of()

What is counted is tensor storage, exactly and in the order of the calls, so the figures do not depend on the machine.
Not in it: an allocator's rounding, workspaces of BLAS libraries, scratch that a kernel takes without asking for a
tensor, and what code that ``torch.compile`` has turned into kernels allocates. Under any dispatch mode autograd forgoes
a few in-place steps (it adds gradients that meet out of place, and indexing's backward copies once), so code that
depends on those is shown a little above its true peak.
"""

from __future__ import annotations

import functools
import itertools
import operator
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# What is left to choose between once a mode has been asked: the kernels of a device.
_KERNELS = torch._C._dispatch_keyset_full_after(torch._C.DispatchKey.Python)


@dataclass(frozen=True, order=True)
class Allocation:
    """A storage that was born, or that grew, as an operator left it. They are ordered by size."""

    bytes: int
    order: int
    """0 for the first one."""
    op: str = field(compare=False)
    """The operator, as in "aten::bmm"; inside others, "csm_kernels::linear_cross_entropy > aten::bmm"."""
    shape: tuple[int, ...] = field(compare=False)
    """Of the tensor that came with it. A view's, where the operator returned a view of it."""
    dtype: torch.dtype = field(compare=False)

    def __str__(self) -> str:
        return f"{self.op} gave {list(self.shape)} {str(self.dtype).removeprefix('torch.')}, {self.bytes:,} bytes"


class Tracked(TorchDispatchMode):
    """Follows the storages born inside the ``with``, in backward passes and inside custom operators too.

    Attributes:
        peak: most bytes alive at once of the storages born inside.
        current: bytes alive now; it keeps falling when storages are collected after the ``with``.
        allocations: every birth, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.current = 0
        self.allocations: list[Allocation] = []
        self._alive: dict[int, tuple[int, int]] = {}  # bytes and last record, by address of the StorageImpl
        self._changes: list[tuple[int, int]] = []  # record and bytes more or less, as they came
        self._inside: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = list(_tensors((*args, *kwargs.values())))
        keys = functools.reduce(operator.or_, map(torch._C._dispatch_keys, inputs)) if inputs else None
        if keys is None or keys.has(torch._C.DispatchKey.Python) or not _can_open(func, args):
            out = func(*args, **kwargs)
        else:
            # A mode is off while it serves a call, so what an operator allocates on its way would not be seen: custom
            # operators, and PyTorch's own that consist of others. So it is switched on again and the kernel called
            # directly, past the place where modes are asked. (Tensors of a Python class, fake ones say, have no kernel
            # to call.)
            self._inside.append(func.name())
            try:
                with self:
                    out = func.redispatch(keys & _KERNELS, *args, **kwargs)
            finally:
                self._inside.pop()
        there: set[int] | None = None
        for x in _tensors((out,)):
            for part in _parts(x):
                storage = part.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self._alive:
                    if there is None:
                        there = {p.untyped_storage()._cdata for i in inputs for p in _parts(i)}
                    if key in there:  # an input from before the ``with``
                        continue
                    self._alive[key] = 0, -1
                    weakref.finalize(storage, self._die, key).atexit = False
                before, record = self._alive[key]
                if size > before:
                    record = len(self.allocations)
                    name = " > ".join((*self._inside, func.name()))
                    self.allocations.append(Allocation(size, record, name, tuple(part.shape), part.dtype))
                if size != before:
                    self._change(record, size - before)
                    self._alive[key] = size, record
        return out

    def record_of(self, x: Tensor) -> int:
        """The ``order`` of the allocation that ``x`` lies in, -1 for one from before the ``with``."""
        return self._alive.get(x.untyped_storage()._cdata, (0, -1))[1]

    def _change(self, record: int, more: int) -> None:
        self.current += more
        self.peak = max(self.peak, self.current)
        self._changes.append((record, more))

    def _die(self, key: int) -> None:
        size, record = self._alive.pop(key)
        if size:
            self._change(record, -size)

    def peak_of(self, chosen: Callable[[Allocation], bool] = lambda _: True) -> tuple[int, list[Allocation]]:
        """Most bytes alive at once of the chosen allocations, and what they were then, the largest first."""
        wanted = [chosen(a) for a in self.allocations]
        changes = [(record, more) for record, more in self._changes if wanted[record]]
        totals = list(itertools.accumulate((more for _, more in changes), initial=0))
        peak = max(totals)
        held = [0] * len(wanted)
        for record, more in changes[: totals.index(peak)]:
            held[record] += more
        return peak, sorted((a for a in self.allocations if held[a.order] > 0), reverse=True)


def _can_open(func: Any, args: Any) -> bool:
    has_parts, places = _facts(func)
    # ``x // 2``: only the ordinary call makes a tensor of the 2 again.
    return has_parts and not any(i < len(args) and isinstance(args[i], (int, float, complex)) for i in places)


@functools.cache
def _facts(func: Any) -> tuple[bool, tuple[int, ...]]:
    """Whether it may consist of others, and which of its arguments are tensors.

    Not what works element by element, views, and what looks for its kernels in another way than by its tensors.
    """
    by_device = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "BackendSelect")
    has_parts = not by_device and not func.is_view and torch.Tag.pointwise not in func.tags
    return has_parts, tuple(i for i, a in enumerate(func._schema.arguments) if "Tensor" in str(a.type))


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _parts(x: Tensor) -> tuple[Tensor, ...]:
    """The tensors that hold the storage of ``x``."""
    return (x._indices(), x._values()) if x.layout == torch.sparse_coo else (x,)
