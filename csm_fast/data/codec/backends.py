"""What runs a codec: transformers' Mimi, moshi's, and on a CPU an encoder of our own in transformers' place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from csm_fast.data.codec.base import Codec
from csm_fast.data.codec.mimi_shape import supported, weight_shapes
from csm_fast.data.codec.mimi_weights import check_shapes, flat_name, needs

if TYPE_CHECKING:
    import torch

    from csm_fast.data.codec.mimi_encoder import MimiEncoder


class TransformersCodec(Codec):
    """transformers' MimiModel; the offline codec runs on it too."""

    kind = "transformers"
    _encoder: MimiEncoder | None = None

    def _make(self) -> Any:
        try:
            from transformers import MimiConfig, MimiModel
        except ImportError as error:
            raise needs("transformers", error) from None
        return MimiModel(MimiConfig(**self._arguments))

    def to(self, device: str | torch.device) -> Codec:
        self._encoder = None
        if "model" in vars(self):
            for module in self.model.modules():
                if hasattr(module, "_embed"):
                    module._embed = None  # a cached table that .to() leaves behind
        return super().to(device)

    def check(self) -> None:
        """Raises InputError where the weights are not those of the sizes; as early, and without transformers where
        coding needs none."""
        if self.device == "cpu" and supported(self._sizes) and self._state is not None:
            check_shapes(self._state, weight_shapes(self._sizes))
        else:
            super().check()

    def _cpu_encoder(self) -> MimiEncoder | None:
        from csm_fast.data.codec.mimi_encoder import MimiEncoder

        if self._encoder is None and self.device == "cpu" and supported(self._sizes):
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
    kind = "offline"

    def _decode(self, codes: torch.Tensor) -> torch.Tensor:
        return super()._decode(codes).clamp(-1, 1)  # a random decoder knows no full scale


class MoshiCodec(Codec):
    """moshi's MimiModel. It compiles parts of itself unless told otherwise, which costs minutes and changes shapes."""

    kind = "moshi"

    def _make(self) -> Any:
        model = _moshi_model(self._sizes)
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


def _moshi_model(config: Any) -> Any:
    """moshi's Mimi of the sizes (``described``, or a MimiConfig), without weights."""
    try:
        from moshi.models import loaders
    except ImportError as error:
        raise needs("moshi", error) from None
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
