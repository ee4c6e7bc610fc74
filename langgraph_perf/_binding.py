"""What a run carries to its nodes: the cache, what the caller asks of it, and the run's identity.

It travels in the run's ``configurable`` under a key that LangGraph strips from debug events,
snapshots, checkpoints and traces as it does its own, so that subgraphs inherit it and nothing that
cannot be serialised leaks. (A test per way out fails when LangGraph changes that.)
"""

from __future__ import annotations

import asyncio
import re
import secrets
import weakref
from collections.abc import Callable, Mapping, MutableSet
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from langchain_core.runnables.config import CONFIG_KEYS, var_child_runnable_config
from langgraph.cache.base import Namespace

from langgraph_perf._backend import Backend, owner_tag
from langgraph_perf._locks import new_lock
from langgraph_perf._owner import DEAD, Pins, run_namespace
from langgraph_perf._patience import Patience
from langgraph_perf._refresh import Refreshes
from langgraph_perf.codec import Allowlist
from langgraph_perf.errors import ConfigurationError
from langgraph_perf.policy import CacheControl
from langgraph_perf.stats import ItemCounters

if TYPE_CHECKING:
    from langchain_core.runnables import RunnableConfig

    from langgraph_perf.resources import Registry

BINDING = "__pregel_langgraph_perf"
SCOPE = "__pregel_langgraph_perf_scope"
"""Where a running body's config says with whom its node's result is shared, if not everybody."""
CONTROL = "cache_control"

# LangGraph's own, and what a LangGraph server injects for each request. A name that is missing here
# costs hits, one too many would serve wrong answers: list, do not guess.
_NOT_THE_USERS = frozenset(
    {
        CONTROL,
        "assistant_id",
        "checkpoint_id",
        "checkpoint_map",
        "checkpoint_ns",
        "cron_id",
        "graph_id",
        "langgraph_api_url",
        "langgraph_auth_user",  # an object; its identity is taken below
        "langgraph_host",
        "langgraph_plan",
        "langgraph_request_id",
        "langgraph_version",
        "run_attempt",
        "run_id",
        "thread_id",
        "thread_ts",
        "traceparent",
        "tracestate",
        "user-agent",
        "x-request-id",
    }
)


_DUNDER = re.compile(r"__\w+__").fullmatch
"""As a server has its times: ``__request_start_time_ms__``."""


class Binding:
    """One run's view of the cache; made when the run starts.

    Attributes:
        backend: where results are kept; ``None`` where nothing may be.
        items: counters for ``get_cache``, of the outermost graph.
        refreshes: what runs in the background, of the outermost graph.
        resources: what nodes can lease; ``None`` where there is nothing.
        control: what the caller asks of the cache.
        continued: whether tasks inside its nodes were done in an earlier run.
        configurable: the user's own part of ``configurable``.
        run_id: names the outermost run; random.
        blocked_loop: the event loop whose thread made a blocking call and waits for this run.
        overridden: whether resources were replaced for a test, so that nothing may be stored.
        saver: the checkpointer; its serde may not be known before it was used.
        forked: whether the run starts from a checkpoint that its caller named.
        pins: the tokens that the run goes by for what its thread and itself own.
        patience: what the outermost run has lost to slow caches.
        seen: the caches of graphs inside, which the outermost graph is to know.
        types: the types that the graph's schemas name, and items may be made of.
    """

    __slots__ = (
        "__weakref__",
        "backend",
        "blocked_loop",
        "configurable",
        "continued",
        "control",
        "forked",
        "items",
        "overridden",
        "patience",
        "pins",
        "raw_control",
        "refreshes",
        "resources",
        "run_id",
        "saver",
        "seen",
        "types",
    )

    def __init__(
        self,
        backend: Backend | None,
        items: ItemCounters,
        refreshes: Refreshes,
        resources: Registry | None,
        control: CacheControl,
        raw_control: Any,
        configurable: Mapping[str, Any],
        run_id: str,
        blocked_loop: asyncio.AbstractEventLoop | None,
        overridden: bool,
        saver: Any,
        forked: bool,
        pins: Pins,
        patience: Patience,
        seen: MutableSet[Backend],
        types: Callable[[], Allowlist],
    ) -> None:
        self.backend = backend
        self.continued = False
        self.items = items
        self.refreshes = refreshes
        self.resources = resources
        self.control = control
        self.raw_control = raw_control
        self.configurable = configurable
        self.run_id = run_id
        self.blocked_loop = blocked_loop
        self.overridden = overridden
        self.saver = saver
        self.forked = forked
        self.pins = pins
        self.patience = patience
        self.seen = seen
        self.types = types

    @property
    def serde(self) -> Any:
        """The checkpointer's."""
        return getattr(self.saver, "serde", None)

    def owned(self) -> list[tuple[Backend, Namespace]]:
        """Where results may be that belong to the outermost run alone."""
        namespace = run_namespace(self.run_id)
        tag = owner_tag(namespace)
        return [(backend, namespace) for backend, pinned in list(self.pins) if pinned == tag]

    def __repr__(self) -> str:
        return "<langgraph_perf run>"

    def __deepcopy__(self, memo: dict[int, Any]) -> Binding:
        return self


