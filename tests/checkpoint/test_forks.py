"""Runs that start from a checkpoint their caller named, and per-thread settings through JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START
from typing_extensions import TypedDict

from langgraph_perf import CachePolicy, MemoryCache, StateGraph
from langgraph_perf.errors import CacheMiss, ConfigurationError

from .test_threads import counted


class State(TypedDict, total=False):
    query: str
    first: str
    second: str


def build(policy: CachePolicy, **kwargs: Any) -> tuple[Any, list[str]]:
    ran: list[str] = []

    def first(state: State) -> State:
        ran.append("first")
        return {"first": state["query"]}

    def second(state: State) -> State:
        ran.append("second")
        return {"second": state["first"] + "!"}

    builder = StateGraph(State)
    builder.add_node("first", first, cache_policy=policy)
    builder.add_node("second", second, cache_policy=policy)
    builder.add_edge(START, "first").add_edge("first", "second")
    graph = builder.compile(checkpointer=InMemorySaver(), cache=MemoryCache(), **kwargs)
    return graph, ran


def before(graph: Any, node: str, thread: str = "t") -> Any:
    """The checkpoint of ``thread`` from which ``node`` was to run, and nothing else."""
    history = graph.get_state_history({"configurable": {"thread_id": thread}})
    return next(snapshot.config for snapshot in history if snapshot.next == (node,))


@pytest.mark.parametrize("scope", ["global", "thread"])
def test_on_fork(scope: Any) -> None:
    """``reuse`` hits when a run starts from an earlier checkpoint, ``refresh`` runs and stores."""
    for on_fork, runs in (("reuse", 2), ("refresh", 3)):
        policy = CachePolicy(scope=scope, on_fork=on_fork, version="1", key=["query"])  # type: ignore[arg-type]
        graph, ran = build(policy)
        config = {"configurable": {"thread_id": "t"}}
        graph.invoke({"query": "q"}, config)
        graph.invoke(None, before(graph, "second"))
        assert len(ran) == runs
        graph.invoke({"query": "q"}, config)
        assert len(ran) == runs


def test_on_fork_reaches_graphs_inside() -> None:
    """The node of a subgraph is refreshed as well."""
    node, ran = counted()
    inner: Any = StateGraph(State)
    inner.add_node(
        "deep", node, cache_policy=CachePolicy(on_fork="refresh", key=["query"], version="1")
    )
    inner.add_edge(START, "deep")
    builder = StateGraph(State).add_node("sub", inner.compile())
    builder.add_edge(START, "sub")
    graph: Any = builder.compile(checkpointer=InMemorySaver(), cache=MemoryCache())
    config = {"configurable": {"thread_id": "t"}}
    graph.invoke({"query": "q"}, config)
    graph.invoke({"query": "q"}, config)
    assert len(ran) == 1
    graph.invoke(None, before(graph, "sub"))
    assert len(ran) == 2


def test_on_fork_never_widens_what_a_run_may_do() -> None:
    """Mode ``only`` still does not run the node, ``bypass`` still stores nothing."""
    graph, ran = build(CachePolicy(on_fork="refresh", key=["query"], version="1"))
    graph.invoke({"query": "q"}, {"configurable": {"thread_id": "t"}})
    graph.cache.clear()
    config = before(graph, "second")
    config["configurable"]["cache_control"] = {"mode": "only"}
    with pytest.raises(CacheMiss):
        graph.invoke(None, config)
    config["configurable"]["cache_control"] = {"mode": "bypass"}
    graph.invoke(None, config)
    assert graph.cache.stats().entries == 0
    assert ran == ["first", "second", "second"]


def test_a_branch_is_answered_for_the_state_it_has() -> None:
    """Two branches of one checkpoint with other values: each gets its own result, then hits."""
    graph, ran = build(CachePolicy(scope="thread", version="1"))
    graph.invoke({"query": "q"}, {"configurable": {"thread_id": "t"}})
    fork = before(graph, "second")
    results = []
    for value in ("left", "right", "left"):
        config = graph.update_state(fork, {"first": value}, as_node="first")
        results.append(graph.invoke(None, config)["second"])
    assert results == ["left!", "right!", "left!"]
    assert ran == ["first", "second", "second", "second"]


@pytest.mark.parametrize("wrong", ["never", None, True, 1])
def test_on_fork_takes_two_words(wrong: Any) -> None:
    """Anything else is an error that names the field and what is accepted."""
    with pytest.raises(ConfigurationError, match=r"CachePolicy.on_fork: got .*'reuse', 'refresh'"):
        CachePolicy(on_fork=wrong)


def invoke_by_json(graph: Any, request: str) -> Any:
    """What a server does: everything it knows of the caller came as JSON."""
    said = json.loads(request)
    assistant = graph.with_config(said.get("assistant") or {})
    return assistant.invoke(said["input"], said.get("config"))


def test_threads_are_configured_through_json() -> None:
    """Modes, nodes, scope and ttl, of an assistant and of a single run, as JSON only."""
    graph, ran = build(CachePolicy(key=["query"], version="1"))

    def ask(thread: str, control: Any = None, assistant: Any = None) -> list[str]:
        ran.clear()
        configurable = {"thread_id": thread}
        if control is not None:
            configurable["cache_control"] = control
        request: dict[str, Any] = {
            "input": {"query": "q"},
            "config": {"configurable": configurable},
        }
        if assistant is not None:
            request["assistant"] = {"configurable": {"cache_control": assistant}}
        invoke_by_json(graph, json.dumps(request))
        return list(ran)

    both = ["first", "second"]
    assert ask("a") == both
    assert ask("b") == []
    assert ask("b", {"mode": "refresh"}) == both
    assert ask("b", {"mode": "refresh", "nodes": {"second": {"mode": "use"}}}) == ["first"]
    assert ask("b", {"mode": "bypass"}) == both
    assert ask("b", {"mode": "only"}) == []
    assert ask("b", {"scope": "thread"}) == both
    assert ask("b", {"scope": "thread"}) == []
    assert ask("c", {"scope": "thread"}) == both
    # an assistant's settings are its runs', unless a run says otherwise
    assert ask("a", assistant={"mode": "bypass"}) == both
    assert ask("a", {"mode": "use"}, assistant={"mode": "bypass"}) == []
    assert ask("a", {"ttl": 1e-9}) == both
    with pytest.raises(ConfigurationError, match=r"cache_control.*unknown key 'mod'"):
        ask("a", {"mod": "use"})
    with pytest.raises(ConfigurationError, match=r"configurable\['cache_contol'\]: did you mean"):
        graph.invoke({}, {"configurable": {"thread_id": "a", "cache_contol": {"mode": "use"}}})
    with pytest.raises(ConfigurationError, match=r"unknown node 'third'"):
        ask("a", {"nodes": {"third": {"mode": "use"}}})


def test_graphs_inside_inherit_a_threads_settings_through_json() -> None:
    """A subgraph is told by the run of the graph around it, by node name too."""
    node, ran = counted()
    inner: Any = StateGraph(State)
    inner.add_node("deep", node, cache_policy=CachePolicy(key=["query"], version="1"))
    inner.add_edge(START, "deep")
    builder = StateGraph(State).add_node("sub", inner.compile())
    builder.add_edge(START, "sub")
    graph: Any = builder.compile(checkpointer=InMemorySaver(), cache=MemoryCache())
    for control, runs in (
        ("{}", 1),
        ("{}", 1),
        ('{"mode": "refresh"}', 2),
        ('{"nodes": {"deep": {"mode": "bypass"}}}', 3),
        ('{"scope": "thread"}', 4),
        ('{"scope": "thread"}', 4),
    ):
        conf = f'{{"thread_id": "t", "cache_control": {control}}}'
        invoke_by_json(
            graph, f'{{"input": {{"query": "q"}}, "config": {{"configurable": {conf}}}}}'
        )
        assert len(ran) == runs, control
