"""What one message says, as a row to be hashed.

A row covers the message's type, content, name, tool calls and whatever else a node can act on. Left
out are the message's id, ``response_metadata``, ``usage_metadata``, generated ids of content
blocks, and what a provider adds to ``additional_kwargs`` about the tool calls. Tool-call ids count
by position: each is written as the how-manieth different id it is.

Messages are mutable. So what a row was made from is kept as a ``Shadow``, which tells whether the
message still is what it was.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cached_property
from hashlib import blake2b
from itertools import count
from operator import itemgetter
from types import MemberDescriptorType
from typing import Any, ClassVar, NamedTuple

from langchain_core.messages import AIMessage, BaseMessage, RemoveMessage
from pydantic import BaseModel
from pydantic_core import from_json

from langgraph_perf._canonical import (
    SNAPSHOT_OPTIONS,
    Encoder,
    IdentityMap,
    Unkeyable,
    instance_state,
    mro_of,
    namespace_of,
    packed,
    text,
    type_name,
)

DIGEST_SIZE = 20
"""160 bits: a collision takes an adversary 2**80 digests."""

own_of: Callable[[Any], dict[str, Any]] = BaseModel.__dict__["__dict__"].__get__
extra_of: Callable[[Any], Any] = BaseModel.__dict__["__pydantic_extra__"].__get__
private_of: Callable[[Any], Any] = BaseModel.__dict__["__pydantic_private__"].__get__

# all of these are about langchain_core's messages
_CONTAINERS = ("additional_kwargs", "tool_calls", "invalid_tool_calls", "tool_call_chunks")
_METADATA = frozenset(("response_metadata", "usage_metadata"))
_CALL = frozenset(("id", "name", "args", "type"))
_call_fields = itemgetter("id", "name", "type", "args")
_CALL_IDS = ("id",)
_BLOCK_IDS = ("call_id", "id", "tool_call_id", "tool_use_id")
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
_NOTES = ("__openai_function_call_ids__", "__gemini_function_call_thought_signatures__")
_GENERATED = re.compile(r"lc_[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}").fullmatch
_MAX_RAW = 1 << 20  # of a field's value; what is larger is not worth a second copy of it


class NumberingEncoder(Encoder):
    """An encoder that numbers tool-call ids in the order in which it meets them."""

    __slots__ = ("ids",)

    plans: ClassVar[IdentityMap]

    def __init__(self) -> None:
        self.depth = 0
        self.kinds = set()
        self.ids: dict[str, int] = {}

    def number(self, tool_id: str) -> int:
        """The position of a tool-call id among all those met so far."""
        return self.ids.setdefault(tool_id, len(self.ids))


class Shadow(NamedTuple):
    """What a message was when its row was made.

    Attributes:
        own: a copy of its ``__dict__``, which shares with it what follows.
        extra: its extra fields: its own if there are none, or else a copy.
        blanks: its empty containers.
        names: its fields that are not just text; strings are all that equality can be trusted on.
        raws: these fields' values, packed.
    """

    own: dict[str, Any]
    extra: Any
    blanks: list[Any]
    names: list[str]
    raws: list[bytes]


class MessageKind:
    """What is known about one message class.

    Attributes:
        head: what its rows begin with: the class, and the fields that follow.
        answers: whether it has a tool-call id of its own.
        size: how many fields it has; ``-1`` if its instances hold more than fields.
        values: takes the fields that usually are text from a message's ``__dict__``.
        containers: takes the fields that usually are empty.
        serial: tells it from every other class of this process, also from one of the same name.
    """

    __slots__ = (
        "_ai",
        "_dropped",
        "_least",
        "_names",
        "_state_of",
        "answers",
        "containers",
        "head",
        "serial",
        "size",
        "values",
    )

    def __init__(self, kind: type[BaseMessage]) -> None:
        fields = kind.__pydantic_fields__
        self.serial = next(_serials)
        self._ai = AIMessage in mro_of(kind)  # a model wrote it, and generated its ids
        # the id of a RemoveMessage is what it says
        self._dropped = _METADATA if RemoveMessage in mro_of(kind) else _METADATA | {"id"}
        self.answers = "tool_call_id" in fields
        containers = [name for name in _CONTAINERS if name in fields]
        values = sorted(set(fields) - self._dropped - {*containers, "tool_call_id"})
        self.values, self.containers = _getter(values), _getter(containers)
        self._names = (*values, *containers)
        self._least = 2 + len(values)
        # where assignments are validated, pydantic puts another __dict__ into the message each time
        more = bool(kind.__private_attributes__ or kind.model_config.get("validate_assignment"))
        more = more or any(
            isinstance(member, cached_property)
            or (type(member) is MemberDescriptorType and not name.startswith("__"))
            for owner in mro_of(kind)
            for name, member in namespace_of(owner).items()
        )
        self.size = -1 if more else len(fields)
        self._state_of = instance_state(kind)
        names = f"{type_name(kind)} {values}".encode()
        self.head = blake2b(names, digest_size=DIGEST_SIZE).digest()

    def full(self, message: BaseMessage, encoder: NumberingEncoder) -> list[Any]:
        """The row of a message that holds more than text.

        A cell is text or ``None`` where the field is, and bytes or a list where the field is more.

        Raises:
            Unkeyable: with the path below the message.
        """
        own = own_of(message)
        extra, private = extra_of(message), private_of(message)
        names = self._names
        try:
            fields = (*self.values(own), *self.containers(own)) if len(own) == self.size else None
        except KeyError:
            fields = None
        if fields is not None:
            row: list[Any] = [self.head]
        else:  # made by model_construct, or with more than fields
            own = self._state_of(message)
            names = (*sorted(own.keys() - self._dropped - {"tool_call_id"}),)
            fields = (*(own[name] for name in names),)
            row = [self.head, [*map(text, names)]]
        row.append(_call_id(encoder, own.get("tool_call_id")))
        for name, value in zip(names, fields, strict=False):
            if type(value) is str or value is None or (not value and name in _CONTAINERS):
                row.append(value or None if name in _CONTAINERS else value)
                continue
            try:
                row.append(self._cell(encoder, name, value, own))
            except Unkeyable as exc:
                exc.within(f".{name}")
                raise
        row.append(encoder.attributes(extra) if extra else None)
        row.append(encoder.attributes(private) if private else None)
        # what turns out to be nothing but text has the row of a message that is
        while row[-1] is None and len(row) > self._least:
            row.pop()
        return row

    def _cell(
        self, encoder: NumberingEncoder, name: str, value: Any, own: Mapping[str, Any]
    ) -> Any:
        if type(value) is list:
            if name in _CONTAINERS:
                return [_call(encoder, index, call) for index, call in enumerate(value)]
            if name == "content":
                return _each(encoder, value, lambda block: self._block(encoder, block))
        elif name == "additional_kwargs" and type(value) is dict and self._ai:
            return self._additional(encoder, value, own)
        # a str subclass, such as AIMessage.text, says what its text says
        return str.__str__(value) if str in mro_of(type(value)) else encoder.encode(value)

    def _additional(
        self, encoder: NumberingEncoder, value: dict[Any, Any], own: Mapping[str, Any]
    ) -> Any:
        """``additional_kwargs`` without what merely repeats or annotates the tool calls."""
        calls = value.get("tool_calls")
        repeats = calls is not None and _repeats(calls, own)
        if repeats and len(value) == 1:
            return None
        rest = value.copy()
        for name in _NOTES:
            rest.pop(name, None)
        rest.pop("tool_calls", None)
        out = []
        if calls is not None and not repeats:
            out.append(_each(encoder, calls, lambda call: _record(encoder, call, _CALL_IDS)))
        if "reasoning" in rest:
            out.append(b"r" + _record(encoder, rest.pop("reasoning"), dropped=_CALL_IDS))
        if "tool_outputs" in rest:
            outputs = rest.pop("tool_outputs")
            out.append(b"o" + _each(encoder, outputs, lambda block: self._block(encoder, block)))
        if rest:
            out.append(encoder.encode(rest))
        return out or None

    def _block(self, encoder: NumberingEncoder, block: Any) -> bytes:
        if type(block) is not dict:
            return encoder.encode(block)
        block_type, block_id = block.get("type"), block.get("id")
        if type(block_type) is str and block_type in _TOOL_BLOCKS:
            return _record(encoder, block, _BLOCK_IDS)
        # what a user wrote is kept, except for the ids that LangChain puts into blocks by itself
        generated = self._ai or (type(block_id) is str and _GENERATED(block_id) is not None)
        return _record(encoder, block, dropped=_CALL_IDS if generated else ())

    def only_calls(self, held: tuple[Any, ...]) -> bool:
        """Whether of its containers only the tool calls, the second, hold something."""
        return self._ai and not held[0] and type(held[1]) is list and not any(held[2:])

    def shadow(self, own: dict[str, Any], extra: Any) -> Shadow | None:
        """What shows later whether the fields have changed; ``None`` if nothing would."""
        if self.size < 0 or (extra and {*map(type, extra.values())} != {str}):
            return None
        blanks, names, raws = [], [], []
        for name, value in own.items():
            if type(value) is str or value is None or name in self._dropped:
                continue
            if name in _CONTAINERS and not value:
                blanks.append(value)
            elif str not in mro_of(type(value)):  # whose text is what counts
                raw = snapshot(value)
                if raw is None:
                    return None
                names.append(name)
                raws.append(raw)
        return Shadow(own, extra.copy() if extra else extra, blanks, names, raws)


def snapshot(value: Any) -> bytes | None:
    """What shows whether a field's value has changed; ``None`` if nothing would."""
    raw = packed(value, SNAPSHOT_OPTIONS)
    return None if raw is None or len(raw) > _MAX_RAW else raw


