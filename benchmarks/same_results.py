"""Whether two clones give the same demo: token store, trained weights, losses and sample.

    python -m benchmarks.same_results ../csm_fast-before .
    python -m benchmarks.same_results ../csm_fast-before . --tolerance 1e-3      # other kernels: equal to rounding

Each clone runs ``make demo`` with its own environment, on the same machine and the same number of threads. Without
``--tolerance`` every file must be identical, bit for bit. Exits 1 where one differs.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from csm_fast.report.metrics import read_metrics

STORES = ("tokens/train", "tokens/val")
WEIGHTS = ("run/last/model.safetensors", "run/last/optimizer.safetensors", "run/best/model.safetensors")
LOSSES = ("step", "train_loss", "per_codebook", "grad_norm", "val_loss", "val_per_codebook", "lr")


def run_demo(clone: Path, out: Path, data: str | None) -> None:
    """``make demo`` of a clone into ``out``."""
    command = ["make", "-C", str(clone), "demo", f"DEMO={out}", *([f"DATA={data}"] if data else [])]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def read_losses(run: Path) -> list[dict]:
    """The rows of metrics.jsonl without what depends on time and memory."""
    return [{name: row.get(name) for name in LOSSES} for row in read_metrics(run / "metrics.jsonl")]


def largest_difference(a: Path, b: Path) -> float:
    """The largest |a - b| / |a| over the tensors of two safetensors files, by norm; infinite where names differ."""
    left, right = load_file(a), load_file(b)
    if left.keys() != right.keys():
        return float("inf")
    pairs = [(left[name].double(), right[name].double()) for name in left]
    return max(((x - y).norm() / x.norm().clamp_min(1e-30)).item() for x, y in pairs if x.numel())


def compare(before: Path, after: Path, tolerance: float) -> bool:
    """Print a line per result; whether all agree."""
    agree = True

    def say(name: str, same: bool, difference: float | None = None) -> None:
        nonlocal agree
        close = same or (difference is not None and difference <= tolerance)
        agree &= close
        note = "identical" if same else "DIFFERS" if difference is None else f"differs by {difference:.2g}"
        print(f"{name:32} {note}")

    def digest(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    for store in STORES:
        found = [{p.name: digest(p) for p in (run / store).glob("*.safetensors")} for run in (before, after)]
        say(store, found[0] == found[1])
    for name in WEIGHTS:
        same = digest(before / name) == digest(after / name)
        say(name, same, None if same else largest_difference(before / name, after / name))
    rounded = 0.0 if tolerance else None  # one rounding may change a loss's last digit, or sample another code
    say("run/metrics.jsonl, losses", read_losses(before / "run") == read_losses(after / "run"), rounded)
    say("sample.wav", digest(before / "sample.wav") == digest(after / "sample.wav"), rounded)
    return agree


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.same_results", description=__doc__.split("\n")[0])
    parser.add_argument("before", type=Path, help="a clone of csm_fast")
    parser.add_argument("after", type=Path, help="another one")
    parser.add_argument("--data", help="metadata file in place of the demo's recordings")
    parser.add_argument("--tolerance", type=float, default=0.0, help="of weights, relative, by norm")
    parser.add_argument("--results", nargs=2, type=Path, metavar="DIR", help="demo folders that exist: run nothing")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folders = args.results or [Path(scratch, "before"), Path(scratch, "after")]
        if not args.results:
            for clone, out in zip((args.before, args.after), folders, strict=True):
                run_demo(clone, out, args.data)
        agree = compare(folders[0], folders[1], args.tolerance)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}: " + ("the same" if agree else "not the same"))
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
