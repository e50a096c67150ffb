"""Causal grouped-query attention of many segments on a CPU: batched GEMMs and a softmax, without autograd.

PyTorch's flash attention for CPUs works in small tiles. Forward and backward together take nine times as long as here
for 128 frames of 32 positions, seven times for 40 segments of 48 rows, and twice as long for segments of 300 to 2,000
rows (bf16, two cores). A call costs as much as the arithmetic of a few thousand scores, so there are few calls: one
gather brings the rows of all segments into the order of the products, head by head, and one brings the result back. A
long segment is computed in blocks of query rows, each with the keys up to its last row, so that little above the
diagonal is computed.

"Folded" rows: segments of similar length form a group, padded to the longest of them. A group is [segments, heads,
width, d], and the groups follow one another. Query heads that share a key-value head are neighbours, so queries seen as
[segments * kv heads, (heads / kv heads) * width, d] are the rows of one product. Padding lies on the right, where a
causal mask hides it from every other row.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from csm_kernels.constants import FOLDED_SCORES, QUERY_ROWS
from csm_kernels.cpu.passes import causal_softmax_, causal_softmax_backward_, gathered
from csm_kernels.dtypes import wide_dtype

WHOLE = 112  # rows of the longest segment that is computed as one block


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


def fold(index: Tensor, live: Tensor, shapes: tuple[tuple[int, int], ...], heads: int, kv_heads: int) -> Fold:
    """The folded order of segments.

    Args:
        index: [B] int64, for the groups [segments, width] one after the other, the row of the pack.
        live: [B] bool, False for padding.
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
    """The folded order of ``segments`` segments of ``width`` rows each: the beginning of one that has more segments."""
    most = _uniform(1 << max(0, segments - 1).bit_length(), width, heads, kv_heads)
    q, k = segments * width * heads, segments * width * kv_heads
    orders = most.queries[:q], most.keys[:k], most.queries_back[:q], most.keys_back[:k]
    return Fold(((segments, width),), heads, kv_heads, *orders, most.padding)


@functools.lru_cache(maxsize=16)
def _uniform(segments: int, width: int, heads: int, kv_heads: int) -> Fold:
    # Under inference_mode the tensors could not be used in training later.
    with torch.inference_mode(False), torch.no_grad():
        index = torch.arange(segments * width)
        live = torch.ones_like(index, dtype=torch.bool)
        return fold(index, live, ((segments, width),), heads, kv_heads)


def _probabilities(q: Tensor, k: Tensor, first: int) -> Tensor:
    """[n, repeat * b, m], where query rows ``first`` to ``first`` + b = m see the m keys up to themselves."""
    scores = torch.bmm(q, k.transpose(1, 2))
    causal_softmax_(scores, k.shape[1] - first, first)
    return scores


