"""Whatever a user gives, the commands answer in one line that says what, where and how to mend it; nothing is lost."""

from __future__ import annotations

import collections
import errno
import hashlib
import importlib
import json
import logging
import os
import re
import resource
import shutil
from pathlib import Path
from random import Random

import numpy as np
import pyarrow.parquet
import pytest
import soundfile
import torch
from pretokenize_fakes import RATE, FakeCodec, FakeTokenizer, write_wav
from safetensors.torch import load_file, save_file
from train_cases import (
    CODEC,
    MODEL_YAML,
    SIZE,
    TOKENIZER,
    K,
    conversations_of,
    flags,
    make_store,
    prepare,
    start,
    turn,
    write_model,
    write_store,
)

from csm_fast import CSM, InputError, cli, load_model, save_model
from csm_fast.config.parse import build, dump_yaml, read_mapping, read_yaml
from csm_fast.config.shape import CSMConfig
from csm_fast.config.train import TrainConfig
from csm_fast.data.audio import read_audio
from csm_fast.data.metadata import load_metadata
from csm_fast.data.store_writer import TokenStoreWriter
from csm_fast.data.token_store import open_split
from csm_fast.train.checkpoint import read_if_complete
from csm_fast.weights.save import write_record


@pytest.fixture(autouse=True)
def fresh_log():
    """The command's log handler keeps the stream it was made with, which is another one in every test."""
    logging.getLogger("csm_fast").handlers.clear()


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Where a mistake would litter, and what ~ means."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def contents(folder: Path) -> dict[str, str]:
    """Every file and link below a folder; locks and caches are no one's loss."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.name == ".lock" or ".cache" in path.parts or path.is_dir() and not path.is_symlink():
            continue
        link = path.is_symlink()
        found[str(path.relative_to(folder))] = (
            os.readlink(path) if link else hashlib.sha256(path.read_bytes()).hexdigest()
        )
    return found


@pytest.fixture
def refused(capsys, tmp_path):
    """Run a command that must fail, and nothing may change under the folder; returns the one line."""

    def run(argv: list[str], *words: str, keep: Path | None = None) -> str:
        keep = keep or tmp_path
        before = contents(keep)
        capsys.readouterr()
        status = cli.main([str(part) for part in argv])
        said = capsys.readouterr().err
        lines = said.strip().splitlines()
        assert status not in (0, None), said
        assert lines[-1].startswith("error: ") and sum(line.startswith("error: ") for line in lines) == 1, said
        assert "Traceback" not in said and "Logging error" not in said, said
        for word in words:
            assert word in lines[-1], lines[-1]
        assert "; " in lines[-1], f"no mend: {lines[-1]}"
        assert len(lines[-1]) < 700, lines[-1]
        assert before.items() <= contents(keep).items()
        return lines[-1]

    return run


# ---------------------------------------------------------------------------------------------------- pretokenize


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Two good recordings in their metadata, and the tokens of an earlier run on them."""
    monkeypatch.setattr("csm_fast.data.pretokenize.load_codec", lambda *args, **options: FakeCodec())
    monkeypatch.setattr("csm_fast.data.pretokenize.load_text_tokenizer", lambda *args: FakeTokenizer())
    write_wav(tmp_path / "a.wav", 0.5, 1)
    write_wav(tmp_path / "b.wav", 0.7, 2)
    metadata(tmp_path, [{"text": "one", "path": "a.wav"}, {"text": "two", "path": "b.wav"}])
    assert cli.main(pretokenize()) == 0
    return tmp_path


def metadata(folder: Path, rows, name: str = "train.json") -> None:
    (folder / name).write_text(rows if isinstance(rows, str) else json.dumps(rows))


def pretokenize(*extra: str, file: str = "train.json") -> list[str]:
    return ["pretokenize", "--train-data", file, "--output", "tokens", "--workers", "0", *extra]


def write(path: Path, wave: np.ndarray, rate: int = RATE, subtype: str = "PCM_16") -> None:
    soundfile.write(path, wave, rate, subtype=subtype)


def truncate(path: Path, size: int) -> None:
    with open(path, "r+b") as file:
        file.truncate(size)


