"""One connection for many callers: natural batching of commands.

What arrives while a batch is under way goes out together with the next one, so that any number of
threads or tasks costs about one round trip each way, and nobody waits for a batch to fill.
"""

from __future__ import annotations

import math
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from redis import exceptions

from langgraph_perf.caches._bounded import LOOK, Bounded
from langgraph_perf.caches._redis_commands import (
    Command,
    Commands,
    Script,
    Trips,
    by_digest,
    in_full,
    unknown_scripts,
)

T = TypeVar("T")


class _Timed:
    """A socket for redis-py's parsers to read from, with one deadline for all its reads."""

    def __init__(self, sock: Any) -> None:
        self._sock = sock
        self.ends = math.inf

    def _arm(self) -> None:
        left = self.ends - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self._sock.settimeout(left)

    def recv(self, *args: Any) -> bytes:
        self._arm()
        data: bytes = self._sock.recv(*args)
        return data

    def recv_into(self, *args: Any) -> int:
        self._arm()
        size: int = self._sock.recv_into(*args)
        return size

    def settimeout(self, _: float | None) -> None:
        """The deadline stays."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


def _timed(connection: Any) -> _Timed:
    """Make the parser of ``connection`` read with a deadline."""
    timed = _Timed(connection._sock)
    parser = connection._parser
    for reader in (getattr(parser, "_buffer", None), parser):
        if reader is not None and getattr(reader, "_sock", None) is connection._sock:
            reader._sock = timed
    return timed


class _Job:
    __slots__ = ("begun", "bell", "commands", "ends", "error", "replies")

    def __init__(self, commands: Commands, ends: float) -> None:
        self.commands = commands
        self.ends = ends
        self.begun = False
        self.replies: list[Any] | None = None
        self.error: BaseException | None = None
        self.bell: threading.Lock | None = None

    @property
    def done(self) -> bool:
        return self.replies is not None or self.error is not None

    def wake(self) -> None:
        """Let it look again, if it sleeps."""
        if self.bell is not None:
            with suppress(RuntimeError):  # it is awake already
                self.bell.release()


class Line:
    """A connection that threads share.

    One of them leads, and carries out what all that wait want. A signal's handler may raise
    wherever a call returns (Ctrl-C in a notebook, a task queue's time limit), and the garbage
    collector may come back here from almost anywhere. So there is no lock to be left locked: who
    leads is one entry of a dictionary, made in one step and given up without a call, and what is
    left undone by somebody who was interrupted the next one to lead finds in the queue.

    Attributes:
        connected: when its connection was made (``time.monotonic``).
    """

    def __init__(
        self,
        connect: Callable[[], Any],
        timeout: float = 1.0,
        connect_timeout: float = 1.0,
        trips: Trips | None = None,
    ) -> None:
        self._connect = connect
        self.timeout = timeout
        self.connect_timeout = connect_timeout
        self._trips = trips or Trips()
        self._queue: deque[_Job] = deque()
        """What is not over, in the order in which it came, also what is being carried out."""
        self._leader: dict[None, _Job] = {}
        """Whose turn it is, if anybody's; only who finds himself there uses the connection."""
        self._connection: Any = None
        self._in_step = False
        """Whether everything that was sent over the connection has been answered."""
        self._timed: Any = None
        self._closed = False
        self._connecting = Bounded(2)
        self.connected = -math.inf

    def execute(self, commands: Commands, ends: float | None = None) -> list[Any]:
        """One reply for each command, until ``ends`` (``time.monotonic``; ``timeout`` from now);
        if it has to connect, up to ``connect_timeout`` later.

        Raises:
            TimeoutError: nothing came in time.
            redis.RedisError: the connection failed, also when made anew.
            ConnectionError: the line is closed.
        """
        job = _Job(commands, time.monotonic() + self.timeout if ends is None else ends)
        try:
            self._queue.append(job)
            if self._leader.setdefault(None, job) is job:
                self._lead()
            if not job.done:
                self._follow(job)
        finally:
            # no call before the lead is given up: a signal's exception comes with one
            try:
                led = self._leader[None] is job
            except KeyError:
                led = False
            if led:
                del self._leader[None]
            self._leave(job, led)
        if job.error is not None:
            raise job.error
        assert job.replies is not None
        return job.replies

    def _follow(self, job: _Job) -> None:
        """Wait until the job is done or it is its turn to lead."""
        patience = job.ends - time.monotonic()
        if self._connection is None:
            patience += self.connect_timeout
        gives_up = time.monotonic() + patience
        job.bell = bell = threading.Lock()
        bell.acquire()
        # who looked for somebody to wake before there was a bell is not waited for
        while not job.done:
            left = gives_up - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"no answer from Redis within {patience:.3g} seconds")
            if self._leader.setdefault(None, job) is job:
                self._lead()
                return
            bell.acquire(timeout=min(left, LOOK))

    def _leave(self, job: _Job, led: bool) -> None:
        """The job is over: see that somebody leads those who are left. Whatever is not done here,
        because it was interrupted, they do themselves a moment later."""
        with suppress(ValueError):
            self._queue.remove(job)
        if led and self._closed and self._connection is not None:
            self.close()  # it was done while this one led
        if self._queue and not self._leader:
            for other in list(self._queue):
                if not other.done:
                    other.wake()
                    break

    def _lead(self) -> None:
        """Carry out what waits; whoever is in the queue is done then, or came meanwhile."""
        error: BaseException = ConnectionError("interrupted")
        batch = []
        for job in list(self._queue):
            if job.begun:
                # over, or else its leader was interrupted, and it may have been carried out
                if not job.done:
                    job.error = error
                    job.wake()
                with suppress(ValueError):
                    self._queue.remove(job)
            else:
                batch.append(job)
        if not batch:
            return
        try:
            for job in batch:
                job.begun = True
            self._carry(batch)
        except Exception as exc:
            error = exc
            # those who came meanwhile share its fate: they asked the same server
            batch = list(self._queue)
        finally:
            for job in batch:
                if not job.done:
                    job.error = error
                job.wake()

    def _carry(self, batch: list[_Job]) -> None:
        ends = max([job.ends for job in batch])
        commands = [command for job in batch for command in job.commands]
        replies = self._ask([by_digest(command) for command in commands], ends)
        unknown = unknown_scripts(commands, replies)
        if unknown:
            again = self._ask([in_full(commands[i]) for i in unknown], ends)
            for i, reply in zip(unknown, again, strict=True):
                replies[i] = reply
        start = 0
        for job in batch:
            end = start + len(job.commands)
            job.replies, start = replies[start:end], end

    def _ask(self, commands: Commands, ends: float) -> list[Any]:
        if not self._in_step:
            self._drop()
        if self._connection is not None:
            # it may have been closed by the other side long ago: that alone is no failure
            with suppress(exceptions.ConnectionError):
                return self._send(self._connection, commands, ends)
        if self._closed:
            raise ConnectionError("the cache is closed")
        connection, started = self._connect(), time.monotonic()
        try:
            # what it does has a deadline for each step, or, with Sentinel, maybe none
            self._connecting.run(connection.connect, self.connect_timeout, connection.disconnect)
        except exceptions.TimeoutError as exc:
            raise TimeoutError(str(exc)) from exc
        self._timed = _timed(connection)
        self._connection, self.connected = connection, time.monotonic()
        return self._send(connection, commands, ends + self.connected - started)

    def _send(self, connection: Any, commands: Commands, ends: float) -> list[Any]:
        self._trips.add()
        replies: list[Any] = []
        self._in_step = False
        try:
            sock = connection._sock
            if sock is None:
                raise exceptions.ConnectionError("closed")
            self._timed.ends = ends
            for chunk in connection.pack_commands(commands):
                sock.settimeout(max(0.001, ends - time.monotonic()))
                connection.send_packed_command([chunk], check_health=False)
            for _ in commands:
                try:
                    replies.append(connection.read_response(disable_decoding=True))
                except exceptions.ResponseError as exc:
                    replies.append(exc)
            self._in_step = True
            if any(isinstance(reply, exceptions.ReadOnlyError) for reply in replies):
                self._drop()  # a master that became a replica: who is the master now?
        except BaseException as exc:
            self._drop()
            if self._closed and isinstance(exc, Exception):
                raise ConnectionError("the cache is closed") from exc
            if isinstance(exc, exceptions.TimeoutError):
                raise TimeoutError(str(exc)) from exc
            raise
        return replies

    def _drop(self) -> None:
        """Close the connection; the next command makes another one. Only for who leads."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.disconnect()

    def close(self) -> None:
        """Close the connection for good; what is under way fails."""
        self._closed = True
        me = _Job((), math.inf)
        try:
            if self._leader.setdefault(None, me) is me:
                self._drop()
                return
            # runs at interpreter exit too, when whoever leads may never go on
            sock = getattr(self._connection, "_sock", None)
            if sock is not None:
                with suppress(OSError):  # who leads notices, and does the rest
                    sock.shutdown(socket.SHUT_RDWR)
        finally:
            try:
                led = self._leader[None] is me
            except KeyError:
                led = False
            if led:
                del self._leader[None]
            self._leave(me, led)


class ClusterLine:
    """The same over a cluster's client, which finds each key's node: one pipeline at a time per
    caller, since the client has its own connections; its deadlines are not ours."""

    connected = -math.inf

    def __init__(self, client: Any, timeout: float, trips: Trips) -> None:
        self._client = client
        self.timeout = timeout
        self._trips = trips
        self._bounded = Bounded(8)

    def execute(self, commands: Commands, ends: float | None = None) -> list[Any]:
        """One reply for each command; see ``Line.execute``."""
        return self.call(lambda: self._ask(commands), ends)

    def call(self, work: Callable[[], T], ends: float | None = None) -> T:
        """What ``work`` returns, if that is in time."""
        left = self.timeout if ends is None else ends - time.monotonic()
        try:
            return self._bounded.run(work, left)
        except exceptions.TimeoutError as exc:
            raise TimeoutError(str(exc)) from exc

    def scan(self, pattern: str, count: int) -> list[bytes]:
        """The names of all keys like this, on all nodes."""
        names: list[bytes] = []
        for node in self.call(self._client.get_primaries):
            cursor: Any = 0
            while True:
                at = cursor

                def step(node: Any = node, at: Any = at) -> Any:
                    client = self._client.get_redis_connection(node)
                    return client.scan(at, match=pattern, count=count)

                cursor, found = self.call(step)
                names += found
                if int(cursor) == 0:
                    break
        return names

    def _ask(self, commands: Commands) -> list[Any]:
        self._trips.add()
        replies: list[Any] = [None] * len(commands)
        plain = [i for i, command in enumerate(commands) if not isinstance(command[0], Script)]
        if plain:
            pipeline = self._client.pipeline()
            for i in plain:
                pipeline.execute_command(*commands[i])
            for i, reply in zip(plain, pipeline.execute(raise_on_error=False), strict=True):
                replies[i] = reply
        for i, command in enumerate(commands):
            if isinstance(command[0], Script):
                replies[i] = self._run(command)
        return replies

    def _run(self, command: Command) -> Any:
        try:
            try:
                return self._client.execute_command(*by_digest(command))
            except exceptions.NoScriptError:
                return self._client.execute_command(*in_full(command))
        except exceptions.ResponseError as exc:
            return exc

    def close(self) -> None:
        """The client is its maker's to close."""
