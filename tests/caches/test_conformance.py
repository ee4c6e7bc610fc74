"""Every cache against the conformance suite."""

from __future__ import annotations

from pathlib import Path

from langgraph.cache.memory import InMemoryCache
from langgraph.cache.sqlite import SqliteCache
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer

from langgraph_perf.caches.base import Cache
from langgraph_perf.caches.disk import DiskCache
from langgraph_perf.caches.foreign import ForeignCache
from langgraph_perf.caches.memory import MemoryCache
from langgraph_perf.caches.tiered import TieredCache

from .conformance import BoundedConformance, CacheConformance, LeaseConformance, TagConformance
from .conftest import Clock

ENCRYPTED = EncryptedSerializer.from_pycryptodome_aes(key=b"k" * 32)


class TestMemory(TagConformance, BoundedConformance):
    def make(self, directory: Path, clock: Clock) -> Cache:
        return MemoryCache(clock=clock)


class TestMemoryEncrypted(TagConformance, BoundedConformance):
    def make(self, directory: Path, clock: Clock) -> Cache:
        return MemoryCache(serde=ENCRYPTED, clock=clock)


class TestDisk(TagConformance, LeaseConformance, BoundedConformance):
    def make(self, directory: Path, clock: Clock) -> Cache:
        return DiskCache(directory / "cache", clock=clock)


class TestDiskEncrypted(TagConformance, LeaseConformance, BoundedConformance):
    def make(self, directory: Path, clock: Clock) -> Cache:
        return DiskCache(directory / "cache", serde=ENCRYPTED, clock=clock)


class TestTieredMemoryDisk(TagConformance, LeaseConformance):
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
