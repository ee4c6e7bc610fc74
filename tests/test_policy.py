"""What policies and cache controls accept, and what they say about what they do not."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import inspect
import re
from datetime import timedelta
from typing import Any

import pytest
from langchain_core.runnables import RunnableConfig
from langgraph.cache.memory import InMemoryCache
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.graph import START
from langgraph.graph import StateGraph as LangGraphStateGraph
from langgraph.types import CachePolicy as LangGraphPolicy
from langgraph.types import RetryPolicy
from typing_extensions import TypedDict

from langgraph_perf import (
    CacheControl,
    CacheMiss,
    CachePolicy,
    ConfigurationError,
    DiskCache,
    LangGraphPerfError,
    MemoryCache,
    StateGraph,
)


class State(TypedDict, total=False):
    query: str
    user_id: str
    answer: str


def build(policy: Any, cache: Any = None, **kwargs: Any) -> Any:
    builder = StateGraph(State)
    builder.add_node("node", lambda state: {"answer": "done"}, cache_policy=policy, **kwargs)
    return builder.add_edge(START, "node").compile(cache=MemoryCache() if cache is None else cache)


@pytest.mark.parametrize(
    ("field", "value", "accepted"),
    [
        ("key", "query", "did you mean ['query']"),
        ("key", [], "key=lambda state: None"),
        ("key", [1], "field names"),
        ("key", 7, "field names, a callable or None"),
        ("vary", "context", "dotted names"),
        ("vary", ["user"], "'context.user_id'"),
        ("vary", ["context."], "'context.user_id'"),
        ("scope", "user", "'global', 'thread', 'run'"),
        ("ttl", -1, "a positive number of seconds"),
        ("ttl", 0, "a positive number of seconds"),
        ("ttl", "60", "a positive number of seconds"),
        ("ttl", True, "a positive number of seconds"),
        ("ttl", float("nan"), "a positive number of seconds"),
        ("ttl", timedelta(0), "a positive timedelta"),
        ("jitter", 2, "from 0 to 1"),
        ("jitter", "a", "from 0 to 1"),
        ("jitter", 0.1, "ttl= besides"),
        ("tags", "docs", "did you mean ['docs']"),
        ("tags", [1], "strings or a callable"),
        ("tags", ["user:{"], "{field}"),
        ("tags", ["user:{}"], "plain state field names"),
        ("tags", ["user:{user.id}"], "plain state field names"),
        ("version", 1.5, "a string, an int or None"),
        ("version", True, "a string, an int or None"),
        ("when", True, "a callable"),
    ],
)
def test_a_wrong_field_is_named(field: str, value: Any, accepted: str) -> None:
    """A field that cannot be what it is says its name, what was given and what is accepted."""
    with pytest.raises(ConfigurationError) as caught:
        CachePolicy(**{field: value})
    assert str(caught.value).startswith(f"CachePolicy.{field}: got ")
    assert accepted in str(caught.value)


def test_errors_are_of_the_family() -> None:
    """Configuration errors are ValueErrors and have the library's base."""
    assert issubclass(ConfigurationError, ValueError)
    assert issubclass(ConfigurationError, LangGraphPerfError)
    assert issubclass(CacheMiss, LookupError)


def test_a_policy_does_not_change() -> None:
    """Policies are immutable and keyword-only."""
    policy = CachePolicy(key=["query"], ttl=timedelta(minutes=1))
    assert policy.ttl == 60
    assert policy.key == ("query",)
    with pytest.raises(AttributeError):
        policy.ttl = 5  # type: ignore[misc]
    assert copy.copy(policy) == dataclasses.replace(policy) == policy


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: CachePolicy(["query"]), "got ['query'] without a name"),  # type: ignore[misc]
        (lambda: CachePolicy(keys=["q"]), "no argument keys=; did you mean key=?"),  # type: ignore[call-arg]
        (lambda: CachePolicy(key_func=str), "did you mean key=?"),  # type: ignore[call-arg]
        (lambda: CachePolicy(colour=1), "no argument colour=; accepted: key="),  # type: ignore[call-arg]
        (lambda: CacheControl(mod="use"), "did you mean mode=?"),  # type: ignore[call-arg]
    ],
)
def test_an_argument_that_there_is_not(make: Any, says: str) -> None:
    """It is named, with what is accepted and may have been meant."""
    with pytest.raises(ConfigurationError) as caught:
        make()
    assert says in str(caught.value)
    assert "accepted: " in str(caught.value)


@pytest.mark.parametrize(
    "policy",
    [
        {"key": lambda state, config: 1},
        {"tags": lambda state, runtime: []},
        {"when": lambda: True},
    ],
)
def test_functions_that_cannot_be_called_with_what_they_get(policy: dict[str, Any]) -> None:
    """They would leave the node uncached for ever."""
    (name,) = policy
    with pytest.raises(ConfigurationError, match=rf"CachePolicy: {name} is called as {name}\("):
        CachePolicy(**policy)


