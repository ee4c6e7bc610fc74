"""The disk cache: privacy, damage, bounds, connections, forks, hostile rows."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import logging
import os
import pickle
import re
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import diskcache
import pytest
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer

from langgraph_perf._owner import thread_namespace
from langgraph_perf.caches import _sqlite_fork
from langgraph_perf.caches.base import Cache, Lookup, key_digest, tag_id
from langgraph_perf.caches.disk import DiskCache
from langgraph_perf.caches.memory import MemoryCache
from langgraph_perf.caches.tiered import TieredCache
from langgraph_perf.errors import ConfigurationError
from tests.conftest import told
from tests.test_single_flight import auntil

from .conftest import entry

KEY = (("graph", "node"), "key")
OTHER = (("graph", "node"), "other")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
may_fork = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
needs_modes = pytest.mark.skipif(os.name != "posix", reason="needs POSIX modes")


def payload(cache: DiskCache, key=KEY) -> bytes | None:
    (found,) = cache.read([Lookup(key)])
    return found and found.payload


def sql(cache: DiskCache, statement: str, *values: object) -> list[tuple]:
    """Run a statement on the database behind the cache's back."""
    con = sqlite3.connect(cache.directory / "cache.db", isolation_level=None)
    try:
        return con.execute(statement, values).fetchall()
    finally:
        con.close()


def size_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


# -- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size_limit": -1}, r"size_limit must be an int of at least 65536 bytes, got -1"),
        ({"size_limit": 1e9}, r"size_limit must be an int .*, got 1000000000.0"),
        ({"size_limit": "1GB"}, r"size_limit must be an int .*, got '1GB'"),
        ({"size_limit": True}, r"size_limit must be an int .*, got True"),
        ({"lease_seconds": 0}, r"lease_seconds must be a positive number of seconds, got 0"),
        ({"timeout": -1}, r"timeout must be a positive number of seconds, got -1"),
        ({"timeout": None}, r"timeout must be a positive number of seconds, got None"),
    ],
)
def test_arguments_are_checked(tmp_path, options, message):
    """A wrong argument is refused by name, with what was given and what is accepted."""
    with pytest.raises(ConfigurationError, match=message):
        DiskCache(tmp_path / "cache", **options)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("given", [None, 42, b"cache", "", "a\0b", object()])
def test_directory_must_be_a_path(given):
    """What is no path is refused by name."""
    with pytest.raises(ConfigurationError, match="directory must"):
        DiskCache(given)


def test_directory_is_a_file(tmp_path):
    """A file where the directory should be is an error that says so."""
    (tmp_path / "cache").write_text("x")
    with pytest.raises(ConfigurationError, match=r"directory: '.*cache' cannot hold a cache"):
        DiskCache(tmp_path / "cache")
    with pytest.raises(ConfigurationError, match="cannot hold a cache"):
        DiskCache(tmp_path / "cache" / "below")


@needs_modes
def test_unwritable_directory(tmp_path, monkeypatch):
    """A directory that cannot be written is an error that says so, and stays as it is."""
    (tmp_path / "cache").mkdir(mode=0o500)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # what root is never told
    with pytest.raises(ConfigurationError, match="not writable"):
        DiskCache(tmp_path / "cache")
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o500


@needs_modes
def test_directory_of_somebody_else(tmp_path, monkeypatch):
    """A directory of another user is refused."""
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(ConfigurationError, match="belongs to another user"):
        DiskCache(tmp_path)


@needs_modes
def test_shared_directory(tmp_path):
    """A directory for everybody, such as /tmp, is refused rather than locked up."""
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp").chmod(0o1777)
    with pytest.raises(ConfigurationError, match="shared by all users"):
        DiskCache(tmp_path / "tmp")
    assert stat.S_IMODE((tmp_path / "tmp").stat().st_mode) == 0o1777


