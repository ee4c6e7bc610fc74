"""Several caches behind each other: fast and small first, large and shared last.

The last tier is the authority. It keeps the tag tokens, and a copy in an upper tier is served only
while the tokens it was stored with are current *there*: an invalidation or a ``clear`` by another
process counts at once, for one look-up of tokens a hit, which is free where the last tier knows
them without asking (``knows``). So that a ``clear`` counts too, every entry that passes
through depends on the ``namespace_tag`` of its namespace besides its own tags.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from langgraph.cache.base import FullKey, Namespace

from langgraph_perf._breaker import Breaker, Guarded, took_its_deadline
from langgraph_perf.caches.base import (
    Cache,
    CacheStats,
    Entry,
    Lease,
    Lookup,
    namespace_tag,
    owned,
    servable,
    timely,
)
from langgraph_perf.errors import ConfigurationError

if TYPE_CHECKING:
    from langgraph_perf.caches._sweep import Sweeper

T = TypeVar("T")
logger = logging.getLogger("langgraph_perf")

_UNKNOWN = ""
"""The token of a copy stored while the authority was away: it never is a current one."""
_BREAKERS = {
    "peek": "reads",
    "read": "reads",
    "peek_tags": "reads",
    "tag_tokens": "tags",
    "acquire": "leases",
    "release": "leases",
}
"""Of which kind operations are, if they are not writes."""
_MOST_OWN = 10_000
"""Most namespaces whose tokens are remembered."""


class LeftAlone(ConnectionError):
    """A tier was not asked, as it failed a moment ago."""


class _Do(NamedTuple):
    """One primitive to carry out; answered with what it returned, or with what it raised."""

    cache: Cache
    operation: str
    args: tuple[Any, ...]


Steps = Generator[_Do, Any, T]


class _Tier(Guarded):
    """A cache, what it did here, and what of it is left alone for a while."""

    def __init__(self, cache: Cache) -> None:
        super().__init__()
        self.cache = cache
        self.hits = 0
        self.misses = 0
        self.errors = 0

    def breaker(self, operation: str) -> Breaker:
        """The one for an operation."""
        return self.__dict__[_BREAKERS.get(operation, "writes")]  # type: ignore[no-any-return]

    def away(self, operation: str) -> bool:
        """Whether it failed so often that asking would only cost its deadline; if not, ask."""
        return not self.may_try(self.breaker(operation))

    def succeeded(self, operation: str) -> None:
        if self.breaker(operation).succeeded():
            logger.info("%s of %s works again", operation, type(self.cache).__name__)

    def failed(self, operation: str, exc: Exception) -> None:
        self.errors += 1
        slowly, breaker = took_its_deadline(exc), self.breaker(operation)
        tells = breaker.failed(type(exc).__name__, slowly=slowly)
        if slowly and breaker is not self.reads:
            self.reads.failed(slowly=True)  # a run is to lose one deadline, not one for each
        if tells:
            logger.warning(
                "%s of %s failed, the other tiers go on (logged once): %s: %s",
                operation,
                type(self.cache).__name__,
                type(exc).__name__,
                exc,
            )


class TieredCache(Cache):
    """Asks ``first``, then ``second``, …; what is found below is copied upwards.

    Writes go to every tier. Tags and leases are those of the last one. A copy in an upper tier is
    served until it expires, is invalidated or is written again through this cache. A tier that
    fails costs its hits, not the run: the others go on (``stats().tiers`` counts its ``errors``).
    While the last one is away, upper tiers serve only what depends on no tag.

    Args:
        caches: this library's caches, the fastest first. Closing this one closes them.

    Raises:
        ConfigurationError: there is none, one is not a cache of this library or is there twice, or
            one that others share is in front of one that they do not: whose tags would only count
            in this process.
    """

    def __init__(self, *caches: Cache) -> None:
        flat: list[Cache] = []
        for cache in caches:
            if not isinstance(cache, Cache):
                raise ConfigurationError(
                    f"TieredCache: got {cache!r:.200}; accepted: one cache of this library after "
                    "the other, the fastest first: MemoryCache(...), DiskCache(directory), "
                    "RedisCache(url_or_client)"
                )
            flat.extend(cache.tiers if isinstance(cache, TieredCache) else [cache])
        if not flat:
            raise ConfigurationError("TieredCache needs at least one cache, got none")
        _check_order(flat)
        super().__init__(clock=flat[-1].clock)
        self._tiers = [_Tier(cache) for cache in flat]
        self._last = self._tiers[-1]
        self._leasing = next((tier for tier in reversed(self._tiers) if tier.cache.shared), None)
        self._counting = threading.Lock()
        self._own: dict[str, str] = {}
        """Tokens that namespaces once had; replaced as a whole."""
        self.blocking = any(cache.blocking for cache in flat)
        self.layered = len(self._tiers) > 1
        self.shared = self._leasing is not None
        self.supports_tags = self._last.cache.supports_tags
        self.timeout = self._last.cache.timeout
        self._sweeper: Sweeper | None = None
        # of what no other process changes, or nobody can tell, nothing needs to be swept
        if self.layered and self._last.cache.shared and self.supports_tags:
            # imported here: importing the library is to be quick
            from langgraph_perf.caches._sweep import Sweeper

            self._sweeper = Sweeper.of(self)
        if self._leasing is not None:
            self.lease_seconds = self._leasing.cache.lease_seconds
            self.notifies = self._leasing.cache.notifies

    @property
    def tiers(self) -> tuple[Cache, ...]:
        """Its caches, first tier first."""
        return tuple([tier.cache for tier in self._tiers])

    # -- what is done, one step at a time ---------------------------------------------------------

    def _reading(self, lookups: Sequence[Lookup]) -> Steps[list[Entry | None]]:
        answers: list[Entry | None] = [None] * len(lookups)
        missing = list(range(len(lookups)))
        for depth, tier in enumerate(self._tiers):
            if not missing:
                break
            asked = [lookups[i] for i in missing]
            if tier is self._last:
                found = yield from self._last_read(asked)
            else:
                found = yield from self._upper_read(tier, asked)
            with self._counting:
                tier.misses += found.count(None)
                tier.hits += len(found) - found.count(None)
            for i, entry in zip(missing, found, strict=True):
                answers[i] = entry
                if entry is not None:
                    yield from self._copy(self._tiers[:depth], lookups[i].key, entry)
            missing = [i for i in missing if answers[i] is None]
        self._tally.read(answers)
        return [
            _without_own(entry, lookup.key) for entry, lookup in zip(answers, lookups, strict=True)
        ]

    def _upper_read(self, tier: _Tier, lookups: list[Lookup]) -> Steps[list[Entry | None]]:
        found: list[Entry | None] | None = yield from self._try(tier, "peek", lookups)
        if found is None:
            return [None] * len(lookups)
        sure = [entry is not None and self._last.cache.knows(entry.deps) for entry in found]
        tags = {
            tag
            for entry, known in zip(found, sure, strict=True)
            if entry is not None and not known
            for tag, _ in entry.deps
        }
        current: Mapping[str, str] | None = {}
        if tags and self.supports_tags:
            current = yield from self._try(self._last, "peek_tags", tags)
            if current is not None:
                self._forget_own(tags, current)
        now = self.clock()
        return [
            entry
            if entry is not None
            and self._serves(entry, lookup, dict(entry.deps) if known else current, now)
            else None
            for entry, lookup, known in zip(found, lookups, sure, strict=True)
        ]

    def _serves(
        self, entry: Entry, lookup: Lookup, current: Mapping[str, str] | None, now: float
    ) -> bool:
        if not self.supports_tags:
            return servable(entry, lookup, {}, now)
        own = namespace_tag(lookup.key[0])
        if not any(tag == own for tag, _ in entry.deps):
            return False  # stored past this cache: a `clear` would not reach it
        if current is None:
            return len(entry.deps) == 1 and not lookup.tags and timely(entry, lookup, now)
        return servable(entry, lookup, current, now)

    def _last_read(self, lookups: list[Lookup]) -> Steps[list[Entry | None]]:
        # Stored past this cache, an entry lacks the token of its namespace. To be copied upwards
        # it needs that of a moment before it was read, or a `clear` in between would be survived:
        # any such moment will do, as an old token only makes a copy that is not served.
        before = self._own
        found: list[Entry | None] | None = yield from self._try(self._last, "read", lookups)
        if found is None:
            return [None] * len(lookups)
        if not self.supports_tags or len(self._tiers) == 1:
            return found
        tags = [namespace_tag(lookup.key[0]) for lookup in lookups]
        late = [
            i
            for i, (entry, own) in enumerate(zip(found, tags, strict=True))
            if own not in before and _is_past(entry, own)
        ]
        if late:
            unknown = list(dict.fromkeys([tags[i] for i in late]))
            tokens = yield from self._try(self._last, "tag_tokens", unknown)
            if tokens is not None:
                made = dict(zip(unknown, tokens, strict=True))
                before = {**before, **made}
                self._own = {**(self._own if len(self._own) < _MOST_OWN else {}), **made}
            again = yield from self._try(self._last, "read", [lookups[i] for i in late])
            for i, entry in zip(late, again or [None] * len(late), strict=True):
                found[i] = entry
        for i, (entry, own) in enumerate(zip(found, tags, strict=True)):
            if entry is not None and _is_past(entry, own):
                token = before.get(own, _UNKNOWN)
                found[i] = entry._replace(deps=(*entry.deps, (own, token)))
        return found

    def _forget_own(self, tags: Collection[str], current: Mapping[str, str]) -> None:
        old = {tag for tag in tags if tag in self._own and self._own[tag] != current.get(tag)}
        if old:
            self._own = {tag: token for tag, token in self._own.items() if tag not in old}

    def _copy(self, tiers: Sequence[_Tier], key: FullKey, entry: Entry) -> Steps[bool]:
        """Store in ``tiers``, the last first; whether one of them did."""
        stored = False
        for tier in reversed(tiers):
            stored = bool((yield from self._try(tier, "write", key, entry))) or stored
        if stored and self._sweeper is not None and owned(key[0]):
            self._sweeper.start()
        return stored

    def _writing(self, key: FullKey, entry: Entry, lease: Lease | None) -> Steps[bool]:
        others = self._tiers
        if self.supports_tags and len(self._tiers) > 1:
            own = namespace_tag(key[0])
            tokens = yield from self._try(self._last, "tag_tokens", [own])
            token = tokens[0] if tokens else _UNKNOWN
            entry = entry._replace(deps=(*entry.deps, (own, token)))
        if lease is not None and self._leasing is not None:
            # fenced: what this tier does not take, or cannot judge, no other may have
            stored = yield from self._must(self._leasing, "write", key, entry, lease)
            if not stored:
                return False
            others = [tier for tier in self._tiers if tier is not self._leasing]
        stored = (yield from self._copy(others, key, entry)) or lease is not None
        if stored:
            self._tally.add(writes=1)
        return stored

    def _clearing(self, namespaces: Sequence[Namespace] | None) -> Steps[None]:
        self.must_be_open()
        failure: Exception | None = None
        for tier in reversed(self._tiers):
            try:
                yield _Do(tier.cache, "clear", (namespaces,))
            except Exception as exc:
                tier.failed("clear", exc)
                failure = failure or exc
        if failure is not None:
            raise failure

    def _copying(
        self, source: Namespace, target: Namespace, deps: Mapping[str, tuple[str, str]]
    ) -> Steps[int]:
        if not (owned(source) and owned(target)):
            return 0
        if self.supports_tags and len(self._tiers) > 1:
            own = namespace_tag(tuple(target))
            tokens = yield from self._must(self._last, "tag_tokens", [own])
            deps = {**deps, namespace_tag(tuple(source)): (own, tokens[0])}
        copied: int = yield from self._must(self._last, "copy", source, target, deps)
        if copied:
            # the others take theirs from there; what they had is out of date
            for tier in self._tiers[:-1]:
                yield from self._try(tier, "clear", [target])
        return copied

    def _purging(self, namespace: Namespace) -> Steps[int]:
        if not owned(namespace):
            return 0
        purged: int = yield from self._must(self._last, "purge", namespace)
        for tier in self._tiers[:-1]:  # whose tags are the last one's
            yield from self._must(tier, "clear", [namespace])
        return purged

    def _try(self, tier: _Tier, operation: str, *args: Any) -> Steps[Any]:
        """Carry out a primitive; ``None`` when it fails, or is not even tried."""
        if tier.away(operation):
            return None
        try:
            result = yield _Do(tier.cache, operation, args)
        except Exception as exc:
            tier.failed(operation, exc)
            return None
        tier.succeeded(operation)
        return result

    def _must(self, tier: _Tier, operation: str, *args: Any) -> Steps[Any]:
        """Carry out a primitive that no other tier could; fails at once for one left alone."""
        if tier.away(operation):
            raise LeftAlone(f"{type(tier.cache).__name__} failed and is left alone a while")
        try:
            result = yield _Do(tier.cache, operation, args)
        except Exception as exc:
            tier.failed(operation, exc)
            raise
        tier.succeeded(operation)
        return result

    # -- without waiting --------------------------------------------------------------------------

    def read_now(self, lookup: Lookup) -> Entry | None:
        """What the first tier has, if neither it nor the last one, about its tags, has to wait."""
        first = self._tiers[0]
        if (
            first.cache.blocking
            or not self.supports_tags
            or first is self._last
            or first.reads.is_open
        ):
            return None
        try:
            (entry,) = first.cache.peek((lookup,))
        except Exception as exc:
            first.failed("peek", exc)
            return None
        # a copy's last dependency is its namespace's
        if entry is None or not entry.deps or entry.deps[-1][0] != namespace_tag(lookup.key[0]):
            return None
        if not self._last.cache.knows(entry.deps) or not timely(entry, lookup, self.clock()):
            return None
        if lookup.tags and not {tag for tag, _ in entry.deps}.issuperset(lookup.tags):
            return None
        self._tally.hit()
        # what `_replace` does, in half the time
        return Entry._make((*entry[:3], entry.deps[:-1], *entry[4:]))

    # -- primitives, blocking ---------------------------------------------------------------------

    def read(self, lookups: Sequence[Lookup]) -> list[Entry | None]:
        """One answer for each lookup, in order; only servable entries."""
        if len(lookups) == 1:
            entry = self.read_now(lookups[0])
            if entry is not None:
                return [entry]
        return _carry_out(self._reading(lookups))

    def write(self, key: FullKey, entry: Entry, lease: Lease | None = None) -> bool:
        """Store in every tier, and give ``lease`` back; ``False`` when none stored it."""
        return _carry_out(self._writing(key, entry, lease))

    def peek_tags(self, tags: Collection[str]) -> Mapping[str, str]:
        """The current tokens of these tag ids, from the last tier."""
        return self._last.cache.peek_tags(tags)

    def tag_tokens(self, tags: Sequence[str]) -> tuple[str, ...]:
        """The current token of each tag id, from the last tier."""
        tokens: tuple[str, ...] = _carry_out(self._must(self._last, "tag_tokens", tags))
        return tokens

    def drop_tags(self, tags: Sequence[str]) -> None:
        """Forget the tokens of these tag ids."""
        self._last.cache.drop_tags(tags)
        self._tally.add(invalidations=len(tags))

    def acquire(self, key: FullKey) -> Lease | None:
        """Take the lease of ``key``; ``None`` while somebody else holds it."""
        lease: Lease | None = _carry_out(self._must(self._lessor, "acquire", key))
        return lease

    def renew(self, lease: Lease) -> Lease | None:
        """Extend a lease by ``lease_seconds``; ``None`` when it was lost."""
        return self._lessor.cache.renew(lease)

    def renew_many(self, leases: Sequence[Lease]) -> list[Lease | None]:
        """What ``renew`` answers for each lease; where it failed, the lease as it was."""
        return self._lessor.cache.renew_many(leases)

    def release(self, lease: Lease) -> None:
        """Give a lease back; one that was lost meanwhile is left to its new holder."""
        _carry_out(self._must(self._lessor, "release", lease))

    def pause(self, key: FullKey, seconds: float) -> None:
        """Wait for the holder of the lease of ``key``, at most for ``seconds``."""
        self._lessor.cache.pause(key, seconds)

    def current(self, tags: Collection[str]) -> Mapping[str, str] | None:
        """The current tokens of these tag ids; ``None`` when they cannot be had."""
        current: Mapping[str, str] | None = _carry_out(self._try(self._last, "peek_tags", tags))
        return current

    @property
    def _lessor(self) -> _Tier:
        return self._leasing or self._last

    def clear(self, namespaces: Sequence[Namespace] | None = None) -> None:
        """Delete what is in exactly these namespaces, in every tier; ``None`` deletes everything.

        Raises:
            Exception: a tier failed; the others are cleared all the same.
        """
        _carry_out(self._clearing(namespaces))

    def copy(
        self, source: Namespace, target: Namespace, deps: Mapping[str, tuple[str, str]]
    ) -> int:
        """Copy what the last tier has in one owned namespace into another; see ``Cache``."""
        return _carry_out(self._copying(source, target, deps))

    def purge(self, namespace: Namespace) -> int:
        """Delete what can never be served again in one owned namespace; see ``Cache``."""
        return _carry_out(self._purging(namespace))

    def stats(self) -> CacheStats:
        """A snapshot: ``bytes`` of all tiers, ``entries`` of the last one, and each one's own."""
        return self._snapshot([tier.cache.stats() for tier in self._tiers])

    def _snapshot(self, each: Sequence[CacheStats]) -> CacheStats:
        total = self._tally.stats()
        # the first tier is not made to count one by one what the total tells
        hits = [tier.hits for tier in self._tiers]
        hits[0] = total.hits - sum(hits[1:])
        tiers = tuple(
            [
                replace(stats, hits=served, misses=tier.misses, errors=tier.errors)
                for stats, served, tier in zip(each, hits, self._tiers, strict=True)
            ]
        )
        return replace(
            total,
            entries=tiers[-1].entries,
            bytes=sum([stats.bytes for stats in tiers]),
            errors=sum([stats.errors for stats in tiers]),
            tiers=tiers,
        )

    def close(self) -> None:
        """Close every tier; a closed cache answers every lookup with a miss."""
        super().close()
        self._stop()
        for tier in self._tiers:
            tier.cache.close()

    def _stop(self) -> None:
        if self._sweeper is not None:
            self._sweeper.stop()

    def _after_fork(self) -> None:
        super()._after_fork()
        self._counting = threading.Lock()
        if self._sweeper is not None:
            self._sweeper.after_fork()

    # -- primitives, awaiting: each tier decides whether it needs a thread ------------------------

    async def aread(self, lookups: Sequence[Lookup]) -> list[Entry | None]:
        """Like ``read``, without blocking the event loop."""
        if len(lookups) == 1:
            entry = self.read_now(lookups[0])
            if entry is not None:
                return [entry]
        return await _acarry_out(self._reading(lookups))

    async def awrite(self, key: FullKey, entry: Entry, lease: Lease | None = None) -> bool:
        """Like ``write``, without blocking the event loop."""
        return await _acarry_out(self._writing(key, entry, lease))

    async def apeek_tags(self, tags: Collection[str]) -> Mapping[str, str]:
        """Like ``peek_tags``, without blocking the event loop."""
        return await self._last.cache.apeek_tags(tags)

    async def atag_tokens(self, tags: Sequence[str]) -> tuple[str, ...]:
        """Like ``tag_tokens``, without blocking the event loop."""
        tokens: tuple[str, ...] = await _acarry_out(self._must(self._last, "tag_tokens", tags))
        return tokens

    async def adrop_tags(self, tags: Sequence[str]) -> None:
        """Like ``drop_tags``, without blocking the event loop."""
        await self._last.cache.adrop_tags(tags)
        self._tally.add(invalidations=len(tags))

    async def aacquire(self, key: FullKey) -> Lease | None:
        """Like ``acquire``, without blocking the event loop."""
        lease: Lease | None = await _acarry_out(self._must(self._lessor, "acquire", key))
        return lease

    async def arenew(self, lease: Lease) -> Lease | None:
        """Like ``renew``, without blocking the event loop."""
        return await self._lessor.cache.arenew(lease)

    async def arelease(self, lease: Lease) -> None:
        """Like ``release``, without blocking the event loop."""
        await _acarry_out(self._must(self._lessor, "release", lease))

    async def apause(self, key: FullKey, seconds: float) -> None:
        """Like ``pause``, without blocking the event loop."""
        await self._lessor.cache.apause(key, seconds)

    async def aclear(self, namespaces: Sequence[Namespace] | None = None) -> None:
        """Like ``clear``, without blocking the event loop."""
        await _acarry_out(self._clearing(namespaces))

    async def acopy(
        self, source: Namespace, target: Namespace, deps: Mapping[str, tuple[str, str]]
    ) -> int:
        """Like ``copy``, without blocking the event loop."""
        return await _acarry_out(self._copying(source, target, deps))

    async def apurge(self, namespace: Namespace) -> int:
        """Like ``purge``, without blocking the event loop."""
        return await _acarry_out(self._purging(namespace))

    async def astats(self) -> CacheStats:
        """Like ``stats``, without blocking the event loop."""
        return self._snapshot([await tier.cache.astats() for tier in self._tiers])

    async def aclose(self) -> None:
        """Like ``close``, without blocking the event loop."""
        self._closed = True
        self._stop()
        for tier in self._tiers:
            await tier.cache.aclose()


