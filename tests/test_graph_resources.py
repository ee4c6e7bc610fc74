"""Resources in a graph: declared with the node, leased only while its body runs."""

from __future__ import annotations

import asyncio
import operator
import sqlite3
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Annotated, Any, Literal

import pytest
from langchain_core.runnables import RunnableConfig, RunnableLambda
from langchain_core.runnables.config import run_in_executor
from langgraph._internal._runnable import KWARGS_CONFIG_KEYS, RunnableCallable
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.errors import NodeError
from langgraph.graph import START
from langgraph.graph import StateGraph as LangGraphStateGraph
from langgraph.pregel._utils import _runnable_has_native_async
from langgraph.runtime import Runtime
from langgraph.store.base import BaseStore
from langgraph.store.memory import InMemoryStore
from langgraph.types import Command, RetryPolicy, Send, StreamWriter, TimeoutPolicy, interrupt
from typing_extensions import TypedDict

from langgraph_perf import (
    CachePolicy,
    ConfigurationError,
    FromContext,
    Keyed,
    MemoryCache,
    Pool,
    PoolClosed,
    Shared,
    StateGraph,
    Use,
    alease,
    get_cache,
    lease,
)
from langgraph_perf._thread_body import on_thread
from langgraph_perf.leases import _LANGGRAPHS_OWN
from langgraph_perf.resources import Registry, Resource, _lease

from .conftest import IdleClock
from .resources.helpers import auntil


class State(TypedDict, total=False):
    query: str
    model_type: str
    answer: Any
    path: Annotated[list[str], operator.add]


class Connection:
    """Something worth leasing."""

    def __init__(self) -> None:
        self.closed = False

    def close(self) -> None:
        self.closed = True


def build(node: Any, resources: Any, given: Any = None, *, cache: Any = None, **kwargs: Any) -> Any:
    builder = StateGraph(State)
    builder.add_node("node", node, resources=resources, **kwargs)
    return builder.add_edge(START, "node").compile(resources=given, cache=cache)


def idle(graph: Any) -> None:
    """Whatever happened, everything came back, and nothing was lost or made in vain."""
    for name, stats in graph.perf.stats().resources.items():
        assert stats.in_use == 0, name
        assert stats.waiting == 0, name
        assert stats.size == stats.idle == stats.loads - stats.closed, name


def test_a_resource_is_put_into_its_parameter() -> None:
    """By its own name or another one, beside what LangGraph injects."""

    def node(
        state: State, db: Connection, *, runtime: Runtime[Any], config: RunnableConfig, other: Any
    ) -> State:
        assert runtime.execution_info is not None
        assert "configurable" in config
        return {"answer": (type(db).__name__, other)}

    pools = {"db": Pool(Connection), "text": Shared(lambda: "shared")}
    graph = build(node, {"db": "db", "other": "text"}, pools)
    for _ in range(3):
        assert graph.invoke({"query": "q"})["answer"] == ("Connection", "shared")
    assert graph.perf.stats().resources["db"].loads == 1
    idle(graph)
    graph.perf.close()
    with pytest.raises(PoolClosed):
        graph.invoke({"query": "q"})


@pytest.mark.parametrize("kind", ["method", "object", "partial", "lambda"])
async def test_every_callable_can_lease(kind: str) -> None:
    """Methods, callable objects, partials and lambdas, sync and async."""

    class Node:
        def method(self, state: State, db: Any) -> State:
            return {"answer": type(db).__name__}

        def __call__(self, state: State, db: Any) -> State:
            return {"answer": type(db).__name__}

    def with_more(state: State, more: int, db: Any) -> State:
        return {"answer": type(db).__name__}

    node = {
        "method": Node().method,
        "object": Node(),
        "partial": partial(with_more, more=1),
        "lambda": lambda state, db: {"answer": type(db).__name__},
    }[kind]
    graph = build(node, ["db"], {"db": Pool(Connection)})
    assert graph.invoke({})["answer"] == "Connection"
    assert (await graph.ainvoke({}))["answer"] == "Connection"
    idle(graph)


class Narrow(TypedDict, total=False):
    """What some nodes take of the state."""

    query: str


def _routes(state: Narrow, db: Any = None) -> Command[Literal["left", "right"]]:
    return Command(goto="left", update={"answer": sorted(state)})


async def _aroutes(state: Narrow, db: Any = None) -> Command[Literal["left", "right"]]:
    return _routes(state)


class _Routes:
    def method(self, state: Narrow, db: Any = None) -> Command[Literal["left", "right"]]:
        return _routes(state)

    async def __call__(self, state: Narrow, db: Any = None) -> Command[Literal["left", "right"]]:
        return _routes(state)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("node", [_routes, _aroutes, _Routes().method, _Routes()])
