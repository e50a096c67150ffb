"""The loop on a micro model: it learns, it is exact, and it says what happened."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from train_cases import MODEL_YAML, K, config, make_store, make_trainer, turn, write_store

from csm_fast import InputError
from csm_fast.data.token_store import open_split
from csm_fast.packing.loader import Packer
from csm_fast.report.metrics import METRICS, read_metrics
from csm_fast.train.loop import train


def weights(folder, name="run/last"):
    return load_file(folder / name / "model.safetensors")


@pytest.mark.slow
def test_a_run_learns_and_leaves_everything_it_names(tmp_path):
    summary = train(config(tmp_path, n_epochs=6))
    assert summary["complete"] and summary["steps"] == summary["total_steps"] == 36
    assert summary["val_loss_last"] < summary["val_loss_first"] - 0.5
    assert summary["val_loss_first"] == pytest.approx(summary["uniform_loss"], abs=0.1)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert all(set(METRICS) <= set(row) for row in rows)
    assert [r["step"] for r in rows] == [0, *range(2, 37, 2)]
    assert rows[0]["val_loss"] == summary["val_loss_first"] and rows[0]["train_loss"] is None
    assert rows[-1]["epoch"] == 6.0 and rows[-1]["lr"] < rows[8]["lr"] <= 1e-2
    for row in rows[1:]:
        assert 0 <= row["padding"] < 1 and row["rows_per_s"] > 0 and row["memory_gib"] > 0
        a = 0.5 * row["c0_loss"] + 0.5 * row["decoder_loss"]
        assert row["train_loss"] == pytest.approx(a, rel=1e-5)
    best = min((r["val_loss"], r["step"]) for r in rows if r["val_loss"] is not None and r["step"])
    assert (summary["val_loss_best"], summary["best_step"]) == best
    run = tmp_path / "run"
    assert (run / "best").resolve().name == f"step-{best[1]:06d}"
    assert (run / "last").resolve().name == "step-000036"
    assert (run / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert json.loads((run / "summary.json").read_text())["best"] == str(run / "best")
    assert len(list(run.glob("step-*"))) <= 3  # keep 2, and the best
    saved = json.loads((run / "best" / "config.json").read_text())
    assert saved["audio_num_codebooks"] == K and saved["csm_fast_data"]["codec"]["name"] == "test codec"


@pytest.mark.slow
def test_the_same_run_twice_is_bit_identical_and_how_often_it_reports_does_not_matter(tmp_path):
    for name, extra in (("a", {}), ("b", {"log_every": 5, "val_every": 0, "save_every": 0})):
        train(config(tmp_path, output_dir=str(tmp_path / name), **extra))
    a, b = weights(tmp_path, "a/last"), weights(tmp_path, "b/last")
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
def test_packs_change_speed_not_what_is_learned(tmp_path):
    for name, rows in (("one", 4096), ("many", 40)):
        train(config(tmp_path, output_dir=str(tmp_path / name), pack_rows=rows, n_epochs=1))
    one, many = (read_metrics(tmp_path / n / "metrics.jsonl") for n in ("one", "many"))
    for a, b in zip(one, many, strict=True):
        for key in ("train_loss", "val_loss", "grad_norm"):
            assert (a[key] is None) == (b[key] is None)
            assert a[key] is None or a[key] == pytest.approx(b[key], rel=1e-3)


@pytest.mark.slow
def test_a_run_continues_where_it_stopped(tmp_path):
    train(config(tmp_path, output_dir=str(tmp_path / "whole")))
    settings = config(tmp_path)
    trainer = make_trainer(settings)
    step = trainer._step

    def stop_at_seven(batch):
        result = step(batch)
        trainer.signals.received = "SIGINT" if trainer.state.step == 7 else None
        return result

    trainer._step = stop_at_seven
    assert not trainer.run()["complete"]
    assert (tmp_path / "run" / "last").resolve().name == "step-000007"
    summary = train(settings)
    assert summary["complete"] and summary["steps"] == 12
    a, b = weights(tmp_path, "whole/last"), weights(tmp_path)
    assert all(torch.equal(a[k], b[k]) for k in a)
    a, b = (load_file(tmp_path / n / "last" / "optimizer.safetensors") for n in ("whole", "run"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    told = (tmp_path / "run/config.yaml").read_text()
    assert train(settings)["steps"] == 12  # a finished run is only summarised
    settings.run.max_steps = 5
    assert train(settings)["steps"] == 12 and (tmp_path / "run/config.yaml").read_text() == told


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_size": 8}, "made with batch_size 4, now it is 8"),
        ({"seed": 1}, "made with seed 0, now it is 1"),
        ({"freeze": ["decoder"]}, "was trained then and is frozen now"),
        ({"resume": False}, "holds a run already"),
        ({"decoder_loss_weight": 0.25}, "made with loss 0.5 CE0 . 0.5 CEd, now it is 0.75 CE0 . 0.25 CEd"),
        ({"loss": "transformers"}, "made with loss 0.5 CE0 . 0.5 CEd, now it is 1 CE0 . 1 CEd"),
        ({"eos_weight": 2.0}, "made with eos_weight 1.0, now it is 2.0"),
    ],
)
def test_a_run_is_not_continued_as_another(tmp_path, change, words):
    train(config(tmp_path, max_steps=2))
    with pytest.raises(InputError, match=words):
        train(config(tmp_path, **change))


def test_a_run_is_not_continued_on_other_data(tmp_path):
    train(config(tmp_path, max_steps=2))
    make_store(tmp_path / "other", seed=5)
    with pytest.raises(InputError, match="the token store"):
        train(config(tmp_path, data=str(tmp_path / "other")))


def test_frozen_parts_stay_and_have_no_optimizer_state(tmp_path):
    settings = config(tmp_path, freeze=["backbone", "text_embeddings", "audio_head"], max_steps=3)
    trainer = make_trainer(settings)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.run()
    after = weights(tmp_path)
    frozen = ("backbone.", "text_embeddings.", "audio_head")
    for name, value in before.items():
        assert torch.equal(value, after[name]) == name.startswith(frozen), name
    state = load_file(tmp_path / "run" / "last" / "optimizer.safetensors")
    assert not any(key.split("/", 1)[1].startswith(frozen) for key in state)


def test_a_non_finite_step_is_skipped_reported_and_not_saved(tmp_path, capsys):
    settings = config(tmp_path, log_every=3, save_every=3, val_every=0, max_steps=9)
    trainer = make_trainer(settings)
    plain = trainer.runner.loss_function
    seen = []

    def loss(model, pack):
        value, parts = plain(model, pack)
        bad = trainer.state.step == 4
        seen.append({k: v.clone() for k, v in model.state_dict().items()} if trainer.state.step in (4, 5) else None)
        return (value * torch.inf if bad else value), parts

    trainer.runner.loss_function = loss
    summary = trainer.run()
    assert summary["complete"]
    before, after = [s for s in seen if s][0], [s for s in seen if s][-1]
    assert all(torch.equal(before[k], after[k]) for k in before), "the update of step 5 was applied"
    text = capsys.readouterr().err
    assert "step 5: the loss or a gradient was not finite; the update was skipped" in text
    assert "Data: turn" in text and "Last good checkpoint: step-000003" in text
    assert "nothing was saved at this step" not in text  # reported at step 6's log line already
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert all(r["train_loss"] is None or r["train_loss"] < 10 for r in rows)
    assert all(torch.isfinite(v).all() for v in weights(tmp_path).values())


def test_nothing_is_saved_while_the_flag_is_up(tmp_path, capsys):
    trainer = make_trainer(config(tmp_path, log_every=100, save_every=3, val_every=0, max_steps=6))
    plain = trainer.runner.loss_function
    trainer.runner.loss_function = lambda model, pack: (
        plain(model, pack)[0] * (torch.nan if trainer.state.step == 1 else 1.0),
        plain(model, pack)[1],
    )
    trainer.run()
    assert "warning: nothing was saved at this step" in capsys.readouterr().err
    assert not (tmp_path / "run" / "step-000003").exists()
    assert (tmp_path / "run" / "last").resolve().name == "step-000006"


def test_a_run_that_only_skips_stops_and_names_the_way_out(tmp_path):
    trainer = make_trainer(config(tmp_path, log_every=10, val_every=0, save_every=0, n_epochs=9))
    plain = trainer.runner.loss_function
    trainer.runner.loss_function = lambda model, pack: (plain(model, pack)[0] * torch.nan, plain(model, pack)[1])
    with pytest.raises(InputError, match="the last 10 updates were all skipped.*lower --learning-rate"):
        trainer.run()


@pytest.mark.slow
def test_overfit_one_batch_goes_to_nearly_nothing(tmp_path):
    settings = config(
        tmp_path, overfit_one_batch=True, batch_size=2, max_steps=150, n_epochs=60, amortization_fraction=1.0,
        val_every=0, save_every=0, log_every=50, lr_decay="constant",
    )  # fmt: skip
    train(settings)
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["train_loss"] < 0.1


def test_every_part_gets_a_gradient_and_a_silent_one_is_named(tmp_path, caplog):
    trainer = make_trainer(config(tmp_path, max_steps=1))
    extra = torch.nn.Parameter(torch.zeros(3))
    trainer.model.register_parameter("bystander", extra)
    trainer.runner.optimizer.param_groups[1]["params"].append(extra)
    trainer.runner.optimizer.param_groups[1]["names"].append("bystander")
    trainer.runner.parameters.append(extra)
    with caplog.at_level("WARNING", logger="csm_fast"):
        trainer._step(trainer.packer.step(0, 0))
    assert [r.getMessage() for r in caplog.records if "no gradient" in r.getMessage()] == [
        "warning: bystander is trainable but got no gradient in the first step"
    ]


def test_a_short_context_cuts_both_splits(tmp_path):
    """Turns have up to 17 rows; two to a conversation are mostly more than a context of 18 holds."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        write_store(tmp_path / "tokens" / split, [[turn(rng, 2 * i), turn(rng, 2 * i + 1)] for i in range(8)])
    (tmp_path / "model.yaml").write_text(MODEL_YAML.replace("embed_dim: 48", "embed_dim: 48, max_seq_len: 18"))
    trainer = make_trainer(config(tmp_path, max_steps=2))
    for packer in (trainer.packer, trainer.prepared.validator.packer):
        layout = packer.layout_conversations(range(packer.store.num_conversations))
        documents = [d for pack in layout.list_documents() for d in pack]
        assert len(documents) > packer.store.num_conversations and max(d.rows for d in documents) <= 18
    assert trainer.run()["complete"]


