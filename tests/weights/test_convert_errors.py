"""Every way a checkpoint can be wrong or out of reach: one line, nothing half loaded or half saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from model_cases import MICRO, fill, random_model
from weight_cases import OTHER, hf_json, same, shard, write

import csm_fast
from csm_fast import CSM, InputError, load_model, save_model
from csm_fast.weights.config_json import sesame_config
from csm_fast.weights.names import sesame_to_transformers, transformers_to_sesame


def drop(state):
    state.pop("audio_head"), state.pop("projection.weight")


def reshape(state):
    state["codebook0_head.weight"] = state["codebook0_head.weight"][:, :-1]


def quantise(state):
    state["projection.weight"] = state["projection.weight"].to(torch.int8)


def adapt(state):
    state["backbone.layers.0.attn.q_proj.lora_A.weight"] = torch.ones(2, 64)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (drop, ["2 of the tensors", "audio_head is missing", "projection.weight is missing"]),
        (reshape, ["1 of the tensors", "codebook0_head.weight is [21, 63] instead of [21, 64]"]),
        (quantise, ["projection.weight is I8, not a float"]),
        (adapt, ["lora_A.weight is unexpected"]),
        (lambda state: state.clear() or state.update(x=torch.ones(1)), ["x is unexpected", "and 41 more"]),
    ],
)
def test_every_key_is_accounted_for(tmp_path, damage: Callable, words):
    state = dict(random_model().state_dict())
    damage(state)
    path = write(tmp_path, state, sesame_config(MICRO))
    with pytest.raises(InputError) as error:
        load_model(path)
    assert all(word in str(error.value) for word in (*words, "model.safetensors:")), str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_untied_audio_embeddings_are_refused(tmp_path):
    theirs = sesame_to_transformers(random_model().state_dict(), MICRO)
    theirs["depth_decoder.model.embed_tokens.weight"] = theirs["depth_decoder.model.embed_tokens.weight"] + 1
    path = write(tmp_path, theirs, hf_json(MICRO))
    with pytest.raises(InputError, match="differ, but CSM has one audio embedding; some releases of transformers 5"):
        load_model(path)
    with pytest.raises(InputError, match="one audio embedding"):
        transformers_to_sesame(theirs, MICRO)


def test_shape_unknown(tmp_path):
    path = write(tmp_path, random_model().state_dict(), None)
    with pytest.raises(InputError, match="no config.json of a CSM lies beside the weights.*; put the config.json"):
        load_model(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "config.json: cannot be read as JSON"),
        ("[1]", "config.json: is not a JSON object"),
        (json.dumps({"csm_fast": {"backbone": {}}}), "config.json: not a csm_fast model configuration"),
        (json.dumps({"csm_fast": 3}), "config.json: not a csm_fast model configuration"),
        (json.dumps({"backbone_flavor": "llama-1B", "decoder_flavor": "llama-100M"}), "lacks one of text_vocab_size"),
        (json.dumps({"model_type": "csm", "hidden_act": "gelu"}), "differs from CSM in more than its size"),
        (json.dumps({"model_type": "csm", "head_dim": 48}), "head_dim 48 is not hidden_size / heads"),
        (json.dumps({"model_type": "csm", "rope_parameters": {"rope_type": "llama3"}}), "not a usable CsmConfig"),
        (json.dumps({"model_type": "csm", "hidden_size": "wide"}), "config.json: embed_dim is 'wide'"),
        (json.dumps(sesame_config(OTHER)), "model.safetensors: "),
        (json.dumps(hf_json(OTHER)), "model.safetensors: "),
    ],
)
def test_wrong_config(tmp_path, text, words):
    write(tmp_path, random_model().state_dict(), None)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError) as error:
        load_model(tmp_path)
    assert words in str(error.value), str(error.value)


@pytest.mark.parametrize("kind", ["empty", "header", "truncated", "text", "directory"])
def test_damaged_weights(tmp_path, kind):
    save_model(random_model(), tmp_path)
    file = tmp_path / "model.safetensors"
    data = file.read_bytes()
    if kind == "directory":
        file.unlink()
        file.mkdir()
    else:
        bad = {"empty": b"", "header": data[:100], "truncated": data[:-7], "text": b"not a model at all\n" * 9}
        file.write_bytes(bad[kind])
    for path in (tmp_path, file):
        with pytest.raises(InputError) as error:
            load_model(path)
        assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_damaged_indices_and_missing_shards(tmp_path):
    state = random_model().state_dict()
    shard(tmp_path, state, sesame_config(MICRO), "model")
    part = tmp_path / "model-00002-of-00002.safetensors"
    part.rename(tmp_path / "away")
    with pytest.raises(InputError, match="00002-of-00002.safetensors: no such file; copy or download all parts"):
        load_model(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    for text in ("{}", '{"weight_map": {}}', '{"weight_map": {"a": "../x.safetensors"}}', '{"weight_map": {"a": 1}}'):
        index.write_text(text)
        with pytest.raises(InputError, match="is not an index of .safetensors files"):
            load_model(tmp_path)
    index.write_text("{")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ((), "holds no .safetensors file; give a directory with model.safetensors"),
        (("a.safetensors", "b.safetensors"), "holds several models (a.safetensors, b.safetensors)"),
        (("adapter_model.safetensors",), "holds an adapter, not a model"),
        (("pytorch_model.bin",), "pytorch_model.bin: is a pickle"),
    ],
)
def test_directories_without_a_model(tmp_path, files, words):
    for file in files:
        (tmp_path / file).write_bytes(b"")
    with pytest.raises(InputError) as error:
        load_model(tmp_path)
    assert words in str(error.value)


@pytest.mark.parametrize("name", ["model_bestval.pt", "pytorch_model.bin", "x.ckpt", "run/y.pth"])
def test_pickles_are_refused_by_name(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for exists in (False, True):
        if exists:
            Path(name).parent.mkdir(exist_ok=True)
            torch.save({"model": {}}, name)
        with pytest.raises(InputError, match=f"{name}: is a pickle.*; save its tensors as model.safetensors"):
            load_model(name)


def test_paths_that_lead_nowhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    for name in ("nowhere", "./run/best", "/no/such/model", "~/no-such-csm", "a/b/c", "run/model.safetensors"):
        with pytest.raises(InputError, match="no such file or directory; give a .safetensors file, a directory or"):
            load_model(name)
    with pytest.raises(InputError, match="notes.txt: is not a .safetensors file"):
        load_model("notes.txt")


# ------------------------------------------------------------------------------------------------------------ hub


class Hub:
    """Stands in for the hub: a directory of files, or an exception."""

    def __init__(self, monkeypatch, files: Path | None = None, cached: Path | None = None, error=None):
        import huggingface_hub
        from huggingface_hub.errors import LocalEntryNotFoundError

        self.fetched: list[str] = []

        def model_info(_, name, timeout=None):
            if error is not None:
                raise error
            assert timeout, "an unreachable hub must not hang"
            siblings = [type("File", (), {"rfilename": p.name}) for p in files.iterdir()]
            return type("Info", (), {"siblings": siblings, "sha": "abc"})

        def download(name, file, **_):
            if files is None or not (files / file).exists():
                raise LocalEntryNotFoundError(f"{file} is not there")
            self.fetched.append(file)
            return str(files / file)

        def find(name, file):
            return str(cached / file) if cached is not None and (cached / file).exists() else None

        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", find)


def hub_error(kind: str):
    import huggingface_hub.errors as errors

    error = getattr(errors, kind)
    return error.__new__(error, "refused")


def test_only_what_is_needed_comes_from_the_hub(tmp_path, monkeypatch):
    model = random_model()
    theirs = sesame_to_transformers(model.state_dict(), MICRO)
    shard(tmp_path / "hub", theirs, sesame_config(MICRO), "transformers")
    (tmp_path / "hub" / "ckpt.pt").write_bytes(b"")
    hub = Hub(monkeypatch, tmp_path / "hub")
    assert same(load_model("someone/csm"), model.state_dict())
    shards = [f"transformers-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert set(hub.fetched) == {"config.json", "transformers.safetensors.index.json", *shards}
    write(tmp_path / "hub", model.state_dict(), None)
    hub = Hub(monkeypatch, tmp_path / "hub")
    assert same(load_model("someone/csm"), model.state_dict())
    assert set(hub.fetched) == {"config.json", "model.safetensors"}


def test_without_the_hub_the_cache_serves(tmp_path, monkeypatch):
    model = random_model()
    write(tmp_path, model.state_dict(), sesame_config(MICRO))
    Hub(monkeypatch, cached=tmp_path, error=ConnectionError("no route to host"))
    assert same(load_model("someone/csm"), model.state_dict())


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("GatedRepoError", "access to this model is gated; accept its terms at https://huggingface.co/someone/csm"),
        ("RepositoryNotFoundError", "no such directory here and no such model on the Hugging Face hub"),
        (None, "the Hugging Face hub cannot be reached (ConnectionError: no route to host); connect and run it again"),
    ],
)
def test_hub_errors_are_one_line(monkeypatch, kind, words):
    Hub(monkeypatch, error=hub_error(kind) if kind else ConnectionError("no\nroute to host"))
    with pytest.raises(InputError) as error:
        load_model("someone/csm")
    assert words in str(error.value) and str(error.value).startswith("someone/csm: ")
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------- saving


def test_saving_a_module_that_is_no_csm_is_refused(tmp_path):
    model = random_model()
    model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="extra.bias"):
        save_model(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_unwritable_places(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot write"):
        save_model(random_model(), tmp_path / "file" / "run")
    save_model(random_model(), tmp_path / "run")
    before = (tmp_path / "run" / "model.safetensors").read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match="the disk is full"):
        save_model(fill(CSM(MICRO), seed=9), tmp_path / "run")
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["config.json", "model.safetensors"]


def test_public_names():
    assert csm_fast.load_model is load_model and csm_fast.save_model is save_model
