"""``graph.perf``: what the cache and the resources do for one compiled graph."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, MutableSet, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from langgraph.cache.base import BaseCache
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.constants import START
from langgraph.pregel import Pregel

from langgraph_perf._backend import Backend
from langgraph_perf._binding import CONTROL
from langgraph_perf._identity import NodeSpec
from langgraph_perf._lives import Lives
from langgraph_perf._locks import new_lock
from langgraph_perf._refresh import Refreshes
from langgraph_perf.caches.base import Cache, namespace_tag
from langgraph_perf.codec import Allowlist
from langgraph_perf.errors import ConfigurationError
from langgraph_perf.policy import CacheControl, CachePolicy, Scope
from langgraph_perf.stats import ItemCounters, NodeStats, Stats

if TYPE_CHECKING:
    from langgraph_perf.graph import CompiledGraph
    from langgraph_perf.resources import Registry, Resource


class Perf:
    """``graph.perf``: what the cache does for one compiled graph."""

    def __init__(
        self,
        graph: CompiledGraph[Any, Any, Any, Any],
        cache: BaseCache[Any] | None,
        registry: Registry | None,
    ) -> None:
        self._graph = graph
        self._overriding = new_lock()
        self.registry = registry
        self.family: list[Perf] = [self]
        self._compiled_with = registry
        self._overrides: list[dict[str, Resource[Any]]] = []
        self.specs: dict[str, NodeSpec] = {}
        self.types: Callable[[], Allowlist] = Allowlist
        self.items = ItemCounters()
        self.refreshes = Refreshes()
        self.seen: MutableSet[Backend] = weakref.WeakSet()
        self.lives = Lives(
            self._backends, lambda run: self.may_store("thread", run.control), self._thread_tags
        )
        # the checkpointer that was asked for last, and what it stands for
        self._bound: tuple[Any, Any, type] = (None, None, type(None))
        self.backend: Backend | None = None
        if cache is not None:
            if not isinstance(cache, Cache):
                from langgraph_perf.caches.foreign import ForeignCache

                cache = ForeignCache.of(cache)
            self.backend = Backend.of(cache)

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
            resources=self.registry.stats() if self.registry else {},
        )

    @contextmanager
    def override(self, **resources: Any) -> Iterator[None]:
        """Replace resources, in tests: runs that start inside the ``with`` block use these.

        They use no cache: a stored result would stand in for the replacement, and what the
        replacement makes would be stored for those who come after the test.

        Args:
            resources: by name, resources or any other objects, which are then leased as they are
                (in the place of a ``Keyed``, for every key).

        Raises:
            ConfigurationError: the graph has no resource of that name.
        """
        from langgraph_perf.resources import Keyed, Registry, Resource, Shared

        with self._overriding:
            known = self.registry if self.registry is not None else Registry()
            made: dict[str, Resource[Any]] = {}
            for name, value in resources.items():
                replaced = known.find(name)
                if isinstance(value, Resource):
                    made[name] = value
                elif isinstance(replaced, Keyed):
                    made[name] = Keyed(partial(_same, value))
                else:
                    made[name] = Shared(partial(_same, value))
            self._overrides.append(made)
            self._override(Registry)
        try:
            yield
        finally:
            with self._overriding:
                # not the last one, if the blocks of several threads overlap
                self._overrides = [other for other in self._overrides if other is not made]
                self._override(Registry)

    def _override(self, registry: type[Registry]) -> None:
        registered: dict[str, Any] = dict(self._compiled_with or {})
        for made in self._overrides:
            registered.update(made)
        self.registry = registry(registered) if self._overrides else self._compiled_with

    @property
    def overridden(self) -> bool:
        """Whether resources are replaced now."""
        return bool(self._overrides)

    def forget_thread(self, thread_id: str) -> None:
        """Remove every stored result that belongs to a thread (``scope="thread"``), on every tier
        and for all processes that share the cache; also what its runs are still computing.

        ``graph.checkpointer.delete_thread`` does this too.

        Raises:
            ConfigurationError: ``thread_id`` names no thread.
            Exception: what a cache raised that could not do it; all others did. Call it again.
        """
        self.lives.forget([_thread(thread_id)])

    async def aforget_thread(self, thread_id: str) -> None:
        """Like ``forget_thread``, without blocking the event loop."""
        await self.lives.aforget([_thread(thread_id)])

    def bound(self, checkpointer: Any) -> Any:
        """``checkpointer`` as the graph is to use it: one that tells the caches of its threads."""
        # LangGraph asks several times a run: what is true of nearly all runs is looked at first
        latest, saver, kind = self._bound
        if checkpointer is latest and type(saver) is kind:
            return checkpointer
        if not isinstance(checkpointer, BaseCheckpointSaver):
            return checkpointer
        from langgraph_perf._bound_saver import bound, bound_to

        saver = bound_to(checkpointer, self.lives)
        if saver is not None:
            self._bound = (checkpointer, saver, type(saver))
        elif self._backends():
            return bound(checkpointer, self.lives)
        return checkpointer

    def unbind(self) -> None:
        """The graph has another checkpointer."""
        self._bound = (None, None, type(None))

    def _backends(self) -> list[Backend]:
        # those of graphs that LangGraph does not find inside nodes are known once they have run
        family = [perf.backend for perf in self.family if perf.backend is not None]
        return list(dict.fromkeys([*family, *self.seen]))

    def _thread_tags(self) -> list[str]:
        return [
            namespace_tag(spec.namespace)
            for perf in self.family
            for spec in perf.specs.values()
            if spec.policy is not None and spec.policy.scope == "thread"
        ]

    def may_store(self, scope: Scope, control: CacheControl) -> bool:
        """Whether a run with this ``control`` may store results of this scope."""
        # a graph may be hidden in a node: it counts if any in this process has the scope
        return scope in _declared or any(
            asked.scope == scope for asked in (control, *control.nodes.values())
        )

    def declare(self, policy: CachePolicy) -> None:
        """Note that there is a node with this policy."""
        _declared.add(policy.scope)

    def close(self) -> None:
        """End what runs in the background, and close the graph's resources: what is idle now, what
        is leased when it comes back.

        The cache, which other graphs may share, is its maker's to close.
        """
        self.refreshes.stop()
        try:
            # first: who waits for a resource in the background is told
            if self.registry is not None:
                self.registry.close()
        finally:
            self.refreshes.close()

    async def aclose(self) -> None:
        """Like ``close``, without blocking the event loop."""
        # before anything that may be cancelled or fail
        self.refreshes.stop()
        try:
            if self.registry is not None:
                await self.registry.aclose()
        finally:
            await self.refreshes.aclose()

    def _graphs(self) -> Iterator[tuple[str, CompiledGraph[Any, Any, Any, Any]]]:
        return _graphs(self._graph, lambda inner: True)

    def check_tags(self) -> None:
        """Refuse policies with tags, or of threads, over a cache that cannot invalidate."""
        if self.backend is None or self.backend.cache.supports_tags:
            return
        for prefix, graph in _graphs(self._graph, lambda inner: inner.backend is None):
            for name, spec in graph.perf.specs.items():
                field = _needs_tags(spec.policy)
                if field is not None:
                    raise ConfigurationError(
                        f"node {prefix + name!r}, CachePolicy.{field}: "
                        f"{type(self._graph.cache).__name__} cannot invalidate by tag or thread; "
                        "accepted: no tags and another scope, or compile(cache=) with MemoryCache, "
                        "DiskCache, RedisCache or TieredCache"
                    )

    def check_resources(self) -> None:
        """Refuse nodes that ask for what the graph's resources cannot give."""
        if self.registry is None:
            return  # a parent graph may have them
        for prefix, graph in _graphs(self._graph, lambda inner: inner.registry is None):
            for name, spec in graph.perf.specs.items():
                try:
                    for use in spec.uses.values():
                        self.registry.check(use, sync=not spec.native_async)
                    self.registry.check_numbers([use.name for use in spec.uses.values()])
                except ConfigurationError as exc:
                    raise ConfigurationError(f"node {prefix + name!r}: {exc}") from None

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
        """Where the results of ``nodes`` are kept, with those inside, in this graph's own cache.

        Args:
            nodes: names, those of a subgraph's nodes as in ``stats``; ``None`` for all.

        Raises:
            ConfigurationError: ``nodes`` is one string, or names a node that does not exist.
        """
        if isinstance(nodes, str):
            raise ConfigurationError(
                f"clear_cache(nodes): got {nodes!r}; accepted: a list of node names; did you mean "
                f"[{nodes!r}]?"
            )
        known = {
            prefix + name: graph.perf.specs.get(name)
            for prefix, graph in _graphs(self._graph, lambda inner: inner.backend is None)
            for name in graph.nodes
            if name != START
        }
        for name in nodes or ():
            if name not in known:
                raise ConfigurationError(
                    f"clear_cache(nodes): unknown node {name!r}; accepted: "
                    f"{', '.join(sorted(known))}"
                )
        names = (
            known
            if nodes is None
            else [path for path in known if any(f"{path}|".startswith(f"{n}|") for n in nodes)]
        )
        return [spec.namespace for spec in map(known.get, names) if spec is not None]


