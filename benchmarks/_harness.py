"""Side-by-side timing: what two ways of doing the same thing cost, as a ratio.

Absolute times differ between machines, ratios hardly do. So both sides run in turns, in one
process and in many short rounds; each round gives one ratio, and the median of them is reported.
What disturbs the machine for a while then spoils a few rounds, not the result.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

Batch = Callable[[int], object]
"""Makes the given number of calls, one after the other."""

CHECKOUT = Path(__file__).resolve().parents[1]
_UNITS = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6))


@dataclass(frozen=True)
class Effort:
    """How thoroughly to measure.

    Attributes:
        rounds: pairs of batches.
        batch_seconds: about how long a batch of the slower side lasts.
        size: factor for the sizes that a row may shrink (fan-outs, numbers of results).
    """

    rounds: int = 101
    batch_seconds: float = 0.01
    size: float = 1.0

    def scaled(self, number: int, least: int = 2) -> int:
        """``number`` of something, shrunk."""
        return max(least, int(number * self.size))

    def at_most(self, rounds: int) -> int:
        """The number of rounds of a row whose rounds are expensive."""
        return min(self.rounds, rounds)


@dataclass(frozen=True)
class Comparison:
    """Two sides, measured in turns; one number for each round.

    Attributes:
        ours: seconds per call, or whatever else was measured.
        theirs: the same for the other side.
    """

    ours: Sequence[float]
    theirs: Sequence[float]

    @property
    def ratios(self) -> list[float]:
        """Ours through theirs, round by round."""
        return [a / b for a, b in zip(self.ours, self.theirs, strict=True)]

    @property
    def best(self) -> float:
        """The quickest of ours through the quickest of theirs: hardly spoilt by a busy machine."""
        return min(self.ours) / min(self.theirs)


@dataclass(frozen=True)
class Result:
    """One row of the table.

    Attributes:
        row: its name.
        alternative: what ``theirs`` is.
        ours: median of what was measured, in ``unit``.
        theirs: the same for the alternative.
        ratio: median over the rounds of ours through theirs.
        low: the smallest ratio of a round.
        high: the largest.
        best: the quickest round of ours through the quickest of theirs.
        rounds: how many rounds.
        target: the most that ``measured`` may be; ``None`` without one.
        measured: what the target bounds: the ratio, unless ``measure`` says otherwise.
        measure: what ``measured`` is.
        note: what else there is to know.
        details: the same as numbers, for the JSON file.
    """

    row: str
    alternative: str
    unit: str
    ours: float
    theirs: float
    ratio: float
    low: float
    high: float
    best: float
    rounds: int
    target: float | None
    measured: float
    measure: str = "ratio"
    note: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def reached(self) -> bool | None:
        """Whether the target is reached; ``None`` without one."""
        return None if self.target is None else self.measured <= self.target

    def json(self) -> dict[str, Any]:
        """For a JSON file."""
        return {**asdict(self), "reached": self.reached}


def result(
    row: str,
    alternative: str,
    comparison: Comparison,
    *,
    unit: str = "s",
    target: float | None = None,
    measured: float | None = None,
    measure: str = "ratio",
    note: str = "",
    details: Mapping[str, Any] | None = None,
) -> Result:
    """The row that ``comparison`` makes; see ``Result``."""
    ratios = comparison.ratios
    ratio = median(ratios)
    return Result(
        row=row,
        alternative=alternative,
        unit=unit,
        ours=median(comparison.ours),
        theirs=median(comparison.theirs),
        ratio=ratio,
        low=min(ratios),
        high=max(ratios),
        best=comparison.best,
        rounds=len(ratios),
        target=target,
        measured=ratio if measured is None else measured,
        measure=measure,
        note=note,
        details=details or {},
    )


# -- timing ----------------------------------------------------------------------------------------


def each(call: Callable[[], object]) -> Batch:
    """A batch of ``call``."""

    def batch(calls: int) -> None:
        for _ in range(calls):
            call()

    return batch


def each_awaited(loop: asyncio.AbstractEventLoop, call: Callable[[], Awaitable[object]]) -> Batch:
    """A batch of ``call``, awaited in one task."""

    async def many(calls: int) -> None:
        for _ in range(calls):
            await call()

    return lambda calls: loop.run_until_complete(many(calls))


def compare(
    ours: Batch,
    theirs: Batch,
    effort: Effort,
    *,
    before: Callable[[], object] | None = None,
    most_calls: int = 10_000,
    clock: Callable[[], float] = time.perf_counter,
) -> Comparison:
    """Time two batches in turns.

    Args:
        ours: one side; it must do as much work in its first call as in its hundredth.
        theirs: the other side.
        effort: how many rounds, and how long.
        before: runs before each batch, untimed.
        most_calls: the most calls of a batch, for what fills a disk.
        clock: seconds.
    """

    def timed(batch: Batch, calls: int) -> float:
        if before is not None:
            before()
        gc.collect()
        gc.disable()
        try:
            started = clock()
            batch(calls)
            return (clock() - started) / calls
        finally:
            gc.enable()

    with frozen():
        slower = 0.0
        for _ in range(2):  # the first time warms up, the second tells how many calls fit
            slower = max(timed(ours, 1), timed(theirs, 1))
        calls = min(most_calls, max(1, round(effort.batch_seconds / max(slower, 1e-9))))
        if calls > 1:
            timed(ours, calls)
            timed(theirs, calls)
        seconds: tuple[list[float], list[float]] = ([], [])
        for number in range(effort.rounds):
            # A B, then B A: neither side always runs second
            for side in (0, 1) if number % 2 else (1, 0):
                seconds[side].append(timed((ours, theirs)[side], calls))
    return Comparison(*seconds)


@contextmanager
def frozen() -> Iterator[None]:
    """What exists by now is not for the garbage collections between batches to walk."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def event_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop that is cleaned up."""
    loop = asyncio.new_event_loop()
    try:
        yield loop
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


