"""The benchmarks of pools: every row runs and measures both sides. No time is asserted."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks are not installed

from benchmarks import bench_pools
from benchmarks._harness import Effort

pytestmark = pytest.mark.no_cover  # what it covers others do, in less time

TINY = Effort(rounds=1, batch_seconds=0.0, size=0.01)


@pytest.mark.parametrize("name", bench_pools.ROWS)
def test_every_row_yields_finite_numbers(name: str) -> None:
    """Each row measures both sides, once per alternative."""
    results = list(bench_pools.ROWS[name](TINY))

    assert len({(found.row, found.alternative) for found in results}) == len(results) > 0
    for found in results:
        assert all(math.isfinite(n) and n > 0 for n in (found.ours, found.theirs, found.ratio))
        assert found.reached is (None if found.target is None else found.measured <= found.target)


def test_everybody_is_served() -> None:
    """However many branches share two objects."""
    (found,) = bench_pools.fanout(TINY)
    assert found.measured == 0


def test_waits_are_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The JSON file has the waits of both sides as numbers."""
    monkeypatch.setattr(bench_pools, "QUICK", TINY)
    file = tmp_path / "pools.json"
    assert bench_pools.main(["--quick", "--json", str(file), "--only", "tasks"]) == 0
    for row in json.loads(file.read_text("utf-8"))["rows"]:
        for side in ("ours", "theirs"):
            waited = row["details"]["seconds waited"][side]
            assert 0 <= waited["median"] <= waited["p99"] <= waited["longest"]
