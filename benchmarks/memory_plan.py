"""The planner's predicted peak memory against the bytes that real training steps ask for.

    python -m benchmarks.memory_plan --results benchmarks/results/memory_plan.jsonl
    python -m benchmarks.memory_plan --device cuda --results benchmarks/results/gpu_memory_plan.jsonl

Each case builds a model as the trainer does, takes one optimizer step, which makes the optimizer's state, and follows a
second one with ``benchmarks.common.tracked``: exact bytes of tensors, not resident memory. What was made before that
step (weights, moments) is counted from its storages and added. The weights are random and
the packs synthetic: ragged segments of 50 to 300 rows, four fifths of them audio.

``peak`` is all of it, ``step`` what the step adds to what is there before. The second is harder to predict, because
most of a peak may be weights and moments, which are known.

On a GPU all cases are csm-1b itself, compiled as the trainer does, and the figures are the caching allocator's
(``torch.cuda.max_memory_allocated``), with what libraries take from it as work space.
"""

from __future__ import annotations

import argparse
import gc
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.device import peak_memory
from benchmarks.common.models import quick_model, random_pack
from benchmarks.common.record import append_row
from benchmarks.common.tables import MIB
from benchmarks.common.tracked import Tracked, storage_bytes
from csm_fast import CSMConfig
from csm_fast.config.parse import build
from csm_fast.config.train import TrainConfig
from csm_fast.model.compile import compile_layers
from csm_fast.model.loss import packed_loss
from csm_fast.packing.layout import StepBatch
from csm_fast.packing.pack import Pack
from csm_fast.planner.estimate import estimate
from csm_fast.train.optim.build import cast_weights
from csm_fast.train.step import StepRunner

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
Case = tuple[str, CSMConfig, str, str, int, dict[str, Any]]  # shape's name, shape, method, checkpointing, rows, others


def with_layers(shape: CSMConfig, backbone: int, decoder: int) -> CSMConfig:
    """The shape with fewer layers of the same widths."""
    stacks = replace(shape.backbone, num_layers=backbone), replace(shape.decoder, num_layers=decoder)
    return replace(shape, backbone=stacks[0], decoder=stacks[1])


def make_pack(shape: CSMConfig, rows: int, fraction: float, seed: int = 0) -> Pack:
    """A pack of ragged conversations, each of text rows and then audio rows."""
    generator = torch.Generator().manual_seed(seed)
    lengths: list[int] = []
    while (left := rows - sum(lengths)) > 0:
        drawn = int(torch.randint(50, 301, (), generator=generator))
        lengths.append(left if left - drawn < 50 else drawn)
    conversations = [("a" * round(length * AUDIO_SHARE)).rjust(length, "t") for length in lengths]
    return random_pack(shape, conversations, fraction, seed)


def make_config(method: str, checkpointing: str, device: str = "cpu", **more: Any) -> TrainConfig:
    values = {"activation_checkpointing": checkpointing, "precision": "bf16", "device": device}
    values["compile"] = "off" if device == "cpu" else "auto"
    return build(TrainConfig, {**values, **METHODS[method], **more})


def measure_step(shape: CSMConfig, config: TrainConfig, rows: int, packs: int = 1) -> dict[str, Any]:
    """Predicted and measured bytes of one step, on ``config``'s device: all, of the ``step``, and from ``before``."""
    device = torch.device(config.run.device)
    model: Any = quick_model(shape, device)
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
    update = StepRunner(
        model, config.optimizer, device, config.model.precision, partial(packed_loss, a=0.5, b=0.5), 10, 0
    )
    pack = make_pack(shape, rows, config.loss.amortization_fraction)
    batch = StepBatch([pack] * packs, 0, 0)
    update.run(batch, 0)
    gc.collect()
    rows, targets, frames = len(pack.tokens), len(pack.target_rows), len(pack.decoder_index)
    sizes: dict[str, Any] = {"rows": rows, "targets": targets, "decoder_frames": frames, "packs": packs}
    planned = estimate(shape, config, **sizes, device=device.type)
    if device.type == "cuda":
        before, step = torch.cuda.memory_allocated(), peak_memory(lambda: update.run(batch, 1), device, compiled=True)
        assert step is not None
    else:
        before, step = _track_step(model, update, batch)
    figures: dict[str, Any] = {"rows": rows, "packs": packs}
    figures |= {"measured": before + step, "predicted": planned.peak}
    figures |= {"measured_step": step, "predicted_step": planned.peak - planned.before}
    figures |= {"measured_before": before, "predicted_before": planned.before}
    return {**figures, "moment": planned.moment, "components": planned.components}


