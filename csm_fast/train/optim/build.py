"""Parameter groups, the optimizer, and learning-rate schedules as pure functions of the optimizer step."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import partial
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
    rows = getattr(model, "embedding_rows", None)  # whose masters stand for the tables
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


_NORM_PIECE = 2**22  # values


def _norm(x: Tensor) -> Tensor:
    """[] float32, or float64 as ``x``. In pieces: a CPU widens bf16 as a whole here, twice what is to be dropped."""
    if (squares := ops.sum_of_squares(x)) is not None:
        return squares.sqrt().float()
    dtype = ops.wide_dtype(x.dtype)
    pieces = [torch.linalg.vector_norm(piece, dtype=dtype) for piece in x.flatten().split(_NORM_PIECE)]
    return torch.linalg.vector_norm(torch.stack(pieces))


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """[] float32 (float64 where gradients are): the norm of all gradients together, summed up in that type also where
    they are in bf16."""
    squares, others = [], []
    for p in parameters:
        if p.grad is None:
            continue
        if (square := ops.sum_of_squares(p.grad)) is not None:
            squares.append(square)
        else:
            others.append(p.grad)
    dtype = torch.float64 if any(grad.dtype == torch.float64 for grad in others) else torch.float32
    if any(grad.device.type == "cpu" for grad in others):
        squares += [_norm(grad).square() for grad in others]
    elif others:
        squares += [norm.square() for norm in torch._foreach_norm(others, 2, dtype=dtype)]
    return torch.stack(squares).sum().sqrt().to(dtype) if squares else torch.zeros(())


def clip(optimizer: torch.optim.Optimizer, most: float, norm: Tensor) -> None:
    """Has the next update take the gradients as if their norm, ``norm`` [], were at most ``most``; 0: as they are.

    ``csm_fast.train.optim.adamw.AdamW`` scales what it reads, so no pass over memory is made for it; gradients of
    other optimizers are scaled where they lie. Sizes are those of ``torch.nn.utils.clip_grad_norm_``.
    """
    if isinstance(optimizer, AdamW):
        optimizer.grad_scale = ((norm + 1e-6) / most).clamp(min=1.0).float() if most else None
    elif most:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grads_with_norm_(parameters, most, norm)


class in_backward:  # noqa: N801 - reads as the statement that it is used in
    """Within it, a backward pass updates each parameter as soon as its gradient is complete, and drops the gradient.

    For the last backward pass of an optimizer step; earlier ones accumulate as usual. Clips nothing. What has no
    gradient in it is left for ``optimizer.step()``:

        at_once = in_backward(optimizer, ~torch.isfinite(loss))
        with at_once:
            loss.backward()
        optimizer.found_inf = at_once.bad.float()
        optimizer.step()
        optimizer.zero_grad()

    Args:
        optimizer: PyTorch's fused AdamW or ``csm_fast.train.optim.adamw.AdamW``.
        bad: [] bool on the device; where it is true, nothing is updated.

    Attributes:
        bad: [] bool: as given, or a gradient was not finite. Whose gradient came before that one is updated already.
        updated: the parameters whose gradients came.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, bad: Tensor):
        self.optimizer, self.bad = optimizer, bad
        self.updated: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> in_backward:
        clip(self.optimizer, 0.0, self.bad)
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                hook = partial(self._update, group)
                self._hooks.append(parameter.register_post_accumulate_grad_hook(hook))
        return self

    def __exit__(self, *_: object) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _update(self, group: dict[str, Any], parameter: Tensor) -> None:
        assert parameter.grad is not None
        norm = _norm(parameter.grad)
        self._norms.append(norm)
        self.bad = self.bad | ~torch.isfinite(norm)
        optimizer: Any = self.optimizer
        optimizer.found_inf = self.bad.float()
        if isinstance(optimizer, AdamW):
            optimizer.step_parameter(parameter)
        else:
            groups = optimizer.param_groups
            optimizer.param_groups = [{**group, "params": [parameter]}]
            try:
                optimizer.step()
            finally:
                optimizer.param_groups = groups
        parameter.grad = None
        self.updated.append(parameter)

    def norm(self) -> Tensor:
        """[] float32, the norm of all gradients: of those that came, and of those that are still there."""
        left = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms = [*self._norms, *map(_norm, left)]
        return (
            torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros_like(self.bad, dtype=torch.float32)
        )


def warn_without_gradient(optimizer: torch.optim.Optimizer, updated: Iterable[Tensor] = ()) -> None:
    """Name what is trained but was not reached by the backward pass; ``updated`` had its gradient, and lost it."""
    reached = {id(parameter) for parameter in updated}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            if parameter.grad is None and id(parameter) not in reached:
                log.warning("warning: %s is trainable but got no gradient in the first step", name)
