"""One execution per key: threads, tasks, processes, failing leaders, nested calls (C1 to C3)."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from langgraph._internal._constants import CONFIG_KEY_RUNTIME
from langgraph.errors import NodeTimeoutError
from langgraph.graph import START
from langgraph.pregel import _retry
from langgraph.runtime import Runtime
from langgraph.types import RetryPolicy, TimeoutPolicy
from typing_extensions import TypedDict

from langgraph_perf import CachePolicy, DiskCache, MemoryCache, StateGraph, _flight, get_cache
from langgraph_perf._backend import Backend
from langgraph_perf.caches.base import Cache
from tests.conftest import IdleClock


class State(TypedDict, total=False):
    query: str
    answer: str


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Wait for what another thread is about to do."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.001)


async def auntil(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Wait for what another task or thread is about to do."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        await asyncio.sleep(0.001)


def build(node: Any, cache: Cache, **kwargs: Any) -> Any:
    builder = StateGraph(State)
    builder.add_node("node", node, cache_policy=CachePolicy(version=1), **kwargs)
    return builder.add_edge(START, "node").compile(cache=cache)


def waiting(cache: Cache) -> int:
    return Backend.of(cache).flights.waiting()


async def test_threads_and_tasks_share_one_run(cache: Cache) -> None:
    """Twenty threads and twenty tasks that ask for one key run the node once."""
    runs: list[int] = []
    release = threading.Event()

    def node(state: State) -> State:
        runs.append(1)
        release.wait(20)
        return {"answer": "done"}

    graph = build(node, cache)
    with ThreadPoolExecutor(20) as pool:
        threads = [pool.submit(graph.invoke, {"query": "q"}) for _ in range(20)]
        tasks = [asyncio.create_task(graph.ainvoke({"query": "q"})) for _ in range(20)]
        await auntil(lambda: waiting(cache) == 39)
        release.set()
        answers = [(await task)["answer"] for task in tasks]
        answers += [thread.result(20)["answer"] for thread in threads]
    assert answers == ["done"] * 40
    assert len(runs) == 1
    assert graph.perf.stats().nodes["node"].coalesced == 39


async def test_threads_tasks_and_processes_share_one_run(tmp_path: Path) -> None:
    """Twenty threads, twenty tasks and four processes that ask for one key run the node once."""
    script = textwrap.dedent(
        """
        import sys
        from langgraph.graph import START
        from typing_extensions import TypedDict
        from langgraph_perf import CachePolicy, DiskCache, StateGraph

        class State(TypedDict, total=False):
            query: str
            answer: str

        def node(state: State) -> State:
            print("ran")
            return {"answer": "wrong"}

        builder = StateGraph(State).add_node("node", node, cache_policy=CachePolicy(version=1))
        with DiskCache(sys.argv[1], timeout=20.0) as cache:
            graph = builder.add_edge(START, "node").compile(cache=cache)
            print("ready", flush=True)
            sys.stdin.readline()
            print("asking", flush=True)
            print(graph.invoke({"query": "q"})["answer"])
        """
    )
    runs: list[int] = []
    release = threading.Event()

    def node(state: State) -> State:
        runs.append(1)
        release.wait(30)
        return {"answer": "done"}

    with DiskCache(tmp_path / "cache") as cache, ThreadPoolExecutor(20) as pool:
        graph = build(node, cache)
        processes = [
            subprocess.Popen(  # noqa: ASYNC220 - nothing else runs on the loop yet
                [sys.executable, "-c", script, str(tmp_path / "cache")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(4)
        ]
        for process in processes:
            assert process.stdout
            assert await asyncio.to_thread(process.stdout.readline) == "ready\n"
        threads = [pool.submit(graph.invoke, {"query": "q"}) for _ in range(20)]
        tasks = [asyncio.create_task(graph.ainvoke({"query": "q"})) for _ in range(20)]
        await auntil(lambda: waiting(cache) == 39 and len(runs) == 1)
        for process in processes:
            assert process.stdin
            assert process.stdout
            process.stdin.write("go\n")
            process.stdin.flush()
            assert await asyncio.to_thread(process.stdout.readline) == "asking\n"
        release.set()
        answers = [(await task)["answer"] for task in tasks]
        answers += [thread.result(30)["answer"] for thread in threads]
        printed = [(await asyncio.to_thread(process.communicate))[0] for process in processes]
    assert answers == ["done"] * 40
    assert printed == ["done\n"] * 4
    assert len(runs) == 1


def test_a_killed_holder_is_replaced(tmp_path: Path) -> None:
    """A process that is killed while it computes delays the next one by its lease at the most."""
    script = textwrap.dedent(
        """
        import sys, time
        from langgraph.graph import START
        from typing_extensions import TypedDict
        from langgraph_perf import CachePolicy, DiskCache, StateGraph

        class State(TypedDict, total=False):
            query: str
            answer: str

        def node(state: State) -> State:
            print("running", flush=True)
            time.sleep(60)
            return {"answer": "never"}

        builder = StateGraph(State).add_node("node", node, cache_policy=CachePolicy(version=1))
        graph = builder.add_edge(START, "node").compile(
            cache=DiskCache(sys.argv[1], lease_seconds=1.0)
        )
        graph.invoke({"query": "q"})
        """
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "cache")], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout
    assert holder.stdout.readline() == "running\n"
    with DiskCache(tmp_path / "cache", lease_seconds=1.0) as cache:
        graph = build(lambda state: {"answer": "done"}, cache)
        holder.kill()
        holder.communicate()
        assert graph.invoke({"query": "q"})["answer"] == "done"


def test_a_leader_that_fails_is_followed_by_another(cache: Cache) -> None:
    """When the leader raises, only its own caller sees it; a follower runs and serves the rest."""
    runs: list[int] = []
    release = threading.Event()

    def node(state: State) -> State:
        runs.append(1)
        if len(runs) == 1:
            release.wait(20)
            raise ValueError("the first fails")
        return {"answer": "done"}

    graph = build(node, cache)
    with ThreadPoolExecutor(5) as pool:
        leader = pool.submit(graph.invoke, {"query": "q"})
        until(lambda: len(runs) == 1)
        followers = [pool.submit(graph.invoke, {"query": "q"}) for _ in range(4)]
        until(lambda: waiting(cache) == 4)
        release.set()
        with pytest.raises(ValueError, match="the first fails"):
            leader.result(20)
        assert [f.result(20)["answer"] for f in followers] == ["done"] * 4
    assert len(runs) == 2


async def test_a_cancelled_leader_is_followed_by_another(cache: Cache) -> None:
    """When the leader's task is cancelled, a follower takes over."""
    runs: list[int] = []
    started = asyncio.Event()

    async def node(state: State) -> State:
        runs.append(1)
        if len(runs) == 1:
            started.set()
            await asyncio.sleep(60)
        return {"answer": "done"}

    graph = build(node, cache)
    leader = asyncio.create_task(graph.ainvoke({"query": "q"}))
    await started.wait()
    followers = [asyncio.create_task(graph.ainvoke({"query": "q"})) for _ in range(3)]
    await auntil(lambda: waiting(cache) == 3)
    leader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leader
    assert [(await f)["answer"] for f in followers] == ["done"] * 3
    assert len(runs) == 2


