"""Random numbers that depend on a seed, a purpose and a place alone, and every purpose a seed is used for."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

import numpy as np

GAMMA = np.uint64(0x9E3779B97F4A7C15)  # SplitMix64's increment


class Purpose(IntEnum):
    """What random numbers are used for. Two purposes with the same number would get the same random numbers, and
    their choices would be correlated. Runs are continued with these numbers: do not change one."""

    ORDER = 1
    FRAMES = 2
    VALIDATION = 3
    DROPOUT = 4


def seeded_generator(seed: int, *where: int) -> np.random.Generator:
    """A generator that depends on the seed and a place only.

    Args:
        where: a ``Purpose``, then numbers such as epoch or step. Trailing zeros make no difference to NumPy's
            ``SeedSequence``: (ORDER, 3) and (ORDER, 3, 0) are the same place.
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *where])))


def splitmix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's output function, in place: uint64, one to one.

    Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", with Stafford's variant 13 of the
    mixing.
    """
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def make_step_keys(seed: int, *where: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """A function that gives the random keys of any steps: ``(steps, counts)`` -> uint64 [sum(counts)].

    A step's keys depend on the seed, the place (purpose, epoch) and the step's number only: each step has a SplitMix64
    of its own. A block of steps takes one pass over arrays, no longer than one large step.
    """
    place = np.random.SeedSequence([seed, *where]).generate_state(1, np.uint64)

    def step_keys(steps: np.ndarray, counts: np.ndarray) -> np.ndarray:
        seeds = splitmix(place + (steps.astype(np.uint64) + np.uint64(1)) * GAMMA)
        first = (np.cumsum(counts) - counts).astype(np.uint64)
        states = np.arange(1, int(counts.sum()) + 1, dtype=np.uint64)
        states *= GAMMA
        states += np.repeat(seeds - first * GAMMA, counts)
        return splitmix(states)

    return step_keys


def select_lowest(keys: np.ndarray, counts: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The indices of the ``wanted[i]`` smallest of each run of ``counts[i]`` keys, run after run.

    Equal keys stay in their order. Only the keys below a bound a little above the wanted share are sorted. For random
    keys the bound is too low in about one run of thousands of millions; then all keys are sorted.

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