def nan_wave(path: Path) -> None:
    wave = np.full(RATE, 0.1, np.float32)
    wave[RATE // 2] = np.nan
    write(path, wave, subtype="FLOAT")


AUDIO = {
    "missing": (lambda p: None, "does not exist", "check the path"),
    "empty": (lambda p: p.write_bytes(b""), "is empty (0 bytes)", "copy it again"),
    "no samples": (lambda p: write(p, np.zeros(0, np.float32)), "has no samples", "record it again"),
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
    metadata(data, [{"text": "one", "path": "a.wav"}, {"text": "three", "path": "c.wav"}])
    refused(pretokenize(), "train.json, row 2: ", *words)


def test_a_bad_recording_can_be_left_out_and_is_listed(data, capsys):
    (data / "c.wav").write_bytes(b"")
    metadata(data, [{"text": "one", "path": "a.wav"}, {"text": "three", "path": "c.wav"}])
    assert cli.main(pretokenize("--skip-bad")) == 0
    assert len(open_split("tokens", "train")) == 1
    (listed,) = json.loads((data / "tokens" / "report.json").read_text())["skipped"]["listed"]
    assert "train.json, row 2: " in listed["reason"] and "empty (0 bytes)" in listed["reason"]


def test_high_rates_and_many_channels_work(data):
    rng = np.random.default_rng(0)
    write(data / "fast.wav", rng.normal(0, 0.1, 192_000), 192_000)
    write(data / "wide.wav", rng.normal(0, 0.1, (48_000, 8)), 48_000)
    metadata(data, [{"text": "one", "path": "fast.wav"}, {"text": "two", "path": "wide.wav"}])
    assert cli.main(pretokenize()) == 0
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
    metadata(data, [{"text": "one", "path": "a.wav"}, row])
    refused(pretokenize(), "train.json, row 2: ", *words)


def test_turns_are_named(data, refused):
    metadata(data, [[ROW], [ROW, {**ROW, "speaker": "Ann"}]])
    refused(pretokenize(), "train.json, row 2, turn 2: speaker 'Ann' is a name", "--speaker-map")


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
    metadata(data, content)
    refused(pretokenize(), "train.json", *words)


def test_other_metadata_files(data, refused):
    (data / "x.csv").write_text("text,path,text\na,a.wav,b\n")
    refused(pretokenize(file="x.csv"), "x.csv: the column 'text' is there twice", "keep one")
    (data / "x.csv").write_text("text,path\na,b,a.wav\n")
    refused(pretokenize(file="x.csv"), "x.csv, row 1: 3 cells under 2 columns", "double quotes")
    (data / "x.csv").write_bytes("text,path\nGrüße,a.wav\n".encode("latin-1"))
    refused(pretokenize(file="x.csv"), "x.csv: line 2 is not UTF-8", "save it as UTF-8")
    (data / "x.parquet").write_text("PAR1 but not really")
    refused(pretokenize(file="x.parquet"), "x.parquet: is not a readable parquet file", "write it again")
    refused(pretokenize(file="nowhere.json"), "nowhere.json: no such file", "check the path")
    refused(pretokenize(file="x.pkl"), "x.pkl: a pickle runs whatever code", "export it")
    (data / "map.yaml").write_text("Ann: 1999-99-99\n")
    metadata(data, [{**ROW, "speaker": "Ann"}])
    refused(pretokenize("--speaker-map", "map.yaml"), "map.yaml: is not usable YAML", "correct it")
    (data / "map.yaml").write_text("Bob: 1\n")
    refused(pretokenize("--speaker-map", "map.yaml"), "row 1: speaker 'Ann' is not in the speaker map", "add it there")


def test_pretokenize_settings(data, refused):
    refused(pretokenize("--val-fraction", "2"), "fraction 2.0", "between 0 and 1")
    refused(pretokenize("--val-fraction", "0.5", "--val-data", "train.json"), "are both given", "give one")
    refused(pretokenize("--output", ""), "--output is empty", "name it")
    refused(pretokenize("--output", "/dev/null/x"), "/dev/null/x: cannot write", "choose another output directory")
    refused(pretokenize("--output", "/proc/x"), "/proc/x: cannot write", "choose another output directory")
    refused(pretokenize("--output", "a.wav"), "a.wav: cannot write", "choose another output directory")
    refused(pretokenize("--min-seconds", "nan"), "--min-seconds nan", "give 0 or more")
    refused(pretokenize("--min-seconds", "100"), "no conversation to store", "check the metadata")
    refused(pretokenize("--outptu", "x"), "unrecognized arguments: --outptu", "did you mean --output?")
    refused(["pretokenize"], "--train-data is missing", "metadata of the training set")
    (data / "p.yaml").write_text("train_data: train.json\noutput: tokens\nworkers: 0\n")
    assert cli.main(["pretokenize", "--config", "p.yaml"]) == 0


def test_a_full_disk_while_pretokenizing(data, refused, monkeypatch):
    write_wav(data / "c.wav", 0.5, 9)
    metadata(data, [{"text": "three", "path": "c.wav"}])

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        refused(pretokenize(), "tokens", "the disk is full", "free some space")
    assert cli.main(pretokenize()) == 0


# --------------------------------------------------------------------------------------------------------- stores


def train(folder: Path, *extra: str, **overrides) -> list[str]:
    return ["train", *flags(folder, **overrides), *extra]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


SHARD = "train/shard-00000.safetensors"


def edit_manifest(change):
    def edit(tokens: Path) -> None:
        manifest = json.loads((tokens / "train" / "manifest.json").read_text())
        change(manifest)
        (tokens / "train" / "manifest.json").write_text(json.dumps(manifest))

    return edit


STORES = {
    "a flipped bit": (lambda t: flip(t / SHARD), SHARD + ": corrupt: its hash", "run csm-fast pretokenize again"),
    "a short shard": (lambda t: truncate(t / SHARD, 500), SHARD + ": truncated: 500 bytes", "pretokenize again"),
    "no shard": (lambda t: (t / SHARD).unlink(), SHARD + ": missing shard", "pretokenize again"),
    "no manifest": (lambda t: (t / "train/manifest.json").unlink(), "train: not a token store", "give a directory"),
    "half a manifest": (lambda t: truncate(t / "train/manifest.json", 99), "manifest.json: corrupt: not JSON", "again"),
    "another manifest": (
        lambda t: (t / "train/manifest.json").write_text("[]"),
        "not the manifest of a token",
        "again",
    ),
    "a newer format": (edit_manifest(lambda m: m.update(format_version=9)), "format version 9", "upgrade csm_fast"),
    "no train split": (lambda t: shutil.rmtree(t / "train"), "no 'train' split here (there is val)", "run csm-fast"),
    "empty": (lambda t: shutil.rmtree(t) or t.mkdir(), "no 'train' split here", "run csm-fast pretokenize"),
    "a file": (lambda t: shutil.rmtree(t) or t.write_text("x"), "is a file, not a directory of", "run csm-fast"),
    "nowhere": (lambda t: shutil.rmtree(t), "does not exist", "run csm-fast pretokenize"),
    "val of another codec": (
        lambda t: shutil.rmtree(t / "val") or write_store(t / "val", conversations_of(2, 1), fingerprint="d" * 64),
        "train and val were made with different codecs",
        "run csm-fast pretokenize again",
    ),
    "of another K": (
        lambda t: edit_manifest(lambda m: m["codec"].update(num_codebooks=5))(t),
        "shard-00000.safetensors: corrupt: codes is",
        "run csm-fast pretokenize again",
    ),
}


@pytest.mark.parametrize("case", STORES)
def test_stores(tmp_path, refused, case):
    damage, *words = STORES[case]
    damage(prepare(tmp_path) / "tokens")
    refused(train(tmp_path), "tokens", *words)


def test_the_split_instead_of_the_store(tmp_path, refused):
    prepare(tmp_path)
    refused(train(tmp_path, data="tokens/train"), "tokens/train: is one split of a store", "give the directory that")


def test_stores_that_do_not_fit_the_model(tmp_path, refused):
    write_model(prepare(tmp_path) / "k.yaml", num_codebooks=K + 1)
    refused(train(tmp_path, model="k.yaml"), "tokens/train: ", f"of {K} codebooks, the model wants {K + 1}", "--codec")
    write_model(tmp_path / "v.yaml", audio_vocab_size=SIZE - 1)
    refused(train(tmp_path, model="v.yaml"), "has codes up to 19", "ends at 18", "use a model of the codec's size")
    write_model(tmp_path / "t.yaml", text_vocab_size=9)
    refused(train(tmp_path, model="t.yaml"), "of 50 ids, the model wants at most 9", "--tokenizer")
    # A trained model knows its codec and its tokenizer.
    assert cli.main(train(tmp_path, max_steps=1)) == 0
    tuned = {"from_scratch": None, "model": "run/best", "output_dir": "next"}
    make_store(tmp_path / "other", fingerprint="d" * 64)
    refused(train(tmp_path, **tuned, data="other"), "other/train: ", "test codec (dddddddddddd)", "the model wants ccc")
    with TokenStoreWriter(
        "words/train", codec=CODEC, text_tokenizer={**TOKENIZER, "fingerprint": "8" * 64}, resampler="none"
    ) as writer:
        writer.add_conversation([turn(np.random.default_rng(0), 0)])
    refused(train(tmp_path, **tuned, data="words"), "text tokenizer", "the model wants 777777777777", "--tokenizer")
    shutil.copytree("tokens/val", "words/val")
    refused(
        train(tmp_path, data="words", output_dir="new"),
        "train and val were made with different text tokenizers",
        "pretokenize",
    )


def test_conversations_that_do_not_fit(tmp_path, refused, monkeypatch):
    prepare(tmp_path)
    monkeypatch.setattr(
        "csm_fast.train.setup.load_starting_model", lambda *_: pytest.fail("made before the packs were")
    )
    refused(train(tmp_path, pack_rows=9), "tokens/train: conversation", "a pack here holds 9", "raise --pack-rows to")
    refused(train(tmp_path, batch_rows=20), "needs 2", "--batch-rows is 20", "raise --batch-rows to at least")
    (tmp_path / "short.yaml").write_text(
        MODEL_YAML.replace("intermediate_dim: 64", "intermediate_dim: 64, max_seq_len: 9")
    )
    line = refused(train(tmp_path, model="short.yaml"), "tokens/train: conversation", "the model's context is 9", "cut")
    assert "raise" not in line


def test_a_validation_split_without_anything_to_score(tmp_path, refused):
    shutil.rmtree(prepare(tmp_path) / "tokens" / "val")
    rng = np.random.default_rng(0)
    write_store(tmp_path / "tokens" / "val", [[turn(rng, i, speaker=7)] for i in range(3)])
    refused(train(tmp_path, mask_speaker_ids=[7]), "tokens/val: --mask-speaker-ids masks every turn", "leave at least")


# --------------------------------------------------------------------------------------------------------- models


@pytest.fixture
def model(tmp_path):
    save_model(CSM(CSMConfig.from_dict(read_mapping(prepare(tmp_path) / "model.yaml"))).init_weights(), tmp_path / "m")
    return tmp_path / "m"


def edit_config(model: Path, **changes) -> None:
    values = json.loads((model / "config.json").read_text())
    values["csm_fast"].update(changes)
    (model / "config.json").write_text(json.dumps(values))


MODELS = {
    "another shape": (lambda m: edit_config(m, text_vocab_size=60), "text_embeddings.weight is [50, 48] instead of"),
    "another depth": (lambda m: edit_config(m, num_codebooks=7), "is [5, 32, 23] instead of [6, 32, 23]"),
    "truncated": (lambda m: truncate(m / "model.safetensors", 9999), "is not a whole safetensors file"),
    "a text": (lambda m: (m / "model.safetensors").write_text("weights"), "is not a whole safetensors file"),
    "empty": (lambda m: (m / "model.safetensors").write_bytes(b""), "is not a whole safetensors file"),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "holds no .safetensors file"),
    "half a config": (lambda m: truncate(m / "config.json", 100), "config.json: cannot be read as JSON"),
    "an empty config": (lambda m: (m / "config.json").write_text("{}"), "cannot tell the model's shape"),
    "a mistyped config": (lambda m: edit_config(m, audio_vocab_size="many"), "audio_vocab_size is 'many'"),
    "a list for a config": (lambda m: (m / "config.json").write_text("[1]"), "config.json: is not a JSON object"),
    "nowhere": (shutil.rmtree, "no such file or directory"),
}


@pytest.mark.parametrize("case", MODELS)
def test_models(tmp_path, model, refused, case):
    damage, words = MODELS[case]
    damage(model)
    for argv in (train(tmp_path, from_scratch=None, model=model), ["generate", "--model", model, "--text", "hello"]):
        refused(argv, str(model), words)


SHAPES = {
    "mistyped": (MODEL_YAML.replace("num_codebooks: 6", "num_codebooks: 6.5"), "num_codebooks is 6.5", "an integer"),
    "unknown key": (MODEL_YAML + "layers: 3\n", "unexpected keyword argument 'layers'", "it needs backbone"),
    "missing key": ("backbone: {}\n", "not a csm_fast model configuration", "it needs backbone"),
    "uneven heads": (MODEL_YAML.replace("num_heads: 4", "num_heads: 5"), "48 over 5 heads", "an even multiple"),
    "duplicate key": (MODEL_YAML + "num_codebooks: 6\n", "row 6: the key num_codebooks is there twice", "keep one"),
    "too large": (
        MODEL_YAML.replace("size: 50", "size: 9000000000000"),
        "text_vocab_size is 9000000000000",
        "to 2,147",
    ),
    "too deep": (MODEL_YAML.replace("layers: 2", "layers: 20000"), "num_layers is 20000", "from 1 to 1,024"),
}


@pytest.mark.parametrize("case", SHAPES)
def test_shapes(tmp_path, refused, case):
    text, *words = SHAPES[case]
    (prepare(tmp_path) / "shape.yaml").write_text(text)
    refused(train(tmp_path, model="shape.yaml"), "shape.yaml", *words)


@pytest.mark.parametrize(
    "words",
    [
        "CUDA out of memory. Tried to allocate 2 GiB.\nMore",
        "can't allocate memory: 9 bytes",
        "could not create a primitive",
    ],
)
def test_no_memory(tmp_path, refused, monkeypatch, words):
    def loss(*args, **options):
        raise RuntimeError(words)

    monkeypatch.setattr("csm_fast.model.csm.packed_loss", loss)
    refused(
        train(prepare(tmp_path)),
        "not enough memory (",
        words.splitlines()[0],
        "smallest change",
        "--activation-checkpointing",
    )


def test_model_names(tmp_path, refused):
    prepare(tmp_path)
    refused(train(tmp_path, model="tiny", from_scratch=None), "--model tiny is a shape", "add --from-scratch")
    refused(train(tmp_path, model="large"), "--from-scratch needs a shape, large is none", "use --model csm-1b")
    refused(train(tmp_path, model="no.yaml"), "no.yaml: cannot be read (No such file", "check the path")
    refused(train(tmp_path, model="x.pt", from_scratch=None), "x.pt: is a pickle", "save its tensors")


# -------------------------------------------------------------------------------------------------- configuration

YAML = {
    "unknown key": ("learning_rat: 1\n", "c.yaml: unknown setting learning_rat", "did you mean learning_rate?"),
    "duplicate key": ("seed: 1\nseed: 2\n", "c.yaml, row 2: the key seed is there twice", "keep one"),
    "twice by two names": ("lr: 1\nlearning_rate: 2\n", "c.yaml: learning_rate is set twice", "keep one"),
    "mistyped": ("batch_size: many\n", "c.yaml: batch_size is 'many'", "give an integer"),
    "half a batch": ("batch_size: 1.5\n", "c.yaml: batch_size is 1.5", "give an integer"),
    "a truth": ("batch_size: true\n", "c.yaml: batch_size is True", "give an integer"),
    "a choice": ("loss: best\n", "c.yaml: loss is 'best'", "one of blog, sesame-finetune"),
    "wrong section": ("data: {learning_rate: 1}\n", "c.yaml: learning_rate is no setting of data", "under optimizer"),
    "no section": ("data: {batch_size: 1}\nrun: 3\n", "c.yaml: run must be a section", "indent"),
    "not YAML": ("a: [1\nb: 2\n", "c.yaml, row 2: is not YAML", "correct it there"),
    "a list": ("- seed\n", "c.yaml: holds no mapping", "write lines like"),
    "a list for a key": ("? [a, b]\n: 3\n", "c.yaml, row 1: is not YAML (a key that is not a name)", "correct it"),
    "no such day": ("output_dir: 2024-13-45\n", "c.yaml: is not usable YAML", "correct it"),
    "bytes": ("\x00\x01\x02", "c.yaml: is not YAML", "correct it"),
}


@pytest.mark.parametrize("case", YAML)
def test_configuration_files(tmp_path, refused, case):
    text, *words = YAML[case]
    (tmp_path / "c.yaml").write_text(text)
    refused(["train", "--config", "c.yaml", "--output-dir", "run"], *words)


EVERYTHING = "backbone decoder text_embeddings audio_embeddings projection codebook0_head audio_head".split()
FLAGS = {
    "both warmups": ("--warmup-steps 3 --warmup-ratio 0.1", "warmup_steps and warmup_ratio are both given", "one of"),
    "a weight of another loss": ("--loss csm-mlx --decoder-loss-weight 0.5", "does not belong to the loss csm-mlx"),
    "a multiplier of another loss": ("--fcw 2", "first_codebook_weight_multiplier does not belong to the loss blog"),
    "negative rate": ("--lr -1", "learning_rate is -1.0", "at least 0"),
    "no rate": ("--lr nan", "learning_rate is nan"),
    "no epsilon": ("--adam-eps 0", "adam_eps is 0.0", "above 0"),
    "beta": ("--beta2 1", "beta2 is 1.0", "below 1"),
    "empty batch": ("--batch-size 0", "--batch-size 0", "at least 1"),
    "no steps": ("--max-steps 0", "max_steps is 0", "at least 1"),
    "negative epochs": ("--n-epochs -2", "n_epochs is -2", "at least 1"),
    "too much": ("--amortization-fraction 1.5", "amortization_fraction is 1.5", "at most 1"),
    "huge seed": ("--seed 99999999999999999999", "--seed 99999999999999999999", "2^63 - 1"),
    "huge speaker": ("--mask-speaker-ids 4294967296", "--mask-speaker-ids 4294967296", "2^31 - 1"),
    "everyone": ("--mask-speaker-ids 0 1", "tokens/train: --mask-speaker-ids masks every turn", "leave at least one"),
    "unknown part": ("--freeze backbon", "--freeze backbon: no such part", "choose among"),
    "everything frozen": ("--freeze " + " ".join(EVERYTHING), "leaves nothing to train", "freeze fewer"),
    "unknown flag": ("--learning-rat 1", "unrecognized arguments", "did you mean --learning-rate?"),
    "no value": ("--batch-size", "expected one argument", "--help"),
    "no device": ("--device cuda:9", "--device cuda:9 is not there", "use auto or cpu"),
    "no machine": ("--device toaster", "--device toaster names no device", "use auto, cpu, cuda"),
    "no threads": ("--threads 0", "--threads 0", "1 to 1024"),
    "no config": ("--config nowhere.yaml", "nowhere.yaml: cannot be read", "check the path"),
    "endless samples": ("--gen-every 1 --gen-seconds inf", "--gen-seconds inf", "at most 160"),
    "no sentences": ("--gen-every 1 --gen-sentences nowhere.txt", "nowhere.txt: cannot be read", "--gen-sentences"),
}


@pytest.mark.parametrize("case", FLAGS)
def test_flags(tmp_path, refused, case):
    given, *words = FLAGS[case]
    prepare(tmp_path)
    if case == "no device" and torch.cuda.device_count() > 9:
        pytest.skip("it is")
    refused(train(tmp_path, *given.split()), *words)


def test_an_unknown_command(refused):
    refused(["trian"], "there is no command trian", "choose among")


# ------------------------------------------------------------------------------------------------ a run continued


def test_a_run_continued_as_another(tmp_path, refused):
    assert cli.main(train(prepare(tmp_path), max_steps=3)) == 0
    (last,) = (tmp_path / "run").glob("step-*")
    same = ("continue with the same, or start a new run",)
    refused(train(tmp_path, batch_size=3), str(last), "made with batch_size 4, now it is 3", *same)
    refused(train(tmp_path, seed=3), str(last), "made with seed 0, now it is 3", *same)
    refused(train(tmp_path, batch_rows=64), str(last), "made with batch_rows None, now it is 64", *same)
    make_store(tmp_path / "other", seed=3)
    refused(train(tmp_path, data="other"), str(last), "made with the token store", *same)
    refused(train(tmp_path, "--freeze", "decoder"), "was trained then and is frozen now", "use the same --freeze")
    refused(train(tmp_path, "--no-resume"), "run: holds a run already (step-000003)", "choose another --output-dir")
    make_store(tmp_path / "other", seed=0, fingerprint="d" * 64)
    refused(train(tmp_path, data="other"), "test codec (dddddddddddd)", "the model wants cccccccccccc")
    # Damage that its sizes do not show.
    flipped = (last / "optimizer.safetensors").read_bytes()
    (last / "optimizer.safetensors").write_bytes(b"\xff" * len(flipped))
    refused(train(tmp_path), "optimizer.safetensors: is not a whole safetensors file", "delete this checkpoint")
    (last / "optimizer.safetensors").write_bytes(flipped)
    state = json.loads((last / "trainer_state.json").read_text())
    (last / "trainer_state.json").write_text(json.dumps({**state, "format": 99}))
    refused(train(tmp_path), "checkpoint format 99", "use the csm_fast version that wrote it")


def test_a_run_instead_of_its_model(tmp_path, refused):
    assert cli.main(train(prepare(tmp_path), max_steps=1)) == 0
    refused(["generate", "--text", "a", "--model", "run"], "run: is a run, not a model", "give run/best or run/last")
    refused(train(tmp_path, from_scratch=None, model="run", output_dir="x"), "run: is a run", "give run/best")


def test_the_users_own_configuration_file_is_kept(tmp_path):
    (tmp_path / "run").mkdir()
    mine = "# my notes\nmax_steps: 1\n"
    (tmp_path / "run" / "config.yaml").write_text(mine)
    for _ in range(2):
        assert cli.main(train(prepare(tmp_path), "--config", "run/config.yaml")) == 0
    assert (tmp_path / "run" / "config.yaml").read_text() == mine
    resolved = str(tmp_path / "run" / "config.resolved.yaml")
    assert cli.main(["train", "--config", resolved, "--output-dir", "again"]) == 0
    assert cli.main(["train", "--config", resolved, "--output-dir", "again", "--max-steps", "2"]) == 0
    assert read_mapping(tmp_path / "again" / "config.yaml")["run"]["max_steps"] == 2


# ----------------------------------------------------------------------------------------------------- the disk


@pytest.mark.parametrize("place", ["/dev/null/run", "/proc/run", "model.yaml", ""])
def test_places_that_cannot_be_written(tmp_path, refused, place):
    refused(train(prepare(tmp_path), output_dir=place), place or "--output-dir is empty", "; ")


def no_space(*args, **options):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "place", ["system.arrays.os.fsync", "train.checkpoint.write_tensors", "train.checkpoint.os.symlink"]
)
def test_a_full_disk_while_saving(tmp_path, refused, monkeypatch, place):
    """The checkpoint before it stays, nothing half is left, and the same command goes on to the same end."""
    assert cli.main(train(prepare(tmp_path), max_steps=3, save_every=1, output_dir="alone")) == 0
    saved = tmp_path / "run" / "step-000001"
    module, _, name = place.rpartition(".")
    call = getattr(importlib.import_module("csm_fast." + module.removesuffix(".os")), name, None) or getattr(os, name)

    def full(*args, **options):
        return no_space() if saved.exists() and (tmp_path / "run" / "best").exists() else call(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(f"csm_fast.{place}", full)
        refused(
            train(tmp_path, max_steps=3, save_every=1),
            "run: the checkpoint could not be saved, the earlier ones are intact: the disk is full",
            "free some space and run the same command again",
            keep=saved,
        )
    assert read_if_complete(saved) and read_if_complete(tmp_path / "run" / "last")
    assert not list((tmp_path / "run").glob(".step*"))
    assert cli.main(train(tmp_path, max_steps=3, save_every=1)) == 0
    whole, pieces = contents(tmp_path / "alone"), contents(tmp_path / "run")
    for name in ("model", "optimizer"):
        assert whole[f"step-000003/{name}.safetensors"] == pieces[f"step-000003/{name}.safetensors"]


def test_a_full_disk_for_the_small_files(tmp_path, refused, monkeypatch):
    assert cli.main(train(prepare(tmp_path), max_steps=2)) == 0
    with monkeypatch.context() as patch:
        patch.setattr("csm_fast.report.metrics.write_file", no_space)
        refused(train(tmp_path, max_steps=2), "run: the run could not be started: the disk is full", "free some space")
    with monkeypatch.context() as patch:
        patch.setattr("csm_fast.report.summary.plot", no_space)
        refused(
            train(tmp_path, max_steps=2),
            "run: the summary could not be written: the disk is full",
            "free",
            keep=tmp_path / "run/step-000002",
        )
    real = open

    def full(path, mode="r", **options):
        if mode == "a":
            no_space()
        return real(path, mode, **options)

    with monkeypatch.context() as patch:
        patch.setattr("csm_fast.report.metrics.open", full, raising=False)
        refused(
            train(tmp_path, max_steps=5),
            "run: metrics.jsonl could not be written: the disk is full",
            keep=tmp_path / "run/step-000002",
        )


def test_a_file_size_limit(tmp_path):
    """The system call itself refusing, in a process of its own."""
    assert cli.main(train(prepare(tmp_path), max_steps=1)) == 0
    before = contents(tmp_path / "run" / "step-000001")
    limit = 300_000  # the model fits, the optimizer's state does not
    options = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))}
    child = start(train(tmp_path, max_steps=3), **options)
    said = child.communicate(timeout=60)[1]
    assert child.returncode == 2 and "Traceback" not in said, said
    last = said.strip().splitlines()[-1]
    assert last.startswith(f"error: {tmp_path / 'run'}: the checkpoint could not be saved, the earlier ones are intact")
    assert "a file-size limit was reached" in last and "run the same command again" in last
    assert contents(tmp_path / "run" / "step-000001") == before and not list((tmp_path / "run").glob(".step*"))


