"""Worker processes that decode and resample: requests in, float32 waves out, in order, a bounded number in flight.

Each worker is a plain child process, driven over pipes by one thread of the parent. Unlike with multiprocessing, a
child imports neither the caller's main module (so a script works without an ``if __name__`` guard) nor torch, and a
wave is sent as raw bytes. A decoder that crashes ends one child and fails one clip. When the parent is killed, its
children read the end of their input and exit.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from csm_fast.config.shape import SAMPLE_RATE
from csm_fast.system.errors import InputError

_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from csm_fast.data.decode_pool import serve_requests; serve_requests()"
)
_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True, slots=True)
class Request:
    """A request to a worker: for the content hash of a file, or for the wave between two times of it.

    Attributes:
        path: the audio file.
        wave: True for the wave, False for the hash.
        start, end: seconds, None for the file's ends.
        row, file: the row and the metadata file that name it, for errors.
        sample_rate: of the wave, in Hz.
        max_seconds: of a longer wave only the length is returned, and nothing is decoded; 0: no limit.
        tag: anything; it stays in the parent.
    """

    path: str
    wave: bool
    start: float | None = None
    end: float | None = None
    row: str = ""
    file: str = ""
    sample_rate: int = SAMPLE_RATE
    max_seconds: float = 0.0
    tag: Any = None


@dataclass(slots=True)
class Reply:
    """The answer to a request.

    Attributes:
        stamp: the file's (size, mtime in ns) when it was read.
        content: the hash that was asked for.
        wave: the wave that was asked for, float32 [samples].
        stats: (duration, leading silence, trailing silence) in seconds.
        error: why the request failed.
    """

    stamp: tuple[int, int] = (0, 0)
    content: str = ""
    wave: np.ndarray | None = None
    stats: tuple[float, float, float] = (0.0, 0.0, 0.0)
    error: InputError | None = None


def file_stamp(path: str) -> tuple[int, int]:
    """(size, mtime in ns): changes with the file, except for edits within the clock's resolution."""
    info = os.stat(path)
    return info.st_size, info.st_mtime_ns


def answer_request(request: Request) -> Reply:
    """Do what ``request`` asks, in this process. Failures of the clip are returned as an InputError with its row."""
    where: dict[str, Any] = {"file": request.file or None, "row": request.row or None}
    try:
        from csm_fast.data import audio

        before = file_stamp(request.path)
        if not request.wave:
            return Reply(before, content=audio.hash_content(request.path))
        if request.max_seconds:
            rate, frames, _ = audio.audio_info(request.path)
            end = frames / rate if request.end is None else min(request.end, frames / rate)
            if end - (request.start or 0.0) > request.max_seconds:
                return Reply(before, stats=(end - (request.start or 0.0), 0.0, 0.0))
        wave = audio.read_audio(
            request.path,
            start=request.start,
            end=request.end,
            sample_rate=request.sample_rate,
            row=request.row or None,
            metadata_file=request.file or None,
        )
        leading, trailing = audio.measure_silence(wave, request.sample_rate)
        return Reply(before, wave=wave, stats=(len(wave) / request.sample_rate, float(leading), float(trailing)))
    except InputError as error:
        if error.row is None:  # only read_audio knows the row
            error = InputError(f"{request.path} {error.what}", mend=error.mend, **where)
        return Reply(error=error)
    except FileNotFoundError:
        mend = "check the path; it is relative to the metadata file"
        return Reply(error=InputError(f"{request.path} does not exist", mend=mend, **where))
    except OSError as error:
        what = f"{request.path} cannot be read ({error.strerror})"
        return Reply(error=InputError(what, mend="check the file", **where))
    except MemoryError:
        what = f"{request.path} does not fit in memory"
        return Reply(error=InputError(what, mend="cut it into rows with start and end", **where))


class DecodePool:
    """``workers`` child processes; with 0 the calling process does the work. Close it, or use it in a ``with``."""

    def __init__(self, workers: int):
        self.workers = workers
        self._local = threading.local()
        self._children: list[subprocess.Popen] = []
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="decode") if workers else None

    def __enter__(self) -> DecodePool:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def run(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Reply]]:
        """Yield (request, reply) in the order of ``requests``, which is read only a few requests ahead."""
        if self._threads is None:
            yield from ((request, answer_request(request)) for request in requests)
            return
        waiting: deque[tuple[Request, Future[Reply]]] = deque()
        for request in requests:
            waiting.append((request, self._threads.submit(self._ask, request)))
            if len(waiting) > 2 * self.workers:
                first, reply = waiting.popleft()
                yield first, reply.result()
        for request, reply in waiting:
            yield request, reply.result()

    def close(self) -> None:
        """End the children, and discard what they were doing."""
        if self._threads is None:
            return
        self._threads.shutdown(wait=False, cancel_futures=True)
        for child in list(self._children):
            child.kill()  # so that its thread reads the end of the pipe
        self._threads.shutdown(wait=True)
        for child in self._children:
            child.kill()  # again: a thread may have started one meanwhile
            child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe:
                    with contextlib.suppress(BrokenPipeError):  # closing flushes a request that it never read
                        pipe.close()

    def _ask(self, request: Request) -> Reply:
        child: Any = getattr(self._local, "child", None)
        if child is None or child.poll() is not None:
            child = self._local.child = self._start()
        fields = [getattr(request, name) for name in Request.__slots__ if name != "tag"]
        try:
            to, back = child.stdin, child.stdout
            to.write(json.dumps(fields).encode() + b"\n")
            to.flush()
            head = json.loads(back.readline())
            data = bytearray(head["bytes"])  # not bytes, so that the wave is writable
            if data and back.readinto(data) != len(data):
                raise EOFError
        except (OSError, EOFError, ValueError):
            # The child died: the decoder crashed, or the system killed it for its memory.
            child.kill()
            self._local.child = None
            what = f"the decoder crashed on {request.path}"
            where: dict[str, Any] = {"file": request.file or None, "row": request.row or None}
            return Reply(error=InputError(what, mend="re-encode the recording, e.g. to WAV or FLAC", **where))
        error = head["error"]
        return Reply(
            stamp=tuple(head["stamp"]),
            content=head["content"],
            wave=np.frombuffer(data, np.float32) if data else None,
            stats=tuple(head["stats"]),
            error=InputError(error[0], file=error[1], row=error[2], mend=error[3]) if error else None,
        )

    def _start(self) -> subprocess.Popen:
        # Each process decodes one file. Threads of libraries would compete with the other processes.
        environment = {**os.environ, **dict.fromkeys(_ONE_THREAD, "1")}
        command = [sys.executable, "-c", _START, json.dumps([path or os.getcwd() for path in sys.path])]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        self._children.append(child)
        return child


def serve_requests() -> None:
    """The main function of a worker: answer requests from standard input until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes; the parent decides when to end
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a decoder prints must not get into the replies
    try:
        for line in requests:
            reply = answer_request(Request(*json.loads(line)))
            data = b"" if reply.wave is None else np.ascontiguousarray(reply.wave, np.float32).tobytes()
            error = reply.error
            head = {
                "stamp": reply.stamp,
                "content": reply.content,
                "stats": reply.stats,
                "bytes": len(data),
                "error": error and [error.what, error.file and os.fspath(error.file), error.row, error.mend],
            }
            replies.write(json.dumps(head).encode() + b"\n" + data)
            replies.flush()
    except BrokenPipeError:
        pass  # the parent is gone
