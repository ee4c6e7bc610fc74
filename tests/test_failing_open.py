"""The cache fails open (S2): whatever happens to a backend, every run ends well."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from langgraph.cache.memory import InMemoryCache
from langgraph.graph import START
from typing_extensions import TypedDict

from langgraph_perf import CachePolicy, DiskCache, MemoryCache, StateGraph, TieredCache
from langgraph_perf._backend import Backend
from langgraph_perf._breaker import FAILURES_TO_OPEN, FIRST_PAUSE, LONGEST_PAUSE, QUIET, Breaker
from langgraph_perf._patience import Patience
from langgraph_perf._within import within
from langgraph_perf.caches.base import Lease, Lookup
from langgraph_perf.caches.foreign import ForeignCache
from tests.conftest import Clock, told


class State(TypedDict, total=False):
    query: str
    answer: str


def done(state: State) -> State:
    return {"answer": "done"}


def about(state: State) -> State:
    return {"answer": f"about {state['query']}"}


def build(cache: Any, node: Any = done, **policy: Any) -> Any:
    builder = StateGraph(State)
    builder.add_node("node", node, cache_policy=CachePolicy(version=1, **policy))
    return builder.add_edge(START, "node").compile(cache=cache)


class Flaky(MemoryCache):
    """A cache whose operations fail while ``broken`` names them; counts what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.broken: set[str] = set()
        self.asked: list[str] = []

    def _maybe(self, name: str) -> None:
        self.asked.append(name)
        if name in self.broken:
            raise OSError(f"{name} is broken")

    def read(self, lookups: Any) -> Any:
        self._maybe("read")
        return super().read(lookups)

    def write(self, *args: Any) -> bool:
        self._maybe("write")
        return super().write(*args)

    def acquire(self, key: Any) -> Any:
        self._maybe("lease")
        return Lease(key, "token", self.clock() + 10)

    def tag_tokens(self, tags: Any) -> Any:
        self._maybe("tags")
        return super().tag_tokens(tags)


