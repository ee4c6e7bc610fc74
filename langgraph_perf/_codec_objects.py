"""Instances of dataclasses, models, enums and named tuples: taken apart and put together.

Each kind has a writer and a reader that mirror each other. No constructor, validator, property or
hook of the class runs: state is taken from, and put back into, ``__dict__`` and slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from langgraph_perf._codec_classes import Plan
from langgraph_perf._codec_format import (
    ATTRIBUTES,
    ITEMS,
    DecodeError,
    EncodeError,
    Parts,
    Tag,
    damaged,
)

_new = object.__new__
_set = object.__setattr__


def _write_model(plan: Plan, obj: Any) -> Parts:
    state = [obj.__dict__, obj.__pydantic_extra__, obj.__pydantic_private__]
    return Tag.MODEL, ATTRIBUTES, [plan.ref, plan.shape, list(obj.__pydantic_fields_set__)], state


def _read_model(plan: Plan, head: list[Any], parts: list[Any]) -> Any:
    _, _, fields_set = head
    state, extra, private = parts
    obj: Any = _new(plan.cls)
    _set(obj, "__dict__", state)
    _set(obj, "__pydantic_fields_set__", set(fields_set))
    _set(obj, "__pydantic_extra__", _attributes(extra))
    _set(obj, "__pydantic_private__", _attributes(private))
    return obj


def _write_model_v1(plan: Plan, obj: Any) -> Parts:
    head = [plan.ref, plan.shape, list(obj.__fields_set__)]
    return Tag.MODEL_V1, ATTRIBUTES, head, [obj.__dict__, _slots(plan, obj)]


def _read_model_v1(plan: Plan, head: list[Any], parts: list[Any]) -> Any:
    _, _, fields_set = head
    state, slots = parts
    obj: Any = _new(plan.cls)
    _set(obj, "__dict__", state)
    _set(obj, "__fields_set__", set(fields_set))
    _fill_slots(plan, obj, slots)
    return obj


def _write_record(plan: Plan, obj: Any) -> Parts:
    state = getattr(obj, "__dict__", None)
    return Tag.RECORD, ATTRIBUTES, [plan.ref, plan.shape], [state, _slots(plan, obj)]


def _read_record(plan: Plan, _: list[Any], parts: list[Any]) -> Any:
    state, slots = parts
    obj: Any = _new(plan.cls)
    if state is not None:
        _set(obj, "__dict__", state)
    _fill_slots(plan, obj, slots)
    return obj


def _attributes(state: Any) -> dict[str, Any] | None:
    if state is not None and type(state) is not dict:
        damaged("has attributes of the wrong kind")
    return cast("dict[str, Any] | None", state)


def _slots(plan: Plan, obj: Any) -> dict[str, Any] | None:
    state = {}
    for name, slot in plan.slots.items():
        try:
            state[name] = slot.__get__(obj)
        except AttributeError:  # never assigned, and so it shall come back
            continue
    return state or None


def _fill_slots(plan: Plan, obj: Any, slots: Any) -> None:
    for name, value in (_attributes(slots) or {}).items():
        plan.slots[name].__set__(obj, value)


def _write_named(plan: Plan, obj: Any) -> Parts:
    if getattr(obj, "__dict__", None):
        raise EncodeError(f"a {plan.ref} with attributes of its own cannot be stored")
    return Tag.NAMED, ITEMS, [plan.ref, plan.shape], list(tuple.__iter__(obj))


def _read_named(plan: Plan, _: list[Any], parts: list[Any]) -> Any:
    cls: Any = plan.cls
    if len(parts) != len(cls._fields):
        damaged("has a named tuple of the wrong length")
    return tuple.__new__(cls, parts)


def _write_enum(plan: Plan, obj: Any) -> Parts:
    if plan.cls._member_map_.get(obj._name_) is not obj:  # type: ignore[attr-defined]
        raise EncodeError(f"is no member of {plan.ref}")
    return Tag.ENUM, ITEMS, [plan.ref, plan.shape, obj._name_], []


def _read_enum(plan: Plan, head: list[Any], _: list[Any]) -> Any:
    name = head[2]
    cls: Any = plan.cls
    member = cls._member_map_.get(name)
    if member is None:
        raise DecodeError(f"type {plan.ref} has no member {name!r:.80} any more")
    return member


def _write_flag(plan: Plan, obj: Any) -> Parts:
    if _flag(plan.cls, obj._value_) is not obj:
        raise EncodeError(f"is no value of {plan.ref}")
    # as a part, not in the head: a flag may have more than 64 bits
    return Tag.FLAG, ITEMS, [plan.ref, plan.shape], [obj._value_]


def _read_flag(plan: Plan, _: list[Any], parts: list[Any]) -> Any:
    (value,) = parts
    return _flag(plan.cls, value)


def _flag(cls: Any, value: int) -> Any:
    """The (combined) flag of that value, made by nobody's code but the standard library's."""
    known = cls._value2member_map_.get(value)
    if known is not None:
        return known
    for base in cls.__mro__:
        missing = vars(base).get("_missing_")
        if missing is not None:
            if base.__module__ != "enum" or type(value) is not int:
                raise ValueError("a flag with a _missing_ of its own")
            return missing.__get__(None, cls)(value)
    raise ValueError("not a flag")


WRITERS: dict[int, Callable[[Plan, Any], Parts]] = {
    Tag.MODEL: _write_model,
    Tag.MODEL_V1: _write_model_v1,
    Tag.RECORD: _write_record,
    Tag.NAMED: _write_named,
    Tag.ENUM: _write_enum,
    Tag.FLAG: _write_flag,
}
READERS: dict[int, Callable[[Plan, list[Any], list[Any]], Any]] = {
    Tag.MODEL: _read_model,
    Tag.MODEL_V1: _read_model_v1,
    Tag.RECORD: _read_record,
    Tag.NAMED: _read_named,
    Tag.ENUM: _read_enum,
    Tag.FLAG: _read_flag,
}
"""From the plan, the head (which begins with name and shape) and the parts."""
