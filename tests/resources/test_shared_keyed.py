"""``Shared`` and ``Keyed``: objects that several leases use at once."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest

from langgraph_perf.errors import ConfigurationError, PoolClosed, PoolTimeout
from langgraph_perf.resources import MAX_OVERTAKE_SECONDS, Keyed, Registry, Shared, Want
from langgraph_perf.resources._waiters import ThreadWaiter

from .helpers import FakeTime, Holder, Maker, Thing, auntil, check_sound, passes, until

Watch = Callable[[Any], Any]


def test_shared_is_loaded_once_however_many_ask(watch: Watch, maker: Maker) -> None:
    """A burst of first uses of one slow model loads it once."""
    model = watch(Shared(maker.create, close=maker.close))
    maker.hold = threading.Event()
    holders = [Holder(model) for _ in range(32)]
    until(lambda: model.stats().waiting == 31)
    maker.hold.set()
    values = {holder.wait() for holder in holders}
    assert len(values) == 1
    assert model.stats().holders == 32
    assert model.stats().in_use == 1
    for holder in holders:
        holder.finish()
    assert maker.attempts == 1


async def test_shared_is_loaded_once_by_threads_and_tasks(watch: Watch, maker: Maker) -> None:
    """Both kinds of callers wait for the same load."""
    model = watch(Shared(maker.create, close=maker.close))
    maker.hold = threading.Event()

    async def use() -> Thing:
        async with model.alease() as thing:
            return thing  # type: ignore[no-any-return]

    tasks = [asyncio.create_task(use()) for _ in range(10)]
    holders = [Holder(model) for _ in range(10)]
    await auntil(lambda: model.stats().waiting == 19)
    maker.hold.set()
    values = set(await asyncio.gather(*tasks))
    for holder in holders:
        holder.let_go.set()
        await auntil(holder.got.is_set)
        values.add(holder.value)
        holder.finish()
    assert len(values) == 1


def test_a_failed_load_fails_one_and_the_next_tries_again(watch: Watch, maker: Maker) -> None:
    """The others who wait for the same object do not get somebody else's error."""
    model = watch(Shared(maker.create))
    maker.hold = threading.Event()
    maker.errors.append(OSError("disk"))
    first = Holder(model)
    assert maker.entered.wait(10)
    others = [Holder(model) for _ in range(3)]
    until(lambda: model.stats().waiting == 3)
    maker.hold.set()
    with pytest.raises(OSError, match="disk"):
        first.wait()
    assert len({other.wait() for other in others}) == 1
    for other in others:
        other.finish()
    assert maker.attempts == 2


async def test_a_cancelled_leader_does_not_cancel_the_load(watch: Watch, maker: Maker) -> None:
    """Those who wait for the same load get it."""
    model = watch(Shared(maker.acreate, close=maker.aclose))
    maker.ahold = asyncio.Event()

    async def use() -> Thing:
        async with model.alease() as thing:
            return thing  # type: ignore[no-any-return]

    leader, follower = asyncio.create_task(use()), asyncio.create_task(use())
    await auntil(lambda: model.stats().waiting == 1)
    leader.cancel()
    await passes()
    maker.ahold.set()
    assert isinstance(await follower, Thing)
    assert leader.cancelled()
    assert maker.attempts == 1
    await model.aclose()


def test_an_object_in_use_is_never_unloaded(watch: Watch, maker: Maker, clock: FakeTime) -> None:
    """Idle time runs from the end of the last lease, not from the beginning of the first."""
    model = watch(Shared(maker.create, max_idle=300, close=maker.close))
    with model.lease() as thing, thing:
        clock.advance(1000)
        assert not thing.closed
        with model.lease():
            clock.advance(1000)
        clock.advance(1000)
        assert not thing.closed
    clock.advance(299)
    assert not thing.closed
    clock.advance(1)
    assert thing.closed
    with model.lease() as again:
        assert again is not thing
    clock.advance(300)


def test_each_use_begins_the_idle_time_anew(watch: Watch, maker: Maker, clock: FakeTime) -> None:
    """llama-swap ``TestProcessCommand_TTL_ResetsOnRequest``."""
    model = watch(Shared(maker.create, max_idle=10, close=maker.close))
    for _ in range(5):
        with model.lease() as thing:
            pass
        clock.advance(9)
    assert not thing.closed
    clock.advance(1)
    assert thing.closed


