"""Random graphs and what people do with their threads, run with and without a cache.

A ``History`` is data: a graph, and actions on its threads (runs, answers to interrupts, edits of
state, forks, deletions). ``compare`` carries it out twice, action by action: on LangGraph's own
``StateGraph`` with a bare saver, and on this library's with a cache. After each action everything
a user can see has to be the same: the result or the error, the thread's state and its history.

Node bodies are functions of the fields they read, so a cache whose keys hold these fields must go
unnoticed. What is told apart by nothing but chance is left out: ids, times, and which of several
parallel nodes were still finished when one failed (only the node that LangGraph starts last fails,
and nodes run one by one).
"""

from __future__ import annotations

import asyncio
import operator
import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import combinations
from typing import Annotated, Any, Literal

from hypothesis import strategies as st
from langchain_core.runnables import RunnableConfig
from langgraph.errors import InvalidUpdateError
from langgraph.graph import END, START
from langgraph.graph import StateGraph as LangGraphStateGraph
from langgraph.types import CachePolicy as LangGraphCachePolicy
from langgraph.types import Command, Interrupt, PregelTask, RetryPolicy, Send, StateSnapshot
from langgraph.types import interrupt as ask
from typing_extensions import TypedDict

from langgraph_perf import CachePolicy, StateGraph

NUMBERS = ("a", "b", "c")
READABLE = (*NUMBERS, "tag", "log")
BOUND = 9
"""How many nodes run before conditional edges end a run."""
IDS = r"[0-9a-f-]{32,}"
ON_FORK = "on_fork" in {f.name for f in fields(CachePolicy)}


def mixed(old: int, new: int) -> int:
    """A reducer that remembers what it replaced, with few values, so that runs meet again."""
    return (old * 2 + new) % 5


class State(TypedDict, total=False):
    a: Annotated[int, mixed]
    b: Annotated[int, mixed]
    c: Annotated[int, mixed]
    n: Annotated[int, operator.add]
    tag: str  # two nodes of a step that write it are an error
    log: Annotated[list[str], operator.add]


class Numbers(TypedDict, total=False):
    a: Annotated[int, mixed]
    b: Annotated[int, mixed]
    c: Annotated[int, mixed]
    n: Annotated[int, operator.add]


# -- data -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Policy:
    """``key``: the whole input, the fields the node reads, or these as a function."""

    key: Literal["whole", "fields", "function"] = "whole"
    scope: Literal["global", "thread", "run"] = "global"
    on_fork: Literal["reuse", "refresh"] = "reuse"
    version: bool = True

    def of(self, node: Node, reads: tuple[str, ...]) -> CachePolicy:
        key: Any = None
        if self.key == "fields" and reads:
            key = reads
        elif self.key == "function":

            def key(state: Any) -> Any:
                return [state.get(name) for name in reads]

        more: dict[str, Any] = {"on_fork": self.on_fork} if ON_FORK else {}
        version = f"{node}" if self.version else None
        return CachePolicy(key=key, scope=self.scope, version=version, **more)


@dataclass(frozen=True)
class Route:
    """Where a node leads: ``static`` edges, a ``branch`` on the state, ``send`` or ``command``."""

    kind: str = "static"
    on: str = "a"
    targets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sub:
    """A graph in the place of a node: its nodes one after the other."""

    nodes: tuple[Node, ...]
    checkpointer: bool | None = None
    stops: bool = False


@dataclass(frozen=True)
class Node:
    """A node, deterministic in ``reads``.

    Args:
        asks: how many questions it asks a human, one after the other.
        asks_when: only if what it reads has this parity.
        fails: always for some inputs, or once at each step of each thread.
    """

    name: str
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    policy: Policy | None = None
    route: Route = Route()
    asks: int = 0
    asks_when: int | None = None
    fails: Literal["", "input", "once"] = ""
    retries: bool = False
    native_async: bool = False
    sub: Sub | None = None


