"""How others compute a CSM's training loss, written independently of ``csm_fast``'s packed code.

``blog_forward`` is the padded forward that the Speechmatics blog post published and sesame-finetune trains with;
``transformers_loss`` calls transformers' ``CsmForConditionalGeneration``. Tests use both as the expected values, and
benchmarks compare with them.
"""

from __future__ import annotations

import math
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from csm_fast.config.shape import CSMConfig
from csm_fast.weights.config_json import transformers_config
from csm_fast.weights.names import sesame_to_transformers, transformers_to_sesame

# ------------------------------------------------------------------------------------------- a plain, padded Llama


def rotations(attn: Any, length: int, dtype: torch.dtype) -> Tensor:
    """Unit complex numbers [length, head_dim / 2] of Llama 3.1's scaled rotary embedding."""
    rope = attn.rope if hasattr(attn, "rope") else attn.pos_embeddings
    dim = attn.head_dim
    frequencies = 1.0 / rope.base ** (torch.arange(0, dim, 2).to(dtype) / dim)
    low, high = getattr(rope, "low_freq_factor", 1.0), getattr(rope, "high_freq_factor", 4.0)
    factor, old = getattr(rope, "scale_factor", 1.0), getattr(rope, "old_context_len", 8192)
    if factor != 1:
        wavelengths = 2 * math.pi / frequencies
        share = (old / wavelengths - low) / (high - low)
        between = (1 - share) * frequencies / factor + share * frequencies
        long = torch.where(wavelengths > old / low, frequencies / factor, between)
        frequencies = torch.where(wavelengths < old / high, frequencies, long)
    angles = torch.outer(torch.arange(length).to(dtype), frequencies)
    return torch.polar(torch.ones_like(angles), angles)


def _rotate(x: Tensor, turns: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.to(turns.real.dtype).unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns[: x.shape[1], None]).flatten(-2).to(x.dtype)


def _norm(norm: Any, x: Tensor) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)).to(x.dtype) * norm.scale


