"""The memory cache: bounds, eviction, sweeping, threads, forks."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from collections import OrderedDict

import pytest

from langgraph_perf.caches.base import Lookup
from langgraph_perf.caches.memory import MemoryCache
from langgraph_perf.errors import ConfigurationError

from .conftest import Clock, entry


def key(i: object):
    return ("n",), str(i)


def stored(cache: MemoryCache, keys) -> list[int]:
    """Which of ``keys`` are there."""
    keys = list(keys)
    found = cache.read([Lookup(key(i)) for i in keys])
    return [i for i, e in zip(keys, found, strict=True) if e is not None]


@pytest.mark.parametrize("field", ["max_bytes", "max_entries"])
@pytest.mark.parametrize("given", [0, -1, 1.5, "1", True])
def test_bounds_must_be_positive_ints(field, given):
    """A bound that makes no sense is refused by name."""
    with pytest.raises(ConfigurationError, match=rf"{field} must be an int .* got {given!r}"):
        MemoryCache(**{field: given})


def test_stays_within_its_bytes(clock: Clock):
    """Whatever is written, the bytes it counts never exceed the bound."""
    cache = MemoryCache(100_000, clock=clock)
    rng = random.Random(1)
    for i in range(3000):
        expires = clock() + rng.random() * 100 if rng.random() < 0.5 else None
        cache.write(key(rng.randrange(500)), entry(b"x" * rng.randrange(9000), expires=expires))
        cache.tag_tokens([str(i)])
        clock.advance(0.1)
        assert cache._bytes <= 100_000 + 300
        assert len(cache._ghosts) <= cache._count + 1
        assert len(cache._expiries) <= 2 * cache._count + 64
    queues = [*cache._small.values(), *cache._main.values()]
    assert cache._entry_bytes == sum(slot.size for slot in queues)
    assert cache._small_bytes == sum(slot.size for slot in cache._small.values())
    assert cache.stats().evicted > 1000


def test_stays_within_its_entries(clock: Clock):
    """``max_entries`` bounds the number of entries."""
    cache = MemoryCache(max_entries=10, clock=clock)
    for i in range(100):
        cache.write(key(i), entry())
        assert cache.stats().entries == min(i + 1, 10)
    assert cache.stats().evicted == 90


def test_one_entry_too_large(clock: Clock):
    """An entry larger than the bound is refused and evicts nothing; what it replaces is gone."""
    cache = MemoryCache(20_000, clock=clock)
    for i in range(5):
        assert cache.write(key(i), entry())
    assert cache.write(key("large"), entry(b"x" * 20_000)) is False
    assert cache.write(key(0), entry(b"x" * 20_000)) is False
    assert stored(cache, ["large", 0, 1, 2, 3, 4]) == [1, 2, 3, 4]
    assert cache.stats().refused == 2


def test_large_entry_that_fits(clock: Clock):
    """An entry larger than the small queue's share is stored and survives its own writing."""
    cache = MemoryCache(100_000, clock=clock)
    for i in range(200):
        cache.write(key(i), entry(b"x" * 1000))
        cache.read([Lookup(key(i))] * 3)
    assert cache.write(key("large"), entry(b"x" * 60_000))
    assert stored(cache, ["large"]) == ["large"]


def test_a_scan_does_not_evict_what_is_used(clock: Clock):
    """Entries read again survive a long run of entries nobody reads."""
    cache = MemoryCache(max_entries=100, clock=clock)
    for i in range(50):
        cache.write(key(i), entry())
    for i in range(1000, 1060):
        stored(cache, range(50))
        cache.write(key(i), entry())
    for i in range(2000, 4000):
        cache.write(key(i), entry())
    assert len(stored(cache, range(50))) == 50


def test_what_comes_back_is_kept(clock: Clock):
    """An entry written again soon after it was evicted skips the small queue."""
    cache = MemoryCache(max_entries=10, clock=clock)
    for i in range(11):
        cache.write(key(i), entry())
    assert stored(cache, [0]) == []
    cache.write(key(0), entry())
    for i in range(100, 110):
        cache.write(key(i), entry())
    assert stored(cache, [0]) == [0]


def test_better_than_lru_on_skewed_reads(clock: Clock):
    """On a Zipf-like load with scans it hits more often than least-recently-used would."""
    rng = random.Random(7)
    population = list(range(2000))
    weights = [1 / (i + 1) for i in population]
    requests: list[int] = []
    for scan in range(8):
        requests += rng.choices(population, weights, k=1500)
        requests += range(10_000 + scan * 300, 10_300 + scan * 300)
    cache, lru, lru_hits = MemoryCache(max_entries=100, clock=clock), OrderedDict(), 0
    for i in requests:
        if not stored(cache, [i]):
            cache.write(key(i), entry())
        if i in lru:
            lru_hits += 1
            lru.move_to_end(i)
        else:
            lru[i] = None
            if len(lru) > 100:
                lru.popitem(last=False)
    assert cache.stats().hits > lru_hits * 1.05


