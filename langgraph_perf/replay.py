"""Message identity on replay: a cached result must not bring back the ids of another run.

LangGraph's ``add_messages`` merges by message id, so an id replayed into another conversation
overwrites, or removes, the wrong message. When a result is stored, a *plan* is stored with it that
tells which ids the node created and which ones name something in its input. On replay, created ids
are replaced by fresh ones and the others by the ids that the same messages have in the input at
hand. Tool-call ids are treated likewise. Whatever refers to one id refers to one id afterwards.

Only the places that hold ids are rewritten: a message's ``id``, and for tool calls those listed in
``_id_places.slots_of``. Of messages in dict form only the ``id`` is. An id of the input elsewhere
in a result is text that cannot be told from a reference, so such a result is not stored.
"""

from __future__ import annotations

import re
import uuid
from hashlib import blake2b
from typing import Any

from langchain_core.messages import BaseMessage, RemoveMessage
from langgraph.graph.message import REMOVE_ALL_MESSAGES

from langgraph_perf._id_places import (
    NOTES,
    TOOL_CALL,
    carriers_in,
    is_message,
    own_of,
    role_of,
    slots_of,
)
from langgraph_perf._id_texts import TextPath, find_texts, refuse_texts
from langgraph_perf.codec import Allowlist, DecodeError, EncodeError, decode, encode

__all__ = ["pack_result", "spent_tokens", "unpack_result"]

_PLANNED = b"R"
"""First byte of a payload with a plan: no payload of the codec begins with it."""
_CONTENT, _ID = b"\xa7content", b"\xa2id"
"""How the codec writes two keys that every message in dict form has."""
_PREFIX = re.compile(r"(?:[a-z]{2,12}[_-])*")


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
        for message in {
            id(carrier): carrier for carrier in carriers_in(result, tree=False)
        }.values():
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
    if messages or TOOL_CALL in payload or (_CONTENT in payload and _ID in payload):
        carriers = carriers_in(result, tree=True)
    if sum(type(carrier) is not dict for carrier in carriers) != messages:
        raise EncodeError("a message lies where it cannot be given a new id on replay")
    texts: dict[str, TextPath] = {}
    find_texts(result, ("result",), texts)
    if not carriers and not texts:
        return None
    inputs = carriers_in(state, tree=False)
    if texts:
        refuse_texts(texts, inputs)
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
    places = [(i, slot) for i, carrier in enumerate(carriers) for slot in slots_of(carrier)]
    call_ids = {holder[key] for _, (holder, key) in places if _is_id(holder[key])}
    found = [(i, carrier) for i, carrier in enumerate(carriers) if is_message(carrier)]
    # that one id is no id but the instruction to remove all messages
    message_ids = {own_of(carrier)["id"] for _, carrier in found} - {None, REMOVE_ALL_MESSAGES}
    nameless = [(i, carrier) for i, carrier in found if own_of(carrier)["id"] is None]

    ids: dict[str, int] = {}
    calls: dict[str, list[int]] = {}
    for i, carrier in enumerate(inputs):
        if message_ids and is_message(carrier):
            name = own_of(carrier)["id"]
            if name in message_ids:
                ids.setdefault(name, i)
        if call_ids:
            for k, (holder, key) in enumerate(slots_of(carrier)):
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
    carriers = carriers_in(result, tree=True)
    if len(carriers) != plan["carriers"]:
        raise DecodeError("damaged replay plan: it is of another result")
    inputs = carriers_in(state, tree=False) if plan["inputs"] else []
    for i, digest in plan["inputs"]:
        try:
            fits = _digest(inputs[i]) == digest
        except Exception as exc:
            raise DecodeError(f"the result refers to an input message: {exc!r:.200}") from exc
        if not fits:
            raise DecodeError("the result refers to an input message that is another one now")
    ids = {old: _id(own_of(inputs[i])["id"]) for old, i in plan["ids"].items()}
    calls = {}
    for old, (i, k) in plan["calls"].items():
        holder, key = slots_of(inputs[i])[k]
        calls[old] = _id(holder[key])
    same = dict(plan["same"])
    created = {own_of(c)["id"] for c in carriers if is_message(c) and not _removes(c)}

    for i, carrier in enumerate(carriers):
        if is_message(carrier):
            # in __dict__, because a subclass may be frozen or validate assignments
            own = own_of(carrier)
            old = own["id"]
            if old is None:
                if i in same:
                    own["id"] = inputs[same[i]].id
            elif old in ids or old in created:
                own["id"] = ids.setdefault(old, str(uuid.uuid4()))
            # else it removes a message that neither input nor result shows
        for holder, key in slots_of(carrier):
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
    for name in NOTES:
        notes = kwargs.get(name)
        if type(notes) is dict:
            kwargs[name] = {calls.get(key, key): note for key, note in notes.items()}


def _removes(message: Any) -> bool:
    """Whether it names a message to remove, and creates none."""
    return (
        role_of(message) == "remove"
        if type(message) is dict
        else isinstance(message, RemoveMessage)
    )


def _digest(carrier: Any) -> bytes:
    """The digest of what a carrier says, whatever its ids."""
    if type(carrier) is not dict:
        # not at import: keys are only needed by results that refer to their input
        from langgraph_perf.keys import message_digest

        return message_digest(carrier)
    fields = sorted((key, value) for key, value in carrier.items() if key != "id")
    return blake2b(encode(fields), digest_size=20).digest()
