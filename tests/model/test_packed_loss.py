"""Packed = padded = one by one, in float64; and what the packed loss must never allocate."""

from __future__ import annotations

import pytest
import torch
from csm_kernels.cpu import folded_attention
from model_cases import (
    MICRO,
    MemoryStore,
    assert_same,
    backward,
    one_by_one,
    padded,
    random_conversations,
    random_model,
    seeded,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import csm_fast
from benchmarks.common.baselines import blog_forward
from csm_fast import CSMConfig, TransformerConfig
from csm_fast.config.train import DataSection, LossSection
from csm_fast.model.loss import coefficients, packed_loss
from csm_fast.packing.loader import Packer

# Audio-first conversations, turns of no and of one frame, a lone EOS row, and conversations that only speaker 1 speaks.
SPEC = [
    [(3, 5, 0), (4, 9, 1)],
    [(0, 7, 0)],
    [(2, 0, 0)],
    [(3, 1, 1)],
    [(5, 30, 0)],
    [(6, 29, 1)],
    [(0, 0, 0)],
    [(0, 1, 1), (1, 3, 0)],
    [(2, 4, 1), (2, 6, 1)],
]
PACK_ROWS = (36, 60, 97, 4096)
PRESETS = {
    "blog": LossSection(),
    "blog w=0.1": LossSection(decoder_loss_weight=0.1),
    "sesame-finetune": LossSection(loss="sesame-finetune", decoder_loss_weight=0.7),
    "csm-mlx": LossSection(loss="csm-mlx", first_codebook_weight_multiplier=3.0),
    "transformers": LossSection(loss="transformers"),
}


def step_loss(model, conversations, data: DataSection, loss: LossSection, pad: str = ""):
    """Loss and gradients of one optimizer step of all conversations; every pack by itself, as in training."""
    packer = Packer(MemoryStore(conversations), data, loss, pad=pad)
    step = packer.step(0, 0)
    model.zero_grad()
    total, per_codebook = 0.0, torch.zeros(MICRO.num_codebooks, dtype=torch.float64)
    a, b = coefficients(loss, MICRO.num_codebooks)
    for pack in step.packs:
        value, parts = packed_loss(model, pack, a, b)
        assert torch.isfinite(value) and torch.isfinite(parts).all()
        value.backward()
        total += float(value.detach())
        per_codebook += parts
    grads = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in model.named_parameters()}
    assert all(torch.isfinite(g).all() for g in grads.values())
    want = a * float(per_codebook[0]) + b * float(per_codebook[1:].mean())
    assert total == pytest.approx(want, rel=1e-12)
    return (total, {n: g.clone() for n, g in grads.items()}), step


@pytest.mark.slow
@pytest.mark.parametrize("fraction", [1 / 16, 1.0], ids=["sixteenth", "all frames"])
@pytest.mark.parametrize("masked", [[], [1]], ids=["unmasked", "speaker 1 masked"])
@pytest.mark.parametrize("eos_weight", [1.0, 3.5])
def test_packed_is_one_by_one(fraction, masked, eos_weight):
    model = random_model(dtype=torch.float64)
    conversations = random_conversations(SPEC)
    loss = LossSection(amortization_fraction=fraction, eos_weight=eos_weight)
    reference = one_by_one(model, conversations, 0.5, 0.5, masked=masked, eos_weight=eos_weight, fraction=fraction)
    want = backward(model, reference)
    for rows in PACK_ROWS:
        data = DataSection(batch_size=len(SPEC), pack_rows=rows, mask_speaker_ids=masked)
        for pad in ("", "cpu", "cuda"):
            got, step = step_loss(model, conversations, data, loss, pad)
            assert_same(got, want, 1e-10, 1e-10)
        if masked and rows == 36:
            assert any(pack.target_rows.numel() == 0 for pack in step.packs), "no fully masked pack was tried"
        if fraction < 1 and rows == 36:
            assert any(p.target_rows.numel() and not p.decoder_index.numel() for p in step.packs)


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS.keys())
def test_presets(preset):
    model = random_model(dtype=torch.float64)
    conversations = random_conversations(SPEC[:5])
    formulas = {
        "blog": lambda ce0, ced: (
            (1 - (preset.decoder_loss_weight or 0.5)) * ce0 + (preset.decoder_loss_weight or 0.5) * ced
        ),
        "sesame-finetune": lambda ce0, ced: 2 * (0.3 * ce0 + 0.7 * ced),
        "csm-mlx": lambda ce0, ced: (3 * ce0 + 5 * ced) / 6,
        "transformers": lambda ce0, ced: ce0 + ced,
    }
    ce0, ced = one_by_one(model, conversations, 1, 0), one_by_one(model, conversations, 0, 1)
    want = backward(model, formulas[preset.loss](ce0, ced))
    data = DataSection(batch_size=5, pack_rows=60)
    assert_same(step_loss(model, conversations, data, preset)[0], want, 1e-10, 1e-10)


