"""Everything that only a GPU can show, in one command of at most eight minutes: tests, training step, kernels.

    PYTHONPATH=.:kernels python -m benchmarks.gpu_suite
    PYTHONPATH=.:kernels python -m benchmarks.gpu_suite --parts ways --minutes 5

``--parts ways``, which is not among the default parts, compares csm_fast's own ways to train, LoRA and QLoRA included.
The table comes last; the figures behind it go to ``--results`` as gpu_*.jsonl, with device, versions, commit, date and
configuration in every row. Needs torch and triton. Without pytest the tests are left out; without Liger, flash-attn or
transformers the comparisons with them. The exit status is 1 if a test failed, 2 if there is no GPU.

``--rehearse`` takes the same path on a CPU at tiny sizes. Its figures mean nothing, and go to a temporary directory.
"""

from __future__ import annotations

import argparse
import importlib.util
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

import torch

from benchmarks.common.record import RESULTS, ROOT, Row, append_row, environment, read_rows
from benchmarks.common.tables import format_text, select_rows
from benchmarks.compare.table import is_free
from benchmarks.kernels.plot import best_pair, group_by_setting, latest, milliseconds
from benchmarks.kernels.points import BOTH, FORWARD, MODES

RESERVE_S = 12.0  # to print the table and leave
PATIENCE_S = 6.0  # after SIGTERM: seven processes free a GPU's memory
# Share of the minutes that are left when a part begins; the last part has the rest.
SHARES = {"tests": 0.32, "step": 0.6, "updates": 0.3, "kernels": 1.0, "ways": 1.0}
PARTS = ("tests", "step", "updates", "kernels")
EMBED_GOAL, HEADS_GOAL, DEPTH_GOAL = 0.8, 0.6, 2.0
STEP_GOAL, MEMORY_GOAL = 0.6, 1 / 3
RIVALS_GOALS = {"padded-autocast": 2.5, "padded-fp32": 10.0, "transformers": 2.0}


@dataclass(frozen=True)
class Line:
    """A line of the table. ``met`` is None where there is no goal, or no figure to compare with it."""

    check: str
    figure: str
    goal: str = ""
    met: bool | None = None
    value: float | None = None


# ------------------------------------------------------------------------------------------------------- processes


def run_command(command: list[str], seconds: float, seen: Callable[[str], None] | None = None) -> str:
    """Run a command in the repository's root. Its output is passed on, line by line to ``seen`` as well. Returns "" if
    the command succeeded, else what happened."""
    path = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    print(f"$ {' '.join(command)}   (at most {seconds:.0f} s)", flush=True)
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        start_new_session=True,
        stdout=subprocess.PIPE if seen else None,
    )
    copier = threading.Thread(target=_copy_lines, args=(process.stdout, seen))
    if seen:
        copier.start()
    try:
        status = process.wait(max(1.0, seconds))
        return f"exit status {status}" if status else ""
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s"
    finally:
        _end(process)
        if seen:
            copier.join(3.0)


def _copy_lines(output: Any, seen: Callable[[str], None]) -> None:
    for line in output:
        text = line.decode("utf-8", "replace")
        print(text, end="", flush=True)
        seen(text.rstrip())


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and its children: the compiler's workers hold GPU memory, too."""
    for how, patience in ((signal.SIGTERM, PATIENCE_S), (signal.SIGKILL, 3.0)):
        if process.poll() is not None:
            return
        os.killpg(process.pid, how)
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue


# ----------------------------------------------------------------------------------------------------------- parts


def find_gpu_tests() -> list[str]:
    """The files with tests marked gpu, some by ``gpu_cases.DEVICES``; last the one that compiles whole layers, which
    takes longest."""
    files = sorted((ROOT / "tests").rglob("test_*.py"), key=lambda f: (f.name == "test_gpu_model.py", f.name))
    return [str(f.relative_to(ROOT)) for f in files if re.search(r"mark\.gpu|\bDEVICES\b", f.read_text("utf-8"))]


