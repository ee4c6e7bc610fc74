"""Checkpoints say which nodes of their step were answered from the cache, and nothing else new."""

from __future__ import annotations

import operator
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any
from uuid import uuid4

import pytest
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.graph import START
from langgraph.graph import StateGraph as LangGraphStateGraph
from langgraph.types import Command, Send, interrupt
from typing_extensions import TypedDict

from langgraph_perf import CachePolicy, DiskCache, MemoryCache, StateGraph
from langgraph_perf._provenance import CHANNEL, Ledger, _Served
from langgraph_perf.testing import Clock

from ..resources.helpers import until
from .savers import drivers, opened, place


class State(TypedDict, total=False):
    query: str
    found: Annotated[list[str], operator.add]


class Keeping(InMemorySaver):
    """Knows of which threads a node's result is kept. Where a node fails, LangGraph may stop the
    step before what the node beside it did is: the one that fails waits for that."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: set[str] = set()

    def put_writes(self, config: Any, writes: Any, *args: Any) -> None:
        super().put_writes(config, writes, *args)
        if any(channel == "found" for channel, _ in writes):
            self._kept.add(config["configurable"]["thread_id"])

    def wait(self, config: Any) -> None:
        until(lambda: config["configurable"]["thread_id"] in self._kept)


@contextmanager
def saver_of(kind: str, dsn: str) -> Iterator[Any]:
    if kind == "memory":
        yield InMemorySaver()
    elif kind == "sqlite":
        with SqliteSaver.from_conn_string(":memory:") as sqlite:
            yield sqlite
    else:
        with PostgresSaver.from_conn_string(dsn) as postgres:
            postgres.setup()
            yield postgres


def two_nodes(graph: type[Any], saver: Any, **kwargs: Any) -> Any:
    policy = {"cache_policy": CachePolicy(key=["query"])} if kwargs else {}
    builder = graph(State)
    builder.add_node("cached", lambda state: {"found": ["c"]}, **policy)
    builder.add_node("plain", lambda state: {"found": ["p"]})
    builder.add_edge(START, "cached").add_edge("cached", "plain")
    return builder.compile(checkpointer=saver, **kwargs)


def told(graph: Any, thread: str) -> list[Any]:
    """What each checkpoint of ``thread`` says of the cache, oldest first."""
    history = list(graph.get_state_history({"configurable": {"thread_id": thread}}))
    return [snapshot.metadata.get("langgraph_perf") for snapshot in reversed(history)]


@pytest.mark.parametrize("kind", ["memory", "sqlite", "postgres"])
@pytest.mark.parametrize("durability", ["sync", "async"])
def test_history_tells_what_came_from_the_cache(kind: str, durability: Any, postgres: str) -> None:
    """Per step: node, key digest, age and code version; and only where a node was served."""
    with saver_of(kind, postgres) as saver:
        clock = Clock()
        graph = two_nodes(StateGraph, saver, cache=MemoryCache(clock=clock))
        first, second = f"{durability} cold", f"{durability} warm"
        for thread in (first, second):
            graph.invoke(
                {"query": "q"}, {"configurable": {"thread_id": thread}}, durability=durability
            )
            clock.advance(90)
        assert told(graph, first) == [None] * 4
        before, start, cached, after = told(graph, second)
        assert (before, start, after) == (None, None, None)
        (node,) = cached["cached"].items()
        name, told_of = node
        assert name == "cached"
        assert told_of["count"] == 1
        assert told_of["code"] == graph.perf.specs["cached"].code
        (hit,) = told_of["hits"]
        assert (hit["step"], hit["age_seconds"]) == (1, 90.0)
        assert len(hit["key"]) >= 32


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
async def test_history_tells_it_awaited(kind: str, postgres: str) -> None:
    """The asynchronous savers tell the same."""
    opened: Any = (
        AsyncSqliteSaver.from_conn_string(":memory:")
        if kind == "sqlite"
        else AsyncPostgresSaver.from_conn_string(postgres)
    )
    async with opened as saver:
        await saver.setup()
        graph = two_nodes(StateGraph, saver, cache=MemoryCache())
        for thread in ("async a", "async b"):
            config = {"configurable": {"thread_id": thread}}
            await graph.ainvoke({"query": "q"}, config)
        history = [snapshot async for snapshot in graph.aget_state_history(config)]
        said = [list(s.metadata.get("langgraph_perf", {}).get("cached", ())) for s in history]
        assert said == [[], ["cached"], [], []]


def test_nothing_else_in_metadata_changes() -> None:
    """Without the one key, metadata are those of plain LangGraph."""
    histories = []
    for graph in (
        two_nodes(LangGraphStateGraph, InMemorySaver()),
        two_nodes(StateGraph, InMemorySaver(), cache=MemoryCache()),
    ):
        for thread in ("a", "b"):
            config = {"configurable": {"thread_id": thread, "user": "u"}, "metadata": {"m": 1}}
            graph.invoke({"query": "q"}, config)
        metadata = [dict(s.metadata) for s in graph.get_state_history(config)]
        for found in metadata:
            found.pop("langgraph_perf", None)
        histories.append(metadata)
    assert histories[0] == histories[1]


def test_a_run_that_writes_one_checkpoint_tells_of_all_its_steps() -> None:
    """``durability="exit"``: the only checkpoint names the steps of the nodes."""
    graph = two_nodes(StateGraph, InMemorySaver(), cache=MemoryCache())
    for thread in ("a", "b"):
        config: Any = {"configurable": {"thread_id": thread}}
        graph.invoke({"query": "q"}, config, durability="exit")
    (only,) = told(graph, "b")
    assert [hit["step"] for hit in only["cached"]["cached"]["hits"]] == [1]


def test_a_wide_step_is_told_in_short() -> None:
    """The number of all, and the keys of the first hundred."""
    builder = StateGraph(State)
    builder.add_node("one", lambda state: {"found": [state["query"]]}, cache_policy=CachePolicy())
    builder.add_conditional_edges(
        START, lambda state: [Send("one", {"query": str(i)}) for i in range(120)], ["one"]
    )
    graph: Any = builder.compile(checkpointer=InMemorySaver(), cache=MemoryCache())
    for thread in ("a", "b"):
        graph.invoke({"query": "q"}, {"configurable": {"thread_id": thread}})
    node = told(graph, "b")[-1]["cached"]["one"]
    assert (node["count"], len(node["hits"])) == (120, 100)


def test_a_hit_beside_a_question_is_told_when_the_step_ends() -> None:
    """The human answers in another run, whose checkpoint tells of the first one's hit."""
    builder = StateGraph(State)
    builder.add_node(
        "cached", lambda state: {"found": ["c"]}, cache_policy=CachePolicy(key=["query"])
    )
    builder.add_node("ask", lambda state: {"found": [interrupt("?")]})
    builder.add_edge(START, "cached").add_edge(START, "ask")
    graph: Any = builder.compile(checkpointer=InMemorySaver(), cache=MemoryCache())
    for thread in ("a", "b"):
        config: Any = {"configurable": {"thread_id": thread}}
        graph.invoke({"query": "q"}, config)
        graph.invoke(Command(resume="yes"), config)
    assert told(graph, "a")[-1] is None
    assert list(told(graph, "b")[-1]["cached"]) == ["cached"]


