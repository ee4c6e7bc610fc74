"""What belongs to an owner: cleared and copied in O(its entries), and really gone."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from redis.crc import key_slot

from langgraph_perf import DiskCache, MemoryCache, RedisCache, TieredCache
from langgraph_perf.caches import disk as disk_module
from langgraph_perf.caches.base import OWNED, Cache, Entry, Lookup, namespace_tag, owned, tag_id
from langgraph_perf.caches.entry import key_digest
from langgraph_perf.testing import Clock, entry
from tests.redis_server import Server, new_prefix

FEW, MANY = 20, 2000
EACH = 5


def thread(i: object) -> tuple[str, ...]:
    return (OWNED, "thread", str(i))


A, B = thread("a"), thread("b")


@pytest.fixture
def prefix() -> str:
    return new_prefix()


@pytest.fixture
def redis_cache(redis_server: Server, prefix: str) -> Iterator[RedisCache]:
    with RedisCache(redis_server.url, prefix=prefix) as cache:
        yield cache


def fill(cache: Cache, namespaces: int, each: int = EACH) -> None:
    """Some entries for each of so many threads."""

    async def write() -> None:
        keys = [(thread(i), str(j)) for i in range(namespaces) for j in range(each)]
        for at in range(0, len(keys), 500):
            await asyncio.gather(*[cache.awrite(key, entry()) for key in keys[at : at + 500]])

    if isinstance(cache, RedisCache):
        asyncio.run(write())
        return
    for i in range(namespaces):
        for j in range(each):
            cache.write((thread(i), str(j)), entry())


def held(cache: Cache, namespace: tuple[str, ...], each: int = EACH) -> int:
    found = cache.read([Lookup((namespace, str(j))) for j in range(each)])
    return len(found) - found.count(None)


def check_only_its_own(cache: Cache, namespaces: int) -> None:
    assert held(cache, thread(7)) == 0
    assert held(cache, thread("copy")) == EACH
    assert held(cache, thread(6)) == held(cache, thread(8)) == EACH
    assert held(cache, thread(namespaces - 1)) == EACH


def test_what_is_owned() -> None:
    """The first part of a namespace tells, and nothing that looks like it."""
    assert owned((OWNED,))
    assert owned((OWNED, "thread", "1"))
    for namespace in ((), ("",), (OWNED + "x", "1"), ("a", OWNED), (f"{OWNED},thread",)):
        assert not owned(namespace)


# -- how much is touched --------------------------------------------------------------------------


class Untouchable(OrderedDict):  # type: ignore[type-arg]
    """A queue nobody may walk over, which counts what is taken out of it."""

    taken = 0

    def __iter__(self) -> Any:
        raise AssertionError("walked over all entries")

    keys = values = items = __iter__

    def pop(self, *args: Any) -> Any:
        self.taken += 1
        return super().pop(*args)


@pytest.mark.parametrize("namespaces", [FEW, MANY])
def test_memory_touches_only_its_own(namespaces: int) -> None:
    """However many others there are, nobody looks at them."""
    cache = MemoryCache()
    fill(cache, namespaces)
    small, main = OrderedDict(cache._small), OrderedDict(cache._main)
    cache._small, cache._main = Untouchable(small), Untouchable(main)
    assert cache.copy(thread(7), thread("copy"), {}) == EACH
    cache._small.taken = 0
    cache.clear([thread(7)])
    assert cache._small.taken == EACH
    check_only_its_own(cache, namespaces)


@contextmanager
def counting_instructions(cache: DiskCache) -> Iterator[list[int]]:
    """How many instructions of its virtual machine SQLite carried out, and rows it changed."""
    (handle,) = cache._db._idle
    counted = [0, -handle.con.total_changes]

    def one() -> int:
        counted[0] += 1
        return 0

    handle.con.set_progress_handler(one, 1)
    yield counted
    handle.con.set_progress_handler(None, 1)
    counted[1] += handle.con.total_changes
    assert list(cache._db._idle) == [handle]


def disk_work(directory: Path, namespaces: int) -> list[list[int]]:
    with DiskCache(directory / str(namespaces)) as cache:
        fill(cache, namespaces)
        cache._next_sweep = float("inf")
        cache._writes_to_sweep = 10**9
        with counting_instructions(cache) as copying:
            assert cache.copy(thread(7), thread("copy"), {}) == EACH
        with counting_instructions(cache) as clearing:
            cache.clear([thread(7)])
        check_only_its_own(cache, namespaces)
        return [copying, clearing]


def test_disk_touches_only_its_own(tmp_path: Path) -> None:
    """With a hundred times as many others SQLite has exactly the same to do."""
    few = disk_work(tmp_path, FEW)
    assert disk_work(tmp_path, MANY) == few
    assert few[1][0] < 2000


def test_disk_searches_by_key(disk: DiskCache) -> None:
    """Neither clearing nor copying a namespace reads the whole table."""
    first, last = disk_module._range(A)
    with disk._db.connection() as con:
        for statement, values in (
            (disk_module._DELETE % disk_module._IN_RANGE, (first, last, 10**9)),
            (disk_module._SELECT_KEYS, (first, last)),
            (f"{disk_module._SELECT} = ?", (first,)),
            (f"{disk_module._SELECT} IN (?, ?)", (first, last)),
        ):
            plan = [row[3] for row in con.execute(f"EXPLAIN QUERY PLAN {statement}", values)]
            assert any("USING" in step and "key" in step for step in plan), plan
            assert not any(step.startswith("SCAN") for step in plan), plan


def calls(client: Any) -> dict[str, int]:
    """How often the server carried out what, inside scripts too."""
    stats = client.info("commandstats")
    ours = {name: of["calls"] for name, of in stats.items() if "info" not in name.lower()}
    return {name.removeprefix("cmdstat_"): count for name, count in ours.items()}


def redis_work(server: Server, namespaces: int) -> list[Any]:
    rounds: list[list[Any]] = []
    with RedisCache(server.url, prefix=new_prefix()) as cache, server.client() as client:
        fill(cache, namespaces)
        cache.copy(thread(1), thread("to know the connection"), {})
        cache.clear([thread("to know the connection")])
        # each round finds a copy there, so that whichever is taken has had the same to do
        cache.copy(thread(1), thread("copy"), {})

        def copy(number: int) -> None:
            assert cache.copy(thread(number), thread("copy"), {}) == EACH

        # now and then a connection is asked once more whether it is the one it was
        for number in (7, 8, 9):
            work: list[Any] = []
            for act in (copy, lambda number: cache.clear([thread(number)])):
                before, trips = calls(client), cache.round_trips
                act(number)
                after = calls(client)
                work.append(
                    {
                        name: count - before.get(name, 0)
                        for name, count in after.items()
                        if count > before.get(name, 0)
                    }
                )
                work.append(cache.round_trips - trips)
            rounds.append(work)
    return min(rounds, key=lambda work: (work[1] + work[3], sum(work[0].values())))


def test_redis_touches_only_its_own(own_server: Server) -> None:
    """With a hundred times as many others it is the same commands, and no walk over all keys."""
    few = redis_work(own_server, FEW)
    many = redis_work(own_server, MANY)
    copying, copy_trips, clearing, clear_trips = few
    assert many[::2] == [copying, clearing]
    assert all(trips <= 4 for trips in many[1::2])
    assert "scan" not in copying
    assert "scan" not in clearing
    assert clearing["unlink"] == EACH + 1
    assert 3 <= min(copy_trips, clear_trips) <= max(copy_trips, clear_trips) <= 4


@pytest.mark.parametrize("kind", ["memory", "disk", "redis"])
def test_more_than_one_piece(kind: str, tmp_path: Path, redis_cache: RedisCache) -> None:
    """An owner with thousands of entries is copied and cleared whole."""
    cache: Cache = redis_cache
    if kind != "redis":
        cache = MemoryCache() if kind == "memory" else DiskCache(tmp_path / "cache")
    fill(cache, 2, 2100)
    assert cache.copy(thread(0), thread("copy"), {}) == 2100
    assert held(cache, thread("copy"), 2100) == 2100
    cache.clear([thread(0)])
    assert held(cache, thread(0), 2100) == 0
    assert held(cache, thread(1), 2100) == 2100
    cache.clear([thread("copy")])
    assert held(cache, thread("copy"), 2100) == 0
    cache.close()


# -- memory ---------------------------------------------------------------------------------------


def test_memory_index_follows(clock: Clock) -> None:
    """What is evicted, has expired, or was never stored is in no index."""
    cache = MemoryCache(max_entries=10, clock=clock)
    for i in range(100):
        cache.write((thread(i), "k"), entry(expires=clock() + 10))
        assert len(cache._owned) == min(i + 1, 10)
    clock.advance(10)
    cache.write((A, "k"), entry())
    assert cache._owned == {A: {(A, "k")}}
    cache.max_bytes = 5000
    assert not cache.write((A, "k"), entry(b"x" * 5000))
    assert cache._owned == {}


# -- disk -----------------------------------------------------------------------------------------


def files_with(directory: Path, plaintext: bytes) -> list[str]:
    return [
        path.name
        for path in directory.rglob("*")
        if path.is_file() and plaintext in path.read_bytes()
    ]


def long(word: bytes, size: int) -> bytes:
    return (word * (size // len(word) + 1))[:size]


@pytest.mark.parametrize("size", [300, 3000, 30_000, 1_000_000])
def test_disk_forgets_the_bytes(tmp_path: Path, size: int) -> None:
    """After a ``clear`` no file has the plaintext, of older values neither; others have theirs."""
    directory = tmp_path / "cache"
    with DiskCache(directory) as cache:
        for name in ("1", "2", "3"):
            cache.write((A, name), entry(long(b"FIRST-SECRET", size)))
            cache.write((B, name), entry(long(b"NEIGHBOUR", size)))
        cache.write((A, "1"), entry(long(b"SECOND-SECRET", size // 2)))
        cache.write((A, "2"), entry(long(b"THIRD-SECRET", size)))
        assert files_with(directory, b"FIRST-SECRET")
        assert cache.copy(A, thread("copy"), {}) == 3
        cache.clear([A, thread("copy")])
        assert files_with(directory, b"SECRET") == []
        assert files_with(directory, b"NEIGHBOUR")
        assert held(cache, B, 4) == 3


def test_disk_forgets_what_was_evicted(tmp_path: Path, clock: Clock) -> None:
    """Nor is it left of what had to make room, or had expired."""
    directory = tmp_path / "cache"
    with DiskCache(directory, size_limit=2**20, clock=clock) as cache:
        cache.write((A, "expires"), entry(long(b"SECRET", 50_000), expires=clock() + 10))
        cache.write((A, "evicted"), entry(long(b"SECRET", 50_000)))
        clock.advance(10)
        for i in range(60):
            cache.write((B, str(i)), entry(long(b"NEIGHBOUR", 50_000)))
        assert held(cache, A) == 0
        assert cache.stats().evicted > 10
        cache.clear([A])
        assert files_with(directory, b"SECRET") == []


def test_disk_deletes_securely_everywhere(disk: DiskCache) -> None:
    """Whatever SQLite was built with, every connection zeroes what it deletes."""
    with disk._db.connection() as one, disk._db.connection() as other:
        for con in (one, other):
            assert con.execute("PRAGMA secure_delete").fetchone() == (1,)


def test_a_reader_does_not_fail_a_clear(tmp_path: Path) -> None:
    """While somebody reads, the log stays; the next write after that empties it."""
    directory = tmp_path / "cache"
    with DiskCache(directory) as cache:
        cache.write((A, "k"), entry(long(b"SECRET", 30_000)))
        reader = sqlite3.connect(directory / "cache.db", isolation_level=None)
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM Cache").fetchone()
        started = time.monotonic()
        cache.clear([A])
        assert time.monotonic() - started < cache.timeout
        assert cache.read([Lookup((A, "k"))]) == [None]
        assert reader.execute("SELECT count(*) FROM Cache").fetchone() == (1,)
        cache.write((B, "k"), entry())
        assert files_with(directory, b"SECRET") == ["cache.db-wal"]
        reader.close()
        cache.write((B, "k"), entry())
        assert files_with(directory, b"SECRET") == []
        with cache._db.connection() as con:
            assert con.execute("PRAGMA busy_timeout").fetchone() == (cache.timeout * 1000,)


# -- Redis ----------------------------------------------------------------------------------------


def index_of(prefix: str, namespace: tuple[str, ...]) -> str:
    return f"{prefix}:1:n:{{{namespace_tag(namespace)}}}"


def test_redis_index_follows(redis_cache: RedisCache, redis_server: Server, prefix: str) -> None:
    """It has each entry by its expiry, loses what has expired, and goes with the last one."""
    cache, index, now = redis_cache, index_of(prefix, A), time.time()
    names = [key_digest((A, str(i)))[16:].hex().encode() for i in range(3)]
    with redis_server.client() as client:
        cache.write((A, "0"), entry(expires=now + 1000))
        cache.write((A, "1"), entry(expires=now + 100))
        scores = dict(client.zrange(index, 0, -1, withscores=True))
        took = time.time() - now
        assert scores.keys() == {names[0], names[1]}
        for name, seconds in ((names[0], 1001), (names[1], 101)):
            assert seconds - 0.1 < scores[name] / 1000 - now < seconds + 0.1 + took
        assert 900_000 < client.pttl(index) <= 1_002_000
        cache.write((A, "2"), entry())
        assert client.pttl(index) == -1
        assert client.zscore(index, names[2]) == float("inf")
        cache.write((A, "2"), entry(expires=now + 50))
        assert 900_000 < client.pttl(index) <= 1_002_000
        client.zadd(index, {names[1]: (now - 1) * 1000})  # time passes
        client.delete(index.replace(":n:", ":e2:") + names[1].decode())
        cache.write((A, "2"), entry(expires=now + 50))
        assert set(client.zrange(index, 0, -1)) == {names[0], names[2]}
        cache.clear([A])
        assert list(client.scan_iter(match=f"{prefix}:*")) == []


def test_redis_leaves_nothing(redis_cache: RedisCache, redis_server: Server, prefix: str) -> None:
    """``clear()`` finds entries and indexes of owners too."""
    fill(redis_cache, 3)
    redis_cache.write((("n",), "k"), entry())
    redis_cache.clear()
    with redis_server.client() as client:
        assert list(client.scan_iter(match=f"{prefix}:*")) == []


def test_redis_keeps_an_owner_in_one_slot(
    redis_cache: RedisCache, redis_server: Server, prefix: str
) -> None:
    """On a cluster all that a script needs is on one node."""
    for name in ("1", "2"):
        redis_cache.write((A, name), entry())
        redis_cache.acquire((A, name))
    with redis_server.client() as client:
        names = list(client.scan_iter(match=f"{prefix}:*"))
    assert {name.removeprefix(f"{prefix}:1:".encode()).split(b":")[0] for name in names} == {
        b"e2",
        b"l",
        b"n",
        b"t",
    }
    assert len(names) == 6
    assert len({key_slot(name) for name in names}) == 1


@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_redis_clears_what_no_index_knows(
    redis_cache: RedisCache, redis_server: Server, prefix: str, how: str
) -> None:
    """A server short of memory evicts an index like anything else: ``clear`` still counts."""
    index = index_of(prefix, A)
    with redis_server.client() as client:
        redis_cache.write((A, "k"), entry())
        client.delete(index)
        if how == "replaced":
            redis_cache.write((A, "other"), entry())
        assert redis_cache.read([Lookup((A, "k"))]) == [entry()]
        redis_cache.clear([A])
        assert redis_cache.read([Lookup((A, "k")), Lookup((A, "other"))]) == [None, None]
        redis_cache.write((A, "new"), entry())
        assert redis_cache.read([Lookup((A, "k")), Lookup((A, "new"))]) == [None, entry()]
        assert redis_cache.copy(A, B, {}) == 1


def test_redis_foreign_index(redis_cache: RedisCache, redis_server: Server, prefix: str) -> None:
    """What is no index, or no name in one, is left alone, and nothing is stored beside it."""
    index = index_of(prefix, A)
    with redis_server.client() as client:
        client.set(index, "theirs")
        assert redis_cache.write((A, "k"), entry()) is False
        assert redis_cache.stats().refused == 1
        assert redis_cache.read([Lookup((A, "k"))]) == [None]
        assert redis_cache.copy(A, B, {}) == 0
        redis_cache.clear([A])
        assert client.get(index) == b"theirs"
        client.delete(index)
        client.zadd(index, {"theirs": 2**50})
        redis_cache.write((A, "k"), entry())
        assert redis_cache.copy(A, B, {}) == 1
        redis_cache.clear([A])
        assert client.zrange(index, 0, -1) == [b"theirs"]


def test_redis_tokens_of_owners_stay(
    redis_cache: RedisCache, redis_server: Server, prefix: str
) -> None:
    """A write renews its owner's token when half of its time is over, and else leaves it alone:
    whoever knows it would be told to forget it."""
    name = f"{prefix}:1:t:{{{namespace_tag(A)}}}"
    month = 30 * 86400
    with redis_server.client() as client:
        redis_cache.write((A, "1"), entry())
        assert client.ttl(name) > month - 100
        client.expire(name, month - 1000)
        redis_cache.write((A, "2"), entry())
        assert client.ttl(name) <= month - 1000
        client.expire(name, month // 2 - 1000)
        redis_cache.write((A, "3"), entry())
        assert client.ttl(name) > month - 100
        assert None not in redis_cache.read([Lookup((A, str(i))) for i in (1, 2, 3)])


# -- tiers ----------------------------------------------------------------------------------------


@pytest.fixture(params=["memory, memory", "memory, disk", "memory, redis", "memory, disk, redis"])
def tiers(request: Any, tmp_path: Path, redis_server: Server, prefix: str) -> Iterator[TieredCache]:
    caches: list[Cache] = [MemoryCache()]
    if "disk" in request.param:
        caches.append(DiskCache(tmp_path / "cache"))
    if "redis" in request.param:
        caches.append(RedisCache(redis_server.url, prefix=prefix))
    if len(caches) == 1:
        caches.append(MemoryCache())
    with TieredCache(*caches) as tiers:
        yield tiers


def test_tiers_serve_copies_from_the_first(tiers: TieredCache) -> None:
    """A copy is read from below once; a ``clear`` in the last tier, by whomever, ends it."""
    tiers.write((A, "k"), entry(b"new"))
    tiers.write((B, "k"), entry(b"old"))
    assert tiers.read([Lookup((B, "k"))])[0] == entry(b"old")
    assert tiers.copy(A, B, {}) == 1
    for hits in (0, 1):
        before = tiers.stats().tiers[0].hits
        assert tiers.read([Lookup((B, "k"))]) == [entry(b"new")]
        assert tiers.stats().tiers[0].hits == before + hits
    tiers.tiers[-1].clear([A])
    assert tiers.read([Lookup((A, "k")), Lookup((B, "k"))]) == [None, entry(b"new")]
    tiers.tiers[-1].clear([B])
    assert tiers.read([Lookup((B, "k"))]) == [None]


def test_tiers_copy_what_depends_on_tags(tiers: TieredCache) -> None:
    """Own dependencies are replaced beside those asked for, and the last stays the namespace's."""
    one, two, docs = (tag_id(name) for name in ("thread 1", "thread 2", "docs"))
    tokens = dict(zip((one, two, docs), tiers.tag_tokens([one, two, docs]), strict=True))
    tiers.write((A, "k"), entry(deps=((one, tokens[one]), (docs, tokens[docs]))))
    assert tiers.copy(A, B, {one: (two, tokens[two])}) == 1
    tiers.invalidate("thread 1")
    (found,) = tiers.read([Lookup((B, "k"), (two, docs))])
    assert found is not None
    assert found.deps == ((two, tokens[two]), (docs, tokens[docs]))
    (below,) = tiers.tiers[-1].read([Lookup((B, "k"))])
    assert below is not None
    assert [tag for tag, _ in below.deps] == [two, docs, namespace_tag(B)]


def test_one_tier_copies_as_it_would_alone() -> None:
    """With one tier nothing depends on its namespace."""
    with TieredCache(MemoryCache()) as tiers:
        tiers.write((A, "k"), entry())
        assert tiers.copy(A, B, {}) == 1
        assert tiers.tiers[0].peek([Lookup((B, "k"))]) == [entry()]


class Silent(MemoryCache):
    """A backend as it was before there were copies."""

    copy = Cache.copy


async def test_a_backend_that_cannot_copies_nothing() -> None:
    """The copy then starts empty, and upper tiers are not made to forget anything."""
    with TieredCache(MemoryCache(), Silent()) as tiers:
        tiers.write((A, "k"), entry(b"a"))
        tiers.write((B, "k"), Entry(b"b", 0.0))
        assert tiers.copy(A, B, {}) == await tiers.acopy(A, B, {}) == 0
        assert tiers.tiers[0].stats().entries == 2
