"""Redis fails in every way it can: every run of a graph ends, with the right answer."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from typing import Any

import pytest
import redis
from langgraph.graph import START
from typing_extensions import TypedDict

from langgraph_perf import CachePolicy, MemoryCache, RedisCache, StateGraph, TieredCache
from langgraph_perf._backend import Backend
from langgraph_perf._breaker import Breaker
from langgraph_perf.caches._bounded import Bounded
from langgraph_perf.caches.base import Cache
from langgraph_perf.testing import Clock
from tests.conftest import Threads
from tests.redis_server import Proxy, Server, free_port, new_prefix
from tests.servers import ask_again
from tests.test_single_flight import until

TIMEOUT = 1.0
"""Long enough that what a busy machine adds to it is little beside the deadlines of a whole run."""


class State(TypedDict, total=False):
    query: str
    answer: str


def build(cache: Cache) -> tuple[Any, list[str]]:
    """A graph whose node says what it was asked, and the list of what it was asked."""
    runs: list[str] = []

    def node(state: State) -> State:
        runs.append(state["query"])
        return {"answer": f"about {state['query']}"}

    builder = StateGraph(State)
    policy = CachePolicy(version=1, tags=["docs"], ttl=3600)
    builder.add_node("node", node, cache_policy=policy)
    return builder.add_edge(START, "node").compile(cache=cache), runs


def run(graph: Any, queries: list[str], mode: str) -> float:
    """Every query is answered well; returns how long the slowest run took."""
    times = []

    async def ask_all() -> None:
        for query in queries:
            started = time.monotonic()
            assert (await graph.ainvoke({"query": query}))["answer"] == f"about {query}"
            times.append(time.monotonic() - started)

    if mode == "async":
        asyncio.run(ask_all())
    else:
        for query in queries:
            started = time.monotonic()
            assert graph.invoke({"query": query})["answer"] == f"about {query}"
            times.append(time.monotonic() - started)
    return max(times)


@contextmanager
def stopped(server: Server, proxy: Proxy) -> Iterator[None]:
    server.send(signal.SIGKILL)
    yield
    server.start()


@contextmanager
def hung(server: Server, proxy: Proxy) -> Iterator[None]:
    with server.stopped():
        yield


@contextmanager
def restarted(server: Server, proxy: Proxy) -> Iterator[None]:
    server.send(signal.SIGKILL)
    server.start()
    yield


@contextmanager
def full(server: Server, proxy: Proxy) -> Iterator[None]:
    with server.client() as client:
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", "1")
        yield
        client.config_set("maxmemory", "0")


@contextmanager
def read_only(server: Server, proxy: Proxy) -> Iterator[None]:
    with server.client() as client:
        client.replicaof("127.0.0.1", str(free_port()))
        yield
        client.replicaof("NO", "ONE")


@contextmanager
def slow(server: Server, proxy: Proxy) -> Iterator[None]:
    proxy.delay = 1.25 * TIMEOUT
    yield
    proxy.delay = 0.0


@contextmanager
def deaf(server: Server, proxy: Proxy) -> Iterator[None]:
    proxy.deaf = True
    yield
    proxy.deaf = False
    proxy.reset()


@contextmanager
def cut_in_the_middle(server: Server, proxy: Proxy) -> Iterator[None]:
    proxy.cut_after = 3
    yield
    proxy.cut_after = None


@contextmanager
def reset_again_and_again(server: Server, proxy: Proxy) -> Iterator[None]:
    done = threading.Event()

    def cut() -> None:
        while not done.wait(0.002):
            proxy.reset()

    thread = threading.Thread(target=cut)
    thread.start()
    yield
    done.set()
    thread.join()


@contextmanager
def locked(server: Server, proxy: Proxy) -> Iterator[None]:
    with server.client() as client:
        client.config_set("requirepass", "secret")
        client.client_kill_filter(_type="normal", skipme=True)
        yield
        client.config_set("requirepass", "")


FAULTS = [
    stopped,
    hung,
    restarted,
    full,
    read_only,
    slow,
    deaf,
    cut_in_the_middle,
    reset_again_and_again,
    locked,
]
Fault = Callable[[Server, Proxy], AbstractContextManager[None]]


@pytest.fixture(scope="module")
def victim() -> Iterator[Server]:
    """One server, harmed and healed again and again."""
    with Server() as server:
        yield server


@pytest.mark.parametrize("tiers", [False, True], ids=["alone", "tiers"])
@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_every_run_ends_well(fault: Fault, mode: str, tiers: bool, victim: Server) -> None:
    """During a fault runs end with the right answer in bounded time; afterwards they hit again."""
    proxy = Proxy(victim.port)
    cache: Cache = RedisCache(
        proxy.url, prefix=new_prefix(), timeout=TIMEOUT, connect_timeout=TIMEOUT
    )
    if tiers:
        cache = TieredCache(MemoryCache(), cache)
    graph, runs = build(cache)
    run(graph, ["before"], mode)
    with fault(victim, proxy):
        slowest = run(graph, [*map(str, range(5)), "before", "before"], mode)
    # at most the deadline, besides what the machine is busy with: nothing else is tried then
    assert slowest < 5 * TIMEOUT
    recovers(cache, graph, runs, mode)
    cache.close()
    proxy.close()


def recovers(cache: Cache, graph: Any, runs: list[str], mode: str) -> None:
    """Once pauses are over, results are stored and served again."""
    backend = Backend.of(cache)
    deadline = time.monotonic() + 20
    while True:
        assert time.monotonic() < deadline, "it does not recover"
        ask_again(backend)
        if isinstance(cache, TieredCache):
            for tier in cache._tiers:
                ask_again(tier)
        query = f"after {time.monotonic()}"
        run(graph, [query, query], mode)
        if runs.count(query) == 1:
            return


@pytest.mark.parametrize(
    ("fault", "mode", "tiers"),
    [
        (stopped, "sync", False),
        (stopped, "async", True),
        (hung, "async", False),
        (hung, "sync", True),
        (full, "sync", False),
        (read_only, "async", True),
    ],
)
def test_it_recovers_by_itself(fault: Fault, mode: str, tiers: bool, victim: Server) -> None:
    """Nobody has to do anything: soon after an outage results are stored and served again."""
    cache: Cache = RedisCache(
        victim.url, prefix=new_prefix(), timeout=TIMEOUT, connect_timeout=TIMEOUT
    )
    if tiers:
        cache = TieredCache(MemoryCache(), cache)
    proxy = Proxy(victim.port)
    with cache, closing(proxy):
        graph, runs = build(cache)
        with fault(victim, proxy):
            run(graph, [str(i) for i in range(10)], mode)
            assert sum(graph.perf.stats().failures.values()) + cache.stats().errors > 0
        queries = iter(range(10**9))

        def hits_again() -> bool:
            query = f"after {next(queries)}"
            run(graph, [query, query], mode)
            if tiers:
                # what the first tier answers tells nothing of the server
                return cache.tiers[-1].stats().writes > 0  # type: ignore[attr-defined]
            return runs.count(query) == 1

        # five seconds are promised (see below); on a busy machine probes may fail as well
        until(hits_again, 40)


def test_a_server_that_is_away_costs_little_once_that_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the breaker open a run is not slowed down."""
    # ten runs may take a busy machine longer than a pause, after which it is asked again
    monkeypatch.setattr("langgraph_perf._breaker.FIRST_PAUSE", 3600.0)
    with RedisCache(f"redis://127.0.0.1:{free_port()}", timeout=TIMEOUT) as cache:
        graph, _ = build(cache)
        run(graph, [str(i) for i in range(5)], "sync")
        failures = dict(graph.perf.stats().failures)
        run(graph, [str(i) for i in range(5)], "sync")
        after = graph.perf.stats().failures
        assert {k: v for k, v in after.items() if k != "skipped"} == {
            k: v for k, v in failures.items() if k != "skipped"
        }


