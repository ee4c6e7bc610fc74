"""The encoder of a node's input, and what it remembers: conversations.

A conversation is keyed again and again, with a few more messages each time. So a list of messages
is hashed one message after the other, and the states of the hash are remembered with the first
message, for as long as that lives. When a list begins with the same messages, unchanged, only the
rest of it is hashed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from hashlib import blake2b
from operator import getitem
from typing import Any, ClassVar, NamedTuple

import ormsgpack
from langchain_core.messages import BaseMessage

from langgraph_perf._canonical import (
    PACK_OPTIONS,
    IdentityMap,
    Plan,
    Unkeyable,
    builtin_plan,
    general_list,
    mro_of,
    plain,
    refuse,
    text,
)
from langgraph_perf._message_rows import (
    DIGEST_SIZE,
    MessageKind,
    NumberingEncoder,
    Shadow,
    extra_of,
    kind_of,
    own_of,
)
from langgraph_perf._value_types import value_plan

_MAX_SEGMENTS = 16


class KeyEncoder(NumberingEncoder):
    """Knows every type a node's input may hold."""

    __slots__ = ()

    plans: ClassVar[IdentityMap]

    def plan_for(self, kind: type) -> Plan:
        if _is_message(kind):
            return _message
        if kind is list:
            return _list
        return value_plan(kind) or builtin_plan(kind) or refuse(kind)


def content_digest(message: BaseMessage) -> bytes:
    """The digest of what one message says; see ``_message_rows``.

    Raises:
        Unkeyable: a field holds what cannot be keyed.
    """
    digest: bytes = _alone(message, 0).hash.digest()
    return digest


def forget() -> None:
    """Drop every remembered conversation."""
    _conversations.entries.clear()


def _is_message(kind: type) -> bool:
    return BaseMessage in mro_of(kind)


def _message(encoder: KeyEncoder, message: BaseMessage) -> bytes:
    return b"G" + _token(encoder, _alone(message, encoder.depth))


def _list(encoder: KeyEncoder, value: list[Any]) -> bytes:
    if value and _is_message(type(value[0])):
        value = value.copy()  # another thread may append meanwhile
        said = _conversation(value, encoder.depth)
        if said is not None:
            return b"L%d:%b" % (len(value), _token(encoder, said))
    return plain(value) or general_list(encoder, value)


class _Said(NamedTuple):
    """What some messages say: the state of the hash, and the tool-call ids in it with numbers."""

    hash: Any
    ids: dict[str, int]


def _token(encoder: NumberingEncoder, said: _Said) -> bytes:
    """What stands for some messages in ``encoder``'s traversal: the digest of what they say, and
    for each of their tool-call ids, the number that it has in the traversal."""
    count = len(said.ids)
    numbers: Iterable[int] = range(count)
    if encoder.ids:
        numbers = map(encoder.number, said.ids)
    else:
        encoder.ids.update(said.ids)
    return b"%b%d:%b" % (said.hash.digest(), count, struct.pack(f">{count}I", *numbers))


class _Segment:
    """Consecutive messages of a conversation, and what shows that they have not changed.

    Attributes:
        kinds: the messages' types.
        owns, extras, blanks: of all their shadows.
        places, names, raws: of their fields that are not just text, the message's index, the
            field's name and the packed value.
        said: what the conversation says up to the end of this segment.
    """

    __slots__ = ("blanks", "extras", "kinds", "names", "owns", "places", "raws", "said")

    def __init__(self) -> None:
        self.kinds: list[type] = []
        self.owns: list[Any] = []
        self.extras: list[Any] = []
        self.blanks: list[Any] = []
        self.places: list[int] = []
        self.names: list[str] = []
        self.raws: list[bytes] = []
        self.said = _Said(None, {})

    def holds(self, messages: list[BaseMessage]) -> bool:
        """Whether these are the messages, unchanged. There may be thousands: the loops are C's."""
        try:
            owns = list(map(own_of, messages))
            return (
                not any(self.blanks)
                and list(map(type, messages)) == self.kinds
                and owns == self.owns
                and list(map(extra_of, messages)) == self.extras
                and (not self.names or self._pack(owns) == b"".join(self.raws))
            )
        except Exception:  # a foreign object that does not let itself be compared
            return False

    def _pack(self, owns: list[dict[str, Any]]) -> bytes:
        values = [*map(getitem, map(owns.__getitem__, self.places), self.names)]
        return _without_header(ormsgpack.packb(values, None, PACK_OPTIONS), len(values))

    def add(self, kind: type, shadow: Shadow) -> None:
        """Append a message."""
        self.places += [len(self.kinds)] * len(shadow.names)
        self.kinds.append(kind)
        self.owns.append(shadow.own)
        self.extras.append(shadow.extra)
        self.blanks += shadow.blanks
        self.names += shadow.names
        self.raws += shadow.raws

    def extend(self, other: _Segment) -> None:
        """Append what follows."""
        self.places += [len(self.kinds) + place for place in other.places]
        for name in ("kinds", "owns", "extras", "blanks", "names", "raws"):
            getattr(self, name).extend(getattr(other, name))
        self.said = other.said


