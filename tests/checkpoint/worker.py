"""A graph run by a process of its own, which may have to die on the way.

``python -m tests.checkpoint.worker`` with a JSON object as its argument:

* ``how``: ``"sync"`` or ``"async"``
* ``saver``: ``"sqlite"`` or ``"postgres"``; ``at``: its file or DSN
* ``cache``: the directory of a ``DiskCache``, or nothing for a plain LangGraph graph
* ``ran``: the file to which each body that runs adds a line with the name of its node
* ``acts``: what to do to the thread ``thread``: ``"run"``, ``"go_on"`` or ``{"answer": ...}``
* ``die``: kill this process when the results of the node of this name, which writes the field of
  the same name, are about to be written

It prints, as JSON, the result of each act, and then the state and the history.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
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


def graph(
    job: dict[str, Any], saver: Any, cache: Any, written: threading.Event | None = None
) -> Any:
    def ran(name: str) -> None:
        with Path(job["ran"]).open("a") as file:
            file.write(f"{name}\n")

    def work(state: State) -> State:
        ran("work")
        # of what threads and tasks write at the side, the killed process must not lose more or less
        assert written is None or written.wait(60)
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


def dying(saver: Any, node: str) -> threading.Event:
    """Die instead of writing the results of ``node``, on their own or in a checkpoint.

    Gives what is set once results of other nodes have been written.
    """
    written = threading.Event()

    def wrapped(write: Any) -> Any:
        @functools.wraps(write)
        def call(config: Any, what: Any, *args: Any) -> Any:
            die(what)
            done = write(config, what, *args)
            if isinstance(what, Sequence):
                written.set()
            return done

        @functools.wraps(write)
        async def acall(config: Any, what: Any, *args: Any) -> Any:
            die(what)
            done = await write(config, what, *args)
            if isinstance(what, Sequence):
                written.set()
            return done

        return acall if inspect.iscoroutinefunction(write) else call

    def die(what: Any) -> None:
        names = what["channel_values"] if isinstance(what, Mapping) else dict(what)
        if node in names:
            os.kill(os.getpid(), signal.SIGKILL)

    for name in ("put", "aput", "put_writes", "aput_writes"):
        setattr(saver, name, wrapped(getattr(saver, name)))
    return written


def perform(job: dict[str, Any]) -> Any:
    """Do ``job`` in this process; gives what is printed of it."""
    with drivers(job["how"]) as driver, opened(job["saver"], driver, job["at"]) as saver:
        written = dying(saver, job["die"]) if job.get("die") else None
        cache = DiskCache(job["cache"]) if job.get("cache") else None
        try:
            return _acts(job, driver, graph(job, saver, cache, written))
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
