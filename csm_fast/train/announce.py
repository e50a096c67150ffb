"""The banner of a run, and the message when memory runs out."""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path
from typing import Any

from csm_fast.config.shape import FRAME_SECONDS
from csm_fast.config.train import TrainConfig
from csm_fast.model.csm import parameter_shapes
from csm_fast.model.stacks import vocabulary
from csm_fast.planner.fit import suggest_changes
from csm_fast.system.console import counted
from csm_fast.system.errors import OutOfMemory
from csm_fast.train.run_folder import list_checkpoints
from csm_fast.train.setup import Prepared

log = logging.getLogger("csm_fast")


def print_banner(run: Prepared, trained: int, killed: dict[str, Any] | None) -> None:
    """Log what is trained, on what data, for how long, and where the results go.

    Args:
        trained: how many parameters the optimizer updates.
        killed: ``RunMarker.left``: where an earlier run was that ended without a message.
    """
    config = run.config
    _, vocab = vocabulary(run.model)
    # By shape: a quantised weight holds two values per element, and adapters add their own.
    every = sum(math.prod(shape) for shape in parameter_shapes(run.model.config).values())
    start = f"continuing {run.resumed.name}" if run.resumed else f"from {config.model.model}"
    if config.model.from_scratch and not run.resumed:
        start = f"{config.model.model} from random weights"
    per_step = (
        f"{config.data.batch_rows:,} rows"
        if config.data.batch_rows
        else counted(config.data.batch_size * config.data.gradient_accumulation, "conversation")
    )
    how = run.precision + ", compiled" * run.compiled
    log.info("Model     %s: %s of %s parameters trained, %s", start, f"{trained:,}", f"{every:,}", how)
    if method := _method(config):
        log.info("Method    %s", method)
    log.info(
        "Data      %s: %s, %.2f h; %s",
        config.data.data,
        counted(run.store.num_conversations, "conversation"),
        run.store.num_frames * FRAME_SECONDS / 3600,
        run.store.codec["name"],
    )
    every = run.packer.steps_in_epoch(0)
    log.info("Steps     %d per epoch of %s, %d in all, on %s", every, per_step, run.total_steps, run.device)
    if run.state.step >= run.total_steps:
        log.info("Done      it is at step %d already; a larger --max-steps or --n-epochs goes on", run.state.step)
    if run.compiled:
        kept = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "PyTorch's cache directory")
        log.info("Compile   layers when they first run, up to a minute; kept in %s for the next run", kept)
    log.info("Output    %s", run.run_dir)
    if killed:
        log.warning(
            "warning: the run before this one ended without a message after step %d, with %.1f GiB in use. If it was "
            "killed for memory: %s",
            killed["step"],
            killed["memory_gib"],
            suggest_changes(config),
        )
    log.info("Guessing evenly costs ln V = %.3f nats per code (V = %d)", math.log(vocab), vocab)
    unheard = sorted(set(config.data.mask_speaker_ids) - set(run.packer.turn_speakers.tolist()))
    if unheard:
        log.warning("warning: --mask-speaker-ids %s: no turn is of that speaker", " ".join(map(str, unheard)))
    if run.validator is None:
        log.info("There is no validation split: best follows the last checkpoint.")


def _method(config: TrainConfig) -> str:
    """How this differs from AdamW on float32 weights; empty where it does not."""
    adapter, section = config.adapter, config.optimizer
    parts = []
    if adapter.method != "full":
        scale = f"alpha {adapter.alpha:g}" + ", rank-stabilised" * adapter.rslora
        parts.append(f"{adapter.method}, rank {adapter.lora_rank}, {scale}, on {' '.join(adapter.target_modules)}")
        parts += ["heads trained"] * adapter.train_heads
        if adapter.train_embeddings != "off":
            parts.append("embeddings trained" + ", the rows in the data" * (adapter.train_embeddings == "rows"))
    parts += [section.optimizer] * (section.optimizer != "adamw")
    parts += [f"weights in {section.weights.replace('-', ', ')}"] * (section.weights != "fp32")
    parts += ["optimizer inside the backward pass"] * section.optimizer_in_backward
    if config.model.activation_checkpointing != "off":
        parts.append(f"activation checkpointing {config.model.activation_checkpointing}")
    return "; ".join(parts)


def explain_out_of_memory(error: BaseException, config: TrainConfig) -> OutOfMemory:
    """The line for it: what ran out, what is left, and the smallest change that helps."""
    reason = next(iter(str(error).strip().splitlines()), "")[:160]
    found = list_checkpoints(Path(config.run.output_dir).expanduser())
    left = f"{found[-1].name} is intact and the same command continues from it" if found else "nothing was saved yet"
    return OutOfMemory(f"not enough memory ({reason}); {left}", mend=suggest_changes(config))
