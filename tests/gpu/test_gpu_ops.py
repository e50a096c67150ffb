"""The operators on a GPU, at csm-1b's shapes: errors against float64, the same bits twice, a host that never waits.

Every check is a function of a device. What runs everywhere is a rehearsal on the CPU at small shapes, the kernels in
the interpreter: it proves nothing about a GPU, but the checks themselves have then run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from csm_kernels import packed_attention as packed_attention_module
from csm_kernels.depth_attention import depth_attention
from csm_kernels.linear_cross_entropy import linear_cross_entropy
from csm_kernels.packed_attention import packed_attention
from gpu_cases import DEVICES, GPU, kernels, no_waiting
from kernel_cases import assert_within_budget
from torch import Tensor

from csm_fast.model.rope import RopeSpec, rope_table

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SPEC = RopeSpec(128, 500_000.0, 32.0, 1.0, 4.0, 8192)
# TF32 keeps 10 bits of a product's operands: errors near 3e-4, where float32's sums of these lengths err by 1e-6.
NO_TF32 = 3e-5

Named = dict[str, Tensor]


def draw(device: str, dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def check(run: Callable[[], Named], truth: Named, plain: Named, dtype: torch.dtype, device: str) -> None:
    """Within the error budget, float32 without TF32, the same bits again, and no waiting once warm."""
    got = run()
    for name, value in got.items():
        assert_within_budget(name, value, truth[name], plain[name])
        if dtype == torch.float32:
            error = (value.double() - truth[name]).norm() / truth[name].norm().clamp_min(1e-300)
            assert error < NO_TF32 or not value.count_nonzero(), f"{name}: {float(error):.2g}, as in TF32"
    with no_waiting(device):
        again = run()
    for name, value in got.items():
        assert torch.equal(value, again[name]), f"{name}: other bits the second time"


# --- linear_cross_entropy -----------------------------------------------------------------------------------------

# Rows, heads, width, vocabulary: odd numbers of rows.
HEADS = {
    ("cpu", "audio head"): (9, 3, 96, 70),
    ("cpu", "codebook 0"): (33, 1, 48, 70),
    ("cuda", "audio head"): (513, 31, 1024, 2051),
    ("cuda", "codebook 0"): (4097, 1, 2048, 2051),
}


def head_by_head(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, wide: torch.dtype) -> Named:
    """The same from PyTorch's linear layer and cross-entropy, logits in the inputs' dtype, one head at a time."""
    per_head, hidden_grads, weight_grads = [], [], []
    for c in range(hidden.shape[1]):
        h, w = (x.detach().requires_grad_() for x in (hidden[:, c], weight[c]))
        losses = F.cross_entropy((h @ w).to(wide), targets[:, c], reduction="none", ignore_index=-100)
        loss = (losses * weights[:, 0].to(wide)).sum()
        for into, grad in zip((hidden_grads, weight_grads), torch.autograd.grad(loss, (h, w)), strict=True):
            into.append(grad)
        per_head.append(loss.detach())
    parts = torch.stack(per_head)
    return {
        "loss": parts.sum(),
        "parts": parts,
        "hidden": torch.stack(hidden_grads, 1),
        "weight": torch.stack(weight_grads),
    }


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["default", "small"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head", ["audio head", "codebook 0"])
@pytest.mark.parametrize("device", DEVICES)
def test_linear_cross_entropy(device, head, dtype, budget):
    rows, heads, width, vocab = HEADS[device, head]
    hidden = draw(device, dtype, rows, heads, width).requires_grad_()
    weight = (draw(device, torch.float32, heads, width, vocab, seed=1) * width**-0.5).to(dtype).requires_grad_()
    generator = torch.Generator(device).manual_seed(2)
    targets = torch.randint(0, vocab, (rows, heads), generator=generator, device=device)
    targets[::5, -1] = -100
    weights = torch.rand(rows, 1, generator=generator, device=device)  # not 1 / rows: fp16 has no such gradients
    byte_budget = 64 * 2**20 if budget == "default" else rows * vocab  # a third or less of one head's rows

    def run() -> Named:
        loss, parts = linear_cross_entropy(hidden, weight, targets, weights, byte_budget, impl="triton")
        grads = torch.autograd.grad(loss, (hidden, weight))
        return {"loss": loss.detach(), "parts": parts, "hidden": grads[0], "weight": grads[1]}

    truth = head_by_head(hidden.double(), weight.double(), targets, weights, torch.float64)
    plain = head_by_head(hidden, weight, targets, weights, torch.float32)
    with kernels(device):
        check(run, truth, plain, dtype, device)


# --- depth_attention ----------------------------------------------------------------------------------------------


def plain_depth_attention(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotation by complex numbers, and a softmax over masked scores."""

    def turned(x: Tensor) -> Tensor:
        turns = torch.complex(cos, sin)[:, None]
        pairs = torch.view_as_complex(x.to(cos.dtype).unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)

    return plain_attention(turned(q), turned(k), v)


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal, grouped-query: [..., rows, heads, d], in the inputs' dtype with a softmax in the wide one."""
    length, heads, width = q.shape[-3:]
    k, v = (x.repeat_interleave(heads // k.shape[-2], -2) for x in (k, v))
    q, k, v = (x.transpose(-2, -3) for x in (q, k, v))
    scores = (q @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32)) * width**-0.5
    later = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    return (scores.masked_fill(later, float("-inf")).softmax(-1).to(q.dtype) @ v).transpose(-2, -3)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["dense", "strided"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("length", "heads", "kv_heads"), [(32, 8, 2), (7, 4, 4), (1, 6, 2)])
@pytest.mark.parametrize("device", DEVICES)
def test_depth_attention(device, length, heads, kv_heads, dtype, form):
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies bfloat16 as integers")
    frames, width = (1025, 128) if device == "cuda" else (2, 128)
    sizes = [heads, kv_heads, kv_heads]
    fused = draw(device, dtype, frames, length, sum(sizes), width)
    grad = draw(device, dtype, frames, length, heads, width, seed=1)
    if form == "strided":  # heads before positions in memory, and a gradient that is strided too
        fused = fused.transpose(1, 2).contiguous().transpose(1, 2)
        grad = grad.transpose(1, 2).contiguous().transpose(1, 2)
    q, k, v = (x.detach().requires_grad_() for x in fused.split(sizes, 2))
    assert form == "dense" or not q.is_contiguous()
    cos, sin = rope_table(SPEC, length, torch.float32, torch.device(device))

    def run(
        function: Callable[..., Tensor], inputs: tuple[Tensor, ...], table: tuple[Tensor, ...], grad: Tensor
    ) -> Named:
        out = function(*inputs, *table)
        grads = torch.autograd.grad(out, inputs, grad)
        return dict(zip(("out", "q", "k", "v"), (out.detach(), *grads), strict=True))

    wide = tuple(x.detach().double().requires_grad_() for x in (q, k, v))
    truth = run(plain_depth_attention, wide, (cos.double(), sin.double()), grad.double())
    plain = run(plain_depth_attention, (q, k, v), (cos, sin), grad)
    if length == 1:  # one key: its probability is 1 whatever the score, where float64 leaves its rounding
        truth |= {name: torch.zeros_like(truth[name]) for name in "qk"}

    def ours() -> Named:
        return run(lambda *x: depth_attention(*x, impl="triton"), (q, k, v), (cos, sin), grad)

    with kernels(device):
        check(ours, truth, plain, dtype, device)


# --- packed_attention ---------------------------------------------------------------------------------------------

LAYOUTS = {
    ("cpu", "ragged"): (1, 20, 7, 1, 2, 33),
    ("cpu", "rows alone"): (1, 1, 1, 1, 1),
    ("cpu", "long"): (90,),
    ("cuda", "ragged"): (1, 700, 17, 1, 333, 128, 2, 64, 129, 1),
    ("cuda", "rows alone"): (1,) * 65,
    ("cuda", "long"): (1500, 3, 1024),
}
BACKENDS = [pytest.param("cpu", "groups", id="rehearsal")]
BACKENDS += [pytest.param("cuda", name, marks=GPU, id=name) for name in ("groups", "flash-attn", "torch varlen")]


def use_backend(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Make ``packed_attention`` take this one, or skip the test."""
    if backend == "flash-attn":
        found = packed_attention_module._varlen_library.__wrapped__(torch.cuda.current_device())
        if found != "flash-attn":
            pytest.skip("flash-attn is not installed, or not for this PyTorch")
    elif backend == "torch varlen":
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "flash_attn", None)
            found = packed_attention_module._varlen_library.__wrapped__(torch.cuda.current_device())
        if not found:
            pytest.skip("this PyTorch has no torch.nn.attention.varlen")
    else:
        found = ""
    monkeypatch.setattr(packed_attention_module, "_varlen_library", lambda device: found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["ragged", "rows alone", "long"])
@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_packed_attention(monkeypatch, device, layout, dtype, backend):
    if backend != "groups" and dtype == torch.float32:
        pytest.skip("variable-length kernels are for half types")
    use_backend(monkeypatch, backend)
    lengths = LAYOUTS[device, layout]
    rows, heads, kv_heads, width = sum(lengths), *((32, 8, 64) if device == "cuda" else (4, 2, 16))
    q, k, v = (
        draw(device, dtype, rows, h, width, seed=i).requires_grad_() for i, h in enumerate((heads, kv_heads, kv_heads))
    )
    grad = draw(device, dtype, rows, heads, width, seed=3)
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)

    def by_segment(wide: bool) -> Named:
        """One segment's [heads, L, L] at a time."""
        pieces: list[tuple[Tensor, ...]] = []
        for parts in zip(*(x.detach().split(lengths) for x in (q, k, v, grad)), strict=True):
            *inputs, g = (x.double() if wide else x for x in parts)
            inputs = [x.requires_grad_() for x in inputs]
            out = plain_attention(*inputs)
            pieces.append((out.detach(), *torch.autograd.grad(out, inputs, g)))
        return {n: torch.cat(x) for n, x in zip(("out", "q", "k", "v"), zip(*pieces, strict=True), strict=True)}

    def run() -> Named:
        out = packed_attention(q, k, v, cu_seqlens, max(lengths))
        return dict(
            zip(("out", "q", "k", "v"), (out.detach(), *torch.autograd.grad(out, (q, k, v), grad)), strict=True)
        )

    got, truth, plain = run(), by_segment(True), by_segment(False)
    if layout == "rows alone":  # a query that sees one key has no gradient, and rounding has no relative error
        for name in "qk":
            assert got.pop(name).abs().max() < 1e-2
    for name, value in got.items():
        assert_within_budget(name, value, truth[name], plain[name])
    if backend == "groups":
        again = run()
        assert all(torch.equal(value, again[name]) for name, value in got.items())
    else:  # their sums over queries may take any order; groups read the layout on the host
        with no_waiting(device):
            run()
