"""Whether a training run fits a device, and the smallest change with which it does, before anything is loaded.

The peak of a step comes from ``estimate``, which walks through it (``step``, ``layer``) with every tensor of the model
(``tensors``).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

from csm_fast.config.shape import CSMConfig
from csm_fast.config.train import TrainConfig
from csm_fast.packing.fit import padded_rows
from csm_fast.planner.estimate import Estimate, estimate
from csm_fast.system.errors import InputError
from csm_fast.system.memory import GIB, available_bytes

CHECKPOINTING = ("off", "selective", "full")  # the fastest first
FEWEST_ROWS, MOST_ROWS = 512, 65_536  # pack sizes that are worth naming


def largest_rows(shape: CSMConfig, config: TrainConfig, available: int, *, most: int = MOST_ROWS, **load: Any) -> int:
    """The largest pack, in rows (a multiple of 64, at most ``most``), with which a step fits; 0 where none does.

    ``load``: further arguments of ``estimate``.
    """

    def fits(rows: int) -> bool:
        return estimate(shape, config, rows=rows, **load).needed <= available

    low, high = 0, most // 64
    while low < high:
        middle = (low + high + 1) // 2
        if fits(64 * middle):
            low = middle
        else:
            high = middle - 1
    return 64 * low


def change_settings(config: TrainConfig, **settings: Any) -> TrainConfig:
    """A copy with some settings of its sections replaced, by name."""
    config = copy.deepcopy(config)
    for name, value in settings.items():
        owner = next(s for s in vars(config).values() if hasattr(s, name))
        setattr(owner, name, value)
    return config


def _flags(settings: dict[str, Any]) -> str:
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in settings.items())


def _savings(config: TrainConfig, precision: str | None = None) -> Iterator[dict[str, Any]]:
    """Settings that save memory, the smallest change first; each includes those before it. With products in fp16,
    weights in bf16 are not among them."""
    yield {}
    section = config.optimizer
    settings: dict[str, Any] = {}
    if config.adapter.method == "full":
        if section.optimizer == "adamw":
            settings = {**settings, "optimizer": "adamw-8bit"}
            yield settings
        if section.weights in ("fp32", "bf16-kahan") and "fp16" not in (config.model.precision, precision):
            settings = {**settings, "weights": "bf16-stochastic"}
            yield settings
    if config.adapter.method != "qlora":
        # Adapters are trained in float32 by the ordinary optimizer.
        yield {"method": "qlora"} | ({"weights": "fp32"} if section.weights != "fp32" else {})


def _tighter(config: TrainConfig) -> list[str]:
    """Checkpointing as it is, and what saves more."""
    return list(CHECKPOINTING[CHECKPOINTING.index(config.model.activation_checkpointing) :])


def smallest_change(
    config: TrainConfig, shape: CSMConfig, available: int, *, rows: int, **load: Any
) -> tuple[dict[str, Any], Estimate] | None:
    """The fewest and smallest settings with which the run fits, and the estimate then; None if nothing fits.

    Tried in this order: checkpointing selective, full, smaller packs, 8-bit moments, bf16 weights, qlora; each with
    those before it.
    """
    for savings in _savings(config, load.get("precision")):
        for choice in _tighter(config):
            settings = {**savings}
            if choice != config.model.activation_checkpointing:
                settings["activation_checkpointing"] = choice
            found = estimate(shape, change_settings(config, **settings), rows=rows, **load)
            if found.needed <= available:
                return settings, found
        # One pack becomes several, and the gradients of the first exist while the others run.
        several = {**load, "packs": max(2, load.get("packs", 1))}
        fewer = largest_rows(shape, change_settings(config, **settings), available, most=rows, **several)
        if fewer >= FEWEST_ROWS:
            settings["pack_rows"] = fewer
            return settings, estimate(shape, change_settings(config, **settings), rows=fewer, **several)
    return None


def check_memory(
    config: TrainConfig, shape: CSMConfig, device: Any, *, rows: int | None = None, **load: Any
) -> Estimate:
    """Refuse a run that cannot fit, before anything is loaded.

    Args:
        device: a ``torch.device``, or its name.
        rows: of the largest pack; by default ``config.data.pack_rows``.
        load: further arguments of ``estimate``: targets, decoder_frames, audio_share, compiled, precision, packs.

    Returns:
        The estimate of a run that fits.

    Raises:
        InputError: the run needs more than ``config.run.memory_limit``, or than the device has. It names the smallest
            change that fits.
    """
    available = available_bytes(device, config.run.memory_limit)
    kind, rows = str(device).split(":")[0], _pack_size(config, device, rows)
    found = estimate(shape, config, rows=rows, device=kind, **load)
    if found.needed <= available:
        return found
    what = (
        f"a step of {rows:,} rows takes about {found.needed / GIB:.1f} GiB, most in {found.moment}; "
        f"{device} may have {available / GIB:.1f} GiB"
    )
    better = smallest_change(config, shape, available, rows=rows, device=kind, **load)
    if better is None:
        raise InputError(what, mend="take a larger device; csm-fast plan shows where the memory goes")
    settings, then = better
    raise InputError(what, mend=f"use {_flags(settings)} (about {then.needed / GIB:.1f} GiB), or see csm-fast plan")


def choose_checkpointing(
    config: TrainConfig, shape: CSMConfig, device: Any, *, rows: int | None = None, **load: Any
) -> str:
    """The fastest of "off", "selective" and "full" with which the run fits; arguments as ``check_memory``'s.

    Raises:
        InputError: none of them fits.
    """
    available = available_bytes(device, config.run.memory_limit)
    kind, size = str(device).split(":")[0], _pack_size(config, device, rows)
    for choice in CHECKPOINTING:
        tried = change_settings(config, activation_checkpointing=choice)
        if estimate(shape, tried, rows=size, device=kind, **load).needed <= available:
            return choice
    check_memory(change_settings(config, activation_checkpointing="full"), shape, device, rows=rows, **load)
    raise AssertionError("check_memory refuses what does not fit")


def _pack_size(config: TrainConfig, device: Any, rows: int | None) -> int:
    """Rows with the device's padding."""
    most = config.data.pack_rows
    return padded_rows(min(rows or most, most), most, str(device).split(":")[0])


