"""A cached call, and the steps it is made of: what the drivers carry out.

Each step says after the arrow what it is answered with.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from langgraph.cache.base import FullKey

from langgraph_perf import _freshness
from langgraph_perf._backend import Backend
from langgraph_perf._flight import Flight, Waiter
from langgraph_perf._freshness import Freshness, State
from langgraph_perf._gathering import Gathering
from langgraph_perf._owner import Owner
from langgraph_perf._patience import Patience
from langgraph_perf.caches.base import Entry, Lease, Lookup
from langgraph_perf.policy import Mode, Scope
from langgraph_perf.stats import NodeCounters


@dataclass(slots=True, eq=False, repr=False)
class Call:
    """Everything that there is to know about one call.

    Attributes:
        name: what to call it in errors and logs.
        load: makes the value from stored payload bytes; raises ``DecodeError`` if it cannot.
        dump: makes payload bytes from the value; raises ``EncodeError`` if it cannot.
        refuse: why the value must not be stored, or ``None``.
        spent: language-model tokens the value's computation took.
        on_hit: told of the entry that answers the call.
        freshness: what may be served past its ``ttl``; ``None``: nothing.
        held: the flights that the call is part of.
        suspects: flights that the call may be part of without knowing; its own joins them.
        looked: whether the caller has looked the key up, in vain, a moment ago.
        unreadable: whether what is stored could not be read back.
        background: whether nobody waits for the result; then its lease is not kept for ever.
        scope: who may be served the result.
        owner: who owns it, if not everybody.
        marks: ids of tags that the result depends on and a lookup does not ask for.
        around: the computations that the call is part of, outermost first.
        patience: what its run may lose to the cache; ``None`` where that never waits.
    """

    name: str
    backend: Backend
    counters: NodeCounters
    key: FullKey
    tags: tuple[str, ...]
    mode: Mode
    max_age: float | None
    ttl: float | None
    jitter: float
    load: Callable[[bytes], Any]
    dump: Callable[[Any], bytes]
    refuse: Callable[[Any], str | None]
    spent: Callable[[Any], int]
    on_hit: Callable[[Entry], None]
    held: tuple[Flight, ...]
    freshness: Freshness | None = None
    suspects: list[Flight] = field(default_factory=list)
    looked: bool = False
    unreadable: bool = False
    background: bool = False
    scope: Scope = "global"
    owner: Owner | None = None
    marks: tuple[str, ...] = ()
    around: tuple[Gathering, ...] = ()
    patience: Patience | None = None

    @property
    def lookup(self) -> Lookup:
        """What to look for."""
        return Lookup(self.key, self.tags, self.max_age)

    @property
    def grace(self) -> float:
        """How many seconds past its ``ttl`` a result may be of use."""
        return 0.0 if self.freshness is None else self.freshness.grace

    def state(self, entry: Entry) -> State:
        """What ``entry`` is good for."""
        if self.freshness is None and not entry.grace:
            return "fresh"
        return _freshness.state(self.freshness, entry, self.backend.cache.clock())


class Read(NamedTuple):
    """Look an entry up → ``Entry | None``."""

    lookup: Lookup


class Revalidate(NamedTuple):
    """See to it that the body of ``call`` runs again, in the background."""

    call: Call
    how: Callable[[Call, bool], None]


class Tokens(NamedTuple):
    """The current tokens of tags → ``tuple | None``."""

    tags: tuple[str, ...]


class Join(NamedTuple):
    """Lead, follow or go alone → ``(flight, waiter)``."""

    key: FullKey


class Wait(NamedTuple):
    """Wait for a flight → ``Outcome | None`` (``None``: waited long enough)."""

    waiter: Waiter


class Acquire(NamedTuple):
    """Take the lease of a key → ``Lease | "busy" | "failed"``."""

    key: FullKey


class Pause(NamedTuple):
    """Wait for whoever has the lease of a key, at most for ``seconds``."""

    key: FullKey
    seconds: float


class Run(NamedTuple):
    """Run the body as part of ``flight`` → ``Ran | Raised``; inner calls tell ``gathering``."""

    flight: Flight | None
    lease: Lease | None
    gathering: Gathering


class Write(NamedTuple):
    """Store an entry → whether it was."""

    key: FullKey
    entry: Entry
    lease: Lease | None


class Release(NamedTuple):
    """Give a lease back."""

    lease: Lease


@dataclass(slots=True, eq=False)
class Ran:
    """What the body returned.

    Attributes:
        seconds: how long it took; 0 when a stored entry answered.
        tainted: why the value must not be stored, whatever the policy says.
        entry: the stored entry that the value was made from, if it was.
    """

    value: Any
    seconds: float = 0.0
    tainted: str | None = None
    entry: Entry | None = None


class Raised(NamedTuple):
    """The body raised; ``streamed``: after the caller had been given a part of its result."""

    error: BaseException
    streamed: bool = False


Step = Read | Revalidate | Tokens | Join | Wait | Acquire | Pause | Run | Write | Release
Done = Ran | Raised
Steps = Generator[Step, Any, Done]
Verdict = Entry | Literal["disperse", "abandon"]