@dataclass(frozen=True)
class Graph:
    nodes: tuple[Node, ...]
    entries: tuple[str, ...]
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class Act:
    """One thing done to a thread; ``number`` chooses among what there is, modulo how many."""

    do: str  # run, go_on, answer, update, fork, command, delete, clear
    thread: int = 0
    values: tuple[tuple[str, int], ...] = ()
    how: str = ""
    number: int = 0
    mode: str = "use"
    scope: str | None = None
    durability: str = "async"


@dataclass(frozen=True)
class History:
    graph: Graph
    acts: tuple[Act, ...] = field(default=())

    @property
    def hides_subgraphs(self) -> bool:
        """Whether an answer from the cache leaves out the checkpoints of a graph in a node."""
        return any(node.sub and node.policy for node in self.graph.nodes)


# -- generating -----------------------------------------------------------------------------------
# One draw chooses among combinations: drawing takes a good part of the time.

_policies = st.sampled_from(
    [
        *[None] * 12,
        *(
            Policy(key, scope, on_fork, version)
            for key in ("fields", "whole", "function")
            for scope in ("global", "global", "thread", "run")
            for on_fork in ("reuse", "refresh")
            for version in (True, True, True, False)
        ),
    ]
)
_reads = st.sampled_from([c for size in range(3) for c in combinations(READABLE, size)])
_writes = st.sampled_from(
    [c for size in range(3) for c in combinations(NUMBERS, size)] * 2 + [("tag",), ("a", "tag")]
)
_asks = st.sampled_from([*[(0, None)] * 14, *((n, w) for n in (1, 2) for w in (None, 0))])


@st.composite
def _nodes(
    draw: st.DrawFn, name: str, names: Sequence[str] = (), receivers: Sequence[str] = ()
) -> Node:
    """A node with a body; ``names``: where it can lead, in the order of the graph."""
    route = Route()
    if names:
        later = [other for other in names if other > name]
        kinds = ["branch", "command", *["static"] * 2 * bool(later), *["send"] * bool(receivers)]
        kind = draw(st.sampled_from(kinds))
        among = {"static": later, "send": receivers}.get(kind, names)
        targets = [(one,) for one in among] + list(combinations(among, 2))
        on = NUMBERS[draw(st.integers(0, 2))] if kind in ("branch", "send") else "a"
        route = Route(kind, on, draw(st.sampled_from(targets)))
    asks, asks_when = draw(_asks)
    return Node(
        name,
        reads=draw(_reads),
        writes=draw(_writes),
        policy=draw(_policies),
        route=route,
        asks=asks,
        asks_when=asks_when,
        native_async=draw(st.booleans()),
    )


_checkpointers = st.sampled_from((None, True, False))


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    count = draw(st.integers(2, 6))
    names = [f"n{i}" for i in range(count)]
    some = st.lists(st.sampled_from([*names, *[""] * 3 * count]), min_size=2, max_size=2)
    inside = {name: draw(_checkpointers) for name in sorted({*draw(some)} - {""})}
    # two runs of a graph that keeps one state cannot write it at the same time; what fails is last
    receivers = [name for name in names[:-1] if inside.get(name) is not True]
    nodes = []
    for name in names:
        node = draw(_nodes(name, names, receivers))
        changes: dict[str, Any] = {}
        if name in inside:
            inner = [draw(_nodes(f"{name}_{i}")) for i in range(draw(st.integers(1, 2)))]
            changes["sub"] = Sub(tuple(inner), inside[name], draw(st.integers(0, 3)) == 3)
            changes |= {"asks": 0, "native_async": False, "reads": ()}
            # its results depend on all it is given, and on what it remembers
            whole = node.policy is not None and inside[name] is not True
            changes["policy"] = Policy(scope=node.policy.scope) if node.policy and whole else None
            if node.route.kind == "command":
                changes["route"] = Route("branch", node.route.on, node.route.targets)
        elif name == names[-1]:
            fails = draw(st.sampled_from(("", "", "input", "once")))
            changes["fails"] = fails
            if fails == "once":
                changes["policy"] = None  # a stored answer would not fail
                changes["retries"] = draw(st.booleans())
        nodes.append(Node(**{**_shallow(node), **changes}))
    entries = draw(st.sampled_from([(names[0],), names[:2], names[-2:]]))
    before: list[str] = []
    after: list[str] = []
    stop = draw(st.integers(0, 3 * count))
    if stop < count:
        (before if stop % 2 else after).append(names[stop])
    return Graph(tuple(nodes), tuple(entries), tuple(before), tuple(after))


