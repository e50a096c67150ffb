"""LoRA, DoRA and QLoRA: adapters beside frozen weights. PEFT makes the layers, bitsandbytes the 4-bit weights.

``attach`` puts adapters on a model. PEFT then adds ``base_layer`` to the names of the base's parameters, so
``adapter_files.save_adapter`` saves a model with adapters, not ``save_model``.
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
from csm_fast.config.targets import HEADS, STACKS, TABLES, match_target
from csm_fast.config.train import AdapterSection
from csm_fast.model.nf4 import quantize_stacks
from csm_fast.model.run_options import Attached, run_options_of
from csm_fast.model.stacks import model_config
from csm_fast.system.errors import InputError
from csm_fast.system.optional import load_peft

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
    """Put adapters on a model, in place, and freeze everything that ``section`` does not train.

    Frozen weights are stored in ``compute_dtype``, RMS norms' scales in float32; for qlora the linear layers of both
    stacks in NF4. Adapters, heads and tables that are trained are float32. (If ``compute_dtype`` is float64, all of
    them are float64.) Train under autocast to ``compute_dtype`` unless that is float32 or float64.

    Adapters start without effect: B is zero, A is uniform within 1/sqrt(in), DoRA's magnitudes are the norms of the
    stored rows.

    Args:
        model: ``CSM`` or any module with Sesame's tree, unquantised and without adapters.
        section: its ``method`` is lora, dora or qlora. With ``train_embeddings="rows"`` the tables stay frozen here;
            ``embedding_rows.EmbeddingRows``, which knows the rows, completes it.
        compute_dtype: bfloat16, float16 or float32; float64 for checks.
        base: name of the weights, a hub id or a path (made absolute), for messages and for loading them again.
        base_hash: their ``weights_hash``, if it is known; computed otherwise.
        seed: of A's values, which depend on the seed and the shapes only.
        device: where 4-bit weights are made, if the model goes to another device next. The rest of the model stays
            where it is.

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
        with torch.random.fork_rng(devices=[]):  # _settle replaces the values that PEFT draws
            peft.inject_adapter_in_model(config, model, ADAPTER)
    finally:
        if ours is not None:
            model.config = ours
    del model.peft_config  # Attached says the same and more
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert adapted == set(targets), f"PEFT chose other layers: {sorted(adapted ^ set(targets))[:3]}"


@functools.cache
def _dora_layer() -> type:
    """The class of DoRA's magnitudes; made on first use, because PEFT is imported only then."""
    dora = importlib.import_module("peft.tuners.lora.dora")

    class Dora(dora.DoraLinearLayer):  # type: ignore[name-defined]
        """PEFT's magnitudes of a linear layer, with another forward: torch.compile can trace it, it multiplies B A as
        matrices (PEFT passes an identity matrix through both), and it computes the norm in float32."""

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
            """What DoRA adds to the base layer's output for the input ``x`` [..., in]: [..., out].

            ``base_result``: the base layer's output for the same ``x``. With dropout that input was another one, and
            PEFT passes None.
            """
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                norm = torch.linalg.norm(base_layer.weight + scaling * (lora_B.weight @ lora_A.weight), dim=1)
            scale = self.weight / norm
            base_result = base_layer(x) if base_result is None else base_result
            return (scale - 1) * base_result + scale * scaling * lora_B(lora_A(x))

    return Dora


@functools.cache
def _lora_layer() -> type:
    """The class of LoRA layers; made on first use, because PEFT is imported only then."""
    lora = importlib.import_module("peft.tuners.lora.layer")

    class Lora(lora.Linear):  # type: ignore[name-defined]
        """PEFT's layer, with another forward for one adapter on its base.

        It scales between A and B, on [rows, rank]. PEFT scales [rows, out], and in the backward pass the gradient: one
        more tensor of that size. Uncompiled, one operation adds B's product to the base's result, so that one tensor of
        that size is written instead of four.
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
            # Compiled, the sum is fused with the next operation; addmm would read and write the result once more each.
            if torch.compiler.is_compiling() or not (autocast or low.dtype == result.dtype):
                return result + self.lora_B[name](low).to(result.dtype)
            b = self.lora_B[name].weight
            return torch.addmm(result.flatten(0, -2), low.flatten(0, -2), b.t()).view(result.shape)

    return Lora


def _settle(model: Any, targets: tuple[str, ...], dtype: torch.dtype, seed: int) -> None:
    """Set the dtypes and initial values of the adapters; PEFT makes them in the base's dtype, rounded."""
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
            # The loss uses codebook0_head as one matrix, to whose input no dropout can be applied.
            layer.lora_dropout[ADAPTER] = nn.Identity()
        for parameter_name, parameter in layer.named_parameters():
            parameter.requires_grad_("lora_" in parameter_name)


def resolve_targets(model: Any, words: list[str]) -> tuple[str, ...]:
    """Names of the linear layers that ``--target-modules`` means, sorted.

    Args:
        words: ``attn``, ``projection``, ``codebook0_head``, or suffixes or full names of linear layers, also with the
            names that transformers and csm-mlx give to layers (o_proj, gate_proj, self_attn, ...).

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
        some = match_target(word, names)
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
    """Within it, LoRA adapters add nothing. Not for DoRA, whose magnitudes would stay."""
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
    """The dtype that ``weights_hash`` rounds values to: bf16, or fp16 if the base was kept in fp16."""
    return torch.float16 if compute_dtype == torch.float16 else torch.bfloat16


def weights_hash(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> str:
    """SHA-256 (64 hexadecimal digits) of a model's parameters: names, shapes, and values rounded to ``dtype``, so that
    the float32 and the bf16 file of one model have one hash. Threads hash pieces of a fixed size, a few at a time."""
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
