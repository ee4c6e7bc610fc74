"""The walk from a callable over all that it is made of.

Functions, classes and instances get a number when they are met first; after that the number stands
for them, so that cycles end. Functions and classes are described later, one after the other, so
that a long chain of helpers is not a deep recursion.

The walk is done twice. The first is a survey: it finds out what the code itself changes, which the
second then leaves out.
"""

from __future__ import annotations

import array
import asyncio
import concurrent.futures
import contextvars
import itertools
import logging
import queue
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, ClassVar, TypeAlias

from langchain_core.messages import BaseMessage
from pydantic import BaseModel

from langgraph_perf._canonical import (
    HEAPTYPE,
    IdentityMap,
    Plan,
    Unkeyable,
    builtin_plan,
    instance_state,
    mro_of,
    namespace_of,
    refuse,
    text,
    type_name,
)
from langgraph_perf._code_facts import (
    Facts,
    is_container,
    is_framework,
    is_library,
    kept_by_libraries,
    top_level,
)
from langgraph_perf._messages_key import KeyEncoder
from langgraph_perf._value_types import extra_of, private_of, value_plan
from langgraph_perf.keys import digest

Body: TypeAlias = Callable[["Walk", Any], bytes]

# they carry no configuration, or are a counter
_BY_TYPE = (
    type(threading.Lock()),
    type(threading.RLock()),
    threading.Barrier,
    threading.Condition,
    threading.Event,
    threading.Semaphore,
    threading.local,
    queue.Queue,
    queue.SimpleQueue,
    asyncio.Condition,
    asyncio.Event,
    asyncio.Lock,
    asyncio.Queue,
    asyncio.Semaphore,
    concurrent.futures.Executor,
    concurrent.futures.Future,
    itertools.count,
    contextvars.ContextVar,
    logging.Handler,
    logging.Logger,
    logging.LoggerAdapter,
)
_WRAPPERS = (staticmethod, classmethod)


