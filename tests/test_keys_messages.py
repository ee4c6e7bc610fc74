"""Keys of messages: what they say counts; generated ids and metadata do not."""

from __future__ import annotations

import copy
import dataclasses
import enum
import gc
import random
import threading
import uuid
import weakref
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    HumanMessageChunk,
    RemoveMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.messages.content import create_text_block
from pydantic import BaseModel, ConfigDict, PrivateAttr

from langgraph_perf import _messages_again, _messages_key
from langgraph_perf.keys import Unkeyable, digest, forget, message_digest


@pytest.fixture(autouse=True)
def _nothing_remembered():
    forget()
    yield
    forget()


def key(value: Any) -> str:
    """The digest of a value, asked for twice: only then are its conversations remembered."""
    first, again = digest(("state", value)), digest(("state", value))
    assert first == again
    return again


def fresh_key(value: Any) -> str:
    """The digest of a value of which nothing is remembered."""
    forget()
    return key(value)


def new_id() -> str:
    return f"call_{uuid.uuid4().hex}"


def call(name: str, tool_id: str, **args: Any) -> dict[str, Any]:
    return {"name": name, "args": args, "id": tool_id, "type": "tool_call"}


def loop(*, query: str = "weather", answer: str = "sunny") -> list[BaseMessage]:
    """An agent's loop as a model and its tools would produce it, with ids made anew."""
    one, two = new_id(), new_id()
    raw = [
        {"id": one, "type": "function", "function": {"name": "find", "arguments": "{}"}},
        {
            "id": two,
            "type": "function",
            "function": {"name": "look", "arguments": f'{{"q": "{query}"}}'},
        },
    ]
    return [
        HumanMessage("hello", id=str(uuid.uuid4())),
        AIMessage(
            "",
            id=f"run-{uuid.uuid4()}",
            tool_calls=[call("find", one), call("look", two, q=query)],
            additional_kwargs={"tool_calls": raw},
            response_metadata={"id": str(uuid.uuid4()), "latency": random.random()},
            usage_metadata={
                "input_tokens": 1,
                "output_tokens": random.randrange(99),
                "total_tokens": 1,
            },
        ),
        ToolMessage("found", tool_call_id=one, name="find"),
        ToolMessage(answer, tool_call_id=two, name="look"),
        AIMessage(f"It is {answer}.", id=f"run-{uuid.uuid4()}"),
    ]


# -- what does not count --------------------------------------------------------------------------


def test_messages_are_hashed_so_that_nobody_can_forge_them():
    """With SHA-256: two conversations that share a digest would share their answers."""
    message = HumanMessage("hello")
    assert _messages_key._alone(message, 0).hash.name == "sha256"
    assert len(message_digest(message)) == 32


def test_a_rerun_of_an_agent_loop_has_the_same_key():
    """Fresh message ids, tool-call ids and metadata do not change the key; an answer does."""
    assert key(loop()) == key(loop())
    assert key({"messages": loop(), "n": 1}) == key({"messages": loop(), "n": 1})
    assert key(loop()) != key(loop(answer="rainy"))
    assert key(loop()) != key(loop(query="time"))


def test_ids_count_by_position_wherever_messages_are():
    """In dicts, tuples, dataclasses and models, ids are numbered over the whole value."""

    @dataclasses.dataclass
    class Held:
        messages: Any

    class Model(BaseModel):
        messages: Any

    for wrap in (
        lambda m: m,
        lambda m: {"a": m[:2], "b": m[2:]},
        lambda m: (m[1], {"rest": (m[2], m[3])}),
        lambda m: Held(m),
        lambda m: Model(messages=m),
        lambda m: [m[1], "text", m[3], m[2]],
    ):
        assert key(wrap(loop())) == key(wrap(loop()))

        swapped = loop()
        swapped[2].tool_call_id, swapped[3].tool_call_id = (
            swapped[3].tool_call_id,
            swapped[2].tool_call_id,
        )
        assert key(wrap(swapped)) != key(wrap(loop()))


def test_swapped_answers_differ():
    """Two tool messages that answer each other's calls are a different conversation."""
    a, b = new_id(), new_id()
    asked = AIMessage("", tool_calls=[call("f", a), call("f", b)])
    right = [asked, ToolMessage("1", tool_call_id=a), ToolMessage("2", tool_call_id=b)]
    wrong = [asked, ToolMessage("1", tool_call_id=b), ToolMessage("2", tool_call_id=a)]
    assert key(right) != key(wrong)
    # also when call and answers are in different parts of the input
    assert digest(("a", asked), ("b", right[1:])) != digest(("a", asked), ("b", wrong[1:]))


