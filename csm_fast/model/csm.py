"""CSM's module tree, with exactly Sesame's parameter names, and the packed forward of its two stacks.

The functions below take modules, not configurations: they run on ``CSM`` and on any module with the same tree, such
as Sesame's own ``Model`` built from torchtune. Head counts, epsilons and rotary parameters are not in the weights, so
they are read from the modules.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from csm_fast.config.shape import CSMConfig, TransformerConfig
from csm_fast.model.rope import RopeSpec


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


def parameter_shapes(config: CSMConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in CSM(config).named_parameters()}
