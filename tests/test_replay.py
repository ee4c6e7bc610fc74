"""Replay: fresh ids for what the node made, the current input's ids for what it refers to."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import uuid
from collections.abc import Callable
from typing import Annotated, Any, TypedDict

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    AnyMessage,
    BaseMessage,
    HumanMessage,
    RemoveMessage,
    SystemMessage,
    ToolMessage,
)
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import REMOVE_ALL_MESSAGES, add_messages
from langgraph.types import Command, Overwrite, Send
from pydantic import BaseModel, ConfigDict

from langgraph_perf import codec
from langgraph_perf.codec import Allowlist, DecodeError, EncodeError
from langgraph_perf.replay import pack_result, spent_tokens, unpack_result


@dataclasses.dataclass
class Data:
    messages: list[Any]
    note: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    messages: tuple[Any, ...]


class Model(BaseModel):
    model_config = ConfigDict(arbitrary_types_allowed=True, extra="allow")

    messages: list[AnyMessage]


def call(call_id: str | None, name: str = "search", **args: Any) -> dict[str, Any]:
    return {"name": name, "args": args, "id": call_id, "type": "tool_call"}


def conversation(tag: str) -> list[BaseMessage]:
    """A conversation whose content is always the same, under ids that contain ``tag``."""
    return [
        SystemMessage("be brief", id=f"s-{tag}"),
        HumanMessage("weather?", id=f"h-{tag}"),
        AIMessage("", id=f"a-{tag}", tool_calls=[call(f"call_1{tag}"), call(f"call_2{tag}", q=1)]),
        ToolMessage("sunny", id=f"t-{tag}", tool_call_id=f"call_1{tag}"),
    ]


def replayed(node: Callable[[Any], Any], one: Any, other: Any) -> tuple[Any, Any]:
    """What ``node`` returned for ``one``, and its replay for ``other``."""
    result = node(one)
    return result, unpack_result(pack_result(result, one), other)


def is_uuid(text: str | None) -> bool:
    return str(uuid.UUID(text)) == text


def test_a_result_without_messages_costs_nothing():
    """Its payload is the codec's own, and the state is not even looked at."""

    class Untouchable(dict):
        def values(self) -> Any:
            raise AssertionError("looked at")

        __iter__ = keys = items = values  # type: ignore[assignment]

    state = Untouchable(a=1)
    for result in (
        {"a": [1, "x"], "id": "call_1"},
        {"question": "what is it?", "long": "x" * 129, "type": "ai"},
        None,
        [Command(goto="x")],
        [{"tool_call": 1}, "tool call"],
        [{"content": "", "id": "1"}],
        b"R",
    ):
        payload = pack_result(result, state)
        assert payload == codec.encode(result)
        assert unpack_result(payload, state) == result


def test_created_messages_get_fresh_ids_on_every_replay():
    """Each replay has ids of its own; messages without id stay without."""
    result = {"messages": [AIMessage("a", id="run-1"), AIMessage("b")]}
    payload = pack_result(result, {"messages": []})
    first, second = (unpack_result(payload, {"messages": []})["messages"] for _ in range(2))
    assert is_uuid(first[0].id)
    assert is_uuid(second[0].id)
    assert len({"run-1", first[0].id, second[0].id}) == 3
    assert first[1].id is second[1].id is None
    assert [m.content for m in first] == ["a", "b"]


def test_asking_a_b_a_keeps_all_six_messages():
    """In one thread, replaying the first answer appends it instead of overwriting it."""
    stored: dict[str, bytes] = {}
    runs: list[str] = []

    class State(TypedDict):
        messages: Annotated[list[AnyMessage], add_messages]

    def answer(state: State) -> Any:
        question = state["messages"][-1].content
        if question in stored:
            return unpack_result(stored[question], state)
        runs.append(question)
        result = {"messages": [AIMessage(f"about {question}", id=f"run-{question}")]}
        stored[question] = pack_result(result, state)
        return result

    builder = StateGraph(State)
    builder.add_node("answer", answer)
    builder.add_edge(START, "answer")
    builder.add_edge("answer", END)
    graph = builder.compile()
    messages: list[Any] = []
    for question in "ABA":
        messages = graph.invoke({"messages": [*messages, HumanMessage(question)]})["messages"]
    assert runs == ["A", "B"]
    assert [m.content for m in messages] == ["A", "about A", "B", "about B", "A", "about A"]
    assert len({m.id for m in messages}) == 6


def test_tool_results_answer_the_calls_of_the_current_input():
    """What a tool node returned is replayed under the call ids of the input at hand."""

    def tools(state: Any) -> Any:
        return {
            "messages": [
                ToolMessage("x", id="new", tool_call_id=c["id"])
                for c in state["messages"][2].tool_calls
            ]
        }

    _, back = replayed(
        tools, {"messages": conversation("one")}, {"messages": conversation("other")}
    )
    assert [m.tool_call_id for m in back["messages"]] == ["call_1other", "call_2other"]
    assert back["messages"][0].id == back["messages"][1].id
    assert is_uuid(back["messages"][0].id)


