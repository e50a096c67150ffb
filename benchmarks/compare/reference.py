"""The weights of all systems, and the float32 loss that each of them must have."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from benchmarks.common import baselines
from benchmarks.compare.data import Recordings, bucket_conversations, open_recordings, pad_conversations
from benchmarks.compare.systems import SYSTEMS
from csm_fast import CSM, CSMConfig
from csm_fast.config.shape import NAMED_SHAPES

HEADS = 5.0  # factor of the heads' weights


def make_model(config: CSMConfig, device: torch.device, dtype: torch.dtype) -> CSM:
    """Random weights, the same on the same device, whose loss depends on every part: with heads as small as at the
    start of a training from scratch, any model's loss would be the logarithm of the vocabulary."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = CSM(config).init_weights(0, on_device=True)
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for head in (model.codebook0_head.weight, model.audio_head):
            head.mul_(HEADS)
    return model


def check_members(recordings: Recordings) -> list[int]:
    """Some recordings of middle length: frames enough for a sixteenth of them."""
    groups = bucket_conversations(recordings, min(16, recordings.num_conversations))
    return groups[len(groups) // 2]


def compute_reference(args: argparse.Namespace) -> dict[str, float]:
    """CE0 and CEd of the checked batch in float32 by the padded forward, with a sixteenth of the frames and with all,
    as the chosen systems need them. The weights are the systems': float32 ones, or rounded to bf16."""
    config, device = NAMED_SHAPES[args.shape](), torch.device(args.device)
    recordings = open_recordings(args, config)
    batch = [x.to(device) for x in pad_conversations(recordings, check_members(recordings))]
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        fractions = sorted({SYSTEMS[name].fraction for name in args.systems if SYSTEMS[name].weights == dtype})
        if not fractions:
            continue
        model: Any = make_model(config, device, dtype).float()
        for part, weight, fraction in [("ce0", 0.0, 1 / 16), *((f"ced{' all' * (f == 1)}", 1.0, f) for f in fractions)]:
            model.decoder_loss_weight, model.amortization_fraction = weight, fraction
            torch.manual_seed(0)
            with torch.no_grad():
                found[f"{part} {dtype}"] = float(baselines.blog_forward(model, *batch))
        del model
    return found


def expected_loss(name: str, found: dict[str, float]) -> float:
    """The float32 value of a system's loss, from ``compute_reference``."""
    system = SYSTEMS[name]
    a, b = system.coefficients
    frames = " all" if system.fraction == 1 else ""
    return a * found[f"ce0 {system.weights}"] + b * found[f"ced{frames} {system.weights}"]
