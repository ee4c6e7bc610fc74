"""The tiered cache: copies upwards, one authority, tiers that fail."""

from __future__ import annotations

import asyncio
import logging
import threading

import pytest
from langgraph.cache.memory import InMemoryCache

from langgraph_perf.caches.base import Cache, Lookup, tag_id
from langgraph_perf.caches.disk import DiskCache
from langgraph_perf.caches.foreign import ForeignCache
from langgraph_perf.caches.memory import MemoryCache
from langgraph_perf.caches.redis import RedisCache
from langgraph_perf.caches.tiered import TieredCache
from langgraph_perf.errors import ConfigurationError
from tests.conftest import told
from tests.servers import ask_again

from .conftest import Clock, entry

KEY = (("graph", "node"), "key")
OTHER = (("graph", "other"), "key")


def payload(cache: Cache, key=KEY, **lookup) -> bytes | None:
    (found,) = cache.read([Lookup(key, **lookup)])
    return found and found.payload


class Broken(MemoryCache):
    """A memory cache whose operations fail while ``broken``; counts those that were tried."""

    broken = False

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock=clock)
        self.tried = 0

    def _check(self) -> None:
        self.tried += 1
        if self.broken:
            raise ConnectionError("backend is down")

    def peek(self, lookups):
        self._check()
        return super().peek(lookups)

    def write(self, key, entry, lease=None):
        self._check()
        return super().write(key, entry, lease)

    def peek_tags(self, tags):
        self._check()
        return super().peek_tags(tags)

    def tag_tokens(self, tags):
        self._check()
        return super().tag_tokens(tags)

    def drop_tags(self, tags):
        self._check()
        super().drop_tags(tags)

    def clear(self, namespaces=None):
        self._check()
        super().clear(namespaces)


@pytest.fixture
def last(tmp_path, clock):
    """The directory's cache, opened again on its own, as another process would."""
    with DiskCache(tmp_path / "cache", clock=clock) as cache:
        yield cache


def tiered(tmp_path, clock: Clock) -> TieredCache:
    return TieredCache(MemoryCache(clock=clock), DiskCache(tmp_path / "cache", clock=clock))


@pytest.fixture
def cache(tmp_path, clock):
    with tiered(tmp_path, clock) as cache:
        yield cache


@pytest.mark.parametrize(
    ("tiers", "message"),
    [
        ((), "at least one cache, got none"),
        ((None,), "got None"),
        ((InMemoryCache(),), "got <langgraph.cache.memory"),
        (("cache",), "got 'cache'"),
    ],
)
def test_tiers_must_be_caches(tiers, message):
    """No tier, or one that is no cache of this library, is refused."""
    with pytest.raises(ConfigurationError, match=message):
        TieredCache(*tiers)


def test_tiers_must_be_in_order(tmp_path):
    """A shared tier in front of a private one is refused, as is the same one twice: in the wrong
    order an invalidation would not reach other processes."""
    with DiskCache(tmp_path / "cache") as disk:
        memory, redis = MemoryCache(), RedisCache("redis://localhost:1")
        order = r"accepted: the shared ones last: TieredCache\(MemoryCache, RedisCache\)"
        with pytest.raises(ConfigurationError, match=order):
            TieredCache(redis, memory)
        with pytest.raises(ConfigurationError, match="DiskCache, which other processes share"):
            TieredCache(memory, disk, MemoryCache())
        with pytest.raises(ConfigurationError, match=r"\(MemoryCache, MemoryCache\).*twice"):
            TieredCache(memory, memory)
        with pytest.raises(ConfigurationError, match="twice"):
            TieredCache(memory, TieredCache(memory, disk))
        assert TieredCache(memory, disk, redis).tiers == (memory, disk, redis)


def test_takes_after_its_tiers(tmp_path, clock):
    """It blocks if one does, is shared if one is, and has tags if the last has them."""
    memory, foreign = MemoryCache(), ForeignCache(InMemoryCache())
    with DiskCache(tmp_path / "cache", lease_seconds=3.0) as disk:
        both = TieredCache(memory, disk)
        assert (both.blocking, both.shared, both.supports_tags) == (True, True, True)
        assert both.lease_seconds == 3.0
        fast = TieredCache(memory, MemoryCache())
        assert (fast.blocking, fast.shared, fast.supports_tags) == (False, False, True)
        assert TieredCache(memory, foreign).supports_tags is False


