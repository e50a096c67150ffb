"""audio.py: exact cuts, honest resampling, and one line for each kind of broken recording."""

import builtins
import hashlib
import io
import os
import struct

import numpy as np
import pytest
import soundfile

from csm_fast.data import audio
from csm_fast.data.audio import audio_info, hash_content, measure_silence, read_audio, write_wav
from csm_fast.system.errors import InputError


def tone(seconds=1.0, rate=24_000, hz=440.0, level=0.5):
    return (level * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def save(path, wave, rate=24_000, **kwargs):
    soundfile.write(path, wave, rate, **kwargs)
    return path


def message(callable_, *args, **kwargs):
    with pytest.raises(InputError) as caught:
        callable_(*args, **kwargs)
    line = str(caught.value)
    assert "\n" not in line and ";" in line and len(line) < 500, line
    return line


def test_24_khz_mono_is_read_unchanged(tmp_path):
    wave = tone(0.5)
    path = save(tmp_path / "a.wav", wave, subtype="FLOAT")
    got = read_audio(path)
    assert got.dtype == np.float32 and got.flags.c_contiguous
    np.testing.assert_array_equal(got, wave)
    assert audio_info(path) == (24_000, 12_000, 1)


def test_channels_are_averaged(tmp_path):
    channels = np.stack([tone(0.2, hz=100 * (i + 1)) for i in range(8)], axis=1)
    path = save(tmp_path / "a.wav", channels, subtype="FLOAT")
    np.testing.assert_allclose(read_audio(path), channels.mean(axis=1), atol=1e-7)
    assert audio_info(path) == (24_000, 4_800, 8)


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 44_100, 48_000, 192_000])
def test_any_rate_becomes_24_khz(tmp_path, rate):
    got = read_audio(save(tmp_path / "a.wav", tone(1.0, rate), rate, subtype="FLOAT"))
    assert abs(len(got) - 24_000) <= 1
    middle = slice(2_000, 22_000)  # a filter rings at both ends
    np.testing.assert_allclose(got[middle], tone(1.0)[: len(got)][middle], atol=2e-3)


@pytest.mark.parametrize("rate, channels", [(24_000, 1), (48_000, 2)])
@pytest.mark.parametrize("start, end", [(None, None), (0.25, None), (None, 0.5), (0.1, 0.35), (0.92, 1.0)])
def test_cuts(tmp_path, monkeypatch, rate, channels, start, end):
    monkeypatch.setattr(audio, "_BLOCK_SAMPLES", 5_000)  # several blocks, and blocks that do not divide the cut
    wave = np.random.default_rng(0).uniform(-0.5, 0.5, (rate, channels)).astype(np.float32)
    path = save(tmp_path / "a.wav", wave, rate, subtype="FLOAT")
    first, last = round((start or 0) * rate), round((end or 1) * rate)
    got = read_audio(path, start=start, end=end, sample_rate=rate)
    np.testing.assert_allclose(got, wave[first:last].mean(axis=1), atol=1e-7)
    assert len(read_audio(path, start=start, end=end)) == pytest.approx((last - first) * 24_000 / rate, abs=1)


def test_only_the_cut_is_decoded(tmp_path, monkeypatch):
    read = []
    original = soundfile.SoundFile.read
    monkeypatch.setattr(
        soundfile.SoundFile, "read", lambda self, frames=-1, **kw: read.append(frames) or original(self, frames, **kw)
    )
    read_audio(save(tmp_path / "a.flac", tone(5.0)), start=3.0, end=3.5)
    assert sum(read) == 12_000


def test_a_small_overshoot_is_the_end_of_the_recording(tmp_path):
    path = save(tmp_path / "a.wav", tone(1.0))
    assert len(read_audio(path, start=0.5, end=1.079)) == 12_000
    assert "is 1.000 s long, but end is 1.081 s" in message(read_audio, path, end=1.081)


def test_eighty_milliseconds_survive_floating_point(tmp_path):
    path = save(tmp_path / "a.wav", tone(1.0, 44_100), 44_100)
    for start in np.arange(0, 0.9, 0.01):
        assert len(read_audio(path, start=float(start), end=float(start) + 0.08)) >= 1919


def test_values_above_one_are_kept(tmp_path):
    path = save(tmp_path / "a.wav", tone(0.2, level=3.0), subtype="FLOAT")
    assert read_audio(path).max() == pytest.approx(3.0, abs=0.01)


