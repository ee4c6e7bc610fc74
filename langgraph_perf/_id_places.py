"""Where in a value the ids of messages and tool calls are."""

from __future__ import annotations

import dataclasses
import datetime as dt
import uuid
from collections import deque
from typing import Any

from langchain_core.messages import BaseMessage
from langgraph.types import Send
from pydantic import BaseModel

TOOL_CALL = b"\xa9tool_call"
"""How msgpack, and so the codec, has the ``type`` of a tool call."""

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
NOTES = ("__openai_function_call_ids__", "__gemini_function_call_thought_signatures__")
"""Where integrations note something under the id of a tool call, in ``additional_kwargs``."""
LEAVES = frozenset(
    [type(None), bool, int, float, complex, str, bytes, bytearray, dt.datetime, dt.date, uuid.UUID]
)
_MAX_DEPTH = 200


def slots_of(carrier: Any) -> list[tuple[dict[str, Any], str]]:
    """The places of a carrier that hold tool-call ids, as (dict, key), in a fixed order."""
    if type(carrier) is dict:
        return [(carrier, "id")] if is_call(carrier) else []
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


def carriers_in(value: Any, *, tree: bool) -> list[Any]:
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
    if kind in LEAVES or depth > _MAX_DEPTH:
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
            if item and type(item) not in LEAVES and name not in _NO_MESSAGES
        ]
        if value.__pydantic_extra__:
            inside += value.__pydantic_extra__.values()
        if not inside:
            return
        calls = False
    elif dict in mro:
        if calls and kind is dict and is_call(value):
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
    if id(value) in seen or LEAVES.issuperset(map(type, inside)):
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


def own_of(message: Any) -> dict[str, Any]:
    """The dict that holds the fields of a message, whatever its form."""
    own: dict[str, Any] = message if type(message) is dict else message.__dict__
    return own


def is_message(carrier: Any) -> bool:
    """Whether a carrier is a message, and not a bare tool call."""
    return type(carrier) is not dict or not is_call(carrier)


def _is_plain_message(value: dict[Any, Any]) -> bool:
    """Whether it is a message in dict form that has an id."""
    return type(value.get("id")) is str and role_of(value) is not None and not is_call(value)


def role_of(value: dict[Any, Any]) -> str | None:
    """The role of a message in dict form; ``None`` if it is none."""
    role = value.get("role", value.get("type"))
    return role if type(role) is str and role in _ROLES and "content" in value else None


def is_call(value: dict[Any, Any]) -> bool:
    return (
        value.get("type") == "tool_call"
        and type(value.get("id")) is str
        and "name" in value
        and "args" in value
    )
