"""A graph with policies: keys, replay, storing, scopes, subgraphs, every kind of node and state."""

from __future__ import annotations

import asyncio
import operator
import uuid
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import pytest
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.runnables import RunnableConfig, RunnableLambda, RunnableSequence
from langchain_core.tools import tool
from langchain_core.tracers.base import BaseTracer
from langgraph.cache.memory import InMemoryCache
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START
from langgraph.graph import StateGraph as LangGraphStateGraph
from langgraph.graph.message import add_messages
from langgraph.prebuilt import ToolNode
from langgraph.runtime import Runtime
from langgraph.types import Command, RetryPolicy, Send, interrupt
from pydantic import BaseModel
from typing_extensions import TypedDict

from langgraph_perf import (
    CacheMiss,
    CachePolicy,
    ConfigurationError,
    DiskCache,
    MemoryCache,
    StateGraph,
)
from langgraph_perf.caches.base import Cache
from tests.conftest import Clock


class State(TypedDict, total=False):
    query: str
    user_id: str
    answer: Any
    path: Annotated[list[str], operator.add]


def build(node: Any, policy: CachePolicy | None = None, cache: Any = None, **kwargs: Any) -> Any:
    builder = StateGraph(State, **kwargs)
    builder.add_node("node", node, cache_policy=policy or CachePolicy())
    return builder.add_edge(START, "node").compile(cache=cache or MemoryCache())


class Counting:
    """A node that counts its runs, which are no part of what it is."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, state: State) -> State:
        self.runs += 1
        return {"answer": state.get("query")}


def runs_of(graph: Any) -> int:
    return graph.perf.stats().nodes["node"].runs  # type: ignore[no-any-return]


# -- keys -----------------------------------------------------------------------------------------


def test_only_the_named_fields_are_in_the_key() -> None:
    """``key=[...]`` looks at those fields; a missing one and ``None`` are two things."""
    graph = build(lambda state: {"answer": 1}, CachePolicy(key=["query"]))
    graph.invoke({"query": "q", "user_id": "a"})
    graph.invoke({"query": "q", "user_id": "b"})
    assert runs_of(graph) == 1
    graph.invoke({"query": None})
    graph.invoke({"user_id": "a"})
    assert runs_of(graph) == 3


def test_a_key_callable_that_raises_runs_uncached(caplog: pytest.LogCaptureFixture) -> None:
    """A failing key function costs the hit, not the run."""
    graph = build(lambda state: {"answer": 1}, CachePolicy(key=lambda state: state["nope"]))
    for _ in range(2):
        assert graph.invoke({"query": "q"})["answer"] == 1
    assert graph.perf.stats().nodes["node"].refusals == {"key_raised": 2}
    assert caplog.text.count("key= raised KeyError") == 1


@dataclass
class Context:
    user_id: str
    model: str = "small"


def test_context_and_configurable_are_in_the_key_as_vary_says() -> None:
    """By default all of both; ``vary=()`` nothing; names only what they name."""

    def count(policy: CachePolicy) -> int:
        graph = build(lambda state: {"answer": 1}, policy, context_schema=Context)
        for user, model, lang in (
            ("a", "x", "de"),
            ("b", "x", "de"),
            ("a", "y", "de"),
            ("a", "x", "en"),
        ):
            graph.invoke(
                {"query": "q"},
                {"configurable": {"lang": lang}},
                context=Context(user, model),
            )
        return runs_of(graph)

    assert count(CachePolicy()) == 4
    assert count(CachePolicy(vary=())) == 1
    assert count(CachePolicy(vary=["context.user_id"])) == 2
    assert count(CachePolicy(vary=["context.model", "configurable.lang"])) == 3
    assert count(CachePolicy(vary=["configurable"])) == 2


@pytest.mark.parametrize(
    ("tag", "run"),
    [
        ("user:{context.user_id}", lambda user: {"context": Context(user)}),
        ("user:{configurable.user}", lambda user: {"config": {"configurable": {"user": user}}}),
        (
            "user:{configurable.thread_id}",
            lambda user: {"config": {"configurable": {"thread_id": user}}},
        ),
    ],
)
def test_tags_may_name_who_runs_the_graph(tag: str, run: Any) -> None:
    """Users are in the context or in ``configurable`` more often than in the input."""
    cache = MemoryCache()
    builder = StateGraph(State, context_schema=Context)
    policy = CachePolicy(version=1, tags=[tag])
    builder.add_node("node", lambda state: {"answer": 1}, cache_policy=policy)
    graph = builder.add_edge(START, "node").compile(cache=cache)
    for _ in range(2):
        for user in ("ann", "bob"):
            graph.invoke({"query": "q"}, **run(user))
    assert runs_of(graph) == 2
    cache.invalidate("user:ann")
    for user in ("ann", "bob"):
        graph.invoke({"query": "q"}, **run(user))
    assert runs_of(graph) == 3
    graph.invoke({"query": "q"})  # nobody's: it cannot be told what it depends on
    graph.invoke({"query": "q"})
    assert runs_of(graph) == 5


@pytest.mark.parametrize("tag", ["{context.nobody}", "{state.query}", "{configurable.__x}"])
def test_tags_that_name_what_no_run_has(tag: str) -> None:
    """Refused when the graph is built."""
    with pytest.raises(ConfigurationError, match=r"CachePolicy\.tags.*accepted: "):
        build(lambda state: {}, CachePolicy(tags=[tag]), context_schema=Context)


def test_identity_of_thread_run_and_request_is_not_in_the_key() -> None:
    """Another thread, run or request hits; another user of the server does not."""
    graph = build(lambda state: {"answer": 1})
    for i in range(3):
        conf = {
            "thread_id": str(i),
            "run_id": str(uuid.uuid4()),
            "langgraph_request_id": str(i),
            "langgraph_auth_user": object(),
            "__request_start_time_ms__": i,
            "assistant_id": str(i),
        }
        graph.invoke({"query": "q"}, {"configurable": {**conf, "langgraph_auth_user_id": "u"}})
    assert runs_of(graph) == 1
    graph.invoke({"query": "q"}, {"configurable": {"langgraph_auth_user_id": "other"}})
    assert runs_of(graph) == 2


def test_a_context_with_a_client_runs_uncached_and_names_vary(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A context that cannot be keyed is never guessed at; the warning tells the way out."""
    graph = build(lambda state: {"answer": 1}, context_schema=dict)
    for _ in range(2):
        graph.invoke({"query": "q"}, context={"client": object()})
    assert runs_of(graph) == 2
    assert caplog.text.count("context") >= 1
    assert "vary=" in caplog.text


