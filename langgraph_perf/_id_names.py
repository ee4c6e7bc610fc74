"""Text in a node's input that names one of its messages or tool calls by id.

Ids are not part of what a conversation says: equal ones have other ids. But which message it is
that some field names is part of the input.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from langchain_core.messages import BaseMessage

from langgraph_perf._canonical import mro_of
from langgraph_perf._id_places import is_call
from langgraph_perf._message_rows import own_of

_looks_like_id = re.compile(r"(?=\D*\d)\S{1,128}").fullmatch
_FEW = 64  # what is larger is data, not a choice


def named(value: Any, calls: Mapping[str, int]) -> list[tuple[str, str, int]]:
    """Which messages and tool calls are named by other fields of ``value``: where they are, the
    id, and how-manieth they are.

    Looked at are fields that are text, and short lists and dicts of text, or of such dicts.

    Args:
        calls: the tool-call ids in ``value``, each with its number.
    """
    fields = value
    if type(value) is not dict:
        if BaseMessage in mro_of(type(value)) or not type(value).__dictoffset__:
            return []
        fields = object.__getattribute__(value, "__dict__")
    names: set[str] = set()
    conversations = []
    for name, item in _besides_id(fields):
        if type(item) is list and item and BaseMessage in mro_of(type(item[0])):
            conversations.append((str(name), item))
        else:
            names.update(_texts([item], 2))
    if not names:
        return []
    found = [("", name, calls[name]) for name in names if name in calls]
    for field, messages in conversations:
        for index, message in enumerate(messages):
            if BaseMessage in mro_of(type(message)) and own_of(message).get("id") in names:
                found.append((field, own_of(message)["id"], index))
    return sorted(found)


def _texts(values: Iterable[Any], depth: int) -> Iterator[str]:
    for value in values:
        if type(value) is str:
            if _looks_like_id(value):
                yield value
        elif depth and type(value) in (list, tuple, dict) and len(value) <= _FEW:
            inside = (item for _, item in _besides_id(value)) if type(value) is dict else value
            yield from _texts(inside, depth - 1)


def _besides_id(value: dict[Any, Any]) -> list[tuple[Any, Any]]:
    """What is in a dict, without the id of a tool call, which counts by position."""
    call = is_call(value)
    return [(key, item) for key, item in list(value.items()) if not (call and key == "id")]
