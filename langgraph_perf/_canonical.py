"""Canonical bytes: equal values give equal bytes in any process, unequal ones differ.

Every encoding starts with a tag for the type and is self-delimiting (a length, a count or a
terminator), so a concatenation can be read back in one way only: that is what makes it injective.
Nothing here depends on object identity, insertion order, ``hash()``, ``repr()`` or pickling, and no
property or method of a user's class is run: what is read are instance dictionaries and slots.

Plain JSON-like containers take a short cut through ``ormsgpack`` in one C call. Whether they do is
decided by the value alone, so equal values always take the same way.
"""

from __future__ import annotations

import collections
import json
import struct
import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property, partial
from types import GetSetDescriptorType, MappingProxyType, MemberDescriptorType
from typing import Any, ClassVar, TypeAlias

import ormsgpack

Plan: TypeAlias = Callable[[Any, Any], bytes]
"""How values of one type are encoded: takes the encoder and the value."""

MAX_DEPTH = 200
"""Containers nested deeper than this are refused; plain JSON-like data may add 254 levels."""

HEAPTYPE = 1 << 9  # Py_TPFLAGSHEAPTYPE: made at run time, as a class statement does
_WORD = 8
PACK_OPTIONS = (
    ormsgpack.OPT_SORT_KEYS
    | ormsgpack.OPT_PASSTHROUGH_BIG_INT
    | ormsgpack.OPT_PASSTHROUGH_DATACLASS
    | ormsgpack.OPT_PASSTHROUGH_DATETIME
    | ormsgpack.OPT_PASSTHROUGH_ENUM
    | ormsgpack.OPT_PASSTHROUGH_SUBCLASS
    | ormsgpack.OPT_PASSTHROUGH_TUPLE
    | ormsgpack.OPT_PASSTHROUGH_UUID
)
SNAPSHOT_OPTIONS = PACK_OPTIONS & ~ormsgpack.OPT_SORT_KEYS
"""Quicker; equal dicts may differ."""


class Unkeyable(TypeError):
    """A value, or a part of it, cannot be part of a key. It is never guessed at.

    Attributes:
        path: where it is, from the root's name on: ``state["docs"][3].meta``.
        reason: what stands there, and why it cannot be keyed.
        complete: the path begins at its root.
    """

    complete = False

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def within(self, prefix: str) -> None:
        """Say that the path so far is below ``prefix``, unless it is complete."""
        if self.complete:
            return
        path = prefix + self.path
        # a value that contains itself has a path without end
        self.path = path if len(path) <= 300 else f"{path[:150]}…{path[-100:]}"

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class IdentityMap:
    """Facts remembered per object for as long as it lives, without touching or hashing it.

    ``entries`` maps ``id(obj)`` to a tuple whose last member is a weak reference. An object's weak
    references run their callbacks before its memory can be used again, so an entry that is found
    belongs to the object it is asked for. At ``limit`` entries all are forgotten.
    """

    __slots__ = ("entries", "limit")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.entries: dict[int, tuple[Any, ...]] = {}

    def put(self, obj: object, *facts: Any) -> None:
        """Remember ``facts`` about ``obj``."""
        if len(self.entries) >= self.limit:
            self.entries.clear()
        key = id(obj)
        # the callback is all C: dict.pop(key, <the dead reference as default>)
        self.entries[key] = (*facts, weakref.ref(obj, partial(self.entries.pop, key)))


