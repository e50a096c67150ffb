"""Every kernel compiled ahead of time for every architecture: it fits, and bf16 spills nothing at csm-1b's shapes.

Kernels are listed in ``tests/cases/aot_registry/<op>.py``, each with one function ``cases(dtype, arch) ->
list[AotCase]``; a new file there is found by itself. ``REFUSED = {75: "why"}`` there names an architecture that a
kernel refuses.
"""

from __future__ import annotations

import importlib
import re

import pytest
from kernel_cases import ARCHS, DTYPES, SHARED_LIMIT
from paths import ROOT

OPS = sorted(path.stem for path in (ROOT / "tests" / "cases" / "aot_registry").glob("*.py"))
HEADER = f"{'kernel':44} {'arch':>6} {'dtype':>5} {'warps':>5} {'regs':>4} {'spills':>6} {'shared':>7}"


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS, ids=[f"sm_{arch}" for arch in ARCHS])
@pytest.mark.parametrize("op", OPS)
def test_compiles_and_fits(op, arch):
    pytest.importorskip("triton")
    registry = importlib.import_module(f"aot_registry.{op}")
    if arch in getattr(registry, "REFUSED", {}):
        pytest.skip(f"{op} on sm_{arch}: {registry.REFUSED[arch]}")
    table, wrong = [HEADER], []
    for dtype in DTYPES[arch]:
        cases = registry.cases(dtype, arch)
        assert cases
        for case in cases:
            used = case.compile(arch)
            table.append(
                f"{case.name:44} {f'sm_{arch}':>6} {dtype:>5} {case.num_warps:5} {used.registers:4} {used.spills:6} "
                f"{used.shared:7}  {case.may_spill}"
            )
            if used.shared > SHARED_LIMIT[arch]:
                wrong.append(f"{case.name} {dtype}: {used.shared} bytes of shared memory, {SHARED_LIMIT[arch]} allowed")
            if used.spills and dtype != "fp32" and not case.may_spill:
                wrong.append(f"{case.name} {dtype}: spills {used.spills} bytes")
    print("", *table, sep="\n")
    assert not wrong, "\n".join([*wrong, *table])


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_updates_read_and_write_16_bytes_at_once(dtype):
    """Of float32 four numbers, of bf16 two times four: an update is nothing but memory."""
    pytest.importorskip("triton")
    from aot_registry.adamw import cases

    case = cases(dtype, 90)[0]
    ptx = case.compile(90).asm["ptx"]
    wide = {kind: len(re.findall(rf"{kind}\.global\S*\.v[24]\.", ptx)) for kind in ("ld", "st")}
    # Weight, gradient and two moments come, all but the gradient go; of what else is read there is one number each.
    assert wide["ld"] >= 4 and wide["st"] >= 3, (wide, sorted(set(re.findall(r"(?:ld|st)\.global\S*", ptx))))
