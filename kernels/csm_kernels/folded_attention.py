"""Causal grouped-query attention of many segments on a CPU: three batched GEMMs and a softmax, without autograd.

PyTorch's flash attention for CPUs works in tiles that short segments leave nearly empty: for 128 frames of 32 positions
it takes nine times as long as this, for 40 segments of 48 rows seven times; they draw level near 1,000 rows (bf16, two
cores, forward and backward). A call costs as much as the arithmetic of a few thousand scores, so there are few: one
gather brings the rows of all segments into the order of the products, head by head, one brings the result back.

"Folded" rows: segments of similar length form a group, padded to its longest; a group is [segments, heads, width, d],
and the groups lie one after the other. The query heads that share a key-value head are neighbours, so with queries seen
as [segments * kv heads, (heads / kv heads) * width, d] they are rows of one product. Padding lies on the right, where
a causal mask hides it from every row that counts.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Longest segment that this beats PyTorch's own at, with room to spare.
LONGEST = 384
# Most scores at once: 2 MiB in bf16, which the second-level caches of a few cores hold.
SCORES = 2**20


@dataclass(frozen=True)
class Fold:
    """Where the rows of a pack lie in the folded order.

    Attributes:
        shapes: (segments, width) of each group.
        heads, kv_heads: of the queries, and of keys and values.
        queries, keys: int64, which of the [T * heads] rows each folded row reads; padding reads its segment's last.
        queries_back, keys_back: [T * heads] int64, where each row lies in the folded order.
        padding: int64, the folded query rows that are padding.
    """

    shapes: tuple[tuple[int, int], ...]
    heads: int
    kv_heads: int
    queries: Tensor
    keys: Tensor
    queries_back: Tensor
    keys_back: Tensor
    padding: Tensor

    def groups(self) -> Iterator[tuple[int, int, slice, slice]]:
        """(segments, rows of a segment, where its queries lie, where its keys lie) of each group."""
        query = key = 0
        for segments, rows in self.shapes:
            size = segments * rows
            yield segments, rows, slice(query, query + size * self.heads), slice(key, key + size * self.kv_heads)
            query, key = query + size * self.heads, key + size * self.kv_heads

    def long(self) -> list[tuple[slice, tuple[int, int, int]]]:
        """(where its queries lie, their shape [segments, heads, rows]) of each group that PyTorch's attention takes."""
        return [(some, (s, self.heads, n)) for s, n, some, _ in self.groups() if n > LONGEST]


def fold(index: Tensor, live: Tensor, shapes: tuple[tuple[int, int], ...], heads: int, kv_heads: int) -> Fold:
    """The folded order of segments.

    Args:
        index: [B] int64, for each group [segments, width] one after the other, the row of the pack.
        live: [B] bool, which of them are no padding.
        shapes: (segments, width) of each group.
    """
    queries, live_queries = _by_head(index, live, shapes, heads)
    keys, live_keys = _by_head(index, live, shapes, kv_heads)
    return Fold(
        shapes,
        heads,
        kv_heads,
        queries,
        keys,
        _inverse(queries, live_queries),
        _inverse(keys, live_keys),
        (~live_queries).nonzero().squeeze(1),
    )


def _by_head(index: Tensor, live: Tensor, shapes: tuple[tuple[int, int], ...], heads: int) -> tuple[Tensor, Tensor]:
    sizes, head = [segments * width for segments, width in shapes], torch.arange(heads).view(1, heads, 1)
    rows = [
        (part.view(segments, 1, width) * heads + head).flatten()
        for part, (segments, width) in zip(index.split(sizes), shapes, strict=True)
    ]
    lives = [
        part.view(segments, 1, width).expand(-1, heads, -1).flatten()
        for part, (segments, width) in zip(live.split(sizes), shapes, strict=True)
    ]
    return torch.cat(rows), torch.cat(lives)


def _inverse(index: Tensor, live: Tensor) -> Tensor:
    places = live.nonzero().squeeze(1)
    back = torch.empty(len(places), dtype=torch.long)
    back[index[places]] = places
    return back


def uniform(segments: int, width: int, heads: int, kv_heads: int) -> Fold:
    """The folded order of ``segments`` segments of ``width`` rows each: the beginning of that of more of them."""
    most = _uniform(1 << max(0, segments - 1).bit_length(), width, heads, kv_heads)
    q, k = segments * width * heads, segments * width * kv_heads
    orders = most.queries[:q], most.keys[:k], most.queries_back[:q], most.keys_back[:k]
    return Fold(((segments, width),), heads, kv_heads, *orders, most.padding)


@functools.lru_cache(maxsize=16)
def _uniform(segments: int, width: int, heads: int, kv_heads: int) -> Fold:
    # One first made under inference_mode must still serve training afterwards.
    with torch.inference_mode(False), torch.no_grad():
        index = torch.arange(segments * width)
        live = torch.ones_like(index, dtype=torch.bool)
        return fold(index, live, ((segments, width),), heads, kv_heads)


