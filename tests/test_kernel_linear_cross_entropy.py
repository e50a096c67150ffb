"""linear_cross_entropy against torch's own linear layer and cross-entropy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from csm_kernels.linear_cross_entropy import DEFAULT_BYTE_BUDGET, linear_cross_entropy

ROW = 8 * 19  # bytes of one row of float64 logits at the vocabulary below
BUDGETS = {"one row": 1, "three rows": 3 * ROW, "a head": 13 * ROW, "two heads": 27 * ROW, "all": DEFAULT_BYTE_BUDGET}


def case(rows=13, heads=5, width=7, vocab=19, dtype=torch.float64, per_head_weights=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, heads, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(heads, width, vocab, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, (rows, heads), generator=generator)
    weights = torch.rand(rows, heads if per_head_weights else 1, generator=generator, dtype=torch.float64)
    if rows > 2:
        weights[1] = 0  # a row that does not count
    return hidden, weight, targets, weights


def naive(hidden, weight, targets, weights):
    logits = torch.einsum("mcd,cdv->mcv", hidden, weight)
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape) * weights
    return losses.sum(), losses.sum(0).detach()


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS.keys())
@pytest.mark.parametrize("heads", [1, 5])
@pytest.mark.parametrize("per_head_weights", [False, True], ids=["row weights", "weights per head"])
def test_loss_and_gradients(budget, heads, per_head_weights):
    inputs = case(heads=heads, per_head_weights=per_head_weights)
    want, want_parts = naive(*inputs)
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
    want = torch.autograd.grad(naive(hidden, weight, targets, weights)[0], (hidden, weight))
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
    want, want_parts = naive(*inputs)
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
    torch.testing.assert_close(loss, naive(hidden, weight, targets, weights.float())[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("budget", [3 * 4 * 300, DEFAULT_BYTE_BUDGET], ids=["chunks", "whole"])
@pytest.mark.parametrize("heads", [1, 4])
def test_bf16_errs_little_more_than_torch_in_bf16(budget, heads):
    """Logits in bf16, softmax in float32, each error against the truth of the same rounded inputs in float64."""
    hidden, weight, targets, weights = case(64, heads, 48, 300, torch.bfloat16)
    weights /= weights.sum()
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    true_loss, _ = naive(*wide, targets, weights)
    true = (true_loss, *torch.autograd.grad(true_loss, wide))
    logits = torch.einsum("mcd,cdv->mcv", hidden, weight).float()
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
    torch_loss = (losses * weights).sum()
    theirs = (torch_loss, *torch.autograd.grad(torch_loss, (hidden, weight)))
    loss, _ = linear_cross_entropy(hidden, weight, targets, weights, byte_budget=budget)
    assert loss.dtype == torch.float32
    ours = (loss, *torch.autograd.grad(loss, (hidden, weight)))
    for name, o, t, truth in zip(("loss", "hidden", "weight"), ours, theirs, true, strict=True):
        error, bound = ((x.double() - truth).norm() / truth.norm() for x in (o, t))
        assert error <= 1.5 * bound + 1e-3, (name, float(error), float(bound))
