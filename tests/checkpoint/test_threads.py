"""What a thread or a run owns lives and dies with it, in every cache, sync and async."""

from __future__ import annotations

import asyncio
import operator
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any
from uuid import uuid4

import pytest
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.func import task
from langgraph.graph import START
from langgraph.graph import StateGraph as LangGraphStateGraph
from langgraph.types import Command, interrupt
from typing_extensions import TypedDict

from langgraph_perf import (
    CachePolicy,
    DiskCache,
    MemoryCache,
    RedisCache,
    StateGraph,
    TieredCache,
    get_cache,
)
from langgraph_perf._backend import Backend, owner_tag
from langgraph_perf._owner import thread_namespace
from langgraph_perf.caches.base import Cache, Lookup
from langgraph_perf.errors import CacheClosed, ConfigurationError
from langgraph_perf.testing import Clock
from tests.redis_server import Server, new_prefix
from tests.test_single_flight import auntil

from .savers import drivers, savers


class State(TypedDict, total=False):
    query: str
    answer: str


POLICY = CachePolicy(scope="thread", version="1", key=["query"])


class Saver(InMemorySaver):
    """Does what none of LangGraph's own savers can."""

    def _moved(self, store: Any, source: str, target: str | None) -> None:
        for key in [key for key in store if key[0] == source]:
            value = store.pop(key) if target is None else store[key]
            if target is not None:
                store[(target, *key[1:])] = value

    def copy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        self.storage[target_thread_id] = self.storage[source_thread_id]
        self._moved(self.writes, source_thread_id, target_thread_id)
        self._moved(self.blobs, source_thread_id, target_thread_id)

    async def acopy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        self.copy_thread(source_thread_id, target_thread_id)

    def delete_for_runs(self, run_ids: Any) -> None: ...

    async def adelete_for_runs(self, run_ids: Any) -> None: ...

    def prune(self, thread_ids: Any, *, strategy: str = "keep_latest") -> None: ...

    async def aprune(self, thread_ids: Any, *, strategy: str = "keep_latest") -> None: ...


_NEW = object()


def build(
    node: Any, cache: Any, policy: CachePolicy | None = None, saver: Any = _NEW, **kwargs: Any
) -> Any:
    builder = StateGraph(State)
    builder.add_node("answer", node, cache_policy=policy or POLICY, **kwargs)
    builder.add_edge(START, "answer")
    saver = Saver() if saver is _NEW else saver
    return builder.compile(checkpointer=saver, cache=cache)


def counted() -> tuple[Any, list[str]]:
    """A node, and the queries that its body ran for."""
    ran: list[str] = []

    def node(state: State) -> State:
        ran.append(state["query"])
        return {"answer": state["query"].upper()}

    return node, ran


def run(graph: Any, thread: str, query: str = "q", **conf: Any) -> Any:
    return graph.invoke({"query": query}, {"configurable": {"thread_id": thread, **conf}})


def left(cache: Cache, thread: str) -> int:
    """How many entries of ``thread`` are stored, servable or not."""
    copied = "a copy of it"
    tag = owner_tag(thread_namespace(thread))
    token = cache.peek_tags([tag]).get(tag)
    if token is None:
        return 0
    (new,) = cache.tag_tokens([owner_tag(thread_namespace(copied))])
    number = cache.copy(
        thread_namespace(thread),
        thread_namespace(copied),
        {tag: (owner_tag(thread_namespace(copied)), new)},
    )
    cache.clear([thread_namespace(copied)])
    return number


def test_a_threads_results_are_its_own(cache: Cache) -> None:
    """Another thread computes the same anew; the thread itself does not."""
    node, ran = counted()
    graph = build(node, cache)
    for thread in ("a", "a", "b", "b", "a"):
        assert run(graph, thread)["answer"] == "Q"
    assert len(ran) == 2


@pytest.mark.parametrize("how", ["delete_thread", "prune", "forget_thread"])
@pytest.mark.parametrize("awaited", [False, True], ids=["sync", "async"])
def test_what_a_thread_owns_goes_with_it(cache: Cache, how: str, awaited: bool) -> None:
    """Deleting, pruning away or forgetting a thread removes its results, and no one else's."""
    node, ran = counted()
    graph = build(node, cache)
    for thread in ("gone", "stays"):
        run(graph, thread)
    assert (left(cache, "gone"), left(cache, "stays")) == (1, 1)

    def remove() -> Any:
        if how == "forget_thread":
            return (graph.perf.aforget_thread if awaited else graph.perf.forget_thread)("gone")
        saver = graph.checkpointer
        if how == "prune":
            return (saver.aprune if awaited else saver.prune)(["gone"], strategy="delete")
        return (saver.adelete_thread if awaited else saver.delete_thread)("gone")

    async def aremove() -> None:
        await remove()

    asyncio.run(aremove()) if awaited else remove()
    assert (left(cache, "gone"), left(cache, "stays")) == (0, 1)
    for thread in ("stays", "gone"):
        run(graph, thread)
    assert len(ran) == 3


