"""The disk cache between processes: killed writers, invalidations, leases."""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import random
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import diskcache
import pytest

from langgraph_perf.caches.base import Cache, Entry, Lookup, tag_id
from langgraph_perf.caches.disk import DiskCache
from langgraph_perf.caches.memory import MemoryCache
from langgraph_perf.caches.tiered import TieredCache

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="needs POSIX processes"),
    # other tests may have left idle threads; the children use none of their locks
    pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning"),
]

LIMIT = 2**20
KEYS = [(("graph", "node"), str(i)) for i in range(20)]
MANY = [(("graph", "node"), str(i)) for i in range(400)]
"""Keys whose values together are several times as large as the cache may be."""
CLEARED = [(("graph", "cleared"), str(i)) for i in range(40)]
DOCS = tag_id("docs")

# forked: a hundred interpreters would take minutes to start
processes = multiprocessing.get_context("fork" if os.name == "posix" else None)


@contextlib.contextmanager
def child(target: Callable[..., None], *args: Any) -> Iterator[tuple[Any, Connection]]:
    """A process that runs ``target(pipe, *args)``, and the other end of the pipe."""
    mine, its = processes.Pipe()
    process = processes.Process(target=target, args=(its, *args), daemon=True)
    process.start()
    its.close()
    try:
        yield process, mine
    finally:
        mine.close()
        if process.is_alive():
            process.kill()
        process.join()
        process.close()


def open_cache(directory: str, kind: str, ahead: float = 0.0) -> Cache:
    """The shared cache; ``ahead`` is how far its clock is in the future."""
    disk = DiskCache(
        directory,
        size_limit=LIMIT,
        timeout=30.0,
        clock=lambda: time.time() + ahead,
    )
    return TieredCache(MemoryCache(), disk) if kind == "tiered" else disk


def value_of(key: Any, rng: random.Random, sizes: Sequence[int] = (10, 1000, 20_000)) -> bytes:
    """A value that tells which key it is for and whether it is whole."""
    body = key[1].encode() + b":" + rng.randbytes(rng.choice(sizes))
    return hashlib.sha256(body).digest() + body


def is_value_of(key: Any, payload: bytes) -> bool:
    body = payload[32:]
    return payload[:32] == hashlib.sha256(body).digest() and body.startswith(key[1].encode() + b":")


def write_until_killed(pipe: Connection, directory: str, seed: int) -> None:
    """Leases, tagged and plain writes, invalidations and clears; a byte for each."""
    rng = random.Random(seed)
    cache = open_cache(directory, "disk")
    while True:
        key = rng.choice(MANY + CLEARED)
        value = value_of(key, rng, (1000, 20_000, 60_000))
        match rng.randrange(8):
            case 0 | 1 | 2:
                cache.write(key, Entry(value, time.time()))
            case 3:
                cache.write(key, Entry(value, time.time(), time.time() + 0.01))
            case 4:
                (token,) = cache.tag_tokens([DOCS])
                cache.write(key, Entry(value, time.time(), None, ((DOCS, token),)))
            case 5 | 6:
                lease = cache.acquire(key)
                if lease is not None:
                    pipe.send_bytes(b"l")
                    cache.write(key, Entry(value, time.time()), lease)
            case 7:
                if rng.random() < 0.95:
                    cache.invalidate("docs")
                else:
                    cache.clear([CLEARED[0][0]])
        pipe.send_bytes(b".")


def test_a_hundred_killed_writers(tmp_path: Path) -> None:
    """After 100 kill -9 every value is whole and of its key, no key is stuck, the directory is
    within its limit, and the database in order."""
    directory, rng = str(tmp_path / "cache"), random.Random(0)
    keys = MANY + CLEARED
    seen: dict[Any, int] = {}
    killed = served = 0
    with open_cache(directory, "disk") as cache:
        while killed < 100:
            with contextlib.ExitStack() as stack:
                writers = [
                    stack.enter_context(child(write_until_killed, directory, killed + i))
                    for i in range(5)
                ]
                for process, pipe in writers:
                    for _ in range(rng.randrange(1, 20)):
                        pipe.recv_bytes()
                    os.kill(process.pid, signal.SIGKILL)
                    process.join()
                    assert process.exitcode == -signal.SIGKILL
                    killed += 1
                    for key, found in zip(
                        keys, cache.read([Lookup(key) for key in keys]), strict=True
                    ):
                        if found is not None:
                            assert is_value_of(key, found.payload)
                            seen[key] = len(found.payload)
                            served += 1
        assert served > 100
        # what was there at one time or another has no room at the same time
        assert sum(seen.values()) > 3 * LIMIT
        assert cache.stats().damaged == 0
        assert cache.write(MANY[0], Entry(b"x" * 100_000, time.time()))
        assert cache.stats().bytes <= LIMIT
    # the killed held leases; they are over after lease_seconds
    with open_cache(directory, "disk", ahead=10.0) as cache:
        leases = [cache.acquire(key) for key in keys]
        assert all(leases)
        for lease in leases:
            cache.release(lease)
    files = sorted((tmp_path / "cache").iterdir())
    assert [path.name for path in files] == ["cache.db", "cache.db.lock"]
    assert sum(path.stat().st_size for path in files) <= LIMIT
    with diskcache.Cache(directory) as other:
        assert other.check() == []


