"""``PooledCheckpointer``: on real PostgreSQL, on SQLite files, and on savers that misbehave."""

from __future__ import annotations

import asyncio
import functools
import operator
import os
import random
import signal
import sqlite3
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from secrets import token_hex
from typing import Annotated, Any

import psycopg
import pytest
from langgraph.checkpoint.base import BaseCheckpointSaver, CheckpointTuple, empty_checkpoint
from langgraph.checkpoint.conformance import checkpointer_test, validate
from langgraph.checkpoint.conformance.capabilities import DetectedCapabilities
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.graph import START, StateGraph
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool, ConnectionPool
from typing_extensions import TypedDict

from langgraph_perf import (
    ConfigurationError,
    FromContext,
    Keyed,
    Pool,
    PoolClosed,
    PoolTimeout,
    Shared,
)
from langgraph_perf._pooled_saver import OPERATIONS, PooledCheckpointer
from langgraph_perf.resources import _core

from ..resources.helpers import auntil, check_at_rest, passes, until

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # examples are not installed

from examples.knowledge_base.databases import private_postgres

SETTINGS: Any = {"autocommit": True, "prepare_threshold": 0, "row_factory": dict_row}
THREADS = 32
AT_ONCE = 8


# -- what is pooled --------------------------------------------------------------------------------


@pytest.fixture
def dsn(postgres: str) -> Iterator[str]:
    """A database of the test's own."""
    name = f"checkpoints_{token_hex(4)}"
    with psycopg.connect(postgres, autocommit=True) as server:
        server.execute(f"CREATE DATABASE {name}")
        yield psycopg.conninfo.make_conninfo(postgres, dbname=name)
        server.execute(f"DROP DATABASE {name} WITH (FORCE)")


def close(saver: Any) -> None:
    saver.conn.close()


async def aclose(saver: Any) -> None:
    await saver.conn.close()


def postgres_pool(dsn: str, kind: type[PostgresSaver] = PostgresSaver, **options: Any) -> Pool[Any]:
    return Pool(
        lambda: kind(psycopg.Connection.connect(dsn, **SETTINGS)),
        **{"max_size": AT_ONCE, "close": close, **options},
    )


def apostgres_pool(
    dsn: str, kind: type[AsyncPostgresSaver] = AsyncPostgresSaver, **options: Any
) -> Pool[Any]:
    async def create() -> AsyncPostgresSaver:
        return kind(await psycopg.AsyncConnection.connect(dsn, **SETTINGS))

    return Pool(create, **{"max_size": AT_ONCE, "close": aclose, **options})


def pipelined_pool(dsn: str, **options: Any) -> Pool[Any]:
    """Savers that keep their connections in pipeline mode, as those on a pool cannot."""
    with PostgresSaver.from_conn_string(dsn) as saver:
        saver.setup()  # which makes an index in a way that cannot be pipelined
    opened: dict[AsyncPostgresSaver, AsyncExitStack] = {}

    async def create() -> AsyncPostgresSaver:
        stack = AsyncExitStack()
        saver = await stack.enter_async_context(
            AsyncPostgresSaver.from_conn_string(dsn, pipeline=True)
        )
        opened[saver] = stack
        return saver

    async def close(saver: AsyncPostgresSaver) -> None:
        await opened.pop(saver).aclose()

    return Pool(create, **{"max_size": AT_ONCE, "close": close, **options})


def sqlite_pool(path: Path) -> Pool[Any]:
    def create() -> SqliteSaver:
        return SqliteSaver(sqlite3.connect(path, check_same_thread=False, timeout=60))

    return Pool(create, max_size=AT_ONCE, close=close)


def asqlite_pool(path: Path) -> Pool[Any]:
    async def create() -> AsyncSqliteSaver:
        import aiosqlite

        return AsyncSqliteSaver(await aiosqlite.connect(path, timeout=60))

    return Pool(create, max_size=AT_ONCE, close=aclose)


@contextmanager
def pooled(resource: Any, **options: Any) -> Iterator[PooledCheckpointer]:
    """A checkpointer whose resource is checked for leftovers, and closed, after use."""
    checkpointer = PooledCheckpointer(resource, **options)
    checkpointer.setup()
    yield checkpointer
    check_at_rest(resource)
    checkpointer.close()


@asynccontextmanager
async def apooled(resource: Any, **options: Any) -> AsyncIterator[PooledCheckpointer]:
    """The same for async savers."""
    checkpointer = PooledCheckpointer(resource, **options)
    await checkpointer.asetup()
    yield checkpointer
    await auntil(lambda: not (resource.stats().loading or resource.stats().closing))
    check_at_rest(resource)
    await checkpointer.aclose()


OTHERS = (
    "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() "
    "AND backend_type = 'client backend'"  # the server cleans up in any database, at any time
)


def connections(dsn: str) -> int:
    """How many connections others have."""
    with psycopg.connect(dsn) as connection:
        return len(connection.execute(f"SELECT pid {OTHERS}").fetchall())