async def test_what_langgraph_finds_out_about_a_node_stays(node: Any, named: bool) -> None:
    """Destinations, input and async-ness are those of the same node without resources."""

    def found(builder: Any, **kwargs: Any) -> tuple[Any, ...]:
        if named or isinstance(node, _Routes):
            builder.add_node("node", node, **kwargs)
        else:
            builder.add_node(node, **kwargs)
        (spec,) = builder.nodes.values()
        native = _runnable_has_native_async(spec.runnable)
        return spec.ends, spec.input_schema, native, type(spec.runnable), spec.runnable.get_name()

    ours = StateGraph(State)
    assert found(ours, resources=["db"]) == found(LangGraphStateGraph(State))
    (name,) = ours.nodes
    ours.add_node("left", lambda state: {"path": ["left"]})
    ours.add_node("right", lambda state: {"path": ["right"]})
    graph = ours.add_edge(START, name).compile(resources={"db": Pool(Connection)})
    drawn = {(edge.source, edge.target) for edge in graph.get_graph().edges}
    assert {(name, "left"), (name, "right")} <= drawn
    result = await graph.ainvoke({"query": "q", "model_type": "m", "path": []})
    assert (result["answer"], result["path"]) == (["query"], ["left"])


class _Injected:
    """Nodes that take everything LangGraph fills in, beside a resource."""

    def check(self, state: State, db: Any, config: Any, runtime: Any, store: Any) -> State:
        assert config["configurable"]["thread_id"] == "t"
        assert runtime.execution_info is not None
        return {"answer": (type(db).__name__, store.get(("names",), "key").value)}

    def method(
        self,
        state: State,
        writer: StreamWriter,
        db: Connection,
        config: RunnableConfig,
        *,
        store: BaseStore,
        runtime: Runtime[Any],
    ) -> State:
        writer("written")
        return self.check(state, db, config, runtime, store)

    async def amethod(
        self,
        state: State,
        writer: StreamWriter,
        db: Connection,
        config: RunnableConfig,
        *,
        store: BaseStore,
        runtime: Runtime[Any],
    ) -> State:
        writer("written")
        return self.check(state, db, config, runtime, store)


class _InjectedObject(_Injected):
    __call__ = _Injected.method


class _InjectedAsyncObject(_Injected):
    __call__ = _Injected.amethod


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("kind", ["method", "async method", "object", "async object"])
async def test_what_langgraph_fills_in_comes_beside_resources(kind: str, cached: bool) -> None:
    """``writer``, ``store``, ``config`` and ``runtime`` reach methods and callable objects."""
    node: Any = {
        "method": _Injected().method,
        "async method": _Injected().amethod,
        "object": _InjectedObject(),
        "async object": _InjectedAsyncObject(),
    }[kind]
    store = InMemoryStore()
    store.put(("names",), "key", {"is": "stored"})
    builder = StateGraph(State)
    policy = CachePolicy(version=1) if cached else None
    builder.add_node("node", node, resources=["db"], cache_policy=policy)
    graph = builder.add_edge(START, "node").compile(
        store=store, cache=MemoryCache(), resources={"db": Pool(Connection)}
    )
    expected = [
        ("custom", "written"),
        ("updates", {"node": {"answer": ("Connection", {"is": "stored"})}}),
    ]
    config: Any = {"configurable": {"thread_id": "t"}}
    modes: Any = ["custom", "updates"]
    if "async" not in kind:
        assert list(graph.stream({"query": "sync"}, config, stream_mode=modes)) == expected
    stream = graph.astream({"query": "async"}, config, stream_mode=modes)
    assert [chunk async for chunk in stream] == expected
    idle(graph)


async def test_async_resources() -> None:
    """Async nodes lease from async factories and async context managers."""
    events: list[str] = []

    @asynccontextmanager
    async def connect() -> AsyncIterator[str]:
        events.append("open")
        yield "connection"
        events.append("close")

    async def create() -> Connection:
        return Connection()

    async def node(state: State, db: str, pooled: Connection) -> State:
        events.append("run")
        return {"answer": (db, type(pooled).__name__)}

    graph = build(node, ["db", "pooled"], {"db": FromContext(connect), "pooled": Pool(create)})
    assert (await graph.ainvoke({}))["answer"] == ("connection", "Connection")
    assert events == ["open", "run", "close"]
    idle(graph)
    await graph.perf.aclose()


def test_a_hit_leases_and_loads_nothing() -> None:
    """On a cache hit the resource is not touched at all."""
    pool = Pool(Connection)
    graph = build(
        lambda state, db: {"answer": 1},
        ["db"],
        {"db": pool},
        cache=MemoryCache(),
        cache_policy=CachePolicy(),
    )
    graph.invoke({"query": "q"})
    leases = pool.stats().leases
    graph.invoke({"query": "q"})
    assert pool.stats().leases == leases == 1


