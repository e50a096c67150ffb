"""The memory that a run needs at its peak: the walk's peak, and a reserve for what is not a tensor."""

from __future__ import annotations

from dataclasses import dataclass

from csm_fast.config.shape import CSMConfig
from csm_fast.config.train import TrainConfig
from csm_fast.planner.ledger import COMPONENTS
from csm_fast.planner.stack import Setup
from csm_fast.planner.step import Load, Walk
from csm_fast.planner.tensors import list_weights, optimizer_state
from csm_fast.system.memory import GIB

# Memory that is not a run's tensors, as (bytes, share of the tensors). CUDA: the context and the kernels' code, and the
# caching allocator's fragmentation (over packs of many sizes 0.4 % of 21 GiB with expandable segments, which
# csm-fast-train asks for; 9 to 12 % without). CPU: the interpreter with its libraries, and malloc's fragmentation.
# Rules of thumb: the first number differs by driver and card, the second by how sizes of packs vary.
RESERVE = {"cuda": (int(0.6 * GIB), 0.05), "cpu": (int(0.5 * GIB), 0.10)}


AUDIO_SHARE = 0.8  # audio rows among all rows, where no data is given


@dataclass(frozen=True)
class Estimate:
    """Predicted memory of a training step, in bytes.

    Attributes:
        components: at the moment of the peak: weights, adapters, gradients, optimizer, copies (autocast's copies of
            float32 weights in the compute type), activations, workspace.
        before: allocated between two steps.
        moment: the part of the step with the peak.
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
        """Bytes of the tensors."""
        return sum(self.components.values())

    @property
    def reserve(self) -> int:
        """Bytes for what is not a tensor (``RESERVE``)."""
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
        config: its sections model, loss, adapter and optimizer matter here.
        rows: of the largest pack.
        targets: supervised frames in it; by default ``audio_share`` of the rows.
        decoder_frames: how many of those the depth decoder sees; by default ``config.loss``'s fraction.
        device: "cpu", or "cuda", where the layers are compiled by default. Only "cpu" has been checked against counted
            bytes (``benchmarks/memory_plan.py``).
        compiled: whether ``torch.compile`` takes the layers; None: as ``config.model.compile`` says for the device.
        precision: "bf16", "fp16" or "fp32", where ``config.model.precision`` is "auto"; bf16 by default.
        packs: in an optimizer step. From the second pack on, all gradients exist during the whole pack.
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
    every = list(list_weights(shape, config.adapter, section, config.model.freeze, compute))
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
        varlen=compute == 2 and precision != "fp16",  # fp16 is only chosen on GPUs without a varlen attention kernel
    )
    state = sum(optimizer_state(elements, section) for elements, _ in tensors)
    walk = Walk(shape, every, setup, Load(rows, targets, decoder_frames), state)
    before = walk.ledger.now.total()
    ledger = walk.run()
    components = {name: ledger.peak[name] for name in COMPONENTS}
    return Estimate(components, before, ledger.moment, dict(ledger.phases), sum(n for n, _ in tensors), device)
