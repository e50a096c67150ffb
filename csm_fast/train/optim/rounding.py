"""Stochastic rounding of float32 to bf16, with draws that are a function of where and when.

``kernels/csm_kernels/adamw.cpp`` and ``adamw.py`` draw and round the same.
"""

from __future__ import annotations

import functools
import hashlib

import torch
from csm_kernels.constants import DRAW_TILE as TILE
from torch import Tensor

Keys = tuple[int, int, int]  # where the counters of draws begin, of the step's salt and of the tiles' keys


@functools.lru_cache(maxsize=4096)
def rounding_keys(seed: int, index: int) -> Keys:
    """What the draws of the parameter number ``index`` depend on besides its step count."""
    digest = hashlib.blake2b(f"{seed} {index}".encode(), digest_size=12).digest()
    counters, salt, tiles = (int.from_bytes(digest[i : i + 4], "little", signed=True) for i in (0, 4, 8))
    return counters, salt, tiles


class RoundingBits:
    """The draws of one parameter's update, one of 16 bits for each element: a function of (seed, index, step, place).

    Counters through an integer hash (xor-shift-multiply, the constants of "lowbias32" by C. Wellons). A counter needs
    no generator, whose seed would have to know the step count that only the device knows, and it draws the same on
    every device. Hashing is what costs, so only the first ``TILE`` places are hashed: the next tiles have the same
    draws, xor a 16-bit key of the tile that is hashed from (seed, index, step), too. Any two draws are independent
    for all that: within a tile they are hashes of two counters, and u and u xor k are independent if k is uniform.

    Args:
        keys: ``rounding_keys(seed, index)``.
        step: [] float32, the parameter's step count, on its device.
        numel: how many elements the parameter has.
    """

    def __init__(self, keys: Keys, step: Tensor, numel: int):
        counters, salt, tiles = keys
        moment = _mix(_mix(step.to(torch.int32).add_(salt)))
        self.tile = self._hash(counters, (min(numel, TILE) + 1) // 2, moment)[: min(numel, TILE)]
        if numel > TILE:
            self.keys = self._hash(tiles, (-(-numel // TILE) + 1) // 2, _mix(moment))
            self.keys[0] = 0

    @staticmethod
    def _hash(start: int, pairs: int, key: Tensor) -> Tensor:
        """[2 pairs] int32 in [0, 2^16): each 32-bit hash gives two, ``key`` in between its two rounds."""
        x = torch.arange(pairs, dtype=torch.int32, device=key.device)
        x = _mix(x.add_(start)).bitwise_xor_(key)
        x = _xor_shift(_xor_shift(x, 15).mul_(0x846CA68B - (1 << 32)), 16)
        return x.view(torch.int16).to(torch.int32).bitwise_and_(0xFFFF)

    def of(self, first: int, count: int) -> Tensor:
        """[count] int32 in [0, 2^16): the draws of the places from ``first``."""
        tile, place = divmod(first, TILE)
        if place + count <= TILE:
            draws = self.tile[place : place + count]
            return draws ^ self.keys[tile] if tile else draws
        whole = self.tile ^ self.keys[tile : -(-(first + count) // TILE), None]
        return whole.view(-1)[place : place + count]


def _mix(x: Tensor) -> Tensor:
    """One round of an integer hash on int32, in place: xor with itself shifted, times an odd constant."""
    return _xor_shift(x, 16).mul_(0x7FEB352D)


def _xor_shift(x: Tensor, bits: int) -> Tensor:
    """x ^ (x >>> bits), in place. PyTorch shifts int32 with its sign, so what that shifts in is masked out."""
    return x.bitwise_xor_((x >> bits).bitwise_and_((1 << (32 - bits)) - 1))


def round_stochastically(x: Tensor, first: int, draws: RoundingBits) -> Tensor:
    """``x`` [n] float32, in place: cut to bf16 after uniform noise below one spacing was added to its magnitude.

    So it becomes one of its two neighbours, each with the probability that makes the mean right; a bf16 number stays.
    """
    x.view(torch.int32).add_(draws.of(first, len(x))).bitwise_and_(-(1 << 16))
    return x
