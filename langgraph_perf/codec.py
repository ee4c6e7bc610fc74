"""Values to bytes and back: exactly, without pickle, without running any type's own code.

``decode(encode(value))`` equals ``value`` and has the same type at every level, or ``encode``
raises ``EncodeError``; nothing is ever rounded to a neighbouring type. ``decode`` takes hostile
bytes: it imports no module, calls no constructor, validator or hook of a user's class, and answers
damage of any kind with ``DecodeError``. (Elements of a set and keys of a dict are hashed: that one
method of a restored class does run.)

What msgpack has by itself (``None``, bool, 64-bit int, float, str, bytes, list, dict with str keys)
goes through ormsgpack at native speed. Every other object becomes a *record*, and an extension
value in its place refers to it by number::

    plain     msgpack [FORMAT, value]
    composed  C1 FORMAT, u32 count, count tags (u8), count sizes (u32), the bodies;
              little endian, the last record is the value itself

A record refers only to earlier ones and each is referred to at most once, so decoding is one loop
over the records, never a recursion, and a small payload cannot unfold into a large value. Record
bodies are msgpack, or raw bytes for big integers, arrays and strings that UTF-8 cannot hold. C1 is
the one byte that never begins a msgpack value.

Encoding first tries the native way with a hook for other objects. When that fails (a dict with keys
other than str, a lone surrogate, an object that cannot be stored), one pure-Python walk does it
again; it also finds the path an ``EncodeError`` names.

A class travels as ``module:qualname`` with its kind and a checksum of its field names; see
``Allowlist`` for which ones are restored. The state of dataclasses and models is taken from, and
put back into, ``__dict__`` and slots.
"""

from __future__ import annotations

import collections
import dataclasses
import datetime as dt
import decimal
import enum
import fractions
import functools
import ipaddress
import os
import pathlib
import re
import struct
import sys
import threading
import types
import typing
import uuid
import weakref
import zlib
import zoneinfo
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import ormsgpack
from langchain_core import messages as lc_messages
from langchain_core.documents import Document
from langchain_core.messages import BaseMessage
from langgraph import types as lg_types
from langgraph.store import base as lg_store
from ormsgpack import packb, unpackb
from pydantic import BaseModel

__all__ = ["Allowlist", "DecodeError", "EncodeError", "decode", "encode", "types_in"]

FORMAT = 1
"""Changes whenever old payloads could be misread; theirs are then refused."""
MAX_DEPTH = 128
"""How deep objects may nest: keeps both directions, and hashing what was decoded, within the C
stack."""

_COMPOSED = 0xC1
_HEAD = struct.Struct("<BBI")
_OPTIONS = (
    ormsgpack.OPT_PASSTHROUGH_BIG_INT
    | ormsgpack.OPT_PASSTHROUGH_DATACLASS
    | ormsgpack.OPT_PASSTHROUGH_DATETIME
    | ormsgpack.OPT_PASSTHROUGH_ENUM
    | ormsgpack.OPT_PASSTHROUGH_SUBCLASS
    | ormsgpack.OPT_PASSTHROUGH_TUPLE
    | ormsgpack.OPT_PASSTHROUGH_UUID
)


class EncodeError(TypeError):
    """The value cannot be stored exactly.

    Attributes:
        reason: why.
        path: where in the value, for example ``result["client"]``.
    """

    def __init__(self, reason: str, path: str = "result") -> None:
        super().__init__(f"{path}: {reason}")
        self.reason = reason
        self.path = path


class DecodeError(ValueError):
    """The bytes are damaged or foreign, or name a type that is absent, changed or not allowed."""


# -- which classes come back ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, init=False)
class Allowlist:
    """The classes that ``decode`` may restore besides the built-in ones; immutable.

    Standard library values, LangChain messages and documents, and LangGraph's ``Command``,
    ``Send``, ``Overwrite``, ``Interrupt`` and store items always come back. Other dataclasses,
    pydantic models, enums and named tuples come back when they are listed here, or, unless the mode
    is strict, when an already imported module has them under the stored name. Listing a generic
    model allows its parametrizations.

    Attributes:
        types: the listed classes.
        strict: whether only listed classes come back; ``None`` asks the environment variable
            ``LANGGRAPH_STRICT_MSGPACK``, as LangGraph does.
    """

    types: frozenset[type]
    strict: bool | None
    _named: Mapping[str, type | None] = dataclasses.field(repr=False, compare=False)

    def __init__(self, types: Iterable[type] = (), *, strict: bool | None = None) -> None:
        listed = frozenset(types)
        named: dict[str, type | None] = {}
        for cls in listed:
            if not isinstance(cls, type):
                raise TypeError(f"Allowlist takes classes, got {cls!r}")
            # two classes of one name: neither may be taken for the other
            named[_ref(cls)] = None if _ref(cls) in named else cls
        object.__setattr__(self, "types", listed)
        object.__setattr__(self, "strict", strict)
        object.__setattr__(self, "_named", named)

    @classmethod
    def of(cls, *types: type, strict: bool | None = None) -> Allowlist:
        """An allowlist of these classes.

        Raises:
            TypeError: one of them is not a class.
        """
        return cls(types, strict=strict)

    def extended(self, *types: type) -> Allowlist:
        """This allowlist with more classes."""
        return Allowlist(self.types.union(types), strict=self.strict)

    def _find(self, ref: str) -> type:
        """The class that a payload calls ``ref``."""
        name, _, args = ref.partition("[")
        cls = _TRUSTED.get(name) or self._named.get(name)
        if cls is not None and args:
            cls = _parametrization(cls, ref)
        if cls is None:
            cls = self._named.get(ref)
        if cls is not None:
            return cls
        strict = self.strict
        if strict is None:
            # the parsing of langgraph.checkpoint.serde
            flag = os.environ.get("LANGGRAPH_STRICT_MSGPACK", "false")
            strict = flag.lower() in ("1", "true", "yes")
        if strict:
            raise DecodeError(
                f"type {ref} is not allowed in strict mode: allow it with Allowlist.of(...), or "
                "leave strict mode (LANGGRAPH_STRICT_MSGPACK, Allowlist(strict=...))"
            )
        cls = _lookup(ref) or _UNREACHABLE.get(ref)
        if cls is None:
            raise DecodeError(
                f"type {ref} is not in any imported module: import it before, or allow it with "
                "Allowlist.of(...)"
            )
        return cls