def test_followers_of_a_run_lease_nothing() -> None:
    """Equal calls that wait for one run do not hold what it may need."""
    pool = Pool(Connection, max_size=1)
    builder = StateGraph(State)
    builder.add_node(
        "node", lambda state, db: {"path": ["x"]}, resources=["db"], cache_policy=CachePolicy()
    )
    builder.add_conditional_edges(
        START, lambda state: [Send("node", {"query": "q"}) for _ in range(8)], ["node"]
    )
    graph = builder.compile(cache=MemoryCache(), resources={"db": pool})
    assert graph.invoke({"path": []})["path"] == ["x"] * 8
    assert pool.stats().leases == 1


def test_the_chosen_model_is_part_of_the_key() -> None:
    """A keyed resource's key is in the cache key, whatever the policy's key says."""
    models = Keyed(lambda name: f"model {name}", max_size=2)
    graph = build(
        lambda state, model: {"answer": model},
        {"model": Use("models", key="model_type")},
        {"models": models},
        cache=MemoryCache(),
        cache_policy=CachePolicy(key=["query"]),
    )
    for name in ("small", "large", "small"):
        assert graph.invoke({"query": "q", "model_type": name})["answer"] == f"model {name}"
    assert graph.perf.stats().nodes["node"].runs == 2


def test_keys_from_fields_and_functions() -> None:
    """``Use`` takes the key from a field of the input or from a function of it."""
    models = {"models": Keyed(lambda name: f"model {name}", max_size=2)}
    for key in ("model_type", lambda state: state["model_type"]):
        graph = build(
            lambda state, model: {"answer": model}, {"model": Use("models", key=key)}, models
        )
        assert graph.invoke({"model_type": "small"})["answer"] == "model small"


def _fails(state: State, db: Any) -> State:
    raise ValueError("broken")


def test_leases_come_back_after_errors_interrupts_and_retries() -> None:
    """One lease for each attempt, given back whatever the attempt ends in."""
    pool = Pool(Connection, max_size=1, timeout=5)
    attempts: list[int] = []

    def node(state: State, db: Any) -> State:
        attempts.append(1)
        if len(attempts) < 3:
            raise ConnectionError
        return {"answer": interrupt("?")}

    builder = StateGraph(State)
    builder.add_node(
        "node",
        node,
        resources=["db"],
        retry_policy=RetryPolicy(initial_interval=0.001, jitter=False),
    )
    graph = builder.add_edge(START, "node").compile(
        resources={"db": pool}, checkpointer=InMemorySaver()
    )
    config: Any = {"configurable": {"thread_id": "t"}}
    graph.invoke({}, config)
    assert pool.stats().leases == 3
    idle(graph)
    assert graph.invoke(Command(resume="yes"), config)["answer"] == "yes"
    idle(graph)


def test_leases_come_back_before_the_error_handler() -> None:
    """A handler may lease what the failed node held."""
    pool = Pool(Connection, max_size=1, timeout=5)

    def handler(state: State, error: NodeError) -> State:
        with lease("db"):
            return {"answer": "handled"}

    builder = StateGraph(State)
    builder.add_node("node", _fails, resources=["db"], error_handler=handler)
    graph = builder.add_edge(START, "node").compile(resources={"db": pool})
    assert graph.invoke({})["answer"] == "handled"
    idle(graph)


async def test_leases_come_back_after_timeouts_and_cancellation() -> None:
    """An attempt that LangGraph or the caller cancels gives its lease back."""
    pool = Pool(Connection, max_size=1, timeout=5)
    with pool.lease():
        pass  # there is one: an attempt that ends while one is made leaves the load to go on
    started = asyncio.Event()

    async def node(state: State, db: Any) -> State:
        started.set()
        await asyncio.sleep(60)
        return {}

    graph = build(node, ["db"], {"db": pool}, timeout=0.05)
    with pytest.raises(Exception, match="timeout"):
        await graph.ainvoke({})
    idle(graph)
    started.clear()
    graph = build(node, ["db"], {"db": pool})
    task = asyncio.create_task(graph.ainvoke({}))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    idle(graph)


