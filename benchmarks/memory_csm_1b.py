"""csm-1b's true shape on this machine: save, load, train two steps; how much memory, how long.

    python -m benchmarks.memory_csm_1b --workdir /somewhere/with/12GB --method frozen lora qlora

The weights are random and the codes synthetic: this measures memory and time, not learning. The model is written under
Sesame's names in bf16 and trained by the trainer like the published one: "frozen" with the backbone and both embedding
tables frozen (182.6 M parameters in float32 under bf16 autocast), "lora" and "qlora" with adapters of rank 16 on every
linear layer. Each stage (loading, training and a checkpoint) runs in a process of its own, whose peak resident memory
is measured. Beside it stands the memory that ``csm-fast plan`` counts for the step.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.common.processes import run_worker
from benchmarks.common.record import Row, append_row
from benchmarks.common.stores import identities, open_writer
from csm_fast import CSM, CSMConfig, save_model
from csm_fast.config.parse import build
from csm_fast.config.train import TrainConfig
from csm_fast.data.token_store import TurnTokens
from csm_fast.planner.estimate import estimate
from csm_fast.report.metrics import read_metrics
from csm_fast.system.device import memory_gib
from csm_fast.train.loop import train
from csm_fast.weights.save import write_record

METHODS: dict[str, dict[str, object]] = {
    "frozen": {"freeze": ["backbone", "text_embeddings", "audio_embeddings"]},
    "lora": {"method": "lora"},
    "qlora": {"method": "qlora"},
}
TEXT = 12  # text tokens of a conversation


def save_random_model(args: argparse.Namespace) -> Row:
    """Random weights of csm-1b's shape in bf16, under Sesame's names."""
    with torch.device("meta"):
        model = CSM(CSMConfig.csm_1b()).to(torch.bfloat16)
    model.to_empty(device="cpu").init_weights(args.seed)
    save_model(model, args.workdir / "model")
    write_record(args.workdir / "model", identities(model.config))
    return {"parameters": sum(p.numel() for p in model.parameters())}


def train_steps(args: argparse.Namespace) -> Row:
    """Two optimizer steps of ``args.rows`` rows through the trainer, checkpoint and all."""
    shape, rng = CSMConfig.csm_1b(), np.random.default_rng(args.seed)
    frames = args.rows // args.conversations - TEXT - 1
    shutil.rmtree(args.workdir / "tokens", ignore_errors=True)
    with open_writer(args.workdir / "tokens/train", shape) as store:
        for i in range(2 * args.conversations):
            text = rng.integers(0, 128_000, TEXT).astype(np.int32)
            codes = rng.integers(1, 2048, (frames, shape.num_codebooks)).astype(np.uint16)
            store.add_conversation([TurnTokens(text, codes, 0, i)])
    output = args.workdir / "run" / args.stage
    values: Row = {"model": str(args.workdir / "model"), "data": str(args.workdir / "tokens")}
    values |= {"output_dir": str(output), "precision": "bf16", "device": "cpu", **METHODS[args.stage]}
    values |= {"activation_checkpointing": args.activation_checkpointing, "batch_size": args.conversations}
    config = build(TrainConfig, {**values, "max_steps": 2, "log_every": 1, "save_every": 0})
    shutil.rmtree(args.workdir / "run", ignore_errors=True)
    planned = estimate(shape, config, rows=args.rows, audio_share=(frames + 1) / (TEXT + frames + 1), device="cpu")
    started = time.monotonic()
    train(config)
    steps = read_metrics(output / "metrics.jsonl")
    return {
        "rows_per_step": args.rows,
        "losses": [step["train_loss"] for step in steps],
        "rows_per_s": [step["rows_per_s"] for step in steps],
        "whole_s": time.monotonic() - started,
        "planned_gib": planned.peak / 2**30,
        "planned_with_reserve_gib": planned.needed / 2**30,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--method", nargs="+", choices=list(METHODS), default=["frozen"])
    parser.add_argument("--activation-checkpointing", choices=["off", "selective", "full"], default="off")
    parser.add_argument("--rows", type=int, default=704)
    parser.add_argument("--conversations", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, help="append the figures to this .jsonl")
    parser.add_argument("--stage", choices=["save", *METHODS], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        figures = save_random_model(args) if args.stage == "save" else train_steps(args)
        print(json.dumps({"stage": args.stage, **figures, "peak_resident_gib": memory_gib(torch.device("cpu"))}))
        return 0
    args.workdir.mkdir(parents=True, exist_ok=True)
    for stage in ["save", *args.method]:
        figures = run_worker("benchmarks.memory_csm_1b", *sys.argv[1:], "--stage", stage)
        print(f"{stage}: {json.dumps(figures)}")
        append_row(args.results, "memory_csm_1b", figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