def test_packed_is_padded():
    """All frames, so that every way draws the same ones: packs, the drop-in, the blog's forward."""
    model = random_model(dtype=torch.float64)
    model.amortization_fraction = 1.0
    conversations = random_conversations([c for c in SPEC if c[0][0] > 0])
    batch = padded(conversations)
    want = seeded(model, blog_forward, *batch)
    assert_same(seeded(model, csm_fast.forward, *batch), want, 1e-10, 1e-10)
    for rows in PACK_ROWS:
        data = DataSection(batch_size=len(conversations), pack_rows=rows)
        got, _ = step_loss(model, conversations, data, LossSection(amortization_fraction=1.0))
        assert_same(got, want, 1e-10, 1e-10)


def test_fewer_than_sixteen_frames():
    model = random_model(dtype=torch.float64)
    for spec in ([[(2, 0, 0)]], [[(3, 4, 0)], [(1, 2, 1)]], [[(0, 1, 0)]]):
        conversations = random_conversations(spec)
        want = backward(model, one_by_one(model, conversations, 0.5, 0.5))
        got, step = step_loss(model, conversations, DataSection(batch_size=9), LossSection())
        assert step.selected == 1
        assert_same(got, want, 1e-10, 1e-10)


def test_a_step_without_any_supervised_frame_is_zero():
    model = random_model(dtype=torch.float64)
    for spec, masked in (([[(0, 0, 0)]], []), ([[(3, 4, 1)], [(3, 4, 0)]], [1])):
        conversations = random_conversations(spec)
        packer = Packer(MemoryStore(conversations), DataSection(batch_size=1, mask_speaker_ids=masked), LossSection())
        steps = [packer.step(0, i) for i in range(packer.steps_in_epoch(0))]
        empty = [step for step in steps if not step.supervised]
        assert len(empty) == 1
        loss, parts = packed_loss(model, empty[0].packs[0], 0.5, 0.5)
        value, grads = backward(model, loss)
        assert value == 0 and (parts == 0).all()
        assert all((g == 0).all() for g in grads.values())


class Largest(TorchDispatchMode):
    """Remembers, for each operator, the largest storage that it returned (in elements; of scratch, as many of bf16)."""

    def __init__(self):
        super().__init__()
        self.elements: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                element = 2 if t.dtype == torch.uint8 else t.element_size()
                size = t.untyped_storage().nbytes() // element
                self.elements[str(func)] = max(size, self.elements.get(str(func), 0))
        return out


@pytest.mark.slow
@pytest.mark.parametrize("fraction", [1 / 16, 1.0], ids=["sixteenth", "all frames"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("spec", [[[(12, 499, 0)]], [[(4, 251, 0)], [(6, 249, 1)]]], ids=["one", "two"])
def test_no_tensor_of_rows_by_codebooks_by_width_nor_rows_by_rows(monkeypatch, fraction, dtype, spec):
    # A bound for true widths holds one sequence's scores here.
    monkeypatch.setattr(folded_attention, "FOLDED_SCORES", 2**16)
    # The decoder is narrow here, so that its own [frames, K, width] states stay apart from the backbone's.
    config = CSMConfig(
        TransformerConfig(1, 6, 2, 96, 128),
        TransformerConfig(1, 1, 1, 8, 16),
        text_vocab_size=50,
        audio_vocab_size=31,
        num_codebooks=8,
    )
    model = random_model(config, dtype)
    model.amortization_fraction = fraction
    tokens, mask = padded(random_conversations(spec, config))
    rows = int(mask.any(-1).sum())
    assert rows in (512, 513)
    with Largest() as seen:
        csm_fast.forward(model, tokens, mask).backward()
    assert any("backward" in name for name in seen.elements), "the backward pass was not watched"
    worst = max(seen.elements, key=lambda name: seen.elements[name])
    limit = min(rows * (config.num_codebooks + 1) * config.backbone.embed_dim, rows * rows)
    assert seen.elements[worst] <= limit / 2, (worst, seen.elements[worst], limit)


def test_the_watch_sees_the_blogs_tensors():
    model = random_model()
    tokens, mask = padded(random_conversations([[(5, 40, 0)]]))
    with Largest() as seen:
        blog_forward(model, tokens, mask).backward()
    assert max(seen.elements.values()) >= 46 * (MICRO.num_codebooks + 1) * MICRO.backbone.embed_dim
