"""The operators the model is built from, the only importer of ``csm_kernels`` but for its constants, and the one place
that chooses.

``impl`` is "auto" (kernels on CUDA where Triton is installed, PyTorch elsewhere), "triton" or "torch". It can be given
per call, or for a stretch of code with ``using``. On a CPU the passes between PyTorch's matrix products come from a
library that ``csm_kernels.cpu.native`` builds, where there is a C++ compiler.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from csm_kernels import adamw as _adamw
from csm_kernels import depth_attention as _depth_attention
from csm_kernels import frame_embed as _frame_embed
from csm_kernels import linear_cross_entropy as _linear_cross_entropy
from csm_kernels.adamw import Moments
from csm_kernels.adamw import Settings as AdamWSettings
from csm_kernels.cpu import adamw as _cpu_adamw
from csm_kernels.cpu.attention import Order, uniform_order
from csm_kernels.cpu.linear import linear
from csm_kernels.cpu.linear import serves as multiplies
from csm_kernels.cpu.llama_layer import LayerSetup, llama_layer
from csm_kernels.cpu.native import reason as cpu_passes
from csm_kernels.dtypes import wide_dtype
from csm_kernels.frame_embed import RowGradient
from csm_kernels.packed_attention import packed_attention, varlen_backend
from csm_kernels.packed_attention import plan as plan_segments
from csm_kernels.pointwise import rms_norm, rotate_pairs
from torch import Tensor

__all__ = [
    "IMPLS",
    "AdamWSettings",
    "LayerSetup",
    "Moments",
    "Order",
    "RowGradient",
    "adamw_",
    "adamw_form",
    "adamw_part",
    "asked",
    "chosen",
    "cpu_passes",
    "depth_attention",
    "frame_embed",
    "frame_embed_with_codes",
    "linear",
    "linear_cross_entropy",
    "llama_layer",
    "multiplies",
    "packed_attention",
    "plan_segments",
    "rms_norm",
    "rotate_pairs",
    "sum_of_squares",
    "uniform_order",
    "using",
    "varlen_backend",
    "wide_dtype",
]

IMPLS = ("auto", "triton", "torch")
_impl = "auto"


@contextlib.contextmanager
def using(impl: str) -> Iterator[None]:
    """Within it, operators that are not told otherwise use ``impl``, in every thread: on CUDA, autograd runs backward
    passes in threads of its own, and with them what is recomputed there, and updates.

    Raises:
        ValueError: not one of "auto", "triton", "torch".
    """
    if impl not in IMPLS:
        raise ValueError(f"impl is {impl!r}; use one of {', '.join(IMPLS)}")
    global _impl
    before, _impl = _impl, impl
    try:
        yield
    finally:
        _impl = before


def asked() -> str:
    """``impl`` of the enclosing ``using``, "auto" without one. A compiled layer cannot ask; it is told."""
    return _impl


def chosen(device: torch.device | str, dtype: torch.dtype = torch.bfloat16) -> tuple[str, str]:
    """("triton" or "torch", why) of the operators for tensors on ``device``."""
    device, impl = torch.device(device), _impl
    if impl != "auto":
        return impl, "asked for"
    if dtype == torch.float64:
        return "torch", "float64: the kernels compute in float32"
    if device.type != "cuda":
        return "torch", f"the kernels need a CUDA device, this is {device.type}"
    if _linear_cross_entropy.triton is None:
        return "torch", "Triton is not installed"
    return "triton", "a CUDA device, and Triton is installed"


def frame_embed(
    tokens: Tensor, is_audio: Tensor, text_table: Tensor, audio_table: Tensor, impl: str | None = None
) -> Tensor:
    """Sum of each row's live embeddings, [N, D]; shapes and errors as in ``csm_kernels.frame_embed``."""
    return _frame_embed.frame_embed(tokens, is_audio, text_table, audio_table, impl=impl or _impl)


def frame_embed_with_codes(
    tokens: Tensor,
    is_audio: Tensor,
    frames: Tensor,
    text_table: Tensor,
    audio_table: Tensor,
    impl: str | None = None,
    into: tuple[RowGradient | None, RowGradient | None] = (None, None),
) -> tuple[Tensor, Tensor]:
    """``frame_embed`` and the codes of some frames one by one, [N, D] and [M, K - 1, D], with one gradient for both.

    ``into`` counts where PyTorch's form runs on a CPU.
    """
    device, impl = tokens.device.type, impl or _impl
    if any(rows is not None for rows in into) and device == "cpu" and impl == "auto":
        impl = "torch"
    into = into if impl == "torch" and device == "cpu" else (None, None)
    return _frame_embed.frame_embed_with_codes(tokens, is_audio, frames, text_table, audio_table, impl, into=into)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, impl: str | None = None, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Weighted cross-entropy of several heads, honouring autocast: operands are cast as ``F.linear`` would.

    Shapes, results and errors as in ``csm_kernels.linear_cross_entropy``.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    else:
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
    return _linear_cross_entropy.linear_cross_entropy(
        hidden.to(dtype), weight.to(dtype), targets, weights, impl=impl or _impl, scale=scale
    )


def depth_attention(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, impl: str | None = None) -> Tensor:
    """Rotation and causal attention inside each frame; shapes and errors as in ``csm_kernels.depth_attention``."""
    return _depth_attention.depth_attention(q, k, v, cos, sin, impl=impl if impl is not None else asked())


def adamw_form(weight: Tensor, grad: Tensor, exp_avg: Tensor) -> str:
    """How an update of AdamW runs: "library" (on a CPU) or "triton", in one pass; "torch": PyTorch's operators."""
    if weight.device.type == "cpu" and _impl != "triton":
        return "library" if _cpu_adamw.serves_adamw(weight, grad, exp_avg) else "torch"
    return chosen(weight.device, weight.dtype)[0]


def adamw_part(form: str, weight: Tensor) -> int:
    """How many elements of a table ``adamw_`` takes or leaves together: a row, or a program's of the kernel."""
    return weight.shape[-1] if form == "library" else _adamw.BLOCK


def adamw_(
    form: str,
    weight: Tensor,
    grad: Tensor,
    moments: Moments,
    compensation: Tensor | None,
    live: Tensor | None,
    step: Tensor,
    found_inf: Tensor | None,
    grad_scale: Tensor | None,
    settings: AdamWSettings,
) -> None:
    """An update by the "library" or "triton"; arguments and errors as in ``csm_kernels.adamw.adamw_``, with a mark in
    ``live`` for each ``adamw_part`` elements."""
    if form == "triton":
        _adamw.adamw_(weight, grad, moments, compensation, live, step, found_inf, grad_scale, settings)
        return
    lr, beta1, beta2, weight_decay, eps, draws = settings
    _cpu_adamw.adamw_(
        weight,
        grad,
        moments.exp_avg,
        moments.exp_avg_sq,
        compensation,
        live,
        step,
        found_inf,
        grad_scale,
        lr,
        beta1,
        beta2,
        weight_decay,
        eps,
        draws is not None,
        *(draws or (0, 0, 0)),
    )


def sum_of_squares(x: Tensor, rows: Tensor | None = None) -> Tensor | None:
    """[] float64, of all of x or of its ``rows`` (int64 [n]); None where PyTorch's operators are to do it."""
    return _cpu_adamw.sum_of_squares(x, rows) if _cpu_adamw.serves_sum(x) else None