@pytest.mark.parametrize("how", ["sync", "async"])
@pytest.mark.parametrize(
    ("kind", "call"), [("sqlite", "delete"), ("postgres", "delete"), ("postgres", "prune")]
)
def test_real_savers_take_what_their_threads_own(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, call: str, how: str
) -> None:
    """The checkpoints and the results of the thread are gone, those of another thread are not, nor
    what is everybody's."""
    node, ran = counted()
    # the database is there for other tests too
    gone, stays = uuid4().hex, uuid4().hex
    with (
        DiskCache(tmp_path / "cache") as disk,
        drivers(how) as driver,
        savers(kind, driver, request) as make,
    ):
        builder = StateGraph(State)
        builder.add_node("owned", node, cache_policy=POLICY)
        builder.add_node("shared", node, cache_policy=CachePolicy(version="1", key=["query"]))
        builder.add_edge(START, "owned").add_edge("owned", "shared")
        graph = builder.compile(checkpointer=make(), cache=disk)

        def ask(thread: str) -> None:
            config = {"configurable": {"thread_id": thread}}
            assert driver.call(graph, "invoke", {"query": "q"}, config)["answer"] == "Q"

        def checkpoints(thread: str) -> int:
            config = {"configurable": {"thread_id": thread}}
            return len(driver.listed(graph.checkpointer, "list", config))

        for thread in (gone, stays):
            ask(thread)
        assert (disk.stats().entries, len(ran)) == (3, 3)
        kept = checkpoints(stays)
        if call == "delete":
            driver.call(graph.checkpointer, "delete_thread", gone)
        else:
            driver.call(graph.checkpointer, "prune", [gone], strategy="delete")
        assert (checkpoints(gone), checkpoints(stays)) == (0, kept)
        assert disk.stats().entries == 2
        assert (left(disk, gone), left(disk, stays)) == (0, 1)
        ask(stays)
        assert len(ran) == 3
        ask(gone)
        assert len(ran) == 4


def test_pruning_to_the_latest_keeps_what_a_living_thread_owns(cache: Cache) -> None:
    """The thread lives on, and so do its results."""
    node, ran = counted()
    graph = build(node, cache)
    run(graph, "t")
    graph.checkpointer.prune(["t"])
    run(graph, "t")
    assert len(ran) == 1


@pytest.mark.parametrize("awaited", [False, True], ids=["sync", "async"])
def test_a_copied_thread_has_copies_of_its_own(cache: Cache, awaited: bool) -> None:
    """The copy hits what the original had, and survives it."""
    node, ran = counted()
    graph = build(node, cache)
    run(graph, "original", "one")
    run(graph, "original", "two")
    saver = graph.checkpointer
    if awaited:
        asyncio.run(saver.acopy_thread("original", "copy"))
    else:
        saver.copy_thread("original", "copy")
    run(graph, "copy", "one")
    saver.delete_thread("original")
    run(graph, "copy", "two")
    assert ran == ["one", "two"]
    run(graph, "original", "one")
    assert ran == ["one", "two", "one"]
    saver.delete_thread("copy")
    assert left(cache, "copy") == 0


@pytest.mark.parametrize("awaited", [False, True], ids=["sync", "async"])
def test_deleted_runs_take_what_they_made(cache: Cache, awaited: bool) -> None:
    """Results of a deleted run are removed; those of the thread's other runs are served."""
    node, ran = counted()
    graph = build(node, cache)
    run(graph, "t", "one", run_id="run-1")
    run(graph, "t", "two", run_id="run-2")
    run(graph, "t", "one", run_id="run-3")  # a hit: it was made in the first
    assert ran == ["one", "two"]
    if awaited:
        asyncio.run(graph.checkpointer.adelete_for_runs(["run-1"]))
    else:
        graph.checkpointer.delete_for_runs(["run-1"])
    if isinstance(cache, (MemoryCache, DiskCache)):
        assert cache.stats().entries == 1
    # nothing is left to purge
    assert cache.purge(thread_namespace("t")) == 0
    run(graph, "t", "two", run_id="run-4")
    run(graph, "t", "one", run_id="run-5")
    assert ran == ["one", "two", "one"]


def test_a_run_that_ends_after_its_thread_leaves_nothing(cache: Cache) -> None:
    """The thread is deleted while a node runs, and a later node of the same run has yet to."""
    entered, deleted = threading.Event(), threading.Event()

    def slow(state: State) -> State:
        entered.set()
        assert deleted.wait(30)
        return {"answer": "late"}

    node, ran = counted()
    builder = StateGraph(State)
    builder.add_node("uncached", lambda state: None)
    builder.add_node("slow", slow, cache_policy=POLICY)
    builder.add_node("after", node, cache_policy=POLICY)
    builder.add_edge(START, "uncached").add_edge("uncached", "slow").add_edge("slow", "after")
    graph: Any = builder.compile(checkpointer=Saver(), cache=cache)
    worker = threading.Thread(target=run, args=(graph, "t"))
    worker.start()
    assert entered.wait(30)
    graph.checkpointer.delete_thread("t")
    deleted.set()
    worker.join(30)
    assert ran == ["q"]
    # the thread's tag has a new token, should it live again: count whatever depends on it or not
    assert left(cache, "t") == 0
    if isinstance(cache, (MemoryCache, DiskCache)):
        assert cache.stats().entries == 0


