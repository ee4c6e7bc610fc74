"""The encoder of a node's input, and what it remembers: conversations.

A conversation is keyed again and again, with a few more messages each time. So a list of messages
is hashed one message after the other, and the states of the hash are remembered, from its second
time on, with the first message, for as long as that lives. When a list begins with the same
messages, unchanged, only the rest of it is hashed. For the same conversation in other objects see
``_messages_again``.
"""

from __future__ import annotations

import struct
from itertools import repeat
from operator import getitem, is_
from typing import Any, ClassVar

import ormsgpack
from langchain_core.messages import BaseMessage

from langgraph_perf import _messages_again
from langgraph_perf._canonical import (
    PACK_OPTIONS,
    SNAPSHOT_OPTIONS,
    IdentityMap,
    Plan,
    Unkeyable,
    builtin_plan,
    general_list,
    mro_of,
    packed,
    plain,
    refuse,
    text,
)
from langgraph_perf._id_places import TOOL_CALL, is_call
from langgraph_perf._message_rows import (
    NumberingEncoder,
    Shadow,
    call_record,
    call_rows,
    extra_of,
    kind_of,
    own_of,
    snapshot,
)
from langgraph_perf._messages_again import CHUNK, Said, beginning
from langgraph_perf._value_types import value_plan


class KeyEncoder(NumberingEncoder):
    """Knows every type a node's input may hold."""

    __slots__ = ()

    plans: ClassVar[IdentityMap]

    def plan_for(self, kind: type) -> Plan:
        if _is_message(kind):
            return _message
        if kind is list:
            return _list
        if kind is dict:
            return _dict
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
    _messages_again.forget()


def _is_message(kind: type) -> bool:
    return BaseMessage in mro_of(kind)


def _message(encoder: KeyEncoder, message: BaseMessage) -> bytes:
    return b"G" + _token(encoder, _alone(message, encoder.depth))


def _list(encoder: KeyEncoder, value: list[Any]) -> bytes:
    if _talks(value):
        value = value.copy()  # another thread may append meanwhile
        said = _conversation(value, encoder.depth)
        if said is not None:
            return b"L%d:%b" % (len(value), _token(encoder, said))
    raw = plain(value)
    return general_list(encoder, value) if raw is None or TOOL_CALL in raw else raw


_FEW = 16


def _talks(value: Any) -> bool:
    return type(value) is list and bool(value) and _is_message(type(value[0]))


def _dict(encoder: KeyEncoder, value: dict[Any, Any]) -> bytes:
    # to be told that it is not plain takes longer than to see a conversation in it
    talks = len(value) <= _FEW and any(map(_talks, value.values()))
    raw = None if talks else plain(value)
    if raw is not None and TOOL_CALL not in raw:
        return raw
    # one that a node is sent by itself, say
    return b"K" + call_record(encoder, value) if is_call(value) else b"m" + encoder.pairs(value)


def _token(encoder: NumberingEncoder, said: Said) -> bytes:
    """What stands for some messages in ``encoder``'s traversal: the digest of what they say, and
    for each of their tool-call ids, the number that it has in the traversal."""
    encoder.kinds |= said.kinds
    count = len(said.ids)
    raw = b""  # nearly always they are the first ones in it
    if not encoder.ids:
        encoder.ids = said.ids.copy()
    elif (numbers := [*map(encoder.number, said.ids)]) != [*range(count)]:
        raw = struct.pack(f">{count}I", *numbers)
    return b"%b%d:%d:%b" % (said.hash.digest(), count, len(raw), raw)


