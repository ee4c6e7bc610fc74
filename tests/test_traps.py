"""The traps of LangGraph's built-in node cache, each walked into with it and avoided with ours.

Each scenario is written once, against the names both libraries share, and returns what happened.
The built-in half proves that the scenario is able to fail.
"""

from __future__ import annotations

import operator
import os
import subprocess
import sys
import textwrap
import threading
import uuid
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import langgraph.graph
import langgraph.types
import pytest
from langchain_core.messages import AIMessage, HumanMessage
from langgraph.cache.base import BaseCache
from langgraph.cache.memory import InMemoryCache
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START
from langgraph.graph.message import add_messages
from langgraph.types import Command, Send, interrupt
from typing_extensions import TypedDict

import langgraph_perf
from tests.resources.helpers import until


class Library(NamedTuple):
    """What a scenario builds with."""

    name: str
    StateGraph: Any
    CachePolicy: Any
    new_cache: Callable[[], Any]

    def keyed(self, *fields: str, **kwargs: Any) -> Any:
        """A policy keyed by some fields only, in the library's own words."""
        if self.name == "perf":
            return self.CachePolicy(key=list(fields), **kwargs)
        return self.CachePolicy(
            key_func=lambda state: repr([state.get(f) for f in fields]), **kwargs
        )


BUILTIN = Library("builtin", langgraph.graph.StateGraph, langgraph.types.CachePolicy, InMemoryCache)
PERF = Library(
    "perf",
    langgraph_perf.StateGraph,
    langgraph_perf.CachePolicy,
    langgraph_perf.MemoryCache,
)

# what the built-in cache does is known for this version only
reproduced = pytest.mark.skipif(
    version("langgraph") != "1.2.22", reason="traps were reproduced on langgraph 1.2.22"
)


class State(TypedDict, total=False):
    query: str
    answer: str
    path: Annotated[list[str], operator.add]


# -- 1 --------------------------------------------------------------------------------------------


def context_leak(lib: Library) -> tuple[str, str]:
    class Context(TypedDict):
        user: str

    def answer(state: State, runtime: Any) -> State:
        return {"answer": f"for {runtime.context['user']}"}

    graph = (
        lib.StateGraph(State, context_schema=Context)
        .add_node("answer", answer, cache_policy=lib.CachePolicy())
        .add_edge(START, "answer")
        .compile(cache=lib.new_cache())
    )
    return tuple(  # type: ignore[return-value]
        graph.invoke({"query": "q"}, context={"user": user})["answer"] for user in ("alice", "bob")
    )


@reproduced
def test_1_builtin_leaks_another_users_answer() -> None:
    """The built-in cache answers Bob with what it computed for Alice."""
    assert context_leak(BUILTIN) == ("for alice", "for alice")


def test_1_context_is_in_the_key() -> None:
    """Bob's context gives Bob's answer."""
    assert context_leak(PERF) == ("for alice", "for bob")


# -- 2 --------------------------------------------------------------------------------------------


def cached_branch(lib: Library) -> list[str]:
    def classify(state: State) -> State:
        return {"path": ["classify"]}

    builder = lib.StateGraph(State)
    builder.add_node("classify", classify, cache_policy=lib.keyed("query"))
    builder.add_node("left", lambda state: {"path": ["left"]})
    builder.add_node("right", lambda state: {"path": ["right"]})
    builder.add_edge(START, "classify")
    builder.add_conditional_edges("classify", lambda state: state["answer"], ["left", "right"])
    graph = builder.compile(cache=lib.new_cache())
    return [
        graph.invoke({"query": "q", "answer": way, "path": []})["path"][-1]
        for way in ("left", "right")
    ]


@reproduced
def test_2_builtin_replays_the_wrong_branch() -> None:
    """The built-in cache stores where the edge led and follows it for another state."""
    assert cached_branch(BUILTIN) == ["left", "left"]


def test_2_conditional_edges_are_evaluated_on_every_hit() -> None:
    """A hit takes the branch of the current state."""
    assert cached_branch(PERF) == ["left", "right"]


# -- 3 --------------------------------------------------------------------------------------------


