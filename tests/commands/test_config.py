"""Configuration: one set of dataclasses behind Python, YAML and flags."""

import argparse

import pytest
import yaml
from paths import ROOT

from csm_fast import InputError, cli
from csm_fast.config.parse import Parser, add_flags, build, dump_yaml, from_flags, list_settings, read_yaml
from csm_fast.config.shape import CSMConfig
from csm_fast.config.train import TrainConfig
from csm_fast.system.device import resolve_device
from csm_fast.train.optim.schedule import learning_rate, warmup_steps


def parse(*argv, config=None):
    parser = Parser(prog="csm-fast-train", allow_abbrev=False)
    add_flags(parser, TrainConfig)
    return from_flags(TrainConfig, parser.parse_args(list(argv)), config)


def test_names_are_unique_over_all_sections():
    fields = [field for _, field, _ in list_settings(TrainConfig)]
    found = [name for field in fields for name in [field.name, *field.metadata.get("alias", ())]]
    found = [name.replace("-", "_") for name in found]
    assert len({*found}) >= len(found) - 1, "an alias may repeat its own field's name only"


def test_flags_of_migrating_users_are_taken():
    config = parse(
        "--model_name_or_checkpoint_path", "x.safetensors", "--train_from_scratch", "--grad_acc_steps", "4",
        "--n_epochs", "3", "--output_dir", "exp", "--val_every", "7", "--gen_sentences", "hi", "--fcw", "2.0",
        "--loss", "csm-mlx", "--max-norm", "0.5", "--lr", "1e-4", "--ckpt_freq", "9", "--mask-speaker-ids", "0,1",
        "--mask-speaker-ids", "4", "--gradient-ckpt",
    )  # fmt: skip
    assert config.model.model == "x.safetensors" and config.model.from_scratch
    assert config.model.activation_checkpointing
    assert (config.data.gradient_accumulation, config.run.n_epochs, config.run.output_dir) == (4, 3, "exp")
    assert config.loss.first_codebook_weight_multiplier == 2.0
    assert (config.optimizer.max_grad_norm, config.optimizer.learning_rate) == (0.5, 1e-4)
    assert config.run.save_every == 9 and config.data.mask_speaker_ids == [0, 1, 4]


def test_flags_override_yaml_and_the_resolved_file_reads_back(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("learning_rate: 3e-4\noptimizer:\n  lr_decay: cosine\nbatch_size: 16\nwarmup_steps: null\n")
    config = parse("--batch-size", "2", "--no-resume", config=str(file))
    assert (config.optimizer.learning_rate, config.optimizer.lr_decay) == (3e-4, "cosine")
    assert config.data.batch_size == 2 and config.run.resume is False
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_yaml(config))
    assert build(TrainConfig, read_yaml(resolved, TrainConfig)) == config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning_rte: 1", "unknown setting learning_rte; did you mean learning_rate?"),
        ("a: 1\na: 2", "row 2: the key a is there twice"),
        ("learning_rate: 1\nlr: 2", "learning_rate is set twice"),
        ("batch_size: many", "batch_size is 'many'; give an integer"),
        ("batch_size: 2.5", "batch_size is 2.5; give an integer"),
        ("batch_size: true", "batch_size is True; give an integer"),
        ("from_scratch: 1", "from_scratch is 1; give true or false"),
        ("lr_decay: step", "give one of linear, cosine"),
        ("- 1\n- 2", "holds no mapping"),
        ("a: [1", "is not YAML"),
        ("run: 3", "section of settings"),
        ("loss: csm-mlx\ndecoder_loss_weight: 0.5", "decoder_loss_weight does not belong to the loss csm-mlx"),
        ("first_codebook_weight_multiplier: 2", "does not belong to the loss blog"),
        ("warmup_steps: 3\nwarmup_ratio: 0.1", "both given"),
        ("freeze: [legs]", "--freeze legs: no such part"),
    ],
)
def test_wrong_files_are_one_line(tmp_path, text, words):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        parse(config=str(file))
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda f: f.name)
def test_shipped_configs_parse(file):
    assert isinstance(build(TrainConfig, read_yaml(file, TrainConfig)), TrainConfig)
    assert yaml.safe_load(file.read_text())


