"""Conversations that come again as other objects: each run reads its own from a checkpoint.

A conversation is known by the id of its first message. From its second time on, digests of all that
its messages hold, packed by C a few dozen messages at a time, are remembered; when it comes again,
what it begins with is recognised by them, in half the time that hashing its rows takes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from sys import getsizeof
from typing import Any, NamedTuple

import ormsgpack
from langchain_core.messages import BaseMessage

from langgraph_perf._canonical import SNAPSHOT_OPTIONS, Unkeyable, packed
from langgraph_perf._locks import new_lock
from langgraph_perf._message_rows import extra_of, kind_of, own_of

CHUNK = 32
"""How many messages are packed at a time; what is left over is keyed like new."""
MOST_BYTES = 4 * 2**20
_MOST_OF_ONE = 2**20
"""Bytes that are kept of one conversation."""
_COST = 600
"""Bytes a conversation takes, and each of its chunks, besides the ids."""
_ID_COST = 16
_LONGEST_ID = 200
_MOST_MISFITS = 10
_Key = tuple[int, str]


class Said(NamedTuple):
    """What some messages say.

    Attributes:
        hash: the state of the hash. It is SHA-256: the processors' own, it takes half of BLAKE2b's
            time on long texts.
        ids: the tool-call ids in it, with their numbers.
        kinds: the classes met whose methods, and values such as an enum's, are not in the hash.
    """

    hash: Any
    ids: dict[str, int]
    kinds: set[type]

    @classmethod
    def nothing(cls) -> Said:
        """What no messages say."""
        return cls(sha256(), {}, set())

    def copy(self) -> Said:
        """The same, to go on from."""
        return Said(self.hash.copy(), self.ids.copy(), self.kinds.copy())


class _Chunk(NamedTuple):
    """Consecutive messages.

    Attributes:
        digest: of all that they hold.
        hash: its state after them.
        ids: the tool-call ids that come up in them first.
    """

    digest: bytes
    hash: Any
    ids: tuple[str, ...]


class _Known(NamedTuple):
    """What is known of one conversation.

    Attributes:
        chunks: its first ones; none until it comes for the second time.
        misfits: how often it came and went on in another way.
        waits: how many times more it has to come before that is kept.
    """

    chunks: tuple[_Chunk, ...] = ()
    misfits: int = 0
    waits: int = 0


_met: OrderedDict[_Key, _Known] = OrderedDict()
_bytes = 0
_writing = new_lock()


def forget() -> None:
    """Drop everything."""
    global _bytes
    with _writing:
        _met.clear()
        _bytes = 0


def beginning(
    messages: list[BaseMessage], absorb: Callable[[list[BaseMessage], Said], object]
) -> tuple[int, Said]:
    """What is known of the beginning of ``messages``.

    Args:
        messages: at least ``CHUNK``, all of them messages.
        absorb: adds to the last argument what messages say.

    Returns:
        how many of them, and what these say.
    """
    key = _key_of(messages[0])
    if key is None:
        return 0, Said.nothing()
    known = _met.get(key)
    if known is None:
        _keep(key, _Known())
        return 0, Said.nothing()
    ids: list[str] = []
    count = 0
    for chunk in known.chunks:
        raw = _held(messages, count)
        if raw is None or sha256(raw).digest() != chunk.digest:
            break
        ids += chunk.ids
        count += 1
    said = Said.nothing()
    if count:
        hash = known.chunks[count - 1].hash.copy()
        said = Said(hash, {name: n for n, name in enumerate(ids)}, set())
    fits = known.chunks[:count]
    if count < min(len(known.chunks), len(messages) // CHUNK):
        # many conversations may begin with a message of this id, and to learn each would take
        # longer than it saves
        misfits = known.misfits + 1
        _keep(key, _Known(fits, misfits, 2 ** min(misfits, _MOST_MISFITS)))
    elif known.waits:
        _keep(key, known._replace(waits=known.waits - 1))
    else:
        added, said = _added(messages, count, said, absorb, _MOST_OF_ONE - _size(key, known))
        if added:
            _keep(key, known._replace(chunks=(*fits, *added)))
            return (count + len(added)) * CHUNK, said
        with suppress(KeyError):  # another thread has just dropped it
            _met.move_to_end(key)
    return count * CHUNK, said


def _added(
    messages: list[BaseMessage],
    count: int,
    said: Said,
    absorb: Callable[[list[BaseMessage], Said], object],
    room: int,
) -> tuple[list[_Chunk], Said]:
    """The chunks after the first ``count``, in so many bytes, and what all say then."""
    added: list[_Chunk] = []
    for index in range(count, len(messages) // CHUNK):
        raw = _held(messages, index)
        # what is absorbed is made of the bytes: another thread may be changing the messages
        copies = raw and _unpacked(raw, messages[index * CHUNK : (index + 1) * CHUNK])
        if not raw or not copies:
            break
        after = said.copy()
        try:
            absorb(copies, after)
        except Unkeyable:
            break  # whose path is to be told by who knows where the messages are
        new_ids = (*after.ids,)[len(said.ids) :]
        chunk = _Chunk(sha256(raw).digest(), after.hash.copy(), new_ids)
        room -= _size_of(chunk)
        if room < 0:
            break
        added.append(chunk)
        said = after
    return added, said


def _unpacked(raw: bytes, messages: list[BaseMessage]) -> list[BaseMessage] | None:
    """Messages that hold what ``raw`` says; ``None`` if that stands for more than plain data."""
    try:
        serials, *owns = ormsgpack.unpackb(raw)
    except ValueError:
        return None
    if packed(owns, SNAPSHOT_OPTIONS) is None:
        return None
    copies = []
    for serial, own, message in zip(serials, owns, messages, strict=True):
        kind = type(message)
        if kind_of(kind).serial != serial:
            return None  # another thread gave it another class
        copy = kind.__new__(kind)
        object.__setattr__(copy, "__dict__", own)
        for name in ("__pydantic_extra__", "__pydantic_private__"):
            object.__setattr__(copy, name, None)
        copies.append(copy)
    return copies


def _key_of(message: BaseMessage) -> _Key | None:
    name = own_of(message).get("id")
    if type(name) is not str or len(name) > _LONGEST_ID:
        return None
    return kind_of(type(message)).serial, name


def _held(messages: list[BaseMessage], index: int) -> bytes | None:
    """All that the messages of one chunk hold; ``None`` if that is more than data in their fields,
    or there are fewer."""
    messages = messages[index * CHUNK : (index + 1) * CHUNK]
    if len(messages) < CHUNK or any(map(extra_of, messages)):
        return None
    types = [*map(type, messages)]
    kinds = {kind: kind_of(kind) for kind in set(types)}
    if any(kind.size < 0 for kind in kinds.values()):
        return None
    serials = [kinds[kind].serial for kind in types]
    try:
        return ormsgpack.packb([serials, *map(own_of, messages)], None, SNAPSHOT_OPTIONS)
    except Exception:  # something that only the general way encodes or refuses
        return None


def _keep(key: _Key, known: _Known) -> None:
    global _bytes
    size = _size(key, known)
    with _writing:
        old = _met.pop(key, None)
        if old is not None:
            _bytes -= _size(key, old)
        _met[key] = known
        _bytes += size
        while _bytes > MOST_BYTES:
            oldest, old = _met.popitem(last=False)
            _bytes -= _size(oldest, old)


def _size(key: _Key, known: _Known) -> int:
    return _COST + getsizeof(key[1]) + sum(map(_size_of, known.chunks))


def _size_of(chunk: _Chunk) -> int:
    return _COST + sum([_ID_COST + getsizeof(name) for name in chunk.ids])
