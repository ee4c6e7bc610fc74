"""``StateGraph`` and its compiled graph: LangGraph's own, plus the cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, Generic, cast

from langchain_core.runnables import RunnableConfig
from langgraph._internal._runnable import RunnableSeq
from langgraph.cache.base import BaseCache
from langgraph.graph import StateGraph as LangGraphStateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.store.base import BaseStore
from langgraph.types import All, Checkpointer, RetryPolicy, TimeoutPolicy
from langgraph.types import CachePolicy as LangGraphCachePolicy
from langgraph.typing import ContextT, InputT, OutputT, StateT
from typing_extensions import Self

from langgraph_perf._backend import Backend
from langgraph_perf._binding import BINDING, CONTROL, Binding, ambient, make_binding
from langgraph_perf._identity import NAMESPACE, NodeSpec
from langgraph_perf.caches.base import Cache
from langgraph_perf.caches.foreign import ForeignCache
from langgraph_perf.codec import Allowlist, types_in
from langgraph_perf.errors import ConfigurationError
from langgraph_perf.fingerprint import fingerprint
from langgraph_perf.keys import Unkeyable
from langgraph_perf.node import CachedNode, CachedSeq
from langgraph_perf.policy import CacheControl, CachePolicy
from langgraph_perf.stats import ItemCounters, NodeStats, Stats


class StateGraph(LangGraphStateGraph[StateT, ContextT, InputT, OutputT]):
    """LangGraph's ``StateGraph`` whose ``cache_policy=`` keeps this library's guarantees.

    Same signature and behaviour as LangGraph's. ``cache_policy=`` takes ``CachePolicy`` of this
    library or of LangGraph, whose ``key_func`` and ``ttl`` are kept. A graph without policies runs
    exactly as LangGraph's own does.
    """

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
        **kwargs: Any,
    ) -> Self:
        """Like LangGraph's ``add_node``; the policy is checked here, against the node's input.

        Raises:
            ConfigurationError: ``cache_policy`` is not a policy, or names a field that the node's
                input does not have.
        """
        before = set(self.nodes)
        given: dict[str, Any] = {
            "defer": defer,
            "metadata": metadata,
            "input_schema": input_schema,
            "retry_policy": retry_policy,
            "cache_policy": _checked(cache_policy),
            "error_handler": error_handler,
            "destinations": destinations,
            "timeout": timeout,
            **kwargs,
        }
        super().add_node(node, cast(Any, action), **given)
        for name in set(self.nodes) - before:
            if self.nodes[name].cache_policy is not None:
                self._check_policy(name, cast(Any, self.nodes[name].cache_policy))
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
            ConfigurationError: ``cache_policy`` is not a policy.
        """
        super().set_node_defaults(
            retry_policy=retry_policy,
            cache_policy=_checked(cache_policy),
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
        **kwargs: Any,
    ) -> CompiledGraph[StateT, ContextT, InputT, OutputT]:
        """Like LangGraph's ``compile``; ``cache`` is any LangGraph ``BaseCache``, ours or not.

        Without ``cache`` the nodes' policies use the cache of the parent graph, if there is one.

        Raises:
            ConfigurationError: ``cache`` is no cache, or lacks what a policy asks of it.
        """
        if cache is not None and not isinstance(cache, BaseCache):
            raise ConfigurationError(
                f"compile(cache=): got {cache!r}; accepted: MemoryCache(...), "
                "DiskCache(directory), TieredCache(...), any other LangGraph BaseCache, or None"
            )
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
        graph._perf = Perf(graph, cache)
        self._wrap_nodes(graph)
        graph._perf.check_tags()
        return graph

    def _wrap_nodes(self, graph: CompiledGraph[Any, Any, Any, Any]) -> None:
        allowed: Allowlist | None = None
        for name, node in graph.nodes.items():
            if node.cache_policy is None:
                continue
            policy = CachePolicy.of(node.cache_policy)
            self._check_policy(name, policy)
            if allowed is None:
                allowed = self._types()
            spec = NodeSpec(
                graph.name, name, policy, None, allowed, has_subgraph=bool(node.subgraphs)
            )
            if policy.version is not None:
                spec.code = f"version:{policy.version!r}"
            else:
                try:
                    spec.code = fingerprint(node.bound)
                except Unkeyable as exc:
                    spec.warn(
                        f"runs uncached: {exc}; CachePolicy(version=...) can stand for its code"
                    )
            node.cache_policy = None  # LangGraph must not cache it once more
            # What a task runs is ``node.node``, which LangGraph derives once from the bound
            # runnable and the writers. Replacing only that leaves ``bound`` as it is, and with it
            # all that LangGraph finds out by looking at it: subgraphs, tools, timeouts, drawings.
            derived = cast(RunnableSeq, node.node)
            cached = CachedNode(node.bound, spec)
            node.__dict__["node"] = CachedSeq(derived, cached, node.flat_writers)
            graph._perf.specs[name] = spec

    def _check_policy(self, name: str, policy: CachePolicy) -> None:
        known = list(self.schemas[self.nodes[name].input_schema])
        if "__root__" in known:
            return
        for where, unknown in policy.unknown_fields(known):
            raise ConfigurationError(
                f"node {name!r}, CachePolicy.{where}: its input has no field {unknown!r}; "
                f"accepted: {', '.join(sorted(known))}. A node that Send gives other fields to "
                "declares them with input_schema="
            )

    def _types(self) -> Allowlist:
        schemas: list[Any] = [*self.schemas, self.context_schema]
        found: set[type] = set()
        for schema in schemas:
            if schema is not None:
                found |= types_in(schema)
        return Allowlist.of(*found)


