"""Audio to codes and back: the interface of all codecs, and everything that does not depend on the library."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from csm_fast.config.shape import SAMPLE_RATE, SAMPLES_PER_FRAME
from csm_fast.data.codec.mimi_shape import complete_sizes
from csm_fast.data.codec.mimi_weights import codebook_tables, hash_tables, load_module
from csm_fast.system.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import torch

OFFLINE_NAME = "offline codec (Mimi's architecture narrowed, seeded random weights; its audio is not intelligible)"
# Frames that are coded at once: 2 minutes, some 4 GB of activations in Mimi's first layers. A longer clip is coded in
# pieces. Each starts with enough earlier frames to give the same codes, and advances by the second number or more.
_WHOLE_FRAMES, _STEP_FRAMES = 1500, 500
_LEFT_FRAMES = 16  # added to the attention's reach: several times that of Mimi's convolutions (under 4 frames)

logger = logging.getLogger("csm_fast")


class Codec:
    """A codec, from ``load_codec``. Subclasses run a model on a batch.

    Attributes:
        kind: "transformers", "moshi" or "offline": what runs it.
        name: for manifests and printing.
        fingerprint: SHA-256 of the codebooks in use ([V, D] little-endian float32 tables, level after level). It does
            not depend on the library: two codecs are the same if their fingerprints are.
        sample_rate, samples_per_frame, num_codebooks, codebook_size: 24000, 1920, K and V.
        side_by_side: whether ``encode`` gives each core its own clips, so that many clips at once are faster on a CPU.
        marked_frames: frames so far whose codes were all zero, and got 1 as their last code.

    Args:
        state: weights under flat names.
        arguments: of MimiConfig.

    Raises:
        InputError: not the weights and sizes of a Mimi that CSM can use.
    """

    kind: str
    name: str
    fingerprint: str
    sample_rate = SAMPLE_RATE
    samples_per_frame = SAMPLES_PER_FRAME
    num_codebooks: int = 32
    codebook_size: int = 2048

    def __init__(
        self, state: Mapping[str, torch.Tensor], arguments: Mapping[str, Any], *, name: str, num_codebooks: int
    ):
        tables = codebook_tables(state)
        if not 2 <= num_codebooks <= len(tables):
            mend = f"give --num-codebooks from 2 to {len(tables)}" + (", or a full Mimi" if num_codebooks > 1 else "")
            raise InputError(f"{name} has {len(tables)} codebooks, {num_codebooks} were asked for", mend=mend)
        self._state: Mapping[str, torch.Tensor] | None = state
        self._arguments, self._sizes = arguments, complete_sizes(arguments)
        if self._sizes.sampling_rate != SAMPLE_RATE or self._sizes.frame_size != SAMPLES_PER_FRAME:
            raise InputError(
                f"{name} codes {self._sizes.frame_size} samples of {self._sizes.sampling_rate} Hz per frame",
                mend=f"CSM needs Mimi's {SAMPLES_PER_FRAME} samples of {SAMPLE_RATE} Hz",
            )
        self.name, self.fingerprint, self.num_codebooks = name, hash_tables(tables[:num_codebooks]), num_codebooks
        self.codebook_size = self._sizes.codebook_size
        self.device = "cpu"
        self.marked_frames = 0
        # 25 positions a second, two per frame; every layer looks sliding_window - 1 positions further back.
        reach = math.ceil(self._sizes.num_hidden_layers * self._sizes.sliding_window / 2)
        self._reach = reach + _LEFT_FRAMES  # frames before a frame that its codes depend on

    @functools.cached_property
    def model(self) -> Any:
        """The library's module on the codec's device; made on first use."""
        assert self._state is not None
        model = self._make()
        load_module(self._state, model)
        self._state = None
        return model.eval().requires_grad_(False).to(self.device)

    def _make(self) -> Any:
        """The library's module of these sizes, without weights."""
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """What a token store's manifest records about the codec: values for JSON."""
        return {
            "name": self.name,
            "kind": self.kind,
            "fingerprint": self.fingerprint,
            "sample_rate": self.sample_rate,
            "num_codebooks": self.num_codebooks,
            "codebook_size": self.codebook_size,
        }

    def matches(self, identity: Mapping[str, Any]) -> bool:
        """Whether codes of this ``identity`` are this codec's: whether the fingerprints are equal."""
        return identity.get("fingerprint") == self.fingerprint

    def to(self, device: str | torch.device) -> Codec:
        """Move the codec to a device, and return it."""
        if "model" in vars(self):
            self.model.to(device)
        self.device = str(device)
        return self

    def encode(self, waves: Sequence[np.ndarray | torch.Tensor]) -> list[np.ndarray]:
        """Codes of recordings, in their order.

        Args:
            waves: each float [samples], mono, 24 kHz.

        Returns:
            Each uint16 [ceil(samples / 1920), K]; the last frame is completed with silence. No frame is all zeros,
            because that is CSM's end of speech. Everything is computed in float32 (no TF32), so that batches, devices
            and implementations differ in near ties only.

        Raises:
            InputError: a wave of another shape, or holding NaN or infinity.
        """
        import numpy as np
        import torch

        results: list[np.ndarray] = [np.zeros((0, self.num_codebooks), np.uint16) for _ in waves]
        padded: list[torch.Tensor] = []
        for index, wave in enumerate(waves):
            wave = torch.as_tensor(wave).detach().to("cpu", torch.float32)
            if wave.dim() != 1:
                raise InputError(
                    f"wave {index} has shape {list(wave.shape)}, not [samples]", mend="mix it to one channel first"
                )
            if not bool(torch.isfinite(wave).all()):
                raise InputError(f"wave {index} holds NaN or infinite samples", mend="repair or skip the recording")
            padded.append(torch.nn.functional.pad(wave, (0, -len(wave) % SAMPLES_PER_FRAME)))
        frames = [len(wave) // SAMPLES_PER_FRAME for wave in padded]
        with torch.inference_mode(), _full_float32():
            if len(waves) > 1 and self.side_by_side:
                places = [(index, *piece) for index, count in enumerate(frames) for piece in self._pieces(count)]
                cut = [padded[i][left * SAMPLES_PER_FRAME : stop * SAMPLES_PER_FRAME] for i, left, _, stop in places]
                parts: list[list[torch.Tensor]] = [[] for _ in frames]
                for (index, left, start, _), found in zip(places, self._encode_side_by_side(cut), strict=True):
                    parts[index].append(found[start - left :])
                return [
                    self._mark(torch.cat(p).numpy().astype(np.uint16)) if p else r
                    for p, r in zip(parts, results, strict=True)
                ]
            for group in self._groups(frames):
                longest = max(frames[index] for index in group)
                batch = torch.zeros(len(group), 1, longest * SAMPLES_PER_FRAME)
                for row, index in enumerate(group):
                    batch[row, 0, : len(padded[index])] = padded[index]
                pieces = []
                for left, start, stop in self._pieces(longest):
                    piece = batch[..., left * SAMPLES_PER_FRAME : stop * SAMPLES_PER_FRAME].to(self.device)
                    pieces.append(self._encode(piece)[..., start - left :].cpu())
                codes = torch.cat(pieces, dim=-1).transpose(1, 2).numpy().astype(np.uint16)  # [B, frames, K]
                for row, index in enumerate(group):
                    # The codec is causal: padding on the right of a shorter clip changes none of its own frames.
                    results[index] = self._mark(codes[row, : frames[index]].copy())
        return results

    def decode(self, codes: np.ndarray | torch.Tensor) -> np.ndarray:
        """Audio of codes: integers [frames, K or fewer] -> float32 [frames * 1920] at 24 kHz.

        Raises:
            InputError: another shape, or codes outside 0..V-1 (a CSM head has 3 ids more than Mimi has codes).
        """
        import numpy as np
        import torch

        array = np.asarray(codes.detach().cpu() if isinstance(codes, torch.Tensor) else codes)
        if array.ndim != 2 or not 1 < array.shape[1] <= self.num_codebooks:
            raise InputError(f"codes have shape {list(array.shape)}", mend=f"give [frames, {self.num_codebooks}]")
        if len(array) == 0:
            return np.zeros(0, np.float32)
        if array.min() < 0 or array.max() >= self.codebook_size:
            raise InputError(
                f"codes run from {array.min()} to {array.max()}, the codec has 0 to {self.codebook_size - 1}",
                mend="mask the unused ids when sampling",
            )
        table = torch.from_numpy(array.astype(np.int64)).T[None]
        with torch.inference_mode(), _full_float32():
            audio = [
                self._decode(table[..., left:stop].to(self.device))[0, 0, (start - left) * SAMPLES_PER_FRAME :].cpu()
                for left, start, stop in self._pieces(len(array))
            ]
        return torch.cat(audio).numpy()[: len(array) * SAMPLES_PER_FRAME]

    def check(self) -> None:
        """Raises InputError if the weights or the library are not what is needed."""
        self.model  # noqa: B018 - making it checks

    def _encode(self, batch: torch.Tensor) -> torch.Tensor:
        """[B, 1, frames * 1920] float32 -> [B, K, frames] int64, on the codec's device."""
        raise NotImplementedError

    def _decode(self, codes: torch.Tensor) -> torch.Tensor:
        """[B, K, frames] int64 -> [B, 1, frames * 1920] float32, on the codec's device."""
        raise NotImplementedError

    @property
    def side_by_side(self) -> bool:
        return False

    def _encode_side_by_side(self, waves: list[torch.Tensor]) -> list[torch.Tensor]:
        """float32 [frames * 1920] each -> int64 [frames, K] each; only if ``side_by_side``."""
        raise NotImplementedError

    def _groups(self, frames: Sequence[int]) -> Iterator[list[int]]:
        """Indices of clips to code together: one by one on a CPU, batches of similar length elsewhere."""
        order = sorted((index for index, count in enumerate(frames) if count), key=lambda index: frames[index])
        group: list[int] = []
        for index in order:
            if group and (self.device == "cpu" or (len(group) + 1) * frames[index] > _WHOLE_FRAMES):
                yield group
                group = []
            group.append(index)
        if group:
            yield group

    def _pieces(self, frames: int) -> Iterator[tuple[int, int, int]]:
        """(left, start, stop): frames start..stop are coded from left..stop, which is all that they depend on."""
        start, stop = 0, min(frames, _WHOLE_FRAMES)
        while start < frames:
            yield max(0, start - self._reach), start, stop
            start, stop = stop, min(frames, stop + max(_STEP_FRAMES, _WHOLE_FRAMES - self._reach))

    def _mark(self, codes: np.ndarray) -> np.ndarray:
        empty = ~codes.any(axis=1)
        codes[empty, -1] = 1
        self.marked_frames += int(empty.sum())
        return codes


@contextlib.contextmanager
def _full_float32() -> Iterator[None]:
    """Float32 convolutions and matrix products without TF32, whatever PyTorch's settings are."""
    import torch

    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
