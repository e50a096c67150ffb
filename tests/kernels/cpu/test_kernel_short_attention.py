"""short_attention against float64 attention, within the error of PyTorch's own in the same dtype."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from csm_kernels.cpu import folded_attention, short_attention
from kernel_cases import assert_within_budget


def sdpa(q, k, v, grad):
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), grad)


def exact(q, k, v, grad):
    """Output and gradients in extended precision: a float64 truth of float64 attention is rounded as much itself."""
    heads, kv_heads = q.shape[2], k.shape[2]
    q, k, v, grad = (x.numpy().astype(np.longdouble).swapaxes(1, 2) for x in (q, k, v, grad))
    k, v = (x.repeat(heads // kv_heads, axis=1) for x in (k, v))
    scale, length = np.longdouble(q.shape[-1]) ** -0.5, q.shape[2]
    scores = np.where(np.tri(length, dtype=bool), q @ k.swapaxes(2, 3) * scale, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    dp = grad @ v.swapaxes(2, 3)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * scale
    dk, dv = (
        x.reshape(len(x), kv_heads, -1, *x.shape[2:]).sum(2) for x in (ds.swapaxes(2, 3) @ q, p.swapaxes(2, 3) @ grad)
    )
    return tuple(torch.from_numpy(x.swapaxes(1, 2).astype(np.float64)) for x in (p @ v, ds @ k, dk, dv))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (3, 1)])
@pytest.mark.parametrize(("sequences", "length"), [(1, 2), (3, 7), (50, 32), (2, 150)])
def test_forward_and_gradients(dtype, heads, sequences, length, monkeypatch):
    monkeypatch.setattr(folded_attention, "FOLDED_SCORES", 40_000)  # several chunks, the last one smaller
    generator = torch.Generator().manual_seed(length)
    shapes = [(sequences, length, h, 16) for h in (heads[0], heads[1], heads[1], heads[0])]
    q, k, v, grad = (torch.randn(s, generator=generator).to(dtype) for s in shapes)
    truth = exact(q, k, v, grad) if dtype == torch.float64 else sdpa(*(x.double() for x in (q, k, v, grad)))
    plain = sdpa(q, k, v, grad)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    out = short_attention.short_attention(*inputs)
    got = out.detach(), *torch.autograd.grad(out, inputs, grad)
    for name, g, t, p in zip(("out", "q", "k", "v"), got, truth, plain, strict=True):
        assert_within_budget(name, g, t, p)


def test_strided_inputs_and_nothing_from_the_future():
    packed = torch.randn(5, 9, 6, 8, dtype=torch.float64)
    q, k, v = packed.split([4, 1, 1], dim=2)
    out = short_attention.short_attention(q, k, v)
    torch.testing.assert_close(out, sdpa(q, k, v, torch.zeros_like(q))[0])
    later = packed.clone()
    later[:, 5:] = torch.randn(5, 4, 6, 8, dtype=torch.float64)
    changed = short_attention.short_attention(*later.split([4, 1, 1], dim=2))
    assert torch.equal(out[:, :5], changed[:, :5]) and not torch.equal(out[:, 5:], changed[:, 5:])


@pytest.mark.slow
def test_opcheck_and_a_single_row():
    q, k, v = (torch.randn(3, 5, h, 8, requires_grad=True) for h in (4, 2, 2))
    torch.library.opcheck(torch.ops.csm_kernels.short_attention.default, (q, k, v))
    one = short_attention.short_attention(q[:, :1], k[:, :1], v[:, :1])
    torch.testing.assert_close(one, v[:, :1].repeat_interleave(2, 2))