def _getter(names: list[str]) -> Callable[[Mapping[str, Any]], tuple[Any, ...]]:
    # with a single name itemgetter would not give a tuple; no harm in asking twice
    return itemgetter(*(names if len(names) > 1 else names * 2))


_serials = count()
_kinds = IdentityMap(4096)


def kind_of(kind: type[BaseMessage]) -> MessageKind:
    """What is known about a message class."""
    found = _kinds.entries.get(id(kind))
    if found is not None:
        return found[0]  # type: ignore[no-any-return]
    known = MessageKind(kind)
    _kinds.put(kind, known)
    return known


def _call_id(encoder: NumberingEncoder, value: Any) -> Any:
    if type(value) is str:
        return encoder.number(value)
    return None if value is None else encoder.at(".tool_call_id", value)


def _call(encoder: NumberingEncoder, index: int, call: Any) -> Any:
    """One tool call: in nearly all of them, four fields of known types. Arguments that are bytes
    are the general encoding; those that msgpack tells apart by itself are as they are."""
    try:
        if type(call) is dict and call.keys() == _CALL and type(call["id"]) is str:
            name, kind = call["name"], call["type"]
            if type(name) is str and type(kind) is str:
                args = call["args"]
                if packed(args) is None:
                    args = encoder.at('["args"]', args)
                return [encoder.number(call["id"]), name, kind, args]
        return _record(encoder, call, _CALL_IDS)
    except Unkeyable as exc:
        exc.within(f"[{index}]")
        raise


