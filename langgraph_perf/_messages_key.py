"""How messages are encoded: by what they say, not by the ids and counts that came with them.

A message's *content digest* covers its type, content, name, tool calls and whatever else a node
can act on. Left out are the message's id, ``response_metadata``, ``usage_metadata``, generated ids
of content blocks, and what a provider adds to ``additional_kwargs`` about the tool calls. A
tool-call id counts by position: inside a message as the how-manieth different id it is there, and
next to the digest as the how-manieth of the whole traversal, so that a call and its answer stay
tied together.

Digests are remembered per message object, because a conversation is keyed again and again with two
more messages. Messages are mutable all the same, so each digest is kept with a *shadow* of the
message's ``__dict__``, and holds only while the two are equal. The shadow is a copy as deep as the
message, in which everything but strings and ``None`` compares by type as well as value.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Mapping
from hashlib import blake2b
from itertools import chain, compress
from operator import itemgetter
from typing import Any, ClassVar, TypeAlias

import ormsgpack
from langchain_core.messages import AIMessage, BaseMessage, RemoveMessage
from pydantic import BaseModel

from langgraph_perf._canonical import (
    Encoder,
    IdentityMap,
    Plan,
    Unkeyable,
    builtin_plan,
    general_list,
    instance_state,
    mro_of,
    plain,
    refuse,
    text,
    type_name,
)
from langgraph_perf._value_types import value_plan

DIGEST_SIZE = 20
"""160 bits: a collision takes an adversary 2**80 digests."""

_get_dict: Callable[[Any], dict[str, Any]] = BaseModel.__dict__["__dict__"].__get__
_get_extra: Callable[[Any], dict[str, Any] | None] = BaseModel.__dict__[
    "__pydantic_extra__"
].__get__
_get_private: Callable[[Any], dict[str, Any] | None] = BaseModel.__dict__[
    "__pydantic_private__"
].__get__

# what the loops below look at; all of it is about langchain_core's messages
_CONTAINERS: dict[str, Any] = {
    "additional_kwargs": {},
    "tool_calls": [],
    "invalid_tool_calls": [],
    "tool_call_chunks": [],
}
_CALLS = frozenset(_CONTAINERS) - {"additional_kwargs"}
_METADATA = frozenset(("response_metadata", "usage_metadata"))
_ID = frozenset(("id",))
_TOOL_IDS = frozenset(("id", "tool_use_id", "tool_call_id", "call_id"))
_TOOL_BLOCKS = frozenset(
    (
        "tool_use",
        "tool_call",
        "tool_call_chunk",
        "invalid_tool_call",
        "tool_result",
        "function_call",
        "function_call_output",
        "server_tool_use",
        "server_tool_call",
        "server_tool_call_chunk",
        "server_tool_result",
        "web_search_tool_result",
        "code_execution_tool_result",
        "mcp_tool_use",
        "mcp_tool_result",
    )
)
# what providers note under the random ids of the tool calls
_PROVIDER_NOTES = frozenset(
    ("__openai_function_call_ids__", "__gemini_function_call_thought_signatures__")
)
_GENERATED = re.compile(r"lc_[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}").fullmatch
_TEXTUAL = frozenset((str, type(None)))
_EXACT = frozenset((int, float, bool, bytes))
_MAX_LEAVES = 1000  # a shadow must stay small and quick to compare


class KeyEncoder(Encoder):
    """Knows every type a node's input may hold; numbers tool-call ids over the whole traversal."""

    __slots__ = ("ids",)

    plans: ClassVar[IdentityMap]

    def __init__(self) -> None:
        super().__init__()
        self.ids: dict[str, int] = {}

    def plan_for(self, kind: type) -> Plan:
        if _is_message(kind):
            return _message
        if kind is list:
            return _list
        return value_plan(kind) or builtin_plan(kind) or refuse(kind)

    def number(self, tool_id: str) -> int:
        """The position of a tool-call id among all those met so far."""
        return self.ids.setdefault(tool_id, len(self.ids))


def content_digest(message: BaseMessage) -> bytes:
    """The content digest of one message; see the module's docstring.

    Raises:
        Unkeyable: a field holds what cannot be keyed.
    """
    return _record_of(message, KeyEncoder())[1]


