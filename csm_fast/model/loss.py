"""The amortized loss of a pack, and the drop-in forward for padded batches.

CE0 is the mean cross-entropy of codebook 0 over the supervised frames, CEd the mean over the selected frames and the
other K - 1 codebooks. Every preset is ``a CE0 + b CEd``:

    blog             (1 - w) CE0 + w CEd                 the default; w = decoder_loss_weight = 0.5
    sesame-finetune  2 [(1 - w) CE0 + w CEd]
    csm-mlx          (f CE0 + (K - 1) CEd) / K           f = first_codebook_weight_multiplier = 1
    transformers     CE0 + CEd
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from csm_fast import ops
from csm_fast.config.train import LossSection
from csm_fast.model.linear import adapted_weight
from csm_fast.model.run_options import run_options_of
from csm_fast.model.stacks import Transformer, projects_table, run_backbone, run_decoder, stack_limit, vocabulary
from csm_fast.packing.pack import Pack, pack_padded


def coefficients(loss: LossSection, num_codebooks: int) -> tuple[float, float]:
    """(a, b) of ``a CE0 + b CEd`` for the preset ``loss.loss``."""
    w = 0.5 if loss.decoder_loss_weight is None else loss.decoder_loss_weight
    f = 1.0 if loss.first_codebook_weight_multiplier is None else loss.first_codebook_weight_multiplier
    return {
        "blog": (1 - w, w),
        "sesame-finetune": (2 * (1 - w), 2 * w),
        "csm-mlx": (f / num_codebooks, (num_codebooks - 1) / num_codebooks),
        "transformers": (1.0, 1.0),
    }[loss.loss]


def predictor_states(model: Any, pack: Pack) -> Tensor:
    """The backbone states [A, D] that predict the pack's supervised frames."""
    x = ops.frame_embed(pack.tokens, pack.is_audio, model.text_embeddings.weight, model.audio_embeddings.weight)
    return _predictors(model, pack, x)


def _predictors(model: Any, pack: Pack, x: Tensor) -> Tensor:
    if not pack.target_rows.numel():
        return run_backbone(model, x, pack.positions, pack.segments)[:0]
    return run_backbone(model, x, pack.positions, pack.segments, pack.target_rows - 1)


def _embed(model: Any, pack: Pack, vocab: int) -> tuple[Tensor, Tensor | None]:
    """The backbone's input [T, D], and the embeddings of the depth decoder's codes [M, K - 1, D] unless it projects the
    table."""
    tables = model.text_embeddings.weight, model.audio_embeddings.weight
    frames = pack.target_rows.index_select(0, pack.decoder_index)
    by_table = projects_table(len(frames), vocab)
    x, embedded = ops.frame_embed_with_codes(pack.tokens, pack.is_audio, frames[:0] if by_table else frames, *tables)
    return x, None if by_table else embedded


def packed_loss(model: Any, pack: Pack, a: float, b: float) -> tuple[Tensor, Tensor]:
    """The pack's share of the optimizer step's loss.

    Args:
        model: ``CSM`` or any module with Sesame's tree.
        pack: on the model's device; its weights are normalised over the whole optimizer step, so the losses of the
            step's packs add up to the loss of the step.
        a, b: weights of CE0 and CEd (see ``coefficients``).

    Returns:
        The scalar loss (float32, or float64 for float64 models), and the detached cross-entropies per codebook [K],
        which also add up over packs. For a pack without supervised frames both are zero, and the loss is connected to
        the graph.
    """
    num_codebooks, vocab = vocabulary(model)
    x, embedded = _embed(model, pack, vocab)
    hidden = _predictors(model, pack, x)
    if not pack.target_rows.numel():
        zeros = hidden.new_zeros(num_codebooks, dtype=torch.float32)
        return hidden.sum() * 0.0, zeros
    targets = pack.tokens.index_select(0, pack.target_rows)[:, :-1].long()
    head = _linear_weight(model.codebook0_head)
    ce0, per_codebook0 = ops.linear_cross_entropy(
        hidden.unsqueeze(1), head.t().unsqueeze(0), targets[:, :1], pack.target_weights.unsqueeze(1), scale=a
    )
    if not pack.decoder_index.numel():
        return ce0, torch.cat([per_codebook0, per_codebook0.new_zeros(num_codebooks - 1)])
    codes = targets.index_select(0, pack.decoder_index)
    states = run_decoder(model, hidden.index_select(0, pack.decoder_index), codes, vocab, embedded)
    ced, per_codebook = ops.linear_cross_entropy(
        states, model.audio_head, codes[:, 1:], pack.decoder_weights.unsqueeze(1), scale=b / (num_codebooks - 1)
    )
    return ce0 + ced, torch.cat([per_codebook0, per_codebook])


def amortized_loss(a: float, b: float) -> Callable[[Any, Pack], tuple[Tensor, Tensor]]:
    """``packed_loss`` with these coefficients, as a function of (model, pack) for the training step.

    It calls a ``CSM``, also inside a wrapper such as DDP, as a module, so that hooks run. The ``forward`` of any other
    module with Sesame's tree means something else, so ``packed_loss`` is computed directly.
    """

    def loss(model: Any, pack: Pack) -> tuple[Tensor, Tensor]:
        inside = getattr(model, "module", model)
        return model(pack, a=a, b=b) if isinstance(inside.backbone, Transformer) else packed_loss(model, pack, a, b)

    return loss


def _linear_weight(head: Any) -> Tensor:
    """The head as one matrix [V, D], with its adapter, without its adapter's dropout."""
    return adapted_weight(head)


def forward(self: Any, tokens: Tensor, tokens_mask: Tensor) -> Tensor:
    """Training forward for Sesame's ``Model``, our ``CSM``, or any module with the same parameter tree.

    ``model.forward = types.MethodType(csm_fast.forward, model)``

    The loss and gradients are those of the blog's forward for the same ``torch.manual_seed``, to rounding. Padding
    costs nothing, because the batch is packed first. Reads ``self.decoder_loss_weight`` (default 0.5) and
    ``self.amortization_fraction`` (default 1/16), and works under autocast.

    Args:
        tokens: [B, S, K + 1] integers: K codes and a text token per row.
        tokens_mask: [B, S, K + 1] bool: which of them are used.

    Returns:
        The scalar loss ``(1 - w) CE0 + w CEd``, float32 (float64 for float64 models).
    """
    options = run_options_of(self)
    w, fraction = float(options.decoder_loss_weight), float(options.amortization_fraction)
    pack = pack_padded(tokens, tokens_mask, fraction, stack_limit(self.backbone))
    return packed_loss(self, pack, 1 - w, w)[0]
