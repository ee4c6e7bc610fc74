"""How value types beyond the built-in containers are encoded: the standard library's, dataclasses,
enums, pydantic models, LangGraph's own, and numpy's.

A plan is made once per type. Types are recognised by their method resolution order, never by
``isinstance``, which would run what a user's class says about itself.
"""

from __future__ import annotations

import datetime as dt
import decimal
import enum
import fractions
import ipaddress
import pathlib
import re
import sys
import types
import uuid
import zoneinfo
from collections.abc import Callable
from typing import Any

from langgraph.types import Send
from pydantic import BaseModel

from langgraph_perf._canonical import (
    Encoder,
    Plan,
    Unkeyable,
    instance_state,
    mro_of,
    namespace_of,
    text,
    type_name,
)

_get_extra = BaseModel.__dict__["__pydantic_extra__"].__get__
_get_private = BaseModel.__dict__["__pydantic_private__"].__get__


def extra_of(model: Any) -> dict[str, Any]:
    """A pydantic model's extra fields."""
    return _slot(_get_extra, model)


def private_of(model: Any) -> dict[str, Any]:
    """A pydantic model's private attributes."""
    return _slot(_get_private, model)


def _slot(get: Callable[[Any], Any], model: Any) -> dict[str, Any]:
    try:
        return get(model) or {}
    except AttributeError:  # a RootModel's is empty
        return {}


def value_plan(kind: type) -> Plan | None:
    """The plan of one of this module's types, or ``None``."""
    as_text = _TEXT.get(kind)
    if as_text is not None:
        return _by(kind, lambda encoder, value: text(as_text(value)))
    parts = _PARTS.get(kind) or _PARTS_BY_NAME.get(type_name(kind))
    if parts is not None:
        return _by(kind, lambda encoder, value: encoder.encode(parts(value)))
    mro = mro_of(kind)
    if enum.Enum in mro:
        return _enum_plan(kind, flag=enum.Flag in mro)
    if "numpy" in sys.modules:
        from langgraph_perf._numpy_types import numpy_plan

        found = numpy_plan(kind, mro)
        if found is not None:
            return found
    if BaseModel in mro:
        return _pydantic_plan(kind)
    plainly = kind in (Send, types.SimpleNamespace) or any(
        "__dataclass_fields__" in namespace_of(base) for base in mro
    )
    # pydantic 1 is there under this name even where pydantic 2 is installed
    v1 = sys.modules.get("pydantic.v1.main") or sys.modules.get("pydantic.main")
    if (plainly and not _built_in(mro)) or getattr(v1, "BaseModel", None) in mro:
        state_of = instance_state(kind)
        return _met(kind, lambda encoder, value: encoder.attributes(state_of(value)))
    return None


def _built_in(mro: tuple[type, ...]) -> bool:
    """Whether a class extends a built-in container or value, which then has to be encoded too."""
    return any(base.__module__ in ("builtins", "collections") for base in mro[1:-1])


def _by(kind: type, body: Plan) -> Plan:
    """``body`` behind the name of the type."""
    head = b"v" + text(type_name(kind))
    return lambda encoder, value: head + body(encoder, value)


def _met(kind: type, body: Plan) -> Plan:
    """``_by``, for a class with code of its own."""
    named = _by(kind, body)

    def plan(encoder: Encoder, value: Any) -> bytes:
        encoder.kinds.add(type(value))  # not ``kind``: the plan must not keep its class alive
        return named(encoder, value)

    return plan


def _enum_plan(kind: type, *, flag: bool) -> Plan:
    # members of a Flag may be combinations, which have no name before Python 3.11
    attribute = "_value_" if flag else "_name_"
    return _met(kind, lambda encoder, value: encoder.encode(value.__dict__[attribute]))


def _pydantic_plan(kind: type) -> Plan:
    state_of = instance_state(kind)

    def body(encoder: Encoder, value: Any) -> bytes:
        return b"%b%b%b" % (
            encoder.attributes(state_of(value)),
            encoder.attributes(extra_of(value)),
            encoder.attributes(private_of(value)),
        )

    generic = getattr(kind, "__pydantic_generic_metadata__", None) or {}
    # ``Page[User]`` does not say whose ``User``
    of = b"".join(text(_named(part)) for part in generic.get("args", ()))
    return _met(kind, (lambda encoder, value: of + body(encoder, value)) if of else body)


def _named(part: Any) -> str:
    return type_name(part) if type in mro_of(type(part)) else str(part)


def _zone(zone: dt.tzinfo | None, moment: dt.datetime | None) -> tuple[Any, ...] | None:
    """A time zone by what it is; one whose rules cannot be read is refused."""
    if zone is None:
        return None
    name = type_name(type(zone))
    if type(zone) is zoneinfo.ZoneInfo and zone.key is not None:
        return name, zone.key
    # these have one offset for all times; pydantic's is what its parsed datetimes carry
    if type(zone) is dt.timezone or name.startswith("pydantic_core."):
        return name, zone.utcoffset(moment), zone.tzname(moment)
    raise Unkeyable(".tzinfo", f"the rules of a {name} cannot be read; use zoneinfo.ZoneInfo")


def _date(value: dt.date) -> tuple[Any, ...]:
    return value.year, value.month, value.day


def _clock(value: dt.datetime | dt.time) -> tuple[Any, ...]:
    return value.hour, value.minute, value.second, value.microsecond, value.fold


_PARTS: dict[type, Callable[[Any], Any]] = {
    dt.date: _date,
    dt.time: lambda value: (*_clock(value), _zone(value.tzinfo, None)),
    dt.datetime: lambda value: (*_date(value), *_clock(value), _zone(value.tzinfo, value)),
    dt.timedelta: lambda value: (value.days, value.seconds, value.microseconds),
    dt.timezone: lambda value: _zone(value, None),
    zoneinfo.ZoneInfo: lambda value: _zone(value, None),
    fractions.Fraction: lambda value: (value.numerator, value.denominator),
    uuid.UUID: lambda value: value.int,
    re.Pattern: lambda value: (value.pattern, value.flags),
}


def _sections(parser: Any) -> Any:
    return [(name, sorted(parser.items(name, raw=True))) for name in parser]


# these need not be imported
_PARTS_BY_NAME: dict[str, Callable[[Any], Any]] = {
    "argparse.Namespace": lambda value: dict(vars(value)),
    "collections.ChainMap": lambda value: value.maps,
    "collections.UserDict": lambda value: value.data,
    "collections.UserList": lambda value: value.data,
    "collections.UserString": lambda value: value.data,
    "configparser.ConfigParser": _sections,
    "configparser.RawConfigParser": _sections,
    "string.Template": lambda value: value.template,
}

_TEXT: dict[type, Callable[[Any], str]] = dict.fromkeys(
    (
        decimal.Decimal,
        pathlib.PurePosixPath,
        pathlib.PureWindowsPath,
        pathlib.PosixPath,
        pathlib.WindowsPath,
        ipaddress.IPv4Address,
        ipaddress.IPv4Interface,
        ipaddress.IPv4Network,
        ipaddress.IPv6Address,
        ipaddress.IPv6Interface,
        ipaddress.IPv6Network,
    ),
    str,
)
