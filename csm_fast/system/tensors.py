"""Torch tensors in safetensors files: their entries, and writing them."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
    from safetensors import SafetensorError, safe_open

    damaged = "is not a whole safetensors file"

    def read(name: str) -> Tensor:
        # Opened anew for each tensor: the pages of a mapping stay resident, and count as ours, until it is closed.
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
    """safetensors, tensor by tensor: the library converts and gathers all of them first, a second model in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        kind = dtype or tensor.dtype
        begin, end = end, end + tensor.numel() * kind.itemsize
        header[name] = {"dtype": _DTYPES[kind], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            values = tensor.to(device="cpu", dtype=dtype or tensor.dtype).contiguous()
            file.write(values.view(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
