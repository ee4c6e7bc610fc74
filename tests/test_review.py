"""What a review once found: each case was a wrong answer, a hang or a crash."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START
from langgraph.graph import StateGraph as LangGraphStateGraph
from langgraph.types import Command, interrupt
from typing_extensions import TypedDict

from langgraph_perf import (
    CachePolicy,
    ConfigurationError,
    DiskCache,
    MemoryCache,
    StateGraph,
    get_cache,
)
from langgraph_perf._backend import Backend
from langgraph_perf.caches.base import Cache
from tests.conftest import Clock
from tests.resources.helpers import until


class State(TypedDict, total=False):
    query: Any
    user_id: str
    answer: Any


def build(node: Any, policy: CachePolicy | None = None, cache: Any = None, **kwargs: Any) -> Any:
    builder = StateGraph(State, context_schema=kwargs.pop("context_schema", None))
    builder.add_node("node", node, cache_policy=policy or CachePolicy(version=1))
    cache = MemoryCache() if cache is None else cache
    return builder.add_edge(START, "node").compile(cache=cache, **kwargs)


HIDDEN: dict[str, Any] = {}


def test_answers_by_interrupt_id_to_hidden_subgraphs_are_not_stored() -> None:
    """A graph that LangGraph cannot see inside a node, answered by interrupt id, asks again."""

    def ask(state: State) -> State:
        return {"answer": interrupt("really?")}

    HIDDEN["x"] = StateGraph(State).add_node("ask", ask).add_edge(START, "ask").compile()
    graph = build(lambda state: HIDDEN["x"].invoke(state), checkpointer=InMemorySaver())
    for thread in ("a", "b"):
        config: Any = {"configurable": {"thread_id": thread}}
        asked = graph.invoke({"query": "q"}, config)
        assert "__interrupt__" in asked, thread
        answers = {asked["__interrupt__"][0].id: thread}
        assert graph.invoke(Command(resume=answers), config)["answer"] == thread


def test_answers_of_humans_are_no_items() -> None:
    """An item whose computation asked a human is not stored."""

    def node(state: State) -> State:
        return {"answer": get_cache("x").get_or_set("approve", lambda: interrupt("ok?"))}

    builder = StateGraph(State).add_node("node", node).add_edge(START, "node")
    graph = builder.compile(cache=MemoryCache(), checkpointer=InMemorySaver())
    for thread in ("a", "b"):
        config: Any = {"configurable": {"thread_id": thread}}
        assert "__interrupt__" in graph.invoke({}, config), thread
        assert graph.invoke(Command(resume=thread), config)["answer"] == thread


@pytest.mark.parametrize("field", ["identity", "name"])
def test_users_of_a_server_are_told_apart_in_any_form(field: str) -> None:
    """A user given as a mapping counts by identity, or as a whole when it has none."""

    def node(state: State, config: RunnableConfig) -> State:
        return {"answer": config["configurable"]["langgraph_auth_user"][field]}

    graph = build(node)
    for user in ("alice", "bob"):
        config: Any = {"configurable": {"langgraph_auth_user": {field: user}}}
        assert graph.invoke({"query": "q"}, config)["answer"] == user


def test_an_edited_key_function_drops_entries() -> None:
    """What a key function leaves out decides what is the same, so it is code of the node."""
    cache = MemoryCache()

    def node(state: State) -> State:
        return {"answer": (state["query"], state["user_id"])}

    by_query = CachePolicy(key=lambda state: state["query"])
    by_user = CachePolicy(key=lambda state: state["user_id"])
    build(node, by_query, cache).invoke({"query": 1, "user_id": "2"})
    answer = build(node, by_user, cache).invoke({"query": 9, "user_id": "1"})["answer"]
    assert answer == (9, "1")


def test_a_shortened_ttl_applies_to_old_entries(clock: Clock) -> None:
    """A redeployed policy with a shorter ttl does not serve what is older than that."""
    cache = MemoryCache(clock=clock)
    build(lambda state: {"answer": "old"}, CachePolicy(version=1), cache).invoke({"query": "q"})
    clock.advance(10)
    graph = build(lambda state: {"answer": "new"}, CachePolicy(version=1, ttl=5), cache)
    assert graph.invoke({"query": "q"})["answer"] == "new"


def test_a_refresh_is_not_overwritten_by_an_older_run(cache: Cache) -> None:
    """A run that began before a refresh and ends after it does not bring the old value back."""
    release, started = threading.Event(), threading.Event()
    values = iter(["old", "new"])

    def node(state: State) -> State:
        value = next(values)
        if value == "old":
            started.set()
            release.wait(20)
        return {"answer": value}

    graph = build(node, cache=cache)
    with ThreadPoolExecutor(1) as pool:
        older = pool.submit(graph.invoke, {"query": "q"})
        assert started.wait(20)
        refresh = {"configurable": {"cache_control": {"mode": "refresh"}}}
        assert graph.invoke({"query": "q"}, refresh)["answer"] == "new"
        release.set()
        assert older.result(20)["answer"] == "old"
    assert graph.invoke({"query": "q"})["answer"] == "new"


def test_a_refresh_in_one_process_fences_older_runs_in_others(tmp_path: Path) -> None:
    """On disk a write without a lease takes the lease from whoever computes the key."""
    from langgraph_perf.caches.base import Entry

    with DiskCache(tmp_path / "c") as cache:
        key = (("n",), "k")
        lease = cache.acquire(key)
        assert lease is not None
        assert cache.write(key, Entry(b"new", cache.clock()))
        assert not cache.write(key, Entry(b"old", cache.clock()), lease)


@pytest.mark.parametrize("inner_kind", ["item", "subgraph"])
def test_dependencies_of_inner_results_are_the_outer_results_own(
    inner_kind: str, cache: Cache
) -> None:
    """Invalidating what an inner cached result depends on reaches the result made from it."""
    version = ["1"]
    inner = StateGraph(State)
    policy = CachePolicy(version=1, tags=["docs"])
    inner.add_node("inner", lambda state: {"answer": version[0]}, cache_policy=policy)
    subgraph = inner.add_edge(START, "inner").compile()

    def node(state: State) -> Any:
        if inner_kind == "subgraph":
            return subgraph.invoke(state)
        items = get_cache("x")
        return {"answer": items.get_or_set("k", lambda: version[0], tags=["docs"])}

    graph = build(node, cache=cache)
    other = build(node, CachePolicy(version=2), cache)  # made from a stored inner result
    for built in (graph, other, graph, other):
        assert built.invoke({"query": "q"})["answer"] == "1"
    version[0] = "2"
    cache.invalidate("docs")
    for built in (graph, other):
        assert built.invoke({"query": "q"})["answer"] == "2"


def test_dependencies_on_another_cache_are_not_stored() -> None:
    """What depends on tags of a cache that cannot be checked here is not stored."""
    inner = StateGraph(State)
    policy = CachePolicy(version=1, tags=["docs"])
    inner.add_node("inner", lambda state: {"answer": 1}, cache_policy=policy)
    graph = build(inner.add_edge(START, "inner").compile(cache=MemoryCache()))
    graph.invoke({"query": "q"})
    assert graph.perf.stats().nodes["node"].refusals == {"tags_elsewhere": 1}


def test_items_asked_for_from_threads_of_their_own_computation_do_not_hang(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Threads that a computation starts by itself do not wait for that computation for long."""
    monkeypatch.setattr("langgraph_perf._flight.EXECUTOR_PATIENCE", 0.05)

    def node(state: State) -> State:
        items = get_cache("x")

        def outer() -> list[int]:
            with ThreadPoolExecutor(2) as pool:
                return list(pool.map(lambda _: items.get_or_set("k", lambda: 1), [1, 2]))

        return {"answer": items.get_or_set("k", outer)}

    builder = StateGraph(State).add_node("node", node).add_edge(START, "node")
    assert builder.compile(cache=MemoryCache()).invoke({})["answer"] == [1, 1]


