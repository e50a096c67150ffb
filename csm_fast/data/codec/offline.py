"""The offline codec: Mimi's architecture with random weights, for machines without access to the hub.

Its encoder and decoder are random, and its codebooks are fitted once to synthetic speech-like sounds. One safetensors
file in a cache directory keeps the result. Audio through it is not intelligible. Everything else (frame rate, number of
codes, entropy, codes that depend on the sound and on their neighbours) is realistic enough to build, test and show all
steps of training.

Every machine should fit the same file, because the identity of a codec is the hash of its codebooks. So random numbers
come from numpy's frozen ``RandomState``, everything is computed in float64, and the result is rounded to 8 significant
bits (bfloat16's), which removes the differences in last digits between CPUs, thread counts and library versions. If two
fits differ all the same, so do their hashes, and a token store from one is refused with the other; then copy the file
(``load_codec("offline", source=FILE)``).
"""

from __future__ import annotations

import hashlib
import os
import sys
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csm_fast.config.shape import SAMPLE_RATE, SAMPLES_PER_FRAME
from csm_fast.data.codec.mimi_weights import codebook_tables, flat_name, hash_tables, make_weights, read_weights
from csm_fast.system.errors import InputError
from csm_fast.system.files import fsync_path, replace_file, writing_to

if TYPE_CHECKING:
    import numpy as np
    import torch

VERSION = 2  # part of the file's name and of its hash: raise it when a fitted file would change
HOP = 480  # 20 ms: the step at which the synthetic sounds change


@dataclass(frozen=True)
class OfflineShape:
    """The offline codec's sizes. The default is a narrower Mimi: 16 filters instead of 64, width 256 instead of 512, 4
    layers instead of 8, codes of 128 dimensions instead of 256."""

    num_filters: int = 16
    hidden_size: int = 256
    num_hidden_layers: int = 4
    intermediate_size: int = 1024
    codebook_dim: int = 128
    codebook_size: int = 2048
    num_quantizers: int = 32
    clips: int = 64  # synthetic clips fitted to
    clip_frames: int = 80  # their length in codec frames of 80 ms
    seed: int = 0

    def mimi(self) -> dict[str, Any]:
        """Arguments of transformers' MimiConfig."""
        return {
            "num_filters": self.num_filters,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "intermediate_size": self.intermediate_size,
            "num_attention_heads": self.hidden_size // 64,
            "num_key_value_heads": self.hidden_size // 64,
            "upsample_groups": self.hidden_size,
            "vector_quantization_hidden_dimension": self.codebook_dim,
            "codebook_dim": self.codebook_dim,
            "codebook_size": self.codebook_size,
            "num_quantizers": self.num_quantizers,
        }


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/csm_fast``, or the platform's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base) / "csm_fast"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "csm_fast"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "csm_fast"
    return Path.home() / ".cache" / "csm_fast"


def offline_file(cache_dir: str | os.PathLike[str] | None = None, shape: OfflineShape | None = None) -> Path:
    """The fitted codec's safetensors file. If it is not there it is made, which takes about half a minute.

    An interrupted fit leaves nothing behind, and two fits at once write the same file.

    Raises:
        InputError: the directory cannot be written.
    """
    from safetensors.torch import save_file

    shape = shape or OfflineShape()
    directory = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
    recipe = hashlib.sha256(repr((VERSION, sorted(asdict(shape).items()))).encode()).hexdigest()[:12]
    path = directory / f"offline-codec-v{VERSION}-{recipe}.safetensors"
    if path.is_file():
        return path
    what = "the offline codec (70 MB) cannot be kept in this cache directory (XDG_CACHE_HOME chooses it)"
    with writing_to(directory, what):
        directory.mkdir(parents=True, exist_ok=True)
        with replace_file(path, shared=True) as temporary:
            temporary.touch()  # fails before the fit, not after it
            state = fit_codec(shape)
            metadata = {"format": "pt", "csm_fast": "offline codec", "codebooks": hash_tables(codebook_tables(state))}
            save_file(state, temporary, metadata=metadata)
            fsync_path(temporary)
    return path


