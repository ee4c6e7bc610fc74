"""The private parts of LangGraph that this library leans on, each with a test that fails loudly
when LangGraph changes it."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from langchain_core.runnables import RunnableConfig
from langgraph._internal import _constants
from langgraph._internal._runnable import RunnableCallable, RunnableSeq
from langgraph._internal._scratchpad import PregelScratchpad
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START
from langgraph.graph.state import CompiledStateGraph
from langgraph.pregel import Pregel
from langgraph.pregel._read import PregelNode
from langgraph.types import interrupt
from typing_extensions import TypedDict

from langgraph_perf import CachePolicy, MemoryCache, StateGraph
from langgraph_perf._binding import BINDING
from langgraph_perf.node import CachedSeq


class State(TypedDict, total=False):
    query: str
    answer: str


def build(node: Any, **kwargs: Any) -> Any:
    builder = StateGraph(State).add_node("node", node, cache_policy=CachePolicy(version=1))
    return builder.add_edge(START, "node").compile(cache=MemoryCache(), **kwargs)


def test_a_task_runs_what_stands_under_node() -> None:
    """LangGraph derives ``node`` lazily and once, so that giving it beforehand replaces it."""
    assert "node" not in vars(build(lambda state: None).nodes["__start__"])
    prepared = PregelNode(channels="x", triggers=["x"], bound=build(lambda state: None))
    marker = prepared.__dict__["node"] = object()
    assert prepared.node is marker  # type: ignore[comparison-overlap]


def test_the_sequence_runs_its_first_step_as_the_node() -> None:
    """``CachedSeq`` has the node first and then only writers, as LangGraph's own sequence has."""
    graph = build(lambda state: None)
    sequence = graph.nodes["node"].node
    assert isinstance(sequence, CachedSeq)
    node = graph.nodes["node"]
    own = RunnableSeq(node.bound, *node.flat_writers)
    assert sequence.steps[1:] == own.steps[1:]
    assert vars(sequence).keys() == vars(own).keys()


def test_the_scratchpad_tells_of_interrupts() -> None:
    """``interrupt()`` counts on the scratchpad of its task, and takes resume values from it."""
    names = {field.name for field in dataclasses.fields(PregelScratchpad)}
    assert {"interrupt_counter", "get_null_resume", "resume"} <= names
    seen: list[bool] = []

    def node(state: State, config: RunnableConfig) -> State:
        pad = config["configurable"][_constants.CONFIG_KEY_SCRATCHPAD]
        seen.append(isinstance(pad, PregelScratchpad))
        return {"answer": interrupt("?")}

    graph = build(node, checkpointer=InMemorySaver())
    assert "__interrupt__" in graph.invoke({}, {"configurable": {"thread_id": "1"}})
    assert seen == [True]


def test_entry_points_go_through_stream_and_astream() -> None:
    """Every way into a run passes the two methods in which the cache is handed to the nodes."""
    own = set(vars(type(build(lambda state: None))))
    assert {"stream", "astream"} <= own
    assert not {"invoke", "ainvoke", "batch", "abatch", "stream_events"} & own
    assert Pregel.invoke.__code__.co_names.count("stream") == 1
    assert "astream" in Pregel.ainvoke.__code__.co_names


def test_compile_has_no_hook_for_its_class() -> None:
    """``compile()`` makes LangGraph's class itself, whose instances can become ours."""
    assert type(build(lambda state: None)).__mro__[1] is CompiledStateGraph


def test_what_is_bound_leaks_nowhere() -> None:
    """What travels to the nodes is in no debug event, snapshot, checkpoint or history."""
    saver = InMemorySaver()
    graph = build(lambda state: {"answer": "done"}, checkpointer=saver)
    config: Any = {"configurable": {"thread_id": "1"}}
    events = list(
        graph.stream({"query": "q"}, config, stream_mode=["debug", "tasks", "checkpoints"])
    )
    assert events
    leaks = [events, graph.get_state(config), list(graph.get_state_history(config))]
    leaks += [list(saver.list(config)), saver.storage, graph.config]
    assert BINDING not in repr(leaks)
    assert "langgraph_perf run" not in repr(leaks)


def test_a_forgotten_thread_id_is_langgraphs_own_error() -> None:
    """Without a thread_id the run fails with LangGraph's message, not with a KeyError."""
    graph = build(lambda state: None, checkpointer=InMemorySaver())
    try:
        graph.invoke({"query": "q"})
    except ValueError as exc:
        assert "thread_id" in str(exc)  # noqa: PT017
    else:
        raise AssertionError("it ran")


async def test_a_sync_node_calls_what_stands_under_afunc() -> None:
    """What takes its place in a copy of the node is given the arguments of the function."""
    step = StateGraph(State).add_node("node", lambda state, more: {}).nodes["node"].runnable
    assert isinstance(step, RunnableCallable)
    assert callable(step.func)

    async def instead(state: State, more: int) -> State:
        return {"answer": f"{state} {more}"}

    step = copy.copy(step)
    step.afunc = instead
    assert await step.ainvoke({"query": "q"}, more=1) == {"answer": "{'query': 'q'} 1"}
