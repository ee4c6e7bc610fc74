"""Keeps the leases of this process alive while their holders compute.

One daemon thread renews every held lease at a third of its life, and ends when there is none. A
process that is killed or hangs renews nothing, so its leases run out by themselves; a lease that
turns out to be lost is dropped, and the fence in ``Cache.write`` keeps its late result out.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from typing import Any

from langgraph_perf.caches.base import Cache, Lease

logger = logging.getLogger("langgraph_perf")


class _Keeper:
    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._held: dict[str, tuple[Cache, Lease, float, float]] = {}
        self._thread: threading.Thread | None = None

    def keep(self, cache: Cache, lease: Lease, ends: float) -> None:
        with self._changed:
            self._held[lease.token] = (cache, lease, _due(cache), ends)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="langgraph-perf-leases", daemon=True
                )
                self._thread.start()
            else:
                self._changed.notify()

    def drop(self, lease: Lease) -> None:
        with self._changed:
            self._held.pop(lease.token, None)
            if not self._held:
                self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._held:
                    # linger a moment: misses come in bursts, and a thread costs more than a wait
                    self._changed.wait(1.0)
                    if not self._held:
                        self._thread = None
                        return
                now = time.monotonic()
                next_due = min(due for _, _, due, _ in self._held.values())
                if next_due > now:
                    self._changed.wait(next_due - now)
                    continue
                due_now = [held for held in self._held.values() if held[2] <= now]
            for cache, lease, _, ends in due_now:
                renewed: Any = lease
                try:
                    renewed = cache.renew(lease) if now < ends else None
                except Exception:
                    # kept: the backend may be back at the next beat, before the lease runs out
                    logger.debug("lease of %s could not be renewed", lease.key, exc_info=True)
                with self._changed:
                    if lease.token in self._held:
                        if renewed is None:
                            del self._held[lease.token]
                        else:
                            self._held[lease.token] = (cache, renewed, _due(cache), ends)


def _due(cache: Cache) -> float:
    return time.monotonic() + cache.lease_seconds / 3


_keeper = _Keeper()


def keep(cache: Cache, lease: Lease, seconds: float = math.inf) -> None:
    """Renew ``lease`` until ``drop``, at most for so many seconds."""
    _keeper.keep(cache, lease, time.monotonic() + seconds)


def drop(lease: Lease) -> None:
    """Renew ``lease`` no more."""
    _keeper.drop(lease)


def _reset_after_fork() -> None:
    global _keeper
    _keeper = _Keeper()  # the leases are the parent's


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_after_fork)
