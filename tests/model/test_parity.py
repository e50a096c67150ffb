"""The training forward against the blog's, transformers' and stand-ins for Sesame's module tree."""

from __future__ import annotations

import types
import warnings
from typing import Any

import pytest
import torch
from model_cases import (
    MICRO,
    assert_same,
    backward,
    one_by_one,
    padded,
    random_conversations,
    random_model,
    relative,
    seeded,
)
from torch import nn

import csm_fast
from benchmarks.common.baselines import blog_forward, transformers_gradients, transformers_loss, transformers_model
from csm_fast import CSM, CSMConfig, TransformerConfig
from csm_fast.model.stacks import model_config

RAGGED = {
    "one conversation": [[(5, 40, 0)]],
    "context turns": [[(5, 9, 0), (3, 20, 1)], [(4, 30, 0)], [(2, 1, 1), (3, 0, 0), (7, 12, 1)], [(1, 2, 0)]],
    "many clips": [[(2 + i % 4, 3 + 5 * i % 17, 0)] for i in range(14)],
    "long": [[(9, 1500, 0)], [(3, 4, 0)]],
}


@pytest.mark.slow
@pytest.mark.parametrize("spec", RAGGED.values(), ids=RAGGED.keys())
@pytest.mark.parametrize(
    ("dtype", "loss_tolerance", "gradient_tolerance"),
    [(torch.float32, 1e-6, 1e-5), (torch.float64, 1e-13, 1e-10)],
    ids=["float32", "float64"],
)
def test_forward_is_the_blogs(spec, dtype, loss_tolerance, gradient_tolerance):
    # Sharp attention amplifies float32's rounding in either forward (2e-5 against float64), so it is float64's task.
    model = random_model(dtype=dtype, scale=0.5 if dtype == torch.float32 else 2.0)
    batch = padded(random_conversations(spec))
    for weight in (0.5, 0.2):
        model.decoder_loss_weight = weight
        got, want = seeded(model, csm_fast.forward, *batch), seeded(model, blog_forward, *batch)
        assert_same(got, want, loss_tolerance, gradient_tolerance)


@pytest.mark.slow
def test_forward_is_transformers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("transformers")
        # Head counts and rotary numbers differ between the stacks, so that a mix-up shows.
        config = CSMConfig(
            TransformerConfig(2, 8, 2, 64, 96, norm_eps=1e-4, rope_base=1e4, rope_scale_factor=8.0),
            TransformerConfig(2, 2, 1, 32, 64, rope_scale_factor=4.0, rope_old_context_len=64),
            text_vocab_size=50,
            audio_vocab_size=21,
            num_codebooks=6,
        )
        for shape, spec in ((MICRO, "context turns"), (config, "context turns"), (MICRO, "long")):
            batch = padded(random_conversations(RAGGED[spec]))
            model = random_model(shape, scale=0.5)
            loss, grads = seeded(model, csm_fast.forward, *batch)
            theirs = transformers_model(shape, model.state_dict())
            torch.manual_seed(7)
            their_loss = transformers_loss(theirs, *batch)
            their_loss.backward()
            their_grads = {n: g.double() for n, g in transformers_gradients(theirs, shape).items()}
            # Theirs is CE0 + CEd, the blog's formula half of it.
            assert_same((2 * loss, {n: 2 * g for n, g in grads.items()}), (float(their_loss), their_grads), 1e-6, 1e-5)


@pytest.mark.parametrize("forward", [csm_fast.forward, CSM.forward], ids=["bound", "method"])
def test_bf16_autocast_rounds_no_worse_than_the_blogs(forward):
    model = random_model()
    batch = padded(random_conversations(RAGGED["context turns"]))
    true_loss, true_grads = seeded(model, blog_forward, *batch)
    errors = {}
    for name, run in (("ours", forward), ("blog", blog_forward)):

        def autocast(*args, run=run):
            with torch.autocast("cpu", torch.bfloat16):
                return run(*args)

        loss, grads = seeded(model, autocast, *batch)
        assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())
        flat = torch.cat([grads[n].flatten() for n in grads])
        true_flat = torch.cat([true_grads[n].flatten() for n in grads])
        errors[name] = (abs(loss - true_loss) / true_loss, relative(flat, true_flat))
        each = {n: relative(grads[n], true_grads[n]) for n in grads}
        errors[name] += (max(each.values()),)
    for ours, theirs, floor in zip(errors["ours"], errors["blog"], (2e-3, 1e-2, 3e-2), strict=True):
        assert ours <= max(2 * theirs, floor), errors