def test_a_thread_deleted_before_its_run_stores_anything(cache: Cache) -> None:
    """A run knows its thread from its start, not from its first result on."""
    entered, deleted = threading.Event(), threading.Event()

    def slow(state: State) -> None:
        entered.set()
        assert deleted.wait(30)

    node, ran = counted()
    builder = StateGraph(State)
    builder.add_node("slow", slow)
    builder.add_node("after", node, cache_policy=POLICY)
    builder.add_edge(START, "slow").add_edge("slow", "after")
    graph: Any = builder.compile(checkpointer=Saver(), cache=cache)
    worker = threading.Thread(target=run, args=(graph, "t"))
    worker.start()
    assert entered.wait(30)
    graph.checkpointer.delete_thread("t")
    deleted.set()
    worker.join(30)
    assert ran == ["q"]
    run(graph, "t")
    assert ran == ["q", "q"]


async def test_an_awaited_run_that_ends_after_its_thread_leaves_nothing(cache: Cache) -> None:
    """The same on an event loop."""
    entered, deleted = asyncio.Event(), asyncio.Event()

    async def slow(state: State) -> State:
        entered.set()
        await deleted.wait()
        return {"answer": "late"}

    graph = build(slow, cache)
    config = {"configurable": {"thread_id": "t"}}
    task = asyncio.create_task(graph.ainvoke({"query": "q"}, config))
    await entered.wait()
    await graph.checkpointer.adelete_thread("t")
    deleted.set()
    await task
    if isinstance(cache, (MemoryCache, DiskCache)):
        assert cache.stats().entries == 0
    entered.clear()
    await graph.ainvoke({"query": "q"}, config)
    assert entered.is_set()


@pytest.mark.parametrize("tiers", [False, True], ids=["alone", "tiers"])
@pytest.mark.parametrize("awaited", [False, True], ids=["sync", "async"])
def test_a_late_run_leaves_nothing_on_redis(
    redis_server: Server, awaited: bool, tiers: bool
) -> None:
    """Of a run that ends after its thread was deleted no entry, index, lease or token stays there,
    be they served or not."""
    prefix = new_prefix()
    cache: Cache = RedisCache(redis_server.url, prefix=prefix)
    if tiers:
        cache = TieredCache(MemoryCache(), cache)
    entered, deleted = threading.Event(), threading.Event()

    def slow(state: State) -> State:
        entered.set()
        assert deleted.wait(30)
        return {"answer": "late"}

    async def aslow(state: State) -> State:
        return await asyncio.to_thread(slow, state)

    graph = build(aslow if awaited else slow, cache)

    def ask(thread: str) -> Any:
        config = {"configurable": {"thread_id": thread}}
        if awaited:
            return asyncio.run(graph.ainvoke({"query": "q"}, config))
        return graph.invoke({"query": "q"}, config)

    def delete(thread: str) -> None:
        if awaited:
            asyncio.run(graph.checkpointer.adelete_thread(thread))
        else:
            graph.checkpointer.delete_thread(thread)

    def names() -> set[bytes]:
        with redis_server.client() as client:
            found = set(client.scan_iter(match=f"{prefix}:*"))
        return found - {f"{prefix}:1:viewers".encode()}  # those come and go

    with cache, ThreadPoolExecutor(1) as pool:
        deleted.set()
        ask("earlier")
        delete("earlier")
        before = names()  # what is of the node, and of no thread
        assert len(before) <= 1
        entered.clear()
        deleted.clear()
        late = pool.submit(ask, "t")
        assert entered.wait(30)
        assert names() > before
        delete("t")
        deleted.set()
        assert late.result(30)["answer"] == "late"
        assert names() == before


_OTHER = """
import sys
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph_perf import DiskCache
from tests.checkpoint.test_threads import build
with SqliteSaver.from_conn_string(sys.argv[1]) as saver:
    graph = build(lambda state: None, DiskCache(sys.argv[2]), saver=saver)
    graph.checkpointer.delete_thread("t")
"""


def test_a_thread_deleted_by_another_process(tmp_path: Path) -> None:
    """A process that computes nothing removes what this one stored, and this one sees it."""
    node, ran = counted()
    with (
        DiskCache(tmp_path / "cache") as disk,
        SqliteSaver.from_conn_string(str(tmp_path / "db")) as saver,
    ):
        graph = build(node, TieredCache(MemoryCache(), disk), saver=saver)
        run(graph, "t")
        run(graph, "t")
        subprocess.run(
            [sys.executable, "-c", _OTHER, str(tmp_path / "db"), str(tmp_path / "cache")],
            check=True,
            timeout=100,
        )
        assert disk.stats().entries == 0
        run(graph, "t")
        assert len(ran) == 2


def test_a_runs_results_end_with_it(cache: Cache) -> None:
    """``scope="run"``: equal work of one run is done once, that of the next one again."""
    ran: list[int] = []

    def node(state: State) -> State:
        ran.append(1)
        return {"answer": "a"}

    policy = CachePolicy(scope="run", version="1", key=["query"])
    builder = StateGraph(State)
    builder.add_node("first", node, cache_policy=policy)
    builder.add_node("again", lambda state: inner.invoke({"query": "q"}))
    builder.add_edge(START, "first").add_edge("first", "again")
    inner = build(node, None, policy, saver=False)
    graph: Any = builder.compile(cache=cache)
    graph.invoke({"query": "q"})
    assert len(ran) == 2
    graph.invoke({"query": "q"})
    assert len(ran) == 4
    if isinstance(cache, (MemoryCache, DiskCache)):
        assert cache.stats().entries == 0


