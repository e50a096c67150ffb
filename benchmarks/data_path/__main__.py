"""The data path from 1 to 1,000 hours: opening a token store, planning, streaming, and whether steps ever wait for it.

    python -m benchmarks.data_path --results benchmarks/results/data_path.jsonl
    python -m benchmarks.data_path --hours 1 10 --seconds 1 --repeats 1 --dir /tmp/stores --keep

The stores are synthetic (``synthetic_store``) and differ only in size. Without ``--dir`` they lie in memory (/dev/shm)
if it has room, because some machines take pages back from the page cache though memory is free, and the figures would
be the disk's. Stores that this run wrote are deleted at its end unless ``--keep``; existing ones are used again.

*Streaming.* Each case runs in a process of its own that is set up as ``csm-fast-train`` sets up its own; repetitions
are interleaved and medians shown. The process opens the store, makes the ``Packer``, plans the first epoch, counts the
steps of ten epochs (as the trainer does for its schedule), asks for the first step, checks the remaining shards' hashes
(each shard is hashed on its first use, so later figures exclude it), and then takes steps from ``read_ahead()`` without
using them. Steps hold ``--pack-rows`` rows in one pack, or 8 conversations (the default). "cpu" is the processor time
of the loader's thread. Times are summed over turns of at least 65,536 rows; a turn that took twice the median or more
is left out and counted, because another process had the core or a page came from the disk.

"private" are the private pages beyond those after the imports, of /proc/self/smaps_rollup; they include the store's
mapped pages, which the system takes back when it needs them. "anonymous" excludes those. With ``--cold`` the shards are
dropped from the page cache before the store is opened and again before the streaming ("disk" is what was read then).

*Waiting.* A tiny model trains over ``read_ahead()``, and the time in which it had no step is counted.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.device import free_memory, take_turns
from benchmarks.common.processes import run_worker
from benchmarks.common.record import RESULTS, Row, append_row, read_rows
from benchmarks.common.tables import MIB, format_text
from benchmarks.data_path.synthetic_store import BYTES_PER_HOUR, drop_from_cache, write_store
from csm_fast.config.train import DataSection, LossSection, OptimizerSection
from csm_fast.data.token_store import TokenStore
from csm_fast.packing.layout import StepBatch
from csm_fast.packing.loader import Packer, read_ahead
from csm_fast.system.device import keep_freed_memory, resolve_precision
from csm_fast.system.errors import InputError

EPOCHS = 10
TURN_ROWS, WARM_UP = 65_536, 20
PARTS = ["stream", "wait"]
Case = tuple[str, float, int]  # steps of "rows" or of "conversations", hours, rows of a pack


# ------------------------------------------------------------------------------------------- one process, one store


def disk_bytes() -> int:
    """Bytes that this process has read from the disk so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def make_packer(store: TokenStore, pack_rows: int, by: str) -> Packer:
    """A packer whose steps are one full pack ("rows"), or 8 conversations ("conversations")."""
    section = DataSection(pack_rows=pack_rows, batch_rows=pack_rows if by == "rows" else None)
    return Packer(store, section, LossSection(), pad="cpu")


class Turns:
    """Seconds of work and rows, in turns of at least ``TURN_ROWS`` rows."""

    def __init__(self) -> None:
        self.ended: list[tuple[float, int]] = []
        self.now = (0.0, 0)

    def add(self, seconds: float, rows: int) -> None:
        """Add work to the current turn, and end the turn if that fills it."""
        self.now = (self.now[0] + seconds, self.now[1] + rows)
        if self.now[1] >= TURN_ROWS:
            self.ended.append(self.now)
            self.now = (0.0, 0)

    def us_per_row(self) -> tuple[float, int]:
        """Microseconds per row, and how many turns were left out as disturbed."""
        turns = self.ended or [self.now]
        most = 2 * statistics.median(s / rows for s, rows in turns)
        kept = [(s, rows) for s, rows in turns if s / rows < most]
        return 1e6 * sum(s for s, _ in kept) / sum(rows for _, rows in kept), len(turns) - len(kept)


