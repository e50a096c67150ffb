"""Settings of all commands but training; ``parse`` turns them into flags."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from csm_fast.config.checks import check_path, check_seconds, check_seed, check_speaker, check_threads
from csm_fast.config.train import OTHER_TOOLS, TrainConfig, option
from csm_fast.system.errors import InputError


@dataclass
class GenerateConfig:
    """``csm-fast generate``."""

    text: str = option("", "what to say")
    model: str = option("run/best", "hub id, directory or .safetensors", alias=("m",))
    out: str = option("out.wav", "wav file to write", alias=("o", "output"))
    speaker: int = option(0, "whose voice; -1: no speaker tag", alias=("s",))
    context: str | None = option(None, "metadata file whose first conversation comes before the text")
    max_seconds: float = option(10.0, "longest speech")
    temperature: float = option(0.9, "0 is greedy", alias=("t",))
    top_k: int = option(50, "sample among the k most likely codes; 0: all", alias=("topk", "k"))
    greedy: bool = option(False, "always the most likely code")
    seed: int = option(0, "of the draws")
    codec: Literal["auto", "transformers", "moshi", "offline"] = option("auto", "codec the model was trained with")
    codec_source: str | None = option(None, "hub id or local path of the codec's weights")
    tokenizer: str | None = option(None, "text tokenizer: a file, a directory or a hub id")
    speaker_map: str | None = option(None, "file of names and their numbers, for --context")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    threads: int | None = option(None, "CPU threads")

    def __post_init__(self):
        if not self.text.strip():
            raise InputError("--text is empty", mend="say what to speak")
        check_path("out", self.out)
        check_seconds("max-seconds", self.max_seconds)
        check_speaker("speaker", self.speaker)
        check_seed(self.seed)
        check_threads(self.threads)
        if self.top_k < 0:
            raise InputError(f"--top-k {self.top_k}", mend="give at least 1, or 0 for all codes")
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"--temperature {self.temperature}", mend="give at least 0")


@dataclass
class MergeConfig:
    """``csm-fast merge``."""

    adapter: str = option("run/best", "its directory: a run's checkpoint, PEFT's or csm-mlx's", alias=("a",))
    out: str = option("merged", "directory to write the model to", alias=("o", "output"))
    base: str | None = option(None, "model it was trained on (default: the one it names)", alias=("model", "m"))
    dtype: Literal["fp32", "bf16"] = option("fp32", "of the merged weights; they are added in float32 in any case")

    def __post_init__(self):
        check_path("out", self.out)


@dataclass
class VerifyAdapterConfig:
    """``csm-fast verify-adapter``."""

    adapter: str = option("run/best", "directory of the adapter", alias=("a",))
    base: str | None = option(None, "model it was trained on (default: the one it names)", alias=("model", "m"))
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")


@dataclass
class PlanConfig:
    """``csm-fast plan``: a card, and the settings of a training run, so that a recipe can be planned as it is.

    Each field here takes the place of the training setting of that name. Its default leaves the choice to the plan.
    """

    gpu: str | None = option(None, "memory such as 12GB, or a card such as rtx-4090 (default: this machine's)")
    model: str = option(
        "csm-1b", "a shape (csm-1b, small, tiny), a model's directory or its config.json, or a YAML file of a CSMConfig"
    )
    activation_checkpointing: Literal["auto", "off", "selective", "full"] = option(
        "auto", "auto: the fastest with which the pack fits", alias=("gradient_ckpt",), bare="full"
    )
    data: str | None = option(
        None, "directory written by csm-fast pretokenize: hours for an epoch, its share of audio rows"
    )
    pack_rows: int | None = option(None, "rows of a pack (default: 4096, or the most that fit)", alias=("rows",))
    method: Literal["all", "full", "lora", "dora", "qlora"] = option("all", "one method, or all of them")
    training: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self):
        if self.pack_rows is not None and self.pack_rows < 1:
            raise InputError(f"--pack-rows {self.pack_rows}", mend="give at least 1")
        if self.data is not None:
            check_path("data", self.data)


@dataclass
class ProfileConfig(TrainConfig):
    """``csm-fast profile``: its own settings, and those of the training run whose steps are profiled. It ignores
    settings that say when a run ends, and what it saves and where."""

    OTHER_FLAGS: ClassVar[tuple] = OTHER_TOOLS

    output: str = option("profile", "directory for the trace and the table")
    steps: int = option(5, "optimizer steps that are measured")
    warmup: int = option(3, "steps before them")

    def __post_init__(self):
        check_path("output", self.output)
        if self.steps < 1:
            raise InputError(f"--steps {self.steps}", mend="give at least 1")
        if self.warmup < 0:
            raise InputError(f"--warmup {self.warmup}", mend="give at least 0")


@dataclass
class PretokenizeConfig:
    """``csm-fast pretokenize``."""

    train_data: str = field(metadata={"help": "metadata of the training set: .json, .jsonl, .csv or .parquet"})
    val_data: str | None = option(None, "metadata of the validation set")
    val_fraction: float | None = option(
        None,
        "take about this share of the training set as validation set, e.g. 0.05: each recording has that chance, "
        "whatever else is there, so that more data moves none (--seed takes others)",
    )
    output: str = option("tokens", "directory that will hold train/, val/ and report.json", alias=("output-dir", "o"))
    codec: Literal["auto", "transformers", "moshi", "offline"] = option(
        "auto", "Mimi through transformers or moshi, or the offline stand-in, whose audio is not intelligible"
    )
    codec_source: str | None = option(None, "hub id or local path of the codec's weights")
    num_codebooks: int = option(32, "codebooks kept of each frame")
    tokenizer: str | None = option(None, "text tokenizer: a file, a directory or a hub id", alias=("text_tokenizer",))
    speaker_map: str | None = option(None, "JSON or YAML file of {speaker name: integer}")
    default_speaker: int | None = option(None, "speaker of turns that name none (999 in flat rows, 0 in conversations)")
    omit_speaker_id: bool = option(False, "leave the [speaker] tag out of the text")
    device: str = option("auto", "where the codec runs: auto, cpu, cuda, cuda:1, ...")
    workers: int | None = option(None, "processes that decode and resample (default: up to 4; 0: none)")
    batch_seconds: float = option(
        120.0, "audio encoded at once on a GPU, in seconds with padding; on a CPU each core has its own clips"
    )
    skip_bad: bool = option(False, "leave conversations with an unusable clip out, and list them, instead of stopping")
    min_seconds: float = option(0.0, "leave conversations with a clip shorter than this out, in seconds")
    max_seconds: float | None = option(None, "leave conversations with a clip longer than this out, in seconds")
    seed: int = option(0, "which clips --val-fraction takes")

    def __post_init__(self):
        if self.val_data is not None and self.val_fraction is not None:
            raise InputError("--val-data and --val-fraction are both given", mend="give one of them")
        if self.workers is not None and self.workers < 0:
            raise InputError(f"--workers {self.workers}", mend="give at least 0")
        if not self.batch_seconds > 0:
            raise InputError(f"--batch-seconds {self.batch_seconds}", mend="give more than 0 seconds")
        if not 0 <= self.min_seconds < math.inf:
            raise InputError(f"--min-seconds {self.min_seconds}", mend="give 0 or more")
        check_path("output", self.output)
        if self.max_seconds is not None and not self.max_seconds > self.min_seconds:
            raise InputError(f"--max-seconds {self.max_seconds}", mend="give more than --min-seconds")
