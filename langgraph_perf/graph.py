"""``StateGraph`` and its compiled graph: LangGraph's own, plus the cache."""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import fields
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Generic, cast

from langchain_core.runnables import RunnableConfig
from langgraph._internal._constants import CONFIG_KEY_CHECKPOINTER
from langgraph._internal._runnable import RunnableSeq
from langgraph.cache.base import BaseCache
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.graph import StateGraph as LangGraphStateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.pregel import Pregel
from langgraph.pregel._utils import _runnable_has_native_async
from langgraph.store.base import BaseStore
from langgraph.types import All, Checkpointer, RetryPolicy, TimeoutPolicy
from langgraph.types import CachePolicy as LangGraphCachePolicy
from langgraph.typing import ContextT, InputT, OutputT, StateT
from typing_extensions import Self

from langgraph_perf import _validate
from langgraph_perf._binding import BINDING, Binding, ambient, configurable_of, make_binding
from langgraph_perf._gathering import part_of, taint
from langgraph_perf._identity import NodeSpec
from langgraph_perf._locks import new_lock
from langgraph_perf._marks import mark
from langgraph_perf.codec import Allowlist, types_in
from langgraph_perf.errors import ConfigurationError
from langgraph_perf.keys import Unkeyable
from langgraph_perf.leases import needs, parse_resources
from langgraph_perf.node import CachedNode, CachedSeq
from langgraph_perf.perf import Perf
from langgraph_perf.policy import CachePolicy

if TYPE_CHECKING:
    from langgraph_perf.resources import Registry, Resource, Use