_UNREACHABLE: weakref.WeakValueDictionary[str, type] = weakref.WeakValueDictionary()
"""Classes this process has encoded that no module attribute leads to, for example local ones."""
_unreachable_lock = threading.Lock()


def _ref(cls: type) -> str:
    """The name a class has in payloads."""
    generic = _generic(cls)
    if generic is None:
        return f"{cls.__module__}:{cls.__qualname__}"
    args = (_ref(arg) if isinstance(arg, type) else repr(arg) for arg in generic["args"])
    return f"{_ref(generic['origin'])}[{','.join(args)}]"


def _generic(cls: type) -> Any:
    """pydantic's description of a parametrized generic model, else ``None``."""
    metadata = vars(cls).get("__pydantic_generic_metadata__")
    return metadata if metadata and metadata.get("origin") is not None else None


def _parametrization(origin: type, ref: str) -> type | None:
    """The class ``origin[...]`` called ``ref``, if it exists: making it would run user code."""
    subclasses: list[type] = type.__subclasses__(origin)
    for cls in subclasses:
        generic = _generic(cls)
        if generic is not None and generic["origin"] is origin and _ref(cls) == ref:
            return cls
    return None


def _lookup(ref: str) -> type | None:
    """The class of that name in an already imported module, found without any attribute hook."""
    name, _, args = ref.partition("[")
    module_name, _, qualname = name.partition(":")
    module = sys.modules.get(module_name)
    if not issubclass(type(module), types.ModuleType):
        return None
    # not vars(): a lazily loaded module would load
    namespace = object.__getattribute__(module, "__dict__")
    found: Any = None
    for part in qualname.split("."):
        found = namespace.get(part)
        if not issubclass(type(found), type):
            return None
        namespace = type.__getattribute__(found, "__dict__")
    cls = typing.cast("type", found)
    if cls.__module__ != module_name or cls.__qualname__ != qualname:
        return None
    return _parametrization(cls, ref) if args else cls


def _reachable(cls: type, ref: str) -> None:
    """Make sure that ``ref`` leads back to ``cls`` in this process.

    Raises:
        EncodeError: another class has that name.
    """
    found = _lookup(ref)
    if found is None:
        with _unreachable_lock:
            found = _UNREACHABLE.setdefault(ref, cls)
    if found is not cls:
        raise EncodeError(
            f"two different classes are named {ref}, so that its values cannot be told apart; "
            "give them different names at module level"
        )


# -- the kinds of classes -------------------------------------------------------------------------


class _Tag:
    """What a record is. Stored: only append, never renumber. (Not an enum: these are too hot.)"""

    ROOT = 0
    INT = 1
    STR = 2
    BYTEARRAY = 3
    COMPLEX = 4
    TUPLE = 5
    PAIRS = 6
    SET = 7
    FROZENSET = 8
    DEQUE = 9
    ORDERED = 10
    DEFAULT = 11
    COUNTER = 12
    MODEL = 13
    MODEL_V1 = 14
    RECORD = 15
    NAMED = 16
    ENUM = 17
    FLAG = 18
    TEXT = 19
    DATETIME = 20
    DATE = 21
    TIME = 22
    TIMEDELTA = 23
    TIMEZONE = 24
    ZONE = 25
    UUID = 26
    DECIMAL = 27
    FRACTION = 28
    PATH = 29
    RANGE = 30
    PATTERN = 31
    ADDRESS = 32
    ARRAY = 33
    SCALAR = 34
    OBJECTS = 35
    NP_TEXT = 36


class _Plan(NamedTuple):
    """How instances of one class are taken apart and put together.

    Attributes:
        tag: the kind; a payload must agree.
        shape: checksum of the field names; a payload of another shape is of another version.
        slots: slot descriptors by name, used directly so that no property interferes.
        message: whether it is a LangChain message.
    """

    cls: type
    tag: int
    ref: str
    shape: int
    slots: Mapping[str, Any]
    message: bool


_PLAIN_SLOTS = (lg_types.Send, lg_store.Item, lg_store.SearchItem)
"""Classes that are no dataclasses but hold their state in slots in just the same way."""

_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: made by a class statement
_MODEL_SLOTS = frozenset(
    ["__pydantic_fields_set__", "__pydantic_extra__", "__pydantic_private__", "__fields_set__"]
)


def _make_plan(cls: type) -> _Plan | None:
    """The plan of a class, or ``None`` for one of no storable kind.

    Looks at the class without calling anything it defines, so that it may be used on whatever a
    payload names.
    """
    mro = type.__getattribute__(cls, "__mro__")
    fields: Iterable[str]
    if enum.Enum in mro:
        tag, fields = (_Tag.FLAG if enum.Flag in mro else _Tag.ENUM), ()
    elif tuple in mro:
        names = getattr(cls, "_fields", None)
        if type(names) is not tuple or not all(type(name) is str for name in names):
            return None
        tag, fields = _Tag.NAMED, names
    elif BaseModel in mro:
        tag, fields = _Tag.MODEL, getattr(cls, "__pydantic_fields__", ())
    elif _v1_model() in mro:
        tag, fields = _Tag.MODEL_V1, cls.__fields__  # type: ignore[attr-defined]
    elif dataclasses.is_dataclass(cls):
        tag, fields = _Tag.RECORD, [field.name for field in dataclasses.fields(cls)]
    elif cls in _PLAIN_SLOTS:
        tag, fields = _Tag.RECORD, cls.__slots__
    else:
        return None
    slots: dict[str, Any] = {}
    if tag in (_Tag.MODEL, _Tag.MODEL_V1, _Tag.RECORD):
        base: Any = cls
        while base is not object:
            # the layout of a built-in base (dict, Exception) is not in __dict__ and slots
            if not base.__flags__ & _HEAP_TYPE:
                return None
            base = base.__base__
        for base in mro:
            for name, member in vars(base).items():
                if type(member) is types.MemberDescriptorType:
                    slots.setdefault(name, member)
        if tag != _Tag.RECORD:
            slots = {name: slot for name, slot in slots.items() if name not in _MODEL_SLOTS}
            if slots.keys() - getattr(cls, "__private_attributes__", {}).keys():
                return None
    shape = zlib.crc32("\0".join(fields).encode("utf-8", "surrogatepass"))
    return _Plan(cls, tag, _ref(cls), shape, slots, BaseMessage in mro)


