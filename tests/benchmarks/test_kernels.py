"""The kernel benchmarks: counted work, checked results, what is skipped and why, tables, plot. No time is asserted."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest
import torch

from benchmarks.kernels import __main__ as kernels
from benchmarks.kernels import plot as kernel_plot
from benchmarks.kernels.attention_cases import attention_work
from benchmarks.kernels.cases import CASES, DECODER_OPS, embed_work, heads_work
from benchmarks.kernels.points import BOTH, MODES, Point, System, Work, layout
from csm_fast.config.shape import CSMConfig, TransformerConfig

MICRO = CSMConfig(
    backbone=TransformerConfig(1, 4, 2, 32, 48, max_seq_len=64),
    decoder=TransformerConfig(1, 2, 1, 16, 24),
    text_vocab_size=40,
    audio_vocab_size=19,
    num_codebooks=4,
)
RATES = {"copy": 1e9, "matmul": 1e9}
CPU = torch.device("cpu")


def micro_run(**changes) -> kernels.Run:
    settings = {"ops": ["swiglu"], "rows": [48], "fractions": [0.5], "repeats": 2, "compile": False, **changes}
    return kernels.Run(MICRO, "micro", torch.bfloat16, CPU, **settings)


@pytest.fixture(autouse=True)
def given_rates(monkeypatch):
    monkeypatch.setattr(kernels, "ceilings", lambda device, dtype: dict(RATES))


def measured(**changes) -> list[dict]:
    written: list[dict] = []
    rows = kernels.measure_points(micro_run(**changes), written.append)
    assert rows == written
    return rows


def point(op: str, rows: int = 48, fraction: float | None = None) -> Point:
    return Point(op, rows, fraction, MICRO, torch.bfloat16, CPU, compile=False)


# --- formulas -----------------------------------------------------------------------------------------------------


def test_frame_embed_counts():
    # 2 audio rows of 3 codebooks and 1 text row, 4 columns of 2 bytes: 3 + 1 rows twice, 1 + 1 once.
    forward, both = embed_work(2, 1, 3, 4, 2, written=5)
    assert forward.bytes == (2 * (3 + 1) + (1 + 1)) * 8 == 80
    assert both.bytes == 80 + (2 * 3 + 1 + 5) * 8
    # csm-1b: 33 rows of 2,048 columns per audio row.
    assert embed_work(1, 0, 32, 2048, 2, 0)[0].bytes == 33 * 2048 * 2


def test_heads_count_three_products():
    forward, both = heads_work(3, 2, 4, 5, 2)
    assert forward.flops == 2 * 2 * (3 * 4 * 5)  # two heads; a multiplication and an addition each
    assert both.flops == 3 * forward.flops
    assert forward.bytes == 2 * (3 * 2 * 4 + 2 * 4 * 5)
    assert both.bytes == 2 * forward.bytes


def test_attention_counts_the_causal_half():
    lengths, heads, kv_heads, width = [3, 5], 4, 2, 8
    pairs = sum(1 for n in lengths for query in range(n) for key in range(n) if key <= query)
    forward, both = attention_work(lengths, heads, kv_heads, width, 2)
    assert forward.flops == 2 * (2 * width) * pairs * heads  # scores and values
    assert both.flops == 7 * (2 * width) * pairs * heads
    row = width * 2
    assert forward.bytes == 8 * row * (4 + 4 + 2 + 2)  # q, out, k, v
    assert both.bytes == forward.bytes + 8 * row * (3 * 4 + 4 * 2)  # q, dout, dq and k, v, dk, dv


def test_elementwise_counts():
    n, e = 48, 2
    assert [w.bytes for w in CASES["swiglu"](point("swiglu")).work] == [3 * n * 48 * e, 8 * n * 48 * e]
    assert [w.bytes for w in CASES["rms_norm"](point("rms_norm")).work] == [4 * n * 32 * e, 8 * n * 32 * e]
    rotated = 2 * n * (32 + 16) * e + 2 * n * 4 * 4  # q and k twice; cosines and sines of 4 pairs in float32
    assert [w.bytes for w in CASES["rope"](point("rope")).work] == [rotated, 2 * rotated]


@pytest.mark.parametrize("rows", [1, 15, 48, 256, 1000, 65536])
def test_layout_fills_the_rows(rows):
    for longest in (64, 2048):
        made = layout(rows, longest)
        assert sum(made.lengths) == rows and min(made.lengths) > 0 and max(made.lengths) <= longest
        assert made.audio == rows - sum(made.text_of)


def test_fraction_sets_the_frames():
    audio = layout(48, 64).audio
    assert point("lce_audio", fraction=0.5).frames() == audio // 2
    shapes = {op: CASES[op](point(op, fraction=1.0)).make().tensors for op in ("lce_audio", "lce_codebook0")}
    assert shapes["lce_audio"]["hidden"].shape == (audio, 3, 16)
    assert shapes["lce_codebook0"]["hidden"].shape == (audio, 1, 32)
    points = list(micro_run(ops=list(CASES), fractions=[1 / 16, 1.0]).points())
    assert all(sum(p.op == op for p in points) == (2 if op in DECODER_OPS else 1) for op in CASES)


# --- every operator -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_system_agrees(op, dtype):
    case = CASES[op](dataclasses.replace(point(op, 150, 0.25), dtype=dtype))
    found = kernels.check_case(case)
    ran = {name for name, entry in found.items() if "reason" not in entry}
    assert "csm_fast" in ran and len(ran) >= 2
    assert all(found[name]["agrees"] for name in ran), found
    names = {*case.outputs, *(f"d{name}" for name in case.make().wanted)}
    assert all(found[name]["errors"].keys() == names for name in ran)


def test_rows_have_every_field():
    rows = measured(ops=list(CASES))
    always = {"benchmark", "op", "system", "group", "mode", "rows", "fraction", "shape", "config", "dtype", "on"}
    always |= {"status", "reason", "repeats", "device", "torch", "commit", "date", "copy_bytes_per_s"}
    always |= {"matmul_flops_per_s", "audio_rows", "segments", "frames", "predicted_bytes"}
    timed = {"seconds", "median_s", "min_s", "max_s", "work_bytes", "work_flops", "bytes_per_s", "flops_per_s"}
    timed |= {"ceiling", "share", "errors", "tolerance", "peak_bytes"}
    for row in rows:
        assert always <= row.keys(), always - row.keys()
        if row["status"] == "ok":
            assert timed <= row.keys(), timed - row.keys()
            assert len(row["seconds"]) == 2 and max(row["errors"].values()) <= row["tolerance"]
            assert row["peak_bytes"] is None or row["peak_bytes"] > 0
        else:
            assert row["status"] == "skipped" and row["reason"]
    ours = {(row["op"], row["mode"]) for row in rows if (row["system"], row["status"]) == ("csm_fast", "ok")}
    assert ours == {(op, mode) for op in CASES for mode in MODES}
    json.dumps(rows)


def test_share_is_of_the_slower_ceiling():
    got = kernels.summarize_times([4.0, 2.0, 3.0], Work(bytes=1e9, flops=2e9), {"copy": 1e9, "matmul": 1e9})
    assert (got["median_s"], got["min_s"], got["max_s"]) == (3.0, 2.0, 4.0)
    assert got["ceiling"] == "matmul" and got["share"] == pytest.approx(2 / 3)


# --- what is not ranked, and what is not run ----------------------------------------------------------------------


@pytest.fixture
def with_system(monkeypatch):
    """Adds a system to swiglu."""

    def add(system: System) -> None:
        made = CASES["swiglu"]

        def case(p: Point):
            found = made(p)
            return dataclasses.replace(found, systems=(*found.systems, system))

        monkeypatch.setitem(CASES, "swiglu", case)

    return add


def test_a_wrong_system_is_not_ranked(with_system, capsys):
    with_system(System("free lunch", lambda gate, up: gate + up, (0, 0)))
    with_system(System("not a number", lambda gate, up: gate * up * float("nan"), (0, 0)))
    rows = measured()
    wrong = [row for row in rows if row["system"] in ("free lunch", "not a number")]
    assert len(wrong) == 4
    for row in wrong:
        assert row["status"] == "wrong" and "off, at most 0.02" in row["reason"] and "seconds" not in row
    ours, best = kernel_plot.best_pair(rows, "swiglu", BOTH)
    assert (ours["system"], best["system"]) == ("csm_fast", "eager")
    kernel_plot.print_tables(rows)
    assert "free lunch                      wrong: " in capsys.readouterr().out


def test_a_failing_system_does_not_end_the_run(with_system):
    def breaks(gate, up):
        raise RuntimeError("no kernel image\nis available")

    with_system(System("breaks", breaks, (0, 0)))
    rows = {row["system"]: row for row in measured()}
    assert (rows["breaks"]["status"], rows["breaks"]["reason"]) == ("failed", "RuntimeError: no kernel image")
    assert rows["eager"]["status"] == "ok"


def test_too_large_for_the_memory(with_system):
    with_system(System("hungry", lambda gate, up: torch.nn.functional.silu(gate) * up, (2**60, 2**60)))
    rows = [row for row in measured() if row["system"] == "hungry"]
    assert [row["mode"] for row in rows] == list(MODES)
    for row in rows:
        assert row["status"] == "skipped" and row["reason"].startswith(f"needs about {2**30}.0 GiB, ")
        assert row["predicted_bytes"] > 2**60 and "seconds" not in row


def test_without_memory_everything_is_skipped(monkeypatch, capsys):
    monkeypatch.setattr(kernels, "free_memory", lambda device: 1.0)
    rows = measured(ops=["frame_embed"])
    assert rows and all(row["status"] == "skipped" and row["reason"] for row in rows)
    kernel_plot.print_tables(rows)
    out = capsys.readouterr().out
    assert "skipped: needs about 0.0 GiB, 0.0 are free" in out and "nothing to compare" in out


def test_predicted_to_take_too_long():
    clock = kernels.Clock()
    clock.learn(("key",), Work(10.0), 3.0)
    assert clock.predict(("key",), Work(40.0)) == 12.0 and clock.predict(("other",), Work(40.0)) is None
    clock.learn(("key",), Work(10.0, 2.0), 3.0)
    assert clock.predict(("key",), Work(20.0, 8.0)) == 12.0
    run = micro_run(point_seconds=20.0)
    assert kernels._gate(0, 1, {"agrees": True}, run, 12.0) == ("skipped", "4 calls would take about 48 s, at most 20")
    assert kernels._gate(0, 1, {"agrees": True}, run, 4.0) == ("", "")
    status, reason = kernels._gate(0, 1, {"agrees": True}, micro_run(limit_seconds=1.0), 4.0)
    assert status == "left out" and "4 calls would take about 16 s" in reason


def test_out_of_time(capsys):
    rows = measured(ops=["swiglu", "rope"], limit_seconds=0.0)
    assert {row["op"] for row in rows} == {"swiglu", "rope"}
    assert all(row["status"] == "left out" and row["reason"] == "the 0 s were over" for row in rows)
    kernel_plot.print_tables(rows)
    assert "left out, the 0 s were over: swiglu, rope" in capsys.readouterr().out


# --- tables and plot ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_tables_and_plot_from_rows_alone(tmp_path, monkeypatch, capsys):
    rows = measured(ops=["rope", "depth_attention"], rows=[48, 96], fractions=[0.5, 1.0])
    assert {row["status"] for row in rows} == {"ok", "skipped"}
    file, plot = tmp_path / "rows.jsonl", tmp_path / "deep" / "plot.png"
    file.write_text("".join(json.dumps(row) + "\n" for row in [{"benchmark": "step"}, *rows]), encoding="utf-8")
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["kernels", "--from", str(file), "--plot", str(plot)])
    monkeypatch.setattr(kernels, "measure_points", None)
    assert kernels.main() == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert out.count("shape micro (cpu, torch") == 2
    assert "96 rows, fraction 0.5, forward+backward" in out
    assert "Liger                           skipped: its rotary embedding pairs halves" in out
    last = out[out.index("csm_fast against the fastest alternative") :]
    assert "RoPE + SDPA" in last and "skipped, left out by --no-compile: " in last


def test_a_later_run_replaces_an_earlier_one():
    rows = measured()
    again = [{**row, "median_s": 123.0} for row in rows if row["status"] == "ok"]
    kept = kernel_plot.latest([*rows, *again])
    assert len(kept) == len(rows)
    assert all(row["median_s"] == 123.0 for row in kept if row["status"] == "ok")
