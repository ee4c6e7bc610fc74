"""The benchmarks: every row runs, and the harness computes what it says. No time is asserted."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks are not installed

from benchmarks import bench_cache
from benchmarks._harness import Comparison, Effort, Result, compare, output, result, table

pytestmark = pytest.mark.no_cover  # what it covers others do, in less time

TINY = Effort(rounds=2, batch_seconds=0.0, size=0.01)


@lru_cache
def measured(name: str) -> list[Result]:
    """What a row of the benchmark yields, at a tiny size; run once for all tests."""
    return list(bench_cache.ROWS[name](TINY))


@pytest.mark.parametrize("name", bench_cache.ROWS)
def test_every_row_yields_finite_numbers(name: str) -> None:
    """Each row measures both sides."""
    results = measured(name)

    assert results
    assert len({found.row for found in results}) == len(results)
    for found in results:
        numbers = (found.ours, found.theirs, found.ratio, found.low, found.high, found.best)
        assert all(math.isfinite(number) and number > 0 for number in numbers), found
        assert found.low <= found.ratio <= found.high
        assert found.reached is (None if found.target is None else found.measured <= found.target)


def test_fan_outs_report_who_ran_how_often() -> None:
    """Of equal inputs ours runs one, cold, and none, warm; distinct ones run once each."""
    notes = {found.row: found.note for found in measured("fanout")}

    assert notes["fan-out of 2, equal, cold"].startswith("executions: ours 1, theirs 2")
    assert notes["fan-out of 2, equal, warm, ainvoke"].startswith("executions: ours 0, theirs 1")
    assert notes["fan-out of 2, distinct, cold, ainvoke"] == "executions: ours 2, theirs 2"


def test_the_naive_decorator_finds_nothing_in_the_next_process() -> None:
    """Another hash seed, another key: its hit rate across processes is zero, ours is full."""
    (found,) = measured("naive")

    assert found.note == "hits in a second process: ours 2 of 2, theirs 0 of 2"


def test_a_row_that_misses_is_an_error() -> None:
    """What is to measure hits does not silently measure something else."""
    with pytest.raises(RuntimeError, match="answer ran 1 times"), bench_cache.only_hits():
        bench_cache.answer({**bench_cache.QUESTION, "answer": ""})  # type: ignore[typeddict-item]


class Work:
    """Takes the seconds it is told, on a clock of its own."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def side(self, name: str, seconds: Iterator[float]) -> Any:
        def batch(calls: int) -> None:
            self.order.append(name)
            self.now += calls * next(seconds)

        return batch


def test_ratios_are_taken_round_by_round() -> None:
    """The median of the rounds' ratios, per call, not the ratio of two medians."""
    work = Work()
    ours = work.side("ours", iter([1.0, 1.0, 1.0, 8.0, 6.0]))
    theirs = work.side("theirs", iter([2.0, 2.0, 4.0, 4.0, 2.0]))

    times = compare(ours, theirs, Effort(rounds=3, batch_seconds=0), clock=lambda: work.now)

    assert times == Comparison([1.0, 8.0, 6.0], [4.0, 4.0, 2.0])
    found = result("a row", "another", times, target=2.0)
    assert (found.low, found.ratio, found.high) == (0.25, 2.0, 3.0)
    assert found.best == 0.5
    assert found.reached


def test_neither_side_always_runs_second() -> None:
    """The order changes with each round, and what prepares a batch is not timed."""
    work = Work()

    def prepare() -> None:
        work.now += 100.0

    times = compare(
        work.side("ours", iter([1.0] * 9)),
        work.side("theirs", iter([1.0] * 9)),
        Effort(rounds=4, batch_seconds=0),
        before=prepare,
        clock=lambda: work.now,
    )

    assert times.ratios == [1.0] * 4
    rounds = [tuple(work.order[i : i + 2]) for i in range(4, 12, 2)]
    assert rounds == [("theirs", "ours"), ("ours", "theirs")] * 2


def test_a_batch_fills_its_time() -> None:
    """The slower side's speed decides on the number of calls, up to a limit."""
    made: list[int] = []
    work = Work()

    def ours(calls: int) -> None:
        made.append(calls)
        work.now += calls * 0.5

    theirs = work.side("theirs", iter([0.25] * 99))

    compare(ours, theirs, Effort(rounds=1, batch_seconds=5.0), clock=lambda: work.now)
    compare(ours, theirs, Effort(rounds=1, batch_seconds=5), most_calls=3, clock=lambda: work.now)

    assert made == [1, 1, 10, 10, 1, 1, 3, 3]


def test_a_failing_process_is_an_error() -> None:
    """A row never reports numbers of a process that broke."""
    with pytest.raises(RuntimeError, match="exit code 3"):
        output("import sys; print(1); sys.exit(3)")


def test_the_table_says_what_is_reached() -> None:
    """One line per row, with the target and whether it is reached."""
    times = Comparison([0.002, 0.002], [0.001, 0.001])
    rows = [
        result("missed", "that", times, target=1.5),
        result("reached", "that", times, target=30, measured=12.25, measure="ms added"),
        result("open", "that", times, note="more to know"),
    ]

    head, _, missed, reached, no_target = table(rows).splitlines()

    assert head.split()[:3] == ["row", "ours", "theirs"]
    assert missed.split() == [
        *("missed", "2", "ms", "1", "ms", "2", "(2-2)", "2", "<=", "1.5", "NO", "that"),
    ]
    assert "<= 30 ms added (got 12.2)  yes" in reached
    assert no_target.endswith("that; more to know")


def test_the_program_writes_a_table_and_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Progress on stderr, the table on stdout, the same results in the file."""
    monkeypatch.setattr(bench_cache, "QUICK", TINY)
    file = tmp_path / "results.json"

    assert bench_cache.main(["--quick", "--json", str(file), "--only", "hit", "hit-async"]) == 0

    printed = capsys.readouterr()
    report = json.loads(file.read_text("utf-8"))
    assert [row["row"] for row in report["rows"]] == [
        "hit, small state",
        "hit, small state, ainvoke",
    ]
    assert all(row["row"] in printed.out for row in report["rows"])
    assert "measuring hit-async ..." in printed.err
    assert report["effort"]["rounds"] == 2


def test_an_unknown_row_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """The error names the rows there are."""
    with pytest.raises(SystemExit):
        bench_cache.main(["--only", "hits"])

    error = capsys.readouterr().err
    assert "'hits'" in error
    assert "disk-processes" in error