def test_removals_and_edits_hit_the_current_inputs_messages():
    """Trimming, editing and returning history refer to the same messages under other ids."""

    def node(state: list[BaseMessage]) -> Any:
        edited = state[2].model_copy(update={"content": "edited"})
        return [RemoveMessage(id=state[1].id), edited, state[0], AIMessage("new", id="new")]

    one, other = conversation("one"), conversation("other")
    _, back = replayed(node, one, other)
    merged = add_messages(other, back)
    assert [m.content for m in merged] == ["be brief", "edited", "sunny", "new"]
    assert [m.id for m in merged[:3]] == ["s-other", "a-other", "t-other"]
    assert [c["id"] for c in merged[1].tool_calls] == ["call_1other", "call_2other"]
    assert is_uuid(merged[3].id)


def test_remove_all_is_an_instruction_and_stays():
    """RemoveMessage(REMOVE_ALL_MESSAGES) keeps its id, alone and with a history behind it."""
    result, back = replayed(
        lambda s: [RemoveMessage(id=REMOVE_ALL_MESSAGES), *s[1:]],
        conversation("one"),
        conversation("two"),
    )
    assert back[0] == result[0]
    assert back[1:] == conversation("two")[1:]
    alone = [RemoveMessage(id=REMOVE_ALL_MESSAGES)]
    assert pack_result(alone, []) == codec.encode(alone)


def test_a_removal_of_what_is_unknown_keeps_its_id():
    """A message that neither input nor result shows can only be named by the id it has."""
    kept = RemoveMessage(id="elsewhere")
    for more in ([], [AIMessage("x", id="new"), RemoveMessage(id="new")]):
        _, back = replayed(lambda s, m=more: [kept, *m, s[1]], conversation("1"), conversation("2"))
        assert back[0] == kept
        history = [HumanMessage("old", id="elsewhere"), *conversation("2")]
        assert "old" not in [m.content for m in add_messages(history, back[:1])]
        assert [m.id for m in back[-1:]] == ["h-2"]
    plain = [{"role": "remove", "content": "", "id": "elsewhere"}]
    assert unpack_result(pack_result(plain, []), []) == plain


WRAPS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "dict": (lambda m: {"messages": m}, lambda r: r["messages"]),
    "list": (lambda m: m, lambda r: r),
    "tuple": (lambda m: {"x": (1, tuple(m))}, lambda r: r["x"][1]),
    "dataclass": (lambda m: Data(m), lambda r: r.messages),
    "slots": (lambda m: Slotted(tuple(m)), lambda r: r.messages),
    "model": (lambda m: Model(messages=m), lambda r: r.messages),
    "extra": (lambda m: Model(messages=[], more=[m]), lambda r: r.more[0]),
    "command": (lambda m: Command(update={"messages": m}), lambda r: r.update["messages"]),
    "pairs": (lambda m: Command(update=[("messages", m)]), lambda r: r.update[0][1]),
    "data": (lambda m: [Command(update=Data(m)), {"a": 1}], lambda r: r[0].update.messages),
    "send": (lambda m: Command(goto=[Send("n", {"x": m})]), lambda r: r.goto[0].arg["x"]),
    "overwrite": (lambda m: {"messages": Overwrite(m)}, lambda r: r["messages"].value),
    "artifact": (
        lambda m: [ToolMessage("x", tool_call_id="", artifact={"sub": m})],
        lambda r: r[0].artifact["sub"],
    ),
    "other keys": (lambda m: {1: m, "b": 2}, lambda r: r[1]),
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS.keys())
def test_messages_are_found_wherever_they_lie(wrap):
    """References are rebound and creations renamed in every place a node may put messages."""
    into, out = wrap

    for nested in (False, True):

        def node(state: Any, nested: bool = nested) -> Any:
            history = out(state["field"] if nested else state)
            new = AIMessage("", id="new", tool_calls=[call("call_new")])
            return into([history[1], new, ToolMessage("x", tool_call_id="call_new", id="t")])

        states = into(conversation("one")), into(conversation("other"))
        one, other = ({"field": state} for state in states) if nested else states
        result, back = replayed(node, one, other)
        assert type(back) is type(result)
        human, ai, tool = out(back)
        assert human == conversation("other")[1]
        assert is_uuid(ai.id)
        assert is_uuid(tool.id)
        assert ai.id != tool.id
        assert ai.tool_calls[0]["id"] == tool.tool_call_id != "call_new"


def test_a_single_message_is_a_state_and_a_result():
    """A node of a Send may get, and return, one bare message."""
    one, other = HumanMessage("x", id="1"), HumanMessage("x", id="2")
    _, back = replayed(lambda m: m.model_copy(update={"content": "y"}), one, other)
    assert back == HumanMessage("y", id="2")


def test_one_created_id_stays_one_id():
    """A created message that is also removed, sent on, or returned twice keeps its identity."""
    new = AIMessage("x", id="new")
    result = Command(
        update={"messages": [new, RemoveMessage(id="new")], "last": new},
        goto=Send("n", {"message": new}),
    )
    back = unpack_result(pack_result(result, {}), {})
    ids = [m.id for m in back.update["messages"]] + [back.update["last"].id]
    assert {*ids, back.goto.arg["message"].id} == {ids[0]}
    assert is_uuid(ids[0])


