"""``csm-fast profile``: what it counts, what it prints and writes, and that it writes nothing else."""

from __future__ import annotations

import gzip
import inspect
import json
import logging

import pytest
import torch
from csm_kernels.cpu import linear as cpu_linear
from csm_kernels.cpu import native
from csm_kernels.cpu.short_attention import short_attention
from paths import ROOT
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import profile as torch_profile
from torch.profiler import record_function
from torch.utils.flop_counter import FlopCounterMode
from train_cases import config, flags, make_trainer, prepare, values

from csm_fast import cli
from csm_fast.commands import profile
from csm_fast.commands.profile import STEP, operator_rows
from csm_fast.config.commands import ProfileConfig
from csm_fast.config.parse import build, read_yaml
from csm_fast.model import compile

SUMMARY = {"steps", "rows", "step_ms", "first_ms", "profiled_ms", "loader_ms", "operators_ms", "products_ms", "host_ms"}
SUMMARY |= {"floor_ms", "products_floor_ms", "matmul_flops_per_s", "copy_bytes_per_s"}


@pytest.fixture(autouse=True)
def fresh_log():
    """The command's log handler keeps the stream it was made with, which is another one in every test."""
    logging.getLogger("csm_fast").handlers.clear()


@pytest.fixture(autouse=True)
def quick_rates(monkeypatch):
    monkeypatch.setattr(profile, "SQUARES", {"cpu": (64, 128)})
    monkeypatch.setattr(profile, "COPY_BYTES", 1 << 20)


# ----------------------------------------------------------------------------------------------------------- operators


def operators(work, sizes=(), flops=()) -> list[dict]:
    """The rows of ``work``."""
    with torch_profile(record_shapes=True) as profiler:
        work()
    return operator_rows(profiler.events(), "cpu", dict(flops), set(sizes), 1)


def observed(work, **given) -> dict[str, dict]:
    """The rows of ``work``, by name."""
    return {row["name"].removeprefix("aten::"): row for row in operators(work, **given)}


X, Y = torch.ones(6, 4), torch.ones(4, 5)
NARROW = torch.ones(6, 4, dtype=torch.bfloat16)
ROWS = torch.tensor([0, 3])


@pytest.mark.parametrize(
    "name, work, flops, moved",
    [
        ("mm", lambda: torch.matmul(X, Y), 2 * 6 * 4 * 5, 4 * (24 + 20 + 24)),
        ("addmm", lambda: torch.addmm(torch.ones(5), X, Y), 2 * 6 * 4 * 5, 4 * (5 + 24 + 20 + 24)),
        ("bmm", lambda: torch.bmm(X[None].expand(3, 6, 4), torch.ones(3, 4, 5)), 3 * 240, 4 * (72 + 60 + 72)),
        ("add", lambda: X + X, 0, 4 * 72),
        ("mul_", lambda: X.clone().mul_(X), 0, 4 * 72),
        ("fill_", lambda: torch.empty(6, 4).fill_(1), 0, 4 * 24),
        ("copy_", lambda: torch.empty(6, 4).copy_(NARROW), 0, 4 * 24 + 2 * 24),
        ("index_select", lambda: X.index_select(0, ROWS), 0, 0),
        ("index_add_", lambda: X.clone().index_add_(0, ROWS, X[:2]), 0, 0),
        ("index_fill_", lambda: X.clone().index_fill_(0, ROWS, 0), 0, 0),
        ("empty_like", lambda: torch.empty_like(X), 0, 0),
        ("_foreach_mul_", lambda: torch._foreach_mul_([torch.ones(3), torch.ones(5)], 2.0), 0, 2 * 4 * 8),
        ("mm", lambda: torch.mm(X, Y, out=torch.empty(6, 5)), 240, 4 * (24 + 20 + 30 + 30)),
    ],
)
def test_what_an_operator_computes_and_moves(name, work, flops, moved):
    """Bytes are estimates: the result counts as the largest input; 0 where an unknown part is touched."""
    row = observed(work)[name]
    assert (row["calls"], row["flops"], row["bytes"]) == (1, flops, moved)
    assert row["kind"] == ("product" if flops else "memory") and row["ms"] > 0


def test_shapes_and_types_are_those_of_the_inputs_and_lists_count_as_one_tensor():
    seen = observed(lambda: torch._foreach_add_([torch.ones(3), torch.ones(5)], [torch.ones(3), torch.ones(5)]))
    assert seen["_foreach_add_"]["shapes"] == [[8], [8]]
    row = observed(lambda: NARROW.float())["copy_"]
    assert (row["shapes"], row["dtypes"]) == ([[6, 4], [6, 4]], "fp32 bf16")


