"""The systems of ``benchmarks.compare``, each as its users run it, and what a process of one of them
answers."""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from csm_kernels.cpu import native
from torch import Tensor, nn

from benchmarks import parity
from benchmarks.common import baselines
from benchmarks.common.products import matmul_rate, products, step_flops
from benchmarks.common.record import environment
from benchmarks.common.tracked import Tracked
from benchmarks.compare.data import Subset, asked_for, buckets, every_token_has_a_gradient, padded
from benchmarks.compare.systems import SYSTEMS, WIDE, keeps_memory
from csm_fast import CSM, CSMConfig, ops
from csm_fast.config.train import AdapterSection, DataSection, LossSection, OptimizerSection
from csm_fast.model.compile import compile_layers
from csm_fast.model.loss import packed_loss
from csm_fast.packing.loader import Packer
from csm_fast.packing.pack import Pack, pack_padded
from csm_fast.system.device import keep_freed_memory
from csm_fast.train.optim.build import clip, gradient_norm, make_optimizer

SHAPES = {"tiny": CSMConfig.tiny, "small": CSMConfig.small, "csm-1b": CSMConfig.csm_1b}
HEADS = 5.0  # widens the heads


def free_label(rows: int) -> str:
    return f"packs of {rows:,} rows"


def start(config: CSMConfig, device: torch.device, dtype: torch.dtype) -> CSM:
    """Random weights whose loss depends on every part: with heads as small as at the start of a training from scratch,
    any model's loss is the logarithm of the vocabulary. The same on the same device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = CSM(config).init_weights(0, on_device=True)
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for head in (model.codebook0_head.weight, model.audio_head):
            head.mul_(HEADS)
    return model


class Running:
    """A system with its model and its passes over the recordings.

    ``passes`` maps a label to its batches; a batch is a ``Pack`` for csm_fast and (tokens, tokens_mask) for the others.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.system = args, SYSTEMS[args.worker]
        self.device, self.config = torch.device(args.device), SHAPES[args.shape]()
        if keeps_memory(args, args.worker) and self.device.type == "cpu":
            keep_freed_memory()
        if self.system.operators:
            self.form = contextlib.ExitStack()  # for as long as this is there
            self.form.enter_context(native.left_out())
            self.form.enter_context(ops.using("torch"))
        self.subset = asked_for(args, self.config)
        self.model = self._model()
        self.compiled = self.system.compiled and compile_layers(self.model, "on")
        if args.checkpointing:
            self._checkpoint()
        self.passes = self._passes()
        self.longest: dict[str, float] = {}  # seconds of each label's longest batch
        self.timed: dict[str, list[tuple[int, float]]] = {}  # rows and seconds of a part, until all pieces are run
        self.release()

    # ------------------------------------------------------------------------------------------------------- building

    def _model(self) -> Any:
        """The same random weights for everyone."""
        args, system = self.args, self.system
        ours: Any = start(self.config, self.device, system.weights)
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

    def _passes(self) -> dict[str, list[Any]]:
        passes: dict[str, list[Any]] = {}
        for size in self.args.batches:
            batches: list[Any] = [self._there(padded(self.subset, some)) for some in buckets(self.subset, size)]
            if self.system.code == "csm_fast":
                batches = [self._packed(batch, i) for i, batch in enumerate(batches)]
            passes[f"batches of {size}"] = batches
        if self.system.code == "csm_fast" and not self.args.checkpointing and not self.args.middle:
            rows = self.args.pack_rows
            section = DataSection(batch_rows=rows, pack_rows=rows)
            packer = Packer(self.subset, section, LossSection(), pad=self.device.type)
            packs = [p for i in range(packer.steps_in_epoch(0)) for p in packer.step(0, i).packs]
            passes[free_label(rows)] = [pack.to(self.device) for pack in packs]
        return passes

    def _packed(self, batch: tuple[Tensor, Tensor], seed: int) -> Pack:
        torch.manual_seed(seed)
        return pack_padded(*batch, fraction=self.system.fraction)

    def _there(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return batch[0].to(self.device), batch[1].to(self.device)

    # -------------------------------------------------------------------------------------------------------- running

    def loss(self, batch: Any) -> Tensor:
        around = torch.autocast(self.device.type, torch.bfloat16) if self.system.autocast else contextlib.nullcontext()
        with around:
            if self.system.code == "csm_fast":
                return packed_loss(self.model, batch, *self.system.coefficients)[0]
            tokens, mask = batch
            if self.system.code == "transformers":
                return baselines.transformers_loss(self.model, tokens, mask, self.system.fraction)
            return self.model(tokens, mask)

    def backward(self, batch: Any, seed: int) -> Tensor:
        """The loss after its backward pass; the gradients stay."""
        # Not torch.manual_seed: without a GPU it writes down the stack for the day that one is there, 0.5 ms.
        seed_with = torch.manual_seed if self.device.type == "cuda" else torch.default_generator.manual_seed
        seed_with(seed)
        value = self.loss(batch)
        value.backward()
        return value.detach()

    def drop_gradients(self) -> None:
        """As a step does after its update."""
        self.model.zero_grad(set_to_none=True)

    def run(self, label: str, share: float = 1.0, piece: int = 0, pieces: int = 1) -> float:
        """Seconds of one pass, forward and backward of every batch, gradients dropped in between.

        Args:
            share: of the batches, for warming up.
            piece, pieces: those of every ``pieces``-th batch only, from the ``piece``-th on.
        """
        self._take_memory(self.passes[label])
        started = time.perf_counter()
        losses = []
        for i, batch in list(enumerate(self.passes[label][:: round(1 / share)]))[piece::pieces]:
            losses.append(self.backward(batch, i))
            self.drop_gradients()
        torch.stack(losses).tolist()  # waits for the device
        return time.perf_counter() - started

    def run_part(self, label: str, part: int, parts: int, longest: bool, piece: int = 0, pieces: int = 1) -> float:
        """Seconds of one pass from a part of its batches: of those by falling length, the longest set aside, ``part``,
        ``part + parts`` and so on. What the rest takes lies on a straight line over the rows that they lay out.

        Args:
            part, parts: part 0 comes first.
            longest: whether part 0 also runs the longest batch, which may be half of all rows; its time is everybody's.
                Without, it lies on the line too, which is in favour of who takes more for a row of longer batches.
            piece, pieces: of the part's batches; the last piece tells the seconds of all, those before it tell 0.
        """
        first, *others = sorted(self.passes[label], key=self._laid_out, reverse=True)
        if longest and part == 0 and piece == 0:
            self._take_memory([first])
            self.longest[label] = self._seconds(first)
        chosen = others[part::parts][piece::pieces]
        self._take_memory(chosen)
        timed = self.timed.pop(label, []) if piece else []
        timed += [(self._laid_out(batch), self._seconds(batch)) for batch in chosen]
        if piece + 1 < pieces:
            self.timed[label] = timed
            return 0.0
        rows, seconds = [n for n, _ in timed], [s for _, s in timed]
        rest = [self._laid_out(batch) for i, batch in enumerate(others) if i % parts != part]
        if not longest:
            rest.append(self._laid_out(first))
        return sum(seconds) + sum(on_a_line(rows, seconds, rest)) + (self.longest[label] if longest else 0.0)

    def _take_memory(self, batches: list[Any]) -> None:
        """As in the middle of an epoch: on CUDA there is none after ``release``."""
        if self.device.type == "cuda":
            self.backward(max(batches, key=self._laid_out), 0)
            self.drop_gradients()
            self._wait()

    def release(self) -> None:
        """Gives a GPU's memory back that nothing is in, for the others that wait for their turns on it."""
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def _seconds(self, batch: Any) -> float:
        started = time.perf_counter()
        self.backward(batch, 0).item()  # waits for the device
        self.drop_gradients()
        return time.perf_counter() - started

    def optimizer_seconds(self, label: str, repeats: int = 3) -> float:
        """Median seconds of an AdamW update with clipping, each after a backward pass of its own: csm_fast's as its
        trainer calls it, for the others PyTorch's fused one on the weights as they are. As after an epoch, every token
        of the recordings has had a gradient."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        own = self.system.code == "csm_fast"
        if own:
            weights = "fp32" if self.system.autocast or self.system.weights == WIDE else "bf16-stochastic"
            optimizer: Any = make_optimizer(self.model, OptimizerSection(weights=weights), 0)  # type: ignore[arg-type]
            optimizer.found_inf = torch.zeros((), device=self.device)
        else:
            optimizer = torch.optim.AdamW(trained, fused=True)
        for group in optimizer.param_groups:
            group["lr"] = 0.0  # the weights stay those of the comparison
            group["weight_decay"] = 0.0
        if own:
            every_token_has_a_gradient(self.model, self.passes[label])
            optimizer.step()
            self.model.zero_grad(set_to_none=True)
        batch, timed = self.passes[label][len(self.passes[label]) // 2], []
        for i in range(repeats + 1):
            self.backward(batch, i)
            # A GPU is still at the backward pass, as in a step, while the host launches the update.
            ended = self._clock()
            if own:
                clip(optimizer, 1.0, gradient_norm(trained))
            else:
                nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            timed.append(ended())
            self.drop_gradients()
        return statistics.median(timed[1:])

    def memory(self, label: str) -> dict[str, int]:
        """Bytes of a forward and backward pass of the label's middle batch: the most at once, and that without weights
        and gradients. On a CPU tensors are counted, on CUDA what the allocator reports. Empty for what is compiled on
        a CPU: what the compiler's code allocates is not seen."""
        if self.compiled and self.device.type == "cpu":
            return {}
        batch = self.passes[label][len(self.passes[label]) // 2]
        self.backward(batch, 0)
        self.drop_gradients()
        gc.collect()
        weights = _bytes(self.model.parameters())
        if self.device.type == "cuda":
            self._wait()
            torch.cuda.reset_peak_memory_stats()
            self.backward(batch, 0)
            self._wait()
            gradients = _bytes(p.grad for p in self.model.parameters())
            peak = torch.cuda.max_memory_allocated()
            figures = {"peak": peak, "besides": peak - weights - gradients, "gradients": gradients}
        else:
            with Tracked() as tracked:
                self.backward(batch, 0)
            held = [p.grad for p in self.model.parameters() if p.grad is not None]
            born = {tracked.record_of(grad) for grad in held}
            besides, _ = tracked.peak_of(lambda a: a.order not in born)
            figures = {"peak": weights + tracked.peak, "besides": besides, "gradients": _bytes(held)}
        self.drop_gradients()
        return {**figures, "weights": weights, "rows": self._rows(batch)}

    @staticmethod
    def _laid_out(batch: Any) -> int:
        """Rows with padding."""
        return batch.tokens.shape[0] if isinstance(batch, Pack) else batch[0][..., 0].numel()

    def _rows(self, batch: Any) -> int:
        return batch.rows if isinstance(batch, Pack) else int(batch[1].any(-1).sum())

    def rate(self, label: str) -> float:
        """FLOP/s of the matrix products of the label's middle batch, one by one, in the precision of the comparison."""
        batch = self.passes[label][len(self.passes[label]) // 2]
        dtype = torch.bfloat16 if self.args.precision == "bf16" else torch.float32
        return matmul_rate(products(self.config, batch), self.device, dtype)

    def about(self) -> dict[str, Any]:
        labels = {}
        for label, batches in self.passes.items():
            ours = self.system.code == "csm_fast"
            flops = sum(step_flops(self.config, pack) for pack in batches) if ours else 0
            laid_out = sum(map(self._laid_out, batches))
            labels[label] = {"updates": len(batches), "laid_out": laid_out, "flops": flops}
        return {
            "labels": labels,
            "rows": self.subset.rows,
            "frames": self.subset.frames,
            "recordings": self.subset.num_conversations,
            "recipe": self.system.recipe,
            "compiled": bool(self.compiled),
            "environment": environment(),
        }

    def check(self) -> float:
        """The loss of the batch that all are checked on."""
        torch.manual_seed(0)
        batch: Any = self._there(padded(self.subset, check_members(self.subset)))
        if self.system.code == "csm_fast":
            batch = self._packed(batch, 0)
        with torch.no_grad():
            torch.manual_seed(0)
            return float(self.loss(batch))

    def _clock(self) -> Callable[[], float]:
        """What tells, when it is all done, the seconds from here to where it is asked; a GPU's own."""
        if self.device.type != "cuda":
            started = time.perf_counter()
            return lambda: time.perf_counter() - started
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()

        def seconds() -> float:
            end.record()
            self._wait()
            return begin.elapsed_time(end) / 1e3

        return seconds

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def on_a_line(rows: list[int], seconds: list[float], others: list[int]) -> list[float]:
    """Seconds of batches of other rows: by least squares, or in proportion where all are about as long."""
    if max(rows) < 1.5 * min(rows):
        return [n * sum(seconds) / sum(rows) for n in others]
    slope, start = np.polyfit(rows, seconds, 1)
    return [float(start + slope * n) for n in others]


def check_members(subset: Subset) -> list[int]:
    """Some recordings of middle length: frames enough for a sixteenth of them."""
    groups = buckets(subset, min(16, subset.num_conversations))
    return groups[len(groups) // 2]


def reference(args: argparse.Namespace) -> dict[str, float]:
    """CE0 and CEd of the checked batch in float32 by the padded forward, with a sixteenth of the frames and with all,
    as the systems that are asked for need them. Weights are theirs: float32 ones, or rounded to bf16."""
    config, device = SHAPES[args.shape](), torch.device(args.device)
    subset = asked_for(args, config)
    batch = [x.to(device) for x in padded(subset, check_members(subset))]
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        fractions = sorted({SYSTEMS[name].fraction for name in args.systems if SYSTEMS[name].weights == dtype})
        if not fractions:
            continue
        model: Any = start(config, device, dtype).float()
        for part, weight, fraction in [("ce0", 0.0, 1 / 16), *((f"ced{' all' * (f == 1)}", 1.0, f) for f in fractions)]:
            model.decoder_loss_weight, model.amortization_fraction = weight, fraction
            torch.manual_seed(0)
            with torch.no_grad():
                found[f"{part} {dtype}"] = float(baselines.blog_forward(model, *batch))
        del model
    return found


def expected(name: str, found: dict[str, float]) -> float:
    """The float32 value of a system's loss, from ``reference``."""
    system = SYSTEMS[name]
    a, b = system.coefficients
    frames = " all" if system.fraction == 1 else ""
    return a * found[f"ce0 {system.weights}"] + b * found[f"ced{frames} {system.weights}"]


def _bytes(tensors: Iterable[Tensor | None]) -> int:
    """Of their storages, each counted once."""
    there = [t for t in tensors if t is not None]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in there}.values())


def answers(running: Running) -> dict[str, Callable[..., Any]]:
    """What a worker is asked for, by name."""
    return {
        "run": running.run,
        "run_part": running.run_part,
        "check": running.check,
        "memory": running.memory,
        "optimizer": running.optimizer_seconds,
        "rate": running.rate,
    }
