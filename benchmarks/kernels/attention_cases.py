"""The attention operators, as cases of ``benchmarks.kernels``."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from csm_kernels.depth_attention import depth_attention
from torch import Tensor

from benchmarks.kernels.points import Case, Inputs, Point, Results, System, Work
from benchmarks.kernels.system_kinds import bound, compiled, mark_rows, random_tensor
from csm_fast import ops
from csm_fast.model.rope import RopeSpec, rope_table

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
        mark_rows(q=q, k=k, v=v)
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
