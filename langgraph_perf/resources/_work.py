"""Carrying out what a core decided: loading objects into places and closing them.

Here, and in the leases, is where the users' functions run: never under a core's lock, in the asking
thread for sync callers, on private threads or on the right event loop for async ones.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import functools
import inspect
import logging
import os
import sys
import time
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

from langgraph_perf.errors import ResourceError
from langgraph_perf.resources import _offload
from langgraph_perf.resources._entry import Entry, State
from langgraph_perf.resources._hooks import Hooks

T = TypeVar("T")
logger = logging.getLogger("langgraph_perf")

CLOSE_GRACE = 5.0
"""Seconds granted to a close that somebody waits for but that runs where it may
never end: on another thread's event loop, or, for objects whose own loop is closed, on a
makeshift one."""

LOOK_SECONDS = 0.1
"""How often who waits for such a close looks whether its loop has been closed in the meantime."""

_tasks: dict[asyncio.AbstractEventLoop, dict[asyncio.Task[Any], Callable[[], None] | None]] = {}
"""What has not ended yet. Event loops hold their tasks weakly."""

_promised: dict[object, tuple[asyncio.AbstractEventLoop, Callable[[], None]]] = {}
"""What was handed to a loop from outside and has not become a task yet. A loop that is closed
forgets it without a word."""

_inherited: list[Any] = []
"""In a forked child: what of this was under way. It is the parent's, and dropping it could run
``finally`` clauses."""


def _after_fork() -> None:
    _inherited.append((dict(_tasks), dict(_promised)))
    _tasks.clear()
    _promised.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Owner(Protocol):
    """What the work reports to: a core."""

    hooks: Hooks
    clock: Callable[[], float]

    def cleared(self, entry: Entry) -> None:
        """The victim of a place is closed; its object is about to be made."""

    def made(self, entry: Entry, obj: Any, seconds: float) -> None:
        """The object of a place is there."""

    def failed(self, entry: Entry, error: BaseException) -> None:
        """The object of a place could not be made."""

    def emptied(self, entry: Entry) -> None:
        """The object of a place is closed, and the place is free."""


# -- threads and loops ---------------------------------------------------------------------------


def running_loop() -> asyncio.AbstractEventLoop | None:
    """The event loop that runs in this thread, or ``None``."""
    return asyncio._get_running_loop()


def in_background(job: Callable[[], None]) -> concurrent.futures.Future[None]:
    """Run ``job`` on a private thread, or here when there is none left to be had at exit."""
    try:
        return _offload.shared.submit(job)
    except RuntimeError:
        done: concurrent.futures.Future[None] = concurrent.futures.Future()
        job()
        done.set_result(None)
        return done


async def off_loop(job: Callable[[], T]) -> T:
    """Run a blocking ``job`` on a private thread. When cancelled, the job still runs to its end."""
    return await asyncio.shield(asyncio.wrap_future(_offload.shared.submit(job)))


def spawn(
    coroutine: Coroutine[Any, Any, T], settle: Callable[[], None] | None = None
) -> asyncio.Task[T]:
    """A task on the running loop that nobody needs to hold.

    Its context is empty, since what it makes outlives the run that happened to ask first.
    ``settle`` is called at its end, and sees to what is left undone if it never began.
    """
    loop = asyncio.get_running_loop()
    task = contextvars.Context().run(loop.create_task, coroutine)
    mine = _tasks.setdefault(loop, {})
    mine[task] = settle

    def done(task: asyncio.Task[T]) -> None:
        mine.pop(task, None)
        if not mine and _tasks.get(loop) is mine:
            del _tasks[loop]
        if settle is not None:
            settle()

    task.add_done_callback(done)
    return task


def start_on(
    loop: asyncio.AbstractEventLoop,
    work: Callable[[], Coroutine[Any, Any, None]],
    settle: Callable[[], None] | None = None,
) -> bool:
    """Start ``work`` on ``loop`` from any thread; ``False`` when the loop is closed.

    ``settle`` is called as by ``spawn``, also when the loop is closed before it comes to the work.
    """
    if running_loop() is loop:
        spawn(work(), settle)
        return True
    promise = object()

    def begin() -> None:
        # the coroutine is made on the loop: one that is never started would warn
        if settle is None or _promised.pop(promise, None) is not None:
            spawn(work(), settle)

    if settle is not None:
        _promised[promise] = loop, settle
    try:
        loop.call_soon_threadsafe(begin)
    except RuntimeError:
        # unless somebody has buried it already, and called settle()
        return settle is not None and _promised.pop(promise, None) is None
    return True


def bury() -> None:
    """End the tasks of event loops that were closed by hand: their ``finally`` clauses run here."""
    for loop in [loop for loop in list(_tasks) if loop.is_closed()]:
        for task, settle in list(_tasks.pop(loop, {}).items()):
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            coroutine: Any = task.get_coro()
            try:
                coroutine.close()
            except Exception as exc:
                logger.debug("a task of a closed event loop did not end: %r", exc)
            if settle is not None:
                settle()
    for promise, (loop, settle) in list(_promised.items()):
        if loop.is_closed() and _promised.pop(promise, None) is not None:
            settle()


# -- loading -------------------------------------------------------------------------------------


def load(owner: Owner, entry: Entry) -> None:
    """Close what stood in the place, make its new object, report. Blocks."""
    if not entry.claim():
        return
    try:
        if entry.victim is not None:
            if entry.victim.claim():
                _close(owner.hooks, entry.victim)
            owner.cleared(entry)
        began = owner.clock()
        entry.obj = owner.hooks.create(entry.key)
        owner.made(entry, entry.obj, owner.clock() - began)
    except asyncio.CancelledError:
        end_load(owner, entry, _cancelled(owner.hooks))  # nobody's task was cancelled
    except BaseException as exc:
        if not end_load(owner, entry, exc):
            raise


def end_load(owner: Owner, entry: Entry, error: BaseException) -> bool:
    """Report a load that ended with ``error``, by which Ctrl-C may also end one that succeeded.

    Returns:
        Whether ``error`` has been told to whoever waits for the load.
    """
    if entry.state not in (State.LOADING, State.CLOSING) or not entry.begun:
        return False  # the end was reported before
    if entry.obj is None:
        owner.failed(entry, error)
        return True
    owner.made(entry, entry.obj, 0.0)
    return False


async def aload(owner: Owner, entry: Entry) -> None:
    """Like ``load``, for hooks that need an event loop."""
    hooks = owner.hooks
    if not entry.claim():
        return
    try:
        if entry.victim is not None:
            if entry.victim.claim():
                await aclose(hooks, entry.victim)
            owner.cleared(entry)
        began = owner.clock()
        if hooks.async_create:
            entry.obj = await hooks.create(entry.key)
        else:
            entry.obj = await _acreate_off_loop(owner, entry)
        owner.made(entry, entry.obj, owner.clock() - began)
    except asyncio.CancelledError:
        # not passed on as it is: the waiter's task was not cancelled
        end_load(owner, entry, _cancelled(hooks))
    except BaseException as exc:
        if not end_load(owner, entry, exc) or not isinstance(exc, Exception):
            raise


def _cancelled(hooks: Hooks) -> ResourceError:
    return ResourceError(f"{hooks.owner}: the load was cancelled")


async def _acreate_off_loop(owner: Owner, entry: Entry) -> Any:
    future = _offload.shared.submit(functools.partial(owner.hooks.create, entry.key))
    future.add_done_callback(lambda _: bury())  # nobody may be left to take what was made
    try:
        return await asyncio.shield(asyncio.wrap_future(future))
    except BaseException:  # cancelled, or its event loop was closed by hand
        orphan = Entry(entry.key, entry.loop)

        def close_orphan(done: Any) -> None:
            if not done.cancelled() and done.exception() is None:
                orphan.obj = done.result()
                close_soon(owner.hooks, orphan, lambda: None)

        future.add_done_callback(close_orphan)
        raise


def load_soon(owner: Owner, entry: Entry) -> None:
    """Start the load of a place where it neither blocks an event loop nor the caller."""
    if owner.hooks.needs_loop:
        assert entry.loop is not None

        began = False

        async def work() -> None:
            nonlocal began
            began = True
            await aload(owner, entry)

        def settle() -> None:
            if not began and entry.claim():
                end_load(owner, entry, _cancelled(owner.hooks))

        if not start_on(entry.loop, work, settle):
            owner.failed(entry, RuntimeError("Event loop is closed"))
        return
    try:
        _offload.shared.submit(functools.partial(load, owner, entry))
    except BaseException as exc:
        owner.failed(entry, exc)


# -- closing -------------------------------------------------------------------------------------


def _close(hooks: Hooks, entry: Entry) -> None:
    """Run a sync ``close``; one that raises is logged, what it gives to await is awaited on the
    loop of its object."""
    if hooks.close is not None:
        try:
            answer = hooks.close(entry.obj)
            if hooks.needs_loop and inspect.isawaitable(answer):
                close_now(hooks.closing_with(answer), entry, CLOSE_GRACE)
        except (Exception, asyncio.CancelledError) as exc:
            hooks.log_failed_close(exc)


def _is_being_cancelled() -> bool:
    """Whether somebody has cancelled the running task, as far as Python tells (from 3.11 on)."""
    task = asyncio.current_task()
    return sys.version_info >= (3, 11) and task is not None and task.cancelling() > 0


async def _aclose_here(hooks: Hooks, obj: Any) -> None:
    assert hooks.close is not None
    try:
        await hooks.close(obj)
    except asyncio.CancelledError as exc:
        if _is_being_cancelled():
            raise
        hooks.log_failed_close(exc)
    except Exception as exc:
        hooks.log_failed_close(exc)


async def aclose(hooks: Hooks, entry: Entry) -> None:
    """Close an object from a task, on the loop it belongs to; waits until that is done, unless that
    loop does not run at present: then it closes the object when it goes on."""
    home = entry.loop
    if hooks.close is None:
        return
    if not hooks.async_close:
        await off_loop(functools.partial(_close, hooks, entry))
    elif home is None or home is running_loop():
        await _aclose_here(hooks, entry.obj)
    elif home.is_closed():
        await off_loop(functools.partial(_close_without_its_loop, hooks, entry.obj, CLOSE_GRACE))
    else:
        runs = home.is_running()
        ended = _close_at_home(hooks, entry)
        if runs:
            await _await_for(ended, CLOSE_GRACE)


def close_now(hooks: Hooks, entry: Entry, grace: float) -> None:
    """Close an object from a thread and wait for it; if the close is async, ``grace`` seconds."""
    home, here = entry.loop, running_loop()
    if hooks.close is None:
        return
    if not hooks.async_close:
        _close(hooks, entry)
    elif grace <= 0:
        return
    elif home is None or home.is_closed():
        job = functools.partial(_close_without_its_loop, hooks, entry.obj, grace)
        if here is None:
            _wait_for(hooks, in_background(job), grace)
        else:
            in_background(job)
    elif here is not None:
        _close_at_home(hooks, entry)
    elif home.is_running():
        _wait_for(hooks, _close_at_home(hooks, entry), grace)
    else:
        ended = _close_at_home(hooks, entry)
        wait = _await_for(ended, grace)
        try:
            home.run_until_complete(wait)
        except RuntimeError:  # in this moment its own thread has gone on with it, or closed it
            wait.close()
            _wait_for(hooks, ended, grace)


async def _await_for(close: concurrent.futures.Future[None], grace: float) -> None:
    ended = asyncio.wrap_future(close)
    deadline = time.monotonic() + grace
    while not ended.done() and (left := deadline - time.monotonic()) > 0:
        await asyncio.wait([ended], timeout=min(left, LOOK_SECONDS))
        bury()


def _wait_for(hooks: Hooks, close: concurrent.futures.Future[None], grace: float) -> None:
    deadline = time.monotonic() + grace
    while not close.done():
        left = deadline - time.monotonic()
        if left <= 0:
            logger.warning("%s: a close takes long; it is not waited for any more", hooks.owner)
            return
        concurrent.futures.wait([close], min(left, LOOK_SECONDS))
        bury()
    close.result()


def close_soon(
    hooks: Hooks,
    entry: Entry,
    done: Callable[[], None],
    run: Callable[[Callable[[], None]], object] | None = None,
) -> None:
    """Have an object closed without making an event loop wait; ``done`` is called afterwards.

    A sync ``close`` is handed to ``run``; without one it runs in the calling thread unless that
    runs an event loop. What somebody has begun to close already is left to them.
    """
    home = entry.loop
    if hooks.close is None:
        done()
    elif not hooks.async_close:
        job = functools.partial(_close_then, hooks, entry, done)
        if run is not None:
            run(job)
        elif running_loop() is None:
            job()
        else:
            in_background(job)
    elif home is not None and home.is_running():
        _close_on(home, hooks, entry, done)
    elif entry.claim():
        # the loop may never run again, so nobody waits for it
        if home is None or home.is_closed():
            in_background(functools.partial(_close_without_its_loop, hooks, entry.obj, CLOSE_GRACE))
        else:
            _close_at_home(hooks, entry)
        done()


def _close_at_home(hooks: Hooks, entry: Entry) -> concurrent.futures.Future[None]:
    """Close an object that the caller has claimed on its loop; says when that is over."""
    assert entry.loop is not None
    ended: concurrent.futures.Future[None] = concurrent.futures.Future()
    unbegun = Entry(entry.key, entry.loop)  # that somebody sees to it does not say it has begun
    unbegun.obj = entry.obj
    _close_on(entry.loop, hooks, unbegun, functools.partial(ended.set_result, None))
    return ended


def _close_on(
    home: asyncio.AbstractEventLoop,
    hooks: Hooks,
    entry: Entry,
    done: Callable[[], None],
    tries: int = 2,
) -> None:
    """Close an object on its loop, also when the task for it is cancelled before it begins, or the
    loop is closed before: then without it."""

    def settle() -> None:
        if not entry.begun:
            _close_on(home, hooks, entry, done, tries - 1)

    work = functools.partial(_aclose_then, hooks, entry, done)
    if not (tries and start_on(home, work, settle)) and entry.claim():
        in_background(functools.partial(_close_lost, hooks, entry, done))


def _close_then(hooks: Hooks, entry: Entry, done: Callable[[], None]) -> None:
    if entry.claim():
        try:
            _close(hooks, entry)
        finally:
            try:
                done()
            except BaseException:  # Ctrl-C at the wrong moment; a second time does no harm
                done()
                raise


async def _aclose_then(hooks: Hooks, entry: Entry, done: Callable[[], None]) -> None:
    if entry.claim():
        try:
            await _aclose_here(hooks, entry.obj)
        finally:
            done()


def _close_lost(hooks: Hooks, entry: Entry, done: Callable[[], None]) -> None:
    try:
        _close_without_its_loop(hooks, entry.obj, CLOSE_GRACE)
    finally:
        done()


def _close_without_its_loop(hooks: Hooks, obj: Any, grace: float) -> None:
    """Best effort for an object whose event loop is closed: some need no more than any loop."""
    assert hooks.close is not None
    try:
        asyncio.run(asyncio.wait_for(hooks.close(obj), grace))
    except (Exception, asyncio.CancelledError) as exc:
        logger.debug("%s: close after its event loop ended: %r", hooks.owner, exc)
