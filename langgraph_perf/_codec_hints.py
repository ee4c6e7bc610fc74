"""The storable classes that type hints mention."""

from __future__ import annotations

import enum
import sys
import typing
from typing import Any

from pydantic import BaseModel

from langgraph_perf._codec_classes import generic_of, plan_of


def types_in(schema: Any) -> set[type]:
    """The dataclasses, models, enums and named tuples that values of a type hint may consist of.

    Looks into TypedDicts, unions, generics, ``Annotated``, fields of classes, and so on. What
    cannot be resolved, for example a forward reference to a name that does not exist, is left out.
    """
    found: set[type] = set()
    stack: list[Any] = [schema]
    seen: set[int] = set()
    keep: list[Any] = []  # so that no id in ``seen`` is used again
    while stack:
        hint = stack.pop()
        if id(hint) in seen:
            continue
        seen.add(id(hint))
        keep.append(hint)
        try:
            stack += _inside(hint, found)
        except Exception:  # hints run user code, and an odd one must not fail a graph
            continue
    return found


def _inside(hint: Any, found: set[type]) -> list[Any]:
    """The hints that ``hint`` directly consists of; a class of a storable kind is added."""
    if isinstance(hint, (list, tuple)):  # Callable's parameters; several schemas at once
        return list(hint)
    if isinstance(hint, enum.Enum):  # in a Literal
        return [type(hint)]
    origin = typing.get_origin(hint)
    if origin is not None:
        args = typing.get_args(hint)
        return [origin, *(args[:1] if origin is typing.Annotated else args)]
    if isinstance(hint, typing.TypeVar):
        return [hint.__bound__, *hint.__constraints__]
    for attribute in ("__supertype__", "__value__"):  # NewType, ``type X = ...``
        if not isinstance(hint, type) and hasattr(hint, attribute):
            return [getattr(hint, attribute)]
    if not isinstance(hint, type):
        return []
    if plan_of(hint) is not None:
        found.add(hint)
    generic = generic_of(hint)
    inside = [generic["origin"], *generic["args"]] if generic else []
    if issubclass(hint, BaseModel):
        inside += [field.annotation for field in hint.model_fields.values()]
        return inside
    return inside + _hints(hint)


def _hints(cls: type) -> list[Any]:
    """The resolved annotations of a class; those that do not resolve are left out."""
    try:
        return list(typing.get_type_hints(cls, include_extras=True).values())
    except Exception:
        hints: list[Any] = []
        for base in cls.__mro__:
            module = sys.modules.get(base.__module__)
            for name, hint in vars(base).get("__annotations__", {}).items():
                try:
                    probe = type("probe", (), {"__annotations__": {name: hint}})
                    resolved = typing.get_type_hints(probe, vars(module), vars(base), True)
                except Exception:
                    continue
                hints += resolved.values()
        return hints