def test_closures_partials_and_methods_are_told_apart() -> None:
    """Nodes of one name on one cache that differ in what they captured do not share entries."""

    class Model:
        def __init__(self, name: str) -> None:
            self.name = name

        def answer(self, state: State) -> State:
            return {"answer": self.name}

    def made(name: str) -> Any:
        def node(state: State) -> State:
            return {"answer": name}

        return node

    def with_argument(state: State, name: str) -> State:
        return {"answer": name}

    async def anode(state: State) -> State:
        return {"answer": "async"}

    cache = MemoryCache()
    nodes = [made("a"), made("b"), Model("c").answer, Model("d").answer]
    nodes += [partial(with_argument, name="e"), partial(with_argument, name="f")]
    nodes += [lambda state: {"answer": "g"}, lambda state: {"answer": "h"}]
    for expected, node in zip("abcdefgh", nodes, strict=True):
        assert build(node, cache=cache).invoke({"query": "q"})["answer"] == expected
    graph = build(anode, cache=cache)
    assert asyncio.run(graph.ainvoke({"query": "q"}))["answer"] == "async"


def test_what_cannot_be_fingerprinted_runs_uncached(caplog: pytest.LogCaptureFixture) -> None:
    """A node that captured something unkeyable runs uncached, and ``version=`` is the way out."""
    client = (x for x in ())  # a generator

    def node(state: State) -> State:
        return {"answer": repr(type(client))}

    graph = build(node)
    graph.invoke({"query": "q"})
    graph.invoke({"query": "q"})
    assert runs_of(graph) == 2
    assert "client" in caplog.text
    assert "version=" in caplog.text
    graph = build(node, CachePolicy(version="1"))
    graph.invoke({"query": "q"})
    graph.invoke({"query": "q"})
    assert runs_of(graph) == 1


def test_graphs_of_different_names_do_not_share() -> None:
    """The graph's name is part of what a node is."""
    cache = MemoryCache()
    counting = [0]

    def node(state: State) -> State:
        counting[0] += 1
        return {"answer": 1}

    for name in ("one", "two", "one"):
        builder = StateGraph(State)
        builder.add_node("node", node, cache_policy=CachePolicy(version=1))
        graph = builder.add_edge(START, "node").compile(cache=cache, name=name)
        graph.invoke({"query": "q"})
    assert counting == [2]


# -- replay ---------------------------------------------------------------------------------------


class Answer(BaseModel):
    text: str


@dataclass
class Point:
    x: int
    y: list[int] = field(default_factory=list)


@pytest.mark.parametrize(
    "value",
    [
        None,
        {"a": (1, 2), "b": {3}, "c": None},
        Answer(text="x"),
        Point(1, [2]),
        [AIMessage("x", id="1"), HumanMessage("y")],
        2**80,
        float("inf"),
        b"bytes",
    ],
    ids=repr,
)
def test_values_come_back_equal_and_of_their_type(value: Any, cache: Cache) -> None:
    """A hit returns what the run returned, and changing it never changes the cache."""
    graph = build(lambda state: {"answer": value}, CachePolicy(version=1), cache)
    first = graph.invoke({"query": "q"})["answer"]
    second = graph.invoke({"query": "q"})["answer"]
    assert type(first) is type(second)
    if not isinstance(value, list):
        assert first == second
    assert runs_of(graph) == 1
    if isinstance(second, dict):
        second["a"] = "changed"
    elif isinstance(second, Point):
        second.y.append(3)
    again = graph.invoke({"query": "q"})["answer"]
    if not isinstance(value, list):
        assert again == first


def test_commands_are_replayed_with_their_destinations() -> None:
    """A ``Command`` is a result: its update, its goto and its Sends come back on a hit."""

    def node(state: State) -> Command[Any]:
        return Command(update={"path": ["node"]}, goto=["left", Send("right", {"query": "sent"})])

    builder = StateGraph(State)
    builder.add_node("node", node, cache_policy=CachePolicy(), destinations=("left", "right"))
    builder.add_node("left", lambda state: {"path": ["left"]})
    builder.add_node("right", lambda state: {"path": [state["query"]]})
    graph = builder.add_edge(START, "node").compile(cache=MemoryCache())
    first, second = (graph.invoke({"query": "q", "path": []}) for _ in range(2))
    assert first == second
    assert sorted(first["path"]) == ["left", "node", "sent"]
    assert runs_of(graph) == 1


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_a_hit_marks_the_trace(asynchronous: bool) -> None:
    """A tracer sees that the node was answered from the cache, under which key and how old."""

    class Tracer(BaseTracer):
        def __init__(self) -> None:
            super().__init__()
            self.marks: list[Any] = []

        def _persist_run(self, run: Any) -> None:
            self.marks += [
                child.metadata["langgraph_perf"]
                for child in run.child_runs
                if "langgraph_perf" in child.metadata
            ]

    graph = build(lambda state: {"answer": 1})
    tracer = Tracer()

    async def run() -> None:
        config: RunnableConfig = {"callbacks": [tracer]}
        if asynchronous:
            await graph.ainvoke({"query": "q"}, config)
        else:
            graph.invoke({"query": "q"}, config)

    await run()
    assert tracer.marks == []
    await run()
    (mark,) = tracer.marks
    assert mark["cached"] is True
    assert mark["age_seconds"] >= 0
    assert isinstance(mark["key"], str)


