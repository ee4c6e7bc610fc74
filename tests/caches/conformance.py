"""What every cache of this library must do, whatever it keeps its entries in.

Subclass the class (or classes) that describe a cache, give them a ``make``, and run them with
pytest. Every test runs through the blocking methods and through their awaitable twins.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from langgraph_perf.caches.base import Cache, Entry, Lease, Lookup, namespace_tag, tag_id

from .conftest import Clock, entry

KEY = (("graph", "node"), "key")
NAMESPACES = [(), ("",), ("a",), ("a", "b"), ("a,b",), ("a.b",), ("a:b",), ("ab",), ("a", "b", "")]
NAMES = ["", "k", "k,", "é\ud800", "x" * 300]


class Subject:
    """A cache whose operations a test calls the same way, blocking or awaited."""

    def __init__(self, cache: Cache, mode: str) -> None:
        self.cache = cache
        self.mode = mode

    def __getattr__(self, name: str) -> Any:
        async def call(*args: Any) -> Any:
            if self.mode == "async":
                return await getattr(self.cache, f"a{name}")(*args)
            return getattr(self.cache, name)(*args)

        return call

    async def one(self, key: Any = KEY, tags: tuple[str, ...] = (), max_age: Any = None) -> Any:
        """What a single lookup finds."""
        (found,) = await self.read([Lookup(key, tags, max_age)])
        return found


class CacheConformance:
    """Entries, time, namespaces, LangGraph's ``BaseCache`` and the end of a cache's life."""

    def make(self, directory: Path, clock: Clock) -> Cache:
        """A fresh, empty cache that reads ``clock`` and may keep files in ``directory``."""
        raise NotImplementedError

    @pytest.fixture(params=["sync", "async"])
    def cache(self, request: Any, tmp_path: Path, clock: Clock) -> Iterator[Subject]:
        with self.make(tmp_path, clock) as cache:
            yield Subject(cache, request.param)

    # -- entries ----------------------------------------------------------------------------------

    async def test_reads_back_exactly_what_was_written(self, cache: Subject) -> None:
        """An entry comes back bit for bit, with its metadata."""
        for payload in (b"", b"\0", os.urandom(100), os.urandom(1_500_000)):
            stored = entry(payload, expires=1_700_000_000.125, seconds=0.1, tokens=2**40)
            assert await cache.write(KEY, stored) is True
            assert await cache.one() == stored

    async def test_answers_in_the_order_asked(self, cache: Subject) -> None:
        """Many lookups get one answer each, in order, repeated and unknown keys included."""
        keys = [(("n",), str(i)) for i in range(1200)]
        for key in keys[::2]:
            await cache.write(key, entry(key[1].encode()))
        asked = [*keys, keys[0], keys[1], keys[0]]
        found = await cache.read([Lookup(key) for key in asked])
        assert [e and e.payload for e in found] == [
            None if int(name) % 2 else name.encode() for _, name in asked
        ]

    async def test_reads_nothing_for_nothing(self, cache: Subject) -> None:
        """No lookups, no answers."""
        assert await cache.read([]) == []

    async def test_overwrites(self, cache: Subject) -> None:
        """The last value written under a key is the one read, with its own expiry."""
        await cache.write(KEY, entry(b"a" * 5000, expires=1_700_000_001.0))
        await cache.write(KEY, entry(b"b"))
        assert (await cache.one()).payload == b"b"
        assert (await cache.one()).expires is None

    async def test_keys_do_not_meet(self, cache: Subject) -> None:
        """Every namespace and name is a key of its own, whatever characters it is made of."""
        keys = [(namespace, name) for namespace in NAMESPACES for name in NAMES]
        for i, key in enumerate(keys):
            await cache.write(key, entry(str(i).encode()))
        found = await cache.read([Lookup(key) for key in keys])
        assert [e.payload for e in found] == [str(i).encode() for i in range(len(keys))]

    # -- time -------------------------------------------------------------------------------------

    async def test_expires(self, cache: Subject, clock: Clock) -> None:
        """An entry is served until its expiry, and not at it."""
        await cache.write(KEY, entry(expires=clock() + 10))
        clock.advance(9.999)
        assert await cache.one() is not None
        clock.advance(0.001)
        assert await cache.one() is None

    async def test_never_expires_without_expiry(self, cache: Subject, clock: Clock) -> None:
        """``expires=None`` means for ever."""
        await cache.write(KEY, entry())
        clock.advance(1e9)
        assert await cache.one() is not None

    async def test_max_age_narrows(self, cache: Subject, clock: Clock) -> None:
        """A lookup may ask for something younger; others still get the older entry."""
        await cache.write(KEY, entry(expires=clock() + 100))
        clock.advance(10)
        assert await cache.one(max_age=10) is None
        assert await cache.one(max_age=10.5) is not None
        assert await cache.one() is not None
        clock.advance(90)
        assert await cache.one(max_age=1000) is None

    # -- clearing ---------------------------------------------------------------------------------

    async def test_clear_takes_exact_namespaces(self, cache: Subject) -> None:
        """Clearing a namespace touches none that merely looks like it."""
        for namespace in NAMESPACES:
            await cache.write((namespace, "k"), entry())
        for gone, namespace in enumerate(NAMESPACES, 1):
            await cache.clear([namespace])
            found = await cache.read([Lookup((namespace, "k")) for namespace in NAMESPACES])
            assert [e is None for e in found] == [i < gone for i in range(len(NAMESPACES))]

    async def test_clear_everything(self, cache: Subject) -> None:
        """``clear()`` empties all namespaces, and the cache works on."""
        for namespace in NAMESPACES:
            await cache.write((namespace, "k"), entry())
        await cache.clear()
        found = await cache.read([Lookup((namespace, "k")) for namespace in NAMESPACES])
        assert found == [None] * len(NAMESPACES)
        await cache.write(KEY, entry())
        assert await cache.one() is not None

    async def test_clear_nothing(self, cache: Subject) -> None:
        """``clear([])`` is not ``clear(None)``."""
        await cache.write(KEY, entry())
        await cache.clear([])
        assert await cache.one() is not None

    # -- LangGraph's BaseCache --------------------------------------------------------------------

    async def test_base_cache_returns_the_keys_asked(self, cache: Subject) -> None:
        """``get`` leaves out what it does not have and returns nothing that was not asked."""
        a, b, c = (("n",), "a"), (("n",), "b"), (("n", "a"), "a")
        await cache.set({a: ({"x": (1, 2)}, None), b: ([1.5, None], 60)})
        assert await cache.get([a, c]) == {a: {"x": (1, 2)}}
        assert await cache.get([b, a, b]) == {a: {"x": (1, 2)}, b: [1.5, None]}
        assert await cache.get([c]) == {}
        assert await cache.get([]) == {}

    async def test_base_cache_ttl(self, cache: Subject, clock: Clock) -> None:
        """``set`` takes seconds to live, and overwriting takes the new ones."""
        a, b = (("n",), "a"), (("n",), "b")
        await cache.set({a: (1, 5), b: (2, None)})
        clock.advance(5)
        assert await cache.get([a, b]) == {b: 2}
        await cache.set({a: (3, 5), b: (4, 5)})
        assert await cache.get([a, b]) == {a: 3, b: 4}

    async def test_base_cache_returns_copies(self, cache: Subject) -> None:
        """Changing a value that was returned changes nothing that is stored."""
        await cache.set({KEY: ([1], None)})
        (await cache.get([KEY]))[KEY].append(2)
        assert await cache.get([KEY]) == {KEY: [1]}

    async def test_base_cache_leaves_out_what_it_cannot_store(
        self, cache: Subject, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A value that cannot be encoded is logged; its neighbours are stored."""
        a, b = (("n",), "a"), (("n",), "b")
        await cache.set({a: (lambda: 0, None), b: (1, None)})
        assert await cache.get([a, b]) == {b: 1}
        assert "is not stored" in caplog.text

    # -- counting ---------------------------------------------------------------------------------

    async def test_counts(self, cache: Subject) -> None:
        """Hits, misses and writes are counted."""
        await cache.write(KEY, entry())
        await cache.read([Lookup(KEY), Lookup((("n",), "other"))])
        await cache.read([Lookup(KEY)])
        stats = await cache.stats()
        assert (stats.hits, stats.misses, stats.writes) == (2, 1, 1)

    # -- the end ----------------------------------------------------------------------------------

    async def test_closed(self, cache: Subject) -> None:
        """A closed cache answers everything with a miss, and may be closed again."""
        await cache.write(KEY, entry())
        await cache.close()
        assert await cache.one() is None
        assert await cache.read([Lookup(KEY)] * 3) == [None] * 3
        assert await cache.write(KEY, entry()) is False
        assert await cache.get([KEY]) == {}
        await cache.set({KEY: (1, None)})
        await cache.clear()
        await cache.clear([KEY[0]])
        assert (await cache.stats()).entries == 0
        await cache.close()


