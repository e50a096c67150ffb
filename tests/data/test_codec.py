"""The codecs: shapes, batches, long clips, identity across implementations, the offline fit, errors."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from csm_fast.data.codec import backends as codec_backends
from csm_fast.data.codec import base as codec_module
from csm_fast.data.codec import load as codec_load
from csm_fast.data.codec import mimi_weights as codec_weights
from csm_fast.data.codec import offline as offline_codec
from csm_fast.data.codec.base import Codec
from csm_fast.data.codec.load import load_codec
from csm_fast.data.codec.mimi_weights import hash_tables
from csm_fast.data.codec.offline import OfflineShape, fit_codec, offline_file, synthetic_speech
from csm_fast.system import hub
from csm_fast.system.errors import InputError

SMALL = OfflineShape(
    num_filters=4,
    hidden_size=64,
    num_hidden_layers=2,
    intermediate_size=128,
    codebook_dim=32,
    codebook_size=64,
    num_quantizers=8,
    clips=4,
    clip_frames=50,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory) -> Path:
    return offline_file(tmp_path_factory.mktemp("cache"), SMALL)


@pytest.fixture(scope="module")
def small(small_file) -> Codec:
    return load_codec("offline", source=small_file, num_codebooks=8)


@pytest.fixture(scope="module")
def sounds() -> list[np.ndarray]:
    made = [sound.astype(np.float32) for sound in synthetic_speech(7, 3, 40)]
    return [made[0], made[1][:30001], made[2][:1920], made[0][:1]]


def agreement(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return float((a == b).mean())


def lively_weights(width: int = 128, levels: int = 6) -> dict[str, torch.Tensor]:
    """A reduced Mimi of two heads and layers whose attention matters, as flat weights; codebook sums and counts as
    training leaves them."""
    from transformers import MimiConfig, MimiModel

    shape = OfflineShape(
        num_filters=4,
        hidden_size=width,
        num_hidden_layers=2,
        intermediate_size=64,
        codebook_dim=32,
        codebook_size=64,
        num_quantizers=levels,
    )
    model = MimiModel(MimiConfig(**shape.mimi())).eval()
    random = np.random.RandomState(3)

    def make(name: str, size: tuple[int, ...]) -> np.ndarray:
        if name.endswith("cluster_usage"):
            return random.uniform(0.5, 30, size)
        if name.endswith("embed_sum"):
            return random.randn(*size) * 4
        if "layer_scale" in name:
            return random.uniform(0.5, 1, size)
        if name.endswith(("layernorm.bias", "conv.bias")):
            return 0.1 * random.randn(*size)
        return offline_codec.random_weight(name, size, 0)

    return codec_weights.make_weights(make, model)


def moshi_state(flat: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights as moshi itself saves them."""
    from transformers import MimiConfig

    model = codec_backends._make_moshi(MimiConfig(**codec_weights.read_sizes(flat)))
    codec_weights.load_module(flat, model)
    return {name: value.clone() for name, value in model.state_dict().items()}


# Shapes, batches, long clips


def test_shapes_and_dtypes(small, sounds):
    codes = small.encode(sounds)
    assert [c.shape for c in codes] == [(40, 8), (16, 8), (1, 8), (1, 8)]
    for c in codes:
        assert c.dtype == np.uint16 and c.max() < 64 and c.flags.c_contiguous
        audio = small.decode(c)
        assert audio.dtype == np.float32 and audio.shape == (len(c) * 1920,)
        assert np.isfinite(audio).all() and np.abs(audio).max() <= 1
    assert small.encode([]) == []
    assert small.encode([np.zeros(0, np.float32)])[0].shape == (0, 8)
    assert small.decode(np.zeros((0, 8), int)).shape == (0,)
    again = small.encode([torch.from_numpy(sounds[1])])[0]
    assert (again == codes[1]).all()


def test_batched_equals_single(small, sounds, monkeypatch):
    single = small.encode(sounds)
    whole = [list(range(len(sounds)))]
    monkeypatch.setattr(small, "_groups", lambda frames: whole)
    batched = small.encode(sounds)
    for one, many in zip(single, batched, strict=True):
        assert agreement(one, many) > 0.995


