"""Fingerprints: the same for the same code anywhere, another for code that does something else."""

from __future__ import annotations

import concurrent.futures
import contextvars
import dataclasses
import enum
import functools
import importlib
import itertools
import json
import logging
import operator
import queue
import re
import sys
import textwrap
import threading
import types
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypedDict

import pytest
from langchain_core.language_models.chat_models import BaseChatModel, SimpleChatModel
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from langchain_core.messages import BaseMessage, HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate, PromptTemplate
from langchain_core.runnables import (
    Runnable,
    RunnableBranch,
    RunnableGenerator,
    RunnableLambda,
    RunnableParallel,
    RunnablePassthrough,
)
from langchain_core.tools import BaseTool, StructuredTool, tool
from langgraph._internal._runnable import RunnableCallable
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.func import entrypoint
from langgraph.graph import START, StateGraph
from langgraph.prebuilt import ToolNode
from pydantic import BaseModel, Field, PrivateAttr, RootModel, field_validator
from typing_extensions import override

from langgraph_perf import CachePolicy, MemoryCache
from langgraph_perf import StateGraph as CachingStateGraph
from langgraph_perf._code_facts import top_level
from langgraph_perf._code_identity import code_of
from langgraph_perf.fingerprint import Classes, Unkeyable, fingerprint
from tests._fingerprint_cases.packages import Packages


def path_of(obj: Any) -> str:
    with pytest.raises(Unkeyable) as caught:
        fingerprint(obj)
    return caught.value.path


def distinct(*objects: Any) -> bool:
    """Whether all fingerprints differ, and each is the same when taken again."""
    prints = [fingerprint(obj) for obj in objects]
    assert [fingerprint(obj) for obj in objects] == prints
    return len(set(prints)) == len(prints)


class Client:
    """A stand-in for a connection: nothing about it can be keyed."""

    def __init__(self) -> None:
        self.socket = open("/dev/null")  # noqa: SIM115

    def get(self, state: Any) -> Any:
        return state


@pytest.fixture
def client():
    made = Client()
    yield made
    made.socket.close()


# -- other processes, edited code -----------------------------------------------------------------


def test_known_fingerprints() -> None:
    """Of what has no bytecode, fingerprints are the same in every version of Python and of this
    library: another hash is a decision to lose all that was stored."""
    assert fingerprint(len) == "23eabc76b0e51d7ca185e730ce2205c7273a9b4a"
    assert fingerprint(functools.partial(len, 1)) == "863e9b8ce915bff6154d9acf040cfbb1e0ef0917"


NODES = (
    "nodes.node",
    "nodes.by_module",
    "nodes.by_call",
    "nodes.abroad",
    "nodes.lazily",
    "nodes.lazily_relative",
    "nodes.even",
    "nodes.make(1)",
    "nodes.Agent(1)",
    "nodes.Agent(1).run",
)


@pytest.fixture
def packages(tmp_path: Path) -> Packages:
    return Packages(tmp_path / "src")


def test_fingerprints_do_not_depend_on_the_process(packages, tmp_path):
    """Hash seed, import order, directory and place on disk do not count."""
    want = packages.fingerprints(*NODES)
    assert len(set(want)) == len(NODES)
    assert packages.fingerprints(*NODES, seed="77", cwd=tmp_path) == want
    assert packages.fingerprints(*NODES, before="import app.lazy, app.helpers, other") == want
    turned = packages.fingerprints(*reversed(NODES))
    assert turned[::-1] == want
    elsewhere = Packages(tmp_path / "elsewhere")
    assert elsewhere.fingerprints(*NODES) == want


def test_layout_comments_and_docstrings_do_not_count(packages):
    """Editing what is not executed keeps all fingerprints."""
    want = packages.fingerprints(*NODES)
    packages.edit("app/nodes.py", "# a comment", "\n\n    # another\n")
    packages.edit("app/nodes.py", '"Does things."', '"""Does\n    other\n    things."""')
    packages.edit("app/helpers.py", "LIMIT = 3", "# the limit\n\n\nLIMIT = 3")
    packages.edit("app/helpers.py", "def clean(text):", 'def clean(text):\n    "Cleans."')
    packages.edit("app/nodes.py", "def width(self):", 'def width(self):\n        "Width."')
    packages.edit("app/lazy.py", "def heavy", '"""A module."""\n\ndef heavy')
    assert packages.fingerprints(*NODES) == want
    packages.edit("app/helpers.py", "return 0", "return 1")  # nobody calls it
    assert packages.fingerprints(*NODES[:4]) == want[:4]


@pytest.mark.parametrize(
    ("file", "old", "new", "changed"),
    [
        ("app/nodes.py", "depth=2", "depth=3", {"nodes.node"}),
        ("app/nodes.py", "x + depth", "x - depth", {"nodes.node"}),
        ("app/nodes.py", "k: int = 3", "k: int = 4", {"nodes.node"}),
        ("app/nodes.py", "self.k * 2", "self.k * 3", {"nodes.node"}),
        ("app/nodes.py", "FAST = 1", "FAST = 2", {"nodes.node"}),
        (
            "app/helpers.py",
            "LIMIT = 3",
            "LIMIT = 4",
            {"nodes.node", "nodes.by_module"},
        ),
        (
            "app/helpers.py",
            "text.strip()",
            "text.lstrip()",
            {"nodes.node", "nodes.by_module", "nodes.lazily", "nodes.lazily_relative"},
        ),
        ("app/helpers.py", '"a": 1', '"a": 2', {"nodes.node"}),
        (
            "app/lazy.py",
            "return clean(text)",
            "return [clean(text)]",
            {"nodes.lazily", "nodes.lazily_relative"},
        ),
        ("app/helpers.py", "start = 7", "start = 8", {"nodes.by_call"}),
        ("app/helpers.py", "yield [size]", "yield size", {"nodes.by_call"}),
        ("app/nodes.py", "n != 0 and", "n > 0 and", {"nodes.even"}),
        ("app/nodes.py", "limit = 5", "limit = 6", {"nodes.Agent(1)", "nodes.Agent(1).run"}),
        (
            "app/nodes.py",
            "return self.k * self.limit",
            "return self.k + self.limit",
            {"nodes.Agent(1)", "nodes.Agent(1).run"},
        ),
        ("other/__init__.py", "return state", "return [state]", set()),
        ("app/nodes.py", "other.outside(state)", "other.inside(state)", {"nodes.abroad"}),
    ],
)
def test_an_edit_changes_what_runs_it(packages, file, old, new, changed):
    """A change in a node, or in what it reaches in its package, changes that node, and no other."""
    before = packages.fingerprints(*NODES)
    packages.edit(file, old, new)
    after = packages.fingerprints(*NODES)
    assert {n for n, a, b in zip(NODES, before, after, strict=True) if a != b} >= changed
    assert {n for n, a, b in zip(NODES, before, after, strict=True) if a != b} <= changed | (
        # lazily imported modules count as a whole, and with them what they import
        {"nodes.lazily", "nodes.lazily_relative"} if file == "app/helpers.py" else set()
    )


def test_an_edited_node_of_a_script_changes(tmp_path):
    """Code of ``__main__`` counts like a package's."""
    packages = Packages(tmp_path)
    program = "def node(s):\n    return help_(s)\ndef help_(s):\n    return {}\nnodes = None"
    prints = [packages.fingerprints("node", before=program.format(value))[0] for value in (1, 1, 2)]
    assert prints[0] == prints[1] != prints[2]


def test_what_is_read_off_a_module_and_passed_is_seen() -> None:
    """Where the compiler knows that a name is an import, it lays out calls in another way."""
    source = """
        from . import h
        def node(s):
            with h.ctx(h.tool, h.sub.g(1)(s), key=h.other) as x:
                return {"a": h.f(), "b": x.y(h.last), "c": [h.Class(h.first).go(h.more)]}
    """
    module = compile(textwrap.dedent(source), "m.py", "exec")
    (code,) = (const for const in module.co_consts if isinstance(const, types.CodeType))
    known = code_of(code)
    read = "ctx tool sub other f last Class first more".split()  # noqa: SIM905
    assert {o for o in known.loads if o[0] == "global"} == {
        ("global", "h"),
        ("global", "h", "sub", "g"),
        *(("global", "h", name) for name in read),
    }
    assert {o for o in known.passed if o[0] == "global"} == {
        ("global", "h", name) for name in ("tool", "other", "last", "first", "more")
    }