@pytest.mark.parametrize("kind", ["queue", "load", "driver"])
async def test_a_node_that_waits_for_a_lease_reports_progress(
    kind: str, idle_clock: IdleClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it queues, has an object made or waits for a driver, it is not idle."""
    monkeypatch.setattr(_lease, "LOOK_AGAIN_SECONDS", 3600.0)
    go_on = asyncio.Event()

    async def create() -> str:
        await go_on.wait()
        return "db"

    @asynccontextmanager
    async def connect() -> AsyncIterator[str]:
        yield await create()

    async def node(state: State, db: str) -> State:
        return {"answer": db}

    queue = Pool(lambda: "db", max_size=1)
    db = {"queue": queue, "load": Shared(create), "driver": FromContext(connect)}[kind]
    timeout = TimeoutPolicy(idle_timeout=idle_clock.IDLE_TIMEOUT, refresh_on="heartbeat")
    graph = build(node, ["db"], {"db": db}, timeout=timeout)
    async with queue.alease():
        run = asyncio.create_task(graph.ainvoke({}))
        await idle_clock.outlast(run)
    go_on.set()
    assert (await run)["answer"] == "db"
    idle(graph)
    await graph.perf.aclose()


async def test_a_wide_fan_out_is_served_completely() -> None:
    """Five hundred tasks over two resources: all are served, none gets ``None``."""
    pool = Pool(Connection, max_size=2)

    async def node(state: State, db: Connection) -> State:
        await asyncio.sleep(0)
        return {"path": [type(db).__name__]}

    builder = StateGraph(State).add_node("node", node, resources=["db"])
    builder.add_conditional_edges(
        START, lambda state: [Send("node", {"query": str(i)}) for i in range(500)], ["node"]
    )
    graph = builder.compile(resources={"db": pool})
    assert (await graph.ainvoke({"path": []}))["path"] == ["Connection"] * 500
    assert pool.stats().loads <= 2
    idle(graph)


@pytest.mark.parametrize("busy", ["leased", "loading"])
async def test_waiting_for_resources_takes_no_thread_of_others(
    busy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two hundred tasks wait for two resources, and the only thread of the loop's executor is free
    for somebody else's call meanwhile."""
    monkeypatch.setattr(_lease, "LOOK_AGAIN_SECONDS", 30.0)
    go_on, held = threading.Event(), asyncio.Event()
    events: list[str] = []

    def create() -> Connection:
        assert busy == "leased" or go_on.wait(20)
        return Connection()

    async def node(state: State, db: Connection) -> State:
        await held.wait()
        events.append("node")
        return {}

    pool = Pool(create, max_size=2)
    builder = StateGraph(State).add_node("node", node, resources=["db"])
    builder.add_conditional_edges(START, lambda state: [Send("node", {})] * 200, ["node"])
    graph = builder.compile(resources={"db": pool})

    def all_wait() -> bool:
        stats = pool.stats()
        there = stats.in_use if busy == "leased" else stats.loading
        return there == 2 and stats.waiting == 198

    with ThreadPoolExecutor(1) as executor:
        asyncio.get_running_loop().set_default_executor(executor)
        run = asyncio.create_task(graph.ainvoke({}))
        await auntil(all_wait)
        await asyncio.wait_for(asyncio.to_thread(events.append, "unrelated"), 10)
        go_on.set()
        held.set()
        await run
    assert events == ["unrelated"] + ["node"] * 200
    idle(graph)


def test_leases_inside_a_body() -> None:
    """``lease`` takes a shorter lease, in functions, Runnables and subgraphs."""
    with_lease = {"db": Pool(Connection, max_size=1)}

    def node(state: State) -> State:
        with lease("db") as db:
            return {"answer": type(db).__name__}

    inner = StateGraph(State).add_node("inner", node).add_edge(START, "inner").compile()
    for kind in (node, RunnableLambda(node), inner):
        builder = StateGraph(State).add_node("node", kind).add_edge(START, "node")
        graph = builder.compile(resources=with_lease)
        assert graph.invoke({})["answer"] == "Connection"
        idle(graph)


async def test_async_leases_inside_a_body() -> None:
    """``alease`` does so without blocking."""

    async def node(state: State, config: RunnableConfig) -> State:
        async with alease("models", "small", config=config) as model:
            return {"answer": model}

    graph = build(node, None, {"models": Keyed(lambda key: f"model {key}")})
    assert (await graph.ainvoke({}))["answer"] == "model small"
    idle(graph)


def test_subgraphs_inherit_resources() -> None:
    """Nodes of subgraphs lease from the root, unless their graph has its own."""

    def node(state: State, db: str) -> State:
        return {"path": [db]}

    def inner(**kwargs: Any) -> Any:
        builder = StateGraph(State).add_node("work", node, resources=["db"])
        return builder.add_edge(START, "work").compile(**kwargs)

    builder = StateGraph(State)
    builder.add_node("a", inner()).add_node("b", inner(resources={"db": Shared(lambda: "own")}))
    builder.add_edge(START, "a").add_edge("a", "b")
    graph = builder.compile(resources={"db": Shared(lambda: "root")})
    # the second subgraph also hands back what it was given
    assert graph.invoke({"path": []})["path"] == ["root", "root", "own"]


def test_graphs_below_one_with_resources_of_its_own_use_those() -> None:
    """What the root has is neither asked of them nor for them, however deep they are."""

    def node(state: State, db: str) -> State:
        return {"path": [db]}

    builder = StateGraph(State).add_node("work", node, resources=["db"])
    inner = builder.add_edge(START, "work").compile()
    builder = StateGraph(State).add_node("inner", inner).add_edge(START, "inner")
    middle = builder.compile(resources={"db": Shared(lambda: "middle's")})
    plain = LangGraphStateGraph(State).add_node("middle", middle).add_edge(START, "middle")
    for between in (middle, plain.compile(checkpointer=False)):
        builder = StateGraph(State).add_node("graph", between).add_edge(START, "graph")
        graph = builder.compile(resources={"other": Shared(lambda: "root's")})
        assert graph.invoke({"path": []})["path"] == ["middle's"]
    # and one that brings none is checked, at the same depth
    builder = StateGraph(State).add_node("inner", inner).add_edge(START, "inner")
    builder = StateGraph(State).add_node("middle", builder.compile(checkpointer=False))
    with pytest.raises(ConfigurationError, match=r"'middle\|inner\|work'"):
        builder.add_edge(START, "middle").compile(resources={"other": Shared(lambda: "root's")})


def test_override_replaces_resources_in_tests() -> None:
    """Inside the block runs use the replacement, a resource or a plain object; then no more."""
    real = Shared(lambda: "real")
    graph = build(lambda state, db: {"answer": db}, ["db"], {"db": real})
    with graph.perf.override(db="fake"):
        assert graph.invoke({})["answer"] == "fake"
        with graph.perf.override(db=Shared(lambda: "other")):
            assert graph.invoke({})["answer"] == "other"
        assert graph.invoke({})["answer"] == "fake"
    assert graph.invoke({})["answer"] == "real"
    with pytest.raises(ConfigurationError, match="dbb"), graph.perf.override(dbb="fake"):
        pass


def test_override_uses_no_cache() -> None:
    """No stored result hides a replacement, and none of its own is stored: nodes and items."""
    loads: list[str] = []

    def node(state: State, db: str) -> State:
        item = get_cache("items").get_or_set("key", lambda: loads.append(db) or db)
        return {"answer": f"{db} {item}"}

    inner = StateGraph(State)
    inner.add_node("node", node, cache_policy=CachePolicy(version=1), resources=["db"])
    inner.add_edge(START, "node")
    builder = StateGraph(State)
    builder.add_node("sub", inner.compile())
    with MemoryCache() as cache:
        graph = builder.add_edge(START, "sub").compile(
            cache=cache, resources={"db": Shared(lambda: "real")}
        )
        asked = {"configurable": {"cache_control": {"mode": "use"}}}
        with graph.perf.override(db="fake"):
            assert graph.invoke({}, asked)["answer"] == "fake fake"
        assert cache.stats().entries == 0
        assert graph.invoke({})["answer"] == "real real"
        with graph.perf.override(db="fake"):
            assert graph.invoke({}, asked)["answer"] == "fake fake"
        assert graph.invoke({})["answer"] == "real real"
        assert loads == ["fake", "real", "fake"]
        graph.perf.close()


def test_threads_and_tasks_share_one_sqlite_pool(tmp_path: Any) -> None:
    """A pool of real connections serves sync and async nodes alike and loses none."""

    def connect() -> sqlite3.Connection:
        return sqlite3.connect(
            tmp_path / "db", timeout=60, check_same_thread=False, isolation_level=None
        )

    pool = Pool(connect, max_size=3, close=sqlite3.Connection.close)
    table = connect()
    table.execute("CREATE TABLE seen (n INTEGER)")
    table.close()

    def node(state: State, db: sqlite3.Connection) -> State:
        db.execute("INSERT INTO seen VALUES (1)")
        return {}

    graph = build(node, ["db"], {"db": pool})
    threads = [threading.Thread(target=graph.invoke, args=({},)) for _ in range(10)]
    for thread in threads:
        thread.start()

    async def tasks() -> None:
        await asyncio.gather(*(graph.ainvoke({}) for _ in range(10)))

    asyncio.run(tasks())
    for thread in threads:
        thread.join()
    with pool.lease() as db:
        assert db.execute("SELECT count(*) FROM seen").fetchone() == (20,)
    idle(graph)
    assert pool.stats().loads <= 3
    graph.perf.close()


# -- bad input ------------------------------------------------------------------------------------


def _node(state: State, db: Any) -> State:
    return {}


@pytest.mark.parametrize(
    ("node", "resources", "message"),
    [
        (_node, "db", "did you mean ['db']"),
        (_node, 5, "a list of names"),
        (_node, [5], "got 5 in it"),
        (_node, ["dbb"], "no parameter 'dbb'"),
        (_node, ["state"], "no parameter 'state'"),
        (_node, {"runtime": "db"}, "LangGraph fills itself"),
        (lambda state, input: {}, {"input": "db"}, "'my_input': 'db'"),
        (lambda state, self: {}, {"self": "db"}, "'my_self': 'db'"),
        (_node, [["db"]], "got ['db'] in it"),
        (_node, [{"db": "db"}], "got {'db': 'db'} in it"),
        (_node, {"db": Use("models", key="nope")}, "no such field"),
        (RunnableLambda(lambda state: state), ["db"], "lease(name)"),
    ],
)
def test_wrong_declarations_fail_in_add_node(node: Any, resources: Any, message: str) -> None:
    """What cannot work is refused where it is declared, with the node's name and the remedy."""
    with pytest.raises(ConfigurationError) as caught:
        StateGraph(State).add_node("node", node, resources=resources)
    assert "node 'node'" in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "parameter", ["config", "error", "previous", "runtime", "store", "writer", "input", "self"]
)
@pytest.mark.parametrize("as_list", [False, True])
def test_parameters_that_are_not_the_nodes_own_are_refused(parameter: str, as_list: bool) -> None:
    """What LangGraph fills itself, or calls the node with, cannot be leased into."""
    names: dict[str, Any] = {}
    exec(f"def node(state, {parameter}): return {{}}", names)
    resources: Any = [parameter] if as_list else {parameter: "db"}
    name = parameter if as_list else "db"
    with pytest.raises(ConfigurationError) as caught:
        StateGraph(State).add_node("node", names["node"], resources=resources)
    assert "node 'node'" in str(caught.value)
    assert f"{parameter!r} is a parameter that LangGraph" in str(caught.value)
    assert f"resources={{'my_{parameter}': {name!r}}}" in str(caught.value)