async def test_a_cancelled_follower_is_forgotten(cache: Cache) -> None:
    """A follower that is cancelled is handed nothing, and nobody else notices."""
    runs: list[int] = []
    release = asyncio.Event()

    async def node(state: State) -> State:
        runs.append(1)
        await release.wait()
        return {"answer": "done"}

    graph = build(node, cache)
    leader = asyncio.create_task(graph.ainvoke({"query": "q"}))
    await auntil(lambda: len(runs) == 1)
    follower = asyncio.create_task(graph.ainvoke({"query": "q"}))
    other = asyncio.create_task(graph.ainvoke({"query": "q"}))
    await auntil(lambda: waiting(cache) == 2)
    follower.cancel()
    await auntil(lambda: waiting(cache) == 1)
    release.set()
    assert (await leader)["answer"] == (await other)["answer"] == "done"
    assert len(runs) == 1


async def test_leadership_handed_to_a_cancelled_follower_is_passed_on() -> None:
    """A follower cancelled in the very tick in which it is handed the lead passes it on."""
    table = _flight.FlightTable()
    flight, _ = table.join("k", _flight.AsyncWaiter)
    _, first = table.join("k", _flight.AsyncWaiter)
    _, second = table.join("k", _flight.AsyncWaiter)
    assert flight is not None
    assert first is not None
    assert second is not None
    table.abandoned(flight)
    assert isinstance(first.outcome, _flight.TakeOver)
    table.left(flight, first)  # what its cancellation does
    assert isinstance(second.outcome, _flight.TakeOver)
    table.abandoned(flight)
    assert len(table) == 0


