"""Deadlines for what blocks and has none of its own: it is carried out in another thread."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")

LOOK = 0.05
"""Seconds after which who waits looks whether anybody is at work: who should have seen to that may
have been interrupted."""


class _Work:
    __slots__ = ("begun", "bell", "discard", "done", "error", "given_up", "lock", "run", "value")

    def __init__(self, run: Callable[[], Any], discard: Callable[[], object]) -> None:
        self.run, self.discard = run, discard
        self.lock = threading.Lock()
        self.bell = threading.Lock()
        self.bell.acquire()
        self.begun = self.done = self.given_up = False
        self.value: Any = None
        self.error: BaseException | None = None

    def give_up(self) -> bool:
        """Whether it had not begun."""
        with self.lock:
            self.given_up = not self.done
            if self.given_up and not self.begun:
                self.run = self.discard = _nothing  # it stays in the queue
            return not self.begun


class Bounded:
    """Carries out, in daemon threads, what has no deadline of its own, and waits only so long.

    What hangs keeps its thread; when all hang, nothing else is begun until one comes back.
    """

    # No events and no conditions: an exception of a signal's handler, raised inside one, can leave
    # its lock locked for ever.

    def __init__(self, most: int) -> None:
        self._most = most
        self._jobs: queue.SimpleQueue[_Work] = queue.SimpleQueue()
        self._lock = threading.RLock()
        self._threads = self._idle = 0

    def run(
        self,
        work: Callable[[], T],
        seconds: float,
        discard: Callable[[], object] | None = None,
    ) -> T:
        """What ``work`` returns; when that comes too late, ``discard`` is called instead.

        Raises:
            TimeoutError: it is not done after so many seconds.
        """
        job = _Work(work, discard or _nothing)
        ends = time.monotonic() + seconds
        try:
            self._jobs.put(job)
            while not job.done:
                if not job.begun and not self._is_served() and job.give_up():
                    return work()
                left = ends - time.monotonic()
                if left <= 0:
                    break
                job.bell.acquire(timeout=min(left, LOOK))
        finally:
            job.give_up()
        if job.given_up:
            raise TimeoutError(f"no answer from Redis within {seconds:.3g} seconds")
        if job.error is not None:
            raise job.error
        value: T = job.value
        return value

    def _is_served(self) -> bool:
        """Whether a thread will look into the queue; one more is started if it can be of use."""
        with self._lock:
            if self._idle < self._jobs.qsize() and self._threads < self._most:
                thread = threading.Thread(
                    target=self._serve, name="langgraph-perf-deadline", daemon=True
                )
                try:
                    thread.start()
                except RuntimeError:  # no more threads, or the interpreter is shutting down
                    return self._threads > 0
                self._threads += 1
        return True

    def _serve(self) -> None:
        while True:
            with self._lock:
                self._idle += 1
            try:
                job = self._jobs.get(timeout=1.0)
            except queue.Empty:
                with self._lock:
                    self._idle -= 1
                    if self._jobs.empty():
                        # one that was interrupted when it had started this thread did not count it
                        self._threads = max(0, self._threads - 1)
                        return
                continue
            with self._lock:
                self._idle -= 1
            with job.lock:
                job.begun = not job.given_up
            if job.begun:
                try:
                    job.value = job.run()
                except BaseException as exc:
                    job.error = exc
                with job.lock:
                    job.done = True
                    late = job.given_up
                job.bell.release()
                if late:
                    with suppress(Exception):
                        job.discard()
                    job.error = None  # its frames hold the connection, in a circle
            del job


def _nothing() -> None: ...
