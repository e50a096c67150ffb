"""Processes of their own for what is measured: one does not lend its heap or its caches to the next."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

# What ``csm-fast-train`` sets before PyTorch is imported.
KEPT_MEMORY = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8192", "THP_MEM_ALLOC_ENABLE": "1"}


def run_worker(module: str, *arguments: str, keep_memory: bool = False, quiet: bool = False) -> Any:
    """Run ``python -m module`` and return the last line that it prints, which is JSON.

    Args:
        keep_memory: set the process up as ``csm-fast-train`` sets up its own.
        quiet: show what it writes to its standard error only if it fails.

    Raises:
        SystemExit: the process failed.
    """
    variables = {**os.environ, **(KEPT_MEMORY if keep_memory else {})}
    errors = subprocess.PIPE if quiet else None
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=variables)
    if done.returncode:
        raise SystemExit(f"{done.stderr or ''}error: {' '.join(command[2:5])} stopped with status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])