def test_one_list_in_two_places_is_seen_in_both():
    """A result that shares a list between fields is rewritten in each of them."""
    shared = [AIMessage("x", id="new")]
    back = unpack_result(pack_result({"a": shared, "b": shared}, {}), {})
    assert back["a"] == back["b"]
    assert is_uuid(back["a"][0].id)


def everywhere(call_id: str) -> list[Any]:
    """One tool-call id in every place that knows it, and in text that merely equals it."""
    return [
        AIMessage(
            [
                {"type": "text", "text": call_id, "id": call_id},
                {"type": "tool_use", "id": call_id, "name": "f", "input": {"id": call_id}},
                {"type": "tool_call", "id": call_id, "name": "f", "args": {"id": call_id}},
                {"type": "function_call", "id": "fc_1", "call_id": call_id, "name": "f"},
                {"type": "tool_result", "tool_use_id": call_id, "content": call_id},
                {"type": "server_tool_result", "tool_call_id": call_id},
            ],
            id=call_id,
            name=call_id,
            tool_calls=[call(call_id, id=call_id)],
            invalid_tool_calls=[
                {"name": "f", "args": call_id, "id": call_id, "error": None, "type": "x"}
            ],
            additional_kwargs={
                "tool_calls": [
                    {"id": call_id, "type": "function", "function": {"arguments": call_id}}
                ],
                "__openai_function_call_ids__": {call_id: "fc_1"},
                "id": call_id,
            },
            response_metadata={"id": call_id, "tool_call_id": call_id},
        ),
        AIMessageChunk(
            "",
            tool_call_chunks=[
                {"name": "f", "args": "{}", "id": call_id, "index": 0, "type": "tool_call_chunk"},
                {"name": None, "args": "", "id": "", "index": 0, "type": "tool_call_chunk"},
                {"name": None, "args": "", "id": None, "index": 0, "type": "tool_call_chunk"},
            ],
        ),
        ToolMessage(call_id, tool_call_id=call_id, artifact=call_id),
    ]


def id_slots(messages: list[Any]) -> list[Any]:
    ai, chunk, tool = messages
    blocks = ai.content
    return [
        *(blocks[i]["id"] for i in (1, 2)),
        blocks[3]["call_id"],
        blocks[4]["tool_use_id"],
        blocks[5]["tool_call_id"],
        ai.tool_calls[0]["id"],
        ai.invalid_tool_calls[0]["id"],
        ai.additional_kwargs["tool_calls"][0]["id"],
        *ai.additional_kwargs["__openai_function_call_ids__"],
        chunk.tool_call_chunks[0]["id"],
        tool.tool_call_id,
    ]


@pytest.mark.parametrize("prefix", ["call_", "toolu_", "chatcmpl-tool-", ""])
def test_a_tool_call_id_is_rewritten_in_all_its_places_and_nowhere_else(prefix):
    """Every place of a created call id gets the same new one; equal text stays."""
    old = f"{prefix}0Ab1Cd2Ef3Gh"
    result = everywhere(old)
    back = unpack_result(pack_result(result, None), None)
    (new,) = set(id_slots(back))
    assert new != old
    assert new.startswith(prefix)
    assert len(new) == len(old)
    assert [c["id"] for c in back[1].tool_call_chunks[1:]] == ["", None]
    assert back[0].content[3]["id"].startswith("fc_")
    expected = copy.deepcopy(result)
    for message in (*back, *expected):
        message.id = None
    back[0].content[3]["id"] = "fc_1"
    assert codec.decode(codec.encode(back).replace(new.encode(), old.encode())) == expected


def test_a_tool_call_id_of_the_input_is_rebound_in_all_its_places():
    """Every place of an input's call id gets the id that call has now."""
    _, back = replayed(
        lambda state: everywhere(state[2].tool_calls[1]["id"]),
        conversation("1"),  # too short an id for equal text to be a reference
        conversation("another"),
    )
    assert set(id_slots(back)) == {"call_2another"}


def test_bare_tool_calls_are_rebound():
    """A node that was sent tool calls, not messages, answers the calls it is sent now."""

    def node(state: Any) -> Any:
        found = state[0] if type(state) is list else state["tool_call"]
        return {"messages": [ToolMessage("x", tool_call_id=found["id"])], "call": found}

    for wrap in (lambda c: [c], lambda c: {"__type": "tool_call_with_context", "tool_call": c}):
        _, back = replayed(node, wrap(call("call_1", q=1)), wrap(call("call_2", q=1)))
        assert back["messages"][0].tool_call_id == back["call"]["id"] == "call_2"
        payload = pack_result(node(wrap(call("call_1", q=1))), wrap(call("call_1", q=1)))
        with pytest.raises(DecodeError, match="another one"):
            unpack_result(payload, wrap(call("call_2", q=2)))


def test_calls_sent_on_match_the_message_that_made_them():
    """Tool calls in a Send keep matching the replayed AIMessage, without a message in the Send."""
    ai = AIMessage("", id="1", tool_calls=[call("call_1"), call("call_2")])
    result = Command(
        update={"messages": [ai]}, goto=[Send("tools", [one]) for one in ai.tool_calls]
    )
    back = unpack_result(pack_result(result, {}), {})
    ids = [one["id"] for one in back.update["messages"][0].tool_calls]
    assert [send.arg[0]["id"] for send in back.goto] == ids
    assert not {"call_1", "call_2"} & {*ids}
    assert [send.arg[0]["id"] for send in result.goto] == ["call_1", "call_2"]


