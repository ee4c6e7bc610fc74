"""What a cache in Redis or Valkey keeps there, and the commands that it takes.

What a prefix ``lgp`` keeps there (``{}`` are real braces, so that on a cluster an entry and its
lease share a slot, and all that belongs to one ``owned`` namespace does; nothing else has to):

=====================  ===========================================================================
``lgp:1:e2:{digest}``  an entry, in version 2 of its format: one string; expires with the entry
``lgp:1:l:{digest}``   the lease of the entry's key: its holder's token; expires with the lease
``lgp:1:t:{tag id}``   a tag's token; expires when nobody has asked for it in a month
``lgp:1:w:{digest}``   a channel: something happened to the entry's lease
``lgp:1:views``        a channel to which those subscribe that know tag tokens without asking
``lgp:1:viewers``      the same as a sorted set, by the unix millisecond until which they may: it
                       outlives their connections; expires with the last of them
``lgp:1:n:{owner}``    the index of an owned namespace: a sorted set of the second halves of its
                       entries' digests, by the unix millisecond from which on each is gone (up to
                       a second late, ``inf`` for never); expires with the last of them
=====================  ===========================================================================

A digest is that of the namespace, 32 hexadecimal digits, which are also its tag's id, and 32 of the
name. Of an owned namespace the braces hold only the first half (``lgp:1:e2:{owner}name``).

An entry there ends in the token that its namespace's tag had when it was stored, and is served only
while that is current: the server, when it is short of memory, may evict an index, and a ``clear``
must count for what it no longer finds as well.

A lookup is one ``MGET`` of the entry and of the tokens it is likely to depend on, so both are of
one moment; only an entry with unforeseen tags (those of cached calls inside the call) takes a
second one. Scripts are used where something must happen to nobody else's lease or value.
"""

from __future__ import annotations

import math
import re
import time
from abc import abstractmethod
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from langgraph.cache.base import FullKey, Namespace

from langgraph_perf.caches._redis_async_line import AsyncLine
from langgraph_perf.caches._redis_commands import Command, Script
from langgraph_perf.caches._redis_connect import Source
from langgraph_perf.caches._redis_lines import ClusterLine, Line
from langgraph_perf.caches._redis_listener import Listener
from langgraph_perf.caches._redis_view import VIEW_SECONDS
from langgraph_perf.caches.base import (
    DamagedEntry,
    Entry,
    Lease,
    Lookup,
    TokenCache,
    key_digest,
    namespace_tag,
    new_token,
    owned,
    timely,
)
from langgraph_perf.caches.entry import _MAGIC as MAGIC
from langgraph_perf.caches.entry import namespace_digest, pack_as, unpack_as

T = TypeVar("T")
Steps = Generator["list[Command] | Callable[[], Any]", Any, T]
"""Commands to be answered, or work that may block."""

_ENTRY = f"e{MAGIC[-1]}"
"""Versions of this library that store entries differently do not meet, but share their tags."""
_TOKEN_SECONDS = 30 * 86400
_AT_ONCE = 64
"""Most keys of one ``MGET``: what is worked off in one go, which an event loop must stand."""
_COPIES = 16
"""Entries copied at a time: they go both ways, and each way in one batch that has a deadline."""
_LARGE = 2**18
"""Bytes from which on packing and unpacking is not for an event loop."""
_SCAN = 1000
_MEMBER = re.compile(rb"[0-9a-f]{32}")
_TOKEN_LENGTH = 16
_LONGEST = 1e11
"""Seconds; the server takes no time to live that goes beyond what its clock can hold."""

