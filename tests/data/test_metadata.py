"""metadata.py and metadata_files.py: what is accepted means the same in every format, what is wrong is one line."""

import json
import logging
import os
import random
import subprocess
import sys

import pytest

from csm_fast.data.corpus import split_validation
from csm_fast.data.metadata import (
    Conversation,
    MetadataTurn,
    clean_text,
    load_metadata,
    load_speaker_map,
)
from csm_fast.system.errors import InputError

FLAT = [
    {"text": "Hello.", "path": "a.wav"},
    {"text": "A cut.", "path": "sub/b.wav", "start": 0.5, "end": 2, "speaker": 30},
    {"text": "Only an end.", "path": "a.wav", "end": 1.25},
]
CUTS = [(None, None, 999), (0.5, 2.0, 30), (None, 1.25, 999)]


def write(folder, name, content):
    path = folder / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def turns(path, **kwargs):
    kwargs.setdefault("check_files", False)
    return [turn for conversation in load_metadata(path, **kwargs) for turn in conversation.turns]


def message(callable_, *args, **kwargs):
    with pytest.raises(InputError) as caught:
        callable_(*args, **kwargs)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 600, line
    return line


def write_parquet(folder, columns, name="m.parquet"):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), folder / name)
    return folder / name


# What is accepted


def flat_files(folder):
    lines = "\n".join(json.dumps(row) for row in FLAT)
    cells = 'text,path,start,end,speaker\nHello.,a.wav,,,\nA cut.,sub/b.wav,0.5,2,30\n"Only an end.",a.wav,,1.25,\n'
    columns = {
        "text": [row["text"] for row in FLAT],
        "path": [row["path"] for row in FLAT],
        "start": [float("nan"), 0.5, None],
        "end": [None, 2.0, 1.25],
        "speaker": [float("nan"), 30.0, None],
    }
    return [
        write(folder, "m.json", FLAT),
        write(folder, "null.json", [{"start": None, "end": None, "speaker": None, **row} for row in FLAT]),
        write(folder, "m.jsonl", lines),
        write(folder, "crlf.jsonl", lines.replace("\n", "\r\n") + "\r\n"),
        write(folder, "m.csv", cells),
        write(folder, "bom.csv", b"\xef\xbb\xbf" + cells.replace("\n", "\r\n").encode()),
        write(folder, "spaced.csv", cells.replace(",", ", ")),
        write(folder, "nan.csv", cells.replace(",,,\n", ",nan,NaN,nan\n")),
        write(folder, "pandas.csv", cells.replace(",30\n", ",30.0\n")),
        write(folder, "M.TSV", cells.replace(",", "\t")),
        write_parquet(folder, columns),
    ]


def test_flat_rows_are_the_same_in_every_format(tmp_path):
    for path in flat_files(tmp_path):
        got = load_metadata(path, check_files=False)
        assert [conversation.row for conversation in got] == [1, 2, 3], path
        flat = [turn for conversation in got for turn in conversation.turns]
        assert [turn.text for turn in flat] == [row["text"] for row in FLAT], path
        assert [turn.audio_path for turn in flat] == [str(tmp_path / row["path"]) for row in FLAT], path
        assert [(turn.start, turn.end, turn.speaker) for turn in flat] == CUTS, path
        assert [(turn.row, turn.file) for turn in flat] == [(str(i), str(path)) for i in (1, 2, 3)]
        assert all(type(turn.speaker) is int for turn in flat), path


def test_conversations(tmp_path):
    one = [{"text": "Hi.", "audio_path": "a.wav", "speaker": 1}, {"text": "Oh.", "audio_path": "b.wav"}]
    two = [{"text": "So.", "audio_path": "c.wav", "speaker_id": "2"}]
    columns = {"turns": [one, two]}
    for path in (
        write(tmp_path, "m.json", [one, two]),
        write(tmp_path, "m.jsonl", f"{json.dumps(one)}\n\n{json.dumps({'turns': two})}\n"),
        write(tmp_path, "o.json", [{"conversation": one}, two]),
        write_parquet(tmp_path, columns),
    ):
        got = load_metadata(path, check_files=False)
        assert [len(conversation.turns) for conversation in got] == [2, 1], path
        assert [[turn.speaker for turn in conversation.turns] for conversation in got] == [[1, 0], [2]], path
        last = 3 if path.suffix == ".jsonl" else 2  # a .jsonl row is its line, so that an editor finds it
        assert [turn.row for c in got for turn in c.turns] == ["1, turn 1", "1, turn 2", f"{last}, turn 1"]


