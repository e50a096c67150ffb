"""Time, memory and ceilings of a device."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks.common.tracked import Tracked

T = TypeVar("T")
BUSY_CYCLES = 4_000_000  # two milliseconds, or a little more


def wait(device: torch.device) -> None:
    """Wait until a GPU has done all that was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_call(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call; on CUDA between two events, so of what the call launches."""
    if device.type != "cuda":
        started = time.perf_counter()
        call()
        return time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    wait(device)
    return begin.elapsed_time(end) / 1e3


def time_cold_call(call: Callable[[], Any], device: torch.device, busy: int = BUSY_CYCLES) -> float:
    """``time_call``; on CUDA with the caches overwritten, and queued while the GPU is busy for ``busy`` of its cycles.
    As in a step, that hides the time in which the host launches the kernels."""
    if device.type == "cuda":
        torch.cuda._sleep(busy)
        _flush_buffer(device).zero_()
    return time_call(call, device)


@functools.cache
def _flush_buffer(device: torch.device) -> Tensor:
    size = 2 * getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 2**26)
    return torch.empty(max(size, 2**27), dtype=torch.uint8, device=device)


def take_turns(calls: Sequence[Callable[[], T]], repeats: int) -> list[list[T]]:
    """The results of each call. All of them take turns, so that a slow minute of the machine falls on all."""
    rounds = [[call() for call in calls] for _ in range(repeats)]
    return [list(results) for results in zip(*rounds, strict=True)]


def peak_memory(call: Callable[[], Any], device: torch.device, compiled: bool) -> int | None:
    """The most bytes held during a call beyond those held before; None for compiled code on a CPU, whose allocations
    cannot be followed."""
    if device.type == "cuda":
        wait(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    if compiled:
        return None
    try:
        with Tracked() as tracked:
            call()
    except NotImplementedError:  # an operator that cannot be followed; it runs without
        call()
        return None
    return tracked.peak


def free_memory(device: torch.device) -> float:
    """Free bytes of a GPU, of the machine, or of this process's control group; infinite where no one tells."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    free = float("inf")
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text(encoding="utf-8").strip()
        if limit != "max":
            free = min(free, int(limit) - int((group / "memory.current").read_text(encoding="utf-8")))
    except OSError:
        pass  # not Linux, or another kind of control group
    return free


def copy_rate(device: torch.device) -> float:
    """Bytes/s of a copy (read and written) larger than the caches."""
    source = torch.zeros(2**30 if device.type == "cuda" else 2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2.0 * source.numel() / _median(lambda: target.copy_(source), device)


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """``copy_rate``, and FLOP/s of a large square matrix product."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return {"copy": copy_rate(device), "matmul": 2.0 * side**3 / _median(lambda: a @ b, device)}


def _median(call: Callable[[], Any], device: torch.device) -> float:
    call()
    return statistics.median(time_cold_call(call, device) for _ in range(20 if device.type == "cuda" else 5))
