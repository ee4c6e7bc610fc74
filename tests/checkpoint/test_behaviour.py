"""Whatever is done with threads goes as in plain LangGraph, on every checkpointer.

Each scenario runs twice, on two threads, on LangGraph's own ``StateGraph``, and as often on ours
with one cache: the second time, ours answers from it. Results and histories are all the same.
"""

from __future__ import annotations

import itertools
import json
import operator
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
from langgraph.errors import GraphDrained, NodeError
from langgraph.graph import END, START
from langgraph.graph import StateGraph as LangGraphStateGraph
from langgraph.runtime import RunControl, Runtime
from langgraph.types import Command, RetryPolicy, Send, interrupt
from typing_extensions import TypedDict

from langgraph_perf import CachePolicy, MemoryCache, StateGraph
from tests.test_single_flight import auntil

from .histories import Driver, or_error, seen
from .savers import Make, drivers, place, savers
from .worker import perform

pytestmark = pytest.mark.no_cover  # what it covers others do, in less time

numbers = itertools.count()


class State(TypedDict, total=False):
    query: str
    extra: str
    path: Annotated[list[str], operator.add]


POLICY = CachePolicy(version=1)
QUERY = CachePolicy(version=1, key=["query"])


class Side:
    """One of the two graphs' ways, with one thread of its own.

    Attributes:
        ran: how often which node's body ran, on all threads of this way.
    """

    def __init__(self, driver: Driver, saver: Any, cache: Any, ran: Counter[str]) -> None:
        self.driver = driver
        self.saver = saver
        self.cache = cache
        self.ran = ran
        self.thread = f"{os.getpid()}-{next(numbers)}"

    def builder(self, schema: Any = State) -> Any:
        return (LangGraphStateGraph if self.cache is None else StateGraph)(schema)

    def policy(self, policy: CachePolicy = POLICY) -> dict[str, Any]:
        return {} if self.cache is None else {"cache_policy": policy}

    def node(self, name: str) -> Callable[[State], State]:
        """A body that says where it has been."""

        def body(state: State) -> State:
            self.ran[name] += 1
            return {"path": [f"{name}({state.get('query')})"]}

        return body

    def chain(self, *names: str) -> Any:
        """A builder of nodes one after the other, all cached."""
        builder, last = self.builder(), START
        for name in names:
            builder.add_node(name, self.node(name), **self.policy())
            builder.add_edge(last, name)
            last = name
        return builder

    def compile(self, builder: Any, **more: Any) -> Any:
        return builder.compile(checkpointer=self.saver, cache=self.cache, **more)

    def config(self, config: Any = None) -> Any:
        own = {"thread_id": self.thread}
        return {"configurable": {**((config or {}).get("configurable") or {}), **own}}

    def run(self, graph: Any, given: Any, config: Any = None, **more: Any) -> Any:
        """The result or the error of a run."""
        call = self.driver.call
        return or_error(lambda: seen(call(graph, "invoke", given, self.config(config), **more)))

    def state(self, graph: Any, **more: Any) -> Any:
        return self.driver.call(graph, "get_state", self.config(), **more)

    def update(self, graph: Any, update: Any, config: Any = None, **more: Any) -> Any:
        return self.driver.call(graph, "update_state", self.config(config), update, **more)

    def snapshots(self, graph: Any) -> list[Any]:
        return self.driver.listed(graph, "get_state_history", self.config())

    def history(self, graph: Any) -> Any:
        return [seen(snapshot) for snapshot in self.snapshots(graph)]


def asks(how: str) -> None:
    """Called by tests in which nodes ask humans."""
    if how == "async" and sys.version_info < (3, 11):
        pytest.skip("LangGraph's interrupt() needs Python 3.11 in async runs; ours does not")


