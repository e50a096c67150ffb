"""csm_fast against what people train CSM with today, in one run: time, memory, and whether the losses are the same.

    python -m csm_fast.data.demo corpus --sounds
    csm-fast pretokenize --train-data corpus/metadata.json --codec offline --output corpus/tokens
    python -m benchmarks.compare --data corpus/tokens --sesame-csm ../csm --sesame-finetune ../sesame-finetune

    python -m benchmarks.compare --synthetic 200 --device cuda --shape csm-1b

Every system runs in a process of its own, one at a time, as its users would run it: csm_fast as ``csm-fast-train`` sets
its process up (on a CPU it keeps freed memory, in huge pages), the others in plain PyTorch. In one process for all,
each would use the heap that the others leave. "-kept" is a system in a process set up as csm_fast's, which shows what
the set-up alone is worth. ``--allocator`` gives all systems the one or the other.

Every system sees the same recordings, weights (random) and, at equal updates, the same frames. Equal updates: batches
of 8, then 32 recordings; the others pad buckets of similar length, csm_fast packs the same recordings. Free packing:
csm_fast in packs of ``--pack-rows``, the others in their buckets. Times are of forward and backward passes, on batches
built beforehand; the optimizer's time per update is measured beside them. Repetitions are interleaved, on a CPU piece
by piece, because a rented machine is fast for some minutes and slow for others; medians are shown. A system that takes
minutes (``systems.is_slow``) runs the first of ``--batches`` only, and a third of them per repetition if there are
three: together an epoch. Its time is that of a part and of the longest batch, and for the rest it lies on a straight
line over the rows (``Running.run_part``). transformers and systems that keep memory also run parts, so that a
comparison takes a quarter of an hour.

On a processor without bf16 products, PyTorch's are ten to a hundred times as slow as its float32 ones. There the
systems train in float32 (``--precision``), all of them run parts (``systems.num_parts``), and the longest batch only
where that takes neither minutes nor all memory (``systems.runs_longest``).

A system is ranked only if its loss on a batch is the float32 value to 1e-5 (float32) or 1e-2 (bf16).

"blog" is the published forward: sesame-finetune's on Sesame's own ``Model`` (``--sesame-csm``, see benchmarks/parity.py
for what that needs); "padded" is the same in our words on our modules, for when those directories are not there.
"transformers" is amortized through its labels, "transformers-all-frames" is how its users run it.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import Any

from benchmarks.common.record import Row, append_row, start_time
from benchmarks.compare.race import Race, Stopped, Worker
from benchmarks.compare.systems import SYSTEMS, add_precision, runs_alone
from benchmarks.compare.table import print_tables
from benchmarks.compare.worker import answer_questions
from csm_fast.config.shape import NAMED_SHAPES
from csm_fast.system.device import resolve_device, resolve_precision


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="demo/tokens")
    parser.add_argument("--splits", nargs="+", choices=["train", "val"], help="of --data; default: all that are there")
    parser.add_argument("--synthetic", type=int, metavar="N", help="N random recordings take the place of --data")
    parser.add_argument("--sesame-csm", type=Path)
    parser.add_argument("--sesame-finetune", type=Path)
    parser.add_argument("--share", type=float, default=1.0, help="share of the recordings, evenly over their lengths")
    parser.add_argument("--middle", type=int, metavar="N", help="only the N recordings of middle length: one batch")
    parser.add_argument("--shape", choices=list(NAMED_SHAPES), default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), help="default: csm_fast's and the others'")
    parser.add_argument(
        "--precision",
        choices=["auto", "bf16", "fp32"],
        default="auto",
        help="of systems whose names have none; auto: float32 on a CPU without products of bf16, else bf16",
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--pack-rows", type=int, default=2048, help="of csm_fast's free packing")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-optimizer", action="store_true", help="leave the optimizer's time out")
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing, where there is one")
    parser.add_argument("--memory-only", action="store_true", help="no times")
    parser.add_argument("--allocator", choices=["own", "kept", "plain"], default="own", help="of a CPU's memory")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.synthetic is not None and args.synthetic < 1:
        parser.error(f"--synthetic {args.synthetic}: there are no recordings to train on; give at least 1")
    there = [name for name in ("train", "val") if (Path(args.data) / name).is_dir()]
    if not args.synthetic and not there:
        parser.error(f"{args.data}: no tokens there; csm-fast pretokenize makes them, or take --synthetic 200")
    args.splits = args.splits or there
    real = args.sesame_csm and args.sesame_finetune
    theirs = "blog" if real else "padded"
    if args.precision == "auto":
        on_cpu = args.device == "cpu"
        args.precision = "fp32" if on_cpu and resolve_precision("auto", resolve_device("cpu")) == "fp32" else "bf16"
    own = "csm_fast" if args.precision == "bf16" else "csm_fast-fp32"
    kept = [f"{theirs}-kept"] if args.device == "cpu" else []
    default = [own, theirs, *kept, f"{theirs}-fp32", "transformers", "transformers-all-frames"]
    args.systems = list(dict.fromkeys(add_precision(name, args.precision) for name in args.systems or default))
    if not real and (asked := [name for name in args.systems if SYSTEMS[name].code == "blog"]):
        parser.error(f"{asked[0]} needs --sesame-csm and --sesame-finetune, or take padded")
    return args


def record_rows(args: argparse.Namespace, rows: list[Row], started: str) -> list[Row]:
    """Complete the rows that have figures, and append them to the results."""
    some = [row for row in rows if "median_s" in row or args.memory_only]
    for row in some:
        row.update(run=started, shape=args.shape, allocator=args.allocator, checkpointing=args.checkpointing)
        row["data"] = "synthetic" if args.synthetic else "recordings"
        row["sesame_model"] = SYSTEMS[row["system"]].code == "blog"
        append_row(args.results, "compare", row)
    return some


class Ended(Exception):
    """A signal ends the comparison."""


def _end(number: int, _: Any) -> None:
    signal.signal(number, signal.SIG_DFL)
    raise Ended(signal.Signals(number).name)


def compare_systems(args: argparse.Namespace, started: str, rows: list[Row]) -> int:
    """Add the rows of all systems to ``rows`` as they are finished. The exit status."""
    try:
        truth = Worker(args, "reference").about
    except Stopped as error:
        print(f"error: {error}; its messages are above", file=sys.stderr)
        return 1
    alone = [name for name in args.systems if runs_alone(args, name)]
    groups = [[name for name in args.systems if name not in alone], *([name] for name in alone)]
    status = 0
    while groups:
        names = groups.pop(0)
        race = Race(args, truth, lambda some: rows.extend(record_rows(args, some, started)))
        race.run(names)
        for name, why in race.lost.items():
            if any(row["system"] == name for row in race.rows):
                print(f"{why}; what was measured before counts", file=sys.stderr)
            elif len(names) > 1:  # perhaps the others had the memory
                print(f"{why}; it will be tried again without the others", file=sys.stderr)
                groups.append([name])
            else:
                print(f"error: {why}; its messages are above", file=sys.stderr)
                status = 1
    return status


def main() -> int:
    args = parse_arguments()
    if args.worker:
        answer_questions(args)
        return 0
    started = start_time()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)
    rows: list[Row] = []
    try:
        status = compare_systems(args, started, rows)
    except Ended as why:
        print(f"error: ended by {why}; what was measured is shown and recorded", file=sys.stderr)
        status = 1
    if rows:
        print_tables(rows)
    return status


if __name__ == "__main__":
    sys.exit(main())
