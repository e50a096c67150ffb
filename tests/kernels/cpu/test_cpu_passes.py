"""The passes between the matrix products on a CPU: the library's and PyTorch's forms against float64."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from csm_kernels import pointwise
from csm_kernels.cpu import native
from csm_kernels.cpu import passes as cpu_passes
from kernel_cases import poisoned
from torch._subclasses import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
WIDTHS = [1, 5, 15, 16, 17, 33, 64, 100]


@pytest.fixture(autouse=True)
def form(cpu_form):
    with poisoned():
        yield cpu_form


def random(*shape: int, dtype: torch.dtype = FP32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=FP64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(got: torch.Tensor, want: torch.Tensor, eps: float = 4, terms: torch.Tensor | None = None) -> None:
    """Within ``eps`` roundings of ``got``'s type, of the largest of ``terms`` (``want``) in a row."""
    assert not got.isnan().any()
    largest = (want if terms is None else terms).abs().amax(-1, keepdim=True)
    bound = eps * torch.finfo(got.dtype).eps * largest.clamp(min=1e-30)
    assert ((got.double() - want).abs() <= bound).all(), float(((got.double() - want).abs() / bound).max())


@pytest.mark.parametrize("rows, width", [(1, 5), (3, 64), (700, 33), (0, 16)])
@pytest.mark.parametrize("x_dtype, dtype", [*native.PAIRS, (FP64, FP64)])
def test_norm(rows, width, x_dtype, dtype):
    x, scale, grad = random(rows, width, dtype=x_dtype), random(width, dtype=x_dtype), random(rows, width, dtype=dtype)
    residual = random(rows, width, dtype=x_dtype, seed=3)
    wide = x.double().requires_grad_(), scale.double().requires_grad_()
    truth = F.rms_norm(wide[0], (width,), eps=1e-3) * wide[1]
    dx, dscale = torch.autograd.grad(truth, wide, grad.double())

    r, y = cpu_passes.norm(x, scale, 1e-3, dtype)
    assert y.dtype == dtype and r.shape == (rows, 1)
    if rows:
        assert_near(y, truth.detach(), 6)
    torch.testing.assert_close(cpu_passes.normed(x, r, scale, dtype), y, rtol=0, atol=0)
    got, got_scale = cpu_passes.norm_backward(grad, x, r, scale, None, True)
    assert got.dtype == x_dtype and got_scale.dtype == scale.dtype
    with_residual, nothing = cpu_passes.norm_backward(grad, x, r, scale, residual, False)
    assert not nothing.numel()
    if rows:
        assert_near(got, dx, 8)
        assert_near(with_residual, dx + residual.double(), 8)
        bound = 8 * torch.finfo(scale.dtype).eps * dscale.abs().max() + 1e-5 * rows**0.5
        assert ((got_scale.double() - dscale).abs() <= bound).all()


def test_a_norm_of_strided_rows_and_one_whose_scale_has_another_type(form):
    x, scale = random(6, 40, dtype=BF16)[:, ::2], random(20, dtype=FP32)
    r, y = cpu_passes.norm(x, scale, 1e-5, BF16)
    assert_near(y, F.rms_norm(x.double(), (20,), eps=1e-5) * scale.double())
    grad = torch.ones((), dtype=BF16).expand(6, 20)  # as the gradient of a sum comes
    same = cpu_passes.norm_backward(grad.contiguous(), x.contiguous(), r, scale, None, True)
    for a, b in zip(cpu_passes.norm_backward(grad, x, r, scale, None, True), same, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (3, 37), (300, 200)])
@pytest.mark.parametrize("dtype", [BF16, FP32, FP64])
def test_swiglu(shape, dtype):
    a, b, grad = (random(*shape, dtype=dtype, seed=i) * 4 for i in range(3))
    wide = [x.double().requires_grad_() for x in (a, b)]
    truth = F.silu(wide[0]) * wide[1]
    da, db = torch.autograd.grad(truth, wide, grad.double())
    results = (cpu_passes.swiglu(a, b), *cpu_passes.swiglu_backward(grad, a, b))
    for got, want in zip(results, (truth, truth, da, db), strict=True):
        assert got.dtype == dtype and got.shape == shape
        if got.numel():
            assert_near(got, want.detach(), 8)


