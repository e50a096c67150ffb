"""The training loop: steps, and what is due after each. It names neither a method nor a loss."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from typing import Any

from csm_fast.config.parse import dump_yaml
from csm_fast.config.train import TrainConfig
from csm_fast.data.statistics import unigram_entropy
from csm_fast.model.csm import CSM
from csm_fast.model.stacks import vocabulary
from csm_fast.packing.layout import StepBatch
from csm_fast.packing.loader import read_ahead
from csm_fast.report.metrics import MetricsFile, validation_line
from csm_fast.report.summary import Ending, summarize
from csm_fast.system.console import StepProgress
from csm_fast.system.device import memory_gib
from csm_fast.system.errors import InputError, is_out_of_memory
from csm_fast.system.files import writing_to
from csm_fast.system.lock import Lock
from csm_fast.train.announce import explain_out_of_memory, print_banner
from csm_fast.train.checkpoint import checkpoint_bytes, save_checkpoint
from csm_fast.train.run_folder import check_space, link_best, list_checkpoints, open_run_folder, remove_older
from csm_fast.train.run_marker import RunMarker
from csm_fast.train.samples import Sampler
from csm_fast.train.setup import Prepared, Stores, prepare
from csm_fast.train.signals import StopSignals
from csm_fast.train.step import LossFunction, StepRunner
from csm_fast.train.window import Window

log = logging.getLogger("csm_fast")

MOST_SKIPPED = 10  # updates in a row without a finite loss and gradient, after which a run gives up


def train(
    config: TrainConfig,
    *,
    model: CSM | None = None,
    store: Stores | None = None,
    loss_function: LossFunction | None = None,
) -> dict:
    """Fine-tune as ``config`` says, or continue the run that ``config.run.output_dir`` holds.

    Args:
        config: everything the run depends on; it is not changed, and written resolved into the run directory.
        model: start from this model instead of ``config.model.model`` (ignored when a full run is continued).
        store: train on this data, or on (training data, validation data), instead of ``config.data.data``.
        loss_function: (model, pack) -> (loss, per-codebook [K]); the amortized loss of ``config.loss`` by default.

    Returns:
        The summary that ends the run (also in ``summary.json``): steps, losses before and after, paths.

    Raises:
        InputError: anything the user can mend.
    """
    try:
        return Trainer(prepare(config, model, store), loss_function).run()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise explain_out_of_memory(error, config) from error


class Trainer:
    """One run: ``run`` is the loop, the rest what is due in it.

    Args:
        prepared: what ``prepare`` made.
        loss_function: in place of that of ``prepared``.
    """

    def __init__(self, prepared: Prepared, loss_function: LossFunction | None = None):
        self.prepared, self.config, self.run_dir = prepared, prepared.config, prepared.run_dir
        self.model, self.device, self.packer = prepared.model, prepared.device, prepared.packer
        self.state = dataclasses.replace(prepared.state)
        self.runner = StepRunner(
            self.model,
            self.config.optimizer,
            self.device,
            prepared.precision,
            loss_function or prepared.loss_function,
            prepared.total_steps,
            self.config.data.seed,
        )
        if prepared.resumed:
            self.runner.load(prepared.resumed, self.state.loss_scale)
        self.sampler: Sampler | None = None
        if self.config.run.gen_every:
            self.sampler = Sampler(self.model, self.config.run, self.run_dir / "samples", prepared.store)
        self.window = Window(vocabulary(self.model)[0], self.device)
        self.metrics = MetricsFile(self.run_dir / "metrics.jsonl")
        self.entropy = unigram_entropy(prepared.store)
        self.signals = StopSignals()

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
        run, total, resumed = self.config.run, self.prepared.total_steps, self.prepared.resumed
        open_run_folder(self.run_dir, self.config, self.state, resumed, is_done=self.state.step >= total)
        self.metrics.keep_until(self.state.step if resumed else -1)
        check_space(self.run_dir, checkpoint_bytes(self.model, self.runner.optimizer))
        print_banner(self.prepared, sum(p.numel() for p in self.runner.parameters), self.marker.left)
        self.marker.beat(self.state.step)
        if self.state.step == 0:
            validation = self._validate()
            if validation:
                log.info("%s", validation_line(0, validation))
            self._record(None, validation)
        first = self.state.step
        batches = read_ahead(self.packer.blocks(self.state.epoch, self.state.index, total - first))
        progress = StepProgress(total, self.state.step)
        with progress, self.signals:
            for batch in batches:
                started = time.monotonic()
                step = self._step(batch)
                if self.prepared.compiled and step == first + 1:
                    float(self.window.loss)  # waits for the device
                    progress.write(f"first step {time.monotonic() - started:.1f} s, compilation included")
                finished = step == total
                last = finished or self.signals.received is not None
                metrics = validation = None
                # Without a validation split, the first step's loss is what the model starts from.
                if step % run.log_every == 0 or last or (step == 1 and self.prepared.validator is None):
                    metrics = self._log(progress)
                if finished or (run.val_every and step % run.val_every == 0):
                    validation = self._validate()
                    if validation:
                        progress.write(validation_line(step, validation))
                # Metrics before the checkpoint, so that a kill in between does not lose them.
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
        best = self.state.best_val_loss, self.state.best_step
        ending = Ending(self.state.step, total, *best, stopped_by=self.signals.received)
        return summarize(self.run_dir, ending, self.entropy, self.prepared.uniform_loss)

    def _step(self, batch: StepBatch) -> int:
        """One optimizer step. Returns how many there have been then."""
        state, result = self.state, self.runner.run(batch, self.state.step)
        state.step, state.epoch, state.index = state.step + 1, batch.epoch, batch.index + 1
        if state.index == self.packer.steps_in_epoch(state.epoch):
            state.epoch, state.index = state.epoch + 1, 0
        self.window.add(state.step, result, batch)
        self.lr = result.lr
        return state.step

    # ------------------------------------------------------------------------------------------------- what is due

    def _log(self, progress: StepProgress) -> dict[str, Any]:
        """Read the window: the only place where a quiet run waits for the device."""
        metrics = self.window.read()
        self.marker.beat(self.state.step)
        self._report_skipped(progress)
        progress.status(
            self.state.step,
            f"loss {metrics['train_loss']:.3f}  c0 {metrics['c0_loss']:.3f}  decoder {metrics['decoder_loss']:.3f}  "
            f"lr {self.lr:.2e}  |g| {metrics['grad_norm']:.2f}  {metrics['audio_s_per_s']:.0f} audio s/s",
        )
        return {**metrics, "lr": self.lr, "memory_gib": memory_gib(self.device)}

    def _report_skipped(self, progress: StepProgress) -> bool:
        """Say which updates were skipped for a non-finite loss or gradient. True if one was since the last report, or
        the newest one."""
        count, first, streak = self.window.take_skipped()
        if not count:
            return streak > 0
        good = list_checkpoints(self.run_dir)
        message = (
            f"step {first}: the loss or a gradient was not finite; the update was skipped"
            + (f" ({count} such updates since the last report)" if count > 1 else "")
            + f". Data: {self._list_sources(first)}. Last good checkpoint: {good[-1].name if good else 'none yet'}"
        )
        progress.write("warning: " + message)
        if streak >= MOST_SKIPPED:
            raise InputError(
                f"the last {streak} updates were all skipped: {message}",
                mend="lower --learning-rate, look at that data, or use --precision fp32; the same command continues "
                "from the last good checkpoint",
            )
        return True

    def _list_sources(self, step: int) -> str:
        """The turns of the metadata that a past step read, the first eight of them."""
        epoch, index = 0, step - 1
        while index >= self.packer.steps_in_epoch(epoch):
            index -= self.packer.steps_in_epoch(epoch)
            epoch += 1
        chosen = set(self.packer.layout_steps(epoch, index).documents[:, 0].tolist())
        rows = sorted({t.source_index + 1 for c in chosen for t in self.prepared.store.conversation(c)})
        return ", ".join([f"turn {r}" for r in rows[:8]] + ["..."] * (len(rows) > 8))

    def _validate(self) -> dict[str, Any] | None:
        if self.prepared.validator is None:
            return None
        started = time.monotonic()
        result = self.prepared.validator(self.model, self.device, self.runner.autocast)
        self.window.pause(time.monotonic() - started)
        return {
            "val_loss": result["val_loss"],
            "val_c0_loss": result["c0_loss"],
            "val_decoder_loss": result["decoder_loss"],
            "val_per_codebook": [round(x, 5) for x in result["per_codebook"]],
            **{k: result[k] for k in ("eos_p_end", "eos_p_end_c0", "false_eos_rate")},
        }

    def _is_best(self, validation: dict[str, Any] | None) -> bool:
        best = self.state.best_val_loss
        if validation is None or not math.isfinite(validation["val_loss"]):
            return False
        return best is None or validation["val_loss"] < best

    def _save(self, progress: StepProgress, best: dict[str, Any] | None, last: bool) -> None:
        """Write a checkpoint of this step.

        Args:
            best: the step's validation, where that is the best so far.
            last: no step follows. The checkpoint is then written even if the step's own update was skipped: its
                weights are those of the step before.
        """
        started = time.monotonic()
        if self._report_skipped(progress) and not last:
            progress.write("warning: nothing was saved at this step.")
            return
        if best:
            self.state.best_val_loss, self.state.best_step = best["val_loss"], self.state.step
        self.state.loss_scale = self.runner.loss_scale() or self.state.loss_scale
        saved = save_checkpoint(
            self.run_dir,
            self.model,
            self.runner.optimizer,
            self.state,
            dump_yaml(self.config),
            self.prepared.record,
            probe=self.packer.step(0, 0).packs[0].to(self.device) if self.model.adapter else None,
        )
        if last:
            sizes = {path.name: path.stat().st_size for path in saved.glob("*.safetensors")}
            parts = ", ".join(f"{size / 1e6:,.1f} MB {name}" for name, size in sorted(sizes.items()))
            progress.write(f"saved {saved.name}: {parts}")
        with writing_to(self.run_dir, "older checkpoints could not be removed"):
            link_best(self.run_dir, self.state)
            remove_older(self.run_dir, self.config.run.keep, self.state.best_step)
        self.window.pause(time.monotonic() - started)

    def _record(self, metrics: dict[str, Any] | None, validation: dict[str, Any] | None) -> None:
        """Write a row of metrics, if there is one."""
        if metrics or validation:
            state = self.state
            epochs = state.epoch + state.index / self.packer.steps_in_epoch(state.epoch)
            self.metrics.log(state.step, {"epoch": round(epochs, 4), **(metrics or {}), **(validation or {})})
