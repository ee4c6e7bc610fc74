"""The benchmarks of Redis: every row runs and measures both sides. No time is asserted."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks are not installed

from benchmarks import bench_redis
from benchmarks._harness import Effort
from langgraph_perf import RedisCache

pytestmark = pytest.mark.no_cover  # what it covers others do, in less time

TINY = Effort(rounds=1, batch_seconds=0.0, size=0.01)
HOLD = {"stale reads": 0, "runs": 1}
"""What holds however little is measured, and the most it may be."""


@pytest.mark.parametrize("name", bench_redis.ROWS)
def test_every_row_yields_finite_numbers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row measures both sides; no stale read, and one run of a cold key."""
    monkeypatch.setattr(bench_redis, "PROCESSES", 3)
    if name == "away":
        # what hangs is given up after this each time; other tests are more patient
        monkeypatch.setitem(RedisCache.__init__.__kwdefaults__, "timeout", 1.0)
    results = list(bench_redis.ROWS[name](TINY))

    assert len({(found.row, found.alternative) for found in results}) == len(results) > 0
    for found in results:
        assert all(math.isfinite(n) and n > 0 for n in (found.ours, found.theirs, found.ratio))
        if found.measure in HOLD:
            assert found.measured <= HOLD[found.measure]
