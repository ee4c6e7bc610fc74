"""One daemon thread for the whole process that closes what has been idle for too long.

The heap of deadlines belongs to the thread alone; everybody else only puts messages into a
``SimpleQueue``, whose ``put`` is safe even inside a garbage collection. The thread ends as soon as
it has nothing to wait for and is started again by the next deadline. Targets are held weakly.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Protocol

from langgraph_perf.resources._work import in_background

logger = logging.getLogger("langgraph_perf")


class Target(Protocol):
    """What wants to be called at a deadline."""

    def reap(self) -> None:
        """Do what is due now; asks for its next deadline itself."""


_Message = tuple[float, "weakref.ref[Target]"] | threading.Event | None
_Inbox = SimpleQueue[_Message]


def _wait(inbox: _Inbox, timeout: float) -> _Message:
    return inbox.get(timeout=min(timeout, threading.TIMEOUT_MAX))


class Reaper:
    """Calls ``target.reap()`` at the deadlines it was armed with.

    Its thread runs none of the users' functions, which could keep it for ever.

    Args:
        clock: gives seconds; tests pass a fake one.
        wait: takes the next message or raises ``queue.Empty`` when the timeout is over.
        run: has a job done, a user's ``close``, on another thread.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[_Inbox, float], _Message] = _wait,
        run: Callable[[Callable[[], None]], object] = in_background,
    ) -> None:
        self.clock = clock
        self.run = run
        self._wait = wait
        self._order = itertools.count()
        self.after_fork()

    def after_fork(self) -> None:
        """Start from nothing: a forked child has none of its parent's threads."""
        self._lock = threading.RLock()
        self._inbox: _Inbox = SimpleQueue()
        self._heap: list[tuple[float, int, weakref.ref[Target]]] = []
        self._thread: threading.Thread | None = None

    def arm(self, target: Target, deadline: float) -> bool:
        """Have ``target.reap()`` called at ``deadline``; ``False`` when no thread can be had."""
        inbox = self._inbox
        # when a target dies, a message makes the thread look: it may have nothing left to wait for
        inbox.put((deadline, weakref.ref(target, lambda _: inbox.put(None))))
        with self._lock:
            return self._thread is not None or self._start()

    def settle(self) -> None:
        """Wait until everything that is due now has been done (for tests)."""
        done = threading.Event()
        with self._lock:
            if self._thread is None:
                return
            self._inbox.put(done)
        done.wait()

    @property
    def running(self) -> bool:
        """Whether there is a thread at present."""
        return self._thread is not None

    def _start(self) -> bool:
        thread = threading.Thread(target=self._run, name="langgraph-perf-reaper", daemon=True)
        self._thread = thread
        try:
            thread.start()
        except RuntimeError:  # the interpreter is shutting down: nothing will be idle for long
            self._thread = None
            return False
        return True

    def _run(self) -> None:
        while True:
            self._call_due()
            timeout = max(0.0, self._heap[0][0] - self.clock()) if self._heap else 0.0
            try:
                message = (
                    self._wait(self._inbox, timeout) if self._heap else self._inbox.get_nowait()
                )
            except Empty:
                with self._lock:
                    if not self._heap and self._inbox.empty():
                        self._thread = None
                        return
                continue
            if isinstance(message, tuple):
                heapq.heappush(self._heap, (message[0], next(self._order), message[1]))
            elif message is not None:
                self._call_due()
                message.set()

    def _call_due(self) -> None:
        self._heap = [item for item in self._heap if item[2]() is not None]
        heapq.heapify(self._heap)
        while self._heap and self._heap[0][0] <= self.clock():
            target = heapq.heappop(self._heap)[2]()
            if target is None:
                continue
            try:
                target.reap()
            except BaseException:  # whatever it is, others count on this thread
                logger.exception("closing idle resources failed")
            del target


shared = Reaper()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=shared.after_fork)
