"""The tables of ``benchmarks.compare``, from its rows: printed after a run, and in Markdown for a page."""

from __future__ import annotations

from benchmarks.common.record import Row
from benchmarks.common.tables import MIB, Table, format_text, select_rows
from csm_fast.config.shape import FRAME_SECONDS

OURS = ("csm_fast-fp32", "csm_fast")  # whose memory the others' is compared with: in float32 where it was measured


def our_rows(rows: list[Row]) -> list[Row]:
    """csm_fast's rows, which the others are compared with: of bf16 weights, or of float32 where only those trained."""
    return select_rows(rows, system="csm_fast") or select_rows(rows, system="csm_fast-fp32")


def is_free(row: Row) -> bool:
    """Whether the row is of csm_fast's free packing, not of given batches."""
    return row["label"].startswith("packs")


def ratio(row: Row, than: Row | None) -> str:
    """How many times as long as ``than`` the row takes: by medians, and least to most of any two repetitions."""
    if than is None or row is than:
        return ""
    if not row["ranked"]:
        return "not ranked"
    least, most = min(row["seconds"]) / max(than["seconds"]), max(row["seconds"]) / min(than["seconds"])
    return f"{row['median_s'] / than['median_s']:.2f}x ({least:.1f}-{most:.1f})"


def time_tables(rows: list[Row]) -> list[tuple[str, Table]]:
    """(title, table) for equal updates, one per batch size, and for free packing."""
    rows = [row for row in rows if "median_s" in row]
    tables = []
    for label in dict.fromkeys(row["label"] for row in rows):
        some = select_rows(rows, label=label)
        title, free = f"equal updates: {label}", is_free(some[0])
        if free:
            title = f"csm_fast in {label}, the others in their batches"
            some += [row for row in rows if not row["system"].startswith("csm_fast")]
        ours = select_rows(our_rows(rows), label=label)
        tables.append((f"{title}, seconds per epoch", _time_table(some, ours[0] if ours else None, free)))
    return tables


def _time_table(rows: list[Row], ours: Row | None, free: bool) -> Table:
    # The work is that of csm_fast's own batches; what others pad is no work.
    flops = ours["flops"] if ours else 0
    rate = ours.get("matmul_rate") if ours else None
    head = ["system", "recipe", "s", "spread", "csm_fast is faster", "rows/s", "audio s/s", "padding", "updates"]
    head += ["GFLOP/s", "of matmul rate", "optimizer s", "with optimizer s", "loss differs by"]
    lines = []
    for row in rows:
        median, seconds = row["median_s"], row["seconds"]
        own = 0 if "all-frames" in row["system"] else row["flops"] or flops
        parts = " parts" if row.get("parts", 1) > 1 else ""
        lines.append(
            [
                row["system"] + (f", {row['label']}" if free else ""),
                row["recipe"] + (", compiled" if row["compiled"] else ""),
                f"{median:.2f}",
                f"{min(seconds):.2f}-{max(seconds):.2f} ({len(seconds)}{parts})",
                ratio(row, ours),
                f"{row['rows'] / median:,.0f}",
                f"{row['frames'] * FRAME_SECONDS / median:,.0f}",
                f"{1 - row['rows'] / row['laid_out']:.0%}",
                str(row["updates"]),
                f"{own / median / 1e9:,.0f}" if own else "",
                f"{own / median / rate:.0%}" if own and rate else "",
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


def memory_table(rows: list[Row]) -> Table:
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
    return head, lines


def _our_memory(row: Row, rows: list[Row]) -> Row | None:
    """csm_fast's row that the row's memory is compared with: of the same batches, and in float32 for float32."""
    same = {"label": row["label"], "checkpointing": row["checkpointing"]}
    for name in OURS[row["recipe"] != "float32" :]:
        if (found := select_rows(rows, system=name, **same)) and "memory" in found[0]:
            return None if found[0] is row else found[0]
    return None


def summary_table(rows: list[Row]) -> Table:
    """A line per system: seconds per epoch and how many times csm_fast's they are, in batches as everyone has them, the
    optimizer included, and with csm_fast free to pack; and the memory besides weights and gradients."""
    timed = [row for row in rows if "median_s" in row]
    equal = list(dict.fromkeys(row["label"] for row in timed if not is_free(row)))
    free = next(filter(is_free, our_rows(timed)), None)
    optimized = any("optimizer_s" in row for row in timed)
    head = ["system", "recipe", *(f"{label}, s" for label in equal)]
    head += ["with optimizer"] * optimized
    head += [f"csm_fast in {free['label']}, s"] if free else []
    head += ["MiB besides"]
    ours = {row["label"]: row for row in our_rows(timed)}
    lines = []
    for system in dict.fromkeys(row["system"] for row in timed):
        own = {row["label"]: row for row in select_rows(timed, system=system)}
        cells = [_seconds_and_ratio(own[label], ours.get(label)) if label in own else "" for label in equal]
        if optimized:
            cells.append(", ".join(_optimized(own[label], ours.get(label)) for label in equal if label in own))
        if free:
            mine = next(filter(is_free, own.values()), None)
            theirs = [f"{ratio(row, free)} of {_size(label)}" for label, row in own.items()]
            cells.append(_seconds_and_ratio(mine, free) if mine else ", ".join(theirs))
        lines.append([system, next(iter(own.values()))["recipe"], *cells, _besides(list(own.values()), rows)])
    return head, lines


def _seconds_and_ratio(row: Row, ours: Row | None) -> str:
    return ", ".join(filter(None, [f"{row['median_s']:.1f}", ratio(row, ours)]))


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


def print_tables(rows: list[Row]) -> None:
    first = rows[0]
    print(
        f"{first['recordings']} recordings, {first['rows']:,} rows, {first['frames'] * FRAME_SECONDS / 60:.1f} min of "
        f"audio; {first['shape']}; {first['device']}, {first['threads']} threads"
    )
    memory = "memory of one forward and backward pass, MiB ('besides': the most without weights and gradients)"
    for title, table in [*time_tables(rows), (memory, memory_table(rows))]:
        if table[1]:
            print(f"\n{title}\n{format_text(*table)}")