# -- functions ------------------------------------------------------------------------------------


def make(k: Any) -> Any:
    def node(state: Any) -> Any:
        return k

    return node


def test_closures_of_one_factory_differ_by_what_they_hold():
    """Two nodes made by one factory share their code, not their identity (trap 8)."""
    assert distinct(make(1), make(True), make("1"), make([1]), make({"a": 1}), make(None))
    assert fingerprint(make({"a": 1, "b": {1, 2}})) == fingerprint(make({"b": {2, 1}, "a": 1}))
    assert distinct(make(make(1)), make(make(2)), make(len), make(max), make(int), make(operator))


def test_lambdas_on_one_line_differ():
    """What stands next to a lambda is not part of it."""
    one, two, same = (lambda s: s + 1), (lambda s: s + 2), (lambda s: s + 1)
    assert fingerprint(one) != fingerprint(two)
    assert fingerprint(one) == fingerprint(same)


def test_async_nodes_of_one_name_differ():
    """Coroutine functions of the same name are told apart by what they do (trap 8)."""

    def first() -> Any:
        async def node(state: Any) -> Any:
            return 1

        return node

    def second() -> Any:
        async def node(state: Any) -> Any:
            return 2

        return node

    def third() -> Any:
        def node(state: Any) -> Any:
            return 1

        return node

    assert distinct(first(), second(), third())


def test_defaults_and_bound_arguments_count():
    """Defaults, keyword defaults and what ``partial`` binds are part of the node."""

    def with_default(k: Any) -> Any:
        def node(state: Any, a: Any = k, *, b: Any = 0) -> Any:
            return a, b

        return node

    def with_keyword(k: Any) -> Any:
        def node(state: Any, a: Any = 0, *, b: Any = k) -> Any:
            return a, b

        return node

    base = with_default(0)
    assert distinct(
        with_default(1),
        with_keyword(1),
        functools.partial(base),
        functools.partial(base, 1),
        functools.partial(base, a=1),
        functools.partial(base, b=1),
        functools.partial(functools.partial(base, a=1), b=1),
    )


class Agent:
    level = 1

    def __init__(self, k: Any) -> None:
        self.k = k
        self.calls = 0
        self.log: list[Any] = []
        self._client: Any = None
        self.lock = threading.Lock()

    def __call__(self, state: Any) -> Any:
        self.calls += 1
        self.log.append(state)
        self._connect()
        return self.k

    def _connect(self) -> None:
        if self._client is None:
            self._client = open("/dev/null")  # noqa: SIM115
            self._client.close()

    def other(self, state: Any) -> Any:
        return self.k

    def with_k(self, k: Any) -> Agent:
        self.k = k
        return self


class Child(Agent):
    def other(self, state: Any) -> Any:
        return self.k, "child"


def test_callable_objects_differ_by_state_and_class():
    """Objects of one class with other state, and of another class, are other nodes (trap 8)."""
    assert distinct(Agent(1), Agent(2), Agent("1"), Child(1))
    assert distinct(Agent(1).other, Agent(2).other, Agent(1).__call__, Child(1).other)
    assert distinct(Agent(1), Agent(1).with_k(2))
    assert fingerprint(Agent(1).with_k(2)) == fingerprint(Agent(2))


def test_calls_do_not_change_a_fingerprint():
    """Counters, logs and clients that the code itself keeps are not part of it (trap 16)."""
    calls: list[Any] = []
    count = 0
    cache: dict[str, Any] = {}
    seen = types.SimpleNamespace(n=0, k=3)
    agent = Agent(1)

    def node(state: Any) -> Any:
        nonlocal count
        count += 1
        calls.append(state)
        cache[state] = len(calls)
        seen.n += 1
        return agent(state)

    before = fingerprint(node), fingerprint(agent), fingerprint(agent.__call__)
    for n in range(50):  # enough for the interpreter to specialise the bytecode
        node(str(n))
    assert (fingerprint(node), fingerprint(agent), fingerprint(agent.__call__)) == before
    seen.k = 4
    assert fingerprint(node) != before[0]


def _configured(model: str) -> list[Any]:
    """Nodes that are told apart by nothing but what their own code also writes to."""
    settings, chosen, docs = {"model": model}, model, [model, "b"]

    def fills(state: Any) -> Any:
        settings.setdefault("temperature", 0)
        return settings["model"]

    def chooses(state: Any) -> Any:
        nonlocal chosen
        if chosen is None:
            chosen = "default"
        return chosen

    def sorts(state: Any) -> Any:
        docs.sort()
        return docs[0]

    class Lazy:
        def __init__(self) -> None:
            self.model, self.options = model, {"model": model}

        def __call__(self, state: Any) -> Any:
            if self.model is None:
                self.model = "default"
            self.options.setdefault("temperature", 0)
            return self.model

    class Named(RunnableLambda[Any, Any]):
        pass

    named = Named(double)
    named.metadata = {"model": model}
    return [fills, chooses, sorts, Lazy(), named]


def test_what_the_code_changes_counts_as_it_was_configured() -> None:
    """Two nodes made for two models differ, also where their code writes to what says so."""
    for one, other in zip(_configured("a"), _configured("c"), strict=True):
        before = fingerprint(one)
        assert before != fingerprint(other)
        if not isinstance(one, RunnableLambda):
            one({})
            assert fingerprint(one) == before
    for one, same in zip(_configured("a"), _configured("a"), strict=True):
        assert fingerprint(one) == fingerprint(same)


