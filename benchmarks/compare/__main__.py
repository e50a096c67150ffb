"""csm_fast against what people train CSM with today, in one run: time, memory, and whether the losses are the same.

    python -m csm_fast.data.demo corpus --sounds
    csm-fast pretokenize --train-data corpus/metadata.json --codec offline --output corpus/tokens
    python -m benchmarks.compare --data corpus/tokens --sesame-csm ../csm --sesame-finetune ../sesame-finetune

    python -m benchmarks.compare --synthetic 200 --device cuda --shape csm-1b

Every system runs in a process of its own, one at a time, as its users would run it: csm_fast as ``csm-fast-train`` sets
its process up (on a CPU it keeps freed memory, in huge pages), the others in plain PyTorch; a process that runs all of
them would lend each the heap that the others leave. "-kept" is a system in a process set up as csm_fast's: what that
alone is worth. ``--allocator`` gives everybody the one or the other.

Every system sees the same recordings, weights (random) and, at equal updates, the same frames. Equal updates: batches
of 8, then 32 recordings; the others pad buckets of similar length, csm_fast packs the same recordings. Free packing:
csm_fast in packs of ``--pack-rows``, the others in their buckets. Times are of forward and backward passes, batches
built beforehand; the optimizer's time per update is measured beside them. Repetitions are interleaved, on a CPU piece
by piece, because a rented machine is fast for some minutes and slow for others; medians are shown. A system that takes
minutes (``is_slow``) runs the first of ``--batches`` only, and a part of them per repetition, every third of three:
together an epoch. Times are then those of a part and of the longest batch, and of a straight line over the rows laid
out for the rest (``Running.run_part``). transformers and whoever keeps memory run parts, too, so that it all takes a
quarter of an hour.

On a processor that has no products of bf16, PyTorch's are ten to a hundred times as slow as its float32 ones, so the
systems train in float32 there (``--precision``), everybody runs parts (``systems.parts``), and the longest batch where
that is no matter of minutes or of all memory (``systems.runs_longest``).

A system's loss on a batch must be the float32 value to 1e-5 (float32) or 1e-2 (bf16), or it is shown without a
ranking.

"blog" is the published forward: sesame-finetune's on Sesame's own ``Model`` (``--sesame-csm``, see benchmarks/parity.py
for what that needs); "padded" the same in our words on our modules, which stands in without those directories.
"transformers" is amortized through its labels, "transformers-all-frames" is how its users run it.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.record import append
from benchmarks.compare.systems import (
    SYSTEMS,
    in_precision,
    is_slow,
    keeps_memory,
    parts,
    runs_alone,
    runs_longest,
    tolerance,
)
from benchmarks.compare.table import OURS, is_free, print_tables
from benchmarks.compare.worker import SHAPES, Running, answers, expected, reference
from csm_fast.system.device import resolve_device, resolve_precision

PIECES = 6  # of a repetition on a CPU; on a GPU memory would be given back and taken again for each


class Stopped(Exception):
    """A system's process ended by itself."""


