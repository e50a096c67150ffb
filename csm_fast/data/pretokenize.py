"""From metadata and recordings to token stores: decoded in worker processes, encoded in batches, resumable.

New codes go to a cache, under a key of everything they were made from (``code_cache``). Once all codes are there, the
stores are written from the cache in the order of the metadata. So a killed run continues where it stopped, a changed
metadata file costs only its new rows, and the stores' bytes depend on the data alone.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from csm_fast.config.commands import PretokenizeConfig
from csm_fast.data.audio import RESAMPLER
from csm_fast.data.code_cache import CodeCache, make_content_key
from csm_fast.data.codec.base import Codec
from csm_fast.data.codec.load import load_codec
from csm_fast.data.corpus import Corpus, Split
from csm_fast.data.decode_pool import DecodePool, Reply, Request, file_stamp
from csm_fast.data.statistics import LISTED, render_report, report_split
from csm_fast.data.store_writer import TokenStoreWriter
from csm_fast.data.text import TextTokenizer, load_text_tokenizer
from csm_fast.data.token_store import TokenStore, TurnTokens, recover_store
from csm_fast.packing.fit import MAX_POSITIONS
from csm_fast.system.console import ClipProgress
from csm_fast.system.errors import InputError
from csm_fast.system.files import write_file, writing_to
from csm_fast.system.lock import Lock

WINDOW = 8  # batches' worth of waves that are sorted by length before they are cut into batches
CORE_SECONDS = 60.0  # audio that is collected for each core of a CPU: some packs, about a second of work


def pretokenize(
    config: PretokenizeConfig, *, codec: Codec | None = None, tokenizer: TextTokenizer | None = None
) -> dict[str, Any]:
    """Write ``<output>/train``, ``<output>/val`` and ``<output>/report.json``; returns the report.

    The report has ``codec``, ``text_tokenizer``, ``splits`` (``report_split`` of each), ``skipped`` and ``warnings``.
    What is returned also has ``run``: clips encoded now, and seconds. report.json depends on the data alone.

    Args:
        config: see its fields.
        codec, tokenizer: used in place of what ``config`` names.

    Raises:
        InputError: the first unusable row (what was encoded is kept), or an output that cannot be written.
        KeyboardInterrupt: after saving what was encoded and printing how to continue.
    """
    output = Path(config.output).expanduser()
    lock = Lock(output)
    try:
        return _Run(config, output, codec, tokenizer).run()
    finally:
        lock.release()


class _Run:
    """One run; ``pretokenize`` holds the lock."""

    def __init__(self, config: PretokenizeConfig, output: Path, codec: Codec | None, tokenizer: TextTokenizer | None):
        self.config, self.output, self.started = config, output, time.monotonic()
        self.corpus = Corpus(config)
        if tokenizer is None:
            tokenizer = load_text_tokenizer(config.tokenizer)
        if codec is None:
            codec = load_codec(
                config.codec,
                source=config.codec_source,
                device=_device(config.device),
                num_codebooks=config.num_codebooks,
            )
        self.codec, self.tokenizer = codec, tokenizer
        with writing_to(output):
            for split in ("train", "val"):
                recover_store(output / split)
                shutil.rmtree(output / f".{split}.new", ignore_errors=True)
        self.cache = CodeCache(output, codec.num_codebooks, _print_line)
        self.keys: list[bytes] = [b""] * len(self.corpus.turns)
        self.stamps: dict[str, tuple[int, int]] = {}
        self.encoded = 0

    def run(self) -> dict[str, Any]:
        workers = min(4, os.cpu_count() or 1) if self.config.workers is None else self.config.workers
        _print_line(f"codec: {self.codec.name}; text: {self.tokenizer.name}; resampler: {RESAMPLER}")
        try:
            with DecodePool(workers) as pool:
                missing = self._find_missing(self._hash_files(pool))
                self.corpus.stop_if_bad()
                self._encode(pool, missing)
            self.cache.flush()
            warnings = self._write()
        except KeyboardInterrupt:
            self.cache.flush()
            _print_line(f"interrupted: {self.encoded:,} new clips are kept in {self.output}; run it again to go on")
            raise
        except BaseException:
            self.cache.flush()
            raise
        self.cache.clear()
        self.cache.hashes.compact({turn.audio_path for turn in self.corpus.turns})
        return self._report(warnings)

    # ------------------------------------------------------------------------------------------- what is to be encoded

    def _hash_files(self, pool: DecodePool) -> dict[str, str]:
        """Content hashes of all audio files by path. The turns of a file that cannot be read are refused."""
        users: dict[str, list[int]] = {}
        for i, turn in enumerate(self.corpus.turns):
            users.setdefault(turn.audio_path, []).append(i)
        contents, unknown = {}, []
        for path, turns in users.items():
            try:
                self.stamps[path] = file_stamp(path)
                known = self.cache.hashes.get(path, self.stamps[path])
            except OSError:
                known = None  # the error comes with the reply below
            if known:
                contents[path] = known
            else:
                first = self.corpus.turns[turns[0]]
                unknown.append(Request(path, False, row=first.row, file=first.file))
        for request, reply in pool.run(unknown):
            if reply.error:
                for i in users[request.path]:
                    self.corpus.refuse(i, reply.error.what, reply.error.mend)
            else:
                contents[request.path], self.stamps[request.path] = reply.content, reply.stamp
                self.cache.hashes.add(request.path, reply.stamp, reply.content)
        self.cache.hashes.flush()
        return contents

    def _find_missing(self, contents: dict[str, str]) -> dict[bytes, list[int]]:
        """Give every turn its key and check its text; returns the keys without codes, each with its turns."""
        missing: dict[bytes, list[int]] = {}
        codec = self.codec
        for i, turn in enumerate(self.corpus.turns):
            self.corpus.tokenize(i, self.tokenizer)
            if i in self.corpus.refused:
                continue
            key = self.keys[i] = make_content_key(
                contents[turn.audio_path], turn.start, turn.end, codec.fingerprint, codec.num_codebooks, RESAMPLER
            )
            if key in self.cache:
                codes, (seconds, _, _) = self.cache.get(key)
                self.corpus.admit(i, len(codes), seconds)
            else:
                missing.setdefault(key, []).append(i)
        return missing

    # ------------------------------------------------------------------------------------------------------- encoding

    def _encode(self, pool: DecodePool, missing: dict[bytes, list[int]]) -> None:
        rate, step = self.codec.sample_rate, self.codec.samples_per_frame
        room = self._window_seconds() * rate  # samples
        window: list[tuple[bytes, Any, tuple[float, float, float]]] = []  # key, wave, statistics
        progress = ClipProgress(len(missing), "encoding")

        def requests():
            for key, users in missing.items():
                turn = self.corpus.turns[users[0]]
                where = (turn.start, turn.end, turn.row, turn.file, rate, (MAX_POSITIONS - 2) * step / rate, key)
                yield Request(turn.audio_path, True, *where)

        try:
            for request, reply in pool.run(requests()):
                usable = self._usable(missing[request.tag], request, reply)
                self.corpus.stop_if_bad()
                if usable:
                    window.append((request.tag, reply.wave, reply.stats))
                    if sum(len(wave) for _, wave, _ in window) > room:
                        self._encode_window(window, progress)
                else:
                    progress.update(1, 0.0)
            self._encode_window(window, progress)
        finally:
            progress.close()

    def _window_seconds(self) -> float:
        """Seconds of audio that are collected and sorted by length before they are encoded."""
        if self._side_by_side():
            import torch

            return CORE_SECONDS * torch.get_num_threads()
        on_cpu = str(getattr(self.codec, "device", "cpu")).startswith("cpu")
        return 0.0 if on_cpu else WINDOW * self.config.batch_seconds  # batches are no faster on a CPU

    def _side_by_side(self) -> bool:
        return bool(getattr(self.codec, "side_by_side", False))

    def _usable(self, users: list[int], request: Request, reply: Reply) -> bool:
        """Whether any turn of this clip can be used; refuses the others."""
        if reply.error:
            for i in users:
                self.corpus.refuse(i, reply.error.what, reply.error.mend)
            return False
        if reply.stamp != self.stamps[request.path]:
            # Its codes would get the key of the old content.
            what = f"{request.path} changed while it was read"
            raise InputError(what, file=request.file, row=request.row, mend="run it again")
        frames = -(-round(reply.stats[0] * self.codec.sample_rate) // self.codec.samples_per_frame)
        admitted = [i for i in users if self.corpus.admit(i, frames, reply.stats[0])]
        return bool(admitted) and reply.wave is not None

    def _encode_window(self, window: list, progress: ClipProgress) -> None:
        """Encode waves, clips of similar length together, and put the codes into the cache."""
        window.sort(key=lambda item: len(item[1]))
        limit = self.config.batch_seconds * self.codec.sample_rate
        while window:
            # The longest first, so that a lack of memory shows in the first batch. A codec that gives each core its own
            # clips gets the whole window.
            size = len(window) if self._side_by_side() else 1
            while size < len(window) and (size + 1) * len(window[-1][1]) <= limit:
                size += 1
            batch = [window.pop() for _ in range(size)]
            try:
                encoded = self.codec.encode([wave for _, wave, _ in batch])
            except RuntimeError as error:
                if "out of memory" not in str(error):
                    raise
                what = f"the codec ran out of memory on a batch of {size} clips of up to {batch[0][2][0]:.1f} s"
                raise InputError(what, mend=f"lower --batch-seconds (now {self.config.batch_seconds:g})") from None
            for (key, _, stats), codes in zip(batch, encoded, strict=True):
                codes = np.asarray(codes, np.uint16)
                assert codes.ndim == 2 and len(codes) and codes.shape[1] == self.codec.num_codebooks, codes.shape
                self.cache.add(key, codes, stats)
                self.encoded += 1
            progress.update(len(batch), sum(stats[0] for _, _, stats in batch))

    # -------------------------------------------------------------------------------------------------------- writing

    def _write(self) -> list[str]:
        """Write all stores, then put them in place; returns warnings about the data."""
        text = {name: getattr(self.tokenizer, name) for name in ("name", "fingerprint", "vocab_size")}
        writers: list[TokenStoreWriter] = []
        try:
            for split in self.corpus.splits:
                writer = TokenStoreWriter(
                    self.output / split.name, codec=self._describe_codec(), text_tokenizer=text, resampler=RESAMPLER
                )
                writers.append(writer)
                for turns in split.conversations:
                    if self.corpus.usable(turns):
                        self._write_conversation(writer, split, turns)
                writer.finish()
        except BaseException:
            for writer in writers:
                writer.abort()
            raise
        # Only now, because the old stores' codes were read until here. If this run has no validation set, the old one
        # is removed first: it may hold clips that are now trained on.
        if len(writers) == 1 and (self.output / "val").exists():
            _print_line(f"{self.output / 'val'}: removed, this run has no validation set")
            with writing_to(self.output):
                os.rename(self.output / "val", self.output / ".val.new")
                shutil.rmtree(self.output / ".val.new")
        for writer in writers:
            writer.commit()
        return self._shared_audio()

    def _write_conversation(self, writer: TokenStoreWriter, split: Split, turns: range) -> None:
        tokens, keys, stats = [], [], []
        for i in turns:
            turn = self.corpus.turns[i]
            codes, clip = self.cache.get(self.keys[i])
            ids = np.array(self.tokenizer.encode(turn.text, turn.speaker), np.int32)
            tokens.append(TurnTokens(ids, codes, turn.speaker, i - split.base))
            keys.append(self.keys[i])
            stats.append(clip)
        writer.add_conversation(tokens, content_keys=keys, clip_stats=stats)

    def _shared_audio(self) -> list[str]:
        """A warning if the same audio is in both splits."""
        if len(self.corpus.splits) < 2:
            return []
        used = [
            {self.keys[i]: i for turns in split.conversations for i in turns if self.keys[i]}
            for split in self.corpus.splits
        ]
        both = sorted(used[1][key] for key in used[0].keys() & used[1].keys())
        if not both:
            return []
        turn = self.corpus.turns[both[0]]
        return [
            f"{len(both):,} recordings are in both train and val, so val_loss will flatter "
            f"(the first: {turn.file}, row {turn.row})"
        ]

    def _describe_codec(self) -> dict[str, Any]:
        names = ("kind", "name", "fingerprint", "sample_rate", "samples_per_frame", "num_codebooks", "codebook_size")
        return {**self.codec.identity(), **{name: getattr(self.codec, name) for name in names}}

    def _report(self, warnings: list[str]) -> dict[str, Any]:
        stores = {split.name: TokenStore.open(self.output / split.name) for split in self.corpus.splits}
        left_out = [turns for s in self.corpus.splits for turns in s.conversations if not self.corpus.usable(turns)]
        reasons = [self.corpus.refused[i] for i in sorted(self.corpus.refused)]
        report: dict[str, Any] = {
            "codec": self._describe_codec(),
            "text_tokenizer": stores["train"].text_tokenizer,
            "splits": {s.name: report_split(stores[s.name], self.corpus.turns[s.base :]) for s in self.corpus.splits},
            "skipped": {
                "conversations": len(left_out),
                "turns": sum(len(turns) for turns in left_out),
                "clips": len(reasons),
                "listed": [{"file": e.file, "row": e.row, "reason": str(e)} for e in reasons],
            },
            "warnings": warnings,
        }
        with writing_to(self.output):
            write_file(self.output / "report.json", json.dumps(report, indent=1) + "\n")
        listed = report["skipped"]["listed"]
        shown = {**report, "skipped": {**report["skipped"], "listed": listed[:LISTED]}}
        elapsed = time.monotonic() - self.started
        print(f"\n{render_report(shown)}\n")
        print(f"{self.output}: ready in {elapsed:,.1f} s, {self.encoded:,} clips encoded now")
        return report | {"run": {"clips_encoded": self.encoded, "seconds": elapsed}}


def _device(name: str) -> str:
    from csm_fast.system.device import resolve_device

    return str(resolve_device(name))


def _print_line(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
