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
import sys
import time
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.record import Row, append_row, read_rows
from benchmarks.common.tables import format_text, newest_rows
from benchmarks.compare.data import draw_recordings
from csm_fast import CSM
from csm_fast.config.shape import NAMED_SHAPES
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
        self.config = NAMED_SHAPES[args.shape]()
        if args.synthetic:
            drawn = draw_recordings(args.synthetic, self.config)
            held_out = max(1, args.synthetic // 10)
            self.val: Any = drawn.choose(range(held_out))
            store: Any = drawn.choose(range(held_out, args.synthetic))
        else:
            store, self.val = open_split(args.data, "train"), open_split(args.data, "val")
        self.data, self.loss = DataSection(batch_size=args.batch_size), LossSection()
        self.packer = Packer(store, self.data, self.loss, pad=self.device.type)
        self.validator = Validator(self.val, self.data, self.loss, 1 / 4)

    def train(self, model: Any, section: OptimizerSection, steps: int, first: int, name: str) -> dict[str, Any]:
        """Train from batch ``first`` on; returns losses of steps and validations, and which weights had a gradient."""
        a, b = coefficients(self.loss, vocabulary(model)[0])
        loss = partial(packed_loss, a=a, b=b)
        update = StepRunner(model, section, self.device, "bf16", loss, steps, self.data.seed)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        reached = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in trained.items()}

        def note_gradients(*_: Any) -> None:
            for n, p in trained.items():
                if p.grad is not None:
                    reached[n].logical_or_(p.grad != 0)

        update.optimizer.register_step_pre_hook(note_gradients)
        losses: list[float] = []
        validations: list[tuple[int, float]] = []
        batches = islice(chain.from_iterable(self.packer.blocks(0, 0)), first, None)
        started = time.monotonic()
        for step in range(steps + 1):
            if step % self.args.val_every == 0 or step == steps:
                value = self.validator(model, self.device, update.autocast)["val_loss"]
                validations.append((step, round(value, 5)))
                print(f"{name:32} step {step:4}  val {value:.4f}  {time.monotonic() - started:.0f} s", flush=True)
            if step < steps:
                losses.append(round(float(update.run(next(batches), step).loss), 5))
        return {"train_loss": losses, "val_loss": validations, "reached": reached, "update": update}


def measure_ways(args: argparse.Namespace) -> list[Row]:
    """A row per way."""
    bench = Bench(args)
    base: Any = CSM(bench.config).init_weights(0).to(bench.device)
    base.text_embeddings.requires_grad_(False)
    base.audio_embeddings.requires_grad_(False)
    section = OptimizerSection(learning_rate=args.base_lr, lr_decay="cosine", warmup_ratio=0.05)
    bench.train(base, section, args.base_steps, 0, "base")
    base.to(torch.bfloat16).float()  # every way starts from weights that bf16 can hold
    common = {name: getattr(args, name) for name in ("lr", "steps", "shape", "batch_size", "base_lr", "base_steps")}
    common["data"] = f"{args.synthetic} random recordings" if args.synthetic else bench.val.codec["name"]
    found: list[Row] = []
    for name, (optimizer, weights, *_) in WAYS.items():
        model = copy.deepcopy(base)
        chosen: dict[str, Any] = {"optimizer": optimizer, "weights": weights}
        section = OptimizerSection(**chosen, learning_rate=args.lr, lr_decay="constant", warmup_steps=0)
        cast_weights(model, section)
        run = bench.train(model, section, args.steps, args.base_steps, name)
        row = {"way": name, **chosen, "train_loss": run["train_loss"], "val_loss": run["val_loss"], **common}
        row["bytes_per_weight"] = bytes_per_weight(run["update"])
        found.append({**row, **count_unmoved(model, base, run["reached"])})
    return found


def count_unmoved(model: Any, base: Any, reached: dict[str, torch.Tensor]) -> dict[str, float]:
    """Of the weights that had a gradient, the share that never changed: of all, and of the norms' scales."""
    counts = []
    for name, seen in reached.items():
        same = (model.get_parameter(name).float() == base.get_parameter(name)) & seen
        counts.append((int(same.sum()), int(seen.sum()), name.endswith(".scale")))
    still, counted = (sum(column) for column in list(zip(*counts, strict=True))[:2])
    scales = [(same, seen) for same, seen, is_scale in counts if is_scale]
    share = sum(same for same, _ in scales) / sum(seen for _, seen in scales)
    figures = {"never_changed": round(still / counted, 4), "scales_never_changed": round(share, 4)}
    return {**figures, "weights_reached": counted}


def bytes_per_weight(update: StepRunner) -> float:
    """Bytes of the weights and of the optimizer's state, as they are stored, per weight."""
    tensors = [t for state in update.optimizer.state.values() for t in state.values()] + update.parameters
    return round(sum(t.nbytes for t in tensors) / sum(p.numel() for p in update.parameters), 2)


def smooth(losses: list[float]) -> tuple[list[float], list[float]]:
    """Means of ``SMOOTHING`` consecutive steps, at the middle of each stretch."""
    window = min(SMOOTHING, len(losses))
    means = torch.tensor(losses).unfold(0, window, 1).mean(1).tolist()
    return [i + (window + 1) / 2 for i in range(len(means))], means


def draw(rows: list[Row], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3, width_ratios=(4, 4, 3))
    for row in rows:
        *_, colour, width = WAYS[row["way"]]
        left.plot(*smooth(row["train_loss"]), color=colour, lw=width)
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
    parser.add_argument("--shape", choices=list(NAMED_SHAPES), default="tiny")
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
        rows = newest_rows(read_rows(args.read), "way")
    else:
        if args.device == "cpu":
            keep_freed_memory()
        rows = measure_ways(args)
    lines = []
    for row in rows:
        losses = [f"{value:.4f}" for _, value in (row["val_loss"][0], row["val_loss"][-1])]
        shares = [f"{row[name]:.1%}" for name in ("never_changed", "scales_never_changed")]
        lines.append([row["way"], *losses, *shares, f"{row['bytes_per_weight']:.2f}"])
        if not args.read:
            append_row(args.results, "bf16_updates", row)
    print(format_text(["", "val at start", "at end", "never changed", "scales", "bytes"], lines, left=1))
    if args.plot:
        draw(rows, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
