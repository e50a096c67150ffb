"""Shapes of models: the two stacks and the vocabularies; what a frame of audio is."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, get_type_hints

from csm_fast.system.errors import InputError

# Mimi's. A frame of codes stands for this much audio.
SAMPLE_RATE = 24_000  # Hz
SAMPLES_PER_FRAME = 1920
FRAME_SECONDS = SAMPLES_PER_FRAME / SAMPLE_RATE  # 0.08


@dataclass(frozen=True)
class TransformerConfig:
    """One Llama stack.

    Attributes:
        num_layers, num_heads, num_kv_heads, embed_dim, intermediate_dim: as in Llama; ``head_dim`` is
            ``embed_dim // num_heads`` and must be even.
        max_seq_len: positions the stack was trained for.
        norm_eps: epsilon of the RMS norms.
        rope_base, rope_scale_factor, rope_low_freq_factor, rope_high_freq_factor, rope_old_context_len: Llama-3's
            scaled rotary embedding, with the values of Llama 3.2 (and so of CSM).
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    embed_dim: int
    intermediate_dim: int
    max_seq_len: int = 2048
    norm_eps: float = 1e-5
    rope_base: float = 500_000.0
    rope_scale_factor: float = 32.0
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_old_context_len: int = 8192

    def __post_init__(self):
        for name in ("num_layers", "num_heads", "num_kv_heads", "embed_dim", "intermediate_dim", "max_seq_len"):
            value = getattr(self, name)
            most = 1024 if name == "num_layers" else 2**24
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
                raise InputError(f"{name} is {value!r}", mend=f"give an integer from 1 to {most:,}")
        for name in ("norm_eps", "rope_base", "rope_scale_factor", "rope_low_freq_factor", "rope_high_freq_factor"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise InputError(f"{name} is {value!r}", mend="give a number above 0")
        if self.embed_dim % self.num_heads or self.head_dim % 2:
            raise InputError(
                f"embed_dim {self.embed_dim} over {self.num_heads} heads gives no even head width",
                mend="choose embed_dim as an even multiple of num_heads",
            )
        if self.num_heads % self.num_kv_heads:
            raise InputError(f"{self.num_heads} heads cannot share {self.num_kv_heads} key-value heads")

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads


@dataclass(frozen=True)
class CSMConfig:
    """A whole CSM: backbone, depth decoder and vocabularies. ``CSMConfig.csm_1b()`` is Sesame's csm-1b."""

    backbone: TransformerConfig
    decoder: TransformerConfig
    text_vocab_size: int = 128_256
    audio_vocab_size: int = 2051
    num_codebooks: int = 32

    def __post_init__(self):
        for name, most in (("num_codebooks", 1024), ("text_vocab_size", 2**31), ("audio_vocab_size", 2**16)):
            if not 2 <= getattr(self, name) <= most:
                raise InputError(f"{name} is {getattr(self, name)}", mend=f"give an integer from 2 to {most:,}")

    @classmethod
    def csm_1b(cls) -> CSMConfig:
        """Sesame's csm-1b: 1,552,791,552 parameters."""
        return cls(
            backbone=TransformerConfig(16, 32, 8, 2048, 8192),
            decoder=TransformerConfig(4, 8, 2, 1024, 8192),
        )

    @classmethod
    def tiny(cls) -> CSMConfig:
        """A few million parameters in the two stacks, for CPUs, demos and tests; the vocabularies are csm-1b's."""
        return cls(
            backbone=TransformerConfig(4, 4, 2, 256, 1024),
            decoder=TransformerConfig(2, 2, 1, 192, 768),
        )

    @classmethod
    def small(cls) -> CSMConfig:
        """A shape for numerical checks and for benchmarks on CPUs."""
        return cls(
            backbone=TransformerConfig(4, 8, 2, 512, 2048),
            decoder=TransformerConfig(2, 4, 1, 256, 2048),
        )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, file: str | None = None) -> CSMConfig:
        """The inverse of ``to_dict``. Unknown and missing keys raise an ``InputError`` that names ``file``."""
        from csm_fast.config.parse import coerce

        def typed(kind: type, given: dict[str, Any], where: str) -> dict[str, Any]:
            hints = get_type_hints(kind)
            return {k: coerce(v, hints[k], where + k, file) if k in hints else v for k, v in given.items()}

        values = dict(values)
        try:
            for name in ("backbone", "decoder"):
                values[name] = TransformerConfig(**typed(TransformerConfig, dict(values[name]), f"{name}."))
            sizes = {name: value for name, value in values.items() if name not in ("backbone", "decoder")}
            return cls(**{**values, **typed(cls, sizes, "")})
        except InputError as error:
            raise InputError(error.what, file=file, mend=error.mend) from None
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"not a csm_fast model configuration ({error})",
                file=file,
                mend="it needs backbone, decoder (num_layers, num_heads, num_kv_heads, embed_dim, "
                "intermediate_dim), text_vocab_size, audio_vocab_size and num_codebooks",
            ) from None


NAMED_SHAPES = {"csm-1b": CSMConfig.csm_1b, "small": CSMConfig.small, "tiny": CSMConfig.tiny}
