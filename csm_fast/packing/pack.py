"""Packs: conversations laid end to end in a row budget, and the pure functions that plan them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from csm_fast.model.rope import Segments
from csm_fast.packing.fit import MAX_POSITIONS, padded_rows


class Pack(NamedTuple):
    """T rows of whole documents. The index of a row within the pack is its address everywhere below.

    Attributes:
        tokens: [T, K + 1] int32; columns 0..K-1 codes (audio rows), column K the text token (text rows).
        is_audio: [T] bool.
        positions: [T] int32, restarting at 0 in each document.
        segments: the documents' lengths; a trailing dummy document fills a padded pack.
        target_rows: [A] int64 audio rows with a loss; the row before each lies in the same document and predicts it.
        target_weights: [A] float64, codebook 0's weights: they sum to 1 over all packs of the optimizer step.
        decoder_index: [M] int64 into ``target_rows``: the frames that the depth decoder sees.
        decoder_weights: [M] float64, likewise summing to 1 over the optimizer step.
        rows: live rows (T less the dummy document).
        frames: audio frames among them (EOS rows not counted), supervised or not.
    """

    tokens: Tensor
    is_audio: Tensor
    positions: Tensor
    segments: Segments
    target_rows: Tensor
    target_weights: Tensor
    decoder_index: Tensor
    decoder_weights: Tensor
    rows: int
    frames: int

    def to(self, device: torch.device | str) -> Pack:
        """The pack on another device; copies are asynchronous from pinned memory."""
        device, here = torch.device(device), self.tokens.device
        if here == device or (here.type == device.type and device.index is None):  # "cuda" is where "cuda:0" is
            return self

        def move(value: Tensor) -> Tensor:
            return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)

        segments = self.segments._replace(cu_seqlens=move(self.segments.cu_seqlens))
        moved: Any = {name: move(value) for name, value in self._asdict().items() if isinstance(value, Tensor)}
        return self._replace(segments=segments, **moved)


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


def pack_padded(tokens: Tensor, tokens_mask: Tensor, fraction: float, limit: int = MAX_POSITIONS) -> Pack:
    """Pack a padded batch, as the blog's forward receives it.

    The depth decoder's frames are drawn as the blog does, ``torch.randperm(A)[: A // 16]`` on torch's default CPU
    generator over the supervised frames in row-major order, so that one ``torch.manual_seed`` gives both the same
    frames. At least one frame is drawn where there is one.

    Args:
        tokens: [B, S, K + 1] integers.
        tokens_mask: same shape, bool. A row is audio (all K codes live), text (the last column live) or empty;
            empty rows are ignored wherever they are.

    Raises:
        ValueError: rows that are audio and text at once, or audio in part; more live rows than the model's context.
    """
    if tokens.dim() != 3 or tokens.shape != tokens_mask.shape:
        raise ValueError(f"tokens {list(tokens.shape)} and tokens_mask {list(tokens_mask.shape)} must be [B, S, K + 1]")
    mask = tokens_mask.bool()
    audio, text = mask[..., :-1].all(-1), mask[..., -1]
    live = audio | text
    odd = (mask[..., :-1].any(-1) != audio) | (audio & text)
    # One copy to the host serves every check and the layout.
    lengths, odd_rows = torch.stack([live.sum(1), odd.sum(1)]).cpu()
    if odd_rows.any():
        raise ValueError("each row must be text (last column) or audio (all other columns), not both and not a part")
    if not lengths.any():
        raise ValueError("the batch has no live row: tokens_mask is False everywhere")
    if int(lengths.max()) > limit:
        raise ValueError(f"a conversation has {int(lengths.max())} rows; the model's context is {limit}")
    device, rows = tokens.device, int(lengths.sum())
    batch, where = live.nonzero(as_tuple=True)
    positions = live.cumsum(1)[batch, where] - 1
    is_audio = audio[batch, where]
    starts = torch.ones_like(is_audio)
    starts[1:] = batch[1:] != batch[:-1]
    target_rows = (is_audio & ~starts).nonzero().squeeze(1)
    count = target_rows.numel()
    selected = torch.randperm(count)[: max(1, int(count * fraction))].to(device)
    wide = torch.float64
    # A dummy document of text fills the pack to a size that comes again.
    filler = min(padded_rows(rows, 2 * rows, device.type) - rows, limit)
    return Pack(
        F.pad(tokens[batch, where], (0, 0, 0, filler)),
        F.pad(is_audio, (0, filler)),
        torch.cat([positions, torch.arange(filler, device=device, dtype=positions.dtype)]),
        Segments.of([*(n for n in lengths.tolist() if n), *([filler] if filler else [])], device),
        target_rows,
        torch.full((count,), 1.0 / max(count, 1), dtype=wide, device=device),
        selected,
        torch.full((selected.numel(),), 1.0 / max(selected.numel(), 1), dtype=wide, device=device),
        rows,
        int(is_audio.sum()),
    )
