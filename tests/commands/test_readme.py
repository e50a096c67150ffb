"""The commands and snippets of the README and of the pages it links to run as written, but for the model hub."""

import importlib.util
import json
import re
import shlex
import textwrap

import numpy as np
import pytest
import soundfile
from paths import ROOT

from csm_fast import cli
from csm_fast.config.commands import (
    GenerateConfig,
    MergeConfig,
    PlanConfig,
    PretokenizeConfig,
    ProfileConfig,
    VerifyAdapterConfig,
)
from csm_fast.config.parse import Parser, add_flags, from_flags
from csm_fast.config.train import TrainConfig

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [README, *((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("adapters", "performance"))]
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.M | re.S)
COMMANDS = [
    shlex.split(line, comments=True)
    for page in PAGES
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", page, re.M | re.S)
    if not language
    for line in block.splitlines()
    if line.strip()
]
OURS = [c for c in COMMANDS if c[0].startswith("csm-fast") and c[1] != "doctor"]
MODULES = sorted({c[2] for c in COMMANDS if c[:2] == ["python", "-m"]})
MODEL = textwrap.dedent("""\
    backbone: {num_layers: 1, num_heads: 2, num_kv_heads: 1, embed_dim: 16, intermediate_dim: 16}
    decoder: {num_layers: 1, num_heads: 2, num_kv_heads: 1, embed_dim: 12, intermediate_dim: 16}
    """)


def test_there_are_commands_and_make_knows_its_targets():
    assert len(OURS) >= 5 and {"profile", "verify-adapter", "merge", "plan"} <= {c[1] for c in OURS}
    makefile = (ROOT / "Makefile").read_text()
    targets = [c[1] for c in COMMANDS if c[0] == "make"]
    assert {"setup", "demo", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.M), f"no make {target}"


@pytest.mark.parametrize("name", MODULES)
def test_modules_that_are_run_exist(name):
    assert importlib.util.find_spec(name) is not None


@pytest.mark.parametrize("command", OURS, ids=lambda c: " ".join(c)[:60])
def test_flags_and_configs_parse(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    name, *argv = command
    kind = "train" if name == "csm-fast-train" else argv.pop(0)
    cls = {
        "pretokenize": PretokenizeConfig,
        "train": TrainConfig,
        "generate": GenerateConfig,
        "plan": PlanConfig,
        "profile": ProfileConfig,
        "merge": MergeConfig,
        "verify-adapter": VerifyAdapterConfig,
    }[kind]
    parser = Parser(prog=name, allow_abbrev=False)
    parser.add_argument("--config")
    add_flags(parser, cls)
    namespace = parser.parse_args(argv)
    from_flags(cls, namespace, namespace.config)


def test_flags_in_the_migration_table_exist():
    table = README[README.index("| sesame-finetune |") : README.index("## Speed")]
    flags = set(re.findall(r"`(--?[a-zA-Z][\w-]*)`", table)) | set(re.findall(r"(--[a-z][\w-]*)", table))
    parsers = []
    for cls in (TrainConfig, PretokenizeConfig):
        parser = Parser(prog="x", allow_abbrev=False)
        parser.add_argument("--config")
        add_flags(parser, cls)
        parsers.append(parser)
    known = {option for parser in parsers for option in parser._option_string_actions}
    foreign = {"--data-path"}  # raw recordings there; named to tell the difference
    unknown = sorted(flags - known - foreign)
    assert not unknown, unknown


@pytest.mark.slow
def test_the_three_commands_on_ones_own_data(tmp_path, monkeypatch):
    """Pretokenize, train, generate, with the substitutions that the README names: no hub, so the offline codec, and
    random weights."""
    monkeypatch.chdir(tmp_path)
    (rows,) = [json.loads(block) for language, block in BLOCKS if language == "json"]
    rng = np.random.default_rng(0)
    (tmp_path / "wavs").mkdir()
    for row in rows:
        seconds = 16 if row.get("end") else 2
        soundfile.write(tmp_path / row["path"], 0.1 * rng.standard_normal(16_000 * seconds), 16_000)
    (tmp_path / "metadata.json").write_text(json.dumps(rows))
    (tmp_path / "model.yaml").write_text(MODEL)
    commands = {argv[0]: argv for name, *argv in OURS if name == "csm-fast"}
    train = next(argv for name, *argv in OURS if name == "csm-fast-train")
    assert cli.main([*commands["pretokenize"], "--codec", "offline", "--workers", "1"]) == 0
    assert train[train.index("--model") + 1] == "sesame/csm-1b"
    train[train.index("--model") + 1] = "model.yaml"
    assert cli.main(["train", *train, "--from-scratch", "--max-steps", "2"]) == 0
    for name in ("run/best/model.safetensors", "run/metrics.jsonl", "tokens/report.json", "tokens/val/manifest.json"):
        assert (tmp_path / name).is_file(), name
    assert cli.main([*commands["generate"], "--max-seconds", "0.4"]) == 0
    assert soundfile.info(tmp_path / "hello.wav").samplerate == 24_000


@pytest.mark.slow
def test_python_snippets(tmp_path, monkeypatch):
    """The drop-in, training and adapters from Python, on a micro model."""
    import torch
    from train_cases import make_store, write_model

    from csm_fast import CSM, CSMConfig
    from csm_fast.config.parse import read_mapping

    monkeypatch.chdir(tmp_path)
    shape = CSMConfig.from_dict(read_mapping(write_model(tmp_path / "model.yaml")))
    make_store(tmp_path / "tokens")
    monkeypatch.setattr(CSMConfig, "tiny", classmethod(lambda cls: shape))
    tokens = torch.zeros(2, 9, 7, dtype=torch.long)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[:, :3, -1], mask[:, 3:, :-1] = True, True
    scope = {"model": CSM(shape).init_weights(0), "tokens": tokens, "tokens_mask": mask}
    adapters, drop_in, training = (block for language, block in BLOCKS if language == "python")
    exec(drop_in, scope)  # noqa: S102 - the README's own text
    assert scope["model"].audio_head.grad is not None
    assert "max_steps = 100" in training
    exec(training.replace("max_steps = 100", "max_steps = 2"), scope)  # noqa: S102
    assert scope["summary"]["complete"] and (tmp_path / "run" / "best").exists()
    lora = ["--method", "lora", "--model", "run/best", "--data", "tokens", "--max-steps", "1", "--device", "cpu"]
    assert cli.main(["train", *lora, "--output-dir", "lora"]) == 0
    exec(adapters.replace("run/best", "lora/best").replace("sesame/csm-1b", "run/best"), scope)  # noqa: S102
    assert scope["model"].adapter.section.method == "lora"