def run_tests(seconds: float) -> dict[str, Any]:
    """Counts of ``pytest -m gpu`` on the files that have such tests: others may need packages that are not installed.
    If the run is stopped, the tests that were finished count."""
    if importlib.util.find_spec("pytest") is None:
        return {"problem": "pytest is not installed", "passed": 0, "failed": 0, "skipped": 0}
    options = ["-m", "gpu", "-p", "no:cacheprovider", "--color=no", "-o", "addopts=", "--import-mode=importlib", "-v"]
    lines: list[str] = []
    problem = run_command([sys.executable, "-m", "pytest", *options, *find_gpu_tests()], seconds, lines.append)
    return count_tests(lines, problem)


OUTCOME = re.compile(r"(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")


def count_tests(lines: list[str], problem: str) -> dict[str, Any]:
    """passed, failed (with errors) and skipped of the lines of ``pytest -v``, and the names of what failed."""
    kinds = {"PASSED": "passed", "XPASS": "passed", "FAILED": "failed", "ERROR": "failed"}
    # A test that passes and whose teardown fails has two lines; the last one counts.
    outcomes = {found[1]: kinds.get(found[2], "skipped") for line in lines if (found := OUTCOME.match(line))}
    counts: dict[str, Any] = {kind: list(outcomes.values()).count(kind) for kind in ("passed", "failed", "skipped")}
    counts["failures"] = [name.removeprefix("tests/") for name, kind in outcomes.items() if kind == "failed"]
    counts["problem"] = problem = problem or ("" if outcomes else "pytest showed no test")
    if counts["failed"] or problem == "exit status 5":  # the counts say the same
        counts["problem"] = problem if problem.startswith("stopped") else ""
    elif problem:
        counts["failed"] += 1
    return counts


def compare_command(args: argparse.Namespace, ways: bool = False) -> list[str]:
    """The comparison with the others or, with ``ways``, of csm_fast's own ways to train."""
    systems = ["csm_fast", "csm_fast-compiled", "padded-autocast", "padded-fp32", "transformers"]
    if ways:
        systems = ["csm_fast", "csm_fast-compiled", "csm_fast-operators", "csm_fast-autocast"]
        systems += ["csm_fast-lora", "csm_fast-qlora"]
    needs = {"csm_fast-lora": "peft", "csm_fast-qlora": "bitsandbytes", "transformers": "transformers"}
    systems = [name for name in systems if name not in needs or importlib.util.find_spec(needs[name])]
    if args.rehearse:  # in float32, which every CPU multiplies fast
        settings = "--precision fp32 --repeats 1 --synthetic 4 --device cpu --shape small --batches 4"
        return ["compare", *settings.split(), "--systems", *systems[: 3 if ways else 1]]
    settings = "--precision bf16 --repeats 3 --synthetic 400 --device cuda --shape csm-1b --batches 64"
    return ["compare", *settings.split(), "--pack-rows", "16384", "--systems", *systems]


def optimizers_command(args: argparse.Namespace) -> list[str]:
    settings = "--shape tiny --repeats 1" if args.rehearse else "--device cuda --shape csm-1b --repeats 5"
    return ["optimizers", *settings.split()]


def kernels_command(args: argparse.Namespace, seconds: float) -> list[str]:
    settings = "--dtype bf16 --device cuda --shape csm-1b --rows 16384 65536"
    if args.rehearse:
        settings = "--dtype fp32 --device cpu --shape small --rows 256 --fractions 1/16 --repeats 1 --no-compile"
    return ["kernels", *settings.split(), "--limit-seconds", f"{max(1.0, seconds):.0f}"]


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


def goal_line(check: str, value: float | None, goal: float, what: str = "", most: bool = False) -> Line:
    """A figure and its goal, the least or the ``most``: a share if the goal is below 1, else a ratio."""
    is_share = goal < 1
    wanted = f"at {'most' if most else 'least'} " + (f"{goal:.0%}" if is_share else f"{goal:g}x")
    if value is None:
        return Line(check, "not measured", wanted)
    figure = f"{value:.0%}{what}" if is_share else f"{value:.2f}x"
    return Line(check, figure, wanted, value <= goal if most else value >= goal, value)


