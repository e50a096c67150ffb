"""The parts of the pages beside the comparison: encoding, optimizers, loader, profile, scaling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.common.record import Row
from benchmarks.common.tables import MIB, Table, format_markdown, last_run, newest_rows, select_rows

NOT_MEASURED = "Not measured.\n"
EIGHT_BITS = "bf16, stochastic, 8-bit moments"  # name of an update in benchmarks.optimizers


def describe_provenance(row: Row) -> str:
    """Device, versions, commit and date of a row."""
    versions = f"torch {row['torch']}, Python {row['python']}, csm_fast {row['csm_fast']} ({row['commit']})"
    return f"{row['device']}, {row['threads']} threads; {versions}; {row['date']}"


def write_pretokenize(rows: list[Row]) -> str:
    """Speed and memory of encoding, one line per system, the last run on each device."""
    rows = newest_rows(rows, "system", "device")
    devices = dict.fromkeys(row["device"] for row in rows)
    return "\n".join(_write_encodings(select_rows(rows, device=device)) for device in devices) or NOT_MEASURED


def _write_encodings(rows: list[Row]) -> str:
    (moshi,) = select_rows(rows, system="moshi")
    head = ["system", "s", "with imports, s", "range", "times moshi's speed", "audio s/s", "MiB"]
    head += ["codes unlike moshi's", "near ties"]
    lines = []
    for row in rows:
        codes = row["against_moshi"]
        low, high = row["process_range_s"]
        lines.append(
            [
                row["system"],
                f"{row['work_s']:.1f}",
                f"{row['process_s']:.1f}",
                f"{low:.1f}-{high:.1f} ({row['repeats']})",
                f"{moshi['process_s'] / row['process_s']:.2f}x",
                f"{row['audio_s_per_s_without_imports']:.0f}",
                f"{row['peak_rss'] / MIB:.0f}",
                *([f"{codes['share']:.4%}", f"{codes['near_ties']} of {codes['first']}"] if codes else ["", ""]),
            ]
        )
    return (
        f"{rows[0]['recordings']} recordings, {rows[0]['audio_s'] / 60:.1f} minutes. "
        f"{describe_provenance(rows[0])}.\n\n{format_markdown(head, lines)}\n"
    )


def optimizer_table(rows: list[Row]) -> Table:
    """One line per kind of update."""
    head = ["update by", "weights", "ms", "spread", "needs, bytes a weight", "floor, ms", "of the floor"]
    head += ["small updates"]
    lines = []
    for row in rows:
        low, high = min(row["seconds"]) * 1e3, max(row["seconds"]) * 1e3
        floor = row["bytes"] / row["copy_bytes_per_s"]
        lines.append(
            [
                *row["way"],
                f"{row['median_s'] * 1e3:.1f}",
                f"{low:.1f}-{high:.1f} ({len(row['seconds'])})",
                f"{row['bytes'] / row['weights']:.1f}",
                f"{floor * 1e3:.1f}",
                f"{row['median_s'] / floor:.1f}x",
                "survive" if row["learns"] else "are lost",
            ]
        )
    return head, lines


def write_optimizers(rows: list[Row]) -> str:
    """Updates with clipping, of the last run."""
    if not rows:
        return NOT_MEASURED
    some = select_rows(rows, run=rows[-1]["run"], device=rows[-1]["device"])
    first, (text, audio) = some[0], some[0]["read"]
    return (
        f"{first['weights'] / 1e6:,.0f} million weights, `{first['shape']}` shape; {text:.2%} of the text table's rows "
        f"and {audio:.0%} of the audio table's ever had a gradient. {describe_provenance(first)}.\n\n"
        f"{format_markdown(*optimizer_table(some))}\n"
    )


def write_data_path(rows: list[Row]) -> str:
    """Opening, memory and time per row of the smallest and the largest store."""
    streams = newest_rows(select_rows(rows, kind="stream", cold=False), "hours", "by", "pack_rows")
    if not streams:
        return NOT_MEASURED
    hours = [row["hours"] for row in streams]
    streams = [row for row in streams if row["hours"] in (min(hours), max(hours))]
    head = ["hours", "steps of", "open, s", "private MiB", "packer and plan, s", "private MiB", "streaming, us/row"]
    head += ["grown in streaming, MiB"]
    lines = []
    for row in streams:
        packs = f"{row['pack_rows']:,}"
        lines.append(
            [
                f"{row['hours']:g}",
                f"{packs} rows" if row["by"] == "rows" else f"8 conversations, packs of {packs}",
                f"{row['open_s']:.3f}",
                f"{row['open_private'] / MIB:.0f}",
                f"{row['packer_s'] + row['plan_s']:.3f}",
                f"{row['plan_private'] / MIB:.0f}",
                f"{row['us_per_row']:.3f}",
                f"{(row['stream_private'] - row['warm_private']) / MIB:.1f}",
            ]
        )
    place = streams[-1].get("stores", "the page cache")
    text = f"Stores in {place}; {describe_provenance(streams[-1])}.\n\n{format_markdown(head, lines)}\n"
    waits = newest_rows(select_rows(rows, kind="wait"), "hours")
    if waits:
        shares = ", ".join(f"{row['hours']:g} hours {row['waited_share']:.3%}" for row in waits)
        model = waits[-1]["model"]
        text += f"\nTime that training steps ({model}, packs of 2,048) waited for the loader: {shares}.\n"
    return text


def write_profiles(files: list[list[Row]]) -> str:
    """Where the time of a step goes, one line per profile."""
    head = ["processor", "date", "rows", "step, ms", "matrix products", "their floor", "other operators"]
    head += ["Python and dispatch", "waiting for the loader"]
    lines = []
    steps = [select_rows(rows, row="step")[-1] for rows in files]
    for step in sorted(steps, key=lambda step: (step["device"], step["rows"])):
        others = step["operators_ms"] - step["products_ms"]
        parts = [step["products_ms"], step["products_floor_ms"], others, step["host_ms"], step["loader_ms"]]
        times = [f"{step['step_ms']:.0f}", *(f"{ms:.1f}" for ms in parts)]
        lines.append([step["device"], step["date"], f"{step['rows']:,.0f}", *times])
    return f"{format_markdown(head, lines)}\n" if lines else NOT_MEASURED


def split_axes(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows of the last run of each axis; a run may cover some of the axes only."""
    return {axis: last_run(select_rows(rows, axis=axis)) for axis in dict.fromkeys(row["axis"] for row in rows)}


