"""Which tensors a training run holds: their sizes, how they are stored, and what training adds to each.

Sizes follow from the model's shape alone; nothing is allocated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from csm_kernels.constants import MOMENT_BLOCK, NF4_BLOCK, NF4_SCALES_BLOCK, SMALLEST_8BIT

from csm_fast.config.shape import CSMConfig, TransformerConfig
from csm_fast.config.targets import match_target
from csm_fast.config.train import AdapterSection, OptimizerSection

# bitsandbytes' NF4 with double quantisation: 4 bits a weight; per block an absmax in 8 bits, and per block of those one
# in float32; 16 float32 codes and an offset per tensor, the codes of the absmax (256 float32) too.
NF4_CODES_BYTES = 4 * (16 + 256 + 1)
# Rows of the text table that a corpus uses, if only such rows are trained: more than speech of one language needs. Of
# the audio table it is every row.
TEXT_ROWS = 16_384


@dataclass(frozen=True)
class Weight:
    """One parameter, or several of one shape.

    Attributes:
        name: as in the model; ``part`` its first component.
        inputs, outputs: of the linear layer, or columns and rows of a table; a norm has no inputs.
        count: how many of them lie in one tensor: the heads of the audio head.
        kind: "linear", "table", "head" or "norm".
        width: bytes of an element as stored; of a quantised weight, as multiplied.
        trained: it has a gradient, of the same width.
        rank: of the adapter beside it; 0 without one.
        dora: the adapter has a magnitude per output.
        quantised: NF4.
        masters: of a table, rows that are trained in float32 beside it (``embedding_rows.EmbeddingRows``).
    """

    name: str
    inputs: int
    outputs: int
    kind: str
    width: int
    trained: bool
    count: int = 1
    rank: int = 0
    dora: bool = False
    quantised: bool = False
    masters: int = 0

    @property
    def learns(self) -> bool:
        """Whether a gradient of its own shape is computed."""
        return self.trained or self.masters > 0

    @property
    def part(self) -> str:
        return self.name.split(".")[0]

    @property
    def numel(self) -> int:
        return max(1, self.inputs) * self.outputs * self.count

    @property
    def stored(self) -> int:
        """Bytes of the weight itself."""
        if not self.quantised:
            return self.numel * self.width + 4 * self.masters * self.inputs
        scales = -(-self.numel // NF4_BLOCK)
        return -(-self.numel // 2) + scales + 4 * -(-scales // NF4_SCALES_BLOCK) + NF4_CODES_BYTES

    @property
    def adapter(self) -> int:
        """Elements of the adapter: A [rank, inputs], B [outputs, rank], DoRA's magnitude [outputs]. Float32."""
        return self.rank * (self.inputs + self.outputs) + self.outputs * self.dora

    def trained_tensors(self) -> list[tuple[int, int]]:
        """(elements, bytes of one) of each tensor that the optimizer updates."""
        found = [(self.numel, self.width)] if self.trained else []
        found += [(self.masters * self.inputs, 4)] if self.masters else []
        if self.rank:
            found += [(self.rank * self.inputs, 4), (self.rank * self.outputs, 4)]
            found += [(self.outputs, 4)] if self.dora else []
        return found


def optimizer_state(elements: int, section: OptimizerSection) -> int:
    """Bytes of the state of one trained tensor: two moments, in 8 bits with a float32 absmax per block; and for Kahan
    summation the rounding errors in bf16."""
    if section.optimizer != "adamw" and elements >= SMALLEST_8BIT:
        moments = 2 * (elements + 4 * -(-elements // MOMENT_BLOCK))
    else:
        moments = 8 * elements
    return moments + (2 * elements if section.weights == "bf16-kahan" else 0)


def list_weights(
    shape: CSMConfig, adapter: AdapterSection, optimizer: OptimizerSection, freeze: list[str], compute: int
) -> Iterator[Weight]:
    """Every parameter of the model, in the order of its tree.

    Args:
        freeze: parts that are not trained.
        compute: bytes of the type of the matrix products: 2 or 4.
    """
    full = adapter.method == "full"
    # Without adapters the weights are float32 or bf16 as asked for; under adapters the frozen ones have the compute
    # type, and what is trained beside the adapters is float32, as are the norms.
    whole = 4 if optimizer.weights == "fp32" else 2
    frozen = whole if full else compute

    def one(name: str, kind: str, inputs: int, outputs: int, count: int = 1) -> Weight:
        part = name.split(".")[0]
        trained = full
        if not full and kind == "table":
            trained = adapter.train_embeddings == "all"
        elif not full and kind == "head":
            trained = adapter.train_heads
        trained = trained and part not in freeze
        rank = 0
        if (
            not full
            and kind in ("linear", "head")
            and count == 1
            and any(match_target(word, [name]) for word in adapter.target_modules)
            and not trained
        ):
            rank = adapter.lora_rank
        width = 4 if (trained and not full) or (kind == "norm" and not full) else frozen
        quantised = adapter.method == "qlora" and ".layers." in name and kind == "linear"
        dora = rank > 0 and adapter.method == "dora"
        masters = 0
        if not full and kind == "table" and adapter.train_embeddings == "rows":
            masters = outputs if part == "audio_embeddings" else min(outputs, TEXT_ROWS)
        return Weight(name, inputs, outputs, kind, width, trained, count, rank, dora, quantised, masters)

    def stack(part: str, config: TransformerConfig) -> Iterator[Weight]:
        width, hidden = config.embed_dim, config.intermediate_dim
        kv = config.num_kv_heads * config.head_dim
        for i in range(config.num_layers):
            layer = f"{part}.layers.{i}."
            yield one(layer + "attn.q_proj", "linear", width, width)
            yield one(layer + "attn.k_proj", "linear", width, kv)
            yield one(layer + "attn.v_proj", "linear", width, kv)
            yield one(layer + "attn.output_proj", "linear", width, width)
            yield one(layer + "mlp.w1", "linear", width, hidden)
            yield one(layer + "mlp.w2", "linear", hidden, width)
            yield one(layer + "mlp.w3", "linear", width, hidden)
            yield one(layer + "sa_norm", "norm", 0, width)
            yield one(layer + "mlp_norm", "norm", 0, width)
        yield one(part + ".norm", "norm", 0, width)

    width, vocab, codebooks = shape.backbone.embed_dim, shape.audio_vocab_size, shape.num_codebooks
    yield from stack("backbone", shape.backbone)
    yield from stack("decoder", shape.decoder)
    yield one("text_embeddings", "table", width, shape.text_vocab_size)
    yield one("audio_embeddings", "table", width, vocab * codebooks)
    yield one("projection", "linear", width, shape.decoder.embed_dim)
    yield one("codebook0_head", "head", width, vocab)
    yield one("audio_head", "head", shape.decoder.embed_dim, vocab, codebooks - 1)