def _blocks(rows: int) -> list[tuple[int, int]]:
    """[first, last) of the blocks of query rows; a block sees the keys up to its last row."""
    if rows <= WHOLE:
        return [(0, rows)]
    step = min(max(rows // 8, QUERY_ROWS[0]), QUERY_ROWS[1])
    step = -(-step // 32) * 32
    return [(i, min(i + step, rows)) for i in range(0, rows, step)]


def _pieces(sequences: int, scores: int) -> Iterator[slice]:
    step = max(1, FOLDED_SCORES // scores)
    return (slice(i, min(i + step, sequences)) for i in range(0, sequences, step))


def gather(q: Tensor, k: Tensor, v: Tensor, order: Fold) -> tuple[Tensor, Tensor, Tensor]:
    """[T * heads, d] and twice [T, kv heads * d] -> folded rows [B, d]."""
    width = q.shape[-1]
    return (
        gathered(q, order.queries),
        gathered(k.reshape(-1, width), order.keys),
        gathered(v.reshape(-1, width), order.keys),
    )


def forward(q: Tensor, k: Tensor, v: Tensor, order: Fold) -> Tensor:
    """softmax(q k^T) v of folded rows, [T, heads * d]; ``q`` is scaled."""
    repeat, width = order.heads // order.kv_heads, q.shape[-1]
    out = torch.empty_like(q)
    for segments, rows, some_q, some_k in order.groups():
        sequences = segments * order.kv_heads
        group_q, group_out = (x[some_q].view(sequences, repeat, rows, width) for x in (q, out))
        group_k, group_v = (x[some_k].view(sequences, rows, width) for x in (k, v))
        for first, last in _blocks(rows):
            for some in _pieces(sequences, repeat * (last - first) * last):
                block_q, into = group_q[some, :, first:last].flatten(1, 2), group_out[some, :, first:last]
                p = _probabilities(block_q, group_k[some, :last], first)
                if last - first == rows:
                    torch.bmm(p, group_v[some], out=into.flatten(1, 2))
                else:
                    into.copy_(torch.bmm(p, group_v[some, :last]).view(into.shape))
                del p
    return gathered(out, order.queries_back).view(-1, order.heads * width)


def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, order: Fold) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``forward`` for the scaled q, for k and v, in the folded order.

    With P = softmax(S) and O = P V: dV = P^T dO, dP = dO V^T, dS = P (dP - rowsum(P dP)), dQ = dS K, dK = dS^T Q; the
    products over folded queries add up the heads that share a key-value head.
    """
    repeat, width = order.heads // order.kv_heads, q.shape[-1]
    grad = gathered(grad.reshape(-1, width), order.queries)
    if order.padding.numel():
        # Padding has no gradient. Its values reach no other row, and only have to be finite.
        grad.index_fill_(0, order.padding, 0)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for segments, rows, some_q, some_k in order.groups():
        sequences, blocks = segments * order.kv_heads, _blocks(rows)
        queries = [x[some_q].view(sequences, repeat, rows, width) for x in (q, grad, dq)]
        keys = [x[some_k].view(sequences, rows, width) for x in (k, v, dk, dv)]
        gradients = _backward_whole if len(blocks) == 1 else _backward_in_blocks
        for some in _pieces(sequences, max(repeat * (last - first) * last for first, last in blocks)):
            gradients(*(x[some] for x in queries), *(x[some] for x in keys))
    return dq, dk, dv


def _score_gradients(p: Tensor, grad: Tensor, v: Tensor, first: int) -> Tensor:
    ds = torch.bmm(grad, v.transpose(1, 2))
    causal_softmax_backward_(ds, p, v.shape[1] - first, first)
    return ds


def _backward_whole(q: Tensor, grad: Tensor, dq: Tensor, k: Tensor, v: Tensor, dk: Tensor, dv: Tensor) -> None:
    """Writes dq [n, repeat, rows, d] and dk, dv [n, rows, d]."""
    q, grad, dq = q.flatten(1, 2), grad.flatten(1, 2), dq.flatten(1, 2)
    p = _probabilities(q, k, 0)
    torch.bmm(p.transpose(1, 2), grad, out=dv)
    ds = _score_gradients(p, grad, v, 0)
    torch.bmm(ds, k, out=dq)
    torch.bmm(ds.transpose(1, 2), q, out=dk)


def _backward_in_blocks(q: Tensor, grad: Tensor, dq: Tensor, k: Tensor, v: Tensor, dk: Tensor, dv: Tensor) -> None:
    """The same in blocks of queries. The gradients of a key from several blocks are added up in the wide dtype."""
    repeat, rows = q.shape[1:3]
    wide = wide_dtype(k.dtype)
    sum_k, sum_v = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
    for first, last in _blocks(rows):
        block_q, block_grad = (x[:, :, first:last].flatten(1, 2) for x in (q, grad))
        seen = k[:, :last]
        p = _probabilities(block_q, seen, first)
        sum_v[:, :last] += torch.bmm(p.transpose(1, 2), block_grad)
        ds = _score_gradients(p, block_grad, v[:, :last], first)
        into = dq[:, :, first:last]
        into.copy_(torch.bmm(ds, seen).view(into.shape))
        sum_k[:, :last] += torch.bmm(ds.transpose(1, 2), block_q)
        del p, ds
    dk.copy_(sum_k)
    dv.copy_(sum_v)
