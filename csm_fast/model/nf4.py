"""NF4 with double quantisation for the linear layers of both stacks, by bitsandbytes."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from csm_kernels.constants import NF4_BLOCK, NF4_SCALES_BLOCK
from torch import Tensor, nn

from csm_fast.config.targets import STACKS
from csm_fast.system.optional import load_bitsandbytes


@torch.library.custom_op("csm_fast::nf4_product", mutates_args=())
def _nf4_product(
    x: Tensor,
    packed: Tensor,
    code: Tensor,
    scales: Tensor,
    scales_code: Tensor,
    scales_scales: Tensor,
    offset: Tensor,
    shape: list[int],
    dtype: torch.dtype,
    transposed: bool,
) -> Tensor:
    """``x`` [..., in] times the transpose of an NF4 weight [out, in], dequantised in ``dtype`` for this product only;
    with ``transposed``, ``x`` [..., out] times the weight."""
    functional = load_bitsandbytes().functional
    inner = functional.QuantState(
        absmax=scales_scales, code=scales_code, blocksize=NF4_SCALES_BLOCK, dtype=torch.float32
    )
    state = functional.QuantState(scales, torch.Size(shape), code, NF4_BLOCK, "nf4", dtype, offset, inner)
    weight = functional.dequantize_4bit(packed, state).to(x.dtype)
    return F.linear(x, weight.T if transposed else weight)


@_nf4_product.register_fake
def _(x, packed, code, scales, scales_code, scales_scales, offset, shape, dtype, transposed):
    return x.new_empty(*x.shape[:-1], shape[1] if transposed else shape[0])


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:7])
    ctx.rest = inputs[7:]


def _backward(ctx, grad):
    shape, dtype, transposed = ctx.rest
    return _nf4_product(grad, *ctx.saved_tensors, shape, dtype, not transposed), *(None,) * 9


_nf4_product.register_autograd(_backward, setup_context=_setup_context)


@functools.cache
def _nf4_linear() -> type:
    """The class of quantised layers; made on first use, because bitsandbytes is imported only then."""
    bnb = load_bitsandbytes()

    class NF4Linear(bnb.nn.Linear4bit):  # type: ignore[name-defined]
        """bitsandbytes' 4-bit layer, with another forward, for three reasons.

        On CPUs with AVX512-BF16, bitsandbytes repacks the weight in place at the first forward in eval mode without
        gradients. The product with the packed weight has no derivative, so after one validation pass every gradient
        would silently lack the part that flows through it. This forward never packs.

        bitsandbytes returns the input's dtype. Under autocast this layer returns autocast's, as ``nn.Linear`` does.

        bitsandbytes' product is an autograd function in Python. PyTorch 2.11 compiles one within a checkpoint, but
        keeps what the checkpoint should compute again. So compiled layers use an operator of ours.
        """

        def forward(self, x: Tensor) -> Tensor:
            device = x.device.type
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.compute_dtype
            state = self.weight.quant_state
            if torch.compiler.is_compiling() and state.nested:
                tensors = state.code, state.absmax, state.state2.code, state.state2.absmax, state.offset
                return _nf4_product(x.to(dtype), self.weight, *tensors, list(state.shape), state.dtype, False)
            # Transposed, as bitsandbytes' own layer calls it: before 0.50, matmul_4bit relies on that layout.
            return bnb.matmul_4bit(x.to(dtype), self.weight.t(), quant_state=state)

    return NF4Linear


def quantize_linear(linear: nn.Linear, dtype: torch.dtype, device: torch.device | None = None) -> nn.Linear:
    """An NF4 copy of a layer without bias (blocks of 64 weights, whose scales have 8 bits in blocks of 256).

    Args:
        linear: weight [out, in], of any float dtype, on any device.
        dtype: float32, bfloat16 or float16: the weight is rounded to it first, and products are computed in it.
        device: where the copy is made, and stays; a CPU takes a minute for csm-1b. Default: the layer's.
    """
    if linear.bias is not None:
        raise ValueError("layers of CSM have no bias")
    bnb = load_bitsandbytes()
    device, weight = device or linear.weight.device, linear.weight.data.to(dtype)
    with torch.device("meta"):
        quantized = _nf4_linear()(1, 1, bias=False, compute_dtype=dtype, compress_statistics=True, quant_type="nf4")
    quantized.out_features, quantized.in_features = weight.shape
    quantized.weight = bnb.nn.Params4bit(weight, quant_type="nf4", compress_statistics=True, module=quantized)
    quantized.weight = quantized.weight.to(device)  # quantises
    quantized.train(linear.training)
    return quantized


def quantize_stacks(model: Any, dtype: torch.dtype, device: torch.device | None = None) -> None:
    """Replace every linear layer of both stacks by its NF4 copy, one at a time (see ``quantize_linear``)."""
    for stack in (getattr(model, name) for name in STACKS):
        layers = [(name, module) for name, module in stack.named_modules() if isinstance(module, nn.Linear)]
        while layers:
            name, module = layers.pop()
            parent, _, leaf = name.rpartition(".")
            setattr(stack.get_submodule(parent), leaf, quantize_linear(module, dtype, device))
            del module
