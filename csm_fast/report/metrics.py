"""The metrics of a run: ``metrics.jsonl``, one JSON object per line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from csm_fast.system.files import write_file, writing_to

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


class MetricsFile:
    """``metrics.jsonl`` of a run. Other trackers take the same ``log(step, values)``.

    Raises:
        InputError: ``log``, where the disk refuses the row.
    """

    def __init__(self, path: Path):
        self.path = path

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Append a row: the columns ``METRICS`` first, null where ``values`` has none, then what it has besides."""
        row = {**dict.fromkeys(METRICS), "step": step, **values}
        with writing_to(self.path.parent, "metrics.jsonl could not be written"):
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(metrics_line(row))

    def keep_until(self, step: int) -> None:
        """Drop the rows after ``step``: a run that continues from there writes them again.

        Raises:
            InputError: the disk refuses the file.
        """
        rows = [row for row in read_metrics(self.path) if row["step"] <= step]
        with writing_to(self.path.parent, "the run could not be started"):
            write_file(self.path, "".join(map(metrics_line, rows)))


def validation_line(step: int, v: dict[str, Any]) -> str:
    """A validation as the log shows it."""
    return (
        f"step {step}: val_loss {v['val_loss']:.4f}  c0 {v['val_c0_loss']:.3f}  decoder {v['val_decoder_loss']:.3f}  "
        f"P(EOS at the end) {v['eos_p_end']:.3f}  false EOS {100 * v['false_eos_rate']:.2f} %"
    )