def serve(pipe: Connection, directory: str, kind: str) -> None:
    """Do what the test asks: ``(method, arguments)`` in, result out."""
    with open_cache(directory, kind) as cache:
        pipe.send("ready")
        while True:
            try:
                method, args = pipe.recv()
            except EOFError:
                return
            pipe.send(getattr(cache, method)(*args))


def ask(pipe: Connection, method: str, *args: Any) -> Any:
    pipe.send((method, args))
    return pipe.recv()


@pytest.mark.parametrize("kind", ["disk", "tiered"])
@pytest.mark.parametrize("how", ["invalidate", "clear"])
def test_other_process_sees_it_at_once(tmp_path: Path, kind: str, how: str) -> None:
    """Once an invalidation or clear has returned, the next lookup elsewhere is a miss."""
    with (
        open_cache(str(tmp_path), kind) as cache,
        child(serve, str(tmp_path), kind) as (_, pipe),
    ):
        assert pipe.recv() == "ready"
        for i in range(25):
            (token,) = cache.tag_tokens([DOCS])
            stored = Entry(str(i).encode(), time.time(), None, ((DOCS, token),))
            cache.write(KEYS[0], stored)
            for _ in range(2):  # the second comes from the child's first tier
                assert ask(pipe, "read", [Lookup(KEYS[0], (DOCS,))]) == [stored]
            if how == "invalidate":
                cache.invalidate("docs")
            else:
                cache.clear([KEYS[0][0]])
            assert ask(pipe, "read", [Lookup(KEYS[0])]) == [None]


@pytest.mark.parametrize("kind", ["disk", "tiered"])
def test_result_older_than_anothers_invalidation(tmp_path: Path, kind: str) -> None:
    """What another process began to compute before an invalidation is not served afterwards."""
    with (
        open_cache(str(tmp_path), kind) as cache,
        child(serve, str(tmp_path), kind) as (_, pipe),
    ):
        assert pipe.recv() == "ready"
        (token,) = ask(pipe, "tag_tokens", [DOCS])
        cache.invalidate("docs")
        stale = Entry(b"stale", time.time(), None, ((DOCS, token),))
        assert ask(pipe, "write", KEYS[0], stale) is True
        assert cache.read([Lookup(KEYS[0])]) == [None]
        assert ask(pipe, "read", [Lookup(KEYS[0])]) == [None]


def test_killed_holder_is_replaced_and_fenced(tmp_path: Path) -> None:
    """A holder that stops is replaced when its lease is over, and its late result refused."""
    with child(serve, str(tmp_path), "disk") as (_, pipe):
        assert pipe.recv() == "ready"
        late = ask(pipe, "acquire", KEYS[0])
        with open_cache(str(tmp_path), "disk") as cache:
            assert cache.acquire(KEYS[0]) is None
        with open_cache(str(tmp_path), "disk", ahead=10.0) as cache:
            lease = cache.acquire(KEYS[0])
            assert lease is not None
            assert ask(pipe, "write", KEYS[0], Entry(b"late", time.time()), late) is False
            assert ask(pipe, "renew", late) is None
            assert cache.write(KEYS[0], Entry(b"new", time.time()), lease)
            assert ask(pipe, "read", [Lookup(KEYS[0])])[0].payload == b"new"


def serve_inherited(pipe: Connection, cache: Cache) -> None:
    """Like ``serve``, with a cache that was opened before the fork."""
    pipe.send("ready")
    while True:
        try:
            method, args = pipe.recv()
        except EOFError:
            return
        pipe.send(getattr(cache, method)(*args))