class BoundedConformance(CacheConformance):
    """Caches that know what they hold, and keep within bounds."""

    async def test_knows_its_size(self, cache: Subject) -> None:
        """Entries and bytes follow what is stored."""
        before = await cache.stats()
        for i in range(10):
            await cache.write((("n",), str(i)), entry(b"x" * 20_000))
        stats = await cache.stats()
        assert stats.entries == before.entries + 10
        assert stats.bytes >= before.bytes + 200_000
        await cache.clear()
        after = await cache.stats()
        assert after.entries == 0
        assert after.bytes < before.bytes + 50_000

    async def test_sweeps_what_is_never_read(self, cache: Subject, clock: Clock) -> None:
        """Expired entries leave on later writes, without being read."""
        for i in range(50):
            await cache.write((("n",), str(i)), entry(b"x" * 1000, expires=clock() + 10))
        await cache.write((("n",), "keep"), entry(b"x" * 1000, expires=clock() + 1000))
        clock.advance(10)
        for i in range(20):
            await cache.write((("m",), str(i)), entry())
        stats = await cache.stats()
        assert stats.entries == 21

    async def test_stats_do_not_count_the_expired(self, cache: Subject, clock: Clock) -> None:
        """Asking for the size sweeps first."""
        for i in range(1200):
            await cache.write((("n",), str(i)), entry(expires=clock() + 10))
        clock.advance(10)
        assert (await cache.stats()).entries == 0


