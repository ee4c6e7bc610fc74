"""The users' functions of one resource: how to make, check, reset and close an object."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Hashable
from typing import Any

from langgraph_perf.errors import ConfigurationError
from langgraph_perf.resources._validate import describe, function

logger = logging.getLogger("langgraph_perf")

Hook = Callable[..., Any]


def is_async(fn: object) -> bool:
    """Whether calling ``fn`` gives a coroutine, as far as it can be known without calling it."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    if inspect.iscoroutinefunction(fn):
        return True
    # a callable object; of a class, calling it makes an instance, however its instances are called
    return inspect.iscoroutinefunction(getattr(type(fn), "__call__", None))  # noqa: B004


class Hooks:
    """The four functions, validated, and which of them are ``async def``.

    Args:
        owner: how error messages name the resource.
        keyed: whether ``create`` takes the key.

    Raises:
        ConfigurationError: a hook is not callable, or not in the way it will be called.
    """

    def __init__(
        self,
        owner: str,
        create: Hook,
        *,
        keyed: bool = False,
        check: Hook | None = None,
        reset: Hook | None = None,
        close: Hook | None = None,
    ) -> None:
        function(owner, "create", create, arguments=("key",) if keyed else ())
        for field, hook in (("check", check), ("reset", reset), ("close", close)):
            if hook is not None:
                function(owner, field, hook, arguments=("obj",))
        self.owner = owner
        self.keyed = keyed
        self._create = create
        self.check = check
        self.reset = reset
        self.close = close
        self.async_create = is_async(create)
        self.async_check = is_async(check)
        self.async_reset = is_async(reset)
        self.async_close = is_async(close)
        self.needs_loop = (
            self.async_create or self.async_check or self.async_reset or self.async_close
        )
        """Whether any of them must run on an event loop: then objects belong to the loop that
        made them, and only async code can lease them."""

    def create(self, key: Hashable) -> Any:
        """Call ``create``: gives the object, or the coroutine of an ``async def``.

        Raises:
            ConfigurationError: a function that is not ``async def`` returned a coroutine.
        """
        made = self._create(key) if self.keyed else self._create()
        if inspect.iscoroutine(made) and not self.async_create:
            made.close()  # or it would warn that it was never awaited
            raise ConfigurationError(
                f"{self.owner}: create={describe(self._create)} returned a coroutine; pass an "
                "'async def' function instead (a lambda hides that it is async), so that it is "
                "known before a node runs"
            )
        return made

    def log_failed_reset(self, exc: BaseException) -> None:
        """What was done with the object is over: its user must not see the error."""
        logger.warning("%s: reset failed, the object is closed: %r", self.owner, exc)

    def log_failed_close(self, exc: BaseException) -> None:
        """A failing close never fails whoever happened to cause it."""
        logger.warning("%s: close failed, the object is dropped: %r", self.owner, exc)


def passed(answer: object) -> bool:
    """Whether the answer of a ``check`` means yes; ``None`` does, for checks that raise."""
    return answer is None or bool(answer)