def private_memory() -> tuple[int, int]:
    """(private, anonymous) bytes of this process."""
    fields: dict[str, int] = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, size = line.split()[:2]
        fields[name.rstrip(":")] = int(size) * 1024
    return sum(size for name, size in fields.items() if name.startswith("Private_")), fields["Anonymous"]


class Watch:
    """Seconds since the last measurement, and growth of memory since the start."""

    def __init__(self) -> None:
        gc.collect()
        self.start = private_memory()
        self.figures: Row = {}
        self.at = time.perf_counter()

    def note_seconds(self, name: str) -> None:
        self.figures[f"{name}_s"] = time.perf_counter() - self.at
        self.at = time.perf_counter()

    def note_memory(self, name: str) -> None:
        now = private_memory()
        for kind, before, after in zip(("private", "anonymous"), self.start, now, strict=True):
            self.figures[f"{name}_{kind}"] = after - before
        self.at = time.perf_counter()


def measure_stream(path: Path, pack_rows: int, by: str, seconds: float, cold: bool) -> Row:
    """Open, plan and stream."""
    watch = Watch()
    read = disk_bytes()
    store = TokenStore.open(path)
    watch.note_seconds("open")
    watch.note_memory("open")
    packer = make_packer(store, pack_rows, by)
    watch.note_seconds("packer")
    steps = packer.steps_in_epoch(0)
    packer.layout_steps(0, 0)
    watch.note_seconds("plan")
    watch.note_memory("plan")
    watch.figures.update(steps=steps, conversations=len(store), turns=store.num_turns, frames=store.num_frames)
    for epoch in range(EPOCHS):
        packer.steps_in_epoch(epoch)
    watch.note_seconds("count")
    built = Turns()
    batches = read_ahead(time_blocks(packer.blocks(0, 0), built))
    next(batches)
    watch.note_seconds("first_step")
    for _ in store.code_blocks():  # blocks are views, so this only checks hashes
        pass
    watch.note_seconds("hash")
    watch.figures["open_disk"] = disk_bytes() - read
    if cold:
        drop_from_cache(path)
    for _ in range(WARM_UP):
        next(batches)
    built.ended.clear()
    watch.note_memory("warm")
    taken, steps, rows = Turns(), 0, 0
    read, started = disk_bytes(), time.perf_counter()
    last = started
    while last - started < seconds or steps < 50:
        some = next(batches).rows
        now = time.perf_counter()
        taken.add(now - last, some)
        last, steps, rows = now, steps + 1, rows + some
    watch.note_memory("stream")
    us_per_row, left_out = taken.us_per_row()
    watch.figures.update(streamed_rows=rows, streamed_steps=steps, us_per_row=us_per_row, left_out=left_out)
    watch.figures.update(cpu_us_per_row=built.us_per_row()[0], stream_disk=disk_bytes() - read)
    batches.close()
    return watch.figures


def time_blocks(blocks: Iterable[list[StepBatch]], built: Turns) -> Iterator[list[StepBatch]]:
    """``blocks``; ``built`` gets the processor seconds of the thread that makes them, and their rows."""
    before = time.thread_time()
    for block in blocks:
        built.add(time.thread_time() - before, sum(step.rows for step in block))
        yield block
        before = time.thread_time()


