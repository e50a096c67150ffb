"""The rows, lines and files of ``csm-fast profile``, from what was measured."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from csm_fast.commands.profile_ops import Seen, Several, Shape, Step
from csm_fast.system.errors import InputError
from csm_fast.system.files import write_file

SHOWN = 10  # operators in the table
Sizes = list[int | list[int]]  # a dimension, or [least, largest] where it differs from step to step


@dataclass(frozen=True)
class Rates:
    """What the machine does, measured in the same run: FLOP/s of large matrix products by type, and bytes/s (read and
    written together) of a copy between buffers larger than the caches."""

    products: dict[str, float]
    copy: float


@dataclass
class Row:
    """One operator, per step.

    Attributes:
        kind: "product" (it has FLOPs), "memory" (it moves bytes), or "python": an autograd function of ours, outside of
            the operators it calls; an estimate from the profiler's self times.
        shapes: of its inputs.
        calls, ms, flops, bytes, floor_ms: of all calls in a step; a floor of 0: nothing has to be computed or moved.
        share: of the step's wall time.
        timed: "clock" or "profiler".
    """

    name: str
    kind: str
    shapes: list[Sizes | str]
    dtypes: str
    calls: float
    ms: float
    share: float
    flops: float
    bytes: float
    floor_ms: float
    timed: str


@dataclass
class Summary:
    """One step, on average; milliseconds.

    Attributes:
        step_ms: wall time without the profiler, with the wait for the loader.
        first_ms: the same over packs that come for the first time, as in training: on a CPU, products of new shapes
            are built.
        profiled_ms: under the profiler.
        clocked_ms: under the clock; None where operators were timed by the profiler.
        loader_ms: waiting for the next packs.
        operators_ms: in operators; ``scale`` times what was measured, below 1 where the measuring took the time.
        products_ms: in matrix products.
        host_ms: the rest: Python and dispatch; on a GPU, time in which it stood idle.
        floor_ms: sum of the operators' floors, none taken above its operator's time.
        products_floor_ms: of the products.
    """

    steps: int
    rows: float
    step_ms: float
    first_ms: float
    profiled_ms: float
    clocked_ms: float | None
    loader_ms: float
    operators_ms: float
    products_ms: float
    host_ms: float
    floor_ms: float
    products_floor_ms: float
    scale: float
    matmul_flops_per_s: dict[str, float]
    copy_bytes_per_s: float


# --------------------------------------------------------------------------------------------------------------- rows


def merged(steps: list[Step]) -> dict[tuple, list[tuple[tuple[Shape, ...], Seen]]]:
    """Operators of all steps, together where they differ only in dimensions that differ from step to step, such as the
    rows of a pack."""
    every = [{n for _, shapes, _ in step for shape in shapes for n in _numbers(shape)} for step in steps]
    constant = set.intersection(*every) if every else set()

    def pattern(shape: Shape) -> tuple:
        kind = "list" if isinstance(shape, Several) else "tensor"
        return kind, *(n if n in constant else None for n in _numbers(shape))

    groups: dict[tuple, list[tuple[tuple[Shape, ...], Seen]]] = {}
    for step in steps:
        for (name, shapes, types), seen in step.items():
            groups.setdefault((name, tuple(map(pattern, shapes)), types), []).append((shapes, seen))
    return groups


def _numbers(shape: Shape) -> tuple[int, ...]:
    return (shape.tensors, shape.elements) if isinstance(shape, Several) else shape


def _sizes(shapes: Iterable[Shape]) -> Sizes | str:
    """One input over all steps."""
    several = list(shapes)
    columns = [sorted(set(column)) for column in zip(*map(_numbers, several), strict=True)]
    sizes: Sizes = [c[0] if len(c) == 1 else [c[0], c[-1]] for c in columns]
    if several and isinstance(several[0], Several):
        return f"{_span(sizes[0])} tensors, {_span(sizes[1])} elements"
    return sizes


def operator_rows(steps: list[Step], step_ms: float, scale: float, rates: Rates, timed: str) -> list[Row]:
    """A row per operator, the costliest first."""
    rows = []
    for (name, _, types), group in merged(steps).items():
        calls, seconds, flops, moved = (
            sum(getattr(seen, field) for _, seen in group) / len(steps)
            for field in ("calls", "seconds", "flops", "bytes")
        )
        shapes = [_sizes(column) for column in zip(*(shapes for shapes, _ in group), strict=True)]
        ms, kind = 1000 * seconds * scale, "product" if flops else "memory"
        floor = 1000 * max(flops / product_rate(rates, types) if flops else 0.0, moved / rates.copy)
        rows.append(Row(name, kind, shapes, types, calls, ms, ms / step_ms, flops, moved, floor, timed))
    return sorted(rows, key=lambda row: -row.ms)


def product_type(types: str) -> str:
    """The type whose rate counts for a product: its first operand's."""
    return types.split()[0] if types else ""


def product_rate(rates: Rates, types: str) -> float:
    return rates.products.get(product_type(types)) or max(rates.products.values())


