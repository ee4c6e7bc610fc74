"""One connection for many callers: natural batching of commands.

What arrives while a batch is under way goes out together with the next one, so that any number of
threads or tasks costs about one round trip each way, and nobody waits for a batch to fill.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from hashlib import sha1
from typing import Any

from redis import exceptions

_AT_ONCE = 64
"""Most replies read without letting the event loop do something else."""


class Script:
    """A Lua script; as a command's name it is sent by its digest, and in full if need be."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.sha = sha1(text.encode(), usedforsecurity=False).hexdigest()


Command = tuple[Any, ...]
Commands = Sequence[Command]
"""What to carry out, answered with a list of replies, an error reply being an exception in it."""


def _by_digest(command: Command) -> Command:
    name = command[0]
    return ("EVALSHA", name.sha, *command[1:]) if isinstance(name, Script) else command


def _in_full(command: Command) -> Command:
    return ("EVAL", command[0].text, *command[1:])


def _unknown_scripts(commands: Commands, replies: list[Any]) -> list[int]:
    return [
        i
        for i, reply in enumerate(replies)
        if isinstance(reply, exceptions.NoScriptError) and isinstance(commands[i][0], Script)
    ]


class _Job:
    __slots__ = ("commands", "error", "leads", "replies", "woken")

    def __init__(self, commands: Commands) -> None:
        self.commands = commands
        self.replies: list[Any] | None = None
        self.error: BaseException | None = None
        self.woken: threading.Event | None = None
        self.leads = False

    @property
    def done(self) -> bool:
        return self.replies is not None or self.error is not None


class Line:
    """A connection that threads share.

    Attributes:
        trips: how many batches it sent.
        connected: when its connection was made (``time.monotonic``).
    """

    def __init__(self, connect: Callable[[], Any], patience: float) -> None:
        self._connect = connect
        self._patience = patience
        self._lock = threading.Lock()
        self._queue: list[_Job] = []
        self._busy = False
        self._connection: Any = None
        self.trips = 0
        self.connected = -math.inf

    def execute(self, commands: Commands) -> list[Any]:
        """One reply for each command.

        Raises:
            TimeoutError: nothing came in time.
            redis.RedisError: the connection failed, also when made anew.
        """
        job = _Job(commands)
        with self._lock:
            if self._busy:
                job.woken = threading.Event()
                self._queue.append(job)
            self._busy = True
        if job.woken is not None:
            self._follow(job, job.woken)
        if not job.done:
            self._lead(job)
        if job.error is not None:
            raise job.error
        assert job.replies is not None
        return job.replies

    def _follow(self, job: _Job, woken: threading.Event) -> None:
        """Wait until the job is done or it is its turn to lead."""
        try:
            if not woken.wait(self._patience):
                with self._lock:
                    if job in self._queue:
                        raise TimeoutError(f"no answer from Redis within {self._patience} seconds")
                woken.wait()  # somebody is seeing to it, and has a deadline
        except BaseException:
            with self._lock:
                if job in self._queue:
                    self._queue.remove(job)
                next_one = self._next() if job.leads else None
            if next_one is not None:
                next_one.set()
            raise

    def _next(self) -> threading.Event | None:
        """Under the lock: name the next leader, whose event is then to be set."""
        if not self._queue:
            self._busy = False
            return None
        following = self._queue.pop(0)
        following.leads = True
        return following.woken

    def _lead(self, job: _Job) -> None:
        with self._lock:
            batch, self._queue = [job, *self._queue], []
        error: BaseException = ConnectionError("interrupted")
        try:
            self._carry(batch)
        except Exception as exc:
            error = exc
        finally:
            with self._lock:
                if not job.done:
                    # those who came meanwhile share its fate: they asked the same server
                    batch, self._queue = batch + self._queue, []
                next_one = self._next()
            for other in batch:
                if not other.done:
                    other.error = error
                if other.woken is not None:
                    other.woken.set()
            if next_one is not None:
                next_one.set()

    def _carry(self, batch: list[_Job]) -> None:
        commands = [command for job in batch for command in job.commands]
        replies = self._ask([_by_digest(command) for command in commands])
        unknown = _unknown_scripts(commands, replies)
        if unknown:
            again = self._ask([_in_full(commands[i]) for i in unknown])
            for i, reply in zip(unknown, again, strict=True):
                replies[i] = reply
        start = 0
        for job in batch:
            end = start + len(job.commands)
            job.replies, start = replies[start:end], end

    def _ask(self, commands: Commands) -> list[Any]:
        if self._connection is not None:
            # it may have been closed by the other side long ago: that alone is no failure
            with suppress(exceptions.ConnectionError):
                return self._send(self._connection, commands)
        connection = self._connect()
        try:
            connection.connect()
            self._connection, self.connected = connection, time.monotonic()
            return self._send(connection, commands)
        except exceptions.TimeoutError as exc:
            raise TimeoutError(str(exc)) from exc

    def _send(self, connection: Any, commands: Commands) -> list[Any]:
        self.trips += 1
        replies: list[Any] = []
        try:
            connection.send_packed_command(connection.pack_commands(commands), check_health=False)
            for _ in commands:
                try:
                    replies.append(connection.read_response(disable_decoding=True))
                except exceptions.ResponseError as exc:
                    replies.append(exc)
            if any(isinstance(reply, exceptions.ReadOnlyError) for reply in replies):
                self.close()  # a master that became a replica: who is the master now?
        except BaseException as exc:
            self.close()
            if isinstance(exc, exceptions.TimeoutError):
                raise TimeoutError(str(exc)) from exc
            raise
        return replies

    def close(self) -> None:
        """Close the connection; the next command makes another one."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.disconnect()


class ClusterLine:
    """The same over a cluster's client, which finds each key's node: one pipeline at a time per
    caller, since the client has its own connections."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self.trips = 0
        self.connected = -math.inf

    def execute(self, commands: Commands) -> list[Any]:
        """One reply for each command; see ``Line.execute``."""
        try:
            return self._ask(commands)
        except exceptions.TimeoutError as exc:
            raise TimeoutError(str(exc)) from exc

    def _ask(self, commands: Commands) -> list[Any]:
        self.trips += 1
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
                return self._client.execute_command(*_by_digest(command))
            except exceptions.NoScriptError:
                return self._client.execute_command(*_in_full(command))
        except exceptions.ResponseError as exc:
            return exc

    def close(self) -> None:
        """The client is its maker's to close."""


