"""The core of ``Pool``: one lease on each object at a time, strictly first come, first served."""

from __future__ import annotations

from langgraph_perf.resources._core import Core, Holder
from langgraph_perf.resources._entry import RELEASED, UNUSED, Entry, State
from langgraph_perf.resources._hooks import Hooks
from langgraph_perf.resources._ledger import Limits
from langgraph_perf.resources._waiters import Waiter


class ExclusiveCore(Core):
    """The object that was used last goes out first, so that what is not needed gets old."""

    def __init__(self, hooks: Hooks, limits: Limits) -> None:
        self.idle: list[Entry] = []
        super().__init__(hooks, limits)

    def _reset(self) -> None:
        self.idle = []
        super()._reset()

    # The fast paths change state without calling anything: between two calls neither a signal
    # handler nor a garbage collection can run, so nothing is ever seen, or left, half done.
    # Acquiring the lock inside the "try" costs half of "with", and like "with" it lets go of the
    # lock when Ctrl-C comes right after it was acquired.

    def grab(self, lease: Holder) -> bool:
        now = self.clock()
        lock = self.lock
        try:
            lock.acquire()
            idle = self.idle
            if idle and self.quick_in and lease.entry is UNUSED:
                entry = idle[-1]
                if entry.loop is lease.loop and now < entry.expires:
                    del idle[-1]
                    entry.leases = 1
                    lease.entry = entry
                    self.granted += 1
                    return True
            return False
        finally:
            try:  # noqa: SIM105, suppress() is a call
                lock.release()
            except RuntimeError:
                pass  # Ctrl-C while it waited for the lock

    def put(self, lease: Holder) -> bool:
        now = self.clock()
        lock = self.lock
        try:
            lock.acquire()
            entry = lease.entry
            armed = self.armed
            if self.quick_out and armed <= entry.expires and armed <= now + self.reach:
                lease.entry = RELEASED
                entry.leases = 0
                entry.idle_since = now
                self.idle.append(entry)
                return True
            return False
        finally:
            try:  # noqa: SIM105, suppress() is a call
                lock.release()
            except RuntimeError:
                pass  # Ctrl-C while it waited for the lock

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
