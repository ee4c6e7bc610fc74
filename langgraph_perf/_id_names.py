"""Text in a node's input that names one of its messages or tool calls by id.

Ids are not part of what a conversation says: equal ones have other ids. But which message it is
that some field names is part of the input.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from langchain_core.messages import BaseMessage

from langgraph_perf._canonical import mro_of
from langgraph_perf._id_places import LEAVES, is_call
from langgraph_perf._message_rows import own_of

_looks_like_id = re.compile(r"(?=\D*\d)\S{1,128}").fullmatch
_FEW = 64  # what is larger is data, not a choice
_MOST = 4096
_DEEPEST = 6


def named(value: Any, calls: Mapping[str, int]) -> list[tuple[str, str, int]]:
    """Which messages and tool calls are named in ``value`` outside of the messages themselves:
    where they are, the id, and how-manieth they are.

    Looked at is text in fields, and in what fields hold: in objects and in short lists, sets and
    dicts, some levels deep.

    Args:
        calls: the tool-call ids in ``value``, each with its number.
    """
    names, conversations = _found_in(value)
    if not names:
        return []
    found = [("", name, calls[name]) for name in names if name in calls]
    for path, messages in conversations:
        for index, message in enumerate(messages):
            if _is_message(message) and own_of(message).get("id") in names:
                found.append((path, own_of(message)["id"], index))
    return sorted(found)


def _found_in(value: Any) -> tuple[set[str], list[tuple[str, list[Any]]]]:
    """Text that looks like an id, and lists of messages with where they are."""
    names: set[str] = set()
    conversations = []
    left = [("", value, 0)]
    for path, holder, depth in left:  # which grows
        kind = type(holder)
        if kind is list and holder and _is_message(holder[0]):
            if depth:
                conversations.append((path, holder))
            continue
        for name, item in _items(holder, few=depth > 0):
            if type(item) is str:
                if _looks_like_id(item):
                    names.add(item)
            elif type(item) not in LEAVES and depth < _DEEPEST and len(left) < _MOST:
                left.append((f"{path}.{name}" if path else str(name), item, depth + 1))
            if kind is dict and depth and type(name) is str and _looks_like_id(name):
                names.add(name)
    return names, conversations


def _items(holder: Any, few: bool) -> Iterable[tuple[Any, Any]]:
    """What is in an object, or in a container if it is small."""
    kind = type(holder)
    if kind is dict:
        if few and len(holder) > _FEW:
            return ()
        call = is_call(holder)  # whose id counts by position
        return [(key, item) for key, item in list(holder.items()) if not (call and key == "id")]
    if kind in (list, tuple, set, frozenset):
        return enumerate(list(holder)) if few and len(holder) <= _FEW else ()
    if not kind.__dictoffset__ or _is_message(holder):
        return ()
    return list(object.__getattribute__(holder, "__dict__").items())


def _is_message(value: Any) -> bool:
    return BaseMessage in mro_of(type(value))