def test_graphs_inside_tell_in_their_own_checkpoints() -> None:
    """A subgraph's checkpoints name its nodes, the outer one's its own."""
    inner = StateGraph(State)
    inner.add_node("deep", lambda state: {"found": ["d"]}, cache_policy=CachePolicy(key=["query"]))
    inner.add_edge(START, "deep")
    builder = StateGraph(State)
    builder.add_node("sub", inner.compile())
    builder.add_edge(START, "sub")
    saver = InMemorySaver()
    graph: Any = builder.compile(checkpointer=saver, cache=MemoryCache())
    for thread in ("a", "b"):
        graph.invoke({"query": "q"}, {"configurable": {"thread_id": thread}})
    said = {
        found.config["configurable"]["checkpoint_ns"].partition(":")[0]: list(
            found.metadata["langgraph_perf"]["cached"]
        )
        for found in saver.list({"configurable": {"thread_id": "b"}})
        if "langgraph_perf" in found.metadata
    }
    assert said == {"sub": ["deep"]}


def test_a_checkpoint_that_fails_is_told_again() -> None:
    """What could not be written is told in the next attempt."""

    class Fails(InMemorySaver):
        failures = 1

        def put(self, config: Any, checkpoint: Any, metadata: Any, versions: Any) -> Any:
            if "langgraph_perf" in metadata and self.failures:
                self.failures -= 1
                raise ConnectionError("away")
            return super().put(config, checkpoint, metadata, versions)

    graph = two_nodes(StateGraph, Fails(), cache=MemoryCache())
    graph.invoke({"query": "q"}, {"configurable": {"thread_id": "a"}})
    config: Any = {"configurable": {"thread_id": "b"}}
    with pytest.raises(ConnectionError):
        graph.invoke({"query": "q"}, config, durability="sync")
    graph.invoke(None, config)
    assert [list(said["cached"]) for said in told(graph, "b") if said] == [["cached"]]


