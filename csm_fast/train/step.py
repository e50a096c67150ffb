"""One optimizer step: the losses and backward passes of its packs, clipping, the update. It names no method."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from csm_fast.config.train import OptimizerSection
from csm_fast.packing.draws import Purpose, seeded_generator
from csm_fast.packing.layout import StepBatch
from csm_fast.system.device import compute_dtype
from csm_fast.train import checkpoint as ckpt
from csm_fast.train.optim.build import clip, gradient_norm, in_backward, make_optimizer, warn_without_gradient
from csm_fast.train.optim.schedule import learning_rate

MOST_OVERFLOWS = 24  # in a row: the scale starts at 2^16 and is halved each time, so by then it is far below 1
LossFunction = Callable[[nn.Module, Any], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Outcome:
    """What a step gave, on the device.

    Attributes:
        loss, per_codebook: [] and [K], summed over the step's packs.
        grad_norm: [], before clipping.
        bad: [] bool: the loss or a gradient was not finite, so nothing was updated.
        lr: the learning rate.
    """

    loss: Tensor
    per_codebook: Tensor
    grad_norm: Tensor
    bad: Tensor
    lr: float


class Update:
    """The optimizer of a run and what belongs to it. Nothing here asks a GPU for a value.

    Args:
        model: on its device, frozen and cast as the run wants it.
        precision: "bf16", "fp16" or "fp32".
        loss_function: (model, pack) -> (loss, per-codebook [K]).
        total_steps: of the schedule.
        seed: of stochastic rounding and dropout.
    """

    def __init__(
        self,
        model: Any,
        section: OptimizerSection,
        device: torch.device,
        precision: str,
        loss_function: LossFunction,
        total_steps: int,
        seed: int,
    ):
        self.model, self.section, self.device = model, section, device
        self.dtype, self.loss_function, self.total_steps = compute_dtype(precision), loss_function, total_steps
        self.seed = seed
        self.optimizer: Any = make_optimizer(model, section, seed)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        # Losses of fp16 are scaled up, or small gradients would be zero; elsewhere this does nothing.
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.overflows = torch.zeros((), dtype=torch.long, device=device)

    def load(self, checkpoint: Path, state: dict[str, Any]) -> None:
        """Continue from what ``checkpoint.save_checkpoint`` and ``state`` wrote."""
        ckpt.load_optimizer(self.optimizer, checkpoint)
        if self.scaler.is_enabled() and state.get("loss_scale"):
            self.scaler.load_state_dict(state["loss_scale"])

    def state(self) -> dict[str, Any]:
        """What the optimizer's tensors do not hold, for the trainer's state. Waits for the device under fp16."""
        return {"loss_scale": self.scaler.state_dict()} if self.scaler.is_enabled() else {}

    def autocast(self) -> Any:
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)

    def __call__(self, batch: StepBatch, step: int) -> Outcome:
        """Optimizer step number ``step``, from 0."""
        lr = learning_rate(self.section, step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # Dropout's draws: a function of the seed and the step, so that a run continues as it would have gone on.
        torch.manual_seed(int(seeded_generator(self.seed, Purpose.DROPOUT, step).integers(2**62)))
        loss: Any = 0.0
        per_codebook: Any = 0.0
        at_once: in_backward | None = None
        for i, pack in enumerate(batch.packs):
            with self.autocast():
                part, parts = self.loss_function(self.model, pack.to(self.device))
            loss = loss + part.detach()
            per_codebook = per_codebook + parts
            if not part.requires_grad:  # all that this pack would teach is frozen
                continue
            if self.section.optimizer_in_backward and i + 1 == len(batch.packs):
                at_once = in_backward(self.optimizer, ~torch.isfinite(loss))
            with at_once or nullcontext():
                self.scaler.scale(part).backward()
        rows = getattr(self.model, "embedding_rows", None)
        if rows is not None:
            rows.pull()
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        norm = at_once.norm() if at_once else gradient_norm(self.parameters)
        clip(self.optimizer, self.section.max_grad_norm, norm)
        bad = ~(torch.isfinite(loss) & torch.isfinite(norm))
        # The optimizers leave parameters, moments and their step count alone where this flag is 1.
        self.optimizer.found_inf = bad.float()
        self.optimizer.step()
        if rows is not None:
            rows.push()
        if step == 0:
            warn_without_gradient(self.optimizer, at_once.updated if at_once else ())
        self.optimizer.zero_grad(set_to_none=True)
        if self.scaler.is_enabled():
            self.scaler.update()
            # A gradient that overflows is how the scale is found, and no news; one that always does is no overflow.
            self.overflows = torch.where(bad, self.overflows + 1, 0)
            bad = ~torch.isfinite(loss) | (self.overflows > MOST_OVERFLOWS)
            norm = norm.nan_to_num(0.0, 0.0, 0.0)
        return Outcome(loss, per_codebook, norm, bad, lr)