async def test_a_runs_results_end_with_it_awaited(cache: Cache) -> None:
    """The same for a run that is streamed on an event loop, and for one that is left halfway."""
    builder = StateGraph(State)
    for name in ("one", "two"):
        builder.add_node(
            name, lambda state: {"answer": "a"}, cache_policy=CachePolicy(scope="run", version=name)
        )
    builder.add_edge(START, "one").add_edge("one", "two")
    graph: Any = builder.compile(cache=cache)
    async for _ in graph.astream({"query": "q"}):
        pass
    stream = graph.astream({"query": "q"})
    await stream.__anext__()
    await stream.aclose()
    if isinstance(cache, (MemoryCache, DiskCache)):
        assert cache.stats().entries == 0


def test_a_caller_narrows_a_policy_to_the_thread(cache: Cache) -> None:
    """``cache_control`` with scope ``thread``: items too are stored for the thread."""
    ran: list[str] = []

    def node(state: State) -> State:
        ran.append("node")
        return {"answer": get_cache("items").get_or_set("k", lambda: ran.append("item") or "v")}

    graph = build(node, cache, CachePolicy(version="1", key=["query"]))
    control = {"cache_control": {"scope": "thread"}}
    for thread in ("a", "a", "b"):
        run(graph, thread, **control)
    assert ran == ["node", "item"] * 2
    graph.checkpointer.delete_thread("a")
    run(graph, "b", **control)
    assert ran == ["node", "item"] * 2
    run(graph, "a", **control)
    assert ran == ["node", "item"] * 3


@pytest.mark.parametrize("scope", ["thread", "run"])
def test_items_of_a_threads_node_are_the_threads(cache: Cache, scope: Any) -> None:
    """What a node makes for one thread or run, its items are made for, in graphs inside as well."""
    made: list[str] = []

    def deep(state: State) -> State:
        get_cache("deep").get_or_set("k", lambda: made.append("deep") or "v")
        return {}

    inner: Any = StateGraph(State).add_node("deep", deep)
    inner = inner.add_edge(START, "deep").compile()

    def node(state: State) -> State:
        get_cache("items").get_or_set("k", lambda: made.append("item") or "v")
        inner.invoke(state)
        return {"answer": "a"}

    policy = CachePolicy(scope=scope, version="1", key=["query"], when=lambda result: False)
    graph = build(node, cache, policy)
    for thread in ("alice", "alice", "bob"):
        run(graph, thread)
    assert made == ["item", "deep"] * (2 if scope == "thread" else 3)
    for thread in ("alice", "bob"):
        graph.checkpointer.delete_thread(thread)
    if isinstance(cache, (MemoryCache, DiskCache)):
        assert cache.stats().entries == 0


def test_a_graph_with_a_closed_cache_is_in_nobodys_way(tmp_path: Path) -> None:
    """It has the saver in common with another graph, whose threads are deleted all the same; its
    own deletion says that the cache is closed."""
    saver, node = Saver(), counted()[0]
    closed, own = DiskCache(tmp_path / "closed"), MemoryCache()
    one, other = build(node, closed, saver=saver), build(node, own, saver=saver)
    for graph in (one, other):
        run(graph, "t")
    closed.close()
    other.checkpointer.delete_thread("t")
    assert own.stats().entries == 0
    with pytest.raises(CacheClosed):
        one.checkpointer.delete_thread("t")


def test_many_items_of_a_thread_go_with_it(cache: Cache) -> None:
    """``get_or_set_many`` narrowed to a thread keeps to the same."""
    asked: list[list[int]] = []

    def node(state: State) -> State:
        def compute(keys: list[int]) -> list[int]:
            asked.append(keys)
            return keys

        get_cache("items").get_or_set_many([1, 2], compute)
        return {"answer": "a"}

    graph = build(node, cache, CachePolicy(version="1", key=["query"], when=lambda result: False))
    control = {"cache_control": {"scope": "thread"}}
    run(graph, "a", **control)
    run(graph, "a", **control)
    assert asked == [[1, 2]]
    graph.perf.forget_thread("a")
    run(graph, "a", **control)
    assert asked == [[1, 2]] * 2


def test_clearing_a_node_clears_what_threads_own_of_it(cache: Cache) -> None:
    """``clear_cache`` keeps LangGraph's meaning for results of threads."""
    node, ran = counted()
    graph = build(node, cache)
    run(graph, "t")
    graph.clear_cache(["answer"])
    run(graph, "t")
    assert len(ran) == 2


def test_what_is_made_of_a_threads_result_is_not_everybodys(cache: Cache) -> None:
    """A node with a wider scope is not stored if it used a result of one thread."""
    node, ran = counted()
    inner = build(node, None, saver=False)
    outer: list[int] = []

    def around(state: State) -> Any:
        outer.append(1)
        return inner.invoke(state)

    graph = build(around, cache, CachePolicy(version="1", key=["query"]))
    run(graph, "alice")
    run(graph, "alice")
    assert (len(outer), len(ran)) == (2, 1)
    assert graph.perf.stats().nodes["answer"].refusals["narrower_inside"] == 2


