"""What every cache shares: entries, tag tokens, leases, and LangGraph's ``BaseCache`` on top.

A cache stores *entries*: opaque payload bytes with what is needed to decide whether they may be
served. LangGraph's ``BaseCache`` methods and ``invalidate`` are written once, here, on top of a
handful of primitives that a backend implements.

Tags work by *tokens*. Each tag has one random token in the backend, made when it is first asked
for. An entry records the tokens its tags had **before** its computation began; it is served only
while every one of them is still current. Invalidating a tag drops its token: O(1), and whatever
was being computed meanwhile carries a dead token. A lost token (evicted, crashed) can only turn
hits into misses, never the other way round.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from types import TracebackType
from typing import Any, ClassVar, NamedTuple, TypeVar

from langgraph.cache.base import BaseCache, FullKey, Namespace
from langgraph.checkpoint.serde.base import SerializerProtocol
from typing_extensions import Self

from langgraph_perf.codec import DecodeError, EncodeError, decode, encode

T = TypeVar("T")
logger = logging.getLogger("langgraph_perf")


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored result.

    Attributes:
        payload: the encoded value; opaque to caches.
        created: unix seconds when the value was stored.
        expires: unix seconds from which on it is a miss; ``None`` never.
        deps: ``(tag id, token)`` pairs taken before the computation began.
        seconds: how long the computation took, which is what a hit saves.
        tokens: language-model tokens the computation spent.
    """

    payload: bytes
    created: float
    expires: float | None = None
    deps: tuple[tuple[str, str], ...] = ()
    seconds: float = 0.0
    tokens: int = 0


class Lookup(NamedTuple):
    """What to look for. ``tags`` are tag ids; ``max_age`` (seconds) narrows the entry's expiry."""

    key: FullKey
    tags: tuple[str, ...] = ()
    max_age: float | None = None


class Lease(NamedTuple):
    """The right to compute one key, across processes, until ``expires`` (unix seconds).

    ``token`` is the fence: a write that brings a token which no longer holds the key is refused.
    """

    key: FullKey
    token: str
    expires: float


@dataclass(frozen=True, slots=True)
class CacheStats:
    """A snapshot of one cache: what it holds now, and what it did since it was opened here.

    Attributes:
        entries: how many entries it holds; ``bytes`` how much room they take.
        expired: entries dropped because their time was over.
        evicted: entries dropped to stay within the bounds.
        damaged: stored entries that could not be read back and counted as misses.
        tiers: one snapshot for each tier of a tiered cache, first tier first.
    """

    hits: int = 0
    misses: int = 0
    writes: int = 0
    invalidations: int = 0
    expired: int = 0
    evicted: int = 0
    damaged: int = 0
    entries: int = 0
    bytes: int = 0
    tiers: tuple[CacheStats, ...] = ()


