"""Models and batches of random numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from csm_fast.config.shape import CSMConfig
from csm_fast.model.csm import CSM
from csm_fast.packing.pack import Pack, pack_padded


def quick_model(shape: CSMConfig, device: torch.device | str = "cpu") -> CSM:
    """A model whose weights repeat one block of random numbers: much faster than drawing all of them."""
    with torch.device("meta"):
        model = CSM(shape)
    model = model.to_empty(device=device)
    block = (torch.randn(2**18, generator=torch.Generator().manual_seed(0)) * 0.02).to(device)
    with torch.no_grad():
        for p in model.parameters():
            for piece in p.view(-1).split(len(block)):
                piece.copy_(block[: len(piece)])
            if p.dim() == 1:
                p.fill_(1)
    return model


def random_batch(shape: CSMConfig, conversations: list[str], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random tokens and their mask, both [B, S, K + 1], right-padded.

    Args:
        conversations: a letter per row: "t" for text, "a" for a frame, "e" for the end of a speech, whose codes are 0.
    """
    generator = torch.Generator().manual_seed(seed)
    longest = max(map(len, conversations))
    kinds = torch.tensor([list(rows.ljust(longest).encode()) for rows in conversations]).unsqueeze(-1)
    is_text, is_frame, is_end = (kinds == ord(kind) for kind in "tae")
    size = (len(conversations), longest)
    codes = torch.randint(shape.audio_vocab_size, (*size, shape.num_codebooks), generator=generator)
    text = torch.randint(shape.text_vocab_size, (*size, 1), generator=generator)
    is_audio = (is_frame | is_end).expand_as(codes)
    return torch.cat([codes * is_frame, text * is_text], -1), torch.cat([is_audio, is_text], -1)


def random_pack(shape: CSMConfig, conversations: list[str], fraction: float, seed: int = 0) -> Pack:
    """``random_batch`` as a pack, in which the depth decoder sees a ``fraction`` of the frames."""
    tokens, mask = random_batch(shape, conversations, seed)
    torch.manual_seed(seed)
    return pack_padded(tokens.int(), mask, fraction)
