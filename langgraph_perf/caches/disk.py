"""A cache in a directory, shared by the processes of one machine.

The directory holds one SQLite database in diskcache's format, so that diskcache itself can open,
check and cull it. Its own reading and writing is not used: it unpickles values and opens whatever
path a row names (CVE-2025-69872), returns truncated values, and keeps one connection per thread.
Here every value is a row of raw bytes with a checksum, and no other file is opened. Tag tokens and
leases are tables beside diskcache's, out of the reach of its culling.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from langgraph.cache.base import FullKey, Namespace
from langgraph.checkpoint.serde.base import SerializerProtocol

from langgraph_perf.caches._sqlite import Database
from langgraph_perf.caches._sqlite_fork import LOST, disown
from langgraph_perf.caches.base import (
    CacheStats,
    DamagedEntry,
    Entry,
    Lease,
    Lookup,
    TokenCache,
    decoded,
    key_digest,
    namespace_tag,
    new_token,
    owned,
    require_int,
    require_seconds,
    servable,
    timely,
)
from langgraph_perf.caches.entry import namespace_digest, seal, unbound, unseal
from langgraph_perf.codec import DecodeError, decode
from langgraph_perf.errors import ConfigurationError

_SMALLEST = 2**16  # an empty database takes three quarters of it
_LOG_INDEX = 2**15
_ROW_COST = 400
"""Bytes a row takes beyond its value: its other columns, three indexes, half-filled pages."""
_TAG_COST = 256
_IN_ONE_STATEMENT = 500  # older SQLite takes at most 999 variables
_SWEEP_EVERY = 8
_SWEEP = 128
_BATCH = 1000
"""Most rows one transaction removes when much is to go: others must get their turn."""

_UPSERT = """
    INSERT INTO Cache (key, raw, store_time, expire_time, access_time, access_count,
                       tag, size, mode, filename, value)
    VALUES (?, 1, ?, ?, ?, 0, ?, 0, 1, NULL, ?)
    ON CONFLICT (key, raw) DO UPDATE SET
        store_time = excluded.store_time, expire_time = excluded.expire_time,
        access_time = excluded.access_time, access_count = 0,
        tag = excluded.tag, size = 0, mode = 1, filename = NULL, value = excluded.value"""
_OURS = "FROM Cache WHERE raw = 1 AND mode = 1 AND filename IS NULL AND key"
_SELECT_ONE = f"SELECT tag, value {_OURS} = ?"
_UNBOUND = (None, ())
"""Of an entry that neither expires nor depends on a tag: ``expires`` and ``deps``."""
_SELECT = f"SELECT tag, value, key {_OURS}"
_IN_RANGE = "raw = 1 AND key BETWEEN ? AND ?"
_SELECT_KEYS = f"SELECT key FROM Cache WHERE {_IN_RANGE}"
_DELETE = f"""
    DELETE FROM Cache WHERE rowid IN (SELECT rowid FROM Cache
    WHERE %s AND rowid <= ? LIMIT {_BATCH})"""
_PATIENCE = 0.1
"""Seconds that readers are waited for when the log is to be emptied."""
_COPIES = 32
"""Most entries one transaction copies: they are in memory together."""
_TAKE = """
    INSERT INTO Leases VALUES (?, ?, ?)
    ON CONFLICT (key) DO UPDATE SET token = excluded.token, expires = excluded.expires
    WHERE expires <= ?"""


class DiskCache(TokenCache):
    """Keeps entries in a directory that all processes of this user on this machine may share.

    Args:
        directory: where; made when missing. It becomes private to its user (mode 0700). ``~`` and
            environment variables are expanded.
        size_limit: bytes the directory may take; the entries stored longest ago leave first. An
            entry that alone is larger is not stored.
        lease_seconds: how long a killed process delays those that wait for its result.
        timeout: seconds an operation may wait for the database before it fails.
        serde: see ``Cache``.
        clock: see ``Cache``; all processes must agree on it.

    A cache may be used on both sides of a fork. A fork waits, for at most ``timeout``, for what
    other threads are doing with the cache. When that takes longer, the child's cache is closed:
    its lookups are misses, and invalidating and clearing raise ``sqlite3.ProgrammingError``.

    Raises:
        ConfigurationError: an argument is not as described, or the directory cannot be used.
    """

    shared = True

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        size_limit: int = 2**30,
        lease_seconds: float = 10.0,
        timeout: float = 1.0,
        serde: SerializerProtocol | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(serde=serde, clock=clock)
        self.directory = _path(directory)
        self.size_limit = require_int("size_limit", size_limit, _SMALLEST, "bytes")
        self.lease_seconds = require_seconds("lease_seconds", lease_seconds)
        self.timeout = require_seconds("timeout", timeout)
        # the write-ahead log and its index count too: part of the room is kept for them
        log = min(4 * 2**20, size_limit // 4)
        self._room = size_limit - log - (_LOG_INDEX if size_limit >= 16 * _LOG_INDEX else 0)
        self._most_tags = max(64, size_limit // 8 // _TAG_COST)
        self._writes_to_sweep = 0
        self._next_sweep = 0.0
        self._lost = False
        self._log_is_due = False
        self._db = Database(self.directory, size_limit, log, self.timeout)
        self._finalizer = weakref.finalize(self, self._db.close)
        # when it cannot be done now, the next write does it
        with contextlib.suppress(sqlite3.DatabaseError, TimeoutError):
            self._shrink()

    # -- entries ----------------------------------------------------------------------------------

    # `get` and `read` are the same, made short for what is asked most: one result, without tags

    def get(self, keys: Sequence[FullKey]) -> dict[FullKey, Any]:
        """The values stored under ``keys``; absent, expired and damaged ones are left out."""
        if len(keys) != 1 or self._closed:
            return super().get(keys)
        key = keys[0]
        try:
            digest = key_digest(key)
            rows = self._db.rows(_SELECT_ONE, (digest,))
            if rows and self.value_serde is None:
                payload = unbound(digest, *rows[0])
                if payload is not None:
                    try:
                        value = decode(payload)
                        self._tally.hit()
                        return {key: value}
                    except DecodeError:
                        pass  # said below
            entry = self._one(key, (), None, False, rows)
        except Exception as exc:
            self._missed("read", exc)
            return {}
        return {} if entry is None else decoded(keys, (entry,))

    def read(self, lookups: Sequence[Lookup]) -> list[Entry | None]:
        """One answer for each lookup, in order; only servable entries."""
        if len(lookups) != 1 or self._closed:
            return super().read(lookups)
        return [self._one(*lookups[0])]

    def _one(
        self,
        key: FullKey,
        tags: tuple[str, ...],
        max_age: float | None,
        fresh: bool,
        rows: list[Any] | None = None,
    ) -> Entry | None:
        digest = key_digest(key)
        for head, body in self._db.rows(_SELECT_ONE, (digest,)) if rows is None else rows:
            try:
                entry = unseal(digest, head, body, self.value_serde)
            except DamagedEntry:
                self._tally.add(damaged=1)
                break
            if entry[2:4] != _UNBOUND or tags or max_age is not None:
                current = self.peek_tags({tag for tag, _ in entry.deps})
                if not servable(entry, Lookup(key, tags, max_age, fresh), current, self.clock()):
                    break
            self._tally.hit()
            return entry
        self._tally.read((None,))
        return None

    def peek(self, lookups: Sequence[Lookup]) -> list[Entry | None]:
        """Like ``read``, but whatever became of the entries' tags; counts nothing."""
        if self._closed or not lookups:
            return [None] * len(lookups)
        digests = [key_digest(lookup.key) for lookup in lookups]
        rows = {}
        with self._db.connection() as con:
            for row in _select(con, _SELECT, digests):
                rows[row[2]] = row
        return [
            self._entry(lookup, digest, rows[digest]) if digest in rows else None
            for lookup, digest in zip(lookups, digests, strict=True)
        ]

    def _entry(self, lookup: Lookup, digest: bytes, row: tuple[Any, ...]) -> Entry | None:
        entry = self._unsealed(digest, row)
        return entry if entry is not None and timely(entry, lookup, self.clock()) else None

    def _unsealed(self, digest: bytes, row: tuple[Any, ...]) -> Entry | None:
        try:
            return unseal(digest, row[0], row[1], self.value_serde)
        except DamagedEntry:
            self._tally.add(damaged=1)
            return None

    def write(self, key: FullKey, entry: Entry, lease: Lease | None = None) -> bool:
        """Store, and give ``lease`` back with it.

        ``False`` when nothing was stored: ``lease`` no longer holds the key, the entry alone is
        larger than the cache, or the cache is closed.
        """
        if self._closed:
            return False
        name = key_digest(key)
        head, body = seal(name, entry, self.value_serde)
        now = self.clock()
        with self._db.transaction() as con:
            if lease is not None and not _holds(con, name, lease, now):
                return False
            stored = self._store(con, now, name, entry.expires, head, body)
        if self._log_is_due:
            self._log_is_due = not self._db.empty_log(0.0)
        return self._counted([stored]) == 1

    def _store(
        self,
        con: sqlite3.Connection,
        now: float,
        name: bytes,
        expires: float | None,
        head: bytes,
        body: bytes,
    ) -> bool:
        size = len(head) + len(body) + _ROW_COST
        self._sweep(con, now)
        if size > self._room:
            # what it was to replace is out of date all the same
            con.execute("DELETE FROM Cache WHERE key = ? AND raw = 1", (name,))
            return False
        if _used(con) + size > self._room:
            con.execute("DELETE FROM Cache WHERE key = ? AND raw = 1", (name,))
            self._evict(con, size)
        con.execute(_UPSERT, (name, now, expires, now, head, body))
        # a write without a lease (a refresh) supersedes whoever computes the key now
        con.execute("DELETE FROM Leases WHERE key = ?", (name,))
        return True

    def _counted(self, stored: Sequence[bool]) -> int:
        """How many were, counted now that the transaction is through."""
        done = sum(stored)
        self._tally.add(writes=done, refused=len(stored) - done)
        return done

    def _sweep(self, con: sqlite3.Connection, now: float) -> None:
        self._writes_to_sweep -= 1
        if self._writes_to_sweep > 0 and now < self._next_sweep:
            return
        self._writes_to_sweep = _SWEEP_EVERY
        self._next_sweep = now + 1.0
        self._expire(con, now, _SWEEP)
        con.execute("DELETE FROM Leases WHERE expires <= ?", (now,))

    def _expire(self, con: sqlite3.Connection, now: float, most: int) -> int:
        expired = con.execute(
            "DELETE FROM Cache WHERE rowid IN (SELECT rowid FROM Cache"
            " WHERE expire_time <= ? ORDER BY expire_time LIMIT ?)",
            (now, most),
        ).rowcount
        if expired:
            self._tally.add(expired=expired)
        return expired

    def _evict(self, con: sqlite3.Connection, size: int) -> None:
        """Remove entries, those stored longest ago first, until ``size`` bytes have room."""
        while (excess := _used(con) + size - self._room) > 0:
            doomed = []
            for rowid, length in con.execute(
                "SELECT rowid, coalesce(length(value), 0) FROM Cache ORDER BY store_time"
            ):
                doomed.append((rowid,))
                excess -= length + _ROW_COST
                if excess <= 0:
                    break
            if not doomed:
                return
            con.executemany("DELETE FROM Cache WHERE rowid = ?", doomed)
            self._tally.add(evicted=len(doomed))

    def _shrink(self) -> None:
        """Keep to a limit that is smaller than it was."""
        with self._db.connection() as con:
            large = _used(con) > self._room
        if large:
            with self._db.transaction() as con:
                self._evict(con, 0)

    def copy(
        self, source: Namespace, target: Namespace, deps: Mapping[str, tuple[str, str]]
    ) -> int:
        """Copy what is servable in one owned namespace into another; see ``Cache``."""
        if self._closed or not (owned(source) and owned(target)):
            return 0
        keys = [key for (key,) in self._db.rows(_SELECT_KEYS, _range(tuple(source)))]
        first, copied = namespace_digest(tuple(target)), 0
        for start in range(0, len(keys), _COPIES):
            with self._db.connection() as con:
                rows = list(_select(con, _SELECT, keys[start : start + _COPIES]))
            entries = [self._unsealed(row[2], row) for row in rows]
            tags = {tag for entry in entries if entry is not None for tag, _ in entry.deps}
            copies = self._copied(entries, self.peek_tags(tags), deps)
            sealed = []
            for row, entry in zip(rows, copies, strict=True):
                if entry is not None:
                    name = first + row[2][len(first) :]
                    sealed.append((name, entry.expires, *seal(name, entry, self.value_serde)))
            if not sealed:
                continue
            now = self.clock()
            with self._db.transaction() as con:
                stored = [self._store(con, now, *one) for one in sealed]
            copied += self._counted(stored)
        return copied

    def purge(self, namespace: Namespace) -> int:
        """Delete what can never be served again in one owned namespace; see ``Cache`` and, about
        what is left in the files, ``clear``."""
        self._must_not_be_lost()
        self.must_be_open()
        if not owned(namespace):
            return 0
        keys = [key for (key,) in self._db.rows(_SELECT_KEYS, _range(tuple(namespace)))]
        purged = 0
        for start in range(0, len(keys), _COPIES):
            with self._db.connection() as con:
                rows = list(_select(con, _SELECT, keys[start : start + _COPIES]))
            entries = [self._unsealed(row[2], row) for row in rows]
            tags = {tag for entry in entries if entry is not None for tag, _ in entry.deps}
            spent = self._spent(entries, self.peek_tags(tags))
            doomed = [(row[2],) for row, is_spent in zip(rows, spent, strict=True) if is_spent]
            with self._db.transaction(durable=True) as con:
                con.executemany("DELETE FROM Cache WHERE key = ? AND raw = 1", doomed)
            purged += len(doomed)
        if purged:
            self._log_is_due = not self._db.empty_log(_PATIENCE)
        return purged

    def clear(self, namespaces: Sequence[Namespace] | None = None) -> None:
        """Delete what is in exactly these namespaces; ``None`` deletes everything.

        Their values, and those they once had, are overwritten in the files and gone from the
        write-ahead log, with two exceptions. While somebody reads, the log is left as it is, until
        a later ``clear`` or write of this object, or until it starts over. And SQLite, where it
        once moved a row from one page to another, may have left a copy of what was in the page (a
        value, if it is shorter than a page, or a part of one) that stays until the page is filled
        again: where that matters, encrypt with a ``serde``.
        """
        self._must_not_be_lost()
        self.must_be_open()
        if namespaces is None:
            with self._db.transaction(durable=True) as con:
                con.execute("DELETE FROM Tags")
            self._delete("1", ())
        elif namespaces:
            tags = [(namespace_tag(tuple(namespace)),) for namespace in namespaces]
            with self._db.transaction(durable=True) as con:
                con.executemany("DELETE FROM Tags WHERE id = ?", tags)
        for namespace in namespaces or ():
            self._delete(_IN_RANGE, _range(tuple(namespace)))
        if namespaces is None or namespaces:
            self._log_is_due = not self._db.empty_log(_PATIENCE)

    def _delete(self, condition: str, values: tuple[bytes, ...]) -> None:
        with self._db.connection() as con:
            # not what others store meanwhile, or it might never end
            (last,) = con.execute("SELECT max(rowid) FROM Cache").fetchone()
        deleted = _BATCH if last is not None else 0
        while deleted == _BATCH:
            with self._db.transaction(durable=True) as con:
                deleted = con.execute(_DELETE % condition, (*values, last)).rowcount

    # -- tags -------------------------------------------------------------------------------------

    def peek_tags(self, tags: Collection[str]) -> Mapping[str, str]:
        """The current tokens of these tag ids; those that have none are left out."""
        if self._closed or not tags:
            return {}
        with self._db.connection() as con:
            return dict(_select(con, "SELECT id, token FROM Tags WHERE id", list(tags)))

    def tag_tokens(self, tags: Sequence[str]) -> tuple[str, ...]:
        """The current token of each tag id, made where there is none."""
        found: dict[str, str] = {}
        ageing: list[str] = []
        if tags and not self._closed:
            with self._db.connection() as con:
                for tag, token, age in _select(
                    con,
                    "SELECT id, token, (SELECT max(n) FROM Tags) - n FROM Tags WHERE id",
                    list(set(tags)),
                ):
                    found[tag] = token
                    if age > self._most_tags // 2:
                        ageing.append(tag)
            missing = set(tags) - found.keys()
            if missing or ageing:
                found = self._make_tokens(missing, ageing, tags)
        # one that is not there (closed, or too many at once) matches nothing: a miss
        return tuple([found.get(tag) or new_token() for tag in tags])

    def _make_tokens(
        self, missing: Iterable[str], ageing: Iterable[str], tags: Sequence[str]
    ) -> dict[str, str]:
        with self._db.transaction() as con:
            con.executemany(
                "INSERT INTO Tags (id, token) VALUES (?, ?) ON CONFLICT (id) DO NOTHING",
                [(tag, new_token()) for tag in missing],
            )
            # in use: to the young end, so that the oldest are those nobody asks for
            con.executemany(
                "UPDATE Tags SET n = (SELECT max(n) FROM Tags) + 1 WHERE id = ?",
                [(tag,) for tag in ageing],
            )
            con.execute(
                "DELETE FROM Tags WHERE n <= (SELECT max(n) FROM Tags) - ?", (self._most_tags,)
            )
            return dict(_select(con, "SELECT id, token FROM Tags WHERE id", list(set(tags))))

    def drop_tags(self, tags: Sequence[str]) -> None:
        """Forget the tokens of these tag ids."""
        self._must_not_be_lost()
        self.must_be_open()
        if not tags:
            return
        # durable: a token lost by a power failure may not come back to life
        with self._db.transaction(durable=True) as con:
            con.executemany("DELETE FROM Tags WHERE id = ?", [(tag,) for tag in tags])
        self._tally.add(invalidations=len(tags))

    # -- leases -----------------------------------------------------------------------------------

    def acquire(self, key: FullKey) -> Lease | None:
        """Take the lease of ``key``; ``None`` while somebody else holds it."""
        now = self.clock()
        lease = Lease(key, new_token(), now + self.lease_seconds)
        if self._closed:
            return lease  # nobody to share the result with: compute
        with self._db.transaction() as con:
            taken = con.execute(_TAKE, (key_digest(key), lease.token, lease.expires, now)).rowcount
        return lease if taken else None

    def renew(self, lease: Lease) -> Lease | None:
        """Extend a lease by ``lease_seconds``; ``None`` when it was lost."""
        if self._closed:
            return None
        now = self.clock()
        renewed = lease._replace(expires=now + self.lease_seconds)
        with self._db.transaction() as con:
            kept = con.execute(
                "UPDATE Leases SET expires = ? WHERE key = ? AND token = ? AND expires > ?",
                (renewed.expires, key_digest(lease.key), lease.token, now),
            ).rowcount
        return renewed if kept else None

    def release(self, lease: Lease) -> None:
        """Give a lease back; one that was lost meanwhile is left to its new holder."""
        if self._closed:
            return
        with self._db.transaction() as con:
            con.execute(
                "DELETE FROM Leases WHERE key = ? AND token = ?",
                (key_digest(lease.key), lease.token),
            )

    # -- the rest ---------------------------------------------------------------------------------

    def stats(self) -> CacheStats:
        """A snapshot of counters and sizes, once what has expired is removed."""
        entries = used = 0
        # a database that cannot be asked still has counters to show
        with contextlib.suppress(sqlite3.Error, OSError):
            if not self._closed:
                self._expire_all()
                with self._db.connection() as con:
                    (entries,) = con.execute("SELECT count(*) FROM Cache").fetchone()
                    used = _used(con)
        return self._tally.stats(entries=entries, bytes=used)

    def _expire_all(self) -> None:
        now = self.clock()
        with self._db.connection() as con:
            found = con.execute("SELECT 1 FROM Cache WHERE expire_time <= ? LIMIT 1", (now,))
            expired = _BATCH if found.fetchone() else 0
        while expired == _BATCH:
            with self._db.transaction() as con:
                expired = self._expire(con, now, _BATCH)

    def close(self) -> None:
        """Close the database; a closed cache answers every lookup with a miss."""
        super().close()
        self._finalizer()

    def _disown(self) -> None:
        disown()

    def _after_fork(self) -> None:
        super()._after_fork()
        if not self._db.after_fork() and not self._closed:
            self._lost = self._closed = True

    def _must_not_be_lost(self) -> None:
        # a miss more is harmless, an invalidation that nobody sees is not
        if self._lost:
            raise sqlite3.ProgrammingError(f"the cache in {self.directory} is closed: {LOST}")


