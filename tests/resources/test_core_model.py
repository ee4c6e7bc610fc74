"""The cores decide without blocking, so any sequence of events can be played to them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    precondition,
    rule,
)

from langgraph_perf.errors import PoolClosed, PoolTimeout, TooManyWaiting
from langgraph_perf.resources import _core as core_module
from langgraph_perf.resources._core import Core, Limits, Step
from langgraph_perf.resources._entry import Entry, State
from langgraph_perf.resources._exclusive import ExclusiveCore
from langgraph_perf.resources._hooks import Hooks
from langgraph_perf.resources._shared import SharedCore, _slot
from langgraph_perf.resources._waiters import Waiter

MAX_SIZE = 3
MAX_OVERTAKE = 5.0


class Thing:
    """An object of the model; closed at most once, and never while it is leased."""

    def __init__(self, key: object) -> None:
        self.key = key
        self.closed = False


class Caller(Waiter):
    """A waiter whose thread or task is the test."""

    def __init__(self, key: object, now: float) -> None:
        super().__init__(key, None, now, 20.0)
        self.arrived = now

    def wake(self) -> bool:
        return not self.gone


class CoreMachine(RuleBasedStateMachine):
    """Callers ask, load, check, give back, leave, time out; time passes; at the end all closes."""

    keys: Any = st.just(None)
    exclusive = True

    waiting: Any = Bundle("waiting")
    places: Any = Bundle("places")
    leased: Any = Bundle("leased")
    closing: Any = Bundle("closing")

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.made: list[Thing] = []
        self.callers: list[Caller] = []
        self.holders: dict[Entry, int] = {}
        self.to_close: list[Entry] = []
        self.patch = pytest.MonkeyPatch()
        self.background: list[Entry] = []
        self.patch.setattr(core_module, "close_soon", self.close_later)
        self.patch.setattr(
            core_module, "load_soon", lambda core, entry: self.background.append(entry)
        )
        self.core = self.make_core()
        self.core.clock = lambda: self.now
        self.core.reaper = self  # type: ignore[assignment]

    def make_core(self) -> Core:
        hooks = Hooks("Pool(test)", lambda: None, check=lambda obj: True)
        return ExclusiveCore(
            hooks,
            Limits(max_size=MAX_SIZE, min_size=1, max_idle=10, max_lifetime=30, max_waiting=4),
        )

    run = None

    def close_later(self, hooks: Hooks, entry: Entry, done: object, run: object) -> None:
        if entry in self.core.entries:  # not of an earlier example that is garbage collected
            self.to_close.append(entry)

    def arm(self, target: object, deadline: float) -> bool:
        """The reaper of the model: calls when time passes."""
        return True

    def teardown(self) -> None:
        for caller in self.callers:
            self.core.abandon(caller)
        for entry in list(self.holders):
            for _ in range(self.holders.pop(entry)):
                self.core.give_back(entry, True)
        for entry in self.background:
            self.core.failed(entry, RuntimeError("the end"))
        self.background.clear()
        idle = self.core._shut_down()
        while idle or self.to_close:
            self.core.emptied((idle or self.to_close).pop())
        stats = self.core.stats()
        assert (stats.size, stats.waiting, stats.holders) == (0, 0, 0), stats
        assert stats.loads == stats.closed
        self.patch.undo()

    # -- what can happen ----------------------------------------------------------------------

    @rule(target=waiting, data=st.data())
    def ask(self, data: st.DataObject) -> Any:
        caller = Caller(data.draw(self.keys), self.now)
        try:
            self.core.take(caller)
        except (TooManyWaiting, PoolClosed):
            self.core.abandon(caller)
            return caller
        self.callers.append(caller)
        return caller

    @rule(target=leased, caller=consumes(waiting), healthy=st.booleans())
    def go_on(self, caller: Caller, healthy: bool) -> Any:
        """The caller does whatever it has to do next, until it has a lease or must wait."""
        if caller not in self.callers:
            return None
        try:
            while True:
                step = self.core.advance(caller)
                if step is Step.WAIT:
                    return None
                if step is Step.LOAD:
                    self.load(self.core.begin(caller), healthy)
                elif step is Step.CHECK:
                    caller.checked = healthy
                    if not healthy:
                        self.core.spoil(caller)
                        healthy = True
                else:
                    break
        except (PoolTimeout, PoolClosed, ConnectionError):
            self.callers.remove(caller)
            self.core.abandon(caller)
            return None
        self.callers.remove(caller)
        entry = caller.entry
        assert entry is not None
        caller.entry = None
        assert entry.obj.key == caller.key
        assert not entry.obj.closed
        self.holders[entry] = self.holders.get(entry, 0) + 1
        if self.exclusive:
            assert self.holders[entry] == 1
        return entry

    def load(self, entry: Entry, healthy: bool) -> None:
        if entry.victim is not None:
            self.close(entry.victim)
            self.core.cleared(entry)
        if healthy:
            thing = Thing(entry.key)
            self.made.append(thing)
            self.core.made(entry, thing, 1.0)
        else:
            self.core.failed(entry, ConnectionError("down"))

    @rule(caller=waiting)
    def leave(self, caller: Caller) -> None:
        if caller in self.callers:
            self.callers.remove(caller)
            self.core.abandon(caller)

    @rule(entry=consumes(leased), ok=st.booleans())
    def give_back(self, entry: Any, ok: bool) -> None:
        if entry is not None and self.holders.get(entry):
            self.holders[entry] -= 1
            if not self.holders[entry]:
                del self.holders[entry]
            self.core.give_back(entry, ok or not self.exclusive)

    @precondition(lambda self: self.background)
    @rule(healthy=st.booleans())
    def load_in_background(self, healthy: bool) -> None:
        self.load(self.background.pop(0), healthy)

    @precondition(lambda self: self.to_close)
    @rule()
    def finish_closing(self) -> None:
        entry = self.to_close.pop(0)
        self.close(entry)
        self.core.emptied(entry)

    def close(self, entry: Entry) -> None:
        assert entry not in self.holders, "closed while leased"
        if entry.obj is not None:
            assert not entry.obj.closed, "closed twice"
            entry.obj.closed = True

    @rule(seconds=st.sampled_from([0.5, 3.0, 6.0, 25.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.core.reap()

    @rule()
    def interrupt_a_step(self) -> None:
        """A finalizer gives a lease back, or a waiter leaves, in the middle of a step."""
        entry = next(iter(self.holders), None)

        def step() -> None:
            if entry is not None:
                self.core.give_back(entry, True)
            if self.callers:
                self.core.abandon(self.callers[0])

        self.core._do(step)
        if entry is not None:
            self.holders[entry] -= 1
            if not self.holders[entry]:
                del self.holders[entry]
        if self.callers:
            self.callers.pop(0)

    # -- what always holds ---------------------------------------------------------------------

    @invariant()
    def places_add_up(self) -> None:
        stats = self.core.stats()
        assert stats.size == stats.idle + stats.in_use + stats.loading + stats.closing, stats
        assert stats.size <= MAX_SIZE, stats

    @invariant()
    def objects_add_up(self) -> None:
        alive = [thing for thing in self.made if not thing.closed]
        stats = self.core.stats()
        assert len(self.made) == stats.loads
        assert len(alive) <= MAX_SIZE
        assert len(alive) == stats.loads - stats.closed

    @invariant()
    def leases_add_up(self) -> None:
        handed = sum(
            caller.entry is not None and caller.entry.state is State.READY
            for caller in self.callers
        )
        assert self.core.stats().holders == sum(self.holders.values()) + handed

    @invariant()
    def nobody_waits_for_what_is_there(self) -> None:
        queue = list(self.core.queue)
        stats = self.core.stats()
        assert all(waiter.alive() and waiter.entry is None for waiter in queue)
        assert len(set(queue)) == len(queue)
        if queue and self.exclusive:
            assert stats.idle == 0
            assert stats.size == MAX_SIZE

    @invariant()
    def idle_objects_will_be_looked_at(self) -> None:
        limits = self.core.limits
        for entry in self.core._idle():
            assert self.core.armed <= entry.expires
        stats = self.core.stats()
        spare = max(0, stats.size - stats.closing - limits.min_size)
        assert limits.max_idle is not None
        for entry in sorted(self.core._idle(), key=lambda entry: entry.idle_since)[:spare]:
            assert self.core.armed <= entry.idle_since + limits.max_idle


class SharedMachine(CoreMachine):
    """The same for shared objects, with more keys than there are places."""

    keys = st.sampled_from("abcde")
    exclusive = False

    def make_core(self) -> Core:
        hooks = Hooks("Keyed(test)", lambda key: None, keyed=True)
        return SharedCore(hooks, Limits(max_size=MAX_SIZE, max_idle=10, max_overtake=MAX_OVERTAKE))

    @invariant()
    def one_object_for_each_key(self) -> None:
        keys = [
            entry.key for entry in self.core.entries if entry.state in (State.READY, State.LOADING)
        ]
        assert len(set(keys)) == len(keys)

    @invariant()
    def who_waits_has_a_reason(self) -> None:
        """Its object is being loaded, or there is no room, or somebody older waits for room."""
        core = self.core
        assert isinstance(core, SharedCore)
        older_is_blocked = False
        for waiter in core.queue:
            entry = core.slots.get(_slot(waiter))
            if entry is not None and entry.state is State.READY:
                assert older_is_blocked
            elif entry is None:
                assert older_is_blocked or (len(core.entries) == MAX_SIZE and not core._idle())
                older_is_blocked = older_is_blocked or self.now - waiter.since >= MAX_OVERTAKE


TestExclusive = CoreMachine.TestCase
TestShared = SharedMachine.TestCase
TestExclusive.settings = TestShared.settings = settings(max_examples=100, stateful_step_count=50)
