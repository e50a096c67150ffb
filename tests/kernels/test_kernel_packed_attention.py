"""packed_attention against attention of each segment by itself."""

from __future__ import annotations

import sys
import types
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from csm_kernels import packed_attention as module
from csm_kernels.cpu import folded_attention
from csm_kernels.packed_attention import packed_attention
from csm_kernels.segments import _plan_from_bytes, plan_segments
from kernel_cases import assert_within_budget, poisoned

LAYOUTS = {
    "one": (5,),
    "one row": (1,),
    "equal": (3, 3, 3),
    "ragged": (1, 40, 7, 8, 1, 2, 100),
    "with empty ones": (0, 4, 0, 9, 0, 0),
    "long and short": (250, 3, 200, 9),
}
HEADS = [(4, 4), (6, 2), (3, 1)]


def cumulative(lengths):
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def case(lengths, heads=(6, 2), width=8, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = sum(lengths)
    q, k, v, grad = (
        torch.randn(rows, h, width, generator=generator, dtype=torch.float64).to(dtype)
        for h in (*heads, heads[1], heads[0])
    )
    return [x.requires_grad_() for x in (q, k, v)], grad


def naive(q, k, v, lengths):
    out = []
    for qs, ks, vs in zip(*(x.split(list(lengths)) for x in (q, k, v)), strict=True):
        ks, vs = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (ks, vs))
        scores = torch.einsum("ihd,jhd->hij", qs, ks) / q.shape[-1] ** 0.5
        later = torch.ones(len(qs), len(qs), dtype=torch.bool).triu(1)
        out.append(torch.einsum("hij,jhd->ihd", scores.masked_fill(later, -torch.inf).softmax(-1), vs))
    return torch.cat(out)


