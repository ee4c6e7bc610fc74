"""``Pool`` for sync callers."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Any

import pytest

from langgraph_perf.errors import (
    ConfigurationError,
    LeaseError,
    PoolClosed,
    PoolTimeout,
    ResourceError,
    TooManyWaiting,
)
from langgraph_perf.resources import Pool
from langgraph_perf.resources._waiters import ThreadWaiter

from .helpers import Holder, Maker, Thing, check_sound, until

Watch = Callable[[Pool[Any]], Pool[Thing]]


def test_a_lease_gives_an_object_and_takes_it_back(watch: Watch, maker: Maker) -> None:
    """What a lease gave is leased again afterwards, not made again."""
    pool = watch(Pool(maker.create))
    with pool.lease() as first:
        assert pool.stats().in_use == 1
    with pool.lease() as second:
        assert second is first
    assert len(maker.made) == 1
    assert pool.stats().leases == 2


def test_nothing_is_made_before_it_is_asked_for(watch: Watch, maker: Maker) -> None:
    """A pool costs nothing until it is used, whatever ``min_size`` says."""
    watch(Pool(maker.create, min_size=3))
    assert maker.attempts == 0


def test_the_object_used_last_goes_out_first(watch: Watch, maker: Maker) -> None:
    """So that objects a quiet pool does not need grow old and are closed."""
    pool = watch(Pool(maker.create))
    with pool.lease() as a, pool.lease() as b:
        pass
    assert a is not b
    with pool.lease() as again:
        assert again is a  # given back last


def test_each_object_has_one_owner(watch: Watch, maker: Maker) -> None:
    """No two leases ever hold the same object, and there are never more than ``max_size``."""
    pool = watch(Pool(maker.create, max_size=3, close=maker.close))
    overlaps = []

    def work() -> None:
        for _ in range(200):
            with pool.lease() as thing, thing:
                if thing.users != 1:
                    overlaps.append(thing)

    threads = [threading.Thread(target=work) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert overlaps == []
    assert maker.most_alive <= 3
    assert pool.stats().leases == 2400


def test_waiters_are_served_first_come_first_served(watch: Watch, maker: Maker) -> None:
    """Nobody who comes later is served before."""
    pool = watch(Pool(maker.create, max_size=1))
    order: list[int] = []
    with pool.lease():
        threads = []
        for number in range(6):

            def work(number: int = number) -> None:
                with pool.lease():
                    order.append(number)

            threads.append(threading.Thread(target=work))
            threads[-1].start()
            until(lambda number=number: pool.stats().waiting == number + 1)
    for thread in threads:
        thread.join()
    assert order == list(range(6))


def test_who_gives_back_cannot_take_what_another_waits_for(watch: Watch, maker: Maker) -> None:
    """The object is assigned before the waiter wakes up, so leasing again means queueing."""
    pool = watch(Pool(maker.create, max_size=1))
    with pool.lease():
        other = Holder(pool)
        until(lambda: pool.stats().waiting == 1)
    with pytest.raises(PoolTimeout), pool.lease(timeout=0):
        pass
    other.wait()
    other.finish()


def test_a_full_pool_times_out(watch: Watch, maker: Maker) -> None:
    """The error says how long it waited and how full the pool is."""
    pool = watch(Pool(maker.create, max_size=1, timeout=0.01))
    with (
        pool.lease(),
        pytest.raises(PoolTimeout, match=re.escape("within 0.01 s (1 of 1 in use")),
        pool.lease(),
    ):
        pass
    assert pool.stats().timeouts == 1
    assert issubclass(PoolTimeout, TimeoutError)


def test_a_lease_can_have_a_limit_of_its_own(watch: Watch, maker: Maker) -> None:
    """``lease(timeout=)`` replaces the pool's."""
    pool = watch(Pool(maker.create, max_size=1, timeout=None))
    with pool.lease(), pytest.raises(PoolTimeout), pool.lease(timeout=0):
        pass


