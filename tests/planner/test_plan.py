"""``csm-fast plan``: cards, tables, and a command that does what the plan says."""

from __future__ import annotations

import json
import re
import shlex

import pytest
from paths import ROOT
from train_cases import make_store, write_model

from csm_fast import cli
from csm_fast.commands import plan
from csm_fast.config.commands import PlanConfig
from csm_fast.config.parse import build, read_yaml
from csm_fast.config.shape import CSMConfig
from csm_fast.config.train import TrainConfig
from csm_fast.planner import gpus
from csm_fast.planner.estimate import estimate
from csm_fast.planner.speed import flops, rows_per_second
from csm_fast.planner.variants import plan_variant
from csm_fast.system.errors import InputError
from csm_fast.system.memory import GIB
from csm_fast.weights.config_json import sesame_config, transformers_config
from csm_fast.weights.shape import model_shape


def printed(capsys, *argv: str) -> list[str]:
    assert cli.main(["plan", *argv]) in (0, 1)
    return capsys.readouterr().out.splitlines()


def table(lines: list[str], head: str = "method") -> dict[str, list[str]]:
    """Cells by method of the table whose head holds ``head``."""
    first = next(i for i, line in enumerate(lines) if line.startswith("method") and head in line)
    rows = lines[first + 1 : lines.index("", first)]
    return {row[:16].strip(): row[16:].split() for row in rows}


# -------------------------------------------------------------------------------------------------------------- cards


@pytest.mark.parametrize(
    "text, name",
    [
        ("rtx-4090", "rtx-4090"),
        ("RTX 4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 3090", "rtx-3090"),
        ("rtx3090ti", "rtx-3090-ti"),
        ("t4", "t4"),
        ("RTX A6000", "rtx-a6000"),
        ("a100-80", "a100-80gb"),
        ("h200", "h200"),
    ],
)
def test_cards_by_name(text, name):
    assert gpus.find_gpu(text) is gpus.GPUS[name]


@pytest.mark.parametrize("text, gib", [("12GB", 11.7), ("8gb", 7.7), ("24 GB", 23.7), ("12GiB", 12), ("10.5GiB", 10.5)])
def test_cards_by_memory(text, gib):
    assert gpus.find_gpu(text).gib == gib


@pytest.mark.parametrize(
    "text, said",
    [
        ("rtx-4091", "did you mean rtx-4090"),
        ("a100", "a100-40gb or a100-80gb"),
        ("toaster", "12GB"),
        ("5MB", "too little"),
    ],
)
def test_unknown_cards_are_refused_with_the_nearest(text, said):
    with pytest.raises(InputError, match=re.escape(said)):
        gpus.find_gpu(text)


@pytest.mark.parametrize(
    "said, name",
    [
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("Tesla T4", "t4"),
        ("NVIDIA RTX A6000", "rtx-a6000"),
        ("Tesla V100-SXM2-16GB", "v100-16gb"),
        ("NVIDIA GeForce RTX 3090 Ti", "rtx-3090-ti"),
    ],
)
def test_drivers_names(said, name):
    assert gpus.known_gpu(said) is gpus.GPUS[name]


def test_what_is_known_of_cards_is_whole():
    for gpu in gpus.GPUS.values():
        assert gpu.gib > 4 and gpu.tflops > 10 and gpu.gb_per_s > 100
        assert gpu.fp16_only == (gpu.name.startswith(("v100", "t4", "rtx-20")))
    assert gpus.known_gpu("Some Card") is None and not gpus.GPU("12GB", 11.7).fp16_only


# --------------------------------------------------------------------------------------------------------- the tables


def test_every_method_is_planned(capsys):
    lines = printed(capsys, "--gpu", "rtx-4090")
    assert max(map(len, lines[:-1])) <= 80
    sizes = table(lines, "weight")
    assert list(sizes) == ["full", "full 8-bit", "full bf16 8-bit", "dora", "lora", "qlora"]
    for cells in sizes.values():
        *parts, total = map(float, cells[1:])
        assert sum(parts) == pytest.approx(total, abs=0.05)
    fits = table(lines, "fits")
    assert fits["full"][0] == "no" and fits["qlora"][0] == "yes"
    bars = [line for line in lines if re.match(r"full .*\|", line)]
    assert bars and bars[0].index("|") > 20
    assert any("not a measurement" in line for line in lines)


