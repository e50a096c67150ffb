"""Small models, conversations and comparisons that the parity tests share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common.baselines import causal, depth_logits, embed_all, padded_stack
from csm_fast import CSM, CSMConfig, TransformerConfig
from csm_fast.packing.draws import Purpose, make_step_keys

MICRO = CSMConfig(
    TransformerConfig(2, 4, 2, 64, 96),
    TransformerConfig(2, 2, 1, 32, 64),
    text_vocab_size=50,
    audio_vocab_size=21,
    num_codebooks=6,
)

# The same with heads of a width that the depth decoder's kernels know.
MICRO_32 = dataclasses.replace(MICRO, decoder=TransformerConfig(2, 2, 1, 64, 64))


def fill(model: nn.Module, scale: float = 1.0, seed: int = 0) -> nn.Module:
    """Weights large enough for attention to be sharp, so that a wrong rotation or mask shows; uneven norms."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.copy_(1 + torch.rand(p.shape, generator=generator))
            else:
                p.copy_(torch.randn(p.shape, generator=generator) * scale / p.shape[-1] ** 0.5)
    return model


def random_model(config: CSMConfig = MICRO, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> CSM:
    return fill(CSM(config), scale).to(dtype)  # type: ignore[return-value]


@dataclass
class Turn:
    text: np.ndarray
    codes: np.ndarray
    speaker: int


def random_conversations(spec, config: CSMConfig = MICRO, seed: int = 0) -> list[list[Turn]]:
    """``spec``: conversations of turns of (text rows, audio frames, speaker)."""
    rng = np.random.default_rng(seed)
    return [
        [
            Turn(
                rng.integers(0, config.text_vocab_size, text).astype(np.int32),
                rng.integers(0, config.audio_vocab_size, (frames, config.num_codebooks)).astype(np.uint16),
                speaker,
            )
            for text, frames, speaker in turns
        ]
        for turns in spec
    ]


class MemoryStore:
    """What ``Packer`` needs of a token store, in memory."""

    def __init__(self, conversations: list[list[Turn]], num_codebooks: int = MICRO.num_codebooks):
        self.conversations, self.num_codebooks = conversations, num_codebooks
        self.num_conversations = len(conversations)

    def conversation(self, i: int) -> list[Turn]:
        return self.conversations[i]

    def turn_lengths(self):
        turns = [(i, t) for i, c in enumerate(self.conversations) for t in c]
        columns = ([len(t.text) for _, t in turns], [len(t.codes) for _, t in turns], [t.speaker for _, t in turns])
        return *(np.array(c, dtype=np.int64) for c in columns), np.array([i for i, _ in turns])


def rows_of(conversation: list[Turn]) -> tuple[Tensor, Tensor]:
    """tokens and mask [n, K + 1] of one conversation, as Sesame lays it out."""
    tokens, masks = [], []
    for turn in conversation:
        text = F.pad(torch.from_numpy(turn.text.astype(np.int64))[:, None], (turn.codes.shape[1], 0))
        codes = F.pad(torch.from_numpy(turn.codes.astype(np.int64)), (0, 1, 0, 1))  # a text column and the EOS row
        is_text = torch.arange(text.shape[1]) == text.shape[1] - 1
        tokens += [text, codes]
        masks += [is_text.expand(len(text), -1), (~is_text).expand(len(codes), -1)]
    return torch.cat(tokens), torch.cat(masks)


def padded(conversations: list[list[Turn]], left: bool = False) -> tuple[Tensor, Tensor]:
    """tokens and mask [B, S, K + 1]."""
    rows = [rows_of(c) for c in conversations]
    longest = max(len(t) for t, _ in rows)

    def pad(x: Tensor) -> Tensor:
        missing = longest - len(x)
        return F.pad(x, (0, 0, missing, 0) if left else (0, 0, 0, missing))

    return torch.stack([pad(t) for t, _ in rows]), torch.stack([pad(m) for _, m in rows])


def one_by_one(
    model: CSM, conversations, a: float, b: float, *, masked=(), eos_weight=1.0, fraction=1 / 16, picked=None
) -> Tensor:
    """``a CE0 + b CEd`` of an optimizer step from its definition: a conversation, then a frame, at a time.

    ``picked``: which supervised frames the depth decoder sees, by default those that ``Packer`` draws for seed 0,
    epoch 0, step 0.
    """
    states, frames, weights = [], [], []
    for conversation in conversations:
        tokens, mask = rows_of(conversation)
        n = len(tokens)
        x = (embed_all(model, tokens) * mask.unsqueeze(-1)).sum(1)
        hidden = padded_stack(model.backbone, x.unsqueeze(0), causal(n).unsqueeze(0))[0]
        row = 0
        for turn in conversation:
            row += len(turn.text)
            for frame in range(len(turn.codes) + 1):
                if turn.speaker not in masked and row > 0:
                    states.append(hidden[row - 1])
                    frames.append(tokens[row, :-1])
                    weights.append(eos_weight if frame == len(turn.codes) else 1.0)
                row += 1
    if not frames:
        return sum(p.sum() for p in model.parameters()) * 0.0  # type: ignore[return-value]
    if picked is None:
        wanted = max(1, int(len(frames) * fraction))
        numbers = make_step_keys(0, Purpose.FRAMES, 0)(np.array([0]), np.array([len(frames)]))
        picked = np.argsort(numbers, kind="stable")[:wanted]
    total, picked_total = sum(weights), sum(weights[i] for i in picked)
    loss = torch.zeros((), dtype=states[0].dtype)
    for state, frame, weight in zip(states, frames, weights, strict=True):
        loss = loss + a * weight / total * F.cross_entropy(model.codebook0_head(state), frame[0])
    for i in picked:
        logits = depth_logits(model, states[i].unsqueeze(0), frames[i].unsqueeze(0))[0]
        loss = loss + b * weights[i] / picked_total * F.cross_entropy(logits, frames[i][1:])
    return loss


def backward(model: nn.Module, loss: Tensor) -> tuple[float, dict[str, Tensor]]:
    """The loss and every parameter's gradient in float64; zeros where there is none."""
    model.zero_grad()
    loss.backward()
    grads = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in model.named_parameters()}
    return float(loss.detach()), {n: g.double().clone() for n, g in grads.items()}


