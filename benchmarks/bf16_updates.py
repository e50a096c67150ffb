"""bf16 weights at a fine-tuning learning rate: what rounding does to the updates, and what helps.

    python -m benchmarks.bf16_updates --data demo/tokens --results benchmarks/results/bf16_updates.jsonl \\
        --plot docs/bf16-updates.png
    python -m benchmarks.bf16_updates --from benchmarks/results/bf16_updates.jsonl --plot docs/bf16-updates.png

A model is trained briefly from random weights at a higher rate, rounded to bf16, and from there fine-tuned in five ways
on the same batches, at a constant learning rate: float32 master weights; bf16 weights whose updates are rounded to
nearest, rounded stochastically, or summed with a Kahan term; and stochastic rounding under 8-bit moments. Everything
else is the trainer's own step, bf16 autocast included. The embedding tables stay as they are: in a few hundred steps
most of their rows have no gradient or a rare one. A weight counts as one that never changed where it had a gradient in
some step and ends as it began.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.record import append, environment
from benchmarks.compare.data import Subset, Synthetic
from benchmarks.compare.worker import SHAPES
from csm_fast import CSM
from csm_fast.config.train import DataSection, LossSection, OptimizerSection
from csm_fast.data.token_store import open_split
from csm_fast.evaluate.validation import Validator
from csm_fast.model.loss import coefficients, packed_loss
from csm_fast.model.stacks import vocabulary
from csm_fast.packing.loader import Packer
from csm_fast.system.device import keep_freed_memory
from csm_fast.train.optim.build import cast_weights
from csm_fast.train.step import StepRunner

WAYS = {  # name -> optimizer, weights, colour and width of its line (most lines coincide)
    "float32 masters": ("adamw", "fp32", "0.75", 6.0),
    "bf16, Kahan": ("adamw", "bf16-kahan", "#1f77b4", 3.2),
    "bf16, stochastic rounding": ("adamw", "bf16-stochastic", "#2ca02c", 1.2),
    "bf16, stochastic, 8-bit moments": ("adamw-8bit", "bf16-stochastic", "#ff7f0e", 1.2),
    "bf16, to nearest": ("adamw", "bf16-nearest", "#d62728", 1.2),
}
SMOOTHING = 60  # steps averaged into a point of the training curves: about an epoch of the demo's data


class Bench:
    """The data, the trainer's step on it, and validation."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.device = args, torch.device(args.device)
        self.config = SHAPES[args.shape]()
        if args.synthetic:
            store: Any = Synthetic(args.synthetic, self.config)
            held_out = max(1, args.synthetic // 10)
            self.val: Any = Subset(store, list(range(held_out)))
            store = Subset(store, list(range(held_out, args.synthetic)))
        else:
            store, self.val = open_split(args.data, "train"), open_split(args.data, "val")
        self.data, self.loss = DataSection(batch_size=args.batch_size), LossSection()
        self.packer = Packer(store, self.data, self.loss, pad=self.device.type)
        self.validator = Validator(self.val, self.data, self.loss, 1 / 4)

    def batch(self, step: int) -> Any:
        epoch, index = 0, step
        while index >= self.packer.steps_in_epoch(epoch):
            index -= self.packer.steps_in_epoch(epoch)
            epoch += 1
        return self.packer.step(epoch, index)

    def train(self, model: Any, section: OptimizerSection, steps: int, first: int, name: str) -> dict[str, Any]:
        """Train from batch ``first`` on; returns losses of steps and validations, and which weights had a gradient."""
        a, b = coefficients(self.loss, vocabulary(model)[0])

        def loss(model: Any, pack: Any) -> Any:
            return packed_loss(model, pack, a=a, b=b)

        runner = StepRunner(model, section, self.device, "bf16", loss, steps, self.data.seed)
        reached = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in model.named_parameters() if p.requires_grad}
        named = [(reached[n], p) for n, p in model.named_parameters() if n in reached]

        def look(*_: Any) -> None:
            for seen, p in named:
                if p.grad is not None:
                    seen.logical_or_(p.grad != 0)

        runner.optimizer.register_step_pre_hook(look)
        losses: list[float] = []
        validations: list[tuple[int, float]] = []
        started = time.monotonic()
        for step in range(steps + 1):
            if step % self.args.val_every == 0 or step == steps:
                value = self.validator(model, self.device, runner.autocast)["val_loss"]
                validations.append((step, round(value, 5)))
                print(f"{name:32} step {step:4}  val {value:.4f}  {time.monotonic() - started:.0f} s", flush=True)
            if step < steps:
                losses.append(round(float(runner.run(self.batch(first + step), step).loss), 5))
        return {"train_loss": losses, "val_loss": validations, "reached": reached, "runner": runner}


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per way."""
    bench = Bench(args)
    base: Any = CSM(bench.config).init_weights(0).to(bench.device)
    base.text_embeddings.requires_grad_(False)
    base.audio_embeddings.requires_grad_(False)
    section = OptimizerSection(learning_rate=args.base_lr, lr_decay="cosine", warmup_ratio=0.05)
    bench.train(base, section, args.base_steps, 0, "base")
    base.to(torch.bfloat16).float()  # every way starts from weights that bf16 can hold
    found = []
    for name, (optimizer, weights, *_) in WAYS.items():
        model = copy.deepcopy(base)
        section = OptimizerSection(
            optimizer=optimizer,  # type: ignore[arg-type]
            weights=weights,  # type: ignore[arg-type]
            learning_rate=args.lr,
            lr_decay="constant",
            warmup_steps=0,
        )
        cast_weights(model, section)
        run = bench.train(model, section, args.steps, args.base_steps, name)
        row: dict[str, Any] = {"benchmark": "bf16_updates", "way": name, "optimizer": optimizer, "weights": weights}
        row.update({key: run[key] for key in ("train_loss", "val_loss")})
        row.update(unmoved(model, base, run["reached"]), bytes_per_weight=bytes_per_weight(run["runner"]))
        row.update(lr=args.lr, steps=args.steps, shape=args.shape, batch_size=args.batch_size)
        row.update(base_lr=args.base_lr, base_steps=args.base_steps)
        row.update(data=f"{args.synthetic} random recordings" if args.synthetic else bench.val.codec["name"])
        found.append({**row, **environment()})
    return found


def unmoved(model: Any, base: Any, reached: dict[str, torch.Tensor]) -> dict[str, float]:
    """Of the weights that had a gradient, the share that never changed: of all, and of the norms' scales."""
    still, counted = {"all": 0, "scales": 0}, {"all": 0, "scales": 0}
    for name, seen in reached.items():
        same = (model.get_parameter(name).float() == base.get_parameter(name)) & seen
        for kind in ("all", "scales") if name.endswith(".scale") else ("all",):
            still[kind] += int(same.sum())
            counted[kind] += int(seen.sum())
    return {
        "never_changed": round(still["all"] / counted["all"], 4),
        "scales_never_changed": round(still["scales"] / counted["scales"], 4),
        "weights_reached": counted["all"],
    }


