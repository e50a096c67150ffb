"""The pytest-benchmark suite: how things are timed, and how a run is compared with a stored one of the same machine.

    pytest benchmarks/                        compare with the last stored run of this machine; without one, store this
    pytest benchmarks/ --benchmark-autosave   store this run: what the next ones are compared with
    pytest benchmarks/ --benchmark-compare=0002 --benchmark-compare-fail=min:10%

Runs lie under ``.benchmarks/``, where pytest-benchmark keeps them; a machine is its processor or GPU, its cores and the
threads in use. If something is slower than stored by more than ``SLOWER`` percent, the run fails and names it. A stored
run is replaced only on request, so that many small slow-downs add up and are caught as well.

On a machine that others use, too, some ways to measure time repeat better than others. With five processes on its two
cores, the same code in two to four processes differed from the fastest to the slowest by (the middle one of some
fifteen benchmarks): 55 % for the fastest round on two threads in wall-clock time, 61 % on one thread, 20 % without the
time in which another process had the core, 10 % relative to the yardstick as well; means by 32 and 20 %. Therefore

- one thread on a CPU (unless ``OMP_NUM_THREADS`` is set): with two, another process on one core delays both at every
  barrier. An operator that no longer uses its threads is not found;
- a clock that omits the time in which other processes had the core, and counts what the program itself waits for;
- the fastest round: whatever disturbs a round makes it slower, never faster;
- a yardstick between the rounds, in plain PyTorch, so that our changes do not affect it: a stored figure is scaled by
  the yardstick now over the yardstick then;
- what seems slower is timed again, up to ``AGAIN`` times: a slower program stays slower.

The effect of other processes on caches and memory remains; the summary says when they had much of the time.
"""

from __future__ import annotations

import gc
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.session import PerformanceRegression
from pytest_benchmark.utils import get_tag, parse_compare_fail

from benchmarks.common.device import wait
from benchmarks.common.processes import KEPT_MEMORY
from benchmarks.common.record import environment
from csm_fast.system.device import compute_dtype, keep_freed_memory, resolve_device, resolve_precision

SLOWER = 20
"""Percent over the stored figure that fail the run."""
SECONDS = 1.0
"""Of rounds per benchmark."""
AGAIN = 5
"""Times that what seems slower is timed again."""
ROUND = 2e-3
"""Least seconds of a round; shorter calls are repeated within it."""
FEWEST, MOST = 5, 200
"""Rounds."""
MACHINE = ("device", "cores", "threads")
"""Two runs with the same values of these fields are from the same machine."""
TIMES = ("min", "max", "mean", "stddev", "median", "iqr", "q1", "q3", "ld15iqr", "hd15iqr", "total")

STORED = pytest.StashKey[dict[str, dict[str, Any]]]()
"""The benchmarks of the stored run by name, each scaled when it has been measured now."""
SEEN = pytest.StashKey[dict[str, float]]()
"""The fastest round of what has been measured now, in seconds."""
FACTS = pytest.StashKey[dict[str, Any]]()
SESSION = pytest.StashKey[pytest.Session]()
BUSY = 0.1
"""The summary names the share of the time that other processes had from here on."""


class Clock:
    """Seconds of this thread: wall-clock time less the time in which it was ready to run and another had its core.
    Linux counts that; elsewhere it is wall-clock time."""

    def __init__(self) -> None:
        try:
            self.counts = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
        except OSError:
            self.counts = -1
        self.started, self.started_wall = self(), time.perf_counter()

    def lost(self) -> float:
        """Share of the time since this clock was made in which another had the core."""
        return 1 - (self() - self.started) / (time.perf_counter() - self.started_wall)

    def __call__(self) -> float:
        if self.counts < 0:
            return time.perf_counter()
        while True:
            before, now, after = self._waited_ns(), time.perf_counter(), self._waited_ns()
            if before == after:  # else this thread lost its core in between
                return now - after * 1e-9

    def _waited_ns(self) -> int:
        return int(os.pread(self.counts, 99, 0).split()[1])


CLOCK = pytest.StashKey[Clock]()


# --------------------------------------------------------------------------------------------------------- comparing