def test_waiters_of_a_closed_loop_are_skipped() -> None:
    """A waiter whose event loop is gone is not handed the lead."""
    table = _flight.FlightTable()
    flight, _ = table.join("k", _flight.SyncWaiter)

    async def wait_and_leave() -> None:
        table.join("k", _flight.AsyncWaiter)

    asyncio.run(wait_and_leave())
    _, waiter = table.join("k", _flight.SyncWaiter)
    assert flight is not None
    assert waiter is not None
    table.abandoned(flight)
    assert isinstance(waiter.outcome, _flight.TakeOver)


class Collecting(_flight.SyncWaiter):
    """A waiter in whose making and waking a garbage collection ends lost calls."""

    def __init__(self, ends: Callable[[], object]) -> None:
        ends()
        super().__init__()
        self.ends = ends

    def wake(self) -> bool:
        self.ends()
        return super().wake()


def test_a_call_that_is_lost_in_the_middle_of_a_step_ends_after_it() -> None:
    """A garbage collection finalizes it on the thread that is at it, which must not wait for
    itself; the step does not see half of what the other does."""
    table = _flight.FlightTable()
    lost, _ = table.join("k", _flight.SyncWaiter)
    assert lost is not None
    once = iter([lost])
    _, first = table.join("k", lambda: Collecting(lambda: [*map(table.abandoned, once)]))
    assert first is not None
    assert isinstance(first.outcome, _flight.TakeOver)
    followers: list[_flight.Waiter] = []

    def ends() -> None:
        if len(followers) == 3:
            table.left(lost, followers[2])
            table.unblocked(lost, (lost,))
            table.supersede("k")
            assert table.join("k", _flight.SyncWaiter) == (None, None)

    for _ in range(3):
        _, follower = table.join("k", lambda: Collecting(ends))
        assert follower is not None
        followers.append(follower)
    table.disperse(lost)
    assert [type(each.outcome) for each in followers] == [_flight.Disperse] * 3
    assert len(table) == table.waiting() == 0


