"""What this process knows of the tag tokens without asking, and for how long it may rely on it.

A token that was read is remembered until the server reports (``CLIENT TRACKING``) that it changed.
Reports arrive a moment late, or never where the network fails, so the view is a lease in the sense
of Gray and Cheriton ("Leases: an efficient fault-tolerant mechanism for distributed file cache
consistency", SOSP 1989): it holds for ``VIEW_SECONDS`` from the sending of a ping whose answer came
after every report that was due before it, and the server remembers for longer than that that there
is a view (``_redis_listener``). An invalidation that lets as much time pass before it
returns is therefore seen by every lookup that starts later, in every process.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence

VIEW_SECONDS = 0.05
"""How long the view holds after a ping, and how long an invalidation waits for other views."""
_MOST_TOKENS = 100_000
_MOST_CHANGES = 4096


class TagView:
    """Tag tokens as last heard of.

    Attributes:
        used: when it was last asked (``time.monotonic``).
    """

    def __init__(self, wanted: Callable[[], None]) -> None:
        self._wanted = wanted
        self._lock = threading.Lock()
        self._tokens: dict[str, str] = {}
        self._holds_until = 0.0
        self._serial = 0
        self._changed: OrderedDict[str, int] = OrderedDict()
        self._floor = 0
        self.used = 0.0

    # -- for readers ------------------------------------------------------------------------------

    def knows(self, deps: Sequence[tuple[str, str]]) -> bool:
        """Whether these tokens are known to be current."""
        tokens = self._tokens  # before the time: a view that ended is replaced, never filled again
        self.used = now = time.monotonic()
        if now >= self._holds_until:
            self._wanted()
            return False
        for tag, token in deps:  # noqa: SIM110 - on every hit, and a generator is slow
            if tokens.get(tag) != token:
                return False
        return True

    def mark(self) -> int:
        """A moment before tokens are asked for, for ``learn``."""
        return self._serial

    def learn(self, since: int, tokens: Mapping[str, str]) -> None:
        """Remember tokens that were asked for after ``since``, unless they changed meanwhile."""
        with self._lock:
            if since < self._floor:
                return
            if len(self._tokens) > _MOST_TOKENS:
                self._tokens = {}
            for tag, token in tokens.items():
                if self._changed.get(tag, -1) <= since:
                    self._tokens[tag] = token

    # -- for whoever hears of changes -------------------------------------------------------------

    def forget(self, tags: Collection[str]) -> None:
        """These tokens changed, or may have."""
        with self._lock:
            self._serial += 1
            for tag in tags:
                self._tokens.pop(tag, None)
                self._changed[tag] = self._serial
                self._changed.move_to_end(tag)
            while len(self._changed) > _MOST_CHANGES:
                _, self._floor = self._changed.popitem(last=False)

    def flush(self) -> None:
        """Any token may have changed."""
        with self._lock:
            self._serial += 1
            self._floor = self._serial
            self._tokens = {}
            self._changed.clear()

    def confirm(self, asked: float) -> None:
        """Everything that changed before ``asked`` has been reported."""
        self._holds_until = asked + VIEW_SECONDS

    def lost(self) -> None:
        """Changes are not reported any more."""
        self._holds_until = 0.0
        self.flush()
