"""The planner's estimate against tracked bytes, and what is decided with it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch
from model_cases import MICRO
from paths import ROOT
from train_cases import environment

from benchmarks.common.models import quick_model
from benchmarks.memory_plan import make_config, make_pack, measure_step
from csm_fast import CSM, CSMConfig, TransformerConfig
from csm_fast.config.parse import build
from csm_fast.config.train import AdapterSection, OptimizerSection, TrainConfig
from csm_fast.model import adapters
from csm_fast.model.compile import compile_layers
from csm_fast.model.loss import packed_loss
from csm_fast.planner import fit as memory
from csm_fast.planner.estimate import Estimate, estimate
from csm_fast.planner.ledger import ACTIVATIONS, COPIES
from csm_fast.planner.stack import Setup
from csm_fast.planner.step import Load, Walk
from csm_fast.planner.tensors import list_weights
from csm_fast.system.errors import InputError
from csm_fast.system.memory import GIB, _group_limits, available_bytes, parse_bytes
from csm_fast.train.optim.build import cast_weights

GIB = GIB
ONE = CSMConfig.csm_1b()
# Small tables, so that what a step adds is most of its peak.
SHORT = CSMConfig(
    TransformerConfig(3, 4, 2, 128, 512),
    TransformerConfig(2, 2, 1, 64, 384),
    text_vocab_size=500,
    audio_vocab_size=131,
    num_codebooks=8,
)

CASES = {
    "full, off": ("full", "off", {}),
    "full, full": ("full", "full", {}),
    "full, selective, float32": ("full", "selective", {"precision": "fp32"}),
    "full bf16 8-bit, off": ("full-bf16", "off", {}),
    "full, frozen parts": ("full", "off", {"freeze": ["backbone", "text_embeddings", "audio_embeddings"]}),
    "full, update in the backward": ("full", "full", {"optimizer_in_backward": True, "max_grad_norm": 0.0}),
    "full, all frames": ("full", "off", {"amortization_fraction": 1.0}),
    "lora, off": ("lora", "off", {}),
    "lora, selective, heads": ("lora", "selective", {"train_heads": True}),
    "dora, full": ("dora", "full", {}),
    "qlora, full": ("qlora", "full", {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("method, checkpointing, more", CASES.values(), ids=CASES)
def test_a_step_asks_for_what_was_predicted(method, checkpointing, more):
    for package in ("peft", "bitsandbytes")[: {"full": 0, "lora": 1, "dora": 1}.get(method, 2)]:
        pytest.importorskip(package)
    figures = measure_step(SHORT, make_config(method, checkpointing, **more), 1500)
    assert figures["predicted_before"] == pytest.approx(figures["measured_before"], rel=0.01)
    assert figures["measured_step"] > 0.3 * figures["measured"]  # or this would test no step
    assert figures["predicted"] == pytest.approx(figures["measured"], rel=0.1)


@pytest.mark.slow
def test_gradients_wait_for_the_second_pack():
    one, two = (measure_step(SHORT, make_config("full", "full"), 500, packs) for packs in (1, 2))
    assert two["predicted"] == pytest.approx(two["measured"], rel=0.1)
    assert two["predicted"] > one["predicted"]


@pytest.mark.parametrize(
    "method, checkpointing",
    [
        ("full", "off"),
        pytest.param("full-bf16", "selective", marks=pytest.mark.slow),
        pytest.param("lora", "off", marks=pytest.mark.slow),
        pytest.param("lora", "selective", marks=pytest.mark.slow),
        ("qlora", "selective"),
    ],
)
def test_a_compiled_layer_keeps_what_was_predicted(method, checkpointing):
    """What the compiler's partitioner saves between forward and backward pass, seen by autograd's hooks."""
    config = make_config(method, checkpointing)
    model = quick_model(SHORT)
    if config.adapter.method == "full":
        cast_weights(model, config.optimizer)
    else:
        pytest.importorskip("peft")
        adapters.attach(model, config.adapter, compute_dtype=torch.bfloat16, base_hash="not asked for")
    model.activation_checkpointing = checkpointing
    compile_layers(model, "on", backend="aot_eager_decomp_partition")
    pack = make_pack(SHORT, 700, 1 / 16)
    there = [*model.parameters(), *(t for t in pack if isinstance(t, torch.Tensor))]
    known = {t.untyped_storage()._cdata for t in there}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        loss = packed_loss(model, pack, 0.5, 0.5)[0]
    assert loss.requires_grad
    every = list(list_weights(SHORT, config.adapter, config.optimizer, [], 2))
    load = Load(len(pack.tokens), len(pack.target_rows), len(pack.decoder_index))
    walk = Walk(SHORT, every, Setup("cpu", True, True, 2, checkpointing), load, 0)
    held = []
    backward = walk.loss_backward
    walk.loss_backward = lambda *given: held.append(dict(walk.ledger.now)) or backward(*given)  # type: ignore
    walk.run()
    predicted = held[0][ACTIVATIONS] + held[0].get(COPIES, 0)
    assert predicted == pytest.approx(sum(s.nbytes() for s in saved.values()), rel=0.1)


# ------------------------------------------------------------------------------------------------------- the tensors


def test_every_parameter_is_known():
    with torch.device("meta"):
        model = CSM(MICRO)
    found = {w.name: w.numel for w in list_weights(MICRO, AdapterSection(), OptimizerSection(), [], 4)}
    assert found == {
        name.removesuffix(".weight").removesuffix(".scale"): p.numel() for name, p in model.named_parameters()
    }
    assert sum(w.numel for w in list_weights(ONE, AdapterSection(), OptimizerSection(), [], 4)) == 1_552_791_552


def test_adapters_go_where_the_trainer_puts_them():
    with torch.device("meta"):
        model = CSM(MICRO)
    words = ["attn", "projection", "codebook0_head", "q_proj", "o_proj", "self_attn.k_proj", "backbone.layers.0.mlp.w1"]
    for some in ([word] for word in words):
        section = AdapterSection(method="lora", target_modules=some)
        adapted = sorted(w.name for w in list_weights(MICRO, section, OptimizerSection(), [], 4) if w.rank)
        assert tuple(adapted) == adapters.resolve_targets(model, some)


def test_the_walk_gives_back_what_it_takes():
    for method in ("full", "full-bf16", "lora", "qlora", "dora"):
        for checkpointing in memory.CHECKPOINTING:
            for device, compiled in (("cpu", False), ("cuda", True), ("cuda", False)):
                config = make_config(method, checkpointing)
                every = list(list_weights(ONE, config.adapter, config.optimizer, [], 2))
                walk = Walk(ONE, every, Setup(device, compiled, True, 2, checkpointing), Load(4096, 3000, 200), 0)
                left = walk.run().now
                assert left["activations"] == left["copies"] == 0
                assert all(size >= 0 for size in left.values())


# --------------------------------------------------------------------------------------------------------- the targets


def planned(method: str, **more) -> Estimate:
    values = {"activation_checkpointing": "full", "method": method, **more}
    return estimate(ONE, build(TrainConfig, values), rows=4096, device="cuda")


def test_predicted_peaks_at_csm_1b_with_4096_rows():
    assert planned("qlora").peak < 5e9
    assert planned("lora").peak < 8e9
    small = planned("full", weights="bf16-stochastic", optimizer="adamw-8bit")
    assert small.peak < 14e9
    # 12 bytes a parameter between steps, 16 at the peak.
    full = planned("full")
    assert full.before == 12 * 1_552_791_552 and full.peak > 16 * 1_552_791_552


def test_what_saves_memory_saves_memory():
    def peak(**values):
        return estimate(ONE, build(TrainConfig, values), rows=4096).peak

    off, selective, full = (peak(method="lora", activation_checkpointing=choice) for choice in memory.CHECKPOINTING)
    assert off > selective > full
    assert peak(weights="bf16-kahan") > peak(weights="bf16-stochastic")
    assert peak(method="dora") > peak(method="lora") > peak(method="qlora")
    assert peak(optimizer_in_backward=True, max_grad_norm=0.0) < peak()
    assert peak(method="lora", lora_rank=64) > peak(method="lora", lora_rank=8)
    rows = peak(method="lora", train_embeddings="rows")
    assert peak(method="lora") < rows < peak(method="lora", train_embeddings="all")


# --------------------------------------------------------------------------------------------------- what is decided


@pytest.mark.parametrize(
    "text, size",
    [("12GB", 12e9), ("12GiB", 12 * GIB), ("12000MB", 12e9), ("11.5 gib", 11.5 * GIB), ("24G", 24 * GIB)],
)
def test_amounts_of_memory(text, size):
    assert parse_bytes(text) == size == available_bytes("cpu", text)


@pytest.mark.parametrize("text", ["", "12", "much", "0GB", "-3GB", "12 apples"])
def test_no_amount_of_memory(text):
    with pytest.raises(InputError, match="no amount of memory"):
        available_bytes("cpu", text)


def test_the_machine_has_memory_and_a_group_may_have_less(tmp_path):
    assert GIB / 4 < available_bytes("cpu") < 2**50
    own = tmp_path / "own"
    own.write_text("4:memory:/a/b\n3:cpu:/a\n0::/c/d\n")
    found = list(_group_limits(tmp_path, own))
    assert tmp_path / "memory/a/b/memory.limit_in_bytes" in found
    assert tmp_path / "memory/memory.limit_in_bytes" in found
    assert tmp_path / "c/d/memory.max" in found and tmp_path / "c/memory.max" in found
    assert not any("cpu" in str(path.relative_to(tmp_path)) for path in found)
    assert list(_group_limits(tmp_path, tmp_path / "none")) == []


def config(limit: float, **values) -> TrainConfig:
    return build(TrainConfig, {"memory_limit": f"{limit}GiB", **values})


def test_a_run_that_fits_is_let_through():
    found = memory.check_memory(config(40), ONE, "cuda")
    assert found.needed <= 40 * GIB and found.peak < found.needed


@pytest.mark.slow
def test_the_smallest_change_comes_first():
    seen = []
    for limit in (37, 32, 25.5, 25.03, 24, 15.5, 9, 4):
        found = memory.smallest_change(config(limit), ONE, int(limit * GIB), rows=4096, device="cuda")
        assert found is not None
        settings_, then = found
        assert then.needed <= limit * GIB
        if not seen or seen[-1] != set(settings_):
            seen.append(set(settings_))
        # Taken, it is let through.
        packs = 2 if "pack_rows" in settings_ else 1
        memory.check_memory(memory.change_settings(config(limit), **settings_), ONE, "cuda", packs=packs)
    wanted = [set(), {"activation_checkpointing"}, {"activation_checkpointing", "pack_rows"}, {"optimizer"}]
    assert [kind for kind in wanted if kind in seen] == [kind for kind in seen if kind in wanted]
    assert {"activation_checkpointing"} in seen and any("weights" in s for s in seen) and "method" in seen[-1]
    assert memory.smallest_change(config(1), ONE, GIB, rows=4096, device="cuda") is None


def test_fp16_is_not_told_to_use_bf16_weights():
    for more in ({"precision": "fp16"}, {}):
        load = {} if more else {"precision": "fp16"}
        found = memory.smallest_change(config(9, **more), ONE, 9 * GIB, rows=4096, device="cuda", **load)
        assert found is not None and found[0]["method"] == "qlora" and "weights" not in found[0]


def test_a_run_that_cannot_fit_is_refused_with_what_would():
    with pytest.raises(InputError) as caught:
        memory.check_memory(config(23), ONE, "cuda:0")
    line = str(caught.value)
    assert "4,096 rows" in line and "GiB" in line and "23.0 GiB" in line and "--optimizer adamw-8bit" in line
    with pytest.raises(InputError, match="larger device"):
        memory.check_memory(config(1), ONE, "cuda")


def test_the_fastest_checkpointing_that_fits():
    def chosen(limit):
        return memory.choose_checkpointing(config(limit, method="lora"), ONE, "cuda")

    assert [chosen(limit) for limit in (12, 8.5, 6)] == ["off", "selective", "full"]
    with pytest.raises(InputError, match="--method qlora"):
        chosen(3.5)


def test_advice_names_the_smallest_change_first():
    text = memory.suggest_changes(build(TrainConfig, {}))
    order = ["--activation-checkpointing selective", "--activation-checkpointing full", "--pack-rows 2048"]
    order += ["--optimizer adamw-8bit", "--weights bf16-stochastic", "--method qlora"]
    places = [text.index(word) for word in order]
    assert places == sorted(places)
    least = {"method": "qlora", "activation_checkpointing": "full", "pack_rows": 512}
    assert "csm-fast plan" in memory.suggest_changes(build(TrainConfig, least))
    assert "GiB" in memory.suggest_changes(build(TrainConfig, {}), ONE)


def test_the_largest_pack_is_the_largest():
    run, available = build(TrainConfig, {"method": "qlora"}), 8 * GIB
    rows = memory.largest_rows(ONE, run, available, device="cuda")
    assert rows % 64 == 0 and rows > 0
    assert estimate(ONE, run, rows=rows).needed <= available
    assert estimate(ONE, run, rows=rows + 64).needed > available
    assert memory.largest_rows(ONE, run, GIB, device="cuda") == 0


def test_an_estimate_needs_no_pytorch():
    code = (
        "import sys; from csm_fast.planner.estimate import estimate; from csm_fast.config import *; "
        "estimate(CSMConfig.csm_1b(), TrainConfig(), rows=4096); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=environment(), cwd=ROOT)


def test_no_supervised_frames_are_no_error():
    found = estimate(ONE, TrainConfig(), rows=64, targets=0, decoder_frames=0)
    assert found.peak >= found.before
    assert dataclasses.asdict(found)["moment"]
