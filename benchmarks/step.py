"""Forward and backward of a training epoch: csm_fast against the published forward and transformers, in one run.

    python -m csm_fast.demo_data corpus --sounds
    csm-fast pretokenize --train-data corpus/metadata.json --codec offline --output corpus/tokens
    python -m benchmarks.step --data corpus/tokens --sesame-csm ../csm --sesame-finetune ../sesame-finetune

    python -m benchmarks.step --synthetic 200 --device cuda --shape csm-1b

Every system runs in a process of its own, one at a time, as its users would run it: csm_fast as ``csm-fast-train`` sets
its process up (on a CPU it keeps freed memory, in huge pages), the others in plain PyTorch; a process that runs all of
them would lend each the heap that the others leave. ``--allocator`` gives everybody the one or the other.

Every system sees the same recordings, weights (random) and, at equal updates, the same frames. Equal updates: batches
of 8, then 32 recordings; the others pad buckets of similar length, csm_fast packs the same recordings. Free packing:
csm_fast in packs of 2,048 rows, the others in their buckets. The optimizer is left out, and batches are built
beforehand for everyone. Repetitions are interleaved; medians are shown.

"blog" is the published forward on Sesame's own ``Model`` (``--sesame-csm``, see benchmarks/parity.py for what that
needs) or, without it, in our words on our modules. Recipe: weights in bf16 for every system, softmax in float32 for
csm_fast (the others follow their own code).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import baselines, parity
from benchmarks.record import append, environment
from csm_fast import CSM, CSMConfig
from csm_fast.compile import compile_layers
from csm_fast.config import DataSection, LossSection
from csm_fast.loader import Packer
from csm_fast.loss import packed_loss
from csm_fast.machine import keep_freed_memory
from csm_fast.optim import TableGradients
from csm_fast.packing import pack_padded
from csm_fast.token_store import open_split

Run = Callable[[], list[float]]
SHAPES = {"tiny": CSMConfig.tiny, "small": CSMConfig.small, "csm-1b": CSMConfig.csm_1b}


@dataclass
class Turn:
    text: np.ndarray
    codes: np.ndarray
    speaker: int = 0


class Synthetic:
    """Random recordings of one turn each, as a store: 1 to 20 s, half of them under 5 s, three words a second."""

    def __init__(self, recordings: int, config: CSMConfig, seed: int = 0):
        rng = np.random.default_rng(seed)
        frames = np.clip(rng.lognormal(np.log(60), 0.6, recordings), 12, 250).astype(int)
        words = np.maximum(3, frames * 0.08 * 3 * 1.3).astype(int)  # 1.3 tokens a word
        codes = [rng.integers(0, config.audio_vocab_size - 3, (n, config.num_codebooks)) for n in frames]
        text = [rng.integers(0, config.text_vocab_size, n) for n in words]
        self.turns = [[Turn(t.astype(np.int32), c.astype(np.uint16))] for t, c in zip(text, codes, strict=True)]
        self.num_codebooks, self.num_conversations, self.path = config.num_codebooks, recordings, "synthetic"
        self.conversation_rows = frames + words + 1

    def conversation(self, i: int) -> Any:
        return self.turns[i]


class Splits:
    """The splits of a folder of tokens, one after the other, as a store: a corpus is both."""

    def __init__(self, data: str, names: list[str]):
        self.stores = [open_split(data, name) for name in names]
        self.num_codebooks, self.path = self.stores[0].num_codebooks, data
        self.conversation_rows = np.concatenate([s.conversation_rows for s in self.stores])
        self.num_conversations = len(self.conversation_rows)

    def conversation(self, i: int) -> Any:
        for store in self.stores:
            if i < store.num_conversations:
                return store.conversation(i)
            i -= store.num_conversations
        raise IndexError(i)


class Subset:
    """Some conversations of a store, as a store."""

    def __init__(self, store: Any, chosen: list[int]):
        self.store, self.chosen = store, chosen
        self.num_codebooks, self.num_conversations, self.path = store.num_codebooks, len(chosen), store.path

    def conversation(self, i: int) -> Any:
        return self.store.conversation(self.chosen[i])

    def turn_lengths(self) -> tuple[np.ndarray, ...]:
        turns = [(i, t) for i in range(len(self.chosen)) for t in self.conversation(i)]
        columns = ([len(t.text) for _, t in turns], [len(t.codes) for _, t in turns], [t.speaker for _, t in turns])
        return *(np.array(c, dtype=np.int64) for c in columns), np.array([i for i, _ in turns])


def padded(store: Subset, members: list[int]) -> tuple[Tensor, Tensor]:
    """tokens, tokens_mask [B, S, K + 1] of some conversations, as Sesame's users collate them."""
    packer = Packer(store, DataSection(), LossSection())
    rows = []
    for i in members:
        (document,) = packer.documents(i)
        tokens, is_audio, _, _ = packer._rows(document)
        mask = np.zeros_like(tokens, dtype=bool)
        mask[:, :-1] = is_audio[:, None]
        mask[:, -1] = ~is_audio
        rows.append((torch.from_numpy(tokens).long(), torch.from_numpy(mask)))
    return (
        nn.utils.rnn.pad_sequence([t for t, _ in rows], batch_first=True),
        nn.utils.rnn.pad_sequence([m for _, m in rows], batch_first=True),
    )