def test_an_answer_to_another_call_differs():
    """Whether a tool message answers the call before it is part of the key."""
    a = new_id()
    asked = AIMessage("", tool_calls=[call("f", a)])
    assert key([asked, ToolMessage("1", tool_call_id=a)]) != key(
        [asked, ToolMessage("1", tool_call_id=new_id())]
    )


@pytest.mark.parametrize("kind", ["tool_use", "tool_call", "function_call"])
def test_ids_in_content_blocks_count_by_position(kind):
    """Blocks that repeat a tool-call id carry the same position as the call."""

    def talk(order: int) -> list[BaseMessage]:
        a, b = new_id(), new_id()
        answered = (a, b)[::order]
        field = "call_id" if kind == "function_call" else "id"
        return [
            AIMessage(
                [
                    {"type": "text", "text": "thinking", "id": f"msg_{uuid.uuid4()}"},
                    {"type": "reasoning", "reasoning": "hm", "id": f"rs_{uuid.uuid4()}"},
                    {"type": kind, field: a, "name": "f", "input": {}},
                    {"type": kind, field: b, "name": "f", "input": {}},
                ],
                tool_calls=[call("f", a), call("f", b)],
            ),
            HumanMessage(
                [
                    {"type": "tool_result", "tool_use_id": answered[0], "content": "1"},
                    {"type": "tool_result", "tool_use_id": answered[1], "content": "2"},
                ]
            ),
        ]

    assert key(talk(1)) == key(talk(1))
    assert key(talk(1)) != key(talk(-1))


def test_provider_copies_of_tool_calls_are_left_out():
    """A copy that says the same adds nothing; one that says something else counts."""

    def asked(arguments: str | None, **more: Any) -> AIMessage:
        a = new_id()
        raw = [{"id": a, "type": "function", "function": {"name": "f", "arguments": arguments}}]
        kwargs = {"tool_calls": raw} if arguments is not None else {}
        return AIMessage("", tool_calls=[call("f", a, q=1)], additional_kwargs={**kwargs, **more})

    notes = {"__openai_function_call_ids__": {new_id(): new_id()}}
    assert key(asked(None)) == key(asked('{"q":1}')) == key(asked('{ "q": 1 }', **notes))
    assert key(asked(None)) != key(asked('{"q":2}'))
    assert key(asked('{"q":1}')) != key(asked('{"q":1}', refusal="no"))

    def legacy() -> AIMessage:
        raw = [{"id": new_id(), "type": "function", "function": {"name": "f", "arguments": "{"}}]
        return AIMessage("", additional_kwargs={"tool_calls": raw})

    assert key(legacy()) == key(legacy()) != key(AIMessage(""))


def test_provider_copies_are_compared_by_type_too():
    """A raw ``1`` does not say what a parsed ``True`` says, though Python calls them equal."""

    def asked(arguments: str, value: Any) -> AIMessage:
        raw = [{"id": "a", "function": {"name": "f", "arguments": arguments}}]
        return AIMessage(
            "", tool_calls=[call("f", "a", q=value)], additional_kwargs={"tool_calls": raw}
        )

    assert key(asked('{"q": 1}', True)) != key(asked('{"q": true}', True))
    assert key(asked('{"q": 1}', 1)) == key(asked(' {"q":1}', 1))


def test_tool_calls_that_stand_alone_count_by_position():
    """What ``Send`` gives to a tool node, alone, in a list, or beside the conversation."""

    def sent(form: str, which: int = 0, *, q: int = 1) -> Any:
        calls = [call("f", new_id(), q=1), call("f", new_id(), q=q)]
        if form == "call":
            return calls[which]
        if form == "list":
            return [calls[which]]
        asked = [HumanMessage("hi"), AIMessage("", tool_calls=calls)]
        return {"tool_call": calls[which], "state": {"messages": asked}, "__type": "x"}

    for form in ("call", "list", "state"):
        assert key(sent(form)) == key(sent(form))
        assert key(sent(form, 1)) != key(sent(form, 1, q=2))
    # which of two equal calls it is only shows where both are
    assert key(sent("list")) == key(sent("list", 1))
    assert key(sent("state")) != key(sent("state", 1))
    one = call("f", "a", q=1)
    assert key([one, one]) != key([one, call("f", "b", q=1)])
    no_call = {"type": "tool_call", "id": "a"}
    assert key(no_call) != key({**no_call, "id": "b"})


