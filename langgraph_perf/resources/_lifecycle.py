"""What happens to every core of the process at a fork and at interpreter exit."""

from __future__ import annotations

import atexit
import logging
import os
import time
import weakref
from typing import Any, Protocol

logger = logging.getLogger("langgraph_perf")


class Living(Protocol):
    """A core, as far as process-wide events concern it."""

    def after_fork(self) -> list[Any]:
        """Forget everything; gives what was held, which nobody in this process may close."""

    def at_exit(self, deadline: float) -> None:
        """Close what is idle; from ``deadline`` (monotonic seconds) on, wait for nothing."""


EXIT_SECONDS = 5.0
"""How long the interpreter's exit may be held up by async closes, all together."""

_living: weakref.WeakSet[Living] = weakref.WeakSet()
_inherited: list[Any] = []
"""In a forked child: the parent's objects. Dropping them could run finalizers that say goodbye on
sockets which the parent still uses, so they are kept for good."""


def watch(core: Living) -> None:
    """Tell ``core`` about forks and the exit, for as long as it lives."""
    _living.add(core)


def _after_fork() -> None:
    _inherited.extend([core.after_fork() for core in list(_living)])


def _at_exit() -> None:
    deadline = time.monotonic() + EXIT_SECONDS
    for core in list(_living):
        try:
            core.at_exit(deadline)
        except Exception:
            logger.debug("closing resources at exit failed", exc_info=True)


atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
