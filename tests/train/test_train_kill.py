"""Training killed, interrupted or stopped at any moment ends with the same bytes as training left alone."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from paths import ROOT
from train_cases import CODEC, TEXT, K, config, environment, flags, prepare, start

from csm_fast import InputError
from csm_fast.report.metrics import read_metrics
from csm_fast.system.lock import Lock
from csm_fast.train.checkpoint import read_if_complete
from csm_fast.train.loop import train
from csm_fast.train.run_folder import list_checkpoints

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and kill")

# Imports everything once, then forks a child for each request, so that twenty runs do not import torch twenty times.
# A child runs the real command. Before each change of a name or sync it looks whether the links hold, and it may be
# told to be slow there, or to die there as by kill -9.
SERVER = """
import faulthandler, json, os, signal, sys, time
from pathlib import Path
import csm_fast.train.loop, csm_fast.report.summary, csm_fast.train.samples, torch._dynamo
from csm_fast import cli
from csm_fast.train import checkpoint

def watch(run_dir, die_at, pause):
    calls = 0
    def watched(call):
        def wrapper(*args, **options):
            nonlocal calls
            calls += 1
            for name in ("last", "best"):
                link = Path(run_dir, name)
                if (link.is_symlink() or link.exists()) and not checkpoint.read_if_complete(link):
                    print("VIOLATION:", name, "->", os.readlink(link), "before", call.__name__, args, file=sys.stderr)
            if calls == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(pause)
            return call(*args, **options)
        return wrapper
    for name in ("fsync", "replace", "symlink", "mkdir", "unlink", "rmdir"):
        setattr(os, name, watched(getattr(os, name)))

for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if not child:
        error = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(error, 2)
        faulthandler.enable()  # SIGABRT shows where each thread is
        csm_fast.report.plot = lambda *args: None  # most of such a short run's time
        watch(request["run"], request["die_at"], request["pause"])
        status = 1
        try:
            status = cli.main(request["argv"])
        finally:
            sys.stderr.flush()
            os._exit(status)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Server:
    def __init__(self):
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=pipe, stdout=pipe, text=True, env=environment(), cwd=ROOT
        )

    def begin(self, folder: Path, die_at: int = 0, pause: float = 0.0, **overrides) -> int:
        """Start training in ``folder``; returns the process to kill."""
        self.log = folder / "log"
        argv = ["train", *flags(folder, **overrides)]
        run = overrides.get("output_dir", folder / "run")
        request = {"argv": argv, "run": str(run), "log": str(self.log), "die_at": die_at, "pause": pause}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        self.child = int(self.process.stdout.readline())
        return self.child

    def end(self) -> int:
        """The exit status; minus the signal's number where one ended it."""
        late = threading.Timer(120, os.kill, (self.child, signal.SIGABRT))  # its last words are its threads' stacks
        late.start()
        status = int(self.process.stdout.readline())
        late.cancel()
        said = self.log.read_text()
        assert "VIOLATION" not in said and "Traceback" not in said and "Fatal" not in said, said
        return status

    def train(self, folder: Path, **options) -> int:
        self.begin(folder, **options)
        return self.end()


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.process.stdin.close()
    server.process.wait(10)


def outcome(run: Path) -> dict:
    """What two runs must have in common to the last bit."""
    rows = read_metrics(run / "metrics.jsonl")
    return {
        "weights": (run / "last" / "model.safetensors").read_bytes(),
        "moments": (run / "last" / "optimizer.safetensors").read_bytes(),
        "best": (run / "best" / "model.safetensors").read_bytes(),
        "links": (os.readlink(run / "last"), os.readlink(run / "best")),
        "steps": [row["step"] for row in rows],
        "validations": {row["step"]: row["val_per_codebook"] for row in rows if row["val_loss"] is not None},
        "state": {k: v for k, v in read_if_complete(run / "last").items() if k != "files"},
        "left": sorted(p.name for p in run.iterdir() if p.name != "loss.png"),
    }


def assert_holds(run: Path) -> None:
    """Whatever a killed run leaves: links to whole checkpoints only, and nothing half called a checkpoint."""
    for name in ("last", "best"):
        assert not (run / name).is_symlink() or read_if_complete(run / name), f"{name} -> {os.readlink(run / name)}"
    assert all(read_if_complete(path) for path in run.glob("step-*"))