class TagConformance(CacheConformance):
    """Caches with tag tokens."""

    async def tagged(self, cache: Subject, *tags: str) -> tuple[tuple[str, str], ...]:
        """Dependencies as a caller takes them before it computes."""
        ids = [tag_id(tag) for tag in tags]
        return tuple(zip(ids, await cache.tag_tokens(ids), strict=True))

    async def test_tokens_last(self, cache: Subject) -> None:
        """A tag keeps its token; different tags have different ones; order is kept."""
        first = await cache.tag_tokens(["a", "b", "a"])
        assert first[0] == first[2] != first[1]
        assert await cache.tag_tokens(["b", "a"]) == (first[1], first[0])
        assert await cache.tag_tokens([]) == ()

    async def test_invalidate(self, cache: Subject) -> None:
        """What depended on the tag is a miss, what did not is still there."""
        one, both, none = (("n",), "1"), (("n",), "2"), (("n",), "3")
        await cache.write(one, entry(b"1", deps=await self.tagged(cache, "docs")))
        await cache.write(both, entry(b"2", deps=await self.tagged(cache, "docs", "user")))
        await cache.write(none, entry(b"3"))
        found = await cache.read([Lookup(one), Lookup(both, (tag_id("user"),)), Lookup(none)])
        assert [e.payload for e in found] == [b"1", b"2", b"3"]
        await cache.invalidate("user")
        found = await cache.read([Lookup(one), Lookup(both), Lookup(none)])
        assert [e and e.payload for e in found] == [b"1", None, b"3"]
        await cache.invalidate("docs", "unknown")
        assert [e and e.payload for e in await cache.read([Lookup(one), Lookup(none)])] == [
            None,
            b"3",
        ]
        assert (await cache.stats()).invalidations == 3

    async def test_entries_keep_their_dependencies(self, cache: Subject) -> None:
        """``deps`` come back as they were given."""
        stored = entry(deps=await self.tagged(cache, "a", "b"))
        await cache.write(KEY, stored)
        assert await cache.one() == stored
        assert await cache.one() == stored

    async def test_result_older_than_its_invalidation(self, cache: Subject) -> None:
        """A computation that began before an invalidation and ends after it is not served."""
        deps = await self.tagged(cache, "docs")
        await cache.invalidate("docs")
        await cache.write(KEY, entry(deps=deps))
        assert await cache.one() is None
        await cache.write(KEY, entry(b"new", deps=await self.tagged(cache, "docs")))
        assert (await cache.one()).payload == b"new"

    async def test_invalidating_an_unknown_tag(self, cache: Subject) -> None:
        """It is no error; entries stored later are served."""
        await cache.invalidate("docs")
        await cache.invalidate()
        await cache.write(KEY, entry(deps=await self.tagged(cache, "docs")))
        assert await cache.one() is not None

    async def test_lookup_that_needs_more_tags(self, cache: Subject) -> None:
        """An entry that does not know a tag it should depend on is a miss."""
        await cache.write(KEY, entry(deps=await self.tagged(cache, "docs")))
        assert await cache.one(tags=(tag_id("docs"),)) is not None
        assert await cache.one(tags=(tag_id("docs"), tag_id("user"))) is None
        await cache.write(KEY, entry())
        assert await cache.one(tags=(tag_id("docs"),)) is None

    async def test_forged_token(self, cache: Subject) -> None:
        """A token that never was current serves nothing."""
        await cache.tag_tokens([tag_id("docs")])
        await cache.write(KEY, entry(deps=((tag_id("docs"), "0" * 16),)))
        assert await cache.one() is None

    async def test_tokens_are_bounded(self, cache: Subject) -> None:
        """Thousands of tags at once are answered, and later asked tags keep their tokens."""
        many = [tag_id(str(i)) for i in range(2000)]
        assert len(set(await cache.tag_tokens(many))) == len(many)
        (token,) = await cache.tag_tokens([tag_id("late")])
        assert await cache.tag_tokens([tag_id("late")]) == (token,)

    async def test_clear_drops_the_tokens_of_its_namespaces(self, cache: Subject) -> None:
        """Copies kept elsewhere depend on them."""
        tags = [namespace_tag(("a",)), namespace_tag(("a", "b"))]
        a, b = await cache.tag_tokens(tags)
        await cache.clear([("a",)])
        new_a, same_b = await cache.tag_tokens(tags)
        assert new_a != a
        assert same_b == b
        await cache.clear()
        assert set(await cache.tag_tokens(tags)).isdisjoint({a, b, new_a})

    async def test_closed_tags(self, cache: Subject) -> None:
        """A closed cache has no tags, and does not fail for it."""
        await cache.close()
        assert len(await cache.tag_tokens(["a", "b"])) == 2
        await cache.invalidate("a")

    async def test_tags_must_be_names(self, cache: Subject) -> None:
        """``invalidate`` names what it was given when it is no tag."""
        with pytest.raises(TypeError, match="42"):
            await cache.invalidate(42)