def test_swiglu_far_out():
    a = torch.tensor([-1e4, -100.0, -88.0, -0.0, 0.0, 88.0, 100.0, 1e4])
    assert_near(cpu_passes.swiglu(a, torch.ones(8)), F.silu(a.double()))
    odd = torch.tensor([math.nan, math.inf, -math.inf])
    for dtype in (BF16, FP32):
        got = cpu_passes.swiglu(odd.to(dtype), torch.ones(3, dtype=dtype))
        assert got[0].isnan() and got[1] == math.inf
        assert all(x.isnan().any() for x in cpu_passes.swiglu_backward(*(odd.to(dtype),) * 3))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [BF16, FP32, FP64])
def test_causal_softmax(width, dtype):
    for before in {0, width // 2, width - 1}:
        block = width - before
        scores = random(3, 2 * block, width, dtype=dtype) * 5
        sees = torch.ones(block, width).tril(before).bool().repeat(2, 1)
        wide = scores.double().masked_fill(~sees, -math.inf).requires_grad_()
        truth = wide.softmax(-1)
        grad = random(3, 2 * block, width, dtype=dtype, seed=1)
        p = scores.clone()
        cpu_passes.causal_softmax_(p, block, before)
        assert_near(p, truth.detach())
        assert (p.masked_select(~sees) == 0).all()
        ds = grad.clone()
        cpu_passes.causal_softmax_backward_(ds, p, block, before)
        exact = p.double() * (grad.double() - (p.double() * grad.double()).sum(-1, keepdim=True))
        assert_near(ds, exact, terms=p.double() * grad.double().abs().amax(-1, keepdim=True))
        assert (ds.masked_select(~sees) == 0).all()


@pytest.mark.parametrize("width", [7, 40])
def test_what_is_not_finite_is_seen(width):
    for bad in (math.nan, math.inf):
        scores = torch.zeros(1, width, width, dtype=BF16)
        scores[0, width - 1, 2] = bad
        cpu_passes.causal_softmax_(scores, width, 0)
        assert scores[0, width - 1].isnan().any() and scores[0, : width - 1].isfinite().all()
    x = random(4, width)
    x[1, 3] = math.nan
    _, y = cpu_passes.norm(x, torch.ones(width), 1e-5, BF16)
    assert y[1].isnan().all() and y[[0, 2, 3]].isfinite().all()
    logits = random(4, width)
    logits[2, 1] = math.nan
    losses = cpu_passes.cross_entropy_(logits, torch.zeros(4, dtype=torch.long), torch.ones(4), True, 1.0)
    assert losses[2].isnan() and losses[[0, 1, 3]].isfinite().all() and logits[2].isnan().any()


@pytest.mark.parametrize("heads, width, frames", [(1, 2, False), (4, 64, False), (3, 16, True)])
@pytest.mark.parametrize("dtype", [BF16, FP32, FP64])
def test_rotation_and_its_way_back(heads, width, frames, dtype):
    rows, wide = 12, torch.float64 if dtype == FP64 else FP32
    angles = random(4 if frames else rows, 1, width // 2, dtype=wide)
    cos, sin = angles.cos(), angles.sin()
    x = random(rows, heads * width, dtype=dtype)
    index = torch.cat([torch.randperm(rows * heads, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 0])])
    turn = torch.polar(torch.ones_like(angles, dtype=FP64), angles.double()).repeat(rows // len(angles), 1, 1)
    pairs = torch.view_as_complex(x.double().view(rows, heads, width // 2, 2))
    truth = torch.view_as_real(pairs * turn * 0.3).reshape(-1, width)[index]
    got = cpu_passes.rotated(x.clone(), index, cos, sin, 0.3)
    assert got.dtype == dtype
    assert_near(got, truth)

    back = index[:-2].argsort()
    original = x.double().view(-1, width)
    restored = cpu_passes.rotated_back(got, back, cos, sin, 1 / 0.3, heads)
    assert restored.shape == x.shape
    assert_near(restored.view(-1, width), original, 6)
    torch.testing.assert_close(cpu_passes.gathered(got, back), got[back], rtol=0, atol=0)


@pytest.mark.parametrize("rows, vocab", [(0, 5), (1, 1), (3, 5), (40, 2051)])
@pytest.mark.parametrize("dtype", [BF16, FP32, FP64])
def test_cross_entropy(rows, vocab, dtype):
    logits = random(rows, vocab, dtype=dtype) * 3
    targets = torch.arange(rows) * 7 % vocab
    weights = random(rows, dtype=FP64 if dtype == FP64 else FP32, seed=1).abs()
    wide = logits.double().clone().requires_grad_()
    truth = F.cross_entropy(wide, targets, reduction="none") * weights.double()
    kept = logits.clone()
    alone = cpu_passes.cross_entropy_(kept, targets, weights, False, 2.0)
    assert torch.equal(kept, logits)
    losses = cpu_passes.cross_entropy_(logits, targets, weights, True, 2.0)
    torch.testing.assert_close(losses, alone, rtol=0, atol=0)
    torch.testing.assert_close(losses.double(), truth.detach(), rtol=2e-6, atol=2e-6)
    if rows:
        assert_near(logits, torch.autograd.grad(truth.sum(), wide)[0] * 2, 4)


@pytest.mark.slow
def test_threads_share_the_rows(form):
    """Of every pass: with several threads what one gives, whatever the number of rows."""

    def results(rows: int) -> list[torch.Tensor]:
        x, grad = random(rows, 600, dtype=BF16), random(rows, 600, dtype=BF16, seed=1)
        scale, index = random(600), torch.arange(rows * 10).flip(0)
        angles = random(rows, 1, 30)
        r, y = cpu_passes.norm(x, scale, 1e-5, BF16)
        found = [r, y, *cpu_passes.norm_backward(grad, x, r, scale, grad, True)]
        found += [cpu_passes.swiglu(x, grad), *cpu_passes.swiglu_backward(x, grad, y)]
        turned = cpu_passes.rotated(x.clone(), index, angles.cos(), angles.sin(), 1.0)
        found += [turned, cpu_passes.rotated_back(turned, index, angles.cos(), angles.sin(), 1.0, 10)]
        p, ds, logits = x.unsqueeze(0).clone(), grad.unsqueeze(0).clone(), x.clone()
        cpu_passes.causal_softmax_(p, rows, 600 - rows)
        cpu_passes.causal_softmax_backward_(ds, p, rows, 600 - rows)
        losses = cpu_passes.cross_entropy_(logits, torch.arange(rows), torch.ones(rows), True, 1.0)
        return [*found, p, ds, losses, logits]

    before = torch.get_num_threads()
    try:
        for rows in (28, 101):
            torch.set_num_threads(1)
            alone = results(rows)
            for threads in (2, 3, 40):
                torch.set_num_threads(threads)
                for i, (got, want) in enumerate(zip(results(rows), alone, strict=True)):
                    # Only the scale's gradient is a sum over rows.
                    exact = form == "library" and i != 3
                    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-2, "atol": 1e-3}
                    torch.testing.assert_close(got, want, **tolerance)
    finally:
        torch.set_num_threads(before)


def test_a_target_that_is_no_class():
    for bad in (5, -1):
        around = torch.zeros(3, 5)
        with pytest.raises(RuntimeError, match="out of bounds"):
            cpu_passes.cross_entropy_(around[:2], torch.tensor([0, bad]), torch.ones(2), True, 1.0)
        assert not around[2].any()


def test_types_that_differ_are_promoted_as_pytorch_would():
    a, b, grad = (random(40, 8, seed=i) for i in range(3))
    wanted = cpu_passes.swiglu_backward(grad.bfloat16().float(), a, b)
    for got, want in zip(cpu_passes.swiglu_backward(grad.bfloat16(), a, b), wanted, strict=True):
        torch.testing.assert_close(got, want)
    torch.testing.assert_close(cpu_passes.swiglu(a, b.bfloat16()), F.silu(a) * b.bfloat16())


def test_fake_tensors_and_tensors_of_other_classes():
    x, scale = random(4, 8), torch.ones(8)
    want = pointwise.rms_norm(x, scale, 1e-5)
    wrapped = pointwise.rms_norm(x, TwoTensor(scale, scale), 1e-5)
    torch.testing.assert_close(wrapped.a, want)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t).requires_grad_() for t in (x, scale)]
        out = pointwise.rms_norm(*fake, 1e-5)
        out.sum().backward()
        assert out.shape == (4, 8) and fake[0].grad.shape == (4, 8) and fake[1].grad.shape == (8,)
    assert pointwise.rms_norm(*(t.detach() for t in fake), 1e-5).shape == (4, 8)


def operators() -> dict[str, tuple]:
    """Arguments for each operator, by name."""
    x, grad, scale, r = random(4, 8, dtype=BF16), random(4, 8, dtype=BF16, seed=1), random(8), torch.ones(4, 1)
    index, cos = torch.tensor([3, 0, 7, 1]), random(4, 1, 2)
    scores = random(2, 6, 5)
    return {
        "norm": (x, scale, 1e-5, BF16),
        "normed": (x, r, scale, BF16),
        "norm_backward": (grad, x, r, scale, x, True),
        "swiglu": (x, grad),
        "swiglu_backward": (grad, x, grad),
        "gathered": (x, torch.tensor([3, 0])),
        "rotated": (x, index, cos, cos, 0.5),
        "rotated_back": (random(8, 4, dtype=BF16), index, cos, cos, 0.5, 1),
        "causal_softmax_": (scores, 3, 2),
        "causal_softmax_backward_": (scores, scores.softmax(-1), 3, 2),
        "cross_entropy_": (random(3, 5), torch.arange(3), torch.ones(3), True, 1.0),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", operators())
def test_opcheck(name):
    torch.library.opcheck(getattr(torch.ops.csm_kernels, name).default, operators()[name])


def test_every_operator_is_checked():
    registered = {name for name, value in vars(cpu_passes).items() if hasattr(value, "__wrapped__")}
    assert registered - {"_mask"} == set(operators())


def test_profilers_and_modes_see_operators():
    a = random(8, 8)
    with torch.profiler.profile() as seen:
        cpu_passes.swiglu(a, a)
    assert any(e.key == "csm_kernels::swiglu" for e in seen.key_averages())


# --- building ---------------------------------------------------------------------------------------------------------


def describe_in_new_process(**environment: str) -> str:
    """Whether a new process has the library, and its description there."""
    command = [
        sys.executable,
        "-c",
        "from csm_kernels.cpu import native as n; print(n.is_built()); print(n.describe_library())",
    ]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.slow
def test_it_is_built_once(tmp_path, form):
    if form == "PyTorch":
        pytest.skip("once is enough")
    assert describe_in_new_process(XDG_CACHE_HOME=str(tmp_path)).startswith("True\nbuilt by ")
    (library,) = (tmp_path / "csm_fast").iterdir()
    born = library.stat().st_mtime_ns
    assert describe_in_new_process(XDG_CACHE_HOME=str(tmp_path)).startswith("True")
    assert library.stat().st_mtime_ns == born
    library.write_bytes(b"half a file")
    assert describe_in_new_process(XDG_CACHE_HOME=str(tmp_path), CXX="/bin/false").startswith("True\nbuilt by ")
    assert library.stat().st_size > 1000
    words = "env LC_ALL=C g++"
    assert "env LC_ALL=C g++" in describe_in_new_process(XDG_CACHE_HOME=str(tmp_path), CXX=words)
    assert len(list((tmp_path / "csm_fast").iterdir())) == 2


@pytest.mark.slow
def test_without_a_compiler(tmp_path, form):
    if form == "library":
        pytest.skip("once is enough")
    bad = tmp_path / "g++"
    bad.write_text("#!/bin/sh\n[ $1 = --version ] && exit 0\necho 'x.cpp:1: error: no such thing' >&2\nexit 1\n")
    bad.chmod(0o755)
    environment = {"XDG_CACHE_HOME": str(tmp_path), "CXX": ""}
    assert (
        describe_in_new_process(PATH=str(tmp_path), **environment)
        == f"False\n{bad} could not build it: x.cpp:1: error: no such thing\n"
    )
    assert [p.name for p in (tmp_path / "csm_fast").iterdir()] == []
    assert describe_in_new_process(PATH=str(tmp_path / "nothing"), **environment).startswith("False\nno C++ compiler")
    assert describe_in_new_process(CSM_KERNELS_NATIVE="0") == "False\nCSM_KERNELS_NATIVE=0\n"
    file = tmp_path / "file"
    file.write_text("")
    assert describe_in_new_process(XDG_CACHE_HOME=str(file)).startswith("False")
