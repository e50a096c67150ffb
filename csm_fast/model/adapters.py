"""LoRA, DoRA and QLoRA: adapters beside frozen weights. PEFT makes the layers, bitsandbytes the 4-bit weights.

``attach`` turns a model into one whose adapters are trained. Names of the base's parameters gain ``base_layer`` (PEFT's
way), so a model with adapters is saved by ``adapter_files.save_adapter``, not by ``save_model``.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from csm_fast import ops
from csm_fast.config.train import AdapterSection
from csm_fast.model.nf4 import STACKS, quantize_stacks
from csm_fast.model.run_options import Attached, run_options_of
from csm_fast.model.stacks import model_config
from csm_fast.system.errors import InputError
from csm_fast.system.optional import load_peft

ATTN = ("q_proj", "k_proj", "v_proj", "output_proj", "w1", "w2", "w3")
SYNONYMS = {"o_proj": "output_proj", "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
HEADS = ("codebook0_head.weight", "audio_head")
TABLES = ("text_embeddings.weight", "audio_embeddings.weight")
ADAPTER = "default"  # PEFT's name of the one adapter

_HASH_PIECE = 1 << 24  # values hashed at once: 64 MiB in float32


def attach(
    model: Any,
    section: AdapterSection,
    *,
    compute_dtype: torch.dtype,
    base: str = "",
    base_hash: str | None = None,
    seed: int = 0,
    device: torch.device | None = None,
) -> Attached:
    """Put adapters on a model, in place, and freeze everything else that ``section`` does not train.

    Frozen weights are stored in ``compute_dtype``, RMS norms' scales in float32; for qlora the linear layers of both
    stacks in NF4. Adapters, heads and tables that are trained are float32. (For a float64 model and ``compute_dtype``,
    all of them are float64.) Train it under autocast to ``compute_dtype`` unless that is float32 or float64.

    Adapters start as zero: B is zero, A uniform within 1/sqrt(in), DoRA's magnitudes the norms of the stored rows.

    Args:
        model: ``CSM`` or any module with Sesame's tree, unquantised and without adapters.
        section: its ``method`` is lora, dora or qlora. ``train_embeddings="rows"`` is completed by
            ``embedding_rows.EmbeddingRows``, which knows the rows; here the tables stay frozen.
        compute_dtype: bfloat16, float16, float32; float64 for checks.
        base: what the weights are called: a hub id, or a path (made absolute), for messages and for loading them again.
        base_hash: their ``weights_hash``, where it is known; computed otherwise.
        seed: of A's values, which depend on nothing else than it and the shapes.
        device: where the model goes next, if that is not where it is: 4-bit weights are made there. The rest of the
            model is left where it lies.

    Raises:
        InputError: a target that matches nothing or cannot have an adapter; PEFT or bitsandbytes are not installed.
    """
    if section.method == "full":
        raise ValueError("method full has no adapters")
    if run_options_of(model).adapter is not None:
        raise ValueError("the model has adapters already")
    if section.method == "qlora" and compute_dtype == torch.float64:
        raise ValueError("4-bit weights have no float64 form")
    section = dataclasses.replace(section, lora_alpha=section.alpha)
    targets = resolve_targets(model, section.target_modules)
    whole = _trained_whole(section, targets)
    peft = load_peft()
    shape = model_config(model)
    if base_hash is None:
        base_hash = weights_hash(model, hash_dtype(compute_dtype))
    if section.method == "qlora":
        quantize_stacks(model, compute_dtype, device)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if parameter.is_floating_point():
            keep = name in whole or name.endswith(".scale")
            parameter.data = parameter.data.to(ops.wide_dtype(compute_dtype) if keep else compute_dtype)
    _inject(peft, model, section, targets)
    _settle(model, targets, ops.wide_dtype(compute_dtype), seed)
    for name in whole:
        model.get_parameter(name).requires_grad_(True)
    if base and Path(base).expanduser().exists():
        base = str(Path(base).expanduser().resolve())
    attached = Attached(section, shape, base, base_hash, compute_dtype, targets, whole)
    model.adapter = attached
    if not hasattr(model, "embedding_rows"):  # no ``CSM``, which has declared it
        model.register_module("embedding_rows", None)
    return attached


def _inject(peft: Any, model: Any, section: AdapterSection, targets: tuple[str, ...]) -> None:
    config = peft.LoraConfig(
        r=section.lora_rank,
        lora_alpha=section.alpha,
        lora_dropout=section.lora_dropout,
        use_rslora=section.rslora,
        use_dora=section.method == "dora",
        target_modules=list(targets),
        bias="none",
    )
    if not config.use_dora:
        config._register_custom_module({nn.Linear: _lora_layer()})
    # PEFT would take a model's ``config`` for transformers'.
    ours = model.__dict__.pop("config", None)
    try:
        with torch.random.fork_rng(devices=[]):  # its draws are replaced
            peft.inject_adapter_in_model(config, model, ADAPTER)
    finally:
        if ours is not None:
            model.config = ours
    del model.peft_config  # it says less than Attached
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert adapted == set(targets), f"PEFT chose other layers: {sorted(adapted ^ set(targets))[:3]}"


@functools.cache
def _dora_layer() -> type:
    """The class of DoRA's magnitudes; made on first use, as PEFT is imported no sooner."""
    dora = importlib.import_module("peft.tuners.lora.dora")

    class Dora(dora.DoraLinearLayer):  # type: ignore[name-defined]
        """PEFT's magnitudes of a linear layer, with a forward that torch.compile can follow, that multiplies B A as
        matrices and not by passing the identity through both, and that keeps their norm in float32."""

        def __init__(self, magnitude: Tensor):
            super().__init__(fan_in_fan_out=False)
            self.weight = nn.Parameter(magnitude)

        def forward(
            self,
            x: Tensor,
            *,
            lora_A: nn.Linear,
            lora_B: nn.Linear,
            scaling: float,
            base_layer: nn.Linear,
            base_result: Tensor | None = None,
            adapter_name: str = ADAPTER,
        ) -> Tensor:
            """What DoRA adds to the base layer's output for the input ``x`` [..., in]; [..., out].

            ``base_result``: the base layer's output, where it has seen the same ``x``; with dropout it has not.
            """
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                norm = torch.linalg.norm(base_layer.weight + scaling * (lora_B.weight @ lora_A.weight), dim=1)
            scale = self.weight / norm
            base_result = base_layer(x) if base_result is None else base_result
            return (scale - 1) * base_result + scale * scaling * lora_B(lora_A(x))

    return Dora


