"""Bad arguments are refused when a resource is made: field, what was given, what is accepted."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import AsyncMock

import numpy as np
import pytest

from langgraph_perf.errors import ConfigurationError
from langgraph_perf.resources import FromContext, Keyed, Pool, Shared
from langgraph_perf.resources._hooks import is_async


@pytest.mark.parametrize("value", [0, -1, 1.5, "3", None, True, math.nan, [1]])
def test_sizes(value: Any) -> None:
    """Whole numbers from 1 on; ``True`` is not one."""
    for make in (
        lambda: Pool(dict, max_size=value),
        lambda: Keyed(lambda key: key, max_size=value),
    ):
        with pytest.raises(ConfigurationError, match="max_size must be a whole number") as caught:
            make()
        assert repr(value) in str(caught.value)


@pytest.mark.parametrize("value", [-1, 1.5, "3", None, False, math.nan])
@pytest.mark.parametrize("field", ["min_size", "max_waiting"])
def test_sizes_that_may_be_zero(field: str, value: Any) -> None:
    """Whole numbers from 0 on."""
    with pytest.raises(ConfigurationError, match=f"{field} must be a whole number of at least 0"):
        Pool(dict, **{field: value})


@pytest.mark.parametrize("value", [-0.1, "3", True, math.nan, math.inf, [1], 1j])
@pytest.mark.parametrize("field", ["timeout", "max_idle", "max_lifetime"])
def test_times(field: str, value: Any) -> None:
    """Finite seconds that are not negative, or ``None``."""
    with pytest.raises(ConfigurationError, match=f"{field} must be a number of seconds"):
        Pool(dict, **{field: value})


def test_other_times() -> None:
    """Also those of the other resources and of a single lease."""
    pool: Pool[Any] = Pool(dict)
    for make in (
        lambda: Pool(dict, max_lifetime=0),
        lambda: Shared(dict, max_idle=-1),
        lambda: Keyed(lambda key: key, max_idle="1"),  # type: ignore[arg-type]
        lambda: pool.lease(timeout=-1),
        lambda: pool.alease(timeout=True),
    ):
        with pytest.raises(ConfigurationError, match="must be a number of seconds"):
            make()


def test_min_size_cannot_exceed_max_size() -> None:
    """The error names both."""
    with pytest.raises(ConfigurationError, match="min_size must be at most max_size=2, got 3"):
        Pool(dict, min_size=3, max_size=2)


def test_what_is_accepted() -> None:
    """The edges of the ranges, and numpy's numbers."""
    Pool(dict, min_size=1, max_size=1, timeout=0, max_idle=0, max_lifetime=0.001, max_waiting=0)
    Pool(dict, timeout=None, max_idle=None, max_lifetime=None)
    Pool(dict, max_size=np.int64(3), timeout=np.float64(0.5))  # type: ignore[arg-type]
    Shared(dict, max_idle=0)
    Keyed(str, max_size=1, max_idle=1.5)


@pytest.mark.parametrize("field", ["check", "reset", "close"])
def test_hooks_must_be_callable_with_an_object(field: str) -> None:
    """What could only fail later is refused now."""
    with pytest.raises(ConfigurationError, match=f"{field} must be a function that is called as"):
        Pool(dict, **{field: "close"})
    with pytest.raises(ConfigurationError, match=rf"{field} is called as {field}\(obj\)"):
        Pool(dict, **{field: lambda: None})


def test_create_must_be_callable_as_it_will_be() -> None:
    """Without arguments, or with the key."""
    with pytest.raises(ConfigurationError, match="create must be a function"):
        Pool(object())  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"create is called as create\(\)"):
        Pool(lambda dsn: dsn)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"create is called as create\(key\)"):
        Keyed(lambda: None)  # type: ignore[arg-type, misc]
    with pytest.raises(ConfigurationError, match=r"factory is called as factory\(\)"):
        FromContext(lambda dsn: dsn)  # type: ignore[arg-type, misc]
    with pytest.raises(ConfigurationError, match="factory must be a function"):
        FromContext(None)  # type: ignore[arg-type]


def test_errors_name_the_resource() -> None:
    """By the function that makes it, as long as it has no other name."""

    def open_connection() -> None: ...

    with pytest.raises(ConfigurationError, match=r"Pool\(.*open_connection\): max_size"):
        Pool(open_connection, max_size=0)


class Callable_:
    """Its instances are async functions, but making one is not."""

    async def __call__(self, *args: object) -> None: ...


async def afunction() -> None: ...


@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (afunction, True),
        (partial(partial(afunction)), True),
        (Callable_(), True),
        (Callable_().__call__, True),
        (AsyncMock(), True),
        (Callable_, False),
        (dict, False),
        (lambda: afunction(), False),
        (None, False),
    ],
)
def test_async_functions_are_recognised(fn: Callable[..., Any] | None, expected: bool) -> None:
    """However they are wrapped, without calling them."""
    assert is_async(fn) is expected