_alive: weakref.WeakSet[Binding] = weakref.WeakSet()
_registering = new_lock()


def owner_forgotten(backend: Backend, tag: str) -> None:
    """Every run of this process that has not yet taken the token of ``tag`` may store nothing for
    the tag's owner: it began before the owner was forgotten."""
    with _registering:
        runs = list(_alive)
    for run in runs:
        run.pins.setdefault((backend, tag), DEAD)


def ambient() -> Mapping[str, Any]:
    """The ``configurable`` of the node that the current code runs in, if it runs in one."""
    config = var_child_runnable_config.get()
    return (config or {}).get("configurable") or {}


def configurable_of(config: RunnableConfig | None) -> Mapping[str, Any]:
    """The ``configurable`` that nodes find, as far as ``config`` says: LangGraph puts there, too,
    what it does not know of the rest."""
    if config is None:
        return {}
    given: Mapping[str, Any] = config.get("configurable") or {}
    more = config.keys() - _CONFIG_KEYS
    if not more:
        return given
    put_there = {k: v for k, v in config.items() if k in more and not _empty(v)}
    return {**given, **put_there}


_CONFIG_KEYS = frozenset(CONFIG_KEYS)


def _empty(value: Any) -> bool:
    return value is None or (isinstance(value, list | tuple | dict) and not value)


def make_binding(
    backend: Backend | None,
    items: ItemCounters,
    refreshes: Refreshes,
    resources: Registry | None,
    parent: Binding | None,
    configurable: Mapping[str, Any],
    *,
    blocking: bool,
    overridden: bool,
    saver: Any,
    seen: MutableSet[Backend],
    types: Callable[[], Allowlist],
) -> Binding:
    """The binding of a run that starts now.

    Args:
        backend: the graph's own; a graph without one uses its parent's.
        items: the graph's own counters for ``get_cache``; within a parent, the parent's count.
        refreshes: the graph's own; within a parent, the parent's.
        resources: the graph's own; they come before those of its parent.
        parent: the binding of the run that this one is part of.
        configurable: what the run's nodes will see.
        blocking: whether the caller's thread waits for the run.
        overridden: whether resources of the graph are replaced for a test.
        saver: the graph's own checkpointer; within a parent, the parent's.
        seen: where the caches of graphs inside are noted; within a parent, the parent's.
        types: the types that the graph's own schemas name.

    Raises:
        ConfigurationError: ``configurable["cache_control"]`` is not valid.
    """
    raw = configurable.get(CONTROL)
    for name in configurable:
        misspelt = name.startswith("cach") and name != CONTROL
        if misspelt and get_close_matches(name, [CONTROL], 1, 0.9):
            raise ConfigurationError(f"configurable[{name!r}]: did you mean {CONTROL!r}?")
    blocked = asyncio._get_running_loop() if blocking else None
    forked = configurable.get("checkpoint_id") is not None
    pins: Pins = {}
    patience = Patience()
    if parent is None:
        control, run_id = CacheControl.of(raw), secrets.token_hex(16)
    else:
        control = parent.control if raw is parent.raw_control else CacheControl.of(raw)
        run_id, items, backend = parent.run_id, parent.items, backend or parent.backend
        refreshes, saver, seen = parent.refreshes, saver or parent.saver, parent.seen
        forked, pins, patience = forked or parent.forked, parent.pins, parent.patience
        if backend is not None:
            seen.add(backend)
        blocked = blocked or parent.blocked_loop
        if resources is None:
            resources = parent.resources
        elif parent.resources is not None:
            resources = type(resources)({**parent.resources, **resources})
    if overridden or (parent is not None and parent.overridden):
        # what a test's replacements make is nobody else's result, nor would a stored one use them
        overridden, control = True, CacheControl(mode="bypass")
    users = users_part(configurable)
    binding = Binding(
        backend,
        items,
        refreshes,
        resources,
        control,
        raw,
        users,
        run_id,
        blocked,
        overridden,
        saver,
        forked,
        pins,
        patience,
        seen,
        types,
    )
    if parent is None:
        with _registering:
            _alive.add(binding)
    return binding


def users_part(configurable: Mapping[str, Any]) -> dict[str, Any]:
    """What of ``configurable`` the user set and a node's result may depend on."""
    users = {
        name: value
        for name, value in configurable.items()
        if not (name.startswith("__pregel_") or _DUNDER(name) or name in _NOT_THE_USERS)
    }
    user = configurable.get("langgraph_auth_user")
    if user is not None and "langgraph_auth_user_id" not in users:
        identity = (
            user.get("identity") if isinstance(user, Mapping) else getattr(user, "identity", None)
        )
        # whoever it is, it is not nobody: without an identity the whole object has to be keyed
        users["langgraph_auth_user_id"] = user if identity is None else identity
    return users
