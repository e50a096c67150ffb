"""benchmarks.compare at the tiny shape: every system in its own process, the same losses, rows with all fields."""

import dataclasses
import io
import json
import os
import signal
import sys
from collections import Counter

import pytest
import torch
from paths import ROOT

from benchmarks.compare import __main__ as compare
from benchmarks.compare import race, systems
from benchmarks.compare import table as compare_table
from benchmarks.compare import worker as compare_worker
from benchmarks.compare.reference import expected_loss
from csm_fast import CSMConfig
from csm_fast.config.shape import NAMED_SHAPES

# Most of the 77 million weights of the tiny shape are in its tables and heads.
SMALL = {"text_vocab_size": 500, "audio_vocab_size": 131, "num_codebooks": 8}
IN_PROCESSES = f"""
import dataclasses
from csm_fast.config import shape
small = dataclasses.replace(shape.CSMConfig.tiny(), **{SMALL})
shape.NAMED_SHAPES["tiny"] = lambda: small
"""


@pytest.fixture(autouse=True)
def small_tables(monkeypatch, tmp_path):
    """Small tables in the tiny shape, here and in the processes that a test starts."""
    monkeypatch.setitem(NAMED_SHAPES, "tiny", lambda: dataclasses.replace(CSMConfig.tiny(), **SMALL))
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(IN_PROCESSES)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (folder, ROOT, ROOT / "kernels"))))


@pytest.fixture
def run_compare(monkeypatch, tmp_path):
    """Runs the command with its settings; the exit status."""

    def run(*settings):
        monkeypatch.setattr(compare.signal, "signal", lambda *_: None)
        monkeypatch.setattr(sys, "argv", arguments(tmp_path, *settings))
        return compare.main()

    return run


def arguments(tmp_path, *extra):
    settings = ["--synthetic", "3", "--shape", "tiny", "--repeats", "1", "--batches", "2", "--no-optimizer"]
    return ["compare", *settings, "--precision", "bf16", "--results", str(tmp_path / "out.jsonl"), *extra]


@pytest.mark.slow
def test_a_race(run_compare, tmp_path, capfd):
    # Float32, which every processor multiplies fast.
    status = run_compare("--systems", "csm_fast", "padded", "transformers", "--precision", "fp32")
    out, err = capfd.readouterr()
    assert status == 0, err
    assert "equal updates: batches of 2" in out and "csm_fast in packs of 2,048 rows" in out
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(r["system"], r["label"]) for r in rows] == [
        ("csm_fast", "batches of 2"),
        ("csm_fast", "packs of 2,048 rows"),
        ("padded-fp32", "batches of 2"),
        ("transformers-fp32", "batches of 2"),
    ]
    for row in rows:
        assert len(row["seconds"]) == 1 and row["median_s"] == row["seconds"][0] > 0
        assert row["recordings"] == 3 and row["rows"] > 100 and row["data"] == "synthetic"
        assert row["torch"] == torch.__version__ and row["commit"] is not None
        # Everybody computes the same loss, so the times are times of the same work.
        assert row["ranked"], (row["system"], row["loss_difference"])
        if not compare_table.is_free(row):
            assert 0 < row["memory"]["besides"] < row["memory"]["peak"] and row["memory"]["rows"] > 50
    assert rows[0]["flops"] > 0 and rows[0]["matmul_rate"] > 0 and rows[0]["updates"] == 2
    assert rows[2]["laid_out"] > rows[0]["rows"]


class Answers:
    """A worker without a process. ``fails`` says of a system's n-th worker whether it stops when it is asked."""

    made = Counter()
    fails = staticmethod(lambda name, n, what: False)

    def __init__(self, args, name):
        self.name, self.count = name, self.made[name]
        self.made[name] += 1
        figures = {"updates": 4, "laid_out": 50, "flops": 8 * name.startswith("csm_fast")}
        labels = {f"batches of {size}": figures for size in args.batches}
        self.about = {"labels": labels, "recipe": "bf16 weights", "rows": 40, "environment": {"device": "a device"}}
        self.about |= {
            "recordings": 6,
            "frames": 30,
            "compiled": False,
            "environment": {"device": "a device", "threads": 1},
        }
        if name == "reference":
            self.about = dict.fromkeys((f"{part} {d}" for part in ("ce0", "ced", "ced all") for d in (BF16, FP32)), 1.0)
        self.process = self

    def post(self, what, *arguments):
        self.posted = what

    def read_answer(self):
        what = self.posted
        if self.fails(self.name, self.count, what):
            raise race.Stopped(f"{self.name} stopped with status -9")
        loss = expected_loss(self.name, Answers(compare.parse_arguments(), "reference").about)
        return {"check": loss, "memory": {"besides": 1, "peak": 3, "weights": 1, "gradients": 1, "rows": 9}}.get(
            what, 2.0
        )

    def close(self):
        pass

    def kill(self):
        pass


BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture
def answers(monkeypatch, tmp_path):
    for module in (compare, race):
        monkeypatch.setattr(module, "Worker", Answers)
    monkeypatch.setattr(Answers, "made", Counter())
    monkeypatch.setattr(compare.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", arguments(tmp_path, "--device", "cuda"))
    return lambda: [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]


def test_a_system_that_stops_costs_its_rows_only(answers, monkeypatch, capsys):
    """Its process ended by itself, for want of memory say: beside the others, or even alone."""

    def fails(name, n, what):
        return (name == "padded" and n == 0 and what == "check") or (name == "transformers" and what == "run")

    monkeypatch.setattr(Answers, "fails", staticmethod(fails))
    assert compare.main() == 1
    out, err = capsys.readouterr()
    assert "padded stopped with status -9; it will be tried again without the others\n" in err
    assert "error: transformers stopped with status -9" in err and "error: padded" not in err
    systems = [row["system"] for row in answers()]
    assert systems == ["csm_fast", "padded-fp32", "transformers-all-frames", "padded"]
    assert all(row["seconds"] == [2.0] and row["ranked"] and "memory" in row for row in answers())
    assert "padded-fp32" in out and "transformers " not in out


def test_times_count_though_a_system_stops_afterwards(answers, monkeypatch, capsys):
    """The update takes most memory, and comes last on a GPU: of two systems one answers nothing there, one stops."""
    monkeypatch.setattr(sys, "argv", [word for word in sys.argv if word != "--no-optimizer"])
    monkeypatch.setattr(
        Answers, "fails", staticmethod(lambda name, n, what: name == "padded" and what == "optimizer_seconds")
    )
    answer = Answers.read_answer
    monkeypatch.setattr(
        Answers,
        "read_answer",
        lambda self: None if (self.name, self.posted) == ("csm_fast", "optimizer_seconds") else answer(self),
    )
    assert compare.main() == 0
    assert capsys.readouterr().err == "padded stopped with status -9; what was measured before counts\n"
    rows = {row["system"]: row for row in answers()}
    assert Answers.made["padded"] == 1 and {"csm_fast", "padded", "transformers"} <= rows.keys()
    for name in ("csm_fast", "padded"):
        assert rows[name]["seconds"] == [2.0] and rows[name]["memory"] and "optimizer_s" not in rows[name]
    assert rows["transformers"]["optimizer_s"] == 8.0 and rows["csm_fast"]["matmul_rate"] == 2.0


def test_memory_that_does_not_last_is_no_answer(monkeypatch, capfd):
    """A question for which there is not enough leaves the process as it was."""

    def too_much(self, label):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(compare_worker.Running, "optimizer_seconds", too_much)
    monkeypatch.setattr(sys, "argv", ["compare", "--synthetic", "3", "--shape", "tiny", "--worker", "csm_fast"])
    monkeypatch.setattr(sys, "stdin", io.StringIO('["optimizer_seconds", "batches of 8"]\n["check"]\n'))
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    ends, interrupt = os.dup(1), signal.getsignal(signal.SIGINT)
    try:
        compare_worker.answer_questions(compare.parse_arguments())
    finally:
        signal.signal(signal.SIGINT, interrupt)  # a worker ignores it, and later tests would inherit that
        os.dup2(ends, 1)
        os.close(ends)
    out, err = capfd.readouterr()
    about, optimizer, check = (json.loads(line) for line in out.splitlines())
    assert about["recordings"] == 3 and optimizer is None and check > 0
    assert "csm_fast, optimizer_seconds: CUDA out of memory. Tried to allocate 20 GiB" in err


def test_systems_take_turns_piece_by_piece(answers, monkeypatch):
    """On a CPU. Of four batches, four turns of six run one; a repetition of which a piece is missing is none."""
    asked = []

    def post(self, what, *arguments):
        self.posted = what
        if what in ("run", "run_part"):
            asked.append((self.name, *arguments[-2:]) if len(arguments) > 2 else self.name)

    answer = Answers.read_answer
    missing = ("padded", 2, 4)
    monkeypatch.setattr(Answers, "post", post)
    monkeypatch.setattr(Answers, "read_answer", lambda self: None if asked[-1:] == [missing] else answer(self))
    argv = [word.replace("cuda", "cpu") for word in sys.argv] + ["--systems", "csm_fast", "padded", "transformers-kept"]
    argv[argv.index("--repeats") + 1] = "2"
    monkeypatch.setattr(sys, "argv", argv)
    assert compare.main() == 0
    together, alone = asked[: asked.index("transformers-kept")], asked[asked.index("transformers-kept") + 1 :]
    turns = [(name, piece, 4) for piece in range(4) for name in ("csm_fast", "padded")]
    turns.remove(("padded", 3, 4))  # whose time would be for nothing
    assert together == ["csm_fast", "padded"] + turns * 2
    assert alone == [("transformers-kept", 0, 1)] * 2  # in two parts of three batches, the longest set aside
    seconds = {row["system"]: row.get("seconds") for row in answers()}
    assert seconds == {"csm_fast": [8.0, 8.0], "transformers-kept": [2.0, 2.0]}


def test_what_is_there_counts_when_a_comparison_is_ended(answers, monkeypatch, capsys):
    def fails(name, n, what):
        if name == "transformers-all-frames" and what == "run":
            compare._end(compare.signal.SIGTERM, None)

    monkeypatch.setattr(Answers, "fails", staticmethod(fails))
    assert compare.main() == 1
    out, err = capsys.readouterr()
    assert err == "error: ended by SIGTERM; what was measured is shown and recorded\n"
    assert [row["system"] for row in answers()] == ["csm_fast", "padded", "transformers", "padded-fp32"]


@pytest.mark.slow
def test_a_system_that_stopped_between_two_questions(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["compare", "--synthetic", "3", "--shape", "tiny"])
    worker = race.Worker(compare.parse_arguments(), "padded")
    assert worker.about["recordings"] == 3
    worker.process.kill()
    worker.process.wait()
    with pytest.raises(race.Stopped, match="padded stopped with status -9"):
        worker.post("check")
        worker.read_answer()
    worker.close()
    worker.process.stdout.close()


@pytest.mark.slow
def test_a_system_that_stops_is_reported(run_compare, tmp_path, capfd):
    assert run_compare("--device", "cuda:99", "--systems", "csm_fast") == 1
    assert "error: reference stopped" in capfd.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_others_train_in_what_the_processor_multiplies_fast(monkeypatch, precision):
    monkeypatch.setattr(compare, "resolve_precision", lambda *_: precision)

    def asked(*extra):
        monkeypatch.setattr(sys, "argv", ["compare", "--synthetic", "3", "--repeats", "3", *extra])
        return compare.parse_arguments()

    args = asked()
    slowest = "transformers-all-frames" + ("-fp32" if precision == "fp32" else "")
    assert systems.is_slow(args, slowest) and systems.runs_alone(args, slowest)
    if precision == "bf16":
        theirs = ["padded", "padded-kept", "padded-fp32", "transformers", "transformers-all-frames"]
        assert args.systems == ["csm_fast", *theirs]
        assert [systems.num_parts(args, name) for name in args.systems] == [1, 1, 3, 3, 3, 3]
    else:
        theirs = ["padded-fp32", "padded-kept-fp32", "transformers-fp32", slowest]
        assert args.systems == ["csm_fast-fp32", *theirs]
        assert [systems.num_parts(args, name) for name in args.systems] == [9, 9, 9, 12, 18]
        longest = [[systems.runs_longest(args, name, f"batches of {n}") for name in args.systems] for n in (8, 32)]
        assert longest == [[True] * 4 + [False], [True] + [False] * 4]
    chosen = asked("--systems", "csm_fast", "padded-autocast", "transformers")
    assert chosen.systems == ["csm_fast", "padded-autocast", "transformers" + ("-fp32" if precision == "fp32" else "")]
    # Of another device, or asked for: bf16. Only a CPU's memory is kept or not.
    assert asked("--device", "cuda").systems == [n for n in asked("--precision", "bf16").systems if "kept" not in n]
    assert "padded" in asked("--precision", "bf16").systems
    large = asked("--shape", "csm-1b")
    assert systems.runs_alone(large, "padded-fp32")


def test_sesames_code_needs_its_directories(run_compare, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_compare("--systems", "blog")
    assert stopped.value.code == 2 and "blog needs --sesame-csm" in capsys.readouterr().err
