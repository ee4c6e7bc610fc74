"""``FromContext``: other people's pools."""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest

from langgraph_perf.errors import ConfigurationError, LeaseError, PoolClosed
from langgraph_perf.resources import FromContext, Pool, Shared
from langgraph_perf.resources.context import ENTERING

from .helpers import PATIENCE, auntil, check_at_rest, passes, until

Watch = Callable[[Any], Any]


class Driver:
    """Somebody else's pool, which remembers what was done with it."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.threads: set[int] = set()
        self.tasks: set[object] = set()

    @contextmanager
    def connection(self) -> Iterator[str]:
        self.threads.add(threading.get_ident())
        self.events.append("enter")
        try:
            yield "connection"
        except ValueError:
            self.events.append("rollback")
            raise
        finally:
            self.events.append("exit")

    @asynccontextmanager
    async def aconnection(self) -> AsyncIterator[str]:
        self.tasks.add(asyncio.current_task())
        self.events.append("enter")
        try:
            await asyncio.sleep(0)
            yield "connection"
        finally:
            await asyncio.sleep(0)
            self.tasks.add(asyncio.current_task())
            self.events.append("exit")


@pytest.fixture
def driver() -> Driver:
    return Driver()


def test_each_lease_is_one_use(watch: Watch, driver: Driver) -> None:
    """Entered with the lease, left with it, and counted."""
    db = watch(FromContext(driver.connection))
    assert not db.needs_loop
    for _ in range(2):
        with db.lease() as connection:
            assert connection == "connection"
            assert db.stats().in_use == db.stats().holders == 1
    assert driver.events == ["enter", "exit"] * 2
    assert db.stats().leases == 2


def test_the_context_manager_sees_the_error(watch: Watch, driver: Driver) -> None:
    """So that a driver can roll back; what it swallows is swallowed."""
    db = watch(FromContext(driver.connection))
    with pytest.raises(ValueError), db.lease():
        raise ValueError
    assert driver.events == ["enter", "rollback", "exit"]

    class Swallow(nullcontext):  # type: ignore[type-arg]
        def __exit__(self, *exc: object) -> bool:
            return True

    with watch(FromContext(Swallow)).lease():
        raise ValueError


async def test_async_managers_are_entered_and_left_in_the_task(
    watch: Watch, driver: Driver
) -> None:
    """As anyio's cancel scopes demand."""
    db = watch(FromContext(driver.aconnection))
    assert db.needs_loop
    async with db.alease() as connection:
        assert connection == "connection"
    assert driver.events == ["enter", "exit"]
    assert driver.tasks == {asyncio.current_task()}


async def test_sync_managers_run_off_the_loop(watch: Watch, driver: Driver) -> None:
    """A blocking pool of a driver cannot block the event loop."""
    db = watch(FromContext(driver.connection))

    async def use() -> None:
        async with db.alease() as connection:
            assert connection == "connection"
            raise ValueError

    with pytest.raises(ValueError):
        await use()
    assert driver.events == ["enter", "rollback", "exit"]
    assert threading.get_ident() not in driver.threads


def test_async_managers_are_refused_in_sync_code(driver: Driver) -> None:
    """Beforehand where it can be known, else when the manager is seen."""

    class AsyncOnly:
        async def __aenter__(self) -> None: ...
        async def __aexit__(self, *exc: object) -> None: ...

    for factory in (driver.aconnection, partial(driver.aconnection), AsyncOnly):
        known = FromContext(factory)
        assert known.needs_loop
        with pytest.raises(ConfigurationError, match="needs an event loop"):
            known.lease()
    unknown = FromContext(lambda: AsyncOnly())
    assert not unknown.needs_loop
    with pytest.raises(ConfigurationError, match="context manager for 'with'"), unknown.lease():
        pass


async def test_what_is_no_context_manager_is_refused() -> None:
    """When it is declared, where that can be known, else when it is leased."""

    def generator() -> Iterator[int]:
        yield 1

    async def agenerator() -> AsyncIterator[int]:
        yield 1

    async def coroutine() -> None: ...

    for factory in (generator, agenerator, coroutine):
        with pytest.raises(ConfigurationError, match="must return a context manager"):
            FromContext(factory)
    db: FromContext[Any] = FromContext(lambda: 42)
    with pytest.raises(ConfigurationError, match="got int"), db.lease():
        pass
    with pytest.raises(ConfigurationError, match="got int"):
        async with db.alease():
            pass


def test_an_error_on_entering_is_the_callers(watch: Watch) -> None:
    """Nothing is counted as leased."""

    @contextmanager
    def broken() -> Iterator[None]:
        raise ConnectionError("down")
        yield

    db = watch(FromContext(broken))
    with pytest.raises(ConnectionError), db.lease():
        pass
    assert db.stats().leases == 0


