"""How a run ended: ``loss.png``, ``summary.json`` and a few lines of text."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from csm_fast.report.metrics import read_metrics
from csm_fast.system.files import disk_error, write_file

log = logging.getLogger("csm_fast")


@dataclass(frozen=True)
class Ending:
    """Where a run stands when it ends.

    Attributes:
        steps, total_steps: done, and in all.
        best_val_loss, best_step: of the best validation.
        stopped_by: the signal that ended it before its last step.
    """

    steps: int
    total_steps: int
    best_val_loss: float | None
    best_step: int | None
    stopped_by: str | None


def summarize(run_dir: Path, ending: Ending, entropy: list[float], uniform: float) -> dict[str, Any]:
    """Write the plot and the summary of a run from its metrics file, say where everything is, and return it.

    Args:
        entropy: unigram entropy of each codebook, in nats.
        uniform: the loss of guessing evenly, in nats.

    Raises:
        InputError: the disk refuses the files.
    """
    rows = read_metrics(run_dir / "metrics.jsonl")
    validations = validated_rows(rows)
    first, last = (validations[0], validations[-1]) if validations else (None, None)
    summary: dict[str, Any] = {
        "steps": ending.steps,
        "total_steps": ending.total_steps,
        "complete": ending.steps >= ending.total_steps,
        "val_loss_first": first and first["val_loss"],
        "val_loss_last": last and last["val_loss"],
        "val_loss_best": ending.best_val_loss,
        "best_step": ending.best_step,
        "c0_val_loss_last": last and last["val_c0_loss"],
        "c0_unigram_entropy": entropy[0],
        "unigram_entropy": entropy,
        "eos_p_end": last and last["eos_p_end"],
        "false_eos_rate": last and last["false_eos_rate"],
        "uniform_loss": uniform,
        "best": str(run_dir / "best"),
        "last": str(run_dir / "last"),
        "metrics": str(run_dir / "metrics.jsonl"),
        "plot": str(run_dir / "loss.png"),
    }
    try:
        write_file(run_dir / "summary.json", json.dumps(summary, indent=1) + "\n")
        if len(rows) > 1:
            plot(rows, entropy, uniform, run_dir / "loss.png")
    except OSError as error:
        raise disk_error(error, run_dir, "the summary could not be written") from None
    for line in lines(summary, last, entropy):
        log.info("%s", line)
    if not summary["complete"]:
        log.info(
            "Stopped by %s at step %d of %d. The same command continues from %s.",
            ending.stopped_by,
            summary["steps"],
            summary["total_steps"],
            run_dir / "last",
        )
    return summary


def validated_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a metrics file that hold a whole validation."""
    wanted = ("val_loss", "val_c0_loss", "val_per_codebook", "eos_p_end", "false_eos_rate")
    return [row for row in rows if all(row.get(key) is not None for key in wanted)]


def lines(summary: dict[str, Any], last: dict[str, Any] | None, entropy: list[float]) -> list[str]:
    """The summary in words."""
    text = [""]
    if last:
        guess = f"guessing evenly, ln V per codebook, gives {summary['uniform_loss']:.3f}"
        if summary["best_step"]:
            text.append(
                f"val_loss {summary['val_loss_first']:.3f} -> {summary['val_loss_last']:.3f} "
                f"(best {summary['val_loss_best']:.3f} at step {summary['best_step']}; {guess})"
            )
        else:
            text.append(f"val_loss {summary['val_loss_first']:.3f} at the start, never measured again ({guess})")
        text += codebook_table(last["val_per_codebook"], entropy)
        text.append(
            f"probability of stopping at the true end {summary['eos_p_end']:.3f}, "
            f"false stops {100 * summary['false_eos_rate']:.2f} % of frames"
        )
    unknown = "" if summary["best_step"] else " (the newest: none was validated)"
    text.append(f"best checkpoint  {summary['best']}{unknown}")
    text.append(f"last checkpoint  {summary['last']}")
    text.append(f"metrics, plot    {summary['metrics']}, {summary['plot']}")
    return text


def codebook_table(losses: list[float], entropy: list[float], per_line: int = 8) -> list[str]:
    """Validation loss of each codebook above what its unigram distribution alone would give, in nats."""
    text = ["validation loss per codebook / unigram entropy of the training codes (nats)"]
    for first in range(0, len(losses), per_line):
        cells = [f"{a:5.2f}/{b:4.2f}" for a, b in list(zip(losses, entropy, strict=True))[first : first + per_line]]
        text.append(f"  {first:2d}..{min(first + per_line, len(losses)) - 1:2d}  " + "  ".join(cells))
    return text


def plot(rows: list[dict[str, Any]], entropy: list[float], uniform: float, path: Path) -> None:
    """Training and validation loss over steps, and the validation loss of each codebook at the end."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    trained = [r for r in rows if r.get("train_loss") is not None]
    validated = validated_rows(rows)
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    if trained:
        steps = [r["step"] for r in trained]
        left.plot(steps, [r["train_loss"] for r in trained], color="#1f77b4", label="train loss")
        left.plot(steps, [r["c0_loss"] for r in trained], color="#1f77b4", alpha=0.35, lw=1, label="train, codebook 0")
    if validated:
        steps = [r["step"] for r in validated]
        left.plot(steps, [r["val_loss"] for r in validated], "o-", ms=3, color="#d62728", label="validation loss")
        left.plot(
            steps,
            [r["val_c0_loss"] for r in validated],
            "o-",
            ms=2,
            lw=1,
            color="#ff9896",
            label="validation, codebook 0",
        )
        k = range(len(entropy))
        right.plot(k, validated[0]["val_per_codebook"], color="0.6", lw=1, label=f"step {validated[0]['step']}")
        right.plot(k, validated[-1]["val_per_codebook"], color="#d62728", label=f"step {validated[-1]['step']}")
    right.plot(range(len(entropy)), entropy, "--", color="0.3", lw=1, label="unigram entropy")
    left.axhline(entropy[0], ls="--", lw=1, color="0.3", label="unigram entropy of codebook 0")
    left.axhline(uniform, ls=":", lw=1, color="0.6", label="guessing evenly")
    left.set(xlabel="optimizer step", ylabel="nats", title="Loss")
    right.set(xlabel="codebook", ylabel="nats", title="Validation loss per codebook")
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8, frameon=False)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, dpi=120, format="png")
    temporary.replace(path)
