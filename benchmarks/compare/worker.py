"""A system of ``benchmarks.compare`` as its users run it, and the process that answers questions about it."""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import signal
import statistics
import sys
from typing import Any

import numpy as np
import torch
from csm_kernels.cpu import native
from torch import Tensor, nn

from benchmarks import parity
from benchmarks.common import baselines
from benchmarks.common.device import time_call, wait
from benchmarks.common.products import matmul_rate, products, step_flops
from benchmarks.common.record import environment
from benchmarks.common.tracked import Tracked, storage_bytes
from benchmarks.compare.data import bucket_conversations, fill_table_gradients, open_recordings, pad_conversations
from benchmarks.compare.reference import check_members, compute_reference, make_model
from benchmarks.compare.systems import SYSTEMS, WIDE, keeps_memory
from csm_fast import ops
from csm_fast.config.shape import NAMED_SHAPES
from csm_fast.config.train import AdapterSection, DataSection, LossSection, OptimizerSection
from csm_fast.model.compile import compile_layers
from csm_fast.model.loss import packed_loss
from csm_fast.packing.loader import Packer
from csm_fast.packing.pack import Pack, pack_padded
from csm_fast.system.device import keep_freed_memory
from csm_fast.train.optim.build import make_optimizer
from csm_fast.train.optim.clipping import clip_gradients, gradient_norm


def answer_questions(args: argparse.Namespace) -> None:
    """The process of ``args.worker``: say what it is, then answer one question per line, a method of ``Running``."""
    # What libraries print, C code included, goes to the standard error: it is no answer.
    out, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr
    os.dup2(2, 1)

    def answer(value: Any) -> None:
        print(json.dumps(value), file=out, flush=True)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asks closes the standard input
    if args.worker == "reference":
        answer(compute_reference(args))
        return
    running = Running(args)
    answer(running.about())
    for line in sys.stdin:
        what, *arguments = json.loads(line)
        try:
            value = getattr(running, what)(*arguments)
        except torch.OutOfMemoryError as error:
            first = str(error).splitlines()[0]
            print(f"{args.worker}, {what}: {first}", file=sys.stderr)
            value = None
        if value is None:  # outside of the handler, whose traceback holds the tensors
            running.drop_gradients()
        running.release()
        answer(value)