def suggest_changes(config: TrainConfig, shape: CSMConfig | None = None) -> str:
    """Suggestions after a real out-of-memory error, as flags, the smallest change first: those with which the run can
    be continued, then those that need a new run.

    Args:
        shape: with it, each change says how much memory a step would then take on the run's kind of device.
    """
    kind = "cpu" if config.run.device.startswith("cpu") else "cuda"
    tried: list[dict[str, Any]] = [{"activation_checkpointing": choice} for choice in _tighter(config)[1:]]
    last = tried[-1] if tried else {}
    if config.data.pack_rows > FEWEST_ROWS:
        fewer = max(FEWEST_ROWS, 2 ** math.floor(math.log2(config.data.pack_rows - 1)))
        tried.append({"pack_rows": fewer})
    # With batch_rows the packs are part of the order, so a run cannot continue with other packs.
    continues = len(tried) - (config.data.pack_rows > FEWEST_ROWS and config.data.batch_rows is not None)
    tried += [savings for savings in _savings(config) if savings]
    if not tried:
        return "use a device with more memory; csm-fast plan shows where it goes"

    def said(settings: dict[str, Any]) -> str:
        if shape is None:
            return _flags(settings)
        with_last = change_settings(
            config, **{**last, **settings} if "activation_checkpointing" not in settings else settings
        )
        found = estimate(shape, with_last, rows=with_last.data.pack_rows, device=kind)
        return f"{_flags(settings)} (about {found.needed / GIB:.1f} GiB)"

    same, new = (", then ".join(map(said, some)) for some in (tried[:continues], tried[continues:]))
    parts = ([f"with the same --output-dir {same}"] if same else []) + ([f"in a new run {new}"] if new else [])
    return "try, the smallest change first: " + "; ".join(parts)
