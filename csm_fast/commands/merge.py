"""``csm-fast merge``: an adapter and its base become one model, checked by the adapter's probe.

An adapter is merged in float32 onto the full-precision base, also if it was trained over a 4-bit one. Such an adapter
compensates for a quantisation error that the merged model no longer has, so the loss changes: in 20 runs at small
shapes by 0.15 to 2 times of what quantisation changes for the plain base. The change is logged. Merging fails above
``ALLOWED_4BIT`` times of it, or above ``FLOOR_4BIT`` of the loss if quantisation changes almost nothing.

A saved adapter carries a probe: a few hundred rows of real data, and the loss that the model gave on them.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from csm_fast.config.commands import MergeConfig
from csm_fast.evaluate.probe import Probe, read_probe
from csm_fast.model.csm import CSM
from csm_fast.system.errors import InputError
from csm_fast.train.checkpoint import STATE
from csm_fast.weights.adapter_files import adapter_size
from csm_fast.weights.adapter_formats import SavedAdapter
from csm_fast.weights.files import ADAPTER_CONFIG
from csm_fast.weights.load import load_base
from csm_fast.weights.merge import add_adapters, replace_whole
from csm_fast.weights.save import read_record, save_model, write_record

log = logging.getLogger("csm_fast")

ALLOWED_4BIT, FLOOR_4BIT = 3.0, 0.03


def run(config: MergeConfig) -> None:
    """``csm-fast merge``: write base + adapter as one model under Sesame's names, checked on the adapter's probe.

    Raises:
        InputError: no such adapter or base, they do not belong together, the merged model's loss has drifted, or it
            would be written over an adapter.
    """
    check_out(Path(config.out).expanduser())
    model, saved = load_base(config.adapter, config.base)
    if (base := Path(str(saved.base)).expanduser()).exists() and base.resolve() == Path(
        config.out
    ).expanduser().resolve():
        raise InputError(
            "is the base that the adapter was trained on, and that would be gone",
            file=config.out,
            mend="give --out a directory of its own",
        )
    log.info("Base      %s", saved.base)
    log.info("Adapter   %s", describe_adapter(saved))
    probe = read_probe(config.adapter)
    if probe is None:
        log.info("Check     none: the adapter carries no probe")
    else:
        log.info("Probe     %d rows, loss %.6f when it was saved (%s)", probe.pack.rows, probe.loss, probe.name)
    merge_and_check(model, saved, probe, "cpu")
    save_model(model, config.out, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[config.dtype])
    if record := read_record(config.adapter):
        write_record(Path(config.out), record)
    log.info("Model     %s (%s)", config.out, config.dtype)


def check_out(out: Path) -> None:
    """Refuse a directory that holds something else than an earlier model."""
    kinds = {
        "an adapter": [out / ADAPTER_CONFIG],
        "a checkpoint, and a run could not continue from it with another model in it": [out / STATE],
        "a token store": [out / "manifest.json", *out.glob("*/manifest.json")],
        "a run": [*out.glob("step-*")],
    }
    for kind, files in kinds.items():
        if any(file.exists() for file in files):
            raise InputError(f"holds {kind}", file=out, mend="give --out a directory of its own")


def merge_and_check(model: CSM, saved: SavedAdapter, probe: Probe | None, device: torch.device | str) -> None:
    if probe is None:
        replace_whole(model, saved)
        add_adapters(model, saved)
        return
    base = probe.loss_of(model, device)
    log.info("Base      loss %.6f", base)
    replace_whole(model, saved)
    allowed = probe.allowed(base)
    if probe.silenced is not None:
        plain = probe.loss_of(model, device)
        shift = abs(probe.silenced - plain)
        log.info("4 bits    loss %.6f without adapters, %.6f in full precision", probe.silenced, plain)
        allowed = max(FLOOR_4BIT, ALLOWED_4BIT * shift / max(abs(probe.loss), 1e-12))
    add_adapters(model, saved)
    check_loss(probe, "merged", probe.loss_of(model, device), allowed)


def check_loss(probe: Probe, what: str, loss: float, allowed: float) -> None:
    drift = probe.drift(loss)
    log.info("%-9s loss %.6f, relative drift %.1e (%.1e allowed)", what.capitalize(), loss, drift, allowed)
    if not drift <= allowed:
        raise InputError(
            f"the {what} model's loss is {loss:.6f}, {probe.loss:.6f} when the adapter was saved: a drift of "
            f"{drift:.1e}, {allowed:.1e} is allowed",
            mend="check that the base is the one it was trained on and that no file is damaged",
        )


def describe_adapter(saved: SavedAdapter) -> str:
    """An adapter in a line."""
    section, size = saved.section, sum(adapter_size(saved.where).values())
    besides = ", ".join(sorted({name.removesuffix(".rows") for name in saved.whole if not name.endswith(".index")}))
    return (
        f"{saved.where}: {section.method}, rank {section.lora_rank}, scale {saved.scale:g}, on {len(saved.modules)} "
        f"layers{', besides ' + besides if besides else ''}; {size / 1e6:,.1f} MB"
    )