class Encoder:
    """Encodes the values of one digest.

    Subclasses override ``plan_for`` to know more types; each has its own ``plans``.

    Attributes:
        kinds: the classes met whose methods, and values such as an enum's, are not in the bytes.
    """

    __slots__ = ("depth", "kinds")

    plans: ClassVar[IdentityMap]

    def __init_subclass__(cls) -> None:
        cls.plans = IdentityMap(4096)

    def __init__(self) -> None:
        self.depth = 0
        self.kinds: set[type] = set()

    def encode(self, value: Any) -> bytes:
        """The canonical bytes of ``value``.

        Raises:
            Unkeyable: with a path relative to ``value``.
            RecursionError: the interpreter's stack ended before ``MAX_DEPTH`` did.
        """
        kind = type(value)
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unkeyable("", f"nested deeper than {MAX_DEPTH} levels, or contains itself")
        try:
            found = self.plans.entries.get(id(kind))
            if found is None:
                plan = self.plan_for(kind)
                self.plans.put(kind, plan)
            else:
                plan = found[0]
            encoded: bytes = plan(self, value)
        except (Unkeyable, RecursionError):
            raise
        except Exception as exc:  # whatever a foreign object does, it must not end the run
            name = type_name(kind)
            raise Unkeyable("", f"reading this {name} raised {type(exc).__name__}") from exc
        self.depth -= 1
        return encoded

    def plan_for(self, kind: type) -> Plan:
        """How values of exactly this type are encoded."""
        return builtin_plan(kind) or refuse(kind)

    def at(self, where: str, value: Any) -> bytes:
        """``encode``, with ``where`` put before the path of what cannot be keyed."""
        try:
            return self.encode(value)
        except Unkeyable as exc:
            exc.within(where)
            raise

    def items(self, values: Iterable[Any]) -> list[bytes]:
        """The encodings of an ordered container's items."""
        encoded = []
        for index, value in enumerate(values):
            try:
                encoded.append(self.encode(value))
            except Unkeyable as exc:
                exc.within(f"[{index}]")
                raise
        return encoded

    def pairs(self, mapping: Mapping[Any, Any]) -> bytes:
        """A mapping's items, in the order of their encoded keys."""
        entries = [(self.at(".keys()", key), key, value) for key, value in list(mapping.items())]
        # distinct keys have distinct encodings, so the sort never compares the keys themselves
        entries.sort(key=_first)
        out = [b"%d:" % len(entries)]
        for encoded, key, value in entries:
            out.append(encoded)
            try:
                out.append(self.encode(value))
            except Unkeyable as exc:
                exc.within(f"[{_shown(key)}]")
                raise
        return b"".join(out)

    def unordered(self, values: Iterable[Any]) -> bytes:
        """A set's elements, sorted by their encodings."""
        encoded = sorted(self.at("{…}", value) for value in values)
        return b"%d:%b" % (len(encoded), b"".join(encoded))

    def attributes(self, state: Mapping[str, Any]) -> bytes:
        """Named attributes, sorted by name."""
        out = [b"%d:" % len(state)]
        for name in sorted(state):
            out.append(text(name))
            out.append(self.at(f".{name}", state[name]))
        return b"".join(out)


def _first(entry: tuple[bytes, Any, Any]) -> bytes:
    return entry[0]


def _shown(key: Any) -> str:
    if type(key) is str:
        return json.dumps(key if len(key) <= 60 else key[:60] + "…", ensure_ascii=not key.isascii())
    return str(key) if type(key) is int else f"<{type_name(type(key))}>"


mro_of: Callable[[type], tuple[type, ...]] = type.__dict__["__mro__"].__get__
namespace_of: Callable[[type], Mapping[str, Any]] = type.__dict__["__dict__"].__get__


def type_name(kind: type) -> str:
    """``module.qualname``, as the class was defined, whatever its metaclass says."""
    module = type.__dict__["__module__"].__get__(kind)
    qualname = type.__dict__["__qualname__"].__get__(kind)
    return f"{module}.{qualname}" if module != "builtins" else str(qualname)


def text(value: str) -> bytes:
    """A string's encoding; lone surrogates have bytes that no valid text has."""
    try:
        raw = value.encode()
    except UnicodeEncodeError:
        raw = value.encode("utf-8", "surrogatepass")
    return b"s%d:%b" % (len(raw), raw)


def refuse(kind: type, why: str = "is not plain data") -> Plan:
    """The plan of a type whose values cannot be keyed."""
    reason = (
        f"a {type_name(kind)} {why}; accepted are JSON-like values, the standard library's value "
        "types, dataclasses, pydantic models, enums, numpy arrays and messages"
    )

    def plan(encoder: Encoder, value: Any) -> bytes:
        raise Unkeyable("", reason)

    return plan


# -- plain JSON-like containers, in one C call ---------------------------------------------------

_SCALARS = frozenset((str, int, float, bool, type(None)))
_PLAIN = _SCALARS | {list, dict}


def plain(value: Any) -> bytes | None:
    """The encoding of a list or dict that holds nothing but JSON-like values, else ``None``."""
    raw = packed(value)
    return None if raw is None else b"F%d:%b" % (len(raw), raw)


def is_plain(encoded: bytes) -> bool:
    """Whether these are bytes that ``plain`` made."""
    return encoded[:1] == b"F"


