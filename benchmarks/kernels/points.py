"""What a measurement of ``benchmarks.kernels`` consists of: a point, a case, its systems, their inputs and work."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from csm_fast.config.shape import CSMConfig

FORWARD, BOTH = "forward", "forward+backward"
MODES = (FORWARD, BOTH)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Point:
    """Where an operator is measured.

    Attributes:
        rows: N, rows of the backbone, text and audio.
        fraction: share of the supervised frames that reach the depth decoder; None where it plays no part.
    """

    op: str
    rows: int
    fraction: float | None
    config: CSMConfig
    dtype: torch.dtype
    device: torch.device
    compile: bool = True

    def layout(self) -> Layout:
        return layout(self.rows, self.config.backbone.max_seq_len)

    def frames(self) -> int:
        """M, frames in the depth decoder."""
        return max(2, int(self.layout().audio * (self.fraction or 0)))


@dataclass(frozen=True)
class Layout:
    """Rows of each conversation of a pack; the first eighth of each is text."""

    lengths: tuple[int, ...]

    @property
    def text_of(self) -> list[int]:
        return [max(1, n // 8) for n in self.lengths]

    @property
    def audio(self) -> int:
        """A, audio rows; all are supervised."""
        return sum(self.lengths) - sum(self.text_of)


@functools.cache
def layout(rows: int, longest: int) -> Layout:
    """Conversations of log-normal length, median 120 rows (10 s of speech), that fill ``rows`` exactly."""
    draw = random.Random(0)
    lengths: list[int] = []
    left = rows
    while left:
        n = min(left, longest, max(16, int(draw.lognormvariate(4.79, 0.8))))
        if left - n < 16:  # no conversation of a few rows at the end
            n = left if left <= longest else left // 2
        lengths.append(n)
        left -= n
    return Layout(tuple(lengths))


@dataclass(frozen=True)
class Work:
    """What no implementation can leave out: bytes from and to memory, and floating-point operations."""

    bytes: float
    flops: float = 0.0


@dataclass
class Inputs:
    """Keyword arguments of a system, those that want a gradient, and the gradient of each output."""

    tensors: dict[str, Tensor]
    wanted: tuple[str, ...]
    upstream: tuple[Tensor, ...]

    def cloned(self) -> Inputs:
        """Copies of all tensors."""
        tensors = {n: x.detach().clone().requires_grad_(x.requires_grad) for n, x in self.tensors.items()}
        return Inputs(tensors, self.wanted, tuple(g.clone() for g in self.upstream))

    def widened(self) -> Inputs:
        """The numbers in float64."""
        tensors = {
            n: x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
            for n, x in self.tensors.items()
        }
        return Inputs(tensors, self.wanted, tuple(g.double() for g in self.upstream))


Results = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]  # outputs, gradients of ``wanted``


@dataclass(frozen=True)
class System:
    """One way to compute the operator.

    Attributes:
        memory: predicted peak bytes beyond the inputs, forward and forward+backward; only decides what is skipped.
        group: only systems of one group are ranked against each other.
        unavailable: why it cannot run here.
        prepare, restore: into the layout that it wants and back; neither is timed.
        fresh: it overwrites its inputs, so ``prepare`` runs before every call.
        work: forward and forward+backward, where it differs from the case's.
    """

    name: str
    run: Callable[..., Any]
    memory: tuple[float, float]
    group: str = "dense"
    unavailable: str = ""
    prepare: Callable[[Inputs], Inputs] | None = None
    restore: Callable[[Results], Results] | None = None
    fresh: bool = False
    compiled: bool = False
    work: tuple[Work, Work] | None = None


@dataclass(frozen=True)
class Case:
    """One operator at one point. ``truth`` is the operator's formula, good for float64; ``make`` allocates."""

    point: Point
    make: Callable[[], Inputs]
    input_bytes: float
    truth: Callable[..., Any]
    systems: tuple[System, ...]
    work: tuple[Work, Work]
    outputs: tuple[str, ...] = ("out",)


def perform(run: Callable[..., Any], inputs: Inputs, mode: str) -> Results:
    """Forward under no_grad, as in evaluation, or forward and all gradients."""
    if mode == FORWARD:
        with torch.no_grad():
            return _several(run(**inputs.tensors)), ()
    outputs = _several(run(**inputs.tensors))
    wanted = [inputs.tensors[name] for name in inputs.wanted]
    return outputs, torch.autograd.grad(outputs, wanted, inputs.upstream)


def _several(out: Any) -> tuple[Tensor, ...]:
    return (out,) if isinstance(out, Tensor) else tuple(out)
