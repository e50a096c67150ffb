"""From a config to a run that can start: device, data, the place to continue from, memory, the model."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from csm_fast.config.shape import NAMED_SHAPES, CSMConfig
from csm_fast.config.train import TrainConfig
from csm_fast.data.token_store import TokenSource, open_split
from csm_fast.evaluate.validation import Validator
from csm_fast.model import adapters
from csm_fast.model.compile import compile_layers
from csm_fast.model.csm import CSM
from csm_fast.model.embedding_rows import EmbeddingRows, rows_in
from csm_fast.model.loss import amortized_loss, coefficients
from csm_fast.model.stacks import stack_limit, vocabulary
from csm_fast.packing.loader import OneStepPacker, Packer
from csm_fast.planner import fit
from csm_fast.system.device import compute_dtype, resolve_device, resolve_precision
from csm_fast.system.errors import InputError
from csm_fast.system.files import disk_error, old_directory
from csm_fast.train.checkpoint import RunState, read_if_complete
from csm_fast.train.checks import check_adapter, check_data, check_position, check_precision, position_identity
from csm_fast.train.optim.build import cast_weights
from csm_fast.train.optim.schedule import peak_learning_rate
from csm_fast.train.run_folder import check_damage, list_checkpoints
from csm_fast.train.step import LossFunction
from csm_fast.weights import adapter_files
from csm_fast.weights.load import load_model
from csm_fast.weights.shape import scratch_shape, shape_beforehand

Stores = TokenSource | tuple[TokenSource, TokenSource | None]  # the training data, or with the validation data


@dataclass(frozen=True)
class Prepared:
    """A run that can start. ``prepare`` makes it; the trainer reads it.

    Attributes:
        config: resolved: the learning rate and the activation checkpointing are chosen.
        run_dir: the output folder; it exists.
        precision: "bf16", "fp16" or "fp32".
        store: the training data.
        packer: makes the optimizer steps of it.
        validator: of the validation data; None where there is none.
        total_steps: optimizer steps of the whole run.
        model: on its device, with its adapters, cast and frozen as the run trains it.
        compiled: its layers are compiled.
        loss_function: (model, pack) -> (loss, per-codebook [K]).
        uniform_loss: the loss of guessing evenly, in nats.
        record: the codec and the tokenizer, which checkpoints carry.
        resumed: the checkpoint to continue from; None for a run that begins.
        state: where the run stands.
    """

    config: TrainConfig
    run_dir: Path
    device: torch.device
    precision: str
    store: TokenSource
    packer: Packer
    validator: Validator | None
    total_steps: int
    model: CSM
    compiled: bool
    loss_function: LossFunction
    uniform_loss: float
    record: dict[str, Any]
    resumed: Path | None
    state: RunState


def prepare(config: TrainConfig, model: CSM | None = None, store: Stores | None = None) -> Prepared:
    """Resolve a config and build what its run needs. ``config`` is not changed.

    What can be refused without the weights is refused before they are loaded.

    Args:
        model: start from this model, which becomes the run's, instead of ``config.model.model``. A run of full
            fine-tuning that is continued loads its own.
        store: train on this data, with or without validation data, instead of what ``config.data.data`` names.

    Raises:
        InputError: anything that the user can mend.
    """
    config = copy.deepcopy(config)
    check_adapter(config.adapter)
    config.optimizer.learning_rate = peak_learning_rate(config.optimizer, config.adapter.method)
    device, precision = _choose_device(config)
    train_store, val_store = _open_stores(config, store)
    run_dir = Path(config.run.output_dir).expanduser()
    resumed, state = _find_run(config, run_dir, train_store)
    shape = model.config if model is not None else shape_beforehand(config, resumed)
    layout = None
    if shape is not None:
        chosen = choose_checkpointing(config, shape, train_store, device, precision)
        config.model.activation_checkpointing = chosen  # type: ignore[assignment]
        layout = _lay_out_packs(config, train_store, val_store, device, shape.backbone.max_seq_len)
    is_named = model is None
    model = _load_model(config, model, resumed, compute_dtype(precision))
    stores = [some for some in (train_store, val_store) if some is not None]
    record = check_data(model, stores, config, resumed, is_named=is_named)
    compiled = _prepare_model(config, model, train_store, resumed, device, compute_dtype(precision))
    packer, validator, total_steps = layout or _lay_out_packs(
        config, train_store, val_store, device, stack_limit(model.backbone)
    )
    a, b = coefficients(config.loss, train_store.num_codebooks)
    return Prepared(
        config=config,
        run_dir=run_dir,
        device=device,
        precision=precision,
        store=train_store,
        packer=packer,
        validator=validator,
        total_steps=total_steps,
        model=model,
        compiled=compiled,
        loss_function=amortized_loss(a, b),
        uniform_loss=(a + b) * math.log(vocabulary(model)[1]),
        record=record,
        resumed=resumed,
        state=dataclasses.replace(state, data=position_identity(config, train_store)),
    )


def _choose_device(config: TrainConfig) -> tuple[torch.device, str]:
    """The device and the precision of products on it; also sets PyTorch's threads."""
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    device = resolve_device(config.run.device)
    precision = resolve_precision(config.model.precision, device)
    check_precision(precision, config.optimizer)
    return device, precision


