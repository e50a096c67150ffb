"""The library's forms for other processors pass the same tests: products for AVX512-BF16 and for tiles (AMX), passes
and updates for AVX2. Instructions that this processor lacks are written out (``avx512_written_out.h``,
``amx_written_out.h``)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from csm_kernels.cpu import native

TESTS = Path(__file__).parent
TESTED = {
    "AVX2": ("test_cpu_passes.py", "../test_kernel_adamw.py"),
    "AVX512-BF16": ("test_cpu_products.py",),
    "AMX": ("test_cpu_products.py",),
}
NOT_HERE = "not opcheck and not interpreter and not built_once and not without_a_compiler"


def features() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def others() -> dict[str, str]:
    """Compiler flags by form, of those that this processor does not have."""
    found = features()
    tiles = f"-DMAY_USE_TILES -include {TESTS / 'amx_written_out.h'}"
    wide = f"-mno-avx512f -include {TESTS / 'avx512_written_out.h'}"
    if "avx2" not in found:
        return {}
    narrow = {"AVX2": "-mno-avx512f"} if "avx512f" in found else {}
    if native._may_use_tiles():
        return {**narrow, "AVX512-BF16": "-UMAY_USE_TILES"}
    if "avx512_bf16" in found:
        return {**narrow, "AMX": tiles}
    return {**narrow, "AVX512-BF16": wide, "AMX": f"{wide} {tiles}"}


@pytest.mark.slow
@pytest.mark.skipif(not native.is_built(), reason=native.describe_library())
@pytest.mark.parametrize("other", TESTED)
def test_the_form_for_other_processors(other, tmp_path):
    if other not in others():
        pytest.skip("is this processor's own form, or it cannot run it")
    there = {**os.environ, "CXX": f"g++ {others()[other]}", "XDG_CACHE_HOME": str(tmp_path)}
    ask = "from csm_kernels.cpu import native; import torch; print(native.describe_library().split(';')[1:]); "
    ask += "scratch = native.library_function('product_scratch', torch.bfloat16); "
    ask += "print(scratch and scratch(64, 64, 256, False, 1))"
    forms = [
        subprocess.run([sys.executable, "-c", ask], env=env, capture_output=True, text=True) for env in (None, there)
    ]
    assert all(form.returncode == 0 for form in forms), forms
    assert forms[0].stdout != forms[1].stdout  # only some have products, each of them its own width of a panel
    assert ("need AMX or AVX512-BF16" in forms[1].stdout) == (other == "AVX2")
    tested = [str(TESTS / name) for name in TESTED[other]]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *tested, "-p", "no:xdist", "-k", NOT_HERE],
        env=there,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
