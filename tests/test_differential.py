"""While it runs its nodes, a graph with policies is plain LangGraph in every observable way.

The same graphs are built with both classes and driven alike, in mode ``refresh``; whatever can be
seen from outside is compared after ids and times are taken out. LangGraph's own test suite, run
with this class in place of the original, is the larger half of this (``make test-langgraph``).
"""

from __future__ import annotations

import asyncio
import operator
import re
import sys
from collections.abc import Callable
from typing import Annotated, Any

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableConfig, RunnableLambda
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.config import get_stream_writer
from langgraph.errors import NodeError, NodeTimeoutError
from langgraph.graph import END, START
from langgraph.graph import StateGraph as LangGraphStateGraph
from langgraph.graph.message import add_messages
from langgraph.types import Command, RetryPolicy, Send, interrupt
from typing_extensions import TypedDict

from langgraph_perf import CachePolicy, MemoryCache, StateGraph

ASYNC_CONTEXT = sys.version_info >= (3, 11)
"""Whether the nodes of LangGraph's own async runs have a context: before, they have no custom
stream, by whatever name they ask for it, and a model knows its run only from a config."""
MODES = ["values", "updates", "messages", "custom", "checkpoints", "tasks", "debug"]


class State(TypedDict, total=False):
    query: str
    messages: Annotated[list[Any], add_messages]
    path: Annotated[list[str], operator.add]