def test_stats_tell_what_hits_saved() -> None:
    """Hits add up the time and the tokens that their runs took."""
    reply = AIMessage(
        "hi", usage_metadata={"input_tokens": 3, "output_tokens": 4, "total_tokens": 7}
    )
    model = GenericFakeChatModel(messages=iter([reply]))

    def node(state: State) -> State:
        return {"answer": model.invoke("hello").content}

    graph = build(node, CachePolicy(version=1))
    for _ in range(3):
        graph.invoke({"query": "q"})
    stats = graph.perf.stats().nodes["node"]
    assert (stats.hits, stats.misses, stats.runs) == (2, 1, 1)
    assert (stats.tokens_spent, stats.tokens_saved) == (7, 14)
    assert stats.seconds_saved == pytest.approx(2 * stats.seconds_spent)


# -- storing --------------------------------------------------------------------------------------


def test_a_raising_node_stores_nothing() -> None:
    """An error is not a result; a retry that succeeds is."""
    attempts: list[int] = []

    def node(state: State) -> State:
        attempts.append(1)
        if len(attempts) < 3:
            raise ConnectionError
        return {"answer": "done"}

    builder = StateGraph(State)
    builder.add_node(
        "node",
        node,
        cache_policy=CachePolicy(version=1),
        retry_policy=RetryPolicy(initial_interval=0.001, jitter=False, max_attempts=2),
    )
    graph = builder.add_edge(START, "node").compile(cache=MemoryCache())
    with pytest.raises(ConnectionError):
        graph.invoke({"query": "q"})
    assert graph.invoke({"query": "q"})["answer"] == "done"
    assert graph.invoke({"query": "q"})["answer"] == "done"
    assert len(attempts) == 3


def test_answers_of_humans_are_not_stored_even_from_inside_a_subgraph() -> None:
    """A result that a resume value went into, at any depth, is nobody else's."""

    def ask(state: State) -> State:
        return {"answer": interrupt("really?")}

    inner = StateGraph(State).add_node("ask", ask).add_edge(START, "ask").compile()

    def calls_inner(state: State) -> Any:
        return inner.invoke(state)

    for node in (inner, calls_inner):
        builder = StateGraph(State)
        builder.add_node("node", node, cache_policy=CachePolicy(version=1))
        graph = builder.add_edge(START, "node").compile(
            cache=MemoryCache(), checkpointer=InMemorySaver()
        )
        for thread, reply in (("a", "yes"), ("b", "no")):
            config: Any = {"configurable": {"thread_id": thread}}
            asked = graph.invoke({"query": "q"}, config)
            assert "__interrupt__" in asked, thread
            resume = {asked["__interrupt__"][0].id: reply} if thread == "b" else reply
            assert graph.invoke(Command(resume=resume), config)["answer"] == reply


def test_when_decides_what_is_stored(caplog: pytest.LogCaptureFixture) -> None:
    """``when`` keeps a result out; one that raises keeps it out too, and is logged."""
    answers = iter(["", "", "good"])
    graph = build(
        lambda state: {"answer": next(answers)},
        CachePolicy(version=1, when=lambda result: bool(result["answer"])),
    )
    assert [graph.invoke({"query": "q"})["answer"] for _ in range(4)] == ["", "", "good", "good"]
    assert graph.perf.stats().nodes["node"].refusals == {"when": 2}
    graph = build(lambda state: {"answer": 1}, CachePolicy(when=lambda result: result.nope))
    assert graph.invoke({"query": "q"})["answer"] == 1
    assert "when= raised AttributeError" in caplog.text


def test_ttl_and_jitter(clock: Clock) -> None:
    """A result is served until its ttl and no longer; jitter only ever shortens it."""
    cache = MemoryCache(clock=clock)
    graph = build(lambda state: {"answer": 1}, CachePolicy(ttl=60), cache)
    graph.invoke({"query": "q"})
    clock.advance(59)
    graph.invoke({"query": "q"})
    assert runs_of(graph) == 1
    clock.advance(1)
    graph.invoke({"query": "q"})
    assert runs_of(graph) == 2
    jittery = build(lambda state: {"answer": 2}, CachePolicy(ttl=60, jitter=0.5), cache)
    for i in range(50):
        jittery.invoke({"query": str(i)})
    clock.advance(29)
    for i in range(50):
        jittery.invoke({"query": str(i)})
    assert runs_of(jittery) == 50
    clock.advance(31)
    for i in range(50):
        jittery.invoke({"query": str(i)})
    assert runs_of(jittery) == 100


