"""Leases: the two thin drivers (blocking, awaiting) of what a core decides. Their fast paths are
beside the core whose state they change.

A lease is used once, as a context manager. One that is garbage collected while it holds something
is warned about, with where it was taken, and what it held is recovered.
"""

from __future__ import annotations

import asyncio
import functools
import sys
import time
import warnings
from abc import abstractmethod
from collections.abc import Hashable
from types import CodeType, TracebackType
from typing import Any, Generic, TypeVar

from langgraph_perf._progress import Heartbeat, beat_seconds
from langgraph_perf.errors import ConfigurationError, LeaseError
from langgraph_perf.resources import _offload
from langgraph_perf.resources._core import Core, Step
from langgraph_perf.resources._entry import (
    ENTERING,
    FORGOTTEN,
    NEVER,
    RELEASED,
    UNUSED,
    Entry,
    State,
)
from langgraph_perf.resources._hooks import Hooks, passed
from langgraph_perf.resources._waiters import TaskWaiter, ThreadWaiter, Waiter
from langgraph_perf.resources._work import end_load, load, load_soon, off_loop, running_loop, spawn
from langgraph_perf.resources._wrong_with import OnlyAsync, OnlySync

T = TypeVar("T")

LOOK_AGAIN_SECONDS = 1.0
"""How often, at least, a waiter looks again without having been woken: to find what an event loop
took with it when it was closed."""

_SLOWLY: Any = object()


class BaseLease(Generic[T]):
    """What both kinds of lease have in common.

    Attributes:
        key: which object; ``None`` where there are no keys.
        loop: the event loop the object must belong to; ``None`` if any object will do.
        timeout: seconds to wait at most; ``None`` for no limit.
        heartbeat: called some twenty times a second while waiting.
        code, at: the place in the program that took the lease, or in words who did (not the frame:
            it would keep its variables alive).

    Made by ``CoreResource`` without a constructor, which would take a quarter of a checkout's time.
    """

    __slots__ = (
        "__weakref__",
        "at",
        "code",
        "core",
        "entry",
        "heartbeat",
        "key",
        "leaving",
        "loop",
        "timeout",
    )

    core: Core
    entry: Entry
    key: Hashable
    loop: asyncio.AbstractEventLoop | None
    timeout: float | None
    heartbeat: Heartbeat | None
    code: CodeType | str
    at: int
    leaving: bool

    def __del__(self) -> None:
        try:
            entry = self.entry
        except AttributeError:  # Ctrl-C while it was made
            return
        if entry is not RELEASED and entry is not UNUSED and entry.state is State.READY:
            _recover(self, entry)

    @abstractmethod
    def enter(self) -> Any:
        """The object: the fast path, of what is idle. ``enter_slowly()`` if it takes more."""

    @abstractmethod
    def enter_slowly(self) -> Any:
        """What ``enter`` gives when it takes more than the fast path."""

    @abstractmethod
    def leave(self, exc_type: Any = None, exc: Any = None, tb: Any = None) -> Any:
        """Give the object back; ``leave_slowly()`` if it takes more than to make it idle."""

    @abstractmethod
    def leave_slowly(self) -> Any:
        """What ``leave`` gives when it takes more than the fast path."""

    def _nap(self, waiter: Waiter) -> float:
        """How long ``waiter`` may sleep before it looks again."""
        left = waiter.deadline - self.core.clock()
        return max(0.0, min(LOOK_AGAIN_SECONDS, beat_seconds(self.heartbeat), left))

    def _beat(self, waiter: Waiter) -> None:
        if waiter.entry is None and waiter.error is None:
            if self.heartbeat is not None:
                self.heartbeat()
            if time.monotonic() - waiter.looked >= LOOK_AGAIN_SECONDS:
                waiter.looked = time.monotonic()
                self.core.look_again()

    def _begin_entering(self) -> None:
        with self.core.lock:  # another thread may be in the middle of a fast path
            if self.entry is not UNUSED:
                raise LeaseError(
                    f"{self.core.hooks.owner}: this lease was entered already; a lease is one-shot"
                )
            self.entry = ENTERING

    def _begin_leaving(self) -> Any:
        """The object, which is about to be reset; whoever calls this gives it back afterwards."""
        with self.core.lock:
            entry = self.core.held(self)
            if getattr(self, "leaving", False):
                raise LeaseError(
                    f"{self.core.hooks.owner}: this lease is being given back; a lease is one-shot"
                )
            self.leaving = True
            return entry.obj


