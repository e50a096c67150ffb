"""Tables and plots of README.md and docs/performance.md, from benchmarks/results/*.jsonl and nothing else.

    python -m benchmarks.report.__main__            # write them
    python -m benchmarks.report.__main__ --check    # exit 1 where a page says something else than the results

A page has its generated parts between ``<!-- report: NAME -->`` and ``<!-- end of report -->``. Of a benchmark that ran
several times in the same configuration the last run is shown, with its device, versions, commit and date.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.compare.table import (
    Row,
    Spreads,
    is_free,
    is_theirs,
    markdown,
    memory_table,
    quotient,
    race,
    rows_of,
    summary,
    time_tables,
)
from benchmarks.report import parts as report_parts
from benchmarks.report.parts import provenance
from csm_fast.config.shape import FRAME_SECONDS

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", "docs/performance.md")
PART = re.compile(r"(<!-- report: ([a-z0-9-]+) -->\n).*?(<!-- end of report -->)", re.DOTALL)
LEFT_OUT = ("audio s/s", "GFLOP/s")  # of the tables' columns, so that they fit a page


def _sentence(title: str) -> str:
    """With a capital, unless it begins with our name, which has none."""
    return title if title.startswith("csm_fast") else title[0].upper() + title[1:]


def read(results: Path, name: str) -> list[Row]:
    """Rows of a results file, none where there is no file."""
    path = results / f"{name}.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def last_run(rows: list[Row], **wanted: Any) -> list[Row]:
    """The rows of the last run among those whose fields are these; a run has an id of its own, its time."""
    some = rows_of(rows, **wanted)
    newest = max((row["run"] for row in some), default=None)
    return rows_of(some, run=newest)


def _without(head: list[str], lines: list[list[str]], columns: tuple[str, ...]) -> tuple[list[str], list[list[str]]]:
    kept = [i for i, name in enumerate(head) if name not in columns]
    return [head[i] for i in kept], [[line[i] for i in kept] for line in lines]


def compare(rows: list[Row], earlier: list[Row] | None = None) -> str:
    """Time and memory against the others, one run; the quotients' spread is that of the runs of ``earlier``, too."""
    if not rows:
        return "Not measured.\n"
    text, spreads = _subject(rows), _spreads(rows, earlier)
    for title, head, lines in time_tables(rows, spreads):
        text += f"\n*{_sentence(title)}*\n\n{markdown(*_without(head, lines, LEFT_OUT))}\n"
    title, head, lines = memory_table(rows)
    if lines:
        text += f"\n*{_sentence(title)}*\n\n{markdown(head, lines)}\n"
    return text


def summarized(rows: list[Row], earlier: list[Row] | None = None) -> str:
    """``compare`` in one table, a line per system."""
    if not rows:
        return "Not measured.\n"
    return f"{_subject(rows)}\n{markdown(*summary(rows, _spreads(rows, earlier)))}\n"


def _subject(rows: list[Row]) -> str:
    """What was trained on, and where the figures come from."""
    first = rows[0]
    minutes = first["frames"] * FRAME_SECONDS / 60
    return (
        f"{first['recordings']} recordings, {minutes:.1f} minutes, {first['rows']:,} rows; `{first['shape']}` shape. "
        f"{provenance(first)}.\n"
    )


def _spreads(rows: list[Row], earlier: list[Row] | None) -> Spreads:
    """The least and the most that a quotient was in the last runs; where these are of one day, in those before too."""
    every = (earlier or []) + rows
    spreads: Spreads = {}
    names = newest(every)
    if names and names[-1][:10] == names[0][:10]:
        names += newest(_before(every, names[0][:10]))
    for name in names:
        for key, (_, least, most) in _quotients(rows_of(every, run=name)).items():
            low, high = spreads.get(key, (least, most))
            spreads[key] = min(low, least), max(high, most)
    return spreads


RUNS = 4  # that are shown side by side


def newest(rows: list[Row]) -> list[str]:
    """The last runs that raced anybody, newest first."""
    raced = {row["run"] for row in rows if "median_s" in row and is_theirs(row)}
    return sorted(raced, reverse=True)[:RUNS]


def _before(rows: list[Row], day: str) -> list[Row]:
    return [row for row in rows if row["run"] < day]