class _Segment:
    """Consecutive messages of a conversation, and what shows that they have not changed.

    A message counts as unchanged if it is the same object and its ``__dict__`` and its extra fields
    hold what they held. So what puts another ``__dict__`` or class into a message behind its back
    is not seen; pydantic itself does so only where assignments are validated, and such messages
    are never remembered.

    Attributes:
        messages: the messages; without the conversation's first, with which all this goes away.
        lives: their ``__dict__``s.
        owns: copies of the ``__dict__``s of all of them, the first one included.
        blanks: their empty containers.
        extras, extras_then: the extra fields of those that have some, and copies of them.
        places, names, raws: of their fields that are not just text, the message's index, the
            field's name and the packed value.
        said: what the conversation says up to the end of this segment.
    """

    _LISTS = (
        "messages",
        "lives",
        "owns",
        "blanks",
        "extras",
        "extras_then",
        "names",
        "raws",
    )
    __slots__ = (*_LISTS, "places", "said")

    def __init__(self) -> None:
        self.messages: list[BaseMessage] = []
        self.lives: list[dict[str, Any]] = []
        self.owns: list[dict[str, Any]] = []
        self.blanks: list[Any] = []
        self.extras: list[dict[str, Any]] = []
        self.extras_then: list[dict[str, Any]] = []
        self.places: list[int] = []
        self.names: list[str] = []
        self.raws: list[bytes] = []
        self.said = Said.nothing()

    def holds(self, messages: list[BaseMessage]) -> bool:
        """Whether these are the messages, unchanged. There may be thousands: the loops are C's."""
        owns = self.lives
        if len(owns) < len(messages):
            owns = [own_of(messages[0]), *owns]
            messages = messages[1:]
        if not all(map(is_, messages, self.messages)):
            return False
        try:
            return (
                not any(self.blanks)
                and owns == self.owns
                and (not self.extras or self.extras == self.extras_then)
                and (not self.names or self._pack(owns) == self._packed())
            )
        except Exception:  # a foreign object that does not let itself be compared
            return False

    def _pack(self, owns: list[dict[str, Any]]) -> bytes:
        values = [*map(getitem, map(owns.__getitem__, self.places), self.names)]
        return _without_header(ormsgpack.packb(values, None, SNAPSHOT_OPTIONS), len(values))

    def _packed(self) -> bytes:
        if len(self.raws) > 1:
            self.raws = [b"".join(self.raws)]  # says the same
        return self.raws[0]

    def add_calls(self, raw: bytes) -> None:
        """Watch the tool calls, here packed, of the message that will be appended next."""
        self.places.append(len(self.owns))
        self.names.append("tool_calls")
        self.raws.append(raw)

    def add(self, shadow: Shadow, extra: Any) -> None:
        """Append a message; ``extra`` is its own, of which the shadow has a copy."""
        self.places += [len(self.owns)] * len(shadow.names)
        self.owns.append(shadow.own)
        self.blanks += shadow.blanks
        if shadow.extra:
            self.extras.append(extra)
            self.extras_then.append(shadow.extra)
        else:
            self.blanks.append(extra)
        self.names += shadow.names
        self.raws += shadow.raws

    def extend(self, other: _Segment) -> None:
        """Append what follows."""
        self.places += [len(self.owns) + place for place in other.places]
        for name in self._LISTS:
            getattr(self, name).extend(getattr(other, name))
        self.said = other.said


_conversations = IdentityMap(256)
"""The segments of the conversation that last began with this message object; none until it begins
one for the second time: a run that reads its messages from a checkpoint may key them only once."""


def _conversation(messages: list[Any], depth: int) -> Said | None:
    """What a list says that begins with a message; ``None`` if it goes on with something else."""
    found = _conversations.entries.get(id(messages[0]))
    known: tuple[_Segment, ...] = found[0] if found else ()
    said = Said.nothing()
    start = count = 0
    for segment in known:
        end = start + len(segment.owns)
        if end > len(messages) or not segment.holds(messages[start:end]):
            break
        start, count, said = end, count + 1, segment.said
    if start == len(messages):
        return said
    if not all(map(_is_message, set(map(type, messages[start:])))):
        return None
    # segments never change, because other threads may be reading them
    if start:
        said = said.copy()
    elif found is None and len(messages) >= CHUNK:

        def absorb(some: list[BaseMessage], said: Said) -> None:
            _absorb(some, 0, said, depth, sure=False)

        start, said = beginning(messages, absorb)
    new, said = _absorb(messages, start, said, depth, sure=found is not None)
    if found is None:
        _conversations.put(messages[0], ())
    # with itself among the messages, the first one would be kept alive by what is remembered of it
    elif new.owns and not any(map(is_, new.messages, repeat(messages[0]))):
        _conversations.put(messages[0], _merged((*known[:count], new)))
    return said


def _merged(segments: tuple[_Segment, ...]) -> tuple[_Segment, ...]:
    """Fewer segments, so that walking them stays quick.

    The latest two stay by themselves, since conversations fork at their ends. Of the others, each
    is more than eight times as long as the next: no more than log8 of the number of messages.
    """
    kept = list(segments)
    end = len(kept) - 2
    while end >= 2 and len(kept[end - 2].owns) <= 8 * len(kept[end - 1].owns):
        joined = _Segment()
        joined.extend(kept[end - 2])
        joined.extend(kept[end - 1])
        kept[end - 2 : end] = [joined]
        end -= 1
    return tuple(kept)


