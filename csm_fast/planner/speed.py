"""Floating-point operations of a step, and rows per second on a card: a model, not a measurement."""

from __future__ import annotations

from csm_fast.config.shape import CSMConfig
from csm_fast.config.train import TrainConfig
from csm_fast.planner.gpus import GPU
from csm_fast.planner.tensors import Weight, list_weights

# Shares of a card's peak rates that a step is assumed to reach.
COMPUTE_SHARE, BANDWIDTH_SHARE = 0.45, 0.8


def flops(shape: CSMConfig, config: TrainConfig, rows: int, audio_share: float) -> float:
    """Floating-point operations of a pack.

    Each weight and row costs 2 for the forward pass, 2 for the gradient of the input, 2 for the gradient of the weight
    if it is trained, and 2 if the forward pass is recomputed. An adapter's weights cost 6. The depth decoder runs over
    K positions of each frame that it sees. The attention's own products are left out: segments of speech are short.
    """
    targets = rows * audio_share
    frames = targets * config.loss.amortization_fraction
    again = {"off": (), "selective": ("mlp",), "full": ("mlp", "attn")}[config.model.activation_checkpointing]

    def of(weight: Weight) -> float:
        if weight.kind in ("norm", "table"):
            return 0.0
        passes = 2 + weight.trained + any(f".{block}." in weight.name for block in again)
        return 2.0 * weight.numel * passes + 6.0 * weight.adapter

    uses = {
        "backbone": rows,
        "decoder": frames * shape.num_codebooks,
        "projection": frames * shape.num_codebooks,
        "codebook0_head": targets,
        "audio_head": frames,  # each of its heads once a frame
    }
    every = list_weights(shape, config.adapter, config.optimizer, config.model.freeze, 2)
    return sum(of(w) * uses.get(w.part, 0) for w in every)


def rows_per_second(
    shape: CSMConfig, config: TrainConfig, gpu: GPU, rows: int, audio_share: float, trained: int
) -> float | None:
    """Rows per second with one pack per optimizer step: the pack's operations at the card's rate, and the bytes that
    the update and unpacking 4-bit weights move at its bandwidth. None if the card's rates are unknown, and in float32,
    which has a rate of its own.

    Args:
        trained: parameters that the optimizer updates.
    """
    if not gpu.tflops or config.model.precision == "fp32":
        return None
    width = 4 if config.optimizer.weights == "fp32" else 2
    moments = 8 if config.optimizer.optimizer == "adamw" else 2
    moved = trained * (3 * width + 2 * moments)  # weight and moments both ways, and the gradient
    quantised = sum(
        w.numel for w in list_weights(shape, config.adapter, config.optimizer, config.model.freeze, 2) if w.quantised
    )
    times = 3 if config.model.activation_checkpointing == "full" else 2
    moved += int(times * quantised * (0.5 + 2 + 2))  # read in 4 bits, written in 16, read by the product
    compute = flops(shape, config, rows, audio_share) / (COMPUTE_SHARE * gpu.tflops * 1e12)
    return rows / (compute + moved / (BANDWIDTH_SHARE * gpu.gb_per_s * 1e9))