def _checked(policy: Any) -> Any:
    # LangGraph hands it on as it is; its own class only says what else it takes
    return None if policy is None else CachePolicy.of(policy)


class CompiledGraph(
    CompiledStateGraph[StateT, ContextT, InputT, OutputT],
    Generic[StateT, ContextT, InputT, OutputT],
):
    """LangGraph's compiled graph with ``.perf``."""

    _perf: Perf

    @property
    def perf(self) -> Perf:
        """What the cache does for this graph."""
        return self._perf

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
        return super().stream(input, self._bound(config, blocking=True), **kwargs)

    def astream(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """Like LangGraph's ``astream``.

        Raises:
            ConfigurationError: ``configurable["cache_control"]`` is not valid.
        """
        return super().astream(input, self._bound(config, blocking=False), **kwargs)

    def _bound(self, config: RunnableConfig | None, *, blocking: bool) -> RunnableConfig | None:
        """``config`` with what the nodes need to find the cache."""
        around = ambient()
        own = (self.config or {}).get("configurable") or {}
        given = (config or {}).get("configurable") or {}
        parent: Binding | None = given.get(BINDING) or around.get(BINDING)
        if self._perf.backend is None and parent is None and not self._perf.specs:
            return config
        merged = {**around, **own, **given}
        if not merged and self.checkpointer:
            # LangGraph's error for a forgotten thread_id looks for an empty configurable
            return config
        binding = make_binding(
            self._perf.backend, self._perf.items, parent, merged, blocking=blocking
        )
        if parent is None and binding.control.nodes:
            self._perf.check_control(binding.control)
        return {**(config or {}), "configurable": {**given, BINDING: binding}}

    def clear_cache(self, nodes: Sequence[str] | None = None) -> None:
        """Clear the stored results of ``nodes``, by default of all; an empty list clears none.

        Raises:
            ValueError: the graph was compiled without a cache.
        """
        self._perf.required_cache().clear(self._perf.namespaces(nodes))

    async def aclear_cache(self, nodes: Sequence[str] | None = None) -> None:
        """Like ``clear_cache``, without blocking the event loop."""
        await self._perf.required_cache().aclear(self._perf.namespaces(nodes))


# Drawings and traces name a graph's class; what knows LangGraph's knows this one as well.
CompiledGraph.__module__ = CompiledStateGraph.__module__
CompiledGraph.__name__ = CompiledGraph.__qualname__ = CompiledStateGraph.__name__


class Perf:
    """``graph.perf``: what the cache does for one compiled graph."""

    def __init__(
        self, graph: CompiledGraph[Any, Any, Any, Any], cache: BaseCache[Any] | None
    ) -> None:
        self._graph = graph
        self.specs: dict[str, NodeSpec] = {}
        self.items = ItemCounters()
        self.backend: Backend | None = None
        if cache is not None:
            own = cache if isinstance(cache, Cache) else ForeignCache.of(cache)
            self.backend = Backend.of(own)

    def stats(self) -> Stats:
        """A snapshot of what the cache did for each node since the graph was compiled."""
        nodes: dict[str, NodeStats] = {}
        for prefix, graph in self._graphs():
            for name, spec in graph.perf.specs.items():
                nodes[f"{prefix}{name}"] = spec.counters.snapshot()
        backend = self.backend
        return Stats(
            nodes=nodes,
            items=self.items.snapshot(),
            failures=backend.failures if backend else {},
            cache=backend.cache.stats() if backend else None,
        )

    def _graphs(self) -> Iterator[tuple[str, CompiledGraph[Any, Any, Any, Any]]]:
        yield "", self._graph
        for path, graph in self._graph.get_subgraphs(recurse=True):
            if isinstance(graph, CompiledGraph):
                yield f"{path}|", graph

    def check_tags(self) -> None:
        """Refuse policies with tags over a cache that cannot invalidate."""
        if self.backend is None or self.backend.cache.supports_tags:
            return
        for prefix, graph in self._graphs():
            if prefix and graph.perf.backend is not None:
                continue  # it has a cache of its own
            for name, spec in graph.perf.specs.items():
                if spec.policy.tags:
                    raise ConfigurationError(
                        f"node {prefix + name!r}, CachePolicy.tags: "
                        f"{type(self._graph.cache).__name__} cannot invalidate by tag; accepted: "
                        "no tags, or compile(cache=) with MemoryCache, DiskCache or TieredCache"
                    )

    def check_control(self, control: CacheControl) -> None:
        """Refuse a ``cache_control`` for nodes that do not exist."""
        known = {name for _, graph in self._graphs() for name in graph.nodes}
        for name in control.nodes:
            if name not in known:
                raise ConfigurationError(
                    f"{CONTROL}.nodes: unknown node {name!r}; accepted: "
                    f"{', '.join(sorted(known - {'__start__'}))}"
                )

    def required_cache(self) -> Cache:
        """The graph's own cache."""
        if self.backend is None:
            raise ValueError("No cache is set for this graph. Cannot clear cache.")
        return self.backend.cache

    def namespaces(self, nodes: Sequence[str] | None) -> list[tuple[str, ...]]:
        """Where the results of ``nodes`` are kept."""
        names = self._graph.nodes if nodes is None else nodes
        return [(NAMESPACE, self._graph.name, name) for name in names]
