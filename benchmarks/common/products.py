"""The matrix products of a training step, counted from shapes, and the rate at which the device multiplies them.

A step's share of the matmul rate is its FLOP/s over the FLOP/s of the same products, run one by one. The rest of its
time goes to everything that is not a product. Only the work that the loss needs on live rows is counted, whatever a
system pads or computes twice, so that the count is the same for all systems.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import NamedTuple

import torch

from benchmarks.common.device import time_call
from csm_fast import CSMConfig
from csm_fast.config.shape import TransformerConfig
from csm_fast.packing.pack import Pack


class Product(NamedTuple):
    """``heads`` products [m, k] x [k, n], of the kind "forward" (x w^T), "input" (g w) or "weight" (g^T x)."""

    heads: int
    m: int
    k: int
    n: int
    kind: str

    @property
    def flops(self) -> int:
        return 2 * self.heads * self.m * self.k * self.n


def _linear(found: Counter[Product], rows: int, inputs: int, outputs: int, heads: int = 1, times: int = 1) -> None:
    if rows:
        found[Product(heads, rows, inputs, outputs, "forward")] += times
        found[Product(heads, rows, outputs, inputs, "input")] += times
        found[Product(heads, outputs, rows, inputs, "weight")] += times


def _stack(found: Counter[Product], config: TransformerConfig, rows: int, last: int) -> None:
    """The linear layers of a stack. Behind the attention of its last layer, only ``last`` rows are computed."""
    width, kv = config.embed_dim, config.num_kv_heads * config.head_dim
    for layer in range(config.num_layers):
        after = last if layer == config.num_layers - 1 else rows
        _linear(found, rows, width, width)
        _linear(found, rows, width, kv, times=2)
        _linear(found, after, width, width)
        _linear(found, after, width, config.intermediate_dim, times=2)
        _linear(found, after, config.intermediate_dim, width)


def products(config: CSMConfig, pack: Pack) -> Counter[Product]:
    """The products of linear layers and heads, forward and backward, with every weight trained; live rows only."""
    found: Counter[Product] = Counter()
    targets, frames, books = len(pack.target_rows), len(pack.decoder_index), config.num_codebooks
    width, narrow = config.backbone.embed_dim, config.decoder.embed_dim
    _stack(found, config.backbone, pack.rows, targets)
    _linear(found, targets, width, config.audio_vocab_size)
    if frames:
        _linear(found, frames * books, width, narrow)
        _stack(found, config.decoder, frames * books, frames * books)
        _linear(found, frames, narrow, config.audio_vocab_size, heads=books - 1)
    return found


def attention_flops(config: CSMConfig, pack: Pack) -> int:
    """FLOPs of scores and weighted sums below the diagonal, forward, and twice as many backward (no recomputation)."""
    live, squares = pack.rows, 0
    for length in pack.segments.lengths:
        if live <= 0:  # a dummy document fills the pack behind the live rows
            break
        squares += length * (length + 1) // 2
        live -= length
    backbone = config.backbone.num_layers * config.backbone.embed_dim * squares
    books = config.num_codebooks
    decoder = len(pack.decoder_index) * books * (books + 1) // 2
    return 3 * 4 * (backbone + config.decoder.num_layers * config.decoder.embed_dim * decoder)


def step_flops(config: CSMConfig, pack: Pack) -> int:
    """FLOPs of one forward and backward pass."""
    linear = sum(product.flops * times for product, times in products(config, pack).items())
    return linear + attention_flops(config, pack)


def matmul_rate(
    found: Counter[Product], device: torch.device, dtype: torch.dtype, rounds: int = 3, repeats: int = 5
) -> float:
    """FLOP/s of the products one after the other, each at the fastest of ``rounds`` times ``repeats`` calls: a ceiling,
    because whatever else runs on the machine only lowers it."""
    fastest = dict.fromkeys(found, math.inf)
    for _ in range(rounds):
        for product in found:
            fastest[product] = min(fastest[product], _fastest_call(product, device, dtype, repeats))
    flops = sum(product.flops * times for product, times in found.items())
    return flops / sum(fastest[product] * times for product, times in found.items())


def _fastest_call(product: Product, device: torch.device, dtype: torch.dtype, repeats: int) -> float:
    """Seconds of the fastest call, after one to warm up. On CUDA of ten calls at once: launching one and waiting for it
    takes as long as a small product."""
    heads, m, k, n, kind = product
    shapes = {"forward": ((m, k), (n, k)), "input": ((m, k), (k, n)), "weight": ((k, m), (k, n))}[kind]
    a, b = (torch.randn(heads, *shape, device=device, dtype=dtype) for shape in shapes)
    if kind == "forward":
        b = b.transpose(1, 2)
    elif kind == "weight":
        a = a.transpose(1, 2)
    if heads == 1:
        a, b = a[0], b[0]
    out, at_once = (torch.matmul(a, b), 10) if device.type == "cuda" else (None, 1)

    def multiply() -> None:
        for _ in range(at_once):
            torch.matmul(a, b, out=out)

    multiply()
    return min(time_call(multiply, device) for _ in range(repeats)) / at_once