def test_a_timed_out_waiter_leaves_no_trace(watch: Watch, maker: Maker) -> None:
    """What comes back later goes to those who still wait, or becomes idle."""
    pool = watch(Pool(maker.create, max_size=1))
    with pool.lease():
        for _ in range(3):
            with pytest.raises(PoolTimeout), pool.lease(timeout=0.001):
                pass
        assert pool.stats().waiting == 0
    with pool.lease(timeout=0):
        pass
    assert pool.stats().timeouts == 3


def test_max_waiting_bounds_the_queue(watch: Watch, maker: Maker) -> None:
    """Who would make the queue too long is refused at once."""
    pool = watch(Pool(maker.create, max_size=1, max_waiting=1))
    with pool.lease():
        waiter = Holder(pool)
        until(lambda: pool.stats().waiting == 1)
        with pytest.raises(TooManyWaiting, match="max_waiting=1"), pool.lease():
            pass
    waiter.wait()
    waiter.finish()


def test_a_failing_create_raises_its_own_error(watch: Watch, maker: Maker) -> None:
    """The asker sees the factory's error, and the pool works as soon as the factory does."""
    pool = watch(Pool(maker.create, max_size=1))
    error = ConnectionError("down")
    maker.errors.extend([error, error])
    for _ in range(2):
        with pytest.raises(ConnectionError) as caught, pool.lease():
            pass
        assert caught.value is error
    with pool.lease():
        pass
    assert pool.stats().failures == 2


def test_when_a_create_fails_the_next_waiter_tries(watch: Watch, maker: Maker) -> None:
    """One failing load does not fail, or strand, those who queue behind it."""
    pool = watch(Pool(maker.create, max_size=1))
    maker.hold = threading.Event()
    maker.errors.append(ConnectionError("down"))
    first = Holder(pool)
    assert maker.entered.wait(10)
    second = Holder(pool)
    until(lambda: pool.stats().waiting == 1)
    maker.hold.set()
    with pytest.raises(ConnectionError):
        first.wait()
    second.wait()
    second.finish()
    assert maker.attempts == 2


def test_a_fork_in_the_middle_of_a_load(maker: Maker) -> None:
    """In the child the place is gone; what was made there is closed there."""

    def create() -> Thing:
        pool._core.after_fork()  # what a fork does to the child
        return maker.create()

    pool = Pool(create, close=maker.close)
    with pytest.raises(ResourceError, match="too late"), pool.lease():
        pass
    assert maker.alive == 0
    assert pool.stats().size == 0


def test_a_slow_create_does_not_block_others(watch: Watch, maker: Maker) -> None:
    """While one object is being made, those that exist go out and come back."""
    pool = watch(Pool(maker.create, max_size=2))
    with pool.lease():
        maker.hold = threading.Event()
        slow = Holder(pool)
        until(lambda: pool.stats().loading == 1)
    for _ in range(3):
        with pool.lease(timeout=0):
            assert pool.stats().loading == 1
    maker.hold.set()
    slow.wait()
    slow.finish()


def test_a_failing_factory_does_not_block_threads(watch: Watch, maker: Maker) -> None:
    """commons-pool ``testErrorFactoryDoesNotBlockThreads``: a failed load frees its place."""
    pool = watch(Pool(maker.create, max_size=1))
    maker.errors.extend(ValueError(str(n)) for n in range(5))
    holders = [Holder(pool) for _ in range(8)]
    outcomes = []
    for holder in holders:  # all before any is waited for: nobody knows who of them holds it
        holder.let_go.set()
    for holder in holders:
        holder.finish()
        outcomes.append(holder.error)
    assert sum(isinstance(error, ValueError) for error in outcomes) == 5
    assert sum(error is None for error in outcomes) == 3


@pytest.mark.parametrize("answer", [False, 0, ConnectionError("gone")])
def test_an_object_that_fails_its_check_is_replaced(
    watch: Watch, maker: Maker, answer: object
) -> None:
    """It is closed, another one is made in its place, and nobody notices."""
    pool = watch(Pool(maker.create, max_size=1, check=maker.check, close=maker.close))
    with pool.lease() as old:
        pass
    maker.bad_checks.append(answer)
    with pool.lease() as new:
        assert new is not old
    assert maker.closed == [old]
    assert maker.most_alive == 1