def _shallow(node: Node) -> dict[str, Any]:
    return {f.name: getattr(node, f.name) for f in fields(node)}


_values = st.sampled_from(
    ((), (("a", 1),), (("b", 1),), (("a", 1), ("b", 2)), (("a", 2), ("c", 1)))
)
_whats = st.sampled_from(
    [
        *[("run", "")] * 8,
        *(("answer", how) for how in ("plain", "plain", "id", "all", "unknown") * 2),
        *(("fork", how) for how in ("replay", "input", "update", "answer") * 2),
        *[("go_on", "")] * 4,
        *[("update", "")] * 4,
        *[("command", ""), ("delete", ""), ("clear", "")] * 2,
    ]
)
_hows = st.sampled_from(
    [
        (mode, scope, durability)
        for mode in ("use", "use", "use", "refresh", "bypass")
        for scope in (None, None, "thread", "run")
        for durability in ("async", "sync", "exit")
    ]
)


@st.composite
def _acts(draw: st.DrawFn) -> Act:
    do, how = draw(_whats)
    mode, scope, durability = draw(_hows)
    thread, number = draw(st.sampled_from((0, 0, 1))), draw(st.integers(0, 9))
    return Act(do, thread, draw(_values), how, number, mode, scope, durability)


_firsts = st.builds(Act, do=st.just("run"), values=_values)
# the same question on two threads, again and again
_talk = st.sampled_from(
    [
        *(Act("run", thread) for thread in (0, 1)),
        *(Act("answer", thread, (), how, 1) for thread in (0, 1) for how in ("plain", "all")),
    ]
)


def _histories(acts: st.SearchStrategy[Act], fewest: int, most: int) -> Any:
    return st.builds(
        lambda graph, first, more: History(graph, (first, *more)),
        graphs(),
        _firsts,
        st.lists(acts, min_size=fewest, max_size=most),
    )


histories: st.SearchStrategy[History] = st.one_of(
    _histories(_acts(), 1, 6), _histories(_acts(), 1, 6), _histories(_talk, 3, 6)
)
long_histories: st.SearchStrategy[History] = _histories(_acts(), 6, 10)


# -- building -------------------------------------------------------------------------------------


def _number(name: str, state: Any, reads: Sequence[str]) -> int:
    seen = [len(state.get(r, ())) if r == "log" else state.get(r) for r in reads]
    return zlib.crc32(f"{name}{seen}".encode())


def _run(node: Node, failed: set[Any], state: State, config: RunnableConfig) -> Any:
    number = _number(node.name, state, node.reads)
    answers = []
    if node.asks_when is None or number % 2 == node.asks_when:
        answers = [ask(f"{node.name} {i} {number}") for i in range(node.asks)]
    if node.fails == "input" and number % 3 == 0:
        raise ValueError(f"{node.name} cannot take {number}")
    if node.fails == "once":
        at = (config["configurable"]["thread_id"], config["metadata"]["langgraph_step"])
        if at not in failed:
            failed.add(at)
            raise ValueError(f"{node.name} fails once")
    update: dict[str, Any] = dict.fromkeys(node.writes, number % 3)
    if "tag" in update:
        update["tag"] = f"{node.name}{number % 3}"
    update |= {"log": [f"{node.name} {number} {answers}"], "n": 1}
    if node.route.kind != "command":
        return update
    chosen = node.route.targets[number % len(node.route.targets)]
    # forwards only: what the node reads may not tell how long a loop has been going on
    return Command(update=update, goto=chosen if chosen > node.name else END)