@pytest.mark.parametrize("form", [lambda x: x, lambda x: [x], lambda x: {"is": x}, lambda x: (x,)])
def test_which_message_or_call_a_field_names_counts(form: Any):
    """Ids are left out of what a conversation says, but not which of them is chosen."""

    def state(chosen: str, ids: str) -> Any:
        a, b = (call("f", f"call_{each}", q=1) for each in ids)
        said = [HumanMessage("yes", id=f"h{ids[0]}"), HumanMessage("yes", id=f"h{ids[1]}")]
        return {"messages": [*said, AIMessage("", tool_calls=[a, b])], "chosen": form(chosen)}

    for chosen in ("call_2", "h2"):
        assert key(state(chosen, "12")) == key(state(chosen, "12"))
        assert key(state(chosen, "12")) == key(state(chosen, "32")) != key(state(chosen, "23"))
        assert key(state(chosen, "45")) != key(state(chosen, "12"))
        assert key(state(chosen, "45")) == key(state(chosen, "67"))

    @dataclasses.dataclass
    class Chosen:
        messages: list[Any]
        chosen: Any

    assert key(Chosen(**state("h2", "12"))) != key(Chosen(**state("h2", "21")))


def test_langchains_own_block_ids_are_left_out():
    """Block ids that LangChain generates do not count, not even in what a user says."""
    one, same = (HumanMessage(content_blocks=[create_text_block("hi")]) for _ in range(2))
    assert one.content != same.content
    assert key(one) == key(same)


def test_what_a_user_says_is_never_left_out():
    """All of a human message's content counts, ids in it included."""
    blocks = [{"type": "text", "text": "x", "id": "a"}, {"type": "image", "url": "u"}]
    other = copy.deepcopy(blocks)
    other[0]["id"] = "b"
    assert key(HumanMessage(blocks)) != key(HumanMessage(other))
    assert key(HumanMessage(blocks)) != key(HumanMessage(blocks[:1]))


def test_a_str_subclass_says_what_its_text_says():
    """``message.text`` is a str subclass; as content it counts as its text."""
    text = AIMessage("hello").text
    assert type(text) is not str
    assert key(HumanMessage(text)) == key(HumanMessage("hello"))


# -- what counts ----------------------------------------------------------------------------------


class Custom(HumanMessage):
    mood: Any = "fine"
    _secret: Any = PrivateAttr(default=0)


DIFFERENT = [
    HumanMessage(""),
    HumanMessage("a"),
    HumanMessage("\ud800"),
    HumanMessage("ń"),
    HumanMessage(["a"]),
    HumanMessage([{"type": "text", "text": "a"}]),
    HumanMessage("a", name="bob"),
    HumanMessage("a", additional_kwargs={"k": 1}),
    HumanMessage("a", additional_kwargs={"k": True}),
    HumanMessage("a", additional_kwargs={"k": 1.0}),
    HumanMessage("a", additional_kwargs={"id": "x"}),
    HumanMessage("a", mood="extra"),
    HumanMessage("a", mode="extra"),
    HumanMessageChunk(content="a"),
    SystemMessage("a"),
    AIMessage("a"),
    AIMessageChunk(content="a"),
    AIMessageChunk(content="a", chunk_position="last"),
    AIMessage("a", tool_calls=[call("f", "1")]),
    AIMessage("a", tool_calls=[call("g", "1")]),
    AIMessage("a", tool_calls=[call("f", "1", x=1)]),
    AIMessage("a", tool_calls=[call("f", "1", x=True)]),
    AIMessage("a", tool_calls=[call("f", "1", x="1")]),
    AIMessage("a", tool_calls=[call("f", "1"), call("f", "2")]),
    AIMessage("a", tool_calls=[call("f", "1"), call("f", "1")]),
    AIMessage("a", invalid_tool_calls=[{"name": "f", "args": "{", "id": "1", "error": None}]),
    AIMessage("a", invalid_tool_calls=[{"name": "f", "args": "{", "id": "1", "error": "bad"}]),
    AIMessage("a", additional_kwargs={"reasoning_content": "because"}),
    AIMessage("a", additional_kwargs={"reasoning": {"id": "rs_1", "summary": "s"}}),
    ToolMessage("a", tool_call_id="1"),
    ToolMessage("a", tool_call_id="1", status="error"),
    ToolMessage("a", tool_call_id="1", artifact={"rows": [1]}),
    ToolMessage("a", tool_call_id="1", artifact={"rows": [True]}),
    ToolMessage("a", tool_call_id="1", name="f"),
    ChatMessage(content="a", role="critic"),
    ChatMessage(content="a", role="judge"),
    FunctionMessage(content="a", name="f"),
    RemoveMessage(id="a"),
    RemoveMessage(id="b"),
    Custom("a"),
    Custom("a", mood="sad"),
    Custom("a", mood=1),
]


