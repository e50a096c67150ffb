"""``csm-fast plan``: what fits on which GPU, and how long it takes, before anything is loaded."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator

from csm_fast.config.commands import PlanConfig
from csm_fast.config.parse import list_settings
from csm_fast.config.shape import NAMED_SHAPES
from csm_fast.config.train import TrainConfig
from csm_fast.planner.estimate import AUDIO_SHARE, RESERVE, Estimate
from csm_fast.planner.fit import FEWEST_ROWS, MOST_ROWS
from csm_fast.planner.gpus import GPU, find_gpu, known_gpu
from csm_fast.planner.speed import BANDWIDTH_SHARE, COMPUTE_SHARE
from csm_fast.planner.variants import PlannedRun, StoreCounts, list_variants, plan_variant
from csm_fast.system.memory import GIB, available_bytes
from csm_fast.weights.shape import model_shape

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


def run(config: PlanConfig) -> int:
    """Print the plan. Returns the exit status, 1 where nothing fits.

    Raises:
        InputError: an unknown card, model or store.
    """
    gpu, device = choose_target(config)
    shape = model_shape(config.model)
    store = read_store(config.data) if config.data else None
    variants = list_variants(config, gpu)
    rows = [plan_variant(name, settings, config, shape, gpu, device, store) for name, settings in variants]
    print("\n".join(format_report(rows, config, gpu, device, store)))
    return 0 if any(row.fits for row in rows) else 1


def choose_target(config: PlanConfig) -> tuple[GPU, str]:
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


def read_store(data: str) -> StoreCounts:
    """Counts of the training split; its manifest and headers are read, nothing else."""
    from csm_fast.data.token_store import open_split

    store = open_split(data, "train")
    audio = store.num_frames + store.num_turns  # and an end-of-speech row per turn
    return StoreCounts(audio + store.num_text_tokens, audio / (audio + store.num_text_tokens))


def format_report(
    rows: list[PlannedRun], config: PlanConfig, gpu: GPU, device: str, store: StoreCounts | None
) -> Iterator[str]:
    """The lines of the plan, at most 80 columns but for the last, the command."""
    share = store.audio_share if store else AUDIO_SHARE
    base, part = RESERVE[device]
    yield f"{config.model} on {gpu.name}: {gpu.gib:.1f} GiB"
    known = "of the data" if store else "assumed; --data tells"
    seen = _format_fraction(config.training.loss.amortization_fraction)
    yield f"audio rows {share:.0%} ({known}), the depth decoder sees {seen} of them"
    yield f"GiB at the peak of a step; reserve: {base / GIB:.1f} GiB and {part:.0%} for what is no tensor"
    if gpu.fp16_only:
        yield "this card multiplies no bf16: fp16 with loss scaling"
    yield ""
    heads = ("weight", "adapt", "grad", "optim", "activ", "work", "reserv", "total")
    yield f"{'method':16}{'rows':>7}" + "".join(f"{head:>7}" for head in heads)
    for row in rows:
        sizes = group_components(row.estimate)
        cells = "".join(f"{size / GIB:7.2f}" for size in (*sizes.values(), row.estimate.needed))
        yield f"{row.name:16}{row.rows:7,}{cells}"
    yield ""
    yield from draw_chart(rows, gpu)
    yield ""
    yield f"{'method':16}{'fits':>5}  {'checkpointing':14}{'largest pack':>13}{'rows/s':>9}{'epoch':>10}"
    for row in rows:
        speed = f"{row.rows_per_s:9,.0f}" if row.rows_per_s else f"{'-':>9}"
        epoch = format_duration(store.rows / row.rows_per_s) if store and row.rows_per_s else "-"
        largest = f"{row.largest:,}" + "+" * (row.largest == MOST_ROWS) if row.largest else "none"
        checkpointing = row.config.model.activation_checkpointing
        yield f"{row.name:16}{'yes' if row.fits else 'no':>5}  {checkpointing:14}{largest:>13}{speed}{epoch:>10}"
    yield ""
    if any(row.rows_per_s for row in rows):
        yield f"rows/s: a model, not a measurement: {COMPUTE_SHARE:.0%} of {gpu.tflops:g} TFLOP/s and"
        yield f"{BANDWIDTH_SHARE:.0%} of {gpu.gb_per_s:g} GB/s, a pack per update, time for loading not counted."
    elif device == "cuda":
        yield "rows/s: for a card given by name, such as --gpu rtx-4090."
    yield from recommend(rows)


def group_components(estimate: Estimate) -> dict[str, int]:
    """Components as the table has them: autocast's copies are counted with the activations."""
    sizes = {name: estimate.components.get(name, 0) for name in _LETTERS}
    sizes["activations"] += estimate.components["copies"]
    sizes["reserve"] = estimate.reserve
    return sizes


def format_duration(seconds: float) -> str:
    """Such as 40 s, 25 min, 3.2 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _format_fraction(share: float) -> str:
    return f"1/{1 / share:.0f}" if abs(1 / share - round(1 / share)) < 1e-6 else f"{share:.0%}"


def draw_chart(rows: list[PlannedRun], gpu: GPU) -> Iterator[str]:
    """A bar per method, a letter per component; ``|`` is where the memory ends."""
    label, width = 16, WIDTH - 16 - 9
    most = max([row.estimate.needed for row in rows] + [gpu.bytes])
    edge = round(gpu.bytes / most * (width - 1))
    for row in rows:
        bar, filled, done = "", 0, 0
        for name, size in group_components(row.estimate).items():
            done += size
            cells = round(done / most * (width - 1)) - filled
            bar, filled = bar + _LETTERS[name] * cells, filled + cells
        bar = bar.ljust(width)
        yield f"{row.name:{label}}{bar[:edge]}|{bar[edge:-1]}{row.estimate.needed / GIB:6.1f}"
    yield " " * label + "  ".join(f"{letter} {name}" for name, letter in _LETTERS.items() if letter in "WAGO")
    yield " " * label + "  ".join(f"{letter} {name}" for name, letter in _LETTERS.items() if letter not in "WAGO")


def recommend(rows: list[PlannedRun]) -> Iterator[str]:
    """The command for the first way that fits."""
    best = next((row for row in rows if row.fits), None)
    if best is None:
        least = min(rows, key=lambda row: row.estimate.needed)
        yield f"Nothing fits; {least.name} comes nearest, at {least.estimate.needed / GIB:.1f} GiB."
        if least.largest >= FEWEST_ROWS:
            yield f"It fits with --rows {least.largest}."
        return
    yield f"Type ({best.name}):"
    yield "csm-fast-train " + " ".join(list_flags(best.config))


def list_flags(config: TrainConfig) -> Iterator[str]:
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