def drop_connections(dsn: str) -> int:
    """End the connections of everybody else, as a server does that restarts; how many."""
    with psycopg.connect(dsn) as connection:
        ended = connection.execute(f"SELECT pg_terminate_backend(pid, 20000) {OTHERS}").fetchall()
    return len(ended)


# -- what uses it ----------------------------------------------------------------------------------


class State(TypedDict):
    log: Annotated[list[str], operator.add]


def graph(checkpointer: Any) -> Any:
    """Three nodes in a row."""
    builder = StateGraph(State)
    for name in "abc":
        builder.add_node(name, lambda state, name=name: {"log": [name]})
    builder.add_edge(START, "a")
    builder.add_edge("a", "b")
    builder.add_edge("b", "c")
    return builder.compile(checkpointer=checkpointer)


def config(thread: object, **more: Any) -> Any:
    return {"configurable": {"thread_id": str(thread), "checkpoint_ns": "", **more}}


def put(saver: Any, thread: object = "t") -> Any:
    return saver.put(config(thread), empty_checkpoint(), {"step": 1}, {})


async def aput(saver: Any, thread: object = "t") -> Any:
    return await saver.aput(config(thread), empty_checkpoint(), {"step": 1}, {})


def invoke(compiled: Any, thread: object) -> list[str]:
    return compiled.invoke({"log": [f"i{thread}"]}, config(thread))["log"]


async def ainvoke(compiled: Any, thread: object) -> list[str]:
    return (await compiled.ainvoke({"log": [f"i{thread}"]}, config(thread)))["log"]


# -- graphs on real databases ----------------------------------------------------------------------