class Walk(KeyEncoder):
    """Encodes what a callable is made of.

    Args:
        homes: top-level packages that are the user's, wherever they are installed.
        facts: what a survey found; ``None`` if this is the survey.
    """

    __slots__ = (
        "_numbers",
        "_waiting",
        "facts",
        "homes",
        "kept",
        "lenient",
        "missing",
        "modules",
        "near",
        "survey",
    )

    plans: ClassVar[IdentityMap]

    def __init__(self, homes: frozenset[str], facts: Facts | None = None) -> None:
        super().__init__()
        self.homes = homes
        self.facts = facts or Facts()
        self.survey = facts is None
        self.near: str | None = None  # while reading globals: the package that counts by code
        self.lenient = False  # while reading what nothing built in refers to
        self.missing = False  # whether code was met that reads a name which nothing has yet
        self.kept: list[tuple[int, Any]] = []
        self.modules: dict[str, Any] = {}
        self._numbers: dict[int, int] = {}
        self._waiting: deque[tuple[Any, Body]] = deque()

    def run(self, root: Any) -> bytes:
        """The encoding of all that ``root`` is made of."""
        out = [self.captured("", root)]
        while self._waiting:
            obj, body = self._waiting.popleft()
            try:
                out.append(b"#%d=%b" % (self._numbers[id(obj)], body(self, obj)))
            except (Unkeyable, RecursionError):
                raise
            except Exception as exc:  # an object that does not let itself be looked at
                unkeyable = Unkeyable(obj.__name__, f"reading it raised {type(exc).__name__}")
                unkeyable.complete = True
                raise unkeyable from exc
        return b"".join(out)

    def plan_for(self, kind: type) -> Plan:
        mro = mro_of(kind)
        if kind is list or BaseMessage in mro:
            return super().plan_for(kind)
        if kind is object or any(base in mro for base in _BY_TYPE):
            return _by_type
        if is_record(mro):
            return _instance
        if kind is array.array:
            return _array
        data = value_plan(kind) or builtin_plan(kind)
        if data is None:
            return _instance
        return data if is_framework(kind.__module__) else _with_class(data)

    # -- references -------------------------------------------------------------------------------

    def _number(self, key: int, obj: Any) -> int:
        self._numbers[key] = len(self.kept)
        self.kept.append((key, obj))
        return self._numbers[key]

    def later(self, obj: Any, body: Body) -> bytes:
        """The number of a function or class, which is described when its turn comes."""
        if id(obj) not in self._numbers:
            self._number(id(obj), obj)
            self._waiting.append((obj, body))
        return b"@%d;" % self._numbers[id(obj)]

    def here(self, obj: Any, body: Body) -> bytes:
        """The description of an instance, or its number if it has one already."""
        number = self._numbers.get(id(obj))
        # what was described leniently must not pass where everything needs a key
        key = ~id(obj) if self.lenient else id(obj)
        if number is None:
            number = self._numbers.get(key)
        if number is not None:
            return b"@%d;" % number
        return b"#%d:%b" % (self._number(key, obj), body(self, obj))

    def attempt(
        self,
        encode: Callable[[], bytes],
        otherwise: Callable[[], bytes],
        failures: tuple[type[Exception], ...] = (Unkeyable, RecursionError),
    ) -> bytes:
        """``encode()``, or, if it meets what cannot be keyed, ``otherwise()`` as if it had not been
        tried: objects met on the way must not pass for described ones."""
        kept, waiting = len(self.kept), len(self._waiting)
        depth, near, lenient = self.depth, self.near, self.lenient
        try:
            return encode()
        except failures:
            for key, _ in self.kept[kept:]:
                del self._numbers[key]
            del self.kept[kept:]
            while len(self._waiting) > waiting:
                self._waiting.pop()
            self.depth, self.near, self.lenient = depth, near, lenient
            return otherwise()

    def encode(self, value: Any) -> bytes:
        """The canonical bytes of ``value``; if lenient, those of its parts that have a key, and the
        types of the others."""
        if not self.lenient:
            return super().encode(value)
        # a container that contains itself has no key, but here nothing ends the walk through it
        return self.here(value, Walk._whole) if is_container(value) else self._whole(value)

    def _whole(self, value: Any) -> bytes:
        # how deep the interpreter's stack goes is no matter of the value: that ends it all
        whole = super().encode
        return self.attempt(lambda: whole(value), lambda: self._remains(value), (Unkeyable,))

    def _remains(self, value: Any) -> bytes:
        """What counts of an object that as such has no key."""
        kind = by_type(value) + self.encode(type(value))
        if self.library(type(value).__module__):
            return kind  # a client's inner life is not configuration
        body = state if is_container(value) else partial(Walk.here, body=state)
        return self.attempt(lambda: kind + body(self, value), lambda: kind, (Unkeyable,))

    def captured(self, where: str, value: Any) -> bytes:
        """A value that is built in, at ``where``. The survey does not mind if it has no key."""
        if self.survey:
            return self.attempt(lambda: self.at(where, value), bytes)
        return self.at(where, value)

    def or_type(self, value: Any, more: Callable[[], bytes] = bytes) -> bytes:
        """A value. Of those of its parts that have no key only the types count, and ``more()``."""
        if self.lenient:
            return self.encode(value)
        if self.survey:  # it does not mind what has no key, so it would not find out
            return self._or_type(value, more)
        return self.attempt(lambda: self.encode(value), lambda: self._or_type(value, more))

    def _or_type(self, value: Any, more: Callable[[], bytes]) -> bytes:
        def parts() -> bytes:
            return self.attempt(lambda: self.encode(value), lambda: by_type(value)) + more()

        return self.leniently(parts)

    def leniently(self, encode: Callable[[], bytes]) -> bytes:
        """``encode()``, where of what has no key the type counts."""
        outer, self.lenient = self.lenient, True
        encoded = encode()
        self.lenient = outer
        return encoded

    # -- whose code is it -------------------------------------------------------------------------

    def library(self, module: Any) -> bool:
        """Whether a module's code counts by name."""
        top = top_level(module)
        if self.near is not None and top != self.near:
            return True
        return is_library(top, self.homes)

    def unordered(self, values: Iterable[Any]) -> bytes:
        # numbers are given in the order of the walk, which must not depend on hashes
        lenient, self.lenient = self.lenient, False
        encoded = super().unordered(sorted(values, key=_by_names))
        self.lenient = lenient
        return encoded


def _by_names(value: Any) -> tuple[str, str]:
    named = type in mro_of(type(value)) or type(value) is types.FunctionType
    return type_name(type(value)), f"{value.__module__}.{value.__qualname__}" if named else ""


_first_seen = IdentityMap(4096)