def counted(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(state: Any) -> Any:
        wrapper.calls += 1
        wrapper.log.append(state)
        return note_call(function)

    wrapper.calls, wrapper.log, function.times = 0, [], 0
    return wrapper


def note_call(function: Any) -> Any:
    function.times += 1
    return function.times


def test_what_the_code_writes_to_functions_does_not_count() -> None:
    """Counters and logs that a decorator or a helper keeps on a function are as it was made."""
    once, twice = counted(lambda state: 1), functools.lru_cache(counted(lambda state: 1))
    before = fingerprint(once), fingerprint(twice)
    once("a"), twice("a")
    assert (once.calls, once.log, once.__wrapped__.times) == (1, ["a"], 1)
    assert (fingerprint(once), fingerprint(twice)) == before


def test_marks_on_functions_do_not_count() -> None:
    """What tests and type checkers are told of a function does nothing when it runs."""
    before = fingerprint(plain_one)
    try:
        pytest.mark.usefixtures()(override(plain_one))
        assert plain_one.__dict__
        assert fingerprint(plain_one) == before
    finally:
        plain_one.__dict__.clear()


SEEN: list[Any] = []
TOTAL = 0
STEPS = itertools.count()
SETTINGS = {"k": 1}
BROKEN = Client()
BROKEN.socket.close()


class Totals:
    n = 0


def records(state: Any) -> Any:
    global TOTAL
    TOTAL += 1
    SEEN.append(next(STEPS))
    Totals.n += 1
    return SETTINGS["k"]


def uses_settings(state: Any) -> Any:
    return SETTINGS["k"]


def uses_client(state: Any) -> Any:
    return BROKEN.get(state)


def test_module_state_that_the_code_changes_does_not_count(monkeypatch):
    """A module's counters do not count, its settings do."""
    before = fingerprint(records)
    records(1)
    assert (TOTAL, len(SEEN), Totals.n) == (1, 1, 1)
    assert fingerprint(records) == before
    other = fingerprint(uses_settings)
    monkeypatch.setitem(SETTINGS, "k", 2)
    assert fingerprint(records) != before
    assert fingerprint(uses_settings) != other


def test_module_objects_without_a_key_count_by_name(monkeypatch, client):
    """A global client does not stop a node from being cached."""
    before = fingerprint(uses_client)
    monkeypatch.setitem(globals(), "BROKEN", client)
    assert fingerprint(uses_client) == before
    monkeypatch.setitem(globals(), "BROKEN", threading.Event())
    assert fingerprint(uses_client) != before


class Proxy:
    """Stands for something that is not there yet, as web frameworks' context objects do."""

    @property
    def __class__(self) -> Any:  # type: ignore[override]
        raise RuntimeError("no context")

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("no context")


PROXY = Proxy()


def uses_proxy(state: Any) -> Any:
    return PROXY.user


def test_objects_that_refuse_to_be_looked_at_do_no_harm():
    """An unbound proxy counts by type among the globals; a captured one is refused by name."""
    assert fingerprint(uses_proxy) == fingerprint(uses_proxy)
    assert path_of(make(PROXY)) == 'node: closure["k"]'


class Settings:
    def __init__(self, model: str) -> None:
        self.model = model
        self.client = Client()
        self.client.socket.close()


SETTING = Settings("small")


def uses_setting(state: Any) -> Any:
    return SETTING.client, SETTING.model


def test_used_attributes_of_such_objects_count(monkeypatch):
    """What can be keyed of a global object is keyed, if the code reads it."""
    before = fingerprint(uses_setting)
    monkeypatch.setattr(SETTING, "model", "large")
    assert fingerprint(uses_setting) != before


def test_what_carries_no_configuration_counts_by_type():
    """Locks, queues, loggers and the like are part of a node only by their type."""
    makers: list[Any] = [
        threading.Lock,
        threading.RLock,
        threading.Event,
        threading.local,
        queue.Queue,
        object,
        itertools.count,
        lambda: logging.getLogger("a"),
        lambda: contextvars.ContextVar("a"),
    ]
    for maker in makers:
        assert fingerprint(make(maker())) == fingerprint(make(maker()))
    assert distinct(*(make(maker()) for maker in makers))


class Jobs(queue.Queue[Any]):
    def __init__(self, k: int) -> None:
        super().__init__()
        self.k, self.jobs, self.worker = k, 0, threading.Thread()

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        self.jobs += 1
        super().put(item, block, timeout)


class Workers(concurrent.futures.ThreadPoolExecutor):
    pass


class Here(threading.local):
    pass


def test_what_happens_in_a_queue_of_ones_own_does_not_count() -> None:
    """Its class and what it was made with do, not what it keeps as a queue or has no key."""

    def uses(jobs: Jobs, *more: Any) -> Any:
        def node(state: Any) -> Any:
            jobs.put(state)
            return more

        return node

    jobs, workers, here = Jobs(1), Workers(1), Here()
    node = uses(jobs, workers, here)
    assert distinct(node, uses(Jobs(2), workers, here))
    before = fingerprint(node)
    node(1)
    workers.submit(node, 2).result()
    workers.shutdown()
    here.k = 1
    assert jobs.qsize() == jobs.jobs == 2
    assert fingerprint(node) == before


def decorate(k: Any) -> Any:
    def decorator(function: Any) -> Any:
        @functools.wraps(function)
        def wrapper(*args: Any) -> Any:
            return function(*args), k

        return wrapper

    return decorator


def plain_one(state: Any) -> Any:
    return 1


def plain_two(state: Any) -> Any:
    return 2


def test_decorated_functions_count_with_decorator_and_function():
    """Both the wrapper with what it holds and the wrapped function are part of the node."""
    assert distinct(
        plain_one,
        decorate(1)(plain_one),
        decorate(2)(plain_one),
        decorate(1)(plain_two),
        functools.lru_cache(plain_one),
        functools.lru_cache(plain_two),
        functools.lru_cache(5)(plain_one),
    )


def test_builtin_callables_have_a_fingerprint():
    """Functions written in C, and bound methods of values, count by name and value."""
    assert distinct(
        len,
        max,
        str.upper,
        str.lower,
        "a".join,
        "b".join,
        operator.itemgetter("a"),
        operator.itemgetter("b"),
        operator.attrgetter("a"),
        dict.fromkeys,
        int,
        Agent,
        Child,
    )


def recursive(n: int) -> Any:
    return [mutual, n]


def mutual(n: int) -> Any:
    return recursive(n)


def test_recursion_ends():
    """Functions and objects that reach each other are described once."""
    agent = Agent(1)
    agent.k = agent
    one, other = Agent(1), Agent(2)
    one.k, other.k = other, one
    ring = make(1)
    ring.__closure__[0].cell_contents = ring
    assert distinct(recursive, mutual, agent, one, ring)


def test_long_chains_of_helpers_are_no_recursion():
    """A thousand functions that call each other in a row have a fingerprint."""
    namespace: dict[str, Any] = {"__name__": "chain"}
    lines = [f"def f{n}(s):\n    return f{n + 1}(s)\n" for n in range(1000)]
    exec("".join(lines) + "def f1000(s):\n    return 1\n", namespace)
    before = fingerprint(namespace["f0"])
    exec("def f1000(s):\n    return 2\n", namespace)
    assert fingerprint(namespace["f0"]) != before


# -- what cannot be keyed -------------------------------------------------------------------------


def test_captured_clients_are_named(client):
    """The path says which function captured the client, and how."""
    retrieve = make(client)
    retrieve.__name__ = "retrieve"

    def with_default(state: Any, db: Any = client, *, other: Any = 1) -> Any:
        return db

    def with_keyword(state: Any, *, db: Any = client) -> Any:
        return db

    class Holder:
        def __init__(self) -> None:
            self.client = client

        def __call__(self, state: Any) -> Any:
            return self.client

        def run(self, state: Any) -> Any:
            return self.client

    assert path_of(retrieve) == 'retrieve: closure["k"].socket'
    assert path_of(with_default) == 'with_default: default["db"].socket'
    assert path_of(with_keyword) == 'with_keyword: default["db"].socket'
    assert path_of(functools.partial(make(1), client)) == "partial.args[0].socket"
    assert path_of(functools.partial(make(1), a=client)) == 'partial["a"].socket'
    assert path_of(Holder()) == "Holder.client.socket"
    assert path_of(Holder().run) == "Holder.run: self.client.socket"
    assert path_of(client.get) == "Client.get: self.socket"
    assert path_of(make({"a": [client]})) == 'node: closure["k"]["a"][0].socket'
    assert path_of(make(retrieve)) == 'retrieve: closure["k"].socket'
    assert path_of(RunnableLambda(retrieve)) == 'retrieve: closure["k"].socket'
    assert path_of(make(iter([1]))) == 'node: closure["k"]'
    assert path_of(make(x for x in [1])) == 'node: closure["k"]'


def test_an_object_refused_once_is_refused_again(client):
    """Having met an object where it does not matter does not make it pass where it does."""
    BROKEN_TOO = types.ModuleType("m")
    namespace: dict[str, Any] = {"__name__": "tests.made", "client": client, "m": BROKEN_TOO}
    exec(
        "def outer(k):\n    def node(state):\n        return client, k\n    return node\n",
        namespace,
    )
    assert fingerprint(namespace["outer"](1))
    assert path_of(namespace["outer"](client)) == 'node: closure["k"].socket'
    namespace["clients"] = {1: client}
    exec("def other():\n    return clients[1], clients\n", namespace)
    exec("def first(k):\n    return lambda state: (clients, later(k))\n", namespace)
    exec("def later(k):\n    return other, k\n", namespace)
    assert path_of(namespace["first"](client)) == '<lambda>: closure["k"].socket'
    assert path_of([namespace["other"], namespace["outer"](client)]) == (
        'node: closure["k"].socket'
    )


def test_a_chain_with_a_client_is_refused_where_it_is_built_in(client):
    """Among the globals only the client counts by type, in a closure it is named."""
    assert path_of(make(RunnableLambda(client.get) | double)) == "Client.get: self.socket"
    assert path_of(functools.partial(double, y=graph(client.get))) == "Client.get: self.socket"


# -- classes --------------------------------------------------------------------------------------


def class_with(**members: Any) -> type:
    return type("Made", (), {"__module__": __name__, **members})


def test_classes_count_by_what_is_in_them():
    """Methods, constants, bases, fields and annotations are part of a class."""

    @dataclasses.dataclass
    class Fields:
        a: int = 1

    @dataclasses.dataclass
    class OtherDefault:
        a: int = 2

    @dataclasses.dataclass
    class OtherType:
        a: str = 1  # type: ignore[assignment]

    @dataclasses.dataclass
    class Factory:
        a: list[int] = dataclasses.field(default_factory=list)

    class Model(BaseModel):
        a: int = 1

    class Constrained(BaseModel):
        a: int = Field(1, gt=0)

    class Annotated_(BaseModel):
        a: Annotated[int, "x"] = 1

    class Typed(TypedDict):
        a: int

    class TypedOther(TypedDict):
        a: str

    class Named(NamedTuple):
        a: int = 1

    class NamedOther(NamedTuple):
        a: int = 2

    class Color(enum.Enum):
        RED = 1

    class ColorOther(enum.Enum):
        RED = 2

    class WithProperty:
        @property
        def a(self) -> int:
            return 1

    class WithOtherProperty:
        @property
        def a(self) -> int:
            return 2

    class Static:
        @staticmethod
        def a() -> int:
            return 1

    class OfClass:
        @classmethod
        def a(cls) -> int:
            return 1

    class Slots:
        __slots__ = ("a",)

    class Half:
        def a(self, n: int) -> int:
            return n

        b = functools.partialmethod(a, 1)

    class OtherHalf:
        def a(self, n: int) -> int:
            return n

        b = functools.partialmethod(a, 2)

    class Checked(BaseModel):
        a: int = 1

        @field_validator("a", mode="before")
        @classmethod
        def check(cls, value: Any) -> Any:
            return value

    class CheckedLater(BaseModel):
        a: int = 1

        @field_validator("a", mode="after")
        @classmethod
        def check(cls, value: Any) -> Any:
            return value

    assert distinct(
        class_with(),
        class_with(a=1),
        class_with(a=2),
        class_with(a=plain_one),
        class_with(a=plain_two),
        class_with(a=(1, threading.Lock())),
        class_with(a=(2, threading.Lock())),
        Fields,
        OtherDefault,
        OtherType,
        Factory,
        Model,
        Constrained,
        Annotated_,
        Typed,
        TypedOther,
        Named,
        NamedOther,
        Color,
        ColorOther,
        WithProperty,
        WithOtherProperty,
        Static,
        OfClass,
        Slots,
        Half,
        OtherHalf,
        Checked,
        CheckedLater,
    )


def test_calls_do_not_change_an_enum() -> None:
    """Its members keep what a cached property found and what they count; any kind will do."""

    class Mode(enum.Enum):
        FAST = 1

        def __init__(self, value: int) -> None:
            self.calls = 0

        def __call__(self) -> int:
            self.calls += 1
            return self.doubled

        @functools.cached_property
        def doubled(self) -> int:
            return 2 * self.value

    class Name(str, enum.Enum):
        A = "a"

    class Number(enum.IntEnum):
        A = 1

    class Flags(enum.Flag):
        A = 1

    kinds = (Mode, Name, Number, Flags)
    assert distinct(*kinds)
    before = [fingerprint(kind) for kind in kinds]
    assert (Mode(1)(), str(Name("a")), repr(Number(1)), Flags(1) | Flags(0)) != ()
    assert [fingerprint(kind) for kind in kinds] == before


def test_values_of_user_classes_count_with_the_class():
    """A captured dataclass, model or enum member brings its own methods along."""

    def made(result: int) -> Any:
        @dataclasses.dataclass
        class Config:
            k: int = 1

            def width(self) -> int:
                return result

        class Model(BaseModel):
            k: int = 1
            _n: int = PrivateAttr(default=0)

            def width(self) -> int:
                return result

        class Mode(enum.Enum):
            FAST = 1

            def width(self) -> int:
                return result

        return Config(), Model(), Mode.FAST

    for one, same, other in zip(made(1), made(1), made(2), strict=True):
        assert fingerprint(make(one)) == fingerprint(make(same))
        assert fingerprint(make(one)) != fingerprint(make(other))
    config, model, _ = made(1)
    before = fingerprint(make(config)), fingerprint(make(model))
    config.k = model.k = 5
    assert fingerprint(make(config)) != before[0]
    assert fingerprint(make(model)) != before[1]


# -- langchain and langgraph ----------------------------------------------------------------------


def double(x: Any) -> Any:
    return x * 2


def treble(x: Any) -> Any:
    return x * 3


async def adouble(x: Any) -> Any:
    return x * 2


@tool
def find(query: str) -> str:
    """Find something."""
    return double(query)


@tool
def look(query: str) -> str:
    """Look for something."""
    return double(query)


class Search(BaseTool):
    name: str = "search"
    description: str = "searches"
    limit: int = 3

    def _run(self, query: str) -> str:
        return query * self.limit


class Echo(SimpleChatModel):
    prefix: str = ""
    calls: int = 0
    _log: list[str] = PrivateAttr(default_factory=list)

    def _call(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> str:
        self.calls += 1
        self._log.append("x")
        return self.prefix

    @property
    def _llm_type(self) -> str:
        return "echo"


class Step(Runnable[Any, Any]):
    def __init__(self, k: int) -> None:
        self.k = k

    def invoke(self, input: Any, config: Any = None, **kwargs: Any) -> Any:
        return self.k


class State(TypedDict):
    x: int


def graph(node: Any = double, reducer: Any = None, name: str = "a", route: Any = None) -> Any:
    schema = TypedDict("schema", {"x": Annotated[int, reducer or operator.add]})  # noqa: UP013
    builder = StateGraph(schema)
    builder.add_node(name, node)
    builder.add_edge(START, name)
    if route is not None:
        builder.add_conditional_edges(name, route, {"a": name})
    return builder.compile()


def stream_twice(items: Any) -> Any:
    for item in items:
        yield item * 2


def stream_thrice(items: Any) -> Any:
    for item in items:
        yield item * 3


KINDS: dict[str, list[Any]] = {
    "runnable callable": [
        lambda: RunnableCallable(double),
        lambda: RunnableCallable(treble),
        lambda: RunnableCallable(double, adouble),
        lambda: RunnableCallable(None, adouble),
    ],
    "lambda": [
        lambda: RunnableLambda(double),
        lambda: RunnableLambda(treble),
        lambda: RunnableLambda(adouble),
    ],
    "generator": [
        lambda: RunnableGenerator(stream_twice),
        lambda: RunnableGenerator(stream_thrice),
    ],
    "sequence": [
        lambda: RunnableLambda(double) | treble,
        lambda: RunnableLambda(treble) | double,
        lambda: RunnableLambda(double) | treble | double,
    ],
    "parallel": [
        lambda: RunnableParallel(a=double, b=treble),
        lambda: RunnableParallel(a=treble, b=double),
        lambda: RunnableParallel(a=double, c=treble),
    ],
    "branch": [
        lambda: RunnableBranch((bool, double), treble),
        lambda: RunnableBranch((bool, treble), double),
    ],
    "binding": [
        lambda: RunnableLambda(double),
        lambda: RunnableLambda(double).bind(stop=["a"]),
        lambda: RunnableLambda(double).bind(stop=["b"]),
        lambda: RunnableLambda(double).with_config(configurable={"k": 1}),
    ],
    "retry": [
        lambda: RunnableLambda(double).with_retry(),
        lambda: RunnableLambda(double).with_retry(stop_after_attempt=9),
        lambda: RunnableLambda(treble).with_retry(),
        lambda: RunnableLambda(double).with_retry(retry_if_exception_type=(KeyError,)),
    ],
    "fallbacks": [
        lambda: RunnableLambda(double).with_fallbacks([RunnableLambda(treble)]),
        lambda: RunnableLambda(treble).with_fallbacks([RunnableLambda(double)]),
    ],
    "assign": [
        lambda: RunnablePassthrough.assign(a=double),
        lambda: RunnablePassthrough.assign(a=treble),
        lambda: RunnablePassthrough.assign(b=double),
        lambda: RunnablePassthrough(),
    ],
    "prompt": [
        lambda: PromptTemplate.from_template("Hi {x}"),
        lambda: PromptTemplate.from_template("Ho {x}"),
        lambda: ChatPromptTemplate.from_messages([("system", "Hi {x}"), ("placeholder", "{m}")]),
        lambda: ChatPromptTemplate.from_messages([("system", "Ho {x}"), ("placeholder", "{m}")]),
        lambda: ChatPromptTemplate.from_messages([("user", "Hi {x}"), ("placeholder", "{m}")]),
        lambda: ChatPromptTemplate.from_messages([("user", "Hi {x}")]).partial(x="1"),
        lambda: ChatPromptTemplate.from_messages([HumanMessage("Hi")]),
    ],
    "model": [
        lambda: FakeListChatModel(responses=["a"]),
        lambda: FakeListChatModel(responses=["b"]),
        lambda: Echo(prefix="a"),
        lambda: Echo(prefix="b"),
        lambda: Echo(prefix="a").bind(stop=["x"]),
    ],
    "chain": [
        lambda: (
            ChatPromptTemplate.from_messages([("user", "{x}")])
            | Echo(prefix="a")
            | StrOutputParser()
        ),
        lambda: (
            ChatPromptTemplate.from_messages([("user", "{x}")])
            | Echo(prefix="b")
            | StrOutputParser()
        ),
    ],
    "tool": [
        lambda: find,
        lambda: look,
        lambda: Search(),
        lambda: Search(limit=4),
        lambda: Search(description="other"),
        lambda: StructuredTool.from_function(double, name="t", description="d"),
        lambda: StructuredTool.from_function(treble, name="t", description="d"),
    ],
    "tool node": [
        lambda: ToolNode([find]),
        lambda: ToolNode([look]),
        lambda: ToolNode([find, look]),
        lambda: ToolNode([find], handle_tool_errors=True),
        lambda: ToolNode([find], messages_key="m"),
    ],
    "own runnable": [lambda: Step(1), lambda: Step(2)],
    "graph": [
        lambda: graph(),
        lambda: graph(treble),
        lambda: graph(reducer=operator.mul),
        lambda: graph(reducer=lambda a, b: a),
        lambda: graph(reducer=lambda a, b: b),
        lambda: graph(name="b"),
        lambda: graph(route=lambda s: "a"),
        lambda: graph(route=lambda s: "b"),
        lambda: graph(graph()),
        lambda: graph(graph(treble)),
    ],
    "node": [lambda: graph().nodes["a"].bound, lambda: graph(treble).nodes["a"].bound],
    "entrypoint": [lambda: entrypoint()(double), lambda: entrypoint()(treble)],
    "captured": [
        lambda: make(RunnableLambda(double)),
        lambda: make(RunnableLambda(treble)),
        lambda: make(find),
        lambda: make(graph()),
        lambda: make(graph(treble)),
        lambda: make(Echo(prefix="a")),
        lambda: make([find, look]),
        lambda: make({"a": RunnableLambda(double)}),
    ],
}


@pytest.mark.parametrize("kind", KINDS)
def test_runnables_count_by_their_parts(kind):
    """Made anew they are the same; with another part they are another."""
    assert distinct(*(maker() for maker in KINDS[kind]))
    for maker in KINDS[kind]:
        assert fingerprint(maker()) == fingerprint(maker())


def test_watching_a_run_is_no_part_of_it():
    """Names, tags, metadata and checkpointers do not change what is computed."""
    plain = RunnableLambda(double)
    assert fingerprint(plain.with_config(tags=["a"], run_name="b")) == fingerprint(
        plain.with_config(tags=["c"], metadata={"x": object()})
    )
    builder = StateGraph(State)
    builder.add_node("a", double)
    builder.add_edge(START, "a")
    assert fingerprint(builder.compile()) == fingerprint(
        builder.compile(checkpointer=InMemorySaver(), name="x")
    )


def test_who_asks_is_no_part_of_a_graph():
    """What a graph's own config says of threads and of the cache is none of its results' business;
    what else it says must have a key."""
    plain = graph()
    for name in ("thread_id", "checkpoint_ns", "cache_control", "__pregel_x"):
        assert fingerprint(plain.with_config(configurable={name: "a"})) == fingerprint(plain)
    bound = plain.with_config(configurable={"db": iter(())})
    assert path_of(bound) == 'CompiledStateGraph.config["db"]'


def test_running_does_not_change_a_fingerprint():
    """Models, tools and graphs that have been used are what they were."""
    model, listed = Echo(prefix="a"), FakeListChatModel(responses=["a", "b"])
    chain = RunnableLambda(lambda x: [HumanMessage("x")]) | model
    compiled = graph(lambda s: {"x": 1})
    objects = [model, listed, chain, compiled, find, compiled.nodes["a"].bound]
    before = [fingerprint(obj) for obj in objects]
    listed.invoke("x")
    chain.invoke(1)
    compiled.invoke({"x": 1})
    find.invoke({"query": "a"})
    assert [fingerprint(obj) for obj in objects] == before


def test_an_edited_helper_changes_the_tool(monkeypatch):
    """What a tool calls in its own package is part of the tool."""
    before = fingerprint(find), fingerprint(graph(ToolNode([find])))
    monkeypatch.setitem(globals(), "double", treble)
    assert fingerprint(find) != before[0]
    assert fingerprint(graph(ToolNode([find]))) != before[1]


def test_models_that_say_nothing_about_themselves_count_by_their_fields():
    """A chat model without identifying parameters is told apart by what it holds."""
    assert BaseChatModel._identifying_params is Echo._identifying_params
    assert distinct(Echo(prefix="a"), Echo(prefix="b"))


def test_parts_of_runnables_are_named(client):
    """The path leads through the runnable to what cannot be keyed."""
    assert path_of(RunnableLambda(double).bind(db=client)) == (
        'RunnableBinding.kwargs["db"].socket'
    )
    assert path_of(RunnableLambda(double) | client.get) == "Client.get: self.socket"


# -- modules as values ----------------------------------------------------------------------------

MODULES = {
    "another name": "def node(s):\n    h = helpers\n    return h.helper()",
    "a choice": "def node(s):\n    return (helpers if s else json).helper()",
    "another choice": "def node(s):\n    return (helpers or json).helper()",
    "a loop": "def node(s):\n    return [m.helper() for m in (helpers,)]",
    "a default": "def node(s, h=helpers):\n    return h.helper()",
    "a closure": "def make(h):\n    return lambda s: h.helper()\nnode = make(helpers)",
    "a captured attribute": (
        "class Node:\n    def __init__(self, h):\n        self.h = h\n"
        "    def __call__(self, s):\n        return self.h.helper()\nnode = Node(helpers)"
    ),
    "a class's attribute": "class C:\n    h = helpers\ndef node(s):\n    return C.h.helper()",
    "a table": "TABLE = {'x': helpers}\ndef node(s):\n    return TABLE['x'].helper()",
    "an argument": "def use(h):\n    return h.helper()\ndef node(s):\n    return use(helpers)",
    "a partial function": "f = partial(getattr, helpers)\ndef node(s):\n    return f('helper')",
    "a long name": (
        "import pk.sub.helpers\ndef node(s):\n    h = pk.sub.helpers\n    return h.helper()"
    ),
    "a lazy name": "def node(s):\n    return lazy.helper()",
}


@pytest.mark.parametrize("source", MODULES.values(), ids=MODULES)
def test_an_edit_of_a_module_that_is_used_as_a_value_changes_the_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    """Whatever the node may do with a module of its package, a comment in there does nothing."""
    head = "import json\nfrom functools import partial\nfrom pk.sub import helpers, lazy\n"
    prints = []
    for n, (word, comment) in enumerate((("old", ""), ("old", "# more\n"), ("new", ""))):
        package = Packages(tmp_path / str(n), {"pk/__init__.py": "", "pk/sub/__init__.py": ""})
        package.write("pk/sub/deep.py", f"from pk import main\ndef deep(): return '{word}'\n")
        package.write("pk/sub/broken.py", "def")
        text = f"{comment}from pk.sub import deep\ndef helper(): return deep.deep()\n"
        text += "def unused(): import pk.sub.broken\n"
        package.write("pk/sub/helpers.py", text)
        text = (
            "def __getattr__(n):\n    from pk.sub import helpers\n    return getattr(helpers, n)\n"
        )
        package.write("pk/sub/lazy.py", text)
        package.write("pk/main.py", head + source)
        for name in [name for name in sys.modules if top_level(name) == "pk"]:
            monkeypatch.delitem(sys.modules, name)
        with monkeypatch.context() as patch:
            patch.syspath_prepend(package.directory)
            main = importlib.import_module("pk.main")
            prints.append(fingerprint(main.node))
            main.node(1)
            package.write("pk/sub/helpers.py", "def helper(): return 'what is not loaded'")
            assert fingerprint(main.node) == prints[-1]
    for name in [name for name in sys.modules if top_level(name) == "pk"]:
        monkeypatch.delitem(sys.modules, name)
    assert prints[0] == prints[1] != prints[2]


def test_modules_as_values_that_have_no_source_count_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So do those of libraries, a script, and one whose file is gone; a node that only reads
    attributes needs no more."""
    one, two, gone = map(types.ModuleType, ("edited_one", "edited_two", "edited_gone"))
    loader = SourceFileLoader("edited_gone", "/nowhere/edited_gone.py")
    gone.__spec__ = ModuleSpec("edited_gone", loader)
    assert distinct(*map(make, (one, two, gone, json, sys.modules["__main__"], pytest)))
    module = module_of(
        monkeypatch, "import edited_app as h\ndef node(s): return h.LIMIT\nLIMIT = 1"
    )
    monkeypatch.setattr(module, "__spec__", None)
    before = fingerprint(module.node)
    module.unused = 1
    assert fingerprint(module.node) == before


# -- edits that only show in what is handed on, or in what comes in -----------------------------


def module_of(monkeypatch: pytest.MonkeyPatch, source: str) -> Any:
    """``source``, as a module of a package that is edited and imported anew."""
    module = types.ModuleType("edited_app")
    monkeypatch.setitem(sys.modules, "edited_app", module)
    # not with this module's annotations, which are text
    code = compile(textwrap.dedent(source), "edited_app.py", "exec", dont_inherit=True)
    exec(code, module.__dict__)
    return module


EDITED = {
    "a template": """
        from string import Template
        PROMPT = Template("old $q")
        def node(state):
            return PROMPT.substitute(state)
    """,
    "a dictionary in layers": """
        from collections import ChainMap
        CONFIG = ChainMap({}, {"model": "old"})
        def node(state):
            return CONFIG["model"]
    """,
    "a dictionary in Python": """
        from collections import UserDict
        CONFIG = UserDict(model="old")
        def node(state):
            return CONFIG["model"]
    """,
    "an ini file": """
        from configparser import ConfigParser
        CONFIG = ConfigParser()
        CONFIG.read_string("[model]\\nname = old")
        def node(state):
            return CONFIG["model"]["name"]
    """,
    "a command line": """
        from argparse import Namespace
        ARGS = Namespace(model="old")
        def node(state):
            return vars(ARGS)
    """,
    "a class's property": """
        class Meta(type):
            @property
            def model(cls):
                return "old"
        class Config(metaclass=Meta):
            pass
        def node(state):
            return Config.model
    """,
    "a field's title": """
        from pydantic import BaseModel, Field
        class Answer(BaseModel):
            text: str = Field(title="old")
        def node(state):
            return llm.with_structured_output(Answer)
    """,
    "a field's examples": """
        from pydantic import BaseModel, Field
        class Answer(BaseModel):
            text: str = Field(examples=["old"])
        def node(state):
            return llm.with_structured_output(Answer)
    """,
    "what a model reads of a tool": """
        def search(q: str):
            "old"
        def node(state):
            return llm.bind_tools([search])
    """,
    "what a model reads of several tools": """
        from typing import Annotated
        def search(q: Annotated[str, "old"]): ...
        def add(a: int, b: int): ...
        TOOLS = [add, search]
        def node(state):
            return llm.bind_tools(TOOLS, tool_choice="any")
    """,
    "what a model reads of a tool by keyword": """
        def search(q: str):
            "old"
        def node(state):
            return llm.bind(tools=(search,), **{"more": search})
    """,
    "what a model reads of the tools of an agent": """
        def search(q: str):
            "old"
        class Agent:
            def __init__(self):
                self.tools = {"search": search}
            def __call__(self, state):
                return llm.bind_tools([*self.tools.values()])
        node = Agent()
    """,
    "what a model reads of a tool's field": """
        from typing import Annotated
        from pydantic import Field
        def search(q: Annotated[str, Field(description="old")]): ...
        def node(state):
            return llm.bind_tools([search])
    """,
    "a docstring that is printed": """
        def search(q: str):
            "old"
        def node(state):
            return search.__doc__
    """,
    "a captured tool": """
        def make(search):
            def node(state):
                return llm.bind_tools([search])
            return node
        def search(q: str):
            "old"
        node = make(search)
    """,
}


GRAPH = """
        from dataclasses import dataclass
        from typing import Annotated, Any, TypedDict
        from langgraph.graph import START, StateGraph
        from pydantic import BaseModel, field_validator
        class State(TypedDict, total=False):
            old: str
            q: str
        class Part(TypedDict, total=False):
            old: str
        def answer(state):
            return state
        def made(*schemas, input_schema=None, **more):
            builder = StateGraph(*schemas, **more)
            builder.add_node("answer", answer, input_schema=input_schema)
            return builder.add_edge(START, "answer").compile()
"""
GRAPHS = {
    "config": """
        graph = made(dict).with_config(configurable={"model": "old"})
    """,
    "output schema": """
        graph = made(State, output_schema=Part)
    """,
    "input schema": """
        graph = made(State, input_schema=Part)
    """,
    "state's default": """
        @dataclass
        class Loaded:
            k: str = "old"
        graph = made(Loaded)
    """,
    "state's method": """
        class Loaded(BaseModel):
            k: str = ""
            def prompt(self):
                return "old"
        graph = made(Loaded)
    """,
    "node's validator": """
        class Loaded(BaseModel):
            q: str = ""
            @field_validator("q")
            @classmethod
            def check(cls, value):
                return "old" + value
        graph = made(State, input_schema=Loaded)
    """,
    "context's default": """
        @dataclass
        class Context:
            model: str = "old"
        graph = made(dict, context_schema=Context)
    """,
    "channel's class": """
        class Doc(BaseModel):
            k: str = "old"
        class Named(TypedDict):
            doc: "Doc"
        graph = made(Named)
    """,
    "task": """
        from langgraph.func import entrypoint, task
        @task
        def ask(q):
            return "old"
        @entrypoint()
        def graph(q):
            return ask(q).result()
    """,
}
for _name, _source in GRAPHS.items():
    EDITED[f"a graph's {_name}"] = textwrap.dedent(GRAPH + _source) + "node = graph"
    EDITED[f"a called graph's {_name}"] = (
        textwrap.dedent(GRAPH + _source) + "node = lambda state: graph.invoke(state)"
    )
EDITED["a task"] = """
        from langgraph.func import task
        @task
        def ask(q):
            return "old"
        def node(state):
            return ask(state).result()
"""
EDITED["a task's policy"] = """
        from langgraph.func import task
        from langgraph.types import CachePolicy
        @task(cache_policy=CachePolicy(key_func=lambda q: "old"))
        def ask(q):
            return q
        def node(state):
            return ask(state).result()
"""
EDITED["a captured task"] = """
        from langgraph.func import task
        def make(ask):
            def node(state):
                return ask(state).result()
            return node
        node = make(task(lambda q: "old"))
"""

EDITED |= {
    "a table that the code fills": """
        TABLE = {"k": "old"}
        def node(state):
            TABLE.setdefault("n", 0)
            return TABLE["k"]
    """,
    "a name that the code binds anew": """
        model = "old"
        def node(state):
            global model
            model = model or "default"
            return model
    """,
    "an attribute that the code binds anew": """
        class Config:
            model = "old"
        def node(state):
            Config.model = Config.model or "default"
            return Config.model
    """,
    "a type adapter": """
        from pydantic import BaseModel, TypeAdapter
        class Doc(BaseModel):
            k: str = "old"
        DOCS = TypeAdapter(list[Doc])
        def node(state):
            return DOCS.validate_python(state)
    """,
    "a private attribute's default": """
        from pydantic import BaseModel, PrivateAttr
        class Doc(BaseModel):
            _k: str = PrivateAttr(default="old")
        def node(state):
            return Doc()._k
    """,
    "an array": """
        from array import array
        WEIGHTS = array("i", map(ord, "old"))
        def node(state):
            return WEIGHTS[0]
    """,
}

EDITED |= {
    "an attribute of the node": """
        def node(state):
            return node.prompt
        node.prompt = "old"
    """,
    "an attribute of a helper in a list": """
        def helper(): ...
        helper.meta = {"client": iter(()), "prompt": "old"}
        HELPERS = [helper]
        def node(state):
            return HELPERS[0].meta["prompt"]
    """,
    "an attribute that a decorator sets": """
        def prompt(text):
            def decorator(function):
                function.prompt = text
                return function
            return decorator
        @prompt("old")
        def helper(): ...
        def node(state):
            return helper.prompt
    """,
    "an attribute of a captured function": """
        def make(prompt):
            def helper(): ...
            helper.prompt = prompt
            return lambda state: helper.prompt
        node = make("old")
    """,
    "an attribute of a partial function": """
        from functools import partial
        node = partial(lambda state: node.prompt)
        node.prompt = "old"
    """,
    "an attribute of a function with a cache": """
        from functools import lru_cache
        @lru_cache
        def helper(): ...
        helper.prompt = "old"
        def node(state):
            return helper.prompt
    """,
    "an attribute that the code binds anew on a function": """
        def node(state):
            node.model = node.model or "default"
            return node.model
        node.model = "old"
    """,
}

ENUMS = {
    "a dunder": """
        def __str__(self):
            return "old"
    """,
    "a format": """
        def __format__(self, spec):
            return "old"
    """,
    "a private method": """
        def _shown(self):
            return "old"
    """,
    "a class method": """
        @classmethod
        def show(cls):
            return "old"
    """,
    "a static method": """
        @staticmethod
        def show():
            return "old"
    """,
    "a way to find members": """
        @classmethod
        def _missing_(cls, value):
            return "old"
    """,
    "a cached property": """
        @cached_property
        def shown(self):
            return "old"
    """,
    "an initializer": """
        def __init__(self, *value):
            self.prompt = "old"
    """,
    "a member's attribute": """
        B = 2, "old"
        def __new__(cls, value, prompt=""):
            made = object.__new__(cls)
            made._value_ = value
            made.prompt = prompt
            return made
    """,
}
ENUMS = {
    name: "import enum\nfrom functools import cached_property\nclass E(enum.Enum):\n    A = 1\n"
    + textwrap.indent(textwrap.dedent(body), "    ")
    + "value = E.A\n"
    for name, body in ENUMS.items()
}
EDITED |= {f"{name} of an enum": f"{s}def node(state): return E(2)" for name, s in ENUMS.items()}

SUBCLASSES = {
    "an event": """
        import threading
        class Own(threading.Event):
            def __init__(self, k):
                super().__init__()
                self.k = k
        def node(state, own=Own("old")):
            return own.k
    """,
    "an executor's method": """
        from concurrent.futures import Executor
        class Own(Executor):
            def submit(self, call, *args):
                return "old"
        def node(state, own=Own()):
            return own.submit(print)
    """,
    "a queue": """
        import queue
        class Own(queue.Queue):
            prompt = "old"
        OWN = Own()
        def node(state):
            return OWN.prompt
    """,
    "a logger": """
        import logging
        class Own(logging.Logger):
            def __init__(self, name, prompt):
                super().__init__(name)
                self.client, self.prompt = iter(()), prompt
        def node(state, own=Own("a", "old")):
            return own.prompt
    """,
    "what each thread has": """
        import threading
        class Own(threading.local):
            k = "old"
        def node(state, own=Own()):
            return own.k
    """,
}
EDITED |= {f"{name} of the user's": source for name, source in SUBCLASSES.items()}

CLIENT = """
        class Client:
            def __init__(self):
                self.socket = iter(())
            def fetch(self, state):
                return state
"""
AROUND_A_CLIENT = {
    "a chain": """
        from langchain_core.prompts import ChatPromptTemplate
        from langchain_core.runnables import RunnableLambda, RunnablePassthrough
        prompt = ChatPromptTemplate.from_messages([("system", "old"), ("human", "{q} {docs}")])
        found = RunnableLambda(Client().fetch)
        chain = {"docs": found | str, "q": RunnablePassthrough()} | prompt
        def node(state):
            return chain.invoke(state)
    """,
    "a retriever": """
        from langchain_core.embeddings import DeterministicFakeEmbedding
        from langchain_core.vectorstores import InMemoryVectorStore
        found = InMemoryVectorStore(DeterministicFakeEmbedding(size=3))
        retriever = found.as_retriever(search_kwargs={"k": "old"})
        def node(state):
            return retriever.invoke(state)
    """,
    "a graph": """
        from langgraph.graph import START, StateGraph
        def answer(state):
            return {"a": "old"}
        builder = StateGraph(dict).add_node("fetch", Client().fetch).add_node("answer", answer)
        graph = builder.add_edge(START, "fetch").add_edge("fetch", "answer").compile()
        def node(state):
            return graph.invoke(state)
    """,
    "tools": """
        from langchain_core.tools import StructuredTool
        def more(x: str):
            return "old"
        made = StructuredTool.from_function
        TOOLS = {1: [made(Client().fetch, description="d"), made(more, description="d")]}
        def node(state):
            return TOOLS[1][1].invoke(state)
    """,
    "keys that are no strings": """
        TABLE = {("a", 1): Client(), 2: iter(()), ("b", 2): [iter(()), {"k": "old"}]}
        def node(state):
            return TABLE[("b", 2)]
    """,
    "a named tuple": """
        from typing import Any, NamedTuple
        class Pair(NamedTuple):
            client: Any
            k: str
        PAIR = Pair(Client(), "old")
        def node(state):
            return PAIR.k
    """,
    "a record": """
        from dataclasses import dataclass
        from typing import Any
        @dataclass
        class Config:
            client: Any
            k: str
        CONFIGS = [{"main": Config(iter(()), "old")}]
        def node(state):
            return CONFIGS[0]["main"].k
    """,
    "an object in a list": """
        class Service(Client):
            def __init__(self, k):
                super().__init__()
                self.k = k
        SERVICES = [Service("old")]
        def node(state):
            return SERVICES[0].k
    """,
    "a class's table": """
        class Agent:
            TABLE = {"client": Client(), "k": "old"}
            def __call__(self, state):
                return self.TABLE["k"]
        node = Agent()
    """,
    "what contains itself": """
        TABLES = [{"client": iter(()), "k": "old"} for _ in range(20)]
        for table in TABLES:
            table["others"] = [(other,) for other in TABLES]
        def node(state):
            return TABLES[0]["k"]
    """,
}
EDITED |= {f"{name} around a client": CLIENT + s for name, s in AROUND_A_CLIENT.items()}


@pytest.mark.parametrize("source", EDITED.values(), ids=EDITED)
def test_an_edit_of_what_is_only_looked_at_changes_the_node(
    monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    """Values of the standard library that configure, schemas, and what a model is told of tools."""
    prints = [
        fingerprint(module_of(monkeypatch, source.replace("old", word)).node)
        for word in ("old", "old", "new")
    ]
    assert prints[0] == prints[1] != prints[2]


_FIELDS = """
        from pydantic import AliasChoices, BaseModel, Field, computed_field, create_model
        from pydantic.dataclasses import dataclass as checked
        from dataclasses import dataclass, field
        from typing import Annotated
"""
# each without what stands in <>, and with it
FIELDS = {
    "exclude": "class M(BaseModel):\n    x: str = Field(''<, exclude=True>)",
    "repr": "class M(BaseModel):\n    x: str = Field(''<, repr=False>)",
    "alias to validate": "class M(BaseModel):\n    x: str = Field(''<, validation_alias='y'>)",
    "aliases to validate": (
        "class M(BaseModel):\n    x: str = Field('', validation_alias=AliasChoices('x'<, 'y'>))"
    ),
    "alias to serialize": "class M(BaseModel):\n    x: str = Field(''<, serialization_alias='y'>)",
    "validate_default": "class M(BaseModel):\n    x: int = Field('1'<, validate_default=True>)",
    "frozen": "class M(BaseModel):\n    x: str = Field(''<, frozen=True>)",
    "annotation": (
        "class M(BaseModel):\n    x: Annotated[str, Field(title='a'<, exclude=True>)] = ''"
    ),
    "pattern": "class M(BaseModel):\n    x: str = Field('', pattern='a<b>')",
    "made by a call": "M = create_model('M', x=(str, Field(''<, exclude=True>)))",
    "of a checked dataclass": "@checked\nclass M:\n    x: str = Field(''<, repr=False>)",
    "computed": (
        "class M(BaseModel):\n    @computed_field(return_type=str<, alias='y'>)\n    @property\n"
        "    def x(self): return ''"
    ),
    "of a dataclass: repr": "@dataclass\nclass M:\n    x: str = field(default=''<, repr=False>)",
    "of a dataclass: compare": (
        "@dataclass\nclass M:\n    x: str = field(default=''<, compare=False>)"
    ),
    "of a dataclass: metadata": (
        "@dataclass\nclass M:\n    x: str = field(default=''<, metadata={'y': 1}>)"
    ),
    "all of a dataclass: eq": "@dataclass(<eq=False>)\nclass M:\n    x: str = ''",
    "all of a dataclass: repr": "@dataclass(<repr=False>)\nclass M:\n    x: str = ''",
    "all of a dataclass: order": "@dataclass(<order=True>)\nclass M:\n    x: str = ''",
}


@pytest.mark.parametrize("source", FIELDS.values(), ids=FIELDS)
def test_what_is_said_of_a_field_counts(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    """What a model or a dataclass shows, takes and compares is part of it, also in the input."""
    told = re.sub("[<>]", "", source)
    codes, inputs = [], []
    for body in (re.sub("<.*>", "", source), told, told):
        text = textwrap.dedent(_FIELDS) + body + "\ndef node(state):\n    return M()\n"
        module = module_of(monkeypatch, text)
        codes.append(fingerprint(module.node))
        inputs.append(Classes(double)(module.M))
    assert codes[0] != codes[1] == codes[2]
    assert inputs[0] != inputs[1] == inputs[2]


def test_docstrings_of_what_is_only_called_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a helper, a method and a bound argument they are comments, whatever goes into a call."""
    source = """
        from functools import partial
        OPTIONS = ["a"]
        def helper(options, more=None) -> "old":
            "old"
        class Agent:
            def run(self, state, step) -> "old":
                "old"
                return [self.run, helper(OPTIONS), helper([OPTIONS], more=OPTIONS)][1:]
        node = partial(Agent().run, step=1)
    """
    prints = [
        fingerprint(module_of(monkeypatch, source.replace("old", word)).node)
        for word in ("old", "new")
    ]
    assert prints[0] == prints[1]


LATE = {
    "a helper": ("def node(s): return {'answer': late(s)}", "def late(s): return 'old'"),
    "a helper's helper": (
        "def node(s): return {'answer': helper(s)}\ndef helper(s): return late(s)",
        "def late(s): return 'old'",
    ),
    "a closure": (
        """
        def make():
            def node(s): return {"answer": late(s)}
            yield node
            def late(s): return "old"
            yield
        made = make()
        node = next(made)
        """,
        "next(made)",
    ),
    "what never comes": (
        "def node(s): return {'answer': late(s) if s.get('answer') else old(s)}",
        "def old(s): return 1\ndef new(s): return 1",
    ),
}


@pytest.mark.parametrize(("source", "late"), LATE.values(), ids=LATE)
def test_a_helper_that_the_module_defines_after_compiling_counts(
    monkeypatch: pytest.MonkeyPatch, source: str, late: str
) -> None:
    """When the node is first called it is there; what is not there then, the node does not need."""
    cache = MemoryCache()

    def ran(word: str) -> int:
        module = module_of(monkeypatch, source.replace("old", word))
        builder = CachingStateGraph(Asked).add_node("n", module.node, cache_policy=CachePolicy())
        compiled = builder.add_edge(START, "n").compile(cache=cache)
        exec(late.replace("old", word), module.__dict__)
        for _ in range(2):
            compiled.invoke({"question": 1})
        return compiled.perf.stats().nodes["n"].runs

    assert [ran(word) for word in ("old", "old", "new")] == [1, 0, 1]


STATES = {
    "an enum's value": """
        from enum import Enum
        class Model(Enum):
            FAST = "old"
        value = Model.FAST
    """,
    "a dataclass's method": """
        from dataclasses import dataclass
        @dataclass
        class Doc:
            text: str
            def render(self):
                return "old" + self.text
        value = {"docs": [Doc("a")]}
    """,
    "a pydantic model's helper": """
        from pydantic import BaseModel
        PREFIX = "old"
        def prefixed(text):
            return PREFIX + text
        class Doc(BaseModel):
            text: str
            @property
            def shown(self):
                return prefixed(self.text)
        value = Doc(text="a")
    """,
    "a list's method": """
        class Docs(list):
            def render(self):
                return "old".join(self)
        value = Docs(["a"])
    """,
}
STATES |= {f"{name} of an enum": source for name, source in ENUMS.items()}


class Asked(TypedDict, total=False):
    question: Any
    answer: Any


@pytest.mark.parametrize("source", STATES.values(), ids=STATES)
def test_an_edit_of_a_class_in_the_input_is_another_input(
    monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    """The node may call its methods, and read an enum's value; unless it says ``version=``."""
    cache, runs = MemoryCache(), []

    def node(state: Asked) -> Asked:
        runs.append(state)
        return {"answer": "done"}

    def ran(word: str, policy: CachePolicy) -> bool:
        value = module_of(monkeypatch, source.replace("old", word)).value
        builder = CachingStateGraph(Asked).add_node("node", node, cache_policy=policy)
        before = len(runs)
        builder.add_edge(START, "node").compile(cache=cache).invoke({"question": value})
        return len(runs) > before

    assert [ran(word, CachePolicy()) for word in ("old", "old", "new")] == [True, False, True]
    assert [ran(word, CachePolicy(version=1)) for word in ("old", "new")] == [True, False]


def test_classes_of_libraries_in_the_input_count_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """They change with a package's version, which is no edit of the user's; so does what cannot be
    read. A class of the node's own package counts, wherever that is installed."""

    def node(state: Any) -> Any:
        return state

    classes = Classes(node)
    assert classes(BaseMessage) == classes(dataclasses.Field) == ""
    assert classes(type("Here", (), {"__module__": __name__})) != ""
    module = module_of(monkeypatch, "class Doc: ...")
    module.__file__ = "/usr/lib/python3/site-packages/edited_app.py"
    assert classes(module.Doc) == ""
    node.__module__ = "edited_app"
    assert Classes(node)(module.Doc) != ""


def test_a_root_model_that_is_captured_counts_by_what_it_holds() -> None:
    """It has neither extra fields nor private attributes that could be read."""

    class Words(RootModel[list[str]]):
        pass

    def node_of(words: Words) -> Any:
        return lambda state: words.root

    one, same, other = (fingerprint(node_of(Words([word]))) for word in "aab")
    assert one == same != other