def test_synonyms_and_default_speaker(tmp_path):
    rows = [
        {"text": "a", "audio": "a.wav", "speaker": 3, "speaker_id": 3},
        {"text": "b", "audio_path": "b.wav", "path": "b.wav"},
        [{"text": "c", "path": "c.wav"}],
    ]
    path = write(tmp_path, "m.json", rows)
    assert [turn.speaker for turn in turns(path)] == [3, 999, 0]
    assert [turn.speaker for turn in turns(path, default_speaker=7)] == [3, 7, 7]
    assert [turn.speaker for turn in turns(path, omit_speaker_id=True)] == [-1, -1, -1]


def test_home_folder_and_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "a.wav", "x")
    rows = [{"text": "a", "path": "~/a.wav"}, {"text": "b", "path": str(tmp_path / "a.wav")}]
    write(tmp_path, "m.json", rows)
    got = load_metadata("~/m.json")
    assert {turn.audio_path for conversation in got for turn in conversation.turns} == {str(tmp_path / "a.wav")}


@pytest.mark.parametrize(
    "value, expected", [(5, 5), (30.0, 30), ("12", 12), (" 7 ", 7), ("30.0", 30), (2**31 - 1,) * 2]
)
def test_speakers(tmp_path, value, expected):
    assert turns(write(tmp_path, "m.json", [{"text": "a", "path": "a.wav", "speaker": value}]))[0].speaker == expected


def test_speaker_map(tmp_path):
    rows = [{"text": "a", "path": "a.wav", "speaker": s} for s in ("alice", " José", "Jose\u0301", 4, "5")]
    path = write(tmp_path, "m.json", rows)
    for speakers in (
        write(tmp_path, "map.yaml", "alice: 0\nJosé: 11\n"),
        write(tmp_path, "map.json", {"alice": 0, "Jose\u0301": 11}),
    ):
        assert [turn.speaker for turn in turns(path, speaker_map=speakers)] == [0, 11, 11, 4, 5]
    assert load_speaker_map(tmp_path / "map.yaml") == {"alice": 0, "José": 11}


def test_texts_are_cleaned_and_nothing_else():
    assert clean_text("  Hello,  world \n\t there ") == "Hello,  world there"
    assert clean_text("Cafe\u0301") == "Café"
    assert clean_text("\ufeffHi\u2028you") == "Hi you"
    assert clean_text('"[2] <|end_of_text|>"') == '"[2] <|end_of_text|>"'
    assert clean_text("می\u200cروم") == "می\u200cروم"  # the joiner is part of the spelling
    assert len(clean_text("x" * 20_000)) == 20_000


def test_a_text_that_looks_like_a_speaker_tag_warns_once(tmp_path, caplog):
    texts = ("fine", "[1] hm", "[22]x", "[laughs] hi")
    rows = [{"text": t, "path": "a.wav", "start": i} for i, t in enumerate(texts)]
    with caplog.at_level(logging.WARNING, "csm_fast"):
        assert turns(write(tmp_path, "m.json", rows))[1].text == "[1] hm"
    assert len(caplog.records) == 1
    line = caplog.records[0].getMessage()
    assert "m.json, row 2" in line and "[1]" in line and "(and 1 more)" in line


def test_rows_that_are_there_twice_warn_once(tmp_path, caplog):
    def said(*rows):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "csm_fast"):
            load_metadata(write(tmp_path, "m.json", list(rows)), check_files=False)
        return [record.getMessage() for record in caplog.records]

    row, other = {"text": "Hi.", "path": "a.wav"}, {"text": "Bye.", "path": "b.wav"}
    again = {**row, "path": "./a.wav", "speaker": 999}
    (line,) = said(row, other, again, row)
    assert "m.json, row 3 is row 1 again" in line and "(and 1 more)" in line
    (line,) = said(other, row, {**row, "text": "Ho."})
    assert "row 3: a.wav has another text than in row 2: 'Ho.' and 'Hi.'" in line and "more" not in line
    # A cut of it, another speaker's, and the turns of conversations that overlap are not the same.
    assert said(row, {**row, "start": 1}, {**row, "end": 1}, {**row, "speaker": 3}) == []
    turn, next_one = ({"text": r["text"], "audio_path": r["path"], "speaker": 0} for r in (row, other))
    assert said([turn, next_one], [next_one, turn], [turn]) == []
    (line,) = said([turn, next_one], [turn], [turn, next_one])
    assert "row 3 is row 1 again" in line