def test_what_messages_say_is_told_apart():
    """No two different messages share a key, alone, in a list, or as a content digest."""
    for of in (key, lambda m: key([m]), lambda m: key([HumanMessage("x"), m]), message_digest):
        seen: dict[Any, BaseMessage] = {}
        for message in DIFFERENT:
            other = seen.setdefault(of(message), message)
            assert other is message, f"{other!r} and {message!r}"
            assert of(message.model_copy(deep=True)) == of(message)


def test_lists_of_messages_are_told_apart():
    """Where one message ends and the next begins is part of the key."""
    keys = [
        key([]),
        key([HumanMessage("ab")]),
        key([HumanMessage("a"), HumanMessage("b")]),
        key([HumanMessage("b"), HumanMessage("a")]),
        key([[HumanMessage("a")], [HumanMessage("b")]]),
        key((HumanMessage("a"), HumanMessage("b"))),
        key([HumanMessage("a"), AIMessage("b")]),
        key([HumanMessage("a"), "b"]),
        key(HumanMessage("a")),
        key([HumanMessage("a")]),
        key([HumanMessage("\ud800"), HumanMessage("b")]),
        key([[HumanMessage(str(n)) for n in range(20)]]),
        key([[HumanMessage(str(n)) for n in range(21)]]),
    ]
    assert len(set(keys)) == len(keys)


def test_private_attributes_of_a_message_count():
    """A message class may keep more than fields; that counts too, each time anew."""
    message = Custom("a")
    before = key([message])
    message._secret = 1
    assert key([message]) != before


def test_unkeyable_parts_of_messages_are_named():
    """The path leads into the message."""
    bad = object()
    for message, where in (
        (ToolMessage("a", tool_call_id="1", artifact=bad), ".artifact"),
        (ToolMessage("a", tool_call_id="1", artifact=[{"c": bad}]), '.artifact[0]["c"]'),
        (HumanMessage("a", additional_kwargs={"c": bad}), '.additional_kwargs["c"]'),
        (HumanMessage("a", client=bad), ".client"),
        (AIMessage("a", tool_calls=[call("f", "1", c=bad)]), '.tool_calls[0]["args"]["c"]'),
        (HumanMessage([{"type": "x", "c": bad}]), '.content[0]["c"]'),
    ):
        for value, root in (
            ({"messages": [HumanMessage("x"), message]}, 'state["messages"][1]'),
            ({"last": message}, 'state["last"]'),
        ):
            with pytest.raises(Unkeyable) as caught:
                key(value)
            assert caught.value.path == root + where


def test_only_messages_have_a_message_digest():
    """Anything else is a mistake that is named."""
    with pytest.raises(TypeError, match="takes a BaseMessage, got a dict"):
        message_digest({"role": "user"})  # type: ignore[arg-type]
    assert len(message_digest(HumanMessage("x"))) >= 16


# -- remembered conversations ---------------------------------------------------------------------