@pytest.mark.skipif(sys.version_info < (3, 11), reason="errors have no notes")
@pytest.mark.parametrize("tiers", [False, True], ids=["alone", "tiers"])
@pytest.mark.parametrize("call", ["invalidate", "clear", "ainvalidate", "aclear"])
def test_what_is_not_invalidated_is_said_with_the_error(call: str, tiers: bool) -> None:
    """Which call failed, and that it is to be repeated; the error itself is redis-py's."""
    server = RedisCache(f"redis://127.0.0.1:{free_port()}", timeout=TIMEOUT)
    arguments = ["docs"] if "invalidate" in call else []
    with TieredCache(MemoryCache(), server) if tiers else server as cache:

        async def order() -> None:
            answer = getattr(cache, call)(*arguments)
            if answer is not None:
                await answer

        with pytest.raises(redis.ConnectionError) as raised:
            asyncio.run(order())
        (note,) = getattr(raised.value, "__notes__", [])
        assert f"RedisCache.{call}()" in note
        assert "until it is called again" in note


def test_the_first_tier_goes_on_while_the_server_is_away(own_server: Server) -> None:
    """What depends on no tag is served by the first tier, and what was stored there meanwhile."""
    cache = TieredCache(MemoryCache(), RedisCache(own_server.url))
    builder = StateGraph(State)
    runs: list[str] = []

    def node(state: State) -> State:
        runs.append(state["query"])
        return {"answer": f"about {state['query']}"}

    builder.add_node("node", node, cache_policy=CachePolicy(version=1))
    graph = builder.add_edge(START, "node").compile(cache=cache)
    run(graph, ["q", "q"], "sync")
    own_server.send(signal.SIGKILL)
    run(graph, ["q", "q", "r", "r"], "sync")
    assert runs == ["q", "r"]
    cache.close()


