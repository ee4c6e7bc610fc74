"""The cache, side by side with what LangGraph has and with what users write today.

``python -m benchmarks.bench_cache [--json FILE] [--quick] [--only NAME ...]``
"""

from __future__ import annotations

import functools
import gc
import mmap
import operator
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import count, cycle
from pathlib import Path
from typing import Annotated, Any

from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage
from langgraph.cache.memory import InMemoryCache
from langgraph.cache.sqlite import SqliteCache
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState
from langgraph.graph import StateGraph as LangGraphStateGraph
from langgraph.types import CachePolicy as LangGraphCachePolicy
from langgraph.types import Send
from typing_extensions import TypedDict
from xxhash import xxh3_128_hexdigest

from benchmarks._harness import (
    Batch,
    Comparison,
    Effort,
    Result,
    compare,
    each,
    each_awaited,
    event_loop,
    frozen,
    output,
    program,
    result,
    start,
)
from langgraph_perf import CachePolicy, DiskCache, MemoryCache, StateGraph, keys

THOROUGH = Effort()
QUICK = Effort(rounds=9)

IN_MEMORY = "LangGraph InMemoryCache"
SQLITE = "LangGraph SqliteCache"

executed: list[str] = []
"""One item for each time a node ran; appending is atomic, and nodes run in several threads."""


# -- graphs ----------------------------------------------------------------------------------------


class Question(TypedDict):
    """A small state."""

    question: str
    user: str
    limit: int
    answer: str


class Thread(MessagesState):
    """A conversation, and a field that is not one."""

    answer: str


class Item(TypedDict):
    """What one branch of a fan-out is given."""

    item: str


class Fan(TypedDict):
    """A fan-out over ``items``."""

    items: list[str]
    results: Annotated[list[str], operator.add]


class Page(TypedDict):
    """A small input with a large result."""

    number: int
    page: str


QUESTION: dict[str, Any] = {"question": "What is a context manager?", "user": "u1", "limit": 5}


def answer(state: Question) -> dict[str, Any]:
    executed.append("answer")
    return {"answer": f"An answer to {state['question']!r}"}


def plain_answer(state: Question) -> dict[str, Any]:
    return {"answer": f"An answer to {state['question']!r}"}


def reply(state: Thread) -> dict[str, Any]:
    executed.append("reply")
    return {"answer": f"{len(state['messages'])} messages so far"}


def work(state: Item) -> dict[str, Any]:
    executed.append("work")
    return {"results": [state["item"]]}


async def awork(state: Item) -> dict[str, Any]:
    executed.append("work")
    return {"results": [state["item"]]}


def write_page(state: Page) -> dict[str, Any]:
    return {"page": f"{state['number']:010d}" * 1000}


def fan_out(state: Fan) -> list[Send]:
    return [Send("node", {"item": item}) for item in state["items"]]


def one_node(ours: bool, state: type, node: Any, **compiled: Any) -> Any:
    """A graph of one node, with a policy if it has a cache."""
    policy: Any = CachePolicy() if ours else LangGraphCachePolicy()
    builder: Any = StateGraph(state) if ours else LangGraphStateGraph(state)
    builder.add_node("node", node, cache_policy=policy if "cache" in compiled else None)
    builder.add_edge(START, "node")
    return builder.compile(**compiled)


def fan_of(ours: bool, node: Any, cache: Any) -> Any:
    """A graph that sends each of its items to a cached node."""
    policy: Any = CachePolicy() if ours else LangGraphCachePolicy()
    builder: Any = StateGraph(Fan) if ours else LangGraphStateGraph(Fan)
    builder.add_node("node", node, input_schema=Item, cache_policy=policy)
    builder.add_conditional_edges(START, fan_out, ["node"])
    return builder.compile(cache=cache)


@contextmanager
def only_hits() -> Iterator[None]:
    """See to it that no node runs."""
    before = len(executed)
    yield
    if ran := executed[before:]:
        raise RuntimeError(f"{ran[0]} ran {len(ran)} times where only hits were to be measured")


