"""What the cache tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from langgraph_perf.caches.base import Entry
from langgraph_perf.caches.disk import DiskCache
from tests.conftest import Clock


@pytest.fixture
def disk(tmp_path: Path, clock: Clock) -> Iterator[DiskCache]:
    """A disk cache in a fresh directory."""
    with DiskCache(tmp_path / "cache", clock=clock) as cache:
        yield cache


def entry(payload: bytes = b"value", **fields: object) -> Entry:
    """An entry made at the time a fresh ``Clock`` shows."""
    return Entry(payload, **{"created": 1_700_000_000.0, **fields})
