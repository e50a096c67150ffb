"""The recordings that every system of a comparison trains on, padded in buckets for those that pad."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from csm_fast import CSMConfig
from csm_fast.config.shape import FRAME_SECONDS
from csm_fast.data.token_store import TurnTokens, open_split
from csm_fast.packing.fit import MAX_POSITIONS
from csm_fast.packing.pack import Pack


class Recordings:
    """Conversations in memory, as a store.

    Attributes:
        conversation_rows: rows of each conversation, int64.
    """

    def __init__(self, turns: list[list[TurnTokens]], num_codebooks: int, path: str):
        self.turns, self.num_codebooks, self.path = turns, num_codebooks, path
        self.num_conversations = len(turns)
        self.conversation_rows = np.array([sum(len(t.text) + len(t.codes) + 1 for t in some) for some in turns])

    def conversation(self, i: int) -> Any:
        return self.turns[i]

    def choose(self, chosen: Iterable[int]) -> Recordings:
        return Recordings([self.turns[i] for i in chosen], self.num_codebooks, self.path)

    def turn_lengths(self) -> tuple[np.ndarray, ...]:
        turns = [(len(t.text), len(t.codes), t.speaker, i) for i, some in enumerate(self.turns) for t in some]
        return tuple(np.array(turns, dtype=np.int64).T)

    @property
    def rows(self) -> int:
        return int(self.conversation_rows.sum())

    @property
    def frames(self) -> int:
        return int(self.turn_lengths()[1].sum())


def draw_recordings(count: int, config: CSMConfig, seed: int = 0) -> Recordings:
    """Random recordings of one turn each: 1 to 20 s, half of them under 5 s, three words a second."""
    rng = np.random.default_rng(seed)
    frames = np.clip(rng.lognormal(np.log(60), 0.6, count), 12, 250).astype(int)
    words = np.maximum(3, frames * FRAME_SECONDS * 3 * 1.3).astype(int)  # 1.3 tokens a word
    codes = [rng.integers(0, config.audio_vocab_size - 3, (n, config.num_codebooks)).astype(np.uint16) for n in frames]
    text = [rng.integers(0, config.text_vocab_size, n).astype(np.int32) for n in words]
    turns = [[TurnTokens(t, c, 0, i)] for i, (t, c) in enumerate(zip(text, codes, strict=True))]
    return Recordings(turns, config.num_codebooks, "synthetic")


def choose_recordings(rows: np.ndarray, share: float, middle: int | None) -> list[int]:
    """A share of the recordings, evenly over their ``rows``, or only the ``middle`` ones of middle length."""
    chosen = np.argsort(rows, kind="stable")[:: max(1, round(1 / share))].tolist()
    first = (len(chosen) - middle) // 2 if middle else 0
    return chosen[first : first + middle] if middle else chosen


def open_recordings(args: argparse.Namespace, config: CSMConfig) -> Recordings:
    """The recordings that the command's settings name; of ``args.data`` all splits together."""
    if args.synthetic:
        drawn = draw_recordings(args.synthetic, config)
        return drawn.choose(choose_recordings(drawn.conversation_rows, args.share, args.middle))
    stores = [open_split(args.data, name) for name in args.splits]
    places = [(store, i) for store in stores for i in range(store.num_conversations)]
    chosen = choose_recordings(np.concatenate([s.conversation_rows for s in stores]), args.share, args.middle)
    turns = [store.conversation(i) for store, i in (places[n] for n in chosen)]
    return Recordings(turns, stores[0].num_codebooks, args.data)


def pad_conversations(store: Recordings, members: list[int]) -> tuple[Tensor, Tensor]:
    """Tokens and their mask, both [B, S, K + 1], of some conversations, as Sesame's users collate them."""
    size = (len(members), int(store.conversation_rows[members].max()), store.num_codebooks + 1)
    assert size[1] <= MAX_POSITIONS, f"a conversation has {size[1]} rows, more than the model's context"
    tokens, mask = torch.zeros(size, dtype=torch.long), torch.zeros(size, dtype=torch.bool)
    for i, member in enumerate(members):
        row = 0
        for turn in store.conversation(member):
            speech = row + len(turn.text)
            end = speech + len(turn.codes)
            tokens[i, row:speech, -1] = torch.from_numpy(turn.text.astype(np.int64))
            tokens[i, speech:end, :-1] = torch.from_numpy(turn.codes.astype(np.int64))
            mask[i, row:speech, -1] = mask[i, speech : end + 1, :-1] = True  # a frame of zeros ends the speech
            row = end + 1
    return tokens, mask


def bucket_conversations(store: Recordings, size: int) -> list[list[int]]:
    """Batches of conversations of similar length."""
    order = np.argsort(store.conversation_rows, kind="stable").tolist()
    return [order[i : i + size] for i in range(0, len(order), size)]


def fill_table_gradients(model: Any, packs: list[Pack]) -> None:
    """Give the tables that are trained gradients: small ones in the rows that the packs read, zeros elsewhere."""
    text, audio = model.text_embeddings.weight, model.audio_embeddings.weight
    for table in (text, audio):
        table.grad = torch.zeros_like(table) if table.requires_grad else None
    for pack in packs:
        tokens, is_audio = pack.tokens[: pack.rows], pack.is_audio[: pack.rows]  # the rest is padding
        books = torch.arange(tokens.shape[1] - 1, device=text.device)
        spoken = tokens[is_audio][:, :-1] + books * (audio.shape[0] // len(books))
        for table, keys in ((text, tokens[~is_audio][:, -1]), (audio, spoken)):
            if table.grad is not None:
                table.grad[keys.flatten().long()] = 1e-3
