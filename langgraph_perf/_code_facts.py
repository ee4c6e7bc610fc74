"""What code does to its surroundings, and whose code it is."""

from __future__ import annotations

import re
import sys
import sysconfig
import types
from collections import ChainMap, UserDict, UserList, deque
from typing import Any

from langgraph_perf._canonical import mro_of, namespace_of
from langgraph_perf._code_identity import Code, code_of

# whatever version of these is installed, they count by name
_FRAMEWORKS = frozenset(
    (
        "langchain",
        "langchain_classic",
        "langchain_community",
        "langchain_core",
        "langgraph",
        "langgraph_perf",
        "langsmith",
        "pydantic",
        "pydantic_core",
        "typing_extensions",
    )
)
_CONTAINERS = (list, dict, set, bytearray, deque, ChainMap, UserDict, UserList)
_MAKERS = frozenset(("__init__", "__new__", "__post_init__", "__setstate__", "model_post_init"))
# methods that frameworks call, so that no code needs to name them
_ENTRIES = """
    __call__ invoke ainvoke batch abatch stream astream transform atransform _run _arun _call _acall
    _generate _agenerate _stream _astream __enter__ __exit__ __aenter__ __aexit__ __iter__ __next__
    __getitem__
"""


def top_level(module: Any) -> str:
    """The top-level package of a module's name."""
    return module.partition(".")[0] if isinstance(module, str) else ""


def is_framework(module: Any) -> bool:
    """Whether a module is Python's or a framework's own, and never the user's."""
    top = top_level(module)
    if top in _FRAMEWORKS:
        return True
    # a user's module may have the name of one of Python's
    return top in sys.stdlib_module_names and not any(
        place and not place.startswith(_STDLIB) for place in _places(top)
    )


def is_installed(module: Any) -> bool:
    """Whether a module is where installers put packages."""
    folders = {part for place in _places(top_level(module)) for part in _parts(place)}
    return not folders.isdisjoint(("site-packages", "dist-packages"))


def is_library(top: str, homes: frozenset[str]) -> bool:
    """Whether a top-level package's code counts by name: it is none of the user's ``homes``."""
    return top not in homes and (is_framework(top) or is_installed(top))


def _places(top: str) -> list[str]:
    module = sys.modules.get(top)
    return [*getattr(module, "__path__", ()), getattr(module, "__file__", None) or ""]


_parts = re.compile(r"[\\/]").split
_STDLIB = (*{sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")},)


class Facts:
    """What code that belongs to the identity does to its surroundings, by object identity.

    Attributes:
        stores: names bound anew: ``(id of the namespace, object or cell, name)``.
        pokes: names whose value is changed in place, if that is a built-in container.
        attributes: the names of attributes that are bound anew or changed in place, of whatever.
        entries: the methods that are called from outside of their class.
        members: the code of methods; what they call on their own does not make it an entry.
    """

    def __init__(self) -> None:
        self.stores: set[tuple[int, str]] = set()
        self.pokes: set[tuple[int, str]] = set()
        self.attributes: set[str] = set()
        self.entries: set[str] = set(_ENTRIES.split())
        self.members: set[types.CodeType] = set()
        self._functions: list[types.FunctionType] = []
        self._held: list[Any] = []  # an id is only unique while its object lives

    def changes(self, holder: object, name: str, value: Any) -> bool:
        """Whether the code changes what ``holder`` has under ``name``."""
        key = (id(holder), name)
        return key in self.stores or (key in self.pokes and is_container(value))

    def note(self, function: types.FunctionType, known: Code) -> None:
        """Note what a function does to names and attributes outside of it."""
        self._functions.append(function)
        self.attributes.update(o[-1] for o in known.stores | known.pokes if len(o) > 2)
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        for origins, noted in ((known.stores, self.stores), (known.pokes, self.pokes)):
            for space, name, *path in origins:
                holder: Any
                if space == "global":
                    holder = function.__globals__
                elif space == "free" and name in cells:
                    holder = cells[name]
                else:
                    continue
                for step in path:
                    holder, name = value_of(holder, name), step
                    if types.ModuleType in mro_of(type(holder)):
                        holder = holder.__dict__
                self._held.append(holder)
                noted.add((id(holder), name))

    def close(self) -> None:
        """Count as entries what functions outside of classes name."""
        for function in self._functions:
            if function.__code__ not in self.members:
                for origin in code_of(function.__code__).loads:
                    self.entries.update(origin[2:])

    def changed_by_itself(self, kind: type) -> tuple[set[str], set[str]]:
        """The attributes that an object's methods bind anew or change in place once it is made.

        Only methods in use are asked, so that a setter that is called before does not hide what it
        has set.
        """
        stores: set[str] = set()
        pokes: set[str] = set()
        waiting, done = list(self.entries - _MAKERS), set(_MAKERS)
        while waiting:
            name = waiting.pop()
            if name in done:
                continue
            done.add(name)
            for base in mro_of(kind):
                method = namespace_of(base).get(name)
                method = method.fget if type(method) is property else method
                method = getattr(method, "__wrapped__", method)
                if type(method) is types.FunctionType and not is_framework(base.__module__):
                    code = method.__code__
                    own = ("local", *code.co_varnames[: min(1, code.co_argcount)])
                    known = code_of(code)
                    stores.update(o[2] for o in known.stores if o[:2] == own and len(o) == 3)
                    pokes.update(o[2] for o in known.pokes if o[:2] == own and len(o) == 3)
                    waiting += [o[2] for o in known.loads if o[:2] == own and len(o) > 2]
        return stores, pokes


def kept_by_libraries(kind: type, homes: frozenset[str]) -> frozenset[str]:
    """The attributes that the methods of an object's library classes bind."""
    kept: set[str] = set()
    for base in mro_of(kind):
        if is_library(top_level(base.__module__), homes):
            for method in namespace_of(base).values():
                if type(method) is types.FunctionType:
                    own = ("local", *method.__code__.co_varnames[:1])
                    stores = code_of(method.__code__).stores
                    kept.update(o[2] for o in stores if o[:2] == own and len(o) == 3)
    return frozenset(kept)


def is_container(value: Any) -> bool:
    """Whether a value is a built-in container, whose methods are known to change it."""
    return any(base in mro_of(type(value)) for base in _CONTAINERS)


def value_of(holder: Any, name: str) -> Any:
    """What a namespace, a cell or an object has under a name, without running code; or ``None``."""
    if type(holder) is types.CellType:
        try:
            return holder.cell_contents
        except ValueError:
            return None
    if type(holder) is dict:
        return holder.get(name)
    try:
        return object.__getattribute__(holder, "__dict__").get(name)
    except AttributeError:
        return None
