"""The systems that ``benchmarks.compare`` races, by name, and how much of an epoch each of them runs."""

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
        compiled: csm_fast's layers under torch.compile.
        fraction: of the frames that the depth decoder sees.
        kept: in a process set up as csm_fast's own, where that is not csm_fast.
        operators: csm_fast with PyTorch's operators, without its kernels and its library.
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
    "padded": System("padded"),
    "padded-autocast": System("padded", WIDE, True),
    "padded-fp32": System("padded", WIDE),
    "padded-kept": System("padded", kept=True),
    "padded-kept-fp32": System("padded", WIDE, kept=True),
    "blog": System("blog"),
    "blog-autocast": System("blog", WIDE, True),
    "blog-fp32": System("blog", WIDE),
    "blog-kept": System("blog", kept=True),
    "blog-kept-fp32": System("blog", WIDE, kept=True),
    "transformers": System("transformers"),
    "transformers-autocast": System("transformers", WIDE, True),
    "transformers-fp32": System("transformers", WIDE),
    "transformers-kept": System("transformers", kept=True),
    "transformers-kept-fp32": System("transformers", WIDE, kept=True),
    "transformers-all-frames": System("transformers", fraction=1.0),
    "transformers-all-frames-fp32": System("transformers", WIDE, fraction=1.0),
}


def tolerance(name: str) -> float:
    """Most relative difference of a ranked system's loss from the float32 value."""
    system = SYSTEMS[name]
    return 1e-2 if system.autocast or system.weights == torch.bfloat16 else 1e-5


def keeps_memory(args: argparse.Namespace, name: str) -> bool:
    """Whether a worker's process is set up as ``csm-fast-train`` sets up its own."""
    own = name in SYSTEMS and (SYSTEMS[name].code == "csm_fast" or SYSTEMS[name].kept)  # not the reference's
    return args.allocator == "kept" or (args.allocator == "own" and own)


def in_precision(name: str, precision: str) -> str:
    """The system that a name without a precision means: csm_fast is the one in bf16."""
    told = name.startswith("csm_fast") or name.endswith(("-fp32", "-autocast"))
    return name if told or precision == "bf16" else f"{name}-fp32"


def is_slow(args: argparse.Namespace, name: str) -> bool:
    """Whether a system takes minutes where the others take seconds."""
    return "all-frames" in name or (args.precision == "bf16" and name.endswith("-fp32"))


def parts(args: argparse.Namespace, name: str) -> int:
    """A repetition of a system runs one of so many parts of its batches."""
    slow, system = is_slow(args, name), SYSTEMS[name]
    if args.precision == "bf16":
        return args.repeats if slow or system.kept or system.code == "transformers" else 1
    times = 6 if slow else 4 if system.code == "transformers" else 2 if name == "csm_fast" else 3
    return args.repeats * times


def runs_longest(args: argparse.Namespace, name: str, label: str) -> bool:
    """Whether one of the parts runs the longest batch, too.

    In float32 it takes a slow system minutes, and in batches of 32 the others 14 to 17 GiB.
    """
    if args.precision == "bf16" or SYSTEMS[name].code == "csm_fast":
        return True
    return not is_slow(args, name) and label == f"batches of {args.batches[0]}"


def runs_alone(args: argparse.Namespace, name: str) -> bool:
    """When the others have gone, for one that needs the machine's memory, or keeps it."""
    return is_slow(args, name) or SYSTEMS[name].kept or (args.shape == "csm-1b" and name.endswith("-fp32"))
