"""Values of the standard library: taken apart and put together.

Only of exactly these types; a subclass may hold more than its base shows.
"""

from __future__ import annotations

import collections
import datetime as dt
import decimal
import fractions
import functools
import ipaddress
import pathlib
import re
import uuid
import zoneinfo
from collections.abc import Callable, Iterable
from typing import Any, cast

from langchain_core.messages.base import TextAccessor

from langgraph_perf._codec_format import ITEMS, PAIRS, RAW, EncodeError, Parts, Tag, damaged

# -- text and numbers -----------------------------------------------------------------------------


def _write_int(obj: int) -> Parts:
    return Tag.INT, RAW, None, [obj.to_bytes(obj.bit_length() // 8 + 1, "little", signed=True)]


def _read_int(body: memoryview) -> int:
    return int.from_bytes(body, "little", signed=True)


def _write_text(tag: int, obj: str) -> Parts:
    return tag, RAW, None, [obj.encode("utf-8", "surrogatepass")]


def _read_text(body: memoryview) -> str:
    return str(body, "utf-8", "surrogatepass")


def _read_decimal(text: Any, _: list[Any]) -> decimal.Decimal:
    if type(text) is not str:
        damaged("has no number where one belongs")
    return decimal.Decimal(text)


def _read_fraction(_: Any, parts: list[Any]) -> fractions.Fraction:
    numerator, denominator = parts
    if type(numerator) is not int or type(denominator) is not int or denominator < 1:
        damaged("has no fraction where one belongs")
    # not through the constructor: reducing two hostile numbers of a megabyte takes minutes
    fraction: Any = object.__new__(fractions.Fraction)
    fraction._numerator, fraction._denominator = numerator, denominator
    return cast("fractions.Fraction", fraction)


# -- containers -----------------------------------------------------------------------------------


def _write_mapping(tag: int, obj: dict[Any, Any], head: Any = None) -> Parts:
    if getattr(obj, "__dict__", None):
        name = type(obj).__qualname__
        raise EncodeError(f"a {name} with attributes of its own cannot be stored")
    return tag, PAIRS, head, [part for pair in dict.items(obj) for part in pair]


def _pairs(parts: list[Any]) -> Iterable[tuple[Any, Any]]:
    return zip(parts[::2], parts[1::2], strict=True)


_FACTORIES: dict[str, Callable[[], Any]] = {
    cls.__name__: cls
    for cls in (bool, bytes, complex, dict, float, frozenset, int, list, set, str, tuple)
}


def _write_default(obj: collections.defaultdict[Any, Any]) -> Parts:
    factory: Any = obj.default_factory
    name = getattr(factory, "__name__", None)
    if factory is not None and _FACTORIES.get(name or "") is not factory:
        raise EncodeError(
            f"a defaultdict's factory must be one of {', '.join(_FACTORIES)} or None, "
            f"got {name or type(factory).__name__}"
        )
    return _write_mapping(Tag.DEFAULT, obj, name)


def _read_default(name: Any, parts: list[Any]) -> Any:
    return collections.defaultdict(None if name is None else _FACTORIES[name], _pairs(parts))


def _read_counter(_: Any, parts: list[Any]) -> Any:
    counter: collections.Counter[Any] = collections.Counter()
    dict.update(counter, _pairs(parts))
    return counter


# -- dates and times ------------------------------------------------------------------------------


def _write_datetime(obj: dt.datetime) -> Parts:
    head = [obj.year, obj.month, obj.day, obj.hour, obj.minute, obj.second, obj.microsecond]
    return Tag.DATETIME, ITEMS, [head, obj.fold], [obj.tzinfo]


def _read_datetime(head: Any, parts: list[Any]) -> dt.datetime:
    (year, month, day, hour, minute, second, micro), fold = head
    (zone,) = parts
    return dt.datetime(year, month, day, hour, minute, second, micro, zone, fold=fold)


def _write_time(obj: dt.time) -> Parts:
    head = [obj.hour, obj.minute, obj.second, obj.microsecond]
    return Tag.TIME, ITEMS, [head, obj.fold], [obj.tzinfo]


def _read_time(head: Any, parts: list[Any]) -> dt.time:
    (hour, minute, second, micro), fold = head
    (zone,) = parts
    return dt.time(hour, minute, second, micro, zone, fold=fold)


def _write_timezone(obj: dt.timezone) -> Parts:
    # __reduce__'s arguments: tzname() does not tell a given name from a generated one
    return Tag.TIMEZONE, ITEMS, None, list(obj.__getinitargs__())  # type: ignore[attr-defined]


_ZONE = re.compile(r"[A-Za-z0-9_+-]+(/[A-Za-z0-9_+-]+)*")


def _write_zone(obj: zoneinfo.ZoneInfo) -> Parts:
    if not obj.key or not _ZONE.fullmatch(obj.key):
        raise EncodeError("a ZoneInfo without a key cannot be stored")
    return Tag.ZONE, ITEMS, obj.key, []


def _read_zone(key: Any, _: list[Any]) -> zoneinfo.ZoneInfo:
    if not _ZONE.fullmatch(key):  # a key is part of a file name
        damaged("names no time zone")
    return zoneinfo.ZoneInfo(key)


# -- names, addresses and patterns ----------------------------------------------------------------


def _write_uuid(obj: uuid.UUID) -> Parts:
    return Tag.UUID, ITEMS, [obj.bytes, obj.is_safe.name], []


def _read_uuid(head: Any, _: list[Any]) -> uuid.UUID:
    raw, safe = head
    return uuid.UUID(bytes=raw, is_safe=uuid.SafeUUID[safe])


_PATHS: dict[str, type[pathlib.PurePath]] = {
    cls.__name__: cls
    for cls in (
        pathlib.PosixPath,
        pathlib.WindowsPath,
        pathlib.PurePosixPath,
        pathlib.PureWindowsPath,
    )
}


def _write_path(obj: pathlib.PurePath) -> Parts:
    return Tag.PATH, ITEMS, type(obj).__name__, [str(obj)]


def _read_path(name: Any, parts: list[Any]) -> pathlib.PurePath:
    (text,) = parts
    return _PATHS[name](text)


_ADDRESSES: dict[str, Any] = {
    cls.__name__: cls
    for cls in (
        ipaddress.IPv4Address,
        ipaddress.IPv4Interface,
        ipaddress.IPv4Network,
        ipaddress.IPv6Address,
        ipaddress.IPv6Interface,
        ipaddress.IPv6Network,
    )
}


def _write_address(obj: Any) -> Parts:
    return Tag.ADDRESS, ITEMS, [type(obj).__name__, str(obj)], []


def _read_address(head: Any, _: list[Any]) -> Any:
    name, text = head
    return _ADDRESSES[name](text)


def _write_pattern(obj: re.Pattern[Any]) -> Parts:
    if obj.flags & re.DEBUG:
        raise EncodeError("a pattern with re.DEBUG would print whenever it is restored")
    return Tag.PATTERN, ITEMS, obj.flags, [obj.pattern]


def _read_pattern(flags: Any, parts: list[Any]) -> re.Pattern[Any]:
    (pattern,) = parts
    if type(pattern) not in (str, bytes) or flags & re.DEBUG:
        damaged("has no pattern where one belongs")
    return re.compile(pattern, flags)


# -- all of them ----------------------------------------------------------------------------------

WRITERS: dict[type, Callable[[Any], Parts]] = {
    int: _write_int,
    str: functools.partial(_write_text, Tag.STR),
    TextAccessor: functools.partial(_write_text, Tag.TEXT),
    bytearray: lambda obj: (Tag.BYTEARRAY, RAW, None, [bytes(obj)]),
    complex: lambda obj: (Tag.COMPLEX, ITEMS, [obj.real, obj.imag], []),
    decimal.Decimal: lambda obj: (Tag.DECIMAL, ITEMS, str(obj), []),
    fractions.Fraction: lambda obj: (Tag.FRACTION, ITEMS, None, [obj.numerator, obj.denominator]),
    tuple: lambda obj: (Tag.TUPLE, ITEMS, None, list(obj)),
    dict: functools.partial(_write_mapping, Tag.PAIRS),
    set: lambda obj: (Tag.SET, ITEMS, None, list(obj)),
    frozenset: lambda obj: (Tag.FROZENSET, ITEMS, None, list(obj)),
    range: lambda obj: (Tag.RANGE, ITEMS, None, [obj.start, obj.stop, obj.step]),
    collections.deque: lambda obj: (Tag.DEQUE, ITEMS, obj.maxlen, list(obj)),
    collections.OrderedDict: functools.partial(_write_mapping, Tag.ORDERED),
    collections.defaultdict: _write_default,
    collections.Counter: functools.partial(_write_mapping, Tag.COUNTER),
    dt.datetime: _write_datetime,
    dt.date: lambda obj: (Tag.DATE, ITEMS, [obj.year, obj.month, obj.day], []),
    dt.time: _write_time,
    dt.timedelta: lambda obj: (Tag.TIMEDELTA, ITEMS, [obj.days, obj.seconds, obj.microseconds], []),
    dt.timezone: _write_timezone,
    zoneinfo.ZoneInfo: _write_zone,
    uuid.UUID: _write_uuid,
    **dict.fromkeys(_PATHS.values(), _write_path),
    **dict.fromkeys(_ADDRESSES.values(), _write_address),
    re.Pattern: _write_pattern,
}
RAW_READERS: dict[int, Callable[[memoryview], Any]] = {
    Tag.INT: _read_int,
    Tag.STR: _read_text,
    Tag.TEXT: lambda body: TextAccessor(_read_text(body)),
    Tag.BYTEARRAY: bytearray,
}
"""From the bytes."""
READERS: dict[int, Callable[[Any, list[Any]], Any]] = {
    Tag.COMPLEX: lambda head, _: complex(*head),
    Tag.DECIMAL: _read_decimal,
    Tag.FRACTION: _read_fraction,
    Tag.TUPLE: lambda _, parts: tuple(parts),
    Tag.PAIRS: lambda _, parts: dict(_pairs(parts)),
    Tag.SET: lambda _, parts: set(parts),
    Tag.FROZENSET: lambda _, parts: frozenset(parts),
    Tag.RANGE: lambda _, parts: range(*parts),
    Tag.DEQUE: lambda maxlen, parts: collections.deque(parts, maxlen),
    Tag.ORDERED: lambda _, parts: collections.OrderedDict(_pairs(parts)),
    Tag.DEFAULT: _read_default,
    Tag.COUNTER: _read_counter,
    Tag.DATETIME: _read_datetime,
    Tag.DATE: lambda head, _: dt.date(*head),
    Tag.TIME: _read_time,
    Tag.TIMEDELTA: lambda head, _: dt.timedelta(*head),
    Tag.TIMEZONE: lambda _, parts: dt.timezone(*parts),
    Tag.ZONE: _read_zone,
    Tag.UUID: _read_uuid,
    Tag.PATH: _read_path,
    Tag.ADDRESS: _read_address,
    Tag.PATTERN: _read_pattern,
}
"""From head and parts."""