def test_path_is_expanded(tmp_path, monkeypatch):
    """``~`` and variables mean the same to us as to diskcache; odd characters are plain."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WHERE", "here")
    with DiskCache("~/a b?c#d%20/$WHERE") as cache:
        cache.write(KEY, entry())
        assert (tmp_path / "a b?c#d%20" / "here" / "cache.db").exists()


# -- privacy --------------------------------------------------------------------------------------


@needs_modes
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_private(tmp_path, umask):
    """Directory 0700 and files 0600, whatever the umask."""
    before = os.umask(umask)
    try:
        with DiskCache(tmp_path / "deep" / "cache") as cache:
            cache.write(KEY, entry())
            assert stat.S_IMODE(cache.directory.stat().st_mode) == 0o700
            files = list(cache.directory.iterdir())
            assert {"cache.db", "cache.db-wal", "cache.db-shm"} <= {path.name for path in files}
            assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    finally:
        os.umask(before)


@needs_modes
def test_existing_directory_becomes_private(tmp_path):
    """A directory and a database that others could read no longer are."""
    with DiskCache(tmp_path / "cache") as cache:
        cache.write(KEY, entry())
    cache.directory.chmod(0o755)
    (cache.directory / "cache.db").chmod(0o644)
    with DiskCache(tmp_path / "cache") as cache:
        assert payload(cache) == b"value"
        assert stat.S_IMODE(cache.directory.stat().st_mode) == 0o700
        assert {stat.S_IMODE(path.stat().st_mode) for path in cache.directory.iterdir()} == {0o600}


def test_no_user_id_in_the_clear(disk):
    """Tags and namespaces are stored as digests."""
    (token,) = disk.tag_tokens([tag_id("user:alice")])
    disk.write((("tenant-alice",), "alice"), entry(deps=((tag_id("user:alice"), token),)))
    disk.close()
    for path in disk.directory.iterdir():
        assert b"alice" not in path.read_bytes()


def test_encrypted_at_rest(tmp_path, clock):
    """With an encrypting serde no payload reaches the disk; another secret reads a miss."""
    aes = EncryptedSerializer.from_pycryptodome_aes(key=b"k" * 32)
    with DiskCache(tmp_path / "cache", serde=aes, clock=clock) as cache:
        cache.write(KEY, entry(b"the secret"))
        assert payload(cache) == b"the secret"
    assert b"the secret" not in (tmp_path / "cache" / "cache.db").read_bytes()
    other = EncryptedSerializer.from_pycryptodome_aes(key=b"o" * 32)
    for serde in (other, None):
        with DiskCache(tmp_path / "cache", serde=serde, clock=clock) as cache:
            assert payload(cache) is None
            assert cache.stats().damaged == 1


# -- diskcache's format ---------------------------------------------------------------------------


def test_diskcache_can_open_check_and_cull(tmp_path):
    """What is written is a diskcache that diskcache itself finds in order."""
    with DiskCache(tmp_path / "cache") as cache:
        for i in range(300):
            cache.write((("n",), str(i)), entry(os.urandom(5000)))
        cache.tag_tokens(["a"])
        cache.acquire(KEY)
    with diskcache.Cache(str(tmp_path / "cache")) as other:
        assert other.check() == []
        assert len(other) == 300
        other.reset("size_limit", 500_000)
        other.cull()
        assert 0 < len(other) < 300
        assert other.check() == []
    with DiskCache(tmp_path / "cache") as cache:
        found = cache.read([Lookup((("n",), str(i))) for i in range(300)])
        assert found[0] is None
        assert found[299] is not None
        assert cache.acquire(KEY) is None


def test_plain_diskcache_is_adopted(tmp_path):
    """In a directory where diskcache kept things they stay, and are never ours."""
    with diskcache.Cache(str(tmp_path / "cache")) as other:
        other[key_digest(KEY)] = {"pickled": object}
        other["file"] = b"x" * 100_000
    with DiskCache(tmp_path / "cache") as cache:
        assert payload(cache) is None
        cache.write(KEY, entry())
        assert payload(cache) == b"value"
    with diskcache.Cache(str(tmp_path / "cache")) as other:
        assert other["file"] == b"x" * 100_000


def test_leftover_value_files_are_removed(tmp_path):
    """Files that a killed diskcache left behind go when the cache is opened; others stay."""
    DiskCache(tmp_path / "cache").close()
    orphan = tmp_path / "cache" / "0a" / "b1" / ("c" * 28 + ".val")
    mine = tmp_path / "cache" / "0a" / "b2" / "notes.val"
    for path in (orphan, mine):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x")
    DiskCache(tmp_path / "cache").close()
    assert not orphan.parent.exists()
    assert mine.exists()


def explode() -> None:
    os.environ["LGP_BOMB"] = "went off"


class Bomb:
    """Says so when it is unpickled."""

    def __reduce__(self):
        return explode, ()


@pytest.mark.parametrize("mode", [1, 2, 3, 4])
def test_hostile_rows(tmp_path, mode, monkeypatch):
    """A row that names a pickle or a path is a miss: nothing is unpickled, opened or removed."""
    monkeypatch.delenv("LGP_BOMB", raising=False)
    outside = tmp_path / "outside"
    outside.write_bytes(pickle.dumps(Bomb()))
    with DiskCache(tmp_path / "cache", size_limit=2**17) as cache:
        for filename, value in [
            (None, pickle.dumps(Bomb())),
            ("../outside", None),
            (str(outside), None),
            (None, "text"),
            (None, 42),
            (None, None),
        ]:
            for head in (None, b"LGP\x02", pickle.dumps(Bomb()), "LGP"):
                cache.write(KEY, entry())
                sql(
                    cache,
                    "UPDATE Cache SET mode = ?, filename = ?, value = ?, tag = ?",
                    *(mode, filename, value, head),
                )
                assert payload(cache) is None
                assert cache.read([Lookup(KEY), Lookup(OTHER)]) == [None, None]
        # a good row may not have another mode either
        cache.write(KEY, entry())
        sql(cache, "UPDATE Cache SET mode = ?, filename = ?", mode, None if mode == 1 else "x")
        assert (payload(cache) is None) == (mode != 1)
        sql(cache, "UPDATE Cache SET filename = '../outside', expire_time = 1")
        for i in range(30):  # swept and evicted, without touching what it names
            cache.write((("n",), str(i)), entry(b"x" * 10_000))
        cache.clear()
    assert outside.exists()
    assert "LGP_BOMB" not in os.environ


# -- damaged entries and files --------------------------------------------------------------------


def test_damaged_rows_are_misses(disk):
    """A value that was changed, truncated or moved is a miss; its neighbours are not."""
    for change in [
        "value = substr(value, 1, 10)",
        "value = zeroblob(length(value))",
        "tag = substr(tag, 1, length(tag) - 1)",
        "value = value || x'00'",
    ]:
        disk.write(KEY, entry(os.urandom(50_000)))
        disk.write(OTHER, entry(b"other"))
        sql(disk, f"UPDATE Cache SET {change} WHERE key = ?", key_digest(KEY))
        assert payload(disk) is None
        assert disk.read([Lookup(KEY), Lookup(OTHER)]) == [None, entry(b"other")]
    sql(disk, "DELETE FROM Cache WHERE key = ?", key_digest(KEY))
    sql(disk, "UPDATE Cache SET key = ?", key_digest(KEY))
    assert payload(disk) is None
    assert disk.stats().damaged == 9


def garbage(path: Path) -> None:
    path.write_bytes(b"this is no database at all" * 1000)


def truncated(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def garbage_pages(path: Path) -> None:
    with path.open("r+b") as file:
        for page in range(1, path.stat().st_size // 4096):
            file.seek(page * 4096)
            file.write(os.urandom(4096))


@pytest.mark.parametrize("damage", [garbage, truncated, emptied, garbage_pages])
def test_damaged_file(tmp_path, damage, caplog):
    """A damaged database is set aside with one log line, and the cache starts empty."""
    directory = tmp_path / "cache"
    for number in (1, 2):
        with DiskCache(directory) as cache:
            for i in range(50):
                cache.write((("n",), str(i)), entry(b"x" * 5000))
        caplog.clear()
        damage(directory / "cache.db")
        with DiskCache(directory) as cache:
            # damage deep inside is found on the way; what meets it raises and is over then
            for _ in range(3):
                try:
                    found = cache.read([Lookup((("n",), str(i))) for i in range(50)])
                    cache.write(KEY, entry())
                except sqlite3.DatabaseError:
                    continue
            assert found == [None] * 50
            assert payload(cache) == b"value"
            assert cache.stats().entries == 1
        logged = [record for record in told(caplog) if record.levelno >= logging.WARNING]
        aside = [path.name for path in directory.glob("*.damaged-*")]
        if damage is emptied:  # nothing to keep
            assert (logged, aside) == ([], [])
        else:
            assert aside == [f"cache.db.damaged-{number}"]
            assert len(logged) == 1
            assert "set aside" in logged[0].getMessage()


def test_damage_while_open(tmp_path):
    """Damage that appears under an open cache raises once or twice, then the cache goes on."""
    with DiskCache(tmp_path / "cache") as cache:
        for i in range(200):
            cache.write((("n",), str(i)), entry(b"x" * 5000))
        cache._db.close()  # let go of what SQLite has in memory
        cache._db._closed = False
        garbage_pages(tmp_path / "cache" / "cache.db")
        with pytest.raises(sqlite3.DatabaseError):
            cache.read([Lookup((("n",), str(i))) for i in range(200)])
        assert cache.write(KEY, entry())
        assert payload(cache) == b"value"


def test_set_aside_by_another_process(tmp_path):
    """Whoever has the old file open moves to the new one at once: invalidations must meet."""
    with DiskCache(tmp_path / "cache") as mine, DiskCache(tmp_path / "cache") as other:
        (token,) = mine.tag_tokens(["a"])
        mine.write(KEY, entry(deps=(("a", token),)))
        other._db._set_aside(other._db._file, sqlite3.DatabaseError("for the test"))
        mine._db._next_look = other._db._next_look = 0
        other.write(KEY, entry(b"new"))
        assert payload(mine) == b"new"
        mine.write(KEY, entry(b"newer"))
        assert payload(other) == b"newer"


def test_directory_removed_while_open(tmp_path):
    """A cache whose directory was deleted makes it anew."""
    import shutil

    with DiskCache(tmp_path / "cache") as cache:
        cache.write(KEY, entry())
        shutil.rmtree(tmp_path / "cache")
        cache._db._next_look = 0
        assert payload(cache) is None
        assert cache.write(KEY, entry())
        assert payload(cache) == b"value"
    assert (tmp_path / "cache" / "cache.db").exists()


def test_database_removed_while_open(tmp_path):
    """A deleted database takes its log with it; those that had it open move to the new one."""
    with DiskCache(tmp_path / "cache") as mine:
        mine.write(KEY, entry(b"old"))
        (tmp_path / "cache" / "cache.db").unlink()
        with DiskCache(tmp_path / "cache") as other:
            assert payload(other) is None
            assert other.write(OTHER, entry(b"new"))
            mine._db._next_look = 0
            assert (payload(mine), payload(mine, OTHER)) == (None, b"new")
            assert mine.write(KEY, entry(b"newer"))
            assert payload(other) == b"newer"
    with diskcache.Cache(str(tmp_path / "cache")) as plain:
        assert plain.check() == []


def test_half_made_database(tmp_path):
    """A process killed while it made the tables leaves something the next one completes."""
    DiskCache(tmp_path / "cache").close()
    con = sqlite3.connect(tmp_path / "cache" / "cache.db")
    con.executescript("DROP TABLE Leases; DROP TABLE Tags; PRAGMA user_version = 0")
    con.close()
    with DiskCache(tmp_path / "cache") as cache:
        assert cache.write(KEY, entry(), cache.acquire(KEY))
        assert payload(cache) == b"value"


# -- bounds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [500, 5_000, 100_000])
def test_stays_within_its_size(tmp_path, clock, size):
    """The whole directory stays within the limit and one entry; what came last is there."""
    limit = 2**19
    with DiskCache(tmp_path / "cache", size_limit=limit, clock=clock) as cache:
        count = 3 * limit // (size + 500)
        for i in range(count):
            assert cache.write((("n",), str(i)), entry(os.urandom(size)))
            clock.advance(0.001)
            if i % 50 == 0:
                assert size_of(cache.directory) <= limit + size
        assert payload(cache, (("n",), str(count - 1))) is not None
        assert payload(cache, (("n",), "0")) is None
        stats = cache.stats()
        assert stats.evicted + stats.entries == count
        assert limit * 0.6 < stats.bytes <= limit
    assert size_of(cache.directory) <= limit


def test_overwriting_when_full(tmp_path, clock):
    """Overwriting the entry that fills the cache needs no more room than it had."""
    with DiskCache(tmp_path / "cache", size_limit=2**20, clock=clock) as cache:
        cache.write(OTHER, entry(b"other"))
        for _ in range(5):
            assert cache.write(KEY, entry(os.urandom(700_000)))
        assert payload(cache, OTHER) == b"other"


def test_one_entry_too_large(tmp_path, clock):
    """An entry larger than the limit is refused and evicts nothing; what it replaces is gone."""
    with DiskCache(tmp_path / "cache", size_limit=2**17, clock=clock) as cache:
        cache.write(KEY, entry())
        cache.write(OTHER, entry(b"other"))
        assert cache.write(KEY, entry(b"x" * 2**17)) is False
        assert payload(cache) is None
        assert payload(cache, OTHER) == b"other"
        assert cache.stats().refused == 1


def test_smaller_limit_on_reopening(tmp_path, clock):
    """A cache reopened with a smaller limit shrinks to it, and so does its file."""
    with DiskCache(tmp_path / "cache", size_limit=2**23, clock=clock) as cache:
        for i in range(60):
            cache.write((("n",), str(i)), entry(os.urandom(100_000)))
            clock.advance(1)
    assert size_of(cache.directory) > 5_000_000
    with DiskCache(tmp_path / "cache", size_limit=2**20, clock=clock) as cache:
        assert payload(cache, (("n",), "59")) is not None
    assert size_of(cache.directory) <= 2**20


def test_clearing_gives_the_room_back(tmp_path, clock):
    """After ``clear()`` the file is small again."""
    with DiskCache(tmp_path / "cache", clock=clock) as cache:
        for i in range(50):
            cache.write((("n",), str(i)), entry(os.urandom(100_000)))
        cache.clear()
    assert size_of(cache.directory) < 200_000


def test_tags_do_not_crowd_entries_out(tmp_path, clock):
    """Endless tags take a bounded part of the room, and those in use keep their tokens."""
    with DiskCache(tmp_path / "cache", size_limit=2**20, clock=clock) as cache:
        (token,) = cache.tag_tokens(["hot"])
        for i in range(0, 20_000, 100):
            cache.tag_tokens([tag_id(str(j)) for j in range(i, i + 100)])
            assert cache.tag_tokens(["hot"]) == (token,)
        assert cache.stats().bytes < 2**20 // 4


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_full_disk(tmp_path):
    """When the disk is full writes raise, reads go on, and nothing is damaged."""
    code = """
