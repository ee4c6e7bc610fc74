"""``Registry``: resources by name, and leases of several of them at once."""

from __future__ import annotations

import difflib
import inspect
import sys
import time
import weakref
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import AsyncExitStack, ExitStack, nullcontext
from types import CodeType, TracebackType
from typing import Any, NamedTuple

from langgraph_perf._locks import new_lock
from langgraph_perf._progress import Heartbeat
from langgraph_perf._validate import seconds
from langgraph_perf.errors import ConfigurationError, LeaseError
from langgraph_perf.resources._stats import ResourceStats
from langgraph_perf.resources.pool import Pool
from langgraph_perf.resources.resource import Resource
from langgraph_perf.resources.use import Use, Want


class Registry(Mapping[str, Resource[Any]]):
    """What ``compile(resources=)`` was given.

    Args:
        resources: resources by the names under which nodes ask for them.

    Raises:
        ConfigurationError: a name is not a name, or a value not a resource.
    """

    def __init__(self, resources: Mapping[str, Resource[Any]] | None = None) -> None:
        if resources is not None and not isinstance(resources, Mapping):
            raise ConfigurationError(
                f"resources: got {resources!r}; accepted: a mapping of names to Pool, Shared, "
                "Keyed or FromContext, such as {'db': Pool(connect)}"
            )
        self._resources = dict(resources or {})
        given: dict[Any, Any] = self._resources
        for name, resource in given.items():
            if not isinstance(name, str) or not name:
                raise ConfigurationError(f"resources: names must be non-empty str, got {name!r}")
            if not isinstance(resource, Resource):
                hint = "Shared(lambda: obj) makes a resource of any object"
                if inspect.isroutine(resource) or isinstance(resource, type):
                    made = getattr(resource, "__name__", "create")
                    hint = f"Pool({made}) or Shared({made}) makes a resource of what it returns"
                raise ConfigurationError(
                    f"resource {name!r} must be a Pool, Shared, Keyed or FromContext, got "
                    f"{resource!r}; {hint}"
                )
            resource.be_called(name)

    def __getitem__(self, name: str) -> Resource[Any]:
        return self._resources[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._resources)

    def __len__(self) -> int:
        return len(self._resources)

    def find(self, name: str) -> Resource[Any]:
        """The resource called ``name``.

        Raises:
            ConfigurationError: there is none; says which there are.
        """
        try:
            return self._resources[name]
        except KeyError:
            close = difflib.get_close_matches(str(name), self._resources, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            there = ", ".join(map(repr, self._resources)) or "none"
            raise ConfigurationError(
                f"no resource is called {name!r}{hint}; there is: {there}. Register it with "
                f"compile(resources={{{name!r}: ...}})"
            ) from None

    def check(self, use: Use, *, sync: bool) -> None:
        """See that a node can lease what it asks for, as far as that is known before it runs.

        Args:
            use: what it asks for.
            sync: whether the node is a plain function.

        Raises:
            ConfigurationError: no such resource, a key too many or too few, or a resource that
                needs an event loop in a sync node.
        """
        resource = self.find(use.name)
        if resource.keyed and use.key is None:
            raise ConfigurationError(
                f"{resource.owner} has one object for each key: ask for it with "
                f"Use({use.name!r}, key=<field or function of the state>)"
            )
        if use.key is not None and not resource.keyed:
            raise ConfigurationError(
                f"Use({use.name!r}, key=...) asks for one of several objects, but "
                f"{resource.owner} has no keys; leave key out, or make it a Keyed"
            )
        if sync and resource.needs_loop:
            raise ConfigurationError(
                f"{resource.owner} has an async function and needs an event loop: make the node "
                "'async def', or give the resource sync functions"
            )

    def check_numbers(self, names: Iterable[str]) -> None:
        """See that a node can have all these at once.

        Raises:
            ConfigurationError: it asks for more objects of one resource than there can be.
        """
        for name, number in Counter(names).items():
            resource = self.find(name)
            if not resource.shares:  # or some of them may be the same object
                _check_number(resource, number)

    def lease(
        self,
        wanted: Mapping[str, Hashable | Want],
        *,
        timeout: float | None = None,
        heartbeat: Heartbeat | None = None,
        where: str | None = None,
    ) -> Leases:
        """Lease several resources for ``with``; gives ``{label: object}``.

        They are taken in one order for the whole process, whatever order ``wanted`` has, so that
        two callers never hold what the other one waits for; an object that can be shared and is
        asked for twice is leased once.

        Args:
            wanted: labels and what to lease for them. A ``Want`` names the resource; otherwise the
                label is its name, and the value the key (``None`` for resources without keys).
            timeout: seconds for all of them together; ``None`` for each resource's own limit.
            heartbeat: called some twenty times a second while waiting.
            where: who leases, for the warning about a forgotten lease; default: the calling line.

        Raises:
            ConfigurationError: an unknown name, a key that does not fit, or more objects at once
                than the resource can have.
        """
        return Leases(self._request(wanted, timeout, heartbeat, where, sys._getframe(1)))

    def alease(
        self,
        wanted: Mapping[str, Hashable | Want],
        *,
        timeout: float | None = None,
        heartbeat: Heartbeat | None = None,
        where: str | None = None,
    ) -> AsyncLeases:
        """Like ``lease``, for ``async with``; never blocks the event loop."""
        return AsyncLeases(self._request(wanted, timeout, heartbeat, where, sys._getframe(1)))

    def stats(self) -> dict[str, ResourceStats]:
        """A snapshot of each resource."""
        return {name: resource.stats() for name, resource in self._resources.items()}

    def close(self) -> None:
        """Close every resource."""
        with ExitStack() as stack:
            for resource in self._resources.values():
                stack.callback(resource.close)

    async def aclose(self) -> None:
        """Like ``close``, without blocking the event loop."""
        async with AsyncExitStack() as stack:
            for resource in self._resources.values():
                stack.push_async_callback(resource.aclose)

    def _request(
        self,
        wanted: Mapping[str, Hashable | Want],
        timeout: float | None,
        heartbeat: Heartbeat | None,
        where: str | None,
        frame: Any,
    ) -> _Request:
        groups: dict[Resource[Any], list[_Unit]] = {}
        for label, value in wanted.items():
            want = value if isinstance(value, Want) else Want(label, value)
            resource = self.find(want.name)
            resource.check_key(want.key)
            units = groups.setdefault(resource, [])
            same = [unit for unit in units if resource.shares and _equal(unit.key, want.key)]
            if same:
                same[0].labels.append(label)
            else:
                units.append(_Unit(want.key, [label]))
        for resource, units in groups.items():
            _check_number(resource, len(units))
        return _Request(
            sorted(groups.items(), key=lambda item: item[0].order),
            seconds("lease()", "timeout", timeout),
            heartbeat,
            where or frame.f_code,
            frame.f_lasti,
        )


def _equal(a: Hashable, b: Hashable) -> bool:
    """Whether two keys ask for the same object, which ``1`` and ``True`` do not."""
    return type(a) is type(b) and a == b


class _Unit(NamedTuple):
    """One lease of a request and the labels under which its object is asked for."""

    key: Hashable
    labels: list[str]


class _Request(NamedTuple):
    """A request for several leases, in the order in which they are to be taken."""

    groups: list[tuple[Resource[Any], list[_Unit]]]
    timeout: float | None
    heartbeat: Heartbeat | None
    code: CodeType | str
    at: int

    def mark(self, lease: Any) -> Any:
        """Let a lease say who really took it."""
        lease.code, lease.at = self.code, self.at
        return lease


class _OneShot:
    """Leases of several resources that are entered once and given back once."""

    def __init__(self, request: _Request) -> None:
        self._request: _Request | None = request
        self._held: Any = None

    def _begin(self) -> _Request:
        request, self._request = self._request, None
        if request is None:
            raise LeaseError("these leases were entered already; a lease is one-shot")
        return request

    def _end(self) -> Any:
        held, self._held = self._held, None
        if held is None:
            raise LeaseError("these leases are not held; a lease is one-shot")
        return held


class Leases(_OneShot):
    """Several leases for ``with``; gives ``{label: object}``."""

    def __enter__(self) -> dict[str, Any]:
        request = self._begin()
        options = _Options(request)
        values: dict[str, Any] = {}
        stack = ExitStack()
        try:
            for resource, units in request.groups:
                with _gate(resource).lease(**options()) if len(units) > 1 else nullcontext():
                    for key, labels in units:
                        lease = request.mark(resource.lease(key, **options()))
                        values.update(dict.fromkeys(labels, stack.enter_context(lease)))
        except BaseException:
            stack.__exit__(*sys.exc_info())  # whatever it says, there is nothing to go on with
            raise
        self._held = stack
        return values

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        # what a manager swallows goes on: there would be no result in the place of the error
        self._end().__exit__(exc_type, exc, tb)


class AsyncLeases(_OneShot):
    """Several leases for ``async with``; gives ``{label: object}``."""

    async def __aenter__(self) -> dict[str, Any]:
        request = self._begin()
        options = _Options(request)
        values: dict[str, Any] = {}
        stack = AsyncExitStack()
        try:
            for resource, units in request.groups:
                several = len(units) > 1
                async with _gate(resource).alease(**options()) if several else nullcontext():
                    for key, labels in units:
                        lease = request.mark(resource.alease(key, **options()))
                        value = await stack.enter_async_context(lease)
                        values.update(dict.fromkeys(labels, value))
        except BaseException:
            await stack.__aexit__(*sys.exc_info())
            raise
        self._held = stack
        return values

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        await self._end().__aexit__(exc_type, exc, tb)


class _Options:
    """The keyword arguments of each lease of a request: what is left of its time."""

    def __init__(self, request: _Request) -> None:
        self._heartbeat = request.heartbeat
        self._deadline = None if request.timeout is None else time.monotonic() + request.timeout

    def __call__(self) -> dict[str, Any]:
        left = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
        return {"timeout": left, "heartbeat": self._heartbeat}


def _check_number(resource: Resource[Any], number: int) -> None:
    if resource.max_size is not None and number > resource.max_size:
        raise ConfigurationError(
            f"{number} objects of {resource.owner} are asked for at once, but it has "
            f"at most {resource.max_size} (max_size)"
        )


_gates: weakref.WeakKeyDictionary[Resource[Any], Pool[object]] = weakref.WeakKeyDictionary()
_gates_lock = new_lock()


def _gate(resource: Resource[Any]) -> Pool[object]:
    """What a caller holds while it takes several objects of one resource.

    One order of resources does not help there: two callers could each hold one object and wait for
    a second one. So only one at a time may hold some and wait for more.
    """
    with _gates_lock:
        gate = _gates.get(resource)
        if gate is None:
            gate = _gates[resource] = Pool(
                object, max_size=1, timeout=resource.timeout, max_idle=None, max_lifetime=None
            )
            gate.be_called(f"for several objects of {resource.owner}")
    return gate
