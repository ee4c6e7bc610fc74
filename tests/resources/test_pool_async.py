"""``Pool`` for async callers, and for both at once."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import pytest

from langgraph_perf.errors import (
    LeaseError,
    PoolClosed,
    PoolTimeout,
    ResourceError,
    TooManyWaiting,
)
from langgraph_perf.resources import Pool, Shared, _core, _offload
from langgraph_perf.resources import _lease as lease_module
from langgraph_perf.resources._waiters import TaskWaiter

from .helpers import FakeTime, Holder, Maker, Thing, auntil, check_sound, passes, until

Watch = Callable[[Pool[Any]], Pool[Thing]]
Task = asyncio.Task[Any]


class AsyncHolder:
    """A task that leases, and holds on until it is told to let go."""

    def __init__(self, pool: Pool[Any], **options: Any) -> None:
        self.got = asyncio.Event()
        self.let_go = asyncio.Event()
        self.value: Any = None
        self.task = asyncio.create_task(self._run(pool, options))

    async def _run(self, pool: Pool[Any], options: Any) -> None:
        async with pool.alease(**options) as self.value:
            self.got.set()
            await self.let_go.wait()

    async def finish(self) -> None:
        await asyncio.wait_for(self.got.wait(), 10)
        self.let_go.set()
        await self.task


def pool_of(kind: str, maker: Maker, **options: Any) -> Pool[Any]:
    """A pool whose functions are all sync or all async."""
    if kind == "sync":
        return Pool(maker.create, close=maker.close, **options)
    return Pool(maker.acreate, close=maker.aclose, **options)


both = pytest.mark.parametrize("kind", ["sync", "async"])


@both
async def test_a_lease_gives_an_object_and_takes_it_back(
    watch: Watch, maker: Maker, kind: str
) -> None:
    """What a lease gave is leased again afterwards, not made again."""
    pool = watch(pool_of(kind, maker))
    async with pool.alease() as first:
        assert pool.stats().in_use == 1
    async with pool.alease() as second:
        assert second is first
    await pool.aclose()
    assert maker.closed == [first]


async def test_sync_functions_run_off_the_loop(watch: Watch, maker: Maker) -> None:
    """Create, check, reset and close of an async caller run on private threads."""
    pool = watch(
        Pool(maker.create, max_size=1, check=maker.check, reset=maker.reset, close=maker.close)
    )
    async with pool.alease():
        pass
    maker.bad_checks.append(False)
    async with pool.alease():
        pass
    await pool.aclose()
    assert len(maker.closed) == 2
    assert all(name.startswith("langgraph-perf-worker") for name in maker.threads)


@pytest.mark.parametrize(
    "asyncs",
    list(itertools.product([False, True], repeat=4)),
    ids=lambda a: "".join("sa"[x] for x in a),
)
async def test_functions_of_both_kinds_in_one_pool(
    watch: Watch, maker: Maker, asyncs: tuple[bool, ...]
) -> None:
    """Create, check, reset and close can each be sync or async."""
    create, check, reset, close = (
        getattr(maker, "a" * is_async + name)
        for is_async, name in zip(asyncs, ("create", "check", "reset", "close"), strict=True)
    )
    pool = watch(Pool(create, max_size=1, check=check, reset=reset, close=close))
    assert pool.needs_loop == any(asyncs)
    things = []
    for bad_checks, bad_resets in (([], []), ([], []), ([False], []), ([], [OSError()]), ([], [])):
        maker.bad_checks.extend(bad_checks)
        maker.bad_resets.extend(bad_resets)
        async with pool.alease(timeout=10) as thing:
            assert not thing.closed
            things.append(thing.number)
        await auntil(lambda: not pool.stats().closing)
    assert things == [0, 0, 1, 1, 2]
    await pool.aclose()
    assert maker.closed == maker.made
    assert len(maker.close_loops) == (3 if asyncs[3] else 0)


async def test_a_load_whose_task_is_destroyed_leaves_nothing_behind(
    watch: Watch, maker: Maker
) -> None:
    """What a thread makes for a load that was cancelled is closed."""
    pool = watch(Pool(maker.create, close=maker.aclose))
    maker.hold = threading.Event()
    before = asyncio.all_tasks()
    holder = AsyncHolder(pool)
    await auntil(maker.entered.is_set)
    (load,) = asyncio.all_tasks() - before - {holder.task}
    load.cancel()
    with pytest.raises(ResourceError, match="the load was cancelled"):
        await holder.task
    assert pool.stats().size == 0
    maker.hold.set()
    await auntil(lambda: len(maker.closed) == 1)


async def test_when_no_thread_can_be_had(
    watch: Watch, maker: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A load that cannot begin fails like any other; a close happens where it is."""
    pool = watch(Pool(maker.create, close=maker.close))
    with monkeypatch.context() as patch:

        def start(self: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        patch.setattr(_offload, "shared", _offload.Workers())
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(RuntimeError, match="can't start"):
            async with pool.alease():
                pass
        with pool.lease():
            pool.close()
        assert len(maker.closed) == 1


@both
async def test_500_tasks_over_2_objects_are_all_served(
    watch: Watch, maker: Maker, kind: str
) -> None:
    """No task is forgotten, refused or given nothing."""
    pool = watch(pool_of(kind, maker, max_size=2))

    async def work() -> Thing:
        async with pool.alease() as thing:
            with thing:
                assert thing.users == 1
                await asyncio.sleep(0)
            return thing

    served = await asyncio.gather(*(work() for _ in range(500)))
    assert set(served) == set(maker.made)
    assert len(maker.made) == 2


async def test_waiters_are_served_first_come_first_served(watch: Watch, maker: Maker) -> None:
    """Nobody who comes later is served before."""
    pool = watch(Pool(maker.create, max_size=1))
    order: list[int] = []

    async def work(number: int) -> None:
        async with pool.alease():
            order.append(number)

    async with pool.alease():
        tasks = [asyncio.create_task(work(number)) for number in range(20)]
        await auntil(lambda: pool.stats().waiting == 20)
    await asyncio.gather(*tasks)
    assert order == list(range(20))


async def test_threads_and_tasks_share_one_queue(watch: Watch, maker: Maker) -> None:
    """Who came first is served first, be it a thread or a task."""
    pool = watch(Pool(maker.create, max_size=1))
    first = Holder(pool)
    await auntil(first.got.is_set)
    task = AsyncHolder(pool)
    await auntil(lambda: pool.stats().waiting == 1)
    last = Holder(pool)
    await auntil(lambda: pool.stats().waiting == 2)
    first.let_go.set()
    await asyncio.wait_for(task.got.wait(), 10)
    assert not last.got.is_set()
    await task.finish()
    await auntil(last.got.is_set)
    assert last.value is task.value is first.value
    last.finish()


async def test_32_threads_and_500_tasks_on_one_pool(watch: Watch, maker: Maker) -> None:
    """Each object has one owner, and everybody is served."""
    pool = watch(Pool(maker.create, max_size=5, close=maker.close))
    served = []

    def thread_work() -> None:
        for _ in range(10):
            with pool.lease() as thing, thing:
                served.append(thing.users)

    async def task_work() -> None:
        async with pool.alease() as thing:
            with thing:
                served.append(thing.users)
                await asyncio.sleep(0)

    threads = [threading.Thread(target=thread_work) for _ in range(32)]
    for thread in threads:
        thread.start()
    await asyncio.gather(*(task_work() for _ in range(500)))
    await asyncio.to_thread(lambda: [thread.join() for thread in threads])
    assert served == [1] * 820
    assert maker.most_alive <= 5


@both
async def test_a_full_pool_times_out(watch: Watch, maker: Maker, kind: str) -> None:
    """After ``timeout`` seconds, and without a trace."""
    pool = watch(pool_of(kind, maker, max_size=1, timeout=0.01))
    async with pool.alease(timeout=10):
        with pytest.raises(PoolTimeout):
            async with pool.alease():
                pass
        assert pool.stats().waiting == 0
    assert pool.stats().timeouts == 1


@both
async def test_a_slow_load_times_out_and_serves_later_callers(
    watch: Watch, maker: Maker, kind: str
) -> None:
    """bb8 ``test_timeout_caller``: the load goes on, and its object goes to whoever comes next."""
    pool = watch(pool_of(kind, maker, max_size=1))
    maker.hold, maker.ahold = threading.Event(), asyncio.Event()
    with pytest.raises(PoolTimeout):
        async with pool.alease(timeout=0.01):
            pass
    assert pool.stats().loading == 1
    later = AsyncHolder(pool)
    await auntil(lambda: pool.stats().waiting == 1)
    maker.hold.set()
    maker.ahold.set()
    await later.finish()
    assert maker.attempts == 1


async def test_a_slow_async_check_times_out(watch: Watch, maker: Maker, clock: FakeTime) -> None:
    """It is cut short at the deadline, and its object, whose state nobody knows, is closed."""
    ended: list[str] = []

    async def check(thing: Thing) -> None:
        clock.now += 1  # not before: a check that begins too late is not begun
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("cancelled")

    pool = watch(Pool(maker.acreate, max_size=1, check=check, close=maker.aclose))
    async with pool.alease() as first:
        pass
    with pytest.raises(PoolTimeout, match=r"within 0\.01 s"):
        async with pool.alease(timeout=0.01):
            pass
    await auntil(lambda: pool.stats().size == 0)
    assert ended == ["cancelled"]
    assert maker.closed == [first]
    assert pool.stats().timeouts == 1
    await pool.aclose()


@pytest.mark.parametrize("verdict", [True, False])
async def test_a_slow_sync_check_times_out(watch: Watch, maker: Maker, verdict: bool) -> None:
    """A thread cannot be interrupted: the caller leaves at the deadline, the object comes back
    when the check is done with it, and is kept if it has passed."""
    go_on = threading.Event()

    def check(thing: Thing) -> bool:
        assert go_on.wait(10)
        return verdict

    pool = watch(Pool(maker.create, max_size=1, check=check, close=maker.close))
    async with pool.alease() as first:
        pass
    with pytest.raises(PoolTimeout):
        async with pool.alease(timeout=0.01):
            pass
    assert pool.stats().in_use == 1
    go_on.set()
    await auntil(lambda: pool.stats().in_use == pool.stats().closing == 0)
    assert maker.closed == ([] if verdict else [first])
    assert pool.stats().timeouts == 1


async def test_a_checked_object_needs_no_more_than_its_check(watch: Watch, maker: Maker) -> None:
    """A check that ends in time is not a timeout, also where it is a coroutine."""
    pool = watch(Pool(maker.acreate, max_size=1, check=maker.acheck, close=maker.aclose))
    for _ in range(2):
        async with pool.alease(timeout=10) as thing:
            pass
    assert maker.checked == [thing]
    await pool.aclose()


async def test_max_waiting_bounds_the_queue(watch: Watch, maker: Maker) -> None:
    """Who would make the queue too long is refused at once."""
    pool = watch(Pool(maker.create, max_size=1, max_waiting=1))
    async with pool.alease():
        waiter = AsyncHolder(pool)
        await auntil(lambda: pool.stats().waiting == 1)
        with pytest.raises(TooManyWaiting):
            async with pool.alease():
                pass
    await waiter.finish()


@both
async def test_a_failing_create_raises_its_own_error(watch: Watch, maker: Maker, kind: str) -> None:
    """To the one who asked; the one behind tries again."""
    pool = watch(pool_of(kind, maker, max_size=1))
    error = ConnectionError("down")
    maker.hold, maker.ahold = threading.Event(), asyncio.Event()
    maker.errors.append(error)
    first, second = AsyncHolder(pool), AsyncHolder(pool)
    await auntil(lambda: pool.stats().waiting == 1)
    maker.hold.set()
    maker.ahold.set()
    with pytest.raises(ConnectionError) as caught:
        await first.task
    assert caught.value is error
    await second.finish()


async def test_a_load_that_is_cancelled_is_not_the_askers_cancellation(
    watch: Watch, maker: Maker
) -> None:
    """A library that leaks a ``CancelledError`` out of a factory fails one lease, not a task."""

    async def create() -> Thing:
        if not maker.attempts:
            maker.attempts += 1
            raise asyncio.CancelledError
        return await maker.acreate()

    pool = watch(Pool(create))
    with pytest.raises(Exception, match="load was cancelled"):
        async with pool.alease():
            pass
    async with pool.alease():
        pass


async def test_cancelled_in_the_queue(watch: Watch, maker: Maker) -> None:
    """psycopg ``test_cancellation_in_queue``: the others behind move up."""
    pool = watch(Pool(maker.create, max_size=1))
    async with pool.alease():
        tasks = [AsyncHolder(pool) for _ in range(5)]
        await auntil(lambda: pool.stats().waiting == 5)
        for number in (0, 2, 4):
            tasks[number].task.cancel()
        await auntil(lambda: pool.stats().waiting == 2)
    await tasks[1].finish()
    await tasks[3].finish()


@pytest.mark.parametrize("from_thread", [False, True])
async def test_cancelled_in_the_tick_in_which_it_is_handed_an_object(
    watch: Watch, maker: Maker, from_thread: bool
) -> None:
    """psycopg ``test_cancelled_waiter_assigned_conn_is_reclaimed``: the next one gets it."""
    pool = watch(Pool(maker.create, max_size=1))
    holder = Holder(pool)
    await auntil(holder.got.is_set)
    leaving = AsyncHolder(pool)
    await auntil(lambda: pool.stats().waiting == 1)
    staying = AsyncHolder(pool)
    await auntil(lambda: pool.stats().waiting == 2)
    if from_thread:
        holder.finish()  # hands over while this coroutine keeps the loop busy
    else:
        holder._lease.__exit__(None, None, None)
        holder.let_go.set()
    assert pool.stats().waiting == 1  # ``leaving`` has been handed the object
    leaving.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving.task
    await staying.finish()
    assert len(maker.made) == 1
    if not from_thread:
        await auntil(lambda: isinstance(holder.error, LeaseError))


async def test_timed_out_in_the_tick_in_which_it_is_handed_an_object(
    watch: Watch, maker: Maker, clock: Any
) -> None:
    """It keeps the object: time that runs out after the hand-over does not count."""
    pool = watch(Pool(maker.create, max_size=1))
    async with pool.alease():
        waiter = AsyncHolder(pool, timeout=5)
        await auntil(lambda: pool.stats().waiting == 1)
        clock.now += 10
    await waiter.finish()
    assert pool.stats().timeouts == 0


async def test_a_cancelled_task_gives_its_object_back(watch: Watch, maker: Maker) -> None:
    """Cancelled in its block, a task leaves the pool as it was."""
    pool = watch(Pool(maker.create, max_size=1))
    holder = AsyncHolder(pool)
    await holder.got.wait()
    holder.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await holder.task
    assert pool.stats().idle == 1


@both
async def test_cancelled_while_it_loads(watch: Watch, maker: Maker, kind: str) -> None:
    """The load goes on and its object becomes idle."""
    pool = watch(pool_of(kind, maker, max_size=1))
    maker.hold, maker.ahold = threading.Event(), asyncio.Event()
    holder = AsyncHolder(pool)
    await auntil(maker.entered.is_set)
    holder.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await holder.task
    maker.hold.set()
    maker.ahold.set()
    await auntil(lambda: pool.stats().idle == 1)


async def test_cancelled_during_an_async_check(watch: Watch, maker: Maker) -> None:
    """An object whose check was cut short is in an unknown state, so it is closed."""
    checking = asyncio.Event()

    async def check(thing: Thing) -> None:
        checking.set()
        await asyncio.Event().wait()

    pool = watch(Pool(maker.acreate, max_size=1, check=check, close=maker.aclose))
    async with pool.alease() as thing:
        pass
    holder = AsyncHolder(pool)
    await checking.wait()
    holder.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await holder.task
    await auntil(lambda: maker.closed == [thing])


async def test_cancelled_in_the_tick_in_which_its_check_ends(watch: Watch) -> None:
    """The object comes back once: whoever has leased it by then is its only owner."""
    ends: asyncio.Future[bool] | None = None
    checked, owners, most = asyncio.Event(), 0, 0

    async def check(thing: object) -> bool:
        checked.set()
        return True if ends is None else await ends

    async def create() -> object:
        return object()

    pool = watch(Pool(create, max_size=1, check=check))
    async with pool.alease():
        pass
    ends = asyncio.get_running_loop().create_future()
    checked.clear()
    victim = AsyncHolder(pool)
    await checked.wait()

    async def use() -> None:
        nonlocal owners, most
        async with pool.alease():
            owners += 1
            most = max(most, owners)
            await passes()
            owners -= 1

    users = [asyncio.create_task(use()) for _ in range(5)]
    await auntil(lambda: pool.stats().waiting == 5)
    asyncio.get_running_loop().call_soon(victim.task.cancel)
    ends.set_result(True)
    ends = None
    await asyncio.wait(users)
    with pytest.raises(asyncio.CancelledError):
        await victim.task
    assert most == 1
    assert pool.stats().idle == pool.stats().size == 1


def test_objects_of_a_loop_that_stands_still_are_closed_on_it() -> None:
    """It may go on at any time, and no other loop can close what is its own."""
    closed: list[bool] = []

    async def create() -> Any:
        return asyncio.get_running_loop()

    async def close(home: Any) -> None:
        closed.append(asyncio.get_running_loop() is home)

    async def use(resource: Any) -> None:
        async with resource.alease():
            pass

    first, second = asyncio.new_event_loop(), asyncio.new_event_loop()
    for resource in (Shared(create, close=close), Pool(create, max_size=1, close=close)):
        first.run_until_complete(use(resource))
        second.run_until_complete(use(resource))  # which makes room for it
        first.run_until_complete(passes())
        second.run_until_complete(resource.aclose())
    first.close()
    second.close()
    assert closed == [True] * 4


def test_what_makes_room_is_closed_though_the_loop_that_asked_is_gone() -> None:
    """Nothing is lost with an event loop that is closed by hand in the middle of it."""
    made, closed = [], []

    async def create() -> object:
        made.append(object())
        return made[-1]

    async def close(obj: object) -> None:
        closed.append(obj)

    async def use() -> None:
        async with pool.alease():
            pass

    pool = Pool(create, max_size=1, close=close)
    first, second = asyncio.new_event_loop(), asyncio.new_event_loop()
    first.run_until_complete(use())
    task = second.create_task(use())
    second.call_soon(second.stop)
    second.run_forever()  # it has asked for the place, and its load has not begun
    second.close()
    pool._core.reap()
    first.run_until_complete(passes())
    assert closed == made[:1]
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    task.get_coro().close()
    first.run_until_complete(use())
    first.run_until_complete(pool.aclose())
    first.close()
    assert closed == made


async def test_cancelled_during_a_sync_check(watch: Watch, maker: Maker) -> None:
    """The object comes back when the thread that checks it is done with it, not before."""
    checking, go_on = threading.Event(), threading.Event()

    def check(thing: Thing) -> None:
        checking.set()
        assert go_on.wait(10)

    pool = watch(Pool(maker.create, max_size=1, check=check, close=maker.close))
    async with pool.alease() as thing:
        pass
    holder = AsyncHolder(pool)
    await auntil(checking.is_set)
    holder.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await holder.task
    assert pool.stats().in_use == 1
    go_on.set()
    await auntil(lambda: pool.stats().idle == 1)
    assert not thing.closed


@both
async def test_cancelled_during_reset(watch: Watch, maker: Maker, kind: str) -> None:
    """asyncpg ``test_pool_handles_task_cancel_in_release``: the reset goes on, then it is back."""
    resetting = threading.Event()
    go_on, ago_on = threading.Event(), asyncio.Event()

    def reset(thing: Thing) -> None:
        resetting.set()
        assert go_on.wait(10)

    async def areset(thing: Thing) -> None:
        resetting.set()
        await ago_on.wait()

    pool = watch(pool_of(kind, maker, reset=reset if kind == "sync" else areset))
    holder = AsyncHolder(pool)
    await holder.got.wait()
    holder.let_go.set()
    await auntil(resetting.is_set)
    holder.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await holder.task
    assert pool.stats().in_use == 1
    go_on.set()
    ago_on.set()
    await auntil(lambda: pool.stats().idle == 1)


@both
async def test_a_cancellation_storm(watch: Watch, maker: Maker, kind: str) -> None:
    """Whoever survives is served, and nothing is lost."""
    pool = watch(pool_of(kind, maker, max_size=3))

    async def work(turns: int) -> None:
        async with pool.alease() as thing:
            with thing:
                assert thing.users == 1
                await passes(turns)

    for _ in range(5):
        tasks = [asyncio.create_task(work(number % 4)) for number in range(60)]
        for turn in range(20):
            await asyncio.sleep(0)
            for number in range(turn, 60, 3):
                if number % 2:
                    tasks[number].cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for number, result in enumerate(results):
            if number % 2 == 0:
                assert result is None
            else:
                assert result is None or isinstance(result, asyncio.CancelledError)
        check_sound(pool)
    assert maker.most_alive <= 3


async def test_with_a_timeout_around_the_lease(watch: Watch, maker: Maker) -> None:
    """asyncpg ``test_pool_handles_task_cancel_in_acquire_with_timeout``."""
    pool = watch(Pool(maker.create, max_size=1))
    async with pool.alease():
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(pool.alease().__aenter__(), 0.005)
    assert pool.stats().idle == 1


async def test_a_destroyed_coroutine_gives_its_object_back(watch: Watch, maker: Maker) -> None:
    """Even where it must not await any more; what it could not reset is closed."""
    for reset in (None, maker.reset, maker.areset):
        create, close = (
            (maker.acreate, maker.aclose) if reset == maker.areset else (maker.create, maker.close)
        )
        pool: Pool[Any] = watch(Pool(create, reset=reset, close=close))

        async def body(pool: Pool[Any] = pool) -> None:
            async with pool.alease():
                await asyncio.Event().wait()

        task = asyncio.ensure_future(body())
        await auntil(lambda pool=pool: pool.stats().in_use == 1)
        coroutine = task.get_coro()
        coroutine.close()
        await auntil(lambda pool=pool: pool.stats().in_use == 0)
        assert pool.stats().holders == 0
        await auntil(lambda pool=pool: pool.stats().closing == 0)
        assert pool.stats().idle == (1 if reset is None else 0)
        task.cancel()
        await asyncio.wait([task])


async def test_a_lease_is_one_shot(watch: Watch, maker: Maker) -> None:
    """Entered or given back a second time, it raises."""
    pool = watch(Pool(maker.create))
    lease = pool.alease()
    async with lease:
        with pytest.raises(LeaseError, match="entered already"):
            await lease.__aenter__()
    with pytest.raises(LeaseError, match="given back already"):
        await lease.__aexit__(None, None, None)


async def test_a_forgotten_lease_is_warned_about_and_recovered(watch: Watch) -> None:
    """Also when its object can only be closed on a loop."""

    async def create() -> list[object]:
        return [object()]

    pool = watch(Pool(create, max_size=1))
    lease = pool.alease()
    await lease.__aenter__()
    with pytest.warns(ResourceWarning, match=r"test_pool_async.py:\d+ was never given back"):
        del lease
    assert pool.stats().idle == 1


async def test_waiting_never_blocks_the_loop_nor_its_threads(watch: Watch, maker: Maker) -> None:
    """200 tasks wait for 2 objects; an unrelated ``to_thread`` does not notice."""
    pool = watch(Pool(maker.create, max_size=2))
    loop = asyncio.get_running_loop()

    async def probe() -> float:
        took = []
        for _ in range(100):
            began = time.perf_counter()
            await asyncio.to_thread(int)
            took.append(time.perf_counter() - began)
        return median(took)

    before = await probe()
    async with pool.alease(), pool.alease():
        waiters = [AsyncHolder(pool) for _ in range(200)]
        await auntil(lambda: pool.stats().waiting == 200)
        during = await probe()
        assert loop.is_running()
    for waiter in waiters:
        waiter.let_go.set()
    await asyncio.gather(*(waiter.task for waiter in waiters))
    # what the machine is busy with besides, it is not most of the time
    assert during - before <= 0.100


async def test_blocking_factories_do_not_use_the_default_executor(
    watch: Watch, maker: Maker
) -> None:
    """With the default executor full of blocked work, loads and closes still happen."""
    pool = watch(Pool(maker.create, max_size=1, check=maker.check, close=maker.close))
    release = threading.Event()
    blocked = [asyncio.create_task(asyncio.to_thread(release.wait, 10)) for _ in range(64)]
    await passes()
    async with pool.alease(timeout=5):
        pass
    maker.bad_checks.append(False)
    async with pool.alease(timeout=5):
        pass
    release.set()
    await asyncio.gather(*blocked)


async def test_heartbeat_is_called_while_waiting(
    watch: Watch, maker: Maker, impatient: None
) -> None:
    """In the queue and while an object is being made."""
    pool = watch(Pool(maker.create, max_size=1))
    maker.hold = threading.Event()
    beats: list[str] = []
    loading = AsyncHolder(pool, heartbeat=lambda: beats.append("load"))
    await auntil(lambda: pool.stats().loading == 1)
    queued = AsyncHolder(pool, heartbeat=lambda: beats.append("queue"))
    await auntil(lambda: beats.count("load") > 2 and beats.count("queue") > 2)
    maker.hold.set()
    await loading.finish()
    await queued.finish()


async def test_a_heartbeat_that_raises_ends_the_wait(
    watch: Watch, maker: Maker, impatient: None
) -> None:
    """And leaves the queue in order."""

    def strike() -> None:
        raise RuntimeError("no more")

    pool = watch(Pool(maker.create, max_size=1))
    async with pool.alease():
        with pytest.raises(RuntimeError, match="no more"):
            async with pool.alease(heartbeat=strike):
                pass
        assert pool.stats().waiting == 0


@both
async def test_aclose_with_leases_out(watch: Watch, maker: Maker, kind: str) -> None:
    """Idle objects are closed when it returns, leased ones later; waiters are told."""
    pool = watch(pool_of(kind, maker, max_size=2))
    async with pool.alease() as leased:
        async with pool.alease() as idle:
            waiter = AsyncHolder(pool)
            await auntil(lambda: pool.stats().waiting == 1)
            waiter.task.cancel()
            await asyncio.wait([waiter.task])
        await pool.aclose()
        assert maker.closed == [idle]
        with pytest.raises(PoolClosed):
            async with pool.alease():
                pass
        await pool.aclose()
    await auntil(lambda: maker.closed == [idle, leased])
    if kind == "sync":  # closed when it came back, but not by the event loop's thread
        assert all(name.startswith("langgraph-perf-worker") for name in maker.threads)


@both
async def test_aclose_tells_those_who_wait(watch: Watch, maker: Maker, kind: str) -> None:
    """In the queue and for a load alike; what is still being made is closed when it is there."""
    pool = watch(pool_of(kind, maker, max_size=1))
    maker.hold, maker.ahold = threading.Event(), asyncio.Event()
    waiters = [AsyncHolder(pool) for _ in range(3)]
    await auntil(lambda: pool.stats().waiting == 2)
    await pool.aclose()
    for waiter in waiters:
        with pytest.raises(PoolClosed):
            await asyncio.wait_for(waiter.task, 5)
    maker.hold.set()
    maker.ahold.set()
    await auntil(lambda: len(maker.closed) == 1)


async def test_objects_are_closed_on_the_loop_that_made_them(watch: Watch, maker: Maker) -> None:
    """When discarded, when the pool is closed, and from whichever thread."""
    here = asyncio.get_running_loop()
    pool = watch(Pool(maker.acreate, max_size=2, check=maker.acheck, close=maker.aclose))
    async with pool.alease(), pool.alease():
        pass
    maker.bad_checks.append(False)
    async with pool.alease():
        pass
    await asyncio.to_thread(pool.close)
    assert maker.close_loops == [here] * 3


async def test_close_on_the_loop_itself(watch: Watch, maker: Maker) -> None:
    """A sync ``close`` cannot wait for its own loop: the objects are closed right afterwards."""
    pool = watch(Pool(maker.acreate, close=maker.aclose))
    async with pool.alease():
        pass
    pool.close()
    assert maker.closed == []
    await auntil(lambda: maker.closed == maker.made)
    assert maker.close_loops == [asyncio.get_running_loop()]


def test_close_when_the_loop_is_not_running(watch: Watch, maker: Maker) -> None:
    """It is run for as long as that takes."""
    pool = watch(Pool(maker.acreate, close=maker.aclose))
    loop = asyncio.new_event_loop()

    async def use() -> None:
        async with pool.alease():
            pass

    loop.run_until_complete(use())
    pool.close()
    assert maker.close_loops == [loop]
    loop.close()


async def test_close_does_not_wait_for_ever(
    watch: Watch, maker: Maker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An async close that hangs on its loop is left behind after a while."""
    monkeypatch.setattr(_core, "CLOSE_GRACE", 0.01)
    let_go = asyncio.Event()

    async def close(thing: Thing) -> None:
        await let_go.wait()
        maker.close(thing)

    pool = watch(Pool(maker.acreate, close=close))
    async with pool.alease():
        pass
    await asyncio.to_thread(pool.close)
    assert "not waited for any more" in caplog.text
    let_go.set()
    await auntil(lambda: maker.closed == maker.made)


def test_two_event_loops_one_after_the_other(watch: Watch, maker: Maker) -> None:
    """What belongs to a closed loop is not handed out; it is closed as well as can be."""
    pool = watch(Pool(maker.acreate, max_size=1, close=maker.aclose))

    async def use() -> Thing:
        async with pool.alease(timeout=5) as thing:
            return thing

    first, second = asyncio.run(use()), asyncio.run(use())
    assert first is not second
    until(lambda: first.closed and pool.stats().size == 1)


def test_a_close_that_hangs_without_its_loop_delays_nobody(watch: Watch, maker: Maker) -> None:
    """Objects of a closed loop are closed in the background, not in the next caller's time."""
    let_go = threading.Event()

    async def close(thing: Thing) -> None:
        if thing.number == 0:
            await auntil(let_go.is_set)
        maker.close(thing)

    pool = watch(Pool(maker.acreate, max_size=1, close=close))

    async def use() -> Thing:
        async with pool.alease(timeout=5) as thing:
            return thing

    first, second = asyncio.run(use()), asyncio.run(use())
    assert first is not second
    assert not first.closed
    let_go.set()
    until(lambda: first.closed)


def test_sync_objects_survive_their_event_loop(watch: Watch, maker: Maker) -> None:
    """Objects of sync functions work anywhere, so the next loop, or thread, gets them."""
    pool = watch(Pool(maker.create, max_size=1))

    async def use() -> Thing:
        async with pool.alease() as thing:
            return thing

    first, second = asyncio.run(use()), asyncio.run(use())
    with pool.lease() as third:
        assert first is second is third


def test_a_waiter_on_a_closed_loop_is_passed_over(watch: Watch, maker: Maker) -> None:
    """What comes back goes to the next one who can still take it."""
    pool = watch(Pool(maker.create, max_size=1))
    loop = asyncio.new_event_loop()

    async def wait() -> None:
        async with pool.alease():
            raise AssertionError("handed to a closed loop")

    lease = pool.lease()
    lease.__enter__()
    task = loop.create_task(wait())
    loop.run_until_complete(passes())
    waiter = Holder(pool)
    until(lambda: pool.stats().waiting == 2)
    loop.close()
    lease.__exit__(None, None, None)
    waiter.wait()
    waiter.finish()
    assert pool.stats().leases == 2
    coroutine = task.get_coro()
    task._log_destroy_pending = False
    coroutine.close()


def test_a_loop_that_closes_while_it_is_woken(watch: Watch, maker: Maker) -> None:
    """The hand-over that comes too late goes on to the next one."""
    pool = watch(Pool(maker.create, max_size=1))

    async def never_woken() -> TaskWaiter:
        waiter = TaskWaiter(None, None, pool._core.clock(), 5)
        waiter.alive = lambda: not waiter.gone  # type: ignore[method-assign]
        return waiter

    waiter = asyncio.run(never_woken())
    with pool.lease():
        pool._core.take(waiter)
    with pool.lease(timeout=0):
        pass


def test_loads_lost_with_their_loop_free_their_places(
    watch: Watch, maker: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loop that is closed in the middle of a load does not take the place with it."""
    monkeypatch.setattr(lease_module, "LOOK_AGAIN_SECONDS", 0.005)
    pool = watch(Pool(maker.acreate, max_size=1, close=maker.aclose))
    loop = asyncio.new_event_loop()

    async def stall() -> None:
        maker.ahold = asyncio.Event()
        async with pool.alease():
            raise AssertionError("never loaded")

    task = loop.create_task(stall())
    loop.run_until_complete(passes())
    assert pool.stats().loading == 1
    loop.close()
    maker.ahold = None

    async def use() -> Thing:
        async with pool.alease(timeout=5) as thing:
            return thing

    assert asyncio.run(use()) in maker.made
    stalled = [task, *asyncio.all_tasks(loop)]
    for each in stalled:
        each._log_destroy_pending = False
        each.get_coro().close()


async def test_two_live_loops_share_the_places(watch: Watch, maker: Maker) -> None:
    """Each loop gets objects of its own; an idle one of the other loop makes room."""
    pool = watch(Pool(maker.acreate, max_size=1, close=maker.aclose))
    async with pool.alease() as mine:
        pass

    async def use() -> Thing:
        async with pool.alease(timeout=5) as thing:
            return thing

    theirs = await asyncio.to_thread(asyncio.run, use())
    assert theirs is not mine
    assert mine.closed
    assert maker.close_loops == [asyncio.get_running_loop()]
    assert maker.most_alive == 1
    async with pool.alease(timeout=5) as again:
        assert again not in (mine, theirs)
