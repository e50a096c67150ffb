"""Merging: the merged model is the adapted one, on its own base, and the probe tells when it is not."""

import json
import logging

import pytest
import torch
from adapter_cases import KINDS, attached, loss_of, make_pack, stir_besides, stirred
from model_cases import MICRO, MemoryStore, random_conversations, random_model, relative
from safetensors.torch import load_file, save_file

from csm_fast import CSM, cli, load_model, save_model
from csm_fast.commands import merge, verify_adapter
from csm_fast.config.commands import MergeConfig, VerifyAdapterConfig
from csm_fast.config.train import AdapterSection, DataSection, LossSection
from csm_fast.evaluate import probe
from csm_fast.model import adapters, loss
from csm_fast.model.compile import compile_layers
from csm_fast.model.embedding_rows import EmbeddingRows
from csm_fast.packing.loader import Packer
from csm_fast.system.errors import InputError
from csm_fast.weights.adapter_files import save_adapter
from csm_fast.weights.load import load_merged
from csm_fast.weights.save import read_record, write_record


@pytest.fixture(autouse=True)
def told(caplog):
    caplog.set_level(logging.INFO, logger="csm_fast")
    return caplog


@pytest.fixture
def base(tmp_path, monkeypatch):
    save_model(random_model(), tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    return "base"


def adapter_on(base, directory, kind="lora", dtype=torch.float32, **settings):
    """A stirred adapter over the model in ``base``, saved with its probe."""
    model = load_model(base)
    section = AdapterSection(**{"lora_rank": 4, **KINDS[kind], **settings})
    adapters.attach(model, section, compute_dtype=dtype, base=str(base))
    if section.train_embeddings == "rows":
        rows = EmbeddingRows(model, torch.tensor([1, 4, 7]), torch.tensor([0, 30]))
        with torch.no_grad():
            rows.text_embeddings.mul_(1.5)
        rows.push()
    stir_besides(stirred(model))
    save_adapter(model, directory)
    probe.save_probe(model, make_pack(), directory)
    return model


def plain_loss(model, pack=None):
    return loss.packed_loss(model, pack or make_pack(), 0.5, 0.5)[0].detach()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*(k for k in KINDS if k != "qlora"), "rows"])
def test_a_directory_with_an_adapter_loads_as_a_model(kind, base, tmp_path, monkeypatch):
    """By the name of its base, from anywhere; its loss is that of base and adapter."""
    more = {"kind": "lora", "train_embeddings": "rows"} if kind == "rows" else {"kind": kind}
    model = adapter_on(base, tmp_path / "adapter", **more)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    merged = load_model("../adapter")
    assert type(merged) is CSM and {n for n, _ in merged.named_parameters()} == {
        n for n, _ in CSM(MICRO).named_parameters()
    }
    assert relative(plain_loss(merged), loss_of(model).detach()) < 1e-5
    half = load_model("../adapter", dtype=lambda name: torch.bfloat16 if "embeddings" in name else torch.float32)
    assert half.text_embeddings.weight.dtype == torch.bfloat16 and half.projection.weight.dtype == torch.float32


def test_an_adapter_over_an_adapter(base, tmp_path):
    first = adapter_on(base, tmp_path / "first")
    second = adapter_on(tmp_path / "first", tmp_path / "second", "dora")
    assert second.adapter.base_hash != first.adapter.base_hash
    assert relative(plain_loss(load_model(tmp_path / "second")), loss_of(second).detach()) < 1e-5


