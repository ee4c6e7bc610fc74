"""Copies in memory of what another process has removed go, without anybody asking for them."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from langgraph_perf import DiskCache, MemoryCache, RedisCache, TieredCache
from langgraph_perf._backend import owner_tag
from langgraph_perf._owner import thread_namespace
from langgraph_perf.caches import _sweep
from langgraph_perf.caches.base import Cache, Lookup, tag_id
from langgraph_perf.testing import entry
from tests.redis_server import Server, new_prefix
from tests.servers import ask_again
from tests.test_single_flight import until

Make = Callable[[], Cache]


@pytest.fixture(params=["disk", "redis"])
def last(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Make]:
    """Makes caches for one store, as processes have them of their own."""
    prefix = new_prefix()
    with ExitStack() as stack:

        def make() -> Cache:
            if request.param == "disk":
                return stack.enter_context(DiskCache(tmp_path / "cache"))
            server: Server = request.getfixturevalue("redis_server")
            return stack.enter_context(RedisCache(server.url, prefix=prefix))

        yield make


@pytest.fixture(autouse=True)
def _by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread does not look while a test does."""
    monkeypatch.setattr(_sweep, "SECONDS", 3600)


def key(thread: str, name: str = "k") -> Any:
    return (thread_namespace(thread), name)


def store(cache: Cache, thread: str, name: str = "k", *tags: str) -> None:
    ids = [owner_tag(thread_namespace(thread)), *map(tag_id, tags)]
    deps = tuple(zip(ids, cache.tag_tokens(ids), strict=True))
    assert cache.write(key(thread, name), entry(f"{thread} {name}".encode(), deps=deps))


def forget(cache: Cache, thread: str) -> None:
    namespace = thread_namespace(thread)
    cache.drop_tags([owner_tag(namespace)])
    cache.clear([namespace])


def look(cache: TieredCache) -> None:
    assert cache._sweeper is not None
    cache._sweeper.look(cache)


