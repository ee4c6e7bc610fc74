"""What a user declares: the policy of a node, and what one run may ask of it.

Both are immutable and validated when they are made, so that a typo fails where it was written.
"""

from __future__ import annotations

import inspect
import math
import string
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Literal, get_args

from langgraph.types import CachePolicy as LangGraphCachePolicy
from typing_extensions import Self

from langgraph_perf import _validate
from langgraph_perf.errors import ConfigurationError

Scope = Literal["global", "thread", "run"]
Mode = Literal["use", "refresh", "bypass", "only"]
OnFork = Literal["reuse", "refresh"]
SCOPES: tuple[Scope, ...] = get_args(Scope)  # widest first
MODES: tuple[Mode, ...] = get_args(Mode)

_LANGGRAPH_DEFAULT_KEY: Any = LangGraphCachePolicy().key_func


class _KnownFields:
    """Refuses arguments that are no field."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        known = [each.name for each in fields(cls)]  # type: ignore[arg-type]
        if args:
            raise ConfigurationError(
                f"{cls.__name__}: got {args[0]!r:.200} without a name; {_validate.accepted(known)}"
            )
        for name in kwargs:
            if name not in known:
                raise ConfigurationError(
                    f"{cls.__name__}: there is no argument {name}=; "
                    f"{_validate.arguments_hint(name, known, _ALSO_CALLED)}"
                )
        return super().__new__(cls)


_ALSO_CALLED = {"key_func": "key"}
"""What fields are called in LangGraph's own policy."""


