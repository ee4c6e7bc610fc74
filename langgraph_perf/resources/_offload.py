"""Private threads for the users' blocking functions, so that no event loop runs them.

Not asyncio's default executor: the users' own blocking nodes run there, and when those wait for
resources, the factory that would serve them could not start. Not a ``ThreadPoolExecutor`` either:
its threads stay for good, and the interpreter waits for them at exit.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


class Workers:
    """Daemon threads, as many as there are jobs at once; each ends after ``linger`` idle seconds.

    There is no upper bound: a factory may lease another resource, and with a bound it could wait
    for a thread held by itself. What bounds the number are the sizes of the resources.
    """

    def __init__(self, linger: float = 1.0) -> None:
        self._linger = linger
        self.after_fork()

    def after_fork(self) -> None:
        """Start from nothing: a forked child has none of its parent's threads."""
        self._jobs: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        # one permit for each thread that waits for a job that nobody has promised it yet
        self._idle: deque[None] = deque()

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """Run ``job`` on a thread of its own.

        Raises:
            RuntimeError: no thread can be started (the interpreter is shutting down).
        """
        future: Future[T] = Future()
        try:
            self._idle.pop()
        except IndexError:
            threading.Thread(target=self._run, name="langgraph-perf-worker", daemon=True).start()
        self._jobs.put((future, job))
        return future

    def _run(self) -> None:
        jobs, idle = self._jobs, self._idle
        while True:
            try:
                future, job = jobs.get(timeout=self._linger)
            except Empty:
                try:
                    idle.pop()
                except IndexError:  # somebody took this thread's permit: a job is on its way
                    continue
                return
            carry_out(future, job)
            del future, job  # an idle thread must not keep the last job's objects alive
            idle.append(None)


def carry_out(future: Future[T], job: Callable[[], T]) -> None:
    """Run ``job`` here and let ``future`` say what came of it, unless that was cancelled before."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = job()
    except StopIteration as exc:
        # asyncio's futures refuse it, and whoever waits would wait for ever
        error = RuntimeError("a function raised StopIteration")
        error.__cause__ = exc
        future.set_exception(error)
        del error
    except BaseException as exc:
        future.set_exception(exc)
    else:
        future.set_result(result)


shared = Workers()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=shared.after_fork)
