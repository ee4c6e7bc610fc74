"""``PooledCheckpointer``: each operation on a saver, and so on a connection, of its own."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import inspect
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from concurrent.futures import Future
from types import TracebackType
from typing import Any, ClassVar, TypeVar, cast
from weakref import WeakKeyDictionary

from langgraph.checkpoint.base import BaseCheckpointSaver

from langgraph_perf._validate import refuse
from langgraph_perf.errors import ConfigurationError, PoolTimeout
from langgraph_perf.resources import _offload
from langgraph_perf.resources._lease import BaseLease
from langgraph_perf.resources._work import running_loop, spawn
from langgraph_perf.resources.pool import Pool
from langgraph_perf.resources.resource import Resource

T = TypeVar("T")
Saver = BaseCheckpointSaver[Any]
logger = logging.getLogger("langgraph_perf")

OPERATIONS = tuple(
    name
    for name, value in vars(BaseCheckpointSaver).items()
    if callable(value) and not name.startswith("_") and hasattr(BaseCheckpointSaver, f"a{name}")
)
"""What savers do, sync and, as ``a...``, async: whatever the installed LangGraph defines."""

ONCE = frozenset({"copy_thread"})
"""What may not be repeated when nobody knows whether it was done. All others read, delete, or put
under the ids that LangGraph has chosen, which twice is the same as once."""

LOST_STATES = ("08", "57P", "25P03")
"""SQLSTATEs, or how they begin, with which a server ends a connection."""

AWAITED, OFF_LOOP = "awaited", "off the loop"


class PooledCheckpointer(BaseCheckpointSaver[Any]):
    """A checkpointer that leases a saver for each operation, so that operations run side by side.

    ``AsyncPostgresSaver`` and the others do one thing at a time, however many connections they
    have. Here as many operations run at once as the resource has savers::

        opened: dict[AsyncPostgresSaver, AsyncExitStack] = {}

        async def open_saver() -> AsyncPostgresSaver:
            stack = AsyncExitStack()
            saver = await stack.enter_async_context(
                AsyncPostgresSaver.from_conn_string(dsn, pipeline=True)
            )
            opened[saver] = stack
            return saver

        async def close_saver(saver: AsyncPostgresSaver) -> None:
            await opened.pop(saver).aclose()

        checkpointer = PooledCheckpointer(Pool(open_saver, max_size=8, close=close_saver))

    A connection that belongs to one saver can be pipelined, which makes it faster; the tables must
    then be there already, or be made by a saver without ``pipeline=True``.

    Savers that need an event loop (all whose name begins with ``Async``) must be made by an
    ``async def``; they serve ``ainvoke`` and the other async methods only. Sync savers serve sync
    callers, and async ones off their event loop.

    ``list`` holds its saver until it is exhausted, closed or dropped; so does ``alist``, except
    that a sync saver's answer is read in one go.

    When a connection was dropped (its error is a ``ConnectionError`` or says so with its SQLSTATE,
    or ``saver.conn.closed`` is true afterwards), its saver is thrown away and the operation is
    done again, until one fails on a saver that was made since. All may be done twice but
    ``copy_thread``, whose error is raised; so is the error of a listing that has begun. While the
    server is away, the error of making a saver is raised. For other signs of a dead connection give
    the resource a ``check``.

    ``graph.perf.close()`` does not close it: whoever made it does, by ``close`` or, for savers that
    need an event loop, ``await checkpointer.aclose()``. Until then aiosqlite's threads keep a
    process alive.

    What is cancelled while it uses an async saver closes that one; a sync saver finishes what it
    does before it is leased again.

    Args:
        resource: a ``Pool`` or ``FromContext`` whose objects are savers; closed by ``close``.
        saver: their class. Without it the class is learned from the first saver, and only from
            then on ``prune`` and what else not all savers have are known to be there or not.

    Raises:
        ConfigurationError: an argument is not what it should be; or, when it is used, the resource
            gives something else, or savers that cannot serve the caller.
    """

    _fits: ClassVar[type[Saver] | None] = None
    _how: ClassVar[dict[str, str]] = {}

    def __init__(self, resource: Resource[Any], *, saver: type[Saver] | None = None) -> None:
        name = type(self).__name__
        if not isinstance(resource, Resource) or resource.keyed or resource.shares:
            refuse(name, "resource", resource, "a Pool or a FromContext of savers")
        if saver is not None and not (
            inspect.isclass(saver) and issubclass(saver, BaseCheckpointSaver)
        ):
            refuse(name, "saver", saver, "a subclass of BaseCheckpointSaver, or None")
        super().__init__()
        self._resource = resource
        self._allowed: frozenset[tuple[str, ...]] = frozenset()
        # by event loop; what bounds its queue itself must see all who wait
        self._gates: WeakKeyDictionary[asyncio.AbstractEventLoop, _Gate] | None = None
        if isinstance(resource, Pool) and not resource._core.limits.max_waiting:
            self._gates = WeakKeyDictionary()
        self._begin()
        if saver is not None:
            self._fit(saver)

    def _begin(self) -> None:
        # each saver that was leased before, and what is used in its stead if not itself
        self._known: WeakKeyDictionary[Saver, Saver | None] = WeakKeyDictionary()
        self._newest: Saver | None = None

    @property
    def owner(self) -> str:
        """How messages name this checkpointer."""
        return f"PooledCheckpointer of {self._resource.owner}"

    def _gate(self) -> _Gate | None:
        """Where tasks of the running loop wait for the resource, if not in its own queue."""
        if self._gates is None:
            return None
        loop = asyncio.get_running_loop()
        gate = self._gates.get(loop)
        if gate is None:
            assert self._resource.max_size is not None
            gate = self._gates[loop] = _Gate(self._resource.max_size)
        return gate

    def _fit(self, saver: type[Saver]) -> None:
        """Offer what ``saver`` offers."""
        self.__class__ = _fitted(type(self), saver)  # type: ignore[arg-type]

    def _admit(self, found: object) -> tuple[Saver, bool]:
        """The saver to use for what was leased, and whether it was never leased before.

        Raises:
            ConfigurationError: it is no saver, or none of the class that it must be.
        """
        try:
            instead = self._known[cast("Saver", found)]
        except (KeyError, TypeError):
            pass
        else:
            return cast("Saver", found) if instead is None else instead, False
        wanted = self._fits or BaseCheckpointSaver
        if not isinstance(found, wanted):
            raise ConfigurationError(
                f"{self.owner}: the resource must give savers ({wanted.__name__}), "
                f"got {type(found).__name__}"
            )
        if self._fits is None:
            self._fit(type(found))
        usable = found.with_allowlist(self._allowed) if self._allowed else found
        self._known[found] = None if usable is found else usable
        self._newest = usable
        self.serde = usable.serde
        return usable, True

    def _learned(self, what: str) -> Saver:
        """Some saver, to ask for what all of them have in common.

        Raises:
            ConfigurationError: there is none yet, and none can be made without an event loop.
        """
        if self._newest is None:
            if self._resource.needs_loop or running_loop() is not None:
                raise ConfigurationError(
                    f"{self.owner}: {what} is a saver's, and none was leased yet; "
                    "call 'await checkpointer.asetup()' first"
                )
            with _Operation(self, repeatable=True):
                pass
        assert self._newest is not None
        return self._newest

    # -- what is not an operation -----------------------------------------------------------------

    def get_next_version(self, current: Any, channel: None) -> Any:
        """As the savers do; one must have been leased before, which any operation does."""
        return self._learned("get_next_version()").get_next_version(current, channel)

    @property
    def config_specs(self) -> list[Any]:
        """Those of the savers; none before the first one is leased."""
        return [] if self._newest is None else self._newest.config_specs

    def with_allowlist(self, extra_allowlist: Collection[tuple[str, ...]]) -> PooledCheckpointer:
        """A clone on the same resource whose savers are used with this allowlist."""
        clone = copy.copy(self)
        clone._allowed = self._allowed.union(extra_allowlist)
        clone._begin()
        clone.serde = super().with_allowlist(extra_allowlist).serde
        return clone

    def setup(self) -> None:
        """Call ``setup`` of one saver, if it has one; it makes the tables.

        Raises:
            ConfigurationError: it is async, for which there is ``asetup``.
        """
        with _Operation(self) as saver:
            setup = getattr(saver, "setup", None)
            if inspect.iscoroutinefunction(setup):
                raise ConfigurationError(
                    f"{self.owner}: {type(saver).__name__}.setup is async; "
                    "call 'await checkpointer.asetup()'"
                )
            if setup is not None:
                setup()

    async def asetup(self) -> None:
        """Call ``setup`` of one saver, sync or async, if it has one."""
        async with (operation := _Operation(self)) as saver:
            setup = getattr(saver, "setup", None)
            if inspect.iscoroutinefunction(setup):
                await setup()
            elif setup is not None:
                await operation.off_loop(setup)

    def close(self) -> None:
        """Close the resource: idle savers now, leased ones when they come back."""
        self._resource.close()

    async def aclose(self) -> None:
        """Like ``close``, without blocking the event loop."""
        await self._resource.aclose()


# -- what a class of savers offers ----------------------------------------------------------------


def _overrides(saver: type[Saver], name: str) -> bool:
    return getattr(saver, name, None) is not getattr(BaseCheckpointSaver, name)


def _ways(saver: type[Saver]) -> dict[str, str]:
    """What ``saver`` offers, and how async callers get it."""
    # Sync savers may override some of the async methods just to raise; an async one needs them all.
    is_async = all(_overrides(saver, f"a{name}") for name in ("get_tuple", "put", "put_writes"))
    ways = {}
    for name in OPERATIONS:
        if is_async and _overrides(saver, f"a{name}"):
            ways[name] = AWAITED
        elif _overrides(saver, name):
            ways[name] = OFF_LOOP
    return ways


@functools.cache
def _fitted(cls: type[PooledCheckpointer], saver: type[Saver]) -> type[PooledCheckpointer]:
    """``cls``, overriding what ``saver`` overrides.

    LangGraph's tools find out what a checkpointer can do by comparing the methods of its class with
    those of ``BaseCheckpointSaver``.
    """
    ways = _ways(saver)
    lacking = {
        name: getattr(BaseCheckpointSaver, name)
        for operation in OPERATIONS
        if operation not in ways
        for name in (operation, f"a{operation}")
        if getattr(cls, name) is getattr(PooledCheckpointer, name)
    }
    return type(
        f"{cls.__name__}[{saver.__name__}]",
        (cls,),
        {"__module__": cls.__module__, "__doc__": cls.__doc__}
        | {"_fits": saver, "_how": ways, **lacking},
    )


# -- operations ------------------------------------------------------------------------------------


class _Gate:
    """Lets as many tasks of one event loop through as a pool has savers; the others wait in order.

    The queue of the pool would do, but it is made for threads of many loops, and with more tasks
    than savers it took a sixth of all time. A task waits ``timeout`` at most here, and, if somebody
    else uses the pool, as long again there.
    """

    __slots__ = ("_free", "_waiting")

    def __init__(self, places: int) -> None:
        self._free = places
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def enter(self, resource: Resource[Any]) -> None:
        """Wait for a place.

        Raises:
            PoolTimeout: none came free in time.
        """
        if self._free:
            self._free -= 1
            return
        loop = asyncio.get_running_loop()
        place: asyncio.Future[None] = loop.create_future()
        self._waiting.append(place)
        timeout = resource.timeout
        timer = None if timeout is None else loop.call_later(timeout, _expire, place, resource)
        try:
            await place
        except BaseException:
            if place.done() and not place.cancelled() and place.exception() is None:
                self.leave()  # cancelled when it had the place already
            raise
        finally:
            if timer is not None:
                timer.cancel()

    def leave(self) -> None:
        """Hand the place to the next one."""
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                with contextlib.suppress(RuntimeError):  # its loop is closed
                    place.set_result(None)
                    return
        self._free += 1


def _expire(place: asyncio.Future[None], resource: Resource[Any]) -> None:
    if not place.done():
        place.set_exception(
            PoolTimeout(f"{resource.owner}: no saver came free within {resource.timeout:g} s")
        )


class _Operation:
    """One operation. Each use as a context manager is one attempt on a saver of its own.

    An attempt that failed because its connection was dropped raises nothing when it is worth
    another one.

    Attributes:
        repeatable: whether there may be another attempt.
        unfit: whether the saver must not be used again.
    """

    __slots__ = (
        "_again",
        "_checkpointer",
        "_fresh",
        "_gate",
        "_job",
        "_lease",
        "_saver",
        "repeatable",
        "unfit",
    )

    def __init__(self, checkpointer: PooledCheckpointer, repeatable: bool = False) -> None:
        self._checkpointer = checkpointer
        self.repeatable = repeatable
        self.unfit = self._again = False
        self._job: Future[Any] | None = None

    def __enter__(self) -> Saver:
        resource = self._checkpointer._resource
        if resource.needs_loop:
            raise ConfigurationError(
                f"{self._checkpointer.owner}: its savers are made on an event loop and cannot "
                "serve sync callers; use 'ainvoke', 'astream', 'aget_state' and so on, "
                "or a resource of sync savers"
            )
        lease: Any = resource.lease()
        try:
            found = lease.__enter__()
        except RuntimeError as exc:
            self._explain(exc)
            raise
        try:
            self._saver, self._fresh = self._checkpointer._admit(found)
        except BaseException as exc:
            lease.__exit__(type(exc), exc, exc.__traceback__)
            raise
        self._lease = lease
        return self._saver

    async def __aenter__(self) -> Saver:
        self._gate = self._checkpointer._gate()
        if self._gate is None:
            return await self._aenter()
        await self._gate.enter(self._checkpointer._resource)
        try:
            return await self._aenter()
        except BaseException:
            self._gate.leave()
            raise

    async def _aenter(self) -> Saver:
        lease: Any = self._checkpointer._resource.alease()
        try:
            found = await lease.__aenter__()
        except RuntimeError as exc:
            self._explain(exc)
            raise
        try:
            self._saver, self._fresh = self._checkpointer._admit(found)
        except BaseException as exc:
            await lease.__aexit__(type(exc), exc, exc.__traceback__)
            raise
        self._lease = lease
        return self._saver

    def _explain(self, error: RuntimeError) -> None:
        """Say what to do about ``error`` of making a saver, if that is known."""
        if "no running event loop" in str(error):
            raise ConfigurationError(
                f"{self._checkpointer.owner}: its savers need the event loop that uses them; "
                "make them in an 'async def', and use 'ainvoke', 'astream' and so on"
            ) from error

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> bool:
        lease = self._lease
        if exc is None:
            lease.__exit__(None, None, None)
            return False
        again = self._judge(exc)
        if self.unfit and isinstance(lease, BaseLease):
            lease.core.release(lease, False)
            return again
        try:
            lease.__exit__(exc_type, exc, tb)
        except Exception as error:
            self._shrug(again, error)
        return again

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> bool:
        try:
            return await self._aexit(exc_type, exc, tb)
        finally:
            if self._gate is not None:
                self._gate.leave()

    async def _aexit(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> bool:
        lease = self._lease
        if exc is None:
            await lease.__aexit__(None, None, None)
            return False
        if self._job is not None and not self._job.done():
            _leave_after(self._job, lease)
            return False
        again = self._judge(exc)
        if self.unfit and isinstance(lease, BaseLease):
            lease.core.release(lease, False)
            return again
        try:
            await lease.__aexit__(exc_type, exc, tb)
        except Exception as error:
            self._shrug(again, error)
        return again

    def _judge(self, exc: BaseException) -> bool:
        """Whether to try again after ``exc``; sees whether the saver can still be used."""
        lost = isinstance(exc, Exception) and _dropped(self._saver, exc)
        # What was interrupted may have left anything on its connection. Neither a listing that is
        # closed early was, nor what a thread did for a caller who was cancelled.
        interrupted = not isinstance(exc, Exception | GeneratorExit) and self._job is None
        self.unfit |= lost or interrupted
        first, self._again = not self._again, True
        again = lost and self.repeatable and (first or not self._fresh)
        if lost:
            then = "once more" if again else "not again"
            logger.warning("%s: a connection was lost, %s: %r", self._checkpointer.owner, then, exc)
        return again

    def _shrug(self, again: bool, error: Exception) -> None:
        """Leaving a context manager on a lost connection may fail; what matters comes after."""
        if not again:
            raise error
        logger.debug("%s: leaving a lost saver failed: %r", self._checkpointer.owner, error)

    async def off_loop(self, job: Callable[[], T]) -> T:
        """Run a blocking ``job`` with the saver, which is not leased again before its end."""
        self._job = _offload.shared.submit(job)
        try:
            return await asyncio.shield(asyncio.wrap_future(self._job))
        except asyncio.CancelledError:
            self._job.cancel()  # if it has not begun
            raise


def _leave_after(job: Future[Any], lease: Any) -> None:
    """Give ``lease`` back when ``job``, which nobody waits for any more, is over."""
    if not isinstance(lease, BaseLease):

        async def leave() -> None:
            await asyncio.wait([asyncio.wrap_future(job)])
            await lease.__aexit__(None, None, None)

        spawn(leave())
        return

    def done(job: Future[Any]) -> None:
        # a thread of ours cannot wait for a reset
        ok = lease.core.hooks.reset is None and not job.cancelled() and job.exception() is None
        lease.core.release(lease, ok)

    job.add_done_callback(done)


def _dropped(saver: Saver, error: Exception) -> bool:
    """Whether ``error`` means that the connection of ``saver`` is gone."""
    if any(kind.__name__ == "ConnectionError" for kind in type(error).__mro__):
        return True  # Python's own, and those of drivers
    state = getattr(error, "sqlstate", None)
    if isinstance(state, str) and state.startswith(LOST_STATES):
        return True
    return getattr(getattr(saver, "conn", None), "closed", False) is True


def _unoffered(checkpointer: PooledCheckpointer, name: str) -> Callable[..., Any]:
    """What there is for savers that do not override ``name``: LangGraph's default."""
    return cast("Callable[..., Any]", getattr(BaseCheckpointSaver, name).__get__(checkpointer))


