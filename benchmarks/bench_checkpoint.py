"""Checkpointers, side by side with LangGraph's own.

On a private PostgreSQL server that waits for its disk as any server in production does, or in a
database of its own on the one that ``POSTGRES_DSN`` names.

``python -m benchmarks.bench_checkpoint [--json FILE] [--quick] [--only NAME ...]``
"""

from __future__ import annotations

import asyncio
import operator
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from itertools import count
from secrets import token_hex
from statistics import median
from typing import Annotated, Any
from unittest.mock import patch

import psycopg
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
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
    event_loop,
    program,
    result,
)
from examples.knowledge_base import databases
from langgraph_perf import Pool
from langgraph_perf._pooled_saver import PooledCheckpointer

THOROUGH = Effort(rounds=41)
QUICK = Effort(rounds=9, size=0.25)

CONNECTIONS = 8
THREADS = 32
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


ROWS: dict[str, Callable[[Effort], Iterator[Result]]] = {
    "pooled": pooled,
}

PACKAGES = (
    "langgraph-perf",
    "langgraph",
    "langgraph-checkpoint-postgres",
    "psycopg",
    "psycopg-pool",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the JSON file."""
    return program("bench_checkpoint", __doc__, ROWS, PACKAGES, THOROUGH, QUICK, argv)


if __name__ == "__main__":
    sys.exit(main())
