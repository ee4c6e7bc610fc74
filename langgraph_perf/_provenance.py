"""Which nodes were answered from the cache, told where people look: traces and checkpoints."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from langchain_core.callbacks.base import BaseCallbackManager
from langchain_core.runnables import RunnableConfig
from langchain_core.tracers.base import BaseTracer

# private names of LangGraph, each with a test in tests/checkpoint/test_provenance.py
from langgraph._internal._constants import CONFIG_KEY_CHECKPOINTER, CONFIG_KEY_TASK_ID, NS_SEP

from langgraph_perf._binding import BINDING, Binding
from langgraph_perf._locks import new_lock
from langgraph_perf.caches.base import Entry

if TYPE_CHECKING:
    from langgraph_perf._identity import NodeSpec

METADATA = "langgraph_perf"
"""Under which key traces and checkpoints tell of the cache."""
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
    ledger = getattr(conf.get(CONFIG_KEY_CHECKPOINTER), "provenance", None)
    if isinstance(ledger, Ledger):
        ledger.add(config, _Served(spec.name, digest, age, spec.code or "", _run(conf)))


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
    """

    node: str
    key: str
    age: float
    code: str
    run: str | None
    step: int = 0
    before: str | None = None


class Ledger:
    """What was served from the cache and is in no checkpoint yet, by thread and namespace."""

    def __init__(self) -> None:
        self._lock = new_lock()
        self._steps: OrderedDict[tuple[str, str], dict[str, _Served]] = OrderedDict()

    def add(self, config: RunnableConfig, served: _Served) -> None:
        """Remember ``served`` until the checkpoint of its step is written."""
        conf = config["configurable"]
        namespace = str(conf.get("checkpoint_ns", "")).rpartition(NS_SEP)[0]
        served.step = (config.get("metadata") or {}).get("langgraph_step", 0)
        served.before = (conf.get("checkpoint_map") or {}).get(namespace)
        where = (str(conf.get("thread_id")), namespace)
        with self._lock:
            # by task: one that is run again in the same step counts once
            tasks = self._steps.setdefault(where, {})
            tasks[str(conf.get(CONFIG_KEY_TASK_ID))] = served
            if len(tasks) > _MOST_STEPS:
                del tasks[next(iter(tasks))]
            self._steps.move_to_end(where)
            while len(self._steps) > _MOST_STEPS:
                self._steps.popitem(last=False)

    def of(self, config: Any, metadata: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """What to tell in the checkpoint that is written with ``config`` and ``metadata``, and
        which tasks that is about."""
        if not self._steps or metadata.get("source") != "loop":
            return {}, []  # a step's own checkpoint tells of it, not a copy or an edit of the last
        conf = config.get("configurable") or {}
        where = (str(conf.get("thread_id")), str(conf.get("checkpoint_ns", "")))
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
            for where in [where for where in self._steps if where[0] in gone]:
                del self._steps[where]

    def told(self, config: Any, tasks: list[str]) -> None:
        """Forget ``tasks``: the checkpoint is written."""
        conf = config.get("configurable") or {}
        where = (str(conf.get("thread_id")), str(conf.get("checkpoint_ns", "")))
        with self._lock:
            steps = self._steps.get(where, {})
            for task in tasks:
                steps.pop(task, None)
            if not steps:
                self._steps.pop(where, None)
