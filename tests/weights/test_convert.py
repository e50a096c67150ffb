"""Checkpoints: every dialect in and out, bit for bit, and every way a file can be wrong."""

from __future__ import annotations

import warnings

import pytest
import torch
from model_cases import MICRO, fill, random_model
from safetensors.torch import load_file
from weight_cases import OTHER, hf_json, same, shard, write

from benchmarks.common.baselines import transformers_model
from csm_fast import CSM, CSMConfig, load_model, save_model
from csm_fast.model.stacks import model_config
from csm_fast.weights.config_json import from_transformers_config, sesame_config, transformers_config
from csm_fast.weights.names import detect_naming, sesame_to_transformers, transformers_to_sesame

# ----------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("config", [MICRO, OTHER], ids=["micro", "other"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
def test_save_and_load(tmp_path, config, dtype):
    model = random_model(config, dtype)
    save_model(model, tmp_path / "new" / "run")
    again = load_model(tmp_path / "new" / "run", dtype=dtype)
    assert again.config == config == model_config(again)
    assert same(again, model.state_dict())
    assert all(p.requires_grad and p.is_contiguous() and p.dtype == dtype for p in again.parameters())
    # The library reads what is written here.
    assert same(again, load_file(tmp_path / "new" / "run" / "model.safetensors"))
    assert sorted(p.name for p in (tmp_path / "new" / "run").iterdir()) == ["config.json", "model.safetensors"]
    single = load_model(str(tmp_path / "new" / "run" / "model.safetensors"), dtype=dtype)
    assert single.config == config and same(single, model.state_dict())


def test_dtypes(tmp_path):
    model = random_model()
    save_model(model, tmp_path, dtype=torch.bfloat16)
    rounded = {n: p.detach().bfloat16() for n, p in model.named_parameters()}
    assert same(load_model(tmp_path, dtype=torch.bfloat16), rounded)
    assert same(load_model(tmp_path), {n: t.float() for n, t in rounded.items()}), "masters are float32"


def test_the_model_does_not_alias_the_file(tmp_path):
    save_model(random_model(), tmp_path)
    loaded = load_model(tmp_path)
    before = {n: p.detach().clone() for n, p in loaded.named_parameters()}
    file = tmp_path / "model.safetensors"
    with open(file, "r+b") as opened:  # in place: a mapping of the file would show it
        opened.write(b"\0" * file.stat().st_size)
    assert same(loaded, before)
    other = fill(CSM(MICRO), seed=5)
    save_model(other, tmp_path)
    assert same(load_model(tmp_path), other.state_dict())


@pytest.mark.parametrize("config", [MICRO, OTHER], ids=["micro", "other"])
def test_sesame_to_transformers_and_back(config):
    state = random_model(config).state_dict()
    theirs = sesame_to_transformers({**state, "backbone_causal_mask": torch.ones(2, 2)}, config)
    assert theirs["depth_decoder.model.embed_tokens.weight"] is state["audio_embeddings.weight"]
    back = transformers_to_sesame(theirs, config)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[n], state[n]) for n in state)
    moved = [n for n in theirs if n.endswith(("q_proj.weight", "k_proj.weight"))]
    assert len(moved) == 2 * (config.backbone.num_layers + config.decoder.num_layers)
    ours = "backbone.layers.0.attn.q_proj.weight"
    assert not torch.equal(theirs["backbone_model.layers.0.self_attn.q_proj.weight"], state[ours])


@pytest.mark.parametrize("config", [MICRO, CSMConfig.csm_1b()], ids=["micro", "csm-1b"])
def test_transformers_config_back_and_forth(config):
    assert from_transformers_config(hf_json(config)) == config


def test_transformers_config_of_csm_1b_is_the_published_one():
    values = transformers_config(CSMConfig.csm_1b())
    rope = dict(rope_type="llama3", rope_theta=500000.0, factor=32.0)
    assert values["rope_parameters"] == {
        **rope,
        "low_freq_factor": 0.125,
        "high_freq_factor": 0.5,
        "original_max_position_embeddings": 1024,
    }
    assert values["depth_decoder_config"]["rope_parameters"] == {
        **rope,
        "low_freq_factor": 0.001953125,
        "high_freq_factor": 0.0078125,
        "original_max_position_embeddings": 16,
    }
    # The config.json of transformers 4 says the same with other keys; an empty one means csm-1b without scaling.
    old = {"model_type": "csm", "rope_theta": 500000, "rope_scaling": {**values["rope_parameters"]}}
    old["depth_decoder_config"] = {"rope_scaling": values["depth_decoder_config"]["rope_parameters"]}
    assert from_transformers_config(old) == CSMConfig.csm_1b()
    assert from_transformers_config({}).backbone.rope_scale_factor == 1


def test_sesame_config_names_sesames_flavors():
    values = sesame_config(CSMConfig.csm_1b())
    assert (values["backbone_flavor"], values["decoder_flavor"]) == ("llama-1B", "llama-100M")
    assert (values["text_vocab_size"], values["audio_vocab_size"], values["audio_num_codebooks"]) == (128256, 2051, 32)
    assert sesame_config(CSMConfig.tiny())["backbone_flavor"] == "csm-fast-4x256"


