"""Recordings, metadata and settings that ``csm-fast pretokenize`` refuses in one line; nothing is lost."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from command_cases import truncate, write_metadata, write_sound
from pretokenize_fakes import RATE, FakeCodec, FakeTokenizer, write_wav

from csm_fast import cli
from csm_fast.data.token_store import open_split

pytestmark = pytest.mark.usefixtures("home", "fresh_log")


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Two good recordings in their metadata, and the tokens of an earlier run on them."""
    monkeypatch.setattr("csm_fast.data.pretokenize.load_codec", lambda *args, **options: FakeCodec())
    monkeypatch.setattr("csm_fast.data.pretokenize.load_text_tokenizer", lambda *args: FakeTokenizer())
    write_wav(tmp_path / "a.wav", 0.5, 1)
    write_wav(tmp_path / "b.wav", 0.7, 2)
    write_metadata(tmp_path, [{"text": "one", "path": "a.wav"}, {"text": "two", "path": "b.wav"}])
    assert cli.main(pretokenize_args()) == 0
    return tmp_path


def pretokenize_args(*extra: str, file: str = "train.json") -> list[str]:
    return ["pretokenize", "--train-data", file, "--output", "tokens", "--workers", "0", *extra]


def nan_wave(path: Path) -> None:
    wave = np.full(RATE, 0.1, np.float32)
    wave[RATE // 2] = np.nan
    write_sound(path, wave, subtype="FLOAT")


AUDIO = {
    "missing": (lambda p: None, "does not exist", "check the path"),
    "empty": (lambda p: p.write_bytes(b""), "is empty (0 bytes)", "copy it again"),
    "no samples": (lambda p: write_sound(p, np.zeros(0, np.float32)), "has no samples", "record it again"),
    "text": (lambda p: p.write_text("hello, I am a text " * 99), "is not audio", "convert it to wav or flac"),
    "not a number": (nan_wave, "NaN or infinite samples, the first at 0.500 s", "export it again"),
    "truncated": (lambda p: (write_wav(p, 1, 3), truncate(p, 20_000)), "is truncated", "copy it again"),
    "a truncated header": (lambda p: (write_wav(p, 1, 3), truncate(p, 20)), "c.wav is", "convert it"),
    "a folder": (lambda p: p.mkdir(), "is a folder", "check the path"),
    "too short": (lambda p: write_wav(p, 0.05, 3), "gives only 50 ms", "at least 80 ms"),
    "too long": (lambda p: write_wav(p, 200, 3, rate=8000), "2,500 frames", "cut it with start and end"),
}


@pytest.mark.parametrize("case", AUDIO)
def test_recordings(data, refused, case):
    make, *words = AUDIO[case]
    make(data / "c.wav")
    write_metadata(data, [{"text": "one", "path": "a.wav"}, {"text": "three", "path": "c.wav"}])
    refused(pretokenize_args(), "train.json, row 2: ", *words)


def test_a_bad_recording_can_be_left_out_and_is_listed(data, capsys):
    (data / "c.wav").write_bytes(b"")
    write_metadata(data, [{"text": "one", "path": "a.wav"}, {"text": "three", "path": "c.wav"}])
    assert cli.main(pretokenize_args("--skip-bad")) == 0
    assert len(open_split("tokens", "train")) == 1
    (listed,) = json.loads((data / "tokens" / "report.json").read_text())["skipped"]["listed"]
    assert "train.json, row 2: " in listed["reason"] and "empty (0 bytes)" in listed["reason"]


def test_high_rates_and_many_channels_work(data):
    rng = np.random.default_rng(0)
    write_sound(data / "fast.wav", rng.normal(0, 0.1, 192_000), 192_000)
    write_sound(data / "wide.wav", rng.normal(0, 0.1, (48_000, 8)), 48_000)
    write_metadata(data, [{"text": "one", "path": "fast.wav"}, {"text": "two", "path": "wide.wav"}])
    assert cli.main(pretokenize_args()) == 0
    store = open_split("tokens", "train")
    assert [len(store.conversation(i)[0].codes) for i in range(2)] == [13, 13]


ROW = {"text": "two", "path": "b.wav"}
ROWS = {
    "unknown key": ({**ROW, "spaeker": 1}, "unknown key 'spaeker'", "did you mean 'speaker'?"),
    "no text": ({"path": "b.wav"}, "no 'text'", "write what is said"),
    "no path": ({"text": "two"}, "no 'path'", "name the recording"),
    "mistyped text": ({**ROW, "text": 5}, "text is 5, not a string", "quote it"),
    "mistyped start": ({**ROW, "start": "soon"}, "start is 'soon', not a number", "give seconds"),
    "start past end": ({**ROW, "start": 0.5, "end": 0.2}, "start 0.5 is not before end 0.2", "start before end"),
    "start past the file": ({**ROW, "start": 7}, "is 0.700 s long, but start is 7 s", "correct start"),
    "end past the file": ({**ROW, "end": 7}, "is 0.700 s long, but end is 7 s", "correct end"),
    "negative start": ({**ROW, "start": -1}, "start is -1", "0 or more"),
    "infinite end": ({**ROW, "end": float("inf")}, "end is inf", "give seconds"),
    "empty text": ({**ROW, "text": " \n "}, "the text is empty", "write what is said"),
    "a book": ({**ROW, "text": "x" * 100_000}, "100,000 characters", "split it"),
    "a page": ({**ROW, "text": "x" * 5_000}, "5,007 tokens, a sequence has 2,048 rows", "shorten it"),
    "control characters": ({**ROW, "text": "a\x00b"}, "U+0000", "remove it"),
    "huge speaker": ({**ROW, "speaker": 2**31}, "speaker is 2147483648", "from 0 to 2147483647"),
    "negative speaker": ({**ROW, "speaker": -1}, "speaker is -1", "from 0 to"),
    "half a speaker": ({**ROW, "speaker": 0.5}, "speaker is 0.5", "use an integer"),
    "named speaker": ({**ROW, "speaker": "Ann"}, "speaker 'Ann' is a name", "--speaker-map FILE"),
    "two paths": ({**ROW, "audio": "a.wav"}, "path is 'b.wav' but audio is 'a.wav'", "keep one of them"),
    "a link": ({**ROW, "path": "https://example.org/b.wav"}, "path is a URL", "download"),
    "not a row": (7, "7 is neither a row", "write an object"),
    "no turns": ([], "a conversation without turns", "remove it"),
}


@pytest.mark.parametrize("case", ROWS)
def test_rows(data, refused, case):
    row, *words = ROWS[case]
    write_metadata(data, [{"text": "one", "path": "a.wav"}, row])
    refused(pretokenize_args(), "train.json, row 2: ", *words)


def test_turns_are_named(data, refused):
    write_metadata(data, [[ROW], [ROW, {**ROW, "speaker": "Ann"}]])
    refused(pretokenize_args(), "train.json, row 2, turn 2: speaker 'Ann' is a name", "--speaker-map")


FILES = {
    "duplicate key": ('[{"text": "a", "text": "b", "path": "a.wav"}]', "train.json, row 1: the key 'text'", "twice"),
    "not JSON": ('[{"text": "a", }]', "invalid JSON at line 1, column 1", "correct it there"),
    "an object": ('{"text": "a", "path": "a.wav"}', "holds an object, not a list of rows", "write [{text, path}"),
    "empty list": ("[]", "no rows", "add one row per recording"),
    "empty": ("", "is empty", "add one row per recording"),
    "deep": ("[" * 100_000, "invalid JSON", "correct it"),
}


@pytest.mark.parametrize("case", FILES)
def test_metadata_files(data, refused, case):
    content, *words = FILES[case]
    write_metadata(data, content)
    refused(pretokenize_args(), "train.json", *words)


def test_other_metadata_files(data, refused):
    (data / "x.csv").write_text("text,path,text\na,a.wav,b\n")
    refused(pretokenize_args(file="x.csv"), "x.csv: the column 'text' is there twice", "keep one")
    (data / "x.csv").write_text("text,path\na,b,a.wav\n")
    refused(pretokenize_args(file="x.csv"), "x.csv, row 1: 3 cells under 2 columns", "double quotes")
    (data / "x.csv").write_bytes("text,path\nGrüße,a.wav\n".encode("latin-1"))
    refused(pretokenize_args(file="x.csv"), "x.csv: line 2 is not UTF-8", "save it as UTF-8")
    (data / "x.parquet").write_text("PAR1 but not really")
    refused(pretokenize_args(file="x.parquet"), "x.parquet: is not a readable parquet file", "write it again")
    refused(pretokenize_args(file="nowhere.json"), "nowhere.json: no such file", "check the path")
    refused(pretokenize_args(file="x.pkl"), "x.pkl: a pickle runs whatever code", "export it")
    (data / "map.yaml").write_text("Ann: 1999-99-99\n")
    write_metadata(data, [{**ROW, "speaker": "Ann"}])
    refused(pretokenize_args("--speaker-map", "map.yaml"), "map.yaml: is not usable YAML", "correct it")
    (data / "map.yaml").write_text("Bob: 1\n")
    refused(
        pretokenize_args("--speaker-map", "map.yaml"), "row 1: speaker 'Ann' is not in the speaker map", "add it there"
    )


def test_pretokenize_settings(data, refused):
    refused(pretokenize_args("--val-fraction", "2"), "fraction 2.0", "between 0 and 1")
    refused(pretokenize_args("--val-fraction", "0.5", "--val-data", "train.json"), "are both given", "give one")
    refused(pretokenize_args("--output", ""), "--output is empty", "name it")
    refused(pretokenize_args("--output", "/dev/null/x"), "/dev/null/x: cannot write", "choose another output directory")
    refused(pretokenize_args("--output", "/proc/x"), "/proc/x: cannot write", "choose another output directory")
    refused(pretokenize_args("--output", "a.wav"), "a.wav: cannot write", "choose another output directory")
    refused(pretokenize_args("--min-seconds", "nan"), "--min-seconds nan", "give 0 or more")
    refused(pretokenize_args("--min-seconds", "100"), "no conversation to store", "check the metadata")
    refused(pretokenize_args("--outptu", "x"), "unrecognized arguments: --outptu", "did you mean --output?")
    refused(["pretokenize"], "--train-data is missing", "metadata of the training set")
    (data / "p.yaml").write_text("train_data: train.json\noutput: tokens\nworkers: 0\n")
    assert cli.main(["pretokenize", "--config", "p.yaml"]) == 0


def test_a_full_disk_while_pretokenizing(data, refused, monkeypatch):
    write_wav(data / "c.wav", 0.5, 9)
    write_metadata(data, [{"text": "three", "path": "c.wav"}])

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        refused(pretokenize_args(), "tokens", "the disk is full", "free some space")
    assert cli.main(pretokenize_args()) == 0
