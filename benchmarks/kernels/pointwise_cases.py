"""The operators between the large matrix products, as cases of ``benchmarks.kernels``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.attention_cases import rotate
from benchmarks.kernels.points import Case, Inputs, Point, System, Work
from benchmarks.kernels.system_kinds import bound, liger, mark_rows, pointwise_systems, random_tensor
from csm_fast.model.layer import rms_norm
from csm_fast.model.rope import RopeSpec, apply_rope, rope_table


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
        mark_rows(**held)
        return Inputs(held, ("q", "k"), (random_tensor(point, n, h, d), random_tensor(point, n, g, d)))

    values = n * (h + g) * d
    way, plain = 2 * values * e + n * d * 4, (values * (e + 12), values * (2 * e + 16))
    layout_differs = "its rotary embedding pairs halves; CSM's pairs are interleaved"
    systems = (
        *pointwise_systems(our_rope, eager_rope, point, plain),
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
        mark_rows(**held)
        held["scale"] = random_tensor(point, d, scale=0.1).add_(1).requires_grad_()
        return Inputs(held, tuple(held), (random_tensor(point, n, d), random_tensor(point, n, d)))

    def liger_norm(f: Callable[..., Any], x: Tensor, branch: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        x = x + branch  # not in place: its backward would overwrite a gradient that is used again
        return x, f(x, scale, eps, in_place=False)

    unit = n * d * e
    way, plain = Work(4 * unit), (n * d * (2 * e + 8), n * d * (4 * e + 16))
    truth = bound(eager_norm, eps=eps)
    systems = (
        *pointwise_systems(bound(our_norm, eps=eps), truth, point, plain),
        liger("Liger", "liger_rms_norm", liger_norm, point, plain),
    )
    return Case(point, make, 4 * unit, truth, systems, (way, Work(2 * way.bytes)), ("sum", "norm"))


def eager_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """The model's layer computes the same."""
    return F.silu(gate) * up


def swiglu_case(point: Point) -> Case:
    """Bytes: gate and up read, the product written; backward three read and two gradients written."""
    n, width, e = point.rows, point.config.backbone.intermediate_dim, point.dtype.itemsize

    def make() -> Inputs:
        held = {"gate": random_tensor(point, n, width, leaf=True), "up": random_tensor(point, n, width, leaf=True)}
        mark_rows(**held)
        return Inputs(held, ("gate", "up"), (random_tensor(point, n, width),))

    unit = n * width * e
    plain = 2 * unit, 6 * unit
    anew: dict[str, Any] = {"prepare": Inputs.cloned, "fresh": True}  # its backward overwrites gate and up
    systems = (
        *pointwise_systems(eager_swiglu, eager_swiglu, point, plain),
        liger("Liger", "liger_swiglu", lambda f, gate, up: f(gate, up), point, plain, **anew),
    )
    return Case(point, make, 3 * unit, eager_swiglu, systems, (Work(3 * unit), Work(8 * unit)))
