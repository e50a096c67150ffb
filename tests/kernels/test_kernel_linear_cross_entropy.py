"""linear_cross_entropy against torch's own linear layer and cross-entropy."""

from __future__ import annotations

import contextlib

import pytest
import torch
from csm_kernels.constants import LOGITS_BUDGET
from csm_kernels.linear_cross_entropy import linear_cross_entropy, reference
from kernel_cases import assert_within_budget, interpreted, poisoned

ROW = 8 * 19  # bytes of one row of float64 logits at the vocabulary below
BUDGETS = {"one row": 1, "three rows": 3 * ROW, "a head": 13 * ROW, "two heads": 27 * ROW, "all": LOGITS_BUDGET}


def case(rows=13, heads=5, width=7, vocab=19, dtype=torch.float64, per_head_weights=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, heads, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(heads, width, vocab, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, (rows, heads), generator=generator)
    weights = torch.rand(rows, heads if per_head_weights else 1, generator=generator, dtype=torch.float64)
    if rows > 2:
        weights[1] = 0  # a row that does not count
    return hidden, weight, targets, weights


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS.keys())
@pytest.mark.parametrize("heads", [1, 5])
@pytest.mark.parametrize("per_head_weights", [False, True], ids=["row weights", "weights per head"])
def test_loss_and_gradients(budget, heads, per_head_weights):
    inputs = case(heads=heads, per_head_weights=per_head_weights)
    want, want_parts = reference(*inputs)
    got, parts = linear_cross_entropy(*inputs, byte_budget=budget)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=0)
    torch.testing.assert_close(parts, want_parts, rtol=1e-13, atol=0)
    assert not parts.requires_grad
    # What comes from above scales both gradients.
    want_grads = torch.autograd.grad(want * 3, inputs[:2])
    got_grads = torch.autograd.grad(got * 3, inputs[:2])
    for g, w in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS.keys())
@pytest.mark.parametrize("wanted", ["hidden", "weight", "neither"])
@pytest.mark.parametrize("heads", [1, 3])
def test_one_gradient_at_a_time(budget, wanted, heads):
    hidden, weight, targets, weights = case(heads=heads)
    want = torch.autograd.grad(reference(hidden, weight, targets, weights)[0], (hidden, weight))
    hidden.requires_grad_(wanted == "hidden")
    weight.requires_grad_(wanted == "weight")
    loss, _ = linear_cross_entropy(hidden, weight, targets, weights, byte_budget=budget)
    assert loss.requires_grad == (wanted != "neither")
    if wanted == "neither":
        return
    loss.backward()
    if wanted == "hidden":
        assert weight.grad is None
        torch.testing.assert_close(hidden.grad, want[0], rtol=1e-12, atol=1e-14)
    else:
        assert hidden.grad is None
        torch.testing.assert_close(weight.grad, want[1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("upstream", [1.0, 3.0])
@pytest.mark.parametrize("scale", [0.25, 0.0])
def test_a_scale_is_that_of_the_loss_and_not_of_the_sums(scale, upstream, impl):
    inputs = case(rows=5, heads=3, dtype=torch.float32)
    (loss, parts), (plain, same) = (linear_cross_entropy(*inputs, impl="torch", scale=s) for s in (scale, 1.0))
    if impl == "triton":
        with interpreted() as launches:
            loss, parts = linear_cross_entropy(*inputs, impl="triton", scale=scale)
        assert launches["_softmax_cross_entropy_kernel"]
    got, want = (torch.autograd.grad(x, inputs[:2], torch.tensor(upstream)) for x in (loss, plain))
    torch.testing.assert_close(parts, same)
    torch.testing.assert_close(loss, scale * plain)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, scale * w, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("upstream", [1.0, 3.0])
def test_a_kept_graph_gives_its_gradients_again(upstream):
    """Whatever is done meanwhile to those that it gave."""
    hidden, weight, targets, weights = case()
    loss, _ = linear_cross_entropy(hidden, weight, targets, weights)
    first = None
    for _ in range(3):
        hidden.grad = weight.grad = None
        loss.backward(torch.tensor(upstream, dtype=loss.dtype), retain_graph=True)
        first = first or (hidden.grad.clone(), weight.grad.clone())
        assert torch.equal(hidden.grad, first[0]) and torch.equal(weight.grad, first[1])
        hidden.grad.zero_()
        weight.grad.zero_()
    assert first[0].any() and first[1].any()


@pytest.mark.parametrize("heads", [1, 4])
def test_no_rows(heads):
    inputs = case(rows=0, heads=heads)
    loss, parts = linear_cross_entropy(*inputs)
    loss.backward()
    assert loss == 0 and (parts == 0).all() and (inputs[1].grad == 0).all()
    assert inputs[0].grad.shape == (0, heads, 7)


def test_without_gradients():
    inputs = case()
    with torch.no_grad():
        loss, parts = linear_cross_entropy(*inputs, byte_budget=3 * ROW)
    want, want_parts = reference(*inputs)
    torch.testing.assert_close(loss, want.detach(), rtol=1e-13, atol=0)
    torch.testing.assert_close(parts, want_parts, rtol=1e-13, atol=0)


@pytest.mark.parametrize("heads", [1, 3])
def test_gradcheck(heads):
    hidden, weight, targets, weights = case(rows=3, heads=heads, width=4, vocab=5)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, targets, weights, byte_budget=40)[0], (hidden, weight)
    )