def read_offline(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """The weights of a fitted file under flat names. Raises InputError for a damaged file, or another kind of file."""
    state, metadata = read_weights(path)
    if metadata.get("csm_fast") != "offline codec":
        raise InputError("is not an offline codec", file=path, mend="use --codec transformers for Mimi")
    if metadata.get("codebooks") != hash_tables(codebook_tables(state)):
        raise InputError("the offline codec's codebooks are damaged", file=path, mend="delete it for a new fit")
    return state


def random_weight(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """One weight (flat name) of the random codec, float64. It depends on its name, its shape and the seed alone.

    The encoder works like a random scattering transform: random band filters at the high rates, then, from 1,200 Hz
    down, low-pass kernels with random mixing of channels, after ELUs whose inputs are large enough to be rectified. So
    codes follow the envelopes of bands of sound, not the phase of the waveform, and neighbouring frames are similar.
    """
    import numpy as np

    random = np.random.RandomState((zlib.crc32(name.encode()) ^ seed) & 0xFFFFFFFF)
    if name.endswith("bias") or name.endswith("embed_sum"):
        return np.zeros(shape)
    if "layernorm" in name or name.endswith(("cluster_usage", "initialized")):
        return np.ones(shape)
    if "layer_scale" in name:
        return np.full(shape, 0.01)
    weight = random.randn(*shape)
    if len(shape) < 3:
        return weight / np.sqrt(shape[1])
    inputs, width = shape[1:]
    plain = weight / np.sqrt(inputs * width)
    if ".block." in name:
        return 0.7 * plain
    if name.startswith("encoder.") or name == "downsample.conv.weight":
        window = np.hanning(width + 2)[1:-1]
        window = window / np.sqrt((window**2).sum())
        layer = int(name.split(".")[2]) if name.startswith("encoder.") else 99
        if layer == 0:  # from samples: no response to an offset, and a gain that gives the ELUs large inputs
            weight -= weight.mean(-1, keepdims=True)
            return 10.0 * weight / np.sqrt((weight**2).sum((1, 2), keepdims=True))
        if layer < 9:  # 24 and 6 kHz: filters
            return 1.4 * weight * window / np.sqrt(inputs)
        mixing = random.randn(shape[0], inputs, 1)  # 1.2 kHz and lower: envelopes, smoothed
        return 1.4 * mixing * window / np.sqrt(inputs * width / 2) + 0.1 * plain
    return plain


def fit_codec(shape: OfflineShape) -> dict[str, torch.Tensor]:
    """The whole codec under flat names, float32: random weights, whitened projections, fitted codebooks."""
    import torch
    from transformers import MimiConfig, MimiModel

    model = MimiModel(MimiConfig(**shape.mimi())).eval()
    state = make_weights(lambda name, size: random_weight(name, size, shape.seed), model)
    # Rounded before use as at the end, so that a last digit that differs between machines does not change the fit.
    state = {name: _round(value) for name, value in state.items()}
    model.load_state_dict({name: state[flat_name(name)] for name in model.state_dict()})
    model.double()
    _rotary_in_float64(model)
    with torch.inference_mode():
        latents = []
        for sound in synthetic_speech(shape.seed, shape.clips, shape.clip_frames):
            output = model.encoder(torch.from_numpy(sound)[None, None]).latents
            latents.append(output[0].T)
        data = torch.cat(latents)
        whitening = _whitening(data)
        for part, levels, scale in (("semantic", 1, 0.8), ("acoustic", shape.num_quantizers - 1, 0.6)):
            prefix = f"quantizer.{part}_residual_vector_quantizer."
            projection = state[prefix + "input_proj.weight"]
            projection = _round(projection[:, :, 0].double() @ whitening)
            state[prefix + "input_proj.weight"] = projection[:, :, None].contiguous()
            tables = _fit_levels(data @ projection.double().T, levels, shape.codebook_size, scale, shape.seed)
            for level, table in enumerate(tables):
                state[f"{prefix}layers.{level}.codebook.embed_sum"] = table
        model.load_state_dict({name: state[flat_name(name)] for name in model.state_dict()})
        for module in model.modules():
            if hasattr(module, "_embed"):
                module._embed = None
        sound = model.decode(model.encode(torch.from_numpy(sound)[None, None]).audio_codes).audio_values
        # The decoder is linear in its last layer. Scale its noise by a power of two to the level of quiet speech, 0.05.
        gain = 2.0 ** torch.round(torch.log2(0.05 / sound.square().mean().sqrt().clamp(min=1e-30))).item()
    last = max((name for name in state if name.startswith("decoder.layers.")), key=lambda name: int(name.split(".")[2]))
    state[last.rsplit(".", 1)[0] + ".weight"] *= gain
    return {name: value.contiguous() for name, value in state.items()}


def _round(values: torch.Tensor) -> torch.Tensor:
    """Values of any precision as float32, rounded to bfloat16 (8 significant bits)."""
    import torch

    return values.to(torch.bfloat16).float()


def _rotary_in_float64(model: torch.nn.Module) -> None:
    """Replace transformers' rotary tables: those are float32, and their last digits differ between machines."""
    import torch

    class Rotary(torch.nn.Module):
        def __init__(self, dim: int, base: float):
            super().__init__()
            self.rates = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)

        def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            angles = position_ids[..., None].double() * self.rates
            angles = torch.cat([angles, angles], dim=-1)
            return angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "MimiRotaryEmbedding":
                setattr(module, name, Rotary(64, 10000.0))


def _whitening(data: torch.Tensor) -> torch.Tensor:
    """[D, D] float64, symmetric: makes the variance equal in all directions of ``data`` [N, D] except the weakest.

    Without it, loudness, which is one direction of the latents, has twenty times the variance of the spectrum, and all
    codes follow it.
    """
    import torch

    centred = data - data.mean(0)
    variance, directions = torch.linalg.eigh(centred.T @ centred / len(data))
    scale = (variance / variance[-1]).clamp(min=1e-4) ** -0.5
    return (directions * scale) @ directions.T


def _fit_levels(residual: torch.Tensor, levels: int, size: int, scale: float, seed: int) -> Iterator[torch.Tensor]:
    """Yield one codebook [size, D] float32 per level: residuals [N, D] chosen at random, scaled down, centred.

    Residuals near silence are not chosen: they would split silence into codes that only noise chooses between. Scaled
    samples leave enough of the residual for all levels to carry information; k-means would not, after a few levels.
    """
    import numpy as np
    import torch

    random = np.random.RandomState(seed + levels)
    for _ in range(levels):
        norms = residual.norm(dim=1)
        loud = torch.nonzero(norms > 0.3 * norms.median()).flatten().numpy()
        picked = np.resize(random.permutation(loud), size)
        table = residual[picked] * scale
        table = table - table.mean(0)
        # Code 0 of every level is the one farthest from silence: 32 zeros are the end of speech.
        farthest = int(table.norm(dim=1).argmax())
        table[[0, farthest]] = table[[farthest, 0]]
        stored = _round(table)
        yield stored
        table = stored.double()
        distance = torch.addmm(table.square().sum(1), residual, table.T, alpha=-2)  # less each residual's own square
        residual = residual - table[distance.argmin(1)]


def synthetic_speech(seed: int, clips: int, frames: int) -> Iterator[np.ndarray]:
    """Yield ``clips`` speech-like sounds, float64 [frames * 1920] at 24 kHz within [-1, 1].

    Pulse trains with gliding pitch and noise through four moving formants, in segments of 40 to 240 ms, with pauses,
    noise floors of -95 to -50 dB and levels of -28 to -14 dB; half of the clips have a telephone's bandwidth
    (3.6 or 3.8 kHz), the others 7 or 11.9 kHz.
    """
    import numpy as np

    for clip in range(clips):
        yield _sound(np.random.RandomState((seed * 100003 + 1000 + clip) & 0xFFFFFFFF), frames * SAMPLES_PER_FRAME)


def _sound(random: np.random.RandomState, samples: int) -> np.ndarray:
    import numpy as np

    steps = samples // HOP + 1
    voiced, noisy, level, tilt, pitch = (np.zeros(steps) for _ in range(5))
    formant, width = np.zeros((steps, 4)), np.zeros((steps, 4))
    tract, base = random.uniform(0.85, 1.2), np.exp(random.uniform(np.log(80), np.log(300)))
    start, last_pitch = 0, base
    while start < steps:  # one segment: pause, vowel, fricative or voiced fricative
        kind = np.searchsorted([0.15, 0.72, 0.9], random.rand(), side="right")
        end = min(steps, start + int(random.randint(3, 25) if kind == 0 else random.randint(2, 12)))
        part = slice(start, end)
        voiced[part], noisy[part] = kind in (1, 3), (0.02, 0.02, 1.0, 0.3)[kind]
        level[part] = 0 if kind == 0 else 10 ** (random.uniform(-18, 0) / 20)
        if kind == 2:
            formant[part], width[part] = random.uniform(1500, 9000, 4), random.uniform(500, 2500, 4)
        else:
            formant[part] = random.uniform([250, 800, 2000, 3200], [900, 2500, 3400, 5000]) * tract
            width[part] = random.uniform(60, 250, 4)
        tilt[part] = random.uniform(0, 1.2)
        next_pitch = base * np.exp(random.uniform(-0.35, 0.35))
        pitch[part] = np.linspace(last_pitch, next_pitch, end - start)
        start, last_pitch = end, next_pitch
    for track in (level, tilt, pitch, *formant.T):
        track[:] = np.convolve(np.pad(track, 1, mode="edge"), [0.25, 0.5, 0.25], "valid")

    phase = np.cumsum(np.interp(np.arange(samples) / HOP, np.arange(steps), pitch) / SAMPLE_RATE)
    pulses = np.diff(np.floor(phase), prepend=0.0) * np.sqrt(SAMPLE_RATE / base)
    noise = random.randn(samples)
    # Windows of 40 ms every 20 ms, shaped in the frequency domain and added up again.
    size, count = 1024, samples // HOP
    at = np.arange(2 * HOP)[None] + HOP * np.arange(count)[:, None]
    source = np.pad(pulses, HOP)[at] * voiced[:count, None] + np.pad(noise, HOP)[at] * noisy[:count, None]
    hertz = np.arange(size // 2 + 1) * SAMPLE_RATE / size
    response = np.zeros((count, len(hertz)))
    for j in range(4):
        response += 0.7**j / (1 + ((hertz[None] - formant[:count, j : j + 1]) / width[:count, j : j + 1]) ** 2)
    response *= (1 + hertz[None] / 500) ** -tilt[:count, None] * level[:count, None]
    pieces = np.fft.irfft(np.fft.rfft(source * np.hanning(2 * HOP + 1)[:-1], size) * response, size)
    sound = np.zeros(samples + 2 * size)
    for i in range(count):
        sound[i * HOP : i * HOP + size] += pieces[i]
    spectrum = np.fft.rfft(sound[HOP : HOP + samples])
    spectrum[int((3600, 3800, 7000, 11900)[random.randint(4)] * samples / SAMPLE_RATE) :] = 0
    sound = np.fft.irfft(spectrum, samples)
    sound *= 10 ** (random.uniform(-28, -14) / 20) / np.sqrt((sound**2).mean() + 1e-12)
    sound += noise[::-1] * 10 ** (random.uniform(-95, -50) / 20)
    return np.clip(sound, -1, 1)
