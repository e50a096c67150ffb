"""Recordings: read, mix to mono, cut, resample to 24 kHz; write 16-bit wav files."""

from __future__ import annotations

import hashlib
import io
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from csm_fast.config.shape import FRAME_SECONDS, SAMPLE_RATE
from csm_fast.system.errors import InputError
from csm_fast.system.files import write_file, writing_to

RESAMPLER = "soxr-HQ"  # named in manifests: another resampler gives other codes
_RATES = (4_000, 768_000)  # Hz; below, no speech; above, a damaged header
_BLOCK_SAMPLES = 1 << 22  # decoded at once, of all channels together: 16 MiB in float32
_UNKNOWN_SIZE = 0x7FFFF000  # or more: in a header that was written before the length was known, to a pipe


def audio_info(path: str | os.PathLike[str]) -> tuple[int, int, int]:
    """(sample rate in Hz, frames, channels) from the header, nothing decoded. Raises InputError as ``read_audio``."""
    where = _Where(path)
    with _open(where) as sound:
        return sound.samplerate, sound.frames, sound.channels


def read_audio(
    path: str | os.PathLike[str],
    *,
    start: float | None = None,
    end: float | None = None,
    sample_rate: int = SAMPLE_RATE,
    row: int | str | None = None,
    metadata_file: str | os.PathLike[str] | None = None,
) -> np.ndarray:
    """A recording, or its cut [start, end) in seconds, as mono float32 [samples] at ``sample_rate`` Hz.

    Channels are averaged; values are not scaled or clipped. Only the cut is decoded. An ``end`` up to 80 ms past the
    end of the recording counts as the end, because transcripts round times.

    Args:
        row, metadata_file: named in errors before the recording, if given.

    Raises:
        InputError: a file that is missing, unreadable, empty, not audio or truncated; no samples, NaN or infinite
            samples; a cut outside the recording or shorter than 80 ms.
    """
    where = _Where(path, row, metadata_file)
    with _open(where) as sound:
        rate, frames = sound.samplerate, sound.frames
        if frames == 0:
            raise where.error("has no samples", "record it again, or remove the row")
        if not _RATES[0] <= rate <= _RATES[1]:
            raise where.error(f"has a sample rate of {rate} Hz", f"give {_RATES[0]} to {_RATES[1]} Hz")
        first, last = _cut(start, end, frames, rate, where)
        wave = _decode(sound, first, last, where)
    bad = np.flatnonzero(~np.isfinite(wave))
    if bad.size:
        what = f"has {bad.size} NaN or infinite samples, the first at {(first + int(bad[0])) / rate:.3f} s"
        raise where.error(what, "export it again as 16-bit wav")
    if rate != sample_rate:
        import soxr

        wave = soxr.resample(wave, rate, sample_rate, quality="HQ")
    return np.ascontiguousarray(wave, dtype=np.float32)