# KEYS: entry, lease. ARGV: token or '', milliseconds or '0', channel, entry.
_WRITE = Script("""
if ARGV[1] ~= '' and redis.call('GET', KEYS[2]) ~= ARGV[1] then return 0 end
if redis.call('EXISTS', KEYS[1]) == 1 and redis.pcall('GETRANGE', KEYS[1], 4, 7) ~= 'LGP\\2'
then return -1 end
if ARGV[2] == '0' then redis.call('SET', KEYS[1], ARGV[4])
else redis.call('SET', KEYS[1], ARGV[4], 'PX', ARGV[2]) end
local lease = redis.pcall('GET', KEYS[2])
if type(lease) == 'string' and #lease == 16 and redis.call('PTTL', KEYS[2]) > 0 then
    redis.call('DEL', KEYS[2])
    redis.pcall('PUBLISH', ARGV[3], '')
end
return 1
""")
# KEYS, ARGV: as above; then KEYS: index, the namespace's token; ARGV: the name's digest, what
# becomes the token if there is none, seconds that it lives. What has expired leaves the index.
_WRITE_OWNED = Script("""
if ARGV[1] ~= '' and redis.call('GET', KEYS[2]) ~= ARGV[1] then return 0 end
if redis.call('EXISTS', KEYS[1]) == 1 and redis.pcall('GETRANGE', KEYS[1], 4, 7) ~= 'LGP\\2'
then return -1 end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local gone = redis.pcall('ZREMRANGEBYSCORE', KEYS[3], '-inf', string.format('%.0f', now))
if type(gone) == 'table' then return -1 end
local token = redis.call('GET', KEYS[4])
if token then
    -- not each time: whoever knows the token would be told to forget it
    local left = redis.call('TTL', KEYS[4])
    if left >= 0 and left < ARGV[7] / 2 then redis.call('EXPIRE', KEYS[4], ARGV[7]) end
else
    token = ARGV[6]
    redis.call('SET', KEYS[4], token, 'EX', ARGV[7])
end
local blob = ARGV[4] .. token
if ARGV[2] == '0' then
    redis.call('SET', KEYS[1], blob)
    redis.call('ZADD', KEYS[3], 'inf', ARGV[5])
else
    redis.call('SET', KEYS[1], blob, 'PX', ARGV[2])
    redis.call('ZADD', KEYS[3], string.format('%.0f', now + ARGV[2] + 1000), ARGV[5])
end
local last = redis.call('ZRANGE', KEYS[3], -1, -1, 'WITHSCORES')[2]
if last == 'inf' then redis.call('PERSIST', KEYS[3])
else redis.call('PEXPIREAT', KEYS[3], last) end
local lease = redis.pcall('GET', KEYS[2])
if type(lease) == 'string' and #lease == 16 and redis.call('PTTL', KEYS[2]) > 0 then
    redis.call('DEL', KEYS[2])
    redis.pcall('PUBLISH', ARGV[3], '')
end
return 1
""")
# KEYS: index, entries. ARGV: the names' digests. Together, or what is stored in between is lost
# from the index.
_UNLINK_OWNED = Script("""
for i, name in ipairs(ARGV) do
    redis.call('UNLINK', KEYS[i + 1])
    redis.call('ZREM', KEYS[1], name)
end
return 1
""")
# KEYS: lease. ARGV: token, milliseconds. Its own lease it may take again: an answer can get lost.
_ACQUIRE = Script("""
if redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) then return 1 end
if redis.call('PTTL', KEYS[1]) == -1 then return -1 end
if redis.call('GET', KEYS[1]) == ARGV[1] then return 1 end
return 0
""")
_RENEW = Script("""
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
""")
# KEYS: lease. ARGV: token, channel.
_RELEASE = Script("""
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.pcall('PUBLISH', ARGV[2], '')
return redis.call('DEL', KEYS[1])
""")


