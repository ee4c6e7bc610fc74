"""How functions and other callables count: code, captured values, and what is reached by name."""

from __future__ import annotations

import builtins
import contextlib
import functools
import operator
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from importlib.machinery import PathFinder
from typing import Any

from langgraph_perf._canonical import IdentityMap, Plan, Unkeyable, mro_of, text, type_name
from langgraph_perf._code_facts import top_level, value_of
from langgraph_perf._code_identity import Code, Origin, code_of
from langgraph_perf._code_walk import Walk, as_first_seen, by_type, described, found_by_name

_WHOLE = ""  # stands for no attribute
# attributes that count by themselves, follow from the rest or do nothing when the function runs
_MARKS = frozenset(
    """
    __wrapped__ cache_parameters __abstractmethods__ __isabstractmethod__ __deprecated__ __final__
    __no_type_check__ __override__ __pytest_wrapped__ pytestmark
    """.split()  # noqa: SIM905
)
_GETTERS = (operator.attrgetter, operator.itemgetter, operator.methodcaller)


def callable_plan(kind: type) -> Plan | None:
    """The plan of functions, methods, partials and modules, or ``None``."""
    mro = mro_of(kind)
    return next((plan for base, plan in _CALLABLES.items() if base in mro), None)


def _function(walk: Walk, function: types.FunctionType) -> bytes:
    home = function.__module__ or function.__globals__.get("__name__")
    if walk.library(home):
        # a function that is not found under its name could be any of those made at its place
        name = found_by_name(function)
        if name is not None:
            return b"N" + text(name)
        if walk.near is not None:
            return walk.later(function, _foreign_body)
    return walk.later(function, _function_body)


def _function_body(walk: Walk, function: types.FunctionType) -> bytes:
    code = function.__code__
    known = code_of(code)
    if walk.survey:
        walk.facts.note(function, known)
    out = [known.body]
    try:
        names = code.co_varnames[: code.co_argcount]
        defaults = function.__defaults__ or ()
        for name, value in zip(names[len(names) - len(defaults) :], defaults, strict=True):
            out.append(walk.captured(f'default["{name}"]', value))
        for name, value in sorted((function.__kwdefaults__ or {}).items()):
            out.append(text(name) + walk.captured(f'default["{name}"]', value))
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            out.append(_cell(walk, function, name, cell))
        wrapped = function.__dict__.get("__wrapped__")
        if type(wrapped) is types.FunctionType:
            out.append(walk.captured("__wrapped__", wrapped))
        out += _attributes(walk, function)
        home = function.__globals__.get("__name__")
        if not walk.library(home):
            top = top_level(home)
            for name, paths in sorted(_globals(known).items()):
                out.append(text(name) + _global(walk, function.__globals__, name, paths, top))
            out += [_imported(walk, function.__globals__, e, top) for e in sorted(known.imports)]
        out += [described(walk, value) for value in _passed(function, known)]
    except Unkeyable as exc:
        exc.within(f"{function.__name__}: ")
        exc.complete = True
        raise
    return b"".join(out)


def _attributes(walk: Walk, function: Any) -> Iterator[bytes]:
    """What a function, a partial one or one with a cache has been given to keep."""
    own = function.__dict__
    # what a library's wrapper keeps may change with each call, and no code here says so
    abroad = type(function) is types.FunctionType and walk.library(
        function.__globals__.get("__name__")
    )
    for name in sorted(own.keys() - _MARKS):
        if abroad or name in walk.facts.attributes:
            yield b"." + text(name) + as_first_seen(function, name, own[name])
        else:
            yield b"." + text(name) + walk.or_type(own[name])


def _passed(function: types.FunctionType, known: Code) -> Iterator[Any]:
    """What a function has from outside and looks at, or hands on so that somebody else can."""
    looked_at = {o[:-1] for o in known.loads if o[-1] in ("__doc__", "__annotations__")}
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    for space, name, *path in sorted(known.passed | looked_at):
        value: Any = None
        if space == "global":
            value = function.__globals__.get(name)
        elif space == "free" and name in cells:
            value = value_of(cells[name], "")
        for step in path:
            value = value_of(value, step)
        yield value


def _foreign_body(walk: Walk, function: types.FunctionType) -> bytes:
    """A function that another package made: what it was made with, though not its code."""
    cells = (value_of(cell, "") for cell in function.__closure__ or ())
    values = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), *cells]
    name = text(f"{function.__module__}.{function.__qualname__}")
    return b"F" + name + b"".join(walk.or_type(value) for value in values)


