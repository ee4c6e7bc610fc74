"""What nobody comes back for: tasks that never begin, loops closed by hand, leases left twice."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest

from langgraph_perf.errors import LeaseError, PoolTimeout
from langgraph_perf.resources import MAX_OVERTAKE_SECONDS, Keyed, Pool, Shared, _work
from langgraph_perf.resources import _core as core_module
from langgraph_perf.resources._lease import BaseLease
from langgraph_perf.resources._waiters import ThreadWaiter

from .helpers import PATIENCE, FakeTime, Holder, Maker, Thing, auntil, passes, until

Watch = Callable[[Any], Any]


async def use(resource: Any, *key: object) -> Any:
    """Lease once."""
    async with resource.alease(*key) as thing:
        return thing


async def cancel_others() -> None:
    """Cancel every task but this one, as the end of ``asyncio.run`` does."""
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
    await passes(10)


def abandoned(main: Callable[[], Coroutine[Any, Any, object]]) -> None:
    """Run ``main`` on an event loop that is then closed by hand, with what still runs on it."""
    loop = asyncio.new_event_loop()
    loop.run_until_complete(main())
    loop.close()


# -- tasks that are cancelled before their first step ----------------------------------------------


async def test_a_load_that_never_begins(watch: Watch, maker: Maker) -> None:
    """Its place is free again."""
    pool = watch(Pool(maker.acreate, max_size=1, timeout=5))
    asyncio.create_task(use(pool))  # noqa: RUF006
    await asyncio.sleep(0)
    await cancel_others()
    assert pool.stats().loading == 0
    assert await use(pool) is maker.made[0]


async def test_a_load_in_whose_place_an_object_stands(watch: Watch, maker: Maker) -> None:
    """Which is closed all the same."""
    models = watch(Keyed(maker.acreate, max_size=1, timeout=5, close=maker.aclose))
    await use(models, "a")
    asyncio.create_task(use(models, "b"))  # noqa: RUF006
    await asyncio.sleep(0)
    await cancel_others()
    await auntil(lambda: models.stats().size == 0)
    assert maker.alive == 0
    await use(models, "c")
    await models.aclose()


async def test_a_reset_that_never_begins(watch: Watch, maker: Maker) -> None:
    """Its object is closed, and its place is free again."""
    pool = watch(Pool(maker.acreate, max_size=1, timeout=5, reset=maker.areset, close=maker.aclose))
    await use(pool)
    asyncio.create_task(use(pool))  # noqa: RUF006
    await asyncio.sleep(0)
    await cancel_others()
    await auntil(lambda: pool.stats().size == 0)
    assert maker.alive == 0
    await use(pool)
    await pool.aclose()


async def test_a_close_that_never_begins(watch: Watch, maker: Maker, clock: FakeTime) -> None:
    """It begins once more."""
    pool = watch(Pool(maker.acreate, max_size=1, max_lifetime=1, timeout=5, close=maker.aclose))
    async with pool.alease():
        clock.now += 2
    assert pool.stats().closing == 1
    await cancel_others()
    await auntil(lambda: pool.stats().size == 0)
    assert maker.alive == 0


def pool_of_idle(kind: str, maker: Maker, **options: Any) -> Pool[Any]:
    """A pool whose functions are all sync or all async."""
    if kind == "sync":
        return Pool(maker.create, close=maker.close, **options)
    return Pool(maker.acreate, close=maker.aclose, **options)


@pytest.mark.parametrize("end", ["the caller", "everybody"])
@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_an_aclose_that_is_cancelled(watch: Watch, maker: Maker, kind: str, end: str) -> None:
    """The objects were taken out of the pool, so nobody else would ever close them."""
    pool = watch(pool_of_idle(kind, maker, max_size=2))
    async with pool.alease(), pool.alease():
        pass
    closing = asyncio.create_task(pool.aclose())
    await asyncio.sleep(0)
    if end == "the caller":
        closing.cancel()
    else:
        await cancel_others()
    with pytest.raises(asyncio.CancelledError):
        await closing
    await auntil(lambda: pool.stats().closing == 0)
    await auntil(lambda: maker.alive == 0)
    assert (pool.stats().closed, pool.stats().size) == (2, 0)
    await auntil(lambda: not _work._tasks.get(asyncio.get_running_loop()))


async def test_an_aclose_that_is_cancelled_while_it_closes(watch: Watch, maker: Maker) -> None:
    """Its caller leaves, and the closes go on to their ends."""
    go_on = asyncio.Event()
    begun: list[Thing] = []

    async def close(thing: Thing) -> None:
        begun.append(thing)
        await go_on.wait()
        maker.close(thing)

    pool = watch(Pool(maker.acreate, max_size=2, close=close))
    async with pool.alease(), pool.alease():
        pass
    closing = asyncio.create_task(pool.aclose())
    await auntil(lambda: len(begun) == 2)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert (pool.stats().closing, pool.stats().closed) == (2, 0)
    go_on.set()
    await auntil(lambda: pool.stats().closed == 2)
    assert maker.alive == 0


@pytest.mark.parametrize("cancelled", [False, True])
async def test_a_failing_close_is_logged_and_stops_no_other(
    watch: Watch, maker: Maker, caplog: pytest.LogCaptureFixture, cancelled: bool
) -> None:
    """Whether or not the caller of ``aclose`` is still there."""

    async def close(thing: Thing) -> None:
        maker.close(thing)
        raise ValueError(thing.number)

    pool = watch(Pool(maker.acreate, max_size=2, close=close))
    async with pool.alease(), pool.alease():
        pass
    closing = asyncio.create_task(pool.aclose())
    if cancelled:
        await asyncio.sleep(0)
        closing.cancel()
    await asyncio.wait([closing])
    assert closing.cancelled() is cancelled
    await auntil(lambda: pool.stats().closed == 2)
    assert caplog.text.count("close failed") == 2


# -- event loops that are closed by hand -----------------------------------------------------------


def test_a_reset_whose_loop_is_closed(watch: Watch, maker: Maker) -> None:
    """Its object has had its time; the next loop gets a new one."""
    reset_on: list[object] = []

    async def reset(thing: Thing) -> None:
        reset_on.append(asyncio.get_running_loop())
        if len(reset_on) == 1:
            await asyncio.Event().wait()

    pool = watch(Pool(maker.acreate, max_size=1, timeout=5, reset=reset))

    async def leave() -> None:
        asyncio.create_task(use(pool))  # noqa: RUF006
        await auntil(lambda: len(reset_on) == 1)

    abandoned(leave)
    assert asyncio.run(use(pool)) is maker.made[1]


def test_a_check_whose_loop_is_closed(watch: Watch, maker: Maker, clock: FakeTime) -> None:
    """Nobody waits for it any more, and it does not end when it is told to."""
    checks = 0

    async def check(thing: Thing) -> None:
        nonlocal checks
        checks += 1
        clock.now += 1  # not before: a check that begins too late is not begun
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                continue

    pool = watch(Pool(maker.acreate, max_size=1, check=check))

    async def leave() -> None:
        await use(pool)
        with pytest.raises(PoolTimeout):
            async with pool.alease(timeout=0.01):
                pass
        assert checks == 1

    abandoned(leave)
    assert asyncio.run(use(pool)) is maker.made[1]


def test_what_is_made_on_a_thread_for_a_closed_loop(watch: Watch, maker: Maker) -> None:
    """It is closed as soon as it is there, without anybody having to ask."""
    maker.hold = threading.Event()
    pool = watch(Pool(maker.create, max_size=1, close=maker.aclose))

    async def leave() -> None:
        asyncio.create_task(use(pool))  # noqa: RUF006
        await auntil(maker.entered.is_set)

    abandoned(leave)
    maker.hold.set()
    until(lambda: len(maker.closed) == 1)
    until(lambda: pool.stats().loading == 0)


# -- event loops that are just ending --------------------------------------------------------------


class EndingLoop:
    """A thread whose event loop has come to the last line of its program when it is told to close
    something, and ends before it comes to that."""

    def __init__(self, resource: Any) -> None:
        self._resource = resource
        self._at_its_end = threading.Event()
        self._told = threading.Event()
        self._thread = threading.Thread(target=asyncio.run, args=(self._main(),), daemon=True)
        self._thread.start()
        assert self._at_its_end.wait(PATIENCE)

    async def _main(self) -> None:
        await use(self._resource)
        loop: Any = asyncio.get_running_loop()
        tell = loop.call_soon_threadsafe

        def told(*args: Any, **options: Any) -> Any:
            handle = tell(*args, **options)
            self._told.set()
            return handle

        loop.call_soon_threadsafe = told
        self._at_its_end.set()
        assert self._told.wait(PATIENCE)

    def join(self) -> None:
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()


async def close_slowly(maker: Maker, thing: Thing) -> None:
    """Close an object in more than one step."""
    await asyncio.sleep(0)
    maker.close(thing)


@pytest.mark.parametrize("how", ["close", "aclose", "make room"])
def test_objects_of_a_loop_that_is_ending(watch: Watch, maker: Maker, how: str) -> None:
    """Its last act is to cancel the task that was to close them before it begins."""
    pool = watch(Pool(maker.acreate, max_size=1, close=functools.partial(close_slowly, maker)))
    ending = EndingLoop(pool)
    if how == "close":
        pool.close()
    elif how == "aclose":
        asyncio.run(pool.aclose())
    else:
        asyncio.run(use(pool))
    ending.join()
    until(lambda: maker.made[0].closed)
    assert pool.stats().closed == 1
    until(lambda: pool.stats().closing == 0)


@pytest.mark.parametrize("how", ["close", "aclose", "make room"])
def test_objects_of_a_loop_that_never_goes_on(watch: Watch, maker: Maker, how: str) -> None:
    """A loop that is closed forgets what it was told to do; others who look find it."""
    pool = watch(Pool(maker.acreate, max_size=1, close=maker.aclose))
    loop = asyncio.new_event_loop()
    loop.run_until_complete(use(pool))

    async def close_from_elsewhere() -> None:
        if how == "close":
            pool.close()
        elif how == "aclose":
            await pool.aclose()
        else:
            await use(pool)

    asyncio.run(close_from_elsewhere())
    assert not maker.made[0].closed
    loop.close()
    pool.close()
    until(lambda: maker.made[0].closed)


@pytest.mark.parametrize("how", ["close", "aclose"])
def test_who_waits_for_a_close_sees_that_its_loop_was_closed(
    watch: Watch, maker: Maker, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loop that is stopped and closed by hand does not cancel anything: it just does nothing."""
    pool = watch(Pool(maker.acreate, max_size=1, close=maker.aclose))
    loop = asyncio.new_event_loop()
    loop.run_until_complete(use(pool))
    monkeypatch.setattr(loop, "is_running", lambda: not loop.is_closed())
    told = threading.Event()
    monkeypatch.setattr(loop, "call_soon_threadsafe", lambda work: told.set())

    def close_loop() -> None:
        assert told.wait(PATIENCE)
        monkeypatch.undo()
        loop.close()

    other = threading.Thread(target=close_loop)
    other.start()
    if how == "close":
        pool.close()
    else:
        asyncio.run(pool.aclose())
    other.join(PATIENCE)
    assert maker.made[0].closed
    assert pool.stats().closed == 1


