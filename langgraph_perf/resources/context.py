"""``FromContext``: somebody else's pool, leased like one of ours."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import sys
import threading
import time
import warnings
from collections.abc import Callable, Hashable
from types import CodeType, TracebackType
from typing import Any, Generic, TypeVar

from langgraph_perf._progress import Heartbeat, beating
from langgraph_perf._validate import describe, function
from langgraph_perf.errors import ConfigurationError, LeaseError, PoolClosed
from langgraph_perf.resources import _lifecycle, _offload
from langgraph_perf.resources._lease import taken_at
from langgraph_perf.resources._stats import ResourceStats
from langgraph_perf.resources._turns import Turns
from langgraph_perf.resources._work import in_background, off_loop, start_on
from langgraph_perf.resources._wrong_with import OnlyAsync, OnlySync, aenters, enters
from langgraph_perf.resources.resource import Resource, owner_name

T = TypeVar("T")
logger = logging.getLogger("langgraph_perf")

ENTERING = 32
"""How many async callers of one ``FromContext`` may be inside a sync ``__enter__`` at once, each on
a thread of its own. More would only wait there for connections that the driver does not have."""

_inherited: list[Any] = []
"""In a forked child: the parent's context managers. Leaving or dropping them could say goodbye on
sockets which the parent still uses, so they are kept for good."""


class FromContext(Resource[T]):
    """Each lease is one use of a context manager, for instance a connection of a driver's pool.

    How many there can be, how long to wait for one and what happens when it comes back is up to
    the driver. So ``timeout`` of a lease is ignored and ``PoolTimeout`` never raised: set the
    driver's own timeout (``ConnectionPool(timeout=)`` of psycopg_pool, ``pool_timeout=`` of
    SQLAlchemy), and expect the driver's own error. Async callers can be cancelled at any time.

    A context manager that is only sync is made, entered and left on a private thread for async
    callers, the first one of all apart, which is made on the event loop; at most 32 of them enter
    at once, the others wait for their turn.
    One that is only async cannot serve sync callers.

    Args:
        factory: called without arguments for each lease, returns a context manager or an async
            one; ``pool.connection`` of psycopg_pool, ``engine.connect`` of SQLAlchemy.

    Raises:
        ConfigurationError: ``factory`` cannot be called, or is known not to give a context manager.
    """

    def __init__(self, factory: Callable[[], Any]) -> None:
        owner = owner_name("FromContext", factory)
        function(owner, "factory", factory, arguments=())
        super().__init__(owner)
        self._factory = factory
        self._needs_loop = _only_async(owner, factory)
        self.only_sync = False
        """Whether its context managers turned out to be sync: then making one may block as well."""
        self._closed = False
        self.generation = 0
        self._reset()
        _lifecycle.watch(self)

    def _reset(self) -> None:
        self._lock = threading.RLock()
        self._in_use = self._leases = self._forgotten = 0
        self._wait_seconds = self._longest_wait = 0.0
        self.turns = Turns(ENTERING)

    def after_fork(self) -> list[Any]:
        """Begin anew in a forked child; what is leased is the parent's."""
        self.generation += 1
        self._reset()
        return []

    def at_exit(self, deadline: float) -> None:
        """Nothing is kept here that could be closed."""

    @property
    def needs_loop(self) -> bool:
        return self._needs_loop

    def lease(
        self,
        key: Hashable = None,
        *,
        timeout: float | None = None,
        heartbeat: Heartbeat | None = None,
    ) -> ContextLease[T]:
        if self._needs_loop:
            self._refuse_sync()
        self.check_key(key)
        frame = sys._getframe(1)
        return ContextLease(self, heartbeat, frame.f_code, frame.f_lasti)

    def alease(
        self,
        key: Hashable = None,
        *,
        timeout: float | None = None,
        heartbeat: Heartbeat | None = None,
    ) -> AsyncContextLease[T]:
        self.check_key(key)
        frame = sys._getframe(1)
        return AsyncContextLease(self, heartbeat, frame.f_code, frame.f_lasti)

    def stats(self) -> ResourceStats:
        with self._lock:
            return ResourceStats(
                size=self._in_use,
                in_use=self._in_use,
                holders=self._in_use,
                leases=self._leases,
                loads=self._leases,
                closed=self._leases - self._in_use,
                wait_seconds=self._wait_seconds,
                longest_wait=self._longest_wait,
                forgotten=self._forgotten,
            )

    def close(self) -> None:
        """Hand nothing out any more. The driver's pool belongs to whoever made it."""
        self._closed = True

    async def aclose(self) -> None:
        """Like ``close``."""
        self.close()

    # -- called by the leases ---------------------------------------------------------------------

    def make(self) -> Any:
        """A new context manager.

        Raises:
            PoolClosed: ``close`` was called.
        """
        if self._closed:
            raise PoolClosed(f"{self.owner} is closed")
        return self._factory()

    def refuse(self, manager: object, accepted: str) -> ConfigurationError:
        """The error for what the factory gave when it is not what the caller can use."""
        return ConfigurationError(
            f"{self.owner}: factory must return {accepted}, got {type(manager).__name__}"
        )

    def entered(self, waited: float) -> None:
        """Count a lease that begins."""
        with self._lock:
            self._in_use += 1
            self._leases += 1
            self._wait_seconds += waited
            self._longest_wait = max(self._longest_wait, waited)

    def left(self, forgotten: bool = False) -> None:
        """Count a lease that is over."""
        with self._lock:
            self._in_use -= 1
            self._forgotten += forgotten


