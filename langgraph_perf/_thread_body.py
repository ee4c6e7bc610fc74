"""The body of a sync node in an async run.

It runs on a thread, which nobody can stop: when its task is cancelled, the task leaves at once and
the thread goes on. What the node has leased must stay leased until the thread has ended.
"""

from __future__ import annotations

import asyncio
import contextvars
import copy
import functools
import threading
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, suppress
from types import TracebackType
from typing import Any

from langchain_core.runnables import Runnable

# a private name of LangGraph, with a test in tests/test_langgraph_internals.py
from langgraph._internal._runnable import RunnableCallable

from langgraph_perf.resources import _offload


class _ThreadBody:
    """Calls a function on a thread: of the loop's default executor, as LangGraph does, or, for one
    that holds what others wait for, on a private one. They may wait in the executor's threads.

    Attributes:
        left: what the thread works at, if it goes on although its task has left.
    """

    def __init__(self, function: Callable[..., Any], private: bool) -> None:
        self._function = function
        self._private = private
        self._lock = threading.Lock()
        self._skip = self._begun = self._ended = False
        self.left: asyncio.Future[Any] | None = None

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Wait for what the function returns. When cancelled, a function that runs goes on; one
        whose turn has not come is not called any more."""
        call = functools.partial(contextvars.copy_context().run, self._run, args, kwargs)
        job: asyncio.Future[Any]
        if self._private:
            job = asyncio.wrap_future(_offload.shared.submit(call))
        else:
            job = asyncio.get_running_loop().run_in_executor(None, call)
        try:
            return await asyncio.shield(job)
        except BaseException:
            with self._lock:
                self._skip = not self._begun
            if self._skip:
                job.cancel()
            elif not self._ended:
                self.left = job
            raise
        finally:
            del job  # with its error it would make a cycle, and a run is to be freed at once

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self._lock:
            if self._skip:
                return None
            self._begun = True
        try:
            return self._function(*args, **kwargs)
        except StopIteration as exc:
            raise RuntimeError from exc  # futures refuse it: whoever waits would wait for ever
        finally:
            self._ended = True


class _Held:
    """Leases that come back once the body has ended, also if its task has left before."""

    def __init__(self, leases: AbstractAsyncContextManager[Any], body: _ThreadBody) -> None:
        self._leases = leases
        self._body = body

    async def __aenter__(self) -> Any:
        return await self._leases.__aenter__()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> bool | None:
        job = self._body.left
        if job is None or asyncio._get_running_loop() is not job.get_loop():
            return await self._leases.__aexit__(exc_type, exc, tb)
        # the thread holds its job, which holds this task
        job.get_loop().create_task(_give_back(self._leases, job, exc_type, exc))
        return False


async def _give_back(
    leases: AbstractAsyncContextManager[Any],
    job: asyncio.Future[Any],
    exc_type: type[BaseException] | None,
    exc: BaseException | None,
) -> None:
    try:
        while not job.done():
            with suppress(asyncio.CancelledError):  # the end of the event loop waits as well
                await asyncio.wait([job])
    except GeneratorExit as destroyed:  # its loop was closed: nothing can be awaited any more
        exc_type, exc = GeneratorExit, destroyed
    await leases.__aexit__(exc_type, exc, None)


def on_thread(
    step: Runnable[Any, Any],
    leases: AbstractAsyncContextManager[dict[str, Any]],
    private: bool,
) -> tuple[Runnable[Any, Any], AbstractAsyncContextManager[dict[str, Any]]]:
    """A sync node for one async call, and its leases, which last as long as its thread.

    Args:
        private: whether others wait for what it leases.
    """
    if not isinstance(step, RunnableCallable) or step.func is None:
        return step, leases
    body = _ThreadBody(step.func, private)
    own = copy.copy(step)
    own.afunc = body
    return own, _Held(leases, body)
