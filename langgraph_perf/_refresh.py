"""Runs in the background that make stale results fresh again."""

from __future__ import annotations

import asyncio
import contextvars
import os
import threading
from collections.abc import Callable, Coroutine, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

WORKERS = 4
WAITING = 64
"""So many wait for a worker; what is beyond is left to a later call."""


class Refreshes:
    """The runs in the background that one graph's calls have started: one for each key.

    Those of blocking calls run in threads of their own, those of tasks as tasks of the same event
    loop, because what a node uses may belong to the loop. None outlives ``close``.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[Hashable, Future[None] | asyncio.Task[None]] = {}
        self._executor: ThreadPoolExecutor | None = None
        self._closed = False
        self._pid = os.getpid()

    def start(self, key: Hashable, run: Callable[[], None]) -> None:
        """Run in a thread, unless ``key`` is being refreshed; ``run`` raises nothing."""
        with self._lock:
            if not self._admits(key):
                return
            if self._executor is None:
                self._executor = ThreadPoolExecutor(
                    WORKERS, thread_name_prefix="langgraph-perf-refresh"
                )
            context = contextvars.copy_context()
            try:
                future = self._executor.submit(context.run, run)
            except RuntimeError:  # the interpreter is shutting down
                return
            self._running[key] = future
        future.add_done_callback(lambda _: self._done(key))

    def start_task(self, key: Hashable, run: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run in a task of the running loop, unless ``key`` is being refreshed."""
        with self._lock:
            if not self._admits(key):
                return
            task = asyncio.get_running_loop().create_task(run())
            self._running[key] = task
        task.add_done_callback(lambda _: self._done(key))

    def _admits(self, key: Hashable) -> bool:
        if self._pid != os.getpid():  # the threads and loops stayed with the parent
            self._pid, self._running, self._executor = os.getpid(), {}, None
        running = self._running.get(key)
        if isinstance(running, asyncio.Task) and running.get_loop().is_closed():
            del self._running[key]
        return not (self._closed or key in self._running or len(self._running) >= WAITING)

    def _done(self, key: Hashable) -> None:
        with self._lock:
            self._running.pop(key, None)

    def close(self) -> None:
        """Cancel what has not begun and what runs in tasks, and wait for what runs in threads."""
        executor = self._close()
        if executor is not None:
            executor.shutdown(wait=True, cancel_futures=True)

    async def aclose(self) -> None:
        """Like ``close``, without blocking the event loop; waits for its own tasks too."""
        with self._lock:
            tasks = [
                task
                for task in self._running.values()
                if isinstance(task, asyncio.Task)
                and task.get_loop() is asyncio.get_running_loop()
                and task is not asyncio.current_task()
            ]
        executor = self._close()
        if tasks:
            await asyncio.wait(tasks)
        if executor is not None:
            await asyncio.to_thread(executor.shutdown, wait=True, cancel_futures=True)

    def _close(self) -> ThreadPoolExecutor | None:
        with self._lock:
            self._closed = True
            running = list(self._running.values())
            executor, self._executor = self._executor, None
        for run in running:
            if isinstance(run, asyncio.Task) and not run.get_loop().is_closed():
                run.get_loop().call_soon_threadsafe(run.cancel)
        inherited = self._pid != os.getpid()
        if threading.current_thread().name.startswith("langgraph-perf-refresh"):
            return None  # it would wait for itself
        return None if inherited else executor