def _track_step(model: Any, update: StepRunner, batch: StepBatch) -> tuple[int, int]:
    """Bytes that are there before a step on a CPU, and the most that it adds."""
    quantised = [p.quant_state for p in model.parameters() if hasattr(p, "quant_state")]
    scales = [t for q in quantised for t in (q.absmax, q.code, q.offset, q.state2.absmax, q.state2.code)]
    state = [t for values in update.optimizer.state.values() for t in values.values() if isinstance(t, Tensor)]
    before = sum(map(storage_bytes, ([*model.parameters(), *scales], state)))
    with Tracked() as tracked:
        update.run(batch, 1)
    return before, tracked.peak + storage_bytes(t for t in batch.packs[0] if isinstance(t, Tensor))


def cpu_cases() -> list[Case]:
    small, one = CSMConfig.small(), CSMConfig.csm_1b()
    at_once = {"optimizer_in_backward": True, "max_grad_norm": 0.0}
    four = "csm-1b, 4 + 2 layers", with_layers(one, 4, 2)
    two = "csm-1b, 2 + 1 layers", with_layers(one, 2, 1)
    return [
        *(
            ("small", small, method, checkpointing, rows, {})
            for method in ("full", "full-bf16", "lora", "qlora")
            for checkpointing in CHECKPOINTING
            for rows in (512, 2048)
        ),
        ("small", small, "dora", "off", 2048, {}),
        ("small", small, "dora", "full", 2048, {}),
        ("small", small, "full-bf16-kahan", "full", 2048, {}),
        ("small", small, "full", "full", 2048, at_once),
        ("small", small, "full-bf16", "full", 2048, at_once),
        ("small", small, "full", "off", 2048, {"precision": "fp32"}),
        ("small", small, "lora", "full", 2048, {"train_heads": True, "train_embeddings": "all"}),
        ("small", small, "full", "off", 512, {"freeze": ["backbone", "text_embeddings", "audio_embeddings"]}),
        ("small", small, "full", "off", 2048, {"amortization_fraction": 1.0}),
        (*two, "full-bf16", "full", 2048, {}),
        (*two, "full", "selective", 2048, {"freeze": ["text_embeddings"]}),
        (*four, "lora", "full", 2048, {}),
        (*four, "qlora", "full", 2048, {}),
        (*four, "qlora", "off", 2048, {}),
    ]


def cuda_cases() -> list[Case]:
    methods = ("full", "full-bf16", "lora", "qlora")
    chosen = [(method, checkpointing, 4096) for method in methods for checkpointing in CHECKPOINTING]
    chosen += [("full-bf16", checkpointing, 16384) for checkpointing in ("off", "selective")]
    return [("csm-1b", CSMConfig.csm_1b(), *case, {}) for case in chosen]


def describe_case(name: str, method: str, checkpointing: str, more: dict[str, Any], figures: dict[str, Any]) -> str:
    what = " ".join(f"{k}={v}" for k, v in more.items())
    mib = {key: f"{value / MIB:8.1f}" for key, value in figures.items() if isinstance(value, int)}
    errors = [f"{figures['predicted' + s] / figures['measured' + s] - 1:+7.1%}" for s in ("", "_step")]
    return (
        f"{name:21} {method:10} {checkpointing:9} {figures['rows']:5}  {mib['measured']} {mib['predicted']} "
        f"{errors[0]}  {mib['measured_step']} {errors[1]}  {figures['moment']} {what}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose line holds this text")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--results", type=Path, help="append the figures to this .jsonl")
    args = parser.parse_args()
    print("MiB                                               measured predicted   error  step only   error  peak at")
    worst = 0.0
    for name, shape, method, checkpointing, rows, more in cpu_cases() if args.device == "cpu" else cuda_cases():
        if args.only not in f"{name} {method} {checkpointing} {rows} {more}":
            continue
        figures = measure_step(shape, make_config(method, checkpointing, args.device, **more), rows)
        gc.collect()
        print(describe_case(name, method, checkpointing, more, figures), flush=True)
        worst = max(worst, abs(figures["predicted"] / figures["measured"] - 1))
        row = {"shape": name, "method": method, "checkpointing": checkpointing, "settings": more, **figures}
        append_row(args.results, "memory_plan", row)
    print(f"largest error of a peak: {worst:.1%}")
    return 0 if worst <= 0.1 else 1


if __name__ == "__main__":
    sys.exit(main())