def test_invalidation_by_tags(cache: Cache) -> None:
    """Invalidating a tag makes what depended on it a miss, and nothing else."""
    graph = build(
        lambda state: {"answer": 1}, CachePolicy(version=1, tags=["docs", "user:{user_id}"]), cache
    )
    ask = [{"query": "q", "user_id": user} for user in ("1", "2")]
    for question in ask:
        graph.invoke(question)
    cache.invalidate("user:1")
    for question in ask:
        graph.invoke(question)
    assert runs_of(graph) == 3
    cache.invalidate("docs")
    for question in ask:
        graph.invoke(question)
    assert runs_of(graph) == 5


def test_a_tag_added_to_a_policy_counts_for_old_entries() -> None:
    """An entry stored before a tag was declared is not served under the policy that has it."""
    cache = MemoryCache()
    build(lambda state: {"answer": 1}, CachePolicy(version=1), cache).invoke({"query": "q"})
    graph = build(lambda state: {"answer": 1}, CachePolicy(version=1, tags=["docs"]), cache)
    graph.invoke({"query": "q"})
    assert runs_of(graph) == 1


def test_tags_may_come_from_a_callable() -> None:
    """``tags=callable(state)`` names the dependencies; a failing one costs the hit only."""
    cache = MemoryCache()
    graph = build(
        lambda state: {"answer": 1},
        CachePolicy(tags=lambda state: [f"doc:{state['query']}"]),
        cache,
    )
    for _ in range(2):
        graph.invoke({"query": "1"})
    cache.invalidate("doc:1")
    graph.invoke({"query": "1"})
    assert runs_of(graph) == 2
    graph.invoke({})
    assert graph.perf.stats().nodes["node"].refusals == {"tags_raised": 1}


