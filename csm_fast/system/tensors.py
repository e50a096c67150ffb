"""PyTorch tensors in safetensors files: read one by one, written one by one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from csm_fast.system.arrays import HeaderEntry, write_safetensors
from csm_fast.system.errors import InputError

# safetensors' names.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
    torch.int32: "I32",
    torch.int64: "I64",
}


@dataclasses.dataclass
class Entry:
    """One tensor of a checkpoint, not yet read."""

    name: str
    shape: Iterable[int]
    dtype: str  # safetensors' name of it
    read: Callable[[], Tensor]


def read_entries(file: Path) -> list[Entry]:
    """The tensors of a safetensors file, not yet read.

    Raises:
        InputError: no such file, or a damaged one; ``read`` raises it, too.
    """
    from safetensors import SafetensorError, safe_open

    damaged = "is not a whole safetensors file"

    def read(name: str) -> Tensor:
        # Opened again for each tensor: the pages of a mapping stay resident, and count as this process's memory,
        # until it is closed.
        try:
            with safe_open(file, framework="pt") as opened:
                return opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{damaged} ({error})", file=file, mend="copy or download it again") from None

    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
            return [Entry(name, s.get_shape(), s.get_dtype(), partial(read, name)) for name, s in slices.items()]
    except FileNotFoundError:
        raise InputError("no such file", file=file, mend="copy or download all parts of the model") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{damaged} ({error})", file=file, mend="copy or download it again") from None


def write_tensors(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
    """Write a safetensors file tensor by tensor. The library would convert and gather all of them first, which takes
    the memory of a second model.

    Args:
        dtype: of the file; None keeps each tensor's own.
    """

    def describe(name: str) -> HeaderEntry:
        tensor = tensors[name]
        kind = dtype or tensor.dtype
        return HeaderEntry(name, _DTYPES[kind], list(tensor.shape), tensor.numel() * kind.itemsize)

    def convert(tensor: Tensor) -> Any:
        values = tensor.to(device="cpu", dtype=dtype or tensor.dtype).contiguous()
        return values.view(-1).view(torch.uint8).numpy().data

    write_safetensors(path, map(describe, tensors), map(convert, tensors.values()), metadata={"format": "pt"})
