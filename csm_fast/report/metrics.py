"""What a run measures about itself: the window between two log lines, and the metrics file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

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


def validation_line(step: int, v: dict[str, Any]) -> str:
    return (
        f"step {step}: val_loss {v['val_loss']:.4f}  c0 {v['val_c0_loss']:.3f}  decoder {v['val_decoder_loss']:.3f}  "
        f"P(EOS at the end) {v['eos_p_end']:.3f}  false EOS {100 * v['false_eos_rate']:.2f} %"
    )
