"""Every way to train, on the same base and tokens: does it learn, continue bit for bit, and survive saving and merging?

    python -m benchmarks.methods --data demo/tokens --workdir /somewhere --results benchmarks/results/methods.jsonl

A model of the small shape is trained from random weights first (``--base-steps``): the base. Every method then tunes it
for ``--steps`` steps on the same tokens, once in one go and once stopped halfway and continued; weights or adapters and
moments of both must be equal bit for bit. What was saved is loaded again and scored as the trainer scored it; adapters
are merged, by ``csm-fast merge``, and the merged model is scored too. Scores are validation losses in float32.
"""

from __future__ import annotations

import argparse
import copy
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.common.record import append, environment
from csm_fast import load_model
from csm_fast.commands.merge import merge
from csm_fast.config.commands import MergeConfig
from csm_fast.config.parse import build
from csm_fast.config.train import TrainConfig
from csm_fast.data.token_store import open_split
from csm_fast.evaluate.validation import Validator
from csm_fast.train.loop import Trainer

METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "full-8bit": {"optimizer": "adamw-8bit"},
    "full-bf16-stochastic": {"weights": "bf16-stochastic"},
    "full-bf16-stochastic-8bit": {"weights": "bf16-stochastic", "optimizer": "adamw-8bit"},
    "lora": {"method": "lora"},
    "dora": {"method": "dora"},
    "qlora": {"method": "qlora"},
}
RATES = {"full": 2e-4, "lora": 2e-3, "dora": 2e-3, "qlora": 2e-3}


def config(args: argparse.Namespace, output: Path, **settings: Any) -> TrainConfig:
    values = {
        "model": str(args.workdir / "base/last"),
        "precision": args.precision,
        "data": args.data,
        "output_dir": str(output),
        "device": "cpu",
        "batch_size": 16,
        "warmup_ratio": 0.3,
        "amortization_fraction": 0.125,
        "val_every": 0,
        "save_every": 0,
        "log_every": 10,
        "n_epochs": 1000,
        "seed": 0,
    }
    return build(TrainConfig, {**values, **settings})


def run(settings: TrainConfig, stop_at: int | None = None) -> dict[str, Any]:
    """A run, or the part of one up to a step, as Ctrl-C would end it there."""
    trainer = Trainer(copy.deepcopy(settings))
    if stop_at is not None:
        step = trainer._step

        def stepped(batch: Any) -> int:
            done = step(batch)
            trainer.stopping = "the benchmark" if done == stop_at else None
            return done

        trainer._step = stepped  # type: ignore[method-assign]
    return trainer.run()


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        found.update({f"{path.name}/{name}": value for name, value in load_file(path).items()})
    return found


def same_bits(a: Path, b: Path) -> bool:
    x, y = tensors(a), tensors(b)
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


def score(model: Any, settings: TrainConfig) -> float:
    store = open_split(settings.data.data, "val")
    validator = Validator(store, settings.data, settings.loss, settings.run.val_fraction_frames)
    return validator(model, torch.device("cpu"))["val_loss"]


def one(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """A method's figures."""
    rate = RATES[METHODS[name].get("method", "full")]
    whole, halves = args.workdir / name / "whole", args.workdir / name / "halves"
    shutil.rmtree(args.workdir / name, ignore_errors=True)
    started = time.monotonic()
    common = {**METHODS[name], "learning_rate": rate, "max_steps": args.steps}
    summary = run(config(args, whole, **common))
    seconds = time.monotonic() - started
    run(config(args, halves, **common), stop_at=args.steps // 2)
    run(config(args, halves, **common))
    settings = config(args, whole, **common)
    row = {
        "val_loss_first": summary["val_loss_first"],
        "val_loss_last": summary["val_loss_last"],
        "resumed_equal": same_bits(whole / "last", halves / "last"),
        "bytes": sum(p.stat().st_size for p in (whole / "last").resolve().iterdir()),
        "seconds": seconds,
        "loaded": score(load_model(str(whole / "last")), settings),
        "base": score(load_model(str(args.workdir / "base/last")), settings),
    }
    if METHODS[name].get("method"):
        merged = args.workdir / name / "merged"
        merge(MergeConfig(adapter=str(whole / "last"), out=str(merged)))
        row["merged"] = score(load_model(str(merged)), settings)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="demo/tokens")
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--shape", default="small")
    parser.add_argument("--base-steps", type=int, default=40)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    if not (args.workdir / "base/last").exists():
        start = {"model": args.shape, "from_scratch": True, "precision": "bf16", "learning_rate": 6e-4}
        run(config(args, args.workdir / "base", **start, max_steps=args.base_steps))
    print(f"{'':28} {'before':>8} {'after':>8} {'loaded':>10} {'merged':>10} resumed {'MB':>8} {'s':>6}")
    failed = False
    for name in args.methods:
        row = one(args, name)
        failed |= not row["resumed_equal"] or row["val_loss_last"] >= row["val_loss_first"]
        merged = f"{row['merged']:10.5f}" if "merged" in row else f"{'':10}"
        print(
            f"{name:28} {row['val_loss_first']:8.4f} {row['val_loss_last']:8.4f} {row['loaded']:10.5f} {merged} "
            f"{'equal' if row['resumed_equal'] else 'DIFFERS':7} {row['bytes'] / 1e6:8.1f} {row['seconds']:6.1f}",
            flush=True,
        )
        if args.results:
            setting = {"shape": args.shape, "precision": args.precision, "steps": args.steps}
            append(args.results, {"benchmark": "methods", "method": name, **setting, **row, **environment()})
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
