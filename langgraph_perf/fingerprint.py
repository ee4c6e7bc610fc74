"""What a node is: the code that runs when it is called, and the values built into that code.

The identity of a function is what its bytecode does, its defaults, its closure, and the functions,
classes and constants of its own top-level package that it reaches by name. Functions of other
packages count by name, objects of known kinds (runnables, tools, models, graphs) by their parts,
and objects with plain attributes by class and state. State that the code itself changes, such as a
counter or a list of calls, counts as it was when this process first looked, and what carries no
configuration not at all: locks, queues, loggers.

A value that is built in (closure, default, bound argument, ``self``) and that cannot be keyed
raises. Of a module-level object, and of a class's attribute, that cannot, those parts count by type
that have no key, and the others as ever: the code names the object, and the edit of a prompt must
not go unnoticed because there is a client in the chain.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from hashlib import blake2b
from typing import Any, ClassVar

from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool
from langgraph.graph.state import CompiledStateGraph

from langgraph_perf._canonical import IdentityMap, Plan, Unkeyable
from langgraph_perf._code_classes import class_or_annotation_plan
from langgraph_perf._code_facts import is_framework, is_installed, is_library, top_level
from langgraph_perf._code_functions import callable_plan
from langgraph_perf._code_walk import Walk
from langgraph_perf._message_rows import DIGEST_SIZE
from langgraph_perf._runnable_parts import runnable_plan

__all__ = ["Classes", "Unkeyable", "fingerprint"]


class _NodeWalk(Walk):
    """A walk that knows every kind of part."""

    __slots__ = ()

    plans: ClassVar[IdentityMap]

    def plan_for(self, kind: type) -> Plan:
        for plan_for in (class_or_annotation_plan, callable_plan, runnable_plan):
            plan = plan_for(kind)
            if plan is not None:
                return plan
        return super().plan_for(kind)


def fingerprint(obj: Any, incomplete: Callable[[], object] | None = None) -> str:
    """The identity of a node, a key function or any other callable, as 40 hexadecimal digits.

    It is the same in every process, whatever the hash seed, import order and working directory,
    before and after calls. It changes with what the code does, not with comments, docstrings or
    where the code stands.

    Args:
        incomplete: called if the code reads a name that nothing has yet, such as a helper's that
            the module defines further down.

    Raises:
        Unkeyable: part of the identity cannot be keyed; its path is like
            ``retrieve: closure["client"]``.
    """
    return _fingerprint(obj, _homes(obj), incomplete)


class Classes:
    """The identities of the classes of a node's input: of an enum with its values, say, or of a
    dataclass with its methods. Classes of libraries count by name, and those without identity."""

    def __init__(self, node: Any) -> None:
        self._homes = _homes(node)
        self._known = IdentityMap(1024)

    def __call__(self, kind: type) -> str:
        found = self._known.entries.get(id(kind))
        if found is None:
            self._known.put(kind, self._identify(kind))
            found = self._known.entries[id(kind)]
        code: str = found[0]
        return code

    def _identify(self, kind: type) -> str:
        top = top_level(kind.__module__)
        if is_library(top, self._homes):
            return ""
        try:
            return _fingerprint(kind, self._homes | {top})
        except Unkeyable:
            return ""


def _fingerprint(
    obj: Any, homes: frozenset[str], incomplete: Callable[[], object] | None = None
) -> str:
    try:
        survey = _NodeWalk(homes)
        survey.run(obj)
        survey.facts.close()
        walk = _NodeWalk(homes, survey.facts)
        raw = walk.run(obj)
    except Unkeyable as exc:
        exc.within(_name(obj))
        raise
    except Exception as exc:
        raise Unkeyable(_name(obj), f"reading it raised {type(exc).__name__}") from exc
    if walk.missing and incomplete is not None:
        incomplete()
    return blake2b(b"langgraph_perf code 1\0" + raw, digest_size=DIGEST_SIZE).hexdigest()


def _name(obj: Any) -> str:
    return str(getattr(obj, "__name__", None) or type(obj).__name__)


def _homes(root: Any) -> frozenset[str]:
    """The packages that the functions and classes belong to which a callable is put together from.

    They are the user's, even where they are installed like a library.
    """
    homes: set[str] = set()
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        obj = waiting.pop()
        if id(obj) not in seen:
            seen.add(id(obj))
            home, parts = _parts(obj)
            homes.add(top_level(home))
            waiting.extend(parts)
    return frozenset(top for top in homes if top and not is_framework(top))


def _parts(obj: Any) -> tuple[Any, Iterator[Any]]:
    """The module that an object's code is in, and the objects that it is put together from."""
    nothing: Iterator[Any] = iter(())
    if isinstance(obj, types.FunctionType | type):
        return obj.__module__, nothing
    if isinstance(obj, types.MethodType):
        return None, iter((obj.__func__, obj.__self__))
    if isinstance(obj, functools.partial):
        return None, iter((obj.func, *obj.args, *obj.keywords.values()))
    if isinstance(obj, list | tuple):
        return None, iter(obj)
    if isinstance(obj, dict):
        return None, iter(obj.values())
    if isinstance(obj, CompiledStateGraph):
        return None, (spec.runnable for spec in obj.builder.nodes.values())
    top = top_level(type(obj).__module__)
    if isinstance(obj, Runnable | BaseTool):
        # integrations are installed next to the user's code, and are not the user's
        foreign = top.startswith(("langchain_", "langgraph_")) and is_installed(top)
        return None if foreign else top, iter(vars(obj).values())
    return (top if callable(obj) else None), nothing
