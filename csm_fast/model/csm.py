"""CSM's module tree, with exactly Sesame's parameter names."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor, nn

from csm_fast.config.shape import CSMConfig
from csm_fast.model.embedding_rows import EmbeddingRows
from csm_fast.model.layer import plain_linear, uninitialised
from csm_fast.model.loss import forward, packed_loss
from csm_fast.model.run_options import ATTRIBUTES, RunOptions
from csm_fast.model.stacks import Transformer
from csm_fast.packing.pack import Pack


def _option(attribute: str) -> Any:
    """A property of ``CSM`` that reads and sets the option of ``ATTRIBUTES``."""
    name = ATTRIBUTES[attribute]
    return property(lambda self: getattr(self.run, name), lambda self, value: setattr(self.run, name, value))


class CSM(nn.Module):
    """Sesame's Conversational Speech Model.

    Parameters are uninitialised storage until ``init_weights`` or a checkpoint fills them.

    Attributes:
        run: settings that are no parameters. ``activation_checkpointing``, ``adapter``, ``decoder_loss_weight`` and
            ``amortization_fraction`` read and set its fields.
        embedding_rows: float32 masters of the tables' rows, if only some rows are trained.
    """

    embedding_rows: EmbeddingRows | None
    activation_checkpointing = _option("activation_checkpointing")
    adapter = _option("adapter")
    decoder_loss_weight = _option("decoder_loss_weight")
    amortization_fraction = _option("amortization_fraction")

    def __init__(self, config: CSMConfig):
        super().__init__()
        self.config = config
        width = config.backbone.embed_dim
        self.backbone = Transformer(config.backbone)
        self.decoder = Transformer(config.decoder)
        self.text_embeddings = uninitialised(nn.Embedding, config.text_vocab_size, width)
        self.audio_embeddings = uninitialised(nn.Embedding, config.audio_vocab_size * config.num_codebooks, width)
        self.projection = plain_linear(width, config.decoder.embed_dim)
        self.codebook0_head = plain_linear(width, config.audio_vocab_size)
        self.audio_head = nn.Parameter(
            torch.empty(config.num_codebooks - 1, config.decoder.embed_dim, config.audio_vocab_size)
        )
        self.run = RunOptions()
        self.register_module("embedding_rows", None)

    @overload
    def forward(self, tokens: Pack, *, a: float, b: float) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(self, tokens: Tensor, tokens_mask: Tensor) -> Tensor: ...

    def forward(
        self, tokens: Tensor | Pack, tokens_mask: Tensor | None = None, *, a: float = 0.5, b: float = 0.5
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The training forward.

        Args:
            tokens: a pack, for ``packed_loss`` with the coefficients ``a`` and ``b``; or [B, S, K + 1] integers, with
                ``tokens_mask`` of the same shape, for the drop-in forward ``csm_fast.forward``.

        Returns:
            (loss, cross-entropies [K]) of a pack; the loss of a padded batch.
        """
        if isinstance(tokens, Pack):
            return packed_loss(self, tokens, a, b)
        if tokens_mask is None:
            raise TypeError("tokens need a tokens_mask")
        return forward(self, tokens, tokens_mask)

    @torch.no_grad()
    def init_weights(self, seed: int = 0, on_device: bool = False) -> CSM:
        """Fill every parameter for training from scratch. The values depend on ``seed`` and the shapes only.

        Llama's recipe: normal(0, 0.02) for matrices and embeddings, with the projections that write into the residual
        stream scaled by 1/sqrt(2 layers) (GPT-2), and ones for norms. They are drawn on the CPU in float32, so that
        every device starts from the same numbers. ``on_device`` draws other numbers, in less time, where the parameters
        are.
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


def parameter_shapes(config: CSMConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of a CSM's parameters by name."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in CSM(config).named_parameters()}
