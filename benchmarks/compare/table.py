"""The tables of ``benchmarks.compare``, from its rows: printed after a run, and in Markdown for a page."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import Any

from csm_fast.config.shape import FRAME_SECONDS

Row = dict[str, Any]
MIB = 2**20
OURS = ("csm_fast-fp32", "csm_fast")  # whose memory the others' is compared with: in float32 where it was measured


def rows_of(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """Those whose fields are these."""
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def our_rows(rows: list[Row]) -> list[Row]:
    """csm_fast's rows, which the others are compared with: of bf16 weights, or of float32 where only those trained."""
    return rows_of(rows, system="csm_fast") or rows_of(rows, system="csm_fast-fp32")


def is_free(row: Row) -> bool:
    """Of csm_fast's free packing, not of given batches."""
    return row["label"].startswith("packs")


def is_theirs(row: Row) -> bool:
    return not row["system"].startswith("csm_fast")


def quotient(row: Row, than: Row) -> tuple[float, float, float]:
    """How many times as long as ``than`` the row takes: by medians, and least and most of any two repetitions."""
    return (
        row["median_s"] / than["median_s"],
        min(row["seconds"]) / max(than["seconds"]),
        max(row["seconds"]) / min(than["seconds"]),
    )


Spreads = dict[tuple[str, str], tuple[float, float]]  # by csm_fast's label and the other's system and label


def race(row: Row, ours: Row) -> tuple[str, str]:
    """The key of ``Spreads``."""
    return ours["label"], f"{row['system']}, {row['label']}"


def faster(row: Row, than: Row | None, spreads: Spreads | None = None) -> str:
    """``quotient`` with its spread, or that of several runs, or why that is not said."""
    if than is None or row is than:
        return ""
    if not row["ranked"]:
        return "not ranked"
    middle, least, most = quotient(row, than)
    if spreads:
        least, most = spreads.get(race(row, than), (least, most))
    return f"{middle:.2f}x ({least:.1f}-{most:.1f})"