class Place:
    """Where threads are kept."""

    def __init__(self, driver: Driver, make: Make) -> None:
        self.driver = driver
        self.make = make
        self.how = "sync" if driver.loop is None else "async"

    def same(self, scenario: Callable[[Side], Any], *, times: int = 2) -> tuple[Counter[str], ...]:
        """Run ``scenario`` on both; gives which bodies ran, without and with the cache."""
        ran: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
        cache = MemoryCache()
        try:
            sides = [
                [Side(self.driver, saver, kept, count) for _ in range(times)]
                for kept, count in ((None, ran[0]), (cache, ran[1]))
                for saver in [self.make()]
            ]
            plain, *others = [scenario(side) for side in (*sides[0], *sides[1])]
            for other in others:
                assert other == plain
        finally:
            cache.close()
        return ran


KINDS = [
    pytest.param(("sync", "memory"), id="memory"),
    pytest.param(("async", "memory"), id="async-memory"),
    pytest.param(("sync", "sqlite"), id="sqlite"),
    pytest.param(("async", "sqlite"), id="async-sqlite"),
    pytest.param(("sync", "postgres"), id="postgres"),
    pytest.param(("async", "postgres"), id="async-postgres"),
]


@pytest.fixture(params=KINDS)
def kept(request: pytest.FixtureRequest) -> Iterator[Place]:
    how, kind = request.param
    with drivers(how) as driver, savers(kind, driver, request) as make:
        yield Place(driver, make)


INPUT: Any = {"query": "q"}


# -- interrupts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["interrupt_before", "interrupt_after"])
def test_stops_before_and_after_nodes(kept: Place, when: str) -> None:
    """A run stops where it was told to, be the node before or after answered from the cache."""

    def scenario(side: Side) -> Any:
        graph = side.compile(side.chain("a", "b", "c"), **{when: ["b"]})
        stopped = side.run(graph, INPUT)
        waiting = side.state(graph).next
        return stopped, waiting, side.run(graph, None), side.history(graph)

    plain, ours = kept.same(scenario)
    assert (plain["b"], ours["b"]) == (2, 1)


def test_a_question(kept: Place) -> None:
    """A question stops the run each time it is asked, and its answer goes to who asked."""
    asks(kept.how)

    def scenario(side: Side) -> Any:
        def asking(state: State) -> State:
            side.ran["asking"] += 1
            return {"path": [interrupt(f"{state['query']}?")]}

        builder = side.chain("a")
        builder.add_node("asking", asking, **side.policy())
        builder.add_node("z", side.node("z"), **side.policy())
        builder.add_edge("a", "asking").add_edge("asking", "z")
        graph = side.compile(builder)
        asked = side.run(graph, INPUT)
        again = side.run(graph, None)
        return asked, again, side.run(graph, Command(resume="yes")), side.history(graph)

    plain, ours = kept.same(scenario)
    assert ours["asking"] == plain["asking"] == 6
    assert (plain["a"], ours["a"]) == (2, 1)


def test_several_questions(kept: Place) -> None:
    """Two questions of one node, in two such nodes at once, the last of them answered first."""
    asks(kept.how)

    def scenario(side: Side) -> Any:
        builder = side.builder()
        for name in ("left", "right"):

            def asking(state: State, name: str = name) -> State:
                return {"path": [interrupt(f"{name} 1?"), interrupt(f"{name} 2?")]}

            builder.add_node(name, asking, **side.policy())
            builder.add_edge(START, name)
        graph = side.compile(builder)
        told = [side.run(graph, INPUT), side.run(graph, Command(resume="unclear"))]
        for number in range(4):
            last = side.state(graph).interrupts[-1]
            told.append(side.run(graph, Command(resume={last.id: f"{last.value} {number}"})))
        return told, side.history(graph)

    kept.same(scenario)


