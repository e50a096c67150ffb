"""The operators that ``benchmarks.kernels`` measures: their inputs, the systems, and the work that none can avoid.

A case is one operator at one size. Its systems all start from the same inputs and are all checked against the same
formula in float64. ``csm_fast`` is called through its public functions; "eager" is what the published training code
does, on the same packed rows, that is without its padding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from csm_kernels.frame_embed import frame_embed
from torch import Tensor

from benchmarks.common.tables import MIB
from benchmarks.kernels.attention_cases import depth_case, packed_case
from benchmarks.kernels.points import Case, Inputs, Point, System, Work
from benchmarks.kernels.pointwise_cases import norm_case, rope_case, swiglu_case
from benchmarks.kernels.system_kinds import bound, compiled, liger, mark_rows, random_tensor
from csm_fast import ops

# ----------------------------------------------------------------------------------------------------- frame_embed


def eager_embed(tokens: Tensor, is_audio: Tensor, text_table: Tensor, audio_table: Tensor, **_: Tensor) -> Tensor:
    """Sesame's ``_embed_tokens`` and the masked sum of the published forward: [N, K + 1, D] is gathered and masked."""
    k = tokens.shape[1] - 1
    offsets = audio_table.shape[0] // k * torch.arange(k, device=tokens.device)
    words = F.embedding(tokens[:, -1:], text_table)
    codes = F.embedding(tokens[:, :-1] + offsets, audio_table)
    mask = torch.cat([is_audio.unsqueeze(1).expand(-1, k), ~is_audio.unsqueeze(1)], 1)
    return (torch.cat([codes, words], 1) * mask.unsqueeze(-1)).sum(1)


def bag_embed(
    tokens: Tensor, text_table: Tensor, audio_table: Tensor, audio_rows: Tensor, text_rows: Tensor, sparse: bool, **_
) -> Tensor:
    """F.embedding_bag of audio rows, F.embedding of text rows, both of which are known from collating."""
    k = tokens.shape[1] - 1
    offsets = audio_table.shape[0] // k * torch.arange(k, device=tokens.device)
    out = audio_table.new_empty(tokens.shape[0], audio_table.shape[1])
    out[audio_rows] = F.embedding_bag(tokens[audio_rows, :-1] + offsets, audio_table, mode="sum", sparse=sparse)
    out[text_rows] = F.embedding(tokens[text_rows, -1], text_table, sparse=sparse)
    return out


def our_embed(tokens: Tensor, is_audio: Tensor, text_table: Tensor, audio_table: Tensor, sparse: bool, **_) -> Tensor:
    return frame_embed(tokens, is_audio, text_table, audio_table, impl="auto", sparse=sparse)


def embed_work(audio: int, text: int, codebooks: int, width: int, element: int, written: float) -> tuple[Work, Work]:
    """Rows of D moved. Forward: K read and 1 written per audio row, 1 and 1 per text row. Backward: the output's
    gradient once per look-up (K per audio row, 1 per text row), and ``written`` table rows of gradient written."""
    forward = (audio * (codebooks + 1) + text * 2) * width * element
    backward = (audio * codebooks + text + written) * width * element
    return Work(forward), Work(forward + backward)


def embed_case(point: Point) -> Case:
    c, lay = point.config, point.layout()
    n, a, k, v, e = point.rows, lay.audio, c.num_codebooks, c.audio_vocab_size, point.dtype.itemsize
    text_vocab, d = c.text_vocab_size, c.backbone.embed_dim
    tables = k * v + text_vocab
    # Rows that uniform draws touch: of V, after A draws, V (1 - (1 - 1/V)^A).
    touched = k * v * (1 - (1 - 1 / v) ** a) + text_vocab * (1 - (1 - 1 / text_vocab) ** (n - a))

    def make() -> Inputs:
        is_audio = torch.cat([torch.arange(m) >= t for m, t in zip(lay.lengths, lay.text_of, strict=True)])
        tokens = torch.randint(v, (n, k + 1)) * is_audio.unsqueeze(1)
        tokens[:, -1] = torch.randint(text_vocab, (n,)) * ~is_audio
        rows = {"audio_rows": is_audio.nonzero().squeeze(1), "text_rows": (~is_audio).nonzero().squeeze(1)}
        held = {"tokens": tokens, "is_audio": is_audio, **rows}
        held = {name: x.to(point.device) for name, x in held.items()}
        mark_rows(**held)
        tables = {"text_table": text_vocab, "audio_table": k * v}
        held |= {name: random_tensor(point, size, d, leaf=True) for name, size in tables.items()}
        return Inputs(held, ("text_table", "audio_table"), (random_tensor(point, n, d),))

    out, gathered, grads = n * d * e, n * (k + 1) * d * e, tables * d * e
    sparse = embed_work(a, n - a, k, d, e, touched)
    slim, wide = (3 * out, 5 * out + grads), (3 * gathered, 4 * gathered + grads)
    bagged = 3 * out, 2 * gathered
    systems = (
        System("csm_fast", bound(our_embed, sparse=False), slim),
        System("eager", eager_embed, wide),
        compiled("eager, compiled", eager_embed, point, (2 * out, 2 * gathered + 2 * grads)),
        System("embedding_bag", bound(bag_embed, sparse=False), slim),
        System("csm_fast, sparse gradient", bound(our_embed, sparse=True), slim, "sparse", work=sparse),
        System("embedding_bag, sparse gradient", bound(bag_embed, sparse=True), bagged, "sparse", work=sparse),
    )
    return Case(point, make, grads + out + 8 * n * (k + 3), eager_embed, systems, embed_work(a, n - a, k, d, e, tables))