def mutations() -> dict[str, tuple[BaseMessage, Any]]:
    def setting(name: str, value: Any):
        return lambda m: setattr(m, name, value)

    def human() -> BaseMessage:
        return HumanMessage("a", additional_kwargs={"n": 1, "deep": {"l": [0, {"x": 1.0}]}})

    def ai() -> BaseMessage:
        raw = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]
        return AIMessage(
            [{"type": "text", "text": "t"}, {"type": "tool_use", "id": "1", "input": {"x": 1}}],
            tool_calls=[call("f", "1", x=1, y=[0.0])],
            invalid_tool_calls=[{"name": "g", "args": "{", "id": "2", "error": "e"}],
            additional_kwargs={"tool_calls": raw},
        )

    def tool() -> BaseMessage:
        return ToolMessage("a", tool_call_id="1", artifact={"rows": [1, 2]}, name="n")

    return {
        "content": (HumanMessage("a"), setting("content", "b")),
        "content kind": (HumanMessage("a"), setting("content", ["a"])),
        "name": (HumanMessage("a"), setting("name", "b")),
        "type": (HumanMessage("a"), setting("type", "b")),
        "extra added": (HumanMessage("a"), setting("mood", "b")),
        "extra changed": (HumanMessage("a", mood="a"), setting("mood", "b")),
        "extra kind": (HumanMessage("a", mood=1), setting("mood", True)),
        "kwargs filled": (HumanMessage("a"), lambda m: m.additional_kwargs.update(k=1)),
        "kwargs replaced": (HumanMessage("a"), setting("additional_kwargs", {"k": 1})),
        "kwargs emptied": (human(), lambda m: m.additional_kwargs.clear()),
        "kwargs type": (human(), lambda m: m.additional_kwargs.update(n=True)),
        "kwargs type replaced": (
            human(),
            lambda m: setattr(m, "additional_kwargs", {**m.additional_kwargs, "n": 1.0}),
        ),
        "kwargs deep": (
            human(),
            lambda m: m.additional_kwargs["deep"]["l"][1].update(x=1),
        ),
        "kwargs zero": (human(), lambda m: m.additional_kwargs["deep"]["l"].__setitem__(0, -0.0)),
        "block text": (ai(), lambda m: m.content[0].update(text="u")),
        "block added": (ai(), lambda m: m.content.append("x")),
        "block input": (ai(), lambda m: m.content[1]["input"].update(x=True)),
        "call added": (AIMessage("a"), lambda m: m.tool_calls.append(call("f", "1"))),
        "call name": (ai(), lambda m: m.tool_calls[0].update(name="g")),
        "call args": (ai(), lambda m: m.tool_calls[0]["args"].update(x=2)),
        "call args type": (ai(), lambda m: m.tool_calls[0]["args"].update(x=True)),
        "call args sign": (ai(), lambda m: m.tool_calls[0]["args"]["y"].__setitem__(0, -0.0)),
        "call id": (ai(), lambda m: m.tool_calls[0].update(id="3")),
        "broken call": (ai(), lambda m: m.invalid_tool_calls[0].update(args="[")),
        "broken call gone": (ai(), lambda m: m.invalid_tool_calls.clear()),
        "raw call": (
            ai(),
            lambda m: m.additional_kwargs["tool_calls"][0]["function"].update(name="h"),
        ),
        "tool_call_id": (tool(), setting("tool_call_id", "2")),
        "status": (tool(), setting("status", "error")),
        "artifact": (tool(), lambda m: m.artifact["rows"].append(3)),
        "artifact type": (tool(), lambda m: m.artifact["rows"].__setitem__(0, True)),
        "artifact replaced": (tool(), setting("artifact", {"rows": [1, 2.0]})),
        "artifact odd": (
            ToolMessage("a", tool_call_id="1", artifact=(1, 2)),
            setting("artifact", (1, True)),
        ),
        "dict": (HumanMessage("a"), lambda m: m.__dict__.update(content="b")),
    }


@pytest.mark.parametrize("name", mutations())
def test_a_message_changed_in_place_has_another_key(name):
    """Whatever is changed in a message that was keyed before, the next key shows it."""
    message, change = mutations()[name]
    answer = ToolMessage("ok", tool_call_id="1")
    talk = [HumanMessage("before"), message, answer, HumanMessage("after")]
    before = key(talk)
    assert key(talk) == key(list(talk)) == before
    alone = message_digest(message)
    change(message)
    after = key(talk)
    assert after != before
    assert key(talk) == after == fresh_key(talk)
    if name not in ("call id", "tool_call_id"):  # which count only next to each other
        assert message_digest(message) != alone


class Checked(HumanMessage):
    """A message into which pydantic puts another ``__dict__`` with each assignment."""

    model_config = ConfigDict(validate_assignment=True)


def test_messages_whose_dict_is_replaced_by_assignments_are_read_each_time():
    """Where assignments are validated, the object that is watched would not be the one changed."""
    talk = [HumanMessage("before"), Checked("a"), HumanMessage("after")]
    before = key(talk)
    watched = talk[1].__dict__
    talk[1].content = "b"
    assert talk[1].__dict__ is not watched
    after = key(talk)
    assert after != before
    assert key(talk) == after == fresh_key(talk)


