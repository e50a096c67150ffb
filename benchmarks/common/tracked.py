"""Every tensor memory allocation of some code, and the most bytes alive at once.

    with Tracked() as t:
        loss = packed_loss(model, pack, 0.5, 0.5)[0]
        loss.backward()
    t.peak, t.current, max(t.allocations), t.peak_of()

The bytes are those of tensors' storages, in the order of the calls, so the figures do not depend on the machine. They
leave out what the allocator rounds up, workspaces of BLAS libraries, scratch memory that a kernel allocates without a
tensor, and the allocations of code that ``torch.compile`` has compiled. Under any dispatch mode autograd omits a few
in-place operations (it adds gradients of one tensor out of place, and the backward of indexing copies once), so the
peak of code with such operations is a little too high.
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

# The dispatch keys below a Python mode: the kernels of a device.
_KERNELS = torch._C._dispatch_keyset_full_after(torch._C.DispatchKey.Python)


@dataclass(frozen=True, order=True)
class Allocation:
    """A new storage, or one that grew, as an operator left it. Allocations are ordered by size."""

    bytes: int
    order: int
    """0 for the first one."""
    op: str = field(compare=False)
    """The operator, as in "aten::bmm"; inside others, "csm_kernels::linear_cross_entropy > aten::bmm"."""
    shape: tuple[int, ...] = field(compare=False)
    """Of the tensor that the operator returned, which may be a view of the storage."""
    dtype: torch.dtype = field(compare=False)

    def __str__(self) -> str:
        return f"{self.op} gave {list(self.shape)} {str(self.dtype).removeprefix('torch.')}, {self.bytes:,} bytes"


class Tracked(TorchDispatchMode):
    """Follows the storages allocated inside the ``with``, in backward passes and inside custom operators too.

    Attributes:
        peak: the most bytes of these storages that were alive at once.
        current: bytes alive now; it keeps falling when storages are freed after the ``with``.
        allocations: all of them, in order.
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
            # PyTorch turns a mode off while the mode handles a call, which would hide the allocations inside custom
            # operators, and inside PyTorch's own that consist of others. So turn it on again and call the kernel
            # directly, below the mode. (Tensors of a Python class, fake ones for example, have no kernel to call.)
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
        """The most bytes of the chosen allocations that were alive at once, and these, the largest first."""
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
    # ``x // 2``: only the ordinary call turns the 2 into a tensor.
    return has_parts and not any(i < len(args) and isinstance(args[i], (int, float, complex)) for i in places)


@functools.cache
def _facts(func: Any) -> tuple[bool, tuple[int, ...]]:
    """Whether an operator may consist of others, and which of its arguments are tensors.

    Elementwise operators and views do not, and an operator that does not choose its kernel by its tensors cannot be
    called below the mode.
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


def storage_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the tensors' storages, each counted once."""
    storages = [t.untyped_storage() for t in tensors if t is not None]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())