def test_steps_that_never_end_are_not_remembered_for_ever() -> None:
    """The ledger is bounded, and empty once everything is told."""
    graph = two_nodes(StateGraph, InMemorySaver(), cache=MemoryCache())
    for thread in ("a", "b"):
        graph.invoke({"query": "q"}, {"configurable": {"thread_id": thread}})
    ledger = graph.checkpointer.provenance
    assert not ledger._steps
    for number in range(5000):
        config: Any = {"configurable": {"thread_id": number, "checkpoint_ns": "n:1"}}
        Ledger.add(ledger, config, _Served("n", "k", 0.0, "c", None))
    assert len(ledger._steps) == 4096


@pytest.mark.parametrize("how", ["fork", "update"])
def test_what_is_not_the_steps_own_checkpoint_tells_nothing(how: str) -> None:
    """A sibling failed, so the step has no checkpoint; a fork or an edit of the last is not it."""
    builder = StateGraph(State)
    builder.add_node("cached", lambda s: {"found": ["c"]}, cache_policy=CachePolicy(key=["query"]))
    failing, saver = [False], Keeping()

    def sibling(state: State, config: RunnableConfig) -> State:
        if failing[0]:
            saver.wait(config)
            raise ValueError("no")
        return {"found": ["s"]}

    builder.add_node("sibling", sibling)
    builder.add_edge(START, "cached").add_edge(START, "sibling")
    graph: Any = builder.compile(checkpointer=saver, cache=MemoryCache())
    graph.invoke({"query": "q"}, {"configurable": {"thread_id": "a"}})
    failing[0] = True
    config: Any = {"configurable": {"thread_id": "b"}}
    with pytest.raises(ValueError, match="no"):
        graph.invoke({"query": "q"}, config)
    failing[0] = False
    latest = graph.get_state(config).config
    if how == "update":
        graph.update_state(config, {"found": ["u"]}, as_node="sibling")
    else:
        latest["configurable"]["cache_control"] = {"mode": "bypass"}
        graph.invoke(None, latest)
    assert told(graph, "b") == [None] * len(told(graph, "b"))
    graph.checkpointer.delete_thread("b")
    assert not graph.checkpointer.provenance._steps


def test_another_graph_on_the_saver_tells_of_the_hits_before_a_question() -> None:
    """A server may compile the graph for each request: another one ends the step that stopped."""
    saver = InMemorySaver()

    def build_one(cache: MemoryCache) -> Any:
        builder = StateGraph(State)
        policy = CachePolicy(version=1, key=["query"])
        builder.add_node("work", lambda state: {"found": ["work"]}, cache_policy=policy)
        builder.add_node("ask", lambda state: {"found": [interrupt("?")]})
        builder.add_edge(START, "work").add_edge(START, "ask")
        return builder.compile(checkpointer=saver, cache=cache)

    with MemoryCache() as cache:
        graph = build_one(cache)
        graph.invoke({"query": "q"}, {"configurable": {"thread_id": "warm"}})
        config: Any = {"configurable": {"thread_id": "t"}}
        graph.invoke({"query": "q"}, config)
        other = build_one(cache)
        other.invoke(Command(resume="yes"), config)
        assert other.get_state(config).metadata["langgraph_perf"]["cached"].keys() == {"work"}


