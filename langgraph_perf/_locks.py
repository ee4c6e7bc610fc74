"""Locks that a forked child can take, whoever held them when it was forked."""

from __future__ import annotations

import os
import threading
import weakref

_made: weakref.WeakSet[threading.Lock] = weakref.WeakSet()  # type: ignore[valid-type, unused-ignore]


def new_lock() -> threading.Lock:
    """A lock that is free in a forked child: the thread that held it is not there.

    For short sections that leave nothing half done when they end in the middle.
    """
    lock = threading.Lock()
    _made.add(lock)
    return lock


def _reset_after_fork() -> None:
    for lock in list(_made):
        # as the standard library's own locks are: threading, logging, concurrent.futures
        lock._at_fork_reinit()  # type: ignore[attr-defined, unused-ignore]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_after_fork)
