"""What every cache of this library must do, whatever it keeps its entries in: for your own backend.

Subclass the class (or classes) that describe your cache, give them a ``make``, and run them with
pytest. Every test runs through the blocking methods and through their awaitable twins::

    import pytest

    pytest.register_assert_rewrite("langgraph_perf.testing")  # in conftest.py: readable failures

    from langgraph_perf.testing import BoundedConformance, SharedConformance
    from my_package import MyCache


    class TestMyCache(SharedConformance, BoundedConformance):
        def make(self, directory, clock):
            return MyCache(directory, clock=clock)

``CacheConformance`` is what all of them do (entries, time, namespaces, LangGraph's ``BaseCache``),
and part of each of the others. ``TagConformance``, ``LeaseConformance`` and ``BoundedConformance``
are for caches with tags, leases and bounds; ``SharedConformance``, for those that several processes
use, is the first two and more; ``DamageConformance`` is for those whose stored bytes somebody else
can reach. What to subclass for the cache itself, and what its methods have to do, is in
``langgraph_perf.caches.base``.

Needs pytest, and nothing else.
"""

from __future__ import annotations

import asyncio
import operator
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from langgraph_perf.caches.base import OWNED, Cache, Entry, Lease, Lookup, namespace_tag, tag_id
from langgraph_perf.errors import CacheClosed

__all__ = [
    "BoundedConformance",
    "CacheConformance",
    "Clock",
    "DamageConformance",
    "LeaseConformance",
    "SharedConformance",
    "Subject",
    "TagConformance",
]

KEY = (("graph", "node"), "key")
NAMESPACES = [(), ("",), ("a",), ("a", "b"), ("a,b",), ("a.b",), ("a:b",), ("ab",), ("a", "b", "")]
OWNERS = [(OWNED, "thread", "1"), (OWNED, "thread", "2"), (OWNED, "run", "1"), (OWNED,)]
NAMES = ["", "k", "k,", "é\ud800", "x" * 300]


