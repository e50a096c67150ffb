"""How much memory a training run takes, before anything is loaded: the estimate, and what follows from it.

``memory_weights.py`` knows the tensors; ``memory_step.py`` walks through a step, layer by layer (``memory_layer.py``).
Here are the peak, the reserve beside it, the refusal of what cannot fit with the smallest change that would, and the
choice of checkpointing that does.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from csm_fast.config.shape import CSMConfig
from csm_fast.config.train import TrainConfig
from csm_fast.planner.layer import Setup
from csm_fast.planner.ledger import COMPONENTS
from csm_fast.planner.step import Load, Walk
from csm_fast.planner.tensors import optimizer_state, weights
from csm_fast.system.errors import InputError
from csm_fast.system.memory import GIB, available_bytes

# What a run takes beside its tensors, as (bytes, share of the tensors). CUDA: the context and the kernels' code, and
# what its caching allocator loses between blocks of unequal size (over packs of many sizes 0.4 % of 21 GiB with
# segments that grow, which csm-fast-train asks for; 9 to 12 % without). CPU: the interpreter with its libraries, and
# malloc's losses. Rules of thumb: the first differs by driver and card, the second by how sizes of packs vary.
RESERVE = {"cuda": (int(0.6 * GIB), 0.05), "cpu": (int(0.5 * GIB), 0.10)}
AUDIO_SHARE = 0.8  # of the rows of speech with its text, where no data says
CHECKPOINTING = ("off", "selective", "full")
FEWEST_ROWS, MOST_ROWS = 512, 65_536  # pack sizes that are worth naming


@dataclass(frozen=True)
class Estimate:
    """Predicted memory of a training step, in bytes.

    Attributes:
        components: at the moment of the peak: weights, adapters, gradients, optimizer, copies (low-precision ones of
            float32 weights, which autocast keeps), activations, workspace.
        before: what is there between two steps.
        moment: where in the step the peak lies.
        phases: the most in each part of the step.
        trained: parameters that the optimizer updates.
        device: "cpu" or "cuda".
    """

    components: dict[str, int]
    before: int
    moment: str
    phases: dict[str, int]
    trained: int
    device: str

    @property
    def peak(self) -> int:
        """Of the tensors."""
        return sum(self.components.values())

    @property
    def reserve(self) -> int:
        """What the process takes beside them (``RESERVE``)."""
        base, share = RESERVE[self.device]
        return base + int(share * self.peak)

    @property
    def needed(self) -> int:
        return self.peak + self.reserve


def estimate(
    shape: CSMConfig,
    config: TrainConfig,
    *,
    rows: int,
    targets: int | None = None,
    decoder_frames: int | None = None,
    audio_share: float = AUDIO_SHARE,
    device: str = "cuda",
    compiled: bool | None = None,
    precision: str | None = None,
    packs: int = 1,
) -> Estimate:
    """The memory of one optimizer step.

    Args:
        config: its sections model, loss, adapter and optimizer decide.
        rows: of the largest pack.
        targets: supervised frames in it; by default ``audio_share`` of the rows.
        decoder_frames: how many of those the depth decoder sees; by default ``config.loss``'s fraction.
        device: "cpu", where the layers run operation by operation, or "cuda", by default compiled. Against tracked
            bytes only the first has been checked (``benchmarks/memory_plan.py``).
        compiled: whether ``torch.compile`` takes the layers; None: as ``config.model.compile`` says for the device.
        precision: "bf16", "fp16" or "fp32", where ``config.model.precision`` is "auto"; bf16 by default.
        packs: in an optimizer step. From the second on, all gradients are there during the whole of a pack.
    """
    if targets is None:
        targets = round(audio_share * rows)
    if decoder_frames is None:
        decoder_frames = max(min(1, targets), round(targets * config.loss.amortization_fraction))
    if config.model.precision != "auto" or precision is None:
        precision = "bf16" if config.model.precision == "auto" else config.model.precision
    if compiled is None:
        compiled = config.model.compile == "on" or (config.model.compile == "auto" and device == "cuda")
    section, autocast = config.optimizer, precision != "fp32"
    whole_bf16 = config.adapter.method == "full" and section.weights != "fp32"
    compute = 2 if autocast or whole_bf16 else 4
    every = list(weights(shape, config.adapter, section, config.model.freeze, compute))
    tensors = [t for w in every for t in w.trained_tensors()]
    setup = Setup(
        device,
        compiled,
        autocast,
        compute,
        config.model.activation_checkpointing,
        config.adapter.lora_dropout > 0,
        section.optimizer_in_backward,
        packs,
        varlen=compute == 2 and precision != "fp16",  # which is chosen for cards that have no such kernel
    )
    state = sum(optimizer_state(elements, section) for elements, _ in tensors)
    walk = Walk(shape, every, setup, Load(rows, targets, decoder_frames), state)
    before = walk.ledger.now.total()
    ledger = walk.run()
    components = {name: ledger.peak[name] for name in COMPONENTS}
    return Estimate(components, before, ledger.moment, dict(ledger.phases), sum(n for n, _ in tensors), device)


# ------------------------------------------------------------------------------------------------------ what is there


# ---------------------------------------------------------------------------------------------------------- decisions


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


def changed(config: TrainConfig, **settings: Any) -> TrainConfig:
    """A copy with some settings of its sections replaced, by name."""
    config = copy.deepcopy(config)
    for name, value in settings.items():
        owner = next(s for s in vars(config).values() if hasattr(s, name))
        setattr(owner, name, value)
    return config


def _flags(settings: dict[str, Any]) -> str:
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in settings.items())


def _savings(config: TrainConfig, precision: str | None = None) -> Iterator[dict[str, Any]]:
    """What can be changed to save memory, the smallest change first; each includes those before it. Not bf16 weights
    where products are in fp16."""
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
    """Settings under which the run fits, as few and as small as will do, and the estimate then.

    Tried in this order: checkpointing selective, full, smaller packs, 8-bit moments, bf16 weights, qlora; each with
    those before it. None where nothing fits.
    """
    for savings in _savings(config, load.get("precision")):
        for choice in _tighter(config):
            settings = {**savings}
            if choice != config.model.activation_checkpointing:
                settings["activation_checkpointing"] = choice
            found = estimate(shape, changed(config, **settings), rows=rows, **load)
            if found.needed <= available:
                return settings, found
        # What was one pack becomes several, and the gradients of the first wait for the others.
        several = {**load, "packs": max(2, load.get("packs", 1))}
        fewer = largest_rows(shape, changed(config, **settings), available, most=rows, **several)
        if fewer >= FEWEST_ROWS:
            settings["pack_rows"] = fewer
            return settings, estimate(shape, changed(config, **settings), rows=fewer, **several)
    return None


def check(config: TrainConfig, shape: CSMConfig, device: Any, *, rows: int | None = None, **load: Any) -> Estimate:
    """Refuse, before anything is loaded, a run that cannot fit.

    Args:
        device: a ``torch.device``, or its name.
        rows: of the largest pack there will be; by default ``config.data.pack_rows``.
        load: further arguments of ``estimate``: targets, decoder_frames, audio_share, compiled, precision, packs.

    Returns:
        The estimate of a run that fits.

    Raises:
        InputError: the run needs more than there is (``config.run.memory_limit``, or what the device has); it names
            the smallest change that fits.
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
    """The fastest of "off", "selective" and "full" with which the run fits; arguments as ``check``'s.

    Raises:
        InputError: none of them fits.
    """
    available = available_bytes(device, config.run.memory_limit)
    kind, size = str(device).split(":")[0], _pack_size(config, device, rows)
    for choice in CHECKPOINTING:
        tried = changed(config, activation_checkpointing=choice)
        if estimate(shape, tried, rows=size, device=kind, **load).needed <= available:
            return choice
    check(changed(config, activation_checkpointing="full"), shape, device, rows=rows, **load)
    raise AssertionError("check refuses what does not fit")