# ------------------------------------------------------------------------------------------------------- generate


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


# ------------------------------------------------------------------------------------------------ odd, but legal


def test_paths_of_every_kind(tmp_path, monkeypatch):
    prepare(tmp_path / "a b" / "späße 日本")
    shutil.copytree(tmp_path / "a b" / "späße 日本", tmp_path / "plain")
    assert cli.main(train(tmp_path / "plain", max_steps=2, output_dir="first")) == 0
    wanted = contents(tmp_path / "first")["step-000002/model.safetensors"]
    for place, run in (
        (tmp_path / "a b" / "späße 日本", tmp_path / "a b" / "späße 日本" / "rün 'x'"),
        (Path("plain"), Path("../" + tmp_path.name) / "relative"),
        (Path("~/plain"), Path("~/at home")),
        (Path("~/plain"), Path("~/plain/tokens/inside")),
    ):
        assert cli.main(train(place, max_steps=2, output_dir=run)) == 0
        assert contents(run.expanduser())["step-000002/model.safetensors"] == wanted
    assert not (tmp_path / "~").exists()
    tuned = {"from_scratch": None, "model": "~/at home/best", "data": "~/plain/tokens", "max_steps": 1}
    assert cli.main(train(tmp_path / "plain", output_dir="tuned", **tuned)) == 0
    assert cli.main(train(tmp_path / "plain", max_steps=2, output_dir="plain/tokens")) == 0
    assert cli.main(train(tmp_path / "plain", max_steps=2, output_dir="second")) == 0  # the store is still one


