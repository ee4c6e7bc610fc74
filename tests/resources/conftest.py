"""Fixtures for the tests of resources."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest

from langgraph_perf.resources import Resource, _core, _lease, _ledger, _reaper, _work

from .helpers import PATIENCE, FakeTime, Maker, check_at_rest

R = TypeVar("R", bound=Resource[Any])
Watch = Callable[[R], R]


@pytest.fixture(autouse=True)
def patient_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Closes that end are waited for, however busy the machine is. Tests of closes that hang set
    their own limit."""
    for module in (_core, _work):
        monkeypatch.setattr(module, "CLOSE_GRACE", PATIENCE)


@pytest.fixture
def maker() -> Maker:
    """Makes the objects of a resource; none may be closed twice or in use."""
    return Maker()


@pytest.fixture
def watch() -> Iterator[Callable[[R], R]]:
    """Checks, after the test, that nothing of a resource was lost and that it closes cleanly."""
    watched: list[Resource[Any]] = []

    def add(resource: R) -> R:
        watched.append(resource)
        return resource

    yield add
    for resource in watched:
        check_at_rest(resource)
        resource.close()
        check_at_rest(resource)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    """Fake time for the resources that are made after this."""
    fake = FakeTime()
    monkeypatch.setattr(_reaper, "shared", fake.reaper)
    monkeypatch.setattr(_ledger, "random", lambda: fake.luck)
    return fake


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiters look again every few milliseconds instead of every second."""
    monkeypatch.setattr(_lease, "LOOK_AGAIN_SECONDS", 0.005)
