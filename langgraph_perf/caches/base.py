"""What every cache shares: LangGraph's ``BaseCache`` on top of a few primitives.

LangGraph's ``BaseCache`` methods and ``invalidate`` are written once, here, on top of a handful of
primitives that a backend implements. What they store is in ``entry``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import threading
import time
import weakref
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeVar

from langgraph.cache.base import BaseCache, FullKey, Namespace
from langgraph.checkpoint.serde.base import SerializerProtocol
from typing_extensions import Self

from langgraph_perf.caches.entry import (
    OWNED,
    CacheStats,
    DamagedEntry,
    Entry,
    Lease,
    Lookup,
    key_digest,
    namespace_tag,
    new_token,
    owned,
    pack,
    servable,
    tag_id,
    timely,
    unpack,
    with_deps,
)
from langgraph_perf.codec import DecodeError, EncodeError, decode, encode
from langgraph_perf.errors import CacheClosed, ConfigurationError

__all__ = [
    "OWNED",
    "Cache",
    "CacheStats",
    "DamagedEntry",
    "Entry",
    "Lease",
    "Lookup",
    "Tally",
    "TokenCache",
    "key_digest",
    "namespace_tag",
    "new_token",
    "owned",
    "pack",
    "require_int",
    "require_seconds",
    "servable",
    "tag_id",
    "timely",
    "unpack",
    "with_deps",
]

_ANY = Lookup(((), ""))
T = TypeVar("T")
logger = logging.getLogger("langgraph_perf")

_open_caches: weakref.WeakSet[Cache] = weakref.WeakSet()


class Tally:
    """Counters of ``CacheStats``, shared by threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._hits = 0
        self._misses = 0
        self._others: Counter[str] = Counter()

    def add(self, **counts: int) -> None:
        """Add to the counters named."""
        with self._lock:
            for name, count in counts.items():
                self._others[name] += count

    def hit(self) -> None:
        """Count a hit."""
        with self._lock:
            self._hits += 1

    def read(self, answers: Sequence[Entry | None]) -> None:
        """Count each answer as a hit or, where it is ``None``, as a miss."""
        misses = answers.count(None)
        with self._lock:
            self._hits += len(answers) - misses
            self._misses += misses

    def stats(self, **now: Any) -> CacheStats:
        """A snapshot; ``now`` gives the fields that are not counters."""
        with self._lock:
            counters = {"hits": self._hits, "misses": self._misses, **self._others}
        return CacheStats(**{**counters, **now})


def require_int(field: str, given: object, minimum: int, unit: str) -> int:
    """``given``, if it is an int of at least ``minimum``.

    Raises:
        ConfigurationError: it is not.
    """
    if isinstance(given, bool) or not isinstance(given, int) or given < minimum:
        raise ConfigurationError(
            f"{field} must be an int of at least {minimum} {unit}, got {given!r}"
        )
    return given


def require_seconds(field: str, given: object) -> float:
    """``given``, if it is a positive number of seconds.

    Raises:
        ConfigurationError: it is not.
    """
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not 0 < given < 1e9:
        raise ConfigurationError(f"{field} must be a positive number of seconds, got {given!r}")
    return float(given)


