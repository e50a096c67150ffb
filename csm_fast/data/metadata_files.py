"""Readers of metadata files: from a file to numbered raw rows. ``metadata`` decides what the rows mean.

A new format is one reader and one line in ``READERS``.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from csm_fast.system.errors import InputError
from csm_fast.system.files import read_text

TEXT, AUDIO, SPEAKER = ("text",), ("path", "audio_path", "audio"), ("speaker", "speaker_id")
KEYS = (*TEXT, *AUDIO, "start", "end", *SPEAKER)
TURNS = ("turns", "conversation")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")

Rows = Iterator[tuple[int, Any]]  # (row, item)
Reader = Callable[[str], Rows]  # of the path of a file


class JsonObject(dict):
    """A JSON object that remembers a repeated key. json.loads alone would silently keep the last value."""

    repeated: str | None = None


def read_rows(file: str) -> Rows:
    """The rows of a metadata file as (row, item).

    Rows are numbered from 1, without headers; in .jsonl they are line numbers. An item from JSON is any value; one from
    a table is a dict of its cells without absent ones (empty, NaN, null).

    Raises:
        InputError: a file that cannot be read or parsed, an unknown format, a wrong header.
    """
    extension = os.path.splitext(file)[1].lower()
    if os.path.isdir(file):
        inside = [name for name in sorted(os.listdir(file)) if os.path.splitext(name)[1].lower() in READERS]
        example = os.path.join(file, inside[0]) if inside else f"a {FORMATS} file"
        raise InputError("is a folder, not a metadata file", file=file, mend=f"give {example}")
    if extension in _REFUSED:
        what, mend = _REFUSED[extension]
        raise InputError(what, file=file, mend=mend)
    if extension not in READERS:
        raise InputError(f"unknown metadata format '{extension}'", file=file, mend=f"give {FORMATS}")
    if not os.path.exists(file):
        raise InputError("no such file", file=file, mend="check the path")
    return READERS[extension](file)


def read_filled_text(file: str) -> str:
    """``read_text`` of a file that must not be empty."""
    text = read_text(Path(file))
    if not text.strip():
        raise InputError("is empty", file=file, mend="add one row per recording: text, path")
    return text


def parse_json(text: str, file: str, line: int | None = None) -> Any:
    """json.loads with ``JsonObject`` for objects; ``line`` is the line of a .jsonl file. Raises InputError."""
    try:
        return json.loads(text, object_pairs_hook=_json_object)
    except json.JSONDecodeError as error:
        mend = "correct it there"
        if line is None and error.msg == "Extra data":
            mend = "put the rows into one list, or name the file .jsonl if every line is a row"
        what = f"invalid JSON at line {line or error.lineno}, column {error.colno}: {error.msg}"
        raise InputError(what, file=file, mend=mend) from None
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; brackets thousands deep
        where = f" at line {line}" if line else ""
        raise InputError(f"invalid JSON{where}: {error}", file=file, mend="correct it") from None


def check_key(key: Any, kind: str) -> None:
    """Refuse an unknown ``key``. The InputError names the known ones, and the one that was probably meant."""
    if key in KEYS:
        return
    near = difflib.get_close_matches(str(key).lower(), (*KEYS, *TURNS), 1)
    known = f"known: {', '.join(KEYS)}"
    mend = f"did you mean '{near[0]}'? {known}" if near else f"remove it; {known}"
    raise InputError(f"unknown {kind} {show(key)}", mend=mend)


def show(value: Any) -> str:
    """A value as messages quote it: at most 60 characters."""
    # Cut before repr as well: the value may be a megabyte long.
    shown = repr(value[:80]) if isinstance(value, str) else repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _json_object(pairs: list[tuple[str, Any]]) -> JsonObject:
    result = JsonObject(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        result.repeated = next(key for i, key in enumerate(keys) if key in keys[:i])
    return result


def read_json_list(file: str) -> Rows:
    content = parse_json(read_filled_text(file), file)
    if not isinstance(content, list):
        what = f"holds {'an object' if isinstance(content, dict) else show(content)}, not a list of rows"
        raise InputError(what, file=file, mend="write [{text, path}, ...] or [[{text, audio_path, speaker}, ...], ...]")
    yield from enumerate(content, 1)


def read_json_lines(file: str) -> Rows:
    # Not splitlines(): a JSON string may hold a line separator such as U+2028.
    for number, line in enumerate(read_filled_text(file).split("\n"), 1):
        if line.strip():
            yield number, parse_json(line, file, number)


def read_separated(file: str, delimiter: str) -> Rows:
    reader = csv.reader(
        io.StringIO(read_filled_text(file), newline=""), delimiter=delimiter, skipinitialspace=True, strict=True
    )
    names: list[str] = []
    row = 0
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if not names:
                names = [cell.strip() for cell in cells]
                _check_columns(names, file, delimiter)
                continue
            row += 1
            if len(cells) > len(names):
                what = f"{len(cells)} cells under {len(names)} columns"
                mend = "put double quotes around a text that holds the separator"
                raise InputError(what, file=file, row=row, mend=mend)
            yield (
                row,
                {key: value for key, cell in zip(names, cells, strict=False) if (value := _cell(key, cell)) != ""},
            )
    except csv.Error as error:
        mend = 'put double quotes around texts that hold quotes or separators, and write a quote inside as ""'
        raise InputError(f"line {reader.line_num}: {error}", file=file, mend=mend) from None


def _cell(key: str, cell: str) -> str | float:
    cell = cell.strip()
    if key in ("start", "end"):
        if NUMBER.fullmatch(cell):
            return float(cell)
        return "" if cell.lower() == "nan" else cell
    # Only pandas' own spelling: "Nan" is a name, and in a text even "nan" is a word.
    return "" if key in SPEAKER and cell == "nan" else cell


def _check_columns(names: list[str], file: str, delimiter: str) -> None:
    if len(names) == 1:
        for other in ";\t,":
            if other != delimiter and other in names[0]:
                what = f"the columns are separated by {other!r}, not {delimiter!r}"
                raise InputError(what, file=file, mend="save it with commas as .csv, or with tabs as .tsv")
    if not any(difflib.get_close_matches(name.lower(), (*KEYS, *TURNS), 1) for name in names):
        raise InputError(
            "the first line names no column that is known here", file=file, mend="add one before it: text,path,speaker"
        )
    for i, name in enumerate(names):
        try:
            if not name:
                raise InputError(f"column {i + 1} has no name", mend="name or remove it (pandas: index=False)")
            if name in names[:i]:
                raise InputError(f"the column {show(name)} is there twice", mend="keep one of them")
            if name not in TURNS:
                check_key(name, "column")
        except InputError as error:
            raise InputError(error.what, file=file, mend=error.mend) from None
    for group, what in ((TEXT, "no column 'text'"), (AUDIO, "no column 'path' (or 'audio_path')")):
        if not any(name in names for name in (*group, *TURNS)):
            raise InputError(what, file=file, mend=f"the first line names the columns, of {', '.join(KEYS)}")


def read_parquet(file: str) -> Rows:
    import pyarrow
    import pyarrow.parquet

    if os.path.getsize(file) == 0:
        raise InputError("is empty", file=file, mend="write it again")
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            # pandas adds columns for its row labels.
            names = [name for name in table.schema_arrow.names if not re.fullmatch(r"__index_level_\d+__", name)]
            _check_columns(names, file, ",")
            row = 0
            for batch in table.iter_batches(columns=names):
                for item in batch.to_pylist():
                    row += 1
                    yield row, _present(item)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        first = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise InputError(f"is not a readable parquet file ({first})", file=file, mend="write it again") from None


def _present(item: Any) -> Any:
    """An item of a table without nulls and NaNs, also inside lists of turns."""
    if isinstance(item, dict):
        return {key: _present(value) for key, value in item.items() if value is not None and value == value}
    return [_present(value) for value in item] if isinstance(item, list) else item


READERS: dict[str, Reader] = {
    ".json": read_json_list,
    ".jsonl": read_json_lines,
    ".csv": partial(read_separated, delimiter=","),
    ".tsv": partial(read_separated, delimiter="\t"),
    ".parquet": read_parquet,
}
_NAMES = [extension[1:] for extension in READERS]
FORMATS = f"{', '.join(_NAMES[:-1])} or {_NAMES[-1]}"
_NO_PICKLE = (
    "a pickle runs whatever code is in it, so it is not opened",
    "export it, e.g. pandas: pandas.DataFrame(rows).to_json('metadata.json', orient='records')",
)
_NO_HDF5 = ("an HDF5 file is not metadata", f"give the file it was made from ({FORMATS})")
_NO_DATABASE = (
    "databases are not read",
    "export the table: sqlite3 -header -csv FILE 'select * from TABLE' > metadata.csv",
)
_REFUSED = {
    **dict.fromkeys((".pkl", ".pickle"), _NO_PICKLE),
    **dict.fromkeys((".hdf5", ".h5"), _NO_HDF5),
    **dict.fromkeys((".sql", ".db", ".sqlite", ".sqlite3"), _NO_DATABASE),
}
