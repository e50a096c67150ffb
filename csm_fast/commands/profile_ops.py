"""What the operators of a step are, how often they run, how long, and the least they must compute and move.

Two ways to see them. ``OperatorClock`` times every operator that reaches PyTorch's dispatcher, one clock reading before
and one after it, and keeps no event: the memory of the step stays as it is, so this is how operators are timed on a CPU
in eager mode. ``from_profiler`` reads ``torch.profiler``'s events, by self time: on a GPU (time on the device), and
where layers are compiled, which the clock would undo.
"""

from __future__ import annotations

import functools
import math
import re
import time
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class Several(NamedTuple):
    """In the place of a shape: a list of tensors."""

    tensors: int
    elements: int


Shape = tuple[int, ...] | Several
Key = tuple[str, tuple[Shape, ...], str]  # name, shapes of the tensors given, their types


@dataclass
class Seen:
    """The calls of one operator with the same shapes: how many, and seconds, FLOPs and bytes of all of them."""

    calls: int = 0
    seconds: float = 0.0
    flops: int = 0
    bytes: int = 0


Step = dict[Key, Seen]

ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_"}
OVERWRITES = {"copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "bernoulli_", "exponential_"}
GATHERS = {"index_select", "embedding", "gather", "index", "take", "take_along_dim"}
SCATTERS = {"index_add_", "index_put_", "scatter_add_", "index_copy_", "index_fill_", "scatter_"}
SCRATCH = "scratch"  # an operator's own memory, by the name of the argument: of no interest, and it stays in the caches
ADDING = {"index_add_", "scatter_add_"}  # these read what they write
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}


# ---------------------------------------------------------------------------------------------------------- the clock


class OperatorClock(TorchDispatchMode):
    """Times the operators that run under it on a CPU. Views count as dispatch. A registered operator of ours is one
    operator, with whatever it calls. Operators below an autograd function are seen, the function itself is not.

    Attributes:
        steps: one dictionary per call of ``begin``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self._views: dict[Any, bool] = {}
        self._needs: dict[tuple[Any, Key], tuple[int, int]] = {}
        self.overhead = _call_seconds()
        self.begin()
        with self:  # the first operator under any mode imports PyTorch's compiler, for seconds
            torch.zeros(1)
        self.steps.clear()

    def begin(self) -> None:
        """What follows belongs to the next step."""
        self.steps.append({})

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        view = self._views.get(func)
        if view is None:
            view = self._views[func] = is_view(func) or func.namespace == "profiler"
        if view:
            return func(*args, **kwargs)
        started = time.perf_counter()
        out = func(*args, **kwargs)
        seconds = time.perf_counter() - started
        given = list(args) + list(kwargs.values())
        if func.namespace == "csm_kernels":
            given = [x for a, x in zip(func._schema.arguments, given, strict=False) if a.name != SCRATCH]
        key = func._schema.name, tuple(_shapes(given)), _types(given, out)
        needs = self._needs.get((func, key))
        if needs is None:
            needs = self._needs[func, key] = flops_of(func, args, kwargs, out), bytes_of(func, args, kwargs, out)
        seen = self.steps[-1].setdefault(key, Seen())
        seen.calls += 1
        seen.seconds += max(0.0, seconds - self.overhead)
        seen.flops += needs[0]
        seen.bytes += needs[1]
        return out


def _call_seconds(calls: int = 1000) -> float:
    """What calling an operator from Python takes when there is nothing to do: the fastest of many."""
    x, nothing = torch.zeros(1), torch.ops.aten.detach.default
    best = math.inf
    for _ in range(calls):
        started = time.perf_counter()
        nothing(x)
        best = min(best, time.perf_counter() - started)
    return best


def is_view(func: Any) -> bool:
    """Whether an operator's result is one of its inputs, seen in another way."""
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [x for x in value if isinstance(x, Tensor)] if isinstance(value, list | tuple) else []


def _shapes(given: Iterable[Any]) -> Iterable[Shape]:
    for value in given:
        if isinstance(value, Tensor):
            yield tuple(value.shape)
        elif found := _tensors(value):
            yield Several(len(found), sum(x.numel() for x in found))


def _types(given: Iterable[Any], out: Any) -> str:
    """The types of the numbers that go in and come out, without repetitions: "bf16", "bf16 fp32"."""
    every = [x.dtype for value in [*given, out] for x in _tensors(value)]
    return " ".join(dict.fromkeys(short_type(t) for t in every))


