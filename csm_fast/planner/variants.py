"""The ways to train that ``csm-fast plan`` compares: what each would take, and its checkpointing and pack size.

Speed is a model, not a measurement (``speed.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from csm_fast.config.commands import PlanConfig
from csm_fast.config.shape import CSMConfig
from csm_fast.config.train import TrainConfig
from csm_fast.planner.estimate import AUDIO_SHARE, Estimate, estimate
from csm_fast.planner.fit import CHECKPOINTING, FEWEST_ROWS, change_settings, largest_rows
from csm_fast.planner.gpus import GPU
from csm_fast.planner.speed import rows_per_second
from csm_fast.system.errors import InputError

PACK_ROWS = 4096  # the trainer's default
# The ways to train, the one that changes least about the training first; the last is the smallest.
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "full 8-bit": {"method": "full", "optimizer": "adamw-8bit"},
    "full bf16 8-bit": {"method": "full", "optimizer": "adamw-8bit", "weights": "bf16-stochastic"},
    "dora": {"method": "dora"},
    "lora": {"method": "lora"},
    "qlora": {"method": "qlora"},
}


@dataclass(frozen=True)
class StoreCounts:
    """The rows of a store's training split, and the share of them that is audio."""

    rows: int
    audio_share: float


@dataclass(frozen=True)
class PlannedRun:
    """One way to train, planned.

    Attributes:
        config: with everything decided.
        rows: of the pack that the estimate is for.
        largest: the largest pack that fits with this checkpointing; 0: none.
        rows_per_s: predicted; None where the card's rates are not known.
    """

    name: str
    config: TrainConfig
    rows: int
    estimate: Estimate
    fits: bool
    largest: int
    rows_per_s: float | None


def list_variants(config: PlanConfig, gpu: GPU) -> Iterator[tuple[str, dict[str, Any]]]:
    """The name and the settings of each way to train that the plan is asked about.

    Raises:
        InputError: bf16 weights on a card that cannot multiply bf16.
    """
    method, section = config.method, config.training.optimizer
    given = (section.optimizer, section.weights) != ("adamw", "fp32")
    if gpu.fp16_only and section.weights != "fp32":
        raise InputError(
            f"{gpu.name} multiplies no bf16, --weights {section.weights} are bf16", mend="leave --weights out"
        )
    for name, settings in VARIANTS.items():
        kind = settings["method"]
        if method not in ("all", kind):
            continue
        if kind == "full" and given:  # the optimizer that was asked for, and no other
            if name == "full":
                yield name, {"method": "full", "optimizer": section.optimizer, "weights": section.weights}
        elif kind == "full":
            if gpu.fp16_only and "weights" in settings:
                continue  # it cannot multiply bf16
            yield name, {"optimizer": "adamw", "weights": "fp32", **settings}
        else:
            yield name, {**settings, "optimizer": section.optimizer, "weights": "fp32"}


def build_training_config(config: PlanConfig, **settings: Any) -> TrainConfig:
    """The configuration of a training run: the plan's own settings, and ``settings`` over them."""
    asked: dict[str, Any] = {"model": config.model}
    if config.data is not None:
        asked["data"] = config.data
    if config.method != "all":
        asked["method"] = config.method
    return change_settings(config.training, **{**asked, **settings})


def plan_variant(
    name: str,
    settings: dict[str, Any],
    config: PlanConfig,
    shape: CSMConfig,
    gpu: GPU,
    device: str,
    store: StoreCounts | None,
) -> PlannedRun:
    """Decide checkpointing and pack size of one way to train."""
    asked = config.activation_checkpointing
    precision = config.training.model.precision
    if precision == "auto" and gpu.fp16_only:
        precision = settings["precision"] = "fp16"
    share = store.audio_share if store else AUDIO_SHARE
    load: dict[str, Any] = {"device": device, "audio_share": share}
    if precision == "auto" and device == "cpu":
        from csm_fast.system.device import resolve_device, resolve_precision

        load["precision"] = resolve_precision(precision, resolve_device("cpu"))
    rows = config.pack_rows or PACK_ROWS
    if (batch_rows := config.training.data.batch_rows) is not None:
        load["packs"] = -(-batch_rows // rows)
    choices = CHECKPOINTING if asked == "auto" else (asked,)
    for choice in choices:
        settings = {**settings, "activation_checkpointing": choice, "pack_rows": rows}
        run = build_training_config(config, **settings)
        found = estimate(shape, run, rows=rows, **load)
        if found.needed <= gpu.bytes:
            break
    largest = largest_rows(shape, run, gpu.bytes, **load)
    if found.needed > gpu.bytes and config.pack_rows is None and largest >= FEWEST_ROWS:
        rows = largest
        run = build_training_config(config, **{**settings, "pack_rows": rows})
        found = estimate(shape, run, rows=rows, **load)
    fits = found.needed <= gpu.bytes
    speed = rows_per_second(shape, run, gpu, rows, share, found.trained) if fits and device == "cuda" else None
    return PlannedRun(name, run, rows, found, fits, largest, speed)