@pytest.mark.parametrize("broken", ["read", "write", "tags"])
async def test_a_failing_operation_costs_only_the_hit(
    broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Each kind of failure is counted and logged once, and no run fails."""
    cache = Flaky()
    cache.__dict__["_backend"] = Backend(cache, Clock())  # no pause is over before the end
    cache.broken = {broken}
    graph = build(cache, tags=["docs"])
    for i in range(4):
        assert graph.invoke({"query": str(i)})["answer"] == "done"
        assert (await graph.ainvoke({"query": str(i)}))["answer"] == "done"
    stats = graph.perf.stats()
    assert stats.failures[f"{broken}: OSError"] == FAILURES_TO_OPEN
    assert caplog.text.count("is broken") == 1


def test_each_outage_and_its_end_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Every outage is one warning, however often it is met, and its end one line of information."""
    cache, clock = Flaky(), Clock()
    backend = Backend(cache, clock)
    lookup = Lookup((("n",), "k"))
    caplog.set_level(logging.INFO, "langgraph_perf")
    for outage in range(1, 4):
        cache.broken = {"read"}
        for _ in range(FAILURES_TO_OPEN + 2):
            backend.read(lookup)
        clock.advance(FIRST_PAUSE)
        backend.read(lookup)  # still away
        cache.broken = set()
        clock.advance(LONGEST_PAUSE)
        for _ in range(3):
            backend.read(lookup)
        levels = [record.levelname for record in told(caplog)]
        assert levels == ["WARNING", "INFO"] * outage
    assert told(caplog)[-1].getMessage() == "read of Flaky works again"


def test_a_failing_tag_store_never_serves_what_it_cannot_check() -> None:
    """A result whose tags have no tokens is not stored."""
    cache = Flaky()
    cache.broken = {"tags"}
    graph = build(cache, tags=["docs"])
    graph.invoke({"query": "q"})
    assert graph.perf.stats().nodes["node"].refusals == {"tags_unavailable": 1}
    assert cache.stats().entries == 0


def test_the_breaker_stops_asking_and_finds_out_when_to_ask_again(clock: Clock) -> None:
    """After some failures in a row nothing is asked for a while; then one operation probes."""
    breaker = Breaker(clock)
    for _ in range(FAILURES_TO_OPEN):
        assert breaker.allows()
        breaker.failed()
    assert breaker.is_open
    assert not breaker.allows()
    clock.advance(FIRST_PAUSE)
    assert breaker.allows()  # the probe
    assert not breaker.allows()
    breaker.failed()
    clock.advance(FIRST_PAUSE)
    assert not breaker.allows()  # the second pause is longer
    clock.advance(FIRST_PAUSE)
    assert breaker.allows()
    breaker.succeeded()
    assert not breaker.is_open
    assert breaker.allows()


def test_a_probe_that_never_reports_back_does_not_close_the_door(clock: Clock) -> None:
    """If the probing call is cancelled, another one may probe later."""
    breaker = Breaker(clock)
    for _ in range(FAILURES_TO_OPEN):
        breaker.failed()
    clock.advance(FIRST_PAUSE)
    assert breaker.allows()
    clock.advance(60)
    assert breaker.allows()


def test_single_success_between_failures_keeps_it_closed(clock: Clock) -> None:
    """Only failures in a row open the breaker."""
    breaker = Breaker(clock)
    for _ in range(10):
        breaker.failed()
        breaker.succeeded()
    assert not breaker.is_open


def test_a_failure_of_long_ago_hides_no_outage(clock: Clock) -> None:
    """Single failures are logged, but not again and again; an outage is, whatever came before."""
    breaker = Breaker(clock)
    told = [breaker.failed("cut"), breaker.succeeded(), breaker.failed("cut"), breaker.succeeded()]
    assert told == [True, False, False, False]
    assert [breaker.failed("cut") for _ in range(FAILURES_TO_OPEN)] == [False, False, True]
    assert not breaker.failed("cut")
    assert breaker.failed("refused")
    assert breaker.succeeded()
    clock.advance(QUIET)
    assert breaker.failed("cut")


def test_each_kind_of_operation_has_its_own_breaker(clock: Clock) -> None:
    """Reads that go well keep nobody trying what fails each time, with tiers in between or not."""
    for tiers in (False, True):
        cache = Flaky()
        cache.shared = True
        cache.broken = {"write", "lease"}
        used = TieredCache(MemoryCache(), cache) if tiers else cache
        for guarded in (Backend.of(used), *(used._tiers if isinstance(used, TieredCache) else ())):
            for breaker in guarded.breakers:
                breaker._clock = clock  # no pause is over before the end
        graph = build(used)
        for i in range(50):
            graph.invoke({"query": str(i)})
        asked = Counter(cache.asked)
        assert asked["read"] >= 50
        assert asked["write"] == FAILURES_TO_OPEN, (tiers, asked)
        assert asked["lease"] == FAILURES_TO_OPEN, (tiers, asked)


def test_a_run_loses_no_more_to_a_slow_cache(clock: Clock) -> None:
    """Once slow operations have taken a run's deadline, its next nodes run without the cache."""

    class Slow(MemoryCache):
        blocking = True
        timeout = 1.0

        def peek(self, lookups: Any) -> Any:
            clock.advance(0.2)
            return super().peek(lookups)

    builder = StateGraph(State)
    last = START
    for i in range(10):
        builder.add_node(
            str(i), lambda state: {"answer": "done"}, cache_policy=CachePolicy(version=1)
        )
        builder.add_edge(last, str(i))
        last = str(i)
    with Slow(clock=clock) as cache:
        graph = builder.compile(cache=cache)
        for turn in range(2):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("langgraph_perf._binding.Patience", partial(Patience, clock))
                started = clock()
                graph.invoke({"query": "q"})
            assert clock() - started <= 1.0
            refused = sum(
                n.refusals.get("slow_cache", 0) for n in graph.perf.stats().nodes.values()
            )
            assert refused > 0, turn
        assert not any(breaker.is_open for breaker in Backend.of(cache).breakers)


def test_what_a_run_lost_it_regains(clock: Clock) -> None:
    """What overlaps counts once, what is quick not at all, and what was long ago less and less."""
    patience = Patience(clock)
    patience.spend(0.0, 0.09)
    assert not patience.is_over(0.0)
    start = clock()
    for _ in range(50):  # as many nodes at once
        patience.spend(start, start + 0.4)
    clock.advance(0.4)
    assert not patience.is_over(1.0)
    patience.spend(start + 0.3, start + 0.8)
    clock.advance(0.4)
    assert patience.is_over(1.0)
    clock.advance(60)
    assert not patience.is_over(1.0)


def test_a_backend_that_comes_back_is_used_again(clock: Clock) -> None:
    """Reads recover by themselves once the backend does, and writes never stopped."""
    cache = Flaky()
    cache.__dict__["_backend"] = Backend(cache, clock)
    cache.broken = {"read"}
    graph = build(cache)
    for i in range(5):
        graph.invoke({"query": str(i)})
    asked = cache.asked.count("read")
    assert asked == FAILURES_TO_OPEN
    cache.broken = set()
    clock.advance(FIRST_PAUSE)
    graph.invoke({"query": "0"})
    graph.invoke({"query": "0"})
    assert graph.perf.stats().nodes["node"].hits >= 1


class Hanging(InMemoryCache[Any]):
    """A backend that never answers until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.let_go = threading.Event()

    def get(self, keys: Any) -> Any:
        self.let_go.wait(60)
        return {}

    def set(self, keys: Any) -> None:
        self.let_go.wait(60)

    async def aget(self, keys: Any) -> Any:
        await asyncio.sleep(60)
        return {}

    async def aset(self, keys: Any) -> None:
        await asyncio.sleep(60)


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hanging]:
    monkeypatch.setattr(Backend, "deadline", 0.05)
    cache = Hanging()
    adapter = ForeignCache.of(cache)
    adapter.deadline = 0.05
    yield cache
    cache.let_go.set()


async def test_a_backend_that_hangs_costs_its_deadline(hanging: Hanging) -> None:
    """A backend that never answers does not keep a run from ending, sync or async."""
    graph = build(hanging)
    assert graph.invoke({"query": "q"})["answer"] == "done"
    assert (await graph.ainvoke({"query": "q"}))["answer"] == "done"
    assert any("Timeout" in kind for kind in graph.perf.stats().failures)


def test_a_full_disk_is_logged_and_the_runs_go_on(tmp_path: Path) -> None:
    """When nothing can be written any more, every run ends well, and not each one is logged."""
    script = textwrap.dedent(
        """
        import logging, resource, signal, sys
        from langgraph.graph import START
        from typing_extensions import TypedDict
        from langgraph_perf import CachePolicy, DiskCache, StateGraph

        class State(TypedDict, total=False):
            query: str
            answer: str

        logging.basicConfig(stream=sys.stdout, format="LOG %(message)s")
        cache = DiskCache(sys.argv[1])
        builder = StateGraph(State)
        builder.add_node("node", lambda state: {"answer": state["query"] * 50_000},
                         cache_policy=CachePolicy(version=1))
        graph = builder.add_edge(START, "node").compile(cache=cache)
        assert len(graph.invoke({"query": "a"})["answer"]) == 50_000
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
        for query in "bcdefghijklmnop" * 2:
            assert graph.invoke({"query": query})["answer"] == query * 50_000
        assert graph.invoke({"query": "a"})["answer"] == "a" * 50_000
        stats = graph.perf.stats()
        assert stats.nodes["node"].hits >= 1, stats
        print("FAILURES", dict(stats.failures))
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "cache")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "FAILURES {'write: " in done.stdout
    # a single failure, and, once none succeeds any more, the outage
    assert 1 <= done.stdout.count("LOG write of DiskCache failed") <= 2


