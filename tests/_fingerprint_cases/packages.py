"""Packages written to disk, fingerprinted by other processes."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

APP = {
    "app/__init__.py": "",
    "app/helpers.py": """
        from contextlib import contextmanager

        LIMIT = 3
        TABLE = {"a": 1, "b": {"x", "y", "z"}}

        def shorten(text):
            return clean(text)[:LIMIT]

        def clean(text):
            return text.strip()

        def unused():
            return 0

        class Size:
            start = 7

        @contextmanager
        def gauge(size):
            yield [size]
    """,
    "app/lazy.py": """
        from app.helpers import clean

        def heavy(text):
            return clean(text)
    """,
    "app/nodes.py": """
        import json
        import enum
        from dataclasses import dataclass
        import app.helpers
        from app import helpers as h
        from app.helpers import shorten, TABLE
        import other
        from other import outside

        SEEN = []

        class Mode(enum.Enum):
            FAST = 1

        @dataclass
        class Options:
            k: int = 3
            mode: Mode = Mode.FAST

            def width(self):
                return self.k * 2

        OPTIONS = Options()

        def node(state, *, depth=2):
            "Does things."
            # a comment
            SEEN.append(state)
            return {"out": shorten(state["text"]), "table": TABLE, "deep": _inner(depth)}

        def _inner(depth):
            return [lambda x: x + depth, json.dumps(OPTIONS.width())]

        def by_module(state):
            return app.helpers.shorten(state), h.LIMIT

        def by_call(state):
            with h.gauge(h.Size()) as size:
                return size

        def abroad(state):
            return outside(state), other.outside(state)

        def lazily(state):
            from app.lazy import heavy
            return heavy(state)

        def lazily_relative(state):
            from . import lazy
            return lazy.heavy(state)

        def even(n):
            return n == 0 or odd(n - 1)

        def odd(n):
            return n != 0 and even(n - 1)

        def make(k):
            def made(state):
                return k
            return made

        class Agent:
            limit = 5

            def __init__(self, k):
                self.k = k

            def __call__(self, state):
                return self.run(state)

            def run(self, state):
                return self.k * self.limit
    """,
    "other/__init__.py": """
        def outside(state):
            return state
    """,
}

_PROGRAM = """
import sys
from langgraph_perf.fingerprint import fingerprint
{before}
import app.nodes as nodes
for expression in {expressions!r}:
    print(fingerprint(eval(expression)))
"""


class Packages:
    """A directory of packages that can be edited and looked at from a fresh process."""

    def __init__(self, directory: Path, files: Mapping[str, str] = APP) -> None:
        self.directory = directory
        for name, text in files.items():
            self.write(name, textwrap.dedent(text).lstrip("\n"))

    def write(self, name: str, text: str) -> None:
        """Write a file."""
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def edit(self, name: str, old: str, new: str) -> None:
        """Replace one piece of a file, which must be there."""
        text = (self.directory / name).read_text()
        assert text.count(old) == 1, (name, old)
        self.write(name, text.replace(old, new))

    def fingerprints(
        self, *expressions: str, seed: str = "0", before: str = "", cwd: Path | None = None
    ) -> list[str]:
        """The fingerprints of expressions over ``nodes``, computed by a fresh process."""
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM.format(before=before, expressions=expressions)],
            env={
                **os.environ,
                "PYTHONHASHSEED": seed,
                "PYTHONPATH": os.pathsep.join(
                    [str(self.directory), os.environ.get("PYTHONPATH", "")]
                ),
                "PYTHONDONTWRITEBYTECODE": "1",
            },
            cwd=cwd or self.directory.parent,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.split()
