"""Tables, summary and plot of ``benchmarks.kernels``, made from its rows alone."""

from __future__ import annotations

from pathlib import Path

from benchmarks.common.record import Row
from benchmarks.common.tables import newest_rows, select_rows
from benchmarks.kernels.points import BOTH, MODES

OURS = "csm_fast"


def group_by_setting(rows: list[Row]) -> dict[tuple[str, ...], list[Row]]:
    """Rows of each device, dtype and shape: only these may be compared."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[k] for k in ("on", "device", "dtype", "shape")), []).append(row)
    return found


def latest(rows: list[Row]) -> list[Row]:
    """One row per point and system: of a file with several runs, the last, in the order of their first appearance."""
    return newest_rows(rows, "op", "fraction", "rows", "mode", "group", "system")


def is_ours(row: Row) -> bool:
    return row["system"].startswith(OURS)


def best_pair(rows: list[Row], op: str, mode: str, group: str = "dense") -> tuple[Row, Row] | None:
    """csm_fast's row and that of the fastest alternative that agrees, at the largest point at which both ran."""
    some = select_rows(latest(rows), op=op, mode=mode, group=group, status="ok")
    points = {(row["rows"], row["fraction"]) for row in some}
    for count, fraction in sorted(points, key=lambda point: (point[0], point[1] or 0.0), reverse=True):
        here = select_rows(some, rows=count, fraction=fraction)
        mine, others = [*filter(is_ours, here)], [row for row in here if not is_ours(row)]
        if mine and others:
            return mine[0], min(others, key=lambda row: row["median_s"])
    return None


def heading(rows: list[Row]) -> str:
    row = rows[-1]
    return f"{row['device']}, {row['dtype']}, shape {row['shape']} ({row['on']}, torch {row['torch']})"


# ---------------------------------------------------------------------------------------------------------- tables


def milliseconds(seconds: float) -> str:
    ms = seconds * 1e3
    return f"{ms:,.3f}" if ms < 1 else f"{ms:,.2f}" if ms < 100 else f"{ms:,.0f}"


def _line(row: Row, ours: float | None) -> str:
    name = f"  {row['system']:31}"
    if row["status"] != "ok":
        return f"{name} {row['status']}: {row['reason']}"
    spread = f"{milliseconds(row['min_s'])} to {milliseconds(row['max_s'])}"
    peak = row.get("peak_bytes")
    memory = "not seen" if peak is None else f"{peak / 2**20:,.1f}"
    rate = f"{row['bytes_per_s'] / 1e9:,.1f} GB/s"
    if row["ceiling"] == "matmul":
        rate = f"{row['flops_per_s'] / 1e12:,.3f} TFLOP/s"
    ratio = f"{row['median_s'] / ours:.2f}" if ours else ""
    error = max(row["errors"].values())
    return (
        f"{name} {milliseconds(row['median_s']):>9} {spread:>19} {memory:>10} {rate:>14} {row['share']:>7.0%}"
        f" {ratio:>8} {error:>8.1e}"
    )


def print_tables(rows: list[Row]) -> None:
    """One table per operator, then the summary; for each setting among the rows."""
    if not rows:
        print("no rows")
    for some in group_by_setting(rows).values():
        _print_tables(latest(some))


def _print_tables(rows: list[Row]) -> None:
    for op in dict.fromkeys(row["op"] for row in rows):
        some = select_rows(rows, op=op)
        print(f"\n{op}: {heading(some)}")
        print(
            f"  {'':31} {'median ms':>9} {'least to most':>19} {'peak MiB':>10} {'achieved':>14} {'of limit':>7}"
            f" {'/csm_fast':>8} {'error':>8}"
        )
        for count, fraction, mode in dict.fromkeys((row["rows"], row["fraction"], row["mode"]) for row in some):
            here = select_rows(some, rows=count, fraction=fraction, mode=mode)
            where = f" {count:,} rows" + ("" if fraction is None else f", fraction {fraction:g}") + f", {mode}"
            if all(row["status"] == "left out" for row in here):
                print(f"{where}: left out, {here[0]['reason']}")
                continue
            print(where)
            for row in here:
                group = [*filter(is_ours, select_rows(here, group=row["group"], status="ok"))]
                print(_line(row, group[0]["median_s"] if group else None))
    print("\ncsm_fast against the fastest alternative, at the largest point that both reached")
    for line in summary(rows):
        print(line)


