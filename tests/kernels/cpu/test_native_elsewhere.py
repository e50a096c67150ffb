"""The library's forms for other processors pass the same tests. There are three of the products, for AVX2, AVX512-BF16
and tiles (AMX), and two of AdamW's codes of 8 bits, for AVX2 and AVX-512. Instructions that this processor lacks are
written out (``avx512_written_out.h``, ``amx_written_out.h``)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from csm_kernels.cpu import native

TESTS = Path(__file__).parent
TESTED = [TESTS / "test_cpu_products.py", TESTS.parent / "test_kernel_adamw.py"]
SERVED = native.function("product", torch.bfloat16) is not None


def features() -> set[str]:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return set(next(line for line in lines if line.startswith("flags")).split())


def others() -> dict[str, str]:
    """Compiler flags by form, of those that this processor does not have."""
    tiles, wide = (
        f"-DMAY_USE_TILES -include {TESTS / 'amx_written_out.h'}",
        f"-include {TESTS / 'avx512_written_out.h'}",
    )
    if native._may_use_tiles():
        return {"AVX2": "-mno-avx512f", "AVX512-BF16": "-UMAY_USE_TILES"}
    if "avx512_bf16" in features():
        return {"AVX2": "-mno-avx512f", "AMX": tiles}
    return {"AVX512-BF16": wide, "AMX": f"{wide} {tiles}"}


@pytest.mark.skipif(not SERVED, reason=f"the library has no products: {native.reason()}")
@pytest.mark.parametrize("other", ["AVX2", "AVX512-BF16", "AMX"])
def test_the_form_for_other_processors(other, tmp_path):
    if other not in others():
        pytest.skip("is this processor's own form")
    there = {**os.environ, "CXX": f"g++ {others()[other]}", "XDG_CACHE_HOME": str(tmp_path)}
    ask = "from csm_kernels import native; import torch; "
    ask += "print(native.library_function('product_scratch', torch.bfloat16)(64, 64, 256, False, 1))"
    forms = [
        subprocess.run([sys.executable, "-c", ask], env=env, capture_output=True, text=True) for env in (None, there)
    ]
    assert all(form.returncode == 0 for form in forms), forms
    assert forms[0].stdout != forms[1].stdout  # each has its own width of a panel
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *map(str, TESTED), "-p", "no:xdist", "-k", "not opcheck and not interpreter"],
        env=there,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
