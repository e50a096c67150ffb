"""Gradients of the embedding tables that are kept from step to step: the same numbers as autograd's own."""

import os
import platform
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from csm_kernels.frame_embed import RowGradient, frame_embed_with_codes
from model_cases import MICRO, MemoryStore, random_conversations, random_model

from csm_fast import ops
from csm_fast.config.train import DataSection, LossSection
from csm_fast.model.loss import packed_loss
from csm_fast.packing.loader import Packer
from csm_fast.train.optim.build import gradient_norm
from csm_fast.train.optim.table_gradients import TableGradients

TABLES = ("text_embeddings.weight", "audio_embeddings.weight")


def steps(fraction=0.5):
    """Three optimizer steps of several packs each."""
    spec = [[(4, 9, 0)], [(3, 5, 1), (2, 7, 0)], [(6, 12, 0)], [(1, 3, 1)], [(5, 20, 0)], [(2, 2, 1)]]
    store = MemoryStore(random_conversations(spec))
    packer = Packer(store, DataSection(batch_size=2, pack_rows=30), LossSection(amortization_fraction=fraction))
    return [packer.step(0, i).packs for i in range(3)]


def learn(model, kept: bool, fraction=0.5, extra=None):
    """Gradients of each step's tables, and the weights after it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    tables = TableGradients(model) if kept else None
    seen = []
    for packs in steps(fraction):
        with tables or torch.enable_grad():
            for pack in packs:
                loss, _ = packed_loss(model, pack, 0.5, 0.5)
                (loss + extra(model) if extra else loss).backward()
        named = dict(model.named_parameters())
        seen.append([None if named[n].grad is None else named[n].grad.clone() for n in TABLES])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        if tables:
            tables.clear(whole=False)
    return seen, {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("fraction", [0.5, 1.0], ids=["codes one by one", "the table projected"])
def test_a_run_with_kept_gradients_is_a_run_without(fraction):
    (seen, weights), (want, want_weights) = (
        learn(random_model(MICRO, dtype=torch.float64), kept, fraction) for kept in (True, False)
    )
    for step, other in zip(seen, want, strict=True):
        for got, expected in zip(step, other, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-15)
    for name in weights:
        torch.testing.assert_close(weights[name], want_weights[name], rtol=1e-10, atol=1e-13)


def test_a_table_used_otherwise_too():
    def norm(model):
        return 0.01 * sum(w.square().sum() for w in (model.text_embeddings.weight, model.audio_embeddings.weight))

    runs = (learn(random_model(MICRO, dtype=torch.float64), kept, extra=norm) for kept in (True, False))
    (seen, _), (want, _) = runs
    for step, other in zip(seen, want, strict=True):
        for got, expected in zip(step, other, strict=True):
            # The norm's part is added in another order: weights of order 1 round in another last place or two.
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def test_whatever_else_writes_to_a_kept_gradient_is_in_its_norm():
    model = random_model(MICRO)
    table = model.text_embeddings.weight
    tables = TableGradients(model)
    for _ in range(2):  # one step in two parts
        with tables:
            for pack in steps()[0]:
                packed_loss(model, pack, 0.5, 0.5)[0].backward()
    assert len(tables.touched()[table]) == int(table.grad.any(1).sum())
    once = table.grad.clone() / 2
    tables.clear(whole=False)
    with tables:
        for pack in steps()[0]:
            packed_loss(model, pack, 0.5, 0.5)[0].backward()
    torch.testing.assert_close(table.grad, once)
    (3 * table.sum()).backward()  # afterwards
    assert tables.touched() == {}
    torch.testing.assert_close(gradient_norm([table], tables), (once + 3).norm())
    tables.clear(whole=False)
    assert not tables.rows[0].dense.any()


def test_each_pass_adds_whatever_was_there():
    tokens, is_audio = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([False, False])
    table, audio = torch.randn(50, 8, requires_grad=True), torch.randn(20, 8)
    rows = RowGradient(table)

    def one_pass():
        out, _ = frame_embed_with_codes(tokens, is_audio, tokens[:0, 0], table, audio, impl="torch", into=(rows, None))
        out.sum().backward()

    touched = torch.zeros(50, 8)
    touched[[3, 6]] = 1
    for _ in range(2):
        one_pass()
        one_pass()
        assert torch.equal(rows.dense, 2 * touched)
        rows.clear()
    rows.add(torch.ones(50, 8))
    one_pass()
    assert torch.equal(rows.dense, 1 + touched)


@pytest.mark.parametrize("frozen", TABLES)
def test_a_frozen_table_has_no_gradient(frozen):
    model = random_model(MICRO)
    model.get_parameter(frozen).requires_grad_(False)
    seen, _ = learn(model, kept=True)
    assert all((step[i] is None) == (name == frozen) for step in seen for i, name in enumerate(TABLES))


def test_outside_of_the_with_the_model_is_as_it_was():
    model = random_model(MICRO)
    tables = TableGradients(model)
    with tables:
        assert model.row_gradients == tables.rows
    assert not hasattr(model, "row_gradients")
    tables.clear(whole=False)
    model.zero_grad()
    packed_loss(model, steps()[0][0], 0.5, 0.5)[0].backward()
    assert model.text_embeddings.weight.grad is not tables.rows[0].dense
    assert model.text_embeddings.weight.grad.any() and not tables.rows[0].dense.any()


def test_clearing_touched_rows_is_not_enough_after_nan():
    table = torch.randn(50, 8, requires_grad=True)
    rows = RowGradient(table)
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    is_audio = torch.tensor([False, False])
    audio = torch.randn(20, 8)
    out, _ = frame_embed_with_codes(tokens, is_audio, tokens[:0, 0], table, audio, impl="torch", into=(rows, None))
    out.sum().backward()
    assert table.grad is None and rows.dense.nonzero()[:, 0].unique().tolist() == [3, 6]
    rows.dense.mul_(float("nan"))
    rows.clear()
    assert rows.dense.isnan().any()
    rows.clear(whole=True)
    assert not rows.dense.any()


def test_a_row_gradient_is_for_the_cpu_form():
    table, audio = torch.randn(50, 8, requires_grad=True), torch.randn(20, 8)
    tokens, is_audio = torch.tensor([[1, 2, 3]]), torch.tensor([False])
    with pytest.raises(ValueError, match="RowGradient is for impl='torch' on a CPU"):
        frame_embed_with_codes(
            tokens, is_audio, tokens[:0, 0], table, audio, impl="triton", into=(RowGradient(table), None)
        )
    # The model's own call leaves it aside where the kernels were asked for.
    with ops.using("torch"):
        x, _ = ops.frame_embed_with_codes(tokens, is_audio, tokens[:0, 0], table, audio, into=(None, None))
    assert torch.equal(x, F.embedding(tokens[:, -1], table))


def test_keeping_freed_memory_is_told():
    """In a process of its own: it is for the whole process."""
    code = "import sys; from csm_fast.machine import keep_freed_memory as f; print(f() == (sys.platform == 'linux'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    # Other C libraries than glibc know no such setting.
    assert done.stdout.strip() == "True" or "glibc" not in platform.libc_ver()[0]


def environment():
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
