"""Every combination of what the four stages of a lease can do (deadpool ``test_cancellations``)."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

import pytest

from langgraph_perf.resources import Pool

from .helpers import Maker, Thing, auntil, check_at_rest, passes

Watch = Callable[[Pool[Any]], Pool[Thing]]

STAGES = ("create", "check", "use", "reset")
BEHAVIOURS = ("ok", "raises", "slow", "cancelled")
SYNC_BEHAVIOURS = ("ok", "raises")


class StageError(Exception):
    """What a stage raises when told to."""


class Script:
    """Makes each stage behave as told, once armed; the caller is cancelled in the middle of it."""

    def __init__(self, maker: Maker, behaviour: dict[str, str]) -> None:
        self.maker = maker
        self.behaviour = behaviour
        self.armed = False
        self.seen: list[str] = []
        self.caller: asyncio.Task[Any] | None = None

    def play(self, stage: str) -> None:
        """The sync part: note the stage, and raise if it is to."""
        if self.armed:
            self.seen.append(stage)
            if self.behaviour[stage] == "raises":
                raise StageError(stage)

    async def aplay(self, stage: str) -> None:
        """The async part: take a while, or have the caller cancelled meanwhile."""
        self.play(stage)
        if self.armed and self.behaviour[stage] == "slow":
            await passes()
        if self.armed and self.behaviour[stage] == "cancelled":
            assert self.caller is not None
            self.caller.cancel()
            await passes()

    def create(self) -> Thing:
        self.play("create")
        return self.maker.create()

    async def acreate(self) -> Thing:
        await self.aplay("create")
        return await self.maker.acreate()

    def check(self, thing: Thing) -> None:
        self.play("check")

    async def acheck(self, thing: Thing) -> None:
        await self.aplay("check")

    def reset(self, thing: Thing) -> None:
        self.play("reset")

    async def areset(self, thing: Thing) -> None:
        await self.aplay("reset")


def combinations(behaviours: tuple[str, ...]) -> list[dict[str, str]]:
    """Every way in which the stages can behave."""
    return [
        dict(zip(STAGES, chosen, strict=True))
        for chosen in itertools.product(behaviours, repeat=len(STAGES))
    ]


async def act(script: Script, pool: Pool[Any]) -> None:
    """Lease twice: once to load (and so see ``create``), once more to see ``check``."""
    for _ in range(2):
        async with pool.alease(timeout=5) as thing:
            with thing:
                await script.aplay("use")


@pytest.mark.parametrize("primed", [False, True], ids=["empty", "primed"])
@pytest.mark.parametrize("behaviour", combinations(BEHAVIOURS), ids=lambda b: "-".join(b.values()))
async def test_async(watch: Watch, maker: Maker, behaviour: dict[str, str], primed: bool) -> None:
    """Whatever happens in which stage, nothing is lost and the pool serves the next caller."""
    script = Script(maker, behaviour)
    pool = watch(
        Pool(
            script.acreate,
            max_size=1,
            check=script.acheck,
            reset=script.areset,
            close=maker.aclose,
        )
    )
    if primed:  # so that the first lease finds an object to check
        async with pool.alease():
            pass
    script.armed = True
    script.caller = asyncio.create_task(act(script, pool))
    await asyncio.wait([script.caller])
    script.armed = False
    outcome = None if script.caller.cancelled() else script.caller.exception()
    if "cancelled" not in behaviour.values():
        # a failing check or reset only costs the object; a failing create is only met without one
        fatal = behaviour["use"] == "raises" or (
            behaviour["create"] == "raises"
            and (not primed or "raises" in (behaviour["check"], behaviour["reset"]))
        )
        assert isinstance(outcome, StageError) == fatal, (outcome, script.seen)
    else:
        assert outcome is None or isinstance(outcome, StageError), outcome
    await auntil(lambda: not (pool.stats().loading or pool.stats().closing or pool.stats().in_use))
    check_at_rest(pool)
    assert maker.alive == pool.stats().size
    async with pool.alease(timeout=5) as thing:
        assert not thing.closed
    await pool.aclose()
    assert maker.alive == 0
    assert maker.most_alive <= 1


@pytest.mark.parametrize("primed", [False, True], ids=["empty", "primed"])
@pytest.mark.parametrize(
    "behaviour", combinations(SYNC_BEHAVIOURS), ids=lambda b: "-".join(b.values())
)
def test_sync(watch: Watch, maker: Maker, behaviour: dict[str, str], primed: bool) -> None:
    """The same for threads, which nobody can cancel."""
    script = Script(maker, behaviour)
    pool = watch(
        Pool(script.create, max_size=1, check=script.check, reset=script.reset, close=maker.close)
    )
    if primed:
        with pool.lease():
            pass
    script.armed = True
    failed = ""
    try:
        for _ in range(2):
            with pool.lease(timeout=5) as thing, thing:
                script.play("use")
    except StageError as exc:
        failed = str(exc)
    script.armed = False
    assert failed in ("", "create", "use")
    check_at_rest(pool)
    assert maker.alive == pool.stats().size
    with pool.lease(timeout=5) as thing:
        assert not thing.closed
    assert maker.most_alive <= 1