def _work(state: State) -> State:
    return {"path": ["work"]}


def redeployed(lib: Library) -> list[str]:
    cache = lib.new_cache()

    def build(*, review: bool) -> Any:
        builder = lib.StateGraph(State)
        builder.add_node("work", _work, cache_policy=lib.CachePolicy())
        builder.add_edge(START, "work")
        if review:
            builder.add_node("review", lambda state: {"path": ["review"]})
            builder.add_edge("work", "review")
        return builder.compile(cache=cache)

    build(review=False).invoke({"query": "q", "path": []})
    return build(review=True).invoke({"query": "q", "path": []})["path"]  # type: ignore[no-any-return]


@reproduced
def test_3_builtin_skips_a_node_added_later() -> None:
    """The built-in cache skips the review that was added after the result was stored."""
    assert redeployed(BUILTIN) == ["work"]


def test_3_a_hit_goes_on_to_nodes_added_later() -> None:
    """Static edges of the current graph are followed on a hit."""
    assert redeployed(PERF) == ["work", "review"]


# -- 4 --------------------------------------------------------------------------------------------


def approval(lib: Library) -> bool:
    def approve(state: State) -> State:
        return {"answer": interrupt("really?")}

    graph = (
        lib.StateGraph(State)
        .add_node("approve", approve, cache_policy=lib.CachePolicy())
        .add_edge(START, "approve")
        .compile(cache=lib.new_cache(), checkpointer=InMemorySaver())
    )
    a: Any = {"configurable": {"thread_id": "a"}}
    b: Any = {"configurable": {"thread_id": "b"}}
    graph.invoke({"query": "delete everything"}, a)
    assert graph.invoke(Command(resume="yes"), a)["answer"] == "yes"
    return "__interrupt__" in graph.invoke({"query": "delete everything"}, b)


@reproduced
def test_4_builtin_replays_a_humans_approval() -> None:
    """The built-in cache does not ask the second human."""
    assert approval(BUILTIN) is False


def test_4_every_thread_is_asked() -> None:
    """A human's answer is never stored: the second thread is asked as well."""
    assert approval(PERF) is True


# -- 5 --------------------------------------------------------------------------------------------


class Chat(TypedDict):
    messages: Annotated[list[Any], add_messages]


def asked_again(lib: Library) -> list[str]:
    def reply(state: Chat) -> Any:
        return {
            "messages": [AIMessage(f"re {state['messages'][-1].content}", id=str(uuid.uuid4()))]
        }

    policy = (
        lib.CachePolicy(key=lambda state: state["messages"][-1].content)
        if lib.name == "perf"
        else lib.CachePolicy(key_func=lambda state: state["messages"][-1].content)
    )
    graph = (
        lib.StateGraph(Chat)
        .add_node("reply", reply, cache_policy=policy)
        .add_edge(START, "reply")
        .compile(cache=lib.new_cache(), checkpointer=InMemorySaver())
    )
    thread: Any = {"configurable": {"thread_id": "t"}}
    for question in ("A", "B", "A"):
        graph.invoke({"messages": [HumanMessage(question)]}, thread)
    return [m.content for m in graph.get_state(thread).values["messages"]]


@reproduced
def test_5_builtin_overwrites_the_first_answer() -> None:
    """With the built-in cache the history of A, B, A ends on the human turn."""
    assert asked_again(BUILTIN) == ["A", "re A", "B", "re B", "A"]


def test_5_replayed_messages_are_new_messages() -> None:
    """A replayed answer gets an id of its own: A, B, A gives six messages in order."""
    assert asked_again(PERF) == ["A", "re A", "B", "re B", "A", "re A"]


# -- 6 --------------------------------------------------------------------------------------------


def same_text(lib: Library) -> int:
    runs: list[int] = []

    def reply(state: Chat) -> Any:
        runs.append(1)
        return {"messages": [AIMessage("hi")]}

    graph = (
        lib.StateGraph(Chat)
        .add_node("reply", reply, cache_policy=lib.CachePolicy())
        .add_edge(START, "reply")
        .compile(cache=lib.new_cache())
    )
    for _ in range(2):
        graph.invoke({"messages": [HumanMessage("hello")]})
    return len(runs)


