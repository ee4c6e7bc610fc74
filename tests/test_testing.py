"""``langgraph_perf.testing`` as somebody else would use it, for a backend of their own."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import langgraph_perf.testing

# each starts a pytest of its own, whose threads switch all the time: it is slow on a busy machine
pytestmark = pytest.mark.timeout(900)

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

SHARED = """
import threading
import time
from collections import defaultdict
from langgraph_perf.caches.base import Cache, Lease, namespace_tag, new_token, servable
from langgraph_perf.testing import CacheConformance, SharedConformance

lock = threading.Lock()
places = defaultdict(lambda: ({}, {}, {}))


class SharedCache(Cache):
    shared = True

    def __init__(self, place, clock):
        super().__init__(clock=clock)
        self.entries, self.tokens, self.leases = places[place]

    def read(self, lookups):
        if self._closed:
            return [None] * len(lookups)
        now = self.clock()
        found = [self.entries.get(lookup.key) for lookup in lookups]
        current = dict(self.tokens)
        pairs = zip(found, lookups)
        found = [e if e and servable(e, lookup, current, now) else None for e, lookup in pairs]
        self._tally.read(found)
        return found

    def write(self, key, entry, lease=None):
        if self._closed:
            return False
        with lock:
            if lease is not None and self.holder(key) != lease.token:
                return False
            self.leases.pop(key, None)
            self.entries[key] = entry
        self._tally.add(writes=1)
        return True

    def tag_tokens(self, tags):
        return tuple([self.tokens.setdefault(tag, new_token()) for tag in tags])

    def drop_tags(self, tags):
        self.must_be_open()
        for tag in tags:
            self.tokens.pop(tag, None)
        self._tally.add(invalidations=len(tags))

    def clear(self, namespaces=None):
        self.must_be_open()
        if namespaces is None:
            self.entries.clear()
            self.tokens.clear()
        for namespace in namespaces or ():
            self.tokens.pop(namespace_tag(namespace), None)
            for key in [key for key in list(self.entries) if key[0] == namespace]:
                self.entries.pop(key, None)

    def holder(self, key):
        token, until = self.leases.get(key, ("", 0.0))
        return token if self.clock() < until else None

    def acquire(self, key):
        lease = Lease(key, new_token(), self.clock() + self.lease_seconds)
        if self._closed:
            return lease
        with lock:
            if self.holder(key) is not None:
                return None
            self.leases[key] = lease.token, lease.expires
        return lease

    def renew(self, lease):
        with lock:
            if self._closed or self.holder(lease.key) != lease.token:
                return None
            return self.prolong(lease)

    def prolong(self, lease):
        lease = lease._replace(expires=self.clock() + self.lease_seconds)
        self.leases[lease.key] = lease.token, lease.expires
        return lease

    def release(self, lease):
        with lock:
            if self.holder(lease.key) == lease.token:
                del self.leases[lease.key]

    def pause(self, key, seconds):
        pass

    def stats(self):
        return self._tally.stats(entries=0 if self._closed else len(self.entries))


class TestSharedCache(SharedConformance):
    def make(self, directory, clock):
        return SharedCache(directory, clock)
