"""Files that are either whole or absent: safetensors written in one pass, mapped without a copy, replaced atomically.

The safetensors layout (8 bytes of length, a JSON header, one block of data) is written here and not through the
library, because a shard is streamed from thousands of small arrays while its hash is taken, and because a full disk
must arrive as the OSError it is. The library reads what is written here, and the other way round (tested).
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import math
import mmap
import os
import shutil
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from csm_fast.system.errors import InputError

DTYPES = {"I64": "<i8", "I32": "<i4", "F32": "<f4", "U16": "<u2", "U8": "|u1"}
_NAMES = {np.dtype(value): name for name, value in DTYPES.items()}
_MAX_HEADER = 1 << 24  # bytes; ours are below 2 kB, so a longer one is damage and not worth allocating for

_WRITE_ERRORS = {
    errno.ENOSPC: ("the disk is full", "free some space and run it again, what is done is kept"),
    errno.EDQUOT: ("the disk quota is used up", "free some space and run it again, what is done is kept"),
    errno.EFBIG: ("a file-size limit was reached", "raise it (ulimit -f) and run it again, what is done is kept"),
    errno.EACCES: ("no permission to write here", "change its permissions or choose another output directory"),
    errno.EPERM: ("no permission to write here", "change its permissions or choose another output directory"),
    errno.EROFS: ("the file system is read-only", "choose another output directory"),
    errno.ENOTDIR: ("a part of this path is a file", "choose another output directory"),
    errno.EEXIST: ("a file of this name is in the way", "choose another output directory"),
}


@contextmanager
def writing_to(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Turn the operating system's refusal to write (full disk, no permission) into an InputError naming `directory`."""
    try:
        yield
    except OSError as error:
        unknown = (error.strerror or str(error), "check the disk, or choose another output directory")
        what, mend = _WRITE_ERRORS.get(error.errno or 0, unknown)
        raise InputError(f"cannot write: {what}", file=directory, mend=mend) from error


def fsync_directory(path: Path) -> None:
    """Make the names inside `path` durable; a rename is not until its directory is synced."""
    if os.name != "posix":  # Windows cannot open directories, and orders these writes itself
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small file whole or not at all: temporary name, fsync, rename."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    fsync_directory(path.parent)


def write_arrays(path: Path, arrays: Mapping[str, Sequence[np.ndarray]]) -> tuple[str, int]:
    """Write `path` as safetensors and fsync it; returns (sha256 in hex, size in bytes).

    Each value is a list of one or more arrays of one dtype, laid one after another along the first axis. The bytes
    depend on the arrays alone. A failed write leaves no file behind.
    """
    # Widest items first: every array then starts at a multiple of its item size, so mapped views are aligned.
    order = sorted(arrays, key=lambda name: (-arrays[name][0].dtype.itemsize, name))
    header, end = {}, 0
    for name in order:
        first = arrays[name][0]
        rows = sum(len(part) for part in arrays[name])
        begin, end = end, end + rows * math.prod(first.shape[1:]) * first.dtype.itemsize
        header[name] = {"dtype": _NAMES[first.dtype], "shape": [rows, *first.shape[1:]], "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    digest = hashlib.sha256()
    try:
        with open(path, "wb") as file:
            for block in (len(text).to_bytes(8, "little"), text):
                file.write(block)
                digest.update(block)
            for name in order:
                for part in arrays[name]:
                    data = np.ascontiguousarray(part).data
                    file.write(data)
                    digest.update(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)  # frees the space of a full disk at once
        raise
    return digest.hexdigest(), 8 + len(text) + end


class Arrays(dict[str, np.ndarray]):
    """The arrays of a mapped file by name: read-only views, nothing loaded."""

    def __init__(self, path: Path):
        super().__init__()
        self.path, self._file = path, -1
        self.offsets: dict[str, int] = {}  # in the file, in bytes

    def keep_open(self, file: int) -> None:
        """Let ``read_into`` read from this descriptor; it is closed when the arrays are collected."""
        self._file = file
        weakref.finalize(self, os.close, file)

    def read_into(self, rows: np.ndarray, name: str, first: int) -> None:
        """Fill ``rows`` (contiguous, of the array's dtype) with those of an array from ``first`` on.

        They are read and not mapped where the system can: a few rows at a random place of a large file would cost a
        page fault, which maps the pages around it into this process for good and, in a file that is not in memory,
        has the system read megabytes around it. Raises InputError for a file that was cut off meanwhile.
        """
        if self._file < 0:
            rows[:] = self[name][first : first + len(rows)]
        elif os.preadv(self._file, [rows.data], self.offsets[name] + first * self[name].strides[0]) != rows.nbytes:
            raise InputError("was cut off while it was being read", file=self.path)


def map_arrays(path: Path, keep_open: bool = False) -> Arrays:
    """Map a safetensors file. ``keep_open``: also for ``Arrays.read_into``, at the cost of another open file.

    Raises InputError where the header does not hold.
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


def file_sha256(path: Path) -> str:
    """Hash a file in constant memory."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def replace_directory(new: Path, path: Path) -> None:
    """Put the directory `new` at `path`, whatever was there; a kill at any moment leaves the old or the new one.

    rename() does not replace a directory that holds files, so the two are exchanged in one system call. File systems
    without that call get two renames; between them the old directory stands at old_directory(path), where readers
    look too.
    """
    old = old_directory(path)
    shutil.rmtree(old, ignore_errors=True)
    if not path.exists():
        os.rename(new, path)
    elif _exchange(new, path):
        os.rename(new, old)
    else:
        os.rename(path, old)
        os.rename(new, path)
    fsync_directory(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def old_directory(path: Path) -> Path:
    """Where replace_directory() keeps the old directory for the moment between its two renames."""
    return path.with_name(f".{path.name}.old")


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names atomically (Linux renameat2, macOS renamex_np); False where the system cannot."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            return libc.renamex_np(os.fsencode(a), os.fsencode(b), ctypes.c_uint(2)) == 0  # RENAME_SWAP
        at_cwd, exchange = -100, ctypes.c_uint(2)  # AT_FDCWD, RENAME_EXCHANGE
        return libc.renameat2(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), exchange) == 0
    except (OSError, TypeError, AttributeError):  # no libc to load, or one without the call
        return False