def test_forward_returns_float32_from_bf16_weights():
    model = random_model(dtype=torch.bfloat16)
    batch = padded(random_conversations(RAGGED["many clips"]))
    loss, _ = seeded(model, csm_fast.forward, *batch)
    torch.manual_seed(7)
    assert csm_fast.forward(model, *batch).dtype == torch.float32
    true_loss, _ = seeded(random_model(), blog_forward, *batch)
    assert abs(loss - true_loss) < 0.02 * true_loss


def test_fewer_frames_than_the_fraction_select_one():
    """The blog's forward gives NaN here."""
    model = random_model(dtype=torch.float64)
    conversations = random_conversations([[(3, 4, 0)], [(2, 0, 0)]])
    batch = padded(conversations)
    torch.manual_seed(7)
    picked = torch.randperm(6)[:1].tolist()
    want = backward(model, one_by_one(model, conversations, 0.5, 0.5, picked=picked))
    assert_same(seeded(model, csm_fast.forward, *batch), want, 1e-12, 1e-10)


def test_audio_first_rows_have_no_predictor():
    """The blog's roll would take the prediction from the row's last column."""
    model = random_model(dtype=torch.float64)
    conversations = random_conversations([[(0, 5, 0), (3, 4, 1)], [(0, 0, 0)], [(0, 1, 0)], [(4, 9, 0)]])
    model.amortization_fraction = 1.0
    frames = 5 + 5 + 1 + 10
    want = backward(model, one_by_one(model, conversations, 0.5, 0.5, picked=range(frames)))
    assert_same(seeded(model, csm_fast.forward, *padded(conversations)), want, 1e-12, 1e-10)


def test_padding_may_lie_anywhere():
    model = random_model(dtype=torch.float64)
    conversations = random_conversations(RAGGED["context turns"])
    tokens, mask = padded(conversations)
    want = seeded(model, csm_fast.forward, tokens, mask)
    assert_same(seeded(model, csm_fast.forward, *padded(conversations, left=True)), want, 1e-13, 1e-11)
    kept = (torch.arange(100) % 7 < 6).nonzero().squeeze(1)[: tokens.shape[1]]  # every seventh column is empty
    holes = tokens.new_zeros(len(tokens), 100, 7), mask.new_zeros(len(tokens), 100, 7)
    holes[0][:, kept], holes[1][:, kept] = tokens, mask
    assert_same(seeded(model, csm_fast.forward, *holes), want, 1e-13, 1e-11)
    empty_row = (torch.cat([tokens[:1] * 0, tokens]), torch.cat([mask[:1] & False, mask]))
    assert_same(seeded(model, csm_fast.forward, *empty_row), want, 1e-13, 1e-11)


def test_no_audio_at_all_is_zero_not_nan():
    model = random_model()
    tokens, mask = padded(random_conversations([[(6, 0, 0)]]))
    loss, grads = seeded(model, csm_fast.forward, tokens[:, :-1], mask[:, :-1])  # without the EOS row
    assert loss == 0
    assert all((g == 0).all() for g in grads.values())


@pytest.mark.parametrize("case", ["both", "part", "empty", "shape", "long"])
def test_rows_that_are_no_rows_are_refused(case):
    model = random_model()
    tokens, mask = padded(random_conversations([[(4, 6, 0)]]))
    if case == "both":
        mask[0, 6] = True
    elif case == "part":
        mask[0, 6, 2] = False
    elif case == "empty":
        mask[:] = False
    elif case == "shape":
        tokens = tokens[:, 1:]
    else:
        tokens, mask = tokens.repeat(1, 200, 1), mask.repeat(1, 200, 1)
    with pytest.raises(ValueError):
        csm_fast.forward(model, tokens, mask)


