"""Which nodes were answered from the cache, told where people look: traces and checkpoints."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from langchain_core.callbacks.base import BaseCallbackManager
from langchain_core.runnables import RunnableConfig
from langchain_core.tracers.base import BaseTracer

# private names of LangGraph, each with a test in tests/checkpoint/test_provenance.py
from langgraph._internal._constants import (
    CONFIG_KEY_CHECKPOINTER,
    CONFIG_KEY_TASK_ID,
    ERROR,
    ERROR_SOURCE_NODE,
    INTERRUPT,
    NS_SEP,
    RESUME,
)

from langgraph_perf._binding import BINDING, Binding
from langgraph_perf._locks import new_lock
from langgraph_perf.caches.base import Entry

if TYPE_CHECKING:
    from langgraph_perf._identity import NodeSpec

METADATA = "langgraph_perf"
"""Under which key traces and checkpoints tell of the cache."""
CHANNEL = "__langgraph_perf_served"
"""Under which name a step that stops, for a human or an error, tells of its hits until there is its
checkpoint: that may be written by another process. It is a write of no task of the graph, so that
LangGraph passes over it."""
_MOST_STEPS = 4096
"""How many steps of which no checkpoint was written yet are remembered: runs that wait for a human
may never go on."""
_MOST_KEYS = 100
"""How many tasks of one node a checkpoint names; it gives the number of all."""


def mark_hit(config: RunnableConfig, spec: NodeSpec, entry: Entry, digest: str, now: float) -> None:
    """Note that the node which runs with ``config`` was answered with ``entry``."""
    age = max(0.0, now - entry.created)
    _mark_trace(config, digest, age)
    conf = config.get("configurable") or {}
    ledger = _ledger(conf)
    if ledger is not None:
        ledger.add(config, _Served(spec.name, digest, age, spec.code or "", _run(conf)))


def mark_run(config: RunnableConfig) -> None:
    """Note that the node which runs with ``config`` does run, whatever an earlier attempt did."""
    conf = config.get("configurable") or {}
    ledger = _ledger(conf)
    if ledger is not None:
        ledger.drop(conf)


def _ledger(conf: Mapping[str, Any]) -> Ledger | None:
    ledger = getattr(conf.get(CONFIG_KEY_CHECKPOINTER), "provenance", None)
    return ledger if isinstance(ledger, Ledger) else None


def _mark_trace(config: RunnableConfig, digest: str, age: float) -> None:
    callbacks = config.get("callbacks")
    if not isinstance(callbacks, BaseCallbackManager):
        return
    for handler in callbacks.handlers:
        if isinstance(handler, BaseTracer):
            run = handler.run_map.get(str(callbacks.parent_run_id))
            if run is not None:
                run.add_metadata({METADATA: {"cached": True, "key": digest, "age_seconds": age}})


def _run(conf: Mapping[str, Any]) -> str | None:
    binding = conf.get(BINDING)
    return binding.run_id if isinstance(binding, Binding) else None


@dataclass(slots=True)
class _Served:
    """A task that was answered from the cache.

    Attributes:
        run: identifies the run that it was part of.
        step: of the graph.
        before: id of the checkpoint that its step started from.
        written: whether its task is done.
        recorded: whether that is told for other processes.
    """

    node: str
    key: str
    age: float
    code: str
    run: str | None
    step: int = 0
    before: str | None = None
    written: bool = False
    recorded: bool = False


_RECORD = ("node", "key", "age", "code", "step")
_STOPS = (ERROR, INTERRUPT)
_NO_OUTPUT = (*_STOPS, ERROR_SOURCE_NODE, RESUME)
"""A task that has written more than these is done for LangGraph, even if its router has failed."""


def _step_of(conf: Mapping[str, Any]) -> tuple[str, str]:
    """The thread and the namespace of the graph that a task with this ``configurable`` is in."""
    thread, namespace = _checkpoint_of(conf)
    return thread, namespace.rpartition(NS_SEP)[0]


def _checkpoint_of(conf: Mapping[str, Any]) -> tuple[str, str]:
    """The thread and the namespace of the checkpoint that this ``configurable`` names."""
    return str(conf.get("thread_id")), str(conf.get("checkpoint_ns", ""))


class Ledger:
    """What was served from the cache and is in no checkpoint yet, by thread and namespace."""

    def __init__(self) -> None:
        self._lock = new_lock()
        self._steps: OrderedDict[tuple[str, str], dict[str, _Served]] = OrderedDict()
        self._stopped: OrderedDict[tuple[str, str], str | None] = OrderedDict()
        """After which checkpoint a step has stopped."""

    def add(self, config: RunnableConfig, served: _Served) -> None:
        """Remember ``served`` until the checkpoint of its step is written."""
        conf = config["configurable"]
        where = _step_of(conf)
        served.step = (config.get("metadata") or {}).get("langgraph_step", 0)
        served.before = (conf.get("checkpoint_map") or {}).get(where[1])
        # by task: one that is run again in the same step counts once
        self._put(where, str(conf.get(CONFIG_KEY_TASK_ID)), served)

    def _put(self, where: tuple[str, str], task: str, served: _Served) -> None:
        with self._lock:
            tasks = self._steps.setdefault(where, {})
            tasks[task] = served
            if len(tasks) > _MOST_STEPS:
                del tasks[next(iter(tasks))]
            self._steps.move_to_end(where)
            while len(self._steps) > _MOST_STEPS:
                self._steps.popitem(last=False)

    def drop(self, conf: Mapping[str, Any]) -> None:
        """Forget what is known of a task."""
        if self._steps:
            with self._lock:
                tasks = self._steps.get(_step_of(conf), {})
                tasks.pop(str(conf.get(CONFIG_KEY_TASK_ID)), None)

    # -- until the checkpoint is written, for other processes ------------------------------------

    def wrote(self, config: Any, task: str, writes: Any) -> dict[str, Any]:
        """A task's writes go to the checkpoint in ``config``.

        Returns:
            what is to be told for other processes: what was served to tasks that are done, by task.
        """
        stops = any(channel in _STOPS for channel, _ in writes)
        if not (stops or self._steps):
            return {}
        conf = config.get("configurable") or {}
        where, before = _checkpoint_of(conf), conf.get("checkpoint_id")
        with self._lock:
            tasks = self._steps.get(where, {})
            if stops:
                self._stopped[where] = before
                self._stopped.move_to_end(where)
                if len(self._stopped) > _MOST_STEPS:
                    self._stopped.popitem(last=False)
            if all(channel in _NO_OUTPUT for channel, _ in writes):
                tasks.pop(task, None)  # it has to be done again
            elif task in tasks and tasks[task].before == before:
                tasks[task].written = True
            if where not in self._stopped or self._stopped[where] != before:
                return {}
            told = {
                task: served
                for task, served in tasks.items()
                if served.before == before and served.written and not served.recorded
            }
            for served in told.values():
                served.recorded = True
        return {
            task: {name: getattr(served, name) for name in _RECORD} for task, served in told.items()
        }

    def learn(self, config: Any, told: Any) -> None:
        """Remember what another process told of the step after the checkpoint in ``config``."""
        conf = config.get("configurable") or {}
        with suppress(AttributeError, KeyError, TypeError):  # by another version
            for task, record in told.items():
                served = _Served(**{name: record[name] for name in _RECORD}, run=None)
                served.before = conf.get("checkpoint_id")
                served.written = served.recorded = True
                self._put(_checkpoint_of(conf), task, served)

    # -- when it is written -----------------------------------------------------------------------

    def of(self, config: Any, metadata: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """What to tell in the checkpoint that is written with ``config`` and ``metadata``, and
        which tasks that is about."""
        if not self._steps or metadata.get("source") != "loop":
            return {}, []  # a step's own checkpoint tells of it, not a copy or an edit of the last
        conf = config.get("configurable") or {}
        where = _checkpoint_of(conf)
        before, run, step = conf.get("checkpoint_id"), _run(conf), metadata.get("step")
        with self._lock:
            here = {
                task: served
                for task, served in self._steps.get(where, {}).items()
                # a run that writes only its last checkpoint tells of all its steps there
                if served.before == before
                or (run and served.run == run and isinstance(step, int) and served.step <= step)
            }
        nodes: dict[str, Any] = {}
        for served in here.values():
            node = nodes.setdefault(served.node, {"count": 0, "code": served.code, "hits": []})
            node["count"] += 1
            if len(node["hits"]) < _MOST_KEYS:
                node["hits"].append(
                    {"step": served.step, "key": served.key, "age_seconds": round(served.age, 3)}
                )
        return nodes, list(here)

    def forget(self, threads: Sequence[str]) -> None:
        """Forget what is of these threads."""
        gone = {str(thread) for thread in threads}
        with self._lock:
            for known in (self._steps, self._stopped):
                for where in [where for where in known if where[0] in gone]:
                    del known[where]

    def told(self, config: Any, tasks: list[str]) -> None:
        """Forget ``tasks``: the checkpoint is written."""
        where = _checkpoint_of(config.get("configurable") or {})
        with self._lock:
            steps = self._steps.get(where, {})
            for task in tasks:
                steps.pop(task, None)
            if not steps:
                self._steps.pop(where, None)
                self._stopped.pop(where, None)