def test_a_check_that_returns_none_has_passed(watch: Watch, maker: Maker) -> None:
    """Checks that raise when something is wrong, like psycopg_pool's, need not return anything."""
    pool = watch(Pool(maker.create, check=maker.check))
    with pool.lease() as old:
        pass
    maker.bad_checks.append(None)
    with pool.lease() as again:
        assert again is old


def test_a_new_object_is_not_checked(watch: Watch, maker: Maker) -> None:
    """Whoever waited for an object to be made does not wait for a check as well."""
    pool = watch(Pool(maker.create, check=maker.check))
    with pool.lease():
        assert maker.checked == []
    with pool.lease() as thing:
        assert maker.checked == [thing]


def test_check_create_and_close_run_without_the_lock(watch: Watch) -> None:
    """r2d2 ``test_issue_2_unlocked_during_is_valid``: others can use the pool meanwhile."""
    seen = []

    def look(*_: object) -> bool:
        stats = []
        thread = threading.Thread(target=lambda: stats.append(pool.stats()))
        thread.start()
        thread.join(5)
        seen.append(len(stats))
        return False  # every check fails, so that everything is closed and made again

    def create() -> object:
        look()
        return object()

    pool = watch(Pool(create, max_size=1, check=look, close=look))
    for _ in range(2):
        with pool.lease():
            pass
    assert seen == [1] * 4  # create, check, close, create


def test_dead_objects_do_not_starve_waiters(watch: Watch, maker: Maker) -> None:
    """bb8 ``test_broken_connections_dont_starve_pool``: after an outage everybody is served."""
    pool = watch(Pool(maker.create, max_size=4, check=maker.check, close=maker.close))
    holders = [Holder(pool) for _ in range(4)]
    for holder in holders:
        holder.wait()
    for holder in holders:
        holder.finish()
    maker.bad_checks.extend([ConnectionError("gone")] * 4)
    maker.errors.extend([ConnectionError("down")] * 2)  # the backend is still away for some
    served = failed = 0
    for _ in range(10):
        try:
            with pool.lease(timeout=5):
                served += 1
        except ConnectionError:
            failed += 1
    assert (served, failed) == (8, 2)
    assert maker.alive == pool.stats().size


def test_reset_runs_before_an_object_is_leased_again(watch: Watch, maker: Maker) -> None:
    """The next owner gets it clean."""
    pool = watch(Pool(maker.create, reset=maker.reset))
    with pool.lease() as thing:
        assert maker.was_reset == []
    assert maker.was_reset == [thing]
    with pool.lease() as again:
        assert again is thing


def test_an_object_whose_reset_fails_is_closed(
    watch: Watch, maker: Maker, caplog: pytest.LogCaptureFixture
) -> None:
    """The user of the object does not see that error; it is logged."""
    pool = watch(Pool(maker.create, reset=maker.reset, close=maker.close))
    maker.bad_resets.append(RuntimeError("cannot"))
    with pool.lease() as old:
        pass
    assert maker.closed == [old]
    assert "reset failed" in caplog.text