@pytest.mark.slow
def test_the_command_at_the_end_does_what_the_plan_says(capsys):
    for argv in (
        ["--gpu", "12GB"],
        ["--gpu", "t4"],
        ["--gpu", "8GB", "--train-heads", "--rows", "1024"],
        ["--gpu", "80GB"],
    ):
        lines = printed(capsys, *argv)
        words = shlex.split(lines[-1])
        assert words[0] == "csm-fast-train"
        config = cli._parse("csm-fast-train", cli.COMMANDS["train"], words[1:])
        name = re.search(r"\((.*)\)", lines[-2])[1]  # type: ignore[index]
        found = estimate(CSMConfig.csm_1b(), config, rows=config.data.pack_rows, device="cuda")
        assert found.needed / GIB == pytest.approx(float(table(lines, "weight")[name][-1]), abs=0.006)
        assert found.needed <= gpus.find_gpu(argv[1]).bytes
        assert config.model.precision == ("fp16" if "t4" in argv else "auto")


def test_a_pack_that_is_too_large_is_told_what_fits(capsys):
    lines = printed(capsys, "--gpu", "6GB", "--method", "lora", "--rows", "60000")
    assert table(lines, "fits")["lora"][0] == "no"
    rows = int(re.search(r"--rows (\d+)", lines[-1])[1])  # type: ignore[index]
    lines = printed(capsys, "--gpu", "6GB", "--method", "lora", "--rows", str(rows))
    assert table(lines, "fits")["lora"][0] == "yes"


def test_too_little_for_anything(capsys):
    assert cli.main(["plan", "--gpu", "2GB", "--method", "full"]) == 1
    assert "Nothing fits" in capsys.readouterr().out


def test_more_memory_means_less_recomputation(capsys):
    found = [
        table(printed(capsys, "--gpu", size, "--method", "lora"), "fits")["lora"][1] for size in ("6GB", "9GB", "24GB")
    ]
    assert found == ["full", "selective", "off"]
    given = printed(capsys, "--gpu", "24GB", "--method", "lora", "--activation-checkpointing", "full")
    assert table(given, "fits")["lora"][1] == "full"


def test_an_optimizer_that_was_asked_for_is_the_one_planned(capsys):
    sizes = table(printed(capsys, "--gpu", "24GB", "--weights", "bf16-kahan"), "weight")
    assert list(sizes) == ["full", "dora", "lora", "qlora"]
    lines = printed(capsys, "--gpu", "24GB", "--method", "full", "--weights", "bf16-kahan", "--optimizer", "adamw-8bit")
    assert "--weights bf16-kahan" in lines[-1] and "--optimizer adamw-8bit" in lines[-1]


def test_a_card_without_bf16_is_planned_in_fp16(capsys):
    lines = printed(capsys, "--gpu", "t4")
    assert "full bf16 8-bit" not in table(lines, "weight") and "--precision fp16" in lines[-1]
    with pytest.raises(InputError, match="multiplies no bf16"):
        plan.run(build(PlanConfig, {"gpu": "t4", "weights": "bf16-kahan"}))


def test_data_tell_hours_and_the_share_of_audio(capsys, tmp_path):
    make_store(tmp_path / "tokens", conversations=40)
    lines = printed(capsys, "--gpu", "rtx-4090", "--data", str(tmp_path / "tokens"))
    store = plan.read_store(str(tmp_path / "tokens"))
    assert f"{store.audio_share:.0%} (of the data)" in lines[1]
    assert all(cells[-1] == "s" for name, cells in table(lines, "fits").items() if cells[0] == "yes")
    assert f"--data {tmp_path / 'tokens'}" in lines[-1]
    with pytest.raises(InputError):
        plan.run(build(PlanConfig, {"gpu": "12GB", "data": str(tmp_path / "nothing")}))


