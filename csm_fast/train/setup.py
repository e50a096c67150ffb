"""Where a run starts: the model, the data, and whether they belong together."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from csm_fast.config.shape import NAMED_SHAPES, CSMConfig
from csm_fast.config.train import AdapterSection, OptimizerSection, TrainConfig
from csm_fast.data.token_store import TokenStore, check_compatible, open_split
from csm_fast.model.csm import CSM
from csm_fast.model.loss import coefficients
from csm_fast.model.stacks import vocabulary
from csm_fast.planner import fit as memory
from csm_fast.system.errors import InputError
from csm_fast.system.files import old_directory
from csm_fast.weights.load import load_model
from csm_fast.weights.save import read_record
from csm_fast.weights.shape import scratch_shape


def check_precision(precision: str, section: OptimizerSection) -> None:
    """Refuse what fp16 cannot do.

    Raises:
        InputError: fp16 with bf16 weights, or with updates before all gradients are there to tell an overflow.
    """
    if precision != "fp16":
        return
    if section.weights != "fp32":
        raise InputError(
            f"--precision fp16 computes in fp16, --weights {section.weights} are bf16", mend="leave one of them out"
        )
    if section.optimizer_in_backward:
        raise InputError(
            "--optimizer-in-backward cannot take back an update when a later gradient overflows in fp16",
            mend="use --precision bf16 or fp32, or leave it out",
        )


def base_dtypes(config: TrainConfig, dtype: torch.dtype) -> Callable[[str], torch.dtype]:
    """By parameter, how a run holds what it starts from. A full run: all in float32, or all in bf16. Under adapters:
    what is trained besides and norm scales in float32, the rest in the compute dtype."""
    adapter = config.adapter
    wide = torch.float32 if config.optimizer.weights == "fp32" else torch.bfloat16

    def held(name: str) -> torch.dtype:
        trained = (adapter.train_heads and name in ("codebook0_head.weight", "audio_head")) or (
            adapter.train_embeddings == "all" and name.endswith("embeddings.weight")
        )
        return wide if adapter.method == "full" or trained or name.endswith(".scale") else dtype

    return held


def starting_model(config: TrainConfig, dtype: torch.dtype = torch.float32) -> CSM:
    """The model that ``config.model`` asks for; ``dtype`` is the run's compute dtype."""
    name, held = config.model.model, base_dtypes(config, dtype)
    if not config.model.from_scratch:
        if name in NAMED_SHAPES and not Path(name).exists():
            raise InputError(
                f"--model {name} is a shape, not a trained model", mend="add --from-scratch to start at random"
            )
        return load_model(name, dtype=held)
    return CSM(scratch_shape(name)).init_weights(config.data.seed)


def plan_memory(config: TrainConfig, shape: CSMConfig, store: TokenStore, device: torch.device, precision: str) -> None:
    """Refuse a run that cannot fit into the device's memory, or choose the checkpointing with which it does.

    Raises:
        InputError: it does not fit; the line says by how much, and the smallest change that mends it.
    """
    if config.run.memory == "off":
        return
    data, sizes = config.data, np.sort(np.minimum(store.conversation_rows, config.data.pack_rows))
    step = data.batch_rows or int(sizes[-data.batch_size * data.gradient_accumulation :].sum())
    load: dict[str, Any] = {
        "rows": min(data.pack_rows, step),
        "packs": math.ceil(step / data.pack_rows),
        # The row that ends each turn is supervised, too.
        "audio_share": (store.num_frames + store.num_turns) / max(1, int(store.conversation_rows.sum())),
        "precision": precision,
    }
    if config.run.memory == "auto":
        config.model.activation_checkpointing = memory.choose_checkpointing(config, shape, device, **load)  # type: ignore[assignment]
    else:
        memory.check(config, shape, device, **load)


def attach_adapters(
    model: CSM,
    config: TrainConfig,
    dtype: torch.dtype,
    store: TokenStore,
    resumed: Path | None,
    device: torch.device | None = None,
) -> None:
    """Put the adapters of ``config.adapter`` on a base, and what an earlier checkpoint of them holds into them.
    ``device``: where the run will be, for ``adapters.attach``."""
    from csm_fast.model import adapters
    from csm_fast.model.embedding_rows import EmbeddingRows, rows_in
    from csm_fast.weights import adapter_files

    if config.optimizer.weights != "fp32":
        raise InputError(
            f"--weights {config.optimizer.weights} belongs to --method full; adapters are trained in float32",
            mend="leave one of them out",
        )
    base = f"{config.model.model}, random, seed {config.data.seed}" if config.model.from_scratch else config.model.model
    adapters.attach(model, config.adapter, compute_dtype=dtype, base=base, seed=config.data.seed, device=device)
    if config.adapter.train_embeddings == "rows":
        EmbeddingRows(model, *rows_in([store], model))
    if resumed:
        adapter_files.load_into(model, resumed)


