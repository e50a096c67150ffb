"""Finds a model's weights: in a directory, a file, or on the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from csm_fast.system import hub
from csm_fast.system.errors import InputError
from csm_fast.system.files import read_json

HUB_TIMEOUT = 10  # seconds until an unreachable hub is given up

# Sesame's own file first: sesame/csm-1b on the hub has it beside transformers' copy of the same weights.
_PREFERRED = (
    "model.safetensors",
    "model.safetensors.index.json",
    "transformers.safetensors",
    "transformers.safetensors.index.json",
)


# An adapter's files, as PEFT and csm-mlx name them.
PEFT_WEIGHTS, MLX_WEIGHTS = "adapter_model.safetensors", "adapters.safetensors"
ADAPTER_CONFIG = "adapter_config.json"


def is_adapter(name_or_path: str | os.PathLike[str]) -> bool:
    """Whether this is a directory with an adapter and its configuration, and without a model."""
    path = Path(name_or_path).expanduser()
    held = {name for name in (PEFT_WEIGHTS, MLX_WEIGHTS, ADAPTER_CONFIG, *_PREFERRED) if (path / name).is_file()}
    return ADAPTER_CONFIG in held and not held.isdisjoint((PEFT_WEIGHTS, MLX_WEIGHTS)) and held.isdisjoint(_PREFERRED)


def _select(files: Iterable[str], where: str) -> str:
    """The weights file, or the index of one, among a directory's files."""
    files = set(files)
    for name in _PREFERRED:
        if name in files:
            return name
    parts = re.compile(r".*-\d{5}-of-\d{5}\.safetensors")
    found = sorted(n for n in files if n.endswith(".safetensors.index.json")) or sorted(
        n for n in files if n.endswith(".safetensors") and not parts.fullmatch(n) and "adapter" not in n
    )
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(f"holds several models ({', '.join(found[:4])})", file=where, mend="name one of the files")
    if any("adapter" in n and n.endswith(".safetensors") for n in files):
        raise InputError("holds an adapter, not a model", file=where, mend="give the model it was trained on")
    if pickled := sorted(n for n in files if n.endswith((".pt", ".pth", ".bin", ".ckpt"))):
        raise _pickled(f"{where}/{pickled[0]}")
    raise InputError(
        "holds no .safetensors file", file=where, mend="give a directory with model.safetensors and config.json"
    )


def _pickled(file: str) -> InputError:
    return InputError(
        "is a pickle, which may run any code when it is loaded, so it is not read",
        file=file,
        mend="save its tensors as model.safetensors (safetensors.torch.save_file) and give that",
    )


def locate_weights(name: str) -> Path:
    """The weights file or index that ``name`` means; a hub id is downloaded.

    Raises:
        InputError: nothing there, several models, an adapter, a pickle, or a hub that does not answer.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not any(path.glob("*.safetensors*")) and (path / "best").is_dir():
            raise InputError("is a run, not a model", file=name, mend=f"give {path / 'best'} or {path / 'last'}")
        return path / _select((p.name for p in path.iterdir()), name)
    if path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        raise _pickled(name)
    if path.exists():
        if path.name.endswith((".safetensors", ".safetensors.index.json")):
            return path
        raise InputError("is not a .safetensors file", file=name, mend="give a .safetensors file or its directory")
    if hub.is_hub_id(name) and not name.endswith((".safetensors", ".json")):
        return _download(name)
    raise InputError(
        "no such file or directory", file=name, mend="give a .safetensors file, a directory or a hub id (owner/name)"
    )


def _download(name: str) -> Path:
    """Fetch the files of a hub model, or find them in the local cache if the hub does not answer."""
    try:
        files, revision = hub.list_files(name, HUB_TIMEOUT)
        entry = _select(files, name)
        path = hub.download_file(name, entry, revision=revision, etag_timeout=HUB_TIMEOUT)
        for other in (*list_shards(path), *({"config.json"} & files)):
            hub.download_file(name, other, revision=revision, etag_timeout=HUB_TIMEOUT)
        return path
    except hub.HubError as error:
        if error.kind == "gated":
            raise InputError(
                "access to this model is gated",
                file=name,
                mend=f"accept its terms at https://huggingface.co/{name} and log in with: hf auth login",
            ) from None
        if error.kind == "repository":
            raise InputError(
                "no such directory here and no such model on the Hugging Face hub",
                file=name,
                mend="check the spelling; for a private model log in with: hf auth login",
            ) from None
        reason = f"{error.error_type}: {error.reason}"
    for entry in _PREFERRED:
        cached = hub.cached_file(name, entry)
        if cached is not None and all(hub.cached_file(name, other) for other in (*list_shards(cached), "config.json")):
            return cached
    raise InputError(
        f"no such directory here, and the Hugging Face hub cannot be reached ({reason[:200]})",
        file=name,
        mend="connect and run it again, or give a local directory with model.safetensors and config.json",
    )


def list_shards(file: Path) -> list[str]:
    """Names of the files that hold the tensors: those that an index lists, or the file itself."""
    if file.suffix != ".json":
        return [file.name]
    parts = read_json(file).get("weight_map")
    names = sorted(set(parts.values())) if isinstance(parts, dict) and parts else [""]
    if any(not isinstance(n, str) or Path(n).name != n or not n.endswith(".safetensors") for n in names):
        raise InputError("is not an index of .safetensors files", file=file, mend="copy or download it again")
    return names
