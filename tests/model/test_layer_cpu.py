"""A layer in one autograd node against ``run_layer`` as it is written: numbers, what it serves, what it keeps."""

from __future__ import annotations

import pytest
import torch
from csm_kernels.cpu import folded_attention
from kernel_cases import poisoned
from model_cases import MICRO, random_model
from torch import Tensor, nn

from csm_fast import ops
from csm_fast.model import layer_cpu
from csm_fast.model.layer import run_layer
from csm_fast.model.rope import rope_table
from csm_fast.model.stacks import DepthAttend, PackedAttend, run_backbone
from csm_fast.packing.pack import Segments

pytestmark = pytest.mark.usefixtures("cpu_form")

LENGTHS = [7, 1, 40, 9, 33]


def packed(dtype: torch.dtype, grad: bool = True):
    """(layer, its inputs x, cos and sin, its attention) of the micro backbone."""
    layer = random_model(MICRO, dtype).backbone.layers[0]
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    table = rope_table(layer.attn.rope, 64, ops.wide_dtype(dtype), torch.device("cpu"))
    x = torch.randn(sum(LENGTHS), 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)
    cos, sin = (t[positions].unsqueeze(-2) for t in table)
    return layer, x.requires_grad_(grad), cos, sin, PackedAttend(Segments.of(LENGTHS))


def frames(dtype: torch.dtype):
    layer = random_model(MICRO, dtype).decoder.layers[0]
    table = rope_table(layer.attn.rope, 6, ops.wide_dtype(dtype), torch.device("cpu"))
    x = torch.randn(5, 6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(dtype)
    cos, sin = (t.unsqueeze(-2) for t in table)
    return layer, x.requires_grad_(), cos, sin, DepthAttend("auto")


def results(case, written: bool, recompute: bool = False, rows: Tensor | None = None) -> dict[str, Tensor]:
    """Output and gradients by name, as written or in one node."""
    layer, x, cos, sin, attend = case
    with pytest.MonkeyPatch.context() as patch, poisoned():
        if written:
            patch.setattr(layer_cpu, "supports", lambda *_: False)
        out = run_layer(layer, 0, x, cos, sin, attend, recompute, rows)
        wanted = {name: p for name, p in layer.named_parameters() if p.requires_grad}
        wanted |= {"x": x} if x.requires_grad else {}
        generator = torch.Generator().manual_seed(3)
        grad = torch.randn(out.shape, dtype=torch.float64, generator=generator).to(out.dtype)
        grads = torch.autograd.grad(out, list(wanted.values()), grad)
    return {"out": out.detach(), **dict(zip(wanted, grads, strict=True))}


@pytest.mark.parametrize("blocks", [False, True], ids=["whole", "blocks"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("some", [False, True], ids=["all rows", "some rows"])
@pytest.mark.parametrize("make", [packed, frames])
def test_it_is_the_layer(monkeypatch, make, some, recompute, blocks):
    if blocks:
        monkeypatch.setattr(folded_attention, "WHOLE", 8)
        monkeypatch.setattr(folded_attention, "QUERY_ROWS", (1, 1))  # in steps of 32
    rows = torch.tensor([3, 0, 41, 88]) if some and make is packed else None
    case = make(torch.float64)
    assert layer_cpu.supports(case[0], case[1], case[4])
    got, want = results(case, False, recompute, rows), results(case, True, recompute, rows)
    assert got.keys() == want.keys() and len(got) == 11
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-11, atol=1e-11, msg=name)


@pytest.mark.slow
def test_gradcheck():
    layer, x, cos, sin, _ = packed(torch.float64)
    attn, mlp, rows = layer.attn, layer.mlp, torch.tensor([2, 5])
    order = PackedAttend(Segments.of([4, 3])).order(x, 4, 2)
    setup = ops.LayerSetup(16, 1e-5, 1e-5, torch.float64)
    linears = [m.weight for m in (attn.q_proj, attn.k_proj, attn.v_proj, attn.output_proj, mlp.w1, mlp.w2, mlp.w3)]
    scales = [norm.scale.detach().requires_grad_() for norm in (layer.sa_norm, layer.mlp_norm)]

    def run(x, first, second):
        weights = (first, *linears[:4], second, *linears[4:])
        return ops.llama_layer(x, cos[:7], sin[:7], order, weights, setup, rows)

    assert torch.autograd.gradcheck(run, (x.detach()[:7].requires_grad_(), *scales))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [packed, frames])
def test_errors_are_those_of_the_written_layer(make, dtype):
    case = make(dtype)
    wide = (case[0].double(), case[1].detach().double().requires_grad_(), *(t.double() for t in case[2:4]), case[4])
    truth = results(wide, True)
    case = make(dtype)
    assert layer_cpu.supports(case[0], case[1], case[4])
    got, want = results(case, False), results(case, True)
    for name, true in truth.items():
        error, same = (float((r[name].double() - true).norm() / true.norm()) for r in (got, want))
        assert error <= max(2 * same, 4 * torch.finfo(dtype).eps), (name, error, same)
        assert got[name].dtype == want[name].dtype and got[name].shape == want[name].shape


@pytest.mark.parametrize("residual", [torch.float32, torch.bfloat16])
def test_autocast_casts_what_it_would_cast(residual):
    layer, x, cos, sin, attend = packed(torch.float32)
    case = (layer, x.detach().to(residual).requires_grad_(), cos, sin, attend)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer_cpu.supports(case[0], case[1], attend)
        got, want = results(case, False), results(case, True)
    for name in want:
        assert got[name].dtype == want[name].dtype
        assert float((got[name] - want[name]).norm() / want[name].norm()) < 0.02, name


BOTH = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    "stream, weights, autocast", [*((t, t, False) for t in BOTH), *((s, w, True) for s in BOTH for w in BOTH)]
)
def test_projection(monkeypatch, stream, weights, autocast):
    """By the library where it multiplies, and then as PyTorch's: in dtype, value and gradients."""
    generator = torch.Generator().manual_seed(4)
    linear, x = nn.Linear(24, 20, bias=False).to(weights), torch.randn(5, 3, 24, generator=generator).to(stream)
    grad = torch.randn(5, 3, 20, generator=generator)
    calls = []
    monkeypatch.setattr(ops, "linear", lambda *given, run=ops.linear: calls.append(given) or run(*given))

    def results(project):
        given = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = project(given)
        return out.detach(), *torch.autograd.grad(out, (given, linear.weight), grad.to(out.dtype))

    got, want = results(lambda given: layer_cpu.project(linear, given)), results(linear)
    is_own = ops.choose("linear", "cpu", torch.bfloat16).impl == "cpu" and (autocast or stream == torch.bfloat16)
    assert len(calls) == is_own and all(t.dtype == torch.bfloat16 for given in calls for t in given)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype and g.shape == w.shape
        assert float((g.float() - w.float()).norm() / w.float().norm()) < (0.01 if is_own else 1e-6)