def test_messages_in_dict_form_get_fresh_ids():
    """What LangGraph turns into messages is replayed like messages, alone or among them."""
    made = str(uuid.uuid4())
    for result in (
        [{"role": "assistant", "content": "x", "id": made}],
        [{"type": "ai", "content": [], "id": made}, AIMessage("x", id="other")],
        [AIMessage("x", id=made), {"role": "remove", "content": "", "id": made}],
        [{"role": "user", "content": "x", "id": made, "args": {}, "name": "n"}],
    ):
        payload = pack_result({"messages": result}, {})
        first, second = (
            [m["id"] if type(m) is dict else m.id for m in unpack_result(payload, {})["messages"]]
            for _ in range(2)
        )
        assert all(map(is_uuid, [*first, *second]))
        assert not {made, *first} & {*second}
        assert made not in first


def test_messages_in_dict_form_are_rebound():
    """An edit, a removal and a message returned in dict form hit those of the current input."""

    def node(state: Any) -> Any:
        return [
            {"role": "user", "content": "edited", "id": state[1].id},
            {"role": "remove", "content": "", "id": state[3].id},
            {"role": "assistant", "content": "new", "id": "new"},
        ]

    other = conversation("two")
    _, back = replayed(node, conversation("one"), other)
    assert [m["id"] for m in back[:2]] == ["h-two", "t-two"]
    assert is_uuid(back[2]["id"])
    assert [m.content for m in add_messages(other, back)] == ["be brief", "edited", "", "new"]


def test_references_to_messages_in_dict_form_are_rebound():
    """The input's messages may be in dict form as well; they are compared by content."""

    def talk(tag: str, text: str = "x") -> Any:
        return {"messages": [{"role": "user", "content": text, "id": f"h-{tag}"}]}

    def node(state: Any) -> Any:
        return [RemoveMessage(id=state["messages"][0]["id"]), *state["messages"]]

    _, back = replayed(node, talk("one"), talk("two"))
    assert [back[0].id, back[1]["id"]] == ["h-two", "h-two"]
    with pytest.raises(DecodeError, match="another one"):
        unpack_result(pack_result(node(talk("one")), talk("one")), talk("two", "y"))


def test_what_is_no_message_in_dict_form_is_left_alone():
    """Records that merely have some of a message's fields, and messages in tuple form."""
    new = AIMessage("x", id="new")
    result = {
        "messages": [
            {"role": "assistant", "content": ""},
            {"role": "assistant", "id": "h-one"},
            {"content": "x", "id": "h-one"},
            {"role": "user", "content": "x", "id": 1},
            {"type": "pdf", "content": "x", "id": "h-one"},
            {"role": ["user"], "content": "x", "id": "h-one"},
            ("user", "h-one"),
        ],
        "row": {"role": "user", "content": "x", "id": "h-one"},
    }
    state = {"messages": conversation("one")}
    for more in ([], [new]):
        payload = pack_result({**result, "more": more}, state)
        back = unpack_result(payload, {"messages": conversation("two")})
        assert {**back, "more": []} == {**result, "more": []}


def test_input_messages_without_id_are_matched_by_identity():
    """The very message of the input, returned, gets the id it has in the current input."""
    one = [HumanMessage("a"), HumanMessage("b")]
    other = [HumanMessage("a", id="1"), HumanMessage("b", id="2")]
    _, back = replayed(lambda state: [state[1], HumanMessage("b")], one, other)
    assert back == [HumanMessage("b", id="2"), HumanMessage("b")]
    _, back = replayed(lambda state: [state[1]], one, [HumanMessage("a"), HumanMessage("b")])
    assert back == [HumanMessage("b")]


def test_positions_do_not_depend_on_the_order_of_fields():
    """Equal states are equal whatever the order of their keys."""

    def state(tag: str) -> dict[str, Any]:
        return {"a": conversation(tag), "b": [HumanMessage("x", id=f"x-{tag}")]}

    turned = dict(reversed(state("two").items()))
    _, back = replayed(lambda s: [RemoveMessage(id=s["b"][0].id)], state("one"), turned)
    assert back[0].id == "x-two"


def test_one_message_twice_in_the_state_is_like_two_equal_ones():
    """A state read back from a checkpoint has copies where there was one object."""
    talk = conversation("one")
    one = {"last": talk[-1], "messages": talk, "zlast": HumanMessage("x", id="x-one")}
    other = {
        "last": conversation("two")[-1],
        "messages": conversation("two"),
        "zlast": HumanMessage("x", id="x-two"),
    }
    _, back = replayed(lambda s: [RemoveMessage(id=s["zlast"].id)], one, other)
    assert back[0].id == "x-two"


# -- keys that cover a part of the input ----------------------------------------------------------


def part_replayed(
    node: Callable[[Any], Any], key: Callable[[Any], Any], one: Any, other: Any
) -> Any:
    """What ``node`` returned for ``one`` is replayed for ``other``; the key is the same."""
    return unpack_result(pack_result(node(one), one, key(one)), other, keyed=key(other))