def forget() -> None:
    """Drop every remembered message digest."""
    _memo.entries.clear()


# -- messages and lists of messages ---------------------------------------------------------------

_Record: TypeAlias = tuple[Any, bytes, tuple[str, ...]]

_memo = IdentityMap(1 << 16)
"""Per message: its shadow, its digest, its tool-call ids in order of first appearance."""
_shadow_of, _digest_of, _ids_of = itemgetter(0), itemgetter(1), itemgetter(2)


def _is_message(kind: type) -> bool:
    return BaseMessage in mro_of(kind)


def _message(encoder: KeyEncoder, message: BaseMessage) -> bytes:
    return b"G" + _tokens([_record_of(message, encoder)], encoder)


def _list(encoder: KeyEncoder, value: list[Any]) -> bytes:
    value = value.copy()  # another thread may append meanwhile
    if value and _is_message(type(value[0])) and all(map(_is_message, set(map(type, value)))):
        return b"L" + _tokens(_records_of(value, encoder), encoder)
    return plain(value) or general_list(encoder, value)


def _tokens(records: list[_Record], encoder: KeyEncoder) -> bytes:
    """Digests of fixed size, then the position of each of their tool-call ids, all in one row.

    How many ids a message has follows from its digest, so the row divides in one way only.
    """
    ids = list(chain.from_iterable(map(_ids_of, records)))
    numbers = [*map(encoder.number, ids)]
    return b"%d:%b%b" % (
        len(records),
        b"".join(map(_digest_of, records)),
        struct.pack(f">{len(numbers)}I", *numbers),
    )


def _record_of(message: BaseMessage, encoder: KeyEncoder) -> _Record:
    found: Any = _memo.entries.get(id(message))
    return found if found and _hold([message], [found]) else _fresh(encoder, message, None)


def _records_of(messages: list[BaseMessage], encoder: KeyEncoder) -> list[_Record]:
    """A record for each message. Long conversations pass through here, so the loops are C's."""
    found: list[Any] = list(map(_memo.entries.get, map(id, messages)))
    if None not in found:
        if _hold(messages, found):
            return found
    elif _hold(list(compress(messages, found)), list(filter(None, found))):
        return [
            record or _fresh(encoder, message, index)
            for index, (message, record) in enumerate(zip(messages, found, strict=True))
        ]
    return [
        record if record and _hold([message], [record]) else _fresh(encoder, message, index)
        for index, (message, record) in enumerate(zip(messages, found, strict=True))
    ]


def _hold(messages: list[BaseMessage], records: list[_Record]) -> bool:
    """Whether the messages are still as they were when their digests were taken."""
    try:
        return list(map(_shadow_of, records)) == list(map(_get_dict, messages)) and not any(
            map(_get_extra, messages)
        )
    except Exception:  # a foreign object that does not let itself be compared
        return False


class _Kind:
    """What is known about one message class."""

    __slots__ = ("ai", "containers", "dropped", "head", "simple", "size", "state_of")

    def __init__(self, kind: type[BaseMessage]) -> None:
        fields = kind.__pydantic_fields__
        self.ai = issubclass(kind, AIMessage)
        # the id of a RemoveMessage is what it says
        self.dropped = _METADATA if issubclass(kind, RemoveMessage) else _METADATA | {"id"}
        self.containers = {k: v for k, v in _CONTAINERS.items() if k in fields}
        self.size = len(fields)
        simple = sorted(set(fields) - self.dropped - set(self.containers) - {"tool_call_id"})
        self.simple = itemgetter(*simple)
        self.head = f"{type_name(kind)}({','.join(simple)})"
        self.state_of = instance_state(kind)


_kinds = IdentityMap(4096)


def _kind_of(kind: type[BaseMessage]) -> _Kind:
    found = _kinds.entries.get(id(kind))
    if found is not None:
        return found[0]  # type: ignore[no-any-return]
    known = _Kind(kind)
    _kinds.put(kind, known)
    return known


