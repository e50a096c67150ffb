"""Where a run starts: the model, the data, and whether they belong together."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from csm_fast.config.shape import NAMED_SHAPES, CSMConfig
from csm_fast.config.train import TrainConfig
from csm_fast.data.token_store import TokenStore, open_split
from csm_fast.model.csm import CSM
from csm_fast.planner import fit as memory
from csm_fast.system.errors import InputError
from csm_fast.system.files import old_directory
from csm_fast.weights.load import load_model
from csm_fast.weights.shape import scratch_shape


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


def starting_model(config: TrainConfig, dtype: torch.dtype = torch.float32) -> CSM:
    """The model that ``config.model`` asks for; ``dtype`` is the run's compute dtype."""
    name, held = config.model.model, base_dtypes(config, dtype)
    if not config.model.from_scratch:
        if name in NAMED_SHAPES and not Path(name).exists():
            raise InputError(
                f"--model {name} is a shape, not a trained model", mend="add --from-scratch to start at random"
            )
        return load_model(name, dtype=held)
    return CSM(scratch_shape(name)).init_weights(config.data.seed)


def plan_memory(config: TrainConfig, shape: CSMConfig, store: TokenStore, device: torch.device, precision: str) -> None:
    """Refuse a run that cannot fit into the device's memory, or choose the checkpointing with which it does.

    Raises:
        InputError: it does not fit; the line says by how much, and the smallest change that mends it.
    """
    if config.run.memory == "off":
        return
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
        config.model.activation_checkpointing = memory.choose_checkpointing(config, shape, device, **load)  # type: ignore[assignment]
    else:
        memory.check(config, shape, device, **load)


def attach_adapters(
    model: CSM,
    config: TrainConfig,
    dtype: torch.dtype,
    store: TokenStore,
    resumed: Path | None,
    device: torch.device | None = None,
) -> None:
    """Put the adapters of ``config.adapter`` on a base, and what an earlier checkpoint of them holds into them.
    ``device``: where the run will be, for ``adapters.attach``."""
    from csm_fast.model import adapters
    from csm_fast.model.embedding_rows import EmbeddingRows, rows_in
    from csm_fast.weights import adapter_files

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


def open_optional_split(data: str, split: str) -> TokenStore | None:
    path = Path(data).expanduser() / split
    return open_split(data, split) if path.exists() or old_directory(path).exists() else None
