"""Gradients of the large tables, kept from step to step."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from csm_fast import ops


class TableGradients:
    """The gradients of the embedding tables, kept from step to step where the model trains on a CPU.

    A table of 128,256 rows gets a few hundred of them per step; filling the rest with zeros can take longer than the
    step. Elsewhere this does nothing: a GPU fills them in a fraction of a millisecond.

        tables = TableGradients(model)
        with tables:
            ...                   # losses and backward passes
        optimizer.step()          # the tables' .grad is there
        optimizer.zero_grad()
        tables.clear(whole)       # whole: the gradients held NaN, or something else wrote into them
    """

    def __init__(self, model: Any):
        self.model = model
        weights = model.text_embeddings.weight, model.audio_embeddings.weight
        self.rows = tuple(ops.RowGradient(w) if w.requires_grad and w.device.type == "cpu" else None for w in weights)
        self.kept = [(w, rows) for w, rows in zip(weights, self.rows, strict=True) if rows is not None]
        self.others_wrote = False
        self._versions: list[int] = []

    def __enter__(self) -> None:
        self.model.row_gradients = self.rows
        for weight, rows in self.kept:
            if weight.grad is rows.dense:  # of an earlier ``with``; what autograd adds is to be told apart
                weight.grad = None

    def __exit__(self, *_: object) -> None:
        del self.model.row_gradients
        for weight, rows in self.kept:
            if weight.grad is not None:  # the table was used otherwise, too
                rows.add(weight.grad)
                self.others_wrote = True
            weight.grad = rows.dense
        self._versions = [rows.dense._version for _, rows in self.kept]

    def touched(self) -> dict[Tensor, Tensor]:
        """By table: int64 [n], the rows besides which its gradient is zero. Empty if anything else wrote to it, too."""
        if [rows.dense._version for _, rows in self.kept] != self._versions:
            self.others_wrote = True
        return {} if self.others_wrote else {weight: rows.touched() for weight, rows in self.kept}

    def clear(self, whole: bool) -> None:
        for _, rows in self.kept:
            rows.clear(whole or self.others_wrote)
        self.others_wrote = False
