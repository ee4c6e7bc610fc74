"""Who owns results that are not everybody's: a thread or a run, with which they go.

What an owner owns is kept in a namespace of its own and depends on a tag of its own. Forgetting an
owner drops the tag, so that no process serves any of it from then on, and deletes the namespace.
A run takes the tag's token when it starts: what it computes after its thread was forgotten carries
a dead token, and goes again as soon as it is stored.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any, NamedTuple

# a private name of LangGraph; tests/checkpoint/test_threads.py fails when it changes
from langgraph._internal._constants import CONFIG_KEY_CHECKPOINTER
from langgraph.cache.base import Namespace

from langgraph_perf._backend import Backend, owner_tag
from langgraph_perf.caches.base import OWNED, tag_id

RUN_SECONDS = 86400.0
"""How long a result is kept that is removed with its run: a run that was killed removes nothing."""
DEAD = ""
"""In the place of a token: that its owner was forgotten since the run began, or may have been."""
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


def run_id_of(config: Any) -> str | None:
    """The id by which the checkpointer knows the run, if it can delete what single runs made."""
    conf = config.get("configurable") or {}
    saver = conf.get(CONFIG_KEY_CHECKPOINTER)
    if saver is not None and not getattr(saver, "deletes_runs", False):
        return None
    run_id = conf.get("run_id") or (config.get("metadata") or {}).get("run_id")
    return None if run_id is None else str(run_id)


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

    @property
    def of_a_run(self) -> bool:
        """Whether a run owns it, and not a thread."""
        return self.namespace[1] == "run"

    def known(self, backend: Backend, tags: Sequence[str]) -> Deps | None:
        """The tokens that the run goes by, if it does for all these tags."""
        found = [(tag, self.pins.get((backend, tag), DEAD)) for tag in tags]
        return None if any(token == DEAD for _, token in found) else tuple(found)

    def pinned(self, backend: Backend, deps: Deps) -> Deps | None:
        """``deps`` with the tokens that the run goes by, which for the owner's tag is this one if
        there is none yet; ``None``: the owner may be forgotten, so nothing may be stored."""
        own = (backend, self.tag)
        for tag, token in deps:
            if tag == self.tag and self.pins.setdefault(own, token) == DEAD:
                return None
        return tuple([(tag, self.pins.get((backend, tag), token)) for tag, token in deps])