class AsyncLine:
    """A connection that the tasks of one event loop share; it ends with its loop."""

    def __init__(self, connect: Callable[[], Any]) -> None:
        self._connect = connect
        self._queue: list[tuple[Commands, asyncio.Future[list[Any]]]] = []
        self._task: asyncio.Task[None] | None = None
        self._connection: Any = None
        self._life: AsyncGenerator[None, None] | None = None
        self.trips = 0
        self.connected = -math.inf

    async def execute(self, commands: Commands) -> list[Any]:
        """One reply for each command; see ``Line.execute``."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[list[Any]] = loop.create_future()
        self._queue.append((commands, answer))
        if self._task is None or self._task.done():
            self._task = loop.create_task(self._drain())
        return await answer

    async def _drain(self) -> None:
        try:
            while self._queue:
                batch, self._queue = self._queue, []
                try:
                    await self._carry(batch)
                except Exception as exc:
                    # those who came meanwhile share its fate: they asked the same server
                    batch, self._queue = batch + self._queue, []
                    _fail(batch, exc)
                except BaseException:
                    _fail(batch + self._queue, ConnectionError("interrupted"))
                    self._queue = []
                    raise
        finally:
            self._task = None  # it knows its loop, and the loop is what this line is kept by

    async def _carry(self, batch: list[tuple[Commands, asyncio.Future[list[Any]]]]) -> None:
        commands = [command for some, _ in batch for command in some]
        replies = await self._ask([_by_digest(command) for command in commands])
        unknown = _unknown_scripts(commands, replies)
        if unknown:
            again = await self._ask([_in_full(commands[i]) for i in unknown])
            for i, reply in zip(unknown, again, strict=True):
                replies[i] = reply
        start = 0
        for some, answer in batch:
            end = start + len(some)
            if not answer.done():
                answer.set_result(replies[start:end])
            start = end

    async def _ask(self, commands: Commands) -> list[Any]:
        if self._connection is not None:
            with suppress(exceptions.ConnectionError):
                return await self._send(self._connection, commands)
        connection = self._connect()
        try:
            await connection.connect()
            self._connection, self.connected = connection, time.monotonic()
            if self._life is None:
                self._life = self._until_the_loop_ends()
                await self._life.__anext__()
            return await self._send(connection, commands)
        except exceptions.TimeoutError as exc:
            raise TimeoutError(str(exc)) from exc

    async def _send(self, connection: Any, commands: Commands) -> list[Any]:
        self.trips += 1
        replies: list[Any] = []
        try:
            await connection.send_packed_command(
                b"".join(connection.pack_commands(commands)), check_health=False
            )
            for i in range(1, len(commands) + 1):
                try:
                    replies.append(await connection.read_response(disable_decoding=True))
                except exceptions.ResponseError as exc:
                    replies.append(exc)
                if i % _AT_ONCE == 0 or (isinstance(replies[-1], list) and i < len(commands)):
                    await asyncio.sleep(0)
            if any(isinstance(reply, exceptions.ReadOnlyError) for reply in replies):
                await self._disconnect()
        except BaseException as exc:
            self._connection = None
            await connection.disconnect(nowait=True)
            if isinstance(exc, exceptions.TimeoutError):
                raise TimeoutError(str(exc)) from exc
            raise
        return replies

    async def _until_the_loop_ends(self) -> AsyncGenerator[None, None]:
        # `asyncio.run` closes what generators are left, which is the only notice a loop gives
        try:
            yield
        finally:
            self._life = None
            await self._disconnect()

    async def aclose(self) -> None:
        """Close the connection; the next command makes another one."""
        if self._life is not None:
            await self._life.aclose()

    async def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.disconnect(nowait=True)


def _fail(batch: list[tuple[Commands, asyncio.Future[list[Any]]]], error: Exception) -> None:
    for _, answer in batch:
        if not answer.done():
            answer.set_exception(error)
