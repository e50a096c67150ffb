"""Tables of README.md and docs/performance.md, written from benchmarks/results/*.jsonl alone.

    python -m benchmarks.report            # write them
    python -m benchmarks.report --check    # exit 1 if a page differs from the results

A page marks each generated part with ``<!-- report: NAME -->`` and ``<!-- end of report -->``. If a benchmark ran
several times in the same configuration, the last run is shown, with its device, versions, commit and date.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common.record import RESULTS, ROOT, Row, read_rows
from benchmarks.common.tables import MIB, format_markdown, last_run, select_rows
from benchmarks.compare.table import is_free, memory_table, summary_table, time_tables
from benchmarks.report import parts as report_parts
from benchmarks.report.parts import NOT_MEASURED, describe_provenance
from csm_fast.config.shape import FRAME_SECONDS

PAGES = ("README.md", "docs/performance.md")
PART = re.compile(r"(<!-- report: ([a-z0-9-]+) -->\n).*?(<!-- end of report -->)", re.DOTALL)
IN_SUMMARY = ("csm_fast is faster", "audio s/s", "GFLOP/s", "with optimizer s")  # omitted from the second table
FIRST_PAGE = ("csm_fast", "blog", "transformers")  # systems in README's table
RUNS = 4  # newest runs whose ratios README gives


def read_results(results: Path, name: str) -> list[Row]:
    return read_rows(results / f"{name}.jsonl")


# ------------------------------------------------------------------------------------------- the comparison's tables


def describe_data(rows: list[Row]) -> str:
    """One line: the data, the shape, and where the figures come from."""
    first = rows[0]
    minutes = first["frames"] * FRAME_SECONDS / 60
    return (
        f"{first['recordings']} recordings, {minutes:.1f} minutes, {first['rows']:,} rows; `{first['shape']}` shape. "
        f"{describe_provenance(first)}.\n"
    )


def write_summary(rows: list[Row]) -> str:
    """Time and memory of one run in one table, one line per system."""
    return f"{describe_data(rows)}\n{format_markdown(*summary_table(rows))}\n" if rows else NOT_MEASURED


def write_comparison(rows: list[Row]) -> str:
    """``write_summary``, and a second table with one line per system and batch size."""
    timed = [row for row in rows if "median_s" in row]
    head: list[str] = []
    lines: list[list[str]] = []
    for label in dict.fromkeys(row["label"] for row in timed):
        some = select_rows(timed, label=label)
        [(_, (names, found))] = time_tables(some)
        kept = [i for i, name in enumerate(names) if name not in IN_SUMMARY]
        head = [names[i] for i in kept]
        for line in found:
            line[0] += "" if is_free(some[0]) else f", {label}"  # for free packing the name has the label
            lines.append([line[i] for i in kept])
    return write_summary(rows) + (f"\n{format_markdown(head, lines)}\n" if lines else "")


def write_memory(rows: list[Row]) -> str:
    """Memory of one forward and backward pass, one line per system and batch size."""
    return f"{describe_data(rows)}\n{format_markdown(*memory_table(rows))}\n" if rows else NOT_MEASURED


def write_first_page(rows: list[Row]) -> str:
    """README's table, from the last run in ``rows``, and the range of the ratios over the last ``RUNS`` runs."""
    rows = [row for row in rows if row["system"] in FIRST_PAGE and "median_s" in row]
    last = last_run(rows)
    if not last:
        return NOT_MEASURED
    labels = list(dict.fromkeys(row["label"] for row in last))
    batches = [label for label in labels if not is_free(select_rows(last, label=label)[0])]
    lines = []
    for system in dict.fromkeys(row["system"] for row in last):
        found = [select_rows(last, system=system, label=label) for label in labels]
        besides = [row[0]["memory"]["besides"] for row in found if row and "memory" in row[0]]
        times = [_seconds(row[0], last) if row else "" for row in found]
        lines.append([system, *times, " / ".join(f"{size / MIB:,.0f} MiB" for size in besides)])
    head = ["system", *labels, f"memory, {' / '.join(batches)}"]
    return f"{describe_data(last)}\n{format_markdown(head, lines)}\n{_ratios_of_runs(rows, batches)}"


def _seconds(row: Row, rows: list[Row]) -> str:
    ratio = _ratio(row, rows)
    return f"{row['median_s']:.1f} s" + (f" ({ratio:.1f}x)" if ratio and row["system"] != "csm_fast" else "")


def _ratio(row: Row, rows: list[Row]) -> float | None:
    """How many times csm_fast's time the row takes in the same batches; None without one of the two."""
    ours = select_rows(rows, system="csm_fast", label=row["label"])
    return row["median_s"] / ours[0]["median_s"] if ours and row["ranked"] else None


def _ratios_of_runs(rows: list[Row], batches: list[str]) -> str:
    runs = sorted({row["run"] for row in rows if row["system"] != "csm_fast"}, reverse=True)[:RUNS]
    found: dict[str, list[str]] = {}
    for system in FIRST_PAGE[1:]:
        for label in batches:
            some = [(row, select_rows(rows, run=row["run"])) for row in select_rows(rows, system=system, label=label)]
            ratios = [ratio for row, run in some if row["run"] in runs and (ratio := _ratio(row, run))]
            if ratios:
                found.setdefault(system, []).append(f"{min(ratios):.1f} to {max(ratios):.1f} in {label}")
    ranges = "; ".join(f"{system} {', '.join(some)}" for system, some in found.items())
    return f"\nTime in units of csm_fast's over the last {len(runs)} runs: {ranges}.\n" if len(runs) > 1 else ""