class Running:
    """A system with its model and its passes over the recordings.

    ``passes`` maps a label to its batches; a batch is a ``Pack`` for csm_fast and (tokens, tokens_mask) for the others.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.system = args, SYSTEMS[args.worker]
        self.device, self.config = torch.device(args.device), NAMED_SHAPES[args.shape]()
        if keeps_memory(args, args.worker) and self.device.type == "cpu":
            keep_freed_memory()
        if self.system.operators:
            self.form = contextlib.ExitStack()  # holds as long as this object lives
            self.form.enter_context(native.left_out())
            self.form.enter_context(ops.using("torch"))
        self.recordings = open_recordings(args, self.config)
        self.model = self._make_model()
        self.compiled = self.system.compiled and compile_layers(self.model, "on")
        if args.checkpointing:
            self._checkpoint()
        self.passes = self._make_passes()
        self.longest: dict[str, float] = {}  # seconds of each label's longest batch
        self.timed: dict[str, list[tuple[int, float]]] = {}  # rows and seconds of a part, until all pieces are run
        self.release()

    # ------------------------------------------------------------------------------------------------------- building

    def _make_model(self) -> Any:
        """The system's model; the random weights are the same in every system."""
        args, system = self.args, self.system
        ours: Any = make_model(self.config, self.device, system.weights)
        if system.code == "csm_fast":
            if system.method != "full":
                from csm_fast.model.adapters import attach

                section = AdapterSection(method=system.method)  # type: ignore[arg-type]
                attach(ours, section, compute_dtype=torch.bfloat16, base_hash="not asked for")
            return ours.to(self.device)  # its adapters
        if system.code == "transformers":
            return baselines.transformers_model(self.config, ours.state_dict())
        theirs: Any = ours
        forward: Any = baselines.blog_forward
        if system.code == "blog":
            sesame = parity.sesame_models(args.sesame_csm)
            theirs = parity.sesame_model(sesame, self.config).to(system.weights)
            theirs.load_state_dict(ours.state_dict())
            forward = parity.finetune_forward(args.sesame_finetune, sesame)
        theirs.decoder_loss_weight, theirs.amortization_fraction = 0.5, system.fraction
        return baselines.bind(theirs.to(self.device), forward)

    def _checkpoint(self) -> None:
        if self.system.code == "transformers":
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
            self.model.train()
        elif self.system.code == "csm_fast":
            self.model.activation_checkpointing = "full"
        else:
            raise SystemExit(f"error: {self.args.worker} has no activation checkpointing; leave it out of --systems")

    def _make_passes(self) -> dict[str, list[Any]]:
        passes: dict[str, list[Any]] = {}
        for size in self.args.batches:
            groups = bucket_conversations(self.recordings, size)
            passes[f"batches of {size}"] = [self._make_batch(members, i) for i, members in enumerate(groups)]
        if self.system.code == "csm_fast" and not self.args.checkpointing and not self.args.middle:
            rows = self.args.pack_rows
            section = DataSection(batch_rows=rows, pack_rows=rows)
            packer = Packer(self.recordings, section, LossSection(), pad=self.device.type)
            packs = [p for i in range(packer.steps_in_epoch(0)) for p in packer.step(0, i).packs]
            passes[f"packs of {rows:,} rows"] = [pack.to(self.device) for pack in packs]
        return passes

    def _make_batch(self, members: list[int], seed: int) -> Any:
        tokens, mask = (x.to(self.device) for x in pad_conversations(self.recordings, members))
        if self.system.code != "csm_fast":
            return tokens, mask
        torch.manual_seed(seed)
        return pack_padded(tokens, mask, fraction=self.system.fraction)

    # ------------------------------------------------------------------------------------------------------- answering

    def about(self) -> dict[str, Any]:
        labels = {}
        for label, batches in self.passes.items():
            ours = self.system.code == "csm_fast"
            flops = sum(step_flops(self.config, pack) for pack in batches) if ours else 0
            laid_out = sum(map(self._laid_out, batches))
            labels[label] = {"updates": len(batches), "laid_out": laid_out, "flops": flops}
        some = self.recordings
        about = {"rows": some.rows, "frames": some.frames, "recordings": some.num_conversations, "labels": labels}
        about |= {"recipe": self.system.recipe, "compiled": bool(self.compiled)}
        return {**about, "environment": environment()}

    def check(self) -> float:
        """The loss of the batch that all are checked on."""
        batch = self._make_batch(check_members(self.recordings), 0)
        with torch.no_grad():
            torch.manual_seed(0)
            return float(self.loss(batch))

    def run(self, label: str, share: float = 1.0, piece: int = 0, pieces: int = 1) -> float:
        """Seconds of one pass, forward and backward of every batch, gradients dropped in between.

        Args:
            share: of the batches, for warming up.
            piece, pieces: those of every ``pieces``-th batch only, from the ``piece``-th on.
        """
        self._take_memory(self.passes[label])
        chosen = list(enumerate(self.passes[label][:: round(1 / share)]))[piece::pieces]

        def run_all() -> None:
            for i, batch in chosen:
                self._step(batch, i)

        return time_call(run_all, self.device)

    def run_part(self, label: str, part: int, parts: int, longest: bool, piece: int = 0, pieces: int = 1) -> float:
        """Seconds of one pass, estimated from a part of its batches: of all but the longest, sorted by falling length,
        ``part``, ``part + parts`` and so on. The seconds of the rest are on a straight line over their rows.

        Args:
            part, parts: part 0 comes first.
            longest: part 0 also runs the longest batch, which may be half of all rows; its time counts in every part.
                Without it, the longest batch is on the line, too, which favours systems whose time per row grows.
            piece, pieces: of the part's batches; the last piece returns the seconds of all, those before it return 0.
        """
        first, *others = sorted(self.passes[label], key=self._laid_out, reverse=True)
        if longest and part == 0 and piece == 0:
            self._take_memory([first])
            self.longest[label] = self._time_step(first)
        chosen = others[part::parts][piece::pieces]
        self._take_memory(chosen)
        timed = self.timed.pop(label, []) if piece else []
        timed += [(self._laid_out(batch), self._time_step(batch)) for batch in chosen]
        if piece + 1 < pieces:
            self.timed[label] = timed
            return 0.0
        rows, seconds = [n for n, _ in timed], [s for _, s in timed]
        rest = [self._laid_out(batch) for i, batch in enumerate(others) if i % parts != part]
        if not longest:
            rest.append(self._laid_out(first))
        return sum(seconds) + sum(extrapolate(rows, seconds, rest)) + (self.longest[label] if longest else 0.0)

    def optimizer_seconds(self, label: str, repeats: int = 3) -> float:
        """Median seconds of an AdamW update with clipping, each after a backward pass of its own: csm_fast's as its
        trainer calls it, the others' PyTorch's fused one on the weights as they are. As after an epoch, every token of
        the recordings has had a gradient."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        own = self.system.code == "csm_fast"
        if own:
            weights = "fp32" if self.system.autocast or self.system.weights == WIDE else "bf16-stochastic"
            optimizer: Any = make_optimizer(self.model, OptimizerSection(weights=weights), 0)  # type: ignore[arg-type]
            optimizer.found_inf = torch.zeros((), device=self.device)
        else:
            optimizer = torch.optim.AdamW(trained, fused=True)
        for group in optimizer.param_groups:
            group["lr"] = group["weight_decay"] = 0.0  # the weights stay those of the comparison
        if own:
            fill_table_gradients(self.model, self.passes[label])
            optimizer.step()
            self.model.zero_grad(set_to_none=True)

        def update() -> None:
            if own:
                clip_gradients(optimizer, 1.0, gradient_norm(trained))
            else:
                nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()

        batch, timed = self._middle(label), []
        for i in range(repeats + 1):
            self.backward(batch, i)
            # As in a step, a GPU still computes the backward pass while the host launches the update.
            timed.append(time_call(update, self.device))
            self.drop_gradients()
        return statistics.median(timed[1:])

    def memory(self, label: str) -> dict[str, int]:
        """Bytes of a forward and backward pass of the label's middle batch: the peak, and the peak without weights and
        gradients. On a CPU tensors are counted, on CUDA what the allocator reports. Empty for compiled layers on a CPU,
        whose allocations cannot be followed."""
        if self.compiled and self.device.type == "cpu":
            return {}
        batch = self._middle(label)
        self._step(batch, 0)
        gc.collect()
        weights = storage_bytes(self.model.parameters())
        if self.device.type == "cuda":
            wait(self.device)
            torch.cuda.reset_peak_memory_stats()
            self.backward(batch, 0)
            wait(self.device)
            gradients = storage_bytes(p.grad for p in self.model.parameters())
            peak = torch.cuda.max_memory_allocated()
            besides = peak - weights - gradients
        else:
            with Tracked() as tracked:
                self.backward(batch, 0)
            held = [p.grad for p in self.model.parameters() if p.grad is not None]
            born = {tracked.record_of(grad) for grad in held}
            besides, _ = tracked.peak_of(lambda a: a.order not in born)
            peak, gradients = weights + tracked.peak, storage_bytes(held)
        self.drop_gradients()
        figures = {"peak": peak, "besides": besides, "gradients": gradients, "weights": weights}
        return {**figures, "rows": batch.rows if isinstance(batch, Pack) else int(batch[1].any(-1).sum())}

    def rate(self, label: str) -> float:
        """FLOP/s of the matrix products of the label's middle batch, one by one, in the precision of the comparison."""
        dtype = torch.bfloat16 if self.args.precision == "bf16" else torch.float32
        return matmul_rate(products(self.config, self._middle(label)), self.device, dtype)

    # --------------------------------------------------------------------------------------------------------- running

    def loss(self, batch: Any) -> Tensor:
        around = torch.autocast(self.device.type, torch.bfloat16) if self.system.autocast else contextlib.nullcontext()
        with around:
            if self.system.code == "csm_fast":
                return packed_loss(self.model, batch, *self.system.coefficients)[0]
            if self.system.code == "transformers":
                tokens, mask = batch
                return baselines.transformers_loss(self.model, tokens, mask, self.system.fraction)
            return self.model(*batch)

    def backward(self, batch: Any, seed: int) -> None:
        """A forward and a backward pass; the gradients stay."""
        # Not torch.manual_seed: without a GPU it formats the stack for a later CUDA initialisation, 0.5 ms.
        seed_with = torch.manual_seed if self.device.type == "cuda" else torch.default_generator.manual_seed
        seed_with(seed)
        self.loss(batch).backward()

    def drop_gradients(self) -> None:
        """As a step does after its update."""
        self.model.zero_grad(set_to_none=True)

    def release(self) -> None:
        """Free a GPU's unused memory for the systems whose turn is next."""
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def _step(self, batch: Any, seed: int) -> None:
        self.backward(batch, seed)
        self.drop_gradients()

    def _time_step(self, batch: Any) -> float:
        return time_call(lambda: self._step(batch, 0), self.device)

    def _take_memory(self, batches: list[Any]) -> None:
        """Allocate a GPU's memory as in the middle of an epoch: after ``release`` nothing is left of it."""
        if self.device.type == "cuda":
            self._step(max(batches, key=self._laid_out), 0)
            wait(self.device)

    def _middle(self, label: str) -> Any:
        return self.passes[label][len(self.passes[label]) // 2]

    @staticmethod
    def _laid_out(batch: Any) -> int:
        """Rows with padding."""
        return batch.tokens.shape[0] if isinstance(batch, Pack) else batch[0][..., 0].numel()


def extrapolate(rows: list[int], seconds: list[float], others: list[int]) -> list[float]:
    """Seconds of batches of other rows: by least squares, or in proportion where all are about as long."""
    if max(rows) < 1.5 * min(rows):
        return [n * sum(seconds) / sum(rows) for n in others]
    slope, start = np.polyfit(rows, seconds, 1)
    return [float(start + slope * n) for n in others]