def _range(namespace: Namespace) -> tuple[bytes, bytes]:
    """The first and the last key there can be in ``namespace``."""
    first = namespace_digest(namespace)
    return first, first + b"\xff" * 16


def _path(given: object) -> Path:
    if not isinstance(given, (str, os.PathLike)) or not isinstance(os.fspath(given), str):
        raise ConfigurationError(f"directory must be a path (str or os.PathLike), got {given!r}")
    text = os.fspath(given)
    if not text or "\0" in text:
        raise ConfigurationError(f"directory must name a directory, got {given!r}")
    return Path(os.path.abspath(os.path.expandvars(os.path.expanduser(text))))


def _select(
    con: sqlite3.Connection, statement: str, values: Sequence[bytes | str]
) -> Iterator[tuple[Any, ...]]:
    """The rows of ``statement``, which ends before the operator that takes ``values``."""
    if len(values) == 1:
        yield from con.execute(f"{statement} = ?", values).fetchall()
        return
    for start in range(0, len(values), _IN_ONE_STATEMENT):
        some = values[start : start + _IN_ONE_STATEMENT]
        marks = ",".join("?" * len(some))
        yield from con.execute(f"{statement} IN ({marks})", some).fetchall()


def _holds(con: sqlite3.Connection, name: bytes, lease: Lease, now: float) -> bool:
    row = con.execute(
        "SELECT 1 FROM Leases WHERE key = ? AND token = ? AND expires > ?",
        (name, lease.token, now),
    ).fetchone()
    return row is not None


def _ask(con: sqlite3.Connection, pragma: str) -> int:
    (value,) = con.execute(f"PRAGMA {pragma}").fetchone()
    return int(value)


def _used(con: sqlite3.Connection) -> int:
    return (_ask(con, "page_count") - _ask(con, "freelist_count")) * _ask(con, "page_size")
