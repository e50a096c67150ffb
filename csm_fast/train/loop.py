"""The training loop: steps, and what is due after each. It takes a loss function and names no method."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from typing import Any

from csm_fast.config.parse import RESOLVED, dump_yaml
from csm_fast.config.train import TrainConfig
from csm_fast.data.statistics import unigram_entropy
from csm_fast.model.csm import CSM
from csm_fast.model.loss import amortized_loss
from csm_fast.model.stacks import vocabulary
from csm_fast.packing.layout import StepBatch
from csm_fast.packing.loader import read_ahead
from csm_fast.report.metrics import MetricsFile, validation_line
from csm_fast.report.summary import Ending, summarize
from csm_fast.system.console import StepProgress
from csm_fast.system.device import memory_gib
from csm_fast.system.errors import InputError, is_out_of_memory
from csm_fast.system.files import disk_error, write_file
from csm_fast.system.lock import Lock
from csm_fast.train import checkpoint as ckpt
from csm_fast.train.announce import explain_out_of_memory, print_banner
from csm_fast.train.run_marker import RunMarker
from csm_fast.train.samples import Sampler
from csm_fast.train.setup import Prepared, Stores, prepare
from csm_fast.train.signals import StopSignals
from csm_fast.train.step import LossFunction, Update
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
        loss_function: (model, pack) -> (loss, per-codebook [K]).
    """

    def __init__(self, prepared: Prepared, loss_function: LossFunction | None = None):
        self.prepared, self.config, self.run_dir = prepared, prepared.config, prepared.run_dir
        self.model, self.device, self.packer = prepared.model, prepared.device, prepared.packer
        self.state = dict(prepared.state)
        a, b = prepared.weights
        self.update = Update(
            self.model,
            self.config.optimizer,
            self.device,
            prepared.precision,
            loss_function or amortized_loss(a, b),
            prepared.total_steps,
            self.config.data.seed,
        )
        if prepared.resumed:
            self.update.load(prepared.resumed, self.state)
        self.sampler: Sampler | None = None
        if self.config.run.gen_every:
            self.sampler = Sampler(self.model, self.config.run, self.run_dir / "samples", prepared.store)
        num_codebooks, vocab = vocabulary(self.model)
        self.window = Window(num_codebooks, self.device)
        self.metrics = MetricsFile(self.run_dir / "metrics.jsonl")
        self.uniform = (a + b) * math.log(vocab)
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
        run, total = self.config.run, self.prepared.total_steps
        self._open_run()
        ckpt.check_space(self.run_dir, ckpt.checkpoint_bytes(self.model, self.update.optimizer))
        print_banner(self.prepared, sum(p.numel() for p in self.update.parameters), self.marker.left)
        self.marker.beat(self.state["step"])
        if self.state["step"] == 0:
            validation = self._validate()
            if validation:
                log.info("%s", validation_line(0, validation))
            self._record(None, validation)
        first = self.state["step"]
        batches = read_ahead(self._blocks())
        progress = StepProgress(total, self.state["step"])
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
        return self._summarize()

    def _step(self, batch: StepBatch) -> int:
        """One optimizer step; how many there have been then."""
        outcome = self.update(batch, self.state["step"])
        epoch, index = self._next(batch.epoch, batch.index)
        self.state.update(step=self.state["step"] + 1, epoch=epoch, index=index)
        self.window.add(self.state["step"], outcome, batch)
        self.lr = outcome.lr
        return self.state["step"]

    def _blocks(self) -> Iterator[list[StepBatch]]:
        """The optimizer steps from the current position on."""
        epoch, index = self.state["epoch"], self.state["index"]
        left = self.prepared.total_steps - self.state["step"]
        if not self.config.run.overfit_one_batch:
            yield from self.packer.blocks(epoch, index, left)
            return
        layout = self.packer.layout_steps(0, 0)
        for _ in range(left):
            yield [self.packer.build_step(layout, epoch, index)]
            epoch, index = self._next(epoch, index)

    def _next(self, epoch: int, index: int) -> tuple[int, int]:
        return (epoch, index + 1) if index + 1 < self.packer.steps_in_epoch(epoch) else (epoch + 1, 0)

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
        good = ckpt.list_checkpoints(self.run_dir)
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
        rows = sorted({t.source_index + 1 for c in chosen for t in self.prepared.store.conversation(c)})
        return [f"turn {r}" for r in rows[:8]] + (["..."] if len(rows) > 8 else [])

    def _validate(self) -> dict[str, Any] | None:
        if self.prepared.validator is None:
            return None
        started = time.monotonic()
        result = self.prepared.validator(self.model, self.device, self.update.autocast)
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
            self.run_dir, self.model, self.update.optimizer, state, settings, self.prepared.record, probe
        )
        if last:
            sizes = {path.name: path.stat().st_size for path in saved.glob("*.safetensors")}
            parts = ", ".join(f"{size / 1e6:,.1f} MB {name}" for name, size in sorted(sizes.items()))
            progress.write(f"saved {saved.name}: {parts}")
        best_step = self.state["best_step"]
        try:
            self._link_best()
            ckpt.remove_older(self.run_dir, self.config.run.keep, best_step and ckpt.directory_name(best_step))
        except OSError as error:
            raise disk_error(error, self.run_dir, "older checkpoints could not be removed") from None
        self.window.pause(time.monotonic() - started)

    def _link_best(self) -> None:
        """``best`` follows the best validation; without a validation split, the last checkpoint."""
        step = self.state["best_step"] or self.state["step"]
        if ckpt.read_if_complete(self.run_dir / ckpt.directory_name(step)):
            ckpt.link_or_copy(self.run_dir, "best", ckpt.directory_name(step))

    # --------------------------------------------------------------------------------------------- the run directory

    def _record(self, metrics: dict[str, Any] | None, validation: dict[str, Any] | None) -> None:
        """One row of metrics, where there is something to say."""
        if metrics or validation:
            values = {"epoch": round(self._epochs(), 4), **(metrics or {}), **(validation or {})}
            self.metrics.log(self.state["step"], values)

    def _open_run(self) -> None:
        """Settle the run directory: what a crash left is removed, metrics after the checkpoint come again."""
        try:
            ckpt.remove_partial(self.run_dir)
            settings = self.run_dir / "config.yaml"
            if settings.exists() and not settings.read_bytes().startswith(RESOLVED.encode()):
                settings = self.run_dir / "config.resolved.yaml"  # the other one is the user's own, with its comments
            # Otherwise the file would describe a run that never happened.
            if self.state["step"] < self.prepared.total_steps or not settings.exists():
                write_file(settings, dump_yaml(self.config))
            self.metrics.keep_until(self.state["step"] if self.prepared.resumed else -1)
            if self.prepared.resumed:
                best = self.state["best_step"]
                if best and not ckpt.read_if_complete(self.run_dir / ckpt.directory_name(best)):
                    log.warning(
                        "warning: the best checkpoint, of step %d, is gone or damaged; the next takes over", best
                    )
                    self.state.update(best_val_loss=None, best_step=None)
                ckpt.link_or_copy(self.run_dir, "last", self.prepared.resumed.name)
                self._link_best()
        except OSError as error:
            raise disk_error(error, self.run_dir, "the run could not be started") from None

    def _summarize(self) -> dict:
        state = self.state
        return summarize(
            self.run_dir,
            Ending(state["step"], self.prepared.total_steps, state["best_val_loss"], state["best_step"]),
            self.entropy,
            self.uniform,
            self.signals.received,
        )