def test_nested_tiers_are_flat(clock):
    """A tiered cache as a tier stands for its tiers."""
    a, b, c = (MemoryCache(clock=clock) for _ in range(3))
    assert TieredCache(a, TieredCache(b, c)).tiers == (a, b, c)


def test_copies_upwards(cache, clock, tmp_path):
    """What only the last tier has is served and copied, as it was stored."""
    (token,) = cache.tag_tokens([tag_id("docs")])
    stored = entry(
        b"value" * 100, expires=clock() + 10, deps=((tag_id("docs"), token),), seconds=2.5, tokens=7
    )
    cache.write(KEY, stored)
    cache.tiers[0].clear()
    for _ in range(3):
        assert cache.read([Lookup(KEY)]) == [stored]
    stats = cache.stats()
    assert [(tier.hits, tier.misses) for tier in stats.tiers] == [(2, 1), (1, 0)]
    assert (stats.hits, stats.misses, stats.entries) == (3, 0, 1)
    clock.advance(10)
    assert payload(cache) is None


def test_copies_into_every_tier_above(clock):
    """A hit in the third tier fills the first and the second."""
    a, b, c = (MemoryCache(clock=clock) for _ in range(3))
    cache = TieredCache(a, b, c)
    cache.write(KEY, entry())
    a.clear()
    b.clear()
    assert payload(cache) == b"value"
    assert [tier.stats().entries for tier in (a, b, c)] == [1, 1, 1]


def test_one_batch_from_several_tiers(cache):
    """Lookups are answered in order, whichever tier has them."""
    memory, disk = cache.tiers
    for i in range(9):
        cache.write((("n",), str(i)), entry(str(i).encode()))
    memory._remove((("n",), "3"))
    disk._db.rows("DELETE FROM Cache WHERE rowid = 6")
    memory._remove((("n",), "5"))
    found = cache.read([Lookup((("n",), str(i))) for i in (5, 4, 3, 3, 10)])
    assert [e and e.payload for e in found] == [None, b"4", b"3", b"3", None]


def test_first_tier_hit_asks_only_for_tokens(cache):
    """A hit in the first tier costs one small query, whatever the value's size."""
    cache.write(KEY, entry(b"x" * 100_000))
    statements: list[str] = []
    with cache.tiers[1]._db.connection() as con:
        con.set_trace_callback(statements.append)
    assert payload(cache) is not None
    assert len(statements) == 1
    assert "Tags" in statements[0]


# -- invalidation and clear, wherever they are done ---------------------------------------------


@pytest.mark.parametrize("where", ["itself", "last tier", "another"])
def test_invalidation_reaches_copies(tmp_path, clock, cache, last, where):
    """A copy in the first tier is a miss as soon as an invalidation has returned."""
    deps = tuple(zip([tag_id("docs")], cache.tag_tokens([tag_id("docs")]), strict=True))
    cache.write(KEY, entry(deps=deps))
    cache.write(OTHER, entry(b"other"))
    assert payload(cache) == b"value"
    with tiered(tmp_path, clock) as another:
        {"itself": cache, "last tier": last, "another": another}[where].invalidate("docs")
    assert payload(cache) is None
    assert payload(cache, OTHER) == b"other"


@pytest.mark.parametrize("namespaces", [None, [("graph", "node")]])
@pytest.mark.parametrize("where", ["itself", "last tier", "another", "first tier"])
def test_clear_reaches_copies(tmp_path, clock, cache, last, where, namespaces):
    """Copies do not outlive a ``clear``, even of the last tier alone by another process."""
    cache.write(KEY, entry())
    cache.write(OTHER, entry(b"other"))
    assert (payload(cache), payload(cache, OTHER)) == (b"value", b"other")
    with tiered(tmp_path, clock) as another:
        caches = {"itself": cache, "last tier": last, "another": another, "first tier": None}
        if caches[where] is None:
            cache.tiers[0].clear(namespaces)
            assert payload(cache) == b"value"  # the last tier still has it
            return
        caches[where].clear(namespaces)
    assert payload(cache) is None
    assert payload(cache, OTHER) == (None if namespaces is None else b"other")
    cache.write(KEY, entry(b"new"))
    assert (payload(cache), payload(cache), payload(last)) == (b"new", b"new", b"new")


