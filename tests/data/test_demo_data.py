"""demo_data.py: the transcript parser, and the ways out when there is no archive."""

import gzip
import json

import numpy as np
import pytest

from csm_fast.data import demo as demo_data
from csm_fast.data.audio import write_wav
from csm_fast.data.demo import fetch_debian_speech, parse_transcripts
from csm_fast.system.errors import InputError

SAMPLE = """; Core Asterisk Sounds in English

activated: Activated.
ascending-2tone: [ascending tones]
confbridge-join: <beep ascending>
silence/10: (10 seconds of silence)
letters/at: at [@]
letters/space: space [ ]
spy-iax2: IAX (note: does not say "2")
dir-multi2: ... for ...
conf-muted: To mute or unmute yourself...
forhelp: press * to pause, press # to go on
priv-callpending: I have a caller waiting, who introduces themselves as:
vm-incorrect:  Login incorrect.  Mailbox?
empty:
a line without a name
"""
EXPECTED = {
    "activated": "Activated.",
    "letters/at": "at",
    "letters/space": "space",
    "spy-iax2": "IAX",
    "dir-multi2": "for",
    "conf-muted": "To mute or unmute yourself",
    "forhelp": "press star to pause, press pound to go on",
    "priv-callpending": "I have a caller waiting, who introduces themselves as:",
    "vm-incorrect": "Login incorrect. Mailbox?",
}


def test_parse_transcripts():
    assert dict(parse_transcripts(SAMPLE.splitlines())) == EXPECTED


def test_sounds_are_named_by_their_descriptions():
    sounds = dict(parse_transcripts(SAMPLE.splitlines(), sounds=True))
    assert {n: t for n, t in sounds.items() if n not in EXPECTED} == {
        "ascending-2tone": "ascending tones",
        "confbridge-join": "beep ascending",
        "silence/10": "10 seconds of silence",
    }
    assert {n: sounds[n] for n in EXPECTED} == EXPECTED


def test_fetch_writes_metadata_once(tmp_path, monkeypatch, capsys):
    from csm_fast.data.metadata import load_metadata

    def unpack(scratch):
        sounds = scratch / "usr/share/asterisk/sounds/en_US_f_Allison"
        for name in [*EXPECTED, "ascending-2tone"]:
            (sounds / name).parent.mkdir(parents=True, exist_ok=True)
            write_wav(sounds / f"{name}.wav", np.zeros(8_000), 8_000)
        (sounds / "activated.wav").unlink()
        (scratch / "usr/share/doc/asterisk").mkdir(parents=True)
        (scratch / "usr/share/doc/asterisk/core-sounds-en.txt.gz").write_bytes(gzip.compress(SAMPLE.encode()))
        return scratch

    monkeypatch.setattr(demo_data, "_download", unpack)
    monkeypatch.setattr(demo_data.shutil, "which", lambda tool: tool)
    with pytest.raises(InputError, match="holds only 8 recordings"):
        fetch_debian_speech(tmp_path / "few")
    monkeypatch.setattr(demo_data, "_AT_LEAST", 8)
    path = fetch_debian_speech(tmp_path / "demo")
    assert "8 recordings, 0.00 hours" in capsys.readouterr().out
    turns = [conversation.turns[0] for conversation in load_metadata(path)]
    assert {turn.text for turn in turns} == set(EXPECTED.values()) - {"Activated."}
    assert {turn.speaker for turn in turns} == {0}

    monkeypatch.setattr(demo_data, "_download", None)  # a second fetch has no need of it
    before = path.stat().st_mtime_ns
    assert fetch_debian_speech(tmp_path / "demo") == path and path.stat().st_mtime_ns == before
    rows = json.loads(path.read_text())
    (path.parent / rows[0]["path"]).unlink()
    with pytest.raises(TypeError):
        fetch_debian_speech(tmp_path / "demo")


def test_no_archive_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_data.shutil, "which", lambda tool: None)
    with pytest.raises(InputError, match="no apt-get here; run `make demo DATA=metadata.json`"):
        fetch_debian_speech(tmp_path)
    monkeypatch.setattr(demo_data.shutil, "which", lambda tool: tool)
    monkeypatch.setattr(demo_data, "_apt", lambda arguments, folder: "Could not resolve 'mirror.example'")
    with pytest.raises(InputError, match="Could not resolve .*; run `make demo DATA") as caught:
        fetch_debian_speech(tmp_path)
    assert "\n" not in str(caught.value) and not (tmp_path / "metadata.json").exists()
