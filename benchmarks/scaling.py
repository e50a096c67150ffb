"""How a training step's time and memory grow: with rows, lengths, amortization, adapters' rank and codebooks.

    python -m benchmarks.scaling --results benchmarks/results/scaling.jsonl
    python -m benchmarks.scaling --device cuda --shape csm-1b --rows 512 2048 8192 16384 65536

One axis is varied at a time, from 2,048 rows of 10-second recordings, a sixteenth of the frames, 32 codebooks, bf16
weights. A point is the median of ``--repeats`` forward and backward passes after one to warm up. The points of an axis
take turns, so that a slow minute of the machine falls on all of them. The exponent of an axis is the slope of log time
over log value (least squares), and of its upper half. Memory is the peak besides weights and gradients, divided into
the parts of the step that allocated it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import math
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.common.device import take_turns, time_call
from benchmarks.common.models import quick_model, random_pack
from benchmarks.common.products import step_flops
from benchmarks.common.record import Row, append_row, environment, start_time
from benchmarks.common.tables import MIB, format_text
from benchmarks.common.tracked import Allocation, Tracked
from benchmarks.report.parts import format_value
from csm_fast import CSMConfig
from csm_fast.config.shape import NAMED_SHAPES
from csm_fast.config.train import AdapterSection
from csm_fast.model import loss
from csm_fast.model.adapters import attach
from csm_fast.model.compile import compile_layers
from csm_fast.packing.pack import Pack
from csm_fast.system.device import keep_freed_memory

# (text rows, audio rows) of a document: a prompt of 2 s, a recording of 10 s, a conversation of two minutes in turns.
MIXES: dict[str, list[tuple[int, int]]] = {
    "prompts of 2 s": [(8, 26)],
    "recordings of 10 s": [(32, 126)],
    "conversations of 2 min": [(32, 126)] * 12,
}
AXES: dict[str, list[Any]] = {
    "rows": [512, 1024, 2048, 4096, 8192],
    "mix": list(MIXES),
    "fraction": [1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0],
    "lora_rank": [4, 16, 64],
    "codebooks": [8, 16, 32],
}


@dataclasses.dataclass(frozen=True)
class Point:
    """What is varied."""

    rows: int = 2048
    mix: str = "recordings of 10 s"
    fraction: float = 1 / 16
    lora_rank: int = 0
    codebooks: int = 32


def make_pack(config: CSMConfig, point: Point) -> Pack:
    """As many documents of the mix as the rows hold, the last one cut to fill them, of random tokens."""
    document = "".join("t" * text + "a" * audio for text, audio in MIXES[point.mix])
    whole, left = divmod(point.rows, len(document))
    return random_pack(config, [document] * whole + [document[:left]] * (left > 1), point.fraction)


PARTS = {"_embed": "embedding sum", "run_backbone": "backbone", "run_decoder": "depth decoder"}


@contextlib.contextmanager
def name_parts(tracked: Tracked) -> Iterator[Callable[[Allocation], str]]:
    """Yields a function that names the part of the forward pass that made an allocation, or "backward pass"."""
    spans: list[tuple[int, int, str]] = []

    def watched(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            first = len(tracked.allocations)
            try:
                return function(*args, **kwargs)
            finally:
                spans.append((first, len(tracked.allocations), name))

        return call

    def part(allocation: Allocation) -> str:
        return next((name for first, last, name in spans if first <= allocation.order < last), "backward pass")

    with contextlib.ExitStack() as stack:
        for name, label in PARTS.items():
            stack.enter_context(mock.patch.object(loss, name, watched(getattr(loss, name), label)))
        heads = watched(loss.ops.linear_cross_entropy, "heads and loss")
        stack.enter_context(mock.patch.object(loss.ops, "linear_cross_entropy", heads))
        yield part


class Case:
    """A model and a pack for a point."""

    def __init__(self, shape: str, point: Point, device: torch.device, compiled: bool):
        config = dataclasses.replace(NAMED_SHAPES[shape](), num_codebooks=point.codebooks)
        self.device, self.adapted = device, point.lora_rank > 0
        self.model: Any = quick_model(config).to(torch.bfloat16)
        if self.adapted:
            section = AdapterSection(method="lora", lora_rank=point.lora_rank)
            attach(self.model, section, compute_dtype=torch.bfloat16, base_hash="not asked for")
        self.model.to(device)
        if compiled:
            compile_layers(self.model, "on")
        self.pack = make_pack(config, point).to(device)
        self.flops = step_flops(config, self.pack)

    def backward(self) -> None:
        """A forward and a backward pass; the gradients stay."""
        around = torch.autocast(self.device.type, torch.bfloat16) if self.adapted else contextlib.nullcontext()
        with around:
            value = loss.packed_loss(self.model, self.pack, 0.5, 0.5)[0]
        value.backward()

    def step(self) -> None:
        self.backward()
        self.model.zero_grad(set_to_none=True)

    def time_step(self) -> float:
        return time_call(self.step, self.device)

    def memory(self) -> dict[str, int]:
        """Bytes besides weights and gradients at their peak, by part."""
        tracked = Tracked()
        with name_parts(tracked) as part, tracked:
            self.backward()
        born = {tracked.record_of(p.grad) for p in self.model.parameters() if p.grad is not None}
        peak, held = tracked.peak_of(lambda a: a.order not in born)
        parts: Counter[str] = Counter()
        for allocation in held:
            parts[part(allocation)] += allocation.bytes
        return {"besides": peak, **parts}


def fit_exponent(values: list[float], seconds: list[float]) -> float:
    """Slope of log seconds over log values."""
    return statistics.linear_regression([math.log(v) for v in values], [math.log(s) for s in seconds]).slope


def make_points(args: argparse.Namespace) -> dict[str, list[tuple[Any, Point]]]:
    """(value, point) along each axis."""
    axes = {axis: args.rows if axis == "rows" and args.rows else AXES[axis] for axis in args.axes}
    return {axis: [(value, Point(**{axis: value})) for value in values] for axis, values in axes.items()}


def measure_axis(args: argparse.Namespace, axis: str, along: list[tuple[Any, Point]]) -> list[Row]:
    """A row per point of an axis."""
    device = torch.device(args.device)
    cases = [Case(args.shape, point, device, args.compile) for _, point in along]
    times = take_turns([case.time_step for case in cases], 1 + args.repeats)
    rows: list[Row] = []
    for (value, point), case, (_, *seconds) in zip(along, cases, times, strict=True):
        row: Row = {"axis": axis, "value": value, **dataclasses.asdict(point)}
        row.update(seconds=seconds, median_s=statistics.median(seconds), flops=case.flops)
        row.update(audio_rows=len(case.pack.target_rows), frames=len(case.pack.decoder_index), shape=args.shape)
        row.update(memory=case.memory(), compiled=args.compile)
        rows.append(row)
    if len(along) > 1 and all(isinstance(value, (int, float)) for value, _ in along):
        medians, values = [row["median_s"] for row in rows], [float(value) for value, _ in along]
        half = len(values) // 2
        upper = fit_exponent(values[half:], medians[half:]) if len(values) - half > 1 else None
        for row in rows:
            row.update(exponent=fit_exponent(values, medians), exponent_upper=upper)
    return rows


def print_axis(axis: str, rows: list[Row]) -> None:
    lines = []
    for row in rows:
        memory = {k: v for k, v in sorted(row["memory"].items(), key=lambda kv: -kv[1]) if k != "besides"}
        ms, us = row["median_s"] * 1e3, row["median_s"] / row["rows"] * 1e6
        figures = [f"{ms:.1f}", f"{us:.1f}", f"{row['flops'] / row['median_s'] / 1e9:,.0f}"]
        parts = ", ".join(f"{name} {size / MIB:,.0f}" for name, size in memory.items() if size > MIB / 2)
        lines.append([format_value(row["value"]), *figures, f"{row['memory']['besides'] / MIB:,.0f}", parts])
    print("\n" + format_text([axis, "ms", "us/row", "GFLOP/s", "MiB", "of which"], lines, left=1))
    if "exponent" in rows[0]:
        upper = rows[0]["exponent_upper"]
        print(f"time ~ {axis}^{rows[0]['exponent']:.2f}" + (f", upper half ^{upper:.2f}" if upper is not None else ""))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(NAMED_SHAPES), default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES))
    parser.add_argument("--rows", type=int, nargs="+", help=f"of that axis; default {AXES['rows']}")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    if args.device == "cpu":
        keep_freed_memory()
    run, about = start_time(), environment()
    print(f"{args.shape} shape; {about['device']}, {about['threads']} threads, torch {about['torch']}")
    for axis, along in make_points(args).items():
        rows = measure_axis(args, axis, along)
        print_axis(axis, rows)
        for row in rows:
            append_row(args.results, "scaling", {**row, "run": run})
        gc.collect()
    return 0


if __name__ == "__main__":
    sys.exit(main())