def short_type(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    return SHORT.get(name, name)


def flops_of(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> int:
    """Of a matrix product or an attention, by PyTorch's formulas; 0 of everything else."""
    formula = flop_registry.get(func._overloadpacket)
    return int(formula(*args, **kwargs, out_val=out)) if formula else 0


def _size(x: Tensor) -> int:
    """Bytes of a tensor in memory; what is repeated by a stride of 0 lies there once."""
    if x.layout != torch.strided:
        return x.numel() * x.element_size()
    numel = math.prod(n for n, stride in zip(x.shape, x.stride(), strict=True) if stride != 0)
    return numel * x.element_size()


def bytes_of(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> int:
    """The least that an operator moves: every input read once, every result written once. Gathers and scatters move
    the rows they touch; what is overwritten is not read; memory that is only taken moves nothing."""
    name = func._schema.name.split("::")[-1]
    if name in ALLOCATIONS:
        return 0
    named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    if name == "_embedding_bag" or name == "_embedding_bag_forward_only":
        weight, indices = named["weight"], named["indices"]
        return indices.numel() * weight.shape[-1] * weight.element_size() + _size(indices) + _size(out[0])
    if name in SCATTERS:
        return _scattered(name, named)
    if name == "adamw_":
        return _updated(named)
    if name == "sum_of_squares" and named["rows"] is not None:
        return _size(named["rows"]) + len(named["rows"]) * _size(named["x"][:1])
    if name in GATHERS:
        indices = [x for a, value in named.items() if a in ("index", "indices") for x in _tensors(value)]
        return 2 * sum(_size(x) for x in _tensors(out)) + sum(_size(x) for x in indices)
    total = 0
    for argument in func._schema.arguments:
        if argument.name == SCRATCH:
            continue
        found = sum(_size(x) for x in _tensors(named.get(argument.name)))
        if argument.alias_info is None or not argument.alias_info.is_write:
            total += found
        else:  # written, and read before unless it is only where the result goes
            total += found if argument.is_out or name in OVERWRITES else 2 * found
    fresh = [r.alias_info is None for r in func._schema.returns]
    outs = out if isinstance(out, list | tuple) and len(fresh) > 1 else [out]
    return total + sum(_size(x) for value, new in zip(outs, fresh, strict=False) if new for x in _tensors(value))


def _updated(named: dict[str, Any]) -> int:
    """AdamW reads every gradient; the rest, read and written, of the rows that ever had one."""
    there = [named[name] for name in ("weight", "exp_avg", "exp_avg_sq", "compensation")]
    live = named["live"]
    share = 1.0 if live is None else live.float().mean().item()
    return _size(named["grad"]) + round(2 * share * sum(_size(x) for x in there if x is not None))


def _scattered(name: str, named: dict[str, Any]) -> int:
    x, index = named["self"], named.get("index", named.get("indices"))
    indices = _tensors(index)
    source = next((named[n] for n in ("source", "src", "values") if isinstance(named.get(n), Tensor)), None)
    if name == "index_fill_":
        touched, source = _size(x) // max(1, x.shape[named["dim"]]) * indices[0].numel(), None
    else:
        touched = min(_size(x), _size(source)) if source is not None else _size(x)
    read = _size(source) if source is not None else 0
    return touched * (2 if name in ADDING or named.get("accumulate") else 1) + read + sum(map(_size, indices))


# ------------------------------------------------------------------------------------------------ the profiler's events

STEP = "csm_fast step"  # the profiler's mark around each step
_HOST = re.compile(
    r"autograd::|torch::autograd::|\w+Backward\d*$|Optimizer\.|ProfilerStep|Torch-Compiled Region|CompiledFunction"
    r"|## Call |AOTDispatcher|TorchDynamo|Pregraph|detach$|cuda[A-Z]|" + STEP
)
_ITEM = {
    "float": ("fp32", 4),
    "double": ("fp64", 8),
    "c10::BFloat16": ("bf16", 2),
    "c10::Half": ("fp16", 2),
    "int": ("int32", 4),
    "long": ("int64", 8),
    "long int": ("int64", 8),
    "short": ("int16", 2),
    "bool": ("bool", 1),
    "unsigned char": ("uint8", 1),
    "signed char": ("int8", 1),
    "unsigned short": ("uint16", 2),
    "c10::complex<float>": ("complex64", 8),
}


def from_profiler(events: Iterable[Any], device_type: str, default: tuple[str, int] = ("fp32", 4)) -> list[Step]:
    """Operators by self time, one dictionary for each mark named ``STEP``; what lies outside of them is left out.

    Args:
        events: ``profile.events()``, recorded with shapes.
        device_type: "cuda": seconds on the device, of what ran there; "cpu": seconds of the host.
        default: the type, and its bytes, of inputs of which the profiler tells none.
    """
    events = [e for e in events if e.device_type == torch.autograd.DeviceType.CPU and not e.is_async]
    starts = sorted(e.time_range.start for e in events if e.name == STEP)
    steps: list[Step] = [{} for _ in starts]
    for e in events:
        micros = e.self_cpu_time_total if device_type == "cpu" else e.self_device_time_total
        place = bisect_right(starts, e.time_range.start) - 1
        if place < 0 or micros <= 0 or (device_type == "cpu" and not is_operator(e.name)):
            continue
        shapes, types, sizes = _inputs(e, default)
        seen = steps[place].setdefault((e.name, shapes, " ".join(dict.fromkeys(types))), Seen())
        seen.calls += 1
        seen.seconds += micros * 1e-6
        flops = flops_by_shape(e.name, shapes)
        seen.flops += flops
        seen.bytes += bytes_by_shape(e.name, shapes, sizes)
    return steps


@functools.cache
def is_operator(name: str) -> bool:
    """Whether the host does a step's work in what the profiler calls ``name``: no view, no engine, no annotation, no
    autograd function."""
    if _HOST.match(name) or name in own_functions():
        return False
    space, _, short = name.partition("::")
    packet = getattr(torch.ops.aten, short, None) if space == "aten" else None
    return packet is None or not is_view(getattr(packet, packet.overloads()[0]))


def own_functions() -> set[str]:
    """Names of csm_fast's autograd functions, as the profiler shows them: forward, and with "Backward" behind."""
    found, left = set(), list(torch.autograd.Function.__subclasses__())
    while left:
        cls = left.pop()
        left += cls.__subclasses__()
        if cls.__module__.split(".")[0] in ("csm_fast", "csm_kernels"):
            found |= {cls.__name__, cls.__name__ + "Backward"}
    return found


def _inputs(event: Any, default: tuple[str, int]) -> tuple[tuple[Shape, ...], list[str], list[int]]:
    """Shapes, types and bytes of an event's tensors."""
    given = getattr(event, "structured_input_shapes", None) or event.input_shapes or []
    names = getattr(event, "input_dtypes", None) or [""] * len(given)
    shapes: list[Shape] = []
    types, sizes = [], []
    for shape, name in zip(given, names, strict=False):
        kind, size = _ITEM.get(name, default)
        if not shape:  # a number, nothing, or a tensor of one element
            continue
        if isinstance(shape[0], list):
            shapes.append(Several(len(shape), sum(math.prod(s) for s in shape)))
            elements = shapes[-1].elements  # type: ignore[union-attr]
        else:
            shapes.append(tuple(shape))
            elements = math.prod(shape)
        types.append(kind)
        sizes.append(elements * size)
    return tuple(shapes), types, sizes


def flops_by_shape(name: str, shapes: tuple[Shape, ...]) -> int:
    """Of aten's matrix products; 0 of everything else."""
    operands = _operands(name, shapes)
    if operands:
        a, b = (shapes[i] for i in operands)
        return 2 * math.prod(a) * b[-1]
    return 0


def _operands(name: str, shapes: tuple[Shape, ...]) -> tuple[int, int] | None:
    """Where the two matrices of a product stand among its inputs; None for what is no product."""
    first = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::baddbmm": 1}.get(name)
    return None if first is None or len(shapes) < first + 2 else (first, first + 1)


def bytes_by_shape(name: str, shapes: tuple[Shape, ...], sizes: list[int]) -> int:
    """``bytes_of`` where only the inputs are known: the result is taken to be as large as the largest input."""
    short = name.split("::")[-1]
    if short in ALLOCATIONS or not sizes:
        return 0
    if operands := _operands(name, shapes):
        a, b = operands
        out = math.prod(shapes[a][:-1]) * shapes[b][-1] * sizes[b] // max(1, math.prod(shapes[b]))
        return sum(sizes[: b + 1]) + out
    if name.startswith("triton_"):  # a compiled kernel's results are among its arguments
        return sum(sizes)
    if short in OVERWRITES:
        return sum(sizes)
    if short in GATHERS or short in SCATTERS:
        rest = sizes[1:]
        return 2 * max(rest, default=0) + sum(rest)
    return sum(sizes) + (sizes[0] if short.endswith("_") else max(sizes))