class LeaseConformance(CacheConformance):
    """Caches that other processes share."""

    async def test_one_holder(self, cache: Subject) -> None:
        """A key has one holder; other keys are free."""
        lease = await cache.acquire(KEY)
        assert isinstance(lease, Lease)
        assert lease.key == KEY
        assert await cache.acquire(KEY) is None
        assert await cache.acquire((("n",), "other")) is not None
        await cache.release(lease)
        assert await cache.acquire(KEY) is not None

    async def test_expires(self, cache: Subject, clock: Clock) -> None:
        """A holder that does not renew is replaced after ``lease_seconds``, and not before."""
        seconds = cache.cache.lease_seconds
        first = await cache.acquire(KEY)
        assert first.expires == clock() + seconds
        clock.advance(seconds - 0.01)
        assert await cache.acquire(KEY) is None
        clock.advance(0.01)
        assert (await cache.acquire(KEY)).token != first.token

    async def test_renews(self, cache: Subject, clock: Clock) -> None:
        """A renewed lease lasts ``lease_seconds`` from now; a lost one cannot be renewed."""
        seconds = cache.cache.lease_seconds
        lease = await cache.acquire(KEY)
        clock.advance(seconds - 1)
        lease = await cache.renew(lease)
        assert lease.expires == clock() + seconds
        clock.advance(seconds - 1)
        assert await cache.acquire(KEY) is None
        clock.advance(1)
        assert await cache.renew(lease) is None
        new = await cache.acquire(KEY)
        assert await cache.renew(lease) is None
        assert await cache.renew(new) is not None

    async def test_late_release(self, cache: Subject, clock: Clock) -> None:
        """Giving back a lease that was lost leaves its new holder alone."""
        old = await cache.acquire(KEY)
        clock.advance(cache.cache.lease_seconds)
        new = await cache.acquire(KEY)
        await cache.release(old)
        assert await cache.acquire(KEY) is None
        await cache.release(new)
        await cache.release(new)
        assert await cache.acquire(KEY) is not None

    async def test_fence(self, cache: Subject, clock: Clock) -> None:
        """A write with a lease that expired, was taken or was given back stores nothing."""
        old = await cache.acquire(KEY)
        clock.advance(cache.cache.lease_seconds)
        assert await cache.write(KEY, entry(b"expired"), old) is False
        new = await cache.acquire(KEY)
        assert await cache.write(KEY, entry(b"taken"), old) is False
        assert await cache.one() is None
        assert await cache.write(KEY, entry(b"new"), new) is True
        assert await cache.write(KEY, entry(b"again"), new) is False
        assert (await cache.one()).payload == b"new"

    async def test_fence_is_per_key(self, cache: Subject) -> None:
        """The lease of one key does not open another."""
        lease = await cache.acquire((("n",), "other"))
        assert await cache.write(KEY, entry(), lease) is False
        assert await cache.one() is None

    async def test_write_gives_the_lease_back(self, cache: Subject) -> None:
        """A stored result frees its key at once."""
        lease = await cache.acquire(KEY)
        assert await cache.write(KEY, entry(), lease) is True
        assert await cache.acquire(KEY) is not None

    async def test_write_without_lease(self, cache: Subject) -> None:
        """Whoever has no lease may store, and supersedes the holder, whose result is older."""
        lease = await cache.acquire(KEY)
        assert await cache.write(KEY, entry(b"newer")) is True
        assert await cache.write(KEY, entry(b"older"), lease) is False
        assert (await cache.one()).payload == b"newer"

    async def test_leases_outlast_clear(self, cache: Subject) -> None:
        """Clearing entries does not let a second holder in."""
        await cache.acquire(KEY)
        await cache.clear()
        assert await cache.acquire(KEY) is None

    async def test_closed_leases(self, cache: Subject) -> None:
        """A closed cache keeps nobody waiting."""
        lease = await cache.acquire(KEY)
        await cache.close()
        assert await cache.acquire(KEY) is not None
        assert await cache.renew(lease) is None
        await cache.release(lease)
        assert await cache.write(KEY, entry(), lease) is False


__all__ = [
    "BoundedConformance",
    "CacheConformance",
    "Entry",
    "LeaseConformance",
    "TagConformance",
]
