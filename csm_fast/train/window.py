"""The mean of the last steps, kept on the device until it is logged."""

from __future__ import annotations

import math
import time

import torch

from csm_fast.config.shape import FRAME_SECONDS
from csm_fast.packing.layout import StepBatch
from csm_fast.train.step import StepResult


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

    def add(self, step: int, result: StepResult, batch: StepBatch) -> None:
        bad = result.bad
        # A skipped step must not poison the means.
        self.loss += torch.where(bad, 0.0, result.loss.double())
        self.per_codebook += torch.where(bad, 0.0, result.per_codebook.double())
        self.norm += torch.where(bad, 0.0, result.grad_norm.double())
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
            "audio_s_per_s": self.frames * FRAME_SECONDS / seconds,
            "padding": 1 - self.rows / max(1, self.padded),
        }
        self._reset()
        return result

    def take_skipped(self) -> tuple[int, int, int]:
        """(skipped updates, step of the first) since last asked, and how many in a row up to now, since ever."""
        count, first, streak = int(self.bad_count), int(self.first_bad), int(self.bad_streak)
        self.bad_count.zero_()
        self.first_bad.fill_(-1)
        return count, first, streak
