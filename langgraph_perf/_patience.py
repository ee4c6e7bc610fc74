"""What one run may lose to a cache that is slow, but not slow enough to fail."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType

SLOW = 0.1
"""Seconds from which on an operation is slow: below, it may as well be the machine that is busy."""
REGAINED = 0.02
"""Which part of the time that passes counts against what was lost: a run may be a long one."""


class Patience:
    """Adds up what a run has waited for slow operations; those that overlap count once.

    Args:
        clock: seconds.
    """

    __slots__ = ("_clock", "_last", "_lock", "_lost", "_until")

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lost = self._last = self._until = 0.0
        self._lock = threading.RLock()  # a garbage collection may end a lost call in here

    def is_over(self, limit: float) -> bool:
        """Whether with one more operation like the last one it may be more than ``limit`` seconds
        that were lost."""
        if not self._lost:
            return False
        with self._lock:
            self._regain(self._clock())
            return self._lost + self._last >= limit

    def spend(self, started: float, now: float) -> None:
        """An operation took from ``started`` until ``now``."""
        if now - started < SLOW:
            return
        with self._lock:
            self._regain(started)
            self._last = now - started
            self._lost += max(0.0, now - max(started, self._until))
            self._until = max(now, self._until)

    def _regain(self, now: float) -> None:
        if now > self._until:
            self._lost = max(0.0, self._lost - REGAINED * (now - self._until))
            self._until = now


class _Waiting:
    """Charges what happens inside to a patience."""

    __slots__ = ("_patience", "_started")

    def __init__(self, patience: Patience) -> None:
        self._patience = patience

    def __enter__(self) -> None:
        self._started = self._patience._clock()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._patience.spend(self._started, self._patience._clock())


_FREE: AbstractContextManager[None] = nullcontext()


def waiting(patience: Patience | None) -> AbstractContextManager[None]:
    """What surrounds the wait for an operation of a cache; ``None`` for one that never waits."""
    return _FREE if patience is None else _Waiting(patience)
