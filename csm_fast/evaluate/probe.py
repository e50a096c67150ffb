"""A probe: a few hundred rows of real data beside a saved adapter, and the model's loss on them.

With it, anyone who loads or merges the adapter can check that the loss is still the same.
"""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from csm_fast.model import adapters
from csm_fast.model.compile import uncompiled
from csm_fast.model.loss import packed_loss
from csm_fast.packing.pack import Pack, Segments
from csm_fast.system.errors import InputError
from csm_fast.system.files import read_json, write_file, writing_to
from csm_fast.system.tensors import read_entries, write_tensors

PROBE, PROBE_LOSS = "probe.safetensors", "probe.json"
PROBE_ROWS, PROBE_FRAMES = 384, 32  # most of each; a first conversation that is longer is taken whole
_TENSORS = ("tokens", "is_audio", "target_rows", "target_weights", "decoder_index", "decoder_weights")

# Relative drift of a probe's loss that rounding can cause, by the dtype of products: the largest, and the one that is
# allowed even if the adapter hardly changes the loss.
ALLOWED = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
LEAST = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 2.5e-3, torch.float16: 2.5e-3}


class Probe:
    """A small pack, an adapted model's loss on it, and the dtype of its products.

    ``silenced``: for a 4-bit base, the loss without the adapters but with what was trained besides.
    """

    def __init__(self, pack: Pack, loss: float, dtype: torch.dtype, silenced: float | None = None):
        self.pack, self.loss, self.dtype, self.silenced = pack, loss, dtype, silenced

    @property
    def name(self) -> str:
        """The dtype's name."""
        return str(self.dtype).removeprefix("torch.")

    def allowed(self, base: float) -> float:
        """Largest relative drift that counts as rounding, if the loss without the adapter is ``base``. At most half of
        what the adapter changes, so that an adapter that loads but has no effect is detected."""
        return max(LEAST[self.dtype], min(ALLOWED[self.dtype], self.drift(base) / 2))

    def drift(self, loss: float) -> float:
        """Relative distance of a loss from the stored one."""
        return abs(loss - self.loss) / max(abs(self.loss), 1e-12)

    def loss_of(self, model: Any, device: torch.device | str = "cpu") -> float:
        """(CE0 + CEd) / 2 of a model on the probe, in eval mode and the probe's dtype."""
        return _loss(model, self.pack.to(device), self.dtype)


@torch.no_grad()
def _loss(model: Any, pack: Pack, dtype: torch.dtype) -> float:
    narrow = dtype in (torch.bfloat16, torch.float16)
    was_training = model.training
    autocast = torch.autocast(pack.tokens.device.type, dtype) if narrow else nullcontext()
    model.eval()
    try:
        # Eagerly, as after loading the adapter; and compiling takes longer than these few forwards.
        with uncompiled(model), autocast:
            return float(packed_loss(model, pack, 0.5, 0.5)[0])
    finally:
        model.train(was_training)


def probe_pack(pack: Pack) -> Pack:
    """The first documents of a pack with supervised frames, up to ``PROBE_ROWS`` rows, with equal weights; the depth
    decoder gets up to ``PROBE_FRAMES`` of their frames, evenly spread."""
    targets, device = pack.target_rows.cpu(), pack.tokens.device
    lengths: list[int] = []
    rows: list[Tensor] = []
    start = 0
    for length in pack.segments.lengths:
        supervised = bool(((targets >= start) & (targets < start + length)).any())
        if supervised and (not rows or sum(lengths) + length <= PROBE_ROWS):
            rows.append(torch.arange(start, start + length))
            lengths.append(length)
        start += length
    if not rows:
        raise ValueError("the pack has no supervised frame")
    chosen = torch.cat(rows)
    place = torch.full((start,), -1)
    place[chosen] = torch.arange(len(chosen))
    target_rows = place[targets]
    target_rows = target_rows[target_rows >= 0]
    frames = min(PROBE_FRAMES, len(target_rows))
    index = torch.linspace(0, len(target_rows) - 1, frames).round().long()
    return _pack(
        {
            "tokens": pack.tokens.cpu()[chosen],
            "is_audio": pack.is_audio.cpu()[chosen],
            "target_rows": target_rows,
            "target_weights": torch.full((len(target_rows),), 1 / len(target_rows), dtype=torch.float64),
            "decoder_index": index,
            "decoder_weights": torch.full((frames,), 1 / frames, dtype=torch.float64),
        },
        lengths,
    ).to(device)


def _pack(tensors: dict[str, Tensor], lengths: list[int]) -> Pack:
    return Pack(
        positions=torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths]),
        segments=Segments.of(lengths, "cpu"),
        rows=sum(lengths),
        frames=int(tensors["is_audio"].sum()),
        **tensors,
    )


def save_probe(model: Any, pack: Pack, directory: str | os.PathLike[str]) -> float:
    """Write a probe beside an adapter: a part of ``pack`` and the loss of ``model`` on it, which is returned.

    Args:
        model: with adapters (``adapters.attach``).
        pack: of real data, on the model's device, with at least one supervised frame.
        directory: the one given to ``save_adapter``.
    """
    path, small = Path(directory), probe_pack(pack)
    dtype = model.adapter.compute_dtype
    loss = _loss(model, small, dtype)
    tensors = {name: getattr(small, name) for name in _TENSORS}
    tensors["is_audio"] = tensors["is_audio"].to(torch.uint8)
    without = None
    if model.adapter.section.method == "qlora":
        with adapters.silenced(model):
            without = _loss(model, small, dtype)
    values = {
        "loss": loss,
        "without_adapters": without,
        "precision": str(dtype).removeprefix("torch."),
        "device": small.tokens.device.type,
        "lengths": list(small.segments.lengths),
    }
    with writing_to(path):
        write_tensors(path / PROBE, tensors, None)
        write_file(path / PROBE_LOSS, json.dumps(values) + "\n")
    return loss


def read_probe(directory: str | os.PathLike[str]) -> Probe | None:
    """The probe beside an adapter; None if there is none.

    Raises:
        InputError: it is damaged.
    """
    path = Path(directory).expanduser()
    if not (path / PROBE).is_file() or not (path / PROBE_LOSS).is_file():
        return None
    values = read_json(path / PROBE_LOSS)
    tensors = {entry.name: entry.read() for entry in read_entries(path / PROBE)}
    try:
        tensors = {name: tensors[name] for name in _TENSORS}
        tensors["is_audio"] = tensors["is_audio"].bool()
        dtype = {str(d).removeprefix("torch."): d for d in ALLOWED}[values["precision"]]
        pack = _pack(tensors, [int(n) for n in values["lengths"]])
        return Probe(pack, float(values["loss"]), dtype, values.get("without_adapters"))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"is damaged ({error})", file=path / PROBE_LOSS, mend="copy the adapter again") from None