def test_import_is_light():
    heavy = "torch transformers soundfile pyarrow tokenizers"
    code = "import sys, csm_fast.data.metadata, csm_fast.data.text\n"
    code += f"print([m for m in '{heavy}'.split() if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


# Files that are refused

FILES = {
    "empty.json": (b"", "is empty"),
    "blank.jsonl": ("\n \n", "is empty"),
    "list.json": ("[]", "no rows"),
    "head.csv": ("text,path\n", "no rows"),
    "object.json": ({"data": []}, "holds an object, not a list"),
    "number.json": ("3", "holds 3, not a list"),
    "syntax.json": ('[\n{"text": "a",\n "path" "b"}]', "line 3, column 9"),
    "lines.json": ('{"text": "a", "path": "b"}\n{"text": "c"}', "name the file .jsonl"),
    "syntax.jsonl": ('{"text": "a", "path": "b"}\n{"text": \n', "line 2"),
    "deep.json": ("[" * 100_000, "invalid JSON"),
    "digits.json": ("[" + "9" * 5000 + "]", ""),
    "latin.csv": (b"text,path\nok,a.wav\nGr\xfc\xdfe,b.wav\n", "line 3 is not UTF-8; save it as UTF-8"),
    "wide.json": ("[]".encode("utf-16"), "is UTF-16"),
    "m.pkl": (b"\x80\x04", "pickle"),
    "m.hdf5": (b"\x89HDF", "HDF5"),
    "m.sql": ("create table", "sqlite3 -header -csv"),
    "m.txt": ("a|b", "unknown metadata format '.txt'; give json, jsonl, csv, tsv or parquet"),
    "noformat": ("a", "unknown metadata format ''"),
    "m.parquet": (b"PAR1 not really", "is not a readable parquet file"),
    "none.parquet": (b"", "is empty"),
    "semi.csv": ("text;path\na;b.wav\n", "separated by ';'"),
    "tabs.csv": ("text\tpath\na\tb.wav\n", "save it with commas as .csv, or with tabs as .tsv"),
    "twice.csv": ("text,path,text\na,b.wav,c\n", "the column 'text' is there twice; keep one"),
    "unnamed.csv": (",text,path\n0,a,b.wav\n", "column 1 has no name"),
    "column.csv": ("text,path,emotion\na,b.wav,sad\n", "unknown column 'emotion'; remove it; known: text, path"),
    "near.csv": ("text,paht\na,b.wav\n", "unknown column 'paht'; did you mean 'path'?"),
    "notext.csv": ("path\na.wav\n", "no column 'text'"),
    "nopath.csv": ("text\nhello\n", "no column 'path'"),
    "quote.csv": ('text,path\n"a,b.wav\n', "put double quotes"),
    "cells.csv": ("text,path\na,b.wav\nWell, yes,c.wav\n", "row 2: 3 cells under 2 columns"),
    "huge.csv": ("text,path\n" + "x" * 200_000 + ",a.wav\n", "field larger than field limit"),
}


@pytest.mark.parametrize("name", FILES)
def test_bad_files(tmp_path, name):
    content, expected = FILES[name]
    path = write(tmp_path, name, content)
    line = message(load_metadata, path, check_files=False)
    assert line.startswith(str(path)) and ";" in line and expected in line, line


def test_bad_parquet_columns(tmp_path):
    path = write_parquet(tmp_path, {"text": ["a"], "audio": [{"bytes": b"x", "path": "p"}]})
    assert "row 1: the audio lies in the table itself; write it to files" in message(load_metadata, path)
    path = write_parquet(tmp_path, {"text": ["a"], "path": ["a"], "lang": ["en"]})
    assert "unknown column 'lang'" in message(load_metadata, path)
    path = write_parquet(tmp_path, {"text": ["a"], "path": ["a"], "__index_level_0__": [7]})
    assert turns(path)[0].text == "a"
    path = write_parquet(tmp_path, {"text": ["a", "b"], "path": ["a", "b"], "start": [1.0, float("inf")]})
    assert "row 2: start is inf" in message(load_metadata, path)


