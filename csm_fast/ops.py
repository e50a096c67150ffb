"""The operators that the model is built from, and the one place that chooses their implementations.

This is the only module of ``csm_fast`` that imports more of ``csm_kernels`` than its constants. Each operator here
chooses with ``choose`` and passes the answer on. "auto" means the Triton kernels on CUDA, the forms of
``csm_kernels.cpu`` on a CPU, and PyTorch's operators elsewhere; ``using`` asks for "triton" or "torch" instead. Nothing
of ``csm_kernels.cpu`` is imported before an operator runs on a CPU.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from csm_kernels import depth_attention as _depth_attention
from csm_kernels import frame_embed as _frame_embed
from csm_kernels import linear_cross_entropy as _linear_cross_entropy
from csm_kernels import packed_attention as _packed_attention
from csm_kernels import pointwise as _pointwise
from csm_kernels.adamw import Moments, adamw_, adamw_part
from csm_kernels.adamw import Settings as AdamWSettings
from csm_kernels.choice import IMPLS, Choice, resolve
from csm_kernels.dtypes import wide_dtype
from csm_kernels.gpu import depth_attention as _gpu_depth_attention
from csm_kernels.segments import plan_segments
from torch import Tensor

if TYPE_CHECKING:
    from csm_kernels.cpu.attention import Order, uniform_order
    from csm_kernels.cpu.linear import linear
    from csm_kernels.cpu.llama_layer import LayerSetup, llama_layer
    from csm_kernels.cpu.native import describe_library as describe_cpu_library

__all__ = [
    "IMPLS",
    "OPERATORS",
    "AdamWSettings",
    "Choice",
    "LayerSetup",
    "Moments",
    "Order",
    "adamw_",
    "adamw_part",
    "asked",
    "choose",
    "depth_attention",
    "describe_cpu_library",
    "frame_embed",
    "frame_embed_with_codes",
    "linear",
    "linear_cross_entropy",
    "llama_layer",
    "packed_attention",
    "plan_segments",
    "rms_norm",
    "rotate_pairs",
    "sum_of_squares",
    "uniform_order",
    "using",
    "wide_dtype",
]

# Names that run on a CPU only: their module, and their name there.
_CPU_NAMES = {
    "LayerSetup": ("llama_layer", "LayerSetup"),
    "Order": ("attention", "Order"),
    "describe_cpu_library": ("native", "describe_library"),
    "linear": ("linear", "linear"),
    "llama_layer": ("llama_layer", "llama_layer"),
    "uniform_order": ("attention", "uniform_order"),
}


def __getattr__(name: str) -> Any:
    """Import a name of ``csm_kernels.cpu`` on first use."""
    if name not in _CPU_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, there = _CPU_NAMES[name]
    globals()[name] = getattr(importlib.import_module(f"csm_kernels.cpu.{module}"), there)
    return globals()[name]


# --- the choice -------------------------------------------------------------------------------------------------------

_impl = "auto"


@contextlib.contextmanager
def using(impl: str) -> Iterator[None]:
    """Within it, operators without an ``impl`` argument of their own use ``impl``, in every thread: on CUDA, autograd
    runs backward passes, recomputation and updates in threads of its own.

    Raises:
        ValueError: not one of "auto", "triton", "torch".
    """
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, not {impl!r}")
    global _impl
    before, _impl = _impl, impl
    try:
        yield
    finally:
        _impl = before


def asked() -> str:
    """``impl`` of the enclosing ``using``, "auto" without one. A compiled layer must not depend on global state, so it
    gets this as a value."""
    return _impl


def choose(op: str, device: torch.device | str, dtype: torch.dtype, *inputs: Tensor, impl: str | None = None) -> Choice:
    """Which implementation of an operator runs, and why.

    Args:
        op: a key of ``OPERATORS``.
        device, dtype: of the tensors that the operator computes with.
        inputs: where more than these decides, the tensors that do: q and the cosines of ``depth_attention``; weight,
            gradient and first moment of ``adamw``; the tensor of ``sum_of_squares``. Without them, the answer is that
            for csm-1b's shapes and float32 moments.
        impl: one of ``IMPLS``; None: that of the enclosing ``using``.

    Returns:
        "triton", "cpu" or "reference", for packed attention also "flash-attn" or "torch", and the reason.
    """
    return OPERATORS[op](torch.device(device) if isinstance(device, str) else device, dtype, impl, *inputs)


def _choose_kernel(device: torch.device, dtype: torch.dtype, impl: str | None, *_: Tensor) -> Choice:
    return resolve(impl or _impl, device, dtype)


def _choose_depth_attention(device: torch.device, dtype: torch.dtype, impl: str | None, *inputs: Tensor) -> Choice:
    return resolve(impl or _impl, device, dtype, _gpu_depth_attention.why_unsupported, *inputs)


def _choose_llama_layer(device: torch.device, dtype: torch.dtype, impl: str | None, *_: Tensor) -> Choice:
    if device.type != "cpu" or torch.compiler.is_compiling():
        return Choice("reference", "the modules as written, which torch.compile fuses")
    if (impl or _impl) == "triton":
        return Choice("reference", "the Triton kernels are asked for")
    return Choice("cpu", "one autograd node per layer")


def _choose_linear(device: torch.device, dtype: torch.dtype, impl: str | None, *_: Tensor) -> Choice:
    layer = _choose_llama_layer(device, dtype, impl)
    if layer.impl != "cpu":
        return layer
    from csm_kernels.cpu.linear import supports_products

    return _choose_library(supports_products(dtype), dtype)


def _choose_adamw(device: torch.device, dtype: torch.dtype, impl: str | None, *inputs: Tensor) -> Choice:
    if device.type != "cpu" or (impl or _impl) == "triton":
        return resolve(impl or _impl, device, dtype)
    from csm_kernels.cpu.adamw import supports_update

    return _choose_library(supports_update(dtype, *(x.dtype for x in inputs[1:])), dtype)


def _choose_sum_of_squares(device: torch.device, dtype: torch.dtype, impl: str | None, *inputs: Tensor) -> Choice:
    if device.type != "cpu":
        return Choice("reference", "PyTorch's norms of many tensors at once")
    from csm_kernels.cpu.adamw import supports_sums

    return _choose_library(supports_sums(dtype) and all(x.is_contiguous() for x in inputs), dtype)


def _choose_library(supported: bool, dtype: torch.dtype) -> Choice:
    from csm_kernels.cpu.native import describe_library

    if supported:
        return Choice("cpu", f"the C++ library, {describe_library()}")
    return Choice("reference", f"the C++ library does not support {dtype} here: {describe_library()}")


OPERATORS: dict[str, Callable[..., Choice]] = {
    "frame_embed": _choose_kernel,
    "linear_cross_entropy": _choose_kernel,
    "depth_attention": _choose_depth_attention,
    "packed_attention": lambda device, dtype, *_: _packed_attention.choose_packed_attention(device, dtype),
    "pointwise": lambda device, *_: _pointwise.choose_pointwise(device),
    "llama_layer": _choose_llama_layer,
    "linear": _choose_linear,
    "adamw": _choose_adamw,
    "sum_of_squares": _choose_sum_of_squares,
}

# --- the operators ----------------------------------------------------------------------------------------------------


def frame_embed(
    tokens: Tensor, is_audio: Tensor, text_table: Tensor, audio_table: Tensor, impl: str | None = None
) -> Tensor:
    """Sum of each row's live embeddings, [N, D]; shapes and errors as in ``csm_kernels.frame_embed``."""
    dtype = torch.promote_types(text_table.dtype, audio_table.dtype)
    chosen = choose("frame_embed", audio_table.device, dtype, impl=impl)
    return _frame_embed.frame_embed(tokens, is_audio, text_table, audio_table, chosen.impl)


