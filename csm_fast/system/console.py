"""What a run says and hears on the terminal: a live bar, or quiet lines, and Ctrl-C."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any


def counted(count: int, noun: str) -> str:
    """One turn is "1 turn", more are "1,200 turns"."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


class StepProgress:
    """Steps done and time left, on standard error: a live bar on a terminal, one line per log elsewhere.

    Args:
        total: optimizer steps of the run.
        done: steps done before this start.
    """

    def __init__(self, total: int, done: int):
        self.total, self.done, self.first = total, done, done
        self.started = time.monotonic()
        self.bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            layout = "{percentage:3.0f}% |{bar:20}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
            self.bar = tqdm(total=total, initial=done, bar_format=layout, dynamic_ncols=True)

    def __enter__(self) -> StepProgress:
        return self

    def __exit__(self, *_: Any) -> None:
        if self.bar is not None:
            self.bar.close()

    def update(self) -> None:
        """One step more."""
        self.done += 1
        if self.bar is not None:
            self.bar.update(1)

    def status(self, step: int, text: str) -> None:
        """The newest figures."""
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            return
        rate = (time.monotonic() - self.started) / max(1, step - self.first)
        left = int(rate * (self.total - step))
        self.write(f"step {step}/{self.total}  {text}  {left // 60}:{left % 60:02d} left")

    def write(self, line: str) -> None:
        """A line of its own, above the bar."""
        if self.bar is not None:
            self.bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)


class StopSignals:
    """The first Ctrl-C (or SIGTERM) asks the run to stop after its step; the second stops it at once."""

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.previous: dict[int, Any] = {}

    def __enter__(self):
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self._handle)
        except ValueError:  # not the main thread: the embedding program handles signals
            pass
        return self

    def _handle(self, number, frame):
        if self.trainer.stopping:
            raise KeyboardInterrupt
        self.trainer.stopping = signal.Signals(number).name
        # Not print: the signal may arrive inside one, and a buffered stream cannot be entered twice.
        os.write(2, b"\nFinishing this step, then saving. Once more stops at once.\n")

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)