def test_a_loop_that_goes_on_in_the_moment_it_is_to_be_run(
    watch: Watch, maker: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody can know whether another thread is about to run it; it closes its object then."""
    pool = watch(Pool(maker.acreate, max_size=1, close=maker.aclose))
    loop = asyncio.new_event_loop()
    loop.run_until_complete(use(pool))
    run = loop.run_until_complete
    refused = threading.Event()
    other = threading.Thread(target=run, args=(auntil(refused.is_set),))

    def run_too_late(work: Any) -> None:
        other.start()
        until(loop.is_running)
        try:
            run(work)
        finally:
            refused.set()

    monkeypatch.setattr(loop, "run_until_complete", run_too_late)
    pool.close()
    other.join(PATIENCE)
    assert maker.close_loops == [loop]
    loop.close()


# -- leases that are used twice at the same time ---------------------------------------------------


every_kind = pytest.mark.parametrize(
    ("kind", "key"), [(Pool, None), (Shared, None), (Keyed, "a")], ids=["Pool", "Shared", "Keyed"]
)


@every_kind
def test_a_lease_is_entered_once(watch: Watch, maker: Maker, kind: Any, key: Any) -> None:
    """Whenever the second time comes, it is an error, so nothing is lost."""
    maker.hold = threading.Event()
    resource = watch(kind(maker.create))
    lease = resource.lease(key)
    got: list[object] = []
    first = threading.Thread(target=lambda: got.append(lease.__enter__()))
    first.start()
    until(maker.entered.is_set)
    with pytest.raises(LeaseError, match="entered already"):  # while it is entered
        lease.__enter__()
    maker.hold.set()
    first.join(PATIENCE)
    assert got == maker.made
    with pytest.raises(LeaseError, match="entered already"):  # while it is held
        lease.__enter__()
    lease.__exit__(None, None, None)
    with pytest.raises(LeaseError, match="entered already"):  # after it was given back
        lease.__enter__()
    assert (resource.stats().leases, resource.stats().loads) == (1, 1)


@every_kind
async def test_an_async_lease_is_entered_once(
    watch: Watch, maker: Maker, kind: Any, key: Any
) -> None:
    """Like a plain one, also by two tasks at once."""
    maker.ahold = asyncio.Event()
    resource = watch(kind(maker.acreate))
    lease = resource.alease(key)
    first = asyncio.create_task(lease.__aenter__())
    await auntil(maker.entered.is_set)
    with pytest.raises(LeaseError, match="entered already"):  # while it is entered
        await asyncio.wait_for(lease.__aenter__(), PATIENCE)
    maker.ahold.set()
    assert [await first] == maker.made
    with pytest.raises(LeaseError, match="entered already"):  # while it is held
        await lease.__aenter__()
    await lease.__aexit__(None, None, None)
    with pytest.raises(LeaseError, match="entered already"):  # after it was given back
        await lease.__aenter__()
    assert (resource.stats().leases, resource.stats().loads) == (1, 1)


@every_kind
async def test_a_lease_of_what_is_idle_is_entered_once(
    watch: Watch, maker: Maker, kind: Any, key: Any
) -> None:
    """Nor does the fast path take a lease that was used for a new one."""
    resource = watch(kind(maker.create))
    for _ in range(2):
        plain, awaited = resource.lease(key), resource.alease(key)
        with plain, pytest.raises(LeaseError, match="entered already"):
            plain.__enter__()
        with pytest.raises(LeaseError, match="entered already"):
            plain.__enter__()
        async with awaited:
            with pytest.raises(LeaseError, match="entered already"):
                await awaited.__aenter__()
        with pytest.raises(LeaseError, match="entered already"):
            await awaited.__aenter__()
    assert (resource.stats().leases, resource.stats().loads) == (4, 1)


async def test_a_lease_that_is_left_twice_at_once(watch: Watch, maker: Maker) -> None:
    """While the object is reset it is nobody's; the second time is an error, not a second reset."""
    going, go_on = asyncio.Event(), asyncio.Event()

    async def reset(thing: Thing) -> None:
        maker.was_reset.append(thing)
        going.set()
        await go_on.wait()

    pool = watch(Pool(maker.acreate, max_size=1, reset=reset))
    lease = pool.alease()
    await lease.__aenter__()
    first = asyncio.create_task(lease.__aexit__(None, None, None))
    await going.wait()
    with pytest.raises(LeaseError, match="is being given back"):
        await asyncio.wait_for(lease.__aexit__(None, None, None), PATIENCE)
    go_on.set()
    await first
    assert len(maker.was_reset) == 1


class Announced:
    """A core's lock that says when ``thread`` asks for it."""

    def __init__(self, lock: Any, thread: threading.Thread, asked: threading.Event) -> None:
        self._lock, self._thread, self._asked = lock, thread, asked
        self.release, self._is_owned = lock.release, lock._is_owned

    def acquire(self, blocking: bool = True) -> bool:
        if threading.current_thread() is self._thread:
            self._asked.set()
        return bool(self._lock.acquire(blocking))

    __enter__ = acquire

    def __exit__(self, *exc: object) -> None:
        self.release()


def outcome(results: list[object], call: Callable[[], object]) -> threading.Thread:
    """A thread that appends what ``call`` gives or raises."""

    def run() -> None:
        try:
            results.append(call())
        except Exception as exc:
            results.append(exc)

    return threading.Thread(target=run, daemon=True)


def test_two_threads_enter_a_lease_in_the_same_moment(watch: Watch, maker: Maker) -> None:
    """One in the middle of the fast path, the other beyond it: only one of them is granted."""
    looking, go_on = threading.Event(), threading.Event()

    class Key:
        def __hash__(self) -> int:
            if threading.current_thread() in slow:
                looking.set()
                assert go_on.wait(PATIENCE)
            return 1

    slow: list[threading.Thread] = []
    models, key = watch(Keyed(maker.create)), Key()
    with models.lease(key):
        pass
    lease = models.lease(key)
    results: list[object] = []
    first, second = outcome(results, lease.__enter__), outcome(results, lease.enter_slowly)
    slow.append(first)
    core = models._core
    core.lock = Announced(core.lock, second, go_on)
    first.start()
    assert looking.wait(PATIENCE)
    second.start()
    first.join(PATIENCE)
    second.join(PATIENCE)
    assert models.stats().holders == 1
    assert sorted(map(str, results)) == sorted(
        [str(maker.made[0]), f"{models.owner}: this lease was entered already; a lease is one-shot"]
    )
    lease.__exit__(None, None, None)


def test_two_threads_leave_a_lease_in_the_same_moment(
    watch: Watch, maker: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only one of them resets the object: when that is over, it may be somebody else's."""
    looking, go_on = threading.Event(), threading.Event()

    class Leaving:
        """The attribute, which the first thread is slow to read."""

        value = False

        def __get__(self, lease: object, kind: object) -> bool:
            value = self.value
            if threading.current_thread() is first:
                looking.set()
                assert go_on.wait(PATIENCE)
            return value

        def __set__(self, lease: object, value: bool) -> None:
            self.value = value

    def reset(thing: Thing) -> None:
        maker.reset(thing)
        go_on.set()

    pool = watch(Pool(maker.create, reset=reset))
    lease = pool.lease()
    lease.__enter__()
    results: list[object] = []
    first, second = outcome(results, lease.__exit__), outcome(results, lease.leave_slowly)
    monkeypatch.setattr(BaseLease, "leaving", Leaving())
    core = pool._core
    core.lock = Announced(core.lock, second, go_on)
    first.start()
    assert looking.wait(PATIENCE)
    second.start()
    first.join(PATIENCE)
    second.join(PATIENCE)
    assert len(maker.was_reset) == 1
    assert sorted(isinstance(result, LeaseError) for result in results) == [False, True]


# -- the rest --------------------------------------------------------------------------------------


class Counted(ThreadWaiter):
    """Counts how often any of them is looked at."""

    looks = 0

    def alive(self) -> bool:
        Counted.looks += 1
        return super().alive()


@pytest.mark.parametrize("loading", [True, False])
def test_many_who_wait_cost_each_other_nothing(
    watch: Watch, maker: Maker, clock: FakeTime, loading: bool
) -> None:
    """A step looks at those it can serve, not at all who wait: for a load, or for room."""
    models = watch(Keyed(maker.create, max_size=1))
    core = models._core
    Counted.looks = 0
    holder = None if loading else Holder(models, "hot")
    if holder is not None:
        holder.wait()
    waiters = [Counted("a" if loading else number, clock(), 1e9) for number in range(300)]
    for waiter in waiters:
        core.take(waiter)
    clock.now += MAX_OVERTAKE_SECONDS
    for waiter in waiters[1:100]:
        core.abandon(waiter)
    if holder is not None:
        holder.finish()
    else:
        core.made(core.begin(waiters[0]), maker.create("a"), 0.0)
        assert all(waiter.entry is not None for waiter in waiters[100:])
    assert Counted.looks < 5 * len(waiters)
    for waiter in waiters:
        core.abandon(waiter)


@pytest.mark.parametrize("kind", [Shared, Keyed])
async def test_who_holds_an_object_can_have_it_again(
    watch: Watch, maker: Maker, clock: FakeTime, kind: Any
) -> None:
    """Whoever waits for room waits for both leases; made to queue, the second would never end."""
    key = "a" if kind is Keyed else None
    options = {"max_size": 1} if kind is Keyed else {}
    models = watch(kind(maker.create, timeout=0, **options))
    core = models._core
    if kind is Keyed:
        other = ThreadWaiter("b", core.clock(), 1e9)
    else:
        other = ThreadWaiter("unheard of", core.clock(), 1e9)

    async def inner() -> None:
        async with models.alease(key):
            pass

    async with models.alease(key, timeout=5):
        core.take(other)
        clock.now += MAX_OVERTAKE_SECONDS
        await asyncio.create_task(inner())  # a subgraph's node
    core.abandon(other)


def test_what_is_too_old_is_not_handed_out(watch: Watch, maker: Maker, clock: FakeTime) -> None:
    """Even when the reaper has not come to it: the computer may have slept."""
    pool = watch(Pool(maker.create, max_size=1, max_lifetime=100, timeout=5, close=maker.close))
    with pool.lease() as old:
        pass
    clock.now += 100
    with pool.lease() as new:
        assert new is not old
    assert maker.closed == [old]


async def test_the_heartbeat_goes_on_during_a_check(
    watch: Watch, maker: Maker, impatient: None
) -> None:
    """A check counts as waiting."""
    beats: list[None] = []
    enough = asyncio.Event()

    def beat() -> None:
        beats.append(None)
        if len(beats) == 3:
            enough.set()

    async def check(thing: Thing) -> None:
        await enough.wait()

    pool = watch(Pool(maker.acreate, check=check))
    await use(pool)
    async with pool.alease(heartbeat=beat, timeout=10):
        pass
    assert len(beats) >= 3


async def test_what_nobody_came_for_is_checked_like_anything_idle(
    watch: Watch, maker: Maker
) -> None:
    """An object is fresh for whoever it was made for, and for nobody else."""
    pool = watch(Pool(maker.create, max_size=1, check=maker.check))
    task = asyncio.create_task(use(pool))
    while not pool.stats().leases:  # noqa: ASYNC110, to be there before the task is
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert pool.stats().idle == 1
    await use(pool)
    assert len(maker.checked) == 1


def test_close_has_one_deadline_for_all(maker: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many objects there are, they do not get so many times as long."""
    now, graces = 0.0, []

    def close_now(hooks: object, entry: object, grace: float) -> None:
        nonlocal now
        now += grace
        graces.append(grace)

    monkeypatch.setattr(core_module, "close_now", close_now)
    monkeypatch.setattr(core_module, "time", SimpleNamespace(monotonic=lambda: now))
    pool = Pool(maker.create, max_size=20)
    leases = [pool.lease() for _ in range(20)]
    for lease in leases:
        lease.__enter__()
    for lease in leases:
        lease.__exit__(None, None, None)
    pool.close()
    assert len(graces) == 20
    assert min(graces) > 0
    assert sum(graces) < 1.5 * core_module.CLOSE_GRACE