@pytest.mark.parametrize("choice", ["selective", "full", True])
def test_activation_checkpointing_changes_nothing(choice):
    model = random_model()
    batch = padded(random_conversations(RAGGED["context turns"]))
    plain = seeded(model, csm_fast.forward, *batch)
    model.activation_checkpointing = choice
    again = seeded(model, csm_fast.forward, *batch)
    assert plain[0] == again[0]
    assert all(torch.equal(plain[1][n], again[1][n]) for n in plain[1])


# ------------------------------------------------------------------- a tree that only has torchtune's attribute names


class TuneRope(nn.Module):
    def __init__(self, c: TransformerConfig):
        super().__init__()
        self.dim, self.max_seq_len, self.base = c.head_dim, c.max_seq_len, int(c.rope_base)
        self.scale_factor, self.old_context_len = int(c.rope_scale_factor), c.rope_old_context_len
        self.low_freq_factor, self.high_freq_factor = int(c.rope_low_freq_factor), int(c.rope_high_freq_factor)


class TuneNorm(nn.Module):
    def __init__(self, c: TransformerConfig):
        super().__init__()
        self.eps, self.scale = c.norm_eps, nn.Parameter(torch.ones(c.embed_dim))


def _tune_layer(c: TransformerConfig) -> nn.Module:
    layer: Any = nn.Module()
    layer.attn, layer.mlp = nn.Module(), nn.Module()
    layer.attn.num_heads, layer.attn.num_kv_heads = c.num_heads, c.num_kv_heads
    layer.attn.head_dim, layer.attn.pos_embeddings = c.head_dim, TuneRope(c)
    kv = c.num_kv_heads * c.head_dim
    for name, width in (("q_proj", c.embed_dim), ("k_proj", kv), ("v_proj", kv), ("output_proj", c.embed_dim)):
        setattr(layer.attn, name, nn.Linear(c.embed_dim, width, bias=False))
    layer.mlp.w1 = nn.Linear(c.embed_dim, c.intermediate_dim, bias=False)
    layer.mlp.w2 = nn.Linear(c.intermediate_dim, c.embed_dim, bias=False)
    layer.mlp.w3 = nn.Linear(c.embed_dim, c.intermediate_dim, bias=False)
    layer.sa_norm, layer.mlp_norm = TuneNorm(c), TuneNorm(c)
    return layer


def _tune_model(config: CSMConfig) -> nn.Module:
    model: Any = nn.Module()
    for name, c in (("backbone", config.backbone), ("decoder", config.decoder)):
        stack: Any = nn.Module()
        stack.layers, stack.norm = nn.ModuleList(_tune_layer(c) for _ in range(c.num_layers)), TuneNorm(c)
        stack.max_seq_len = c.max_seq_len
        setattr(model, name, stack)
    width = config.backbone.embed_dim
    model.text_embeddings = nn.Embedding(config.text_vocab_size, width)
    model.audio_embeddings = nn.Embedding(config.audio_vocab_size * config.num_codebooks, width)
    model.projection = nn.Linear(width, config.decoder.embed_dim, bias=False)
    model.codebook0_head = nn.Linear(width, config.audio_vocab_size, bias=False)
    model.audio_head = nn.Parameter(
        torch.empty(config.num_codebooks - 1, config.decoder.embed_dim, config.audio_vocab_size)
    )
    return model


def test_forward_binds_to_any_module_with_sesames_tree():
    ours = random_model()
    other: Any = _tune_model(MICRO)
    other.load_state_dict(ours.state_dict())
    assert model_config(other) == MICRO
    batch = padded(random_conversations(RAGGED["context turns"]))
    other.forward = types.MethodType(csm_fast.forward, other)
    other.decoder_loss_weight = ours.decoder_loss_weight = 0.3
    want = seeded(ours, csm_fast.forward, *batch)
    assert_same(seeded(other, lambda model, *args: model(*args), *batch), want, 0, 0)


def test_unreadable_rotary_module_is_refused():
    other: Any = _tune_model(MICRO)
    other.backbone.layers[0].attn.pos_embeddings = nn.Identity()
    with pytest.raises(ValueError, match="rotary"):
        csm_fast.forward(other, *padded(random_conversations([[(3, 4, 0)]])))
