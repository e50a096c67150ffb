"""Rows of results chosen, and shown as tables."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.common.record import Row

MIB = 2**20
Table = tuple[list[str], list[list[str]]]  # head and lines


def select_rows(rows: Iterable[Row], /, **wanted: Any) -> list[Row]:
    """The rows whose fields have these values."""
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def newest_rows(rows: Iterable[Row], *keys: str) -> list[Row]:
    """The last row of each setting of ``keys``, in the order in which the settings first occur."""
    return list({tuple(row[key] for key in keys): row for row in rows}.values())


def last_run(rows: list[Row]) -> list[Row]:
    """The rows of the newest run; ``run`` is the time at which a run began."""
    return select_rows(rows, run=max((row["run"] for row in rows), default=None))


def format_text(head: list[str], lines: list[list[str]], left: int = 2) -> str:
    """A table for a terminal: columns as wide as they need, the first ``left`` ones aligned to the left."""
    table = [head, *lines]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    cells = [[f"{cell:{'<' if i < left else '>'}{widths[i]}}" for i, cell in enumerate(line)] for line in table]
    return "\n".join("  ".join(line).rstrip() for line in cells)


def format_markdown(head: list[str], lines: list[list[str]]) -> str:
    """A table for a page."""
    rule = ["---" if i < 2 else "---:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *lines])
