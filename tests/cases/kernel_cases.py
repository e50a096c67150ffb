"""What the tests of Triton kernels share: the interpreter, ahead-of-time compiles, poisoned memory, error budgets.

    with interpreted() as launches, poisoned():      # kernels run on CPU tensors, torch.empty gives NaN
        got = op(..., impl="triton")
    assert launches["_forward_kernel"] == 1
    assert_within_budget("out", got, float64_reference, same_dtype_torch)

    aot(kernel, {"x": "*bf16", "rows": "i32"}, {"BLOCK": 128}, arch=90)     # -> Resources(registers=..., ...)

Nothing here needs a GPU. Both ways work on the same kernel objects in one process, in any order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import subprocess
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

ARCHS = (75, 80, 86, 89, 90, 100, 120)
# Most shared memory one block may ask for, in bytes (CUDA programming guide, compute capabilities).
SHARED_LIMIT = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
SHARED_LIMIT = {arch: kib * 1024 for arch, kib in SHARED_LIMIT.items()}
# float32 and the half type each architecture computes in.
DTYPES = {arch: ("fp16",) if arch == 75 else ("bf16", "fp32") for arch in ARCHS}


# --- Triton's interpreter -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def interpreted() -> Iterator[Counter[str]]:
    """Within it, every launch of a ``@triton.jit`` kernel runs in Triton's interpreter; yields launches by name.

    ``TRITON_INTERPRET`` decides when a kernel is decorated, so it would turn the whole process, Triton's own library
    included, to the interpreter. Here the compiled kind of kernel is rerouted instead, and left as it was.
    The interpreter's bfloat16 is no proof (``tl.dot`` multiplies raw bits): use float32 and float16.
    """
    triton = pytest.importorskip("triton")
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.jit import JITFunction

    launches: Counter[str] = Counter()
    twins: dict[Any, Any] = {}
    interpret = interpreter.InterpretedFunction.run

    def twin(kernel):
        if kernel.fn not in twins:
            twins[kernel.fn] = interpreter.InterpretedFunction(kernel.fn)
        return twins[kernel.fn]

    def run(kernel, *args, **kwargs):
        return twin(kernel).run(*args, **kwargs)

    def counted(kernel, *args, **kwargs):
        launches[kernel.fn.__name__] += 1
        scope = interpreter._patch_lang(tl.sum.fn)  # what Triton's library calls, beside what the kernel calls
        try:
            return interpret(kernel, *args, **kwargs)
        finally:
            scope.restore()

    def call(kernel, *args, **kwargs):  # one device function calls another
        return twin(kernel).rewrite()(*args, **kwargs)

    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        # Triton 3.6 hands an array of one element to int(), which NumPy from 2.4 on refuses.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    before = triton.knobs.runtime.interpret
    triton.knobs.runtime.interpret = True
    try:
        with (
            mock.patch.object(interpreter, "_patch_lang_tensor", patched),
            mock.patch.object(JITFunction, "run", run),
            mock.patch.object(JITFunction, "__call__", call),
            mock.patch.object(interpreter.InterpretedFunction, "run", counted),
        ):
            yield launches
    finally:
        triton.knobs.runtime.interpret = before


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Within it, ``torch.empty`` and its kin give memory full of NaN, or of the largest integer."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic.*")
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


# --- error budgets ------------------------------------------------------------------------------------------------


def assert_within_budget(name: str, got: Tensor, reference: Tensor, same_dtype_torch: Tensor) -> None:
    """At most max(3x the error of PyTorch in the same dtype, 4 eps), both as ||x - reference|| / ||reference||.

    Args:
        got: the kernel's result.
        reference: the same in float64.
        same_dtype_torch: the same from plain PyTorch, in ``got``'s dtype.
    """
    assert got.dtype == same_dtype_torch.dtype, f"{name}: {got.dtype}, wanted {same_dtype_torch.dtype}"
    assert got.shape == reference.shape, f"{name}: {tuple(got.shape)}, wanted {tuple(reference.shape)}"
    assert reference.dtype == torch.float64
    size = reference.norm().item()
    if not size:
        assert not got.count_nonzero(), f"{name}: should be zero"
        return
    error = (got.double() - reference).norm().item() / size
    torch_error = (same_dtype_torch.double() - reference).norm().item() / size
    budget = max(3 * torch_error, 4 * torch.finfo(got.dtype).eps)
    if not error <= budget:  # NaN fails too
        worst = int((got.double() - reference).nan_to_num(torch.inf).abs().argmax())
        raise AssertionError(
            f"{name}: relative error {error:.3g}, at most {budget:.3g} (torch {torch_error:.3g}); worst at flat index "
            f"{worst}: {got.flatten()[worst].item():.6g}, wanted {reference.flatten()[worst].item():.6g}"
        )


# --- ahead-of-time compiles ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Resources:
    """What one compiled kernel needs."""

    registers: int
    """Per thread, at most 255."""
    spills: int
    """Bytes of stack and local memory per thread: registers that did not fit."""
    shared: int
    """Bytes of shared memory per block."""
    asm: Mapping[str, str] = dataclasses.field(repr=False)
    """``ttir``, ``ttgir``, ``llir`` and ``ptx`` of the kernel."""


@dataclasses.dataclass(frozen=True)
class AotCase:
    """A kernel at a shape, as ``tests/cases/aot_registry/<op>.py`` lists it."""

    name: str
    kernel: Any
    signature: Mapping[str, str]
    """Type of every argument that is not a ``constexpr``: ``"*bf16"``, ``"*i64"``, ``"i32"``, ``"fp32"``."""
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    aligned: tuple[str, ...] | None = None
    """Pointers and integers that a real launch finds divisible by 16; None means every pointer."""
    may_spill: str = ""
    """Why this one may spill in bf16, shown beside its figure. Empty: it may not."""

    def compile(self, arch: int) -> Resources:
        return aot(
            self.kernel,
            self.signature,
            self.constexprs,
            arch,
            num_warps=self.num_warps,
            num_stages=self.num_stages,
            aligned=self.aligned,
        )


def aot(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    arch: int,
    *,
    num_warps: int = 4,
    num_stages: int = 3,
    aligned: Iterable[str] | None = None,
) -> Resources:
    """Compile a ``@triton.jit`` kernel for ``sm_<arch>`` as a launch would, without a GPU.

    Args:
        signature: type of every argument that is not a ``constexpr``. A launch turns an integer that is 1 into a
            constant: name such an argument in ``constexprs`` instead.
        constexprs: value of every other argument.
        aligned: names of pointers and integers divisible by 16, which the compiler then knows (wider loads, more
            registers); None: every pointer, as PyTorch's allocations are.
    """
    triton = pytest.importorskip("triton")
    if triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is set: Triton's own library is interpreted and cannot be compiled")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    unknown = {*signature, *constexprs} ^ set(kernel.arg_names)
    assert not unknown, f"{kernel.fn.__name__}: missing or unknown arguments {sorted(unknown)}"
    if aligned is None:
        aligned = [name for name, kind in signature.items() if kind.startswith("*")]
    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    attrs = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, types, dict(constexprs), attrs)
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}  # as all launches say
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, spills = _resource_usage(compiled.asm["cubin"])
    asm = {kind: text for kind, text in compiled.asm.items() if isinstance(text, str)}
    return Resources(registers, spills, compiled.metadata.shared, asm)


def _resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of stack and local memory, of the kernel in a cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [os.fspath(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    # The first function is the kernel: "Function f: REG:40 STACK:0 SHARED:0 LOCAL:0 ..."
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])


F32, BF16 = torch.float32, torch.bfloat16


def start(*shape: int, dtype=F32, device="cpu", seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (x + x.sign() * 0.1).to(BF16).to(device, dtype)


def gradients(*shape: int, steps=4, seed=1):
    """Uneven in size over places and steps, all representable in bf16."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.rand(shape, generator=generator) * 1e-2
    return [(torch.randn(shape, generator=generator) * sizes).to(BF16).float() for _ in range(steps)]