def compare_lines(rows: list[Row]) -> list[Line]:
    """csm_fast's best full fine-tune against the goals, then every system."""
    timed = [row for row in rows if "median_s" in row]
    packed = [row for row in select_rows(timed, ranked=True, recipe="bf16 weights") if is_free(row)]
    ours = min((row for row in packed if row.get("matmul_rate")), key=lambda row: row["median_s"], default=None)
    check, share = "step: share of the matmul rate", None
    if ours:
        check = f"step: {ours['system']}, {ours['label']}, share of the matmul rate"
        share = ours["flops"] / ours["median_s"] / ours["matmul_rate"]
    lines = [goal_line(check, share, STEP_GOAL)]
    for name, goal in RIVALS_GOALS.items():
        theirs = [row["median_s"] for row in select_rows(timed, system=name, ranked=True)]
        ratio = min(theirs) / ours["median_s"] if ours and theirs else None
        lines.append(goal_line(f"step: over {name}", ratio, goal))
    asked = {row["system"]: row["memory"]["besides"] for row in rows if "memory" in row}
    others = [besides for name, besides in asked.items() if not name.startswith("csm_fast")]
    memory = asked["csm_fast"] / min(others) if "csm_fast" in asked and others else None
    lines.append(goal_line("step: memory besides weights and gradients", memory, MEMORY_GOAL, most=True))
    return lines + way_lines(rows)


def way_lines(rows: list[Row]) -> list[Line]:
    """The times of every system that was timed."""
    lines = []
    for row in rows:
        if "median_s" in row:
            figure = f"{row['median_s']:.3g} s, {row['rows'] / row['median_s']:,.0f} rows/s"
            figure += "" if row["ranked"] else f", loss differs by {row['loss_difference']:.1e}"
            lines.append(Line(f"step: {row['system']}, {row['label']}", figure))
    return lines


def kernel_lines(rows: list[Row]) -> list[Line]:
    """The goals first, then every operator against its fastest alternative."""
    lines = [_share_line("frame_embed", FORWARD, "copy", EMBED_GOAL, rows)]
    lines += [_share_line(op, BOTH, "matmul", HEADS_GOAL, rows) for op in ("lce_audio", "lce_codebook0")]
    pair = best_pair([row for row in rows if row["system"] in RIVALS], "depth_attention", BOTH)
    if pair:
        check, ratio = f"{_at(pair[0])}, over {pair[1]['system']}", pair[1]["median_s"] / pair[0]["median_s"]
        lines.append(goal_line(check, ratio, DEPTH_GOAL))
    else:
        lines.append(goal_line("depth_attention over RoPE + SDPA", None, DEPTH_GOAL))
    for some in group_by_setting(rows).values():
        for op in dict.fromkeys(row["op"] for row in some):
            for mode in MODES:
                if pair := best_pair(some, op, mode):
                    ours, best = pair
                    ratio = best["median_s"] / ours["median_s"]
                    times = f"{milliseconds(ours['median_s'])} ms, {best['system']} {milliseconds(best['median_s'])}"
                    lines.append(Line(f"{_at(ours)}, {mode}", f"{ratio:.2f}x: {times}", value=ratio))
    failed = [row for row in latest(rows) if row["status"] in ("wrong", "failed")]
    more = [Line(f"{row['op']}, {row['system']}", f"{row['status']}: {row['reason']}") for row in failed]
    return lines + list(dict.fromkeys(more))


RIVALS = ("csm_fast", "RoPE + SDPA", "RoPE + SDPA, compiled")  # of the goal for depth attention


def _share_line(op: str, mode: str, ceiling: str, goal: float, rows: list[Row]) -> Line:
    """csm_fast's rate at its largest point as a share of the ceiling that was measured in the same run."""
    mine = select_rows(latest(rows), op=op, mode=mode, system="csm_fast", status="ok")
    if not mine:
        return goal_line(f"{op}, {mode}", None, goal)
    row = max(mine, key=lambda row: (row["rows"], row["fraction"] or 0))
    unit = {"copy": "bytes_per_s", "matmul": "flops_per_s"}[ceiling]
    return goal_line(f"{_at(row)}, {mode}", row[unit] / row[f"{ceiling}_{unit}"], goal, f" of the {ceiling}'s rate")


