"""``csm-fast-train``: a training run in a process set up for it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from csm_fast.commands import INTERRUPTED
from csm_fast.config.train import RunSection, TrainConfig
from csm_fast.system.device import keep_freed_memory, resolve_device


def run(config: TrainConfig) -> int:
    """Train; the exit status."""
    from csm_fast.train.loop import train

    set_up_training(config.run)
    return 0 if train(config)["complete"] else INTERRUPTED


def set_up_training(run: RunSection) -> None:
    """Set this process up for training steps: where compiled layers are kept, and how memory is allocated."""
    # Compiled layers are kept where they outlast a restart of the machine. Read when the first one is compiled.
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "csm_fast" / "inductor"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
    # Packs of many sizes fragment the memory of CUDA's allocator, up to an eighth of it; expandable segments do not.
    # Read when CUDA is first used.
    if sys.platform == "linux" and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    if run.keep_freed_memory and resolve_device(run.device).type == "cpu":
        keep_freed_memory()
