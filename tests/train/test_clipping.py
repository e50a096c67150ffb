"""The norm of gradients, and clipping by it: PyTorch's, summed in float32."""

from __future__ import annotations

import pytest
import torch
from csm_kernels.cpu import native
from csm_kernels.cpu.adamw import MATRIX_ROWS
from kernel_cases import gradients, start

from csm_fast import ops
from csm_fast.train.optim.adamw import AdamW
from csm_fast.train.optim.build import clip, gradient_norm

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("numel", [0, 1, 17, 65536, 200_003])
def test_sums_of_squares(numel, dtype):
    x = start(numel, dtype=dtype)
    got = ops.sum_of_squares(x)
    if got is None:
        pytest.skip(native.describe_library())
    want = x.double().square().sum()
    assert got.dtype == F64 and abs(got - want) <= 1e-5 * want
    table = start(MATRIX_ROWS + 9, 33, dtype=dtype)  # summed row by row
    table[5:-3] = 0
    torch.testing.assert_close(ops.sum_of_squares(table), table.double().square().sum(), rtol=1e-6, atol=0)
    assert ops.sum_of_squares(torch.tensor([1.0, torch.nan]).to(dtype)).isnan()


@pytest.mark.parametrize("most", [0.0, 0.3, 1e6])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16, F64])
def test_clipping_is_pytorchs(cpu_form, dtype, own, most):
    if own and dtype == F64:
        pytest.skip("ours takes none")
    shapes = [(40, 30), (7,), (3, 5)]
    grads = [g.to(dtype) for shape in shapes for g in gradients(*shape, steps=1)]
    grads = [g * 100 for g in grads]
    results = []
    for theirs in (True, False):
        wide = F64 if theirs else dtype
        params = [torch.nn.Parameter(start(*shape, dtype=wide)) for shape in shapes]
        optimizer = AdamW(params, rounding="kahan") if own and not theirs else torch.optim.AdamW(params, fused=True)
        optimizer.param_groups[0].update(lr=1e-2, weight_decay=0.0, betas=(0.9, 0.99), eps=1e-2)
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad.to(wide, copy=True)
        if theirs:
            norm = torch.nn.utils.clip_grad_norm_(params, most or torch.inf)
        else:
            norm = gradient_norm(params)
            assert norm.dtype == (F64 if dtype == F64 else F32)
            clip(optimizer, most, norm)
        optimizer.step()
        results.append((norm, params))
    (norm, params), (got_norm, got) = results
    torch.testing.assert_close(got_norm.double(), norm, rtol=1e-6, atol=0)
    assert norm > 0.3
    for p, q in zip(params, got, strict=True):
        rtol, atol = (2.0**-8, 2e-5) if dtype == BF16 else (1e-6, 1e-7)
        torch.testing.assert_close(q.double(), p, rtol=rtol, atol=atol)


def test_no_gradients_have_no_norm():
    assert gradient_norm([torch.nn.Parameter(torch.ones(3))]) == 0
