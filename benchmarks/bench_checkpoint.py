"""Checkpointers, side by side with LangGraph's own, and what threads own in the cache.

The pools run on a private PostgreSQL server that waits for its disk as any server in production
does, or in a database of its own on the one that ``POSTGRES_DSN`` names; what threads own is also
forgotten in Redis, on a private server or on the one that ``REDIS_URL`` names.

``python -m benchmarks.bench_checkpoint [--json FILE] [--quick] [--only NAME ...]``
"""

from __future__ import annotations

import asyncio
import operator
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from itertools import count
from secrets import token_hex
from statistics import median
from types import FrameType
from typing import Annotated, Any, Literal
from unittest.mock import patch

import psycopg
import redis
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.graph import START, StateGraph
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool, ConnectionPool
from typing_extensions import TypedDict

from benchmarks._harness import (
    Batch,
    Comparison,
    Effort,
    Result,
    compare,
    each,
    event_loop,
    program,
    result,
)
from benchmarks.bench_redis import server as redis_server
from examples.knowledge_base import databases
from langgraph_perf import CachePolicy, DiskCache, MemoryCache, Pool, RedisCache
from langgraph_perf import StateGraph as CachedStateGraph
from langgraph_perf._backend import owner_tag
from langgraph_perf._owner import thread_namespace
from langgraph_perf._pooled_saver import PooledCheckpointer
from langgraph_perf.caches.base import Cache, Entry

THOROUGH = Effort(rounds=41)
QUICK = Effort(rounds=9, size=0.25)

CONNECTIONS = 8
THREADS = 32
THREADS_KEPT, ENTRIES = 10_000, 20
"""Threads that own something in a cache, and how many entries each."""
THREADS_KEPT_QUICKLY, THREADS_FEW = 200, 100
FASTER = 1.5
"""How many times the invokes per second of the alternative there shall be at least."""

SETTINGS: Any = {"autocommit": True, "prepare_threshold": 0, "row_factory": dict_row}


@contextmanager
def server() -> Iterator[str]:
    """The DSN of a database with the tables of checkpoints, all of them empty."""
    with ExitStack() as stack:
        given = os.environ.get("POSTGRES_DSN")
        if given is None:
            # the last one counts: the example's own server is in a hurry, and would lose
            # checkpoints when the machine goes down
            careful = databases.UNTIL_EOF.replace('"$@"', '"$@" -c fsync=on')
            with patch.object(databases, "UNTIL_EOF", careful):
                given = stack.enter_context(databases.private_postgres())
        name = f"langgraph_perf_{token_hex(4)}"
        admin = stack.enter_context(psycopg.connect(given, autocommit=True))
        admin.execute(f"CREATE DATABASE {name}")
        stack.callback(admin.execute, f"DROP DATABASE {name} WITH (FORCE)")
        dsn = psycopg.conninfo.make_conninfo(given, dbname=name)
        with PostgresSaver.from_conn_string(dsn) as saver:
            saver.setup()
        yield dsn


def slower(dsn: str) -> str:
    """``dsn`` as if each commit took the disk a millisecond longer, as across a network."""
    return psycopg.conninfo.make_conninfo(dsn, options="-c commit_delay=1000 -c commit_siblings=0")


# -- the graph -------------------------------------------------------------------------------------


class State(TypedDict):
    log: Annotated[list[str], operator.add]


def three_nodes(checkpointer: Any, *, awaited: bool) -> Any:
    """A graph of three nodes in a row that do nothing, so that only checkpoints are measured."""

    def work(state: State) -> dict[str, Any]:
        return {"log": ["done"]}

    async def awork(state: State) -> dict[str, Any]:
        return work(state)

    builder = StateGraph(State)
    for before, name in ((START, "a"), ("a", "b"), ("b", "c")):
        builder.add_node(name, awork if awaited else work)
        builder.add_edge(before, name)
    return builder.compile(checkpointer=checkpointer)


_numbers = count()


def _question() -> tuple[State, Any]:
    """A call on a thread of its own."""
    return {"log": []}, {"configurable": {"thread_id": str(next(_numbers))}}


# -- pooled ----------------------------------------------------------------------------------------


