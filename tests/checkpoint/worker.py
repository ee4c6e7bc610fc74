"""A graph run by a process of its own, which may have to die on the way.

``python -m tests.checkpoint.worker`` with a JSON object as its argument:

* ``how``: ``"sync"`` or ``"async"``
* ``saver``: ``"sqlite"`` or ``"postgres"``; ``at``: its file or DSN
* ``cache``: the directory of a ``DiskCache``, or nothing for a plain LangGraph graph
* ``ran``: the file to which each body that runs adds a line with the name of its node
* ``acts``: what to do to the thread ``thread``: ``"run"``, ``"go_on"`` or ``{"answer": ...}``
* ``die``: kill this process when the results of this node are about to be written to a checkpoint

It prints, as JSON, the result of each act, and then the state and the history.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from langgraph.graph import START
from langgraph.graph import StateGraph as LangGraphStateGraph
from langgraph.types import Command, interrupt
from typing_extensions import TypedDict

from langgraph_perf import CachePolicy, DiskCache, StateGraph

from .histories import Driver, seen
from .savers import drivers, opened


class State(TypedDict, total=False):
    query: str
    work: str
    answer: str
    end: str


def graph(job: dict[str, Any], saver: Any, cache: Any) -> Any:
    def ran(name: str) -> None:
        with Path(job["ran"]).open("a") as file:
            file.write(f"{name}\n")

    def work(state: State) -> State:
        ran("work")
        return {"work": state["query"].upper()}

    def asking(state: State) -> State:
        ran("asking")
        return {"answer": interrupt(f"{state['work']}?")}

    def end(state: State) -> State:
        ran("end")
        return {"end": f"{state['work']} {state['answer']}"}

    make: Any = LangGraphStateGraph if cache is None else StateGraph
    builder = make(State)
    for node in (work, asking, end):
        policy = {} if cache is None else {"cache_policy": CachePolicy(version=1)}
        builder.add_node(node.__name__, node, **policy)
    builder.add_edge(START, "work").add_edge("work", "asking").add_edge("asking", "end")
    return builder.compile(checkpointer=saver, cache=cache)


def dying(saver: Any, node: str) -> None:
    """Die instead of writing the results of ``node``, once those before them are written.

    They are written by threads and tasks of their own, in any order.
    """
    before, abefore = threading.Event(), asyncio.Event()

    def dies(writes: Any, task_path: str) -> bool:
        return node in task_path and any(name == node for name, _ in writes)

    def put_writes(config: Any, writes: Any, task_id: str, task_path: str = "") -> Any:
        if dies(writes, task_path):
            assert before.wait(60)
            os.kill(os.getpid(), signal.SIGKILL)
        write(config, writes, task_id, task_path)
        before.set()

    async def aput_writes(config: Any, writes: Any, task_id: str, task_path: str = "") -> Any:
        if dies(writes, task_path):
            await asyncio.wait_for(abefore.wait(), 60)
            os.kill(os.getpid(), signal.SIGKILL)
        await awrite(config, writes, task_id, task_path)
        abefore.set()

    write, awrite = saver.put_writes, saver.aput_writes
    saver.put_writes, saver.aput_writes = put_writes, aput_writes


def perform(job: dict[str, Any]) -> Any:
    """Do ``job`` in this process; gives what is printed of it."""
    with drivers(job["how"]) as driver, opened(job["saver"], driver, job["at"]) as saver:
        if job.get("die"):
            dying(saver, job["die"])
        cache = DiskCache(job["cache"]) if job.get("cache") else None
        try:
            return _acts(job, driver, graph(job, saver, cache))
        finally:
            if cache is not None:
                cache.close()


def _acts(job: dict[str, Any], driver: Driver, compiled: Any) -> Any:
    config = {"configurable": {"thread_id": job["thread"]}}
    results = []
    for act in job["acts"]:
        given: Any = {"query": "hello"} if act == "run" else None
        if isinstance(act, dict):
            given = Command(resume=act["answer"])
        results.append(seen(driver.call(compiled, "invoke", given, config, durability="sync")))
    history = driver.listed(compiled, "get_state_history", config)
    told = [results, seen(driver.call(compiled, "get_state", config)), [seen(s) for s in history]]
    return json.loads(json.dumps(told))


if __name__ == "__main__":
    print(json.dumps(perform(json.loads(sys.argv[1]))))
