"""Results past their ``ttl``: refreshed in the background, or served where an error would be."""

from __future__ import annotations

import asyncio
import gc
import math
import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer
from langgraph.config import get_stream_writer
from langgraph.errors import GraphInterrupt
from langgraph.graph import START
from langgraph.runtime import Runtime
from langgraph.types import RetryPolicy, interrupt
from typing_extensions import TypedDict

from langgraph_perf import (
    CacheMiss,
    CachePolicy,
    ConfigurationError,
    DiskCache,
    MemoryCache,
    RedisCache,
    Shared,
    StateGraph,
    TieredCache,
    _heartbeat,
    get_cache,
)
from langgraph_perf._backend import Backend
from langgraph_perf.caches.base import Cache
from langgraph_perf.testing import Clock

from .redis_server import Server, new_prefix
from .test_single_flight import auntil, until


class State(TypedDict, total=False):
    query: str
    items: list[str]
    answer: Any


STALE = CachePolicy(ttl=10, stale_while_revalidate=60, version=1)
PATIENT = CachePolicy(ttl=10, stale_if_error=60, version=1)
ASK = {"query": "q"}


class Node:
    """A node that counts its runs, and can be held or made to fail.

    Attributes:
        runs: so many have begun.
        gate: runs wait for it; open at first.
        error: what runs raise, if anything.
    """

    def __init__(self) -> None:
        self.runs = 0
        self.gate = threading.Event()
        self.gate.set()
        self.error: BaseException | None = None
        self._lock = threading.Lock()

    def __call__(self, state: State) -> State:
        with self._lock:
            self.runs += 1
            run = self.runs
        assert self.gate.wait(20)
        if self.error is not None:
            raise self.error
        return {"answer": run}

    async def awaited(self, state: State) -> State:
        self.runs += 1
        run = self.runs
        while not self.gate.is_set():  # noqa: ASYNC110 - it is set from other threads
            await asyncio.sleep(0.001)
        if self.error is not None:
            raise self.error
        return {"answer": run}


def build(node: Any, cache: Any, policy: CachePolicy = STALE, **compiled: Any) -> Any:
    builder = StateGraph(State)
    builder.add_node("node", node, cache_policy=policy)
    return builder.add_edge(START, "node").compile(cache=cache, **compiled)


def idle(graph: Any) -> bool:
    return not graph.perf.refreshes._running


def on_redis(server: Server, clock: Clock) -> RedisCache:
    """A cache there; ``clock`` takes the server's own time along."""
    prefix, advance = new_prefix(), clock.advance

    def advance_both(seconds: float) -> None:
        advance(seconds)
        server.age(prefix, seconds)

    clock.advance = advance_both  # type: ignore[method-assign]
    return RedisCache(server.url, prefix=prefix, clock=clock)


@pytest.fixture(params=["memory", "disk", "tiered", "redis", "tiers"])
def timed(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> Iterator[Cache]:
    """Caches whose time the test sets; nothing may be left in flight in the end."""
    made: Cache
    if request.param == "memory":
        made = MemoryCache(clock=clock)
    elif request.param in ("disk", "tiered"):
        made = DiskCache(tmp_path / "cache", clock=clock)
    else:
        made = on_redis(request.getfixturevalue("redis_server"), clock)
    if request.param in ("tiered", "tiers"):
        made = TieredCache(MemoryCache(clock=clock), made)
    with made:
        yield made
        assert len(Backend.of(made).flights) == 0


def test_a_stale_result_is_served_while_the_node_runs_again(timed: Cache, clock: Clock) -> None:
    """Nobody waits for the refresh; those who ask after it get the new result."""
    node = Node()
    graph = build(node, timed)
    assert graph.invoke(ASK)["answer"] == 1
    clock.advance(11)
    node.gate.clear()
    assert graph.invoke(ASK)["answer"] == 1  # though the refresh cannot end
    assert graph.invoke(ASK)["answer"] == 1
    until(lambda: node.runs == 2)
    node.gate.set()
    until(lambda: idle(graph))
    assert graph.invoke(ASK)["answer"] == 2
    assert node.runs == 2
    stats = graph.perf.stats().nodes["node"]
    assert (stats.hits, stats.stale_hits, stats.misses, stats.runs) == (1, 2, 1, 2)
    assert not stats.refusals


async def test_a_stale_result_is_served_while_a_task_runs_the_node(
    timed: Cache, clock: Clock
) -> None:
    """The same on an event loop, where the node runs as a task of its own."""
    node = Node()
    graph = build(node.awaited, timed)
    assert (await graph.ainvoke(ASK))["answer"] == 1
    clock.advance(11)
    node.gate.clear()
    assert (await graph.ainvoke(ASK))["answer"] == 1
    await auntil(lambda: node.runs == 2)
    node.gate.set()
    await auntil(lambda: idle(graph))
    assert (await graph.ainvoke(ASK))["answer"] == 2
    assert node.runs == 2


def test_one_refresh_however_many_ask(timed: Cache, clock: Clock) -> None:
    """Twenty threads that find the same stale result start one run."""
    node = Node()
    graph = build(node, timed)
    graph.invoke(ASK)
    clock.advance(11)
    node.gate.clear()
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: graph.invoke(ASK)["answer"], range(20)))
    assert answers == [1] * 20
    node.gate.set()
    until(lambda: idle(graph))
    assert node.runs == 2