@pytest.mark.slow
def test_killed_before_every_step_of_saving(server, tmp_path):
    """The nth start of a run dies at its nth sync, rename, link or deletion, until none is left to die at."""
    folder = prepare(tmp_path)
    often = {"n_epochs": 20, "max_steps": 30, "save_every": 1, "val_every": 3, "log_every": 1, "keep": 1}
    assert server.train(folder, output_dir=str(tmp_path / "alone"), **often) == 0
    deaths = 0
    while (status := server.train(folder, die_at=deaths + 1, **often)) == -signal.SIGKILL:
        deaths += 1
        assert_holds(tmp_path / "run")
    assert status == 0 and deaths > 50
    assert outcome(tmp_path / "run") == outcome(tmp_path / "alone")


@pytest.mark.slow
def test_killed_at_random_moments(server, tmp_path):
    """Ten times kill -9, wherever it finds the run: half of the time it is saving, which is slowed down for that."""
    folder = prepare(tmp_path)
    often = {"n_epochs": 20, "max_steps": 60, "save_every": 1, "val_every": 4, "log_every": 1, "keep": 2}
    assert server.train(folder, output_dir=str(tmp_path / "alone"), **often) == 0
    moments = random.Random(2)
    for _ in range(10):
        child = server.begin(folder, pause=0.005, **often)
        time.sleep(moments.uniform(0.1, 0.9))
        os.kill(child, signal.SIGKILL)
        assert server.end() == -signal.SIGKILL
        assert_holds(tmp_path / "run")
    assert list_checkpoints(tmp_path / "run")  # or nothing was tested
    assert server.train(folder, **often) == 0
    assert outcome(tmp_path / "run") == outcome(tmp_path / "alone")


def wait_for(log: Path, text: str) -> None:
    deadline = time.monotonic() + 30
    while not (log.exists() and text in log.read_text()):
        assert time.monotonic() < deadline, f"{text!r} never came: {log.exists() and log.read_text()}"
        time.sleep(0.002)


@pytest.mark.slow
def test_the_command_itself_killed_and_interrupted(server, tmp_path):
    """``python -m csm_fast.cli train``: Ctrl-C saves, says so and exits with 130; kill -9 later; the same bytes."""
    folder = prepare(tmp_path)
    long = {"n_epochs": 100, "max_steps": 200, "save_every": 50, "val_every": 0, "log_every": 1}
    assert server.train(folder, output_dir=str(tmp_path / "alone"), **long) == 0
    log = tmp_path / "stderr"
    with open(log, "w") as stream:
        child = start(["train", *flags(folder, **long)], stderr=stream)
        wait_for(log, "step 3/200")
        child.send_signal(signal.SIGINT)
        assert child.wait(30) == 130
    said = log.read_text()
    reached = read_if_complete(tmp_path / "run" / "last")["step"]
    assert 3 <= reached < 200 and "Traceback" not in said
    assert "Finishing this step, then saving. Once more stops at once." in said
    assert f"Stopped by SIGINT at step {reached} of 200. The same command continues from" in said
    with open(log, "w") as stream:
        child = start(["train", *flags(folder, **long)], stderr=stream)
        wait_for(log, f"step {reached + 40}/200")
        child.kill()
        assert child.wait(30) == -signal.SIGKILL
    assert f"continuing step-{reached:06d}" in log.read_text()
    assert_holds(tmp_path / "run")
    assert server.train(folder, **long) == 0
    assert outcome(tmp_path / "run") == outcome(tmp_path / "alone")