@reproduced
def test_6_builtin_never_hits_on_the_same_text() -> None:
    """Random message ids are in the built-in key."""
    assert same_text(BUILTIN) == 2


def test_6_the_same_text_hits() -> None:
    """Messages are keyed by content."""
    assert same_text(PERF) == 1


# -- 7 --------------------------------------------------------------------------------------------


class Anything(TypedDict, total=False):
    value: Any
    out: Any


def runs_for(lib: Library, *values: Any) -> int:
    runs: list[int] = []

    def node(state: Anything) -> Anything:
        runs.append(1)
        return {"out": 1}

    graph = (
        lib.StateGraph(Anything)
        .add_node("node", node, cache_policy=lib.CachePolicy())
        .add_edge(START, "node")
        .compile(cache=lib.new_cache())
    )
    for value in values:
        graph.invoke({"value": value})
    return len(runs)


def _dtypes() -> tuple[Any, Any]:
    import numpy

    return numpy.array([1, 2], "uint8"), numpy.array([1, 2], "int8")


@reproduced
def test_7_builtin_misses_on_dict_order() -> None:
    """The built-in key depends on the order in which a dict was filled."""
    assert runs_for(BUILTIN, {"a": 1, "b": 2}, {"b": 2, "a": 1}) == 2


def test_7_dict_order_does_not_count() -> None:
    """The same dict filled in another order is the same input."""
    assert runs_for(PERF, {"a": 1, "b": 2}, {"b": 2, "a": 1}) == 1


def test_7_dtypes_differ() -> None:
    """Arrays of another dtype are other inputs."""
    assert runs_for(PERF, *_dtypes()) == 2


@reproduced
def test_7_builtin_crashes_on_what_it_cannot_pickle() -> None:
    """An input that cannot be pickled fails the run with the built-in cache."""
    with pytest.raises(TypeError, match="pickle"):
        runs_for(BUILTIN, threading.Lock())


def test_7_what_cannot_be_keyed_runs_uncached(caplog: pytest.LogCaptureFixture) -> None:
    """An input that cannot be keyed runs each time, and one warning names it."""
    lock = threading.Lock()
    assert runs_for(PERF, lock, lock) == 2
    assert caplog.text.count('state["value"]') == 1


def test_7_order_and_hash_seed_do_not_count(tmp_path: Path) -> None:
    """The same dict and set in another order, in a process with another hash seed, hit."""
    script = textwrap.dedent(
        """
        import sys
        from typing import Any
        from langgraph.graph import START
        from typing_extensions import TypedDict
        from langgraph_perf import CachePolicy, DiskCache, StateGraph

        class State(TypedDict, total=False):
            value: Any
            out: int

        def node(state: State) -> State:
            print("ran")
            return {"out": 1}

        builder = StateGraph(State).add_node("node", node, cache_policy=CachePolicy())
        graph = builder.add_edge(START, "node").compile(cache=DiskCache(sys.argv[1]))
        words = ["a", "bb", "ccc", "dddd"]
        if sys.argv[2] == "backwards":
            words.reverse()
        graph.invoke({"value": {"set": set(words), **{w: len(w) for w in words}}})
        graph.cache.close()
        """
    )
    printed = [
        subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "cache"), way],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for way, seed in (("forwards", "1"), ("backwards", "2"))
    ]
    assert printed == ["ran\n", ""]


# -- 8 --------------------------------------------------------------------------------------------


def colliding(lib: Library) -> list[str]:
    cache = lib.new_cache()

    class Answerer:
        def __init__(self, model: str) -> None:
            self.model = model

        def __call__(self, state: State) -> State:
            return {"answer": self.model}

    answers = []
    for model in ("small", "large"):
        builder = lib.StateGraph(State)
        builder.add_node("answer", Answerer(model), cache_policy=lib.CachePolicy())
        graph = builder.add_edge(START, "answer").compile(cache=cache)
        answers.append(graph.invoke({"query": "q"})["answer"])
    return answers


