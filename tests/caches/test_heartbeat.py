"""Leases of running nodes are renewed in time, whatever other backends and leases there are."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from langgraph.graph import START
from typing_extensions import TypedDict

from langgraph_perf import (
    CachePolicy,
    DiskCache,
    MemoryCache,
    RedisCache,
    StateGraph,
    _heartbeat,
)
from langgraph_perf._flight import held_flights
from langgraph_perf.caches.base import Cache, Lease
from tests.conftest import Clock, Threads
from tests.redis_server import Server, new_prefix
from tests.test_single_flight import auntil, until


def some_lease(name: str) -> Lease:
    return Lease((("n",), name), name, 0.0)


class Renewing(MemoryCache):
    """Says when a lease was renewed; fails, or hangs, as often as told."""

    lease_seconds = 0.1

    def __init__(self, fails: int = 0, hangs: threading.Event | None = None) -> None:
        super().__init__()
        self.fails, self.hangs = fails, hangs
        self.asked, self.renewed = threading.Event(), threading.Event()

    def renew(self, lease: Lease) -> Lease | None:
        self.asked.set()
        if self.hangs is not None:
            self.hangs.wait()
        if self.fails:
            self.fails -= 1
            raise ConnectionError("away")
        self.renewed.set()
        return lease._replace(expires=lease.expires + 1)


def test_a_backend_that_hangs_keeps_no_other_one_waiting() -> None:
    """While the renewal of one cache's lease hangs, another cache's leases are renewed."""
    end = threading.Event()
    hanging, healthy = Renewing(hangs=end), Renewing()
    first, second = some_lease("hanging"), some_lease("healthy")
    try:
        _heartbeat.keep(hanging, first)
        assert hanging.asked.wait(10)
        _heartbeat.keep(healthy, second)
        assert healthy.renewed.wait(10)
    finally:
        end.set()
        _heartbeat.drop(first)
        _heartbeat.drop(second)


def test_a_renewal_that_failed_is_repeated() -> None:
    """A backend that is away for a moment costs no lease."""
    cache, lease = Renewing(fails=3), some_lease("repeated")
    _heartbeat.keep(cache, lease)
    assert cache.renewed.wait(10)
    _heartbeat.drop(lease)


def test_without_a_thread_leases_are_kept_by_the_next_one(threads: Threads) -> None:
    """A machine that gives no thread loses renewals, not runs, and only for as long as it does."""
    cache, first, second = Renewing(), some_lease("unkept"), some_lease("kept")
    renewed: list[str] = []
    renew_many = cache.renew_many

    def noted(leases: Sequence[Lease]) -> Any:
        renewed.extend(lease.token for lease in leases)
        return renew_many(leases)

    cache.renew_many = noted  # type: ignore[method-assign]
    threads.allowed = False
    _heartbeat.keep(cache, first)
    threads.allowed = True
    _heartbeat.keep(cache, second)
    until(lambda: {"unkept", "kept"} <= set(renewed))
    _heartbeat.drop(first)
    _heartbeat.drop(second)


def test_leases_are_dropped_wherever_the_garbage_collector_runs() -> None:
    """It may end a run in a thread that is just having a lease kept, or is about to."""
    cache = Renewing()
    leases = [some_lease(f"collected {i}") for i in range(3)]
    kept = some_lease("kept")
    for lease in leases[:2]:
        _heartbeat.keep(cache, lease)
    keeper = _heartbeat._keepers[cache]

    class Collected:
        def __init__(self, lease: Lease) -> None:
            self.lease = lease

        def __del__(self) -> None:
            _heartbeat.drop(self.lease)

    def work() -> None:
        circle: Any = Collected(leases[0])
        with _heartbeat._lock:
            del circle
        circle = Collected(leases[1])
        with keeper._starting:
            del circle
        _heartbeat.keep(cache, kept)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    until(lambda: set(keeper._held) == {"kept"})
    _heartbeat.drop(kept)
    until(lambda: not keeper._held)
    until(lambda: keeper._thread is None)


def test_what_is_kept_while_the_thread_ends_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread looks once more after it has said that it ends."""
    cache, first, second = Renewing(), some_lease("before the end"), some_lease("at the end")
    _heartbeat.keep(cache, first)
    keeper = _heartbeat._keepers[cache]
    hear = keeper._hear

    def late(seconds: float) -> bool:
        heard = hear(seconds)
        if not heard and not keeper._held and second.token not in _heartbeat._keeper_of:
            _heartbeat.keep(cache, second)
        return heard

    monkeypatch.setattr(keeper, "_hear", late)
    _heartbeat.drop(first)
    until(lambda: "at the end" in keeper._held)
    cache.renewed.clear()
    assert cache.renewed.wait(20)
    _heartbeat.drop(second)


def test_a_run_that_gets_no_thread_is_a_run(redis_server: Server, threads: Threads) -> None:
    """Its lease is not renewed; nothing else is different, and nothing of it is left."""

    def node(state: State) -> State:
        return {"answer": state["query"]}

    with RedisCache(redis_server.url, prefix=new_prefix()) as cache:
        builder: Any = StateGraph(State)
        builder.add_node("node", node, cache_policy=CachePolicy(version=1))
        graph = builder.add_edge(START, "node").compile(cache=cache)
        threads.allowed = False
        for query in ("a", "b"):
            assert graph.invoke({"query": query})["answer"] == query
        assert not held_flights.get()
        # leases of other tests may be dropped meanwhile
        assert _heartbeat._keepers[cache] not in list(_heartbeat._keeper_of.values())
        assert graph.perf.stats().failures == {}


