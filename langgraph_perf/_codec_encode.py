"""Values to bytes: the native way, and the walk for what that way cannot do.

Encoding first packs natively, with a hook for objects. When that fails (a dict with keys other than
str, a lone surrogate, an object that cannot be stored), one pure-Python walk does it again; it also
finds the path that an ``EncodeError`` names.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from typing import Any

import ormsgpack
from langchain_core.messages import BaseMessage
from ormsgpack import packb

from langgraph_perf import _codec_objects, _codec_values
from langgraph_perf._codec_allowlist import trusted
from langgraph_perf._codec_classes import ensure_reachable, plan_of
from langgraph_perf._codec_format import (
    ATTRIBUTES,
    COMPOSED,
    FORMAT,
    HEAD,
    MAX_DEPTH,
    PAIRS,
    RAW,
    EncodeError,
    Parts,
    Tag,
)
from langgraph_perf._codec_numpy import numpy_writer

_OPTIONS = (
    ormsgpack.OPT_PASSTHROUGH_BIG_INT
    | ormsgpack.OPT_PASSTHROUGH_DATACLASS
    | ormsgpack.OPT_PASSTHROUGH_DATETIME
    | ormsgpack.OPT_PASSTHROUGH_ENUM
    | ormsgpack.OPT_PASSTHROUGH_SUBCLASS
    | ormsgpack.OPT_PASSTHROUGH_TUPLE
    | ormsgpack.OPT_PASSTHROUGH_UUID
)
_TOO_DEEP = f"contains itself, or nests deeper than {MAX_DEPTH} levels"

_Writer = tuple[Callable[[Any], Parts], bool]
"""What takes instances of a class apart, and whether they are messages."""
_Path = Any
"""``("result",)``, or an outer path and labels; keys are wrapped in a tuple."""


class Encoder:
    """Encodes natively; fails without saying where.

    Attributes:
        messages: the LangChain messages met, inner ones first.
    """

    started = False
    abort: BaseException | None = None
    loose = 0
    """Records that nothing refers to yet."""

    def encode(self, value: Any) -> bytes:
        """The whole payload.

        Raises:
            TypeError: not everything can be encoded in this way.
        """
        body = self.pack([FORMAT, value])
        return self.compose(body) if self.started else body

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
        """The payload of all records; ``body`` is the last."""
        self.record(Tag.ROOT, body)
        count = len(self.sizes)
        try:
            sizes = struct.pack(f"<{count}I", *self.sizes)
        except struct.error:
            raise EncodeError("a part of 4 GiB or more cannot be stored") from None
        head = HEAD.pack(COMPOSED, FORMAT, count)
        return b"".join([head, self.tags, sizes, *self.chunks])

    def record(self, tag: int, *chunks: Any) -> ormsgpack.Ext:
        """Add a record; what is returned stands for it in another one."""
        index = len(self.sizes)
        self.loose += 1
        self.tags.append(tag)
        self.sizes.append(len(chunks[0]) if len(chunks) == 1 else sum(map(len, chunks)))
        self.chunks += chunks
        return ormsgpack.Ext(0, index.to_bytes(4, "little"))

    def pack(self, value: list[Any]) -> bytes:
        outer = self.loose
        try:
            body = packb(value, self.default, _OPTIONS)
        except TypeError:
            if self.abort is not None:
                raise self.abort from None
            raise
        refs = self.loose - outer
        self.loose = outer
        # Binary and extension values begin with one of these bytes, references with D6. Wherever
        # else they occur, in text or in numbers, looking at the value itself settles it.
        if (
            0xC4 in body
            or 0xC5 in body
            or 0xC6 in body
            or 0xC7 in body
            or 0xC8 in body
            or 0xC9 in body
            or 0xD4 in body
            or 0xD5 in body
            or 0xD7 in body
            or 0xD8 in body
            or (body.count(0xD6) != refs if refs else 0xD6 in body)
        ) and _misread(value):
            raise EncodeError("a value that msgpack would take for another type")
        return body

    def default(self, obj: Any) -> ormsgpack.Ext:
        """What stands for an object that msgpack does not know."""
        try:
            if not self.started:
                self.start()
            cls = type(obj)
            known = self.writers.get(cls)
            if known is None:
                known = self.writers[cls] = _writer(cls)
            writer, message = known
            tag, form, head, parts = writer(obj)
            if form is RAW:
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


class Walker(Encoder):
    """Encodes what the native way cannot, object by object, and knows the path of each."""

    def encode(self, value: Any) -> bytes:
        """The whole payload.

        Raises:
            EncodeError: something in the value cannot be stored, or it contains itself.
        """
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
        if cls is str and _utf8(value):
            return value
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
        if form is RAW:
            return self.record(tag, *parts)
        walked: list[Any]
        if form is ATTRIBUTES:
            walked = [part and self.attributes(part, path) for part in parts]
        elif form is PAIRS:
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


# -- what takes objects apart ---------------------------------------------------------------------


@functools.cache
def _known() -> dict[type, _Writer]:
    """The classes whose writers need not be looked for."""
    known: dict[type, _Writer] = {
        cls: (write, False) for cls, write in _codec_values.WRITERS.items()
    }
    for cls in trusted().values():
        plan = plan_of(cls)
        if plan is not None:
            write = functools.partial(_codec_objects.WRITERS[plan.tag], plan)
            known[cls] = write, plan.message
    return known


def _writer(cls: type) -> _Writer:
    known = _known().get(cls)
    if known is not None:
        return known
    plan = plan_of(cls)
    if plan is not None:
        # every time: a notebook may bind the name to another class meanwhile
        ensure_reachable(cls, plan.ref)
        return functools.partial(_codec_objects.WRITERS[plan.tag], plan), plan.message
    write = numpy_writer(cls)
    if write is not None:
        return write, False
    raise EncodeError(
        f"a {cls.__module__}.{cls.__qualname__} cannot be stored; accepted are plain data, "
        "dataclasses, pydantic models, enums, named tuples, messages, documents, Command and Send"
    )


# -- what msgpack would take for another type -----------------------------------------------------

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