def beside(how: str, saver: Any, cache: Any, graph: type[Any] = StateGraph) -> Any:
    """A node that hits, beside one that asks, fails or kills its process."""
    policy = {} if cache is None else {"cache_policy": CachePolicy(version=1, key=["query"])}
    builder = graph(State)
    builder.add_node("cached", lambda state: {"found": ["c"]}, **policy)

    def other(state: State, config: RunnableConfig) -> State:
        if how == "fails":
            saver.wait(config)
            raise ValueError("no")
        return {"found": [interrupt("?") if how == "asks" else "o"]}

    builder.add_node("other", other)
    builder.add_edge(START, "cached").add_edge(START, "other")
    return builder.compile(checkpointer=saver, cache=cache)


def pending(saver: Any, config: Any) -> list[tuple[str, Any]]:
    """The channels and values of the pending writes of the latest checkpoint."""
    return [(channel, value) for _, channel, value in saver.get_tuple(config).pending_writes]


@pytest.mark.parametrize("durability", ["sync", "async", "exit"])
@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
@pytest.mark.parametrize("how", ["sync", "async"])
def test_a_hit_beside_a_question_is_told_by_another_process(
    kind: str, how: str, durability: Any, request: pytest.FixtureRequest
) -> None:
    """Who answers in a process of its own knows nothing of the first one's memory."""
    if how == "async" and sys.version_info < (3, 11):
        pytest.skip("LangGraph's interrupt() needs Python 3.11 in async graphs")
    thread = str(uuid4())
    config: Any = {"configurable": {"thread_id": thread}}
    at = place(kind, request)
    with MemoryCache() as cache, drivers(how) as driver:
        with opened(kind, driver, at) as saver:
            graph = beside("asks", saver, cache)
            driver.call(graph, "invoke", {"query": "q"}, {"configurable": {"thread_id": "warm"}})
            driver.call(graph, "invoke", {"query": "q"}, config, durability=durability)
        with opened(kind, driver, at) as saver:
            graph = beside("asks", saver, cache)
            answer = driver.call(graph, "invoke", Command(resume="yes"), config)
            assert sorted(answer["found"]) == ["c", "yes"]
            last, *earlier = driver.listed(graph, "get_state_history", config)
    (served,) = last.metadata["langgraph_perf"]["cached"].items()
    assert served[0] == "cached"
    assert served[1]["hits"][0]["step"] == 1
    assert all("langgraph_perf" not in snapshot.metadata for snapshot in earlier)


def test_a_real_other_process_tells_it(tmp_path: Path) -> None:
    """The one that hits is killed once it has asked; this one goes on, and tells."""
    program = """
import os, sys
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph_perf import DiskCache
from tests.checkpoint.test_provenance import beside

with SqliteSaver.from_conn_string(sys.argv[1]) as saver:
    graph = beside("asks", saver, DiskCache(sys.argv[2]))
    for thread in ("warm", "t"):
        graph.invoke({"query": "q"}, {"configurable": {"thread_id": thread}}, durability="sync")
    os._exit(9)
"""
    at, directory = str(tmp_path / "threads.db"), str(tmp_path / "cache")
    command = [sys.executable, "-c", program, at, directory]
    assert subprocess.run(command, timeout=120).returncode == 9
    config: Any = {"configurable": {"thread_id": "t"}}
    with SqliteSaver.from_conn_string(at) as saver, DiskCache(directory) as cache:
        graph = beside("asks", saver, cache)
        graph.invoke(Command(resume="yes"), config)
        assert list(told(graph, "t")[-1]["cached"]) == ["cached"]
        assert graph.perf.stats().nodes["cached"].hits == 0


