"""``Pool``: interchangeable objects, each leased to one at a time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from langgraph_perf import _validate
from langgraph_perf.resources._exclusive import AsyncExclusiveLease, ExclusiveCore, ExclusiveLease
from langgraph_perf.resources._hooks import Hooks
from langgraph_perf.resources._ledger import Limits
from langgraph_perf.resources.resource import CoreResource, owner_name

T = TypeVar("T")


class Pool(CoreResource[T]):
    """At most ``max_size`` objects of one kind; whoever leases one has it alone.

    Nothing is made before it is first asked for. Sync and async code can share one pool. The
    names of the arguments are psycopg_pool's.

    Args:
        create: makes one object. Its error is raised to whoever asked, and the next caller tries
            again. It must not hide that it is async: pass an ``async def``.
        min_size: this many objects are kept however idle they are; the first lease begins to
            make them, and those that are lost are replaced.
        max_size: the most objects there can be.
        timeout: seconds a lease waits at most; ``None`` for no limit.
        max_waiting: the most callers that may queue; 0 for any number.
        max_idle: seconds after which an object that nobody leases is closed; ``None`` for never.
        max_lifetime: seconds after which an object is not handed out any more, up to 10 % fewer at
            random, so that what was made together is not replaced together; ``None`` for never.
        check: called with an object before it is leased again; when it returns false or raises,
            the object is closed and another one made. One that returns ``None`` has passed.
        reset: called with an object when it comes back; when it raises, the object is closed.
        close: called with an object that is not needed any more. What it gives is awaited if
            another of the functions is known to be async.

    If any of the functions is async, objects belong to the event loop that made them, and only
    ``alease`` works. Sync functions run in the calling thread, or off the loop for async callers.

    Raises:
        ConfigurationError: an argument is not what it should be.
    """

    def __init__(
        self,
        create: Callable[[], Awaitable[T] | T],
        *,
        min_size: int = 0,
        max_size: int = 10,
        timeout: float | None = 30,
        max_waiting: int = 0,
        max_idle: float | None = 300,
        max_lifetime: float | None = 3600,
        check: Callable[[T], Any] | None = None,
        reset: Callable[[T], Any] | None = None,
        close: Callable[[T], Any] | None = None,
    ) -> None:
        owner = owner_name("Pool", create)
        limits = Limits(
            max_size=_validate.count(owner, "max_size", max_size, least=1),
            min_size=_validate.count(owner, "min_size", min_size, least=0),
            max_idle=_validate.seconds(owner, "max_idle", max_idle),
            max_lifetime=_validate.seconds(owner, "max_lifetime", max_lifetime, above_zero=True),
            max_waiting=_validate.count(owner, "max_waiting", max_waiting, least=0),
        )
        if limits.min_size > limits.max_size:
            _validate.refuse(owner, "min_size", min_size, f"at most max_size={max_size}")
        hooks = Hooks(owner, create, check=check, reset=reset, close=close)
        super().__init__(
            ExclusiveCore(hooks, limits),
            _validate.seconds(owner, "timeout", timeout),
            ExclusiveLease,
            AsyncExclusiveLease,
        )