def _pack_size(config: TrainConfig, device: Any, rows: int | None) -> int:
    """Rows as the device will see them, padded to the next size of its ladder."""
    from csm_fast.packing.fit import padded_rows

    most = config.data.pack_rows
    return padded_rows(min(rows or most, most), most, str(device).split(":")[0])


def advice(config: TrainConfig, shape: CSMConfig | None = None) -> str:
    """What to change after memory ran out in earnest, the smallest change first, as flags: those with which a run can
    be continued, then those that need a new one.

    ``shape``: with it, each change says what the step would then take, on the run's kind of device.
    """
    kind = "cpu" if config.run.device.startswith("cpu") else "cuda"
    tried: list[dict[str, Any]] = [{"activation_checkpointing": choice} for choice in _tighter(config)[1:]]
    last = tried[-1] if tried else {}
    if config.data.pack_rows > FEWEST_ROWS:
        fewer = max(FEWEST_ROWS, 2 ** math.floor(math.log2(config.data.pack_rows - 1)))
        tried.append({"pack_rows": fewer})
    # Packs are part of the order where they make up a step.
    continues = len(tried) - (config.data.pack_rows > FEWEST_ROWS and config.data.batch_rows is not None)
    tried += [savings for savings in _savings(config) if savings]
    if not tried:
        return "use a device with more memory; csm-fast plan shows where it goes"

    def said(settings: dict[str, Any]) -> str:
        if shape is None:
            return _flags(settings)
        with_last = changed(config, **{**last, **settings} if "activation_checkpointing" not in settings else settings)
        found = estimate(shape, with_last, rows=with_last.data.pack_rows, device=kind)
        return f"{_flags(settings)} (about {found.needed / GIB:.1f} GiB)"

    same, new = (", then ".join(map(said, some)) for some in (tried[:continues], tried[continues:]))
    parts = ([f"with the same --output-dir {same}"] if same else []) + ([f"in a new run {new}"] if new else [])
    return "try, the smallest change first: " + "; ".join(parts)
