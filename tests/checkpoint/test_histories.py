"""A cache goes unnoticed in random histories of random graphs.

What a history is, and what is compared, is in ``histories``. The last tests show that what a cache
should not do is noticed.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from langgraph.cache.memory import InMemoryCache
from langgraph.checkpoint.memory import InMemorySaver

from langgraph_perf import DiskCache, MemoryCache, _attempt
from langgraph_perf._watch import Watch

from .histories import (
    Different,
    Driver,
    History,
    Kind,
    Twin,
    build,
    compare,
    histories,
    long_histories,
)
from .savers import Make, drivers, savers
from .test_behaviour import asks

pytestmark = pytest.mark.no_cover  # what it covers others do, in less time

numbers = itertools.count()


def check(history: History, driver: Driver, saver: Make, cache: Any, kind: Kind = "ours") -> Any:
    """Compare a plain graph with one that has a cache; gives what happened, counted."""
    # a database is used for many histories
    prefix = f"{next(numbers)}-{os.getpid()}-"
    spec, asynchronous = history.graph, driver.loop is not None
    plain = build(spec, saver(), "plain", asynchronous=asynchronous)
    cached = build(spec, saver(), kind, cache=cache, asynchronous=asynchronous)
    happened = compare(
        history,
        Twin(spec, plain, driver, f"{prefix}plain"),
        Twin(spec, cached, driver, f"{prefix}cached"),
    )
    if kind == "ours":
        for node in cached.perf.stats().nodes.values():
            happened.update(hits=node.hits, misses=node.misses)
    return happened


@pytest.mark.timeout(900)  # what fails is made small first
@pytest.mark.parametrize(
    ("how", "saver", "cache", "examples"),
    [
        # in parts, for several cores
        pytest.param("sync", "memory", "memory", 250, id="sync-1"),
        pytest.param("sync", "memory", "memory", 250, id="sync-2"),
        pytest.param("async", "memory", "memory", 250, id="async-1"),
        pytest.param("async", "memory", "memory", 250, id="async-2"),
        pytest.param("sync", "memory", "disk", 20, id="sync-disk-cache"),
        pytest.param("async", "memory", "disk", 20, id="async-disk-cache"),
        pytest.param("sync", "sqlite", "memory", 20, id="sync-sqlite"),
        pytest.param("async", "sqlite", "memory", 20, id="async-sqlite"),
        pytest.param("sync", "postgres", "memory", 20, id="sync-postgres"),
        pytest.param("async", "postgres", "memory", 20, id="async-postgres"),
    ],
)
def test_a_cache_goes_unnoticed(
    how: str, saver: str, cache: str, examples: int, request: pytest.FixtureRequest
) -> None:
    """The same results, errors, states and histories, with and without the cache."""
    asks(how)
    happened: Counter[str] = Counter()
    tmp_path: Path = request.getfixturevalue("tmp_path")

    few = examples < 100  # of these, more must happen in each, and always the same

    with drivers(how) as driver, savers(saver, driver, request) as make:

        @settings(
            max_examples=examples,
            database=None,
            derandomize=few,
            suppress_health_check=list(HealthCheck),
        )
        @given(long_histories if few else histories)
        def unnoticed(history: History) -> None:
            own = MemoryCache() if cache == "memory" else DiskCache(tmp_path / f"{next(numbers)}")
            with closing(own):
                happened.update(check(history, driver, make, own))

        if not few and settings().derandomize:  # not the same ones in all parts
            unnoticed = seed(crc32(request.node.name.encode()))(unnoticed)
        unnoticed()
    assert all(happened[what] for what in ("hits", "misses", "run", "answer")), happened
    rare = ("asked", "answered", "failed", "fork", "update", "command", "delete", "clear")
    # drawn at random: now and then one or two of them are not
    assert few or sum([happened[what] > 0 for what in rare]) >= len(rare) - 2, happened


def noticed(kind: Kind, cache: Make) -> str:
    """What is noticed of a cache that does what it should not."""

    @settings(
        max_examples=300,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(histories)
    def unnoticed(history: History) -> None:
        check(history, Driver(), InMemorySaver, cache(), kind)

    with pytest.raises(Different) as caught:
        unnoticed()
    return str(caught.value)


def test_a_key_that_leaves_out_what_the_node_reads_is_noticed() -> None:
    """One field too few in a key, and a history shows another result."""
    assert "without a cache" in noticed("unsound", MemoryCache)


def test_a_stored_answer_of_a_human_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were results that depend on a human's answer stored, somebody else would not be asked."""
    # each of the two alone is enough to keep them out
    monkeypatch.setattr(_attempt, "resumes", lambda *args: False)
    monkeypatch.setattr(Watch, "taint", None)
    assert "without a cache" in noticed("ours", MemoryCache)


def test_the_cache_of_langgraph_is_noticed() -> None:
    """LangGraph's own cache, which repeats a human's answer and an old route, is found out."""
    assert "without a cache" in noticed("langgraph", InMemoryCache)