# ------------------------------------------------------------------------------------------------- others' dialects


def test_what_transformers_saves(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("transformers")
        for config in (MICRO, OTHER):
            model = random_model(config)
            theirs = transformers_model(config, model.state_dict())
            for size in ("1GB", "60KB"):
                path = tmp_path / f"{config.num_codebooks}-{size}"
                theirs.save_pretrained(path, max_shard_size=size)
                assert (path / "model.safetensors").exists() == (size == "1GB")
                again = load_model(path)
                assert same(again, model.state_dict())
                assert again.config == config


@pytest.mark.parametrize("stem", ["model", "transformers", "other"])
def test_sharded(tmp_path, stem):
    model = random_model()
    theirs = sesame_to_transformers(model.state_dict(), MICRO)
    theirs["codec_model.encoder.layers.0.conv.weight"] = torch.ones(3)
    theirs["backbone_model.embed_tokens.audio_tokens_offsets"] = torch.arange(6)
    shard(tmp_path / "hf", theirs, hf_json(MICRO), stem)
    assert same(load_model(tmp_path / "hf"), model.state_dict())
    assert same(load_model(tmp_path / "hf" / f"{stem}.safetensors.index.json"), model.state_dict())
    shard(tmp_path / "sesame", model.state_dict(), sesame_config(MICRO), stem)
    assert same(load_model(tmp_path / "sesame"), model.state_dict())


def test_sesames_file_is_preferred_to_transformers_shards(tmp_path):
    """The hub's sesame/csm-1b holds both."""
    model, other = random_model(), fill(CSM(MICRO), seed=3)
    shard(tmp_path, sesame_to_transformers(other.state_dict(), MICRO), hf_json(MICRO), "transformers")
    write(tmp_path, model.state_dict(), None)
    assert same(load_model(tmp_path), model.state_dict())


def test_one_of_the_tied_embeddings_is_enough(tmp_path):
    model = random_model()
    theirs = sesame_to_transformers(model.state_dict(), MICRO)
    for i, name in enumerate(
        ("depth_decoder.model.embed_tokens.weight", "backbone_model.embed_tokens.embed_audio_tokens.weight")
    ):
        path = write(tmp_path / str(i), {n: t for n, t in theirs.items() if n != name}, hf_json(MICRO))
        assert same(load_model(path), model.state_dict())


def test_draft_names_of_transformers(tmp_path):
    model = random_model()
    theirs = sesame_to_transformers(model.state_dict(), MICRO)
    for new, old in (
        ("embed_text_tokens.weight", "backbone_model.embed_tokens.embed_text_tokens.weight"),
        ("depth_decoder.model.embed_tokens.weight", "depth_decoder.model.embed_tokens.embed_audio_tokens.weight"),
    ):
        theirs[old] = theirs.pop(new)
    assert same(load_model(write(tmp_path, theirs, hf_json(MICRO))), model.state_dict())


def mlx_names(state):
    swap = {
        "attn.output_proj": "self_attn.o_proj",
        "attn.": "self_attn.",
        "mlp.w1": "mlp.gate_proj",
        "mlp.w2": "mlp.down_proj",
        "mlp.w3": "mlp.up_proj",
        "sa_norm.scale": "input_layernorm.weight",
        "mlp_norm.scale": "post_attention_layernorm.weight",
        "norm.scale": "norm.weight",
    }
    renamed = {}
    for name, tensor in state.items():
        for ours, theirs in swap.items():
            if ours in name:
                name = name.replace(ours, theirs)
                break
        renamed[name] = tensor
    return renamed


def test_csm_mlx_names_need_no_rotation(tmp_path):
    model = random_model()
    state = mlx_names(model.state_dict())
    assert detect_naming(state) == "csm-mlx" and "backbone.norm.weight" in state
    assert same(load_model(write(tmp_path, state, sesame_config(MICRO), "ckpt.safetensors")), model.state_dict())


def test_buffers_left_by_generation_are_ignored(tmp_path):
    model = random_model()
    masks = {f"{s}_causal_mask": torch.ones(4, 4, dtype=torch.bool) for s in ("backbone", "decoder")}
    assert same(load_model(write(tmp_path, {**model.state_dict(), **masks}, sesame_config(MICRO))), model.state_dict())


@pytest.fixture
def two_known_shapes(monkeypatch):
    from csm_fast.weights import load as convert

    monkeypatch.setattr(convert, "NAMED_SHAPES", {"micro": lambda: MICRO, "other": lambda: OTHER})


@pytest.mark.parametrize("config_json", [None, {}, {"backbone_flavor": "mine", "decoder_flavor": "mine"}])
@pytest.mark.parametrize("dialect", [dict, lambda s: sesame_to_transformers(s, OTHER)], ids=["sesame", "transformers"])
def test_known_shapes_need_no_config(tmp_path, two_known_shapes, config_json, dialect):
    model = random_model(OTHER)
    loaded = load_model(write(tmp_path, dialect(model.state_dict()), config_json))
    assert loaded.config == OTHER and same(loaded, model.state_dict())
