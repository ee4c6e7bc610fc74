"""A cache as its callers see it: it never raises, never stalls a run, and batches what it can.

Every operation fails open: an error or a missed deadline is a miss (or a result that is not
stored), counted, and logged once per kind and outage, as is the outage's end. After a few failures
in a row the cache is left alone for a while, see ``_breaker``.
"""

from __future__ import annotations

import asyncio
import logging
import time
import weakref
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, Literal, TypeVar

from langgraph.cache.base import FullKey, Namespace

from langgraph_perf._breaker import Breaker, Guarded, took_its_deadline
from langgraph_perf._flight import FlightTable
from langgraph_perf._locks import new_lock
from langgraph_perf._refresh import Among
from langgraph_perf._within import within
from langgraph_perf.caches.base import Cache, Entry, Lease, Lookup, owned, tag_id
from langgraph_perf.caches.tiered import LeftAlone

T = TypeVar("T")
logger = logging.getLogger("langgraph_perf")

UNTOLD = 0.1
"""Seconds until the next look at a lease when waiting for its holder failed."""
MOST_AT_ONCE = 64
"""Most lookups one batch answers: whoever is answered runs at once, and the loop has others."""


class Backend(Guarded):
    """One cache, its breakers and its flights; shared by all graphs that use the cache.

    Attributes:
        background: the leases of the runs in the background, which any other run may take away.
        refreshing: who has one running, by key.
    """

    deadline = 2.0
    """Seconds an awaited operation may take before the run goes on without it."""

    def __init__(self, cache: Cache, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(clock)
        self.cache = cache
        self.flights = FlightTable()
        self.background: dict[FullKey, Lease] = {}
        self.refreshing: Among = {}
        self._failures: Counter[str] = Counter()
        self._batchers: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Batcher] = (
            weakref.WeakKeyDictionary()
        )

    @staticmethod
    def of(cache: Cache) -> Backend:
        """The one backend of ``cache``."""
        with _of_lock:
            # kept on the cache itself: a table beside it would keep it alive for ever
            backend = cache.__dict__.get("_backend")
            if not isinstance(backend, Backend):
                backend = cache.__dict__["_backend"] = Backend(cache)
            return backend

    @property
    def failures(self) -> Mapping[str, int]:
        """How many operations failed, by kind."""
        return dict(self._failures)

    # -- reading ----------------------------------------------------------------------------------

    def read(self, lookup: Lookup) -> Entry | None:
        """The entry that may answer ``lookup``."""
        return self.read_many([lookup])[0]

    def read_many(self, lookups: Sequence[Lookup]) -> list[Entry | None]:
        """One answer for each lookup, in order."""
        return self._try(self.reads, "read", self.cache.read, lookups) or [None] * len(lookups)

    async def aread(self, lookup: Lookup) -> Entry | None:
        """Like ``read``; lookups that arrive while one is under way go out together."""
        if not self.cache.blocking:
            return self.read(lookup)
        entry = self.cache.read_now(lookup)
        if entry is not None:
            return entry
        loop = asyncio.get_running_loop()
        batcher = self._batchers.get(loop)
        if batcher is None:
            batcher = self._batchers[loop] = _Batcher(self)
        return await batcher.read(lookup)

    async def aread_many(self, lookups: Sequence[Lookup]) -> list[Entry | None]:
        """Like ``read_many``, without blocking the event loop."""
        if not self.cache.blocking:
            return self.read_many(lookups)
        found = await self._atry(self.reads, "read", self.cache.aread, lookups)
        return found or [None] * len(lookups)

    # -- writing ----------------------------------------------------------------------------------

    def tokens(self, tags: Sequence[str]) -> tuple[str, ...] | None:
        """The tags' current tokens; ``None`` when they cannot be had: then nothing that depends
        on them may be stored or served."""
        return self._try(self.tags, "tags", self.cache.tag_tokens, tags)

    async def atokens(self, tags: Sequence[str]) -> tuple[str, ...] | None:
        """Like ``tokens``, without blocking the event loop."""
        if not self.cache.blocking:
            return self.tokens(tags)
        return await self._atry(self.tags, "tags", self.cache.atag_tokens, tags)

    def write(self, key: FullKey, entry: Entry, lease: Lease | None) -> bool:
        """Whether the entry was stored."""
        stored = bool(self._try(self.writes, "write", self.cache.write, key, entry, lease))
        if stored and owned(key[0]):
            # looked at afterwards: who forgets the owner drops its tag before deleting, so that
            # either they find the entry or it is seen here that they came first
            tag = owner_tag(key[0])
            if _forgotten(tag, entry, self._try(self.tags, "tags", self.cache.peek_tags, [tag])):
                self._try(self.writes, "clear", self.cache.clear, [key[0]])
                return False
        return stored

    async def awrite(self, key: FullKey, entry: Entry, lease: Lease | None) -> bool:
        """Like ``write``, without blocking the event loop."""
        if not self.cache.blocking:
            return self.write(key, entry, lease)
        if not owned(key[0]):
            return bool(
                await self._atry(self.writes, "write", self.cache.awrite, key, entry, lease)
            )
        # what is written for an owner who is forgotten meanwhile must go, whoever is cancelled
        return await asyncio.shield(self._finish(self._awrite_owned(key, entry, lease)))

    async def _awrite_owned(self, key: FullKey, entry: Entry, lease: Lease | None) -> bool:
        cache = self.cache
        stored = bool(await self._atry(self.writes, "write", cache.awrite, key, entry, lease))
        if stored:
            tag = owner_tag(key[0])
            if _forgotten(tag, entry, await self._atry(self.tags, "tags", cache.apeek_tags, [tag])):
                await self._atry(self.writes, "clear", cache.aclear, [key[0]])
                return False
        return stored

    def forget(self, namespace: Namespace) -> None:
        """Remove what is in an owned namespace; like everything here, unless it fails."""
        self._try(self.tags, "tags", self.cache.drop_tags, [owner_tag(namespace)])
        self._try(self.writes, "clear", self.cache.clear, [namespace])

    async def aforget(self, namespace: Namespace) -> None:
        """Like ``forget``, without blocking the event loop."""
        await self._atry(self.tags, "tags", self.cache.adrop_tags, [owner_tag(namespace)])
        await self._atry(self.writes, "clear", self.cache.aclear, [namespace])

    # -- leases -----------------------------------------------------------------------------------

    def acquire(self, key: FullKey) -> Lease | Literal["busy", "failed"]:
        """The lease of ``key``, or that somebody has it, or that there is no telling."""
        return self._try(self.leases, "lease", self._acquire, key) or "failed"

    async def aacquire(self, key: FullKey) -> Lease | Literal["busy", "failed"]:
        """Like ``acquire``, without blocking the event loop."""
        task = asyncio.ensure_future(self._atry(self.leases, "lease", self._aacquire, key))
        try:
            return await asyncio.shield(task) or "failed"
        except asyncio.CancelledError:
            # it may be granted all the same, and nobody is there to hold it
            self._finish(self._return(task))
            raise

    async def _return(self, acquired: asyncio.Task[Lease | Literal["busy"] | None]) -> None:
        lease = await acquired
        if isinstance(lease, Lease):
            await self.arelease(lease)

    def _finish(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """A task that goes on whoever is cancelled."""
        task = asyncio.ensure_future(work)
        _finishing.add(task)
        task.add_done_callback(_finishing.discard)
        return task

    def _acquire(self, key: FullKey) -> Lease | Literal["busy"]:
        return self.cache.acquire(key) or "busy"

    async def _aacquire(self, key: FullKey) -> Lease | Literal["busy"]:
        return await self.cache.aacquire(key) or "busy"

    def release(self, lease: Lease) -> None:
        """Give a lease back."""
        self._try(self.leases, "lease", self.cache.release, lease)

    async def arelease(self, lease: Lease) -> None:
        """Give a lease back even if the caller is being cancelled, however often."""
        task = asyncio.ensure_future(self._atry(self.leases, "lease", self.cache.arelease, lease))
        cancelled: BaseException | None = None
        # an event loop that ends cancels everything, and what waits for it once more
        while not task.done():
            try:
                await asyncio.shield(task)
            except asyncio.CancelledError as exc:
                cancelled = exc
        if cancelled is not None:
            raise cancelled

    def pause(self, key: FullKey, seconds: float) -> None:
        """Wait for the holder of the lease of ``key``, at most for ``seconds``."""
        try:
            self.cache.pause(key, seconds)
        except Exception:
            # counted where it matters, in the look at the lease that comes next
            time.sleep(min(seconds, UNTOLD))

    async def apause(self, key: FullKey, seconds: float) -> None:
        """Like ``pause``, without blocking the event loop."""
        try:
            await self.cache.apause(key, seconds)
        except Exception:
            await asyncio.sleep(min(seconds, UNTOLD))

    # -- failing open -----------------------------------------------------------------------------

    def _try(
        self, breaker: Breaker, kind: str, operation: Callable[..., T], *args: Any
    ) -> T | None:
        if not self._allows(breaker):
            return None
        try:
            result = operation(*args)
        except Exception as exc:
            self._failed(breaker, kind, exc)
            return None
        if breaker.succeeded():
            self._is_back(kind)
        return result

    async def _atry(
        self, breaker: Breaker, kind: str, operation: Callable[..., Awaitable[T]], *args: Any
    ) -> T | None:
        if not self._allows(breaker):
            return None
        try:
            result = await within(self.deadline, operation(*args))
        except Exception as exc:
            self._failed(breaker, kind, exc)
            return None
        if breaker.succeeded():
            self._is_back(kind)
        return result

    def _allows(self, breaker: Breaker) -> bool:
        allowed = self.may_try(breaker)
        if not allowed:
            self._failures["skipped"] += 1
        return allowed

    def _failed(self, breaker: Breaker, kind: str, exc: Exception) -> None:
        slowly, name = took_its_deadline(exc), f"{kind}: {type(exc).__name__}"
        self._failures[name] += 1
        if isinstance(exc, LeftAlone):
            return  # the tier has told, and asks again when it thinks best
        tells = breaker.failed(name, slowly=slowly)
        # a run has several operations: it is to lose one deadline, not one for each
        if slowly and breaker is not self.reads and not self.cache.layered:
            self.reads.failed(slowly=True)
        if tells:
            logger.warning(
                "%s of %s failed, the run goes on without the cache (logged once): %s: %s",
                kind,
                type(self.cache).__name__,
                type(exc).__name__,
                exc or "no answer within the deadline",
            )

    def _is_back(self, kind: str) -> None:
        logger.info("%s of %s works again", kind, type(self.cache).__name__)


_of_lock = new_lock()
_finishing: set[asyncio.Task[Any]] = set()
"""Event loops hold their tasks weakly."""


def owner_tag(namespace: Namespace) -> str:
    """The id of the tag that everything in an owned namespace depends on."""
    return tag_id("|".join(namespace))


def _forgotten(tag: str, entry: Entry, current: Mapping[str, str] | None) -> bool:
    """Whether the owner behind ``tag`` was forgotten since ``entry`` began to be computed."""
    if current is None:
        return False  # nobody can tell; the dead token keeps it from being served
    return any(mine == tag and current.get(tag) != token for mine, token in entry.deps)


_Waiting = tuple[Lookup, "asyncio.Future[Entry | None]"]


class _Batcher:
    """Natural batching on one event loop: what arrives during a read goes out with the next."""

    def __init__(self, backend: Backend) -> None:
        self._backend = weakref.proxy(backend)
        self._waiting: list[_Waiting] = []
        self._task: asyncio.Task[None] | None = None

    async def read(self, lookup: Lookup) -> Entry | None:
        answer: asyncio.Future[Entry | None] = asyncio.get_running_loop().create_future()
        self._waiting.append((lookup, answer))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._drain())
        return await answer

    async def _drain(self) -> None:
        batch: list[_Waiting] = []
        try:
            while self._waiting:
                batch = self._waiting[:MOST_AT_ONCE]
                del self._waiting[:MOST_AT_ONCE]
                entries = await self._backend.aread_many([lookup for lookup, _ in batch])
                _answer(batch, entries)
        except BaseException:
            # nobody is left to answer those who came meanwhile either
            batch, self._waiting = batch + self._waiting, []
            _answer(batch, [None] * len(batch))
            raise
        finally:
            self._task = None  # it knows its loop, and the loop is what this batcher is kept by


def _answer(batch: Sequence[_Waiting], entries: Sequence[Entry | None]) -> None:
    for (_, answer), entry in zip(batch, entries, strict=True):
        if not answer.done():
            answer.set_result(entry)