@reproduced
def test_8_builtin_confuses_callable_objects() -> None:
    """With the built-in cache two differently made objects share their entries."""
    assert colliding(BUILTIN) == ["small", "small"]


def test_8_state_of_callable_objects_counts() -> None:
    """Objects made differently are different nodes."""
    assert colliding(PERF) == ["small", "large"]


# -- 9 --------------------------------------------------------------------------------------------


def equal_sends(lib: Library) -> list[int]:
    runs: list[int] = []

    def work(state: State) -> State:
        runs.append(1)
        return {"path": ["work"]}

    builder = lib.StateGraph(State)
    builder.add_node("work", work, cache_policy=lib.CachePolicy())
    builder.add_conditional_edges(
        START, lambda state: [Send("work", {"query": "q"}) for _ in range(4)], ["work"]
    )
    graph = builder.compile(cache=lib.new_cache())
    counts = []
    for _ in range(2):
        runs.clear()
        assert graph.invoke({"path": []})["path"] == ["work"] * 4
        counts.append(len(runs))
    return counts


@reproduced
def test_9_builtin_runs_equal_sends_again() -> None:
    """Four equal Sends run four times cold and three times warm with the built-in cache."""
    assert equal_sends(BUILTIN) == [4, 3]


def test_9_equal_sends_run_once() -> None:
    """Four equal Sends run once cold and not at all warm."""
    assert equal_sends(PERF) == [1, 0]


# -- 10 -------------------------------------------------------------------------------------------


def stampede(lib: Library) -> int:
    runs: list[int] = []
    together = threading.Barrier(20)
    release = threading.Event()

    def work(state: State) -> State:
        runs.append(1)
        assert release.wait(60)
        return {"answer": "done"}

    graph = (
        lib.StateGraph(State)
        .add_node("work", work, cache_policy=lib.CachePolicy(**_pinned(lib)))
        .add_edge(START, "work")
        .compile(cache=lib.new_cache())
    )

    def run() -> None:
        together.wait(60)
        graph.invoke({"query": "q"})

    threads = [threading.Thread(target=run) for _ in range(20)]
    for thread in threads:
        thread.start()
    until(lambda: len(runs) >= (1 if lib.name == "perf" else 20))
    if lib.name == "perf":
        flights = _flights(graph)
        until(lambda: flights.waiting() == 19)
    release.set()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return len(runs)


def _pinned(lib: Library) -> dict[str, Any]:
    return {"version": "1"} if lib.name == "perf" else {}


def _flights(graph: Any) -> Any:
    from langgraph_perf._backend import Backend

    return Backend.of(graph.cache).flights


@reproduced
def test_10_builtin_runs_every_caller() -> None:
    """Twenty callers at once make the built-in cache run the node twenty times."""
    assert stampede(BUILTIN) == 20


def test_10_one_caller_runs() -> None:
    """Twenty callers at once run the node once."""
    assert stampede(PERF) == 1


# -- 12 -------------------------------------------------------------------------------------------


class Broken(InMemoryCache[Any]):
    """A backend that is down."""

    def get(self, keys: Any) -> Any:
        raise ConnectionError("down")

    def set(self, keys: Any) -> None:
        raise ConnectionError("down")

    async def aget(self, keys: Any) -> Any:
        raise ConnectionError("down")

    async def aset(self, keys: Any) -> None:
        raise ConnectionError("down")


def broken_backend(lib: Library) -> str:
    graph = (
        lib.StateGraph(State)
        .add_node("work", lambda state: {"answer": "done"}, cache_policy=lib.CachePolicy())
        .add_edge(START, "work")
        .compile(cache=Broken())
    )
    return graph.invoke({"query": "q"})["answer"]  # type: ignore[no-any-return]


@reproduced
def test_12_builtin_dies_with_its_backend() -> None:
    """With the built-in cache a backend that is down fails the run."""
    with pytest.raises(ConnectionError):
        broken_backend(BUILTIN)


def test_12_the_run_goes_on_without_the_backend(caplog: pytest.LogCaptureFixture) -> None:
    """A backend that is down costs nothing but the hits, and is logged."""
    assert broken_backend(PERF) == "done"
    assert "ConnectionError" in caplog.text


