"""What ``csm-fast generate`` refuses in one line."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile
from pretokenize_fakes import RATE, FakeCodec, FakeTokenizer
from train_cases import (
    CODEC,
    SIZE,
    TOKENIZER,
    K,
)

from csm_fast import cli
from csm_fast.weights.save import write_record

pytestmark = pytest.mark.usefixtures("home", "fresh_log")


def test_generate(tmp_path, model, refused, monkeypatch):
    class Codec(FakeCodec):
        name, num_codebooks, codebook_size = "test codec", K, SIZE

        def decode(self, codes):
            return np.zeros(len(codes) * 1920, np.float32)

    class Tokenizer(FakeTokenizer):
        vocab_size = 50

        def encode(self, text, speaker):
            return [ord(c) % 50 for c in text]

    monkeypatch.setattr("csm_fast.generate.voice.load_codec", lambda *args, **options: Codec("c" * 64))
    monkeypatch.setattr("csm_fast.generate.voice.load_text_tokenizer", lambda *args: Tokenizer())

    def generate(*extra: str) -> list[str]:
        return ["generate", "--model", str(model), "--text", "hello", "--max-seconds", "0.4", "--seed", "1", *extra]

    assert cli.main(generate("--out", "ok.wav")) == 0 and soundfile.info("ok.wav").samplerate == RATE
    refused(generate("--text", ""), "--text is empty", "say what to speak")
    refused(generate("--model", "run/best"), "run/best: no such", "; ")
    refused(generate("--codec", "mp3"), "--codec is 'mp3'", "one of auto, transformers, moshi, offline")
    refused(generate("--max-seconds", "0"), "--max-seconds 0.0", "at most 160")
    refused(generate("--text", "word " * 500), "the prompt takes 2,500 of 2,048 rows", "a shorter text")
    refused(generate("--temperature", "-1"), "--temperature -1.0", "at least 0")
    refused(generate("--top-k", "-1"), "--top-k -1", "at least 1, or 0")
    refused(generate("--seed", "-1"), "--seed -1", "2^63 - 1")
    refused(generate("--speaker", "-7"), "--speaker -7", "2^31 - 1")
    refused(generate("--out", "no/such/folder/x.wav"), "x.wav: cannot be written", "a folder that exists")
    refused(generate("--out", "x.mp4"), "x.mp4: speech is written as WAV", "name it x.wav")
    refused(generate("--out", "m"), "m: cannot be written", "name a file")
    refused(generate("--out", "/proc/x.wav"), "/proc/x.wav: cannot write: a folder of this path", "choose another")
    assert cli.main(generate("--out", "~/home.wav")) == 0 and (tmp_path / "home.wav").exists()
    refused(generate("--context", "nowhere.json"), "nowhere.json: no such file", "check the path")
    (tmp_path / "c.json").write_text('[{"text": "one", "path": "nowhere.wav"}]')
    refused(generate("--context", "c.json"), "c.json, row 1: the recording", "does not exist", "check the path")
    monkeypatch.setattr("csm_fast.generate.voice.load_text_tokenizer", lambda *args: FakeTokenizer())
    refused(generate(), "the model knows 50 text ids", "letters has 300 ids", "--tokenizer")
    # A model that knows what it was trained with.
    write_record(model, {"codec": {**CODEC, "fingerprint": "e" * 64}, "text_tokenizer": TOKENIZER})
    refused(generate(), "the model was trained with test codec, this is test codec", "--codec-source")
    write_record(model, {"codec": CODEC, "text_tokenizer": TOKENIZER})
    refused(generate(), "the model was trained with another text tokenizer than letters", "--tokenizer")