def asked(tag: str) -> list[BaseMessage]:
    return [
        HumanMessage("weather?", id=f"h-{tag}"),
        AIMessage("", id=f"a-{tag}", tool_calls=[call(f"call_{tag}")]),
    ]


def answers(state: list[BaseMessage]) -> Any:
    """As ``ToolNode`` does."""
    message: Any = state[-1]
    return [ToolMessage("sunny", tool_call_id=call["id"]) for call in message.tool_calls]


@pytest.mark.parametrize(
    "key",
    [
        lambda s: s[-1],
        lambda s: s[-1:],
        lambda s: s[-1].tool_calls,
        lambda s: {"field": s[-2:]},
    ],
)
def test_what_a_key_covers_is_where_messages_are_looked_for(key: Any) -> None:
    """The same call earlier in the conversation, which comes first, is not the one meant."""
    earlier = [*asked("A"), *answers(asked("A")), AIMessage("sunny", id="s")]
    for before in ([], earlier, [*earlier, *earlier]):
        (back,) = part_replayed(answers, key, asked("A"), [*before, *asked("B")])
        assert back.tool_call_id == "call_B"
        (back,) = part_replayed(answers, key, [*before, *asked("A")], asked("B"))
        assert back.tool_call_id == "call_B"


def test_the_last_message_is_removed_not_one_that_says_the_same() -> None:
    """With a key of its own or with the whole state in it."""
    one: list[BaseMessage] = [HumanMessage("bye", id="1")]
    other = [
        HumanMessage("bye", id="10"),
        HumanMessage("hi", id="11"),
        HumanMessage("bye", id="12"),
    ]

    def drop(state: list[BaseMessage]) -> Any:
        return [RemoveMessage(id=str(state[-1].id))]

    assert part_replayed(drop, lambda s: s[-1], one, other)[0].id == "12"

    def field(talk: list[BaseMessage], last: int) -> Any:
        return {"messages": talk, "last": talk[last]}

    # the inputs say the same, but what was one message is two now
    payload = pack_result([RemoveMessage(id=str(other[0].id))], field(other, 0), field(other, 0))
    assert unpack_result(payload, field(other, 0))[0].id == "10"
    with pytest.raises(DecodeError, match="more than one now"):
        unpack_result(payload, field(other, 2))


@pytest.mark.parametrize(
    ("key", "node"),
    [
        (lambda s: [(c["name"], c["args"]) for c in s[-1].tool_calls], answers),
        (lambda s: s[0].content, lambda s: [RemoveMessage(id=s[-1].id)]),
        (lambda s: s[-1], lambda s: [*answers(s), RemoveMessage(id=s[0].id)]),
        (lambda s: s[0].content, lambda s: [s[1]]),
    ],
)
def test_what_a_key_does_not_cover_has_to_be_alike(key: Any, node: Any) -> None:
    """Then the place tells which message is meant; else it could be any."""
    (*_, back) = part_replayed(node, key, asked("A"), asked("B"))
    (*_, want) = node(asked("B"))
    assert (back.id, getattr(back, "tool_call_id", "")) == (
        want.id,
        getattr(want, "tool_call_id", ""),
    )
    more = [*asked("B"), ToolMessage("sunny", tool_call_id="call_B", id="t"), *asked("C")]
    for other in (more, asked("B")[1:], [*asked("B"), *asked("B")]):
        with pytest.raises(DecodeError, match="does not cover"):
            unpack_result(
                pack_result(node(asked("A")), asked("A"), key(asked("A"))), other, keyed=0
            )


def test_where_a_message_without_id_comes_back_depends_on_the_key() -> None:
    """It takes the id that the same message has in the part the key covers."""
    one: list[BaseMessage] = [HumanMessage("hi"), HumanMessage("hi")]
    other: list[BaseMessage] = [HumanMessage("hi", id="1"), HumanMessage("hi", id="2")]
    (back,) = part_replayed(lambda s: [s[1]], lambda s: s[1:], one, other)
    assert back.id == "2"


# -- ids that the input gives as text --------------------------------------------------------------


@dataclasses.dataclass
class Told:
    call_id: str


@pytest.mark.parametrize(
    "given",
    [
        lambda i: {"call_id": i, "args": {"q": 1}},
        lambda i: {"id": i, "args": {}},
        lambda i: ("search", {}, i),
        lambda i: {"a": [{"b": {i}}]},
        lambda i: Told(i),
        lambda i: Send("tool", {"tool_call_id": i}),
        lambda i: {i: 1},
    ],
)
def test_an_id_that_the_node_was_told_stays(given: Any) -> None:
    """It is in the key, so that whoever hits has told the same."""
    for name in ("call_abcdefghij", "c1"):
        result = [ToolMessage("r", tool_call_id=name), HumanMessage("edited", id=name)]
        for state, keyed in ((given(name), given(name)), ({"x": given(name), "y": 1}, given(name))):
            payload = pack_result(result, state, keyed)
            answer, edit = unpack_result(payload, state, keyed=keyed)
            assert (answer.tool_call_id, edit.id) == (name, name)
            assert answer.id is None