@pytest.mark.parametrize("inside", [False, True])
def test_a_humans_answer_answers_nobody_else(kept: Place, inside: bool) -> None:
    """One human says yes; on another thread with the same question the other one is asked."""
    asks(kept.how)

    def scenario(side: Side) -> Any:
        def asking(state: State) -> State:
            return {"path": [interrupt("sure?")]}

        builder = side.builder()
        builder.add_node("asking", asking, **side.policy())
        builder.add_edge(START, "asking")
        if inside:
            outer = side.builder()
            outer.add_node("sub", builder.compile(), **side.policy())
            builder = outer.add_edge(START, "sub")
        graph = side.compile(builder)
        told = []
        for answer in ("yes", "no", "yes"):
            told.append(side.run(graph, INPUT))
            waiting = [i.id for i in side.state(graph).interrupts]
            told.append(side.run(graph, Command(resume={waiting[0]: answer})))
            side.thread += "-next"
        return told

    kept.same(scenario)


# -- durability, crashes, drains ------------------------------------------------------------------


@pytest.mark.parametrize("durability", ["sync", "async", "exit"])
def test_durability(kept: Place, durability: str) -> None:
    """In each mode the same checkpoints are written, of whole runs, stops and failures."""

    def scenario(side: Side) -> Any:
        def broken(state: State) -> State:
            raise ValueError("broken")

        builder = side.chain("a", "b")
        builder.add_node("broken", broken, **side.policy()).add_edge("b", "broken")
        graph = side.compile(builder, interrupt_after=["a"])
        runs = [side.run(graph, given, durability=durability) for given in (INPUT, None, None)]
        return runs, side.history(graph)

    plain, ours = kept.same(scenario)
    assert (plain["a"], ours["a"]) == (2, 1)


