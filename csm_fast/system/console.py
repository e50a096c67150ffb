"""Progress on the terminal: a live bar, or lines where there is no terminal."""

from __future__ import annotations

import sys
import time
from typing import Any


def counted(count: int, noun: str) -> str:
    """A number and a noun: "1 turn", "1,200 turns"."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


class StepProgress:
    """Steps done and time left on standard error: a live bar on a terminal, elsewhere a line for each ``status``.

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
        """Count one step."""
        self.done += 1
        if self.bar is not None:
            self.bar.update(1)

    def status(self, step: int, text: str) -> None:
        """Show the newest figures."""
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            return
        rate = (time.monotonic() - self.started) / max(1, step - self.first)
        left = int(rate * (self.total - step))
        self.write(f"step {step}/{self.total}  {text}  {left // 60}:{left % 60:02d} left")

    def write(self, line: str) -> None:
        """Print a line, above the bar."""
        if self.bar is not None:
            self.bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)


INTERVAL = 10.0  # seconds between lines where there is no terminal


class ClipProgress:
    """Clips done, seconds of audio per second and time left on standard error.

    Args:
        total: clips to do.
        verb: what is done to them, such as "encoding".
    """

    def __init__(self, total: int, verb: str):
        self._total, self._verb = total, verb
        self._done, self._audio, self._start = 0, 0.0, time.monotonic()
        self._last = self._start
        self._bar = None
        if total and sys.stderr.isatty():
            from tqdm import tqdm

            layout = "{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} clips{postfix}, {remaining} left"
            # No smoothing: clips differ too much in length for the latest few to predict the rest.
            self._bar = tqdm(total=total, desc=verb, bar_format=layout, dynamic_ncols=True, smoothing=0)

    def update(self, clips: int, audio_seconds: float) -> None:
        """Count ``clips`` more clips and their audio."""
        self._done += clips
        self._audio += audio_seconds
        now = time.monotonic()
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self._rate(now):,.1f} audio s/s", refresh=False)
            self._bar.update(clips)
        elif now - self._last >= INTERVAL:
            self._last = now
            self._line(now)

    def close(self) -> None:
        """Show the last state. Call it once, also after an error."""
        if self._bar is not None:
            self._bar.close()
        elif self._total:
            self._line(time.monotonic())

    def _rate(self, now: float) -> float:
        return self._audio / max(now - self._start, 1e-9)

    def _line(self, now: float) -> None:
        left = (now - self._start) * (self._total - self._done) / max(self._done, 1)
        time_left = f"{int(left) // 60}:{int(left) % 60:02d} left" if self._done else "time left not known yet"
        print(
            f"{self._verb}: {self._done:,} of {self._total:,} clips, {self._audio:,.1f} s of audio, "
            f"{self._rate(now):,.1f} audio s/s, {time_left}",
            file=sys.stderr,
            flush=True,
        )
