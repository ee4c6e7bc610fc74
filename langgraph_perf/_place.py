"""Where the items of ``get_cache`` are kept, for whom, and under which seal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from langgraph_perf import codec, keys
from langgraph_perf._backend import Backend
from langgraph_perf._binding import BINDING, Binding
from langgraph_perf._gathering import Gathering
from langgraph_perf._owner import RUN_SECONDS, Owner
from langgraph_perf._patience import Patience
from langgraph_perf._sealing import Seal
from langgraph_perf._watch import resumes
from langgraph_perf.caches.base import Lookup
from langgraph_perf.policy import Scope

NAMESPACE = "langgraph_perf.items"


class Place(NamedTuple):
    """Where items are kept, for whom, and under which seal.

    Attributes:
        scope: who shares them.
        around: the computations that the node is part of, outermost first.
        conf: the node's ``configurable``.
        patience: what the run may lose to the cache; ``None`` where that never waits.
        types: the types that items may be made of, besides the built-in ones.
    """

    backend: Backend | None = None
    owner: Owner | None = None
    marks: tuple[str, ...] = ()
    seal: Seal | None = None
    scope: Scope = "global"
    around: tuple[Gathering, ...] = ()
    conf: Mapping[str, Any] = MappingProxyType({})
    patience: Patience | None = None
    types: Callable[[], codec.Allowlist] = codec.Allowlist

    @property
    def expires(self) -> float | None:
        """After how many seconds items go in any case."""
        # a run that was killed removes nothing
        return RUN_SECONDS if self.owner is not None and self.owner.of_a_run else None

    @property
    def taint(self) -> str | None:
        """Why nothing may be stored now."""
        # a human's answer is in this task: who knows where it goes
        if resumes(self.conf, False):
            return "resumed"
        binding = self.conf.get(BINDING)
        continued = isinstance(binding, Binding) and binding.continued
        return "continued_inside" if continued else None

    def lookup(
        self, namespace: str, key: Any, tags: tuple[str, ...], max_age: float | None
    ) -> Lookup:
        """How the item ``key`` is found.

        Raises:
            keys.Unkeyable: it cannot be.
        """
        parts: list[tuple[str, Any]] = [("items", namespace), ("key", key)]
        where: tuple[str, ...] = (NAMESPACE, namespace)
        if self.seal is not None:
            parts.append(("sealed", True))
        if self.owner is not None:
            where = self.owner.namespace
        return Lookup((where, keys.digest(*parts)), tags, max_age)

    def load(self, name: str, payload: bytes) -> Any:
        """The value stored under the key ``name``."""
        opened = payload if self.seal is None else self.seal.opened(name, payload)
        return codec.decode(opened, self.types())

    def dump(self, name: str, value: Any) -> bytes:
        """What to store under the key ``name``."""
        payload = codec.encode(value)
        return payload if self.seal is None else self.seal.closed(name, payload)


NOWHERE = Place()
