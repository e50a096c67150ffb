"""Names of tensors: Sesame's, transformers' and csm-mlx's. Loads nothing."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor

from csm_fast.config.shape import CSMConfig
from csm_fast.model.csm import parameter_shapes
from csm_fast.system.errors import InputError
from csm_fast.system.tensors import Entry

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


# Not parameters: the codec beside the model, and buffers of generation or of old releases.
_IGNORED = re.compile(
    r"codec_model\.|(backbone|decoder)_causal_mask$|.*\.audio_tokens_offsets$|.*\.rotary_emb\.\w*inv_freq$"
)


def detect_naming(names: Iterable[str]) -> str:
    """Whose parameter names these are: "transformers", "csm-mlx" or "sesame"."""
    names = list(names)
    if any(n.startswith(("backbone_model.", "depth_decoder.")) for n in names):
        return "transformers"
    return "csm-mlx" if any(".self_attn." in n for n in names) else "sesame"


def sesame_name(name: str, style: str) -> str | None:
    """A parameter's name in Sesame's tree; None for one of ``_IGNORED``. Unknown names are returned unchanged."""
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
    """Number of heads of a query or key projection (Sesame's name), whose rows depend on the rotary convention; None
    for other parameters."""
    stack = config.backbone if name.startswith("backbone.") else config.decoder
    if name.endswith(".attn.q_proj.weight"):
        return stack.num_heads
    return stack.num_kv_heads if name.endswith(".attn.k_proj.weight") else None


def interleave_rows(weight: Tensor, heads: int) -> Tensor:
    """Reorder each head's rows from transformers' order (all even dimensions, then all odd) to Sesame's (pairs)."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def split_rows(weight: Tensor, heads: int) -> Tensor:
    """The inverse of ``interleave_rows``."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)


def transformers_to_sesame(state: Mapping[str, Tensor], config: CSMConfig) -> dict[str, Tensor]:
    """Weights of transformers' ``CsmForConditionalGeneration`` with Sesame's names and rotary convention.

    The codec's weights and buffers are left out. The others must be exactly the parameters of ``config``.

    Raises:
        InputError: missing or unexpected names, wrong shapes, or untied audio embeddings.
    """
    names = NameMap(
        [Entry(name, t.shape, "F32", partial(_same, t)) for name, t in state.items()], "transformers weights"
    )
    names.check_parameters(config)
    return {name: names.read(name, config) for name in names.sources}


def _same(tensor: Tensor) -> Tensor:
    return tensor


def sesame_to_transformers(state: Mapping[str, Tensor], config: CSMConfig) -> dict[str, Tensor]:
    """Sesame's weights with transformers' names and rotary convention.

    The audio embedding appears under both of its tied names (the same tensor object): if a file lacks the backbone's
    name, some releases of transformers 5 silently use random values.
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


class NameMap:
    """Which tensors of a checkpoint belong to which parameter; of tied parameters, several do."""

    def __init__(self, entries: list[Entry], where: str | os.PathLike[str]):
        self.where = where
        self.style = detect_naming(entry.name for entry in entries)
        self.sources: dict[str, list[Entry]] = {}
        for entry in entries:
            name = sesame_name(entry.name, self.style)
            if name is not None:
                self.sources.setdefault(name, []).append(entry)

    def check_parameters(self, config: CSMConfig) -> None:
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
        """A parameter in Sesame's convention. May alias the tensor that the entry's ``read`` returned."""
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