class StateGraph(LangGraphStateGraph[StateT, ContextT, InputT, OutputT]):
    """LangGraph's ``StateGraph`` whose ``cache_policy=`` keeps this library's guarantees.

    Same signature and behaviour as LangGraph's. ``cache_policy=`` takes ``CachePolicy`` of this
    library or of LangGraph, whose ``key_func`` and ``ttl`` are kept. A graph without policies runs
    exactly as LangGraph's own does.
    """

    @property
    def _uses(self) -> dict[str, Mapping[str, Use]]:
        # no __init__ of our own: a type checker infers the graph's types from LangGraph's
        uses: dict[str, Mapping[str, Use]] = self.__dict__.setdefault("_resource_uses", {})
        return uses

    def add_node(
        self,
        node: str | Any,
        action: Any | None = None,
        *,
        defer: bool = False,
        metadata: dict[str, Any] | None = None,
        input_schema: type[Any] | None = None,
        retry_policy: RetryPolicy | Sequence[RetryPolicy] | None = None,
        cache_policy: CachePolicy | LangGraphCachePolicy[Any] | None = None,
        error_handler: Any | None = None,
        destinations: dict[str, str] | tuple[str, ...] | None = None,
        timeout: float | timedelta | TimeoutPolicy | None = None,
        resources: Sequence[str] | Mapping[str, str | Use] | None = None,
        **kwargs: Any,
    ) -> Self:
        """Like LangGraph's ``add_node``; what is declared is checked here, against the node.

        Args:
            resources: what the node leases while its body runs: names, each of which is a parameter
                of the node as well, or parameters with the names of resources or with ``Use``.

        Raises:
            ConfigurationError: ``cache_policy`` is not a policy, ``resources`` asks for parameters
                the node does not have, or either names a field that its input does not have; there
                is no such argument.
        """
        _refuse_unknown("add_node", kwargs, node)
        uses = parse_resources(node, action, resources)
        before = set(self.nodes)
        given: dict[str, Any] = {
            "defer": defer,
            "metadata": metadata,
            "input_schema": input_schema,
            "retry_policy": retry_policy,
            "cache_policy": _checked(cache_policy, f"add_node({node!r:.100}, cache_policy=)"),
            "error_handler": error_handler,
            "destinations": destinations,
            "timeout": timeout,
            **kwargs,
        }
        super().add_node(node, cast(Any, action), **given)
        for name in set(self.nodes) - before:
            spec = self.nodes[name]
            if spec.cache_policy is not None:
                self._check_policy(name, cast(Any, spec.cache_policy))
            if uses and not spec.is_error_handler:
                self._check_uses(name, uses)
                self._uses[name] = uses
        return self

    def set_node_defaults(
        self,
        *,
        retry_policy: RetryPolicy | Sequence[RetryPolicy] | None = None,
        cache_policy: CachePolicy | LangGraphCachePolicy[Any] | None = None,
        error_handler: Any | None = None,
        timeout: float | timedelta | TimeoutPolicy | None = None,
        **kwargs: Any,
    ) -> Self:
        """Like LangGraph's ``set_node_defaults``.

        Raises:
            ConfigurationError: ``cache_policy`` is not a policy, or there is no such argument.
        """
        _refuse_unknown("set_node_defaults", kwargs)
        super().set_node_defaults(
            retry_policy=retry_policy,
            cache_policy=_checked(cache_policy, "set_node_defaults(cache_policy=)"),
            error_handler=error_handler,
            timeout=timeout,
            **kwargs,
        )
        return self

    def compile(
        self,
        checkpointer: Checkpointer = None,
        *,
        cache: BaseCache[Any] | None = None,
        store: BaseStore | None = None,
        interrupt_before: All | list[str] | None = None,
        interrupt_after: All | list[str] | None = None,
        debug: bool = False,
        name: str | None = None,
        resources: Mapping[str, Resource[Any]] | None = None,
        **kwargs: Any,
    ) -> CompiledGraph[StateT, ContextT, InputT, OutputT]:
        """Like LangGraph's ``compile``; ``cache`` is any LangGraph ``BaseCache``, ours or not.

        Without ``cache`` the nodes' policies use the cache of the parent graph, if there is one,
        and likewise for ``resources``: ``Pool``, ``Shared``, ``Keyed`` or ``FromContext`` by name.

        Raises:
            ConfigurationError: ``cache`` is no cache, or lacks what a policy asks of it;
                ``resources`` lacks what a node asks for, or has it in a form it cannot use; there
                is no such argument.
        """
        _refuse_unknown("compile", kwargs)
        if cache is not None and not isinstance(cache, BaseCache):
            raise ConfigurationError(
                f"compile(cache=): got {cache!r:.200}; accepted: MemoryCache(...), "
                "DiskCache(directory), RedisCache(url_or_client), TieredCache(...), any other "
                "LangGraph BaseCache, or None"
            )
        mark(checkpointer)
        compiled = super().compile(
            checkpointer,
            cache=cache,
            store=store,
            interrupt_before=interrupt_before,
            interrupt_after=interrupt_after,
            debug=debug,
            name=name,
            **kwargs,
        )
        # compile() has no hook for the class it makes, and all that follows from the class is
        # methods: the instance, which edges and branches already refer to, stays the same
        compiled.__class__ = CompiledGraph
        graph = cast("CompiledGraph[StateT, ContextT, InputT, OutputT]", compiled)
        registry: Registry | None = None
        if resources is not None:
            from langgraph_perf.resources import Registry

            registry = Registry(resources)
        graph._perf = Perf(graph, cache, registry)
        self._wrap_nodes(graph)
        graph._perf.check_tags()
        graph._perf.check_resources()
        graph._perf.family = [inner.perf for _, inner in graph._perf._graphs()]
        for name in registry or ():
            self._check_forgotten(graph, name)
        return graph

    def _check_forgotten(self, graph: CompiledGraph[Any, Any, Any, Any], resource: str) -> None:
        """Refuse nodes that would fail for want of a resource which is there."""
        for name, node in graph.nodes.items():
            bound = node.bound
            function = getattr(bound, "func", None) or getattr(bound, "afunc", None)
            if name not in self._uses and function is not None and needs(function, resource):
                raise ConfigurationError(
                    f"node {name!r} has the parameter {resource!r}, as has a resource, but does "
                    f"not ask for it; accepted: add_node(..., resources=[{resource!r}]), or a "
                    "default for the parameter"
                )

    def _wrap_nodes(self, graph: CompiledGraph[Any, Any, Any, Any]) -> None:
        types = graph._perf.types = functools.cache(self._types)
        for name, node in graph.nodes.items():
            uses = self._uses.get(name, {})
            if node.cache_policy is None and not uses:
                continue
            policy = None if node.cache_policy is None else CachePolicy.of(node.cache_policy)
            spec = NodeSpec(graph.name, name, policy, uses, types())
            spec.has_subgraph = bool(node.subgraphs)
            spec.inside = frozenset(_nodes_in(node.subgraphs))
            spec.remembers = _remembers(node.subgraphs)
            spec.native_async = _runnable_has_native_async(node.bound)
            spec.retry = node.retry_policy or graph.retry_policy or ()
            if policy is not None:
                graph._perf.declare(policy)
                self._check_policy(name, policy)
                if policy.stale_while_revalidate and spec.has_subgraph:
                    spec.warn(
                        "stale_while_revalidate has no effect: the node contains a graph, which "
                        "must not write to the thread's checkpoints from the background"
                    )
                spec.code = self._code_of(node.bound, policy, spec)
            node.cache_policy = None  # LangGraph must not cache it once more
            # What a task runs is ``node.node``, which LangGraph derives once from the bound
            # runnable and the writers. Replacing only that leaves ``bound`` as it is, and with it
            # all that LangGraph finds out by looking at it: subgraphs, tools, timeouts, drawings.
            derived = cast(RunnableSeq, node.node)
            cached = CachedNode(node.bound, spec)
            node.__dict__["node"] = CachedSeq(derived, cached, node.flat_writers)
            graph._perf.specs[name] = spec

    @staticmethod
    def _code_of(bound: Any, policy: CachePolicy, spec: NodeSpec) -> str | None:
        if policy.version is not None:
            return f"version:{policy.version!r}"
        # imported here: it knows language models and tools, which are heavy to import
        from langgraph_perf.fingerprint import Classes, fingerprint

        def later() -> None:
            # not for every node: what runs until the first call may change what the code reads
            spec.identify = functools.partial(StateGraph._code_of, bound, policy, spec)

        try:
            code = fingerprint(bound, later)
            spec.code_of = Classes(bound)
            # a key function is code too: what it leaves out decides what is the same
            return f"{code} {fingerprint(policy.key, later)}" if callable(policy.key) else code
        except Unkeyable as exc:
            spec.warn(f"runs uncached: {exc}; CachePolicy(version=...) can stand for its code")
            return None

    def _check_uses(self, name: str, uses: Mapping[str, Use]) -> None:
        known = list(self.schemas[self.nodes[name].input_schema])
        for use in uses.values():
            if isinstance(use.key, str) and use.key not in known and "__root__" not in known:
                raise ConfigurationError(
                    f"node {name!r}, Use({use.name!r}, key={use.key!r}): its input has no such "
                    f"field; accepted: {', '.join(sorted(known))}, or a function of the input"
                )

    def _check_policy(self, name: str, policy: CachePolicy) -> None:
        self._check_context(name, policy)
        known = list(self.schemas[self.nodes[name].input_schema])
        if "__root__" in known:
            return
        for where, unknown in policy.unknown_fields(known):
            hint = "A node that Send gives other fields to declares them with input_schema="
            if unknown.startswith(("context.", "configurable.")):
                hint = f"What of the run is in the key is named by vary=[{unknown!r}]"
            raise ConfigurationError(
                f"node {name!r}, CachePolicy.{where}: its input has no field {unknown!r}; "
                f"accepted: {', '.join(sorted(known))}. {hint}"
            )

    def _check_context(self, name: str, policy: CachePolicy) -> None:
        known = _field_names(self.context_schema)
        for where, part in policy.outside:
            root, _, rest = part.partition(".")
            field = rest.partition(".")[0]
            if root == "context" and field and known and field not in known:
                raise ConfigurationError(
                    f"node {name!r}, CachePolicy.{where}: the graph's context_schema has no field "
                    f"{field!r}; accepted: {', '.join(sorted(known))}"
                )

    def _types(self) -> Allowlist:
        schemas: list[Any] = [*self.schemas, self.context_schema]
        found: set[type] = set()
        for schema in schemas:
            if schema is not None:
                found |= types_in(schema)
        return Allowlist.of(*found)