def _at(row: Row) -> str:
    fraction = "" if row["fraction"] is None else f", fraction {row['fraction']:g}"
    return f"{row['op']} {row['rows']:,} rows{fraction}"


def optimizer_lines(rows: list[Row]) -> list[Line]:
    """Every update against the time that its bytes take."""
    lines = []
    for row in rows:
        share = row["bytes"] / row["copy_bytes_per_s"] / row["median_s"]
        figure = f"{milliseconds(row['median_s'])} ms, {share:.0%} of the copy's rate"
        lines.append(Line(f"update: {', '.join(row['way'])}", figure, value=share))
    return lines


def print_table(title: str, lines: list[Line]) -> None:
    met = {None: "-", True: "yes", False: "NO"}
    cells = [[line.check, line.figure, line.goal or "-", met[line.met]] for line in lines]
    print(f"\n{title}\n{format_text(['check', 'figure', 'goal', 'met'], cells, left=4)}")


# ------------------------------------------------------------------------------------------------------------- CLI


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything; a hard limit")
    parser.add_argument("--results", type=Path, metavar="DIR", help="default: benchmarks/results")
    parser.add_argument("--parts", nargs="+", choices=list(SHARES), default=list(PARTS))
    parser.add_argument("--rehearse", action="store_true", help="the same on a CPU at tiny sizes; proves no figure")
    args = parser.parse_args()
    ends = time.monotonic() + 60 * args.minutes - RESERVE_S
    if not args.rehearse and not torch.cuda.is_available():
        print("no CUDA device here; --rehearse runs the same path on the CPU")
        return 2
    if args.results is None:
        args.results = Path(tempfile.mkdtemp(prefix="rehearsal-")) if args.rehearse else RESULTS
    results = args.results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    os.chdir(ROOT)  # where git knows the commit
    about = {"minutes": args.minutes, "rehearsal": args.rehearse}
    here = environment()
    label = "REHEARSAL on a CPU, no figure here counts" if args.rehearse else "GPU suite"
    title = f"{label}: {here['device']}, torch {here['torch']}"
    print(f"{title}, {args.minutes:g} minutes", flush=True)
    lines: list[Line] = []

    def seconds(part: str) -> float:
        return SHARES[part] * (ends - time.monotonic())

    def measure(part: str, name: str, make_lines: Callable[[list[Row]], list[Line]], command: list[str]) -> None:
        """Run a part's command, if it is asked for, and add the lines of the rows that it adds to its results file."""
        if part not in args.parts:
            return
        file = results / f"gpu_{name}.jsonl"
        before = file.stat().st_size if file.exists() else 0
        start = [sys.executable, "-m", f"benchmarks.{command[0]}", "--results", str(file)]
        problem = run_command([*start, *command[1:]], seconds(part))
        lines.extend(make_lines(read_rows(file, before)))
        lines.extend([Line(part, problem)] if problem else [])

    failed = 0
    if "tests" in args.parts:
        counts = run_tests(seconds("tests"))
        failed = counts["failed"]
        append_row(results / "gpu_tests.jsonl", "gpu_tests", {**counts, **about})
        lines += test_lines(counts)
    measure("step", "compare", compare_lines, compare_command(args))
    measure("updates", "optimizers", optimizer_lines, optimizers_command(args))
    # It stops by itself between two points; the rest is for its start and the point it is at.
    measure("kernels", "kernels", kernel_lines, kernels_command(args, seconds("kernels") - 15))
    measure("ways", "ways", way_lines, compare_command(args, ways=True))
    if args.rehearse:  # tiny sizes on another device neither meet a goal nor miss it
        lines = [replace(line, met=None) for line in lines]
    for line in lines:
        append_row(results / "gpu_summary.jsonl", "gpu_suite", {**asdict(line), **about})
    shown = "" if args.rehearse else "; python -m benchmarks.report shows them on the pages"
    print(f"\nrows: {results}/gpu_*.jsonl{shown}")
    print_table(f"{title}, commit {here['commit'] or '?'}", lines)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
