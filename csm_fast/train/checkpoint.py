"""Checkpoints: complete or absent, and enough to continue bit for bit.

``run/step-000500/`` holds ``model.safetensors`` and ``config.json`` (Sesame's names, so Sesame's own loader takes the
directory), ``optimizer.safetensors``, ``config.yaml`` and, written last, ``trainer_state.json``. A directory is
written under a temporary name, flushed to disk, and renamed, and it is renamed again before it is deleted, so whatever
is called ``step-N`` is whole. ``last`` and ``best`` are links to such directories.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from csm_fast.packing.pack import Pack
from csm_fast.system.errors import InputError
from csm_fast.system.files import disk_error, fsync_path, replace_directory
from csm_fast.system.tensors import write_tensors
from csm_fast.train.optim.adamw import AdamW
from csm_fast.weights.save import save_model, write_record

STATE = "trainer_state.json"
FORMAT = 1
_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@dataclass
class RunState:
    """Where a run stands, as ``trainer_state.json`` holds it.

    Attributes:
        step: optimizer steps done.
        epoch, index: which step of which epoch comes next.
        best_val_loss, best_step: of the best validation so far.
        data: what epoch and index refer to (``checks.position_identity``).
        loss_scale: state of fp16's ``GradScaler``.
    """

    step: int = 0
    epoch: int = 0
    index: int = 0
    best_val_loss: float | None = None
    best_step: int | None = None
    data: dict[str, Any] = field(default_factory=dict)
    loss_scale: dict[str, Any] | None = None

    @classmethod
    def from_saved(cls, saved: dict[str, Any]) -> RunState:
        """The state that ``read_if_complete`` has read."""
        return cls(**{f.name: saved[f.name] for f in fields(cls) if f.name in saved})

    def as_saved(self) -> dict[str, Any]:
        """What is written; the loss scale only where there is one."""
        return {name: value for name, value in asdict(self).items() if name != "loss_scale" or value is not None}


def directory_name(step: int) -> str:
    """Directory of the checkpoint of an optimizer step."""
    return f"step-{step:06d}"


def save_checkpoint(
    run_dir: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: RunState,
    config_yaml: str,
    record: dict[str, Any],
    probe: Pack | None = None,
) -> Path:
    """Write ``run_dir/step-N`` for step N of ``state`` and point ``last`` at it.

    Args:
        config_yaml: the resolved configuration.
        record: the codec and tokenizer the model was trained with, kept beside its configuration.
        probe: with adapters, real data on the model's device, of which a part goes with them (``probe.py``).

    Raises:
        InputError: the disk is full or not writable. Earlier checkpoints are untouched.
    """
    final = run_dir / directory_name(state.step)
    temporary = run_dir / f".{final.name}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_weights(model, temporary, probe)
        write_record(temporary, record)
        write_tensors(temporary / "optimizer.safetensors", optimizer_tensors(optimizer), None)
        (temporary / "config.yaml").write_text(config_yaml, encoding="utf-8")
        files = {p.name: p.stat().st_size for p in sorted(temporary.iterdir())}
        for name in files:
            fsync_path(temporary / name)
        payload = {"format": FORMAT, **state.as_saved(), "files": files}
        (temporary / STATE).write_text(json.dumps(payload, indent=1) + "\n", encoding="utf-8")
        fsync_path(temporary / STATE)
        fsync_path(temporary)
        if final.exists():
            remove_checkpoint(final)  # damaged, or the run would have continued from it
        os.replace(temporary, final)
        fsync_path(run_dir)
        link_or_copy(run_dir, "last", final.name)
    except (OSError, InputError) as error:
        # The model's writer reports its OSError as an InputError that names the temporary directory.
        cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
        raise disk_error(cause, run_dir, "the checkpoint could not be saved, the earlier ones are intact") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def checkpoint_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of a checkpoint: weights, of adapters only theirs, and the optimizer's state, also before it is there."""
    whole = getattr(model, "adapter", None) is None
    total = sum(p.numel() * p.element_size() for p in model.parameters() if whole or p.requires_grad)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            form = _state_form(optimizer, parameter).values()
            total += sum(math.prod(shape) * dtype.itemsize for shape, dtype in form)
    return total