def runs(rows: list[Row]) -> str:
    """The quotients of the last runs side by side: what a table is worth in another hour and on another day.

    The newest day's medians are held against the spread of the last runs before that day, which is what had been said.
    """
    some = [row for row in rows if "median_s" in row]
    names = newest(rows)
    if len(names) < 2:
        return "Run once.\n"
    day = names[0][:10]
    before = newest(_before(rows, day))
    tables = {name: _quotients(rows_of(some, run=name)) for name in {*names, *before}}
    head = ["csm_fast in", "against"]
    for name in names:
        head.append(f"{name[:16].replace('T', ' ')} ({rows_of(some, run=name)[0]['commit']})")
    head.append(f"spread {'before' if before else 'on'} {day}")
    lines, inside, compared = [], 0, 0
    for key in tables[names[0]]:
        found = {name: table[key] for name, table in tables.items() if key in table}
        known = [quotients for name, quotients in found.items() if name in before or not before]
        medians = [f"{found[name][0]:.2f}x" if name in found else "" for name in names]
        if not known:
            lines.append([*key, *medians, ""])
            continue
        least, most = min(q[1] for q in known), max(q[2] for q in known)
        lines.append([*key, *medians, f"{least:.1f}-{most:.1f}"])
        if before:
            new = [quotients[0] for name, quotients in found.items() if name.startswith(day)]
            compared += len(new)
            inside += sum(least <= median <= most for median in new)
    over = f", over the last {len(before)} before {day}" if before else ""
    text = f"{markdown(head, lines)}\n\nSpread: the least and the most of any two repetitions of a run{over}.\n"
    if compared:
        text += f"{inside} of {compared} medians of {day} lie within it.\n"
    return text


def _quotients(rows: list[Row]) -> dict[tuple[str, str], tuple[float, float, float]]:
    """By csm_fast's label and the other system with its label."""
    found = {}
    rows = [row for row in rows if "median_s" in row]
    for ours in rows_of(rows, system="csm_fast"):
        for row in rows:
            if is_theirs(row) and row["ranked"] and (is_free(ours) or row["label"] == ours["label"]):
                found[race(row, ours)] = quotient(row, ours)
    return found


# Runs before took the time of an epoch's longest batch for what the others take in proportion.
FIRST_FP32_RUN = "2026-11-28T05:38"


def _kind(row: Row) -> str:
    """Of the processor: "bf16" multiplies that in registers, "amx" in tiles; where the others trained in float32,
    "fp32"."""
    # Rows that do not say it are older than the question: processors with AVX512-BF16.
    if row.get("precision", "bf16") != "bf16":
        return "fp32"
    return "amx" if row["device"].endswith("(AMX)") else "bf16"


def _on_cpu(results: Path, kind: str, **wanted: Any) -> list[Row]:
    """Of one kind of processors."""
    rows = rows_of(read(results, "compare"), data="recordings", **wanted)
    return [row for row in rows if _kind(row) == kind and (kind != "fp32" or row["run"] >= FIRST_FP32_RUN)]


def _of_compare(kind: str, form: Callable[..., str] = compare, **wanted: Any) -> Callable[[Path], str]:
    def part(results: Path) -> str:
        rows = _on_cpu(results, kind, **wanted)
        return form(last_run(rows), rows)

    return part


def _of_runs(kind: str) -> Callable[[Path], str]:
    return lambda results: runs(_on_cpu(results, kind, shape="small", checkpointing=False))


def _on_cpus(kind: str, ending: str) -> dict[str, Callable[[Path], str]]:
    """The parts about one kind of processors, by their names."""
    small: dict[str, Any] = {"shape": "small", "checkpointing": False}
    large: dict[str, Any] = {"shape": "csm-1b", "checkpointing": False}
    return {
        f"speed-cpu{ending}": _of_compare(kind, summarized, **small),
        f"speed-cpu{ending}-csm-1b": _of_compare(kind, summarized, **large),
        f"compare-cpu{ending}": _of_compare(kind, **small),
        f"compare-cpu{ending}-checkpointing": _of_compare(kind, shape="small", checkpointing=True),
        f"compare-cpu{ending}-csm-1b": _of_compare(kind, **large),
        f"compare-cpu{ending}-runs": _of_runs(kind),
    }


def _ways(rows: list[Row]) -> str:
    """csm_fast's own ways to train, the last run on each device."""
    devices = dict.fromkeys(row["device"] for row in rows)
    return "\n".join(compare(last_run(rows_of(rows, device=device))) for device in devices) or "Not measured.\n"


def _on_gpu(results: Path) -> str:
    return compare(last_run(read(results, "gpu_compare")))


def _profiles(name: str, file: str) -> dict[str, Callable[[Path], str]]:
    return {name: lambda results: report_parts.profile(read(results, file))}


