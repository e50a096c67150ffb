"""The operators that ``benchmarks.kernels`` measures: their inputs, their competitors, and the work they cannot avoid.

A case is one operator at one size. Its systems all start from the same inputs and are all checked against the same
formula in float64. ``csm_fast`` is called through its public functions; "eager" is what the published training code
does, on the same packed rows (so without the padding that it would also pay for).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from csm_kernels.depth_attention import depth_attention
from csm_kernels.frame_embed import frame_embed
from torch import Tensor

from csm_fast import ops
from csm_fast.attention import RopeSpec, apply_rope, rope_table
from csm_fast.config import CSMConfig
from csm_fast.model import rms_norm

FORWARD, BOTH = "forward", "forward+backward"
MODES = (FORWARD, BOTH)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHAPES: dict[str, Callable[[], CSMConfig]] = {"small": CSMConfig.small, "csm-1b": CSMConfig.csm_1b}
MIB = 2**20

# ------------------------------------------------------------------------------------------------------ vocabulary


@dataclass(frozen=True)
class Point:
    """Where an operator is measured.

    Attributes:
        rows: N, rows of the backbone, text and audio.
        fraction: share of the supervised frames that reach the depth decoder; None where it plays no part.
    """

    op: str
    rows: int
    fraction: float | None
    config: CSMConfig
    dtype: torch.dtype
    device: torch.device
    compile: bool = True

    def layout(self) -> Layout:
        return layout(self.rows, self.config.backbone.max_seq_len)

    def frames(self) -> int:
        """M, frames in the depth decoder."""
        return max(2, int(self.layout().audio * (self.fraction or 0)))


@dataclass(frozen=True)
class Layout:
    """Rows of each conversation of a pack; the first eighth of each is text."""

    lengths: tuple[int, ...]

    @property
    def text_of(self) -> list[int]:
        return [max(1, n // 8) for n in self.lengths]

    @property
    def audio(self) -> int:
        """A, audio rows; all are supervised."""
        return sum(self.lengths) - sum(self.text_of)


@functools.cache
def layout(rows: int, longest: int) -> Layout:
    """Conversations of log-normal length, median 120 rows (10 s of speech), that fill ``rows`` exactly."""
    draw = random.Random(0)
    lengths: list[int] = []
    left = rows
    while left:
        n = min(left, longest, max(16, int(draw.lognormvariate(4.79, 0.8))))
        if left - n < 16:  # no conversation of a few rows at the end
            n = left if left <= longest else left // 2
        lengths.append(n)
        left -= n
    return Layout(tuple(lengths))


@dataclass(frozen=True)
class Work:
    """What no implementation can leave out: bytes from and to memory, and floating-point operations."""

    bytes: float
    flops: float = 0.0


@dataclass
class Inputs:
    """Keyword arguments of a system, those that want a gradient, and the gradient of each output."""

    tensors: dict[str, Tensor]
    wanted: tuple[str, ...]
    upstream: tuple[Tensor, ...]


Results = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]  # outputs, gradients of ``wanted``


@dataclass(frozen=True)
class System:
    """One way to compute the operator.

    Attributes:
        memory: predicted peak bytes beyond the inputs, forward and forward+backward; only decides what is skipped.
        group: only systems of one group are ranked against each other.
        unavailable: why it cannot run here.
        prepare, restore: into the layout that it wants and back, outside the clock.
        fresh: it overwrites its inputs, so ``prepare`` serves every call anew.
        work: forward and forward+backward, where it differs from the case's.
    """

    name: str
    run: Callable[..., Any]
    memory: tuple[float, float]
    group: str = "dense"
    unavailable: str = ""
    prepare: Callable[[Inputs], Inputs] | None = None
    restore: Callable[[Results], Results] | None = None
    fresh: bool = False
    compiled: bool = False
    work: tuple[Work, Work] | None = None


@dataclass(frozen=True)
class Case:
    """One operator at one point. ``truth`` is the operator's formula, good for float64; ``make`` allocates."""

    point: Point
    make: Callable[[], Inputs]
    input_bytes: float
    truth: Callable[..., Any]
    systems: tuple[System, ...]
    work: tuple[Work, Work]
    outputs: tuple[str, ...] = ("out",)