def pooled(effort: Effort) -> Iterator[Result]:
    """Threads of a graph at once, each operation on a connection of its own or behind one lock."""
    threads = effort.scaled(THREADS)
    with server() as dsn:
        # a connection that is one saver's own can be pipelined; those of a pool cannot
        for row, where, pipeline, target in (
            ("ainvoke, pipelined", dsn, True, 1 / FASTER),
            ("ainvoke", dsn, False, None),
            ("ainvoke, pipelined, slower disk", slower(dsn), True, None),
        ):
            compared = _async(where, threads, effort, pipeline)
            yield _pooled_result(row, "AsyncPostgresSaver", threads, compared, target)
        compared = _sync(dsn, threads, effort)
        yield _pooled_result("invoke", "PostgresSaver", threads, compared, None)


def _pooled_result(
    row: str,
    alternative: str,
    threads: int,
    compared: Comparison,
    target: float | None,
) -> Result:
    speeds = {
        side: threads / median(seconds)
        for side, seconds in (("ours", compared.ours), ("theirs", compared.theirs))
    }
    return result(
        f"{threads} threads, {row}",
        f"{alternative} on a pool of {CONNECTIONS}",
        compared,
        target=target,
        note=f"{1 / median(compared.ratios):.2f} times as many invokes per second: "
        + " | ".join(f"{side} {speed:.0f}" for side, speed in speeds.items()),
        details={"invokes per second": speeds, "connections": CONNECTIONS, "threads": threads},
    )


def _async(dsn: str, threads: int, effort: Effort, pipeline: bool) -> Comparison:
    opened: dict[AsyncPostgresSaver, AsyncExitStack] = {}

    async def create() -> AsyncPostgresSaver:
        stack = AsyncExitStack()
        saver = await stack.enter_async_context(
            AsyncPostgresSaver.from_conn_string(dsn, pipeline=pipeline)
        )
        opened[saver] = stack
        return saver

    async def close(saver: AsyncPostgresSaver) -> None:
        await opened.pop(saver).aclose()

    @asynccontextmanager
    async def ours() -> AsyncIterator[PooledCheckpointer]:
        checkpointer = PooledCheckpointer(Pool(create, max_size=CONNECTIONS, close=close))
        yield checkpointer
        await checkpointer.aclose()

    @asynccontextmanager
    async def theirs() -> AsyncIterator[AsyncPostgresSaver]:
        async with AsyncConnectionPool(
            dsn, min_size=CONNECTIONS, max_size=CONNECTIONS, kwargs=SETTINGS
        ) as pool:
            yield AsyncPostgresSaver(pool)  # type: ignore[arg-type]

    with event_loop() as loop:

        def batch(graph: Any) -> Batch:
            async def wave() -> None:
                await asyncio.gather(*(graph.ainvoke(*_question()) for _ in range(threads)))

            return lambda calls: [loop.run_until_complete(wave()) for _ in range(calls)]

        stack = AsyncExitStack()
        sides = [
            three_nodes(loop.run_until_complete(stack.enter_async_context(side())), awaited=True)
            for side in (ours, theirs)
        ]
        try:
            return compare(batch(sides[0]), batch(sides[1]), effort)
        finally:
            loop.run_until_complete(stack.aclose())


def _sync(dsn: str, threads: int, effort: Effort) -> Comparison:
    def create() -> PostgresSaver:
        return PostgresSaver(psycopg.Connection.connect(dsn, **SETTINGS))

    def close(saver: Any) -> None:
        saver.conn.close()

    with ExitStack() as stack:
        ours = PooledCheckpointer(Pool(create, max_size=CONNECTIONS, close=close))
        stack.callback(ours.close)
        pool: Any = stack.enter_context(
            ConnectionPool(dsn, min_size=CONNECTIONS, max_size=CONNECTIONS, kwargs=SETTINGS)
        )
        workers = stack.enter_context(ThreadPoolExecutor(threads))

        def batch(graph: Any) -> Batch:
            def one(_: int) -> None:
                graph.invoke(*_question())

            return lambda calls: [list(workers.map(one, range(threads))) for _ in range(calls)]

        sides = [three_nodes(saver, awaited=False) for saver in (ours, PostgresSaver(pool))]
        return compare(batch(sides[0]), batch(sides[1]), effort)


# -- thread-scope ----------------------------------------------------------------------------------