def test_a_tag_field_that_has_no_stable_text_runs_uncached(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A tag takes the text of plain values only."""
    graph = build(lambda state: {"answer": 1}, CachePolicy(tags=["user:{user_id}"]))
    graph.invoke({"query": "q", "user_id": ["a"]})
    assert "is a list" in caplog.text
    graph.invoke({"query": "q"})
    assert "is not in the input" in caplog.text


# -- control --------------------------------------------------------------------------------------


def control(**fields: Any) -> Any:
    return {"configurable": {"cache_control": fields}}


async def test_modes(cache: Cache) -> None:
    """use, refresh, bypass and only do what they say, sync and async."""
    numbers = iter(range(100))
    graph = build(lambda state: {"answer": next(numbers)}, CachePolicy(version=1), cache)
    question = {"query": "q"}
    with pytest.raises(CacheMiss) as caught:
        graph.invoke(question, control(mode="only"))
    assert caught.value.node == "node"
    with pytest.raises(CacheMiss):
        await graph.ainvoke(question, control(mode="only"))
    assert graph.invoke(question, control(mode="bypass"))["answer"] == 0
    assert graph.invoke(question)["answer"] == 1
    assert graph.invoke(question, control(mode="only"))["answer"] == 1
    assert (await graph.ainvoke(question, control(mode="only")))["answer"] == 1
    assert graph.invoke(question, control(mode="refresh"))["answer"] == 2
    assert (await graph.ainvoke(question))["answer"] == 2
    assert (await graph.ainvoke(question, control(mode="bypass")))["answer"] == 3
    assert (await graph.ainvoke(question, control(mode="refresh")))["answer"] == 4
    assert graph.invoke(question)["answer"] == 4


def test_a_run_may_ask_for_younger_results_only(clock: Clock) -> None:
    """A run's ttl narrows what it is served and what it stores; it never widens the policy's."""
    cache = MemoryCache(clock=clock)
    graph = build(lambda state: {"answer": 1}, CachePolicy(ttl=60), cache)
    graph.invoke({"query": "q"})
    clock.advance(10)
    graph.invoke({"query": "q"}, control(ttl=5))
    assert runs_of(graph) == 2
    graph.invoke({"query": "q"}, control(ttl=500))
    assert runs_of(graph) == 2
    clock.advance(5)
    graph.invoke({"query": "q"})
    assert runs_of(graph) == 3
    clock.advance(60)
    graph.invoke({"query": "q"}, control(ttl=500))
    assert runs_of(graph) == 4


def test_controls_of_single_nodes() -> None:
    """``nodes`` wins over the run's own mode, by node name."""
    builder = StateGraph(State)
    for name in ("a", "b"):
        builder.add_node(
            name, lambda state: {"path": ["x"]}, cache_policy=CachePolicy(key=["query"])
        )
    graph = builder.add_edge(START, "a").add_edge("a", "b").compile(cache=MemoryCache())
    question = {"query": "q", "path": []}
    graph.invoke(question)
    graph.invoke(question, control(mode="refresh", nodes={"b": {"mode": "use"}}))
    stats = graph.perf.stats().nodes
    assert (stats["a"].runs, stats["b"].runs) == (2, 1)


def test_with_config_carries_the_control() -> None:
    """A graph configured once keeps its control, and shares its statistics with the original."""
    graph = build(lambda state: {"answer": 1})
    refreshing = graph.with_config(configurable={"cache_control": {"mode": "refresh"}})
    for _ in range(3):
        refreshing.invoke({"query": "q"})
    assert refreshing.perf is graph.perf
    assert runs_of(graph) == 3


def test_scopes() -> None:
    """Thread and run scopes share within their own only, and a run may narrow the scope."""
    saver = InMemorySaver()

    def count(policy: CachePolicy, **asked: Any) -> int:
        builder = StateGraph(State)
        builder.add_node("node", lambda state: {"answer": 1}, cache_policy=policy)
        graph = builder.add_edge(START, "node").compile(cache=MemoryCache(), checkpointer=saver)
        for thread in ("a", "a", "b"):
            conf = {"thread_id": thread, **({"cache_control": asked} if asked else {})}
            graph.invoke({"query": "q"}, {"configurable": conf})
        return runs_of(graph)

    assert count(CachePolicy(key=["query"])) == 1
    assert count(CachePolicy(key=["query"], scope="thread")) == 2
    assert count(CachePolicy(key=["query"], scope="run")) == 3
    assert count(CachePolicy(key=["query"]), scope="thread") == 2
    assert count(CachePolicy(key=["query"], scope="run"), scope="global") == 3


def test_thread_scope_without_a_thread_says_what_to_do() -> None:
    """``scope="thread"`` needs a thread_id."""
    graph = build(lambda state: {"answer": 1}, CachePolicy(scope="thread"))
    with pytest.raises(ConfigurationError, match="thread_id"):
        graph.invoke({"query": "q"})


def test_equal_nodes_of_one_run_share_a_run_scope() -> None:
    """Within one run the second equal call hits."""
    builder = StateGraph(State)
    policy = CachePolicy(key=["query"], scope="run")
    builder.add_node("node", lambda state: {"path": ["x"]}, cache_policy=policy)
    builder.add_conditional_edges(
        "node", lambda state: "node" if len(state["path"]) < 3 else END, ["node", END]
    )
    graph = builder.add_edge(START, "node").compile(cache=MemoryCache())
    graph.invoke({"query": "q", "path": []})
    assert runs_of(graph) == 1


# -- caches and subgraphs -------------------------------------------------------------------------


def test_policies_without_any_cache_run_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    """A policy without a cache is not silently ignored."""
    builder = StateGraph(State)
    builder.add_node("node", lambda state: {"answer": 1}, cache_policy=CachePolicy())
    graph = builder.add_edge(START, "node").compile()
    for _ in range(2):
        graph.invoke({"query": "q"})
    assert graph.perf.stats().nodes["node"].refusals == {"no_cache": 2}
    assert caplog.text.count("compiled with cache=") == 1


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_foreign_caches_serve_as_plain_stores(asynchronous: bool) -> None:
    """Any LangGraph cache will do for policies without tags, shared between graphs."""
    foreign = InMemoryCache[Any]()
    for expected in (1, 0):
        graph = build(lambda state: {"answer": (1, {2})}, CachePolicy(version=1, ttl=60), foreign)
        question = {"query": "q"}
        result = await graph.ainvoke(question) if asynchronous else graph.invoke(question)
        assert result["answer"] == (1, {2})
        assert runs_of(graph) == expected
        assert graph.cache is foreign


async def test_a_wide_fan_out_reads_in_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tasks that look into a file at the same time are answered together."""
    builder = StateGraph(State)
    builder.add_node(
        "node", lambda state: {"path": [state["query"]]}, cache_policy=CachePolicy(version=1)
    )
    queries = [str(i) for i in range(256)]
    builder.add_conditional_edges(
        START, lambda state: [Send("node", {"query": query}) for query in queries], ["node"]
    )
    with DiskCache(tmp_path / "cache") as cache:
        graph = builder.compile(cache=cache)
        await graph.ainvoke({"path": []})
        reads: list[int] = []
        read = cache.read
        monkeypatch.setattr(cache, "read", lambda some: reads.append(len(some)) or read(some))
        assert (await graph.ainvoke({"path": []}))["path"] == queries
        stats = graph.perf.stats().nodes["node"]
    assert (stats.runs, stats.hits) == (256, 256)
    assert sum(reads) == 256
    assert len(reads) <= 16


def test_subgraphs_inherit_cache_control_and_statistics() -> None:
    """Nodes of subgraphs at any depth use the root's cache, obey its control and are counted."""
    inner = StateGraph(State)
    inner.add_node("work", lambda state: {"answer": 1}, cache_policy=CachePolicy())
    middle = StateGraph(State).add_node("inner", inner.add_edge(START, "work").compile())
    outer = StateGraph(State).add_node("middle", middle.add_edge(START, "inner").compile())
    graph = outer.add_edge(START, "middle").compile(cache=MemoryCache())
    for asked in ({}, {}, {"mode": "refresh"}, {"nodes": {"work": {"mode": "bypass"}}}):
        graph.invoke({"query": "q"}, control(**asked))
    stats = graph.perf.stats().nodes["middle|inner|work"]
    assert (stats.hits, stats.runs) == (1, 3)


@pytest.mark.parametrize(
    ("asked", "runs"),
    [
        ({"mode": "refresh"}, 2),
        ({"mode": "bypass"}, 2),
        ({"ttl": 10}, 2),
        ({"ttl": 1000}, 1),
        ({"mode": "use"}, 1),
    ],
)
def test_what_is_asked_of_a_node_inside_is_not_lost_in_a_hit_around_it(
    asked: dict[str, Any], runs: int
) -> None:
    """A stored result of the node around would be one of the results that the run does not want."""
    clock = Clock()
    inner = StateGraph(State)
    inner.add_node("work", lambda state: {"answer": 1}, cache_policy=CachePolicy())
    middle = StateGraph(State).add_node("inner", inner.add_edge(START, "work").compile())
    outer = StateGraph(State)
    compiled = middle.add_edge(START, "inner").compile()
    outer.add_node("middle", compiled, cache_policy=CachePolicy())
    graph = outer.add_edge(START, "middle").compile(cache=MemoryCache(clock=clock))
    graph.invoke({"query": "q"})
    clock.advance(100)
    graph.invoke({"query": "q"}, control(nodes={"work": asked}))
    assert graph.perf.stats().nodes["middle|inner|work"].runs == runs
    graph.invoke({"query": "q"})
    assert graph.perf.stats().nodes["middle|inner|work"].runs == runs


def test_subgraphs_keep_their_own_cache() -> None:
    """A subgraph compiled with a cache uses that one."""
    own, root = MemoryCache(), MemoryCache()
    inner = StateGraph(State)
    inner.add_node("work", lambda state: {"answer": 1}, cache_policy=CachePolicy())
    outer = StateGraph(State).add_node("inner", inner.add_edge(START, "work").compile(cache=own))
    outer.add_edge(START, "inner").compile(cache=root).invoke({"query": "q"})
    assert (own.stats().entries, root.stats().entries) == (1, 0)


def test_a_plain_langgraph_parent_passes_nothing_and_breaks_nothing() -> None:
    """A subgraph of ours in LangGraph's own graph runs, with its own cache if it has one."""
    inner = StateGraph(State)
    inner.add_node("work", lambda state: {"answer": 1}, cache_policy=CachePolicy())
    compiled = inner.add_edge(START, "work").compile(cache=MemoryCache())
    outer = LangGraphStateGraph(State).add_node("inner", compiled).add_edge(START, "inner")
    graph = outer.compile()
    for _ in range(2):
        assert graph.invoke({"query": "q"})["answer"] == 1
    assert compiled.perf.stats().nodes["work"].hits == 1


def test_graphs_invoked_inside_nodes_inherit_too() -> None:
    """A graph that a node invokes by itself, without passing its config, inherits the cache."""
    inner = StateGraph(State)
    inner.add_node("work", lambda state: {"answer": 1}, cache_policy=CachePolicy())
    compiled = inner.add_edge(START, "work").compile()
    fresh_thread: Any = {"configurable": {"thread_id": "own"}}

    def calls(state: State) -> Any:
        compiled.invoke({"query": "q"}, fresh_thread)
        return compiled.invoke({"query": "q"})

    graph = StateGraph(State).add_node("calls", calls).add_edge(START, "calls")
    graph.compile(cache=MemoryCache()).invoke({"query": "x"})
    assert (compiled.perf.stats().nodes["work"].hits) == 1


async def test_clear_cache_keeps_langgraphs_meaning(cache: Cache) -> None:
    """All nodes by default, the named ones if any are named, none for an empty list."""
    builder = StateGraph(State)
    for name in ("a", "b"):
        builder.add_node(
            name, lambda state: {"path": ["x"]}, cache_policy=CachePolicy(key=["query"])
        )
    graph = builder.add_edge(START, "a").add_edge("a", "b").compile(cache=cache)

    def runs() -> tuple[int, int]:
        graph.invoke({"query": "q", "path": []})
        stats = graph.perf.stats().nodes
        return stats["a"].runs, stats["b"].runs

    assert runs() == (1, 1)
    graph.clear_cache([])
    assert runs() == (1, 1)
    graph.clear_cache(["a"])
    assert runs() == (2, 1)
    await graph.aclear_cache(["b"])
    assert runs() == (2, 2)
    graph.clear_cache()
    assert runs() == (3, 3)
    with pytest.raises(ValueError, match="No cache"):
        StateGraph(State).add_node("a", runs).add_edge(START, "a").compile().clear_cache()


# -- kinds of nodes and states --------------------------------------------------------------------


def plain(state: State) -> State:
    return {"answer": "done"}


async def coroutine(state: State) -> State:
    return {"answer": "done"}


def with_everything(
    state: State, config: RunnableConfig, runtime: Runtime[Any], writer: Any = None
) -> State:
    assert config["configurable"]["thread_id"] == "t"
    assert runtime.execution_info is not None
    return {"answer": "done"}


class Method:
    def node(self, state: State) -> State:
        return {"answer": "done"}

    def __call__(self, state: State) -> State:
        return {"answer": "done"}


def _subgraph() -> Any:
    return StateGraph(State).add_node("plain", plain).add_edge(START, "plain").compile()


def _generator(state: State) -> Any:
    yield {"answer": "done"}


KINDS: dict[str, Any] = {
    "function": plain,
    "coroutine": coroutine,
    "lambda": lambda state: {"answer": "done"},
    "partial": partial(plain),
    "method": Method().node,
    "object": Method(),
    "injected": with_everything,
    "runnable": RunnableLambda(plain),
    "chain": RunnableLambda(lambda state: "done") | (lambda text: {"answer": text}),
    "subgraph": _subgraph(),
    "generator": _generator,
}


@pytest.mark.parametrize("kind", KINDS)
async def test_every_kind_of_node_is_cached(kind: str) -> None:
    """Whatever LangGraph takes for a node is run once and then answered, sync and async."""
    graph = build(KINDS[kind])
    config = {"configurable": {"thread_id": "t"}}
    if kind != "coroutine":
        assert graph.invoke({"query": "sync"}, config)["answer"] == "done"
        assert graph.invoke({"query": "sync"}, config)["answer"] == "done"
        assert runs_of(graph) == 1
    before = runs_of(graph)
    assert (await graph.ainvoke({"query": "q"}, config))["answer"] == "done"
    assert (await graph.ainvoke({"query": "q"}, config))["answer"] == "done"
    assert runs_of(graph) == before + 1
    assert graph.perf.stats().nodes["node"].refusals == {}


def test_tool_nodes_answer_under_the_ids_of_the_current_call() -> None:
    """A cached tool node answers calls with other ids under those ids."""
    executed: list[int] = []

    @tool
    def double(x: int) -> int:
        """Double a number."""
        executed.append(x)
        return 2 * x

    class Chat(TypedDict):
        messages: Annotated[list[Any], add_messages]

    builder = StateGraph(Chat)
    builder.add_node("tools", ToolNode([double]), cache_policy=CachePolicy())
    graph = builder.add_edge(START, "tools").compile(cache=MemoryCache())
    for call_id in ("call_1", "call_2"):
        call = AIMessage("", tool_calls=[{"name": "double", "args": {"x": 2}, "id": call_id}])
        result = graph.invoke({"messages": [HumanMessage("2?"), call]})["messages"][-1]
        assert isinstance(result, ToolMessage)
        assert (result.content, result.tool_call_id) == ("4", call_id)
    assert executed == [2]


@pytest.mark.parametrize(
    "key",
    [
        lambda state: state["messages"][-1],
        lambda state: state["messages"][-1].tool_calls,
        lambda state: [call["args"] for call in state["messages"][-1].tool_calls],
    ],
    ids=["message", "calls", "args"],
)
def test_tool_nodes_keyed_by_the_call_answer_the_one_at_hand(key: Any) -> None:
    """In a conversation with an equal call before it, that one has been answered."""

    @tool
    def double(x: int) -> int:
        """Double a number."""
        return 2 * x

    class Chat(TypedDict):
        messages: Annotated[list[Any], add_messages]

    builder = StateGraph(Chat)
    builder.add_node("tools", ToolNode([double]), cache_policy=CachePolicy(key=key))
    saver = InMemorySaver()
    graph = builder.add_edge(START, "tools").compile(cache=MemoryCache(), checkpointer=saver)
    asks: list[Any] = []
    for name in ("call_1", "call_2", "call_3"):
        call = AIMessage("", tool_calls=[{"name": "double", "args": {"x": 2}, "id": name}])
        asks = [HumanMessage("2?"), call]
        said = graph.invoke({"messages": asks}, {"configurable": {"thread_id": "t"}})["messages"]
        assert (said[-1].content, said[-1].tool_call_id) == ("4", name)
    # arguments alone do not tell which of the equal calls is answered
    covered = key({"messages": asks}) != [{"x": 2}]
    assert graph.perf.stats().nodes["tools"].hits == (2 if covered else 0)


@pytest.mark.parametrize("form", ["a list", "with its context"])
def test_tool_nodes_that_are_sent_calls_answer_each(form: str) -> None:
    """As prebuilt agents send them: a rerun of the loop hits, an equal call runs once, and each
    answer has the id of the call that it answers."""
    executed: list[int] = []

    @tool
    def double(x: int) -> int:
        """Double a number."""
        executed.append(x)
        return 2 * x

    class Chat(TypedDict):
        messages: Annotated[list[Any], add_messages]

    def model(state: Any) -> Any:
        names = [(x, f"call_{uuid.uuid4()}") for x in (1, 2, 1)]
        calls = [{"name": "double", "args": {"x": x}, "id": name} for x, name in names]
        return {"messages": [AIMessage("", tool_calls=calls)]}

    def route(state: Any) -> Any:
        calls = state["messages"][-1].tool_calls
        if form == "a list":
            return [Send("tools", [call]) for call in calls]
        context = {"__type": "tool_call_with_context", "state": state}
        return [Send("tools", {**context, "tool_call": call}) for call in calls]

    builder = StateGraph(Chat).add_node("model", model).add_edge(START, "model")
    builder.add_node("tools", ToolNode([double]), cache_policy=CachePolicy())
    builder.add_conditional_edges("model", route, ["tools"])
    graph = builder.compile(cache=MemoryCache())
    for _ in range(2):
        _, asked, *answers = graph.invoke({"messages": [HumanMessage("?")]})["messages"]
        said = {answer.tool_call_id: answer.content for answer in answers}
        assert said == {call["id"]: str(2 * call["args"]["x"]) for call in asked.tool_calls}
    # with the conversation beside it, it shows which of two equal calls it is
    assert sorted(executed) == ([1, 2] if form == "a list" else [1, 1, 2])


@dataclass
class Chosen:
    id: str


class ChosenModel(BaseModel):
    id: str


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("put", "get"),
    [
        (lambda i: i, lambda t: t),
        (lambda i: {"a": [{"b": {"c": i}}]}, lambda t: t["a"][0]["b"]["c"]),
        (Chosen, lambda t: t.id),
        (lambda i: [ChosenModel(id=i)], lambda t: t[0].id),
        (lambda i: {i}, lambda t: next(iter(t))),
        (lambda i: {"a": {i: 1}}, lambda t: next(iter(t["a"]))),
    ],
)
def test_a_choice_by_id_is_answered_with_what_was_chosen(put: Any, get: Any, nested: bool) -> None:
    """An equal conversation in which the named id is another message's is another input."""

    class Chat(TypedDict, total=False):
        messages: Annotated[list[Any], add_messages]
        inner: Any
        chosen: Any
        answer: str

    def pick(state: Any) -> Any:
        messages = state["inner"]["talk"] if nested else state["messages"]
        (found,) = [m for m in messages if m.id == get(state["chosen"])]
        return {"answer": found.content}

    builder = StateGraph(Chat).add_node("node", pick, cache_policy=CachePolicy())
    graph = builder.add_edge(START, "node").compile(cache=MemoryCache())
    for ids in (("m1", "m2"), ("m2", "m3"), ("m1", "m2")):
        said = [HumanMessage(text, id=name) for text, name in zip("ab", ids, strict=True)]
        want = "ab"[ids.index("m2")]
        talk: Any = {"inner": {"talk": said}} if nested else {"messages": said}
        assert graph.invoke({**talk, "chosen": put("m2")})["answer"] == want
    assert runs_of(graph) == 2


