"""Closing what is idle: on time, by one thread at most, and by none when there is nothing to do."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest

from langgraph_perf.resources import Keyed, Pool, Shared, _reaper, _work
from langgraph_perf.resources._offload import Workers

from .helpers import FakeTime, Holder, Maker, Thing, auntil, check_at_rest, until

Watch = Callable[[Any], Any]


def use(pool: Any, objects: int = 1) -> list[Thing]:
    """Lease so many objects at once, and give them back one after the other."""
    leases = [pool.lease() for _ in range(objects)]
    things = [lease.__enter__() for lease in leases]
    for lease in leases:
        lease.__exit__(None, None, None)
    return things


@pytest.mark.parametrize("max_lifetime", [3600, None])
def test_idle_objects_are_closed_on_time(
    watch: Watch, maker: Maker, clock: FakeTime, max_lifetime: float | None
) -> None:
    """Each one ``max_idle`` seconds after its own last use."""
    pool = watch(Pool(maker.create, max_idle=300, max_lifetime=max_lifetime, close=maker.close))
    first, second = use(pool, 2)
    clock.advance(200)
    assert use(pool) == [second]  # given back last, so it goes out first
    clock.advance(99.9)
    assert maker.closed == []
    clock.advance(0.1)
    assert maker.closed == [first]
    clock.advance(200)
    assert maker.closed == [first, second]


def test_min_size_objects_stay(watch: Watch, maker: Maker, clock: FakeTime) -> None:
    """However idle; and nobody wakes up for them."""
    pool = watch(Pool(maker.create, min_size=2, max_idle=10, max_lifetime=None, close=maker.close))
    use(pool, 4)
    until(lambda: pool.stats().loading == 0)
    until(lambda: clock.reaper.running)  # who made an object tells the reaper a moment later
    made = len(maker.made)
    clock.advance(10)
    assert pool.stats().idle == 2
    assert len(maker.closed) == made - 2  # none was closed only to be replaced
    until(lambda: not clock.reaper.running)
    use(pool, 2)
    clock.advance(1000)
    assert pool.stats().idle == 2
    assert len(maker.made) == made


def test_a_spike_passes(watch: Watch, maker: Maker, clock: FakeTime) -> None:
    """psycopg ``test_spike``: a pool that has grown shrinks again."""
    pool = watch(Pool(maker.create, min_size=1, max_size=20, max_idle=60, close=maker.close))
    use(pool, 20)
    assert pool.stats().size == 20
    for _ in range(6):
        use(pool)
        clock.advance(30)
    assert pool.stats().size == 1


def test_old_objects_are_replaced(watch: Watch, maker: Maker, clock: FakeTime) -> None:
    """After ``max_lifetime`` an object is closed: when idle on time, else when it comes back."""
    pool = watch(Pool(maker.create, max_idle=None, max_lifetime=100, close=maker.close))
    (idle,) = use(pool)
    clock.advance(100)
    assert maker.closed == [idle]
    with pool.lease() as used, used:
        clock.advance(150)
        assert not used.closed
    assert maker.closed == [idle, used]


def test_what_was_made_together_is_not_replaced_together(
    watch: Watch, maker: Maker, clock: FakeTime
) -> None:
    """Each object lives up to a tenth shorter than ``max_lifetime``, by chance; none longer."""
    pool = watch(Pool(maker.create, max_idle=None, max_lifetime=100, close=maker.close))
    with pool.lease() as longest:
        clock.luck = 0.5
        with pool.lease() as shorter:
            clock.luck = 1.0
            with pool.lease() as shortest:
                pass
    clock.advance(89.9)
    assert maker.closed == []
    clock.advance(0.2)
    assert maker.closed == [shortest]
    clock.advance(5)
    assert maker.closed == [shortest, shorter]
    clock.advance(5)
    assert maker.closed == [shortest, shorter, longest]


def test_a_lifetime_that_ends_before_the_idle_time(
    watch: Watch, maker: Maker, clock: FakeTime
) -> None:
    """The earlier of both deadlines counts, however often the object is used."""
    pool = watch(Pool(maker.create, max_idle=60, max_lifetime=100, close=maker.close))
    for _ in range(3):
        (thing,) = use(pool)
        clock.advance(30)
    use(pool)
    clock.advance(9)
    assert not thing.closed
    clock.advance(1)
    assert thing.closed


def test_a_very_long_idle_time_is_no_trouble(maker: Maker) -> None:
    """``max_idle=10**10``, meaning never, does not end the thread that others count on."""
    forever = Shared(object, max_idle=10**10)
    with forever.lease():
        pass
    assert _reaper.shared.running
    other = Pool(maker.create, max_idle=0.01, close=maker.close)
    use(other)
    until(lambda: len(maker.closed) == 1)
    forever.close()


def test_a_collection_closes_nothing_under_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forgotten lease that is found while its pool is looked at is recovered after that."""
    closed: list[bool] = []
    pool = Pool(object, close=lambda _: closed.append(pool._core.lock._is_owned()))
    snapshot = pool._core._snapshot

    def collecting() -> Any:
        gc.collect()
        return snapshot()

    monkeypatch.setattr(pool._core, "_snapshot", collecting)
    gc.disable()  # a collection that comes by itself would find it earlier, outside of pytest.warns
    try:
        lease = pool.lease()
        cycle: list[Any] = [lease, lease.__enter__()]
        cycle.append(cycle)
        del lease, cycle
        with pytest.warns(ResourceWarning, match="never given back"):
            pool.stats()
    finally:
        gc.enable()
    monkeypatch.undo()
    assert pool.stats().in_use == 0
    pool.close()
    assert closed == [False]