def thread_scope(effort: Effort) -> Iterator[Result]:
    """Three cached nodes whose results are their thread's, or everybody's; and the thread's end."""
    # an invoke waits for the disk several times, now longer, now shorter
    longer = replace(effort, rounds=2 * effort.rounds, batch_seconds=5 * effort.batch_seconds)
    with _cached_nodes("thread") as ours, _cached_nodes("global") as theirs:
        for row, question, config in (
            ("invoke, cold, a new thread", None, None),
            ("invoke, cold, the same thread", None, {"configurable": {"thread_id": "same"}}),
            ("invoke, warm", {"question": "?"}, {"configurable": {"thread_id": "same"}}),
        ):

            def ask(graph: Any, question: Any = question, config: Any = config) -> None:
                graph.invoke(question or {"question": next(_numbers)}, config or _question()[1])

            times = compare(each(lambda: ask(ours)), each(lambda: ask(theirs)), longer)
            yield result(row, 'scope="global"', times, target=1.05)
    for entries in (3, 0):
        yield _deletion(entries, effort)


class Cached(TypedDict, total=False):
    question: int | str
    a: str
    b: str
    c: str


@contextmanager
def _cached_nodes(scope: Literal["thread", "global"] | None) -> Iterator[Any]:
    """Three nodes in a row whose results are cached on disk, with checkpoints in a file."""
    builder = CachedStateGraph(Cached)
    for before, name in ((START, "a"), ("a", "b"), ("b", "c")):
        policy = CachePolicy(key=["question"], scope=scope) if scope else None
        builder.add_node(name, _node(name), cache_policy=policy)
        builder.add_edge(before, name)
    with (
        tempfile.TemporaryDirectory() as directory,
        SqliteSaver.from_conn_string(os.path.join(directory, "checkpoints.db")) as saver,
        ExitStack() as stack,
    ):
        cache = stack.enter_context(DiskCache(directory)) if scope else None
        yield builder.compile(checkpointer=saver, cache=cache)


def _node(name: str) -> Callable[[Cached], Any]:
    return lambda state: {name: f"an answer to {state['question']}"}


def _deletion(entries: int, effort: Effort) -> Result:
    """``delete_thread`` of a thread that has checkpoints and so many entries."""
    seconds: tuple[list[float], list[float]] = ([], [])
    bypass = {} if entries else {"cache_control": {"mode": "bypass"}}
    with _cached_nodes("thread") as ours, _cached_nodes(None) as theirs:
        for number in range(effort.rounds + 1):
            for side in (0, 1) if number % 2 else (1, 0):
                graph, thread = (ours, theirs)[side], f"thread {number}"
                graph.invoke({"question": "?"}, {"configurable": {"thread_id": thread, **bypass}})
                started = time.perf_counter()
                graph.checkpointer.delete_thread(thread)
                if number:  # the first one warms up
                    seconds[side].append(time.perf_counter() - started)
        if left := ours.cache.stats().entries:
            raise RuntimeError(f"{left} entries are left of threads that were deleted")
    return result(f"delete_thread, {entries} entries", "no cache", Comparison(*seconds))


# -- forget ----------------------------------------------------------------------------------------


def forget(effort: Effort) -> Iterator[Result]:
    """Forgetting one of many threads, against one of few: what the cache does for it, and how long
    it takes. The first may not depend on what others own."""
    threads = THREADS_KEPT if effort.size >= 1 else THREADS_KEPT_QUICKLY
    with redis_server() as url, tempfile.TemporaryDirectory() as directory:
        for name, make, count_in in (
            ("MemoryCache", lambda side: MemoryCache(2**30), _bytecodes),
            ("DiskCache", lambda side: DiskCache(os.path.join(directory, side)), _statements),
            (
                "RedisCache",
                lambda side: RedisCache(url, prefix=f"{side}-{token_hex(4)}"),
                lambda cache: _commands(url),
            ),
        ):
            with make("many") as many, make("few") as few:
                # in turns, and one that is thrown away first
                forgetting = [_Forgetting(many, threads), _Forgetting(few, THREADS_FEW)]
                counts = [one.counted(count_in) for one in forgetting]
                for number in range(effort.at_most(THREADS_FEW - 2)):
                    for side in (0, 1) if number % 2 else (1, 0):
                        forgetting[side].timed()
                for cache in (many, few):
                    cache.clear()
            more = {kind: counts[0][kind] - counts[1][kind] for kind in counts[0]}
            yield result(
                f"{name}: forgetting 1 of {threads:,} threads",
                f"1 of {THREADS_FEW}",
                Comparison(*(one.seconds for one in forgetting)),
                target=0,
                measured=sum(map(abs, more.values())),
                measure="operations more or less",
                note=" | ".join(
                    f"{kind} {number:,} against {counts[1][kind]:,}"
                    for kind, number in counts[0].items()
                ),
                details={
                    "threads": threads,
                    "entries": ENTRIES,
                    "many": counts[0],
                    "few": counts[1],
                },
            )


