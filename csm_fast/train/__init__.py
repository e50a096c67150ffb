"""A run: set-up, steps, checkpoints. Imports every room below; only ``commands`` imports it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from csm_fast.train.loop import Trainer, train

__all__ = ["Trainer", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module("csm_fast.train.loop"), name)