def test_min_size_objects_that_get_too_old_are_replaced(
    watch: Watch, maker: Maker, clock: FakeTime
) -> None:
    """Their number is kept up in the background."""
    pool = watch(Pool(maker.create, min_size=1, max_idle=None, max_lifetime=100, close=maker.close))
    (old,) = use(pool)
    clock.advance(100)
    assert maker.closed == [old]
    until(lambda: pool.stats().idle == 1)
    assert len(maker.made) == 2


def test_premature_expiry(watch: Watch, maker: Maker, clock: FakeTime) -> None:
    """Ollama ``TestPrematureExpired``: an old deadline does not close what was used since."""
    model = watch(Shared(maker.create, max_idle=10, close=maker.close))
    use(model)
    clock.now += 9
    thing = use(model)[0]
    clock.advance(1)  # the deadline of the first use
    assert not thing.closed
    clock.advance(9)
    assert thing.closed


def test_50_pools_need_one_thread_and_then_none(
    watch: Watch, maker: Maker, clock: FakeTime
) -> None:
    """One reaper serves all of them and ends when it has nothing left to wait for."""
    pools = [watch(Pool(maker.create, max_idle=10, close=maker.close)) for _ in range(50)]
    gc.collect()  # what an earlier test left may take threads when it is finalized
    before = set(threading.enumerate())
    for pool in pools:
        use(pool)
        assert len(set(threading.enumerate()) - before) <= 1
    assert clock.reaper.running
    clock.advance(10)
    assert maker.alive == 0
    until(lambda: not clock.reaper.running)
    until(lambda: not set(threading.enumerate()) - before)


def test_no_thread_is_needed_where_nothing_expires(
    watch: Watch, maker: Maker, clock: FakeTime
) -> None:
    """``max_idle=None``, ``max_lifetime=None``: nobody waits for anything."""
    use(watch(Pool(maker.create, max_idle=None, max_lifetime=None)))
    use(watch(Shared(maker.create)))
    assert not clock.reaper.running


