"""The recordings that every system of a comparison trains on, padded in buckets for those that pad."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from torch import Tensor

from csm_fast import CSMConfig
from csm_fast.config.shape import FRAME_SECONDS
from csm_fast.data.token_store import TurnTokens, open_split
from csm_fast.packing.fit import MAX_POSITIONS
from csm_fast.packing.pack import Pack


class Synthetic:
    """Random recordings of one turn each, as a store: 1 to 20 s, half of them under 5 s, three words a second."""

    def __init__(self, recordings: int, config: CSMConfig, seed: int = 0):
        rng = np.random.default_rng(seed)
        frames = np.clip(rng.lognormal(np.log(60), 0.6, recordings), 12, 250).astype(int)
        words = np.maximum(3, frames * FRAME_SECONDS * 3 * 1.3).astype(int)  # 1.3 tokens a word
        codes = [rng.integers(0, config.audio_vocab_size - 3, (n, config.num_codebooks)) for n in frames]
        text = [rng.integers(0, config.text_vocab_size, n) for n in words]
        self.turns = [
            [TurnTokens(t.astype(np.int32), c.astype(np.uint16), 0, i)]
            for i, (t, c) in enumerate(zip(text, codes, strict=True))
        ]
        self.num_codebooks, self.num_conversations, self.path = config.num_codebooks, recordings, "synthetic"
        self.conversation_rows = frames + words + 1

    def conversation(self, i: int) -> Any:
        return self.turns[i]


class Splits:
    """The splits of a folder of tokens, one after the other, as a store: a corpus is both."""

    def __init__(self, data: str, names: list[str]):
        self.stores = [open_split(data, name) for name in names]
        self.num_codebooks, self.path = self.stores[0].num_codebooks, data
        self.conversation_rows = np.concatenate([s.conversation_rows for s in self.stores])
        self.num_conversations = len(self.conversation_rows)

    def conversation(self, i: int) -> Any:
        for store in self.stores:
            if i < store.num_conversations:
                return store.conversation(i)
            i -= store.num_conversations
        raise IndexError(i)


class Subset:
    """Some conversations of a store, as a store."""

    def __init__(self, store: Any, chosen: list[int]):
        self.store, self.chosen = store, chosen
        self.num_codebooks, self.num_conversations, self.path = store.num_codebooks, len(chosen), store.path
        self.conversation_rows = store.conversation_rows[chosen]

    def conversation(self, i: int) -> Any:
        return self.store.conversation(self.chosen[i])

    def turn_lengths(self) -> tuple[np.ndarray, ...]:
        turns = [(i, t) for i in range(len(self.chosen)) for t in self.conversation(i)]
        columns = ([len(t.text) for _, t in turns], [len(t.codes) for _, t in turns], [t.speaker for _, t in turns])
        return *(np.array(c, dtype=np.int64) for c in columns), np.array([i for i, _ in turns])

    @property
    def rows(self) -> int:
        return int(self.conversation_rows.sum())

    @property
    def frames(self) -> int:
        return int(self.turn_lengths()[1].sum())


def choose_subset(store: Any, share: float, middle: int | None) -> Subset:
    """A share of the recordings, evenly over their lengths, or only the ``middle`` ones of middle length."""
    chosen = np.argsort(store.conversation_rows, kind="stable")[:: max(1, round(1 / share))].tolist()
    if middle:
        first = (len(chosen) - middle) // 2
        chosen = chosen[first : first + middle]
    return Subset(store, chosen)


def open_recordings(args: argparse.Namespace, config: CSMConfig) -> Subset:
    """The recordings that the command's settings name."""
    store: Any = Synthetic(args.synthetic, config) if args.synthetic else Splits(args.data, args.splits)
    return choose_subset(store, args.share, args.middle)


def pad_conversations(store: Subset, members: list[int]) -> tuple[Tensor, Tensor]:
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


def bucket_conversations(store: Subset, size: int) -> list[list[int]]:
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