class Clock:
    """A clock that stands still until told to move."""

    def __init__(self, now: float = 1_700_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Let ``seconds`` pass."""
        self.now += seconds


def entry(payload: bytes = b"value", **fields: Any) -> Entry:
    """An entry made at the time a fresh ``Clock`` shows."""
    return Entry(payload, **{"created": 1_700_000_000.0, **fields})


class Subject:
    """A cache whose operations a test calls the same way, whether they block or await."""

    def __init__(self, cache: Cache, loop: asyncio.AbstractEventLoop | None) -> None:
        self.cache = cache
        self._loop = loop

    def __getattr__(self, name: str) -> Any:
        loop = self._loop
        if loop is None:
            return getattr(self.cache, name)
        method = getattr(self.cache, f"a{name}")
        return lambda *args: loop.run_until_complete(method(*args))

    def one(self, key: Any = KEY, tags: tuple[str, ...] = (), max_age: Any = None) -> Any:
        """What a single lookup finds."""
        (found,) = self.read([Lookup(key, tags, max_age)])
        return found

    def at_hand(self, key: Any = KEY, tags: tuple[str, ...] = (), max_age: Any = None) -> Any:
        """What a single lookup finds without waiting for anything, if the cache ever does."""
        return self.cache.read_now(Lookup(key, tags, max_age))


def together(subjects: list[Subject], operation: str, *args: Any) -> list[Any]:
    """What one operation, called on all of them at the same time, returns for each."""
    return [answer for (answer,) in at_once(*[[(each, operation, *args)] for each in subjects])]


def at_once(*turns: list[tuple[Any, ...]]) -> list[list[Any]]:
    """What the calls of each turn return, made one after another while the other turns are taken; a
    call is a subject, an operation and its arguments."""
    loop: asyncio.AbstractEventLoop | None = turns[0][0][0]._loop
    if loop is not None:

        async def awaited(turn: list[tuple[Any, ...]]) -> list[Any]:
            return [await getattr(on.cache, f"a{name}")(*args) for on, name, *args in turn]

        async def all_awaited() -> list[list[Any]]:
            return await asyncio.gather(*[awaited(turn) for turn in turns])

        return loop.run_until_complete(all_awaited())
    barrier = Barrier(len(turns))

    def taken(turn: list[tuple[Any, ...]]) -> list[Any]:
        barrier.wait(60)
        return [getattr(on.cache, name)(*args) for on, name, *args in turn]

    with _often_switched(), ThreadPoolExecutor(len(turns)) as threads:
        return list(threads.map(taken, turns))


def meanwhile(work: Callable[[Callable[[], None]], None], *others: Callable[[], None]) -> None:
    """Do ``work`` while a thread for each of ``others`` does that again and again. What ``work``
    is given waits until each of them has done it twice more: once of it after the call."""
    done = False
    times = [0] * len(others)
    progress = threading.Condition()

    def again(number: int) -> None:
        while not done and not any(each.done() for each in running):
            others[number]()
            with progress:
                times[number] += 1
                progress.notify_all()

    def turn() -> None:
        with progress:
            until = [each + 2 for each in times]
            while any(map(operator.lt, times, until)):
                if any(each.done() for each in running):  # it raised
                    return
                progress.wait(1)

    with _often_switched(), ThreadPoolExecutor(len(others)) as threads:
        running: list[Future[None]] = []
        running += [threads.submit(again, number) for number in range(len(others))]
        try:
            work(turn)
        finally:
            done = True
        for each in running:
            each.result()


@contextmanager
def _often_switched() -> Iterator[None]:
    """Let threads take turns after a few instructions, where there are few chances to meet."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


class CacheConformance:
    """Entries, time, namespaces, LangGraph's ``BaseCache`` and the end of a cache's life.

    Attributes:
        tolerance: seconds by which the cache's own time may differ from its clock's.
        forever: seconds for which an entry without expiry must at least be served.
    """

    tolerance = 0.01
    forever = 1e9

    def make(self, directory: Path, clock: Clock) -> Cache:
        """A cache that reads ``clock``; empty, when it is the first one for this ``directory``,
        in which it may keep files. What others share, they share in one ``directory`` alone."""
        raise NotImplementedError(f"{type(self).__name__} must define make(self, directory, clock)")

    def make_clock(self, directory: Path) -> Clock:
        """The clock for ``make``; a backend with a clock of its own overrides ``Clock.advance``."""
        return Clock()

    @pytest.fixture(params=["sync", "async"])
    def mode(self, request: Any) -> Any:
        """How the cache is called."""
        return request.param

    @pytest.fixture
    def clock(self, tmp_path: Path) -> Clock:
        return self.make_clock(tmp_path)

    @pytest.fixture
    def loop(self, mode: str) -> Iterator[asyncio.AbstractEventLoop | None]:
        if mode == "sync":
            yield None
            return
        loop = asyncio.new_event_loop()
        yield loop
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()

    @pytest.fixture
    def cache(self, loop: Any, tmp_path: Path, clock: Clock) -> Iterator[Subject]:
        with self.made(tmp_path, clock) as cache:
            yield Subject(cache, loop)

    def made(self, directory: Path, clock: Clock) -> Cache:
        """What ``make`` returns, if it is what can be tested here."""
        cache: object = self.make(directory, clock)
        if not isinstance(cache, Cache):
            raise TypeError(
                f"make() must return a langgraph_perf.caches.base.Cache, got {cache!r:.200}; any "
                "other LangGraph BaseCache goes into langgraph_perf.caches.foreign.ForeignCache"
            )
        return cache

    # -- entries ----------------------------------------------------------------------------------

    def test_reads_back_exactly_what_was_written(self, cache: Subject) -> None:
        """An entry comes back bit for bit, with its metadata."""
        for payload in (b"", b"\0", os.urandom(100), os.urandom(1_500_000)):
            stored = entry(payload, expires=1_700_001_000.125, seconds=0.1, tokens=2**40)
            assert cache.write(KEY, stored) is True
            assert cache.one() == stored

    def test_answers_in_the_order_asked(self, cache: Subject) -> None:
        """Many lookups get one answer each, in order, repeated and unknown keys included."""
        keys = [(("n",), str(i)) for i in range(1200)]
        for key in keys[::2]:
            cache.write(key, entry(key[1].encode()))
        asked = [*keys, keys[0], keys[1], keys[0]]
        found = cache.read([Lookup(key) for key in asked])
        assert [e and e.payload for e in found] == [
            None if int(name) % 2 else name.encode() for _, name in asked
        ]

    def test_reads_nothing_for_nothing(self, cache: Subject) -> None:
        """No lookups, no answers."""
        assert cache.read([]) == []

    def test_overwrites(self, cache: Subject) -> None:
        """The last value written under a key is the one read, with its own expiry."""
        cache.write(KEY, entry(b"a" * 5000, expires=1_700_000_001.0))
        cache.write(KEY, entry(b"b"))
        assert (cache.one()).payload == b"b"
        assert (cache.one()).expires is None

    def test_keys_do_not_meet(self, cache: Subject) -> None:
        """Every namespace and name is a key of its own, whatever characters it is made of."""
        keys = [(namespace, name) for namespace in NAMESPACES for name in NAMES]
        for i, key in enumerate(keys):
            cache.write(key, entry(str(i).encode()))
        found = cache.read([Lookup(key) for key in keys])
        assert [e.payload for e in found] == [str(i).encode() for i in range(len(keys))]

    # -- time -------------------------------------------------------------------------------------

    def test_expires(self, cache: Subject, clock: Clock) -> None:
        """An entry is served until its expiry, and not at it."""
        life = max(10.0, 20 * self.tolerance)
        cache.write(KEY, entry(expires=clock() + life))
        clock.advance(life - self.tolerance)
        assert cache.one() is not None
        clock.advance(self.tolerance)
        assert cache.one() is None

    def test_stale_entries_are_served(self, cache: Subject, clock: Clock) -> None:
        """``grace`` is part of the time until the expiry, not of what comes after it: an entry is
        served to its end, and tells its grace."""
        life = max(10.0, 20 * self.tolerance)
        for key in (KEY, (OWNERS[0], "k")):
            stored = entry(expires=clock() + life, grace=0.8 * life)
            cache.write(key, stored)
            clock.advance(life - self.tolerance)
            assert cache.one(key) == stored
            clock.advance(self.tolerance)
            assert cache.one(key) is None

    def test_never_expires_without_expiry(self, cache: Subject, clock: Clock) -> None:
        """``expires=None`` means for ever, or what is as good."""
        cache.write(KEY, entry())
        clock.advance(self.forever)
        assert cache.one() is not None

    def test_max_age_narrows(self, cache: Subject, clock: Clock) -> None:
        """A lookup may ask for something younger; others still get the older entry."""
        cache.write(KEY, entry(expires=clock() + 100))
        clock.advance(10)
        assert cache.one(max_age=10) is None
        assert cache.one(max_age=10.5) is not None
        assert cache.one() is not None
        clock.advance(90)
        assert cache.one(max_age=1000) is None

    def test_each_lookup_has_its_own_max_age(self, cache: Subject, clock: Clock) -> None:
        """What one lookup of a batch asks for changes nothing for its neighbours."""
        keys = [(("n",), str(i)) for i in range(4)]
        for key in keys:
            cache.write(key, entry(expires=clock() + 100))
        clock.advance(10)
        for ages in ([5, None, 50, 5], [None, 5, 5, 50]):
            asked = [Lookup(key, (), age) for key, age in zip(keys, ages, strict=True)]
            assert [found is None for found in cache.read(asked)] == [age == 5 for age in ages]

    def test_at_hand_is_what_is_found(self, cache: Subject, clock: Clock) -> None:
        """``read_now`` has nothing that is absent, expired, too old for the lookup or replaced."""
        assert cache.at_hand() is None
        stored = entry(expires=clock() + 10)
        cache.write(KEY, stored)
        for _ in range(3):
            assert cache.one() == stored
            assert cache.at_hand() in (None, stored)
        assert cache.at_hand((KEY[0], "other")) is cache.at_hand((("n",), KEY[1])) is None
        clock.advance(5)
        assert cache.at_hand(max_age=5) is None
        assert cache.at_hand() in (None, stored)
        clock.advance(5)
        assert cache.at_hand() is None
        for cleared in ([KEY[0]], None):
            for payload in (b"1", b"2"):
                cache.write(KEY, entry(payload))
                assert cache.at_hand() in (None, entry(payload))
                assert cache.one() == cache.one() == entry(payload)
            cache.clear(cleared)
            assert cache.at_hand() is None
        cache.write(KEY, entry())
        assert cache.one() == cache.one() == entry()
        cache.close()
        assert cache.at_hand() is None

    # -- clearing ---------------------------------------------------------------------------------

    def test_clear_takes_exact_namespaces(self, cache: Subject) -> None:
        """Clearing a namespace touches none that merely looks like it."""
        for namespace in NAMESPACES:
            cache.write((namespace, "k"), entry())
        for gone, namespace in enumerate(NAMESPACES, 1):
            cache.clear([namespace])
            found = cache.read([Lookup((namespace, "k")) for namespace in NAMESPACES])
            assert [e is None for e in found] == [i < gone for i in range(len(NAMESPACES))]

    def test_clear_everything(self, cache: Subject) -> None:
        """``clear()`` empties all namespaces, and the cache works on."""
        for namespace in NAMESPACES:
            cache.write((namespace, "k"), entry())
        cache.clear()
        found = cache.read([Lookup((namespace, "k")) for namespace in NAMESPACES])
        assert found == [None] * len(NAMESPACES)
        cache.write(KEY, entry())
        assert cache.one() is not None

    def test_clear_nothing(self, cache: Subject) -> None:
        """``clear([])`` is not ``clear(None)``."""
        cache.write(KEY, entry())
        cache.clear([])
        assert cache.one() is not None

    # -- what belongs to an owner -----------------------------------------------------------------

    def everything(self, cache: Subject, namespace: Any) -> list[bytes | None]:
        """What is stored under ``NAMES`` in ``namespace``."""
        found = cache.read([Lookup((namespace, name)) for name in NAMES])
        return [e and e.payload for e in found]

    def test_owners_are_cleared_one_by_one(self, cache: Subject) -> None:
        """Clearing what one owner has leaves what others have, and other namespaces."""
        namespaces = [*OWNERS, KEY[0]]
        for i, namespace in enumerate(namespaces):
            for name in NAMES:
                cache.write((namespace, name), entry(str(i).encode()))
        cleared: list[Any] = []
        for some in ([OWNERS[1]], [OWNERS[0], (OWNED, "thread", "3"), KEY[0]], OWNERS[3:]):
            cache.clear(some)
            cleared += some
            for i, namespace in enumerate(namespaces):
                expected = None if namespace in cleared else str(i).encode()
                assert self.everything(cache, namespace) == [expected] * len(NAMES)
        cache.write((OWNERS[1], "k"), entry(b"new"))
        assert cache.one((OWNERS[1], "k")).payload == b"new"
        cache.clear()
        assert cache.one((OWNERS[1], "k")) is cache.one((OWNERS[2], "k")) is None

    def test_entries_of_owners_expire_and_are_replaced(self, cache: Subject, clock: Clock) -> None:
        """They are entries like any other."""
        a, b = (OWNERS[0], "a"), (OWNERS[0], "b")
        cache.write(a, entry(b"1", expires=clock() + 5))
        cache.write(b, entry(b"2", expires=clock() + 100))
        clock.advance(5)
        assert [e and e.payload for e in cache.read([Lookup(a), Lookup(b)])] == [None, b"2"]
        cache.write(a, entry(b"3"))
        cache.write(b, entry(b"4", expires=clock() + 5))
        clock.advance(5)
        assert [e and e.payload for e in cache.read([Lookup(a), Lookup(b)])] == [b"3", None]
        cache.clear([OWNERS[0]])
        assert cache.read([Lookup(a), Lookup(b)]) == [None, None]

    def test_owners_are_copied(self, cache: Subject, clock: Clock) -> None:
        """A copy has the same entries and goes its own way; a backend may make none at all."""
        source, target, other = OWNERS[:3]
        kept = entry(b"kept", expires=clock() + 100, seconds=0.5, tokens=7, grace=3.0)
        cache.write((source, "kept"), kept)
        cache.write((source, "expired"), entry(expires=clock() + 5))
        cache.write((source, "both"), entry(b"source"))
        cache.write((target, "both"), entry(b"target"))
        cache.write((target, "own"), entry(b"own"))
        cache.write((other, "other"), entry())
        clock.advance(5)
        copied = cache.copy(source, target, {})
        if not copied:
            assert cache.one((target, "kept")) is None
            assert cache.one((target, "both")).payload == b"target"
            return
        assert copied == 2
        names = ("kept", "expired", "both", "own", "other")
        found = cache.read([Lookup((target, name)) for name in names])
        assert [e and e.payload for e in found] == [b"kept", None, b"source", b"own", None]
        assert found[0] == kept
        cache.clear([source])
        assert cache.one((target, "kept")) == kept
        assert cache.copy(target, source, {}) == 3
        cache.clear([target])
        assert cache.one((target, "kept")) is None
        assert cache.one((source, "own")).payload == b"own"
        assert cache.copy(target, source, {}) == 0

    def test_only_owners_are_copied(self, cache: Subject) -> None:
        """Other namespaces are neither copied nor copied into."""
        for source, target in ((("a",), OWNERS[0]), (OWNERS[1], ("b",)), (("c",), ("d",))):
            cache.write((source, "k"), entry())
            assert cache.copy(source, target, {}) == 0
            assert cache.one((target, "k")) is None

    # -- LangGraph's BaseCache --------------------------------------------------------------------

    def test_base_cache_returns_the_keys_asked(self, cache: Subject) -> None:
        """``get`` leaves out what it does not have and returns nothing that was not asked."""
        a, b, c = (("n",), "a"), (("n",), "b"), (("n", "a"), "a")
        cache.set({a: ({"x": (1, 2)}, None), b: ([1.5, None], 60)})
        assert cache.get([a, c]) == {a: {"x": (1, 2)}}
        assert cache.get([b, a, b]) == {a: {"x": (1, 2)}, b: [1.5, None]}
        assert cache.get([c]) == {}
        assert cache.get([]) == {}

    def test_base_cache_ttl(self, cache: Subject, clock: Clock) -> None:
        """``set`` takes seconds to live, and overwriting takes the new ones."""
        a, b = (("n",), "a"), (("n",), "b")
        cache.set({a: (1, 5), b: (2, None)})
        clock.advance(5)
        assert cache.get([a, b]) == {b: 2}
        cache.set({a: (3, 5), b: (4, 5)})
        assert cache.get([a, b]) == {a: 3, b: 4}

    def test_base_cache_returns_copies(self, cache: Subject) -> None:
        """Changing a value that was returned changes nothing that is stored."""
        cache.set({KEY: ([1], None)})
        (cache.get([KEY]))[KEY].append(2)
        assert cache.get([KEY]) == {KEY: [1]}

    def test_base_cache_leaves_out_what_it_cannot_store(
        self, cache: Subject, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A value that cannot be encoded is logged; its neighbours are stored."""
        a, b = (("n",), "a"), (("n",), "b")
        cache.set({a: (lambda: 0, None), b: (1, None)})
        assert cache.get([a, b]) == {b: 1}
        assert "is not stored" in caplog.text

    # -- counting ---------------------------------------------------------------------------------

    def test_counts(self, cache: Subject) -> None:
        """Hits, misses and writes are counted."""
        cache.write(KEY, entry())
        cache.read([Lookup(KEY), Lookup((("n",), "other"))])
        cache.read([Lookup(KEY)])
        stats = cache.stats()
        assert (stats.hits, stats.misses, stats.writes) == (2, 1, 1)

    # -- the end ----------------------------------------------------------------------------------

    def test_closed(self, cache: Subject) -> None:
        """A closed cache answers everything with a miss, and may be closed again."""
        cache.write(KEY, entry())
        cache.close()
        assert cache.one() is None
        assert cache.read([Lookup(KEY)] * 3) == [None] * 3
        assert cache.write(KEY, entry()) is False
        assert cache.get([KEY]) == {}
        cache.set({KEY: (1, None)})
        if not cache.cache.shared:
            cache.clear()
            cache.clear([KEY[0]])
            cache.clear(OWNERS)
        assert cache.copy(OWNERS[0], OWNERS[1], {}) == 0
        assert (cache.stats()).entries == 0
        cache.close()


class BoundedConformance(CacheConformance):
    """Caches that know what they hold, and keep within bounds."""

    def test_knows_its_size(self, cache: Subject) -> None:
        """Entries and bytes follow what is stored."""
        before = cache.stats()
        for i in range(10):
            cache.write((("n",), str(i)), entry(b"x" * 20_000))
        stats = cache.stats()
        assert stats.entries == before.entries + 10
        assert stats.bytes >= before.bytes + 200_000
        cache.clear()
        after = cache.stats()
        assert after.entries == 0
        assert after.bytes < before.bytes + 50_000

    def test_sweeps_what_is_never_read(self, cache: Subject, clock: Clock) -> None:
        """Expired entries leave on later writes, without being read."""
        for i in range(50):
            cache.write((("n",), str(i)), entry(b"x" * 1000, expires=clock() + 10))
        cache.write((("n",), "keep"), entry(b"x" * 1000, expires=clock() + 1000))
        clock.advance(10)
        for i in range(20):
            cache.write((("m",), str(i)), entry())
        stats = cache.stats()
        assert stats.entries == 21

    def test_stats_do_not_count_the_expired(self, cache: Subject, clock: Clock) -> None:
        """Asking for the size sweeps first."""
        for i in range(1200):
            cache.write((("n",), str(i)), entry(expires=clock() + 10))
        clock.advance(10)
        assert (cache.stats()).entries == 0


class TagConformance(CacheConformance):
    """Caches with tag tokens."""

    def tagged(self, cache: Subject, *tags: str) -> tuple[tuple[str, str], ...]:
        """Dependencies as a caller takes them before it computes."""
        ids = [tag_id(tag) for tag in tags]
        return tuple(zip(ids, cache.tag_tokens(ids), strict=True))

    def test_tokens_last(self, cache: Subject) -> None:
        """A tag keeps its token; different tags have different ones; order is kept."""
        first = cache.tag_tokens(["a", "b", "a"])
        assert first[0] == first[2] != first[1]
        assert cache.tag_tokens(["b", "a"]) == (first[1], first[0])
        assert cache.tag_tokens([]) == ()

    def test_invalidate(self, cache: Subject) -> None:
        """What depended on the tag is a miss, what did not is still there."""
        one, both, none = (("n",), "1"), (("n",), "2"), (("n",), "3")
        cache.write(one, entry(b"1", deps=self.tagged(cache, "docs")))
        cache.write(both, entry(b"2", deps=self.tagged(cache, "docs", "user")))
        cache.write(none, entry(b"3"))
        found = cache.read([Lookup(one), Lookup(both, (tag_id("user"),)), Lookup(none)])
        assert [e.payload for e in found] == [b"1", b"2", b"3"]
        cache.invalidate("user")
        found = cache.read([Lookup(one), Lookup(both), Lookup(none)])
        assert [e and e.payload for e in found] == [b"1", None, b"3"]
        cache.invalidate("docs", "unknown")
        assert [e and e.payload for e in cache.read([Lookup(one), Lookup(none)])] == [
            None,
            b"3",
        ]
        assert (cache.stats()).invalidations == 3

    def test_invalidate_takes_all_it_is_given(self, cache: Subject) -> None:
        """However many tags are named, and in whatever order, none is left out."""
        keys = [(("n",), str(i)) for i in range(6)]
        for key in keys:
            cache.write(key, entry(deps=self.tagged(cache, key[1])))
        for gone, names in (("13", "31"), ("1345", "435")):
            cache.invalidate(*names)
            found = cache.read([Lookup(key) for key in keys])
            assert [e is None for e in found] == [name in gone for _, name in keys]
        many = [tag_id(f"many {i}") for i in range(1200)]
        before = cache.tag_tokens(many)
        cache.drop_tags(many)
        assert set(before).isdisjoint(cache.tag_tokens(many))

    def test_at_hand_is_what_is_valid(self, cache: Subject) -> None:
        """``read_now`` has nothing that an invalidation or a tag of the lookup excludes, and
        ``knows`` knows no token that is not current."""
        knows = cache.cache.knows
        assert not knows([(tag_id("docs"), "0" * 16)])
        for gone in ("docs", "user"):
            docs, user = deps = self.tagged(cache, "docs", "user")
            stored = entry(deps=deps)
            cache.write(KEY, stored)
            for tags in ((), (docs[0],), (docs[0], user[0])) * 2:
                assert cache.one(tags=tags) == stored
                assert cache.at_hand(tags=tags) in (None, stored)
            assert cache.at_hand(tags=(docs[0], tag_id("other"))) is None
            assert not knows([docs, (user[0], "0" * 16)])
            cache.invalidate(gone)
            assert cache.at_hand() is None
            assert not knows(deps)
            assert not knows([dep for dep in deps if dep[0] == tag_id(gone)])
            self.tagged(cache, gone)
            assert cache.at_hand() is None
            assert not knows(deps)

    def test_entries_keep_their_dependencies(self, cache: Subject) -> None:
        """``deps`` come back as they were given."""
        stored = entry(deps=self.tagged(cache, "a", "b"))
        cache.write(KEY, stored)
        assert cache.one() == stored
        assert cache.one() == stored

    def test_result_older_than_its_invalidation(self, cache: Subject) -> None:
        """A computation that began before an invalidation and ends after it is not served."""
        deps = self.tagged(cache, "docs")
        cache.invalidate("docs")
        cache.write(KEY, entry(deps=deps))
        assert cache.one() is None
        cache.write(KEY, entry(b"new", deps=self.tagged(cache, "docs")))
        assert (cache.one()).payload == b"new"

    def test_invalidating_an_unknown_tag(self, cache: Subject) -> None:
        """It is no error; entries stored later are served."""
        cache.invalidate("docs")
        cache.invalidate()
        cache.write(KEY, entry(deps=self.tagged(cache, "docs")))
        assert cache.one() is not None

    def test_lookup_that_needs_more_tags(self, cache: Subject) -> None:
        """An entry that does not know a tag it should depend on is a miss."""
        cache.write(KEY, entry(deps=self.tagged(cache, "docs")))
        assert cache.one(tags=(tag_id("docs"),)) is not None
        assert cache.one(tags=(tag_id("docs"), tag_id("user"))) is None
        cache.write(KEY, entry())
        assert cache.one(tags=(tag_id("docs"),)) is None

    def test_each_lookup_needs_its_own_tags(self, cache: Subject) -> None:
        """What one lookup of a batch must depend on, its neighbours need not."""
        keys = [(("n",), str(i)) for i in range(4)]
        for key in keys:
            cache.write(key, entry(deps=self.tagged(cache, "docs")))
        docs, user = (tag_id("docs"),), (tag_id("user"),)
        for needed in ([user, docs, (), user], [(), user, user, docs]):
            asked = [Lookup(key, tags) for key, tags in zip(keys, needed, strict=True)]
            assert [found is None for found in cache.read(asked)] == [n == user for n in needed]

    def test_tokens_are_made_once(self, cache: Subject) -> None:
        """Whoever asks first and at the same time gets the same tokens."""
        for i in range(20):
            tags = [tag_id(f"{i} {j}") for j in range(3)]
            answers = together([cache] * 4, "tag_tokens", tags)
            assert answers == [answers[0]] * 4

    def test_never_served_whatever_happens_meanwhile(self, tmp_path: Path, clock: Clock) -> None:
        """A result older than an invalidation is not served to those that look at that moment:
        tokens are compared after the entry was read, and nothing brings a dropped one back."""
        tag = tag_id("docs")
        served: list[Entry] = []
        with self.made(tmp_path, clock) as cache:

            def invalidated(turn: Callable[[], None]) -> None:
                for _ in range(100):
                    deps = ((tag, cache.tag_tokens([tag])[0]),)
                    cache.drop_tags([tag])
                    cache.write(KEY, entry(deps=deps))
                    turn()
                    found = [cache.read_now(Lookup(KEY)), *cache.read([Lookup(KEY)])]
                    served.extend(filter(None, found))

            def looks() -> None:
                lookup = Lookup(KEY, (tag,))
                found = [cache.read_now(lookup), *cache.read([lookup] * 50)]
                served.extend(filter(None, found))

            def asks() -> None:
                cache.tag_tokens([tag])

            meanwhile(invalidated, looks, asks)
        assert served == []

    def test_forged_token(self, cache: Subject) -> None:
        """A token that never was current serves nothing."""
        cache.tag_tokens([tag_id("docs")])
        cache.write(KEY, entry(deps=((tag_id("docs"), "0" * 16),)))
        assert cache.one() is None

    def test_copies_depend_on_what_they_are_told(self, cache: Subject) -> None:
        """In a copy the named dependencies are replaced and the others stay; what is invalid is
        not copied."""
        source, target = OWNERS[:2]
        thread, docs = self.tagged(cache, "thread 1", "docs")
        cache.write((source, "k"), entry(deps=(thread, docs)))
        (gone,) = self.tagged(cache, "gone")
        cache.write((source, "invalid"), entry(deps=(gone,)))
        cache.invalidate("gone")
        (new,) = self.tagged(cache, "thread 2")
        copied = cache.copy(source, target, {thread[0]: new})
        if not copied:
            return
        assert copied == 1
        assert cache.one((target, "invalid")) is None
        assert cache.one((target, "k")).deps == (new, docs)
        assert cache.one((source, "k")).deps == (thread, docs)
        cache.invalidate("thread 1")
        assert cache.one((source, "k")) is None
        assert cache.one((target, "k"), tags=(new[0], docs[0])) is not None
        cache.invalidate("docs")
        assert cache.one((target, "k")) is None

    def test_purges_what_is_never_served_again(self, cache: Subject, clock: Clock) -> None:
        """Of an owner's entries those go that expired or lost a tag; the others stay, as do those
        of other owners, and a backend that cannot purge leaves all of them."""
        owner, other, tag = (OWNED, "thread", "a"), (OWNED, "thread", "ab"), tag_id("run")
        (token,) = cache.tag_tokens([tag])
        cache.write((owner, "kept"), entry(b"kept"))
        cache.write((owner, "expired"), entry(expires=clock() + 1))
        cache.write((owner, "lost"), entry(deps=((tag, token),)))
        cache.write((other, "lost"), entry(deps=((tag, token),)))
        clock.advance(2)
        cache.drop_tags([tag])
        assert cache.purge(owner) in (0, 1, 2)  # some expire by themselves
        assert cache.purge(owner) == 0
        assert cache.one((owner, "kept")) is not None
        assert cache.one((owner, "lost")) is None
        assert cache.purge(KEY[0]) == 0

    def test_tokens_are_bounded(self, cache: Subject) -> None:
        """Thousands of tags at once are answered, and later asked tags keep their tokens."""
        many = [tag_id(str(i)) for i in range(2000)]
        assert len(set(cache.tag_tokens(many))) == len(many)
        (token,) = cache.tag_tokens([tag_id("late")])
        assert cache.tag_tokens([tag_id("late")]) == (token,)

    def test_clear_drops_the_tokens_of_its_namespaces(self, cache: Subject) -> None:
        """Copies kept elsewhere depend on them."""
        tags = [namespace_tag(("a",)), namespace_tag(("a", "b"))]
        a, b = cache.tag_tokens(tags)
        cache.clear([("a",)])
        new_a, same_b = cache.tag_tokens(tags)
        assert new_a != a
        assert same_b == b
        cache.clear()
        assert set(cache.tag_tokens(tags)).isdisjoint({a, b, new_a})

    def test_closed_tags(self, cache: Subject) -> None:
        """A closed cache has no tags, and does not fail for it."""
        cache.close()
        assert len(cache.tag_tokens(["a", "b"])) == 2
        if not cache.cache.shared:
            cache.invalidate("a")

    def test_tags_must_be_names(self, cache: Subject) -> None:
        """``invalidate`` names what it was given when it is no tag."""
        with pytest.raises(TypeError, match="42"):
            cache.invalidate(42)


class LeaseConformance(CacheConformance):
    """Caches that other processes share."""

    def test_one_holder(self, cache: Subject) -> None:
        """A key has one holder; other keys are free."""
        lease = cache.acquire(KEY)
        assert isinstance(lease, Lease)
        assert lease.key == KEY
        assert cache.acquire(KEY) is None
        assert cache.acquire((("n",), "other")) is not None
        cache.release(lease)
        assert cache.acquire(KEY) is not None

    def test_one_of_many_gets_it(self, cache: Subject) -> None:
        """Of those who ask at the same time one gets the lease."""
        for i in range(20):
            leases = together([cache] * 4, "acquire", (("n",), str(i)))
            assert len([lease for lease in leases if lease is not None]) == 1

    def test_lease_expires(self, cache: Subject, clock: Clock) -> None:
        """A holder that does not renew is replaced after ``lease_seconds``, and not before."""
        seconds = cache.cache.lease_seconds
        first = cache.acquire(KEY)
        assert first.expires == clock() + seconds
        clock.advance(seconds - self.tolerance)
        assert cache.acquire(KEY) is None
        clock.advance(self.tolerance)
        assert (cache.acquire(KEY)).token != first.token

    def test_lease_renews(self, cache: Subject, clock: Clock) -> None:
        """A renewed lease lasts ``lease_seconds`` from now; a lost one cannot be renewed."""
        seconds = cache.cache.lease_seconds
        left = max(1.0, self.tolerance)
        lease = cache.acquire(KEY)
        clock.advance(seconds - left)
        lease = cache.renew(lease)
        assert lease.expires == clock() + seconds
        clock.advance(seconds - left)
        assert cache.acquire(KEY) is None
        clock.advance(left)
        assert cache.renew(lease) is None
        new = cache.acquire(KEY)
        assert cache.renew(lease) is None
        assert cache.renew(new) is not None

    def test_lease_given_back_is_not_renewed(self, cache: Subject) -> None:
        """Whoever gave a lease back, or stored with it, takes nothing by renewing it."""
        lease = cache.acquire(KEY)
        cache.release(lease)
        assert cache.renew(lease) is None
        new = cache.acquire(KEY)
        assert new is not None
        assert cache.write(KEY, entry(), new) is True
        assert cache.renew(lease) is cache.renew(new) is None
        assert cache.acquire(KEY) is not None

    def test_many_leases_renew(self, cache: Subject, clock: Clock) -> None:
        """``renew_many`` answers for each lease what ``renew`` does, in order, and does it."""
        seconds = cache.cache.lease_seconds
        keys = [(("n",), str(i)) for i in range(6)]
        lost = cache.acquire(keys[1])
        clock.advance(seconds)
        leases = [cache.acquire(key) for key in keys]
        taken = leases[1]
        leases[1] = lost
        cache.release(leases[3])
        clock.advance(seconds * 0.75)
        renewed: list[Any] = cache.cache.renew_many(leases)
        assert [lease and lease.key for lease in renewed] == [
            None if i in (1, 3) else key for i, key in enumerate(keys)
        ]
        assert {lease.expires for lease in renewed if lease} == {clock() + seconds}
        assert cache.renew(taken) is not None
        assert cache.cache.renew_many([]) == []
        clock.advance(seconds * 0.75)
        assert [cache.acquire(key) is None for key in keys] == [i != 3 for i in range(6)]
        assert cache.write(keys[5], entry(), renewed[5]) is True
        clock.advance(seconds)
        assert cache.acquire(keys[4]) is not None
        assert cache.cache.renew_many([leases[4], leases[5]]) == [None, None]

    def test_late_release(self, cache: Subject, clock: Clock) -> None:
        """Giving back a lease that was lost leaves its new holder alone."""
        old = cache.acquire(KEY)
        clock.advance(cache.cache.lease_seconds)
        new = cache.acquire(KEY)
        cache.release(old)
        assert cache.acquire(KEY) is None
        cache.release(new)
        cache.release(new)
        assert cache.acquire(KEY) is not None

    def test_fence(self, cache: Subject, clock: Clock) -> None:
        """A write with a lease that expired, was taken or was given back stores nothing."""
        old = cache.acquire(KEY)
        clock.advance(cache.cache.lease_seconds)
        assert cache.write(KEY, entry(b"expired"), old) is False
        new = cache.acquire(KEY)
        assert cache.write(KEY, entry(b"taken"), old) is False
        assert cache.one() is None
        assert cache.write(KEY, entry(b"new"), new) is True
        assert cache.write(KEY, entry(b"again"), new) is False
        assert (cache.one()).payload == b"new"

    def test_fence_is_per_key(self, cache: Subject) -> None:
        """The lease of one key does not open another."""
        lease = cache.acquire((("n",), "other"))
        assert cache.write(KEY, entry(), lease) is False
        assert cache.one() is None

    def test_write_gives_the_lease_back(self, cache: Subject) -> None:
        """A stored result frees its key at once."""
        lease = cache.acquire(KEY)
        assert cache.write(KEY, entry(), lease) is True
        assert cache.acquire(KEY) is not None

    def test_write_without_lease(self, cache: Subject) -> None:
        """Whoever has no lease may store, and supersedes the holder, whose result is older."""
        lease = cache.acquire(KEY)
        assert cache.write(KEY, entry(b"newer")) is True
        assert cache.write(KEY, entry(b"older"), lease) is False
        assert (cache.one()).payload == b"newer"

    def test_one_of_many_stores_with_it(self, cache: Subject) -> None:
        """Of those who bring a result with the same lease at the same time one stores it."""
        for i in range(20):
            key = (("n",), str(i))
            lease = cache.acquire(key)
            stored = together([cache] * 4, "write", key, entry(), lease)
            assert sorted(stored) == [False, False, False, True]

    def test_newer_result_stays(self, cache: Subject) -> None:
        """A holder stores nothing over what came without a lease, not even at the same time."""
        self.compete(cache, cache)

    def compete(self, cache: Subject, other: Subject) -> None:
        """Store with a lease here and without one there, at the same time."""
        if cache.cache.layered:
            return  # each layer has the one or the other
        for i in range(20):
            key = (("n",), str(i))
            older = [(cache, "write", key, entry(b"older"), cache.acquire(key))]
            newer = [(other, "write", key, entry(b"newer"))]
            at_once(*((older, newer) if i % 2 else (newer, older)))
            assert cache.one(key).payload == other.one(key).payload == b"newer"

    def test_successors_are_left_alone(self, cache: Subject) -> None:
        """Once a lease is given back, nothing that is done with it meanwhile, be it at the same
        time, takes the key from its next holder."""
        self.succeed(cache, cache)

    def succeed(self, cache: Subject, other: Subject) -> None:
        """Give leases back here while they are used there, and see what successors have."""
        for i in range(24):
            key = (("n",), str(i))
            lease = cache.acquire(key)
            given = (cache, "write", key, entry(), lease) if i % 2 else (cache, "release", lease)
            used = (
                (other, "renew", lease),
                (other, "release", lease),
                (other, "write", key, entry(), lease),
            )[i // 2 % 3]
            turns = [given, (cache, "acquire", key)], [used]
            new = at_once(*turns)[0][1] if i < 12 else at_once(*turns[::-1])[1][1]
            assert new is not None
            assert other.acquire(key) is None
            assert cache.write(key, entry(), new) is True

    def test_leases_outlast_clear(self, cache: Subject) -> None:
        """Clearing entries does not let a second holder in."""
        cache.acquire(KEY)
        cache.clear()
        assert cache.acquire(KEY) is None

    def test_closed_leases(self, cache: Subject) -> None:
        """A closed cache keeps nobody waiting."""
        lease = cache.acquire(KEY)
        cache.close()
        assert cache.acquire(KEY) is not None
        assert cache.renew(lease) is None
        assert cache.cache.renew_many([lease]) == [None]
        cache.release(lease)
        assert cache.write(KEY, entry(), lease) is False


class SharedConformance(LeaseConformance, TagConformance):
    """Caches that several processes use: a second one, opened in the same place, sees the same."""

    @pytest.fixture
    def other(self, cache: Subject, loop: Any, tmp_path: Path, clock: Clock) -> Iterator[Subject]:
        with self.made(tmp_path, clock) as other:
            yield Subject(other, loop)

    @pytest.fixture
    def elsewhere(
        self, cache: Subject, loop: Any, tmp_path: Path, clock: Clock
    ) -> Iterator[Subject]:
        # one name begins with the other: a backend must still tell the two places apart
        directory = tmp_path.with_name(f"{tmp_path.name}x")
        directory.mkdir()
        with self.made(directory, clock) as elsewhere:
            yield Subject(elsewhere, loop)

    def test_entries_are_shared(self, cache: Subject, other: Subject) -> None:
        """What one stores the other serves."""
        stored = entry(deps=self.tagged(cache, "docs"))
        cache.write(KEY, stored)
        assert other.one(tags=(tag_id("docs"),)) == stored

    def test_tokens_are_shared(self, cache: Subject, other: Subject) -> None:
        """A tag has one token, whoever asks."""
        assert cache.tag_tokens(["a", "b"]) == other.tag_tokens(["a", "b"])

    def test_invalidations_are_shared(self, cache: Subject, other: Subject) -> None:
        """Once an invalidation has returned, the next lookup elsewhere is a miss, every time."""
        for i in range(10):
            cache.write(KEY, entry(str(i).encode(), deps=self.tagged(cache, "docs")))
            assert other.one().payload == other.one().payload == str(i).encode()
            cache.invalidate("docs")
            assert other.at_hand() is None
            assert other.one() is None

    def test_clears_are_shared(self, cache: Subject, other: Subject) -> None:
        """Once a ``clear`` has returned, the next lookup elsewhere is a miss, every time."""
        for namespaces in (None, [KEY[0]]) * 3:
            cache.write(KEY, entry())
            assert other.one() is not None
            assert other.one() is not None
            cache.clear(namespaces)
            assert other.at_hand() is None
            assert other.one() is None

    def test_places_do_not_meet(self, cache: Subject, elsewhere: Subject) -> None:
        """What is opened in another place sees nothing of what is here, and loses nothing when it
        is invalidated, cleared or closed."""
        keys = [KEY, (OWNERS[0], "k")]
        free = (("n",), "free")

        def there() -> list[bytes | None]:
            return [e and e.payload for e in elsewhere.read([Lookup(key) for key in keys])]

        for key in keys:
            cache.write(key, entry(b"here", deps=self.tagged(cache, "docs")))
        assert there() == [None, None]
        for key in keys:
            elsewhere.write(key, entry(b"there", deps=self.tagged(elsewhere, "docs")))
        assert [e.payload for e in cache.read([Lookup(key) for key in keys])] == [b"here"] * 2
        assert cache.acquire(free) is not None
        lease = elsewhere.acquire(free)
        assert lease is not None
        cache.invalidate("docs")
        assert there() == [b"there"] * 2
        for namespaces in ([KEY[0], OWNERS[0]], None):
            cache.clear(namespaces)
            assert there() == [b"there"] * 2
        cache.close()
        assert there() == [b"there"] * 2
        assert elsewhere.acquire(free) is None
        assert elsewhere.write(free, entry(), lease) is True

    def test_results_older_than_anothers_invalidation(self, cache: Subject, other: Subject) -> None:
        """What was begun before an invalidation elsewhere and stored after it is not served."""
        deps = self.tagged(cache, "docs")
        other.invalidate("docs")
        cache.write(KEY, entry(deps=deps))
        assert cache.one() is None
        assert other.one() is None

    def test_leases_are_shared(self, cache: Subject, other: Subject) -> None:
        """What one holds the other waits for, and a late result is refused whoever brings it."""
        lease = cache.acquire(KEY)
        assert other.acquire(KEY) is None
        assert cache.write(KEY, entry(), lease) is True
        new = other.acquire(KEY)
        assert new is not None
        assert cache.write(KEY, entry(b"late"), lease) is False
        assert other.one().payload == b"value"

    def test_owners_are_shared(self, cache: Subject, other: Subject) -> None:
        """What one stores, copies and clears for an owner, the other sees at once."""
        source, target = OWNERS[:2]
        for i in range(3):
            stored = entry(str(i).encode(), deps=self.tagged(cache, "docs"))
            cache.write((source, "k"), stored)
            assert other.one((source, "k")) == other.one((source, "k")) == stored
            if cache.copy(source, target, {}):
                assert other.one((target, "k")) == other.one((target, "k")) == stored
            other.clear([source])
            assert cache.one((source, "k")) is other.one((source, "k")) is None
            cache.clear([target])
            assert other.one((target, "k")) is None

    def test_leases_of_owners(self, cache: Subject, other: Subject) -> None:
        """The leases of what belongs to an owner hold, fence and outlast a ``clear``."""
        key = (OWNERS[0], "k")
        lease = cache.acquire(key)
        assert other.acquire(key) is None
        assert other.acquire((OWNERS[1], "k")) is not None
        assert cache.renew(lease) is not None
        cache.clear([OWNERS[0]])
        assert other.acquire(key) is None
        assert cache.write(key, entry(), lease) is True
        new = other.acquire(key)
        assert cache.write(key, entry(b"late"), lease) is False
        cache.release(lease)
        assert cache.acquire(key) is None
        other.release(new)
        assert cache.acquire(key) is not None
        assert other.one(key).payload == b"value"

    def test_one_of_both_gets_it(self, cache: Subject, other: Subject) -> None:
        """Of those who ask here and there at the same time one gets the lease."""
        for i in range(20):
            leases = together([cache, other] * 2, "acquire", (("n",), str(i)))
            assert len([lease for lease in leases if lease is not None]) == 1

    def test_newer_result_stays_for_both(self, cache: Subject, other: Subject) -> None:
        """A holder here stores nothing over what came without a lease there."""
        self.compete(cache, other)

    def test_successors_of_both_are_left_alone(self, cache: Subject, other: Subject) -> None:
        """What is done there with a lease given back here takes nothing from its next holder."""
        self.succeed(cache, other)

    def test_closed_caches_do_not_pretend(self, cache: Subject, other: Subject) -> None:
        """A closed cache cannot tell the others: ``invalidate`` and ``clear`` say so."""
        cache.write(KEY, entry(deps=self.tagged(cache, "docs")))
        cache.close()
        for operation, argument in (
            ("invalidate", "docs"),
            ("drop_tags", [tag_id("docs")]),
            ("clear", None),
            ("clear", [KEY[0]]),
            ("clear", OWNERS),
        ):
            with pytest.raises(CacheClosed, match="closed"):
                getattr(cache, operation)(argument)
        assert other.one() is not None

    def test_pausing_ends(self, cache: Subject, other: Subject) -> None:
        """Waiting for a holder ends when the lease is free, and in time when it is not."""
        lease = cache.acquire(KEY)
        other.pause(KEY, 0.01)
        cache.release(lease)
        other.pause(KEY, 0.01)


class DamageConformance(CacheConformance):
    """Caches whose stored bytes somebody else can reach."""

    def damage(self, directory: Path, how: str) -> None:
        """Change every stored entry: ``"flip"`` a bit in its middle, ``"truncate"`` it, ``"swap"``
        it with another one, or put ``"other"`` bytes there."""
        raise NotImplementedError(f"{type(self).__name__} must define damage(self, directory, how)")

    @pytest.mark.parametrize("how", ["flip", "truncate", "swap", "other"])
    def test_damaged_entries_are_misses(self, cache: Subject, tmp_path: Path, how: str) -> None:
        """Whatever became of the bytes, they are never served, and counted."""
        a, b = (("n",), "a"), (("n",), "b")
        cache.set({a: ("a" * 100, None), b: ("b" * 100, None)})
        self.damage(tmp_path, how)
        assert cache.get([a, b]) == {}
        assert cache.stats().damaged == 2

    def test_damaged_entries_are_replaced(self, cache: Subject, tmp_path: Path) -> None:
        """What is damaged is stored anew."""
        cache.set({KEY: ("a" * 100, None)})
        self.damage(tmp_path, "flip")
        cache.set({KEY: ("new", None)})
        assert cache.get([KEY]) == {KEY: "new"}