async def test_an_unwritable_disk_is_logged_and_the_runs_go_on(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What can only be read answers what it knows; each kind of failure is logged once, and the
    end of the outage too."""
    caplog.set_level(logging.INFO, "langgraph_perf")
    with DiskCache(tmp_path / "cache") as cache:
        cache.__dict__["_backend"] = Backend(cache, clock)
        graph = build(cache, about, tags=["docs"])
        assert graph.invoke({"query": "known"})["answer"] == "about known"
        connected = cache._db._connected

        def read_only() -> Any:
            handle = connected()
            handle.con.execute("PRAGMA query_only = 1").fetchall()
            return handle

        with monkeypatch.context() as patch:
            patch.setattr(cache._db, "_connected", read_only)
            cache._db._connections.close_idle()
            for i in range(6):
                assert graph.invoke({"query": f"{i}"})["answer"] == f"about {i}"
                assert (await graph.ainvoke({"query": f"a{i}"}))["answer"] == f"about a{i}"
                assert graph.invoke({"query": "known"})["answer"] == "about known"
                clock.advance(FIRST_PAUSE)
            stats = graph.perf.stats()
            assert (stats.nodes["node"].runs, stats.nodes["node"].hits) == (13, 6)
            assert stats.cache.entries == 1
        cache._db._connections.close_idle()
        clock.advance(LONGEST_PAUSE)
        for _ in range(2):
            assert graph.invoke({"query": "new"})["answer"] == "about new"
        assert graph.perf.stats().nodes["node"].hits == 7
    assert [
        (record.levelname, record.getMessage().partition(" of ")[0]) for record in told(caplog)
    ] == [
        ("WARNING", "lease"),
        ("WARNING", "write"),
        ("INFO", "lease"),
        ("INFO", "write"),
    ]


async def test_a_file_damaged_under_a_graph_is_logged_and_the_runs_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What was in it is lost, which is said once; what comes after is stored in a new file."""
    caplog.set_level(logging.INFO, "langgraph_perf")
    with DiskCache(tmp_path / "cache") as cache:
        graph = build(cache, about, tags=["docs"])
        graph.invoke({"query": "0"})
        for file in (tmp_path / "cache").iterdir():
            file.write_bytes(b"\0" * file.stat().st_size)
        for _ in range(2):
            for i in range(6):
                assert graph.invoke({"query": f"{i}"})["answer"] == f"about {i}"
                assert (await graph.ainvoke({"query": f"a{i}"}))["answer"] == f"about a{i}"
        stats = graph.perf.stats()
        assert (stats.nodes["node"].runs, stats.nodes["node"].hits) == (13, 12)
        assert stats.failures == {"read: DatabaseError": 1}
    set_aside, failed = [record.getMessage() for record in told(caplog)]
    assert "is damaged" in set_aside
    assert "set aside as cache.db.damaged-1" in set_aside
    assert failed.startswith("read of DiskCache failed")


def test_damaged_entries_are_misses(tmp_path: Path) -> None:
    """An entry whose bytes changed on disk is a miss, and is replaced."""
    import sqlite3

    with DiskCache(tmp_path / "cache") as cache:
        graph = build(cache)
        graph.invoke({"query": "q"})
        (database,) = (tmp_path / "cache").glob("*.db")
        with sqlite3.connect(database) as connection:
            connection.execute("UPDATE Cache SET value = zeroblob(length(value))")
        connection.close()
        for _ in range(2):
            assert graph.invoke({"query": "q"})["answer"] == "done"
        stats = graph.perf.stats().nodes["node"]
        assert (stats.runs, stats.hits) == (2, 1)


def test_runs_are_those_that_came_to_their_end() -> None:
    """A body that raises makes its call a miss without a run."""

    def fails(state: State) -> State:
        raise OSError("node is broken")

    builder = StateGraph(State)
    builder.add_node("node", fails, cache_policy=CachePolicy())
    graph = builder.add_edge(START, "node").compile(cache=MemoryCache())
    for _ in range(3):
        with pytest.raises(OSError, match="broken"):
            graph.invoke({"query": "q"})
    stats = graph.perf.stats().nodes["node"]
    assert (stats.misses, stats.runs) == (3, 0)


async def test_giving_a_lease_back_hides_no_cancellation() -> None:
    """It is given back, and who was cancelled meanwhile is cancelled: no next node runs."""
    entered, go_on, released = asyncio.Event(), asyncio.Event(), []

    class Slow(MemoryCache):
        async def arelease(self, lease: Lease) -> None:
            entered.set()
            await go_on.wait()
            released.append(lease)

    lease = Lease((("n",), "k"), "token", 0.0)
    with Slow() as cache:
        task = asyncio.create_task(Backend.of(cache).arelease(lease))
        await entered.wait()
        task.cancel()
        await asyncio.sleep(0)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert released == [lease]


async def test_a_cancellation_counts_in_the_tick_of_the_answer() -> None:
    """What ends in the moment in which its waiter is cancelled ends as cancelled."""
    answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(within(10, answer))
    await asyncio.sleep(0)
    answer.set_result(1)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("name", ["aread", "awrite", "atag_tokens", "aacquire", "arelease"])
async def test_what_a_backend_cancels_itself_is_a_failure(tmp_path: Path, name: str) -> None:
    """An executor or a connection that was shut down cancels what waits for it, but not a run."""

    async def cancelled(self: Any, *args: Any) -> Any:
        raise asyncio.CancelledError

    kind: Any = type("Kind", (DiskCache,), {name: cancelled})
    with kind(tmp_path / "cache") as cache:
        graph = build(cache, about, tags=["docs"])
        for query in ("a", "a", "b"):
            answer = await asyncio.wait_for(graph.ainvoke({"query": query}), 20)
            assert answer["answer"] == f"about {query}"
        kinds = set(graph.perf.stats().failures)
        # a lease goes back with what is written
        assert name == "arelease" or any("ConnectionError" in kind for kind in kinds)


async def test_who_waits_for_a_read_that_ends_is_answered(tmp_path: Path) -> None:
    """Lookups that came while a batch was under way do not wait for ever when that is cancelled."""
    entered = asyncio.Event()

    class Slow(DiskCache):
        async def aread(self, lookups: Any) -> Any:
            entered.set()
            await asyncio.Event().wait()

    with Slow(tmp_path / "cache") as cache:
        backend = Backend.of(cache)
        first = asyncio.create_task(backend.aread(Lookup((("n",), "first"))))
        await entered.wait()
        second = asyncio.create_task(backend.aread(Lookup((("n",), "second"))))
        (batcher,) = backend._batchers.values()
        while not batcher._waiting:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0)
        assert batcher._task is not None
        batcher._task.cancel()
        assert await asyncio.wait_for(asyncio.gather(first, second), 20) == [None, None]


async def test_a_lease_that_nobody_waits_for_any_more_is_given_back() -> None:
    """It is granted after its caller was cancelled."""
    entered, go_on, released = asyncio.Event(), asyncio.Event(), asyncio.Event()
    lease = Lease((("n",), "k"), "token", 0.0)

    class Slow(MemoryCache):
        async def aacquire(self, key: Any) -> Lease:
            entered.set()
            await go_on.wait()
            return lease

        async def arelease(self, given: Lease) -> None:
            assert given is lease
            released.set()

    with Slow() as cache:
        task = asyncio.create_task(Backend.of(cache).aacquire(lease.key))
        await entered.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()
        await asyncio.wait_for(released.wait(), 20)
