"""Message identity on replay: a cached result must not bring back the ids of another run.

LangGraph's ``add_messages`` merges by message id, so an id replayed into another conversation
overwrites, or removes, the wrong message. When a result is stored, a *plan* is stored with it that
tells which ids the node created and which ones name something in its input. On replay, created ids
are replaced by fresh ones and the others by the ids that the same messages have in the input at
hand. Tool-call ids are treated likewise. Whatever refers to one id refers to one id afterwards.

Only the places that hold ids are rewritten: a message's ``id``, and for tool calls those listed in
``_slots``. Of messages in dict form only the ``id`` is. An id of the input elsewhere in a result is
text that cannot be told from a reference, so such a result is not stored.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import re
import uuid
from collections import deque
from collections.abc import Iterable
from hashlib import blake2b
from typing import Any

from langchain_core.messages import BaseMessage, RemoveMessage
from langgraph.graph.message import REMOVE_ALL_MESSAGES
from langgraph.types import Send
from pydantic import BaseModel

from langgraph_perf.codec import Allowlist, DecodeError, EncodeError, decode, encode

__all__ = ["pack_result", "spent_tokens", "unpack_result"]

_PLANNED = b"R"
"""First byte of a payload with a plan: no payload of the codec begins with it."""
_CALL_TYPE = b"\xa9tool_call"
"""How the codec writes the ``type`` of a tool call."""
_CONTENT, _ID = b"\xa7content", b"\xa2id"
"""How the codec writes two keys that every message in dict form has."""
_ROLES = frozenset(
    ["ai", "assistant", "developer", "function", "human", "remove", "system", "tool", "user"]
)
"""What LangChain takes as ``role`` or ``type`` of a message in dict form."""

_CALL_LISTS = ("tool_calls", "invalid_tool_calls", "tool_call_chunks")
_CALL_BLOCKS = frozenset(
    [
        "custom_tool_call",
        "function_call",
        "invalid_tool_call",
        "mcp_tool_use",
        "server_tool_call",
        "server_tool_call_chunk",
        "server_tool_use",
        "tool_call",
        "tool_call_chunk",
        "tool_use",
    ]
)
"""Types of content blocks whose ``id`` is that of a tool call."""
_BLOCK_KEYS = ("tool_use_id", "tool_call_id", "call_id")
_NOTES = ("__openai_function_call_ids__", "__gemini_function_call_thought_signatures__")
"""Where integrations note something under the id of a tool call, in ``additional_kwargs``."""
_PREFIX = re.compile(r"(?:[a-z]{2,12}[_-])*")
_LEAVES = frozenset(
    [type(None), bool, int, float, complex, str, bytes, bytearray, dt.datetime, dt.date, uuid.UUID]
)
_MAX_DEPTH = 200


def pack_result(result: Any, state: Any) -> bytes:
    """The bytes from which ``unpack_result`` replays ``result``.

    Ids stay consistent within what is packed, so what belongs to a result (recorded stream chunks)
    can be packed along with it, in one tuple.

    Args:
        result: what the node returned; it is not changed.
        state: what the node was given.

    Raises:
        EncodeError: the result cannot be stored, or replayed under other ids.
    """
    messages: list[BaseMessage] = []
    payload = encode(result, messages=messages)
    try:
        plan = _plan_for(result, payload, len(messages), state)
    except EncodeError:
        raise
    except Exception as exc:
        raise EncodeError(f"its messages cannot be compared with the input's: {exc}") from exc
    if plan is None:
        return payload
    header = encode(plan)
    return b"".join([_PLANNED, len(header).to_bytes(4, "little"), header, payload])


def unpack_result(payload: bytes, state: Any, allowed: Allowlist | None = None) -> Any:
    """A fresh copy of the packed result, under ids that fit ``state``.

    Args:
        payload: from ``pack_result``.
        state: what the node would be given now.
        allowed: classes to restore besides the built-in ones.

    Raises:
        DecodeError: the payload is damaged, or refers to an input message that ``state`` does not
            have in the same place and with the same content.
    """
    if payload[:1] != _PLANNED:
        return decode(payload, allowed)
    view = memoryview(payload)
    start = 5 + int.from_bytes(view[1:5], "little")
    plan = decode(view[5:start])
    result = decode(view[start:], allowed)
    try:
        _rebind(result, plan, state)
    except DecodeError:
        raise
    except Exception as exc:
        raise DecodeError(f"damaged replay plan: {exc!r:.200}") from exc
    return result


def spent_tokens(result: Any) -> int:
    """How many tokens the messages in ``result`` say a language model spent on them.

    It never raises: a result that cannot be looked at counts as 0.
    """
    total = 0
    try:
        for message in {id(carrier): carrier for carrier in _carriers(result, tree=False)}.values():
            usage = getattr(message, "usage_metadata", None)
            tokens = usage.get("total_tokens") if isinstance(usage, dict) else None
            if type(tokens) is int:
                total += tokens
    except Exception:
        return 0
    return total


# -- plans ----------------------------------------------------------------------------------------


def _plan_for(result: Any, payload: bytes, messages: int, state: Any) -> dict[str, Any] | None:
    """The plan to store with a result; ``None`` if none of its ids changes on replay."""
    carriers = []
    if messages or _CALL_TYPE in payload or (_CONTENT in payload and _ID in payload):
        carriers = _carriers(result, tree=True)
    if sum(type(carrier) is not dict for carrier in carriers) != messages:
        raise EncodeError("a message lies where it cannot be given a new id on replay")
    texts: dict[str, _Path] = {}
    _find_texts(result, ("result",), texts)
    if not carriers and not texts:
        return None
    inputs = _carriers(state, tree=False)
    if texts:
        _refuse_texts(texts, inputs)
    return _make_plan(carriers, inputs)


def _make_plan(carriers: list[Any], inputs: list[Any]) -> dict[str, Any] | None:
    """Which of the result's ids name something in the input; ``None`` if it has no ids at all.

    A plan is plain data::

        carriers  how many carriers the result has
        ids       {message id: index of the input's carrier that has it}
        calls     {tool-call id: [index of the first input carrier with it, slot there]}
        same      [[index in result, index in input]] of input messages without id, returned as such
        inputs    [[index in input, digest]] of all carriers referred to
    """
    places = [(i, slot) for i, carrier in enumerate(carriers) for slot in _slots(carrier)]
    call_ids = {holder[key] for _, (holder, key) in places if _is_id(holder[key])}
    found = [(i, carrier) for i, carrier in enumerate(carriers) if _is_message(carrier)]
    # that one id is no id but the instruction to remove all messages
    message_ids = {_own(carrier)["id"] for _, carrier in found} - {None, REMOVE_ALL_MESSAGES}
    nameless = [(i, carrier) for i, carrier in found if _own(carrier)["id"] is None]

    ids: dict[str, int] = {}
    calls: dict[str, list[int]] = {}
    for i, carrier in enumerate(inputs):
        if message_ids and _is_message(carrier):
            name = _own(carrier)["id"]
            if name in message_ids:
                ids.setdefault(name, i)
        if call_ids:
            for k, (holder, key) in enumerate(_slots(carrier)):
                if _is_id(holder[key]) and holder[key] in call_ids:
                    calls.setdefault(holder[key], [i, k])
    at = {id(carrier): i for i, carrier in enumerate(inputs)} if nameless else {}
    same = [[i, at[id(carrier)]] for i, carrier in nameless if id(carrier) in at]
    if not call_ids and not message_ids and not same:
        return None
    used = {*ids.values(), *(i for i, _ in calls.values()), *(i for _, i in same)}
    return {
        "carriers": len(carriers),
        "ids": ids,
        "calls": calls,
        "same": same,
        "inputs": [[i, _digest(inputs[i])] for i in sorted(used)],
    }


def _rebind(result: Any, plan: dict[str, Any], state: Any) -> None:
    """Give the messages and tool calls of a freshly decoded result their new ids, in place."""
    carriers = _carriers(result, tree=True)
    if len(carriers) != plan["carriers"]:
        raise DecodeError("damaged replay plan: it is of another result")
    inputs = _carriers(state, tree=False) if plan["inputs"] else []
    for i, digest in plan["inputs"]:
        try:
            fits = _digest(inputs[i]) == digest
        except Exception as exc:
            raise DecodeError(f"the result refers to an input message: {exc!r:.200}") from exc
        if not fits:
            raise DecodeError("the result refers to an input message that is another one now")
    ids = {old: _id(_own(inputs[i])["id"]) for old, i in plan["ids"].items()}
    calls = {}
    for old, (i, k) in plan["calls"].items():
        holder, key = _slots(inputs[i])[k]
        calls[old] = _id(holder[key])
    same = dict(plan["same"])
    created = {_own(c)["id"] for c in carriers if _is_message(c) and not _removes(c)}

    for i, carrier in enumerate(carriers):
        if _is_message(carrier):
            # in __dict__, because a subclass may be frozen or validate assignments
            own = _own(carrier)
            old = own["id"]
            if old is None:
                if i in same:
                    own["id"] = inputs[same[i]].id
            elif old in ids or old in created:
                own["id"] = ids.setdefault(old, str(uuid.uuid4()))
            # else it removes a message that neither input nor result shows
        for holder, key in _slots(carrier):
            old = holder[key]
            if _is_id(old):
                if old not in calls:
                    calls[old] = _fresh_call(old)
                holder[key] = calls[old]
    for carrier in carriers:
        if type(carrier) is not dict:
            _rename_notes(carrier.__dict__.get("additional_kwargs"), calls)


def _is_id(value: Any) -> bool:
    """Whether it is an id: the later chunks of a tool call have ``None`` or nothing."""
    return type(value) is str and value != ""


def _id(value: Any) -> str:
    if type(value) is not str:
        raise DecodeError("the result refers to an input message that has no id now")
    return value


def _fresh_call(old: str) -> str:
    """An id like ``old``: providers look at the prefix and some limit the length."""
    prefix = _PREFIX.match(old)
    start = prefix.group() if prefix else ""
    return start + uuid.uuid4().hex[: max(9, len(old) - len(start))]


def _rename_notes(kwargs: Any, calls: dict[str, str]) -> None:
    if not kwargs:
        return
    for name in _NOTES:
        notes = kwargs.get(name)
        if type(notes) is dict:
            kwargs[name] = {calls.get(key, key): note for key, note in notes.items()}


def _removes(message: Any) -> bool:
    """Whether it names a message to remove, and creates none."""
    return (
        _role(message) == "remove" if type(message) is dict else isinstance(message, RemoveMessage)
    )


def _digest(carrier: Any) -> bytes:
    """The digest of what a carrier says, whatever its ids."""
    if type(carrier) is not dict:
        # not at import: keys are only needed by results that refer to their input
        from langgraph_perf.keys import message_digest

        return message_digest(carrier)
    fields = sorted((key, value) for key, value in carrier.items() if key != "id")
    return blake2b(encode(fields), digest_size=20).digest()


# -- where ids are --------------------------------------------------------------------------------


def _slots(carrier: Any) -> list[tuple[dict[str, Any], str]]:
    """The places of a carrier that hold tool-call ids, as (dict, key), in a fixed order."""
    if type(carrier) is dict:
        return [(carrier, "id")] if _is_call(carrier) else []
    own = carrier.__dict__
    slots = [
        (call, "id")
        for name in _CALL_LISTS
        if own.get(name)
        for call in own[name]
        if type(call) is dict and "id" in call
    ]
    if "tool_call_id" in own:
        slots.append((own, "tool_call_id"))
    content = own.get("content")
    if type(content) is list:
        for block in content:
            if type(block) is dict:
                if block.get("type") in _CALL_BLOCKS and "id" in block:
                    slots.append((block, "id"))
                slots += [(block, key) for key in _BLOCK_KEYS if key in block]
    raw = own.get("additional_kwargs")
    calls = raw.get("tool_calls") if type(raw) is dict and raw else None
    if type(calls) is list:
        slots += [(call, "id") for call in calls if type(call) is dict and "id" in call]
    return slots


_NO_MESSAGES = frozenset([*_CALL_LISTS, "content", "response_metadata", "usage_metadata"])
"""Fields of a message that hold no other messages."""


def _carriers(value: Any, *, tree: bool) -> list[Any]:
    """What carries ids in ``value``: messages, in lists also those in dict form, and bare tool
    calls, in a fixed order.

    The order is that of sorted keys where all keys are strings, else that of insertion.

    Args:
        tree: whether to look at a container again when it is met again. A result must be seen as
            the tree it was stored as; a state may refer to itself, and looking once is enough.
    """
    found: list[Any] = []
    _collect(value, found, set(), tree, True, 0)
    return found


def _collect(
    value: Any, found: list[Any], seen: set[int], tree: bool, calls: bool, depth: int
) -> None:
    kind = type(value)
    if kind in _LEAVES or depth > _MAX_DEPTH:
        return
    mro = kind.__mro__
    inside: Any
    listed = False
    if BaseMessage in mro:
        # every time, since an equal state may hold equal messages instead of one message twice
        found.append(value)
        inside = [
            item
            for name, item in value.__dict__.items()
            if item and type(item) not in _LEAVES and name not in _NO_MESSAGES
        ]
        if value.__pydantic_extra__:
            inside += value.__pydantic_extra__.values()
        if not inside:
            return
        calls = False
    elif dict in mro:
        if calls and kind is dict and _is_call(value):
            found.append(value)
            return
        # in a message of dict form the tool calls stay as they are
        calls = calls and not ("role" in value and "content" in value)
        inside = _values(value)
    elif list in mro or tuple in mro or deque in mro:
        inside = value
        listed = list in mro
    elif BaseModel in mro:
        parts = value.__dict__, value.__pydantic_extra__, value.__pydantic_private__
        inside = [item for part in parts if part for item in _values(part)]
    elif dataclasses.is_dataclass(kind) or kind is Send:
        own = getattr(value, "__dict__", {})
        names = [f.name for f in dataclasses.fields(kind)] if kind is not Send else ["arg"]
        inside = _values(own)
        inside += [getattr(value, name, None) for name in names if name not in own]
    else:
        return
    if id(value) in seen or _LEAVES.issuperset(map(type, inside)):
        return
    seen.add(id(value))
    for item in inside:
        if listed and type(item) is dict and _is_plain_message(item):
            found.append(item)
        _collect(item, found, seen, tree, calls, depth + 1)
    if tree:
        seen.discard(id(value))


def _values(mapping: dict[Any, Any]) -> list[Any]:
    if set(map(type, mapping)) == {str}:
        return [mapping[key] for key in sorted(mapping)]
    return list(mapping.values())


def _own(message: Any) -> dict[str, Any]:
    """The dict that holds the fields of a message, whatever its form."""
    own: dict[str, Any] = message if type(message) is dict else message.__dict__
    return own


def _is_message(carrier: Any) -> bool:
    """Whether a carrier is a message, and not a bare tool call."""
    return type(carrier) is not dict or not _is_call(carrier)


def _is_plain_message(value: dict[Any, Any]) -> bool:
    """Whether it is a message in dict form that has an id."""
    return type(value.get("id")) is str and _role(value) is not None and not _is_call(value)


def _role(value: dict[Any, Any]) -> str | None:
    """The role of a message in dict form; ``None`` if it is none."""
    role = value.get("role", value.get("type"))
    return role if type(role) is str and role in _ROLES and "content" in value else None


def _is_call(value: dict[Any, Any]) -> bool:
    return (
        value.get("type") == "tool_call"
        and type(value.get("id")) is str
        and "name" in value
        and "args" in value
    )


# -- text that may be an id -----------------------------------------------------------------------


_MUTE = _LEAVES - {str}
_may_be_id = re.compile(r"\S{8,128}").fullmatch
"""What a generated id looks like: shorter text equals one by chance."""
_UNREAD = frozenset(
    ["content", "id", "response_metadata", "tool_call_id", "type", "usage_metadata"]
)
"""Fields of a message whose text is no reference, or is rewritten."""
_Path = tuple[Any, ...]
"""``("result",)``, or an outer path, the format of a step, and what to fill in."""


def _refuse_texts(texts: dict[str, _Path], inputs: list[Any]) -> None:
    """Raise if one of these texts is the id of a message or tool call of the input."""
    for carrier in inputs:
        ids = [holder[key] for holder, key in _slots(carrier)]
        if _is_message(carrier):
            ids.append(_own(carrier)["id"])
        for text in ids:
            if text in texts:
                raise EncodeError(
                    f"{text!r} is the id of a message or tool call of the input, which other "
                    "inputs with the same content do not have",
                    _rendered(texts[text]),
                )


def _rendered(path: _Path) -> str:
    steps = []
    while len(path) > 1:
        path, step, label = path
        steps.append(step % (label,))
    return "".join([*path, *reversed(steps)])


def _find_texts(
    value: Any,
    path: _Path,
    found: dict[str, _Path],
    slots: frozenset[tuple[int, str]] = frozenset(),
    listed: bool = False,
) -> None:
    """Note all text in a result that may be an id and is not rewritten, with its path.

    Args:
        slots: the places in the message at hand that are rewritten, as (id of the dict, key).
        listed: whether the value is an element of a list.
    """
    kind = type(value)
    items: Iterable[tuple[Any, Any]]
    step = "[%r]"
    in_list = False
    if kind is str:
        if _may_be_id(value):
            found.setdefault(value, path)
        return
    if issubclass(kind, dict):
        items = value.items()
        if slots or "type" in value or "role" in value:
            items = _unwritten(value, slots, listed)
        for key, _ in items:
            # names of fields are words; an id has a digit or a dash
            word = type(key) is str and (len(key) < 8 or key.replace("_", "").isalpha())
            if not word and type(key) not in _MUTE:
                _find_texts(key, (path, " key%.0s", key), found)
    elif issubclass(kind, (list, tuple, deque)):
        if _MUTE.issuperset(map(type, value)):
            return
        items = enumerate(value)
        in_list = issubclass(kind, list)
    elif issubclass(kind, (set, frozenset)):
        step = " item%.0s"  # it has no place
        items = enumerate(value)
    elif issubclass(kind, BaseMessage):
        step = ".%s"
        slots = frozenset((id(holder), key) for holder, key in _slots(value))
        fields = {**value.__dict__, **(value.__pydantic_extra__ or {})}
        items = [(name, item) for name, item in fields.items() if item and name not in _UNREAD]
    else:
        step = ".%s"
        items = _attributes(value)
    for key, item in items:
        kind = type(item)
        if kind is str:
            if _may_be_id(item):
                found.setdefault(item, (path, step, key))
        elif kind not in _MUTE:
            _find_texts(item, (path, step, key), found, slots, in_list)


def _unwritten(
    value: dict[Any, Any], slots: frozenset[tuple[int, str]], listed: bool
) -> list[tuple[Any, Any]]:
    """What a dict holds besides rewritten ids, and besides the content of a message."""
    unread: Iterable[str] = ()
    if type(value) is dict and _is_call(value):
        unread = "id", "name", "type"
    elif listed and _role(value) is not None:
        unread = "content", "id", "role", "type"
    return [
        (key, item)
        for key, item in value.items()
        if key not in unread and not (slots and ((id(value), key) in slots or key in _NOTES))
    ]


def _attributes(value: Any) -> list[tuple[str, Any]]:
    """The attributes of a model, a dataclass or a ``Send``."""
    kind = type(value)
    if issubclass(kind, BaseModel):
        parts = value.__dict__, value.__pydantic_extra__, value.__pydantic_private__
        return [pair for part in parts if part for pair in part.items()]
    if kind is Send:
        return [("arg", value.arg)]  # its node is a name, no id
    if dataclasses.is_dataclass(kind):
        own = getattr(value, "__dict__", {})
        names = [f.name for f in dataclasses.fields(kind) if f.name not in own]
        return [*own.items(), *((name, getattr(value, name, None)) for name in names)]
    return []