def test_max_idle_zero_unloads_at_once(watch: Watch, maker: Maker) -> None:
    """As soon as the last lease is over, without anybody waiting for it."""
    model = watch(Shared(maker.create, max_idle=0, close=maker.close))
    with model.lease() as thing, model.lease():
        pass
    until(lambda: thing.closed)


@pytest.mark.parametrize("shared", [True, False])
def test_waiting_for_somebody_elses_load_times_out(
    watch: Watch, maker: Maker, shared: bool
) -> None:
    """Who loads waits as long as it takes; who waits for it leaves at the deadline."""
    kind: Any = Shared if shared else Keyed
    resource = watch(kind(maker.create, timeout=0.01, close=maker.close))
    key = None if shared else "a"
    maker.hold = threading.Event()
    loader = Holder(resource, key)
    assert maker.entered.wait(10)
    with pytest.raises(PoolTimeout, match=r"within 0\.01 s"), resource.lease(key):
        pass
    maker.hold.set()
    assert loader.wait() is maker.made[0]
    with resource.lease(key) as thing:
        assert thing is maker.made[0]
    loader.finish()
    assert resource.stats().timeouts == 1


def test_a_nested_lease_of_a_full_keyed_times_out(watch: Watch, maker: Maker) -> None:
    """Who holds all there is and asks for more is told so, not left waiting for itself."""
    models = watch(Keyed(maker.create, max_size=1, timeout=0.01, close=maker.close))
    with models.lease("a"):
        with pytest.raises(PoolTimeout, match="1 of 1 in use"), models.lease("b"):
            pass
        with models.lease("a"):  # the same object can be had again
            pass


@pytest.mark.parametrize("kind", [Shared, Keyed])
def test_how_long_to_wait_by_default(kind: Any) -> None:
    """Half a minute, like ``Pool``; ``None`` is no limit, and nonsense is refused."""
    resource: Any = kind(lambda *key: object())
    assert resource.timeout == 30
    assert kind(lambda *key: object(), timeout=None).timeout is None
    with pytest.raises(ConfigurationError, match="timeout must be a number of seconds"):
        kind(lambda *key: object(), timeout="long")


def test_keyed_gives_each_key_its_own_object(watch: Watch, maker: Maker) -> None:
    """``create`` is called with the key; equal keys share."""
    models = watch(Keyed(maker.create, max_size=2, close=maker.close))
    with models.lease("a") as a, models.lease("b") as b, models.lease("a") as a2:
        assert a.key == "a"
        assert b.key == "b"
        assert a is a2
        assert models.stats().in_use == 2
        assert models.stats().holders == 3


def test_the_least_recently_used_object_makes_room(watch: Watch, maker: Maker) -> None:
    """Ollama ``TestFindRunnerToUnload``: never one that is leased."""
    models = watch(Keyed(maker.create, max_size=3, close=maker.close))
    for key in "abca":
        with models.lease(key):
            pass
    with models.lease("b"), models.lease("d"):
        assert [thing.key for thing in maker.closed] == ["c"]
        with models.lease("e"):
            assert [thing.key for thing in maker.closed] == ["c", "a"]
    assert maker.most_alive == 3


def test_there_is_never_more_than_max_size(watch: Watch, maker: Maker) -> None:
    """Loading, loaded and closing objects all count."""
    models = watch(Keyed(maker.create, max_size=3, close=maker.close))

    def work(seed: int) -> None:
        choice = random.Random(seed)
        for _ in range(60):
            with models.lease(choice.randrange(7)) as thing:
                assert not thing.closed
                check_sound(models)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert maker.most_alive <= 3
    assert models.stats().leases == 480


def test_while_all_are_leased_others_wait(watch: Watch, maker: Maker) -> None:
    """Nothing that is leased is evicted to make room."""
    models = watch(Keyed(maker.create, max_size=1, close=maker.close))
    with models.lease("a") as a:
        with pytest.raises(PoolTimeout, match="1 of 1 in use"), models.lease("b", timeout=0.001):
            pass
        other = Holder(models, "b")
        until(lambda: models.stats().waiting == 1)
        assert not a.closed
    assert other.wait().key == "b"
    other.finish()
    assert a.closed