@pytest.mark.parametrize("why", ["unkeyable", "bypassed"])
def test_a_threads_result_that_was_not_stored_is_not_everybodys(cache: Cache, why: str) -> None:
    """However the inner node came by its result: the outer one's is not stored."""
    ran: list[str] = []
    key = (lambda state: object()) if why == "unkeyable" else ["query"]
    inner = build(
        lambda state: {"answer": ran.append("inner") or "a"},
        None,
        CachePolicy(scope="thread", version="1", key=key),
        saver=False,
    )

    def around(state: State) -> Any:
        return inner.invoke(state)

    graph = build(around, cache, CachePolicy(version="1", key=["query"]))
    control: Any = {"nodes": {"answer": {"mode": "use"}}}
    if why == "bypassed":
        inner = inner.with_config(configurable={"cache_control": {"mode": "bypass"}})
    run(graph, "alice", cache_control=control)
    run(graph, "bob", cache_control=control)
    assert len(ran) == 2
    assert graph.perf.stats().nodes["answer"].refusals["narrower_inside"] == 2


@pytest.mark.parametrize("what", ["graph", "items"])
def test_threads_of_a_node_are_part_of_it(cache: Cache, what: str) -> None:
    """What a node computes in a thread of its own making belongs to the node too."""
    calls: list[str] = []
    inner = build(
        lambda state: {"answer": state["query"]},
        None,
        CachePolicy(scope="thread", version="2", key=["query"]),
        saver=False,
    )

    def around(state: State, config: RunnableConfig) -> Any:
        calls.append("outer")
        with ThreadPoolExecutor() as executor:
            if what == "graph":
                return executor.submit(inner.invoke, state, config).result()
            items = get_cache("items", config)
            future = executor.submit(items.get_or_set, "k", lambda: "v", tags=["doc"])
            return {"answer": future.result()}

    graph = build(around, cache, CachePolicy(version="1", key=["query"]))
    run(graph, "alice")
    if what == "items":
        run(graph, "alice")
        assert len(calls) == 1
        cache.invalidate("doc")
    run(graph, "bob")
    assert len(calls) == 2


def test_many_items_depend_on_what_they_are_made_of(cache: Cache) -> None:
    """``compute_many`` passes dependencies on to its values, as ``compute`` does."""
    made: list[str] = []
    inner = build(lambda state: {"answer": state["query"]}, None, saver=False)

    def many(keys: list[str]) -> list[str]:
        made.extend(keys)
        if keys == ["of a thread"]:
            inner.invoke({"query": "q"})
        else:
            get_cache("documents").get_or_set("d", lambda: "text", tags=["doc"])
        return keys

    def node(state: State) -> State:
        return {"answer": get_cache("items").get_or_set_many([state["query"]], many)[0]}

    graph = build(node, cache, CachePolicy(version="2", when=lambda result: False))
    for _ in range(2):
        run(graph, "t", "of a document")
    assert made == ["of a document"]
    cache.invalidate("doc")
    run(graph, "t", "of a document")
    assert made == ["of a document"] * 2
    for thread in ("alice", "bob"):
        run(graph, thread, "of a thread")
    assert made[2:] == ["of a thread"] * 2


@pytest.mark.parametrize("many", [False, True])
def test_items_made_after_a_humans_answer(cache: Cache, many: bool) -> None:
    """A task that was resumed stores no items: what the human said may be in them."""

    def node(state: State) -> State:
        said = interrupt("?")
        items = get_cache("items")
        if many:
            return {"answer": items.get_or_set_many(["k"], lambda keys: [said])[0]}
        return {"answer": items.get_or_set("k", lambda: said)}

    graph = build(node, cache)
    answers = []
    for thread, said in (("alice", "yes"), ("bob", "no")):
        run(graph, thread)
        config = {"configurable": {"thread_id": thread}}
        answers.append(graph.invoke(Command(resume=said), config)["answer"])
    assert answers == ["yes", "no"]


def test_graphs_that_langgraph_does_not_show(cache: Cache) -> None:
    """One compiled with ``checkpointer=False``, and one hidden in a node, each with a cache of its
    own: what threads own there goes too, and the first is counted."""
    node, ran = counted()
    own, hidden_own = MemoryCache(), MemoryCache()
    hidden = {"graph": build(node, hidden_own, saver=False)}
    builder = StateGraph(State)
    builder.add_node("shown", build(node, own, saver=False))
    builder.add_node("hides", lambda state: hidden["graph"].invoke(state))
    builder.add_edge(START, "shown").add_edge("shown", "hides")
    graph: Any = builder.compile(checkpointer=Saver(), cache=cache)
    run(graph, "t")
    assert (left(own, "t"), left(hidden_own, "t")) == (1, 1)
    assert graph.perf.stats().nodes["shown|answer"].runs == 1
    graph.checkpointer.delete_thread("t")
    assert (left(own, "t"), left(hidden_own, "t")) == (0, 0)
    run(graph, "t")
    assert len(ran) == 4


