"""Whether a run's settings, model, data and checkpoint belong together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from csm_fast.config.shape import NAMED_SHAPES
from csm_fast.config.train import AdapterSection, OptimizerSection, TrainConfig
from csm_fast.data.token_store import TokenSource, check_compatible, hash_tokens
from csm_fast.model.csm import CSM
from csm_fast.model.loss import coefficients
from csm_fast.model.stacks import vocabulary
from csm_fast.system.errors import InputError
from csm_fast.weights.save import read_record


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
    model: CSM, stores: Sequence[TokenSource], config: TrainConfig, resumed: Path | None, is_named: bool = True
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
                file=getattr(store, "path", None),
                mend="use a model of the codec's size",
            )
        # Weights that say nothing of their codec are Sesame's or made from them, and speak Mimi.
        offline = store.codec.get("kind") == "offline"
        if offline and not known and is_named and vocab == 2051:
            raise InputError(
                f"was made with the {store.codec['name']}; {config.model.model} speaks kyutai/mimi",
                file=getattr(store, "path", None),
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


def position_identity(config: TrainConfig, store: TokenSource) -> dict[str, Any]:
    """What the position (epoch, index) of a run refers to: the data and how it is dealt out."""
    data = dataclasses.asdict(config.data)
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
    return {**identity, "tokens": hash_tokens(store)[:16]}


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