def test_clear_while_a_copy_is_made(tmp_path, clock, last):
    """A ``clear`` between reading the last tier and copying upwards is not survived."""
    memory = MemoryCache(clock=clock)
    disk = DiskCache(tmp_path / "cache", clock=clock)
    with TieredCache(memory, disk) as cache:
        for write in (cache.write, last.write):  # stored through tiers, and past them
            write(KEY, entry())
            memory.clear()
            copy = memory.write

            def clear_first(*args, copy=copy):
                last.clear()
                return copy(*args)

            memory.write = clear_first
            payload(cache)
            memory.write = copy
            assert payload(cache) is None


def test_clear_before_the_token_is_taken(tmp_path, clock, last):
    """A value stored past the tiers and cleared while its copy is prepared is not copied."""
    disk = DiskCache(tmp_path / "cache", clock=clock)
    with TieredCache(MemoryCache(clock=clock), disk) as cache:
        last.write(KEY, entry())
        tag_tokens = disk.tag_tokens

        def clear_first(tags):
            last.clear()
            return tag_tokens(tags)

        disk.tag_tokens = clear_first
        payload(cache)
        disk.tag_tokens = tag_tokens
        assert payload(cache) is None


def test_clear_while_it_is_written(tmp_path, clock, last):
    """A value written to the last tier, cleared there, and only then copied is not served."""
    memory = MemoryCache(clock=clock)
    with TieredCache(memory, DiskCache(tmp_path / "cache", clock=clock)) as cache:
        copy = memory.write

        def clear_first(*args):
            last.clear([KEY[0]])
            return copy(*args)

        memory.write = clear_first
        cache.write(KEY, entry())
        assert payload(cache) is None


def test_stored_past_the_tiers(cache, last):
    """What a process without tiers stored is served, copied, and still cleared."""
    (token,) = last.tag_tokens([tag_id("docs")])
    stored = entry(deps=((tag_id("docs"), token),))
    last.write(KEY, stored)
    assert cache.read([Lookup(KEY, (tag_id("docs"),))]) == [stored]
    assert cache.read([Lookup(KEY, (tag_id("docs"),))]) == [stored]
    assert [tier.hits for tier in cache.stats().tiers] == [1, 1]
    last.clear()
    assert payload(cache) is None


def test_stored_in_the_first_tier_alone(cache):
    """What somebody put into the first tier by hand is not served: no ``clear`` would reach it."""
    cache.tiers[0].write(KEY, entry())
    assert payload(cache) is None


def test_hit_through_tiers_serves_those_without(cache, last):
    """What was stored through tiers is a plain entry to a process without."""
    cache.write(KEY, entry())
    assert payload(last) == b"value"


# -- leases ---------------------------------------------------------------------------------------


def test_fenced_value_reaches_no_tier(cache, clock):
    """A writer that lost its lease stores nothing anywhere."""
    lease = cache.acquire(KEY)
    clock.advance(cache.lease_seconds)
    assert cache.acquire(KEY) is not None
    assert cache.write(KEY, entry(b"late"), lease) is False
    assert [tier.stats().entries for tier in cache.tiers] == [0, 0]


# -- failing tiers --------------------------------------------------------------------------------


def test_each_outage_of_a_tier_and_its_end_are_logged(clock, caplog, monkeypatch):
    """Every outage is one warning, however often it is met, and its end one line of information."""
    monkeypatch.setattr("langgraph_perf._breaker.FIRST_PAUSE", 0.0)
    caplog.set_level(logging.INFO, "langgraph_perf")
    first, last = Broken(clock), MemoryCache(clock=clock)
    cache = TieredCache(first, last)
    for outage in range(1, 4):
        first.broken = True
        for _ in range(5):
            payload(cache)
        first.broken = False
        for _ in range(3):
            payload(cache)
        said = [(record.levelname, record.getMessage().split()[0]) for record in told(caplog)]
        assert said.count(("WARNING", "peek")) == said.count(("INFO", "peek")) == outage
        assert said.count(("WARNING", "write")) <= outage
    assert "peek of Broken works again" in caplog.messages


def test_failing_first_tier(clock, caplog):
    """The last tier goes on alone; failures are counted and logged once."""
    first, last = Broken(clock), MemoryCache(clock=clock)
    cache = TieredCache(first, last)
    first.broken = True
    assert cache.write(KEY, entry()) is True
    assert payload(cache) == b"value"
    stats = cache.stats()
    assert stats.tiers[0].errors == stats.errors > 0
    assert stats.tiers[1].errors == 0
    first.broken = False
    assert payload(cache) == b"value"
    warnings = [r.getMessage() for r in told(caplog) if r.levelno == logging.WARNING]
    assert [message.split()[0] for message in warnings] == ["write", "peek"]
    assert all("backend is down" in message for message in warnings)


