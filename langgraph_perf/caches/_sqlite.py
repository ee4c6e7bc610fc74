"""The database file of a ``DiskCache``: private, pooled, repaired, safe to fork."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sqlite3
import stat
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import get_ident
from typing import Any

from langgraph_perf.caches._sqlite_fork import (
    LOST,
    Connections,
    Handle,
    forking,
    identity,
    is_lost,
    may_pass,
)
from langgraph_perf.errors import ConfigurationError

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger("langgraph_perf")

_LARGE = 16 * 2**20
"""From this limit on pages have 8 KB: values of 32 KB are read a sixth faster. An empty database
takes a dozen pages."""
_COMPLETE = 1
"""``user_version`` of a database that has all its tables."""
_MOST_IDLE = 4
_CACHE_KIB = 8192
"""Pages a connection keeps in memory: reading 32 KB values takes a quarter less than with 2 MB."""
_LOOK_EVERY = 0.001
_SQLITE_CORRUPT, _SQLITE_NOTADB = 11, 26
_DAMAGE = re.compile(r"malformed|not a database|no such (table|column)")
_VALUE_FILE = re.compile(r"[0-9a-f]{28}\.val")


class Database:
    """One SQLite file in diskcache's format, with the tables ``Tags`` and ``Leases`` besides.

    LangGraph runs blocking nodes in short-lived threads, so connections belong to operations, not
    to threads: they are lent from a small stack.

    Args:
        directory: where the file is; made, private to its user, when missing.
        size_limit: what diskcache's own culling is told, in bytes.
        wal_bytes: size the write-ahead log is kept at.
        timeout: seconds an operation waits for the database lock.

    Raises:
        ConfigurationError: ``directory`` cannot be used.
    """

    def __init__(self, directory: Path, size_limit: int, wal_bytes: int, timeout: float) -> None:
        self.path = directory / "cache.db"
        self._size_limit = size_limit
        self._wal_bytes = wal_bytes
        self._timeout = timeout
        self._connections = Connections(self.path, timeout)
        self._idle = self._connections.idle
        self._file: tuple[int, int] | None = None
        self._next_look = 0.0
        self._opening = threading.RLock()
        self._writing = threading.Lock()
        self._closed = False
        try:
            self._open()
        except OSError as exc:
            raise _unusable(directory, str(exc)) from exc
        except sqlite3.OperationalError as exc:
            if "locked" in str(exc):
                raise
            raise _unusable(directory, f"{exc} ({self.path})") from exc

    # -- for operations ---------------------------------------------------------------------------

    def rows(self, statement: str, values: Sequence[object] = ()) -> list[Any]:
        """What one reading statement finds."""
        handle = self._borrow()
        try:
            rows = handle.cursor.execute(statement, values).fetchall()
        except BaseException as exc:
            self._drop(handle, exc)
            raise
        self._give_back(handle)
        return rows

    @contextlib.contextmanager
    def connection(self) -> Iterator[sqlite3.Connection]:
        """Lend a connection. One that saw an error is closed, which rolls back what it began."""
        handle = self._borrow()
        try:
            yield handle.con
        except BaseException as exc:
            self._drop(handle, exc)
            raise
        self._give_back(handle)

    @contextlib.contextmanager
    def transaction(self, durable: bool = False) -> Iterator[sqlite3.Connection]:
        """One write transaction, committed at the end, rolled back on an error.

        Args:
            durable: whether it must outlast a power failure, which costs an fsync.

        Raises:
            TimeoutError: other threads kept the database busy for ``timeout`` seconds.
            sqlite3.OperationalError: other processes did, or the disk is full.
        """
        started = time.monotonic()
        # threads hand over on a lock: SQLite's own waiting polls, with naps of up to 0.1 s
        writing = self._writing  # a child that was forked in between has another one
        if not writing.acquire(timeout=self._timeout):
            raise TimeoutError(f"{self.path} was busy for {self._timeout} seconds")
        try:
            waited = time.monotonic() - started
            with self.connection() as con:
                if waited > self._timeout / 10:
                    _wait_at_most(con, max(0.0, self._timeout - waited))
                if durable:
                    con.execute("PRAGMA synchronous = FULL")
                con.execute("BEGIN IMMEDIATE")
                yield con
                con.execute("COMMIT")
                if durable:
                    con.execute("PRAGMA synchronous = NORMAL")
                con.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
                if waited > self._timeout / 10:
                    _wait_at_most(con, self._timeout)
        finally:
            writing.release()

    def empty_log(self, patience: float) -> bool:
        """Move what is in the write-ahead log to its place and cut the log, so that nothing of
        what was deleted or overwritten is left in it.

        ``False`` when somebody was reading or writing for ``patience`` seconds, or it failed: then
        the log stays as it is.
        """
        writing = self._writing
        if not writing.acquire(timeout=patience):
            return False
        try:
            with self.connection() as con:
                _wait_at_most(con, min(self._timeout, patience))
                (busy, *_) = con.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
                _wait_at_most(con, self._timeout)
            return not busy
        except (sqlite3.Error, OSError):
            return False
        finally:
            writing.release()

    def close(self) -> None:
        """Close what is open; connections still lent out close when they come back."""
        self._closed = True
        self._connections.close_idle()

    def after_fork(self) -> bool:
        """Runs in a forked child, once it has disowned its parent's connections.

        ``False`` when a thread of the parent was using the file during the fork, through this
        object or another: then this process can never open it, and the database is closed.
        """
        self._opening = threading.RLock()
        self._writing = threading.Lock()
        files = {self._file}
        with contextlib.suppress(OSError):
            files.add(identity(self.path))
        lost = any(map(is_lost, files))
        self._closed = self._closed or lost
        return not lost

    # -- connections ------------------------------------------------------------------------------

    def _borrow(self) -> Handle:
        while True:
            if self._closed:
                raise sqlite3.ProgrammingError("the cache is closed")
            # A file that was removed or set aside, by whomever, must not go on living in here:
            # other processes would not see its invalidations. Making its successor takes far
            # longer than this interval, so nothing can have been invalidated there unseen.
            now = time.monotonic()
            if now >= self._next_look:
                self._next_look = now + _LOOK_EVERY
                if self._file is None or identity(self.path) != self._file:
                    self._open()
            try:
                handle = self._idle.pop()
            except IndexError:
                return self._connect()
            if not forking or may_pass():
                handle.user = get_ident()
                return handle
            # a fork was announced: `_connect` waits until it is done
            self._connections.close(handle)

    def _give_back(self, handle: Handle) -> None:
        handle.user = 0
        if self._closed or forking or handle.file != self._file or len(self._idle) >= _MOST_IDLE:
            self._connections.close(handle)
        else:
            self._idle.append(handle)

    def _drop(self, handle: Handle, exc: BaseException) -> None:
        self._connections.close(handle)
        if is_damage(exc):
            self._set_aside(handle.file, exc)

    def _connect(self) -> Handle:
        with self._connections.opening():
            return self._connected()

    def _connected(self) -> Handle:
        for _ in range(3):
            file = identity(self.path)
            if is_lost(file):
                raise sqlite3.OperationalError(LOST)
            # mode=rw: never creates the file, which would have the permissions of the umask
            con = sqlite3.connect(
                f"{self.path.as_uri()}?mode=rw",
                uri=True,
                timeout=self._timeout,
                isolation_level=None,
                check_same_thread=False,
            )
            handle = self._connections.add(con, file)
            # a text that is none (a damaged row) must not fail the rows around it
            con.text_factory = _text
            try:
                # WAL with NORMAL: killing a process loses nothing, a power failure at most the
                # last transactions, and never the file's integrity
                con.execute("PRAGMA synchronous = NORMAL")
                # what is deleted is gone: values are zeroed, also in pages that come free
                con.execute("PRAGMA secure_delete = ON").fetchall()
                con.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
                (page,) = con.execute("PRAGMA page_size").fetchone()
                # the log grows by one transaction more before it starts over
                frames = max(8, self._wal_bytes // (page + 24) - 16)
                con.execute(f"PRAGMA wal_autocheckpoint = {frames}").fetchall()
                con.execute(f"PRAGMA journal_size_limit = {self._wal_bytes}").fetchall()
                con.execute("SELECT count(*) FROM sqlite_master").fetchall()
            except BaseException as exc:
                self._drop(handle, exc)
                raise
            # now the log is open too; still the same file means that it is the file's own log
            if identity(self.path) == file:
                return handle
            self._connections.close(handle)
        raise sqlite3.OperationalError(f"{self.path} is being replaced again and again")

    # -- the file ---------------------------------------------------------------------------------

    def _open(self) -> None:
        with self._connections.opening(), self._opening:
            if self._file is not None and identity(self.path) == self._file:
                return
            private_directory(self.path.parent)
            self._connections.close_idle()
            for attempt in range(3):
                try:
                    self._prepare()
                    break
                except (sqlite3.DatabaseError, UnicodeDecodeError) as exc:
                    # `_connect` or the line below has set the file aside
                    if attempt == 2 or not is_damage(exc):
                        raise
            self._file = identity(self.path)

    def _prepare(self) -> None:
        self._make_file()
        for suffix in ("", "-wal", "-shm"):
            _make_private(f"{self.path}{suffix}")
        handle = self._connect()
        con = handle.con
        try:
            if con.execute("PRAGMA user_version").fetchone() != (_COMPLETE,):
                self._make_tables(con)
            self._remove_value_files(con)
            (limit,) = con.execute(
                "SELECT value FROM Settings WHERE key = 'size_limit'"
            ).fetchone() or (None,)
            if limit != self._size_limit:
                con.execute(
                    "INSERT OR REPLACE INTO Settings VALUES ('size_limit', ?)", (self._size_limit,)
                )
        except BaseException as exc:
            self._drop(handle, exc)
            raise
        self._connections.close(handle)

    def _make_file(self) -> None:
        if self.path.exists():
            return
        with self._alone(), contextlib.suppress(FileExistsError):
            if not self.path.exists():
                # what a removed file left behind would be taken for the new one's
                for suffix in ("-wal", "-shm"):
                    Path(f"{self.path}{suffix}").unlink(missing_ok=True)
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))

    def _make_tables(self, con: sqlite3.Connection) -> None:
        import diskcache

        with self._alone():
            if con.execute("PRAGMA user_version").fetchone() == (_COMPLETE,):
                return
            # these only take effect before there is a table
            page = 8192 if self._size_limit >= _LARGE else 4096
            con.execute(f"PRAGMA page_size = {page}")
            con.execute("PRAGMA auto_vacuum = FULL")
            con.execute("PRAGMA journal_mode = WAL").fetchall()
            diskcache.Cache(
                str(self.path.parent),
                timeout=self._timeout,
                size_limit=self._size_limit,
                disk_min_file_size=2**31,  # never a file
                sqlite_auto_vacuum=1,  # pages that come free go back to the disk
                sqlite_mmap_size=0,  # a mapped file that is truncated kills the process
            ).close()
            con.execute(
                "CREATE TABLE IF NOT EXISTS Tags"
                " (n INTEGER PRIMARY KEY, id TEXT UNIQUE, token TEXT)"
            )
            con.execute(
                "CREATE TABLE IF NOT EXISTS Leases (key BLOB PRIMARY KEY, token TEXT, expires REAL)"
                " WITHOUT ROWID"
            )
            con.execute(f"PRAGMA user_version = {_COMPLETE}")

    def _remove_value_files(self, con: sqlite3.Connection) -> None:
        """Remove files that diskcache itself once left behind; this library writes none."""
        found = [
            path
            for path in self.path.parent.glob("[0-9a-f][0-9a-f]/[0-9a-f][0-9a-f]/*.val")
            if _VALUE_FILE.fullmatch(path.name)
        ]
        if not found:
            return
        rows = con.execute("SELECT filename FROM Cache WHERE filename IS NOT NULL").fetchall()
        used = {self.path.parent / str(name) for (name,) in rows}
        for path in set(found) - used:
            with contextlib.suppress(OSError):
                path.unlink()
                path.parent.rmdir()
                path.parent.parent.rmdir()

    def _set_aside(self, file: tuple[int, int] | None, exc: BaseException) -> None:
        with self._connections.opening(), self._opening, self._alone():
            if file is None or identity(self.path) != file:
                return  # somebody else was faster
            earlier = sorted(
                (int(match[1]), path)
                for path in self.path.parent.iterdir()
                if (match := re.fullmatch(r"cache\.db\.damaged-(\d+)", path.name))
            )
            number = earlier[-1][0] + 1 if earlier else 1
            aside = Path(f"{self.path}.damaged-{number}")
            # the file before its log: whoever finds the file in place has the right log open
            self.path.replace(aside)
            for suffix in ("-wal", "-shm"):
                Path(f"{self.path}{suffix}").unlink(missing_ok=True)
            for _, path in earlier:
                path.unlink(missing_ok=True)
            self._file, self._next_look = None, 0.0
        logger.warning(
            "%s is damaged (%s): set aside as %s, the cache starts empty",
            self.path,
            exc,
            aside.name,
        )

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other processes from making or replacing the file meanwhile."""
        if sys.platform == "win32":  # where an open file cannot be replaced in the first place
            yield
            return
        fd = os.open(f"{self.path}.lock", os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            # not left to closing it: a forked child may have inherited it
            fcntl.flock(fd, fcntl.LOCK_UN)
            os.close(fd)


def is_damage(exc: BaseException) -> bool:
    """Whether ``exc`` says that the database file itself is broken."""
    if isinstance(exc, UnicodeDecodeError):
        return True  # in the schema: all that this library reads as text is ASCII
    if not isinstance(exc, sqlite3.DatabaseError):
        return False
    code = getattr(exc, "sqlite_errorcode", None)  # Python 3.11
    if code is not None and code & 0xFF in (_SQLITE_CORRUPT, _SQLITE_NOTADB):
        return True
    return bool(_DAMAGE.search(str(exc)))


def private_directory(directory: Path) -> None:
    """Make ``directory`` if it is missing, and private to its user.

    Raises:
        ConfigurationError: it is not a directory, somebody else's, shared, or not writable.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = directory.stat()
    except OSError as exc:
        raise _unusable(directory, exc.strerror or str(exc)) from exc
    if not hasattr(os, "geteuid"):
        return
    if info.st_uid != os.geteuid():
        raise _unusable(directory, "it belongs to another user")
    if info.st_mode & stat.S_ISVTX:
        raise _unusable(directory, "it is shared by all users")
    if info.st_mode & 0o077:
        directory.chmod(info.st_mode & 0o700)
    if not os.access(directory, os.W_OK | os.X_OK):
        raise _unusable(directory, "it is not writable")


def _unusable(directory: Path, why: str) -> ConfigurationError:
    return ConfigurationError(
        f"directory: {str(directory)!r} cannot hold a cache: {why}; "
        "accepted is a writable directory of this user, or one that can be made"
    )


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")


def _make_private(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        mode = os.stat(path).st_mode
        if mode & 0o077:
            os.chmod(path, mode & 0o700)


def _wait_at_most(con: sqlite3.Connection, seconds: float) -> None:
    con.execute(f"PRAGMA busy_timeout = {int(seconds * 1000)}").fetchall()
