"""The benchmarks of checkpointers: every row runs and measures both sides. No time is asserted."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks are not installed

from benchmarks import bench_checkpoint
from benchmarks._harness import Effort
from langgraph_perf import DiskCache, MemoryCache

from .redis_server import Server

pytestmark = pytest.mark.no_cover  # what it covers others do, in less time

TINY = Effort(rounds=1, batch_seconds=0.0, size=0.01)
HOLD = {"operations more or less": 0}
"""What holds however little is measured, and the most it may be."""


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
        assert found.measured <= HOLD.get(found.measure, math.inf), found.note


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


@pytest.mark.parametrize(
    ("make", "count_in", "look"),
    [
        (lambda path: MemoryCache(), bench_checkpoint._bytecodes, lambda c: c.clear([("x",)])),
        (
            DiskCache,
            bench_checkpoint._statements,
            lambda c: c._db.rows("SELECT sum(length(value)) FROM Cache"),
        ),
    ],
    ids=["memory", "disk"],
)
def test_a_look_at_what_others_own_would_be_counted(
    make: Callable[[Path], Any], count_in: Any, look: Callable[[Any], object], tmp_path: Path
) -> None:
    """Whatever looks at all entries counts more operations the more there are."""
    counts = []
    for threads in (3, 6):
        with make(tmp_path / str(threads)) as cache:
            forgetting = bench_checkpoint._Forgetting(cache, threads)
            with count_in(cache) as done:
                look(cache)
            counts.append(done)
            assert forgetting.counted(count_in)["entries"] == bench_checkpoint.ENTRIES
    few, many = counts
    assert few["entries"] == many["entries"] == 0
    assert any(many[kind] >= few[kind] + bench_checkpoint.ENTRIES for kind in few)


def test_commands_are_counted(own_server: Server) -> None:
    """Each command that the server carries out, by whatever way, and each key that goes."""
    with redis.Redis.from_url(own_server.url) as client:
        client.set("counted", 1)
        with bench_checkpoint._commands(own_server.url) as done:
            client.eval("redis.call('GET', KEYS[1])", 1, "counted")
            client.delete("counted")
    assert done == {"commands": 3, "keys": 1}
