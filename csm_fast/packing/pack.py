"""A pack: the tensors of some documents laid end to end, which pass through the model together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from csm_fast.packing.fit import MAX_POSITIONS, padded_rows


class Segments(NamedTuple):
    """Which rows of a pack attend to each other: rows of the same segment, causally.

    Attributes:
        lengths: rows of each segment, on the host; they sum to T.
        cu_seqlens: [S + 1] int32 on the device, cumulative lengths from 0 to T.
        max_seqlen: upper bound on ``lengths``.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    max_seqlen: int

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> Segments:
        """Segments that lie one after the other."""
        lengths = tuple(int(n) for n in lengths)
        if not lengths or min(lengths) < 1:
            raise ValueError("a pack needs at least one segment, none of them empty")
        return cls(lengths, torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device), max(lengths))


class Pack(NamedTuple):
    """T rows of whole documents. Other tensors refer to a row by its index within the pack.

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


def pack_padded(tokens: Tensor, tokens_mask: Tensor, fraction: float, limit: int = MAX_POSITIONS) -> Pack:
    """Pack a padded batch, as the forward pass of Sesame's blog receives it.

    The depth decoder's frames are chosen as the blog does: ``torch.randperm(A)[: A // 16]`` on torch's default CPU
    generator, over the supervised frames in row-major order. So the same ``torch.manual_seed`` gives both the same
    frames. At least one frame is chosen where there is one.

    Args:
        tokens: [B, S, K + 1] integers.
        tokens_mask: same shape, bool. A row is audio (all K codes True), text (the last column True) or empty.
            Empty rows are ignored wherever they are.
        fraction: share of the supervised frames that the depth decoder sees.
        limit: most rows of a conversation: the model's context.

    Raises:
        ValueError: rows that are audio and text at once, or audio in part; more live rows than the model's context.
    """
    if tokens.dim() != 3 or tokens.shape != tokens_mask.shape:
        raise ValueError(f"tokens {list(tokens.shape)} and tokens_mask {list(tokens_mask.shape)} must be [B, S, K + 1]")
    mask = tokens_mask.bool()
    audio, text = mask[..., :-1].all(-1), mask[..., -1]
    live = audio | text
    odd = (mask[..., :-1].any(-1) != audio) | (audio & text)
    # One copy to the host is enough for every check and for the segments.
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
    # A dummy document of text fills the pack to one of few sizes, so that little is compiled.
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
