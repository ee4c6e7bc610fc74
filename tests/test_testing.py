"""``langgraph_perf.testing`` as somebody else would use it, for a backend of their own."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

BACKEND = """
from langgraph_perf.caches.base import Entry, TokenCache, namespace_tag, new_token, timely
from langgraph_perf.testing import TagConformance


class DictCache(TokenCache):
    def __init__(self, clock):
        super().__init__(clock=clock)
        self.entries, self.tokens = {}, {}

    def peek(self, lookups):
        found = [self.entries.get(lookup.key) for lookup in lookups]
        now = self.clock()
        pairs = zip(found, lookups)
        return [e if e is not None and timely(e, lookup, now) else None for e, lookup in pairs]

    def peek_tags(self, tags):
        return {tag: self.tokens[tag] for tag in tags if tag in self.tokens}

    def write(self, key, entry, lease=None):
        if self._closed:
            return False
        self.entries[key] = entry
        self._tally.add(writes=1)
        return True

    def tag_tokens(self, tags):
        return tuple([self.tokens.setdefault(tag, new_token()) for tag in tags])

    def drop_tags(self, tags):
        for tag in tags:
            self.tokens.pop(tag, None)
        self._tally.add(invalidations=len(tags))

    def clear(self, namespaces=None):
        if namespaces is None:
            self.entries.clear()
            self.tokens.clear()
        for namespace in namespaces or ():
            self.tokens.pop(namespace_tag(namespace), None)
            self.entries = {k: e for k, e in self.entries.items() if k[0] != namespace}

    def stats(self):
        return self._tally.stats(entries=len(self.entries))

    def close(self):
        super().close()
        self.clear()


class TestDictCache(TagConformance):
    def make(self, directory, clock):
        return DictCache(clock)
"""


def conforms(directory: Path, backend: str) -> str:
    """What pytest, without any plugin, says of ``backend``."""
    (directory / "test_backend.py").write_text(textwrap.dedent(backend))
    options = "-q -W error -p no:asyncio -p no:timeout -p no:cacheprovider"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options.split(), f"--rootdir={directory}", "."],
        cwd=directory,
        capture_output=True,
        text=True,
    )
    return done.stdout


def test_a_backend_of_ones_own(tmp_path: Path) -> None:
    """A cache made of two dictionaries passes, with nothing but pytest installed."""
    said = conforms(tmp_path, BACKEND)
    assert "failed" not in said, said
    assert "passed" in said


@pytest.mark.parametrize(
    ("line", "instead", "test"),
    [
        ("self.tokens.pop(tag, None)", "pass", "test_invalidate"),
        (
            "if k[0] != namespace",
            "if not k[0] or k[0][0] != (namespace or ('',))[0]",
            "test_clear_takes_exact_namespaces",
        ),
        ("if self._closed:", "if False:", "test_closed"),
    ],
)
def test_a_broken_backend_fails(tmp_path: Path, line: str, instead: str, test: str) -> None:
    """What a backend does wrong fails the test that is about it, in both modes."""
    assert line in BACKEND
    said = conforms(tmp_path, BACKEND.replace(line, instead))
    assert f"{test}[sync]" in said, said
    assert f"{test}[async]" in said
