"""Well-known GPUs: memory and peak rates, for the planner.

Rates are dense (no sparsity) tensor-core FLOP/s in bf16, fp16 where a card has no bf16, with float32 accumulation, at
boost clock. Sources: NVIDIA's architecture whitepapers (Volta, Turing, GA100, GA102, Ada AD10x, Hopper) and product
data sheets (T4, L4, L40S, A10, A40, RTX A6000, RTX 6000 Ada, H200); for RTX 50xx the RTX Blackwell whitepaper. GeForce
cards of Turing, Ampere, Ada and Blackwell accumulate in float32 at half of their float16 rate; the table has this half.
The sheets of L4 and L40S give rates with sparsity; the table has half of those.

Memory is what CUDA reports as total. That is less than the size on the box by the firmware's part and, on cards with
ECC, by the check bits. It differs by some ten MiB between drivers.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from csm_fast.system.errors import InputError
from csm_fast.system.memory import GIB, parse_bytes


@dataclass(frozen=True)
class GPU:
    """One card.

    Attributes:
        name: as typed, such as rtx-4090.
        gib: memory in GiB as CUDA reports it.
        tflops: dense tensor TFLOP/s in bf16 (or fp16) with float32 accumulation; 0 if not known.
        gb_per_s: memory bandwidth in 10^9 bytes per second.
        capability: CUDA compute capability.
    """

    name: str
    gib: float
    tflops: float = 0.0
    gb_per_s: float = 0.0
    capability: tuple[int, int] = (0, 0)

    @property
    def bytes(self) -> int:
        return int(self.gib * GIB)

    @property
    def fp16_only(self) -> bool:
        """Whether its tensor cores multiply fp16 but not bf16: before Ampere."""
        return (0, 0) < self.capability < (8, 0)


GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("v100-16gb", 15.8, 125, 900, (7, 0)),  # fp16 only
        GPU("v100-32gb", 31.7, 125, 900, (7, 0)),  # fp16 only
        GPU("t4", 14.6, 65, 320, (7, 5)),  # fp16 only
        GPU("rtx-2060", 5.8, 25.8, 336, (7, 5)),  # fp16 only
        GPU("rtx-2080-ti", 10.8, 53.8, 616, (7, 5)),  # fp16 only
        GPU("rtx-3060", 11.8, 25.5, 360, (8, 6)),
        GPU("rtx-3080", 9.8, 59.5, 760, (8, 6)),
        GPU("rtx-3090", 23.7, 71.2, 936, (8, 6)),
        GPU("rtx-3090-ti", 23.7, 80, 1008, (8, 6)),
        GPU("rtx-4060", 7.8, 30.2, 272, (8, 9)),
        GPU("rtx-4060-ti-16gb", 15.7, 44.1, 288, (8, 9)),
        GPU("rtx-4070", 11.7, 58.3, 504, (8, 9)),
        GPU("rtx-4080", 15.7, 97.5, 717, (8, 9)),
        GPU("rtx-4090", 23.6, 165.2, 1008, (8, 9)),
        GPU("rtx-5070-ti", 15.5, 87.9, 896, (12, 0)),
        GPU("rtx-5080", 15.5, 112.6, 960, (12, 0)),
        GPU("rtx-5090", 31.4, 209.5, 1792, (12, 0)),
        GPU("a10", 22.1, 125, 600, (8, 6)),
        GPU("a40", 44.4, 149.7, 696, (8, 6)),
        GPU("rtx-a6000", 47.4, 154.8, 768, (8, 6)),
        GPU("rtx-6000-ada", 47.4, 364.2, 960, (8, 9)),
        GPU("l4", 22.0, 121, 300, (8, 9)),
        GPU("l40s", 44.4, 362, 864, (8, 9)),
        GPU("a100-40gb", 39.4, 312, 1555, (8, 0)),
        GPU("a100-80gb", 79.1, 312, 2039, (8, 0)),
        GPU("h100", 79.1, 989, 3350, (9, 0)),
        GPU("h200", 139.8, 989, 4800, (9, 0)),
    )
}


def find_gpu(text: str) -> GPU:
    """The card that ``--gpu`` means: an amount of memory such as 12GB, or a card's name in any usual spelling.

    12GB is a card that is sold as such: it reports 11.7 GiB (12 GiB less 0.3 GiB for firmware and driver). 12GiB is
    exactly 12 GiB.

    Raises:
        InputError: neither; it names the nearest card.
    """
    if (size := parse_bytes(text)) is not None:
        if size < GIB:
            raise InputError(f"--gpu {text} is too little for any run", mend="write it as 12GB")
        if match := re.fullmatch(r"\s*(\d+)\s*gb?\s*", text.lower()):
            return GPU(text.strip(), int(match[1]) - 0.3)
        return GPU(text.strip(), size / GIB)
    wanted = _key(text)
    for name, gpu in GPUS.items():
        if wanted == _key(name):
            return gpu
    starts = [name for name in GPUS if wanted and _key(name).startswith(wanted)]
    if len(starts) == 1:
        return GPUS[starts[0]]
    if starts:
        raise InputError(f"--gpu {text} may be {' or '.join(starts)}", mend="name one of them")
    near = difflib.get_close_matches(wanted, [_key(name) for name in GPUS], 1, 0.5)
    mend = "".join(f"did you mean {name}? " for name in GPUS if near and _key(name) == near[0])
    raise InputError(
        f"--gpu {text}: no such card is known",
        mend=mend + "write its memory, such as 12GB, or one of " + ", ".join(GPUS),
    )


def _key(name: str) -> str:
    """A card's name without maker, family and punctuation."""
    name = re.sub(r"nvidia|geforce|tesla|[^a-z0-9]", "", name.lower())
    return name if name.startswith("rtxa") or not name.startswith("rtx") else name[3:]


def known_gpu(device_name: str) -> GPU | None:
    """The card that the driver calls "NVIDIA GeForce RTX 4090" or "NVIDIA A100-SXM4-80GB"; None if it is not known."""
    plain = re.sub(r"(?i)laptop gpu|sxm\d?|pcie|-|hbm\d?e?", " ", device_name)
    wanted = {_key(plain), _key(re.sub(r"(?i)\d+ ?gb", "", plain))}
    return next((gpu for name, gpu in GPUS.items() if _key(name) in wanted), None)
