"""Everything that only a GPU can show, in one command of at most eight minutes: tests, training step, kernels.

    PYTHONPATH=.:kernels python -m benchmarks.gpu_suite
    PYTHONPATH=.:kernels python -m benchmarks.gpu_suite --parts ways --minutes 5

``--parts ways``, which is not among the others: csm_fast's own ways to train beside one another, LoRA and QLoRA among
them. The table comes last; the figures behind it go to ``--results`` as gpu_*.jsonl, with device, versions, commit,
date and configuration in every row. Needs torch and triton; without pytest the tests are left out, without Liger,
flash-attn or transformers the comparisons with them. The exit status is 1 if a test failed, 2 if there is no GPU.

``--rehearse`` takes the same path on a CPU at tiny sizes. Its figures mean nothing, and go to a temporary directory.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.common.record import append, environment
from benchmarks.compare.table import is_free
from benchmarks.kernels.plot import by_setting, latest, milliseconds, versus

ROOT = Path(__file__).resolve().parent.parent
RESERVE_S = 12.0  # to print the table and leave
PATIENCE_S = 6.0  # after SIGTERM: seven processes give a GPU's memory back
# Part of the minutes that are left when it begins; the last one has the rest.
SHARES = {"tests": 0.32, "step": 0.6, "updates": 0.3, "kernels": 1.0, "ways": 1.0}
PARTS = ("tests", "step", "updates", "kernels")
EMBED_GOAL, HEADS_GOAL, DEPTH_GOAL = 0.8, 0.6, 2.0
STEP_GOAL, MEMORY_GOAL = 0.6, 1 / 3
RIVALS_GOALS = {"padded-autocast": 2.5, "padded-fp32": 10.0, "transformers": 2.0}


@dataclass(frozen=True)
class Line:
    """A line of the table. ``met`` is None where there is no goal, or nothing to hold against it."""

    check: str
    figure: str
    goal: str = ""
    met: bool | None = None
    value: float | None = None


# ------------------------------------------------------------------------------------------------------- processes


def call(command: list[str], seconds: float, seen: Callable[[str], None] | None = None) -> str:
    """Run a command from the repository's root, its output passed through, line by line to ``seen`` too. "" if it went
    well, else what happened."""
    path = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    print(f"$ {' '.join(command)}   (at most {seconds:.0f} s)", flush=True)
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        start_new_session=True,
        stdout=subprocess.PIPE if seen else None,
    )
    passed_on = threading.Thread(target=_pass_on, args=(process.stdout, seen))
    if seen:
        passed_on.start()
    try:
        status = process.wait(max(1.0, seconds))
        return f"exit status {status}" if status else ""
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s"
    finally:
        _end(process)
        if seen:
            passed_on.join(3.0)


def _pass_on(output: Any, seen: Callable[[str], None]) -> None:
    for line in output:
        text = line.decode("utf-8", "replace")
        print(text, end="", flush=True)
        seen(text.rstrip())


def _end(process: subprocess.Popen[bytes]) -> None:
    """With all of its children: the compiler's workers hold the GPU and the time too."""
    for how, patience in ((signal.SIGTERM, PATIENCE_S), (signal.SIGKILL, 3.0)):
        if process.poll() is not None:
            return
        os.killpg(process.pid, how)
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue


def rows_after(path: Path, offset: int) -> list[dict[str, Any]]:
    """Rows that were appended to a results file past ``offset`` bytes; a line that was cut off is left out."""
    if not path.exists():
        return []
    with open(path, "rb") as f:
        f.seek(offset)
        whole = [line for line in f.read().split(b"\n")[:-1] if line]
    return [json.loads(line) for line in whole]


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


# ----------------------------------------------------------------------------------------------------------- parts


def gpu_test_files() -> list[str]:
    """Those of ``tests`` that have tests marked gpu, some by ``gpu_cases.DEVICES``; last what compiles whole
    layers, which takes longest."""
    files = sorted((ROOT / "tests").rglob("test_*.py"), key=lambda f: (f.name == "test_gpu_model.py", f.name))
    return [str(f.relative_to(ROOT)) for f in files if re.search(r"mark\.gpu|\bDEVICES\b", f.read_text("utf-8"))]


def run_tests(seconds: float) -> dict[str, Any]:
    """Counts of ``pytest -m gpu`` on the files that have such tests: the others may want packages that are not here.
    What a run has shown counts, also if it was stopped."""
    if importlib.util.find_spec("pytest") is None:
        return {"problem": "pytest is not installed", "passed": 0, "failed": 0, "skipped": 0}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        "--color=no",
        "-o",
        "addopts=",
        "--import-mode=importlib",
        "-v",
    ]
    lines: list[str] = []
    problem = call([*command, *gpu_test_files()], seconds, lines.append)
    return test_counts(lines, problem)


