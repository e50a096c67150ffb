"""What the two stacks compute, on ``CSM`` and on any module with Sesame's tree."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from csm_fast import ops
from csm_fast.config.shape import CSMConfig, TransformerConfig
from csm_fast.model import layer_cpu
from csm_fast.model.layer import Attend, Layer, LayerFunction, RMSNorm, call_layer, rms_norm
from csm_fast.model.rope import apply_rope, rope_spec, rope_table
from csm_fast.model.run_options import run_options_of
from csm_fast.packing.pack import Segments


class Transformer(nn.Module):
    """A Llama stack: layers and a final norm."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.max_seq_len = config.max_seq_len
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.embed_dim, config.norm_eps)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        length: int,
        attend: Attend,
        recompute: str = "off",
        rows: Tensor | None = None,
        run: LayerFunction | None = None,
    ) -> Tensor:
        """See ``run_stack``."""
        return run_stack(self, x, positions, length, attend, recompute, rows, run)


def call_stack(stack: Any, *inputs: Any) -> Tensor:
    """Call a ``Transformer`` as a module; compute ``run_stack`` of any other stack, whose ``forward`` means something
    else."""
    return stack(*inputs) if isinstance(stack, Transformer) else run_stack(stack, *inputs)


def run_stack(
    stack: Any,
    x: Tensor,
    positions: Tensor,
    length: int,
    attend: Attend,
    recompute: str = "off",
    rows: Tensor | None = None,
    run: LayerFunction | None = None,
) -> Tensor:
    """All layers and the final norm.

    Args:
        stack: a module with ``layers`` and ``norm``.
        x: [..., D] inputs.
        positions: integers that index the rotary table, broadcastable to x's leading dimensions.
        length: size of the rotary table; above every position.
        attend: the attention, called with the layer's index, q, k and v before rotation, and the cosines and sines
            of the positions, [..., 1, head_dim / 2].
        recompute: what runs again in the backward pass, so that its activations need not be kept: nothing for "off";
            for "selective" the MLP of each layer, 17 of about 23 D per row and half of a layer's time; all for "full".
        rows: [A], all different: the rows of x [T, D] whose states are wanted. The last layer uses the others as keys
            and values only, and skips their part of its output projection and MLP.
        run: a compiled form of ``run_layer``. Its ``attend`` may depend on nothing but its arguments and tensors that
            it holds, so attention with a cache runs eagerly.

    Returns:
        [..., D], or [A, D].
    """
    spec = rope_spec(stack.layers[0].attn)
    cos, sin = (t[positions].unsqueeze(-2) for t in rope_table(spec, length, ops.wide_dtype(x.dtype), x.device))
    recompute = recompute if torch.is_grad_enabled() else "off"
    for index, layer in enumerate(stack.layers):
        some = rows if index == len(stack.layers) - 1 else None
        x = call_layer(layer, index, x, cos, sin, attend, recompute, some, run)
    return rms_norm(stack.norm, x)