def test_an_id_that_the_key_does_not_cover_is_not_stored() -> None:
    """Another input with the same key may tell another one."""
    state = {"call_id": "call_abcdefghij", "args": {"q": 1}}
    result = {"messages": [ToolMessage("r", tool_call_id="call_abcdefghij")]}
    with pytest.raises(EncodeError, match="key= has to"):
        pack_result(result, state, {"q": 1})
    # a short one may equal a text by chance
    pack_result({"messages": [AIMessage("r", id="1")]}, {"page": "1", "q": 1}, {"q": 1})
    endless: dict[str, Any] = {"q": 1}
    endless["self"] = endless
    pack_result({"messages": [AIMessage("r", id="run-12345678")]}, endless, {"q": 1})


# -- refusals -------------------------------------------------------------------------------------


def edited(state: list[BaseMessage]) -> Any:
    return [RemoveMessage(id=state[1].id)]


def answered(state: list[BaseMessage]) -> Any:
    return [ToolMessage("x", tool_call_id=state[2].tool_calls[0]["id"])]


def returned(state: list[BaseMessage]) -> Any:
    return [state[3]]


@pytest.mark.parametrize("node", [edited, answered, returned])
def test_a_reference_that_does_not_fit_is_refused(node):
    """Without the message it refers to, in its place and with its content, there is no replay."""
    payload = pack_result(node(conversation("one")), conversation("one"))
    unpack_result(payload, conversation("two"))
    other = conversation("two")
    for m in other:
        m.content = "something else"
    shifted = [SystemMessage("more", id="m"), *conversation("two")]
    for state in ([], None, {}, conversation("two")[:1], other, shifted):
        with pytest.raises(DecodeError, match="refers to an input message"):
            unpack_result(payload, state)


def test_a_reference_to_what_has_no_id_now_is_refused():
    """A removal cannot be rebound to a message that has no id yet."""
    payload = pack_result(edited(conversation("one")), conversation("one"))
    state = conversation("two")
    state[1].id = None
    with pytest.raises(DecodeError, match="no id now"):
        unpack_result(payload, state)


def test_only_what_is_referred_to_is_compared():
    """Other messages of the input may be different ones."""
    _, back = replayed(edited, conversation("one"), [AIMessage("!"), *conversation("two")[1:2]])
    assert back[0].id == "h-two"


LONG = "0a1b2c3d"
INPUT = conversation(LONG)
TEXTS: dict[str, tuple[Any, str]] = {
    "field": ({"last_id": INPUT[1].id}, "result['last_id']"),
    "call": ({"done": [1, INPUT[2].tool_calls[0]["id"]]}, "result['done'][1]"),
    "bare": (INPUT[1].id, "result"),
    "tuple": ([{"a": (INPUT[1].id,)}], "result[0]['a'][0]"),
    "set": ({"seen": {INPUT[1].id}}, "result['seen'] item"),
    "key": ({"seen": {INPUT[1].id: 1}}, "result['seen'] key"),
    "odd key": ({(1, INPUT[1].id): 1}, "result key[1]"),
    "data": (Data([], note=INPUT[1].id), "result.note"),
    "slots": (Slotted((INPUT[1].id,)), "result.messages[0]"),
    "model": (Model(messages=[], more=INPUT[1].id), "result.more"),
    "command": (Command(update={"x": INPUT[1].id}), "result.update['x']"),
    "send": (Command(goto=[Send("n", {"x": INPUT[1].id})]), "result.goto[0].arg['x']"),
    "artifact": (
        [ToolMessage("x", tool_call_id="", artifact={"of": INPUT[1].id})],
        "result[0].artifact['of']",
    ),
    "args": (
        [AIMessage("", tool_calls=[call("c", message=INPUT[1].id)])],
        "result[0].tool_calls[0]['args']['message']",
    ),
    "bare args": ([call("call_1", message=INPUT[1].id)], "result[0]['args']['message']"),
    "kwargs": ([AIMessage("", additional_kwargs={"a": INPUT[1].id})], "additional_kwargs['a']"),
    "plain": (
        [{"role": "tool", "content": "", "tool_call_id": INPUT[2].tool_calls[0]["id"]}],
        "result[0]['tool_call_id']",
    ),
}


@pytest.mark.parametrize(("result", "path"), TEXTS.values(), ids=TEXTS.keys())
def test_an_id_of_the_input_in_plain_text_is_refused(result, path):
    """Text cannot be rebound, and another input would be handed an id it does not know."""
    with pytest.raises(EncodeError, match="id of a message or tool call of the input") as info:
        pack_result(result, {"messages": INPUT})
    assert info.value.path.endswith(path)
    assert str(info.value).startswith(info.value.path)
    payload = pack_result(result, {"messages": conversation("other")})
    assert unpack_result(payload, {}) is not None


def test_the_call_ids_a_node_was_sent_are_refused_in_plain_text():
    """Tool calls sent without their message have ids of their run all the same."""
    with pytest.raises(EncodeError, match="id of a message or tool call"):
        pack_result({"done": "call_1234"}, [call("call_1234")])


