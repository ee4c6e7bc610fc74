"""Waiting for something, for a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


async def within(seconds: float, work: Awaitable[T]) -> T:
    """What ``work`` gives, if it does so in time; it is cancelled with whoever waits.

    Not ``asyncio.wait_for``, which before Python 3.12 forgets that it was cancelled when the work
    ends in the same moment: a run that was to end would go on.

    Raises:
        asyncio.TimeoutError: it took longer.
        ConnectionError: it was cancelled, which whoever waits was not.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait([task], timeout=seconds)
        if not task.done():
            task.cancel()
            await asyncio.wait([task])
            raise asyncio.TimeoutError
    except BaseException:
        task.cancel()
        raise
    if task.cancelled():
        # by what it works with, an executor or a connection that was shut down: to go on as
        # cancelled would end a run that nobody cancelled
        raise ConnectionError("cancelled by what it works with")
    return task.result()