class Cache(BaseCache[Any]):
    """Base of this library's caches; also a LangGraph ``BaseCache`` for ``compile(cache=)``.

    A backend implements ``read``, ``write``, ``tag_tokens``, ``drop_tags``, ``clear``, ``stats``
    and, when other processes share it, ``acquire``, ``renew`` and ``release``. Primitives may raise
    anything: callers treat every failure as a miss (the cache fails open). Tag ids reach it in
    ``tags`` arguments; ``clear`` also drops the tokens of the ``namespace_tag`` of what it clears.

    Args:
        serde: wraps the bytes of every value at rest (for example LangGraph's
            ``EncryptedSerializer``). Default: none, values are stored as encoded.
        clock: what gives unix seconds; tests pass a fake one.
    """

    blocking: bool = True
    """Whether primitives may block, so that an event loop must not call them directly."""
    shared: bool = False
    """Whether other processes see the entries, so that a lease is worth taking."""
    layered: bool = False
    """Whether it may have several entries of one key, of which ``read`` gives the first."""
    supports_tags: bool = True
    """Whether it has tag tokens; without them nothing that depends on a tag is ever served."""
    timeout: float = 2.0
    """Seconds an operation may take, and those of one run together if they are slow."""
    lease_seconds: float = 10.0
    """How long a lease lives without renewal: how long a killed holder delays its successor."""
    notifies: bool = False
    """Whether ``pause`` returns as soon as the lease is free, so that it may be long."""

    def __init__(
        self,
        *,
        serde: SerializerProtocol | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if serde is not None and not (
            isinstance(serde, SerializerProtocol) and not isinstance(serde, type)
        ):
            raise ConfigurationError(
                f"{type(self).__name__}: serde: got {serde!r:.200}; accepted: an object with "
                "dumps_typed and loads_typed, such as LangGraph's EncryptedSerializer(...), or None"
            )
        super().__init__(serde=serde)
        if not callable(clock):
            raise ConfigurationError(
                f"clock: got {clock!r:.200}; accepted: a callable that returns unix seconds"
            )
        self.value_serde = serde
        self.clock = clock
        self._tally = Tally()
        self._logged: set[str] = set()
        self._executor: ThreadPoolExecutor | None = None
        self._closed = False
        _open_caches.add(self)

    # -- primitives ---------------------------------------------------------------------------

    @abstractmethod
    def read(self, lookups: Sequence[Lookup]) -> list[Entry | None]:
        """One answer for each lookup, in order; only servable entries."""

    @abstractmethod
    def write(self, key: FullKey, entry: Entry, lease: Lease | None = None) -> bool:
        """Store, and give ``lease`` back with it.

        ``False`` when nothing was stored: ``lease`` no longer holds the key, the entry alone is
        larger than the cache, or the cache is closed.
        """

    @abstractmethod
    def tag_tokens(self, tags: Sequence[str]) -> tuple[str, ...]:
        """The current token of each tag id, made where there is none."""

    @abstractmethod
    def drop_tags(self, tags: Sequence[str]) -> None:
        """Forget the tokens of these tag ids."""

    @abstractmethod
    def stats(self) -> CacheStats:
        """A snapshot of counters and sizes."""

    def peek(self, lookups: Sequence[Lookup]) -> list[Entry | None]:
        """Like ``read``, but whatever became of the entries' tags: for a tiered cache, which
        asks another tier about them. Without it a cache serves as an upper tier, but not for
        entries that depend on tags."""
        return self.read([lookup._replace(tags=()) for lookup in lookups])

    def peek_tags(self, tags: Collection[str]) -> Mapping[str, str]:
        """The current tokens of these tag ids; those that have none may be left out."""
        ids = list(tags)
        return dict(zip(ids, self.tag_tokens(ids), strict=True))

    def copy(
        self, source: Namespace, target: Namespace, deps: Mapping[str, tuple[str, str]]
    ) -> int:
        """Copy what is in exactly ``source`` into ``target``, under the same names.

        Only for ``owned`` namespaces; of others, and by a backend that cannot, nothing is copied.
        Entries that are not servable now stay behind, and those in ``target`` are overwritten. In
        the copies each dependency on a tag id in ``deps`` is replaced by the ``(tag id, token)``
        given there; all else stays as it is.

        Returns:
            How many entries were copied.
        """
        return 0

    def purge(self, namespace: Namespace) -> int:
        """Delete what can never be served again in exactly one ``owned`` namespace.

        Of others, and by a backend that cannot, nothing is deleted.

        Returns:
            How many entries were deleted.
        """
        return 0

    def read_now(self, lookup: Lookup) -> Entry | None:
        """The servable entry, if it can be had without waiting for anything; ``None`` does not
        mean that ``read`` finds none. Must not raise."""
        return None

    def knows(self, deps: Sequence[tuple[str, str]]) -> bool:
        """Whether these tokens are current for all that is known without waiting for anything;
        ``False`` when that cannot be told."""
        return False

    def acquire(self, key: FullKey) -> Lease | None:
        """Take the lease of ``key``; ``None`` while somebody else holds it."""
        raise NotImplementedError

    def renew(self, lease: Lease) -> Lease | None:
        """Extend a lease by ``lease_seconds``; ``None`` when it was lost."""
        raise NotImplementedError

    def renew_many(self, leases: Sequence[Lease]) -> list[Lease | None]:
        """What ``renew`` answers for each lease; where it failed, the lease as it was."""
        return [self._renewed(lease) for lease in leases]

    def _renewed(self, lease: Lease) -> Lease | None:
        try:
            return self.renew(lease)
        except Exception:
            logger.debug("lease of %s could not be renewed", lease.key, exc_info=True)
            return lease

    def release(self, lease: Lease) -> None:
        """Give a lease back; one that was lost meanwhile is left to its new holder."""
        raise NotImplementedError

    def pause(self, key: FullKey, seconds: float) -> None:
        """Wait for the holder of the lease of ``key``, at most for ``seconds``."""
        time.sleep(seconds)

    # -- async twins: off the loop unless the backend never blocks ------------------------------

    async def _offload(self, fn: Callable[..., T], *args: Any) -> T:
        if not self.blocking or self._closed:
            return fn(*args)
        if self._executor is None:
            # a private one: the default executor runs the users' own blocking nodes
            self._executor = ThreadPoolExecutor(4, thread_name_prefix="langgraph-perf-cache")
        return await asyncio.get_running_loop().run_in_executor(self._executor, fn, *args)

    async def aread(self, lookups: Sequence[Lookup]) -> list[Entry | None]:
        """Like ``read``, without blocking the event loop."""
        return await self._offload(self.read, lookups)

    async def awrite(self, key: FullKey, entry: Entry, lease: Lease | None = None) -> bool:
        """Like ``write``, without blocking the event loop."""
        return await self._offload(self.write, key, entry, lease)

    async def atag_tokens(self, tags: Sequence[str]) -> tuple[str, ...]:
        """Like ``tag_tokens``, without blocking the event loop."""
        return await self._offload(self.tag_tokens, tags)

    async def adrop_tags(self, tags: Sequence[str]) -> None:
        """Like ``drop_tags``, without blocking the event loop."""
        await self._offload(self.drop_tags, tags)

    async def apeek(self, lookups: Sequence[Lookup]) -> list[Entry | None]:
        """Like ``peek``, without blocking the event loop."""
        return await self._offload(self.peek, lookups)

    async def apeek_tags(self, tags: Collection[str]) -> Mapping[str, str]:
        """Like ``peek_tags``, without blocking the event loop."""
        return await self._offload(self.peek_tags, tags)

    async def acopy(
        self, source: Namespace, target: Namespace, deps: Mapping[str, tuple[str, str]]
    ) -> int:
        """Like ``copy``, without blocking the event loop."""
        return await self._offload(self.copy, source, target, deps)

    async def apurge(self, namespace: Namespace) -> int:
        """Like ``purge``, without blocking the event loop."""
        return await self._offload(self.purge, namespace)

    async def aacquire(self, key: FullKey) -> Lease | None:
        """Like ``acquire``, without blocking the event loop."""
        return await self._offload(self.acquire, key)

    async def arenew(self, lease: Lease) -> Lease | None:
        """Like ``renew``, without blocking the event loop."""
        return await self._offload(self.renew, lease)

    async def arelease(self, lease: Lease) -> None:
        """Like ``release``, without blocking the event loop."""
        await self._offload(self.release, lease)

    async def apause(self, key: FullKey, seconds: float) -> None:
        """Like ``pause``, without blocking the event loop."""
        await asyncio.sleep(seconds)

    # -- for users ------------------------------------------------------------------------------

    def invalidate(self, *tags: str) -> None:
        """Make every result that depends on one of ``tags`` a miss, in every process that shares
        this cache. Results still being computed from older data are never served either.

        Raises:
            ConfigurationError: a tag has a ``{field}`` that is not filled in.
            Exception: the backend failed: others may go on serving what depends on them.
            CacheClosed: the cache is closed, and others share what is in it.
        """
        self.drop_tags(_tag_ids(tags))

    async def ainvalidate(self, *tags: str) -> None:
        """Like ``invalidate``, without blocking the event loop."""
        await self.adrop_tags(_tag_ids(tags))

    async def astats(self) -> CacheStats:
        """Like ``stats``, without blocking the event loop."""
        return await self._offload(self.stats)

    def close(self) -> None:
        """Release what is held open; a closed cache answers every lookup with a miss."""
        self._closed = True
        if self._executor is not None:
            self._executor.shutdown(wait=True)
            self._executor = None

    async def aclose(self) -> None:
        """Like ``close``, without blocking the event loop."""
        await asyncio.get_running_loop().run_in_executor(None, self.close)

    def must_be_open(self) -> None:
        """What ``drop_tags`` and ``clear`` of a shared backend begin with: a miss more is harmless,
        an invalidation that nobody sees is not.

        Raises:
            CacheClosed: the cache is closed, and others still serve what is in it.
        """
        if self._closed and self.shared:
            raise CacheClosed(
                f"this {type(self).__name__} is closed: it answers with misses, but can neither "
                "invalidate nor clear what others still serve; use one that is open"
            )

    def _disown(self) -> None:
        """Runs in a forked child, before ``_after_fork`` of any cache."""

    def _after_fork(self) -> None:
        """Runs in a forked child: locks may be held by threads that it does not have."""
        self._executor = None
        self._tally = Tally()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    # -- LangGraph's BaseCache ------------------------------------------------------------------

    # These four fail open, as LangGraph's own nodes do not: what they raise would fail the run.

    def get(self, keys: Sequence[FullKey]) -> dict[FullKey, Any]:
        """The values stored under ``keys``; absent, expired and damaged ones are left out, and all
        of them if the backend fails, which is logged."""
        try:
            entries = self.read([Lookup(key) for key in keys])
        except Exception as exc:
            self._missed("read", exc)
            return {}
        return decoded(keys, entries)

    async def aget(self, keys: Sequence[FullKey]) -> dict[FullKey, Any]:
        """Like ``get``, without blocking the event loop."""
        try:
            entries = await self.aread([Lookup(key) for key in keys])
        except Exception as exc:
            self._missed("read", exc)
            return {}
        return decoded(keys, entries)

    def set(self, pairs: Mapping[FullKey, tuple[Any, int | None]]) -> None:
        """Store ``{key: (value, ttl in seconds or None)}``; a value that cannot be encoded is
        left out and logged, and so is what the backend fails to store."""
        try:
            for key, entry in self._entries(pairs):
                self.write(key, entry)
        except Exception as exc:
            self._missed("write", exc)

    async def aset(self, pairs: Mapping[FullKey, tuple[Any, int | None]]) -> None:
        """Like ``set``, without blocking the event loop."""
        try:
            for key, entry in self._entries(pairs):
                await self.awrite(key, entry)
        except Exception as exc:
            self._missed("write", exc)

    def _missed(self, operation: str, exc: Exception) -> None:
        kind = f"{operation}: {type(exc).__name__}"
        logger.log(
            logging.DEBUG if kind in self._logged else logging.WARNING,
            "%s of %s failed, the run goes on without the cache (logged once): %s: %s",
            operation,
            type(self).__name__,
            type(exc).__name__,
            exc or "no answer within the deadline",
        )
        self._logged.add(kind)

    async def aclear(self, namespaces: Sequence[Namespace] | None = None) -> None:
        """Like ``clear``, without blocking the event loop."""
        await self._offload(self.clear, namespaces)

    def _entries(
        self, pairs: Mapping[FullKey, tuple[Any, int | None]]
    ) -> Iterable[tuple[FullKey, Entry]]:
        for key, (value, ttl) in pairs.items():
            try:
                payload = encode(value)
            except EncodeError as exc:
                logger.warning("result of %s is not stored: %s", key[0], exc)
                continue
            now = self.clock()
            yield key, Entry(payload, now, None if ttl is None else now + ttl)


class TokenCache(Cache):
    """Reading written on top of ``peek`` and ``peek_tags``, for caches that implement both."""

    @abstractmethod
    def peek(self, lookups: Sequence[Lookup]) -> list[Entry | None]:
        """Like ``read``, but whatever became of the entries' tags; counts nothing."""

    @abstractmethod
    def peek_tags(self, tags: Collection[str]) -> Mapping[str, str]:
        """The current tokens of these tag ids; those that have none are left out."""

    def read(self, lookups: Sequence[Lookup]) -> list[Entry | None]:
        """One answer for each lookup, in order; only servable entries."""
        entries = self.peek(lookups)
        tags = {tag for entry in entries if entry is not None for tag, _ in entry.deps}
        # after the entries: a token dropped between the two is seen
        return self._checked(lookups, entries, self.peek_tags(tags) if tags else {})

    def _copied(
        self,
        entries: Sequence[Entry | None],
        current: Mapping[str, str],
        deps: Mapping[str, tuple[str, str]],
    ) -> list[Entry | None]:
        """What ``copy`` stores for each of ``entries``; ``None`` for those it leaves behind."""
        now = self.clock()
        return [
            with_deps(entry, deps)
            if entry is not None and servable(entry, _ANY, current, now)
            else None
            for entry in entries
        ]

    def _spent(self, entries: Sequence[Entry | None], current: Mapping[str, str]) -> list[bool]:
        """Which of ``entries`` can never be served again."""
        now = self.clock()
        return [entry is None or not servable(entry, _ANY, current, now) for entry in entries]

    def _checked(
        self,
        lookups: Sequence[Lookup],
        entries: Sequence[Entry | None],
        current: Mapping[str, str],
    ) -> list[Entry | None]:
        now = self.clock()
        answers = [
            entry if entry is not None and servable(entry, lookup, current, now) else None
            for entry, lookup in zip(entries, lookups, strict=True)
        ]
        self._tally.read(answers)
        return answers


def _reset_after_fork() -> None:
    caches = list(_open_caches)
    for cache in caches:
        cache._disown()
    for cache in caches:
        # one without all its attributes was still being made by a thread that is not here
        with contextlib.suppress(AttributeError):
            cache._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_after_fork)


TEMPLATE = re.compile(r"\{[A-Za-z_][\w.]*\}")
"""A field of a template, as the tags of a ``CachePolicy`` have them."""


def _tag_ids(tags: Sequence[str]) -> list[str]:
    for tag in tags:
        if not isinstance(tag, str):
            raise TypeError(f"invalidate() takes tag names (str), got {tag!r}")
        if TEMPLATE.search(tag):
            raise ConfigurationError(
                f"invalidate(): got {tag!r}, whose field nobody fills in, so no result depends on "
                "it; accepted: the tag itself, such as 'user:42'"
            )
    return [tag_id(tag) for tag in tags]


def decoded(keys: Sequence[FullKey], entries: Sequence[Entry | None]) -> dict[FullKey, Any]:
    """What ``BaseCache.get`` answers: the values of the entries found for ``keys``."""
    values: dict[FullKey, Any] = {}
    for key, entry in zip(keys, entries):  # noqa: B905 - as long as each other; `strict` is slow
        if entry is None:
            continue
        try:
            values[key] = decode(entry.payload)
        except DecodeError as exc:
            logger.warning("stored result of %s is not served: %s", key[0], exc)
    return values