def _fresh(encoder: Encoder, message: BaseMessage, index: int | None) -> _Record:
    """The record of a message that is new or has changed, remembered if that is sound."""
    kind = _kind_of(type(message))
    own = _get_dict(message)
    shadow = {**own, **kind.containers}
    if shadow == own and len(own) == kind.size and not _get_extra(message):
        simple = _simple(kind, shadow)
        if simple is not None:
            _memo.put(message, shadow, *simple)
            return shadow, *simple
    deep = _deep_shadow(kind, own)
    try:
        digest, ids, alone = _full(encoder.depth, kind, message)
    except Unkeyable as exc:
        exc.within("" if index is None else f"[{index}]")
        raise
    # compared once more: another thread may have changed the message while it was encoded
    if deep is not None and alone and deep == _get_dict(message):
        _memo.put(message, deep, digest, ids)
    return deep, digest, ids


def _simple(kind: _Kind, own: dict[str, Any]) -> tuple[bytes, tuple[str, ...]] | None:
    """The digest of a message of nothing but strings, in one C call; ``None`` for others."""
    values = kind.simple(own)
    call_id = own.get("tool_call_id")
    if not _TEXTUAL.issuperset(map(type, values)):
        values = [str.__str__(v) if str in type(v).__mro__ else v for v in values]
        if not _TEXTUAL.issuperset(map(type, values)):
            return None
    if call_id is not None and type(call_id) is not str:
        return None
    try:
        raw = ormsgpack.packb([kind.head, call_id is None, *values])
    except TypeError:  # lone surrogates
        return None
    digest = blake2b(raw, digest_size=DIGEST_SIZE).digest()
    return digest, () if call_id is None else (call_id,)


# -- messages with structure: content blocks, tool calls, artifacts -------------------------------


def _full(depth: int, kind: _Kind, message: BaseMessage) -> tuple[bytes, tuple[str, ...], bool]:
    """Digest, ids, and whether ``__dict__`` alone determined them."""
    encoder = KeyEncoder()  # its own numbering: the digest must not depend on other messages
    encoder.depth = depth
    state = kind.state_of(message)
    extra = _get_extra(message) or {}
    private = _get_private(message) or {}
    # no msgpack array starts with this byte, so these never meet the simple messages
    out = [b"full:", text(kind.head)]
    for name in sorted(state.keys() - kind.dropped):
        out.append(text(name))
        try:
            out.append(_field(encoder, kind, name, state))
        except Unkeyable as exc:
            exc.within(f".{name}")
            raise
    out.append(encoder.attributes(extra))
    out.append(encoder.attributes(private))
    digest = blake2b(b"".join(out), digest_size=DIGEST_SIZE).digest()
    alone = not extra and not private and state.keys() == _get_dict(message).keys()
    return digest, tuple(encoder.ids), alone


def _field(encoder: KeyEncoder, kind: _Kind, name: str, state: Mapping[str, Any]) -> bytes:
    value = state[name]
    if name == "tool_call_id" and type(value) is str:
        return b"#%d;" % encoder.number(value)
    if name in _CALLS and type(value) is list:
        return _each(encoder, value, lambda call: _record(encoder, call, _ID))
    if name == "content" and type(value) is list:
        return _each(encoder, value, lambda block: _block(encoder, kind, block))
    if name == "additional_kwargs" and kind.ai and type(value) is dict:
        return _additional(encoder, kind, value, state)
    if str in type(value).__mro__:
        return text(str.__str__(value))
    return encoder.encode(value)


def _each(encoder: Encoder, values: list[Any], encode: Callable[[Any], bytes]) -> bytes:
    out = [b"l%d:" % len(values)]
    for index, value in enumerate(values):
        try:
            out.append(encode(value))
        except Unkeyable as exc:
            exc.within(f"[{index}]")
            raise
    return b"".join(out)


def _record(
    encoder: KeyEncoder,
    record: Any,
    ids: frozenset[str] = frozenset(),
    dropped: frozenset[str] = frozenset(),
) -> bytes:
    """A dict whose ``ids`` count by position; other kinds of values just as they are."""
    if type(record) is not dict or set(map(type, record)) - {str}:
        return encoder.encode(record)
    names = sorted(record.keys() - dropped)
    out = [b"k%d:" % len(names)]
    for name in names:
        value = record[name]
        out.append(text(name))
        if name in ids and type(value) is str:
            out.append(b"#%d;" % encoder.number(value))
        else:
            out.append(encoder.at(f'["{name}"]', value))
    return b"".join(out)