def test_small_and_uneven_stores(tmp_path):
    write_model(tmp_path / "model.yaml")
    rng = np.random.default_rng(0)
    write_store(tmp_path / "tokens" / "train", [[turn(rng, i) for i in range(40)]])  # one conversation, no val split
    for run, options in {
        "one": {"batch_size": 64},
        "in pieces": {"pack_rows": 40},
        "by rows": {"batch_rows": 100_000, "pack_rows": 40},
        "once": {"max_steps": 1, "overfit_one_batch": True, "warmup_steps": 1000, "learning_rate": 0},
        "quiet": {"log_every": 99, "val_every": 0, "save_every": 0},
    }.items():
        assert cli.main(train(tmp_path, output_dir=run, **options)) == 0, run
        assert os.readlink(tmp_path / run / "best") == os.readlink(tmp_path / run / "last")


@pytest.mark.parametrize("part", EVERYTHING)
def test_any_single_part_can_be_trained_or_frozen(tmp_path, part):
    """Packs so small that some hold no frame for the depth decoder, and a speaker whose turns teach nothing."""
    small = {"pack_rows": 30, "amortization_fraction": 0.01, "batch_size": 2, "mask_speaker_ids": [1], "max_steps": 4}
    others = [name for name in EVERYTHING if name != part]
    for run, frozen in (("only", others), ("without", [part])):
        assert cli.main(train(prepare(tmp_path), output_dir=run, freeze=frozen, precision="bf16", **small)) == 0
        before = CSM(CSMConfig.from_dict(read_mapping(tmp_path / "model.yaml"))).init_weights().state_dict()
        after = load_file(tmp_path / run / "last" / "model.safetensors")
        assert {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])} == (
            {part} if run == "only" else set(others)
        )