_conversations = IdentityMap(256)
"""The segments of the conversation that last began with this message object."""


def _conversation(messages: list[Any], depth: int) -> _Said | None:
    """What a list says that begins with a message; ``None`` if it goes on with something else."""
    found = _conversations.entries.get(id(messages[0]))
    known: tuple[_Segment, ...] = found[0] if found else ()
    said = _Said(blake2b(digest_size=DIGEST_SIZE), {})
    start = count = 0
    for segment in known:
        end = start + len(segment.kinds)
        if end > len(messages) or not segment.holds(messages[start:end]):
            break
        start, count, said = end, count + 1, segment.said
    if start == len(messages):
        return said
    if not all(map(_is_message, set(map(type, messages[start:])))):
        return None
    # segments never change, because other threads may be reading them
    new, said = _absorb(messages, start, _Said(said.hash.copy(), said.ids.copy()), depth)
    if new.kinds:
        _conversations.put(messages[0], _merged((*known[:count], new)))
    return said


def _merged(segments: tuple[_Segment, ...]) -> tuple[_Segment, ...]:
    """At most so many segments, so that walking them stays quick; the older half becomes one."""
    if len(segments) <= _MAX_SEGMENTS:
        return segments
    first = _Segment()
    for segment in segments[: _MAX_SEGMENTS // 2]:
        first.extend(segment)
    return first, *segments[_MAX_SEGMENTS // 2 :]


def _alone(message: BaseMessage, depth: int) -> _Said:
    """One message alone: too little to be worth remembering."""
    try:
        return _absorb([message], 0, _Said(blake2b(digest_size=DIGEST_SIZE), {}), depth)[1]
    except Unkeyable as exc:
        exc.path = exc.path.removeprefix("[0]")
        raise


def _absorb(
    messages: list[BaseMessage], start: int, said: _Said, depth: int
) -> tuple[_Segment, _Said]:
    """Add to ``said`` the messages from ``start`` on.

    Returns:
        what may be remembered, which ends before the first message that may change unseen; and
        ``said``.
    """
    encoder = KeyEncoder()
    encoder.depth, encoder.ids = depth, said.ids
    rows: list[Any] = []
    segment, sure = _Segment(), True
    for index in range(start, len(messages)):
        message = messages[index]
        kind = kind_of(type(message))
        own, extra = own_of(message), extra_of(message)
        row: list[Any] | None = None
        # the copy comes first: if another thread changes the message meanwhile, it will show
        copy = own.copy()
        if not extra and len(copy) == kind.size:
            row = _simple(kind, copy, encoder)
        if row is not None and sure:
            segment.kinds.append(type(message))
            segment.owns.append(copy)
            segment.extras.append(extra)
            segment.blanks += kind.containers(copy)
            segment.blanks.append(extra)
        elif row is None:
            shadow = kind.shadow(copy, extra) if sure else None
            if shadow is not None:
                segment.add(type(message), shadow)
            elif sure:
                _hash(said, rows)
                rows, sure = [], False
                segment.said = _Said(said.hash.copy(), said.ids.copy())
            try:
                row = kind.full(message, encoder)
            except Unkeyable as exc:
                exc.within(f"[{index}]")
                raise
        rows.append(row)
    _hash(said, rows)
    if sure:
        segment.said = said
    return segment, said


def _simple(kind: MessageKind, own: dict[str, Any], encoder: NumberingEncoder) -> list[Any] | None:
    """The row of a message that holds nothing but text, as most do; ``None`` for others."""
    try:
        if any(kind.containers(own)):
            return None
        values = kind.values(own)
    except KeyError:  # made by model_construct
        return None
    for value in values:
        if type(value) is not str and value is not None:
            return None
    call_id = own.get("tool_call_id")
    if call_id is None:
        return [kind.head, None, *values]
    return [kind.head, encoder.number(call_id), *values] if type(call_id) is str else None


def _hash(said: _Said, rows: list[Any]) -> None:
    """Take in rows. Each is self-delimiting, so it does not matter how many come at a time."""
    try:
        raw = ormsgpack.packb(rows)
    except TypeError:  # lone surrogates, which msgpack does not know
        raw = ormsgpack.packb(_encodable(rows))
    said.hash.update(_without_header(raw, len(rows)))


def _without_header(raw: bytes, count: int) -> bytes:
    """The items of a packed array, without how many they are."""
    return raw[1 if count < 16 else 3 if count < 65536 else 5 :]


def _encodable(value: Any) -> Any:
    """The same with strings that hold lone surrogates as bytes; no other cell has such bytes."""
    if type(value) is list:
        return [_encodable(item) for item in value]
    if type(value) is str and not value.isascii():
        return value if value.encode(errors="ignore").decode() == value else text(value)
    return value