def renewals(cache: RedisCache) -> tuple[list[int], list[int], threading.Event]:
    """How many leases are renewed at a time, how many round trips there were by then, and what is
    set after a few times."""
    sizes: list[int] = []
    trips: list[int] = []
    enough, renew_many = threading.Event(), cache.renew_many

    def noted(leases: Sequence[Lease]) -> Any:
        renewed = renew_many(leases)
        assert None not in renewed
        trips.append(cache.round_trips)
        sizes.append(len(leases))
        if len(sizes) == 3:
            enough.set()
        return renewed

    cache.renew_many = noted  # type: ignore[method-assign]
    return sizes, trips, enough


def test_many_leases_are_renewed_together(
    redis_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many nodes run, their leases cost a round trip a beat, and none is lost."""
    # they beat as leases of three seconds do, and last as long as a busy machine may need
    monkeypatch.setattr(RedisCache, "_lease_ms", 100_000)
    with RedisCache(redis_server.url, prefix=new_prefix(), lease_seconds=3.0) as cache:
        leases = [cache.acquire((("n",), str(i))) for i in range(200)]
        assert None not in leases
        sizes, trips, enough = renewals(cache)
        before = cache.round_trips
        with monkeypatch.context() as patch:
            now = time.monotonic()  # all at once, however long it takes
            patch.setattr(_heartbeat, "time", SimpleNamespace(monotonic=lambda: now))
            for lease in leases:
                assert lease is not None
                _heartbeat.keep(cache, lease)
        assert enough.wait(20)
        for lease in leases:
            assert lease is not None
            _heartbeat.drop(lease)
        assert sizes[:3] == [200] * 3
        assert trips[2] - before <= 5
        assert cache.acquire((("n",), "7")) is None


class State(TypedDict, total=False):
    query: str
    answer: str


class Beating:
    """What the heartbeat takes for a cache: it beats often, however long its leases last.

    Attributes:
        beats: how often leases were renewed.
    """

    lease_seconds = 0.3

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self.beats = 0

    def renew_many(self, leases: Sequence[Lease]) -> Any:
        renewed = self._cache.renew_many(leases)
        self.beats += 1
        return renewed


LEASE_SECONDS = 100.0


@pytest.fixture(params=["disk", "redis"])
def both(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> Any:
    """Two caches in one place, as two processes have them, and what lets time pass there."""
    made: list[Cache]
    age = clock.advance
    if request.param == "disk":
        made = [
            DiskCache(tmp_path / "cache", lease_seconds=LEASE_SECONDS, clock=clock)
            for _ in range(2)
        ]
    else:
        server, prefix = request.getfixturevalue("redis_server"), new_prefix()
        made = [
            RedisCache(server.url, prefix=prefix, lease_seconds=LEASE_SECONDS, clock=clock)
            for _ in range(2)
        ]

        def age(seconds: float) -> None:
            clock.advance(seconds)
            server.age(prefix, seconds)

    with ExitStack() as stack:
        yield [stack.enter_context(cache) for cache in made], age


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_node_may_run_for_longer_than_its_lease(
    both: tuple[list[Cache], Callable[[float], None]], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it runs nobody else does, and its late result is stored and answers who waited."""
    (first, second), age = both
    begun: list[float] = []
    looks: list[Lease | None] = []
    end = threading.Event()
    beating, keep, acquire = Beating(first), _heartbeat.keep, type(second).acquire

    def keep_beating(cache: Cache, lease: Lease, seconds: float = math.inf) -> None:
        keep(cast("Cache", beating) if cache is first else cache, lease, seconds)

    def look(key: Any) -> Lease | None:
        looks.append(acquire(second, key))
        return looks[-1]

    async def alook(key: Any) -> Lease | None:
        looks.append(await type(second).aacquire(second, key))
        return looks[-1]

    monkeypatch.setattr(_heartbeat, "keep", keep_beating)
    if mode == "sync":
        monkeypatch.setattr(second, "acquire", look)
    else:
        monkeypatch.setattr(second, "aacquire", alook)

    def node(state: State) -> State:
        begun.append(time.monotonic())
        assert end.wait(100)
        return {"answer": "done"}

    async def anode(state: State) -> State:
        begun.append(time.monotonic())
        await auntil(end.is_set, 100)
        return {"answer": "done"}

    def ask(cache: Cache) -> Any:
        builder: Any = StateGraph(State)
        policy = CachePolicy(version=1)
        builder.add_node("node", node if mode == "sync" else anode, cache_policy=policy)
        graph = builder.add_edge(START, "node").compile(cache=cache)
        query = {"query": "q"}
        return graph.invoke(query) if mode == "sync" else asyncio.run(graph.ainvoke(query))

    with ThreadPoolExecutor(2) as pool:
        try:
            leader = pool.submit(ask, first)
            until(lambda: len(begun) == 1)
            follower = pool.submit(ask, second)
            for _ in range(3):  # more than two lives of a lease
                beats, seen = beating.beats, len(looks)
                # the first of two may have begun before, and the time have been set back
                until(lambda beats=beats: beating.beats >= beats + 2)  # type: ignore[misc]
                age(0.8 * LEASE_SECONDS)
                until(lambda seen=seen: len(looks) > seen)  # type: ignore[misc]
        finally:
            end.set()
        assert leader.result(60)["answer"] == follower.result(60)["answer"] == "done"
    assert len(begun) == 1
    assert looks.count(None) == len(looks)
