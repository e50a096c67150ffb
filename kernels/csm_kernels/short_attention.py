"""Causal attention of many short sequences on a CPU: three batched GEMMs and a softmax, without autograd.

PyTorch's flash attention for CPUs works in tiles that short sequences leave nearly empty: for 128 frames of 32
positions it takes nine times as long as this, for 40 segments of 48 rows seven times; they draw level near 1,000 rows
(bf16, two cores, forward and backward). Scores exist for one chunk of sequences at a time, and the backward computes
them again, so nothing of the size [rows, rows] is held.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Longest sequence that this beats PyTorch's own at, with room to spare.
LONGEST = 384
# Most scores at once: 2 MiB in bf16, which the second-level caches of a few cores hold.
SCORES = 2**20


def _chunks(sequences: int, heads: int, length: int) -> Iterator[slice]:
    step = max(1, SCORES // (heads * length * length))
    return (slice(i, min(i + step, sequences)) for i in range(0, sequences, step))


def _probabilities(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """softmax(q k^T + mask) for folded queries [B, r n, d], already scaled, and keys [B, n, d]."""
    return torch.baddbmm(mask.expand(len(q), -1, -1), q, k.transpose(1, 2)).softmax(-1)


def _fold(x: Tensor, kv_heads: int) -> Tensor:
    """[s, n, H, d] -> [s Hkv, r n, d]: the query heads that share a key-value head become rows of one GEMM."""
    s, n, h, d = x.shape
    return x.transpose(1, 2).reshape(s * kv_heads, h // kv_heads * n, d)


def _unfold(x: Tensor, s: int, n: int, heads: int) -> Tensor:
    return x.view(s, heads, n, x.shape[-1]).transpose(1, 2)


def _mask(n: int, repeat: int, like: Tensor) -> Tensor:
    return torch.full((n, n), -torch.inf, dtype=like.dtype, device=like.device).triu_(1).repeat(repeat, 1)


@torch.library.custom_op("csm_kernels::short_attention", mutates_args=())
def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``short_attention``, as a registered operator."""
    s, n, h, d = q.shape
    kv = k.shape[2]
    out = torch.empty((s, n, h, d), dtype=q.dtype, device=q.device)
    mask = _mask(n, h // kv, q)
    for some in _chunks(s, h, n):
        p = _probabilities(_fold(q[some] * d**-0.5, kv), _fold(k[some], kv), mask)
        out[some] = _unfold(torch.bmm(p, _fold(v[some], kv)), len(q[some]), n, h)
    return out


@torch.library.custom_op("csm_kernels::short_attention_gradients", mutates_args=())
def backward(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``forward`` for q, k and v.

    With P = softmax(S) and O = P V: dV = P^T dO, dP = dO V^T, dS = P (dP - rowsum(P dP)), dQ = dS K, dK = dS^T Q; the
    GEMMs over folded queries add up the heads that share a key-value head.
    """
    s, n, h, d = q.shape
    kv = k.shape[2]
    mask = _mask(n, h // kv, q)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    for some in _chunks(s, h, n):
        size = len(q[some])
        folded_q, folded_k = _fold(q[some] * d**-0.5, kv), _fold(k[some], kv)
        folded_v, folded_grad = _fold(v[some], kv), _fold(grad[some], kv)
        p = _probabilities(folded_q, folded_k, mask)
        dv[some] = _unfold(torch.bmm(p.transpose(1, 2), folded_grad), size, n, kv)
        dp = torch.bmm(folded_grad, folded_v.transpose(1, 2))
        ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
        dq[some] = _unfold(torch.bmm(ds, folded_k), size, n, h) * d**-0.5
        dk[some] = _unfold(torch.bmm(ds.transpose(1, 2), folded_q), size, n, kv)
    return dq, dk, dv


@forward.register_fake
def _(q, k, v):
    return q.new_empty(q.shape)


@backward.register_fake
def _(q, k, v, grad):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    return backward(*ctx.saved_tensors, grad)


forward.register_autograd(_backward, setup_context=_setup_context)


def short_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal self-attention of s sequences of n rows, grouped-query, scaled by 1/sqrt(d).

    Args:
        q: [s, n, H, d].  k, v: [s, n, Hkv, d], with H a multiple of Hkv; one dtype.

    Returns:
        [s, n, H, d].
    """
    return forward(q, k, v)