def _open_stores(config: TrainConfig, given: Stores | None) -> tuple[TokenSource, TokenSource | None]:
    if given is not None:
        return given if isinstance(given, tuple) else (given, None)
    path = Path(config.data.data).expanduser() / "val"
    train = open_split(config.data.data, "train")
    has_val = path.exists() or old_directory(path).exists()
    return train, open_split(config.data.data, "val") if has_val else None


def _find_run(config: TrainConfig, run_dir: Path, store: TokenSource) -> tuple[Path | None, RunState]:
    """Make the output folder. Returns the checkpoint in it to continue from, and where the run stands."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, run_dir, "the run directory could not be made") from None
    found = list_checkpoints(run_dir)
    if found and not config.run.resume:
        raise InputError(
            f"holds a run already ({found[-1].name})",
            file=run_dir,
            mend="choose another --output-dir, or leave out --no-resume to continue it",
        )
    check_damage(run_dir, found)
    if not found:
        return None, RunState()
    resumed = found[-1]
    state = RunState.from_saved(read_if_complete(resumed) or {})
    check_position(state.data, position_identity(config, store), resumed)
    return resumed, state


def choose_checkpointing(
    config: TrainConfig, shape: CSMConfig, store: TokenSource, device: torch.device, precision: str
) -> str:
    """The activation checkpointing with which a run fits into the device's memory: the config's, or under
    ``--memory auto`` the least that will do.

    Raises:
        InputError: it does not fit; the line says by how much, and the smallest change that mends it.
    """
    if config.run.memory == "off":
        return config.model.activation_checkpointing
    data, sizes = config.data, np.sort(np.minimum(store.conversation_rows, config.data.pack_rows))
    step = data.batch_rows or int(sizes[-data.batch_size * data.gradient_accumulation :].sum())
    load: dict[str, Any] = {
        "rows": min(data.pack_rows, step),
        "packs": math.ceil(step / data.pack_rows),
        # The row that ends each turn is supervised, too.
        "audio_share": (store.num_frames + store.num_turns) / max(1, int(store.conversation_rows.sum())),
        "precision": precision,
    }
    if config.run.memory == "auto":
        return fit.choose_checkpointing(config, shape, device, **load)
    fit.check_memory(config, shape, device, **load)
    return config.model.activation_checkpointing


def _lay_out_packs(
    config: TrainConfig, store: TokenSource, val_store: TokenSource | None, device: torch.device, limit: int
) -> tuple[Packer, Validator | None, int]:
    """The packs of a model that sees ``limit`` positions, the validator, and how many steps the run has."""
    run, kind = config.run, OneStepPacker if config.run.overfit_one_batch else Packer
    packer = kind(store, config.data, config.loss, pad=device.type, limit=limit)
    total = 0
    for epoch in range(run.n_epochs):
        total += packer.steps_in_epoch(epoch)
        if run.max_steps is not None and total >= run.max_steps:
            total = run.max_steps
            break
    if val_store is None:
        return packer, None, total
    return packer, Validator(val_store, config.data, config.loss, run.val_fraction_frames, limit), total


def base_dtypes(config: TrainConfig, dtype: torch.dtype) -> Callable[[str], torch.dtype]:
    """By parameter, how a run holds what it starts from. A full run: all in float32, or all in bf16. Under adapters:
    what is trained besides and norm scales in float32, the rest in the compute dtype."""
    adapter = config.adapter
    wide = torch.float32 if config.optimizer.weights == "fp32" else torch.bfloat16

    def held(name: str) -> torch.dtype:
        trained = (adapter.train_heads and name in ("codebook0_head.weight", "audio_head")) or (
            adapter.train_embeddings == "all" and name.endswith("embeddings.weight")
        )
        return wide if adapter.method == "full" or trained or name.endswith(".scale") else dtype

    return held


def _load_model(config: TrainConfig, given: CSM | None, resumed: Path | None, dtype: torch.dtype) -> CSM:
    """The model that the run starts from. Adapters are continued on the base that they were begun on."""
    if resumed and config.adapter.method == "full":
        return load_model(str(resumed), dtype=base_dtypes(config, dtype))
    return given if given is not None else load_starting_model(config, dtype)


def load_starting_model(config: TrainConfig, dtype: torch.dtype = torch.float32) -> CSM:
    """The model that ``config.model`` asks for; ``dtype`` is the run's compute dtype."""
    name, held = config.model.model, base_dtypes(config, dtype)
    if not config.model.from_scratch:
        if name in NAMED_SHAPES and not Path(name).exists():
            raise InputError(
                f"--model {name} is a shape, not a trained model", mend="add --from-scratch to start at random"
            )
        return load_model(name, dtype=held)
    return CSM(scratch_shape(name)).init_weights(config.data.seed)


