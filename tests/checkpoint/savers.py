"""Where the checkpointers of these tests come from, and what drives them."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.memory import InMemorySaver

from .histories import Driver

Make = Callable[[], Any]


@contextmanager
def event_loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    try:
        yield loop
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


@contextmanager
def savers(kind: str, driver: Driver, request: pytest.FixtureRequest) -> Iterator[Make]:
    """A function that gives a checkpointer; only those in memory are a new one each time."""
    if kind == "memory":
        yield InMemorySaver
    else:
        with opened(kind, driver, place(kind, request)) as saver:
            yield lambda: saver


def place(kind: str, request: pytest.FixtureRequest) -> str:
    """The file or the DSN of a database for one test; PostgreSQL's is for all."""
    if kind == "postgres":
        return request.getfixturevalue("postgres")  # type: ignore[no-any-return]
    directory: Path = request.getfixturevalue("tmp_path")
    return str(directory / "threads.db")


@contextmanager
def opened(kind: str, driver: Driver, at: str) -> Iterator[Any]:
    """A checkpointer for the database ``at``."""
    with ExitStack() as stack:
        manager: Any
        if kind == "sqlite" and driver.loop is None:
            from langgraph.checkpoint.sqlite import SqliteSaver

            connection = sqlite3.connect(at, check_same_thread=False)
            yield SqliteSaver(stack.enter_context(closing(connection)))
        elif kind == "sqlite":
            from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver

            yield _entered(stack, driver, AsyncSqliteSaver.from_conn_string(at))
        elif driver.loop is None:
            from langgraph.checkpoint.postgres import PostgresSaver

            manager = PostgresSaver.from_conn_string(at)
            saver = stack.enter_context(manager)
            saver.setup()
            yield saver
        else:
            from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver

            saver = _entered(stack, driver, AsyncPostgresSaver.from_conn_string(at))
            driver.loop.run_until_complete(saver.setup())
            yield saver


def _entered(stack: ExitStack, driver: Driver, manager: Any) -> Any:
    assert driver.loop is not None
    run = driver.loop.run_until_complete
    entered = run(manager.__aenter__())
    stack.callback(lambda: run(manager.__aexit__(None, None, None)))
    return entered


@contextmanager
def drivers(how: str) -> Iterator[Driver]:
    if how == "sync":
        yield Driver()
        return
    with event_loop() as loop:
        yield Driver(loop)
