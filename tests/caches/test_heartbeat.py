"""Leases of running nodes are renewed in time, whatever other backends and leases there are."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from langgraph_perf import MemoryCache, RedisCache, _heartbeat
from langgraph_perf.caches.base import Cache, Lease
from tests.redis_server import Server, new_prefix


def some_lease(name: str) -> Lease:
    return Lease((("n",), name), name, 0.0)


class Renewing(MemoryCache):
    """Says when a lease was renewed; fails, or hangs, as often as told."""

    lease_seconds = 0.1

    def __init__(self, fails: int = 0, hangs: threading.Event | None = None) -> None:
        super().__init__()
        self.fails, self.hangs = fails, hangs
        self.asked, self.renewed = threading.Event(), threading.Event()

    def renew(self, lease: Lease) -> Lease | None:
        self.asked.set()
        if self.hangs is not None:
            self.hangs.wait()
        if self.fails:
            self.fails -= 1
            raise ConnectionError("away")
        self.renewed.set()
        return lease._replace(expires=lease.expires + 1)


def test_a_backend_that_hangs_keeps_no_other_one_waiting() -> None:
    """While the renewal of one cache's lease hangs, another cache's leases are renewed."""
    end = threading.Event()
    hanging, healthy = Renewing(hangs=end), Renewing()
    first, second = some_lease("hanging"), some_lease("healthy")
    try:
        _heartbeat.keep(hanging, first)
        assert hanging.asked.wait(10)
        _heartbeat.keep(healthy, second)
        assert healthy.renewed.wait(10)
    finally:
        end.set()
        _heartbeat.drop(first)
        _heartbeat.drop(second)


def test_a_renewal_that_failed_is_repeated() -> None:
    """A backend that is away for a moment costs no lease."""
    cache, lease = Renewing(fails=3), some_lease("repeated")
    _heartbeat.keep(cache, lease)
    assert cache.renewed.wait(10)
    _heartbeat.drop(lease)


def renewals(cache: Cache) -> tuple[list[int], threading.Event]:
    """How many leases are renewed at a time, and what is set after a few times."""
    sizes: list[int] = []
    enough, renew_many = threading.Event(), cache.renew_many

    def noted(leases: Sequence[Lease]) -> Any:
        renewed = renew_many(leases)
        assert None not in renewed
        sizes.append(len(leases))
        if len(sizes) == 3:
            enough.set()
        return renewed

    cache.renew_many = noted  # type: ignore[method-assign]
    return sizes, enough


def test_many_leases_are_renewed_together(redis_server: Server) -> None:
    """However many nodes run, their leases cost a round trip a beat, and none is lost."""
    with RedisCache(redis_server.url, prefix=new_prefix(), lease_seconds=3.0) as cache:
        leases = [cache.acquire((("n",), str(i))) for i in range(200)]
        assert None not in leases
        sizes, enough = renewals(cache)
        before = cache.round_trips
        for lease in leases:
            assert lease is not None
            _heartbeat.keep(cache, lease)
        assert enough.wait(20)
        trips = cache.round_trips - before
        for lease in leases:
            assert lease is not None
            _heartbeat.drop(lease)
        assert sizes[:3] == [200] * 3
        assert trips <= 5
        assert cache.acquire((("n",), "7")) is None