import resource, signal, sqlite3, sys
from langgraph_perf.caches.disk import DiskCache
from langgraph_perf.caches.base import Entry, Lookup
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
key = lambda i: (("n",), str(i))
with DiskCache(sys.argv[1]) as cache:
    for i in range(5):
        cache.write(key(i), Entry(b"x" * 10_000, 1.0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, resource.RLIM_INFINITY))
    failed = 0
    for i in range(5, 15):
        try:
            cache.write(key(i), Entry(b"x" * 100_000, 1.0))
        except sqlite3.Error:
            failed += 1
    assert failed, "the disk was not full"
    assert all(cache.read([Lookup(key(i)) for i in range(5)]))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert cache.write(key(99), Entry(b"x" * 100_000, 1.0))
    assert all(cache.read([Lookup(key(i)) for i in (0, 4, 99)]))
"""
    subprocess.run([sys.executable, "-c", code, tmp_path / "cache"], check=True, timeout=100)
    with diskcache.Cache(str(tmp_path / "cache")) as other:
        assert other.check() == []


# -- locks, threads, connections ------------------------------------------------------------------


def test_waits_no_longer_than_its_timeout(tmp_path, clock):
    """While another process holds the lock writes raise in time, and reads go on."""
    with DiskCache(tmp_path / "cache", timeout=0.05, clock=clock) as cache:
        cache.write(KEY, entry())
        con = sqlite3.connect(cache.directory / "cache.db", isolation_level=None)
        try:
            con.execute("BEGIN IMMEDIATE")
            with pytest.raises(sqlite3.OperationalError, match="locked"):
                cache.write(OTHER, entry())
            with pytest.raises(sqlite3.OperationalError, match="locked"):
                cache.acquire(KEY)
            assert payload(cache) == b"value"
            assert cache.stats().entries == 1
            con.execute("ROLLBACK")
            assert cache.write(OTHER, entry())
        finally:
            con.close()


def test_threads_queue_for_writing(tmp_path, clock):
    """A thread that waits for another one's transaction gives up in time."""
    with (
        DiskCache(tmp_path / "cache", timeout=0.05, clock=clock) as cache,
        cache._db.transaction(),
    ):
        failures: list[Exception] = []

        def write() -> None:
            try:
                cache.write(KEY, entry())
            except Exception as exc:
                failures.append(exc)

        thread = threading.Thread(target=write)
        thread.start()
        thread.join()
        assert [type(exc) for exc in failures] == [TimeoutError]


