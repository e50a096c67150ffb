"""A run for which memory does not suffice: refused beforehand, stopped in the middle, or killed."""

import logging
import platform
import subprocess
import sys

import pytest
import torch
from train_cases import config, environment, make_trainer, prepare

from csm_fast.cli import main
from csm_fast.system.errors import OutOfMemory
from csm_fast.train.loop import train


def fails_at(trainer, step, words="CUDA out of memory. Tried to allocate 2.00 GiB."):
    plain = trainer.runner.loss_function

    def loss(model, pack):
        if trainer.state.step == step:
            raise torch.OutOfMemoryError(words)
        return plain(model, pack)

    trainer.runner.loss_function = loss
    return trainer


@pytest.mark.slow
def test_running_out_leaves_the_last_checkpoint_and_says_what_to_try(tmp_path, monkeypatch):
    settings = config(tmp_path, max_steps=6)
    made = make_trainer(settings)
    monkeypatch.setattr("csm_fast.train.loop.Trainer", lambda *_: fails_at(made, 5))
    with pytest.raises(OutOfMemory) as caught:
        train(settings)
    line = str(caught.value)
    assert "\n" not in line and "Tried to allocate 2.00 GiB" in line
    assert "step-000004 is intact" in line
    continued, new = line.split("in a new run")
    assert "with the same --output-dir --activation-checkpointing selective" in continued
    assert "--optimizer adamw-8bit" in new and "--optimizer" not in continued
    monkeypatch.undo()
    settings.model.activation_checkpointing = "selective"
    summary = train(settings)
    assert summary["complete"] and summary["steps"] == 6


@pytest.mark.slow
def test_it_is_refused_before_the_weights_are_read(tmp_path, capsys):
    """The weights file is no safetensors file, and nobody has noticed."""
    prepare(tmp_path)
    train(config(tmp_path, output_dir=str(tmp_path / "base"), max_steps=1))
    base = (tmp_path / "base/last").resolve()
    (base / "model.safetensors").write_bytes(b"no weights")
    run = tmp_path / "run"
    arguments = ["train", "--model", str(base), "--data", str(tmp_path / "tokens"), "--output-dir", str(run)]
    capsys.readouterr()
    assert main([*arguments, "--device", "cpu", "--memory-limit", "1MB"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: a step of") and "GiB" in line
    assert main([*arguments, "--device", "cpu"]) == 2
    assert "not a whole safetensors file" in capsys.readouterr().err


def test_auto_takes_the_fastest_that_fits(tmp_path, monkeypatch):
    asked = {}

    def estimate(shape, tried, **load):
        asked.update(load)
        needed = {"off": 3, "selective": 2, "full": 1}[tried.model.activation_checkpointing]
        return type("Estimate", (), {"needed": needed * 10**6, "moment": "", "peak": 0})()

    monkeypatch.setattr("csm_fast.planner.fit.estimate", estimate)
    settings = config(tmp_path, max_steps=1, memory="auto", memory_limit="2MB")
    assert make_trainer(settings).model.activation_checkpointing == "selective"
    assert asked["rows"] <= 64 and asked["packs"] >= 1 and 0 < asked["audio_share"] < 1


@pytest.mark.slow
def test_the_run_after_a_kill_says_so(tmp_path, caplog):
    settings = config(tmp_path, max_steps=6)
    trainer = make_trainer(settings)
    plain = trainer._step

    def killed(batch):
        if trainer.state.step == 4:
            # As if by the system: nothing of the run's own gets to run.
            (tmp_path / "left").write_bytes((tmp_path / "run/.running").read_bytes())
            trainer.signals.received = "the test"
        return plain(batch)

    trainer._step = killed
    trainer.run()
    assert not (tmp_path / "run/.running").exists()  # it ended in words
    (tmp_path / "left").rename(tmp_path / "run/.running")
    with caplog.at_level(logging.WARNING, logger="csm_fast"):
        train(settings)
    (line,) = [r.getMessage() for r in caplog.records if "without a message" in r.getMessage()]
    assert "after step 4" in line and "--activation-checkpointing" in line


@pytest.mark.slow
def test_a_process_keeps_freed_memory():
    """In a process of its own: the setting is for the whole process."""
    code = (
        "import sys; from csm_fast.system.device import keep_freed_memory as f; print(f() == (sys.platform == 'linux'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    # Other C libraries than glibc know no such setting.
    assert done.stdout.strip() == "True" or "glibc" not in platform.libc_ver()[0]
