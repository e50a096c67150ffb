"""``csm-fast plan``: what fits on which GPU, and how long it takes, before anything is loaded.

Memory is ``memory.estimate``'s. Speed is a model and no measurement: the floating-point operations of a step over a
fixed share of the card's peak, and the bytes that the update and unpacking 4-bit weights move over a share of its
bandwidth. Attention's own products are left out: they are few at the lengths of speech.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from csm_fast.config.commands import PlanConfig
from csm_fast.config.parse import list_settings
from csm_fast.config.shape import NAMED_SHAPES, CSMConfig
from csm_fast.config.train import TrainConfig
from csm_fast.planner import fit as memory
from csm_fast.planner.estimate import AUDIO_SHARE, RESERVE, Estimate, estimate
from csm_fast.planner.gpus import GPU, find_gpu, known_gpu
from csm_fast.planner.speed import BANDWIDTH_SHARE, COMPUTE_SHARE, rows_per_second
from csm_fast.system.errors import InputError
from csm_fast.system.memory import GIB, available_bytes
from csm_fast.weights.shape import model_shape

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
WIDTH = 80
_LETTERS = {
    "weights": "W",
    "adapters": "A",
    "gradients": "G",
    "optimizer": "O",
    "activations": "a",
    "workspace": "w",
    "reserve": "r",
}


@dataclass(frozen=True)
class Store:
    """What a token store tells: rows of its training split, and which share of them is audio."""

    rows: int
    audio_share: float


@dataclass(frozen=True)
class Row:
    """One way to train, planned.

    Attributes:
        config: with everything decided.
        rows: of the pack that the estimate is for.
        largest: the largest pack that fits with this checkpointing; 0: none.
        rows_per_s: by the model; None where the card's rates are not known.
    """

    name: str
    config: TrainConfig
    rows: int
    estimate: Estimate
    fits: bool
    largest: int
    rows_per_s: float | None


def plan(config: PlanConfig) -> int:
    """Print the plan; returns the exit status, 1 where nothing fits.

    Raises:
        InputError: an unknown card, model or store.
    """
    gpu, device = target(config)
    shape = model_shape(config.model)
    store = read_store(config.data) if config.data else None
    rows = [planned(name, settings, config, shape, gpu, device, store) for name, settings in variants(config, gpu)]
    print("\n".join(report(rows, config, gpu, device, store)))
    return 0 if any(row.fits for row in rows) else 1


# ------------------------------------------------------------------------------------------------ what was asked for


def target(config: PlanConfig) -> tuple[GPU, str]:
    """The card (or machine) to plan for, and "cuda" or "cpu"; ``--memory-limit`` lowers what it has."""
    if config.gpu is not None:
        gpu, device = find_gpu(config.gpu), "cuda"
    else:
        from csm_fast.system.device import processor, resolve_device

        found = resolve_device(config.training.run.device)
        device = found.type
        if device == "cuda":
            import torch

            name = torch.cuda.get_device_name(found)
            gpu = known_gpu(name) or GPU(name, 0, capability=torch.cuda.get_device_capability(found))
        else:
            gpu = GPU(processor(), 0)
        gpu = dataclasses.replace(gpu, gib=available_bytes(found) / GIB)
    if config.training.run.memory_limit is not None:
        gpu = dataclasses.replace(gpu, gib=available_bytes(device, config.training.run.memory_limit) / GIB)
    return gpu, device


def read_store(data: str) -> Store:
    """Counts of the training split; its manifest and headers are read, nothing else."""
    from csm_fast.data.token_store import open_split

    store = open_split(data, "train")
    audio = store.num_frames + store.num_turns  # and an end-of-speech row per turn
    return Store(audio + store.num_text_tokens, audio / (audio + store.num_text_tokens))


def variants(config: PlanConfig, gpu: GPU) -> Iterator[tuple[str, dict[str, Any]]]:
    """The ways to train that were asked about: by name, and their settings."""
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
                continue  # weights in bf16 are no use to it
            yield name, {"optimizer": "adamw", "weights": "fp32", **settings}
        else:
            yield name, {**settings, "optimizer": section.optimizer, "weights": "fp32"}


def training_config(config: PlanConfig, **settings: Any) -> TrainConfig:
    """The run's configuration that a plan's settings, and those decided, amount to."""
    asked: dict[str, Any] = {"model": config.model}
    if config.data is not None:
        asked["data"] = config.data
    if config.method != "all":
        asked["method"] = config.method
    return memory.change_settings(config.training, **{**asked, **settings})


# ------------------------------------------------------------------------------------------------------ one way to go


def planned(
    name: str,
    settings: dict[str, Any],
    config: PlanConfig,
    shape: CSMConfig,
    gpu: GPU,
    device: str,
    store: Store | None,
) -> Row:
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
    choices = memory.CHECKPOINTING if asked == "auto" else (asked,)
    for choice in choices:
        settings = {**settings, "activation_checkpointing": choice, "pack_rows": rows}
        run = training_config(config, **settings)
        found = estimate(shape, run, rows=rows, **load)
        if found.needed <= gpu.bytes:
            break
    largest = memory.largest_rows(shape, run, gpu.bytes, **load)
    if found.needed > gpu.bytes and config.pack_rows is None and largest >= memory.FEWEST_ROWS:
        rows = largest
        run = training_config(config, **{**settings, "pack_rows": rows})
        found = estimate(shape, run, rows=rows, **load)
    fits = found.needed <= gpu.bytes
    speed = rows_per_second(shape, run, gpu, rows, share, found.trained) if fits and device == "cuda" else None
    return Row(name, run, rows, found, fits, largest, speed)


# ------------------------------------------------------------------------------------------------------------ report


def report(rows: list[Row], config: PlanConfig, gpu: GPU, device: str, store: Store | None) -> Iterator[str]:
    """The lines of the plan, at most 80 columns but for the last, the command."""
    share = store.audio_share if store else AUDIO_SHARE
    base, part = RESERVE[device]
    yield f"{config.model} on {gpu.name}: {gpu.gib:.1f} GiB"
    known = "of the data" if store else "assumed; --data tells"
    seen = _fraction(config.training.loss.amortization_fraction)
    yield f"audio rows {share:.0%} ({known}), the depth decoder sees {seen} of them"
    yield f"GiB at the peak of a step; reserve: {base / GIB:.1f} GiB and {part:.0%} for what is no tensor"
    if gpu.fp16_only:
        yield "this card multiplies no bf16: fp16 with loss scaling"
    yield ""
    heads = ("weight", "adapt", "grad", "optim", "activ", "work", "reserv", "total")
    yield f"{'method':16}{'rows':>7}" + "".join(f"{head:>7}" for head in heads)
    for row in rows:
        sizes = shown(row.estimate)
        cells = "".join(f"{size / GIB:7.2f}" for size in (*sizes.values(), row.estimate.needed))
        yield f"{row.name:16}{row.rows:7,}{cells}"
    yield ""
    yield from chart(rows, gpu)
    yield ""
    yield f"{'method':16}{'fits':>5}  {'checkpointing':14}{'largest pack':>13}{'rows/s':>9}{'epoch':>10}"
    for row in rows:
        speed = f"{row.rows_per_s:9,.0f}" if row.rows_per_s else f"{'-':>9}"
        epoch = duration(store.rows / row.rows_per_s) if store and row.rows_per_s else "-"
        largest = f"{row.largest:,}" + "+" * (row.largest == memory.MOST_ROWS) if row.largest else "none"
        checkpointing = row.config.model.activation_checkpointing
        yield f"{row.name:16}{'yes' if row.fits else 'no':>5}  {checkpointing:14}{largest:>13}{speed}{epoch:>10}"
    yield ""
    if any(row.rows_per_s for row in rows):
        yield f"rows/s: a model, not a measurement: {COMPUTE_SHARE:.0%} of {gpu.tflops:g} TFLOP/s and"
        yield f"{BANDWIDTH_SHARE:.0%} of {gpu.gb_per_s:g} GB/s, a pack per update, time for loading not counted."
    elif device == "cuda":
        yield "rows/s: for a card given by name, such as --gpu rtx-4090."
    yield from recommended(rows)


def shown(estimate: Estimate) -> dict[str, int]:
    """Components as the table has them: autocast's copies are counted with the activations."""
    sizes = {name: estimate.components.get(name, 0) for name in _LETTERS}
    sizes["activations"] += estimate.components["copies"]
    sizes["reserve"] = estimate.reserve
    return sizes