def buckets(store: Subset, size: int) -> list[list[int]]:
    """Batches of conversations of similar length."""
    text, frames, _, conversation = store.turn_lengths()
    order = np.argsort(np.bincount(conversation, text + frames + 1), kind="stable").tolist()
    return [order[i : i + size] for i in range(0, len(order), size)]


def over(model: nn.Module, batches: list[Any], loss: Callable[[Any], Tensor], tables: Any = None) -> Run:
    """One pass: forward and backward of each batch, gradients dropped in between. ``tables``: csm_fast's trainer keeps
    the gradients of the embedding tables and clears them; that is part of the time."""

    def run() -> list[float]:
        losses: list[Tensor] = []
        for i, batch in enumerate(batches):
            torch.manual_seed(i)
            with tables or contextlib.nullcontext():
                value = loss(batch)
                value.backward()
            losses.append(value.detach())
            model.zero_grad(set_to_none=True)
            if tables:
                tables.clear(whole=False)
        return torch.stack(losses).tolist()  # waits for the device

    return run


class Worker:
    """A system in a process of its own: its name, its passes by label, and what it answers."""

    def __init__(self, args: argparse.Namespace, system: str):
        variables = dict(os.environ)
        if keeps_memory(args, system):
            variables.update(ONEDNN_PRIMITIVE_CACHE_CAPACITY="8192", THP_MEM_ALLOC_ENABLE="1")
        command = [sys.executable, "-m", "benchmarks.step", *sys.argv[1:], "--worker", system]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables
        )
        self.about = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"error: a system stopped with status {self.process.wait()}; what it said is above")
        return json.loads(line)

    def run(self, label: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(label + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def keeps_memory(args: argparse.Namespace, system: str) -> bool:
    return args.allocator == "kept" or (args.allocator == "own" and system == "csm_fast")


def work(args: argparse.Namespace) -> None:
    """The worker's side: say what there is, then time each pass that is asked for."""
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is no answer
    about, passes = prepare(args)

    def answer(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=answers, flush=True)

    answer({**about, "labels": list(passes)})
    for line in sys.stdin:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        passes[line.strip()]()
        seconds = time.perf_counter() - started
        answer({"seconds": seconds, "peak": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0})


def on(batch: Any, device: torch.device) -> Any:
    return tuple(x.to(device) for x in batch) if isinstance(batch, tuple) else batch.to(device)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="demo/tokens")
    parser.add_argument("--splits", nargs="+", choices=["train", "val"], help="of --data; default: all that are there")
    parser.add_argument("--synthetic", type=int, metavar="N", help="N random recordings take the place of --data")
    parser.add_argument("--sesame-csm", type=Path)
    parser.add_argument("--sesame-finetune", type=Path)
    parser.add_argument("--share", type=float, default=1.0, help="share of the recordings, evenly over their lengths")
    parser.add_argument("--middle", type=int, metavar="N", help="only the N recordings of middle length: one batch")
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", choices=["auto", "on", "off"], default="auto", help="csm_fast's layers")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--systems", nargs="+", default=["csm_fast", "blog", "transformers"])
    parser.add_argument("--allocator", choices=["own", "kept", "plain"], default="own", help="of a CPU's memory")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def splits(args: argparse.Namespace) -> list[str]:
    """Those that are asked for; without a wish, all that the folder holds."""
    return args.splits or [name for name in ("train", "val") if (Path(args.data) / name).is_dir()] or ["train"]


def model_of(args: argparse.Namespace, config: CSMConfig) -> Any:
    """The worker's model, in bf16; every system has the same weights."""
    ours: Any = CSM(config).init_weights(0).to(torch.bfloat16)
    if args.worker == "transformers":
        return baselines.transformers_model(config, ours.state_dict()).to(args.device)
    if args.worker == "csm_fast":
        return ours.to(args.device)
    blog: Any = CSM(config)
    forward: Any = baselines.blog_forward
    if args.sesame_csm:
        sesame = parity.sesame_models(args.sesame_csm)
        blog = parity.sesame_model(sesame, config)
        if args.sesame_finetune:
            forward = parity.finetune_forward(args.sesame_finetune, sesame)
    blog.to(torch.bfloat16).load_state_dict(ours.state_dict())
    blog.decoder_loss_weight = 0.5
    return baselines.bind(blog.to(args.device), forward)


def prepare(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Run]]:
    """Facts about the data, and the worker's passes by label."""
    device = torch.device(args.device)
    if keeps_memory(args, args.worker) and device.type == "cpu":
        keep_freed_memory()
    config = SHAPES[args.shape]()
    store: Any = Synthetic(args.synthetic, config) if args.synthetic else Splits(args.data, splits(args))
    by_length = np.argsort(store.conversation_rows, kind="stable")
    chosen = by_length[:: max(1, round(1 / args.share))].tolist()
    if args.middle:
        first = (len(chosen) - args.middle) // 2
        chosen = chosen[first : first + args.middle]
    subset = Subset(store, chosen)
    model = model_of(args, config)
    compiled = args.worker == "csm_fast" and compile_layers(model, args.compile)
    rows = int(store.conversation_rows[chosen].sum())
    about = {"recordings": len(chosen), "rows": rows, "compiled": compiled, "environment": environment()}
    passes: dict[str, Run] = {}
    for size in args.batches:
        batches = [padded(subset, members) for members in buckets(subset, size)]
        if args.worker == "csm_fast":
            packs = []
            for i, batch in enumerate(batches):
                torch.manual_seed(i)
                packs.append(pack_padded(*batch, 1 / 16))
            passes[f"csm_fast, the same {size}"] = ours_on(model, packs, device)
        else:
            loss = {
                "blog": lambda batch: model(*batch),
                "transformers": lambda batch: baselines.transformers_loss(model, *batch),
            }[args.worker]
            passes[f"{args.worker}, buckets of {size}"] = over(model, [on(batch, device) for batch in batches], loss)
    if args.worker == "csm_fast":
        section = DataSection(batch_rows=2048, pack_rows=2048)
        packer = Packer(subset, section, LossSection(), pad=device.type)
        packs = [p for i in range(packer.steps_in_epoch(0)) for p in packer.step(0, i).packs]
        passes[FREE] = ours_on(model, packs, device)
    return about, passes


