"""Runs in the background that make stale results fresh again."""

from __future__ import annotations

import asyncio
import contextvars
import os
import threading
from collections.abc import Callable, Coroutine, Hashable, MutableMapping
from typing import Any

from langgraph_perf._locks import new_lock

MOST_THREADS = 8
MOST_TASKS = 64
"""What is beyond is left to a later call."""


_lock = new_lock()
"""One for all: graphs that share a cache see what the others have running."""


class _InThread:
    """A run in a thread.

    Attributes:
        thread: what runs it, as soon as that is known there.
        over: set when it has ended, or will never begin. A thread can only be joined once it has
            begun, and it may be closed before.
    """

    def __init__(self) -> None:
        self.thread: int | None = None
        self.over = threading.Event()


Running = _InThread | asyncio.Task[None] | None
"""``None``: a task that is being made."""


class Refreshes:
    """The runs in the background that one graph's calls have started: one for each key of a cache,
    also if several graphs use it.

    Nodes that run on the event loop are refreshed in tasks of it, because what they use may belong
    to it; all others in daemon threads, so that a program can end. None outlives ``close``.
    """

    def __init__(self) -> None:
        self._running: dict[Hashable, Running] = {}
        self._closed = False
        self._pid = os.getpid()

    def start(self, key: Hashable, run: Callable[[], None], among: Among) -> None:
        """Run in a thread, unless ``key`` is being refreshed.

        Args:
            run: it raises nothing.
            among: who refreshes which key of the same cache.
        """
        context = contextvars.copy_context()
        running = _InThread()

        def ended() -> None:
            self._done(key, among)
            running.over.set()

        def work() -> None:
            running.thread = threading.get_ident()
            try:
                if not self._closed:
                    context.run(run)
            finally:
                ended()

        thread = threading.Thread(target=work, name="langgraph-perf-refresh", daemon=True)
        if not self._admits(key, running, among):
            return
        try:
            thread.start()
        except RuntimeError:  # no more threads, or the interpreter is shutting down
            ended()

    def start_task(
        self, key: Hashable, run: Callable[[], Coroutine[Any, Any, None]], among: Among
    ) -> None:
        """Like ``start``, in a task of the running loop."""
        if not self._admits(key, None, among):
            return

        async def work() -> None:
            await asyncio.sleep(0)  # not one step of it in the caller's turn (eager tasks)
            await run()

        # outside the lock: whoever makes the tasks of this loop may run any code
        task = asyncio.get_running_loop().create_task(work())
        task.add_done_callback(lambda _: self._done(key, among))
        with _lock:
            if key in self._running:
                self._running[key] = task
            if self._closed:
                task.cancel()

    def _admits(self, key: Hashable, run: _InThread | None, among: Among) -> bool:
        """Whether ``key`` may be refreshed now; then it is noted that it is."""
        with _lock:
            if self._pid != os.getpid():  # the threads and loops stayed with the parent
                self._running, self._pid = {}, os.getpid()
            other = among.get(key, self)
            for known, running in list(self._running.items()):
                if not _goes_on(running):
                    del self._running[known]
            threads = sum(isinstance(r, _InThread) for r in self._running.values())
            full = (
                threads >= MOST_THREADS
                if run is not None
                else len(self._running) - threads >= MOST_TASKS
            )
            if self._closed or full or other._refreshes(key):
                return False
            self._running[key] = run
            among[key] = self
            return True

    def _refreshes(self, key: Hashable) -> bool:
        mine = self._pid == os.getpid() and key in self._running
        return mine and _goes_on(self._running[key])

    def _done(self, key: Hashable, among: Among) -> None:
        with _lock:
            self._running.pop(key, None)
            if among.get(key) is self:
                del among[key]

    def close(self) -> None:
        """Cancel what runs in tasks, and wait for what runs in threads."""
        for run in self.stop():
            if isinstance(run, _InThread) and run.thread != threading.get_ident():
                run.over.wait()

    async def aclose(self) -> None:
        """Like ``close``, without blocking the event loop; waits for its own tasks too."""
        running = self.stop()
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
        if any(isinstance(run, _InThread) for run in running):
            await asyncio.to_thread(self.close)

    def stop(self) -> list[Running]:
        """Begin nothing more and cancel what runs in tasks; what is left to be waited for."""
        if self._pid != os.getpid():
            return []
        with _lock:
            self._closed = True
            running = list(self._running.values())
        for run in running:
            if isinstance(run, asyncio.Task):
                try:
                    run.get_loop().call_soon_threadsafe(run.cancel)
                except RuntimeError:  # its loop is closed: it does not run any more
                    continue
        return running


Among = MutableMapping[Hashable, Refreshes]
"""Who refreshes which key of a cache."""


def _goes_on(run: Running) -> bool:
    # a loop that has stopped may never go on
    return not isinstance(run, asyncio.Task) or run.get_loop().is_running()
