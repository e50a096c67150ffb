"""CSM's module tree, with exactly Sesame's parameter names, and the packed forward of its two stacks.

The functions below take modules, not configurations: they run on ``CSM`` and on any module with the same tree, such
as Sesame's own ``Model`` built from torchtune. Head counts, epsilons and rotary parameters are not in the weights, so
they are read from the modules.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from csm_fast import ops
from csm_fast.config.shape import CSMConfig, TransformerConfig
from csm_fast.model import layer_cpu
from csm_fast.model.rope import RopeSpec, apply_rope, packed_attention, rope_table
from csm_fast.packing.pack import Segments

Attend = Callable[[int, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def _bare(kind: type[nn.Module], *shape: int, **settings: Any) -> Any:
    """A module with storage for its parameters and no values: PyTorch's take a quarter of a minute for csm-1b, and are
    overwritten. On the device that is the default, "meta" too."""
    return nn.utils.skip_init(kind, *shape, device=torch.get_default_device(), **settings)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    return _bare(nn.Linear, inputs, outputs, bias=False)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(dim))


class Attention(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.rope = RopeSpec(
            config.head_dim,
            config.rope_base,
            config.rope_scale_factor,
            config.rope_low_freq_factor,
            config.rope_high_freq_factor,
            config.rope_old_context_len,
        )
        kv_dim = config.num_kv_heads * config.head_dim
        self.q_proj = _linear(config.embed_dim, config.embed_dim)
        self.k_proj = _linear(config.embed_dim, kv_dim)
        self.v_proj = _linear(config.embed_dim, kv_dim)
        self.output_proj = _linear(config.embed_dim, config.embed_dim)


class FeedForward(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.w1 = _linear(config.embed_dim, config.intermediate_dim)
        self.w2 = _linear(config.intermediate_dim, config.embed_dim)
        self.w3 = _linear(config.embed_dim, config.intermediate_dim)


class Layer(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.attn = Attention(config)
        self.mlp = FeedForward(config)
        self.sa_norm = RMSNorm(config.embed_dim, config.norm_eps)
        self.mlp_norm = RMSNorm(config.embed_dim, config.norm_eps)


class Transformer(nn.Module):
    """Parameters of one Llama stack; ``run_stack`` computes with it."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.max_seq_len = config.max_seq_len
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.embed_dim, config.norm_eps)


class CSM(nn.Module):
    """Sesame's Conversational Speech Model.

    ``forward(tokens, tokens_mask)`` is the drop-in training forward (``csm_fast.forward``). Parameters are
    uninitialised storage until ``init_weights`` or a checkpoint fills them.
    """

    def __init__(self, config: CSMConfig):
        super().__init__()
        self.config = config
        width = config.backbone.embed_dim
        self.backbone = Transformer(config.backbone)
        self.decoder = Transformer(config.decoder)
        self.text_embeddings = _bare(nn.Embedding, config.text_vocab_size, width)
        self.audio_embeddings = _bare(nn.Embedding, config.audio_vocab_size * config.num_codebooks, width)
        self.projection = _linear(width, config.decoder.embed_dim)
        self.codebook0_head = _linear(width, config.audio_vocab_size)
        self.audio_head = nn.Parameter(
            torch.empty(config.num_codebooks - 1, config.decoder.embed_dim, config.audio_vocab_size)
        )
        self.activation_checkpointing = "off"  # "selective", "full"

    def forward(self, tokens: Tensor, tokens_mask: Tensor) -> Tensor:
        from csm_fast.model.loss import forward

        return forward(self, tokens, tokens_mask)

    @torch.no_grad()
    def init_weights(self, seed: int = 0, on_device: bool = False) -> CSM:
        """Fill every parameter for training from scratch, as a pure function of ``seed`` and the shapes.

        Llama's recipe: normal(0, 0.02) for matrices and embeddings, with the projections that write into the
        residual stream scaled by 1/sqrt(2 layers) (GPT-2), and ones for norms. Drawn on the CPU in float32, so that
        every device starts from the same numbers; ``on_device`` where the parameters are, other numbers in less time.
        """
        source = self.audio_head.device if on_device else torch.device("cpu")
        generator = torch.Generator(source).manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith(".scale"):
                parameter.fill_(1.0)
                continue
            std = 0.02
            if name.endswith(("output_proj.weight", "w2.weight")):
                stack = self.config.backbone if name.startswith("backbone") else self.config.decoder
                std /= (2 * stack.num_layers) ** 0.5
            values = torch.empty(parameter.shape, dtype=torch.float32, device=source)
            values.normal_(0.0, std, generator=generator)
            parameter.copy_(values)
        return self