def summary(rows: list[Row]) -> list[str]:
    """A line per operator, direction and group; and everything that was not measured, by reason."""
    lines = []
    for op in dict.fromkeys(row["op"] for row in rows):
        for group in dict.fromkeys(row["group"] for row in select_rows(rows, op=op)):
            for mode in MODES:
                name = op + ("" if group == "dense" else f", {group} gradient")
                pair = best_pair(rows, op, mode, group)
                if pair is None:
                    lines.append(f"  {name:30} {mode:17} nothing to compare")
                    continue
                ours, best = pair
                where = f"{ours['rows']:,} rows" + (f", {ours['fraction']:g}" if ours["fraction"] else "")
                ratio = best["median_s"] / ours["median_s"]
                memory = ""
                if ours.get("peak_bytes") and best.get("peak_bytes"):
                    memory = f", memory {best['peak_bytes'] / ours['peak_bytes']:.2f}x"
                lines.append(
                    f"  {name:30} {mode:17} {where:>17}: {milliseconds(ours['median_s']):>8} ms, {best['system']}"
                    f" {milliseconds(best['median_s'])} ms: {ratio:.2f}x{memory}"
                )
    missing: dict[str, dict[str, None]] = {}
    for row in rows:
        if row["status"] != "ok":
            what = row["op"] if row["status"] == "left out" else f"{row['op']} {row['system']}"
            missing.setdefault(f"{row['status']}, {row['reason']}", {})[what] = None
    lines += [f"  {reason}: {', '.join(names)}" for reason, names in missing.items()]
    return lines


# ------------------------------------------------------------------------------------------------------------ plot


def draw(rows: list[Row], path: Path) -> None:
    """Forward+backward over rows, both axes logarithmic: a panel per operator and fraction, a line per system. Of rows
    from several settings the last one is drawn."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator

    settings = list(group_by_setting(rows).values())
    if len(settings) > 1:
        print(f"{path}: the rows come from {len(settings)} settings; the last one is drawn")
    rows = select_rows(latest(settings[-1] if settings else []), mode=BOTH)
    panels = list(dict.fromkeys((row["op"], row["fraction"]) for row in rows))
    if not panels:
        raise SystemExit("no rows to draw")
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    figure, axes = plt.subplots(down, across, figsize=(5.2 * across, 4.2 * down), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (op, fraction) in zip(axes.flat, panels, strict=False):
        here = select_rows(rows, op=op, fraction=fraction)
        sizes = sorted({row["rows"] for row in here})
        for system in dict.fromkeys(row["system"] for row in here):
            some = select_rows(here, system=system, status="ok")
            if points := sorted((row["rows"], row["median_s"] * 1e3) for row in some):
                bold = {"color": "black", "linewidth": 2.2, "zorder": 3} if is_ours(some[0]) else {"linewidth": 1.4}
                style = "--" if "sparse" in system else "-"
                axis.plot(*zip(*points, strict=True), style, marker="o", markersize=4, label=system, **bold)
        axis.set_title(op if fraction is None else f"{op}, fraction {fraction:g}", fontsize=11)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(sizes, [f"{n:,}" for n in sizes])
        axis.minorticks_off()
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_xlabel("backbone rows")
        axis.set_ylabel("forward + backward, ms")
        axis.grid(True, which="major", alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, frameon=False)
        else:
            axis.text(0.5, 0.5, "nothing measured", ha="center", va="center", transform=axis.transAxes)
    figure.suptitle(heading(rows), fontsize=12, y=0.995)
    figure.tight_layout(rect=(0, 0, 1, 0.99))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
