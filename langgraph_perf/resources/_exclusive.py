"""The core of ``Pool``: one lease on each object at a time, strictly first come, first served."""

from __future__ import annotations

from typing import Any, TypeVar

from langgraph_perf.resources._core import Core
from langgraph_perf.resources._entry import RELEASED, UNUSED, Entry, State
from langgraph_perf.resources._hooks import Hooks
from langgraph_perf.resources._lease import AsyncLease, BaseLease, Lease
from langgraph_perf.resources._ledger import Limits
from langgraph_perf.resources._waiters import Waiter

T = TypeVar("T")


class ExclusiveCore(Core):
    """The object that was used last goes out first, so that what is not needed gets old."""

    def __init__(self, hooks: Hooks, limits: Limits) -> None:
        self.idle: list[Entry] = []
        super().__init__(hooks, limits)

    def _reset(self) -> None:
        self.idle = []
        super()._reset()

    def _idle(self) -> list[Entry]:
        return list(self.idle)

    def _serve(self, waiter: Waiter) -> bool:
        idle, now = self.idle, self.clock()
        for entry in reversed(idle):
            if entry.loop is waiter.loop and now < entry.expires:
                idle.remove(entry)
                self._hand(waiter, entry)
                return True
        if len(self.entries) < self.limits.max_size:
            self._hand(waiter, self._place(waiter))
            return True
        if idle:  # objects of other event loops, or too old: the oldest makes room
            self._hand(waiter, self._place(waiter, idle[0]))
            return True
        return False

    def _serve_at_once(self, waiter: Waiter) -> bool:
        return not self.queue and self._serve(waiter)

    def _enqueued(self, waiter: Waiter) -> None:
        self._dispatch()  # those before it may have left with their event loops

    def _dispatch(self) -> None:
        queue = self.queue
        while queue:
            first = next(iter(queue))
            if first.alive() and not self._serve(first):
                return
            self._withdraw(first)

    def _shelve(self, entry: Entry) -> None:
        self.idle.append(entry)

    def _relink(self) -> None:
        self.idle = [e for e in self.entries if e.state is State.READY and not e.leases]
        self.idle.sort(key=lambda entry: entry.idle_since)

    def _unlink(self, entry: Entry) -> None:
        if entry.state is State.READY and entry in self.idle:
            self.idle.remove(entry)


# The fast paths change state without calling anything: between two calls neither a signal handler
# nor a garbage collection can run, so nothing is ever seen, or left, half done. Acquiring the lock
# inside the "try" costs half of "with", and like "with" it lets go of the lock when Ctrl-C comes
# right after it was acquired. They are the methods that "with" calls, as each further call would
# take a twentieth of a checkout's time.


class _Exclusive(BaseLease[T]):
    __slots__ = ()

    core: ExclusiveCore

    def enter(self) -> Any:
        core = self.core
        now = core.clock()
        lock = core.lock
        try:
            lock.acquire()
            idle = core.idle
            if idle and core.quick_in and self.entry is UNUSED:
                entry = idle[-1]
                if entry.loop is self.loop and now < entry.expires:
                    del idle[-1]
                    entry.leases = 1
                    self.entry = entry
                    core.granted += 1
                    return entry.obj
        finally:
            try:  # noqa: SIM105, suppress() is a call
                lock.release()
            except RuntimeError:
                pass  # Ctrl-C while it waited for the lock
        return self.enter_slowly()

    def leave(self, exc_type: Any = None, exc: Any = None, tb: Any = None) -> Any:
        core = self.core
        now = core.clock()
        lock = core.lock
        try:
            lock.acquire()
            entry = self.entry
            armed = core.armed
            if core.quick_out and armed <= entry.expires and armed <= now + core.reach:
                self.entry = RELEASED
                entry.leases = 0
                entry.idle_since = now
                core.idle.append(entry)
                return None
        finally:
            try:  # noqa: SIM105, suppress() is a call
                lock.release()
            except RuntimeError:
                pass  # Ctrl-C while it waited for the lock
        return self.leave_slowly()


class ExclusiveLease(_Exclusive[T], Lease[T]):
    """For ``with``."""

    __slots__ = ()

    __enter__ = _Exclusive.enter
    __exit__ = _Exclusive.leave


class AsyncExclusiveLease(_Exclusive[T], AsyncLease[T]):
    """For ``async with``."""

    __slots__ = ()
