"""From the rows of a metadata file to conversations of turns, with every row checked.

Two shapes of row, in .json, .jsonl, .csv, .tsv or .parquet:

* flat rows ``{text, path, start?, end?, speaker?}``: each becomes a conversation of one turn;
* conversations: lists of ``{text, audio_path, speaker}`` (or an object with one key, ``turns`` or ``conversation``).

``path``, ``audio_path`` and ``audio`` mean the same, and so do ``speaker`` and ``speaker_id``. An optional value is
absent if it is missing, null, an empty cell, or NaN in a table. Rows with it and rows without it may be mixed.
"""

from __future__ import annotations

import difflib
import logging
import math
import os
import re
import unicodedata
from collections.abc import Mapping, Sized
from dataclasses import dataclass
from typing import Any

from csm_fast.config.parse import parse_yaml
from csm_fast.data.metadata_files import (
    AUDIO,
    NUMBER,
    SPEAKER,
    TEXT,
    TURNS,
    JsonObject,
    check_key,
    parse_json,
    read_filled_text,
    read_rows,
    show,
)
from csm_fast.data.text import NO_SPEAKER
from csm_fast.system.errors import InputError

MAX_TEXT_CHARS = 20_000
MAX_SPEAKER = 2**31 - 1
FLAT_SPEAKER, CONVERSATION_SPEAKER = 999, 0  # what sesame-finetune and csm-mlx give a row that names no speaker

_LINE_BREAKS = re.compile("\\s*[\t\n\v\f\r\x85\u2028\u2029]\\s*")
# Control characters except line breaks, and lone halves of surrogate pairs, which no tokenizer can encode.
_UNSPEAKABLE = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff]")
_log = logging.getLogger("csm_fast")


