"""Parameter groups, the optimizer, and learning-rate schedules as pure functions of the optimizer step."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import nn

from . import ops
from .config import OptimizerSection
from .errors import InputError

log = logging.getLogger("csm_fast")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Trainable parameters in two groups: matrices decay; norms and embedding tables do not.

    Each group also lists its parameters' ``names``, the keys of saved optimizer state.
    """
    decay: dict = {"params": [], "names": [], "weight_decay": weight_decay}
    plain: dict = {"params": [], "names": [], "weight_decay": 0.0}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = plain if parameter.dim() < 2 or "embeddings" in name else decay
            group["params"].append(parameter)
            group["names"].append(name)
    groups = [g for g in (decay, plain) if g["params"]]
    if not groups:
        raise InputError("--freeze leaves nothing to train", mend="freeze fewer parts")
    return groups


def cast_weights(model: nn.Module, section: OptimizerSection) -> None:
    """All parameters to bf16 where ``section.weights`` says so."""
    if section.weights != "fp32":
        model.to(torch.bfloat16)


def make_optimizer(model: nn.Module, section: OptimizerSection, seed: int = 0) -> torch.optim.AdamW:
    """Fused AdamW. Its ``found_inf`` attribute skips an update on the device, without asking the host."""
    return torch.optim.AdamW(
        parameter_groups(model, section.weight_decay),
        lr=peak_learning_rate(section),
        betas=(section.beta1, section.beta2),
        eps=section.adam_eps,
        fused=True,
    )


class TableGradients:
    """The gradients of the embedding tables, kept from step to step where the model trains on a CPU.

    A table of 128,256 rows gets a few hundred of them per step; filling the rest with zeros can take longer than the
    step. Elsewhere this does nothing: a GPU fills them in a fraction of a millisecond.

        tables = TableGradients(model)
        with tables:
            ...                   # losses and backward passes
        optimizer.step()          # the tables' .grad is there
        optimizer.zero_grad()
        tables.clear(whole)       # whole: the gradients held NaN, or something else wrote into them
    """

    def __init__(self, model: Any):
        self.model = model
        weights = model.text_embeddings.weight, model.audio_embeddings.weight
        self.rows = tuple(ops.RowGradient(w) if w.requires_grad and w.device.type == "cpu" else None for w in weights)
        self.kept = [(w, rows) for w, rows in zip(weights, self.rows, strict=True) if rows is not None]
        self.others_wrote = False

    def __enter__(self) -> None:
        self.model.row_gradients = self.rows

    def __exit__(self, *_: object) -> None:
        del self.model.row_gradients
        for weight, rows in self.kept:
            if weight.grad is not None:  # the table was used otherwise, too
                rows.dense.add_(weight.grad)
                self.others_wrote = True
            weight.grad = rows.dense

    def clear(self, whole: bool) -> None:
        for _, rows in self.kept:
            rows.clear(whole or self.others_wrote)
        self.others_wrote = False


def warn_without_gradient(optimizer: torch.optim.Optimizer) -> None:
    """Name what is trained but was not reached by the backward pass."""
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            if parameter.grad is None:
                log.warning("warning: %s is trainable but got no gradient in the first step", name)


def peak_learning_rate(section: OptimizerSection, method: str = "full") -> float:
    """The given one, or the method's default: adapters start at zero and take larger steps."""
    if section.learning_rate is not None:
        return section.learning_rate
    return 3e-5 if method == "full" else 2e-4


def warmup_steps(section: OptimizerSection, total_steps: int) -> int:
    """Warmup in optimizer steps, from steps or a ratio (default 0.05), at most the whole run."""
    if section.warmup_steps is not None:
        return min(section.warmup_steps, total_steps)
    ratio = 0.05 if section.warmup_ratio is None else section.warmup_ratio
    return min(total_steps, math.ceil(ratio * total_steps))


def learning_rate(section: OptimizerSection, step: int, total_steps: int) -> float:
    """Learning rate of the update number ``step`` (from 0) of ``total_steps``.

    Linear warmup reaches the peak at its last step (its first step is not 0); then linear to 0, a half cosine to 0,
    exponential to a tenth, or constant.
    """
    warmup, peak = warmup_steps(section, total_steps), peak_learning_rate(section)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    factor = {
        "linear": 1 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "exponential": 0.1**progress,
        "constant": 1.0,
    }[section.lr_decay]
    return peak * max(0.0, factor)
