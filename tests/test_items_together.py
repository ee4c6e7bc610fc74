"""``get_or_set_many`` of several callers at once: each key is computed by one of them."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from langchain_core.runnables import RunnableConfig
from langgraph._internal._runnable import RunnableCallable
from langgraph.graph import START
from typing_extensions import TypedDict

from langgraph_perf import DiskCache, MemoryCache, RedisCache, StateGraph, get_cache
from langgraph_perf._backend import Backend
from langgraph_perf._flight import FlightTable
from langgraph_perf.caches.base import Cache
from tests.redis_server import new_prefix
from tests.resources.helpers import auntil, until


class State(TypedDict, total=False):
    name: str
    keys: list[Any]
    values: list[Any]


class Sharing:
    """Callers ``a`` and ``b``, whose computations wait to be let go.

    Attributes:
        computed: what each of them was asked to compute, call by call.
        fails: who raises instead.
    """

    def __init__(self, caches: Sequence[Cache]) -> None:
        self.caches = dict(zip("ab", caches, strict=True))
        self.computed: list[tuple[str, list[Any]]] = []
        self.released = {name: threading.Event() for name in "ab"}
        self.fails: set[str] = set()
        self.threads = ThreadPoolExecutor(2)

    def graph(self, name: str) -> Any:
        def compute(keys: list[Any]) -> list[Any]:
            self.computed.append((name, keys))
            assert self.released[name].wait(30)
            if name in self.fails:
                raise ValueError(name)
            return [[key, name] for key in keys]

        async def acompute(keys: list[Any]) -> list[Any]:
            self.computed.append((name, keys))
            await auntil(self.released[name].is_set)
            if name in self.fails:
                raise ValueError(name)
            return [[key, name] for key in keys]

        def node(state: State, config: RunnableConfig) -> State:
            return {"values": get_cache("x", config).get_or_set_many(state["keys"], compute)}

        async def anode(state: State, config: RunnableConfig) -> State:
            items = get_cache("x", config)
            return {"values": await items.aget_or_set_many(state["keys"], acompute)}

        builder = StateGraph(State).add_node("node", RunnableCallable(node, anode))
        return builder.add_edge(START, "node").compile(cache=self.caches[name])

    def asks(self, name: str, *keys: Any) -> Future[Any]:
        return self.threads.submit(self.graph(name).invoke, {"keys": list(keys)})

    def aasks(self, name: str, *keys: Any) -> asyncio.Task[Any]:
        return asyncio.create_task(self.graph(name).ainvoke({"keys": list(keys)}))

    def has_begun(self, name: str) -> bool:
        return any(who == name for who, _ in self.computed)

    def waits(self, name: str) -> bool:
        """Whether ``name`` waits for somebody, in this process or in another one."""
        backend = Backend.of(self.caches[name])
        alone = self.caches["a"] is not self.caches["b"]
        return bool(len(backend.flights) if alone else backend.flights.waiting())

    def check_at_rest(self) -> None:
        """Nothing is led, waited for or leased any more."""
        for cache in self.caches.values():
            flights = Backend.of(cache).flights
            assert len(flights) == flights.waiting() == 0
            if isinstance(cache, DiskCache):
                for directory in Path(cache.directory).glob("**/*.db"):
                    with closing(sqlite3.connect(directory)) as con:
                        assert con.execute("SELECT * FROM Leases").fetchall() == []


@pytest.fixture(params=["one cache", "two processes", "two machines"])
def sharing(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Sharing]:
    """Two callers on one cache, on one directory, and on one server."""
    if request.param == "one cache":
        made: list[Cache] = [MemoryCache()] * 2
    elif request.param == "two processes":
        made = [DiskCache(tmp_path / "cache") for _ in range(2)]
    else:
        server, prefix = request.getfixturevalue("redis_server"), new_prefix()
        made = [RedisCache(server.url, prefix=prefix, timeout=30.0) for _ in range(2)]
    shared = Sharing(made)
    try:
        yield shared
        shared.check_at_rest()
    finally:
        for event in shared.released.values():
            event.set()
        shared.threads.shutdown()
        for cache in made:
            cache.close()


def test_what_others_compute_is_left_to_them(sharing: Sharing) -> None:
    """A caller computes what nobody else is at, and only then waits for the rest."""
    first = sharing.asks("a", 1, 2, 3)
    until(lambda: sharing.has_begun("a"))
    sharing.released["b"].set()
    second = sharing.asks("b", 2, 4, 3, 4)
    until(lambda: sharing.has_begun("b") and sharing.waits("b"))
    assert not second.done()
    sharing.released["a"].set()
    assert first.result(30)["values"] == [[1, "a"], [2, "a"], [3, "a"]]
    assert second.result(30)["values"] == [[2, "a"], [4, "b"], [3, "a"], [4, "b"]]
    assert sharing.computed == [("a", [1, 2, 3]), ("b", [4])]


async def test_awaiting_callers_too(sharing: Sharing) -> None:
    """The same with tasks; one that does not need to compute anything is answered as well."""
    first = sharing.aasks("a", 1, 2)
    await auntil(lambda: sharing.has_begun("a"))
    second = sharing.aasks("b", 2, 1)
    await auntil(lambda: sharing.waits("b"))
    sharing.released["a"].set()
    assert (await first)["values"] == [[1, "a"], [2, "a"]]
    assert (await second)["values"] == [[2, "a"], [1, "a"]]
    assert sharing.computed == [("a", [1, 2])]


def test_callers_that_wait_for_each_other(
    sharing: Sharing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each leads what the other one wants: both compute what they lead before they wait."""
    join, both_lead = FlightTable.join, threading.Barrier(2)
    led = threading.local()

    def joining(self: FlightTable, *args: Any, **kwargs: Any) -> Any:
        found = join(self, *args, **kwargs)
        if not hasattr(led, "one"):
            led.one = True
            both_lead.wait(30)
        return found

    if sharing.caches["a"] is sharing.caches["b"]:
        monkeypatch.setattr(FlightTable, "join", joining)
    for event in sharing.released.values():
        event.set()
    one, other = sharing.asks("a", 1, 2), sharing.asks("b", 2, 1)
    values = one.result(30)["values"], other.result(30)["values"]
    assert values[0] == values[1][::-1]
    assert sorted(key for _, keys in sharing.computed for key in keys) == [1, 2]