# ------------------------------------------------------------------------------------------------ stacks and rows


def rope_spec(attn: Any) -> RopeSpec:
    """Rotary parameters of an attention module: ours, or torchtune's ``pos_embeddings``.

    Raises:
        ValueError: a rotary module without torchtune's attribute names.
    """
    if isinstance(getattr(attn, "rope", None), RopeSpec):
        return attn.rope
    rope = attn.pos_embeddings
    if not hasattr(rope, "base") or not hasattr(rope, "dim"):
        raise ValueError(f"cannot read the rotary parameters of {type(rope).__name__}")
    if not hasattr(rope, "scale_factor"):
        return RopeSpec(rope.dim, float(rope.base))
    return RopeSpec(
        rope.dim,
        float(rope.base),
        float(rope.scale_factor),
        float(getattr(rope, "low_freq_factor", 1)),
        float(getattr(rope, "high_freq_factor", 4)),
        int(getattr(rope, "old_context_len", 8192)),
    )


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Where norms, rotations and softmax are computed: float64 for float64 models, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rms_norm(norm: Any, x: Tensor) -> Tensor:
    """RMS norm of ``x`` over its last dimension in the wide dtype, rounded to ``x``'s dtype, then scaled."""
    return ops.rms_norm(x, norm.scale, norm.eps)


def run_layer(
    layer: Any,
    index: int,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    attend: Attend,
    recompute_mlp: bool = False,
    rows: Tensor | None = None,
) -> Tensor:
    """One pre-norm Llama layer.

    ``x``: [..., D]; ``attend(index, q, k, v, cos, sin)`` rotates and attends [..., heads, head_dim];
    ``recompute_mlp``: the MLP keeps its input only, and runs again in the backward pass; ``rows``: [A], of x [T, D],
    the rows that are wanted: the others serve as keys and values only.
    """
    if layer_cpu.serves(layer, x, attend):
        return layer_cpu.run(layer, x, cos, sin, attend, recompute_mlp, rows)
    attn = layer.attn
    y = rms_norm(layer.sa_norm, x)
    q = attn.q_proj(y).unflatten(-1, (attn.num_heads, attn.head_dim))
    k = attn.k_proj(y).unflatten(-1, (attn.num_kv_heads, attn.head_dim))
    v = attn.v_proj(y).unflatten(-1, (attn.num_kv_heads, attn.head_dim))
    attended = attend(index, q, k, v, cos, sin).flatten(-2)
    if rows is not None:
        x, attended = x.index_select(0, rows), attended.index_select(0, rows)
    x = x + attn.output_proj(attended)
    return x + (checkpoint(_mlp, layer, x, use_reentrant=False) if recompute_mlp else _mlp(layer, x))


def _mlp(layer: Any, x: Tensor) -> Tensor:
    mlp, y = layer.mlp, rms_norm(layer.mlp_norm, x)
    return mlp.w2(F.silu(mlp.w1(y)) * mlp.w3(y))


