"""A codec and a tokenizer that are functions of their input, and a small folder of recordings to run them on."""

import hashlib
import json
import os
import time

import numpy as np
import pytest
import soundfile

from csm_fast.config.commands import PretokenizeConfig
from csm_fast.data.pretokenize import pretokenize
from csm_fast.system.errors import InputError

RATE = 24_000


class FakeCodec:
    """Codes are a function of each frame's samples, so other audio gives other codes."""

    kind = name = "fake"
    sample_rate, samples_per_frame, num_codebooks, codebook_size = RATE, 1920, 4, 2048

    def __init__(self, fingerprint="f" * 64, device="cpu", pause=0.0, log=None):
        self.fingerprint, self.device, self.pause, self.log = fingerprint, device, pause, log
        self.batches = []

    @property
    def clips(self):
        return sum(len(batch) for batch in self.batches)

    def identity(self):
        return {"kind": self.kind, "name": self.name, "fingerprint": self.fingerprint}

    def encode(self, waves):
        self.batches.append([len(wave) for wave in waves])
        if self.log:
            with open(self.log, "a") as file:
                file.write("x" * len(waves))
        time.sleep(self.pause)
        out = []
        for wave in waves:
            assert wave.dtype == np.float32 and wave.ndim == 1
            frames = -(-len(wave) // 1920)
            padded = np.zeros(frames * 1920, np.float64)
            padded[: len(wave)] = wave
            power = np.abs(padded.reshape(frames, 4, 480)).sum(axis=2)
            out.append((power * 1e4).astype(np.int64).astype(np.uint16) % 2048)
        return out


class FakeTokenizer:
    name, fingerprint, vocab_size = "letters", "t" * 64, 300

    def encode(self, text, speaker):
        return [256, *(min(ord(c), 255) for c in f"[{speaker}]{text}"), 257]


def write_wav(path, seconds, seed, rate=RATE):
    rng = np.random.default_rng(seed)
    wave = rng.normal(0, 0.1, int(seconds * rate)).astype(np.float32)
    wave[: rate // 20] = 0
    soundfile.write(path, wave, rate)
    old = time.time() - 100 + seed  # older than the clock's resolution, as recordings are
    os.utime(path, (old, old))


def make_data(tmp_path):
    """12 flat rows; the last two are cuts of one file."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = []
    for i in range(10):
        write_wav(folder / f"{i}.wav", 0.3 + 0.11 * i, i, rate=(RATE, 8000, 44100)[i % 3])
        rows.append({"text": f"clip number {i}", "path": f"{i}.wav", "speaker": i % 3})
    write_wav(folder / "long.wav", 5, 50)
    rows.append({"text": "the first part", "path": "long.wav", "start": 0, "end": 2})
    rows.append({"text": "the second part", "path": "long.wav", "start": 2.5})
    save(folder, rows)
    return folder


def save(folder, rows, name="train.json"):
    (folder / name).write_text(json.dumps(rows))


def load(folder, name="train.json"):
    return json.loads((folder / name).read_text())


def run(folder, codec=None, output="tokens", **options):
    codec = codec or FakeCodec()
    options = {"workers": 0, **options}
    config = PretokenizeConfig(train_data=str(folder / "train.json"), output=str(folder / output), **options)
    report = pretokenize(config, codec=codec, tokenizer=FakeTokenizer())
    return report, codec


def stores(folder, output="tokens"):
    """Every byte of what a run leaves, but for the cache."""
    root = folder / output
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(root.rglob("*"))
        if p.is_file() and ".cache" not in p.parts
    }


def refused(call):
    with pytest.raises(InputError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)
