"""Models written as other tools write them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from csm_fast import CSMConfig, TransformerConfig
from csm_fast.weights.config_json import transformers_config

OTHER = CSMConfig(
    TransformerConfig(3, 8, 4, 64, 80, 512, 1e-4, 1e4, 8.0, 1.0, 6.0, 4096),
    TransformerConfig(1, 2, 1, 32, 48, 2048, 1e-6, 5e5, 1.0),
    text_vocab_size=40,
    audio_vocab_size=19,
    num_codebooks=4,
)


def same(model, state) -> bool:
    own = dict(model.named_parameters())
    return own.keys() == state.keys() and all(torch.equal(own[n].detach(), state[n]) for n in own)


def write(directory: Path, state, config: dict | None, name: str = "model.safetensors") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    save_file({n: t.clone().contiguous() for n, t in state.items()}, directory / name)
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    return directory


def shard(directory: Path, state, config: dict, stem: str) -> Path:
    """Two shards and their index, as transformers writes them."""
    directory.mkdir(parents=True, exist_ok=True)
    names = sorted(state)
    files = {n: f"{stem}-{1 + i % 2:05d}-of-00002.safetensors" for i, n in enumerate(names)}
    for file in set(files.values()):
        save_file({n: state[n].clone() for n in names if files[n] == file}, directory / file)
    (directory / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def hf_json(config: CSMConfig) -> dict:
    return {"model_type": "csm", **transformers_config(config)}