@dataclass
class DataState:
    query: str = ""
    answer: str = ""


class ModelState(BaseModel):
    query: str = ""
    answer: str = ""


@pytest.mark.parametrize("schema", [State, DataState, ModelState])
def test_every_kind_of_state_is_keyed(schema: Any) -> None:
    """Field names, templates and the whole input work for TypedDict, dataclass and pydantic."""
    cache = MemoryCache()
    for policy in (
        CachePolicy(version=1),
        CachePolicy(version=2, key=["query"], tags=["q:{query}"]),
        CachePolicy(version=3, key=lambda state: getattr(state, "query", None) or state["query"]),
    ):
        builder = StateGraph(schema)
        builder.add_node("node", lambda state: {"answer": "done"}, cache_policy=policy)
        graph = builder.add_edge(START, "node").compile(cache=cache)
        for query in ("a", "a", "b"):
            graph.invoke({"query": query})
        assert runs_of(graph) == 2
    cache.invalidate("q:a")


class Item(TypedDict):
    item: int


def test_send_inputs_are_keyed() -> None:
    """A node that Send gives its own input is keyed by that input."""

    def work(state: Item) -> Any:
        return {"path": [str(state["item"])]}

    builder = StateGraph(State)
    builder.add_node("node", work, cache_policy=CachePolicy(key=["item"]))
    builder.add_conditional_edges(
        START, lambda state: [Send("node", {"item": i % 2}) for i in range(4)], ["node"]
    )
    graph = builder.compile(cache=MemoryCache())
    assert sorted(graph.invoke({"path": []})["path"]) == ["0", "0", "1", "1"]
    assert runs_of(graph) == 2