def test_short_lived_threads_share_connections(disk):
    """A thread per operation, as LangGraph runs nodes, opens no connection per thread."""
    opened = []
    connect = disk._db._connect
    disk._db._connect = lambda: opened.append(1) or connect()
    for i in range(50):
        thread = threading.Thread(target=disk.write, args=((("n",), str(i)), entry()))
        thread.start()
        thread.join()
    assert len(opened) <= 1
    assert disk.stats().entries == 50


def test_many_threads(disk):
    """Threads that read and write at once see only whole entries of the right key."""
    start, wrong = threading.Barrier(6), []

    def work(seed: int) -> None:
        start.wait()
        for n in range(40):
            i = (seed * 7 + n) % 20
            value = str(i).encode() * 500
            disk.write((("n",), str(i)), entry(value))
            found = payload(disk, (("n",), str((i + n) % 20)))
            if found not in (None, str((i + n) % 20).encode() * 500):
                wrong.append(found)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert disk.stats().writes == 240


async def test_async_does_not_block_the_loop(disk):
    """While the database is locked the loop goes on; everything arrives afterwards."""
    con = sqlite3.connect(disk.directory / "cache.db", isolation_level=None)
    con.execute("BEGIN IMMEDIATE")
    writing = asyncio.create_task(disk.awrite(KEY, entry()))
    try:
        for _ in range(20):
            await asyncio.sleep(0)
        assert not writing.done()
        con.execute("ROLLBACK")
        assert await writing is True
    finally:
        con.close()


