"""Conversations that come again as other objects: each run reads its own from a checkpoint.

A conversation is known by the id of its first message. From its second time on, all that its
messages hold is kept, packed by C, a few dozen messages at a time; when it comes again, what it
begins with is packed and compared, which takes a third of the time that hashing its rows does.

Kept is a copy of what the messages say, in the memory of this process and never more than
``MOST_BYTES``; it is dropped whenever a thread is deleted.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import ormsgpack
from langchain_core.messages import BaseMessage

from langgraph_perf._canonical import SNAPSHOT_OPTIONS, packed
from langgraph_perf._locks import new_lock
from langgraph_perf._message_rows import extra_of, kind_of, own_of

CHUNK = 32
"""How many messages are packed at a time; what is left over is keyed like new."""
MOST_BYTES = 4 * 2**20
_MOST_OF_ONE = 2**20
"""Bytes that are kept of one conversation, about."""
_COST = 600
"""Bytes a chunk takes besides its messages."""
_MOST_MISFITS = 10
_Key = tuple[int, str]


class Said(NamedTuple):
    """What some messages say: the state of the hash, and the tool-call ids in it with numbers."""

    hash: Any
    ids: dict[str, int]


class _Chunk(NamedTuple):
    """Consecutive messages.

    Attributes:
        raw: all that they hold.
        hash: its state after them.
        ids: the tool-call ids that come up in them first.
    """

    raw: bytes
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
    messages: list[BaseMessage], new: Said, absorb: Callable[[int, int, Said], object]
) -> tuple[int, Said]:
    """What is known of the beginning of ``messages``.

    Args:
        messages: at least ``CHUNK``, all of them messages.
        new: what no messages say.
        absorb: adds to the last argument what the messages between two indices say.

    Returns:
        how many of them, and what these say.
    """
    key = _key_of(messages[0])
    if key is None:
        return 0, new
    known = _met.get(key)
    if known is None:
        _keep(key, _Known())
        return 0, new
    ids: list[str] = []
    count = 0
    for chunk in known.chunks:
        if _held(messages, count) != chunk.raw:
            break
        ids += chunk.ids
        count += 1
    if count:
        new = Said(known.chunks[count - 1].hash.copy(), {name: n for n, name in enumerate(ids)})
    fits = known.chunks[:count]
    if count < min(len(known.chunks), len(messages) // CHUNK):
        # many conversations may begin with a message of this id, and to keep each would take longer
        # than it saves
        misfits = known.misfits + 1
        _keep(key, _Known(fits, misfits, 2 ** min(misfits, _MOST_MISFITS)))
    elif known.waits:
        _keep(key, known._replace(waits=known.waits - 1))
    else:
        added, new = _added(messages, count, new, absorb, _MOST_OF_ONE - _size(known))
        if added:
            _keep(key, known._replace(chunks=(*known.chunks[:count], *added)))
            return (count + len(added)) * CHUNK, new
        with suppress(KeyError):  # another thread has just dropped it
            _met.move_to_end(key)
    return count * CHUNK, new


def _added(
    messages: list[BaseMessage],
    count: int,
    said: Said,
    absorb: Callable[[int, int, Said], object],
    room: int,
) -> tuple[list[_Chunk], Said]:
    """The chunks after the first ``count``, in so many bytes, and what all say then."""
    added: list[_Chunk] = []
    for index in range(count, len(messages) // CHUNK):
        start, end = index * CHUNK, (index + 1) * CHUNK
        raw = _held(messages, index)
        if raw is None or len(raw) > room:
            break
        # what packs to the same bytes as plain data is plain: it takes to be found out only once
        if packed([*map(own_of, messages[start:end])], SNAPSHOT_OPTIONS) is None:
            break
        after = Said(said.hash.copy(), said.ids.copy())
        absorb(start, end, after)
        if _held(messages, index) != raw:
            break  # another thread changed a message meanwhile, nobody knows when
        added.append(_Chunk(raw, after.hash.copy(), (*after.ids,)[len(said.ids) :]))
        room -= _size_of(added[-1])
        said = after
    return added, said


def _key_of(message: BaseMessage) -> _Key | None:
    name = own_of(message).get("id")
    return (kind_of(type(message)).serial, name) if type(name) is str else None


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
    size = _size(known)
    with _writing:
        old = _met.pop(key, None)
        if old is not None:
            _bytes -= _size(old)
        _met[key] = known
        _bytes += size
        while _bytes > MOST_BYTES:
            _, old = _met.popitem(last=False)
            _bytes -= _size(old)


def _size(known: _Known) -> int:
    return _COST + sum(map(_size_of, known.chunks))


def _size_of(chunk: _Chunk) -> int:
    return _COST + len(chunk.raw) + 100 * len(chunk.ids)
