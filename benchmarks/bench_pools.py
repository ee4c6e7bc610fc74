"""Pools, side by side with the trusted ones and with what users write today.

``python -m benchmarks.bench_pools [--json FILE] [--quick] [--only NAME ...]``

Needs the extra ``bench``. All of them pool objects that do nothing, so that only the pools are
measured.
"""

from __future__ import annotations

import asyncio
import functools
import operator
import queue
import random
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from statistics import median
from typing import Annotated, Any
from unittest.mock import patch

import generic_connection_pool.asyncio as gcp_asyncio
import generic_connection_pool.threading as gcp_threading
import psycopg_pool
from langgraph.graph import START
from langgraph.graph import StateGraph as LangGraphStateGraph
from langgraph.types import Send
from psycopg.pq import TransactionStatus
from sqlalchemy.pool import AsyncAdaptedQueuePool, QueuePool
from sqlalchemy.util import greenlet_spawn
from typing_extensions import TypedDict

from benchmarks._harness import (
    Batch,
    Comparison,
    Effort,
    Result,
    compare,
    event_loop,
    output,
    program,
    result,
)
from langgraph_perf import Keyed, Pool, StateGraph
from langgraph_perf.resources import MAX_OVERTAKE_SECONDS
from langgraph_perf.resources import keyed as keyed_module
from langgraph_perf.resources._entry import Entry
from langgraph_perf.resources._shared import SharedCore
from langgraph_perf.resources._waiters import Waiter

THOROUGH = Effort()
QUICK = Effort(rounds=9, size=0.25)

SIZE = 10
HELD = 0.001

SQLALCHEMY = "SQLAlchemy QueuePool"
SQLALCHEMY_ASYNC = "SQLAlchemy AsyncAdaptedQueuePool"
PSYCOPG = "psycopg_pool getconn"
PSYCOPG_CONTEXT = "psycopg_pool connection()"
GENERIC = "generic-connection-pool"
LIFO = "LifoQueue"
NAIVE = "list under a lock, polled"

Seconds = list[float]
Acquire = Callable[[], Any]
Release = Callable[[Any], Any]
AsyncAcquire = Callable[[], Awaitable[Any]]
AsyncRelease = Callable[[Any], Awaitable[Any]]


class _Status:
    transaction_status = TransactionStatus.IDLE


class Dummy:
    """A connection that does nothing, with what the pools want of one."""

    pgconn = _Status()
    closed = False
    _pool = None

    @classmethod
    def connect(cls, *args: object, **kwargs: object) -> Dummy:
        return cls()

    def __enter__(self) -> Dummy:
        return self

    def __exit__(self, *exc: object) -> None: ...
    def close(self) -> None: ...
    def rollback(self) -> None: ...
    def commit(self) -> None: ...


class AsyncDummy(Dummy):
    """The same for async pools."""

    @classmethod
    async def connect(cls, *args: object, **kwargs: object) -> AsyncDummy:  # type: ignore[override]
        return cls()

    async def __aenter__(self) -> AsyncDummy:
        return self

    async def __aexit__(self, *exc: object) -> None: ...
    async def close(self) -> None: ...  # type: ignore[override]


class _Manager(gcp_threading.BaseConnectionManager[str, Dummy]):
    def create(self, endpoint: str, timeout: float | None = None) -> Dummy:
        return Dummy()

    def dispose(self, endpoint: str, conn: Dummy, timeout: float | None = None) -> None: ...


class _AsyncManager(gcp_asyncio.BaseConnectionManager[str, Dummy]):
    async def create(self, endpoint: str, timeout: float | None = None) -> Dummy:
        return Dummy()

    async def dispose(self, endpoint: str, conn: Dummy, timeout: float | None = None) -> None: ...


# -- the alternatives: how to get an object and how to give it back -----------------------------