async def test_stop_iteration_is_an_error_like_others(watch: Watch) -> None:
    """asyncio's futures refuse it: unless it is wrapped, its caller waits for ever."""

    class Exhausted:
        def __enter__(self) -> None:
            next(iter([]))

        def __exit__(self, *exc: object) -> None: ...

    async def aclose(thing: object) -> None: ...

    def exhausted() -> object:
        return next(iter([]))

    async def use(resource: Any) -> None:
        async with resource.alease():
            pass

    for resource in (FromContext(Exhausted), Pool(exhausted, close=aclose), Pool(exhausted)):
        with pytest.raises(RuntimeError, match="StopIteration"):
            await asyncio.wait_for(use(watch(resource)), 10)


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_cancelled_while_entering(watch: Watch, kind: str) -> None:
    """What was entered for a caller that has left is left again."""
    entering, go_on, ago_on = threading.Event(), threading.Event(), asyncio.Event()
    events: list[str] = []

    class Connection:
        def __enter__(self) -> None:
            entering.set()
            assert go_on.wait(10)

        def __exit__(self, *exc: object) -> None:
            events.append("exit")

    @asynccontextmanager
    async def aconnection() -> AsyncIterator[None]:
        entering.set()
        try:
            await ago_on.wait()
            yield
        finally:
            events.append("exit")

    db = watch(FromContext(Connection if kind == "sync" else aconnection))

    async def use() -> None:
        async with db.alease():
            raise AssertionError("entered")

    task = asyncio.create_task(use())
    await auntil(entering.is_set)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go_on.set()
    await auntil(lambda: events == ["exit"])


async def test_a_coroutine_destroyed_while_entering_leaves_again() -> None:
    """As when it is cancelled: nobody else could give back what the driver hands out."""
    entering, go_on, left = threading.Event(), threading.Event(), threading.Event()

    class Connection:
        def __enter__(self) -> None:
            entering.set()
            assert go_on.wait(10)

        def __exit__(self, *exc: object) -> None:
            left.set()

    enter = FromContext(Connection).alease().__aenter__()
    waits_for = enter.send(None)
    await auntil(entering.is_set)
    enter.close()
    go_on.set()
    await auntil(left.is_set)
    assert waits_for is not None


async def test_making_a_sync_context_manager_does_not_block_the_loop(watch: Watch) -> None:
    """A factory may wait in the call itself, as ``engine.connect`` of SQLAlchemy does."""
    free = threading.Semaphore(1)
    threads: list[int] = []

    @contextmanager
    def released() -> Iterator[str]:
        try:
            yield "connection"
        finally:
            free.release()

    def connect() -> Any:
        assert free.acquire(timeout=10)
        threads.append(threading.get_ident())
        return released()

    db = watch(FromContext(connect))

    async def use() -> None:
        async with db.alease() as connection:
            assert connection == "connection"
            await asyncio.sleep(0)

    await asyncio.gather(*(use() for _ in range(20)))
    assert threads.count(threading.get_ident()) == 1  # the first, which showed what they are


async def test_a_manager_is_never_left_on_the_loop(watch: Watch) -> None:
    """Neither for one who was cancelled just when it was entered, nor for one who forgot it."""
    left: list[int] = []
    entered = threading.Event()

    class Connection:
        def __enter__(self) -> None:
            entered.set()

        def __exit__(self, *exc: object) -> None:
            left.append(threading.get_ident())

    db = watch(FromContext(Connection))

    async def use() -> None:
        async with db.alease():
            await asyncio.Event().wait()

    for ticks in range(6):
        entered.clear()
        task = asyncio.create_task(use())
        await asyncio.sleep(0)
        assert entered.wait(10)  # the loop has not heard of it yet
        await passes(ticks)
        task.cancel()
        await asyncio.wait([task])
        await auntil(lambda ticks=ticks: len(left) == ticks + 1)  # type: ignore[misc]

    async def forget() -> None:
        await db.alease().__aenter__()
        gc.collect()

    with pytest.warns(ResourceWarning, match="never given back"):
        await forget()
    await auntil(lambda: len(left) == 7)
    assert threading.get_ident() not in left


async def test_many_async_callers_take_few_threads(watch: Watch) -> None:
    """They wait for their turn, and for one that leaves in the meantime nothing is made."""
    inside: list[int] = []
    most, entered = [0], []
    lock, go_on = threading.Lock(), threading.Event()

    class Connection:
        def __init__(self) -> None:
            self.number = next(numbers)

        def __enter__(self) -> None:
            with lock:  # or a thread that looked before another one did writes after it
                inside.append(self.number)
                most[0] = max(most[0], len(inside))
            assert go_on.wait(PATIENCE)
            inside.remove(self.number)
            entered.append(self.number)

        def __exit__(self, *exc: object) -> None: ...

    numbers = itertools.count()  # in whichever thread each of them is made
    db = watch(FromContext(Connection))

    async def use() -> None:
        async with db.alease():
            pass

    tasks = [asyncio.create_task(use()) for _ in range(200)]
    await auntil(lambda: len(inside) == ENTERING)
    tasks[100].cancel()
    await asyncio.wait([tasks[100]])
    go_on.set()
    await asyncio.wait(tasks)
    assert sorted(entered) == list(range(199))
    assert most[0] == ENTERING
    assert db.stats().leases == 199


