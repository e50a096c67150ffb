"""The format of a token store's files: the manifest's fields and each shard's arrays, and checks of them on opening."""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from csm_fast.system.arrays import Arrays, map_arrays
from csm_fast.system.errors import InputError

FORMAT = "csm_fast token store"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
AGAIN = "run csm-fast pretokenize again"

# name -> (dtype, shape after the first axis, length of the first axis)
ARRAYS: dict[str, tuple[str, tuple[Any, ...], str]] = {
    "codes": ("uint16", ("K",), "frames"),
    "text": ("int32", (), "text"),
    "code_offsets": ("int64", (), "turns+1"),
    "text_offsets": ("int64", (), "turns+1"),
    "speaker": ("int32", (), "turns"),
    "conversation": ("int64", (), "turns"),
    "source_index": ("int64", (), "turns"),
    "content_key": ("uint8", (32,), "turns"),
    "clip_stats": ("float32", (3,), "turns"),
}


def corrupt_file(path: Path, what: str) -> InputError:
    """The error for a file of the store that contradicts the manifest or the format."""
    return InputError(f"corrupt: {what}", file=path, mend=AGAIN)


def unreadable_file(path: Path, error: OSError) -> InputError:
    """The error for a file that the operating system does not let us read."""
    mend = "raise the limit on open files (ulimit -n)" if error.errno == errno.EMFILE else "check its permissions"
    return InputError(f"cannot be read ({error.strerror})", file=path, mend=mend)


def read_manifest(path: Path, shown: Path) -> dict[str, Any]:
    """manifest.json of the store at ``path``. Every field that readers rely on is checked.

    Args:
        shown: the path that errors name.
    """
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        what = f"not a token store (no {MANIFEST})" if path.exists() else "no such directory"
        raise InputError(what, file=shown, mend="give a directory that csm-fast pretokenize wrote") from None
    except OSError as error:
        raise unreadable_file(file, error) from None
    except ValueError:
        raise corrupt_file(file, "not JSON") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError("not the manifest of a token store", file=file, mend=AGAIN)
    version = manifest.get("format_version")
    if not isinstance(version, int) or version < 1:
        raise corrupt_file(file, f"format_version is {version!r}")
    if version > FORMAT_VERSION:
        what = f"format version {version}, this csm_fast reads up to {FORMAT_VERSION}"
        raise InputError(what, file=file, mend="upgrade csm_fast")
    wanted: dict[str, dict[str, Any]] = {
        "codec": {"fingerprint": str, "num_codebooks": int, "codebook_size": int},
        "text_tokenizer": {"fingerprint": str, "vocab_size": int},
        "counts": {"conversations": int, "turns": int, "frames": int, "text_tokens": int, "hours": (int, float)},
    }
    for name, fields in wanted.items():
        for field, kind in fields.items():
            section = manifest.get(name)
            if not isinstance(section, dict) or not isinstance(section.get(field), kind):
                raise corrupt_file(file, f"{name}.{field} is missing")
    shards = manifest.get("shards")
    shard_fields = {"file": str, "sha256": str, "bytes": int, "turns": int, "frames": int}
    if not isinstance(shards, list) or not shards:
        raise corrupt_file(file, "it names no shard")
    for shard in shards:
        if not isinstance(shard, dict) or any(not isinstance(shard.get(k), kind) for k, kind in shard_fields.items()):
            raise corrupt_file(file, "a shard is not described")
        if Path(shard["file"]).name != shard["file"]:
            raise corrupt_file(file, f"shard {shard['file']!r} is outside the store")
    return manifest


def open_shard(path: Path, entry: Mapping[str, Any], num_codebooks: int) -> Arrays:
    """Map one shard, and check its size, every array's dtype and shape, and the offsets."""
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            kind = "truncated" if size < entry["bytes"] else "too long"
            raise InputError(f"{kind}: {size:,} bytes of {entry['bytes']:,}", file=path, mend=AGAIN)
        arrays = map_arrays(path, keep_open=True)
    except FileNotFoundError:
        raise InputError("missing shard", file=path, mend=AGAIN) from None
    except OSError as error:
        raise unreadable_file(path, error) from None
    turns, text = entry["turns"], len(arrays["text"]) if "text" in arrays else 0
    firsts = {"frames": entry["frames"], "text": text, "turns": turns, "turns+1": turns + 1}
    for name, (dtype, rest, count) in ARRAYS.items():
        if name not in arrays:
            raise corrupt_file(path, f"no array {name!r}")
        shape = (firsts[count], *(num_codebooks if n == "K" else n for n in rest))
        found = arrays[name]
        if found.dtype != dtype or found.shape != shape:
            raise corrupt_file(path, f"{name} is {found.dtype} {list(found.shape)}, not {dtype} {list(shape)}")
    if not turns:
        raise corrupt_file(path, "it holds no turn")
    for name, end in (("code_offsets", entry["frames"]), ("text_offsets", text)):
        offsets = arrays[name]
        if offsets[0] != 0 or offsets[-1] != end or np.diff(offsets).min() < 1:
            raise corrupt_file(path, f"{name} do not rise from 0 to {end}")
    return arrays
