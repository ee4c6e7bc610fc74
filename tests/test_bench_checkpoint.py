"""The benchmarks of checkpointers: every row runs and measures both sides. No time is asserted."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import psycopg
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks are not installed

from benchmarks import bench_checkpoint
from benchmarks._harness import Effort

TINY = Effort(rounds=1, batch_seconds=0.0, size=0.01)


@pytest.mark.parametrize("name", bench_checkpoint.ROWS)
def test_every_row_yields_finite_numbers(
    name: str, postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row measures both sides, once per alternative."""
    monkeypatch.setenv("POSTGRES_DSN", postgres)
    results = list(bench_checkpoint.ROWS[name](TINY))

    assert len({(found.row, found.alternative) for found in results}) == len(results) > 0
    for found in results:
        assert all(math.isfinite(n) and n > 0 for n in (found.ours, found.theirs, found.ratio))
        assert found.reached is (None if found.target is None else found.measured <= found.target)


def test_a_private_server_waits_for_its_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured is what a server in production does; its tables are empty."""
    monkeypatch.delenv("POSTGRES_DSN", raising=False)
    with bench_checkpoint.server() as dsn, psycopg.connect(dsn) as connection:
        assert connection.execute("SHOW fsync").fetchall() == [("on",)]
        assert connection.execute("SELECT count(*) FROM checkpoints").fetchall() == [(0,)]


def test_invokes_per_second_are_in_the_file(
    tmp_path: Path, postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The JSON file has the speed of both sides as numbers."""
    monkeypatch.setenv("POSTGRES_DSN", postgres)
    monkeypatch.setattr(bench_checkpoint, "QUICK", TINY)
    file = tmp_path / "checkpoint.json"
    assert bench_checkpoint.main(["--quick", "--json", str(file), "--only", "pooled"]) == 0
    for row in json.loads(file.read_text("utf-8"))["rows"]:
        speeds = row["details"]["invokes per second"]
        assert speeds["ours"] > 0 < speeds["theirs"]
