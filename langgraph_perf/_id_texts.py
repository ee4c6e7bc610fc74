"""Text in a result that may be an id, outside the places that are rewritten on replay."""

from __future__ import annotations

import dataclasses
import re
from collections import deque
from collections.abc import Iterable
from typing import Any

from langchain_core.messages import BaseMessage
from langgraph.types import Send
from pydantic import BaseModel

from langgraph_perf._id_places import LEAVES, NOTES, is_call, is_message, own_of, role_of, slots_of
from langgraph_perf.codec import EncodeError

_MUTE = LEAVES - {str}
may_be_id = re.compile(r"\S{8,128}").fullmatch
"""What a generated id looks like: shorter text equals one by chance."""
_UNREAD = frozenset(
    ["content", "id", "response_metadata", "tool_call_id", "type", "usage_metadata"]
)
"""Fields of a message whose text is no reference, or is rewritten."""
TextPath = tuple[Any, ...]
"""``("result",)``, or an outer path, the format of a step, and what to fill in."""


def refuse_texts(texts: dict[str, TextPath], inputs: list[Any]) -> None:
    """Raise if one of these texts is the id of a message or tool call of the input."""
    for carrier in inputs:
        ids = [holder[key] for holder, key in slots_of(carrier)]
        if is_message(carrier):
            ids.append(own_of(carrier)["id"])
        for text in ids:
            if text in texts:
                raise EncodeError(
                    f"{text!r} is the id of a message or tool call of the input, which other "
                    "inputs with the same content do not have",
                    _rendered(texts[text]),
                )


def _rendered(path: TextPath) -> str:
    steps = []
    while len(path) > 1:
        path, step, label = path
        steps.append(step % (label,))
    return "".join([*path, *reversed(steps)])


def find_texts(
    value: Any,
    path: TextPath,
    found: dict[str, TextPath],
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
        if may_be_id(value):
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
                find_texts(key, (path, " key%.0s", key), found)
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
        slots = frozenset((id(holder), key) for holder, key in slots_of(value))
        fields = {**value.__dict__, **(value.__pydantic_extra__ or {})}
        items = [(name, item) for name, item in fields.items() if item and name not in _UNREAD]
    else:
        step = ".%s"
        items = _attributes(value)
    for key, item in items:
        kind = type(item)
        if kind is str:
            if may_be_id(item):
                found.setdefault(item, (path, step, key))
        elif kind not in _MUTE:
            find_texts(item, (path, step, key), found, slots, in_list)


def _unwritten(
    value: dict[Any, Any], slots: frozenset[tuple[int, str]], listed: bool
) -> list[tuple[Any, Any]]:
    """What a dict holds besides rewritten ids, and besides the content of a message."""
    unread: Iterable[str] = ()
    if type(value) is dict and is_call(value):
        unread = "id", "name", "type"
    elif listed and role_of(value) is not None:
        unread = "content", "id", "role", "type"
    return [
        (key, item)
        for key, item in value.items()
        if key not in unread and not (slots and ((id(value), key) in slots or key in NOTES))
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


def texts_among(wanted: set[str], value: Any) -> set[str]:
    """Which of these texts an input has somewhere, other than in its messages."""
    found: set[str] = set()
    left, seen = [value], set()
    while left and wanted:
        value = left.pop()
        kind = type(value)
        if kind is str:
            if value in wanted:
                found.add(value)
        elif kind not in _MUTE and not issubclass(kind, BaseMessage) and id(value) not in seen:
            seen.add(id(value))  # a state may refer to itself
            if issubclass(kind, dict):
                left += [*value, *value.values()]
            elif issubclass(kind, (list, tuple, deque, set, frozenset)):
                left += value
            else:
                left += [item for _, item in _attributes(value)]
    return found