_plans: weakref.WeakKeyDictionary[type, Any] = weakref.WeakKeyDictionary()
"""Plans already made, without the class and its slots: a value must not keep its key alive."""


def _plan(cls: type) -> _Plan | None:
    try:
        known = _plans[cls]
    except KeyError:
        # racing threads make equal plans
        plan = _make_plan(cls)
        if plan is None:
            _plans[cls] = None
        else:
            owners = {name: cls.__mro__.index(s.__objclass__) for name, s in plan.slots.items()}
            _plans[cls] = plan._replace(cls=object, slots=owners)
        return plan
    if known is None:
        return None
    mro = cls.__mro__
    slots = {name: vars(mro[owner])[name] for name, owner in known.slots.items()}
    return typing.cast("_Plan", known._replace(cls=cls, slots=slots))


def _v1_model() -> Any:
    """pydantic's v1 ``BaseModel`` if anybody imported it."""
    main = sys.modules.get("pydantic.v1.main")
    return getattr(main, "BaseModel", None)


_TRUSTED: dict[str, type] = {
    _ref(cls): cls
    for cls in [
        *(getattr(lc_messages, name) for name in lc_messages.__all__ if name.endswith("Message")),
        *(getattr(lc_messages, n) for n in lc_messages.__all__ if n.endswith("MessageChunk")),
        Document,
        *(
            getattr(lg_types, name)
            for name in ("Command", "Send", "Overwrite", "Interrupt", "TimeoutPolicy")
            if hasattr(lg_types, name)
        ),
        lg_store.Item,
        lg_store.SearchItem,
    ]
    if isinstance(cls, type)
}
"""The classes that come back even in strict mode: LangGraph trusts the same ones."""


# -- encoding -------------------------------------------------------------------------------------


class _Form(enum.Enum):
    """What the parts of an object are, which decides how the walk treats and names them."""

    RAW = enum.auto()  # parts are buffers, stored as they are
    LEAF = enum.auto()  # no parts
    ITEMS = enum.auto()  # parts are values
    PAIRS = enum.auto()  # parts are key, value, key, value
    ATTRIBUTES = enum.auto()  # parts are dicts by attribute name, or None


_RAW, _LEAF, _ITEMS, _PAIRS, _ATTRIBUTES = _Form
_Parts = tuple[int, _Form, Any, Sequence[Any]]
_Writer = tuple[Callable[[Any], _Parts], bool]  # what takes objects apart; are they messages?
_Path = Any  # ("result",) or (path, label)


def encode(value: Any, *, messages: list[BaseMessage] | None = None) -> bytes:
    """The bytes from which ``decode`` restores ``value``.

    References shared inside the value are stored once for each place.

    Args:
        messages: is filled with the LangChain messages met, inner ones first; ``decode`` lists the
            restored ones in the same order.

    Raises:
        EncodeError: something in the value cannot be restored exactly, or it contains itself.
    """
    encoder = _Encoder()
    try:
        payload = encoder.pack([FORMAT, value])
        if encoder.started:
            payload = encoder.compose(payload)
    except TypeError:
        # EncodeError included: only the walk knows the path
        encoder = _Walker()
        payload = encoder.encode(value)
    if messages is not None:
        messages[:] = encoder.messages if encoder.started else ()
    return payload


class _Encoder:
    """Encodes natively; fails without saying where."""

    started = False
    abort: BaseException | None = None

    def start(self) -> None:
        """Get ready for records: plain data goes without."""
        self.started = True
        self.messages: list[BaseMessage] = []
        self.tags = bytearray()
        self.sizes: list[int] = []
        self.chunks: list[Any] = []
        self.writers: dict[type, _Writer] = {}
        self.depth = 0

    def compose(self, body: bytes) -> bytes:
        self.record(_Tag.ROOT, body)
        count = len(self.sizes)
        try:
            sizes = struct.pack(f"<{count}I", *self.sizes)
        except struct.error:
            raise EncodeError("a part of 4 GiB or more cannot be stored") from None
        head = _HEAD.pack(_COMPOSED, FORMAT, count)
        return b"".join([head, self.tags, sizes, *self.chunks])

    def record(self, tag: int, *chunks: Any) -> ormsgpack.Ext:
        """Add a record; what is returned stands for it in another one."""
        index = len(self.sizes)
        self.tags.append(tag)
        self.sizes.append(len(chunks[0]) if len(chunks) == 1 else sum(map(len, chunks)))
        self.chunks += chunks
        return ormsgpack.Ext(0, index.to_bytes(4, "little"))

    def pack(self, value: list[Any]) -> bytes:
        try:
            body = packb(value, self.default, _OPTIONS)
        except TypeError:
            if self.abort is not None:
                raise self.abort from None
            raise
        if (0xC4 in body or 0xC5 in body or 0xC6 in body) and _misread(value):
            raise EncodeError("a value that msgpack would take for another type")
        return body

    def default(self, obj: Any) -> ormsgpack.Ext:
        try:
            if not self.started:
                self.start()
            cls = type(obj)
            known = self.writers.get(cls)
            if known is None:
                known = self.writers[cls] = _writer(cls)
            writer, message = known
            tag, form, head, parts = writer(obj)
            if form is _RAW:
                return self.record(tag, *parts)
            self.depth += 1
            if self.depth > MAX_DEPTH:
                raise EncodeError(_TOO_DEEP)
            ref = self.record(tag, self.pack([head, parts]))
            self.depth -= 1
            if message:
                self.messages.append(obj)
            return ref
        except Exception:
            raise
        except BaseException as exc:
            # ormsgpack turns whatever is raised here into TypeError; an interrupt must get through
            self.abort = exc
            raise