def test_patience_ends(monkeypatch: pytest.MonkeyPatch, memory: MemoryCache) -> None:
    """A call whose leader waits for it by ways that cannot be seen goes alone in the end."""
    monkeypatch.setattr("langgraph_perf._flight.PATIENCE", 0.05)
    depth: list[int] = []

    def node(state: State) -> State:
        depth.append(1)
        if len(depth) > 1:
            return {"answer": "inner"}
        with ThreadPoolExecutor(1) as pool:
            return {"answer": pool.submit(graph.invoke, {"query": "q"}).result(20)["answer"]}

    graph = build(node, cache=memory)
    assert graph.invoke({"query": "q"})["answer"] == "inner"


@pytest.mark.parametrize("tag", ["u:{user_id:.2f}", "u:{user_id!r}"])
def test_formats_in_tags_are_refused_when_they_are_declared(tag: str) -> None:
    """A template takes plain fields; a format would fail for some values only at run time."""
    with pytest.raises(ConfigurationError, match="without a format"):
        CachePolicy(tags=[tag])


@dataclass
class Context:
    user_id: str

    @property
    def detached(self) -> str:
        raise RuntimeError("not loaded")


def test_vary_is_checked_against_the_context() -> None:
    """A typo in ``vary`` would leave a user out of the key: it is refused when built."""
    with pytest.raises(ConfigurationError, match=r"no field 'usr_id'; accepted: user_id"):
        build(
            lambda state: {},
            CachePolicy(version=1, vary=["context.usr_id"]),
            context_schema=Context,
        )