def test_random_weights_are_a_base_too(tmp_path):
    model = CSM(MICRO).init_weights(11)
    section = AdapterSection(method="lora", lora_rank=4)
    adapters.attach(model, section, compute_dtype=torch.float32, base="micro.yaml, random, seed 11")
    save_adapter(stirred(model), tmp_path)
    assert relative(plain_loss(load_model(tmp_path)), loss_of(model).detach()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_verify_and_merge(kind, dtype, base, tmp_path, told):
    model = adapter_on(base, tmp_path / "adapter", kind, dtype)
    verify_adapter.run(VerifyAdapterConfig(adapter=str(tmp_path / "adapter"), device="cpu"))
    assert "Loaded    loss" in told.text and "Merged    loss" in told.text
    assert ("4 bits    loss" in told.text) == (kind == "qlora")
    told.clear()
    merge.run(MergeConfig(adapter=str(tmp_path / "adapter"), out=str(tmp_path / "merged")))
    assert "Merged    loss" in told.text
    merged = load_model(tmp_path / "merged")
    bound = 0.2 if kind == "qlora" else 1e-5 if dtype == torch.float32 else 2e-2
    assert relative(plain_loss(merged), loss_of(model).detach()) < bound
    assert load_file(tmp_path / "merged/model.safetensors").keys() == dict(CSM(MICRO).named_parameters()).keys()


@torch.no_grad()
def test_a_4_bit_adapter_is_merged_onto_the_full_weights(base, tmp_path):
    model = adapter_on(base, tmp_path / "adapter", "qlora")
    merged, plain = load_model(tmp_path / "adapter"), load_model(base)
    for name in model.adapter.targets:
        layer = model.get_submodule(name)
        delta = 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        want = plain.get_parameter(f"{name}.weight") + delta
        assert relative(merged.get_parameter(f"{name}.weight"), want) < 1e-6


def test_the_command_line(base, tmp_path, capfd):
    adapter_on(base, tmp_path / "adapter")
    write_record(tmp_path / "adapter", {"codec": {"name": "some codec"}})
    assert cli.main(["verify-adapter", "--adapter", str(tmp_path / "adapter")]) == 0
    arguments = ["--adapter", str(tmp_path / "adapter"), "--out", str(tmp_path / "merged"), "--dtype", "bf16"]
    assert cli.main(["merge", *arguments]) == 0
    assert {t.dtype for t in load_file(tmp_path / "merged/model.safetensors").values()} == {torch.bfloat16}
    assert read_record(str(tmp_path / "merged"))["codec"]["name"] == "some codec"
    assert cli.main(["merge", *arguments, "--base", str(tmp_path / "nowhere")]) == 2
    assert "no such file" in capfd.readouterr().err
    # Over the adapter itself: the run that it belongs to could not go on.
    assert cli.main(["merge", "--adapter", str(tmp_path / "adapter"), "--out", str(tmp_path / "adapter")]) == 2
    assert (
        "adapter: holds an adapter" in capfd.readouterr().err and not (tmp_path / "adapter/model.safetensors").exists()
    )


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("kind", ["lora", "qlora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_damaged_adapter_drifts(kind, dtype, base, tmp_path):
    adapter_on(base, tmp_path / "adapter", kind, dtype)
    file = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: t * 3 if "lora_B" in name else t for name, t in tensors.items()}, file)
    with pytest.raises(InputError, match="the loaded model's loss is .* a drift of"):
        verify_adapter.run(VerifyAdapterConfig(adapter=str(tmp_path / "adapter"), device="cpu"))
    if kind == "lora":
        with pytest.raises(InputError, match="the merged model's loss is .* a drift of"):
            merge.run(MergeConfig(adapter=str(tmp_path / "adapter"), out=str(tmp_path / "merged")))
        assert not (tmp_path / "merged").exists()


WEAK = {"lora": 0.3, "qlora": 0.2}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "qlora"])
@pytest.mark.parametrize("factor", [0.0, -1.0])
def test_a_weak_adapter_that_does_nothing_or_harm_drifts(kind, factor, base, tmp_path, told):
    """In bf16, where more than such an adapter changes would pass for rounding."""
    model = adapter_on(base, tmp_path / "strong", kind, torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(WEAK[kind])
    save_adapter(model, tmp_path / "adapter")
    probe.save_probe(model, make_pack(), tmp_path / "adapter")
    saved = probe.read_probe(tmp_path / "adapter")
    changes = saved.drift(saved.loss_of(load_model(base)) if kind == "lora" else saved.silenced)
    assert 3e-3 < changes < 1e-2
    arguments = VerifyAdapterConfig(adapter=str(tmp_path / "adapter"), device="cpu")
    verify_adapter.run(arguments)
    file = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: t * factor if "lora_B" in name else t for name, t in tensors.items()}, file)
    with pytest.raises(InputError, match="the loaded model's loss is .* a drift of"):
        verify_adapter.run(arguments)


@pytest.mark.parametrize(
    ("base_loss", "allowed"), [(5.0, 1e-2), (7.0, 1e-2), (7.1, 0.1 / 7 / 2), (7.001, 2.5e-3), (6.95, 0.05 / 7 / 2)]
)
def test_drift_is_bounded_by_half_of_what_the_adapter_changes(base_loss, allowed):
    found = probe.Probe(None, 7.0, torch.bfloat16).allowed(base_loss)
    assert found == pytest.approx(max(2.5e-3, allowed) if base_loss != 7.0 else 2.5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["the base", "a run", "a checkpoint", "a token store"])
def test_merging_never_takes_the_place_of_something_else(what, base, tmp_path, capfd):
    adapter_on(base, tmp_path / "adapter")
    out = tmp_path / "out"
    if what == "the base":
        out = tmp_path / "base"
    elif what == "a run":
        (out / "step-000003").mkdir(parents=True)
    else:
        file = out / ("trainer_state.json" if what == "a checkpoint" else "train/manifest.json")
        file.parent.mkdir(parents=True)
        file.write_text("{}")
    before = {f: f.read_bytes() for f in out.rglob("*") if f.is_file()}
    assert cli.main(["merge", "--adapter", str(tmp_path / "adapter"), "--out", str(out)]) == 2
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert what in line and "give --out a directory of its own" in line
    assert before == {f: f.read_bytes() for f in out.rglob("*") if f.is_file()}
    if what != "the base":
        assert cli.main(["merge", "--adapter", str(tmp_path / "adapter"), "--out", str(tmp_path / "merged")]) == 0
        assert cli.main(["merge", "--adapter", str(tmp_path / "adapter"), "--out", str(tmp_path / "merged")]) == 0


