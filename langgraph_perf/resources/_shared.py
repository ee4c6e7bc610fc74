"""The core of ``Shared`` and ``Keyed``: one object for each key, any number of leases on it."""

from __future__ import annotations

import asyncio
import heapq
import weakref
from collections import OrderedDict
from collections.abc import Hashable
from contextvars import ContextVar
from typing import Any, TypeVar

from langgraph_perf.resources._core import Core, Holder
from langgraph_perf.resources._entry import RELEASED, UNUSED, Entry, State
from langgraph_perf.resources._lease import AsyncLease, BaseLease, Lease
from langgraph_perf.resources._waiters import Waiter

T = TypeVar("T")
_Slot = tuple[Hashable, type, "asyncio.AbstractEventLoop | None"]
"""What an object is for. The key's type too: ``1``, ``True`` and ``1.0`` are equal."""

_held: ContextVar[tuple[weakref.ref[Holder], ...]] = ContextVar("langgraph_perf_held", default=())
"""The leases that were taken by whoever runs, and by whoever started that: tasks, and the threads
on which graphs run nodes, inherit it. Some of them may be over."""


class SharedCore(Core):
    """At most ``max_size`` objects; the least recently used one without a lease makes room.

    The queue is first come first served, but for one thing: a waiter whose object is loaded does
    not wait behind one that waits for room. Strict order would load and unload all the time. So
    that the other one gets its turn, this ends once it has waited ``max_overtake`` seconds: then
    nobody who came later is given a lease before it, and room is made as leases come back. Except
    who holds the object already: that lease would end no sooner.

    However many wait, a step looks at no more than the first in each line.

    Attributes:
        slots: the places by what is asked for.
        lines: who waits for the same, in the order of the queue.
        poor: a heap of the first in each line without a place, by their number in the queue; and
            of some that are no longer that.
    """

    slots: dict[_Slot, Entry]
    lines: dict[_Slot, OrderedDict[Waiter, None]]
    poor: list[tuple[int, Waiter]]

    def _reset(self) -> None:
        self.slots, self.lines, self.poor = {}, {}, []
        super()._reset()

    def entered(self, lease: Holder) -> None:
        held = [ref for ref in _held.get() if (it := ref()) is not None and it.entry.leases]
        _held.set((*held, weakref.ref(lease)))

    def _idle(self) -> list[Entry]:
        return [e for e in self.slots.values() if e.state is State.READY and not e.leases]

    def _serve(self, waiter: Waiter) -> bool:
        slot = _slot(waiter)
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

    def _serve_at_once(self, waiter: Waiter) -> bool:
        first = self._first_poor()
        if first is not None and self._must_be_next(first):
            entry = self.slots.get(_slot(waiter))
            if entry is None or not _holds(entry):
                return False
        return self._serve(waiter)

    def _enqueued(self, waiter: Waiter) -> None:
        slot = _slot(waiter)
        line = self.lines.setdefault(slot, OrderedDict())
        line[waiter] = None
        if len(line) == 1 and slot not in self.slots:
            heapq.heappush(self.poor, (self.queue[waiter], waiter))

    def _withdraw(self, waiter: Waiter) -> bool:
        if not super()._withdraw(waiter):
            return False
        slot = _slot(waiter)
        line = self.lines[slot]
        was_first = next(iter(line)) is waiter
        del line[waiter]
        if not line:
            del self.lines[slot]
        elif was_first and slot not in self.slots:
            self._push_first(line)
        return True

    def _push_first(self, line: OrderedDict[Waiter, None]) -> None:
        first = next(iter(line))
        heapq.heappush(self.poor, (self.queue[first], first))

    def _dispatch(self) -> None:
        room = True
        while self.queue:
            poor, rich = self._first_poor() if room else None, self._first_rich()
            if poor is not None and (rich is None or self.queue[poor] < self.queue[rich]):
                if self._serve(poor):
                    self._withdraw(poor)
                elif self._must_be_next(poor):
                    return
                else:
                    room = False
            elif rich is not None:
                if rich.alive():
                    self._serve(rich)
                self._withdraw(rich)
            else:
                return

    def _first_poor(self) -> Waiter | None:
        """The first one who waits for room, and not for a load that is under way."""
        while self.poor:
            waiter = self.poor[0][1]
            slot = _slot(waiter)
            first = (
                waiter in self.queue
                and slot not in self.slots
                and next(iter(self.lines[slot])) is waiter
            )
            if first and waiter.alive():
                return waiter
            heapq.heappop(self.poor)
            if first:
                self._withdraw(waiter)
        return None

    def _first_rich(self) -> Waiter | None:
        """The first one whose object is there."""
        slots, lines = self.slots, self.lines
        some = lines if len(lines) < len(slots) else slots
        return min(
            (
                next(iter(lines[slot]))
                for slot in some
                if slot in lines and slot in slots and slots[slot].state is State.READY
            ),
            key=self.queue.__getitem__,
            default=None,
        )

    def _must_be_next(self, waiter: Waiter) -> bool:
        """Whether ``waiter``, who waits for room, must not be overtaken any more."""
        return self.clock() - waiter.since >= self.limits.max_overtake

    def _shelve(self, entry: Entry) -> None:
        pass  # it is found by its key

    def _unlink(self, entry: Entry) -> None:
        slot = _slot(entry)
        if self.slots.get(slot) is entry:
            del self.slots[slot]
            if slot in self.lines:
                self._push_first(self.lines[slot])

    def _relink(self) -> None:
        self.slots, self.lines, self.poor = {}, {}, []
        for entry in self.entries:
            if entry.state is not State.CLOSING or entry.victim is not None:
                self.slots[_slot(entry)] = entry
        for waiter in self.queue:
            self._enqueued(waiter)


class _Sharing(BaseLease[T]):
    __slots__ = ()

    core: SharedCore

    def enter(self) -> Any:
        core = self.core
        granted = None  # what the lease holds does not tell: it may have been entered before
        with core.lock:
            if core.quick_in and self.entry is UNUSED:
                entry = core.slots.get((self.key, type(self.key), self.loop))
                if entry is not None and entry.state is State.READY:
                    entry.leases += 1
                    self.entry = granted = entry
                    core.granted += 1
        if granted is None:
            return self.enter_slowly()
        core.entered(self)
        return granted.obj

    def leave(self, exc_type: Any = None, exc: Any = None, tb: Any = None) -> Any:
        core = self.core
        now = core.clock()
        with core.lock:
            entry = self.entry
            armed = core.armed
            if core.quick_out and armed <= entry.expires and armed <= now + core.reach:
                self.entry = RELEASED
                entry.leases -= 1
                entry.idle_since = now
                return None
        return self.leave_slowly()


class SharedLease(_Sharing[T], Lease[T]):
    """For ``with``."""

    __slots__ = ()

    __enter__ = _Sharing.enter
    __exit__ = _Sharing.leave


class AsyncSharedLease(_Sharing[T], AsyncLease[T]):
    """For ``async with``."""

    __slots__ = ()


def _slot(one: Waiter | Entry) -> _Slot:
    return one.key, type(one.key), one.loop


def _holds(entry: Entry) -> bool:
    """Whether the caller has a lease of ``entry`` already."""
    return any((lease := ref()) is not None and lease.entry is entry for ref in _held.get())
