"""The optimizer's update with clipping, on every weight of a shape, by csm_fast's optimizer and by others.

    python -m benchmarks.optimizers --results benchmarks/results/optimizers.jsonl
    python -m benchmarks.optimizers --device cuda --shape csm-1b

Weights and gradients are random. Of the tables, the rows that a corpus reads have had gradients (--read), the others
never. On a CPU all updates take turns; medians are shown. The floor is the time of a copy between two large buffers for
the bytes that every update must move: it reads the gradients; it reads and writes weights and moments of everything
that ever had a gradient. (An update can be faster: a copy also reads what it overwrites.)
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from csm_kernels.constants import MOMENT_BLOCK
from csm_kernels.cpu import native
from torch import Tensor, nn

from benchmarks.common.device import copy_rate, take_turns, time_cold_call
from benchmarks.common.record import Row, append_row, environment
from benchmarks.common.tables import format_text
from benchmarks.report.parts import optimizer_table
from csm_fast import CSM, ops
from csm_fast.config.shape import NAMED_SHAPES
from csm_fast.system.device import keep_freed_memory
from csm_fast.train.optim.adamw import AdamW
from csm_fast.train.optim.build import parameter_groups
from csm_fast.train.optim.clipping import clip_gradients, gradient_norm

BF16, FP32 = torch.bfloat16, torch.float32
LAUNCHED = 60_000_000  # cycles of a GPU in which the host launches a whole update, as during a step's backward pass


@dataclass(frozen=True)
class Way:
    """How an update is made.

    Attributes:
        kind: "csm_fast", "csm_fast by PyTorch's operators", "torch.optim.AdamW(fused)", "bitsandbytes AdamW8bit".
        learns: whether small updates survive in these weights.
        moment_bytes: of both moments of a weight.
    """

    kind: str
    weights: torch.dtype
    rounding: str = "nearest"
    bits: int = 32
    learns: bool = True
    moment_bytes: float = 8.0

    @property
    def name(self) -> tuple[str, str]:
        """Who updates, and which weights."""
        weights = {BF16: "bf16", FP32: "float32"}[self.weights]
        rounding = f", {self.rounding}" if self.weights == BF16 and self.kind.startswith("csm_fast") else ""
        return self.kind, f"{weights}{rounding}" + (", 8-bit moments" if self.bits == 8 else "")


EIGHTH = 2 * (1 + 4 / MOMENT_BLOCK)
OURS, PLAIN = "csm_fast", "csm_fast by PyTorch's operators"
WAYS = [
    *(Way(kind, BF16, "stochastic") for kind in (OURS, PLAIN)),
    *(Way(kind, BF16, "kahan") for kind in (OURS, PLAIN)),
    Way("torch.optim.AdamW(fused)", BF16, learns=False, moment_bytes=4.0),
    *(Way(kind, BF16, "stochastic", 8, moment_bytes=EIGHTH) for kind in (OURS, PLAIN)),
    Way("bitsandbytes AdamW8bit", BF16, bits=8, learns=False, moment_bytes=EIGHTH),
    Way(OURS, FP32),
    Way("torch.optim.AdamW(fused)", FP32),
]


def make_optimizer(way: Way, model: nn.Module) -> torch.optim.Optimizer:
    groups = parameter_groups(model, 0.002)
    if way.kind.startswith("torch"):
        return torch.optim.AdamW(groups, lr=1e-5, fused=True)
    if way.kind.startswith("bitsandbytes"):
        from csm_fast.system.optional import load_bitsandbytes

        for group in groups:
            group.pop("names")
        return load_bitsandbytes().optim.AdamW8bit(groups, lr=1e-5)
    return AdamW(groups, lr=1e-5, rounding=way.rounding, bits=way.bits)  # type: ignore[arg-type]


def make_update(way: Way, optimizer: torch.optim.Optimizer, parameters: list[Tensor]) -> Callable[[], None]:
    """One update with clipping: csm_fast's as its trainer makes it, the others' as their users do."""

    def ours() -> None:
        clip_gradients(optimizer, 1.0, gradient_norm(parameters))
        optimizer.step()

    def without_kernels() -> None:
        with native.left_out(), ops.using("torch"):
            ours()

    def theirs() -> None:
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return ours if way.kind == OURS else without_kernels if way.kind == PLAIN else theirs


def needed_bytes(way: Way, model: Any, read: tuple[float, float]) -> float:
    """Gradients read, twice with the norm; weight, moments (and Kahan's compensation) read and written."""
    width = way.weights.itemsize
    held = width + way.moment_bytes + 2 * (way.rounding == "kahan")
    total = 0.0
    for name, p in model.named_parameters():
        live = read[0] if "text_embeddings" in name else read[1] if "audio_embeddings" in name else 1.0
        total += p.numel() * (2 * width + 2 * held * live)
    return total


def measure_updates(args: argparse.Namespace, dtype: torch.dtype, ways: list[Way]) -> Iterator[Row]:
    """A row per way, as soon as it is measured."""
    device = torch.device(args.device)
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = CSM(NAMED_SHAPES[args.shape]())
    model.to(dtype)
    parameters = list(model.parameters())
    with torch.no_grad():
        for p in parameters:
            p.normal_(std=0.02)
            p.grad = torch.randn_like(p) * 1e-3
        tables = model.text_embeddings.weight, model.audio_embeddings.weight
        for table, share in zip(tables, args.read, strict=True):
            table.grad[int(share * len(table)) :] = 0
    # On a CPU all ways take turns, because its speed changes; a GPU would not hold the moments of all at once.
    for some in [ways] if device.type == "cpu" else [[way] for way in ways]:
        updates = [make_update(way, make_optimizer(way, model), parameters) for way in some]
        calls = [partial(time_cold_call, update, device, LAUNCHED) for update in updates]
        took = take_turns(calls, args.repeats + 2)
        del updates, calls
        for way, (_, _, *seconds) in zip(some, took, strict=True):  # the first makes the state, the second is warm
            yield {
                "way": way.name,
                "learns": way.learns,
                "seconds": seconds,
                "median_s": statistics.median(seconds),
                "bytes": needed_bytes(way, model, tuple(args.read)),
                "weights": sum(p.numel() for p in parameters),
            }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", choices=list(NAMED_SHAPES), default="small")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument(
        "--read",
        type=float,
        nargs=2,
        default=[0.0075, 0.58],
        metavar=("TEXT", "AUDIO"),
        help="shares of the tables' rows that a corpus reads; default: those of 26 minutes of recordings",
    )
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    if args.device == "cpu":
        keep_freed_memory()
    about = environment()
    common = {"shape": args.shape, "read": args.read, "run": f"{about['date']} {about['commit']}"}
    common["copy_bytes_per_s"] = copy_rate(torch.device(args.device))
    has_bitsandbytes = importlib.util.find_spec("bitsandbytes") is not None
    rows = []
    for dtype in (BF16, FP32):
        ways = [way for way in WAYS if way.weights == dtype and (has_bitsandbytes or way.bits == 32)]
        for row in measure_updates(args, dtype, ways):
            rows.append({**row, **common})
            append_row(args.results, "optimizers", rows[-1])
    print(f"{about['device']}, {args.shape} shape, {rows[0]['weights'] / 1e6:,.0f} million weights")
    print(format_text(*optimizer_table(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
