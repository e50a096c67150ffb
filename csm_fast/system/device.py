"""What this machine is and what it does well: device, precision, memory."""

from __future__ import annotations

import ctypes
import platform
import sys
from pathlib import Path

import torch

from csm_fast.system.errors import InputError


def resolve_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:  # its text lists two dozen kinds of devices
        raise InputError(
            f"--device {name or '(empty)'} names no device", mend="use auto, cpu, cuda or cuda:1, ..."
        ) from None
    try:
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.empty(0, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # for what asks for the current one's abilities, and keeps nothing on another
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"--device {name} is not there ({str(error).splitlines()[0]})", mend="use auto or cpu"
        ) from None
    return device


def resolve_precision(name: str, device: torch.device) -> str:
    """bf16 where the machine multiplies it fast; fp16 on GPUs whose tensor cores know only that; fp32 otherwise."""
    if name != "auto":
        return name
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        return "bf16" if capability >= (8, 0) else "fp16" if capability >= (7, 0) else "fp32"
    if device.type == "cpu":
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return "bf16" if any(getattr(torch.cpu, p, bool)() for p in probes) else "fp32"
    return "fp32"


def compute_dtype(precision: str) -> torch.dtype:
    """The type of the matrix products under a resolved ``precision``."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]


def memory_gib(device: torch.device) -> float:
    """Peak device memory; on a CPU the process's peak resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**30


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, where the C library is glibc; returns whether that worked.

    A training step frees and takes the same gigabyte again and again. By default glibc returns large blocks to the
    system at once, and every new page costs a fault: a seventh of a step's time and more. For a process of one's own
    only; ``csm-fast-train`` calls it, the library does not.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return False
    trim_threshold, mmap_max, most = -1, -4, 2**31 - 1  # malloc.h
    return bool(mallopt(mmap_max, 0)) and bool(mallopt(trim_threshold, most))


VECTORS = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "avx512f": "AVX-512", "avx2": "AVX2"}


def processor() -> str:
    """The processor's name, and the most that its vector instructions can do: names of rented ones hardly tell."""
    told: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            told.setdefault(name.strip(), value.strip())
    except OSError:
        pass
    features = set(told.get("flags", "").split())
    best = next((shown for flag, shown in VECTORS.items() if flag in features), "")
    name = told.get("model name") or platform.processor() or platform.machine()
    return f"{name} ({best})" if best else name
