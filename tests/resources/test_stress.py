"""Everything at once, with a seed: whatever goes wrong, the books are right in the end."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from langgraph_perf.errors import PoolClosed, PoolTimeout, TooManyWaiting
from langgraph_perf.resources import Keyed, Pool, Shared

from .helpers import PATIENCE, Maker, Thing, check_sound, passes, until

Watch = Callable[[Any], Any]
EXPECTED = (ConnectionError, PoolTimeout, TooManyWaiting)


class Unreliable(Maker):
    """Each stage fails once in a while (deadpool ``managed_unreliable_manager``)."""

    def __init__(self, seed: int, rate: float = 0.08) -> None:
        super().__init__()
        self.random = random.Random(seed)
        self.rate = rate
        self.down = False

    def flip(self) -> bool:
        return self.down or self.random.random() < self.rate

    def create(self, key: object = None) -> Thing:
        if self.flip():
            raise ConnectionError("create")
        return super().create(key)

    async def acreate(self, key: object = None) -> Thing:
        await passes(self.random.randrange(3))
        return self.create(key)

    def check(self, thing: Thing) -> bool:
        return not self.flip()

    async def acheck(self, thing: Thing) -> bool:
        await passes(self.random.randrange(3))
        return self.check(thing)

    def reset(self, thing: Thing) -> None:
        if self.flip():
            raise ConnectionError("reset")

    async def areset(self, thing: Thing) -> None:
        await passes(self.random.randrange(3))
        self.reset(thing)


def join(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


def start(number: int, work: Callable[[int], None]) -> list[threading.Thread]:
    """Threads that all run ``work`` with a number of their own."""
    threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(number)]
    for thread in threads:
        thread.start()
    return threads


@pytest.mark.parametrize("seed", range(3))
async def test_threads_and_tasks_over_an_unreliable_backend(watch: Watch, seed: int) -> None:
    """Errors, cancellations and timeouts in every stage lose nothing."""
    maker = Unreliable(seed)
    pool = watch(
        Pool(
            maker.create,
            max_size=4,
            max_waiting=40,
            check=maker.check,
            reset=maker.reset,
            close=maker.close,
        )
    )
    outcomes: list[str] = []

    def thread_work(number: int) -> None:
        for _ in range(30):
            try:
                with pool.lease(timeout=PATIENCE) as thing, thing:
                    outcomes.append("ok" if thing.users == 1 else "shared")
            except EXPECTED as exc:
                outcomes.append(type(exc).__name__)

    async def task_work(number: int) -> None:
        for _ in range(5):
            try:
                async with pool.alease(timeout=PATIENCE) as thing:
                    with thing:
                        outcomes.append("ok" if thing.users == 1 else "shared")
                        await passes(number % 3)
            except EXPECTED as exc:
                outcomes.append(type(exc).__name__)

    threads = start(8, thread_work)
    tasks = [asyncio.create_task(task_work(number)) for number in range(60)]
    choice = random.Random(seed)
    for victim in choice.sample(tasks, 20):
        await passes(choice.randrange(20))
        victim.cancel()
        check_sound(pool)
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.to_thread(join, threads)
    assert "shared" not in outcomes
    assert "PoolTimeout" not in outcomes
    assert outcomes.count("ok") > 100
    assert maker.most_alive <= 4


@pytest.mark.parametrize("seed", range(3))
async def test_tasks_over_an_unreliable_async_backend(watch: Watch, seed: int) -> None:
    """The same where everything runs on the event loop."""
    maker = Unreliable(seed)
    pool = watch(
        Pool(
            maker.acreate,
            max_size=4,
            check=maker.acheck,
            reset=maker.areset,
            close=maker.aclose,
        )
    )

    async def work(number: int) -> int:
        served = 0
        for _ in range(5):
            try:
                async with pool.alease(timeout=PATIENCE) as thing:
                    with thing:
                        assert thing.users == 1
                        served += 1
                        await passes(number % 3)
            except ConnectionError:
                pass
        return served

    choice = random.Random(seed)
    tasks = [asyncio.create_task(work(number)) for number in range(80)]
    for victim in choice.sample(tasks, 30):
        await passes(choice.randrange(20))
        victim.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(r, int | asyncio.CancelledError) for r in results), results
    assert sum(r for r in results if isinstance(r, int)) > 100
    await pool.aclose()
    assert maker.most_alive <= 4
    assert maker.alive == 0


def test_a_backend_goes_down_and_comes_back(watch: Watch) -> None:
    """psycopg ``test_reconnect_failure``: errors while it is away, none as soon as it is there."""
    maker = Unreliable(0, rate=0.0)
    pool = watch(Pool(maker.create, max_size=3, check=maker.check, close=maker.close))
    phase = ["before"]
    seen: dict[str, list[bool]] = {"before": [], "down": [], "after": []}
    stop = threading.Event()

    def work(number: int) -> None:
        while not stop.is_set():
            now = phase[0]
            try:
                with pool.lease(timeout=PATIENCE) as thing, thing:
                    seen[now].append(True)
            except ConnectionError:
                seen[now].append(False)

    threads = start(8, work)
    until(lambda: len(seen["before"]) > 50)
    maker.down = True
    phase[0] = "down"
    until(lambda: seen["down"].count(False) > 50)
    maker.down = False
    phase[0] = "after"
    until(lambda: len(seen["after"]) > 50)
    stop.set()
    join(threads)
    assert all(seen["before"][:50])  # some of the later ones met the outage
    assert all(seen["after"])
    assert maker.most_alive <= 3


def test_close_in_the_middle_of_it_all(watch: Watch, maker: Maker) -> None:
    """HikariCP ``ShutdownTest``: everybody gets an object or ``PoolClosed``; all is closed."""
    pool = watch(Pool(maker.create, max_size=3, close=maker.close, timeout=None))
    models = watch(Keyed(maker.create, max_size=3, close=maker.close))
    refused = []

    def work(number: int) -> None:
        while True:
            try:
                with pool.lease() as thing, models.lease(number % 5) as model:
                    assert not thing.closed
                    assert not model.closed
            except PoolClosed as exc:
                refused.append(exc)
                return

    threads = start(12, work)
    until(lambda: pool.stats().leases > 200)
    models.close()
    pool.close()
    join(threads)
    assert len(refused) == 12
    assert maker.alive == 0


def test_a_saturated_pool(watch: Watch, maker: Maker) -> None:
    """HikariCP ``TestSaturatedPool830``: some time out, nobody is forgotten, then it recovers."""
    pool = watch(Pool(maker.create, max_size=1, close=maker.close))
    gate = threading.Event()
    outcomes: list[str] = []

    def hog() -> None:
        with pool.lease():
            assert gate.wait(PATIENCE)

    def work(number: int) -> None:
        try:
            with pool.lease(timeout=0.02 if number % 2 else 20):
                outcomes.append("ok")
        except PoolTimeout:
            outcomes.append("timeout")

    hogger = threading.Thread(target=hog, daemon=True)
    hogger.start()
    until(lambda: pool.stats().in_use == 1)
    threads = start(20, work)
    until(lambda: outcomes.count("timeout") == 10)
    gate.set()
    join([hogger, *threads])
    assert outcomes.count("ok") == 10
    assert pool.stats().timeouts == 10


def test_garbage_collections_in_the_middle_of_steps(watch: Watch, maker: Maker) -> None:
    """Leases that a collection gives back, at any moment and in any thread, are in good hands."""
    pool = watch(Pool(maker.create, max_size=6, timeout=20, max_idle=0.001, close=maker.close))
    model = watch(Shared(maker.create, max_idle=0.001, close=maker.close))

    def body() -> Iterator[None]:
        with pool.lease(), model.lease():
            yield

    class Cycle:
        def __init__(self) -> None:
            self.itself = self
            self.generator = body()
            next(self.generator)

    def work(number: int) -> None:
        for turn in range(60):
            if turn % 2:
                Cycle()
            else:
                with pool.lease():
                    pass

    thresholds = gc.get_threshold()
    gc.freeze()  # thousands of collections: what thousands of other tests hold is not looked at
    gc.set_threshold(5, 2, 2)
    with warnings.catch_warnings():
        # whether the block is left first or the lease is finalized first is up to the collection
        warnings.simplefilter("ignore", ResourceWarning)
        try:
            threads = start(6, work)
            while any(thread.is_alive() for thread in threads):
                gc.collect()  # or all could wait for what only a collection gives back
        finally:
            gc.set_threshold(*thresholds)
            gc.unfreeze()
        gc.collect()
    assert maker.most_alive <= 7


def test_many_keys_many_threads(watch: Watch) -> None:
    """Loads that fail and objects that are evicted never mix up the keys."""
    maker = Unreliable(7, rate=0.15)
    models = watch(Keyed(maker.create, max_size=3, max_idle=0.002, close=maker.close))
    wrong = []

    def work(number: int) -> None:
        choice = random.Random(number)
        for _ in range(60):
            key = choice.randrange(6)
            try:
                with models.lease(key, timeout=20) as model:
                    if model.key != key or model.closed:
                        wrong.append(model)
            except ConnectionError:
                pass

    join(start(10, work))
    assert wrong == []
    assert maker.most_alive <= 3