def test_only_what_is_asked_for():
    case = packed(torch.float64, grad=False)
    for name, parameter in case[0].named_parameters():
        parameter.requires_grad_(name in ("mlp.w3.weight", "attn.k_proj.weight"))
    got, want = results(case, False), results(case, True)
    assert got.keys() == {"out", "mlp.w3.weight", "attn.k_proj.weight"}
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-11, atol=1e-11)
    case[0].requires_grad_(False)
    assert not run_layer(case[0], 0, *case[1:]).requires_grad


def test_no_frames():
    layer, x, cos, sin, attend = frames(torch.float32)
    out = run_layer(layer, 0, x[:0], cos, sin, attend)
    out.sum().backward()
    assert out.shape == (0, 6, 32) and not layer.mlp.w1.weight.grad.any()


def test_it_serves_plain_layers_only():
    layer, x, *_, attend = packed(torch.float32)
    assert layer_cpu.supports(layer, x, attend)
    with ops.using("triton"):
        assert not layer_cpu.supports(layer, x, attend)
    assert not layer_cpu.supports(layer, x, lambda *_: None)  # a cache's attention
    assert not layer_cpu.supports(layer, x.to("meta"), attend)
    assert not layer_cpu.supports(layer, x.bfloat16(), attend)  # run_layer says what does not fit
    handle = layer.mlp.w2.register_forward_hook(lambda *_: None)
    assert not layer_cpu.supports(layer, x, attend)
    handle.remove()
    assert layer_cpu.supports(layer, x, attend)
    layer.attn.v_proj = nn.Linear(64, 32)
    assert not layer_cpu.supports(layer, x, attend)

    class Adapted(nn.Linear):
        pass

    layer.attn.v_proj = Adapted(64, 32, bias=False)
    assert not layer_cpu.supports(layer, x, attend)


def test_rows_that_nobody_wants_stop_at_the_last_layers_attention():
    """``run_backbone`` for some rows is those rows of the whole, with the same gradients."""
    csm = random_model(MICRO, torch.float64)
    _, x, *_ = packed(torch.float64)
    segments, positions = Segments.of(LENGTHS), torch.cat([torch.arange(n) for n in LENGTHS])
    rows = torch.tensor([5, 8, 40, 89])
    whole = run_backbone(csm, x, positions, segments)[rows]
    some = run_backbone(csm, x, positions, segments, rows)
    torch.testing.assert_close(some, whole, rtol=1e-12, atol=1e-12)
    parameters = [x, *csm.backbone.parameters()]
    for got, want in zip(
        torch.autograd.grad(some.square().sum(), parameters),
        torch.autograd.grad(whole.square().sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
