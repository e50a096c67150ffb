"""A file that lies in the run directory while a run is on: the next run learns from it that this one was killed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from csm_fast.system.device import memory_gib

NAME = ".running"


class RunMarker:
    """A file that exists while a run is active.

    Attributes:
        left: "step" and "memory_gib" of the last log line of an earlier run that was killed; None if none was.
    """

    def __init__(self, run_dir: Path, device: torch.device):
        self.path, self.device = run_dir / NAME, device
        self.left = self._read()

    def _read(self) -> dict[str, Any] | None:
        try:
            left = json.loads(self.path.read_text(encoding="utf-8"))
            return {"step": int(left["step"]), "memory_gib": float(left["memory_gib"])}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):  # killed while it wrote this
            return {"step": 0, "memory_gib": 0.0}

    def beat(self, step: int) -> None:
        """Write how far the run is. A failed write loses nothing; saving reports a full disk."""
        try:
            self.path.write_text(json.dumps({"step": step, "memory_gib": memory_gib(self.device), "pid": os.getpid()}))
        except OSError:
            pass

    def remove(self) -> None:
        try:
            self.path.unlink(missing_ok=True)
        except OSError:
            pass