def test_a_lease_is_one_shot(watch: Watch, driver: Driver) -> None:
    """Entered or given back a second time, or given back unentered, it raises."""
    db = watch(FromContext(driver.connection))
    lease = db.lease()
    with pytest.raises(LeaseError, match="not entered"):
        lease.__exit__(None, None, None)
    with lease, pytest.raises(LeaseError, match="entered already"):
        lease.__enter__()
    with pytest.raises(LeaseError, match="given back already"):
        lease.__exit__(None, None, None)


async def test_a_forgotten_lease_is_left(watch: Watch, driver: Driver) -> None:
    """With a warning that says where it was taken."""
    for factory, kind in ((driver.connection, "sync"), (driver.aconnection, "async")):
        driver.events.clear()
        db = watch(FromContext(factory))
        lease: Any = db.lease() if kind == "sync" else db.alease()
        if kind == "sync":
            lease.__enter__()
        else:
            await lease.__aenter__()
        with pytest.warns(ResourceWarning, match=r"test_context.py:\d+ was never given back"):
            del lease
        await auntil(lambda: driver.events == ["enter", "exit"])
        assert db.stats().forgotten == 1


async def test_heartbeat_is_called_while_the_driver_waits(watch: Watch, impatient: None) -> None:
    """Also where the waiting is done by somebody else's pool."""
    beats: list[int] = []
    enough = asyncio.Event()

    def beat() -> None:
        beats.append(1)
        if len(beats) == 3:
            enough.set()

    @asynccontextmanager
    async def connection() -> AsyncIterator[None]:
        await enough.wait()
        yield

    async with watch(FromContext(connection)).alease(heartbeat=beat):
        pass
    assert len(beats) >= 3


@pytest.mark.parametrize("kind", [Pool, Shared, FromContext])
async def test_the_wrong_with_is_told_the_right_one(kind: Any) -> None:
    """``with alease()`` and ``async with lease()``, of every kind of resource."""
    resource = kind(nullcontext)
    match = r"alease\(\.\.\.\) is for 'async with'"
    with pytest.raises(ConfigurationError, match=match), resource.alease():
        pass
    with pytest.raises(ConfigurationError, match=r"'async with' takes is alease\(\.\.\.\)"):
        async with resource.lease():
            pass
    assert resource.stats().in_use == 0
    await resource.aclose()


async def test_leases_are_context_managers_of_one_kind(watch: Watch) -> None:
    """What a lease says to the wrong ``with`` does not make it fit for that."""
    pool = watch(Pool(lambda: "db", max_size=1))
    db = FromContext(pool.lease)
    async with db.alease() as obj:
        assert obj == "db"
    other = FromContext(pool.alease)
    with pytest.raises(ConfigurationError, match="context manager for 'with'"), other.lease():
        pass


async def test_a_closed_one_hands_nothing_out(driver: Driver) -> None:
    """The driver's pool itself is not touched: it belongs to somebody else."""
    db = FromContext(driver.connection)
    with db.lease():
        await db.aclose()
    with pytest.raises(PoolClosed), db.lease():
        pass
    with pytest.raises(PoolClosed):
        async with db.alease():
            pass
    check_at_rest(db)
    assert driver.events == ["enter", "exit"]


async def test_a_destroyed_coroutine_leaves_its_sync_manager(watch: Watch, driver: Driver) -> None:
    """Although it must not wait for the thread that does it."""
    db = watch(FromContext(driver.connection))

    async def body() -> None:
        async with db.alease():
            await asyncio.Event().wait()

    task = asyncio.ensure_future(body())
    await auntil(lambda: db.stats().in_use == 1)
    task.get_coro().close()  # type: ignore[union-attr]
    until(lambda: driver.events == ["enter", "exit"])
    task.cancel()
    await asyncio.wait([task])


def test_real_psycopg_pool_is_known_to_be_async() -> None:
    """``AsyncConnectionPool.connection`` is recognised before anything is leased."""
    pool = pytest.importorskip("psycopg_pool", exc_type=ImportError)
    sync = pool.ConnectionPool("", open=False)
    asynchronous = pool.AsyncConnectionPool("", open=False)
    assert not FromContext(sync.connection).needs_loop
    assert FromContext(asynchronous.connection).needs_loop
