"""csm-1b's true shape on this machine: save, load, train two steps; how much memory, how long.

    python -m benchmarks.memory_csm_1b --workdir /somewhere/with/12GB --method frozen lora qlora

The weights are random and the codes synthetic: this measures memory and time, not learning. The model is written under
Sesame's names in bf16 and trained by the trainer like the published one: "frozen" with the backbone and both embedding
tables frozen (182.6 M parameters in float32 under bf16 autocast), "lora" and "qlora" with adapters of rank 16 on every
linear layer. Each stage runs in a process of its own, so that the peak resident memory is its own: the process itself,
loading, training, the checkpoint. Beside it stands what ``csm-fast plan`` counts for the step.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.common.record import append, environment

METHODS: dict[str, dict[str, object]] = {
    "frozen": {"freeze": ["backbone", "text_embeddings", "audio_embeddings"]},
    "lora": {"method": "lora"},
    "qlora": {"method": "qlora"},
}
TOKENIZER = {"name": "synthetic", "fingerprint": "synthetic", "vocab_size": 128_256}
CODEC: dict[str, object] = {"kind": "synthetic", "name": "synthetic codes", "fingerprint": "synthetic"}
CODEC |= {"sample_rate": 24_000, "samples_per_frame": 1920, "num_codebooks": 32, "codebook_size": 2048}


def save(workdir: Path, args: argparse.Namespace) -> dict:
    """Random weights of csm-1b's shape in bf16, under Sesame's names."""
    import torch

    from csm_fast import CSM, CSMConfig, save_model
    from csm_fast.weights.save import write_record

    with torch.device("meta"):
        model = CSM(CSMConfig.csm_1b()).to(torch.bfloat16)
    model.to_empty(device="cpu").init_weights(args.seed)
    save_model(model, workdir / "model")
    write_record(workdir / "model", {"codec": CODEC, "text_tokenizer": TOKENIZER})
    return {"parameters": sum(p.numel() for p in model.parameters())}


def train(workdir: Path, args: argparse.Namespace) -> dict:
    """Two optimizer steps of ``args.rows`` rows through the trainer, checkpoint and all."""
    import numpy as np

    from csm_fast.config.parse import build
    from csm_fast.config.shape import CSMConfig
    from csm_fast.config.train import TrainConfig
    from csm_fast.data.store_writer import TokenStoreWriter
    from csm_fast.data.token_store import TurnTokens
    from csm_fast.planner.estimate import estimate
    from csm_fast.report.metrics import read_metrics
    from csm_fast.train.loop import train as run

    rng = np.random.default_rng(args.seed)
    text, frames = 12, args.rows // args.conversations - 13
    shutil.rmtree(workdir / "tokens", ignore_errors=True)
    with TokenStoreWriter(workdir / "tokens/train", codec=CODEC, text_tokenizer=TOKENIZER, resampler="none") as store:
        for i in range(2 * args.conversations):
            ids = rng.integers(0, 128_000, text).astype(np.int32)
            codes = rng.integers(1, 2048, (frames, 32)).astype(np.uint16)
            store.add_conversation([TurnTokens(ids, codes, 0, i)])
    config = build(
        TrainConfig,
        {
            "model": str(workdir / "model"),
            **METHODS[args.stage],
            "activation_checkpointing": args.activation_checkpointing,
            "precision": "bf16",
            "data": str(workdir / "tokens"),
            "batch_size": args.conversations,
            "output_dir": str(workdir / "run" / args.stage),
            "max_steps": 2,
            "log_every": 1,
            "save_every": 0,
            "device": "cpu",
        },
    )
    shutil.rmtree(workdir / "run", ignore_errors=True)
    share = (frames + 1) / (frames + 1 + text)
    planned = estimate(CSMConfig.csm_1b(), config, rows=args.rows, audio_share=share, device="cpu")
    started = time.monotonic()
    run(config)
    rows = read_metrics(workdir / "run" / args.stage / "metrics.jsonl")
    return {
        "rows_per_step": args.rows,
        "losses": [r["train_loss"] for r in rows],
        "rows_per_s": [r["rows_per_s"] for r in rows],
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
        import torch

        from csm_fast.system.device import memory_gib

        figures = (save if args.stage == "save" else train)(args.workdir, args)
        print(json.dumps({"stage": args.stage, **figures, "peak_resident_gib": memory_gib(torch.device("cpu"))}))
        return 0
    args.workdir.mkdir(parents=True, exist_ok=True)
    for stage in ["save", *args.method]:
        command = [sys.executable, "-m", "benchmarks.memory_csm_1b", *sys.argv[1:], "--stage", stage]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        figures = json.loads(out.splitlines()[-1])
        print(f"{stage}: {json.dumps(figures)}")
        if args.results:
            append(args.results, {"benchmark": "memory_csm_1b", **figures, **environment()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
