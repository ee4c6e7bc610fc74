"""A bounded number of private threads for jobs of one kind."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from langgraph_perf.resources import _offload

T = TypeVar("T")


class Turns:
    """Runs jobs in the order in which they came, at most ``limit`` at once.

    Only for jobs that never wait for one another.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._jobs: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._threads = 0

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """Run ``job`` on a private thread when its turn comes; until then it can be cancelled.

        Raises:
            RuntimeError: no thread can be started (the interpreter is shutting down).
        """
        future: Future[T] = Future()
        with self._lock:
            self._jobs.append((future, job))
            if self._threads == self._limit:
                return future
            self._threads += 1
        try:
            _offload.shared.submit(self._run)
        except BaseException:
            with self._lock:
                self._threads -= 1
            future.cancel()
            raise
        return future

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._jobs:
                    self._threads -= 1
                    return
                future, job = self._jobs.popleft()
            _offload.carry_out(future, job)
            del future, job  # nothing of a job is kept while the next one runs