class Pools:
    """The pools of others, made when asked for and closed at the end."""

    def __init__(self, size: int = SIZE) -> None:
        self._size = size
        self._stack = ExitStack()

    def __enter__(self) -> Pools:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def sqlalchemy(self) -> QueuePool:
        # without the rollback that it does by default when a connection comes back
        pool = QueuePool(
            lambda: Dummy(), pool_size=self._size, max_overflow=0, timeout=300, reset_on_return=None
        )
        self._stack.callback(pool.dispose)
        return pool

    def psycopg(self) -> Any:
        pool: Any = psycopg_pool.ConnectionPool(
            "",
            connection_class=Dummy,
            min_size=self._size,
            open=False,
            timeout=300,  # type: ignore[arg-type, type-var]
        )
        pool.open(wait=True)
        self._stack.callback(pool.close)
        return pool

    def generic(self) -> Any:
        pool = gcp_threading.ConnectionPool[str, Dummy](
            _Manager(), max_size=self._size, total_max_size=self._size, acquire_timeout=300
        )
        self._stack.callback(pool.close)
        return pool

    def sync(self, name: str) -> tuple[Acquire, Release]:
        """``acquire`` and ``release`` of one of the sync alternatives."""
        pool: Any
        if name == SQLALCHEMY:
            pool = self.sqlalchemy()
            return pool.connect, lambda connection: connection.close()
        if name == PSYCOPG:
            pool = self.psycopg()
            return pool.getconn, pool.putconn
        if name == GENERIC:
            pool = self.generic()
            return (
                lambda: pool.acquire("x", timeout=300),
                lambda connection: pool.release(connection, "x"),
            )
        if name == LIFO:
            pool = queue.LifoQueue()
            for _ in range(self._size):
                pool.put(Dummy())
            return pool.get, pool.put
        assert name == NAIVE
        lock, idle = threading.Lock(), [Dummy() for _ in range(self._size)]

        def acquire() -> Dummy:
            while True:
                with lock:
                    if idle:
                        return idle.pop()
                time.sleep(0.001)

        def release(connection: Dummy) -> None:
            with lock:
                idle.append(connection)

        return acquire, release


class AsyncPools:
    """The same for event loops."""

    def __init__(self, size: int = SIZE) -> None:
        self._size = size
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> AsyncPools:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    async def psycopg(self) -> Any:
        pool: Any = psycopg_pool.AsyncConnectionPool(
            "",
            connection_class=AsyncDummy,
            min_size=self._size,
            open=False,
            timeout=300,  # type: ignore[arg-type, type-var]
        )
        await pool.open(wait=True)
        self._stack.push_async_callback(pool.close)
        return pool

    async def make(self, name: str) -> tuple[AsyncAcquire, AsyncRelease]:
        """``acquire`` and ``release`` of one of the async alternatives."""
        pool: Any
        if name == SQLALCHEMY_ASYNC:
            pool = AsyncAdaptedQueuePool(
                lambda: Dummy(),
                pool_size=self._size,
                max_overflow=0,
                timeout=300,
                reset_on_return=None,
            )
            return (
                lambda: greenlet_spawn(pool.connect),
                lambda connection: greenlet_spawn(connection.close),
            )
        if name == PSYCOPG:
            pool = await self.psycopg()
            return pool.getconn, pool.putconn
        if name == GENERIC:
            pool = gcp_asyncio.ConnectionPool[str, Dummy](
                _AsyncManager(), max_size=self._size, total_max_size=self._size, acquire_timeout=300
            )
            self._stack.push_async_callback(pool.close)
            return (
                lambda: pool.acquire("x", timeout=300),
                lambda connection: pool.release(connection, "x"),
            )
        if name == LIFO:
            pool = asyncio.LifoQueue()
            for _ in range(self._size):
                pool.put_nowait(Dummy())
            return pool.get, pool.put
        assert name == NAIVE
        idle = [Dummy() for _ in range(self._size)]

        async def acquire() -> Dummy:
            while not idle:  # noqa: ASYNC110, that is what naive means
                await asyncio.sleep(0.001)
            return idle.pop()

        async def release(connection: Dummy) -> None:
            idle.append(connection)

        return acquire, release


# -- uncontended: one lease after the other ------------------------------------------------------


def checkout(effort: Effort) -> Iterator[Result]:
    """Sync: take an object that is there, and give it back."""
    pool = Pool(Dummy)

    def ours(calls: int) -> None:
        lease = pool.lease
        for _ in range(calls):
            with lease():
                pass

    for name, target in (
        (SQLALCHEMY, 0.25),
        (PSYCOPG, 0.5),
        (PSYCOPG_CONTEXT, None),
        (GENERIC, None),
        (LIFO, None),
        (NAIVE, None),
    ):
        with Pools() as pools:
            if name == PSYCOPG_CONTEXT:
                theirs: Batch = _each_with(pools.psycopg().connection)
            else:
                theirs = _each_pair(*pools.sync(name))
            compared = compare(ours, theirs, effort)
        yield result("checkout, sync", name, compared, target=target)
    pool.close()


