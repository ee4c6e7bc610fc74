"""What a computation depends on because of the cached calls made inside it."""

from __future__ import annotations

from collections.abc import Iterable
from contextvars import ContextVar

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

    def add(self, backend: Backend, deps: Iterable[tuple[str, str]], scope: Scope) -> None:
        """An inner call on ``backend`` used something that depends on ``deps``."""
        if SCOPES.index(scope) > SCOPES.index(self._scope):
            self.tainted = self.tainted or "narrower_inside"  # it is not everybody's
        for tag, token in deps:
            if backend is self._backend:
                self.deps.setdefault(tag, token)  # the older token: an invalidation between counts
            else:
                self.elsewhere = True


gatherings: ContextVar[tuple[Gathering, ...]] = ContextVar("langgraph_perf_gatherings", default=())
"""The computations that the current code is part of, outermost first."""


def depends(backend: Backend, deps: Iterable[tuple[str, str]], scope: Scope) -> None:
    """What is being computed now depends on ``deps``, which are a result's of that ``scope``."""
    for gathering in gatherings.get():
        gathering.add(backend, deps, scope)


def taint(reason: str) -> None:
    """What is being computed now uses something for which it must not be stored."""
    for gathering in gatherings.get():
        gathering.tainted = gathering.tainted or reason