def time_tables(rows: list[Row], spreads: Spreads | None = None) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, head, lines) for equal updates, one per batch size, and for free packing."""
    rows = [row for row in rows if "median_s" in row]
    labels = list(dict.fromkeys(row["label"] for row in rows))
    tables = []
    for label in labels:
        some = rows_of(rows, label=label)
        free = is_free(some[0])
        if free:
            title = f"csm_fast in {label}, the others in their batches"
            some = [*some, *filter(is_theirs, rows)]
        else:
            title = f"equal updates: {label}"
        ours = rows_of(our_rows(rows), label=label)
        tables.append((f"{title}, seconds per epoch", *_times(some, ours[0] if ours else None, free, spreads)))
    return tables


def _times(rows: list[Row], ours: Row | None, free: bool, spreads: Spreads | None) -> tuple[list[str], list[list[str]]]:
    # The work is that of csm_fast's own batches; what others pad is no work.
    flops = ours["flops"] if ours else 0
    rate = ours.get("matmul_rate") if ours else None
    head = ["system", "recipe", "s", "spread", "csm_fast is faster", "rows/s", "audio s/s", "padding", "updates"]
    head += ["GFLOP/s", "of matmul rate", "optimizer s", "with optimizer s", "loss differs by"]
    lines = []
    for row in rows:
        median = row["median_s"]
        own = row["flops"] if row["flops"] else flops
        all_frames = "all-frames" in row["system"]
        share = f"{own / median / rate:.0%}" if rate and own and not all_frames else ""
        lines.append(
            [
                row["system"] + (f", {row['label']}" if free else ""),
                row["recipe"] + (", compiled" if row["compiled"] else ""),
                f"{median:.2f}",
                f"{min(row['seconds']):.2f}-{max(row['seconds']):.2f} ({_repeats(row)})",
                faster(row, ours, spreads),
                f"{row['rows'] / median:,.0f}",
                f"{row['frames'] * FRAME_SECONDS / median:,.0f}",
                f"{1 - row['rows'] / row['laid_out']:.0%}",
                str(row["updates"]),
                f"{own / median / 1e9:,.0f}" if own and not all_frames else "",
                share,
                f"{row['optimizer_s']:.1f}" if "optimizer_s" in row else "",
                _with_optimizer(row, ours),
                f"{row['loss_difference']:.0e}",
            ]
        )
    return head, lines


def _with_optimizer(row: Row, than: Row | None) -> str:
    """Seconds per epoch, the optimizer included, and how many times that of ``than``."""
    if "optimizer_s" not in row:
        return ""
    whole = row["median_s"] + row["optimizer_s"]
    if than is None or row is than or not row["ranked"] or "optimizer_s" not in than:
        return f"{whole:.1f}"
    return f"{whole:.1f} ({whole / (than['median_s'] + than['optimizer_s']):.2f}x)"


def _repeats(row: Row) -> str:
    count = len(row["seconds"])
    return f"{count} parts" if row.get("parts", 1) > 1 else str(count)


def memory_table(rows: list[Row]) -> tuple[str, list[str], list[list[str]]]:
    head = ["system", "recipe", "batch", "rows", "weights", "gradients", "peak", "besides", "of csm_fast's"]
    lines = []
    for row in rows:
        if "memory" not in row:
            continue
        figures = row["memory"]
        ours = _our_memory(row, rows)
        times = f"{figures['besides'] / ours['memory']['besides']:.2f}x" if ours is not None else ""
        mib = [f"{figures[key] / MIB:,.0f}" for key in ("weights", "gradients", "peak", "besides")]
        recipe = row["recipe"] + (", checkpointing" if row["checkpointing"] else "")
        lines.append([row["system"], recipe, row["label"], f"{figures['rows']:,}", *mib, times])
    return (
        "memory of one forward and backward pass, MiB ('besides': the most without weights and gradients)",
        head,
        lines,
    )


def _our_memory(row: Row, rows: list[Row]) -> Row | None:
    """What the row's memory is compared with: csm_fast's in the same batches, in float32 what trains in float32."""
    same = {"label": row["label"], "checkpointing": row["checkpointing"]}
    for name in OURS[row["recipe"] != "float32" :]:
        if (found := rows_of(rows, system=name, **same)) and "memory" in found[0]:
            return None if found[0] is row else found[0]
    return None


def summary(rows: list[Row], spreads: Spreads | None = None) -> tuple[list[str], list[list[str]]]:
    """A line per system: seconds per epoch and how many times csm_fast's they are, in batches as everyone has them, the
    optimizer included, and with csm_fast free to pack; and the memory besides weights and gradients."""
    timed = [row for row in rows if "median_s" in row]
    equal = list(dict.fromkeys(row["label"] for row in timed if not is_free(row)))
    free = next(filter(is_free, our_rows(timed)), None)
    head = ["system", "recipe", *(f"{label}, s" for label in equal)]
    optimized = any("optimizer_s" in row for row in timed)
    head += ["with optimizer"] * optimized
    head += [f"csm_fast in {free['label']}, s"] if free else []
    head += ["MiB besides"]
    lines = []
    for system in dict.fromkeys(row["system"] for row in timed):
        own = {row["label"]: row for row in rows_of(timed, system=system)}
        ours = {row["label"]: row for row in our_rows(timed)}
        cells = [_seconds_and_times(own[label], ours.get(label), spreads) if label in own else "" for label in equal]
        if optimized:
            cells.append(", ".join(_optimized(own[label], ours.get(label)) for label in equal if label in own))
        if free:
            mine = next((row for row in own.values() if is_free(row)), None)
            theirs = [f"{faster(row, free, spreads)} of {_size(label)}" for label, row in own.items()]
            cells.append(_seconds_and_times(mine, free, spreads) if mine else ", ".join(theirs))
        lines.append([system, next(iter(own.values()))["recipe"], *cells, _besides(list(own.values()), rows)])
    return head, lines


def _seconds_and_times(row: Row, ours: Row | None, spreads: Spreads | None) -> str:
    times = faster(row, ours, spreads)
    return f"{row['median_s']:.1f}" + (f", {times}" if times else "")


def _optimized(row: Row, ours: Row | None) -> str:
    """Seconds with the optimizer, of the others how many times csm_fast's they are."""
    whole = _with_optimizer(row, ours)
    return f"{whole[whole.index('(') + 1 : -1]} ({_size(row['label'])})" if "(" in whole else whole


def _size(label: str) -> str:
    """The number of a label."""
    return label.rsplit(" ", 1)[-1]


def _besides(own: list[Row], rows: list[Row]) -> str:
    """Of each batch size, with the multiple of csm_fast's."""
    cells = []
    for row in own:
        if "memory" in row:
            figure, ours = row["memory"]["besides"], _our_memory(row, rows)
            times = f", {figure / ours['memory']['besides']:.1f}x" if ours is not None else ""
            cells.append(f"{figure / MIB:,.0f}{times} ({_size(row['label'])})")
    return "; ".join(cells)


def text(head: list[str], lines: list[list[str]]) -> str:
    """For a terminal: columns as wide as they need."""
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
    align: Callable[[int, str], str] = lambda i, cell: cell.ljust(widths[i]) if i < 2 else cell.rjust(widths[i])  # noqa: E731
    return "\n".join("  ".join(align(i, cell) for i, cell in enumerate(line)).rstrip() for line in [head, *lines])


def markdown(head: list[str], lines: list[list[str]]) -> str:
    """For a page."""
    rule = ["---" if i < 2 else "---:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *lines])


def print_tables(rows: list[Row]) -> None:
    first = rows[0]
    print(
        f"{first['recordings']} recordings, {first['rows']:,} rows, {first['frames'] * FRAME_SECONDS / 60:.1f} min of "
        f"audio; {first['shape']}; {first['device']}, {first['threads']} threads"
    )
    for title, head, lines in [*time_tables(rows), memory_table(rows)]:
        if lines:
            print(f"\n{title}\n{text(head, lines)}")


def spread(seconds: list[float]) -> float:
    """Half the range of repetitions over their median."""
    return (max(seconds) - min(seconds)) / 2 / statistics.median(seconds)
