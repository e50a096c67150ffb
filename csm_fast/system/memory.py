"""Memory that a run may use, and sizes such as "12GiB"."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from csm_fast.system.errors import InputError

GIB = 2**30


_UNITS = {"k": 1, "m": 2, "g": 3, "t": 4}


def parse_bytes(text: str) -> int | None:
    """Bytes of "12GB" or "12000MB" (decimal), "12GiB" or "12G" (binary); None if ``text`` is not a size."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt])(b|ib|)\s*", text.lower())
    if not match:
        return None
    number, unit, suffix = match.groups()
    base = 1000 if suffix == "b" else 1024
    return int(float(number) * base ** _UNITS[unit])


def available_bytes(device: Any, limit: str | None = None) -> int:
    """Bytes that a run may use: ``limit``, else the GPU's memory, else the machine's or its control group's.

    Args:
        device: a ``torch.device``, or its name.
        limit: such as 12GB or 11.5GiB.

    Raises:
        InputError: ``limit`` is not a size.
    """
    if limit is not None:
        found = parse_bytes(limit)
        if not found:
            raise InputError(
                f"--memory-limit {limit} is no amount of memory", mend="write it as 12GB, 11.5GiB or 12000MB"
            )
        return found
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return _machine_bytes()


def _machine_bytes() -> int:
    """The machine's memory, or the lowest limit of the control groups (v2, v1) that this process is in."""
    found = []
    try:
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):  # Windows
        found.append(_windows_bytes())
    for path in _group_limits():
        try:
            text = path.read_text().strip()
        except OSError:
            continue
        if text.isdigit():  # "max" means no limit
            found.append(int(text))
    return min(found)


def _group_limits(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterator[Path]:
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        base, name = (root, "memory.max") if not controllers else (root / "memory", "memory.limit_in_bytes")
        if controllers and "memory" not in controllers.split(","):
            continue
        group = base / path.lstrip("/")
        while True:
            yield group / name
            if group == base or base not in group.parents:
                break
            group = group.parent


def _windows_bytes() -> int:
    import ctypes

    class Status(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ulong), ("load", ctypes.c_ulong)] + [
            (name, ctypes.c_ulonglong) for name in ("total", "free", "page", "page_free", "virtual", "rest", "extended")
        ]

    status = Status(length=ctypes.sizeof(Status))
    ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))  # type: ignore[attr-defined]
    return int(status.total)
