"""Token stores, models and shapes that ``csm-fast train`` refuses in one line; nothing is lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from command_cases import SHARD, flip_bit, train_args, truncate
from train_cases import (
    CODEC,
    MODEL_YAML,
    SIZE,
    TOKENIZER,
    K,
    conversations_of,
    make_store,
    prepare,
    turn,
    write_model,
    write_store,
)

from csm_fast import cli
from csm_fast.data.store_writer import TokenStoreWriter

pytestmark = pytest.mark.usefixtures("home", "fresh_log")


def edit_manifest(change):
    def edit(tokens: Path) -> None:
        manifest = json.loads((tokens / "train" / "manifest.json").read_text())
        change(manifest)
        (tokens / "train" / "manifest.json").write_text(json.dumps(manifest))

    return edit


STORES = {
    "a flipped bit": (lambda t: flip_bit(t / SHARD), SHARD + ": corrupt: its hash", "run csm-fast pretokenize again"),
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
    refused(train_args(tmp_path), "tokens", *words)


def test_the_split_instead_of_the_store(tmp_path, refused):
    prepare(tmp_path)
    refused(
        train_args(tmp_path, data="tokens/train"), "tokens/train: is one split of a store", "give the directory that"
    )


def test_stores_that_do_not_fit_the_model(tmp_path, refused):
    write_model(prepare(tmp_path) / "k.yaml", num_codebooks=K + 1)
    refused(
        train_args(tmp_path, model="k.yaml"), "tokens/train: ", f"of {K} codebooks, the model wants {K + 1}", "--codec"
    )
    write_model(tmp_path / "v.yaml", audio_vocab_size=SIZE - 1)
    refused(train_args(tmp_path, model="v.yaml"), "has codes up to 19", "ends at 18", "use a model of the codec's size")
    write_model(tmp_path / "t.yaml", text_vocab_size=9)
    refused(train_args(tmp_path, model="t.yaml"), "of 50 ids, the model wants at most 9", "--tokenizer")
    # A trained model knows its codec and its tokenizer.
    assert cli.main(train_args(tmp_path, max_steps=1)) == 0
    tuned = {"from_scratch": None, "model": "run/best", "output_dir": "next"}
    make_store(tmp_path / "other", fingerprint="d" * 64)
    refused(
        train_args(tmp_path, **tuned, data="other"), "other/train: ", "test codec (dddddddddddd)", "the model wants ccc"
    )
    with TokenStoreWriter(
        "words/train", codec=CODEC, text_tokenizer={**TOKENIZER, "fingerprint": "8" * 64}, resampler="none"
    ) as writer:
        writer.add_conversation([turn(np.random.default_rng(0), 0)])
    refused(
        train_args(tmp_path, **tuned, data="words"), "text tokenizer", "the model wants 777777777777", "--tokenizer"
    )
    shutil.copytree("tokens/val", "words/val")
    refused(
        train_args(tmp_path, data="words", output_dir="new"),
        "train and val were made with different text tokenizers",
        "pretokenize",
    )


def test_conversations_that_do_not_fit(tmp_path, refused, monkeypatch):
    prepare(tmp_path)
    monkeypatch.setattr(
        "csm_fast.train.setup.load_starting_model", lambda *_: pytest.fail("made before the packs were")
    )
    refused(
        train_args(tmp_path, pack_rows=9), "tokens/train: conversation", "a pack here holds 9", "raise --pack-rows to"
    )
    refused(train_args(tmp_path, batch_rows=20), "needs 2", "--batch-rows is 20", "raise --batch-rows to at least")
    (tmp_path / "short.yaml").write_text(
        MODEL_YAML.replace("intermediate_dim: 64", "intermediate_dim: 64, max_seq_len: 9")
    )
    line = refused(
        train_args(tmp_path, model="short.yaml"), "tokens/train: conversation", "the model's context is 9", "cut"
    )
    assert "raise" not in line


def test_a_validation_split_without_anything_to_score(tmp_path, refused):
    shutil.rmtree(prepare(tmp_path) / "tokens" / "val")
    rng = np.random.default_rng(0)
    write_store(tmp_path / "tokens" / "val", [[turn(rng, i, speaker=7)] for i in range(3)])
    refused(
        train_args(tmp_path, mask_speaker_ids=[7]), "tokens/val: --mask-speaker-ids masks every turn", "leave at least"
    )


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
    for argv in (
        train_args(tmp_path, from_scratch=None, model=model),
        ["generate", "--model", model, "--text", "hello"],
    ):
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
    refused(train_args(tmp_path, model="shape.yaml"), "shape.yaml", *words)


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
        train_args(prepare(tmp_path)),
        "not enough memory (",
        words.splitlines()[0],
        "smallest change",
        "--activation-checkpointing",
    )


def test_model_names(tmp_path, refused):
    prepare(tmp_path)
    refused(train_args(tmp_path, model="tiny", from_scratch=None), "--model tiny is a shape", "add --from-scratch")
    refused(train_args(tmp_path, model="large"), "--from-scratch needs a shape, large is none", "use --model csm-1b")
    refused(train_args(tmp_path, model="no.yaml"), "no.yaml: cannot be read (No such file", "check the path")
    refused(train_args(tmp_path, model="x.pt", from_scratch=None), "x.pt: is a pickle", "save its tensors")