def test_views_are_no_operators():
    assert observed(lambda: X.view(2, 12).t()[0].unsqueeze(0).expand(3, 2).detach()) == {}


def test_a_registered_operator_is_one_operator_with_all_it_calls():
    q, k = torch.randn(3, 5, 2, 4), torch.randn(3, 5, 1, 4)
    assert set(observed(lambda: short_attention(q, k, k))) == {"csm_kernels::short_attention"}


@pytest.mark.skipif(native.function("product", torch.bfloat16) is None, reason="the library has no products here")
def test_scratch_is_not_counted():
    a, b = torch.ones(6, 4, dtype=torch.bfloat16), torch.ones(4, 5, dtype=torch.bfloat16)
    row = observed(lambda: cpu_linear.product(a, b), flops={"csm_kernels::product": 240.0})["csm_kernels::product"]
    assert row["shapes"] == [[6, 4], [4, 5]] and row["dtypes"] == "bf16"
    assert (row["flops"], row["bytes"]) == (240, 2 * (24 + 20 + 24))


def test_calls_of_one_operator_share_its_flops_like_products():
    events = [event("csm_kernels::product", i, i + 1, [[n, 8], [8, 4]], device=None) for i, n in enumerate([3, 5])]
    rows = operator_rows(events, "cpu", {"csm_kernels::product": 800.0}, {3, 4, 5, 8}, 1)
    assert {row["shapes"][0][0]: row["flops"] for row in rows} == {3: 300.0, 5: 500.0}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_all_products_of_a_training_step_are_counted(tmp_path, precision):
    """As PyTorch's own counter counts them over the same step."""
    trainer = make_trainer(config(tmp_path, precision=precision))
    batch = trainer.packer.step(0, 0)
    trainer.runner.run(batch, 1)
    with FlopCounterMode(display=False) as counter:
        trainer.runner.run(batch, 1)
    flops = {str(name).replace(".", "::"): n for name, n in counter.get_flop_counts()["Global"].items()}
    rows = operators(lambda: trainer.runner.run(batch, 1), flops=flops)
    assert sum(row["flops"] for row in rows) == pytest.approx(counter.get_total_flops(), rel=1e-9)
    assert counter.get_total_flops() > 0


def test_self_times_of_the_profiler_count_nothing_twice():
    x, y = torch.randn(64, 64), torch.randn(64, 64)
    with torch_profile(record_shapes=True) as profiler:
        for _ in range(2):
            with record_function(STEP):
                torch.matmul(x, y).to(torch.bfloat16)
    events = profiler.events()
    rows = {row["name"]: row for row in operator_rows(events, "cpu", {}, {64}, 2)}
    assert "aten::mm" in rows and "aten::copy_" in rows
    assert not rows.keys() & {"aten::matmul", "aten::to", STEP}
    product = rows["aten::mm"]
    assert (product["calls"], product["flops"], product["bytes"]) == (1, 2 * 64**3, 3 * 4 * 64**2)
    inside = 2 * sum(row["ms"] for row in rows.values())
    assert 0 < inside <= sum(e.cpu_time_total for e in events if e.name == STEP) / 1000


def event(name: str, start: float, end: float, shapes=(), types=(), parent=None, device="cuda") -> FunctionEvent:
    # PyTorch 2.11 has the shapes where later ones have their text.
    field = "structured_input_shapes"
    field = field if field in inspect.signature(FunctionEvent).parameters else "input_shapes"
    made = FunctionEvent(0, name, 0, start, end, use_device=device, **{field: list(shapes)})
    made.input_dtypes = list(types)
    if parent is not None:
        parent.append_cpu_child(made)
        made.set_cpu_parent(parent)
    return made