def test_text_that_is_no_reference_is_stored():
    """Only an id as a whole counts, not a short one, and not what the messages themselves say."""
    human, ai = INPUT[1], INPUT[2]
    results = [
        {"a": f"{human.id} ", "b": f"[{human.id}]", "c": human.id.upper(), "d": human.id.encode()},
        [HumanMessage(human.id), AIMessage([{"type": "text", "text": human.id}])],
        [{"role": "user", "content": human.id}, {"type": "ai", "content": [human.id], "id": "1"}],
        [AIMessage("", response_metadata={"id": human.id})],
        [*INPUT, *everywhere("call_new")],
        [*ai.tool_calls],
        [{"role": "user", "content": "x", "id": human.id}],
    ]
    for result in results:
        payload = pack_result(result, {"messages": INPUT})
        unpack_result(payload, {"messages": conversation("another")})
    payload = pack_result({"a": "h-12345"}, [HumanMessage("x", id="h-12345")])
    assert unpack_result(payload, []) == {"a": "h-12345"}


def test_a_message_out_of_reach_is_refused():
    """A message that the codec stores but replay cannot find makes the result uncached."""
    with pytest.raises(EncodeError, match="cannot be given a new id"):
        pack_result({"a": np.array([AIMessage("x", id="1")], dtype=object)}, {})


def test_an_input_that_cannot_be_compared_is_refused():
    """A reference to a message whose content has no digest makes the result uncached."""
    state = [ToolMessage("x", id="1", tool_call_id="c", artifact=object())]
    with pytest.raises(EncodeError, match="cannot be compared"):
        pack_result([RemoveMessage(id="1")], state)


def test_types_are_subject_to_the_allowlist():
    """A result with a plan obeys the allowlist like any other."""
    payload = pack_result(Data([AIMessage("x", id="1")]), {})
    with pytest.raises(DecodeError, match="not allowed"):
        unpack_result(payload, {}, Allowlist(strict=True))
    assert type(unpack_result(payload, {}, Allowlist.of(Data, strict=True))) is Data


def test_odd_states_are_no_obstacle():
    """Cycles, densely connected objects and foreign ones in the state do neither hang nor fail."""

    @dataclasses.dataclass
    class Knot:
        others: list[Any] = dataclasses.field(default_factory=list)

    knots = [Knot() for _ in range(100)]
    for knot in knots:
        knot.others = knots
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    state = {"graph": knots, "deep": deep, "x": object(), "z": conversation("one")}
    other = {**state, "z": conversation("two")}
    _, back = replayed(lambda s: edited(s["z"]), state, other)
    assert back[0].id == "h-two"


def test_originals_are_left_alone():
    """Neither packing nor unpacking changes result, state or a later replay."""
    state = {"messages": conversation("one")}
    result = {"messages": [*state["messages"], *everywhere("call_x")], "data": Data([1])}
    before = codec.encode([state, result])
    payload = pack_result(result, state)
    back = unpack_result(payload, {"messages": conversation("two")})
    back["messages"][0].content = back["data"].messages[0] = "changed"
    again = unpack_result(payload, {"messages": conversation("three")})
    assert codec.encode([state, result]) == before
    assert again["messages"][0] == conversation("three")[0]
    assert again["data"] == result["data"]


PAYLOAD = pack_result([*conversation("one"), AIMessage("n", id="n")], conversation("one"))


