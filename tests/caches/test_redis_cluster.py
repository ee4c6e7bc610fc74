"""RedisCache on a cluster: the whole conformance suite, with keys in every slot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import redis.asyncio

from langgraph_perf import ConfigurationError, MemoryCache, RedisCache, TieredCache
from langgraph_perf.caches.base import Cache
from langgraph_perf.testing import Clock
from tests.redis_server import cluster

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
        return RedisCache(self.client, prefix=self.prefix(directory), clock=clock)


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
