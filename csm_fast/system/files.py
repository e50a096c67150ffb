"""Atomic text, bytes and folders; the table of disk errors; JSON and hashes of files."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from csm_fast.system.errors import InputError

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


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def disk_error(error: BaseException, where: Path, what: str) -> InputError:
    """The one line for a disk that is full, read-only or gone."""
    code = getattr(error, "errno", None)
    if code in (errno.ENOSPC, errno.EDQUOT):
        return InputError(f"the disk is full: {what}", file=where, mend="free space and run the same command again")
    if code in (errno.EACCES, errno.EROFS, errno.EPERM):
        return InputError(f"not writable: {what}", file=where, mend="choose another --output-dir")
    if code in (errno.EEXIST, errno.ENOTDIR, errno.ENOENT, errno.EISDIR):
        return InputError(f"{what} ({error})", file=where, mend="choose another --output-dir")
    return InputError(f"{what} ({error})", file=where, mend="check the disk and run the same command again")


def _fsync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read as JSON ({error})", file=file, mend="copy or download it again") from None
    if not isinstance(values, dict):
        raise InputError("is not a JSON object", file=file, mend="copy or download it again")
    return values
