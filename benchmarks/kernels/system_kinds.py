"""Kinds of systems that ``benchmarks.kernels`` measures: compiled ones, Liger's, the model's own; and random inputs."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.points import Point, System

bound = functools.cache(functools.partial)  # the same object for the same arguments, so that it is compiled once


@functools.cache
def _compiled(run: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(run)


def compiled(name: str, run: Callable[..., Any], point: Point, memory: tuple[float, float]) -> System:
    """``run`` under torch.compile. Row counts are symbolic, as they are for anyone whose packs differ in size."""
    reason = "" if point.compile else "left out by --no-compile"
    return System(name, _compiled(run), memory, unavailable=reason, compiled=True)


def pointwise_systems(
    run: Callable[..., Any], eager: Callable[..., Any], point: Point, memory: tuple[float, float]
) -> tuple[System, ...]:
    """The model's own small function, which the trainer compiles on CUDA, the eager one, and that compiled."""
    if point.device.type == "cuda" and point.compile:
        ours = compiled("csm_fast", run, point, memory)
    else:
        ours = System("csm_fast", run, memory)
    return ours, System("eager", eager, memory), compiled("eager, compiled", eager, point, memory)


def liger(
    name: str, function: str, wrap: Callable[..., Any], point: Point, memory: tuple[float, float], **more
) -> System:
    """``wrap(function, **inputs)`` for one of ``liger_kernel.transformers.functional``."""
    reason = ""
    if point.device.type != "cuda":
        reason = "Liger's kernels need CUDA"
    elif importlib.util.find_spec("liger_kernel") is None:
        reason = "liger_kernel is not installed"

    def run(**inputs: Tensor) -> Any:
        if not torch.is_grad_enabled():  # or its loss forms gradients that nobody wants
            inputs = {name: x.detach() for name, x in inputs.items()}
        return wrap(getattr(importlib.import_module("liger_kernel.transformers.functional"), function), **inputs)

    return System(name, run, memory, unavailable=reason, **more)


def random_tensor(point: Point, *shape: int, scale: float = 1.0, leaf: bool = False) -> Tensor:
    x = torch.randn(shape, device=point.device, dtype=point.dtype).mul_(scale)
    return x.requires_grad_(leaf)


def mark_rows(**tensors: Tensor) -> None:
    """Tell the compiler that the first dimension changes from pack to pack."""
    for x in tensors.values():
        torch._dynamo.maybe_mark_dynamic(x, 0)
