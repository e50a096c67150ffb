"""Optimizers of a run: what a configuration makes, resuming them, and updates inside the backward pass."""

import functools
import importlib.util
import json
import logging
import sys

import pytest
import torch
from csm_kernels.cpu import native
from model_cases import MICRO, MemoryStore, random_conversations, random_model

from benchmarks import bf16_updates
from csm_fast.config.shape import NAMED_SHAPES
from csm_fast.config.train import DataSection, LossSection, OptimizerSection
from csm_fast.model.loss import packed_loss
from csm_fast.packing.loader import Packer
from csm_fast.system.errors import InputError
from csm_fast.system.tensors import write_tensors
from csm_fast.train.checkpoint import load_optimizer, optimizer_tensors
from csm_fast.train.optim.adamw import AdamW
from csm_fast.train.optim.build import cast_weights, make_optimizer
from csm_fast.train.optim.clipping import clip_gradients
from csm_fast.train.optim.in_backward import UpdateInBackward

BF16, F32 = torch.bfloat16, torch.float32
KINDS = {  # what a run can choose, as (optimizer, weights)
    "fused": ("adamw", "fp32"),
    "8 bits": ("adamw-8bit", "fp32"),
    "8 bits, stochastic": ("adamw-8bit", "bf16-stochastic"),
    "stochastic": ("adamw", "bf16-stochastic"),
    "Kahan": ("adamw", "bf16-kahan"),
    "8 bits, Kahan": ("adamw-8bit", "bf16-kahan"),
    "nearest": ("adamw", "bf16-nearest"),
}


# --------------------------------------------------------------------------------------------------- a model's run


def skip_without_bitsandbytes():
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("8-bit moments need bitsandbytes")


def section(kind, **changes):
    optimizer, weights = KINDS[kind]
    return OptimizerSection(optimizer=optimizer, weights=weights, learning_rate=1e-2, **changes)


