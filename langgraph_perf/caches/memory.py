"""A cache in the memory of this process, bounded by bytes.

Eviction is S3-FIFO (Yang, Zhang, Qiu, Yue, Rashmi: "FIFO queues are all you need for cache
eviction", SOSP 2023), with bytes in place of object counts: new entries pass through a small queue
of a tenth of the room; what is read again there moves to the main queue, the rest leaves, and is
remembered for a while without its value ("ghost") so that, when written again, it goes straight to
the main queue. A hit only counts up; nothing moves.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from heapq import heapify, heappop, heappush
from itertools import count
from sys import getsizeof

from langgraph.cache.base import FullKey, Namespace
from langgraph.checkpoint.serde.base import SerializerProtocol

from langgraph_perf.caches.base import (
    CacheStats,
    DamagedEntry,
    Entry,
    Lease,
    Lookup,
    TokenCache,
    namespace_tag,
    new_token,
    owned,
    pack,
    require_int,
    timely,
    unpack,
)

_ENTRY_COST = 1024
"""Bytes an entry takes beyond its payload and key: objects, queue, expiry heap and a ghost."""
_DEPENDENCY_COST = 250
_TAG_COST = 300
_OWNED_COST = 350
"""Bytes an entry of an owned namespace takes in the index of those, even if it is the only one."""
_SWEEP = 1000
"""Most expired entries a write removes: it stays short, and still outruns any writer."""
_MOST_HITS = 3
"""S3-FIFO counts hits in two bits."""


Deps = tuple[tuple[str, str], ...]
"""Tags and the tokens that they had."""


class _Slot:
    __slots__ = ("entry", "hits", "size")

    def __init__(self, entry: Entry, size: int) -> None:
        self.entry = entry
        self.size = size
        self.hits = 0


class MemoryCache(TokenCache):
    """Keeps entries in the memory of this process.

    Args:
        max_bytes: bound of all that it holds, keys and bookkeeping included. An entry that alone
            is larger is not stored.
        max_entries: bound of the number of entries; ``None`` leaves it to ``max_bytes``.
        serde: see ``Cache``; entries are then kept as it encodes them.
        clock: see ``Cache``.

    Raises:
        ConfigurationError: a bound is not a positive int.
    """

    blocking = False

    def __init__(
        self,
        max_bytes: int = 256 * 2**20,
        max_entries: int | None = None,
        *,
        serde: SerializerProtocol | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(serde=serde, clock=clock)
        self.max_bytes = require_int("max_bytes", max_bytes, 1, "bytes")
        if max_entries is not None:
            require_int("max_entries", max_entries, 1, "entries (or None)")
        self.max_entries = max_entries
        self._most_tags = max(64, max_bytes // 8 // _TAG_COST)
        self._lock = threading.Lock()
        self._tags: OrderedDict[str, str] = OrderedDict()
        self._empty()

    def _empty(self) -> None:
        self._small: OrderedDict[FullKey, _Slot] = OrderedDict()
        self._main: OrderedDict[FullKey, _Slot] = OrderedDict()
        self._ghosts: OrderedDict[int, None] = OrderedDict()
        # the keys of each owned namespace
        self._owned: dict[Namespace, set[FullKey]] = {}
        self._small_bytes = 0
        self._entry_bytes = 0
        # (expires, serial, key); entries that went another way leave theirs behind
        self._expiries: list[tuple[float, int, FullKey]] = []
        self._serial = count()

    # -- primitives -------------------------------------------------------------------------------

    def peek(self, lookups: Sequence[Lookup]) -> list[Entry | None]:
        """Like ``read``, but whatever became of the entries' tags; counts nothing."""
        now = self.clock()
        with self._lock:
            found = [self._find(lookup, now) for lookup in lookups]
        if self.value_serde is None:
            return found
        return [
            None if entry is None else self._decoded(lookup.key, entry)
            for lookup, entry in zip(lookups, found, strict=True)
        ]

    def write(self, key: FullKey, entry: Entry, lease: Lease | None = None) -> bool:
        """Store; ``False`` when the entry alone is larger than the cache, or it is closed."""
        if self.value_serde is not None:
            sealed = pack(key, entry, self.value_serde)
            entry = entry._replace(payload=sealed, seconds=0.0, tokens=0)
        size = _size(key, entry)
        now = self.clock()
        with self._lock:
            if self._closed:
                return False
            self._sweep(now, _SWEEP)
            known = key in self._main or self._ghosts.pop(hash(key), self) is None
            old = self._remove(key)
            if size > self.max_bytes:
                self._tally.add(refused=1)
                return False
            self._make_room(size)
            slot = _Slot(entry, size)
            if old is not None:
                slot.hits = old.hits
            if known:
                self._main[key] = slot
            else:
                self._small[key] = slot
                self._small_bytes += size
            self._entry_bytes += size
            if owned(key[0]):
                self._owned.setdefault(key[0], set()).add(key)
            if entry.expires is not None:
                heappush(self._expiries, (entry.expires, next(self._serial), key))
            self._prune_expiries()
        self._tally.add(writes=1)
        return True

    def peek_tags(self, tags: Collection[str]) -> Mapping[str, str]:
        """The current tokens of these tag ids; those that have none are left out."""
        with self._lock:
            return {tag: self._tags[tag] for tag in tags if tag in self._tags}

    def tag_tokens(self, tags: Sequence[str]) -> tuple[str, ...]:
        """The current token of each tag id, made where there is none."""
        with self._lock:
            if self._closed:
                return tuple([new_token() for _ in tags])
            tokens = []
            for tag in tags:
                token = self._tags.get(tag)
                if token is None:
                    token = self._tags[tag] = new_token()
                else:
                    self._tags.move_to_end(tag)
                tokens.append(token)
            while len(self._tags) > self._most_tags:
                self._tags.popitem(last=False)
            return tuple(tokens)

    def drop_tags(self, tags: Sequence[str]) -> None:
        """Forget the tokens of these tag ids."""
        with self._lock:
            for tag in tags:
                self._tags.pop(tag, None)
        self._tally.add(invalidations=len(tags))

    def clear(self, namespaces: Sequence[Namespace] | None = None) -> None:
        """Delete what is in exactly these namespaces; ``None`` deletes everything."""
        with self._lock:
            if namespaces is None:
                self._empty()
                self._tags.clear()
                return
            doomed = {tuple(namespace) for namespace in namespaces}
            for namespace in doomed:
                self._tags.pop(namespace_tag(namespace), None)
                for key in list(self._owned.get(namespace, ())):
                    self._remove(key)
            if all(map(owned, doomed)):
                return
            for queue in (self._small, self._main):
                for key in [key for key in queue if key[0] in doomed]:
                    self._remove(key)

    def copy(
        self, source: Namespace, target: Namespace, deps: Mapping[str, tuple[str, str]]
    ) -> int:
        """Copy what is servable in one owned namespace into another; see ``Cache``."""
        source, target = tuple(source), tuple(target)
        if not (owned(source) and owned(target)):
            return 0
        with self._lock:
            keys = list(self._owned.get(source, ()))
        entries = self.peek([Lookup(key) for key in keys])
        tags = {tag for entry in entries if entry is not None for tag, _ in entry.deps}
        copies = self._copied(entries, self.peek_tags(tags), deps)
        return sum(
            [
                self.write((target, name), entry)
                for (_, name), entry in zip(keys, copies, strict=True)
                if entry is not None
            ]
        )

    def purge(self, namespace: Namespace) -> int:
        """Delete what can never be served again in one owned namespace; see ``Cache``."""
        with self._lock:
            keys = list(self._owned.get(tuple(namespace), ()))
        entries = self.peek([Lookup(key) for key in keys])
        tags = {tag for entry in entries if entry is not None for tag, _ in entry.deps}
        spent = self._spent(entries, self.peek_tags(tags))
        doomed = [key for key, is_spent in zip(keys, spent, strict=True) if is_spent]
        with self._lock:
            for key in doomed:
                self._remove(key)
        return len(doomed)

    def owners(self) -> list[Namespace]:
        """The owned namespaces of which it has something."""
        with self._lock:
            return list(self._owned)

    def deps_of(self, namespace: Namespace) -> list[tuple[FullKey, Deps]]:
        """What each entry of an owned namespace depends on."""
        with self._lock:
            keys = self._owned.get(namespace, ())
            return [(key, slot.entry.deps) for key in keys if (slot := self._slot(key))]

    def drop(self, entries: Sequence[tuple[FullKey, Deps]]) -> None:
        """Delete entries, unless they were written again with other dependencies."""
        with self._lock:
            for key, deps in entries:
                slot = self._slot(key)
                if slot is not None and slot.entry.deps == deps:
                    self._remove(key)

    def stats(self) -> CacheStats:
        """A snapshot of counters and sizes, once what has expired is removed."""
        now = self.clock()
        with self._lock:
            self._sweep(now, len(self._expiries))
            return self._tally.stats(entries=self._count, bytes=self._bytes)

    def close(self) -> None:
        """Forget everything; a closed cache answers every lookup with a miss."""
        super().close()
        self.clear()

    def _after_fork(self) -> None:
        super()._after_fork()
        if self._lock.locked():
            # another thread was changing something when the process forked: trust none of it
            self._empty()
            self._tags = OrderedDict()
        self._lock = threading.Lock()

    # -- under the lock ---------------------------------------------------------------------------

    @property
    def _count(self) -> int:
        return len(self._small) + len(self._main)

    @property
    def _bytes(self) -> int:
        return self._entry_bytes + len(self._tags) * _TAG_COST

    def _slot(self, key: FullKey) -> _Slot | None:
        return self._small.get(key) or self._main.get(key)

    def _find(self, lookup: Lookup, now: float) -> Entry | None:
        slot = self._slot(lookup.key)
        if slot is None:
            return None
        if not timely(slot.entry, lookup, now):
            return None
        if slot.hits < _MOST_HITS:
            slot.hits += 1
        return slot.entry

    def _remove(self, key: FullKey) -> _Slot | None:
        slot = self._small.pop(key, None)
        if slot is not None:
            self._small_bytes -= slot.size
        else:
            slot = self._main.pop(key, None)
        if slot is not None:
            self._entry_bytes -= slot.size
            self._forget(key)
        return slot

    def _forget(self, key: FullKey) -> None:
        """Take what is stored no more out of the index."""
        if owned(key[0]):
            keys = self._owned[key[0]]
            keys.remove(key)
            if not keys:
                del self._owned[key[0]]

    def _prune_expiries(self) -> None:
        if len(self._expiries) > 2 * self._count + 64:
            # what was overwritten or evicted has piled up
            self._expiries = [
                (slot.entry.expires, next(self._serial), key)
                for queue in (self._small, self._main)
                for key, slot in queue.items()
                if slot.entry.expires is not None
            ]
            heapify(self._expiries)

    def _sweep(self, now: float, most: int) -> None:
        expired = 0
        while most > 0 and self._expiries and self._expiries[0][0] <= now:
            most -= 1
            expires, _, key = heappop(self._expiries)
            slot = self._slot(key)
            if slot is not None and slot.entry.expires == expires:
                self._remove(key)
                expired += 1
        if expired:
            self._tally.add(expired=expired)

    def _make_room(self, size: int) -> None:
        evicted = 0
        while self._count and (
            self._bytes + size > self.max_bytes
            or (self.max_entries is not None and self._count >= self.max_entries)
        ):
            if self._small and (self._small_is_full() or not self._main):
                key, slot = self._small.popitem(last=False)
                self._small_bytes -= slot.size
                if slot.hits > 1:
                    slot.hits = 0
                    self._main[key] = slot
                    continue
                self._ghosts[hash(key)] = None
            else:
                key, slot = self._main.popitem(last=False)
                if slot.hits:
                    slot.hits -= 1
                    self._main[key] = slot
                    continue
            self._entry_bytes -= slot.size
            self._forget(key)
            evicted += 1
        while len(self._ghosts) > self._count:
            self._ghosts.popitem(last=False)
        if evicted:
            self._tally.add(evicted=evicted)

    def _small_is_full(self) -> bool:
        if self._small_bytes * 10 > self.max_bytes:
            return True
        return self.max_entries is not None and len(self._small) * 10 > self.max_entries

    def _decoded(self, key: FullKey, entry: Entry) -> Entry | None:
        try:
            return unpack(key, entry.payload, self.value_serde)
        except DamagedEntry:
            self._tally.add(damaged=1)
            return None


def _size(key: FullKey, entry: Entry) -> int:
    namespace, name = key
    return (
        _ENTRY_COST
        + getsizeof(entry.payload)
        + getsizeof(name)
        + sum([getsizeof(part) for part in namespace])
        + len(entry.deps) * _DEPENDENCY_COST
        + (_OWNED_COST if owned(namespace) else 0)
    )