def measure_silence(wave: np.ndarray, sample_rate: int, threshold_db: float = -40.0) -> tuple[float, float]:
    """(leading, trailing) silence of a wave [samples], in seconds, to 10 ms.

    A 10 ms window is silent if its RMS is more than ``-threshold_db`` dB below that of the loudest window. A wave
    without any sound is all leading silence: (its duration, 0.0).
    """
    window = max(1, round(sample_rate * 0.01))
    count = -(-len(wave) // window)
    padded = np.zeros(count * window, dtype=np.float64)
    padded[: len(wave)] = wave
    power = np.square(padded).reshape(count, window).mean(axis=1)
    loud = np.flatnonzero(power > power.max(initial=0.0) * 10 ** (threshold_db / 10))
    if not loud.size:
        return len(wave) / sample_rate, 0.0
    trailing = max(0, len(wave) - (int(loud[-1]) + 1) * window)
    return int(loud[0]) * window / sample_rate, trailing / sample_rate


def write_wav(path: str | os.PathLike[str], wave: Any, sample_rate: int) -> None:
    """Write mono samples [samples] in [-1, 1] (clipped to it) as a 16-bit PCM wav file, whole or not at all.

    Raises:
        InputError: the file cannot be written (read-only, disk full, no such folder).
        ValueError: a wave that is not one-dimensional and finite.
    """
    import soundfile

    samples = np.asarray(wave, dtype=np.float32)
    if samples.ndim != 1 or not np.isfinite(samples).all():
        raise ValueError(f"a wave is one-dimensional and finite, not of shape {samples.shape}")
    buffer = io.BytesIO()  # Python writes the file itself: libsndfile would not report a full disk
    pcm = np.round(np.clip(samples, -1.0, 1.0) * 32767.0).astype(np.int16)
    soundfile.write(buffer, pcm, sample_rate, format="WAV", subtype="PCM_16")
    with writing_to(path):
        write_file(Path(path), buffer.getvalue())


def hash_content(path: str | os.PathLike[str]) -> str:
    """SHA-256 of the file's bytes as 64 hex digits, read in blocks. Raises InputError as ``read_audio``."""
    digest = hashlib.sha256()
    with _open_bytes(_Where(path)) as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class _Where:
    """Which recording, and which row of which metadata file names it."""

    def __init__(self, path, row=None, metadata_file=None):
        self.path, self.row, self.metadata_file = os.fspath(path), row, metadata_file

    def error(self, what: str, mend: str) -> InputError:
        if self.metadata_file is None:
            return InputError(what, file=self.path, row=self.row, mend=mend)
        return InputError(f"{self.path} {what}", file=self.metadata_file, row=self.row, mend=mend)


def _open_bytes(where: _Where) -> BinaryIO:
    try:
        return open(where.path, "rb")
    except FileNotFoundError:
        raise where.error("does not exist", "check the path") from None
    except IsADirectoryError:
        raise where.error("is a folder, not a recording", "name the file inside it") from None
    except OSError as error:
        raise where.error(f"cannot be read ({error.strerror})", "check its permissions") from None


def _open(where: _Where) -> Any:
    """An open soundfile.SoundFile. Its file is complete, as far as its headers say."""
    import soundfile

    with _open_bytes(where) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size == 0:
            raise where.error("is empty (0 bytes)", "copy it again, or remove the row")
        promised = _promised_size(stream, size)
    if promised is not None and promised > size:
        raise where.error(f"is truncated: its header promises {promised:,} bytes, {size:,} are there", "copy it again")
    try:
        return soundfile.SoundFile(where.path)
    except soundfile.LibsndfileError as error:
        reason = error.error_string.strip().rstrip(".")
        mend = "convert it to wav or flac, e.g. ffmpeg -i IN OUT.wav, or remove the row"
        raise where.error(f"is not audio that libsndfile reads ({reason})", mend) from None


def _promised_size(stream: BinaryIO, size: int) -> int | None:
    """How many bytes the file should have by its own headers; None if they do not say.

    libsndfile silently shortens wav, aiff, au, mp3 and ogg files that were cut off, so a half-copied data set would
    train on half sentences. FLAC needs no check: decoding a cut file fails or gives too few samples (``_decode``).
    """
    head = stream.read(32)
    if head[:4] in (b"RIFF", b"RIFX") and head[8:12] == b"WAVE":
        return _promised_chunk(stream, size, "<" if head[:4] == b"RIFF" else ">", b"data")
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        return _promised_chunk(stream, size, ">", b"SSND")
    if head[:4] == b"RF64" and head[12:16] == b"ds64" and len(head) == 32:
        return 8 + struct.unpack("<Q", head[20:28])[0]
    if head[:4] == b".snd" and len(head) == 32:
        offset, length = struct.unpack(">II", head[4:12])
        return offset + length if length < _UNKNOWN_SIZE else None
    if head[:4] == b"OggS":
        return _promised_ogg(stream, size)
    if head[:3] == b"ID3" or (len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0):
        return _promised_mp3(stream, head)
    return None


def _promised_chunk(stream: BinaryIO, size: int, order: str, wanted: bytes) -> int | None:
    at = 12
    while at + 8 <= size:
        stream.seek(at)
        name, length = struct.unpack(f"{order}4sI", stream.read(8))
        if name == wanted:
            return at + 8 + length if length < _UNKNOWN_SIZE else None
        at += 8 + length + (length & 1)
    return None


def _promised_ogg(stream: BinaryIO, size: int) -> int | None:
    # A page has at most 65,307 bytes, so the last one begins inside this tail. Its segment table gives its length.
    stream.seek(max(0, size - 65_536))
    tail = stream.read()
    at = tail.rfind(b"OggS")
    while at >= 0 and (tail[at + 4 : at + 5] > b"\0" or tail[at + 5 : at + 6] > b"\7"):
        at = tail.rfind(b"OggS", 0, at)  # "OggS" inside sound: in a page, version 0 and three flags follow
    if at < 0:
        return None
    if len(tail) < at + 27 or len(tail) < at + 27 + tail[at + 26]:
        return size + 1
    table = tail[at + 27 : at + 27 + tail[at + 26]]
    return size - len(tail) + at + 27 + len(table) + sum(table)


def _promised_mp3(stream: BinaryIO, head: bytes) -> int | None:
    at = 0
    if head[:3] == b"ID3":
        stream.seek(6)
        at = 10 + sum((byte & 0x7F) << shift for byte, shift in zip(stream.read(4), (21, 14, 7, 0), strict=False))
    stream.seek(at)
    frame = stream.read(200)
    # If flag 2 is set, the Xing (or Info) header in the first frame counts the bytes from that frame on.
    tag = max(frame.find(b"Xing"), frame.find(b"Info"))
    if tag < 0 or len(frame) < tag + 16:
        return None
    flags = struct.unpack(">I", frame[tag + 4 : tag + 8])[0]
    offset = tag + 8 + (4 if flags & 1 else 0)
    return at + struct.unpack(">I", frame[offset : offset + 4])[0] if flags & 2 else None


def _cut(start: float | None, end: float | None, frames: int, rate: int, where: _Where) -> tuple[int, int]:
    """The cut as sample frames [first, last) of the recording."""
    duration = frames / rate
    begin = 0.0 if start is None else start
    finish = duration if end is None else end
    if not begin >= 0 or not finish >= 0:
        raise where.error(f"is cut from {begin} s to {finish} s", "give seconds, 0 or more")
    if begin >= duration:
        raise where.error(f"is {duration:.3f} s long, but start is {begin:g} s", "correct start, in seconds")
    if finish > duration + FRAME_SECONDS:
        raise where.error(f"is {duration:.3f} s long, but end is {finish:g} s", "correct end, in seconds")
    first, last = round(begin * rate), min(round(finish * rate), frames)
    # One sample less is allowed: 0.30 - 0.22 s is 80 ms but, in floating point, a little less.
    if last - first < FRAME_SECONDS * rate - 1:
        what = f"gives only {max(0.0, (last - first) / rate) * 1000:.0f} ms of audio"
        raise where.error(what, "give at least 80 ms, or remove the row")
    return first, last


def _decode(sound: Any, first: int, last: int, where: _Where) -> np.ndarray:
    """Sample frames [first, last) averaged to mono float32, in blocks: an hour of eight channels is gigabytes."""
    import soundfile

    blocks, missing = [], last - first
    block = max(1, _BLOCK_SAMPLES // sound.channels)
    reason = ""
    try:
        sound.seek(first)
        while missing > 0:
            part = sound.read(min(block, missing), dtype="float32", always_2d=True)
            if not len(part):
                break
            blocks.append(part.mean(axis=1, dtype=np.float32))
            missing -= len(part)
    except soundfile.LibsndfileError as error:
        reason = f" ({error.error_string.strip().rstrip('.')})"
    # The length of an mp3 may be an estimate that is wrong by a few of its frames of 26 ms; a cut is longer.
    if reason or missing > FRAME_SECONDS * sound.samplerate:
        what = f"is truncated or damaged: it cannot be decoded up to {last / sound.samplerate:.3f} s{reason}"
        raise where.error(what, "copy or export it again")
    return np.concatenate(blocks)