OPERATIONS = {
    "aread": ([Lookup(KEY)],),
    "apeek": ([Lookup(KEY), Lookup(OTHER)],),
    "aget": ([KEY],),
    "awrite": (OTHER, entry()),
    "aset": ({OTHER: ("value", None)},),
    "atag_tokens": ([tag_id("docs")],),
    "apeek_tags": ([tag_id("docs")],),
    "adrop_tags": ([tag_id("docs")],),
    "ainvalidate": ("docs",),
    "aacquire": (OTHER,),
    "arenew": (),
    "arelease": (),
    "acopy": (thread_namespace("t"), thread_namespace("copy"), {}),
    "apurge": (thread_namespace("t"),),
    "aclear": ([OTHER[0]],),
    "astats": (),
}


@pytest.mark.parametrize("name", OPERATIONS)
async def test_no_async_operation_blocks_the_loop(disk, name, monkeypatch):
    """While an operation cannot get at the database the loop goes on."""
    disk.write(KEY, entry())
    lease = disk.acquire(KEY)
    arguments = (lease,) if name in ("arenew", "arelease") else OPERATIONS[name]
    stalled, go_on, borrow = threading.Event(), threading.Event(), disk._db._borrow

    def stall():
        stalled.set()
        assert go_on.wait(10), "the loop stands still"
        return borrow()

    monkeypatch.setattr(disk._db, "_borrow", stall)
    running = asyncio.create_task(getattr(disk, name)(*arguments))
    await auntil(stalled.is_set)
    assert not running.done()
    go_on.set()
    await running


