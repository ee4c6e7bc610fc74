"""Who owns results that are not everybody's: a thread or a run, with which they go.

What an owner owns is kept in a namespace of its own and depends on a tag of its own. Forgetting an
owner drops the tag, so that no process serves any of it from then on, and deletes the namespace.
A run takes the tag's token when it starts: what it computes after its thread was forgotten carries
a dead token, and goes again as soon as it is stored.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import NamedTuple

from langgraph.cache.base import Namespace

from langgraph_perf._backend import Backend, owner_tag
from langgraph_perf.caches.base import OWNED, tag_id

Deps = tuple[tuple[str, str], ...]
Pins = MutableMapping[tuple[Backend, str], str]
"""The tokens of owners' tags that a run goes by, by backend and tag."""


def thread_namespace(thread_id: str) -> Namespace:
    """Where what a thread owns is kept."""
    return (OWNED, "thread", thread_id)


def run_namespace(run_id: str) -> Namespace:
    """Where what a run owns is kept."""
    return (OWNED, "run", run_id)


def made_in(run_id: str) -> str:
    """The tag of all that was computed in the run that a checkpointer knows as ``run_id``."""
    return tag_id(f"{OWNED}|made in|{run_id}")


class Owner(NamedTuple):
    """The owner of one call's result.

    Attributes:
        namespace: where it is kept.
        pins: see ``Pins``; of the run that makes the call.
    """

    namespace: Namespace
    pins: Pins

    @property
    def tag(self) -> str:
        """The tag that all it owns depends on."""
        return owner_tag(self.namespace)

    def pinned(self, backend: Backend, deps: Deps) -> Deps:
        """``deps`` with the token that the run goes by, which is this one if it has none yet."""
        own = self.tag
        return tuple(
            [
                (tag, self.pins.setdefault((backend, own), token) if tag == own else token)
                for tag, token in deps
            ]
        )
