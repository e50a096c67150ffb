"""Ctrl-C during a run."""

from __future__ import annotations

import os
import signal
from typing import Any


class StopSignals:
    """Within it, the first Ctrl-C (or SIGTERM) is noted in ``received``, so that the run can stop after its step; the
    second stops it at once."""

    def __init__(self) -> None:
        self.received: str | None = None  # the signal's name
        self.previous: dict[int, Any] = {}

    def __enter__(self):
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self._handle)
        except ValueError:  # not the main thread: the embedding program handles signals
            pass
        return self

    def _handle(self, number, frame):
        if self.received:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
        # Not print: the signal may arrive inside one, and a buffered stream cannot be entered twice.
        os.write(2, b"\nFinishing this step, then saving. Once more stops at once.\n")

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)