@dataclass(frozen=True, slots=True)
class MetadataTurn:
    """A transcript and its recording, or the cut of one.

    Attributes:
        text: cleaned by ``clean_text``.
        audio_path: absolute.
        speaker: 0 to 2**31 - 1, or -1 for none.
        start, end: seconds; None is the beginning, or the end, of the recording.
        row, file: for errors. ``row`` is "12" for a flat row, "3, turn 2" (from 1) in a conversation.
    """

    text: str
    audio_path: str
    speaker: int
    start: float | None
    end: float | None
    row: str
    file: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns that attend to each other, and their row (from 1, without headers; the line number in .jsonl)."""

    turns: tuple[MetadataTurn, ...]
    row: int


@dataclass(frozen=True, slots=True)
class _Rules:
    file: str
    folder: str
    speakers: Mapping[str, int] | None
    default_speaker: int | None
    omit_speaker_id: bool


def load_metadata(
    path: str | os.PathLike[str],
    *,
    speaker_map: str | os.PathLike[str] | None = None,
    default_speaker: int | None = None,
    omit_speaker_id: bool = False,
    check_files: bool = True,
) -> list[Conversation]:
    """Read one metadata file, in its order.

    Args:
        path: .json, .jsonl, .csv, .tsv or .parquet, UTF-8. Recordings are relative to its folder; ``~`` is expanded.
        speaker_map: a JSON or YAML file {name: integer}; without it a speaker that is a name is an error.
        default_speaker: for turns without a speaker (default: 999 in flat rows, 0 in conversations).
        omit_speaker_id: give every turn speaker -1, and its text no "[speaker]" prefix; ignore speakers in the file.
        check_files: whether a recording that does not exist is an error.

    Raises:
        InputError: the first problem with its file and row, and how many more rows have a problem.
    """
    if omit_speaker_id and (speaker_map is not None or default_speaker is not None):
        raise InputError("no speaker is written and yet speakers are set", mend="drop --omit-speaker-id or the other")
    if default_speaker is not None:
        default_speaker = _speaker_id(default_speaker, None)
    file = os.path.expanduser(os.fspath(path))
    speakers = None if speaker_map is None else load_speaker_map(speaker_map)
    folder = os.path.dirname(os.path.abspath(file))
    rules = _Rules(file, folder, speakers, default_speaker, omit_speaker_id)

    conversations: list[Conversation] = []
    problems: list[InputError] = []
    for row, item in read_rows(file):
        try:
            conversations.append(_conversation(row, item, rules))
        except InputError as error:
            problems.append(error)
    if problems:
        first, others = problems[0], [str(problem.row) for problem in problems[1:]]
        what = first.what
        if others:
            verb = "row has" if len(others) == 1 else "rows have"
            named = "; ".join(others[:8]) + ("; ..." if len(others) > 8 else "")
            what += f" (and {len(others)} more {verb} problems: {named})"
        raise InputError(what, file=first.file, row=first.row, mend=first.mend)
    if not conversations:
        raise InputError("no rows", file=file, mend="add one row per recording: text, path")
    turns = [turn for conversation in conversations for turn in conversation.turns]
    if check_files:
        _check_recordings(turns)
    tagged = [turn for turn in turns if re.match(r"\[[0-9]+\]", turn.text)]
    if tagged:
        _log.warning(
            "%s, row %s: the text begins with %s, which the model reads as a speaker tag%s",
            file,
            tagged[0].row,
            tagged[0].text.partition("]")[0] + "]",
            _more(tagged),
        )
    _warn_of_repeats(conversations)
    return conversations


def load_speaker_map(path: str | os.PathLike[str]) -> dict[str, int]:
    """A JSON or YAML file {name: integer}, e.g. ``alice: 0``. Raises InputError on anything else."""
    file = os.path.expanduser(os.fspath(path))
    mend = "write one 'name: integer' per line"
    if os.path.splitext(file)[1].lower() == ".json":
        content = parse_json(read_filled_text(file), file)
        if isinstance(content, JsonObject) and content.repeated is not None:
            raise InputError(f"the name {show(content.repeated)} is there twice", file=file, mend="keep one")
    else:
        content = parse_yaml(read_filled_text(file), file)
    if not isinstance(content, dict) or not content:
        raise InputError("a speaker map is an object {name: integer}", file=file, mend=mend)
    speakers = {}
    for name, value in content.items():
        # If a name could be a number, speaker 3 would mean two things, depending on the quotes of the file format.
        if not isinstance(name, str) or not name.strip() or NUMBER.fullmatch(name.strip()):
            raise InputError(
                f"{show(name)} is not a name", file=file, mend="only names are mapped (quote them in YAML)"
            )
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_SPEAKER:
            raise InputError(f"speaker {show(name)} is {show(value)}", file=file, mend=f"use 0 to {MAX_SPEAKER}")
        speakers[_key(name)] = value
    return speakers


def clean_text(text: str) -> str:
    """The transcript as it is tokenized: in NFC, without outer whitespace, with one space for each line break or tab.

    Raises:
        InputError: empty, longer than 20,000 characters, or holding control characters or broken Unicode.
    """
    if len(text) > MAX_TEXT_CHARS:
        raise InputError(
            f"the text is {len(text):,} characters long", mend=f"split it; the limit is {MAX_TEXT_CHARS:,}"
        )
    if bad := _UNSPEAKABLE.search(text):
        raise InputError(f"the text holds the control character U+{ord(bad[0]):04X}", mend="remove it")
    text = unicodedata.normalize("NFC", text.strip("\ufeff"))
    text = _LINE_BREAKS.sub(" ", text).strip()
    if all(c.isspace() or unicodedata.category(c) == "Cf" for c in text):
        raise InputError("the text is empty", mend="write what is said, or remove the row")
    return text


def _conversation(row: int, item: Any, rules: _Rules) -> Conversation:
    if isinstance(item, JsonObject) and item.repeated is not None:
        raise InputError(
            f"the key {show(item.repeated)} is there twice", file=rules.file, row=row, mend="keep one of them"
        )
    if isinstance(item, dict) and any(item.get(key) is not None for key in TURNS):
        given = [key for key in item if item[key] is not None]
        if len(given) > 1:
            what = f"{' and '.join(map(show, given))} in one row"
            raise InputError(what, file=rules.file, row=row, mend="put everything into the turns")
        item = item[given[0]]
    if isinstance(item, dict):
        return Conversation((_turn(str(row), item, rules, FLAT_SPEAKER),), row)
    if not isinstance(item, list):
        what = f"{show(item)} is neither a row {{text, path}} nor a list of turns"
        raise InputError(what, file=rules.file, row=row, mend="write an object or a list of objects")
    if not item:
        raise InputError("a conversation without turns", file=rules.file, row=row, mend="remove it")
    turns = tuple(_turn(f"{row}, turn {i}", turn, rules, CONVERSATION_SPEAKER) for i, turn in enumerate(item, 1))
    return Conversation(turns, row)


def _turn(row: str, item: Any, rules: _Rules, no_speaker: int) -> MetadataTurn:
    try:
        if not isinstance(item, dict):
            raise InputError(f"{show(item)} is not a turn", mend="write an object: text, audio_path, speaker")
        if isinstance(item, JsonObject) and item.repeated is not None:
            raise InputError(f"the key {show(item.repeated)} is there twice", mend="keep one of them")
        for key in item:
            check_key(key, "key")
        text = _pick(item, TEXT)
        if text is None:
            raise InputError("no 'text'", mend="write what is said, or remove the row")
        if not isinstance(text, str):
            raise InputError(f"text is {show(text)}, not a string", mend="quote it")
        start, end = _seconds(item.get("start"), "start"), _seconds(item.get("end"), "end")
        if end is not None and (start or 0.0) >= end:
            raise InputError(f"start {start or 0.0:g} is not before end {end:g}", mend="give seconds, start before end")
        text, audio_path = clean_text(text), _audio_path(_pick(item, AUDIO), rules.folder)
        if rules.omit_speaker_id:
            speaker = NO_SPEAKER
        else:
            given = {key: _speaker_id(item[key], rules.speakers) for key in SPEAKER if item.get(key) is not None}
            named = _pick(given, SPEAKER)
            default = no_speaker if rules.default_speaker is None else rules.default_speaker
            speaker = default if named is None else named
        return MetadataTurn(text, audio_path, speaker, start, end, row, rules.file)
    except InputError as error:
        raise InputError(error.what, file=rules.file, row=row, mend=error.mend) from None


def _pick(item: dict, keys: tuple[str, ...]) -> Any:
    given = [key for key in keys if item.get(key) is not None]
    for key in given[1:]:
        if item[key] != item[given[0]]:
            what = f"{given[0]} is {show(item[given[0]])} but {key} is {show(item[key])}"
            raise InputError(what, mend="they mean the same: keep one of them")
    return item[given[0]] if given else None


def _audio_path(value: Any, folder: str) -> str:
    if value is None:
        raise InputError("no 'path'", mend="name the recording ('path' or 'audio_path')")
    if isinstance(value, dict) and {"bytes", "array"} & value.keys():  # Hugging Face's column of audio
        raise InputError("the audio lies in the table itself", mend="write it to files, and give their paths in 'path'")
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise InputError(f"path is {show(value)}, not a file name", mend="name the recording")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", value):
        raise InputError(f"path is a URL, {show(value)}", mend="download the recording and give its path")
    return os.path.abspath(os.path.join(folder, os.path.expanduser(value)))


def _seconds(value: Any, name: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"{name} is {show(value)}, not a number", mend="give seconds, e.g. 12.5, or leave it out")
    if not 0 <= value <= 1e9:  # also refuses NaN and infinities; 1e9 seconds are 30 years
        raise InputError(f"{name} is {show(value)}", mend="give seconds from the beginning, 0 or more")
    return float(value)


def _speaker_id(value: Any, speakers: Mapping[str, int] | None) -> int:
    mend = f"use an integer from 0 to {MAX_SPEAKER}"
    number: float | None = None
    if isinstance(value, str):
        if NUMBER.fullmatch(value.strip()):
            digits = value.strip()
            number = int(digits) if re.fullmatch(r"[0-9]{1,18}", digits) else float(digits)
        elif speakers is None:
            raise InputError(f"speaker {show(value)} is a name", mend="map names to integers with --speaker-map FILE")
        elif _key(value) in speakers:
            return speakers[_key(value)]
        else:
            near = difflib.get_close_matches(_key(value), speakers, 1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise InputError(f"speaker {show(value)} is not in the speaker map", mend=f"add it there{hint}")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        number = value
    if number is None or not math.isfinite(number) or number != int(number) or not 0 <= number <= MAX_SPEAKER:
        raise InputError(f"speaker is {show(value)}", mend=mend)
    return int(number)


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", name.strip())


def _warn_of_repeats(conversations: list[Conversation]) -> None:
    """Warn of rows that are there twice, which count twice in the loss, and of recordings with two texts."""
    of_turns: dict[tuple, int] = {}
    of_cut: dict[tuple[str, float | None, float | None], MetadataTurn] = {}
    repeats, contradictions = [], []
    for conversation in conversations:
        turns = tuple((t.audio_path, t.text, t.speaker, t.start, t.end) for t in conversation.turns)
        if (row := of_turns.setdefault(turns, conversation.row)) != conversation.row:
            repeats.append((conversation.row, row))
        for turn in conversation.turns:
            known = of_cut.setdefault((turn.audio_path, turn.start, turn.end), turn)
            if known.text != turn.text:
                contradictions.append((turn, known))
    if repeats:
        again, row = repeats[0]
        file = conversations[0].turns[0].file
        _log.warning("%s, row %d is row %d again and counts twice%s", file, again, row, _more(repeats))
    if contradictions:
        turn, known = contradictions[0]
        _log.warning(
            "%s, row %s: %s has another text than in row %s: %s and %s%s",
            turn.file,
            turn.row,
            os.path.basename(turn.audio_path),
            known.row,
            show(turn.text),
            show(known.text),
            _more(contradictions),
        )


def _more(found: Sized) -> str:
    """How many there are besides the first, which the message shows."""
    return f" (and {len(found) - 1:,} more)" if len(found) > 1 else ""


def _check_recordings(turns: list[MetadataTurn]) -> None:
    missing = {turn.audio_path: turn for turn in reversed(turns) if not os.path.isfile(turn.audio_path)}
    if not missing:
        return
    turn = next(turn for turn in turns if turn.audio_path in missing)
    kind = "is a folder" if os.path.isdir(turn.audio_path) else "does not exist"
    mend = "check the path; it is relative to the metadata file"
    raise InputError(f"the recording {turn.audio_path} {kind}{_more(missing)}", file=turn.file, row=turn.row, mend=mend)
