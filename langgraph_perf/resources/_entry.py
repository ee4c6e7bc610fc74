"""A place in a resource, and the object that stands in it."""

from __future__ import annotations

import asyncio
import enum
import math
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from langgraph_perf.resources._waiters import Waiter

NEVER = math.inf


class State(enum.Enum):
    """What is going on in a place."""

    LOADING = "an object is being made for it"
    READY = "it holds an object, leased or idle"
    CLOSING = "its object is being closed, or another one in whose place it comes"
    GONE = "it no longer counts: given up, or inherited through fork"


class Entry:
    """One place. It counts towards ``max_size`` from before its object is made until it is closed.

    Attributes:
        key: what the object is for; ``None`` where a resource knows no keys.
        loop: the event loop the object belongs to; ``None`` if it works anywhere.
        obj: the object while the state is ``READY`` or ``CLOSING``.
        leases: how many leases are out on it.
        fresh: made for the lease that holds it now, so it needs no check.
        idle_since: when its last lease came back.
        expires: when it must not be handed out any more.
        waiter: who asked for the load that is under way; gets the object, or the error.
        victim: what must be closed before this one may be made in its place.
        begun: somebody has set about filling the place, or closing what stands in it, and sees to
            it that the core hears of the end.
    """

    __slots__ = (
        "begun",
        "expires",
        "fresh",
        "idle_since",
        "key",
        "leases",
        "loop",
        "obj",
        "state",
        "victim",
        "waiter",
    )

    def __init__(self, key: Hashable = None, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self.key = key
        self.loop = loop
        self.obj: Any = None
        self.state = State.LOADING
        self.leases = 0
        self.fresh = False
        self.idle_since = 0.0
        self.expires = NEVER
        self.waiter: Waiter | None = None
        self.victim: Entry | None = None
        self.begun = False

    def claim(self) -> bool:
        """Whether it is up to the caller to close the object; nobody does so twice."""
        if self.begun:
            return False
        self.begun = True
        return True


def _sentinel() -> Entry:
    entry = Entry()
    entry.state = State.GONE
    entry.expires = -NEVER  # so that no fast path takes it for something that can be given back
    return entry


UNUSED = _sentinel()
"""What a lease holds before it is entered."""
ENTERING = _sentinel()
"""What a lease holds while it is being entered."""
RELEASED = _sentinel()
"""What a lease holds once it has been given back."""
FORGOTTEN = _sentinel()
"""What a lease holds once its finalizer has given back what it held. A garbage collection may leave
the ``with`` block only after that, which then has nothing to do."""
