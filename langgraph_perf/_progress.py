"""How whoever waits tells LangGraph's ``idle_timeout`` that it is not idle."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from langgraph.runtime import Runtime

Heartbeat = Callable[[], object]

BEAT_SECONDS = 0.05
"""How often a waiter calls its heartbeat: more often than any sensible ``idle_timeout`` asks."""

NO_HEARTBEAT: Callable[[], None] = Runtime().heartbeat
"""What LangGraph gives to nodes that have no ``idle_timeout``. It does nothing, so that nobody has
to wake up for it."""


def beat_seconds(heartbeat: Heartbeat | None) -> float:
    """How long a waiter may sleep without calling ``heartbeat``."""
    return math.inf if heartbeat is None or heartbeat is NO_HEARTBEAT else BEAT_SECONDS


@contextmanager
def beating(heartbeat: Heartbeat | None) -> Iterator[None]:
    """Call ``heartbeat`` all the while this task waits, without waking it up."""
    seconds = beat_seconds(heartbeat)
    if heartbeat is None or seconds == math.inf:
        yield
        return
    loop = asyncio.get_running_loop()
    timers: list[asyncio.TimerHandle] = []

    def schedule() -> None:
        timers[:] = [loop.call_later(seconds, beat)]

    def beat() -> None:
        schedule()
        heartbeat()

    schedule()
    try:
        yield
    finally:
        timers[0].cancel()
