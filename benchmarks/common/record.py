"""Rows of results: what each says of the machine and the code, and how they are written and read."""

from __future__ import annotations

import datetime
import functools
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


@functools.cache
def environment() -> Row:
    """Device, the precision that it multiplies fast, versions, commit (with ``+`` for uncommitted changes outside of
    the results) and date."""
    import torch

    import csm_fast
    from csm_fast.system.device import processor, resolve_device, resolve_precision

    def git(*args: str) -> str:
        try:
            return subprocess.run(["git", *args], capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return ""

    dirty = "+" if git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!/benchmarks/results") else ""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "precision": resolve_precision("auto", resolve_device("auto")),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "csm_fast": csm_fast.__version__,
        "commit": git("rev-parse", "--short", "HEAD") + dirty,
        "date": datetime.date.today().isoformat(),
    }


def start_time() -> str:
    """The time of now, as the ``run`` of all rows of one run."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def append_row(path: Path | None, benchmark: str, row: Row) -> None:
    """Add a row to a results file, if there is one: the benchmark's name, ``environment()`` and, over it, ``row``."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({"benchmark": benchmark, **environment(), **row}) + "\n")


def read_rows(path: Path, offset: int = 0) -> list[Row]:
    """The rows of a results file from ``offset`` bytes on, without a last one that was cut off; [] without a file."""
    if not path.exists():
        return []
    lines = path.read_bytes()[offset:].split(b"\n")[:-1]
    return [json.loads(line) for line in lines if line]