_POLICY_FIELDS = frozenset(field.name for field in fields(CachePolicy))
_ALSO_TAKEN = {"add_node": ("input", "retry")}
"""Deprecated names of arguments, which LangGraph still takes without naming them."""
_ALSO_CALLED = dict.fromkeys(("cache", "policy"), "cache_policy")


def _refuse_unknown(method: str, kwargs: Mapping[str, Any], node: Any = None) -> None:
    """LangGraph's ``add_node`` takes any keyword argument, and leaves what it does not know unread;
    what its other methods raise names nothing that they accept."""
    if not kwargs:
        return
    theirs = _keywords(LangGraphStateGraph, method)
    known = _keywords(StateGraph, method) | theirs
    for name in kwargs:
        if name in theirs or name in _ALSO_TAKEN.get(method, ()):
            continue
        if name in _POLICY_FIELDS and "cache_policy" in known:
            hint = f"it belongs in cache_policy=CachePolicy({name}=...)"
        else:
            hint = _validate.arguments_hint(name, sorted(known), _ALSO_CALLED)
        given = "" if node is None else f"{node if isinstance(node, str) else '...'!r}, "
        raise ConfigurationError(f"{method}({given}{name}=): there is no such argument; {hint}")


def _keywords(cls: type, method: str) -> set[str]:
    """What ``method`` of ``cls`` can be given by name."""
    parameters = inspect.signature(getattr(cls, method)).parameters.values()
    return {each.name for each in parameters if each.kind is not each.VAR_KEYWORD} - {"self"}


