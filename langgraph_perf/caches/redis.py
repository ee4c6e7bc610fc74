"""A cache in Redis or Valkey, shared by any number of machines.

What it keeps there and asks for is in ``_redis_steps``; here its steps are carried out, by threads
and event loops.
"""

from __future__ import annotations

try:
    import redis as _  # noqa: F401 - before anything below wants it
except ModuleNotFoundError as exc:  # pragma: no cover - tested in a process without it
    if exc.name != "redis":
        raise
    raise ImportError(
        "RedisCache needs the redis package: pip install 'langgraph-perf[redis]'"
    ) from None

import asyncio
import re
import sys
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from langgraph.cache.base import FullKey, Namespace
from langgraph.checkpoint.serde.base import SerializerProtocol

from langgraph_perf._within import within
from langgraph_perf.caches._redis_async_line import AsyncLine
from langgraph_perf.caches._redis_commands import Trips
from langgraph_perf.caches._redis_connect import Source, unusable
from langgraph_perf.caches._redis_lines import ClusterLine, Line
from langgraph_perf.caches._redis_listener import Listener
from langgraph_perf.caches._redis_steps import RedisSteps, Steps
from langgraph_perf.caches._redis_view import TagView
from langgraph_perf.caches.base import CacheStats, Entry, Lease, Lookup, require_seconds
from langgraph_perf.errors import CacheClosed, ConfigurationError

T = TypeVar("T")

_GRANTED_LATE = 0.2
"""Seconds after which what was asked on a connection that is gone has been carried out."""
_POLL = 0.1
"""Seconds between looks at a lease when nobody can tell of it."""