def test_missing_file_and_folder(tmp_path):
    assert "no such file; check the path" in message(load_metadata, tmp_path / "m.json")
    assert "is a folder" in message(load_metadata, tmp_path)
    write(tmp_path, "m.csv", "text,path\n")
    assert f"give {tmp_path / 'm.csv'}" in message(load_metadata, tmp_path)


# Rows that are refused: (what differs from a good row, the message)

ROWS = {
    "unknown key": ({"txet": "a"}, "unknown key 'txet'; did you mean 'text'? known: text, path"),
    "unrelated key": ({"quality": 1}, "unknown key 'quality'; remove it"),
    "no text": ({"text": None}, "no 'text'"),
    "no path": ({"path": None}, "no 'path'"),
    "mistyped text": ({"text": 5}, "text is 5, not a string"),
    "mistyped path": ({"path": ["a.wav"]}, "path is ['a.wav'], not a file name"),
    "empty path": ({"path": " "}, "path is ' '"),
    "nul in path": ({"path": "a\0.wav"}, "not a file name"),
    "url": ({"path": "https://host/a.wav"}, "download the recording"),
    "two paths": ({"audio_path": "b.wav"}, "path is 'a.wav' but audio_path is 'b.wav'; they mean the same"),
    "empty text": ({"text": ""}, "the text is empty"),
    "blank text": ({"text": " \n\t "}, "the text is empty"),
    "invisible text": ({"text": "\u200b\u200b"}, "the text is empty"),
    "long text": ({"text": "x" * 100_000}, "the text is 100,000 characters long; split it; the limit is 20,000"),
    "control character": ({"text": "a\x00b"}, "control character U+0000; remove it"),
    "escape": ({"text": "a\x1b[0m"}, "U+001B"),
    "half a surrogate": ({"text": "\ud83d"}, "U+D83D"),
    "start is text": ({"start": "1.5"}, "start is '1.5', not a number; give seconds"),
    "start is true": ({"start": True}, "start is True, not a number"),
    "start is nan": ({"start": float("nan")}, "start is nan"),
    "end is infinite": ({"end": float("inf")}, "end is inf"),
    "negative start": ({"start": -1}, "start is -1; give seconds from the beginning"),
    "start at end": ({"start": 2, "end": 2.0}, "start 2 is not before end 2"),
    "start past end": ({"start": 3, "end": 2}, "start 3 is not before end 2"),
    "end at zero": ({"end": 0}, "start 0 is not before end 0"),
    "named speaker": ({"speaker": "alice"}, "speaker 'alice' is a name; map names to integers with --speaker-map"),
    "empty speaker": ({"speaker": ""}, "speaker '' is a name"),
    "huge speaker": ({"speaker": 2**31}, "speaker is 2147483648; use an integer from 0 to 2147483647"),
    "endless speaker": ({"speaker": "9" * 5000}, "speaker is '999"),
    "negative speaker": ({"speaker": -1}, "speaker is -1"),
    "negative digits": ({"speaker": "-1"}, "speaker is '-1'"),
    "fractional speaker": ({"speaker": 1.5}, "speaker is 1.5"),
    "boolean speaker": ({"speaker": True}, "speaker is True"),
    "nan speaker": ({"speaker": float("nan")}, "speaker is nan"),
    "list of speakers": ({"speaker": [1]}, "speaker is [1]"),
    "two speakers": ({"speaker": 1, "speaker_id": 2}, "speaker is 1 but speaker_id is 2"),
    "turns and text": ({"turns": [{}]}, "in one row; put everything into the turns"),
}


@pytest.mark.parametrize("case", ROWS)
@pytest.mark.parametrize("conversation", [False, True])
def test_bad_rows(tmp_path, case, conversation):
    change, expected = ROWS[case]
    good = {"text": "Hello.", "path": "a.wav"}
    bad = {**good, **change}
    if conversation and "turns" in bad:
        expected = "unknown key 'turns'"
    path = write(tmp_path, "m.json", [[good], [good, bad]] if conversation else [good, bad])
    line = message(load_metadata, path, check_files=False)
    where = "2, turn 2" if conversation else "2"
    assert line.startswith(f"{path}, row {where}: ") and expected in line, line