def test_every_parameter_that_langgraph_fills_is_refused() -> None:
    """None of them is missing from the list above, nor will be one that LangGraph adds."""
    assert {kind[0] for kind in KWARGS_CONFIG_KEYS} == set(_LANGGRAPHS_OWN)


async def _acreate() -> Connection:
    return Connection()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"other": Shared(Connection)}, "no resource is called 'db'"),
        ({"db": Connection()}, "must be a Pool, Shared, Keyed or FromContext"),
        ({"db": Keyed(lambda key: key)}, "Use('db', key="),
    ],
)
def test_wrong_resources_fail_at_compile(given: dict[str, Resource[Any]], message: str) -> None:
    """What a node cannot get is refused when the graph is compiled."""
    with pytest.raises(ConfigurationError) as caught:
        build(_node, ["db"], given)
    assert message in str(caught.value)


async def _ahook(db: Connection) -> None:
    """An async ``check``, ``reset`` or ``close``."""


@asynccontextmanager
async def _aconnect() -> AsyncIterator[Connection]:
    yield Connection()


class _AsyncOnly:
    async def __aenter__(self) -> Connection:
        return Connection()

    async def __aexit__(self, *_: object) -> None: ...


@pytest.mark.parametrize("inherited", [False, True])
@pytest.mark.parametrize(
    "db",
    [
        Pool(_acreate),
        Pool(Connection, check=_ahook),
        Pool(Connection, reset=_ahook),
        Pool(Connection, close=_ahook),
        Shared(_acreate),
        Shared(Connection, close=_ahook),
        FromContext(_aconnect),
        FromContext(_AsyncOnly),
    ],
    ids=["create", "check", "reset", "close", "shared", "shared-close", "manager", "class"],
)
def test_async_resources_of_sync_nodes_fail_at_compile(db: Resource[Any], inherited: bool) -> None:
    """What only an event loop can use is refused to a sync node, also to one of a subgraph."""
    builder = StateGraph(State).add_node("node", _node, resources=["db"])
    builder.add_edge(START, "node")
    if inherited:
        outer = StateGraph(State).add_node("inner", builder.compile())
        builder = outer.add_edge(START, "inner")
    with pytest.raises(ConfigurationError) as caught:
        builder.compile(resources={"db": db})
    assert ("node 'inner|node'" if inherited else "node 'node'") in str(caught.value)
    assert "'db' has an async function and needs an event loop" in str(caught.value)
    assert "make the node 'async def'" in str(caught.value)


