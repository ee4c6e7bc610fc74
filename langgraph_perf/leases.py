"""What a node leases: the ``resources=`` of ``add_node``, and leases taken inside a body."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Hashable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import TYPE_CHECKING, Any

from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import var_child_runnable_config

from langgraph_perf._binding import BINDING, Binding
from langgraph_perf.errors import ConfigurationError

if TYPE_CHECKING:
    from langgraph_perf.resources import Registry, Use

_LANGGRAPHS_OWN = ("config", "error", "previous", "runtime", "store", "writer")
_CALLED_WITH = ("input", "self")
"""Parameters of the method of LangGraph's that passes on what a node is called with."""
_CAN_BE_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def lease(
    name: str,
    key: Hashable = None,
    *,
    timeout: float | None = None,
    config: RunnableConfig | None = None,
) -> AbstractContextManager[Any]:
    """Inside a node: a lease of the graph's resource ``name`` for ``with``.

    Args:
        key: which object, for ``Keyed``.
        timeout: seconds to wait at most; ``None`` for the resource's own limit. ``FromContext``
            ignores it.
        config: the node's config; needed only in async runs on Python 3.10, where LangGraph
            cannot pass it along by itself.

    Raises:
        ConfigurationError: there is no such resource, or the code does not run inside a node.
    """
    taken = _registry(name, config).find(name).lease(key, timeout=timeout)
    _mark(taken, sys._getframe(1))
    return taken


def alease(
    name: str,
    key: Hashable = None,
    *,
    timeout: float | None = None,
    config: RunnableConfig | None = None,
) -> AbstractAsyncContextManager[Any]:
    """Like ``lease``, for ``async with``; never blocks the event loop."""
    taken = _registry(name, config).find(name).alease(key, timeout=timeout)
    _mark(taken, sys._getframe(1))
    return taken


def _mark(taken: Any, frame: Any) -> None:
    # a forgotten lease is reported with the line that took it, which is not one of this module
    taken.code, taken.at = frame.f_code, frame.f_lasti


def _registry(name: str, config: RunnableConfig | None) -> Registry:
    config = config or var_child_runnable_config.get() or {}
    binding: Binding | None = (config.get("configurable") or {}).get(BINDING)
    if binding is None or binding.resources is None:
        raise ConfigurationError(
            f"lease({name!r}): there are no resources here; it works inside a node of a graph that "
            "was compiled with resources=, or of a subgraph of one (in threads that the node "
            "starts, and async runs on Python 3.10: pass config=)"
        )
    return binding.resources


def parse_resources(
    node: Any, action: Any, resources: Sequence[str] | Mapping[str, str | Use] | None
) -> Mapping[str, Use]:
    """What ``add_node(node, action, resources=)`` asks for, by parameter.

    Raises:
        ConfigurationError: see ``StateGraph.add_node``.
    """
    if resources is None:
        return {}
    from langgraph_perf.resources import Use

    function = node if action is None else action
    name = node if isinstance(node, str) else getattr(node, "__name__", type(node).__name__)
    where = f"node {name!r}, resources"
    accepted = "a list of names, or a mapping of parameters to names or Use(...)"
    if isinstance(resources, Mapping):
        given = list(resources.items())
    elif isinstance(resources, str) or not isinstance(resources, Sequence):
        hint = f"; did you mean [{resources!r}]?" if isinstance(resources, str) else ""
        raise ConfigurationError(f"{where}: got {resources!r}; accepted: {accepted}{hint}")
    else:
        given = [(item.name if isinstance(item, Use) else item, item) for item in resources]
    uses: dict[str, Use] = {}
    for parameter, use in given:
        if not isinstance(parameter, str) or not isinstance(use, str | Use):
            raise ConfigurationError(f"{where}: got {use!r} in it; accepted: {accepted}")
        uses[parameter] = use if isinstance(use, Use) else Use(use)
    _check_parameters(where, function, uses)
    return uses


def needs(function: Any, parameter: str) -> bool:
    """Whether ``function`` cannot be called as a node without an argument for ``parameter``."""
    try:
        parameters = dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return False
    found = parameters.get(parameter)
    return (
        found is not None
        and found.kind in _CAN_BE_NAMED
        and found.default is inspect.Parameter.empty
        and parameter != next(iter(parameters))
        and parameter not in _LANGGRAPHS_OWN
    )


def _check_parameters(where: str, function: Any, uses: Mapping[str, Use]) -> None:
    if isinstance(function, Runnable) or not callable(function):
        raise ConfigurationError(
            f"{where}: a {type(function).__name__} takes no parameters of its own; accepted: a "
            "function, a method or a callable object. Inside a Runnable, lease(name) leases"
        )
    parameters = dict(inspect.signature(function).parameters)
    first = next(iter(parameters), None)
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for parameter in uses:
        if parameter in _LANGGRAPHS_OWN or parameter in _CALLED_WITH:
            how = "fills itself" if parameter in _LANGGRAPHS_OWN else "needs to call the node"
            raise ConfigurationError(
                f"{where}: {parameter!r} is a parameter that LangGraph {how}; lease under "
                f"another one: resources={{'my_{parameter}': {uses[parameter].name!r}}}"
            )
        found = parameters.get(parameter)
        named = found is not None and found.kind in _CAN_BE_NAMED and parameter != first
        if not named and not (takes_any and found is None):
            others = [p for p in parameters if p != first and p not in _LANGGRAPHS_OWN]
            there = ", ".join(map(repr, others)) or "none besides its input"
            raise ConfigurationError(
                f"{where}: the node has no parameter {parameter!r} to put it in; it has: {there}. "
                "Add the parameter, or lease under another one: "
                f"resources={{'parameter': {uses[parameter].name!r}}}"
            )