class Lease(OnlySync, BaseLease[T]):
    """A lease for ``with``: gives the object, and gives it back on the way out."""

    __slots__ = ()

    @abstractmethod
    def __enter__(self) -> T:
        """``enter``."""

    @abstractmethod
    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        """``leave``."""

    def enter_slowly(self) -> Any:
        self._acquire()
        return self.entry.obj

    def leave_slowly(self) -> None:
        core = self.core
        if core.hooks.reset is None or core.held(self).state is State.GONE:
            core.release(self)
        else:
            _reset(self, self._begin_leaving())

    def _acquire(self) -> None:
        self._begin_entering()
        core = self.core
        waiter = ThreadWaiter(self.key, core.clock(), _limit(self.timeout))
        try:
            core.take(waiter)
            while (step := core.advance(waiter)) is not Step.TAKE:
                if step is Step.WAIT:
                    if running_loop() is not None:
                        core.hooks.log_blocked_loop()
                    waiter.wait(self._nap(waiter))
                    self._beat(waiter)
                elif step is Step.LOAD:
                    self._load(waiter)
                else:
                    self._check(waiter)
            assert waiter.entry is not None
            self.entry, waiter.entry = waiter.entry, None
            core.entered(self)
        except BaseException:
            if self.entry is ENTERING:
                self.entry = UNUSED
            core.abandon(waiter)
            raise

    def _load(self, waiter: ThreadWaiter) -> None:
        core, place = self.core, waiter.entry
        assert place is not None
        try:
            load(core, core.begin(waiter))
        except BaseException as exc:  # Ctrl-C before, or after, what load() itself sees to
            if waiter.entry is None and place.waiter is waiter:
                place.begun = True
                end_load(core, place, exc)
            raise

    def _check(self, waiter: ThreadWaiter) -> None:
        assert waiter.entry is not None
        waiter.suspect = True
        waiter.checked = _passes(self.core.hooks, waiter.entry)
        waiter.suspect = False
        if not waiter.checked:
            self.core.spoil(waiter)


class AsyncLease(OnlyAsync, BaseLease[T]):
    """A lease for ``async with``: gives the object, and gives it back on the way out."""

    __slots__ = ()

    async def __aenter__(self) -> T:
        if self.core.needs_loop:
            self.loop = asyncio.get_running_loop()
        obj = self.enter()
        if obj is _SLOWLY:
            await self._acquire()
            obj = self.entry.obj
        return obj  # type: ignore[no-any-return]

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if self.leave() is not _SLOWLY:
            return
        core = self.core
        if core.hooks.reset is None or core.held(self).state is State.GONE:
            core.release(self)
            return
        obj = self._begin_leaving()
        if exc_type is GeneratorExit:
            core.release(self, False)  # the task is being destroyed: it cannot await a reset
        elif core.hooks.async_reset:
            settle = functools.partial(_unfit, self)
            task = spawn(_areset(self, obj), settle)
            await asyncio.wait([task])  # which is not cancelled with this one, nor the other way
            if not task.cancelled():
                task.result()
        else:
            await off_loop(functools.partial(_reset, self, obj))

    def enter_slowly(self) -> Any:
        return _SLOWLY  # which has to be awaited

    def leave_slowly(self) -> Any:
        return _SLOWLY

    async def _acquire(self) -> None:
        self._begin_entering()
        core = self.core
        waiter = TaskWaiter(self.key, self.loop, core.clock(), _limit(self.timeout))
        try:
            core.take(waiter)
            while (step := core.advance(waiter)) is not Step.TAKE:
                if step is Step.WAIT:
                    await waiter.wait(self._nap(waiter))
                    self._beat(waiter)
                elif step is Step.LOAD:
                    # in a task of its own: the load goes on when this one is cancelled
                    load_soon(core, core.begin(waiter))
                else:
                    await self._check(waiter)
            assert waiter.entry is not None
            self.entry, waiter.entry = waiter.entry, None
            core.entered(self)
        except BaseException:
            if self.entry is ENTERING:
                self.entry = UNUSED
            core.abandon(waiter)
            raise

    async def _check(self, waiter: TaskWaiter) -> None:
        assert waiter.entry is not None
        core, hooks, entry = self.core, self.core.hooks, waiter.entry
        waiter.suspect = True
        left_behind = False
        job: Any
        answer: asyncio.Future[bool]
        if hooks.async_check:

            def settle() -> None:
                nonlocal left_behind
                if left_behind:
                    left_behind = False  # once: by now somebody else may have it
                    core.give_back(entry, _answer(job))

            answer = job = spawn(_apasses(hooks, entry), settle)
        else:
            job = _offload.shared.submit(functools.partial(_passes, hooks, entry))
            answer = asyncio.wrap_future(job)

        def leave() -> None:
            # the check still uses the object: it comes back when that is over
            nonlocal left_behind
            core.detach(waiter)
            left_behind = True
            if job is not answer:
                job.add_done_callback(lambda job: core.give_back(entry, _answer(job)))
            elif job.done():
                settle()
            else:
                job.cancel()

        try:
            while not answer.done() and core.clock() < waiter.deadline:
                await asyncio.wait([answer], timeout=self._nap(waiter))
                if self.heartbeat is not None and not answer.done():
                    self.heartbeat()
        except asyncio.CancelledError:
            leave()
            raise
        if not answer.done():
            leave()
            return  # it has nothing any more, and its time is over
        if not answer.cancelled() and isinstance(answer.exception(), ConfigurationError):
            answer.result()
        waiter.checked = _answer(answer)
        waiter.suspect = False
        if not waiter.checked:
            core.spoil(waiter)


