"""Codes that were made before, by a key of everything they were made from, so that pretokenize can be killed and rerun.

``<output>/.cache/`` holds part files (safetensors: codes, code_offsets, content_key, clip_stats). Each is written whole
or not at all, and its name ends in the start of its hash. ``files.jsonl`` beside them has the content hashes of audio
files by (path, size, mtime). The shards of finished stores have the same arrays, so they are parts, too.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from csm_fast.data.token_store import TokenStore
from csm_fast.system.arrays import map_arrays, write_arrays
from csm_fast.system.errors import InputError
from csm_fast.system.files import file_sha256, fsync_path, write_file, writing_to

OPEN_FILES = 16  # a mapped file takes a file descriptor, and there may be thousands of parts
FLUSH_SECONDS, FLUSH_FRAMES = 5.0, 500_000  # the most that a kill loses, and that is held in memory (32 MB)
_PARTS = "part-" + "[0-9]" * 6 + "-" + "?" * 16 + ".safetensors"
_RACY_NS = 2_000_000_000  # a file may change again within its clock's resolution: hashes of younger files are not kept


def make_content_key(
    content: str, start: float | None, end: float | None, codec: str, codebooks: int, resampler: str
) -> bytes:
    """The SHA-256 of everything that the codes of a turn depend on; 32 bytes.

    Args:
        content: the hash of the audio file.
        start, end: seconds, the cut.
        codec: the codec's fingerprint.
        codebooks: how many of the codec's codebooks are kept.
        resampler: its name.
    """
    return hashlib.sha256(json.dumps([content, start, end, codec, codebooks, resampler]).encode()).digest()


class CodeCache:
    """Codes by content key, from the parts in ``<output>/.cache`` and the stores under ``output``.

    Args:
        output: the directory with ``train/`` and ``val/``.
        num_codebooks: K; parts with another K are ignored.
        note: called with one line about each damaged file.
    """

    def __init__(self, output: Path, num_codebooks: int, note: Callable[[str], None] = print):
        self.folder, self._num_codebooks, self._note = output / ".cache", num_codebooks, note
        self._paths: list[Path] = []
        self._where: dict[bytes, tuple[int, int]] = {}  # key -> (file, turn)
        self._mapped: OrderedDict[int, dict[str, np.ndarray]] = OrderedDict()
        self._new: dict[bytes, tuple[np.ndarray, tuple[float, float, float]]] = {}
        self._new_frames, self._last_flush, self._next_part = 0, time.monotonic(), 0
        with writing_to(output):
            for leftover in self.folder.glob("*.tmp"):
                leftover.unlink()
            for path in sorted(self.folder.glob(_PARTS)):
                number, digest = path.stem.split("-")[1:]
                self._next_part = max(self._next_part, int(number) + 1)
                if file_sha256(path)[:16] == digest:
                    self._index(path, map_arrays(path))
                else:
                    note(f"{path}: damaged, deleted (its clips are encoded again)")
                    path.unlink()
        for split in ("train", "val"):
            if (output / split).is_dir():
                self._index_store(output / split)
        self.hashes = _FileHashes(self.folder / "files.jsonl")

    def __contains__(self, key: bytes) -> bool:
        return key in self._where or key in self._new

    def get(self, key: bytes) -> tuple[np.ndarray, tuple[float, float, float]]:
        """(codes uint16 [frames, K], (seconds, leading, trailing silence)) of a key in the cache."""
        if key in self._new:
            return self._new[key]
        file, turn = self._where[key]
        arrays = self._mapped.get(file)
        if arrays is None:
            arrays = self._mapped[file] = map_arrays(self._paths[file])
            if len(self._mapped) > OPEN_FILES:
                self._mapped.popitem(last=False)
        self._mapped.move_to_end(file)
        begin, end = arrays["code_offsets"][turn : turn + 2].tolist()
        seconds, leading, trailing = arrays["clip_stats"][turn].tolist()
        return arrays["codes"][begin:end], (seconds, leading, trailing)

    def add(self, key: bytes, codes: np.ndarray, stats: tuple[float, float, float]) -> None:
        """Keep new codes, in memory until the next ``flush``, which follows every few seconds."""
        self._new[key] = (codes, tuple(np.array(stats, np.float32).tolist()))
        self._new_frames += len(codes)
        if self._new_frames >= FLUSH_FRAMES or time.monotonic() - self._last_flush > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write new codes as one part file, whole or not at all."""
        self.hashes.flush()
        if self._new:
            codes = [codes for codes, _ in self._new.values()]
            part = {
                "codes": codes,
                "code_offsets": [np.concatenate([[0], np.cumsum([len(c) for c in codes])]).astype(np.int64)],
                "content_key": [np.frombuffer(b"".join(self._new), np.uint8).reshape(-1, 32)],
                "clip_stats": [np.array([stats for _, stats in self._new.values()], np.float32)],
            }
            temporary = self.folder / "part.tmp"
            with writing_to(self.folder):
                sha256, _ = write_arrays(temporary, part)
                path = self.folder / f"part-{self._next_part:06d}-{sha256[:16]}.safetensors"
                os.replace(temporary, path)
                fsync_path(self.folder)
            self._next_part += 1
            self._where |= {key: (len(self._paths), turn) for turn, key in enumerate(self._new)}
            self._paths.append(path)
            self._new, self._new_frames = {}, 0
        self._last_flush = time.monotonic()

    def clear(self) -> None:
        """Delete the parts. Call it once finished stores have the codes."""
        self._mapped.clear()
        for path in self._paths:
            if path.parent == self.folder:
                path.unlink(missing_ok=True)

    def _index(self, path: Path, arrays: dict[str, np.ndarray]) -> None:
        if arrays["codes"].ndim != 2 or arrays["codes"].shape[1] != self._num_codebooks:
            return
        keys, file = arrays["content_key"].tobytes(), len(self._paths)
        self._paths.append(path)
        for turn in range(len(keys) // 32):
            self._where[keys[32 * turn : 32 * turn + 32]] = (file, turn)
        self._where.pop(bytes(32), None)  # the key of turns whose store was written without keys

    def _index_store(self, path: Path) -> None:
        try:
            store = TokenStore.open(path)
            for _ in store.code_blocks():  # checks the hashes
                pass
        except InputError as error:
            self._note(f"{error} (its clips are encoded again)")
            return
        for shard_path, arrays in store.shard_arrays():
            self._index(shard_path, arrays)


class _FileHashes:
    """Content hashes of audio files by (path, size, mtime), so that a rerun reads only audio that has changed."""

    def __init__(self, path: Path):
        self._path = path
        self._known: dict[str, tuple[int, int, str]] = {}
        self._new: dict[str, tuple[int, int, str]] = {}
        try:
            lines: Iterable[bytes] = path.read_bytes().splitlines()
        except OSError:
            lines = ()
        for line in lines:
            try:
                name, size, mtime, content = json.loads(line)
            except ValueError:  # the last line of a killed run
                continue
            self._known[name] = (size, mtime, content)

    def get(self, path: str, stamp: tuple[int, int]) -> str | None:
        """The hash of ``path`` if it still has this (size, mtime in ns)."""
        known = self._known.get(path)
        return known[2] if known and known[:2] == stamp else None

    def add(self, path: str, stamp: tuple[int, int], content: str) -> None:
        if time.time_ns() - stamp[1] > _RACY_NS:
            self._known[path] = self._new[path] = (*stamp, content)

    def flush(self) -> None:
        """Append new entries. A line that a killed run left unfinished costs one hash."""
        if not self._new:
            return
        lines = "".join(json.dumps([path, *entry]) + "\n" for path, entry in self._new.items())
        with writing_to(self._path.parent), open(self._path, "ab") as file:
            file.write(b"\n" + lines.encode() if file.tell() else lines.encode())
        self._new = {}

    def compact(self, keep: set[str]) -> None:
        """Rewrite the file with the paths in ``keep`` only."""
        entries = {path: entry for path, entry in self._known.items() if path in keep}
        with writing_to(self._path.parent):
            write_file(self._path, "".join(json.dumps([p, *e]) + "\n" for p, e in entries.items()))
