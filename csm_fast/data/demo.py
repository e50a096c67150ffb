"""Real speech for the demo: the English telephone prompts of Debian's asterisk-core-sounds-en, with transcripts.

``python -m csm_fast.data.demo TARGET`` fetches 24 minutes of one speaker (551 recordings, 8 kHz, CC-BY-SA-3.0) and
writes TARGET/metadata.json. It installs nothing and changes no system state. ``--sounds`` adds the 17 recordings that
are not speech (beeps and silence among them), with their descriptions as texts: the benchmarks use the whole package.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from csm_fast.system.errors import InputError
from csm_fast.system.files import write_file, writing_to

PACKAGES = ("asterisk-core-sounds-en-wav", "asterisk-core-sounds-en")  # recordings, transcripts
_AT_LEAST = 200  # recordings; fewer means another package of the same name
_MEND = "run `make demo DATA=metadata.json` with your own recordings and transcripts"
_FETCH = ("-qq", "-o", "Acquire::Retries=1", "-o", "Acquire::http::Timeout=20", "-o", "Acquire::https::Timeout=20")
_TIME_LIMIT_S = 300


def fetch_debian_speech(target_dir: str | os.PathLike[str], sounds: bool = False) -> Path:
    """Fetch the recordings into ``target_dir``/recordings and describe them in ``target_dir``/metadata.json.

    Does nothing if they are there already. Prints the number of recordings and the hours.

    Args:
        sounds: also fetch the recordings that are not speech; their text is the package's description.

    Returns:
        The path of metadata.json: flat rows ``text``, ``path`` (relative), ``speaker`` 0.

    Raises:
        InputError: not a Debian-like system, no answer from the archive, or a folder that cannot be written.
    """
    target = Path(target_dir).expanduser()
    metadata = target / "metadata.json"
    rows = _complete_rows(metadata)
    if rows is None:
        for tool in ("apt-get", "dpkg-deb"):
            if shutil.which(tool) is None:
                raise InputError(f"the demo's speech is a Debian package, and there is no {tool} here", mend=_MEND)
        with tempfile.TemporaryDirectory(prefix="csm_fast_demo_") as scratch:
            unpacked = _download(Path(scratch))
            with writing_to(target, "cannot write the recordings (50 MB)"):
                rows = _copy(unpacked, target, sounds)
                # Last: an interrupted run leaves no metadata.json and starts over.
                write_file(metadata, json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    _report(metadata, rows)
    return metadata


def parse_transcripts(lines: Iterable[str], sounds: bool = False) -> Iterator[tuple[str, str]]:
    """(recording's name without extension, what is said) for each line ``name: text`` that is speech.

    Left out are comments (``;``), sounds (entries all in brackets) and empty entries. Notes in brackets, and dots that
    mark an unfinished sentence, are removed; ``*`` and ``#`` become words. With ``sounds``, entries all in brackets are
    kept, without the brackets.
    """
    for line in lines:
        name, colon, text = line.strip().partition(":")
        if not colon or not name or name.startswith(";"):
            continue
        spoken = re.sub(r"\[[^\]]*\]|\([^)]*\)|<[^>]*>", " ", text)
        if sounds and not any(character.isalnum() for character in spoken):
            spoken = re.sub(r"[][()<>]", " ", text)
        text = spoken
        text = re.sub(r"\s*\.\.\.+\s*", " ", text)
        text = text.replace("*", " star ").replace("#", " pound ")
        text = re.sub(r"\s+([,.!?;:])", r"\1", " ".join(text.split()))
        if any(character.isalnum() for character in text):
            yield name.strip(), text


def _complete_rows(metadata: Path) -> list[dict] | None:
    """The rows of an earlier, complete fetch, or None."""
    try:
        rows = json.loads(metadata.read_text(encoding="utf-8"))
        complete = len(rows) > 0 and all((metadata.parent / row["path"]).is_file() for row in rows)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return rows if complete else None


def _download(scratch: Path) -> Path:
    """Download both packages and unpack them under ``scratch``."""
    archives = scratch / "archives"
    archives.mkdir()
    failure = _apt(("download", *PACKAGES), archives)
    if failure is not None:
        # The machine may never have fetched package lists. Private lists need no root and leave the system's alone.
        for folder in ("state/lists/partial", "cache/archives/partial"):
            (scratch / folder).mkdir(parents=True)
        private: tuple[str, ...] = ("-o", f"Dir::State={scratch}/state", "-o", f"Dir::Cache={scratch}/cache")
        private += ("-o", "Dir::State::status=/var/lib/dpkg/status", "-o", "APT::Sandbox::User=root")
        failure = _apt((*private, "update"), archives) or _apt((*private, "download", *PACKAGES), archives)
    if failure is not None:
        raise InputError(f"Debian's archive gave no {PACKAGES[0]} ({failure})", mend=_MEND)
    unpacked = scratch / "unpacked"
    for archive in sorted(archives.glob("*.deb")):
        done = subprocess.run(("dpkg-deb", "-x", archive, unpacked), capture_output=True, text=True)
        if done.returncode != 0:
            raise InputError(f"dpkg-deb cannot unpack {archive.name} ({_last_line(done.stderr)})", mend=_MEND)
    return unpacked


def _apt(arguments: tuple[str, ...], folder: Path) -> str | None:
    """Run apt-get in ``folder``; returns None, or why it failed."""
    command = ("apt-get", *_FETCH, *arguments)
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_TIME_LIMIT_S)
    except subprocess.TimeoutExpired:
        return f"no answer within {_TIME_LIMIT_S} s"
    if done.returncode != 0:
        return _last_line(done.stderr)
    # ``update`` exits with 0 even if every mirror failed, so count the files.
    wanted = arguments[-1] == PACKAGES[-1]
    return "nothing was downloaded" if wanted and len(list(folder.glob("*.deb"))) < len(PACKAGES) else None


def _copy(unpacked: Path, target: Path, with_sounds: bool) -> list[dict]:
    """Copy the recordings that have a transcript and are speech, or all; returns their metadata rows by name."""
    lists = sorted(unpacked.glob("usr/share/doc/*/core-sounds-en.txt*"))
    sounds = sorted(path for path in unpacked.glob("usr/share/asterisk/sounds/*") if any(path.rglob("*.wav")))
    if not lists or not sounds:
        raise InputError(f"{PACKAGES[0]} holds no recordings with transcripts", mend=_MEND)
    content = lists[0].read_bytes()
    text = (gzip.decompress(content) if lists[0].suffix == ".gz" else content).decode("utf-8", "replace")
    rows = []
    for name, spoken in sorted(dict(parse_transcripts(text.splitlines(), with_sounds)).items()):
        source = sounds[0] / f"{name}.wav"
        if not source.is_file():
            continue
        path = Path("recordings") / f"{name}.wav"
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target / path)
        rows.append({"text": spoken, "path": path.as_posix(), "speaker": 0})
    if len(rows) < _AT_LEAST:
        raise InputError(f"{PACKAGES[0]} holds only {len(rows)} recordings with transcripts", mend=_MEND)
    return rows


def _report(metadata: Path, rows: list[dict]) -> None:
    from csm_fast.data.audio import audio_info

    seconds = 0.0
    for row in rows:
        rate, frames, _ = audio_info(metadata.parent / row["path"])
        seconds += frames / rate
    print(f"{len(rows)} recordings, {seconds / 3600:.2f} hours of speech ({seconds / 60:.0f} minutes): {metadata}")


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:150] if lines else "no message"


if __name__ == "__main__":
    arguments = [a for a in sys.argv[1:] if a != "--sounds"]
    if len(arguments) != 1 or arguments[0].startswith("-"):
        sys.exit("usage: python -m csm_fast.data.demo TARGET [--sounds]")
    try:
        fetch_debian_speech(arguments[0], sounds="--sounds" in sys.argv[1:])
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
