"""What the cache tests share."""

from __future__ import annotations

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
def disk(tmp_path: Path, clock: Clock):
    """A disk cache in a fresh directory."""
    with DiskCache(tmp_path / "cache", clock=clock) as cache:
        yield cache


def entry(payload: bytes = b"value", **fields: object) -> Entry:
    """An entry made at the time a fresh ``Clock`` shows."""
    return Entry(payload, **{"created": 1_700_000_000.0, **fields})
