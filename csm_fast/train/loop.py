"""The training loop: set-up, then steps. It takes a loss function and names no method."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from csm_fast.config.parse import RESOLVED, dump_yaml
from csm_fast.config.train import TrainConfig
from csm_fast.data.statistics import unigram_entropy
from csm_fast.data.token_store import open_split
from csm_fast.evaluate.validation import Validator
from csm_fast.model.compile import compile_layers
from csm_fast.model.csm import CSM
from csm_fast.model.loss import amortized_loss, coefficients
from csm_fast.model.stacks import stack_limit, vocabulary
from csm_fast.packing.layout import StepBatch
from csm_fast.packing.loader import Packer, read_ahead
from csm_fast.report.metrics import METRICS, metrics_line, read_metrics, validation_line
from csm_fast.report.summary import summarize
from csm_fast.system.console import StepProgress
from csm_fast.system.device import compute_dtype, memory_gib, resolve_device, resolve_precision
from csm_fast.system.errors import InputError, is_out_of_memory
from csm_fast.system.files import disk_error, write_text
from csm_fast.system.lock import Lock
from csm_fast.train import checkpoint as ckpt
from csm_fast.train.announce import announce, out_of_memory
from csm_fast.train.optim.build import cast_weights
from csm_fast.train.optim.schedule import peak_learning_rate
from csm_fast.train.run_marker import RunMarker
from csm_fast.train.setup import (
    attach_adapters,
    base_dtypes,
    check_adapter,
    check_data,
    check_position,
    check_precision,
    open_optional_split,
    plan_memory,
    position_identity,
    starting_model,
)
from csm_fast.train.signals import StopSignals
from csm_fast.train.step import LossFunction, Update
from csm_fast.train.window import Window
from csm_fast.weights.load import load_model
from csm_fast.weights.shape import shape_beforehand

log = logging.getLogger("csm_fast")

MOST_SKIPPED = 10  # updates in a row without a finite loss and gradient, after which a run gives up


def train(config: TrainConfig, *, model: CSM | None = None, loss_function: LossFunction | None = None) -> dict:
    """Fine-tune as ``config`` says, or continue the run that ``config.run.output_dir`` holds.

    Args:
        config: everything the run depends on; written resolved into the run directory.
        model: start from this model instead of ``config.model.model`` (ignored when a run is continued).
        loss_function: (model, pack) -> (loss, per-codebook [K]); the amortized loss of ``config.loss`` by default.

    Returns:
        The summary that ends the run (also in ``summary.json``): steps, losses before and after, paths.

    Raises:
        InputError: anything the user can mend.
    """
    try:
        return Trainer(config, model, loss_function).run()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(error, config) from error


class Trainer:
    """One run. ``__init__`` is the set-up, ``run`` the loop, the rest what a step is made of."""

    def __init__(self, config: TrainConfig, model: CSM | None = None, loss_function: LossFunction | None = None):
        self.config = config
        check_adapter(config.adapter)
        config.optimizer.learning_rate = peak_learning_rate(config.optimizer, config.adapter.method)
        self.run_dir = Path(config.run.output_dir).expanduser()
        # 1. Machine.
        if config.run.threads:
            torch.set_num_threads(config.run.threads)
        self.device = resolve_device(config.run.device)
        self.precision = resolve_precision(config.model.precision, self.device)
        check_precision(self.precision, config.optimizer)
        # 2. Data.
        self.store = open_split(config.data.data, "train")
        self.val_store = open_optional_split(config.data.data, "val")
        # 3. Where to start: an interrupted run, or the model that was asked for.
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(error, self.run_dir, "the run directory could not be made") from None
        found = ckpt.checkpoints(self.run_dir)
        if found and not config.run.resume:
            raise InputError(
                f"holds a run already ({found[-1].name})",
                file=self.run_dir,
                mend="choose another --output-dir, or leave out --no-resume to continue it",
            )
        ckpt.check_damage(self.run_dir, found)
        self.state: dict[str, Any] = {"step": 0, "epoch": 0, "index": 0, "best_val_loss": None, "best_step": None}
        self.resumed = found[-1] if found else None
        adapts = config.adapter.method != "full"
        if self.resumed:
            self.state = {k: v for k, v in (ckpt.complete(self.resumed) or {}).items() if k not in ("format", "files")}
            check_position(self.state.get("data", {}), position_identity(config, self.store), self.resumed)
        shape = model.config if model is not None else shape_beforehand(config, self.resumed)
        if shape is not None:
            plan_memory(config, shape, self.store, self.device, self.precision)
            self._lay_out(shape.backbone.max_seq_len)  # before the weights: what cannot be packed is told at once
        if self.resumed and not adapts:
            self.model = load_model(str(self.resumed), dtype=base_dtypes(config, compute_dtype(self.precision)))
        else:
            self.model = model if model is not None else starting_model(config, compute_dtype(self.precision))
        stores = [store for store in (self.store, self.val_store) if store is not None]
        self.record = check_data(self.model, stores, config, self.resumed, is_named=model is None)
        self.state["data"] = position_identity(config, self.store)
        if adapts:
            attach_adapters(self.model, config, compute_dtype(self.precision), self.store, self.resumed, self.device)
        else:
            cast_weights(self.model, config.optimizer)
        for part in config.model.freeze:
            getattr(self.model, part).requires_grad_(False)
        self.model.activation_checkpointing = config.model.activation_checkpointing
        self.model.to(self.device).train()
        self.compiled = compile_layers(self.model, config.model.compile)
        if shape is None:
            self._lay_out(stack_limit(self.model.backbone))
        # 4. Optimizer, loss.
        a, b = coefficients(config.loss, vocabulary(self.model)[0])
        loss_function = loss_function or amortized_loss(a, b)
        self.update = Update(
            self.model,
            config.optimizer,
            self.device,
            self.precision,
            loss_function,
            self.total_steps,
            config.data.seed,
        )
        if self.resumed:
            self.update.load(self.resumed, self.state)
        self.sampler: Any = None
        if config.run.gen_every:
            from csm_fast.train.samples import Sampler

            self.sampler = Sampler(self.model, config, self.run_dir / "samples", self.store)
        # 5. What accumulates on the device until it is logged.
        self.window = Window(vocabulary(self.model)[0], self.device)
        self.uniform = (a + b) * math.log(vocabulary(self.model)[1])
        self.entropy = unigram_entropy(self.store)
        self.stopping: str | None = None

    # ------------------------------------------------------------------------------------------------------ set-up

    def _lay_out(self, limit: int) -> None:
        """The packs of a model that sees ``limit`` positions."""
        config = self.config
        self.packer = Packer(self.store, config.data, config.loss, pad=self.device.type, limit=limit)
        self.total_steps = self._count_steps()
        self.validator = None
        if self.val_store is not None:
            fraction = config.run.val_fraction_frames
            self.validator = Validator(self.val_store, config.data, config.loss, fraction, limit)

    def _count_steps(self) -> int:
        run = self.config.run
        total = 0
        for epoch in range(run.n_epochs):
            total += self.packer.steps_in_epoch(epoch)
            if run.max_steps is not None and total >= run.max_steps:
                return run.max_steps
        return total

    def _blocks(self) -> Iterator[list[StepBatch]]:
        """The optimizer steps from the current position on."""
        epoch, index, left = self.state["epoch"], self.state["index"], self.total_steps - self.state["step"]
        if not self.config.run.overfit_one_batch:
            yield from self.packer.blocks(epoch, index, left)
            return
        layout = self.packer.layout_steps(0, 0)
        for _ in range(left):
            yield [self.packer.build_step(layout, epoch, index)]
            epoch, index = self._next(epoch, index)

    def _next(self, epoch: int, index: int) -> tuple[int, int]:
        return (epoch, index + 1) if index + 1 < self.packer.steps_in_epoch(epoch) else (epoch + 1, 0)

    # --------------------------------------------------------------------------------------------------- the loop

    def run(self) -> dict:
        """All remaining steps. Ctrl-C finishes the current one, saves, and says how to continue."""
        lock = Lock(self.run_dir, ".lock", "train", "--output-dir")
        self.marker = RunMarker(self.run_dir, self.device)
        try:
            return self._run()
        finally:
            self.marker.remove()
            lock.release()

    def _run(self) -> dict:
        run = self.config.run
        self._open_run()
        ckpt.check_space(self.run_dir, ckpt.size(self.model, self.update.optimizer))
        announce(self)
        self.marker.beat(self.state["step"])
        if self.state["step"] == 0:
            validation = self._validate()
            if validation:
                log.info("%s", validation_line(0, validation))
            self._record(None, validation)
        first = self.state["step"]
        batches = read_ahead(self._blocks())
        progress = StepProgress(self.total_steps, self.state["step"])
        with progress, StopSignals(self):
            for batch in batches:
                started = time.monotonic()
                step = self._step(batch)
                if self.compiled and step == first + 1:
                    float(self.window.loss)  # waits for the device
                    progress.write(f"first step {time.monotonic() - started:.1f} s, compilation included")
                finished = step == self.total_steps
                last = finished or self.stopping is not None
                metrics = validation = None
                # Without a validation split, the first step's loss is what the model starts from.
                if step % run.log_every == 0 or last or (step == 1 and self.validator is None):
                    metrics = self._log(progress)
                if finished or (run.val_every and step % run.val_every == 0):
                    validation = self._validate()
                    if validation:
                        progress.write(validation_line(step, validation))
                # Before the save: a run killed between the two would never tell this step's figures.
                self._record(metrics, validation)
                improved = self._is_best(validation)
                if last or improved or (run.save_every and step % run.save_every == 0):
                    self._save(progress, validation if improved else None, last)
                if self.sampler and step % run.gen_every == 0:
                    self.window.pause(self.sampler(step, progress.write))
                progress.update()
                if last:
                    break
        batches.close()
        return summarize(self)

    def _step(self, batch: StepBatch) -> int:
        """One optimizer step; how many there have been then."""
        outcome = self.update(batch, self.state["step"])
        epoch, index = self._next(batch.epoch, batch.index)
        self.state.update(step=self.state["step"] + 1, epoch=epoch, index=index)
        self.window.add(self.state["step"], outcome, batch)
        self.lr = outcome.lr
        return self.state["step"]

    # ------------------------------------------------------------------------------------------------- what is due

    def _epochs(self) -> float:
        """Passes over the data so far."""
        epoch, index = self.state["epoch"], self.state["index"]
        return epoch + index / self.packer.steps_in_epoch(epoch)

    def _log(self, progress: StepProgress) -> dict[str, Any]:
        """Read the window: the only place where a quiet run waits for the device."""
        metrics = self.window.read()
        self.marker.beat(self.state["step"])
        self._report_bad_steps(progress)
        progress.status(
            self.state["step"],
            f"loss {metrics['train_loss']:.3f}  c0 {metrics['c0_loss']:.3f}  decoder {metrics['decoder_loss']:.3f}  "
            f"lr {self.lr:.2e}  |g| {metrics['grad_norm']:.2f}  {metrics['audio_s_per_s']:.0f} audio s/s",
        )
        return {**metrics, "lr": self.lr, "memory_gib": memory_gib(self.device)}

    def _report_bad_steps(self, progress: StepProgress) -> bool:
        """Say which updates were skipped for a non-finite loss or gradient; True where the newest was one of them
        or had not been told of yet."""
        count, first, streak = self.window.take_bad()
        if not count:
            return streak > 0
        good = ckpt.checkpoints(self.run_dir)
        sources = ", ".join(self._sources(first))
        message = (
            f"step {first}: the loss or a gradient was not finite; the update was skipped"
            + (f" ({count} such updates since the last report)" if count > 1 else "")
            + f". Data: {sources}. Last good checkpoint: {good[-1].name if good else 'none yet'}"
        )
        progress.write("warning: " + message)
        if streak >= MOST_SKIPPED:
            raise InputError(
                f"the last {streak} updates were all skipped: {message}",
                mend="lower --learning-rate, look at that data, or use --precision fp32; the same command continues "
                "from the last good checkpoint",
            )
        return True

    def _sources(self, step: int) -> list[str]:
        """Rows of the metadata that a past step read."""
        epoch, index = 0, step - 1
        while index >= self.packer.steps_in_epoch(epoch):
            index -= self.packer.steps_in_epoch(epoch)
            epoch += 1
        layout = self.packer.layout_steps(*((0, 0) if self.config.run.overfit_one_batch else (epoch, index)))
        chosen = set(layout.documents[:, 0].tolist())
        rows = sorted({t.source_index + 1 for c in chosen for t in self.store.conversation(c)})
        return [f"turn {r}" for r in rows[:8]] + (["..."] if len(rows) > 8 else [])

    def _validate(self) -> dict[str, Any] | None:
        if self.validator is None:
            return None
        started = time.monotonic()
        result = self.validator(self.model, self.device, self.update.autocast)
        self.window.pause(time.monotonic() - started)
        return {
            "val_loss": result["val_loss"],
            "val_c0_loss": result["c0_loss"],
            "val_decoder_loss": result["decoder_loss"],
            "val_per_codebook": [round(x, 5) for x in result["per_codebook"]],
            **{k: result[k] for k in ("eos_p_end", "eos_p_end_c0", "false_eos_rate")},
        }

    def _is_best(self, validation: dict[str, Any] | None) -> bool:
        best = self.state["best_val_loss"]
        if validation is None or not math.isfinite(validation["val_loss"]):
            return False
        return best is None or validation["val_loss"] < best

    def _save(self, progress: StepProgress, best: dict[str, Any] | None, last: bool) -> None:
        """A checkpoint of this step; ``best`` is its validation where that is the best so far. The last one is saved
        even if its own update was skipped: the weights are those of the step before it."""
        started = time.monotonic()
        if self._report_bad_steps(progress) and not last:
            progress.write("warning: nothing was saved at this step.")
            return
        if best:
            self.state.update(best_val_loss=best["val_loss"], best_step=self.state["step"])
        state, settings = {**self.state, **self.update.state()}, dump_yaml(self.config)
        probe = None if self.config.adapter.method == "full" else self.packer.step(0, 0).packs[0].to(self.device)
        saved = ckpt.save_checkpoint(
            self.run_dir, self.model, self.update.optimizer, state, settings, self.record, probe
        )
        if last:
            sizes = {path.name: path.stat().st_size for path in saved.glob("*.safetensors")}
            parts = ", ".join(f"{size / 1e6:,.1f} MB {name}" for name, size in sorted(sizes.items()))
            progress.write(f"saved {saved.name}: {parts}")
        best_step = self.state["best_step"]
        try:
            self._link_best()
            ckpt.prune(self.run_dir, self.config.run.keep, best_step and ckpt.directory_name(best_step))
        except OSError as error:
            raise disk_error(error, self.run_dir, "older checkpoints could not be removed") from None
        self.window.pause(time.monotonic() - started)

    def _link_best(self) -> None:
        """``best`` follows the best validation; without a validation split, the last checkpoint."""
        step = self.state["best_step"] or self.state["step"]
        if ckpt.complete(self.run_dir / ckpt.directory_name(step)):
            ckpt.link(self.run_dir, "best", ckpt.directory_name(step))

    # --------------------------------------------------------------------------------------------- the run directory

    def _record(self, metrics: dict[str, Any] | None, validation: dict[str, Any] | None) -> None:
        """One line of metrics.jsonl, where there is something to say."""
        if not metrics and not validation:
            return
        row = {**dict.fromkeys(METRICS), "step": self.state["step"], "epoch": round(self._epochs(), 4)}
        row.update(metrics or {})
        row.update(validation or {})
        try:
            with open(self.run_dir / "metrics.jsonl", "a", encoding="utf-8") as f:
                f.write(metrics_line(row))
        except OSError as error:
            raise disk_error(error, self.run_dir, "metrics.jsonl could not be written") from None

    def _open_run(self) -> None:
        """Settle the run directory: what a crash left is removed, metrics after the checkpoint come again."""
        try:
            ckpt.clean(self.run_dir)
            settings = self.run_dir / "config.yaml"
            if settings.exists() and not settings.read_bytes().startswith(RESOLVED.encode()):
                settings = self.run_dir / "config.resolved.yaml"  # the other one is the user's own, with its comments
            if self.state["step"] < self.total_steps or not settings.exists():  # or it would tell of a run that is none
                write_text(settings, dump_yaml(self.config))
            path = self.run_dir / "metrics.jsonl"
            rows = [r for r in read_metrics(path) if self.resumed and r["step"] <= self.state["step"]]
            write_text(path, "".join(map(metrics_line, rows)))
            if self.resumed:
                best = self.state["best_step"]
                if best and not ckpt.complete(self.run_dir / ckpt.directory_name(best)):
                    log.warning(
                        "warning: the best checkpoint, of step %d, is gone or damaged; the next takes over", best
                    )
                    self.state.update(best_val_loss=None, best_step=None)
                ckpt.link(self.run_dir, "last", self.resumed.name)
                self._link_best()
        except OSError as error:
            raise disk_error(error, self.run_dir, "the run could not be started") from None