def test_large_logits_do_not_overflow():
    hidden, weight, targets, weights = case(dtype=torch.float32)
    with torch.no_grad():
        hidden *= 300
    loss, _ = linear_cross_entropy(hidden, weight, targets, weights)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(hidden.grad).all() and torch.isfinite(weight.grad).all()
    torch.testing.assert_close(loss, reference(hidden, weight, targets, weights.float())[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("budget", [3 * 4 * 300, LOGITS_BUDGET], ids=["chunks", "whole"])
@pytest.mark.parametrize("heads", [1, 4])
def test_bf16_errs_little_more_than_torch_in_bf16(budget, heads):
    """Logits in bf16, softmax in float32, each error against the truth of the same rounded inputs in float64."""
    hidden, weight, targets, weights = case(64, heads, 48, 300, torch.bfloat16)
    weights /= weights.sum()
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    true_loss, _ = reference(*wide, targets, weights)
    true = (true_loss, *torch.autograd.grad(true_loss, wide))
    torch_loss, _ = reference(hidden, weight, targets, weights)
    theirs = (torch_loss, *torch.autograd.grad(torch_loss, (hidden, weight)))
    loss, _ = linear_cross_entropy(hidden, weight, targets, weights, byte_budget=budget)
    assert loss.dtype == torch.float32
    ours = (loss, *torch.autograd.grad(loss, (hidden, weight)))
    for name, o, t, truth in zip(("loss", "hidden", "weight"), ours, theirs, true, strict=True):
        error, bound = ((x.double() - truth).norm() / truth.norm() for x in (o, t))
        assert error <= 1.5 * bound + 1e-3, (name, float(error), float(bound))


# --- the Triton kernel, in the interpreter ------------------------------------------------------------------------


def gradients(inputs, **options):
    loss, parts = linear_cross_entropy(*inputs, **options)
    return loss, parts, *torch.autograd.grad(loss, inputs[:2])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("vocab", [5, 2051])
@pytest.mark.parametrize("rows", [0, 1, 33])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("chunk", ["small", "all"])
def test_kernel_within_the_error_budget(dtype, vocab, rows, heads, chunk):
    inputs = case(rows, heads, 96, vocab, dtype, per_head_weights=True)
    inputs[2].masked_fill_(torch.rand(inputs[2].shape, generator=torch.Generator().manual_seed(1)) < 0.1, -100)
    budget = 7 * vocab * 4 if chunk == "small" else LOGITS_BUDGET
    exact = [x.detach().double().requires_grad_() for x in inputs[:2]]
    truth = gradients((*exact, *inputs[2:]), impl="torch")
    plain = gradients(inputs, impl="torch", byte_budget=budget)
    with interpreted() as launches, poisoned():
        got = gradients(inputs, impl="triton", byte_budget=budget)
    if rows:
        assert launches["_softmax_cross_entropy_kernel"] >= (heads if chunk == "small" and rows > 7 else 1)
    for name, g, t, p in zip(("loss", "parts", "hidden", "weight"), got, truth, plain, strict=True):
        assert_within_budget(name, g, t.to(torch.float64), p)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_fp16_keeps_the_gradients_of_small_weights(impl):
    """They are formed before a trainer scales its loss, and are there when it does, also by more than fp16 knows."""
    exact = case(48, 2, 64, 300, torch.float64)
    inputs = [x.detach().half().requires_grad_() for x in exact[:2]]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    targets = case(48, 2, 64, 300)[2]
    weights = torch.full((48, 1), 1 / 2**22, dtype=torch.float64)
    true_loss, true_parts = linear_cross_entropy(*exact, targets, weights, scale=0.5)
    truth = torch.autograd.grad(true_loss, exact)
    with interpreted() if impl == "triton" else contextlib.nullcontext():
        loss, parts = linear_cross_entropy(*inputs, targets, weights, impl=impl, scale=0.5)
    assert float(loss.detach()) == pytest.approx(float(true_loss.detach()), rel=1e-3)
    torch.testing.assert_close(parts.double(), true_parts, rtol=1e-3, atol=0)
    for scale in (2.0**17, 2.0**27):
        grads = torch.autograd.grad(scale * loss, inputs, retain_graph=True)
        for got, want in zip(grads, truth, strict=True):
            error = (got.double() / scale - want).norm() / want.norm()
            assert error < 2e-3, float(error)
    nothing = linear_cross_entropy(*inputs, targets, 0 * weights, impl="torch")[0]
    assert not any(grad.any() for grad in torch.autograd.grad(nothing, inputs))


def test_kernel_takes_any_strides_and_skips_what_is_not_wanted():
    hidden, weight, targets, weights = case(9, 1, 40, 23, torch.float32)
    linear = weight.detach().squeeze(0).t().contiguous()  # [V, D], as codebook 0's head is stored
    want = linear_cross_entropy(hidden, weight, targets, weights, impl="torch")[0]
    with interpreted() as launches, poisoned():
        got = linear_cross_entropy(hidden, linear.t().unsqueeze(0), targets, weights, impl="triton")[0]
        (grad,) = torch.autograd.grad(got, hidden)
        with torch.no_grad():
            quiet = linear_cross_entropy(hidden, weight, targets, weights, impl="triton")[0]
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(quiet, want)
    torch.testing.assert_close(grad, torch.autograd.grad(want, hidden)[0])
    assert launches["_softmax_cross_entropy_kernel"] == 2 and not quiet.requires_grad


def test_ignored_targets_count_nothing():
    hidden, weight, targets, weights = case(6, 2, 8, 11)
    some = targets.clone()
    some[2] = -100
    without = [x.index_select(0, torch.tensor([0, 1, 3, 4, 5])) for x in (hidden, targets, weights)]
    got = linear_cross_entropy(hidden, weight, some, weights)
    want = linear_cross_entropy(without[0], weight, without[1], without[2])
    torch.testing.assert_close(got, want)
    (grad,) = torch.autograd.grad(got[0], hidden)
    assert not grad[2].any() and grad[3].any()


@pytest.mark.parametrize("wanted", [(True, True), (False, True), (False, False)])
def test_opcheck(wanted):
    hidden, weight, targets, weights = case(5, 3, 8, 11, torch.float32)
    args = (hidden, weight, targets, weights, 0.5, 200, *wanted, "cpu")
    torch.library.opcheck(torch.ops.csm_kernels.linear_cross_entropy.default, args)


def test_impl_is_checked():
    inputs = case(3, 1, 4, 5)
    with pytest.raises(ValueError, match="impl must be one of auto, triton, torch, not 'cuda'"):
        linear_cross_entropy(*inputs, impl="cuda")
    with pytest.raises(ValueError, match="float32"):
        linear_cross_entropy(*inputs, impl="triton")
