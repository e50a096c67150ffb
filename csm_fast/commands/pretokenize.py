"""``csm-fast pretokenize``: recordings with transcripts to a token store."""

from __future__ import annotations

from csm_fast.config.commands import PretokenizeConfig
from csm_fast.data.pretokenize import pretokenize


def run(config: PretokenizeConfig) -> None:
    """Write the token store and its report."""
    pretokenize(config)