def _cell(walk: Walk, function: types.FunctionType, name: str, cell: types.CellType) -> bytes:
    try:
        value = cell.cell_contents
    except ValueError:
        walk.missing = True
        return b"-"
    if walk.facts.changes(cell, name, value):
        return as_first_seen(function, name, value)
    return walk.captured(f'closure["{name}"]', value)


# -- what a function reaches by name --------------------------------------------------------------


def _globals(known: Code) -> dict[str, set[Origin]]:
    """The module-level names that code reads, each with the attribute paths that it follows. Those
    of what it uses as a value end with ``_WHOLE``."""
    names: dict[str, set[Origin]] = {}
    for space, name, *path in known.loads:
        if space == "global":
            names.setdefault(name, set()).add(tuple(path))
    for space, name, *path in known.whole:
        if space == "global":
            names.setdefault(name, set()).add((*path, _WHOLE))
    return names


def _global(
    walk: Walk, namespace: dict[str, Any], name: str, paths: Iterable[Origin], top: str
) -> bytes:
    """What a module has under a name: by value or code if possible, else by type."""
    if name not in namespace:
        walk.missing |= not hasattr(builtins, name)
        return b"-"
    value = namespace[name]
    if types.ModuleType in mro_of(type(value)):
        if top_level(value.__name__) != top:
            return b"N" + text(value.__name__)
        out = [b"M" + text(value.__name__)]
        steps = {path[0] for path in paths if path}
        own = value.__dict__
        if "__getattr__" in own and not steps <= own.keys():
            steps = steps & own.keys() | {_WHOLE}
        if _WHOLE in steps:
            out.append(_module_value(walk, value))
        for step in sorted(steps - {_WHOLE}):
            further = [path[1:] for path in paths if path[:1] == (step,)]
            out.append(text(step) + _global(walk, value.__dict__, step, further, top))
        return b"".join(out)
    if walk.facts.changes(namespace, name, value):
        # the module, since nothing can refer weakly to its namespace
        module = sys.modules.get(str(namespace.get("__name__")))
        if getattr(module, "__dict__", None) is not namespace:
            return by_type(value)
        return as_first_seen(module, name, value)

    def used() -> bytes:
        """What the code reads of an object that as a whole has no key."""
        out = []
        for step in sorted({path[0] for path in paths if path}):
            part = value_of(value, step)
            if part is not None and not walk.facts.changes(value, step, part):
                out.append(text(step) + walk.or_type(part))
        return b"".join(out)

    outer, walk.near = walk.near, top
    encoded = walk.or_type(value, used)
    walk.near = outer
    return encoded


def _imported(
    walk: Walk, namespace: Mapping[str, Any], entry: tuple[int, str, tuple[str, ...]], top: str
) -> bytes:
    """What an import statement inside a function reaches: modules of the same package, by code."""
    level, name, names = entry
    package = str(namespace.get("__package__") or "")
    if level:
        package = package.rsplit(".", level - 1)[0] if level > 1 else package
        name = f"{package}.{name}" if name else package
    if top_level(name) != top or top == "__main__":
        return b"N" + text(name)
    return b"".join(_module(walk, each) for each in (name, *(f"{name}.{n}" for n in names)))


def _module(walk: Walk, name: str) -> bytes:
    """A module that may not have been imported yet: found and compiled, never run."""
    loaded = sys.modules.get(name)
    if loaded is not None and _spec_of(loaded) is not None:
        return _loaded(walk, loaded)
    path: Any = None
    spec = None
    for end, _ in enumerate(name.split(".")):
        spec = PathFinder.find_spec(".".join(name.split(".")[: end + 1]), path)
        if spec is None:
            above = sys.modules.get(".".join(name.split(".")[: end + 1]))
            spec = getattr(above, "__spec__", None)
        if spec is None:
            return b"-"  # not a module but something in one
        path = spec.submodule_search_locations
    return _sourced(walk, name, walk.modules.get(name) or _Source.of(name, spec))


def _loaded(walk: Walk, module: types.ModuleType) -> bytes:
    """A module that has been imported, by its source if there is one."""
    name, spec = module.__name__, _spec_of(module)
    if spec is None:
        return b"N" + text(name)
    found = _sources.entries.get(id(spec))
    if found is None:
        source = _Source.of(name, spec)
        _sources.put(spec, source)
    else:
        source = found[0]
    return _sourced(walk, name, source)


