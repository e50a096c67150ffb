"""Builds and loads the C++ library in ``src``, for this processor and on first use, as Triton builds its kernels.

The library lies in the user's cache (``$XDG_CACHE_HOME/csm_fast`` or ``~/.cache/csm_fast``). Its name is a hash of the
sources, the compiler, its flags and the processor's features, so a home directory that different machines share holds
one for each. Without a C++ compiler, or if building fails, PyTorch's operators do the same work.

The environment variable ``CXX`` names the compiler; ``CSM_KERNELS_NATIVE=0`` turns the library off.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import itertools
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from csm_kernels.constants import DRAW_TILE

FOLDER = Path(__file__).parent / "src"
NOUNS = "passes", "attention", "heads", "linear", "adamw"
SOURCES = tuple(FOLDER / f"{noun}.cpp" for noun in NOUNS)
HEADERS = tuple(FOLDER / name for name in ("common.h", "lanes.h", "tiles.h", "products.h"))
COMPILERS = "g++", "c++"  # clang++ would load a second OpenMP beside PyTorch's
FLAGS = (
    *("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-std=c++17", "-fPIC"),
    f"-DDRAW_TILE={DRAW_TILE}",
)
SECONDS = 120

_VOID, _LONG, _INT, _FLOAT, _DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float, ctypes.c_double
SIGNATURES = {
    "norm": (_VOID, _VOID, _FLOAT, _VOID, _VOID, _LONG, _LONG, _INT, _INT),
    "norm_backward": (_VOID,) * 7 + (_LONG, _LONG, _INT),
    "swiglu": (_VOID,) * 3 + (_LONG, _INT),
    "swiglu_backward": (_VOID,) * 6 + (_LONG, _INT),
    "gather_rotated": (_VOID,) * 4 + (_FLOAT, _FLOAT, _INT, _LONG, _LONG, _LONG, _VOID, _LONG, _INT),
    "causal_softmax": (_VOID, _LONG, _LONG, _LONG, _LONG, _INT),
    "causal_softmax_backward": (_VOID, _VOID, _LONG, _LONG, _LONG, _LONG, _INT),
    "cross_entropy": (_VOID,) * 4 + (_FLOAT, _INT, _LONG, _LONG, _INT),
    "adamw": (_VOID,) * 6 + (_LONG, _LONG) + (_VOID,) * 3 + (_DOUBLE,) * 5 + (_INT,) + (_LONG,) * 3 + (_INT,),
    "sums_of_squares": (_VOID, _LONG, _LONG, _VOID, _INT),
    "attention_forward": (_VOID,) * 5 + (_LONG, _FLOAT, _VOID) + (_LONG,) * 4 + (_VOID,) * 3 + (_LONG, _INT),
    "attention_scratch": (_LONG, _LONG, _INT),
    "attention_backward": (_VOID,) * 9 + (_LONG, _FLOAT, _VOID) + (_LONG,) * 4 + (_VOID,) * 4 + (_LONG, _INT),
    "heads_cross_entropy": (_VOID, _LONG, _LONG) + (_VOID,) * 3 + (_FLOAT,) + (_LONG,) * 4 + (_VOID,) * 4 + (_INT,),
    "heads_scratch": (_LONG,) * 4,
    "product": (_VOID, _LONG, _INT) * 2 + (_LONG,) * 3 + (_VOID,) * 3 + (_INT,),
    "product_scratch": (_LONG,) * 3 + (_INT, _INT),
}
# The library has these only on processors where it multiplies bf16 faster than PyTorch: those with instructions for it,
# in tiles (AMX) or registers (AVX512-BF16).
OF_SOME_PROCESSORS = {name for name in SIGNATURES if name.startswith(("attention", "heads", "product"))}
# Functions that return something: the first row with an error, or bytes.
RETURNING = {"cross_entropy", "heads_cross_entropy", "attention_scratch", "heads_scratch", "product_scratch"}
BF16, FP32, INT64 = torch.bfloat16, torch.float32, torch.int64
NAMES = {BF16: "bf16", FP32: "fp32"}
Types = tuple[torch.dtype, ...]
# (type of the residual stream, type of the products)
PAIRS: tuple[Types, ...] = ((BF16, BF16), (FP32, BF16), (FP32, FP32))


def _supported_types(name: str) -> list[tuple[Types, Types]]:
    """(types of the arguments, types in the symbol's name) for every variant of a function."""
    if name.startswith("norm"):
        return [(pair, pair) for pair in PAIRS]
    if name in OF_SOME_PROCESSORS:
        return [((BF16,), (BF16,))]
    given: dict[str, Callable[[torch.dtype], list[Types]]] = {
        "swiglu": lambda t: [(t, t)],
        "swiglu_backward": lambda t: [(t, t, t)],
        "gather_rotated": lambda t: [(t, INT64), (t, INT64, FP32, FP32)],
        "causal_softmax": lambda t: [(t,)],
        "causal_softmax_backward": lambda t: [(t, t)],
        "cross_entropy": lambda t: [(t, INT64, FP32)],
        "adamw": lambda t: [(t, t)],
        "sums_of_squares": lambda t: [(t,)],
    }
    return [(types, (t,)) for t in (BF16, FP32) for types in given[name](t)]


Function = Callable[..., int]
Functions = dict[tuple[str | torch.dtype, ...], Function]  # by name and types: ("swiglu", torch.bfloat16)


def function(name: str, *types: torch.dtype) -> Function | None:
    """The library's function for tensors of these types; None if it has none, or inside ``left_out``."""
    return None if _left_out else library_function(name, *types)


def library_function(name: str, *types: torch.dtype) -> Function | None:
    """The same, ignoring ``left_out``: for the backward of an operator whose forward used the library."""
    found = _load()[0]
    return None if found is None else found.get((name, *types))


def required_function(name: str, *types: torch.dtype) -> Function:
    """``library_function`` of a name and types that the library is known to have."""
    if (found := library_function(name, *types)) is None:
        raise RuntimeError(f"the C++ library has no {name} for {', '.join(map(str, types))}: {describe_library()}")
    return found


_left_out = 0


@contextlib.contextmanager
def left_out() -> Iterator[None]:
    """Within it, PyTorch's operators run instead of the library."""
    global _left_out
    _left_out += 1
    try:
        yield
    finally:
        _left_out -= 1


def is_built() -> bool:
    """Whether the library is there; builds it if needed."""
    return _load()[0] is not None


def describe_library() -> str:
    """Which compiler built the library, or why there is none."""
    return _load()[1]


@functools.lru_cache(maxsize=1)
def _load() -> tuple[Functions | None, str]:
    if os.environ.get("CSM_KERNELS_NATIVE") == "0":
        return None, "CSM_KERNELS_NATIVE=0"
    if platform.system() != "Linux":
        return None, f"not built on {platform.system()}"
    why = f"no C++ compiler ({', '.join(COMPILERS)}); install one, or name it in CXX"
    for compiler in _compilers():
        try:
            functions = _bind(_open_library(compiler))
            own = ("product", BF16) in functions
            rest = "" if own else "; matrix products are PyTorch's (its own need AMX or AVX512-BF16)"
            return functions, f"built by {' '.join(compiler)}{rest}"
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: no home directory
            why = f"{' '.join(compiler)} could not build it: {_first_error(error)}"
    return None, why


def _compilers() -> list[list[str]]:
    """The commands to try, that of ``CXX`` first."""
    named = shlex.split(os.environ.get("CXX", ""))
    commands = [*([named] if named else []), *([name] for name in COMPILERS)]
    found = [[path, *rest] for name, *rest in commands if (path := shutil.which(name))]
    return [command for i, command in enumerate(found) if command not in found[:i]]


def _first_error(error: Exception) -> str:
    text = getattr(error, "stderr", None) or str(error)
    lines = [line.strip() for line in text.splitlines() if "error" in line] or text.strip().splitlines() or [""]
    return lines[0]


def _open_library(compiler: list[str]) -> ctypes.CDLL:
    """The library, built if its file is missing or damaged. If two processes build at the same time, the file of the
    later one stays."""
    target = _cache() / f"cpu-{_key(compiler)}.so"
    if target.exists():
        with contextlib.suppress(OSError):
            return ctypes.CDLL(str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        objects = [Path(scratch) / f"{source.stem}.o" for source in SOURCES]
        pairs = zip(SOURCES, objects, strict=True)
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda pair: _compile(compiler, "-c", "-o", str(pair[1]), str(pair[0])), pairs))
        out = Path(scratch) / "library.so"
        _compile(compiler, "-shared", "-o", str(out), *map(str, objects))
        os.replace(out, target)
    return ctypes.CDLL(str(target))