@pytest.mark.parametrize("kind", ["disk", "tiered"])
def test_child_outlives_its_parents_cache(tmp_path: Path, kind: str) -> None:
    """A cache that was open during a fork goes on in the child when the parent closes it: others
    see what the child stores and invalidates."""
    with contextlib.ExitStack() as stack:
        with open_cache(str(tmp_path), kind) as cache:
            cache.write(KEYS[0], Entry(b"before", time.time()))
            _, pipe = stack.enter_context(child(serve_inherited, cache))
            assert pipe.recv() == "ready"
            assert ask(pipe, "read", [Lookup(KEYS[0])])[0].payload == b"before"
            assert ask(pipe, "write", KEYS[1], Entry(b"child", time.time())) is True
        with open_cache(str(tmp_path), kind) as other:
            (token,) = other.tag_tokens([DOCS])
            other.write(KEYS[0], Entry(b"old", time.time(), None, ((DOCS, token),)))
            assert ask(pipe, "invalidate", "docs") is None
            assert other.read([Lookup(KEYS[0], (DOCS,))]) == [None]
            for key in KEYS:
                assert ask(pipe, "write", key, Entry(b"child", time.time())) is True
            found = other.read([Lookup(key) for key in KEYS])
            assert [entry and entry.payload for entry in found] == [b"child"] * len(KEYS)


def mix(pipe: Connection, directory: str, kind: str, seed: int) -> None:
    """Reads and writes as fast as they go; reports what was wrong."""
    rng, wrong, failed, hits = random.Random(seed), 0, [], 0
    with open_cache(directory, kind) as cache:
        pipe.send("ready")
        pipe.recv()
        for _ in range(150):
            key = rng.choice(KEYS)
            try:
                if rng.random() < 0.4:
                    cache.write(key, Entry(value_of(key, rng), time.time()))
                else:
                    (found,) = cache.read([Lookup(key)])
                    hits += found is not None
                    wrong += found is not None and not is_value_of(key, found.payload)
            except sqlite3.Error as exc:
                failed.append(repr(exc))
        wrong += cache.stats().damaged
        pipe.send((wrong, failed, hits))


@pytest.mark.parametrize("kind", ["disk", "tiered"])
def test_four_processes(tmp_path: Path, kind: str) -> None:
    """Four processes that read and write at once get whole values of the right key, no errors."""
    with contextlib.ExitStack() as stack:
        pipes = [stack.enter_context(child(mix, str(tmp_path), kind, seed))[1] for seed in range(4)]
        assert [pipe.recv() for pipe in pipes] == ["ready"] * 4
        for pipe in pipes:
            pipe.send("go")
        for pipe in pipes:
            wrong, failed, hits = pipe.recv()
            assert (wrong, failed) == (0, [])
            assert hits > 0


def hold(pipe: Connection, directory: str) -> None:
    """Take the lease of one key again and again; nobody else may be inside."""
    overlaps = held = 0
    inside = Path(directory) / "inside"
    with open_cache(directory, "disk") as cache:
        pipe.send("ready")
        pipe.recv()
        while held < 20:
            lease = cache.acquire(KEYS[0])
            if lease is None:
                continue
            held += 1
            try:
                inside.touch(exist_ok=False)
            except FileExistsError:
                overlaps += 1
            else:
                inside.unlink()
            cache.release(lease)
        pipe.send(overlaps)


def test_one_holder_between_processes(tmp_path: Path) -> None:
    """However many processes ask, one holds a key at a time, and all get their turn."""
    with contextlib.ExitStack() as stack:
        pipes = [stack.enter_context(child(hold, str(tmp_path)))[1] for _ in range(3)]
        assert [pipe.recv() for pipe in pipes] == ["ready"] * 3
        for pipe in pipes:
            pipe.send("go")
        assert [pipe.recv() for pipe in pipes] == [0, 0, 0]


def open_first(pipe: Connection, directory: str) -> None:
    pipe.send("ready")
    pipe.recv()
    with open_cache(directory, "disk") as cache:
        cache.write(KEYS[0], Entry(value_of(KEYS[0], random.Random()), time.time()))
        (found,) = cache.read([Lookup(KEYS[0])])
        pipe.send(found is not None and is_value_of(KEYS[0], found.payload))


def test_opened_by_several_processes_at_once(tmp_path: Path) -> None:
    """Processes that all find no database make one, together."""
    for round_ in range(3):
        with contextlib.ExitStack() as stack:
            pipes = [
                stack.enter_context(child(open_first, str(tmp_path / str(round_))))[1]
                for _ in range(4)
            ]
            assert [pipe.recv() for pipe in pipes] == ["ready"] * 4
            for pipe in pipes:
                pipe.send("go")
            assert [pipe.recv() for pipe in pipes] == [True] * 4
