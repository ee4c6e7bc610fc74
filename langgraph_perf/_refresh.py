"""Runs in the background that make stale results fresh again."""

from __future__ import annotations

import asyncio
import contextvars
import os
import threading
from collections.abc import Callable, Coroutine, Hashable
from typing import Any

MOST_THREADS = 8
MOST_TASKS = 64
"""What is beyond is left to a later call."""


class Refreshes:
    """The runs in the background that one graph's calls have started: one for each key.

    Nodes that run on the event loop are refreshed in tasks of it, because what they use may belong
    to it; all others in daemon threads, so that a program can end. None outlives ``close``.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[Hashable, threading.Thread | asyncio.Task[None] | None] = {}
        self._closed = False
        self._pid = os.getpid()

    def start(self, key: Hashable, run: Callable[[], None]) -> None:
        """Run in a thread, unless ``key`` is being refreshed; ``run`` raises nothing."""
        context = contextvars.copy_context()

        def work() -> None:
            try:
                context.run(run)
            finally:
                self._done(key)

        thread = threading.Thread(target=work, name="langgraph-perf-refresh", daemon=True)
        if not self._admits(key, thread):
            return
        try:
            thread.start()
        except RuntimeError:  # no more threads, or the interpreter is shutting down
            self._done(key)

    def start_task(self, key: Hashable, run: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run in a task of the running loop, unless ``key`` is being refreshed."""
        if not self._admits(key, None):
            return

        async def work() -> None:
            await asyncio.sleep(0)  # not one step of it in the caller's turn (eager tasks)
            await run()

        # outside the lock: whoever makes the tasks of this loop may run any code
        task = asyncio.get_running_loop().create_task(work())
        task.add_done_callback(lambda _: self._done(key))
        with self._lock:
            if key in self._running:
                self._running[key] = task
            if self._closed:
                task.cancel()

    def _admits(self, key: Hashable, run: threading.Thread | None) -> bool:
        """Whether ``key`` may be refreshed now; then it is noted that it is."""
        if self._pid != os.getpid():  # the threads and loops stayed with the parent
            self._lock, self._running, self._pid = threading.Lock(), {}, os.getpid()
        with self._lock:
            for known, running in list(self._running.items()):
                # a loop that has stopped may never go on
                if isinstance(running, asyncio.Task) and not running.get_loop().is_running():
                    del self._running[known]
            threads = sum(isinstance(r, threading.Thread) for r in self._running.values())
            full = (
                threads >= MOST_THREADS
                if run is not None
                else len(self._running) - threads >= MOST_TASKS
            )
            if self._closed or full or key in self._running:
                return False
            self._running[key] = run
            return True

    def _done(self, key: Hashable) -> None:
        with self._lock:
            self._running.pop(key, None)

    def close(self) -> None:
        """Cancel what runs in tasks, and wait for what runs in threads."""
        for run in self._close():
            if isinstance(run, threading.Thread) and run is not threading.current_thread():
                run.join()

    async def aclose(self) -> None:
        """Like ``close``, without blocking the event loop; waits for its own tasks too."""
        running = self._close()
        loop = asyncio.get_running_loop()
        tasks = [
            run
            for run in running
            if isinstance(run, asyncio.Task)
            and run.get_loop() is loop
            and run is not asyncio.current_task()
        ]
        if tasks:
            await asyncio.wait(tasks)
        await asyncio.to_thread(self.close)

    def _close(self) -> list[threading.Thread | asyncio.Task[None] | None]:
        if self._pid != os.getpid():
            return []
        with self._lock:
            self._closed = True
            running = list(self._running.values())
        for run in running:
            if isinstance(run, asyncio.Task):
                try:
                    run.get_loop().call_soon_threadsafe(run.cancel)
                except RuntimeError:  # its loop is closed: it does not run any more
                    continue
        return running