def per_segment_sdpa(q, k, v, lengths):
    """What a user would write."""
    out = []
    for parts in zip(*(x.split(list(lengths)) for x in (q, k, v)), strict=True):
        qs, ks, vs = (x.transpose(0, 1).unsqueeze(0) for x in parts)
        out.append(F.scaled_dot_product_attention(qs, ks, vs, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(out)


def implementation(monkeypatch, form: str) -> str:
    """``impl`` of a form; "formula": as on a device that has no variable-length kernels."""
    if form == "blocks":
        monkeypatch.setattr(folded_attention, "WHOLE", 0)
        monkeypatch.setattr(folded_attention, "QUERY_ROWS", (1, 1))  # in steps of 32
    return "reference" if form == "formula" else "auto"


@pytest.mark.parametrize("form", ["folded", "blocks", "formula"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("lengths", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_output_and_gradients(monkeypatch, lengths, heads, form):
    impl = implementation(monkeypatch, form)
    inputs, grad = case(lengths, heads)
    with poisoned():
        out = packed_attention(*inputs, cumulative(lengths), max(lengths), impl)
        got = torch.autograd.grad(out, inputs, grad)
    want = naive(*inputs, lengths)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    for g, w in zip(got, torch.autograd.grad(want, inputs, grad), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["folded", "blocks", "formula"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", [LAYOUTS["ragged"], LAYOUTS["long and short"]])
def test_errors_are_those_of_pytorch_in_the_same_dtype(monkeypatch, lengths, dtype, form):
    impl = implementation(monkeypatch, form)
    inputs, grad = case(lengths, width=16, dtype=dtype)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    out, truth, same = (
        packed_attention(*inputs, cumulative(lengths), max(lengths), impl),
        naive(*wide, lengths),
        per_segment_sdpa(*inputs, lengths),
    )
    assert out.dtype == dtype
    assert_within_budget("out", out, truth, same)
    grads = (torch.autograd.grad(o, i, grad.to(o.dtype)) for o, i in ((out, inputs), (truth, wide), (same, inputs)))
    for name, *three in zip("qkv", *grads, strict=True):
        assert three[0].dtype == dtype
        assert_within_budget(f"grad {name}", *three)


@pytest.mark.parametrize("form", ["folded", "blocks", "formula"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(monkeypatch, dtype, form):
    """What is widened inside stays wide, in the forward pass, which runs under autocast, as in the backward pass."""
    impl = implementation(monkeypatch, form)
    lengths = LAYOUTS["ragged"]
    inputs, grad = case(lengths, width=16, dtype=dtype)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = packed_attention(*inputs, cumulative(lengths), max(lengths), impl)
        results.append([out, *torch.autograd.grad(out, inputs, grad)])
    assert all(map(torch.equal, *results))


def test_scores_in_pieces(monkeypatch):
    """Of groups whose scores would take too much memory at once."""
    lengths = (30, 28, 29, 30, 4, 27)
    inputs, grad = case(lengths)
    want = packed_attention(*inputs, cumulative(lengths), 30, "reference")
    monkeypatch.setattr(module, "GROUP_SCORES", 2 * 6 * 30 * 30)
    sizes = []
    form = module.attention_reference
    monkeypatch.setattr(module, "attention_reference", lambda q, *kv: sizes.append(len(q)) or form(q, *kv))
    got = packed_attention(*inputs, cumulative(lengths), 30, "reference")
    assert sizes == [1, 2, 2, 1]
    sizes.clear()
    monkeypatch.setattr(module, "GROUP_SCORES", 2 * 30 * 30)  # a key-value head of a segment at a time
    by_head = packed_attention(*inputs, cumulative(lengths), 30, "reference")
    assert sizes == [1] + [1] * 5 * inputs[1].shape[1]
    torch.testing.assert_close(by_head, want, rtol=1e-12, atol=1e-12)
    both = (torch.autograd.grad(out, inputs, grad, retain_graph=True) for out in (by_head, want))
    for g, w in zip(*both, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)
    monkeypatch.setattr(module, "GROUP_SCORES", 2 * 6 * 30 * 30)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    grads = (torch.autograd.grad(out, inputs, grad, retain_graph=True) for out in (got, want))
    for g, w in zip(*grads, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wanted", ["q", "k", "v", "none"])
def test_one_gradient_at_a_time(wanted):
    lengths = (5, 2, 30)
    inputs, grad = case(lengths)
    want = dict(zip("qkv", torch.autograd.grad(naive(*inputs, lengths), inputs, grad), strict=True))
    for name, x in zip("qkv", inputs, strict=True):
        x.requires_grad_(name == wanted)
    out = packed_attention(*inputs, cumulative(lengths), 30)
    assert out.requires_grad == (wanted != "none")
    if wanted != "none":
        out.backward(grad)
        torch.testing.assert_close(inputs["qkv".index(wanted)].grad, want[wanted], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lengths", [(6,), (4, 9, 2)])
def test_any_strides(lengths):
    inputs, grad = case(lengths)
    odd = [x.detach().transpose(0, 2).contiguous().transpose(0, 2).requires_grad_() for x in inputs]
    cu = cumulative(lengths)
    torch.testing.assert_close(packed_attention(*odd, cu, 9), packed_attention(*inputs, cu, 9))
    got, want = (torch.autograd.grad(packed_attention(*x, cu, 9).sum(), x) for x in (odd, inputs))
    torch.testing.assert_close(got, want)


def test_gradcheck():
    inputs, _ = case((3, 1, 4), heads=(2, 1), width=4)
    cu = cumulative((3, 1, 4))
    assert torch.autograd.gradcheck(lambda q, k, v: packed_attention(q, k, v, cu, 4), inputs)
    grouped = [x.detach()[:6].view(2, 3, -1, 4).transpose(1, 2).requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(module.attention_reference, grouped)  # the log-sum-exp too
    out, lse = module.attention_reference(*grouped)
    grad = torch.randn_like(out)
    want = torch.autograd.grad(out, grouped, grad)
    got = module.attention_backward_reference(grad, *(x.detach() for x in (*grouped, out, lse)))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [(6,), (4, 9, 2)])
def test_opcheck(lengths, dtype):
    inputs, _ = case(lengths, dtype=dtype)
    cu = cumulative(lengths)
    tolerance = {"atol": 1e-2, "rtol": 1e-2} if dtype == torch.bfloat16 else {}
    torch.library.opcheck(torch.ops.csm_kernels.packed_attention.default, (*inputs, cu, True), **tolerance)
    q, k, v = (x.detach() for x in inputs)
    out, lse = torch.ops.csm_kernels.packed_attention(q, k, v, cu, True)
    args = (torch.randn_like(q), q, k, v, cu, out, lse, True)
    torch.library.opcheck(torch.ops.csm_kernels.packed_attention_backward.default, args, **tolerance)


def test_a_plan_is_made_once_and_serves_training_after_inference():
    lengths = (5, 3, 17, 16, 1)
    inputs, grad = case(lengths)
    _plan_from_bytes.cache_clear()
    with torch.inference_mode():
        packed_attention(*inputs, cumulative(lengths), 17)
    packed_attention(*inputs, cumulative(lengths), 17).backward(grad)
    assert _plan_from_bytes.cache_info().misses == 1 and _plan_from_bytes.cache_info().hits == 2
    made = plan_segments([0, *accumulate(lengths)])
    assert made is plan_segments(cumulative(lengths))
    groups = made.groups
    assert groups is made.groups and sorted(groups.index[groups.restore].tolist()) == list(range(sum(lengths)))
    assert sum(segments for segments, _ in groups.shapes) == len(lengths)
    padded = sum(segments * width for segments, width in groups.shapes)
    assert groups.padding.numel() + sum(lengths) == groups.index.numel() == padded


@pytest.mark.parametrize("cu", [[1, 4], [0], [0, 0], [0, 3, 2, 4], []])
def test_what_is_no_layout_is_refused(cu):
    with pytest.raises(ValueError, match="rise from 0"):
        plan_segments(cu)


def test_a_layout_of_another_pack_is_refused():
    inputs, _ = case((4, 3))
    with pytest.raises(ValueError, match="ends at 9, but there are 7 rows"):
        packed_attention(*inputs, cumulative((4, 5)), 5)


# The variable-length kernels need a GPU; what can be seen without one is which is chosen and how it is called.


def stub(monkeypatch, name, **functions):
    stubbed = types.ModuleType(name)
    stubbed.__spec__ = types.SimpleNamespace(name=name)
    vars(stubbed).update(functions)
    monkeypatch.setitem(sys.modules, name, stubbed)


def reference(q, k, v, cu):
    return torch.ops.csm_kernels.packed_attention(q, k, v, cu, True)[0]


@pytest.mark.parametrize("library", ["flash-attn", "torch", "torch 2.11"])
@pytest.mark.parametrize("compiled", [False, True])
def test_libraries_are_called_as_they_want(monkeypatch, library, compiled):
    calls = []

    def flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, dropout_p=0.0, softmax_scale=None, causal=False):
        assert causal and cu_q is cu_k
        return reference(q, k, v, cu_q)

    def of_2_13(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False):
        assert window_size == (-1, 0) and enable_gqa
        return reference(q, k, v, cu_q)

    def of_2_11(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size=(-1, -1)):
        assert window_size == (-1, 0) and q.shape[1] > k.shape[1]
        return reference(q, k, v, cu_q)

    monkeypatch.setitem(sys.modules, "flash_attn", None)
    if library == "flash-attn":
        stub(monkeypatch, "flash_attn", flash_attn_varlen_func=flash_attn_varlen_func)
    stub(monkeypatch, "torch.nn.attention.varlen", varlen_attn=of_2_13 if library == "torch" else of_2_11)
    monkeypatch.setattr(module, "_varlen_library", module._varlen_library.__wrapped__)
    library = library.split()[0]
    assert module.varlen_backend("cuda", torch.bfloat16) == library
    assert module.varlen_backend("cuda", torch.float32) == module.varlen_backend("cpu", torch.bfloat16) == ""

    @torch.compiler.assume_constant_result
    def as_on_cuda(device_type, dtype):
        calls.append(device_type)
        return library

    monkeypatch.setattr(module, "varlen_backend", as_on_cuda)
    lengths = (5, 2, 9)
    inputs, grad = case(lengths, dtype=torch.float32)
    torch._dynamo.reset()
    function = torch.compile(packed_attention, fullgraph=True, backend="aot_eager") if compiled else packed_attention
    out = function(*inputs, cumulative(lengths), 9)
    want = naive(*inputs, lengths)
    torch.testing.assert_close(out, want)
    got, wanted = (torch.autograd.grad(o, inputs, grad) for o in (out, want))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert calls == ["cpu"]