def test_a_hidden_graph_does_not_outlive_its_thread(cache: Cache) -> None:
    """The thread is deleted before a graph that LangGraph does not see has run."""
    node, ran = counted()
    hidden = {"graph": build(node, None, saver=False)}

    def deletes(state: State) -> None:
        graph.checkpointer.delete_thread("t")

    builder = StateGraph(State)
    builder.add_node("deletes", deletes)
    builder.add_node("hides", lambda state: hidden["graph"].invoke(state))
    builder.add_edge(START, "deletes").add_edge("deletes", "hides")
    graph: Any = builder.compile(checkpointer=Saver(), cache=cache)
    run(graph, "t")
    run(graph, "t")
    assert len(ran) == 2


def test_a_thread_without_a_checkpointer_is_forgotten_by_its_runs(cache: Cache) -> None:
    """``forget_thread`` reaches runs of graphs that keep no state."""
    node, ran = counted()
    builder = StateGraph(State)
    builder.add_node("forgets", lambda state: graph.perf.forget_thread("t"))
    builder.add_node("after", node, cache_policy=POLICY)
    builder.add_edge(START, "forgets").add_edge("forgets", "after")
    graph: Any = builder.compile(cache=cache)
    for _ in range(2):
        run(graph, "t")
    assert len(ran) == 2


def test_a_run_that_could_not_learn_of_its_thread_stores_nothing(cache: Cache) -> None:
    """The token cannot be had when the run starts: later on it would be that of a new thread."""
    node, ran = counted()
    graph = build(node, cache)
    failing, tokens = [True], type(cache).tag_tokens

    def tag_tokens(tags: Any) -> Any:
        if failing and failing.pop():
            raise ConnectionError("away")
        return tokens(cache, tags)

    cache.tag_tokens = tag_tokens  # type: ignore[method-assign]
    run(graph, "t")
    assert graph.perf.stats().nodes["answer"].refusals["tags_unavailable"] == 1
    run(graph, "t")
    run(graph, "t")
    assert len(ran) == 2


def test_a_run_deleted_while_it_runs(cache: Cache) -> None:
    """What it stores afterwards is not served either."""
    node, ran = counted()
    builder = StateGraph(State)
    builder.add_node("deletes", lambda state: graph.checkpointer.delete_for_runs(["r1"]))
    builder.add_node("after", node, cache_policy=POLICY)
    builder.add_edge(START, "deletes").add_edge("deletes", "after")
    graph: Any = builder.compile(checkpointer=Saver(), cache=cache)
    run(graph, "t", run_id="r1")
    run(graph, "t", run_id="r2")
    run(graph, "t", run_id="r3")
    assert len(ran) == 2


def test_items_of_a_run_expire_though_it_was_killed() -> None:
    """A run that ends without removing what it owns leaves it for a day at most."""
    clock = Clock()
    cache = MemoryCache(clock=clock)
    entries: list[int] = []

    def node(state: State) -> State:
        items = get_cache("items")
        items.get_or_set("k", lambda: "v")
        items.get_or_set_many(["l"], lambda keys: keys)
        entries.append(cache.stats().entries)
        clock.advance(90_000)
        entries.append(cache.stats().entries)
        return {"answer": "a"}

    run(build(node, cache), "t", cache_control={"scope": "run"})
    assert entries == [2, 0]


def test_iterators_are_read_once() -> None:
    """Thread ids that come from an iterator reach the saver and the cache."""
    node, ran = counted()
    graph = build(node, MemoryCache())
    run(graph, "t", run_id="r")
    graph.checkpointer.prune(iter(["t"]), strategy="delete")
    run(graph, "t", run_id="r2")
    graph.checkpointer.delete_for_runs(iter(["r2"]))
    run(graph, "t")
    assert len(ran) == 3


def test_graphs_with_one_saver_have_their_threads_in_common() -> None:
    """Deleted through one graph, a thread's results go in the caches of both, whatever one of them
    raises."""

    class Broken(MemoryCache):
        def drop_tags(self, tags: Any) -> None:
            raise ConnectionError("away")

    node, ran = counted()
    saver = Saver()
    graphs = [build(node, MemoryCache(), saver=saver) for _ in range(2)]
    broken = build(lambda state: None, Broken(), saver=saver)
    for graph in (*graphs, broken):
        run(graph, "t")
    with pytest.raises(ConnectionError):
        graphs[0].checkpointer.delete_thread("t")
    for graph in graphs:
        run(graph, "t")
    assert len(ran) == 4


def test_forgetting_fails_loudly(tmp_path: Path) -> None:
    """An order to remove something does not fail open, and every cache is told."""

    class Broken(MemoryCache):
        def drop_tags(self, tags: Any) -> None:
            raise ConnectionError("away")

    node, _ = counted()
    own = MemoryCache()
    builder = StateGraph(State)
    builder.add_node("inner", build(node, own, saver=True))
    builder.add_edge(START, "inner")
    saver = Saver()
    graph: Any = builder.compile(checkpointer=saver, cache=Broken())
    run(graph, "t")
    assert left(own, "t") == 1
    with pytest.raises(ConnectionError, match="away"):
        graph.checkpointer.delete_thread("t")
    assert left(own, "t") == 0
    assert not list(saver.list({"configurable": {"thread_id": "t"}}))


