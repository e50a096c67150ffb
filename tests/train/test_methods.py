"""Every method through the trainer: it learns, continues bit for bit, and what it saved is what it was."""

import json

import pytest
import torch
from safetensors.torch import load_file
from train_cases import config, make_trainer

from csm_fast import load_model
from csm_fast.data.token_store import open_split
from csm_fast.evaluate.validation import Validator
from csm_fast.system.errors import InputError
from csm_fast.train.loop import train

METHODS = {
    "full": {},
    "full in fp16": {"precision": "fp16"},
    "full 8bit": {"optimizer": "adamw-8bit"},
    "full stochastic": {"weights": "bf16-stochastic", "precision": "bf16"},
    "full kahan": {"weights": "bf16-kahan", "precision": "bf16"},
    "full stochastic 8bit": {"weights": "bf16-stochastic", "optimizer": "adamw-8bit", "precision": "bf16"},
    "full in backward": {"optimizer_in_backward": True, "max_grad_norm": 0},
    "lora": {"method": "lora", "lora_rank": 8},
    "lora everywhere": {"method": "lora", "target_modules": ["attn", "projection", "codebook0_head"], "rslora": True},
    "lora with heads": {"method": "lora", "train_heads": True, "train_embeddings": "all"},
    "lora with rows": {"method": "lora", "train_embeddings": "rows"},
    "lora with dropout": {"method": "lora", "lora_dropout": 0.2},
    "lora in bf16": {"method": "lora", "precision": "bf16"},
    "dora": {"method": "dora"},
    "qlora": {"method": "qlora"},
    "qlora in bf16": {"method": "qlora", "precision": "bf16", "activation_checkpointing": "selective"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A directory with tokens and a model that has learned something of them."""
    folder = tmp_path_factory.mktemp("base")
    train(config(folder, output_dir=str(folder / "base"), max_steps=12, n_epochs=9))
    return folder


def settings(base, output, name, **more):
    start = {"from_scratch": False, "model": str(base / "base/last"), "learning_rate": 5e-3, "max_steps": 8}
    return config(base, output_dir=str(output), n_epochs=9, **{**start, **METHODS[name], **more})


def stopped(settings, step):
    trainer = make_trainer(settings)
    ordinary = trainer._step

    def watched(batch):
        done = ordinary(batch)
        trainer.signals.received = "SIGINT" if done == step else None
        return done

    trainer._step = watched
    assert not trainer.run()["complete"]


def contents(checkpoint):
    return {f"{p.name}/{k}": v for p in sorted(checkpoint.glob("*.safetensors")) for k, v in load_file(p).items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_it_learns_continues_and_is_what_was_saved(base, tmp_path, name):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    summary = train(settings(base, whole, name))
    assert summary["val_loss_last"] < summary["val_loss_first"]
    stopped(settings(base, halves, name), 5)
    train(settings(base, halves, name))
    one, two = contents(whole / "last"), contents(halves / "last")
    assert one.keys() == two.keys()
    assert [key for key in one if not torch.equal(one[key], two[key])] == []

    model = load_model(str(whole / "last"))
    run = settings(base, whole, name)
    validator = Validator(open_split(run.data.data, "val"), run.data, run.loss, run.run.val_fraction_frames)
    loss = validator(model, torch.device("cpu"))["val_loss"]
    # Float32 again is the same; from bf16, 4 bits or fp16 the loaded model computes more finely than the run did.
    exact = METHODS[name].get("precision", "fp32") == "fp32" and METHODS[name].get("method") != "qlora"
    assert loss == pytest.approx(summary["val_loss_last"], rel=1e-5 if exact else 2e-2)


@pytest.mark.slow
def test_a_gradient_that_is_never_finite_ends_a_run_in_fp16_too(base, tmp_path):
    """Its loss is finite, so at first it looks like the search for the loss scale."""
    trainer = make_trainer(settings(base, tmp_path, "full in fp16", max_steps=50, val_every=0))
    plain = trainer.runner.loss_function

    def no_gradient(model, pack):
        loss, parts = plain(model, pack)
        return loss + (loss * 0).sqrt(), parts

    trainer.runner.loss_function = no_gradient
    with pytest.raises(InputError, match="were all skipped"):
        trainer.run()
    assert 24 < trainer.state.step < 50


@pytest.mark.slow
def test_an_adapter_checkpoint_holds_what_was_trained(base, tmp_path):
    train(settings(base, tmp_path, "lora"))
    saved = contents(tmp_path / "last")
    beside = [name for name in saved if "lora_" not in name]
    assert beside and all(name.startswith("probe.safetensors/") for name in beside)
    moments = [name for name in saved if name.startswith("optimizer.safetensors/exp_avg/")]
    assert len(moments) == sum(name.startswith("adapter_model.safetensors/") for name in saved)
    state = json.loads((tmp_path / "last/trainer_state.json").read_text())
    assert state["files"].keys() >= {"adapter_model.safetensors", "adapter_config.json", "config.json"}


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"target_modules": ["attention"]}, "attention"),
        ({"weights": "bf16-stochastic"}, "belongs to --method full"),
        ({"target_modules": ["audio_head"]}, "--train-heads"),
        ({"precision": "fp16", "optimizer_in_backward": True, "max_grad_norm": 0}, "--optimizer-in-backward cannot"),
        ({"precision": "fp16", "weights": "bf16-kahan", "method": "full", "lora_rank": 16}, "leave one of them out"),
        (
            {"lora_rank": 8, "method": "full"},
            "--lora-rank belongs to adapters.*add --method lora, or leave --lora-rank",
        ),
    ],
)
def test_what_adapters_cannot_do_is_refused(base, tmp_path, extra, words):
    with pytest.raises(InputError, match=words):
        train(settings(base, tmp_path, "lora", **extra))


@pytest.mark.slow
def test_a_run_of_adapters_goes_on_from_its_own_base_only(base, tmp_path):
    stopped(settings(base, tmp_path / "run", "lora"), 5)
    other = config(base, output_dir=str(tmp_path / "other"), max_steps=2, seed=3)
    train(other)
    with pytest.raises(InputError, match="give the base it was trained on"):
        train(settings(base, tmp_path / "run", "lora", model=str(tmp_path / "other/last")))
    for change in ({"lora_alpha": 99.0}, {"rslora": True}):  # another model than the one that was saved
        with pytest.raises(InputError, match=f"the run was made with {next(iter(change))}"):
            train(settings(base, tmp_path / "run", "lora", **change))
