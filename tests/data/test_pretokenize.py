"""pretokenize: what is encoded, what is reused, what is refused, and what it reports."""

import dataclasses
import errno
import json
import os
import subprocess
import sys
import typing
from pathlib import Path

import numpy as np
import pytest
import soundfile
from paths import ROOT
from pretokenize_fakes import RATE, FakeCodec, FakeTokenizer, load, make_data, refused, run, save, stores, write_wav

from csm_fast.config.commands import PretokenizeConfig
from csm_fast.data import code_cache
from csm_fast.data.token_store import open_split
from csm_fast.system.lock import Lock


@pytest.fixture
def data(tmp_path):
    return make_data(tmp_path)


def test_codes_text_and_order(data):
    report, codec = run(data)
    store = open_split(data / "tokens", "train")
    rows = load(data)
    assert len(store) == len(rows) == codec.clips == 12
    assert store.codec["fingerprint"] == codec.fingerprint and store.manifest["resampler"] == "soxr-HQ"
    assert store.text_tokenizer == {"name": "letters", "fingerprint": "t" * 64, "vocab_size": 300}
    for i, row in enumerate(rows):
        (turn,) = store.conversation(i)
        assert turn.speaker == row.get("speaker", 999) and turn.source_index == i
        assert turn.text.tolist() == FakeTokenizer().encode(row["text"], turn.speaker)
        if i < 10:
            assert len(turn.codes) == -(-int((0.3 + 0.11 * i) * RATE) // 1920)
    wave, _ = soundfile.read(data / "0.wav", dtype="float32")
    np.testing.assert_array_equal(store.conversation(0)[0].codes, FakeCodec().encode([wave])[0])
    assert report == json.loads((data / "tokens" / "report.json").read_text()) | {"run": report["run"]}
    assert report["run"]["clips_encoded"] == 12
    assert sorted(p.name for p in (data / "tokens").iterdir()) == [".cache", "report.json", "train"]


@pytest.mark.slow
def test_worker_processes_and_batches_give_the_same_codes(data):
    run(data)
    wanted = stores(data)
    _, codec = run(data, output="two", workers=2)
    assert stores(data, "two") == wanted and all(len(batch) == 1 for batch in codec.batches)
    codec = FakeCodec(device="cuda")
    run(data, codec, output="three", workers=2, batch_seconds=3.0)
    assert stores(data, "three") == wanted
    assert codec.clips == 12 and len(codec.batches) < 8
    assert all(len(batch) * max(batch) <= 3 * RATE for batch in codec.batches)


def test_a_second_run_encodes_nothing_and_changes_nothing(data):
    run(data)
    wanted = stores(data)
    report, codec = run(data)
    assert codec.clips == 0 and report["run"]["clips_encoded"] == 0
    assert stores(data) == wanted
    assert [p.name for p in (data / "tokens" / ".cache").iterdir() if p.name.startswith("part")] == []


def test_unchanged_files_are_not_read_again(data, monkeypatch):
    run(data)
    monkeypatch.setattr("csm_fast.data.audio.hash_content", lambda path: pytest.fail(f"{path} read again"))
    assert run(data)[1].clips == 0


def test_changed_metadata_costs_only_what_is_new(data):
    run(data)
    rows = load(data)
    first = open_split(data / "tokens", "train").conversation(5)[0].codes.copy()

    save(data, [rows[5], *rows[:5], *rows[6:11]])  # one moved, one removed
    assert run(data)[1].clips == 0
    store = open_split(data / "tokens", "train")
    assert len(store) == 11
    np.testing.assert_array_equal(store.conversation(0)[0].codes, first)

    rows[3]["text"] = "a corrected transcript"
    save(data, rows[:11])
    assert run(data)[1].clips == 0
    turn = open_split(data / "tokens", "train").conversation(3)[0]
    assert turn.text.tolist() == FakeTokenizer().encode("a corrected transcript", 0)

    write_wav(data / "new.wav", 0.7, 77)
    rows[10]["end"] = 1.5  # another cut is other audio
    save(data, [*rows[:11], {"text": "new", "path": "new.wav"}, {"text": "new again", "path": "new.wav"}])
    assert run(data)[1].clips == 2
    store = open_split(data / "tokens", "train")
    assert len(store) == 13
    np.testing.assert_array_equal(store.conversation(11)[0].codes, store.conversation(12)[0].codes)


def test_changed_audio_under_the_same_name_is_encoded_again(data):
    run(data)
    before = open_split(data / "tokens", "train").conversation(4)[0].codes.copy()
    write_wav(data / "4.wav", 0.3 + 0.11 * 4, 99, rate=8000)
    report, codec = run(data)
    assert codec.clips == 1
    assert not np.array_equal(open_split(data / "tokens", "train").conversation(4)[0].codes, before)
    run(data, output="fresh")
    assert stores(data) == stores(data, "fresh")


def test_another_codec_shares_nothing(data):
    run(data)
    _, codec = run(data, FakeCodec(fingerprint="g" * 64))
    assert codec.clips == 12
    assert open_split(data / "tokens", "train").codec["fingerprint"] == "g" * 64


def test_audio_that_changes_while_it_is_read(data, monkeypatch):
    from csm_fast.data import audio

    read = audio.read_audio

    def meddle(path, **options):
        wave = read(path, **options)
        if path.endswith("8.wav"):
            raise AssertionError("read although it had changed")
        write_wav(data / "8.wav", 3, 98)
        return wave

    monkeypatch.setattr(audio, "read_audio", meddle)
    monkeypatch.setattr(audio, "measure_silence", lambda *_: (0.0, 0.0))
    rows = load(data)
    save(data, [rows[0], rows[8]])
    monkeypatch.setattr(
        audio, "read_audio", lambda path, **o: meddle(path, **o) if "0.wav" in path else read(path, **o)
    )
    assert "row 2" in (text := refused(lambda: run(data))) and "changed while it was read" in text
    monkeypatch.undo()
    assert run(data)[1].clips == 1


# ------------------------------------------------------------------------------------------------------- bad input


def spoil(data):
    rows = load(data)
    (data / "2.wav").write_bytes(b"")
    (data / "5.wav").write_text("this is not audio")
    rows[7]["start"] = 90
    save(data, rows)
    return rows


def test_the_first_bad_row_stops_the_run_and_nothing_is_lost(data):
    spoil(data)
    text = refused(lambda: run(data))
    assert "train.json, row 3:" in text and "2.wav" in text and "--skip-bad" in text
    assert not (data / "tokens" / "train").exists()
    rows = load(data)
    save(data, [row for i, row in enumerate(rows) if i not in (2, 5, 7)])
    assert run(data)[1].clips == 7  # rows 1 and 2 were kept


def test_skip_bad_leaves_them_out_and_lists_them(data, capsys):
    rows = spoil(data)
    rows[9]["path"] = "missing.wav"
    save(data, rows)
    for workers in (0, 2):
        report, codec = run(data, skip_bad=True, workers=workers)
        store = open_split(data / "tokens", "train")
        assert store.turn_array("source_index").tolist() == [0, 1, 3, 4, 6, 8, 10, 11]
        skipped = report["skipped"]
        assert (skipped["clips"], skipped["turns"], skipped["conversations"]) == (4, 4, 4)
        assert [entry["row"] for entry in skipped["listed"]] == ["3", "6", "8", "10"]
        assert "missing.wav does not exist" in skipped["listed"][3]["reason"]
    assert "left out: 4 turns" in capsys.readouterr().out


def test_a_conversation_with_a_bad_turn_goes_whole(data):
    def turn(i, **more):
        return {"text": f"turn {i}", "audio_path": f"{i}.wav", "speaker": i % 2, **more}

    save(data, [[turn(0), turn(1)], [turn(2), turn(3, start=50), turn(4)], [turn(5)]])
    assert "row 2" in refused(lambda: run(data))
    report, _ = run(data, skip_bad=True)
    store = open_split(data / "tokens", "train")
    assert store.turn_counts.tolist() == [2, 1]
    assert store.turn_array("source_index").tolist() == [0, 1, 5]
    assert (report["skipped"]["clips"], report["skipped"]["turns"]) == (1, 3)


def test_turns_that_fit_no_sequence(data):
    write_wav(data / "huge.wav", 200, 60, rate=8000)
    write_wav(data / "big.wav", 163.5, 61, rate=8000)
    rows = load(data)
    whole = {"text": "too long whatever the text", "path": "huge.wav"}
    with_text = {"text": "too long with its text", "path": "big.wav"}
    wordy = {"text": "word " * 500, "path": "0.wav"}
    save(data, [*rows[:2], whole])
    text = refused(lambda: run(data))
    assert "row 3: 200.0 s is 2,500 frames; with its text it needs 2,5" in text and "start and end" in text
    save(data, [*rows[:2], with_text])
    text = refused(lambda: run(data))
    assert "163.5 s is 2,044 frames; with its text it needs 2,0" in text
    save(data, [*rows[:2], wordy])
    assert "its text is 2,50" in refused(lambda: run(data))
    save(data, [*rows[:2], whole, with_text, wordy])
    report, codec = run(data, skip_bad=True)
    assert report["skipped"]["clips"] == 3 and codec.clips == 0
    # One clip, two transcripts: only the long one is refused, and also from the cache.
    save(data, [*rows[:2], {**with_text, "text": "a"}, with_text])
    tokens = len(FakeTokenizer().encode("a", 999))
    assert 2044 + tokens + 1 > 2048  # so neither fits
    assert run(data, skip_bad=True)[0]["skipped"]["clips"] == 2
    # A long conversation is fine: packing splits it between turns.
    turns = [{"text": "a", "audio_path": "big.wav", "start": 0, "end": 100, "speaker": 0} for _ in range(3)]
    save(data, [turns])
    run(data)
    assert open_split(data / "tokens", "train").conversation_rows[0] > 2048


def test_length_filters(data):
    report, _ = run(data, min_seconds=0.5, max_seconds=1.2)
    assert report["skipped"]["clips"] == 2 + 1 + 2
    seconds = report["splits"]["train"]["seconds"]
    assert seconds["min"] >= 0.5 and seconds["max"] <= 1.2
    assert "outside --min-seconds 0.5" in report["skipped"]["listed"][0]["reason"]
    assert "no conversation to store" in refused(lambda: run(data, min_seconds=60))
    assert len(open_split(data / "tokens", "train")) == 7


def test_validation_sets(data, capsys):
    rows = load(data)
    save(data, rows[:8])
    save(data, rows[8:], "val.json")
    report, codec = run(data, val_data=str(data / "val.json"))
    assert codec.clips == 12 and report["warnings"] == []
    assert open_split(data / "tokens", "val").turn_array("source_index").tolist() == [0, 1, 2, 3]
    save(data, [rows[2], *rows[8:]], "val.json")
    report, codec = run(data, val_data=str(data / "val.json"))
    assert codec.clips == 0 and "1 recordings are in both" in report["warnings"][0]
    assert "warning: 1 recordings" in capsys.readouterr().out
    run(data)
    assert "removed, this run has no validation set" in capsys.readouterr().err
    assert "no 'val' split" in refused(lambda: open_split(data / "tokens", "val"))
    save(data, rows)
    _, codec = run(data, val_fraction=0.3)
    train, val = (open_split(data / "tokens", s).turn_array("source_index").tolist() for s in ("train", "val"))
    assert sorted(train + val) == list(range(12)) and val
    assert codec.clips == 4  # those that were in the removed val set only
    assert "give one of them" in refused(lambda: run(data, val_fraction=0.3, val_data="x"))


# ------------------------------------------------------------------------------------------------- the output directory


def test_a_second_run_on_the_same_output_is_refused(data):
    lock = Lock(data / "tokens")
    text = refused(lambda: run(data))
    assert f"another pretokenize (process {os.getpid()}) is writing here" in text
    lock.release()
    run(data)


def test_a_full_disk(data, monkeypatch):
    """A part that cannot be written: one line, and what was written before is used."""
    monkeypatch.setattr(code_cache, "FLUSH_SECONDS", 0.0)
    write, calls = code_cache.write_arrays, []

    def fill(path, arrays):
        calls.append(path)
        if len(calls) > 5:
            path.write_bytes(b"part of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, arrays)

    monkeypatch.setattr(code_cache, "write_arrays", fill)
    assert "the disk is full; free some space" in refused(lambda: run(data))
    monkeypatch.undo()
    assert run(data)[1].clips == 7


def test_a_file_size_limit_while_the_store_is_written(data):
    """The real system call failing, in a process of its own."""
    script = (
        "import resource, sys; sys.path[:0] = [sys.argv[1], sys.argv[1] + '/tests/cases']\n"
        "from pathlib import Path; from pretokenize_fakes import run; from csm_fast import InputError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n"
        "try: run(Path(sys.argv[2]))\n"
        "except InputError as error: print(error)\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", script, str(ROOT), str(data)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "cannot write: a file-size limit was reached" in out.stdout and out.stdout.count("\n") == 1
    assert [p.name for p in (data / "tokens").iterdir()] == [".cache"]
    assert run(data)[1].clips == 0  # all of it was in the cache, whose part was small enough


@pytest.mark.parametrize("code, says", [(errno.EACCES, "no permission"), (errno.EROFS, "read-only")])
def test_an_output_that_cannot_be_written(data, monkeypatch, code, says):
    def refuse(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert says in refused(lambda: run(data))


def test_an_output_that_is_a_file(data):
    (data / "tokens").write_text("x")
    assert "cannot write" in refused(lambda: run(data))


# ----------------------------------------------------------------------------------------------------------- the parts


def test_the_report(data, capsys):
    rows = load(data)
    rows[6]["text"] = "far too many letters for a second of sound " * 8
    save(data, rows)
    wave = np.concatenate([np.random.default_rng(0).normal(0, 0.1, RATE), np.zeros(RATE)]).astype(np.float32)
    soundfile.write(data / "1.wav", wave, RATE)
    report, _ = run(data)
    train = report["splits"]["train"]
    assert train["turns"] == train["conversations"] == 12
    assert train["speakers"]["999"]["turns"] == 2 and len(train["speakers"]) == 4
    assert sum(s["hours"] for s in train["speakers"].values()) == pytest.approx(train["hours"], abs=1e-3)
    assert train["trailing_silence"]["above"] == 1
    assert train["trailing_silence"]["longest"][0]["row"] == "2"
    assert train["trailing_silence"]["max"] == pytest.approx(1.0, abs=0.02)
    assert train["leading_silence"]["median"] == pytest.approx(0.05, abs=0.011)
    assert train["characters_per_second"]["worst"][0]["row"] == "7"
    assert len(train["codebooks"]) == 4
    store = open_split(data / "tokens", "train")
    codes = np.concatenate(list(store.code_blocks()))
    for k, use in enumerate(train["codebooks"]):
        _, counts = np.unique(codes[:, k], return_counts=True)
        share = counts / counts.sum()
        assert use == {"codes": len(counts), "entropy": pytest.approx(-(share * np.log(share)).sum(), abs=1e-4)}
    out = capsys.readouterr().out
    assert "speaking-rate outliers in train" in out and max(map(len, out.splitlines()[:-1])) <= 100
    assert "codec      fake\ncodebooks  4\n" in out


def test_progress_without_a_terminal_is_plain_lines(data, capsys, monkeypatch):
    monkeypatch.setattr("csm_fast.system.console.INTERVAL", 0.0)
    run(data)
    err = capsys.readouterr().err
    assert "encoding: 3 of 12 clips" in err and "audio s/s" in err and "left" in err
    assert "\r" not in err and "\x1b" not in err


def test_config_fields_suit_a_command_line():
    kinds = typing.get_type_hints(PretokenizeConfig)
    simple = {str, int, float, bool, type(None)}
    for field in dataclasses.fields(PretokenizeConfig):
        assert field.metadata["help"], field.name
        kind = kinds[field.name]
        assert typing.get_origin(kind) is typing.Literal or set(typing.get_args(kind) or [kind]) <= simple
    for wrong in ({"workers": -1}, {"batch_seconds": 0.0}, {"min_seconds": 5.0, "max_seconds": 1.0}):
        refused(lambda wrong=wrong: PretokenizeConfig("x", **wrong))