def _compile(compiler: list[str], *arguments: str) -> None:
    # Flags in CXX come again at the end, because the last of two contrary flags counts.
    users = itertools.dropwhile(lambda word: not word.startswith("-"), compiler)
    command = [*compiler, *_flags(), *users, *arguments]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS)


def _flags() -> tuple[str, ...]:
    return (*FLAGS, "-DMAY_USE_TILES") if _may_use_tiles() else FLAGS


@functools.lru_cache(maxsize=1)
def _may_use_tiles() -> bool:
    """Whether the processor has tiles (AMX) and Linux lets this process use them, for which it must be asked."""
    if "amx_bf16" not in _processor().split():
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18  # x86-64; asm/prctl.h
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "csm_fast"


def _key(compiler: list[str]) -> str:
    command = [*compiler, "--version"]
    version = subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS)
    sources = (path.read_text(encoding="utf-8") for path in (*HEADERS, *SOURCES))
    parts = (*sources, *compiler, version.stdout, " ".join(_flags()), _processor())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """What ``-march=native`` depends on: model and features of the first processor."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        return platform.processor()
    wanted = ("vendor_id", "cpu family", "model", "flags", "CPU implementer", "CPU part", "Features")
    return "\n".join(line for line in first.splitlines() if line.split(":")[0].strip() in wanted)


def _bind(library: ctypes.CDLL) -> Functions:
    bound: Functions = {}
    for name, arguments in SIGNATURES.items():
        for types, named in _supported_types(name):
            symbol = "_".join((name, *(NAMES[t] for t in named)))
            if name in OF_SOME_PROCESSORS and not hasattr(library, symbol):
                continue
            found = getattr(library, symbol)
            key: tuple[str | torch.dtype, ...] = (name, *types)
            bound[key], found.argtypes = found, arguments
            found.restype = _LONG if name in RETURNING else None
    return bound


def threads(elements: int) -> int:
    """How many threads should process so many elements: starting a second one costs microseconds."""
    return 1 if elements < 2**14 else torch.get_num_threads()
