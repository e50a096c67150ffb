"""What a row costs the loader, for stores and pack sizes in turns (``python -m benchmarks.data_path.__main__``).

One process opens all stores and builds the steps of each, in packs of each size, in turns of at least 65,536 rows whose
order is drawn anew each time. So all meet the same machine, whose speed moves by more than they differ, and none finds
its store in the processor's caches. The figure is the time of all turns by their rows; turns of twice the median time
and more are left out and counted: the machine was elsewhere, or a page came from the disk.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.data_path.synthetic_store import read_through
from csm_fast.config.train import DataSection, LossSection
from csm_fast.data.token_store import TokenStore
from csm_fast.packing.loader import Packer

TURN_ROWS, LEAST_TURNS, WARM_UP = 65_536, 3, 20


def disk_bytes() -> int:
    """Bytes that this process had fetched from the disk so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def section(pack_rows: int, by: str) -> DataSection:
    """Steps of one full pack ("rows"), or of 8 conversations ("conversations")."""
    return DataSection(pack_rows=pack_rows, batch_rows=pack_rows if by == "rows" else None)


class Turns:
    """Seconds of work by rows, in turns of at least ``TURN_ROWS`` rows."""

    def __init__(self) -> None:
        self.ended: list[tuple[float, int]] = []
        self.now = (0.0, 0)

    def add(self, seconds: float, rows: int) -> bool:
        """More work of the current turn; whether that was its end."""
        self.now = (self.now[0] + seconds, self.now[1] + rows)
        if self.now[1] < TURN_ROWS:
            return False
        self.ended.append(self.now)
        self.now = (0.0, 0)
        return True

    def us_per_row(self) -> tuple[float, int]:
        """Microseconds by rows, and how many turns were left out as disturbed."""
        turns = self.ended or [self.now]
        most = 2 * statistics.median(s / rows for s, rows in turns)
        kept = [(s, rows) for s, rows in turns if s / rows < most]
        return 1e6 * sum(s for s, _ in kept) / sum(rows for _, rows in kept), len(turns) - len(kept)


def row_time(paths: dict[str, str], pack_rows: list[int], seconds: float) -> list[dict[str, Any]]:
    """What a row costs, for all stores and pack sizes in turns."""
    cases = []
    for name, path in paths.items():
        read_through(Path(path))
        store = TokenStore.open(path, verify=False)
        for rows in pack_rows:
            blocks = Packer(store, section(rows, "rows"), LossSection(), pad="cpu").blocks(0, 0)
            for _ in range(WARM_UP):
                next(blocks)
            cases.append((float(name), rows, blocks, Turns(), Turns()))
    read, started, order = disk_bytes(), time.perf_counter(), random.Random(0)
    turns = 0
    while time.perf_counter() - started < seconds * len(cases) or turns < LEAST_TURNS:
        for _, _, blocks, wall, cpu in order.sample(cases, len(cases)):
            ended = False
            while not ended:
                before, cpu_before = time.perf_counter(), time.thread_time()
                block = next(blocks)
                took, cpu_took = time.perf_counter() - before, time.thread_time() - cpu_before
                rows = sum(step.rows for step in block)
                cpu.add(cpu_took, rows)
                ended = wall.add(took, rows)
        turns += 1
    figures = []
    for hours, rows, _, wall, cpu in cases:
        (us, left_out), (cpu_us, _) = wall.us_per_row(), cpu.us_per_row()
        figures.append(
            {"hours": hours, "pack_rows": rows, "us_per_row": us, "cpu_us_per_row": cpu_us, "turns": len(wall.ended)}
            | {"left_out": left_out, "disk": disk_bytes() - read}
        )
    return figures


def spread(figures: Iterable[dict[str, Any]], name: str) -> str:
    values = [f[name] for f in figures]
    return f"{max(values) / min(values) - 1:.1%}"


def show_row_times(cells: list[dict[str, Any]]) -> None:
    """What a row costs, hours by pack sizes, and how far that is from flat."""
    hours, sizes = (list(dict.fromkeys(cell[name] for cell in cells)) for name in ("hours", "pack_rows"))
    print("what a row costs the loader, us (processor time in brackets), and slowest over fastest")
    print(f"{'hours':>8} " + " ".join(f"{f'packs of {rows:,}':>20}" for rows in sizes) + "  over the packs")
    for some in hours:
        of = [cell for cell in cells if cell["hours"] == some]
        figures = " ".join(f"{c['us_per_row']:12.3f} ({c['cpu_us_per_row']:.3f})" for c in of)
        print(f"{some:8g} {figures} {spread(of, 'us_per_row'):>8} ({spread(of, 'cpu_us_per_row')})")
    over = [[cell for cell in cells if cell["pack_rows"] == rows] for rows in sizes]
    figures = " ".join(f"{spread(of, 'us_per_row'):>12} ({spread(of, 'cpu_us_per_row')})" for of in over)
    print(f"{'over':>8} {figures}")
    left, disk = sum(cell["left_out"] for cell in cells), max(cell["disk"] for cell in cells)
    print(
        f"of {sum(c['turns'] for c in cells):.0f} turns {left:.0f} left out as disturbed; {disk / 2**20:.1f} MiB read"
    )