@pytest.mark.parametrize("one_policy", [False, True])
def test_nodes_without_a_policy_are_langgraphs_own(one_policy: bool) -> None:
    """Object for object, also beside a node that has one: nothing of ours is in between."""
    built = []
    for kind in (StateGraph, LangGraphStateGraph):
        builder: Any = kind(State)
        for name, node in KINDS.items():
            builder.add_node(name, node)
            builder.add_edge(START, name)
        if one_policy:
            policy = {"cache_policy": CachePolicy()} if kind is StateGraph else {}
            builder.add_node("cached", plain, **policy).add_edge(START, "cached")
        built.append(builder.compile(cache=MemoryCache()))
    ours, theirs = built
    assert ours.nodes.keys() == theirs.nodes.keys()
    assert set(ours.perf.specs) == ({"cached"} if one_policy else set())
    for name in ours.nodes.keys() - {"cached"}:
        node, own = ours.nodes[name], theirs.nodes[name]
        assert vars(node).keys() == vars(own).keys()
        assert type(node) is type(own)
        assert type(node.node) is type(own.node)
        if name in KINDS:
            bound = ours.builder.nodes[name].runnable
            assert node.bound is bound
            steps = bound.steps if isinstance(bound, RunnableSequence) else [bound]
            assert list(map(id, node.node.steps[: len(steps)])) == list(map(id, steps))
            assert list(map(type, node.node.steps)) == list(map(type, own.node.steps))