@dataclass(frozen=True, kw_only=True)
class CachePolicy(_KnownFields):
    """How the results of one node are cached: ``add_node(..., cache_policy=CachePolicy(...))``.

    Args:
        key: what of the node's input is in the key. ``None``: all of it; field names:
            only these; a callable: whatever it returns for the input.
        vary: which parts of the run's context and user ``configurable`` are in the key too.
            ``None``: all of both; ``()``: nothing; dotted names such as ``"context.user_id"`` or
            ``"configurable.model"``: only these.
        scope: who shares a result: everybody (``"global"``), one thread or one run. What is a
            thread's is removed with the thread, what is a run's when the run ends.
        ttl: how long a result may be served, in seconds or as a ``timedelta``; ``None``: for ever.
        jitter: fraction (0 to 1) of ``ttl`` by which expiry is spread at random, so that results
            stored together do not all expire together.
        stale_while_revalidate: how long past its ``ttl`` a result may still be served, in seconds
            or as a ``timedelta``, while the node runs again in the background; ``None``: not at
            all.
        stale_if_error: how long past its ``ttl`` a result may be served when the node, run again,
            raises; ``None``: not at all.
        tags: names the result depends on, for ``cache.invalidate(tag)``. Strings whose ``{field}``
            is filled from the node's input, and ``{context.user_id}`` or ``{configurable.user_id}``
            from the run, or one callable that returns such names for the input.
        version: replaces the automatic fingerprint of the node's code.
        when: called with the result; store it only if this returns true.
        on_fork: what a run does that starts from a checkpoint named by its caller
            (``configurable["checkpoint_id"]``): ``"reuse"`` results, or ``"refresh"`` them.

    Raises:
        ConfigurationError: a field has a value it cannot have.
    """

    key: Sequence[str] | Callable[[Any], Any] | None = None
    vary: Sequence[str] | None = None
    scope: Scope = "global"
    ttl: float | timedelta | None = None
    jitter: float = 0.0
    stale_while_revalidate: float | timedelta | None = None
    stale_if_error: float | timedelta | None = None
    tags: Sequence[str] | Callable[[Any], Sequence[str]] = ()
    version: str | int | None = None
    when: Callable[[Any], bool] | None = None
    on_fork: OnFork = "reuse"

    def __post_init__(self) -> None:
        if inspect.iscoroutinefunction(self.key):
            raise ConfigurationError(
                f"CachePolicy.key: got {self.key!r:.200}, an async function; accepted: a plain "
                "one, field names or None"
            )
        if callable(self.key):
            _validate.function("CachePolicy", "key", self.key, arguments=("state",))
        elif self.key is not None:
            names = _names("CachePolicy.key", self.key, "field names, a callable or None")
            if not names:
                raise ConfigurationError(
                    "CachePolicy.key: got no field name; accepted: field names, a callable, "
                    "or None for the whole input. For one result for every input, use "
                    "key=lambda state: None"
                )
            object.__setattr__(self, "key", names)
        if self.vary is not None:
            names = _names("CachePolicy.vary", self.vary, "dotted names or None")
            for name in names:
                root, _, rest = name.partition(".")
                if root not in ("context", "configurable") or (not rest and "." in name):
                    raise ConfigurationError(
                        f"CachePolicy.vary: got {name!r}; accepted: 'context', 'configurable', or "
                        "a part of them such as 'context.user_id' or 'configurable.model'"
                    )
            object.__setattr__(self, "vary", names)
        _choice("CachePolicy.scope", self.scope, SCOPES)
        object.__setattr__(self, "ttl", seconds("CachePolicy.ttl", self.ttl))
        if not _number(self.jitter) or not 0 <= self.jitter <= 1:
            raise ConfigurationError(
                f"CachePolicy.jitter: got {self.jitter!r}; accepted: a fraction from 0 to 1"
            )
        if self.jitter and self.ttl is None:
            raise ConfigurationError(
                f"CachePolicy.jitter: got {self.jitter!r} without a ttl, and what never expires "
                "has no expiry to spread; accepted: ttl= besides, or 0"
            )
        for name in ("stale_while_revalidate", "stale_if_error"):
            limit = seconds(f"CachePolicy.{name}", getattr(self, name), "None for not at all")
            if limit is not None and self.ttl is None:
                raise ConfigurationError(
                    f"CachePolicy.{name}: got {limit!r} without a ttl, and what never expires is "
                    "never stale; accepted: ttl= besides, or None"
                )
            object.__setattr__(self, name, limit)
        if callable(self.tags):
            _validate.function("CachePolicy", "tags", self.tags, arguments=("state",))
        else:
            tags = _names("CachePolicy.tags", self.tags, "strings or a callable")
            for tag in tags:
                template_fields(tag)
            object.__setattr__(self, "tags", tags)
        if self.version is not None and (
            isinstance(self.version, bool) or not isinstance(self.version, str | int)
        ):
            raise ConfigurationError(
                f"CachePolicy.version: got {self.version!r}; accepted: a string, an int or None"
            )
        if self.when is not None and not callable(self.when):
            raise ConfigurationError(
                f"CachePolicy.when: got {self.when!r}; accepted: a callable that takes the result, "
                "or None to store every result"
            )
        if self.when is not None:
            _validate.function("CachePolicy", "when", self.when, arguments=("result",))
        _choice("CachePolicy.on_fork", self.on_fork, get_args(OnFork))

    @classmethod
    def of(cls, policy: Any, where: str = "cache_policy") -> CachePolicy:
        """``policy`` itself, or LangGraph's own policy with its ``key_func`` and ``ttl`` kept."""
        if isinstance(policy, CachePolicy):
            return policy
        if isinstance(policy, LangGraphCachePolicy):
            key = None if policy.key_func is _LANGGRAPH_DEFAULT_KEY else policy.key_func
            return cls(key=key, ttl=policy.ttl)
        raise ConfigurationError(
            f"{where}: got {policy!r:.200}; accepted: langgraph_perf.CachePolicy(...), "
            "langgraph.types.CachePolicy(...) or None"
        )

    @property
    def key_func(self) -> Any:
        """What LangGraph's own classes look for in a policy of theirs.

        Raises:
            ConfigurationError: always; only ``langgraph_perf.StateGraph`` takes this policy.
        """
        raise ConfigurationError(
            "langgraph_perf.CachePolicy was given to a class of LangGraph; accepted: "
            "langgraph_perf.StateGraph in the place of langgraph's, or (for @task and LangGraph's "
            "own StateGraph) langgraph.types.CachePolicy"
        )

    def unknown_fields(self, known: Sequence[str]) -> list[tuple[str, str]]:
        """``(policy field, name)`` for each name in ``key`` and ``tags`` that ``known`` lacks."""
        asked = [("key", name) for name in self.key] if isinstance(self.key, tuple) else []
        asked += [("tags", name) for name in self._in_tags() if "." not in name]
        return [(where, name) for where, name in asked if name not in known]

    @property
    def outside(self) -> list[tuple[str, str]]:
        """``(policy field, name)`` for each part of the context or of ``configurable`` it names."""
        asked = [("vary", name) for name in self.vary or ()]
        return asked + [("tags", name) for name in self._in_tags() if "." in name]

    def _in_tags(self) -> list[str]:
        templates = self.tags if isinstance(self.tags, tuple) else ()
        return [name for tag in templates for name in template_fields(tag)]


def template_fields(tag: str) -> list[str]:
    """The fields a tag template names: ``["user_id"]`` for ``"user:{user_id}"``."""
    return [name for _, name in template_parts(tag) if name is not None]


@lru_cache(1024)  # every call of a node fills its tags
def template_parts(tag: str) -> tuple[tuple[str, str | None], ...]:
    """What a tag is made of: texts, and for each the field after it, if there is one."""
    try:
        parsed = list(string.Formatter().parse(tag))
    except ValueError as exc:
        raise ConfigurationError(
            f"CachePolicy.tags: got {tag!r}, which is no template ({exc}); accepted: text with "
            "{field} for state fields, and {{ }} for braces"
        ) from None
    for _, name, spec, conversion in parsed:
        if name is not None and (spec or conversion or not _is_field(name)):
            raise ConfigurationError(
                f"CachePolicy.tags: got {tag!r} with the field {name!r}; accepted: plain state "
                "field names such as {user_id}, and parts of the context or of configurable such "
                "as {context.user_id}, without a format; for anything else give "
                "tags=callable(state)"
            )
    return tuple((text, name) for text, name, _, _ in parsed)


def _is_field(name: str) -> bool:
    root, *path = name.split(".")
    if path and (root not in ("context", "configurable") or path[0].startswith("__")):
        return False
    return all(part.isidentifier() for part in (root, *path))


