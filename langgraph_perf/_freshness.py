"""Whether a stored result may be served past its ``ttl``, and on what condition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from langgraph_perf.caches.base import Entry

State = Literal["fresh", "revalidate", "if_error", "over"]


@dataclass(frozen=True, slots=True)
class Freshness:
    """What a policy says of results past their ``ttl``; all times in seconds.

    Attributes:
        ttl: how long a result is fresh.
        while_revalidate: how much longer it may be served while ``revalidate`` runs.
        if_error: how much longer it may be served if running the node fails.
        revalidate: computes the result of a call again, in the background; told the call, and
            whether the caller runs on an event loop. ``None``: a result is computed again by its
            first caller.
        retried: whether the node will be run again after this error.
    """

    ttl: float
    while_revalidate: float
    if_error: float
    revalidate: Callable[[Any, bool], None] | None
    retried: Callable[[Exception], bool]

    @property
    def grace(self) -> float:
        """How long past its ``ttl`` a result may be of use."""
        return max(self.while_revalidate, self.if_error)

    def state(self, entry: Entry, now: float) -> State:
        """What ``entry`` is good for at unix time ``now``."""
        ends = entry.created + self.ttl  # it may have become shorter since
        if entry.expires is not None:
            ends = min(ends, entry.expires - entry.grace)
        late = now - ends
        if late < 0:
            return "fresh"
        if late < self.while_revalidate:
            return "revalidate"
        return "if_error" if late < self.if_error else "over"


def state(freshness: Freshness | None, entry: Entry, now: float) -> State:
    """Like ``Freshness.state``; without one, nothing stale is good for anything."""
    if freshness is not None:
        return freshness.state(entry, now)
    # stored by a policy that was more patient
    if entry.grace and entry.expires is not None and now >= entry.expires - entry.grace:
        return "over"
    return "fresh"