@dataclass(frozen=True)
class PackedAttend:
    """The attention of a pack, for ``run_stack``."""

    segments: Segments

    def __call__(self, _: int, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return packed_attention(apply_rope(q, cos, sin), apply_rope(k, cos, sin), v, self.segments)

    def order(self, x: Tensor, heads: int, kv_heads: int) -> ops.Order:
        """Where the segments of ``x``'s rows lie, for ``ops.llama_layer``."""
        return ops.plan_segments(self.segments.cu_seqlens).order(heads, kv_heads)


def run_backbone(model: Any, x: Tensor, positions: Tensor, segments: Segments, rows: Tensor | None = None) -> Tensor:
    """The backbone's normed hidden states [T, D] of a pack, or [A, D] of ``rows`` [A].

    ``x``: [T, D]; ``positions``: [T], restarting at 0 in each segment.
    """
    limit, longest = stack_limit(model.backbone), segments.max_seqlen
    length = -(-max(limit, longest) // limit) * limit  # multiples of the limit: few tables, even for long padding
    attend, options = PackedAttend(segments), run_options_of(model)
    return call_stack(model.backbone, x, positions, length, attend, options.recompute, rows, options.backbone_layer)


@dataclass(frozen=True)
class DepthAttend:
    """The attention of the depth decoder, for ``run_stack``: [M, K, heads, d] -> [M, K, heads, d]."""

    impl: str

    def __call__(self, _: int, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return ops.depth_attention(q, k, v, cos.squeeze(-2), sin.squeeze(-2), self.impl)

    def order(self, x: Tensor, heads: int, kv_heads: int) -> ops.Order:
        """Where the segments of ``x``'s rows lie, for ``ops.llama_layer``."""
        return ops.uniform_order(x.shape[0], x.shape[1], heads, kv_heads)


def projects_table(frames: int, vocab: int) -> bool:
    """Whether the depth decoder projects the table before the look-up, and not the embeddings after it.

    With more look-ups than rows of the table, (K - 1) frames against (K - 1) V, this is less work with the same result,
    and the embeddings [frames, K, D] are never stored.
    """
    return frames > vocab


def run_decoder(model: Any, hidden: Tensor, codes: Tensor, vocab: int, embedded: Tensor | None = None) -> Tensor:
    """Teacher-forced depth decoder.

    Position 0 sees the backbone's state, position i the embedding of code i-1, both through ``projection``; the
    output at position i predicts code i (Sesame's ``generate_frame``).

    Args:
        hidden: [M, D] backbone states that predict the frames.
        codes: [M, K] the frames; the last codebook is not an input.
        vocab: audio vocabulary size V.
        embedded: [M, K - 1, D] the audio table's rows of ``codes``, if they were looked up already.

    Returns:
        [M, K - 1, Dd]: normed states that predict codebooks 1..K-1.
    """
    frames, num_codebooks = codes.shape
    if embedded is not None:
        projected = layer_cpu.project(model.projection, embedded)
    else:
        index = codes[:, :-1] + torch.arange(num_codebooks - 1, device=codes.device) * vocab
        table = model.audio_embeddings.weight
        if projects_table(frames, vocab):
            projected = F.embedding(index, layer_cpu.project(model.projection, table[: (num_codebooks - 1) * vocab]))
        else:
            projected = layer_cpu.project(model.projection, F.embedding(index, table))
    x = torch.cat([layer_cpu.project(model.projection, hidden).unsqueeze(1), projected], dim=1)
    positions = torch.arange(num_codebooks, device=codes.device)
    attend, options = DepthAttend(ops.asked()), run_options_of(model)
    states = call_stack(
        model.decoder, x, positions, num_codebooks, attend, options.recompute, None, options.decoder_layer
    )
    return states[:, 1:]


def stack_limit(stack: Any) -> int:
    """Positions that the stack was trained for."""
    return int(getattr(stack, "max_seq_len", 2048))


def vocabulary(model: Any) -> tuple[int, int]:
    """(number of codebooks K, audio vocabulary V), read from the shapes."""
    heads, _, vocab = model.audio_head.shape
    return heads + 1, vocab


def model_config(model: nn.Module) -> CSMConfig:
    """The shape of a ``CSM``, or of any module with Sesame's tree (read from its modules and weights)."""
    config = getattr(model, "config", None)
    if isinstance(config, CSMConfig):
        return config
    tree: Any = model
    num_codebooks, vocab = vocabulary(tree)
    return CSMConfig(
        _stack_config(tree.backbone),
        _stack_config(tree.decoder),
        tree.text_embeddings.weight.shape[0],
        vocab,
        num_codebooks,
    )


def _stack_config(stack: Any) -> TransformerConfig:
    attn, spec = stack.layers[0].attn, rope_spec(stack.layers[0].attn)
    return TransformerConfig(
        len(stack.layers),
        attn.num_heads,
        attn.num_kv_heads,
        attn.q_proj.weight.shape[1],
        stack.layers[0].mlp.w1.weight.shape[0],
        stack_limit(stack),
        stack.norm.eps,
        *dataclasses.astuple(spec)[1:],
    )


def packed_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """Causal self-attention inside each segment, grouped-query.

    Args:
        q: [T, H, d].  k, v: [T, Hkv, d], with H a multiple of Hkv.
        segments: the pack's layout; sums to T.

    Returns:
        [T, H, d], scaled by 1/sqrt(d).
    """
    return ops.packed_attention(q, k, v, segments.cu_seqlens, segments.max_seqlen)
