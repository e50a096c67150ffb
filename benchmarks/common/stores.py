"""Token stores of random numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from csm_fast.config.shape import SAMPLE_RATE, SAMPLES_PER_FRAME, CSMConfig
from csm_fast.data.store_writer import TokenStoreWriter

RANDOM = {"kind": "random", "name": "random", "fingerprint": "0" * 64}


def identities(shape: CSMConfig) -> dict[str, dict[str, Any]]:
    """What a store and a model of random numbers say of their codec and of their text tokenizer."""
    codec = {**RANDOM, "sample_rate": SAMPLE_RATE, "samples_per_frame": SAMPLES_PER_FRAME}
    codec |= {"num_codebooks": shape.num_codebooks, "codebook_size": shape.audio_vocab_size - 3}
    return {"codec": codec, "text_tokenizer": {**RANDOM, "vocab_size": shape.text_vocab_size}}


def open_writer(path: Path, shape: CSMConfig) -> TokenStoreWriter:
    """A writer of a store of random numbers."""
    known = identities(shape)
    return TokenStoreWriter(path, codec=known["codec"], text_tokenizer=known["text_tokenizer"], resampler="none")
