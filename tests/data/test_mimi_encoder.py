"""Mimi's encoder for CPUs gives the codes of transformers' Mimi; clips side by side give those of clips alone."""

from __future__ import annotations

import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from benchmarks.pretokenize_speed import count_differences
from csm_fast.data.codec import mimi_encoder
from csm_fast.data.codec import offline as offline_codec
from csm_fast.data.codec.backends import TransformersCodec
from csm_fast.data.codec.mimi_encoder import MimiEncoder, encode_packs
from csm_fast.data.codec.mimi_shape import MIMI, complete_sizes, is_supported, weight_shapes
from csm_fast.data.codec.mimi_weights import flat_name, make_weights
from csm_fast.data.codec.offline import OfflineShape, synthetic_speech

SHAPE = OfflineShape(
    num_filters=4,
    hidden_size=128,
    num_hidden_layers=2,
    intermediate_size=96,
    codebook_dim=32,
    codebook_size=64,
    num_quantizers=6,
)
FRAMES = [40, 3, 1, 17, 26, 9]


def mimi(**changes):
    """A random transformers Mimi with biases, norms and codebooks that all matter."""
    from transformers import MimiConfig, MimiModel

    model = MimiModel(MimiConfig(**{**SHAPE.mimi(), "sliding_window": 11, **changes})).eval().requires_grad_(False)

    def make(name, size):
        random = np.random.RandomState(zlib.crc32(name.encode()))
        if name.endswith("embed_sum"):
            return random.randn(*size)
        if name.endswith("cluster_usage"):
            return random.uniform(0.5, 2, size)
        if "layer_scale" in name:
            return random.uniform(0.3, 1, size)
        if name.endswith("bias"):
            return 0.1 * random.randn(*size)
        if "layernorm" in name:
            return random.uniform(0.5, 2, size)
        return offline_codec.random_weight(name, size, 0)

    flat = make_weights(make, model)
    model.load_state_dict({name: flat[flat_name(name)] for name in model.state_dict()})
    for module in model.modules():
        if hasattr(module, "_embed"):
            module._embed = None
    return model


@pytest.fixture(scope="module")
def waves():
    sounds = [s.astype(np.float32) for s in synthetic_speech(5, len(FRAMES), max(FRAMES))]
    return [torch.from_numpy(s[: n * 1920].copy()) for s, n in zip(sounds, FRAMES, strict=True)]


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def flat_weights(model):
    return {flat_name(name): value.float() for name, value in model.state_dict().items()}


def encoder_of(model, num_codebooks):
    return MimiEncoder(flat_weights(model), model.config, num_codebooks)


def latents(model, wave):
    return model.encoder(wave[None, None]).latents[0].T


def chains(model):
    quantizers = (
        model.quantizer.semantic_residual_vector_quantizer,
        model.quantizer.acoustic_residual_vector_quantizer,
    )
    return [
        (q.input_proj.weight[..., 0].double().numpy(), [layer.codebook.embed.double().numpy() for layer in q.layers])
        for q in quantizers
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_residual_layers": 2, "dilation_growth_rate": 3},
        {"sliding_window": 250, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    ],
    ids=["plain", "dilated", "wide"],
)
def test_the_codes_are_transformers_codes(changes, waves, one_thread, monkeypatch):
    model = mimi(**changes)
    assert is_supported(model.config)
    encoder = encoder_of(model, SHAPE.num_quantizers)
    with torch.inference_mode():
        wanted = [model.encode(wave[None, None], return_dict=True).audio_codes[0].T.numpy() for wave in waves]
        hidden = [latents(model, wave).double().numpy() for wave in waves]
        for tile in (mimi_encoder._TILE_VALUES, 300):  # 300: every stage in many pieces
            monkeypatch.setattr(mimi_encoder, "_TILE_VALUES", tile)
            encoder = encoder_of(model, SHAPE.num_quantizers)
            lengths = [2 * n for n in FRAMES]
            rows = encoder.transform(torch.cat([encoder.convolve(wave) for wave in waves]), lengths)
            found = encoder.downsample(rows, lengths).numpy()
            np.testing.assert_allclose(found, np.concatenate(hidden), rtol=1e-4, atol=1e-4 * np.abs(found).max())
            codes = [encoder.encode([wave])[0].numpy() for wave in waves]
            said = count_differences(wanted, codes, hidden.__getitem__, chains(model))
            assert said["first"] == said["near_ties"] and said["share"] < 0.005, said
    assert len(np.unique(np.concatenate(wanted), axis=0)) > 30