def as_first_seen(holder: Any, name: str, value: Any) -> bytes:
    """What ``holder``'s ``name`` was when this process looked for the first time; by its type, if
    it has no key."""
    found = _first_seen.entries.get(id(holder))
    known: dict[str, bytes] = found[0] if found else {}
    if found is None:
        try:
            _first_seen.put(holder, known)
        except TypeError:
            return by_type(value)  # nothing can refer to it weakly, so nothing is known of it
    if name not in known:
        try:
            known[name] = b"=" + digest((name, value)).encode()
        except Unkeyable:
            known[name] = by_type(value)
    return known[name]


def by_type(value: Any) -> bytes:
    """A value of which only the type counts."""
    return b"~" + text(type_name(type(value)))


def found_by_name(value: Any) -> str | None:
    """``module.qualname``, if that is the way to find the value again."""
    module, qualname = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(qualname, str):
        return None
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):
        found = getattr(found, "__dict__", {}).get(part)
        if isinstance(found, _WRAPPERS):
            found = found.__func__
    return f"{module}.{qualname}" if found is value else None


def described(walk: Walk, value: Any) -> bytes:
    """What can be read off functions, as is done with those that a model may call: docstring and
    annotations. Where a function is only called, they are comments."""
    if type(value) is types.MethodType:
        value = value.__func__
    if type(value) is types.FunctionType:
        if walk.library(value.__module__):
            return b""
        notes = [text(n) + walk.or_type(note) for n, note in sorted(value.__annotations__.items())]
        return b"D%b%d:%b" % (text(value.__doc__ or ""), len(notes), b"".join(notes))
    if type(value) in (list, tuple):
        return b"".join(described(walk, each) for each in value)
    if type(value) is dict:
        names = sorted(name for name in value if type(name) is str)
        return b"".join(described(walk, value[name]) for name in names)
    return b""


# -- plans ----------------------------------------------------------------------------------------


def _by_type(walk: Walk, value: Any) -> bytes:
    """What carries no configuration, but for what a class of the user's adds."""
    if walk.library(type(value).__module__):
        return by_type(value)
    return by_type(value) + walk.here(value, _additions)


def _additions(walk: Walk, value: Any) -> bytes:
    def own() -> bytes:
        if threading.local in mro_of(type(value)):
            return walk.encode(type(value))  # its attributes are this thread's
        return state(walk, value, kept_by_libraries(type(value), walk.homes))

    return walk.leniently(lambda: walk.attempt(own, bytes))


def _array(walk: Walk, value: array.array[Any]) -> bytes:
    return b"y" + walk.encode([value.typecode, value.tolist()])


def _with_class(data: Plan) -> Plan:
    """A value of a user's class, such as an enum's member, with the class itself."""
    return lambda walk, value: b"I" + walk.encode(type(value)) + data(walk, value)


def is_record(mro: tuple[type, ...]) -> bool:
    """Whether instances are their attributes, whoever wrote the class."""
    return (
        BaseModel in mro
        or types.SimpleNamespace in mro
        or any("__dataclass_fields__" in namespace_of(base) for base in mro)
    )


def _instance(walk: Walk, value: Any) -> bytes:
    """An object with attributes: its class and its state."""
    kind = type(value)
    mro = mro_of(kind)
    if not is_record(mro):
        name = found_by_name(value)
        if name is not None and walk.library(value.__module__):
            return b"N" + text(name)
        if walk.library(kind.__module__):
            return refuse(kind)(walk, value)
    bases = [base for base in mro if not base.__flags__ & HEAPTYPE]
    if bases not in ([object], [types.SimpleNamespace, object]):
        return refuse(kind, "keeps state that cannot be read")(walk, value)
    return walk.here(value, state)


def state(walk: Walk, value: Any, leave: frozenset[str] = frozenset()) -> bytes:
    """An object's class and attributes, without what to ``leave``.

    What the code changes itself counts as it was when it was first seen: as it was configured, but
    without counters, logs and what else the code keeps there.
    """
    kind = type(value)
    own = instance_state(kind)(value)
    if BaseModel in mro_of(kind):
        own.update(extra_of(value))
        if not walk.library(kind.__module__):
            own.update(private_of(value))
    stores, pokes = walk.facts.changed_by_itself(kind)
    out = [walk.encode(kind)]
    for name in sorted(own.keys() - leave):
        item = own[name]
        changes = name in stores or (name in pokes and is_container(item))
        if changes or walk.facts.changes(value, name, item):
            out.append(text(name) + as_first_seen(value, name, item))
        else:
            out.append(text(name) + walk.captured(f".{name}", item))
            if type(item) in (list, tuple, dict):
                out.append(described(walk, item))
    return b"%b%d;" % (b"".join(out), len(out))