OUTCOME = re.compile(r"(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")


def test_counts(lines: list[str], problem: str) -> dict[str, Any]:
    """passed, failed (with errors) and skipped of the lines of ``pytest -v``, and the names of what failed."""
    kinds = {"PASSED": "passed", "XPASS": "passed", "FAILED": "failed", "ERROR": "failed"}
    # A test that passes and whose clearing up fails has two lines; the last one counts.
    outcomes = {found[1]: kinds.get(found[2], "skipped") for line in lines if (found := OUTCOME.match(line))}
    counts: dict[str, Any] = {kind: list(outcomes.values()).count(kind) for kind in ("passed", "failed", "skipped")}
    counts["failures"] = [name.removeprefix("tests/") for name, kind in outcomes.items() if kind == "failed"]
    counts["problem"] = problem = problem or ("" if outcomes else "pytest showed no test")
    if counts["failed"] or problem == "exit status 5":  # said by the counts already
        counts["problem"] = problem if problem.startswith("stopped") else ""
    elif problem:
        counts["failed"] += 1
    return counts


def compare_command(args: argparse.Namespace, results: Path, ways: bool = False) -> list[str]:
    """``ways``: of csm_fast's own, instead of the race against the others."""
    systems = ["csm_fast", "csm_fast-compiled", "padded-autocast", "padded-fp32", "transformers"]
    if ways:
        systems = ["csm_fast", "csm_fast-compiled", "csm_fast-operators", "csm_fast-autocast"]
        systems += ["csm_fast-lora", "csm_fast-qlora"]
    needs = {"csm_fast-lora": "peft", "csm_fast-qlora": "bitsandbytes", "transformers": "transformers"}
    systems = [name for name in systems if name not in needs or importlib.util.find_spec(needs[name])]
    command = [sys.executable, "-m", "benchmarks.compare", "--results", str(results)]
    command += ["--precision", "fp32" if args.rehearse else "bf16", "--repeats"]  # what every CPU multiplies fast
    if args.rehearse:
        command += ["1", "--synthetic", "4", "--device", "cpu", "--shape", "small", "--batches", "4"]
        return [*command, "--systems", *systems[: 3 if ways else 1]]
    command += ["3", "--synthetic", "400", "--device", "cuda", "--shape", "csm-1b"]
    return [*command, "--batches", "64", "--pack-rows", "16384", "--systems", *systems]


def optimizers_command(args: argparse.Namespace, results: Path) -> list[str]:
    command = [sys.executable, "-m", "benchmarks.optimizers", "--results", str(results)]
    if args.rehearse:
        return [*command, "--shape", "tiny", "--repeats", "1"]
    return [*command, "--device", "cuda", "--shape", "csm-1b", "--repeats", "5"]


def kernels_command(args: argparse.Namespace, results: Path, seconds: float) -> list[str]:
    dtype = "fp32" if args.rehearse else "bf16"
    command = [sys.executable, "-m", "benchmarks.kernels", "--dtype", dtype, "--results", str(results)]
    command += ["--limit-seconds", f"{max(1.0, seconds):.0f}"]
    if args.rehearse:
        command += ["--device", "cpu", "--shape", "small", "--rows", "256", "--fractions", "1/16", "--repeats", "1"]
        return [*command, "--no-compile"]
    return [*command, "--device", "cuda", "--shape", "csm-1b", "--rows", "16384", "65536"]


# ----------------------------------------------------------------------------------------------------------- table


def test_lines(counts: dict[str, Any]) -> list[Line]:
    figure = f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped"
    if counts["problem"]:
        figure = f"{counts['problem']}; {figure}"
    ran = counts["passed"] + counts["failed"]
    met = not counts["failed"] if ran else None
    first = Line("tests marked gpu", figure, "none fails", met, float(counts["failed"]) if ran else None)
    failures = counts.get("failures", [])
    more = [Line(f"and {len(failures) - 8} more", "failed")] if len(failures) > 8 else []
    return [first, *(Line(name, "failed") for name in failures[:8]), *more]


