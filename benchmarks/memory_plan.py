"""The planner's predicted peak memory against the bytes that real training steps ask for.

    python -m benchmarks.memory_plan --results benchmarks/results/memory_plan.jsonl
    python -m benchmarks.memory_plan --device cuda --results benchmarks/results/gpu_memory_plan.jsonl

Each case builds a model as the trainer does, takes one optimizer step so that the optimizer's state is there, and
follows a second one with ``benchmarks.common.tracked``: exact bytes of tensors, not resident memory. What was made
before the step (weights, moments) is counted from its storages and added. The weights
are random and the packs synthetic: ragged segments of 50 to 300 rows, four fifths of them audio.

``peak`` is all of it; ``step`` what the step adds to what is there before. The second is the harder figure to
predict, because most of a peak may be weights and moments, which are known.

On a GPU all cases are csm-1b itself, compiled as the trainer does, and the figures are the caching allocator's
(``torch.cuda.max_memory_allocated``), with what libraries take from it as work space.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.record import append, environment
from benchmarks.common.tracked import Tracked
from csm_fast import CSM, CSMConfig
from csm_fast.config.parse import build
from csm_fast.config.train import TrainConfig
from csm_fast.model.compile import compile_layers
from csm_fast.model.loss import packed_loss
from csm_fast.packing.layout import StepBatch
from csm_fast.packing.pack import Pack, pack_padded
from csm_fast.planner.estimate import estimate
from csm_fast.train.optim.build import cast_weights
from csm_fast.train.step import Update

METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "full-bf16": {"weights": "bf16-stochastic", "optimizer": "adamw-8bit"},
    "full-bf16-kahan": {"weights": "bf16-kahan"},
    "lora": {"method": "lora"},
    "dora": {"method": "dora"},
    "qlora": {"method": "qlora"},
}
CHECKPOINTING = ("off", "selective", "full")
AUDIO_SHARE = 0.8


def with_layers(shape: CSMConfig, backbone: int, decoder: int) -> CSMConfig:
    """The shape with fewer layers of the same widths."""
    return replace(
        shape,
        backbone=replace(shape.backbone, num_layers=backbone),
        decoder=replace(shape.decoder, num_layers=decoder),
    )


def quick_model(shape: CSMConfig, device: str = "cpu") -> CSM:
    """Random weights that repeat: how much memory a step takes does not depend on them."""
    with torch.device("meta"):
        model = CSM(shape)
    model = model.to_empty(device=device)
    block = (torch.randn(2**18, generator=torch.Generator().manual_seed(0)) * 0.02).to(device)
    with torch.no_grad():
        for p in model.parameters():
            for piece in p.view(-1).split(len(block)):
                piece.copy_(block[: len(piece)])
            if p.dim() == 1:
                p.fill_(1)
    return model


def make_pack(shape: CSMConfig, rows: int, fraction: float, seed: int = 0) -> Pack:
    """A pack of ragged conversations, each of text rows and then audio rows."""
    generator = torch.Generator().manual_seed(seed)
    lengths: list[int] = []
    while (left := rows - sum(lengths)) > 0:
        drawn = int(torch.randint(50, 301, (), generator=generator))
        lengths.append(left if left - drawn < 50 else drawn)
    codebooks = shape.num_codebooks
    tokens = torch.zeros(len(lengths), max(lengths), codebooks + 1, dtype=torch.int32)
    mask = torch.zeros(tokens.shape, dtype=torch.bool)
    for i, length in enumerate(lengths):
        text = length - round(length * AUDIO_SHARE)
        tokens[i, :text, -1] = torch.randint(shape.text_vocab_size, (text,), generator=generator, dtype=torch.int32)
        codes = (length - text, codebooks)
        tokens[i, text:length, :-1] = torch.randint(
            shape.audio_vocab_size, codes, generator=generator, dtype=torch.int32
        )
        mask[i, :text, -1] = mask[i, text:length, :-1] = True
    torch.manual_seed(seed)
    return pack_padded(tokens, mask, fraction)


def settings(method: str, checkpointing: str, device: str = "cpu", **more: Any) -> TrainConfig:
    values = {"activation_checkpointing": checkpointing, "precision": "bf16", "device": device}
    values["compile"] = "off" if device == "cpu" else "auto"
    return build(TrainConfig, {**values, **METHODS[method], **more})


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of their storages, each counted once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def measure(shape: CSMConfig, config: TrainConfig, rows: int, packs: int = 1) -> dict[str, Any]:
    """Predicted and measured bytes of one step, on ``config``'s device: ``peak`` with, ``step`` without what is there
    before it."""
    device = torch.device(config.run.device)
    model: Any = quick_model(shape, device.type)
    if config.adapter.method == "full":
        cast_weights(model, config.optimizer)
    else:
        from csm_fast.model.adapters import attach

        dtype = torch.float32 if config.model.precision == "fp32" else torch.bfloat16
        attach(model, config.adapter, compute_dtype=dtype, base_hash="not asked for", device=device)
    for part in config.model.freeze:
        getattr(model, part).requires_grad_(False)
    model.activation_checkpointing = config.model.activation_checkpointing
    model.train()
    compile_layers(model, config.model.compile)
    update = Update(model, config.optimizer, device, config.model.precision, partial(packed_loss, a=0.5, b=0.5), 10, 0)
    pack = make_pack(shape, rows, config.loss.amortization_fraction)
    batch = StepBatch([pack] * packs, 0, 0)
    update(batch, 0)
    gc.collect()
    said = estimate(
        shape,
        config,
        rows=len(pack.tokens),
        targets=len(pack.target_rows),
        decoder_frames=len(pack.decoder_index),
        device=device.type,
        packs=packs,
    )
    there, step = (_on_cuda if device.type == "cuda" else _tracked)(model, update, batch)
    return {
        "rows": len(pack.tokens),
        "packs": packs,
        "measured": there + step,
        "predicted": said.peak,
        "measured_step": step,
        "predicted_step": said.peak - said.before,
        "measured_before": there,
        "predicted_before": said.before,
        "moment": said.moment,
        "components": said.components,
    }


def _on_cuda(model: Any, update: Update, batch: StepBatch) -> tuple[int, int]:
    """Bytes that are there before a step, and those that it adds at most."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    there = torch.cuda.memory_allocated()
    update(batch, 1)
    torch.cuda.synchronize()
    return there, torch.cuda.max_memory_allocated() - there