class _BaseContextLease(Generic[T]):
    """A one-shot use of a ``FromContext``."""

    def __init__(
        self,
        resource: FromContext[T],
        heartbeat: Heartbeat | None,
        code: CodeType | str,
        at: int,
    ) -> None:
        self._resource = resource
        self._heartbeat = heartbeat
        self.code = code
        self.at = at
        self._used = False
        self._manager: Any = None
        self._generation = -1

    def _begin(self) -> None:
        if self._used:
            raise LeaseError(f"{self._resource.owner}: this lease was entered already")
        self._used = True
        self._generation = self._resource.generation

    def _end(self) -> Any:
        """The context manager to leave; ``None`` in a forked child, which may not."""
        manager, self._manager = self._manager, None
        if manager is None:
            was = "given back already" if self._used else "not entered"
            raise LeaseError(f"{self._resource.owner}: this lease was {was}; a lease is one-shot")
        if self._generation != self._resource.generation:
            _inherited.append(manager)
            return None
        return manager

    def __del__(self) -> None:
        if getattr(self, "_manager", None) is None:
            return
        manager = self._end()
        if manager is None:
            return
        try:
            warnings.warn(
                f"{self._resource.owner}: the lease taken at {taken_at(self.code, self.at)} "
                "was never given back",
                ResourceWarning,
                stacklevel=1,
            )
        finally:
            self._resource.left(forgotten=True)
            self._recover(manager)

    def _recover(self, manager: Any) -> None:
        _exit_quietly(self._resource.owner, manager)


class ContextLease(OnlySync, _BaseContextLease[T]):
    """One use of a context manager, for ``with``."""

    def __enter__(self) -> T:
        self._begin()
        manager = self._resource.make()
        if not enters(manager):
            raise self._resource.refuse(
                manager, "a context manager for 'with' (it is used in a sync node)"
            )
        began = time.monotonic()
        value: T = manager.__enter__()
        self._resource.entered(time.monotonic() - began)
        self._manager = manager
        return value

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> bool | None:
        manager = self._end()
        if manager is None:
            return None
        try:
            return bool(manager.__exit__(exc_type, exc, tb))
        finally:
            self._resource.left()


class AsyncContextLease(OnlyAsync, _BaseContextLease[T]):
    """One use of a context manager, async or not, for ``async with``."""

    async def __aenter__(self) -> T:
        self._begin()
        resource = self._resource
        self._home = asyncio.get_running_loop()
        began = time.monotonic()
        manager: Any = None if resource.only_sync else resource.make()
        self._async = aenters(manager)
        with beating(self._heartbeat):
            if self._async:
                value = await manager.__aenter__()
            elif manager is None or enters(manager):
                resource.only_sync = True
                manager, value = await _enter_off_loop(resource, manager)
            else:
                raise resource.refuse(manager, "a context manager")
        self._resource.entered(time.monotonic() - began)
        self._manager = manager
        return value  # type: ignore[no-any-return]

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> bool | None:
        manager = self._end()
        if manager is None:
            return None
        try:
            if self._async:
                return bool(await manager.__aexit__(exc_type, exc, tb))
            leave = functools.partial(manager.__exit__, exc_type, exc, tb)
            if exc_type is GeneratorExit:  # the task is being destroyed: it cannot await
                _offload.shared.submit(leave)
                return None
            return bool(await off_loop(leave))
        finally:
            self._resource.left()

    def _recover(self, manager: Any) -> None:
        owner = self._resource.owner
        if self._async:
            start_on(self._home, functools.partial(_aexit_quietly, owner, manager))
            return
        try:
            # a finalizer must not start a thread, nor keep an event loop waiting
            self._home.call_soon_threadsafe(_exit_off_loop, owner, manager)
        except RuntimeError:
            _exit_quietly(owner, manager)


async def _enter_off_loop(resource: FromContext[Any], made: Any) -> tuple[Any, Any]:
    """Enter a sync context manager, by default a new one, on a thread; one entered for nobody is
    left again."""

    def enter() -> tuple[Any, Any]:
        manager = resource.make() if made is None else made
        if not enters(manager):
            raise resource.refuse(manager, "context managers of one kind, for 'with'")
        return manager, manager.__enter__()

    job = resource.turns.submit(enter)
    try:
        return await asyncio.shield(asyncio.wrap_future(job))
    except BaseException:
        if not job.cancel():  # its turn has come; it may be over, and have failed
            owner = resource.owner
            job.add_done_callback(
                lambda done: None if done.exception() else _exit_off_loop(owner, done.result()[0])
            )
        raise


def _exit_off_loop(owner: str, manager: Any) -> None:
    in_background(functools.partial(_exit_quietly, owner, manager))


def _exit_quietly(owner: str, manager: Any) -> None:
    try:
        manager.__exit__(None, None, None)
    except Exception as exc:
        logger.warning("%s: leaving the context manager failed: %r", owner, exc)


async def _aexit_quietly(owner: str, manager: Any) -> None:
    try:
        await manager.__aexit__(None, None, None)
    except Exception as exc:
        logger.warning("%s: leaving the context manager failed: %r", owner, exc)


def _only_async(owner: str, factory: Callable[[], Any]) -> bool:
    """Whether ``factory`` is known to give context managers that only work with ``async with``."""
    fn: Any = factory
    while isinstance(fn, functools.partial):
        fn = fn.func
    if inspect.isclass(fn):
        return hasattr(fn, "__aenter__") and not hasattr(fn, "__enter__")
    inner = inspect.unwrap(fn)
    if inspect.iscoroutinefunction(fn) or (
        inner is fn and (inspect.isgeneratorfunction(fn) or inspect.isasyncgenfunction(fn))
    ):
        raise ConfigurationError(
            f"{owner}: factory must return a context manager, but {describe(factory)} is a bare "
            "generator or 'async def'; put @contextmanager or @asynccontextmanager on a generator"
        )
    return inspect.isasyncgenfunction(inner)
