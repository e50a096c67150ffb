"""Choose and load a codec."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from csm_fast.data.codec.base import OFFLINE_NAME, Codec, logger
from csm_fast.data.codec.mimi_weights import (
    MIMI_HUB,
    find_weights,
    get_hub_file,
    missing_library,
    read_sizes,
    read_weights,
)
from csm_fast.system.errors import InputError

KINDS = ("auto", "transformers", "moshi", "offline")


def load_codec(
    kind: str = "auto",
    *,
    source: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    num_codebooks: int = 32,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Codec:
    """Load a codec.

    Args:
        kind: "transformers" or "moshi" is Mimi's own weights, run by that library. "offline" is the codec that needs
            no download (``offline``). "auto" is Mimi through transformers if the hub's cache or the hub has it,
            otherwise the offline codec, with a warning.
        source: a safetensors file, a directory with one, or a hub repository; by default kyutai/mimi. Either library
            runs weights that the other saved. For "offline", a fitted file.
        device: where it runs.
        num_codebooks: how many levels to code with; CSM uses 32.
        cache_dir: where the offline codec is kept, by default ``offline.default_cache_dir``.

    Raises:
        InputError: unknown kind, missing library, nothing at ``source``, damaged or foreign weights.
    """
    if kind not in KINDS:
        raise InputError(f"unknown codec {kind!r}", mend=f"use one of {', '.join(KINDS)}")
    if kind == "auto" and source is None:
        try:
            get_hub_file(*MIMI_HUB)
            kind = "transformers"
        except InputError as error:
            logger.warning("No Mimi here (%s): using the %s", error.what, OFFLINE_NAME)
            kind = "offline"
    elif kind == "auto":
        kind = "transformers"
    name = OFFLINE_NAME
    if kind == "offline":
        from csm_fast.data.codec.offline import offline_file, read_offline

        path = Path(source).expanduser() if source is not None else _fitted(offline_file, cache_dir)
        state, config = read_offline(path), None
    else:
        name, path, config = find_weights(source)
        state, metadata = read_weights(path)
        if metadata.get("csm_fast") == "offline codec":
            name, kind = OFFLINE_NAME, "offline" if kind == "transformers" else kind
    from csm_fast.data.codec.backends import MoshiCodec, OfflineCodec, TransformersCodec

    made = {"offline": OfflineCodec, "moshi": MoshiCodec, "transformers": TransformersCodec}[kind]
    codec = made(state, read_sizes(state, config), name=name, num_codebooks=num_codebooks).to(device)
    codec.check()
    return codec


def _fitted(offline_file: Any, cache_dir: str | os.PathLike[str] | None) -> Path:
    try:
        return offline_file(cache_dir)
    except ImportError as error:
        raise missing_library("transformers", error) from None