def questions(cache: TieredCache, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tags its last tier is asked for, each time."""
    asked: list[int] = []
    peek_tags = cache.tiers[-1].peek_tags

    def counting(tags: Any) -> Any:
        asked.append(len(tags))
        return peek_tags(tags)

    monkeypatch.setattr(cache.tiers[-1], "peek_tags", counting)
    return asked


def copies(memory: MemoryCache) -> list[str]:
    return sorted(f"{ns[2]} {name}" for ns, name in (*memory._small, *memory._main))


def test_what_another_process_removed_goes(last: Make) -> None:
    """The thread's, and what depends on a tag of its that was invalidated; nothing else."""
    memory = MemoryCache()
    here, there = TieredCache(memory, last()), TieredCache(MemoryCache(), last())
    store(here, "gone", "1")
    store(here, "stays")
    store(here, "partly", "made in a run", "run 1")
    store(here, "partly", "in another", "run 2")
    store(there, "gone", "2")
    assert here.read([Lookup(key("gone", "2"))]) != [None]  # copied up
    look(here)
    assert len(copies(memory)) == 5
    forget(there, "gone")
    there.invalidate("run 1")
    look(here)
    assert copies(memory) == ["partly in another", "stays k"]
    assert here.read([Lookup(key("stays"))]) != [None]
    here.close()
    there.close()


def test_what_a_thread_of_the_same_name_stores_later_stays(last: Make) -> None:
    """It was forgotten, and began anew: only the old copies are of nobody."""
    memory = MemoryCache()
    here, there = TieredCache(memory, last()), TieredCache(MemoryCache(), last())
    store(here, "t", "old")
    forget(there, "t")
    store(here, "t", "new")
    look(here)
    assert copies(memory) == ["t new"]
    here.close()
    there.close()


def test_owners_take_turns(last: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are, one look asks for a bounded number of tags, and the next go on."""
    monkeypatch.setattr(_sweep, "MOST_TAGS", 20)
    memory = MemoryCache()
    here, there = TieredCache(memory, last()), TieredCache(MemoryCache(), last())
    asked = questions(here, monkeypatch)
    for n in range(50):
        store(here, f"t{n}")
    for n in range(50):
        forget(there, f"t{n}")
    left = []
    for _ in range(6):
        look(here)
        left.append(len(copies(memory)))
    assert left[-1] == 0
    assert left[0] > 25
    assert max(asked) <= 20
    here.close()
    there.close()


def test_what_was_stored_past_the_cache_stays(last: Make) -> None:
    """A memory that is a cache by itself as well has tags of its own for that."""
    memory = MemoryCache()
    cache = TieredCache(memory, last())
    store(cache, "t", "copied")
    store(memory, "t", "its own")
    look(cache)
    assert copies(memory) == ["t copied", "t its own"]
    forget(cache.tiers[-1], "t")
    look(cache)
    assert copies(memory) == ["t its own"]
    cache.close()


def test_no_question_has_more_than_so_many_tags(
    last: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where one owner's copies depend on more."""
    monkeypatch.setattr(_sweep, "MOST_TAGS", 5)
    memory = MemoryCache()
    cache = TieredCache(memory, last())
    store(cache, "t", "k", *map(str, range(20)))
    asked = questions(cache, monkeypatch)
    look(cache)
    assert copies(memory) == ["t k"]
    assert sum(asked) == 22
    assert max(asked) == 5
    cache.close()


def test_while_the_last_tier_is_away_nothing_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """That it cannot be asked says nothing about the copies."""

    class Away(MemoryCache):
        shared = True
        away = False

        def peek_tags(self, tags: Any) -> Any:
            if self.away:
                raise ConnectionError("away")
            return super().peek_tags(tags)

    memory, away = MemoryCache(), Away()
    cache = TieredCache(memory, away)
    store(cache, "t")
    away.away = True
    look(cache)
    assert copies(memory) == ["t k"]
    away.away = False
    away.drop_tags([owner_tag(thread_namespace("t"))])
    ask_again(cache._tiers[-1])
    look(cache)
    assert copies(memory) == []
    cache.close()


def sweepers(before: list[threading.Thread]) -> list[threading.Thread]:
    """The threads that sweep and were not there before; those of other tests may be ending."""
    here = [thread for thread in threading.enumerate() if thread.name == "langgraph-perf-sweep"]
    return [thread for thread in here if thread not in before]


def test_its_thread_lives_as_long_as_there_is_something(
    last: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It starts with the first copy that an owner has, and ends with the last one."""
    monkeypatch.setattr(_sweep, "SECONDS", 0.001)
    before = sweepers([])
    memory = MemoryCache()
    here, there = TieredCache(memory, last()), TieredCache(MemoryCache(), last())
    there.write((("graph", "node"), "k"), entry(b"everybody's"))
    here.write((("graph", "node"), "k2"), entry(b"everybody's"))
    assert here.read([Lookup((("graph", "node"), "k"))]) != [None]
    assert sweepers(before) == []
    for _ in range(2):
        store(here, "t")
        assert len(sweepers(before)) == 1
        forget(there, "t")
        until(lambda: sweepers(before) == [])
        assert memory.owners() == []
    store(here, "t")
    here.close()
    until(lambda: sweepers(before) == [])
    there.close()


def test_a_cache_that_nobody_closed_leaves_no_thread(
    last: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread does not keep its cache alive."""
    monkeypatch.setattr(_sweep, "SECONDS", 0.001)
    before = sweepers([])
    cache = TieredCache(MemoryCache(), last())
    store(cache, "t")
    gone = weakref.ref(cache)
    del cache
    until(lambda: gc.collect() >= 0 and gone() is None)
    until(lambda: sweepers(before) == [])


def test_caches_that_nobody_shares_need_none() -> None:
    """Nobody else can remove anything from them, and what is alone has no copies."""
    assert TieredCache(MemoryCache(), MemoryCache())._sweeper is None


_PROGRAM = """
import json, sys
from langgraph_perf import DiskCache, MemoryCache, TieredCache
from langgraph_perf.caches import _sweep
from tests.caches.test_sweep import copies, store
from tests.test_single_flight import until

_sweep.SECONDS = 0.01
memory = MemoryCache()
with TieredCache(memory, DiskCache(sys.argv[1])) as cache:
    store(cache, "deleted")
    store(cache, "kept")
    print(json.dumps(copies(memory)), flush=True)
    until(lambda: copies(memory) == ["kept k"], 60)  # and does nothing else
    print(json.dumps(copies(memory)), flush=True)
"""


def test_a_process_that_does_nothing(tmp_path: Path) -> None:
    """Another process deletes a thread; the memory of this one lets go of it by itself."""
    with (
        subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(tmp_path / "cache")],
            stdout=subprocess.PIPE,
            text=True,
        ) as process,
        DiskCache(tmp_path / "cache") as disk,
    ):
        assert process.stdout is not None
        assert json.loads(process.stdout.readline()) == ["deleted k", "kept k"]
        forget(disk, "deleted")
        assert json.loads(process.stdout.readline()) == ["kept k"]
    assert process.returncode == 0