def test_on_a_gpu_time_is_the_devices_own():
    """Events as the profiler makes them for CUDA: kernels hang on the operator that started them."""
    step = event(STEP, 0, 100)
    outer = event("csm_kernels::linear_cross_entropy", 1, 50, [[8, 4]], ["c10::BFloat16"], step)
    outer.append_kernel("softmax_kernel", 0, 30)
    inner = event("aten::bmm", 2, 9, [[2, 8, 4], [2, 4, 16]], ["c10::BFloat16"] * 2, outer)
    inner.append_kernel("gemm", 0, 500)
    view = event("aten::view", 10, 11, [[8, 4]], ["c10::BFloat16"], outer)
    outside = event("aten::bmm", 51, 59, [[2, 8, 4], [2, 4, 16]], ["c10::BFloat16"] * 2, step)
    outside.append_kernel("gemm", 0, 400)
    fused = event("triton_poi_fused_0", 60, 61, [[8, 4], [8, 4], []], ["float", "float", "Scalar"], step)
    fused.append_kernel("triton_poi_fused_0", 0, 7)
    kernel = FunctionEvent(1, "gemm", 0, 5, 505, use_device="cuda", device_type=DeviceType.CUDA)
    rows = operator_rows([step, outer, inner, view, outside, fused, kernel], "cuda", {}, {2, 4, 8, 16}, 1)
    times = {row["name"]: round(1000 * row["ms"]) for row in rows}
    assert times == {"csm_kernels::linear_cross_entropy": 530, "aten::bmm": 400, "triton_poi_fused_0": 7}
    product = next(row for row in rows if row["name"] == "aten::bmm")
    assert product["dtypes"] == "bf16" and product["shapes"] == [[2, 8, 4], [2, 4, 16]]
    assert (product["flops"], product["bytes"]) == (2 * 2 * 8 * 4 * 16, 2 * (64 + 128 + 128))


def test_what_the_host_does_between_operators_is_none():
    for name in ("aten::mm", "csm_kernels::frame_embed"):
        assert profile.arguments(name) is not None
    for name in ("aten::t", "aten::as_strided", "aten::matmul", "_LlamaLayer", "_LlamaLayerBackward", "MmBackward0"):
        assert profile.arguments(name) is None
    assert profile.arguments("autograd::engine::evaluate_function: X") is profile.arguments(STEP) is None


def test_packs_of_other_sizes_are_the_same_operator():
    shapes = [[[rows, 8], [8, 8]] for rows in (5, 7)]
    events = [event("aten::mm", i, i + 1000, s, ["c10::BFloat16"] * 2, device=None) for i, s in enumerate(shapes)]
    events.append(event("aten::add", 2, 252, [[3, 8]], ["float"], device=None))
    product, add = operator_rows(events, "cpu", {}, {8}, 2)
    assert product["shapes"] == [[[5, 7], 8], [8, 8]] and product["kind"] == "product"
    assert (product["calls"], product["ms"], product["flops"]) == (1, 1.0, 6 * 128)
    assert (add["calls"], add["ms"], add["kind"]) == (0.5, 0.125, "memory")
    lines = profile.table([{**row, "share": 0.5, "floor_ms": 0.1} for row in (product, add)], 100)
    assert "[[5,7],8] [8,8]" in lines[1]


@pytest.mark.parametrize("width", [80, 100])
def test_the_table_has_ten_operators_and_fits_a_terminal(width):
    row = {"name": "csm_kernels::product", "kind": "product", "shapes": [[[109, 624], 1024]] * 5, "dtypes": "bf16 fp32"}
    row |= {"calls": 12.0, "ms": 30.14, "share": 0.066, "flops": 2.7e9, "bytes": 1e6, "floor_ms": 17.11}
    printed = profile.table([row] * 12, width)
    assert len(printed) == 11 and max(map(len, printed)) == width


# --------------------------------------------------------------------------------------------------------- the command


def tree(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def profiled(folder, capsys, **overrides) -> tuple[list[dict], list[str]]:
    """Rows written and lines printed by the command."""
    argv = flags(prepare(folder), keep_freed_memory=False, **overrides)
    assert cli.main(["profile", *argv, "--output", str(folder / "out")]) == 0
    written = (folder / "out" / "ops.jsonl").read_text().splitlines()
    return [json.loads(line) for line in written], capsys.readouterr().out.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        {"steps": 2},
        {"steps": 1, "method": "lora", "precision": "bf16", "batch_size": 1},
        {"steps": 1, "method": "dora", "precision": "bf16", "batch_size": 1},
        {"steps": 1, "batch_rows": 96, "pack_rows": 48, "activation_checkpointing": "full"},
    ],
    ids=["full", "lora", "dora", "several packs"],
)
def test_a_profile_says_where_a_step_goes_and_writes_nothing_else(tmp_path, capsys, monkeypatch, overrides):
    monkeypatch.setenv("HOME", str(tmp_path))
    before = tree(prepare(tmp_path))
    rows, printed = profiled(tmp_path, capsys, warmup=1, **overrides)
    assert tree(tmp_path) - before == {"out", "out/ops.jsonl", "out/trace.json.gz"}
    *operators, step = rows
    assert step["row"] == "step" and SUMMARY <= set(step) and step["steps"] == overrides["steps"]
    assert {row["row"] for row in operators} == {"operator"}
    assert 0 < sum(row["share"] for row in operators) <= 1 + 1e-9
    assert step["operators_ms"] + step["host_ms"] + step["loader_ms"] == pytest.approx(step["step_ms"])
    by_kind = {kind: [row for row in operators if row["kind"] == kind] for kind in ("product", "memory")}
    for row in by_kind["product"]:
        rate = step["matmul_flops_per_s"][row["dtypes"].split()[0]]
        assert row["floor_ms"] == pytest.approx(
            1000 * max(row["flops"] / rate, row["bytes"] / step["copy_bytes_per_s"])
        )
        assert row["floor_ms"] > 0 and row["calls"] > 0
    names = {row["name"] for row in by_kind["product"]}
    by_library = overrides.get("precision") == "bf16" and native.function("product", torch.bfloat16) is not None
    assert ({"csm_kernels::product"} if by_library else {"aten::mm", "aten::bmm"}) <= names
    assert any(row["floor_ms"] > 0 for row in by_kind["memory"])
    assert step["floor_ms"] <= step["operators_ms"] * (1 + 1e-9)
    # The table: a head, the ten costliest, a blank line, three lines on the step.
    assert len(printed) == 15 and printed[0].startswith("operator")
    assert [line.split()[0] for line in printed[1:11]] == [r["name"].split("::")[-1] for r in operators[:10]]
    assert [line.split()[0] for line in printed[-3:]] == ["Step", "Of", "Floors"]
    assert "under the profiler" in printed[-3] and "waiting for the loader" in printed[-2]
    with gzip.open(tmp_path / "out" / "trace.json.gz", "rt") as f:
        names = {e.get("name") for e in json.load(f)["traceEvents"]}
    assert {STEP, "csm_kernels::product" if by_library else "aten::mm"} <= names


