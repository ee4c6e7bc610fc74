"""Servers that tests start for themselves. One that does not start fails the test."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from langgraph_perf._breaker import Guarded

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples are not installed


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The DSN of a private PostgreSQL server."""
    from examples.knowledge_base.databases import private_postgres

    with private_postgres() as dsn:
        yield dsn


def ask_again(guarded: Guarded) -> None:
    """Let the pauses of what failed be over."""
    for breaker in guarded.breakers:
        if breaker.is_open:
            breaker._closed_again_at = breaker._probe_until = 0.0