def _graphs(
    graph: CompiledGraph[Any, Any, Any, Any], enter: Callable[[Perf], bool]
) -> Iterator[tuple[str, CompiledGraph[Any, Any, Any, Any]]]:
    """``graph`` and those of ours below it, each with the path of its nodes; none of those, and
    nothing below them, that ``enter`` refuses."""
    ours = type(graph)
    level: list[tuple[str, Pregel[Any, Any, Any, Any]]] = [("", graph)]
    for path, each in level:
        if isinstance(each, ours):
            if each is not graph and not enter(each.perf):
                continue
            yield path, each
        found: dict[str, Any] = dict(each.get_subgraphs())
        for name, node in each.nodes.items():
            # LangGraph leaves out those that were compiled with checkpointer=False
            if isinstance(node.bound, Pregel):
                found.setdefault(name, node.bound)
        level += [(f"{path}{n}|", inner) for n, inner in found.items() if isinstance(inner, Pregel)]


_declared: set[Scope] = set()
"""The scopes of all nodes of all graphs that were compiled in this process."""


def _needs_tags(policy: CachePolicy | None) -> str | None:
    if policy is not None and policy.tags:
        return "tags"
    return "scope" if policy is not None and policy.scope == "thread" else None


def _thread(given: object) -> str:
    if given is None or isinstance(given, (Mapping, list, tuple, set)):
        raise ConfigurationError(
            f"forget_thread(thread_id): got {given!r}; accepted: what runs pass as "
            "configurable={'thread_id': ...}"
        )
    return str(given)


def _same(value: Any, *key: Any) -> Any:
    return value
