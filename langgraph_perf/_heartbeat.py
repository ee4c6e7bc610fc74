"""Keeps the leases of this process alive while their holders compute.

A daemon thread for each cache renews its held leases at a third of their life, those that are due
soon together, and ends when there are none: a backend that hangs costs no other one its leases. A
process that is killed or hangs renews nothing, so its leases run out by themselves; a lease that
turns out to be lost is dropped, and the fence in ``Cache.write`` keeps its late result out.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Sequence

from langgraph_perf.caches.base import Cache, Lease

logger = logging.getLogger("langgraph_perf")


class _Keeper:
    """Of one cache."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._held: dict[str, tuple[Lease, float, float]] = {}
        self._thread: threading.Thread | None = None

    def keep(self, cache: Cache, lease: Lease, ends: float) -> None:
        with self._changed:
            self._held[lease.token] = (lease, time.monotonic() + cache.lease_seconds / 3, ends)
            if self._thread is None:
                thread = threading.Thread(
                    target=self._run, args=(cache,), name="langgraph-perf-leases", daemon=True
                )
                try:
                    thread.start()
                except RuntimeError:  # no more threads, or the interpreter is shutting down
                    return  # the next one to keep a lease tries again, for this one too
                self._thread = thread
            else:
                self._changed.notify()

    def drop(self, lease: Lease) -> None:
        with self._changed:
            self._held.pop(lease.token, None)
            if not self._held:
                self._changed.notify()

    def _run(self, cache: Cache) -> None:
        while True:
            with self._changed:
                if not self._held:
                    # linger a moment: misses come in bursts, and a thread costs more than a wait
                    self._changed.wait(1.0)
                    if not self._held:
                        self._thread = None
                        return
                now = time.monotonic()
                next_due = min([due for _, due, _ in self._held.values()])
                if next_due > now:
                    self._changed.wait(next_due - now)
                    continue
                for token in [token for token, (_, _, ends) in self._held.items() if ends <= now]:
                    del self._held[token]
                soon = now + cache.lease_seconds / 6
                due_now = [lease for lease, due, _ in self._held.values() if due <= soon]
            self._renew(cache, due_now)

    def _renew(self, cache: Cache, leases: list[Lease]) -> None:
        started = time.monotonic()
        renewed: Sequence[Lease | None] = leases
        try:
            renewed = cache.renew_many(leases)
        except Exception:
            logger.debug("%d leases could not be renewed", len(leases), exc_info=True)
        with self._changed:
            for old, new in zip(leases, renewed, strict=True):
                held = self._held.get(old.token)
                if held is None:
                    continue
                if new is None:
                    del self._held[old.token]
                elif new is old:
                    # kept: the backend may be back before the lease runs out
                    again = time.monotonic() + cache.lease_seconds / 12
                    self._held[old.token] = (old, again, held[2])
                else:
                    self._held[old.token] = (new, started + cache.lease_seconds / 3, held[2])


_keepers: weakref.WeakKeyDictionary[Cache, _Keeper] = weakref.WeakKeyDictionary()
_keeper_of: dict[str, _Keeper] = {}
_lock = threading.Lock()


def keep(cache: Cache, lease: Lease, seconds: float = math.inf) -> None:
    """Renew ``lease`` until ``drop``, at most for so many seconds."""
    with _lock:
        keeper = _keepers.get(cache)
        if keeper is None:
            keeper = _keepers[cache] = _Keeper()
        _keeper_of[lease.token] = keeper
    keeper.keep(cache, lease, time.monotonic() + seconds)


def drop(lease: Lease) -> None:
    """Renew ``lease`` no more."""
    with _lock:
        keeper = _keeper_of.pop(lease.token, None)
    if keeper is not None:
        keeper.drop(lease)


def _reset_after_fork() -> None:
    global _keepers, _keeper_of, _lock
    # the leases are the parent's
    _keepers, _keeper_of, _lock = weakref.WeakKeyDictionary(), {}, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_after_fork)
