"""Parts of the pages that ``benchmarks.report`` writes beside the comparison: encoding, loader, profile, scaling."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from benchmarks.compare_table import Row, markdown, rows_of

MIB = 2**20
LARGEST = 15  # operators of a profile


def provenance(row: Row) -> str:
    """Where figures come from."""
    versions = f"torch {row['torch']}, Python {row['python']}, csm_fast {row['csm_fast']} ({row['commit']})"
    return f"{row['device']}, {row['threads']} threads; {versions}; {row['date']}"


def latest(rows: Iterable[Row], *keys: str) -> list[Row]:
    """The last row of each setting, in the order of the settings' first ones."""
    found: dict[tuple, Row] = {}
    for row in rows:
        found[tuple(row[key] for key in keys)] = row
    return list(found.values())


def pretokenize(rows: list[Row]) -> str:
    """Audio seconds per second and where the time goes, a line per system, the last run on each device."""
    by_device: dict[str, list[Row]] = {}
    for row in latest(rows, "system", "device"):
        by_device.setdefault(row["device"], []).append(row)
    return "\n".join(map(_encodings, by_device.values())) or "Not measured.\n"


def _encodings(rows: list[Row]) -> str:
    (moshi,) = rows_of(rows, system="moshi")
    head = ["system", "s", "times moshi's speed", "with imports, s", "range", "times moshi's speed", "audio s/s"]
    head += ["decode", "encode", "write", "MiB", "codes unlike moshi's", "first levels", "near ties"]
    lines = []
    for row in rows:
        codes = row["against_moshi"]
        low, high = row["process_range_s"]
        lines.append(
            [
                row["system"],
                f"{row['work_s']:.1f}",
                f"{moshi['work_s'] / row['work_s']:.2f}x",
                f"{row['process_s']:.1f}",
                f"{low:.1f}-{high:.1f} ({row['repeats']})",
                f"{moshi['process_s'] / row['process_s']:.2f}x",
                f"{row['audio_s_per_s_without_imports']:.0f}",
                *(f"{row.get(part, 0.0):.1f}" for part in ("decode_s", "encode_s", "write_s")),
                f"{row['peak_rss'] / MIB:.0f}",
                *([f"{codes['share']:.4%}", str(codes["first"]), str(codes["near_ties"])] if codes else [""] * 3),
            ]
        )
    return (
        f"{rows[0]['recordings']} recordings, {rows[0]['audio_s'] / 60:.1f} minutes. {provenance(rows[0])}.\n\n"
        f"{markdown(head, lines)}\n"
    )