def test_expired_entries_leave_by_themselves(clock: Clock):
    """One later write frees what has expired, though nobody reads it."""
    cache = MemoryCache(clock=clock)
    for i in range(500):
        cache.write(key(i), entry(b"x" * 1000, expires=clock() + 10))
    cache.write(key("late"), entry(expires=clock() + 20))
    clock.advance(10)
    cache.write(key("new"), entry())
    assert cache._count == 2
    assert cache.stats().expired == 500
    assert not cache._ghosts


def test_overwriting_forgets_the_old_expiry(clock: Clock):
    """The expiry of a value that was replaced does not remove its successor."""
    cache = MemoryCache(clock=clock)
    cache.write(key(1), entry(expires=clock() + 10))
    cache.write(key(1), entry(expires=clock() + 100))
    cache.write(key(2), entry(expires=clock() + 10))
    cache.write(key(2), entry())
    clock.advance(50)
    cache.write(key(3), entry())
    assert stored(cache, [1, 2, 3]) == [1, 2, 3]
    assert cache.stats().expired == 0


def test_tags_are_bounded_and_count(clock: Clock):
    """Endless tags take an eighth of the room at most; the ones in use stay."""
    cache = MemoryCache(1_000_000, clock=clock)
    (hot,) = cache.tag_tokens(["hot"])
    for i in range(5000):
        cache.tag_tokens([f"user:{i}"])
        assert cache.tag_tokens(["hot"]) == (hot,)
    assert cache.stats().bytes <= 1_000_000 // 8


def test_encrypted_at_rest(clock: Clock):
    """With a serde the memory holds what it made, and a lost secret is a miss."""
    from langgraph.checkpoint.serde.encrypted import EncryptedSerializer

    cache = MemoryCache(serde=EncryptedSerializer.from_pycryptodome_aes(key=b"k" * 32), clock=clock)
    cache.write(key(1), entry(b"secret" * 10))
    assert stored(cache, [1]) == [1]
    assert b"secret" not in cache._small[key(1)].entry.payload
    cache.value_serde = EncryptedSerializer.from_pycryptodome_aes(key=b"o" * 32)
    assert stored(cache, [1]) == []
    assert cache.stats().damaged == 1


def test_threads(clock: Clock):
    """Threads that read, write, tag and clear at once see only whole entries of the right key."""
    cache = MemoryCache(200_000, clock=clock)
    start, wrong = threading.Barrier(8), []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        start.wait()
        for _ in range(400):
            i = rng.randrange(60)
            payload = str(i).encode() * 100
            match rng.randrange(6):
                case 0 | 1:
                    cache.write(key(i), entry(payload, expires=clock() + rng.randrange(3)))
                case 2:
                    cache.invalidate(str(i))
                case 3:
                    clock.advance(0.01)
                case _:
                    (found,) = cache.read([Lookup(key(i))])
                    if found is not None and found.payload != payload:
                        wrong.append((i, found))
            if rng.random() < 0.01:
                cache.clear([("n",)])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    queues = [*cache._small.values(), *cache._main.values()]
    assert cache._entry_bytes == sum(slot.size for slot in queues)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_fork_while_locked(clock: Clock):
    """A child forked while another thread holds the lock starts empty and does not hang."""
    cache = MemoryCache(clock=clock)
    cache.write(key(1), entry())
    cache._lock.acquire()
    pid = os.fork()
    if pid == 0:
        empty = stored(cache, [1]) == []
        usable = cache.write(key(2), entry()) and stored(cache, [2]) == [2]
        os._exit(0 if empty and usable else 1)
    cache._lock.release()
    assert os.waitpid(pid, 0)[1] == 0
    assert stored(cache, [1]) == [1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_fork_keeps_entries(clock: Clock):
    """A forked child starts with what its parent had."""
    cache = MemoryCache(clock=clock)
    cache.write(key(1), entry())
    pid = os.fork()
    if pid == 0:
        os._exit(0 if stored(cache, [1]) == [1] else 1)
    assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
@pytest.mark.parametrize(
    ("count", "size", "dependencies", "namespace"),
    [
        (10_000, 10_240, 0, '"graph", f"node{i % 9}"'),
        (60_000, 50, 1, '"graph", f"node{i % 9}"'),
        (60_000, 50, 1, 'OWNED, "thread", str(i)'),
        (60_000, 50, 1, 'OWNED, "thread", str(i // 5)'),
    ],
)
def test_process_stays_small(count, size, dependencies, namespace):
    """The process grows by at most half more than ``max_bytes``, whatever the entries' size."""
    code = f"""
import os, time
from langgraph_perf.caches.memory import MemoryCache
from langgraph_perf.caches.base import OWNED, Entry

def rss():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def fill(cache, count):
    for i in range(count):
        deps = tuple((f"{{i}}-{{j}}" * 4, f"{{i:016}}") for j in range({dependencies}))
        cache.write((({namespace}), f"{{i:040}}"),
                    Entry(os.urandom({size}), time.time(), time.time() + 1000, deps))

fill(MemoryCache(100_000), 100)
before = rss()
fill(cache := MemoryCache(10_000_000), {count})
assert cache.stats().evicted
print(rss() - before)
"""
    grown = int(subprocess.check_output([sys.executable, "-c", code], timeout=100))
    assert grown <= 15_000_000
