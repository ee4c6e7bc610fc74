"""``Keyed``: a bounded number of shared objects, told apart by a key."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable
from typing import Any, TypeVar

from langgraph_perf import _validate
from langgraph_perf.errors import ConfigurationError
from langgraph_perf.resources._hooks import Hooks
from langgraph_perf.resources._ledger import Limits
from langgraph_perf.resources._shared import AsyncSharedLease, SharedCore, SharedLease
from langgraph_perf.resources.resource import CoreResource, owner_name

T = TypeVar("T")

MAX_OVERTAKE_SECONDS = 5.0
"""How long a waiter for an object that is not loaded may be overtaken by others whose object is.

Without overtaking, objects would be loaded and unloaded all the time; without a bound, a busy
object would never make room. From this age on, nobody who came later is served before."""


class Keyed(CoreResource[T]):
    """At most ``max_size`` objects, for instance models by name, each shared by its leases.

    Places count from before an object is loaded until it is closed, so there are never more than
    ``max_size`` in memory. To make room, the least recently used object without a lease is closed;
    while all are leased, callers wait. One load for each key, however many ask. Keys of different
    types are different keys, also those that Python calls equal, such as ``1`` and ``True``.

    Args:
        create: called with the key, loads its object.
        max_size: the most objects there can be.
        max_idle: seconds without any lease after which an object is unloaded; ``None`` for never.
        timeout: seconds a lease waits at most, for room and for a load: raise it for what takes
            long to load; ``None`` for no limit.
        close: called with an object that is not needed any more.

    If ``create`` or ``close`` is async, objects belong to the event loop that made them, and only
    ``alease`` works.

    Raises:
        ConfigurationError: an argument is not what it should be.
    """

    keyed = True
    shares = True

    def __init__(
        self,
        create: Callable[[Any], Awaitable[T] | T],
        *,
        max_size: int = 4,
        max_idle: float | None = None,
        timeout: float | None = 30,
        close: Callable[[T], Any] | None = None,
    ) -> None:
        owner = owner_name("Keyed", create)
        limits = Limits(
            max_size=_validate.count(owner, "max_size", max_size, least=1),
            max_idle=_validate.seconds(owner, "max_idle", max_idle),
            max_overtake=MAX_OVERTAKE_SECONDS,
        )
        hooks = Hooks(owner, create, keyed=True, close=close)
        super().__init__(
            SharedCore(hooks, limits),
            _validate.seconds(owner, "timeout", timeout),
            SharedLease,
            AsyncSharedLease,
        )

    def check_key(self, key: Hashable) -> None:
        try:
            hash(key)
        except TypeError:
            raise ConfigurationError(
                f"{self.owner}: key must be hashable (a str, a number, a tuple of those), "
                f"got {key!r}"
            ) from None
        if key is None:
            name = f"{self._name!r}, " if self._name else ""
            raise ConfigurationError(
                f"{self.owner}: key must say which object, got None; accepted: lease({name}key)"
            )
