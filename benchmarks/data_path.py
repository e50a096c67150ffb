"""The data path from 1 to 1,000 hours: opening a token store, planning, streaming, and whether steps ever wait for it.

    python -m benchmarks.data_path --results benchmarks/results/data_path.jsonl
    python -m benchmarks.data_path --hours 1 10 --seconds 1 --repeats 1 --dir /tmp/stores --keep

The stores are synthetic, written by the store's own writer: random codes of 32 codebooks, turns of 1 to 20 s, 12 text
ids and two more per second, 16 speakers, a quarter of the conversations of 2 to 6 turns. 1,000 hours are 2.9 GB. What
this run wrote is deleted at its end unless ``--keep``; what is there already is used again.

Every figure comes from a process of its own that is set up as ``csm-fast-train`` sets up its own; repetitions are
interleaved, medians are shown. A process opens the store, makes the ``Packer``, plans the first epoch, counts the steps
of ten epochs (as the trainer does for its schedule), asks for the first step, checks the remaining shards' hashes (each
shard is hashed on its first use; so later figures are without it), and then takes steps from ``prefetch()`` without
doing anything with them. "us/row" is the time of a step by its rows; "cpu" is the loader thread's processor time alone,
which other programs disturb less. Steps hold ``--pack-rows`` rows in one pack, or 8 conversations (the default).

"private" are the private pages beyond those after the imports, of /proc/self/smaps_rollup; they include the store's
mapped pages, which the system takes back when it needs them. "anonymous" is without those. With ``--cold`` the page
cache forgets the shards before the store is opened and again before the streaming ("disk" is what was read then).

Waiting is measured as well: a tiny model trains over ``prefetch()``, and the time in which it had no step is counted.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.record import append, environment
from csm_fast.config import DataSection, LossSection
from csm_fast.errors import InputError
from csm_fast.loader import Packer, StepBatch, prefetch
from csm_fast.machine import keep_freed_memory
from csm_fast.store_writer import TokenStoreWriter
from csm_fast.token_store import SAMPLES_PER_FRAME, SAMPLES_PER_SECOND, TokenStore, TurnTokens

CODEBOOKS, CODES, TEXT_IDS = 32, 2048, 128_256
FRAMES_PER_SECOND = SAMPLES_PER_SECOND / SAMPLES_PER_FRAME
BYTES_PER_HOUR = int(3600 * FRAMES_PER_SECOND * (CODEBOOKS * 2 + 2))  # codes, and the rest roughly
SPEAKERS, EPOCHS, WARM_UP = 16, 10, 20
STEP_ROWS = Path(__file__).parent / "results" / "compare.jsonl"


# -------------------------------------------------------------------------------------------------------- the stores


def conversations(hours: float, seed: int = 0) -> Iterator[list[TurnTokens]]:
    """Random conversations of ``hours`` hours together (a little more)."""
    rng = np.random.default_rng([seed, round(hours * 1000)])
    left, source, block = round(hours * 3600 * FRAMES_PER_SECOND), 0, 1 << 16
    codes, text = np.zeros((0, CODEBOOKS), np.uint16), np.zeros(0, np.int32)
    at, word = block, block
    while left > 0:
        turns = []
        for _ in range(1 if rng.random() < 0.75 else int(rng.integers(2, 7))):
            frames = int(rng.integers(int(FRAMES_PER_SECOND), int(20 * FRAMES_PER_SECOND) + 1))
            words = 12 + int(2 * frames / FRAMES_PER_SECOND)
            if at + frames > block:  # numbers are drawn in blocks: a draw per turn would cost more than the writing
                codes, at = rng.integers(0, CODES, (block, CODEBOOKS), dtype=np.uint16), 0
            if word + words > block:
                text, word = rng.integers(0, TEXT_IDS, block, dtype=np.int32), 0
            piece = codes[at : at + frames]
            turns.append(TurnTokens(text[word : word + words], piece, int(rng.integers(SPEAKERS)), source))
            at, word, source, left = at + frames, word + words, source + 1, left - frames
        yield turns


def write_store(path: Path, hours: float) -> None:
    """A synthetic store at ``path``.

    Raises:
        InputError: the disk has no room for it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    needed, free = int(BYTES_PER_HOUR * hours), shutil.disk_usage(path.parent).free
    if needed > 0.9 * free:
        what = f"{hours:g} hours need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        raise InputError(what, file=path.parent, mend="choose another --dir, or fewer --hours")
    identity: dict[str, Any] = {"name": "synthetic", "fingerprint": "0" * 64}
    codec = {**identity, "num_codebooks": CODEBOOKS, "codebook_size": CODES}
    with TokenStoreWriter(
        path, codec=codec, text_tokenizer={**identity, "vocab_size": TEXT_IDS}, resampler="none"
    ) as writer:
        for turns in conversations(hours):
            writer.add_conversation(turns)