def taken_at(code: CodeType | str, at: int) -> str:
    """Who took a lease, or in which line of which file: what ``code`` and ``at`` of it say."""
    if isinstance(code, str):
        return code
    line = code.co_firstlineno
    for start, end, number in code.co_lines():
        if start <= at < end and number is not None:
            line = number
    return f"{code.co_filename}:{line}"


def _limit(timeout: float | None) -> float:
    return NEVER if timeout is None else timeout


def _passes(hooks: Hooks, entry: Entry) -> bool:
    assert hooks.check is not None
    try:
        return passed(hooks.check(entry.obj))
    except ConfigurationError:
        raise  # a mistake in the program, which one new object after another would hide
    except (Exception, asyncio.CancelledError) as exc:
        hooks.log_failed_check(exc)
        return False


async def _apasses(hooks: Hooks, entry: Entry) -> bool:
    assert hooks.check is not None
    try:
        return passed(await hooks.check(entry.obj))
    except Exception as exc:
        hooks.log_failed_check(exc)
        return False


def _answer(check: Any) -> bool:
    """What a check said; one that was cancelled, or never ends, leaves its object unfit."""
    done = check.done() and not check.cancelled()
    return bool(done and check.exception() is None and check.result())


def _reset(lease: BaseLease[Any], obj: Any) -> None:
    """Reset an object and give it back; one whose reset raises is closed instead."""
    hooks = lease.core.hooks
    assert hooks.reset is not None
    ok = False
    try:
        hooks.reset(obj)
        ok = True
    except (Exception, asyncio.CancelledError) as exc:
        hooks.log_failed_reset(exc)
    finally:
        lease.core.release(lease, ok)


def _unfit(lease: BaseLease[Any]) -> None:
    """Give back what ``lease`` still holds: its reset never began."""
    if lease.entry is not RELEASED and lease.entry is not FORGOTTEN:
        lease.core.release(lease, False)


async def _areset(lease: BaseLease[Any], obj: Any) -> None:
    """Like ``_reset``, for an async one."""
    hooks = lease.core.hooks
    assert hooks.reset is not None
    ok = False
    try:
        await hooks.reset(obj)
        ok = True
    except (Exception, asyncio.CancelledError) as exc:  # the task is ours: nobody else misses it
        hooks.log_failed_reset(exc)
    finally:
        lease.core.release(lease, ok)


def _recover(lease: BaseLease[Any], entry: Entry) -> None:
    """Warn about a lease that was garbage collected, and give back what it held."""
    core = lease.core
    lease.entry = FORGOTTEN
    # Who never gave the object back may still use it, and it must not get a second owner. Nor can
    # a finalizer wait for a reset.
    ok = core.hooks.reset is None and sys.getrefcount(entry.obj) <= 2
    try:
        warnings.warn(
            f"{core.hooks.owner}: the lease taken at {taken_at(lease.code, lease.at)} "
            "was never given back",
            ResourceWarning,
            stacklevel=1,
        )
    finally:
        core.forgotten(entry, ok)
