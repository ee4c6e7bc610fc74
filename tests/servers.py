"""Servers that tests start for themselves. One that does not start fails the test."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples are not installed


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The DSN of a private PostgreSQL server."""
    from examples.knowledge_base.databases import private_postgres

    with private_postgres() as dsn:
        yield dsn
