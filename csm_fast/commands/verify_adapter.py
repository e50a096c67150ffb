"""``csm-fast verify-adapter``: does a saved adapter still give the loss it was saved with?"""

from __future__ import annotations

import logging

from csm_fast.commands.merge import check_loss, describe_adapter, merge_and_check
from csm_fast.config.commands import VerifyAdapterConfig
from csm_fast.evaluate.probe import PROBE, read_probe
from csm_fast.system.device import resolve_device
from csm_fast.system.errors import InputError
from csm_fast.weights.adapter_files import load_adapters
from csm_fast.weights.load import load_base

log = logging.getLogger("csm_fast")


def run(config: VerifyAdapterConfig) -> None:
    """``csm-fast verify-adapter``: the probe's loss after loading the adapter as it was trained, and after merging.

    Raises:
        InputError: no probe, no such adapter or base, they do not belong together, or a loss has drifted.
    """
    probe = read_probe(config.adapter)
    if probe is None:
        raise InputError(
            f"holds no {PROBE}, so there is no loss to compare with",
            file=config.adapter,
            mend="give a checkpoint of csm-fast-train; csm-fast merge works without",
        )
    device = resolve_device(config.device)
    model, saved = load_base(config.adapter, config.base)
    log.info("Base      %s", saved.base)
    log.info("Adapter   %s", describe_adapter(saved))
    log.info("Probe     %d rows, loss %.6f when it was saved (%s)", probe.pack.rows, probe.loss, probe.name)
    allowed = probe.allowed(probe.loss_of(model) if probe.silenced is None else probe.silenced)
    load_adapters(model, config.adapter, compute_dtype=probe.dtype, device=device)  # quantised there, as in training
    check_loss(probe, "loaded", probe.loss_of(model.to(device), device), allowed)
    del model  # one at a time
    model, saved = load_base(config.adapter, config.base)
    merge_and_check(model.to(device), saved, probe, device)