def _alone(message: BaseMessage, depth: int) -> Said:
    """One message alone: too little to be worth remembering."""
    try:
        return _absorb([message], 0, Said.nothing(), depth, sure=False)[1]
    except Unkeyable as exc:
        exc.path = exc.path.removeprefix("[0]")
        raise


def _absorb(
    messages: list[BaseMessage], start: int, said: Said, depth: int, sure: bool
) -> tuple[_Segment, Said]:
    """Add to ``said`` the messages from ``start`` on; ``sure``: they are to be remembered.

    Returns:
        what may be remembered, which ends before the first message that may change unseen; and
        ``said``.
    """
    encoder = KeyEncoder()
    encoder.depth = depth
    encoder.ids = ids = said.ids
    encoder.kinds = said.kinds
    new = messages[start:]
    kinds = {kind: kind_of(kind) for kind in set(map(type, new))}
    # what shows a change comes before the row is made: so it will show what another thread
    # changes meanwhile
    lives = [*map(own_of, new)]
    owns = [*map(dict.copy, lives)] if sure else lives
    segment = _Segment()
    rows: list[Any] = []
    for index, (message, own, extra) in enumerate(zip(new, owns, map(extra_of, new), strict=True)):
        kind = kinds[type(message)]
        row: list[Any] | None = None
        raw: bytes | None = None
        if not extra and len(own) == kind.size:
            try:
                held = kind.containers(own)
                calls = any(held)
                if not calls or kind.only_calls(held):
                    values = kind.values(own)
                    # all in one place: a function more is a twentieth of the time
                    for value in values:
                        if type(value) is not str and value is not None:
                            break
                    else:
                        if calls:
                            # what is not remembered need not be packed by itself
                            fit = not sure and _is_simple(held[1])
                            if not fit:
                                raw = snapshot(held[1])
                                fit = raw is not None
                            cells = call_rows(encoder, held[1]) if fit else None
                            row = cells and [kind.head, None, *values, None, cells]
                        elif not kind.answers:
                            row = [kind.head, None, *values]
                        elif type(call_id := own["tool_call_id"]) is str:
                            # as ``number`` does
                            row = [kind.head, ids.setdefault(call_id, len(ids)), *values]
            except KeyError:  # made by model_construct
                pass
        if row is not None:
            rows.append(row)
            if sure:
                if raw is not None:
                    segment.add_calls(raw)
                    held = (held[0], *held[2:])
                segment.owns.append(own)
                segment.blanks += held
                segment.blanks.append(extra)
            continue
        shadow = kind.shadow(own, extra) if sure else None
        if shadow is not None:
            segment.add(shadow, extra)
        elif sure:
            _hash(said, rows)
            rows, sure = [], False
            segment.said = said.copy()
        try:
            rows.append(kind.full(message, encoder))
        except Unkeyable as exc:
            exc.within(f"[{start + index}]")
            raise
    _hash(said, rows)
    if sure:
        segment.said = said
    kept = slice(0 if start else 1, len(segment.owns))
    segment.messages, segment.lives = new[kept], lives[kept]
    return segment, said


_SMALL = 1 << 62  # msgpack has no larger integers than twice that


def _is_simple(calls: list[Any]) -> bool:
    """Whether the arguments of all these tool calls are text, integers, booleans and ``None``."""
    for call in calls:
        args = call.get("args") if type(call) is dict else None
        if type(args) is not dict:
            return False
        for name, value in args.items():
            kind = type(value)
            if type(name) is not str or not (
                kind is str
                or (kind is int and -_SMALL < value < _SMALL)
                or kind is bool
                or value is None
            ):
                return False
    return True


def _hash(said: Said, rows: list[Any]) -> None:
    """Take in rows. Each is self-delimiting, so it does not matter how many come at a time."""
    try:
        raw = ormsgpack.packb(rows, None, PACK_OPTIONS)
    except TypeError:  # lone surrogates, which msgpack does not know
        raw = ormsgpack.packb(_encodable(rows), None, PACK_OPTIONS)
    said.hash.update(_without_header(raw, len(rows)))


def _without_header(raw: bytes, count: int) -> bytes:
    """The items of a packed array, without how many they are."""
    return raw[1 if count < 16 else 3 if count < 65536 else 5 :]


def _encodable(value: Any) -> Any:
    """The same with strings that hold lone surrogates as bytes; no other cell has such bytes."""
    if type(value) is list:
        return [_encodable(item) for item in value]
    if type(value) is dict and packed(value) is None:
        return KeyEncoder().encode(value)  # a tool call's arguments
    if type(value) is str and not value.isascii():
        return value if value.encode(errors="ignore").decode() == value else text(value)
    return value