def make_body(node: Node, failed: set[Any], native_async: bool) -> Callable[..., Any]:
    """The body of ``node``; ``failed``: at which steps it has failed already.

    Short, because LangGraph parses its source whenever a graph is compiled.
    """
    if not native_async:
        return lambda state, config: _run(node, failed, state, config)

    async def body(state: State, config: RunnableConfig) -> Any:
        return _run(node, failed, state, config)

    return body


def _branch(route: Route, state: State) -> Any:
    if state.get("n", 0) >= BOUND:
        return END
    at: int = state.get(route.on, 0)  # type: ignore[assignment]
    if route.kind == "send":
        first = Send(route.targets[0], {"a": at, "n": 0})
        return [first, *(Send(name, {"b": i}) for i, name in enumerate(route.targets))]
    return [*route.targets, END][at % (len(route.targets) + 1)]


def make_branch(route: Route) -> Callable[[State], Any]:
    """The conditional edge of a node: reads what the node's key may leave out."""
    return lambda state: _branch(route, state)


Kind = Literal["plain", "ours", "unsound", "langgraph"]
"""LangGraph's graph without a cache; ours; ours with keys that leave out a field; LangGraph's own
cache."""


def _policy(kind: Kind, node: Node) -> Any:
    if node.policy is None or kind == "plain":
        return None
    if kind == "langgraph":
        return LangGraphCachePolicy()
    return node.policy.of(node, node.reads[1:] if kind == "unsound" else node.reads)


def _add(builder: Any, node: Node, action: Any, kind: Kind) -> None:
    more: dict[str, Any] = {}
    if node.retries:
        more["retry_policy"] = RetryPolicy(initial_interval=0, jitter=False, retry_on=ValueError)
    if node.route.kind == "command":
        more["destinations"] = (*node.route.targets, END)
    builder.add_node(node.name, action, cache_policy=_policy(kind, node), **more)


def build(graph: Graph, saver: Any, kind: Kind, *, cache: Any = None, asynchronous: bool) -> Any:
    """Compile ``graph``; without ``asynchronous`` none of its nodes is a coroutine function."""
    failed: set[Any] = set()
    make: Any = LangGraphStateGraph if kind in ("plain", "langgraph") else StateGraph
    builder = make(State)
    for node in graph.nodes:
        action: Any
        if node.sub is None:
            action = make_body(node, failed, asynchronous and node.native_async)
        else:
            inner = make(State, output_schema=Numbers)
            last = START
            for step in node.sub.nodes:
                body = make_body(step, failed, asynchronous and step.native_async)
                _add(inner, step, body, kind)
                inner.add_edge(last, step.name)
                last = step.name
            stops = [node.sub.nodes[0].name] if node.sub.stops else None
            action = inner.compile(checkpointer=node.sub.checkpointer, interrupt_before=stops)
        _add(builder, node, action, kind)
        if node.route.kind == "static":
            for target in node.route.targets:
                builder.add_edge(node.name, target)
        elif node.route.kind != "command":
            ends = [*node.route.targets, END]
            builder.add_conditional_edges(node.name, make_branch(node.route), ends)
    for name in graph.entries:
        builder.add_edge(START, name)
    return builder.compile(
        checkpointer=saver,
        cache=cache,
        interrupt_before=list(graph.before) or None,
        interrupt_after=list(graph.after) or None,
    )


# -- running --------------------------------------------------------------------------------------