def _block(encoder: KeyEncoder, kind: _Kind, block: Any) -> bytes:
    if type(block) is not dict:
        return encoder.encode(block)
    block_type, block_id = block.get("type"), block.get("id")
    if type(block_type) is str and block_type in _TOOL_BLOCKS:
        return _record(encoder, block, _TOOL_IDS)
    # what a user wrote is kept, except for the ids that LangChain puts into blocks by itself
    generated = kind.ai or (type(block_id) is str and _GENERATED(block_id) is not None)
    return _record(encoder, block, dropped=_ID if generated else frozenset())


def _additional(
    encoder: KeyEncoder, kind: _Kind, value: dict[Any, Any], state: Mapping[str, Any]
) -> bytes:
    """``additional_kwargs`` without what merely repeats or annotates the tool calls."""
    kept = {k: v for k, v in value.items() if k not in _PROVIDER_NOTES}
    raw_calls = kept.pop("tool_calls", None)
    out = []
    if raw_calls is not None and not _repeats(raw_calls, state):
        kept_calls = raw_calls if type(raw_calls) is list else [raw_calls]
        out.append(_each(encoder, kept_calls, lambda call: _record(encoder, call, _ID)))
    reasoning = kept.get("reasoning")
    if type(reasoning) is dict:
        out.append(b"r" + _record(encoder, kept.pop("reasoning"), dropped=_ID))
    outputs = kept.get("tool_outputs")
    if type(outputs) is list:
        kept.pop("tool_outputs")
        out.append(b"o" + _each(encoder, outputs, lambda block: _block(encoder, kind, block)))
    return b"a%d:%b%b" % (len(out), b"".join(out), encoder.encode(kept))


def _repeats(raw_calls: Any, state: Mapping[str, Any]) -> bool:
    """Whether the provider's tool calls say just what the parsed ones say."""
    try:
        parsed = {call["id"]: (call["name"], call["args"]) for call in state["tool_calls"]}
        broken = {call["id"]: (call["name"], call["args"]) for call in state["invalid_tool_calls"]}
        if len(raw_calls) != len(parsed) + len(broken):
            return False
        for call in raw_calls:
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            if broken.get(call["id"]) == (name, arguments):
                continue
            known, args = parsed[call["id"]]
            said = plain(json.loads(arguments) if arguments else {})
            if known != name or said is None or said != plain(args):
                return False
    except (KeyError, TypeError, ValueError, AttributeError):
        return False
    return True


# -- shadows --------------------------------------------------------------------------------------


class _Exact:
    """Equal to a value of the same type only: ``True`` is not ``1``, ``-0.0`` is not ``0.0``."""

    __slots__ = ("kind", "value")

    def __init__(self, value: Any) -> None:
        self.kind = type(value)
        self.value = value.hex() if self.kind is float else value

    def __eq__(self, other: object) -> bool:
        if type(other) is not self.kind:
            return False
        return (other.hex() if type(other) is float else other) == self.value  # type: ignore[no-any-return]

    __hash__ = None  # type: ignore[assignment]


class _Volatile(Exception):
    """The value can change in ways that comparing it would not show."""


def _deep_shadow(kind: _Kind, own: Mapping[str, Any]) -> dict[str, Any] | None:
    """A copy of a message's ``__dict__`` that equals it exactly as long as nothing changes."""
    left = [_MAX_LEAVES]
    try:
        return {
            name: value
            # a field that is no part of the digest may change; a str subclass counts as its text
            if name in kind.dropped or str in type(value).__mro__
            else _shadow(value, left)
            for name, value in own.items()
        }
    except (_Volatile, RecursionError):
        return None


def _shadow(value: Any, left: list[int]) -> Any:
    kind = type(value)
    left[0] -= 1
    if left[0] < 0:
        raise _Volatile
    if kind is str or value is None:
        return value
    if kind in _EXACT:
        return _Exact(value)
    if kind is list:
        return [_shadow(item, left) for item in value]
    if kind is dict and not set(map(type, value)) - {str}:
        return {name: _shadow(item, left) for name, item in value.items()}
    raise _Volatile