def _remembers(graphs: Sequence[Any]) -> bool:
    """Whether what these graphs return depends on earlier runs in the same thread."""
    # other graphs than these are on other machines, and asking them takes a request
    return any(
        graph.checkpointer is True or _remembers([inner for _, inner in graph.get_subgraphs()])
        for graph in graphs
        if isinstance(graph, Pregel)
    )


def _nodes_in(graphs: Sequence[Any]) -> Iterator[str]:
    """The names of all nodes of these graphs and the graphs inside them."""
    for graph in graphs:
        if isinstance(graph, Pregel):
            yield from graph.nodes
            yield from _nodes_in([inner for _, inner in graph.get_subgraphs()])


def _field_names(schema: Any) -> set[str]:
    """The fields a context schema declares; empty where that cannot be told."""
    names: set[str] = set()
    for base in getattr(schema, "__mro__", ()):
        names.update(inspect.get_annotations(base))
    return names


def _checked(policy: Any, where: str) -> Any:
    # LangGraph hands it on as it is; its own class only says what else it takes
    return None if policy is None else CachePolicy.of(policy, where)


_setting = new_lock()


class CompiledGraph(
    CompiledStateGraph[StateT, ContextT, InputT, OutputT],
    Generic[StateT, ContextT, InputT, OutputT],
):
    """LangGraph's compiled graph with ``.perf``."""

    _perf: Perf
    cache: Any

    @property
    def perf(self) -> Perf:
        """What the cache does for this graph."""
        return self._perf

    @property
    def checkpointer(self) -> Any:
        """What keeps the graph's state; it tells the cache what becomes of its threads."""
        while True:
            given = self.__dict__.get("checkpointer")
            perf = self.__dict__.get("_perf")
            if perf is None:
                return given  # being made
            # here, since a server gives a graph its own in many ways
            made = perf.bound(given)
            if made is given:
                return made
            with _setting:
                # unless another thread has set another one meanwhile
                if self.__dict__.get("checkpointer") is given:
                    self.__dict__["checkpointer"] = made
                    return made

    @checkpointer.setter
    def checkpointer(self, checkpointer: Checkpointer) -> None:
        with _setting:
            self.__dict__["checkpointer"] = checkpointer
        if "_perf" in self.__dict__:
            self._perf.unbind()

    def copy(self, update: dict[str, Any] | None = None) -> Self:
        """Like LangGraph's ``copy``; the copy shares ``.perf``."""
        copied = super().copy(update)
        copied._perf = self._perf
        return copied

    def stream(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """Like LangGraph's ``stream``.

        Raises:
            ConfigurationError: ``configurable["cache_control"]`` is not valid.
        """
        config, run = self._bound(config, blocking=True)
        events = super().stream(input, config, **kwargs)
        return events if run is None else _ended(events, run)

    def astream(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """Like LangGraph's ``astream``.

        Raises:
            ConfigurationError: ``configurable["cache_control"]`` is not valid.
        """
        config, run = self._bound(config, blocking=False)
        events = super().astream(input, config, **kwargs)
        return events if run is None else _aended(events, run)

    def _bound(
        self, config: RunnableConfig | None, *, blocking: bool
    ) -> tuple[RunnableConfig | None, Binding | None]:
        """``config`` with what the nodes need to find the cache; and the run, if results may be
        stored that go when it ends."""
        around = ambient()
        own, given = configurable_of(self.config), configurable_of(config)
        parent: Binding | None = given.get(BINDING) or around.get(BINDING)
        perf = self._perf
        if perf.backend is None and parent is None and not perf.specs and perf.registry is None:
            return config, None
        merged = {**around, **own, **given}
        if not merged and self.checkpointer:
            # LangGraph's error for a forgotten thread_id looks for an empty configurable
            return config, None
        lent = merged.get(CONFIG_KEY_CHECKPOINTER)
        if lent is not None and self.checkpointer is True:
            taint(part_of(merged), "remembers")  # LangGraph may not have found it inside the node
        overridden = any(inner.overridden for inner in perf.family)
        if overridden or (parent is not None and parent.overridden):
            taint(
                part_of(merged), "overridden"
            )  # and so is what a graph around this one makes of it
        binding = make_binding(
            perf.backend,
            perf.items,
            perf.refreshes,
            perf.registry,
            parent,
            merged,
            blocking=blocking,
            overridden=overridden,
            saver=_hiding(self.checkpointer, lent),
            seen=perf.seen,
            types=perf.types,
        )
        if parent is None and binding.control.nodes:
            perf.check_control(binding.control)
        # in the first releases of LangGraph 1.2 what is given here hides what would be inherited
        inherited = {**(given or own or around), BINDING: binding}
        if lent is not None and CONFIG_KEY_CHECKPOINTER in inherited:
            inherited[CONFIG_KEY_CHECKPOINTER] = perf.bound(lent)
        ends = parent is None and perf.may_store("run", binding.control)
        return {**(config or {}), "configurable": inherited}, binding if ends else None

    def clear_cache(self, nodes: Sequence[str] | None = None) -> None:
        """Clear the stored results of ``nodes``, by default of all; an empty list clears none.
        With a node goes what is inside it; nodes of subgraphs have their names in ``stats``.

        Raises:
            ValueError: the graph was compiled without a cache.
        """
        self._perf.required_cache().clear(self._perf.namespaces(nodes))

    async def aclear_cache(self, nodes: Sequence[str] | None = None) -> None:
        """Like ``clear_cache``, without blocking the event loop."""
        await self._perf.required_cache().aclear(self._perf.namespaces(nodes))


def _hiding(own: Any, lent: Any) -> Any:
    """The checkpointer of the two whose serde hides what it is given, if one does; else the one
    that a parent lends. Which of them a run inside a node writes to depends on its config."""
    for saver in (own, lent):
        serde = getattr(saver, "serde", None)
        if serde is not None and type(serde) is not JsonPlusSerializer:
            return saver
    return lent or own


def _ended(events: Any, run: Binding) -> Iterator[Any]:
    """``events``, after which what belonged to ``run`` is removed."""
    try:
        yield from events
    finally:
        for backend, namespace in run.owned():
            backend.forget(namespace)


async def _aended(events: Any, run: Binding) -> AsyncIterator[Any]:
    try:
        async with aclosing(events):
            async for event in events:
                yield event
    finally:
        for backend, namespace in run.owned():
            await backend.aforget(namespace)


# Drawings and traces name a graph's class; what knows LangGraph's knows this one as well.
CompiledGraph.__module__ = CompiledStateGraph.__module__
CompiledGraph.__name__ = CompiledGraph.__qualname__ = CompiledStateGraph.__name__