@functools.cache
def _lora_layer() -> type:
    """The class of LoRA layers; made on first use, as PEFT is imported no sooner."""
    lora = importlib.import_module("peft.tuners.lora.layer")

    class Lora(lora.Linear):  # type: ignore[name-defined]
        """PEFT's layer, with a forward of its own where one adapter is added to the base.

        The scale enters between A and B, on [rows, rank]. PEFT scales [rows, out], and so the gradient: one more tensor
        of that size beside the base's. Where nothing is compiled, B's product adds to the base's result: one result
        instead of four.
        """

        fuses_on_cpu = True  # see ``layer_cpu``

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            """[..., in] -> [..., out]."""
            names, autocast = self.active_adapters, torch.is_autocast_enabled(x.device.type)
            plain = not (args or kwargs or self.disable_adapters or self.merged) and len(names) == 1
            plain = plain and names[0] in self.lora_A and not getattr(self, "lora_variant", None) and x.dim() > 1
            if not plain or not (autocast or x.dtype == self.lora_A[names[0]].weight.dtype):
                return super().forward(x, *args, **kwargs)
            (name,) = names
            result = self.base_layer(x)
            low = self.lora_A[name](self.lora_dropout[name](x)) * self.scaling[name]
            # Compiled, the sum goes into what comes next; it would be read and written twice more here.
            if torch.compiler.is_compiling() or not (autocast or low.dtype == result.dtype):
                return result + self.lora_B[name](low).to(result.dtype)
            b = self.lora_B[name].weight
            return torch.addmm(result.flatten(0, -2), low.flatten(0, -2), b.t()).view(result.shape)

    return Lora