def _prepare_model(
    config: TrainConfig,
    model: CSM,
    store: TokenSource,
    resumed: Path | None,
    device: torch.device,
    dtype: torch.dtype,
) -> bool:
    """Attach adapters or cast the weights, freeze, move to the device, compile. Whether layers are compiled."""
    if config.adapter.method != "full":
        attach_adapters(model, config, dtype, store, resumed, device)
    else:
        cast_weights(model, config.optimizer)
    for part in config.model.freeze:
        getattr(model, part).requires_grad_(False)
    model.activation_checkpointing = config.model.activation_checkpointing
    model.to(device).train()
    return compile_layers(model, config.model.compile)


def attach_adapters(
    model: CSM,
    config: TrainConfig,
    dtype: torch.dtype,
    store: TokenSource,
    resumed: Path | None,
    device: torch.device | None = None,
) -> None:
    """Put the adapters of ``config.adapter`` on a base, and what an earlier checkpoint of them holds into them.
    ``device``: where the run will be, for ``adapters.attach``."""
    if config.optimizer.weights != "fp32":
        raise InputError(
            f"--weights {config.optimizer.weights} belongs to --method full; adapters are trained in float32",
            mend="leave one of them out",
        )
    base = f"{config.model.model}, random, seed {config.data.seed}" if config.model.from_scratch else config.model.model
    adapters.attach(model, config.adapter, compute_dtype=dtype, base=base, seed=config.data.seed, device=device)
    if config.adapter.train_embeddings == "rows":
        EmbeddingRows(model, *rows_in([store], model))
    if resumed:
        adapter_files.load_into(model, resumed)