def conversation(length: int, *, agent: bool) -> list[BaseMessage]:
    """A thread of ``length`` messages as a checkpointer keeps it, with ids.

    Args:
        length: how many messages.
        agent: with tool calls, response and usage metadata, as a real model's have; else text.
    """
    text = random.Random(0)
    messages: list[BaseMessage] = []
    for n in range(length):
        said = " ".join(f"word{text.randrange(1000)}" for _ in range(text.randrange(10, 50)))
        given: dict[str, Any] = {"content": said, "id": f"{text.getrandbits(128):032x}"}
        turn = n % 4
        if not agent:
            messages.append(HumanMessage(**given) if n % 2 == 0 else AIMessage(**given))
        elif turn == 0:
            messages.append(HumanMessage(**given))
        elif turn == 2:
            messages.append(ToolMessage(**given, tool_call_id=f"call_{n - 1}", name="search"))
        else:
            tokens = {"input_tokens": 7 * n, "output_tokens": 50, "total_tokens": 7 * n + 50}
            call = {"name": "search", "args": {"query": said[:40], "limit": 5}, "id": f"call_{n}"}
            response = {"model_name": "a-model", "finish_reason": "stop", "id": f"chatcmpl-{n}"}
            messages.append(
                AIMessage(
                    **given,
                    tool_calls=[call] if turn == 1 else [],
                    usage_metadata=tokens,
                    response_metadata=response,
                )
            )
    return messages


# -- hits in memory --------------------------------------------------------------------------------


def hit(effort: Effort) -> Iterator[Result]:
    """One node, a small state."""
    with MemoryCache() as cache:
        ours = one_node(True, Question, answer, cache=cache)
        theirs = one_node(False, Question, answer, cache=InMemoryCache())
        ours.invoke(QUESTION)
        theirs.invoke(QUESTION)
        with only_hits():
            times = compare(
                each(lambda: ours.invoke(QUESTION)), each(lambda: theirs.invoke(QUESTION)), effort
            )
    yield result("hit, small state", IN_MEMORY, times, target=1.25)


def hit_async(effort: Effort) -> Iterator[Result]:
    """The same under ``ainvoke``."""
    with MemoryCache() as cache, event_loop() as loop:
        ours = one_node(True, Question, answer, cache=cache)
        theirs = one_node(False, Question, answer, cache=InMemoryCache())
        ours.invoke(QUESTION)
        theirs.invoke(QUESTION)
        with only_hits():
            times = compare(
                each_awaited(loop, lambda: ours.ainvoke(QUESTION)),
                each_awaited(loop, lambda: theirs.ainvoke(QUESTION)),
                effort,
            )
    yield result("hit, small state, ainvoke", IN_MEMORY, times, target=1.25)


def hit_messages(effort: Effort) -> Iterator[Result]:
    """200 messages, the same objects each time, as in one process without a checkpointer."""
    for agent in (False, True):
        messages = conversation(effort.scaled(200), agent=agent)
        with MemoryCache() as cache:
            ours = one_node(True, Thread, reply, cache=cache)
            theirs = one_node(False, Thread, reply, cache=InMemoryCache())
            given = {"messages": messages}
            ours.invoke(given)
            theirs.invoke(given)
            with only_hits():
                times = compare(
                    each(functools.partial(ours.invoke, given)),
                    each(functools.partial(theirs.invoke, given)),
                    effort,
                )
        name = f"hit, {len(messages)} messages in memory, {_kind(agent)}"
        yield result(name, IN_MEMORY, times, target=0.75)


def hit_checkpointer(effort: Effort) -> Iterator[Result]:
    """200 messages that each run reads back from the thread's checkpoint.

    The run's input is another field, so the messages, with the ids that the checkpoint keeps, are
    the same each time, and both sides hit.
    """
    for agent in (False, True):
        messages = conversation(effort.scaled(200), agent=agent)
        config = {"configurable": {"thread_id": "t"}}
        with MemoryCache() as cache:
            graphs = [
                one_node(True, Thread, reply, cache=cache, checkpointer=InMemorySaver()),
                one_node(False, Thread, reply, cache=InMemoryCache(), checkpointer=InMemorySaver()),
            ]
            kept = {"messages": messages, "answer": f"{len(messages)} messages so far"}

            def begin(graphs: list[Any] = graphs, kept: Any = kept, config: Any = config) -> None:
                # a thread's checkpoints add up, and listing them would come to dominate
                for graph in graphs:
                    graph.checkpointer.delete_thread("t")
                    graph.update_state(config, kept, as_node="node")

            begin()
            again = {"answer": kept["answer"]}
            ours, theirs = (each(functools.partial(g.invoke, again, config)) for g in graphs)
            ours(1)
            theirs(1)
            with only_hits():
                times = compare(ours, theirs, effort, before=begin)
        name = f"hit, {len(messages)} messages from a checkpointer, {_kind(agent)}"
        yield result(name, IN_MEMORY, times, target=1.0, note="InMemorySaver on both sides")