def test_without_policies_nodes_get_langgraphs_own_config() -> None:
    """A graph that has nothing of ours puts nothing into its runs either."""
    seen: list[set[str]] = []

    def node(state: State, config: RunnableConfig) -> State:
        seen.append(set(config["configurable"]))
        return {}

    for kind in (StateGraph, LangGraphStateGraph):
        builder: Any = kind(State).add_node("node", node).add_edge(START, "node")
        builder.compile().invoke({})
    ours, theirs = seen
    assert ours == theirs


async def test_node_defaults_apply() -> None:
    """``set_node_defaults(cache_policy=)`` caches nodes without a policy of their own."""
    builder = StateGraph(State).set_node_defaults(cache_policy=CachePolicy(ttl=60))
    own, default = Counting(), Counting()
    builder.add_node("a", default)
    builder.add_node("b", own, cache_policy=CachePolicy(ttl=5, key=["query"]))
    graph = builder.add_edge(START, "a").add_edge("a", "b").compile(cache=MemoryCache())
    assert {name: spec.policy.ttl for name, spec in graph.perf.specs.items()} == {"a": 60, "b": 5}
    for _ in range(2):
        assert graph.invoke({"query": "q"})["answer"] == "q"
        assert (await graph.ainvoke({"query": "q"}))["answer"] == "q"
    stats = graph.perf.stats().nodes
    assert (default.runs, stats["a"].runs, stats["a"].hits) == (1, 1, 3)
    assert (own.runs, stats["b"].runs, stats["b"].hits) == (1, 1, 3)


@pytest.mark.parametrize("name", ["task_id", "__tenant"])
def test_names_that_only_look_like_langgraphs_are_the_users(name: str) -> None:
    """What a user puts into ``configurable`` is in the key, whatever it is called."""
    builder = StateGraph(State)

    def node(state: State, config: RunnableConfig) -> Any:
        return {"answer": config["configurable"][name]}

    builder.add_node("node", node, cache_policy=CachePolicy(version=1))
    with MemoryCache() as cache:
        graph = builder.add_edge(START, "node").compile(cache=cache)
        for user in ("alice", "bob"):
            told = graph.invoke({}, {"configurable": {name: user}})
            assert told["answer"] == user