def _each_with(connection: Callable[[], Any]) -> Batch:
    def batch(calls: int) -> None:
        for _ in range(calls):
            with connection():
                pass

    return batch


def _each_pair(acquire: Acquire, release: Release) -> Batch:
    def batch(calls: int) -> None:
        for _ in range(calls):
            release(acquire())

    return batch


def checkout_async(effort: Effort) -> Iterator[Result]:
    """Async: take an object that is there, and give it back."""
    pool = Pool(Dummy)

    async def ours(calls: int) -> None:
        lease = pool.alease
        for _ in range(calls):
            async with lease():
                pass

    with event_loop() as loop:
        for name, target in (
            (SQLALCHEMY_ASYNC, 0.25),
            (PSYCOPG, 0.5),
            (GENERIC, None),
            (LIFO, None),
            (NAIVE, None),
        ):
            pools = AsyncPools()
            acquire, release = loop.run_until_complete(pools.make(name))

            async def theirs(
                calls: int, acquire: AsyncAcquire = acquire, release: AsyncRelease = release
            ) -> None:
                for _ in range(calls):
                    await release(await acquire())

            compared = compare(
                lambda calls: loop.run_until_complete(ours(calls)),
                lambda calls, theirs=theirs: loop.run_until_complete(theirs(calls)),  # type: ignore[misc]
                effort,
            )
            loop.run_until_complete(pools.__aexit__())
            yield result("checkout, async", name, compared, target=target)
        loop.run_until_complete(pool.aclose())


# -- contended: more callers than objects --------------------------------------------------------


@contextmanager
def _our_sync(size: int = SIZE) -> Iterator[Callable[[], Any]]:
    pool = Pool(Dummy, max_size=size, timeout=300)
    leases = [pool.lease() for _ in range(size)]  # as the others, which begin full
    for lease in leases:
        lease.__enter__()
    for lease in leases:
        lease.__exit__(None, None, None)
    yield pool.lease
    pool.close()


@contextmanager
def _pair(acquire: Acquire, release: Release) -> Iterator[Any]:
    held = acquire()
    try:
        yield held
    finally:
        release(held)


@asynccontextmanager
async def _apair(acquire: AsyncAcquire, release: AsyncRelease) -> AsyncIterator[Any]:
    held = await acquire()
    try:
        yield held
    finally:
        await release(held)


def _run_threads(number: int, turns: int, lease: Callable[[], Any]) -> tuple[float, Seconds]:
    """How long it takes so many threads to lease so many times, and how long each lease waited."""
    waits: Seconds = []
    go = threading.Barrier(number + 1)

    def work() -> None:
        go.wait()
        for _ in range(turns):
            began = time.perf_counter()
            with lease():
                waits.append(time.perf_counter() - began)
                time.sleep(HELD)

    threads = [threading.Thread(target=work) for _ in range(number)]
    for thread in threads:
        thread.start()
    go.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    return time.perf_counter() - began, waits


async def _run_tasks(number: int, turns: int, lease: Callable[[], Any]) -> tuple[float, Seconds]:
    waits: Seconds = []

    async def work() -> None:
        for _ in range(turns):
            began = time.perf_counter()
            async with lease():
                waits.append(time.perf_counter() - began)
                await asyncio.sleep(HELD)

    began = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(number)))
    return time.perf_counter() - began, waits


