"""One connection for many tasks: the awaitable counterpart of ``_redis_lines``."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from typing import Any

from redis import exceptions

from langgraph_perf.caches._redis_commands import (
    Commands,
    Trips,
    by_digest,
    in_full,
    unknown_scripts,
)

_AT_ONCE = 64
"""Most replies read without letting the event loop do something else."""
_Asked = tuple[Commands, "asyncio.Future[list[Any]]", float]


class AsyncLine:
    """A connection that the tasks of one event loop share; it ends with its loop."""

    def __init__(
        self, connect: Callable[[], Any], timeout: float = 1.0, trips: Trips | None = None
    ) -> None:
        self._connect = connect
        self.timeout = timeout
        self._trips = trips or Trips()
        self._queue: list[_Asked] = []
        self._task: asyncio.Task[None] | None = None
        self._connection: Any = None
        self._life: AsyncGenerator[None, None] | None = None
        self._closed = False
        self.connected = -math.inf

    async def execute(self, commands: Commands, ends: float | None = None) -> list[Any]:
        """One reply for each command; see ``Line.execute``."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[list[Any]] = loop.create_future()
        ends = time.monotonic() + self.timeout if ends is None else ends
        self._queue.append((commands, answer, ends))
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

    async def _carry(self, batch: list[_Asked]) -> None:
        # who was cancelled before it was his turn asks nothing
        batch = [asked for asked in batch if not asked[1].done()]
        if not batch:
            return
        ends = max([ends for _, _, ends in batch])
        commands = [command for some, _, _ in batch for command in some]
        replies = await self._ask([by_digest(command) for command in commands], ends)
        unknown = unknown_scripts(commands, replies)
        if unknown:
            again = await self._ask([in_full(commands[i]) for i in unknown], ends)
            for i, reply in zip(unknown, again, strict=True):
                replies[i] = reply
        start = 0
        for some, answer, _ in batch:
            end = start + len(some)
            if not answer.done():
                answer.set_result(replies[start:end])
            start = end

    async def _ask(self, commands: Commands, ends: float) -> list[Any]:
        if self._connection is not None:
            with suppress(exceptions.ConnectionError):
                return await self._send(self._connection, commands, ends)
        if self._closed:
            raise ConnectionError("the cache is closed")
        connection, started = self._connect(), time.monotonic()
        try:
            await connection.connect()
        except exceptions.TimeoutError as exc:
            raise TimeoutError(str(exc)) from exc
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        self._connection, self.connected = connection, time.monotonic()
        if self._closed_meanwhile():
            await self._disconnect()
            raise ConnectionError("the cache is closed")
        if self._life is None:
            self._life = self._until_the_loop_ends()
            await self._life.__anext__()
        return await self._send(connection, commands, ends + self.connected - started)

    async def _send(self, connection: Any, commands: Commands, ends: float) -> list[Any]:
        self._trips.add()
        replies: list[Any] = []
        late = False

        def abort() -> None:
            nonlocal late
            late = True
            if connection._writer is not None:
                connection._writer.transport.abort()

        left = max(0.0, ends - time.monotonic())
        timer = asyncio.get_running_loop().call_later(left, abort)
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
            if self._closed and isinstance(exc, Exception):
                raise ConnectionError("the cache is closed") from exc
            if isinstance(exc, exceptions.TimeoutError) or (late and isinstance(exc, Exception)):
                raise TimeoutError(str(exc) or "no answer from Redis in time") from exc
            raise
        finally:
            timer.cancel()
        return replies

    def _closed_meanwhile(self) -> bool:
        return self._closed

    async def _until_the_loop_ends(self) -> AsyncGenerator[None, None]:
        # `asyncio.run` closes what generators are left, which is the only notice a loop gives
        try:
            yield
        finally:
            self._life = None
            await self._disconnect()

    async def aclose(self) -> None:
        """Close the connection for good; what is under way fails."""
        self._closed = True
        if self._life is not None:
            await self._life.aclose()

    def abandon(self) -> None:
        """In a forked child: the connection is the parent's, and so is what its loop waits with,
        so it must not even be closed."""
        self._closed = True
        connection, self._connection = self._connection, None
        writer = getattr(connection, "_writer", None)
        if writer is None:
            return
        connection._writer = connection._reader = None
        transport = writer.transport
        # closing would tell the parent's selector to watch the socket no more
        inner: Any = getattr(getattr(transport, "_ssl_protocol", None), "_transport", None)
        layers: list[Any] = [transport, inner]
        for layer in layers:
            sock = getattr(layer, "_sock", None)
            for name in ("_closing", "_closed"):
                if hasattr(layer, name):
                    setattr(layer, name, True)
            if sock is not None:
                layer._sock = None
                with suppress(OSError):
                    os.close(sock.detach())

    async def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.disconnect(nowait=True)


def _fail(batch: list[_Asked], error: Exception) -> None:
    for _, answer, _ in batch:
        if not answer.done():
            answer.set_exception(error)
