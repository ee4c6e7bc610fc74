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
import queue
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress

from langgraph_perf.caches.base import Cache, Lease

logger = logging.getLogger("langgraph_perf")


_Told = tuple[str, Lease | None, float, float]
"""A token, and what is to become of it: its lease, when it is due and when that ends, or to be
dropped."""


class _Keeper:
    """Of one cache.

    The leases belong to its thread, which is told of them through a queue: the garbage collector
    may end a run, which drops its lease, at any moment of the thread that it happens to run in.
    """

    def __init__(self) -> None:
        self._told: queue.SimpleQueue[_Told] = queue.SimpleQueue()
        self._held: dict[str, tuple[Lease, float, float]] = {}
        self._starting = threading.RLock()
        self._thread: threading.Thread | None = None

    def keep(self, cache: Cache, lease: Lease, ends: float) -> None:
        self._told.put((lease.token, lease, time.monotonic() + cache.lease_seconds / 3, ends))
        # a thread that ends says so before it looks for the last time
        if self._thread is None or not self._thread.is_alive():
            self._start(cache)

    def drop(self, lease: Lease) -> None:
        self._told.put((lease.token, None, 0.0, 0.0))

    def _start(self, cache: Cache) -> None:
        with self._starting:
            if self._thread is not None and self._thread.is_alive():
                return
            thread = threading.Thread(
                target=self._run, args=(cache,), name="langgraph-perf-leases", daemon=True
            )
            # no more threads, or the interpreter is shutting down: the next one to keep a lease
            # tries again, for this one too
            with suppress(RuntimeError):
                thread.start()
                self._thread = thread

    def _run(self, cache: Cache) -> None:
        me = threading.current_thread()
        with self._starting:
            if self._thread is not me:
                return  # who started it was interrupted before that was noted
        while True:
            self._hear(0.0)
            now = time.monotonic()
            for token in [token for token, (_, _, ends) in self._held.items() if ends <= now]:
                del self._held[token]
            if not self._held:
                # linger a moment: misses come in bursts, and a thread costs more than a wait
                if self._hear(1.0):
                    continue
                self._thread = None
                if self._told.empty() or not self._goes_on(me):
                    return
                continue
            next_due = min([due for _, due, _ in self._held.values()])
            if next_due > now:
                self._hear(next_due - now)
                continue
            soon = now + cache.lease_seconds / 6
            self._renew(cache, [lease for lease, due, _ in self._held.values() if due <= soon])

    def _goes_on(self, me: threading.Thread) -> bool:
        """Whether no other thread has begun, which hears of what was told meanwhile."""
        with self._starting:
            if self._thread is None:
                self._thread = me
            return self._thread is me

    def _hear(self, seconds: float) -> bool:
        """Whether there was something to hear, for which it waits so long."""
        heard = False
        try:
            told = self._told.get(timeout=seconds)
            while True:
                heard = True
                token, lease, due, ends = told
                if lease is None:
                    self._held.pop(token, None)
                else:
                    self._held[token] = (lease, due, ends)
                told = self._told.get_nowait()
        except queue.Empty:
            return heard

    def _renew(self, cache: Cache, leases: list[Lease]) -> None:
        started = time.monotonic()
        renewed: Sequence[Lease | None] = leases
        try:
            renewed = cache.renew_many(leases)
        except Exception:
            logger.debug("%d leases could not be renewed", len(leases), exc_info=True)
        for old, new in zip(leases, renewed, strict=True):
            ends = self._held[old.token][2]
            if new is None:
                del self._held[old.token]
            elif new is old:
                # kept: the backend may be back before the lease runs out
                again = time.monotonic() + cache.lease_seconds / 12
                self._held[old.token] = (old, again, ends)
            else:
                self._held[old.token] = (new, started + cache.lease_seconds / 3, ends)


_keepers: weakref.WeakKeyDictionary[Cache, _Keeper] = weakref.WeakKeyDictionary()
_keeper_of: dict[str, _Keeper] = {}
_lock = threading.RLock()


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
    # no lock: the garbage collector may come here while this thread has it
    keeper = _keeper_of.pop(lease.token, None)
    if keeper is not None:
        keeper.drop(lease)


def _reset_after_fork() -> None:
    global _keepers, _keeper_of, _lock
    # the leases are the parent's
    _keepers, _keeper_of, _lock = weakref.WeakKeyDictionary(), {}, threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_after_fork)
