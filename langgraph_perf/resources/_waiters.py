"""Who waits for a lease: a thread or a task.

A waiter is told its outcome (an entry or an error) under the core's lock and woken afterwards;
being woken only means "look again". ``alive`` and ``wake`` can refuse: then the core offers the
entry to the next one, so that nothing is handed to somebody who has left.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Hashable

from langgraph_perf.resources._entry import Entry


class Waiter(ABC):
    """One request for a lease on its slow path.

    Attributes:
        key: what is asked for.
        loop: the event loop an object must belong to; ``None`` if any object will do.
        since: when it began to wait.
        timeout: after how many seconds it gives up, at ``deadline``.
        entry: what it was handed: a ready object, or a place it is to fill itself.
        error: why it gets nothing.
        checked: the object it was handed has passed its check.
        suspect: the check is under way, so the object is in an unknown state.
        gone: it has left; nothing may be handed to it.
        looked: when it last looked for what closed event loops took with them, in real time.
    """

    def __init__(
        self,
        key: Hashable,
        loop: asyncio.AbstractEventLoop | None,
        since: float,
        timeout: float,
    ) -> None:
        self.key = key
        self.loop = loop
        self.since = since
        self.timeout = timeout
        self.deadline = since + timeout
        self.entry: Entry | None = None
        self.error: BaseException | None = None
        self.checked = False
        self.suspect = False
        self.gone = False
        self.looked = time.monotonic()

    def alive(self) -> bool:
        """Whether it can still take what it waits for."""
        return not self.gone

    @abstractmethod
    def wake(self) -> bool:
        """Make it look again; ``False`` when it cannot be reached any more."""


class ThreadWaiter(Waiter):
    """A thread that waits. A bare lock is the cheapest thing a thread can sleep on."""

    def __init__(self, key: Hashable, since: float, timeout: float) -> None:
        super().__init__(key, None, since, timeout)
        self._sleep = threading.Lock()
        self._sleep.acquire()

    def wait(self, seconds: float) -> None:
        """Sleep until woken, at most ``seconds``."""
        self._sleep.acquire(timeout=seconds)

    def wake(self) -> bool:
        with contextlib.suppress(RuntimeError):  # it is awake already
            self._sleep.release()
        return True


class TaskWaiter(Waiter):
    """A task that waits, on the event loop it runs on."""

    def __init__(
        self,
        key: Hashable,
        loop: asyncio.AbstractEventLoop | None,
        since: float,
        timeout: float,
    ) -> None:
        super().__init__(key, loop, since, timeout)
        self._home = asyncio.get_running_loop()
        self._future: asyncio.Future[None] | None = None

    async def wait(self, seconds: float) -> None:
        """Suspend the task until woken, at most ``seconds``."""
        self._future = self._home.create_future()
        handle = self._home.call_later(seconds, self._poke)
        try:
            # no check before this line is needed: whoever sets the outcome from another thread
            # pokes through the loop, which runs the poke only after this task has suspended
            if self.entry is None and self.error is None:
                await self._future
        finally:
            handle.cancel()
            self._future = None

    def alive(self) -> bool:
        return not (self.gone or self._home.is_closed())

    def wake(self) -> bool:
        if asyncio._get_running_loop() is self._home:
            self._poke()  # saves the write to the loop's self-pipe
            return True
        try:
            self._home.call_soon_threadsafe(self._poke)
        except RuntimeError:  # closed since alive() was asked
            return False
        return True

    def _poke(self) -> None:
        if self._future is not None and not self._future.done():
            self._future.set_result(None)