def test_beyond_the_window_the_caller_waits(timed: Cache, clock: Clock) -> None:
    """A result that is too old is no result."""
    node = Node()
    graph = build(node, timed)
    graph.invoke(ASK)
    clock.advance(71)
    assert graph.invoke(ASK)["answer"] == 2


@pytest.mark.parametrize("is_async", [False, True])
async def test_an_error_is_answered_with_the_stale_result(
    timed: Cache, clock: Clock, is_async: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Past its ttl a result is computed again; while that fails, it is good enough."""
    node = Node()
    graph = build(node.awaited if is_async else node, timed, PATIENT)

    async def ask() -> Any:
        state = await graph.ainvoke(ASK) if is_async else graph.invoke(ASK)
        return state["answer"]

    assert await ask() == 1
    clock.advance(11)
    node.error = ConnectionError("the model is down")
    assert await ask() == 1
    assert await ask() == 1
    assert caplog.text.count("the model is down") == 1
    stats = graph.perf.stats().nodes["node"]
    assert (stats.stale_hits, stats.refusals) == (2, {"run_failed": 2})
    assert stats.seconds_saved == 0
    node.error = None
    assert await ask() == 4
    assert await ask() == 4
    clock.advance(71)
    node.error = ConnectionError("the model is down")
    with pytest.raises(ConnectionError):
        await ask()


def test_followers_of_a_failing_run_get_the_stale_result(timed: Cache, clock: Clock) -> None:
    """One failed attempt answers all who waited for it."""
    node = Node()
    graph = build(node, timed, PATIENT)
    graph.invoke(ASK)
    clock.advance(11)
    node.gate.clear()
    node.error = ConnectionError("down")
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(graph.invoke, ASK) for _ in range(8)]
        until(lambda: Backend.of(timed).flights.waiting() == 7)
        node.gate.set()
        assert [answer.result()["answer"] for answer in answers] == [1] * 8
    assert node.runs == 2


def test_a_question_to_a_human_is_no_error(clock: Clock) -> None:
    """Interrupts and cancellation are not answered with stale results."""
    asking = threading.Event()

    def node(state: State) -> State:
        return {"answer": interrupt("really?") if asking.is_set() else 1}

    graph = build(node, MemoryCache(clock=clock), PATIENT, checkpointer=InMemorySaver())

    def thread(name: str) -> Any:
        return {"configurable": {"thread_id": name}}

    assert graph.invoke(ASK, thread("a"))["answer"] == 1
    clock.advance(11)
    asking.set()
    assert "__interrupt__" in graph.invoke(ASK, thread("b"))


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), GraphInterrupt(()), SystemExit()], ids=lambda e: type(e).__name__
)
def test_only_failures_are_answered_with_stale_results(clock: Clock, error: BaseException) -> None:
    """What ends a program or a run is passed on."""
    node = Node()
    cache = MemoryCache(clock=clock)
    graph = build(node, cache, PATIENT)
    graph.invoke(ASK)
    clock.advance(11)
    node.error = error
    if isinstance(error, GraphInterrupt):
        assert "answer" not in graph.invoke(ASK)
    else:
        with pytest.raises(type(error)):
            graph.invoke(ASK)
    assert graph.perf.stats().nodes["node"].stale_hits == 0


def test_a_refresh_that_fails_leaves_the_stale_result(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """The error is counted and logged, and the next call tries again."""
    node = Node()
    graph = build(node, MemoryCache(clock=clock))
    graph.invoke(ASK)
    clock.advance(11)
    node.error = ConnectionError("down")
    for tries in (1, 2):
        assert graph.invoke(ASK)["answer"] == 1
        until(lambda: idle(graph))
        assert graph.perf.stats().nodes["node"].refusals == {"refresh_failed": tries}
    assert caplog.text.count("ConnectionError: down") == 1
    node.error = None
    graph.invoke(ASK)
    until(lambda: idle(graph))
    assert graph.invoke(ASK)["answer"] == 4


def test_an_invalidation_reaches_a_refresh_under_way(timed: Cache, clock: Clock) -> None:
    """What began before an invalidation is not served after it, refreshes included."""
    node = Node()
    policy = CachePolicy(ttl=10, stale_while_revalidate=60, tags=["docs"], version=1)
    graph = build(node, timed, policy)
    graph.invoke(ASK)
    clock.advance(11)
    node.gate.clear()
    assert graph.invoke(ASK)["answer"] == 1
    until(lambda: node.runs == 2)
    timed.invalidate("docs")
    node.gate.set()
    until(lambda: idle(graph))
    assert graph.invoke(ASK)["answer"] == 3


def test_a_refresh_has_an_input_of_its_own(clock: Clock) -> None:
    """The graph goes on with the other one, and neither sees what the other changes."""
    gate = threading.Event()
    runs: list[int] = []

    def node(state: State) -> State:
        runs.append(1)
        if len(runs) == 2:
            assert gate.wait(20)
        return {"answer": list(state["items"])}

    graph = build(node, MemoryCache(clock=clock))
    items = ["a"]
    graph.invoke({"items": items})
    clock.advance(11)
    graph.invoke({"items": items})
    until(lambda: len(runs) == 2)
    items.append("b")
    gate.set()
    until(lambda: idle(graph))
    assert graph.invoke({"items": ["a"]})["answer"] == ["a"]
    assert len(runs) == 2


def test_an_input_that_cannot_be_copied_is_not_refreshed(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """The stale result is served as long as it may, and then the caller runs the node."""
    node = Node()
    policy = replace(STALE, key=["query"])
    graph = build(node, MemoryCache(clock=clock), policy)
    asked = {"query": "q", "items": [threading.Lock()]}
    graph.invoke(asked)
    clock.advance(11)
    assert graph.invoke(asked)["answer"] == 1
    assert idle(graph)
    assert "cannot be copied" in caplog.text
    clock.advance(70)
    assert graph.invoke(asked)["answer"] == 2


@dataclass
class Who:
    user: str


@pytest.mark.parametrize("is_async", [False, True])
async def test_a_refresh_is_no_part_of_the_run_that_started_it(
    clock: Clock, is_async: bool
) -> None:
    """It has the run's context, configuration and resources, but writes to none of its streams
    and checkpoints, and nobody listening to the run hears of it."""
    leases: list[str] = []
    seen: list[Any] = []
    release = threading.Event()
    release.set()

    class Model:
        def __init__(self) -> None:
            leases.append("loaded")

    def node(state: State, runtime: Runtime[Who], config: RunnableConfig, model: Model) -> State:
        assert release.wait(20)
        seen.append((runtime.context.user, config["configurable"]["temperature"], type(model)))
        get_stream_writer()({"run": len(seen)})
        return {"answer": len(seen)}

    builder = StateGraph(State, context_schema=Who)
    policy = replace(STALE, key=["query"])
    builder.add_node("node", node, cache_policy=policy, resources=["model"])
    builder.add_edge(START, "node")
    saver = InMemorySaver()
    cache = MemoryCache(clock=clock)
    graph = builder.compile(cache=cache, checkpointer=saver, resources={"model": Shared(Model)})

    async def stream() -> list[Any]:
        config = {"configurable": {"thread_id": "t", "temperature": 0.5}}
        given: dict[str, Any] = {"stream_mode": ["custom", "updates"], "context": Who("ann")}
        if is_async:
            return [chunk async for chunk in graph.astream(ASK, config, **given)]
        return list(graph.stream(ASK, config, **given))

    assert ("custom", {"run": 1}) in await stream()
    clock.advance(11)
    release.clear()
    chunks = await stream()
    history = len(list(saver.list({"configurable": {"thread_id": "t"}})))
    release.set()
    await auntil(lambda: idle(graph))
    assert [mode for mode, _ in chunks] == ["updates"]
    assert seen == [("ann", 0.5, Model)] * 2
    assert leases == ["loaded"]
    assert len(list(saver.list({"configurable": {"thread_id": "t"}}))) == history
    assert (await stream())[-1][1]["node"]["answer"] == 2
    await graph.perf.aclose()


def test_no_refresh_outlives_close(clock: Clock) -> None:
    """``close`` waits for what runs in threads, and nothing starts after it."""
    node = Node()
    cache = MemoryCache(clock=clock)
    graph = build(node, cache)
    graph.invoke(ASK)
    clock.advance(11)
    node.gate.clear()
    graph.invoke(ASK)
    until(lambda: node.runs == 2)
    closing = threading.Thread(target=graph.perf.close)
    closing.start()
    assert not idle(graph)
    node.gate.set()
    closing.join(20)
    assert not closing.is_alive()
    until(lambda: idle(graph))
    clock.advance(11)
    assert graph.invoke(ASK)["answer"] == 2
    assert idle(graph)
    assert node.runs == 2


async def test_no_task_outlives_aclose(clock: Clock) -> None:
    """``aclose`` cancels the tasks of its own event loop, and their results are not stored."""
    node = Node()
    graph = build(node.awaited, MemoryCache(clock=clock))
    await graph.ainvoke(ASK)
    clock.advance(11)
    node.gate.clear()
    await graph.ainvoke(ASK)
    await auntil(lambda: node.runs == 2)
    await graph.perf.aclose()
    await auntil(lambda: idle(graph))
    node.gate.set()
    assert (await graph.ainvoke(ASK))["answer"] == 1
    assert len(Backend.of(graph.cache).flights) == 0


def test_a_refresh_that_closes_its_own_graph_does_not_wait_for_itself(clock: Clock) -> None:
    """Closing from inside the node, in the background, ends."""
    graphs: list[Any] = []
    closed = threading.Event()
    runs: list[int] = []

    def node(state: State) -> State:
        runs.append(1)
        if len(runs) == 2:
            graphs[0].perf.close()
            closed.set()
        return {"answer": len(runs)}

    graphs.append(build(node, MemoryCache(clock=clock)))
    graphs[0].invoke(ASK)
    clock.advance(11)
    graphs[0].invoke(ASK)
    assert closed.wait(20)
    until(lambda: idle(graphs[0]))


def test_loops_one_after_the_other(clock: Clock) -> None:
    """A refresh that ended with its event loop does not keep the next one from starting."""
    node = Node()
    graph = build(node.awaited, MemoryCache(clock=clock))
    asyncio.run(graph.ainvoke(ASK))
    clock.advance(11)
    node.gate.clear()

    async def ask() -> Any:
        runs = node.runs
        answer = (await graph.ainvoke(ASK))["answer"]
        await auntil(lambda: node.runs == runs + 1)
        return answer

    assert [asyncio.run(ask()) for _ in range(3)] == [1, 1, 1]


def test_another_process_refreshes(tmp_path: Path, clock: Clock) -> None:
    """Whoever has the lease of the key refreshes it; the others leave it to them."""
    node = Node()
    with DiskCache(tmp_path, clock=clock) as cache, DiskCache(tmp_path, clock=clock) as other:
        graph = build(node, cache)
        graph.invoke(ASK)
        (key,) = _keys(cache)
        clock.advance(11)
        lease = other.acquire(key)
        assert lease is not None
        assert graph.invoke(ASK)["answer"] == 1
        until(lambda: idle(graph))
        assert node.runs == 1
        other.release(lease)
        assert graph.invoke(ASK)["answer"] == 1
        until(lambda: idle(graph))
        assert node.runs == 2


def _keys(cache: Cache) -> list[Any]:
    """The keys that a graph looks up."""
    found: list[Any] = []
    read = cache.read

    def spying(lookups: Any) -> Any:
        found.extend(lookup.key for lookup in lookups)
        return read(lookups)

    cache.read = spying  # type: ignore[method-assign]
    try:
        build(Node(), cache).invoke(ASK)
    finally:
        del cache.read
    return sorted(set(found))


def test_a_run_may_ask_for_nothing_stale(clock: Clock) -> None:
    """``cache_control.ttl`` is a limit for stale results too."""
    node = Node()
    graph = build(node, MemoryCache(clock=clock))
    graph.invoke(ASK)
    clock.advance(15)
    strict = {"configurable": {"cache_control": {"ttl": 12}}}
    assert graph.invoke(ASK, strict)["answer"] == 2


def test_mode_only_serves_what_is_stale_and_runs_nothing(clock: Clock) -> None:
    """Who says that the node may not run gets no run in the background either."""
    node = Node()
    graph = build(node, MemoryCache(clock=clock))
    graph.invoke(ASK)
    clock.advance(11)
    only = {"configurable": {"cache_control": {"mode": "only"}}}
    assert graph.invoke(ASK, only)["answer"] == 1
    assert idle(graph)
    assert node.runs == 1
    patient = build(node, MemoryCache(clock=clock), PATIENT)
    patient.invoke(ASK)
    clock.advance(11)
    with pytest.raises(CacheMiss):
        patient.invoke(ASK, only)


def test_a_policy_that_became_stricter_serves_nothing_stale(clock: Clock) -> None:
    """What a more patient policy stored is over at the end of its ttl."""
    node = Node()
    cache = MemoryCache(clock=clock)
    build(node, cache).invoke(ASK)
    clock.advance(11)
    for ttl in (10, None):
        strict = build(node, cache, CachePolicy(ttl=ttl, version=1))
        runs = node.runs
        assert strict.invoke(ASK)["answer"] == runs + 1
        cache.clear()
        build(node, cache).invoke(ASK)
        clock.advance(11)


def test_jitter_spreads_the_end_of_freshness(clock: Clock) -> None:
    """Results stored together do not all go stale together, and none later than its ttl."""
    policy = CachePolicy(ttl=100, jitter=0.5, stale_while_revalidate=1000, version=1)
    node = Node()
    graph = build(node, MemoryCache(clock=clock), policy)
    for n in range(40):
        graph.invoke({"query": str(n)})
    clock.advance(75)
    for n in range(40):
        graph.invoke({"query": str(n)})
    until(lambda: idle(graph))
    stale = graph.perf.stats().nodes["node"].stale_hits
    assert 0 < stale < 40
    clock.advance(101)
    for n in range(40):
        graph.invoke({"query": str(n)})
    until(lambda: idle(graph))
    assert graph.perf.stats().nodes["node"].stale_hits == stale + 40


def test_a_node_with_a_graph_inside_is_refreshed_by_its_caller(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """A graph in the background would write to the thread's checkpoints: said when compiled."""
    node = Node()
    inner = StateGraph(State)
    inner.add_node("inner", node)
    builder = StateGraph(State)
    policy = CachePolicy(ttl=10, stale_while_revalidate=60, version=1)
    builder.add_node("node", inner.add_edge(START, "inner").compile(), cache_policy=policy)
    graph = builder.add_edge(START, "node").compile(cache=MemoryCache(clock=clock))
    assert "stale_while_revalidate has no effect" in caplog.text
    graph.invoke(ASK)
    clock.advance(11)
    assert graph.invoke(ASK)["answer"] == 2


@pytest.mark.parametrize("name", ["stale_while_revalidate", "stale_if_error"])
@pytest.mark.parametrize("value", [0, -1, "10", True, float("inf")])
def test_windows_are_positive_numbers_of_seconds(name: str, value: Any) -> None:
    """Other values are refused, and so is a window without a ttl."""
    with pytest.raises(ConfigurationError, match=f"CachePolicy.{name}: got .*; accepted"):
        CachePolicy(ttl=10, **{name: value})
    with pytest.raises(ConfigurationError, match=f"CachePolicy.{name}.*without a ttl"):
        CachePolicy(**{name: 10})


# -- what a review found --------------------------------------------------------------------------


@pytest.mark.parametrize("encrypted", [False, True])
@pytest.mark.parametrize("policy", [STALE, PATIENT])
def test_a_copy_that_ended_early_hides_no_fresh_result(
    policy: CachePolicy, encrypted: bool, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With jitter a copy in a first tier is stale within its ttl: the tier below is asked all the
    same, and of several processes one runs the node again."""
    node = Node()
    serde = EncryptedSerializer.from_pycryptodome_aes(key=b"0" * 16) if encrypted else None
    last = MemoryCache(clock=clock)
    caches = [TieredCache(MemoryCache(clock=clock, serde=serde), last) for _ in range(4)]
    graphs = [build(node, cache, replace(policy, jitter=0.9)) for cache in caches]
    monkeypatch.setattr("random.random", lambda: 1.0)  # the shortest life: one second
    for graph in graphs:
        assert graph.invoke(ASK)["answer"] == 1
    monkeypatch.setattr("random.random", lambda: 0.0)
    clock.advance(2)
    for graph in graphs:
        graph.invoke(ASK)
        until(lambda graph=graph: idle(graph))  # type: ignore[misc]
    assert [graph.invoke(ASK)["answer"] for graph in graphs] == [2] * 4
    assert node.runs == 2


@pytest.mark.parametrize("inside", [False, True])
def test_what_a_refresh_makes_for_a_thread_goes_with_it(inside: bool, clock: Clock) -> None:
    """Items made in the background are the thread's, as those made by its runs are."""
    made: list[int] = []

    def node(state: State) -> State:
        made.append(len(made))
        if len(made) == 1:  # or else the inner graph's result would not be everybody's
            return {"answer": "first"}
        return {"answer": get_cache("items").get_or_set("k", lambda: "item")}

    policy = replace(STALE, key=["query"], scope="global" if inside else "thread")
    cache = MemoryCache(clock=clock)
    saver = None if inside else InMemorySaver()
    graph = build(node, cache, policy, name="first", checkpointer=saver)
    if inside:
        # what the outer node makes is a thread's, whatever the inner graph's nodes say
        inner, fresh = graph, CachePolicy(scope="thread", version=1)
        graph = build(lambda state: inner.invoke(ASK), cache, fresh, checkpointer=InMemorySaver())
    config: RunnableConfig = {"configurable": {"thread_id": "t"}}
    graph.invoke(ASK, config)
    clock.advance(11)
    if inside:
        graph.clear_cache()
    graph.invoke(ASK, config)
    until(lambda: len(made) == 2 and idle(graph))
    assert graph.perf.stats().items["items"].runs == 1
    graph.checkpointer.delete_thread("t")
    assert cache.stats().entries == (1 if inside else 0)
    cache.close()


def test_a_refresh_writes_to_no_thread(clock: Clock) -> None:
    """Not even where the node calls a graph with a checkpointer of which nobody can know."""
    saver = InMemorySaver()
    inner = StateGraph(State)
    inner.add_node("inner", lambda state: {"answer": "inner"})
    agents = {"a": inner.add_edge(START, "inner").compile(checkpointer=saver)}
    runs: list[int] = []

    def node(state: State) -> State:
        runs.append(1)
        return {"answer": agents["a"].invoke({"query": "for the inner one"})["answer"]}

    policy = replace(STALE, key=["query"])
    graph = build(node, MemoryCache(clock=clock), policy, checkpointer=saver)
    config: Any = {"configurable": {"thread_id": "t"}}
    graph.invoke(ASK, config)
    clock.advance(11)
    graph.invoke(ASK, config)
    until(lambda: idle(graph))
    assert len(runs) == 2
    state = graph.get_state(config)
    assert (state.values["query"], state.next) == ("q", ())


@pytest.mark.parametrize("is_async", [False, True])
async def test_a_stale_result_in_the_place_of_an_error_is_streamed_whole(
    clock: Clock, is_async: bool
) -> None:
    """If a part of the failed run was given out before, the error is."""
    node = Node()
    graph = build(node.awaited if is_async else node, MemoryCache(clock=clock), PATIENT)

    async def events() -> list[Any]:
        return [
            event["data"]["chunk"]
            async for event in graph.astream_events(ASK, version="v2")
            if event["event"] == "on_chain_stream" and event["name"] == "LangGraph"
        ]

    assert await events() == [{"node": {"answer": 1}}]
    clock.advance(11)
    node.error = ConnectionError("down")
    assert await events() == [{"node": {"answer": 1}}]


def test_a_part_of_a_failed_run_is_no_result(clock: Clock) -> None:
    """A node that had streamed something when it failed fails, stale result or not."""
    from langchain_core.runnables import RunnableGenerator

    failing = threading.Event()

    async def chunks(inputs: AsyncIterator[Any]) -> AsyncIterator[dict[str, str]]:
        async for _ in inputs:
            yield {"answer": "The dose is 1"}
            if failing.is_set():
                raise ConnectionError("down")
            yield {"answer": "00 mg"}

    builder = StateGraph(State)
    builder.add_node("node", RunnableGenerator(chunks), cache_policy=PATIENT)
    graph = builder.add_edge(START, "node").compile(cache=MemoryCache(clock=clock))

    async def run() -> None:
        async for _ in graph.astream_events(ASK, version="v2"):
            pass

    asyncio.run(run())
    clock.advance(11)
    failing.set()
    with pytest.raises(ConnectionError):
        asyncio.run(run())


def test_a_hung_refresh_keeps_nobody_waiting(timed: Cache, clock: Clock) -> None:
    """Who has nothing to serve runs the node, whatever hangs in the background."""
    node = Node()
    graph = build(node, timed)
    graph.invoke(ASK)
    clock.advance(11)
    node.gate.clear()
    graph.invoke(ASK)
    until(lambda: node.runs == 2)
    hung, node.gate = node.gate, threading.Event()
    node.gate.set()
    clock.advance(61)
    assert graph.invoke(ASK)["answer"] == 3
    hung.set()
    until(lambda: idle(graph))
    assert graph.invoke(ASK)["answer"] == 3  # the older run is not stored over the newer one


@pytest.mark.parametrize("closed", [True, False])
def test_a_loop_that_has_stopped_keeps_nobody_waiting(
    timed: Cache, clock: Clock, closed: bool
) -> None:
    """Its refreshes never end; others run instead."""
    node = Node()
    graph = build(node.awaited, timed)
    asyncio.run(graph.ainvoke(ASK))
    clock.advance(11)
    node.gate.clear()

    async def ask() -> None:
        await graph.ainvoke(ASK)
        await auntil(lambda: node.runs == 2)

    loop = asyncio.new_event_loop()
    loop.run_until_complete(ask())
    tasks = asyncio.all_tasks(loop)
    if closed:
        loop.run_until_complete(loop.shutdown_asyncgens())  # a connection of its own, say
        loop.close()
    node.gate.set()
    clock.advance(61)
    assert asyncio.run(graph.ainvoke(ASK))["answer"] == 3
    clock.advance(11)

    async def again() -> Any:
        answer = (await graph.ainvoke(ASK))["answer"]
        await auntil(lambda: idle(graph))
        return answer

    assert asyncio.run(again()) == 3
    assert node.runs == 4
    if not closed:
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
    else:
        for task in tasks:
            task._log_destroy_pending = False  # type: ignore[attr-defined]


async def test_a_sync_node_is_refreshed_in_a_thread(clock: Clock) -> None:
    """``aclose`` waits for it: a task could be cancelled, its thread could not."""
    node = Node()
    graph = build(node, MemoryCache(clock=clock))
    await graph.ainvoke(ASK)
    clock.advance(11)
    node.gate.clear()
    await graph.ainvoke(ASK)
    await auntil(lambda: node.runs == 2)
    closing = asyncio.create_task(graph.perf.aclose())
    for _ in range(5):
        await asyncio.sleep(0)
    assert not closing.done()
    node.gate.set()
    await closing
    assert idle(graph)


def test_a_program_ends_while_a_refresh_hangs() -> None:
    """What runs in the background keeps no interpreter alive."""
    code = """
        import threading
        from langgraph.graph import START
        from langgraph_perf import CachePolicy, MemoryCache, StateGraph
        from langgraph_perf.testing import Clock
        runs, clock = [], Clock()
        started = threading.Event()
        def node(state):
            runs.append(1)
            if len(runs) > 1:
                started.set()
                threading.Event().wait(60)
            return {"x": 1}
        policy = CachePolicy(ttl=10, stale_while_revalidate=60, version=1)
        builder = StateGraph(dict)
        builder.add_node("node", node, cache_policy=policy)
        graph = builder.add_edge(START, "node").compile(cache=MemoryCache(clock=clock))
        graph.invoke({"q": 1})
        clock.advance(11)
        graph.invoke({"q": 1})
        assert started.wait(20)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=100)


def test_a_fresh_result_below_comes_before_a_stale_one_above(tmp_path: Path, clock: Clock) -> None:
    """What another process has computed is used rather than computed again."""
    node, other = Node(), Node()
    with DiskCache(tmp_path, clock=clock) as disk, DiskCache(tmp_path, clock=clock) as disk2:
        graph = build(node, TieredCache(MemoryCache(clock=clock), disk))
        graph2 = build(other, TieredCache(MemoryCache(clock=clock), disk2), PATIENT)
        graph.invoke(ASK)
        assert graph2.invoke(ASK)["answer"] == 1
        clock.advance(11)
        graph.invoke(ASK)
        until(lambda: idle(graph))
        assert node.runs == 2
        assert graph2.invoke(ASK)["answer"] == 2
        assert other.runs == 0
        graph.cache.close()
        graph2.cache.close()


def test_listeners_of_the_run_hear_nothing_of_a_refresh(clock: Clock) -> None:
    """Not those in LangChain's context variables either, which others may pay by."""
    from langchain_core.callbacks import get_usage_metadata_callback
    from langchain_core.language_models import FakeMessagesListChatModel
    from langchain_core.messages import AIMessage

    usage = {"input_tokens": 1, "output_tokens": 1, "total_tokens": 2}
    metadata = {"model_name": "m"}
    said = AIMessage("a", usage_metadata=usage, response_metadata=metadata)  # type: ignore[arg-type]
    model = FakeMessagesListChatModel(responses=[said])
    graph = build(lambda state: {"answer": model.invoke("q").content}, MemoryCache(clock=clock))
    graph.invoke(ASK)
    clock.advance(11)
    with get_usage_metadata_callback() as paid:
        graph.invoke(ASK)
        until(lambda: idle(graph))
    assert graph.perf.stats().nodes["node"].runs == 2
    assert not paid.usage_metadata


@pytest.mark.parametrize("is_async", [False, True])
async def test_retries_come_before_stale_results(clock: Clock, is_async: bool) -> None:
    """A node that its retry policy would run again is run again."""
    runs: list[int] = []

    def node(state: State) -> State:
        runs.append(1)
        if len(runs) in (2, 4, 5):
            raise ConnectionError("once")
        return {"answer": len(runs)}

    async def anode(state: State) -> State:
        return node(state)

    builder = StateGraph(State)
    retry = RetryPolicy(max_attempts=2, initial_interval=0.001, jitter=False)
    builder.add_node("node", anode if is_async else node, cache_policy=PATIENT, retry_policy=retry)
    graph = builder.add_edge(START, "node").compile(cache=MemoryCache(clock=clock))

    async def ask() -> Any:
        state = await graph.ainvoke(ASK) if is_async else graph.invoke(ASK)
        return state["answer"]

    assert await ask() == 1
    clock.advance(11)
    assert await ask() == 3
    clock.advance(11)
    assert await ask() == 3  # both attempts failed
    assert len(runs) == 5


def test_what_is_made_of_a_stale_result_is_not_stored(clock: Clock) -> None:
    """It would be served as fresh for a ttl of its own."""
    inner_node, outer_runs = Node(), []
    cache = MemoryCache(clock=clock)
    inner = build(inner_node, cache)

    def outer(state: State) -> State:
        outer_runs.append(1)
        return {"answer": inner.invoke(ASK)["answer"]}

    graph = build(outer, cache, CachePolicy(ttl=5, version=2))
    assert graph.invoke(ASK)["answer"] == 1
    clock.advance(11)
    assert graph.invoke(ASK)["answer"] == 1
    until(lambda: idle(graph) and idle(inner))
    assert graph.perf.stats().nodes["node"].refusals == {"stale_inside": 1}
    assert graph.invoke(ASK)["answer"] == 2
    assert graph.invoke(ASK)["answer"] == 2
    assert len(outer_runs) == 3


async def test_a_result_made_while_being_cancelled_is_not_stored(cache: Cache) -> None:
    """Who swallows a cancellation may return half a result: it answers nobody else."""
    if sys.version_info < (3, 11):
        pytest.skip("tasks do not count their cancellations")
    runs: list[int] = []

    async def node(state: State) -> State:
        runs.append(1)
        if len(runs) == 1:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                return {"answer": "PARTIAL"}
        return {"answer": "whole"}

    builder = StateGraph(State)
    builder.add_node("node", node, cache_policy=CachePolicy(version=1))
    graph = builder.add_edge(START, "node").compile(cache=cache)
    task = asyncio.create_task(graph.ainvoke(ASK))
    await auntil(lambda: runs == [1])
    task.cancel()
    await asyncio.wait([task])
    assert (await graph.ainvoke(ASK))["answer"] == "whole"


def test_override_of_an_inner_graph_taints_the_outer_one(clock: Clock) -> None:
    """What a graph makes of a fake in another one is not stored, and nothing stored hides it."""
    inner_builder = StateGraph(State)

    def model_name(state: State, model: str) -> State:
        return {"answer": model}

    inner_builder.add_node("inner", model_name, resources=["model"])
    inner = inner_builder.add_edge(START, "inner").compile(
        resources={"model": Shared(lambda: "REAL")}
    )

    def calls(state: State) -> State:
        return {"answer": inner.invoke(state)["answer"]}

    for node in (calls, inner):
        with MemoryCache() as cache:
            graph = build(node, cache, CachePolicy(version=1))
            with inner.perf.override(model="FAKE"):
                assert graph.invoke(ASK)["answer"] == "FAKE"
            assert graph.invoke(ASK)["answer"] == "REAL"
            if node is inner:  # which the outer graph knows
                with inner.perf.override(model="FAKE"):
                    assert graph.invoke(ASK)["answer"] == "FAKE"
    inner.perf.close()


def test_overrides_that_overlap_end_with_their_own_blocks() -> None:
    """In whichever order several threads leave them."""
    builder = StateGraph(State)
    builder.add_node("node", lambda state, model: {"answer": model}, resources=["model"])
    real = {"model": Shared(lambda: "real")}
    graph = builder.add_edge(START, "node").compile(resources=real)
    first, second = graph.perf.override(model="a"), graph.perf.override(model="b")
    first.__enter__()
    second.__enter__()
    assert graph.invoke({})["answer"] == "b"
    first.__exit__(None, None, None)
    assert graph.invoke({})["answer"] == "b"
    second.__exit__(None, None, None)
    assert graph.invoke({})["answer"] == "real"
    graph.perf.close()


def test_nothing_is_left_of_a_call(clock: Clock) -> None:
    """A call with a patient policy is freed when it ends, without the garbage collector."""

    class Held:
        def __deepcopy__(self, memo: Any) -> Held:
            return self

    graph = build(
        lambda state: {"answer": 1}, MemoryCache(clock=clock), replace(PATIENT, key=["query"])
    )
    held = Held()
    ref = weakref.ref(held)
    graph.invoke({"query": "q", "items": held})
    graph.invoke({"query": "q", "items": held})
    gc.collect()
    gc.disable()
    try:
        other = Held()
        ref = weakref.ref(other)
        graph.invoke({"query": "q", "items": other})
        del other
        assert ref() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("is_async", [False, True])
async def test_a_refresh_that_exits_ends_nothing_else(clock: Clock, is_async: bool) -> None:
    """``SystemExit`` in the background is a failed refresh, and not the end of the event loop."""
    node = Node()
    graph = build(node.awaited if is_async else node, MemoryCache(clock=clock))
    await graph.ainvoke(ASK)
    clock.advance(11)
    node.error = SystemExit(3)
    assert (await graph.ainvoke(ASK))["answer"] == 1
    await auntil(lambda: idle(graph))
    assert graph.perf.stats().nodes["node"].refusals == {"refresh_failed": 1}


def test_graphs_that_share_a_cache_refresh_a_key_once(clock: Clock) -> None:
    """Compiled from one builder, say for each request, they find each other's runs."""
    node = Node()
    with MemoryCache(clock=clock) as cache:
        graphs = [build(node, cache) for _ in range(5)]
        for graph in graphs:
            assert graph.invoke(ASK)["answer"] == 1
        clock.advance(11)
        node.gate.clear()
        for graph in graphs:
            assert graph.invoke(ASK)["answer"] == 1
        until(lambda: node.runs == 2)
        node.gate.set()
        until(lambda: all(idle(graph) for graph in graphs))
        assert node.runs == 2
        assert graphs[-1].invoke(ASK)["answer"] == 2


@pytest.mark.parametrize("how", ["cancelled", "failing", "blocking"])
async def test_closing_ends_the_background_whatever_becomes_of_resources(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Runs in the background end also if closing the resources is interrupted, or fails."""
    node = Node()
    graph = build(node.awaited, MemoryCache(clock=clock), resources={"db": Shared(object)})
    await graph.ainvoke(ASK)
    clock.advance(11)
    node.gate.clear()
    await graph.ainvoke(ASK)
    await auntil(lambda: node.runs == 2)
    (run,) = graph.perf.refreshes._running.values()
    begun = asyncio.Event()

    async def aclose() -> None:
        begun.set()
        if how == "failing":
            raise OSError("close")
        await asyncio.Event().wait()

    def close() -> None:
        raise OSError("close")

    monkeypatch.setattr(graph.perf.registry, "aclose", aclose)
    monkeypatch.setattr(graph.perf.registry, "close", close)
    if how == "blocking":
        with pytest.raises(OSError, match="close"):
            graph.perf.close()
    else:
        closing = asyncio.create_task(graph.perf.aclose())
        await begun.wait()
        # before the rest, which may take its time
        await asyncio.wait([run], timeout=20)
        assert run.cancelled()
        closing.cancel() if how == "cancelled" else None
        with pytest.raises((OSError, asyncio.CancelledError)):
            await closing
    await asyncio.wait([run], timeout=20)
    assert run.cancelled()
    assert idle(graph)
    await graph.ainvoke(ASK)
    assert idle(graph)


def test_closing_while_a_run_in_the_background_is_being_started(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not begin any more: nothing outlives ``close``."""
    node, start = Node(), threading.Thread.start
    graph = build(node, MemoryCache(clock=clock))
    graph.invoke(ASK)
    clock.advance(11)
    starting, closing = threading.Event(), threading.Event()

    def slowly(thread: threading.Thread) -> None:
        if thread.name == "langgraph-perf-refresh":
            starting.set()
            assert closing.wait(20)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", slowly)
    with ThreadPoolExecutor(2) as pool:
        stale = pool.submit(graph.invoke, ASK)
        assert starting.wait(20)
        closed = pool.submit(graph.perf.close)
        until(lambda: graph.perf.refreshes._closed)
        assert not closed.done()
        closing.set()
        closed.result(20)
        assert stale.result(20)["answer"] == 1
    assert node.runs == 1
    assert idle(graph)


def test_a_run_in_the_background_holds_no_lease_beyond_its_window(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then nobody takes a stale result any more: others run the node themselves."""
    limits: list[float] = []
    monkeypatch.setattr(_heartbeat, "keep", lambda cache, lease, limit: limits.append(limit))
    monkeypatch.setattr(_heartbeat, "drop", lambda lease: None)
    node = Node()
    with DiskCache(tmp_path / "cache", clock=clock) as cache:
        graph = build(node, cache)
        graph.invoke(ASK)
        clock.advance(11)
        graph.invoke(ASK)
        until(lambda: node.runs == 2 and idle(graph))
    assert limits == [math.inf, STALE.stale_while_revalidate]