@pytest.mark.slow
def test_compiled_layers_can_be_profiled(tmp_path, capsys, monkeypatch):
    """The FLOP counter, under which PyTorch compiles nothing, sees them uncompiled."""
    compiled = compile._compiled
    monkeypatch.setattr(compile, "_compiled", lambda backend: compiled("eager"))
    rows, printed = profiled(tmp_path, capsys, steps=1, warmup=1, compile="on")
    assert rows[-1]["compiled"] and "compiled loops" in printed[-2]


@pytest.mark.slow
def test_the_newer_profile_stays(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    for name in ("ops.jsonl", "trace.json.gz"):
        (tmp_path / "out" / name).write_text("an older one")
    rows, _ = profiled(tmp_path, capsys, steps=1, warmup=0)
    assert rows[-1]["steps"] == 1
    with gzip.open(tmp_path / "out" / "trace.json.gz") as f:
        assert json.load(f)["traceEvents"]


@pytest.mark.slow
def test_a_run_is_left_alone(tmp_path, capsys):
    """Neither its directory as the output, nor continued where the settings name it."""
    folder = prepare(tmp_path)
    assert cli.main(["train", *flags(folder, keep_freed_memory=False, n_epochs=1, val_every=0)]) == 0
    capsys.readouterr()
    before = tree(folder)
    assert cli.main(["profile", *flags(folder, keep_freed_memory=False), "--output", str(folder / "run")]) == 2
    assert "holds a training run; choose another --output" in capsys.readouterr().err
    assert tree(folder) == before
    profiled(folder, capsys, steps=1, warmup=0)
    assert {name for name in tree(folder) - before if not name.startswith("out")} == set()


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--steps", "0"], "--steps 0; give at least 1"),
        (["--steps", "few"], "--steps is 'few'; give an integer"),
        (["--warmup", "-1"], "--warmup -1; give at least 0"),
        (["--output", ""], "--output is empty"),
        (["--stepz", "3"], "did you mean --steps?"),
        (["--data", "nowhere"], "nowhere"),
        (["--output", "model.yaml"], "model.yaml: the profile could not be written"),
        (["--pack-rows", "4"], "--pack-rows"),
    ],
)
def test_bad_options_give_one_line(tmp_path, capsys, monkeypatch, argv, said):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["profile", *flags(prepare(tmp_path), keep_freed_memory=False), *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error


def test_every_setting_of_a_training_run_is_taken(tmp_path):
    taken = build(ProfileConfig, {**values(prepare(tmp_path)), "steps": 2, "output": str(tmp_path / "out")})
    run = profile.training_config(taken)
    assert run.data.pack_rows == 64 and run.optimizer.learning_rate == 1e-2
    assert not run.run.resume and run.run.output_dir == str(tmp_path / "out")
    run.optimizer.learning_rate = 1.0
    assert taken.optimizer.learning_rate == 1e-2 and taken.run.output_dir == str(tmp_path / "run") and taken.run.resume


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_can_be_profiled(recipe):
    assert build(ProfileConfig, read_yaml(recipe, ProfileConfig)).steps == 5
