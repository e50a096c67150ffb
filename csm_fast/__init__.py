"""csm_fast: fast fine-tuning of Sesame's CSM (Conversational Speech Model).

Names are imported when they are first used, so ``import csm_fast`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from csm_fast.system.version import __version__

_HOME = {
    "CSM": "model.csm",
    "CSMConfig": "config.shape",
    "TransformerConfig": "config.shape",
    "TrainConfig": "config.train",
    "InputError": "system.errors",
    "TokenStore": "data.token_store",
    "forward": "model.loss",
    "load_adapters": "weights.adapter_files",
    "linear_to_lora_layers": "weights.adapter_files",
    "load_model": "weights.load",
    "save_model": "weights.save",
    "load_codec": "data.codec.load",
    "load_text_tokenizer": "data.text",
    "Generator": "generate.generator",
}
__all__ = [*_HOME, "__version__"]

if TYPE_CHECKING:
    from csm_fast.config.shape import CSMConfig, TransformerConfig
    from csm_fast.config.train import TrainConfig
    from csm_fast.data.codec.load import load_codec
    from csm_fast.data.text import load_text_tokenizer
    from csm_fast.data.token_store import TokenStore
    from csm_fast.generate.generator import Generator
    from csm_fast.model.csm import CSM
    from csm_fast.model.loss import forward
    from csm_fast.system.errors import InputError
    from csm_fast.weights.adapter_files import linear_to_lora_layers, load_adapters
    from csm_fast.weights.load import load_model
    from csm_fast.weights.save import save_model


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'csm_fast' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
