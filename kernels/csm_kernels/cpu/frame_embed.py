"""``frame_embed`` on a CPU, in PyTorch's operators: each row looks up only what it embeds, and a table's gradient is
written in the rows that were read."""

from __future__ import annotations

import mmap

import torch
import torch.nn.functional as F
from torch import Tensor

PIECE_BYTES = 2**21  # of sums between two copies: fits a second-level cache


def embed_rows(keys: Tensor, words: Tensor, is_audio: Tensor, text_table: Tensor, audio_table: Tensor) -> Tensor:
    """Each row's embedding, [N, D].

    Args:
        keys: [N, K] rows of the audio table, of audio rows.
        words: [N] rows of the text table, of text rows.
        is_audio: [N] bool.
    """
    out = audio_table.new_empty(keys.shape[0], audio_table.shape[1])
    audio_rows, text_rows = is_audio.nonzero().squeeze(1), (~is_audio).nonzero().squeeze(1)
    out.index_copy_(0, audio_rows, F.embedding_bag(keys.index_select(0, audio_rows), audio_table, mode="sum"))
    return out.index_copy_(0, text_rows, F.embedding(words.index_select(0, text_rows), text_table).to(out.dtype))


def write_gradient(grad: Tensor, more: Tensor | None, keys: Tensor, source: Tensor, n_rows: int, out: Tensor) -> None:
    """Sum the gradient of one table and write its touched rows: with ``embedding_bag``, whose table is the gradient.

    Args:
        grad, more: [N, D] and [.., D]: the gradients that ``source`` indexes, one after the other.
        keys: [M] ascending, the table's row of each occurrence; n_rows for none.
        source: [M] the gradient of each occurrence.
        out: [n_rows, D].
    """
    if more is not None:
        grad = torch.cat([grad, more.to(grad.dtype)])
    touched, counts = torch.unique_consecutive(keys, return_counts=True)
    ends = counts.cumsum(0)
    starts = ends - counts
    live = int(touched.numel()) - int(touched.numel() > 0 and touched[-1] == n_rows)
    step = max(1, PIECE_BYTES // (grad.shape[1] * grad.element_size()))
    for first in range(0, live, step):
        last = min(first + step, live)
        some = source[starts[first] : ends[last - 1]]
        sums = F.embedding_bag(some, grad, starts[first:last] - starts[first], mode="sum")
        out.index_copy_(0, touched[first:last].long(), sums.to(out.dtype))


def zeros(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Zeros. A large tensor is memory fresh from the operating system, whose pages cost nothing until they are written:
    filling a gradient of 128,256 rows takes longer than all the computation of a short batch."""
    size = shape[0] * shape[1] * dtype.itemsize
    if size < 2**22:
        return torch.zeros(shape, dtype=dtype)
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return torch.frombuffer(mmap.mmap(-1, size), dtype=dtype).view(shape)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            pages.madvise(mmap.MADV_HUGEPAGE)  # one page fault for 2 MiB, because the optimizer reads every page once
        except OSError:  # the kernel has no huge pages
            pass
    return torch.frombuffer(pages, dtype=dtype).view(shape)
