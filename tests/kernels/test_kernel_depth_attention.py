"""depth_attention against rotation plus PyTorch's attention: the PyTorch form, and the kernels in the interpreter."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from csm_kernels import depth_attention as module
from csm_kernels.depth_attention import depth_attention
from kernel_cases import aot, assert_within_budget, interpreted, poisoned

from csm_fast.model.rope import RopeSpec, apply_rope, rope_table

NAMES = ("q", "k", "v")
SPEC = RopeSpec(128, 500_000.0, 32.0, 1.0, 4.0, 8192)


def table(length: int, width: int, dtype=torch.float32):
    return rope_table(RopeSpec(width, 100.0), length, dtype, torch.device("cpu"))


def case(frames=2, length=7, heads=4, kv_heads=2, width=32, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(n):
        return torch.randn(frames, length, n, width, generator=generator, dtype=torch.float64).to(dtype)

    q, k, v = (draw(n).requires_grad_() for n in (heads, kv_heads, kv_heads))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (q, k, v, *table(length, width, wide)), draw(heads)


def run(inputs, grad, impl="torch", wanted=NAMES, op=depth_attention):
    """Output and gradients by name."""
    out = op(*inputs, impl=impl)
    sources = [x for name, x in zip(NAMES, inputs, strict=False) if name in wanted]
    return {"out": out.detach()} | dict(zip(wanted, torch.autograd.grad(out, sources, grad), strict=True))


def kernels(inputs, grad, wanted=NAMES):
    with interpreted() as launches, poisoned():
        got = run(inputs, grad, "triton", wanted)
    assert launches == {"_forward_kernel": 1, "_backward_kernel": 1}
    return got


def wide(inputs):
    return tuple(x.detach().double().requires_grad_(x.requires_grad) for x in inputs)


def assert_budgets(got, inputs, grad):
    truth, theirs = run(wide(inputs), grad.double()), run(inputs, grad)
    for name, value in got.items():
        if inputs[0].shape[1] == 1 and name in "qk":  # one key: its probability is 1 whatever the score
            assert not value.count_nonzero(), name
        else:
            assert_within_budget(name, value, truth[name], theirs[name])


# --- the PyTorch form ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_torch_form_is_rotation_and_attention(dtype):
    """The model's rotation, then PyTorch's attention; on a CPU ``short_attention``, which adds up in another order."""
    (q, k, v, *_), grad = case(3, 32, 8, 2, 128, dtype)
    cos, sin = rope_table(SPEC, 32, torch.float64 if dtype == torch.float64 else torch.float32, q.device)

    def sdpa(q, k, v, cos, sin, **_):
        rotated = [apply_rope(x, cos.unsqueeze(1), sin.unsqueeze(1)) for x in (q, k)]
        heads_first = [x.transpose(1, 2) for x in (*rotated, v)]
        return F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True).transpose(1, 2)

    inputs = (q, k, v, cos, sin)
    ours, theirs, truth = run(inputs, grad), run(inputs, grad, op=sdpa), run(wide(inputs), grad.double(), op=sdpa)
    for name, value in ours.items():
        if dtype == torch.float64:
            torch.testing.assert_close(value, truth[name], rtol=1e-12, atol=1e-12)
        else:
            assert_within_budget(name, value, truth[name], theirs[name])


@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (2, 2)])
def test_gradcheck(heads, kv_heads):
    inputs, _ = case(2, 3, heads, kv_heads, 4, torch.float64)
    assert torch.autograd.gradcheck(depth_attention, inputs)


# --- the kernels --------------------------------------------------------------------------------------------------

HEADS = [(8, 2), (4, 4), (2, 1), (6, 2)]
LENGTHS = [1, 7, 32, 33, 64]
# Every length with every width; the head counts take turns.
SHAPES = [(length, width, *HEADS[(i + j) % 4]) for j, width in enumerate((64, 128)) for i, length in enumerate(LENGTHS)]
SHAPES += [(7, 32, *heads) for heads in HEADS] + [(32, 128, 8, 2)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("length, width, heads, kv_heads", SHAPES)
def test_kernels(length, width, heads, kv_heads, dtype):
    inputs, grad = case(1 if length > 32 else 3, length, heads, kv_heads, width, dtype)
    assert_budgets(kernels(inputs, grad), inputs, grad)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_no_frames(impl):
    inputs, grad = case(frames=0)
    with interpreted() as launches:
        got = run(inputs, grad, impl)
    assert not launches
    assert [got[name].shape for name in NAMES] == [x.shape for x in inputs[:3]] and got["out"].shape == grad.shape


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [("q",), ("k",), ("v",), ("q", "v")], ids="".join)
def test_only_the_gradients_that_are_wanted(wanted):
    inputs, grad = case()
    everything = kernels(inputs, grad)
    for name, x in zip(NAMES, inputs, strict=False):
        x.requires_grad_(name in wanted)
    got = kernels(inputs, grad, wanted)
    for name in wanted:
        assert torch.equal(got[name], everything[name]), name
    with interpreted():
        made = module._gradients(grad, *(x.detach() for x in inputs), *(name in wanted for name in NAMES))
    assert [x.numel() > 0 for x in made] == [name in wanted for name in NAMES]


def test_no_backward_work_without_gradients():
    inputs, _ = case()
    with interpreted() as launches, torch.no_grad():
        out = depth_attention(*inputs, impl="triton")
    assert launches == {"_forward_kernel": 1} and not out.requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("order", ["position, head", "head, position", "columns apart"])
def test_strided_inputs(order):
    """Views of one fused projection, of another memory order, and columns that have to be copied."""
    frames, length, heads, kv_heads, width = 2, 7, 4, 2, 32
    (q, k, v, cos, sin), grad = case(frames, length, heads, kv_heads, width)
    dims = {"position, head": (0, 1, 2, 3), "head, position": (0, 2, 1, 3), "columns apart": (3, 2, 1, 0)}[order]
    back = [dims.index(i) for i in range(4)]
    fused = torch.cat((q, k, v), 2).detach().permute(dims).contiguous().requires_grad_()
    views = fused.permute(back).split([heads, kv_heads, kv_heads], 2)
    assert not any(x.is_contiguous() for x in views)
    strided_grad = grad.permute(dims).contiguous().permute(back)
    with interpreted() as launches, poisoned():
        out = depth_attention(*views, cos, sin, impl="triton")
        (got,) = torch.autograd.grad(out, fused, strided_grad)
    assert launches == {"_forward_kernel": 1, "_backward_kernel": 1}
    want = kernels((q, k, v, cos, sin), grad)
    assert out.is_contiguous() and torch.equal(out, want["out"])
    assert torch.equal(got.permute(back), torch.cat([want[name] for name in NAMES], 2))


def test_gradient_without_memory_of_its_own():
    inputs, _ = case()
    with interpreted():
        got = torch.autograd.grad(depth_attention(*inputs, impl="triton").sum(), inputs[:3])
    want = run(inputs, torch.ones_like(inputs[0]))
    for name, g in zip(NAMES, got, strict=True):
        torch.testing.assert_close(g, want[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("axis", [0, 1, 2], ids=["frames", "positions", "heads"])
def test_addresses_beyond_2_to_the_31(axis):
    """Index 4 of an axis lies 2**31 elements in, though no stride is that large. Only touched pages are real memory."""
    inputs, grad = case(5, 5, 5, 5, dtype=torch.float16)
    tensors = [x.detach() for x in (grad, *inputs)]
    try:
        memory = torch.empty(2**31 + grad.numel(), dtype=torch.float16)
    except RuntimeError:
        pytest.skip("no 4 GiB of address space")
    stride = list(grad.stride())
    stride[axis] = 2**29
    far = memory.as_strided(grad.shape, stride)
    with interpreted():
        out = module._depth_attention(*tensors[1:])
        grads = module._gradients(*tensors, True, True, True)
        for i in range(4):  # one tensor at a time lies there
            far.copy_(tensors[i])
            moved = [far if j == i else x for j, x in enumerate(tensors)]
            assert torch.equal(module._depth_attention(*moved[1:]), out)
            for got, want in zip(module._gradients(*moved, True, True, True), grads, strict=True):
                assert torch.equal(got, want)


@pytest.mark.parametrize("length, border", [(32, 17), (33, 32), (7, 1)])
def test_the_future_does_not_leak(length, border):
    """Later keys and values do not change an output, later outputs' gradients not an earlier query's, bit for bit."""
    inputs, grad = case(length=length)
    before = kernels(inputs, grad)
    other, other_grad = case(length=length, seed=1)
    with torch.no_grad():
        for x, y in zip(inputs[:3], other[:3], strict=True):
            x[:, border:] = y[:, border:] * 100
        grad[:, border:] = other_grad[:, border:] * 100
    after = kernels(inputs, grad)
    for name in ("out", "q"):
        assert torch.equal(before[name][:, :border], after[name][:, :border]), name
        assert not torch.equal(before[name][:, border:], after[name][:, border:]), name
    # The last output is all that the last key and value take part in.
    with torch.no_grad():
        grad[:, -1] = 0
    last = kernels(inputs, grad)
    assert not last["k"][:, -1].count_nonzero() and not last["v"][:, -1].count_nonzero()


def test_other_frames_and_kv_heads_do_not_leak():
    inputs, grad = case(frames=3, heads=6, kv_heads=2)
    before = kernels(inputs, grad)
    with torch.no_grad():
        for x, last in zip((*inputs[:3], grad), (3, 1, 1, 3), strict=True):
            x[1], x[:, :, last:] = 7, 9  # frame 1, and the second KV head's group
    after = kernels(inputs, grad)
    for name, last in {"out": 3, "q": 3, "k": 1, "v": 1}.items():
        assert torch.equal(before[name][::2, :, :last], after[name][::2, :, :last]), name


def test_the_rotation_is_folded_in():
    inputs, grad = case(length=32, width=64)
    q, k, v, cos, sin = inputs
    turned = kernels(inputs, grad)
    straight = kernels((q, k, v, torch.ones_like(cos), torch.zeros_like(sin)), grad)
    plain = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(straight["out"], plain.detach(), rtol=1e-5, atol=1e-6)
    for name in ("out", "q", "k"):
        assert (turned[name] - straight[name]).norm() > 0.1 * straight[name].norm(), name
    # Only differences of positions count: the same angle more at every position changes nothing but rounding.
    more = torch.atan2(sin, cos) + 0.3
    shifted = kernels((q, k, v, more.cos(), more.sin()), grad)
    torch.testing.assert_close(shifted, turned, rtol=1e-3, atol=1e-4)


def test_large_scores_do_not_overflow():
    inputs, grad = case(dtype=torch.float16)
    with torch.no_grad():
        inputs[0].mul_(200)
        inputs[1].mul_(200)
    got = kernels(inputs, grad)
    assert all(torch.isfinite(x).all() for x in got.values())


# --- the operator -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [NAMES, ("v",)], ids="".join)
def test_opcheck(wanted):
    inputs, grad = case(length=3)
    for name, x in zip(NAMES, inputs, strict=False):
        x.requires_grad_(name in wanted)
    with interpreted():
        torch.library.opcheck(module._depth_attention, inputs)
        torch.library.opcheck(
            module._gradients, (grad, *(x.detach() for x in inputs), *(name in wanted for name in NAMES))
        )


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_compiles_in_one_graph(impl):
    inputs, grad = case(length=3)
    compiled = torch.compile(lambda *xs: depth_attention(*xs, impl=impl) * 2, backend="aot_eager", fullgraph=True)
    with interpreted() as launches:
        want = run(inputs, 2 * grad, impl)
        out = compiled(*inputs)
        got = torch.autograd.grad(out, inputs[:3], grad)
    assert launches["_backward_kernel"] == (2 if impl == "triton" else 0)
    torch.testing.assert_close(out, 2 * want["out"], rtol=1e-6, atol=1e-6)
    for name, g in zip(NAMES, got, strict=True):
        torch.testing.assert_close(g, want[name], rtol=1e-5, atol=1e-6, msg=name)


def test_loads_are_16_bytes_wide():
    """In real launches pointers and strides are divisible by 16, and the loads of tiles should show it."""
    pytest.importorskip("triton")
    from aot_registry.depth_attention import cases

    for case in cases("bf16", 90):
        ptx = aot(case.kernel, case.signature, case.constexprs, 90, num_warps=case.num_warps, aligned=case.aligned).asm[
            "ptx"
        ]
        loads = re.findall(r"ld\.global\S*", ptx)
        copies = re.findall(r"cp\.async\.c[ag]\S*\s+\[[^\]]*\],\s*\[[^\]]*\],\s*(0x[0-9a-f]+)", ptx)
        assert loads and all(".v4." in load for load in loads), (case.name, sorted(set(loads)))
        assert copies and set(copies) == {"0x10"}, (case.name, sorted(set(copies)))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"impl": "cuda"}, "impl must be one of auto, triton, torch"),
        ({"k": torch.zeros(2, 7, 3, 32)}, "do not fit"),
        ({"k": torch.zeros(2, 7, 3, 32), "v": torch.zeros(2, 7, 3, 32)}, "do not fit"),
        ({"v": torch.zeros(2, 6, 2, 32)}, "do not fit"),
        ({"v": torch.zeros(2, 7, 2, 32, dtype=torch.float16)}, "torch.float16"),
        ({"cos": torch.zeros(7, 32)}, "the table is"),
        ({"sin": torch.zeros(7, 16, dtype=torch.float64)}, "the table torch.float32, torch.float64"),
    ],
)
def test_refusals(change, message):
    inputs, _ = case()
    arguments = dict(zip((*NAMES, "cos", "sin"), inputs, strict=True)) | change
    with pytest.raises(ValueError, match=message):
        depth_attention(**arguments)


def test_refusals_of_the_kernels():
    pytest.importorskip("triton")
    inputs, _ = case()
    with pytest.raises(ValueError, match="needs CUDA tensors, or Triton's interpreter"):
        depth_attention(*inputs, impl="triton")
    with interpreted():
        for wrong, message in [
            (case(dtype=torch.float64), "bfloat16, float16 and float32"),
            (case(length=65), "at most 64 positions"),
            (case(width=16), "heads of"),
        ]:
            with pytest.raises(ValueError, match=message):
                depth_attention(*wrong[0], impl="triton")
            assert depth_attention(*wrong[0], impl="torch").shape == wrong[0][0].shape


@pytest.mark.slow
def test_without_triton():
    program = """
import sys
sys.modules["triton"] = None
import torch
from csm_kernels.depth_attention import depth_attention
x, t = torch.randn(1, 2, 2, 32), torch.ones(2, 16)
depth_attention(x, x, x, t, t)
try:
    depth_attention(x, x, x, t, t, impl="triton")
except ImportError as error:
    assert "needs the package triton" in str(error)
else:
    raise SystemExit("no ImportError")
"""
    subprocess.run([sys.executable, "-c", program], check=True, env={"PYTHONPATH": ":".join(sys.path)})