def test_every_async_operation_is_tried():
    """The list above is complete: those that are not in it do not ask the database."""
    operations = {name for name in dir(Cache) if inspect.iscoroutinefunction(getattr(Cache, name))}
    assert operations - OPERATIONS.keys() == {"_offload", "aclose", "apause"}


def test_nothing_stays_open(tmp_path, clock):
    """Neither a closed cache nor a forgotten one leaves a connection behind."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache = DiskCache(tmp_path / "cache", clock=clock)
        cache.write(KEY, entry())
        cache.close()
        forgotten = DiskCache(tmp_path / "cache", clock=clock)
        forgotten.write(KEY, entry())
        database = forgotten._db
        del cache, forgotten
        gc.collect()
        assert database._closed
        assert database._idle == []
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [
        "cache.db",
        "cache.db.lock",
    ]


def forked(check) -> bool:
    """Whether ``check()`` holds in a forked child."""
    pid = os.fork()
    if pid == 0:
        ok = False
        try:
            ok = bool(check())
        finally:
            os._exit(0 if ok else 1)
    return os.waitpid(pid, 0)[1] == 0


@needs_fork
@may_fork
def test_fork(disk):
    """A forked child opens its own connections; both sides go on, and see each other."""
    disk.write(KEY, entry(b"before"))
    inherited = set(disk._db._idle)
    assert inherited

    def child() -> bool:
        ok = payload(disk) == b"before" and disk.write(KEY, entry(b"child"))
        return ok and disk._db._idle and inherited.isdisjoint(disk._db._idle)

    assert forked(child)
    assert payload(disk) == b"child"
    assert disk.write(KEY, entry(b"parent"))
    assert payload(disk) == b"parent"
    assert forked(lambda: disk.close() or True)
    assert payload(disk) == b"parent"


@needs_fork
@may_fork
def test_fork_while_locked(disk):
    """A lock that a thread of the parent held does not reach the child."""
    disk.write(KEY, entry())
    disk._db._writing.acquire()
    disk._db._opening.acquire()
    disk._tally._lock.acquire()
    try:
        assert forked(lambda: payload(disk) == b"value" and disk._db._writing.acquire(timeout=0))
    finally:
        disk._db._writing.release()
        disk._db._opening.release()
        disk._tally._lock.release()


@needs_fork
@may_fork
def test_fork_with_an_executor(disk):
    """A child does not wait for its parent's threads, which it does not have."""
    disk.write(KEY, entry())
    assert asyncio.run(disk.aread([Lookup(KEY)])) == [entry()]

    def child() -> bool:
        return asyncio.run(asyncio.wait_for(disk.aread([Lookup(KEY)]), 20)) == [entry()]

    assert forked(child)


@contextlib.contextmanager
def writing_meanwhile(disk, until):
    """Another thread is inside a write transaction until ``until()``."""
    inside = threading.Event()

    def write() -> None:
        with disk._db.transaction() as con:
            con.execute("DELETE FROM Leases")
            inside.set()
            most = time.monotonic() + 20
            while not until() and time.monotonic() < most:
                time.sleep(0.001)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        assert inside.wait(20)
        yield
    finally:
        thread.join()


def works(cache: DiskCache) -> bool:
    """Whether it stores, serves and invalidates (not what another process does)."""
    tag, key = f"of {os.getpid()}", (("graph", "node"), str(os.getpid()))
    (token,) = cache.tag_tokens([tag])
    stored = cache.write(key, entry(b"mine", deps=((tag, token),)))
    served = payload(cache, key) == b"mine"
    cache.drop_tags([tag])
    return stored and served and payload(cache, key) is None


@needs_fork
@may_fork
def test_fork_waits_for_a_transaction(tmp_path):
    """A fork lets a transaction of another thread end; the child can write at once."""
    with DiskCache(tmp_path, timeout=20) as cache:
        cache.write(KEY, entry())
        began = threading.get_ident()
        with writing_meanwhile(cache, lambda: began in _sqlite_fork.forking):
            assert forked(lambda: works(cache))
        assert works(cache)