def test_masked_speakers_are_context_only(tmp_path):
    settings = config(tmp_path, mask_speaker_ids=[1])
    packer = Packer(open_split(settings.data.data, "train"), settings.data, settings.loss)
    everything = Packer(open_split(settings.data.data, "train"), config(tmp_path).data, settings.loss)
    some, whole = packer.step(0, 0), everything.step(0, 0)
    assert 0 < some.supervised < whole.supervised and some.rows == whole.rows
    assert train(settings)["complete"]


def test_only_the_last_turn_is_learned(tmp_path):
    settings = config(tmp_path, supervise="last", batch_size=100)
    store = open_split(settings.data.data, "train")
    step = Packer(store, settings.data, settings.loss).step(0, 0)
    last = [store.conversation(i)[-1] for i in range(store.num_conversations)]
    assert step.supervised == sum(len(t.codes) + 1 for t in last) < step.frames + store.num_turns
    assert train(settings)["complete"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra",
    [
        {"activation_checkpointing": "full"},
        {"activation_checkpointing": "selective"},
        {"precision": "bf16"},
        {"batch_rows": 128},
    ],
)
def test_other_ways_to_run(tmp_path, extra):
    summary = train(config(tmp_path, **extra))
    assert summary["val_loss_last"] < summary["val_loss_first"]


