"""The users' functions of one resource: how to make, check, reset and close an object."""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Hashable
from typing import Any

from langgraph_perf._validate import describe, function
from langgraph_perf.errors import ConfigurationError

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
        self.check = self._seen_through("check", check)
        self.reset = self._seen_through("reset", reset)
        self.close = self._seen_through("close", close)
        self._said_that_a_loop_stands_still = False
        self._said_that_a_check_raised = False
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
        if not self.async_create:
            _refuse_coroutine(self.owner, "create", self._create, made)
        return made

    def _seen_through(self, field: str, hook: Hook | None) -> Hook | None:
        """``hook``, raising ``ConfigurationError`` when it gives a coroutine that nobody awaits.

        Where there is an event loop to await it on, what a ``close`` gives is awaited: by then it
        is too late to ask for another function.
        """
        if hook is None or is_async(hook):
            return hook
        hooks = weakref.ref(self)  # a cycle would put off the end of a dropped resource

        def call(obj: Any) -> Any:
            answer = hook(obj)
            known = hooks()
            if field != "close" or known is None or not known.needs_loop:
                _refuse_coroutine(getattr(known, "owner", "a resource"), field, hook, answer)
            return answer

        return call

    def closing_with(self, answer: Awaitable[object]) -> Hooks:
        """These, with ``answer`` to await in the place of ``close``, which gave it."""
        rest = copy.copy(self)
        rest.close, rest.async_close = (lambda obj: answer), True
        return rest

    def log_failed_reset(self, exc: BaseException) -> None:
        """What was done with the object is over: its user must not see the error."""
        logger.warning("%s: reset failed, the object is closed: %r", self.owner, exc)

    def log_failed_close(self, exc: BaseException) -> None:
        """A failing close never fails whoever happened to cause it."""
        logger.warning("%s: close failed, the object is dropped: %r", self.owner, exc)

    def log_failed_check(self, exc: BaseException) -> None:
        """Say, once, that a check raised: if each does, no object is ever used again."""
        if not self._said_that_a_check_raised:
            self._said_that_a_check_raised = True
            logger.warning(
                "%s: check failed, the object is replaced (not said again): %r", self.owner, exc
            )

    def log_blocked_loop(self) -> None:
        """Say, once, that a thread waits which runs an event loop."""
        if not self._said_that_a_loop_stands_still:
            self._said_that_a_loop_stands_still = True
            logger.warning(
                "%s: a plain lease waits in a thread that runs an event loop, which stands still "
                "in the meantime, with whoever was to give something back; in an 'async def' use "
                "'async with alease(...)'",
                self.owner,
            )


def _refuse_coroutine(owner: str, field: str, hook: Hook, answer: object) -> None:
    if isinstance(answer, Coroutine):
        answer.close()  # or it would warn that it was never awaited
        raise ConfigurationError(
            f"{owner}: {field}={describe(hook)} returned a coroutine; pass an 'async def' function "
            "instead (a lambda hides that it is async), so that it is known before a node runs"
        )


def passed(answer: object) -> bool:
    """Whether the answer of a ``check`` means yes; ``None`` does, for checks that raise."""
    return answer is None or bool(answer)
