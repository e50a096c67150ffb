"""Settings that ``csm-fast train`` refuses in one line, of a new run and of one that is continued."""

from __future__ import annotations

import json

import pytest
import torch
from command_cases import train_args
from train_cases import make_store, prepare

from csm_fast import cli
from csm_fast.config.parse import read_mapping
from csm_fast.config.train import FREEZABLE

pytestmark = pytest.mark.usefixtures("home", "fresh_log")


YAML = {
    "unknown key": ("learning_rat: 1\n", "c.yaml: unknown setting learning_rat", "did you mean learning_rate?"),
    "duplicate key": ("seed: 1\nseed: 2\n", "c.yaml, row 2: the key seed is there twice", "keep one"),
    "twice by two names": ("lr: 1\nlearning_rate: 2\n", "c.yaml: learning_rate is set twice", "keep one"),
    "mistyped": ("batch_size: many\n", "c.yaml: batch_size is 'many'", "give an integer"),
    "half a batch": ("batch_size: 1.5\n", "c.yaml: batch_size is 1.5", "give an integer"),
    "a truth": ("batch_size: true\n", "c.yaml: batch_size is True", "give an integer"),
    "a choice": ("loss: best\n", "c.yaml: loss is 'best'", "one of blog, sesame-finetune"),
    "wrong section": ("data: {learning_rate: 1}\n", "c.yaml: learning_rate is no setting of data", "under optimizer"),
    "no section": ("data: {batch_size: 1}\nrun: 3\n", "c.yaml: run must be a section", "indent"),
    "not YAML": ("a: [1\nb: 2\n", "c.yaml, row 2: is not YAML", "correct it there"),
    "a list": ("- seed\n", "c.yaml: holds no mapping", "write lines like"),
    "a list for a key": ("? [a, b]\n: 3\n", "c.yaml, row 1: is not YAML (a key that is not a name)", "correct it"),
    "no such day": ("output_dir: 2024-13-45\n", "c.yaml: is not usable YAML", "correct it"),
    "bytes": ("\x00\x01\x02", "c.yaml: is not YAML", "correct it"),
}


@pytest.mark.parametrize("case", YAML)
def test_configuration_files(tmp_path, refused, case):
    text, *words = YAML[case]
    (tmp_path / "c.yaml").write_text(text)
    refused(["train", "--config", "c.yaml", "--output-dir", "run"], *words)


FLAGS = {
    "both warmups": ("--warmup-steps 3 --warmup-ratio 0.1", "warmup_steps and warmup_ratio are both given", "one of"),
    "a weight of another loss": ("--loss csm-mlx --decoder-loss-weight 0.5", "does not belong to the loss csm-mlx"),
    "a multiplier of another loss": ("--fcw 2", "first_codebook_weight_multiplier does not belong to the loss blog"),
    "negative rate": ("--lr -1", "learning_rate is -1.0", "at least 0"),
    "no rate": ("--lr nan", "learning_rate is nan"),
    "no epsilon": ("--adam-eps 0", "adam_eps is 0.0", "above 0"),
    "beta": ("--beta2 1", "beta2 is 1.0", "below 1"),
    "empty batch": ("--batch-size 0", "--batch-size 0", "at least 1"),
    "no steps": ("--max-steps 0", "max_steps is 0", "at least 1"),
    "negative epochs": ("--n-epochs -2", "n_epochs is -2", "at least 1"),
    "too much": ("--amortization-fraction 1.5", "amortization_fraction is 1.5", "at most 1"),
    "huge seed": ("--seed 99999999999999999999", "--seed 99999999999999999999", "2^63 - 1"),
    "huge speaker": ("--mask-speaker-ids 4294967296", "--mask-speaker-ids 4294967296", "2^31 - 1"),
    "everyone": ("--mask-speaker-ids 0 1", "tokens/train: --mask-speaker-ids masks every turn", "leave at least one"),
    "unknown part": ("--freeze backbon", "--freeze backbon: no such part", "choose among"),
    "everything frozen": ("--freeze " + " ".join(FREEZABLE), "leaves nothing to train", "freeze fewer"),
    "unknown flag": ("--learning-rat 1", "unrecognized arguments", "did you mean --learning-rate?"),
    "no value": ("--batch-size", "expected one argument", "--help"),
    "no device": ("--device cuda:9", "--device cuda:9 is not there", "use auto or cpu"),
    "no machine": ("--device toaster", "--device toaster names no device", "use auto, cpu, cuda"),
    "no threads": ("--threads 0", "--threads 0", "1 to 1024"),
    "no config": ("--config nowhere.yaml", "nowhere.yaml: cannot be read", "check the path"),
    "endless samples": ("--gen-every 1 --gen-seconds inf", "--gen-seconds inf", "at most 160"),
    "no sentences": ("--gen-every 1 --gen-sentences nowhere.txt", "nowhere.txt: cannot be read", "--gen-sentences"),
}