def test_a_model_with_an_infinite_weight(tmp_path, model, capsys):
    """Every update is skipped and told of; the run gives up with what to do, and has saved nothing."""
    tensors = load_file(model / "model.safetensors")
    tensors["projection.weight"][0, 0] = torch.inf
    save_file(tensors, model / "model.safetensors")
    options = {"from_scratch": None, "model": model, "log_every": 1, "save_every": 1, "val_every": 4}
    assert cli.main(train(tmp_path, **options)) == 2
    said = capsys.readouterr().err
    assert "step 1: the loss or a gradient was not finite; the update was skipped. Data: turn" in said
    last = said.strip().splitlines()[-1]
    assert last.startswith("error: the last 10 updates were all skipped: step 10: ") and "lower --learning-rate" in last
    assert "Last good checkpoint: none yet; lower" in last and "Traceback" not in said
    assert not list((tmp_path / "run").glob("*step-*")) and not (tmp_path / "run" / "best").is_symlink()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON")) for line in lines]
    assert [row["step"] for row in rows] == list(range(10)) and rows[4]["train_loss"] is rows[4]["val_loss"] is None


# ---------------------------------------------------------------------------------------------------------- chance


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


def test_random_damage_is_refused_or_harmless(tmp_path, model):
    """Thousands of damaged files: an InputError of one line, or a file that can still be read; nothing else."""
    random = Random(5)
    write_wav(tmp_path / "a.wav", 0.3, 1)
    write(tmp_path / "a.flac", np.random.default_rng(0).normal(0, 0.1, 9000))
    rows = [{"text": "one", "path": "a.wav", "start": 0.0, "end": 0.2}, [{"text": "x", "audio_path": "a.wav"}]]
    metadata(tmp_path, rows, "m.json")
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
