"""What a run measures about itself: the window between two log lines, and the metrics file."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch

from csm_fast.packing.layout import StepBatch
from csm_fast.train.step import Outcome

# The columns of metrics.jsonl; a validation adds its own.
METRICS = (
    "step",
    "epoch",
    "train_loss",
    "val_loss",
    "c0_loss",
    "decoder_loss",
    "lr",
    "grad_norm",
    "rows_per_s",
    "audio_s_per_s",
    "padding",
    "memory_gib",
)


class Window:
    """Sums between two log lines, kept on the device."""

    def __init__(self, num_codebooks: int, device: torch.device):
        self.device, self.num_codebooks = device, num_codebooks
        self.bad_count = torch.zeros((), dtype=torch.long, device=device)
        self.first_bad = torch.full((), -1, dtype=torch.long, device=device)
        self.bad_streak = torch.zeros((), dtype=torch.long, device=device)
        self._reset()

    def _reset(self) -> None:
        self.loss = torch.zeros((), dtype=torch.float64, device=self.device)
        self.per_codebook = torch.zeros(self.num_codebooks, dtype=torch.float64, device=self.device)
        self.norm = torch.zeros((), dtype=torch.float64, device=self.device)
        self.good = torch.zeros((), dtype=torch.long, device=self.device)
        self.rows = self.padded = self.frames = 0
        self.started, self.paused = time.monotonic(), 0.0

    def add(self, step: int, outcome: Outcome, batch: StepBatch) -> None:
        bad = outcome.bad
        # A skipped step must not poison the means.
        self.loss += torch.where(bad, 0.0, outcome.loss.double())
        self.per_codebook += torch.where(bad, 0.0, outcome.per_codebook.double())
        self.norm += torch.where(bad, 0.0, outcome.grad_norm.double())
        if batch.supervised:
            self.good += ~bad
        self.first_bad = torch.where(bad & (self.first_bad < 0), step, self.first_bad)
        self.bad_count += bad
        self.bad_streak = torch.where(bad, self.bad_streak + 1, 0)
        self.rows += batch.rows
        self.padded += batch.padded_rows
        self.frames += batch.frames

    def pause(self, seconds: float) -> None:
        """Time that is not training (validation, saving) does not count in the rates."""
        self.paused += seconds

    def read(self) -> dict[str, float]:
        # Where every step was skipped there is no loss to tell.
        count = int(self.good) or math.nan
        per_codebook = (self.per_codebook / count).tolist()
        seconds = max(1e-9, time.monotonic() - self.started - self.paused)
        result = {
            "train_loss": float(self.loss) / count,
            "c0_loss": per_codebook[0],
            "decoder_loss": sum(per_codebook[1:]) / max(1, len(per_codebook) - 1),
            "grad_norm": float(self.norm) / count,
            "rows_per_s": self.rows / seconds,
            "audio_s_per_s": self.frames * 0.08 / seconds,
            "padding": 1 - self.rows / max(1, self.padded),
        }
        self._reset()
        return result

    def take_bad(self) -> tuple[int, int, int]:
        """(skipped updates, step of the first) since last asked, and how many in a row up to now, since ever."""
        count, first, streak = int(self.bad_count), int(self.first_bad), int(self.bad_streak)
        self.bad_count.zero_()
        self.first_bad.fill_(-1)
        return count, first, streak


def metrics_line(row: dict[str, Any]) -> str:
    """A row of the metrics file. JSON has no NaN: what is not finite is null."""

    def finite(value: Any) -> Any:
        if isinstance(value, list):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps({key: finite(value) for key, value in row.items()}) + "\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line cut off by a crash is dropped."""
    rows = []
    try:
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
                rows += [row] if isinstance(row, dict) and isinstance(row.get("step"), int) else []
            except ValueError:
                continue
    except OSError:
        return []
    return rows


def validation_line(step: int, v: dict[str, Any]) -> str:
    return (
        f"step {step}: val_loss {v['val_loss']:.4f}  c0 {v['val_c0_loss']:.3f}  decoder {v['val_decoder_loss']:.3f}  "
        f"P(EOS at the end) {v['eos_p_end']:.3f}  false EOS {100 * v['false_eos_rate']:.2f} %"
    )
