"""Functions of a resource that do what they should not: they harm nobody, and are not silent."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest

from langgraph_perf.errors import ConfigurationError, ResourceError
from langgraph_perf.resources import Keyed, Pool

from ..conftest import told
from .helpers import Holder, Maker, auntil, check_at_rest, until

Watch = Callable[[Any], Any]


def _cancel(thing: object) -> None:
    raise asyncio.CancelledError


async def _acancel(thing: object) -> None:
    raise asyncio.CancelledError


@pytest.mark.parametrize("hook", [_cancel, _acancel])
@pytest.mark.parametrize("field", ["check", "reset", "close"])
async def test_a_hook_that_raises_cancelled_error_cancels_nobody(
    watch: Watch, maker: Maker, field: str, hook: Any
) -> None:
    """Like any other error it costs the object, and is no answer to somebody's task."""
    options: dict[str, Any] = {} if field == "close" else {"close": maker.close}
    pool = watch(Pool(maker.create, max_size=1, **options, **{field: hook}))
    for number in range(3):
        async with pool.alease() as thing:
            assert thing.number == (0 if field == "close" else number)
    await pool.aclose()
    await auntil(lambda: len(maker.closed) == (0 if field == "close" else 3))
    await auntil(lambda: pool.stats().closed == pool.stats().loads)


@pytest.mark.parametrize("field", ["check", "reset", "close"])
def test_a_hook_that_raises_cancelled_error_in_a_thread(
    watch: Watch, maker: Maker, field: str
) -> None:
    """Sync callers see nothing of it either."""
    options: dict[str, Any] = {} if field == "close" else {"close": maker.close}
    pool = watch(Pool(maker.create, max_size=1, **options, **{field: _cancel}))
    for number in range(3):
        with pool.lease() as thing:
            assert thing.number == (0 if field == "close" else number)
    pool.close()
    assert pool.stats().closed == pool.stats().loads


@pytest.mark.parametrize("hooks", ["sync", "async create", "async close"])
async def test_a_create_that_raises_cancelled_error_is_a_failed_load(
    watch: Watch, maker: Maker, hooks: str
) -> None:
    """The caller gets an error that says so, and is not taken for cancelled."""

    async def acreate() -> object:
        raise asyncio.CancelledError

    def create() -> object:
        raise asyncio.CancelledError

    pool = watch(
        Pool(
            acreate if hooks == "async create" else create,
            close=maker.aclose if hooks == "async close" else maker.close,
        )
    )
    with pytest.raises(ResourceError, match="load was cancelled"):
        async with pool.alease():
            pass
    if hooks == "sync":
        with pytest.raises(ResourceError, match="load was cancelled"), pool.lease():
            pass


async def test_the_victims_close_does_not_fail_the_next_load(watch: Watch, maker: Maker) -> None:
    """Who gets the room of an object is not cancelled when that object's close says so."""
    models = watch(Keyed(maker.acreate, max_size=1, close=_acancel))
    for key in ("a", "b", "c"):
        async with models.alease(key) as thing:
            assert thing.key == key


async def test_a_cancelled_close_is_cancelled(maker: Maker) -> None:
    """A close that is asked to end, as by the end of its loop, does end."""
    begun = asyncio.Event()

    async def close(thing: object) -> None:
        begun.set()
        await asyncio.Event().wait()

    pool = Pool(maker.acreate, close=close)
    async with pool.alease():
        pass
    task = asyncio.create_task(pool.aclose())
    await begun.wait()
    for each in asyncio.all_tasks() - {asyncio.current_task()}:
        each.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    check_at_rest(pool)


@pytest.mark.parametrize("how", ["thread", "task"])
async def test_a_check_that_hides_a_coroutine_is_refused(maker: Maker, how: str) -> None:
    """Its answer would always be yes: the caller is told what to do instead."""
    pool = Pool(maker.create, max_size=1, check=lambda thing: maker.acheck(thing))

    async def use() -> None:
        if how == "thread":
            with pool.lease():
                pass
        else:
            async with pool.alease():
                pass

    for _ in range(2):
        await use()  # a new object needs no check
        with pytest.raises(ConfigurationError, match=r"check=.*<lambda> returned a coroutine"):
            await use()
    assert maker.checked == []
    check_at_rest(pool)


