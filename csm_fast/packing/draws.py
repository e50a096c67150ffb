"""Seeded orders and frames, and every purpose a seed is used for."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def draw(seed: int, *where: int) -> np.random.Generator:
    """A generator that depends on the seed and a place (purpose, epoch, step, ...) only."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *where])))


GAMMA = np.uint64(0x9E3779B97F4A7C15)


def splitmix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's output function (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", with
    Stafford's variant 13 of the mixing), in place: uint64, one to one."""
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def numbered_draws(seed: int, *where: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Random numbers at a place (purpose, epoch) for whole ranges of steps at once: ``(numbers, counts)`` gives
    uint64 [sum(counts)], for each number as many as its count.

    Each number has a SplitMix64 of its own, whose seed is the number's output of the place's. So what a step gets
    depends on the seed, the place and its number only, and a block of steps takes no longer than one large step.
    """
    place = np.random.SeedSequence([seed, *where]).generate_state(1, np.uint64)

    def numbered(numbers: np.ndarray, counts: np.ndarray) -> np.ndarray:
        seeds = splitmix(place + (numbers.astype(np.uint64) + np.uint64(1)) * GAMMA)
        first = (np.cumsum(counts) - counts).astype(np.uint64)
        states = np.arange(1, int(counts.sum()) + 1, dtype=np.uint64)
        states *= GAMMA
        states += np.repeat(seeds - first * GAMMA, counts)
        return splitmix(states)

    return numbered


def lowest(keys: np.ndarray, counts: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Of each run of ``counts[i]`` keys the indices of its ``wanted[i]`` smallest, run after run, ties in order.

    Few of many are found without sorting all: keys are random numbers, so those below a bound a little above the
    wanted share are enough, but for one run in thousands of millions.

    Args:
        keys: uint64 [sum(counts)], uniform. Their upper 40 bits decide.
        counts, wanted: int64 [S], S < 2^24; ``wanted <= counts``.
    """
    share = (wanted + 6.0 * np.sqrt(wanted) + 16.0) / np.maximum(counts, 1)
    bound = np.minimum(share, 1.0) * float(1 << 40)
    upper = keys >> np.uint64(24)
    few = np.flatnonzero(upper < np.repeat(bound.astype(np.uint64), counts))
    ends = np.cumsum(counts)
    there = np.diff(np.searchsorted(few, ends), prepend=0)
    if (there < wanted).any():
        few, there = np.arange(len(keys)), counts
    run = np.repeat(np.arange(len(counts), dtype=np.uint64), there)
    sorted_by_run = few[np.argsort((run << np.uint64(40)) | upper[few], kind="stable")]
    place = np.arange(int(wanted.sum())) + np.repeat(np.cumsum(there) - there - (np.cumsum(wanted) - wanted), wanted)
    return sorted_by_run[place]


ORDER, FRAMES = 1, 2  # purposes of a draw


VALIDATION = 3  # purpose of the frames' draw


DROPOUT = 4  # purpose of a draw