def test_what_another_one_owes_is_computed(sharing: Sharing) -> None:
    """A caller whose computation raises fails nobody else."""
    sharing.fails.add("a")
    first = sharing.asks("a", 1, 2, 3)
    until(lambda: sharing.has_begun("a"))
    sharing.released["b"].set()
    second = sharing.asks("b", 3, 4, 1)
    until(lambda: sharing.has_begun("b") and sharing.waits("b"))
    sharing.released["a"].set()
    with pytest.raises(ValueError, match="a"):
        first.result(30)
    assert second.result(30)["values"] == [[3, "b"], [4, "b"], [1, "b"]]
    assert sorted(key for who, keys in sharing.computed for key in keys if who == "b") == [1, 3, 4]


def test_a_failure_waits_for_nobody(sharing: Sharing) -> None:
    """Who fails does not wait for what others compute for it."""
    first = sharing.asks("a", 1)
    until(lambda: sharing.has_begun("a"))
    sharing.fails.add("b")
    sharing.released["b"].set()
    with pytest.raises(ValueError, match="b"):
        sharing.asks("b", 1, 2).result(30)
    assert not first.done()
    sharing.released["a"].set()
    assert first.result(30)["values"] == [[1, "a"]]


@pytest.mark.parametrize("when", ["computing", "waiting"])
async def test_a_cancelled_caller_leaves_nothing(sharing: Sharing, when: str) -> None:
    """One that computes hands over to those that wait for it; one that waits just leaves."""
    first = sharing.aasks("a", 1, 2)
    await auntil(lambda: sharing.has_begun("a"))
    second = sharing.aasks("b", 2, 3, 1)
    sharing.released["b"].set()
    await auntil(lambda: sharing.has_begun("b") and sharing.waits("b"))
    cancelled, other = (first, second) if when == "computing" else (second, first)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    sharing.released["a"].set()
    name = "b" if when == "computing" else "a"
    keys = [2, 3, 1] if when == "computing" else [1, 2]
    assert (await other)["values"] == [[key, name] for key in keys]


def test_what_has_no_key_is_computed_along(sharing: Sharing) -> None:
    """By whoever asks, in one call with the rest."""
    lock = threading.Lock()
    items: Callable[..., list[Any]] = get_cache("outside").get_or_set_many
    assert items([lock, 1], lambda keys: [type(key).__name__ for key in keys]) == ["lock", "int"]
    batches: list[int] = []

    def node(state: State) -> State:
        def compute(keys: list[Any]) -> list[Any]:
            batches.append(len(keys))
            return [str(type(key).__name__) for key in keys]

        return {"values": get_cache("x").get_or_set_many([lock, 1, lock], compute)}

    graph = StateGraph(State).add_node("node", node).add_edge(START, "node")
    compiled = graph.compile(cache=sharing.caches["a"])
    for _ in range(2):
        assert compiled.invoke({})["values"] == ["lock", "int", "lock"]
    assert batches == [3, 2]
