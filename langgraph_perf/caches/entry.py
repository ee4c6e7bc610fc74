"""What caches store and how it looks at rest: entries, tag tokens, leases.

A cache stores *entries*: opaque payload bytes with what is needed to decide whether they may be
served. Pure functions and values, no I/O.

Tags work by *tokens*. Each tag has one random token in the backend, made when it is first asked
for. An entry records the tokens its tags had **before** its computation began; it is served only
while every one of them is still current. Invalidating a tag drops its token: O(1), and whatever
was being computed meanwhile carries a dead token. A lost token (evicted, crashed) can only turn
hits into misses, never the other way round.
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Any, NamedTuple

import ormsgpack
import xxhash
from langgraph.cache.base import FullKey, Namespace
from langgraph.checkpoint.serde.base import SerializerProtocol
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer

from langgraph_perf._msgpack import unpackb


class Entry(NamedTuple):
    """One stored result.

    Attributes:
        payload: the encoded value; opaque to caches.
        created: unix seconds when the value was stored.
        expires: unix seconds from which on it is a miss; ``None`` never.
        deps: ``(tag id, token)`` pairs taken before the computation began.
        seconds: how long the computation took, which is what a hit saves.
        tokens: language-model tokens the computation spent.
        grace: the last seconds before ``expires``, in which it is stale: past its ``ttl``, and
            only for those who take stale results.
    """

    payload: bytes
    created: float
    expires: float | None = None
    deps: tuple[tuple[str, str], ...] = ()
    seconds: float = 0.0
    tokens: int = 0
    grace: float = 0.0


class Lookup(NamedTuple):
    """What to look for.

    Attributes:
        tags: ids of tags that the entry must depend on.
        max_age: seconds since it was stored; narrows the entry's expiry.
        fresh: whether an entry in its ``grace`` is a miss.
    """

    key: FullKey
    tags: tuple[str, ...] = ()
    max_age: float | None = None
    fresh: bool = False


class Lease(NamedTuple):
    """The right to compute one key, across processes, until ``expires`` (unix seconds).

    ``token`` is the fence: a write that brings a token which no longer holds the key is refused.
    """

    key: FullKey
    token: str
    expires: float


@dataclass(frozen=True, slots=True)
class CacheStats:
    """A snapshot of one cache: what it holds now, and what it did since it was opened here.

    Attributes:
        hits: lookups that found an entry; ``misses`` those that did not. A node's miss is two of
            them: its result is looked for again once it is this call's turn to compute it.
        entries: how many entries it holds; ``bytes`` how much room they take. Both are 0 of a
            ``RedisCache``, which would have to walk over all keys of the server.
        expired: entries dropped because their time was over.
        evicted: entries dropped to stay within the bounds.
        damaged: stored entries that could not be read back and counted as misses.
        refused: entries not stored because one alone is larger than the bounds.
        errors: operations of a tier that failed while the others went on (tiered caches only).
        tiers: one snapshot for each tier of a tiered cache, first tier first.
    """

    hits: int = 0
    misses: int = 0
    writes: int = 0
    invalidations: int = 0
    expired: int = 0
    evicted: int = 0
    damaged: int = 0
    entries: int = 0
    bytes: int = 0
    refused: int = 0
    errors: int = 0
    tiers: tuple[CacheStats, ...] = ()


def tag_id(tag: str) -> str:
    """The name a tag has in storage: a digest, so that no user id is ever at rest in the clear."""
    return blake2b(tag.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def new_token() -> str:
    """A fresh tag or lease token; never repeats, so a dead one can never come back to life."""
    return secrets.token_hex(8)


def namespace_tag(namespace: Namespace) -> str:
    """The id of the tag that stands for everything in ``namespace``.

    ``clear`` drops its token, in every cache. Copies of an entry that are kept elsewhere (in the
    upper tiers of a tiered cache, in any process) depend on it, and so do not survive a ``clear``.
    """
    return namespace_digest(namespace).hex()


OWNED = "langgraph_perf.owned"
"""What the namespaces of ``owned`` begin with."""


def owned(namespace: Namespace) -> bool:
    """Whether ``namespace`` is one of very many, with few entries each, that are cleared and copied
    one by one (one for each thread): backends keep what makes that O(its entries)."""
    return len(namespace) > 0 and namespace[0] == OWNED


def with_deps(entry: Entry, deps: Mapping[str, tuple[str, str]]) -> Entry:
    """``entry``, with each dependency on a tag id in ``deps`` replaced by what is there."""
    return entry._replace(deps=tuple([deps.get(dep[0], dep) for dep in entry.deps]))


@lru_cache(maxsize=1024)
def namespace_digest(namespace: Namespace) -> bytes:
    """16 bytes that stand for ``namespace``; lengths are hashed too, so no two share them."""
    digest = blake2b(digest_size=16, person=b"langgraph_perf")
    for part in namespace:
        raw = part.encode("utf-8", "surrogatepass")
        digest.update(_LENGTH.pack(len(raw)))
        digest.update(raw)
    return digest.digest()


@lru_cache(maxsize=1024)  # one call asks for its key several times: read, lease, write
def key_digest(key: FullKey) -> bytes:
    """32 bytes that stand for ``key`` in storage; the first 16 are those of its namespace."""
    name = key[1].encode("utf-8", "surrogatepass")
    return namespace_digest(key[0]) + blake2b(name, digest_size=16).digest()


def timely(entry: Entry, lookup: Lookup, now: float) -> bool:
    """Whether ``entry`` is young enough at time ``now``, whatever became of its tags."""
    if entry.expires is not None:
        ends = entry.expires - entry.grace if lookup.fresh else entry.expires
        if now >= ends:
            return False
    return lookup.max_age is None or now < entry.created + lookup.max_age


def servable(entry: Entry, lookup: Lookup, current: Mapping[str, str], now: float) -> bool:
    """Whether ``entry`` may answer ``lookup`` at time ``now``, given the tags' current tokens.

    An entry stored without one of the tags asked for is refused as well: it was written by a
    policy that did not know the dependency.
    """
    if not timely(entry, lookup, now):
        return False
    if not entry.deps:
        return not lookup.tags
    for tag, token in entry.deps:
        if current.get(tag) != token:
            return False
    return not lookup.tags or {tag for tag, _ in entry.deps}.issuperset(lookup.tags)


# -- entries at rest ----------------------------------------------------------------------------

_MAGIC = b"LGP\x02"
"""What it is and, in the last byte, the version of this format."""
_SUM = len(_MAGIC)
_META = _SUM + 16
"""Where in the head the checksum and the metadata begin."""
_JOINED = 2**13
"""Up to here, joining bytes is cheaper than a checksum of their own."""
_LENGTH = struct.Struct("<I")


class DamagedEntry(Exception):
    """Stored bytes are not an entry of this key: damaged, truncated, moved or not ours."""


def seal(
    digest: bytes, entry: Entry, serde: SerializerProtocol | None = None
) -> tuple[bytes, bytes]:
    """``entry`` as two byte strings, head and body, for backends that can keep them apart;
    ``digest`` is the key's ``key_digest``.

    The body is the payload itself: one of a megabyte is not copied. The head holds a checksum
    (XXH3, 128 bits) over everything, the key included, so that bytes found under another key are
    foreign. With a ``serde`` the body is what it makes of metadata, key and payload together:
    where it encrypts, it hides all of them, and where it authenticates, it binds them together.
    """
    meta = ormsgpack.packb(
        (entry.created, entry.expires, entry.seconds, entry.tokens, entry.deps, entry.grace)
    )
    body = entry.payload
    if serde is not None:
        encoding, body = serde.dumps_typed(
            b"".join((_LENGTH.pack(len(meta)), digest, meta, entry.payload))
        )
        meta = ormsgpack.packb(encoding)
    return b"".join((_MAGIC, _checksum(digest, meta, body), meta)), body


def unseal(
    digest: bytes, head: object, body: object, serde: SerializerProtocol | None = None
) -> Entry:
    """The entry that ``seal`` made these bytes from; ``digest`` is the key's ``key_digest``.

    Raises:
        DamagedEntry: they are not what ``seal`` made for this key with this ``serde``.
    """
    body, meta = _checked(digest, head, body)
    # the checksum keeps accidents out, not somebody who computes it too: trust no shape
    # (adding 0 refuses what is not a number)
    try:
        fields = unpackb(meta)
        if serde is not None:
            fields, body = _unlock(digest, fields, body, serde)
        created, expires, seconds, tokens, deps, grace = fields
        return Entry(
            body,
            created + 0,
            None if expires is None else expires + 0,
            tuple([(str(tag), str(token)) for tag, token in deps]) if deps else (),
            seconds + 0,
            tokens + 0,
            grace + 0,
        )
    except DamagedEntry:
        raise
    except Exception as exc:
        raise DamagedEntry(f"{type(exc).__name__}: {exc}") from None


def unbound(digest: bytes, head: object, body: object) -> bytes | None:
    """The payload that ``seal`` made these bytes from, without a ``serde``, if nothing but its key
    is to be asked of it: it never expires and depends on nothing. ``None`` of any other, also of
    what is damaged."""
    try:
        body, meta = _checked(digest, head, body)
        _, expires, _, _, deps, _ = unpackb(meta)
    except Exception:
        return None
    return body if expires is None and not deps else None


def _checked(digest: bytes, head: object, body: object) -> tuple[bytes, bytes]:
    """The body, and the metadata that are in the head.

    Raises:
        DamagedEntry: they are not what ``seal`` made for this key.
    """
    if type(head) is not bytes or type(body) is not bytes or not head.startswith(_MAGIC):
        raise DamagedEntry("not an entry of this library")
    meta = head[_META:]
    if head[_SUM:_META] != _checksum(digest, meta, body):
        raise DamagedEntry("checksum does not match")
    return body, meta


def _unlock(
    digest: bytes, encoding: Any, body: bytes, serde: SerializerProtocol
) -> tuple[Any, bytes]:
    if isinstance(serde, EncryptedSerializer) and "+" not in encoding:
        # it would pass plaintext through, which anybody could have put there
        raise DamagedEntry("not encrypted")
    plain = serde.loads_typed((encoding, body))
    (size,) = _LENGTH.unpack_from(plain)
    start = _LENGTH.size + len(digest)
    if plain[_LENGTH.size : start] != digest:
        raise DamagedEntry("encrypted for another key")
    return unpackb(plain[start : start + size]), plain[start + size :]


def pack(key: FullKey, entry: Entry, serde: SerializerProtocol | None = None) -> bytes:
    """``entry`` as one byte string; see ``seal``."""
    return pack_as(key_digest(key), entry, serde)


def pack_as(digest: bytes, entry: Entry, serde: SerializerProtocol | None = None) -> bytes:
    """Like ``pack``, with the key's ``key_digest``."""
    head, body = seal(digest, entry, serde)
    return b"".join((_LENGTH.pack(len(head)), head, body))


def unpack(key: FullKey, blob: object, serde: SerializerProtocol | None = None) -> Entry:
    """The entry that ``pack`` made ``blob`` from.

    Raises:
        DamagedEntry: it is not what ``pack`` made for this key with this ``serde``.
    """
    return unpack_as(key_digest(key), blob, serde)


def unpack_as(digest: bytes, blob: object, serde: SerializerProtocol | None = None) -> Entry:
    """Like ``unpack``, with the key's ``key_digest``."""
    if not isinstance(blob, bytes) or len(blob) < _LENGTH.size:
        raise DamagedEntry("not an entry of this library")
    (size,) = _LENGTH.unpack_from(blob)
    start = _LENGTH.size + size
    return unseal(digest, blob[_LENGTH.size : start], blob[start:], serde)


def _checksum(digest: bytes, meta: bytes, body: bytes) -> bytes:
    if len(body) > _JOINED:
        # in one go, which is what xxhash is quick at; the other sum binds this one to the rest
        body = xxhash.xxh3_128_digest(body)
    # the length keeps the border between the two from moving
    return xxhash.xxh3_128_digest(b"".join((digest, _LENGTH.pack(len(meta)), meta, body)))