def save_weights(model: nn.Module, directory: Path, probe: Pack | None) -> None:
    """The whole model; where it carries adapters, what is trained of it."""
    if getattr(model, "adapter", None) is None:
        save_model(model, directory)
        return
    from csm_fast.evaluate.probe import save_probe
    from csm_fast.weights.adapter_files import save_adapter

    save_adapter(model, directory)
    if probe is not None and probe.target_rows.numel():
        save_probe(model, probe, directory)


def link_or_copy(run_dir: Path, name: str, target: str) -> None:
    """Point ``run_dir/name`` at a checkpoint in one step; where links are not to be had, a copy takes its place."""
    temporary = run_dir / f".{name}.link"
    if temporary.is_dir() and not temporary.is_symlink():
        shutil.rmtree(temporary)
    temporary.unlink(missing_ok=True)
    try:
        os.symlink(target, temporary, target_is_directory=True)
    except OSError as error:
        # Windows without the right to link; FAT, network shares and mounted cloud drives on any system.
        if error.errno not in _NO_LINKS and os.name != "nt":
            raise
        shutil.copytree(run_dir / target, temporary)
        replace_directory(temporary, run_dir / name)
    else:
        os.replace(temporary, run_dir / name)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state under ``<state>/<parameter name>``, in a deterministic order, the same after a resume."""
    tensors = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{key}/{name}"] = value.detach().contiguous()
    return dict(sorted(tensors.items()))


def load_optimizer(optimizer: torch.optim.Optimizer, checkpoint: Path) -> None:
    """Restore what ``optimizer_tensors`` saved; every tensor must find its parameter, dtype and shape."""
    file = checkpoint / "optimizer.safetensors"
    wanted: dict[str, torch.Tensor] = {}
    for group in optimizer.param_groups:
        wanted.update(zip(group["names"], group["params"], strict=True))
    seen: dict[str, dict[str, torch.Tensor]] = {}
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        mend = "delete this checkpoint to continue from the one before it"
        raise InputError(f"is not a whole safetensors file ({error})", file=file, mend=mend) from None
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        if name not in wanted:
            raise InputError(
                f"{name} was trained then and is frozen now", file=file, mend="use the same --freeze, or a new run"
            )
        seen.setdefault(name, {})[kind] = value
    if seen and len(seen) != len(wanted):
        missing = next(name for name in wanted if name not in seen)
        raise InputError(
            f"{missing} was frozen then and is trained now", file=file, mend="use the same --freeze, or a new run"
        )
    for name, state in seen.items():
        parameter = wanted[name]
        form = _state_form(optimizer, parameter)
        if {kind: value.dtype for kind, value in state.items()} != {kind: dtype for kind, (_, dtype) in form.items()}:
            raise InputError(
                f"the state of {name} is that of another optimizer",
                file=file,
                mend="use the same --optimizer and --weights, or a new run",
            )
        for kind, value in state.items():
            if tuple(value.shape) != form[kind][0]:
                raise InputError(f"{kind} of {name} has another shape than the model", file=file)
            # Fused AdamW keeps its step count on the parameter's device, beside the moments.
            state[kind] = value.to(parameter.device)
        if isinstance(optimizer, AdamW):  # its own tensors, which may lie in paged memory
            fresh = optimizer.initial_state(parameter)
            state = {kind: fresh[kind].copy_(value) for kind, value in state.items()}
        optimizer.state[parameter] = state


def _state_form(
    optimizer: torch.optim.Optimizer, parameter: torch.Tensor
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor of a parameter's state."""
    if isinstance(optimizer, AdamW):
        return optimizer.state_form(parameter)
    moment = tuple(parameter.shape), parameter.dtype
    return {"step": ((), torch.float32), "exp_avg": moment, "exp_avg_sq": moment}


def read_if_complete(checkpoint: Path) -> dict[str, Any] | None:
    """The trainer state of a complete checkpoint; None for anything else."""
    try:
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        for name, size in state["files"].items():
            if (checkpoint / name).stat().st_size != size:
                return None
        if any(not isinstance(state[key], int) or state[key] < 0 for key in ("step", "epoch", "index")):
            return None
        if any(not isinstance(state[key], int | float | None) for key in ("best_step", "best_val_loss")):
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


def remove_checkpoint(checkpoint: Path) -> None:
    """Delete a checkpoint. It loses its name first, so a kill halfway leaves no half checkpoint."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(checkpoint, doomed)
    shutil.rmtree(doomed, ignore_errors=True)
