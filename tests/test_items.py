"""``get_cache``: items finer than a node, inside nodes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from langchain_core.runnables import RunnableConfig
from langgraph.cache.memory import InMemoryCache
from langgraph.graph import START
from typing_extensions import TypedDict

from langgraph_perf import (
    CacheMiss,
    CachePolicy,
    ConfigurationError,
    MemoryCache,
    StateGraph,
    get_cache,
)
from langgraph_perf.caches.base import Cache
from tests.conftest import Clock


class State(TypedDict, total=False):
    docs: list[str]
    vectors: list[Any]


def graph_of(node: Any, cache: Any, policy: CachePolicy | None = None) -> Any:
    builder = StateGraph(State).add_node("node", node, cache_policy=policy)
    return builder.add_edge(START, "node").compile(cache=cache)


class Embedder:
    """Counts what it was asked to compute."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def many(self, docs: list[str]) -> list[list[int]]:
        self.batches.append(docs)
        return [[len(doc)] for doc in docs]

    async def amany(self, docs: list[str]) -> list[list[int]]:
        return self.many(docs)


def embedding_nodes(embedder: Embedder) -> list[Callable[..., Any]]:
    def node(state: State) -> State:
        items = get_cache("embeddings")
        return {"vectors": items.get_or_set_many(state["docs"], embedder.many, tags=["docs"])}

    async def anode(state: State, config: RunnableConfig) -> State:
        items = get_cache("embeddings", config)
        return {
            "vectors": await items.aget_or_set_many(state["docs"], embedder.amany, tags=["docs"])
        }

    return [node, anode]


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_only_misses_are_computed_once_and_in_one_call(
    asynchronous: bool, cache: Cache
) -> None:
    """Stored keys are not computed again, duplicates once, and order is kept."""
    embedder = Embedder()
    graph = graph_of(embedding_nodes(embedder)[asynchronous], cache)

    async def ask(*docs: str) -> Any:
        question: State = {"docs": list(docs)}
        result = await graph.ainvoke(question) if asynchronous else graph.invoke(question)
        return result["vectors"]

    assert await ask("a", "bb", "a") == [[1], [2], [1]]
    assert await ask("ccc", "bb") == [[3], [2]]
    assert await ask("a") == [[1]]
    assert embedder.batches == [["a", "bb"], ["ccc"]]
    cache.invalidate("docs")
    assert await ask("a", "bb") == [[1], [2]]
    assert embedder.batches[-1] == ["a", "bb"]
    stats = graph.perf.stats().items["embeddings"]
    assert (stats.hits, stats.runs) == (2, 5)


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_single_items(asynchronous: bool, cache: Cache) -> None:
    """One key is computed once; any value that can be keyed will do as key."""
    computed: list[int] = []

    def compute() -> Any:
        computed.append(1)
        return {"n": (len(computed), None)}

    async def acompute() -> Any:
        return compute()

    def node(state: State) -> State:
        return {"vectors": [get_cache("x").get_or_set(("k", 1, True), compute)]}

    async def anode(state: State, config: RunnableConfig) -> State:
        return {"vectors": [await get_cache("x", config).aget_or_set(("k", 1, True), acompute)]}

    graph = graph_of(anode if asynchronous else node, cache)
    for _ in range(2):
        result = await graph.ainvoke({}) if asynchronous else graph.invoke({})
        assert result["vectors"] == [{"n": (1, None)}]


def test_none_is_a_value() -> None:
    """A computed ``None`` is stored and hits."""
    computed: list[int] = []
    graph = graph_of(
        lambda state: {"vectors": [get_cache("x").get_or_set("k", lambda: computed.append(1))]},
        MemoryCache(),
    )
    graph.invoke({})
    graph.invoke({})
    assert computed == [1]


def test_one_of_many_callers_computes() -> None:
    """Threads of different runs that want one item share its computation."""
    release = threading.Event()
    computed: list[int] = []

    def compute() -> int:
        computed.append(1)
        release.wait(20)
        return 7

    graph = graph_of(
        lambda state: {"vectors": [get_cache("x").get_or_set("k", compute)]}, cache := MemoryCache()
    )
    from langgraph_perf._backend import Backend

    with ThreadPoolExecutor(5) as pool:
        calls = [pool.submit(graph.invoke, {}) for _ in range(5)]
        while Backend.of(cache).flights.waiting() < 4:
            pass
        release.set()
        assert [call.result(20)["vectors"] for call in calls] == [[7]] * 5
    assert computed == [1]


def test_without_a_cache_it_just_computes() -> None:
    """Outside a run, and in a graph without a cache, items are computed."""
    assert get_cache("x").get_or_set("k", lambda: 1) == 1
    assert asyncio.run(get_cache("x").aget_or_set("k", _one)) == 1
    assert get_cache("x").get_or_set_many(["a", "b"], lambda keys: [k * 2 for k in keys]) == [
        "aa",
        "bb",
    ]
    graph = graph_of(lambda state: {"vectors": [get_cache("x").get_or_set("k", lambda: 1)]}, None)
    assert graph.invoke({})["vectors"] == [1]


