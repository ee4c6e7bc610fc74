"""What a resource reports about itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ResourceStats:
    """A snapshot: what there is now, and what has happened since the resource was made here.

    ``size == idle + in_use + loading + closing`` always holds, and so does
    ``loads - closed == idle + in_use + closing``.

    Attributes:
        size: places taken: objects, those being made and those being closed.
        in_use: objects with at least one lease; ``idle``: those with none.
        loading: objects being made; ``closing``: objects being closed.
        waiting: callers in the queue.
        max_size: the most places there can be; ``None`` where somebody else bounds them.
        holders: leases that are out now (several can share one object).
        leases: leases granted so far.
        loads: objects made; ``load_seconds``: how long that took in all.
        failures: loads that raised.
        closed: objects closed or dropped.
        timeouts: callers that gave up waiting.
        wait_seconds: what leases had to wait in all, for others or for a load; ``longest_wait``
            is the longest of them.
        forgotten: leases that were garbage collected instead of given back.
    """

    size: int = 0
    in_use: int = 0
    idle: int = 0
    loading: int = 0
    closing: int = 0
    waiting: int = 0
    max_size: int | None = None
    holders: int = 0
    leases: int = 0
    loads: int = 0
    load_seconds: float = 0.0
    failures: int = 0
    closed: int = 0
    timeouts: int = 0
    wait_seconds: float = 0.0
    longest_wait: float = 0.0
    forgotten: int = 0