def packed(value: Any, options: int = PACK_OPTIONS) -> bytes | None:
    """msgpack of a JSON-like value, by default with sorted keys; ``None`` for any other.

    msgpack itself tells ``1``, ``1.0``, ``True`` and ``"1"`` apart, and the options make ormsgpack
    refuse whatever it would convert. Two things pass silently: it writes ``bytes``, ``bytearray``
    and ``memoryview`` alike, and NaNs as the bits they have. Both leave marker bytes; where such a
    byte occurs, the value itself is looked at.
    """
    try:
        raw = ormsgpack.packb(value, None, options)
    except Exception:  # something that only the general way encodes or refuses
        return None
    suspicious = (
        0xC4 in raw
        or 0xC5 in raw
        or 0xC6 in raw
        or (0xCB in raw and (b"\xcb\x7f" in raw or b"\xcb\xff" in raw))
    )
    return None if suspicious and not _is_plain([value]) else raw


def _is_plain(value: Any) -> bool:
    if type(value) is dict:
        value = value.values()
    kinds = set(map(type, value))
    if not kinds <= _PLAIN:
        return False
    if float in kinds and any(item != item for item in value if type(item) is float):
        return False
    if list in kinds or dict in kinds:
        return all(_is_plain(item) for item in value if type(item) in (list, dict))
    return True


# -- built-in types --------------------------------------------------------------------------------

_pack_double = struct.Struct(">d").pack
_NAN = _pack_double(float("nan"))


def _double(value: float) -> bytes:
    return _pack_double(value) if value == value else _NAN


def _list(encoder: Encoder, value: list[Any]) -> bytes:
    return plain(value) or general_list(encoder, value)


def general_list(encoder: Encoder, value: list[Any]) -> bytes:
    """A list that is not plain, item by item."""
    encoded = encoder.items(value)
    return b"l%d:%b" % (len(encoded), b"".join(encoded))


def _dict(encoder: Encoder, value: dict[Any, Any]) -> bytes:
    return plain(value) or b"m" + encoder.pairs(value)


def _tuple(encoder: Encoder, value: tuple[Any, ...]) -> bytes:
    encoded = encoder.items(value)
    return b"u%d:%b" % (len(encoded), b"".join(encoded))


# read through the base's descriptors: a subclass may say something else
_maxlen = collections.deque.__dict__["maxlen"].__get__
_factory = collections.defaultdict.__dict__["default_factory"].__get__
_real, _imag = complex.__dict__["real"].__get__, complex.__dict__["imag"].__get__


def _deque(encoder: Encoder, value: collections.deque[Any]) -> bytes:
    encoded = encoder.items(list(collections.deque.__iter__(value)))
    size = encoder.encode(_maxlen(value))
    return b"q%b%d:%b" % (size, len(encoded), b"".join(encoded))


def _ordered_dict(encoder: Encoder, value: collections.OrderedDict[Any, Any]) -> bytes:
    pairs = list(collections.OrderedDict.items(value))
    out = [b"o%d:" % len(pairs)]
    for key, item in pairs:
        out.append(encoder.at(".keys()", key))
        out.append(encoder.at(f"[{_shown(key)}]", item))
    return b"".join(out)


def _default_dict(encoder: Encoder, value: collections.defaultdict[Any, Any]) -> bytes:
    factory = encoder.at(".default_factory", _factory(value))
    return b"w%b%b" % (factory, encoder.pairs(dict(dict.items(value))))


def _raw(value: bytes | bytearray) -> bytes:
    raw = memoryview(value).tobytes()
    return b"%d:%b" % (len(raw), raw)


def _memoryview(encoder: Encoder, value: memoryview) -> bytes:
    shape = b",".join(b"%d" % size for size in value.shape or ())
    raw = value.tobytes()
    return b"v%b(%b)%d:%b" % (text(value.format), shape, len(raw), raw)


def _class(encoder: Encoder, value: type) -> bytes:
    """A class counts by its name, which must be the way to find it again."""
    import sys

    name = type_name(value)
    module = type.__dict__["__module__"].__get__(value)
    found: Any = sys.modules.get(module)
    for part in type.__dict__["__qualname__"].__get__(value).split("."):
        namespace = getattr(found, "__dict__", {})
        found = namespace.get(part)
    if found is not value:
        raise Unkeyable("", f"class {name} is not found under its name; define it in a module")
    return b"T" + text(name)