def test_keys_for_resources_without_keys_are_refused() -> None:
    """``Use(key=)`` is for ``Keyed`` only."""
    with pytest.raises(ConfigurationError, match="has no keys"):
        build(_node, {"db": Use("db", key="query")}, {"db": Shared(Connection)})


def test_missing_resources_are_named_at_run_time_where_a_parent_could_have_them() -> None:
    """A graph compiled without resources may be a subgraph; run by itself it says what it lacks."""
    graph = build(_node, ["db"])
    with pytest.raises(ConfigurationError, match=r"node 'node' asks for 'db'.*resources="):
        graph.invoke({})
    with pytest.raises(ConfigurationError, match="inside a node"):
        lease("db")


def test_bad_keys_name_the_node() -> None:
    """An unhashable key and a key function that raises name node, resource and remedy."""
    models = {"models": Keyed(lambda key: key)}

    def broken(state: State) -> Any:
        raise RuntimeError("no idea")

    for key, message in ((lambda state: [1], "hashable"), (broken, "no idea")):
        graph = build(lambda state, model: {}, {"model": Use("models", key=key)}, models)
        with pytest.raises(ConfigurationError, match=message) as caught:
            graph.invoke({})
        assert "node 'node'" in str(caught.value)
        assert "Use('models', key=" in str(caught.value)


