"""What the server says unasked: which tag tokens changed, whose results are there.

One connection of its own in RESP3, where reports and replies share one stream in order, read by one
daemon thread. Callers only leave notes for the thread; nobody else touches the socket.
"""

from __future__ import annotations

import asyncio
import logging
import re
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from langgraph_perf.caches._redis_view import VIEW_SECONDS, TagView
from langgraph_perf.caches.entry import new_token

logger = logging.getLogger("langgraph_perf")

_PING_EVERY = VIEW_SECONDS / 4
_IDLE_AFTER = 1.0
"""Seconds after which a view that nobody asks is no longer kept."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0
_PAUSE_WHEN_REFUSED = 60.0
_MOST_PINGS = 8
PRESENT_SECONDS = 2.0
"""How long the server remembers a view: what a view was promised outlives its connection."""

# KEYS: the views. ARGV: this one, milliseconds. What fails is answered like what did not happen.
_PRESENT = b"""
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.pcall('ZREMRANGEBYSCORE', KEYS[1], '-inf', string.format('%.0f', now))
local ends = string.format('%.0f', now + ARGV[2])
if type(redis.pcall('ZADD', KEYS[1], ends, ARGV[1])) == 'table' then return 0 end
redis.pcall('PEXPIRE', KEYS[1], ARGV[2])
return 1
"""


class Watcher:
    """Somebody who waits for word from a channel.

    Attributes:
        ready: set once the server says whatever is published from now on.
        told: set when something was published, or nothing more can be heard.
    """

    def __init__(self, asynchronous: bool) -> None:
        self._loop = asyncio.get_running_loop() if asynchronous else None
        new: Callable[[], Any] = asyncio.Event if asynchronous else threading.Event
        self.ready = new()
        self.told = new()

    def set(self, event: Any) -> None:
        """Set one of its events, from any thread."""
        if self._loop is None:
            event.set()
        else:
            with suppress(RuntimeError):  # its loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(event.set)


class Listener:
    """Keeps a ``TagView`` and tells watchers, from its first use until ``close``.

    Args:
        connect: makes a connection, not yet connected.
        tags: what the keys of tag tokens look like: what stands before and after the tag id.
        presence: a channel to which it subscribes for as long as it keeps a view, so that others
            can count the views (``PUBSUB NUMSUB``).
        views: the key of a sorted set in which it is for as long as its view may hold, also when
            the server has dropped its connection and it has not noticed.
        timeout: seconds within which the server must answer.
    """

    def __init__(
        self,
        connect: Callable[[], Any],
        tags: tuple[bytes, bytes],
        presence: bytes,
        views: bytes,
        timeout: float,
    ) -> None:
        self._connect = connect
        self._tags = tags
        self._presence = presence
        self._views = views
        self._timeout = timeout
        self.view = TagView(self._wanted)
        self.own = b"%s:%s" % (presence, new_token().encode())
        """This view: a member of ``views``, and a channel that nobody else subscribes to."""
        self._view_wanted = False
        # re-entrant: the garbage collector may end one that watches wherever this thread is
        self._lock = threading.RLock()
        self._watchers: dict[bytes, list[Watcher]] = {}
        self._notes: deque[tuple[bytes, ...]] = deque()
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()
        self._alarm, self._bell = socket.socketpair()
        self._alarm.setblocking(False)
        self._bell.setblocking(False)
        self._resting = True
        # of one connection
        self._expected: deque[Callable[[Any], None]] = deque()
        self._pings: deque[float] = deque()
        self._next_ping = 0.0
        self._next_presence = 0.0
        self._presences: deque[float] = deque()
        self._present_until = 0.0
        self._keeps_view = False

    # -- for callers ------------------------------------------------------------------------------

    def follow_tags(self) -> None:
        """Keep the view from now on."""
        self._view_wanted = True
        self._start()
        self._ring()

    @contextmanager
    def watching(self, channel: bytes, asynchronous: bool) -> Iterator[Watcher]:
        """While the block runs, its watcher is told when something is published on ``channel``."""
        watcher = Watcher(asynchronous)
        with self._lock:
            self._watchers.setdefault(channel, []).append(watcher)
            self._notes.append((b"SUBSCRIBE", channel))
        self._start()
        self._ring()
        try:
            yield watcher
        finally:
            with self._lock:
                others = self._watchers[channel]
                others.remove(watcher)
                if not others:
                    del self._watchers[channel]
                    self._notes.append((b"UNSUBSCRIBE", channel))
            self._ring()

    def close(self) -> None:
        """Stop listening, and wait until the thread has ended."""
        self._closed.set()
        self._ring()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(self._timeout + 1.0)
        else:
            self._alarm.close()
            self._bell.close()

    def abandon(self) -> None:
        """In a forked child: the thread is not here, and the connection the parent's."""
        self._alarm.close()
        self._bell.close()

    def _start(self) -> None:
        with self._lock:
            if self._thread is None and not self._closed.is_set():
                thread = threading.Thread(
                    target=self._run, name="langgraph-perf-redis", daemon=True
                )
                try:
                    thread.start()
                except RuntimeError:  # no more threads, or the interpreter is shutting down
                    return  # nothing is heard until the next use, which tries again
                self._thread = thread

    def _ring(self) -> None:
        with suppress(OSError):  # full: it is awake anyway; closed: nothing to wake
            self._bell.send(b"\0")

    def _wanted(self) -> None:
        if self._thread is None:
            self._start()
        if self._resting:
            self._resting = False
            self._ring()

    # -- the thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        with self._lock:
            if self._thread is not threading.current_thread():
                return  # who started it was interrupted before that was noted
        pause, refused = _FIRST_PAUSE, False
        try:
            while not self._closed.is_set():
                started = time.monotonic()
                try:
                    self._listen()
                except _Refused as exc:
                    # once: it is the same every minute, for as long as the process lives
                    level, refused = (logging.DEBUG if refused else logging.WARNING), True
                    logger.log(
                        level,
                        "Redis tells nothing unasked (%s): tiers in front of it ask for every hit, "
                        "and results of other processes are polled for",
                        exc,
                    )
                    pause = _PAUSE_WHEN_REFUSED
                except Exception as exc:
                    logger.debug("listening to Redis ended: %s: %s", type(exc).__name__, exc)
                    long_ago = time.monotonic() - started > _LONGEST_PAUSE
                    pause = _FIRST_PAUSE if long_ago else min(pause * 2, _LONGEST_PAUSE)
                finally:
                    self._deaf()
                self._closed.wait(pause)
        finally:
            self._alarm.close()
            self._bell.close()

    def _deaf(self) -> None:
        self._keeps_view = False
        self.view.lost()
        self._resting = True
        self._expected.clear()
        self._pings.clear()
        self._presences.clear()
        self._next_presence = self._present_until = 0.0
        with self._lock:
            for watchers in list(self._watchers.values()):
                for watcher in list(watchers):
                    watcher.set(watcher.ready)
                    watcher.set(watcher.told)

    def _listen(self) -> None:
        connection = self._connect()
        connection.connect()
        try:
            sock: socket.socket = connection._sock
            sock.settimeout(self._timeout)
            with selectors.DefaultSelector() as selector:
                selector.register(sock, selectors.EVENT_READ)
                selector.register(self._alarm, selectors.EVENT_READ)
                self._greet(sock)
                self._hear(sock, selector)
                self.view.lost()
                self._send(sock, (b"ZREM", self._views, self.own), _nothing)
        finally:
            connection.disconnect()

    def _greet(self, sock: socket.socket) -> None:
        self._send(sock, (b"HELLO", b"3"), _nothing)
        with self._lock:
            self._notes.clear()
            for channel in list(self._watchers):
                self._send(sock, (b"SUBSCRIBE", channel), None)

    def _hear(self, sock: socket.socket, selector: selectors.BaseSelector) -> None:
        buffer = Buffer()
        asked = False
        while not self._closed.is_set():
            if self._view_wanted and not asked:
                asked = True
                self._send(sock, (b"SUBSCRIBE", self._presence, self.own), None)
                prefix = self._tags[0]
                self._send(
                    sock,
                    (b"CLIENT", b"TRACKING", b"ON", b"BCAST", b"PREFIX", prefix),
                    self._view_begins,
                )
            with self._lock:
                while self._notes:
                    self._send(sock, self._notes.popleft(), None)
            wait = self._keep_view(sock)
            for key, _ in selector.select(wait):
                if key.fileobj is self._alarm:
                    with suppress(BlockingIOError):
                        self._alarm.recv(4096)
                else:
                    self._receive(sock, buffer)

    def _keep_view(self, sock: socket.socket) -> float | None:
        """Ping if it is time; seconds until it is time again."""
        now = time.monotonic()
        if self._pings and now - self._pings[0] > self._timeout:
            raise TimeoutError("no answer to a ping")
        idle = now - self.view.used >= _IDLE_AFTER
        if idle and not self._watchers:
            self._resting = True
            # somebody may have looked just before that was said
            return None if time.monotonic() - self.view.used >= _IDLE_AFTER else 0.0
        self._resting = False
        if now >= self._next_ping:
            self._next_ping = now + (self._timeout if idle else _PING_EVERY)
            if self._keeps_view and not idle and now >= self._next_presence:
                self._next_presence = now + PRESENT_SECONDS / 4
                self._presences.append(now)
                milliseconds = b"%d" % (PRESENT_SECONDS * 1000)
                command = (b"EVAL", _PRESENT, b"1", self._views, self.own, milliseconds)
                self._send(sock, command, self._present)
            if len(self._pings) < _MOST_PINGS:
                self._pings.append(now)
                # whether the server still remembers it: it may have been flushed, or evicted
                self._send(sock, (b"ZSCORE", self._views, self.own), self._answered)
        return max(0.0, min(self._next_ping - now, self._timeout))

    def _view_begins(self, _: Any) -> None:
        self.view.flush()  # what was learnt before may have changed unreported
        self._keeps_view = True
        self._next_ping = 0.0

    def _present(self, reply: Any) -> None:
        asked = self._presences.popleft()
        if reply == b"1":
            self._present_until = asked + PRESENT_SECONDS

    def _answered(self, remembered: Any) -> None:
        asked = self._pings.popleft()
        if remembered is None:
            self._next_presence = self._present_until = 0.0
            return
        # not longer than invalidations reckon with it
        if self._keeps_view and asked + VIEW_SECONDS <= self._present_until:
            self.view.confirm(asked)

    def _send(
        self,
        sock: socket.socket,
        command: tuple[bytes, ...],
        answered: Callable[[Any], None] | None,
    ) -> None:
        # (un)subscribing is answered by a report, everything else by a reply
        if answered is not None:
            self._expected.append(answered)
        parts = [b"*%d\r\n" % len(command)]
        parts += [b"$%d\r\n%s\r\n" % (len(part), part) for part in command]
        sock.sendall(b"".join(parts))

    def _receive(self, sock: socket.socket, buffer: Buffer) -> None:
        while True:
            data = sock.recv(65536)
            if not data:
                raise ConnectionError("closed by the server")
            for message in buffer.feed(data):
                if isinstance(message, ErrorReply):
                    raise message
                if isinstance(message, Report):
                    self._reported(message)
                elif self._expected:
                    self._expected.popleft()(message)
            # what a TLS layer has decrypted already, no selector would tell
            if not getattr(sock, "pending", int)():
                return

    def _reported(self, report: Report) -> None:
        kind = bytes(report[0])
        if kind == b"invalidate":
            if report[1] is None:
                self.view.flush()
                return
            before, after = self._tags
            self.view.forget(
                [
                    key[len(before) : len(key) - len(after)].decode("latin-1")
                    for key in report[1]
                    if key.startswith(before)
                ]
            )
        elif kind in (b"subscribe", b"message"):
            with self._lock:
                for watcher in list(self._watchers.get(report[1], ())):
                    watcher.set(watcher.ready)
                    if kind == b"message":
                        watcher.set(watcher.told)