@pytest.mark.parametrize("case", FLAGS)
def test_flags(tmp_path, refused, case):
    given, *words = FLAGS[case]
    prepare(tmp_path)
    if case == "no device" and torch.cuda.device_count() > 9:
        pytest.skip("this machine has ten CUDA devices, so cuda:9 exists")
    refused(train_args(tmp_path, *given.split()), *words)


def test_an_unknown_command(refused):
    refused(["trian"], "there is no command trian", "choose among")


def test_a_run_continued_as_another(tmp_path, refused):
    assert cli.main(train_args(prepare(tmp_path), max_steps=3)) == 0
    (last,) = (tmp_path / "run").glob("step-*")
    same = ("continue with the same, or start a new run",)
    refused(train_args(tmp_path, batch_size=3), str(last), "made with batch_size 4, now it is 3", *same)
    refused(train_args(tmp_path, seed=3), str(last), "made with seed 0, now it is 3", *same)
    refused(train_args(tmp_path, batch_rows=64), str(last), "made with batch_rows None, now it is 64", *same)
    make_store(tmp_path / "other", seed=3)
    refused(train_args(tmp_path, data="other"), str(last), "made with the token store", *same)
    refused(train_args(tmp_path, "--freeze", "decoder"), "was trained then and is frozen now", "use the same --freeze")
    refused(
        train_args(tmp_path, "--no-resume"), "run: holds a run already (step-000003)", "choose another --output-dir"
    )
    make_store(tmp_path / "other", seed=0, fingerprint="d" * 64)
    refused(train_args(tmp_path, data="other"), "test codec (dddddddddddd)", "the model wants cccccccccccc")
    # Damage that its sizes do not show.
    flipped = (last / "optimizer.safetensors").read_bytes()
    (last / "optimizer.safetensors").write_bytes(b"\xff" * len(flipped))
    refused(train_args(tmp_path), "optimizer.safetensors: is not a whole safetensors file", "delete this checkpoint")
    (last / "optimizer.safetensors").write_bytes(flipped)
    state = json.loads((last / "trainer_state.json").read_text())
    (last / "trainer_state.json").write_text(json.dumps({**state, "format": 99}))
    refused(train_args(tmp_path), "checkpoint format 99", "use the csm_fast version that wrote it")


def test_a_run_instead_of_its_model(tmp_path, refused):
    assert cli.main(train_args(prepare(tmp_path), max_steps=1)) == 0
    refused(["generate", "--text", "a", "--model", "run"], "run: is a run, not a model", "give run/best or run/last")
    refused(train_args(tmp_path, from_scratch=None, model="run", output_dir="x"), "run: is a run", "give run/best")


@pytest.mark.slow
def test_the_users_own_configuration_file_is_kept(tmp_path):
    (tmp_path / "run").mkdir()
    mine = "# my notes\nmax_steps: 1\n"
    (tmp_path / "run" / "config.yaml").write_text(mine)
    for _ in range(2):
        assert cli.main(train_args(prepare(tmp_path), "--config", "run/config.yaml")) == 0
    assert (tmp_path / "run" / "config.yaml").read_text() == mine
    resolved = str(tmp_path / "run" / "config.resolved.yaml")
    assert cli.main(["train", "--config", resolved, "--output-dir", "again"]) == 0
    assert cli.main(["train", "--config", resolved, "--output-dir", "again", "--max-steps", "2"]) == 0
    assert read_mapping(tmp_path / "again" / "config.yaml")["run"]["max_steps"] == 2