Counted = dict[str, int]


class _Forgetting:
    """A graph whose cache holds ``ENTRIES`` entries of each of some threads.

    Attributes:
        seconds: what forgetting one took, each time.
    """

    def __init__(self, cache: Cache, threads: int) -> None:
        builder = CachedStateGraph(Cached)
        builder.add_node("a", _node("a"), cache_policy=CachePolicy(scope="thread"))
        self._graph: Any = builder.add_edge(START, "a").compile(cache=cache)
        self._cache = cache
        # names of its own: digests of names are remembered, and those of another side would be
        names = [f"{token_hex(4)} {number}" for number in range(threads)]
        self._threads = iter(names)
        self.seconds: list[float] = []
        now = time.time()
        for name in names:
            namespace = thread_namespace(name)
            tag = owner_tag(namespace)
            deps = ((tag, cache.tag_tokens([tag])[0]),)
            for number in range(ENTRIES):
                cache.write((namespace, f"{number:032x}"), Entry(b"x" * 100, now, None, deps))
        if evicted := cache.stats().evicted:
            raise RuntimeError(f"{evicted} of {threads * ENTRIES} entries had no room")

    def timed(self) -> None:
        """Forget the next thread."""
        thread = next(self._threads)
        started = time.perf_counter()
        self._graph.perf.forget_thread(thread)
        self.seconds.append(time.perf_counter() - started)

    def counted(self, count_in: Callable[[Any], Any]) -> Counted:
        """Forget two threads; what was done for the second."""
        self._graph.perf.forget_thread(next(self._threads))
        thread = next(self._threads)
        with count_in(self._cache) as done:
            self._graph.perf.forget_thread(thread)
        found: Counted = done
        return found


@contextmanager
def _bytecodes(cache: MemoryCache) -> Iterator[Counted]:
    """How many instructions the interpreter executes, which loops over others' entries would
    show, and how many entries go."""
    done = {"bytecodes": 0, "entries": cache.stats().entries or 0}

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        frame.f_trace_opcodes = True
        done["bytecodes"] += event == "opcode"
        return trace

    before = sys.gettrace()
    # Python 3.12 only has these events if some frame asked for them before
    sys._getframe().f_trace_opcodes = True
    sys.settrace(trace)
    try:
        yield done
    finally:
        sys.settrace(before)
    done["entries"] -= cache.stats().entries or 0


@contextmanager
def _statements(cache: DiskCache) -> Iterator[Counted]:
    """How many SQL statements are executed, triggers' included, how often SQLite turns in a loop,
    which a look at others' rows would show, and how many entries go."""
    done = {"statements": 0, "turns": 0, "entries": cache.stats().entries or 0}

    def stated(statement: str) -> None:
        done["statements"] += 1

    def turned() -> int:
        done["turns"] += 1
        return 0

    connections = [handle.con for handle in cache._db._idle]
    for connection in connections:
        connection.set_trace_callback(stated)
        connection.set_progress_handler(turned, 1)
    yield done
    for connection in connections:
        connection.set_trace_callback(None)
        connection.set_progress_handler(None, 0)
    done["entries"] -= cache.stats().entries or 0


@contextmanager
def _commands(url: str) -> Iterator[Counted]:
    """How many commands the server carries out, those in scripts included, and how many keys
    go."""
    with redis.Redis.from_url(url) as client:

        def calls() -> Mapping[str, int]:
            stats: Any = client.info("commandstats")
            return {name: said["calls"] for name, said in stats.items()}

        done: Counted = {}
        keys, before = client.dbsize(), calls()
        yield done
        after, left = calls(), client.dbsize()
        ours = {
            name: number - before.get(name, 0)
            for name, number in after.items()
            if name.partition("_")[2] not in ("info", "dbsize")
        }
        done.update(commands=sum(ours.values()), keys=keys - left)


ROWS: dict[str, Callable[[Effort], Iterator[Result]]] = {
    "pooled": pooled,
    "thread-scope": thread_scope,
    "forget": forget,
}

PACKAGES = (
    "langgraph-perf",
    "langgraph",
    "langgraph-checkpoint-postgres",
    "langgraph-checkpoint-sqlite",
    "psycopg",
    "psycopg-pool",
    "redis",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the JSON file."""
    return program("bench_checkpoint", __doc__, ROWS, PACKAGES, THOROUGH, QUICK, argv)


if __name__ == "__main__":
    sys.exit(main())