class Contest:
    """Rounds of a contended row, ours and theirs in turns."""

    def __init__(self) -> None:
        self.seconds: tuple[Seconds, Seconds] = ([], [])
        self.waits: tuple[list[Seconds], list[Seconds]] = ([], [])

    def add(self, side: int, outcome: tuple[float, Seconds]) -> None:
        self.seconds[side].append(outcome[0])
        self.waits[side].append(sorted(outcome[1]))

    @property
    def unfairness(self) -> float:
        """The longest wait of ours through the median wait: the median of the rounds."""
        return median(waits[-1] / max(median(waits), 1e-9) for waits in self.waits[0])

    def result(self, row: str, name: str, target: float | None = None) -> Result:
        sides = {"ours": _waits(self.waits[0]), "theirs": _waits(self.waits[1])}
        return result(
            row,
            name,
            Comparison(*self.seconds),
            target=target,
            measured=self.unfairness,
            measure="longest wait / median",
            note="waits in ms, median/p99/longest: "
            + " | ".join(
                f"{side} " + "/".join(f"{1000 * seconds:.2g}" for seconds in waits.values())
                for side, waits in sides.items()
            ),
            details={"seconds waited": sides},
        )


def _waits(rounds: list[Seconds]) -> dict[str, float]:
    """The median over the rounds of the median, the 99th percentile and the longest wait."""
    return {
        "median": median(waits[len(waits) // 2] for waits in rounds),
        "p99": median(waits[int(len(waits) * 0.99)] for waits in rounds),
        "longest": median(waits[-1] for waits in rounds),
    }


def threads(effort: Effort) -> Iterator[Result]:
    """64 threads lease 40 times each, over 10 objects that are held for 1 ms."""
    turns = effort.scaled(40)
    for name in (SQLALCHEMY, PSYCOPG, GENERIC, LIFO, NAIVE):
        contest = Contest()
        for _ in range(effort.at_most(5)):
            with _our_sync() as lease:
                contest.add(0, _run_threads(64, turns, lease))
            with Pools() as pools:
                lease = functools.partial(_pair, *pools.sync(name))
                contest.add(1, _run_threads(64, turns, lease))
        yield contest.result(f"64 threads x {turns} over 10", name, target=2)


def tasks(effort: Effort) -> Iterator[Result]:
    """1,000 tasks lease 5 times each, over 10 objects that are held for 1 ms."""
    number = effort.scaled(1000)
    with event_loop() as loop:
        for name in (SQLALCHEMY_ASYNC, PSYCOPG, GENERIC, LIFO, NAIVE):
            contest = Contest()

            async def play(name: str = name, contest: Contest = contest) -> None:
                pool = Pool(Dummy, max_size=SIZE, timeout=300)
                contest.add(0, await _run_tasks(number, 5, pool.alease))
                await pool.aclose()
                async with AsyncPools() as pools:
                    pair = await pools.make(name)
                    contest.add(1, await _run_tasks(number, 5, lambda: _apair(*pair)))

            for _ in range(effort.at_most(5)):
                loop.run_until_complete(play())
            yield contest.result(f"{number} tasks x 5 over 10", name)


def mixed(effort: Effort) -> Iterator[Result]:
    """32 threads (40 leases) and 500 tasks (5 leases) on one pool of 10; theirs need two pools."""
    turns, number = effort.scaled(40), effort.scaled(500)

    async def both(sync: Callable[[], Any], lease: Callable[[], Any]) -> tuple[float, Seconds]:
        began = time.perf_counter()
        (_, waits), (_, more) = await asyncio.gather(
            asyncio.to_thread(_run_threads, 32, turns, sync), _run_tasks(number, 5, lease)
        )
        return time.perf_counter() - began, waits + more

    async def play(contest: Contest, name: str) -> None:
        pool = Pool(Dummy, max_size=SIZE, timeout=300)
        contest.add(0, await both(pool.lease, pool.alease))
        await pool.aclose()
        with Pools(SIZE // 2) as pools:
            async with AsyncPools(SIZE // 2) as async_pools:
                pair = pools.sync(name)
                apair = await async_pools.make(SQLALCHEMY_ASYNC if name == SQLALCHEMY else name)
                contest.add(1, await both(lambda: _pair(*pair), lambda: _apair(*apair)))

    with event_loop() as loop:
        for name in (SQLALCHEMY, PSYCOPG, GENERIC, LIFO, NAIVE):
            contest = Contest()
            for _ in range(effort.at_most(5)):
                loop.run_until_complete(play(contest, name))
            yield contest.result(f"32 threads and {number} tasks", f"{name}, 5 for each kind")


class Item(TypedDict):
    """What one branch of the fan-out is given."""

    number: int


class Fan(TypedDict):
    """A fan-out, and what its branches were given."""

    served: Annotated[list[int], operator.add]


def fanout(effort: Effort) -> Iterator[Result]:
    """A graph sends to 500 nodes at once, which share 2 objects."""
    number = effort.scaled(500)

    def graph(builder: Any, node: Any, **declared: Any) -> Any:
        builder.add_node("node", node, input_schema=Item, **declared)
        send = [Send("node", {"number": n}) for n in range(number)]
        return builder.add_conditional_edges(START, lambda state: send, ["node"])

    async def leasing(state: Item, db: Dummy) -> dict[str, list[int]]:
        await asyncio.sleep(HELD)
        return {"served": [state["number"]] if type(db) is Dummy else []}

    sides: tuple[Seconds, Seconds] = ([], [])
    missed = 0

    async def play() -> None:
        nonlocal missed
        async with AsyncPools(2) as pools:
            theirs = await pools.psycopg()

            async def plain(state: Item) -> dict[str, list[int]]:
                async with theirs.connection():
                    await asyncio.sleep(HELD)
                return {"served": [state["number"]]}

            pool = Pool(Dummy, max_size=2, timeout=300)
            ours = graph(StateGraph(Fan), leasing, resources=["db"]).compile(resources={"db": pool})
            both = (ours, graph(LangGraphStateGraph(Fan), plain).compile())
            for _ in range(effort.at_most(5)):
                for side, compiled in enumerate(both):
                    began = time.perf_counter()
                    served = (await compiled.ainvoke({"served": []}))["served"]
                    sides[side].append(time.perf_counter() - began)
                    if side == 0:
                        missed += len(set(range(number)) - set(served))
            await pool.aclose()

    with event_loop() as loop:
        loop.run_until_complete(play())
    yield result(
        f"fan-out of {number} over 2",
        "plain graph, " + PSYCOPG_CONTEXT,
        Comparison(*sides),
        target=0,
        measured=missed,
        measure="not served",
    )


@contextmanager
def _overtaken() -> Iterator[Seconds]:
    """The ages of all who waited for room when somebody who came later was given something."""
    ages: Seconds = []
    hand = SharedCore._hand

    def spy(self: SharedCore, waiter: Waiter, entry: Entry) -> None:
        if not entry.fresh:  # what was loaded for a waiter was given to it when the load began
            now = self.clock()
            ages.extend(
                now - other.since
                for other in self.queue
                if other.since < waiter.since and (other.key, other.loop) not in self.slots
            )
        hand(self, waiter, entry)

    with patch.object(SharedCore, "_hand", spy):
        yield ages


def keyed(effort: Effort) -> Iterator[Result]:
    """384 leases over 8 keys, 4 objects at a time; a load takes 40 ms, a use 5 ms."""
    loads: Seconds = []
    strict_loads: Seconds = []
    sides: tuple[Seconds, Seconds] = ([], [])

    def run(overtake: float) -> tuple[float, int]:
        def load(key: int) -> Dummy:
            time.sleep(0.04)
            return Dummy()

        with patch.object(keyed_module, "MAX_OVERTAKE_SECONDS", overtake):
            models = Keyed(load, max_size=4)
        keys = random.Random(1)
        wanted = [[keys.randrange(8) for _ in range(6)] for _ in range(64)]

        def work(number: int) -> None:
            for key in wanted[number]:
                with models.lease(key):
                    time.sleep(0.005)

        workers = [threading.Thread(target=work, args=(number,)) for number in range(64)]
        began = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        seconds = time.perf_counter() - began
        made = models.stats().loads
        models.close()
        return seconds, made

    for _ in range(effort.at_most(5)):
        for side, found, overtake in ((0, loads, MAX_OVERTAKE_SECONDS), (1, strict_loads, 0.0)):
            seconds, made = run(overtake)
            sides[side].append(seconds)
            found.append(made)
    yield result(
        "384 leases of 8 keys in 4 places",
        "strict order",
        Comparison(*sides),
        target=40,
        measured=max(loads),
        measure="loads",
        note=f"loads: ours {median(loads):g}, strict order {median(strict_loads):g}",
    )


def overtaking(effort: Effort) -> Iterator[Result]:
    """8 threads keep one of two keys busy, in the only place, for a second; one wants the other."""

    def run(overtake: float) -> float:
        with patch.object(keyed_module, "MAX_OVERTAKE_SECONDS", overtake):
            models = Keyed(str, max_size=1)
        ends = time.monotonic() + 1

        def keep_busy() -> None:
            while time.monotonic() < ends:
                with models.lease("busy"):
                    time.sleep(0.005)

        workers = [threading.Thread(target=keep_busy) for _ in range(8)]
        with _overtaken() as ages:
            for worker in workers:
                worker.start()
            with models.lease("other"):
                pass
            for worker in workers:
                worker.join()
        models.close()
        return max(ages, default=0.0)

    bound = 0.1
    oldest: tuple[Seconds, Seconds] = ([], [])
    for _ in range(effort.at_most(5)):
        for side, overtake in enumerate((bound, MAX_OVERTAKE_SECONDS)):
            oldest[side].append(run(overtake))
    yield result(
        f"oldest one overtaken, bound {bound:g} s",
        f"bound {MAX_OVERTAKE_SECONDS:g} s",
        Comparison(*oldest),
        target=bound,
        measured=round(max(oldest[0]), 3),
        measure="s waited",
        note="how long one had waited for room when somebody who came later was served",
    )


def bystander(effort: Effort) -> Iterator[Result]:
    """An unrelated ``asyncio.to_thread`` while 200 tasks wait for 2 objects, and without them."""
    sides: tuple[Seconds, Seconds] = ([], [])

    async def probe() -> float:
        began = time.perf_counter()
        await asyncio.to_thread(int)
        return time.perf_counter() - began

    async def play() -> None:
        pool = Pool(Dummy, max_size=2, timeout=300)

        async def wait() -> None:
            async with pool.alease():
                pass

        await probe()
        for _ in range(effort.at_most(50)):
            async with pool.alease(), pool.alease():
                waiters = [asyncio.create_task(wait()) for _ in range(200)]
                while pool.stats().waiting < 200:  # noqa: ASYNC110
                    await asyncio.sleep(0)
                sides[0].append(await probe())
            await asyncio.gather(*waiters)
            sides[1].append(await probe())

    with event_loop() as loop:
        loop.run_until_complete(play())
    delay = (max(sides[0]) - median(sides[1])) * 1000
    yield result(
        "to_thread beside 200 waiters",
        "the same without waiters",
        Comparison(*sides),
        target=20,
        measured=delay,
        measure="ms longer at worst",
    )


def reaping(effort: Effort) -> Iterator[Result]:
    """Threads that 50 pools need to close what is idle, and what is left of them afterwards."""
    # in a process of its own: rows before this one may have left the reaper at work
    most, left, theirs = output("from benchmarks import bench_pools; bench_pools.count_threads()")
    yield result(
        "threads of 50 pools",
        "psycopg_pool",
        Comparison([most], [theirs]),
        unit="threads",
        target=1,
        measured=most + left,
        measure="at most, and left",
        note=f"ours: {left:g} left once idle objects were closed",
    )


def count_threads() -> None:
    """Print how many threads our pools need, how many are left, and how many psycopg's need."""

    def more() -> int:
        return threading.active_count() - 1

    ours = [Pool(Dummy, max_idle=0.1) for _ in range(50)]
    for pool in ours:
        with pool.lease():
            pass
    most = more()
    deadline = time.monotonic() + 5
    while more() and time.monotonic() < deadline:
        time.sleep(0.01)
    left = more()
    assert not any(pool.stats().size for pool in ours)
    with Pools(1) as pools:
        for _ in range(50):
            pools.psycopg()
        print(most, left, more())


ROWS: dict[str, Callable[[Effort], Iterator[Result]]] = {
    "checkout": checkout,
    "checkout_async": checkout_async,
    "threads": threads,
    "tasks": tasks,
    "mixed": mixed,
    "fanout": fanout,
    "keyed": keyed,
    "overtaking": overtaking,
    "bystander": bystander,
    "reaping": reaping,
}

PACKAGES = ("langgraph-perf", "sqlalchemy", "psycopg-pool", "generic-connection-pool")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the JSON file."""
    return program("bench_pools", __doc__, ROWS, PACKAGES, THOROUGH, QUICK, argv)


if __name__ == "__main__":
    sys.exit(main())
