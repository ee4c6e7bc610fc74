"""Foreign caches: other people's stores, with a deadline."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import weakref

import pytest
from langgraph.cache.base import BaseCache
from langgraph.cache.memory import InMemoryCache
from langgraph.cache.sqlite import SqliteCache

from langgraph_perf.caches.base import Lookup
from langgraph_perf.caches.foreign import ForeignCache
from langgraph_perf.caches.memory import MemoryCache
from langgraph_perf.errors import ConfigurationError

from .conftest import entry

KEY = (("graph", "node"), "key")


def payload(cache, key=KEY):
    (found,) = cache.read([Lookup(key)])
    return found and found.payload


class Recording(BaseCache):
    """A user's own cache: remembers how it was called; hangs while ``gate`` is shut."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, object]] = []
        self.values: dict = {}
        self.gate = threading.Event()
        self.gate.set()
        self.threads: set[int] = set()

    def _called(self, name: str, argument: object) -> None:
        self.calls.append((name, argument))
        self.threads.add(threading.get_ident())
        assert self.gate.wait(60)

    def get(self, keys):
        self._called("get", keys)
        return {key: self.values[key][0] for key in keys if key in self.values}

    async def aget(self, keys):
        self.calls.append(("aget", keys))
        if not self.gate.is_set():
            await asyncio.Event().wait()
        return {key: self.values[key][0] for key in keys if key in self.values}

    def set(self, pairs):
        self._called("set", pairs)
        self.values.update(pairs)

    async def aset(self, pairs):
        self.calls.append(("aset", pairs))
        self.values.update(pairs)

    def clear(self, namespaces=None):
        self._called("clear", namespaces)
        self.values.clear()

    async def aclear(self, namespaces=None):
        self.calls.append(("aclear", namespaces))
        self.values.clear()


@pytest.fixture
def inner():
    recording = Recording()
    yield recording
    recording.gate.set()


@pytest.mark.parametrize("given", [None, "cache", MemoryCache, MemoryCache(), {}])
def test_inner_must_be_foreign(given):
    """What is no LangGraph cache, or one of ours, is refused."""
    with pytest.raises(ConfigurationError, match="inner must be"):
        ForeignCache(given)


def test_deadline_must_be_seconds(inner):
    """A deadline is a positive number."""
    with pytest.raises(ConfigurationError, match=r"deadline must be a positive number .* got 0"):
        ForeignCache(inner, deadline=0)


def test_one_adapter_for_one_cache():
    """Graphs that share a cache share its adapter, which does not outlive them."""
    one, two = InMemoryCache(), InMemoryCache()
    adapter = ForeignCache.of(one)
    assert ForeignCache.of(one) is adapter
    assert ForeignCache.of(two) is not adapter
    gone = weakref.ref(adapter)
    del adapter
    gc.collect()
    assert gone() is None
    assert ForeignCache.of(one).inner is one


def test_stores_bytes_with_whole_seconds(inner, clock):
    """Values are bytes; the time to live is rounded up; none means none."""
    cache = ForeignCache(inner, clock=clock)
    for ttl, seconds in [(None, None), (0.2, 1), (1.0, 1), (1.2, 2), (-5, 1)]:
        cache.write(KEY, entry(expires=None if ttl is None else clock() + ttl))
        ((value, stored_for),) = inner.calls[-1][1].values()
        assert type(value) is bytes
        assert stored_for == seconds


def test_exact_expiry(inner, clock):
    """The entry itself knows the fraction of a second that the foreign cache rounds."""
    cache = ForeignCache(inner, clock=clock)
    cache.write(KEY, entry(expires=clock() + 0.5))
    assert payload(cache) == b"value"
    clock.advance(0.5)
    assert payload(cache) is None


@pytest.mark.parametrize("value", [None, b"", b"x" * 99, "text", 42, {"a": 1}, object()])
def test_foreign_values_are_misses(inner, clock, value):
    """What somebody else stored under our key is a miss."""
    cache = ForeignCache(inner, clock=clock)
    cache.write(KEY, entry())
    (name,) = inner.values
    inner.values[name] = (value, None)
    assert payload(cache) is None
    assert cache.stats().damaged == (value is not None)


def test_values_under_other_keys_are_misses(inner, clock):
    """A foreign cache that mixes up its keys serves nothing wrong."""
    cache = ForeignCache(inner, clock=clock)
    cache.write(KEY, entry())
    ((value, _),) = inner.values.values()
    inner.get = lambda keys: {**dict.fromkeys(keys, value), (("more",), "keys"): value}
    other = (("graph", "node"), "other")
    assert cache.read([Lookup(other), Lookup(KEY)]) == [None, entry()]


def test_has_no_tags(inner, clock):
    """Entries with tags are not served, and asking for tags says why."""
    cache = ForeignCache(inner, clock=clock)
    assert cache.supports_tags is False
    assert cache.shared is False
    cache.write(KEY, entry(deps=(("a", "b"),)))
    assert payload(cache) is None
    assert cache.tag_tokens([]) == ()
    cache.invalidate()
    with pytest.raises(NotImplementedError, match="Recording has no tags"):
        cache.tag_tokens(["a"])
    with pytest.raises(NotImplementedError, match="Recording has no tags"):
        cache.invalidate("a")


