"""Files and folders that are whole or absent, one table of disk errors, and text, JSON and hashes of files."""

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

_FREE_SPACE = "free some space and run the same command again; what is done is kept"
_CHOOSE = "choose another output directory"
_DISK_ERRORS = {
    errno.ENOSPC: ("the disk is full", _FREE_SPACE),
    errno.EDQUOT: ("the disk quota is used up", _FREE_SPACE),
    errno.EFBIG: ("a file-size limit was reached", "raise it (ulimit -f) and run the same command again"),
    errno.EACCES: ("no permission to write here", f"change its permissions, or {_CHOOSE}"),
    errno.EPERM: ("no permission to write here", f"change its permissions, or {_CHOOSE}"),
    errno.EROFS: ("the file system is read-only", _CHOOSE),
    errno.ENOENT: ("a folder of this path does not exist", _CHOOSE),
    errno.ENOTDIR: ("a part of this path is a file", _CHOOSE),
    errno.EEXIST: ("a file of this name is in the way", _CHOOSE),
    errno.EISDIR: ("a folder of this name is in the way", _CHOOSE),
}


def disk_error(error: BaseException, where: str | os.PathLike[str], what: str = "cannot write") -> InputError:
    """The one line for a write that the operating system refused.

    Args:
        where: the file or folder that the user knows.
        what: what could not be done.
    """
    reason, mend = _DISK_ERRORS.get(getattr(error, "errno", None) or 0, (str(error), f"check the disk, or {_CHOOSE}"))
    return InputError(f"{what}: {reason}", file=where, mend=mend)


@contextmanager
def writing_to(where: str | os.PathLike[str], what: str = "cannot write") -> Iterator[None]:
    """Raise the operating system's refusal to write (full disk, no permission) as a ``disk_error``."""
    try:
        yield
    except OSError as error:
        raise disk_error(error, where, what) from error


def fsync_path(path: Path) -> None:
    """Make a file's bytes, or the names inside a folder, durable. A rename is durable once its folder is synced."""
    if os.name != "posix" and path.is_dir():  # Windows cannot open folders, and orders these writes itself
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replace_file(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Give a temporary path beside ``path``. The file written there replaces ``path`` in one step when the block ends,
    or is removed when the block raises.

    Args:
        shared: several processes may do so at once. The temporary names then differ, and a process that is killed
            leaves its file behind, where otherwise the next one overwrites it.
    """
    temporary = path.with_name(f".{path.name}{f'.{os.getpid()}' if shared else ''}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def write_file(path: Path, data: str | bytes) -> None:
    """Write a small file, whole or not at all; text as UTF-8."""
    with replace_file(path) as temporary, open(temporary, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())


def replace_directory(new: Path, path: Path) -> None:
    """Put the directory ``new`` at ``path``, whatever was there; a kill at any moment leaves the old or the new one.

    rename() does not replace a directory that holds files, so one system call exchanges the two. On file systems
    without that call it takes two renames. Between them the old directory is at ``old_directory(path)``, where readers
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
    fsync_path(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def old_directory(path: Path) -> Path:
    """Where ``replace_directory`` keeps the old directory between its two renames."""
    return path.with_name(f".{path.name}.old")


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two names atomically (Linux renameat2, macOS renamex_np); False where the system cannot."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            return libc.renamex_np(os.fsencode(a), os.fsencode(b), ctypes.c_uint(2)) == 0  # RENAME_SWAP
        at_cwd, exchange = -100, ctypes.c_uint(2)  # AT_FDCWD, RENAME_EXCHANGE
        return libc.renameat2(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), exchange) == 0
    except (OSError, TypeError, AttributeError):  # no libc to load, or one without the call
        return False


def read_text(file: Path) -> str:
    """A whole UTF-8 file, with or without a byte-order mark; an ``InputError`` if it cannot be read or is not UTF-8."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", file=file, mend="check the path") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        utf16 = content[:2] in (b"\xff\xfe", b"\xfe\xff")
        what = "is UTF-16" if utf16 else f"line {line} is not UTF-8"
        raise InputError(what, file=file, mend="save it as UTF-8") from None


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file; an ``InputError`` if it cannot be read or is not an object."""
    mend = "copy or download it again"
    try:
        values = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read as JSON ({error})", file=file, mend=mend) from None
    if not isinstance(values, dict):
        raise InputError("is not a JSON object", file=file, mend=mend)
    return values


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal, in constant memory."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
