"""The libraries that run a codec: transformers, moshi, and on a CPU our own encoder in place of transformers'."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from csm_fast.data.codec.base import Codec
from csm_fast.data.codec.mimi_shape import is_supported, weight_shapes
from csm_fast.data.codec.mimi_weights import check_shapes, flat_name, missing_library

if TYPE_CHECKING:
    import torch

    from csm_fast.data.codec.mimi_encoder import MimiEncoder


class TransformersCodec(Codec):
    """transformers' MimiModel."""

    kind = "transformers"
    _encoder: MimiEncoder | None = None

    def _make(self) -> Any:
        try:
            from transformers import MimiConfig, MimiModel
        except ImportError as error:
            raise missing_library("transformers", error) from None
        return MimiModel(MimiConfig(**self._arguments))

    def to(self, device: str | torch.device) -> Codec:
        self._encoder = None
        if "model" in vars(self):
            for module in self.model.modules():
                if hasattr(module, "_embed"):
                    module._embed = None  # a cached table that .to() does not move
        return super().to(device)

    def check(self) -> None:
        """Raises InputError if the weights do not have the shapes of the sizes. Imports transformers only if encoding
        does."""
        if self.device == "cpu" and is_supported(self._sizes) and self._state is not None:
            check_shapes(self._state, weight_shapes(self._sizes))
        else:
            super().check()

    def _cpu_encoder(self) -> MimiEncoder | None:
        from csm_fast.data.codec.mimi_encoder import MimiEncoder

        if self._encoder is None and self.device == "cpu" and is_supported(self._sizes):
            flat = self._state
            if flat is None:
                flat = {flat_name(name): value.float() for name, value in self.model.state_dict().items()}
            self._encoder = MimiEncoder(flat, self._sizes, self.num_codebooks)
        return self._encoder

    @property
    def side_by_side(self) -> bool:
        return self._cpu_encoder() is not None

    def _encode_side_by_side(self, waves: list[torch.Tensor]) -> list[torch.Tensor]:
        from csm_fast.data.codec.mimi_encoder import encode_packs

        encoder = self._cpu_encoder()
        assert encoder is not None
        return encode_packs(encoder, waves)

    def _encode(self, batch: torch.Tensor) -> torch.Tensor:
        import torch

        encoder = self._cpu_encoder()
        if encoder is not None:
            return torch.stack(encoder.encode(list(batch[:, 0]))).transpose(1, 2)
        return self.model.encode(batch, num_quantizers=self.num_codebooks, return_dict=True).audio_codes

    def _decode(self, codes: torch.Tensor) -> torch.Tensor:
        return self.model.decode(codes, return_dict=True).audio_values


class OfflineCodec(TransformersCodec):
    """The offline codec, which has Mimi's architecture and runs on transformers' MimiModel."""

    kind = "offline"

    def _decode(self, codes: torch.Tensor) -> torch.Tensor:
        return super()._decode(codes).clamp(-1, 1)  # the output of a random decoder is not limited


class MoshiCodec(Codec):
    """moshi's MimiModel. It runs under ``no_compile``: compiling parts of itself takes minutes."""

    kind = "moshi"

    def _make(self) -> Any:
        model = _make_moshi(self._sizes)
        model.set_num_codebooks(self.num_codebooks)
        return model

    def _encode(self, batch: torch.Tensor) -> torch.Tensor:
        from moshi.utils.compile import no_compile

        with no_compile():
            return self.model.encode(batch)

    def _decode(self, codes: torch.Tensor) -> torch.Tensor:
        from moshi.utils.compile import no_compile

        with no_compile():
            return self.model.decode(codes)


def _make_moshi(config: Any) -> Any:
    """moshi's Mimi without weights. ``config``: from ``complete_sizes``, or a MimiConfig."""
    try:
        from moshi.models import loaders
    except ImportError as error:
        raise missing_library("moshi", error) from None
    width = config.hidden_size
    seanet = dict(loaders._seanet_kwargs, dimension=width, n_filters=config.num_filters)
    transformer = dict(
        loaders._transformer_kwargs,
        d_model=width,
        num_heads=config.num_attention_heads,
        num_layers=config.num_hidden_layers,
        context=config.sliding_window,
        dim_feedforward=config.intermediate_size,
        input_dimension=width,
        output_dimensions=[width],
    )
    quantizer = dict(
        loaders._quantizer_kwargs,
        dimension=config.codebook_dim,
        n_q=config.num_quantizers,
        bins=config.codebook_size,
        input_dimension=width,
        output_dimension=width,
    )
    sizes = dict(loaders._mimi_config, seanet=seanet, transformer=transformer, quantizer=quantizer)
    return loaders.get_mimi(None, sizes, num_codebooks=config.num_quantizers)
