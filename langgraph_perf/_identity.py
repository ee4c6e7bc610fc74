"""What a node is, and what of one call makes its key and its tags."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from langgraph.types import RetryPolicy

from langgraph_perf import keys
from langgraph_perf._binding import Binding
from langgraph_perf._locks import new_lock
from langgraph_perf._owner import Owner, made_in, run_id_of, run_namespace, thread_namespace
from langgraph_perf.caches.base import tag_id
from langgraph_perf.codec import Allowlist
from langgraph_perf.errors import ConfigurationError
from langgraph_perf.policy import CachePolicy, Scope, template_parts
from langgraph_perf.stats import NodeCounters

if TYPE_CHECKING:
    from langgraph_perf.resources import Use

logger = logging.getLogger("langgraph_perf")

NAMESPACE = "langgraph_perf"
Tags = tuple[str, ...]
_MISSING = object()


class Uncached(Exception):
    """This call cannot take part in caching; the node just runs. ``reason`` is what is counted."""

    def __init__(self, reason: str, message: str | None = None) -> None:
        super().__init__(message or reason)
        self.reason = reason
        self.message = message


class NodeSpec:
    """What is known of a cached node before it runs.

    Args:
        graph: the compiled graph's name.
        name: the node's name.
        policy: its policy; ``None``: it is never cached.
        uses: what it leases, by parameter.
        allowed: the types its results may be made of.

    Attributes:
        identify: takes the fingerprint again, at the first call: the code may read names that
            nothing had when the graph was compiled. ``None``: there is no need.
        code_of: the same for the classes of its input; ``None``: they count by name.
        has_subgraph: whether the node contains a graph that may be resumed inside it.
        inside: the names of the nodes of such graphs.
        remembers: whether it contains one that remembers its earlier runs, so that its result
            depends on more than its input.
        native_async: whether its body runs on the event loop, when there is one.
        retry: when LangGraph runs it again.
    """

    def __init__(
        self,
        graph: str,
        name: str,
        policy: CachePolicy | None,
        uses: Mapping[str, Use],
        allowed: Allowlist,
    ) -> None:
        self.name = name
        self.policy = policy
        self.uses = uses
        self.allowed = allowed
        self.identify: Callable[[], str | None] | None = None
        self.code_of: Callable[[type], str] | None = None
        self.has_subgraph = False
        self.inside: frozenset[str] = frozenset()
        self.remembers = False
        self.native_async = False
        self.retry: Sequence[RetryPolicy] = ()
        self.namespace = (NAMESPACE, graph, name)
        self.counters = NodeCounters()
        self._code: str | None = None
        self._begins: tuple[str | None, bytes] = None, b""
        self._warned: set[str] = set()
        self._lock = new_lock()

    @property
    def code(self) -> str | None:
        """The fingerprint of its code or the policy's ``version``; ``None`` if it has none, and
        then it runs uncached."""
        identify = self.identify
        if identify is not None:
            # two threads may come here at once, and find the same
            self._code = identify()
            self.identify = None
        return self._code

    @code.setter
    def code(self, code: str | None) -> None:
        self._code = code

    @property
    def key_begins(self) -> bytes:
        """What the keys of all its calls begin with."""
        code, begins = self._begins
        if code != self.code or not begins:
            code = self.code
            begins = keys.beginning("node", {"path": [*self.namespace], "code": code})
            self._begins = code, begins
        return begins

    def warn(self, message: str) -> None:
        """Log a warning, the first time."""
        with self._lock:
            if message in self._warned or len(self._warned) > 100:
                return
            self._warned.add(message)
        logger.warning("node %r: %s", self.name, message)


def call_part(policy: CachePolicy, state: Any) -> tuple[str, Any]:
    """What of a node's input is in the key, and under which name."""
    if policy.key is None:
        return "state", state
    if callable(policy.key):
        try:
            return "key", policy.key(state)
        except Exception as exc:
            raise Uncached("key_raised", f"key= raised {type(exc).__name__}: {exc}") from None
    chosen = {name: _field(state, name) for name in policy.key}
    return "state", {name: value for name, value in chosen.items() if value is not _MISSING}


