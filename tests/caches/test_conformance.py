"""Every cache against the conformance suite."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from hashlib import sha1
from pathlib import Path
from typing import Any

import pytest
from langgraph.cache.memory import InMemoryCache
from langgraph.cache.sqlite import SqliteCache
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer

from langgraph_perf import DiskCache, MemoryCache, RedisCache, TieredCache
from langgraph_perf.caches.base import Cache
from langgraph_perf.caches.foreign import ForeignCache
from langgraph_perf.testing import (
    BoundedConformance,
    CacheConformance,
    Clock,
    DamageConformance,
    SharedConformance,
    TagConformance,
)
from tests.redis_server import Server

ENCRYPTED = EncryptedSerializer.from_pycryptodome_aes(key=b"k" * 32)


def damaged(blobs: list[bytes], how: str) -> list[bytes]:
    """The stored entries, changed."""
    match how:
        case "flip":
            middle = len(blobs[0]) // 2
            return [b[:middle] + bytes([b[middle] ^ 1]) + b[middle + 1 :] for b in blobs]
        case "truncate":
            return [blob[:-1] for blob in blobs]
        case "swap":
            return blobs[::-1]
    return [b"something else"] * len(blobs)


class TestMemory(TagConformance, BoundedConformance):
    def make(self, directory: Path, clock: Clock) -> Cache:
        return MemoryCache(clock=clock)


class TestMemoryEncrypted(TagConformance, BoundedConformance):
    def make(self, directory: Path, clock: Clock) -> Cache:
        return MemoryCache(serde=ENCRYPTED, clock=clock)


class TestDisk(SharedConformance, BoundedConformance, DamageConformance):
    def make(self, directory: Path, clock: Clock) -> Cache:
        return DiskCache(directory / "cache", clock=clock)

    def damage(self, directory: Path, how: str) -> None:
        (file,) = (directory / "cache").glob("*.db")
        con = sqlite3.connect(file)
        rows = con.execute("SELECT rowid, value FROM Cache ORDER BY rowid").fetchall()
        for (row, _), blob in zip(rows, damaged([v for _, v in rows], how), strict=True):
            con.execute("UPDATE Cache SET value = ? WHERE rowid = ?", (blob, row))
        con.commit()
        con.close()


class TestDiskEncrypted(SharedConformance, BoundedConformance):
    def make(self, directory: Path, clock: Clock) -> Cache:
        return DiskCache(directory / "cache", serde=ENCRYPTED, clock=clock)


class TestTieredMemoryDisk(SharedConformance):
    def make(self, directory: Path, clock: Clock) -> Cache:
        return TieredCache(MemoryCache(clock=clock), DiskCache(directory / "cache", clock=clock))


class TestTieredMemoryMemory(TagConformance):
    def make(self, directory: Path, clock: Clock) -> Cache:
        return TieredCache(MemoryCache(clock=clock), MemoryCache(clock=clock))


class TestTieredMemoryForeign(CacheConformance):
    def make(self, directory: Path, clock: Clock) -> Cache:
        return TieredCache(MemoryCache(clock=clock), ForeignCache(InMemoryCache(), clock=clock))


class TestForeignMemory(CacheConformance):
    def make(self, directory: Path, clock: Clock) -> Cache:
        return ForeignCache(InMemoryCache(), clock=clock)


class TestForeignSqlite(CacheConformance):
    def make(self, directory: Path, clock: Clock) -> Cache:
        return ForeignCache(SqliteCache(path=str(directory / "foreign.db")), clock=clock)


class ServersClock(Clock):
    """Takes the server's own time along, which no test could wait for."""

    def __init__(self, age: Callable[[float], None]) -> None:
        super().__init__()
        self._age = age

    def advance(self, seconds: float) -> None:
        super().advance(seconds)
        self._age(seconds)


class OnRedis(SharedConformance):
    tolerance = 5.0  # the server's time goes on, however long a busy machine takes
    lease_seconds = 100.0
    server: Server

    @pytest.fixture(autouse=True)
    def _use(self, redis_server: Server) -> None:
        self.server = redis_server

    def prefix(self, directory: Path) -> str:
        return f"test:{sha1(str(directory).encode()).hexdigest()}"

    def make_clock(self, directory: Path) -> Clock:
        prefix = self.prefix(directory)
        return ServersClock(lambda seconds: self.server.age(prefix, seconds))

    def make(self, directory: Path, clock: Clock) -> Cache:
        return self.redis(self.server.url, directory, clock)

    def redis(self, place: Any, directory: Path, clock: Clock, **options: Any) -> Cache:
        return RedisCache(
            place,
            prefix=self.prefix(directory),
            clock=clock,
            lease_seconds=self.lease_seconds,
            **options,
        )


class TestRedis(OnRedis, DamageConformance):
    def damage(self, directory: Path, how: str) -> None:
        with self.server.client() as client:
            names = list(client.scan_iter(match=f"{self.prefix(directory)}:1:e*"))
            for name, blob in zip(names, damaged(client.mget(names), how), strict=True):
                client.set(name, blob)


class TestRedisEncrypted(TestRedis):
    def make(self, directory: Path, clock: Clock) -> Cache:
        return self.redis(self.server.client(), directory, clock, serde=ENCRYPTED)


class TestTieredMemoryRedis(OnRedis):
    forever = 86400.0 * 29  # copies depend on a token, which lives for a month without use

    def make(self, directory: Path, clock: Clock) -> Cache:
        return TieredCache(MemoryCache(clock=clock), super().make(directory, clock))


class TestTieredMemoryDiskRedis(TestTieredMemoryRedis):
    def make(self, directory: Path, clock: Clock) -> Cache:
        disk = DiskCache(directory / "cache", clock=clock)
        return TieredCache(
            MemoryCache(clock=clock),
            disk,
            self.redis(self.server.url, directory, clock),
        )
