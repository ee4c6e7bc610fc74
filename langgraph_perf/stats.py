"""Counters of what the cache did, and frozen snapshots of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

from langgraph_perf._locks import new_lock
from langgraph_perf.caches.base import CacheStats

if TYPE_CHECKING:
    from langgraph_perf.resources import ResourceStats


@dataclass(frozen=True, slots=True)
class NodeStats:
    """What the cache did for one node since its graph was compiled.

    Attributes:
        hits: calls answered from the cache.
        stale_hits: calls answered by a result past its ``ttl``; they are not among the hits. So
            many of them as the refusal ``"run_failed"`` counts stood in for an error.
        misses: calls for which the node had to run.
        coalesced: calls answered by a run of the same key that was already under way.
        runs: how often the node's body ran to its end, cached or not. A call whose body raised is
            a miss without a run.
        refusals: runs that failed where a stale result was at hand, results that were not stored,
            and calls that went uncached, by reason.
        seconds_saved: time the answered calls would have taken, by what their runs took.
        tokens_saved: language-model tokens they would have spent.
        seconds_spent: time the runs took.
        tokens_spent: tokens the runs spent, as far as messages in the results report them.
    """

    hits: int = 0
    stale_hits: int = 0
    misses: int = 0
    coalesced: int = 0
    runs: int = 0
    refusals: Mapping[str, int] = field(default_factory=dict)
    seconds_saved: float = 0.0
    tokens_saved: int = 0
    seconds_spent: float = 0.0
    tokens_spent: int = 0


@dataclass(frozen=True, slots=True)
class Stats:
    """A snapshot of one compiled graph.

    Attributes:
        nodes: by node name; nodes of subgraphs as ``"parent|child"``.
        items: by namespace, what ``get_cache(namespace)`` did inside the nodes.
        failures: failed cache operations by kind; none of them reached the graph.
        cache: what the graph's own cache reports; ``None`` without one.
        resources: by name, what the graph's own resources report.
    """

    nodes: Mapping[str, NodeStats] = field(default_factory=dict)
    items: Mapping[str, NodeStats] = field(default_factory=dict)
    failures: Mapping[str, int] = field(default_factory=dict)
    cache: CacheStats | None = None
    resources: Mapping[str, ResourceStats] = field(default_factory=dict)


class NodeCounters:
    """The live counters behind one ``NodeStats``."""

    def __init__(self) -> None:
        self._lock = new_lock()
        self._hits = self._stale_hits = self._misses = self._coalesced = self._runs = 0
        self._refusals: Counter[str] = Counter()
        self._seconds_saved = self._seconds_spent = 0.0
        self._tokens_saved = self._tokens_spent = 0

    def hit(self, seconds: float, tokens: int) -> None:
        """A call was answered by a stored result that had taken ``seconds`` and ``tokens``."""
        with self._lock:
            self._hits += 1
            self._seconds_saved += seconds
            self._tokens_saved += tokens

    def stale_hit(self, seconds: float, tokens: int) -> None:
        """A call was answered by a result past its ``ttl``."""
        with self._lock:
            self._stale_hits += 1
            self._seconds_saved += seconds
            self._tokens_saved += tokens

    def coalesced(self, seconds: float, tokens: int) -> None:
        """A call was answered by somebody else's run."""
        with self._lock:
            self._coalesced += 1
            self._seconds_saved += seconds
            self._tokens_saved += tokens

    def miss(self) -> None:
        """A call was looked up in vain."""
        with self._lock:
            self._misses += 1

    def ran(self, seconds: float, tokens: int) -> None:
        """The body ran to its end."""
        with self._lock:
            self._runs += 1
            self._seconds_spent += seconds
            self._tokens_spent += tokens

    def refused(self, reason: str) -> bool:
        """A result was not stored, or a call went uncached; whether it is the first for that
        reason."""
        with self._lock:
            self._refusals[reason] += 1
            return self._refusals[reason] == 1

    def snapshot(self) -> NodeStats:
        """The counters as they are now."""
        with self._lock:
            return NodeStats(
                hits=self._hits,
                stale_hits=self._stale_hits,
                misses=self._misses,
                coalesced=self._coalesced,
                runs=self._runs,
                refusals=MappingProxyType(dict(self._refusals)),
                seconds_saved=self._seconds_saved,
                tokens_saved=self._tokens_saved,
                seconds_spent=self._seconds_spent,
                tokens_spent=self._tokens_spent,
            )


class ItemCounters:
    """The live counters of the item caches that a graph's nodes use, by namespace."""

    def __init__(self) -> None:
        self._lock = new_lock()
        self._counters: dict[str, NodeCounters] = {}

    def of(self, namespace: str) -> NodeCounters:
        """The counters of one namespace."""
        with self._lock:
            return self._counters.setdefault(namespace, NodeCounters())

    def snapshot(self) -> dict[str, NodeStats]:
        """All counters as they are now."""
        with self._lock:
            return {name: counters.snapshot() for name, counters in self._counters.items()}
