"""Checkpoints: complete or absent, and enough to continue bit for bit.

``run/step-000500/`` holds ``model.safetensors`` and ``config.json`` (Sesame's names, so Sesame's own loader takes the
directory), ``optimizer.safetensors``, ``config.yaml`` and, written last, ``trainer_state.json``. A directory is
written under a temporary name, flushed to disk, and renamed; ``last`` and ``best`` are links to such directories.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .convert import save_model
from .errors import InputError

log = logging.getLogger("csm_fast")

STATE = "trainer_state.json"
FORMAT = 1


def directory_name(step: int) -> str:
    """Directory of the checkpoint of an optimizer step."""
    return f"step-{step:06d}"


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def save_checkpoint(
    run_dir: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    config_yaml: str,
    record: dict[str, Any],
) -> Path:
    """Write ``run_dir/step-N`` for ``state["step"]`` and point ``last`` at it.

    Args:
        state: JSON-able position of the run; its "step" names the directory.
        config_yaml: the resolved configuration.
        record: the codec and tokenizer the model was trained with, kept beside its configuration.

    Raises:
        InputError: the disk is full or not writable. Earlier checkpoints are untouched.
    """
    final = run_dir / directory_name(state["step"])
    temporary = run_dir / f".{final.name}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_model(model, temporary)
        write_record(temporary, record)
        save_file(optimizer_tensors(optimizer), temporary / "optimizer.safetensors")
        (temporary / "config.yaml").write_text(config_yaml, encoding="utf-8")
        files = {p.name: p.stat().st_size for p in sorted(temporary.iterdir())}
        for name in files:
            _fsync(temporary / name)
        payload = {"format": FORMAT, **state, "files": files}
        (temporary / STATE).write_text(json.dumps(payload, indent=1) + "\n", encoding="utf-8")
        _fsync(temporary / STATE)
        _fsync(temporary)
        if final.exists():
            # Only when a finished run is asked to save its last step again.
            shutil.rmtree(final)
        os.replace(temporary, final)
        _fsync(run_dir)
        link(run_dir, "last", final.name)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise disk_error(error, run_dir, "the checkpoint could not be saved; the earlier ones are intact") from error
    return final


def disk_error(error: Exception, where: Path, what: str) -> InputError:
    """The one line for a disk that is full, read-only or gone."""
    code = getattr(error, "errno", None)
    text = str(error)
    if code == errno.ENOSPC or "No space left" in text or "os error 28" in text:
        return InputError(f"the disk is full: {what}", file=where, mend="free space and run the same command again")
    if code in (errno.EACCES, errno.EROFS, errno.EPERM) or "denied" in text:
        return InputError(f"not writable: {what}", file=where, mend="choose another --output-dir")
    return InputError(f"{what} ({error})", file=where, mend="check the disk and run the same command again")


def _fsync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def link(run_dir: Path, name: str, target: str) -> None:
    """Point ``run_dir/name`` at a checkpoint in one step; where links are not to be had, a copy takes its place."""
    temporary = run_dir / f".{name}.link"
    try:
        if temporary.is_symlink() or temporary.exists():
            temporary.unlink()
        os.symlink(target, temporary, target_is_directory=True)
        os.replace(temporary, run_dir / name)
    except OSError:
        if (run_dir / target).is_dir() and os.name == "nt":
            shutil.rmtree(run_dir / name, ignore_errors=True)
            shutil.copytree(run_dir / target, run_dir / name)
        else:
            raise


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """AdamW's state under ``<state>/<parameter name>``."""
    tensors = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{key}/{name}"] = value.detach().contiguous()
    return tensors


def load_optimizer(optimizer: torch.optim.Optimizer, checkpoint: Path) -> None:
    """Restore what ``optimizer_tensors`` saved; every tensor must find its parameter and shape."""
    file = checkpoint / "optimizer.safetensors"
    wanted = {}
    for group in optimizer.param_groups:
        wanted.update(zip(group["names"], group["params"], strict=True))
    seen: dict[str, dict[str, torch.Tensor]] = {}
    with safe_open(file, framework="pt") as tensors:
        for key in tensors.keys():
            kind, name = key.split("/", 1)
            if name not in wanted:
                raise InputError(
                    f"{name} was trained then and is frozen now", file=file, mend="use the same --freeze, or a new run"
                )
            seen.setdefault(name, {})[kind] = tensors.get_tensor(key)
    if seen and len(seen) != len(wanted):
        missing = next(name for name in wanted if name not in seen)
        raise InputError(
            f"{missing} was frozen then and is trained now", file=file, mend="use the same --freeze, or a new run"
        )
    for name, state in seen.items():
        parameter = wanted[name]
        for kind, value in state.items():
            if kind != "step" and value.shape != parameter.shape:
                raise InputError(f"{kind} of {name} has another shape than the model", file=file)
            # Fused AdamW keeps its step count on the parameter's device, beside the moments.
            state[kind] = value.to(parameter.device)
        optimizer.state[parameter] = state


def complete(checkpoint: Path) -> dict[str, Any] | None:
    """The trainer state of a complete checkpoint; None for anything else."""
    try:
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        for name, size in state["files"].items():
            if (checkpoint / name).stat().st_size != size:
                return None
        if not isinstance(state["step"], int):
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if state.get("format") != FORMAT:
        raise InputError(
            f"checkpoint format {state.get('format')} is not the format {FORMAT} of this version",
            file=checkpoint,
            mend="use the csm_fast version that wrote it, or a new --output-dir",
        )
    return state


def checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    if not run_dir.is_dir():
        return []
    found = [p for p in run_dir.glob("step-*") if p.is_dir() and not p.is_symlink() and complete(p) is not None]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def prune(run_dir: Path, keep: int, best: str | None) -> None:
    """Remove all but the newest ``keep`` checkpoints and the best one, and what interrupted saves left."""
    for path in checkpoints(run_dir)[:-keep]:
        if path.name != best:
            # Without its state file it no longer counts, so a kill halfway leaves no half checkpoint.
            (path / STATE).unlink()
            shutil.rmtree(path, ignore_errors=True)
    clean(run_dir)


def clean(run_dir: Path) -> None:
    """Remove what interrupted saves and prunings left behind."""
    for path in run_dir.glob(".step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
    for path in run_dir.glob("step-*"):
        if path.is_dir() and not (path / STATE).exists():
            shutil.rmtree(path, ignore_errors=True)


def write_record(directory: Path, record: dict[str, Any]) -> None:
    """Add the codec and tokenizer to a saved model's ``config.json``, under ``csm_fast_data``."""
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["csm_fast_data"] = record
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_record(name_or_path: str) -> dict[str, Any]:
    """The codec and tokenizer a local model was trained with; empty where nothing is known."""
    path = Path(name_or_path).expanduser()
    path = (path if path.is_dir() else path.parent) / "config.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8")).get("csm_fast_data", {})
    except (OSError, ValueError, AttributeError):
        return {}
    return record if isinstance(record, dict) else {}
