"""benchmarks.report: the pages say what the results say, and show the last of several runs."""

import json
import sys

import pytest
from paths import ROOT

from benchmarks.report import __main__ as report
from benchmarks.report import parts as report_parts


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
    lines = cells(text)
    found = {line[0]: line for line in lines[2:5]}
    assert found["csm_fast"][2] == "1.2" and found["blog"][2] == "2.5, 2.00x (1.7-2.5)"
    assert found["blog"][3:] == ["1.71x (8)", "2.50x (2.5-2.5) of 8", "3, 3.0x (8)"]  # half a second of optimizer each
    assert found["transformers"][2] == "5.0, not ranked"
    more = {line[0]: line for line in lines[7:]}
    assert list(more) == [
        *(f"{system}, batches of 8" for system in ("csm_fast", "blog", "transformers")),
        "csm_fast, packs of 2,048 rows",
    ]
    ours = more["csm_fast, batches of 8"]
    assert ours[2:4] == ["1.25", "1.00-1.50 (3)"] and "40%" in ours  # 4e9 / 1.25 s / 8e9
    assert "not ranked" not in more["transformers, batches of 8"] and lines[5][-1] == "loss differs by"
    checkpointing = [{**r, "checkpointing": True} for r in rows if "memory" in r]
    table = cells(report.PARTS["compare-cpu-checkpointing"](write(tmp_path, checkpointing)))
    assert [line[-1] for line in table[2:]] == ["", "3.00x"]


def cells(text):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]


MEMORY = {"besides": 2**20, "peak": 2**22, "weights": 2**21, "gradients": 2**20, "rows": 300}


def test_readme_has_one_small_table(tmp_path):
    rows = [
        row("csm_fast", "batches of 8", [1.0], memory=MEMORY),
        row("csm_fast", "batches of 32", [2.0], memory={**MEMORY, "besides": 2**21}),
        row("csm_fast", "packs of 2,048 rows", [0.5]),
        row("blog", "batches of 8", [2.0, 2.5, 4.0], memory={**MEMORY, "besides": 3 * 2**20}),
        row("blog", "batches of 32", [5.0]),
        row("blog-fp32", "batches of 8", [99.0]),
        row("transformers", "batches of 8", [5.0], ranked=False),
    ]
    text = report.PARTS["speed"](write(tmp_path, rows))
    assert cells(text)[2:] == [
        ["csm_fast", "1.0 s", "2.0 s", "0.5 s", "1 MiB / 2 MiB"],
        ["blog", "2.5 s (2.5x)", "5.0 s (2.5x)", "", "3 MiB"],
        ["transformers", "5.0 s", "", "", ""],
    ]
    assert cells(text)[0][1:] == ["batches of 8", "batches of 32", "packs of 2,048 rows", cells(text)[0][-1]]
    assert "over the last" not in text
    # Of several runs the last one is shown, and how far the ratios moved, over the last four.
    for number, theirs in enumerate((9.0, 3.0, 2.0, 4.0)):
        day = f"2025-12-0{number + 1}"
        rows += [row("csm_fast", "batches of 8", [1.0], day), row("blog", "batches of 8", [theirs], day)]
    text = report.PARTS["speed"](write(tmp_path, rows))
    assert ["blog", "2.5 s (2.5x)", "5.0 s (2.5x)", "", "3 MiB"] in cells(text)
    assert "over the last 4 runs: blog 2.0 to 4.0 in batches of 8, 2.5 to 2.5 in batches of 32.\n" in text


def test_a_summary_has_one_line_per_system(tmp_path):
    device = {"device": "an Intel (AMX)"}
    rows = [
        row("csm_fast", "batches of 8", [1.0], memory=MEMORY, **device),
        row("csm_fast", "batches of 32", [2.0], memory={**MEMORY, "besides": 2**21}, **device),
        row("csm_fast", "packs of 2,048 rows", [0.5], **device),
        row("csm_fast-fp32", "packs of 2,048 rows", [0.75], recipe="float32", **device),
        row("blog", "batches of 8", [2.0, 2.5, 4.0], memory={**MEMORY, "besides": 3 * 2**20}, **device),
        row("blog", "batches of 32", [5.0], optimizer_s=2.5, memory={**MEMORY, "besides": 2**23}, **device),
        row("transformers", "batches of 8", [5.0], ranked=False, **device),
    ]
    lines = cells(report.PARTS["compare-cpu-amx"](write(tmp_path, rows)))
    assert [name for name in lines[0] if name] == [
        "system", "recipe", "batches of 8, s", "batches of 32, s", "with optimizer",
        "csm_fast in packs of 2,048 rows, s", "MiB besides",
    ]  # fmt: skip
    found = {line[0]: line[2:] for line in lines[2:]}
    assert found["csm_fast"] == ["1.0", "2.0", "1.5, 2.5", "0.5", "1 (8); 2 (32)"]
    assert found["csm_fast-fp32"] == ["", "", "", "0.8, 1.50x (1.5-1.5)", ""]
    assert found["blog"] == [
        "2.5, 2.50x (2.0-4.0)", "5.0, 2.50x (2.5-2.5)", "2.00x (8), 3.00x (32)",
        "5.00x (4.0-8.0) of 8, 10.00x (10.0-10.0) of 32", "3, 3.0x (8); 8, 4.0x (32)",
    ]  # fmt: skip
    assert found["transformers"] == ["5.0, not ranked", "", "5.5", "not ranked of 8", ""]
    # Without free packing and without an optimizer, their columns are absent.
    bare = [{k: v for k, v in r.items() if k != "optimizer_s"} for r in rows if "packs" not in r["label"]]
    short = report.PARTS["compare-cpu-amx"](write(tmp_path, bare))
    assert "| system | recipe | batches of 8, s | batches of 32, s | MiB besides |" in short