_BUILTIN: dict[type, Plan] = {
    type(None): lambda encoder, value: b"n",
    bool: lambda encoder, value: b"t" if value else b"f",
    # hexadecimal: decimal conversion is quadratic, and limited in length since Python 3.11
    int: lambda encoder, value: b"i%x;" % int.__pos__(value),
    float: lambda encoder, value: b"d" + _double(float.__pos__(value)),
    complex: lambda encoder, value: b"j" + _double(_real(value)) + _double(_imag(value)),
    str: lambda encoder, value: text(str.__str__(value)),
    bytes: lambda encoder, value: b"b" + _raw(value),
    bytearray: lambda encoder, value: b"B" + _raw(value),
    memoryview: _memoryview,
    list: _list,
    tuple: _tuple,
    collections.OrderedDict: _ordered_dict,
    collections.defaultdict: _default_dict,
    dict: _dict,
    set: lambda encoder, value: b"e" + encoder.unordered(set.__iter__(value)),
    frozenset: lambda encoder, value: b"E" + encoder.unordered(frozenset.__iter__(value)),
    collections.deque: _deque,
    MappingProxyType: lambda encoder, value: b"M" + encoder.pairs(dict(value.items())),
    range: lambda encoder, value: (
        b"r%b" % _tuple(encoder, (len(value), *value[:1], *(value[1:2] and (value.step,))))
    ),
    slice: lambda encoder, value: b"/%b" % _tuple(encoder, (value.start, value.stop, value.step)),
    type(...): lambda encoder, value: b".",
    type(NotImplemented): lambda encoder, value: b"!",
}


# what a subclass instance holds as its base, whatever it overrides
_AS_BASE: dict[type, Callable[[Any], Any]] = {
    list: lambda value: [*list.__iter__(value)],
    tuple: lambda value: (*tuple.__iter__(value),),
    dict: lambda value: dict(dict.items(value)),
}


def _same(value: Any) -> Any:
    return value


def builtin_plan(kind: type) -> Plan | None:
    """The plan of a built-in type or of a subclass of one, or ``None``.

    Subclasses count by their type, by what they hold as their base, and by their own attributes.
    """
    exact = _BUILTIN.get(kind)
    if exact is not None:
        return exact
    mro = mro_of(kind)
    if type in mro:
        return _class
    for base, base_plan in _BUILTIN.items():
        if base in mro:
            return _subclass_plan(kind, base, base_plan)
    return None


def _subclass_plan(kind: type, base: type, base_plan: Plan) -> Plan:
    # a C type may keep state that nothing here can see; a class statement adds at most two words
    if not kind.__flags__ & HEAPTYPE or kind.__basicsize__ > base.__basicsize__ + 2 * _WORD:
        return refuse(kind, "keeps state that cannot be read")
    head = b"c" + text(type_name(kind))
    state_of = instance_state(kind)
    as_base = _AS_BASE.get(base, _same)

    def plan(encoder: Encoder, value: Any) -> bytes:
        encoder.kinds.add(type(value))
        return head + base_plan(encoder, as_base(value)) + encoder.attributes(state_of(value))

    return plan


def instance_state(kind: type) -> Callable[[Any], dict[str, Any]]:
    """A function that reads an instance's own attributes: its dictionary and its slots.

    Values kept by ``cached_property`` are left out: they follow from the rest, and are there only
    once somebody looked.
    """
    slots, derived, has_dict = [], {"__orig_class__", "__fields_set__"}, False
    seen = set()
    for owner in mro_of(kind):
        for name, member in namespace_of(owner).items():
            if name in seen:
                continue
            seen.add(name)
            if name == "__dict__":
                has_dict = type(member) in (GetSetDescriptorType, MemberDescriptorType)
            elif type(member) is MemberDescriptorType and not name.startswith("__"):
                slots.append(name)
            elif isinstance(member, cached_property):
                derived.add(name)
    if kind.__dictoffset__ and not has_dict:
        raise Unkeyable("", f"the attributes of a {type_name(kind)} cannot be read")

    def state_of(value: Any) -> dict[str, Any]:
        # by name, not by descriptor, which would keep the class alive; for these names nothing
        # but the instance's own dictionary and slots can answer
        state = {}
        if has_dict:
            own = object.__getattribute__(value, "__dict__")
            state = {name: item for name, item in own.items() if name not in derived}
        for name in slots:
            try:
                state[name] = object.__getattribute__(value, name)
            except AttributeError:  # not set
                continue
        return state

    return state_of