def test_groups_by_length_off_the_cpu(small, monkeypatch):
    frames = [400, 5, 0, 1000, 900, 4000, 6]
    monkeypatch.setattr(small, "device", "cuda")
    groups = list(small._groups(frames))
    assert sorted(index for group in groups for index in group) == [0, 1, 3, 4, 5, 6]
    assert all(len(group) == 1 or len(group) * max(frames[i] for i in group) <= 1500 for group in groups)
    assert [1, 6, 0] in groups


@pytest.mark.slow
def test_long_clip_in_pieces_equals_whole(small, monkeypatch):
    sound = np.concatenate([s.astype(np.float32) for s in synthetic_speech(9, 12, 50)])
    whole = small.encode([sound])[0]
    audio = small.decode(whole)
    monkeypatch.setattr(codec_module, "_WHOLE_FRAMES", 200)
    monkeypatch.setattr(codec_module, "_STEP_FRAMES", 170)
    assert list(small._pieces(600)) == [(0, 0, 200), (0, 200, 370), (104, 370, 540), (274, 540, 600)]
    assert agreement(whole, small.encode([sound])[0]) > 0.995
    assert np.abs(audio - small.decode(whole)).max() < 1e-4


def test_codes_follow_the_sound(small, sounds):
    codes = small.encode(sounds)[0]
    louder = small.encode([sounds[0] * 0.1])[0]
    assert len(np.unique(codes, axis=0)) > 20
    assert agreement(codes, louder) < 0.9


