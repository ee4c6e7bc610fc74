"""Fixtures shared by all tests."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import settings
from langgraph.pregel import _retry

from langgraph_perf import DiskCache, MemoryCache, RedisCache, TieredCache
from langgraph_perf._backend import Backend
from langgraph_perf.caches.base import Cache
from langgraph_perf.caches.foreign import ForeignCache
from langgraph_perf.testing import Clock as Clock

from .redis_server import new_prefix
from .redis_server import own_server as own_server
from .redis_server import proxy as proxy
from .redis_server import redis_server as redis_server
from .resources.helpers import auntil
from .servers import postgres as postgres

PATIENCE = 20.0

# what a change is told is about the change: chance looks for more when it is asked to
settings.register_profile("steady", deadline=None, derandomize=True)
settings.register_profile("random", deadline=None)
settings.load_profile("steady")


@pytest.fixture(scope="session", autouse=True)
def _patient() -> Iterator[None]:
    """Caches that were told no deadline give up late: a second is not much on a busy machine, and
    what came to nothing then looks like a fault. Tests of deadlines set their own."""
    with pytest.MonkeyPatch.context() as patch:
        for kind, names in {
            DiskCache: ["timeout"],
            RedisCache: ["timeout", "connect_timeout"],
            ForeignCache: ["deadline"],
        }.items():
            for name in names:
                patch.setitem(kind.__init__.__kwdefaults__, name, PATIENCE)
        patch.setattr(Backend, "deadline", PATIENCE)
        yield


@pytest.fixture
def clock() -> Clock:
    return Clock()


def told(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """What this library said; asyncio may speak at any time of what other tests left behind."""
    return [record for record in caplog.records if record.name == "langgraph_perf"]


class Threads:
    """Whether threads of this library can be started.

    Attributes:
        allowed: so they can.
    """

    def __init__(self) -> None:
        self.allowed = True


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Threads:
    """A machine that may be at its limit of processes."""
    made, start = Threads(), threading.Thread.start

    def limited(thread: threading.Thread) -> None:
        if not made.allowed and thread.name.startswith("langgraph-perf"):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    return made


class IdleClock:
    """The clock of LangGraph's ``idle_timeout``, and how often a node reported progress to it."""

    IDLE_TIMEOUT = 0.05

    def __init__(self) -> None:
        self.now = 0.0
        self.reports = 0

    def monotonic(self) -> float:
        return self.now

    async def outlast(self, run: asyncio.Task[Any]) -> None:
        """Let twice the timeout go by while ``run`` waits, no more than a report allows at once."""
        for _ in range(3):
            reports = self.reports
            self.now += self.IDLE_TIMEOUT * 0.7
            await auntil(lambda reports=reports: run.done() or self.reports > reports)
        assert not run.done()


@pytest.fixture
def idle_clock(monkeypatch: pytest.MonkeyPatch) -> IdleClock:
    """Time for nodes with an ``idle_timeout`` that goes by as a test lets it."""
    clock, scope = IdleClock(), _retry._TimedAttemptScope
    touch = scope.touch

    def report(self: Any) -> None:
        touch(self)
        clock.reports += 1

    monkeypatch.setattr(scope, "touch", report)
    monkeypatch.setattr(_retry, "time", SimpleNamespace(monotonic=clock.monotonic, time=time.time))
    return clock


def make_cache(kind: str, directory: Path, **options: Any) -> Cache:
    """A cache of the named kind."""
    if kind == "memory":
        return MemoryCache(**options)
    if kind == "disk":
        return DiskCache(directory / "cache", **options)
    if kind == "redis":
        return RedisCache(options.pop("url"), prefix=new_prefix(), **options)
    if kind == "tiers":
        return TieredCache(MemoryCache(), make_cache("redis", directory, **options))
    assert kind == "tiered"
    return TieredCache(MemoryCache(**options), DiskCache(directory / "cache", **options))


def check_idle(cache: Cache) -> None:
    """Whatever happened, nothing may be left in flight."""
    assert len(Backend.of(cache).flights) == 0


@pytest.fixture(params=["memory", "disk", "tiered", "redis", "tiers"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cache]:
    """Every cache of this library, checked for leftovers and closed after the test."""
    options = {}
    if request.param in ("redis", "tiers"):
        options["url"] = request.getfixturevalue("redis_server").url
    made = make_cache(request.param, tmp_path, **options)
    yield made
    check_idle(made)
    made.close()


@pytest.fixture
def memory() -> Iterator[MemoryCache]:
    """A memory cache, checked for leftovers after the test."""
    made = MemoryCache()
    yield made
    check_idle(made)
    made.close()


@pytest.fixture(autouse=True)
def no_threads_left() -> Iterator[None]:
    """No test leaves a thread behind that would keep the process alive."""
    before = set(threading.enumerate())
    yield
    left = set(threading.enumerate()) - before
    if left:
        gc.collect()  # what a forgotten object holds is not left behind; a second look tells
    for thread in left:
        if not thread.daemon and not thread.name.startswith(("asyncio_", "ThreadPoolExecutor")):
            thread.join(PATIENCE)
            assert not thread.is_alive(), f"{thread.name} is still running"