def test_12_a_result_that_cannot_be_stored_is_returned(caplog: pytest.LogCaptureFixture) -> None:
    """A result that does not serialise is returned all the same, with its path in the log."""
    lock = threading.Lock()
    graph = (
        langgraph_perf.StateGraph(Anything)
        .add_node("work", lambda state: {"out": lock}, cache_policy=PERF.CachePolicy(version=1))
        .add_edge(START, "work")
        .compile(cache=langgraph_perf.MemoryCache())
    )
    assert graph.invoke({"value": 1})["out"] is lock
    assert graph.perf.stats().nodes["work"].refusals == {"unserializable": 1}
    assert "'out'" in caplog.text


# -- 13: clear reaches neighbours (Redis itself comes with its own cache) -------------------------


def test_13_clearing_a_namespace_leaves_its_neighbours(cache: BaseCache[Any]) -> None:
    """Clearing ``("a",)`` does not touch ``("a", "b")``."""
    cache.set({(("a",), "k"): (1, None), (("a", "b"), "k"): (2, None)})
    cache.clear([("a",)])
    assert cache.get([(("a",), "k"), (("a", "b"), "k")]) == {(("a", "b"), "k"): 2}


# -- 14 -------------------------------------------------------------------------------------------


def test_14_memory_is_bounded_and_swept() -> None:
    """Entries stay within the byte budget, and expired ones go without being read."""
    now = [1000.0]
    cache = langgraph_perf.MemoryCache(max_bytes=1_000_000, clock=lambda: now[0])
    for i in range(1000):
        cache.set({(("n",), str(i)): ("x" * 10_000, 10)})
    assert cache.stats().bytes <= 1_000_000
    now[0] += 11
    assert cache.stats().entries == 0


# -- 15 -------------------------------------------------------------------------------------------


def subgraph_runs(lib: Library) -> int:
    runs: list[int] = []

    def work(state: State) -> State:
        runs.append(1)
        return {"answer": "done"}

    inner = (
        lib.StateGraph(State)
        .add_node("work", work, cache_policy=lib.CachePolicy())
        .add_edge(START, "work")
        .compile()
    )
    outer = (
        lib.StateGraph(State)
        .add_node("inner", inner)
        .add_edge(START, "inner")
        .compile(cache=lib.new_cache())
    )
    for _ in range(2):
        outer.invoke({"query": "q"})
    return len(runs)


@reproduced
def test_15_builtin_subgraphs_have_no_cache() -> None:
    """A subgraph's policies do nothing with the built-in cache."""
    assert subgraph_runs(BUILTIN) == 2


def test_15_subgraphs_inherit_the_cache() -> None:
    """A subgraph's policies use the parent's cache."""
    assert subgraph_runs(PERF) == 1


# -- 16 -------------------------------------------------------------------------------------------


def edited(lib: Library) -> list[str]:
    cache = lib.new_cache()
    answers = []
    for source in ("'old'", "'new'"):
        scope: dict[str, Any] = {"__name__": "app"}
        exec(f"def answer(state):\n    return {{'answer': {source}}}", scope)
        builder = lib.StateGraph(State)
        builder.add_node("answer", scope["answer"], cache_policy=lib.CachePolicy())
        graph = builder.add_edge(START, "answer").compile(cache=cache)
        answers.append(graph.invoke({"query": "q"})["answer"])
    return answers


@reproduced
def test_16_builtin_serves_results_of_old_code() -> None:
    """The built-in cache serves what the code before the edit returned."""
    assert edited(BUILTIN) == ["old", "old"]


def test_16_edited_code_runs() -> None:
    """An edited node computes anew."""
    assert edited(PERF) == ["old", "new"]


def test_end_is_reachable() -> None:
    """A cached node may lead straight to the end."""
    builder = langgraph_perf.StateGraph(State)
    builder.add_node("a", _work, cache_policy=PERF.CachePolicy())
    builder.add_edge(START, "a").add_edge("a", END)
    graph = builder.compile(cache=langgraph_perf.MemoryCache())
    assert graph.invoke({"path": []}) == graph.invoke({"path": []}) == {"path": ["work"]}
