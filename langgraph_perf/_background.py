"""Running a node once more, in the background, on behalf of a call that was answered meanwhile."""

from __future__ import annotations

import copy
import sys
import uuid
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from langchain_core.callbacks import AsyncCallbackManager, CallbackManager
from langchain_core.runnables import RunnableConfig
from langchain_core.tracers import context as tracers_context

# private names of LangGraph; tests/test_freshness.py fails when what they do changes
from langgraph._internal._constants import CONFIG_KEY_CHECKPOINTER, CONFIG_KEY_RUNTIME

from langgraph_perf._binding import BINDING, SCOPE
from langgraph_perf._call import revalidation
from langgraph_perf._drive import NOBODY, adrive, drive
from langgraph_perf._flight import held_flights
from langgraph_perf._gathering import gatherings
from langgraph_perf._steps import Call
from langgraph_perf._within import within
from langgraph_perf.caches.base import Entry

if TYPE_CHECKING:
    from langgraph_perf._attempt import Attempt

_POSITION = ("checkpoint_id", "checkpoint_map", "checkpoint_ns")


def revalidate(attempt: Attempt, call: Call, is_async: bool) -> None:
    """Run the node of ``attempt`` once more for those who ask ``call`` next.

    Args:
        attempt: what has been answered with a stale result.
        call: its call.
        is_async: whether it runs on an event loop.
    """
    spec = attempt.node.spec
    try:
        # the graph goes on with this one
        state = copy.deepcopy(attempt.input)
    except Exception as exc:
        _failed(attempt, exc, "its input cannot be copied: ")
        return
    on_loop = is_async and spec.native_async
    again = type(attempt)(attempt.node, state, _detached(attempt.config, on_loop), {})
    again.scope = attempt.scope  # what it makes inside belongs to whom its result belongs
    refresh = replace(
        call,
        mode="refresh",
        refuse=again.refuse,
        spent=again.spent,
        on_hit=_unseen,
        held=(),
        suspects=[],
        background=True,
    )
    refreshes = attempt.config["configurable"][BINDING].refreshes
    if on_loop:
        refreshes.start_task(call.key, lambda: _arun(again, refresh), call.backend.refreshing)
    else:
        refreshes.start(call.key, lambda: _run(again, refresh), call.backend.refreshing)


def _run(attempt: Attempt, call: Call) -> None:
    _on_its_own()
    try:
        drive(call, attempt.invoke, NOBODY, revalidation)
    except BaseException as exc:
        _failed(attempt, exc)


async def _arun(attempt: Attempt, call: Call) -> None:
    _on_its_own()
    assert call.freshness is not None
    try:
        # beyond its window nobody takes a stale result: then callers run the node themselves
        await within(call.freshness.while_revalidate, _attempted(attempt, call))
    except Exception as exc:
        _failed(attempt, exc)


async def _attempted(attempt: Attempt, call: Call) -> None:
    try:
        await adrive(call, attempt.ainvoke, NOBODY, revalidation)
    except SystemExit as exc:  # which would end the event loop
        raise RuntimeError(f"the node raised {exc!r}") from exc


def _failed(attempt: Attempt, error: BaseException, why: str = "") -> None:
    spec = attempt.node.spec
    spec.counters.refused("refresh_failed")
    spec.warn(f"a stale result could not be computed again: {why}{type(error).__name__}: {error}")


def _on_its_own() -> None:
    """What runs from here on is not part of the call that started it."""
    held_flights.set(())
    gatherings.set(())
    # LangChain and LangSmith keep listeners in context variables
    for var, *_ in tracers_context._configure_hooks:
        var.set(None)
    run_helpers = sys.modules.get("langsmith.run_helpers")
    parent = getattr(run_helpers, "_PARENT_RUN_TREE", None)
    if parent is not None:
        parent.set(None)


def _detached(config: RunnableConfig, on_loop: bool) -> RunnableConfig:
    """The config of a node without what ties it to its run: streams, checkpoints, callbacks."""
    conf = config["configurable"]
    own = {
        name: value
        for name, value in conf.items()
        if not name.startswith("__pregel_") and name not in _POSITION
    }
    own.update((name, conf[name]) for name in (BINDING, SCOPE) if name in conf)
    own[CONFIG_KEY_CHECKPOINTER] = None  # of no graph that the node may call
    runtime = conf.get(CONFIG_KEY_RUNTIME)
    if runtime is not None:
        own[CONFIG_KEY_RUNTIME] = runtime.override(
            stream_writer=_silent, heartbeat=NOBODY.heartbeat, control=None
        )
    manager = AsyncCallbackManager if on_loop else CallbackManager
    callbacks = manager([], parent_run_id=uuid.uuid4())
    return {**config, "callbacks": callbacks, "configurable": own}


def _silent(_: Any) -> None: ...


def _unseen(entry: Entry) -> None: ...