def python_rows(
    seconds: dict[str, tuple[float, float]], profiled_host: float, host_ms: float, step_ms: float
) -> list[Row]:
    """Rows of our autograd functions: their share of the profiler's host time, of the host time without it.

    Args:
        seconds: by function, (calls, seconds outside of operators under the profiler) per step.
        profiled_host: seconds per step outside of operators under the profiler.
        host_ms: the same without it, in milliseconds.
    """
    rows = []
    for name, (calls, own) in seconds.items():
        ms = host_ms * min(1.0, own / profiled_host) if profiled_host > 0 else 0.0
        rows.append(Row(name, "python", [], "", calls, ms, ms / step_ms, 0, 0, 0.0, "profiler"))
    return rows


# ------------------------------------------------------------------------------------------------------------ in words


def table(rows: list[Row], count: int = SHOWN) -> list[str]:
    """The costliest rows, as text."""
    head = ("operator", "inputs", "calls", "ms", "share", "reached", "floor ms", "x floor")
    cells = [head, *(_cells(row) for row in sorted(rows, key=lambda row: -row.ms)[:count])]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    aligned = ("<", "<", ">", ">", ">", ">", ">", ">")
    lines = ["  ".join(f"{c:{a}{w}}" for c, a, w in zip(line, aligned, widths, strict=True)) for line in cells]
    return [line.rstrip() for line in lines]


def _cells(row: Row) -> tuple[str, ...]:
    seconds = row.ms / 1000
    if row.kind == "python":
        reached, floor, times = "Python", "-", "-"
    else:
        rate = (row.flops if row.kind == "product" else row.bytes) / seconds if seconds > 0 else 0.0
        reached = f"{rate / 1e9:,.1f} {'GFLOP/s' if row.kind == 'product' else 'GB/s'}"
        floor = f"{row.floor_ms:.2f}"
        times = f"{row.ms / row.floor_ms:.1f}" if row.floor_ms > 0 else "-"
    name = row.name.removeprefix("aten::") + (f" {row.dtypes}" if row.dtypes else "")
    inputs = " ".join(_words(shape) for shape in row.shapes[:3]) + " ..." * (len(row.shapes) > 3)
    return name[:56], inputs[:64], f"{row.calls:g}", f"{row.ms:.2f}", f"{row.share:.1%}", reached, floor, times


def _words(shape: Sizes | str) -> str:
    return f"[{shape}]" if isinstance(shape, str) else "[" + ", ".join(map(_span, shape)) + "]"


def _span(size: int | list[int]) -> str:
    return f"{size[0]}-{size[1]}" if isinstance(size, list) else str(size)


def lines(summary: Summary, rows: list[Row], rest: str) -> list[str]:
    """What is printed: the table, then the step as a whole; ``rest`` is what its time outside of operators is."""
    s = summary
    share = {k: v / s.step_ms for k, v in vars(s).items() if isinstance(v, float) and k.endswith("_ms")}
    rates = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {name}" for name, rate in s.matmul_flops_per_s.items())
    measured = f"{s.profiled_ms:.1f} ms under the profiler"
    if s.clocked_ms is not None:
        measured += f", {s.clocked_ms:.1f} ms under the clock that timed the operators"
    if s.scale < 1:
        measured += f"; operators' times are {s.scale:.2f} of what was measured, so that they fit the step"
    return [
        *table(rows),
        "",
        f"Machine   large matrix products {rates}; copies {s.copy_bytes_per_s / 1e9:,.1f} GB/s, read and written",
        f"Measured  {s.first_ms:.1f} ms for packs that come for the first time; {measured}",
        f"Step      {s.step_ms:.1f} ms of {s.rows:,.0f} rows, means of {s.steps} steps; sum of the floors "
        f"{s.floor_ms:.1f} ms ({share['floor_ms']:.0%}); matrix products {share['products_ms']:.0%}, of which "
        f"{_ratio(s):.0%} is their floor; {rest} {share['host_ms']:.1%}; waiting for the loader "
        f"{share['loader_ms']:.1%}",
    ]


def _ratio(s: Summary) -> float:
    return s.products_floor_ms / s.products_ms if s.products_ms else 0.0


# --------------------------------------------------------------------------------------------------------------- files


def write_rows(path: Path, rows: list[Row], about: dict[str, Any], summary: Summary) -> None:
    """JSON lines: one per operator ("row": "operator"), and a last one ("row": "step") with the summary and ``about``.

    Raises:
        InputError: the disk.
    """
    dicts = [{"row": "operator", **vars(row)} for row in rows]
    dicts.append({"row": "step", **vars(summary), **about})
    try:
        write_file(path, "".join(json.dumps(d, allow_nan=False) + "\n" for d in dicts))
    except OSError as error:
        raise not_written(error, path) from None


def not_written(error: Exception, path: Path) -> InputError:
    """The one line for a directory or file that cannot be written."""
    reason = getattr(error, "strerror", None) or str(error)
    return InputError(f"the profile could not be written ({reason})", file=path, mend="choose another --output")