@pytest.mark.parametrize("serde", [5, "x", JsonPlusSerializer, object()])
def test_what_is_no_serde(serde: Any) -> None:
    """It would fail with each result, and nothing would ever be stored."""
    with pytest.raises(ConfigurationError, match=r"MemoryCache: serde: got .*; accepted: "):
        MemoryCache(serde=serde)


@pytest.mark.parametrize(
    ("policy", "where", "name", "hint"),
    [
        (CachePolicy(key=["qery"]), "CachePolicy.key", "qery", "input_schema="),
        (
            CachePolicy(key=["query", "context.user_id"]),
            "CachePolicy.key",
            "context.user_id",
            "vary=['context.user_id']",
        ),
        (CachePolicy(tags=["user:{user}"]), "CachePolicy.tags", "user", "input_schema="),
    ],
)
def test_an_unknown_field_fails_when_the_graph_is_built(
    policy: CachePolicy, where: str, name: str, hint: str
) -> None:
    """A field the node's input does not have is refused by ``add_node``, naming those it has."""
    with pytest.raises(ConfigurationError) as caught:
        build(policy)
    message = str(caught.value)
    assert f"node 'node', {where}" in message
    assert repr(name) in message
    assert "answer, query, user_id" in message
    assert hint in message


def test_defaults_are_checked_at_compile() -> None:
    """A default policy is checked against each node it applies to."""
    builder = StateGraph(State).set_node_defaults(cache_policy=CachePolicy(key=["nope"]))
    builder.add_node("node", lambda state: None).add_edge(START, "node")
    with pytest.raises(ConfigurationError, match="nope"):
        builder.compile(cache=MemoryCache())


@pytest.mark.parametrize("policy", [5, "60", {"ttl": 60}, InMemoryCache()])
def test_what_is_no_policy_is_refused(policy: Any) -> None:
    """``cache_policy=`` of another type is refused by ``add_node`` and ``set_node_defaults``."""
    accepted = r"cache_policy=\): got .*; accepted: langgraph_perf\.CachePolicy"
    with pytest.raises(ConfigurationError, match=r"add_node\('node', " + accepted):
        build(policy)
    with pytest.raises(ConfigurationError, match=r"set_node_defaults\(" + accepted):
        StateGraph(State).set_node_defaults(cache_policy=policy)


@pytest.mark.parametrize("cache", [True, ".cache", {}, CachePolicy()])
def test_what_is_no_cache_is_refused(cache: Any) -> None:
    """``compile(cache=)`` of another type is refused and says what to give."""
    with pytest.raises(ConfigurationError, match=r"DiskCache\(directory\)"):
        build(CachePolicy(), cache=cache)


def test_tags_on_a_foreign_cache_are_refused() -> None:
    """A cache that cannot invalidate refuses policies with tags when the graph is compiled."""
    with pytest.raises(ConfigurationError, match="InMemoryCache cannot invalidate"):
        build(CachePolicy(tags=["docs"]), cache=InMemoryCache())


def test_tags_of_subgraphs_on_a_foreign_cache_are_refused() -> None:
    """That goes for the nodes of subgraphs that will inherit it as well."""
    inner = StateGraph(State)
    inner.add_node("work", lambda state: None, cache_policy=CachePolicy(tags=["docs"]))
    outer = StateGraph(State).add_node("inner", inner.add_edge(START, "work").compile())
    with pytest.raises(ConfigurationError, match=r"'inner\|work'"):
        outer.add_edge(START, "inner").compile(cache=InMemoryCache())
    # but a cache between them is the one they use
    middle = StateGraph(State).add_node("inner", outer.add_edge(START, "inner").compile())
    root = StateGraph(State).add_node(
        "middle", middle.add_edge(START, "inner").compile(cache=MemoryCache())
    )
    root.add_edge(START, "middle").compile(cache=InMemoryCache())


@pytest.mark.parametrize(
    ("control", "message"),
    [
        ({"mdoe": "refresh"}, "unknown key 'mdoe'; accepted: mode, ttl, scope, nodes"),
        ({"mode": "refersh"}, "'use', 'refresh', 'bypass', 'only'"),
        ({"ttl": -1}, "cache_control.ttl: got -1"),
        ({"scope": "mine"}, "'global', 'thread', 'run'"),
        ({"nodes": ["node"]}, "a mapping of node names"),
        ({"nodes": {"node": {"mode": "x"}}}, "cache_control.nodes['node'].mode: got 'x'"),
        ({"nodes": {"node": {"nodes": {}}}}, "unknown key 'nodes'; accepted: mode, ttl, scope"),
        ({"nodes": {"nod": {"mode": "use"}}}, "unknown node 'nod'; accepted: node"),
        ("refresh", "a mapping with the keys mode, ttl, scope, nodes"),
    ],
)
async def test_a_wrong_control_fails_the_call(control: Any, message: str) -> None:
    """A typo in ``cache_control`` is an error of the call that names what is accepted."""
    graph = build(CachePolicy())
    config = {"configurable": {"cache_control": control}}
    with pytest.raises(ConfigurationError) as caught:
        graph.invoke({"query": "q"}, config)
    assert message in str(caught.value)
    with pytest.raises(ConfigurationError):
        await graph.ainvoke({"query": "q"}, config)