async def test_keys_of_different_types_are_different_keys(watch: Watch, maker: Maker) -> None:
    """``1``, ``True`` and ``1.0`` are equal for Python, and need not mean the same model."""
    models = watch(Keyed(maker.create, close=maker.close))
    for _ in range(2):
        with models.lease(1) as a, models.lease(True) as b:
            async with models.alease(1.0) as c:
                assert [type(thing.key) for thing in (a, b, c)] == [int, bool, float]
    assert models.stats().loads == 3
    registry = Registry({"models": models})
    wanted = {"a": Want("models", 1), "b": Want("models", True), "c": Want("models", 1)}
    with registry.lease(wanted) as leased:
        assert leased == {"a": a, "b": b, "c": a}


def test_a_cold_load_does_not_delay_a_hot_key(watch: Watch, maker: Maker) -> None:
    """While one key is being loaded, leases of another come and go."""
    models = watch(Keyed(maker.create, max_size=2))
    with models.lease("hot"):
        pass
    maker.hold = threading.Event()
    cold = Holder(models, "cold")
    until(lambda: models.stats().loading == 1)
    for _ in range(100):
        with models.lease("hot", timeout=0):
            pass
    maker.hold.set()
    cold.wait()
    cold.finish()


def test_a_slow_close_delays_only_who_needs_the_place(watch: Watch, maker: Maker) -> None:
    """Ollama blocks every request while one model unloads; here only its successor waits."""
    closing, go_on = threading.Event(), threading.Event()

    def close(thing: Thing) -> None:
        if thing.key == "old":
            closing.set()
            assert go_on.wait(10)
        maker.close(thing)

    models = watch(Keyed(maker.create, max_size=2, close=close))
    for key in ("old", "hot"):
        with models.lease(key):
            pass
    new = Holder(models, "new")
    assert closing.wait(10)
    assert models.stats().closing == 1
    with models.lease("hot", timeout=0):
        pass
    assert not new.got.is_set()
    go_on.set()
    new.wait()
    new.finish()


def test_waiters_of_a_loaded_object_overtake(watch: Watch, maker: Maker, clock: FakeTime) -> None:
    """Somebody who waits for room does not hold up those whose object is there."""
    models = watch(Keyed(maker.create, max_size=1))
    with models.lease("hot"):
        cold = Holder(models, "cold")
        until(lambda: models.stats().waiting == 1)
        for _ in range(3):
            with models.lease("hot", timeout=0):
                pass
    cold.wait()
    cold.finish()


def test_from_a_certain_age_on_nobody_is_overtaken(
    watch: Watch, maker: Maker, clock: FakeTime
) -> None:
    """Then even leases of loaded objects queue up, so that room is made."""
    models = watch(Keyed(maker.create, max_size=1, close=maker.close))
    with models.lease("hot"):
        cold = Holder(models, "cold")
        until(lambda: models.stats().waiting == 1)
        clock.now += MAX_OVERTAKE_SECONDS - 0.1
        with models.lease("hot", timeout=0):
            pass
        clock.now += 0.2
        with pytest.raises(PoolTimeout):
            Holder(models, "hot", timeout=0).wait()
        late = Holder(models, "hot")
        until(lambda: models.stats().waiting == 2)
    assert cold.wait().key == "cold"
    assert not late.got.is_set()
    cold.finish()
    late.wait()
    late.finish()


def test_when_the_oldest_leaves_the_others_may_go_on(
    watch: Watch, maker: Maker, clock: FakeTime
) -> None:
    """Those who had to let an old waiter pass are served as soon as it gives up."""
    models = watch(Keyed(maker.create, max_size=1))
    core = models._core
    old = ThreadWaiter("cold", core.clock(), 1e9)
    with models.lease("hot"):
        core.take(old)
        clock.now += MAX_OVERTAKE_SECONDS
        late = Holder(models, "hot")
        until(lambda: models.stats().waiting == 2)
        core.abandon(old)
        late.wait()
        late.finish()


def test_waiting_for_a_load_does_not_stop_others(
    watch: Watch, maker: Maker, clock: FakeTime
) -> None:
    """A load may take as long as it takes: who waits for it is not waiting for room."""
    models = watch(Keyed(maker.create, max_size=2))
    with models.lease("hot"):
        pass
    maker.hold = threading.Event()
    loader = Holder(models, "cold")
    until(lambda: models.stats().loading == 1)
    follower = Holder(models, "cold")
    until(lambda: models.stats().waiting == 1)
    clock.now += 10 * MAX_OVERTAKE_SECONDS
    with models.lease("hot", timeout=0):
        pass
    maker.hold.set()
    for holder in (loader, follower):
        holder.wait()
        holder.finish()