def pytest_configure(config: pytest.Config) -> None:
    """Choose what to compare with, before pytest-benchmark reads its options."""
    # As csm-fast-train sets up its process; without it, equal code differs by a tenth from process to process.
    for name, value in KEPT_MEMORY.items():
        os.environ.setdefault(name, value)
    keep_freed_memory()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    config.stash[STORED], config.stash[SEEN] = {}, {}
    option = config.option
    if option.benchmark_disable or option.benchmark_skip or option.collectonly:
        return
    option.benchmark_quiet = not option.benchmark_verbose  # ``print_summary`` is shorter
    if option.benchmark_storage == "file://./.benchmarks":
        option.benchmark_storage = f"file://{config.rootpath / '.benchmarks'}"
    if option.benchmark_compare in ([], True):
        mine = find_stored_runs(option.benchmark_storage, describe_machine())
        saves = option.benchmark_save or option.benchmark_autosave
        if mine and (option.benchmark_compare or not saves):
            option.benchmark_compare = str(mine[-1])
        elif option.benchmark_compare:
            where = option.benchmark_storage
            raise pytest.UsageError(f"no stored run of this machine in {where}; store one with --benchmark-autosave")
        elif not saves and is_whole(config):
            option.benchmark_autosave = get_tag()
    if option.benchmark_compare and not option.benchmark_compare_fail:
        option.benchmark_compare_fail = [parse_compare_fail(f"min:{SLOWER}%")]


def is_whole(config: pytest.Config) -> bool:
    """Whether the command line leaves nothing out; only a whole run is stored unasked."""
    chosen = config.option.keyword or config.option.markexpr
    return not chosen and all(Path(arg).is_dir() for arg in config.args)


def describe_machine() -> dict[str, Any]:
    """Device, cores, threads, versions."""
    facts = {name: value for name, value in environment().items() if name not in ("commit", "date")}
    return {**facts, "cores": os.cpu_count()}


def find_stored_runs(storage: str, here: dict[str, Any]) -> list[Path]:
    """Files of runs of this machine, the newest last; files that cannot be read are skipped."""
    found = []
    for path in Path(storage.removeprefix("file://")).glob("*/[0-9][0-9][0-9][0-9]_*.json"):
        try:
            run = json.loads(path.read_text(encoding="utf-8"))
            there, when = run["machine_info"], run["datetime"]
        except (ValueError, KeyError):
            continue
        if all(there.get(name) == here[name] for name in MACHINE):
            found.append((when, path))
    return [path for _, path in sorted(found)]


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    return describe_machine()


def pytest_benchmark_compare_machine_info(config: pytest.Config, compared_benchmark: dict[str, Any]) -> None:
    """pytest-benchmark has read a stored run, and compares with the same dictionaries after ``scale_stored``."""
    config.stash[FACTS] = compared_benchmark
    some = compared_benchmark["benchmarks"]
    config.stash[STORED] = {b["fullname"]: b for b in some if "yardstick" in b["extra_info"]}


def scale_stored(stored: dict[str, Any], yardstick: float) -> None:
    """Scale the seconds of a stored benchmark to the speed of the machine now."""
    factor = yardstick / stored["extra_info"]["yardstick"]
    for name in TIMES:
        if name in stored["stats"]:
            stored["stats"][name] *= factor
    stored["stats"]["ops"] /= factor
    stored["extra_info"] = {**stored["extra_info"], "yardstick": yardstick}


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.stash[SESSION] = session


