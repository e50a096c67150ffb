"""Layers, stacks and the model are called as modules, so that hooks and wrappers take part; where options are kept."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any

import pytest
import torch
from adapter_cases import make_pack
from model_cases import random_model
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from train_cases import config

from csm_fast import CSM
from csm_fast.model.compile import compile_layers, uncompiled
from csm_fast.model.layer import Layer
from csm_fast.model.loss import amortized_loss, packed_loss
from csm_fast.model.run_options import RunOptions, run_options_of
from csm_fast.model.stacks import Transformer
from csm_fast.train.loop import train
from csm_fast.weights.shape import scratch_shape

# The model's inputs are no tensors that require gradients.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")


def counted(model: CSM) -> Counter[str]:
    """Counts the calls of the model, its stacks and its layers by name; the model's is ''."""
    calls: Counter[str] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, CSM | Transformer | Layer):
            module.register_forward_pre_hook(lambda *_, name=name: calls.update([f"{name} before"]))
            module.register_forward_hook(lambda *_, name=name: calls.update([name]))
            module.register_full_backward_pre_hook(lambda *_, name=name: calls.update([f"{name} backward"]))
    return calls


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("checkpointing", "compiled"), [("off", False), ("selective", False), ("full", False), ("full", True)]
)
def test_hooks_run_once_in_a_training_step(checkpointing, compiled):
    model, pack = random_model(), make_pack()
    model.activation_checkpointing = checkpointing
    want_loss, want_parts = packed_loss(model, pack, 0.4, 0.6)
    want = gradients(model, want_loss)
    if compiled:
        compile_layers(model, backend="eager")
    calls = counted(model)
    loss, parts = amortized_loss(0.4, 0.6)(model, pack)
    got = gradients(model, loss)
    stacks = ("backbone", "decoder")
    names = ["", *stacks, *(f"{stack}.layers.{i}" for stack in stacks for i in range(2))]
    assert calls == dict.fromkeys([n + when for n in names for when in (" before", "", " backward")], 1)
    if compiled:  # as it is written, and not by the CPU's own layer, which rounds differently
        torch.testing.assert_close(loss, want_loss)
        torch._dynamo.reset()
    else:
        assert torch.equal(loss, want_loss) and torch.equal(parts, want_parts)
        assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


def test_a_run_calls_the_model(tmp_path):
    settings = config(tmp_path, max_steps=2, val_every=0)
    model = CSM(scratch_shape(settings.model.model)).init_weights()
    calls = counted(model)
    train(settings, model=model)
    assert calls[""] == calls[" backward"] >= 2


@contextlib.contextmanager
def one_process(folder: Any):
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


needs_gloo = pytest.mark.skipif(
    not distributed.is_available() or not distributed.is_gloo_available(), reason="needs gloo"
)


@needs_gloo
def test_ddp_gives_the_same_gradients(tmp_path):
    model, pack, loss_function = random_model(), make_pack(), amortized_loss(0.4, 0.6)
    want = gradients(model, loss_function(model, pack)[0])
    with one_process(tmp_path):
        wrapped = DistributedDataParallel(model)
        calls = counted(model)
        got = gradients(wrapped, loss_function(wrapped, pack)[0])
    assert calls[""] == 1
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


@needs_gloo
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")  # a layer's output is a view; nothing changes it in place
@pytest.mark.parametrize("checkpointing", ["off", "selective", "full"])
def test_fully_shard_gives_the_same_gradients(checkpointing, tmp_path):
    from torch.distributed.fsdp import fully_shard

    pack, loss_function, found = make_pack(), amortized_loss(0.4, 0.6), []
    with one_process(tmp_path):
        for sharded in (False, True):
            model = random_model()
            model.activation_checkpointing = checkpointing
            mesh = distributed.init_device_mesh("cpu", (1,))
            for module in (*model.backbone.layers, *model.decoder.layers, model) if sharded else ():
                fully_shard(module, mesh=mesh)
            grads = gradients(model, loss_function(model, pack)[0])
            found.append({name: grad.full_tensor() if sharded else grad for name, grad in grads.items()})
    want, got = found
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


# ------------------------------------------------------------------------------------------------------------ options


def test_options_are_set_on_the_model_or_in_run():
    model = random_model()
    assert model.run == RunOptions() and run_options_of(model) is model.run
    assert (model.activation_checkpointing, model.adapter, model.embedding_rows) == ("off", None, None)
    model.activation_checkpointing, model.decoder_loss_weight, model.amortization_fraction = "selective", 0.3, 0.25
    assert model.run == RunOptions("selective", decoder_loss_weight=0.3, amortization_fraction=0.25)
    model.run.checkpointing = "full"
    assert model.activation_checkpointing == "full"
    assert not {"activation_checkpointing", "adapter"} & vars(model).keys()


def test_options_of_another_module_are_its_attributes():
    other: Any = nn.Module()
    other.run = "its own"
    options = run_options_of(other)
    assert options == RunOptions() and run_options_of(other) is options and other.run == "its own"
    other.activation_checkpointing, other.decoder_loss_weight = True, 0.3
    assert run_options_of(other).recompute == "full" and run_options_of(other).decoder_loss_weight == 0.3


def test_layers_run_eagerly_within_uncompiled():
    model = random_model()
    compile_layers(model, backend="eager")
    compiled = model.run.backbone_layer, model.run.decoder_layer
    assert None not in compiled and compiled[0] is not compiled[1]
    with pytest.raises(KeyError), uncompiled(model):
        assert model.run.backbone_layer is None and model.run.decoder_layer is None
        raise KeyError
    assert (model.run.backbone_layer, model.run.decoder_layer) == compiled