def optimizer_lines(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """A line per way to make an update."""
    head = ["update of", "", "ms", "spread", "needs, bytes a weight", "floor, ms", "of the floor", "small updates"]
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


def optimizers(rows: list[Row]) -> str:
    """Updates with clipping, of the last run on each device."""
    if not rows:
        return "Not measured.\n"
    runs = {row["device"]: row["run"] for row in rows}
    return "\n".join(_updates(rows_of(rows, run=run, device=device)) for device, run in runs.items())


def _updates(some: list[Row]) -> str:
    first, (text, audio) = some[0], some[0]["read"]
    return (
        f"{first['weights'] / 1e6:,.0f} million weights, `{first['shape']}` shape; {text:.2%} of the text table's rows "
        f"and {audio:.0%} of the audio table's ever had a gradient. {provenance(first)}.\n\n"
        f"{markdown(*optimizer_lines(some))}\n"
    )


def data_path(rows: list[Row]) -> str:
    """Opening, memory and time per row of stores of many sizes."""
    streams = latest(rows_of(rows, kind="stream", cold=False), "hours", "by", "pack_rows")
    if not streams:
        return "Not measured.\n"
    head = ["hours", "steps of", "open, s", "private MiB", "packer and plan, s", "private MiB", "streaming, us/row"]
    head += ["grown in streaming, MiB"]
    lines = []
    for row in streams:
        what = (
            f"{row['pack_rows']:,} rows" if row["by"] == "rows" else f"8 conversations, packs of {row['pack_rows']:,}"
        )
        lines.append(
            [
                f"{row['hours']:g}",
                what,
                f"{row['open_s']:.3f}",
                f"{row['open_private'] / MIB:.0f}",
                f"{row['packer_s'] + row['plan_s']:.3f}",
                f"{row['plan_private'] / MIB:.0f}",
                f"{row['us_per_row']:.3f}",
                f"{(row['stream_private'] - row['warm_private']) / MIB:.1f}",
            ]
        )
    place = streams[-1].get("stores", "the page cache")
    text = f"Stores in {place}; {provenance(streams[-1])}.\n\n{markdown(head, lines)}\n"
    waits = latest(rows_of(rows, kind="wait"), "hours")
    if waits:
        shares = ", ".join(f"{row['hours']:g} hours {row['waited_share']:.3%}" for row in waits)
        model = waits[-1]["model"]
        text += f"\nTime that training steps ({model}, packs of 2,048) waited for the loader: {shares}.\n"
    return text


def profile(rows: list[Row]) -> str:
    """The costliest operators of a step, and the step as a whole."""
    steps = rows_of(rows, row="step")
    if not steps:
        return "Not measured.\n"
    step, operators = steps[-1], rows_of(rows, row="operator")
    operators.sort(key=lambda row: -row["ms"])
    head = ["operator", "inputs", "calls", "ms", "share", "reached", "floor, ms"]
    lines = []
    for row in operators[:LARGEST]:
        seconds = row["ms"] * 1e-3
        reached = f"{row['flops'] / seconds / 1e9:,.0f} GFLOP/s" if row["kind"] == "product" else ""
        reached = f"{row['bytes'] / seconds / 1e9:,.1f} GB/s" if row["kind"] == "memory" else reached
        shapes = " ".join(str(shape).replace(" ", "") for shape in row["shapes"][:3])
        lines.append(
            [f"`{row['name']}`", shapes, f"{row['calls']:.1f}", f"{row['ms']:.1f}", f"{row['share']:.1%}", reached]
            + [f"{row['floor_ms']:.1f}"]
        )
    rest = operators[LARGEST:]
    lines.append(
        [f"{len(rest)} others", "", f"{sum(r['calls'] for r in rest):.0f}", f"{sum(r['ms'] for r in rest):.1f}"]
        + [f"{sum(r['share'] for r in rest):.1%}", "", f"{sum(r['floor_ms'] for r in rest):.1f}"]
    )
    versions = f"torch {step['torch']}, Python {step['python']}, csm_fast {step['csm_fast']}"
    where = f"{step['device']}, {step['threads']} threads; {versions}; {step['date']}."
    return (
        f"`{step['model']}` shape, {step['weights']} weights. {where}\n\n{markdown(head, lines)}\n\n"
        f"A step of {step['rows']:,.0f} rows: {step['step_ms']:.1f} ms, of which "
        f"{step['products_ms']:.1f} in matrix products (their floor {step['products_floor_ms']:.1f}), "
        f"{step['operators_ms'] - step['products_ms']:.1f} in other operators, {step['host_ms']:.1f} in Python and "
        f"dispatch, {step['loader_ms']:.2f} waiting for the loader; floors in all {step['floor_ms']:.1f}.\n"
    )


def last_runs(rows: list[Row]) -> list[Row]:
    """Of each axis the rows of its last run; a run may have had some of the axes only."""
    newest: dict[str, str] = {}
    for row in rows:
        newest[row["axis"]] = max(row["run"], newest.get(row["axis"], ""))
    return [row for row in rows if row["run"] == newest[row["axis"]]]


def scaling(rows: list[Row]) -> str:
    """Time and memory along each axis, of its last run."""
    rows = last_runs(rows)
    if not rows:
        return "Not measured.\n"
    text = f"`{rows[0]['shape']}` shape. {provenance(rows[0])}.\n"
    for axis in dict.fromkeys(row["axis"] for row in rows):
        some = rows_of(rows, axis=axis)
        head = [axis, "ms", "us/row", "GFLOP/s", "MiB besides", "of which"]
        lines = []
        for row in some:
            value = f"{row['value']:g}" if isinstance(row["value"], (int, float)) else row["value"]
            memory = sorted(((v, k) for k, v in row["memory"].items() if k != "besides"), reverse=True)
            parts = ", ".join(f"{name} {size / MIB:,.0f}" for size, name in memory if size > MIB / 2)
            per_row = row["median_s"] / row["rows"] * 1e6
            lines.append(
                [
                    value,
                    f"{row['median_s'] * 1e3:,.0f}",
                    f"{per_row:,.0f}",
                    f"{row['flops'] / row['median_s'] / 1e9:,.0f}",
                ]
                + [f"{row['memory']['besides'] / MIB:,.0f}", parts]
            )
        text += f"\n{markdown(head, lines)}\n"
        if "exponent" in some[0]:
            text += f"\nTime grows like {axis}^{some[0]['exponent']:.2f}"
            upper = some[0]["exponent_upper"]
            text += f", in the upper half ^{upper:.2f}.\n" if upper is not None else ".\n"
    return text


def tick(value: float) -> str:
    """Of an axis of powers of two: 65536 is 64k, 0.0625 is 1/16."""
    if 0 < value < 1 and (1 / value).is_integer():
        return f"1/{1 / value:.0f}"
    return f"{value / 1024:.0f}k" if value >= 1024 and value % 1024 == 0 else f"{value:g}"


def draw_scaling(rows: list[Row], path: Path) -> None:
    """A panel per axis: milliseconds over the value, memory by part below it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator

    rows = last_runs(rows)
    axes_found = list(dict.fromkeys(row["axis"] for row in rows))
    figure, axes = plt.subplots(2, len(axes_found), figsize=(3.6 * len(axes_found), 6), squeeze=False)
    names = sorted({name for row in rows for name in row["memory"] if name != "besides"})
    for column, axis in enumerate(axes_found):
        some = rows_of(rows, axis=axis)
        is_number = isinstance(some[0]["value"], (int, float))
        labels = [tick(r["value"]) if is_number else r["value"] for r in some]
        top, low = axes[0][column], axes[1][column]
        slope = f", exponent {some[0]['exponent']:.2f}" if "exponent" in some[0] else ""
        top.plot(labels, [r["median_s"] * 1e3 for r in some], marker="o", color="black")
        top.set_title(axis + slope, fontsize=9)
        top.set_ylabel("forward + backward, ms")
        if is_number:  # values double from one to the next, so that a power of them is a straight line
            top.set_yscale("log")
            top.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            top.yaxis.set_minor_locator(NullLocator())
            top.yaxis.set_major_formatter("{x:,g}")
            top.set_ylim(min(r["median_s"] for r in some) * 700, max(r["median_s"] for r in some) * 1400)
        else:
            top.set_ylim(0, max(r["median_s"] for r in some) * 1150)
        base = [0.0] * len(some)
        for name in names:
            sizes = [r["memory"].get(name, 0) / MIB for r in some]
            low.bar(labels, sizes, bottom=base, label=name, width=0.6)
            base = [b + s for b, s in zip(base, sizes, strict=True)]
        low.set_ylabel("MiB besides weights and gradients")
        for panel in (top, low):
            panel.tick_params(which="both", labelsize=7)
            panel.grid(True, axis="y", alpha=0.3)
        if not is_number:
            low.tick_params(axis="x", rotation=20)
            top.tick_params(axis="x", rotation=20)
    axes[1][0].legend(fontsize=7, frameon=False)
    figure.suptitle(f"{rows[0]['shape']} shape; {provenance(rows[0])}", fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
