"""Mimi's sizes, and the names and shapes of its weights, without importing transformers, which takes seconds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from csm_fast.config.shape import SAMPLE_RATE, SAMPLES_PER_FRAME

# kyutai/mimi's config.json, and the defaults of transformers' MimiConfig.
MIMI: dict[str, Any] = {
    "sampling_rate": SAMPLE_RATE,
    "frame_rate": SAMPLE_RATE / SAMPLES_PER_FRAME,
    "audio_channels": 1,
    "hidden_size": 512,
    "num_filters": 64,
    "num_residual_layers": 1,
    "upsampling_ratios": [8, 6, 5, 4],
    "kernel_size": 7,
    "last_kernel_size": 3,
    "residual_kernel_size": 3,
    "dilation_growth_rate": 2,
    "use_causal_conv": True,
    "pad_mode": "constant",
    "compress": 2,
    "trim_right_ratio": 1.0,
    "codebook_size": 2048,
    "codebook_dim": 256,
    "num_quantizers": 32,
    "use_conv_shortcut": False,
    "vector_quantization_hidden_dimension": 256,
    "num_semantic_quantizers": 1,
    "upsample_groups": 512,
    "num_hidden_layers": 8,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "hidden_act": "gelu",
    "norm_eps": 1e-5,
    "sliding_window": 250,
    "attention_bias": False,
}


def complete_sizes(arguments: Mapping[str, Any]) -> SimpleNamespace:
    """All sizes of a Mimi by the names of MimiConfig, from those that differ from kyutai/mimi's.

    Added are ``head_dim``, ``rope_parameters`` (``rope_type`` and ``rope_theta``, from either spelling of a
    config.json), ``encodec_frame_rate`` (positions per second after the convolutions) and ``frame_size`` in samples.
    """
    given = {name: value for name, value in arguments.items() if value is not None}  # a config.json may say null
    sizes = SimpleNamespace(**{**MIMI, **given})
    if arguments.get("head_dim") is None:
        sizes.head_dim = sizes.hidden_size // sizes.num_attention_heads
    rope = arguments.get("rope_parameters") or arguments.get("rope_scaling") or {}
    theta = rope.get("rope_theta") or arguments.get("rope_theta") or 10000.0
    sizes.rope_parameters = {"rope_type": "default", **rope, "rope_theta": theta}
    sizes.encodec_frame_rate = math.ceil(sizes.sampling_rate / math.prod(sizes.upsampling_ratios))
    sizes.frame_size = int(sizes.sampling_rate / sizes.frame_rate)
    return sizes


def is_supported(sizes: Any) -> bool:
    """Whether ``weight_shapes`` and ``MimiEncoder`` can handle a Mimi. They can handle every published one.

    Args:
        sizes: from ``complete_sizes``, or a transformers MimiConfig.
    """
    return (
        sizes.use_causal_conv
        and sizes.pad_mode == "constant"
        and not sizes.use_conv_shortcut
        and sizes.audio_channels == 1
        and sizes.hidden_act == "gelu"
        and not sizes.attention_bias
        and sizes.num_key_value_heads == sizes.num_attention_heads
        and sizes.num_semantic_quantizers == 1
        and sizes.rope_parameters["rope_type"] == "default"
        and sizes.encodec_frame_rate != sizes.frame_rate
    )


def weight_shapes(sizes: Any) -> dict[str, tuple[int, ...]]:
    """Shapes by flat name of a supported Mimi's weights: convolutions [out, in, k], transposed ones [in, out, k]."""
    shapes: dict[str, tuple[int, ...]] = {}

    def convolution(name: str, out: int, inputs: int, kernel: int, transposed: bool = False) -> None:
        shapes[f"{name}.conv.weight"] = (inputs, out, kernel) if transposed else (out, inputs, kernel)
        shapes[f"{name}.conv.bias"] = (out,)

    def blocks(name: str, at: int, width: int) -> None:
        narrow = width // sizes.compress
        for layer in range(at, at + sizes.num_residual_layers):
            convolution(f"{name}.layers.{layer}.block.1", narrow, width, sizes.residual_kernel_size)
            convolution(f"{name}.layers.{layer}.block.3", width, narrow, 1)

    # ELUs are numbered among the layers, too.
    hidden, width, at = sizes.hidden_size, sizes.num_filters, 1
    convolution("encoder.layers.0", width, 1, sizes.kernel_size)
    for ratio in reversed(sizes.upsampling_ratios):
        blocks("encoder", at, width)
        at += sizes.num_residual_layers + 1
        convolution(f"encoder.layers.{at}", 2 * width, width, 2 * ratio)
        width, at = 2 * width, at + 1
    convolution(f"encoder.layers.{at + 1}", hidden, width, sizes.last_kernel_size)
    convolution("decoder.layers.0", width, hidden, sizes.kernel_size)
    at = 1
    for ratio in sizes.upsampling_ratios:
        convolution(f"decoder.layers.{at + 1}", width // 2, width, 2 * ratio, transposed=True)
        width, at = width // 2, at + 2
        blocks("decoder", at, width)
        at += sizes.num_residual_layers
    convolution(f"decoder.layers.{at + 1}", 1, width, sizes.last_kernel_size)
    shapes.update(_transformers(sizes))
    stride = round(sizes.encodec_frame_rate / sizes.frame_rate)
    shapes["downsample.conv.weight"] = (hidden, hidden, 2 * stride)
    shapes["upsample.conv.weight"] = (hidden, hidden // sizes.upsample_groups, 2 * stride)
    shapes.update(_quantizers(sizes))
    return shapes


def _transformers(sizes: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner = sizes.hidden_size, sizes.num_attention_heads * sizes.head_dim
    for half in ("encoder", "decoder"):
        for layer in range(sizes.num_hidden_layers):
            name = f"{half}_transformer.layers.{layer}."
            for part in ("q_proj", "k_proj", "v_proj"):
                yield f"{name}self_attn.{part}.weight", (inner, hidden)
            yield f"{name}self_attn.o_proj.weight", (hidden, inner)
            yield f"{name}mlp.fc1.weight", (sizes.intermediate_size, hidden)
            yield f"{name}mlp.fc2.weight", (hidden, sizes.intermediate_size)
            for part in ("input_layernorm", "post_attention_layernorm"):
                yield f"{name}{part}.weight", (hidden,)
                yield f"{name}{part}.bias", (hidden,)
            for part in ("self_attn_layer_scale", "mlp_layer_scale"):
                yield f"{name}{part}.scale", (hidden,)


def _quantizers(sizes: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    inner = sizes.vector_quantization_hidden_dimension
    for half, levels in (("semantic", 1), ("acoustic", sizes.num_quantizers - 1)):
        name = f"quantizer.{half}_residual_vector_quantizer."
        for level in range(levels):
            book = f"{name}layers.{level}.codebook."
            yield book + "initialized", (1,)
            yield book + "cluster_usage", (sizes.codebook_size,)
            yield book + "embed_sum", (sizes.codebook_size, sizes.codebook_dim)
        if inner != sizes.hidden_size:
            yield name + "input_proj.weight", (inner, sizes.hidden_size, 1)
            yield name + "output_proj.weight", (sizes.hidden_size, inner, 1)