@needs_fork
@may_fork
def test_fork_during_an_endless_transaction(tmp_path, caplog):
    """When a transaction does not end in time, the child's caches of that file are closed, and say
    so where a miss would not do; others, and the parent's, go on."""
    end = threading.Event()
    with (
        DiskCache(tmp_path / "busy", timeout=0.05) as cache,
        DiskCache(tmp_path / "busy") as same,
        DiskCache(tmp_path / "other") as other,
    ):
        tiered = TieredCache(MemoryCache(), same)
        (token,) = cache.tag_tokens(["a"])
        tiered.write(KEY, entry(deps=(("a", token),)))

        def child() -> bool:
            for lost in cache, same, tiered:
                assert lost.read([Lookup(KEY)]) == [None]
                assert lost.get([KEY]) == {}
                for give_up in (lambda cache=lost: cache.invalidate("a")), lost.clear:
                    with pytest.raises(sqlite3.ProgrammingError, match=r"closed: .* fork"):
                        give_up()
            assert cache.write(KEY, entry()) is False
            assert cache.stats().entries == 0
            with pytest.raises(ConfigurationError, match="during the fork"):
                DiskCache(tmp_path / "busy")
            # its own child is no better off
            assert forked(lambda: cache.get([KEY]) == {})
            cache.close()
            return works(other)

        with writing_meanwhile(cache, end.is_set):
            try:
                assert forked(child)
            finally:
                end.set()
        assert [record.getMessage() for record in told(caplog)] == [
            f"{cache.directory / 'cache.db'} is in use by a thread while the process forks: the"
            " child has no cache there"
        ]
        assert tiered.read([Lookup(KEY)]) != [None]
        assert works(cache)
        assert works(same)
        # only then: a later fork finds nothing in its way
        assert forked(lambda: works(cache) and works(same))


@needs_fork
@may_fork
def test_fork_inside_an_operation(tmp_path):
    """A thread may fork while it has a connection itself (a signal handler): it does not wait for
    itself, its own operation goes on, and cannot go on in the child."""
    disk = DiskCache(tmp_path, timeout=10)
    disk.write(KEY, entry())

    def child() -> bool:
        assert [handle.con for handle in _sqlite_fork._inherited] == [con]
        with pytest.raises(sqlite3.ProgrammingError, match="fork"):
            disk.invalidate("a")
        with pytest.raises(sqlite3.DatabaseError, match="not authorized"):
            con.execute("SELECT 1")
        return payload(disk) is None

    with disk._db.transaction() as con:
        con.execute("DELETE FROM Cache")
        started = time.monotonic()
        assert forked(child)
        assert time.monotonic() - started < 9
    assert payload(disk) is None
    assert works(disk)
    disk.close()


@needs_fork
def test_child_that_forked_inside_an_operation_ends(tmp_path):
    """Not even its end closes what it inherited, which would delete the parent's log."""
    program = f"""if True:
        import os, warnings
        from langgraph_perf.caches.disk import DiskCache
        cache = DiskCache({str(tmp_path)!r})
        cache.set({{(("n",), "k"): ("before", None)}})
        child = False
        try:
            with cache._db.transaction() as con:
                con.execute("DELETE FROM Cache")
                child = os.fork() == 0
        except Exception as exc:
            assert child, exc
            raise SystemExit(7 if "not authorized" in str(exc) else 1)
        assert os.waitstatus_to_exitcode(os.wait()[1]) == 7
        assert os.path.exists({str(tmp_path / "cache.db-wal")!r})
        assert cache.get([(("n",), "k")]) == {{}}
        cache.set({{(("n",), "k"): ("after", None)}})
        other = "from langgraph_perf.caches.disk import DiskCache; import sys;"
        other += "print(DiskCache(sys.argv[1]).get([(('n',), 'k')]))"
        os.execl({sys.executable!r}, {sys.executable!r}, "-c", other, {str(tmp_path)!r})
    """
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=100
    )
    assert done.stdout == "{(('n',), 'k'): 'after'}\n", done.stderr


@needs_fork
@may_fork
def test_forks_among_busy_threads(tmp_path):
    """Children forked by several threads, while others read and write all the time, all work."""
    end, failed = threading.Event(), []
    with DiskCache(tmp_path, timeout=20) as cache:

        def use() -> None:
            while not end.is_set():
                try:
                    cache.write(OTHER, entry())
                    cache.read([Lookup(OTHER), Lookup(KEY)])
                except Exception as exc:
                    failed.append(exc)
                    raise

        def fork() -> None:
            failed.extend("a child" for _ in range(5) if not forked(lambda: works(cache)))

        users = [threading.Thread(target=use) for _ in range(3)]
        forkers = [threading.Thread(target=fork) for _ in range(2)]
        for thread in users + forkers:
            thread.start()
        for thread in forkers:
            thread.join()
        end.set()
        for thread in users:
            thread.join()
    assert not failed
    assert not _sqlite_fork.forking


@needs_fork
def test_operations_while_another_thread_forks(disk):
    """They wait until it is done; the forking thread's own (other hooks may have some) do not."""
    disk.write(KEY, entry())
    found: list[bytes | None] = []
    thread = threading.Thread(target=lambda: found.append(payload(disk)))
    _sqlite_fork._before_fork()
    try:
        assert disk._db._idle == []
        thread.start()
        assert works(disk)
        assert disk._db._idle == []
        assert found == []
    finally:
        _sqlite_fork._after_fork_in_parent()
    thread.join()
    assert found == [b"value"]
    assert disk._db._idle


