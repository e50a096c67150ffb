"""Progress over clips: a bar on a terminal, a plain line now and then everywhere else."""

from __future__ import annotations

import sys
import time

INTERVAL = 10.0  # seconds between lines where there is no terminal


class ClipProgress:
    """Clips done, seconds of audio per second, and the time left, on standard error.

    Args:
        total: clips to do.
        verb: what is done to them, e.g. "encoding".
    """

    def __init__(self, total: int, verb: str):
        self._total, self._verb = total, verb
        self._done, self._audio, self._start = 0, 0.0, time.monotonic()
        self._last = self._start
        self._bar = None
        if total and sys.stderr.isatty():
            from tqdm import tqdm

            layout = "{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} clips{postfix}, {remaining} left"
            # No smoothing: clips differ so much in length that the latest few say nothing about the rest.
            self._bar = tqdm(total=total, desc=verb, bar_format=layout, dynamic_ncols=True, smoothing=0)

    def update(self, clips: int, audio_seconds: float) -> None:
        """`clips` more are done, with so much audio."""
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
        """The last state; call it once, also after an error."""
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