def test_clear_is_passed_on(inner, clock):
    """``None`` clears everything, ``[]`` nothing; namespaces arrive as single, safe names."""
    cache = ForeignCache(inner, clock=clock)
    cache.clear()
    cache.clear([])
    cache.clear([("a", "b"), ()])
    everything, (_, namespaces) = inner.calls
    assert everything == ("clear", None)
    assert [len(namespace) for namespace in namespaces] == [1, 1]
    assert all(name.isalnum() for (name,) in namespaces)


def test_hanging_backend_costs_its_deadline(inner):
    """A call that does not answer raises after the deadline, and the next ones work again."""
    cache = ForeignCache(inner, deadline=0.05)
    inner.gate.clear()
    with pytest.raises(TimeoutError, match=r"no answer from Recording within 0\.05 seconds"):
        payload(cache)
    with pytest.raises(TimeoutError):
        cache.write(KEY, entry())
    inner.gate.set()
    cache.deadline = 30.0
    assert cache.write(KEY, entry())
    assert payload(cache) == b"value"


def test_hanging_calls_are_bounded(inner):
    """However often it is asked, a backend that hangs holds a handful of threads."""
    cache = ForeignCache(inner, deadline=0.005)
    inner.gate.clear()
    calls, run = [], cache._workers.run
    cache._workers.run = lambda *args: calls.append(run(*args)) or calls[-1]
    before = threading.active_count()
    for _ in range(30):
        with pytest.raises(TimeoutError):
            payload(cache)
    assert threading.active_count() - before <= 8
    # some of them may be about to call only
    started = sum(call.running() for call in calls)
    assert started > 0
    inner.gate.set()
    cache.deadline = 30.0
    payload(cache)
    # calls that were given up before they began never run
    assert len(inner.calls) <= started + 1


def test_own_timeout_passes_through(inner):
    """A ``TimeoutError`` of the backend itself is not mistaken for the deadline."""

    def get(keys):
        raise TimeoutError("of the backend")

    inner.get = get
    with pytest.raises(TimeoutError, match="of the backend"):
        payload(ForeignCache(inner))


async def test_awaits_natively(inner):
    """Awaiting uses the cache's own coroutines, under the same deadline."""
    cache = ForeignCache(inner, deadline=20.0)
    await cache.awrite(KEY, entry())
    assert (await cache.aread([Lookup(KEY)]))[0] == entry()
    await cache.aclear()
    assert [name for name, _ in inner.calls] == ["aset", "aget", "aclear"]
    cache.deadline = 0.05
    inner.gate.clear()
    with pytest.raises((TimeoutError, asyncio.TimeoutError)):
        await cache.aread([Lookup(KEY)])


async def test_blocking_coroutines_run_on_a_thread():
    """LangGraph's RedisCache blocks in its coroutines: its blocking methods run on a thread."""

    class RedisCache(Recording):
        pass

    RedisCache.__module__ = "langgraph.cache.redis"
    inner = RedisCache()
    cache = ForeignCache(inner)
    await cache.awrite(KEY, entry())
    assert (await cache.aread([Lookup(KEY)]))[0] == entry()
    assert [name for name, _ in inner.calls] == ["set", "get"]
    assert threading.get_ident() not in inner.threads


def test_memory_needs_no_thread():
    """LangGraph's InMemoryCache cannot hang, so it is called directly."""
    cache = ForeignCache(InMemoryCache())
    assert cache.blocking is False
    cache.write(KEY, entry())
    assert payload(cache) == b"value"
    assert cache._workers._threads == 0


def test_workers_come_when_they_can(threads):
    """Without a thread an operation fails at once, however often; with one all is well."""
    inner = Recording()
    cache = ForeignCache(inner)
    threads.allowed = False
    for _ in range(20):
        with pytest.raises(RuntimeError, match="thread"):
            cache.read([Lookup(KEY)])
    threads.allowed = True
    cache.write(KEY, entry())
    assert payload(cache) == b"value"
    assert [name for name, _ in inner.calls] == ["set", "get"]


def test_sqlite_from_many_threads(tmp_path):
    """Calls from many threads at once all arrive."""
    cache = ForeignCache(SqliteCache(path=str(tmp_path / "cache.db")), deadline=30.0)
    threads = [
        threading.Thread(target=cache.write, args=((("n",), str(i)), entry())) for i in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(cache.read([Lookup((("n",), str(i))) for i in range(20)]))


def test_close_leaves_the_inner_cache_open(inner):
    """The cache belongs to whoever made it."""
    cache = ForeignCache(inner)
    cache.write(KEY, entry())
    cache.close()
    assert payload(cache) is None
    assert payload(ForeignCache(inner)) == b"value"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_fork(inner):
    """A forked child starts threads of its own."""
    cache = ForeignCache(inner)
    cache.write(KEY, entry())
    pid = os.fork()
    if pid == 0:
        os._exit(0 if payload(cache) == b"value" else 1)
    assert os.waitpid(pid, 0)[1] == 0


def test_hanging_backend_does_not_hold_the_interpreter():
    """A process whose foreign cache hangs can exit."""
    code = """
import threading
from langgraph.cache.memory import InMemoryCache
from langgraph_perf.caches.foreign import ForeignCache
from langgraph_perf.caches.base import Lookup

class Hanging(InMemoryCache):
    def get(self, keys):
        threading.Event().wait()

try:
    ForeignCache(Hanging(), deadline=0.05).read([Lookup((("n",), "k"))])
except TimeoutError:
    print("gave up")
"""
    out = subprocess.check_output([sys.executable, "-c", code], timeout=100)
    assert out.strip() == b"gave up"
