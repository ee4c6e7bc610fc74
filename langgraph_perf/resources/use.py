"""``Use``: how a node says which resource, and which object of it, it wants."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from langgraph_perf._validate import describe, refuse
from langgraph_perf.errors import ConfigurationError


class Want(NamedTuple):
    """One thing to lease: the resource's name and, for a keyed one, which of its objects."""

    name: str
    key: Hashable = None


@dataclass(frozen=True)
class Use:
    """A resource under another name, or one object of a keyed resource.

    Attributes:
        name: what the resource is called in ``compile(resources=)``.
        key: which object of a ``Keyed`` the node wants: the name of a field of its input, or a
            function that is called with the input. ``None`` for other resources.

    Raises:
        ConfigurationError: a field is not what it should be.
    """

    name: str
    key: str | Callable[[Any], Hashable] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            refuse("Use", "name", self.name, "the name of a resource")
        if self.key == "" or not (
            self.key is None or isinstance(self.key, str) or callable(self.key)
        ):
            accepted = "the name of a field of the node's input, a function of it, or None"
            refuse(f"Use({self.name!r})", "key", self.key, accepted)
        if inspect.iscoroutinefunction(self.key):
            raise ConfigurationError(
                f"Use({self.name!r}): key must be a plain function, got {self._described()}, which "
                "is an 'async def'; put what it finds out into a field of the input"
            )

    def want(self, state: Any) -> Want:
        """What to lease for a node that runs on ``state``.

        Raises:
            ConfigurationError: the input has no such field, the function raised, or the key is
                ``None`` or not hashable.
        """
        if self.key is None:
            return Want(self.name)
        key = self._key_from(state)
        how = f"Use({self.name!r}, key={self._described()})"
        if key is None:
            raise ConfigurationError(f"{how}: the key is None; it must say which object to lease")
        try:
            hash(key)
        except TypeError:
            raise ConfigurationError(
                f"{how}: the key must be hashable (a str, a number, a tuple of those), got {key!r}"
            ) from None
        return Want(self.name, key)

    def _key_from(self, state: Any) -> Any:
        if isinstance(self.key, str):
            try:
                return state[self.key] if isinstance(state, Mapping) else getattr(state, self.key)
            except (KeyError, AttributeError):
                there = list(state) if isinstance(state, Mapping) else type(state).__name__
                raise ConfigurationError(
                    f"Use({self.name!r}, key={self.key!r}): the node's input has no field "
                    f"{self.key!r}; there is: {there}"
                ) from None
        assert self.key is not None
        try:
            return self.key(state)
        except Exception as exc:
            raise ConfigurationError(
                f"Use({self.name!r}, key={self._described()}): the function raised {exc!r}"
            ) from exc

    def _described(self) -> str:
        return repr(self.key) if isinstance(self.key, str) else describe(self.key or self.want)