def test_a_failing_close_is_logged_and_the_place_is_free(
    watch: Watch, maker: Maker, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody else suffers from a close that raises."""

    def close(thing: Thing) -> None:
        raise OSError("stuck")

    pool = watch(Pool(maker.create, max_size=1, check=maker.check, close=close))
    with pool.lease():
        pass
    maker.bad_checks.append(False)
    with pool.lease(timeout=1):
        pass
    assert "close failed" in caplog.text


def test_an_error_in_the_body_gives_the_object_back(watch: Watch, maker: Maker) -> None:
    """A lease is over however its block ends."""
    pool = watch(Pool(maker.create, max_size=1))
    for error in (ValueError, KeyboardInterrupt, SystemExit, GeneratorExit):
        with pytest.raises(error), pool.lease():
            raise error
    assert pool.stats().idle == 1


@pytest.mark.parametrize("stage", ["create", "check", "reset", "close", "wait"])
def test_an_interrupt_loses_nothing(
    watch: Watch, maker: Maker, stage: str, impatient: None
) -> None:
    """Ctrl-C in any of the user's functions, or while waiting, leaves the pool whole."""

    def strike() -> None:
        raise KeyboardInterrupt

    def close(thing: Thing) -> None:
        maker.close(thing)
        if stage == "close" and len(maker.closed) == 1:
            raise KeyboardInterrupt

    pool = watch(Pool(maker.create, max_size=1, check=maker.check, reset=maker.reset, close=close))
    if stage == "create":
        maker.errors.append(KeyboardInterrupt())
    elif stage != "wait":
        with pool.lease():
            pass
        maker.bad_checks.extend([KeyboardInterrupt()] if stage == "check" else [])
        maker.bad_checks.extend([False] if stage == "close" else [])
        maker.bad_resets.extend([KeyboardInterrupt()] if stage == "reset" else [])
    if stage == "wait":
        with pool.lease(), pytest.raises(KeyboardInterrupt), pool.lease(heartbeat=strike):
            pass
    else:
        with pytest.raises(KeyboardInterrupt), pool.lease():
            pass
    check_sound(pool)
    with pool.lease(timeout=1):
        pass


def test_an_interrupted_waiter_gives_back_what_it_was_handed(watch: Watch, maker: Maker) -> None:
    """psycopg ``test_cancelled_waiter_assigned_conn_is_reclaimed``, for threads."""
    pool = watch(Pool(maker.create, max_size=1))
    core = pool._core
    leaving = ThreadWaiter(None, core.clock(), 5)
    with pool.lease() as thing:
        core.take(leaving)
        next_one = Holder(pool)
        until(lambda: pool.stats().waiting == 2)
    assert leaving.entry is not None  # handed the object, not yet aware of it
    core.abandon(leaving)
    assert next_one.wait() is thing
    next_one.finish()


def test_a_waiter_served_in_its_last_moment_keeps_the_object(
    watch: Watch, maker: Maker, clock: Any
) -> None:
    """Time that runs out after the hand-over does not lose what was handed over."""
    pool = watch(Pool(maker.create, max_size=1))
    core = pool._core
    waiter = ThreadWaiter(None, core.clock(), 5)
    with pool.lease():
        core.take(waiter)
    clock.now += 10
    assert core.advance(waiter).name == "TAKE"
    core.abandon(waiter)
    assert pool.stats().timeouts == 0


def test_a_waiter_served_while_it_gives_up_keeps_the_object(watch: Watch, maker: Maker) -> None:
    """Between looking at the clock and leaving the queue somebody may hand it the object."""
    pool = watch(Pool(maker.create, max_size=1))
    core = pool._core
    waiter = ThreadWaiter(None, core.clock(), 5)
    lease = pool.lease()
    lease.__enter__()
    core.take(waiter)
    real = core.clock

    def clock() -> float:
        core.clock = real
        lease.__exit__(None, None, None)
        return waiter.deadline + 1

    core.clock = clock
    assert core.advance(waiter).name == "TAKE"
    core.abandon(waiter)
    assert pool.stats().timeouts == 0


def test_a_lease_is_one_shot(watch: Watch, maker: Maker) -> None:
    """Entered or given back a second time, or given back unentered, it raises."""
    pool = watch(Pool(maker.create, max_size=1))
    lease = pool.lease()
    with pytest.raises(LeaseError, match="not entered"):
        lease.__exit__(None, None, None)
    with lease, pytest.raises(LeaseError, match="entered already"):
        lease.__enter__()
    with pytest.raises(LeaseError, match="given back already"):
        lease.__exit__(None, None, None)
    with pytest.raises(LeaseError), lease:
        pass


def test_a_double_release_makes_no_second_owner(watch: Watch, maker: Maker) -> None:
    """commons-pool ``testMultipleReturn``: the object is in the pool once."""
    pool = watch(Pool(maker.create, max_size=2))
    lease = pool.lease()
    lease.__enter__()
    lease.__exit__(None, None, None)
    with pytest.raises(LeaseError):
        lease.__exit__(None, None, None)
    with pool.lease() as a, pool.lease() as b:
        assert a is not b


def test_a_forgotten_lease_is_warned_about_and_recovered(watch: Watch, maker: Maker) -> None:
    """The warning names file and line; the object goes back when nobody else can use it."""
    pool = watch(Pool(maker.create, max_size=1, close=maker.close))
    lease = pool.lease()
    line = test_a_forgotten_lease_is_warned_about_and_recovered.__code__.co_firstlineno + 3
    lease.__enter__()
    with pytest.warns(ResourceWarning, match=f"test_pool.py:{line} was never given back"):
        del lease
    stats = pool.stats()
    assert (stats.forgotten, stats.idle) == (1, 0)  # ``maker`` still refers to the object
    with pool.lease(timeout=0):
        pass


def test_a_forgotten_object_that_nobody_has_is_used_again(watch: Watch) -> None:
    """Only an object that somebody still refers to is closed instead."""
    closed = []
    pool = watch(Pool(lambda: [object()], max_size=1, close=closed.append))
    lease = pool.lease()
    lease.__enter__()
    with pytest.warns(ResourceWarning):
        del lease
    assert pool.stats().idle == 1
    kept = (lease := pool.lease()).__enter__()
    with pytest.warns(ResourceWarning):
        del lease
    assert closed == [kept]
    assert pool.stats().size == 0


def test_a_forgotten_lease_serves_who_waits(watch: Watch, maker: Maker) -> None:
    """What is recovered goes to the queue like anything that comes back."""
    pool = watch(Pool(maker.create, max_size=1))
    lease = pool.lease()
    lease.__enter__()
    waiter = Holder(pool)
    until(lambda: pool.stats().waiting == 1)
    with pytest.warns(ResourceWarning):
        del lease
    waiter.wait()
    waiter.finish()


def test_a_forgotten_lease_is_recovered_although_the_lock_is_held(
    watch: Watch, maker: Maker, impatient: None
) -> None:
    """A finalizer must not wait for the lock; the next one who looks does its work."""
    pool = watch(Pool(maker.create, max_size=1))
    lease = pool.lease()
    lease.__enter__()
    waiter = Holder(pool)
    until(lambda: pool.stats().waiting == 1)
    locked, unlock = threading.Event(), threading.Event()

    def hold_lock() -> None:
        with pool._core.lock:
            locked.set()
            assert unlock.wait(10)

    thread = threading.Thread(target=hold_lock)
    thread.start()
    assert locked.wait(10)
    with pytest.warns(ResourceWarning):
        del lease
    unlock.set()
    thread.join()
    waiter.wait()
    waiter.finish()


def test_a_step_inside_a_step_waits_for_its_end(watch: Watch, maker: Maker) -> None:
    """A garbage collection that gives a lease back in the middle of a step cannot disturb it."""
    pool = watch(Pool(maker.create, max_size=2))
    core = pool._core
    lease = pool.lease()
    lease.__enter__()
    seen = []

    def step() -> None:
        lease.__exit__(None, None, None)
        seen.append(len(core._idle()))
        with pytest.raises(LeaseError, match="finalizer"), pool.lease():
            pass

    core._do(step)
    assert seen == [0]
    assert pool.stats().idle == 1


def test_close_closes_what_is_idle_and_what_comes_back(watch: Watch, maker: Maker) -> None:
    """Leased objects stay open until their leases are over."""
    pool = watch(Pool(maker.create, close=maker.close))
    with pool.lease() as leased, leased:
        with pool.lease() as idle:
            pass
        pool.close()
        assert maker.closed == [idle]
        pool.close()
        with pytest.raises(PoolClosed), pool.lease():
            pass
    assert maker.closed == [idle, leased]
    assert pool.stats().size == 0


def test_close_tells_those_who_wait(watch: Watch, maker: Maker) -> None:
    """psycopg ``test_closed_queue``: they get ``PoolClosed`` now, not a timeout later."""
    pool = watch(Pool(maker.create, max_size=1, close=maker.close, timeout=None))
    with pool.lease():
        waiters = [Holder(pool) for _ in range(3)]
        until(lambda: pool.stats().waiting == 3)
        pool.close()
        for waiter in waiters:
            with pytest.raises(PoolClosed):
                waiter.wait()


def test_close_while_an_object_is_being_made(watch: Watch, maker: Maker) -> None:
    """It is closed as soon as it is there, and whoever asked is told."""
    pool = watch(Pool(maker.create, close=maker.close))
    maker.hold = threading.Event()
    asker = Holder(pool)
    assert maker.entered.wait(10)
    pool.close()
    maker.hold.set()
    with pytest.raises(PoolClosed):
        asker.wait()
    until(lambda: maker.alive == 0)


def test_close_while_a_check_fails(watch: Watch, maker: Maker) -> None:
    """Nothing is made any more in place of what failed."""
    pool = watch(Pool(maker.create, check=maker.check, close=maker.close))
    with pool.lease():
        pass

    def check(thing: Thing) -> bool:
        pool.close()
        return False

    pool._core.hooks.check = check
    with pytest.raises(PoolClosed), pool.lease():
        pass
    assert maker.alive == 0


def test_min_size_is_made_and_kept_up(watch: Watch, maker: Maker) -> None:
    """The first lease begins to fill the pool, and what is lost is replaced."""
    pool = watch(Pool(maker.create, min_size=3, reset=maker.reset, close=maker.close))
    with pool.lease():
        until(lambda: pool.stats().size - pool.stats().loading == 3)
    maker.bad_resets.append(RuntimeError("broken"))
    with pool.lease():
        pass
    until(lambda: len(maker.made) == 4)
    until(lambda: pool.stats().idle == 3)


def test_filling_up_survives_a_failing_factory(
    watch: Watch, maker: Maker, caplog: pytest.LogCaptureFixture
) -> None:
    """A load that nobody waits for is logged, and the next lease tries again."""
    pool = watch(Pool(maker.create, min_size=1, reset=maker.reset))
    with pool.lease():
        pass
    maker.bad_resets.append(RuntimeError("broken"))
    maker.errors.append(ConnectionError("down"))
    with pool.lease():
        pass
    until(lambda: pool.stats().failures == 1)
    until(lambda: "a load that nobody waits for failed: ConnectionError" in caplog.text)
    with pool.lease():
        pass
    assert pool.stats().idle == 1


def test_heartbeat_is_called_while_waiting(watch: Watch, maker: Maker, impatient: None) -> None:
    """So that a node that waits for its turn does not count as stuck."""
    pool = watch(Pool(maker.create, max_size=1))
    beats = threading.Semaphore(0)
    with pool.lease():
        waiter = Holder(pool, heartbeat=beats.release)
        for _ in range(3):
            assert beats.acquire(timeout=10)
    waiter.wait()
    waiter.finish()


def test_a_create_that_hides_that_it_is_async_is_refused(watch: Watch, maker: Maker) -> None:
    """A lambda around an ``async def`` cannot be known beforehand; the error says what to do."""
    pool = watch(Pool(lambda: maker.acreate()))
    assert not pool.needs_loop
    with pytest.raises(ConfigurationError, match="async def"), pool.lease():
        pass


def test_an_async_factory_is_refused_in_sync_code(maker: Maker) -> None:
    """That can be asked beforehand, and is a clear error otherwise."""
    for pool in (
        Pool(maker.acreate),
        Pool(maker.create, check=maker.acheck),
        Pool(maker.create, reset=maker.areset),
        Pool(maker.create, close=maker.aclose),
    ):
        assert pool.needs_loop
        with pytest.raises(ConfigurationError, match="needs an event loop"):
            pool.lease()


def test_stats_add_up(watch: Watch, maker: Maker, clock: Any) -> None:
    """Waits and loads are counted in seconds."""

    def create() -> Thing:
        clock.now += 2
        return maker.create()

    pool = watch(Pool(create, max_size=1, close=maker.close))
    with pool.lease():
        waiter = Holder(pool)
        until(lambda: pool.stats().waiting == 1)
        assert pool.stats().holders == 1
        clock.now += 5
    waiter.wait()
    waiter.finish()
    stats = pool.stats()
    assert (stats.loads, stats.load_seconds) == (1, 2)
    assert (stats.leases, stats.wait_seconds, stats.longest_wait) == (2, 7, 5)
    assert stats.max_size == 1