class _Walker(_Encoder):
    """Encodes what the native way cannot, object by object, and knows the path of each."""

    def encode(self, value: Any) -> bytes:
        self.start()
        try:
            body = packb([FORMAT, self.walk(value, ("result",))], option=_OPTIONS)
        except RecursionError:
            raise EncodeError(_TOO_DEEP) from None
        return self.compose(body)

    def walk(self, value: Any, path: _Path) -> Any:
        """What stands for ``value`` in the enclosing body."""
        cls = type(value)
        if value is None or cls is bool or cls is float or cls is bytes:
            return value
        if cls is str:
            return value if _utf8(value) else self.record(_Tag.STR, _text(value))
        if cls is int and -(1 << 63) <= value < 1 << 64:
            return value
        if self.depth >= MAX_DEPTH:
            raise EncodeError(_TOO_DEEP, _path(path))
        self.depth += 1
        try:
            if cls is list:
                return [self.walk(item, (path, (i,))) for i, item in enumerate(value)]
            if cls is dict and all(type(key) is str and _utf8(key) for key in value):
                return {key: self.walk(item, (path, (key,))) for key, item in value.items()}
            return self.write_at(value, path)
        finally:
            self.depth -= 1

    def write_at(self, obj: Any, path: _Path) -> ormsgpack.Ext:
        try:
            writer, message = _writer(type(obj))
            tag, form, head, parts = writer(obj)
        except (EncodeError, RecursionError) as exc:
            raise EncodeError(getattr(exc, "reason", _TOO_DEEP), _path(path)) from None
        except Exception as exc:
            raise EncodeError(f"could not be read: {exc!r}", _path(path)) from exc
        if form is _RAW:
            return self.record(tag, *parts)
        walked: list[Any]
        if form is _ATTRIBUTES:
            walked = [part and self.attributes(part, path) for part in parts]
        elif form is _PAIRS:
            walked = []
            for key, item in zip(parts[::2], parts[1::2], strict=True):
                walked.append(self.walk(key, (path, " key ", (key,))))
                walked.append(self.walk(item, (path, (key,))))
        else:
            walked = [self.walk(item, (path, (i,))) for i, item in enumerate(parts)]
        try:
            ref = self.record(tag, packb([head, walked], option=_OPTIONS))
        except TypeError as exc:  # a lone surrogate in the name of an enum member, say
            raise EncodeError(f"could not be stored: {exc}", _path(path)) from exc
        if message:
            self.messages.append(obj)
        return ref

    def attributes(self, state: dict[str, Any], path: _Path) -> dict[str, Any]:
        if not all(type(name) is str and _utf8(name) for name in state):
            raise EncodeError("an attribute's name is not a plain str", _path(path))
        return {name: self.walk(item, (path, f".{name}")) for name, item in state.items()}


_TOO_DEEP = f"contains itself, or nests deeper than {MAX_DEPTH} levels"


def _path(path: _Path) -> str:
    labels: list[str] = []
    while len(path) > 1:
        path, *steps = path
        for step in reversed(steps):
            if isinstance(step, str):
                labels.append(step)
                continue
            (key,) = step
            plain = type(key) in (str, int, float, bool, type(None), bytes)
            labels.append(f"[{key!r}]" if plain else f"[<{type(key).__name__}>]")
    labels.append(path[0])
    return "".join(reversed(labels))