"""
"""All there is to a backend that others share, in one process."""


def conforms(directory: Path, backend: str, only: str = "") -> str:
    """What pytest, without any plugin, says of ``backend`` in all tests, or in ``only`` some."""
    (directory / "test_backend.py").write_text(textwrap.dedent(backend))
    options = "-q -W error -p no:asyncio -p no:timeout -p no:cacheprovider"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            *options.split(),
            f"--rootdir={directory}",
            f"-k={only}",
            ".",
        ],
        cwd=directory,
        capture_output=True,
        text=True,
    )
    return done.stdout


@pytest.mark.parametrize("backend", [BACKEND, SHARED])
def test_a_backend_of_ones_own(tmp_path: Path, backend: str) -> None:
    """A cache made of a few dictionaries passes, with nothing but pytest installed."""
    said = conforms(tmp_path, backend)
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
    said = conforms(tmp_path, BACKEND.replace(line, instead), test)
    assert f"{test}[sync]" in said, said
    assert f"{test}[async]" in said


@pytest.mark.parametrize(
    ("lines", "instead", "tests"),
    [
        (
            "servable(e, lookup, current, now)",
            "servable(e, lookup._replace(max_age=lookups[0].max_age), current, now)",
            ["test_each_lookup_has_its_own_max_age[sync]"],
        ),
        (
            "servable(e, lookup, current, now)",
            "servable(e, lookup._replace(tags=lookups[0].tags), current, now)",
            ["test_each_lookup_needs_its_own_tags[sync]"],
        ),
        (
            "        found = [self.entries.get(lookup.key) for lookup in lookups]\n"
            "        current = dict(self.tokens)\n",
            "        current = dict(self.tokens)\n        round_trip()\n"
            "        found = [self.entries.get(lookup.key) for lookup in lookups]\n",
            ["test_never_served_whatever_happens_meanwhile"],
        ),
        (
            "self.tokens.setdefault(tag, new_token()) for tag in tags",
            "self.tokens.get(tag) or self.make_token(tag) for tag in tags",
            ["test_tokens_are_made_once[sync]"],
        ),
        (
            "self.tokens.setdefault(tag, new_token()) for tag in tags",
            "self.touched(tag) for tag in tags",
            ["test_never_served_whatever_happens_meanwhile"],
        ),
        (
            "with lock:\n            if self.holder(key) is not None:\n",
            "if not round_trip():\n            if self.holder(key) is not None or round_trip():\n",
            ["test_one_of_many_gets_it[sync]", "test_one_of_both_gets_it[sync]"],
        ),
        ("        self.must_be_open()\n", "", ["test_closed_caches_do_not_pretend[sync]"]),
    ],
)
def test_a_broken_shared_backend_fails(
    tmp_path: Path, lines: str, instead: str, tests: list[str]
) -> None:
    """Batches whose lookups differ, tokens compared too early, tokens and leases made twice or
    brought back, and closed caches that pretend, are all found out."""
    assert lines in SHARED
    only = " or ".join([test.partition("[")[0] for test in tests])
    said = conforms(tmp_path, SHARED.replace(lines, instead) + TWO_STEPS, only)
    for test in tests:
        assert test in said, said


TWO_STEPS = """

def round_trip():
    time.sleep(0.005)  # even on a busy machine others come in between


def make_token(self, tag):
    token = new_token()
    round_trip()
    self.tokens[tag] = token
    return token


def touched(self, tag):
    token = self.tokens.setdefault(tag, new_token())
    round_trip()
    self.tokens[tag] = token
    return token


