"""Every operator against what one would write or pick instead, in one run.

    python -m benchmarks.kernels --results kernels.jsonl --plot kernels.png
    python -m benchmarks.kernels --from kernels.jsonl --plot kernels.png        # tables and plot of recorded rows

A point is an operator, a number of backbone rows, an amortization fraction where it matters, and a direction: forward
alone (no_grad) or forward+backward. Repetitions of all systems alternate; median, least and most are shown. On CUDA a
buffer larger than the caches is overwritten before every call, so that no input is in the cache.

"of limit" is the time that the work would take at the rates measured in the same run (a copy, a large matrix product;
whichever is slower for this operator) over the time taken. The work is counted by the formulas of the cases: it is the
same for every system, and no implementation can do with less. Small sizes on a CPU are in its caches and may exceed the
limit. Memory is the most held beyond the inputs, gradients included: the allocator's on CUDA, storages followed call by
call on a CPU.

A system whose results differ from a float64 reference by more than the tolerance is shown as wrong and not ranked. A
system that would not fit in memory or in the time of a point is skipped, and the reason is recorded.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.device import ceilings, free_memory, peak_memory, time_cold_call, wait
from benchmarks.common.record import Row, append_row, environment, read_rows
from benchmarks.kernels.cases import CASES, DECODER_OPS
from benchmarks.kernels.plot import draw, print_tables
from benchmarks.kernels.points import BOTH, DTYPES, MODES, Case, Inputs, Point, Results, System, Work, perform
from csm_fast.config.shape import NAMED_SHAPES, CSMConfig
from csm_fast.system.device import resolve_device

# ||got - reference|| / ||reference|| of the output and of each gradient; a few roundings of the dtype.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-4}
CHECK_ROWS, CHECK_FRACTION = 192, 1 / 8
ROWS, FRACTIONS = [256, 1024, 4096, 16384, 65536], [1 / 16, 1.0]


@dataclass
class Run:
    """What one invocation measures, within which limits."""

    config: CSMConfig
    shape: str
    dtype: torch.dtype
    device: torch.device
    ops: list[str] = field(default_factory=lambda: list(CASES))
    rows: list[int] = field(default_factory=lambda: list(ROWS))
    fractions: list[float] = field(default_factory=lambda: list(FRACTIONS))
    repeats: int = 5
    compile: bool = True
    point_seconds: float = 20.0
    limit_seconds: float = float("inf")
    started: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        return self.limit_seconds - (time.monotonic() - self.started)

    def points(self) -> Iterator[Point]:
        """Small sizes of every operator first: they predict the large ones, and a short run covers every operator."""
        for rows in sorted(self.rows):
            for op in self.ops:
                for fraction in self.fractions if op in DECODER_OPS else [None]:
                    yield Point(op, rows, fraction, self.config, self.dtype, self.device, self.compile)


# ----------------------------------------------------------------------------------------------------------- check


def check_op(op: str, run: Run) -> dict[str, Row]:
    """By system, the relative errors at a small size: {"errors": {name: error}, "agrees": bool}, or {"reason": why}.

    The reference is the operator's formula in float64 on the same inputs.
    """
    config = run.config
    if run.device.type == "cpu":  # the whole text table's gradient in float64 would take longer than all the rest
        config = replace(config, text_vocab_size=min(config.text_vocab_size, 4096))
    point = Point(op, CHECK_ROWS, CHECK_FRACTION, config, run.dtype, run.device, run.compile)
    return check_case(CASES[op](point))


def check_case(case: Case) -> dict[str, Row]:
    torch.manual_seed(0)
    inputs = case.make()
    truth = perform(case.truth, inputs.widened(), BOTH)
    found = {}
    for system in case.systems:
        if system.unavailable:
            found[system.name] = {"reason": system.unavailable}
            continue
        try:
            mine = system.prepare(inputs) if system.prepare else inputs
            results = perform(system.run, mine, BOTH)
            found[system.name] = _compare(system.restore(results) if system.restore else results, truth, case, inputs)
        except Exception as error:  # another project's package may fail in any way; the run goes on
            found[system.name] = {"reason": first_line(error), "status": "failed"}
    return found


def _compare(got: Results, truth: Results, case: Case, inputs: Inputs) -> Row:
    names = [*case.outputs, *(f"d{name}" for name in inputs.wanted)]
    errors = {}
    for name, mine, exact in zip(names, [*got[0], *got[1]], [*truth[0], *truth[1]], strict=True):
        mine = mine.detach().to_dense() if mine.is_sparse else mine.detach()
        size = exact.norm().item()
        errors[name] = (mine.double() - exact.detach()).norm().item() / (size or 1.0)
    tolerance = TOLERANCE[case.point.dtype]
    agrees = all(error <= tolerance for error in errors.values())  # NaN does not
    return {"errors": errors, "tolerance": tolerance, "agrees": agrees}


def first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}".rstrip(": ")


# --------------------------------------------------------------------------------------------------------- measure


class Clock:
    """Predicts the seconds of a call from those of the last size: they grow as the counted work does."""

    def __init__(self) -> None:
        self._last: dict[tuple[Any, ...], tuple[Work, float]] = {}

    def learn(self, key: tuple[Any, ...], work: Work, seconds: float) -> None:
        self._last[key] = work, seconds

    def predict(self, key: tuple[Any, ...], work: Work) -> float | None:
        if key not in self._last:
            return None
        before, seconds = self._last[key]
        return seconds * max(work.bytes / before.bytes, work.flops / before.flops if before.flops else 0.0)


def measure_case(case: Case, run: Run, rates: dict[str, float], checks: dict[str, Row], clock: Clock) -> list[Row]:
    """Rows of both directions at one point, one per system, whatever became of it."""
    point, free = case.point, free_memory(run.device)
    common: Row = {"op": point.op, "rows": point.rows, "fraction": point.fraction, "audio_rows": point.layout().audio}
    common |= {"segments": len(point.layout().lengths), "frames": None if point.fraction is None else point.frames()}
    found: list[Row] = []
    inputs: Inputs | None = None
    for i, mode in enumerate(MODES):
        rows = {s.name: {**common, "mode": mode, "system": s.name, "group": s.group} for s in case.systems}
        found += rows.values()
        ready: dict[str, Callable[[], Callable[[], Any]]] = {}
        work = {s.name: (s.work or case.work)[i] for s in case.systems}
        for system in case.systems:
            row, checked = rows[system.name], checks[system.name]
            row |= {k: v for k, v in checked.items() if k in ("errors", "tolerance")}
            row["predicted_bytes"] = case.input_bytes + system.memory[i]
            predicted = clock.predict((point.op, point.fraction, mode, system.name), work[system.name])
            row["status"], row["reason"] = _gate(row["predicted_bytes"], free, checked, run, predicted)
            if row["status"]:
                continue
            if inputs is None:
                torch.manual_seed(0)
                inputs = case.make()
            outcome, prepared = _warm_up(system, inputs, mode, run)
            row |= outcome
            if prepared is not None:
                ready[system.name] = prepared
        seconds: dict[str, list[float]] = {name: [] for name in ready}
        for _ in range(run.repeats):
            for name, prepared in list(ready.items()):
                try:
                    seconds[name].append(time_cold_call(prepared(), run.device))
                except Exception as error:
                    rows[name] |= {"status": "failed", "reason": first_line(error)}
                    del ready[name]
        for name in ready:
            clock.learn((point.op, point.fraction, mode, name), work[name], statistics.median(seconds[name]))
            rows[name] |= {"status": "ok", **summarize_times(seconds[name], work[name], rates)}
    return found


def _gate(needed: float, free: float, checked: Row, run: Run, predicted: float | None) -> tuple[str, str]:
    """("", "") for a system that may run; otherwise its status and the reason."""
    if "reason" in checked:
        return checked.get("status", "skipped"), checked["reason"]
    if not checked["agrees"]:
        name, error = max(checked["errors"].items(), key=lambda item: item[1] if item[1] == item[1] else float("inf"))
        return "wrong", f"{name} is {error:.2g} off, at most {checked['tolerance']:.2g}"
    if needed > 0.9 * free:
        return "skipped", f"needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free"
    calls = run.repeats + 2
    whole = (predicted or 0.0) * calls
    if whole > run.point_seconds:
        return "skipped", f"{calls} calls would take about {whole:.0f} s, at most {run.point_seconds:g}"
    if predicted is not None and whole > run.left():
        return "left out", f"{calls} calls would take about {whole:.0f} s, {max(0, run.left()):.0f} are left"
    return "", ""


def _warm_up(system: System, inputs: Inputs, mode: str, run: Run) -> tuple[Row, Callable[[], Callable[[], Any]] | None]:
    """Run a system twice, the second time for its memory. Returns fields of its row and, if it is to be timed, a
    function that prepares a call, which is not timed itself."""

    def ready() -> Callable[[], Any]:
        mine = system.prepare(inputs) if system.prepare and system.fresh else own
        return lambda: perform(system.run, mine, mode)

    try:
        own = system.prepare(inputs) if system.prepare else inputs
        wait(run.device)
        started = time.perf_counter()
        ready()()
        wait(run.device)
        took = time.perf_counter() - started
        if took * (run.repeats + 1) > run.point_seconds and not system.compiled:
            reason = f"one call took {took:.1f} s, and {run.repeats + 1} more have {run.point_seconds:g} s"
            return {"status": "skipped", "reason": reason}, None
        return {"peak_bytes": peak_memory(ready(), run.device, system.compiled)}, ready
    except Exception as error:  # out of memory, or another project's package fails at this size
        return {"status": "failed", "reason": first_line(error)}, None


def summarize_times(seconds: list[float], work: Work, rates: dict[str, float]) -> Row:
    """Median and spread of the raw seconds, achieved rates, and the share of the slower ceiling."""
    median = statistics.median(seconds)
    bound, ceiling = max((work.bytes / rates["copy"], "copy"), (work.flops / rates["matmul"], "matmul"))
    row: Row = {"seconds": seconds, "median_s": median, "min_s": min(seconds), "max_s": max(seconds)}
    row |= {"work_bytes": work.bytes, "bytes_per_s": work.bytes / median}
    row |= {"work_flops": work.flops, "flops_per_s": work.flops / median}
    return {**row, "ceiling": ceiling, "share": bound / median}


def make_unmeasured_rows(case: Case, status: str, reason: str) -> list[Row]:
    point = case.point
    base = {"op": point.op, "rows": point.rows, "fraction": point.fraction, "status": status, "reason": reason}
    return [{**base, "mode": mode, "system": s.name, "group": s.group} for mode in MODES for s in case.systems]


def _answers(device: torch.device) -> bool:
    """Whether a device still works: after some errors of a kernel, every later call of the process fails."""
    try:
        wait(device)
        torch.ones(1, device=device).sum().item()
    except Exception:
        return False
    return True


def measure_points(run: Run, write: Callable[[Row], None]) -> list[Row]:
    """Measure all points of a run and write each row at once. Out of time, the rest is recorded as left out."""
    rates = ceilings(run.device, run.dtype)
    print(f"copies {rates['copy'] / 1e9:,.1f} GB/s, matrix products {rates['matmul'] / 1e12:,.2f} TFLOP/s", flush=True)
    setting: Row = {"benchmark": "kernels", "shape": run.shape, "config": run.config.to_dict(), "on": run.device.type}
    setting["dtype"] = next(name for name, dtype in DTYPES.items() if dtype == run.dtype)
    setting |= {"repeats": run.repeats, "compile": run.compile, "point_seconds": run.point_seconds}
    setting |= {"copy_bytes_per_s": rates["copy"], "matmul_flops_per_s": rates["matmul"], **environment()}
    checks: dict[str, dict[str, Row]] = {}
    clock, found = Clock(), []
    over = ""
    for point in run.points():
        case = CASES[point.op](point)
        if not over and run.left() <= 0:
            over = f"the {run.limit_seconds:g} s were over"
        if over:
            rows = make_unmeasured_rows(case, "left out", over)
        else:
            try:
                if point.op not in checks:
                    checks[point.op] = check_op(point.op, run)
                rows = measure_case(case, run, rates, checks[point.op], clock)
                wait(run.device)
            except Exception as error:  # no memory for the inputs, or a device that no longer works
                rows = make_unmeasured_rows(case, "failed", first_line(error))
                over = "" if _answers(run.device) else f"the device no longer works: {first_line(error)}"
            done = sum(row["status"] == "ok" for row in rows)
            where = f"{point.rows:,} rows" + (f", fraction {point.fraction:g}" if point.fraction else "")
            spent = time.monotonic() - run.started
            print(f"{spent:6.0f} s  {point.op} at {where}: {done} of {len(rows)} measured", flush=True)
        for row in rows:
            found.append({**setting, **row})
            write(found[-1])
    return found


# ------------------------------------------------------------------------------------------------------------- CLI


def _fraction(text: str) -> float:
    value = float(Fraction(text))
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def _rows(text: str) -> int:
    if int(text) < 16:
        raise argparse.ArgumentTypeError(f"{text} rows are fewer than 16, the shortest conversation")
    return int(text)


def parse_arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ops", nargs="+", choices=list(CASES), default=list(CASES))
    p.add_argument("--rows", nargs="+", type=_rows, default=ROWS, help="rows of the backbone")
    p.add_argument("--fractions", nargs="+", type=_fraction, default=FRACTIONS, help="as in 1/16 or 0.5")
    p.add_argument("--shape", choices=list(NAMED_SHAPES), help="default: csm-1b on CUDA, small elsewhere")
    p.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    p.add_argument("--device", default="auto")
    p.add_argument("--repeats", type=int, help="default: 20 on CUDA, 5 elsewhere")
    p.add_argument("--limit-seconds", type=float, default=float("inf"), help="stop before this; says what is left out")
    p.add_argument("--point-seconds", type=float, help="most for one system at one point; default: 10 on CUDA, else 20")
    p.add_argument("--no-compile", action="store_true", help="leave out what needs torch.compile")
    p.add_argument("--results", type=Path, metavar="FILE.jsonl", help="append a row per point and system")
    p.add_argument("--plot", type=Path, metavar="FILE.png")
    p.add_argument("--from", dest="source", type=Path, metavar="FILE.jsonl", help="show these rows; measure nothing")
    return p.parse_args()


def main() -> int:
    args = parse_arguments()
    if args.source:
        try:
            args.source.stat()
            rows = [row for row in read_rows(args.source) if row.get("benchmark") == "kernels"]
        except (OSError, ValueError, AttributeError) as error:
            print(f"error: {args.source} is no file of results ({error}); give what --results wrote", file=sys.stderr)
            return 2
    else:
        device = resolve_device(args.device)
        cuda = device.type == "cuda"
        shape = args.shape or ("csm-1b" if cuda else "small")
        setting = NAMED_SHAPES[shape](), shape, DTYPES[args.dtype], device, args.ops, args.rows, args.fractions
        run = Run(
            *setting,
            repeats=args.repeats or (20 if cuda else 5),
            compile=not args.no_compile,
            point_seconds=args.point_seconds or (10 if cuda else 20),
            limit_seconds=args.limit_seconds,
        )
        rows = measure_points(run, functools.partial(append_row, args.results, "kernels"))
    print_tables(rows)
    if args.plot:
        draw(rows, args.plot)
        print(f"plot: {args.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
