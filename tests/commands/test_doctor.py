"""What ``csm-fast doctor`` prints."""

import pytest
import torch

from csm_fast import cli, ops
from csm_fast.commands import doctor
from csm_fast.system.device import resolve_precision


def test_doctor_says_what_was_chosen_and_what_to_type(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    for words in (torch.__version__, "precision", "kernels", "attention", "bitsandbytes", "next: csm-fast pretokenize"):
        assert words in text
    (tmp_path / "tokens" / "train").mkdir(parents=True)
    cli.main(["doctor"])
    assert "next: csm-fast-train --data tokens" in capsys.readouterr().out


@pytest.mark.parametrize("has_instructions", [True, False])
def test_a_cpu_trains_in_bf16_only_with_instructions_for_it(monkeypatch, has_instructions):
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, probe, lambda: has_instructions, raising=False)
    precision = resolve_precision("auto", torch.device("cpu"))
    assert precision == ("bf16" if has_instructions else "fp32")
    (line,) = (x for x in doctor.report(doctor.examine() | {"precision": precision}) if x.startswith("precision"))
    assert ("no fast bf16" in line) is not has_instructions


def test_doctor_prints_the_choice_for_every_operator():
    found = doctor.examine()
    found["operators"]["linear"]["why"] = "the C++ library does not support torch.bfloat16 here: " + "g++ " * 40
    lines = doctor.report(found)
    first = lines.index(next(line for line in lines if line.startswith("operator")))
    rows = lines[first + 1 : lines.index("", first)]
    assert [line.split()[0] for line in rows if line[0] != " "] == list(ops.OPERATORS)
    assert {line.split()[1] for line in rows if line[0] != " "} <= {"triton", "cpu", "reference", "flash-attn", "torch"}
    assert all(len(line) <= 100 for line in rows)