@pytest.hookimpl(wrapper=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> Iterator[None]:
    try:
        print_summary(terminalreporter, config)
        return (yield)
    except PerformanceRegression:  # its message has named what is slower; a traceback adds nothing
        config.stash[SESSION].exitstatus = pytest.ExitCode.TESTS_FAILED


def print_summary(out: pytest.TerminalReporter, config: pytest.Config) -> None:
    seen, stored = config.stash[SEEN], config.stash[STORED]
    if not seen:
        return
    out.section("benchmarks")
    if FACTS in config.stash:
        run = config.stash[FACTS]
        commit = str(run["commit_info"].get("id"))[:8]
        out.write_line(f"stored: {run['datetime'][:16]}, commit {commit}, scaled to the speed of the machine now")
    elif config.option.benchmark_autosave or config.option.benchmark_save:
        out.write_line("stored this run; the next ones are compared with it")
    lost = config.stash[CLOCK].lost()
    if lost > BUSY:
        out.write_line(f"other processes had the core {lost:.0%} of the time; figures repeat better on a quiet machine")
    width = max(map(len, seen))
    out.write_line(f"{'fastest round, ms':{width}} {'now':>9} {'stored':>9} {'now/stored':>10}")
    for name, now in seen.items():
        line = f"{name:{width}} {now * 1e3:9.3f}"
        if name in stored:
            then = stored[name]["stats"]["min"]
            line += f" {then * 1e3:9.3f} {now / then:10.2f}"
        out.write_line(line)


# ------------------------------------------------------------------------------------------------------------ timing


@pytest.fixture(scope="session")
def device() -> torch.device:
    return resolve_device("auto")


@pytest.fixture(scope="session")
def dtype(device: torch.device) -> torch.dtype:
    """bf16 wherever that is fast."""
    return compute_dtype(resolve_precision("auto", device))


class Yardstick:
    """How fast the machine is: seconds of a matrix product, and of an elementwise function of a tensor. (With a copy
    larger than the caches as a third part, figures repeated worse.)"""

    def __init__(self, device: torch.device, dtype: torch.dtype, clock: Clock):
        self.device, self.clock = device, clock
        side, size = (4096, 2**28) if device.type == "cuda" else (512, 2**18)
        self.a, self.b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        self.x = torch.randn(size, device=device)
        for _ in range(20):
            self()

    def __call__(self) -> tuple[float, float]:
        return self._seconds(lambda: self.a @ self.b), self._seconds(lambda: self.x.exp())

    def _seconds(self, call: Callable[[], Any]) -> float:
        started = self.clock()
        call()
        wait(self.device)
        return self.clock() - started


class Timer:
    """Times one call in rounds, with the yardstick between them.

    Attributes:
        benchmark: pytest-benchmark's fixture, which keeps the seconds of each round.
        stored: what pytest-benchmark compares them with, or None.
        yards: seconds of the yardstick's parts, one row per round.
    """

    def __init__(self, benchmark: Any, yardstick: Yardstick, stored: dict[str, Any] | None):
        self.benchmark, self.yardstick, self.stored = benchmark, yardstick, stored
        self.yards: list[tuple[float, float]] = []

    def run(self, call: Callable[[], Any]) -> None:
        """Run rounds for ``SECONDS``, and again if the call seems slower than the stored one."""

        def finished() -> None:
            call()
            wait(self.yardstick.device)

        clock = self.yardstick.clock
        for _ in range(2):  # the first calls build matrix products and plans, allocate memory, compile
            finished()
        started = clock()
        finished()
        repeats = max(1, math.ceil(ROUND / (clock() - started)))
        # pytest-benchmark's own loop has no place for a yardstick: it runs one round, and the others are added to it.
        self.benchmark.pedantic(finished, iterations=repeats, rounds=1)
        if self.benchmark.stats is None:  # --benchmark-disable
            return
        collects = gc.isenabled()
        gc.disable()
        try:
            for _ in range(1 + AGAIN):
                self._rounds(finished, repeats)
                if not self.stored or self.fastest() <= self.expected() * (1 + SLOWER / 200):
                    break
        finally:
            if collects:
                gc.enable()
        self.benchmark.extra_info["yardstick"] = self.length()
        if self.stored:
            scale_stored(self.stored, self.length())

    def _rounds(self, call: Callable[[], None], repeats: int) -> None:
        clock, end = self.yardstick.clock, time.perf_counter() + SECONDS
        for i in range(MOST):
            if i >= FEWEST and time.perf_counter() > end:
                break
            self.yards.append(self.yardstick())
            started = clock()
            for _ in range(repeats):
                call()
            self.benchmark.stats.update(clock() - started)

    def fastest(self) -> float:
        """Seconds of a call in the fastest round."""
        return min(self.benchmark.stats.stats.data)

    def length(self) -> float:
        """Seconds of the yardstick: the fastest of each of its parts."""
        return sum(map(min, zip(*self.yards, strict=True)))

    def expected(self) -> float:
        """Seconds of the stored fastest round at the speed of the machine now."""
        assert self.stored
        return self.stored["stats"]["min"] * self.length() / self.stored["extra_info"]["yardstick"]


@pytest.fixture(scope="session")
def yardstick(device: torch.device, dtype: torch.dtype, pytestconfig: pytest.Config) -> Yardstick:
    clock = pytestconfig.stash[CLOCK] = Clock()
    return Yardstick(device, dtype, clock)


@pytest.fixture
def timed(benchmark: Any, yardstick: Yardstick, request: pytest.FixtureRequest) -> Callable[[Callable[[], Any]], None]:
    """``timed(call)`` times the call, and pytest-benchmark compares it."""
    stash, name = request.config.stash, request.node.nodeid

    def run(call: Callable[[], Any]) -> None:
        timer = Timer(benchmark, yardstick, stash[STORED].get(name))
        timer.run(call)
        if timer.yards:
            stash[SEEN][name] = timer.fastest()

    return run
