"""Has copies in memory go when another process has removed what they are copies of.

None of them would be served, as the last tier's tags tell. But what belonged to a thread or a run
that was deleted is not to stay in the memory of other processes until room is needed. So a daemon
thread, which ends when there is nothing of that kind, looks every few seconds whether the tags that
such copies depend on are still current, a bounded number of tags at a time.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING

from langgraph_perf.caches.base import namespace_tag
from langgraph_perf.caches.memory import Deps, MemoryCache

if TYPE_CHECKING:
    from langgraph.cache.base import FullKey, Namespace

    from langgraph_perf.caches.tiered import TieredCache

logger = logging.getLogger("langgraph_perf")

SECONDS = 5.0
"""Until it looks again, when it has looked through all."""
PAUSE = 0.5
"""Between two looks at some of them."""
MOST_TAGS = 1000
"""How many tags are asked for at a time; owners take turns."""


def _batches(tags: Iterable[str]) -> Iterator[list[str]]:
    rest = iter(tags)
    while some := list(islice(rest, MOST_TAGS)):
        yield some


class Sweeper:
    """Of one cache.

    Args:
        cache: whose last tier knows the tags.
        memories: its tiers that are looked through.
    """

    def __init__(self, cache: TieredCache, memories: Sequence[MemoryCache]) -> None:
        self._cache = weakref.ref(cache)
        self._memories = memories
        self._next: list[tuple[MemoryCache, Namespace]] = []
        self.after_fork()

    @classmethod
    def of(cls, cache: TieredCache) -> Sweeper | None:
        """The one for ``cache``, if it has memory tiers."""
        memories = [tier for tier in cache.tiers if isinstance(tier, MemoryCache)]
        return cls(cache, memories) if memories else None

    def after_fork(self) -> None:
        """Runs in a forked child, which has none of its parent's threads."""
        self._starting = threading.RLock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """There is something to look after."""
        with self._starting:
            if self._thread is not None or self._ended.is_set():
                return
            thread = threading.Thread(target=self._run, name="langgraph-perf-sweep", daemon=True)
            # no more threads, or the interpreter is shutting down: the next copy tries again
            with suppress(RuntimeError):
                thread.start()
                self._thread = thread

    def stop(self) -> None:
        """End the thread, for good."""
        self._ended.set()

    def look(self, cache: TieredCache) -> None:
        """Look through the copies of some owners, those first whose turn it is."""
        copies: list[tuple[MemoryCache, list[tuple[FullKey, Deps]]]] = []
        tags: set[str] = set()
        if not self._next:
            self._next = [
                (memory, namespace) for memory in self._memories for namespace in memory.owners()
            ]
        while self._next and len(tags) < MOST_TAGS:
            memory, namespace = self._next.pop()
            # a memory may be a cache by itself as well: of what was stored past this cache its own
            # tags tell
            own = namespace_tag(namespace)
            deps = [each for each in memory.deps_of(namespace) if each[1] and each[1][-1][0] == own]
            copies.append((memory, deps))
            tags.update([tag for _, needed in deps for tag, _ in needed])
        current: dict[str, str] = {}
        for some in _batches(tags):
            found = cache.current(some)
            if found is None:
                return
            current.update(found)
        for memory, deps in copies:
            memory.drop(
                [
                    (key, needed)
                    for key, needed in deps
                    if any(current.get(tag) != token for tag, token in needed)
                ]
            )

    def _run(self) -> None:
        ended = self._ended
        while not ended.wait(PAUSE if self._next else SECONDS):
            cache = self._cache()
            if cache is None:
                return
            try:
                self.look(cache)
            except Exception:
                logger.debug("copies in memory could not be looked through", exc_info=True)
            del cache
            with self._starting:
                if not any(memory.owners() for memory in self._memories):
                    self._thread = None
                    return
