"""Device and precision of a run, its peak memory, and the name of the processor."""

from __future__ import annotations

import ctypes
import platform
import sys
from pathlib import Path

import torch

from csm_fast.system.errors import InputError


def resolve_device(name: str) -> torch.device:
    """The device that ``--device`` means; an ``InputError`` if there is none of that name."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:  # its message lists two dozen kinds of devices
        raise InputError(
            f"--device {name or '(empty)'} names no device", mend="use auto, cpu, cuda or cuda:1, ..."
        ) from None
    try:
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.empty(0, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # libraries ask what the current device can do, and allocate on it
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"--device {name} is not there ({str(error).splitlines()[0]})", mend="use auto or cpu"
        ) from None
    return device


def resolve_precision(name: str, device: torch.device) -> str:
    """bf16 if the device multiplies it fast, fp16 on GPUs whose tensor cores have only that, fp32 otherwise."""
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
    """The type of operands of matrix products under a resolved ``precision``."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]


def memory_gib(device: torch.device) -> float:
    """Peak device memory in GiB; on a CPU the process's peak resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**30


def keep_freed_memory() -> bool:
    """Have glibc keep the memory that this process frees; returns whether that worked.

    A training step allocates and frees the same gigabyte again and again. By default glibc returns large blocks to the
    system at once, and every new page costs a page fault. This setting is for the whole process, so commands use it
    and the library does not.
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
    """The processor's name and its best vector instructions, which the names of virtual machines often do not show."""
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    except OSError:
        pass
    features = set(fields.get("flags", "").split())
    best = next((shown for flag, shown in VECTORS.items() if flag in features), "")
    name = fields.get("model name") or platform.processor() or platform.machine()
    return f"{name} ({best})" if best else name
