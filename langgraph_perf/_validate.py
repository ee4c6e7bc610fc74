"""Checks of constructor arguments: each error names the field, what was given, what is accepted."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any, NoReturn

from langgraph_perf.errors import ConfigurationError


def refuse(owner: str, field: str, given: object, accepted: str) -> NoReturn:
    """Raise the ``ConfigurationError`` that says what ``field`` of ``owner`` accepts."""
    raise ConfigurationError(f"{owner}: {field} must be {accepted}, got {given!r}")


def count(owner: str, field: str, value: object, *, least: int) -> int:
    """A whole number of at least ``least``; ``True`` is not a number."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
        refuse(owner, field, value, f"a whole number of at least {least}")
    return int(value)


def seconds(owner: str, field: str, value: object, *, above_zero: bool = False) -> float | None:
    """A finite number of seconds, or ``None``."""
    if value is None:
        return None
    accepted = "a number of seconds " + ("above 0, or None" if above_zero else "from 0 on, or None")
    if isinstance(value, bool) or not isinstance(value, Real):
        refuse(owner, field, value, accepted)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or number < 0 or (above_zero and number == 0):
        refuse(owner, field, value, accepted)
    return number


def function(owner: str, field: str, value: object, *, arguments: tuple[str, ...]) -> None:
    """Something that can be called with ``arguments``, as far as its signature tells."""
    call = f"{field}({', '.join(arguments)})"
    if not callable(value):
        refuse(owner, field, value, f"a function that is called as {call}")
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return  # some builtins do not say what they take
    try:
        signature.bind(*arguments)
    except TypeError as exc:
        raise ConfigurationError(
            f"{owner}: {field} is called as {call}, but {describe(value)}{signature} "
            f"does not accept that: {exc}"
        ) from None


def accepted(known: Sequence[str]) -> str:
    """Which arguments there are."""
    return f"accepted: {', '.join([f'{each}=' for each in known])}"


def arguments_hint(name: str, known: Sequence[str], also_called: Mapping[str, str]) -> str:
    """Which argument may have been meant by ``name``, if one may, and which there are."""
    also = also_called.get(name)
    meant = [also] if also in known else get_close_matches(name, known, 1)
    hint = f"did you mean {meant[0]}=? " if meant else ""
    return hint + accepted(known)


def describe(fn: Callable[..., Any]) -> str:
    """The name by which a user knows ``fn``."""
    return str(getattr(fn, "__qualname__", None) or getattr(fn, "__name__", None) or repr(fn))
