"""Compiled layers: the same losses, one graph per stack, and nothing recompiled whatever the packs."""

from __future__ import annotations

import shutil
from functools import partial

import numpy as np
import pytest
import torch
from csm_kernels import packed_attention, pointwise
from csm_kernels.choice import Choice
from model_cases import MemoryStore, random_conversations, random_model
from torch._dynamo.utils import counters
from train_cases import config

from csm_fast.config.train import AdapterSection, DataSection, LossSection
from csm_fast.evaluate.validation import Validator
from csm_fast.model import compile, layer_cpu
from csm_fast.model.adapters import attach
from csm_fast.model.compile import compile_layers
from csm_fast.model.loss import packed_loss
from csm_fast.packing.loader import Packer
from csm_fast.report.metrics import read_metrics
from csm_fast.train.loop import train


def ragged_store(conversations=24, seed=0):
    rng = np.random.default_rng(seed)

    def turn():
        return int(rng.integers(1, 9)), int(rng.integers(1, 30)), 0

    return MemoryStore(
        random_conversations([[turn() for _ in range(rng.integers(1, 3))] for _ in range(conversations)])
    )


def packs_of(store):
    packer = Packer(store, DataSection(batch_size=3, pack_rows=100), LossSection(amortization_fraction=0.5))
    return [pack for i in range(packer.steps_in_epoch(0)) for pack in packer.step(0, i).packs]


def micro(checkpointing="off", dtype=torch.float32):
    model = random_model(scale=0.5, dtype=dtype)
    model.activation_checkpointing = checkpointing
    return model


def step(model, pack, autocast=False):
    """Loss and gradients by name."""
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, _ = packed_loss(model, pack, 0.5, 0.5)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(autouse=True)
def plain_forms(monkeypatch):
    """What a compiled layer is traced from, for the eager one too: then both round alike."""
    monkeypatch.setattr(pointwise, "choose_pointwise", lambda device: Choice("reference", "as compiled"))


@pytest.fixture(autouse=True)
def written_layers(monkeypatch):
    """Uncompiled layers run as ``run_layer`` is written, not as ``layer_cpu`` has them with fewer roundings."""
    monkeypatch.setattr(layer_cpu, "supports", lambda *_: False)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16 autocast"])
@pytest.mark.parametrize("checkpointing", ["off", "selective", "full"])
def test_an_epoch_of_ragged_packs_recompiles_nothing(autocast, checkpointing):
    """Traced as for inductor, run by PyTorch's own kernels: then the numbers are those of eager, bit for bit."""
    eager, compiled = micro(checkpointing), micro(checkpointing)
    assert compile_layers(compiled, backend="aot_eager")
    packs = packs_of(ragged_store())
    assert len({len(p.tokens) for p in packs}) > 5 and len({len(p.segments.lengths) for p in packs}) > 2
    assert len({len(p.decoder_index) for p in packs}) > 5
    for i, pack in enumerate(packs):
        (loss, grads), (want, want_grads) = (step(m, pack, autocast) for m in (compiled, eager))
        assert torch.equal(loss, want), i
        assert grads.keys() == want_grads.keys()
        assert all(torch.equal(grads[name], want_grads[name]) for name in grads)
        # Two graphs for the backbone and one for the decoder, from the first pack to the last.
        assert counters["stats"]["unique_graphs"] == 3, f"recompiled at pack {i}"
    assert not counters["graph_break"]


@torch.library.custom_op("csm_test::varlen", mutates_args=())
def varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu: torch.Tensor, longest: int) -> torch.Tensor:
    most = int(cu.diff().max())
    assert most == longest
    return torch.ops.csm_kernels.packed_attention(q, k, v, cu, True)[0]


@varlen.register_fake
def _(q, k, v, cu, longest):
    return torch.empty_like(q)


varlen.register_autograd(lambda ctx, grad: (grad, None, None, None, None), setup_context=lambda *_, **__: None)


@pytest.mark.slow
def test_the_longest_segment_is_symbolic_where_a_kernel_asks_for_it(monkeypatch):
    """The variable-length kernels of CUDA take it as an integer, another one in every pack."""
    chosen = torch.compiler.assume_constant_result(lambda device_type, dtype: "flash-attn")
    monkeypatch.setattr(packed_attention, "varlen_backend", chosen)
    monkeypatch.setattr(packed_attention, "_varlen", lambda _, q, k, v, cu, longest: varlen(q, k, v, cu, longest))
    eager, compiled = micro(), micro()
    compile_layers(compiled, backend="aot_eager")
    packs = packs_of(ragged_store())
    assert len({p.segments.max_seqlen for p in packs}) > 5
    for i, pack in enumerate(packs):
        assert torch.equal(step(compiled, pack)[0], step(eager, pack)[0])
        assert counters["stats"]["unique_graphs"] == 3, f"recompiled at pack {i}"
    assert not counters["graph_break"]


