"""A training step of CSMConfig.small, forward and backward, on packs of two sizes; the optimizer's update."""

from __future__ import annotations

import pytest
import torch

from benchmarks.compare.data import draw_recordings
from csm_fast import CSM, CSMConfig
from csm_fast.config.train import DataSection, LossSection, OptimizerSection
from csm_fast.model.compile import compile_layers
from csm_fast.model.loss import packed_loss
from csm_fast.packing.loader import Packer
from csm_fast.packing.pack import Pack
from csm_fast.train.optim.build import cast_weights, make_optimizer

RECORDINGS = 100


def make_full_pack(rows: int, config: CSMConfig, device: torch.device) -> Pack:
    """The first pack of random recordings, packed as ``csm-fast-train --batch-rows`` does."""
    section = DataSection(batch_rows=rows, pack_rows=rows)
    packer = Packer(draw_recordings(RECORDINGS, config), section, LossSection(), pad=device.type)
    return packer.step(0, 0).packs[0].to(device)


@pytest.mark.parametrize("rows", (448, 2048))
def test_forward_and_backward(timed, device, dtype, rows):
    """Weights in the compute type."""
    config = CSMConfig.small()
    model = CSM(config).init_weights(0).to(device, dtype)
    compile_layers(model, "auto")
    pack = make_full_pack(rows, config, device)

    def step() -> None:
        packed_loss(model, pack, 0.5, 0.5)[0].backward()
        model.zero_grad(set_to_none=True)

    timed(step)


@pytest.mark.parametrize("weights", ("fp32", "bf16-stochastic", "bf16-stochastic, 8 bits"))
def test_update(timed, device, weights):
    """AdamW on every weight of the small shape."""
    weights, eight, _ = weights.partition(", 8 bits")
    if eight:
        pytest.importorskip("bitsandbytes")
    section = OptimizerSection(weights=weights, optimizer="adamw-8bit" if eight else "adamw")
    model = CSM(CSMConfig.small()).init_weights(0).to(device)
    cast_weights(model, section)
    optimizer = make_optimizer(model, section)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    timed(optimizer.step)
