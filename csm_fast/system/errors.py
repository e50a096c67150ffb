"""Errors that a user can correct; commands print them as one line."""

from __future__ import annotations

import os


class InputError(ValueError):
    """Bad input from the user: a file, a row, a flag, a configuration.

    Commands print it as one line (no traceback) and exit with status 2. The line reads
    ``<file>, row <row>: <what>; <mend>``, without what was not given.

    Args:
        what: what is wrong, with the offending value.
        file: the file it was found in.
        row: the 1-based row, line or item inside that file (or any short locator).
        mend: what the user should do, in the imperative.
    """

    def __init__(
        self,
        what: str,
        *,
        file: str | os.PathLike[str] | None = None,
        row: int | str | None = None,
        mend: str | None = None,
    ):
        self.what, self.file, self.row, self.mend = what, file, row, mend
        where = ""
        if file is not None:
            where = os.fspath(file)
        if row is not None:
            where += f"{', ' if where else ''}row {row}"
        line = (f"{where}: " if where else "") + what + (f"; {mend}" if mend else "")
        super().__init__(" ".join(line.split()))

    def __reduce__(self):
        # The default reduction loses keyword-only arguments, and these errors are sent between processes.
        return (_rebuild, (self.what, self.file, self.row, self.mend))


class OutOfMemory(InputError):
    """Memory ran out. Commands print it as one line and exit with status 1."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is one of Python's or PyTorch's errors for memory that ran out."""
    line = next(iter(str(error).strip().splitlines()), "")
    # The last is from oneDNN, PyTorch's library of CPU kernels.
    messages = ("out of memory", "allocate memory", "could not create a primitive")
    return isinstance(error, MemoryError) or any(words in line for words in messages)


def _rebuild(what, file, row, mend):
    return InputError(what, file=file, row=row, mend=mend)