def call_key(
    spec: NodeSpec,
    state: Any,
    part: tuple[str, Any],
    tags: tuple[str, ...],
    runtime: Any,
    binding: Binding,
    sealed: bool,
    conf: Mapping[str, Any],
) -> str:
    """What the result depends on, as a digest; ``part``: what of the input is in it, ``sealed``:
    whether it is stored under a seal, ``conf``: the whole ``configurable``."""
    policy = spec.policy
    assert policy is not None
    parts = [part]
    if policy.vary is None:
        parts.append(("context", getattr(runtime, "context", None)))
        parts.append(("configurable", binding.configurable))
    else:
        roots = {"context": getattr(runtime, "context", None), "configurable": binding.configurable}
        for name in policy.vary:
            root, *path = name.split(".")
            value: Any = roots[root]
            if root == "configurable" and path and path[0] not in value:
                # what LangGraph puts there is only in the key of those who name it
                value = {key: item for key, item in conf.items() if not key.startswith("__")}
            try:
                for step in path:
                    value = _field(value, step)
            except Exception as exc:
                message = f"vary={name!r} raised {type(exc).__name__}: {exc}"
                raise Uncached("vary_raised", message) from None
            if value is _MISSING:
                spec.warn(f"vary={name!r} names nothing that this run has: the result is shared")
            parts.append((name, () if value is _MISSING else (value,)))
    keyed = {name: use.want(state).key for name, use in spec.uses.items() if use.key is not None}
    if keyed:
        # which model answers is part of the question, whatever ``key`` says
        parts.append(("resources", keyed))
    if tags:
        # results with other dependencies are other results, whatever ``key`` says
        parts.append(("tags", tags))
    if sealed:
        # who cannot open it does not come upon it
        parts.append(("sealed", True))
    try:
        return keys.digest(*parts, code_of=spec.code_of, begins=spec.key_begins)
    except keys.Unkeyable as exc:
        outside = exc.path.startswith(("context", "configurable"))
        way_out = (
            "vary= can leave it out of the key" if outside else "key= can leave it out of the key"
        )
        raise Uncached("unkeyable", f"{exc}; {way_out}") from None


def call_owner(who: str, scope: Scope, conf: Mapping[str, Any], binding: Binding) -> Owner | None:
    """Who owns a result of that ``scope``; ``None``: it is everybody's.

    Raises:
        ConfigurationError: it would be a thread's, and the run has none.
    """
    if scope == "global":
        return None
    if scope == "run":
        return Owner(run_namespace(binding.run_id), binding.pins)
    thread = conf.get("thread_id")
    if thread is None:
        raise ConfigurationError(
            f"{who}: scope='thread' needs a thread, but the run has no thread_id; "
            "pass configurable={'thread_id': ...} or use scope='run' or 'global'"
        )
    return Owner(thread_namespace(str(thread)), binding.pins)


def call_marks(owner: Owner | None, config: Any) -> Tags:
    """The ids of the tags by which what is stored for ``owner`` is found, besides the owner's."""
    run_id = None if owner is None else run_id_of(config)
    return () if run_id is None else (made_in(run_id),)


def call_tags(
    policy: CachePolicy, state: Any, runtime: Any, conf: Mapping[str, Any]
) -> tuple[str, ...]:
    """The ids of the tags that the result for this input depends on, in a run with this
    ``configurable``."""
    if not policy.tags:
        return ()
    if callable(policy.tags):
        try:
            names = policy.tags(state)
            if isinstance(names, str):
                names = [names]
            names = list(names)
        except Exception as exc:
            raise Uncached("tags_raised", f"tags= raised {type(exc).__name__}: {exc}") from None
    else:
        run = {"context": getattr(runtime, "context", None), "configurable": conf}
        names = [_filled(tag, state, run) for tag in policy.tags]
    for name in names:
        if not isinstance(name, str):
            raise Uncached("tags_raised", f"tags= gave {name!r}, which is no string")
    return tuple(sorted({tag_id(name) for name in names}))


def _filled(tag: str, state: Any, run: Mapping[str, Any]) -> str:
    out: list[str] = []
    for text, name in template_parts(tag):
        out.append(text)
        if name is None:
            continue
        value: Any = run if "." in name else state
        for step in name.split("."):
            value = _field(value, step)
        # the text of anything else may differ between two equal values
        if value is _MISSING or not isinstance(value, str | int | float | bool | None):
            where = "run" if "." in name else "input"
            given = f"is not in the {where}"
            if value is not _MISSING:
                given = f"is a {type(value).__name__}"
            raise Uncached(
                "tags_raised",
                f"the tag {tag!r} takes the text of a string, number or None, but {name!r} {given}",
            )
        out.append(format(value))
    return "".join(out)


def _field(state: Any, name: str) -> Any:
    """``name`` of a mapping or an object; ``_MISSING`` if it has none."""
    if isinstance(state, Mapping):
        return state.get(name, _MISSING)
    return getattr(state, name, _MISSING)