class RedisCache(RedisSteps):
    """Keeps entries in Redis (6.2 or later) or Valkey, for all processes that use one ``prefix``.

    Nothing connects before the first operation; ``ping`` tells whether the server can be used.
    Threads share one connection, and so do the tasks of an event loop: what is asked while an
    answer is on its way goes out together. Tiers in front of it know tag tokens without asking
    (``CLIENT TRACKING``); then ``invalidate`` and ``clear`` return up to 50 ms later, when no
    process relies on the old tokens any more.

    While the server is away, runs go on without it; within five seconds of its return it is used
    again.

    Redis may lose its last writes in a crash or a failover, and an invalidation with them: give
    results that must not outlive that a ``ttl``.

    On a cluster tiers ask for tokens on each hit, what is awaited takes a thread, and results of
    other processes are polled for; with Sentinel, what is awaited takes a thread.

    Args:
        url_or_client: ``redis://``, ``rediss://`` or ``unix://`` URL, or a ``redis.Redis``,
            ``redis.asyncio.Redis`` or ``redis.RedisCluster`` client; of a client the settings are
            used, and it stays its owner's.
        prefix: begins every key; caches with different ones share nothing.
        timeout: seconds an operation may take.
        connect_timeout: seconds connecting may take.
        lease_seconds: how long a killed process delays those that wait for its result.
        serde: see ``Cache``.
        clock: see ``Cache``; it should agree between machines to a fraction of the times to live.

    Raises:
        ConfigurationError: an argument is not as described.

    Importing it without the ``redis`` extra is an ``ImportError``.
    """

    shared = True
    notifies = True

    def __init__(
        self,
        url_or_client: object,
        *,
        prefix: str = "lgp",
        timeout: float = 1.0,
        connect_timeout: float = 1.0,
        lease_seconds: float = 10.0,
        serde: SerializerProtocol | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(serde=serde, clock=clock)
        if not isinstance(prefix, str) or not re.fullmatch(r"[\w.:-]{1,100}", prefix, re.ASCII):
            raise ConfigurationError(
                f"prefix: got {prefix!r}; accepted: 1 to 100 letters, digits and _ . : -"
            )
        self.prefix = prefix
        self.timeout = require_seconds("timeout", timeout)
        self.connect_timeout = require_seconds("connect_timeout", connect_timeout)
        self.lease_seconds = require_seconds("lease_seconds", lease_seconds)
        self._source = Source(url_or_client, self.timeout, self.connect_timeout)
        self._root = f"{prefix}:1:"
        self._presence = f"{self._root}views".encode()
        self._viewers = f"{self._root}viewers".encode()
        self._counting = threading.Lock()
        self._trips = Trips()
        self._forget_returns()
        self._connect()

    def _connect(self) -> None:
        source = self._source
        self._line: Line | ClusterLine
        if source.connect is None:
            self._line = ClusterLine(source.cluster, self.timeout, self._trips)
        else:
            self._line = Line(source.connect, self.timeout, self.connect_timeout, self._trips)
        self._lines: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, AsyncLine] = (
            weakref.WeakKeyDictionary()
        )
        self._listener: Listener | None = None
        self._view: TagView | None = None
        self._finalizer = weakref.finalize(self, self._line.close)

    def _forget_returns(self) -> None:
        # the garbage collector may close a coroutine that holds it already
        self._returning = threading.RLock()
        self._unwanted: list[Lease] = []
        self._returner: threading.Thread | None = None
        self._hurry = threading.Event()

    @property
    def round_trips(self) -> int:
        """How many batches of commands went to the server from here, without the listener's."""
        return self._trips.count

    def ping(self) -> None:
        """Check that the server can be used.

        Raises:
            ConfigurationError: it cannot be reached, wants another password, is too old, ….
            CacheClosed: this cache is closed.
        """
        self.must_be_open()
        try:
            self._do(self._pinging())
        except Exception as exc:
            raise ConfigurationError(unusable(self._source, exc)) from exc

    async def aping(self) -> None:
        """Like ``ping``, without blocking the event loop."""
        self.must_be_open()
        try:
            await self._ado(self._pinging())
        except Exception as exc:
            raise ConfigurationError(unusable(self._source, exc)) from exc

    # -- entries ----------------------------------------------------------------------------------

    def read(self, lookups: Sequence[Lookup]) -> list[Entry | None]:
        """One answer for each lookup, in order; only servable entries."""
        return self._do(self._reading(lookups))

    def peek(self, lookups: Sequence[Lookup]) -> list[Entry | None]:
        """Like ``read``, but whatever became of the entries' tags; counts nothing."""
        return self._do(self._peeking(lookups))

    def write(self, key: FullKey, entry: Entry, lease: Lease | None = None) -> bool:
        """Store, and give ``lease`` back with it.

        ``False`` when nothing was stored: ``lease`` no longer holds the key, there is something
        under the entry's name that is not this library's, or the cache is closed.
        """
        return self._do(self._writing(key, entry, lease))

    def clear(self, namespaces: Sequence[Namespace] | None = None) -> None:
        """Delete what is in exactly these namespaces; ``None`` deletes everything.

        Raises:
            redis.RedisError: the server cannot be reached, say: some or all of it is still there.
            CacheClosed: this cache is closed.
        """
        with _noting("clear"):
            self._settle(self._do(self._clearing(namespaces), at_once=False))

    async def aread(self, lookups: Sequence[Lookup]) -> list[Entry | None]:
        """Like ``read``, without blocking the event loop."""
        return await self._ado(self._reading(lookups))

    async def apeek(self, lookups: Sequence[Lookup]) -> list[Entry | None]:
        """Like ``peek``, without blocking the event loop."""
        return await self._ado(self._peeking(lookups))

    async def awrite(self, key: FullKey, entry: Entry, lease: Lease | None = None) -> bool:
        """Like ``write``, without blocking the event loop."""
        return await self._ado(self._writing(key, entry, lease))

    def copy(
        self, source: Namespace, target: Namespace, deps: Mapping[str, tuple[str, str]]
    ) -> int:
        """Copy what is servable in one owned namespace into another; see ``Cache``."""
        return self._do(self._copying(source, target, deps), at_once=False)

    async def acopy(
        self, source: Namespace, target: Namespace, deps: Mapping[str, tuple[str, str]]
    ) -> int:
        """Like ``copy``, without blocking the event loop."""
        return await self._ado(self._copying(source, target, deps), at_once=False)

    def purge(self, namespace: Namespace) -> int:
        """Delete what can never be served again in one owned namespace; see ``Cache``."""
        return self._do(self._purging(namespace), at_once=False)

    async def apurge(self, namespace: Namespace) -> int:
        """Like ``purge``, without blocking the event loop."""
        return await self._ado(self._purging(namespace), at_once=False)

    async def aclear(self, namespaces: Sequence[Namespace] | None = None) -> None:
        """Like ``clear``, without blocking the event loop."""
        with _noting("aclear"):
            await self._asettle(await self._ado(self._clearing(namespaces), at_once=False))

    # -- tags -------------------------------------------------------------------------------------

    def peek_tags(self, tags: Collection[str]) -> Mapping[str, str]:
        """The current tokens of these tag ids; those that have none are left out."""
        return self._do(self._peeking_tags(tags))

    def tag_tokens(self, tags: Sequence[str]) -> tuple[str, ...]:
        """The current token of each tag id, made where there is none."""
        return self._do(self._taking(tags))

    def drop_tags(self, tags: Sequence[str]) -> None:
        """Forget the tokens of these tag ids; returns when every process does without them."""
        with _noting("invalidate"):
            wait = self._do(self._dropping(tags))
            self._tally.add(invalidations=len(tags))
            self._settle(wait)

    async def apeek_tags(self, tags: Collection[str]) -> Mapping[str, str]:
        """Like ``peek_tags``, without blocking the event loop."""
        return await self._ado(self._peeking_tags(tags))

    async def atag_tokens(self, tags: Sequence[str]) -> tuple[str, ...]:
        """Like ``tag_tokens``, without blocking the event loop."""
        return await self._ado(self._taking(tags))

    async def adrop_tags(self, tags: Sequence[str]) -> None:
        """Like ``drop_tags``, without blocking the event loop."""
        with _noting("ainvalidate"):
            wait = await self._ado(self._dropping(tags))
            self._tally.add(invalidations=len(tags))
            await self._asettle(wait)

    def knows(self, deps: Sequence[tuple[str, str]]) -> bool:
        """Whether these tokens are known, without asking the server, to be current."""
        view = self._view
        if view is None:
            listener = self._listening()
            if listener is None:
                return False
            listener.follow_tags()
            view = self._view = listener.view
        return view.knows(deps)

    def _settle(self, wait: float) -> None:
        wait = wait or self._do(self._restarted(self._line))
        if wait:
            time.sleep(wait)

    async def _asettle(self, wait: float) -> None:
        if not wait:
            line = self._line if self._source.aconnect is None else self._async_line()
            wait = await self._ado(self._restarted(line))
        if wait:
            await asyncio.sleep(wait)

    # -- leases -----------------------------------------------------------------------------------

    def acquire(self, key: FullKey) -> Lease | None:
        """Take the lease of ``key``; ``None`` while somebody else holds it."""
        return self._do(self._acquiring(key))

    def renew(self, lease: Lease) -> Lease | None:
        """Extend a lease by ``lease_seconds``; ``None`` when it was lost."""
        return self._do(self._renewing(lease))

    def renew_many(self, leases: Sequence[Lease]) -> list[Lease | None]:
        """What ``renew`` answers for each lease, in one round trip."""
        return self._do(self._renewing_all(leases))

    def release(self, lease: Lease) -> None:
        """Give a lease back; one that was lost meanwhile is left to its new holder."""
        self._do(self._releasing(lease))

    def pause(self, key: FullKey, seconds: float) -> None:
        """Return when the lease of ``key`` is free, or after ``seconds``."""
        listener = self._listening()
        if listener is None:
            time.sleep(min(seconds, _POLL))
            return
        channel = self._key_name("w", key).encode()
        with listener.watching(channel, asynchronous=False) as watcher:
            if watcher.ready.wait(min(seconds, _POLL)):
                left = self._do(self._lease_left(key))
                watcher.told.wait(min(seconds, left))

    async def apause(self, key: FullKey, seconds: float) -> None:
        """Like ``pause``, without blocking the event loop."""
        listener = self._listening()
        if listener is None:
            await asyncio.sleep(min(seconds, _POLL))
            return
        channel = self._key_name("w", key).encode()
        with listener.watching(channel, asynchronous=True) as watcher:
            if await _heard(watcher.ready, min(seconds, _POLL)):
                left = await self._ado(self._lease_left(key))
                await _heard(watcher.told, min(seconds, left))

    async def aacquire(self, key: FullKey) -> Lease | None:
        """Like ``acquire``, without blocking the event loop."""
        return await self._ado(self._acquiring(key))

    async def arenew(self, lease: Lease) -> Lease | None:
        """Like ``renew``, without blocking the event loop."""
        return await self._ado(self._renewing(lease))

    async def arelease(self, lease: Lease) -> None:
        """Like ``release``, without blocking the event loop."""
        await self._ado(self._releasing(lease))

    def _take_back(self, lease: Lease) -> None:
        """Release a lease that nobody has any more, without an event loop: its may have ended."""
        with self._returning:
            self._unwanted.append(lease)
            if self._closed or len(self._unwanted) > 1:
                return
            self._returner = threading.Thread(
                target=self._give_back, name="langgraph-perf-release", daemon=True
            )
            try:
                self._returner.start()
            except RuntimeError:  # no more threads, or the interpreter is shutting down
                self._unwanted.clear()  # they run out by themselves

    def _give_back(self) -> None:
        # twice: it may be granted a moment later, on the other connection
        for again in (True, False):
            with self._returning:
                leases = list(self._unwanted)
                if not again:
                    self._unwanted.clear()
            # a server that is away forgets them by itself
            with suppress(Exception):
                self._line.execute([self._release(lease) for lease in leases])
            if again:
                self._hurry.wait(_GRANTED_LATE)

    # -- commands ---------------------------------------------------------------------------------

    def _do(self, steps: Steps[T], at_once: bool = True) -> T:
        """Carry out ``steps``, ``at_once`` with one deadline for them all."""
        ends = time.monotonic() + self.timeout if at_once else None
        try:
            asked = next(steps)
            while True:
                if callable(asked):
                    asked = steps.send(asked())
                else:
                    asked = steps.send(self._line.execute(asked, ends) if asked else [])
        except StopIteration as stop:
            result: T = stop.value
            return result
        finally:
            steps.close()

    async def _ado(self, steps: Steps[T], at_once: bool = True) -> T:
        if self._source.aconnect is None:
            return await self._offload(self._do, steps, at_once)
        ends = time.monotonic() + self.timeout if at_once else None
        try:
            asked = next(steps)
            while True:
                if callable(asked):
                    asked = steps.send(await self._offload(asked))
                elif asked:
                    asked = steps.send(await self._async_line().execute(asked, ends))
                else:
                    await asyncio.sleep(0)
                    asked = steps.send([])
        except StopIteration as stop:
            result: T = stop.value
            return result
        finally:
            steps.close()

    def _async_line(self) -> AsyncLine:
        loop = asyncio.get_running_loop()
        line = self._lines.get(loop)
        if line is None:
            if self._closed:
                raise ConnectionError("the cache is closed")
            assert self._source.aconnect is not None
            with self._counting:
                for old in [old for old in self._lines if old.is_closed()]:
                    del self._lines[old]
                line = AsyncLine(self._source.aconnect, self.timeout, self._trips)
                self._lines[loop] = line
        return line

    # -- what the server says unasked -------------------------------------------------------------

    def _listening(self) -> Listener | None:
        if self._source.connect is None or self._closed:
            return None
        with self._counting:
            if self._listener is None:
                before, after = self._name("t", "").encode()[:-1], b"}"
                self._listener = Listener(
                    self._source.connect,
                    (before, after),
                    self._presence,
                    self._viewers,
                    self.timeout,
                )
                weakref.finalize(self, self._listener.close)
            return self._listener

    # -- the rest ---------------------------------------------------------------------------------

    def stats(self) -> CacheStats:
        """A snapshot of counters; how much the server holds would be a walk over all its keys."""
        return self._tally.stats()

    async def astats(self) -> CacheStats:
        """Like ``stats``."""
        return self.stats()

    def close(self) -> None:
        """Close the connections; a closed cache answers every lookup with a miss."""
        super().close()
        self._view = None
        self._hurry.set()
        returner = self._returner
        if returner is not None and returner.is_alive():
            returner.join(self.timeout)
        if self._listener is not None:
            self._listener.close()
        self._finalizer()
        for loop, line in list(self._lines.items()):
            if loop.is_running():
                loop.call_soon_threadsafe(_spawn, loop, line)
            elif not loop.is_closed() and not _in_a_loop():
                loop.run_until_complete(line.aclose())
        self._lines = weakref.WeakKeyDictionary()

    async def aclose(self) -> None:
        """Like ``close``, without blocking the event loop."""
        self._closed = True
        line = self._lines.pop(asyncio.get_running_loop(), None)
        if line is not None:
            await line.aclose()
        await super().aclose()

    def _after_fork(self) -> None:
        super()._after_fork()
        # the connections are the parent's; what is thrown away here, Python would close
        _parents.append((self._line, list(self._lines.items()), self._view))
        for line in self._lines.values():
            line.abandon()
        if self._listener is not None:
            self._listener.abandon()
        self._finalizer.detach()
        self._forget_returns()
        self._counting = threading.Lock()
        self._connect()


@contextmanager
def _noting(call: str) -> Iterator[None]:
    """Say with an error what it leaves undone; it stays redis-py's, for those who catch that."""
    try:
        yield
    except CacheClosed:
        raise  # which says so itself
    except Exception as exc:
        if sys.version_info >= (3, 11):
            exc.add_note(
                f"RedisCache.{call}() was not carried out, or not wholly: results that it was to "
                "remove may be served until it is called again and succeeds"
            )
        raise


async def _heard(event: asyncio.Event, seconds: float) -> bool:
    try:
        await within(seconds, event.wait())
    except asyncio.TimeoutError:
        return False
    return True


def _in_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _spawn(loop: asyncio.AbstractEventLoop, line: AsyncLine) -> None:
    task = loop.create_task(line.aclose())
    _closing.add(task)
    task.add_done_callback(_closing.discard)


_closing: set[asyncio.Task[None]] = set()
_parents: list[Any] = []
"""In a forked child, what it inherited."""