@pytest.mark.parametrize("tiers", [False, True], ids=["alone", "tiers"])
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_run_loses_one_deadline(proxy: Proxy, mode: str, tiers: bool) -> None:
    """A server that goes deaf while a node runs is not asked again for the nodes that follow."""
    # so long that two would be told apart from one and what a busy machine takes
    cache: Cache = RedisCache(proxy.url, prefix=new_prefix(), timeout=6.0, connect_timeout=6.0)
    if tiers:
        cache = TieredCache(MemoryCache(), cache)
    builder = StateGraph(State)
    policy = CachePolicy(version=1, tags=["docs"])

    def first(state: State) -> State:
        proxy.deaf = True
        return {}

    builder.add_node("first", first, cache_policy=policy)
    builder.add_node("second", lambda state: {"answer": "about q"}, cache_policy=policy)
    builder.add_edge(START, "first").add_edge("first", "second")
    assert run(builder.compile(cache=cache), ["q"], mode) < 11.8
    cache.close()


def test_a_tier_left_alone_opens_no_breaker(own_server: Server) -> None:
    """One pause after an outage is enough: the graph's own does not come on top of the tier's."""
    server = RedisCache(own_server.url)
    with TieredCache(MemoryCache(), server) as cache:
        graph, runs = build(cache)
        cache._tiers[-1].failed("read", TimeoutError())
        run(graph, [str(i) for i in range(5)], "sync")
        backend = Backend.of(cache)
        assert not any(breaker.is_open for breaker in backend.breakers)
        ask_again(cache._tiers[-1])
        run(graph, ["q", "q"], "sync")
        assert runs.count("q") == 1