def runs_on_cpu(results: Path, kind: str, **wanted: Any) -> list[Row]:
    """Rows of ``benchmarks.compare`` from one kind of processors, by how these multiply bf16: "bf16" (AVX512-BF16),
    "amx" (in tiles), or "fp32" (not: all systems train in float32)."""
    rows = [row for row in read_results(results, "compare") if _kind(row) == kind]
    if kind == "fp32":
        # csm_fast trains in float32 there. Older runs also timed bf16 products of its own, which no longer exist.
        rows = [row for row in rows if row["system"] != "csm_fast"]
        rows = [{**row, "system": "csm_fast"} if row["system"] == "csm_fast-fp32" else row for row in rows]
    return select_rows(rows, data="recordings", **wanted)


def _kind(row: Row) -> str:
    # Rows without the field are older than it, and were all measured with AVX512-BF16.
    if row.get("precision", "bf16") != "bf16":
        return "fp32"
    return "amx" if row["device"].endswith("(AMX)") else "bf16"


def write_each_device(rows: list[Row]) -> str:
    """``write_summary`` of the last run on each device."""
    devices = dict.fromkeys(row["device"] for row in rows)
    return "\n".join(write_summary(last_run(select_rows(rows, device=device))) for device in devices) or NOT_MEASURED


def write_gpu(results: Path) -> str:
    """What ``benchmarks.gpu_suite`` recorded: the comparison, the ways to train, the updates."""
    parts = [
        write_comparison(last_run(read_results(results, "gpu_compare"))),
        write_each_device(read_results(results, "gpu_ways")),
        report_parts.write_optimizers(read_results(results, "gpu_optimizers")),
    ]
    return "\n".join(part for part in parts if part != NOT_MEASURED) or NOT_MEASURED


# ------------------------------------------------------------------------------------------------------------- pages


def _compare(write: Callable[[list[Row]], str], kind: str, checkpointing: bool = False) -> Callable[[Path], str]:
    return lambda results: write(last_run(runs_on_cpu(results, kind, shape="small", checkpointing=checkpointing)))


def _from_file(write: Callable[[list[Row]], str], name: str) -> Callable[[Path], str]:
    return lambda results: write(read_results(results, name))


PARTS: dict[str, Callable[[Path], str]] = {
    "speed": lambda results: write_first_page(runs_on_cpu(results, "bf16", shape="small", checkpointing=False)),
    "compare-cpu": _compare(write_comparison, "bf16"),
    "compare-cpu-amx": _compare(write_summary, "amx"),
    "compare-cpu-fp32": _compare(write_summary, "fp32"),
    "compare-cpu-csm-1b": lambda results: write_each_device(
        [row for kind in ("bf16", "amx") for row in runs_on_cpu(results, kind, shape="csm-1b", checkpointing=False)]
    ),
    "compare-cpu-checkpointing": _compare(write_memory, "bf16", checkpointing=True),
    "ways-cpu": _from_file(write_each_device, "ways"),
    "profile-cpu": lambda results: report_parts.write_profiles(
        [read_results(results, path.stem) for path in sorted(results.glob("profile_*.jsonl"))]
    ),
    "optimizers-cpu": lambda results: report_parts.write_optimizers(
        # On a CPU, 8-bit moments are updated by PyTorch's operators; older runs timed a form that no longer exists.
        [row for row in read_results(results, "optimizers") if row["way"] != ["csm_fast", report_parts.EIGHT_BITS]]
    ),
    "scaling-cpu": _from_file(report_parts.write_scaling, "scaling"),
    "pretokenize": _from_file(report_parts.write_pretokenize, "pretokenize"),
    "data-path": _from_file(report_parts.write_data_path, "data_path"),
    "gpu": write_gpu,
}


def fill_page(page: str, results: Path) -> str:
    """A page's text with its generated parts written again.

    Raises:
        SystemExit: the page asks for a part that does not exist.
    """

    def part(found: re.Match[str]) -> str:
        if found[2] not in PARTS:
            raise SystemExit(f"error: no part is called {found[2]}; there are {', '.join(PARTS)}")
        return f"{found[1]}{PARTS[found[2]](results)}{found[3]}"

    return PART.sub(part, page)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--root", type=Path, default=ROOT, metavar="DIR", help="directory of the pages")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is not up to date")
    args = parser.parse_args()
    stale = []
    for name in PAGES:
        path = args.root / name
        if not path.exists():
            continue
        before = path.read_text(encoding="utf-8")
        after = fill_page(before, args.results)
        if after != before:
            stale.append(name)
            if not args.check:
                path.write_text(after, encoding="utf-8")
    if args.check:
        for name in stale:
            print(f"{name} differs from benchmarks/results; run python -m benchmarks.report")
        return int(bool(stale))
    if scaled := read_results(args.results, "scaling"):
        report_parts.draw_scaling(scaled, args.root / "docs" / "scaling-cpu.png")
    print(f"written: {', '.join(stale) or 'nothing new'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