def test_silence_and_the_end_mark(small, monkeypatch):
    codes = small.encode([np.zeros(24000, np.float32), np.ones(5000, np.float32)])
    assert all(c.any(axis=1).all() for c in codes)
    assert np.isfinite(small.decode(codes[0])).all()
    monkeypatch.setattr(small, "_encode", lambda batch: torch.zeros(1, 8, batch.shape[-1] // 1920, dtype=torch.int64))
    before = small.marked_frames
    marked = small.encode([np.zeros(3 * 1920, np.float32)])[0]
    assert (marked[:, -1] == 1).all() and not marked[:, :-1].any()
    assert small.marked_frames == before + 3


# Identity, and the same weights through both libraries


def test_identity(small):
    identity = json.loads(json.dumps(small.identity()))
    assert identity["name"].startswith("offline codec") and "not intelligible" in identity["name"]
    assert identity["sample_rate"] == 24000 and identity["num_codebooks"] == 8 and identity["codebook_size"] == 64
    assert small.matches(identity) and small.matches({**identity, "kind": "moshi", "name": "?"})
    assert not small.matches({**identity, "fingerprint": "0" * 64}) and not small.matches({})


def test_transformers_saves_what_we_load(tmp_path, sounds):
    from transformers import MimiConfig, MimiModel

    flat = lively_weights()
    model = MimiModel(MimiConfig(**codec_weights.read_sizes(flat), sliding_window=20)).eval()
    codec_weights.load_module(flat, model)
    model.save_pretrained(tmp_path)
    codec = load_codec("transformers", source=tmp_path, num_codebooks=6)
    assert codec.kind == "transformers" and codec.model.config.sliding_window == 20
    x = torch.from_numpy(sounds[0])[None, None]
    with torch.inference_mode():
        expected = model.encode(x).audio_codes[0].T.numpy()
    assert (codec.encode([sounds[0]])[0] == expected).all()
    fewer = load_codec("transformers", source=tmp_path, num_codebooks=4)
    assert (fewer.encode([sounds[0]])[0] == expected[:, :4]).all() and fewer.fingerprint != codec.fingerprint
    assert fewer.decode(expected[:, :4]).shape == sounds[0].shape


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [3, 25])  # 25 s is beyond the attention's window of 250 positions
def test_same_weights_same_codes_through_moshi(tmp_path, seconds):
    pytest.importorskip("moshi.models.loaders")
    flat = lively_weights()
    save_file(flat, tmp_path / "transformers.safetensors")
    saved_by_moshi = moshi_state(flat)
    assert "encoder.model.0.conv.conv.weight" in saved_by_moshi and not set(saved_by_moshi) & set(flat)
    save_file(saved_by_moshi, tmp_path / "moshi.safetensors")
    old = {  # as Kyutai's published file spells the attention
        name.replace("in_projs.0.weight", "in_proj_weight").replace("out_projs.0.", "out_proj."): value
        for name, value in saved_by_moshi.items()
    }
    save_file(old, tmp_path / "published.safetensors")
    codecs = [
        load_codec(kind, source=tmp_path / f"{saved}.safetensors", num_codebooks=6)
        for kind, saved in [
            ("transformers", "transformers"),
            ("transformers", "moshi"),
            ("moshi", "transformers"),
            ("moshi", "moshi"),
            ("moshi", "published"),
        ]
    ]
    assert len({codec.fingerprint for codec in codecs}) == 1
    assert [codec.kind for codec in codecs] == ["transformers"] * 2 + ["moshi"] * 3
    sound = next(synthetic_speech(11, 1, seconds * 25 // 2)).astype(np.float32)
    codes = [codec.encode([sound])[0] for codec in codecs]
    assert len(np.unique(codes[0], axis=0)) > 10
    assert (codes[0] == codes[1]).all() and (codes[2] == codes[3]).all() and (codes[2] == codes[4]).all()
    assert agreement(codes[0], codes[2]) > 0.995
    audio = [codec.decode(codes[0]) for codec in codecs]
    assert np.abs(audio[0] - audio[2]).max() < 1e-3 * max(1.0, np.abs(audio[0]).max())
    for name, value in codec_weights.from_moshi(saved_by_moshi).items():
        assert torch.equal(value, flat[name]), name


# The offline codec's fit


def test_fit_is_reproducible_whatever_the_threads():
    first = fit_codec(SMALL)
    torch.manual_seed(123)
    torch.set_num_threads(2)
    try:
        second = fit_codec(SMALL)
    finally:
        torch.set_num_threads(1)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = fit_codec(OfflineShape(**{**SMALL.__dict__, "seed": 1}))
    assert hash_tables(codec_weights.codebook_tables(other)) != hash_tables(codec_weights.codebook_tables(first))


def test_every_codebook_is_used(small):
    codes = np.concatenate(small.encode([s.astype(np.float32) for s in synthetic_speech(21, 12, 50)]))
    for level in range(8):
        counts = np.bincount(codes[:, level], minlength=64)
        share = counts[counts > 0] / counts.sum()
        assert (counts > 0).sum() >= 20, level
        assert -(share * np.log(share)).sum() > 2, level
    assert codes.any(axis=1).all()


def test_fitted_once_and_kept(small_file, monkeypatch, tmp_path):
    before = small_file.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(offline_codec, "fit_codec", lambda shape: pytest.fail("fitted again"))
        assert offline_file(small_file.parent, SMALL) == small_file
    assert small_file.read_bytes() == before
    assert [p.name for p in small_file.parent.iterdir()] == [small_file.name]
    again = offline_codec.read_offline(offline_file(tmp_path, SMALL))
    kept = offline_codec.read_offline(small_file)
    assert again.keys() == kept.keys() and all(torch.equal(again[name], kept[name]) for name in kept)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert offline_codec.default_cache_dir() == tmp_path / "xdg" / "csm_fast"


def test_interrupted_fit_leaves_nothing(tmp_path, monkeypatch):
    def stop(shape):
        raise KeyboardInterrupt

    monkeypatch.setattr(offline_codec, "fit_codec", stop)
    with pytest.raises(KeyboardInterrupt):
        offline_file(tmp_path, SMALL)
    assert list(tmp_path.iterdir()) == []


# auto, and errors


def test_auto_falls_back_loudly(small_file, monkeypatch, caplog):
    def unreachable(repository, filename):
        raise InputError(f"{repository} is not in the local cache and the hub cannot be reached")

    monkeypatch.setattr(codec_load, "get_hub_file", unreachable)
    monkeypatch.setattr(offline_codec, "offline_file", lambda cache_dir=None: small_file)
    with caplog.at_level(logging.WARNING, logger="csm_fast"):
        codec = load_codec("auto", num_codebooks=8)
    assert codec.kind == "offline" and len(caplog.records) == 1
    assert "kyutai/mimi" in caplog.text and "not intelligible" in caplog.text
    assert load_codec("auto", source=small_file, num_codebooks=8).kind == "offline"


def test_hub_is_given_up_quickly(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not hub.hub_answers(5)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert not hub.hub_answers(5)


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    text = str(error.value)
    assert "\n" not in text and error.value.mend
    return text


def test_errors_are_one_line(tmp_path, small_file, small):
    cases = []
    corrupt = tmp_path / "corrupt.safetensors"
    corrupt.write_bytes(small_file.read_bytes()[:5000])
    cases.append(("transformers", corrupt, "not a readable safetensors"))
    foreign = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(2)}, foreign)
    cases.append(("transformers", foreign, "holds no Mimi"))
    cases.append(("offline", foreign, "holds no Mimi"))
    cases.append(("transformers", tmp_path / "none.safetensors", "no such codec"))
    cases.append(("offline", tmp_path / "none.safetensors", "no such codec"))
    cases.append(("transformers", tmp_path, "2 safetensors files"))
    flat, _ = codec_weights.read_weights(small_file)
    plain = tmp_path / "a" / "plain.safetensors"
    plain.parent.mkdir()
    save_file(flat, plain)
    cases.append(("offline", plain, "not an offline codec"))
    short = {name: value for name, value in flat.items() if name != "encoder.layers.14.conv.bias"}
    save_file(short, tmp_path / "a" / "short.safetensors")
    cases.append(("transformers", tmp_path / "a" / "short.safetensors", "lack encoder.layers.14.conv.bias"))
    save_file({**flat, "extra.weight": torch.zeros(1)}, tmp_path / "a" / "more.safetensors")
    cases.append(("transformers", tmp_path / "a" / "more.safetensors", "extra.weight"))
    key = "quantizer.acoustic_residual_vector_quantizer.layers.2.codebook.embed_sum"
    changed = {**flat, key: flat[key] + 1}
    damaged = tmp_path / "a" / "damaged.safetensors"
    save_file(changed, damaged, metadata={"csm_fast": "offline codec", "codebooks": small.fingerprint})
    cases.append(("offline", damaged, "damaged"))
    for kind, source, expected in cases:
        with pytest.raises(InputError) as error:
            load_codec(kind, source=source, num_codebooks=8)
        assert expected in one_line(error)
    with pytest.raises(InputError) as error:
        load_codec("encodec")
    assert "auto, transformers, moshi, offline" in one_line(error)
    with pytest.raises(InputError) as error:
        load_codec("offline", source=small_file, num_codebooks=32)
    assert "has 8 codebooks" in one_line(error)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError) as error:
        offline_file(tmp_path / "file", SMALL)
    assert "cannot be kept" in one_line(error)


def test_bad_arrays_are_refused(small):
    for wave in (np.zeros((2, 100), np.float32), np.full(10, np.nan, np.float32), np.full(10, np.inf, np.float32)):
        with pytest.raises(InputError) as error:
            small.encode([wave])
        one_line(error)
    for codes in (np.zeros(8, int), np.full((3, 8), 64), np.full((3, 8), -1), np.zeros((3, 9), int)):
        with pytest.raises(InputError) as error:
            small.decode(codes)
        one_line(error)


def test_moshi_absent_is_one_line(tmp_path, small_file, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "moshi", None)
    monkeypatch.setitem(sys.modules, "moshi.models", None)
    with pytest.raises(InputError) as error:
        load_codec("moshi", source=small_file, num_codebooks=8)
    assert "pip install" in one_line(error)


def test_import_is_light():
    import subprocess
    import sys

    check = (
        "import sys, csm_fast.data.codec.base, csm_fast.data.codec.offline;"
        "print(','.join(m for m in ('torch','transformers','moshi','numpy','safetensors') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
