"""What decides: who gets which object, who waits, what is loaded and what is closed.

A core never blocks and never calls a user's function. Each of its steps runs under one lock; what
is to happen afterwards (wake a waiter, start a load, close an object) is collected as effects and
carried out after the lock is free. Threads and tasks only differ in how they wait, see
``_lease``.

Hand-over: whoever gives an object back assigns it to the next waiter under the lock and then
wakes it, so nobody can come in between. A waiter is handed either a ready object or a place that
it must fill itself.

The lock is re-entrant because a garbage collection may, in the middle of a step, finalize a
coroutine or a generator whose ``with`` block gives a lease back. Such a nested step is put off to
the end of the step that it interrupted.
"""

from __future__ import annotations

import asyncio
import enum
import functools
import logging
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from langgraph_perf.errors import LeaseError, PoolClosed, PoolTimeout, ResourceError, TooManyWaiting
from langgraph_perf.resources import _lifecycle, _reaper
from langgraph_perf.resources._entry import NEVER, RELEASED, UNUSED, Entry, State
from langgraph_perf.resources._hooks import Hooks
from langgraph_perf.resources._stats import ResourceStats
from langgraph_perf.resources._waiters import Waiter
from langgraph_perf.resources._work import aclose, close_now, close_soon, load_soon

logger = logging.getLogger("langgraph_perf")


class Holder(Protocol):
    """A lease, as far as a core's fast path touches it."""

    entry: Entry
    loop: asyncio.AbstractEventLoop | None
    key: Any


class Step(enum.Enum):
    """What a waiter has to do next."""

    WAIT = "sleep until woken"
    LOAD = "fill the place it was handed"
    CHECK = "check the object it was handed"
    TAKE = "lease the object it was handed"


@dataclass(frozen=True)
class Limits:
    """The numbers of a resource, in objects and seconds; ``None`` is no limit."""

    max_size: int
    min_size: int = 0
    max_idle: float | None = None
    max_lifetime: float | None = None
    max_waiting: int = 0
    max_overtake: float = 0.0


class _Effects:
    """What a step wants done once the lock is free."""

    __slots__ = ("arm", "closes", "loads", "lost", "wakes")

    def __init__(self) -> None:
        self.wakes: list[Waiter] = []
        self.loads: list[Entry] = []
        self.closes: list[Entry] = []
        self.lost: list[BaseException] = []
        self.arm: float | None = None


