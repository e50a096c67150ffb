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
    """``left`` is what an earlier run left behind that ended without a word: its "step" and "memory_gib" at its last
    log line. None where the last run said how it ended."""

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
        """Say how far the run is. Never an error: a full disk is told where something is lost by it."""
        try:
            self.path.write_text(json.dumps({"step": step, "memory_gib": memory_gib(self.device), "pid": os.getpid()}))
        except OSError:
            pass

    def remove(self) -> None:
        try:
            self.path.unlink(missing_ok=True)
        except OSError:
            pass
