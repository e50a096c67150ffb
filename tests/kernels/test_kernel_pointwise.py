"""Rotation and RMS norm: the forms for CPUs against the plain ones, and against float64."""

import pytest
import torch
from csm_kernels import pointwise
from kernel_cases import assert_within_budget

SHAPES = [(1, 4), (7, 96), (3, 5, 64), (2, 32, 512)]


def evaluate(op, inputs, grad, **options):
    """Output and gradients by name."""
    out = op(*inputs, **options)
    wanted = [x for x in inputs if torch.is_tensor(x) and x.requires_grad]
    grads = torch.autograd.grad(out, wanted, grad)
    return {"out": out.detach()} | {f"gradient {i}": g for i, g in enumerate(grads)}


def plain(op, inputs, grad):
    return evaluate(op, inputs, grad, impl="reference")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_rotation_is_that_of_pairs(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    angles = torch.randn(shape[-2], shape[-1] // 2, generator=generator, dtype=wide)
    x, grad = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    inputs = (x.requires_grad_(), angles.cos(), angles.sin())
    got, want = evaluate(pointwise.rotate_pairs, inputs, grad), plain(pointwise.rotate_pairs, inputs, grad)
    wide_inputs = (x.detach().double().requires_grad_(), *(t.double() for t in inputs[1:]))
    truth = plain(pointwise.rotate_pairs, wide_inputs, grad.double())
    for name in got:
        assert_within_budget(name, got[name], truth[name], want[name])
    strided = torch.stack([x, x], -1)[..., 0]
    assert torch.equal(pointwise.rotate_pairs(strided, *inputs[1:]), got["out"])


def norm_case(shape, dtype, scale_dtype=None):
    generator = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    scale = (1 + torch.rand(shape[-1], generator=generator)).to(scale_dtype or dtype)
    return (x.requires_grad_(), scale.requires_grad_(), 1e-5), grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_norm_errs_no_more_than_the_plain_form(shape, dtype):
    inputs, grad = norm_case(shape, dtype)
    got, want = evaluate(pointwise.rms_norm, inputs, grad), plain(pointwise.rms_norm, inputs, grad)
    wide = [x.detach().double().requires_grad_() for x in inputs[:2]]
    truth = plain(pointwise.rms_norm, (*wide, 1e-5), grad.double())
    for name in got:
        assert_within_budget(name, got[name], truth[name], want[name])


def test_norm_with_a_scale_in_another_dtype():
    inputs, grad = norm_case((7, 96), torch.bfloat16, torch.float32)
    got, want = (f(pointwise.rms_norm, inputs, grad.float()) for f in (evaluate, plain))
    assert [x.dtype for x in got.values()] == [x.dtype for x in want.values()]
    for name in got:
        torch.testing.assert_close(got[name], want[name], rtol=2e-2, atol=2e-2)


def test_norm_gradcheck():
    (x, scale, eps), _ = norm_case((3, 5), torch.float64)
    assert torch.autograd.gradcheck(pointwise.rms_norm, (x, scale, eps))
    assert torch.autograd.gradcheck(lambda s: pointwise.rms_norm(x.detach(), s, eps), (scale,))
    assert torch.autograd.gradcheck(lambda x: pointwise.rms_norm(x, scale.detach(), eps), (x,))
