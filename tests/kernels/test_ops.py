"""The choice of implementation, and a whole model on the kernels."""

import threading

import pytest
import torch
from kernel_cases import interpreted, poisoned
from model_cases import MICRO_32, MemoryStore, random_conversations, random_model

from csm_fast import cli, ops
from csm_fast.commands import doctor
from csm_fast.config.train import DataSection, LossSection
from csm_fast.model.loss import packed_loss
from csm_fast.packing.loader import Packer
from csm_fast.system.device import resolve_precision


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
    assert ops.chosen("cpu")[0] == "torch"
    with ops.using("triton"):
        assert ops.chosen("cpu") == ("triton", "asked for")
        with ops.using("torch"):
            assert ops.chosen("cuda")[0] == "torch"
        assert ops.chosen("cpu")[0] == "triton"
    assert ops.chosen("cpu")[0] == "torch"
    with pytest.raises(ValueError, match="impl is 'gpu'"), ops.using("gpu"):
        pass
    assert ops.chosen("cuda", torch.float64) == ("torch", "float64: the kernels compute in float32")


def test_using_reaches_the_threads_of_backward_passes():
    seen = []
    with ops.using("triton"):
        thread = threading.Thread(target=lambda: seen.append(ops.asked()))
        thread.start()
        thread.join()
    assert seen == ["triton"] and ops.asked() == "auto"


def test_doctor_says_what_was_chosen_and_what_to_type(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    for words in (torch.__version__, "precision", "kernels", "attention", "bitsandbytes", "next: csm-fast pretokenize"):
        assert words in text
    (tmp_path / "tokens" / "train").mkdir(parents=True)
    cli.main(["doctor"])
    assert "next: csm-fast-train --data tokens" in capsys.readouterr().out


@pytest.mark.parametrize("has_instructions", [True, False])
def test_a_cpu_trains_in_bf16_only_with_instructions_for_it(monkeypatch, has_instructions):
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, probe, lambda: has_instructions, raising=False)
    precision = resolve_precision("auto", torch.device("cpu"))
    assert precision == ("bf16" if has_instructions else "fp32")
    (line,) = (x for x in doctor.report(doctor.examine() | {"precision": precision}) if x.startswith("precision"))
    assert ("no fast bf16" in line) is not has_instructions
