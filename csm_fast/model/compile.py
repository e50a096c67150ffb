"""``torch.compile`` for the layers of both stacks: the operations between the large operators become a few kernels.

One layer is one graph, and all layers of a stack share it (the backbone's last layer has one more, for the rows that
predict), so compiling takes seconds and not minutes. Rows, segments and frames are symbolic: a pack of another size
recompiles nothing. Parameters, their names and ``state_dict`` do not change. Generation, whose attention has a cache,
runs eagerly.

``auto`` turns it on for CUDA only. On a CPU it gains nothing: matrix products take most of the time, and the rest is
written with few passes over memory (``docs/design-notes.md``). Inductor keeps compiled kernels on disk
(``TORCHINDUCTOR_CACHE_DIR``, which ``csm-fast-train`` sets to a folder of the user's cache), so a second run starts two
to four times sooner.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from csm_fast.model.layer import LayerFunction, run_layer
from csm_fast.model.run_options import run_options_of
from csm_fast.model.stacks import PackedAttend
from csm_fast.packing.pack import Segments

# Most graphs of one stack's layer: with and without gradients, for inputs without gradients, for a single row, and each
# of these for adapters. With more, something is a constant that should be symbolic, and compiling stops with an error.
RECOMPILE_LIMIT = 16


def compile_layers(model: Any, choice: str = "on", backend: str = "inductor") -> bool:
    """Compile the layer function of the backbone and of the depth decoder, for training and validation.

    Args:
        model: ``CSM`` or any module with Sesame's tree.
        choice: "on", "off", or "auto": on if the parameters are on CUDA and Triton is installed.
        backend: of ``torch.compile``.

    Returns:
        Whether it is on.
    """
    if choice not in ("auto", "on", "off"):
        raise ValueError(f"choice is {choice!r}; use 'auto', 'on' or 'off'")
    on = choice == "on"
    if choice == "auto":
        on = next(model.parameters()).device.type == "cuda" and importlib.util.find_spec("triton") is not None
    options = run_options_of(model)
    options.backbone_layer, options.decoder_layer = (_compiled(backend), _compiled(backend)) if on else (None, None)
    return on


@contextmanager
def uncompiled(model: Any) -> Iterator[None]:
    """Within it, the layers of a model run eagerly."""
    options = run_options_of(model)
    compiled = options.backbone_layer, options.decoder_layer
    options.backbone_layer = options.decoder_layer = None
    try:
        yield
    finally:
        options.backbone_layer, options.decoder_layer = compiled


def _limits() -> dict[str, Any]:
    """``RECOMPILE_LIMIT`` as options of ``torch.compile``, for each stack. PyTorch before 2.13 has one limit for the
    process, 8 by default, which is raised for both stacks together."""
    limits = {"recompile_limit": RECOMPILE_LIMIT, "isolate_recompiles": True}
    if limits.keys() <= inspect.signature(torch.compile).parameters.keys():
        return limits
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 2 * RECOMPILE_LIMIT)
    return {}


def _inductor_options() -> dict[str, Any]:
    """Options that keep Inductor from compiling again for packs of another size.

    A norm's backward sums over columns and over rows. On CUDA, Inductor fuses both sums for large packs (at csm-1b's
    width from 2,560 and again from 4,096 rows on) and compiles every layer again beyond each of these bounds. Without
    fusion, a norm's input and gradient are read twice: half a percent of a step of csm-1b, by count of bytes.
    """
    config: Any = importlib.import_module("torch._inductor.config")
    return {"triton.mix_order_reduction": False} if hasattr(config.triton, "mix_order_reduction") else {}


@dataclass(frozen=True)
class _SymbolicSegments:
    """Stands in for ``Segments`` in a compiled layer. The longest length is the size of an empty tensor, because a
    size can be marked as dynamic; an integer is a constant to the compiler until it changes."""

    cu_seqlens: Tensor
    longest: Tensor  # [max_seqlen, 0]

    @property
    def max_seqlen(self) -> int:
        return self.longest.shape[0]


def _compiled(backend: str) -> LayerFunction:
    options = _inductor_options() if backend == "inductor" else {}
    compiled = torch.compile(run_layer, fullgraph=True, backend=backend, options=options or None, **_limits())

    def run(
        layer: Any,
        _: int,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        attend: Any,
        recompute_mlp: bool = False,
        rows: Tensor | None = None,
    ) -> Tensor:
        dynamic = [x] if rows is None else [x, rows]
        if isinstance(attend, PackedAttend):  # the decoder's cos and sin have K rows, always
            cu_seqlens, longest = attend.segments.cu_seqlens, x.new_empty(attend.segments.max_seqlen, 0)
            dynamic += [cos, sin, cu_seqlens, longest]
            attend = PackedAttend(cast(Segments, _SymbolicSegments(cu_seqlens, longest)))
        for tensor in dynamic:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        # The attention depends on no layer: without the index one graph serves all layers but the last, which has rows.
        return compiled(layer, 0, x, cos, sin, attend, recompute_mlp, rows)

    return run
