"""Fixtures shared by all tests."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from langgraph_perf import DiskCache, MemoryCache, RedisCache, TieredCache
from langgraph_perf._backend import Backend
from langgraph_perf.caches.base import Cache
from langgraph_perf.testing import Clock as Clock

from .redis_server import new_prefix
from .redis_server import own_server as own_server
from .redis_server import proxy as proxy
from .redis_server import redis_server as redis_server
from .servers import postgres as postgres


@pytest.fixture
def clock() -> Clock:
    return Clock()


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
            thread.join(5)
            assert not thread.is_alive(), f"{thread.name} is still running"
