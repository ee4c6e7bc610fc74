"""These caches under a plain LangGraph graph, whose nodes do not fail open by themselves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from langgraph.graph import START, StateGraph
from langgraph.types import CachePolicy
from typing_extensions import TypedDict

from langgraph_perf import DiskCache, RedisCache
from langgraph_perf.caches.base import Cache
from tests.conftest import told
from tests.redis_server import free_port

KEY = (("n",), "k")


class State(TypedDict, total=False):
    query: str
    answer: str


@pytest.fixture(params=["redis", "disk"])
def failing(request: Any, tmp_path: Path) -> Iterator[Cache]:
    """A cache whose backend is away, or is damaged."""
    made: Cache
    if request.param == "redis":
        made = RedisCache(f"redis://127.0.0.1:{free_port()}/0")
    else:
        made = DiskCache(tmp_path / "cache")
        for file in (tmp_path / "cache").glob("*.db*"):
            file.write_bytes(b"\0" * 8192)
    with made:
        yield made


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_plain_graph_goes_on(failing: Cache, mode: str, caplog: pytest.LogCaptureFixture) -> None:
    """A backend that fails costs hits, not runs, and is logged once for each kind of failure."""
    runs = []

    def node(state: State) -> State:
        runs.append(1)
        return {"answer": f"about {state['query']}"}

    builder = StateGraph(State)
    builder.add_node("node", node, cache_policy=CachePolicy())
    graph = builder.add_edge(START, "node").compile(cache=failing)
    with caplog.at_level(logging.WARNING, "langgraph_perf"):
        for _ in range(3):
            asked: State = {"query": "caching"}
            said = graph.invoke(asked) if mode == "sync" else asyncio.run(graph.ainvoke(asked))
            assert said["answer"] == "about caching"
    kinds = [record.getMessage().partition(",")[0] for record in told(caplog)]
    assert kinds
    assert len(set(kinds)) == len(kinds), kinds
    assert isinstance(failing, DiskCache) or runs == [1, 1, 1]


def test_all_four_fail_open(caplog: pytest.LogCaptureFixture) -> None:
    """``get``, ``set`` and their twins raise nothing; one failure of a kind is one line."""
    with RedisCache(f"redis://127.0.0.1:{free_port()}/0") as cache:

        async def twins() -> dict[Any, Any]:
            await cache.aset({KEY: (1, None)})
            found = await cache.aget([KEY])
            await cache.aclose()
            return found

        cache.set({KEY: (1, None)})
        assert cache.get([KEY]) == {}
        assert asyncio.run(twins()) == {}
    said = [record.getMessage() for record in caplog.records if "logged once" in record.message]
    assert [line.partition(" failed")[0] for line in said] == [
        "write of RedisCache",
        "read of RedisCache",
    ]


def test_invalidating_does_not_fail_open() -> None:
    """What cannot be invalidated or cleared because the server is away is told to the caller."""
    with RedisCache(f"redis://127.0.0.1:{free_port()}/0") as cache:
        with pytest.raises(redis.ConnectionError):
            cache.invalidate("docs")
        with pytest.raises(redis.ConnectionError):
            cache.clear()
