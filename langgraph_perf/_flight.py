"""Single-flight: of all calls for one key in this process, one runs and the others wait for it.

The table only decides; it never blocks and does no I/O. A waiter is handed its outcome under the
table's lock and may refuse it (cancelled, its event loop closed), so leadership is never given to
nobody. Model: ``psycopg_pool``'s ``WaitingClient``.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Collection, Hashable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from langgraph_perf._progress import beat_seconds, beating
from langgraph_perf.caches.base import Entry


@dataclass(frozen=True, slots=True)
class Landed:
    """The leader is done; its entry answers the waiter too."""

    entry: Entry


@dataclass(frozen=True, slots=True)
class TakeOver:
    """The leader failed; the waiter is the leader now."""


@dataclass(frozen=True, slots=True)
class Disperse:
    """The leader's result can answer nobody else; every waiter runs by itself."""


Outcome = Landed | TakeOver | Disperse


PATIENCE = 300.0
"""Seconds a call waits for another one's result before it runs by itself. A leader that waits for
its follower by ways that cannot be seen (a thread of its own, say) would else never end."""
THREAD_PATIENCE = 60.0
"""The same for a thread that may be one of those the leader needs: those of an event loop's
executor, which a program can replace."""
EXECUTOR_PATIENCE = 10.0
"""The same for a thread that is one of them, and wherever the leader is suspected to wait."""


class Waiter(Protocol):
    """Who waits for a flight.

    Attributes:
        loop: the event loop it waits on; ``None`` in a thread.
        patience: seconds after which it goes alone, in case the leader waits for it.
    """

    outcome: Outcome | None
    loop: asyncio.AbstractEventLoop | None
    patience: float

    def wake(self) -> bool:
        """Tell the waiter that ``outcome`` is set; ``False``: nobody is there any more."""


class SyncWaiter:
    """Waits in a thread."""

    def __init__(self) -> None:
        self.outcome: Outcome | None = None
        self.loop: asyncio.AbstractEventLoop | None = None
        self.patience = PATIENCE
        self._event = threading.Event()

    def wake(self) -> bool:
        self._event.set()
        return True

    def wait(self, heartbeat: Callable[[], None]) -> Outcome | None:
        """Block until there is an outcome or patience ends; reports progress meanwhile."""
        ends = time.monotonic() + self.patience
        while not self._event.wait(min(1.0, beat_seconds(heartbeat), self.patience)):
            heartbeat()
            if time.monotonic() >= ends:
                break
        return self.outcome


class AsyncWaiter:
    """Waits in a task."""

    def __init__(self) -> None:
        self.outcome: Outcome | None = None
        self.loop: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
        self.patience = PATIENCE
        self._woken: asyncio.Future[None] = self.loop.create_future()

    def wake(self) -> bool:
        assert self.loop is not None
        try:
            self.loop.call_soon_threadsafe(self._set)
        except RuntimeError:  # its loop is closed: nobody will ever wake up there
            return False
        return True

    def _set(self) -> None:
        if not self._woken.done():
            self._woken.set_result(None)

    async def wait(self, heartbeat: Callable[[], None]) -> Outcome | None:
        """Wait until there is an outcome or patience ends; reports progress meanwhile."""
        with beating(heartbeat):
            await asyncio.wait((self._woken,), timeout=self.patience)
        heartbeat()
        return self.outcome


class Flight:
    """One key being computed; only its table touches it."""

    __slots__ = ("blocked_on", "key", "loop", "superseded", "uses_executor", "waiters")

    def __init__(self, key: Hashable, loop: Any, uses_executor: bool) -> None:
        self.key = key
        self.waiters: deque[Waiter] = deque()
        self.blocked_on: list[Flight] = []
        self.loop = loop
        self.uses_executor = uses_executor
        self.superseded = False


held_flights: ContextVar[tuple[Flight, ...]] = ContextVar("langgraph_perf_flights", default=())
"""The flights that the current call is part of, outermost first: a nested call for one of their
keys, or for one that waits for them, must not wait."""


T = TypeVar("T")

# one lock for all tables: flights of different caches may wait for one another
_lock = threading.RLock()
_busy = False
_late: deque[Callable[[], None]] = deque()
_tables: weakref.WeakSet[FlightTable] = weakref.WeakSet()


def _turn(step: Callable[[], T], nested: Callable[[Callable[[], T]], T]) -> T:
    """Take one step of a table while nobody takes another.

    A garbage collection may, in the middle of a step, finalize a lost call, whose end is a step as
    well. What becomes of it, ``nested`` decides: it must not see what is half done.
    """
    global _busy
    with _lock:
        if _busy:
            return nested(step)
        _busy = True
        try:
            return step()
        finally:
            try:
                while _late:
                    _late.popleft()()
            finally:
                _busy = False


def _do(step: Callable[..., None], *args: Any) -> None:
    """Take a step: now, or at the end of the one that it interrupts."""
    _turn(partial(step, *args), _late.append)


