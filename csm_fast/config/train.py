"""The settings of a training run: one dataclass per section, for Python callers, YAML files and command-line flags.

A field's ``metadata`` holds its help text (with units) and its aliases (the names that users of other tools know);
``parse`` makes YAML keys and flags of them. ``__post_init__`` checks values, so that a wrong one gives the same error
from everywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from csm_fast.config.checks import check_path, check_seconds, check_seed, check_speaker, check_threads
from csm_fast.system.errors import InputError


def option(default: Any, help: str, *, alias: tuple[str, ...] = (), **extra: Any) -> Any:
    """A dataclass field with its help text and aliases."""
    metadata = {"help": help, "alias": alias, **extra}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


# ------------------------------------------------------------------------------------------------------- sections

FREEZABLE = ("backbone", "decoder", "text_embeddings", "audio_embeddings", "projection", "codebook0_head", "audio_head")
LossPreset = Literal["blog", "sesame-finetune", "csm-mlx", "transformers"]


@dataclass
class ModelSection:
    """Which model is trained, and which of its parts."""

    model: str = option(
        "sesame/csm-1b",
        "hub id, directory or .safetensors to start from; with --from-scratch a shape: csm-1b, small, tiny, or a "
        "YAML/JSON file of a CSMConfig",
        alias=("model_name_or_checkpoint_path", "pretrained_path"),
    )
    from_scratch: bool = option(False, "start from random weights", alias=("train_from_scratch",))
    freeze: list[str] = option([], "parts that are not trained: " + ", ".join(FREEZABLE), repeat=True)
    activation_checkpointing: Literal["off", "selective", "full"] = option(
        "off",
        "selective: recompute the MLP of each layer in the backward pass; full: the whole layer. Less memory, a sixth "
        "or a third more time. Without a value: full",
        alias=("gradient_ckpt",),
        bare="full",
    )
    precision: Literal["auto", "bf16", "fp16", "fp32"] = option(
        "auto",
        "bf16, fp16: products in that type under autocast, fp16 with loss scaling; auto: what the machine "
        "multiplies fast",
    )
    compile: Literal["auto", "on", "off"] = option(
        "auto", "torch.compile for the layers: half a minute at the start, faster steps; auto: on CUDA only"
    )

    def __post_init__(self):
        for part in self.freeze:
            if part not in FREEZABLE:
                raise InputError(f"--freeze {part}: no such part", mend="choose among " + ", ".join(FREEZABLE))


@dataclass
class DataSection:
    """Which data an optimizer step gets."""

    data: str = option("tokens", "directory written by csm-fast pretokenize (holds train/ and perhaps val/)")
    batch_size: int = option(8, "conversations per optimizer step (times gradient_accumulation)")
    batch_rows: int | None = option(None, "rows per optimizer step instead of batch_size")
    pack_rows: int = option(
        4096, "most rows in one pack, the unit on the device at once; longer conversations are split at turn ends"
    )
    gradient_accumulation: int = option(
        1,
        "multiplies batch_size; packs already bound the memory, so this is only for those who count this way",
        alias=("grad_acc_steps", "gradient_accumulation_steps", "grad_accum", "grad_accumulation_steps"),
    )
    mask_speaker_ids: list[int] = option([], "turns of these speakers are context: heard, not learned", repeat=True)
    supervise: Literal["all", "last"] = option(
        "all", "last: only each conversation's last turn is learned, the others are context"
    )
    pack_window: int = option(4096, "with batch_rows: conversations that one best-fit packing chooses among")
    seed: int = option(0, "seed of every draw: order, packing, frames, initial weights")

    def __post_init__(self):
        for name in ("batch_size", "pack_rows", "gradient_accumulation", "pack_window"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}", mend="give at least 1")
        check_path("data", self.data)
        for speaker in self.mask_speaker_ids:
            check_speaker("mask-speaker-ids", speaker)
        if self.batch_rows is not None and self.batch_rows < 1:
            raise InputError(f"--batch-rows {self.batch_rows}", mend="give at least 1")
        check_seed(self.seed)


@dataclass
class LossSection:
    """The loss; ``csm_fast.model.loss`` has the formulas of the presets."""

    loss: LossPreset = option("blog", "which tool's formula to use")
    decoder_loss_weight: float | None = option(
        None, "w in (1-w) CE0 + w CEd; presets blog and sesame-finetune (default 0.5)"
    )
    first_codebook_weight_multiplier: float | None = option(
        None, "f in (f CE0 + 31 CEd)/32; preset csm-mlx (default 1)", alias=("fcw",)
    )
    amortization_fraction: float = option(1 / 16, "share of the supervised frames that the depth decoder sees")
    eos_weight: float = option(1.0, "weight of end-of-speech frames in both means")

    def __post_init__(self):
        if self.decoder_loss_weight is not None and self.loss not in ("blog", "sesame-finetune"):
            raise InputError(
                f"decoder_loss_weight does not belong to the loss {self.loss}",
                mend="leave it out, or use --loss blog or sesame-finetune",
            )
        if self.first_codebook_weight_multiplier is not None and self.loss != "csm-mlx":
            raise InputError(
                f"first_codebook_weight_multiplier does not belong to the loss {self.loss}",
                mend="leave it out, or use --loss csm-mlx",
            )
        if self.decoder_loss_weight is not None and not 0 <= self.decoder_loss_weight <= 1:
            raise InputError(f"decoder_loss_weight is {self.decoder_loss_weight}", mend="give a number from 0 to 1")
        if self.first_codebook_weight_multiplier is not None and not (
            0 <= self.first_codebook_weight_multiplier < math.inf
        ):
            raise InputError(
                f"first_codebook_weight_multiplier is {self.first_codebook_weight_multiplier}",
                mend="give a number of at least 0",
            )
        if not 0 < self.amortization_fraction <= 1:
            raise InputError(
                f"amortization_fraction is {self.amortization_fraction}", mend="give a number above 0, at most 1"
            )
        if not 0 < self.eos_weight < math.inf:
            raise InputError(f"eos_weight is {self.eos_weight}", mend="give a number above 0")


@dataclass
class AdapterSection:
    """Adapters in place of training the whole model, and a base that may be quantised."""

    method: Literal["full", "lora", "dora", "qlora"] = option(
        "full", "full: the weights themselves; lora, dora: adapters beside them; qlora: LoRA over a 4-bit (NF4) base"
    )
    lora_rank: int = option(16, "rank of the adapters")
    lora_alpha: float | None = option(None, "their scale is alpha / rank (default: twice the rank)")
    lora_dropout: float = option(0.0, "dropout before the adapters of the two stacks")
    rslora: bool = option(False, "scale by alpha / sqrt(rank) instead")
    target_modules: list[str] = option(
        ["attn"],
        "what gets adapters: attn (q, k, v, o and the MLP of both stacks, as csm-mlx means it), projection, "
        "codebook0_head, or names of linear layers such as q_proj, w1, backbone.layers.0.attn.q_proj",
        repeat=True,
    )
    train_embeddings: Literal["off", "rows", "all"] = option(
        "off",
        "train the embedding tables beside the adapters: all of them, or only the rows that the data holds. Without a "
        "value: all",
        bare="all",
    )
    train_heads: bool = option(False, "train codebook0_head and audio_head beside the adapters")

    def __post_init__(self):
        if self.lora_rank < 1:
            raise InputError(f"--lora-rank {self.lora_rank}", mend="give at least 1")
        if self.lora_alpha is not None and not 0 < self.lora_alpha < math.inf:
            raise InputError(f"--lora-alpha {self.lora_alpha}", mend="give a number above 0")
        if not 0 <= self.lora_dropout < 1:
            raise InputError(f"--lora-dropout {self.lora_dropout}", mend="give a number from 0 to below 1")
        if not self.target_modules:
            raise InputError("--target-modules is empty", mend="leave it out for attn")

    @property
    def alpha(self) -> float:
        return 2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha


@dataclass
class OptimizerSection:
    """AdamW and its schedule. Steps are optimizer steps everywhere."""

    learning_rate: float | None = option(None, "peak learning rate (default: 3e-5; with adapters 2e-4)", alias=("lr",))
    optimizer: Literal["adamw", "adamw-8bit", "paged-adamw-8bit"] = option(
        "adamw",
        "8bit: moments in 8 bits, by blocks (needs bitsandbytes); paged: moments in host memory when the GPU's is full",
    )
    weights: Literal["fp32", "bf16-stochastic", "bf16-kahan", "bf16-nearest"] = option(
        "fp32",
        "trained weights in float32, or in bf16 with updates rounded stochastically, with their rounding errors kept "
        "(Kahan), or to nearest, which loses most small updates",
    )
    optimizer_in_backward: bool = option(
        False, "update each weight as soon as its gradient is there, and drop it; needs --max-grad-norm 0"
    )
    weight_decay: float = option(0.002, "decoupled decay of matrices; norms and embeddings have none", alias=("wd",))
    beta1: float = option(0.9, "AdamW")
    beta2: float = option(0.999, "AdamW")
    adam_eps: float = option(1e-8, "AdamW")
    max_grad_norm: float = option(1.3, "clip the global gradient norm; 0 turns clipping off", alias=("max_norm",))
    warmup_steps: int | None = option(None, "steps of linear warmup")
    warmup_ratio: float | None = option(None, "warmup as a share of all steps (default 0.05)")
    lr_decay: Literal["linear", "cosine", "constant", "exponential"] = option("linear", "after the warmup")

    def __post_init__(self):
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            raise InputError("warmup_steps and warmup_ratio are both given", mend="give one of them")
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise InputError(f"warmup_steps is {self.warmup_steps}", mend="give at least 0")
        if self.warmup_ratio is not None and not 0 <= self.warmup_ratio <= 1:
            raise InputError(f"warmup_ratio is {self.warmup_ratio}", mend="give a number from 0 to 1")
        if not 1e-30 <= self.adam_eps < math.inf:  # with 0, a weight without gradient (an unused id's) would be 0/0
            raise InputError(f"adam_eps is {self.adam_eps}", mend="give a number above 0, such as 1e-8")
        if self.optimizer_in_backward and self.max_grad_norm:
            raise InputError(
                "--optimizer-in-backward knows no global gradient norm to clip by",
                mend="add --max-grad-norm 0, or leave --optimizer-in-backward out",
            )
        for name in ("learning_rate", "weight_decay", "max_grad_norm"):
            if not 0 <= (getattr(self, name) or 0) < math.inf:
                raise InputError(f"{name} is {getattr(self, name)}", mend="give a number of at least 0")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}", mend="give a number from 0 to below 1")


@dataclass
class RunSection:
    """How long, how often, and where to."""

    output_dir: str = option("run", "checkpoints, metrics, plots and samples go here", alias=("output-dir", "o"))
    n_epochs: int = option(10, "passes over the training data", alias=("epochs", "e"))
    max_steps: int | None = option(None, "stop after this many optimizer steps (the schedule ends there too)")
    log_every: int = option(10, "steps between metric lines", alias=("log_freq",))
    val_every: int = option(100, "steps between validations; 0: only at the start and the end", alias=("val_freq",))
    save_every: int = option(500, "steps between checkpoints; 0: only at the end", alias=("ckpt_freq",))
    keep: int = option(2, "how many of the newest checkpoints stay (the best one stays anyway)")
    val_fraction_frames: float = option(1 / 4, "share of the validation frames on which the depth decoder is scored")
    gen_every: int = option(0, "steps between speech samples; 0: none")
    gen_sentences: str = option(
        "Bird law in this country is not governed by reason.",
        "text of the samples, or a .txt file with one per line",
        alias=("gen_sentence",),
    )
    gen_speaker: int = option(0, "speaker of the samples")
    gen_seconds: float = option(10.0, "longest sample")
    codec: Literal["auto", "transformers", "moshi", "offline"] = option("auto", "codec that makes samples audible")
    codec_source: str | None = option(None, "hub id or local path of the codec's weights")
    tokenizer: str | None = option(None, "text tokenizer: a file, a directory or a hub id")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    threads: int | None = option(None, "CPU threads (default: torch's choice); results are reproducible per number")
    keep_freed_memory: bool = option(True, "CPU, Linux: freed memory serves the next step, not the system")
    memory: Literal["check", "auto", "off"] = option(
        "check",
        "check: refuse, before loading weights, what cannot fit; auto: choose --activation-checkpointing so that it "
        "fits; off: neither",
    )
    memory_limit: str | None = option(None, "of the device, such as 12GB (default: what it has)")
    resume: bool = option(True, "continue from the newest complete checkpoint in output_dir")
    overfit_one_batch: bool = option(False, "train on the first batch only: the loss must go to nearly nothing")

    def __post_init__(self):
        for name in ("val_every", "save_every", "gen_every"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} is {getattr(self, name)}", mend="give at least 0")
        for name in ("n_epochs", "log_every", "keep"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}", mend="give at least 1")
        if self.max_steps is not None and self.max_steps < 1:
            raise InputError(f"max_steps is {self.max_steps}", mend="give at least 1")
        if not 0 < self.val_fraction_frames <= 1:
            raise InputError(f"val_fraction_frames is {self.val_fraction_frames}", mend="give above 0, at most 1")
        check_path("output-dir", self.output_dir)
        check_seconds("gen-seconds", self.gen_seconds)
        check_speaker("gen-speaker", self.gen_speaker)
        check_threads(self.threads)


# Flags of other tools, beside those that are aliases of a field.
OTHER_TOOLS: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = (
    # sesame-finetune. Tokens are always read from disk as they are needed, so the second has nothing to do.
    (("--use_amp", "--use-amp"), {"dest": "precision", "action": "store_const", "const": "bf16"}),
    (("--partial_data_loading", "--partial-data-loading"), {"action": "store_true"}),
    # csm-mlx's spelling of --freeze.
    (("--freeze-backbone",), {"dest": "freeze", "action": "append_const", "const": "backbone"}),
    (("--freeze-decoder",), {"dest": "freeze", "action": "append_const", "const": "decoder"}),
)


@dataclass
class TrainConfig:
    """Everything a training run depends on. Written, resolved, into the run directory as ``config.yaml``."""

    # The output folder as the other commands call it.
    OTHER_FLAGS: ClassVar[tuple] = (*OTHER_TOOLS, (("--output", "--out"), {"dest": "output_dir", "metavar": "X"}))

    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    loss: LossSection = field(default_factory=LossSection)
    adapter: AdapterSection = field(default_factory=AdapterSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    run: RunSection = field(default_factory=RunSection)