class Driver:
    """Calls a graph's or a saver's methods, or their async twins on ``loop``."""

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self.loop = loop

    def call(self, target: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        if self.loop is None:
            return getattr(target, method)(*args, **kwargs)
        return self.loop.run_until_complete(getattr(target, f"a{method}")(*args, **kwargs))

    def listed(self, target: Any, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        if self.loop is None:
            return list(getattr(target, method)(*args, **kwargs))

        async def listed() -> list[Any]:
            return [item async for item in getattr(target, f"a{method}")(*args, **kwargs)]

        return self.loop.run_until_complete(listed())


class Twin:
    """One of the two graphs, and its threads."""

    def __init__(self, spec: Graph, graph: Any, driver: Driver, prefix: str) -> None:
        self.spec = spec
        self.graph = graph
        self.driver = driver
        self.prefix = prefix

    def config(self, act: Act, base: Any = None) -> Any:
        control = {"mode": act.mode, "scope": act.scope}
        own = {"thread_id": f"{self.prefix}{act.thread}", "cache_control": control}
        inherited = (base or {}).get("configurable") or {}
        return {
            "configurable": {**inherited, **own},
            "recursion_limit": 15,
            "max_concurrency": 1,
        }

    def invoke(self, given: Any, act: Act, base: Any = None) -> Any:
        config = self.config(act, base)
        durability = act.durability
        if any(node.sub and node.sub.checkpointer is False for node in self.spec.nodes):
            # LangGraph looks for a checkpoint that such a graph does not write
            durability = "async" if durability == "sync" else durability
        return self.driver.call(self.graph, "invoke", given, config, durability=durability)

    def history(self, act: Act) -> list[StateSnapshot]:
        return self.driver.listed(self.graph, "get_state_history", self.config(act))

    def state(self, act: Act, subgraphs: bool) -> StateSnapshot:
        state: StateSnapshot = self.driver.call(
            self.graph, "get_state", self.config(act), subgraphs=subgraphs
        )
        return state

    def answer(self, act: Act, base: Any = None) -> Any:
        """The answers that ``act`` gives to what is asked now."""
        text = f"yes {act.number}"
        config = self.config(act, base)
        if act.how not in ("id", "all", "unknown"):
            return Command(resume=text)
        waiting = self.driver.call(self.graph, "get_state", config).interrupts
        if act.how == "unknown" or not waiting:
            return Command(resume={"0" * 32: text})
        if act.how == "id":
            return Command(resume={waiting[act.number % len(waiting)].id: text})
        # the last question first
        return Command(resume={w.id: f"{text} {i}" for i, w in enumerate(reversed(waiting))})

    def update(self, act: Act, base: Any = None) -> Any:
        names: list[str | None] = [None, *(node.name for node in self.spec.nodes)]
        as_node = names[act.number % len(names)]
        update = dict(act.values) | {"log": ["edited"]}
        config = self.config(act, base)
        return self.driver.call(self.graph, "update_state", config, update, as_node=as_node)

    def fork(self, act: Act) -> Any:
        history = self.history(act)
        if not history:
            return None
        past = history[act.number % len(history)].config
        if act.how == "input":
            return self.invoke(dict(act.values), act, past)
        if act.how == "update":
            edited = self.update(act, past)
            return self.invoke(None, act, edited)
        if act.how == "answer":
            return self.invoke(self.answer(act, past), act, past)
        return self.invoke(None, act, past)

    def do(self, act: Act) -> Any:
        if act.do == "run":
            return self.invoke(dict(act.values), act)
        if act.do == "go_on":
            return self.invoke(None, act)
        if act.do == "answer":
            result = self.invoke(self.answer(act), act)
            for _ in range(3 if act.how == "all" else 0):
                if not asked(result):
                    break
                result = self.invoke(self.answer(act), act)
            return result
        if act.do == "update":
            self.update(act)
            return None
        if act.do == "fork":
            return self.fork(act)
        if act.do == "command":
            goto = self.spec.nodes[act.number % len(self.spec.nodes)].name
            return self.invoke(Command(update=dict(act.values), goto=goto), act)
        if act.do == "delete":
            thread = self.config(act)["configurable"]["thread_id"]
            return self.driver.call(self.graph.checkpointer, "delete_thread", thread)
        assert act.do == "clear"
        if getattr(self.graph, "cache", None) is not None:
            self.driver.call(self.graph, "clear_cache")
        return None

    def outcome(self, act: Act) -> Any:
        return or_error(lambda: seen(self.do(act)))

    def observed(self, act: Act, subgraphs: bool) -> Any:
        try:
            history = self.history(act)
        except InvalidUpdateError as exc:
            return str(exc)
        at = {s.config["configurable"]["checkpoint_id"]: i for i, s in enumerate(history)}
        return {
            # LangGraph cannot show a step whose results contradict each other
            "state": or_error(lambda: seen(self.state(act, subgraphs))),
            "history": [seen(snapshot) for snapshot in history],
            "parents": [
                s.parent_config and at[s.parent_config["configurable"]["checkpoint_id"]]
                for s in history
            ],
        }


def or_error(call: Callable[[], Any]) -> Any:
    """What ``call`` gives, or which error it raises."""
    try:
        return call()
    except Exception as exc:
        return type(exc).__name__, re.sub(IDS, "ID", str(exc))


def seen(value: Any) -> Any:
    """``value`` as its user sees it, without ids and times."""
    if isinstance(value, StateSnapshot):
        metadata: Any = dict(value.metadata or {})
        metadata.pop("langgraph_perf", None)  # which nodes were served from the cache
        parents = metadata.get("parents") or ()
        metadata["parents"] = sorted(re.sub(IDS, "ID", space) for space in parents)
        return {
            "values": value.values,
            "next": value.next,
            "metadata": metadata,
            "tasks": [seen(task) for task in value.tasks],
            "interrupts": seen(list(value.interrupts)),
        }
    if isinstance(value, PregelTask):
        inner = value.state if isinstance(value.state, StateSnapshot) else value.state is not None
        return [
            value.name,
            value.path,
            repr(value.error),
            seen(list(value.interrupts)),
            value.result,
            seen(inner),
        ]
    if isinstance(value, Interrupt):
        return ("interrupt", value.value)
    if isinstance(value, dict) and "__interrupt__" in value:
        # those of parallel nodes come in any order
        asked = sorted(value["__interrupt__"], key=lambda i: str(i.value))
        return {**value, "__interrupt__": seen(asked)}
    if isinstance(value, list):
        return [seen(item) for item in value]
    return value


def asked(result: Any) -> bool:
    """Whether a run ended with a question."""
    return isinstance(result, dict) and "__interrupt__" in result


def _difference(a: Any, b: Any, where: str) -> str:
    """Where the two first differ, and how."""
    inside: list[tuple[Any, Any, str]] = []
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        inside = [(a[key], b[key], f"{where}[{key!r}]") for key in a]
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        inside = [(x, y, f"{where}[{i}]") for i, (x, y) in enumerate(zip(a, b, strict=True))]
    for x, y, at in inside:
        if x != y:
            return _difference(x, y, at)
    return f"{where}\n without a cache: {a}\n with it: {b}"


class Different(AssertionError):
    """The cache was noticed."""


def compare(history: History, plain: Twin, cached: Twin) -> Counter[str]:
    """Carry ``history`` out on both; gives how often which actions and outcomes occurred.

    Raises:
        Different: what can be seen of the two differs.
    """
    happened: Counter[str] = Counter()
    subgraphs = not history.hides_subgraphs
    waiting: set[int] = set()
    for number, act in enumerate(history.acts):
        if act.do == "answer" and waiting and act.number % 4:
            act = replace(act, thread=min(waiting))  # most answers are to somebody who asked
        outcomes = plain.outcome(act), cached.outcome(act)
        states = plain.observed(act, subgraphs), cached.observed(act, subgraphs)
        for what, (a, b) in (("outcome", outcomes), ("thread", states)):
            if a != b:
                raise Different(f"after action {number} ({act}), {_difference(a, b, what)}")
        happened[act.do] += 1
        happened["failed"] += isinstance(outcomes[0], tuple)
        happened["asked"] += asked(outcomes[0])
        happened["answered"] += act.do == "answer" and act.thread in waiting
        (waiting.add if asked(outcomes[0]) else waiting.discard)(act.thread)
    return happened
