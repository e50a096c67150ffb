"""benchmarks.report: pages say what the results say, and of several runs the last one."""

import json
import sys

import pytest
from paths import ROOT

from benchmarks.report import __main__ as report


def row(system, label, seconds, run="2026-01-01T10:00:00", **more):
    return {
        "benchmark": "compare", "run": run, "system": system, "label": label, "recipe": "bf16 weights",
        "compiled": False, "seconds": seconds, "median_s": sorted(seconds)[len(seconds) // 2], "rows": 1000,
        "frames": 700, "recordings": 10, "laid_out": 1100, "updates": 3, "flops": 0, "optimizer_s": 0.5,
        "loss_difference": 1e-3, "ranked": True, "shape": "small", "data": "recordings", "checkpointing": False,
        "device": "a device", "threads": 2, "python": "3.11.7", "torch": "2.13.0", "csm_fast": "0.1.0",
        "commit": "abcdef0", "date": run[:10], **more,
    }  # fmt: skip


def write(tmp_path, rows):
    path = tmp_path / "compare.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path


def test_the_last_run_is_shown(tmp_path):
    memory = {"besides": 2**20, "peak": 2**22, "weights": 2**21, "gradients": 2**20, "rows": 300}
    ours = {"flops": 4e9, "matmul_rate": 8e9, "memory": memory}
    later = "2026-02-01T10:00:00"
    rows = [
        row("csm_fast", "batches of 8", [9.0]),
        row("csm_fast", "batches of 8", [1.0, 1.25, 1.5], later, **ours),
        row("csm_fast", "packs of 2,048 rows", [1.0], later, flops=4e9, matmul_rate=8e9),
        row("blog", "batches of 8", [2.5], later, memory={**memory, "besides": 3 * 2**20}),
        row("transformers", "batches of 8", [5.0], later, ranked=False),
        row("csm_fast", "batches of 8", [7.0], "2026-03-01T10:00:00", shape="csm-1b"),
    ]
    text = report.PARTS["compare-cpu"](write(tmp_path, rows))
    assert "9.00" not in text and "7.00" not in text and "2026-02-01" in text and "abcdef0" in text
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    equal = {line[0]: line for line in lines[2:5]}
    assert equal["csm_fast"][2:4] == ["1.25", "1.00-1.50 (3)"] and "40%" in equal["csm_fast"]  # 4e9 / 1.25 s / 8e9
    assert equal["blog"][4] == "2.00x (1.7-2.5)" and equal["transformers"][4] == "not ranked"
    free = {line[0]: line for line in lines[7:10]}
    # The spread is that of earlier races, too.
    before = [
        row("csm_fast", "batches of 8", [1.0, 2.0], "2026-01-15"),
        row("blog", "batches of 8", [1.0, 4.0], "2026-01-15"),
    ]
    assert "2.00x (0.5-4.0)" in report.PARTS["compare-cpu"](write(tmp_path, [*before, *rows]))
    assert free["blog, batches of 8"][4] == "2.50x (2.5-2.5)"
    assert equal["csm_fast"][-2] == "1.8" and equal["blog"][-2] == "3.0 (1.71x)"  # half a second of optimizer each
    assert [line[-1] for line in lines[-2:]] == ["", "3.00x"]


def test_one_table_for_the_first_page(tmp_path):
    memory = {"besides": 2**20, "peak": 2**22, "weights": 2**21, "gradients": 2**20, "rows": 300}
    rows = [
        row("csm_fast", "batches of 8", [1.0], memory=memory),
        row("csm_fast", "batches of 32", [2.0], memory={**memory, "besides": 2**21}),
        row("csm_fast", "packs of 2,048 rows", [0.5]),
        row("csm_fast-fp32", "packs of 2,048 rows", [0.75], recipe="float32"),
        row("blog", "batches of 8", [2.0, 2.5, 4.0], memory={**memory, "besides": 3 * 2**20}),
        row("blog", "batches of 32", [5.0], optimizer_s=2.5, memory={**memory, "besides": 2**23}),
        row("transformers", "batches of 8", [5.0], ranked=False),
    ]
    before = [row("csm_fast", "batches of 32", [2.0], "2025-12-01"), row("blog", "batches of 32", [8.0], "2025-12-01")]
    text = report.PARTS["speed-cpu"](write(tmp_path, [*before, *rows]))
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert [name for name in lines[0] if name] == [
        "system", "recipe", "batches of 8, s", "batches of 32, s", "with optimizer",
        "csm_fast in packs of 2,048 rows, s", "MiB besides",
    ]  # fmt: skip
    found = {line[0]: line[2:] for line in lines[2:]}
    assert found["csm_fast"] == ["1.0", "2.0", "1.5, 2.5", "0.5", "1 (8); 2 (32)"]
    assert found["csm_fast-fp32"] == ["", "", "", "0.8, 1.50x (1.5-1.5)", ""]
    assert found["blog"] == [
        "2.5, 2.50x (2.0-4.0)", "5.0, 2.50x (2.5-4.0)", "2.00x (8), 3.00x (32)",
        "5.00x (4.0-8.0) of 8, 10.00x (10.0-10.0) of 32", "3, 3.0x (8); 8, 4.0x (32)",
    ]  # fmt: skip
    assert found["transformers"] == ["5.0, not ranked", "", "5.5", "not ranked of 8", ""]
    # Nothing was packed freely, and nobody updated.
    bare = [{k: v for k, v in r.items() if k != "optimizer_s"} for r in rows if "packs" not in r["label"]]
    short = report.PARTS["speed-cpu"](write(tmp_path, bare))
    assert "| system | recipe | batches of 8, s | batches of 32, s | MiB besides |" in short


def test_processors_without_bf16_have_tables_of_their_own(tmp_path):
    here = {"precision": "fp32", "device": "a small one"}
    rows = [
        row("csm_fast", "batches of 8", [1.0]),
        row("blog", "batches of 8", [2.0]),
        row("csm_fast", "batches of 8", [5.0], "2026-12-01T10:00:00", **here),
        row("csm_fast-fp32", "batches of 8", [6.0], "2026-12-01T10:00:00", **here),
        row("blog-fp32", "batches of 8", [15.0], "2026-12-01T10:00:00", **here),
        row("csm_fast", "batches of 8", [1.0], "2026-03-02T10:00:00", precision="bf16"),
        row("blog", "batches of 8", [4.0], "2026-03-02T10:00:00", precision="bf16"),
    ]
    results = write(tmp_path, rows)
    wide, narrow = (report.PARTS[name](results) for name in ("compare-cpu", "compare-cpu-fp32"))
    assert "4.00x (2.0-4.0)" in wide and "small one" not in wide
    assert "3.00x (3.0-3.0)" in narrow and "1.20x" in narrow and "2.00x" not in narrow and "small one" in narrow
    later = [{**r, "run": "2026-12-05T10:00:00"} for r in rows[2:5]]
    side = report.PARTS["compare-cpu-fp32-runs"](write(tmp_path, rows + later))
    assert "| blog-fp32, batches of 8 | 3.00x | 3.00x |" in side and "csm_fast-fp32" not in side
    assert "1 of 1 medians of 2026-12-05 lie within" in side
    # Those of the first ones are estimates of another kind.
    first = [{**r, "run": "2026-11-28T03:55:00+00:00"} for r in rows[2:5]]
    assert report.PARTS["compare-cpu-fp32"](write(tmp_path, first)) == "Not measured.\n"


def test_runs_side_by_side(tmp_path):
    assert report.PARTS["compare-cpu-runs"](write(tmp_path, [row("csm_fast", "batches of 8", [1.0])])) == "Run once.\n"
    rows = []
    days = [("2026-01-01T10:00", 1.0, 2.1), ("2026-01-02T10:00", 2.0, 8.0), ("2026-01-02T12:00", 1.0, 2.15)]
    for run, ours, theirs in days:
        rows += [
            row("csm_fast", "batches of 8", [ours, 1.1 * ours], run),
            row("csm_fast", "packs of 2,048 rows", [ours], run),
            row("blog", "batches of 8", [theirs], run),
            row("transformers", "batches of 8", [1.0], run, ranked=False),
        ]
    text = report.PARTS["compare-cpu-runs"](write(tmp_path, rows))
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert [head[:16] for head in lines[0][2:5]] == ["2026-01-02 12:00", "2026-01-02 10:00", "2026-01-01 10:00"]
    assert lines[2:] == [
        ["batches of 8", "blog, batches of 8", "1.95x", "3.64x", "1.91x", "1.9-2.1"],
        ["packs of 2,048 rows", "blog, batches of 8", "2.15x", "4.00x", "2.10x", "2.1-2.1"],
    ]
    # What was known the day before; the new day's own spread says nothing of its medians.
    assert lines[0][-1] == "spread before 2026-01-02" and "1 of 4 medians of 2026-01-02 lie within" in text
    assert "of a run, over the last 1 before 2026-01-02." in text
    text = report.PARTS["compare-cpu-runs"](write(tmp_path, rows[4:]))
    assert "spread on 2026-01-02" in text and "| 2.0-4.0 |" in text and "lie within" not in text


def test_spreads_are_not_of_one_day():
    """Where there are runs of another: an hour's runs are alike."""
    times = [
        ("2026-01-01T10:00", 9.0),
        ("2026-01-01T11:00", 3.0),
        *((f"2026-01-02T1{i}:00", 4.0 + i) for i in range(5)),
    ]
    rows = []
    for run, theirs in times:
        rows += [row("csm_fast", "batches of 8", [1.0], run), row("blog", "batches of 8", [theirs], run)]
    spread = [*report._spreads([], rows).values()]
    assert spread == [(3.0, 9.0)]  # the day's last four are 5.0 to 8.0
    assert [*report._spreads([], rows[4:]).values()] == [(5.0, 8.0)]
    assert [*report._spreads([], rows[:10]).values()] == [(3.0, 6.0)]  # three of one day, one of another
    assert report._spreads([], []) == {}


def test_pages_are_filled_and_checked(tmp_path, monkeypatch, capsys):
    results = write(tmp_path, [row("csm_fast", "batches of 8", [1.0])])
    page = tmp_path / "README.md"
    page.write_text("a\n<!-- report: compare-cpu -->\nold\n<!-- end of report -->\nb\n")
    asked = ["report", "--results", str(results), "--root", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*asked, "--check"])
    assert report.main() == 1 and "README.md is not what" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", asked)
    assert report.main() == 0
    text = page.read_text()
    assert "old" not in text and "1.00-1.00 (1)" in text and text.startswith("a\n<!--") and text.endswith("-->\nb\n")
    assert (tmp_path / "docs" / "compare-cpu.png").stat().st_size > 5000
    monkeypatch.setattr(sys, "argv", [*asked, "--check"])
    assert report.main() == 0
    with pytest.raises(SystemExit, match="no part is called x"):
        report.filled("<!-- report: x -->\n<!-- end of report -->", results)


@pytest.mark.parametrize("name", report.PAGES)
def test_our_pages_say_what_the_results_say(name):
    page = (ROOT / name).read_text(encoding="utf-8")
    assert report.PART.search(page)
    assert report.filled(page, report.RESULTS) == page


def test_every_part_says_when_nothing_was_measured(tmp_path):
    for name, part in report.PARTS.items():
        assert part(tmp_path) in ("Not measured.\n", "Run once.\n"), name