async def _one() -> int:
    return 1


def test_items_are_shared_by_graphs_and_kept_apart_by_namespace() -> None:
    """One namespace on one cache is one cache, whatever graph or node uses it."""
    cache = MemoryCache()
    first = graph_of(lambda state: {"vectors": [get_cache("x").get_or_set("k", lambda: 1)]}, cache)
    second = graph_of(lambda state: {"vectors": [get_cache("x").get_or_set("k", lambda: 2)]}, cache)
    third = graph_of(lambda state: {"vectors": [get_cache("y").get_or_set("k", lambda: 3)]}, cache)
    assert [g.invoke({})["vectors"] for g in (first, second, third)] == [[1], [1], [3]]


def test_ttl_of_items(clock: Clock) -> None:
    """Items expire after their own ttl."""
    computed: list[int] = []
    graph = graph_of(
        lambda state: {
            "vectors": [get_cache("x").get_or_set("k", lambda: computed.append(1), ttl=10)]
        },
        MemoryCache(clock=clock),
    )
    for seconds in (0, 9, 1):
        clock.advance(seconds)
        graph.invoke({})
    assert computed == [1, 1]


def test_the_runs_control_applies_to_items() -> None:
    """refresh computes and stores, bypass only computes, only raises."""
    numbers = iter(range(100))
    graph = graph_of(
        lambda state: {"vectors": [get_cache("x").get_or_set("k", lambda: next(numbers))]},
        MemoryCache(),
    )

    def ask(mode: str) -> Any:
        return graph.invoke({}, {"configurable": {"cache_control": {"mode": mode}}})["vectors"]

    with pytest.raises(CacheMiss):
        ask("only")
    assert ask("use") == [0]
    assert ask("refresh") == [1]
    assert ask("bypass") == [2]
    assert ask("only") == [1]