def call_rows(encoder: NumberingEncoder, calls: list[Any]) -> list[Any] | None:
    """The rows that ``_call`` makes of tool calls that msgpack tells apart; ``None`` of others."""
    rows = []
    ids = encoder.ids
    for call in calls:
        try:
            call_id, name, kind, args = _call_fields(call)
        except (KeyError, TypeError):
            return None
        if len(call) != 4 or not (type(call_id) is type(name) is type(kind) is str):
            return None
        rows.append([ids.setdefault(call_id, len(ids)), name, kind, args])
    return rows


def call_record(encoder: NumberingEncoder, call: dict[str, Any]) -> bytes:
    """A tool call outside of a message."""
    return _record(encoder, call, _CALL_IDS)


def _each(encoder: NumberingEncoder, values: Any, encode: Callable[[Any], bytes]) -> bytes:
    if type(values) is not list:
        return encoder.encode(values)
    out = [b"l%d:" % len(values)]
    for index, value in enumerate(values):
        try:
            out.append(encode(value))
        except Unkeyable as exc:
            exc.within(f"[{index}]")
            raise
    return b"".join(out)


def _record(
    encoder: NumberingEncoder,
    record: Any,
    ids: tuple[str, ...] = (),
    dropped: tuple[str, ...] = (),
) -> bytes:
    """A dict in which ``ids`` count by position; any other value just as it is."""
    if type(record) is not dict:
        return encoder.encode(record)
    rest = record.copy()
    for name in dropped:
        rest.pop(name, None)
    head = b"k"
    for name in ids:
        if type(rest.get(name)) is str:
            head += b"%b=%d;" % (name.encode(), encoder.number(rest.pop(name)))
    return b"%b:%b" % (head, encoder.encode(rest))


def _repeats(raw_calls: Any, own: Mapping[str, Any]) -> bool:
    """Whether the provider's tool calls say just what the parsed ones say."""
    try:
        calls = own["tool_calls"]
        if own["invalid_tool_calls"]:
            by_id = {call["id"]: call for call in (*calls, *own["invalid_tool_calls"])}
            calls = [by_id[raw_call["id"]] for raw_call in raw_calls]
        if len(raw_calls) != len(calls):
            return False
        for raw_call, call in zip(raw_calls, calls, strict=True):
            function, args = raw_call["function"], call["args"]
            if raw_call["id"] != call["id"] or function["name"] != call["name"]:
                return False
            # a call whose arguments could not be parsed has them as text
            if function["arguments"] != args:
                # msgpack tells 1 from True, which are equal
                raw = packed(args)
                if raw is None or packed(from_json(function["arguments"])) != raw:
                    return False
    except (KeyError, TypeError, ValueError, AttributeError):
        return False
    return True
