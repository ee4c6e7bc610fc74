"""The checkpointer of a compiled graph stands for the saver it was given, and does no more."""

from __future__ import annotations

import copy
import gc
import inspect
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.conformance import checkpointer_test, validate
from langgraph.checkpoint.conformance.capabilities import DetectedCapabilities
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.graph import START

from langgraph_perf import CachePolicy, MemoryCache, Pool, StateGraph
from langgraph_perf.checkpoint import PooledCheckpointer

from .test_threads import POLICY, Saver, State, build, counted, run


@asynccontextmanager
async def opened(kind: str, directory: Path, dsn: str) -> AsyncIterator[BaseCheckpointSaver[Any]]:
    """A fresh saver of the named kind."""
    if kind == "memory":
        yield InMemorySaver()
    elif kind == "capable":
        yield Saver()
    elif kind == "sqlite":
        async with AsyncSqliteSaver.from_conn_string(":memory:") as saver:
            yield saver
    else:
        async with AsyncPostgresSaver.from_conn_string(dsn) as postgres:
            await postgres.setup()
            yield postgres


def wrapped(saver: BaseCheckpointSaver[Any]) -> BaseCheckpointSaver[Any]:
    """``saver`` as a graph with a cache has it."""
    checkpointer: BaseCheckpointSaver[Any] = build(
        counted()[0], MemoryCache(), saver=saver
    ).checkpointer
    assert type(checkpointer) is not type(saver)
    return checkpointer


@pytest.mark.parametrize("kind", ["memory", "capable", "sqlite", "postgres"])
async def test_conformance(kind: str, tmp_path: Path, postgres: str) -> None:
    """LangGraph's conformance suite says of the wrapped saver what it says of the bare one."""
    reports = []
    for wrap in (False, True):

        @checkpointer_test(name=f"{kind} {wrap}")
        async def factory(wrap: bool = wrap) -> AsyncIterator[BaseCheckpointSaver[Any]]:
            async with opened(kind, tmp_path, postgres) as saver:
                yield wrapped(saver) if wrap else saver

        report = await validate(factory)
        reports.append(
            {
                name: (result.detected, result.passed, result.tests_passed, result.tests_failed)
                for name, result in report.results.items()
            }
        )
    bare, bound = reports
    assert bound == bare
    assert bare["put"][1] is True


@pytest.mark.parametrize(
    "kind",
    [InMemorySaver, Saver, SqliteSaver, AsyncSqliteSaver, PostgresSaver, AsyncPostgresSaver],
)
def test_it_can_do_what_its_saver_can(kind: Any) -> None:
    """It has the methods that the saver's class has of its own, with their signatures, and fakes
    none."""
    from langgraph_perf._bound_saver import _class_for

    made = _class_for(kind)
    for name in dir(BaseCheckpointSaver):
        if name.startswith("__") or name in ("serde", "with_allowlist"):
            continue
        base, own = getattr(BaseCheckpointSaver, name), getattr(kind, name)
        assert (getattr(made, name) is base) == (own is base), name
        if callable(getattr(made, name)):
            assert inspect.signature(getattr(made, name)) == inspect.signature(own), name
            assert inspect.iscoroutinefunction(getattr(made, name)) == (
                inspect.iscoroutinefunction(own)
            ), name


async def test_what_a_saver_cannot_do_is_refused_as_by_itself() -> None:
    """A method that the saver lacks raises the same error, which says what there is instead."""
    saver = wrapped(InMemorySaver())
    with pytest.raises(NotImplementedError, match=r"InMemorySaver has no copy_thread\(\); acc"):
        saver.copy_thread("a", "b")
    with pytest.raises(NotImplementedError, match="delete_thread"):
        saver.prune(["a"])
    with pytest.raises(NotImplementedError, match="forget_thread"):
        await saver.adelete_for_runs(["a"])
    assert DetectedCapabilities.from_instance(saver) == (
        DetectedCapabilities.from_instance(InMemorySaver())
    )


def test_it_is_taken_for_its_saver() -> None:
    """``isinstance``, attributes, assignments, ``repr`` and ``with`` reach the saver."""
    bare = InMemorySaver()
    saver: Any = wrapped(bare)
    assert isinstance(saver, InMemorySaver)
    assert saver.storage is bare.storage
    saver.note = "n"
    assert bare.note == "n"  # type: ignore[attr-defined]
    assert saver.serde is bare.serde
    assert repr(saver) == repr(bare)
    with saver as entered:
        assert entered is saver
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = saver.nothing_like_it