def _nothing(_: Any) -> None:
    pass


class ErrorReply(Exception):
    """The server answered with an error."""


class _Refused(ErrorReply):
    """One that will be the same the next time, unlike BUSY, LOADING, MASTERDOWN, ...."""


# Redis has no code for what it does not know; a server may call TRACKING a subcommand or not
_REFUSAL = re.compile("NOPERM |NOPROTO |ERR (unknown|syntax error|wrong number of arg)", re.I)


def _error(text: str) -> ErrorReply:
    return (_Refused if _REFUSAL.match(text) else ErrorReply)(text)


class Report(list[Any]):
    """A message that answers nothing ("push" in RESP3)."""


class Buffer:
    """Bytes of RESP3, made into messages as they become complete."""

    def __init__(self) -> None:
        self._bytes = b""

    def feed(self, data: bytes) -> Iterator[Any]:
        """The messages that ``data`` completes."""
        self._bytes += data
        at = 0
        try:
            while at < len(self._bytes):
                message, at = self._read(at)
                yield message
        except _Incomplete:
            pass
        finally:
            self._bytes = self._bytes[at:]

    def _read(self, at: int) -> tuple[Any, int]:
        end = self._bytes.find(b"\r\n", at)
        if end < 0:
            raise _Incomplete
        kind, line, at = self._bytes[at : at + 1], self._bytes[at + 1 : end], end + 2
        if kind in (b"$", b"=", b"!"):
            size = int(line)
            if size < 0:
                return None, at
            if len(self._bytes) < at + size + 2:
                raise _Incomplete
            text = self._bytes[at : at + size]
            return (_error(text.decode()) if kind == b"!" else text), at + size + 2
        if kind in (b"*", b">", b"~", b"%"):
            items: list[Any] = Report() if kind == b">" else []
            for _ in range(int(line) * (2 if kind == b"%" else 1)):
                item, at = self._read(at)
                items.append(item)
            return items, at
        if kind == b"-":
            return _error(line.decode()), at
        return (None if kind == b"_" else line), at


class _Incomplete(Exception):
    """More bytes are to come."""