PARTS: dict[str, Callable[[Path], str]] = {
    **_on_cpus("bf16", ""),
    **_on_cpus("amx", "-amx"),
    **_on_cpus("fp32", "-fp32"),
    "speed-gpu": lambda results: summarized(last_run(read(results, "gpu_compare"))),
    "compare-gpu": _on_gpu,
    "ways-cpu": lambda results: _ways(read(results, "ways")),
    "ways-gpu": lambda results: _ways(read(results, "gpu_ways")),
    "pretokenize": lambda results: report_parts.pretokenize(read(results, "pretokenize")),
    "data-path": lambda results: report_parts.data_path(read(results, "data_path")),
    "optimizers-cpu": lambda results: report_parts.optimizers(read(results, "optimizers")),
    "optimizers-gpu": lambda results: report_parts.optimizers(read(results, "gpu_optimizers")),
    **_profiles("profile-cpu", "profile_small_cpu"),
    **_profiles("profile-cpu-batch8", "profile_small_cpu_batch8"),
    **_profiles("profile-cpu-amx", "profile_small_cpu_amx"),
    **_profiles("profile-cpu-amx-batch8", "profile_small_cpu_amx_batch8"),
    "scaling-cpu": lambda results: report_parts.scaling(read(results, "scaling")),
}


def filled(page: str, results: Path) -> str:
    """A page's text with its generated parts made anew.

    Raises:
        SystemExit: a part that nobody makes.
    """

    def part(found: re.Match[str]) -> str:
        if found[2] not in PARTS:
            raise SystemExit(f"error: no part is called {found[2]}; there are {', '.join(PARTS)}")
        return f"{found[1]}{PARTS[found[2]](results)}{found[3]}"

    return PART.sub(part, page)


def draw(rows: list[Row], path: Path) -> None:
    """Rows per second of every system, one panel per label of equal updates and one for free packing."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in rows if "median_s" in row]
    labels = list(dict.fromkeys(row["label"] for row in rows))
    figure, axes = plt.subplots(1, len(labels), figsize=(5.0 * len(labels), 3.6), squeeze=False)
    for axis, label in zip(axes[0], labels, strict=True):
        some = rows_of(rows, label=label)
        free = is_free(some[0])
        if free:
            some += [row for row in rows if not row["system"].startswith("csm_fast")]
        names = [row["system"] + (f", {row['label']}" if free else "") for row in some]
        rates = [row["rows"] / row["median_s"] for row in some]
        spread = [
            [rate - row["rows"] / max(row["seconds"]) for rate, row in zip(rates, some, strict=True)],
            [row["rows"] / min(row["seconds"]) - rate for rate, row in zip(rates, some, strict=True)],
        ]
        colours = ["black" if row["system"].startswith("csm_fast") else "0.6" for row in some]
        axis.barh(names, rates, xerr=spread, color=colours, ecolor="tab:red", capsize=2)
        axis.invert_yaxis()
        axis.set_title(("free: " if free else "equal updates: ") + label, fontsize=10)
        axis.set_xlabel("rows per second, forward + backward")
        axis.tick_params(labelsize=8)
        for y, (rate, more) in enumerate(zip(rates, spread[1], strict=True)):
            axis.text(rate + more, y, f"  {rate:,.0f}", va="center", fontsize=7)
        axis.set_xlim(right=1.25 * max(rate + more for rate, more in zip(rates, spread[1], strict=True)))
    figure.suptitle(f"{rows[0]['shape']} shape, {rows[0]['recordings']} recordings; {provenance(rows[0])}", fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--root", type=Path, default=ROOT, metavar="DIR", help="of the pages")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a page is not up to date")
    args = parser.parse_args()
    stale = []
    for name in PAGES:
        path = args.root / name
        if not path.exists():
            continue
        before = path.read_text(encoding="utf-8")
        after = filled(before, args.results)
        if after != before:
            stale.append(name)
            if not args.check:
                path.write_text(after, encoding="utf-8")
    if args.check:
        for name in stale:
            print(f"{name} is not what benchmarks/results says; run python -m benchmarks.report.__main__")
        return int(bool(stale))
    for kind, ending in (("bf16", ""), ("amx", "-amx"), ("fp32", "-fp32")):
        if rows := last_run(_on_cpu(args.results, kind, shape="small", checkpointing=False)):
            draw(rows, args.root / "docs" / f"compare-cpu{ending}.png")
    if scaled := read(args.results, "scaling"):
        report_parts.draw_scaling(scaled, args.root / "docs" / "scaling-cpu.png")
    print(f"written: {', '.join(stale) or 'nothing new'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