def _tracked(model: Any, update: Update, batch: StepBatch) -> tuple[int, int]:
    quantised = [p.quant_state for p in model.parameters() if hasattr(p, "quant_state")]
    scales = [t for q in quantised for t in (q.absmax, q.code, q.offset, q.state2.absmax, q.state2.code)]
    state = [t for values in update.optimizer.state.values() for t in values.values() if isinstance(t, Tensor)]
    there = sum(map(_bytes, ([*model.parameters(), *scales], state)))
    with Tracked() as tracked:
        update(batch, 1)
    return there, tracked.peak + _bytes(t for t in batch.packs[0] if isinstance(t, Tensor))


def cases() -> list[tuple[str, CSMConfig, str, str, int, dict[str, Any]]]:
    """(name of the shape, shape, method, checkpointing, rows, other settings)."""
    small, one = CSMConfig.small(), CSMConfig.csm_1b()
    found: list[tuple[str, CSMConfig, str, str, int, dict[str, Any]]] = [
        ("small", small, method, checkpointing, rows, {})
        for method in ("full", "full-bf16", "lora", "qlora")
        for checkpointing in CHECKPOINTING
        for rows in (512, 2048)
    ]
    found += [("small", small, "dora", checkpointing, 2048, {}) for checkpointing in ("off", "full")]
    at_once = {"optimizer_in_backward": True, "max_grad_norm": 0.0}
    found += [
        ("small", small, "full-bf16-kahan", "full", 2048, {}),
        ("small", small, "full", "full", 2048, at_once),
        ("small", small, "full-bf16", "full", 2048, at_once),
        ("small", small, "full", "off", 2048, {"precision": "fp32"}),
        ("small", small, "lora", "full", 2048, {"train_heads": True, "train_embeddings": "all"}),
        ("small", small, "full", "off", 512, {"freeze": ["backbone", "text_embeddings", "audio_embeddings"]}),
        ("small", small, "full", "off", 2048, {"amortization_fraction": 1.0}),
    ]
    wide = with_layers(one, 2, 1)
    found += [
        ("csm-1b, 2 + 1 layers", wide, "full-bf16", "full", 2048, {}),
        ("csm-1b, 2 + 1 layers", wide, "full", "selective", 2048, {"freeze": ["text_embeddings"]}),
        ("csm-1b, 4 + 2 layers", with_layers(one, 4, 2), "lora", "full", 2048, {}),
        ("csm-1b, 4 + 2 layers", with_layers(one, 4, 2), "qlora", "full", 2048, {}),
        ("csm-1b, 4 + 2 layers", with_layers(one, 4, 2), "qlora", "off", 2048, {}),
    ]
    return found


def cuda_cases() -> list[tuple[str, CSMConfig, str, str, int, dict[str, Any]]]:
    one = CSMConfig.csm_1b()
    found: list[tuple[str, CSMConfig, str, str, int, dict[str, Any]]] = [
        ("csm-1b", one, method, checkpointing, 4096, {})
        for method in ("full", "full-bf16", "lora", "qlora")
        for checkpointing in CHECKPOINTING
    ]
    return [*found, *(("csm-1b", one, "full-bf16", checkpointing, 16384, {}) for checkpointing in ("off", "selective"))]


def line(name: str, method: str, checkpointing: str, more: dict[str, Any], figures: dict[str, Any]) -> str:
    what = " ".join(f"{k}={v}" for k, v in more.items())
    errors = [figures["predicted" + s] / figures["measured" + s] - 1 for s in ("", "_step")]
    return (
        f"{name:21} {method:10} {checkpointing:9} {figures['rows']:5}  {figures['measured'] / 2**20:8.1f} "
        f"{figures['predicted'] / 2**20:8.1f} {errors[0]:+7.1%}  "
        f"{figures['measured_step'] / 2**20:8.1f} {errors[1]:+7.1%}  {figures['moment']} {what}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose line holds this text")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--results", type=Path, help="append the figures to this .jsonl")
    args = parser.parse_args()
    print("MiB                                               measured predicted   error  step only   error  peak at")
    worst = 0.0
    for name, shape, method, checkpointing, rows, more in cases() if args.device == "cpu" else cuda_cases():
        if args.only not in f"{name} {method} {checkpointing} {rows} {more}":
            continue
        figures = measure(shape, settings(method, checkpointing, args.device, **more), rows)
        gc.collect()
        print(line(name, method, checkpointing, more, figures), flush=True)
        worst = max(worst, abs(figures["predicted"] / figures["measured"] - 1))
        if args.results:
            row = {"shape": name, "method": method, "checkpointing": checkpointing, "settings": more, **figures}
            append(args.results, {"benchmark": "memory_plan", **row, **environment()})
    print(f"largest error of a peak: {worst:.1%}")
    return 0 if worst <= 0.1 else 1


if __name__ == "__main__":
    sys.exit(main())