@settings(max_examples=300, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_damage_is_decode_error(data):
    """Damaged and truncated payloads raise nothing but DecodeError."""
    damaged = bytearray(PAYLOAD)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(DecodeError):
        unpack_result(bytes(damaged), conversation("two"))
    cut = data.draw(st.integers(0, len(PAYLOAD) - 1))
    with pytest.raises(DecodeError):
        unpack_result(PAYLOAD[:cut], conversation("two"))


plain = st.none() | st.integers(-3, 5) | st.text(max_size=3)
entries = st.dictionaries(
    st.sampled_from(["carriers", "ids", "calls", "same", "inputs", "x"]),
    plain | st.lists(st.lists(plain, max_size=2), max_size=2) | st.dictionaries(plain, plain),
)


@settings(max_examples=200, suppress_health_check=list(HealthCheck))
@given(plain | st.lists(plain) | entries)
def test_a_nonsense_plan_is_decode_error(plan):
    """A well-formed payload with a plan of another shape raises nothing but DecodeError."""
    header = codec.encode(plan)
    payload = b"R" + len(header).to_bytes(4, "little") + header + codec.encode([AIMessage("x")])
    with pytest.raises(DecodeError):
        unpack_result(payload, conversation("two"))


# -- tokens ---------------------------------------------------------------------------------------


def test_spent_tokens_adds_up_what_the_messages_say():
    """Every message counts once, wherever it lies; results without usage spent nothing."""

    def ai(total: int) -> AIMessage:
        usage = {"input_tokens": 1, "output_tokens": total - 1, "total_tokens": total}
        return AIMessage("x", usage_metadata=usage)

    one = ai(10)
    assert spent_tokens({"messages": [one, HumanMessage("x")], "last": one}) == 10
    assert spent_tokens(Command(update=Data([ai(1)]), goto=[Send("n", ai(2))])) == 3
    assert spent_tokens([Model(messages=[ai(4)]), ai(5)]) == 9
    for nothing in (None, {}, "x", [1], {"usage_metadata": {"total_tokens": 1}}, AIMessage("x")):
        assert spent_tokens(nothing) == 0
    odd = AIMessage("x")
    odd.usage_metadata = {"total_tokens": "many"}
    assert spent_tokens(odd) == 0


def test_spent_tokens_never_raises():
    """A result that cannot even be looked at has spent nothing that is known of."""

    class Sealed(list):
        def __iter__(self) -> Any:
            raise RuntimeError("no")

    class Moody(AIMessage):
        def __getattribute__(self, name: str) -> Any:
            if name == "usage_metadata":
                raise LookupError(name)
            return super().__getattribute__(name)

    @dataclasses.dataclass
    class Hostile:
        x: Any = None

        def __getattribute__(self, name: str) -> Any:
            raise ValueError(name)

    for result in (Sealed([1]), {"a": Sealed([1])}, Moody("x"), Hostile()):
        assert spent_tokens(result) == 0


# -- any history ----------------------------------------------------------------------------------


@st.composite
def histories(draw: Any) -> list[tuple[str, Any]]:
    """Kinds of messages; an AI message comes with how many calls, a tool message with which."""
    rows: list[tuple[str, Any]] = []
    open_calls = 0
    for _ in range(draw(st.integers(0, 8))):
        kind = draw(st.sampled_from(["human", "ai", "tool"]))
        if kind == "human":
            rows.append((kind, draw(st.integers(0, 2))))
        elif kind == "ai":
            rows.append((kind, draw(st.integers(0, 3))))
            open_calls += rows[-1][1]
        elif open_calls:
            rows.append((kind, draw(st.integers(0, open_calls - 1))))
    return rows


def build(rows: list[tuple[str, Any]], tag: str, first_call: int = 0) -> list[BaseMessage]:
    made: list[BaseMessage] = []
    count = first_call
    for i, (kind, value) in enumerate(rows):
        if kind == "human":
            made.append(HumanMessage(f"text {value}", id=f"{tag}{i}"))
        elif kind == "ai":
            calls = [call(f"call_{tag}{count + k}", k=k) for k in range(value)]
            count += value
            made.append(AIMessage("", id=f"{tag}{i}", tool_calls=calls))
        else:
            made.append(ToolMessage("done", id=f"{tag}{i}", tool_call_id=f"call_{tag}{value}"))
    return made


ACTIONS = st.lists(
    st.tuples(st.sampled_from(["remove", "edit", "return", "answer", "new"]), st.integers(0, 7)),
    max_size=6,
)


def act(history: list[BaseMessage], actions: list[tuple[str, int]], tag: str) -> list[Any]:
    """What a node does with a history; ids it makes up itself carry its own ``tag``."""
    result: list[Any] = []
    calls = [c["id"] for m in history for c in getattr(m, "tool_calls", [])]
    for n, (action, at) in enumerate(actions):
        if action == "new":
            new = call(f"call_{tag}{n}")
            result.append(AIMessage("", id=f"{tag}{n}", tool_calls=[new]))
            result.append(ToolMessage("ok", id=f"{tag}t{n}", tool_call_id=new["id"]))
            if at % 2:
                result.append(RemoveMessage(id=f"{tag}{n}"))
        elif action == "answer" and calls:
            result.append(ToolMessage("ok", id=f"{tag}{n}", tool_call_id=calls[at % len(calls)]))
        elif history and action != "answer":
            message = history[at % len(history)]
            if action == "remove":
                result.append(RemoveMessage(id=message.id))
            elif action == "edit":
                result.append(message.model_copy(update={"content": "edited"}))
            else:
                result.append(message)
    return result


def identities(messages: list[Any]) -> list[tuple[str, str]]:
    """Every id in order of appearance, marked as message or call."""
    found = []
    for m in messages:
        found.append(("message", m.id))
        found += [("call", c["id"]) for c in getattr(m, "tool_calls", [])]
        if isinstance(m, ToolMessage):
            found.append(("call", m.tool_call_id))
    return found


@settings(max_examples=200, suppress_health_check=list(HealthCheck))
@given(histories(), ACTIONS)
def test_a_replay_is_what_the_node_would_have_returned_up_to_fresh_ids(rows, actions):
    """On any history: references name the same messages and calls, creations are new, all agree."""
    one, other = build(rows, "one"), build(rows, "two")
    result = act(one, actions, "made")
    before = codec.encode([one, other, result])
    back = unpack_result(pack_result({"messages": result}, one), other)["messages"]
    assert codec.encode([one, other, result]) == before

    expected = act(other, actions, "made")
    assert [type(m) for m in back] == [type(m) for m in expected]
    assert [m.content for m in back] == [m.content for m in expected]
    renamed: dict[tuple[str, str], str] = {}
    for want, got in zip(identities(expected), identities(back), strict=True):
        assert want[0] == got[0]
        assert renamed.setdefault(want, got[1]) == got[1]
    assert len({*renamed.values()}) == len(renamed)
    for (_, want), got in renamed.items():
        assert ("made" in want) == (want != got)
        assert "made" not in got
    merged, wanted = add_messages(other, back), add_messages(other, expected)
    assert [m.content for m in merged] == [m.content for m in wanted]
