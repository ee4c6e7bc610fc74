"""Somebody else's LangGraph cache as a plain store of this library's entries."""

from __future__ import annotations

import asyncio
import math
import queue
import threading
import time
import weakref
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, TypeVar

from langgraph.cache.base import BaseCache, FullKey, Namespace
from langgraph.cache.memory import InMemoryCache

from langgraph_perf._locks import new_lock
from langgraph_perf._within import within
from langgraph_perf.caches.base import (
    Cache,
    CacheStats,
    DamagedEntry,
    Entry,
    Lease,
    Lookup,
    TokenCache,
    key_digest,
    namespace_tag,
    pack,
    require_seconds,
    timely,
    unpack,
)
from langgraph_perf.errors import ConfigurationError

T = TypeVar("T")

_MOST_WORKERS = 8
_IDLE_SECONDS = 5.0
_BLOCKS_THE_LOOP = ("langgraph.cache.redis",)
"""Modules whose ``aget`` and ``aset`` call the blocking ones."""


class ForeignCache(TokenCache):
    """Keeps entries as ``bytes`` values of another LangGraph cache (``SqliteCache``, your own).

    It has no tags and no leases. Whatever it finds that is not one of its own entries is a miss.
    Keys go to it as digests: LangGraph's own caches join the parts of a namespace with a comma or
    a colon, mix up what contains one, and clear more than they were asked to.

    Args:
        inner: the cache. It stays its owner's: closing this one does not close it.
        deadline: seconds an operation may take; a backend that hangs costs no more.

    Raises:
        ConfigurationError: ``inner`` is not a LangGraph cache, or one of this library, which
            needs no adapter.
    """

    supports_tags = False

    def __init__(
        self,
        inner: BaseCache[Any],
        *,
        deadline: float = 2.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(clock=clock)
        if not isinstance(inner, BaseCache) or isinstance(inner, Cache):
            raise ConfigurationError(
                f"inner must be a LangGraph BaseCache that is not of this library, got {inner!r}"
            )
        self.inner = inner
        self.deadline = require_seconds("deadline", deadline)
        # a dict behind a lock cannot hang: no thread needed
        self.blocking = type(inner) is not InMemoryCache
        self._native = not type(inner).__module__.startswith(_BLOCKS_THE_LOOP)
        self._workers = _Workers(_MOST_WORKERS)

    @staticmethod
    def of(inner: BaseCache[Any]) -> ForeignCache:
        """The adapter of ``inner``; the same one for as long as somebody holds it."""
        with _adapters_lock:
            # by identity: it holds ``inner``, whose id is therefore nobody else's while it lives
            adapter = _adapters.get(id(inner))
            if adapter is None:
                adapter = _adapters[id(inner)] = ForeignCache(inner)
            return adapter

    # -- entries ----------------------------------------------------------------------------------

    def peek(self, lookups: Sequence[Lookup]) -> list[Entry | None]:
        """Like ``read``, but whatever became of the entries' tags; counts nothing."""
        if self._closed or not lookups:
            return [None] * len(lookups)
        return self._entries_of(lookups, self._call(self.inner.get, _keys(lookups)))

    async def apeek(self, lookups: Sequence[Lookup]) -> list[Entry | None]:
        """Like ``peek``, without blocking the event loop."""
        if self._closed or not lookups:
            return [None] * len(lookups)
        values = await self._acall(self.inner.aget, self.inner.get, _keys(lookups))
        return self._entries_of(lookups, values)

    async def aread(self, lookups: Sequence[Lookup]) -> list[Entry | None]:
        """Like ``read``, without blocking the event loop."""
        return self._checked(lookups, await self.apeek(lookups), {})

    def write(self, key: FullKey, entry: Entry, lease: Lease | None = None) -> bool:
        """Store; ``False`` when the cache is closed."""
        if self._closed:
            return False
        self._call(self.inner.set, self._pairs(key, entry))
        self._tally.add(writes=1)
        return True

    async def awrite(self, key: FullKey, entry: Entry, lease: Lease | None = None) -> bool:
        """Like ``write``, without blocking the event loop."""
        if self._closed:
            return False
        await self._acall(self.inner.aset, self.inner.set, self._pairs(key, entry))
        self._tally.add(writes=1)
        return True

    def clear(self, namespaces: Sequence[Namespace] | None = None) -> None:
        """Delete what is in these namespaces; ``None`` deletes everything."""
        if not self._closed and (namespaces is None or namespaces):
            self._call(self.inner.clear, _plain_namespaces(namespaces))

    async def aclear(self, namespaces: Sequence[Namespace] | None = None) -> None:
        """Like ``clear``, without blocking the event loop."""
        if not self._closed and (namespaces is None or namespaces):
            await self._acall(self.inner.aclear, self.inner.clear, _plain_namespaces(namespaces))

    def _pairs(self, key: FullKey, entry: Entry) -> dict[FullKey, tuple[bytes, int | None]]:
        ttl = None
        if entry.expires is not None:
            # whole seconds, at least one: the entry itself knows to the fraction
            ttl = max(1, math.ceil(entry.expires - self.clock()))
        return {_plain(key): (pack(key, entry), ttl)}

    def _entries_of(self, lookups: Sequence[Lookup], values: Any) -> list[Entry | None]:
        now = self.clock()
        return [self._entry_of(lookup, values, now) for lookup in lookups]

    def _entry_of(self, lookup: Lookup, values: Any, now: float) -> Entry | None:
        blob = values.get(_plain(lookup.key))
        if blob is None:
            return None
        try:
            entry = unpack(lookup.key, blob)
        except DamagedEntry:
            self._tally.add(damaged=1)
            return None
        return entry if timely(entry, lookup, now) else None

    # -- what it does not have --------------------------------------------------------------------

    def peek_tags(self, tags: Collection[str]) -> Mapping[str, str]:
        """No token is ever current: entries with tags are not served."""
        return {}

    def tag_tokens(self, tags: Sequence[str]) -> tuple[str, ...]:
        """Nothing for no tags.

        Raises:
            NotImplementedError: there are tags (see ``supports_tags``).
        """
        self._no_tags(tags)
        return ()

    def drop_tags(self, tags: Sequence[str]) -> None:
        """Nothing for no tags.

        Raises:
            NotImplementedError: there are tags (see ``supports_tags``).
        """
        self._no_tags(tags)

    def _no_tags(self, tags: Sequence[str]) -> None:
        if tags:
            raise NotImplementedError(
                f"{type(self.inner).__name__} has no tags; use MemoryCache, DiskCache or RedisCache"
            )

    def stats(self) -> CacheStats:
        """A snapshot of counters; how much the other cache holds, it does not tell."""
        return self._tally.stats()

    # -- deadlines --------------------------------------------------------------------------------

    def _call(self, fn: Callable[..., T], *args: Any) -> T:
        if not self.blocking:
            return fn(*args)
        future = self._workers.run(fn, args)
        try:
            return future.result(self.deadline)
        except FutureTimeoutError:
            if future.done():
                raise  # its own
            future.cancel()
            raise TimeoutError(
                f"no answer from {type(self.inner).__name__} within {self.deadline} seconds"
            ) from None

    async def _acall(
        self, afn: Callable[..., Coroutine[Any, Any, T]], fn: Callable[..., T], *args: Any
    ) -> T:
        if not self.blocking:
            return fn(*args)
        work = afn(*args) if self._native else asyncio.wrap_future(self._workers.run(fn, args))
        return await within(self.deadline, work)

    def _after_fork(self) -> None:
        super()._after_fork()
        self._workers = _Workers(_MOST_WORKERS)


class _Workers:
    """A few daemon threads. Unlike a ``ThreadPoolExecutor``'s they may hang for ever: that keeps
    neither the interpreter from exiting nor, beyond its deadline, a caller waiting."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Any, Any]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads = 0
        self._busy = 0

    def run(self, fn: Callable[..., T], args: tuple[Any, ...]) -> Future[T]:
        future: Future[T] = Future()
        self._jobs.put((future, fn, args))
        with self._lock:
            self._busy += 1
            if self._busy > self._threads and self._threads < self._most:
                thread = threading.Thread(
                    target=self._work, name="langgraph-perf-foreign", daemon=True
                )
                try:
                    thread.start()
                    self._threads += 1
                except RuntimeError:  # no more threads, or the interpreter is shutting down
                    if not self._threads:
                        # skipped, and counted off, by the first thread that can be had
                        future.cancel()
                        raise
        return future

    def _work(self) -> None:
        while True:
            try:
                future, fn, args = self._jobs.get(timeout=_IDLE_SECONDS)
            except queue.Empty:
                with self._lock:
                    # `run` puts first and counts then: whoever comes second here sees the other
                    if self._jobs.empty():
                        self._threads -= 1
                        return
                continue
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(fn(*args))
                except BaseException as exc:
                    future.set_exception(exc)
            # while it waits for the next job nothing of this one stays alive
            del future, fn, args
            with self._lock:
                self._busy -= 1


def _keys(lookups: Sequence[Lookup]) -> list[FullKey]:
    return list({_plain(lookup.key): None for lookup in lookups})


def _plain(key: FullKey) -> FullKey:
    digest = key_digest(key).hex()
    return (digest[:32],), digest[32:]


def _plain_namespaces(namespaces: Sequence[Namespace] | None) -> list[Namespace] | None:
    if namespaces is None:
        return None
    return [(namespace_tag(tuple(namespace)),) for namespace in namespaces]


_adapters: weakref.WeakValueDictionary[int, ForeignCache] = weakref.WeakValueDictionary()
_adapters_lock = new_lock()