def _utf8(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _text(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


_MISREAD = frozenset(
    [bytearray, memoryview, ormsgpack.Ext, getattr(ormsgpack, "Fragment", ormsgpack.Ext)]
)


def _misread(value: list[Any]) -> bool:
    """Whether msgpack silently takes something in ``value`` for another type.

    ormsgpack packs a bytearray as bytes and offers no way to be asked first. Goes level by level,
    so that the loops over items run in C.
    """
    level: list[Any] = [value]
    while level:
        items: list[Any] = []
        for container in level:
            if type(container) is dict:
                items += container.values()
            elif len(container) < 64 or not _numbers(container):
                items += container
        kinds = set(map(type, items))
        if not kinds.isdisjoint(_MISREAD):
            return True
        if list not in kinds and dict not in kinds:
            return False
        level = [item for item in items if type(item) is list or type(item) is dict]
    return False


def _numbers(items: list[Any]) -> bool:
    """Whether these are certainly all numbers: ``sum`` tells it faster than asking each type."""
    if type(items[0]) is not float or type(items[-1]) is not float:
        return False
    try:
        return type(sum(items)) is float
    except Exception:
        return False


def _writer(cls: type) -> _Writer:
    """What takes instances of ``cls`` apart, and whether they are messages.

    Raises:
        EncodeError: they cannot be stored.
    """
    known = _KNOWN.get(cls)
    if known is not None:
        return known
    plan = _plan(cls)
    if plan is not None:
        # every time: a notebook may bind the name to another class meanwhile
        _reachable(cls, plan.ref)
        return functools.partial(_BY_KIND[plan.tag], plan), plan.message
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        if cls is numpy.ndarray:
            return _write_array, False
        if issubclass(cls, numpy.generic):
            return _write_scalar, False
    raise EncodeError(
        f"a {cls.__module__}.{cls.__qualname__} cannot be stored; accepted are plain data, "
        "dataclasses, pydantic models, enums, named tuples, messages, documents, Command and Send"
    )


def _write_model(plan: _Plan, obj: Any) -> _Parts:
    state = [obj.__dict__, obj.__pydantic_extra__, obj.__pydantic_private__]
    return _Tag.MODEL, _ATTRIBUTES, [plan.ref, plan.shape, list(obj.__pydantic_fields_set__)], state


def _write_model_v1(plan: _Plan, obj: Any) -> _Parts:
    head = [plan.ref, plan.shape, list(obj.__fields_set__)]
    return _Tag.MODEL_V1, _ATTRIBUTES, head, [obj.__dict__, _slots(plan, obj)]


def _write_record(plan: _Plan, obj: Any) -> _Parts:
    state = getattr(obj, "__dict__", None)
    return _Tag.RECORD, _ATTRIBUTES, [plan.ref, plan.shape], [state, _slots(plan, obj)]


def _slots(plan: _Plan, obj: Any) -> dict[str, Any] | None:
    state = {}
    for name, slot in plan.slots.items():
        try:
            state[name] = slot.__get__(obj)
        except AttributeError:  # never assigned, and so it shall come back
            continue
    return state or None


def _write_named(plan: _Plan, obj: Any) -> _Parts:
    _no_attributes(obj)
    return _Tag.NAMED, _ITEMS, [plan.ref, plan.shape], list(tuple.__iter__(obj))


def _write_enum(plan: _Plan, obj: Any) -> _Parts:
    if plan.cls._member_map_.get(obj._name_) is not obj:  # type: ignore[attr-defined]
        raise EncodeError(f"is no member of {plan.ref}")
    return _Tag.ENUM, _LEAF, [plan.ref, plan.shape, obj._name_], []


def _write_flag(plan: _Plan, obj: Any) -> _Parts:
    if _flag(plan.cls, obj._value_) is not obj:
        raise EncodeError(f"is no value of {plan.ref}")
    # as a part, not in the head: a flag may have more than 64 bits
    return _Tag.FLAG, _ITEMS, [plan.ref, plan.shape], [obj._value_]


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


def _no_attributes(obj: Any) -> None:
    if getattr(obj, "__dict__", None):
        raise EncodeError(f"a {type(obj).__qualname__} with attributes of its own cannot be stored")


def _write_mapping(tag: int, obj: dict[Any, Any], head: Any = None) -> _Parts:
    _no_attributes(obj)
    return tag, _PAIRS, head, [part for pair in dict.items(obj) for part in pair]


_FACTORIES: dict[str, Callable[[], Any]] = {
    cls.__name__: cls
    for cls in (bool, bytes, complex, dict, float, frozenset, int, list, set, str, tuple)
}


def _write_default(obj: collections.defaultdict[Any, Any]) -> _Parts:
    factory: Any = obj.default_factory
    name = getattr(factory, "__name__", None)
    if factory is not None and _FACTORIES.get(name or "") is not factory:
        raise EncodeError(
            f"a defaultdict's factory must be one of {', '.join(_FACTORIES)} or None, "
            f"got {name or type(factory).__name__}"
        )
    return _write_mapping(_Tag.DEFAULT, obj, name)


def _write_int(obj: int) -> _Parts:
    return _Tag.INT, _RAW, None, (obj.to_bytes(obj.bit_length() // 8 + 1, "little", signed=True),)


def _write_datetime(obj: dt.datetime) -> _Parts:
    head = [obj.year, obj.month, obj.day, obj.hour, obj.minute, obj.second, obj.microsecond]
    return _Tag.DATETIME, _ITEMS, [head, obj.fold], [obj.tzinfo]


def _write_time(obj: dt.time) -> _Parts:
    head = [obj.hour, obj.minute, obj.second, obj.microsecond]
    return _Tag.TIME, _ITEMS, [head, obj.fold], [obj.tzinfo]


def _write_timezone(obj: dt.timezone) -> _Parts:
    # __reduce__'s arguments: tzname() does not tell a given name from a generated one
    offset, *name = obj.__getinitargs__()  # type: ignore[attr-defined]
    return _Tag.TIMEZONE, _ITEMS, None, [offset, *name]


def _write_zone(obj: zoneinfo.ZoneInfo) -> _Parts:
    if not obj.key or not _ZONE.fullmatch(obj.key):
        raise EncodeError("a ZoneInfo without a key cannot be stored")
    return _Tag.ZONE, _LEAF, obj.key, []


_ZONE = re.compile(r"[A-Za-z0-9_+-]+(/[A-Za-z0-9_+-]+)*")


def _write_pattern(obj: re.Pattern[Any]) -> _Parts:
    if obj.flags & re.DEBUG:
        raise EncodeError("a pattern with re.DEBUG would print whenever it is restored")
    return _Tag.PATTERN, _ITEMS, obj.flags, [obj.pattern]


def _write_uuid(obj: uuid.UUID) -> _Parts:
    return _Tag.UUID, _LEAF, [obj.bytes, obj.is_safe.name], []


def _write_path(obj: pathlib.PurePath) -> _Parts:
    return _Tag.PATH, _ITEMS, type(obj).__name__, [str(obj)]


def _write_address(obj: Any) -> _Parts:
    return _Tag.ADDRESS, _LEAF, [type(obj).__name__, str(obj)], []


_WRITERS: dict[type, Callable[[Any], _Parts]] = {
    int: _write_int,
    str: lambda obj: (_Tag.STR, _RAW, None, (_text(obj),)),
    bytearray: lambda obj: (_Tag.BYTEARRAY, _RAW, None, (bytes(obj),)),
    complex: lambda obj: (_Tag.COMPLEX, _LEAF, [obj.real, obj.imag], []),
    tuple: lambda obj: (_Tag.TUPLE, _ITEMS, None, list(obj)),
    dict: functools.partial(_write_mapping, _Tag.PAIRS),
    set: lambda obj: (_Tag.SET, _ITEMS, None, list(obj)),
    frozenset: lambda obj: (_Tag.FROZENSET, _ITEMS, None, list(obj)),
    collections.deque: lambda obj: (_Tag.DEQUE, _ITEMS, obj.maxlen, list(obj)),
    collections.OrderedDict: functools.partial(_write_mapping, _Tag.ORDERED),
    collections.defaultdict: _write_default,
    collections.Counter: functools.partial(_write_mapping, _Tag.COUNTER),
    lc_messages.base.TextAccessor: lambda obj: (_Tag.TEXT, _RAW, None, (_text(obj),)),
    dt.datetime: _write_datetime,
    dt.date: lambda obj: (_Tag.DATE, _LEAF, [obj.year, obj.month, obj.day], []),
    dt.time: _write_time,
    dt.timedelta: lambda o: (_Tag.TIMEDELTA, _LEAF, [o.days, o.seconds, o.microseconds], []),
    dt.timezone: _write_timezone,
    zoneinfo.ZoneInfo: _write_zone,
    uuid.UUID: _write_uuid,
    decimal.Decimal: lambda obj: (_Tag.DECIMAL, _LEAF, str(obj), []),
    fractions.Fraction: lambda o: (_Tag.FRACTION, _ITEMS, None, [o.numerator, o.denominator]),
    range: lambda obj: (_Tag.RANGE, _ITEMS, None, [obj.start, obj.stop, obj.step]),
    re.Pattern: _write_pattern,
}
_PATHS: dict[str, type[pathlib.PurePath]] = {
    cls.__name__: cls
    for cls in (
        pathlib.PosixPath,
        pathlib.WindowsPath,
        pathlib.PurePosixPath,
        pathlib.PureWindowsPath,
    )
}
_WRITERS.update(dict.fromkeys(_PATHS.values(), _write_path))
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
_WRITERS.update(dict.fromkeys(_ADDRESSES.values(), _write_address))
_BY_KIND: dict[int, Callable[[_Plan, Any], _Parts]] = {
    _Tag.MODEL: _write_model,
    _Tag.MODEL_V1: _write_model_v1,
    _Tag.RECORD: _write_record,
    _Tag.NAMED: _write_named,
    _Tag.ENUM: _write_enum,
    _Tag.FLAG: _write_flag,
}


_KNOWN: dict[type, _Writer] = {cls: (writer, False) for cls, writer in _WRITERS.items()}
"""The classes whose writers need not be looked for."""
for _cls in _TRUSTED.values():
    if (_trusted := _plan(_cls)) is not None:
        _write = functools.partial(_BY_KIND[_trusted.tag], _trusted)
        _KNOWN[_cls] = _write, _trusted.message


# numpy: never imported here; a process without it holds no arrays.


def _write_array(obj: Any) -> _Parts:
    fortran = obj.flags.f_contiguous and not obj.flags.c_contiguous
    order = "F" if fortran else "C"
    if obj.dtype == object:
        return _Tag.OBJECTS, _ITEMS, [list(obj.shape), order], obj.ravel(order).tolist()
    numpy: Any = sys.modules["numpy"]
    spec = _dtype_spec(obj.dtype)
    if obj.dtype.itemsize == 0:
        raise EncodeError(f"an array of dtype {obj.dtype}, which has no size, cannot be stored")
    head = packb([spec, list(obj.shape), order])
    raw = numpy.ascontiguousarray(obj.T if fortran else obj).reshape(-1).view(numpy.uint8)
    return _Tag.ARRAY, _RAW, None, (len(head).to_bytes(4, "little"), head, raw.data)


def _write_scalar(obj: Any) -> _Parts:
    numpy: Any = sys.modules["numpy"]
    cls = type(obj)
    # arrays drop trailing zeros of these two
    if cls is numpy.str_:
        return _Tag.NP_TEXT, _ITEMS, None, [str.__str__(obj)]  # str() drops them too
    if cls is numpy.bytes_:
        return _Tag.NP_TEXT, _ITEMS, None, [bytes(obj)]
    array = numpy.asarray(obj)
    if array.dtype == object or type(array[()]) is not cls:
        raise EncodeError(f"a {cls.__module__}.{cls.__qualname__} cannot be stored")
    _, form, head, parts = _write_array(array)
    return _Tag.SCALAR, form, head, parts


def _dtype_spec(dtype: Any) -> Any:
    """A dtype as plain data.

    Raises:
        EncodeError: it holds objects, or the plain data would not lead back to it.
    """
    spec: Any
    if dtype.subdtype is not None:
        base, shape = dtype.subdtype
        return {"base": _dtype_spec(base), "shape": list(shape)}
    if dtype.names is not None:
        fields = [dtype.fields[name] for name in dtype.names]
        spec = {
            "names": list(dtype.names),
            "formats": [_dtype_spec(field[0]) for field in fields],
            "offsets": [field[1] for field in fields],
            "titles": [field[2] if len(field) > 2 else None for field in fields],
            "itemsize": dtype.itemsize,
            "aligned": dtype.isalignedstruct,
        }
    else:
        order = ">" if dtype.byteorder == ">" else ""
        # the character keeps apart what the string does not, such as long and long long
        for spec in (dtype.str, order + dtype.char):
            if _DTYPE.fullmatch(spec) and _dtype(spec).type is dtype.type:
                break
    try:
        back = _dtype(spec)
    except DecodeError:
        back = None
    if back is None or back != dtype or back.type is not dtype.type or dtype.metadata:
        raise EncodeError(f"an array of dtype {dtype} cannot be stored")
    return spec


_DTYPE = re.compile(r"[<>|=]?(?:[biufcSUVmM]\d{0,9}|[?bBhHiIlLqQpPefdgFDG])(?:\[\w+\])?", re.ASCII)


def _dtype(spec: Any) -> Any:
    numpy: Any = sys.modules.get("numpy")
    if numpy is None:
        raise DecodeError("holds numpy data, and this process has not imported numpy")
    if type(spec) is str:
        if not _DTYPE.fullmatch(spec):
            raise DecodeError(f"damaged: no dtype {spec[:40]!r}")
        return numpy.dtype(spec)
    if "base" in spec:
        return numpy.dtype((_dtype(spec["base"]), tuple(spec["shape"])))
    fields = {**spec, "formats": [_dtype(part) for part in spec["formats"]]}
    if not any(fields["titles"]):
        del fields["titles"]
    aligned = fields.pop("aligned")
    return numpy.dtype(fields, align=aligned)


# -- decoding -------------------------------------------------------------------------------------


def decode(
    payload: bytes | memoryview,
    allowed: Allowlist | None = None,
    *,
    messages: list[BaseMessage] | None = None,
) -> Any:
    """A fresh copy of the value that ``encode`` was given.

    Args:
        allowed: classes to restore besides the built-in ones, and the mode.
        messages: is filled with the restored LangChain messages, inner ones first.

    Raises:
        DecodeError: the payload is damaged, of another format, or names a type that is absent,
            changed or not allowed.
    """
    decoder = None
    try:
        if not len(payload):
            _damaged("is empty")
        if payload[0] != _COMPOSED:
            value = _root(unpackb(payload))
        else:
            decoder = _Decoder(allowed or _DEFAULT_ALLOWLIST)
            value = decoder.decode(memoryview(payload))
    except DecodeError:
        raise
    except Exception as exc:
        if decoder is not None and decoder.abort is not None:
            raise decoder.abort from None
        raise DecodeError(f"damaged or foreign payload: {exc!r:.200}") from exc
    if messages is not None:
        messages[:] = decoder.messages if decoder is not None else ()
    return value


def _root(pair: Any) -> Any:
    if type(pair) is not list or len(pair) != 2 or type(pair[0]) is not int:
        _damaged("is no payload of this library")
    if pair[0] != FORMAT:
        _damaged(f"has format {pair[0]}, not {FORMAT}")
    return pair[1]


_DEFAULT_ALLOWLIST = Allowlist()
_TAKEN = object()


class _Decoder:
    __slots__ = ("abort", "allowed", "depth", "depths", "messages", "objects", "plans")

    def __init__(self, allowed: Allowlist) -> None:
        self.allowed = allowed
        self.plans: dict[tuple[str, int, int], _Plan] = {}
        self.objects: list[Any] = []
        self.depths: list[int] = []
        self.depth = 0
        self.messages: list[BaseMessage] = []
        self.abort: BaseException | None = None

    def decode(self, view: memoryview) -> Any:
        _, version, count = _HEAD.unpack_from(view)
        if version != FORMAT:
            _damaged(f"has format {version}, not {FORMAT}")
        sizes_at = _HEAD.size + count
        position = sizes_at + 4 * count
        if not 0 < position <= len(view):
            _damaged("is truncated")
        tags = view[_HEAD.size : sizes_at]
        sizes = struct.unpack_from(f"<{count}I", view, sizes_at)
        if position + sum(sizes) != len(view):
            _damaged("is truncated")
        objects, depths = self.objects, self.depths
        for tag, size in zip(tags, sizes, strict=True):
            body = view[position : position + size]
            position += size
            self.depth = 0
            objects.append(_READERS[tag](self, body))
            if self.depth > MAX_DEPTH:
                _damaged("nests too deep")
            depths.append(self.depth + 1)
        if not count or tags[-1] != _Tag.ROOT:
            _damaged("has no value")
        return objects[-1]

    def ref(self, code: int, data: bytes) -> Any:
        """The object that an extension value stands for."""
        try:
            index = int.from_bytes(data, "little")
            value = self.objects[index]
            if value is _TAKEN or code:
                _damaged("refers to a part twice")
            self.objects[index] = _TAKEN
            if self.depths[index] > self.depth:
                self.depth = self.depths[index]
            return value
        except Exception:
            raise
        except BaseException as exc:
            self.abort = exc
            raise

    def read(self, body: memoryview) -> Any:
        return unpackb(body, ext_hook=self.ref)

    def parts(self, body: memoryview) -> tuple[Any, list[Any]]:
        head, parts = self.read(body)
        if type(parts) is not list:
            _damaged("has a part of the wrong kind")
        return head, parts

    def plan(self, tag: int, ref: Any, shape: Any) -> _Plan:
        """The plan of a class the payload names, if it may be restored and still looks alike."""
        plan = self.plans.get((ref, tag, shape))
        if plan is None:
            if type(ref) is not str:
                _damaged("has no class where one belongs")
            found = _plan(self.allowed._find(ref))
            if found is None or found.tag != tag:
                raise DecodeError(f"type {ref} is not of the kind that was stored")
            if found.shape != shape:
                raise DecodeError(f"type {ref} has other fields now than when it was stored")
            plan = self.plans[ref, tag, shape] = found
        return plan


def _damaged(what: str) -> NoReturn:
    raise DecodeError(f"damaged or foreign payload: {what}")


_new = object.__new__
_set = object.__setattr__


def _attributes(state: Any) -> dict[str, Any] | None:
    if state is not None and type(state) is not dict:
        _damaged("has attributes of the wrong kind")
    return typing.cast("dict[str, Any] | None", state)


def _read_model(decoder: _Decoder, body: memoryview) -> Any:
    (ref, shape, fields_set), (state, extra, private) = decoder.read(body)
    plan = decoder.plan(_Tag.MODEL, ref, shape)
    obj: Any = _new(plan.cls)
    _set(obj, "__dict__", state)
    _set(obj, "__pydantic_fields_set__", set(fields_set))
    _set(obj, "__pydantic_extra__", _attributes(extra))
    _set(obj, "__pydantic_private__", _attributes(private))
    if plan.message:
        decoder.messages.append(obj)
    return obj


def _read_model_v1(decoder: _Decoder, body: memoryview) -> Any:
    (ref, shape, fields_set), (state, slots) = decoder.read(body)
    plan = decoder.plan(_Tag.MODEL_V1, ref, shape)
    obj: Any = _new(plan.cls)
    _set(obj, "__dict__", state)
    _set(obj, "__fields_set__", set(fields_set))
    _fill_slots(plan, obj, slots)
    return obj


def _read_record(decoder: _Decoder, body: memoryview) -> Any:
    (ref, shape), (state, slots) = decoder.read(body)
    plan = decoder.plan(_Tag.RECORD, ref, shape)
    obj: Any = _new(plan.cls)
    if state is not None:
        _set(obj, "__dict__", state)
    _fill_slots(plan, obj, slots)
    return obj


def _fill_slots(plan: _Plan, obj: Any, slots: Any) -> None:
    for name, value in (_attributes(slots) or {}).items():
        plan.slots[name].__set__(obj, value)


def _read_named(decoder: _Decoder, body: memoryview) -> Any:
    (ref, shape), parts = decoder.parts(body)
    cls: Any = decoder.plan(_Tag.NAMED, ref, shape).cls
    if len(parts) != len(cls._fields):
        _damaged("has a named tuple of the wrong length")
    return tuple.__new__(cls, parts)


def _read_enum(decoder: _Decoder, body: memoryview) -> Any:
    (ref, shape, name), _ = decoder.parts(body)
    cls: Any = decoder.plan(_Tag.ENUM, ref, shape).cls
    member = cls._member_map_.get(name)
    if member is None:
        raise DecodeError(f"type {ref} has no member {name!r:.80} any more")
    return member


def _read_flag(decoder: _Decoder, body: memoryview) -> Any:
    (ref, shape), (value,) = decoder.parts(body)
    return _flag(decoder.plan(_Tag.FLAG, ref, shape).cls, value)


def _read_mapping(decoder: _Decoder, body: memoryview) -> tuple[Any, Iterable[tuple[Any, Any]]]:
    head, parts = decoder.parts(body)
    return head, zip(parts[::2], parts[1::2], strict=True)


def _read_pairs(decoder: _Decoder, body: memoryview) -> dict[Any, Any]:
    return dict(_read_mapping(decoder, body)[1])


def _read_default(decoder: _Decoder, body: memoryview) -> Any:
    name, pairs = _read_mapping(decoder, body)
    return collections.defaultdict(None if name is None else _FACTORIES[name], pairs)


def _read_counter(decoder: _Decoder, body: memoryview) -> Any:
    counter: collections.Counter[Any] = collections.Counter()
    dict.update(counter, _read_mapping(decoder, body)[1])
    return counter


def _read_deque(decoder: _Decoder, body: memoryview) -> Any:
    maxlen, parts = decoder.parts(body)
    return collections.deque(parts, maxlen)


def _read_datetime(decoder: _Decoder, body: memoryview) -> dt.datetime:
    (when, fold), (zone,) = decoder.parts(body)
    year, month, day, hour, minute, second, micro = when
    return dt.datetime(year, month, day, hour, minute, second, micro, zone, fold=fold)


def _read_time(decoder: _Decoder, body: memoryview) -> dt.time:
    (when, fold), (zone,) = decoder.parts(body)
    hour, minute, second, micro = when
    return dt.time(hour, minute, second, micro, zone, fold=fold)


def _read_zone(decoder: _Decoder, body: memoryview) -> zoneinfo.ZoneInfo:
    key, _ = decoder.parts(body)
    if not _ZONE.fullmatch(key):  # a key is part of a file name
        _damaged("names no time zone")
    return zoneinfo.ZoneInfo(key)


def _read_uuid(decoder: _Decoder, body: memoryview) -> uuid.UUID:
    (raw, safe), _ = decoder.parts(body)
    return uuid.UUID(bytes=raw, is_safe=uuid.SafeUUID[safe])


def _read_decimal(decoder: _Decoder, body: memoryview) -> decimal.Decimal:
    text, _ = decoder.parts(body)
    if type(text) is not str:
        _damaged("has no number where one belongs")
    return decimal.Decimal(text)


def _read_fraction(decoder: _Decoder, body: memoryview) -> fractions.Fraction:
    _, (numerator, denominator) = decoder.parts(body)
    if type(numerator) is not int or type(denominator) is not int or denominator < 1:
        _damaged("has no fraction where one belongs")
    # not through the constructor: reducing two hostile numbers of a megabyte takes minutes
    fraction: Any = _new(fractions.Fraction)
    fraction._numerator, fraction._denominator = numerator, denominator
    return typing.cast("fractions.Fraction", fraction)


def _read_path(decoder: _Decoder, body: memoryview) -> pathlib.PurePath:
    name, (text,) = decoder.parts(body)
    return _PATHS[name](text)


def _read_pattern(decoder: _Decoder, body: memoryview) -> re.Pattern[Any]:
    flags, (pattern,) = decoder.parts(body)
    if type(pattern) not in (str, bytes) or flags & re.DEBUG:
        _damaged("has no pattern where one belongs")
    return re.compile(pattern, flags)


def _read_address(decoder: _Decoder, body: memoryview) -> Any:
    (name, text), _ = decoder.parts(body)
    return _ADDRESSES[name](text)


def _read_array(decoder: _Decoder, body: memoryview) -> Any:
    start = 4 + int.from_bytes(body[:4], "little")
    spec, shape, order = unpackb(body[4:start])
    raw = body[start:]
    dtype = _dtype(spec)
    numpy: Any = sys.modules["numpy"]
    size = _size(shape)
    # checked before numpy sees the shape: an array never takes more room than the payload
    if not dtype.itemsize or size * dtype.itemsize != len(raw):
        _damaged("has an array of the wrong size")
    if not size:
        return numpy.empty(shape, dtype, order)
    # a copy, so that it is writable and aligned; numpy's own leaves out the gaps between fields
    if dtype.names is not None:
        return numpy.ndarray(tuple(shape), dtype, bytearray(raw), order=order)
    return numpy.ndarray(tuple(shape), dtype, raw, order=order).copy(order)


def _size(shape: Any) -> int:
    if type(shape) is not list or not all(type(n) is int and n >= 0 for n in shape):
        _damaged("has an array of no shape")
    size = 1
    for n in shape:
        size *= n
    return size


def _read_objects(decoder: _Decoder, body: memoryview) -> Any:
    numpy: Any = sys.modules.get("numpy")
    if numpy is None:
        raise DecodeError("holds numpy data, and this process has not imported numpy")
    (shape, order), parts = decoder.parts(body)
    if _size(shape) != len(parts):
        _damaged("has an array of the wrong size")
    flat = numpy.empty(len(parts), object)
    for i, part in enumerate(parts):  # one by one: numpy would unpack lists
        flat[i] = part
    return flat.reshape(shape, order=order)


def _read_np_text(decoder: _Decoder, body: memoryview) -> Any:
    numpy: Any = sys.modules.get("numpy")
    if numpy is None:
        raise DecodeError("holds numpy data, and this process has not imported numpy")
    _, (text,) = decoder.parts(body)
    return numpy.str_(text) if type(text) is str else numpy.bytes_(bytes(memoryview(text)))


_Reader = Callable[[_Decoder, memoryview], Any]
_READERS: dict[int, _Reader] = {
    _Tag.ROOT: lambda d, body: _root(d.read(body)),
    _Tag.INT: lambda _, body: int.from_bytes(body, "little", signed=True),
    _Tag.STR: lambda _, body: str(body, "utf-8", "surrogatepass"),
    _Tag.BYTEARRAY: lambda _, body: bytearray(body),
    _Tag.COMPLEX: lambda d, body: complex(*d.parts(body)[0]),
    _Tag.TUPLE: lambda d, body: tuple(d.parts(body)[1]),
    _Tag.PAIRS: _read_pairs,
    _Tag.SET: lambda d, body: set(d.parts(body)[1]),
    _Tag.FROZENSET: lambda d, body: frozenset(d.parts(body)[1]),
    _Tag.DEQUE: _read_deque,
    _Tag.ORDERED: lambda d, body: collections.OrderedDict(_read_mapping(d, body)[1]),
    _Tag.DEFAULT: _read_default,
    _Tag.COUNTER: _read_counter,
    _Tag.MODEL: _read_model,
    _Tag.MODEL_V1: _read_model_v1,
    _Tag.RECORD: _read_record,
    _Tag.NAMED: _read_named,
    _Tag.ENUM: _read_enum,
    _Tag.FLAG: _read_flag,
    _Tag.TEXT: lambda _, body: lc_messages.base.TextAccessor(str(body, "utf-8", "surrogatepass")),
    _Tag.DATETIME: _read_datetime,
    _Tag.DATE: lambda d, body: dt.date(*d.parts(body)[0]),
    _Tag.TIME: _read_time,
    _Tag.TIMEDELTA: lambda d, body: dt.timedelta(*d.parts(body)[0]),
    _Tag.TIMEZONE: lambda d, body: dt.timezone(*d.parts(body)[1]),
    _Tag.ZONE: _read_zone,
    _Tag.UUID: _read_uuid,
    _Tag.DECIMAL: _read_decimal,
    _Tag.FRACTION: _read_fraction,
    _Tag.PATH: _read_path,
    _Tag.RANGE: lambda d, body: range(*d.parts(body)[1]),
    _Tag.PATTERN: _read_pattern,
    _Tag.ADDRESS: _read_address,
    _Tag.ARRAY: _read_array,
    _Tag.SCALAR: lambda d, body: _read_array(d, body)[()],
    _Tag.OBJECTS: _read_objects,
    _Tag.NP_TEXT: _read_np_text,
}


# -- types in schemas -----------------------------------------------------------------------------


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
    if _plan(hint) is not None:
        found.add(hint)
    generic = _generic(hint)
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