def test_controls_for_nodes_inherit_from_the_run() -> None:
    """What a node's own control leaves open comes from the run's."""
    control = CacheControl.of({"ttl": 5, "mode": "refresh", "nodes": {"a": {"mode": "use"}}})
    assert control.for_node("a") == CacheControl(mode="use", ttl=5)
    assert control.for_node("b").mode == "refresh"


def test_langgraphs_own_policy_is_upgraded() -> None:
    """LangGraph's policy keeps its key function and ttl."""
    calls: list[Any] = []

    def key_func(state: Any) -> str:
        calls.append(state)
        return "always"

    graph = build(LangGraphPolicy(key_func=key_func, ttl=60))
    graph.invoke({"query": "a"})
    graph.invoke({"query": "b"})
    assert len(calls) == 2
    assert graph.perf.stats().nodes["node"].hits == 1
    assert CachePolicy.of(LangGraphPolicy(ttl=7)).ttl == 7
    assert CachePolicy.of(LangGraphPolicy()).key is None


def test_bad_directories_are_named(tmp_path: Any) -> None:
    """A disk cache that cannot live where it is told says so when it is made."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigurationError, match="directory"):
        DiskCache(tmp_path / "file")
    with pytest.raises(ConfigurationError, match="directory"):
        DiskCache(7)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["cache_polcy", "cachepolicy", "policy", "cache", "resource"])
def test_misspelt_arguments_of_add_node_are_refused(name: str) -> None:
    """LangGraph would take them, and the node would run uncached."""
    with pytest.raises(ConfigurationError, match=f"{name}=.*did you mean"):
        StateGraph(State).add_node("node", lambda state: {}, **{name: None})


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(CachePolicy)])
def test_fields_of_a_policy_are_no_arguments_of_add_node(name: str) -> None:
    """LangGraph would take them too, and the node would run uncached, or for ever unchanged."""
    belongs = re.escape(f"{name}=): there is no such argument; it belongs in cache_policy=")
    with pytest.raises(ConfigurationError, match=belongs):
        StateGraph(State).add_node("node", lambda state: {}, **{name: None})
    with pytest.raises(ConfigurationError, match=belongs):
        StateGraph(State).set_node_defaults(**{name: None})


@pytest.mark.parametrize(
    ("method", "name", "hint"),
    [
        ("add_node", "nonsense", "accepted: .*cache_policy=, .*timeout="),
        ("set_node_defaults", "cache", "did you mean cache_policy="),
        ("compile", "cach", "did you mean cache="),
        ("compile", "resource", "did you mean resources="),
        ("compile", "ttl", "accepted: cache=, "),
    ],
)
def test_arguments_that_nobody_knows_are_refused(method: str, name: str, hint: str) -> None:
    """With what there is instead."""
    builder = StateGraph(State).add_node("node", lambda state: {}).add_edge(START, "node")
    given = ("other", lambda state: {}) if method == "add_node" else ()
    with pytest.raises(ConfigurationError, match=f"{method}.*{name}=.*{hint}"):
        getattr(builder, method)(*given, **{name: None})


def test_deprecated_arguments_of_langgraph_go_on_working() -> None:
    """``add_node`` takes them without naming them."""
    builder = StateGraph(State)
    for name, value in {"retry": RetryPolicy(), "input": State}.items():
        with pytest.warns(DeprecationWarning, match=name):
            builder.add_node(name, lambda state: {}, **{name: value})
    assert builder.nodes["retry"].retry_policy == RetryPolicy()


def test_arguments_that_only_langgraph_knows_are_handed_on() -> None:
    """Later releases may have more of them, with names like ours."""
    known = inspect.signature(LangGraphStateGraph.add_node).parameters.keys() - {"kwargs"}
    ours = inspect.signature(StateGraph.add_node).parameters.keys()
    for name in known - ours:
        StateGraph(State).add_node("node", lambda state: {}, **{name: None})


def test_an_async_key_is_refused() -> None:
    """A coroutine is no key."""

    async def key(state: Any) -> str:
        return "k"

    with pytest.raises(ConfigurationError, match=r"CachePolicy.key: .* an async function"):
        CachePolicy(key=key)


class Told(TypedDict, total=False):
    query: str
    told: list[str]


def tells(state: Told, config: RunnableConfig) -> Told:
    """What the configuration says of the names in the query."""
    return {"told": [str(config["configurable"].get(name)) for name in state["query"].split()]}


def telling(policy: CachePolicy | None = None) -> Any:
    builder = StateGraph(Told).add_node("node", tells, cache_policy=policy or CachePolicy())
    return builder.add_edge(START, "node").compile(cache=MemoryCache())


@pytest.mark.parametrize("bound", [False, True])
def test_what_langgraph_makes_configurable_counts(bound: bool) -> None:
    """It takes what it does not know of a config as configurable; so does the key."""
    graph = telling()
    for user in ("ann", "bob", "carl" if bound else 0, "ann"):
        given: Any = {"user_id": user}
        asked = graph.with_config(given) if bound else graph
        told = asked.invoke({"query": "user_id"}, None if bound else given)["told"]
        assert told == [str(user)]
    assert graph.perf.stats().nodes["node"].runs == 3
    ignored: Any = {"user_id": None, "more": []}
    assert graph.invoke({"query": "user_id more"}, ignored)["told"] == ["None", "None"]
    assert graph.invoke({"query": "user_id more"})["told"] == ["None", "None"]
    assert graph.perf.stats().nodes["node"].runs == 4
    refresh: Any = {"cache_control": {"mode": "refresh"}, "user_id": "ann"}
    graph.invoke({"query": "user_id"}, refresh)
    assert graph.perf.stats().nodes["node"].runs == 5
    misspelt: Any = {"cache_controll": {"mode": "refresh"}}
    with pytest.raises(ConfigurationError, match="did you mean 'cache_control'"):
        graph.invoke({"query": "user_id"}, misspelt)


@pytest.mark.parametrize("name", ["thread_id", "assistant_id", "x-request-id"])
def test_what_is_left_out_of_the_key_can_be_named(name: str) -> None:
    """Thread, run and request identity are no part of it, unless ``vary`` says so."""
    for policy, runs in ((CachePolicy(), 1), (CachePolicy(vary=[f"configurable.{name}"]), 2)):
        graph = telling(policy)
        for value in ("a", "b", "a"):
            told = graph.invoke({"query": name}, {"configurable": {name: value}})["told"]
            assert runs == 1 or told == [value]
        assert graph.perf.stats().nodes["node"].runs == runs


def test_templates_cannot_be_invalidated() -> None:
    """Nobody fills their fields in, and nothing would be invalidated."""
    with MemoryCache() as cache:
        with pytest.raises(ConfigurationError, match=r"got 'user:\{user_id\}', whose field nobody"):
            cache.invalidate("docs", "user:{user_id}")
        with pytest.raises(ConfigurationError, match="such as 'user:42'"):
            asyncio.run(cache.ainvalidate("user:{user_id}"))
        cache.invalidate("{}", "{1}", "{ }", "a}{b")


async def test_clear_cache_reaches_subgraphs() -> None:
    """By default all that is in the graph's own cache; with a node, what is inside it."""
    runs: list[str] = []

    def graph_with(name: str, node: Any, **kwargs: Any) -> Any:
        builder = StateGraph(Told).add_node(name, node, cache_policy=CachePolicy(version=1))
        return builder.add_edge(START, name).compile(name=f"with {name}", **kwargs)

    def leaf(state: Told) -> Told:
        runs.append("leaf")
        return {"told": ["leaf"]}

    middle = graph_with("middle", graph_with("leaf", leaf))
    graph = graph_with("sub", middle, cache=MemoryCache())
    for nodes, cleared in (
        (None, True),
        (["sub"], True),
        (["sub", "sub|middle"], True),
        (["sub|middle|leaf"], False),  # the result of the node around it is still there
        ([], False),
    ):
        graph.invoke({"query": "q"})
        before = len(runs)
        await graph.aclear_cache(nodes)
        graph.invoke({"query": "q"})
        assert (len(runs) > before) is cleared
        graph.clear_cache()
    with pytest.raises(ConfigurationError, match=r"'leaf'; accepted: sub, sub\|middle, sub"):
        graph.clear_cache(["leaf"])
    # what has a cache of its own is not in this one
    graph = graph_with("sub", graph_with("leaf", leaf, cache=MemoryCache()), cache=MemoryCache())
    graph.invoke({"query": "q"})
    graph.clear_cache()
    before = len(runs)
    graph.invoke({"query": "q"})
    assert len(runs) == before
    with pytest.raises(ConfigurationError, match=r"accepted: sub$"):
        graph.clear_cache(["sub|leaf"])