def _check_order(caches: Sequence[Cache]) -> None:
    names = ", ".join([type(cache).__name__ for cache in caches])
    if len({id(cache) for cache in caches}) < len(caches):
        raise ConfigurationError(f"TieredCache({names}): the same cache is there twice")
    for upper, lower in pairwise(caches):
        if upper.shared and not lower.shared and lower.supports_tags:
            better = sorted(caches, key=lambda cache: cache.shared)
            raise ConfigurationError(
                f"TieredCache({names}): {type(upper).__name__}, which other processes share, is in "
                f"front of {type(lower).__name__}, which they do not, so no invalidation would "
                "reach them; accepted: the shared ones last: "
                f"TieredCache({', '.join([type(cache).__name__ for cache in better])})"
            )


def _is_past(entry: Entry | None, own: str) -> bool:
    """Whether it was stored without the token of its namespace."""
    return entry is not None and not any(tag == own for tag, _ in entry.deps)


def _without_own(entry: Entry | None, key: FullKey) -> Entry | None:
    if entry is None or not entry.deps or entry.deps[-1][0] != namespace_tag(key[0]):
        return entry
    return entry._replace(deps=entry.deps[:-1])


def _carry_out(steps: Steps[T]) -> T:
    try:
        step = next(steps)
        while True:
            try:
                result = getattr(step.cache, step.operation)(*step.args)
            except Exception as exc:
                step = steps.throw(exc)
            else:
                step = steps.send(result)
    except StopIteration as stop:
        value: T = stop.value
        return value


async def _acarry_out(steps: Steps[T]) -> T:
    try:
        step = next(steps)
        while True:
            try:
                result = await getattr(step.cache, f"a{step.operation}")(*step.args)
            except Exception as exc:
                step = steps.throw(exc)
            else:
                step = steps.send(result)
    except StopIteration as stop:
        value: T = stop.value
        return value