@functools.lru_cache(maxsize=32)
def _mask(width: int, repeat: int, dtype: torch.dtype) -> Tensor:
    """[1, repeat * width, width]: 0 where a row sees another, minus infinity elsewhere."""
    with torch.inference_mode(False), torch.no_grad():
        return torch.full((width, width), -torch.inf, dtype=dtype).triu_(1).repeat(repeat, 1).unsqueeze(0)


def _probabilities(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    scores = torch.baddbmm(mask, q, k.transpose(1, 2))
    if scores.dtype == torch.bfloat16 and k.shape[1] % 32:
        # A row of bf16 that is no multiple of 32 takes PyTorch two to three times as long as one of float32.
        return scores.float().softmax(-1).to(scores.dtype)
    return scores.softmax(-1)


def _pieces(sequences: int, scores: int) -> Iterator[slice]:
    step = max(1, SCORES // scores)
    return (slice(i, min(i + step, sequences)) for i in range(0, sequences, step))


def gather(q: Tensor, k: Tensor, v: Tensor, order: Fold) -> tuple[Tensor, Tensor, Tensor]:
    """[T, heads, d] and twice [T, kv heads, d] -> folded rows [B, d]."""
    width = q.shape[-1]
    return (
        q.reshape(-1, width).index_select(0, order.queries),
        k.reshape(-1, width).index_select(0, order.keys),
        v.reshape(-1, width).index_select(0, order.keys),
    )


def forward(q: Tensor, k: Tensor, v: Tensor, order: Fold) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """softmax(q k^T) v of folded rows; ``q`` is scaled.

    Returns:
        [T, heads * d], and for the backward pass the output and log-sums of each group of long segments.
    """
    heads, kv_heads, width = order.heads, order.kv_heads, q.shape[-1]
    repeat = heads // kv_heads
    out, long = torch.empty_like(q), []
    for segments, rows, some_q, some_k in order.groups():
        if rows > LONGEST:
            shape = (segments, -1, rows, width)
            group = [x.view(shape) for x in (q[some_q], k[some_k], v[some_k])]
            result = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*group, 0.0, True, scale=1.0)
            out[some_q].view(shape).copy_(result[0])
            long.append(result)
            continue
        sequences = segments * kv_heads
        group_q, group_out = (x[some_q].view(sequences, repeat * rows, width) for x in (q, out))
        group_k, group_v = k[some_k].view(sequences, rows, width), v[some_k].view(sequences, rows, width)
        mask = _mask(rows, repeat, q.dtype)
        for some in _pieces(sequences, repeat * rows * rows):
            p = _probabilities(group_q[some], group_k[some], mask)
            torch.bmm(p, group_v[some], out=group_out[some])
            del p
    return out.index_select(0, order.queries_back).view(-1, heads * width), long


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, order: Fold, long: list[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``forward`` for the scaled q, for k and v: [T * heads, d] and twice [T * kv heads, d].

    With P = softmax(S) and O = P V: dV = P^T dO, dP = dO V^T, dS = P (dP - rowsum(P dP)), dQ = dS K, dK = dS^T Q; the
    products over folded queries add up the heads that share a key-value head.
    """
    width, repeat, results = q.shape[-1], order.heads // order.kv_heads, iter(long)
    grad = grad.reshape(-1, width).index_select(0, order.queries)
    if order.padding.numel():
        # Nothing flows back from padding, so neither does anything into it: what it holds only has to be finite.
        grad.index_fill_(0, order.padding, 0)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for segments, rows, some_q, some_k in order.groups():
        if rows > LONGEST:
            shape = (segments, -1, rows, width)
            group = [x.view(shape) for x in (grad[some_q], q[some_q], k[some_k], v[some_k])]
            flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
            grads = flash_backward(*group, *next(results), 0.0, True, scale=1.0)
            for into, part in zip((dq[some_q], dk[some_k], dv[some_k]), grads, strict=True):
                into.view(shape).copy_(part)
            continue
        sequences = segments * order.kv_heads
        group_q, group_grad, group_dq = (x[some_q].view(sequences, repeat * rows, width) for x in (q, grad, dq))
        group_k, group_v, group_dk, group_dv = (x[some_k].view(sequences, rows, width) for x in (k, v, dk, dv))
        mask = _mask(rows, repeat, q.dtype)
        for some in _pieces(sequences, repeat * rows * rows):
            p = _probabilities(group_q[some], group_k[some], mask)
            torch.bmm(p.transpose(1, 2), group_grad[some], out=group_dv[some])
            dp = torch.bmm(group_grad[some], group_v[some].transpose(1, 2))
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
            torch.bmm(ds, group_k[some], out=group_dq[some])
            torch.bmm(ds.transpose(1, 2), group_q[some], out=group_dk[some])
            del p, dp, ds
    return (
        dq.index_select(0, order.queries_back),
        dk.index_select(0, order.keys_back),
        dv.index_select(0, order.keys_back),
    )