def test_processors_without_bf16_have_a_table_of_their_own(tmp_path):
    here = {"precision": "fp32", "device": "a small one"}
    rows = [
        row("csm_fast", "batches of 8", [1.0]),
        row("blog", "batches of 8", [2.0]),
        row("csm_fast", "batches of 8", [5.0], "2026-12-01T10:00:00", **here),
        row("csm_fast-fp32", "batches of 8", [6.0], "2026-12-01T10:00:00", recipe="float32", **here),
        row("blog-fp32", "batches of 8", [15.0], "2026-12-01T10:00:00", recipe="float32", **here),
        row("csm_fast", "batches of 8", [1.0], "2026-03-02T10:00:00", precision="bf16"),
        row("blog", "batches of 8", [4.0], "2026-03-02T10:00:00", precision="bf16"),
    ]
    results = write(tmp_path, rows)
    wide, narrow = (report.PARTS[name](results) for name in ("compare-cpu", "compare-cpu-fp32"))
    assert "4.00x (4.0-4.0)" in wide and "small one" not in wide
    assert "small one" in narrow
    # csm_fast trains in float32 there, whatever older runs timed beside it.
    assert [line[:3] for line in cells(narrow)[2:]] == [
        ["csm_fast", "float32", "6.0"],
        ["blog-fp32", "float32", "15.0, 2.50x (2.5-2.5)"],
    ]


def test_profiles_and_updates_have_one_line_each(tmp_path):
    step = {"row": "step", "device": "a device", "date": "2026-01-01", "rows": 2048.0, "step_ms": 100.4}
    step |= {"operators_ms": 90.0, "products_ms": 70.0, "products_floor_ms": 60.0, "host_ms": 9.0, "loader_ms": 0.06}
    for name, rows in (("a", 2048.0), ("b", 400.0)):
        lines = [{"row": "operator"}, {**step, "rows": rows}]
        (tmp_path / f"profile_{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    lines = cells(report.PARTS["profile-cpu"](tmp_path))[2:]
    assert [line[2] for line in lines] == ["400", "2,048"]
    assert lines[1] == ["a device", "2026-01-01", "2,048", "100", "70.0", "60.0", "20.0", "9.0", "0.1"]
    update = row("x", "", [0.002, 0.001, 0.003], bytes=1e6, weights=1e6, copy_bytes_per_s=1e9, learns=True, read=[1, 1])
    ways = [["csm_fast", "bf16, stochastic"], ["csm_fast", report_parts.EIGHT_BITS]]
    lines = [json.dumps({**update, "way": way}) + "\n" for way in ways]
    (tmp_path / "optimizers.jsonl").write_text("".join(lines))
    assert cells(report.PARTS["optimizers-cpu"](tmp_path))[2:] == [
        ["csm_fast", "bf16, stochastic", "2.0", "1.0-3.0 (3)", "1.0", "1.0", "2.0x", "survive"]
    ]


def test_what_a_gpu_showed_is_one_part(tmp_path):
    assert report.PARTS["gpu"](tmp_path) == "Not measured.\n"
    for name in ("gpu_compare", "gpu_ways"):
        rows = [row("csm_fast", "batches of 64", [1.0], device=f"a GPU of {name}", shape="csm-1b")]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    text = report.PARTS["gpu"](tmp_path)
    assert text.index("a GPU of gpu_compare") < text.index("a GPU of gpu_ways") and "Not measured" not in text


def test_pages_are_filled_and_checked(tmp_path, monkeypatch, capsys):
    results = write(tmp_path, [row("csm_fast", "batches of 8", [1.0])])
    page = tmp_path / "README.md"
    page.write_text("a\n<!-- report: compare-cpu -->\nold\n<!-- end of report -->\nb\n")
    asked = ["report", "--results", str(results), "--root", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*asked, "--check"])
    assert report.main() == 1 and "README.md differs from" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", asked)
    assert report.main() == 0
    text = page.read_text()
    assert "old" not in text and "1.00-1.00 (1)" in text and text.startswith("a\n<!--") and text.endswith("-->\nb\n")
    monkeypatch.setattr(sys, "argv", [*asked, "--check"])
    assert report.main() == 0
    with pytest.raises(SystemExit, match="no part is called x"):
        report.fill_page("<!-- report: x -->\n<!-- end of report -->", results)


@pytest.mark.parametrize("name", report.PAGES)
def test_our_pages_say_what_the_results_say(name):
    page = (ROOT / name).read_text(encoding="utf-8")
    assert report.PART.search(page)
    assert report.fill_page(page, report.RESULTS) == page


def test_every_part_says_when_nothing_was_measured(tmp_path):
    for name, part in report.PARTS.items():
        assert part(tmp_path) == "Not measured.\n", name