def compare_lines(rows: list[dict[str, Any]], problem: str) -> list[Line]:
    """csm_fast's best full fine-tune against the goals, then every system."""
    timed = [row for row in rows if "median_s" in row]
    packed = [row for row in timed if is_free(row) and row["ranked"] and row["recipe"] == "bf16 weights"]
    packed = [row for row in packed if row.get("matmul_rate")]
    ours = min(packed, key=lambda row: row["median_s"], default=None)
    lines = []
    if ours is None:
        lines.append(Line("step: share of the matmul rate", "not measured", f"at least {STEP_GOAL:.0%}"))
    else:
        share = ours["flops"] / ours["median_s"] / ours["matmul_rate"]
        check = f"step: {ours['system']}, {ours['label']}, share of the matmul rate"
        lines.append(Line(check, f"{share:.0%}", f"at least {STEP_GOAL:.0%}", share >= STEP_GOAL, share))
    for name, goal in RIVALS_GOALS.items():
        theirs = [row for row in timed if row["system"] == name and row["ranked"]]
        if ours is None or not theirs:
            lines.append(Line(f"step: over {name}", "not measured", f"at least {goal:g}x"))
            continue
        ratio = min(row["median_s"] for row in theirs) / ours["median_s"]
        lines.append(Line(f"step: over {name}", f"{ratio:.2f}x", f"at least {goal:g}x", ratio >= goal, ratio))
    lines += [_memory(rows), *map(_timed, timed)]
    return [*lines, *([Line("step", problem)] if problem else [])]


def way_lines(rows: list[dict[str, Any]], problem: str) -> list[Line]:
    """csm_fast's own ways to train."""
    lines = [_timed(row) for row in rows if "median_s" in row]
    return [*lines, *([Line("ways", problem)] if problem else [])]


def _timed(row: dict[str, Any]) -> Line:
    figure = f"{row['median_s']:.3g} s, {row['rows'] / row['median_s']:,.0f} rows/s"
    figure += "" if row["ranked"] else f", loss differs by {row['loss_difference']:.1e}"
    return Line(f"step: {row['system']}, {row['label']}", figure)


def _memory(rows: list[dict[str, Any]]) -> Line:
    """csm_fast's activations against the least of the others', of the same recordings."""
    asked = {row["system"]: row["memory"]["besides"] for row in rows if "memory" in row}
    ours, others = asked.get("csm_fast"), [v for name, v in asked.items() if not name.startswith("csm_fast")]
    goal = f"at most {MEMORY_GOAL:.0%}"
    if ours is None or not others:
        return Line("step: memory besides weights and gradients", "not measured", goal)
    share = ours / min(others)
    return Line("step: memory besides weights and gradients", f"{share:.0%}", goal, share <= MEMORY_GOAL, share)


def kernel_lines(rows: list[dict[str, Any]], problem: str) -> list[Line]:
    """The goals first, then every operator against its fastest alternative."""
    lines = [
        _share("frame_embed", "forward", "of the copy's rate", "bytes_per_s", "copy_bytes_per_s", EMBED_GOAL, rows),
        *(
            _share(
                op, "forward+backward", "of the matmul's rate", "flops_per_s", "matmul_flops_per_s", HEADS_GOAL, rows
            )
            for op in ("lce_audio", "lce_codebook0")
        ),
        _depth(rows),
    ]
    for some in by_setting(rows).values():
        for op in dict.fromkeys(row["op"] for row in some):
            for mode in ("forward", "forward+backward"):
                pair = versus(some, op, mode)
                if pair:
                    ours, best = pair
                    ratio = best["median_s"] / ours["median_s"]
                    times = f"{milliseconds(ours['median_s'])} ms, {best['system']} {milliseconds(best['median_s'])}"
                    lines.append(Line(f"{_at(ours)}, {mode}", f"{ratio:.2f}x: {times}", value=ratio))
    for row in latest(rows):
        if row["status"] in ("wrong", "failed"):
            line = Line(f"{row['op']}, {row['system']}", f"{row['status']}: {row['reason']}")
            if line not in lines:
                lines.append(line)
    return [*lines, *([Line("kernels", problem)] if problem else [])]


def optimizer_lines(rows: list[dict[str, Any]], problem: str) -> list[Line]:
    """Every update against the time that its bytes take."""
    lines = []
    for row in rows:
        floor = row["bytes"] / row["copy_bytes_per_s"]
        share = floor / row["median_s"]
        figure = f"{milliseconds(row['median_s'])} ms, {share:.0%} of the copy's rate"
        lines.append(Line(f"update: {', '.join(row['way'])}", figure, value=share))
    return [*lines, *([Line("updates", problem)] if problem else [])]


def _at(row: dict[str, Any]) -> str:
    fraction = "" if row["fraction"] is None else f", fraction {row['fraction']:g}"
    return f"{row['op']} {row['rows']:,} rows{fraction}"


def _share(op: str, mode: str, what: str, rate: str, ceiling: str, goal: float, rows: list[dict[str, Any]]) -> Line:
    """csm_fast's rate at its largest point as a share of the ceiling that was measured in the same run."""
    mine = [
        row
        for row in latest(rows)
        if (row["op"], row["mode"], row["system"], row["status"]) == (op, mode, "csm_fast", "ok")
    ]
    wanted = f"at least {goal:.0%}"
    if not mine:
        return Line(f"{op}, {mode}", "not measured", wanted)
    row = max(mine, key=lambda row: (row["rows"], row["fraction"] or 0))
    share = row[rate] / row[ceiling]
    return Line(f"{_at(row)}, {mode}", f"{share:.0%} {what}", wanted, share >= goal, share)


