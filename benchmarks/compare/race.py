"""Systems that take turns, each in a process of its own."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from benchmarks.common.processes import KEPT_MEMORY
from benchmarks.common.record import Row
from benchmarks.compare.reference import expected_loss
from benchmarks.compare.systems import SYSTEMS, is_slow, keeps_memory, num_parts, runs_longest, tolerance
from benchmarks.compare.table import OURS, is_free

PIECES = 6  # of a repetition on a CPU; on a GPU every piece would free and allocate the memory again


class Stopped(Exception):
    """A system's process ended by itself."""


class Worker:
    """A system in a process of its own, which answers one question per line (``worker.answer_questions``)."""

    def __init__(self, args: argparse.Namespace, name: str):
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.compare", *sys.argv[1:], "--worker", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(KEPT_MEMORY if keeps_memory(args, name) else {})},
        )

    @functools.cached_property
    def about(self) -> Any:
        """What the system says of itself when it is ready; the first line to read."""
        return self.read_answer()

    def read_answer(self) -> Any:
        """The answer to the question that was posted; None if it took more memory than there is.

        Raises:
            Stopped: the process has ended.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise Stopped(f"{self.name} stopped with status {self.process.wait()}")
        return json.loads(line)

    def post(self, what: str, *arguments: Any) -> None:
        """Send a question whose answer is read later."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # ``read_answer`` raises then
            self.process.stdin.write(json.dumps([what, *arguments]) + "\n")
            self.process.stdin.flush()

    def close(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


class Race:
    """Some systems, each in its process, that take turns.

    Attributes:
        rows: one per system and label, of those that have not stopped: what it is, its times, its memory, its loss's
            difference. They grow while ``run`` runs, so that they can be recorded whenever it ends.
        lost: why a system has stopped, by its name.
    """

    def __init__(self, args: argparse.Namespace, truth: dict[str, float], record: Callable[[list[Row]], None]):
        """``record`` is called with the rows when there will be no more."""
        self.args, self.truth, self.record = args, truth, record
        self.turns = PIECES if args.device == "cpu" else 1
        self.workers: dict[str, Worker] = {}
        self.rows: list[Row] = []
        self.lost: dict[str, str] = {}

    def run(self, names: list[str]) -> None:
        try:
            self._start(names)
            # Counting a CPU's tensors, or timing its products, leaves a heap that no user has, so that comes last on a
            # CPU. On a GPU the most important comes first, in case time runs out, and what takes most memory last.
            on_cpu, elsewhere = ("times", "updates", "memory", "rates"), ("rates", "times", "memory", "updates")
            for step in on_cpu if self.args.device == "cpu" else elsewhere:
                if step == "memory" or not self.args.memory_only:
                    getattr(self, f"_measure_{step}")()
        except BaseException:
            for worker in self.workers.values():  # one of them may be at a question that takes minutes
                worker.process.kill()
            raise
        finally:
            # Before the workers end: a GPU takes seconds to free their memory, and a second signal may come.
            self.record(self.rows)
            for worker in self.workers.values():
                worker.close()

    def _ask(self, name: str, *question: Any) -> Any:
        """The answer of a system, or what it says of itself without a question; None if it has stopped."""
        if question and name not in self.lost:
            self.workers[name].post(*question)
        return self._read(name, not question)

    def _read(self, name: str, about: bool = False) -> Any:
        """The answer to the question that was posted."""
        if name in self.lost:
            return None
        try:
            return self.workers[name].about if about else self.workers[name].read_answer()
        except Stopped as error:
            self.lost[name] = str(error)
            self.rows = [row for row in self.rows if row["system"] != name or "median_s" in row]
            return None

    def _start(self, names: list[str]) -> None:
        """Start the systems, check their losses, and begin their rows."""
        args, on_cpu = self.args, self.args.device == "cpu"
        for name in names:
            self.workers[name] = Worker(args, name)
            if on_cpu:  # one after the other: each holds 1.5 billion float32 weights for a moment
                self._ask(name)
        introduced = {name: self._ask(name) for name in names}
        if not on_cpu:  # all at once, because compiling takes most of the time
            for name in names:
                self.workers[name].post("check")
        for name in names:
            about, right = introduced[name], expected_loss(name, self.truth)
            loss = self._ask(name, "check") if on_cpu else self._read(name)
            if loss is None:
                continue
            difference = abs(loss - right) / abs(right)
            common = {k: v for k, v in about.items() if k not in ("labels", "environment")}
            common.update(loss_difference=difference, ranked=difference <= tolerance(name), **about["environment"])
            labels = list(about["labels"].items())[: 1 if is_slow(args, name) else None]
            self.rows += [{"system": name, "label": label, **figures, **common} for label, figures in labels]

    def _measure_times(self) -> None:
        # Warm up: csm_fast, which keeps the products' kernels and memory, on all batches or many, the others on some.
        for row in list(self.rows):
            row["parts"] = max(1, min(num_parts(self.args, row["system"]), row["updates"] - 1))  # besides the longest
            own = row["system"].startswith("csm_fast")
            share = (1 / 8 if own else 1 / 16) if row["parts"] > 1 else (1.0 if own else 1 / 4)
            self._ask(row["system"], "run", row["label"], share)
        for repeat in range(self.args.repeats):
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

    def _pieces(self, row: Row, turn: int) -> range:
        """The pieces of a repetition that a row runs when it is its turn: few batches are few pieces, spread out."""
        pieces = self._num_pieces(row)
        return range(turn * pieces // self.turns, (turn + 1) * pieces // self.turns)

    def _num_pieces(self, row: Row) -> int:
        batches = row["updates"] if row["parts"] == 1 else (row["updates"] - 1) // row["parts"]
        return max(1, min(self.turns, batches))

    def _ask_piece(self, row: Row, repeat: int, piece: int) -> Any:
        pieces = piece, self._num_pieces(row)
        if row["parts"] == 1:
            return self._ask(row["system"], "run", row["label"], 1.0, *pieces)
        longest = runs_longest(self.args, row["system"], row["label"])
        part = repeat % row["parts"], row["parts"]
        return self._ask(row["system"], "run_part", row["label"], *part, longest, *pieces)

    def _measure_updates(self) -> None:
        updates: dict[tuple[str, str], float] = {}
        for row in [] if self.args.no_optimizer else list(self.rows):
            name = row["system"]
            # csm_fast's time depends on the rows that a batch looks up, PyTorch's on nothing.
            key = name, row["label"] if name.startswith("csm_fast") else ""
            if key not in updates:
                updates[key] = self._ask(name, "optimizer_seconds", row["label"])
            if updates[key] is not None:
                row["optimizer_s"] = updates[key] * row["updates"]

    def _measure_rates(self) -> None:
        """The machine's rate for the products of each label; csm_fast's process measures it, if there is one."""
        rates: dict[str, float] = {}
        for row in sorted(self.rows, key=lambda row: row["system"] != "csm_fast"):
            if row["flops"] and (self.args.precision == "bf16" or row["system"] in OURS):
                if row["label"] not in rates:
                    rates[row["label"]] = self._ask(row["system"], "rate", row["label"])
                row["matmul_rate"] = rates[row["label"]]

    def _measure_memory(self) -> None:
        for row in list(self.rows):
            same_as_plain = is_free(row) or SYSTEMS[row["system"]].kept
            if not same_as_plain and (memory := self._ask(row["system"], "memory", row["label"])):
                row["memory"] = memory
