"""pretokenize killed, interrupted or failing at any moment, and the parts that make it go on."""

import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from paths import ROOT
from pretokenize_fakes import FakeCodec, load, make_data, refused, run, save, stores

from csm_fast.data import code_cache
from csm_fast.data.code_cache import CodeCache
from csm_fast.data.decode_pool import DecodePool, Request
from csm_fast.data.token_store import open_split
from csm_fast.system import files
from csm_fast.system.arrays import write_arrays
from csm_fast.system.files import write_file


@pytest.fixture
def data(tmp_path):
    return make_data(tmp_path)


CHILD = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests/cases"]
from pathlib import Path
from csm_fast.data import code_cache
from pretokenize_fakes import FakeCodec, run
code_cache.FLUSH_SECONDS = float(sys.argv[4])
codec = FakeCodec(pause=float(sys.argv[3]), log=sys.argv[2] + "/log")
print("ready", flush=True)
run(Path(sys.argv[2]), codec, workers=1, val_fraction=0.3)
"""


def start(data, pause, flush):
    log = data / "log"
    log.write_text("")
    command = [sys.executable, "-c", CHILD, str(ROOT), str(data), str(pause), str(flush)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True), log


def wait_for(log, clips):
    deadline = time.time() + 20
    while len(log.read_text()) < clips and time.time() < deadline:
        time.sleep(0.002)


@pytest.mark.slow
@pytest.mark.parametrize("killed_after", [1, 5, 11])
def test_killed_while_encoding(data, killed_after):
    run(data, output="undisturbed", val_fraction=0.3)
    child, log = start(data, pause=0.03, flush=0.0)
    wait_for(log, killed_after)
    child.kill()
    child.communicate()
    done = len(log.read_text())
    assert killed_after <= done < 12 and not (data / "tokens" / "train").exists()
    (data / "tokens" / ".cache" / "part.tmp").write_bytes(b"half a part")
    _, codec = run(data, val_fraction=0.3)
    assert 12 - done <= codec.clips <= 12 - done + 1  # the one under way
    assert stores(data) == stores(data, "undisturbed")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("exchange", [True, False])
def test_killed_before_every_step_of_saving(data, monkeypatch, exchange):
    """kill -9 before the 1st, 2nd, ... change of a name or sync: the old or new stores are there, and a rerun is exact.

    `exchange` is whether the file system can swap two directories in one call.
    """
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    monkeypatch.setattr(code_cache, "FLUSH_SECONDS", 0.0)
    rows = load(data)
    run(data, output="undisturbed", val_fraction=0.3)
    save(data, rows[:9])
    run(data, output="old", val_fraction=0.3)
    save(data, rows)
    tokens, step, ended = data / "tokens", 0, False
    while not ended:
        step += 1
        shutil.rmtree(tokens, ignore_errors=True)
        shutil.copytree(data / "old", tokens)
        child = os.fork()
        if not child:
            calls = iter(range(step))
            for module, name in ((os, "fsync"), (os, "replace"), (os, "rename"), (files, "_exchange")):
                die_in_time(module, name, calls, step)
            run(data, val_fraction=0.3)
            os._exit(0)
        ended = os.waitpid(child, 0)[1] == 0
        for split in ("train", "val"):
            store = open_split(tokens, split)
            for i in range(len(store)):
                store.conversation(i)
        _, codec = run(data, val_fraction=0.3)
        assert codec.clips <= 3
        assert stores(data) == stores(data, "undisturbed"), step
    assert step > 20 and codec.clips == 0


def die_in_time(module, name, calls, step):
    real = getattr(module, name)

    def call(*arguments, **options):
        if next(calls) == step - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)

    setattr(module, name, call)


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(data):
    child, log = start(data, pause=0.1, flush=1000.0)
    wait_for(log, 4)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=20)
    assert child.returncode == -signal.SIGINT  # how Python ends on an uncaught KeyboardInterrupt
    assert "run it again to go on" in err
    done = len(log.read_text())
    _, codec = run(data, val_fraction=0.3)
    assert 12 - done <= codec.clips <= 12 - done + 1 < 12


def test_a_failing_codec_loses_nothing(data):
    class Breaking(FakeCodec):
        def encode(self, waves):
            if self.clips == 7:
                raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")
            return super().encode(waves)

    text = refused(lambda: run(data, Breaking()))
    assert "lower --batch-seconds" in text
    assert run(data)[1].clips == 5


def test_damaged_parts_are_thrown_away(data, capsys):
    class Stop(FakeCodec):
        def encode(self, waves):
            if self.clips == 6:
                raise SystemExit
            return super().encode(waves)

    with pytest.raises(SystemExit):
        run(data, Stop())
    (part,) = (data / "tokens" / ".cache").glob("part-*")
    whole = part.read_bytes()
    part.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    (data / "tokens" / ".cache" / "files.jsonl").open("ab").write(b'["torn')
    run(data, output="fresh")
    assert run(data)[1].clips == 12
    assert "damaged, deleted" in capsys.readouterr().err
    assert stores(data) == stores(data, "fresh")


def test_a_damaged_store_is_not_reused(data, capsys):
    run(data)
    wanted = stores(data)
    shard = data / "tokens" / "train" / "shard-00000.safetensors"
    whole = bytearray(shard.read_bytes())
    whole[-1] ^= 1
    shard.write_bytes(bytes(whole))
    assert run(data)[1].clips == 12 and stores(data) == wanted
    assert "encoded again" in capsys.readouterr().err


def test_a_decoder_that_crashes_fails_one_clip(data, monkeypatch):
    fake = data / "fake"
    (fake / "csm_fast").mkdir(parents=True)
    for path in (ROOT / "csm_fast").rglob("*.py"):
        link = fake / path.relative_to(ROOT)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    audio = fake / "csm_fast" / "data" / "audio.py"
    audio.unlink()
    audio.write_text(
        "import os\ndef hash_content(path):\n    print('noise')\n"
        "    if path.endswith('crash.wav'): os.abort()\n    return 'h' * 64\n"
    )
    monkeypatch.syspath_prepend(str(fake))
    for name in ("crash.wav", "fine.wav"):
        (data / name).write_bytes(b"x")
    paths = [str(data / name) for name in ("fine.wav", "crash.wav", "fine.wav")]
    with DecodePool(1) as pool:
        replies = [reply for _, reply in pool.run([Request(p, False, row="3", file="m.json") for p in paths])]
    assert [reply.content for reply in replies] == ["h" * 64, "", "h" * 64]
    assert "m.json, row 3: the decoder crashed on" in str(replies[1].error)


def test_the_pool_is_bounded_and_ends_early():
    asked = []

    def requests():
        for i in range(1000):
            asked.append(i)
            yield Request(f"/nowhere/{i}", False)

    with DecodePool(2) as pool:
        found = pool.run(requests())
        assert "does not exist" in str(next(found)[1].error)
        assert len(asked) <= 6
    assert all(child.poll() is not None for child in pool._children)


def test_closing_after_a_crash_keeps_quiet(tmp_path, monkeypatch):
    start = DecodePool._start

    def dead(self):
        child = start(self)
        child.kill()
        child.wait()
        return child

    monkeypatch.setattr(DecodePool, "_start", dead)
    with DecodePool(1) as pool:  # closing flushes the request into a pipe that nobody reads
        assert "crashed" in str(next(pool.run([Request("/nowhere", False)]))[1].error)
    assert all(pipe.closed for child in pool._children for pipe in (child.stdin, child.stdout))


def test_the_cache_holds_few_files_open(tmp_path):
    cache = CodeCache(tmp_path, 2)
    (tmp_path / ".cache").mkdir()
    keys = [hashlib.sha256(bytes([i])).digest() for i in range(60)]
    for i, key in enumerate(keys):
        cache.add(key, np.full((i + 1, 2), i, np.uint16), (float(i), 0.0, 0.0))
        cache.flush()
    cache = CodeCache(tmp_path, 2)
    for i, key in enumerate(keys):
        codes, stats = cache.get(key)
        assert codes.tolist() == [[i, i]] * (i + 1) and stats == (i, 0.0, 0.0)
    assert len(cache._mapped) <= code_cache.OPEN_FILES
    cache.clear()
    assert not list((tmp_path / ".cache").glob("part-*"))


def test_writes_are_whole_or_absent(tmp_path, monkeypatch):
    target = tmp_path / "file"
    write_file(target, b"old")
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError):
        write_file(target, b"new")
    assert target.read_bytes() == b"old"
    with pytest.raises(OSError):
        write_arrays(tmp_path / "shard", {"a": [np.zeros(3, np.int32)]})
    assert not (tmp_path / "shard").exists()