def test_384_leases_of_8_keys_in_4_places_need_few_loads(
    watch: Watch, maker: Maker, clock: FakeTime
) -> None:
    """At most 40 loads, and every lease gets the object of its key."""
    models = watch(Keyed(maker.create, max_size=4, timeout=None, close=maker.close))
    go = threading.Barrier(64)
    done: list[int] = []

    def all_queue() -> bool:
        finished, stats = len(done), models.stats()
        return finished + stats.waiting + stats.loading + stats.closing == 64

    def create(key: object) -> Thing:
        until(all_queue)  # a load takes longer than the others need to come, however slow they are
        return Maker.create(maker, key)

    models._core.hooks._create = create

    def work(number: int) -> None:
        go.wait()
        for turn in range(6):
            key = (number + turn * 3) % 8
            with models.lease(key) as thing:
                assert thing.key == key
        done.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = models.stats()
    assert stats.leases == 384
    assert stats.loads <= 40
    assert maker.most_alive <= 4


def test_idle_keys_are_unloaded_each_at_its_time(
    watch: Watch, maker: Maker, clock: FakeTime
) -> None:
    """Each object has a deadline of its own."""
    models = watch(Keyed(maker.create, max_idle=10, close=maker.close))
    with models.lease("a"):
        pass
    clock.advance(6)
    with models.lease("b"):
        pass
    clock.advance(4)
    assert [thing.key for thing in maker.closed] == ["a"]
    clock.advance(6)
    assert [thing.key for thing in maker.closed] == ["a", "b"]
    until(lambda: not clock.reaper.running)


def test_concurrent_use_and_eviction(watch: Watch, maker: Maker, clock: FakeTime) -> None:
    """commons-pool ``testConcurrentBorrowAndEvict``: nobody gets an object that is being closed."""
    models = watch(Keyed(maker.create, max_size=2, max_idle=1, timeout=None, close=maker.close))
    stop = threading.Event()

    def work(seed: int) -> None:
        choice = random.Random(seed)
        while not stop.is_set():
            with models.lease(choice.randrange(3)) as thing:
                assert not thing.closed

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(100):
        clock.advance(1)
    stop.set()
    for thread in threads:
        thread.join()
    clock.advance(2)
    assert models.stats().size == 0


def test_unfit_keys_are_refused(maker: Maker) -> None:
    """The error names the resource, what was given and what is accepted."""
    models: Keyed[Thing] = Keyed(maker.create)
    with pytest.raises(ConfigurationError, match=r"key must be hashable .* got \['a'\]"):
        models.lease(["a"])  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="key must say which object, got None"):
        models.alease()
    models.be_called("models")
    with pytest.raises(ConfigurationError, match=r"accepted: lease\('models', key\)"):
        models.lease()
    with pytest.raises(ConfigurationError, match="has no keys, so it takes none; got 'a'"):
        Shared(maker.create).lease("a")


async def test_close_with_leases_out(watch: Watch, maker: Maker) -> None:
    """Idle objects go now, leased ones with their last lease, waiters are told."""
    models = watch(Keyed(maker.create, max_size=2, close=maker.close))
    async with models.alease("a") as a, models.alease("a"):
        async with models.alease("b") as b:
            pass
        await models.aclose()
        assert maker.closed == [b]
        with pytest.raises(PoolClosed):
            async with models.alease("a"):
                pass
    await auntil(lambda: maker.closed == [b, a])


async def test_async_objects_of_two_loops(watch: Watch, maker: Maker) -> None:
    """Another event loop gets an object of its own once this one's is free."""
    model = watch(Shared(maker.acreate, close=maker.aclose))

    async def use() -> Thing:
        async with model.alease(timeout=5) as thing:
            return thing  # type: ignore[no-any-return]

    mine = await use()
    async with model.alease() as again:
        assert again is mine
        with pytest.raises(PoolTimeout):
            await asyncio.to_thread(asyncio.run, _use_briefly(model))
    theirs = await asyncio.to_thread(asyncio.run, use())
    assert theirs is not mine
    assert mine.closed
    await model.aclose()


async def _use_briefly(model: Shared[Thing]) -> None:
    async with model.alease(timeout=0.01):
        pass