FREE = "csm_fast, packs of 2,048 rows"


def ours_on(model: Any, packs: list[Any], device: torch.device) -> Run:
    packs = [pack.to(device) for pack in packs]
    return over(model, packs, lambda pack: packed_loss(model, pack, 0.5, 0.5)[0], TableGradients(model))


def main() -> int:
    args = arguments()
    if args.worker:
        work(args)
        return 0
    workers = {name: Worker(args, name) for name in args.systems}
    labels = {label: worker for worker in workers.values() for label in worker.about["labels"]}
    about = workers[args.systems[0]].about
    rows, recordings = about["rows"], about["recordings"]
    print(f"{recordings} recordings, {rows:,} rows, {torch.get_num_threads()} threads, {args.repeats} repetitions")
    answers: dict[str, list[dict[str, Any]]] = {label: [] for label in labels}
    for repeat in range(args.repeats + 1):
        for label, worker in labels.items():
            answer = worker.run(label)
            if repeat:  # the first pass warms up
                answers[label].append(answer)
    for worker in workers.values():
        worker.close()
    seconds = {label: [a["seconds"] for a in some] for label, some in answers.items()}
    medians = {label: statistics.median(values) for label, values in seconds.items()}
    print(f"{'':36} {'median s':>9} {'min':>7} {'max':>7} {'rows/s':>8}  csm_fast is faster by")
    for label, values in seconds.items():
        same, free = medians.get(f"csm_fast, the same {label.split()[-1]}"), medians.get(FREE)
        ratio = ""
        if same and free and not label.startswith("csm_fast"):
            ratio = f"{medians[label] / same:.2f} at equal updates, {medians[label] / free:.2f} freely packed"
        spread = f"{medians[label]:9.2f} {min(values):7.2f} {max(values):7.2f}"
        peak = max(a["peak"] for a in answers[label])
        memory = f"  peak {peak / 2**30:.2f} GiB" if peak else ""
        print(f"{label:36} {spread} {rows / medians[label]:8,.0f}  {ratio}{memory}")
        if args.results:
            system = labels[label].about
            row = {"benchmark": "step", "system": label, "seconds": values, "median_s": medians[label], "rows": rows}
            setting = {"recordings": recordings, "shape": args.shape, "precision": "bf16 weights"}
            setting.update(data="synthetic" if args.synthetic else "recordings", compiled=system["compiled"])
            setting.update(allocator=args.allocator, sesame_model=bool(args.sesame_csm), peak_bytes=peak or None)
            append(args.results, {**row, **setting, **system["environment"]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
