"""The GPU suite: how it counts tests, ends commands, reads their rows and holds them against its goals."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from benchmarks import gpu_suite
from benchmarks.common.record import read_rows
from benchmarks.kernels.points import BOTH, FORWARD


def test_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_suite"])
    assert gpu_suite.main() == 2
    assert capsys.readouterr().out == "no CUDA device here; --rehearse runs the same path on the CPU\n"


def test_counts_tests():
    lines = [
        "collected 7 items / 3 deselected",
        "tests/test_a.py::test_x[gpu-a b] PASSED                    [ 10%]",
        "tests/test_a.py::test_y SKIPPED (needs 2 GPUs: PASSED elsewhere) [ 20%]",
        "tests/test_b.py::test_z[1.0] FAILED [ 30%]",
        "tests/test_b.py::test_w PASSED",
        "tests/test_b.py::test_w ERROR",
        "tests/test_b.py::test_v ",
        "FAILED tests/test_b.py::test_z[1.0] - assert PASSED",
    ]
    counts = gpu_suite.count_tests(lines, "exit status 1")
    assert (counts["passed"], counts["failed"], counts["skipped"], counts["problem"]) == (1, 2, 1, "")
    assert counts["failures"] == ["test_b.py::test_z[1.0]", "test_b.py::test_w"]
    assert (
        gpu_suite.test_lines(counts)[0].met is False and gpu_suite.test_lines(counts)[1].check == counts["failures"][0]
    )
    # What was stopped has shown something, and did not pass.
    stopped = gpu_suite.count_tests(lines[:3], "stopped after 100 s")
    assert (stopped["passed"], stopped["failed"]) == (1, 1) and gpu_suite.test_lines(stopped)[0].met is False
    assert "stopped after 100 s" in gpu_suite.test_lines(gpu_suite.count_tests(lines, "stopped after 100 s"))[0].figure
    assert gpu_suite.count_tests([], "exit status 2")["failed"] == 1
    absent = {"problem": "pytest is not installed", "passed": 0, "failed": 0, "skipped": 0}
    (line,) = gpu_suite.test_lines(absent)
    assert line.met is None and line.figure.startswith("pytest is not installed")


@pytest.mark.slow
def test_runs_every_file_with_tests_for_a_gpu():
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(command, cwd=gpu_suite.ROOT, capture_output=True, text=True)
    files = {line.partition(":")[0] for line in done.stdout.splitlines() if line.startswith("tests/")}
    assert "tests/gpu/test_gpu_model.py" in files and files <= set(gpu_suite.find_gpu_tests())


@pytest.mark.slow
def test_sees_what_a_command_says_before_it_is_stopped(capfd):
    lines = []
    slow = "import time; print('one', flush=True); print('two', flush=True); time.sleep(60)"
    assert gpu_suite.run_command([sys.executable, "-c", slow], 2, lines.append) == "stopped after 2 s"
    assert lines == ["one", "two"] and "two" in capfd.readouterr().out


@pytest.mark.slow
def test_ends_what_takes_too_long(capsys):
    assert gpu_suite.run_command([sys.executable, "-c", "import time; time.sleep(60)"], 1) == "stopped after 1 s"
    assert gpu_suite.run_command([sys.executable, "-c", "raise SystemExit(3)"], 20) == "exit status 3"
    assert gpu_suite.run_command([sys.executable, "-c", "import csm_kernels, benchmarks"], 20) == ""


def test_reads_only_its_own_rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    assert read_rows(file) == []
    file.write_text('{"a": 1}\n')
    before = file.stat().st_size
    with open(file, "a") as f:
        f.write('{"a": 2}\n{"a": 3')  # cut off
    assert read_rows(file, before) == [{"a": 2}]


def test_holds_figures_against_goals():
    rates = {"copy_bytes_per_s": 10.0, "matmul_flops_per_s": 10.0}
    base = {"status": "ok", "group": "dense", "rows": 64, "on": "cuda", "device": "d", "dtype": "bf16", "shape": "s"}
    base |= rates

    def row(op: str, system: str, mode: str, seconds: float, rate: float, fraction: float | None = None) -> dict:
        figures = {"median_s": seconds, "bytes_per_s": rate, "flops_per_s": rate, "fraction": fraction}
        return {**base, "op": op, "system": system, "mode": mode, **figures}

    rows = [
        row("frame_embed", "csm_fast", FORWARD, 1.0, 8.5),
        row("lce_audio", "csm_fast", BOTH, 1.0, 5.0, 1.0),
        row("depth_attention", "csm_fast", BOTH, 1.0, 1.0, 1.0),
        row("depth_attention", "RoPE + SDPA", BOTH, 9.0, 1.0, 1.0),
        row("depth_attention", "RoPE + SDPA, compiled", BOTH, 1.5, 1.0, 1.0),
        row("depth_attention", "eager", BOTH, 1.2, 1.0, 1.0),
    ]
    embed, audio, codebook0, depth = gpu_suite.kernel_lines(rows)[:4]
    assert (embed.met, embed.value) == (True, 0.85)
    assert (audio.met, audio.figure) == (False, "50% of the matmul's rate")
    assert (codebook0.met, codebook0.figure) == (None, "not measured")
    assert (depth.met, depth.value) == (False, 1.5) and "compiled" in depth.check


def test_holds_the_step_against_goals():
    def row(system, label, seconds, **more):
        figures = {"median_s": seconds, "rows": 100, "ranked": True, "recipe": "bf16 weights", "loss_difference": 1e-4}
        return {"system": system, "label": label, **figures, **more}

    rows = [
        row("csm_fast", "packs of 16,384 rows", 2.0, flops=7.0, matmul_rate=5.0),
        row("csm_fast-compiled", "packs of 16,384 rows", 1.0, flops=4.0, matmul_rate=5.0),
        row("csm_fast", "batches of 64", 3.0, memory={"besides": 30}),
        row("padded-autocast", "batches of 64", 2.0, recipe="float32 weights, bf16 autocast", memory={"besides": 100}),
        row("padded-fp32", "batches of 64", 11.0, recipe="float32", memory={"besides": 200}),
        row("transformers", "batches of 64", 9.0, ranked=False),
    ]
    lines = {line.check: line for line in gpu_suite.compare_lines(rows)}
    share = lines["step: csm_fast-compiled, packs of 16,384 rows, share of the matmul rate"]
    assert (share.value, share.met) == (0.8, True)
    assert (lines["step: over padded-autocast"].value, lines["step: over padded-autocast"].met) == (2.0, False)
    assert lines["step: over padded-fp32"].met and lines["step: over transformers"].met is None
    assert lines["step: memory besides weights and gradients"].met
    assert "loss differs by 1.0e-04" in lines["step: transformers, batches of 64"].figure
    assert gpu_suite.compare_lines([])[0].met is None


def test_rehearsal_writes_to_a_temporary_directory(tmp_path, monkeypatch, capsys):
    """The whole path but for its subprocesses."""
    commands = []

    def run_command(command, seconds):
        commands.append(command)
        return ""

    monkeypatch.setattr(gpu_suite, "run_command", run_command)
    monkeypatch.setattr(gpu_suite, "run_tests", lambda seconds: gpu_suite.count_tests([], ""))
    monkeypatch.setattr(gpu_suite.tempfile, "mkdtemp", lambda prefix: str(tmp_path / "out"))
    monkeypatch.setattr(sys, "argv", ["gpu_suite", "--rehearse"])
    monkeypatch.chdir(tmp_path)
    assert gpu_suite.main() == 1  # pytest showed no test
    assert [c[2] for c in commands] == [
        "benchmarks.compare",
        "benchmarks.optimizers",
        "benchmarks.kernels",
    ]
    assert {f.name for f in (tmp_path / "out").iterdir()} == {"gpu_tests.jsonl", "gpu_summary.jsonl"}
    rows = [json.loads(line) for line in (tmp_path / "out" / "gpu_summary.jsonl").read_text().splitlines()]
    assert all(row["rehearsal"] and row["met"] is None and row["torch"] for row in rows)
    assert "REHEARSAL on a CPU, no figure here counts" in capsys.readouterr().out
