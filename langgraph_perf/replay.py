"""Message identity on replay: a cached result must not bring back the ids of another run.

LangGraph's ``add_messages`` merges by message id, so an id replayed into another conversation
overwrites, or removes, the wrong message. When a result is stored, a *plan* is stored with it that
tells which ids the node created and which ones name something in its input. On replay, created ids
are replaced by fresh ones and the others by the ids that the same messages have in the input at
hand. Tool-call ids are treated likewise. Whatever refers to one id refers to one id afterwards.

A place in the input tells which message is meant only if the inputs are alike. So messages are
looked for in the part of the input that the cache key covers. A result that refers to one which the
key leaves out is replayed only where all messages of the input say the same.

An id that the key covers as text, a field say, stays: the node was told to use it.

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
from langgraph_perf._id_texts import (
    TextPath,
    find_texts,
    may_be_id,
    refuse_texts,
    texts_among,
)
from langgraph_perf.codec import Allowlist, DecodeError, EncodeError, decode, encode

__all__ = ["pack_result", "spent_tokens", "unpack_result"]

_PLANNED = b"R"
"""First byte of a payload with a plan: no payload of the codec begins with it."""
_CONTENT, _ID = b"\xa7content", b"\xa2id"
"""How the codec writes two keys that every message in dict form has."""
_PREFIX = re.compile(r"(?:[a-z]{2,12}[_-])*")


ALL: Any = object()
"""The key covers the whole input."""


def pack_result(result: Any, state: Any, keyed: Any = ALL) -> bytes:
    """The bytes from which ``unpack_result`` replays ``result``.

    Ids stay consistent within what is packed, so what belongs to a result (recorded stream chunks)
    can be packed along with it, in one tuple.

    Args:
        result: what the node returned; it is not changed.
        state: what the node was given.
        keyed: what of it the cache key covers.

    Raises:
        EncodeError: the result cannot be stored, or replayed under other ids.
    """
    messages: list[BaseMessage] = []
    payload = encode(result, messages=messages)
    try:
        plan = _plan_for(result, payload, len(messages), state, keyed)
    except EncodeError:
        raise
    except Exception as exc:
        raise EncodeError(f"its messages cannot be compared with the input's: {exc}") from exc
    if plan is None:
        return payload
    header = encode(plan)
    return b"".join([_PLANNED, len(header).to_bytes(4, "little"), header, payload])


def unpack_result(
    payload: bytes, state: Any, allowed: Allowlist | None = None, keyed: Any = ALL
) -> Any:
    """A fresh copy of the packed result, under ids that fit ``state``.

    Args:
        payload: from ``pack_result``.
        state: what the node would be given now.
        allowed: classes to restore besides the built-in ones.
        keyed: what of ``state`` the cache key covers.

    Raises:
        DecodeError: the payload is damaged, or refers to an input message of which ``state`` does
            not show which one it is now.
    """
    if payload[:1] != _PLANNED:
        return decode(payload, allowed)
    view = memoryview(payload)
    start = 5 + int.from_bytes(view[1:5], "little")
    plan = decode(view[5:start])
    result = decode(view[start:], allowed)
    try:
        _rebind(result, plan, state, keyed)
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

_Places = list[list[int]]


def _plan_for(
    result: Any, payload: bytes, messages: int, state: Any, keyed: Any
) -> dict[str, Any] | None:
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
    everything = carriers_in(state, tree=False)
    if texts:
        refuse_texts(texts, everything)
    if keyed is ALL:
        plan, new = _make_plan(carriers, everything, [])
    else:
        plan, new = _make_plan(carriers, carriers_in(keyed, tree=False), everything)
    if plan is not None:
        plan["given"] = _given(new, state, keyed)
    return plan


def _given(new: set[str], state: Any, keyed: Any) -> list[str]:
    """Of ids that no message of the input has, those that the node was told as text, as a field or
    as an argument of what it was sent. They are in the key, and stay."""
    given = texts_among(new, state if keyed is ALL else keyed)
    if keyed is not ALL:
        for text in texts_among(set(filter(may_be_id, new - given)), state):
            raise EncodeError(
                f"{text!r} is the id of a message or tool call of the result, and is in the input "
                "where the key does not cover it; key= has to"
            )
    return sorted(given)


def _make_plan(
    carriers: list[Any], keyed: list[Any], everything: list[Any]
) -> tuple[dict[str, Any] | None, set[str]]:
    """Which of the result's ids name something in the input, and the other ones; ``None`` if it has
    no ids at all.

    A plan is plain data, in which the input's carriers are those that the key covers, and, if some
    that are referred to are not among them, then all that there are::

        carriers    how many carriers the result has
        everything  the digest of all that there are; ``None`` if the key covers what is needed
        ids         {message id: [[index of an input carrier that has it], ...]}
        calls       {tool-call id: [[index of an input carrier with it, slot there], ...]}
        same        [[index in result, [[index in input], ...]], ...] of input messages without id,
                    returned as such
        given       ids that stay, because the input has them as text
        inputs      [[index in input, digest], ...] of all carriers referred to
    """
    inputs = [*keyed, *everything]
    slots = [slot for carrier in carriers for slot in slots_of(carrier)]
    call_ids = {holder[key] for holder, key in slots if _is_id(holder[key])}
    messages = [(i, carrier) for i, carrier in enumerate(carriers) if is_message(carrier)]
    # that one id is no id but the instruction to remove all messages
    message_ids = {own_of(carrier)["id"] for _, carrier in messages} - {None, REMOVE_ALL_MESSAGES}
    nameless = [(i, carrier) for i, carrier in messages if own_of(carrier)["id"] is None]

    ids: dict[str, _Places] = {}
    calls: dict[str, _Places] = {}
    at: dict[int, _Places] = {}
    for i, carrier in enumerate(inputs):
        if message_ids and is_message(carrier):
            name = own_of(carrier)["id"]
            if name in message_ids:
                ids.setdefault(name, []).append([i])
        if call_ids:
            for k, (holder, key) in enumerate(slots_of(carrier)):
                if _is_id(holder[key]) and holder[key] in call_ids:
                    places = calls.setdefault(holder[key], [])
                    if not places or places[-1][0] != i:
                        places.append([i, k])
        if nameless:
            at.setdefault(id(carrier), []).append([i])
    same = [(i, at[id(carrier)]) for i, carrier in nameless if id(carrier) in at]
    if not call_ids and not message_ids and not same:
        return None, set()
    named = [*ids.values(), *calls.values(), *(places for _, places in same)]
    covered = all(places[0][0] < len(keyed) for places in named)
    if covered:
        for places in named:
            places[:] = [place for place in places if place[0] < len(keyed)]
    used = {place[0] for places in named for place in places}
    new = {each for each in message_ids | call_ids if _is_id(each)} - ids.keys() - calls.keys()
    plan = {
        "carriers": len(carriers),
        "everything": None if covered else _digest_of_all(everything),
        "ids": ids,
        "calls": calls,
        "same": same,
        "inputs": [[i, _digest(inputs[i])] for i in sorted(used)],
    }
    return plan, new


def _rebind(result: Any, plan: dict[str, Any], state: Any, keyed: Any) -> None:
    """Give the messages and tool calls of a freshly decoded result their new ids, in place."""
    carriers = carriers_in(result, tree=True)
    if len(carriers) != plan["carriers"]:
        raise DecodeError("damaged replay plan: it is of another result")
    inputs = _inputs(plan, state, keyed) if plan["inputs"] else []
    for i, digest in plan["inputs"]:
        try:
            fits = _digest(inputs[i]) == digest
        except Exception as exc:
            raise DecodeError(f"the result refers to an input message: {exc!r:.200}") from exc
        if not fits:
            raise DecodeError("the result refers to an input message that is another one now")
    ids = {
        old: _id([own_of(inputs[i])["id"] for (i,) in places])
        for old, places in plan["ids"].items()
    }
    calls = {}
    for old, places in plan["calls"].items():
        slots = [slots_of(inputs[i])[k] for i, k in places]
        calls[old] = _id([holder[key] for holder, key in slots])
    same = {i: _one([inputs[at].id for (at,) in places]) for i, places in plan["same"]}
    for each in plan["given"]:
        ids.setdefault(each, each)
        calls.setdefault(each, each)
    created = {own_of(c)["id"] for c in carriers if is_message(c) and not _removes(c)}

    for i, carrier in enumerate(carriers):
        if is_message(carrier):
            # in __dict__, because a subclass may be frozen or validate assignments
            own = own_of(carrier)
            old = own["id"]
            if old is None:
                if i in same:
                    own["id"] = same[i]
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


def _inputs(plan: dict[str, Any], state: Any, keyed: Any) -> list[Any]:
    """The carriers of the input at hand that the places in a plan are about."""
    inputs = carriers_in(state if keyed is ALL else keyed, tree=False)
    if plan["everything"] is not None:
        everything = carriers_in(state, tree=False)
        if _digest_of_all(everything) != plan["everything"]:
            raise DecodeError(
                "the result refers to a message that the key does not cover, and the input's "
                "messages are others now"
            )
        inputs += everything
    return inputs


def _id(values: list[Any]) -> str:
    value = _one(values)
    if type(value) is not str:
        raise DecodeError("the result refers to an input message that has no id now")
    return value


def _one(values: list[Any]) -> Any:
    """What used to be one and the same id in several places."""
    if any(value != values[0] for value in values):
        raise DecodeError("the result refers to an input message that is more than one now")
    return values[0]


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


def _digest_of_all(carriers: list[Any]) -> bytes:
    """The digest of what carriers say, one after the other."""
    return blake2b(b"".join(map(_digest, carriers)), digest_size=20).digest()