@needs_fork
def test_fork_announced_while_a_connection_is_lent(disk):
    """A connection that was taken at the same moment is not used before the fork."""
    disk.write(KEY, entry())
    (handle,) = disk._db._idle
    statements: list[str] = []
    handle.con.set_trace_callback(statements.append)
    found: list[bytes | None] = []
    thread = threading.Thread(target=lambda: found.append(payload(disk)))
    _sqlite_fork.forking.append(threading.get_ident())
    try:
        thread.start()
        most = time.monotonic() + 20
        while disk._db._connections.users() and time.monotonic() < most:
            time.sleep(0.001)
        assert disk._db._idle == []
    finally:
        _sqlite_fork.forking.clear()
    thread.join()
    assert found == [b"value"]
    assert statements == []


@needs_fork
@may_fork
def test_fork_while_a_file_is_made(disk):
    """The lock on making the file is over when its holder says so, whatever children there are."""
    import fcntl

    with disk._db._alone():
        pid = os.fork()
        if pid == 0:
            try:
                signal.pause()
            finally:
                os._exit(0)
    try:
        with open(f"{disk._db.path}.lock", "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@needs_fork
@may_fork
def test_fork_while_a_cache_is_made(disk):
    """A cache that another thread has only begun to make does not keep the others from working."""
    halves = [DiskCache.__new__(DiskCache) for _ in range(20)]
    for half in halves:
        Cache.__init__(half)
    with disk._db._writing:
        assert forked(lambda: works(disk))


# -- what is asked of the database ----------------------------------------------------------------


def test_one_query_for_many_lookups(disk):
    """However many lookups, reading takes one query, and one more for all their tags."""
    (token,) = disk.tag_tokens(["a"])
    for i in range(40):
        disk.write((("n",), str(i)), entry(deps=(("a", token),) if i % 2 else ()))
    statements: list[str] = []
    with disk._db.connection() as con:
        con.set_trace_callback(statements.append)
        idle = list(disk._db._idle)
    assert idle == []
    found = disk.read([Lookup((("n",), str(i))) for i in range(40)])
    assert all(found)
    assert len(statements) == 2
    statements.clear()
    disk.read([Lookup((("n",), str(i))) for i in range(0, 40, 2)])
    assert len(statements) == 1


@pytest.mark.parametrize("how", ["drop_tags", "invalidate", "ainvalidate"])
async def test_invalidation_looks_at_no_entry(disk, how):
    """However many entries depend on a tag, invalidating it takes the same few statements."""
    statements: list[str] = []
    with disk._db.connection() as con:
        con.set_trace_callback(statements.append)
        assert list(disk._db._idle) == []

    def store() -> None:
        tokens = disk.tag_tokens([tag_id("docs"), tag_id("more")])
        deps = tuple(zip([tag_id("docs"), tag_id("more")], tokens, strict=True))
        for i in range(50):
            disk.write((("n",), str(i)), entry(deps=deps))
        statements.clear()

    async def invalidate() -> list[str]:
        if how == "drop_tags":
            disk.drop_tags([tag_id("docs"), tag_id("more")])
        elif how == "invalidate":
            disk.invalidate("docs", "more")
        else:
            await disk.ainvalidate("docs", "more")
        return list(statements)

    without = await invalidate()
    assert any("Tags" in statement for statement in without)
    store()
    assert await invalidate() == without
    assert not [it for it in without if re.search(r"\bcache\b", it, re.IGNORECASE)]
    assert disk.read([Lookup((("n",), str(i))) for i in range(50)]) == [None] * 50


def test_reopening_keeps_everything(tmp_path, clock):
    """Entries, tokens and leases outlast their process."""
    with DiskCache(tmp_path / "cache", clock=clock) as cache:
        tokens = cache.tag_tokens(["a", "b"])
        cache.write(KEY, entry(deps=(("a", tokens[0]),)))
        cache.acquire(OTHER)
    with DiskCache(tmp_path / "cache", clock=clock) as cache:
        assert payload(cache) == b"value"
        assert cache.tag_tokens(["a", "b"]) == tokens
        assert cache.acquire(OTHER) is None


def test_old_leases_are_swept(disk, clock):
    """Leases of killed processes do not pile up."""
    for i in range(50):
        disk.acquire((("n",), str(i)))
    clock.advance(11)
    disk.write(KEY, entry())
    assert sql(disk, "SELECT count(*) FROM Leases") == [(0,)]


def test_a_schema_that_is_no_text_is_damage(tmp_path: Path) -> None:
    """SQLite hands it on, and Python cannot read it: the file is set aside like any damaged one."""
    with DiskCache(tmp_path / "cache") as cache:
        cache.write(KEY, entry())
    file = next(path for path in (tmp_path / "cache").iterdir() if b"CREATE" in path.read_bytes())
    raw = bytearray(file.read_bytes())
    raw[raw.index(b"CREATE") + 2] = 0xFF
    file.write_bytes(raw)
    with DiskCache(tmp_path / "cache") as cache:
        assert cache.write(KEY, entry())
        assert cache.read([Lookup(KEY)]) != [None]
