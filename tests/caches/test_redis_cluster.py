"""RedisCache on a cluster: the whole conformance suite, with keys in every slot."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import redis.asyncio

from langgraph_perf import ConfigurationError, MemoryCache, RedisCache, TieredCache
from langgraph_perf.caches.base import Cache, Lookup
from langgraph_perf.testing import KEY, Clock, entry
from tests.redis_server import cluster, new_prefix

from .test_conformance import OnRedis, ServersClock


@pytest.fixture(scope="module")
def client() -> Iterator[redis.RedisCluster]:
    with cluster() as client:
        yield client


def age(client: Any, prefix: str, seconds: float) -> None:
    for name in list(client.scan_iter(match=f"{prefix}:*", count=1000)):
        left = client.pttl(name)
        if left > seconds * 1000:
            client.pexpire(name, int(left - seconds * 1000))
        elif left >= 0:
            client.delete(name)


class TestCluster(OnRedis):
    client: Any

    @pytest.fixture(autouse=True)
    def _use(self, client: Any) -> None:  # type: ignore[override]
        self.client = client

    def make_clock(self, directory: Path) -> Clock:
        prefix = self.prefix(directory)
        return ServersClock(lambda seconds: age(self.client, prefix, seconds))

    def make(self, directory: Path, clock: Clock) -> Cache:
        return self.redis(self.client, directory, clock)


class TestTieredCluster(TestCluster):
    forever = 86400.0 * 29

    def make(self, directory: Path, clock: Clock) -> Cache:
        return TieredCache(MemoryCache(clock=clock), super().make(directory, clock))


def test_clients_that_cannot_serve(client: Any) -> None:
    """A client that decodes, or that belongs to one event loop, is refused with a way out."""
    (node, *_) = client.get_nodes()
    decoding = redis.RedisCluster(host=node.host, port=node.port, decode_responses=True)
    with pytest.raises(ConfigurationError, match="decode_responses"):
        RedisCache(decoding)
    decoding.close()
    with pytest.raises(ConfigurationError, match=r"redis\.RedisCluster"):
        RedisCache(redis.asyncio.RedisCluster(host=node.host, port=node.port))


def test_nodes_that_hang(client: Any) -> None:
    """Every operation has the cache's deadline, whatever the client's; when they go on, it does."""
    prefix = new_prefix()
    nodes = client.info("server", target_nodes=redis.RedisCluster.ALL_NODES)
    pids = [info["process_id"] for info in nodes.values()]
    with RedisCache(client, prefix=prefix) as cache:
        assert cache.write(KEY, entry())
        # only now: a busy machine may take longer for what is to be in time
        cache.timeout = cache._line.timeout = 1.0

        async def read() -> None:
            await cache.aread([Lookup(KEY)])

        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            started = time.monotonic()
            with pytest.raises(TimeoutError):
                cache.read([Lookup(KEY)])
            with pytest.raises(TimeoutError):
                asyncio.run(read())
            with pytest.raises(TimeoutError):
                cache.clear()
            assert time.monotonic() - started < 20.0
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
        cache.timeout = 20.0
        assert cache.read([Lookup(KEY)]) == [entry()]