class Worker:
    """A system in a process of its own."""

    def __init__(self, args: argparse.Namespace, name: str):
        variables = dict(os.environ)
        if keeps_memory(args, name):
            variables.update(ONEDNN_PRIMITIVE_CACHE_CAPACITY="8192", THP_MEM_ALLOC_ENABLE="1")
        command = [sys.executable, "-m", "benchmarks.compare", *sys.argv[1:], "--worker", name]
        self.name = name
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables
        )

    @functools.cached_property
    def about(self) -> Any:
        """What it says of itself when it is ready. To be asked for before anything else."""
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise Stopped(f"{self.name} stopped with status {self.process.wait()}")
        return json.loads(line)

    def post(self, what: str, *arguments: Any) -> None:
        """A question whose answer is asked for later."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # who has stopped does not answer either
            self.process.stdin.write(json.dumps([what, *arguments]) + "\n")
            self.process.stdin.flush()

    def answer(self) -> Any:
        """To the question that was posted; None where the memory did not last for it."""
        return self._answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


def work(args: argparse.Namespace) -> None:
    """The worker's side: say what there is, then answer one question per line."""
    # Whatever a library prints, C code too, is no answer.
    out, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr
    os.dup2(2, 1)

    def answer(value: Any) -> None:
        print(json.dumps(value), file=out, flush=True)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who asks will close what it asks through
    if args.worker == "reference":
        answer(reference(args))
        return
    running = Running(args)
    known = answers(running)
    answer(running.about())
    for line in sys.stdin:
        what, *arguments = json.loads(line)
        try:
            value = known[what](*arguments)
        except torch.OutOfMemoryError as error:
            first = str(error).splitlines()[0]
            print(f"{args.worker}, {what}: {first}", file=sys.stderr)
            value = None
        if value is None:  # outside of the handler, whose traceback holds the tensors
            running.drop_gradients()
        running.release()
        answer(value)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="demo/tokens")
    parser.add_argument("--splits", nargs="+", choices=["train", "val"], help="of --data; default: all that are there")
    parser.add_argument("--synthetic", type=int, metavar="N", help="N random recordings take the place of --data")
    parser.add_argument("--sesame-csm", type=Path)
    parser.add_argument("--sesame-finetune", type=Path)
    parser.add_argument("--share", type=float, default=1.0, help="share of the recordings, evenly over their lengths")
    parser.add_argument("--middle", type=int, metavar="N", help="only the N recordings of middle length: one batch")
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), help="default: csm_fast's and the others'")
    parser.add_argument(
        "--precision",
        choices=["auto", "bf16", "fp32"],
        default="auto",
        help="of the others whose names tell none; auto: float32 on a CPU without products of bf16, else bf16",
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--pack-rows", type=int, default=2048, help="of csm_fast's free packing")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-optimizer", action="store_true", help="leave the optimizer's time out")
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing, where there is one")
    parser.add_argument("--memory-only", action="store_true", help="no times")
    parser.add_argument("--allocator", choices=["own", "kept", "plain"], default="own", help="of a CPU's memory")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.synthetic is not None and args.synthetic < 1:
        parser.error(f"--synthetic {args.synthetic}: there are no recordings to train on; give at least 1")
    there = [name for name in ("train", "val") if (Path(args.data) / name).is_dir()]
    if not args.synthetic and not there:
        parser.error(f"{args.data}: no tokens there; csm-fast pretokenize makes them, or take --synthetic 200")
    args.splits = args.splits or there
    real = args.sesame_csm and args.sesame_finetune
    theirs = "blog" if real else "padded"
    if args.precision == "auto":
        without = args.device == "cpu" and resolve_precision("auto", resolve_device("cpu")) == "fp32"
        args.precision = "fp32" if without else "bf16"
    own = "csm_fast" if args.precision == "bf16" else "csm_fast-fp32"
    kept = [f"{theirs}-kept"] if args.device == "cpu" else []
    default = [own, theirs, *kept, f"{theirs}-fp32", "transformers", "transformers-all-frames"]
    args.systems = args.systems or default
    args.systems = list(dict.fromkeys(in_precision(name, args.precision) for name in args.systems))
    if not real and (asked := [name for name in args.systems if SYSTEMS[name].code == "blog"]):
        parser.error(f"{asked[0]} needs --sesame-csm and --sesame-finetune, or take padded")
    return args


class Race:
    """Some systems, each in its process, that take turns.

    Attributes:
        rows: one per system and label, of those that have not stopped: what it is, its times, its memory, its loss's
            difference. They grow while ``run`` runs, so that what is there counts whatever happens then.
        lost: why a system has stopped, by its name.
    """

    def __init__(
        self, args: argparse.Namespace, truth: dict[str, float], record: Callable[[list[dict[str, Any]]], None]
    ):
        """``record`` is called with the rows when there will be no more."""
        self.args, self.truth, self.record = args, truth, record
        self.turns = PIECES if args.device == "cpu" else 1
        self.workers: dict[str, Worker] = {}
        self.rows: list[dict[str, Any]] = []
        self.lost: dict[str, str] = {}

    def run(self, names: list[str]) -> None:
        try:
            self._run(names)
        except BaseException:
            for worker in self.workers.values():  # one of them may be at a question that takes minutes
                worker.process.kill()
            raise
        finally:
            # First, because giving a GPU's memory back takes seconds, and whoever ends this may not wait for them.
            self.record(self.rows)
            for worker in self.workers.values():
                worker.close()

    def _ask(self, name: str, *question: Any) -> Any:
        """Without a question, what it says of itself. None of a system that has stopped, or does so now."""
        if name in self.lost:
            return None
        if question:
            self.workers[name].post(*question)
        return self._told(name, not question)

    def _told(self, name: str, about: bool = False) -> Any:
        """The answer to what was posted."""
        if name in self.lost:
            return None
        try:
            return self.workers[name].about if about else self.workers[name].answer()
        except Stopped as error:
            self.lost[name] = str(error)
            self.rows = [row for row in self.rows if row["system"] != name or "median_s" in row]
            return None

    def _run(self, names: list[str]) -> None:
        args = self.args
        for name in names:
            self.workers[name] = Worker(args, name)
            if args.device == "cpu":
                # One after the other: a model of 1.5 billion float32 weights is there for a moment.
                self._ask(name)
        introduced = {name: self._ask(name) for name in names}
        if args.device != "cpu":  # where it is compiling that takes the time, which can be done at once
            for name in names:
                self.workers[name].post("check")
        for name in names:
            said, right = introduced[name], expected(name, self.truth)
            loss = self._ask(name, "check") if args.device == "cpu" else self._told(name)
            if loss is None:
                continue
            difference = abs(loss - right) / abs(right)
            common = {k: v for k, v in said.items() if k not in ("labels", "environment")}
            common.update(loss_difference=difference, ranked=difference <= tolerance(name), **said["environment"])
            labels = list(said["labels"].items())[: 1 if is_slow(args, name) else None]
            self.rows += [{"system": name, "label": label, **about, **common} for label, about in labels]
        # Counting a CPU's tensors, or trying its products, leaves its heap as no user has it, so that comes last there.
        # Elsewhere what matters comes first, in case time runs out, and last what takes most memory.
        on_cpu, elsewhere = ("times", "updates", "memory", "rates"), ("rates", "times", "memory", "updates")
        for step in on_cpu if args.device == "cpu" else elsewhere:
            if step == "memory" or not args.memory_only:
                getattr(self, f"_{step}")()

    def _times(self) -> None:
        args = self.args
        # Warm: csm_fast, which keeps products' kernels and memory, on all batches, or many, the others on some.
        for row in list(self.rows):
            # The longest batch is set aside.
            row["parts"] = max(1, min(parts(args, row["system"]), row["updates"] - 1))
            own = row["system"].startswith("csm_fast")
            share = (1 / 8 if own else 1 / 16) if row["parts"] > 1 else (1.0 if own else 1 / 4)
            self._ask(row["system"], "run", row["label"], share)
        for repeat in range(args.repeats):
            done: dict[tuple[str, str], float | None] = {}
            for turn in range(self.turns):
                for row in list(self.rows):
                    key = row["system"], row["label"]
                    for piece in self._pieces(row, turn):
                        seconds = None if key in done and done[key] is None else self._ask_piece(row, repeat, piece)
                        done[key] = None if seconds is None else (done.get(key) or 0.0) + seconds
            for row in self.rows:
                if (whole := done.get((row["system"], row["label"]))) is not None:
                    row.setdefault("seconds", []).append(whole)
                    row["median_s"] = statistics.median(row["seconds"])

    def _pieces(self, row: dict[str, Any], turn: int) -> range:
        """The pieces of a repetition that a row runs when it is its turn: few batches are few pieces, spread out."""
        pieces = self._num_pieces(row)
        return range(turn * pieces // self.turns, (turn + 1) * pieces // self.turns)

    def _num_pieces(self, row: dict[str, Any]) -> int:
        batches = row["updates"] if row["parts"] == 1 else (row["updates"] - 1) // row["parts"]
        return max(1, min(self.turns, batches))

    def _ask_piece(self, row: dict[str, Any], repeat: int, piece: int) -> Any:
        pieces = piece, self._num_pieces(row)
        if row["parts"] == 1:
            return self._ask(row["system"], "run", row["label"], 1.0, *pieces)
        longest = runs_longest(self.args, row["system"], row["label"])
        part = repeat % row["parts"], row["parts"]
        return self._ask(row["system"], "run_part", row["label"], *part, longest, *pieces)

    def _updates(self) -> None:
        updates: dict[tuple[str, str], float] = {}
        for row in [] if self.args.no_optimizer else list(self.rows):
            name = row["system"]
            # csm_fast's depend on the rows that a batch looks up, PyTorch's on nothing.
            key = name, row["label"] if name.startswith("csm_fast") else ""
            if key not in updates:
                updates[key] = self._ask(name, "optimizer", row["label"])
            if updates[key] is not None:
                row["optimizer_s"] = updates[key] * row["updates"]

    def _rates(self) -> None:
        """The machine's, for the products of each label; csm_fast's process measures it, where that is there."""
        rates: dict[str, float] = {}
        for row in sorted(self.rows, key=lambda row: row["system"] != "csm_fast"):
            if row["flops"] and (self.args.precision == "bf16" or row["system"] in OURS):
                if row["label"] not in rates:
                    rates[row["label"]] = self._ask(row["system"], "rate", row["label"])
                row["matmul_rate"] = rates[row["label"]]

    def _memory(self) -> None:
        for row in list(self.rows):
            same_as_plain = is_free(row) or SYSTEMS[row["system"]].kept
            if not same_as_plain and (memory := self._ask(row["system"], "memory", row["label"])):
                row["memory"] = memory


def finished(args: argparse.Namespace, rows: list[dict[str, Any]], started: str) -> list[dict[str, Any]]:
    """The rows that say something, complete with what the run says of all, written to the results."""
    some = [row for row in rows if "median_s" in row or args.memory_only]
    for row in some:
        row.update(run=started, shape=args.shape, allocator=args.allocator, checkpointing=args.checkpointing)
        row["data"] = "synthetic" if args.synthetic else "recordings"
        row["sesame_model"] = SYSTEMS[row["system"]].code == "blog"
        if args.results:
            append(args.results, {"benchmark": "compare", **row})
    return some


class Ended(Exception):
    """Somebody wants the comparison to end."""


def _end(number: int, _: Any) -> None:
    signal.signal(number, signal.SIG_DFL)
    raise Ended(signal.Signals(number).name)


def _compare(args: argparse.Namespace, started: str, rows: list[dict[str, Any]]) -> int:
    """Add the rows of all systems to ``rows`` as they are finished. The exit status."""
    try:
        truth = Worker(args, "reference").about
    except Stopped as error:
        print(f"error: {error}; what it said is above", file=sys.stderr)
        return 1
    alone = [name for name in args.systems if runs_alone(args, name)]
    groups = [[name for name in args.systems if name not in alone], *([name] for name in alone)]
    status = 0
    while groups:
        names = groups.pop(0)

        def record(some: list[dict[str, Any]]) -> None:
            rows.extend(finished(args, some, started))

        race = Race(args, truth, record)
        race.run(names)
        for name, why in race.lost.items():
            if any(row["system"] == name for row in race.rows):
                print(f"{why}; what it showed before counts", file=sys.stderr)
            elif len(names) > 1:  # perhaps the others had the memory
                print(f"{why}; it will be tried again without the others", file=sys.stderr)
                groups.append([name])
            else:
                print(f"error: {why}; what it said is above", file=sys.stderr)
                status = 1
    return status


def main() -> int:
    args = arguments()
    if args.worker:
        work(args)
        return 0
    started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)
    rows: list[dict[str, Any]] = []
    try:
        status = _compare(args, started, rows)
    except Ended as why:
        print(f"error: ended by {why}; what is there is shown and recorded", file=sys.stderr)
        status = 1
    if rows:
        print_tables(rows)
    return status


if __name__ == "__main__":
    sys.exit(main())
