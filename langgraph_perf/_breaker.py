"""When to leave a backend alone for a while, and when to say so.

A circuit breaker (Nygard, *Release It!*, "Circuit Breaker"): after a few failures in a row nothing
is asked for a while, then one operation finds out whether the backend is back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

FAILURES_TO_OPEN = 3
FIRST_PAUSE = 1.0
LONGEST_PAUSE = 4.0
"""So long after it is back, at most, a backend is asked again."""
QUIET = 60.0
"""For so long single failures of one kind are logged once; an outage always is."""


class Breaker:
    """Closed, open, or half open; times are seconds of ``clock``."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures = 0
        self._pause = FIRST_PAUSE
        self._closed_again_at: float | None = None
        self._probe_until = 0.0
        self._row = 0
        """Counts the rows of failures, each of which ends with a success."""
        self._logged: dict[str, tuple[int, float]] = {}
        """In which row a kind of failure was logged last, and when."""

    @property
    def is_open(self) -> bool:
        """Whether operations are being skipped."""
        return self._closed_again_at is not None

    def allows(self) -> bool:
        """Whether an operation may be tried now; when half open, one at a time may."""
        if self._closed_again_at is None:
            return True
        now = self._clock()
        if now < self._closed_again_at or now < self._probe_until:
            return False
        # a probe that never reports back (cancelled) must not close the door for ever
        self._probe_until = now + self._pause
        return True

    def succeeded(self) -> bool:
        """An operation went well; whether that ends an outage."""
        was_open = self.is_open
        if self._failures:
            self._failures = 0
            self._pause = FIRST_PAUSE
            self._closed_again_at = None
            self._probe_until = 0.0
            self._row += 1
        return was_open

    def failed(self, kind: str = "", *, slowly: bool = False) -> bool:
        """An operation failed; one that took its deadline is reason enough to open.

        Returns:
            Whether this is worth a line in the log: each outage is, once for every ``kind`` of
            failure in it, and so are single failures, but not again and again.
        """
        now = self._clock()
        self._failures += 1
        if slowly or self._failures >= FAILURES_TO_OPEN:
            self._closed_again_at = now + self._pause
            self._pause = min(self._pause * 2, LONGEST_PAUSE)
        row, when = self._logged.get(kind, (-1, -QUIET))
        if row == self._row or (row >= 0 and not self.is_open and now - when < QUIET):
            return False
        self._logged[kind] = (self._row, now)
        return True


class Guarded:
    """What has a breaker for each thing that is asked of it: a full disk must not stop reads. But
    while nothing can be read, nothing else is tried either."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.reads = Breaker(clock)
        self.writes = Breaker(clock)
        self.tags = Breaker(clock)
        self.leases = Breaker(clock)

    @property
    def breakers(self) -> tuple[Breaker, ...]:
        """All of them."""
        return self.reads, self.writes, self.tags, self.leases

    def may_try(self, breaker: Breaker) -> bool:
        """Whether an operation that ``breaker`` is for may be tried now."""
        return (breaker is self.reads or not self.reads.is_open) and breaker.allows()


def took_its_deadline(error: BaseException) -> bool:
    """Whether ``error`` means that there was no answer in time."""
    return isinstance(error, (TimeoutError, asyncio.TimeoutError))
