"""Each check of the ``gpu`` suite runs on a CPU too, as a rehearsal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from kernel_cases import interpreted

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


DEVICES = [pytest.param("cpu", id="rehearsal"), pytest.param("cuda", marks=GPU, id="gpu")]


@contextlib.contextmanager
def kernels(device: str) -> Iterator[None]:
    with contextlib.nullcontext() if device == "cuda" else interpreted():
        yield


@contextlib.contextmanager
def no_waiting(device: str) -> Iterator[None]:
    """Within it, whatever makes the host wait for the GPU raises."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
