"""Which parts of a table an update of AdamW may leave out: those whose moments are zero and stay so."""

from __future__ import annotations

from typing import Any

import torch
from csm_kernels.constants import MOMENT_BLOCK
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from csm_fast import ops

SMALLEST = torch.finfo(torch.float32).tiny


class MovingRows:
    """Marks of an optimizer's tables; nothing here keeps a parameter or its state alive.

    A part (``ops.adamw_part``: a row on a CPU) whose moments are zero is left as it is by an update without a gradient,
    if nothing decays: m = v = 0, and the weight moves by 0 / eps. The update marks parts as they get gradients. Marks
    are computed from the moments on first use, and again if anything else modified the optimizer state.
    """

    def __init__(self) -> None:
        self._known: Any = WeakIdKeyDictionary()

    def forget(self, p: Tensor) -> None:
        """Drop the marks of a table that another form of the update changed."""
        self._known.pop(p, None)

    def of(self, form: str, p: Tensor, group: dict[str, Any], state: dict[str, Tensor]) -> Tensor | None:
        """uint8, one for each part of ``p``; None where everything changes, as where weights decay."""
        size = ops.adamw_part(form, p) if p.dim() == 2 else 0
        if not size or group["weight_decay"] or group["eps"] < SMALLEST:
            self.forget(p)
            return None
        held = [x for name, x in state.items() if name != "step"]
        # Our updates write past PyTorch, so they leave versions alone.
        seen = size, p.numel(), *((x.data_ptr(), x.numel(), x._version) for x in held)
        known = self._known.get(p)
        if known is None or known[0] != seen:
            known = self._known[p] = seen, self._marks(p, state, size)
        return known[1]

    @staticmethod
    def _marks(p: Tensor, state: dict[str, Tensor], size: int) -> Tensor:
        """A part counts where a moment is not zero, or a Kahan term, which rounding again may change."""
        marks = torch.zeros(-(-p.numel() // size), dtype=torch.uint8, device=p.device)
        for name in ("exp_avg", "exp_avg_sq", "compensation"):
            if name not in state:
                continue
            scales = state.get(f"{name}_absmax")
            values, each = (state[name], size) if scales is None else (scales, size // MOMENT_BLOCK)
            for first in range(0, len(marks), 1024):
                some = values.view(-1)[first * each : (first + 1024) * each].ne(0)
                marks[first : first + 1024] |= nn.functional.pad(some, (0, -len(some) % each)).view(-1, each).any(1)
        return marks