def measure_wait(path: Path, pack_rows: int, by: str, seconds: float, cold: bool) -> Row:
    """Train the tiny model for a few steps, and count the time in which it waited for the next one."""
    # Imported here because the processes that stream start faster without a model.
    from benchmarks.common.models import quick_model
    from csm_fast import CSMConfig
    from csm_fast.model.loss import packed_loss
    from csm_fast.train.step import StepRunner

    store = TokenStore.open(path)
    packer = make_packer(store, pack_rows, by)
    for _ in store.code_blocks():
        pass
    device = torch.device("cpu")
    precision = resolve_precision("auto", device)
    model = quick_model(CSMConfig.tiny()).train()
    update = StepRunner(model, OptimizerSection(), device, precision, partial(packed_loss, a=0.5, b=0.5), 1000, 0)
    waited: list[float] = []
    batches, rows = read_ahead(packer.blocks(0, 0)), 0
    for number in range(2):  # warm up: the first steps build kernels for new shapes
        update.run(next(batches), number)
    started = time.perf_counter()
    while time.perf_counter() - started < seconds or len(waited) < 5:
        asked = time.perf_counter()
        batch = next(batches)
        waited.append(time.perf_counter() - asked)
        update.run(batch, len(waited) + 1)
        rows += batch.rows
    took = time.perf_counter() - started
    batches.close()
    figures = {"waited_share": sum(waited) / took, "longest_wait_s": max(waited), "trained_steps": len(waited)}
    return {**figures, "rows_per_s": rows / took, "model": f"tiny model, {precision} products"}


# ------------------------------------------------------------------------------------------------------ the whole run


def ask_worker(kind: str, path: Path, **case: Any) -> Row:
    """The figures of one case, from a new process."""
    question = json.dumps({"kind": kind, "path": str(path), **case})
    return run_worker("benchmarks.data_path", "--worker", question, keep_memory=True)


def answer_question(case: dict[str, Any]) -> None:
    keep_freed_memory()
    measure = {"stream": measure_stream, "wait": measure_wait}[case.pop("kind")]
    path = Path(case.pop("path"))
    if case["cold"]:
        drop_from_cache(path)
    print(json.dumps(measure(path, **case)))


def take_medians(answers: list[Row]) -> Row:
    """The median of each figure; values that are not numbers are the same in all answers."""
    return {
        name: statistics.median(a[name] for a in answers) if isinstance(value, (int, float)) else value
        for name, value in answers[0].items()
    }


def newest_step() -> tuple[float, str]:
    """Rows per second of csm_fast's newest training step in benchmarks/results/compare.jsonl, and that row's name."""
    rows = read_rows(RESULTS / "compare.jsonl")
    ours = [row for row in rows if row["system"].startswith("csm_fast") and "median_s" in row]
    if not ours:
        return 0.0, ""
    names = ("system", "label", "shape", "device", "date")
    return ours[-1]["rows"] / ours[-1]["median_s"], ", ".join(ours[-1][name] for name in names)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, nargs="+", default=[1.0, 10.0, 100.0, 1000.0])
    parser.add_argument("--pack-rows", type=int, nargs="+", default=[2048, 16384])
    parser.add_argument("--dir", type=Path, help="directory of the stores; default: a temporary one, in memory")
    parser.add_argument("--keep", action="store_true", help="do not delete the stores that were written")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of streaming, and of training, per case")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument("--cold", action="store_true", help="drop the stores from the page cache first")
    parser.add_argument("--step-rows-per-second", type=float, help="of a training step; default: the newest recorded")
    parser.add_argument("--results", type=Path, help="append the figures to this .jsonl")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def print_streams(found: dict[Case, Row]) -> None:
    """Print a line per case: seconds, memory in MiB, and the loader's time per row."""
    head = "hours,by,pack,open s,packer,plan,count,first,hash,private,anon.,planned,anon.,us/row,cpu,grown,anon.,disk"
    lines = []
    for (by, hours, rows), f in found.items():
        seconds = [f"{f[name + '_s']:.3f}" for name in ("open", "packer", "plan", "count", "first_step", "hash")]
        memory = [f[name] for name in ("open_private", "open_anonymous", "plan_private", "plan_anonymous")]
        grown = [f[f"stream_{kind}"] - f[f"warm_{kind}"] for kind in ("private", "anonymous")]
        planned, after = ([f"{size / MIB:.1f}" for size in sizes] for sizes in (memory, [*grown, f["stream_disk"]]))
        times = [f"{f[name]:.3f}" for name in ("us_per_row", "cpu_us_per_row")]
        share = f"{f['loader_share']:.2%}" if "loader_share" in f else "-"
        lines.append([f"{hours:g}", by, str(rows), *seconds, *planned, *times, *after, share])
    print(format_text([*head.split(","), "share"], lines), flush=True)
    most = max(found.values(), key=lambda f: f["turns"])
    opened, warm = (most[name] / MIB for name in ("open_private", "warm_private"))
    print(f"{most['turns']:,} turns: opened in {most['open_s']:.3f} s, {opened:.0f} MiB private", end="")
    print(f"; {warm:.0f} MiB with the Packer, its plans and {WARM_UP} steps")