@pytest.mark.parametrize("field", ["reset", "close"])
def test_resets_and_closes_that_hide_a_coroutine_are_reported(
    maker: Maker, caplog: pytest.LogCaptureFixture, field: str
) -> None:
    """Nobody can be failed for it any more, but it is said what was not done and why."""
    hooks: dict[str, Any] = {"close": maker.close}
    hooks[field] = lambda thing: getattr(maker, f"a{field}")(thing)
    pool = Pool(maker.create, **hooks)
    pool.be_called("db")
    with caplog.at_level(logging.WARNING, "langgraph_perf"):
        with pool.lease():
            pass
        pool.close()
    (record,) = told(caplog)
    assert f"{field} failed" in record.getMessage()
    assert f"Pool 'db': {field}=" in record.getMessage()
    assert "'async def'" in record.getMessage()
    assert len(maker.closed) == (1 if field == "reset" else 0)
    check_at_rest(pool)


@pytest.mark.parametrize("kind", ["check", "acheck"])
async def test_a_check_that_raises_is_reported_once(
    watch: Watch, maker: Maker, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """A mistake in it would make each lease wait for a new object, without a word."""
    pool = watch(Pool(maker.create, check=getattr(maker, kind)))
    pool.be_called("db")
    answers: list[object] = [False, NameError("nobody"), NameError("nobody"), None]
    maker.bad_checks.extend(answers)
    with caplog.at_level(logging.WARNING, "langgraph_perf"):
        for number in [0, 1, 2, 3, 3]:
            async with pool.alease() as thing:
                assert thing.number == number
            assert len(told(caplog)) == (0 if number < 2 else 1)
    (record,) = told(caplog)
    assert record.getMessage().startswith("Pool 'db': check failed")
    assert "NameError('nobody')" in record.getMessage()


@pytest.mark.parametrize("how", ["aclose", "close", "close elsewhere", "replaced"])
async def test_what_a_close_gives_is_awaited(
    watch: Watch, maker: Maker, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    """Objects made by an ``async def`` have a loop for it, and a lambda hides that it is async."""
    pool = watch(Pool(maker.acreate, check=maker.check, close=lambda thing: maker.aclose(thing)))
    async with pool.alease() as thing:
        pass
    if how == "aclose":
        await pool.aclose()
    elif how == "close":
        pool.close()
    elif how == "close elsewhere":
        await asyncio.to_thread(pool.close)
    else:
        maker.bad_checks.append(False)
        async with pool.alease():
            pass
    await auntil(lambda: len(maker.closed) == 1)
    assert maker.closed == [thing]
    assert maker.close_loops == [asyncio.get_running_loop()]
    assert "close failed" not in caplog.text


@pytest.mark.parametrize("ended", [True, False])
def test_what_a_close_gives_is_awaited_after_its_loop(maker: Maker, ended: bool) -> None:
    """On the loop that stands still, or on a makeshift one."""
    pool = Pool(maker.acreate, close=lambda thing: maker.aclose(thing))

    async def use() -> None:
        async with pool.alease():
            pass

    loop = asyncio.new_event_loop()
    loop.run_until_complete(use())
    if ended:
        loop.close()
    pool.close()
    until(lambda: len(maker.closed) == 1)
    assert (maker.close_loops == [loop]) is not ended
    loop.close()
    check_at_rest(pool)


async def test_what_a_close_gives_may_fail(
    watch: Watch, maker: Maker, caplog: pytest.LogCaptureFixture
) -> None:
    """Like a close that raises itself."""

    async def stuck() -> None:
        raise OSError("stuck")

    pool = watch(Pool(maker.acreate, close=lambda thing: stuck()))
    async with pool.alease():
        pass
    with caplog.at_level(logging.WARNING, "langgraph_perf"):
        await pool.aclose()
    (record,) = told(caplog)
    assert "close failed, the object is dropped: OSError('stuck')" in record.getMessage()


async def test_a_plain_lease_that_waits_on_a_loop_is_warned_about(
    watch: Watch, maker: Maker, caplog: pytest.LogCaptureFixture, impatient: None
) -> None:
    """Once; one that need not wait, or waits in a thread without a loop, is as it should be."""
    pool = watch(Pool(maker.create, max_size=1))
    with caplog.at_level(logging.WARNING, "langgraph_perf"):
        with pool.lease():
            other = Holder(pool)
            until(lambda: pool.stats().waiting == 1)
        other.wait()
        other.finish()
        assert told(caplog) == []
        for _ in range(2):
            other = Holder(pool)
            other.wait()
            with pool.lease(heartbeat=other.let_go.set):
                pass
            other.finish()
    (record,) = told(caplog)
    assert "alease" in record.getMessage()
