"""frame_embed against the sum it stands for."""

from __future__ import annotations

import pytest
import torch
from csm_kernels import frame_embed as module
from csm_kernels.frame_embed import frame_embed

TEXT, VOCAB, CODEBOOKS, WIDTH = 23, 11, 5, 12


def naive(tokens, is_audio, text_table, audio_table):
    """Every row by itself, from the definition."""
    rows = []
    for row, audio in zip(tokens.tolist(), is_audio.tolist(), strict=True):
        if audio:
            rows.append(sum(audio_table[code + k * VOCAB] for k, code in enumerate(row[:-1])))
        else:
            rows.append(text_table[row[-1]])
    return torch.stack(rows)


def case(rows: int, share: float, dtype=torch.float64, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB, (rows, CODEBOOKS + 1), generator=generator)
    tokens[::3] = 0  # end-of-speech rows: the same embeddings again and again
    is_audio = torch.rand(rows, generator=generator) < share
    text = torch.randn(TEXT, WIDTH, generator=generator).to(dtype).requires_grad_()
    audio = torch.randn(CODEBOOKS * VOCAB, WIDTH, generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(rows, WIDTH, generator=generator).to(dtype)
    return tokens, is_audio, text, audio, grad


@pytest.fixture(autouse=True, params=["by kind", "by mask"])
def form(request, monkeypatch):
    """Both forms of the sum: that of CPUs, and that of devices whose host must not wait."""
    if request.param == "by mask":
        monkeypatch.setattr(module, "_by_kind", module._by_mask)


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0], ids=["text only", "mixed", "audio only"])
@pytest.mark.parametrize("rows", [1, 2, 37])
@pytest.mark.parametrize("ids", [torch.int64, torch.int32])
def test_forward_and_gradients(rows, share, ids):
    tokens, is_audio, text, audio, grad = case(rows, share)
    want = naive(tokens, is_audio, text, audio)
    want_grads = torch.autograd.grad(want, (text, audio), grad, allow_unused=True)
    got = frame_embed(tokens.to(ids), is_audio, text, audio)
    got_grads = torch.autograd.grad(got, (text, audio), grad)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
    for g, w in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(g, torch.zeros_like(g) if w is None else w, rtol=1e-13, atol=1e-13)


def test_dead_columns_do_not_matter():
    """Codes of text rows and the text id of audio rows are not embedded."""
    tokens, is_audio, text, audio, _ = case(37, 0.5)
    changed = tokens.clone()
    changed[is_audio, -1] = TEXT - 1
    changed[~is_audio, :-1] = VOCAB - 1
    assert torch.equal(frame_embed(tokens, is_audio, text, audio), frame_embed(changed, is_audio, text, audio))


@pytest.mark.parametrize("wanted", ["text", "audio", "neither"])
def test_one_gradient_at_a_time(wanted):
    tokens, is_audio, text, audio, grad = case(37, 0.5)
    text.requires_grad_(wanted == "text")
    audio.requires_grad_(wanted == "audio")
    out = frame_embed(tokens, is_audio, text, audio)
    assert out.requires_grad == (wanted != "neither")
    if out.requires_grad:
        out.backward(grad)
    assert (text.grad is not None) == (wanted == "text")
    assert (audio.grad is not None) == (wanted == "audio")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes_round_once(dtype):
    tokens, is_audio, text, audio, _ = case(37, 0.8, dtype)
    got = frame_embed(tokens, is_audio, text, audio)
    assert got.dtype == dtype
    exact = naive(tokens, is_audio, text.double(), audio.double())
    # Half a unit in the last place for the rounding of the result; float32's own sums err a little more.
    bound = exact.abs() * torch.finfo(dtype).eps * (0.5 if dtype == torch.bfloat16 else CODEBOOKS) + 1e-5
    assert ((got.double() - exact).abs() <= bound).all()


def test_gradcheck():
    tokens, is_audio, text, audio, _ = case(9, 0.6)
    assert torch.autograd.gradcheck(lambda t, a: frame_embed(tokens, is_audio, t, a), (text, audio))