@pytest.mark.parametrize("bare", [False, True], ids=["this library's graph", "plain LangGraph"])
def test_what_is_pending_of_a_hit_is_seen_by_nobody(bare: bool) -> None:
    """Neither ``get_tuple`` nor ``list`` give it; plain LangGraph goes on from there as ever."""
    saver = Keeping()
    config: Any = {"configurable": {"thread_id": "t"}}
    with MemoryCache() as cache:
        graph = beside("fails", saver, cache)
        for thread in ("warm", "t"):
            with pytest.raises(ValueError, match="no"):
                graph.invoke({"query": "q"}, {"configurable": {"thread_id": thread}})
        assert graph.perf.stats().nodes["cached"].hits == 1
        assert CHANNEL in dict(pending(saver, config))
        assert dict(pending(graph.checkpointer, config))["found"] == ["c"]
        assert CHANNEL not in dict(pending(graph.checkpointer, config))
        for found in graph.checkpointer.list(config):
            assert CHANNEL not in [channel for _, channel, _ in found.pending_writes]
        tasks = {task.name: task.result for task in graph.get_state(config).tasks}
        assert tasks["cached"] == {"found": ["c"]}
        going_on = (
            beside("", saver, None, LangGraphStateGraph) if bare else beside("", saver, cache)
        )
        assert going_on.get_state(config).next == ("other",)
        assert going_on.invoke(None, config)["found"] == ["c", "o"]
        if not bare:
            assert list(told(going_on, "t")[-1]["cached"]) == ["cached"]


def test_a_node_that_does_run_is_not_told_for_an_earlier_hit() -> None:
    """What it wrote then was lost, so the step is done again, and it runs."""

    class Loses(InMemorySaver):
        losing = False

        def put_writes(self, *args: Any) -> None:
            if self.losing:
                raise ConnectionError("away")
            super().put_writes(*args)

    saver = Loses()
    config: Any = {"configurable": {"thread_id": "t"}}
    with MemoryCache() as cache:
        graph = beside("asks", saver, cache)
        graph.invoke({"query": "q"}, {"configurable": {"thread_id": "warm"}})
        saver.losing = True
        with pytest.raises(ConnectionError):
            graph.invoke({"query": "q"}, config)
        assert graph.perf.stats().nodes["cached"].hits == 1
        saver.losing = False
        config["configurable"]["cache_control"] = {"mode": "refresh"}
        graph.invoke(None, config)
        graph.invoke(Command(resume="yes"), config)
        assert graph.perf.stats().nodes["cached"].hits == 1
        assert told(graph, "t") == [None] * len(told(graph, "t"))