async def test_a_leader_that_times_out_is_followed_by_another(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LangGraph's timeout ends the leader's attempt; its retry and its followers go on."""
    runs: list[int] = []
    over = asyncio.Event()

    async def watchdog(seconds: float) -> None:
        """Time is over when the test says so, and for later attempts never: in real time those of
        a busy machine could time out as well."""
        await (asyncio.Event() if over.is_set() else over).wait()
        raise asyncio.TimeoutError

    monkeypatch.setattr(_retry, "_run_timeout_watchdog", watchdog)

    async def node(state: State) -> State:
        runs.append(1)
        if len(runs) == 1:
            await asyncio.sleep(60)
        return {"answer": "done"}

    graph = build(
        node,
        cache,
        timeout=TimeoutPolicy(run_timeout=0.5),
        retry_policy=RetryPolicy(initial_interval=0.01, jitter=False, retry_on=Exception),
    )
    tasks = [asyncio.create_task(graph.ainvoke({"query": "q"})) for _ in range(3)]
    await auntil(lambda: len(runs) == 1 and waiting(cache) == 2)
    over.set()
    assert [(await task)["answer"] for task in tasks] == ["done"] * 3
    assert 2 <= len(runs) <= 4  # followers that time out in the same tick run for themselves


@pytest.mark.parametrize("where", ["here", "elsewhere"])
async def test_a_follower_reports_progress_while_it_waits(
    where: str, tmp_path: Path, idle_clock: IdleClock
) -> None:
    """Whoever follows a run, of this process or another one, is not idle."""
    started, release = asyncio.Event(), asyncio.Event()
    runs: list[int] = []

    async def node(state: State) -> State:
        runs.append(1)
        started.set()
        await release.wait()
        return {"answer": "done"}

    timeout = TimeoutPolicy(idle_timeout=idle_clock.IDLE_TIMEOUT, refresh_on="heartbeat")
    with DiskCache(tmp_path / "cache") as cache, DiskCache(tmp_path / "cache") as other:
        leading = asyncio.create_task(build(node, cache).ainvoke({"query": "q"}))
        await started.wait()
        graph = build(node, cache if where == "here" else other, timeout=timeout)
        following = asyncio.create_task(graph.ainvoke({"query": "q"}))
        await idle_clock.outlast(following)
        release.set()
        assert await leading == await following == {"query": "q", "answer": "done"}
    assert runs == [1]


class Told(DiskCache):
    """A cache that claims to say when a lease is free, so that it is asked once a second."""

    notifies = True


@pytest.mark.parametrize("where", ["here", "elsewhere"])
async def test_a_follower_reports_often(where: str, tmp_path: Path, idle_clock: IdleClock) -> None:
    """So that an ``idle_timeout`` of a fraction of a second does not end its wait."""
    release = asyncio.Event()

    async def node(state: State) -> State:
        await release.wait()
        return {"answer": "done"}

    timeout = TimeoutPolicy(idle_timeout=60, refresh_on="heartbeat")
    with Told(tmp_path / "cache") as cache, Told(tmp_path / "cache") as other:
        leading = asyncio.create_task(build(node, cache).ainvoke({"query": "q"}))
        await auntil(lambda: len(Backend.of(cache).flights) == 1)
        graph = build(node, cache if where == "here" else other, timeout=timeout)
        following = asyncio.create_task(graph.ainvoke({"query": "q"}))
        await auntil(lambda: idle_clock.reports > 0)
        began = time.monotonic()
        await auntil(lambda: idle_clock.reports > 10)
        took = time.monotonic() - began
        release.set()
        assert await leading == await following == {"query": "q", "answer": "done"}
    assert took < 5


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_a_thread_that_follows_reports_often(where: str, tmp_path: Path) -> None:
    """Like a task; it may serve a node that has an ``idle_timeout``."""
    release = threading.Event()
    beats: list[int] = []

    def node(state: State) -> State:
        release.wait(30)
        return {"answer": "done"}

    config = {"configurable": {CONFIG_KEY_RUNTIME: Runtime(heartbeat=lambda: beats.append(1))}}
    with (
        Told(tmp_path / "cache") as cache,
        Told(tmp_path / "cache") as other,
        ThreadPoolExecutor(2) as pool,
    ):
        leading = pool.submit(build(node, cache).invoke, {"query": "q"})
        until(lambda: len(Backend.of(cache).flights) == 1)
        graph = build(node, cache if where == "here" else other)
        following = pool.submit(graph.invoke, {"query": "q"}, config)
        until(lambda: len(beats) > 0)
        began = time.monotonic()
        until(lambda: len(beats) > 10)
        took = time.monotonic() - began
        release.set()
        assert leading.result() == following.result() == {"query": "q", "answer": "done"}
    assert took < 5


async def test_a_body_that_reports_nothing_is_idle(
    memory: MemoryCache, idle_clock: IdleClock
) -> None:
    """Reports are for waiting: what a body itself does not report ends it, as ever."""

    async def node(state: State) -> State:
        idle_clock.now += 2 * idle_clock.IDLE_TIMEOUT
        await asyncio.sleep(60)
        return {"answer": "late"}

    timeout = TimeoutPolicy(idle_timeout=idle_clock.IDLE_TIMEOUT, refresh_on="heartbeat")
    with pytest.raises(NodeTimeoutError):
        await build(node, memory, timeout=timeout).ainvoke({"query": "q"})


def test_a_node_that_calls_itself_does_not_deadlock(cache: Cache) -> None:
    """A node that invokes its own graph with the same input runs in itself, and both end."""
    depth: list[int] = []

    def node(state: State) -> State:
        depth.append(1)
        if len(depth) < 3:
            return {"answer": graph.invoke({"query": "q"})["answer"] + "!"}
        return {"answer": "done"}

    graph = build(node, cache)
    assert graph.invoke({"query": "q"})["answer"] == "done!!"


def test_nodes_that_call_each_other_crosswise_do_not_deadlock(cache: Cache) -> None:
    """Two runs that each lead what the other one asks for both end."""
    both = threading.Barrier(2)

    def cross(state: State) -> State:
        other = {"a": "b", "b": "a"}.get(state["query"])
        if other is None or state.get("answer") == "inner":
            return {"answer": state["query"]}
        both.wait(20)
        return {"answer": graph.invoke({"query": other})["answer"]}

    inner_runs: list[str] = []

    def node(state: State) -> State:
        inner_runs.append(state["query"])
        if inner_runs.count(state["query"]) > 1:
            return {"answer": state["query"]}
        return cross(state)

    graph = build(node, cache)
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(graph.invoke, {"query": q}) for q in "ab"]
        assert {run.result(20)["query"] for run in runs} == {"a", "b"}


async def test_a_blocking_call_on_the_leaders_loop_does_not_deadlock(memory: MemoryCache) -> None:
    """Code that blocks the event loop with ``invoke`` does not wait for a leader on that loop."""
    started, release = asyncio.Event(), asyncio.Event()

    async def slow() -> None:
        started.set()
        await release.wait()

    def node(state: State) -> State:
        return {"answer": "sync"}

    async def anode(state: State) -> State:
        await slow()
        return {"answer": "async"}

    asynchronous, synchronous = build(anode, memory), build(node, memory)
    leader = asyncio.create_task(asynchronous.ainvoke({"query": "q"}))
    await started.wait()
    assert synchronous.invoke({"query": "q"})["answer"] == "sync"
    release.set()
    assert (await leader)["answer"] == "async"


async def test_threads_of_the_default_executor_do_not_starve_the_leader(
    memory: MemoryCache,
) -> None:
    """A leader that needs the loop's executor gets a thread though followers could fill it."""
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(2, thread_name_prefix="asyncio"))
    release = threading.Event()
    runs: list[int] = []

    def node(state: State) -> State:
        runs.append(1)
        if len(runs) == 1:
            release.wait(20)
        return {"answer": "done"}

    graph = build(node, memory)
    leader = asyncio.create_task(graph.ainvoke({"query": "q"}))
    await auntil(lambda: len(runs) == 1)
    calls = [asyncio.create_task(asyncio.to_thread(graph.invoke, {"query": "q"})) for _ in range(4)]
    await auntil(lambda: len(runs) >= 2)
    release.set()
    assert {(await call)["answer"] for call in (*calls, leader)} == {"done"}