def test_failing_last_tier(clock):
    """The first tier serves what depends on no tag; the rest are misses until it is back."""
    first, last = MemoryCache(clock=clock), Broken(clock)
    cache = TieredCache(first, last)
    tagged = (("n",), "tagged")
    cache.write(KEY, entry(b"before"))
    deps = tuple(zip([tag_id("docs")], cache.tag_tokens([tag_id("docs")]), strict=True))
    cache.write(tagged, entry(deps=deps))
    last.broken = True
    assert payload(cache) == b"before"
    assert payload(cache, tagged) is None
    assert payload(cache, tags=(tag_id("docs"),)) is None
    assert cache.write(OTHER, entry(b"during")) is True
    assert payload(cache, OTHER) == b"during"
    clock.advance(1)
    last.broken = False
    back(cache)
    assert payload(cache) == b"before"
    assert payload(cache, tagged) == b"value"
    assert payload(cache, OTHER) is None  # no clear would have reached it


def back(cache: TieredCache) -> None:
    """Let the pause of a tier that failed be over."""
    for tier in cache._tiers:
        ask_again(tier)


def test_tier_that_keeps_failing_is_left_alone(clock, monkeypatch):
    """After three failed reads in a row a tier is not asked for a while, then tried again."""
    # fifty reads may take a busy machine longer than a pause, after which it is asked again
    monkeypatch.setattr("langgraph_perf._breaker.FIRST_PAUSE", 3600.0)
    first, last = Broken(clock), MemoryCache(clock=clock)
    cache = TieredCache(first, last)
    cache.write(KEY, entry())
    first.broken, first.tried = True, 0
    for _ in range(50):
        assert payload(cache) == b"value"
    assert first.tried <= 3 + 2  # with what was to be copied there between the reads
    first.broken = False
    back(cache)
    first.tried = 0
    for _ in range(5):
        payload(cache)
    assert first.tried >= 5
    assert cache.stats().tiers[0].hits >= 4


def test_failing_invalidation_is_not_hidden(clock):
    """Whoever invalidates or clears must know that it failed, even for a tier left alone."""
    first, last = MemoryCache(clock=clock), Broken(clock)
    cache = TieredCache(first, last)
    cache.write(KEY, entry())
    last.broken = True
    for _ in range(5):
        with pytest.raises(ConnectionError):
            cache.invalidate("docs")
        with pytest.raises(ConnectionError):
            cache.clear()
        with pytest.raises(ConnectionError):
            cache.tag_tokens(["docs"])
        payload(cache)
    last.broken = False
    cache.clear()
    assert payload(cache) is None


def test_write_with_a_lease_nobody_can_judge(tmp_path, clock):
    """When the tier that keeps the leases fails, a fenced value is stored nowhere."""
    disk = DiskCache(tmp_path / "cache", clock=clock)
    with TieredCache(MemoryCache(clock=clock), disk) as cache:
        lease = cache.acquire(KEY)

        def fail(*args):
            raise OSError("disk is gone")

        disk.write = fail
        with pytest.raises(OSError, match="disk is gone"):
            cache.write(KEY, entry(), lease)
        assert payload(cache) is None


async def test_async_uses_each_tier_as_it_is(tmp_path, clock):
    """Awaiting runs a tier that never blocks inline, and one that does on a thread."""
    ran_on: dict[str, set[int]] = {"memory": set(), "disk": set()}

    class Memory(MemoryCache):
        def peek(self, lookups):
            ran_on["memory"].add(threading.get_ident())
            return super().peek(lookups)

    class Disk(DiskCache):
        def read(self, lookups):
            ran_on["disk"].add(threading.get_ident())
            return super().read(lookups)

    cache = TieredCache(Memory(clock=clock), Disk(tmp_path / "cache", clock=clock))
    await cache.awrite(KEY, entry())
    await cache.tiers[0].aclear()
    assert (await cache.aread([Lookup(KEY)]))[0] is not None
    assert ran_on["memory"] == {threading.get_ident()}
    assert threading.get_ident() not in ran_on["disk"]
    await cache.aclose()


async def test_cancelling_a_read(cache):
    """Cancelling what awaits a tier leaves the cache as it was."""
    await cache.awrite(KEY, entry())
    for _ in range(20):
        task = asyncio.create_task(cache.aread([Lookup(KEY)]))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert (await cache.aread([Lookup(KEY)]))[0] is not None