def test_a_part_of_the_context_that_raises_costs_only_the_hit() -> None:
    """Reading the context for the key must not end a run that would not have read it."""
    graph = build(lambda state: {"answer": 1}, CachePolicy(version=1, vary=["context.user.name"]))

    class Broken:
        @property
        def name(self) -> str:
            raise RuntimeError("not loaded")

    assert graph.invoke({"query": "q"}, context={"user": Broken()})["answer"] == 1
    assert graph.perf.stats().nodes["node"].refusals == {"vary_raised": 1}


def test_tags_that_are_not_in_the_key_do_not_thrash() -> None:
    """Results with other dependencies are other results, also where the key does not say so."""
    graph = build(
        lambda state: {"answer": 1}, CachePolicy(version=1, key=["query"], tags=["u:{user_id}"])
    )
    for user in "abababab":
        graph.invoke({"query": "q", "user_id": user})
    assert graph.perf.stats().nodes["node"].runs == 2


def test_loops_are_not_kept() -> None:
    """An event loop that is over is freed, although it used a cache that outlives it."""
    cache = MemoryCache()
    cache.blocking = True
    loops: list[Any] = []

    async def use() -> None:
        loops.append(weakref.ref(asyncio.get_running_loop()))
        await build(lambda state: {"answer": 1}, cache=cache).ainvoke({"query": "q"})

    for _ in range(3):
        asyncio.run(use())
    # the thread that answered last may not have left the loop's callback yet
    until(lambda: gc.collect() >= 0 and [ref() for ref in loops] == [None] * 3)
    assert len(Backend.of(cache)._batchers) == 0
    cache.close()


def test_our_policy_on_langgraphs_class_says_what_is_wrong() -> None:
    """A forgotten import is told apart from a defect."""
    builder = LangGraphStateGraph(State)
    builder.add_node("node", lambda state: {}, cache_policy=CachePolicy())  # type: ignore[arg-type]
    graph = builder.add_edge(START, "node").compile(cache=MemoryCache())
    with pytest.raises(ConfigurationError, match=r"langgraph_perf\.StateGraph"):
        graph.invoke({"query": "q"})


def test_clearing_what_does_not_exist_is_refused() -> None:
    """A lone string and unknown nodes are errors, not a silent nothing."""
    graph = build(lambda state: {"answer": 1})
    with pytest.raises(ConfigurationError, match=r"did you mean \['node'\]"):
        graph.clear_cache("node")
    with pytest.raises(ConfigurationError, match="unknown node 'nod'"):
        graph.clear_cache(["nod"])


def test_what_cannot_be_stored_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """A node whose results cannot be stored does not flood the log."""
    lock = threading.Lock()
    graph = build(lambda state: {"answer": lock}, CachePolicy(version=1))
    for i in range(4):
        graph.invoke({"query": i})
    assert caplog.text.count("not stored") == 1


def _fingerprint_of(source: str) -> str:
    from langgraph_perf.fingerprint import fingerprint

    scope: dict[str, Any] = {"__name__": "app"}
    exec(source, scope)
    return fingerprint(scope["node"])


SERVICE = """
import socket
class Service:
    def __init__(self):
        self.socket = socket.socket()
        self.socket.close()
        self.prompt = {prompt!r}
    def ask(self, text):
        return {method!r} + self.prompt + text
service = Service()
TABLE = {{"socket": service.socket, "limit": {limit}}}
def node(state):
    return {{"answer": service.ask("x")[: TABLE["limit"]]}}
"""


def test_an_object_with_one_unkeyable_part_counts_by_its_other_parts() -> None:
    """A module's service that holds a connection still changes with its code and settings."""
    base = {"prompt": "a", "method": "b", "limit": 1}
    prints = {
        _fingerprint_of(SERVICE.format(**{**base, **change}))
        for change in ({}, {"prompt": "c"}, {"method": "d"}, {"limit": 2})
    }
    assert len(prints) == 4
    assert _fingerprint_of(SERVICE.format(**base)) in prints


MODEL = """
from pydantic import BaseModel
class Out(BaseModel):
    {doc!r}
    x: int = 1
def node(state):
    return {{"answer": Out.model_json_schema()}}
"""


def test_a_models_docstring_is_part_of_its_schema() -> None:
    """What ``with_structured_output`` sends to a language model counts as code."""
    assert _fingerprint_of(MODEL.format(doc="v1")) != _fingerprint_of(MODEL.format(doc="v2"))
    assert _fingerprint_of(MODEL.format(doc="v1")) == _fingerprint_of(MODEL.format(doc="v1"))