def _spec_of(module: types.ModuleType) -> Any:
    """How a module has been found, unless it is a script."""
    spec = getattr(module, "__spec__", None)
    return spec if getattr(spec, "name", None) == module.__name__ else None


def _sourced(walk: Walk, name: str, source: _Source | None) -> bytes:
    if source is None:
        return b"N" + text(name)
    return walk.later(walk.modules.setdefault(name, source), _module_body)


class _Source:
    """A module's code."""

    def __init__(self, name: str, is_package: Any, code: types.CodeType) -> None:
        self.name = name
        self.package = name if is_package is not None else name.rpartition(".")[0]
        self.code = code_of(code)

    @classmethod
    def of(cls, name: str, spec: Any) -> _Source | None:
        """The code of the module that is found in this way, if it has any."""
        get_code = getattr(spec.loader if spec else None, "get_code", None)
        code = None
        if get_code:
            with contextlib.suppress(ImportError, OSError, SyntaxError):  # gone, or being edited
                code = get_code(name)
        return None if code is None else cls(name, spec.submodule_search_locations, code)


# of modules that are loaded as it was when first looked at: their files may be replaced by newer
# ones while the process runs the old code. A reload brings another spec
_sources = IdentityMap(1024)


def _module_body(walk: Walk, source: _Source) -> bytes:
    if walk.survey:
        return b""  # nothing is found out there
    namespace = {"__package__": source.package}
    imports = (
        _imported(walk, namespace, entry, top_level(source.name))
        for entry in sorted(source.code.imports)
    )
    return source.code.body + b"".join(imports)


# -- other callables ------------------------------------------------------------------------------


def _method(walk: Walk, method: types.MethodType) -> bytes:
    walk.facts.entries.add(method.__func__.__name__)
    try:
        bound = walk.captured("self", method.__self__)
    except Unkeyable as exc:
        owner: Any = method.__self__
        owner = owner if type in mro_of(type(owner)) else type(owner)
        exc.within(f"{owner.__name__}.{method.__func__.__name__}: ")
        exc.complete = True
        raise
    return b"M" + bound + walk.encode(method.__func__)


def _partial(walk: Walk, partial: functools.partial[Any]) -> bytes:
    out = [walk.captured(".func", partial.func)]
    for index, value in enumerate(partial.args):
        out.append(walk.captured(f".args[{index}]", value))
    for name, value in sorted(partial.keywords.items()):
        out.append(text(name) + walk.captured(f'["{name}"]', value))
    out += _attributes(walk, partial)
    return b"P%d:%d:%b" % (len(partial.args), len(partial.keywords), b"".join(out))


def _builtin(walk: Walk, function: types.BuiltinFunctionType) -> bytes:
    owner = function.__self__
    name = text(f"{function.__module__}.{function.__qualname__}")
    if owner is None or type(owner) is types.ModuleType:
        return b"N" + name
    return b"B" + name + walk.captured(".__self__", owner)


def _descriptor(walk: Walk, method: types.MethodDescriptorType) -> bytes:
    return b"N" + text(f"{type_name(method.__objclass__)}.{method.__name__}")


def _cached(walk: Walk, function: Any) -> bytes:
    out = [walk.encode(function.cache_parameters())]
    out.append(walk.captured(".__wrapped__", function.__wrapped__))
    return b"L" + b"".join([*out, *_attributes(walk, function)])


def _getter(walk: Walk, getter: Any) -> bytes:
    arguments = getter.__reduce__()[1:]
    return b"G" + text(type_name(type(getter))) + walk.captured(".args", arguments)


def _module_value(walk: Walk, module: types.ModuleType) -> bytes:
    """A module that code may do anything with: one of the user's by its source."""
    if walk.library(module.__name__):
        return b"N" + text(module.__name__)
    return _loaded(walk, module)


_CALLABLES: dict[type, Plan] = {
    types.ModuleType: _module_value,
    types.FunctionType: _function,
    types.MethodType: _method,
    functools.partial: _partial,
    types.BuiltinFunctionType: _builtin,
    types.MethodDescriptorType: _descriptor,
    types.WrapperDescriptorType: _descriptor,
    types.ClassMethodDescriptorType: _descriptor,
    type(functools.lru_cache(len)): _cached,
    **dict.fromkeys(_GETTERS, _getter),
}
