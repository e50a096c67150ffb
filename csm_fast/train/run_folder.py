"""The output folder of a run: its checkpoints, the links to them, its settings, and what a killed run left in it."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path

from csm_fast.config.parse import RESOLVED, dump_yaml
from csm_fast.config.train import TrainConfig
from csm_fast.system.errors import InputError
from csm_fast.system.files import write_file, writing_to
from csm_fast.train.checkpoint import (
    STATE,
    RunState,
    directory_name,
    link_or_copy,
    read_if_complete,
    remove_checkpoint,
)

log = logging.getLogger("csm_fast")

_STEP = re.compile(r"step-\d{6,}")


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return [path for path in _list_steps(run_dir) if read_if_complete(path)]


def _list_steps(run_dir: Path) -> list[Path]:
    """The folders with a checkpoint's name, oldest first. Links and what a user has named otherwise are left out."""
    named = [p for p in run_dir.glob("step-*") if _STEP.fullmatch(p.name) and p.is_dir() and not p.is_symlink()]
    return sorted(named, key=_step_of)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def check_damage(run_dir: Path, whole: list[Path]) -> None:
    """Refuse to begin anew where only damaged checkpoints are left; name those that are passed over.

    Saving is atomic, so a checkpoint is only damaged later, by a drive or by hand.

    Raises:
        InputError: ``whole``, the run's ``list_checkpoints``, is empty, and damaged ones are there.
    """
    damaged = [path for path in _list_steps(run_dir) if path not in whole]
    if damaged and not whole:
        raise InputError(
            f"is damaged: {_describe_damage(damaged[-1])}; no whole checkpoint is left to continue from",
            file=damaged[-1],
            mend="restore it, or choose another --output-dir",
        )
    for path in damaged:
        if _step_of(path) > _step_of(whole[-1]):
            what = _describe_damage(path)
            log.warning("warning: %s is damaged: %s; the run continues from %s", path, what, whole[-1].name)


def _describe_damage(checkpoint: Path) -> str:
    try:
        files = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))["files"]
        for name, size in files.items():
            if not (checkpoint / name).exists():
                return f"{name} is missing"
            if (here := (checkpoint / name).stat().st_size) != size:
                return f"{name} has {here:,} bytes of {size:,}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return f"{STATE} cannot be read" if (checkpoint / STATE).exists() else f"{STATE} is missing"


def check_space(run_dir: Path, needed: int) -> None:
    """Refuse a run whose first checkpoint could not be saved.

    Raises:
        InputError: fewer than ``needed`` bytes are free.
    """
    try:
        free = shutil.disk_usage(run_dir).free
    except OSError:
        return
    if free < needed:
        raise InputError(
            f"a checkpoint takes {needed / 2**30:.2f} GiB, and the disk has {free / 2**30:.2f} left",
            file=run_dir,
            mend="free space, or choose another --output-dir",
        )


def open_run_folder(run_dir: Path, config: TrainConfig, state: RunState, resumed: Path | None, is_done: bool) -> None:
    """Remove what a killed run left half written, write the settings, and set the links of a run that is continued.
    Where its best checkpoint is gone, ``state`` loses it.

    Raises:
        InputError: the disk refuses.
    """
    with writing_to(run_dir, "the run could not be started"):
        remove_partial(run_dir)
        settings = run_dir / "config.yaml"
        if settings.exists() and not settings.read_bytes().startswith(RESOLVED.encode()):
            settings = run_dir / "config.resolved.yaml"  # the other one is the user's own, with its comments
        # A run that is done takes no step under these settings, so the file keeps those that it was made with.
        if not is_done or not settings.exists():
            write_file(settings, dump_yaml(config))
        if resumed:
            best = state.best_step
            if best and not read_if_complete(run_dir / directory_name(best)):
                log.warning("warning: the best checkpoint, of step %d, is gone or damaged; the next takes over", best)
                state.best_val_loss = state.best_step = None
            link_or_copy(run_dir, "last", resumed.name)
            link_best(run_dir, state)


def remove_partial(run_dir: Path) -> None:
    """Remove what interrupted saves and deletions left behind."""
    for pattern in (".step-*.tmp", ".step-*.old"):
        for path in run_dir.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def link_best(run_dir: Path, state: RunState) -> None:
    """Point ``best`` at the checkpoint with the best validation; without a validation split, at the last one."""
    name = directory_name(state.best_step or state.step)
    if read_if_complete(run_dir / name):
        link_or_copy(run_dir, "best", name)


def remove_older(run_dir: Path, keep: int, best_step: int | None) -> None:
    """Remove all but the newest ``keep`` checkpoints and the best one."""
    for path in list_checkpoints(run_dir)[:-keep]:
        if _step_of(path) != best_step:
            remove_checkpoint(path)