def open_optional_split(data: str, split: str) -> TokenStore | None:
    path = Path(data).expanduser() / split
    return open_split(data, split) if path.exists() or old_directory(path).exists() else None


def check_adapter(section: AdapterSection) -> None:
    """Refuse settings of adapters where none are trained.

    Raises:
        InputError: one that is not the default, with ``method`` full.
    """
    if section.method != "full":
        return
    for name, default in dataclasses.asdict(AdapterSection()).items():
        if getattr(section, name) != default:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(
                f"{flag} belongs to adapters, and --method full trains none",
                mend=f"add --method lora, or leave {flag} out",
            )


def check_data(
    model: CSM, stores: list[TokenStore], config: TrainConfig, resumed: Path | None, is_named: bool = True
) -> dict[str, Any]:
    """Refuse, by name, data made with another codec or tokenizer than the model's.

    Args:
        is_named: the model is what ``config.model.model`` names, and not one that was handed over.

    Returns:
        The record of codec and tokenizer that the model's checkpoints will carry.
    """
    num_codebooks, vocab = vocabulary(model)
    known = {}
    is_named = is_named and not config.model.from_scratch
    if resumed or is_named:
        known = read_record(str(resumed or config.model.model))
    for store in stores:
        check_compatible(
            store,
            codec_fingerprint=known.get("codec", {}).get("fingerprint"),
            text_fingerprint=known.get("text_tokenizer", {}).get("fingerprint"),
            num_codebooks=num_codebooks,
            text_vocab_size=model.text_embeddings.num_embeddings,
        )
        if store.codebook_size > vocab:
            raise InputError(
                f"has codes up to {store.codebook_size - 1}; the model's audio vocabulary ends at {vocab - 1}",
                file=store.path,
                mend="use a model of the codec's size",
            )
        # Weights that say nothing of their codec are Sesame's or made from them, and speak Mimi.
        offline = store.codec.get("kind") == "offline"
        if offline and not known and is_named and vocab == 2051:
            raise InputError(
                f"was made with the {store.codec['name']}; {config.model.model} speaks kyutai/mimi",
                file=store.path,
                mend="run csm-fast pretokenize --codec transformers, or train --from-scratch",
            )
    for noun in ("codec", "text_tokenizer"):
        if len({getattr(store, noun)["fingerprint"] for store in stores}) > 1:
            raise InputError(
                f"train and val were made with different {noun.replace('_', ' ')}s",
                file=config.data.data,
                mend="run csm-fast pretokenize again",
            )
    return {"codec": stores[0].codec, "text_tokenizer": stores[0].text_tokenizer}


# What decides which frames step N sees. A run continued under another value would be neither run; nor would one
# continued under another loss, or from another model.
POSITIONAL = (
    "batch_size",
    "batch_rows",
    "gradient_accumulation",
    "pack_window",
    "mask_speaker_ids",
    "supervise",
    "seed",
)


def position_identity(config: TrainConfig, store: TokenStore) -> dict[str, Any]:
    """What the position (epoch, index) of a run refers to: the data and how it is dealt out."""
    data = dataclasses.asdict(config.data)
    shards = json.dumps(store.manifest["shards"], sort_keys=True).encode()
    identity = {**{key: data[key] for key in POSITIONAL}, "method": config.adapter.method}
    # Losses of two formulas cannot be compared, so there would be no best checkpoint.
    a, b = coefficients(config.loss, store.num_codebooks)
    identity.update(loss=f"{a:g} CE0 + {b:g} CEd", eos_weight=config.loss.eos_weight)
    if config.adapter.method != "full":  # what the adapters were saved with would be another model
        identity.update(lora_alpha=config.adapter.alpha, rslora=config.adapter.rslora)
    if config.model.from_scratch and config.model.model in NAMED_SHAPES:
        identity["model"] = config.model.model
    if config.data.batch_rows is not None:
        identity["pack_rows"] = config.data.pack_rows
    return {**identity, "tokens": hashlib.sha256(shards).hexdigest()[:16]}


def check_position(saved: dict[str, Any], now: dict[str, Any], checkpoint: Path) -> None:
    """Refuse to continue a run on other data or another order."""
    for key, value in now.items():
        if key in saved and saved[key] != value:
            was, name = saved[key], "the token store" if key == "tokens" else key
            raise InputError(
                f"the run was made with {name} {was}, now it is {value}",
                file=checkpoint,
                mend="continue with the same, or start a new run with --output-dir "
                "(and --model pointing here to build on it)",
            )
