"""The library's products of bf16 on a CPU (linear layers, attention, heads) against float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from csm_kernels import linear_cross_entropy
from csm_kernels.constants import LOGITS_BUDGET
from csm_kernels.cpu import attention as cpu_attention
from csm_kernels.cpu import folded_attention, native
from csm_kernels.cpu import heads as cpu_heads
from csm_kernels.cpu import linear as cpu_linear
from csm_kernels.cpu.attention import Order
from csm_kernels.segments import plan_segments
from kernel_cases import poisoned
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
SERVED = native.function("product", BF16) is not None
needs_products = pytest.mark.skipif(not SERVED, reason=f"the library has no products: {native.describe_library()}")


@pytest.fixture(autouse=True)
def form(cpu_form):
    with poisoned():
        yield cpu_form


@pytest.fixture(params=[1, 2, 5])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def random(*shape: int, dtype: torch.dtype = BF16, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=FP64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def distance(got: Tensor, want: Tensor) -> float:
    assert got.isfinite().all()
    return float((got.double() - want).norm() / want.norm().clamp(min=1e-30))


# --- linear layers ----------------------------------------------------------------------------------------------------


# Of the last four the inner dimension is more than is multiplied at once, of (230, ...) the rows are, too; of the last
# it comes in parts.
DEEP = [(20, 1100, 70), (9, 513, 200), (230, 1029, 200), (131, 4109, 75)]
PRODUCTS = [(1, 2, 1), (5, 16, 64), (7, 33, 17), (64, 130, 65), (211, 100, 131), *DEEP]


@pytest.mark.slow
@pytest.mark.parametrize("rows, inner, columns", PRODUCTS)
@pytest.mark.parametrize("turned", [(False, False), (True, False), (False, True), (True, True)], ids=str)
def test_product(rows, inner, columns, turned, threads):
    a = random(inner, rows).t() if turned[0] else random(rows, inner)
    b = random(columns, inner, seed=1).t() if turned[1] else random(inner, columns, seed=1)
    plus, truth = random(rows, columns, seed=2), a.double() @ b.double()
    assert distance(cpu_linear.product(a, b), truth) < 4e-3
    kept = plus.clone()
    assert distance(cpu_linear.product(a, b, plus), truth + plus.double()) < 4e-3
    assert torch.equal(plus, kept)
    # The residual stream of a model under autocast is float32; the product is the same.
    wide = cpu_linear.product(a, b, plus.float())
    assert wide.dtype == FP32 and distance(wide, truth + plus.double()) < 4e-3
    assert torch.equal(wide, plus.float() + cpu_linear.product(a, b))


def test_products_of_views():
    x = random(40, 96)
    a, b = x[:, 16:48], random(64, 32, seed=1).t()[:, 10:50]
    for left, right in ((a, b), (x[::2, :32], b), (x[:, ::3], b), (x[:1].expand(9, 96)[:, :32], b)):
        assert distance(cpu_linear.product(left, right), left.double() @ right.double()) < 4e-3
    assert cpu_linear.product(x[:0], x.t()).shape == (0, 40)
    assert not cpu_linear.product(x[:, :0], x[:, :0].t()).any()
    with pytest.raises(RuntimeError):
        cpu_linear.product(x, x)


def test_what_lies_beside_a_matrix_is_not_read(form):
    if form == "PyTorch" and native._may_use_tiles():
        pytest.skip("oneDNN reads it on processors with tiles (AMX) where the inner dimension is no multiple of 32")
    around = torch.full((50, 90), math.nan, dtype=BF16)
    for shape in ((20, 32), (19, 33)):
        a = around[1 : 1 + shape[0], 1 : 1 + shape[1]]
        a.copy_(random(*shape))
        for left, right in ((a, random(shape[1], 30)), (a.t(), random(shape[0], 30)), (random(30, shape[0]), a)):
            assert distance(cpu_linear.product(left, right), left.double() @ right.double()) < 4e-3
        around.fill_(math.nan)


def test_what_is_not_finite_goes_on():
    a, b = random(8, 32), random(32, 20, seed=1)
    a[3, 5] = math.nan
    out = cpu_linear.product(a, b)
    assert out[3].isnan().all() and out[[0, 1, 2, 4, 5, 6, 7]].isfinite().all()


@pytest.mark.parametrize("shape", [(5, 32), (2, 3, 33), (0, 4, 32)], ids=str)
def test_linear(shape):
    x, weight = random(*shape).requires_grad_(), random(20, shape[-1], seed=1).requires_grad_()
    grad = random(*shape[:-1], 20, seed=2)
    out = cpu_linear.linear(x, weight)
    got = torch.autograd.grad(out, (x, weight), grad)
    wide = tuple(t.detach().double().requires_grad_() for t in (x, weight))
    truth = F.linear(*wide)
    assert out.shape == truth.shape and distance(out.detach(), truth.detach()) < 4e-3
    for g, t in zip(got, torch.autograd.grad(truth, wide, grad.double()), strict=True):
        assert distance(g, t) < 4e-3
    (only,) = torch.autograd.grad(cpu_linear.linear(x.detach(), weight), weight, grad)
    assert torch.equal(only, got[1])


@pytest.mark.parametrize("dtype", [FP32, FP64, torch.float16])
def test_other_types_are_pytorchs(dtype):
    a, b = random(5, 6, dtype=dtype), random(6, 7, dtype=dtype, seed=1)
    torch.testing.assert_close(cpu_linear.product(a, b), torch.mm(a, b), rtol=0, atol=0)


# --- attention --------------------------------------------------------------------------------------------------------

LENGTHS = [[1], [2, 31, 1, 16], [33, 7], [150, 40], [300], [530]]


def attention_case(lengths: list[int], heads: int, kv_heads: int, width: int, frames: bool):
    total = sum(lengths)
    q, k, v, grad = (random(total, h * width, seed=i) for i, h in enumerate((heads, kv_heads, kv_heads, heads)))
    angles = random(min(lengths) if frames else total, 1, width // 2, dtype=FP32, seed=9) * 3
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    return (q, k, v, grad, angles.cos(), angles.sin()), plan_segments(cu.int()).order(heads, kv_heads)


def run_attention(case, order: Order, width: int, rotated: bool = True, rows: Tensor | None = None):
    q, k, v, grad, *angles = case
    cos, sin = angles if rotated else (None, None)
    kept, out = cpu_attention.forward(q.clone(), k.clone(), v.clone(), cos, sin, order, width)
    grad, some = (grad, out) if rows is None else (grad[rows], out[rows])
    return out, *cpu_attention.backward(grad, some, rows, kept, cos, sin, order, width)


@pytest.mark.slow
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("heads, kv_heads, width", [(4, 2, 16), (3, 1, 64), (2, 2, 24)])
@pytest.mark.parametrize("rotated", [True, False])
def test_attention(lengths, heads, kv_heads, width, rotated, threads):
    case, order = attention_case(lengths, heads, kv_heads, width, False)
    got = run_attention(case, order, width, rotated)
    wide = tuple(x.double() for x in case)
    for name, g, truth in zip("oqkv", got, run_attention(wide, order, width, rotated), strict=True):
        # A segment of one row has no gradient but v's.
        assert g.dtype == BF16 and (distance(g, truth) < 8e-3 or float((g.double() - truth).norm()) < 1e-2), name


def test_frames_share_their_angles():
    case, order = attention_case([6] * 5, 2, 1, 16, True)
    got = run_attention(case, order, 16)
    wide = tuple(x.double() for x in case)
    for g, truth in zip(got, run_attention(wide, order, 16), strict=True):
        assert distance(g, truth) < 8e-3


def test_rows_without_a_gradient():
    case, order = attention_case([40, 9, 70], 4, 2, 16, False)
    rows = torch.tensor([118, 3, 0, 44, 90])
    got = run_attention(case, order, 16, rows=rows)
    wide = tuple(x.double() for x in case)
    for g, truth in zip(got, run_attention(wide, order, 16, rows=rows), strict=True):
        assert distance(g, truth) < 8e-3
    assert not got[1][4:40].any()  # a query without a gradient has none


def test_attention_of_nothing_finite_stays_in_its_segment():
    case, order = attention_case([20, 30], 2, 1, 16, False)
    case[1][25] = math.nan
    out, *gradients = run_attention(case, order, 16)
    assert out[25:].isnan().any() and all(x[:20].isfinite().all() for x in (out, *gradients))


def test_empty_segments_and_segments_of_a_uniform_order():
    case, _ = attention_case([6, 6], 2, 1, 16, False)
    empty = Order(torch.tensor([0, 0, 6, 6, 12, 12]), 6, 2, 1, lambda: folded_attention.uniform(2, 6, 2, 1))
    same = cpu_attention.uniform_order(2, 6, 2, 1)
    for a, b in zip(run_attention(case, empty, 16), run_attention(case, same, 16), strict=True):
        assert torch.equal(a, b)


def test_segments_of_other_rows():
    case, _ = attention_case([6, 6], 2, 1, 16, False)
    for segments in (1, 3):
        with pytest.raises(ValueError, match=f"end at {6 * segments}, but there are 12 rows"):
            run_attention(case, cpu_attention.uniform_order(segments, 6, 2, 1), 16)


def test_no_segments():
    case, _ = attention_case([3], 2, 1, 16, False)
    nothing = cpu_attention.uniform_order(0, 6, 2, 1)
    for x in run_attention((*(x[:0] for x in case[:4]), *case[4:]), nothing, 16):
        assert x.shape[0] == 0


@needs_products
def test_the_second_half_is_of_the_form_of_the_first():
    case, order = attention_case([20, 30], 2, 1, 16, False)
    q, k, v, grad, cos, sin = case
    kept, out = cpu_attention.forward(q.clone(), k.clone(), v.clone(), cos, sin, order, 16)
    want = cpu_attention.backward(grad, out, None, kept, cos, sin, order, 16)
    with native.left_out():
        got = cpu_attention.backward(grad, out, None, kept, cos, sin, order, 16)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# --- heads ------------------------------------------------------------------------------------------------------------


def heads_case(rows: int, heads: int, width: int, vocab: int):
    hidden = random(rows, heads + 1, width)[:, 1:]  # as the decoder's states come: without position 0
    weight = (random(heads, width, vocab, seed=1) * width**-0.5).to(BF16)
    targets = torch.arange(rows * heads).view(rows, heads) * 7 % vocab
    return hidden, weight, targets, random(rows, 1, dtype=FP32, seed=2).abs()


def run_heads(hidden, weight, targets, weights, wants=(True, True), budget=LOGITS_BUDGET):
    return linear_cross_entropy._losses_and_gradients(hidden, weight, targets, weights, 0.5, budget, *wants, "cpu")


HEADS = [(1, 5, 16, 21), (7, 5, 32, 300), (40, 6, 64, 515), (13, 5, 48, 16), (3, 5, 528, 1100)]


@pytest.mark.slow
@pytest.mark.parametrize("rows, heads, width, vocab", HEADS)
def test_heads(rows, heads, width, vocab, threads, form):
    case = heads_case(rows, heads, width, vocab)
    assert cpu_heads.supports_heads(*case[:2], 2**26) == (SERVED and form == "library")
    got = run_heads(*case)
    truth = run_heads(*(x.double() if x.is_floating_point() else x for x in case))
    for g, want, bound in zip(got, truth, (1e-3, 3e-3, 6e-3, 6e-3), strict=True):
        assert g.shape == want.shape and distance(g, want) < bound
    assert got[3].stride() == case[1].stride()


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("budget", [2**26, 9 * 37 * 2 * 2, 4 * 37 * 2])
def test_heads_as_products(heads, transposed, budget, monkeypatch):
    """One head, as codebook 0's, whose weight comes transposed; and more logits than the budget: pieces of heads or of
    rows, products of matrices of an odd width."""
    hidden, weight, targets, weights = heads_case(9, heads, 32, 37)
    if transposed:
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    monkeypatch.setattr(cpu_heads, "supports_heads", lambda *_: False)
    got = run_heads(hidden, weight, targets, weights, budget=budget)
    wide = (hidden.double(), weight.double(), targets, weights.double())
    for g, want, bound in zip(got, run_heads(*wide), (1e-3, 3e-3, 6e-3, 6e-3), strict=True):
        assert g.shape == want.shape and distance(g, want) < bound
    assert got[3].stride()[-2:] == weight.stride()[-2:]


@pytest.mark.parametrize("wants", [(False, False), (True, False), (False, True)])
def test_only_the_gradients_that_are_wanted(wants):
    case = heads_case(9, 5, 32, 37)
    got, both = run_heads(*case, wants), run_heads(*case)
    torch.testing.assert_close(got[1], both[1])
    for i, wanted in enumerate(wants):
        assert torch.equal(got[2 + i], both[2 + i]) if wanted else not got[2 + i].numel()


def test_rows_that_count_nothing():
    hidden, weight, targets, weights = heads_case(6, 5, 32, 37)
    targets[2] = linear_cross_entropy.IGNORE
    weights[4] = 0
    got = run_heads(hidden, weight, targets, weights)
    assert not got[2][[2, 4]].any() and got[2][[0, 1, 3, 5]].any()
    some = torch.tensor([0, 1, 3, 5])
    want = run_heads(hidden[some], weight, targets[some], weights[some])
    torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-5)


def test_a_target_that_is_no_class():
    hidden, weight, targets, weights = heads_case(6, 5, 32, 37)
    targets[3, 2] = 37
    with pytest.raises(RuntimeError, match="out of bounds"):
        run_heads(hidden, weight, targets, weights)


def test_more_logits_than_the_budget_are_pytorchs():
    hidden, weight, *_ = heads_case(6, 5, 32, 37)
    threads = torch.get_num_threads()
    assert not cpu_heads.supports_heads(hidden, weight, threads * 6 * 37 * 4 - 1)


# --- operators --------------------------------------------------------------------------------------------------------


def operators() -> dict[str, tuple]:
    scratch = torch.zeros(2**20, dtype=torch.uint8)
    q, k, v, logs = random(9, 32), random(9, 16, seed=1), random(9, 16, seed=2), random(2, 9, dtype=FP32)
    cos, bounds = random(9, 1, 8, dtype=FP32), torch.tensor([0, 4, 9])
    hidden, weight, targets, weights = heads_case(3, 5, 16, 21)
    weights = weights.expand(3, 5).contiguous()
    places = torch.tensor([0, -1, 1, 2, 3, 4, 5, 6, 7])
    return {
        "product": (random(5, 16), random(12, 16).t(), random(5, 12), scratch),
        "attention_rows": (q, k, v, cos, cos, bounds, 2, 1, 0.25, scratch),
        "attention_rows_backward": (q, q, places, q, k, v, logs, cos, cos, bounds, 2, 1, 0.25, scratch),
        "heads_cross_entropy": (hidden, weight, targets, weights, 0.5, True, True, scratch),
    }


@pytest.mark.slow
@needs_products
@pytest.mark.parametrize("name", operators())
def test_opcheck(name, form):
    if form == "PyTorch":
        pytest.skip("operators are the library's")
    torch.library.opcheck(getattr(torch.ops.csm_kernels, name).default, operators()[name])


@needs_products
def test_profilers_and_counters_see_operators(form):
    if form == "PyTorch":
        pytest.skip("operators are the library's")
    case, order = attention_case([4, 3], 2, 1, 16, False)
    with torch.profiler.profile() as seen, FlopCounterMode(display=False) as counted:
        cpu_linear.product(random(4, 6), random(8, 6).t())
        run_attention(case, order, 16)
        run_heads(*heads_case(3, 5, 16, 21))
    names = {e.key for e in seen.key_averages()}
    assert {f"csm_kernels::{name}" for name in operators()} <= names
    found = {str(k).split(".")[-1]: v for k, v in counted.get_flop_counts()["Global"].items()}
    below = 4 * 5 // 2 + 3 * 4 // 2
    assert found["product"] == 2 * 4 * 6 * 8
    assert found["attention_rows"] == 2 * 2 * 2 * 16 * below
    assert found["attention_rows_backward"] == 5 * 2 * 2 * 16 * below
    assert found["heads_cross_entropy"] == 3 * 2 * 3 * 5 * 16 * 21


@needs_products
def test_without_data():
    with FakeTensorMode() as mode:
        a, b = mode.from_tensor(random(4, 6)), mode.from_tensor(random(8, 6))
        assert cpu_linear.product(a, b.t()).shape == (4, 8)


def test_log_sums_of_the_largest_logits():
    """One logit far above the others: a loss of 0 and of the distance, not infinite."""
    hidden = torch.zeros(2, 5, 16, dtype=BF16)
    hidden[..., 0] = 1
    weight = torch.zeros(5, 16, 21, dtype=BF16)
    weight[:, 0, 3] = 1000
    targets = torch.tensor([[3] * 5, [4] * 5])
    loss = run_heads(hidden, weight, targets, torch.tensor([[1.0], [1.0]]))
    torch.testing.assert_close(loss[1], torch.full((5,), 1000.0))
    plain = F.cross_entropy(torch.tensor([[0.0] * 3 + [1000.0] + [0.0] * 17]), torch.tensor([4]))
    assert float(plain) == 1000
