"""The loader: planning an epoch, and reading and laying out an optimizer step from a token store on disk."""

from __future__ import annotations

import pytest

from benchmarks.common.stores import open_writer
from benchmarks.compare.data import draw_recordings
from csm_fast import CSMConfig
from csm_fast.config.train import DataSection, LossSection
from csm_fast.data.token_store import TokenStore
from csm_fast.packing.loader import Packer

RECORDINGS = 2000


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> TokenStore:
    """Random recordings, some three hours of them."""
    path, config = tmp_path_factory.mktemp("tokens") / "train", CSMConfig.small()
    with open_writer(path, config) as writer:
        for turns in draw_recordings(RECORDINGS, config).turns:
            writer.add_conversation(turns)
    return TokenStore.open(path)


@pytest.mark.parametrize("rows", (2048, 16384))
def test_step_of_the_loader(timed, device, store, rows):
    """The first optimizer step of ``rows`` rows, as the loader's thread prepares it."""
    packer = Packer(store, DataSection(batch_rows=rows, pack_rows=rows), LossSection(), pad=device.type)
    packer.steps_in_epoch(0)  # plans the epoch
    timed(lambda: packer.step(0, 0))


def test_plan_of_an_epoch(timed, store):
    """Which conversations share a pack, of all that there are."""
    timed(lambda: Packer(store, DataSection(batch_rows=2048), LossSection()).steps_in_epoch(0))