def bytes_per_weight(runner: StepRunner) -> float:
    """Bytes of the weights and of the optimizer's state, as they are stored, per weight."""
    tensors = [t for state in runner.optimizer.state.values() for t in state.values()] + runner.parameters
    return round(sum(t.nbytes for t in tensors) / sum(p.numel() for p in runner.parameters), 2)


def smoothed(losses: list[float]) -> tuple[list[float], list[float]]:
    """Means of ``SMOOTHING`` consecutive steps, at the middle of each stretch."""
    window = min(SMOOTHING, len(losses))
    means = torch.tensor(losses).unfold(0, window, 1).mean(1).tolist()
    return [i + (window + 1) / 2 for i in range(len(means))], means


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3, width_ratios=(4, 4, 3))
    for row in rows:
        *_, colour, width = WAYS[row["way"]]
        left.plot(*smoothed(row["train_loss"]), color=colour, lw=width)
        middle.plot(*zip(*row["val_loss"], strict=True), color=colour, lw=width, label=row["way"])
    left.set(xlabel="step", ylabel=f"training loss, mean of {min(SMOOTHING, rows[0]['steps'])} steps [nats]")
    middle.set(xlabel="step", ylabel="validation loss [nats]")
    middle.legend(frameon=False, fontsize=8, loc="lower left")
    names = [row["way"] for row in rows]
    bars = right.barh(names, [100 * row["never_changed"] for row in rows], color=[WAYS[n][2] for n in names])
    right.bar_label(bars, fmt="%.1f", padding=3)
    right.set(xlabel="weights that never changed [%]", xlim=(0, 110))
    right.invert_yaxis()
    for axis in (left, middle, right):
        axis.spines[["top", "right"]].set_visible(False)
    row = rows[0]
    figure.suptitle(f"CSM ({row['shape']}) fine-tuned at lr {row['lr']:g}, from the same bf16 weights", fontsize=10)
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="demo/tokens", help="a token store with both splits")
    parser.add_argument("--synthetic", type=int, metavar="N", help="N random recordings take the place of --data")
    parser.add_argument("--shape", choices=list(SHAPES), default="tiny")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=3e-5)
    parser.add_argument("--base-steps", type=int, default=200)
    parser.add_argument("--base-lr", type=float, default=1e-3)
    parser.add_argument("--val-every", type=int, default=50)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--results", type=Path, help="add the rows to this file")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--from", dest="read", type=Path, help="plot the newest rows of this file, measure nothing")
    args = parser.parse_args()
    if args.read:
        newest = {row["way"]: row for row in map(json.loads, args.read.read_text(encoding="utf-8").splitlines())}
        rows = list(newest.values())
    else:
        if args.device == "cpu":
            keep_freed_memory()
        rows = measure(args)
    print(f"{'':32} {'val at start':>12} {'at end':>8} {'never changed':>14} {'scales':>7} {'bytes':>6}")
    for row in rows:
        (_, before), (_, after) = row["val_loss"][0], row["val_loss"][-1]
        shares = f"{row['never_changed']:14.1%} {row['scales_never_changed']:7.1%}"
        print(f"{row['way']:32} {before:12.4f} {after:8.4f} {shares} {row['bytes_per_weight']:6.2f}")
        if args.results and not args.read:
            append(args.results, row)
    if args.plot:
        plot(rows, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
