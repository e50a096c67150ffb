"""Speech from a model and a text.

Imports ``weights``, ``model``, ``data`` and what is below them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from csm_fast.generate.generator import Generator

__all__ = ["Generator"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module("csm_fast.generate.generator"), name)