def _sync(name: str) -> Callable[..., Any]:
    def operation(self: PooledCheckpointer, *args: Any, **kwargs: Any) -> Any:
        attempt = _Operation(self, name not in ONCE)
        while True:
            with attempt as saver:
                if name not in self._how:
                    break
                _see_that_sync_works(self, saver, name)
                return getattr(saver, name)(*args, **kwargs)
        return _unoffered(self, name)(*args, **kwargs)

    return operation


def _async(name: str) -> Callable[..., Any]:
    async def operation(self: PooledCheckpointer, *args: Any, **kwargs: Any) -> Any:
        attempt = _Operation(self, name not in ONCE)
        while True:
            async with attempt as saver:
                how = self._how.get(name)
                if how is None:
                    break
                if how is AWAITED:
                    return await getattr(saver, f"a{name}")(*args, **kwargs)
                job = functools.partial(getattr(saver, name), *args, **kwargs)
                return await attempt.off_loop(job)
        return await _unoffered(self, f"a{name}")(*args, **kwargs)

    return operation


def _list(self: PooledCheckpointer, *args: Any, **kwargs: Any) -> Iterator[Any]:
    attempt = _Operation(self, True)
    while True:
        with attempt as saver:
            _see_that_sync_works(self, saver, "list")
            found: Any = saver.list(*args, **kwargs)
            try:
                for item in found:
                    attempt.repeatable = False
                    yield item
                return
            finally:
                attempt.unfit = True
                if hasattr(found, "close"):
                    found.close()
                attempt.unfit = False


async def _alist(self: PooledCheckpointer, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
    attempt = _Operation(self, True)
    while True:
        async with attempt as saver:
            if self._how.get("list") is not AWAITED:
                items = await attempt.off_loop(lambda: list(saver.list(*args, **kwargs)))
                break
            found: Any = saver.alist(*args, **kwargs)
            try:
                async for item in found:
                    attempt.repeatable = False
                    yield item
                return
            finally:
                attempt.unfit = True
                if hasattr(found, "aclose"):
                    await found.aclose()
                attempt.unfit = False
    for item in items:
        yield item


def _see_that_sync_works(self: PooledCheckpointer, saver: Saver, name: str) -> None:
    if name in self._how and not _overrides(type(saver), name):
        raise ConfigurationError(
            f"{self.owner}: {type(saver).__name__} has no {name}(), only a{name}(); "
            "use 'ainvoke', 'astream', 'aget_state' and so on"
        )


def _define(name: str, made: Callable[..., Any]) -> None:
    setattr(PooledCheckpointer, name, functools.wraps(getattr(BaseCheckpointSaver, name))(made))


for _name in OPERATIONS:
    _define(_name, _list if _name == "list" else _sync(_name))
    _define(f"a{_name}", _alist if _name == "list" else _async(_name))
