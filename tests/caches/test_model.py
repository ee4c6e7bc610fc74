"""Every cache against a dictionary: whatever is done in whatever order, they agree."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from langgraph.cache.memory import InMemoryCache

from langgraph_perf import DiskCache, MemoryCache, RedisCache, TieredCache
from langgraph_perf.caches.base import OWNED, Cache, Entry, Lookup, tag_id
from langgraph_perf.caches.foreign import ForeignCache
from langgraph_perf.testing import Clock
from tests.redis_server import Server, new_prefix

OWNERS = [(OWNED, "thread", "1"), (OWNED, "thread", "2"), (OWNED, "run", "1")]
NAMESPACES = [(), ("a",), ("a", "b"), *OWNERS]
keys = st.tuples(st.sampled_from(NAMESPACES), st.sampled_from(["", "x", "y"]))
tags = st.sampled_from(["docs", "user"])
UNIT = 100
"""Seconds. The server's time goes on by itself, but not so far that anything ends too early."""


class Model(RuleBasedStateMachine):
    """Puts, gets, time, invalidations and clears, on a cache and on a dictionary."""

    kind: ClassVar[str]
    server: ClassVar[Server]

    def __init__(self) -> None:
        super().__init__()
        self.prefix = new_prefix()
        self.directory = Path(tempfile.mkdtemp())
        self.clock = Clock()
        self.entries: dict = {}
        self.dead: set[tuple[str, str]] = set()
        self.taken: dict[str, str] = {}

    def make(self) -> Cache:
        clock, disk = self.clock, self.directory / "cache"
        match self.kind:
            case "memory":
                return MemoryCache(clock=clock)
            case "disk":
                return DiskCache(disk, clock=clock)
            case "memory, disk":
                return TieredCache(MemoryCache(clock=clock), DiskCache(disk, clock=clock))
            case "memory, memory":
                return TieredCache(MemoryCache(clock=clock), MemoryCache(clock=clock))
            case "redis":
                return RedisCache(self.server.url, prefix=self.prefix, clock=clock)
            case "memory, redis":
                redis = RedisCache(self.server.url, prefix=self.prefix, clock=clock)
                return TieredCache(MemoryCache(clock=clock), redis)
            case _:
                return ForeignCache(InMemoryCache(), clock=clock)

    @initialize()
    def open(self) -> None:
        self.cache = self.make()

    def teardown(self) -> None:
        self.cache.close()
        shutil.rmtree(self.directory)

    @rule(key=keys, payload=st.binary(max_size=50), ttl=st.none() | st.integers(0, 20))
    def put(self, key, payload, ttl) -> None:
        now = self.clock()
        entry = Entry(payload, now, None if ttl is None else now + ttl * UNIT)
        assert self.cache.write(key, entry)
        self.entries[key] = entry

    @rule(tag=tags)
    def take_token(self, tag) -> None:
        """What a computation does before it begins."""
        if self.cache.supports_tags:
            (self.taken[tag],) = self.cache.tag_tokens([tag_id(tag)])

    @rule(key=keys, payload=st.binary(max_size=50), tags=st.sets(tags, min_size=1))
    def put_tagged(self, key, payload, tags) -> None:
        """What it does when it ends, maybe long after."""
        if tags <= self.taken.keys():
            deps = tuple((tag_id(tag), self.taken[tag]) for tag in sorted(tags))
            entry = Entry(payload, self.clock(), None, deps)
            assert self.cache.write(key, entry)
            self.entries[key] = entry

    @rule(tag=tags)
    def invalidate(self, tag) -> None:
        if self.cache.supports_tags:
            self.cache.invalidate(tag)
            self._kill({tag_id(tag)})

    def _kill(self, tags) -> None:
        self.dead |= {dep for e in self.entries.values() for dep in e.deps if dep[0] in tags}
        self.dead |= {(tag_id(t), token) for t, token in self.taken.items() if tag_id(t) in tags}

    @rule(units=st.sampled_from([0.5, 1, 5, 20]))
    def wait(self, units) -> None:
        self.clock.advance(units * UNIT)
        if "redis" in self.kind:
            self.server.age(self.prefix, units * UNIT)

    @rule(namespaces=st.none() | st.lists(st.sampled_from(NAMESPACES), max_size=2))
    def clear(self, namespaces) -> None:
        self.cache.clear(namespaces)
        if namespaces is None:
            self.entries.clear()
            self._kill({tag_id("docs"), tag_id("user")})
        for namespace in namespaces or ():
            self.entries = {k: e for k, e in self.entries.items() if k[0] != namespace}

    @rule(
        source=st.sampled_from(OWNERS),
        into=st.sampled_from(OWNERS),
        replaced=st.none() | st.tuples(tags, tags),
    )
    def copy(self, source, into, replaced) -> None:
        """What a thread that is forked does: its own tag gives way to the new thread's."""
        deps = {}
        if replaced is not None and replaced[1] in self.taken:
            deps[tag_id(replaced[0])] = (tag_id(replaced[1]), self.taken[replaced[1]])
        expected = {}
        for (namespace, name), entry in self.entries.items():
            if namespace == source and self._expected(Lookup((namespace, name))):
                now = tuple(deps.get(dep[0], dep) for dep in entry.deps)
                expected[into, name] = entry._replace(deps=now)
        copied = self.cache.copy(source, into, deps)
        if self.kind == "foreign":
            assert copied == 0
        else:
            assert copied == len(expected)
            self.entries |= expected

    @rule(asked=st.lists(st.tuples(keys, st.none() | st.integers(1, 10)), min_size=1, max_size=4))
    def get(self, asked) -> None:
        lookups = [Lookup(key, max_age=max_age and max_age * UNIT) for key, max_age in asked]
        assert self.cache.read(lookups) == [self._expected(lookup) for lookup in lookups]

    def _expected(self, lookup: Lookup) -> Entry | None:
        entry, now = self.entries.get(lookup.key), self.clock()
        if (
            entry is None
            or (entry.expires is not None and now >= entry.expires)
            or (lookup.max_age is not None and now >= entry.created + lookup.max_age)
            or self.dead.intersection(entry.deps)
        ):
            return None
        return entry

    @rule()
    def reopen(self) -> None:
        """Entries on disk or a server outlast their process; others are only asked to go on."""
        if "disk" in self.kind or "redis" in self.kind:
            self.cache.close()
            self.cache = self.make()

    @invariant()
    def sizes_add_up(self) -> None:
        if self.kind == "memory":
            queues = [*self.cache._small.values(), *self.cache._main.values()]
            assert self.cache._entry_bytes == sum(slot.size for slot in queues)
            stored = [key for q in (self.cache._small, self.cache._main) for key in q]
            indexed = [key for some in self.cache._owned.values() for key in some]
            assert sorted(indexed) == sorted(key for key in stored if key[0] in OWNERS)
            assert all(self.cache._owned.values())


KINDS = ["memory", "disk", "memory, disk", "memory, memory", "foreign", "redis", "memory, redis"]


@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_a_dictionary(kind, redis_server):
    """Reads return exactly what a dictionary that knows about time and tags would."""
    on_disk = "disk" in kind or "redis" in kind
    machine = type(f"Model of {kind}", (Model,), {"kind": kind, "server": redis_server}).TestCase
    machine.settings = settings(
        max_examples=12 if on_disk else 60,
        stateful_step_count=25 if on_disk else 40,
        suppress_health_check=list(HealthCheck),
    )
    machine().runTest()