def test_in_real_time(watch: Watch, maker: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock and the waiting of production, with deadlines near enough to wait for."""
    monkeypatch.setattr(_reaper, "shared", reaper := _reaper.Reaper())
    pool = watch(Pool(maker.create, max_idle=0.01, close=maker.close))
    models = watch(Keyed(maker.create, max_idle=0.02, close=maker.close))
    use(pool, 3)
    with models.lease("a"):
        pass
    until(lambda: maker.alive == 0 and len(maker.made) == 4)
    until(lambda: not reaper.running)


def test_a_dropped_pool_takes_the_thread_with_it(maker: Maker, clock: FakeTime) -> None:
    """psycopg ``test_del_stops_threads``; what was idle is closed."""
    pool = Pool(maker.create, max_idle=1000, close=maker.close)
    use(pool)
    assert clock.reaper.running
    del pool
    gc.collect()
    until(lambda: not clock.reaper.running)
    assert maker.alive == 0


def test_a_pool_dropped_while_leased_lives_until_it_is_not(maker: Maker) -> None:
    """A lease keeps what it needs alive."""
    with Pool(maker.create, close=maker.close).lease() as thing, thing:
        gc.collect()
        assert not thing.closed
    gc.collect()
    until(lambda: thing.closed)  # the reaper may be looking at the pool in that moment


def test_a_close_that_raises_does_not_stop_the_others(
    watch: Watch, maker: Maker, clock: FakeTime, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither of the same pool nor of others."""

    def close(thing: Thing) -> None:
        raise OSError("stuck")

    bad = watch(Pool(maker.create, max_idle=10, close=close))
    good = watch(Pool(maker.create, max_idle=10, close=maker.close))
    use(bad, 2)
    use(good)
    clock.advance(10)
    assert bad.stats().size == good.stats().size == 0
    assert caplog.text.count("close failed") == 2


@pytest.mark.parametrize("last_words", [None, SystemExit()])
def test_a_close_that_hangs_or_exits_stops_nobody_elses(
    watch: Watch, maker: Maker, clock: FakeTime, last_words: BaseException | None
) -> None:
    """It runs on a thread of its own; the reaper goes on."""
    clock.reaper.run = _work.in_background
    hung, go_on = threading.Event(), threading.Event()

    def close(thing: Thing) -> None:
        hung.set()
        assert go_on.wait(10)
        if last_words is not None:
            raise last_words

    slow = watch(Pool(maker.create, max_idle=10, close=close))
    other = watch(Pool(maker.create, max_idle=20, close=maker.close))
    use(slow)
    use(other)
    clock.advance(10)
    assert hung.wait(10)
    clock.advance(10)
    until(lambda: other.stats().size == 0)
    assert slow.stats().closing == 1
    go_on.set()
    until(lambda: slow.stats().size == 0)


def test_a_target_that_fails_does_not_end_the_reaper(
    watch: Watch, maker: Maker, clock: FakeTime, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever it raises: others count on the thread."""

    class Bad:
        def reap(self) -> None:
            raise SystemExit

    bad = Bad()
    pool = watch(Pool(maker.create, max_idle=10, close=maker.close))
    use(pool)
    clock.reaper.arm(bad, clock.now + 5)
    clock.advance(5)
    clock.advance(5)
    assert maker.alive == 0
    assert "closing idle resources failed" in caplog.text


def test_when_no_thread_can_be_had(
    watch: Watch, maker: Maker, clock: FakeTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leasing goes on, and the next object that becomes idle tries again."""
    with monkeypatch.context() as patch:

        def start(self: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        patch.setattr(threading.Thread, "start", start)
        pool = watch(Pool(maker.create, max_idle=10, close=maker.close))
        use(pool)
    assert not clock.reaper.running
    use(pool)
    assert clock.reaper.running
    clock.advance(10)
    assert maker.alive == 0


async def test_async_objects_are_closed_on_their_loop(
    watch: Watch, maker: Maker, clock: FakeTime
) -> None:
    """The reaper only asks for it; the loop does it."""
    pool = watch(Pool(maker.acreate, max_idle=10, close=maker.aclose))
    async with pool.alease():
        pass
    clock.advance(10)
    assert pool.stats().closing == 1
    await auntil(lambda: pool.stats().size == 0)
    assert len(maker.close_loops) == 1


def test_reaping_races_with_leasing(watch: Watch, maker: Maker, clock: FakeTime) -> None:
    """commons-pool ``testConcurrentBorrowAndEvict``: no lease ever sees a closed object."""
    pool = watch(Pool(maker.create, max_size=4, max_idle=1, close=maker.close))
    stop = threading.Event()
    seen = []

    def work() -> None:
        while not stop.is_set():
            with pool.lease() as thing, thing:
                seen.append(thing.closed)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(200):
        clock.advance(1)
    stop.set()
    for thread in threads:
        thread.join()
    assert True not in seen
    clock.advance(1)
    assert maker.alive == 0


def test_close_ends_what_the_reaper_waits_for(maker: Maker, clock: FakeTime) -> None:
    """Once everything is closed there is nothing to wake up for but a deadline that is void."""
    pool = Pool(maker.create, max_idle=10, close=maker.close)
    use(pool)
    pool.close()
    clock.advance(10)
    until(lambda: not clock.reaper.running)
    check_at_rest(pool)


def test_private_threads_end_when_idle() -> None:
    """They are as many as there are jobs at once, are used again, and go away."""
    workers = Workers(linger=0.05)
    gc.collect()  # what an earlier test left may take threads when it is finalized
    before = set(threading.enumerate())
    barrier = threading.Barrier(4)
    for _ in range(2):
        for job in [workers.submit(lambda: barrier.wait(10)) for _ in range(4)]:
            job.result(10)
    assert len(set(threading.enumerate()) - before) <= 8
    until(lambda: not set(threading.enumerate()) - before)
    assert workers.submit(lambda: 42).result(10) == 42


def test_private_threads_pass_errors_on() -> None:
    """Whatever a job raises is raised to who waits for it."""

    def fail() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        Workers(linger=0.01).submit(fail).result(10)


def test_a_lease_is_taken_while_the_reaper_closes(watch: Watch, maker: Maker) -> None:
    """A slow close of one idle object does not keep anybody from the others."""
    closing, go_on = threading.Event(), threading.Event()

    def close(thing: Thing) -> None:
        closing.set()
        assert go_on.wait(10)
        maker.close(thing)

    pool = watch(Pool(maker.create, max_size=2, max_idle=0.01, close=close))
    use(pool)
    assert closing.wait(10)
    holder = Holder(pool)
    holder.wait()
    holder.finish()
    go_on.set()