FORMATS = {
    "wav": {},
    "24.wav": {"subtype": "PCM_24"},
    "f64.wav": {"subtype": "DOUBLE"},
    "ulaw.wav": {"subtype": "ULAW"},
    "big.wav": {"endian": "BIG"},
    "aiff": {},
    "au": {},
    "rf64": {},
    "flac": {},
    "ogg": {},
    "opus": {"format": "OGG", "subtype": "OPUS"},
    "mp3": {},
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_and_their_truncation(tmp_path, name):
    try:
        path = save(tmp_path / f"a.{name}", tone(2.0, 48_000), 48_000, **FORMATS[name])
    except soundfile.LibsndfileError as error:
        pytest.skip(f"this libsndfile writes no {name}: {error}")
    assert len(read_audio(path)) == pytest.approx(48_000, abs=1_000)
    content = path.read_bytes()
    for fraction in (0.02, 0.3, 0.7, 0.99):
        cut = tmp_path / f"cut.{name}"
        cut.write_bytes(content[: int(len(content) * fraction)])
        line = message(read_audio, cut, row=4, metadata_file="m.csv")
        assert line.startswith(f"m.csv, row 4: {cut} is "), line
        assert "truncated" in line or "not audio" in line, line


def test_a_wav_file_of_unknown_length_is_read(tmp_path):
    """What ffmpeg writes into a pipe: sizes of 0xFFFFFFFF."""
    content = bytearray(save(tmp_path / "a.wav", tone(0.5)).read_bytes())
    at = content.find(b"data") + 4
    content[4:8] = content[at : at + 4] = struct.pack("<I", 0xFFFFFFFF)
    (tmp_path / "b.wav").write_bytes(content)
    assert len(read_audio(tmp_path / "b.wav")) == 12_000


def test_chunks_before_and_after_the_samples_are_skipped(tmp_path):
    content = save(tmp_path / "a.wav", tone(0.5)).read_bytes()
    at = content.find(b"data")
    extra = b"LIST" + struct.pack("<I", 5) + b"hello\0"  # odd length, padded
    body = content[12:at] + extra + content[at:] + extra
    (tmp_path / "b.wav").write_bytes(b"RIFF" + struct.pack("<I", len(body) + 4) + b"WAVE" + body)
    np.testing.assert_array_equal(read_audio(tmp_path / "b.wav"), read_audio(tmp_path / "a.wav"))


# Broken recordings


def bad_samples(value, at=6_000):
    wave = tone(0.5)
    wave[at] = value
    return wave


def wav_bytes(wave, rate=24_000, **kwargs):
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, format="WAV", **kwargs)
    return buffer.getvalue()


