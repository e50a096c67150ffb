"""Float32 masters of some rows of the embedding tables, so that only the rows that the data uses are trained."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from csm_fast import ops
from csm_fast.data.token_store import TokenSource, read_tokens
from csm_fast.model.stacks import vocabulary

TABLES = ("text_embeddings", "audio_embeddings")


class EmbeddingRows(nn.Module):
    """Float32 masters of some rows of both tables. The constructor sets ``model.embedding_rows``.

    The tables keep the dtype of the frozen weights. The backward pass writes gradients into them, but the optimizer
    trains this module's parameters instead:

        rows = EmbeddingRows(model, *rows_in([store], model))
        ...                    # losses and backward passes
        rows.pull()            # moves the tables' gradients to the masters
        optimizer.step()
        rows.push()            # writes the masters into the tables, rounded

    Args:
        model: with tables [Vt, D] and [K V, D]; their ``requires_grad`` is set.
        text, audio: int64 indices of the rows, sorted, without repeats.

    Attributes:
        text_embeddings, audio_embeddings: parameters [R, D]; float32, or float64 for float64 tables.
        text_embeddings_index, audio_embeddings_index: int64 [R].
    """

    tables: list[Tensor]
    text_embeddings: nn.Parameter
    audio_embeddings: nn.Parameter

    def __init__(self, model: Any, text: Tensor, audio: Tensor):
        super().__init__()
        # Not by nn.Module's own assignment, which would register the tables as parameters of this module.
        object.__setattr__(self, "tables", [getattr(model, name).weight for name in TABLES])
        for name, table, index in zip(TABLES, self.tables, (text, audio), strict=True):
            index = index.to(device=table.device, dtype=torch.int64)
            self.register_buffer(f"{name}_index", index)
            table.requires_grad_(True)
            setattr(self, name, nn.Parameter(table.detach()[index].to(ops.wide_dtype(table.dtype))))
        model.embedding_rows = self

    def pairs(self) -> list[tuple[Tensor, nn.Parameter, Tensor]]:
        """(table, masters, index) of both tables."""
        return [
            (table, getattr(self, name), getattr(self, f"{name}_index"))
            for name, table in zip(TABLES, self.tables, strict=True)
        ]

    def owns(self, parameter: Tensor) -> bool:
        """Whether ``parameter`` is one of the tables, which the optimizer must not train."""
        return any(parameter is table for table in self.tables)

    @torch.no_grad()
    def pull(self) -> None:
        """Copy these rows of the tables' gradients to the masters, in the masters' dtype, and drop the tables' own."""
        for table, masters, index in self.pairs():
            if table.grad is not None:
                masters.grad = table.grad[index].to(masters.dtype)
                table.grad = None

    @torch.no_grad()
    def push(self) -> None:
        """Write the masters into the tables."""
        for table, masters, index in self.pairs():
            table.index_copy_(0, index, masters.to(table.dtype))

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        """The tensors of an adapter file: ``<table>.weight.rows`` [R, D] and ``<table>.weight.index`` [R]."""
        saved = {}
        for name, (_, masters, index) in zip(TABLES, self.pairs(), strict=True):
            saved[f"{name}.weight.rows"], saved[f"{name}.weight.index"] = masters.detach(), index
        return saved


def rows_in(stores: Iterable[TokenSource], model: Any) -> tuple[Tensor, Tensor]:
    """(text rows, audio rows) of the tables that token stores use, int64, sorted, with those of the end of speech.

    Reads all tokens once, in blocks.
    """
    num_codebooks, vocab = vocabulary(model)
    text = np.zeros(model.text_embeddings.weight.shape[0], dtype=bool)
    audio = np.zeros((num_codebooks, vocab), dtype=bool)
    audio[:, 0] = True  # the end of speech is a frame of zeros
    books = np.arange(num_codebooks)
    for store in stores:
        for ids, codes in read_tokens(store):
            text[np.unique(ids)] = True
            audio[books, codes.astype(np.int64)] = True
    return torch.from_numpy(np.flatnonzero(text)), torch.from_numpy(np.flatnonzero(audio.ravel()))