def seeded(model: nn.Module, forward, *batch, seed: int = 7) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of ``forward(model, *batch)`` under a fixed torch seed."""
    torch.manual_seed(seed)
    return backward(model, forward(model, *batch))


def relative(got: Tensor, want: Tensor, floor: float = 0.0) -> float:
    """Norm of the difference over the norm of what is wanted, or over ``floor`` where that is more."""
    return float((got - want).norm() / max(float(want.norm()), floor, 1e-300))


def assert_same(got, want, loss_tolerance: float, gradient_tolerance: float) -> tuple[float, float]:
    """Compare (loss, gradients) pairs by name; returns the two relative errors.

    A gradient 1e-5 of the whole one's norm is zero but for rounding (a query that sees one key), so errors are
    relative to no less than that.
    """
    (loss, grads), (true_loss, true_grads) = got, want
    loss_error = abs(loss - true_loss) / max(abs(true_loss), 1e-300)
    assert loss_error <= loss_tolerance, (loss, true_loss)
    assert grads.keys() == true_grads.keys()
    floor = 1e-5 * sum(float(g.norm()) ** 2 for g in true_grads.values()) ** 0.5
    errors = {name: relative(grads[name], true_grads[name], floor) for name in grads}
    worst = max(errors, key=lambda n: errors[n])
    assert errors[worst] <= gradient_tolerance, f"gradient of {worst}: {errors[worst]:.2e}"
    return loss_error, errors[worst]


# No two widths are alike, so that a shape says what it is.
TINY = CSMConfig(
    TransformerConfig(2, 4, 2, 48, 80),
    TransformerConfig(2, 2, 1, 64, 88),  # heads of 32, which the kernels know
    text_vocab_size=90,
    audio_vocab_size=70,
    num_codebooks=6,
)


def one_layer(config: CSMConfig) -> CSMConfig:
    """Layers repeat: one of each stack allocates in every way that sixteen do."""
    backbone, decoder = (dataclasses.replace(stack, num_layers=1) for stack in (config.backbone, config.decoder))
    return dataclasses.replace(config, backbone=backbone, decoder=decoder)


def quick_model(config: CSMConfig, dtype: torch.dtype) -> CSM:
    """Random weights that repeat every 2**18 values: drawing csm-1b's would take longer than the test."""
    with torch.device("meta"):
        model = CSM(config).to(dtype)
    model = model.to_empty(device="cpu")
    block = (torch.randn(2**18, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            for piece in p.view(-1).split(len(block)):
                piece.copy_(block[: len(piece)])
            if p.dim() == 1:
                p.fill_(1)
    return model
