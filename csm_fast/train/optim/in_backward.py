"""The optimizer inside the backward pass: no gradient outlives its parameter's update."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from csm_fast.train.optim.adamw import AdamW
from csm_fast.train.optim.clipping import clip_gradients, tensor_norm


class UpdateInBackward:
    """Within it, a backward pass updates each parameter as soon as its gradient is complete, and drops the gradient.

    For the last backward pass of an optimizer step; earlier ones accumulate as usual. Clips nothing. What has no
    gradient in it is left for ``optimizer.step()``:

        at_once = UpdateInBackward(optimizer, ~torch.isfinite(loss))
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

    def __enter__(self) -> UpdateInBackward:
        clip_gradients(self.optimizer, 0.0, self.bad)
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
        norm = tensor_norm(parameter.grad)
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
        norms = [*self._norms, *map(tensor_norm, left)]
        return (
            torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros_like(self.bad, dtype=torch.float32)
        )