@pytest.mark.parametrize("method", ["put", "put_writes"])
def test_a_checkpointer_that_fails(
    kept: Place, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a node made before its checkpoint failed is not made again."""

    def scenario(side: Side) -> Any:
        graph = side.compile(side.chain("a", "b"))
        prefix = "" if side.driver.loop is None else "a"
        # what runs in threads and tasks of their own: the writes of the input, and those of ``a``
        written = {"input": threading.Event(), "a": threading.Event()}
        before = ["input", "a"] if method == "put" else ["input"]
        failing = False

        def source(called: str, args: Any) -> str | None:
            if called == "put":
                return "a" if args[2]["step"] == 1 else None
            return "a" if any(channel == "path" for channel, _ in args[1]) else "input"

        def fails(called: str, args: Any) -> bool:
            """From when what ``a`` returned should be kept, nothing is."""
            of_a = source(called, args) == "a"
            return failing or (of_a and (method == "put_writes" or called == "put"))

        def broken(called: str) -> Any:
            real = getattr(side.saver, f"{prefix}{called}")

            def fail() -> None:
                nonlocal failing
                failing = True
                raise OSError("no space left")

            def done(args: Any) -> None:
                if called == "put_writes":
                    written[source(called, args) or "input"].set()

            def sync(*args: Any, **kwargs: Any) -> Any:
                if fails(called, args):
                    assert all(written[name].wait(20) for name in before)
                    fail()
                result = real(*args, **kwargs)
                done(args)
                return result

            async def awaited(*args: Any, **kwargs: Any) -> Any:
                if fails(called, args):
                    await auntil(lambda: all(written[name].is_set() for name in before))
                    fail()
                result = await real(*args, **kwargs)
                done(args)
                return result

            return awaited if prefix else sync

        with monkeypatch.context() as patched:
            for called in ("put", "put_writes"):
                patched.setattr(side.saver, f"{prefix}{called}", broken(called))
            first = side.run(graph, INPUT, durability="sync")
        assert first == ("OSError", "no space left")
        second = side.run(graph, None, durability="sync")
        return second, side.history(graph)

    plain, ours = kept.same(scenario, times=1)
    # what is kept of a step without its checkpoint is found again without a cache, too
    assert (plain["a"], ours["a"]) == (1 if method == "put" else 2, 1)


@pytest.mark.parametrize(("how", "kind"), [param.values[0] for param in KINDS[2:]])
def test_another_process_goes_on(
    how: str, kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """A thread that waits is resumed by another process; its history is that of a plain graph."""
    asks(how)
    jobs = [_job(how, kind, tmp_path, request, cache) for cache in (False, True)]
    told = []
    for job in jobs:
        first = perform({**job, "acts": ["run"]})
        second = _in_a_process({**job, "acts": [{"answer": "yes"}]})
        told.append([first, second])
    assert told[0] == told[1]
    assert told[0][1][0][0]["end"] == "HELLO yes"


@pytest.mark.parametrize(("how", "kind"), [param.values[0] for param in KINDS[2:]])
def test_a_process_killed_before_the_checkpoint(
    how: str, kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """What the killed process had computed is on disk: the next one does not compute it again."""
    asks(how)
    told, ran = [], []
    for cache in (False, True):
        job = _job(how, kind, tmp_path, request, cache)
        _in_a_process({**job, "acts": ["run"], "die": "work"}, killed=True)
        told.append(perform({**job, "acts": ["go_on", {"answer": "yes"}]}))
        ran.append(Counter(Path(job["ran"]).read_text().split()))
    assert told[0] == told[1]
    assert told[0][0][1]["end"] == "HELLO yes"
    assert ran == [
        {"work": 2, "asking": 2, "end": 1},
        {"work": 1, "asking": 2, "end": 1},
    ]


def _job(
    how: str, kind: str, directory: Path, request: pytest.FixtureRequest, cache: bool
) -> dict[str, Any]:
    thread = f"{os.getpid()}-{next(numbers)}"
    return {
        "how": how,
        "saver": kind,
        "at": place(kind, request),
        "cache": str(directory / "cache") if cache else None,
        "ran": str(directory / f"ran-{thread}"),
        "thread": thread,
    }


def _in_a_process(job: dict[str, Any], *, killed: bool = False) -> Any:
    command = [sys.executable, "-m", "tests.checkpoint.worker", json.dumps(job)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=100)
    assert done.returncode == (-signal.SIGKILL if killed else 0), done.stderr
    return None if killed else json.loads(done.stdout)


def test_a_drained_run(kept: Place) -> None:
    """A run that is told to stop does so after the step it is in, and goes on later."""

    def scenario(side: Side) -> Any:
        def drains(state: State, runtime: Runtime) -> State:
            if runtime.control is not None and "drains" in state["query"]:
                runtime.control.request_drain("enough")
            return {"path": ["drains"]}

        builder = side.chain("a")
        builder.add_node("drains", drains)
        builder.add_node("z", side.node("z"), **side.policy())
        builder.add_edge("a", "drains").add_edge("drains", "z")
        graph = side.compile(builder)
        told = []
        for query in ("drains", "runs"):
            told.append(side.run(graph, {"query": query}))
            told.append(side.run(graph, None))
        drained = RunControl()
        drained.request_drain("at once")
        told.append(side.run(graph, INPUT, control=drained))
        told.append(side.run(graph, None, control=RunControl()))
        assert told[0] == (GraphDrained.__name__, "Graph drained: enough")
        return told, side.history(graph)

    plain, ours = kept.same(scenario)
    assert plain["z"] > ours["z"]


# -- failures -------------------------------------------------------------------------------------


def test_error_handlers(kept: Place) -> None:
    """A node that fails is handled each time, and what its handler returns is nobody's result."""

    def scenario(side: Side) -> Any:
        def broken(state: State) -> State:
            side.ran["broken"] += 1
            raise ValueError(f"broken for {state['query']}")

        def handler(state: State, error: NodeError) -> State:
            side.ran["handler"] += 1
            return {"path": [f"handled {error.error}"]}

        builder = side.chain("a")
        builder.add_node("broken", broken, error_handler=handler, **side.policy())
        builder.add_node("z", side.node("z"), **side.policy())
        builder.add_edge("a", "broken").add_edge("broken", "z")
        graph = side.compile(builder)
        return side.run(graph, INPUT), side.run(graph, None), side.history(graph)

    plain, ours = kept.same(scenario)
    assert ours["broken"] == plain["broken"] == ours["handler"] == plain["handler"] == 2


def test_retries(kept: Place) -> None:
    """A node is tried again within its step, and its failures are in no history."""

    def scenario(side: Side) -> Any:
        def flaky(state: State) -> State:
            side.ran["flaky"] += 1
            if side.ran["flaky"] % 2:
                raise ValueError("try again")
            return {"path": ["flaky"]}

        retry = RetryPolicy(initial_interval=0, jitter=False, retry_on=ValueError)
        builder = side.chain("a")
        builder.add_node("flaky", flaky, retry_policy=retry, **side.policy())
        builder.add_edge("a", "flaky")
        graph = side.compile(builder)
        return side.run(graph, INPUT), side.history(graph)

    plain, ours = kept.same(scenario)
    assert (plain["flaky"], ours["flaky"]) == (4, 2)


# -- time travel ----------------------------------------------------------------------------------


def test_replays_from_each_checkpoint(kept: Place) -> None:
    """Going on from any checkpoint of the past gives what it gave, and forks the thread alike."""

    def scenario(side: Side) -> Any:
        graph = side.compile(side.chain("a", "b", "c"))
        told = [side.run(graph, INPUT)]
        for snapshot in side.snapshots(graph):
            told.append(side.run(graph, None, snapshot.config))
            told.append(side.run(graph, {"query": "other"}, snapshot.config))
        return told, side.history(graph)

    plain, ours = kept.same(scenario)
    assert plain["c"] > ours["c"] > 0


def test_an_edited_state(kept: Place) -> None:
    """What a human edits while the run waits is what it goes on with, and who wrote it counts."""

    def scenario(side: Side) -> Any:
        told = []
        for as_node in (None, "a", "b", START):
            graph = side.compile(side.chain("a", "b", "c"), interrupt_before=["c"])
            told.append(side.run(graph, INPUT))
            side.update(graph, {"query": f"by {as_node}"}, as_node=as_node)
            told += [side.run(graph, None), side.run(graph, None), side.history(graph)]
            side.thread += "-next"
        return told

    plain, ours = kept.same(scenario)
    assert plain["c"] > ours["c"] > 1


def test_two_branches_of_one_checkpoint(kept: Place) -> None:
    """A result recorded on one branch answers only for the state it saw, which routes anew."""

    def scenario(side: Side) -> Any:
        def reads(state: State) -> State:
            side.ran["reads"] += 1
            return {"path": [f"reads {state['query']}"]}

        builder = side.chain("a")
        builder.add_node("reads", reads, **side.policy(QUERY))
        for name in ("left", "right"):
            builder.add_node(name, side.node(name), **side.policy())
        builder.add_edge("a", "reads")
        builder.add_conditional_edges(
            "reads", lambda state: state.get("extra") or END, ["left", "right", END]
        )
        graph = side.compile(builder, interrupt_before=["reads"])
        side.run(graph, INPUT)
        past = side.state(graph).config
        told = []
        for query, extra in (
            ("one", "left"),
            ("two", "right"),
            ("one", "right"),
            ("two", "left"),
            ("one", "left"),
        ):
            edited = side.update(graph, {"query": query, "extra": extra}, past)
            told.append(side.run(graph, None, edited))
        assert [run["path"][1] for run in told] == [
            f"reads {query}" for query in ("one", "two", "one", "two", "one")
        ]
        return told, side.history(graph)

    plain, ours = kept.same(scenario)
    assert (plain["reads"], ours["reads"]) == (10, 2)


# -- subgraphs ------------------------------------------------------------------------------------


def test_the_state_of_a_subgraph_and_its_time_travel(kept: Place) -> None:
    """A subgraph that waits shows its state, takes edits and goes on from its own checkpoints."""
    asks(kept.how)

    def scenario(side: Side) -> Any:
        def asking(state: State) -> State:
            return {"path": [f"{state['query']}: {interrupt('sure?')}"]}

        inner = side.chain("first")
        inner.add_node("asking", asking, **side.policy())
        inner.add_edge("first", "asking")
        builder = side.builder()
        builder.add_node("sub", inner.compile())
        builder.add_node("z", side.node("z"), **side.policy())
        graph = side.compile(builder.add_edge(START, "sub").add_edge("sub", "z"))
        told = [side.run(graph, INPUT)]
        waiting = side.state(graph, subgraphs=True)
        told.append(seen(waiting))
        inside = waiting.tasks[0].state.config
        edited = side.update(graph, {"query": "edited"}, inside)
        told.append(seen(side.state(graph, subgraphs=True)))
        told.append(side.run(graph, Command(resume="yes"), edited))
        past = side.driver.listed(graph, "get_state_history", inside)
        for snapshot in past:
            told.append(side.run(graph, None, snapshot.config))
            told.append(side.run(graph, Command(resume="later")))
        return told, len(past), side.history(graph)

    plain, ours = kept.same(scenario)
    assert plain["first"] > ours["first"] > 0


@pytest.mark.parametrize("checkpointer", [None, True, False])
def test_subgraphs_that_remember_or_do_not(kept: Place, checkpointer: bool | None) -> None:
    """A subgraph keeps a memory of its own, though its nodes are answered from the cache."""

    def scenario(side: Side) -> Any:
        class Memory(TypedDict, total=False):
            query: str
            path: Annotated[list[str], operator.add]
            visits: Annotated[int, operator.add]

        def counts(state: Memory) -> Memory:
            side.ran["counts"] += 1
            return {"visits": 1, "query": f"{state['query']} {state.get('visits', 0)}"}

        inner = side.builder(Memory)
        inner.add_node("counts", counts, **side.policy())
        sub = inner.add_edge(START, "counts").compile(checkpointer=checkpointer)
        builder = side.builder()
        builder.add_node("sub", sub)
        graph = side.compile(builder.add_edge(START, "sub"))
        runs = [side.run(graph, INPUT, durability="async") for _ in range(3)]
        assert [run["query"] for run in runs] == (
            ["q 0", "q 1", "q 2"] if checkpointer else ["q 0"] * 3
        )
        return runs, side.history(graph)

    plain, ours = kept.same(scenario)
    assert (plain["counts"], ours["counts"]) == (6, 3 if checkpointer else 1)


def test_a_cached_node_that_is_a_graph_with_a_memory(kept: Place) -> None:
    """A node whose result depends on what its graph remembers is not answered from the cache."""

    def scenario(side: Side) -> Any:
        class Memory(TypedDict, total=False):
            query: str
            path: Annotated[list[str], operator.add]
            visits: Annotated[int, operator.add]

        def counts(state: Memory) -> Memory:
            return {"visits": 1, "path": [f"visit {state.get('visits', 0)}"]}

        class Path(TypedDict, total=False):
            path: Annotated[list[str], operator.add]

        builder = LangGraphStateGraph(Memory, output_schema=Path)
        sub = builder.add_node("counts", counts).add_edge(START, "counts")
        outer = side.builder()
        outer.add_node("sub", sub.compile(checkpointer=True), **side.policy(QUERY))
        graph = side.compile(outer.add_edge(START, "sub"))
        return [side.run(graph, {"query": "q", "path": []}) for _ in range(3)]

    kept.same(scenario)


def test_equal_sends(kept: Place) -> None:
    """Equal tasks of one step each have their results in the history, whoever ran."""

    def scenario(side: Side) -> Any:
        builder = side.chain("a")
        builder.add_node("leaf", side.node("leaf"), **side.policy())
        builder.add_conditional_edges(
            "a", lambda state: [Send("leaf", {"query": "same"})] * 3, ["leaf"]
        )
        graph = side.compile(builder)
        return side.run(graph, INPUT), side.history(graph)

    plain, ours = kept.same(scenario)
    assert (plain["leaf"], ours["leaf"]) == (6, 1)