@pytest.mark.parametrize(
    "row, expected",
    [
        ("a,b.wav,1:30,2", "start is '1:30', not a number"),
        ('a,b.wav,"1,5",2', "start is '1,5', not a number"),
        ("a,b.wav,inf,2", "start is 'inf', not a number"),
        (",b.wav,1,2", "no 'text'"),
        ("a,,1,2", "no 'path'"),
        ("a,b.wav,-1,2", "start is -1.0"),
    ],
)
def test_bad_cells(tmp_path, row, expected):
    path = write(tmp_path, "m.csv", f"text,path,start,end\nok,a.wav,,\n{row}\n")
    line = message(load_metadata, path, check_files=False)
    assert line.startswith(f"{path}, row 2: {expected}"), line


@pytest.mark.parametrize(
    "content, expected",
    [
        ('[{"text": "a", "path": "a.wav", "text": "b"}]', "row 1: the key 'text' is there twice"),
        ('[[{"text": "a", "path": "a.wav", "path": "b"}]]', "row 1, turn 1: the key 'path' is there twice"),
        ('[{"text": "a", "path": "a.wav"}, []]', "row 2: a conversation without turns"),
        ('[{"text": "a", "path": "a.wav"}, 5]', "row 2: 5 is neither a row"),
        ('["a.wav"]', "row 1: 'a.wav' is neither a row"),
        ('[["a.wav"]]', "row 1, turn 1: 'a.wav' is not a turn"),
        ('[{"turns": "a"}]', "row 1: 'a' is neither"),
    ],
)
def test_bad_structure(tmp_path, content, expected):
    assert expected in message(load_metadata, write(tmp_path, "m.json", content), check_files=False)


def test_the_first_problem_is_told_and_the_others_counted(tmp_path):
    rows = [{"text": "a", "path": "a.wav"}, {"text": "a"}, {"path": "b"}, {"text": "a", "path": "a", "speaker": -3}]
    line = message(load_metadata, write(tmp_path, "m.json", rows), check_files=False)
    assert "row 2: no 'path' (and 2 more rows have problems: 3; 4); name the recording" in line


def test_missing_recordings(tmp_path):
    write(tmp_path, "a.wav", "x")
    (tmp_path / "d.wav").mkdir()
    rows = [{"text": "t", "path": path} for path in ("a.wav", "b.wav", "c.wav", "b.wav")]
    line = message(load_metadata, write(tmp_path, "m.json", rows))
    assert f"row 2: the recording {tmp_path / 'b.wav'} does not exist (and 1 more); check the path" in line
    line = message(load_metadata, write(tmp_path, "m.json", [{"text": "t", "path": "d.wav"}]))
    assert "is a folder" in line


def test_bad_options(tmp_path):
    path = write(tmp_path, "m.json", [{"text": "a", "path": "a.wav"}])
    assert "speaker is -2" in message(load_metadata, path, default_speaker=-2)
    assert "drop --omit-speaker-id" in message(load_metadata, path, default_speaker=2, omit_speaker_id=True)
    path = write(tmp_path, "n.json", [{"text": "a", "path": "a.wav", "speaker": "alise"}])
    speakers = write(tmp_path, "map.yaml", "alice: 0")
    line = message(load_metadata, path, speaker_map=speakers)
    assert "row 1: speaker 'alise' is not in the speaker map; add it there; did you mean 'alice'?" in line


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("m.json", "[1]", "a speaker map is an object"),
        ("m.yaml", "- alice", "a speaker map is an object"),
        ("m.yaml", "", "is empty"),
        ("m.yaml", "alice: [", "row 1: is not YAML"),
        ("m.yaml", "alice: 1\nbob: 2\nalice: 3", "row 3: the key alice is there twice"),
        ("m.json", '{"alice": 1, "alice": 2}', "the name 'alice' is there twice"),
        ("m.yaml", "alice: bob", "speaker 'alice' is 'bob'"),
        ("m.yaml", "alice: true", "speaker 'alice' is True"),
        ("m.yaml", "alice: 1.5", "speaker 'alice' is 1.5"),
        ("m.json", {"alice": -1}, "speaker 'alice' is -1; use 0 to 2147483647"),
        ("m.yaml", "3: 4", "3 is not a name"),
        ("m.json", {"3": 4}, "'3' is not a name"),
        ("m.yaml", "no: 4", "False is not a name"),
    ],
)
def test_bad_speaker_maps(tmp_path, name, content, expected):
    path = write(tmp_path, name, content)
    line = message(load_speaker_map, path)
    assert line.startswith(str(path)) and expected in line, line


