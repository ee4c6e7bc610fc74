"""What is sent to Redis, and how often."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha1
from typing import Any

from redis import exceptions

from langgraph_perf._locks import new_lock


class Script:
    """A Lua script; as a command's name it is sent by its digest, and in full if need be."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.sha = sha1(text.encode(), usedforsecurity=False).hexdigest()


Command = tuple[Any, ...]
Commands = Sequence[Command]
"""What to carry out, answered with a list of replies, an error reply being an exception in it."""


def by_digest(command: Command) -> Command:
    name = command[0]
    return ("EVALSHA", name.sha, *command[1:]) if isinstance(name, Script) else command


def in_full(command: Command) -> Command:
    return ("EVAL", command[0].text, *command[1:])


def unknown_scripts(commands: Commands, replies: list[Any]) -> list[int]:
    return [
        i
        for i, reply in enumerate(replies)
        if isinstance(reply, exceptions.NoScriptError) and isinstance(commands[i][0], Script)
    ]


class Trips:
    """Counts batches, whatever becomes of the lines that sent them."""

    def __init__(self) -> None:
        self._lock = new_lock()  # it outlives the lines, also in a forked child
        self.count = 0

    def add(self) -> None:
        """Count one."""
        with self._lock:
            self.count += 1