def frame_embed_with_codes(
    tokens: Tensor,
    is_audio: Tensor,
    frames: Tensor,
    text_table: Tensor,
    audio_table: Tensor,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``frame_embed`` and the codes of some frames one by one, [N, D] and [M, K - 1, D], with one gradient for both."""
    dtype = torch.promote_types(text_table.dtype, audio_table.dtype)
    chosen = choose("frame_embed", audio_table.device, dtype, impl=impl).impl
    return _frame_embed.frame_embed_with_codes(tokens, is_audio, frames, text_table, audio_table, chosen)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, impl: str | None = None, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Weighted cross-entropy of several heads. Under autocast the operands are cast as ``F.linear`` would cast them.

    Shapes, results and errors as in ``csm_kernels.linear_cross_entropy``.
    """
    device = hidden.device.type
    is_cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if is_cast and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    else:
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
    chosen = choose("linear_cross_entropy", hidden.device, dtype, impl=impl)
    return _linear_cross_entropy.linear_cross_entropy(
        hidden.to(dtype), weight.to(dtype), targets, weights, impl=chosen.impl, scale=scale
    )


def depth_attention(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, impl: str | None = None) -> Tensor:
    """Rotation and causal attention inside each frame; shapes and errors as in ``csm_kernels.depth_attention``."""
    chosen = choose("depth_attention", q.device, q.dtype, q, cos, impl=impl)
    return _depth_attention.depth_attention(q, k, v, cos, sin, chosen.impl)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Causal attention inside each segment; shapes and errors as in ``csm_kernels.packed_attention``."""
    chosen = choose("packed_attention", q.device, q.dtype)
    return _packed_attention.packed_attention(q, k, v, cu_seqlens, max_seqlen, chosen.impl)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Interleaved pairs rotated; shapes as in ``csm_kernels.pointwise``."""
    return _pointwise.rotate_pairs(x, cos, sin, choose("pointwise", x.device, x.dtype).impl)


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """RMS norm over the last dimension; shapes as in ``csm_kernels.pointwise``."""
    return _pointwise.rms_norm(x, scale, eps, choose("pointwise", x.device, x.dtype).impl)


def sum_of_squares(x: Tensor) -> Tensor | None:
    """[] float64; None where the caller is to use PyTorch's operators."""
    if choose("sum_of_squares", x.device, x.dtype, x).impl != "cpu":
        return None
    from csm_kernels.cpu import adamw as cpu_adamw

    return cpu_adamw.sum_of_squares(x)
