"""What the tests of resources share: objects that know their life, threads that obey, fake time."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from langgraph_perf.resources import Resource
from langgraph_perf.resources import _reaper as reaper_module

PATIENCE = 30.0


def until(holds: Callable[[], bool]) -> None:
    """Wait for something that is bound to happen; fail when it does not."""
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.0005)


async def auntil(holds: Callable[[], bool]) -> None:
    """Like ``until``, on an event loop."""
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, "it never happened"
        await asyncio.sleep(0.0005)


async def passes(times: int = 5) -> None:
    """Let the event loop go round."""
    for _ in range(times):
        await asyncio.sleep(0)


class Thing:
    """An object of a resource. Notices when two use it at once and when it is closed in use."""

    def __init__(self, number: int, key: object) -> None:
        self.number = number
        self.key = key
        self.closed = False
        self.users = 0

    def __repr__(self) -> str:
        return f"<Thing {self.number} {self.key}>"

    def __enter__(self) -> Thing:
        assert not self.closed, "leased after it was closed"
        self.users += 1
        return self

    def __exit__(self, *exc: object) -> None:
        self.users -= 1


class Maker:
    """Makes, checks, resets and closes ``Thing``s, and can be told to fail or to take its time.

    ``errors``, ``bad_checks`` and ``bad_resets`` hold what the next calls do instead of succeeding.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.made: list[Thing] = []
        self.closed: list[Thing] = []
        self.checked: list[Thing] = []
        self.was_reset: list[Thing] = []
        self.most_alive = 0
        self.threads: set[str] = set()
        self.close_loops: list[object] = []
        self.errors: deque[BaseException] = deque()
        self.bad_checks: deque[object] = deque()
        self.bad_resets: deque[BaseException] = deque()
        self.hold: threading.Event | None = None
        self.ahold: asyncio.Event | None = None
        self.entered = threading.Event()
        self.attempts = 0

    @property
    def alive(self) -> int:
        return len(self.made) - len(self.closed)

    def _make(self, key: object) -> Thing:
        with self.lock:
            if self.errors:
                raise self.errors.popleft()
            thing = Thing(len(self.made), key)
            self.made.append(thing)
            self.most_alive = max(self.most_alive, self.alive)
            return thing

    def create(self, key: object = None) -> Thing:
        with self.lock:
            self.attempts += 1
        self.threads.add(threading.current_thread().name)
        self.entered.set()
        if self.hold is not None:
            assert self.hold.wait(PATIENCE)
        return self._make(key)

    async def acreate(self, key: object = None) -> Thing:
        self.attempts += 1
        self.entered.set()
        if self.ahold is not None:
            await self.ahold.wait()
        return self._make(key)

    def check(self, thing: Thing) -> object:
        self.checked.append(thing)
        if self.bad_checks:
            answer = self.bad_checks.popleft()
            if isinstance(answer, BaseException):
                raise answer
            return answer
        return True

    async def acheck(self, thing: Thing) -> object:
        return self.check(thing)

    def reset(self, thing: Thing) -> None:
        self.was_reset.append(thing)
        if self.bad_resets:
            raise self.bad_resets.popleft()

    async def areset(self, thing: Thing) -> None:
        self.reset(thing)

    def close(self, thing: Thing) -> None:
        with self.lock:
            assert not thing.closed, "closed twice"
            assert not thing.users, "closed in use"
            thing.closed = True
            self.closed.append(thing)
            self.threads.add(threading.current_thread().name)

    async def aclose(self, thing: Thing) -> None:
        self.close_loops.append(asyncio.get_running_loop())
        self.close(thing)


class FakeTime:
    """A clock that stands still until told to move, and the reaper that lives by it.

    ``luck``, from 0 to 1, stands in for every random number.
    """

    def __init__(self) -> None:
        self.now = 1000.0
        self.luck = 0.0

        def wait(inbox: SimpleQueue[Any], timeout: float) -> Any:
            return inbox.get()  # deadlines only come near when ``advance`` says so

        # closes on the reaper's thread, so that ``advance`` waits for them
        self.reaper = reaper_module.Reaper(clock=self, wait=wait, run=lambda job: job())

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Move on, and wait until the reaper has done what is due by then."""
        self.now += seconds
        self.reaper.settle()


class Holder:
    """A thread that leases, and holds on until it is told to let go."""

    def __init__(self, resource: Resource[Any], key: object = None, **options: Any) -> None:
        self.got = threading.Event()
        self.let_go = threading.Event()
        self.value: Any = None
        self.error: BaseException | None = None
        self._lease = resource.lease(key, **options)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            with self._lease as self.value:
                self.got.set()
                assert self.let_go.wait(PATIENCE)
        except BaseException as exc:
            self.error = exc
            self.got.set()

    def wait(self) -> Any:
        """What it got; raises what it got instead."""
        assert self.got.wait(PATIENCE)
        if self.error is not None:
            raise self.error
        return self.value

    def finish(self) -> None:
        """Let go, and wait until that is done."""
        self.let_go.set()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()


def check_sound(resource: Resource[Any]) -> None:
    """What holds of every resource at every moment."""
    stats = resource.stats()
    assert stats.size == stats.idle + stats.in_use + stats.loading + stats.closing, stats
    assert stats.loads - stats.closed <= stats.idle + stats.in_use + stats.closing, stats
    assert stats.max_size is None or stats.size <= stats.max_size, stats


def check_at_rest(resource: Resource[Any]) -> None:
    """What holds once nobody uses a resource: nothing is lost, nobody is left behind."""

    # one look at all of it: what is idle for long may begin to close at any moment
    looks = [resource.stats()]

    def still() -> bool:
        looks[0] = resource.stats()
        return looks[0].loading == looks[0].closing == 0

    until(still)
    check_sound(resource)
    (stats,) = looks
    assert stats.in_use == 0, stats
    assert stats.holders == 0, stats
    assert stats.waiting == 0, stats
    assert stats.size == stats.idle == stats.loads - stats.closed, stats
