"""One Llama layer: its modules, with Sesame's parameter names, and what it computes.

``run_layer`` takes any module with this tree, such as a layer of Sesame's own ``Model`` built from torchtune. Head
counts, epsilons and rotary parameters are not in the weights, so they are read from the modules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from csm_fast import ops
from csm_fast.config.shape import TransformerConfig
from csm_fast.model import layer_cpu
from csm_fast.model.rope import RopeSpec

Attend = Callable[[int, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
LayerFunction = Callable[..., Tensor]  # ``run_layer``, or a compiled form of it


def uninitialised(kind: type[nn.Module], *shape: int, **settings: Any) -> Any:
    """A module on the default device ("meta" too) whose parameters are storage without values: PyTorch's initial values
    take a quarter of a minute for csm-1b, and are overwritten."""
    return nn.utils.skip_init(kind, *shape, device=torch.get_default_device(), **settings)


def plain_linear(inputs: int, outputs: int) -> nn.Linear:
    return uninitialised(nn.Linear, inputs, outputs, bias=False)


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
        self.q_proj = plain_linear(config.embed_dim, config.embed_dim)
        self.k_proj = plain_linear(config.embed_dim, kv_dim)
        self.v_proj = plain_linear(config.embed_dim, kv_dim)
        self.output_proj = plain_linear(config.embed_dim, config.embed_dim)


class FeedForward(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.w1 = plain_linear(config.embed_dim, config.intermediate_dim)
        self.w2 = plain_linear(config.intermediate_dim, config.embed_dim)
        self.w3 = plain_linear(config.embed_dim, config.intermediate_dim)


class Layer(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.attn = Attention(config)
        self.mlp = FeedForward(config)
        self.sa_norm = RMSNorm(config.embed_dim, config.norm_eps)
        self.mlp_norm = RMSNorm(config.embed_dim, config.norm_eps)

    def forward(
        self,
        index: int,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        attend: Attend,
        recompute: str = "off",
        rows: Tensor | None = None,
        run: LayerFunction | None = None,
    ) -> Tensor:
        """See ``run_checkpointed``. Checkpoints and compiled functions are inside, so that hooks run once."""
        return run_checkpointed(self, index, x, cos, sin, attend, recompute, rows, run)


def rms_norm(norm: Any, x: Tensor) -> Tensor:
    """RMS norm of ``x`` [..., D] over its last dimension in the wide dtype, rounded to ``x``'s dtype, then scaled."""
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

    Args:
        layer: a ``Layer``, or any module with its tree.
        index: the layer's, for an attention with a cache.
        x: [..., D].
        cos, sin: of the positions, [..., 1, head_dim / 2].
        attend: ``attend(index, q, k, v, cos, sin)`` rotates and attends; all tensors are [..., heads, head_dim].
        recompute_mlp: the MLP keeps its input only, and runs again in the backward pass.
        rows: [A], rows of x [T, D] whose output is wanted. The others are used as keys and values only.

    Returns:
        [..., D], or [A, D] for ``rows``.
    """
    if layer_cpu.supports(layer, x, attend):
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


def run_checkpointed(
    layer: Any,
    index: int,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    attend: Attend,
    recompute: str = "off",
    rows: Tensor | None = None,
    run: LayerFunction | None = None,
) -> Tensor:
    """``run_layer``, or its compiled form ``run``. The backward pass computes again what ``recompute`` says: nothing
    for "off", the MLP for "selective", the layer for "full"."""
    run = run or run_layer
    if recompute == "full":
        return checkpoint(run, layer, index, x, cos, sin, attend, False, rows, use_reentrant=False)
    return run(layer, index, x, cos, sin, attend, recompute == "selective", rows)


def call_layer(layer: Any, *inputs: Any) -> Tensor:
    """Call a ``Layer`` as a module; compute ``run_checkpointed`` of any other layer, whose ``forward`` means something
    else."""
    return layer(*inputs) if isinstance(layer, Layer) else run_checkpointed(layer, *inputs)


def _mlp(layer: Any, x: Tensor) -> Tensor:
    mlp, y = layer.mlp, rms_norm(layer.mlp_norm, x)
    return mlp.w2(F.silu(mlp.w1(y)) * mlp.w3(y))
