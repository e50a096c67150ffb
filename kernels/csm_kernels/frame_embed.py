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
    offsets = torch.arange(num_codebooks, device=tokens.device, dtype=tokens.dtype) * vocab
    form = _by_kind if tokens.device.type == "cpu" else _by_mask
    return form(tokens[:, :-1] + offsets, tokens[:, -1], is_audio, text_table, audio_table)


def _by_kind(codes: Tensor, text: Tensor, is_audio: Tensor, text_table: Tensor, audio_table: Tensor) -> Tensor:
    """Each row looks up only what it needs. How many rows are audio decides shapes, so the host must know it."""
    audio_rows = is_audio.nonzero().squeeze(1)
    text_rows = (~is_audio).nonzero().squeeze(1)
    audio = F.embedding_bag(codes.index_select(0, audio_rows), audio_table, mode="sum")
    words = F.embedding(text.index_select(0, text_rows), text_table)
    # One gather puts both kinds back in order; writing into a fresh tensor would make autograd copy it twice.
    place = torch.empty_like(is_audio, dtype=torch.long)
    place[audio_rows] = torch.arange(audio_rows.numel(), device=place.device)
    place[text_rows] = torch.arange(text_rows.numel(), device=place.device) + audio_rows.numel()
    return torch.cat([audio, words.to(audio.dtype)]).index_select(0, place)


def _by_mask(codes: Tensor, text: Tensor, is_audio: Tensor, text_table: Tensor, audio_table: Tensor) -> Tensor:
    """Every row looks up both kinds and keeps one, so that no shape depends on the data and the host never waits."""
    audio = F.embedding_bag(codes.where(is_audio.unsqueeze(1), 0), audio_table, mode="sum")
    words = F.embedding(text.where(~is_audio, 0), text_table)
    return torch.where(is_audio.unsqueeze(1), audio, words.to(audio.dtype))
