"""Sum of a row's live embeddings, without the [rows, K + 1, width] tensor."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def frame_embed(tokens: Tensor, is_audio: Tensor, text_table: Tensor, audio_table: Tensor) -> Tensor:
    """Embed packed rows.

    An audio row is the sum over codebooks k of ``audio_table[tokens[:, k] + k * V]``; a text row is
    ``text_table[tokens[:, K]]`` (Sesame's ``_embed_tokens`` followed by its masked sum).

    Args:
        tokens: [N, K + 1] integers; columns 0..K-1 are codes, column K is the text token.
        is_audio: [N] bool.
        text_table: [text vocabulary, D].
        audio_table: [K * V, D].

    Returns:
        [N, D] in the tables' dtype; float32 accumulation where the tables are narrower.
    """
    num_codebooks = tokens.shape[1] - 1
    vocab = audio_table.shape[0] // num_codebooks
    audio_rows = is_audio.nonzero().squeeze(1)
    text_rows = (~is_audio).nonzero().squeeze(1)
    offsets = torch.arange(num_codebooks, device=tokens.device, dtype=tokens.dtype) * vocab
    audio = F.embedding_bag(tokens.index_select(0, audio_rows)[:, :-1] + offsets, audio_table, mode="sum")
    text = F.embedding(tokens.index_select(0, text_rows)[:, -1], text_table)
    # One gather puts both kinds back in order; writing into a fresh tensor would make autograd copy it twice.
    place = torch.empty_like(is_audio, dtype=torch.long)
    place[audio_rows] = torch.arange(audio_rows.numel(), device=place.device)
    place[text_rows] = torch.arange(text_rows.numel(), device=place.device) + audio_rows.numel()
    return torch.cat([audio, text.to(audio.dtype)]).index_select(0, place)
