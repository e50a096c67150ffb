"""How a training step's time and memory grow: with rows, lengths, amortization, adapters' rank and codebooks.

    python -m benchmarks.scaling --results benchmarks/results/scaling.jsonl
    python -m benchmarks.scaling --device cuda --shape csm-1b --rows 512 2048 8192 16384 65536

One axis is varied at a time, from 2,048 rows of 10-second recordings, a sixteenth of the frames, 32 codebooks, bf16
weights. A point is the median of ``--repeats`` forward and backward passes after one to warm up; every point is
measured once per round, so that a slow minute of the machine falls on all of them. The exponent of an axis is the slope
of log time over log value (least squares), and of its upper half. Memory is the most besides weights and gradients, by
the part of the step that asked for it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import gc
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.common.products import step_flops
from benchmarks.common.record import append, environment
from benchmarks.common.tracked import Allocation, Tracked
from benchmarks.compare.worker import SHAPES
from benchmarks.memory_plan import quick_model
from csm_fast import CSMConfig
from csm_fast.config.train import AdapterSection
from csm_fast.model import loss
from csm_fast.model.adapters import attach
from csm_fast.model.compile import compile_layers
from csm_fast.packing.pack import Pack, pack_padded
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
    generator = torch.Generator().manual_seed(0)
    books = config.num_codebooks
    text: list[bool] = [is_text for t, a in MIXES[point.mix] for is_text in [True] * t + [False] * a]
    lengths = [len(text)] * (point.rows // len(text))
    if point.rows % len(text) > 1:
        lengths.append(point.rows % len(text))
    tokens = torch.zeros(len(lengths), max(lengths), books + 1, dtype=torch.int32)
    mask = torch.zeros(tokens.shape, dtype=torch.bool)
    for i, length in enumerate(lengths):
        is_text = torch.tensor(text[:length])
        draw = (length, books)
        codes = torch.randint(config.audio_vocab_size, draw, generator=generator, dtype=torch.int32)
        words = torch.randint(config.text_vocab_size, (length,), generator=generator, dtype=torch.int32)
        tokens[i, :length, :-1] = codes * ~is_text.unsqueeze(1)
        tokens[i, :length, -1] = words * is_text
        mask[i, :length, :-1] = ~is_text.unsqueeze(1)
        mask[i, :length, -1] = is_text
    torch.manual_seed(0)
    return pack_padded(tokens, mask, point.fraction)


PARTS = {"_embed": "embedding sum", "run_backbone": "backbone", "run_decoder": "depth decoder"}


@contextlib.contextmanager
def parts_of(tracked: Tracked) -> Iterator[Callable[[Allocation], str]]:
    """Tells which part of the forward pass asked for an allocation; "backward pass" for all else."""
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
    """A model and a pack for a point, and its times."""

    def __init__(self, shape: str, point: Point, device: torch.device, compiled: bool):
        config = dataclasses.replace(SHAPES[shape](), num_codebooks=point.codebooks)
        self.device, self.adapted = device, point.lora_rank > 0
        self.model: Any = quick_model(config).to(torch.bfloat16)
        if self.adapted:
            section = AdapterSection(method="lora", lora_rank=point.lora_rank)
            attach(self.model, section, compute_dtype=torch.bfloat16, base_hash="not asked for")
        self.model.to(device)
        if compiled:
            compile_layers(self.model, "on")
        pack = make_pack(config, point)
        self.flops, self.pack = step_flops(config, pack), pack.to(device)
        self.seconds: list[float] = []

    def step(self) -> None:
        around = torch.autocast(self.device.type, torch.bfloat16) if self.adapted else contextlib.nullcontext()
        with around:
            value = loss.packed_loss(self.model, self.pack, 0.5, 0.5)[0]
        value.backward()

    def drop(self) -> None:
        self.model.zero_grad(set_to_none=True)

    def time(self) -> float:
        self._wait()
        started = time.perf_counter()
        self.step()
        self.drop()
        self._wait()
        return time.perf_counter() - started

    def memory(self) -> dict[str, int]:
        """Bytes besides weights and gradients when they are most, by component."""
        tracked = Tracked()
        with parts_of(tracked) as part, tracked:
            self.step()
        born = {tracked.record_of(p.grad) for p in self.model.parameters() if p.grad is not None}
        peak, held = tracked.peak_of(lambda a: a.order not in born)
        parts: Counter[str] = Counter()
        for allocation in held:
            parts[part(allocation)] += allocation.bytes
        self.drop()
        return {"besides": peak, **parts}

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def exponent(values: list[float], seconds: list[float]) -> float:
    """Slope of log seconds over log values."""
    x, y = [math.log(v) for v in values], [math.log(s) for s in seconds]
    mx, my = statistics.fmean(x), statistics.fmean(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


def points(args: argparse.Namespace) -> dict[str, list[tuple[Any, Point]]]:
    """(value, point) along each axis."""
    base = Point()
    found = {}
    for axis in args.axes:
        values = args.rows if axis == "rows" and args.rows else AXES[axis]
        found[axis] = [(value, dataclasses.replace(base, **{axis: value})) for value in values]
    return found


def measure(args: argparse.Namespace, axis: str, along: list[tuple[Any, Point]]) -> list[dict[str, Any]]:
    """A row per point of an axis."""
    device = torch.device(args.device)
    cases = [Case(args.shape, point, device, args.compile) for _, point in along]
    for case in cases:
        case.time()
    for _ in range(args.repeats):
        for case in cases:
            case.seconds.append(case.time())
    rows = []
    for (value, point), case in zip(along, cases, strict=True):
        row: dict[str, Any] = {"benchmark": "scaling", "axis": axis, "value": value, **dataclasses.asdict(point)}
        row.update(seconds=case.seconds, median_s=statistics.median(case.seconds), flops=case.flops)
        row.update(audio_rows=len(case.pack.target_rows), frames=len(case.pack.decoder_index), shape=args.shape)
        row.update(memory=case.memory(), compiled=args.compile)
        rows.append(row)
    if len(along) > 1 and all(isinstance(value, (int, float)) for value, _ in along):
        medians = [row["median_s"] for row in rows]
        values = [float(value) for value, _ in along]
        half = len(values) // 2
        for row in rows:
            row["exponent"] = exponent(values, medians)
            row["exponent_upper"] = exponent(values[half:], medians[half:]) if len(values) - half > 1 else None
    return rows


def show(axis: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n{axis:20} {'ms':>9} {'us/row':>8} {'GFLOP/s':>8} {'MiB':>8}  of which")
    for row in rows:
        memory = {k: v for k, v in sorted(row["memory"].items(), key=lambda kv: -kv[1]) if k != "besides"}
        parts = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in memory.items() if size > 2**19)
        value = f"{row['value']:g}" if isinstance(row["value"], (int, float)) else row["value"]
        print(
            f"{value:20} {row['median_s'] * 1e3:9.1f} {row['median_s'] / row['rows'] * 1e6:8.1f} "
            f"{row['flops'] / row['median_s'] / 1e9:8,.0f} {row['memory']['besides'] / 2**20:8,.0f}  {parts}"
        )
    if "exponent" in rows[0]:
        upper = rows[0]["exponent_upper"]
        print(f"time ~ {axis}^{rows[0]['exponent']:.2f}" + (f", upper half ^{upper:.2f}" if upper is not None else ""))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES))
    parser.add_argument("--rows", type=int, nargs="+", help=f"of that axis; default {AXES['rows']}")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    if args.device == "cpu":
        keep_freed_memory()
    run = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    about = environment()
    print(f"{args.shape} shape; {about['device']}, {about['threads']} threads, torch {about['torch']}")
    for axis, along in points(args).items():
        rows = measure(args, axis, along)
        show(axis, rows)
        for row in rows:
            if args.results:
                append(args.results, {**row, "run": run, **about})
        gc.collect()
    return 0


if __name__ == "__main__":
    sys.exit(main())
