"""What decides: who gets which object, who waits, what is loaded and what is closed.

A ledger keeps the books of one resource. Each of its methods is one step: it changes the books,
collects what is to happen in the world (wake a waiter, start a load, close an object) as effects,
and returns. It never blocks, never calls a user's function, and knows neither threads nor locks;
``_core`` runs the steps one at a time and carries out the effects.

Hand-over: whoever gives an object back assigns it to the next waiter in the same step, so nobody
can come in between. A waiter is handed either a ready object or a place that it must fill itself.
"""

from __future__ import annotations

import asyncio
import itertools
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from random import random
from typing import Any

from langgraph_perf.errors import PoolClosed, PoolTimeout, ResourceError, TooManyWaiting
from langgraph_perf.resources._entry import NEVER, RELEASED, Entry, State
from langgraph_perf.resources._hooks import Hooks
from langgraph_perf.resources._stats import ResourceStats
from langgraph_perf.resources._waiters import Waiter

LIFETIME_SPREAD = 0.1
"""By which fraction of ``max_lifetime`` an object may live shorter, at random, as in psycopg_pool:
what was made together is not replaced together."""


@dataclass(frozen=True)
class Limits:
    """The numbers of a resource, in objects and seconds; ``None`` is no limit."""

    max_size: int
    min_size: int = 0
    max_idle: float | None = None
    max_lifetime: float | None = None
    max_waiting: int = 0
    max_overtake: float = 0.0


class Effects:
    """What a step wants done after it.

    Attributes:
        wakes: waiters that have been told something.
        loads: places to fill for nobody in particular.
        closes: objects to close.
        lost: errors of loads that nobody waits for.
        arm: when the reaper is to call.
        reaped: the step was the reaper's, whose thread must not run the users' functions.
    """

    __slots__ = ("arm", "closes", "loads", "lost", "reaped", "wakes")

    def __init__(self) -> None:
        self.wakes: list[Waiter] = []
        self.loads: list[Entry] = []
        self.closes: list[Entry] = []
        self.lost: list[BaseException] = []
        self.arm: float | None = None
        self.reaped = False