@dataclass(frozen=True, kw_only=True)
class CacheControl(_KnownFields):
    """What one run asks of the cache: ``configurable={"cache_control": CacheControl(...)}``.

    A plain mapping with the same fields does as well, so that it can travel as JSON. A run may
    only narrow what a policy allows: a longer ``ttl`` or a wider ``scope`` has no effect.

    Args:
        mode: ``"use"`` reads and stores; ``"refresh"`` runs the node and stores; ``"bypass"``
            does neither; ``"only"`` raises ``CacheMiss`` rather than run the node.
        ttl: serve nothing older than this, in seconds or as a ``timedelta``.
        scope: share results with ``"thread"`` or ``"run"`` only.
        nodes: the same fields for single nodes, by node name; they win over the ones above.

    Raises:
        ConfigurationError: an unknown key or a value that is not accepted.
    """

    mode: Mode = "use"
    ttl: float | timedelta | None = None
    scope: Scope | None = None
    nodes: Mapping[str, CacheControl] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _choice("cache_control.mode", self.mode, MODES)
        object.__setattr__(self, "ttl", seconds("cache_control.ttl", self.ttl))
        if self.scope is not None:
            _choice("cache_control.scope", self.scope, SCOPES)
        if not isinstance(self.nodes, Mapping):
            raise ConfigurationError(
                f"cache_control.nodes: got {self.nodes!r}; accepted: a mapping of node names to "
                "mappings such as {'mode': 'refresh'}"
            )
        nodes: dict[str, CacheControl] = {}
        given: Mapping[str, Any] = self.nodes
        for name, control in given.items():
            if not isinstance(control, CacheControl):
                control = _parse(control, f"cache_control.nodes[{name!r}]", base=self)
            nodes[name] = control
        object.__setattr__(self, "nodes", MappingProxyType(nodes))

    @classmethod
    def of(cls, given: Any) -> CacheControl:
        """A ``CacheControl`` from itself, from ``None`` or from a mapping."""
        if given is None:
            return _DEFAULT
        if isinstance(given, CacheControl):
            return given
        return _parse(given, "cache_control")

    def for_node(self, name: str) -> CacheControl:
        """What applies to the node called ``name``."""
        return self.nodes.get(name, self) if self.nodes else self

    def for_nodes(self, names: Collection[str]) -> list[CacheControl]:
        """What is said of each of these nodes by its name."""
        return [asked for name, asked in self.nodes.items() if name in names]


def _parse(given: Any, where: str, base: CacheControl | None = None) -> CacheControl:
    accepted = [f.name for f in fields(CacheControl) if base is None or f.name != "nodes"]
    if not isinstance(given, Mapping):
        raise ConfigurationError(
            f"{where}: got {given!r}; accepted: CacheControl(...) or a mapping with the keys "
            f"{', '.join(accepted)}"
        )
    for name in given:
        if name not in accepted:
            raise ConfigurationError(
                f"{where}: unknown key {name!r}; accepted: {', '.join(accepted)}"
            )
    try:
        return replace(base, nodes={}, **given) if base is not None else CacheControl(**given)
    except ConfigurationError as exc:
        if base is None:
            raise
        raise ConfigurationError(str(exc).replace("cache_control", where, 1)) from None


def seconds(name: str, value: Any, none: str = "None for no limit") -> float | None:
    """``value`` as a positive number of seconds, or ``None``; ``none`` says what that means."""
    if value is None:
        return None
    if isinstance(value, timedelta):
        value = value.total_seconds()
    if not _number(value) or not 0 < value < math.inf:
        raise ConfigurationError(
            f"{name}: got {value!r}; accepted: a positive number of seconds, a positive timedelta, "
            f"or {none}"
        )
    return value  # type: ignore[no-any-return]


def narrowest_scope(policy: Scope, control: Scope | None) -> Scope:
    """The narrower of the two; a run never widens what the policy says."""
    if control is None:
        return policy
    return SCOPES[max(SCOPES.index(policy), SCOPES.index(control))]


def shortest(a: float | None, b: float | None) -> float | None:
    """The shorter of two time limits, where ``None`` is no limit."""
    if a is None or b is None:
        return b if a is None else a
    return min(a, b)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _names(where: str, value: Any, accepted: str) -> tuple[str, ...]:
    # a lone string is a sequence of its letters: the one mistake everybody makes once
    if isinstance(value, str) or not isinstance(value, Sequence):
        hint = f"; did you mean [{value!r}]?" if isinstance(value, str) else ""
        raise ConfigurationError(f"{where}: got {value!r}; accepted: a list of {accepted}{hint}")
    for name in value:
        if not isinstance(name, str):
            raise ConfigurationError(f"{where}: got {name!r} in it; accepted: a list of {accepted}")
    return tuple(value)


def _choice(where: str, value: Any, accepted: Sequence[str]) -> None:
    if value not in accepted:
        raise ConfigurationError(
            f"{where}: got {value!r}; accepted: {', '.join(map(repr, accepted))}"
        )


_DEFAULT = CacheControl()