def test_a_wrong_or_missing_base(base, tmp_path):
    adapter_on(base, tmp_path / "adapter")
    save_model(CSM(MICRO).init_weights(3), tmp_path / "other")
    arguments = {"adapter": str(tmp_path / "adapter"), "out": str(tmp_path / "merged")}
    with pytest.raises(InputError, match="belongs to the base .*/base .* not to .*/other"):
        merge.run(MergeConfig(**arguments, base=str(tmp_path / "other")))
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(InputError, match="its base cannot be loaded: .*; give it with --base"):
        load_model(tmp_path / "adapter")
    merge.run(MergeConfig(**arguments, base=str(tmp_path / "moved")))
    file = tmp_path / "adapter/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(InputError, match="does not name its base; give it with --base"):
        load_merged(tmp_path / "adapter")


def test_without_a_probe_there_is_nothing_to_verify_but_merging_works(base, tmp_path, told):
    adapter_on(base, tmp_path / "adapter")
    (tmp_path / "adapter" / probe.PROBE).unlink()
    with pytest.raises(InputError, match="no loss to compare with"):
        verify_adapter.run(VerifyAdapterConfig(adapter=str(tmp_path / "adapter")))
    merge.run(MergeConfig(adapter=str(tmp_path / "adapter"), out=str(tmp_path / "merged")))
    assert "no probe" in told.text and (tmp_path / "merged/model.safetensors").exists()


def test_a_damaged_probe_is_named(base, tmp_path):
    adapter_on(base, tmp_path / "adapter")
    (tmp_path / "adapter" / probe.PROBE_LOSS).write_text('{"precision": "int3"}')
    with pytest.raises(InputError, match="probe.json: is damaged"):
        probe.read_probe(tmp_path / "adapter")


# ----------------------------------------------------------------------------------------------------------- probes


def test_a_probe_is_a_small_part_of_real_data():
    conversations = random_conversations([[(20, 100, 0)], [(5, 9, 1)], [(9, 300, 0)], [(2, 60, 0), (3, 40, 1)]])
    packer = Packer(MemoryStore(conversations), DataSection(pack_rows=2048), LossSection(), pad="cpu")
    [pack] = packer.step(0, 0).packs
    small = probe.probe_pack(pack)
    kept = {tuple(small.tokens[small.segments.cu_seqlens[i]].tolist()) for i in range(len(small.segments.lengths))}
    starts = {tuple(pack.tokens[start].tolist()) for start in pack.segments.cu_seqlens[:-1]}
    assert kept <= starts
    assert sum(small.segments.lengths) == len(small.tokens) == small.rows <= probe.PROBE_ROWS
    assert len(small.decoder_index) == probe.PROBE_FRAMES
    assert float(small.target_weights.sum()) == pytest.approx(1) == float(small.decoder_weights.sum())
    assert bool(small.is_audio[small.target_rows].all())
    # Its rows see what they saw in the whole pack.
    model = random_model()
    whole, part = (loss.predictor_states(model, p) for p in (pack, small))
    rows = {tuple(row.tolist()): state for row, state in zip(pack.tokens[pack.target_rows], whole, strict=True)}
    for row, state in zip(small.tokens[small.target_rows], part, strict=True):
        if bool(row.any()):  # ends of speech look alike
            assert torch.allclose(state, rows[tuple(row.tolist())], atol=1e-5)


def test_a_long_conversation_is_taken_whole():
    [pack] = (
        Packer(
            MemoryStore(random_conversations([[(9, 500, 0)], [(9, 30, 0)]])), DataSection(), LossSection(), pad="cpu"
        )
        .step(0, 0)
        .packs
    )
    small = probe.probe_pack(pack)
    assert len(small.segments.lengths) == 1 and small.rows in (510, 40)


def test_saving_a_probe_disturbs_nothing(tmp_path):
    torch._dynamo.reset()
    model = attached(lora_dropout=0.5).train()
    pack, state = make_pack(), torch.get_rng_state()
    values = [probe.save_probe(model, pack, tmp_path) for _ in range(2)]
    assert values[0] == values[1] == probe.read_probe(tmp_path).loss == probe.read_probe(tmp_path).loss_of(model)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    compile_layers(model, "on", backend="eager")
    assert probe.save_probe(model, pack, tmp_path) == values[0]
    assert not torch._dynamo.utils.counters["frames"]
    assert model.run.backbone_layer is not None and model.run.decoder_layer is not None
    quantised = attached("qlora")
    want = loss_of(quantised).detach()
    probe.save_probe(quantised, pack, tmp_path)
    assert torch.equal(loss_of(quantised), want)
    assert probe.read_probe(tmp_path).silenced == probe.read_probe(tmp_path).loss_of(attached("qlora", stir=False))
