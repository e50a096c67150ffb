"""Mimi's weights under transformers' or moshi's names: find a file, read it, translate names, read the sizes.

Weights are kept under the *flat* names of transformers' Mimi checkpoints (``encoder.layers.0.conv.weight``). moshi's
names (``encoder.model.0.conv.conv.weight``) are translated to and from these, as transformers' public conversion script
for Mimi does, with its permutation: moshi rotates interleaved pairs of a head's channels, transformers its two halves.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csm_fast.system import hub
from csm_fast.system.errors import InputError
from csm_fast.system.files import read_json

if TYPE_CHECKING:
    import torch

MIMI_HUB = ("kyutai/mimi", "model.safetensors")
_HUB_SECONDS = 5.0
HEAD_DIM = 64  # of every published Mimi; the one size that cannot be read off the weights

# (moshi's spelling, flat spelling), applied in this order.
_FROM_MOSHI = [
    (re.compile(r"^(encoder|decoder)\.model\."), r"\1.layers."),
    (re.compile(r"\b(conv|convtr)(?:\.\1)+\."), "conv."),
    (re.compile(r"^(encoder|decoder)_transformer\.transformer\."), r"\1_transformer."),
    (re.compile(r"\.(?:out_projs\.0|out_proj)\.weight$"), ".o_proj.weight"),
    (re.compile(r"\.(?:in_projs\.0\.weight|in_proj\.weight|in_proj_weight)$"), ".in_proj.weight"),
    (re.compile(r"\.linear([12])\."), r".mlp.fc\1."),
    (re.compile(r"\.norm1\."), ".input_layernorm."),
    (re.compile(r"\.norm2\."), ".post_attention_layernorm."),
    (re.compile(r"\.layer_scale_1\."), ".self_attn_layer_scale."),
    (re.compile(r"\.layer_scale_2\."), ".mlp_layer_scale."),
    (re.compile(r"^quantizer\.rvq_first\.(?:vq\.)?"), "quantizer.semantic_residual_vector_quantizer."),
    (re.compile(r"^quantizer\.rvq_rest\.(?:vq\.)?"), "quantizer.acoustic_residual_vector_quantizer."),
    (re.compile(r"\._codebook\."), ".codebook."),
    (re.compile(r"\.codebook\.(?:_initialized|inited)$"), ".codebook.initialized"),
    (re.compile(r"\.codebook\.cluster_size$"), ".codebook.cluster_usage"),
    (re.compile(r"\.codebook\.(?:embedding_sum|embed_avg)$"), ".codebook.embed_sum"),
]
# transformers nests the two halves inside the model since 5.2x; its files stay flat.
_FROM_NESTED = [
    (re.compile(r"^(encoder|decoder)\.\1_seanet\."), r"\1."),
    (re.compile(r"^(encoder|decoder)\.(\1_transformer|downsample|upsample)\."), r"\2."),
]
_SEMANTIC = "quantizer.semantic_residual_vector_quantizer."
_ACOUSTIC = "quantizer.acoustic_residual_vector_quantizer."


def flat_name(name: str) -> str:
    """The flat name of a weight, from moshi's name, the name inside a transformers model, or the flat name.

    moshi's fused attention input becomes ``...self_attn.in_proj.weight``, which flat files do not have.
    """
    rules = _FROM_NESTED if re.match(r"(encoder|decoder)\.(?!layers|model)", name) else _FROM_MOSHI
    for pattern, replacement in rules:
        name = pattern.sub(replacement, name)
    return name


def read_weights(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors under flat names, float32 on the CPU; the file's metadata) from a safetensors file of either naming.

    Raises:
        InputError: a missing or damaged file, or another model's.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), framework="pt", device="cpu") as file:
            metadata = dict(file.metadata() or {})
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError:
        raise InputError("no such codec file", file=path, mend="check the path") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"not a readable safetensors file ({error})", file=path, mend="download or copy the codec's weights again"
        ) from None
    state = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    if any(re.match(r"(encoder|decoder)\.model\.", name) for name in state):
        state = from_moshi(state)
    if "encoder.layers.0.conv.weight" not in state or "downsample.conv.weight" not in state:
        raise InputError(
            "holds no Mimi codec: neither transformers' nor moshi's weight names are in it",
            file=path,
            mend="give kyutai/mimi's model.safetensors or moshi's tokenizer-*.safetensors",
        )
    return state, metadata


def from_moshi(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Flat weights from moshi's; the fused [3 D, D] attention input is split and permuted for half-split RoPE."""
    flat = {}
    for name, value in state.items():
        name = flat_name(name)
        if not name.endswith(".in_proj.weight"):
            flat[name] = value
            continue
        prefix = name[: -len("in_proj.weight")]
        query, key, value = value.chunk(3)
        flat[prefix + "q_proj.weight"] = _permute(query, (query.shape[0] // HEAD_DIM, HEAD_DIM // 2, 2))
        flat[prefix + "k_proj.weight"] = _permute(key, (key.shape[0] // HEAD_DIM, HEAD_DIM // 2, 2))
        flat[prefix + "v_proj.weight"] = value.contiguous()
    return flat


def load_module(flat: Mapping[str, torch.Tensor], module: torch.nn.Module) -> None:
    """Load flat weights into transformers' or moshi's Mimi, and check every name and shape.

    Raises:
        InputError: a weight is missing, left over or of another shape. A codebook's ``initialized``, which only
            training uses, may be missing.
    """
    import torch

    remaining, loaded = set(flat), {}
    for name, target in module.state_dict().items():
        key = flat_name(name)
        if key.endswith(".in_proj.weight"):
            parts = [key.replace("in_proj", part) for part in ("q_proj", "k_proj", "v_proj")]
            if not set(parts) <= set(flat):
                raise _lacking(parts[0])
            query, attention_key, value = (flat[part] for part in parts)
            tensor = torch.cat([interleave_pairs(query), interleave_pairs(attention_key), value])
            remaining -= set(parts)
        elif key in flat:
            tensor = flat[key]
            remaining.discard(key)
        elif key.endswith(".initialized"):
            tensor = torch.ones_like(target)
        else:
            raise _lacking(key)
        _check_shape(key, tensor, target.shape)
        loaded[name] = tensor
    _check_all_used(remaining)
    module.load_state_dict(loaded)


def check_shapes(flat: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises InputError as ``load_module`` does, if the weights' names and shapes are not ``shapes``."""
    for name, shape in shapes.items():
        if name in flat:
            _check_shape(name, flat[name], shape)
        elif not name.endswith(".initialized"):
            raise _lacking(name)
    _check_all_used(set(flat) - set(shapes))


def _lacking(name: str) -> InputError:
    return InputError(f"the codec's weights lack {name}", mend="use a complete Mimi checkpoint")


def _check_shape(name: str, tensor: torch.Tensor, shape: Sequence[int]) -> None:
    if list(tensor.shape) != list(shape):
        raise InputError(
            f"{name} has shape {list(tensor.shape)}, the codec needs {list(shape)}",
            mend="use a Mimi checkpoint whose config.json belongs to it",
        )


def _check_all_used(remaining: set[str]) -> None:
    if remaining:
        raise InputError(
            f"{len(remaining)} weights are not Mimi's, the first is {min(remaining)}", mend="use a Mimi checkpoint"
        )


def interleave_pairs(weight: torch.Tensor) -> torch.Tensor:
    """A query or key projection [heads * 64, D] from transformers' layout to moshi's: rotated pairs side by side."""
    return _permute(weight, (weight.shape[0] // HEAD_DIM, 2, HEAD_DIM // 2))


def _permute(weight: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    """Reorder a projection's output channels: seen as ``shape``, the last two of its three axes are swapped."""
    return weight.reshape(*shape, -1).transpose(1, 2).reshape(weight.shape)


def codebook_tables(flat: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """The K codebook tables [V, D] float32, level by level: ``embed_sum / max(cluster_usage, 1e-5)``, as Mimi does."""
    tables = []
    for prefix in (_SEMANTIC, _ACOUSTIC):
        level = 0
        while f"{prefix}layers.{level}.codebook.embed_sum" in flat:
            book = f"{prefix}layers.{level}.codebook."
            usage = flat[book + "cluster_usage"].float().clamp(min=1e-5)
            tables.append(flat[book + "embed_sum"].float() / usage[:, None])
            level += 1
    return tables


def read_sizes(flat: Mapping[str, torch.Tensor], config_file: Path | None = None) -> dict[str, Any]:
    """Mimi's sizes as arguments of transformers' MimiConfig, from a config.json or else from the weights' shapes."""
    if config_file is not None:
        config = read_json(config_file)
        if config.get("model_type", "mimi") != "mimi":
            raise InputError("does not describe a Mimi codec", file=config_file, mend="give a Mimi checkpoint")
        return {key: value for key, value in config.items() if not key.startswith("_")}

    def size(name: str, axis: int = 0) -> int:
        if name not in flat:
            raise _lacking(name)
        return flat[name].shape[axis]

    def count(pattern: str) -> int:
        return sum(re.fullmatch(pattern, name) is not None for name in flat)

    hidden = size("downsample.conv.weight")
    heads = max(1, hidden // HEAD_DIM)
    return {
        "num_filters": size("encoder.layers.0.conv.weight"),
        "hidden_size": hidden,
        "num_hidden_layers": count(r"encoder_transformer\.layers\.\d+\.mlp\.fc1\.weight"),
        "intermediate_size": size("encoder_transformer.layers.0.mlp.fc1.weight"),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "upsample_groups": hidden // size("upsample.conv.weight", 1),
        "codebook_size": size(_SEMANTIC + "layers.0.codebook.embed_sum"),
        "codebook_dim": size(_SEMANTIC + "layers.0.codebook.embed_sum", 1),
        "vector_quantization_hidden_dimension": size(_SEMANTIC + "layers.0.codebook.embed_sum", 1),
        "num_quantizers": count(r"quantizer\..*\.codebook\.embed_sum"),
    }


def make_weights(make: Callable[[str, tuple[int, ...]], Any], module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Flat float32 weights for transformers' Mimi ``module``, each from the array of ``make(flat name, shape)``."""
    import torch

    shapes = {flat_name(name): tuple(value.shape) for name, value in module.state_dict().items()}
    return {name: torch.from_numpy(make(name, shape)).float().contiguous() for name, shape in shapes.items()}


def missing_library(library: str, error: ImportError) -> InputError:
    """The error for a library that cannot be imported, with the command that installs it."""
    # moshi pins an old torch. Its codec runs on newer ones, and needs few of its other requirements.
    install = "pip install --no-deps moshi einops sentencepiece" if library == "moshi" else "pip install transformers"
    return InputError(f"this codec needs {library}, which cannot be imported ({error})", mend=install)


def find_weights(source: str | os.PathLike[str] | None) -> tuple[str, Path, Path | None]:
    """(name for printing, weights file, config.json or None) of a file, a directory or a hub repository."""
    if source is None:
        return MIMI_HUB[0], get_hub_file(*MIMI_HUB), get_hub_file(MIMI_HUB[0], "config.json")
    path = Path(source).expanduser()
    if path.is_dir():
        found = [path / MIMI_HUB[1]] if (path / MIMI_HUB[1]).is_file() else sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            raise InputError(
                f"holds {len(found)} safetensors files", file=path, mend="name the codec's weights file itself"
            )
        path = found[0]
    if path.is_file():
        config = path.parent / "config.json"
        # A config.json beside moshi's file may be the language model's; only in transformers' layout it is Mimi's.
        return f"Mimi from {path.name}", path, config if path.name == MIMI_HUB[1] and config.is_file() else None
    name = os.fspath(source)
    if name.count("/") == 1 and not path.parent.is_dir():
        return name, get_hub_file(name, MIMI_HUB[1]), get_hub_file(name, "config.json")
    raise InputError("no such codec file or directory", file=name, mend="check the path")


def get_hub_file(repository: str, filename: str) -> Path:
    """A file from the hub's cache or the hub. Raises InputError, within seconds if the hub does not answer."""
    if (cached := hub.cached_file(repository, filename)) is not None:
        return cached
    way_out = "give a local copy with source=, or use the offline codec"
    if not hub.hub_answers(_HUB_SECONDS):
        raise InputError(f"{repository} is not in the local cache and the hub cannot be reached", mend=way_out)
    try:
        return hub.download_file(repository, filename)
    except hub.HubError as error:
        raise InputError(f"{repository}/{filename} cannot be downloaded ({error.reason})", mend=way_out) from None


def hash_tables(tables: list[torch.Tensor]) -> str:
    """SHA-256 of codebook tables [V, D], level by level, as little-endian float32."""
    import numpy as np

    digest = hashlib.sha256()
    for table in tables:
        digest.update(np.ascontiguousarray(table.detach().cpu().float().numpy(), dtype="<f4").tobytes())
    return digest.hexdigest()