def test_a_saver_that_cannot_delete_still_forgets() -> None:
    """What the saver raises comes through; results are forgotten all the same."""

    class Stubborn(Saver):
        def delete_thread(self, thread_id: str) -> None:
            raise PermissionError("no")

    node, _ = counted()
    cache = MemoryCache()
    graph = build(node, cache, saver=Stubborn())
    run(graph, "t")
    with pytest.raises(PermissionError, match="no"):
        graph.checkpointer.delete_thread("t")
    assert cache.stats().entries == 0


def test_a_cache_that_cannot_copy_lets_the_copy_compute(caplog: pytest.LogCaptureFixture) -> None:
    """Copying costs no more than a computation."""

    class Fails(MemoryCache):
        def copy(self, *args: Any) -> int:
            raise ConnectionError("away")

    node, ran = counted()
    graph = build(node, Fails())
    run(graph, "original")
    graph.checkpointer.copy_thread("original", "copy")
    assert "are computed again" in caplog.text
    run(graph, "copy")
    assert len(ran) == 2


def test_scope_thread_needs_a_thread() -> None:
    """Without a ``thread_id`` there is nobody to own the result: a clear error."""
    node, _ = counted()
    graph = build(node, MemoryCache(), saver=False)
    with pytest.raises(ConfigurationError, match=r"node 'answer': scope='thread' needs a thread"):
        graph.invoke({"query": "q"})


def test_scope_thread_needs_a_cache_that_can_forget() -> None:
    """A foreign cache cannot: refused when the graph is compiled, or not stored if a run asks."""
    from langgraph.cache.memory import InMemoryCache

    node, ran = counted()
    with pytest.raises(ConfigurationError, match=r"CachePolicy.scope: InMemoryCache cannot"):
        build(node, InMemoryCache())
    graph = build(node, InMemoryCache(), CachePolicy(version="1", key=["query"]))
    for _ in range(2):
        run(graph, "t", cache_control={"scope": "thread"})
    assert len(ran) == 2
    for _ in range(2):
        run(graph, "t", cache_control={"scope": "run"})
    assert len(ran) == 4


def test_a_checkpoint_of_another_thread(cache: Cache) -> None:
    """A ``checkpoint_id`` that is not of the thread is as in LangGraph: an empty start; results of
    the thread it is of are not served."""
    node, ran = counted()
    graph = build(node, cache)
    run(graph, "alice", "secret")
    theirs = graph.get_state({"configurable": {"thread_id": "alice"}}).config["configurable"]
    result = run(graph, "bob", "secret", checkpoint_id=theirs["checkpoint_id"])
    assert result == {"query": "secret", "answer": "SECRET"}
    assert len(ran) == 2


def test_tokens_are_pinned_by_backend(cache: Cache) -> None:
    """A graph inside with a cache of its own goes by that one's token."""
    node, ran = counted()
    own = MemoryCache()
    builder = StateGraph(State)
    builder.add_node("inner", build(node, own, saver=None))
    builder.add_node("outer", node, cache_policy=POLICY)
    builder.add_edge(START, "inner").add_edge("inner", "outer")
    graph: Any = builder.compile(checkpointer=Saver(), cache=cache)
    run(graph, "t")
    run(graph, "t")
    assert len(ran) == 2
    graph.checkpointer.delete_thread("t")
    assert (left(own, "t"), left(cache, "t")) == (0, 0)


def test_a_late_result_is_removed_even_if_it_was_written(cache: Cache) -> None:
    """Forgotten between the computation and the write: the backend itself takes it back."""
    backend = Backend.of(cache)
    namespace = thread_namespace("t")
    tag = owner_tag(namespace)
    from langgraph_perf.caches.base import Entry

    entry = Entry(b"x", cache.clock(), None, ((tag, cache.tag_tokens([tag])[0]),))
    cache.drop_tags([tag])
    assert backend.write((namespace, "k"), entry, None) is False
    assert cache.peek([Lookup((namespace, "k"))]) == [None]


@pytest.mark.parametrize("wrong", [None, ["t"], {"configurable": {"thread_id": "t"}}])
def test_forget_thread_takes_a_thread(wrong: Any) -> None:
    """Anything else is an error that says what it takes."""
    graph = build(counted()[0], MemoryCache())
    with pytest.raises(ConfigurationError, match=r"forget_thread\(thread_id\): got .* accepted:"):
        graph.perf.forget_thread(wrong)


def test_threads_may_be_numbers(cache: Cache) -> None:
    """As in LangGraph, where 1 and "1" are one thread."""
    node, ran = counted()
    graph = build(node, cache)
    run(graph, 1)  # type: ignore[arg-type]
    run(graph, "1")
    assert len(ran) == 1
    graph.perf.forget_thread(1)
    run(graph, "1")
    assert len(ran) == 2


def test_a_graph_that_remembers_hidden_in_a_node(cache: Cache) -> None:
    """Its result depends on earlier runs of the thread, though LangGraph does not see it there."""
    remembering = {"graph": build(lambda state: None, None, CachePolicy(version="2"), saver=True)}

    def around(state: State) -> Any:
        remembering["graph"].invoke(state)
        return {"answer": "a"}

    graph = build(around, cache, CachePolicy(version="1", key=["query"]))
    run(graph, "alice")
    run(graph, "bob")
    stats = graph.perf.stats().nodes["answer"]
    assert stats.hits == 0
    assert stats.refusals["remembers"] == 2


