"""What ``csm-fast doctor`` prints."""

import pytest
import torch

from csm_fast import cli, ops
from csm_fast.commands import doctor


def test_doctor_says_what_was_chosen_and_what_to_type(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    for words in (torch.__version__, "precision", "kernels", "attention", "bitsandbytes", "next: csm-fast pretokenize"):
        assert words in text
    (tmp_path / "tokens" / "train").mkdir(parents=True)
    cli.main(["doctor"])
    assert "next: csm-fast-train --data tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("processor", "passes", "hint"),
    [("AMD EPYC (AVX2)", "built by g++", True), ("AMD EPYC (AVX2)", "no C++ compiler", False), ("arm", "built", False)],
)
def test_doctor_tells_of_bf16_where_only_our_own_is_fast(processor, passes, hint):
    found = doctor.examine() | {"precision": "fp32", "processor": processor, "cpu_passes": passes}
    (line,) = (line for line in doctor.report(found) if line.startswith("precision"))
    assert ("--weights bf16-stochastic" in line) is hint


def test_doctor_prints_the_choice_for_every_operator():
    found = doctor.examine()
    found["operators"]["linear"]["why"] = "the C++ library does not support torch.bfloat16 here: " + "g++ " * 40
    lines = doctor.report(found)
    first = lines.index(next(line for line in lines if line.startswith("operator")))
    rows = lines[first + 1 : lines.index("", first)]
    assert [line.split()[0] for line in rows if line[0] != " "] == list(ops.OPERATORS)
    assert {line.split()[1] for line in rows if line[0] != " "} <= {"triton", "cpu", "reference", "flash-attn", "torch"}
    assert all(len(line) <= 100 for line in rows)
