"""What a computation depends on because of the cached calls made inside it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

from langgraph_perf._backend import Backend
from langgraph_perf.policy import SCOPES, Scope


class Gathering:
    """The dependencies of the cached calls made while a body runs: they are the body's as well.

    Attributes:
        deps: tag ids and the tokens they had when the inner results came to be.
        elsewhere: whether an inner result depends on tags of another cache, which nothing here
            can check.
        tainted: why what the body makes of the inner results must not be stored.
    """

    __slots__ = ("_backend", "_scope", "deps", "elsewhere", "tainted")

    def __init__(self, backend: Backend, scope: Scope) -> None:
        self._backend = backend
        self._scope = scope
        self.deps: dict[str, str] = {}
        self.elsewhere = False
        self.tainted: str | None = None

    def narrowed(self, scope: Scope) -> None:
        """An inner call's result is shared within ``scope`` only."""
        if SCOPES.index(scope) > SCOPES.index(self._scope):
            self.tainted = self.tainted or "narrower_inside"

    def add(self, backend: Backend, deps: Iterable[tuple[str, str]], scope: Scope) -> None:
        """An inner call on ``backend`` used something that depends on ``deps``."""
        self.narrowed(scope)
        for tag, token in deps:
            if backend is self._backend:
                self.deps.setdefault(tag, token)  # the older token: an invalidation between counts
            else:
                self.elsewhere = True


GATHERINGS = "__pregel_langgraph_perf_in"
"""Where a running body's config says what it is part of: a thread has no context of its caller's.
LangGraph strips it as it does its own."""

gatherings: ContextVar[tuple[Gathering, ...]] = ContextVar("langgraph_perf_gatherings", default=())
"""The computations that the current code is part of, outermost first."""


def part_of(conf: Mapping[str, Any]) -> tuple[Gathering, ...]:
    """The computations that code with this ``configurable`` is part of, outermost first."""
    told: tuple[Gathering, ...] = conf.get(GATHERINGS) or ()
    here = gatherings.get()
    return (*told, *[known for known in here if known not in told]) if told else here


def depends(
    parts: tuple[Gathering, ...], backend: Backend, deps: Iterable[tuple[str, str]], scope: Scope
) -> None:
    """What is being computed depends on ``deps``, which are a result's of that ``scope``."""
    for gathering in parts:
        gathering.add(backend, deps, scope)


def narrowed(parts: tuple[Gathering, ...], scope: Scope) -> None:
    """What is being computed uses what is shared within ``scope`` only."""
    if scope != "global":
        for gathering in parts:
            gathering.narrowed(scope)


def taint(parts: tuple[Gathering, ...], reason: str) -> None:
    """What is being computed uses something for which it must not be stored."""
    for gathering in parts:
        gathering.tainted = gathering.tainted or reason


@contextmanager
def gathering_in(parts: tuple[Gathering, ...]) -> Iterator[None]:
    """What runs inside is part of these computations."""
    token = gatherings.set(parts)
    try:
        yield
    finally:
        # a stream that is closed by the garbage collector ends in another context
        with suppress(ValueError):
            gatherings.reset(token)