def duration(seconds: float) -> str:
    """Such as 40 s, 25 min, 3.2 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _fraction(share: float) -> str:
    return f"1/{1 / share:.0f}" if abs(1 / share - round(1 / share)) < 1e-6 else f"{share:.0%}"


def chart(rows: list[Row], gpu: GPU) -> Iterator[str]:
    """A bar per method, a letter per component; ``|`` is where the memory ends."""
    label, width = 16, WIDTH - 16 - 9
    most = max([row.estimate.needed for row in rows] + [gpu.bytes])
    edge = round(gpu.bytes / most * (width - 1))
    for row in rows:
        bar, filled, done = "", 0, 0
        for name, size in shown(row.estimate).items():
            done += size
            cells = round(done / most * (width - 1)) - filled
            bar, filled = bar + _LETTERS[name] * cells, filled + cells
        bar = bar.ljust(width)
        yield f"{row.name:{label}}{bar[:edge]}|{bar[edge:-1]}{row.estimate.needed / GIB:6.1f}"
    yield " " * label + "  ".join(f"{letter} {name}" for name, letter in _LETTERS.items() if letter in "WAGO")
    yield " " * label + "  ".join(f"{letter} {name}" for name, letter in _LETTERS.items() if letter not in "WAGO")


def recommended(rows: list[Row]) -> Iterator[str]:
    """The command for the first way that fits."""
    best = next((row for row in rows if row.fits), None)
    if best is None:
        least = min(rows, key=lambda row: row.estimate.needed)
        yield f"Nothing fits; {least.name} comes nearest, at {least.estimate.needed / GIB:.1f} GiB."
        if least.largest >= memory.FEWEST_ROWS:
            yield f"It fits with --rows {least.largest}."
        return
    yield f"Type ({best.name}):"
    yield "csm-fast-train " + " ".join(command_flags(best.config))


def command_flags(config: TrainConfig) -> Iterator[str]:
    """What differs from the defaults, as flags. A shape's name stands for the published model of that shape."""
    for section, field, hint in list_settings(TrainConfig):
        value = getattr(getattr(config, section) if section else config, field.name)
        default = field.default
        if callable(field.default_factory):
            default = field.default_factory()
        flag = "--" + field.name.replace("_", "-")
        if field.name == "model" and value == "csm-1b":
            continue
        if field.name == "from_scratch":
            value = value or config.model.model in NAMED_SHAPES.keys() - {"csm-1b"}
        if value == default or value is None:
            continue
        if hint is bool:
            yield flag if value else "--no-" + flag[2:]
        elif isinstance(value, list):
            yield " ".join([flag, *map(shlex.quote, map(str, value))])
        else:
            yield f"{flag} {shlex.quote(str(value))}"