def batches(count=6, rows=30, fraction=0.5):
    spec = [[(4, 9, 0)], [(3, 5, 1), (2, 7, 0)], [(6, 12, 0)], [(1, 3, 1)], [(5, 20, 0)], [(2, 2, 1)]]
    packer = Packer(
        MemoryStore(random_conversations(spec)),
        DataSection(batch_size=3, pack_rows=rows),
        LossSection(amortization_fraction=fraction),
    )
    return [packer.step(i // 2, i % 2).packs for i in range(count)]


def make(kind, **changes):
    if kind.startswith("8 bits"):
        skip_without_bitsandbytes()
    model = random_model(MICRO)
    cast_weights(model, section(kind))
    return model, make_optimizer(model, section(kind, **changes), seed=3)


def learn(model, optimizer, steps, at_once=False, bad=False):
    """Weights after, and the gradient norm of each step."""
    norms = []
    for packs in steps:
        hooks = None
        for i, pack in enumerate(packs):
            with torch.autocast("cpu", BF16):
                loss = packed_loss(model, pack, 0.5, 0.5)[0]
            if at_once and i + 1 == len(packs):
                hooks = UpdateInBackward(optimizer, ~torch.isfinite(loss) | bad)
                with hooks:
                    loss.backward()
            else:
                loss.backward()
        if hooks:
            assert all(p.grad is None for p in model.parameters())
            norms.append(hooks.norm())
            optimizer.found_inf = hooks.bad.float()
        else:
            norms.append(torch.nn.utils.get_total_norm([p.grad.float() for p in model.parameters()]))
        optimizer.step()
        optimizer.zero_grad()
    return {n: p.detach().clone() for n, p in model.named_parameters()}, norms


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_an_uninterrupted_one(kind, cpu_form, tmp_path):
    steps = batches()
    model, optimizer = make(kind)
    want, _ = learn(model, optimizer, steps)
    first, interrupted = make(kind)
    learn(first, interrupted, steps[:3])
    write_tensors(tmp_path / "optimizer.safetensors", optimizer_tensors(interrupted), None)
    second, resumed = make(kind)
    second.load_state_dict(first.state_dict())
    load_optimizer(resumed, tmp_path)
    got, _ = learn(second, resumed, steps[3:])
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert any(not torch.equal(p, first.get_parameter(name)) for name, p in want.items())
    saved, other = optimizer_tensors(resumed), optimizer_tensors(optimizer)
    assert saved.keys() == other.keys()
    assert all(torch.equal(saved[key], other[key]) and saved[key].dtype == other[key].dtype for key in saved)
    quantized = any(t.dtype == torch.uint8 for t in saved.values())
    assert quantized == kind.startswith("8 bits")


@pytest.mark.parametrize("saved, loaded", [("fused", "8 bits"), ("8 bits", "fused"), ("Kahan", "stochastic")])
def test_the_state_of_another_optimizer_is_refused(saved, loaded, tmp_path):
    model, optimizer = make(saved)
    learn(model, optimizer, batches(1))
    write_tensors(tmp_path / "optimizer.safetensors", optimizer_tensors(optimizer), None)
    with pytest.raises(InputError, match="another optimizer.*--optimizer and --weights"):
        load_optimizer(make(loaded)[1], tmp_path)


def test_moments_that_do_not_fit_are_refused(tmp_path):
    model, optimizer = make("8 bits")
    learn(model, optimizer, batches(1))
    tensors = optimizer_tensors(optimizer)
    key = next(key for key in tensors if key.startswith("exp_avg_absmax/"))
    tensors[key] = tensors[key][:-1].clone()
    write_tensors(tmp_path / "optimizer.safetensors", tensors, None)
    with pytest.raises(InputError, match="exp_avg_absmax of .* another shape"):
        load_optimizer(make("8 bits")[1], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_updates_inside_the_backward_pass_are_the_ordinary_ones(kind, cpu_form):
    steps = batches(4)
    assert max(len(packs) for packs in steps) > 1
    want, norms = learn(*make(kind), steps)
    got, other = learn(*make(kind, optimizer_in_backward=True, max_grad_norm=0.0), steps, at_once=True)
    assert all(torch.equal(got[name], want[name]) for name in want)
    torch.testing.assert_close(torch.stack(other), torch.stack(norms), rtol=1e-5, atol=0)


def test_updates_inside_the_backward_pass_where_the_table_is_projected():
    """Then the audio table's gradient has two parts: each update waits for both."""
    steps = batches(4, rows=120, fraction=1.0)
    vocabulary = (MICRO.num_codebooks - 1) * MICRO.audio_vocab_size
    assert max(len(p.decoder_index) * (MICRO.num_codebooks - 1) for packs in steps for p in packs) > vocabulary
    want, norms = learn(*make("Kahan"), steps)
    got, other = learn(*make("Kahan", optimizer_in_backward=True, max_grad_norm=0.0), steps, at_once=True)
    assert all(torch.equal(got[name], want[name]) for name in want)
    torch.testing.assert_close(torch.stack(other), torch.stack(norms), rtol=1e-5, atol=0)


def test_updates_inside_the_backward_pass_are_not_clipped_by_an_earlier_norm():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = AdamW([p])
    clip_gradients(optimizer, 1.0, torch.tensor(1000.0))
    with UpdateInBackward(optimizer, torch.tensor(False)):
        p.sum().backward()
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], torch.full((3,), 0.1))


@pytest.mark.parametrize("recomputed", ["selective", "full"])
def test_updates_inside_the_backward_pass_and_recomputed_activations(recomputed):
    """A layer that runs again must do so with the weights of its first run."""
    steps = batches(2)
    want, _ = learn(*make("8 bits, stochastic"), steps)
    model, optimizer = make("8 bits, stochastic")
    model.activation_checkpointing = recomputed
    got, _ = learn(model, optimizer, steps, at_once=True)
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_loss_updates_nothing_inside_the_backward_pass(kind):
    model, optimizer = make(kind)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    after, _ = learn(model, optimizer, batches(1), at_once=True, bad=True)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(not state["step"] for state in optimizer.state.values())


@pytest.mark.parametrize("kind", [functools.partial(torch.optim.AdamW, fused=True), AdamW])
def test_a_gradient_that_is_not_finite_stops_the_updates_after_it(kind):
    class Poisoned(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * float("nan")

    first, second, third = (torch.nn.Linear(4, 4, bias=False) for _ in range(3))
    before = [layer.weight.detach().clone() for layer in (first, second, third)]
    optimizer = kind([layer.weight for layer in (first, second, third)])
    at_once = UpdateInBackward(optimizer, torch.tensor(False))
    with at_once:
        third(Poisoned.apply(second(first(torch.ones(2, 4))))).sum().backward()
    assert bool(at_once.bad) and not torch.isfinite(at_once.norm())
    after = [layer.weight.detach() for layer in (first, second, third)]
    assert [torch.equal(a, b) for a, b in zip(after, before, strict=True)] == [True, True, False]
    third.weight.grad = None
    third(torch.ones(2, 4)).sum().backward()  # the hooks are gone
    assert third.weight.grad is not None


# -------------------------------------------------------------------------------------------------------- choosing


def test_what_is_made_of_a_section(caplog):
    skip_without_bitsandbytes()
    with native.left_out():
        assert type(make("fused")[1]) is torch.optim.AdamW
    if native.is_built():
        assert type(make("fused")[1]) is AdamW
    for kind, (optimizer, weights) in KINDS.items():
        model, made = make(kind)
        assert all(p.dtype == (F32 if weights == "fp32" else BF16) for p in model.parameters())
        if kind != "fused":
            assert made.bits == (8 if "8bit" in optimizer else 32) and made.seed == 3 and not made.paged
            assert weights == "fp32" or made.rounding == weights.removeprefix("bf16-")
            assert [g["weight_decay"] for g in made.param_groups] == [0.002, 0.0]
    with caplog.at_level(logging.INFO, "csm_fast"):
        made = make_optimizer(random_model(MICRO), OptimizerSection(optimizer="paged-adamw-8bit"))
    assert made.bits == 8 and not made.paged
    assert [r.getMessage() for r in caplog.records if "aged" in r.getMessage()] == [
        "Paged moments are for CUDA: here they are in 8 bits, but not paged."
    ]


def test_8_bits_without_bitsandbytes(monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError, match=r"8-bit moments need bitsandbytes.*pip install -e '\.\[qlora\]'"):
        make_optimizer(random_model(MICRO), section("8 bits"))


@pytest.mark.slow
def test_the_benchmark_of_bf16_updates(tmp_path, monkeypatch):
    skip_without_bitsandbytes()
    monkeypatch.setitem(NAMED_SHAPES, "tiny", lambda: MICRO)
    monkeypatch.setattr(bf16_updates, "keep_freed_memory", lambda: None)  # it is for the whole process
    results, plot = tmp_path / "rows.jsonl", tmp_path / "plot.png"
    argv = ["--synthetic", "10", "--batch-size", "2", "--base-steps", "8", "--steps", "8", "--val-every", "4"]
    monkeypatch.setattr(sys, "argv", ["bf16_updates", *argv, "--results", str(results)])
    assert bf16_updates.main() == 0
    rows = {row["way"]: row for row in map(json.loads, results.read_text().splitlines())}
    assert list(rows) == list(bf16_updates.WAYS)
    for row in rows.values():
        assert len(row["train_loss"]) == 8 and [step for step, _ in row["val_loss"]] == [0, 4, 8]
        assert row["val_loss"][0] == rows["bf16, Kahan"]["val_loss"][0] or row["weights"] == "fp32"
    assert rows["float32 masters"]["never_changed"] < rows["bf16, Kahan"]["never_changed"]
    assert rows["bf16, Kahan"]["never_changed"] < rows["bf16, to nearest"]["never_changed"]
    assert rows["bf16, to nearest"]["scales_never_changed"] == 1
    monkeypatch.setattr(sys, "argv", ["bf16_updates", "--from", str(results), "--plot", str(plot)])
    assert bf16_updates.main() == 0
    assert plot.read_bytes().startswith(b"\x89PNG") and len(results.read_text().splitlines()) == len(rows)