def test_resources_without_a_policy_leave_results_uncached() -> None:
    """A node with resources and no policy is plain LangGraph but for the leases."""

    @contextmanager
    def connect() -> Iterator[str]:
        yield "db"

    runs: list[int] = []

    def node(state: State, db: str) -> State:
        runs.append(1)
        return {"answer": db}

    graph = build(node, ["db"], {"db": FromContext(connect)}, cache=MemoryCache())
    for _ in range(2):
        assert graph.invoke({"query": "q"})["answer"] == "db"
    assert runs == [1, 1]


def test_a_parameter_that_nobody_fills_is_refused() -> None:
    """A node with a parameter called like a resource, that does not ask for it, would fail."""
    resources = {"db": Shared(lambda: "db")}

    def node(state: State, db: str) -> State:
        return {"answer": db}

    def optional(state: State, db: str = "default") -> State:
        return {"answer": db}

    def named(db: State) -> State:
        return {"answer": "its input may have any name"}

    with pytest.raises(ConfigurationError, match=r"node 'node'.*resources=\['db'\]"):
        StateGraph(State).add_node("node", node).add_edge(START, "node").compile(
            resources=resources
        )
    for fine in (optional, named, partial(node, db="bound")):
        builder = StateGraph(State).add_node("node", fine).add_edge(START, "node")
        assert builder.compile(resources=resources).invoke({})["answer"]


def test_override_of_keyed_resources() -> None:
    """A plain object takes the place of every object of a ``Keyed``."""

    def node(state: State, db: str) -> State:
        return {"answer": db}

    builder = StateGraph(State)
    builder.add_node("node", node, resources={"db": Use("db", key=lambda state: "key")})
    graph = builder.add_edge(START, "node").compile(resources={"db": Keyed(lambda key: key)})
    with graph.perf.override(db="fake"):
        assert graph.invoke({})["answer"] == "fake"
    assert graph.invoke({})["answer"] == "key"
    graph.perf.close()


@pytest.mark.parametrize("streams", [False, True])
async def test_a_cancelled_sync_body_keeps_its_lease_until_its_thread_ends(streams: bool) -> None:
    """The caller is cancelled at once; nobody else gets what the thread still uses."""
    pool = Pool(Connection, max_size=1, timeout=10)
    started, go_on, users = threading.Event(), threading.Event(), []

    def node(state: State, db: Connection) -> State:
        users.append(db)
        most = len(users)
        started.set()
        assert go_on.wait(10)
        users.remove(db)
        return {"answer": most}

    graph = build(node, ["db"], {"db": pool})

    async def run() -> Any:
        if not streams:
            return await graph.ainvoke({})
        return [chunk async for chunk in graph.astream({}, stream_mode="messages")]

    first = asyncio.create_task(run())
    await asyncio.to_thread(started.wait, 10)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert pool.stats().in_use == 1
    second = asyncio.create_task(graph.ainvoke({}))
    await auntil(lambda: pool.stats().waiting == 1)
    go_on.set()
    assert (await second)["answer"] == 1
    idle(graph)