SharedCache.make_token, SharedCache.touched = make_token, touched
"""


BROKEN = {
    "FirstTagOnly": (
        "def drop_tags(self, tags): super().drop_tags(tags[:1])",
        "test_invalidate_takes_all_it_is_given",
    ),
    "ClearsAllPlaces": (
        """
        def clear(self, namespaces=None):
            super().clear(namespaces)
            for entries, _, _ in places.values() if namespaces is None else ():
                entries.clear()
        """,
        "test_places_do_not_meet",
    ),
    "TokensOfAllPlaces": (
        """
        def __init__(self, place, clock):
            super().__init__(place, clock)
            self.tokens = places["anywhere"][1]
        """,
        "test_places_do_not_meet",
    ),
    "LeasesOfAllPlaces": (
        """
        def acquire(self, key):
            taken = any([key in leases for _, _, leases in places.values()])
            return None if taken else super().acquire(key)
        """,
        "test_places_do_not_meet",
    ),
    "WritesInTwoSteps": (
        """
        def write(self, key, entry, lease=None):
            if lease is not None and self.holder(key) != lease.token:
                return False
            round_trip()
            return super().write(key, entry)
        """,
        "test_one_of_many_stores_with_it",
        "test_newer_result_stays",
        "test_newer_result_stays_for_both",
        "test_successors_are_left_alone",
        "test_successors_of_both_are_left_alone",
    ),
    "RenewsInTwoSteps": (
        """
        def renew(self, lease):
            if self._closed or self.holder(lease.key) != lease.token:
                return None
            round_trip()
            return self.prolong(lease)
        """,
        "test_successors_are_left_alone",
        "test_successors_of_both_are_left_alone",
    ),
    "ReleasesInTwoSteps": (
        """
        def release(self, lease):
            if self.holder(lease.key) == lease.token:
                round_trip()
                self.leases.pop(lease.key, None)
        """,
        "test_successors_are_left_alone",
        "test_successors_of_both_are_left_alone",
    ),
    "LocksForItselfAlone": (
        """
        def __init__(self, place, clock):
            super().__init__(place, clock)
            self.own = threading.Lock()

        def release(self, lease):
            with self.own:
                if self.holder(lease.key) == lease.token:
                    round_trip()
                    self.leases.pop(lease.key, None)

        def acquire(self, key):
            with self.own:
                return super().acquire(key)
        """,
        "test_successors_of_both_are_left_alone",
    ),
    "RenewsWhatIsFree": (
        """
        def renew(self, lease):
            free = lease.key not in self.leases and not self._closed
            return self.prolong(lease) if free else super().renew(lease)
        """,
        "test_lease_given_back_is_not_renewed",
    ),
    "RenewsNone": (
        "def renew_many(self, leases): return [None] * len(leases)",
        "test_many_leases_renew",
    ),
    "RenewsNothing": (
        "def renew_many(self, leases): return list(leases)",
        "test_many_leases_renew",
        "test_closed_leases",
    ),
    "RenewsTheFirst": (
        "def renew_many(self, leases): return [*super().renew_many(leases[:1]), *leases[1:]]",
        "test_many_leases_renew",
    ),
    "KnowsEverything": (
        "def knows(self, deps): return True",
        "test_at_hand_is_what_is_valid",
    ),
    "ServesTheInvalid": (
        """
        def read_now(self, lookup):
            found = self.entries.get(lookup.key)
            return found if found and timely(found, lookup, self.clock()) else None
        """,
        "test_at_hand_is_what_is_valid",
        "test_invalidations_are_shared",
        "test_never_served_whatever_happens_meanwhile",
    ),
    "ServesTheExpired": (
        """
        def read_now(self, lookup):
            found = self.entries.get(lookup.key)
            now = found and found.created
            return found if found and servable(found, lookup, self.tokens, now) else None
        """,
        "test_at_hand_is_what_is_found",
    ),
}
"""What is wrong with a backend, and the tests that say so."""


def test_what_else_may_be_broken(tmp_path: Path) -> None:
    """What is done by halves, in two steps or in other places, and what is served without waiting
    though it must not be served, is found out."""
    # one pytest for all of them: it is slow to start
    code = SHARED + TWO_STEPS + "\nfrom langgraph_perf.caches.base import timely\n"
    for name, (body, *_) in BROKEN.items():
        code += f"\nclass {name}(SharedCache):\n"
        code += textwrap.indent(textwrap.dedent(body), "    ")
        code += f"\nclass Test{name}(SharedConformance):\n"
        code += f"    def make(self, directory, clock):\n        return {name}(directory, clock)\n"
    only = [f"(Test{name} and ({' or '.join(tests)}))" for name, (_, *tests) in BROKEN.items()]
    said = conforms(tmp_path, code, " or ".join(only))
    failed = set(re.findall(r"FAILED .*::Test(\w+)::(\w+)", said))
    expected = {(name, test) for name, (_, *tests) in BROKEN.items() for test in tests}
    assert expected - failed == set(), said


def test_the_example_of_the_documentation(tmp_path: Path) -> None:
    """What the docstring shows runs as it stands, with a cache of that name."""
    (tmp_path / "my_package.py").write_text(
        "from langgraph_perf import DiskCache as MyCache\nMyCache = MyCache\n"
    )
    assert langgraph_perf.testing.__doc__
    _, example, _ = langgraph_perf.testing.__doc__.partition("    import pytest\n")
    code = example + langgraph_perf.testing.__doc__.partition(example)[2]
    code = code.partition("\n``CacheConformance``")[0]
    said = conforms(tmp_path, code)
    assert "failed" not in said, said
    assert "passed" in said, said


@pytest.mark.parametrize(
    ("make", "message"),
    [
        ("", "must define make(self, directory, clock)"),
        ("    def make(self, directory, clock):\n        return InMemoryCache()\n", "ForeignCache"),
    ],
)
def test_what_make_must_return(tmp_path: Path, make: str, message: str) -> None:
    """A ``make`` that is missing, or makes something else, is told so."""
    code = (
        "from langgraph.cache.memory import InMemoryCache\n"
        "from langgraph_perf.testing import CacheConformance\n"
        f"class TestIt(CacheConformance):\n    x = 1\n{make}"
    )
    assert message in conforms(tmp_path, code, "test_overwrites")