@pytest.mark.parametrize("how", ["by id", "before"])
def test_what_goes_on_inside_is_nobody_elses(how: str) -> None:
    """A graph inside a node, which LangGraph does not see, stops for a human and goes on later:
    what it then returns answers no other thread."""
    failures = [ValueError("transient")]

    def ask(state: State) -> State:
        return {"answer": interrupt("sure?") if how == "by id" else "yes"}

    def after(state: State) -> State:
        if how == "by id" and failures:
            raise failures.pop()
        return {}

    hidden = LangGraphStateGraph(State).add_node("ask", ask).add_node("after", after)
    hidden.add_edge(START, "ask").add_edge("ask", "after")
    inner = {"graph": hidden.compile(interrupt_before=["ask"] if how == "before" else None)}

    def node(state: State) -> State:
        return {"answer": inner["graph"].invoke({"query": state["query"]}).get("answer", "")}

    with MemoryCache() as cache:
        graph = build(node, cache, CachePolicy(key=["query"], version=1), InMemorySaver())
        first: Any = {"configurable": {"thread_id": "a"}}
        told = graph.invoke({"query": "q"}, first)
        if how == "by id":
            asked = told["__interrupt__"][0]
            with pytest.raises(ValueError, match="transient"):
                graph.invoke(Command(resume={asked.id: "yes"}), first)
        assert graph.invoke(None, first)["answer"] == "yes"
        assert graph.perf.stats().nodes["answer"].refusals["continued_inside"] == 1
        run(graph, "b")
        assert graph.get_state({"configurable": {"thread_id": "b"}}).next == ("answer",)


def test_ways_to_prune_and_copy() -> None:
    """Whatever a saver's own methods look like, they are called as LangGraph's are."""

    class Handing(Saver):
        def prune(self, *args: Any, **kwargs: Any) -> None: ...

    node, ran = counted()
    with MemoryCache() as cache:
        graph = build(node, cache, saver=Handing())
        run(graph, "t")
        graph.checkpointer.copy_thread(source_thread_id="t", target_thread_id="copy")
        assert left(cache, "copy") == 1
        graph.checkpointer.prune(["t"], strategy="delete")
        run(graph, "t")
    assert ran == ["q", "q"]


async def test_a_cancelled_write_leaves_nothing_of_a_deleted_thread(tmp_path: Path) -> None:
    """The run ends in the middle of storing what its thread, deleted by then, would have owned."""
    started, go_on, writing = asyncio.Event(), asyncio.Event(), asyncio.Event()
    loop, written = asyncio.get_running_loop(), threading.Event()

    class Slow(DiskCache):
        def write(self, *args: Any) -> bool:
            stored = super().write(*args)
            loop.call_soon_threadsafe(writing.set)
            assert written.wait(20)
            return stored

    async def node(state: State) -> State:
        started.set()
        await go_on.wait()
        return {"answer": "late"}

    with Slow(tmp_path / "cache") as cache:
        graph = build(node, cache)
        config: RunnableConfig = {"configurable": {"thread_id": "t"}}
        task = asyncio.create_task(graph.ainvoke({"query": "q"}, config))
        await started.wait()
        await graph.checkpointer.adelete_thread("t")
        go_on.set()
        await writing.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert cache.stats().entries == 1
        written.set()
        await auntil(lambda: cache.stats().entries == 0)


@pytest.mark.parametrize("durability", ["async", "exit"])
def test_what_tasks_inside_were_told_is_nobody_elses(durability: Any) -> None:
    """A task of LangGraph's in a node has its answer, the node fails after it and goes on later:
    the answer comes from the checkpoint, and what is made of it answers no other thread."""
    failures = [ValueError("transient")]

    @task
    def ask() -> str:
        return str(interrupt("sure?"))

    def node(state: State) -> State:
        said = ask().result()
        if failures:
            raise failures.pop()
        return {"answer": said}

    with MemoryCache() as cache:
        graph = build(node, cache, CachePolicy(key=["query"], version=1), InMemorySaver())
        config: Any = {"configurable": {"thread_id": "a"}}
        asked = graph.invoke({"query": "q"}, config, durability=durability)["__interrupt__"][0]
        with pytest.raises(ValueError, match="transient"):
            graph.invoke(Command(resume={asked.id: "yes"}), config, durability=durability)
        assert graph.invoke(None, config, durability=durability)["answer"] == "yes"
        assert "__interrupt__" in run(graph, "b")


def test_hidden_memory_is_not_replayed() -> None:
    """A graph that remembers its earlier runs, inside a node in which LangGraph does not see it."""

    class Memory(TypedDict, total=False):
        path: Annotated[list[str], operator.add]

    hidden = LangGraphStateGraph(Memory).add_node("add", lambda state: {"path": ["x"]})
    inner = {"graph": hidden.add_edge(START, "add").compile(checkpointer=True)}

    def node(state: State) -> State:
        return {"answer": str(len(inner["graph"].invoke({})["path"]))}

    with MemoryCache() as cache:
        graph = build(node, cache, CachePolicy(key=["query"], version=1), InMemorySaver())
        assert [run(graph, "t")["answer"] for _ in range(3)] == ["1", "2", "3"]