def test_a_step_that_is_done_again_tells_what_the_second_time_did() -> None:
    """A fork begins where pending writes tell of a hit, and in it the node runs."""
    saver = Keeping()
    with MemoryCache() as cache:
        for thread in ("warm", "t"):
            with pytest.raises(ValueError, match="no"):
                beside("fails", saver, cache).invoke(
                    {"query": "q"}, {"configurable": {"thread_id": thread}}
                )
        other = InMemorySaver()  # as another process has it
        other.storage, other.writes, other.blobs = saver.storage, saver.writes, saver.blobs
        graph = beside("", other, cache)
        config = graph.get_state({"configurable": {"thread_id": "t"}}).config
        config["configurable"]["cache_control"] = {"mode": "refresh"}
        graph.invoke(None, config)
        assert graph.perf.stats().nodes["cached"].runs == 1
        assert told(graph, "t") == [None] * len(told(graph, "t"))


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
@pytest.mark.parametrize("how", ["fails", "asks"])
@pytest.mark.parametrize("bare", [False, True], ids=["this library's graph", "plain LangGraph"])
def test_a_hit_whose_router_stops_is_no_hit_yet(
    kind: str, how: str, bare: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The task is not done: it is done again, whoever goes on, and all it then writes is kept."""
    sibling_is_kept = threading.Event()  # or LangGraph may stop the step before it is
    for saver_type in (InMemorySaver, SqliteSaver):

        def put_writes(*args: Any, original: Any = saver_type.put_writes) -> None:
            original(*args)
            if ("found", ["s"]) in args[2]:
                sibling_is_kept.set()

        monkeypatch.setattr(saver_type, "put_writes", put_writes)

    def story(first: type[Any], second: type[Any]) -> Any:
        stops = {"router": False, "sibling": False}

        def route(state: State) -> list[str]:
            if stops["router"]:
                assert sibling_is_kept.wait(20)
            if how == "asks":
                if stops["router"] or interrupted:
                    interrupted.append("?")
                    interrupt("?")
            elif stops["router"]:
                raise ValueError("router")
            return ["c", "d"]

        def sibling(state: State) -> State:
            if stops["sibling"]:
                raise ValueError("sibling")
            return {"found": ["s"]}

        interrupted: list[str] = []

        def made(graph: type[Any]) -> Any:
            own = graph is StateGraph
            builder = graph(State)
            policy = {"cache_policy": CachePolicy(key=["query"])} if own else {}
            builder.add_node("a", lambda state: None, **policy).add_node("s", sibling)
            for name in ("c", "d"):
                builder.add_node(name, lambda state, name=name: {"found": [name]})
            builder.add_edge(START, "a").add_edge(START, "s")
            builder.add_conditional_edges("a", route, ["c", "d"])
            return builder.compile(checkpointer=saver, cache=cache if own else None)

        with saver_of(kind, "") as saver, MemoryCache() as cache:
            began, goes_on = made(first), made(second)
            config: Any = {"configurable": {"thread_id": "t"}}
            began.invoke({"query": "q"}, {"configurable": {"thread_id": "warm"}})
            stops.update(router=True)
            sibling_is_kept.clear()
            with suppress(ValueError):
                began.invoke({"query": "q"}, config)
            state = goes_on.get_state(config)
            asked = [i.value for task in state.tasks for i in task.interrupts]
            told_of = [state.next, asked]
            stops.update(router=False, sibling=how == "fails")
            with suppress(ValueError):
                goes_on.invoke(Command(resume="yes") if how == "asks" else None, config)
            stops.update(sibling=False)
            goes_on.invoke(None, config)
            return told_of, sorted(goes_on.get_state(config).values["found"])

    want = story(LangGraphStateGraph, LangGraphStateGraph)
    assert want[1] == ["c", "d", "s"]
    assert story(StateGraph, LangGraphStateGraph if bare else StateGraph) == want


@pytest.mark.parametrize("writes", [True, False])
@pytest.mark.parametrize("other", [True, False], ids=["another process", "this process"])
def test_a_hit_whose_router_fails_is_told_where_langgraph_takes_it_for_done(
    writes: bool, other: bool
) -> None:
    """If the node has written something, its task is not done again."""
    failing = False

    def route(state: State) -> str:
        if failing:
            raise ValueError("router")
        return "end"

    def made(saver: Any) -> Any:
        found = {"found": ["a"]} if writes else None
        builder = StateGraph(State)
        builder.add_node(
            "a", lambda state: found, cache_policy=CachePolicy(version=1, key=["query"])
        )
        builder.add_node("end", lambda state: None).add_edge(START, "a")
        builder.add_conditional_edges("a", route, ["end"])
        return builder.compile(checkpointer=saver, cache=cache)

    with MemoryCache() as cache:
        saver = InMemorySaver()
        graph = made(saver)
        graph.invoke({"query": "q"}, {"configurable": {"thread_id": "warm"}})
        config: Any = {"configurable": {"thread_id": "t"}}
        failing = True
        with pytest.raises(ValueError, match="router"):
            graph.invoke({"query": "q"}, config)
        failing = False
        if other:
            copy = InMemorySaver()
            copy.storage, copy.writes, copy.blobs = saver.storage, saver.writes, saver.blobs
            graph = made(copy)
        assert graph.get_state(config).next == (() if writes else ("a",))
        graph.invoke(None, config)
        (step,) = [snapshot for snapshot in told(graph, "t") if snapshot is not None]
        assert step["cached"]["a"]["count"] == 1