# -------------------------------------------------------------------------------------------- linear_cross_entropy


def eager_heads(hidden: Tensor, weight: Tensor, targets: Tensor, **_: Tensor) -> Tensor:
    """All logits as published, then F.cross_entropy with its softmax in float32."""
    logits = torch.einsum("mcd,cdv->mcv", hidden, weight)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide.flatten(0, 1), targets.flatten())


def our_heads(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    return ops.linear_cross_entropy(hidden, weight, targets, weights, impl="auto")[0]


def _liger_heads(f: Callable[..., Any], hidden: Tensor, weight: Tensor, targets: Tensor, **_: Tensor) -> Tensor:
    """Liger's kernel has one head, so one call per codebook."""
    losses = [f(hidden[:, c], weight[c].t(), targets[:, c]) for c in range(weight.shape[0])]
    return torch.stack([x[0] if isinstance(x, tuple) else x for x in losses]).mean()


def heads_work(rows: int, heads: int, width: int, vocab: int, element: int) -> tuple[Work, Work]:
    """2 M C D V operations per GEMM: the logits, and backward the gradients of both operands (3 GEMMs in all). Bytes:
    both operands read once; with gradients, those written once."""
    gemm = 2.0 * rows * heads * width * vocab
    operands = float(rows * heads * width + heads * width * vocab) * element
    return Work(operands, gemm), Work(2 * operands, 3 * gemm)


def heads_case(point: Point, audio: bool) -> Case:
    c, e = point.config, point.dtype.itemsize
    m, heads, d = (point.frames(), c.num_codebooks - 1, c.decoder.embed_dim) if audio else (
        point.layout().audio, 1, c.backbone.embed_dim)  # fmt: skip
    v = c.audio_vocab_size
    logits, operands = m * heads * v, (m * heads * d + heads * d * v) * e

    def make() -> Inputs:
        hidden = random_tensor(point, m, heads, d, leaf=True)
        if audio:
            weight = random_tensor(point, heads, d, v, scale=d**-0.5, leaf=True)
        else:  # the transposed view of a linear layer
            weight = random_tensor(point, v, d, scale=d**-0.5).t().unsqueeze(0).requires_grad_()
        targets = torch.randint(v, (m, heads), device=point.device)
        weights = torch.full((m, 1), 1 / (m * heads), device=point.device)
        mark_rows(hidden=hidden, targets=targets, weights=weights)
        upstream = torch.ones((), device=point.device)
        held = {"hidden": hidden, "weight": weight, "targets": targets, "weights": weights}
        return Inputs(held, ("hidden", "weight"), (upstream,))

    # Logits in the compute dtype, in float32, their log-softmax; backward two more of the former kind.
    full = logits * (e + 8), logits * (2 * e + 12) + operands
    slim = 200 * MIB, 200 * MIB + 2 * operands
    systems = (
        System("csm_fast", our_heads, slim),
        System("eager", eager_heads, full),
        compiled("eager, compiled", eager_heads, point, (logits * (e + 4), logits * (2 * e + 4) + operands)),
        liger("Liger", "liger_fused_linear_cross_entropy", _liger_heads, point, slim),
    )
    return Case(point, make, operands + 8 * m * heads, eager_heads, systems, heads_work(m, heads, d, v, e))


CASES: dict[str, Callable[[Point], Case]] = {
    "frame_embed": embed_case,
    "lce_audio": functools.partial(heads_case, audio=True),
    "lce_codebook0": functools.partial(heads_case, audio=False),
    "depth_attention": depth_case,
    "packed_attention": packed_case,
    "rope": rope_case,
    "rms_norm": norm_case,
    "swiglu": swiglu_case,
}
DECODER_OPS = ("lce_audio", "depth_attention")
"""The amortization fraction sets their rows; the others see every row of the backbone, or every audio row."""
