"""The token store: codes and text ids of one split, memory-mapped from safetensors shards beside a manifest.

A store is a directory: ``manifest.json`` (format, codec, text tokenizer, counts, every shard's size and hash) and
``shard-00000.safetensors``, ... with flat arrays over the shard's F frames, N text ids and n turns:

    codes           uint16 [F, K]    content_key  uint8 [n, 32]   what the codes were made from (pretokenize.py)
    text            int32 [N]        clip_stats   float32 [n, 3]  seconds, leading and trailing silence in seconds
    code_offsets    int64 [n + 1]    speaker      int32 [n]
    text_offsets    int64 [n + 1]    conversation int64 [n]       index over the whole store, 0, 1, 2, ...
                                     source_index int64 [n]       which turn of the metadata, counted from 0

A conversation is in one shard. The manifest is written last; a directory without one is not a store.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from csm_fast.data.store_format import MANIFEST, corrupt_file, open_shard, read_manifest
from csm_fast.packing.fit import Store
from csm_fast.system.arrays import Arrays
from csm_fast.system.errors import InputError
from csm_fast.system.files import file_sha256, old_directory


@dataclass(frozen=True, slots=True)
class TurnTokens:
    """The text ids and codes of one turn. From a store, ``text`` int32 [n] and ``codes`` uint16 [frames, K] are
    read-only."""

    text: np.ndarray
    codes: np.ndarray
    speaker: int
    source_index: int = 0


class TokenSource(Store, Protocol):
    """What training reads of a split: a ``TokenStore``, or an object in memory with these attributes. Its ``path`` and
    ``content_hash()`` are used where it has them."""

    codec: dict[str, Any]  # name, kind, fingerprint, ... as in a manifest
    text_tokenizer: dict[str, Any]  # name, fingerprint, vocab_size
    codebook_size: int
    num_turns: int
    num_frames: int
    conversation_rows: np.ndarray


@dataclass(slots=True)
class _Shard:
    path: Path
    sha256: str
    arrays: Arrays
    first_turn: int
    verified: bool


class TokenStore:
    """A split opened for reading, with ``TokenStore.open(path)`` or ``open_split(data_dir, split)``.

    Several threads may use it. Pickling it, for a worker process, sends the path; the worker maps the files again.
    Errors are InputErrors that name the file.

    Attributes:
        path: the directory as given.
        manifest: manifest.json as read; ``codec`` and ``text_tokenizer`` are its identity dicts.
        num_conversations, num_turns, num_frames, num_text_tokens: totals.
        conversation_rows: int32 [num_conversations], rows of each one packed: text ids + frames + 1 EOS per turn.
        turn_counts: int32 [num_conversations], turns of each conversation.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], shards: list[_Shard], turn_starts: np.ndarray):
        self.path, self.manifest, self._shards = path, manifest, shards
        self.codec: dict[str, Any] = manifest["codec"]
        self.text_tokenizer: dict[str, Any] = manifest["text_tokenizer"]
        self.num_codebooks = int(self.codec["num_codebooks"])
        self.codebook_size = int(self.codec["codebook_size"])
        counts = manifest["counts"]
        self.num_conversations: int = counts["conversations"]
        self.num_turns: int = counts["turns"]
        self.num_frames: int = counts["frames"]
        self.num_text_tokens: int = counts["text_tokens"]
        self.hours: float = counts["hours"]
        self._turn_starts = turn_starts  # int64 [num_conversations + 1], into the store's turns
        self._first_turns = [shard.first_turn for shard in shards]
        self._lock = threading.Lock()
        self.turn_counts = np.diff(turn_starts).astype(np.int32)
        self.conversation_rows = self._count_rows()

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = True) -> TokenStore:
        """Open the store at ``path``: manifest, sizes and headers are checked now, each shard's hash on first use.

        Args:
            path: the store's directory (``tokens/train``).
            verify: False skips the hashes, for a worker whose parent has checked them.
        """
        shown = Path(path)
        path = _locate_store(shown)
        manifest = read_manifest(path, shown)
        shards, starts, turns, conversations = [], [np.zeros(1, np.int64)], 0, 0
        frames = text = 0
        for entry in manifest["shards"]:
            shard_path = path / entry["file"]
            arrays = open_shard(shard_path, entry, int(manifest["codec"]["num_codebooks"]))
            conversation = arrays["conversation"]
            steps = np.diff(conversation, prepend=conversations - 1)
            if steps[0] != 1 or steps.min() < 0 or steps.max() > 1:
                raise corrupt_file(shard_path, "its conversations are not numbered 0, 1, 2, ...")
            starts.append(np.flatnonzero(np.diff(conversation)) + 1 + turns)
            shards.append(_Shard(shard_path, entry["sha256"], arrays, turns, not verify))
            turns += len(conversation)
            starts.append(np.array([turns]))
            conversations = int(conversation[-1]) + 1
            frames, text = frames + len(arrays["codes"]), text + len(arrays["text"])
        counted = {"conversations": conversations, "turns": turns, "frames": frames, "text_tokens": text}
        for name, number in counted.items():
            if manifest["counts"].get(name) != number:
                said = manifest["counts"].get(name)
                raise corrupt_file(path / MANIFEST, f"it counts {said} {name}, the shards hold {number}")
        return cls(shown, manifest, shards, np.concatenate(starts))

    def __len__(self) -> int:
        return self.num_conversations

    def __reduce__(self):
        verify = not all(shard.verified for shard in self._shards)
        return (_reopen, (os.fspath(self.path), verify))

    def conversation(self, index: int) -> list[TurnTokens]:
        """The turns of conversation ``index`` in order, read-only (copy before writing to them)."""
        if not 0 <= index < self.num_conversations:
            raise IndexError(f"conversation {index} of {self.num_conversations}")
        first, last = self._turn_starts[index : index + 2].tolist()
        shard = self._shard_of(first)
        text, codes = self.read_turns([first], [last])
        text.flags.writeable = codes.flags.writeable = False
        first, last = first - shard.first_turn, last - shard.first_turn
        arrays = shard.arrays
        frames = arrays["code_offsets"][first : last + 1].tolist()
        words = arrays["text_offsets"][first : last + 1].tolist()
        speakers = arrays["speaker"][first:last].tolist()
        sources = arrays["source_index"][first:last].tolist()
        f0, w0 = frames[0], words[0]
        return [
            TurnTokens(
                text[words[i] - w0 : words[i + 1] - w0], codes[frames[i] - f0 : frames[i + 1] - f0], speaker, sources[i]
            )
            for i, speaker in enumerate(speakers)
        ]

    def read_turns(self, firsts: Sequence[int], lasts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Turns [first, last) of the store for each pair, each pair inside one conversation, end to end.

        Returns:
            text int32 [N] and codes uint16 [F, K], copied.
        """
        if len(firsts) and not 0 <= min(firsts) <= max(lasts) <= self.num_turns:
            raise IndexError(f"turns {min(firsts)} to {max(lasts)} of {self.num_turns}")
        spans, frames, words = [], 0, 0
        for first, last in zip(firsts, lasts, strict=True):
            shard = self._shard_of(first)
            codes_at, text_at = shard.arrays["code_offsets"], shard.arrays["text_offsets"]
            first, last = first - shard.first_turn, last - shard.first_turn
            code, word = codes_at.item(first), text_at.item(first)
            more_frames, more_words = codes_at.item(last) - code, text_at.item(last) - word
            spans.append((shard, code, more_frames, word, more_words))
            frames, words = frames + more_frames, words + more_words
        text, codes = np.empty(words, np.int32), np.empty((frames, self.num_codebooks), np.uint16)
        frames = words = 0
        for shard, code, more_frames, word, more_words in spans:
            shard.arrays.read_into(codes[frames : frames + more_frames], "codes", code)
            shard.arrays.read_into(text[words : words + more_words], "text", word)
            frames, words = frames + more_frames, words + more_words
        if not self._in_range(text, codes):
            frames = words = 0
            for (shard, _, more_frames, _, more_words), first in zip(spans, firsts, strict=True):
                some_text, some_codes = text[words : words + more_words], codes[frames : frames + more_frames]
                index = int(np.searchsorted(self._turn_starts, first, "right")) - 1
                self._check_range(shard, index, some_text, some_codes)
                frames, words = frames + more_frames, words + more_words
        return text, codes

    def _shard_of(self, turn: int) -> _Shard:
        shard = self._shards[bisect.bisect_right(self._first_turns, turn) - 1]
        if not shard.verified:
            self._verify(shard)
        return shard

    def _in_range(self, text: np.ndarray, codes: np.ndarray) -> bool:
        """Whether all ids are in range. This is checked although the hash is right, because on a GPU an id outside its
        table reads other memory."""
        highest, lowest = text.max(initial=0), text.min(initial=0)
        return codes.max(initial=0) < self.codebook_size and 0 <= lowest <= highest < self.text_tokenizer["vocab_size"]

    def _check_range(self, shard: _Shard, index: int, text: np.ndarray, codes: np.ndarray) -> None:
        """Refuse a conversation with an id out of range."""
        if self._in_range(text, codes):
            return
        if (code := codes.max(initial=0)) >= self.codebook_size:
            raise corrupt_file(shard.path, f"conversation {index} has code {code} of {self.codebook_size}")
        raise corrupt_file(shard.path, f"conversation {index} has a text id outside the vocabulary")

    def content_hash(self) -> str:
        """Identity of the tokens: SHA-256 in hex of the manifest's list of shards and their hashes."""
        return hashlib.sha256(json.dumps(self.manifest["shards"], sort_keys=True).encode()).hexdigest()

    def turn_lengths(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(text ids int32 [T], frames int32 [T], speaker int32 [T], conversation int64 [T]) of all T turns, copied."""
        text = np.concatenate([np.diff(s.arrays["text_offsets"]) for s in self._shards]).astype(np.int32)
        frames = np.concatenate([np.diff(s.arrays["code_offsets"]) for s in self._shards]).astype(np.int32)
        return text, frames, self.turn_array("speaker"), self.turn_array("conversation")

    def turn_array(self, name: str) -> np.ndarray:
        """A per-turn array (speaker, source_index, content_key, clip_stats, ...) of all shards, as a copy."""
        return np.concatenate([shard.arrays[name] for shard in self._shards])

    def code_blocks(self, frames: int = 65_536) -> Iterator[np.ndarray]:
        """All codes as uint16 [<= frames, K] views, for statistics in constant memory."""
        for shard in self._shards:
            self._verify(shard)
            codes = shard.arrays["codes"]
            yield from (codes[i : i + frames] for i in range(0, len(codes), frames))

    def shard_arrays(self) -> list[tuple[Path, Arrays]]:
        """(path, arrays) of each shard."""
        return [(shard.path, shard.arrays) for shard in self._shards]

    def _count_rows(self) -> np.ndarray:
        rows = np.empty(self.num_conversations, np.int32)
        done = 0
        for shard in self._shards:
            arrays = shard.arrays
            turn_rows = np.diff(arrays["text_offsets"]) + np.diff(arrays["code_offsets"]) + 1
            starts = np.flatnonzero(np.diff(arrays["conversation"], prepend=-1))
            rows[done : done + len(starts)] = np.add.reduceat(turn_rows, starts)
            done += len(starts)
        return rows

    def _verify(self, shard: _Shard) -> None:
        with self._lock:
            if shard.verified:
                return
            if file_sha256(shard.path) != shard.sha256:
                raise corrupt_file(shard.path, "its hash is not the one in the manifest")
            shard.verified = True


def open_split(data_dir: str | os.PathLike[str], split: str, *, verify: bool = True) -> TokenStore:
    """Open the store of ``split`` ("train" or "val") in a directory from ``csm-fast pretokenize --output data_dir``."""
    path = Path(data_dir).expanduser() / split
    if not _locate_store(path).is_dir():
        there = sorted(p.parent.name for p in Path(data_dir).glob("*/" + MANIFEST))
        what = f"no {split!r} split here" + (f" (there is {', '.join(there)})" if there else "")
        if (Path(data_dir).expanduser() / MANIFEST).is_file():
            raise InputError("is one split of a store", file=data_dir, mend="give the directory that it lies in")
        if not Path(data_dir).expanduser().is_dir():
            what = "is a file, not a directory of tokens" if Path(data_dir).expanduser().exists() else "does not exist"
        mend = "run csm-fast pretokenize with this --output"
        if split == "val":
            mend += " and --val-data or --val-fraction"
        raise InputError(what, file=data_dir, mend=mend)
    return TokenStore.open(path, verify=verify)


def check_compatible(
    store: TokenSource,
    *,
    codec_fingerprint: str | None = None,
    text_fingerprint: str | None = None,
    num_codebooks: int | None = None,
    text_vocab_size: int | None = None,
) -> None:
    """Refuse a store that was made with another codec or text tokenizer than the model's. None is not compared.

    Args:
        text_vocab_size: rows of the model's text table, which the store's ids must fit.
    """

    def refuse(noun: str, made: str, wanted: str) -> None:
        flag = "--codec" if noun == "codec" else "--tokenizer"
        what = f"this store was made with {noun} {made}, the model wants {wanted}"
        path = getattr(store, "path", None)
        raise InputError(what, file=path, mend=f"run csm-fast pretokenize with the model's {noun} ({flag})")

    def named(identity: Mapping[str, Any]) -> str:
        return f"{identity.get('name', '?')} ({identity['fingerprint'][:12]})"

    codec, text = store.codec, store.text_tokenizer
    if codec_fingerprint is not None and codec_fingerprint != codec["fingerprint"]:
        refuse("codec", named(codec), codec_fingerprint[:12])
    if num_codebooks is not None and num_codebooks != store.num_codebooks:
        refuse("codec", f"{codec.get('name', '?')} of {store.num_codebooks} codebooks", f"{num_codebooks} codebooks")
    if text_fingerprint is not None and text_fingerprint != text["fingerprint"]:
        refuse("text tokenizer", named(text), text_fingerprint[:12])
    if text_vocab_size is not None and text_vocab_size < text["vocab_size"]:
        refuse("text tokenizer", f"{named(text)} of {text['vocab_size']} ids", f"at most {text_vocab_size}")


def hash_tokens(store: TokenSource) -> str:
    """SHA-256 in hex that identifies the tokens of a store: its own ``content_hash``, else a hash of all turns."""
    if own := getattr(store, "content_hash", None):
        return own()
    digest = hashlib.sha256()
    for index in range(store.num_conversations):
        for turn in store.conversation(index):
            digest.update(f"{index} {turn.speaker} {len(turn.text)} {len(turn.codes)}\n".encode())
            digest.update(np.asarray(turn.text, np.int32).tobytes() + np.asarray(turn.codes, np.uint16).tobytes())
    return digest.hexdigest()


def read_tokens(store: TokenSource) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All tokens of a store, in parts: text int32 [n] and codes uint16 [f, K], for statistics in constant memory."""
    if isinstance(store, TokenStore):
        for _, arrays in store.shard_arrays():
            yield arrays["text"], np.empty((0, store.num_codebooks), np.uint16)
        for codes in store.code_blocks():
            yield np.empty(0, np.int32), codes
        return
    for index in range(store.num_conversations):
        yield from ((turn.text, turn.codes) for turn in store.conversation(index))


def recover_store(path: Path) -> None:
    """Undo a replacement that was killed between its two renames (``replace_directory``)."""
    old = old_directory(path)
    if old.is_dir() and not path.exists():
        os.rename(old, path)


def _locate_store(path: Path) -> Path:
    """Where the store of ``path`` is: there, or in the old directory of a killed replacement."""
    old = old_directory(path)
    return old if not path.exists() and (old / MANIFEST).is_file() else path


def _reopen(path: str, verify: bool) -> TokenStore:
    return TokenStore.open(path, verify=verify)