class FlightTable:
    """All flights of one cache in this process."""

    def __init__(self) -> None:
        self._flights: dict[Hashable, Flight] = {}
        _tables.add(self)

    def join(
        self,
        key: Hashable,
        new_waiter: Callable[[], Waiter],
        *,
        loop: asyncio.AbstractEventLoop | None = None,
        uses_executor: bool = False,
        blocked_loop: asyncio.AbstractEventLoop | None = None,
        held: tuple[Flight, ...] = (),
        suspects: Collection[Flight] = (),
    ) -> tuple[Flight | None, Waiter | None]:
        """Lead ``(flight, None)``, follow ``(flight, waiter)``, or go alone ``(None, None)``.

        Going alone is for calls whose waiting could never end, because the leader waits for them.

        Args:
            loop: the event loop the caller runs on, if it leads.
            uses_executor: whether the caller, if it leads, needs a thread of that loop's executor.
            blocked_loop: an event loop whose thread waits for the caller.
            held: the flights that the call is part of.
            suspects: flights that it may be part of, for all that can be seen.
        """

        def join() -> tuple[Flight | None, Waiter | None]:
            flight = self._flights.get(key)
            if flight is None:
                flight = self._flights[key] = Flight(key, loop, uses_executor)
                return flight, None
            if blocked_loop is not None and flight.loop is blocked_loop:
                return None, None
            if loop is None and flight.uses_executor and in_asyncio_executor():
                return None, None
            if held and _depends_on(flight, held):
                return None, None
            waiter = new_waiter()
            if flight in suspects or (loop is None and in_asyncio_executor()):
                waiter.patience = EXECUTOR_PATIENCE
            elif loop is None and flight.uses_executor and not _in_main_thread():
                waiter.patience = THREAD_PATIENCE
            flight.waiters.append(waiter)
            for mine in held:
                mine.blocked_on.append(flight)
            return flight, waiter

        return _turn(join, lambda _: (None, None))

    def landed(self, flight: Flight, entry: Entry) -> None:
        """The leader is done: hand ``entry`` to everyone who waits."""
        _do(self._end, flight, Landed(entry))

    def disperse(self, flight: Flight) -> None:
        """The leader is done, but its result can answer nobody else."""
        _do(self._end, flight, Disperse())

    def abandoned(self, flight: Flight) -> None:
        """The leader failed: the longest waiting follower leads."""
        _do(self._abandoned, flight)

    def left(self, flight: Flight, waiter: Waiter) -> None:
        """``waiter`` waits no more (cancelled, say): pass on whatever it was handed."""
        _do(self._left, flight, waiter)

    def supersede(self, key: Hashable) -> None:
        """A newer value of ``key`` is on its way: whoever computes it now must not store theirs."""
        _do(self._supersede, key)

    def unblocked(self, flight: Flight, held: tuple[Flight, ...]) -> None:
        """A call that is part of ``held`` waits for ``flight`` no more."""
        if held:
            _do(_unblocked, flight, held)

    def _abandoned(self, flight: Flight) -> None:
        while flight.waiters:
            waiter = flight.waiters.popleft()
            waiter.outcome = TakeOver()
            flight.loop = waiter.loop
            if waiter.wake():
                return
        self._forget(flight)

    def _left(self, flight: Flight, waiter: Waiter) -> None:
        if waiter.outcome is None:
            flight.waiters.remove(waiter)
        elif isinstance(waiter.outcome, TakeOver):
            self._abandoned(flight)

    def _supersede(self, key: Hashable) -> None:
        flight = self._flights.get(key)
        if flight is not None:
            flight.superseded = True

    def _end(self, flight: Flight, outcome: Outcome) -> None:
        self._forget(flight)
        for waiter in flight.waiters:
            waiter.outcome = outcome
            waiter.wake()
        flight.waiters.clear()

    def _forget(self, flight: Flight) -> None:
        if self._flights.get(flight.key) is flight:
            del self._flights[flight.key]

    def waiting(self) -> int:
        """How many calls wait for another one's result."""
        with _lock:
            return sum(len(flight.waiters) for flight in self._flights.values())

    def __len__(self) -> int:
        return len(self._flights)


def _depends_on(flight: Flight, held: tuple[Flight, ...]) -> bool:
    """Whether ``flight`` is one of ``held`` or waits, directly or not, for one of them."""
    seen: set[int] = set()
    pending = [flight]
    while pending:
        current = pending.pop()
        if current in held:
            return True
        if id(current) not in seen:
            seen.add(id(current))
            pending += current.blocked_on
    return False


def _unblocked(flight: Flight, held: tuple[Flight, ...]) -> None:
    for mine in held:
        if flight in mine.blocked_on:
            mine.blocked_on.remove(flight)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def in_asyncio_executor() -> bool:
    """Whether this thread belongs to an event loop's default executor."""
    # the default executor's threads have no other mark; a wrong guess costs one extra run
    return threading.current_thread().name.startswith("asyncio_")


def _reset_after_fork() -> None:
    # the leaders live in the parent; here their followers would wait for ever
    global _lock, _busy
    _lock, _busy = threading.RLock(), False
    _late.clear()
    for table in list(_tables):
        table._flights.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_after_fork)
