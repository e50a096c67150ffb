"""What tests of the commands share: arguments, damage, and what lies in a folder."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import soundfile
from pretokenize_fakes import RATE
from train_cases import flags

SHARD = "train/shard-00000.safetensors"


def hash_files(folder: Path) -> dict[str, str]:
    """Every file and link below a folder; locks and caches are no one's loss."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.name == ".lock" or ".cache" in path.parts or path.is_dir() and not path.is_symlink():
            continue
        link = path.is_symlink()
        found[str(path.relative_to(folder))] = (
            os.readlink(path) if link else hashlib.sha256(path.read_bytes()).hexdigest()
        )
    return found


def train_args(folder: Path, *extra: str, **overrides) -> list[str]:
    return ["train", *flags(folder, **overrides), *extra]


def write_metadata(folder: Path, rows, name: str = "train.json") -> None:
    (folder / name).write_text(rows if isinstance(rows, str) else json.dumps(rows))


def write_sound(path: Path, wave: np.ndarray, rate: int = RATE, subtype: str = "PCM_16") -> None:
    soundfile.write(path, wave, rate, subtype=subtype)


def truncate(path: Path, size: int) -> None:
    with open(path, "r+b") as file:
        file.truncate(size)


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