def _depth(rows: list[dict[str, Any]]) -> Line:
    """Against the faster of RoPE + SDPA as written and as compiled."""
    some = [row for row in rows if row["op"] == "depth_attention" and row["system"] in (*RIVALS, "csm_fast")]
    pair, wanted = versus(some, "depth_attention", "forward+backward"), f"at least {DEPTH_GOAL:g}x"
    if pair is None:
        return Line("depth_attention over RoPE + SDPA", "not measured", wanted)
    ratio = pair[1]["median_s"] / pair[0]["median_s"]
    return Line(f"{_at(pair[0])}, over {pair[1]['system']}", f"{ratio:.2f}x", wanted, ratio >= DEPTH_GOAL, ratio)


RIVALS = ("RoPE + SDPA", "RoPE + SDPA, compiled")


def print_table(title: str, lines: list[Line]) -> None:
    print(f"\n{title}")
    width = max(len(line.check) for line in lines)
    figure = max(len(line.figure) for line in lines)
    print(f"  {'check':{width}}  {'figure':{figure}}  {'goal':14}  met")
    for line in lines:
        met = "-" if line.met is None else "yes" if line.met else "NO"
        print(f"  {line.check:{width}}  {line.figure:{figure}}  {line.goal or '-':14}  {met}")


# ------------------------------------------------------------------------------------------------------------- CLI


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_suite", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything; a hard limit")
    parser.add_argument("--results", type=Path, metavar="DIR", help="default: benchmarks/results")
    parser.add_argument("--parts", nargs="+", choices=list(SHARES), default=list(PARTS))
    parser.add_argument("--rehearse", action="store_true", help="the same on a CPU at tiny sizes; proves no figure")
    args = parser.parse_args()
    ends = time.monotonic() + 60 * args.minutes - RESERVE_S
    import torch

    if not args.rehearse and not torch.cuda.is_available():
        print("no CUDA device here; --rehearse runs the same path on the CPU")
        return 2
    if args.results is None:
        args.results = Path(tempfile.mkdtemp(prefix="rehearsal-")) if args.rehearse else ROOT / "benchmarks" / "results"
    results = args.results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    os.chdir(ROOT)  # where git knows the commit
    about = {"minutes": args.minutes, "rehearsal": args.rehearse, **environment()}
    label = "REHEARSAL on a CPU, no figure here counts" if args.rehearse else "GPU suite"
    print(f"{label}: {about['device']}, torch {about['torch']}, {args.minutes:g} minutes", flush=True)

    def seconds(part: str) -> float:
        return SHARES[part] * (ends - time.monotonic())

    def rows_of(name: str, command: Callable[[Path, float], list[str]], part: str) -> tuple[list[dict[str, Any]], str]:
        """What a part's command adds to its results file, and what went wrong."""
        file, limit = results / f"gpu_{name}.jsonl", seconds(part)
        before = size(file)
        problem = call(command(file, limit), limit)
        return rows_after(file, before), problem

    lines: list[Line] = []
    failed = 0
    if "tests" in args.parts:
        counts = run_tests(seconds("tests"))
        failed = counts["failed"]
        append(results / "gpu_tests.jsonl", {"benchmark": "gpu_tests", **counts, **about})
        lines += test_lines(counts)
    if "step" in args.parts:
        lines += compare_lines(*rows_of("compare", lambda file, _: compare_command(args, file), "step"))
    if "updates" in args.parts:
        lines += optimizer_lines(*rows_of("optimizers", lambda file, _: optimizers_command(args, file), "updates"))
    if "kernels" in args.parts:
        # It stops by itself between two points; the rest is for its start and the point it is at.
        lines += kernel_lines(
            *rows_of("kernels", lambda file, limit: kernels_command(args, file, limit - 15), "kernels")
        )
    if "ways" in args.parts:
        lines += way_lines(*rows_of("ways", lambda file, _: compare_command(args, file, ways=True), "ways"))
    if args.rehearse:  # tiny sizes on another device neither meet a goal nor miss it
        lines = [replace(line, met=None) for line in lines]
    for line in lines:
        append(results / "gpu_summary.jsonl", {"benchmark": "gpu_suite", **asdict(line), **about})
    print(
        f"\nrows: {results}/gpu_*.jsonl"
        + ("" if args.rehearse else "; python -m benchmarks.report shows them on the pages")
    )
    print_table(f"{label}: {about['device']}, torch {about['torch']}, commit {about['commit'] or '?'}", lines)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