def forget(path: Path) -> None:
    """Have the page cache forget the store's files, but for pages that a process has mapped."""
    for shard in path.glob("*.safetensors"):
        with open(shard, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# ------------------------------------------------------------------------------------------- one process, one store


def private_memory() -> tuple[int, int]:
    """(private, anonymous) bytes of this process."""
    fields: dict[str, int] = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, size = line.split()[:2]
        fields[name.rstrip(":")] = int(size) * 1024
    return sum(size for name, size in fields.items() if name.startswith("Private_")), fields["Anonymous"]


def disk_bytes() -> int:
    """Bytes that this process had fetched from the disk so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def steps_of(packer: Packer, epochs: int = 1 << 30) -> Iterator[StepBatch]:
    """The steps of a run, as the trainer asks for them."""
    for epoch in range(epochs):
        index = 0
        while index < packer.steps_in_epoch(epoch):
            yield packer.step(epoch, index)
            index += 1


def section(pack_rows: int, by: str) -> DataSection:
    """Steps of one full pack ("rows"), or of 8 conversations ("conversations")."""
    return DataSection(pack_rows=pack_rows, batch_rows=pack_rows if by == "rows" else None)


class Watch:
    """Seconds and growth of memory and reading from one look to the next."""

    def __init__(self) -> None:
        gc.collect()
        self.start = private_memory()
        self.figures: dict[str, Any] = {}
        self.at = time.perf_counter()

    def seconds(self, name: str) -> None:
        self.figures[f"{name}_s"] = time.perf_counter() - self.at
        self.at = time.perf_counter()

    def memory(self, name: str) -> None:
        now = private_memory()
        for kind, before, after in zip(("private", "anonymous"), self.start, now, strict=True):
            self.figures[f"{name}_{kind}"] = after - before
        self.at = time.perf_counter()


def stream(path: Path, pack_rows: int, by: str, seconds: float, cold: bool) -> dict[str, Any]:
    """Open, plan and stream; runs in a process of its own."""
    watch = Watch()
    read = disk_bytes()
    store = TokenStore.open(path)
    watch.seconds("open")
    watch.memory("open")
    packer = Packer(store, section(pack_rows, by), LossSection(), pad="cpu")
    watch.seconds("packer")
    steps = packer.steps_in_epoch(0)
    packer.plan(0, 0)
    watch.seconds("plan")
    watch.memory("plan")
    watch.figures.update(steps=steps, conversations=len(store), turns=store.num_turns, frames=store.num_frames)
    for epoch in range(EPOCHS):
        packer.steps_in_epoch(epoch)
    watch.seconds("count")
    built: list[tuple[float, int]] = []
    batches = prefetch(timed(steps_of(packer), built))
    next(batches)
    watch.seconds("first_step")
    for _ in store.code_blocks():  # views: only the hashes are read
        pass
    watch.seconds("hash")
    watch.figures["open_disk"] = disk_bytes() - read
    if cold:
        forget(path)
    for _ in range(WARM_UP):
        next(batches)
    built.clear()
    watch.memory("warm")
    taken: list[tuple[float, int]] = []
    read, started = disk_bytes(), time.perf_counter()
    last = started
    while last - started < seconds or len(taken) < 50:
        rows = next(batches).rows
        now = time.perf_counter()
        taken.append((now - last, rows))
        last = now
    watch.memory("stream")
    watch.figures.update(
        streamed_rows=sum(rows for _, rows in taken),
        streamed_steps=len(taken),
        us_per_row=1e6 * statistics.median(s / rows for s, rows in taken),
        us_per_row_mean=1e6 * sum(s for s, _ in taken) / sum(rows for _, rows in taken),
        cpu_us_per_row=1e6 * statistics.median(s / rows for s, rows in built),
        stream_disk=disk_bytes() - read,
    )
    batches.close()
    return watch.figures


def timed(steps: Iterable[StepBatch], built: list[tuple[float, int]]) -> Iterator[StepBatch]:
    """``steps``; ``built`` gets each one's processor seconds of the thread that makes it, and its rows."""
    before = time.thread_time()
    for step in steps:
        built.append((time.thread_time() - before, step.rows))
        yield step
        before = time.thread_time()


def wait(path: Path, pack_rows: int, by: str, seconds: float, cold: bool) -> dict[str, Any]:
    """Train the tiny model for a few steps; how much of the time it waited for the next step."""
    from benchmarks.memory_plan import quick_model, settings
    from csm_fast import CSMConfig
    from csm_fast.loss import packed_loss
    from csm_fast.update import Update

    store = TokenStore.open(path)
    packer = Packer(store, section(pack_rows, by), LossSection(), pad="cpu")
    for _ in store.code_blocks():
        pass
    config = settings("full", "off")
    model = quick_model(CSMConfig.tiny()).train()
    loss = partial(packed_loss, a=0.5, b=0.5)
    update = Update(model, config.optimizer, torch.device("cpu"), "bf16", loss, 1000, 0)
    waited: list[float] = []
    batches, rows = prefetch(steps_of(packer)), 0
    for number in range(2):  # shapes that come for the first time
        update(next(batches), number)
    started = time.perf_counter()
    while time.perf_counter() - started < seconds or len(waited) < 5:
        asked = time.perf_counter()
        batch = next(batches)
        waited.append(time.perf_counter() - asked)
        update(batch, len(waited) + 1)
        rows += batch.rows
    took = time.perf_counter() - started
    batches.close()
    figures = {"waited_share": sum(waited) / took, "longest_wait_s": max(waited), "trained_steps": len(waited)}
    return {**figures, "rows_per_s": rows / took, "model": "tiny, bf16 products"}


WORK = {"stream": stream, "wait": wait}


# ------------------------------------------------------------------------------------------------------ the whole run


def ask(kind: str, **case: Any) -> dict[str, Any]:
    """The figures of one case, from a fresh process."""
    if case["cold"]:
        forget(Path(case["path"]))
    command = [sys.executable, "-m", "benchmarks.data_path", "--worker", json.dumps({"kind": kind, **case})]
    variables = {**os.environ, "THP_MEM_ALLOC_ENABLE": "1", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8192"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=variables)
    if done.returncode:
        raise SystemExit(f"error: a case stopped with status {done.returncode}; what it said is above")
    return json.loads(done.stdout.splitlines()[-1])


def work(case: dict[str, Any]) -> None:
    keep_freed_memory()
    function = WORK[case.pop("kind")]
    print(json.dumps(function(Path(case.pop("path")), **case)))


def middle(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Each figure's median; what is no number is the same in all."""
    return {
        name: statistics.median(a[name] for a in answers) if isinstance(value, (int, float)) else value
        for name, value in answers[0].items()
    }


def newest_step() -> tuple[float, str]:
    """Rows per second of csm_fast's training step in benchmarks/results/compare.jsonl, and which row that is."""
    rows = [json.loads(line) for line in STEP_ROWS.read_text().splitlines()] if STEP_ROWS.is_file() else []
    ours = [row for row in rows if row["system"].startswith("csm_fast") and "median_s" in row]
    if not ours:
        return 0.0, ""
    row = ours[-1]
    return row["rows"] / row[
        "median_s"
    ], f"{row['system']}, {row['label']}, {row['shape']}, {row['device']}, {row['date']}"


def spread(figures: Iterable[dict[str, Any]], name: str, more: float = 0.0) -> str:
    values = [f[name] + more for f in figures]
    return f"{max(values) / min(values) - 1:.1%}"


def verdict(found: dict[tuple[str, float, int], dict[str, Any]], rate: float) -> None:
    """How far the time per row is from flat: the loader's own, and with a training step's beside it."""
    most = max(found.values(), key=lambda f: f["turns"])
    opened, warm = (most[name] / 2**20 for name in ("open_private", "warm_private"))
    print(f"{most['turns']:,} turns: opened in {most['open_s']:.3f} s, {opened:.0f} MiB private", end="")
    print(f"; {warm:.0f} MiB with the Packer, its plans and {WARM_UP} steps")
    print("slowest over fastest: wall time, processor time, and step and loader one after the other")

    def show(what: str, figures: list[dict[str, Any]]) -> None:
        with_step = spread(figures, "us_per_row", 1e6 / rate) if rate else "-"
        print(f"  {what:45} {spread(figures, 'us_per_row'):>7} {spread(figures, 'cpu_us_per_row'):>7} {with_step:>7}")

    for by, rows in dict.fromkeys((by, rows) for by, _, rows in found):
        show(
            f"over the hours, by {by}, packs of {rows:,}", [f for (b, _, r), f in found.items() if (b, r) == (by, rows)]
        )
    for hours in dict.fromkeys(hours for _, hours, _ in found):
        show(
            f"over the pack sizes, {hours:g} hours", [f for (b, h, _), f in found.items() if (b, h) == ("rows", hours)]
        )


def mib(value: float) -> str:
    return f"{value / 2**20:7.1f}"


COLUMNS = "open s,packer,plan,count,first,hash,private,anon.,planned,anon.,us/row,mean,cpu,grown,anon.,disk,share"
HEADER = f"{'hours':>6} {'by':>13} {'pack':>6} " + " ".join(f"{name:>7}" for name in COLUMNS.split(","))


def line(hours: float, by: str, rows: int, f: dict[str, Any]) -> str:
    seconds = " ".join(f"{f[name + '_s']:7.3f}" for name in ("open", "packer", "plan", "count", "first_step", "hash"))
    memory = " ".join(mib(f[name]) for name in ("open_private", "open_anonymous", "plan_private", "plan_anonymous"))
    times = " ".join(f"{f[name]:7.3f}" for name in ("us_per_row", "us_per_row_mean", "cpu_us_per_row"))
    grown = " ".join(mib(f[f"stream_{kind}"] - f[f"warm_{kind}"]) for kind in ("private", "anonymous"))
    share = f"{f['loader_share']:7.2%}" if "loader_share" in f else "      -"
    return f"{hours:6g} {by:>13} {rows:6} {seconds} {memory} {times} {grown} {mib(f['stream_disk'])} {share}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, nargs="+", default=[1.0, 10.0, 100.0, 1000.0])
    parser.add_argument("--pack-rows", type=int, nargs="+", default=[2048, 16384])
    parser.add_argument("--dir", type=Path, help="of the stores; default: a temporary one")
    parser.add_argument("--keep", action="store_true", help="leave the stores that were written")
    parser.add_argument("--seconds", type=float, default=3.0, help="of streaming, and of training, per case")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-training", dest="train", action="store_false", help="leave out the tiny model")
    parser.add_argument("--cold", action="store_true", help="the page cache forgets the store first")
    parser.add_argument("--step-rows-per-second", type=float, help="of a training step; default: the newest recorded")
    parser.add_argument("--results", type=Path, help="append the figures to this .jsonl")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def run(args: argparse.Namespace, paths: dict[float, Path]) -> None:
    rate, where = newest_step()
    if args.step_rows_per_second:
        rate, where = args.step_rows_per_second, "--step-rows-per-second"
    common = {"seconds": args.seconds, "cold": args.cold}

    def record(kind: str, hours: float, by: str, rows: int, figures: dict[str, Any]) -> None:
        if args.results:
            case = {"hours": hours, "by": by, "pack_rows": rows, **common, "repeats": args.repeats}
            append(args.results, {"benchmark": "data_path", "kind": kind, **case, **figures, **environment()})

    cases = [("rows", h, rows) for rows in args.pack_rows for h in paths]
    cases += [("conversations", h, max(args.pack_rows)) for h in paths]
    answers: dict[tuple[str, float, int], list[dict[str, Any]]] = {case: [] for case in cases}
    for _ in range(args.repeats):
        for by, hours, rows in cases:
            answer = ask("stream", path=str(paths[hours]), pack_rows=rows, by=by, **common)
            answers[by, hours, rows].append(answer)
    print("cold page cache" if args.cold else "warm page cache", "| memory in MiB")
    if rate:
        print(f"share: the loader's time per row of a training step at {rate:,.0f} rows/s ({where})")
    print(HEADER)
    found = {case: middle(some) for case, some in answers.items()}
    for (by, hours, rows), figures in found.items():
        if rate:
            figures.update(loader_share=figures["us_per_row"] * 1e-6 * rate, step_rows_per_s=rate, step=where)
        print(line(hours, by, rows, figures), flush=True)
        record("stream", hours, by, rows, figures)
    verdict(found, rate)
    for hours, path in paths.items() if args.train else ():
        rows = min(args.pack_rows)
        figures = ask("wait", path=str(path), pack_rows=rows, by="rows", **common)
        print(
            f"{hours:g} hours, tiny model, packs of {rows:,}: {figures['waited_share']:.3%} of the time waited for a "
            f"step, {figures['longest_wait_s'] * 1e3:.1f} ms at most, at {figures['rows_per_s']:,.0f} rows/s"
        )
        record("wait", hours, "rows", rows, figures)


def main() -> int:
    args = arguments()
    if args.worker:
        work(json.loads(args.worker))
        return 0
    folder = args.dir or Path(tempfile.mkdtemp(prefix="csm_fast-data-path-"))
    paths, written = {hours: folder / f"synthetic-{hours:g}-hours" for hours in args.hours}, []
    try:
        for hours, path in paths.items():
            if not (path / "manifest.json").is_file():
                started = time.perf_counter()
                written.append(path)
                write_store(path, hours)
                print(f"{path}: written in {time.perf_counter() - started:.1f} s", flush=True)
        run(args, paths)
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
