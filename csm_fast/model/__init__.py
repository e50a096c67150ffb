"""CSM: the module tree, what its stacks compute, the loss, adapters and 4-bit weights.

Imports ``data``, ``packing``, ``config``, ``system`` and ``csm_fast.ops``. PEFT's adapter files name this package as
the library of ``CSM``, so ``from csm_fast.model import CSM`` must work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from csm_fast.model.csm import CSM

__all__ = ["CSM"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module("csm_fast.model.csm"), name)