@pytest.mark.slow
def test_sigterm_and_a_second_signal(server, tmp_path):
    folder = prepare(tmp_path)
    long = {"n_epochs": 100, "max_steps": 150, "save_every": 0, "val_every": 0, "log_every": 1}
    assert server.train(folder, output_dir=str(tmp_path / "alone"), **long) == 0
    (tmp_path / "log").unlink()
    child = server.begin(folder, **long)
    wait_for(tmp_path / "log", "Output")
    os.kill(child, signal.SIGINT)  # before the first step, or in it
    assert server.end() == 130
    (tmp_path / "log").unlink()
    child = server.begin(folder, **long)
    wait_for(tmp_path / "log", "audio s/s")
    os.kill(child, signal.SIGTERM)
    assert server.end() == 130
    saved = read_if_complete(tmp_path / "run" / "last")["step"]
    (tmp_path / "log").unlink()
    child = server.begin(folder, pause=0.1, **long)  # saving takes seconds now
    wait_for(tmp_path / "log", f"step {saved + 2}/150")
    os.kill(child, signal.SIGINT)
    wait_for(tmp_path / "log", "Finishing this step")
    os.kill(child, signal.SIGINT)
    assert server.end() == 130
    assert "interrupted; the same command continues" in (tmp_path / "log").read_text()
    assert list_checkpoints(tmp_path / "run")[-1].name == f"step-{saved:06d}"  # it was in the middle of the next
    assert server.train(folder, **long) == 0
    whole, pieces = outcome(tmp_path / "alone"), outcome(tmp_path / "run")
    assert {**pieces, "left": whole["left"]} == {**whole, "left": whole["left"]}


# ------------------------------------------------------------------------------------------------ in this process


def stop_at(step: int):
    """A loss function that presses Ctrl-C in the given step."""
    from csm_fast.model.loss import packed_loss

    calls = []

    def loss(model, pack):
        calls.append(pack)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGINT)
        return packed_loss(model, pack, 0.5, 0.5)

    return loss


@pytest.mark.slow
def test_a_validation_that_was_due_when_the_run_was_stopped_is_not_lost(tmp_path):
    """Otherwise the best checkpoint would depend on when one presses Ctrl-C."""
    options = {"val_every": 3, "save_every": 100, "batch_size": 4, "pack_rows": 256, "max_steps": 8}
    train(config(tmp_path, output_dir=str(tmp_path / "alone"), **options))
    summary = train(config(tmp_path, **options), loss_function=stop_at(3))
    assert not summary["complete"] and summary["steps"] == 3
    assert train(config(tmp_path, **options))["complete"]
    assert outcome(tmp_path / "run") == {**outcome(tmp_path / "alone"), "steps": [0, 2, 3, 4, 6, 8]}


@pytest.mark.slow
def test_how_often_one_validates_and_samples_leaves_no_trace_in_the_weights(tmp_path, monkeypatch):
    class Codec:
        kind, name, fingerprint = "test", "test codec", CODEC["fingerprint"]
        sample_rate, num_codebooks, codebook_size = 24_000, K, CODEC["codebook_size"]

        def decode(self, codes):
            np.random.rand(7)  # whatever a codec does to global random state
            return np.zeros(len(codes) * 1920, np.float32)

    class Tokenizer:
        name, fingerprint, vocab_size = "test tokenizer", "7" * 64, TEXT

        def encode(self, text, speaker):
            return [ord(c) % TEXT for c in text]

    monkeypatch.setattr("csm_fast.generate.voice.load_codec", lambda *a, **k: Codec())
    monkeypatch.setattr("csm_fast.generate.voice.load_text_tokenizer", lambda *a: Tokenizer())
    sampling = {"gen_every": 2, "gen_sentences": "one two", "gen_seconds": 0.4}
    runs = {}
    for name, options in {"alone": {}, "often": {"val_every": 1, **sampling}, "never": {"val_every": 0}}.items():
        train(config(tmp_path, output_dir=str(tmp_path / name), n_epochs=1, **options))
        runs[name] = outcome(tmp_path / name)
    assert len(list((tmp_path / "often" / "samples").glob("step-*.wav"))) == 3
    for name in ("often", "never"):
        assert runs[name]["weights"] == runs["alone"]["weights"] and runs[name]["moments"] == runs["alone"]["moments"]
    # Sampling goes on in a run that was interrupted, and changes nothing there either.
    options = {"output_dir": str(tmp_path / "pieces"), "n_epochs": 1, "val_every": 1, **sampling}
    train(config(tmp_path, **options), loss_function=stop_at(3))
    train(config(tmp_path, **options))
    assert {**outcome(tmp_path / "pieces"), "steps": 0} == {**runs["often"], "steps": 0}


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over(tmp_path, caplog):
    """Its sizes tell; the one before it gives the same end, and a best one that is gone gives way to the next."""
    train(config(tmp_path, output_dir=str(tmp_path / "alone"), keep=3))
    train(config(tmp_path, keep=3))
    run = tmp_path / "run"
    assert os.readlink(run / "last") == "step-000012"
    with open(run / "step-000012" / "optimizer.safetensors", "r+b") as file:
        file.truncate(1000)
    (run / "step-000009" / "trainer_state.json").write_text("{")
    caplog.clear()
    assert train(config(tmp_path, keep=3))["complete"]
    assert outcome(run) == outcome(tmp_path / "alone")
    (told,) = (r.getMessage() for r in caplog.records if "step-000012 is damaged" in r.getMessage())
    assert "optimizer.safetensors has 1,000 bytes of" in told and told.endswith("continues from step-000008")