def test_items_that_cannot_be_keyed_or_stored_are_computed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Unkeyable keys and values that cannot be stored cost the hit only, and are logged."""
    lock = threading.Lock()
    graph = graph_of(
        lambda state: {
            "vectors": [
                get_cache("x").get_or_set(lock, lambda: 1),
                get_cache("y").get_or_set("k", lambda: lock) is lock,
                get_cache("z").get_or_set_many([lock, lock], lambda keys: [1 for _ in keys]),
            ]
        },
        MemoryCache(),
    )
    for _ in range(2):
        assert graph.invoke({})["vectors"] == [1, True, [1, 1]]
    assert caplog.text.count("'x') computes uncached") == 1
    assert graph.perf.stats().items["y"].refusals == {"unserializable": 2}


def test_a_failing_computation_stores_nothing() -> None:
    """What raises is raised, and the next call computes."""
    outcomes = iter([ValueError("no"), 5])

    def compute() -> Any:
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    graph = graph_of(
        lambda state: {"vectors": [get_cache("x").get_or_set("k", compute)]}, MemoryCache()
    )
    with pytest.raises(ValueError, match="no"):
        graph.invoke({})
    assert graph.invoke({})["vectors"] == [5]


def test_bad_input_of_items() -> None:
    """Wrong namespaces, ttls, tags and batches are named."""
    with pytest.raises(ConfigurationError, match=r"get_cache\(namespace\)"):
        get_cache("")
    with pytest.raises(ConfigurationError, match="a list of strings"):
        get_cache("x").get_or_set("k", lambda: 1, tags="docs")
    with pytest.raises(ConfigurationError, match="positive"):
        get_cache("x").get_or_set("k", lambda: 1, ttl=-1)
    with pytest.raises(ValueError, match="got 2 keys and returned 1 values"):
        get_cache("x").get_or_set_many(["a", "b"], lambda keys: [1])
    graph = graph_of(
        lambda state: {"vectors": [get_cache("x").get_or_set("k", lambda: 1, tags=["t"])]},
        InMemoryCache(),
    )
    with pytest.raises(ConfigurationError, match="cannot invalidate by tag"):
        graph.invoke({})


def test_items_inside_a_cached_node(memory: MemoryCache) -> None:
    """A cached node that uses items computes neither twice."""
    embedder = Embedder()
    graph = graph_of(embedding_nodes(embedder)[0], memory, CachePolicy(version=1))
    for docs in (["a"], ["a"], ["a", "b"]):
        graph.invoke({"docs": docs})
    assert embedder.batches == [["a"], ["b"]]
    assert graph.perf.stats().nodes["node"].runs == 2


def test_what_computes_an_item_is_a_plain_function() -> None:
    """A coroutine is no value, and what cannot be called computes nothing."""

    async def compute() -> int:
        return 1

    items = get_cache("items")
    for given in (compute, lambda: compute()):
        with pytest.raises(ConfigurationError, match="aget_or_set"):
            items.get_or_set("key", given)
    with pytest.raises(ConfigurationError, match=r"got 5; accepted: a function"):
        items.get_or_set("key", 5)  # type: ignore[arg-type]


def inside(cache: Cache, body: Callable[[], Any]) -> Any:
    """What ``body`` returns inside a node."""
    result: list[Any] = []
    graph_of(lambda state: {"vectors": result.append(body())}, cache).invoke({})
    return result[0]


@pytest.mark.parametrize(
    "values",
    [{"a": "A", "b": "B"}, {"A", "B"}, "AB", None, iter("AB")],
    ids=lambda v: type(v).__name__,
)
def test_values_without_an_order_are_refused(values: Any) -> None:
    """They would be stored under the wrong keys."""
    with (
        MemoryCache() as cache,
        pytest.raises(ConfigurationError, match="list with the values in the order of the keys"),
    ):
        inside(cache, lambda: get_cache("x").get_or_set_many(["a", "b"], lambda keys: values))


def test_an_array_is_as_good_as_a_list() -> None:
    """What embeds texts returns a matrix, with a row for each of them."""
    with MemoryCache() as cache:
        for _ in range(2):
            rows = inside(
                cache,
                lambda: get_cache("x").get_or_set_many(["a", "b"], lambda keys: np.eye(2)),
            )
            assert [row.tolist() for row in rows] == [[1, 0], [0, 1]]


@pytest.mark.parametrize("keys", ["ab", b"ab"])
def test_one_string_is_no_list_of_keys(keys: Any) -> None:
    """Each character would be a key."""
    with pytest.raises(ConfigurationError, match="did you mean"):
        get_cache("x").get_or_set_many(keys, list)


async def test_what_computes_must_be_callable() -> None:
    """It is said before anything is looked up: on a hit nobody would notice."""
    given: Any = 5
    for name in ("get_or_set", "get_or_set_many"):
        with pytest.raises(ConfigurationError, match=rf"^{name}\(compute.*got 5"):
            getattr(get_cache("x"), name)(["k"], given)
        with pytest.raises(ConfigurationError, match=rf"^a{name}\(compute.*got 5"):
            await getattr(get_cache("x"), f"a{name}")(["k"], given)


@pytest.mark.parametrize("keys", [5, None])
def test_what_is_no_list_of_keys_is_refused(keys: Any) -> None:
    """With what is accepted."""
    with pytest.raises(ConfigurationError, match=f"got {keys}; accepted: a list of keys"):
        get_cache("x").get_or_set_many(keys, list)


def test_the_same_key_twice_gives_values_of_their_own() -> None:
    """As two calls would get: who changes one does not change the other."""

    def twice() -> list[list[int]]:
        return get_cache("x").get_or_set_many(["q", "q", "q"], lambda keys: [[1]])

    with MemoryCache() as cache:
        for _ in range(2):  # computed, then stored
            first, *others = inside(cache, twice)
            first.append(2)
            others[0].append(3)
            assert (first, others) == ([1, 2], [[1, 3], [1]])


def test_the_same_key_twice_of_what_cannot_be_stored() -> None:
    """There is only the one value that was computed."""
    lock = threading.Lock()

    def twice() -> list[Any]:
        return get_cache("x").get_or_set_many(["q", "q"], lambda keys: [lock])

    with MemoryCache() as cache:
        assert inside(cache, twice) == [lock, lock]


def test_tags_of_items_are_no_templates() -> None:
    """Nothing would be filled in, and no invalidation would reach the item."""
    with MemoryCache() as cache, pytest.raises(ConfigurationError, match="no fields to fill in"):
        inside(cache, lambda: get_cache("x").get_or_set("k", int, tags=["user:{user_id}"]))


async def test_plain_functions_for_async_twins_are_refused() -> None:
    """The error says which method takes them."""
    with pytest.raises(ConfigurationError, match="or get_or_set for a plain one"):
        await get_cache("x").aget_or_set("k", lambda: 7)  # type: ignore[arg-type, return-value]
    with pytest.raises(ConfigurationError, match="or get_or_set_many for a plain one"):
        await get_cache("x").aget_or_set_many([1], lambda keys: keys)  # type: ignore[arg-type]


@dataclass
class Vector:
    values: list[int]


class Typed(TypedDict, total=False):
    docs: list[str]
    vectors: Vector


def test_items_may_be_of_the_types_that_the_schemas_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """In strict mode others are not restored, and computed each time."""
    monkeypatch.setenv("LANGGRAPH_STRICT_MSGPACK", "true")
    for schema, runs in ((Typed, 1), (State, 2)):
        computed: list[int] = []

        def node(state: Any, computed: list[int] = computed) -> Any:
            def compute() -> Vector:
                computed.append(1)
                return Vector([1])

            return {"vectors": get_cache("x").get_or_set("k", compute)}

        builder = StateGraph(schema).add_node("node", node).add_edge(START, "node")
        graph: Any = builder.compile(cache=MemoryCache())
        for _ in range(2):
            assert graph.invoke({})["vectors"] == Vector([1])
        assert len(computed) == runs
