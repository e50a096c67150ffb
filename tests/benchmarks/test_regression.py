"""The pytest-benchmark suite: a slowed operator fails the comparison, an unchanged one does not, and what is compared.

No time of a real kernel is asserted: a stored figure is far above, and a sleep far above that.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from paths import ROOT
from pytest_benchmark.utils import get_machine_id

from benchmarks.regression import conftest as suite

ONE = "rms_norm-forward-448"
SHORT = "from benchmarks.regression import conftest\nconftest.SECONDS, conftest.AGAIN = 0.05, 1\n"
SLOWED = """
import time
from csm_fast import ops

plain = ops.rms_norm

def slowed(*args):
    time.sleep(0.1)
    return plain(*args)

ops.rms_norm = slowed
"""


def run_suite(tmp_path: Path, *arguments: str, plugin: str = SHORT) -> subprocess.CompletedProcess[str]:
    """One benchmark of the suite, in a process of its own, its runs in ``tmp_path``."""
    (tmp_path / "changes.py").write_text(plugin)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-p",
        "changes",
        "benchmarks/regression/test_ops.py",
    ]
    command += ["-k", ONE, f"--benchmark-storage=file://{tmp_path / 'runs'}", *arguments]
    paths = os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "kernels")])
    # A worker of pytest-xdist tells its children that they are one too, and pytest-benchmark measures nothing in those.
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**variables, "PYTHONPATH": paths})


def store(tmp_path: Path) -> Path:
    """A stored run of this machine in which the benchmark took ten times as long as the yardstick; it takes a tenth."""
    stats = {name: 0.01 for name in suite.TIMES} | {"ops": 100.0, "rounds": 5, "iterations": 1, "outliers": "0;0"}
    fullname = f"benchmarks/regression/test_ops.py::test_operator[{ONE}]"
    one = {"fullname": fullname, "name": ONE, "stats": stats, "extra_info": {"yardstick": 0.001}}
    run = {"machine_info": suite.describe_machine(), "commit_info": {"id": "0"}, "datetime": "2026-01-01"}
    run["benchmarks"] = [one]
    path = tmp_path / "runs" / get_machine_id() / "0001_x.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(run))
    return path


@pytest.mark.slow
def test_a_slowed_operator_is_caught_and_named(tmp_path):
    stored = store(tmp_path)
    done = run_suite(tmp_path, plugin=SHORT + SLOWED)  # where there is a stored run, comparing is the default
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout + done.stderr
    (line,) = (line for line in done.stderr.splitlines() if "Field 'min' has failed" in line)
    assert f"test_operator[{ONE}]" in line
    assert "Traceback" not in done.stdout + done.stderr
    assert list(stored.parent.iterdir()) == [stored]  # a run that was compared is not stored


@pytest.mark.slow
def test_an_unchanged_operator_passes_and_is_stored_on_request(tmp_path):
    stored = store(tmp_path)
    done = run_suite(tmp_path, "--benchmark-compare", "--benchmark-autosave")
    assert done.returncode == 0 and "has failed" not in done.stderr, done.stdout + done.stderr
    assert "stored: 2026-01-01" in done.stdout and "now/stored" in done.stdout
    last = suite.find_stored_runs(f"file://{tmp_path / 'runs'}", suite.describe_machine())[-1]
    assert last != stored
    (one,) = json.loads(last.read_text())["benchmarks"]
    assert one["fullname"].endswith(f"[{ONE}]") and one["extra_info"]["yardstick"] > 0
    assert json.loads(stored.read_text())["benchmarks"][0]["stats"]["min"] == 0.01


@pytest.mark.slow
def test_comparing_with_nothing_is_refused(tmp_path):
    done = run_suite(tmp_path, "--benchmark-compare")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "no stored run of this machine" in done.stderr and "--benchmark-autosave" in done.stderr


@pytest.mark.parametrize(
    ("args", "keyword", "whole"), [(".", "", True), (__file__, "", False), (".", "x", False), (".::y", "", False)]
)
def test_only_a_whole_run_is_stored_unasked(args, keyword, whole):
    config = SimpleNamespace(option=SimpleNamespace(keyword=keyword, markexpr=""), args=[args])
    assert suite.is_whole(config) == whole


def test_only_runs_of_the_same_machine_count(tmp_path):
    here = {"device": "a processor", "cores": 2, "threads": 1, "torch": "2.13"}
    folder = tmp_path / "Linux-CPython"
    folder.mkdir()
    runs = [here, {**here, "torch": "2.12"}, {**here, "threads": 2}, {**here, "device": "another"}]
    for number, there in enumerate(runs, 1):
        run = {"machine_info": there, "datetime": f"2026-01-{20 - number}T00:00"}
        (folder / f"{number:04}_x.json").write_text(json.dumps(run))
    (folder / "0005_cut.json").write_text('{"machine_info": ')
    (folder / "notes.json").write_text("{}")
    found = [path.name for path in suite.find_stored_runs(f"file://{tmp_path}", here)]
    assert found == ["0002_x.json", "0001_x.json"]  # the last one is the newest


def test_stored_seconds_follow_the_yardstick():
    stored = {"extra_info": {"yardstick": 0.002}, "stats": {"min": 1.0, "median": 1.5, "rounds": 7, "ops": 0.5}}
    suite.scale_stored(stored, 0.003)  # the machine is slower now
    assert stored["stats"] == pytest.approx({"min": 1.5, "median": 2.25, "rounds": 7, "ops": 1 / 3})


def test_the_clock_leaves_out_what_the_neighbours_took(monkeypatch):
    clock = suite.Clock()
    if clock.counts < 0:
        pytest.skip("this system does not count how long a thread waits for a core")
    reads = iter([b"5 0 1", b"5 0 1", b"7 0 2", b"8 3000000000 3", b"8 3000000000 3", b"8 3000000000 3"])
    walls = iter([10.0, 14.0, 14.5])  # the core is lost between the second and the third look at the wall's clock
    monkeypatch.setattr(os, "pread", lambda *_: next(reads))
    monkeypatch.setattr(suite.time, "perf_counter", lambda: next(walls))
    started = clock()
    assert clock() - started == pytest.approx(1.5)
    assert next(reads, None) is None and next(walls, None) is None


class Recorder:
    """pytest-benchmark's fixture, as far as ``Timer`` uses it."""

    def __init__(self):
        self.extra_info: dict[str, object] = {}
        self.data: list[float] = []
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=self.data), update=self.data.append)

    def pedantic(self, call, iterations, rounds):
        self.data.append(9.0)


@pytest.mark.parametrize(("seconds", "times"), [([1.0], 1), ([1.2, 1.05], 2), ([1.3] * 9, 1 + suite.AGAIN)])
def test_what_seems_slower_is_timed_again(monkeypatch, seconds, times):
    """Until it is within half of what fails, stored 0.5 s when the machine was twice as fast; at most so often."""
    recorder, left = Recorder(), iter(seconds)
    yardstick = SimpleNamespace(device=torch.device("cpu"), clock=time.perf_counter)
    stored = {"extra_info": {"yardstick": 0.001}, "stats": {"min": 0.5, "ops": 2.0}}
    timer = suite.Timer(recorder, yardstick, stored)

    def rounds(call, repeats):
        timer.yards.append((0.0015, 0.0005))
        recorder.data.append(next(left))

    monkeypatch.setattr(timer, "_rounds", rounds)
    timer.run(lambda: None)
    assert len(recorder.data) == 1 + times
    assert timer.fastest() == min(seconds) and stored["stats"]["min"] == 1.0
    assert recorder.extra_info["yardstick"] == 0.002