def normal(value: Any) -> str:
    """The text of ``value`` without ids, times and addresses."""
    text = repr(value)
    text = re.sub(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", "ID", text)
    text = re.sub(r"\d{4}-\d\d-\d\dT[\d:.]+\+00:00", "TIME", text)
    text = re.sub(r"\b[0-9a-f]{32}\b", "HASH", text)
    text = re.sub(r"'\d{32}\.[\d.]+'", "VERSION", text)
    return re.sub(r"0x[0-9a-f]+", "ADDRESS", text)


class Twin:
    """One of the two classes, with the policies and the config that go with it."""

    def __init__(self, ours: bool) -> None:
        self.ours = ours

    def builder(self, schema: Any = State, **kwargs: Any) -> Any:
        return (StateGraph if self.ours else LangGraphStateGraph)(schema, **kwargs)

    def policy(self) -> dict[str, Any]:
        return {"cache_policy": CachePolicy(version=1)} if self.ours else {}

    def cache(self) -> dict[str, Any]:
        return {"cache": MemoryCache()} if self.ours else {}

    def config(self, thread: str = "t") -> Any:
        # the twin without a cache is told to refresh it as well: it is in its checkpoints, too
        control = {"mode": "refresh"}
        return {"configurable": {"thread_id": thread, "cache_control": control}}


def same(scenario: Callable[[Twin], Any]) -> None:
    plain, ours = normal(scenario(Twin(False))), normal(scenario(Twin(True)))
    assert ours == plain


async def asame(scenario: Callable[[Twin], Any]) -> None:
    plain, ours = normal(await scenario(Twin(False))), normal(await scenario(Twin(True)))
    assert ours == plain


def everything(twin: Twin, context: bool = True) -> Any:
    """A streaming model, a chain, a custom stream, a subgraph, a Command and a Send."""
    model = GenericFakeChatModel(messages=iter([AIMessage(f"word by word {i}") for i in range(9)]))

    def talk(state: State, config: RunnableConfig) -> State:
        if not context:
            return {"messages": [model.invoke(state["messages"], config)]}
        get_stream_writer()({"talking": True})
        return {"messages": [model.invoke(state["messages"])]}

    chain = (
        ChatPromptTemplate.from_messages([("human", "{query}")])
        | RunnableLambda(lambda prompt: prompt.to_messages()[-1].content, name="last")
        | RunnableLambda(lambda text: {"path": [text]}, name="wrap")
    )

    def route(state: State) -> Command[Any]:
        return Command(update={"path": ["route"]}, goto=[Send("leaf", {"query": "sent"})])

    def leaf(state: State, config: RunnableConfig) -> State:
        return {"path": [f"leaf {state['query']}"]}

    inner = twin.builder()
    inner.add_node("inner_work", lambda state: {"path": ["inner"]}, **twin.policy())
    inner.add_edge(START, "inner_work")

    builder = twin.builder()
    builder.add_node("talk", talk, **twin.policy())
    builder.add_node("chain", chain, **twin.policy())
    builder.add_node("sub", inner.compile(), **twin.policy())
    builder.add_node("route", route, destinations=("leaf",), **twin.policy())
    builder.add_node("leaf", leaf, **twin.policy())
    builder.add_edge(START, "talk").add_edge("talk", "chain").add_edge("chain", "sub")
    builder.add_edge("sub", "route")
    return builder.compile(checkpointer=InMemorySaver(), **twin.cache())


INPUT: Any = {"query": "q", "messages": [HumanMessage("hi", id="1")], "path": []}


@pytest.mark.parametrize("subgraphs", [False, True])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_every_stream_mode(version: str, subgraphs: bool) -> None:
    """All stream modes at once, in both versions, with and without subgraphs."""

    def scenario(twin: Twin) -> Any:
        return list(
            everything(twin).stream(
                INPUT, twin.config(), stream_mode=MODES, version=version, subgraphs=subgraphs
            )
        )

    same(scenario)


async def test_every_stream_mode_async() -> None:
    """The same, awaited."""

    async def scenario(twin: Twin) -> Any:
        graph = everything(twin, ASYNC_CONTEXT)
        return [
            chunk
            async for chunk in graph.astream(
                INPUT, twin.config(), stream_mode=MODES, subgraphs=True
            )
        ]

    await asame(scenario)


async def test_events() -> None:
    """Callback events of every run, with their names, tags, parents and payloads."""

    async def scenario(twin: Twin) -> Any:
        graph = everything(twin, ASYNC_CONTEXT)
        events = [e async for e in graph.astream_events(INPUT, twin.config(), version="v2")]
        return [(e["event"], e["name"], sorted(e["tags"]), len(e["parent_ids"])) for e in events]

    await asame(scenario)


def test_callbacks() -> None:
    """What a sync callback handler is told: every run's start, with its name, tags and parent."""

    class Recorder(BaseCallbackHandler):
        run_inline = True

        def __init__(self) -> None:
            self.seen: list[Any] = []
            self.names: dict[Any, str] = {}

        def on_chain_start(self, serialized: Any, inputs: Any, **kwargs: Any) -> None:
            self.names[kwargs["run_id"]] = kwargs["name"]
            parent = self.names.get(kwargs.get("parent_run_id"))
            self.seen.append((kwargs["name"], sorted(kwargs.get("tags") or ()), parent))

        def on_chain_end(self, outputs: Any, **kwargs: Any) -> None:
            self.seen.append(("end", self.names[kwargs["run_id"]]))

    def scenario(twin: Twin) -> Any:
        recorder = Recorder()
        everything(twin).invoke(INPUT, {**twin.config(), "callbacks": [recorder]})
        return recorder.seen

    same(scenario)


def test_state_history_and_subgraph_state() -> None:
    """Snapshots, history with metadata, and the state of subgraphs."""

    def scenario(twin: Twin) -> Any:
        graph = everything(twin)
        graph.invoke(INPUT, twin.config())
        names = [name for name, _ in graph.get_subgraphs(recurse=True)]
        history = list(graph.get_state_history(twin.config()))
        return graph.get_state(twin.config(), subgraphs=True), names, history

    same(scenario)


def test_time_travel_and_forks() -> None:
    """Replaying from each earlier checkpoint, and going on from an edited one."""

    def scenario(twin: Twin) -> Any:
        graph = everything(twin)
        graph.invoke(INPUT, twin.config())
        seen = []
        for snapshot in list(graph.get_state_history(twin.config()))[::2]:
            config = snapshot.config
            config["configurable"]["cache_control"] = {"mode": "refresh"}
            seen.append(graph.invoke(None, config)["path"])
        edited = graph.update_state(twin.config(), {"path": ["edited"]}, as_node="chain")
        edited["configurable"]["cache_control"] = {"mode": "refresh"}
        seen.append(graph.invoke(None, edited)["path"])
        return seen

    same(scenario)


def test_interrupts() -> None:
    """Several interrupts in one node, resumed one after the other and by id, with a subgraph."""

    def scenario(twin: Twin) -> Any:
        def ask(state: State) -> State:
            first = interrupt("one?")
            second = interrupt("two?")
            return {"path": [first, second]}

        inner = twin.builder().add_node("ask", ask, **twin.policy()).add_edge(START, "ask")
        builder = twin.builder()
        builder.add_node("asking", ask, **twin.policy())
        builder.add_node("sub", inner.compile(), **twin.policy())
        builder.add_node("end", lambda state: {"path": ["end"]}, **twin.policy())
        builder.add_edge(START, "asking").add_edge("asking", "sub").add_edge("sub", "end")
        graph = builder.compile(checkpointer=InMemorySaver(), **twin.cache())
        seen = [graph.invoke({"path": []}, twin.config())]
        for answer in "abcd":
            state = graph.get_state(twin.config())
            waiting = state.tasks[0].interrupts[0].id
            resume = answer if answer in "ac" else {waiting: answer}
            seen.append(list(graph.stream(Command(resume=resume), twin.config())))
        return seen, list(graph.get_state_history(twin.config()))

    same(scenario)


@pytest.mark.parametrize("durability", ["sync", "async", "exit"])
def test_static_interrupts_and_durability(durability: Any) -> None:
    """Stops before and after nodes, in every durability mode."""

    def scenario(twin: Twin) -> Any:
        graph = everything(twin)
        seen = [
            graph.invoke(
                INPUT,
                twin.config(),
                interrupt_before=["chain"],
                interrupt_after=["sub"],
                durability=durability,
            )
        ]
        seen.append(graph.get_state(twin.config()).next)
        seen.append(graph.invoke(None, twin.config(), durability=durability)["path"])
        return seen, [s.values for s in graph.get_state_history(twin.config())]

    same(scenario)


async def test_timeouts_retries_and_error_handlers() -> None:
    """An attempt that times out is retried; an error reaches its handler; both leave the same."""

    async def scenario(twin: Twin) -> Any:
        attempts: list[int] = []

        async def slow(state: State) -> State:
            attempts.append(1)
            if len(attempts) < 2:
                await asyncio.sleep(30)
            return {"path": ["slow"]}

        def broken(state: State) -> State:
            raise ValueError("broken")

        def handler(state: State, error: NodeError) -> State:
            return {"path": [f"handled {error.error!r}"]}

        builder = twin.builder()
        builder.add_node(
            "slow",
            slow,
            timeout=1.5,  # the second attempt must not take it, however busy the machine
            retry_policy=RetryPolicy(
                initial_interval=0.01, jitter=False, retry_on=NodeTimeoutError
            ),
            **twin.policy(),
        )
        builder.add_node("broken", broken, error_handler=handler, **twin.policy())
        builder.add_edge(START, "slow").add_edge("slow", "broken")
        graph = builder.compile(checkpointer=InMemorySaver(), **twin.cache())
        chunks = [
            c
            async for c in graph.astream(
                {"path": []}, twin.config(), stream_mode=["updates", "tasks"]
            )
        ]
        return chunks, len(attempts)

    await asame(scenario)


def test_errors_pass_unchanged() -> None:
    """An exception is the node's own object, with its notes, cause and context."""

    def scenario(twin: Twin) -> Any:
        original = ValueError("broken")

        def broken(state: State) -> State:
            try:
                raise KeyError("inner")
            except KeyError as exc:
                raise original from exc

        builder = twin.builder().add_node("broken", broken, **twin.policy())
        graph = builder.add_edge(START, "broken").compile(**twin.cache())
        with pytest.raises(ValueError, match="broken") as caught:
            graph.invoke({"path": []})
        assert caught.value is original
        notes = getattr(original, "__notes__", [])
        return notes, original.__cause__, original.__context__

    same(scenario)


@pytest.mark.parametrize("error", [StopIteration("x"), KeyboardInterrupt(), SystemExit(3)])
def test_odd_exceptions_pass_unchanged(error: BaseException) -> None:
    """Even exceptions that generators and interpreters treat specially come out as in LangGraph."""

    def scenario(twin: Twin) -> Any:
        def node(state: State) -> State:
            raise error

        builder = twin.builder().add_node("node", node, **twin.policy())
        graph = builder.add_edge(START, "node").compile(**twin.cache())
        try:
            graph.invoke({"path": []})
        except BaseException as exc:
            return type(exc), str(exc)
        return None

    same(scenario)


def test_a_branch_sees_the_state_after_the_node() -> None:
    """Conditional edges read what the node wrote, as fresh as ever."""

    def scenario(twin: Twin) -> Any:
        builder = twin.builder()
        builder.add_node("a", lambda state: {"path": ["a"]}, **twin.policy())
        builder.add_conditional_edges(
            "a", lambda state: END if len(state["path"]) > 2 else "a", ["a", END]
        )
        graph = builder.add_edge(START, "a").compile(**twin.cache())
        return graph.invoke({"path": []}), graph.get_graph().to_json()

    same(scenario)


def test_drawings_and_schemas() -> None:
    """Drawings, schemas and the list of subgraphs do not show the cache."""

    def scenario(twin: Twin) -> Any:
        graph = everything(twin)
        return (
            graph.get_graph(xray=True).to_json(),
            graph.get_graph().draw_mermaid(),
            graph.get_input_jsonschema(),
            graph.get_output_jsonschema(),
            [type(node.bound) for node in graph.nodes.values()],
        )

    same(scenario)