@pytest.mark.parametrize("database", ["postgres", "sqlite"])
def test_threads_of_sync_graphs_on_a_few_connections(
    database: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Thirty-two run at once, each gets its own state, on at most eight connections."""
    if database == "postgres":
        resource = postgres_pool(request.getfixturevalue("dsn"))
    else:
        resource = sqlite_pool(tmp_path / "file.db")
    with pooled(resource) as checkpointer:
        compiled = graph(checkpointer)
        with ThreadPoolExecutor(THREADS) as workers:
            for turn in (1, 2):
                logs = list(workers.map(functools.partial(invoke, compiled), range(THREADS)))
                assert logs == [[f"i{n}", "a", "b", "c"] * turn for n in range(THREADS)]
        assert len(list(compiled.get_state_history(config(0)))) == 10
        assert 1 <= resource.stats().loads <= AT_ONCE


@pytest.mark.parametrize(
    "database", ["postgres", "pipelined postgres", "sqlite", "sync postgres", "sync sqlite"]
)
async def test_threads_of_async_graphs_on_a_few_connections(
    database: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """The same with async savers, and with sync ones off the event loop."""
    resource = {
        "postgres": lambda: apostgres_pool(request.getfixturevalue("dsn")),
        "pipelined postgres": lambda: pipelined_pool(request.getfixturevalue("dsn")),
        "sync postgres": lambda: postgres_pool(request.getfixturevalue("dsn")),
        "sqlite": lambda: asqlite_pool(tmp_path / "file.db"),
        "sync sqlite": lambda: sqlite_pool(tmp_path / "file.db"),
    }[database]()
    async with apooled(resource) as checkpointer:
        compiled = graph(checkpointer)
        for turn in (1, 2):
            logs = await asyncio.gather(*(ainvoke(compiled, n) for n in range(THREADS)))
            assert logs == [[f"i{n}", "a", "b", "c"] * turn for n in range(THREADS)]
        assert len([state async for state in compiled.aget_state_history(config(0))]) == 10
        assert 1 <= resource.stats().loads <= AT_ONCE


def test_another_checkpointer_reads_what_was_stored(dsn: str) -> None:
    """The savers' own tables are used: a bare saver goes on where the pooled one stopped."""
    with pooled(postgres_pool(dsn)) as checkpointer:
        invoke(graph(checkpointer), 1)
    with PostgresSaver.from_conn_string(dsn) as bare:
        assert invoke(graph(bare), 1) == ["i1", "a", "b", "c"] * 2


def test_each_event_loop_has_savers_of_its_own(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Async savers are made on the loop that uses them, one loop after the other."""
    # what is not closed within it psycopg complains of
    monkeypatch.setattr(_core, "CLOSE_GRACE", 60.0)
    resource = apostgres_pool(dsn)
    checkpointer = PooledCheckpointer(resource)
    compiled = graph(checkpointer)

    async def session() -> list[str]:
        await checkpointer.asetup()
        return await ainvoke(compiled, 1)

    assert asyncio.run(session()) == ["i1", "a", "b", "c"]
    assert asyncio.run(session()) == ["i1", "a", "b", "c"] * 2
    checkpointer.close()


# -- at the same time ------------------------------------------------------------------------------


class Meeting(InMemorySaver):
    """``put`` only returns when as many are putting as there are savers."""

    barrier = threading.Barrier(4)

    def put(self, *args: Any) -> Any:
        self.barrier.wait(60)
        return super().put(*args)

    async def aput(self, *args: Any) -> Any:
        self.here.append(self)
        await auntil(lambda: len(self.here) == 4)
        return InMemorySaver.put(self, *args)

    here: list[Any] = []


def test_threads_do_not_queue_behind_one_lock() -> None:
    """As many operations run at once as there are savers."""
    with pooled(Pool(Meeting, max_size=4)) as checkpointer, ThreadPoolExecutor(4) as workers:
        assert len(list(workers.map(functools.partial(put, checkpointer), range(4)))) == 4


async def test_tasks_do_not_queue_behind_one_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many operations run at once as there are savers."""
    monkeypatch.setattr(Meeting, "here", [])
    async with apooled(Pool(Meeting, max_size=4)) as checkpointer:
        await asyncio.gather(*(aput(checkpointer, n) for n in range(4)))
        assert len({id(saver) for saver in Meeting.here}) == 4


class Stuck(InMemorySaver):
    """``aput`` begins and does not end before it is told to."""

    def __init__(self, end: asyncio.Event, order: list[str]) -> None:
        super().__init__()
        self.end, self.order = end, order

    async def aput(self, config: Any, *args: Any) -> Any:
        self.order.append(config["configurable"]["thread_id"])
        await self.end.wait()


@pytest.mark.parametrize("max_waiting", [0, 9])
async def test_tasks_wait_as_long_as_the_pool_says_and_in_order(max_waiting: int) -> None:
    """A task that gives up, or is cancelled, leaves its turn to the next one."""
    end, order = asyncio.Event(), list[str]()
    resource = Pool(lambda: Stuck(end, order), max_size=1, timeout=None, max_waiting=max_waiting)
    async with apooled(resource) as checkpointer:
        first = asyncio.create_task(aput(checkpointer, "first"))
        await auntil(lambda: bool(order))
        resource._timeout = 0.05
        with pytest.raises(PoolTimeout):
            await aput(checkpointer, "late")
        resource._timeout = None
        waiting = [asyncio.create_task(aput(checkpointer, n)) for n in range(4)]
        await passes()
        waiting[0].cancel()
        end.set()
        await first
        waiting[2].cancel()
        await asyncio.wait(waiting)
        assert [task.cancelled() for task in waiting] == [True, False, True, False]
        assert order == ["first", "1", "3"]


async def test_a_task_that_is_cancelled_when_its_turn_has_come() -> None:
    """The turn is not lost."""
    end, order = asyncio.Event(), list[str]()
    resource = Pool(lambda: Stuck(end, order), max_size=1)
    async with apooled(resource) as checkpointer:
        first = asyncio.create_task(aput(checkpointer, "first"))
        await auntil(lambda: bool(order))
        second = asyncio.create_task(aput(checkpointer, "second"))
        third = asyncio.create_task(aput(checkpointer, "third"))
        await passes()
        first.add_done_callback(lambda _: second.cancel())
        end.set()
        await third
        assert second.cancelled() or order[1] == "second"
        assert order[-1] == "third"


# -- dropped connections ---------------------------------------------------------------------------


def test_goes_on_after_all_connections_were_dropped(dsn: str) -> None:
    """Sync: none of the idle connections is left, and nobody notices."""
    resource = postgres_pool(dsn)
    with pooled(resource) as checkpointer:
        compiled = graph(checkpointer)
        invoke(compiled, 1)
        with ThreadPoolExecutor(AT_ONCE) as workers:
            list(workers.map(functools.partial(invoke, compiled), range(10, 10 + AT_ONCE)))
        assert drop_connections(dsn) == resource.stats().size
        assert invoke(compiled, 1) == ["i1", "a", "b", "c"] * 2


@pytest.mark.parametrize("make", [apostgres_pool, pipelined_pool])
async def test_goes_on_after_all_connections_were_dropped_async(make: Any, dsn: str) -> None:
    """Async: none of the idle connections is left, and nobody notices."""
    resource = make(dsn)
    async with apooled(resource) as checkpointer:
        compiled = graph(checkpointer)
        await asyncio.gather(*(ainvoke(compiled, n) for n in range(THREADS)))
        size = resource.stats().size
        assert size > 1
        # the server may still have one that is closed
        await auntil(lambda: connections(dsn) == size)
        assert await asyncio.to_thread(drop_connections, dsn) == size
        logs = await asyncio.gather(*(ainvoke(compiled, n) for n in range(THREADS)))
        assert logs == [[f"i{n}", "a", "b", "c"] * 2 for n in range(THREADS)]


def test_goes_on_after_the_server_was_restarted() -> None:
    """A server process that dies takes all connections with it; the server recovers."""
    with private_postgres() as dsn, pooled(postgres_pool(dsn)) as checkpointer:
        compiled = graph(checkpointer)
        with ThreadPoolExecutor(AT_ONCE) as workers:
            list(workers.map(functools.partial(invoke, compiled), range(AT_ONCE)))
        victim, other = psycopg.connect(dsn), psycopg.connect(dsn)
        os.kill(victim.info.backend_pid, signal.SIGKILL)
        for connection in (victim, other):
            # once the server drops the others, too, it lets nobody in before it has recovered
            until(functools.partial(is_lost, connection))
            connection.close()
        until(functools.partial(answers, dsn))
        with ThreadPoolExecutor(AT_ONCE) as workers:
            logs = list(workers.map(functools.partial(invoke, compiled), range(AT_ONCE)))
        assert logs == [[f"i{n}", "a", "b", "c"] * 2 for n in range(AT_ONCE)]


def is_lost(connection: psycopg.Connection[Any]) -> bool:
    """Whether the server has dropped a connection."""
    try:
        connection.execute("SELECT 1")
    except psycopg.OperationalError:
        return True
    return False


def answers(dsn: str) -> bool:
    """Whether a server can be reached."""
    try:
        psycopg.connect(dsn).close()
    except psycopg.OperationalError:
        return False
    return True


def test_a_connection_dropped_in_the_middle_of_a_put(dsn: str) -> None:
    """The put is done again on a fresh connection."""

    class Unlucky(PostgresSaver):
        puts = 0

        def put(self, *args: Any) -> Any:
            Unlucky.puts += 1
            if Unlucky.puts == 2:
                with self._cursor() as cursor:  # its own, while it is used
                    cursor.execute("SELECT pg_terminate_backend(pg_backend_pid())")
            return super().put(*args)

    resource = postgres_pool(dsn, Unlucky)
    with pooled(resource) as checkpointer:
        assert invoke(graph(checkpointer), 1) == ["i1", "a", "b", "c"]
        assert len(list(checkpointer.list(config(1)))) == 5
        assert Unlucky.puts == 6  # five checkpoints, one of them twice
        assert resource.stats().closed == 1


async def test_a_connection_dropped_in_the_middle_of_a_put_async(dsn: str) -> None:
    """The put is done again on a fresh connection."""

    class Unlucky(AsyncPostgresSaver):
        puts = 0

        async def aput(self, *args: Any) -> Any:
            Unlucky.puts += 1
            if Unlucky.puts == 2:
                async with self._cursor() as cursor:
                    await cursor.execute("SELECT pg_terminate_backend(pg_backend_pid())")
            return await super().aput(*args)

    resource = apostgres_pool(dsn, Unlucky)
    async with apooled(resource) as checkpointer:
        assert await ainvoke(graph(checkpointer), 1) == ["i1", "a", "b", "c"]
        assert Unlucky.puts == 6
        await auntil(lambda: resource.stats().closed == 1)  # by a task that nobody waits for


class Shaky(InMemorySaver):
    """Raises what the test says, and remembers who was asked."""

    def __init__(self, log: list[Any], *errors: Any, after: int = 0) -> None:
        super().__init__()
        self.log, self.errors, self.after = log, list(errors), after

    def _ask(self, name: str) -> None:
        self.log.append((name, self))
        if self.errors and (error := self.errors.pop(0)) is not None:
            raise error

    def put(self, *args: Any) -> Any:
        self._ask("put")
        return super().put(*args)

    def copy_thread(self, *args: Any) -> Any:
        self._ask("copy_thread")

    def list(self, *args: Any, **kwargs: Any) -> Iterator[CheckpointTuple]:
        for number, found in enumerate(super().list(*args, **kwargs)):
            if number == self.after:
                self._ask("list")
            yield found


def shaky_pool(log: list[Any], *scripts: tuple[Any, ...], **options: Any) -> Pool[Any]:
    """The first saver raises what the first script says, and so on; the rest are well."""
    rest = iter(scripts)
    return Pool(lambda: Shaky(log, *next(rest, ()), **options), max_size=4)


def gone() -> ConnectionError:
    return ConnectionResetError("gone")


def test_an_operation_is_tried_once_more_on_a_fresh_saver() -> None:
    """Twice in all, when the first saver was made for it as well; then its error is raised."""
    log: list[Any] = []
    with pooled(shaky_pool(log, (gone(),), (gone(),))) as checkpointer:
        with pytest.raises(ConnectionResetError):
            put(checkpointer)
        put(checkpointer)
    assert len({id(saver) for _, saver in log}) == len(log) == 3


def test_all_stale_savers_are_used_up_first() -> None:
    """However many idle ones turn out to be dead, it ends on one that was made since."""
    log: list[Any] = []
    resource = shaky_pool(log, *[(gone(),)] * 4)
    with pooled(resource) as checkpointer:
        leases = [resource.lease() for _ in range(4)]
        for lease in leases:
            checkpointer._admit(lease.__enter__())
        for lease in leases:
            lease.__exit__(None, None, None)
        put(checkpointer)
        assert len(log) == 5
        assert resource.stats().closed == 4


def test_other_errors_are_raised_and_keep_the_saver() -> None:
    """A value that cannot be stored is not the connection's fault."""
    log: list[Any] = []
    resource = shaky_pool(log, (ValueError("bad"),))
    with pooled(resource) as checkpointer:
        with pytest.raises(ValueError, match="bad"):
            put(checkpointer)
        put(checkpointer)
        assert resource.stats().loads == 1


def test_a_copy_is_not_repeated() -> None:
    """Nobody knows whether it was done; its saver is closed all the same."""
    log: list[Any] = []
    resource = shaky_pool(log, (gone(),))
    with pooled(resource) as checkpointer:
        with pytest.raises(ConnectionResetError):
            checkpointer.copy_thread("a", "b")
        assert [name for name, _ in log] == ["copy_thread"]
        assert resource.stats().size == 0


@pytest.mark.parametrize("sqlstate", ["57P01", "57P05", "08006", "25P03"])
def test_what_a_server_says_when_it_ends_a_connection(sqlstate: str) -> None:
    """Its SQLSTATE is enough, whatever the driver's class of the error."""

    class DriverError(Exception):
        pass

    error = DriverError()
    error.sqlstate = sqlstate  # type: ignore[attr-defined]
    log: list[Any] = []
    with pooled(shaky_pool(log, (error,))) as checkpointer:
        put(checkpointer)
    assert len(log) == 2


@pytest.mark.parametrize("after", [0, 1])
def test_a_listing_begins_again_only_before_its_first_item(after: int) -> None:
    """Later on somebody would see items twice."""
    log: list[Any] = []
    stored: list[Any] = []

    class Listing(Shaky):
        def __init__(self) -> None:
            super().__init__(log, *([gone()] if not stored else []), after=after)
            stored.append(self)
            for _ in range(3):
                InMemorySaver.put(self, config("t"), empty_checkpoint(), {"step": 1}, {})

    resource = Pool(Listing, max_size=4)
    with pooled(resource) as checkpointer:
        found = checkpointer.list(config("t"))
        if after:
            next(found)
            with pytest.raises(ConnectionResetError):
                next(found)
        else:
            assert len(list(found)) == 3
        assert resource.stats().closed == 1


# -- cancellations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [apostgres_pool, pipelined_pool, postgres_pool])
async def test_a_storm_of_cancellations_loses_no_lease(make: Any, dsn: str) -> None:
    """Wherever operations are cancelled, all savers come back or are replaced."""
    resource = make(dsn, max_size=4)
    rng = random.Random(7)
    async with apooled(resource) as checkpointer:

        async def work(number: int) -> None:
            await aput(checkpointer, number)
            await checkpointer.aget_tuple(config(number))
            async for _ in checkpointer.alist(config(number)):
                pass

        for storm in range(4):
            tasks = [asyncio.create_task(work(100 * storm + n)) for n in range(30)]
            while left := [task for task in tasks if not task.done()]:
                for _ in range(rng.randrange(40)):
                    await asyncio.sleep(0)
                if rng.random() < 0.5:
                    rng.choice(left).cancel()
            for task in tasks:
                assert task.cancelled() or task.exception() is None
        assert any(task.cancelled() for task in tasks)
        await auntil(lambda: resource.stats().in_use == 0)
        logs = await asyncio.gather(*(ainvoke(graph(checkpointer), n) for n in range(8)))
        assert logs == [[f"i{n}", "a", "b", "c"] for n in range(8)]


async def test_a_sync_saver_ends_what_it_does_before_it_is_leased_again() -> None:
    """The caller is cancelled, the thread is not: nobody else gets its saver meanwhile."""
    begun, end = threading.Event(), threading.Event()

    class Slow(SyncOnly):
        def put(self, *args: Any) -> Any:
            begun.set()
            assert end.wait(60)
            return super().put(*args)

    resource = Pool(Slow, max_size=1)
    async with apooled(resource) as checkpointer:
        task = asyncio.create_task(aput(checkpointer))
        await auntil(begun.is_set)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert resource.stats().in_use == 1
        other = asyncio.create_task(checkpointer.aget_tuple(config("t")))
        await auntil(lambda: resource.stats().waiting == 1)
        end.set()
        assert await other is not None
        assert resource.stats().loads == 1


async def test_what_is_cancelled_closes_an_async_saver() -> None:
    """What was interrupted may have left anything on the connection."""
    begun = asyncio.Event()

    class Slow(InMemorySaver):
        async def aput(self, *args: Any) -> Any:
            begun.set()
            await asyncio.Event().wait()

    async def create() -> Slow:
        return Slow()

    resource = Pool(create, max_size=1)
    async with apooled(resource) as checkpointer:
        task = asyncio.create_task(aput(checkpointer))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await checkpointer.aget_tuple(config("t")) is None
        assert (resource.stats().loads, resource.stats().closed) == (2, 1)


# -- listings --------------------------------------------------------------------------------------


@pytest.mark.parametrize("leave", ["close", "drop"])
def test_a_listing_that_is_left_gives_its_saver_back(leave: str, dsn: str) -> None:
    """It holds one while it is iterated, not afterwards."""
    resource = postgres_pool(dsn)
    with pooled(resource) as checkpointer:
        for _ in range(3):
            put(checkpointer)
        found = checkpointer.list(config("t"))
        assert resource.stats().in_use == 0
        next(found)
        assert resource.stats().in_use == 1
        if leave == "close":
            found.close()  # type: ignore[attr-defined]
        del found
        assert resource.stats().in_use == 0
        assert resource.stats().closed == 0


@pytest.mark.parametrize("leave", ["close", "drop"])
async def test_an_async_listing_that_is_left_gives_its_saver_back(leave: str, dsn: str) -> None:
    """It holds one while it is iterated, not afterwards."""
    resource = apostgres_pool(dsn)
    async with apooled(resource) as checkpointer:
        for _ in range(3):
            await aput(checkpointer)
        found: Any = checkpointer.alist(config("t"))
        await found.__anext__()
        assert resource.stats().in_use == 1
        if leave == "close":
            await found.aclose()
        del found
        await auntil(lambda: resource.stats().in_use == 0)
        assert resource.stats().closed == 0


# -- capabilities ----------------------------------------------------------------------------------


class SyncOnly(InMemorySaver):
    """A saver as most third-party ones are: only the sync half."""

    aget_tuple = BaseCheckpointSaver.aget_tuple
    alist = BaseCheckpointSaver.alist
    aput = BaseCheckpointSaver.aput
    aput_writes = BaseCheckpointSaver.aput_writes
    adelete_thread = BaseCheckpointSaver.adelete_thread


class AsyncOnly(InMemorySaver):
    """Only the async half."""

    get_tuple = BaseCheckpointSaver.get_tuple
    list = BaseCheckpointSaver.list
    put = BaseCheckpointSaver.put
    put_writes = BaseCheckpointSaver.put_writes
    delete_thread = BaseCheckpointSaver.delete_thread

    async def aget_tuple(self, config: Any) -> Any:
        return InMemorySaver.get_tuple(self, config)

    async def aput(self, *args: Any) -> Any:
        return InMemorySaver.put(self, *args)


def overridden(kind: type[Any]) -> set[str]:
    return {
        name
        for name in (*OPERATIONS, *(f"a{name}" for name in OPERATIONS))
        if getattr(kind, name) is not getattr(BaseCheckpointSaver, name)
    }


@pytest.mark.parametrize(
    "kind",
    [InMemorySaver, AsyncPostgresSaver, AsyncSqliteSaver, PostgresSaver, SqliteSaver, SyncOnly],
)
def test_offers_what_its_savers_offer(kind: Any) -> None:
    """An operation that the class overrides, sync or async, and no other one."""
    checkpointer = PooledCheckpointer(Pool(lambda: None), saver=kind)
    operations = {name for name in OPERATIONS if overridden(kind) & {name, f"a{name}"}}
    assert overridden(type(checkpointer)) == operations | {f"a{name}" for name in operations}
    if kind in (InMemorySaver, AsyncPostgresSaver, AsyncSqliteSaver):
        assert (
            DetectedCapabilities.from_instance(checkpointer).detected
            == DetectedCapabilities.from_instance(kind.__new__(kind)).detected
        )


async def test_what_savers_offer_is_learned_from_the_first_one() -> None:
    """Without ``saver=``; whatever the first operation is."""
    async with apooled(Pool(SyncOnly)) as checkpointer:
        told = PooledCheckpointer(Pool(SyncOnly), saver=SyncOnly)
        assert type(checkpointer) is type(told)
        assert "SyncOnly" in repr(checkpointer)
        assert isinstance(checkpointer, PooledCheckpointer)


def test_what_savers_lack_is_not_implemented() -> None:
    """As it is on the savers, also when it is the first that is asked for."""
    for options in ({}, {"saver": SyncOnly}):
        resource = Pool(SyncOnly)
        checkpointer = PooledCheckpointer(resource, **options)
        with pytest.raises(NotImplementedError):
            checkpointer.prune(["t"])
        check_at_rest(resource)
        resource.close()


def test_get_and_histories_work_whichever_half_is_overridden() -> None:
    """LangGraph's defaults are made of operations of ours."""
    checkpointer = PooledCheckpointer(Pool(SyncOnly, max_size=1))
    assert checkpointer.get(config("t")) is None
    put(checkpointer)
    assert checkpointer.get(config("t")) is not None
    assert checkpointer.get_delta_channel_history(config=config("t"), channels=[]) == {}
    checkpointer.close()


async def conformance(name: str, open_saver: Callable[[], Any]) -> dict[str, Any]:
    @checkpointer_test(name=name)
    async def factory() -> AsyncIterator[Any]:
        async with open_saver() as saver:
            yield saver

    return (await validate(factory)).to_dict()["results"]


@pytest.mark.parametrize("database", ["postgres", "pipelined postgres", "sqlite"])
async def test_conforms_as_the_bare_saver_does(
    database: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """LangGraph's conformance tests: the same results, test for test."""

    def new_file() -> Path:
        return tmp_path / f"{token_hex(4)}.db"

    @asynccontextmanager
    async def bare() -> AsyncIterator[Any]:
        if database == "sqlite":
            opened = AsyncSqliteSaver.from_conn_string(str(new_file()))
        else:
            opened = AsyncPostgresSaver.from_conn_string(request.getfixturevalue("dsn"))
        async with opened as saver:
            await saver.setup()
            yield saver

    def ours() -> Any:
        if database == "sqlite":
            return apooled(asqlite_pool(new_file()))
        make = apostgres_pool if database == "postgres" else pipelined_pool
        return apooled(make(request.getfixturevalue("dsn")), saver=AsyncPostgresSaver)

    expected = await conformance("bare", bare)
    assert expected["put"]["passed"]
    assert await conformance("pooled", ours) == expected


async def test_sync_savers_conform_off_the_loop(dsn: str) -> None:
    """Sync savers cannot be tested bare; pooled they pass what they offer."""
    results = await conformance("pooled", lambda: apooled(postgres_pool(dsn)))
    assert {name for name, found in results.items() if found["detected"]} >= {
        "put",
        "put_writes",
        "get_tuple",
        "list",
        "delete_thread",
        "prune",
    }
    assert not any(found["failures"] for found in results.values())


# -- who can be served by what ---------------------------------------------------------------------


def test_async_savers_refuse_sync_callers(dsn: str) -> None:
    """The error says what to do."""
    checkpointer = PooledCheckpointer(apostgres_pool(dsn))
    with pytest.raises(ConfigurationError, match="ainvoke"):
        invoke(graph(checkpointer), 1)
    with pytest.raises(ConfigurationError, match="ainvoke"):
        list(checkpointer.list(None))
    with pytest.raises(ConfigurationError, match="asetup"):
        checkpointer.get_next_version(None, None)


async def test_async_savers_made_by_a_sync_function(dsn: str) -> None:
    """The error says that they must be made on the event loop."""
    connection = await psycopg.AsyncConnection.connect(dsn)
    async with connection:
        checkpointer = PooledCheckpointer(Pool(lambda: AsyncPostgresSaver(connection)))
        with pytest.raises(ConfigurationError, match="async def"):
            await checkpointer.aget_tuple(config(1))
        with pytest.raises(ConfigurationError, match="async def"):
            await asyncio.to_thread(checkpointer.get_tuple, config(1))


def test_savers_without_a_sync_half() -> None:
    """The error says what to do."""
    resource = Pool(AsyncOnly)
    with pooled(resource) as checkpointer:
        with pytest.raises(ConfigurationError, match=r"AsyncOnly has no put\(\).*ainvoke"):
            put(checkpointer)
        with pytest.raises(ConfigurationError, match="ainvoke"):
            list(checkpointer.list(None))
        asyncio.run(aput(checkpointer))
        assert asyncio.run(checkpointer.aget_tuple(config("t"))) is not None


def test_setup_of_async_savers() -> None:
    """The error names ``asetup``."""

    class SetUpLater(InMemorySaver):
        async def setup(self) -> None: ...

    with pytest.raises(ConfigurationError, match="asetup"):
        PooledCheckpointer(Pool(SetUpLater)).setup()


# -- somebody else's pool --------------------------------------------------------------------------


def test_savers_on_connections_of_a_drivers_pool(dsn: str) -> None:
    """``FromContext``: the driver replaces what was dropped."""
    with ConnectionPool(dsn, min_size=1, max_size=1, kwargs=SETTINGS) as driver:

        @contextmanager
        def lease() -> Iterator[PostgresSaver]:
            with driver.connection() as connection:
                yield PostgresSaver(connection)

        resource = FromContext(lease)
        checkpointer = PooledCheckpointer(resource)
        checkpointer.setup()
        compiled = graph(checkpointer)
        with ThreadPoolExecutor(THREADS) as workers:
            logs = list(workers.map(functools.partial(invoke, compiled), range(THREADS)))
        assert logs == [[f"i{n}", "a", "b", "c"] for n in range(THREADS)]
        assert drop_connections(dsn) == 1
        assert invoke(compiled, 1) == ["i1", "a", "b", "c"] * 2
        assert resource.stats().in_use == 0


async def test_async_savers_on_connections_of_a_drivers_pool(dsn: str) -> None:
    """``FromContext`` with an async context manager."""
    async with AsyncConnectionPool(
        dsn, min_size=1, max_size=4, kwargs=SETTINGS, check=AsyncConnectionPool.check_connection
    ) as driver:

        @asynccontextmanager
        async def lease() -> AsyncIterator[AsyncPostgresSaver]:
            async with driver.connection() as connection:
                yield AsyncPostgresSaver(connection)

        resource = FromContext(lease)
        checkpointer = PooledCheckpointer(resource)
        await checkpointer.asetup()
        compiled = graph(checkpointer)
        await asyncio.gather(*(ainvoke(compiled, n) for n in range(THREADS)))
        await asyncio.to_thread(drop_connections, dsn)
        logs = await asyncio.gather(*(ainvoke(compiled, n) for n in range(THREADS)))
        assert logs == [[f"i{n}", "a", "b", "c"] * 2 for n in range(THREADS)]
        with pytest.raises(ConfigurationError, match="event loop"):
            invoke(compiled, 1)
        assert resource.stats().in_use == 0


async def test_a_cancelled_caller_leaves_a_sync_context_after_its_operation() -> None:
    """``FromContext`` of sync savers: left when the thread is done, not before."""
    begun, end = threading.Event(), threading.Event()

    class Slow(SyncOnly):
        def put(self, *args: Any) -> Any:
            begun.set()
            assert end.wait(60)
            return super().put(*args)

    @contextmanager
    def lease() -> Iterator[Slow]:
        yield Slow()
        assert end.is_set()

    resource = FromContext(lease)
    checkpointer = PooledCheckpointer(resource)
    task = asyncio.create_task(aput(checkpointer))
    await auntil(begun.is_set)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert resource.stats().in_use == 1
    end.set()
    await auntil(lambda: resource.stats().in_use == 0)


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_leaving_a_context_on_a_lost_connection_may_fail(kind: str) -> None:
    """What counts is the operation, which is done again; if it may not be, the error is raised."""
    log: list[Any] = []
    scripts = iter([(gone(),)])

    @contextmanager
    def lease() -> Iterator[Shaky]:
        try:
            yield Shaky(log, *next(scripts, ()))
        except ConnectionError:
            raise RuntimeError("cannot roll back") from None

    @asynccontextmanager
    async def alease() -> AsyncIterator[Shaky]:
        with lease() as saver:
            yield saver

    if kind == "sync":
        checkpointer = PooledCheckpointer(FromContext(lease))
        put(checkpointer)
    else:
        checkpointer = PooledCheckpointer(FromContext(alease))
        await aput(checkpointer)
    assert len(log) == 2
    scripts = iter([(gone(),)])
    if kind == "sync":
        with pytest.raises(RuntimeError, match="roll back"):
            checkpointer.copy_thread("a", "b")
    else:
        with pytest.raises(RuntimeError, match="roll back"):
            await checkpointer.acopy_thread("a", "b")


# -- the rest --------------------------------------------------------------------------------------


def test_versions_are_the_savers(dsn: str) -> None:
    """``get_next_version`` leases a saver to know, if there was none yet."""
    resource = postgres_pool(dsn)
    checkpointer = PooledCheckpointer(resource)
    assert checkpointer.config_specs == []
    version = checkpointer.get_next_version(None, None)
    assert isinstance(version, str)
    assert checkpointer.get_next_version(version, None) > version
    assert resource.stats().leases == 1
    checkpointer.close()


def test_the_serializer_is_the_savers() -> None:
    """Once a saver was leased, ``serde`` is what stores."""
    serde = JsonPlusSerializer(pickle_fallback=False)
    with pooled(Pool(lambda: InMemorySaver(serde=serde))) as checkpointer:
        assert checkpointer.serde is serde


def test_an_allowlist_reaches_the_savers() -> None:
    """The clone uses the same savers, with it; the original goes on without."""
    used: list[Any] = []

    class Asked(InMemorySaver):
        def put(self, *args: Any) -> Any:
            used.append(self.serde)
            return super().put(*args)

    serde = JsonPlusSerializer(allowed_msgpack_modules=[("builtins", "set")])
    resource = Pool(lambda: Asked(serde=serde), max_size=1)
    with pooled(resource) as checkpointer:
        clone = checkpointer.with_allowlist([("some.module", "Class")])
        for saver in (checkpointer, clone, clone):
            put(saver)
        plain, allowed, again = used
        assert plain is serde
        assert allowed is again
        assert ("some.module", "Class") in allowed._allowed_msgpack_modules
        assert clone.get_tuple(config("t")) == checkpointer.get_tuple(config("t"))
        assert resource.stats().loads == 1


@pytest.mark.parametrize(
    "resource", [None, InMemorySaver(), InMemorySaver, Shared(InMemorySaver), Keyed(str)]
)
def test_only_pools_are_accepted(resource: Any) -> None:
    """The error names the field and what it takes."""
    with pytest.raises(ConfigurationError, match="resource must be a Pool or a FromContext"):
        PooledCheckpointer(resource)


@pytest.mark.parametrize("saver", [InMemorySaver(), dict, "PostgresSaver"])
def test_only_classes_of_savers_are_accepted(saver: Any) -> None:
    """The error names the field and what it takes."""
    with pytest.raises(ConfigurationError, match="saver must be a subclass of BaseCheckpointSaver"):
        PooledCheckpointer(Pool(InMemorySaver), saver=saver)


@pytest.mark.parametrize(
    ("thing", "options"), [(object, {}), (dict, {}), (InMemorySaver, {"saver": PostgresSaver})]
)
async def test_a_resource_of_something_else(thing: Any, options: Any) -> None:
    """The error says what it gave; what was leased comes back."""
    resource = Pool(thing)
    checkpointer = PooledCheckpointer(resource, **options)
    for _ in range(2):
        with pytest.raises(ConfigurationError, match=f"must give savers .*got {thing.__name__}"):
            checkpointer.get_tuple(config("t"))
        with pytest.raises(ConfigurationError, match=f"must give savers .*got {thing.__name__}"):
            await checkpointer.aget_tuple(config("t"))
    check_at_rest(resource)
    await checkpointer.aclose()


def test_nothing_is_served_after_the_end(dsn: str) -> None:
    """``close`` closes the resource and its connections."""
    resource = postgres_pool(dsn)
    checkpointer = PooledCheckpointer(resource)
    checkpointer.setup()
    checkpointer.close()
    with pytest.raises(PoolClosed):
        checkpointer.get_tuple(config("t"))
    until(lambda: connections(dsn) == 0)  # the server learns of it a moment later
