"""No SQLite connection crosses a fork: all are closed before it, and opened again after it.

SQLite notes per process who has which lock on a file. A child that inherits an open connection
inherits these notes, but none of the system's locks: it believes to be registered as a reader and
is not, or waits for ever for a writer that it does not have; and whoever closes the file last, as
it seems, deletes the log under the other (https://www.sqlite.org/howtocorrupt.html, 2.6).

Nothing here takes a lock, which the forking thread itself might hold (a signal handler that forks):
what is shared are lists and dictionaries, whose single operations are atomic.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from threading import get_ident

logger = logging.getLogger("langgraph_perf")

_NAP = 0.0005
LOST = "a thread of the parent process was using it during the fork"

forking: list[int] = []
"""Threads about to fork. While there are any, nobody else takes or opens a connection."""

_everyone: weakref.WeakValueDictionary[int, Connections] = weakref.WeakValueDictionary()
_inherited: list[Handle] = []
"""Connections a forked child must neither use nor close."""
_lost: set[tuple[int, int]] = set()
"""Files this process can never open, as SQLite's notes on them are the parent's."""


class Handle:
    """A connection, a cursor to read with, and the file it was opened on (device and inode)."""

    __slots__ = ("__weakref__", "con", "cursor", "file", "user")

    def __init__(self, con: sqlite3.Connection, file: tuple[int, int] | None) -> None:
        self.con = con
        self.cursor = con.cursor()
        self.file = file
        self.user = 0
        """The thread that has it; 0 while idle or on its way."""


class Connections:
    """The open connections to one file.

    Args:
        path: the file.
        timeout: seconds a fork waits for the connections that are in use.
    """

    def __init__(self, path: Path, timeout: float) -> None:
        self.path = path
        self.timeout = timeout
        self.idle: list[Handle] = []
        self._busy: list[int] = []
        # weak: an interrupted operation forgets its connection, which closes it
        self._open: weakref.WeakValueDictionary[int, Handle] = weakref.WeakValueDictionary()
        _everyone[id(self)] = self

    def add(self, con: sqlite3.Connection, file: tuple[int, int] | None) -> Handle:
        """Take note of a connection that the calling thread has opened and uses."""
        handle = Handle(con, file)
        handle.user = get_ident()
        self._open[id(handle)] = handle
        return handle

    def close(self, handle: Handle) -> None:
        """Close it, unless it is the parent's."""
        if id(handle) in self._open:
            handle.con.close()
            self._open.pop(id(handle), None)

    def close_idle(self) -> None:
        """Close what nobody uses."""
        with contextlib.suppress(IndexError):
            while True:
                self.close(self.idle.pop())

    @contextlib.contextmanager
    def opening(self) -> Iterator[None]:
        """Connections are opened only within this, where no fork can come upon them."""
        me, busy = get_ident(), self._busy
        while True:
            passes = may_pass()
            # in this order: whoever forks looks here after its announcement
            busy.append(me)
            if passes or not forking:
                break
            busy.remove(me)
            while forking:
                time.sleep(_NAP)
        try:
            yield
        finally:
            busy.remove(me)

    # -- for the hooks ----------------------------------------------------------------------------

    def users(self) -> list[int]:
        """The threads (0: not known) that have something open; each as often as it has."""
        # in this order: what is being opened becomes a handle, not the other way round
        busy = list(self._busy)
        found = [ref() for ref in self._open.valuerefs()]
        return busy + [handle.user for handle in found if handle is not None]

    def recall(self, deadline: float) -> bool:
        """Close everything as it comes back; whether that is done by ``deadline``."""
        me = get_ident()
        while True:
            self.close_idle()
            users = self.users()
            if not users:
                return True
            # what this thread itself has cannot come back before the fork
            if me in users or time.monotonic() >= deadline:
                return False
            time.sleep(_NAP)

    def disown(self) -> None:
        """In a child: touch nothing that came with the fork, by whatever way."""
        if self.users():
            files = {handle.file for handle in self._open.values()}
            with contextlib.suppress(OSError):
                files.add(identity(self.path))
            _lost.update(file for file in files if file is not None)
        for handle in list(self._open.values()):
            _keep(handle)
            if handle.user == get_ident():
                # the operation that forked goes on here, too: it must fail
                with contextlib.suppress(sqlite3.Error):
                    handle.con.set_authorizer(_deny)
        self.idle.clear()
        self._busy = []
        self._open = weakref.WeakValueDictionary()


def may_pass() -> bool:
    """Whether this thread is the one that forks, or one that forks have to wait for already."""
    me = get_ident()
    return me in forking or any(me in connections.users() for connections in _all())


def is_lost(file: tuple[int, int] | None) -> bool:
    """Whether this process can never open that file."""
    return file in _lost


def disown() -> None:
    """In a forked child, before anything is opened: give up what is the parent's."""
    forking.clear()
    for connections in _all():
        connections.disown()


def identity(path: Path) -> tuple[int, int] | None:
    """Device and inode; ``None`` when there is no file."""
    try:
        info = os.stat(path)
    except FileNotFoundError:
        return None
    return info.st_dev, info.st_ino


def _all() -> list[Connections]:
    # one atomic step, unlike going through a set that other threads add to
    return [found for ref in _everyone.valuerefs() if (found := ref()) is not None]


def _keep(handle: Handle) -> None:
    """Let nothing close it, not even the end of the process, which drops every module."""
    _inherited.append(handle)
    with contextlib.suppress(ImportError, AttributeError):
        import ctypes

        ctypes.pythonapi.Py_IncRef(ctypes.py_object(handle))


def _deny(*_: object) -> int:
    return sqlite3.SQLITE_DENY


def _before_fork() -> None:
    forking.append(get_ident())
    started = time.monotonic()
    for connections in _all():
        back = False
        with contextlib.suppress(sqlite3.Error):
            back = connections.recall(started + connections.timeout)
        if not back:
            logger.warning(
                "%s is in use by a thread while the process forks: the child has no cache there",
                connections.path,
            )


def _after_fork_in_parent() -> None:
    with contextlib.suppress(ValueError):
        forking.remove(get_ident())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent)
