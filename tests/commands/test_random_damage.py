"""Files damaged at random: an error of one line, or a file that can still be read."""

from __future__ import annotations

import collections
import hashlib
import json
import re
from random import Random

import numpy as np
import pyarrow.parquet
import pytest
from command_cases import SHARD, write_metadata, write_sound
from pretokenize_fakes import write_wav

from csm_fast import InputError, load_model
from csm_fast.config.parse import build, dump_yaml, read_mapping, read_yaml
from csm_fast.config.shape import CSMConfig
from csm_fast.config.train import TrainConfig
from csm_fast.data.audio import read_audio
from csm_fast.data.metadata import load_metadata
from csm_fast.data.token_store import open_split

pytestmark = pytest.mark.usefixtures("home", "fresh_log")


def mutated(content: bytes, random: Random) -> bytes:
    """A few bits flipped, values replaced, pieces cut out or doubled; mostly at the beginning, where headers are."""
    result = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 5))):
        i = random.randrange(min(len(result), random.choice((300, 100_000))) or 1)
        words = list(re.finditer(rb'-?[0-9.]+|true|null|"[^"]*"', bytes(result[:4000])))
        kind = random.randrange(6 if words else 5)
        if kind == 0 and result:
            result[i % len(result)] ^= 1 << random.randrange(8)
        elif kind == 1:
            del result[i : i + random.randrange(1, 20)]
        elif kind == 2:
            result[i:i] = random.choice(
                (b"null", b"-1", b"1e999", b"NaN", b"{}", b"[]", b'""', b"\xff", b"\n", b'"a":')
            )
        elif kind == 3:
            result[i:i] = result[max(0, i - 30) : i]
        elif kind == 4 and random.random() < 0.2:
            del result[i:]
        elif kind == 5:
            word = random.choice(words)
            values = (b"null", b"-1", b"0", b"1.5", b"1e999", b"{}", b"[]", b'"x"', b"99999999999999999999", b"true")
            result[slice(*word.span())] = random.choice(values)
    return bytes(result)


@pytest.mark.slow
def test_random_damage_is_refused_or_harmless(tmp_path, model):
    """Thousands of damaged files: an InputError of one line, or a file that can still be read; nothing else."""
    random = Random(5)
    write_wav(tmp_path / "a.wav", 0.3, 1)
    write_sound(tmp_path / "a.flac", np.random.default_rng(0).normal(0, 0.1, 9000))
    rows = [{"text": "one", "path": "a.wav", "start": 0.0, "end": 0.2}, [{"text": "x", "audio_path": "a.wav"}]]
    write_metadata(tmp_path, rows, "m.json")
    (tmp_path / "m.csv").write_text('text,path,start,speaker\n"one, two",a.wav,0.0,1\ntwo,a.wav,,\n')
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"], "path": ["a.wav"] * 2}), tmp_path / "m.parquet")
    (tmp_path / "c.yaml").write_text(dump_yaml(TrainConfig()))
    shard, manifest = tmp_path / "tokens" / SHARD, tmp_path / "tokens/train/manifest.json"
    described = json.loads(manifest.read_text())

    def read_store():
        store = open_split("tokens", "train")
        return [store.conversation(i) for i in range(len(store))]

    def read_matching_store():  # the hash does not give the damage away
        content = shard.read_bytes()
        described["shards"][0] |= {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        manifest.write_text(json.dumps(described))
        return read_store()

    readers = {
        manifest: read_store,
        shard: read_matching_store,
        model / "config.json": lambda: load_model(model),
        model / "model.safetensors": lambda: load_model(model),
        tmp_path / "model.yaml": lambda: CSMConfig.from_dict(read_mapping("model.yaml"), file="model.yaml"),
        tmp_path / "c.yaml": lambda: build(TrainConfig, read_yaml("c.yaml", TrainConfig)),
        **{tmp_path / f"m.{kind}": lambda k=kind: load_metadata(f"m.{k}") for kind in ("json", "csv", "parquet")},
        **{tmp_path / f"a.{kind}": lambda k=kind: read_audio(f"a.{k}") for kind in ("wav", "flac")},
    }
    outcomes = collections.Counter()
    for file, read in readers.items():
        whole = file.read_bytes()
        for _ in range(150):
            file.write_bytes(mutated(whole, random))
            try:
                read()
                outcomes[file.name, True] += 1
            except InputError as error:
                assert "\n" not in str(error)
                outcomes[file.name, False] += 1
        file.write_bytes(whole)
    assert all(outcomes[file.name, False] > 20 for file in readers), outcomes
