"""The two drivers that carry out the steps of ``_call``: one blocks, one awaits."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from langgraph_perf import _heartbeat
from langgraph_perf._backend import Backend
from langgraph_perf._call import steps
from langgraph_perf._flight import AsyncWaiter, SyncWaiter, held_flights
from langgraph_perf._gathering import gathering_in
from langgraph_perf._patience import waiting
from langgraph_perf._progress import NO_HEARTBEAT, beat_seconds, beating
from langgraph_perf._steps import (
    Acquire,
    Call,
    Done,
    Join,
    Pause,
    Raised,
    Ran,
    Read,
    Release,
    Revalidate,
    Run,
    Step,
    Steps,
    Tokens,
    Wait,
    Write,
)

BACKGROUND_LEASE = 300.0
"""Seconds for which a run in the background keeps other processes from running: it may hang, or its
event loop may have stopped."""


class Caller(NamedTuple):
    """Who makes a call.

    Attributes:
        heartbeat: reports progress to LangGraph's ``idle_timeout``.
        blocked_loop: the event loop, if any, that stands still until the call is done.
        uses_executor: whether the body takes a thread of the running loop's default executor.
    """

    heartbeat: Callable[[], None]
    blocked_loop: asyncio.AbstractEventLoop | None = None
    uses_executor: bool = False


NOBODY = Caller(NO_HEARTBEAT)


def drive(
    call: Call,
    body: Callable[[], Ran],
    caller: Caller,
    steps: Callable[[Call], Steps] = steps,
) -> Any:
    """Make the call in this thread; returns its value or raises what the body raised."""
    machine = steps(call)
    try:
        step = next(machine)
        while True:
            try:
                answer = perform(step, call, body, caller)
            except BaseException as exc:
                step = machine.throw(exc)
            else:
                step = machine.send(answer)
    except StopIteration as stop:
        done = stop.value
    return _value(done)


def perform(step: Step, call: Call, body: Callable[[], Ran], caller: Caller) -> Any:
    """The answer to one step."""
    backend = call.backend
    if type(step) in _QUESTIONS:
        with waiting(call.patience):
            return _ask(backend, step)
    if type(step) is Run:
        with running([step], call):
            try:
                return body()
            except BaseException as exc:
                return Raised(exc)
    if type(step) is Join:
        return backend.flights.join(
            step.key,
            SyncWaiter,
            blocked_loop=caller.blocked_loop,
            held=call.held,
            suspects=call.suspects,
        )
    if type(step) is Wait:
        assert isinstance(step.waiter, SyncWaiter)
        return step.waiter.wait(caller.heartbeat)
    if type(step) is Revalidate:
        return step.how(step.call, False)
    assert type(step) is Pause
    return _pause(backend, step, caller.heartbeat)


_QUESTIONS = frozenset((Read, Tokens, Write, Acquire, Release))
"""Steps that the cache answers."""


def _ask(backend: Backend, step: Step) -> Any:
    if type(step) is Read:
        return backend.read(step.lookup)
    if type(step) is Tokens:
        return backend.tokens(step.tags)
    if type(step) is Write:
        return backend.write(step.key, step.entry, step.lease)
    if type(step) is Acquire:
        return backend.acquire(step.key)
    assert type(step) is Release
    return backend.release(step.lease)


def _pause(backend: Backend, step: Pause, heartbeat: Callable[[], None]) -> None:
    ends = time.monotonic() + step.seconds
    while True:
        heartbeat()
        began = time.monotonic()
        seconds = min(beat_seconds(heartbeat), ends - began)
        backend.pause(step.key, seconds)
        now = time.monotonic()
        if now >= ends or now - began < seconds:
            return  # the lease is free before its time


async def adrive(
    call: Call,
    body: Callable[[], Awaitable[Ran]],
    caller: Caller,
    steps: Callable[[Call], Steps] = steps,
) -> Any:
    """Make the call in this task; returns its value or raises what the body raised."""
    machine = steps(call)
    try:
        step = next(machine)
        while True:
            try:
                answer = await aperform(step, call, body, caller)
            except BaseException as exc:
                step = machine.throw(exc)
            else:
                step = machine.send(answer)
    except StopIteration as stop:
        done = stop.value
    return _value(done)


async def aperform(
    step: Step, call: Call, body: Callable[[], Awaitable[Ran]], caller: Caller
) -> Any:
    """Like ``perform``, in this task."""
    backend = call.backend
    if type(step) in _QUESTIONS:
        with waiting(call.patience):
            return await _aask(backend, step)
    if type(step) is Run:
        with running([step], call):
            cancelled = cancellations()
            try:
                ran = await body()
            except BaseException as exc:
                return Raised(exc)
            if cancellations() > cancelled:
                ran.tainted = "cancelled"
            return ran
    if type(step) is Join:
        return backend.flights.join(
            step.key,
            AsyncWaiter,
            loop=asyncio.get_running_loop(),
            uses_executor=caller.uses_executor,
            held=call.held,
            suspects=call.suspects,
        )
    if type(step) is Wait:
        assert isinstance(step.waiter, AsyncWaiter)
        return await step.waiter.wait(caller.heartbeat)
    if type(step) is Revalidate:
        return step.how(step.call, True)
    assert type(step) is Pause
    caller.heartbeat()
    with beating(caller.heartbeat):
        return await backend.apause(step.key, step.seconds)


async def _aask(backend: Backend, step: Step) -> Any:
    if type(step) is Read:
        return await backend.aread(step.lookup)
    if type(step) is Tokens:
        return await backend.atokens(step.tags)
    if type(step) is Write:
        return await backend.awrite(step.key, step.entry, step.lease)
    if type(step) is Acquire:
        return await backend.aacquire(step.key)
    assert type(step) is Release
    return await backend.arelease(step.lease)


Opened = tuple[Iterator[Any], Callable[[], Ran]]
AOpened = tuple[AsyncIterator[Any], Callable[[], Ran]]


def drive_stream(call: Call, open_body: Callable[[], Opened], caller: Caller) -> Iterator[Any]:
    """Like ``drive``, yielding what the body streams while it runs; a stored result comes in one.

    ``open_body`` starts the body: what to iterate, and what then makes the result of it.
    """
    machine = steps(call)
    streamed = False
    try:
        step = next(machine)
        while True:
            try:
                if type(step) is Run:
                    with running([step], call):
                        try:
                            chunks, result = open_body()
                            for chunk in chunks:
                                streamed = True
                                yield chunk
                            answer: Any = result()
                        except BaseException as exc:
                            answer = Raised(exc, streamed)
                else:
                    answer = perform(step, call, never, caller)
            except BaseException as exc:
                step = machine.throw(exc)
            else:
                step = machine.send(answer)
    except StopIteration as stop:
        done = stop.value
    value = _value(done)
    if done.entry is not None:
        yield value


async def adrive_stream(
    call: Call, open_body: Callable[[], AOpened], caller: Caller
) -> AsyncIterator[Any]:
    """Like ``drive_stream``, awaiting."""
    machine = steps(call)
    streamed = False
    try:
        step = next(machine)
        while True:
            try:
                if type(step) is Run:
                    with running([step], call):
                        cancelled = cancellations()
                        try:
                            chunks, result = open_body()
                            async for chunk in chunks:
                                streamed = True
                                yield chunk
                            answer: Any = result()
                            if cancellations() > cancelled:
                                answer.tainted = "cancelled"
                        except BaseException as exc:
                            answer = Raised(exc, streamed)
                else:
                    answer = await aperform(step, call, anever, caller)
            except BaseException as exc:
                step = machine.throw(exc)
            else:
                step = machine.send(answer)
    except StopIteration as stop:
        done = stop.value
    value = _value(done)
    if done.entry is not None:
        yield value


def cancellations() -> int:
    """How often the current task has been asked to end; what swallows that may be incomplete."""
    # Python 3.10 does not count
    count = getattr(asyncio.current_task(), "cancelling", None)
    return 0 if count is None else int(count())


@contextmanager
def running(runs: Sequence[Run], call: Call) -> Iterator[None]:
    """What surrounds a running body: inner calls know its flights and report what they depend on,
    and its leases are kept alive. ``call`` is one of those that it answers."""
    own = [run.flight for run in runs if run.flight is not None]
    leases = [run.lease for run in runs if run.lease is not None]
    call.suspects.extend(own)
    flights = held_flights.set((*call.held, *own))
    try:
        limit = math.inf
        if call.background and call.freshness is not None:
            # beyond its window nobody takes a stale result: others run the node themselves
            limit = min(BACKGROUND_LEASE, call.freshness.while_revalidate)
        for lease in leases:
            _heartbeat.keep(call.backend.cache, lease, limit)
        with gathering_in((*call.around, *[run.gathering for run in runs])):
            yield
    finally:
        for flight in own:
            call.suspects.remove(flight)
        for lease in leases:
            _heartbeat.drop(lease)
        # a stream that is closed by the garbage collector ends in another context
        with suppress(ValueError):
            held_flights.reset(flights)


def never() -> Ran:
    """The body of calls whose driver runs it itself."""
    raise AssertionError("the body is run by the driver itself")


async def anever() -> Ran:
    """The awaitable one."""
    raise AssertionError("the body is run by the driver itself")


def _value(done: Done) -> Any:
    if isinstance(done, Raised):
        raise done.error
    return done.value
