"""What the cache tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from langgraph_perf.caches.disk import DiskCache
from langgraph_perf.testing import entry as entry
from tests.conftest import Clock


@pytest.fixture
def disk(tmp_path: Path, clock: Clock) -> Iterator[DiskCache]:
    """A disk cache in a fresh directory."""
    with DiskCache(tmp_path / "cache", clock=clock) as cache:
        yield cache
