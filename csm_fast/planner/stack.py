"""How a step is computed, and a stack with the rows that pass through it: the input of the walk."""

from __future__ import annotations

from dataclasses import dataclass

from csm_fast.config.shape import TransformerConfig
from csm_fast.planner.tensors import Weight


@dataclass(frozen=True)
class Setup:
    """How a step is computed.

    Attributes:
        device: "cpu" or "cuda".
        compiled: the layers run under ``torch.compile``.
        autocast: operands of matrix products are cast from float32.
        compute: bytes of an element of those operands.
        checkpointing: "off", "selective" or "full".
        dropout: there is dropout before the adapters.
        in_backward: each weight is updated as soon as its gradient is complete.
        packs: per optimizer step. From the second pack on, the first one's gradients exist from the start.
        varlen: on CUDA the packed attention has a variable-length kernel: from sm_80 on, in bf16 and fp16.
    """

    device: str
    compiled: bool
    autocast: bool
    compute: int
    checkpointing: str
    dropout: bool = False
    in_backward: bool = False
    packs: int = 1
    varlen: bool = True


@dataclass(frozen=True)
class Stack:
    """A Llama stack and the rows that pass through it."""

    name: str
    config: TransformerConfig
    rows: int  # n
    residual: int  # r
    layers: list[dict[str, Weight]]
    norm: Weight
    packed: bool
    length: int  # of sequences that are not packed: the depth decoder's
    reached: bool  # something before it is trained, so gradients pass through it
    wanted: int  # rows whose states are used: the last layer's output projection and MLP run on these alone

    def after(self, index: int) -> int:
        """Rows behind the attention of a layer."""
        return self.wanted if index == len(self.layers) - 1 else self.rows

    @property
    def active(self) -> bool:
        return self.reached or any(w.trained or w.rank for layer in self.layers for w in layer.values())