def test_an_equal_message_in_place_of_another_is_read():
    """What was remembered is about these objects, not about equal ones, whose types may differ."""
    talk = [HumanMessage("before"), HumanMessage("a", mood=1), HumanMessage("after")]
    key(talk)
    for other in (HumanMessage("a", mood=True), HumanMessage("a", mood=1.0)):
        again = [talk[0], other, talk[2]]
        assert key(again) == fresh_key(again) != key(talk)
    same = [talk[0], HumanMessage("a", mood=1), talk[2]]
    assert key(same) == key(talk)


def test_ids_and_metadata_given_later_do_not_count():
    """LangGraph gives messages ids after they were made; that keeps the key."""
    talk = loop()
    before = key(talk)
    for message in talk:
        message.id = str(uuid.uuid4())
        message.response_metadata["x"] = 1
    talk[1].usage_metadata["input_tokens"] = 7
    assert key(talk) == before == fresh_key(talk)


@settings(max_examples=150)
@given(st.integers(0, 2**32))
def test_remembering_never_changes_a_key(seed):
    """Appended to, trimmed, forked, reordered, edited: the key is that of a fresh start."""
    rng = random.Random(seed)
    talk: list[BaseMessage] = loop()
    for _ in range(12):
        step = rng.randrange(9)
        if step == 0:
            talk = [*talk, *loop(answer=str(rng.random()))]
        elif step == 1:
            talk = talk[: rng.randrange(1, len(talk) + 1)]
        elif step == 2:
            talk = talk[rng.randrange(len(talk)) :]
        elif step == 3:
            talk = [*talk, HumanMessage(str(rng.random()))]
        elif step == 4:
            rng.choice(talk).content = str(rng.random())
        elif step == 5:
            rng.choice(talk).additional_kwargs["k"] = rng.choice(
                [1, True, 1.0, "1", (1,), "\ud800"]
            )
        elif step == 6:
            rng.shuffle(talk)
        elif step == 7:
            talk = [*talk, ToolMessage("x", tool_call_id="1", artifact=rng.choice([None, 1, (1,)]))]
        else:
            talk = [*talk[:2], AIMessage("", tool_calls=[call("f", "1", x=rng.random())])]
        got = key({"messages": talk})
        kept = dict(_messages_key._conversations.entries)
        assert got == fresh_key({"messages": copy.deepcopy(talk)})
        _messages_key._conversations.entries.update(kept)


@pytest.fixture
def absorbed(monkeypatch):
    """The content of each message that is encoded."""
    encoded: list[Any] = []
    real = _messages_key._absorb

    def counting(messages, start, *rest, **options):
        encoded.extend(message.content for message in messages[start:])
        return real(messages, start, *rest, **options)

    monkeypatch.setattr(_messages_key, "_absorb", counting)
    return encoded


def test_only_new_messages_are_encoded(absorbed):
    """A conversation that grows is not hashed from its beginning each time."""
    talk = [HumanMessage(str(n)) for n in range(50)]
    key({"messages": talk})
    assert len(absorbed) == 100  # the first time nothing is remembered yet
    for n in range(40):  # more steps than there may be segments
        absorbed.clear()
        talk = [*talk, HumanMessage(f"new {n}")]
        key({"messages": talk})
        assert absorbed == [f"new {n}"]
    absorbed.clear()
    key({"messages": [*talk, HumanMessage("a fork")]})
    key({"messages": [*talk, HumanMessage("another")]})
    key({"messages": talk})
    assert absorbed == ["a fork", "another"]


def test_what_is_remembered_goes_with_the_message():
    """A conversation is forgotten when its first message is collected, cycles or not."""
    talk = loop()
    talk[0].additional_kwargs["self"] = "x"
    key(talk)
    assert len(_messages_key._conversations.entries) == 1
    ref = weakref.ref(talk[0])
    first = talk[0]
    first.__dict__["cycle"] = [first]
    del talk, first
    gc.collect()
    assert ref() is None
    assert not _messages_key._conversations.entries


def test_what_is_remembered_is_bounded():
    """However many conversations live, only so many are remembered."""
    talks = [[HumanMessage(str(n))] for n in range(1000)]
    for talk in talks:
        key(talk)
    assert len(_messages_key._conversations.entries) <= _messages_key._conversations.limit