def test_speaker_map_that_is_missing(tmp_path):
    assert "cannot be read" in message(load_speaker_map, tmp_path / "none.yaml")


# Validation split


def conversation(row, *paths, folder="/data"):
    made = [
        MetadataTurn(f"text {row}", f"{folder}/{path}", 0, None, None, str(row), f"{folder}/m.json") for path in paths
    ]
    return Conversation(tuple(made), row)


def rows_of(side):
    return {item.row for item in side}


def test_split_is_deterministic_and_independent_of_the_other_rows():
    data = [conversation(i, f"{i}.wav") for i in range(400)]
    train, validation = split_validation(data, 0.1, 0)
    assert 20 <= len(validation) <= 60 and len(train) + len(validation) == 400
    assert [item.row for item in train] == sorted(rows_of(train))
    shuffled = random.Random(1).sample(data, len(data))
    assert rows_of(split_validation(shuffled, 0.1, 0)[1]) == rows_of(validation)
    fewer = [item for item in data if item.row % 3]
    assert rows_of(split_validation(fewer, 0.1, 0)[1]) == {row for row in rows_of(validation) if row % 3}
    moved = [conversation(i, f"{i}.wav", folder="/else/where") for i in range(400)]
    assert rows_of(split_validation(moved, 0.1, 0)[1]) == rows_of(validation)
    assert rows_of(split_validation(data, 0.1, 1)[1]) != rows_of(validation)
    assert rows_of(validation) < rows_of(split_validation(data, 0.2, 0)[1])


def test_a_shared_recording_stays_on_one_side():
    generator = random.Random(0)
    data = [conversation(i, *(f"{generator.randrange(300)}.wav" for _ in range(2))) for i in range(100)]
    data += [conversation(100 + i, f"long{i % 20}.wav") for i in range(100)]
    for seed in range(20):
        sides = split_validation(data, 0.2, seed)
        train, validation = ({turn.audio_path for item in side for turn in item.turns} for side in sides)
        assert train and validation and not train & validation


def test_two_metadata_files_do_not_share_recordings_by_name_but_by_file():
    one, two = (
        [Conversation((MetadataTurn("t", path, 0, None, None, "1", f"/{f}/m.json"),), 1) for path in paths]
        for f, paths in (("a", ["/a/x.wav", "/same.wav"]), ("b", ["/b/x.wav", "/same.wav", "/same.wav"]))
    )
    for seed in range(20):
        train, validation = split_validation(one + two, 0.4, seed)
        paths = [{item.turns[0].audio_path for item in side} for side in (train, validation)]
        assert not paths[0] & paths[1] and len(paths[0] | paths[1]) == 3


def test_both_sides_get_something_and_a_long_recording_stays_in_training():
    for seed in range(30):
        train, validation = split_validation([conversation(1, "a"), conversation(2, "b")], 0.01, seed)
        assert len(train) == len(validation) == 1
        train, validation = split_validation([conversation(1, "a"), conversation(2, "b")], 0.99, seed)
        assert len(train) == len(validation) == 1
        data = [conversation(i, "podcast.wav") for i in range(50)] + [conversation(50 + i, f"{i}") for i in range(5)]
        train, validation = split_validation(data, 0.1, seed)
        assert rows_of(validation) <= set(range(50, 55)) and validation


def test_bad_splits():
    same = [conversation(1, "a.wav"), conversation(2, "a.wav")]
    assert "shares one recording" in message(split_validation, same, 0.1, 0)
    assert "nothing to split" in message(split_validation, [], 0.1, 0)
    for fraction in (0, 1, -0.1, 2, float("nan"), True, "0.1"):
        assert "validation fraction" in message(split_validation, same, fraction, 0)


def test_a_table_without_names_of_columns(tmp_path):
    path = tmp_path / "clips.csv"
    path.write_text("hello,one.wav,0\nagain,two.wav,0\n")
    with pytest.raises(InputError, match="clips.csv: the first line names no column .*; add one before it: text,path"):
        load_metadata(path)
    path.write_text("txt,pth\nhello,one.wav\n")
    with pytest.raises(InputError, match="did you mean 'text'"):
        load_metadata(path)