def tag_id(tag: str) -> str:
    """The name a tag has in storage: a digest, so that no user id is ever at rest in the clear."""
    return blake2b(tag.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def new_token() -> str:
    """A fresh tag or lease token; never repeats, so a dead one can never come back to life."""
    return secrets.token_hex(8)


def servable(entry: Entry, lookup: Lookup, current: Mapping[str, str], now: float) -> bool:
    """Whether ``entry`` may answer ``lookup`` at time ``now``, given the tags' current tokens.

    An entry stored without one of the tags asked for is refused as well: it was written by a
    policy that did not know the dependency.
    """
    if entry.expires is not None and now >= entry.expires:
        return False
    if lookup.max_age is not None and now >= entry.created + lookup.max_age:
        return False
    if not entry.deps:
        return not lookup.tags
    if any(current.get(tag) != token for tag, token in entry.deps):
        return False
    known = {tag for tag, _ in entry.deps}
    return known.issuperset(lookup.tags)


class Cache(BaseCache[Any]):
    """Base of this library's caches; also a LangGraph ``BaseCache`` for ``compile(cache=)``.

    A backend implements ``read``, ``write``, ``tag_tokens``, ``drop_tags``, ``clear``, ``stats``
    and, when other processes share it, ``acquire``, ``renew`` and ``release``. Primitives may raise
    anything: callers treat every failure as a miss (the cache fails open).

    Args:
        serde: wraps the bytes of every value at rest (for example LangGraph's
            ``EncryptedSerializer``). Default: none, values are stored as encoded.
        clock: what gives unix seconds; tests pass a fake one.
    """

    blocking: ClassVar[bool] = True
    """Whether primitives may block, so that an event loop must not call them directly."""
    shared: ClassVar[bool] = False
    """Whether other processes see the entries, so that a lease is worth taking."""
    lease_seconds: float = 10.0
    """How long a lease lives without renewal: how long a killed holder delays its successor."""

    def __init__(
        self,
        *,
        serde: SerializerProtocol | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(serde=serde)
        self.value_serde = serde
        self.clock = clock
        self._executor: ThreadPoolExecutor | None = None
        self._closed = False

    # -- primitives ---------------------------------------------------------------------------

    @abstractmethod
    def read(self, lookups: Sequence[Lookup]) -> list[Entry | None]:
        """One answer for each lookup, in order; only servable entries."""

    @abstractmethod
    def write(self, key: FullKey, entry: Entry, lease: Lease | None = None) -> bool:
        """Store; ``False`` when ``lease`` no longer holds the key, and nothing was stored."""

    @abstractmethod
    def tag_tokens(self, tags: Sequence[str]) -> tuple[str, ...]:
        """The current token of each tag id, made where there is none."""

    @abstractmethod
    def drop_tags(self, tags: Sequence[str]) -> None:
        """Forget the tokens of these tag ids."""

    @abstractmethod
    def stats(self) -> CacheStats:
        """A snapshot of counters and sizes."""

    def acquire(self, key: FullKey) -> Lease | None:
        """Take the lease of ``key``; ``None`` while somebody else holds it."""
        raise NotImplementedError

    def renew(self, lease: Lease) -> Lease | None:
        """Extend a lease by ``lease_seconds``; ``None`` when it was lost."""
        raise NotImplementedError

    def release(self, lease: Lease) -> None:
        """Give a lease back; one that was lost meanwhile is left to its new holder."""
        raise NotImplementedError

    # -- async twins: off the loop unless the backend never blocks ------------------------------

    async def _offload(self, fn: Callable[..., T], *args: Any) -> T:
        if not self.blocking:
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

    async def aacquire(self, key: FullKey) -> Lease | None:
        """Like ``acquire``, without blocking the event loop."""
        return await self._offload(self.acquire, key)

    async def arelease(self, lease: Lease) -> None:
        """Like ``release``, without blocking the event loop."""
        await self._offload(self.release, lease)

    # -- for users ------------------------------------------------------------------------------

    def invalidate(self, *tags: str) -> None:
        """Make every result that depends on one of ``tags`` a miss, in every process that shares
        this cache. Results still being computed from older data are never served either."""
        self.drop_tags(_tag_ids(tags))

    async def ainvalidate(self, *tags: str) -> None:
        """Like ``invalidate``, without blocking the event loop."""
        await self._offload(self.drop_tags, _tag_ids(tags))

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

    def get(self, keys: Sequence[FullKey]) -> dict[FullKey, Any]:
        """The values stored under ``keys``; absent, expired and damaged ones are left out."""
        return _decoded(keys, self.read([Lookup(key) for key in keys]))

    async def aget(self, keys: Sequence[FullKey]) -> dict[FullKey, Any]:
        """Like ``get``, without blocking the event loop."""
        return _decoded(keys, await self.aread([Lookup(key) for key in keys]))

    def set(self, pairs: Mapping[FullKey, tuple[Any, int | None]]) -> None:
        """Store ``{key: (value, ttl in seconds or None)}``; a value that cannot be encoded is
        left out and logged."""
        for key, entry in self._entries(pairs):
            self.write(key, entry)

    async def aset(self, pairs: Mapping[FullKey, tuple[Any, int | None]]) -> None:
        """Like ``set``, without blocking the event loop."""
        for key, entry in self._entries(pairs):
            await self.awrite(key, entry)

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


def _tag_ids(tags: Sequence[str]) -> list[str]:
    for tag in tags:
        if not isinstance(tag, str):
            raise TypeError(f"invalidate() takes tag names (str), got {tag!r}")
    return [tag_id(tag) for tag in tags]


def _decoded(keys: Sequence[FullKey], entries: Sequence[Entry | None]) -> dict[FullKey, Any]:
    values: dict[FullKey, Any] = {}
    for key, entry in zip(keys, entries, strict=True):
        if entry is None:
            continue
        try:
            values[key] = decode(entry.payload)
        except DecodeError as exc:
            logger.warning("stored result of %s is not served: %s", key[0], exc)
    return values