def test_nothing_is_stored_on_messages():
    """Keying leaves a message exactly as it was."""
    message = loop()[1]
    before = (dict(message.__dict__), copy.deepcopy(message.__pydantic_extra__))
    key([message])
    message_digest(message)
    assert (message.__dict__, message.__pydantic_extra__) == before


# -- the same conversation in other objects --------------------------------------------------------


def long_talk(turns: int = 20) -> list[Any]:
    """A conversation as a checkpointer keeps it, with ids, of five messages a turn."""
    talk: list[Any] = []
    for n in range(turns):
        talk += loop(query=f"question {n}", answer=f"answer {n}")
    for message in talk:
        message.id = uuid.uuid4().hex
    return talk


def once(talk: list[Any]) -> str:
    """The digest of a copy, asked for once."""
    return digest(("state", {"messages": copy.deepcopy(talk)}))


def test_a_conversation_that_is_read_again_is_recognised(absorbed):
    """From its third time on, only what does not fill a chunk is encoded."""
    talk = long_talk()
    want = once(talk)
    once(talk)
    for _ in range(3):
        absorbed.clear()
        assert once(talk) == want
        assert absorbed == [message.content for message in talk[96:]]
    talk += long_talk(2)  # it goes on, with tool calls whose ids are numbered further
    absorbed.clear()
    want = once(talk)
    assert absorbed == [message.content for message in talk[96:]]
    assert want == fresh_key({"messages": copy.deepcopy(talk)})


class Sub(HumanMessage):
    """Has a name that another class takes, too."""


def other_class(of: type[BaseMessage]) -> type[BaseMessage]:
    return type("Sub", (of,), {"__module__": __name__, "__qualname__": "Sub"})


EDITS: dict[str, Any] = {
    "content": lambda m: setattr(m, "content", "something else"),
    "name": lambda m: setattr(m, "name", "x"),
    "blocks": lambda m: setattr(m, "content", [{"type": "text", "text": "x"}]),
    **{
        f"kwargs {value!r}": lambda m, value=value: m.additional_kwargs.update(k=value)
        for value in (1, True, 1.0, "1", b"x", bytearray(b"x"), (1,), [1], float("nan"), "\ud800")
    },
    "extra": lambda m: setattr(m, "more", "x"),
    "surrogate": lambda m: setattr(m, "content", "\ud800"),
    "tool call": lambda m: m.__dict__.update(tool_calls=[call("f", "new", x=1)]),
    "answers another": lambda m: m.__dict__.update(tool_call_id="another"),
    "class": lambda m: setattr(m, "__class__", Sub),
    "class of the same name": lambda m: setattr(m, "__class__", other_class(AIMessage)),
    "no field": lambda m: m.__dict__.pop("name"),
    "id": lambda m: setattr(m, "id", "another"),
    "metadata": lambda m: m.response_metadata.update(model="x"),
}


@pytest.mark.parametrize("index", [0, 40, 95, 98], ids="message{}".format)
@pytest.mark.parametrize("name", EDITS)
def test_a_conversation_that_is_read_again_changed_has_the_key_of_what_it_says(name, index):
    """Whatever is changed, wherever, nothing of what was known before is taken for it."""
    talk = long_talk()
    edited = copy.deepcopy(talk)
    EDITS[name](edited[index])
    want, others = fresh_key({"messages": edited}), fresh_key({"messages": talk})
    assert (want == others) == (name in ("id", "metadata"))
    forget()
    for _ in range(4):
        assert once(talk) == others
    for _ in range(4):
        assert digest(("state", {"messages": list(edited)})) == want
        _messages_key._conversations.entries.clear()  # as if they were other objects
    assert once(talk) == others


@pytest.mark.parametrize("first", [b"x", bytearray(b"x")], ids=["bytes", "bytearray"])
def test_what_packs_alike_is_not_taken_for_the_same(first):
    """Bytes and bytearrays pack to the same: a conversation with either is not kept."""
    second = bytearray(b"x") if type(first) is bytes else b"x"
    talk = long_talk()
    talk[10].additional_kwargs["k"] = first
    (want,) = {once(talk) for _ in range(4)}
    talk[10].additional_kwargs["k"] = second
    assert once(talk) != want