class RedisSteps(TokenCache):
    """What a cache in Redis asks of the server, step by step: it asks for commands to be carried
    out, and goes on with the replies. How they are carried out is in ``redis``."""

    prefix: str
    lease_seconds: float
    _source: Source
    _root: str
    _presence: bytes
    _viewers: bytes
    _line: Line | ClusterLine
    _listener: Listener | None

    @abstractmethod
    def _take_back(self, lease: Lease) -> None:
        """See to it that a lease which nobody has any more is given back."""

    def _pinging(self) -> Steps[None]:
        (reply,) = yield [(_RENEW, 1, self._name("l", "ping"), "nobody", 1)]
        _good(reply)

    # -- entries ----------------------------------------------------------------------------------

    def _reading(self, lookups: Sequence[Lookup]) -> Steps[list[Entry | None]]:
        if self._closed or not lookups:
            return self._checked(lookups, [None] * len(lookups), {})
        # what was stored through tiers depends on its namespace as well
        unique = dict.fromkeys([namespace_tag(lookup.key[0]) for lookup in lookups])
        for lookup in lookups:
            if lookup.tags:
                unique.update(dict.fromkeys(lookup.tags))
        tags = list(unique)
        since = self._mark()
        blobs = yield from self._get(
            [self._key_name(_ENTRY, lookup.key) for lookup in lookups]
            + [self._name("t", tag) for tag in tags]
        )
        current = _tokens(tags, blobs[len(lookups) :])
        entries = yield from self._unpacked(lookups, blobs, current)
        needed = {tag for entry in entries if entry is not None for tag, _ in entry.deps}
        unforeseen = needed.difference(tags)
        if unforeseen:
            current.update((yield from self._peeking_tags(unforeseen)))
        self._learn(since, current)
        return self._checked(lookups, entries, current)

    def _peeking(self, lookups: Sequence[Lookup]) -> Steps[list[Entry | None]]:
        if self._closed or not lookups:
            return [None] * len(lookups)
        blobs = yield from self._get([self._key_name(_ENTRY, lookup.key) for lookup in lookups])
        return (yield from self._unpacked(lookups, blobs, None))

    def _unpacked(
        self,
        lookups: Sequence[Lookup],
        blobs: Sequence[Any],
        current: Mapping[str, str] | None,
    ) -> Steps[list[Entry | None]]:
        """The timely entries; of owned namespaces only those stored since the last ``clear``, as
        far as ``current`` tells."""
        now = self.clock()
        entries: list[Entry | None] = []
        for i, lookup in enumerate(lookups):
            if i and i % _AT_ONCE == 0:
                yield []  # an event loop has other things to do
            entry = None
            if blobs[i] is not None:
                namespace = lookup.key[0]
                unseal = partial(
                    self._unsealed,
                    key_digest(lookup.key),
                    blobs[i],
                    owned(namespace),
                    None if current is None else current.get(namespace_tag(namespace), ""),
                )
                entry = (yield unseal) if len(blobs[i]) > _LARGE else unseal()
            entries.append(entry if entry is not None and timely(entry, lookup, now) else None)
        return entries

    def _unsealed(
        self, digest: bytes, blob: bytes, is_owned: bool, token: str | None
    ) -> Entry | None:
        if is_owned:
            if token is not None and blob[-_TOKEN_LENGTH:] != token.encode("latin-1"):
                return None
            blob = blob[:-_TOKEN_LENGTH]
        try:
            return unpack_as(digest, blob, self.value_serde)
        except DamagedEntry:
            self._tally.add(damaged=1)
            return None

    def _writing(self, key: FullKey, entry: Entry, lease: Lease | None) -> Steps[bool]:
        if self._closed:
            return False
        token = lease.token if lease is not None else ""
        write = partial(self._write, key_digest(key), owned(key[0]), entry, token)
        (reply,) = yield [(yield write) if len(entry.payload) > _LARGE else write()]
        return self._stored(reply)

    def _write(self, digest: bytes, is_owned: bool, entry: Entry, token: str) -> Command:
        milliseconds = 0
        if entry.expires is not None:
            seconds = min(entry.expires - self.clock(), _LONGEST)
            milliseconds = max(1, math.ceil(seconds * 1000))
        name, lease, channel = [
            self._digest_name(kind, digest, is_owned) for kind in (_ENTRY, "l", "w")
        ]
        blob = pack_as(digest, entry, self.value_serde)
        if not is_owned:
            return (_WRITE, 2, name, lease, token, milliseconds, channel, blob)
        owner, rest = _halves(digest)
        keys = (name, lease, self._name("n", owner), self._name("t", owner))
        return (
            *(_WRITE_OWNED, 4, *keys, token, milliseconds, channel, blob),
            *(rest, new_token(), _TOKEN_SECONDS),
        )

    def _stored(self, reply: Any) -> bool:
        if _good(reply) != 1:
            if reply == -1:
                self._tally.add(refused=1)
            return False
        self._tally.add(writes=1)
        return True

    def _copying(
        self, source: Namespace, target: Namespace, deps: Mapping[str, tuple[str, str]]
    ) -> Steps[int]:
        if self._closed or not (owned(source) and owned(target)):
            return 0
        first, second = namespace_digest(tuple(source)), namespace_digest(tuple(target))
        copied = 0
        names = yield from self._all_members(first.hex())
        for at in range(0, len(names), _COPIES):
            rests = [bytes.fromhex(name.decode()) for name in names[at : at + _COPIES]]
            entries, current = yield from self._of_owner(first, rests)
            copies = self._copied(entries, current, deps)
            writes = [
                self._write(second + rest, True, entry, "")
                for rest, entry in zip(rests, copies, strict=True)
                if entry is not None
            ]
            if writes:
                copied += sum([self._stored(reply) for reply in (yield writes)])
        return copied

    def _purging(self, namespace: Namespace) -> Steps[int]:
        self.must_be_open()
        if not owned(namespace):
            return 0
        first, purged = namespace_digest(tuple(namespace)), 0
        names = yield from self._all_members(first.hex())
        for at in range(0, len(names), _COPIES):
            some = names[at : at + _COPIES]
            rests = [bytes.fromhex(name.decode()) for name in some]
            spent = self._spent(*(yield from self._of_owner(first, rests)))
            doomed = [name for name, is_spent in zip(some, spent, strict=True) if is_spent]
            if doomed:
                yield from self._unlink(first, doomed)
            purged += len(doomed)
        return purged

    def _of_owner(
        self, first: bytes, rests: Sequence[bytes]
    ) -> Steps[tuple[list[Entry | None], dict[str, str]]]:
        """Entries of an owned namespace, and the current tokens of their tags."""
        own = first.hex()
        blobs = yield from self._get(
            [self._digest_name(_ENTRY, first + rest, True) for rest in rests]
            + [self._name("t", own)]
        )
        token = _tokens([own], blobs[-1:]).get(own, "")
        entries = [
            self._unsealed(first + rest, blob, True, token) if blob is not None else None
            for rest, blob in zip(rests, blobs[:-1], strict=True)
        ]
        tags = {tag for entry in entries if entry is not None for tag, _ in entry.deps}
        return entries, (yield from self._peeking_tags(tags))

    def _all_members(self, owner: str) -> Steps[list[bytes]]:
        """All names in an index."""
        names: list[bytes] = []
        while len(names) % _SCAN == 0:
            more = yield from self._members(owner, len(names))
            names += more
            if not more:
                break
        return names

    def _members(self, owner: str, start: int) -> Steps[list[bytes]]:
        """Up to ``_SCAN`` names in an index, from the one at ``start`` on."""
        (reply,) = yield [("ZRANGE", self._name("n", owner), start, start + _SCAN - 1)]
        if _is_wrong_type(reply):
            return []  # nothing of ours
        return [name for name in _good(reply) if _MEMBER.fullmatch(name)]

    def _clearing(self, namespaces: Sequence[Namespace] | None) -> Steps[float]:
        """Returns for how many seconds somebody may not have noticed."""
        self.must_be_open()
        if namespaces is not None and not namespaces:
            return 0.0
        if namespaces is None:
            yield from self._delete("t")
            if self._listener is not None:
                self._listener.view.flush()
            replies = yield self._views
            yield from self._delete("e")
            yield from self._delete("n")
            return self._unnoticed(replies)
        tags = {namespace_tag(tuple(namespace)): owned(namespace) for namespace in namespaces}
        wait = yield from self._dropping(list(tags))
        for owner in [tag for tag, is_owned in tags.items() if is_owned]:
            yield from self._unlink_owned(owner)
        # an entry's name begins with its namespace's digest
        others = [tag for tag, is_owned in tags.items() if not is_owned]
        if others:
            yield from self._delete("e", others)
        return wait

    def _unlink_owned(self, owner: str) -> Steps[None]:
        """Delete what the index of an owned namespace names."""
        more = True
        while more:
            names = yield from self._members(owner, 0)
            if not names:
                return
            more = len(names) == _SCAN
            yield from self._unlink(bytes.fromhex(owner), names)

    def _unlink(self, first: bytes, names: Sequence[bytes]) -> Steps[None]:
        """Delete entries of an owned namespace, and their names from its index."""
        keys = [
            self._digest_name(_ENTRY, first + bytes.fromhex(name.decode()), True) for name in names
        ]
        index = self._name("n", first.hex())
        (reply,) = yield [(_UNLINK_OWNED, 1 + len(keys), index, *keys, *names)]
        _good(reply)

    def _delete(self, kind: str, starts: Sequence[str] = ("",)) -> Steps[None]:
        """Delete our keys of this kind whose names begin so, in one walk; others are left alone."""
        start = starts[0] if len(starts) == 1 else ""
        pattern = f"{self._root}{kind}*:{{{start}*"
        ours = re.compile(
            rf"{re.escape(self._root)}{kind}\d*:\{{({'|'.join(starts)})[0-9a-f]*\}}"
            r"([0-9a-f]{32})?".encode()
        )
        names: list[bytes]
        if self._source.cluster is not None:
            line = self._line
            assert isinstance(line, ClusterLine)
            names = [name for name in line.scan(pattern, _SCAN) if ours.fullmatch(name)]
            for at in range(0, len(names), _SCAN):
                for reply in (yield [("UNLINK", name) for name in names[at : at + _SCAN]]):
                    _good(reply)
            return
        cursor: Any = b"0"
        while True:
            (reply,) = yield [("SCAN", cursor, "MATCH", pattern, "COUNT", _SCAN)]
            cursor, found = _good(reply)
            names = [name for name in found if ours.fullmatch(name)]
            if names:
                (reply,) = yield [("UNLINK", *names)]
                _good(reply)
            if cursor == b"0":
                return

    # -- tags -------------------------------------------------------------------------------------

    def _peeking_tags(self, tags: Collection[str]) -> Steps[dict[str, str]]:
        if self._closed or not tags:
            return {}
        since, names = self._mark(), [self._name("t", tag) for tag in tags]
        current = _tokens(tags, (yield from self._get(names)))
        self._learn(since, current)
        return current

    def _taking(self, tags: Sequence[str]) -> Steps[tuple[str, ...]]:
        if self._closed or not tags:
            return tuple([new_token() for _ in tags])
        since, unique = self._mark(), list(dict.fromkeys(tags))
        current: dict[str, str] = {}
        for at in range(0, len(unique), _SCAN):
            some = unique[at : at + _SCAN]
            names = [self._name("t", tag) for tag in some]
            gets = self._gets(names)
            replies = yield [*gets, *[("PTTL", name) for name in names]]
            current.update(_tokens(some, _values(replies[: len(gets)])))
            left = dict(zip(some, replies[len(gets) :], strict=True))
            commands: list[Command] = []
            for tag, name in zip(some, names, strict=True):
                if tag not in current:
                    commands.append(("SET", name, new_token(), "NX", "EX", _TOKEN_SECONDS))
                    commands.append(("GET", name))
                elif 0 <= _good(left[tag]) < _TOKEN_SECONDS * 500:
                    commands.append(("EXPIRE", name, _TOKEN_SECONDS))
            if commands:
                made = [tag for tag in some if tag not in current]
                replies = yield commands
                got = [r for c, r in zip(commands, replies, strict=True) if c[0] == "GET"]
                # where something else has a tag's name, nothing is served; others have theirs
                current.update(_tokens(made, _values(got)))
                for command, reply in zip(commands, replies, strict=True):
                    if command[0] != "GET":
                        _good(reply)
        self._learn(since, current)
        # one that was dropped meanwhile: a token that matches nothing
        return tuple([current.get(tag) or new_token() for tag in tags])

    def _dropping(self, tags: Sequence[str]) -> Steps[float]:
        """Returns for how many seconds somebody may not have noticed."""
        self.must_be_open()
        if not tags:
            return 0.0
        names = [self._name("t", tag) for tag in tags]
        drops: list[Command] = [("UNLINK", *names)]
        if self._source.cluster is not None:
            drops = [("UNLINK", name) for name in names]
        try:
            replies = yield [*drops, *self._views]
        finally:
            # whatever came of it: it may have been carried out
            if self._listener is not None:
                self._listener.view.forget(tags)
        for reply in replies[: len(drops)]:
            _good(reply)
        return self._unnoticed(replies[len(drops) :])

    @property
    def _own_view(self) -> bytes:
        return self._listener.own if self._listener is not None else b"-"

    @property
    def _views(self) -> list[Command]:
        """Asks who keeps a view, this cache's own apart: by connections, and by what the server
        remembers of those whose connection it dropped."""
        if self._source.cluster is not None:
            return []  # none do
        return [
            ("PUBSUB", "NUMSUB", self._presence, self._own_view),
            ("ZRANGE", self._viewers, 0, 1),
        ]

    def _unnoticed(self, replies: Sequence[Any]) -> float:
        """Seconds until nobody else relies on what is gone, by the answers to ``_views``."""
        if not replies:
            return 0.0
        connected, remembered = replies
        if isinstance(connected, Exception) or isinstance(remembered, Exception):
            return VIEW_SECONDS  # not allowed to ask: there may be some
        # names and numbers in turn, or in RESP3 maybe a mapping
        views, mine = connected.values() if isinstance(connected, dict) else connected[1::2]
        if views > mine or any(view != self._own_view for view in remembered):
            return VIEW_SECONDS
        return 0.0

    def _restarted(self, line: Line | ClusterLine | AsyncLine) -> Steps[float]:
        """Seconds for which others may rely on a view that the server has forgotten in a crash."""
        age = time.monotonic() - line.connected
        if self._closed or age >= VIEW_SECONDS:
            return 0.0  # what it forgot, it forgot before this connection
        (reply,) = yield [("INFO", "server")]
        up = re.search(rb"uptime_in_seconds:(\d+)", reply) if isinstance(reply, bytes) else None
        return VIEW_SECONDS if up is None or int(up[1]) <= 1 else 0.0

    # -- leases -----------------------------------------------------------------------------------

    def _acquiring(self, key: FullKey) -> Steps[Lease | None]:
        lease = Lease(key, new_token(), self.clock() + self.lease_seconds)
        if self._closed:
            return lease  # nobody to share the result with: compute
        try:
            (reply,) = yield [(_ACQUIRE, 1, self._lease_name(key), lease.token, self._lease_ms)]
        except BaseException:  # who asked is gone (cancelled, say), and may have been granted it
            self._take_back(lease)
            raise
        if _good(reply) == -1:
            raise ValueError(f"{self._lease_name(key)!r} in Redis is not a lease of this library")
        return lease if reply == 1 else None

    def _renewing(self, lease: Lease) -> Steps[Lease | None]:
        (renewed,) = yield from self._renewing_all([lease], strict=True)
        return renewed

    def _renewing_all(
        self, leases: Sequence[Lease], strict: bool = False
    ) -> Steps[list[Lease | None]]:
        if self._closed:
            return [None] * len(leases)
        expires = self.clock() + self.lease_seconds
        replies = yield [
            (_RENEW, 1, self._lease_name(lease.key), lease.token, self._lease_ms)
            for lease in leases
        ]
        renewed: list[Lease | None] = []
        for lease, reply in zip(leases, replies, strict=True):
            if isinstance(reply, Exception) and not strict:
                renewed.append(lease)  # as it was
            else:
                held = _good(reply) == 1
                renewed.append(lease._replace(expires=expires) if held else None)
        return renewed

    def _releasing(self, lease: Lease) -> Steps[None]:
        if self._closed:
            return
        try:
            (reply,) = yield [self._release(lease)]
        except BaseException:
            self._take_back(lease)
            raise
        _good(reply)

    def _release(self, lease: Lease) -> Command:
        channel = self._key_name("w", lease.key)
        return (_RELEASE, 1, self._lease_name(lease.key), lease.token, channel)

    def _lease_left(self, key: FullKey) -> Steps[float]:
        """For how many seconds the lease of ``key`` is still held."""
        if self._closed:
            return 0.0
        (reply,) = yield [("PTTL", self._lease_name(key))]
        left: int = _good(reply)
        return max(0.0, (left + 1) / 1000)

    def _lease_name(self, key: FullKey) -> str:
        return self._key_name("l", key)

    @property
    def _lease_ms(self) -> int:
        return math.ceil(self.lease_seconds * 1000)

    # -- names ------------------------------------------------------------------------------------

    def _key_name(self, kind: str, key: FullKey) -> str:
        return self._digest_name(kind, key_digest(key), owned(key[0]))

    def _digest_name(self, kind: str, digest: bytes, is_owned: bool) -> str:
        if not is_owned:
            return self._name(kind, digest.hex())
        owner, rest = _halves(digest)
        return self._name(kind, owner) + rest

    def _name(self, kind: str, rest: str) -> str:
        return f"{self._root}{kind}:{{{rest}}}"

    def _gets(self, names: Sequence[str]) -> list[Command]:
        if self._source.cluster is not None:
            return [("GET", name) for name in names]
        return [("MGET", *names[at : at + _AT_ONCE]) for at in range(0, len(names), _AT_ONCE)]

    def _get(self, names: Sequence[str]) -> Steps[list[Any]]:
        return _values((yield self._gets(names)))

    def _mark(self) -> int:
        return self._listener.view.mark() if self._listener is not None else -1

    def _learn(self, since: int, tokens: Mapping[str, str]) -> None:
        if self._listener is not None and since >= 0:
            self._listener.view.learn(since, tokens)


def _halves(digest: bytes) -> tuple[str, str]:
    """Of a key's digest: what stands for its namespace, and for its name."""
    return digest[:16].hex(), digest[16:].hex()


def _good(reply: Any) -> Any:
    if isinstance(reply, Exception):
        raise reply
    return reply


def _is_wrong_type(reply: Any) -> bool:
    return isinstance(reply, Exception) and str(reply).startswith("WRONGTYPE")


def _values(replies: Iterable[Any]) -> list[Any]:
    """What ``GET`` and ``MGET`` found; what is no string is nothing of ours."""
    values: list[Any] = []
    for reply in replies:
        if isinstance(reply, list):
            values += reply
        elif _is_wrong_type(reply):
            values.append(None)
        else:
            values.append(_good(reply))
    return values


def _tokens(tags: Iterable[str], values: Iterable[Any]) -> dict[str, str]:
    return {
        tag: value.decode("latin-1")
        for tag, value in zip(tags, values, strict=True)
        if value is not None
    }
