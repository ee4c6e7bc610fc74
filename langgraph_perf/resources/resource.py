"""What every resource offers, whatever stands behind it."""

from __future__ import annotations

import itertools
import sys
from abc import ABC, abstractmethod
from collections.abc import Hashable
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import Any, ClassVar, Generic, TypeVar

from langgraph_perf._progress import Heartbeat
from langgraph_perf._validate import describe, seconds
from langgraph_perf.errors import ConfigurationError
from langgraph_perf.resources._core import Core
from langgraph_perf.resources._entry import UNUSED
from langgraph_perf.resources._lease import AsyncLease, Lease
from langgraph_perf.resources._stats import ResourceStats

T = TypeVar("T")

_order = itertools.count()


class Resource(ABC, Generic[T]):
    """Something that nodes lease: exactly one of ``lease`` and ``alease`` per use.

    Attributes:
        keyed: whether a lease must say which of several objects it wants.
        shares: whether several leases can share one object.
        order: position in the one order in which leases of several resources are taken, so that
            two callers can never wait for each other.
    """

    keyed: ClassVar[bool] = False
    shares: ClassVar[bool] = False

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._name = ""
        self.order = next(_order)

    @property
    def owner(self) -> str:
        """How messages name this resource."""
        return self._owner

    @property
    def timeout(self) -> float | None:
        """Seconds a lease waits unless it says otherwise; ``None`` for no limit."""
        return None

    @property
    def max_size(self) -> int | None:
        """The most objects there can be at a time; ``None`` when somebody else decides."""
        return None

    @property
    @abstractmethod
    def needs_loop(self) -> bool:
        """Whether one of its functions is known to be async, so that only ``alease`` can work."""

    @abstractmethod
    def lease(
        self,
        key: Hashable = None,
        *,
        timeout: float | None = None,
        heartbeat: Heartbeat | None = None,
    ) -> AbstractContextManager[T]:
        """A lease for ``with``.

        Args:
            key: which object, for ``Keyed``; ``None`` for all others.
            timeout: seconds to wait at most; ``None`` for the resource's own limit. What the
                calling thread does itself (load its object, check it, close the one that makes
                room) cannot be interrupted, so the lease is then granted late. Whoever waits for
                another thread to do so leaves on time. ``FromContext`` ignores it.
            heartbeat: called some twenty times a second while waiting.

        Raises:
            ConfigurationError: the resource needs an event loop, or ``key`` does not fit it.
            PoolTimeout, PoolClosed, TooManyWaiting: nothing could be leased.
            Exception: whatever ``create`` raised.
        """

    @abstractmethod
    def alease(
        self,
        key: Hashable = None,
        *,
        timeout: float | None = None,
        heartbeat: Heartbeat | None = None,
    ) -> AbstractAsyncContextManager[T]:
        """A lease for ``async with``; never blocks the event loop.

        Loads and checks count as waiting and end with it: at ``timeout`` the caller gets
        ``PoolTimeout``. A load goes on for those who come later; a sync check ends on its thread,
        and only then does its object come back; an async one is cancelled and its object closed.
        """

    @abstractmethod
    def stats(self) -> ResourceStats:
        """A snapshot of what there is and what has happened."""

    @abstractmethod
    def close(self) -> None:
        """Hand nothing out any more: close what is idle now, what is leased when it comes back.

        Those who wait get ``PoolClosed``. Closing twice does nothing.
        """

    @abstractmethod
    async def aclose(self) -> None:
        """Like ``close``, without blocking the event loop."""

    def be_called(self, name: str) -> None:
        """Make messages speak of ``name``, unless it has been given a name before."""
        if not self._name:
            self._name = name
            self._rename(f"{type(self).__name__} {name!r}")

    def _rename(self, owner: str) -> None:
        self._owner = owner

    def __repr__(self) -> str:
        return f"<{self._owner}>"

    def check_key(self, key: Hashable) -> None:
        """See that ``key`` fits this resource.

        Raises:
            ConfigurationError: there are no keys here, or a keyed resource cannot use this one.
        """
        if key is not None:
            raise ConfigurationError(f"{self._owner} has no keys, so it takes none; got {key!r}")

    def _refuse_sync(self) -> None:
        raise ConfigurationError(
            f"{self._owner} has an async function and needs an event loop: use it in an async node "
            "('async def'), or give it sync functions"
        )


class CoreResource(Resource[T]):
    """A resource whose objects are made, kept and closed here."""

    def __init__(
        self,
        core: Core,
        timeout: float | None,
        new_lease: type[Lease[Any]],
        new_async_lease: type[AsyncLease[Any]],
    ) -> None:
        super().__init__(core.hooks.owner)
        self._core = core
        self._timeout = timeout
        self._new_lease, self._new_async_lease = new_lease, new_async_lease

    def _rename(self, owner: str) -> None:
        self._owner = self._core.hooks.owner = owner

    @property
    def needs_loop(self) -> bool:
        return self._core.needs_loop

    @property
    def timeout(self) -> float | None:
        return self._timeout

    @property
    def max_size(self) -> int:
        return self._core.limits.max_size

    def lease(
        self,
        key: Hashable = None,
        *,
        timeout: float | None = None,
        heartbeat: Heartbeat | None = None,
    ) -> Lease[T]:
        core = self._core
        if core.needs_loop:
            self._refuse_sync()
        if key is not None or self.keyed:
            self.check_key(key)
        lease: Lease[T] = self._new_lease()
        lease.entry = UNUSED
        lease.core = core
        lease.key = key
        lease.loop = None
        lease.timeout = self._timeout if timeout is None else self._seconds(timeout)
        lease.heartbeat = heartbeat
        frame = sys._getframe(1)
        lease.code = frame.f_code
        lease.at = frame.f_lasti
        return lease

    def alease(
        self,
        key: Hashable = None,
        *,
        timeout: float | None = None,
        heartbeat: Heartbeat | None = None,
    ) -> AsyncLease[T]:
        if key is not None or self.keyed:
            self.check_key(key)
        lease: AsyncLease[T] = self._new_async_lease()
        lease.entry = UNUSED
        lease.core = self._core
        lease.key = key
        lease.loop = None
        lease.timeout = self._timeout if timeout is None else self._seconds(timeout)
        lease.heartbeat = heartbeat
        frame = sys._getframe(1)
        lease.code = frame.f_code
        lease.at = frame.f_lasti
        return lease

    def _seconds(self, timeout: float) -> float | None:
        return seconds(self._owner, "timeout", timeout)

    def stats(self) -> ResourceStats:
        return self._core.stats()

    def close(self) -> None:
        self._core.close()

    async def aclose(self) -> None:
        await self._core.aclose()


def owner_name(kind: str, fn: object) -> str:
    """How messages name a resource that nobody has named: by the function that makes it."""
    return f"{kind}({describe(fn) if callable(fn) else repr(fn)})"
