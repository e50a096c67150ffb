"""A lock file that one process at a time holds."""

from __future__ import annotations

import os
from pathlib import Path

from csm_fast.system.errors import InputError
from csm_fast.system.files import writing_to


class Lock:
    """A lock on an output directory, so that one process at a time runs a command there.

    The system releases it when the process ends, however it ends.

    Args:
        name: of the lock file in ``output``.
        command, flag: for the message, what holds the lock, and the flag that names another directory.

    Raises:
        InputError: another process holds the lock, or the file cannot be written.
    """

    def __init__(self, output: Path, name: str = ".cache/lock", command: str = "pretokenize", flag: str = "--output"):
        with writing_to(output):
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            self._file = open(output / name, "a+", encoding="utf-8")  # noqa: SIM115  open while the lock is held
        try:
            import fcntl
        except ImportError:  # no file locks on Windows: concurrent runs are not detected
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "unknown"
            self._file.close()
            mend = f"wait for it, or choose another {flag}"
            raise InputError(f"another {command} (process {holder}) is writing here", file=output, mend=mend) from None
        except OSError:  # file systems such as mounted cloud drives have no locks
            return
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()

    def release(self) -> None:
        self._file.close()
