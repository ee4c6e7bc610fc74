"""The core of ``Shared`` and ``Keyed``: one object for each key, any number of leases on it."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable

from langgraph_perf.resources._core import Core, Holder
from langgraph_perf.resources._entry import RELEASED, UNUSED, Entry, State
from langgraph_perf.resources._hooks import Hooks
from langgraph_perf.resources._ledger import Limits
from langgraph_perf.resources._waiters import Waiter

_Slot = tuple[Hashable, "asyncio.AbstractEventLoop | None"]


class SharedCore(Core):
    """At most ``max_size`` objects; the least recently used one without a lease makes room.

    The queue is first come first served, but for one thing: a waiter whose object is loaded does
    not wait behind one that waits for room. Strict order would load and unload all the time. So
    that the other one gets its turn, this ends once it has waited ``max_overtake`` seconds: then
    nobody who came later is given a lease before it, and room is made as leases come back.
    """

    def __init__(self, hooks: Hooks, limits: Limits) -> None:
        self.slots: dict[_Slot, Entry] = {}
        super().__init__(hooks, limits)

    def _reset(self) -> None:
        self.slots = {}
        super()._reset()

    def grab(self, lease: Holder) -> bool:
        with self.lock:
            if self.quick_in and lease.entry is UNUSED:
                entry = self.slots.get((lease.key, lease.loop))
                if entry is not None and entry.state is State.READY:
                    entry.leases += 1
                    lease.entry = entry
                    self.granted += 1
                    return True
        return False

    def put(self, lease: Holder) -> bool:
        now = self.clock()
        with self.lock:
            entry = lease.entry
            armed = self.armed
            if self.quick_out and armed <= entry.expires and armed <= now + self.reach:
                lease.entry = RELEASED
                entry.leases -= 1
                entry.idle_since = now
                return True
        return False

    def _idle(self) -> list[Entry]:
        return [e for e in self.slots.values() if e.state is State.READY and not e.leases]

    def _serve(self, waiter: Waiter) -> bool:
        slot = (waiter.key, waiter.loop)
        entry = self.slots.get(slot)
        if entry is not None:
            if entry.state is State.READY:
                self._hand(waiter, entry)
                return True
            return False  # its load is under way
        victim = None
        if len(self.entries) >= self.limits.max_size:
            victim = min(self._idle(), key=lambda entry: entry.idle_since, default=None)
            if victim is None:
                return False
        self.slots[slot] = place = self._place(waiter, victim)
        self._hand(waiter, place)
        return True

    def _dispatch(self) -> None:
        waiting = list(self.queue)
        served: set[Waiter] = set()
        for waiter in waiting:
            if not waiter.alive() or self._serve(waiter):
                served.add(waiter)
            elif self._blocked_for_too_long(waiter):
                break
        if served:
            self.queue.clear()
            self.queue.extend(waiter for waiter in waiting if waiter not in served)

    def _blocked_for_too_long(self, waiter: Waiter) -> bool:
        """Whether ``waiter`` waits for room (not for a load) and must not be overtaken any more."""
        if (waiter.key, waiter.loop) in self.slots:
            return False
        return self.clock() - waiter.since >= self.limits.max_overtake

    def _shelve(self, entry: Entry) -> None:
        pass  # it is found by its key

    def _unlink(self, entry: Entry) -> None:
        slot = (entry.key, entry.loop)
        if self.slots.get(slot) is entry:
            del self.slots[slot]
