"""Training only the rows of the embedding tables that the data holds: float32 masters of those rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from csm_fast import ops
from csm_fast.model.stacks import vocabulary

TABLES = ("text_embeddings", "audio_embeddings")


class EmbeddingRows(nn.Module):
    """Float32 masters of some rows of both tables; they become ``model.embedding_rows``.

    The tables stay in the dtype of the frozen weights. They get gradients, but the optimizer is to train this module's
    parameters instead of them:

        rows = EmbeddingRows(model, *rows_in([store], model))
        ...                    # losses and backward passes: gradients arrive in the tables
        rows.pull()            # ... and move to the masters
        optimizer.step()
        rows.push()            # the tables hold the masters' values, rounded

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
        # A module's attribute would make the tables parameters of this one.
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
        """Whether ``parameter`` is one of the tables, which the optimizer is to leave alone."""
        return any(parameter is table for table in self.tables)

    @torch.no_grad()
    def pull(self) -> None:
        """Take the tables' gradients of these rows, in the masters' dtype, and drop the tables'."""
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
        """What is saved: ``<table>.weight.rows`` [R, D] and ``<table>.weight.index`` [R]."""
        saved = {}
        for name, (_, masters, index) in zip(TABLES, self.pairs(), strict=True):
            saved[f"{name}.weight.rows"], saved[f"{name}.weight.index"] = masters.detach(), index
        return saved


def rows_in(stores: Iterable[Any], model: Any) -> tuple[Tensor, Tensor]:
    """(text rows, audio rows) of the tables that token stores use, int64, sorted; end-of-speech rows are among them.

    Reads all tokens once, in blocks; marks lie in two arrays of the tables' lengths.
    """
    num_codebooks, vocab = vocabulary(model)
    text = np.zeros(model.text_embeddings.weight.shape[0], dtype=bool)
    audio = np.zeros((num_codebooks, vocab), dtype=bool)
    audio[:, 0] = True  # the end of speech is a frame of zeros
    books = np.arange(num_codebooks)
    for store in stores:
        for codes in store.code_blocks():
            audio[books, codes.astype(np.int64)] = True
        for _, arrays in store.shard_arrays():
            text[np.unique(arrays["text"])] = True
    return torch.from_numpy(np.flatnonzero(text)), torch.from_numpy(np.flatnonzero(audio.ravel()))
