"""What the cache tests share."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from langgraph_perf.caches.base import Entry
from langgraph_perf.caches.disk import DiskCache


class Clock:
    """A clock that stands still until told to move."""

    def __init__(self, now: float = 1_700_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def disk(tmp_path: Path, clock: Clock) -> Iterator[DiskCache]:
    """A disk cache in a fresh directory."""
    with DiskCache(tmp_path / "cache", clock=clock) as cache:
        yield cache


@pytest.fixture(autouse=True)
def no_threads_left() -> Iterator[None]:
    """No test leaves a thread behind; collects garbage only where there is one to be found."""
    before = set(threading.enumerate())
    yield
    if any(not thread.daemon for thread in set(threading.enumerate()) - before):
        gc.collect()
        for thread in set(threading.enumerate()) - before:
            if not thread.daemon and not thread.name.startswith("asyncio_"):
                thread.join(5)
                assert not thread.is_alive(), f"{thread.name} is still running"


def entry(payload: bytes = b"value", **fields: object) -> Entry:
    """An entry made at the time a fresh ``Clock`` shows."""
    return Entry(payload, **{"created": 1_700_000_000.0, **fields})
