"""The codec and the text tokenizer of a model, checked against the record of those that it was trained with."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from csm_fast.data.codec.base import Codec
from csm_fast.data.codec.load import load_codec
from csm_fast.data.text import TextTokenizer, load_text_tokenizer
from csm_fast.model.stacks import vocabulary
from csm_fast.system.errors import InputError


@dataclass(frozen=True)
class Voice:
    """The tokenizer of a model's text, and the codec of its codes."""

    codec: Codec
    tokenizer: TextTokenizer


def load_voice(
    model: Any,
    record: Mapping[str, Any],
    *,
    codec: str,
    codec_source: str | None,
    tokenizer: str | None,
    made: str = "the model was trained",
    file: str | os.PathLike[str] | None = None,
) -> Voice:
    """Load the codec and the tokenizer that a command names, if they are those of the record.

    Args:
        model: ``CSM`` or any module with Sesame's tree.
        record: ``codec`` and ``text_tokenizer`` as ``weights.save.read_record`` gives them; what it lacks is not
            compared.
        codec, codec_source, tokenizer: the flags --codec, --codec-source and --tokenizer. The codec "auto" is the
            offline codec where that is the record's.
        made: where the record comes from, for the message: "the model was trained" or "the data was made".
        file: what the message names.

    Raises:
        InputError: they cannot be loaded, are others than the record's, or have more ids or codes than the model.
    """
    known, (num_codebooks, vocab) = record.get("codec", {}), vocabulary(model)
    if codec == "auto" and known.get("kind") == "offline":
        codec = "offline"
    found = load_codec(codec, source=codec_source, num_codebooks=num_codebooks)
    if known and known.get("fingerprint") != found.fingerprint:
        raise InputError(
            f"{made} with {known.get('name')}, this is {found.name}",
            file=file,
            mend="give --codec and --codec-source as at pretokenize",
        )
    text = load_text_tokenizer(tokenizer)
    if text.fingerprint != record.get("text_tokenizer", {}).get("fingerprint", text.fingerprint):
        raise InputError(
            f"{made} with another text tokenizer than {text.name}",
            file=file,
            mend="give --tokenizer as at pretokenize",
        )
    ids = model.text_embeddings.num_embeddings
    if text.vocab_size > ids or found.codebook_size > vocab:
        raise InputError(
            f"the model knows {ids:,} text ids and {vocab:,} codes; {text.name} has {text.vocab_size:,} ids, "
            f"{found.name} {found.codebook_size:,} codes",
            file=file,
            mend="give the --tokenizer and --codec that the model was trained with",
        )
    return Voice(found, text)