BROKEN = {
    "empty": (b"", "is empty (0 bytes); copy it again"),
    "text": (b"This is not audio at all, however long it may be.", "is not audio that libsndfile reads ("),
    "zeros": (bytes(4096), "is not audio that libsndfile reads ("),
    "a header": (wav_bytes(tone(0.5))[:20], "is not audio that libsndfile reads ("),
    "no samples": (wav_bytes(np.zeros(0, np.float32)), "has no samples; record it again"),
    "nan": (wav_bytes(bad_samples(np.nan), subtype="FLOAT"), "has 1 NaN or infinite samples, the first at 0.250 s"),
    "infinite": (wav_bytes(bad_samples(-np.inf), subtype="FLOAT"), "has 1 NaN or infinite samples"),
    "beyond float32": (wav_bytes(1e300 * np.ones(12_000), subtype="DOUBLE"), "has 12000 NaN or infinite samples"),
    "79 ms": (wav_bytes(tone(0.079)), "gives only 79 ms of audio; give at least 80 ms"),
    "one sample": (wav_bytes(tone(0.5)[:1]), "gives only 0 ms of audio"),
    "1 Hz": (wav_bytes(tone(0.5), 1), "has a sample rate of 1 Hz; give 4000 to 768000 Hz"),
    "truncated": (wav_bytes(tone(0.5))[:-100], "is truncated: its header promises 24,044 bytes, 23,944 are there"),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_broken_recordings(tmp_path, case):
    content, expected = BROKEN[case]
    path = tmp_path / "a.wav"
    path.write_bytes(content)
    line = message(read_audio, path, row="3, turn 2", metadata_file=tmp_path / "m.json")
    assert line.startswith(f"{tmp_path / 'm.json'}, row 3, turn 2: {path} {expected.split(' (')[0]}"), line
    assert expected in line, line
    line = message(read_audio, path)
    assert line.startswith(f"{path}: ") and expected in line, line


CUTS = {
    "start past the end": ({"start": 1.5}, "is 1.000 s long, but start is 1.5 s; correct start"),
    "start at the end": ({"start": 1.0}, "is 1.000 s long, but start is 1 s"),
    "end past the end": ({"start": 0.2, "end": 3.0}, "is 1.000 s long, but end is 3 s; correct end"),
    "endless": ({"end": float("inf")}, "is 1.000 s long, but end is inf s"),
    "short": ({"start": 0.2, "end": 0.25}, "gives only 50 ms of audio; give at least 80 ms"),
    "short tail": ({"start": 0.95}, "gives only 50 ms of audio"),
    "reversed": ({"start": 0.5, "end": 0.2}, "gives only 0 ms of audio"),
    "negative": ({"start": -0.5}, "is cut from -0.5 s to 1.0 s; give seconds, 0 or more"),
    "nan": ({"end": float("nan")}, "is cut from 0.0 s to nan s"),
}


@pytest.mark.parametrize("case", CUTS)
def test_bad_cuts(tmp_path, case):
    kwargs, expected = CUTS[case]
    path = save(tmp_path / "a.wav", tone(1.0))
    line = message(read_audio, path, row=12, metadata_file="m.csv", **kwargs)
    assert line.startswith(f"m.csv, row 12: {path} {expected}"), line


@pytest.mark.parametrize("function", [read_audio, audio_info, hash_content])
def test_files_that_cannot_be_opened(tmp_path, monkeypatch, function):
    assert message(function, tmp_path / "none.wav").endswith("none.wav: does not exist; check the path")
    assert "is a folder, not a recording" in message(function, tmp_path)

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    path = save(tmp_path / "a.wav", tone(0.5))
    monkeypatch.setattr(builtins, "open", refuse)  # root may read everything, so permissions alone prove nothing
    assert "cannot be read (Permission denied); check its permissions" in message(function, path)


# Silence, writing, hashes


def test_silence():
    sound = np.concatenate([np.zeros(2_400), tone(1.0), np.zeros(7_200)]).astype(np.float32)
    assert measure_silence(sound, 24_000) == pytest.approx((0.1, 0.3), abs=0.0101)
    assert measure_silence(1e-3 * sound, 24_000) == measure_silence(
        sound, 24_000
    )  # relative to the loudest, not absolute
    noisy = sound + np.random.default_rng(0).normal(0, 1e-4, len(sound)).astype(np.float32)
    assert measure_silence(noisy, 24_000) == measure_silence(sound, 24_000)
    assert measure_silence(noisy, 24_000, threshold_db=-120.0) == (0.0, 0.0)
    assert measure_silence(tone(1.003), 24_000) == (0.0, 0.0)
    assert measure_silence(np.zeros(12_000, np.float32), 24_000) == (0.5, 0.0)
    assert measure_silence(np.zeros(0, np.float32), 24_000) == (0.0, 0.0)


def test_write_wav(tmp_path):
    path = tmp_path / "a.wav"
    write_wav(path, np.array([0.0, 0.5, -0.5, 1.0, -1.0, 2.0, -2.0]), 24_000)
    assert soundfile.info(path).subtype == "PCM_16" and audio_info(path) == (24_000, 7, 1)
    got, rate = soundfile.read(path, dtype="int16")
    assert rate == 24_000 and got.tolist() == [0, 16384, -16384, 32767, -32767, 32767, -32767]
    wave = tone(0.5)
    write_wav(path, wave, 24_000)
    assert np.abs(read_audio(path) - wave).max() < 1e-4
    assert os.listdir(tmp_path) == ["a.wav"]


@pytest.mark.parametrize("wave", [np.zeros((2, 100)), np.array([0.0, np.nan]), np.array(1.0)])
def test_write_wav_refuses_what_is_no_wave(tmp_path, wave):
    with pytest.raises(ValueError, match="one-dimensional and finite"):
        write_wav(tmp_path / "a.wav", wave, 24_000)
    assert not os.listdir(tmp_path)


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.wav"
    write_wav(path, tone(0.5), 24_000)
    before = path.read_bytes()
    assert "cannot write: a folder of this path does not exist" in message(
        write_wav, tmp_path / "no" / "a.wav", tone(), 24_000
    )
    original = builtins.open

    class Full(io.BytesIO):
        def write(self, content):
            raise OSError(28, "No space left on device")

    def full(name, *args, **kwargs):
        original(name, *args, **kwargs).close()
        return Full()

    monkeypatch.setattr(builtins, "open", full)
    assert f"{path}: cannot write: the disk is full; free some space" in message(write_wav, path, tone(), 24_000)
    monkeypatch.undo()
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.wav"]


def test_content_hash(tmp_path):
    content = os.urandom(3_000_001)
    (tmp_path / "a.bin").write_bytes(content)
    assert hash_content(tmp_path / "a.bin") == hashlib.sha256(content).hexdigest()
