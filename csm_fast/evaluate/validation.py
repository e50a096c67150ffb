"""Deterministic validation: the whole set, a fixed draw of frames, every frame with the same weight."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from csm_fast import ops
from csm_fast.config.train import DataSection, LossSection
from csm_fast.model.loss import coefficients, predictor_states
from csm_fast.model.stacks import run_decoder, vocabulary
from csm_fast.packing.draws import Purpose
from csm_fast.packing.fit import MAX_POSITIONS, Store
from csm_fast.packing.loader import Packer
from csm_fast.packing.pack import Pack

CONVERSATIONS = 64  # packed together: a fixed number, so that the draw does not depend on the pack size
FRAME_CHUNK = 512  # frames in the depth decoder at once
LOGIT_ROWS = 4096  # rows of codebook-0 logits at once (32 MiB in float32)


class Validator:
    """Computes a model's validation loss on a token store, always on the same frames.

    Args:
        store: the validation split.
        data: the run's pack size and masked speakers.
        loss: the preset that combines CE0 and CEd into ``val_loss``; its weights of frames are not used.
        fraction: share of the supervised frames that the depth decoder predicts.
        limit: most rows of a document, the model's context.
    """

    def __init__(self, store: Store, data: DataSection, loss: LossSection, fraction: float, limit: int = MAX_POSITIONS):
        section = DataSection(
            data=data.data,
            batch_size=CONVERSATIONS,
            pack_rows=data.pack_rows,
            mask_speaker_ids=list(data.mask_speaker_ids),
            supervise=data.supervise,
            seed=0,
        )
        self.loss = loss
        self.packer = Packer(store, section, LossSection(amortization_fraction=fraction), limit=limit)
        self.conversations = store.num_conversations

    def __call__(
        self, model: Any, device: torch.device, autocast: Callable[[], AbstractContextManager] = nullcontext
    ) -> dict[str, Any]:
        """Losses and end-of-speech figures, as Python numbers.

        Returns:
            val_loss, c0_loss, decoder_loss; per_codebook [K]; eos_p_end: mean probability of the whole EOS frame (all
            K codes zero) where speech ends; eos_p_end_c0: the same for its codebook 0 only; false_eos_rate: share of
            speech frames whose most likely codebook-0 code is 0 although the true one is not; frames: their number.
        """
        num_codebooks, _ = vocabulary(model)
        was_training = model.training
        model.eval()
        sums = torch.zeros(num_codebooks, dtype=torch.float64)
        totals = dict.fromkeys(("frames", "selected", "ends", "p_end", "p_end_c0", "speech", "false"), 0.0)
        try:
            with torch.inference_mode(), autocast():
                for first in range(0, self.conversations, CONVERSATIONS):
                    chosen = range(first, min(first + CONVERSATIONS, self.conversations))
                    layout = self.packer.layout_conversations(chosen)
                    step = self.packer.build_step(layout, 0, first, (Purpose.VALIDATION,))
                    for pack in step.packs:
                        self._score(model, pack.to(device), sums, totals)
        finally:
            model.train(was_training)
        per_codebook = sums.clone()
        per_codebook[0] /= max(totals["frames"], 1)
        per_codebook[1:] /= max(totals["selected"], 1)
        a, b = coefficients(self.loss, num_codebooks)
        c0, decoder = float(per_codebook[0]), float(per_codebook[1:].mean())
        return {
            "val_loss": a * c0 + b * decoder,
            "c0_loss": c0,
            "decoder_loss": decoder,
            "per_codebook": per_codebook.tolist(),
            "eos_p_end": totals["p_end"] / max(totals["ends"], 1),
            "eos_p_end_c0": totals["p_end_c0"] / max(totals["ends"], 1),
            "false_eos_rate": totals["false"] / max(totals["speech"], 1),
            "frames": int(totals["frames"]),
        }

    @staticmethod
    def _score(model: Any, pack: Pack, sums: Tensor, totals: dict[str, float]) -> None:
        _, vocab = vocabulary(model)
        hidden = predictor_states(model, pack)
        if not len(hidden):
            return
        codes = pack.tokens.index_select(0, pack.target_rows)[:, :-1].long()
        eos = (codes == 0).all(1)
        for first in range(0, len(hidden), LOGIT_ROWS):
            some = slice(first, first + LOGIT_ROWS)
            log_p = _wide(model.codebook0_head(hidden[some])).log_softmax(-1)
            target, end = codes[some, 0], eos[some]
            sums[0] -= log_p.gather(1, target.unsqueeze(1)).sum().double().cpu()
            totals["p_end_c0"] += float(log_p[end, 0].exp().sum())
            totals["false"] += float(((log_p.argmax(1) == 0) & (target != 0) & ~end).sum())
        totals["frames"] += len(hidden)
        totals["ends"] += float(eos.sum())
        totals["speech"] += float((~eos).sum())
        for index in pack.decoder_index.split(FRAME_CHUNK):
            states = run_decoder(model, hidden[index], codes[index], vocab)
            ones = states.new_ones(len(index), 1, dtype=torch.float32)
            sums[1:] += ops.linear_cross_entropy(states, model.audio_head, codes[index][:, 1:], ones)[1].double().cpu()
            totals["selected"] += len(index)
        for index in eos.nonzero().squeeze(1).split(FRAME_CHUNK // 8):
            states = run_decoder(model, hidden[index], codes[index], vocab)
            log_p = _wide(model.codebook0_head(hidden[index])).log_softmax(-1)[:, 0]
            for k in range(states.shape[1]):
                log_p = log_p + _wide(states[:, k] @ model.audio_head[k]).log_softmax(-1)[:, 0]
            totals["p_end"] += float(log_p.exp().sum())


def _wide(x: Tensor) -> Tensor:
    return x.to(ops.wide_dtype(x.dtype))