def write_scaling(rows: list[Row]) -> str:
    """Time and memory at the ends of each axis, from its last run, and how the time grows in between."""
    if not rows:
        return NOT_MEASURED
    head = ["axis", "values", "ms", "us/row", "MiB besides", "time grows like", "in the upper half"]
    lines, axes = [], split_axes(rows)
    for axis, some in axes.items():
        first, last = some[0], some[-1]
        exponents = [first.get(name) for name in ("exponent", "exponent_upper")]
        lines.append(
            [
                axis,
                f"{format_value(first['value'])} to {format_value(last['value'])}",
                f"{first['median_s'] * 1e3:,.0f} to {last['median_s'] * 1e3:,.0f}",
                " to ".join(f"{row['median_s'] / row['rows'] * 1e6:,.0f}" for row in (first, last)),
                " to ".join(f"{row['memory']['besides'] / MIB:,.0f}" for row in (first, last)),
                *(f"{axis}^{exponent:.2f}" if exponent is not None else "" for exponent in exponents),
            ]
        )
    first = next(iter(axes.values()))[0]
    return f"`{first['shape']}` shape. {describe_provenance(first)}.\n\n{format_markdown(head, lines)}\n"


def format_value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) else value


def format_tick(value: Any) -> str:
    """The label of a value on an axis of powers of two: 65536 is 64k, 0.0625 is 1/16."""
    if isinstance(value, float) and 0 < value < 1 and (1 / value).is_integer():
        return f"1/{1 / value:.0f}"
    if isinstance(value, int) and value >= 1024 and value % 1024 == 0:
        return f"{value // 1024}k"
    return format_value(value)


def draw_scaling(rows: list[Row], path: Path) -> None:
    """Draw a panel per axis: milliseconds over the value, and below it memory by part of the step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator

    found = split_axes(rows)
    first = next(iter(found.values()))[0]
    figure, axes = plt.subplots(2, len(found), figsize=(3.6 * len(found), 6), squeeze=False)
    names = sorted({name for some in found.values() for row in some for name in row["memory"] if name != "besides"})
    for column, (axis, some) in enumerate(found.items()):
        is_number = isinstance(some[0]["value"], (int, float))
        labels = [format_tick(row["value"]) for row in some]
        top, low = axes[0][column], axes[1][column]
        ms = [row["median_s"] * 1e3 for row in some]
        slope = f", exponent {some[0]['exponent']:.2f}" if "exponent" in some[0] else ""
        top.plot(labels, ms, marker="o", color="black")
        top.set_title(axis + slope, fontsize=9)
        top.set_ylabel("forward + backward, ms")
        if is_number:  # values double, so a power law is a straight line on a logarithmic axis
            top.set_yscale("log")
            top.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            top.yaxis.set_minor_locator(NullLocator())
            top.yaxis.set_major_formatter("{x:,g}")
            top.set_ylim(min(ms) * 0.7, max(ms) * 1.4)
        else:
            top.set_ylim(0, max(ms) * 1.15)
        base = [0.0] * len(some)
        for name in names:
            sizes = [row["memory"].get(name, 0) / MIB for row in some]
            low.bar(labels, sizes, bottom=base, label=name, width=0.6)
            base = [b + s for b, s in zip(base, sizes, strict=True)]
        low.set_ylabel("MiB besides weights and gradients")
        for panel in (top, low):
            panel.tick_params(which="both", labelsize=7)
            panel.tick_params(axis="x", rotation=0 if is_number else 20)
            panel.grid(True, axis="y", alpha=0.3)
    axes[1][0].legend(fontsize=7, frameon=False)
    figure.suptitle(f"{first['shape']} shape; {describe_provenance(first)}", fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