def _settle(model: Any, targets: tuple[str, ...], dtype: torch.dtype, seed: int) -> None:
    """Dtypes and first values of the adapters; PEFT leaves them in the base's dtype, rounded."""
    generator = torch.Generator().manual_seed(seed)
    for name in targets:
        layer = model.get_submodule(name)
        a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        bound = a.shape[1] ** -0.5
        values = torch.empty(a.shape).uniform_(-bound, bound, generator=generator)
        a.data = values.to(device=a.device, dtype=dtype)
        b.data = torch.zeros_like(b, dtype=dtype)
        if ADAPTER in layer.lora_magnitude_vector:
            norm = torch.linalg.norm(layer.base_layer.weight.detach().to(dtype), dim=1)
            layer.lora_magnitude_vector[ADAPTER] = _dora_layer()(norm)
        if name.partition(".")[0] not in STACKS:
            # The loss reads codebook0_head as one matrix, where an input's dropout has no place.
            layer.lora_dropout[ADAPTER] = nn.Identity()
        for parameter_name, parameter in layer.named_parameters():
            parameter.requires_grad_("lora_" in parameter_name)


def resolve_targets(model: Any, words: list[str]) -> tuple[str, ...]:
    """Names of the linear layers that ``--target-modules`` means, sorted.

    Args:
        words: ``attn``, ``projection``, ``codebook0_head``, or suffixes or full names of linear layers; the layer
            names of transformers and csm-mlx (o_proj, gate_proj, self_attn, ...) are taken too.

    Raises:
        InputError: a word that matches nothing, or the bare parameter audio_head.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found: set[str] = set()
    for word in words:
        if word == "audio_head":
            raise InputError(
                "--target-modules audio_head: it is a parameter, not a layer, so it has no adapter",
                mend="train it whole with --train-heads",
            )
        if word == "attn":
            some = [n for n in names if n.startswith(tuple(f"{s}." for s in STACKS)) and n.rpartition(".")[2] in ATTN]
        else:
            front, _, leaf = word.replace("self_attn.", "attn.").rpartition(".")
            suffix = f"{front}.{SYNONYMS.get(leaf, leaf)}".lstrip(".")
            some = [n for n in names if n == suffix or n.endswith("." + suffix)]
        if not some:
            leaves = sorted({n.rpartition(".")[2] for n in names})
            more = ", or --train-embeddings" if "embedding" in word else ""
            raise InputError(
                f"--target-modules {word} matches no linear layer",
                mend=f"choose among attn, {', '.join(leaves)}, or a full name such as {names[0]}{more}",
            )
        found.update(some)
    return tuple(sorted(found))


def _trained_whole(section: AdapterSection, targets: tuple[str, ...]) -> tuple[str, ...]:
    if section.train_heads and "codebook0_head" in targets:
        raise InputError(
            "codebook0_head would get an adapter and be trained whole",
            mend="leave out --train-heads, or codebook0_head among --target-modules",
        )
    return (HEADS if section.train_heads else ()) + (TABLES if section.train_embeddings == "all" else ())


@contextmanager
def silenced(model: Any) -> Iterator[None]:
    """Within it, LoRA adapters add nothing. (DoRA's magnitudes would stay, so it has no such state.)"""
    layers = [model.get_submodule(name) for name in model.adapter.targets]
    scales = [layer.scaling[ADAPTER] for layer in layers]
    try:
        for layer in layers:
            layer.scaling[ADAPTER] = 0.0
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scaling[ADAPTER] = scale


# ------------------------------------------------------------------------------------------------ identity of a base


def hash_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """What values are rounded to for ``weights_hash``: bf16, or fp16 where the base was kept in that."""
    return torch.float16 if compute_dtype == torch.float16 else torch.bfloat16


def weights_hash(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> str:
    """SHA-256 (64 hexadecimal digits) of a model's parameters: names, shapes, and values rounded to ``dtype``.

    So the float32 and the bf16 file of one model have one hash. Pieces of a fixed size are hashed by several threads;
    no more than a few of them exist at once.
    """
    parameters = sorted(
        ((n.replace("_orig_mod.", ""), p.detach()) for n, p in model.named_parameters()), key=lambda x: x[0]
    )
    pieces = [piece for _, p in parameters for piece in p.reshape(-1).split(_HASH_PIECE)]
    with ThreadPoolExecutor(max_workers=4) as pool:
        digests = pool.map(functools.partial(_digest, dtype), pieces)
        total = hashlib.sha256()
        for name, parameter in parameters:
            total.update(f"{name} {list(parameter.shape)}\n".encode())
            for _ in range(-(-parameter.numel() // _HASH_PIECE)):
                total.update(next(digests))
    return total.hexdigest()


def _digest(dtype: torch.dtype, piece: Tensor) -> bytes:
    return hashlib.sha256(piece.to(dtype).cpu().contiguous().view(torch.uint8).numpy().data).digest()
