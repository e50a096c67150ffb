"""What every recorded figure says of where it comes from."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
from pathlib import Path
from typing import Any


def environment() -> dict[str, Any]:
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

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    dirty = "+" if git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!/benchmarks/results") else ""
    return {
        "device": device,
        "precision": resolve_precision("auto", resolve_device("auto")),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "csm_fast": csm_fast.__version__,
        "commit": git("rev-parse", "--short", "HEAD") + dirty,
        "date": datetime.date.today().isoformat(),
    }


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a results file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps(row) + "\n")