# -- other processes -------------------------------------------------------------------------------


def start(code: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    """A fresh interpreter that runs ``code``; it can import this package."""
    path = os.pathsep.join(filter(None, (str(CHECKOUT), os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def output(code: str, *arguments: object, **environment: str) -> list[float]:
    """The numbers that ``code`` prints in an interpreter of its own.

    Raises:
        RuntimeError: it failed; its error is on stderr.
    """
    with start(code, *arguments, **environment) as process:
        printed, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"a benchmark's process ended with exit code {process.returncode}")
    return [float(number) for number in printed.split()]


# -- the table -------------------------------------------------------------------------------------


def table(results: Sequence[Result]) -> str:
    """The results as text."""
    head = (
        "row",
        "ours",
        "theirs",
        "ratio (min-max)",
        "best",
        "target",
        "reached",
        "against; note",
    )
    rows = [head, *map(_cells, results)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head) - 1)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        lines.append("  ".join([*cells, row[-1]]).rstrip())
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _cells(row: Result) -> tuple[str, ...]:
    if row.target is None:
        target, reached = "", ""
    else:
        other = "" if row.measure == "ratio" else f" {row.measure} (got {row.measured:.3g})"
        target, reached = f"<= {row.target:g}{other}", "yes" if row.reached else "NO"
    return (
        row.row,
        _amount(row.ours, row.unit),
        _amount(row.theirs, row.unit),
        f"{row.ratio:.3g} ({row.low:.3g}-{row.high:.3g})",
        f"{row.best:.3g}",
        target,
        reached,
        "; ".join(filter(None, (row.alternative, row.note))),
    )


def _amount(value: float, unit: str) -> str:
    if unit != "s":
        return f"{value:,.4g} {unit}"
    name, factor = next((u for u in _UNITS if value >= u[1]), _UNITS[-1])
    return f"{value / factor:.4g} {name}"


# -- the program -----------------------------------------------------------------------------------


def program(
    module: str,
    description: str | None,
    rows: Mapping[str, Callable[[Effort], Iterator[Result]]],
    packages: Sequence[str],
    thorough: Effort,
    quick: Effort,
    argv: Sequence[str] | None,
) -> int:
    """A benchmark's command line: measure, print the table, write the JSON file.

    Args:
        module: its name in this package.
        description: what ``--help`` says.
        rows: what it measures, by the names that ``--only`` takes.
        packages: whose versions go into the file.
        thorough: the effort by default.
        quick: the effort with ``--quick``.
        argv: the arguments, by default those of the process.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{module}", description=description)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here too")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, smaller sizes")
    parser.add_argument("--only", nargs="+", choices=rows, metavar="NAME", help=", ".join(rows))
    options = parser.parse_args(argv)
    effort = quick if options.quick else thorough
    results: list[Result] = []
    for name in options.only or rows:
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        for found in rows[name](effort):
            print(f"  {found.row}: {found.ratio:.3g}", file=sys.stderr, flush=True)
            results.append(found)
    print(table(results))
    if options.json is not None:
        report = {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "versions": {package: version(package) for package in packages},
            "effort": asdict(effort),
            "rows": [found.json() for found in results],
        }
        options.json.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return 0
