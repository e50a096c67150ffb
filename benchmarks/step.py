"""Forward and backward of a training epoch: csm_fast against the published forward and transformers, in one run.

    python -m benchmarks.step --data demo/tokens --sesame-csm ../csm --sesame-finetune ../sesame-finetune
    python -m benchmarks.step --synthetic 200 --device cuda --shape csm-1b

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
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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
from csm_fast.optim import TableGradients
from csm_fast.packing import pack_padded
from csm_fast.token_store import open_split

Run = Callable[[], list[float]]


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


def race(systems: dict[str, Run], repeats: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of each system's pass, interleaved, and its peak of CUDA memory; one pass each beforehand warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    peaks: dict[str, int] = {}
    for name, run in systems.items():
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        run()
        peaks[name] = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    for _ in range(repeats):
        for name, run in systems.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return seconds, peaks


def on(batch: Any, device: torch.device) -> Any:
    return tuple(x.to(device) for x in batch) if isinstance(batch, tuple) else batch.to(device)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="demo/tokens")
    parser.add_argument("--synthetic", type=int, metavar="N", help="N random recordings take the place of --data")
    parser.add_argument("--sesame-csm", type=Path)
    parser.add_argument("--sesame-finetune", type=Path)
    parser.add_argument("--share", type=float, default=1.0, help="share of the recordings, evenly over their lengths")
    parser.add_argument("--middle", type=int, metavar="N", help="only the N recordings of middle length: one batch")
    parser.add_argument("--shape", choices=["small", "csm-1b"], default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", choices=["auto", "on", "off"], default="auto", help="csm_fast's layers")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--systems", nargs="+", default=["csm_fast", "blog", "transformers"])
    parser.add_argument("--results", type=Path)
    return parser.parse_args()


def models_of(args: argparse.Namespace, config: CSMConfig) -> dict[str, Any]:
    """Each system's model with the same weights, in bf16."""
    ours: Any = CSM(config).init_weights(0).to(torch.bfloat16)
    models: dict[str, Any] = {"csm_fast": ours}
    if "blog" in args.systems:
        blog: Any = CSM(config)
        forward: Any = baselines.blog_forward
        if args.sesame_csm:
            sesame = parity.sesame_models(args.sesame_csm)
            blog = parity.sesame_model(sesame, config)
            if args.sesame_finetune:
                forward = parity.finetune_forward(args.sesame_finetune, sesame)
        blog.to(torch.bfloat16).load_state_dict(ours.state_dict())
        blog.decoder_loss_weight = 0.5
        models["blog"] = baselines.bind(blog, forward)
    if "transformers" in args.systems:
        models["transformers"] = baselines.transformers_model(config, ours.state_dict())
    return {name: model.to(args.device) for name, model in models.items()}


def main() -> int:
    # As csm-fast-train does; it serves every system here.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")
    args = arguments()
    device = torch.device(args.device)
    config = CSMConfig.small() if args.shape == "small" else CSMConfig.csm_1b()
    store: Any = Synthetic(args.synthetic, config) if args.synthetic else open_split(args.data, "train")
    by_length = np.argsort(store.conversation_rows, kind="stable")
    chosen = by_length[:: max(1, round(1 / args.share))].tolist()
    if args.middle:
        first = (len(chosen) - args.middle) // 2
        chosen = chosen[first : first + args.middle]
    subset = Subset(store, chosen)
    models = models_of(args, config)
    ours = models["csm_fast"]
    compiled = compile_layers(ours, args.compile)
    losses: dict[str, Any] = {
        "blog": lambda model, batch: model(*batch),
        "transformers": lambda model, batch: baselines.transformers_loss(model, *batch),
    }
    rows = int(store.conversation_rows[chosen].sum())
    print(f"{len(chosen)} recordings, {rows:,} rows, {torch.get_num_threads()} threads, {args.repeats} repetitions")

    def ours_on(packs: list[Any]) -> Run:
        packs = [pack.to(device) for pack in packs]
        return over(ours, packs, lambda pack: packed_loss(ours, pack, 0.5, 0.5)[0], TableGradients(ours))

    section = DataSection(batch_rows=2048, pack_rows=2048)
    packer = Packer(subset, section, LossSection(), pad=device.type)
    free = [p for i in range(packer.steps_in_epoch(0)) for p in packer.step(0, i).packs]
    systems: dict[str, Run] = {}
    for size in args.batches:
        batches = [padded(subset, members) for members in buckets(subset, size)]
        packs = []
        for i, batch in enumerate(batches):
            torch.manual_seed(i)
            packs.append(pack_padded(*batch, 1 / 16))
        for name in args.systems:
            model = models[name]
            if name == "csm_fast":
                systems[f"csm_fast, the same {size}"] = ours_on(packs)
            else:
                on_device = [on(batch, device) for batch in batches]
                systems[f"{name}, buckets of {size}"] = over(model, on_device, partial(losses[name], model))
    systems["csm_fast, packs of 2,048 rows"] = ours_on(free)
    seconds, peaks = race(systems, args.repeats)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{'':36} {'median s':>9} {'min':>7} {'max':>7} {'rows/s':>8}  csm_fast is faster by")
    for name, values in seconds.items():
        same = next((m for n, m in medians.items() if n == f"csm_fast, the same {name.split()[-1]}"), None)
        free_time = medians["csm_fast, packs of 2,048 rows"]
        ratio = ""
        if same is not None and not name.startswith("csm_fast"):
            ratio = f"{medians[name] / same:.2f} at equal updates, {medians[name] / free_time:.2f} freely packed"
        spread = f"{medians[name]:9.2f} {min(values):7.2f} {max(values):7.2f}"
        peak = f"  peak {peaks[name] / 2**30:.2f} GiB" if peaks[name] else ""
        print(f"{name:36} {spread} {rows / medians[name]:8,.0f}  {ratio}{peak}")
        if args.results:
            row = {"benchmark": "step", "system": name, "seconds": values, "median_s": medians[name], "rows": rows}
            setting = {"recordings": len(chosen), "shape": args.shape, "precision": "bf16 weights"}
            setting.update(data="synthetic" if args.synthetic else "recordings", compiled=compiled)
            setting.update(sesame_model=bool(args.sesame_csm), peak_bytes=peaks[name] or None)
            append(args.results, {**row, **setting, **environment()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