def run_stack(
    stack: Any,
    x: Tensor,
    positions: Tensor,
    length: int,
    attend: Attend,
    recompute: str = "off",
    rows: Tensor | None = None,
) -> Tensor:
    """All layers and the final norm.

    Args:
        stack: a module with ``layers`` and ``norm``.
        x: [..., D] inputs.
        positions: integers that index the rotary table, broadcastable to x's leading dimensions.
        length: size of the rotary table; above every position.
        attend: the attention, called with the layer's index, q, k and v before rotation, and the cosines and sines
            of the positions, [..., 1, head_dim / 2]. One with a true attribute ``traceable`` depends on nothing but
            these and tensors that it holds, so a compiled layer may take it in.
        recompute: what runs again in the backward pass so that its activations need not be kept: "off" nothing,
            "selective" the MLP of each layer, 17 of some 23 D per row and half of the time of a layer, "full" all.
        rows: [A], of x [T, D], all different: those whose states are wanted, [A, D]. The last layer takes the others
            as keys and values only, so their part of its output projection and MLP is not computed.
    """
    spec = rope_spec(stack.layers[0].attn)
    cos, sin = (t[positions].unsqueeze(-2) for t in rope_table(spec, length, wide_dtype(x.dtype), x.device))
    # ``compile.compile_layers`` sets ``run_layer`` on a stack. An attention that keeps state stays eager: a cache's.
    run = getattr(stack, "run_layer", run_layer) if getattr(attend, "traceable", False) else run_layer
    recompute = recompute if torch.is_grad_enabled() else "off"
    for index, layer in enumerate(stack.layers):
        some = rows if index == len(stack.layers) - 1 else None
        if recompute == "full":
            x = checkpoint(run, layer, index, x, cos, sin, attend, False, some, use_reentrant=False)
        else:
            x = run(layer, index, x, cos, sin, attend, recompute == "selective", some)
    return rms_norm(stack.norm, x)


@dataclass(frozen=True)
class PackedAttend:
    """The attention of a pack, for ``run_stack``."""

    segments: Segments
    traceable: ClassVar[bool] = True

    def __call__(self, _: int, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return packed_attention(apply_rope(q, cos, sin), apply_rope(k, cos, sin), v, self.segments)

    def order(self, x: Tensor, heads: int, kv_heads: int) -> ops.Order:
        """The segments of ``x``'s rows for ``ops.llama_layer``."""
        return ops.plan_segments(self.segments.cu_seqlens).order(heads, kv_heads)


def run_backbone(model: Any, x: Tensor, positions: Tensor, segments: Segments, rows: Tensor | None = None) -> Tensor:
    """Packed backbone. ``x`` [T, D], ``positions`` [T] restarting per segment -> normed hidden states [T, D], or those
    of ``rows`` [A]."""
    limit, longest = stack_limit(model.backbone), segments.max_seqlen
    length = -(-max(limit, longest) // limit) * limit  # few tables, also where a pack's padding is long
    return run_stack(model.backbone, x, positions, length, PackedAttend(segments), checkpointing(model), rows)


def checkpointing(model: Any) -> str:
    """``model.activation_checkpointing``: "off", "selective" or "full"; booleans mean the ends."""
    asked = getattr(model, "activation_checkpointing", "off")
    return asked if isinstance(asked, str) else ("full" if asked else "off")


@dataclass(frozen=True)
class DepthAttend:
    """The attention of the depth decoder, for ``run_stack``: [M, K, heads, d] -> [M, K, heads, d]."""

    impl: str
    traceable: ClassVar[bool] = True

    def __call__(self, _: int, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return ops.depth_attention(q, k, v, cos.squeeze(-2), sin.squeeze(-2), self.impl)

    def order(self, x: Tensor, heads: int, kv_heads: int) -> ops.Order:
        """The segments of ``x``'s rows for ``ops.llama_layer``."""
        return ops.uniform_order(x.shape[0], x.shape[1], heads, kv_heads)


def projects_table(frames: int, vocab: int) -> bool:
    """Whether the depth decoder reads ``projection(table)`` and not the projection of what it looked up.

    With more look-ups than table rows, (K - 1) frames against (K - 1) V, it is the same product for less work, and the
    [frames, K, D] tensor of embeddings never exists.
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
        embedded: [M, K - 1, D] the audio table's rows of ``codes``, where they were looked up already.

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
    attend = DepthAttend(ops.asked())
    return run_stack(model.decoder, x, positions, num_codebooks, attend, checkpointing(model))[:, 1:]


def stack_limit(stack: Any) -> int:
    """Positions the stack was trained for."""
    return int(getattr(stack, "max_seq_len", 2048))


def vocabulary(model: Any) -> tuple[int, int]:
    """(number of codebooks K, audio vocabulary V), read from the shapes."""
    heads, _, vocab = model.audio_head.shape
    return heads + 1, vocab