@pytest.mark.parametrize(
    "changes",
    [
        {},
        SHAPE.mimi(),
        {"num_residual_layers": 2, "upsampling_ratios": [4, 6, 8, 5], "num_quantizers": 9, "kernel_size": 5},
        {"head_dim": 32, "compress": 4, "hidden_size": 256, "upsample_groups": 64},
        {"vector_quantization_hidden_dimension": 512, "codebook_dim": 512, "rope_theta": 500.0},
        {"frame_rate": None, "head_dim": None},
        {"use_conv_shortcut": True},
    ],
    ids=["Mimi", "offline", "deep", "other heads", "wide codes", "nulls", "not supported"],
)
def test_sizes_and_shapes_are_transformers(changes):
    from transformers import MimiConfig, MimiModel

    with torch.device("meta"):
        model = MimiModel(MimiConfig(**changes))
    sizes = complete_sizes(changes)
    assert is_supported(sizes) == is_supported(model.config) == ("use_conv_shortcut" not in changes)
    for name, value in vars(sizes).items():
        assert value == getattr(model.config, name, value), name
    assert sizes.rope_parameters["rope_theta"] == model.config.rope_parameters["rope_theta"]
    assert not MIMI.keys() - model.config.to_dict().keys() - {"frame_rate"}
    if is_supported(sizes):
        shapes = {flat_name(name): tuple(value.shape) for name, value in model.state_dict().items()}
        assert weight_shapes(sizes) == shapes


@pytest.mark.slow
def test_coding_on_a_cpu_needs_no_transformers(tmp_path, waves):
    """Which takes seconds to import."""
    save_file(flat_weights(mimi(sliding_window=250)), tmp_path / "mimi.safetensors")
    check = f"""
import sys, numpy
from csm_fast.data.codec.load import load_codec
codec = load_codec("transformers", source={str(tmp_path / "mimi.safetensors")!r}, num_codebooks=6)
codes = codec.encode([numpy.zeros(4000, numpy.float32)])
assert codes[0].shape == (3, 6) and "transformers" not in sys.modules
assert codec.decode(codes[0]).shape == (3 * 1920,) and "transformers" in sys.modules
assert codec.encode([numpy.zeros(4000, numpy.float32)])[0].tolist() == codes[0].tolist()
"""
    subprocess.run([sys.executable, "-c", check], check=True)


def test_clips_side_by_side_are_clips_alone(waves, monkeypatch):
    model = mimi()
    monkeypatch.setattr(mimi_encoder, "PACK_SAMPLES", 30 * 1920)  # several packs of several clips
    monkeypatch.setattr(mimi_encoder, "_QUANTIZER_ROWS", 7)
    encoder = encoder_of(model, 4)
    before = torch.get_num_threads()
    seen = []
    encode = encoder.encode
    monkeypatch.setattr(
        encoder, "encode", lambda pack: seen.append((len(pack), torch.get_num_threads())) or encode(pack)
    )
    together = encode_packs(encoder, waves, threads=3)
    assert torch.get_num_threads() == before
    assert sorted(size for size, _ in seen) == [1, 1, 4] and {threads for _, threads in seen} == {1}
    assert [tuple(codes.shape) for codes in together] == [(n, 4) for n in FRAMES]
    alone = [encode([wave])[0].numpy() for wave in waves]
    hidden = [latents(model, wave).double().numpy() for wave in waves]
    said = count_differences(
        alone,
        [codes.numpy() for codes in together],
        hidden.__getitem__,
        [(p, tables[: (1, 3)[i]]) for i, (p, tables) in enumerate(chains(model))],
    )
    assert said["first"] == said["near_ties"] and said["share"] < 0.005, said


def test_threads_are_restored_after_a_failure(waves):
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        encode_packs(type("Bad", (), {"encode": lambda self, pack: 1 // 0})(), [w.repeat(9) for w in waves], threads=2)
    assert torch.get_num_threads() == before


def test_the_codec_takes_it_where_it_can(waves, monkeypatch):
    def codec(**changes):
        arguments = {**SHAPE.mimi(), "sliding_window": 11, **changes}
        return TransformersCodec(flat_weights(mimi(**changes)), arguments, name="m", num_codebooks=6)

    plain, other = codec(), codec(use_conv_shortcut=True)
    assert plain.side_by_side and not other.side_by_side
    used = []
    monkeypatch.setattr(
        mimi_encoder, "encode_packs", lambda encoder, waves: used.append(len(waves)) or encode_packs(encoder, waves)
    )
    sounds = [wave.numpy() for wave in waves]
    together = plain.encode([*sounds, np.zeros(0, np.float32)])
    assert used == [len(sounds)] and together[-1].shape == (0, 6)
    for codes, wave in zip(together[:-1], sounds, strict=True):
        assert codes.dtype == np.uint16 and codes.shape == (len(wave) // 1920, 6)
        assert (codes == plain.encode([wave])[0]).mean() > 0.995
    assert [c.shape for c in other.encode(sounds)] == [(n, 6) for n in FRAMES] and used == [len(sounds)]
    monkeypatch.setattr(plain, "device", "cuda")
    plain._encoder = None
    assert not plain.side_by_side
