"""Token stores of any size, written by the store's own writer: random codes of 32 codebooks.

Every hour holds the same conversations by their lengths, in another order, so that stores differ in nothing but their
size: turns of 1 to 20 s, 12 text ids and two more per second, 16 speakers, a quarter of the conversations of 2 to 6
turns. 1,000 hours are 2.9 GB.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.common.stores import open_writer
from csm_fast.config.shape import SAMPLE_RATE, SAMPLES_PER_FRAME, CSMConfig
from csm_fast.data.token_store import TurnTokens
from csm_fast.system.errors import InputError

SHAPE, CODES, SPEAKERS = CSMConfig.csm_1b(), 2048, 16
FRAMES_PER_SECOND = SAMPLE_RATE / SAMPLES_PER_FRAME
FRAMES_PER_HOUR = round(3600 * FRAMES_PER_SECOND)
BYTES_PER_HOUR = FRAMES_PER_HOUR * (SHAPE.num_codebooks * 2 + 2)  # codes, and the rest roughly


def draw_hour() -> list[list[int]]:
    """Frames of each turn of each conversation of one hour (the last turn is cut to it)."""
    rng, left, hour = np.random.default_rng(0), FRAMES_PER_HOUR, []
    while left > 0:
        turns: list[int] = []
        for _ in range(1 if rng.random() < 0.75 else int(rng.integers(2, 7))):
            frames = int(rng.integers(int(FRAMES_PER_SECOND), int(20 * FRAMES_PER_SECOND) + 1))
            if left > 0:
                turns.append(min(frames, left))
                left -= turns[-1]
        hour.append(turns)
    return hour


def draw_conversations(hours: float, seed: int = 0) -> Iterator[list[TurnTokens]]:
    """Random conversations of ``hours`` hours together (a little more, where that is no whole number)."""
    rng = np.random.default_rng([seed, round(hours * 1000)])
    left, source, block = round(hours * FRAMES_PER_HOUR), 0, 1 << 16
    codes, text = np.zeros((0, SHAPE.num_codebooks), np.uint16), np.zeros(0, np.int32)
    at, word = block, block
    hour: list[list[int]] = draw_hour()
    while left > 0:
        for number in rng.permutation(len(hour)).tolist():
            turns = []
            for frames in hour[number]:
                words = 12 + int(2 * frames / FRAMES_PER_SECOND)
                if at + frames > block:  # a draw per turn would take longer than the writing
                    codes, at = rng.integers(0, CODES, (block, SHAPE.num_codebooks), dtype=np.uint16), 0
                if word + words > block:
                    text, word = rng.integers(0, SHAPE.text_vocab_size, block, dtype=np.int32), 0
                piece = codes[at : at + frames]
                turns.append(TurnTokens(text[word : word + words], piece, int(rng.integers(SPEAKERS)), source))
                at, word, source, left = at + frames, word + words, source + 1, left - frames
            yield turns
            if left <= 0:
                break


def write_store(path: Path, hours: float) -> None:
    """Write a synthetic store to ``path``.

    Raises:
        InputError: the disk has no room for it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    needed, free = int(BYTES_PER_HOUR * hours), shutil.disk_usage(path.parent).free
    if needed > 0.9 * free:
        what = f"{hours:g} hours need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        raise InputError(what, file=path.parent, mend="choose another --dir, or fewer --hours")
    with open_writer(path, SHAPE) as writer:
        for turns in draw_conversations(hours):
            writer.add_conversation(turns)


def drop_from_cache(path: Path) -> None:
    """Drop the store's files from the page cache, except for pages that a process has mapped."""
    for shard in path.glob("*.safetensors"):
        with open(shard, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