def perform(run: Callable[..., Any], inputs: Inputs, mode: str) -> Results:
    """Forward under no_grad, as in evaluation, or forward and all gradients."""
    if mode == FORWARD:
        with torch.no_grad():
            return _several(run(**inputs.tensors)), ()
    outputs = _several(run(**inputs.tensors))
    wanted = [inputs.tensors[name] for name in inputs.wanted]
    return outputs, torch.autograd.grad(outputs, wanted, inputs.upstream)


def _several(out: Any) -> tuple[Tensor, ...]:
    return (out,) if isinstance(out, Tensor) else tuple(out)


# --------------------------------------------------------------------------------------------------------- helpers


bound = functools.cache(functools.partial)  # the same object for the same arguments, so that it is compiled once


@functools.cache
def _compiled(run: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(run)


def compiled(name: str, run: Callable[..., Any], point: Point, memory: tuple[float, float]) -> System:
    """``run`` under torch.compile. Row counts are symbolic, as they are for anyone whose packs differ in size."""
    reason = "" if point.compile else "left out by --no-compile"
    return System(name, _compiled(run), memory, unavailable=reason, compiled=True)


def ours(run: Callable[..., Any], point: Point, memory: tuple[float, float]) -> System:
    """The model's own small functions, which the trainer compiles on CUDA."""
    if point.device.type == "cuda" and point.compile:
        return compiled("csm_fast", run, point, memory)
    return System("csm_fast", run, memory)


def liger(
    name: str, function: str, wrap: Callable[..., Any], point: Point, memory: tuple[float, float], **more
) -> System:
    """``wrap(function, **inputs)`` for one of ``liger_kernel.transformers.functional``."""
    reason = ""
    if point.device.type != "cuda":
        reason = "Liger's kernels need CUDA"
    elif importlib.util.find_spec("liger_kernel") is None:
        reason = "liger_kernel is not installed"

    def run(**inputs: Tensor) -> Any:
        if not torch.is_grad_enabled():  # or its loss forms gradients that nobody wants
            inputs = {name: x.detach() for name, x in inputs.items()}
        return wrap(getattr(importlib.import_module("liger_kernel.transformers.functional"), function), **inputs)

    return System(name, run, memory, unavailable=reason, **more)


def random_tensor(point: Point, *shape: int, scale: float = 1.0, leaf: bool = False) -> Tensor:
    x = torch.randn(shape, device=point.device, dtype=point.dtype).mul_(scale)
    return x.requires_grad_(leaf)


def _rows(**tensors: Tensor) -> None:
    """Their first dimension is the one that changes from pack to pack."""
    for x in tensors.values():
        torch._dynamo.maybe_mark_dynamic(x, 0)


def clones(inputs: Inputs) -> Inputs:
    tensors = {n: x.detach().clone().requires_grad_(x.requires_grad) for n, x in inputs.tensors.items()}
    return Inputs(tensors, inputs.wanted, tuple(g.clone() for g in inputs.upstream))


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
    """F.embedding_bag where a row is audio, F.embedding where it is text; which is which was noted when collating."""
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
        _rows(**held)
        tables = {"text_table": text_vocab, "audio_table": k * v}
        held |= {name: random_tensor(point, size, d, leaf=True) for name, size in tables.items()}
        return Inputs(held, ("text_table", "audio_table"), (random_tensor(point, n, d),))

    out, gathered, grads = n * d * e, n * (k + 1) * d * e, tables * d * e
    sparse = embed_work(a, n - a, k, d, e, touched)
    slim, wide = (3 * out, 5 * out + grads), (3 * gathered, 4 * gathered + grads)
    systems = (
        System("csm_fast", bound(our_embed, sparse=False), slim),
        System("eager", eager_embed, wide),
        compiled("eager, compiled", eager_embed, point, (2 * out, 2 * gathered + 2 * grads)),
        System("embedding_bag", bound(bag_embed, sparse=False), slim),
        System(
            "csm_fast, sparse gradient",
            bound(our_embed, sparse=True),
            (3 * out, 5 * out + grads),
            "sparse",
            work=sparse,
        ),
        System(
            "embedding_bag, sparse gradient",
            bound(bag_embed, sparse=True),
            (3 * out, 2 * gathered),
            "sparse",
            work=sparse,
        ),
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
    """Liger's knows one head, so one call per codebook."""
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
        _rows(hidden=hidden, targets=targets, weights=weights)
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


# ------------------------------------------------------------------------------------------------ depth_attention


def attention_work(lengths: list[int], heads: int, kv_heads: int, width: int, element: int) -> tuple[Work, Work]:
    """A sequence of n has n (n + 1) / 2 pairs under the causal mask. A dot product per pair and head is 2 d operations:
    2 of them forward (scores, values), 5 backward (scores again, dP, dV, dQ, dK). Bytes: q, k, v read and the output
    written; backward q, k, v and the output's gradient read, dq, dk, dv written."""
    rows, pairs = sum(lengths), sum(n * (n + 1) // 2 for n in lengths)
    dot = 2.0 * pairs * heads * width
    forward = float(rows * (2 * heads + 2 * kv_heads) * width * element)
    backward = float(rows * (3 * heads + 4 * kv_heads) * width * element)
    return Work(forward, 2 * dot), Work(forward + backward, 7 * dot)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """torchtune's interleaved rotation, which Sesame's model runs; in the table's dtype."""
    pairs = x.to(cos.dtype).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2).to(x.dtype)


def rope_sdpa(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    q, k, v = (x.transpose(1, 2) for x in (rotate(q, cos, sin), rotate(k, cos, sin), v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def eager_depth(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As published: keys and values repeated for every query head, a dense mask."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    repeat = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(repeat, 2), v.repeat_interleave(repeat, 2)))
    mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def rope_flash(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    from flash_attn import flash_attn_func

    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return flash_attn_func(rotate(q, cos, sin), rotate(k, cos, sin), v, causal=True)


def no_flash(point: Point) -> str:
    if point.device.type != "cuda" or point.dtype == torch.float32:
        return "flash-attn needs CUDA and bf16 or fp16"
    return "" if importlib.util.find_spec("flash_attn") else "flash_attn is not installed"


def depth_case(point: Point) -> Case:
    c, m, length = point.config.decoder, point.frames(), point.config.num_codebooks
    h, g, d, e = c.num_heads, c.num_kv_heads, c.head_dim, point.dtype.itemsize

    def make() -> Inputs:
        q, k, v = (random_tensor(point, m, length, x, d, leaf=True) for x in (h, g, g))
        cos, sin = rope_table(RopeSpec(d, c.rope_base, c.rope_scale_factor), length, torch.float32, point.device)
        _rows(q=q, k=k, v=v)
        held = {"q": q, "k": k, "v": v, "cos": cos, "sin": sin}
        return Inputs(held, ("q", "k", "v"), (random_tensor(point, m, length, h, d),))

    q, kv = m * length * h * d, m * length * g * d
    rotated = (q + kv) * (e + 12) + q * e  # the float32 copy, the stacked pairs, the rounded result; the output
    plain = rotated, rotated + (q * 4 + kv * 6) * e
    systems = (
        System("csm_fast", depth_attention, plain),
        System("eager", eager_depth, (plain[0] + 2 * q * e, plain[1] + 6 * q * e)),
        System("RoPE + SDPA", rope_sdpa, plain),
        compiled("RoPE + SDPA, compiled", rope_sdpa, point, plain),
        System("RoPE + flash-attn", rope_flash, plain, unavailable=no_flash(point)),
    )
    work = attention_work([length] * m, h, g, d, e)
    return Case(point, make, (2 * q + 2 * kv) * e, rope_sdpa, systems, work)


# ----------------------------------------------------------------------------------------------- packed_attention


def _buckets(lengths: tuple[int, ...], size: int = 8) -> list[tuple[Tensor, Tensor]]:
    """Padded batches of conversations of similar length: rows of the pack [g, L], and which of them are not padding."""
    starts = list(accumulate(lengths, initial=0))
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    found = []
    for some in (order[i : i + size] for i in range(0, len(order), size)):
        n = torch.tensor([[lengths[i]] for i in some])
        column = torch.arange(int(n.max()))
        first = torch.tensor([[starts[i]] for i in some])
        found.append((first + torch.minimum(column, n - 1), column < n))
    return found


def _pad(inputs: Inputs, buckets: list[tuple[Tensor, Tensor]]) -> Inputs:
    device = inputs.upstream[0].device
    places = [(index.to(device), live.to(device)[..., None, None]) for index, live in buckets]
    tensors = {
        f"{name}{i}": inputs.tensors[name].detach()[index].transpose(1, 2).contiguous().requires_grad_()
        for i, (index, _) in enumerate(places)
        for name in "qkv"
    }
    upstream = tuple((inputs.upstream[0][index] * live).transpose(1, 2).contiguous() for index, live in places)
    return Inputs(tensors, tuple(tensors), upstream)


def _unpad(results: Results, buckets: list[tuple[Tensor, Tensor]], rows: int) -> Results:
    def pack(parts: tuple[Tensor, ...]) -> Tensor:
        out = parts[0].new_empty(rows, parts[0].shape[1], parts[0].shape[3])
        for part, (index, live) in zip(parts, buckets, strict=True):
            out[index[live].to(out.device)] = part.transpose(1, 2)[live.to(out.device)]
        return out

    outputs, grads = results
    return (pack(outputs),), tuple(pack(grads[i::3]) for i in range(3)) if grads else ()


def padded_sdpa(**x: Tensor) -> list[Tensor]:
    sizes = range(len(x) // 3)
    sdpa = F.scaled_dot_product_attention
    return [sdpa(x[f"q{i}"], x[f"k{i}"], x[f"v{i}"], is_causal=True, enable_gqa=True) for i in sizes]


def segment_sdpa(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], **_: Tensor) -> Tensor:
    parts = zip(*(x.transpose(0, 1).unsqueeze(0).split(lengths, 2) for x in (q, k, v)), strict=True)
    sdpa = F.scaled_dot_product_attention
    outs = [sdpa(a, b, c, is_causal=True, enable_gqa=True) for a, b, c in parts]
    return torch.cat(outs, 2).squeeze(0).transpose(0, 1)


def flash_varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, longest, longest, causal=True)


def torch_varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"window_size": (-1, 0)}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = True
    else:  # 2.11 knows no grouped queries
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **options)
    return out if isinstance(out, Tensor) else out[0]


def packed_case(point: Point) -> Case:
    c, lengths, n, e = point.config.backbone, point.layout().lengths, point.rows, point.dtype.itemsize
    h, g, d = c.num_heads, c.num_kv_heads, c.head_dim

    def make() -> Inputs:
        q, k, v = (random_tensor(point, n, x, d, leaf=True) for x in (h, g, g))
        ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        held = {"q": q, "k": k, "v": v, "cu_seqlens": ends.to(point.device)}
        return Inputs(held, ("q", "k", "v"), (random_tensor(point, n, h, d),))

    unit = n * h * d * e
    slim, buckets = (3 * unit, 8 * unit), _buckets(lengths)
    padded = (h + 2 * g) * d * e * sum(index.numel() for index, _ in buckets)
    half = point.device.type == "cuda" and point.dtype != torch.float32
    no_varlen = "" if half else "torch.nn.attention.varlen needs CUDA and bf16 or fp16"
    if half and importlib.util.find_spec("torch.nn.attention.varlen") is None:
        no_varlen = "this PyTorch has no torch.nn.attention.varlen"
    systems = (
        System("csm_fast", bound(ops.packed_attention, max_seqlen=max(lengths)), slim),
        System(
            "SDPA, padded batches of 8", padded_sdpa, (3 * padded, 6 * padded),
            prepare=lambda inputs: _pad(inputs, buckets), restore=lambda results: _unpad(results, buckets, n),
        ),
        System("SDPA per segment", bound(segment_sdpa, lengths=lengths), slim),
        System("torch varlen", bound(torch_varlen, longest=max(lengths)), slim, unavailable=no_varlen),
        System("flash-attn varlen", bound(flash_varlen, longest=max(lengths)), slim, unavailable=no_flash(point)),
    )  # fmt: skip
    truth = bound(segment_sdpa, lengths=lengths)
    return Case(point, make, 2.5 * unit, truth, systems, attention_work(list(lengths), h, g, d, e))


# ----------------------------------------------------------------------------------------------- between the GEMMs


def eager_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return rotate(q, cos, sin), rotate(k, cos, sin)


def our_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return apply_rope(q, cos, sin), apply_rope(k, cos, sin)


def rope_case(point: Point) -> Case:
    """Bytes: q and k read and written, the table read; backward their gradients, likewise."""
    c, n, e = point.config.backbone, point.rows, point.dtype.itemsize
    h, g, d = c.num_heads, c.num_kv_heads, c.head_dim

    def make() -> Inputs:
        positions = torch.cat([torch.arange(m) for m in point.layout().lengths]).to(point.device)
        spec = RopeSpec(d, c.rope_base, c.rope_scale_factor)
        table = rope_table(spec, c.max_seq_len, torch.float32, point.device)
        cos, sin = (t[positions].unsqueeze(1) for t in table)
        held = {"q": random_tensor(point, n, h, d, leaf=True), "k": random_tensor(point, n, g, d, leaf=True)}
        held |= {"cos": cos, "sin": sin}
        _rows(**held)
        return Inputs(held, ("q", "k"), (random_tensor(point, n, h, d), random_tensor(point, n, g, d)))

    values = n * (h + g) * d
    way, plain = 2 * values * e + n * d * 4, (values * (e + 12), values * (2 * e + 16))
    layout_differs = "its rotary embedding pairs halves; CSM's pairs are interleaved"
    systems = (
        ours(our_rope, point, plain),
        System("eager", eager_rope, plain),
        compiled("eager, compiled", eager_rope, point, plain),
        System("Liger", eager_rope, plain, unavailable=layout_differs),
    )
    return Case(point, make, 2 * values * e + n * d * 4, eager_rope, systems, (Work(way), Work(2 * way)), ("q", "k"))


@dataclass(frozen=True)
class _Norm:
    scale: Tensor
    eps: float


def our_norm(x: Tensor, branch: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x = x + branch
    return x, rms_norm(_Norm(scale, eps), x)


def eager_norm(x: Tensor, branch: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """torchtune's RMSNorm, in float32, after the residual sum."""
    x = x + branch
    wide = x if x.dtype == torch.float64 else x.float()
    return x, (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * scale


def norm_case(point: Point) -> Case:
    """Bytes: stream and branch read, their sum and its norm written; backward both gradients and the sum read, one
    gradient written, which serves stream and branch."""
    c, n, e = point.config.backbone, point.rows, point.dtype.itemsize
    d, eps = c.embed_dim, c.norm_eps

    def make() -> Inputs:
        held = {"x": random_tensor(point, n, d, leaf=True), "branch": random_tensor(point, n, d, leaf=True)}
        _rows(**held)
        held["scale"] = random_tensor(point, d, scale=0.1).add_(1).requires_grad_()
        return Inputs(held, tuple(held), (random_tensor(point, n, d), random_tensor(point, n, d)))

    def liger_norm(f: Callable[..., Any], x: Tensor, branch: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        x = x + branch  # not in place: its backward would overwrite a gradient that is used again
        return x, f(x, scale, eps, in_place=False)

    unit = n * d * e
    way, plain = Work(4 * unit), (n * d * (2 * e + 8), n * d * (4 * e + 16))
    systems = (
        ours(bound(our_norm, eps=eps), point, plain),
        System("eager", bound(eager_norm, eps=eps), plain),
        compiled("eager, compiled", bound(eager_norm, eps=eps), point, plain),
        liger("Liger", "liger_rms_norm", liger_norm, point, plain),
    )
    truth = bound(eager_norm, eps=eps)
    return Case(point, make, 4 * unit, truth, systems, (way, Work(2 * way.bytes)), ("sum", "norm"))


def eager_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Also how the model's layer spells it."""
    return F.silu(gate) * up


def swiglu_case(point: Point) -> Case:
    """Bytes: gate and up read, the product written; backward three read and two gradients written."""
    n, width, e = point.rows, point.config.backbone.intermediate_dim, point.dtype.itemsize

    def make() -> Inputs:
        held = {"gate": random_tensor(point, n, width, leaf=True), "up": random_tensor(point, n, width, leaf=True)}
        _rows(**held)
        return Inputs(held, ("gate", "up"), (random_tensor(point, n, width),))

    unit = n * width * e
    plain = 2 * unit, 6 * unit
    systems = (
        ours(eager_swiglu, point, plain),
        System("eager", eager_swiglu, plain),
        compiled("eager, compiled", eager_swiglu, point, plain),
        # Its backward writes the gradients over gate and up.
        liger("Liger", "liger_swiglu", lambda f, **x: f(x["gate"], x["up"]), point, plain, prepare=clones, fresh=True),
    )
    return Case(point, make, 3 * unit, eager_swiglu, systems, (Work(3 * unit), Work(8 * unit)))


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
