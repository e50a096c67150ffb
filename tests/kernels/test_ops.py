"""The choice of implementation, and a whole model on the kernels."""

import threading

import pytest
import torch
from kernel_cases import interpreted, poisoned
from model_cases import MICRO_32, MemoryStore, random_conversations, random_model

from csm_fast import ops
from csm_fast.config.train import DataSection, LossSection
from csm_fast.model.loss import packed_loss
from csm_fast.packing.loader import Packer


def train(impl: str, steps: int = 10) -> list[float]:
    """Losses of a micro model over a few packs, float32, everything trained."""
    store = MemoryStore(random_conversations([[(4, 9, 0)], [(3, 5, 1), (2, 7, 0)], [(6, 12, 0)], [(1, 3, 1)]]))
    packer = Packer(store, DataSection(batch_size=4, pack_rows=40), LossSection(amortization_fraction=0.5))
    model = random_model(MICRO_32, scale=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    with ops.using(impl):
        for i in range(steps):
            step = packer.step(i, 0)
            total = 0.0
            for pack in step.packs:
                loss, _ = packed_loss(model, pack, 0.5, 0.5)
                loss.backward()
                total += float(loss.detach())
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total)
    return losses


@pytest.mark.slow
def test_ten_steps_on_the_kernels_are_ten_steps_without():
    plain = train("torch")
    with interpreted() as launches, poisoned():
        forced = train("triton")
    assert plain[-1] < plain[0] - 0.1
    for a, b in zip(plain, forced, strict=True):
        assert b == pytest.approx(a, abs=1e-4)
    # Per step at least: the embedding and two decoder layers, the gradients of each, two heads.
    least = {"_forward_kernel": 3, "_backward_kernel": 2, "_sum_kernel": 2, "_softmax_cross_entropy_kernel": 2}
    assert all(launches[kernel] >= 10 * count for kernel, count in least.items()), launches


def test_using_is_nested_checked_and_undone():
    def chosen(device: str, dtype: torch.dtype = torch.bfloat16) -> str:
        return ops.choose("frame_embed", device, dtype).impl

    assert chosen("cpu") == "cpu"
    with ops.using("triton"):
        assert ops.choose("frame_embed", "cpu", torch.bfloat16) == ("triton", "asked for")
        with ops.using("torch"):
            assert chosen("cuda") == "reference"
        assert chosen("cpu") == "triton"
    assert chosen("cpu") == "cpu"
    with pytest.raises(ValueError, match="impl must be one of auto, triton, torch, not 'gpu'"), ops.using("gpu"):
        pass
    assert ops.choose("adamw", "cuda", torch.float64) == ("reference", "float64: the kernels compute in float32")


def test_using_reaches_the_threads_of_backward_passes():
    seen = []
    with ops.using("triton"):
        thread = threading.Thread(target=lambda: seen.append(ops.asked()))
        thread.start()
        thread.join()
    assert seen == ["triton"] and ops.asked() == "auto"
