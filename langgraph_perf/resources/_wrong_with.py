"""What leases say to whoever takes them with the other kind of ``with``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from langgraph_perf.errors import ConfigurationError


class OnlySync:
    """A lease for ``with``."""

    __slots__ = ()

    if not TYPE_CHECKING:  # type checkers know it already

        async def __aenter__(self) -> NoReturn:
            raise ConfigurationError(
                "lease(...) is for 'with'; what 'async with' takes is alease(...)"
            )

        async def __aexit__(self, *exc: object) -> None: ...


class OnlyAsync:
    """A lease for ``async with``."""

    __slots__ = ()

    if not TYPE_CHECKING:

        def __enter__(self) -> NoReturn:
            raise ConfigurationError(
                "alease(...) is for 'async with'; what 'with' takes is lease(...)"
            )

        def __exit__(self, *exc: object) -> None: ...


def enters(manager: Any) -> bool:
    """Whether ``manager`` is a context manager for ``with``."""
    return hasattr(type(manager), "__enter__") and not isinstance(manager, OnlyAsync)


def aenters(manager: Any) -> bool:
    """Whether ``manager`` is a context manager for ``async with``."""
    return hasattr(type(manager), "__aenter__") and not isinstance(manager, OnlySync)