def test_followers_get_values_of_their_own(memory: MemoryCache) -> None:
    """What a follower does to its result is its own affair."""
    release = threading.Event()
    runs: list[int] = []

    def node(state: Any) -> Any:
        runs.append(1)
        release.wait(20)
        return {"answer": ["done"]}

    graph = build(node, memory)
    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(graph.invoke, {"query": "q"}) for _ in range(3)]
        until(lambda: waiting(memory) == 2)
        release.set()
        values = [call.result(20)["answer"] for call in calls]
    values[0].append("changed")
    assert values[1] == values[2] == ["done"]
    assert graph.invoke({"query": "q"})["answer"] == ["done"]
    assert len(runs) == 1


def test_an_invalidation_reaches_followers(cache: Cache) -> None:
    """Who asks after an invalidation is not answered by a run that began before it (I1, I2)."""
    runs: list[int] = []
    release = threading.Event()

    def node(state: State) -> State:
        runs.append(1)
        if len(runs) == 1:
            release.wait(20)
            return {"answer": "old"}
        return {"answer": "new"}

    builder = StateGraph(State)
    builder.add_node("node", node, cache_policy=CachePolicy(version=1, tags=["docs"]))
    graph = builder.add_edge(START, "node").compile(cache=cache)
    with ThreadPoolExecutor(2) as pool:
        before = pool.submit(graph.invoke, {"query": "q"})
        until(lambda: len(runs) == 1)
        cache.invalidate("docs")
        after = pool.submit(graph.invoke, {"query": "q"})
        until(lambda: waiting(cache) == 1)
        release.set()
        assert before.result(20)["answer"] == "old"
        assert after.result(20)["answer"] == "new"
    assert graph.invoke({"query": "q"})["answer"] == "new"
    assert len(runs) == 2


def test_calls_inside_others_run_once_across_caches(tmp_path: Path) -> None:
    """Two caches on one directory are as two processes: an item that both of their nodes need, each
    in a computation of its own, is computed once."""
    computing, go_on = threading.Event(), threading.Event()
    computed: list[str] = []

    def compute() -> str:
        computed.append("item")
        computing.set()
        assert go_on.wait(20)
        return "item"

    def node(state: State) -> State:
        return {"answer": get_cache("items").get_or_set("k", compute)}

    with DiskCache(tmp_path / "cache") as cache, DiskCache(tmp_path / "cache") as other:
        first, second = build(node, cache), build(node, other)
        with ThreadPoolExecutor(2) as pool:
            leading = pool.submit(first.invoke, {"query": "one"})
            assert computing.wait(20)
            following = pool.submit(second.invoke, {"query": "two"})
            until(lambda: len(Backend.of(other).flights) == 2)  # the node's and the item's
            go_on.set()
            assert leading.result(20)["answer"] == following.result(20)["answer"] == "item"
    assert computed == ["item"]


def test_calls_inside_others_do_not_wait_for_ever(tmp_path: Path) -> None:
    """Whoever holds the lease may wait for the very computation that the call is part of."""
    with DiskCache(tmp_path / "cache", lease_seconds=0.3) as cache:
        graph = build(lambda state: {"answer": get_cache("items").get_or_set("k", str)}, cache)
        held: list[Any] = []
        acquire = cache.acquire

        def taken(key: Any) -> Any:
            if key[0][0] != "langgraph_perf.items":
                return acquire(key)
            held.append(key)
            return None

        cache.acquire = taken  # type: ignore[method-assign]
        assert graph.invoke({"query": "q"})["answer"] == ""
        assert len(held) > 1