def test_without_a_validation_split_best_is_the_last(tmp_path):
    make_store(tmp_path / "tokens", val=0)
    summary = train(config(tmp_path, max_steps=4))
    assert summary["val_loss_last"] is None
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert rows[0]["step"] == 1 and rows[0]["train_loss"] == pytest.approx(summary["uniform_loss"], abs=0.1)
    assert (tmp_path / "run" / "best").resolve() == (tmp_path / "run" / "last").resolve()


def test_sesames_loader_takes_a_checkpoint(tmp_path):
    """``Model.from_pretrained(run/best)``: Sesame's class is a hub mixin whose config is a dataclass of five fields.
    benchmarks/parity.py does this with Sesame's own code."""
    from dataclasses import dataclass

    from huggingface_hub import PyTorchModelHubMixin

    from csm_fast import CSM, CSMConfig
    from csm_fast.config.parse import read_mapping

    settings = config(tmp_path, max_steps=2)
    train(settings)
    shape = CSMConfig.from_dict(read_mapping(settings.model.model))

    @dataclass
    class ModelArgs:
        backbone_flavor: str
        decoder_flavor: str
        text_vocab_size: int
        audio_vocab_size: int
        audio_num_codebooks: int

    class Model(CSM, PyTorchModelHubMixin):
        def __init__(self, config: ModelArgs):
            assert (config.audio_num_codebooks, config.text_vocab_size) == (K, 50)
            super().__init__(shape)

    loaded = Model.from_pretrained(str(tmp_path / "run" / "best"), strict=True)
    saved = weights(tmp_path, "run/best")
    assert all(torch.equal(value, saved[name]) for name, value in loaded.state_dict().items())
