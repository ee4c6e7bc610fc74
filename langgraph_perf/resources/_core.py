"""Runs the steps of a ledger one at a time, and carries out what they decide.

Each step runs under one lock; its effects are carried out after the lock is free. Threads and
tasks only differ in how they wait, see ``_lease``.

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
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from langgraph_perf.errors import LeaseError, ResourceError
from langgraph_perf.resources import _lifecycle, _reaper
from langgraph_perf.resources._entry import ENTERING, NEVER, RELEASED, UNUSED, Entry, State
from langgraph_perf.resources._hooks import Hooks
from langgraph_perf.resources._ledger import Effects, Ledger, Limits
from langgraph_perf.resources._stats import ResourceStats
from langgraph_perf.resources._waiters import Waiter
from langgraph_perf.resources._work import (
    CLOSE_GRACE,
    aclose,
    bury,
    close_now,
    close_soon,
    load_soon,
    spawn,
)

logger = logging.getLogger("langgraph_perf")

LAST_GRACE = 0.01
"""Seconds that ``close`` grants to each async close for which there is no time left."""


class Holder(Protocol):
    """A lease, as far as a core touches it."""

    entry: Entry
    loop: asyncio.AbstractEventLoop | None
    key: Any


class Step(enum.Enum):
    """What a waiter has to do next."""

    WAIT = "sleep until woken"
    LOAD = "fill the place it was handed"
    CHECK = "check the object it was handed"
    TAKE = "lease the object it was handed"


class Core(Ledger):
    """A ledger that many threads and event loops can use at once."""

    def __init__(self, hooks: Hooks, limits: Limits) -> None:
        self.reaper = _reaper.shared
        super().__init__(hooks, limits, self.reaper.clock)
        _lifecycle.watch(self)

    def _reset(self) -> None:
        super()._reset()
        self.lock = threading.RLock()
        self._busy = self._torn = False
        self._late: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._end_step()

    # -- steps ----------------------------------------------------------------------------------

    # Ctrl-C may end a step, and what is around it, at any call. So what must not be left undone is
    # done without one, a step that was torn is mended at the beginning of the next, and until then
    # the fast paths stay closed.

    def _do(self, step: Callable[..., None], *args: Any) -> None:
        effects, fresh = None, Effects()
        try:
            with self.lock:
                if self._busy:
                    self._late.append((step, args))
                    return
                self._busy = True
                self.quick_in = self.quick_out = False
                try:
                    if self._torn:
                        self._mend()
                    self._torn = True
                    try:
                        step(*args)
                    finally:
                        while self._late:
                            late, late_args = self._late.popleft()
                            late(*late_args)
                    self._end_step()
                except ResourceError:  # a step's answer
                    self._end_step()
                    raise
                finally:
                    effects, self._effects, self._busy = self._effects, fresh, False
        finally:
            if effects is not None:
                try:
                    self._carry_out(effects)
                except Exception:
                    raise
                except BaseException:  # Ctrl-C: once more, which repeats nothing that has begun
                    self._do(self._effects_again, effects)
                    raise

    def _end_step(self) -> None:
        """Say what the fast paths may do: nothing but the obvious, so no queue and not closed."""
        limits = self.limits
        idles_out = limits.max_idle is not None and len(self.entries) > limits.min_size
        self.reach = limits.max_idle if idles_out and limits.max_idle is not None else NEVER
        calm = not self.queue and not self.closed
        self.quick_in = calm and self.hooks.check is None
        self.quick_out = calm and self.hooks.reset is None
        self._torn = False

    def _carry_out(self, effects: Effects) -> None:
        for waiter in effects.wakes:
            if not waiter.wake():
                self.abandon(waiter)
        if effects.arm is not None and not self.reaper.arm(self, effects.arm):
            self.armed = NEVER  # the next object that becomes idle tries again
        while effects.lost:
            logger.warning(
                "%s: a load that nobody waits for failed: %r",
                self.hooks.owner,
                effects.lost.pop(),
            )
        for entry in effects.loads:
            load_soon(self, entry)
        run = self.reaper.run if effects.reaped else None
        _each(
            effects.closes,
            lambda entry: close_soon(
                self.hooks, entry, functools.partial(self.emptied, entry), run
            ),
        )

    # -- leasing: called by leases ----------------------------------------------------------------

    def entered(self, lease: Holder) -> None:
        """``lease`` holds what it asked for."""

    def take(self, waiter: Waiter) -> None:
        """Hand ``waiter`` what there is, or queue it.

        Raises:
            PoolClosed: nothing is handed out any more.
            TooManyWaiting: the queue is full.
            LeaseError: a finalizer leases in the middle of one of this core's own steps.
        """
        if self.needs_loop:
            bury()
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
        """The place that ``waiter`` was handed, whose load now begins.

        Its end must be reported: by ``made`` or by ``failed``, after Ctrl-C too.
        """
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
        waiter.gone = True
        self._do(self._abandon, waiter)

    def look_again(self) -> None:
        """Find places that event loops took with them when they were closed."""
        if self.needs_loop:
            bury()
        if self.needs_loop or self._late or self._torn:
            self._do(self._look_again)

    def held(self, lease: Holder) -> Entry:
        """The entry that ``lease`` holds.

        Raises:
            LeaseError: the lease was given back already, or never entered.
        """
        entry = lease.entry
        if entry is UNUSED or entry is RELEASED or entry is ENTERING:
            was = "given back already" if entry is RELEASED else "not entered"
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
                entry = self.held(lease)
                lease.entry = RELEASED
                self._late.append((self._returned, (entry, ok)))
                return
        self._do(self._release, lease, ok)

    def _release(self, lease: Holder, ok: bool) -> None:
        self._returned(self.held(lease), ok, lease)

    def give_back(self, entry: Entry, ok: bool) -> None:
        """Like ``release``, for an object that was taken from its waiter by ``detach``."""
        self._do(self._returned, entry, ok)

    def forgotten(self, entry: Entry, ok: bool) -> None:
        """Like ``release``, for a lease that is being garbage collected.

        That can happen in the middle of anything, so this must not wait for the lock: if somebody
        holds it, the next step, or the next waiter that looks again, does what is left to do.
        """
        self._late.append((self._lose, (entry, ok)))
        # nor must it close anything while its own thread holds the lock, in a fast path, say
        if not self.lock._is_owned() and self.lock.acquire(blocking=False):  # type: ignore[attr-defined]
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
        self._bury()
        deadline = time.monotonic() + CLOSE_GRACE

        def finish(entry: Entry) -> None:
            # what has begun by then is not waited for, but it is begun
            self._finish(entry, max(LAST_GRACE, deadline - time.monotonic()))

        _each(self._shut_down(), finish)

    def at_exit(self, deadline: float) -> None:
        """Like ``close``, but leave daemon threads waiting: told, they would print tracebacks."""

        def finish(entry: Entry) -> None:
            self._finish(entry, max(0.0, deadline - time.monotonic()))

        _each(self._shut_down(tell=False), finish)

    async def aclose(self) -> None:
        """Like ``close``, without blocking the event loop. When cancelled, the closes go on."""
        self._bury()
        closes: list[asyncio.Task[None]] = []

        def start(entry: Entry) -> None:
            # no longer in the pool, so it is now or never
            settle = functools.partial(self._close_if_unbegun, entry)
            closes.append(spawn(self._afinish(entry), settle))

        _each(self._shut_down(), start)
        if closes:
            await asyncio.wait(closes)  # which are not cancelled with this one
        for close in closes:
            if not close.cancelled():
                close.result()

    def _bury(self) -> None:
        if self.needs_loop:
            bury()

    def _shut_down(self, tell: bool = True) -> list[Entry]:
        idle: list[Entry] = []
        self._do(self._shut, idle, tell)
        return idle

    def _finish(self, entry: Entry, grace: float) -> None:
        if entry.claim():
            try:
                close_now(self.hooks, entry, grace)
            finally:
                try:
                    self.emptied(entry)
                except BaseException:  # Ctrl-C at the wrong moment; a second time does no harm
                    self.emptied(entry)
                    raise

    async def _afinish(self, entry: Entry) -> None:
        if entry.claim():
            try:
                await aclose(self.hooks, entry)
            finally:
                self.emptied(entry)

    def _close_if_unbegun(self, entry: Entry) -> None:
        """Close an object all the same whose task was cancelled before its first step."""
        if not entry.begun:
            close_soon(self.hooks, entry, functools.partial(self.emptied, entry))

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
            return self._snapshot()

    def __del__(self) -> None:
        # only idle objects can be left: a lease or a load would keep the core alive
        _each(self._idle(), lambda entry: close_soon(self.hooks, entry, _nothing))


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
