"""Write a token store, shard by shard; ``token_store`` describes the format and reads it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from csm_fast.config.shape import SAMPLE_RATE, SAMPLES_PER_FRAME
from csm_fast.data.store_format import FORMAT, FORMAT_VERSION, MANIFEST
from csm_fast.data.token_store import TurnTokens, recover_store
from csm_fast.system.arrays import write_arrays
from csm_fast.system.errors import InputError
from csm_fast.system.files import fsync_path, replace_directory, write_file, writing_to

SHARD_FRAMES = 4_000_000  # 256 MB of codes at K = 32; also the most that the writer holds in memory


class TokenStoreWriter:
    """Writes a store conversation by conversation. An older store at ``path`` stays valid until ``close`` replaces it.

    Use it as a context manager: the end of the block closes it, an exception discards the unfinished store. Everything
    is written beside ``path`` first, so there may be one writer per path at a time. The bytes depend on the
    conversations alone. It holds one shard's codes in memory.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        codec: Mapping[str, Any],
        text_tokenizer: Mapping[str, Any],
        resampler: str,
        shard_frames: int = SHARD_FRAMES,
    ):
        self.path = Path(path)
        self._new = self.path.with_name(f".{self.path.name}.new")
        self._identity = {"codec": dict(codec), "text_tokenizer": dict(text_tokenizer), "resampler": resampler}
        self._num_codebooks, self._shard_frames = int(codec["num_codebooks"]), shard_frames
        self._second = int(codec.get("sample_rate", SAMPLE_RATE)) / codec.get(
            "samples_per_frame", SAMPLES_PER_FRAME
        )  # frames per second
        self._shards: list[dict[str, Any]] = []
        self._counts = {"conversations": 0, "turns": 0, "frames": 0, "text_tokens": 0}
        self._parts: list[tuple[TurnTokens, int, bytes, Sequence[float]]] = []
        self._frames = 0
        with writing_to(self.path):
            recover_store(self.path)
            shutil.rmtree(self._new, ignore_errors=True)
            self._new.mkdir(parents=True)

    def __enter__(self) -> TokenStoreWriter:
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def add_conversation(
        self,
        turns: Sequence[TurnTokens],
        *,
        content_keys: Sequence[bytes] | None = None,
        clip_stats: Sequence[Sequence[float]] | None = None,
    ) -> None:
        """Append one conversation; arrays are copied.

        Args:
            turns: one or more turns, each with text and frames.
            content_keys: 32 bytes per turn, a key of what its codes were made from; zeros if not known.
            clip_stats: (seconds, leading silence, trailing silence) per turn, in seconds.
        """
        assert turns, "a conversation has at least one turn"
        frames = sum(len(turn.codes) for turn in turns)
        if self._parts and self._frames + frames > self._shard_frames:
            self._flush()
        index = self._counts["conversations"]
        for i, turn in enumerate(turns):
            codes, text = np.array(turn.codes, np.uint16), np.array(turn.text, np.int32)
            assert codes.ndim == 2 and codes.shape[1] == self._num_codebooks, f"codes {codes.shape}"
            assert len(codes) and len(text) and text.ndim == 1, "a turn has text and frames"
            key = content_keys[i] if content_keys else bytes(32)
            stats = clip_stats[i] if clip_stats else (len(codes) / self._second, 0.0, 0.0)
            self._parts.append((TurnTokens(text, codes, turn.speaker, turn.source_index), index, key, stats))
            self._counts["text_tokens"] += len(text)
        self._frames += frames
        self._counts["conversations"] += 1
        self._counts["turns"] += len(turns)
        self._counts["frames"] += frames

    def finish(self) -> None:
        """Write the last shard and the manifest and sync them to the disk, still beside ``path``."""
        try:
            if not self._counts["conversations"]:
                mend = "check the metadata and what was skipped"
                raise InputError("no conversation to store", file=self.path, mend=mend)
            self._flush()
            hours = round(self._counts["frames"] / self._second / 3600, 6)
            manifest = {"format": FORMAT, "format_version": FORMAT_VERSION, **self._identity}
            manifest |= {"counts": {**self._counts, "hours": hours}, "shards": self._shards}
            with writing_to(self.path):
                write_file(self._new / MANIFEST, json.dumps(manifest, indent=1) + "\n")
                fsync_path(self._new)
        except BaseException:
            self.abort()
            raise

    def commit(self) -> None:
        """Put the finished store at ``path``."""
        with writing_to(self.path):
            replace_directory(self._new, self.path)

    def close(self) -> None:
        """``finish`` and ``commit``."""
        self.finish()
        self.commit()

    def abort(self) -> None:
        """Discard the unfinished store. A store at ``path`` is untouched."""
        shutil.rmtree(self._new, ignore_errors=True)

    def _flush(self) -> None:
        if not self._parts:
            return
        turns, conversations, keys, stats = zip(*self._parts, strict=True)
        lengths = ([len(t.codes) for t in turns], [len(t.text) for t in turns])
        code_offsets, text_offsets = (np.concatenate([[0], np.cumsum(n)]).astype(np.int64) for n in lengths)
        name = f"shard-{len(self._shards):05d}.safetensors"
        with writing_to(self.path):
            sha256, size = write_arrays(
                self._new / name,
                {
                    "codes": [t.codes for t in turns],
                    "text": [t.text for t in turns],
                    "code_offsets": [code_offsets],
                    "text_offsets": [text_offsets],
                    "speaker": [np.array([t.speaker for t in turns], np.int32)],
                    "conversation": [np.array(conversations, np.int64)],
                    "source_index": [np.array([t.source_index for t in turns], np.int64)],
                    "content_key": [np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 32)],
                    "clip_stats": [np.array(stats, np.float32).reshape(-1, 3)],
                },
            )
        self._shards.append(
            {"file": name, "sha256": sha256, "bytes": size, "turns": len(turns), "frames": self._frames}
        )
        self._parts, self._frames = [], 0
