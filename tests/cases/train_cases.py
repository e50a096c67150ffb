"""A token store that can be learned in seconds, a micro model, and a configuration, that the training tests share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from paths import ROOT

from csm_fast.config.parse import build
from csm_fast.config.train import TrainConfig
from csm_fast.data.store_writer import TokenStoreWriter
from csm_fast.data.token_store import TurnTokens

K, SIZE, TEXT = 6, 20, 50
CODEC = {
    "kind": "test",
    "name": "test codec",
    "fingerprint": "c" * 64,
    "sample_rate": 24000,
    "samples_per_frame": 1920,
    "num_codebooks": K,
    "codebook_size": SIZE,
}
TOKENIZER = {"name": "test tokenizer", "fingerprint": "7" * 64, "vocab_size": TEXT}
MODEL_YAML = f"""\
backbone: {{num_layers: 2, num_heads: 4, num_kv_heads: 2, embed_dim: 48, intermediate_dim: 64}}
decoder: {{num_layers: 2, num_heads: 2, num_kv_heads: 1, embed_dim: 32, intermediate_dim: 48}}
text_vocab_size: {TEXT}
audio_vocab_size: {SIZE + 3}
num_codebooks: {K}
"""


def write_model(path: Path, **changes: Any) -> Path:
    """The micro shape as YAML; ``changes`` replace top-level numbers."""
    text = MODEL_YAML
    for name, value in changes.items():
        lines = [f"{name}: {value}" if line.startswith(f"{name}:") else line for line in text.splitlines()]
        text = "\n".join(lines) + "\n"
    path.write_text(text)
    return path


def turn(rng: np.random.Generator, index: int, longest: int = 8, speaker: int | None = None) -> TurnTokens:
    """A text and the frames that follow from it: each text id sets one frame, so a model can learn them."""
    text = rng.integers(1, TEXT, rng.integers(2, longest + 1)).astype(np.int32)
    codes = (text[:, None] * (1 + np.arange(K)) + np.arange(K)) % (SIZE - 1) + 1
    return TurnTokens(text, codes.astype(np.uint16), index % 2 if speaker is None else speaker, index)


def conversations_of(count: int, seed: int, turns: int = 2, longest: int = 8) -> list[list[TurnTokens]]:
    """``count`` conversations of 1 to ``turns`` turns."""
    rng = np.random.default_rng(seed)
    index, found = 0, []
    for _ in range(count):
        size = int(rng.integers(1, turns + 1))
        found.append([turn(rng, index + i, longest) for i in range(size)])
        index += size
    return found


def write_store(path: Path, conversations: list[list[TurnTokens]], **identity: Any) -> Path:
    """One split; ``identity`` changes fields of the codec."""
    codec = {**CODEC, **identity}
    with TokenStoreWriter(path, codec=codec, text_tokenizer=TOKENIZER, resampler="none") as writer:
        for conversation in conversations:
            writer.add_conversation(conversation)
    return path


def make_store(folder: Path, conversations: int = 24, seed: int = 0, val: int = 6, **identity: Any) -> Path:
    """``folder/train`` and, unless ``val`` is 0, ``folder/val``."""
    write_store(folder / "train", conversations_of(conversations, seed), **identity)
    if val:
        write_store(folder / "val", conversations_of(val, seed + 1000), **identity)
    return folder


def values(folder: Path, **overrides: Any) -> dict[str, Any]:
    """Settings by field name for a run of a few seconds: ``folder/tokens``, ``folder/model.yaml``, ``folder/run``."""
    return {
        "model": str(folder / "model.yaml"),
        "from_scratch": True,
        "precision": "fp32",
        "data": str(folder / "tokens"),
        "output_dir": str(folder / "run"),
        "batch_size": 4,
        "pack_rows": 64,
        "amortization_fraction": 0.5,
        "learning_rate": 1e-2,
        "n_epochs": 2,
        "log_every": 2,
        "val_every": 4,
        "save_every": 3,
        "device": "cpu",
        "threads": 1,
        **overrides,
    }


def config(folder: Path, **overrides: Any) -> TrainConfig:
    """The configuration of such a run; writes the store and the model file where they are not there yet."""
    prepare(folder)
    return build(TrainConfig, values(folder, **overrides))


def make_trainer(settings: TrainConfig, **given: Any) -> Any:
    """The trainer of a run; ``given`` goes to ``csm_fast.train.setup.prepare``."""
    from csm_fast.train.loop import Trainer
    from csm_fast.train.setup import prepare as prepare_run

    return Trainer(prepare_run(settings, **given))


def prepare(folder: Path) -> Path:
    """``folder/tokens`` and ``folder/model.yaml``, unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "tokens").exists():
        make_store(folder / "tokens")
    if not (folder / "model.yaml").exists():
        write_model(folder / "model.yaml")
    return folder


def flags(folder: Path, **overrides: Any) -> list[str]:
    """The same settings as command-line flags of ``csm-fast train``; an override of None leaves a flag out."""
    found: list[str] = []
    for name, value in values(folder, **overrides).items():
        flag = "--" + name.replace("_", "-")
        if value is None:
            continue
        if isinstance(value, bool):
            found.append(flag if value else "--no-" + flag[2:])
        elif isinstance(value, list | tuple):
            found += [flag, *map(str, value)]
        else:
            found += [flag, str(value)]
    return found


def environment() -> dict[str, str]:
    """For a subprocess: the package importable without installing it, one thread, no live bar."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def start(argv: list[str], **options: Any) -> subprocess.Popen:
    """``python -m csm_fast.cli argv`` in a process of its own."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT, **options}
    return subprocess.Popen([sys.executable, "-m", "csm_fast.cli", *argv], env=environment(), **options)