def padded_stack(stack: Any, x: Tensor, mask: Tensor) -> Tensor:
    """A Llama stack on a padded batch with a dense attention mask, every row counting positions from 0.

    Args:
        stack: torchtune's ``TransformerDecoder``, which is called itself, or a module with the same tree.
        x: [B, S, D].
        mask: [B, S, S] bool, True where the row may look.
    """
    if hasattr(stack, "tok_embeddings"):
        positions = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        return stack(x, input_pos=positions, mask=mask)
    attn = stack.layers[0].attn
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    turns = rotations(attn, x.shape[1], wide).to(x.device)
    for layer in stack.layers:
        attn, y = layer.attn, _norm(layer.sa_norm, x)
        q = _rotate(attn.q_proj(y).unflatten(-1, (attn.num_heads, -1)), turns)
        k = _rotate(attn.k_proj(y).unflatten(-1, (attn.num_kv_heads, -1)), turns)
        v = attn.v_proj(y).unflatten(-1, (attn.num_kv_heads, -1))
        k, v = (t.repeat_interleave(attn.num_heads // attn.num_kv_heads, dim=2) for t in (k, v))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.unsqueeze(1))
        x = x + attn.output_proj(seen.transpose(1, 2).flatten(-2))
        y = _norm(layer.mlp_norm, x)
        x = x + layer.mlp.w2(F.silu(layer.mlp.w1(y)) * layer.mlp.w3(y))
    return _norm(stack.norm, x)


def causal(rows: int, device: Any = None) -> Tensor:
    return torch.ones(rows, rows, dtype=torch.bool, device=device).tril()


# ------------------------------------------------------------------------------------------------------- the blog


def embed_all(model: Any, tokens: Tensor) -> Tensor:
    """Every embedding of every row, live or not: [B, S, K + 1, D]."""
    num_codebooks = tokens.shape[-1] - 1
    vocab = model.audio_embeddings.weight.shape[0] // num_codebooks
    shifted = tokens[..., :-1] + vocab * torch.arange(num_codebooks, device=tokens.device)
    return torch.cat([model.audio_embeddings(shifted), model.text_embeddings(tokens[..., -1:])], dim=-2)


def depth_logits(model: Any, states: Tensor, codes: Tensor) -> Tensor:
    """Teacher-forced depth decoder: backbone states [M, D] and frames [M, K] -> logits [M, K - 1, V]."""
    embedded = embed_all(model, F.pad(codes, (0, 1)).unsqueeze(1))[:, 0, :-2]
    x = model.projection(torch.cat([states.unsqueeze(1), embedded], dim=1))
    hidden = padded_stack(model.decoder, x, causal(x.shape[1], x.device).expand(x.shape[0], -1, -1))
    return torch.einsum("msd,sdv->msv", hidden[:, 1:], model.audio_head)


def blog_forward(self: Any, tokens: Tensor, tokens_mask: Tensor) -> Tensor:
    """The blog's training forward: ``(1 - w) CE0 + w CEd`` on a right-padded batch.

    Reads ``decoder_loss_weight`` (0.5) and ``amortization_fraction`` (1/16) from the module. As published: rows must
    begin with text, and fewer frames than 1/fraction select none and give NaN.

    Args:
        self: a module with Sesame's tree (bind it with ``types.MethodType``, or pass the module).
        tokens, tokens_mask: [B, S, K + 1].
    """
    w, fraction = getattr(self, "decoder_loss_weight", 0.5), getattr(self, "amortization_fraction", 1 / 16)
    dtype = next(self.parameters()).dtype
    audio = tokens_mask[..., 0]
    live = audio | tokens_mask[..., -1]
    embedded = embed_all(self, tokens)
    x = (embedded * tokens_mask.unsqueeze(-1)).sum(2)
    rows = tokens.shape[1]
    itself = torch.eye(rows, dtype=torch.bool, device=x.device)  # a padding row sees itself: a softmax needs a column
    mask = causal(rows, x.device) & live.unsqueeze(1) & live.unsqueeze(2) | itself
    hidden = padded_stack(self.backbone, x, mask).to(dtype)[torch.roll(audio, -1, 1)]
    frames = tokens[audio][:, :-1]
    loss0 = F.cross_entropy(self.codebook0_head(hidden), frames[:, 0])
    picked = torch.randperm(frames.shape[0])[: int(frames.shape[0] * fraction)]
    inputs = torch.cat([hidden[picked].unsqueeze(1), embedded[:, :, :-1][audio][picked][:, :-1]], dim=1)
    square = causal(inputs.shape[1], x.device).expand(inputs.shape[0], -1, -1)
    states = padded_stack(self.decoder, self.projection(inputs), square).to(dtype)
    logits = torch.einsum("msd,sdv->msv", states[:, 1:], self.audio_head)
    lossd = F.cross_entropy(logits.flatten(0, 1), frames[picked][:, 1:].flatten())
    return (1 - w) * loss0 + w * lossd


def bind(model: nn.Module, forward: Any) -> nn.Module:
    """``model`` with ``forward`` as its training forward, bound as users of the blog bind it."""
    model.forward = types.MethodType(forward, model)
    return model


# --------------------------------------------------------------------------------------------------- transformers

# A codec as small as transformers allows: training from tokens does not use it.
NO_CODEC = dict(
    model_type="mimi", hidden_size=8, num_filters=2, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
    head_dim=8, intermediate_size=8, codebook_size=8, codebook_dim=8, vector_quantization_hidden_dimension=8,
    num_quantizers=2, num_semantic_quantizers=1, upsampling_ratios=[2], upsample_groups=1, sliding_window=8,
)  # fmt: skip


def transformers_model(config: CSMConfig, state: dict[str, Tensor]) -> nn.Module:
    """transformers' ``CsmForConditionalGeneration`` with the weights of ``state`` (Sesame's names)."""
    from transformers import CsmConfig, CsmForConditionalGeneration

    # transformers checks its special ids against the vocabulary; none of them is used here.
    special: dict[str, Any] = dict(pad_token_id=0, bos_token_id=0, audio_token_id=0, audio_eos_token_id=0)
    shape = CsmConfig(**transformers_config(config), **special, codec_config=NO_CODEC)
    with next(iter(state.values())).device:  # drawing the first values on the CPU takes long
        model: Any = CsmForConditionalGeneration(shape)
    result = model.load_state_dict(sesame_to_transformers(state, config), strict=False)
    left = [n for n in result.missing_keys if not n.startswith("codec_model.")] + result.unexpected_keys
    if left:
        raise RuntimeError(f"conversion to transformers leaves {left[:3]} ({len(left)} in all)")
    return model.to(next(iter(state.values())).dtype)


def transformers_loss(model: Any, tokens: Tensor, tokens_mask: Tensor, fraction: float = 1 / 16) -> Tensor:
    """CE0 + CEd by transformers, the depth decoder on the frames that the blog's forward draws from the same seed.

    transformers expands 2-D labels only when it encodes the audio itself, so this passes the expanded 3-D labels: -100
    outside of audio rows, and -100 for codebooks 1.. of frames outside of the subset (its label -101).

    If as many frames are drawn as there are codebooks, the depth decoder of transformers 5.23 reads its [K] positions
    as one row per frame and fails; this draws one frame less then.
    """
    audio = tokens_mask[..., 0]
    frames = int(audio.sum())
    picked = torch.randperm(frames)[: int(frames * fraction)]
    if len(picked) == tokens.shape[-1] - 1:
        picked = picked[:-1]
    labels = tokens[..., :-1].masked_fill(~audio.unsqueeze(-1), -100)
    kept = torch.zeros(frames, dtype=torch.bool, device=tokens.device)
    kept[picked] = True
    codes = labels[audio]
    codes[~kept, 1:] = -100
    labels[audio] = codes
    text = model.embed_text_tokens(tokens[..., -1])
    embedded = torch.where(audio.unsqueeze(-1), model.backbone_model.embed_tokens(tokens[..., :-1]), text)
    live = tokens_mask.any(-1)
    return model(inputs_embeds=embedded, attention_mask=live, labels=labels, use_cache=False).loss


def transformers_gradients(model: nn.Module, config: CSMConfig) -> dict[str, Tensor]:
    """Gradients under Sesame's names and rotary convention (a permutation, so it maps gradients like weights)."""
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None and not n.startswith("codec_model.")}
    return transformers_to_sesame(grads, config)
