"""``Shared``: one object that everybody uses at the same time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from langgraph_perf import _validate
from langgraph_perf.resources._hooks import Hooks
from langgraph_perf.resources._ledger import Limits
from langgraph_perf.resources._shared import AsyncSharedLease, SharedCore, SharedLease
from langgraph_perf.resources.resource import CoreResource, owner_name

T = TypeVar("T")


class Shared(CoreResource[T]):
    """One object, loaded when it is first asked for and shared by any number of leases.

    However many ask at the same time, it is loaded once. A load that fails fails for whoever asked
    first; the next one who waits tries again.

    Args:
        create: loads the object.
        max_idle: seconds without any lease after which it is unloaded; ``None`` for never.
        timeout: seconds a lease waits at most, for a load too: raise it for what takes long to
            load; ``None`` for no limit.
        close: called with an object that is not needed any more.

    If ``create`` or ``close`` is async, the object belongs to the event loop that made it: only
    ``alease`` works, and another event loop gets one of its own as soon as nobody leases this one.

    Raises:
        ConfigurationError: an argument is not what it should be.
    """

    shares = True

    def __init__(
        self,
        create: Callable[[], Awaitable[T] | T],
        *,
        max_idle: float | None = None,
        timeout: float | None = 30,
        close: Callable[[T], Any] | None = None,
    ) -> None:
        owner = owner_name("Shared", create)
        limits = Limits(max_size=1, max_idle=_validate.seconds(owner, "max_idle", max_idle))
        hooks = Hooks(owner, create, close=close)
        super().__init__(
            SharedCore(hooks, limits),
            _validate.seconds(owner, "timeout", timeout),
            SharedLease,
            AsyncSharedLease,
        )