def test_it_survives_copying() -> None:
    """A copy, as LangGraph makes one to give it another serde, leaves the original alone."""
    bare = InMemorySaver()
    saver: Any = wrapped(bare)
    clone = copy.copy(saver)
    clone.serde = serde = JsonPlusSerializer(pickle_fallback=True)
    assert (clone.serde, saver.serde is bare.serde) == (serde, True)
    assert clone.storage is bare.storage
    derived = saver.with_allowlist([("a", "b")])
    assert type(derived) is type(saver)
    assert saver.serde is bare.serde


def test_threads_of_a_copy_take_their_results_with_them() -> None:
    """What LangGraph derives from a checkpointer still tells the cache."""
    node, ran = counted()
    graph = build(node, MemoryCache())
    run(graph, "t")
    graph.checkpointer.with_allowlist([("a", "b")]).delete_thread("t")
    run(graph, "t")
    assert len(ran) == 2


def test_strict_msgpack(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where LangGraph restricts what checkpoints may restore, graphs run and threads still take
    their results with them."""
    from langgraph._internal import _serde

    monkeypatch.setattr(_serde, "STRICT_MSGPACK_ENABLED", True)
    node, ran = counted()
    graph = build(node, MemoryCache())
    run(graph, "t")
    assert run(graph, "t")["answer"] == "Q"
    assert len(ran) == 1
    graph.checkpointer.delete_thread("t")
    assert list(graph.get_state_history({"configurable": {"thread_id": "t"}})) == []
    run(graph, "t")
    assert len(ran) == 2


def test_no_cache_no_wrapper() -> None:
    """A graph without a cache has the very saver it was given."""
    saver = InMemorySaver()
    builder = StateGraph(State).add_node("answer", lambda state: None)
    builder.add_edge(START, "answer")
    assert builder.compile(checkpointer=saver).checkpointer is saver
    for other in (None, False):
        assert builder.compile(checkpointer=other, cache=MemoryCache()).checkpointer is other


def test_a_saver_that_a_server_puts_in_place() -> None:
    """Assigned, copied in or lent through the config: its threads take their results with them."""
    node, ran = counted()

    def assigned(graph: Any) -> Any:
        graph.checkpointer = Saver()
        return graph

    for place in (assigned, lambda graph: graph.copy({"checkpointer": Saver()})):
        graph = place(build(node, MemoryCache(), saver=None))
        ran.clear()
        run(graph, "t")
        graph.checkpointer.delete_thread("t")
        run(graph, "t")
        assert len(ran) == 2

    graph, lent = build(node, MemoryCache(), saver=None), Saver()
    graph.invoke(
        {"query": "q"}, {"configurable": {"thread_id": "t", "__pregel_checkpointer": lent}}
    )
    run(graph, "t")
    hits = [
        found.metadata["langgraph_perf"]  # type: ignore[typeddict-item]
        for found in lent.list({"configurable": {"thread_id": "t"}})
        if "langgraph_perf" in found.metadata
    ]
    assert hits == []
    graph.invoke(
        {"query": "q"}, {"configurable": {"thread_id": "t", "__pregel_checkpointer": lent}}
    )
    (latest, *_) = lent.list({"configurable": {"thread_id": "t"}})
    assert latest.metadata["langgraph_perf"]["cached"].keys() == {"answer"}  # type: ignore[typeddict-item]


def test_one_saver_of_two_graphs() -> None:
    """A checkpointer taken from another graph tells the caches of both."""
    node, ran = counted()
    first = build(node, MemoryCache())
    second = build(node, MemoryCache(), saver=first.checkpointer)
    for graph in (first, second):
        run(graph, "t")
    second.checkpointer.delete_thread("t")
    for graph in (first, second):
        run(graph, "t")
    assert len(ran) == 4


def test_a_graph_copied_with_a_config_tells_the_cache_too() -> None:
    """``with_config`` makes a graph whose checkpointer does the same."""
    node, ran = counted()
    graph = build(node, MemoryCache()).with_config(configurable={"thread_id": "t"})
    graph.invoke({"query": "q"})
    graph.checkpointer.delete_thread("t")
    graph.invoke({"query": "q"})
    assert len(ran) == 2
    assert POLICY.scope == "thread"


def test_a_pooled_checkpointer_tells_the_cache(tmp_path: Path) -> None:
    """It learns what it can do from its first saver, and the graph's checkpointer with it."""
    shared = Saver()
    pooled = PooledCheckpointer(Pool(lambda: copy.copy(shared)))
    node, ran = counted()
    graph = build(node, MemoryCache(), saver=pooled)
    assert graph.checkpointer is graph.checkpointer
    run(graph, "t")
    run(graph, "t")
    assert len(ran) == 1
    assert DetectedCapabilities.from_instance(graph.checkpointer) == (
        DetectedCapabilities.from_instance(shared)
    )
    graph.checkpointer.prune(["t"], strategy="delete")
    run(graph, "t")
    assert len(ran) == 2
    assert graph.get_state({"configurable": {"thread_id": "t"}}).metadata["step"] > 0
    pooled.close()


def test_what_only_the_object_can_do_is_handed_on() -> None:
    """A method that the saver was given as an object works, and tells the cache."""
    bare: Any = InMemorySaver()
    pruned: list[Any] = []
    bare.prune = lambda thread_ids, strategy="keep_latest": pruned.append((thread_ids, strategy))
    node, ran = counted()
    graph = build(node, MemoryCache(), saver=bare)
    run(graph, "t")
    graph.checkpointer.prune(["t"], strategy="delete")
    run(graph, "t")
    assert (pruned, len(ran)) == ([(["t"], "delete")], 2)


def test_graphs_compiled_again_and_again_are_not_kept() -> None:
    """A checkpointer handed from graph to graph knows those that still are."""
    saver: Any = Saver()
    for _ in range(20):
        saver = build(counted()[0], MemoryCache(), saver=saver).checkpointer
    gc.collect()
    assert len(saver._told) <= 2


def test_it_can_be_copied_deeply() -> None:
    """As its saver can."""
    saver: Any = wrapped(Saver())
    clone = copy.deepcopy(saver)
    assert type(clone) is type(saver)
    assert clone.storage is not saver.storage
    saver.note = "n"
    del saver.note
    assert not hasattr(saver, "note")


def test_a_checkpointer_that_is_set_while_runs_ask_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever makes the old one the graph's own in that moment does not undo it."""
    builder = StateGraph(State)
    builder.add_node("node", lambda state: {}, cache_policy=CachePolicy())
    builder.add_edge(START, "node")
    graph: Any = builder.compile(cache=MemoryCache())
    old, new = InMemorySaver(), InMemorySaver()
    bound = graph.perf.bound

    def late(checkpointer: Any) -> Any:
        made = bound(checkpointer)
        if checkpointer is old:
            graph.checkpointer = new
        return made

    monkeypatch.setattr(graph.perf, "bound", late)
    graph.checkpointer = old
    assert graph.checkpointer.__dict__["_saver"] is new
    assert graph.checkpointer.__dict__["_saver"] is new


_STRICT = """
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START
from typing_extensions import TypedDict
from langgraph_perf import CachePolicy, MemoryCache, StateGraph

class State(TypedDict, total=False):
    query: str

def graph():
    builder = StateGraph(State)
    builder.add_node("node", lambda state: {}, cache_policy=CachePolicy(scope="thread"))
    builder.add_edge(START, "node")
    return builder.compile(checkpointer=saver, cache=MemoryCache())

saver = InMemorySaver()
one, two = graph(), graph()
config = {"configurable": {"thread_id": "t"}}
two.invoke({"query": "q"}, config)
assert two.cache.stats().entries == 1
one.checkpointer.delete_thread("t")
assert two.cache.stats().entries == 0
"""


@pytest.mark.parametrize("strict", ["false", "true"])
def test_graphs_with_one_saver_tell_each_other(strict: str) -> None:
    """Also where LangGraph gives each graph a copy of the saver, with an allowlist of its own."""
    environment = {**os.environ, "LANGGRAPH_STRICT_MSGPACK": strict}
    subprocess.run([sys.executable, "-c", _STRICT], env=environment, check=True, timeout=100)


async def test_lists_that_are_left_early_are_closed() -> None:
    """What the saver holds open for one comes back at once."""
    closed: list[str] = []

    class Holds(InMemorySaver):
        def list(self, *args: Any, **kwargs: Any) -> Any:
            try:
                yield from super().list(*args, **kwargs)
            finally:
                closed.append("list")

        async def alist(self, *args: Any, **kwargs: Any) -> Any:
            try:
                async for found in super().alist(*args, **kwargs):
                    yield found
            finally:
                closed.append("alist")

    graph = build(counted()[0], MemoryCache(), saver=Holds())
    run(graph, "t")
    with closing(graph.checkpointer.list({"configurable": {"thread_id": "t"}})) as listed:
        next(listed)
    async with aclosing(graph.checkpointer.alist({"configurable": {"thread_id": "t"}})) as alisted:
        await anext(alisted)
    assert closed == ["list", "alist"]


def test_a_list_stays_one() -> None:
    """A saver may give more than has to be, and fail when it is called."""

    class Listed(InMemorySaver):
        def list(self, config: Any, **kwargs: Any) -> Any:
            if config is None:
                raise ValueError("no thread")
            return [*super().list(config, **kwargs)]

    graph = build(counted()[0], MemoryCache(), saver=Listed())
    run(graph, "t")
    found = graph.checkpointer.list({"configurable": {"thread_id": "t"}})
    assert len(found) == 3
    with pytest.raises(ValueError, match="no thread"):
        graph.checkpointer.list(None)
