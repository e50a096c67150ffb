"""NumPy arrays in safetensors files: written in one pass, mapped without a copy. ``tensors`` writes with it, too.

The safetensors layout (8 bytes of length, a JSON header, one block of data) is written here and not by the library.
A shard consists of thousands of small arrays and is hashed while it is written, and a full disk must surface as an
OSError. The library reads what is written here, and this reads what the library writes (tested).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import mmap
import os
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from csm_fast.system.errors import InputError

DTYPES = {"I64": "<i8", "I32": "<i4", "F32": "<f4", "U16": "<u2", "U8": "|u1"}
_NAMES = {np.dtype(value): name for name, value in DTYPES.items()}
_MAX_HEADER = 1 << 24  # bytes; ours are below 2 kB, so a longer one is damage


class HeaderEntry(NamedTuple):
    """One array of a safetensors file, as the header describes it."""

    name: str
    dtype: str  # safetensors' name of it
    shape: list[int]
    nbytes: int


def write_safetensors(
    path: Path,
    entries: Iterable[HeaderEntry],
    blocks: Iterable[Any],
    *,
    metadata: dict[str, str] | None = None,
    digest: Any = None,
) -> int:
    """Write a safetensors file in one pass and fsync it; returns its size in bytes. A failed write leaves no file.

    Args:
        blocks: the bytes of all entries in their order, in any number of buffers.
        digest: a hash that is updated with every byte of the file.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for entry in entries:
        begin, end = end, end + entry.nbytes
        header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    try:
        with open(path, "wb") as file:
            for block in itertools.chain([head], blocks):
                file.write(block)
                if digest is not None:
                    digest.update(block)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)  # frees the space of a full disk at once
        raise
    return len(head) + end


def write_arrays(path: Path, arrays: Mapping[str, Sequence[np.ndarray]]) -> tuple[str, int]:
    """Write ``path`` as safetensors and fsync it; returns (SHA-256 in hexadecimal, size in bytes).

    Each value is a list of one or more arrays of one dtype, laid one after another along the first axis. The bytes
    depend on the arrays alone. A failed write leaves no file.
    """
    # Widest items first: every array then starts at a multiple of its item size, so mapped views are aligned.
    order = sorted(arrays, key=lambda name: (-arrays[name][0].dtype.itemsize, name))

    def describe(name: str) -> HeaderEntry:
        first, rows = arrays[name][0], sum(len(part) for part in arrays[name])
        nbytes = rows * math.prod(first.shape[1:]) * first.dtype.itemsize
        return HeaderEntry(name, _NAMES[first.dtype], [rows, *first.shape[1:]], nbytes)

    digest = hashlib.sha256()
    blocks = (np.ascontiguousarray(part).data for name in order for part in arrays[name])
    size = write_safetensors(path, map(describe, order), blocks, digest=digest)
    return digest.hexdigest(), size


class Arrays(dict[str, np.ndarray]):
    """The arrays of a mapped file by name: read-only views, nothing loaded."""

    def __init__(self, path: Path):
        super().__init__()
        self.path, self._file = path, -1
        self.offsets: dict[str, int] = {}  # in the file, in bytes

    def keep_open(self, file: int) -> None:
        """Let ``read_into`` read from this descriptor. It is closed when the arrays are garbage-collected."""
        self._file = file
        weakref.finalize(self, os.close, file)

    def read_into(self, rows: np.ndarray, name: str, first: int) -> None:
        """Fill ``rows`` (contiguous, of the array's dtype) with those of an array from ``first`` on.

        Reads them with a system call where there is one, because a few rows at a random place of a mapped file cost a
        page fault. That maps the pages around it into this process for good, and if the file is not in memory the
        system reads megabytes around it.

        Raises:
            InputError: the file was cut off meanwhile.
        """
        if self._file < 0:
            rows[:] = self[name][first : first + len(rows)]
        elif os.preadv(self._file, [rows.data], self.offsets[name] + first * self[name].strides[0]) != rows.nbytes:
            raise InputError("was cut off while it was being read", file=self.path)


def map_arrays(path: Path, keep_open: bool = False) -> Arrays:
    """Map a safetensors file.

    Args:
        keep_open: keep the file open for ``Arrays.read_into``.

    Raises:
        InputError: the header or the file's size is wrong.
    """

    def damaged(what: str) -> InputError:
        return InputError(f"damaged safetensors file ({what})", file=path)

    arrays = Arrays(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise damaged(f"{size:,} bytes cannot hold its header")
            header = json.loads(file.read(length))
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if keep_open and hasattr(os, "preadv"):  # not on Windows
                arrays.keep_open(os.dup(file.fileno()))
    except ValueError as error:
        raise error if isinstance(error, InputError) else damaged("its header is not JSON") from None
    if not isinstance(header, dict):
        raise damaged("its header is not an object")
    start = 8 + length
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape = np.dtype(DTYPES[entry["dtype"]]), tuple(int(n) for n in entry["shape"])
            begin, end = (int(n) for n in entry["data_offsets"])
        except (KeyError, TypeError, ValueError, OverflowError):
            raise damaged(f"array {name!r} is not described") from None
        if min(shape, default=0) < 0 or end - begin != math.prod(shape) * dtype.itemsize:
            raise damaged(f"array {name!r} has the wrong size")
        if begin < 0 or start + end > size:
            raise damaged(f"array {name!r} ends after the file")
        arrays[name] = np.ndarray(shape, dtype, buffer=buffer, offset=start + begin)
        arrays.offsets[name] = start + begin
    return arrays
