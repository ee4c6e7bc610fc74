"""What the run shows: progress, and tables of what the cache saved and the resources did."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import TextIO

from examples.knowledge_base.graph import EMBEDDINGS, NODES
from langgraph_perf.resources import ResourceStats
from langgraph_perf.stats import NodeStats, Stats

CLEAR_LINE = "\r\x1b[2K"


class Progress:
    """Permanent lines, and on a terminal one live line below them that says what is going on."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._live = out.isatty()

    def line(self, text: str = "") -> None:
        """Print a line that stays."""
        self._out.write(f"{CLEAR_LINE if self._live else ''}{text}\n")
        self._out.flush()

    def status(self, text: str) -> None:
        """Show what is going on right now; what is not a terminal gets no such lines."""
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            self._out.write(f"{CLEAR_LINE}{text[:width]}")
            self._out.flush()

    @contextmanager
    def log(self, logger: logging.Logger) -> Iterator[None]:
        """Print what ``logger`` reports (models being loaded) as lines meanwhile."""
        handler = _Lines(self)
        level = logger.level
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        try:
            yield
        finally:
            logger.setLevel(level)
            logger.removeHandler(handler)


class _Lines(logging.Handler):
    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        self._progress.line(f"  ... {record.getMessage()}")


@dataclass
class Tally:
    """What happened at one node. Times are in seconds.

    Attributes:
        saved, tokens_saved: what the runs behind the hits had taken, as recorded by the cache.
        spent: what the runs took. ``hit_time``: what the hits took, measured around the node.
    """

    runs: int = 0
    hits: int = 0
    misses: int = 0
    saved: float = 0.0
    tokens_saved: int = 0
    spent: float = 0.0
    hit_time: float = 0.0

    @classmethod
    def between(cls, before: NodeStats, after: NodeStats) -> Tally:
        """What the statistics of one node say happened between two snapshots."""
        return cls(
            runs=after.runs - before.runs,
            hits=after.hits - before.hits,
            misses=after.misses - before.misses,
            saved=after.seconds_saved - before.seconds_saved,
            tokens_saved=after.tokens_saved - before.tokens_saved,
            spent=after.seconds_spent - before.seconds_spent,
        )

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass
class Pass:
    """All questions of all users asked once. ``nodes`` has the document embeddings as well.

    ``leases`` and ``loads`` count what happened to the resources.
    """

    name: str
    answers: int = 0
    seconds: float = 0.0
    leases: int = 0
    loads: int = 0
    nodes: dict[str, Tally] = field(default_factory=dict)

    @property
    def cold(self) -> bool:
        """Whether every answer was generated anew."""
        return self.nodes["generate"].runs == self.answers

    def to_json(self) -> str:
        """This pass as one line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Pass:
        """The pass that ``to_json`` wrote."""
        data = json.loads(text)
        data["nodes"] = {name: Tally(**tally) for name, tally in data["nodes"].items()}
        return cls(**data)


def tallies(before: Stats, after: Stats) -> dict[str, Tally]:
    """By node, and for the item cache inside ``select``: what happened between two snapshots."""
    none = NodeStats()
    tallied = {
        name: Tally.between(before.nodes.get(name, none), after.nodes.get(name, none))
        for name in NODES
    }
    tallied[EMBEDDINGS] = Tally.between(
        before.items.get(EMBEDDINGS, none), after.items.get(EMBEDDINGS, none)
    )
    return tallied


def leased(stats: Stats) -> tuple[int, int]:
    """How many leases and loads of all resources there have been."""
    resources = stats.resources.values()
    # of a driver's own pool only the driver knows what it opens: every lease counts as a load
    loads = sum(s.loads for s in resources if s.max_size is not None)
    return sum(s.leases for s in resources), loads


def total(passes: Sequence[Pass]) -> dict[str, Tally]:
    """By node, the sums over all passes."""
    sums: dict[str, Tally] = {}
    for done in passes:
        for name, tally in done.nodes.items():
            sums[name] = sums.get(name, Tally()) + tally
    return sums


def passes_table(passes: Sequence[Pass]) -> list[str]:
    """One row for each pass: how long it took, how much faster than cold that is, and how often
    each node really ran."""
    cold = passes[0].seconds if passes[0].cold else 0.0
    rows = [["pass", "answers", "seconds", "faster", *NODES, "embeddings", "leases", "loads"]]
    for p in passes:
        ran = [f"{p.nodes[n].runs} of {p.answers}" for n in NODES]
        embedded = str(p.nodes[EMBEDDINGS].misses)
        row = [p.name, str(p.answers), f"{p.seconds:.2f}", _times(cold, p.seconds), *ran, embedded]
        rows.append([*row, str(p.leases), str(p.loads)])
    return _aligned(rows)


def nodes_table(nodes: Mapping[str, Tally]) -> list[str]:
    """One row for each node: what it did, and what the cache saved."""
    rows = [
        ["node", "runs", "hits", "misses", "s/run", "ms/hit", "faster", "s saved", "tokens saved"]
    ]
    for name in NODES:
        t = nodes[name]
        rows.append(
            [
                name,
                str(t.runs),
                str(t.hits),
                str(t.misses),
                f"{t.spent / t.runs:.3f}" if t.runs else "-",
                f"{1000 * t.hit_time / t.hits:.1f}" if t.hits else "-",
                _times(t.saved, t.hit_time),
                f"{t.saved:.2f}",
                str(t.tokens_saved),
            ]
        )
    return _aligned(rows)


def resources_table(resources: Mapping[str, ResourceStats]) -> list[str]:
    """One row for each resource of this process: how it was used, and what there is of it now."""
    rows = [["resource", "leases", "loads", "s loading", "ms longest wait", "in memory", "at most"]]
    for name, s in resources.items():
        mine = s.max_size is not None
        rows.append(
            [
                name,
                str(s.leases),
                str(s.loads) if mine else "-",
                f"{s.load_seconds:.2f}" if mine else "-",
                f"{1000 * s.longest_wait:.1f}",
                str(s.size) if mine else "-",
                str(s.max_size) if mine else "driver's",
            ]
        )
    return _aligned(rows)


def processes_table(title: str, passes: Sequence[Pass]) -> list[str]:
    """One row for each process, and one for all: how many nodes were answered from the cache, and
    how often each really ran."""
    rows = [[title, "answers", "seconds", "hits", *(f"{name} ran" for name in NODES)]]
    for number, p in enumerate(passes, 1):
        ran = [str(p.nodes[name].runs) for name in NODES]
        hits = _hits(p.nodes)
        rows.append([f"process {number}", str(p.answers), f"{p.seconds:.2f}", hits, *ran])
    together = total(passes)
    asked = sum(p.answers for p in passes)
    longest = max(p.seconds for p in passes)
    runs = [str(together[name].runs) for name in NODES]
    return _aligned([*rows, ["all", str(asked), f"{longest:.2f}", _hits(together), *runs]])


def _hits(nodes: Mapping[str, Tally]) -> str:
    return str(sum(nodes[name].hits for name in NODES))


def _times(slow: float, fast: float) -> str:
    return f"{slow / fast:.1f}x" if slow and fast else "-"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join(cells))
    lines.insert(1, "  ".join("-" * width for width in widths))
    return lines