def test_a_message_that_changes_while_its_conversation_is_learnt(monkeypatch):
    """However another thread changes a message and back, what was packed is what was learnt."""
    talk = long_talk()
    want = once(talk)
    real = _messages_key._absorb
    changing: list[BaseMessage] = []

    def meanwhile(messages, start, *rest, **options):
        before = [message.content for message in changing]
        for message in changing:
            message.content = "changed"
        try:
            return real(messages, start, *rest, **options)
        finally:
            for message, content in zip(changing, before, strict=True):
                message.content = content

    with monkeypatch.context() as patched:
        patched.setattr(_messages_key, "_absorb", meanwhile)
        forget()
        for _ in range(3):
            copied = copy.deepcopy(talk)
            changing[:] = copied[:96:7]
            digest(("state", {"messages": copied}))
    assert [once(talk) for _ in range(3)] == [want] * 3


class Colour(enum.Enum):
    RED = 1


def test_classes_inside_messages_count_like_others():
    """What an enum in an artifact stands for is part of the key, however long the conversation."""
    asked: list[type] = []

    def code_of(kind: type) -> str:
        asked.append(kind)
        return "version 1"

    for talk in (loop(), long_talk()):
        artifact = ToolMessage("x", tool_call_id="1", artifact=Colour.RED)
        for messages in ([*talk, artifact], [artifact, *talk]):
            for value in (messages, messages, copy.deepcopy(messages)):
                asked.clear()
                one = digest(("state", {"messages": value}), code_of=code_of)
                assert asked == [Colour]
                other = digest(("state", {"messages": value}), code_of=lambda kind: "version 2")
                assert one != other


def test_lone_surrogates_in_the_arguments_of_tool_calls():
    """They are keyed like others, whatever was keyed before."""
    message = AIMessage("", tool_calls=[call("f", "1", q="\ud800", n=1)])
    talk = [HumanMessage("hello"), message, AIMessage("", tool_calls=[call("f", "2", q="x")])]
    want = fresh_key({"messages": copy.deepcopy(talk)})
    assert key({"messages": talk}) == want
    assert digest(("state", {"messages": copy.deepcopy(talk)})) == want
    message.tool_calls[0]["args"]["q"] = "\ud801"
    assert key({"messages": talk}) != want
    assert message_digest(message) != message_digest(talk[2])


def test_conversations_that_only_begin_alike_are_not_learnt_each_time(absorbed):
    """An id that many conversations begin with costs a comparison, not the learning of each."""
    talks = [long_talk() for _ in range(30)]
    for talk in talks:
        talk[0] = HumanMessage("the same", id="the same")
    learnt = 0
    for talk in talks:
        absorbed.clear()
        once(talk)
        learnt += len(_messages_again._met[_messages_again._key_of(talk[0])].chunks) > 0
    assert learnt < 6


def test_what_is_kept_of_conversations_is_bounded(monkeypatch):
    """By bytes, the latest ones are kept; of a long one its beginning."""
    monkeypatch.setattr(_messages_again, "MOST_BYTES", 20_000)
    monkeypatch.setattr(_messages_again, "_MOST_OF_ONE", 10_000)
    talks = [long_talk() for _ in range(12)]
    for _ in range(2):
        for talk in talks:
            once(talk)
            assert once(talk) == once(talk)
            sizes = [_messages_again._size(*item) for item in _messages_again._met.items()]
            assert _messages_again._bytes == sum(sizes) <= 20_000
            assert _messages_again._key_of(talk[0]) in _messages_again._met
    long = long_talk(300)
    assert len({once(long) for _ in range(3)}) == 1
    key = _messages_again._key_of(long[0])
    assert 8_000 < _messages_again._size(key, _messages_again._met[key]) < 10_000
    long[0].id = "x" * 1_000_000
    before = _messages_again._bytes
    once(long)
    assert _messages_again._bytes == before


def test_short_conversations_are_not_kept():
    """They are keyed in no time."""
    for _ in range(3):
        once(long_talk(6))
    assert not _messages_again._met


def test_conversations_are_safe_to_key_from_many_threads():
    """Threads that key growing and forked conversations at once get the right keys."""
    base = [*loop(), *loop(answer="other")]
    forks = [[*base[: 3 + n], HumanMessage(str(n))] for n in range(6)]
    want = [fresh_key(copy.deepcopy(fork)) for fork in forks]
    forget()
    barrier = threading.Barrier(6)
    wrong: list[int] = []

    def work(n: int) -> None:
        barrier.wait()
        for _ in range(60):
            wrong.extend(m for m in (n, (n + 1) % 6) if key(forks[m]) != want[m])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
