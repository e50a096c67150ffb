"""Checkpoints in and out: Sesame's names on disk; transformers' and csm-mlx' names understood.

One tensor is converted at a time, so loading needs little more memory than the model itself.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from csm_fast.config.shape import NAMED_SHAPES, CSMConfig
from csm_fast.model.csm import CSM, parameter_shapes
from csm_fast.model.stacks import model_config
from csm_fast.system.errors import InputError
from csm_fast.system.files import read_json, write_bytes, writing_to
from csm_fast.system.tensors import Entry, read_entries, write_tensors
from csm_fast.weights.config_json import config_from_json, sesame_config, transformers_config
from csm_fast.weights.files import is_adapter, locate, shards

__all__ = [
    "load_model",
    "model_config",
    "save_model",
    "sesame_config",
    "sesame_to_transformers",
    "transformers_config",
    "transformers_to_sesame",
]

LAYER = {  # transformers and csm-mlx -> Sesame, within a layer
    "self_attn.q_proj.weight": "attn.q_proj.weight",
    "self_attn.k_proj.weight": "attn.k_proj.weight",
    "self_attn.v_proj.weight": "attn.v_proj.weight",
    "self_attn.o_proj.weight": "attn.output_proj.weight",
    "mlp.gate_proj.weight": "mlp.w1.weight",
    "mlp.down_proj.weight": "mlp.w2.weight",
    "mlp.up_proj.weight": "mlp.w3.weight",
    "input_layernorm.weight": "sa_norm.scale",
    "post_attention_layernorm.weight": "mlp_norm.scale",
}
_TRANSFORMERS = {
    "embed_text_tokens.weight": "text_embeddings.weight",
    "backbone_model.embed_tokens.embed_audio_tokens.weight": "audio_embeddings.weight",
    "depth_decoder.model.embed_tokens.weight": "audio_embeddings.weight",
    "depth_decoder.model.inputs_embeds_projector.weight": "projection.weight",
    "lm_head.weight": "codebook0_head.weight",
    "depth_decoder.codebooks_head.weight": "audio_head",
    "backbone_model.norm.weight": "backbone.norm.scale",
    "depth_decoder.model.norm.weight": "decoder.norm.scale",
}
_TRANSFORMERS_DRAFT = {  # the names of the pull request that brought CSM to transformers
    "backbone_model.embed_tokens.embed_text_tokens.weight": "text_embeddings.weight",
    "depth_decoder.model.embed_tokens.embed_audio_tokens.weight": "audio_embeddings.weight",
}
_CSM_MLX = {"backbone.norm.weight": "backbone.norm.scale", "decoder.norm.weight": "decoder.norm.scale"}
_STACKS = {"backbone_model": "backbone", "depth_decoder.model": "decoder", "backbone": "backbone", "decoder": "decoder"}
# Not parameters: the codec beside the model, and buffers that generation or old releases leave behind.
_IGNORED = re.compile(
    r"codec_model\.|(backbone|decoder)_causal_mask$|.*\.audio_tokens_offsets$|.*\.rotary_emb\.\w*inv_freq$"
)


def naming(names: Iterable[str]) -> str:
    """Whose parameter names these are: "transformers", "csm-mlx" or "sesame"."""
    names = list(names)
    if any(n.startswith(("backbone_model.", "depth_decoder.")) for n in names):
        return "transformers"
    return "csm-mlx" if any(".self_attn." in n for n in names) else "sesame"


def sesame_name(name: str, style: str) -> str | None:
    """A parameter's name in Sesame's tree; None for what is deliberately ignored. Unknown names come back as is."""
    if _IGNORED.match(name):
        return None
    if style == "sesame":
        return name
    if match := re.fullmatch(r"(.+)\.layers\.(\d+)\.(.+)", name):
        stack, index, leaf = match.groups()
        if stack in _STACKS and leaf in LAYER:
            return f"{_STACKS[stack]}.layers.{index}.{LAYER[leaf]}"
        return name
    return (_CSM_MLX if style == "csm-mlx" else _TRANSFORMERS | _TRANSFORMERS_DRAFT).get(name, name)


def rotated_heads(name: str, config: CSMConfig) -> int | None:
    """Heads of a query or key projection (Sesame's name), whose rows depend on the rotary convention; else None."""
    stack = config.backbone if name.startswith("backbone.") else config.decoder
    if name.endswith(".attn.q_proj.weight"):
        return stack.num_heads
    return stack.num_kv_heads if name.endswith(".attn.k_proj.weight") else None


def interleave_rows(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head from transformers' order (all even dimensions, then all odd) to Sesame's (pairs)."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def split_rows(weight: Tensor, heads: int) -> Tensor:
    """The inverse of ``interleave_rows``."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)


def transformers_to_sesame(state: Mapping[str, Tensor], config: CSMConfig) -> dict[str, Tensor]:
    """Weights of transformers' ``CsmForConditionalGeneration`` under Sesame's names and rotary convention.

    The codec's weights and buffers are left out. Every parameter of ``config`` must be there, nothing else may be.

    Raises:
        InputError: missing or unexpected names, wrong shapes, or untied audio embeddings.
    """
    plan = _Plan([Entry(name, t.shape, "F32", partial(_same, t)) for name, t in state.items()], "transformers weights")
    plan.account(config)
    return {name: plan.read(name, config) for name in plan.sources}


def _same(tensor: Tensor) -> Tensor:
    return tensor


def sesame_to_transformers(state: Mapping[str, Tensor], config: CSMConfig) -> dict[str, Tensor]:
    """Sesame's weights under transformers' names and rotary convention.

    The audio embedding appears under both of its tied names (the same tensor object): a file that lacks the
    backbone's one is silently randomised by some releases of transformers 5.
    """
    top: dict[str, list[str]] = {}
    for theirs, ours in _TRANSFORMERS.items():
        top.setdefault(ours, []).append(theirs)
    layer = {ours: theirs for theirs, ours in LAYER.items()}
    prefix = {"backbone": "backbone_model", "decoder": "depth_decoder.model"}
    result = {}
    for name, tensor in state.items():
        if _IGNORED.match(name):
            continue
        if match := re.fullmatch(r"(backbone|decoder)\.layers\.(\d+)\.(.+)", name):
            stack, index, leaf = match.groups()
            if heads := rotated_heads(name, config):
                tensor = split_rows(tensor, heads)
            result[f"{prefix[stack]}.layers.{index}.{layer[leaf]}"] = tensor
        else:
            for theirs in top[name]:
                result[theirs] = tensor
    return result


# -------------------------------------------------------------------------------------------------------- loading


class _Plan:
    """Which tensors of a checkpoint make up which parameters."""

    def __init__(self, entries: list[Entry], where: str | os.PathLike[str]):
        self.where = where
        self.style = naming(entry.name for entry in entries)
        self.sources: dict[str, list[Entry]] = {}
        for entry in entries:
            name = sesame_name(entry.name, self.style)
            if name is not None:
                self.sources.setdefault(name, []).append(entry)

    def account(self, config: CSMConfig) -> None:
        """Compare names, shapes and dtypes with what ``config`` needs; one InputError for all differences."""
        expected = parameter_shapes(config)
        wrong = [f"{e.name} is unexpected" for n, entries in self.sources.items() if n not in expected for e in entries]
        for name, shape in expected.items():
            if name not in self.sources:
                wrong.append(f"{name} is missing")
            for entry in self.sources.get(name, ()):
                if tuple(entry.shape) != shape:
                    wrong.append(f"{entry.name} is {list(entry.shape)} instead of {list(shape)}")
                elif entry.dtype not in ("F64", "F32", "F16", "BF16"):
                    wrong.append(f"{entry.name} is {entry.dtype}, not a float")
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise InputError(
                f"{len(wrong)} of the tensors do not fit this CSM: {', '.join(wrong[:3])}{more}",
                file=self.where,
                mend="give a complete CSM checkpoint with its own config.json",
            )

    def read(self, name: str, config: CSMConfig) -> Tensor:
        """A parameter in Sesame's convention. May alias what the entry's ``read`` returned."""
        first, *others = self.sources[name]
        tensor = first.read()
        if any(not torch.equal(tensor, other.read()) for other in others):
            raise InputError(
                f"{first.name} and {others[0].name} differ, but CSM has one audio embedding",
                file=self.where,
                mend="some releases of transformers 5 left the backbone's copy random when loading; export the model "
                "again with a release that ties them",
            )
        heads = rotated_heads(name, config) if self.style == "transformers" else None
        return interleave_rows(tensor, heads) if heads else tensor


def load_model(
    name_or_path: str | os.PathLike[str],
    *,
    device: Any = "cpu",
    dtype: torch.dtype | Callable[[str], torch.dtype] | None = None,
) -> CSM:
    """Load a CSM from a hub id, a directory or a ``.safetensors`` file.

    A directory that holds an adapter gives the model that it names as its base, with the adapter merged in float32.

    The weights may be sharded (``*.safetensors.index.json``) and may carry Sesame's, transformers' or csm-mlx' names;
    which of them is read off the names. From the hub only config.json and one set of weights is fetched.

    Args:
        name_or_path: such as ``sesame/csm-1b``, ``run/best`` or ``model.safetensors``.
        device: where the parameters go, one at a time.
        dtype: of the parameters, or a function from a parameter's name (Sesame's) to it; None means float32, the dtype
            of master weights.

    Raises:
        InputError: nothing there, unreadable or truncated files, tensors that are missing, unexpected or of another
            shape, and a hub that does not answer. Nothing is half loaded.
    """
    if is_adapter(name_or_path):
        from csm_fast.commands.merge import load_merged

        model = load_merged(name_or_path)
        for name, parameter in model.named_parameters():
            kind = dtype(name) if callable(dtype) else dtype or torch.float32
            parameter.data = parameter.data.to(device=device, dtype=kind)
        return model
    file = locate(os.fspath(name_or_path))
    plan = _Plan([entry for part in shards(file) for entry in read_entries(file.with_name(part))], file)
    config = _read_config(file.with_name("config.json"), plan)
    plan.account(config)
    with torch.device("meta"):
        model = CSM(config)
    for name in plan.sources:
        # A copy in every case: the file may be replaced while the model lives.
        kind = dtype(name) if callable(dtype) else dtype or torch.float32
        tensor = plan.read(name, config).to(device=device, dtype=kind, copy=True)
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(tensor.contiguous()))
    return model


def _read_config(file: Path, plan: _Plan) -> CSMConfig:
    """The shape from the config.json beside the weights, or, where it says nothing, from the weights' shapes."""
    config = config_from_json(read_json(file), file) if file.is_file() else None
    if config is not None:
        return config
    shapes = {name: tuple(entries[0].shape) for name, entries in plan.sources.items()}
    for make in NAMED_SHAPES.values():
        if shapes == parameter_shapes(make()):
            return make()
    raise InputError(
        "cannot tell the model's shape: no config.json of a CSM lies beside the weights, and they are not of the "
        f"known shapes ({', '.join(NAMED_SHAPES)})",
        file=plan.where,
        mend="put the config.json that came with the weights into the same directory",
    )


# --------------------------------------------------------------------------------------------------------- saving


def save_model(model: nn.Module, directory: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> None:
    """Write ``model.safetensors`` (Sesame's names) and ``config.json`` into ``directory``, made if need be.

    Sesame's own ``Model.from_pretrained(directory)`` reads them, and so does ``load_model``. Tensors go to disk one
    by one. Both files are fsynced and replace older ones only when they are complete.

    Args:
        model: ``CSM`` or any module with Sesame's tree; buffers are not saved.
        dtype: of the file; None keeps each parameter's own.

    Raises:
        InputError: no space, or no permission to write.
        ValueError: the module's parameters are not those of Sesame's tree.
    """
    config, directory = model_config(model), Path(directory)
    parameters = {n.replace("_orig_mod.", ""): p.detach() for n, p in model.named_parameters()}
    if odd := sorted(parameters.keys() ^ parameter_shapes(config).keys()):
        raise ValueError(f"not the parameters of a CSM: {', '.join(odd[:3])} ({len(odd)} in all)")
    with writing_to(directory):
        directory.mkdir(parents=True, exist_ok=True)
        temporary = directory / "model.safetensors.tmp"
        try:
            write_tensors(temporary, parameters, dtype)
            os.replace(temporary, directory / "model.safetensors")
        finally:
            temporary.unlink(missing_ok=True)
        write_bytes(directory / "config.json", (json.dumps(sesame_config(config), indent=2) + "\n").encode())