def _kind(agent: bool) -> str:
    return "agent" if agent else "text"


# -- keys ------------------------------------------------------------------------------------------


_their_key: Callable[[Any], Any] = LangGraphCachePolicy().key_func
_KEYERS: tuple[Callable[[Any], str], ...] = (
    lambda state: keys.digest(("state", state)),
    lambda state: xxh3_128_hexdigest(_their_key(state)),
)


def keying(effort: Effort) -> Iterator[Result]:
    """A thread that grows by two messages a turn; each turn is keyed, as by a node in a loop."""
    turns = effort.scaled(10)
    lengths = sorted({effort.scaled(n, 20) // 2 * 2 for n in (100, 500, 1000, 2000)})
    for agent in (False, True):
        messages = conversation(lengths[-1], agent=agent)
        with frozen():
            rounds = [_grow(messages, lengths, turns, n % 2) for n in range(effort.at_most(21) + 1)]
        del rounds[0]  # that one warmed up
        for n in lengths:
            yield result(
                f"keying a thread grown to {n} messages, {_kind(agent)}",
                "LangGraph default_cache_key + xxh3",
                Comparison([spent[n][0] for spent in rounds], [spent[n][1] for spent in rounds]),
                target=0.1 if n == lengths[-1] else None,
                note="older messages keyed before",
            )


def _grow(
    messages: list[BaseMessage], lengths: Sequence[int], turns: int, first: int
) -> dict[int, tuple[float, float]]:
    """Key a thread from its first turn on.

    Returns:
        for each of ``lengths``, the seconds that keying took in one of the last ``turns`` before
        the thread is that long, on our side and on theirs; ``first`` is the side timed first.
    """
    keys.forget()
    spent = {}
    done = 0
    for n in lengths:
        states = [{"messages": messages[:length]} for length in range(done + 2, n + 1, 2)]
        for state in states[:-turns]:
            _KEYERS[0](state)
        seconds = [0.0, 0.0]
        for side in (first, 1 - first):
            gc.collect()
            gc.disable()
            began = time.perf_counter()
            for state in states[-turns:]:
                _KEYERS[side](state)
            seconds[side] = (time.perf_counter() - began) / turns
            gc.enable()
        spent[n] = (seconds[0], seconds[1])
        done = n
    return spent


# -- fan-out ---------------------------------------------------------------------------------------


def fanout(effort: Effort) -> Iterator[Result]:
    """256 branches, cold and warm, with equal and with distinct inputs."""
    width = effort.scaled(256)
    for is_async in (False, True):
        for equal in (False, True):
            for warm in (False, True):
                yield _fanout(effort, width, is_async=is_async, equal=equal, warm=warm)


def _fanout(effort: Effort, width: int, *, is_async: bool, equal: bool, warm: bool) -> Result:
    serial = count()

    def given() -> dict[str, Any]:
        run = 0 if warm else next(serial)
        return {"items": [f"{run}" if equal else f"{run}-{i}" for i in range(width)]}

    node = awork if is_async else work
    with MemoryCache() as cache, event_loop() as loop:
        graphs = [fan_of(True, node, cache), fan_of(False, node, InMemoryCache())]
        if is_async:
            batches = [each_awaited(loop, lambda g=graph: g.ainvoke(given())) for graph in graphs]  # type: ignore[misc]
        else:
            batches = [each(lambda g=graph: g.invoke(given())) for graph in graphs]  # type: ignore[misc]
        for batch in batches:
            batch(1)
        runs = [_executions(batch) for batch in batches]
        few = replace(effort, rounds=effort.at_most(15))
        times = compare(batches[0], batches[1], few)
    name = (
        f"fan-out of {width}, {'equal' if equal else 'distinct'}, "
        f"{'warm' if warm else 'cold'}{', ainvoke' if is_async else ''}"
    )
    note = f"executions: ours {runs[0]}, theirs {runs[1]}"
    return result(name, IN_MEMORY, times, note=note)


def _executions(batch: Batch) -> int:
    before = len(executed)
    batch(1)
    return len(executed) - before


# -- disk ------------------------------------------------------------------------------------------

NAMESPACE = ("benchmark", "node")
SIZES = ((1024, "1 KB", 1.0), (32 * 1024, "32 KB", 1.0), (1024 * 1024, "1 MB", 1.2))
DURABLE_IN_SQLITE = "as shipped: theirs syncs each write, ours does not"


@contextmanager
def disk_caches() -> Iterator[tuple[DiskCache, SqliteCache[Any]]]:
    """Both, empty, in a directory that is removed."""
    with tempfile.TemporaryDirectory() as directory:
        theirs: SqliteCache[Any] = SqliteCache(path=f"{directory}/theirs.sqlite")
        with DiskCache(f"{directory}/ours") as ours:
            yield ours, theirs


def disk(effort: Effort) -> Iterator[Result]:
    """``get`` and ``set`` of ``BaseCache`` with bytes as values, one key at a time."""
    for size, name, target in SIZES:
        values = [random.Random(n).randbytes(size) for n in range(8)]
        # a row leaves at most so much on the disk: 160 MB
        most_calls = max(1, (160 << 20) // size // 2 // (effort.rounds + 3))
        with disk_caches() as caches:
            present = [(NAMESPACE, f"{n:032x}") for n in range(16)]
            for cache in caches:
                cache.set(dict.fromkeys(present, (values[0], None)))
                if cache.get(present[:1]) != {present[0]: values[0]}:
                    raise RuntimeError(f"{type(cache).__name__} does not give back what it got")

            def getting(cache: Any, present: Any = present) -> Batch:
                wanted = cycle([[key] for key in present])
                return each(lambda: cache.get(next(wanted)))

            def setting(cache: Any, values: Any = values) -> Batch:
                serial, value = count(1000), cycle(values)
                return each(
                    lambda: cache.set({(NAMESPACE, f"{next(serial):032x}"): (next(value), None)})
                )

            ours, theirs = caches
            times = compare(getting(ours), getting(theirs), effort)
            yield result(f"disk get, {name}", SQLITE, times, target=target, note="bytes, BaseCache")
            times = compare(setting(ours), setting(theirs), effort, most_calls=most_calls)
            yield result(f"disk set, {name}", SQLITE, times, target=target, note=DURABLE_IN_SQLITE)
            # ours never syncs an entry: what a power failure takes is computed again
            theirs._conn.execute("PRAGMA synchronous = NORMAL")
            times = compare(setting(ours), setting(theirs), effort, most_calls=most_calls)
            yield result(f"disk set, {name}, unsynced", f"{SQLITE}, synchronous=NORMAL", times)


def disk_processes(effort: Effort) -> Iterator[Result]:
    """Four processes, 80 % gets and 20 % sets, 1 KB and 32 KB."""
    operations = effort.scaled(300)
    code = "import sys; from benchmarks import bench_cache; bench_cache.serve_mixed(sys.argv[1])"
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        _mixed_caches(directory)  # made by one, not by four at once
        processes = [stack.enter_context(start(code, directory)) for _ in range(4)]
        for process in processes:
            _answer(process)
        failed = {"ours": 0, "theirs": 0}

        def together(side: str, number: int) -> float:
            began = time.perf_counter()
            for process in processes:
                assert process.stdin
                process.stdin.write(f"{side} {number}\n")
                process.stdin.flush()
            failed[side] += sum(_answer(process) for process in processes)
            return 4 * number / (time.perf_counter() - began)

        for side in failed:
            together(side, operations)
        failed = dict.fromkeys(failed, 0)
        rates: dict[str, list[float]] = {"ours": [], "theirs": []}
        for number in range(effort.at_most(15)):
            for side in ("ours", "theirs") if number % 2 else ("theirs", "ours"):
                rates[side].append(together(side, operations))
        for process in processes:
            assert process.stdin
            process.stdin.close()
    total = 4 * operations * len(rates["ours"])
    yield result(
        "disk, 4 processes mixed",
        SQLITE,
        Comparison(rates["ours"], rates["theirs"]),
        unit="op/s",
        note=f"more is better; failed of {total}: ours {failed['ours']}, theirs {failed['theirs']}",
    )


def _answer(process: subprocess.Popen[str]) -> int:
    assert process.stdout
    line = process.stdout.readline()
    if not line:
        raise RuntimeError("a benchmark's process ended early; its error is on stderr")
    return int(line)


def _mixed_caches(directory: str) -> dict[str, Any]:
    return {
        "ours": DiskCache(f"{directory}/ours"),
        "theirs": SqliteCache(path=f"{directory}/theirs.sqlite"),
    }


def serve_mixed(directory: str) -> None:
    """What each of the four processes does: ``side operations`` in, number of failures out."""
    caches = _mixed_caches(directory)
    choose = random.Random()
    values = [choose.randbytes(1024), choose.randbytes(32 * 1024)]
    print(0, flush=True)
    for line in sys.stdin:
        side, operations = line.split()
        cache, failures = caches[side], 0
        for _ in range(int(operations)):
            key = (NAMESPACE, f"{choose.randrange(200):032x}")
            try:
                if choose.random() < 0.2:
                    cache.set({key: (choose.choice(values), None)})
                else:
                    cache.get([key])
            except Exception:
                failures += 1
        print(failures, flush=True)


def disk_hit(effort: Effort) -> Iterator[Result]:
    """One node, a small state, on disk."""
    with disk_caches() as (our_cache, their_cache), event_loop() as loop:
        ours = one_node(True, Question, answer, cache=our_cache)
        theirs = one_node(False, Question, answer, cache=their_cache)
        ours.invoke(QUESTION)
        theirs.invoke(QUESTION)
        with only_hits():
            times = compare(
                each(lambda: ours.invoke(QUESTION)), each(lambda: theirs.invoke(QUESTION)), effort
            )
            yield result("hit on disk, small state", SQLITE, times)
            times = compare(
                each_awaited(loop, lambda: ours.ainvoke(QUESTION)),
                each_awaited(loop, lambda: theirs.ainvoke(QUESTION)),
                effort,
            )
            yield result("hit on disk, small state, ainvoke", SQLITE, times)


# -- what users write today ------------------------------------------------------------------------


def memoized(cache: Any) -> Callable[[Any], Any]:
    """The decorator of the blogs; it cannot take a list or a message, nor tell 1 from True."""

    def decorate(node: Any) -> Any:
        @functools.wraps(node)
        def wrapper(state: Any) -> Any:
            key = hash(frozenset(state.items()))
            found = cache.get(key)
            if found is None:
                found = node(state)
                cache.set(key, found)
            return found

        return wrapper

    return decorate


@contextmanager
def naive_graphs(directory: str) -> Iterator[tuple[Any, Any]]:
    """The same graph on our disk cache, and with the decorated node on diskcache."""
    import diskcache

    with DiskCache(f"{directory}/ours") as ours, diskcache.Cache(f"{directory}/theirs") as theirs:
        yield (
            one_node(True, Question, answer, cache=ours),
            one_node(False, Question, memoized(theirs)(answer)),
        )


def naive(effort: Effort) -> Iterator[Result]:
    """Time per hit in one process, and how much the next process finds."""
    questions = effort.scaled(20)
    code = (
        "import sys; from benchmarks import bench_cache; "
        "bench_cache.count_hits(sys.argv[1], int(sys.argv[2]))"
    )
    with tempfile.TemporaryDirectory() as directory:
        for seed in ("1", "2"):
            found = output(code, directory, questions, PYTHONHASHSEED=seed)
    ours_found, theirs_found = (f"{int(hits)} of {questions}" for hits in found)
    with tempfile.TemporaryDirectory() as directory, naive_graphs(directory) as (ours, theirs):
        ours.invoke(QUESTION)
        theirs.invoke(QUESTION)
        with only_hits():
            times = compare(
                each(lambda: ours.invoke(QUESTION)), each(lambda: theirs.invoke(QUESTION)), effort
            )
    yield result(
        "hit on disk, against the naive decorator",
        "diskcache + hash(frozenset(state.items()))",
        times,
        note=f"hits in a second process: ours {ours_found}, theirs {theirs_found}",
    )


def count_hits(directory: str, questions: int) -> None:
    """Ask so many questions of both graphs; print how many of them each had an answer to."""
    with naive_graphs(directory) as graphs:
        for graph in graphs:
            before = len(executed)
            for n in range(questions):
                graph.invoke({**QUESTION, "question": f"What is {n}?"})
            print(questions - (len(executed) - before))


# -- what it costs to have it ----------------------------------------------------------------------


def no_policies(effort: Effort) -> Iterator[Result]:
    """A graph without policies, against LangGraph's own class; one node, so that it is cheap."""
    ours = one_node(True, Question, plain_answer)
    theirs = one_node(False, Question, plain_answer)
    times = compare(
        each(lambda: ours.invoke(QUESTION)), each(lambda: theirs.invoke(QUESTION)), effort
    )
    yield result("no policies", "LangGraph StateGraph", times, target=1.03)
    with event_loop() as loop:
        times = compare(
            each_awaited(loop, lambda: ours.ainvoke(QUESTION)),
            each_awaited(loop, lambda: theirs.ainvoke(QUESTION)),
            effort,
        )
    yield result("no policies, ainvoke", "LangGraph StateGraph", times, target=1.03)


def importing(effort: Effort) -> Iterator[Result]:
    """``import langgraph.graph``, and then ``import langgraph_perf``, in fresh interpreters.

    In processor time, so that a busy machine counts less, and without the garbage collector:
    whether its next full collection, mostly of what LangGraph has imported, falls into the second
    import or comes after it is chance.
    """
    code = (
        "import gc; gc.disable(); from time import process_time as now; "
        "a = now(); import langgraph.graph; b = now(); import langgraph_perf; "
        "print(b - a, now() - a)"
    )
    with tempfile.TemporaryDirectory() as bytecode:
        kept = {"PYTHONPYCACHEPREFIX": bytecode, "PYTHONDONTWRITEBYTECODE": ""}
        output(code, **kept)  # compiles
        rounds = [output(code, **kept) for _ in range(effort.at_most(11))]
    times = Comparison([both for _, both in rounds], [alone for alone, _ in rounds])
    added = sorted(1000 * (both - alone) for alone, both in rounds)
    yield result(
        "import",
        "import langgraph.graph alone",
        times,
        target=30,
        measured=added[len(added) // 2],
        measure="ms added",
        note=f"added {added[0]:.1f}-{added[-1]:.1f} ms; processor time, gc off",
    )


def memory(effort: Effort) -> Iterator[Result]:
    """How far a process grows with 10,000 results of 10 KB, of which 10 MB may stay."""
    results = effort.scaled(10_000)
    code = (
        "import sys; from benchmarks import bench_cache; "
        "bench_cache.grow(sys.argv[1], int(sys.argv[2]))"
    )
    grown = {side: output(code, side, results)[0] / 1e6 for side in ("ours", "theirs")}
    yield result(
        f"growth by {results} results of 10 KB",
        IN_MEMORY,
        Comparison([grown["ours"]], [grown["theirs"]]),
        unit="MB",
        target=15,
        measured=grown["ours"],
        measure="MB",
        note="MemoryCache(max_bytes=10_000_000); the most seen on the way",
    )


def grow(side: str, results: int) -> None:
    """Print how many bytes this process grew by while that many results were cached."""
    ours = side == "ours"

    def graph() -> Any:
        cache: Any = MemoryCache(max_bytes=10_000_000) if ours else InMemoryCache()
        return one_node(ours, Page, write_page, cache=cache)

    first = graph()
    for number in range(50):  # whatever is imported or allocated once
        first.invoke({"number": number})
    del first
    gc.collect()
    measured, before, most = graph(), resident(), 0
    for number in range(results):
        measured.invoke({"number": number})
        if number % 200 == 0 or number == results - 1:
            most = max(most, resident())
    print(max(1, most - before))


def resident() -> int:
    """Bytes of memory this process has; where that is unknown, the most it ever had."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        import resource  # not on Windows

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return pages * mmap.PAGESIZE


# -- the program -----------------------------------------------------------------------------------

ROWS: dict[str, Callable[[Effort], Iterator[Result]]] = {
    "hit": hit,
    "hit-async": hit_async,
    "hit-messages": hit_messages,
    "hit-checkpointer": hit_checkpointer,
    "keying": keying,
    "fanout": fanout,
    "disk": disk,
    "disk-processes": disk_processes,
    "disk-hit": disk_hit,
    "naive": naive,
    "no-policies": no_policies,
    "import": importing,
    "memory": memory,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the JSON file."""
    packages = ("langgraph", "langgraph-perf", "diskcache")
    return program("bench_cache", __doc__, ROWS, packages, THOROUGH, QUICK, argv)


if __name__ == "__main__":
    sys.exit(main())