class Ledger(ABC):
    """The books that exclusive and shared resources have in common.

    Attributes:
        armed: when the reaper will call; never later than the first idle object falls due.
        reach: in how many seconds an object that becomes idle now must be looked at.
        queue: who waits, in the order in which they came, and everybody's number in it.
        entries: all places that count towards ``max_size``.
        granted: leases so far.
    """

    def __init__(self, hooks: Hooks, limits: Limits, clock: Callable[[], float]) -> None:
        self.hooks = hooks
        self.limits = limits
        self.clock = clock
        self.needs_loop = hooks.needs_loop
        self.closed = False
        self._reset()

    def _reset(self) -> None:
        """Begin with empty books."""
        self.armed = self.reach = NEVER
        self.queue: OrderedDict[Waiter, int] = OrderedDict()
        self._turns = itertools.count()
        self.entries: set[Entry] = set()
        self.granted = 0
        self._effects = Effects()
        self._loads = self._failures = self._closes = self._timeouts = self._forgotten = 0
        self._load_seconds = self._wait_seconds = self._longest_wait = 0.0

    # -- what subclasses decide ------------------------------------------------------------------

    @abstractmethod
    def _idle(self) -> list[Entry]:
        """The objects without a lease."""

    @abstractmethod
    def _serve(self, waiter: Waiter) -> bool:
        """Hand ``waiter`` an object or a place; ``False`` when it has to wait."""

    @abstractmethod
    def _serve_at_once(self, waiter: Waiter) -> bool:
        """Like ``_serve``, for somebody who has just come: ``False`` when others are first."""

    @abstractmethod
    def _enqueued(self, waiter: Waiter) -> None:
        """``waiter`` has joined the queue."""

    def _withdraw(self, waiter: Waiter) -> bool:
        """Take ``waiter`` out of the queue; ``False`` if it is not in it."""
        return self.queue.pop(waiter, None) is not None

    @abstractmethod
    def _dispatch(self) -> None:
        """Serve the queue as far as it goes."""

    @abstractmethod
    def _shelve(self, entry: Entry) -> None:
        """An object has no lease any more."""

    @abstractmethod
    def _unlink(self, entry: Entry) -> None:
        """A place is not to be found any more: it is leaving, or making room."""

    @abstractmethod
    def _relink(self) -> None:
        """Make what can be found agree with ``entries`` and ``queue``."""

    # -- the steps --------------------------------------------------------------------------------

    def _take(self, waiter: Waiter) -> None:
        limits = self.limits
        if self.closed:
            raise PoolClosed(f"{self.hooks.owner} is closed")
        if self.needs_loop:
            self._sweep()
        if not self._serve_at_once(waiter):
            if 0 < limits.max_waiting <= len(self.queue):
                raise TooManyWaiting(
                    f"{self.hooks.owner}: {len(self.queue)} callers are waiting already "
                    f"(max_waiting={limits.max_waiting})"
                )
            self.queue[waiter] = next(self._turns)
            self._enqueued(waiter)
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
        self._effects.wakes.append(waiter)
        if entry.state is not State.READY:
            waiter.entry, entry.waiter = entry, waiter
            return
        now = self.clock()
        waited, waiter.since = now - waiter.since, now
        self._wait_seconds += waited
        self._longest_wait = max(self._longest_wait, waited)
        self.granted += 1
        # without a call in between: how many hold an object, and who, always agree
        entry.leases += 1
        waiter.entry = entry

    def _place(self, waiter: Waiter, victim: Entry | None = None) -> Entry:
        """A place for ``waiter`` to fill, a new one or the one where ``victim`` stands."""
        entry = Entry(waiter.key, waiter.loop)
        if victim is None:
            self._add(entry)
        else:
            entry.victim, entry.state = victim, State.CLOSING
            self.entries.add(entry)
            self._unlink(victim)
            self.entries.remove(victim)
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
        entry = waiter.entry
        if entry is None:
            # if it is not there, it waited for a load of its own, which goes on
            if self._withdraw(waiter):
                self._dispatch()  # others may have had to let it pass
        elif entry.state is State.READY:
            self._returned(entry, not waiter.suspect, waiter)
        else:
            waiter.entry = None
            if entry.state is not State.GONE:
                self._discard(entry)

    def _discard(self, entry: Entry) -> None:
        """Free a place that nobody is going to fill."""
        victim = entry.victim
        if victim is not None and not victim.leases:
            self._unlink(victim)
            self.entries.add(victim)
            self._leave(victim)
        entry.victim, entry.waiter, entry.state = None, None, State.GONE
        self._unlink(entry)
        self.entries.discard(entry)
        self._dispatch()

    def _spoil(self, waiter: Waiter) -> None:
        entry = waiter.entry
        if entry is None or entry.state is not State.READY:
            return
        self.granted -= 1
        if self.closed:
            waiter.error = PoolClosed(f"{self.hooks.owner} is closed")
            self._returned(entry, False, waiter)
        else:
            place = Entry(waiter.key, waiter.loop)
            place.victim, place.waiter, place.state = entry, waiter, State.CLOSING
            self.entries.add(place)
            entry.leases, entry.state, waiter.entry = 0, State.CLOSING, place
            self.entries.remove(entry)

    def _lose(self, entry: Entry, ok: bool) -> None:
        self._forgotten += 1
        self._returned(entry, ok)

    def _returned(self, entry: Entry, ok: bool, by: Any = None) -> None:
        """One lease of ``entry`` is over: that of ``by``, a lease or a waiter, if it is known."""
        now = self.clock()
        ready = entry.state is State.READY  # if not, it was inherited through fork: the parent's
        none = None if isinstance(by, Waiter) else RELEASED
        # without a call in between: how many hold an object, and who, always agree
        if by is not None:
            by.entry = none
        if not ready:
            return
        entry.leases -= 1
        if entry.leases:
            return
        if not ok:
            entry.expires = -NEVER
        entry.idle_since = now
        self._settle(entry)

    def _settle(self, entry: Entry) -> None:
        """Make an object that nobody leases available, or close it."""
        if self.closed or entry.idle_since >= entry.expires:
            self._retire(entry)
        else:
            self._rest(entry)

    def _rest(self, entry: Entry) -> None:
        """Make an object available, and see to it that it will not stay idle for too long."""
        entry.fresh = False  # whoever it was made for has not come for it
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
        entry.state, entry.begun = State.CLOSING, False
        self._effects.closes.append(entry)

    def _cleared(self, entry: Entry) -> None:
        entry.victim = None
        if entry.state is State.CLOSING:
            entry.state = State.LOADING
            self._closes += 1

    def _made(self, entry: Entry, obj: Any, seconds: float) -> None:
        now = self.clock()
        if self.limits.max_lifetime is not None:
            entry.expires = now + self.limits.max_lifetime * (1 - LIFETIME_SPREAD * random())
        waiter, entry.waiter, entry.begun = entry.waiter, None, False
        entry.obj = obj
        if entry.state is State.GONE:
            self._effects.closes.append(entry)
            self._tell(waiter, ResourceError(f"{self.hooks.owner}: the load came too late"))
            return
        self._loads += 1
        self._load_seconds += seconds
        entry.idle_since, entry.state = now, State.READY
        if self.closed:
            self._retire(entry)
            self._tell(waiter, PoolClosed(f"{self.hooks.owner} is closed"))
        elif waiter is not None and waiter.alive():
            entry.fresh = True
            self._hand(waiter, entry)
            self._dispatch()  # others may have waited for the same object
        else:
            self._rest(entry)

    def _failed(self, entry: Entry, error: BaseException) -> None:
        self._failures += 1
        if entry.state is State.CLOSING:
            self._victim_left(entry)
        waiter, entry.waiter = entry.waiter, None
        entry.victim, entry.state = None, State.GONE
        self._unlink(entry)
        self.entries.discard(entry)
        if not self._tell(waiter, error):
            self._effects.lost.append(error)
        self._dispatch()

    def _victim_left(self, place: Entry) -> None:
        """What was to make room for ``place`` goes all the same: it has been taken out already."""
        if place.victim is None or place.victim.begun:
            self._closes += 1
        else:
            self.entries.add(place.victim)
            self._leave(place.victim)

    def _tell(self, waiter: Waiter | None, error: BaseException) -> bool:
        if waiter is None or not waiter.alive():
            return False
        waiter.error = error
        self._effects.wakes.append(waiter)
        return True

    def _emptied(self, entry: Entry) -> None:
        if entry.state is State.CLOSING and entry in self.entries:
            self._closes += 1
            entry.obj, entry.state = None, State.GONE
            self.entries.remove(entry)
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
                self._victim_left(entry)
            self._unlink(entry)
            self.entries.remove(entry)
            entry.victim, entry.state = None, State.GONE

    def _reap(self) -> None:
        self.armed = NEVER
        self._effects.reaped = True
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
        for entry in self._idle():
            self._unlink(entry)
            idle.append(entry)
            entry.state, entry.begun = State.CLOSING, False
        waiting = list(self.queue)
        self.queue.clear()
        self._relink()
        for entry in self.entries:
            if entry.waiter is not None:
                waiting.append(entry.waiter)
                entry.waiter = None
        for waiter in waiting if tell else ():
            self._tell(waiter, PoolClosed(f"{self.hooks.owner} was closed"))

    # -- after Ctrl-C -----------------------------------------------------------------------------

    def _effects_again(self, effects: Effects) -> None:
        """Collect once more what could not be carried out to its end."""
        ours = self._effects
        ours.wakes += effects.wakes
        ours.loads += effects.loads
        ours.closes += effects.closes
        if effects.arm is not None:
            ours.arm = effects.arm if ours.arm is None else min(ours.arm, effects.arm)

    def _mend(self) -> None:
        """Bring the books in order that a step has left half done.

        What counts is what changes without a call in between: the state of each entry, and who
        holds it. From that follows all the rest.
        """
        effects = self._effects
        self.entries = {entry for entry in self.entries if entry.state is not State.GONE}
        for waiter in [w for w in self.queue if w.gone or w.entry or w.error]:
            del self.queue[waiter]
        self._relink()
        for entry in list(self.entries):
            if entry.state is State.READY:
                if not entry.leases and (self.closed or entry.idle_since >= entry.expires):
                    self._retire(entry)
            elif entry.begun:
                continue  # whoever began reports the end
            elif entry.state is State.LOADING or entry.victim is not None:
                unwanted = entry.waiter is None or entry.waiter.gone
                if unwanted and entry not in effects.loads:
                    self._discard(entry)
            elif entry not in effects.closes:
                effects.closes.append(entry)
        self.armed = NEVER
        for entry in self._idle():
            self._arm_for(entry)
        self._dispatch()

    def _snapshot(self) -> ResourceStats:
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