def test_pauses_are_short(clock: Clock) -> None:
    """However long a server was away, five seconds after its return it is asked again."""
    breaker = Breaker(clock)
    for _ in range(20):
        breaker.failed(slowly=True)
        clock.advance(4.5)
        assert breaker.allows()


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_hung_server_costs_its_deadline(own_server: Server, mode: str) -> None:
    """However many ask at once, each waits for its deadline and not for those before it."""
    # fifty of them would be told apart from what a busy machine takes for fifty runs
    seconds = 2.0
    cache = RedisCache(own_server.url, prefix="p", timeout=seconds, connect_timeout=seconds)
    graph, _ = build(cache)
    run(graph, ["q"], mode)

    async def all_at_once() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(50))

        def ask(i: int) -> Any:
            query = {"query": str(i)}
            return (
                graph.ainvoke(query) if mode == "async" else asyncio.to_thread(graph.invoke, query)
            )

        for i, answer in enumerate(await asyncio.gather(*map(ask, range(50)))):
            assert answer["answer"] == f"about {i}"

    with own_server.stopped():
        started = time.monotonic()
        asyncio.run(all_at_once())
        assert time.monotonic() - started < 20 * seconds
    cache.close()


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_runs_need_no_thread(redis_server: Server, threads: Threads, mode: str) -> None:
    """Where no thread can be started hits are hits; when one can be, the server is listened to."""
    last = RedisCache(redis_server.url, prefix=new_prefix())
    cache = TieredCache(MemoryCache(), last)
    graph, runs = build(cache)
    threads.allowed = False
    run(graph, ["a", "a", "a"], mode)
    assert runs == ["a"]
    assert graph.perf.stats().failures == {}
    threads.allowed = True

    def asks_nothing() -> bool:
        before = last.round_trips
        run(graph, ["a"], mode)
        return last.round_trips == before

    until(asks_nothing)
    cache.close()


def test_a_busy_server_is_listened_to_again(own_server: Server) -> None:
    """While a script runs for long the server answers everything with an error, the listener too:
    that is no refusal."""
    with own_server.client() as admin, ThreadPoolExecutor(1) as pool:
        admin.config_set("busy-reply-threshold", 1)
        last = RedisCache(own_server.url, timeout=5.0)
        cache = TieredCache(MemoryCache(), last)
        key = (("n",), "k")
        cache.set({key: (1, 60)})

        def asks_nothing() -> bool:
            before = last.round_trips
            assert cache.get([key]) == {key: 1}
            return last.round_trips == before

        until(asks_nothing)
        listener = last._listener
        assert listener is not None
        heard: list[str] = []

        def listen(listen: Callable[[], None] = listener._listen) -> None:
            try:
                listen()
            except Exception as exc:
                heard.append(str(exc))
                raise

        listener._listen = listen  # type: ignore[method-assign]
        # the connection it has does not go through that yet
        admin.client_kill_filter(_type="pubsub")
        until(asks_nothing)
        script = pool.submit(admin.eval, "while true do end", 0)

        def is_busy() -> bool:
            with suppress(redis.RedisError, TimeoutError):
                cache.get([key])
            return any(error.startswith("BUSY") for error in heard)

        until(is_busy)
        with own_server.client() as other:
            other.script_kill()
        assert isinstance(script.exception(20), redis.ResponseError)
        until(asks_nothing)
        cache.close()


def test_closing_needs_no_thread(redis_server: Server, threads: Threads) -> None:
    """What never began to listen can be closed."""
    cache = TieredCache(MemoryCache(), RedisCache(redis_server.url, prefix=new_prefix()))
    graph, _ = build(cache)
    threads.allowed = False
    run(graph, ["a", "a"], "sync")
    cache.close()


def test_leases_are_given_back_by_the_next_thread(redis_server: Server, threads: Threads) -> None:
    """What could not be given back runs out; what is to be later is given back."""
    with RedisCache(redis_server.url, prefix=new_prefix(), lease_seconds=60.0) as cache:
        first, second = [cache.acquire((("n",), name)) for name in ("first", "second")]
        assert first is not None
        assert second is not None
        threads.allowed = False
        cache._take_back(first)
        threads.allowed = True
        cache._take_back(second)
        until(lambda: cache.acquire(second.key) is not None)


def test_what_needs_a_deadline_waits_for_a_thread_there_is(threads: Threads) -> None:
    """Only where there is none at all it is done without."""
    bounded, begun, gate = Bounded(1), threading.Event(), threading.Event()

    def hangs() -> None:
        begun.set()
        gate.wait(60)

    threads.allowed = False
    assert bounded.run(threading.current_thread, 1.0) is threading.current_thread()
    threads.allowed = True
    while not begun.is_set():  # a busy machine may give up before the thread has come
        with pytest.raises(TimeoutError):
            bounded.run(hangs, 0.05)
    threads.allowed = False
    with pytest.raises(TimeoutError):
        bounded.run(threading.current_thread, 0.01)
    gate.set()
    assert bounded.run(threading.current_thread, 10.0) is not threading.current_thread()
