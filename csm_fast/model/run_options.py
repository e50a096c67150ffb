"""Settings of a model that are no parameters: checkpointing, compiled layers, adapters, weights of the drop-in loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from csm_fast.config.shape import CSMConfig
from csm_fast.config.train import AdapterSection
from csm_fast.model.layer import LayerFunction


@dataclass(frozen=True)
class Attached:
    """The adapters that ``adapters.attach`` put on a model.

    Attributes:
        section: what was asked for, with its alpha.
        shape: of the base, which cannot be read from modules with adapters.
        base, base_hash: name and ``weights_hash`` of the weights that the adapters belong to.
        compute_dtype: of the frozen weights and of matrix products.
        targets: names of the modules with adapters, sorted.
        whole: names of the parameters trained whole.
    """

    section: AdapterSection
    shape: CSMConfig
    base: str
    base_hash: str
    compute_dtype: torch.dtype
    targets: tuple[str, ...]
    whole: tuple[str, ...]

    def autocast(self, device: str) -> torch.autocast:
        """The context that the model computes in: autocast to ``compute_dtype``, off for float32."""
        narrow = self.compute_dtype in (torch.bfloat16, torch.float16)
        return torch.autocast(device, self.compute_dtype if narrow else None, enabled=narrow)


@dataclass
class RunOptions:
    """``CSM.run``.

    Attributes:
        checkpointing: what runs again in the backward pass: "off", "selective" or "full" (see ``stacks.run_stack``).
        adapter: the adapters on the model.
        backbone_layer, decoder_layer: compiled forms of ``run_layer``, one for each stack; None runs it eagerly.
        decoder_loss_weight, amortization_fraction: of the drop-in forward, ``csm_fast.forward``.
    """

    checkpointing: str | bool = "off"
    adapter: Attached | None = None
    backbone_layer: LayerFunction | None = None
    decoder_layer: LayerFunction | None = None
    decoder_loss_weight: float = 0.5
    amortization_fraction: float = 1 / 16

    @property
    def recompute(self) -> str:
        """``checkpointing`` as a word. It may be a boolean; True means "full"."""
        if isinstance(self.checkpointing, str):
            return self.checkpointing
        return "full" if self.checkpointing else "off"


# Options that scripts read and set as attributes of the model itself, by the attributes' names.
ATTRIBUTES = {
    "activation_checkpointing": "checkpointing",
    "adapter": "adapter",
    "decoder_loss_weight": "decoder_loss_weight",
    "amortization_fraction": "amortization_fraction",
}


def run_options_of(model: Any) -> RunOptions:
    """The options of a ``CSM``, or of another module with Sesame's tree.

    Another module gets options on first use. Each call copies ``ATTRIBUTES`` that are set on it into them.
    """
    options = getattr(model, "run", None)
    if not isinstance(options, RunOptions):
        options = vars(model).setdefault("csm_fast_run", RunOptions())
    for attribute, option in ATTRIBUTES.items():
        if hasattr(model, attribute):
            setattr(options, option, getattr(model, attribute))
    return options
