"""``prepare``: the config it is given stays as it is, and objects do in place of paths."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from model_cases import MemoryStore
from train_cases import CODEC, TOKENIZER, config, conversations_of, make_trainer

from csm_fast import InputError
from csm_fast.data.token_store import hash_tokens, open_split
from csm_fast.model.csm import CSM
from csm_fast.model.embedding_rows import rows_in
from csm_fast.train.loop import train
from csm_fast.train.setup import prepare


class RunStore(MemoryStore):
    """Conversations in memory with what a run reads of a ``TokenStore``: no path, no hash, no shards."""

    codec, text_tokenizer, codebook_size = CODEC, TOKENIZER, CODEC["codebook_size"]

    def __init__(self, conversations):
        super().__init__(conversations, CODEC["num_codebooks"])
        turns = [turn for conversation in conversations for turn in conversation]
        self.num_turns, self.num_frames = len(turns), sum(len(turn.codes) for turn in turns)
        self.conversation_rows = np.array([sum(len(t.text) + len(t.codes) + 1 for t in c) for c in conversations])


def losses(folder):
    return [line.split('"rows_per_s"')[0] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_config_stays_as_it_was(tmp_path):
    settings = config(tmp_path, learning_rate=None, memory="auto", memory_limit="1GB")
    before = dataclasses.asdict(settings)
    prepared = prepare(settings)
    assert dataclasses.asdict(settings) == before
    assert prepared.config.optimizer.learning_rate is not None and settings.optimizer.learning_rate is None


@pytest.mark.slow
def test_two_trainers_of_one_config_are_alike(tmp_path):
    settings = config(tmp_path, max_steps=3, val_every=0)
    results = []
    for name in ("one", "two"):
        settings.run.output_dir = str(tmp_path / name)
        trainer = make_trainer(settings)
        trainer.run()
        results.append({k: v.clone() for k, v in trainer.model.state_dict().items()})
    assert all(torch.equal(results[0][name], value) for name, value in results[1].items())


@pytest.mark.slow
def test_a_store_in_memory(tmp_path):
    settings = config(tmp_path, max_steps=3, val_every=0, save_every=0)
    train(settings, store=open_split(str(tmp_path / "tokens"), "train"))
    settings.run.output_dir, settings.data.data = str(tmp_path / "memory"), "nowhere"
    store = RunStore(conversations_of(24, 0))  # what train_cases.make_store writes
    assert train(settings, store=store)["val_loss_last"] is None
    assert losses(tmp_path / "memory") == losses(tmp_path / "run")
    settings.run.output_dir = str(tmp_path / "both")
    assert train(settings, store=(store, store))["val_loss_last"] is not None


def test_a_run_on_a_store_in_memory_continues_on_the_same_tokens_only(tmp_path):
    settings = config(tmp_path, max_steps=2, val_every=0)
    train(settings, store=RunStore(conversations_of(24, 0)))
    settings.run.max_steps = 3
    with pytest.raises(InputError, match="the token store"):
        train(settings, store=RunStore(conversations_of(24, 1)))
    assert train(settings, store=RunStore(conversations_of(24, 0)))["steps"] == 3


def test_rows_of_embeddings_are_those_of_a_store_in_memory_too(tmp_path):
    model = prepare(config(tmp_path)).model
    stores = open_split(str(tmp_path / "tokens"), "train"), RunStore(conversations_of(24, 0))
    assert hash_tokens(stores[1]) != hash_tokens(RunStore(conversations_of(24, 1)))
    for on_disk, in_memory in zip(*(rows_in([store], model) for store in stores), strict=True):
        assert torch.equal(on_disk, in_memory)


def test_the_model_that_was_given_is_the_runs(tmp_path):
    settings = config(tmp_path, max_steps=1)
    model = CSM(prepare(settings).model.config).init_weights(3)
    assert prepare(settings, model=model).model is model