def measure_cases(args: argparse.Namespace, paths: dict[float, Path]) -> None:
    common = {"seconds": args.seconds, "cold": args.cold}
    first = next(iter(paths.values()))
    about = {**common, "repeats": args.repeats, "stores": find_place(first)}
    print(f"{'cold' if args.cold else 'warm'} page cache, stores in {first.parent} | memory in MiB")
    if "stream" in args.parts:
        cases: list[Case] = [("rows", hours, rows) for rows in args.pack_rows for hours in paths]
        cases += [("conversations", hours, max(args.pack_rows)) for hours in paths]
        calls = [
            partial(ask_worker, "stream", paths[hours], pack_rows=rows, by=by, **common) for by, hours, rows in cases
        ]
        found = dict(zip(cases, map(take_medians, take_turns(calls, args.repeats)), strict=True))
        rate, where = (args.step_rows_per_second, "--step-rows-per-second")
        if not rate:
            rate, where = newest_step()
        if rate:
            print(f"share: the loader's time per row of a training step at {rate:,.0f} rows/s ({where})")
            for figures in found.values():
                figures.update(loader_share=figures["us_per_row"] * 1e-6 * rate, step_rows_per_s=rate, step=where)
        print_streams(found)
        for (by, hours, rows), figures in found.items():
            case = {"kind": "stream", "hours": hours, "by": by, "pack_rows": rows}
            append_row(args.results, "data_path", {**case, **about, **figures})
    for hours, path in paths.items() if "wait" in args.parts else ():
        rows = min(args.pack_rows)
        figures = ask_worker("wait", path, pack_rows=rows, by="rows", **common)
        print(
            f"{hours:g} hours, {figures['model']}, packs of {rows:,}: {figures['waited_share']:.3%} of the time waited "
            f"for a step, {figures['longest_wait_s'] * 1e3:.1f} ms at most, at {figures['rows_per_s']:,.0f} rows/s"
        )
        case = {"kind": "wait", "hours": hours, "by": "rows", "pack_rows": rows}
        append_row(args.results, "data_path", {**case, **about, **figures})


MEMORY = Path("/dev/shm")  # a file system in memory


def find_room(hours: float) -> Path | None:
    """``MEMORY``, if it and the memory have room for twice the stores of so many hours."""
    needed = 2 * BYTES_PER_HOUR * hours
    has_room = MEMORY.is_dir() and min(shutil.disk_usage(MEMORY).free, free_memory(torch.device("cpu"))) > needed
    return MEMORY if has_room else None


def find_place(path: Path) -> str:
    """Whether a store lies in "memory" or on "disk"."""
    return "memory" if MEMORY.is_dir() and path.stat().st_dev == MEMORY.stat().st_dev else "disk"


def main() -> int:
    args = parse_arguments()
    if args.worker:
        answer_question(json.loads(args.worker))
        return 0
    where = None if args.cold else find_room(sum(args.hours))
    folder = args.dir or Path(tempfile.mkdtemp(prefix="csm_fast-data-path-", dir=where))
    paths, written = {hours: folder / f"synthetic-{hours:g}-hours" for hours in args.hours}, []
    try:
        for hours, path in paths.items():
            if not (path / "manifest.json").is_file():
                started = time.perf_counter()
                written.append(path)
                write_store(path, hours)
                print(f"{path}: written in {time.perf_counter() - started:.1f} s", flush=True)
        measure_cases(args, paths)
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
    finally:
        for path in [] if args.keep else written:
            shutil.rmtree(path, ignore_errors=True)
        if args.dir is None and not args.keep:
            shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