def test_without_a_card_it_is_this_machine(capsys):
    lines = printed(capsys, "--model", "tiny", "--memory-limit", "8GiB", "--device", "cpu")
    assert lines[0].endswith("8.0 GiB") and "--from-scratch" in lines[-1]


# ---------------------------------------------------------------------------------------------------------- the model


def test_shapes_and_files_of_models(tmp_path):
    small = CSMConfig.small()
    assert model_shape("small") == small
    assert model_shape("sesame/csm-1b") == model_shape("csm-1b") == CSMConfig.csm_1b()
    (tmp_path / "config.json").write_text(json.dumps(sesame_config(small)))
    assert model_shape(str(tmp_path)) == model_shape(str(tmp_path / "config.json")) == small
    theirs = tmp_path / "theirs.json"
    theirs.write_text(json.dumps({"model_type": "csm", **transformers_config(small)}))
    assert model_shape(str(theirs)).backbone.embed_dim == small.backbone.embed_dim
    assert model_shape(str(write_model(tmp_path / "model.yaml"))).num_codebooks == 6
    for wrong in ("nobody/nothing", str(tmp_path / "none.json")):
        with pytest.raises(InputError, match="no such shape"):
            model_shape(wrong)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(InputError, match="JSON"):
        model_shape(str(tmp_path / "broken.json"))


def test_operations_of_a_full_step_are_those_of_the_design():
    """6 per weight of the backbone and row; per frame that the depth decoder sees, 32 positions of 6 per weight."""
    one = CSMConfig.csm_1b()
    run = build(TrainConfig, {})
    rows = 1000
    none = flops(one, build(TrainConfig, {"amortization_fraction": 1e-9}), rows, 1.0)
    assert none / rows == pytest.approx(5.84e9 + 25e6, rel=0.005)
    assert flops(one, run, rows, 1.0) / rows == pytest.approx(7.2e9, rel=0.01)
    lora = flops(one, build(TrainConfig, {"method": "lora"}), rows, 1.0)
    assert lora / flops(one, run, rows, 1.0) == pytest.approx(2 / 3, rel=0.03)
    again = flops(one, build(TrainConfig, {"activation_checkpointing": "full"}), rows, 1.0)
    assert again / flops(one, run, rows, 1.0) == pytest.approx(4 / 3, rel=0.01)


def test_a_faster_card_is_predicted_to_be_faster():
    one, run = CSMConfig.csm_1b(), build(TrainConfig, {"method": "lora"})
    slow, fast = (rows_per_second(one, run, gpus.GPUS[name], 4096, 0.8, 10**7) for name in ("rtx-3060", "h100"))
    assert slow and fast and fast > 10 * slow
    assert rows_per_second(one, run, gpus.find_gpu("12GB"), 4096, 0.8, 10**7) is None


@pytest.mark.parametrize("size", ["8gb", "12gb", "16gb", "24gb"])
def test_a_recipe_fits_the_card_it_is_named_after(size):
    config = build(TrainConfig, read_yaml(str(ROOT / f"configs/gpu-{size}.yaml"), TrainConfig))
    found = estimate(CSMConfig.csm_1b(), config, rows=config.data.pack_rows, device="cuda", packs=2)
    assert found.needed <= gpus.find_gpu(size).bytes
    rows = plan_variant(
        "recipe",
        {},
        build(PlanConfig, read_yaml(str(ROOT / f"configs/gpu-{size}.yaml"), PlanConfig)),
        CSMConfig.csm_1b(),
        gpus.find_gpu(size),
        "cuda",
        None,
    )
    assert rows.fits


@pytest.mark.parametrize("seconds, text", [(3, "3 s"), (99, "99 s"), (600, "10 min"), (7200, "2.0 h")])
def test_durations(seconds, text):
    assert plan.format_duration(seconds) == text