async def test_a_cancelled_sync_body_that_has_not_begun_never_does() -> None:
    """Its lease comes back at once, so it must not run when a thread comes free."""
    pool = Shared(Connection)
    busy, go_on, runs = threading.Event(), threading.Event(), []
    with ThreadPoolExecutor(1) as executor:
        asyncio.get_running_loop().set_default_executor(executor)
        graph = build(lambda state, db: {"answer": runs.append(1)}, ["db"], {"db": pool})
        executor.submit(lambda: (busy.set(), go_on.wait(10)))
        task = asyncio.create_task(graph.ainvoke({}))
        await auntil(lambda: pool.stats().in_use == 1)
        await auntil(lambda: executor._work_queue.qsize() == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        idle(graph)
        go_on.set()
    assert runs == []


def test_the_end_of_the_loop_waits_for_a_body_and_its_lease() -> None:
    """``asyncio.run`` ends with the thread, and nothing is lost with its loop."""
    reset: list[str] = []

    pool = Pool(Connection, max_size=1, reset=lambda db: reset.append("reset"))
    started, go_on = threading.Event(), threading.Event()

    def node(state: State, db: Connection) -> State:
        started.set()
        assert go_on.wait(10)
        return {}

    graph = build(node, ["db"], {"db": pool})

    async def main() -> None:
        task = asyncio.create_task(graph.ainvoke({}))
        await asyncio.to_thread(started.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not reset
        asyncio.get_running_loop().call_soon(go_on.set)

    asyncio.run(main())
    assert reset == ["reset"]
    idle(graph)


async def test_errors_of_sync_bodies_in_async_runs() -> None:
    """They arrive as they do without resources, ``StopIteration`` included."""
    for error, seen in ((ValueError, ValueError), (StopIteration, RuntimeError)):

        def node(state: State, db: Connection, error: Any = error) -> State:
            raise error

        graph = build(node, ["db"], {"db": Pool(Connection)})
        with pytest.raises(seen):
            await graph.ainvoke({})
        idle(graph)


@pytest.mark.parametrize("parameter", ["func", "executor_or_config", "args", "kwargs", "context"])
async def test_parameters_with_names_of_langgraphs_helpers(parameter: str) -> None:
    """What LangGraph and LangChain call their own parameters can be a parameter of a node."""
    names: dict[str, Any] = {}
    exec(f"def node(state, {parameter}): return {{'answer': {parameter}}}", names)
    graph = build(names["node"], {parameter: "db"}, {"db": Shared(lambda: "db")})
    assert graph.invoke({})["answer"] == "db"
    assert (await graph.ainvoke({}))["answer"] == "db"
    idle(graph)


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_a_manager_cannot_swallow_a_nodes_error(kind: str) -> None:
    """There would be no result in its place."""
    seen: list[object] = []

    class Swallow:
        def __enter__(self) -> str:
            return "db"

        def __exit__(self, exc_type: object, *_: object) -> bool:
            seen.append(exc_type)
            return True

    graph = build(_fails, ["db"], {"db": FromContext(Swallow)})
    with pytest.raises(ValueError, match="broken"):
        graph.invoke({}) if kind == "sync" else await graph.ainvoke({})
    assert seen == [ValueError]
    idle(graph)


async def test_holders_are_never_short_of_threads() -> None:
    """Bodies that wait for a resource take threads of the loop's executor, not those that its
    holders need to go on and give it back."""
    held, wait = threading.Event(), threading.Event()

    def whole(state: State, db: Connection) -> State:
        return {}

    def part(state: State) -> State:
        assert held.wait(10)
        wait.set()
        with lease("db"):
            return {}

    builder = StateGraph(State)
    builder.add_node("part", part).add_edge(START, "part")
    builder.add_node("whole", whole, resources=["db"]).add_edge(START, "whole")

    def create() -> Connection:
        held.set()
        assert wait.wait(10)  # by now the only thread is taken
        return Connection()

    graph = builder.compile(resources={"db": Pool(create, max_size=1, timeout=10)})
    with ThreadPoolExecutor(1) as executor:
        asyncio.get_running_loop().set_default_executor(executor)
        await graph.ainvoke({})
    idle(graph)


def test_more_objects_than_there_can_be_are_refused_at_compile() -> None:
    """A node that could never have what it asks for is named when the graph is compiled."""
    with pytest.raises(ConfigurationError, match=r"node 'node': 2 objects of Pool 'db'.*max_size"):
        build(
            lambda state, a, b: {},
            {"a": "db", "b": "db"},
            {"db": Pool(Connection, max_size=1)},
        )


def test_a_key_function_that_is_async_is_refused() -> None:
    """What it returns would be a key that nothing ever equals."""

    async def key(state: State) -> str:
        return "k"

    with pytest.raises(ConfigurationError, match=r"Use\('models'\): key .*async def"):
        Use("models", key=key)


def test_errors_of_leases_name_the_node() -> None:
    """Also where only the run shows that a sync node gets what needs an event loop."""

    async def load() -> str:
        return "model"

    graph = build(lambda state, db: {}, ["db"], {"db": Shared(object)})
    with (
        graph.perf.override(db=Shared(load)),
        pytest.raises(ConfigurationError, match=r"node 'node': Shared 'db'.*async def"),
    ):
        graph.invoke({})


async def test_a_destroyed_task_leaves_the_lease_with_its_thread() -> None:
    """As a cancelled one does."""
    pool = Pool(Connection, max_size=1)
    started, go_on = threading.Event(), threading.Event()

    def node(state: State, db: Connection) -> State:
        started.set()
        assert go_on.wait(10)
        return {}

    async def run() -> None:
        step = RunnableCallable(node, partial(run_in_executor, None, node), trace=False)
        first, leases = on_thread(step, Registry({"db": pool}).alease({"db": None}), False)
        async with leases as leased:
            await first.ainvoke({}, **leased)

    task = asyncio.create_task(run())
    await auntil(started.is_set)
    task.get_coro().close()
    assert pool.stats().in_use == 1
    go_on.set()
    await auntil(lambda: pool.stats().in_use == 0)
    task.cancel()
    await asyncio.wait([task])
    assert pool.stats().forgotten == 0