@pytest.mark.slow
def test_training_and_validation_need_two_graphs_each_and_a_single_frame_one_more():
    model, store = micro(), ragged_store()
    compile_layers(model, backend="aot_eager")
    plain = micro()
    packs = packs_of(store)
    validator = Validator(store, DataSection(pack_rows=100), LossSection(), 0.25)
    for epoch in range(3):
        for pack in packs[:3]:
            step(model, pack)
        result, want = (validator(m, torch.device("cpu")) for m in (model, plain))
        assert result.pop("per_codebook") == pytest.approx(want.pop("per_codebook"), rel=1e-6)
        assert result == pytest.approx(want, rel=1e-6)
        if epoch == 0:
            first = counters["stats"]["unique_graphs"]
        assert counters["stats"]["unique_graphs"] == first == 6
    (single,) = packs_of(MemoryStore(random_conversations([[(1, 1, 0)]])))
    assert len(single.decoder_index) == 1
    for _ in range(2):
        step(model, single)
    assert counters["stats"]["unique_graphs"] <= first + 1
    assert not counters["graph_break"]


def test_older_pytorch_has_room_for_the_variants_of_both_stacks(monkeypatch):
    """It knows no limit of one function's own."""
    monkeypatch.setattr(torch, "compile", lambda model=None, *, fullgraph=False, backend="inductor": model)
    with torch._dynamo.config.patch(recompile_limit=8):
        assert compile._limits() == {} and torch._dynamo.config.recompile_limit == 32


@pytest.mark.slow
@pytest.mark.parametrize("frozen", ["backbone", "decoder", "text_embeddings"])
def test_frozen_parts(frozen):
    eager, compiled = micro(), micro()
    compile_layers(compiled, backend="aot_eager")
    for model in (eager, compiled):
        getattr(model, frozen).requires_grad_(False)
    for pack in packs_of(ragged_store(6)):
        (loss, grads), (want, want_grads) = (step(m, pack) for m in (compiled, eager))
        assert torch.equal(loss, want) and grads.keys() == want_grads.keys()
    assert counters["stats"]["unique_graphs"] <= 6


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["off", "selective", "full"])
@pytest.mark.parametrize("method", ["lora", "dora", "qlora", "bf16 weights"])
def test_methods_compile_to_few_graphs_and_no_more(method, checkpointing):
    """The first layer of a stack may differ from the others: nothing before it is trained."""
    eager, compiled = micro(checkpointing), micro(checkpointing)
    for model in (eager, compiled):
        if method == "bf16 weights":
            model.to(torch.bfloat16)
            continue
        attach(model, AdapterSection(method=method, lora_rank=4), compute_dtype=torch.bfloat16)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at first, which would hide the rest
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    compile_layers(compiled, backend="aot_eager")
    graphs = []
    for pack in packs_of(ragged_store()):
        (loss, grads), (want, want_grads) = (step(m, pack, autocast=True) for m in (compiled, eager))
        torch.testing.assert_close(loss, want, rtol=1e-3, atol=0)
        assert grads.keys() == want_grads.keys() and grads
        for name, grad in grads.items():
            close = torch.nn.functional.cosine_similarity(
                grad.flatten().double(), want_grads[name].flatten().double(), 0
            )
            assert close > 0.995 or not want_grads[name].any(), name
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[-1] <= 6 and not counters["graph_break"]


def test_names_and_state_stay_and_off_is_off():
    model = micro()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert compile_layers(model, backend="aot_eager")
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert [n for n, _ in model.named_modules()] == [n for n, _ in micro().named_modules()]
    assert not compile_layers(model, "off")
    assert not compile_layers(model, "auto")  # its parameters are on a CPU
    step(model, packs_of(ragged_store(3))[0])
    assert counters["stats"]["unique_graphs"] == 0
    with pytest.raises(ValueError, match="choice is 'yes'"):
        compile_layers(model, "yes")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_computes_the_same_losses_and_recompiles_nothing():
    eager, compiled, wide = micro(), micro(), micro(dtype=torch.float64)
    compile_layers(compiled)
    for pack in packs_of(ragged_store(12)):
        (loss, grads), (want, want_grads), (truth, true_grads) = (step(m, pack) for m in (compiled, eager, wide))
        torch.testing.assert_close(loss, want, rtol=2e-6, atol=0)
        for name, true in true_grads.items():
            error, eager_error = (float((g[name] - true).norm() / true.norm()) for g in (grads, want_grads))
            assert error <= max(3 * eager_error, 1e-6), name
    assert counters["stats"]["unique_graphs"] == 3 and not counters["graph_break"]


@pytest.mark.slow
def test_a_run_with_the_flag_learns_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("csm_fast.train.setup.compile_layers", partial(compile_layers, backend="aot_eager"))
    curves = []
    for choice in ("off", "on"):
        train(config(tmp_path, output_dir=str(tmp_path / choice), compile=choice, n_epochs=1))
        assert bool(counters["stats"]["unique_graphs"]) == (choice == "on")
        rows = read_metrics(tmp_path / choice / "metrics.jsonl")
        curves.append([r[key] for r in rows for key in ("train_loss", "val_loss") if r[key] is not None])
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
