"""Parameter groups and the optimizer over them."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from csm_fast import ops
from csm_fast.config.train import OptimizerSection
from csm_fast.system.errors import InputError
from csm_fast.train.optim.adamw import AdamW, can_page
from csm_fast.train.optim.schedule import peak_learning_rate

log = logging.getLogger("csm_fast")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Trainable parameters in two groups: matrices decay; norms and embedding tables do not.

    Each group also lists its parameters' ``names``, the keys of saved optimizer state.
    """
    decay: dict = {"params": [], "names": [], "weight_decay": weight_decay}
    plain: dict = {"params": [], "names": [], "weight_decay": 0.0}
    rows = getattr(model, "embedding_rows", None)  # its masters are trained in place of the tables
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not (rows and rows.owns(parameter)):
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


def make_optimizer(model: nn.Module, section: OptimizerSection, seed: int = 0) -> torch.optim.Optimizer:
    """``csm_fast.train.optim.adamw.AdamW``; for float32 weights and moments PyTorch's fused AdamW, where ours has no
    faster form.

    The ``found_inf`` attribute of both skips an update on the device, without asking the host. ``model`` is on its
    device, frozen and cast as the run wants it; ``seed`` is that of stochastic rounding.

    Raises:
        InputError: nothing to train; 8-bit moments without bitsandbytes.
    """
    groups = parameter_groups(model, section.weight_decay)
    lr, betas, eps = peak_learning_rate(section), (section.beta1, section.beta2), section.adam_eps
    trained = [p for group in groups for p in group["params"]]
    ours = all(ops.choose("adamw", p.device, p.dtype, p, p, p).impl == "cpu" for p in trained)
    if section.optimizer == "adamw" and section.weights == "fp32" and not ours:
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
    rounding = "stochastic" if section.weights == "fp32" else section.weights.removeprefix("bf16-")
    paged = section.optimizer == "paged-adamw-8bit" and can_page(trained)
    bits: Any = 32 if section.optimizer == "adamw" else 8
    return AdamW(groups, lr, betas, eps, bits=bits, rounding=rounding, seed=seed, paged=paged)  # type: ignore[arg-type]


def warn_without_gradient(optimizer: torch.optim.Optimizer, updated: Iterable[Tensor] = ()) -> None:
    """Name what is trained but was not reached by the backward pass; ``updated`` had its gradient, and lost it."""
    reached = {id(parameter) for parameter in updated}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            if parameter.grad is None and id(parameter) not in reached:
                log.warning("warning: %s is trainable but got no gradient in the first step", name)
