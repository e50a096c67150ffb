"""Mimi's encoder and quantizer for CPUs: transformers' and moshi's arithmetic in an order that suits caches and cores.

It computes the same values in another order, so codes differ in near ties only:

* A convolution stage runs over pieces of time that fit a core's cache, in the channels-last layout that oneDNN takes
  without copying. Each piece starts with the few earlier positions that the stage looks back at.
* After the convolutions, clips are laid end to end without padding. The matrix products of the transformer and of the
  quantizer get a few hundred rows at once. Only the attention runs clip by clip, in blocks of the window.
* A level of the quantizer is one product and one argmin: a row's own square is the same for all centroids.
* Each core encodes its own packs (``encode_packs``), instead of sharing every small operation with the others.

Shapes: T positions at the rate in question, N positions or frames of all clips of a pack, D width, K levels.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from csm_fast.data.codec.mimi_weights import codebook_tables, interleave_pairs

PACK_SAMPLES = 240_000  # 10 s: 250 rows for the transformer, 125 for the quantizer; more are no faster per row
_TILE_VALUES = 1 << 17  # 512 KiB of float32 in a stage's widest tensor: half a core's second-level cache
_QUANTIZER_ROWS = 256  # 2 MiB of scores
_threads_lock = threading.Lock()


class MimiEncoder:
    """The encoding half of a Mimi, with its own copies of the weights, float32 on the CPU.

    Args:
        flat: weights under flat names, float32 on the CPU.
        config: sizes from ``complete_sizes`` that ``is_supported`` accepts.
        num_codebooks: K, levels to code with.
    """

    def __init__(self, flat: Mapping[str, Tensor], config: Any, num_codebooks: int):
        self.num_codebooks = num_codebooks
        self.stages, self.last = _stages(flat, config)
        self.layers = [
            _Layer(flat, f"encoder_transformer.layers.{i}.", config) for i in range(config.num_hidden_layers)
        ]
        self.window = int(config.sliding_window)
        half = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        self.rates = 1.0 / (config.rope_parameters["rope_theta"] ** half)
        down = flat["downsample.conv.weight"]  # [D, D, 2 stride]
        self.down_stride = down.shape[-1] // 2
        self.down = down.permute(0, 2, 1).reshape(len(down), -1).contiguous()
        tables = codebook_tables(flat)[:num_codebooks]
        self.levels = [(table.contiguous(), table.square().sum(1)) for table in tables]
        names = [f"quantizer.{part}_residual_vector_quantizer.input_proj.weight" for part in ("semantic", "acoustic")]
        self.inputs = [flat[name][..., 0].contiguous() if name in flat else None for name in names]

    def encode(self, waves: Sequence[Tensor]) -> list[Tensor]:
        """Codes [frames, K] int64 of waves float32 [frames * 1920], computed as one pack by the calling thread."""
        hidden = [self.convolve(wave) for wave in waves]
        lengths = [len(part) for part in hidden]
        rows = self.transform(torch.cat(hidden), lengths)
        return list(self.quantize(self.downsample(rows, lengths)).split([n // self.down_stride for n in lengths]))

    def convolve(self, wave: Tensor) -> Tensor:
        """float32 [frames * 1920] -> [2 frames, D]."""
        x = wave[:, None]
        for stage in self.stages:
            x = stage.run(x)
        return self.last.run(x)

    def transform(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        """The transformer over clips end to end: [N, D] -> [N, D]."""
        positions = torch.cat([torch.arange(n) for n in lengths]).float()
        angles = positions[:, None] * self.rates
        turns = torch.polar(torch.ones_like(angles), angles)[:, None]  # [N, 1, head_dim / 2]
        for layer in self.layers:
            x = layer.run(x, turns, lengths, self.window)
        return x

    def downsample(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        """[N, D] -> [N / stride, D]: a convolution twice as wide as its stride, after copies of the first row."""
        stride, windows = self.down_stride, []
        for part in x.split(list(lengths)):
            groups = torch.cat([part[:1].expand(stride, -1), part]).view(len(part) // stride + 1, -1)
            windows.append(torch.cat([groups[:-1], groups[1:]], dim=1))
        return torch.cat(windows) @ self.down.T

    def quantize(self, x: Tensor) -> Tensor:
        """Codes int64 [N, K] of latents [N, D]: at each level the centroid nearest to what earlier levels left."""
        codes = torch.empty(len(x), self.num_codebooks, dtype=torch.int64)
        for rows, found in zip(x.split(_QUANTIZER_ROWS), codes.split(_QUANTIZER_ROWS), strict=True):
            residual = rows
            for level, (table, squares) in enumerate(self.levels):
                if level < 2:  # the semantic level, and the first acoustic one, which starts over
                    weight = self.inputs[level]
                    residual = rows.clone() if weight is None else rows @ weight.T
                nearest = torch.addmm(squares, residual, table.T, alpha=-2).argmin(1)
                found[:, level] = nearest
                residual -= table[nearest]
        return codes


def encode_packs(encoder: MimiEncoder, waves: Sequence[Tensor], threads: int | None = None) -> list[Tensor]:
    """``MimiEncoder.encode`` of many waves in packs of about 10 s, ``threads`` packs at a time (default: PyTorch's).

    Each pack runs on one core: meanwhile PyTorch's number of threads in this process is 1.
    """
    # The longest first, so that all threads end at about the same time.
    order = sorted(range(len(waves)), key=lambda i: -len(waves[i]))
    packs: list[list[int]] = []
    room = 0
    for i in order:
        if not packs or len(waves[i]) > room:
            packs.append([])
            room = PACK_SAMPLES
        packs[-1].append(i)
        room -= len(waves[i])

    def run(pack: list[int]) -> list[Tensor]:
        with torch.inference_mode():
            return encoder.encode([waves[i] for i in pack])

    results: list[Tensor] = [torch.empty(0)] * len(waves)
    with _threads_lock:  # the number of threads is the process's
        before = torch.get_num_threads()
        workers = min(threads or before, len(packs))
        if workers < 2:
            coded = [run(pack) for pack in packs]
        else:
            torch.set_num_threads(1)  # a new thread copies this number on its first operation
            try:
                with ThreadPoolExecutor(workers, thread_name_prefix="encode") as pool:
                    coded = list(pool.map(run, packs))
            finally:
                torch.set_num_threads(before)
    for pack, codes in zip(packs, coded, strict=True):
        for i, found in zip(pack, codes, strict=True):
            results[i] = found
    return results


class _Conv:
    """A causal convolution: weight [out, in, 1, k] channels-last; ``before`` is how many earlier positions it reads."""

    def __init__(self, flat: Mapping[str, Tensor], name: str, stride: int = 1, dilation: int = 1):
        weight = flat[name + ".conv.weight"][:, :, None]
        self.weight = weight.contiguous(memory_format=torch.channels_last)
        self.bias = flat[name + ".conv.bias"].contiguous()
        self.stride, self.dilation = stride, dilation
        self.before = (weight.shape[-1] - 1) * dilation + 1 - stride

    def run(self, x: Tensor, first: bool) -> Tensor:
        """[1, in, 1, T] -> [1, out, 1, T / stride] at a clip's beginning, which gets zeros before it; else
        [1, out, 1, (T - before) / stride]."""
        if first and self.before:
            x = F.pad(x, (self.before, 0))
        return F.conv2d(x, self.weight, self.bias, (1, self.stride), 0, (1, self.dilation))


class _Stage:
    """Convolutions up to the next lower rate: [first one], residual blocks, ELU, the one with a stride."""

    def __init__(self, first: _Conv | None, blocks: list[tuple[_Conv, _Conv]], down: _Conv):
        self.first, self.blocks, self.down = first, blocks, down
        convs = [*([first] if first else []), *(conv for block in blocks for conv in block), down]
        self.before = sum(conv.before for conv in convs)
        channels = down.weight.shape[1]
        self.tile = max(1, _TILE_VALUES // channels // down.stride) * down.stride

    def run(self, x: Tensor) -> Tensor:
        """[T, in] of a whole clip, T a multiple of the stride -> [T / stride, out]."""
        out = torch.empty(len(x) // self.down.stride, self.down.weight.shape[0])
        start = 0
        while start < len(x):
            # Later pieces begin with the positions that all convolutions of the stage look back at; each convolution
            # drops its part. The first piece is at least as long as that, so that no later one begins before the clip.
            stop = min(len(x), start + max(self.tile, -(-self.before // self.down.stride) * self.down.stride))
            piece = x[max(0, start - self.before) if start else 0 : stop]
            length, channels = piece.shape
            total = length * channels
            y = piece.as_strided((1, channels, 1, length), (total, 1, total, channels))
            y = self._piece(y, start == 0)
            out[start // self.down.stride : stop // self.down.stride] = y[0, :, 0].T
            start = stop
        return out

    def _piece(self, x: Tensor, first: bool) -> Tensor:
        if self.first:
            x = self.first.run(x, first)
        for narrow, wide in self.blocks:
            y = wide.run(F.elu_(narrow.run(F.elu(x), first)), first)
            x = y.add_(x[..., x.shape[-1] - y.shape[-1] :])
        return self.down.run(F.elu(x) if not (self.first or self.blocks) else F.elu_(x), first)


def _stages(flat: Mapping[str, Tensor], config: Any) -> tuple[list[_Stage], _Stage]:
    """The stages in order, and the last convolution, a stage without stride and blocks."""
    first: _Conv | None = _Conv(flat, "encoder.layers.0")
    stages, at = [], 1
    for ratio in reversed(config.upsampling_ratios):
        blocks = []
        for j in range(config.num_residual_layers):
            name = f"encoder.layers.{at}.block."
            blocks.append((_Conv(flat, name + "1", 1, config.dilation_growth_rate**j), _Conv(flat, name + "3")))
            at += 1
        stages.append(_Stage(first, blocks, _Conv(flat, f"encoder.layers.{at + 1}", ratio)))
        first, at = None, at + 2
    return stages, _Stage(None, [], _Conv(flat, f"encoder.layers.{at + 1}"))


class _Layer:
    """A transformer layer over clips end to end."""

    def __init__(self, flat: Mapping[str, Tensor], name: str, config: Any):
        def get(part: str) -> Tensor:
            return flat[name + part].contiguous()

        self.heads, self.head_dim, self.eps = config.num_attention_heads, config.head_dim, config.norm_eps
        # Pairs that are rotated together lie side by side, so that a rotation is one product of complex numbers.
        query, key = (interleave_pairs(get(f"self_attn.{part}.weight")) for part in ("q_proj", "k_proj"))
        self.qkv = torch.cat([query, key, get("self_attn.v_proj.weight")])
        self.out, self.fc1, self.fc2 = (get(f"{p}.weight") for p in ("self_attn.o_proj", "mlp.fc1", "mlp.fc2"))
        self.scales = [get(f"{part}_layer_scale.scale") for part in ("self_attn", "mlp")]
        norms = ("input_layernorm", "post_attention_layernorm")
        self.norms = [(get(f"{part}.weight"), get(f"{part}.bias")) for part in norms]

    def run(self, x: Tensor, turns: Tensor, lengths: Sequence[int], window: int) -> Tensor:
        """[N, D] -> [N, D]; ``turns`` complex [N, 1, head_dim / 2]."""
        rows, heads = len(x), self.heads
        qkv = F.linear(F.layer_norm(x, x.shape[1:], *self.norms[0], self.eps), self.qkv).view(rows, 3 * heads, -1)
        pairs = torch.view_as_complex(qkv[:, : 2 * heads].unflatten(-1, (-1, 2)))
        qk = torch.view_as_real(pairs * turns).flatten(-2)
        query, key, value = qk[:, :heads], qk[:, heads:], qkv[:, 2 * heads :]
        parts = zip(query.split(list(lengths)), key.split(list(lengths)), value.split(list(lengths)), strict=True)
        seen = torch.cat([part for q, k, v in parts for part in _attend(q, k, v, window)])
        x = torch.addcmul(x, self.scales[0], F.linear(seen.flatten(1), self.out))
        y = F.layer_norm(x, x.shape[1:], *self.norms[1], self.eps)
        return torch.addcmul(x, self.scales[1], F.linear(F.gelu(F.linear(y, self.fc1)), self.fc2))


def _attend(query: Tensor, key: Tensor, value: Tensor, window: int) -> list[Tensor]:
    """Causal attention of one clip [T, heads, head_dim] over ``window`` positions; returns its rows in blocks."""
    blocks, count = [], len(query)
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    for start in range(0, count, window):
        stop, left = min(count, start + window), max(0, start - window + 1)
        if start == 0:
            seen = F.scaled_dot_product_attention(q[:, :, :stop], k[:, :, :stop], v[:, :, :stop], is_causal=True)
        else:
            back = torch.arange(start, stop)[:, None] - torch.arange(left, stop)
            mask = (back >= 0) & (back < window)
            seen = F.scaled_dot_product_attention(q[:, :, start:stop], k[:, :, left:stop], v[:, :, left:stop], mask)
        blocks.append(seen[0].transpose(0, 1))
    return blocks
