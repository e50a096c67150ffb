"""A model's shape in three forms: ``CSMConfig``, Sesame's config.json and transformers' ``CsmConfig``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from csm_fast.config.shape import CSMConfig, TransformerConfig
from csm_fast.system.errors import InputError
from csm_fast.system.files import read_json


def sesame_config(config: CSMConfig) -> dict[str, Any]:
    """The content of our config.json: the keys of Sesame's ``ModelArgs``, and the whole shape under ``csm_fast``.

    Stacks that are not csm-1b's get a flavor named after their shape. Sesame's code can load them if an entry of that
    name is added to its ``FLAVORS``.
    """
    one = CSMConfig.csm_1b()

    def flavor(stack: TransformerConfig, known: TransformerConfig, name: str) -> str:
        return name if stack == known else f"csm-fast-{stack.num_layers}x{stack.embed_dim}"

    return {
        "backbone_flavor": flavor(config.backbone, one.backbone, "llama-1B"),
        "decoder_flavor": flavor(config.decoder, one.decoder, "llama-100M"),
        "text_vocab_size": config.text_vocab_size,
        "audio_vocab_size": config.audio_vocab_size,
        "audio_num_codebooks": config.num_codebooks,
        "csm_fast": config.to_dict(),
    }


def transformers_config(config: CSMConfig) -> dict[str, Any]:
    """Keyword arguments for ``transformers.CsmConfig`` (and, as JSON, its config.json without the codec's part)."""

    def stack(c: TransformerConfig, positions: int) -> dict[str, Any]:
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": c.rope_base}
        if c.rope_scale_factor != 1:
            # transformers requires the original length to be below the model's own. Dividing it and both factors by
            # the same power of two changes no frequency.
            shrink = 1
            while c.rope_old_context_len // shrink * 2 > positions and c.rope_old_context_len % (2 * shrink) == 0:
                shrink *= 2
            rope |= {
                "rope_type": "llama3",
                "factor": c.rope_scale_factor,
                "low_freq_factor": c.rope_low_freq_factor / shrink,
                "high_freq_factor": c.rope_high_freq_factor / shrink,
                "original_max_position_embeddings": c.rope_old_context_len // shrink,
            }
        return {
            "hidden_size": c.embed_dim,
            "intermediate_size": c.intermediate_dim,
            "num_hidden_layers": c.num_layers,
            "num_attention_heads": c.num_heads,
            "num_key_value_heads": c.num_kv_heads,
            "head_dim": c.head_dim,
            "max_position_embeddings": positions,
            "rms_norm_eps": c.norm_eps,
            "rope_parameters": rope,
            "vocab_size": config.audio_vocab_size,
            "num_codebooks": config.num_codebooks,
        }

    depth = stack(config.decoder, config.num_codebooks + 1)
    return {
        **stack(config.backbone, config.backbone.max_seq_len),
        "text_vocab_size": config.text_vocab_size,
        "codebook_pad_token_id": config.audio_vocab_size - 1,
        "depth_decoder_config": {**depth, "backbone_hidden_size": config.backbone.embed_dim},
    }


def config_from_json(values: dict[str, Any], file: Path) -> CSMConfig | None:
    """The shape that a config.json describes: ours, Sesame's or transformers'; None if it is none of them.

    Raises:
        InputError: it is one of them, but damaged or of another model than CSM; the message names ``file``.
    """
    try:
        if "csm_fast" in values:
            ours = values["csm_fast"]
            return CSMConfig.from_dict(ours if isinstance(ours, dict) else {})
        one = CSMConfig.csm_1b()
        if (values.get("backbone_flavor"), values.get("decoder_flavor")) == ("llama-1B", "llama-100M"):
            names = ("text_vocab_size", "audio_vocab_size", "audio_num_codebooks")
            sizes = [values.get(n) for n in names]
            if not all(isinstance(n, int) for n in sizes):
                raise InputError("lacks one of " + ", ".join(names), mend="copy or download it again")
            return CSMConfig(one.backbone, one.decoder, *sizes)  # type: ignore[arg-type]
        return from_transformers_config(values) if values.get("model_type") == "csm" else None
    except InputError as error:
        raise InputError(error.what, file=file, mend=error.mend) from None


def read_shape(directory: Path) -> CSMConfig | None:
    """The shape that a directory's config.json describes; None if there is none, or if it does not describe a CSM.

    Raises:
        InputError: the file is damaged.
    """
    file = directory / "config.json"
    return config_from_json(read_json(file), file) if file.is_file() else None


def from_transformers_config(values: dict[str, Any]) -> CSMConfig:
    """The shape in the JSON of a ``CsmConfig``. Missing keys mean csm-1b's values."""

    def stack(values: dict[str, Any], one: TransformerConfig, max_seq_len: int) -> TransformerConfig:
        theirs = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "intermediate_size")
        ours = ("num_layers", "num_heads", "num_kv_heads", "embed_dim", "intermediate_dim")
        shape = {o: values.get(t) or getattr(one, o) for t, o in zip(theirs, ours, strict=True)}
        rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        odd = [k for k in ("attention_bias", "mlp_bias") if values.get(k)]
        if values.get("hidden_act", "silu") != "silu" or kind not in ("default", "llama3") or odd:
            raise InputError("this model differs from CSM in more than its size", mend="use another model")
        config = TransformerConfig(
            **shape,
            max_seq_len=max_seq_len,
            norm_eps=values.get("rms_norm_eps", one.norm_eps),
            rope_base=float(rope.get("rope_theta", values.get("rope_theta", one.rope_base))),
            rope_scale_factor=1.0,
        )
        if values.get("head_dim", config.head_dim) not in (None, config.head_dim):
            raise InputError(f"head_dim {values['head_dim']} is not hidden_size / heads")
        if kind == "default":
            return config
        low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
        old = rope["original_max_position_embeddings"]
        if (old / low).is_integer():  # the same frequencies in Llama's own terms (see transformers_config)
            low, high, old = 1.0, high / low, old / low
        return dataclasses.replace(
            config,
            rope_scale_factor=float(rope["factor"]),
            rope_low_freq_factor=low,
            rope_high_freq_factor=high,
            rope_old_context_len=int(old),
        )

    one = CSMConfig.csm_1b()
    depth = values.get("depth_decoder_config") or {}
    try:
        return CSMConfig(
            stack(values, one.backbone, values.get("max_position_embeddings", one.backbone.max_seq_len)),
            # transformers' max_position_embeddings counts a frame's positions; Sesame's decoder has a Llama's length.
            stack(depth, one.decoder, one.decoder.max_seq_len),
            values.get("text_vocab_size", one.text_vocab_size),
            values.get("vocab_size", one.audio_vocab_size),
            values.get("num_codebooks", one.num_codebooks),
        )
    except InputError:
        raise
    except (KeyError, TypeError, AttributeError, ArithmeticError, ValueError) as error:
        raise InputError(f"not a usable CsmConfig ({type(error).__name__}: {error})") from None