class Core(ABC):
    """The bookkeeping that exclusive and shared resources have in common."""

    def __init__(self, hooks: Hooks, limits: Limits) -> None:
        self.hooks = hooks
        self.limits = limits
        self.needs_loop = hooks.needs_loop
        self.reaper = _reaper.shared
        self.clock = self.reaper.clock
        self.closed = False
        self._reset()
        _lifecycle.watch(self)

    def _reset(self) -> None:
        self.lock = threading.RLock()
        self.quick_in = self.quick_out = False
        """Whether ``grab`` and ``put`` may act: no queue, not closed, no step under way."""
        self.armed = NEVER
        """When the reaper will call; never later than the first idle object falls due."""
        self.reach = NEVER
        """In how many seconds an object that becomes idle now must be looked at."""
        self.queue: deque[Waiter] = deque()
        self.entries: set[Entry] = set()
        self.granted = 0
        self._busy = False
        self._late: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._effects = _Effects()
        self._loads = self._failures = self._closes = self._timeouts = self._forgotten = 0
        self._load_seconds = self._wait_seconds = self._longest_wait = 0.0
        self._end_step()

    # -- steps ----------------------------------------------------------------------------------

    def _do(self, step: Callable[..., None], *args: Any) -> None:
        effects = None
        try:
            with self.lock:
                if self._busy:
                    self._late.append((step, args))
                    return
                self._busy = True
                self.quick_in = self.quick_out = False
                try:
                    step(*args)
                finally:
                    while self._late:
                        late, late_args = self._late.popleft()
                        late(*late_args)
                    effects, self._effects = self._effects, _Effects()
                    self._busy = False
                    self._end_step()
        finally:
            if effects is not None:
                self._carry_out(effects)

    def _end_step(self) -> None:
        limits = self.limits
        idles_out = limits.max_idle is not None and len(self.entries) > limits.min_size
        self.reach = limits.max_idle if idles_out and limits.max_idle is not None else NEVER
        calm = not self.queue and not self.closed
        self.quick_in = calm and self.hooks.check is None
        self.quick_out = calm and self.hooks.reset is None

    def _carry_out(self, effects: _Effects) -> None:
        for waiter in effects.wakes:
            if not waiter.wake():
                self.abandon(waiter)
        if effects.arm is not None and not self.reaper.arm(self, effects.arm):
            self.armed = NEVER  # the next object that becomes idle tries again
        for error in effects.lost:
            logger.warning("%s: a load that nobody waits for failed: %r", self.hooks.owner, error)
        for entry in effects.loads:
            load_soon(self, entry)
        _each(
            effects.closes,
            lambda entry: close_soon(self.hooks, entry, functools.partial(self.emptied, entry)),
        )

    # -- leasing: called by leases ----------------------------------------------------------------

    @abstractmethod
    def grab(self, lease: Holder) -> bool:
        """The fast path in: lease what is idle; ``False`` when it takes more than that."""

    @abstractmethod
    def put(self, lease: Holder) -> bool:
        """The fast path out; ``False`` when it takes more than to make the object idle."""

    def take(self, waiter: Waiter) -> None:
        """Hand ``waiter`` what there is, or queue it.

        Raises:
            PoolClosed: nothing is handed out any more.
            TooManyWaiting: the queue is full.
            LeaseError: a finalizer leases in the middle of one of this core's own steps.
        """
        with self.lock:
            if self._busy:
                raise LeaseError(
                    f"{self.hooks.owner}: cannot be leased by a finalizer that interrupts it"
                )
        self._do(self._take, waiter)

    def advance(self, waiter: Waiter) -> Step:
        """What ``waiter`` has to do next.

        Raises:
            PoolTimeout: its time is over.
            BaseException: whatever its load raised.
        """
        while True:
            if waiter.error is not None:
                error, waiter.error = waiter.error, None
                raise error
            entry = waiter.entry
            if entry is None:
                if self.clock() < waiter.deadline:
                    return Step.WAIT
                self._do(self._time_out, waiter)
            elif entry.state is not State.READY:
                return Step.LOAD
            elif not (entry.fresh or waiter.checked or self.hooks.check is None):
                return Step.CHECK
            else:
                entry.fresh = False
                return Step.TAKE

    def begin(self, waiter: Waiter) -> Entry:
        """The place that ``waiter`` was handed, whose load now begins."""
        with self.lock:
            entry, waiter.entry = waiter.entry, None
        assert entry is not None
        return entry

    def spoil(self, waiter: Waiter) -> None:
        """The check of the object failed: ``waiter`` keeps the place and fills it anew."""
        self._do(self._spoil, waiter)

    def detach(self, waiter: Waiter) -> Entry:
        """Take the object from ``waiter``, which leaves; whoever calls gives it back."""
        with self.lock:
            entry, waiter.entry = waiter.entry, None
        assert entry is not None
        return entry

    def abandon(self, waiter: Waiter) -> None:
        """``waiter`` leaves; what it was handed in the meantime goes to the next one."""
        self._do(self._abandon, waiter)

    def look_again(self) -> None:
        """Find places that event loops took with them when they were closed."""
        if self.needs_loop or self._late:
            self._do(self._look_again)

    def held(self, lease: Holder) -> Entry:
        """The entry that ``lease`` holds.

        Raises:
            LeaseError: the lease was given back already, or never entered.
        """
        entry = lease.entry
        if entry is UNUSED or entry is RELEASED:
            was = "not entered" if entry is UNUSED else "given back already"
            raise LeaseError(f"{self.hooks.owner}: this lease was {was}; a lease is one-shot")
        return entry

    def release(self, lease: Holder, ok: bool = True) -> None:
        """``lease`` is over; not ``ok``: its object is closed instead of used again.

        Raises:
            LeaseError: the lease was given back already, or never entered.
        """
        with self.lock:
            if self._busy:
                # Called by a garbage collection, which may finalize the lease itself next: it
                # must know now that it is over.
                entry, lease.entry = self.held(lease), RELEASED
                self._late.append((self._returned, (entry, ok)))
                return
        self._do(self._release, lease, ok)

    def give_back(self, entry: Entry, ok: bool) -> None:
        """Like ``release``, for an object that was taken from its waiter by ``detach``."""
        self._do(self._returned, entry, ok)

    def forgotten(self, entry: Entry, ok: bool) -> None:
        """Like ``release``, for a lease that is being garbage collected.

        That can happen in the middle of anything, so this must not wait for the lock: if somebody
        holds it, the next step, or the next waiter that looks again, does what is left to do.
        """
        self._late.append((self._lose, (entry, ok)))
        if self.lock.acquire(blocking=False):
            self.lock.release()
            self._do(_nothing)

    # -- work: called when it is done -----------------------------------------------------------

    def cleared(self, entry: Entry) -> None:
        """The victim of a place is closed; its object is about to be made."""
        self._do(self._cleared, entry)

    def made(self, entry: Entry, obj: Any, seconds: float) -> None:
        """The object of a place is there."""
        self._do(self._made, entry, obj, seconds)

    def failed(self, entry: Entry, error: BaseException) -> None:
        """The object of a place could not be made."""
        self._do(self._failed, entry, error)

    def emptied(self, entry: Entry) -> None:
        """The object of a place is closed, and the place is free."""
        self._do(self._emptied, entry)

    def reap(self) -> None:
        """Close what has been idle, or has lived, for too long. Called by the reaper."""
        self._do(self._reap)

    # -- the end ----------------------------------------------------------------------------------

    def close(self) -> None:
        """Close what is idle now, what is leased when it comes back; waiters get ``PoolClosed``."""
        _each(self._shut_down(), lambda entry: self._finish(entry, close_now))

    def at_exit(self) -> None:
        """Like ``close``, but leave daemon threads waiting: told, they would print tracebacks."""
        _each(self._shut_down(tell=False), lambda entry: self._finish(entry, close_now))

    async def aclose(self) -> None:
        """Like ``close``, without blocking the event loop."""
        await asyncio.gather(*(self._afinish(entry) for entry in self._shut_down()))

    def _shut_down(self, tell: bool = True) -> list[Entry]:
        idle: list[Entry] = []
        self._do(self._shut, idle, tell)
        return idle

    def _finish(self, entry: Entry, close: Callable[[Hooks, Entry], None]) -> None:
        try:
            close(self.hooks, entry)
        finally:
            self.emptied(entry)

    async def _afinish(self, entry: Entry) -> None:
        try:
            await aclose(self.hooks, entry)
        finally:
            self.emptied(entry)

    def after_fork(self) -> list[Any]:
        """Begin empty in a forked child; gives what belongs to the parent."""
        inherited = list(self.entries)
        for entry in inherited:
            entry.state = State.GONE
            entry.expires = -NEVER
        self._reset()
        return inherited

    def stats(self) -> ResourceStats:
        """A snapshot of what there is and what has happened."""
        if self._late:
            self._do(_nothing)
        with self.lock:
            entries = list(self.entries)
            return ResourceStats(
                size=len(entries),
                in_use=sum(entry.state is State.READY and entry.leases > 0 for entry in entries),
                idle=len(self._idle()),
                loading=sum(entry.state is State.LOADING for entry in entries),
                closing=sum(entry.state is State.CLOSING for entry in entries),
                waiting=len(self.queue),
                max_size=self.limits.max_size,
                holders=sum(entry.leases for entry in entries),
                leases=self.granted,
                loads=self._loads,
                load_seconds=self._load_seconds,
                failures=self._failures,
                closed=self._closes,
                timeouts=self._timeouts,
                wait_seconds=self._wait_seconds,
                longest_wait=self._longest_wait,
                forgotten=self._forgotten,
            )

    def __del__(self) -> None:
        # only idle objects can be left: a lease or a load would keep the core alive
        _each(self._idle(), lambda entry: close_soon(self.hooks, entry, _nothing))

    # -- what subclasses decide ------------------------------------------------------------------

    @abstractmethod
    def _idle(self) -> list[Entry]:
        """The objects without a lease."""

    @abstractmethod
    def _serve(self, waiter: Waiter) -> bool:
        """Hand ``waiter`` an object or a place; ``False`` when it has to wait."""

    @abstractmethod
    def _dispatch(self) -> None:
        """Serve the queue as far as it goes."""

    @abstractmethod
    def _shelve(self, entry: Entry) -> None:
        """An object has no lease any more."""

    @abstractmethod
    def _unlink(self, entry: Entry) -> None:
        """A place is not to be found any more: it is leaving, or making room."""

    # -- the steps themselves, under the lock -------------------------------------------------

    def _take(self, waiter: Waiter) -> None:
        limits = self.limits
        if self.closed:
            raise PoolClosed(f"{self.hooks.owner} is closed")
        if self.needs_loop:
            self._sweep()
        if self.queue or not self._serve(waiter):
            if 0 < limits.max_waiting <= len(self.queue):
                raise TooManyWaiting(
                    f"{self.hooks.owner}: {len(self.queue)} callers are waiting already "
                    f"(max_waiting={limits.max_waiting})"
                )
            self.queue.append(waiter)
            self._dispatch()
        self._refill(waiter.loop)

    def _refill(self, loop: asyncio.AbstractEventLoop | None) -> None:
        """Begin to make what ``min_size`` asks for."""
        if self.closed or (self.needs_loop and (loop is None or not loop.is_running())):
            return
        for _ in range(self.limits.min_size - len(self.entries)):
            entry = Entry(None, loop)
            self._add(entry)
            self._effects.loads.append(entry)

    def _add(self, entry: Entry) -> None:
        self.entries.add(entry)
        if len(self.entries) == self.limits.min_size + 1:
            for idle in self._idle():  # from now on, one too many
                self._arm_for(idle)

    def _hand(self, waiter: Waiter, entry: Entry) -> None:
        waiter.entry = entry
        if entry.state is State.READY:
            entry.leases += 1
            self.granted += 1
            now = self.clock()
            waited, waiter.since = now - waiter.since, now
            self._wait_seconds += waited
            self._longest_wait = max(self._longest_wait, waited)
        else:
            entry.waiter = waiter
        self._effects.wakes.append(waiter)

    def _place(self, waiter: Waiter, victim: Entry | None = None) -> Entry:
        """A place for ``waiter`` to fill, a new one or the one where ``victim`` stands."""
        entry = Entry(waiter.key, waiter.loop)
        if victim is not None:
            self._unlink(victim)
            self.entries.remove(victim)
            entry.victim = victim
            entry.state = State.CLOSING
        self._add(entry)
        return entry

    def _time_out(self, waiter: Waiter) -> None:
        if waiter.entry is not None or waiter.error is not None:
            return  # served in the last moment
        self._timeouts += 1
        self._abandon(waiter)
        in_use = sum(entry.leases > 0 for entry in self.entries)
        raise PoolTimeout(
            f"{self.hooks.owner}: nothing came free within {waiter.timeout:g} s "
            f"({in_use} of {self.limits.max_size} in use, {len(self.queue)} more waiting)"
        )

    def _abandon(self, waiter: Waiter) -> None:
        waiter.gone = True
        entry, waiter.entry = waiter.entry, None
        if entry is None:
            try:
                self.queue.remove(waiter)
            except ValueError:
                return  # it waited for a load of its own, which goes on
            self._dispatch()  # others may have had to let it pass
        elif entry.state is State.READY:
            self._returned(entry, not waiter.suspect)
        elif entry.state is not State.GONE:
            self._discard(entry)

    def _discard(self, entry: Entry) -> None:
        """Free a place that nobody is going to fill."""
        self._unlink(entry)
        self.entries.remove(entry)
        victim, entry.victim, entry.waiter = entry.victim, None, None
        entry.state = State.GONE
        if victim is not None:
            self.entries.add(victim)
            self._leave(victim)
        self._dispatch()

    def _spoil(self, waiter: Waiter) -> None:
        entry = waiter.entry
        if entry is None or entry.state is not State.READY:
            return
        entry.leases = 0
        self.granted -= 1
        if self.closed:
            waiter.entry = None
            waiter.error = PoolClosed(f"{self.hooks.owner} is closed")
            self._retire(entry)
        else:
            entry.state = State.CLOSING
            place = self._place(waiter, entry)
            place.waiter = waiter
            waiter.entry = place

    def _release(self, lease: Holder, ok: bool) -> None:
        entry = self.held(lease)
        lease.entry = RELEASED
        self._returned(entry, ok)

    def _lose(self, entry: Entry, ok: bool) -> None:
        self._forgotten += 1
        self._returned(entry, ok)

    def _returned(self, entry: Entry, ok: bool) -> None:
        if entry.state is not State.READY:
            return  # inherited through fork: the parent's
        entry.leases -= 1
        if entry.leases:
            return
        now = self.clock()
        if not ok or self.closed or now >= entry.expires:
            self._retire(entry)
        else:
            self._rest(entry, now)

    def _rest(self, entry: Entry, now: float) -> None:
        """Make an object available, and see to it that it will not stay idle for too long."""
        entry.idle_since = now
        self._shelve(entry)
        self._dispatch()
        if entry.state is State.READY and not entry.leases:
            self._arm_for(entry)

    def _arm_for(self, entry: Entry) -> None:
        limits = self.limits
        deadline = entry.expires
        if limits.max_idle is not None and len(self.entries) > limits.min_size:
            deadline = min(deadline, entry.idle_since + limits.max_idle)
        self._arm(deadline)

    def _arm(self, deadline: float) -> None:
        if deadline < self.armed:
            self.armed = self._effects.arm = deadline

    def _retire(self, entry: Entry) -> None:
        """Close an object that nobody has leased."""
        self._unlink(entry)
        self._leave(entry)

    def _leave(self, entry: Entry) -> None:
        entry.state = State.CLOSING
        self._effects.closes.append(entry)

    def _cleared(self, entry: Entry) -> None:
        entry.victim = None
        if entry.state is State.CLOSING:
            entry.state = State.LOADING
            self._closes += 1

    def _made(self, entry: Entry, obj: Any, seconds: float) -> None:
        waiter, entry.waiter = entry.waiter, None
        entry.obj = obj
        if entry.state is State.GONE:
            self._effects.closes.append(entry)
            self._tell(waiter, ResourceError(f"{self.hooks.owner}: the load came too late"))
            return
        self._loads += 1
        self._load_seconds += seconds
        entry.state = State.READY
        now = self.clock()
        if self.limits.max_lifetime is not None:
            entry.expires = now + self.limits.max_lifetime
        if self.closed:
            self._retire(entry)
            self._tell(waiter, PoolClosed(f"{self.hooks.owner} is closed"))
        elif waiter is not None and waiter.alive():
            entry.fresh = True
            self._hand(waiter, entry)
            self._dispatch()  # others may have waited for the same object
        else:
            self._rest(entry, now)

    def _failed(self, entry: Entry, error: BaseException) -> None:
        waiter, entry.waiter = entry.waiter, None
        self._failures += 1
        entry.victim = None
        if entry.state is not State.GONE:
            if entry.state is State.CLOSING:
                self._closes += 1
            self._unlink(entry)
            self.entries.remove(entry)
            entry.state = State.GONE
        if not self._tell(waiter, error):
            self._effects.lost.append(error)
        self._dispatch()

    def _tell(self, waiter: Waiter | None, error: BaseException) -> bool:
        if waiter is None or not waiter.alive():
            return False
        waiter.error = error
        self._effects.wakes.append(waiter)
        return True

    def _emptied(self, entry: Entry) -> None:
        if entry.state is State.CLOSING and entry in self.entries:
            self.entries.remove(entry)
            entry.state = State.GONE
            entry.obj = None
            self._closes += 1
            self._dispatch()
            self._refill(entry.loop)

    def _look_again(self) -> None:
        self._sweep()
        self._dispatch()

    def _sweep(self) -> None:
        """Drop what belongs to event loops that have been closed."""
        for entry in [e for e in self.entries if e.loop is not None and e.loop.is_closed()]:
            if entry.state is State.READY:
                if entry.leases:
                    continue  # its task is finalized sooner or later, and gives it back
                self._effects.closes.append(entry)
                self._closes += 1
            elif entry.state is State.CLOSING:
                self._closes += 1
            self._unlink(entry)
            self.entries.remove(entry)
            entry.state = State.GONE

    def _reap(self) -> None:
        self.armed = NEVER
        if self.needs_loop:
            self._sweep()
        limits, now = self.limits, self.clock()
        kept = []
        for entry in self._idle():
            if now >= entry.expires:
                self._retire(entry)
            else:
                kept.append(entry)
        leaving = sum(entry.state is State.CLOSING for entry in self.entries)
        spare = len(self.entries) - leaving - limits.min_size
        for entry in sorted(kept, key=lambda entry: entry.idle_since):
            deadline = entry.expires
            if limits.max_idle is not None and spare > 0:
                deadline = min(deadline, entry.idle_since + limits.max_idle)
            if deadline <= now:
                self._retire(entry)
                spare -= 1
            else:
                self._arm(deadline)
        self._dispatch()

    def _shut(self, idle: list[Entry], tell: bool) -> None:
        self.closed = True
        idle.extend(self._idle())
        for entry in idle:
            self._unlink(entry)
            entry.state = State.CLOSING
        waiting = list(self.queue)
        self.queue.clear()
        for entry in self.entries:
            if entry.waiter is not None:
                waiting.append(entry.waiter)
                entry.waiter = None
        for waiter in waiting if tell else ():
            self._tell(waiter, PoolClosed(f"{self.hooks.owner} was closed"))


def _nothing() -> None:
    pass


def _each(entries: Iterable[Entry], action: Callable[[Entry], None]) -> None:
    """``action`` for every entry, also when one of them is interrupted (Ctrl-C)."""
    pending = iter(entries)
    for entry in pending:
        try:
            action(entry)
        except BaseException:
            _each(pending, action)
            raise
