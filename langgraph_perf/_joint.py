"""Several cached calls that one body answers together: the drivers of ``get_or_set_many``.

Each call takes its own steps (``_call``), so that all that holds for one holds for each of many:
whoever computes a key leads, and the others follow. Those that have to run do so in one go, and
nobody is waited for before that: who leads some keys and waits for others would wait for ever for
somebody who does the same the other way round.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

from langgraph_perf._call import steps
from langgraph_perf._drive import NOBODY, anever, aperform, cancellations, never, perform, running
from langgraph_perf._patience import waiting
from langgraph_perf._steps import Call, Done, Pause, Raised, Ran, Read, Run, Step, Tokens, Wait

_ORDER: dict[type, int] = {Read: 1, Tokens: 2, Run: 3, Wait: 4, Pause: 4}
"""What comes first if different calls want different things: 0 for what is not named."""


class _Joint:
    """The calls, and what each of them wants next.

    Attributes:
        done: what became of the calls; ``None`` for those that are not.
    """

    def __init__(self, calls: Sequence[Call]) -> None:
        self.done: list[Done | None] = [None] * len(calls)
        self._machines = [steps(call) for call in calls]
        self._wants: tuple[dict[int, Step], ...] = ({}, {}, {}, {}, {})  # in their order
        self._order = [0] * len(calls)
        for number in range(len(calls)):
            self.answer(number, None)

    def wanted(self, number: int) -> Step | None:
        """The next step of a call; ``None``: it is done."""
        return self._wants[self._order[number]].get(number)

    def left(self) -> list[int]:
        """The calls that are not done."""
        return [number for wants in self._wants for number in wants]

    def answer(self, number: int, value: Any) -> None:
        """Answer the step that a call wants."""
        self._resume(number, self._machines[number].send, value)

    def throw(self, number: int, error: BaseException) -> None:
        """Let a step fail."""
        self._resume(number, self._machines[number].throw, error)

    def _resume(self, number: int, resume: Callable[[Any], Step], value: Any) -> None:
        self._wants[self._order[number]].pop(number, None)
        try:
            step = resume(value)
        except StopIteration as stop:
            self.done[number] = stop.value
        else:
            self._order[number] = order = _ORDER.get(type(step), 0)
            self._wants[order][number] = step

    def next(self) -> list[int]:
        """The calls whose steps are to be taken next, together: they want the same."""
        at_once, reads, tokens, runs, waits = self._wants
        if at_once:
            return [next(iter(at_once))]
        if reads:
            return [*reads]
        if tokens:
            first = next(iter(tokens.values()))
            return [number for number, step in tokens.items() if step == first]
        for number, step in waits.items():
            if not runs or (type(step) is Wait and step.waiter.outcome is not None):
                return [number]  # to wait comes last, unless there is nothing to wait for any more
        return [*runs]

    def steps(self, numbers: Sequence[int]) -> list[Any]:
        """What these calls want."""
        return [self.wanted(number) for number in numbers]

    def answers(self, numbers: Sequence[int], values: Sequence[Any]) -> None:
        """Answer what ``next`` gave."""
        for number, value in zip(numbers, values, strict=True):
            self.answer(number, value)


def drive_many(
    calls: Sequence[Call], body: Callable[[Sequence[int]], Sequence[Ran]]
) -> list[Done | None]:
    """Make the calls in this thread. ``body`` runs those with these numbers, in one go: usually
    once, and again for what others were asked for, and failed to compute.

    Raises:
        BaseException: whatever ``body`` raised. Then nobody is waited for any more.
    """
    joint = _Joint(calls)

    def settle(number: int) -> None:
        while (step := joint.wanted(number)) is not None:
            joint.answer(number, perform(step, calls[number], never, NOBODY))

    try:
        while numbers := joint.next():
            wanted = joint.steps(numbers)
            call = calls[numbers[0]]
            values: Sequence[Any]
            if type(wanted[0]) is Run:
                with running(wanted, call):
                    try:
                        values = body(numbers)
                    except BaseException as exc:
                        joint.answers(numbers, [Raised(exc)] * len(numbers))
                        for number in numbers:
                            settle(number)
                        raise
            elif type(wanted[0]) is Read:
                with waiting(call.patience):
                    values = call.backend.read_many([step.lookup for step in wanted])
            else:
                values = [perform(wanted[0], call, never, NOBODY)] * len(numbers)
            joint.answers(numbers, values)
    except BaseException as exc:
        for number in joint.left():
            with suppress(BaseException):
                joint.throw(number, exc)
                settle(number)
        raise
    return joint.done


async def adrive_many(
    calls: Sequence[Call], body: Callable[[Sequence[int]], Awaitable[Sequence[Ran]]]
) -> list[Done | None]:
    """Like ``drive_many``, in this task."""
    joint = _Joint(calls)

    async def settle(number: int) -> None:
        while (step := joint.wanted(number)) is not None:
            joint.answer(number, await aperform(step, calls[number], anever, NOBODY))

    try:
        while numbers := joint.next():
            wanted = joint.steps(numbers)
            call = calls[numbers[0]]
            values: Sequence[Any]
            if type(wanted[0]) is Run:
                with running(wanted, call):
                    cancelled = cancellations()
                    try:
                        values = await body(numbers)
                    except BaseException as exc:
                        joint.answers(numbers, [Raised(exc)] * len(numbers))
                        for number in numbers:
                            await settle(number)
                        raise
                    if cancellations() > cancelled:
                        for ran in values:
                            ran.tainted = "cancelled"
            elif type(wanted[0]) is Read:
                with waiting(call.patience):
                    values = await call.backend.aread_many([step.lookup for step in wanted])
            else:
                values = [await aperform(wanted[0], call, anever, NOBODY)] * len(numbers)
            joint.answers(numbers, values)
    except BaseException as exc:
        for number in joint.left():
            with suppress(BaseException):
                joint.throw(number, exc)
                await settle(number)
        raise
    return joint.done