@pytest.mark.slow
def test_where_all_checkpoints_are_damaged_nothing_begins_anew(tmp_path):
    train(config(tmp_path, keep=3))
    run = tmp_path / "run"
    *older, newest = list_checkpoints(run)
    for path in older:
        (path / "trainer_state.json").write_text("{")
    (newest / "model.safetensors").unlink()
    before = sorted((str(p), p.stat().st_mtime_ns) for p in run.rglob("*"))
    with pytest.raises(InputError, match="step-000012: is damaged: model.safetensors is missing; no whole checkpoint"):
        train(config(tmp_path, keep=3))
    assert sorted((str(p), p.stat().st_mtime_ns) for p in run.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize("form", [{}, {"weights": "bf16-stochastic", "optimizer": "adamw-8bit", "precision": "bf16"}])
def test_a_disk_without_room_for_a_checkpoint_is_told_before_the_first_step(tmp_path, monkeypatch, form):
    used = shutil.disk_usage(tmp_path)
    train(config(tmp_path, n_epochs=1, **form))
    saved = tmp_path / "run" / "last"
    needed = sum((saved / f"{name}.safetensors").stat().st_size for name in ("model", "optimizer"))
    other = config(tmp_path, output_dir=str(tmp_path / "other"), **form)
    for share, fits in ((0.8, False), (1.1, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, n=int(share * needed): used._replace(free=n))
        if fits:
            assert train(other)["complete"]
        else:
            with pytest.raises(
                InputError, match="other: a checkpoint takes .* GiB, and the disk has .* left; free space"
            ):
                train(other)
            assert not list((tmp_path / "other").glob("step-*"))


@pytest.mark.slow
def test_what_is_not_ours_in_the_run_directory_stays(tmp_path):
    run = tmp_path / "run"
    for name in ("step-notes", "step-000003-before-i-changed-it", "step-1"):
        (run / name).mkdir(parents=True)
        (run / name / "file").write_text("mine")
    train(config(tmp_path, n_epochs=1))
    (run / "step-000006-copy").symlink_to("step-000006")
    train(config(tmp_path, n_epochs=2))
    for name in ("step-notes", "step-000003-before-i-changed-it", "step-1"):
        assert (run / name / "file").read_text() == "mine"


@pytest.mark.slow
def test_a_file_system_without_links_gets_copies(tmp_path, monkeypatch):
    """Mounted cloud drives and FAT know no symlinks."""

    def refuse(*args, **options):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    train(config(tmp_path, output_dir=str(tmp_path / "alone")))
    monkeypatch.setattr(os, "symlink", refuse)
    assert not train(config(tmp_path), loss_function=stop_at(13))["complete"]
    train(config(tmp_path))
    run = tmp_path / "run"
    for name in ("last", "best"):
        assert (run / name).is_dir() and not (run / name).is_symlink() and read_if_complete(run / name)
        same = (tmp_path / "alone" / name / "model.safetensors").read_bytes()
        assert (run / name / "model.safetensors").read_bytes() == same
    assert not list(run.glob(".last*")) and not list(run.glob(".best*"))


def test_two_runs_in_one_directory(tmp_path):
    lock = Lock(prepare(tmp_path) / "run", ".lock", "train", "--output-dir")
    with pytest.raises(InputError, match=r"another train \(process \d+\) is writing here; wait for it, or choose"):
        train(config(tmp_path))
    lock.release()
    assert train(config(tmp_path, max_steps=1))["complete"]