def test_model_shapes():
    import torch

    from csm_fast import CSM

    with torch.device("meta"):
        model = CSM(CSMConfig.csm_1b())
        tiny = CSM(CSMConfig.tiny())
    assert sum(p.numel() for p in model.parameters()) == 1_552_791_552
    stacks = sum(p.numel() for part in (tiny.backbone, tiny.decoder) for p in part.parameters())
    assert 4e6 <= stacks <= 8e6
    assert CSMConfig.from_dict(CSMConfig.csm_1b().to_dict()) == CSMConfig.csm_1b()
    with pytest.raises(InputError, match="file.yaml: not a csm_fast model configuration"):
        CSMConfig.from_dict({"backbone": {"layers": 3}}, file="file.yaml")


def test_schedule_counts_optimizer_steps():
    section = TrainConfig().optimizer
    section.learning_rate, section.warmup_steps = 1.0, 4
    rates = [learning_rate(section, i, 12) for i in range(12)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4] == 1.0
    assert rates[4:] == sorted(rates[4:], reverse=True) and 0 < rates[-1] == pytest.approx(1 / 8)
    section.lr_decay = "cosine"
    assert learning_rate(section, 8, 12) == pytest.approx(0.5)
    section.lr_decay = "exponential"
    assert learning_rate(section, 12, 12) == pytest.approx(0.1)
    section.lr_decay = "constant"
    assert learning_rate(section, 11, 12) == 1.0
    section.warmup_steps = 1000  # more than the run: no division by zero, never above the peak
    assert warmup_steps(section, 12) == 12 and learning_rate(section, 11, 12) == 1.0
    section.warmup_steps, section.warmup_ratio = None, 0.5
    assert warmup_steps(section, 12) == 6


def test_help_is_light():
    """--help imports nothing heavy."""
    import subprocess
    import sys

    code = "import sys; from csm_fast.cli import main\ntry: main(['train', '--help'])\nexcept SystemExit: pass\n"
    code += 'heavy = {*"torch transformers numpy matplotlib tokenizers".split()} & set(sys.modules)\n'
    code += "assert not heavy, heavy"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_parser_errors_suggest_the_flag():
    with pytest.raises(InputError, match="did you mean --learning-rate"):
        parse("--learning_rte", "3")
    assert issubclass(Parser, argparse.ArgumentParser)


@pytest.mark.parametrize("name", ["foo", "cuda:x", ""])
def test_a_device_that_is_none_is_told_in_a_few_words(name):
    with pytest.raises(InputError, match=f"--device {name or '.empty.'} names no device; use auto, cpu") as error:
        resolve_device(name)
    assert len(str(error.value)) < 80


@pytest.mark.parametrize("flag", ["--output-dir", "--output", "--out", "-o"])
def test_the_run_goes_where_the_other_commands_flags_would_put_it(flag, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "csm_fast.train.loop.train", lambda config: seen.append(config.run.output_dir) or {"complete": True}
    )
    assert cli.main(["train", flag, str(tmp_path / "there")]) == 0
    assert seen == [str(tmp_path / "there")]


@pytest.mark.parametrize(
    ("text", "words"),
    [("n_epochs: -1\n", "c.yaml: .*epochs"), ("optimizer:\n  learning_rate: .inf\n", "c.yaml: .*learning.rate")],
)
def test_a_value_that_no_setting_may_have_is_told_with_its_file(tmp_path, text, words):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError, match=words):
        parse(config=str(tmp_path / "c.yaml"))
    with pytest.raises(InputError, match="^(?!.*c.yaml)"):  # a flag's own value is not the file's
        parse("--n-epochs", "-2", "--learning-rate", "inf", config=str(tmp_path / "c.yaml"))


def test_a_section_may_be_empty(tmp_path):
    (tmp_path / "c.yaml").write_text("model:\ndata:\n  batch_size: 3\nrun:\n")
    assert parse(config=str(tmp_path / "c.yaml")).data.batch_size == 3
    (tmp_path / "c.yaml").write_text("data:\n")
    assert parse(config=str(tmp_path / "c.yaml")).data.data == "tokens"
