"""The systems that ``benchmarks.compare`` compares, by name, and how much of an epoch each of them runs."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class System:
    """Who trains, and how.

    Attributes:
        code: "csm_fast"; "padded", the published forward in our words; "blog", sesame-finetune's code on Sesame's own
            model; "transformers".
        weights: dtype of the weights.
        autocast: bf16 autocast over them.
        method: "full", "lora" or "qlora".
        compiled: csm_fast's layers are compiled by torch.compile.
        fraction: of the frames that the depth decoder sees.
        kept: another system than csm_fast, in a process that is set up as csm_fast's.
        operators: csm_fast with PyTorch's operators in place of its kernels and its CPU library.
    """

    code: str
    weights: torch.dtype = torch.bfloat16
    autocast: bool = False
    method: str = "full"
    compiled: bool = False
    fraction: float = 1 / 16
    kept: bool = False
    operators: bool = False

    @property
    def recipe(self) -> str:
        """The precision, in words."""
        if self.autocast:
            return "float32 weights, bf16 autocast" if self.method == "full" else "bf16 base, bf16 autocast"
        return "bf16 weights" if self.weights == torch.bfloat16 else "float32"

    @property
    def coefficients(self) -> tuple[float, float]:
        """(a, b) of its loss a CE0 + b CEd. sesame-finetune doubles what the blog published."""
        return (1.0, 1.0) if self.code in ("transformers", "blog") else (0.5, 0.5)


WIDE = torch.float32
SYSTEMS = {
    "csm_fast": System("csm_fast"),
    "csm_fast-operators": System("csm_fast", operators=True),
    "csm_fast-compiled": System("csm_fast", compiled=True),
    "csm_fast-autocast": System("csm_fast", WIDE, True),
    "csm_fast-fp32": System("csm_fast", WIDE),
    "csm_fast-lora": System("csm_fast", autocast=True, method="lora"),
    "csm_fast-qlora": System("csm_fast", autocast=True, method="qlora"),
}
for code in ("padded", "blog", "transformers"):
    SYSTEMS[code] = System(code)
    SYSTEMS[f"{code}-autocast"] = System(code, WIDE, True)
    SYSTEMS[f"{code}-fp32"] = System(code, WIDE)
    SYSTEMS[f"{code}-kept"] = System(code, kept=True)
    SYSTEMS[f"{code}-kept-fp32"] = System(code, WIDE, kept=True)
SYSTEMS["transformers-all-frames"] = System("transformers", fraction=1.0)
SYSTEMS["transformers-all-frames-fp32"] = System("transformers", WIDE, fraction=1.0)


def tolerance(name: str) -> float:
    """The largest relative difference of a ranked system's loss from the float32 value."""
    system = SYSTEMS[name]
    return 1e-2 if system.autocast or system.weights == torch.bfloat16 else 1e-5


def keeps_memory(args: argparse.Namespace, name: str) -> bool:
    """Whether a worker's process is set up as ``csm-fast-train`` sets up its own."""
    own = name in SYSTEMS and (SYSTEMS[name].code == "csm_fast" or SYSTEMS[name].kept)  # "reference" is no system
    return args.allocator == "kept" or (args.allocator == "own" and own)


def add_precision(name: str, precision: str) -> str:
    """The system that a name without a precision means: csm_fast is the one in bf16."""
    has_precision = name.startswith("csm_fast") or name.endswith(("-fp32", "-autocast"))
    return name if has_precision or precision == "bf16" else f"{name}-fp32"


def is_slow(args: argparse.Namespace, name: str) -> bool:
    """Whether a system takes minutes where the others take seconds."""
    return "all-frames" in name or (args.precision == "bf16" and name.endswith("-fp32"))


def num_parts(args: argparse.Namespace, name: str) -> int:
    """The number of parts into which a system's batches are divided; a repetition runs one of them."""
    slow, system = is_slow(args, name), SYSTEMS[name]
    if args.precision == "bf16":
        return args.repeats if slow or system.kept or system.code == "transformers" else 1
    times = 6 if slow else 4 if system.code == "transformers" else 2 if name == "csm_fast" else 3
    return args.repeats * times


def runs_longest(args: argparse.Namespace, name: str, label: str) -> bool:
    """Whether one of the parts also runs the longest batch.

    In float32 it takes minutes in a slow system, and 14 to 17 GiB in the others in batches of 32.
    """
    if args.precision == "bf16" or SYSTEMS[name].code == "csm_fast":
        return True
    return not is_slow(args, name) and label == f"batches of {args.batches[0]}"


def runs_alone(args: argparse.Namespace, name: str) -> bool:
    """Whether a system runs when the others' processes have ended: it needs the machine's memory, or keeps it."""
    return is_slow(args, name) or SYSTEMS[name].kept or (args.shape == "csm-1b" and name.endswith("-fp32"))
