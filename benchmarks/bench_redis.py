"""Redis: alone, behind a memory tier, between processes and when it is away.

A private server on the loopback interface, or the one that ``REDIS_URL`` names.

``python -m benchmarks.bench_redis [--json FILE] [--quick] [--only NAME ...]``
"""

from __future__ import annotations

import asyncio
import gc
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from itertools import cycle
from secrets import token_hex
from statistics import median
from typing import Any

import redis
import redis.asyncio
from langgraph.cache.redis import RedisCache as LangGraphRedisCache
from langgraph.graph import START

from benchmarks._harness import (
    Comparison,
    Effort,
    Result,
    compare,
    each,
    each_awaited,
    event_loop,
    frozen,
    program,
    result,
    start,
)
from benchmarks.bench_cache import (
    NAMESPACE,
    QUESTION,
    Question,
    answer,
    awork,
    fan_of,
    one_node,
    only_hits,
    plain_answer,
)
from examples.knowledge_base.redis_server import server_program
from langgraph_perf import MemoryCache, RedisCache, StateGraph, TieredCache, get_cache
from langgraph_perf._backend import Backend
from langgraph_perf.caches.base import Entry, Lookup, key_digest, pack, tag_id, unpack
from langgraph_perf.codec import decode, encode

THOROUGH = Effort(rounds=61)
QUICK = Effort(rounds=7, size=0.1)

DOCS = tag_id("docs")
KEY = (NAMESPACE, "key")
PROCESSES = 8


@contextmanager
def server() -> Iterator[str]:
    """The URL of a server."""
    if os.environ.get("REDIS_URL"):
        yield os.environ["REDIS_URL"]
        return
    with private_server() as (url, _):
        yield url


@contextmanager
def private_server() -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The URL of a server that may be harmed, and its process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as directory:
        command = [server_program(), "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
        command += ["--dir", directory, "--loglevel", "warning"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            try:
                url = f"redis://127.0.0.1:{port}/0"
                deadline = time.monotonic() + 20
                while True:
                    with suppress(redis.ConnectionError), redis.Redis.from_url(url) as client:
                        client.ping()
                        break
                    if time.monotonic() > deadline:
                        raise RuntimeError("the Redis server does not start")
                    time.sleep(0.01)
                yield url, process
            finally:
                process.terminate()


PATIENT: dict[str, Any] = {"timeout": 30.0, "connect_timeout": 30.0}
"""Of what is to be right however busy the machine is: what fails open runs once more."""


def tiers(url: str, prefix: str, **options: Any) -> TieredCache:
    """Memory in front of Redis."""
    return TieredCache(MemoryCache(), RedisCache(url, prefix=prefix, **options))


# -- one process -----------------------------------------------------------------------------------


def tier_hit(effort: Effort) -> Iterator[Result]:
    """A hit of the memory tier, of one node and of the cache alone, against memory alone."""
    with server() as url, MemoryCache() as memory, tiers(url, token_hex(4)) as both:
        graphs = [one_node(True, Question, answer, cache=cache) for cache in (both, memory)]
        for graph in graphs:
            for _ in range(3):  # stored, read once from Redis, and from then on known
                graph.invoke(QUESTION)
        with only_hits(), event_loop() as loop:
            ours, theirs = (each(lambda g=graph: g.invoke(QUESTION)) for graph in graphs)  # type: ignore[misc]
            yield result(
                "memory-tier hit, one node",
                "MemoryCache",
                compare(ours, theirs, effort),
                target=1.1,
            )
            ours, theirs = (
                each_awaited(loop, lambda g=graph: g.ainvoke(QUESTION))  # type: ignore[misc]
                for graph in graphs
            )
            times = compare(ours, theirs, effort)
            yield result("memory-tier hit, one node, ainvoke", "MemoryCache", times, target=1.1)
        for cache in (both, memory):
            cache.set({KEY: ("x" * 1000, None)})
            cache.get([KEY])
            cache.get([KEY])
        ours, theirs = (each(lambda c=cache: c.get([KEY])) for cache in (both, memory))  # type: ignore[misc]
        yield result("memory-tier get, 1 KB", "MemoryCache", compare(ours, theirs, effort))


def redis_hit(effort: Effort) -> Iterator[Result]:
    """A result read from Redis, against a bare ``GET`` and decoding what it gives."""
    yield from _redis_hit(effort, 1024, "1 KB")
    yield from _redis_hit(effort, 32 * 1024, "32 KB")


def _redis_hit(effort: Effort, size: int, name: str) -> Iterator[Result]:
    value = "x" * size
    with server() as url, RedisCache(url, prefix="ours") as cache, event_loop() as loop:
        client = redis.Redis.from_url(url)
        aclient = redis.asyncio.Redis.from_url(url)
        keys = [(NAMESPACE, f"{n:032x}") for n in range(16)]
        names = {key: f"bare:{key_digest(key).hex()}" for key in keys}
        for key in keys:
            cache.set({key: (value, None)})
            client.set(names[key], pack(key, Entry(encode(value), time.time())))
        if cache.get(keys[:1]) != {keys[0]: value}:
            raise RuntimeError("RedisCache does not give back what it got")

        def bare(key: Any) -> Any:
            return decode(unpack(key, client.get(names[key])).payload)

        async def abare(key: Any) -> Any:
            return decode(unpack(key, await aclient.get(names[key])).payload)

        mine, others = cycle(keys), cycle(keys)
        ours = each(lambda: cache.get([next(mine)]))
        times = compare(ours, each(lambda: bare(next(others))), effort)
        yield result(f"Redis hit, {name}", "redis-py GET + decoding", times, target=1.3)
        times = compare(
            each_awaited(loop, lambda: cache.aget([next(mine)])),
            each_awaited(loop, lambda: abare(next(others))),
            effort,
        )
        yield result(f"Redis hit, {name}, aget", "redis-py GET + decoding", times, target=1.3)
        theirs: Any = LangGraphRedisCache(client, prefix="theirs")
        theirs.set(dict.fromkeys(keys, (value, None)))
        times = compare(ours, each(lambda: theirs.get([next(others)])), effort)
        yield result(f"Redis get, {name}", "LangGraph RedisCache", times)
        client.close()
        loop.run_until_complete(aclient.aclose())
        loop.run_until_complete(cache.aclose())


def fanout(effort: Effort) -> Iterator[Result]:
    """256 branches that all hit, under ``ainvoke``: time, round trips, and the loop's longest
    pause, of the whole run and while 256 results are read."""
    width = 256
    given = {"items": [f"item {n}" for n in range(width)]}
    with server() as url, RedisCache(url, prefix="ours") as cache, event_loop() as loop:
        client = redis.Redis.from_url(url)
        ours = fan_of(True, awork, cache)
        theirs = fan_of(False, awork, LangGraphRedisCache(client, prefix="theirs"))
        for graph in (ours, theirs):
            loop.run_until_complete(graph.ainvoke(given))
            loop.run_until_complete(graph.ainvoke(given))
        with only_hits():
            times = compare(
                each_awaited(loop, lambda: ours.ainvoke(given)),
                each_awaited(loop, lambda: theirs.ainvoke(given)),
                Effort(effort.at_most(15)),
            )
            before = cache.round_trips
            loop.run_until_complete(ours.ainvoke(given))
            trips = cache.round_trips - before
        yield result(
            f"fan-out of {width} distinct hits, ainvoke",
            "LangGraph RedisCache",
            times,
            target=8,
            measured=trips,
            measure="round trips",
        )
        bare = fan_of(False, awork, None)
        loop.run_until_complete(bare.ainvoke(given))
        pauses = _pauses(
            effort, loop, *[lambda g=graph: g.ainvoke(given) for graph in (ours, bare, theirs)]
        )
        title = f"event loop's longest pause, fan-out of {width} distinct hits, ainvoke"
        longest, without = 1000 * max(pauses[0]), 1000 * max(pauses[1])
        yield result(
            title,
            "LangGraph without a cache",
            Comparison(pauses[0], pauses[1]),
            target=5,
            measured=longest - without,
            measure="ms more, longest of all rounds",
            note=f"longest {longest:.3g} ms, without {without:.3g} ms",
        )
        yield result(title, "LangGraph RedisCache", Comparison(pauses[0], pauses[2]))
        keys = [(NAMESPACE, f"{n:032x}") for n in range(width)]
        value = "x" * 1024
        cache.set(dict.fromkeys(keys, (value, None)))
        theirs_alone: Any = LangGraphRedisCache(client, prefix="alone")
        theirs_alone.set(dict.fromkeys(keys, (value, None)))

        async def look_up() -> None:
            await asyncio.gather(*[cache.aread([Lookup(key)]) for key in keys])

        async def get() -> None:
            await asyncio.gather(*[theirs_alone.aget([key]) for key in keys])

        pauses = _pauses(effort, loop, look_up, get)
        yield result(
            f"event loop's longest pause, {width} lookups at once",
            "LangGraph RedisCache",
            Comparison(*pauses),
            target=5,
            measured=1000 * max(pauses[0]),
            measure="ms, longest of all rounds",
        )
        client.close()
        loop.run_until_complete(cache.aclose())


def _pauses(
    effort: Effort, loop: asyncio.AbstractEventLoop, *calls: Callable[[], Awaitable[object]]
) -> list[list[float]]:
    """For each call, and each round, the seconds for which nothing else got its turn."""
    pauses: list[list[float]] = [[] for _ in calls]
    with frozen():
        for _ in range(effort.at_most(15)):
            for call, found in zip(calls, pauses, strict=True):
                gc.collect()
                gc.disable()
                try:
                    found.append(loop.run_until_complete(_longest_pause(call)))
                finally:
                    gc.enable()
    return pauses


async def _longest_pause(call: Callable[[], Awaitable[object]]) -> float:
    longest = 0.0
    done = False

    async def watch() -> None:
        nonlocal longest
        last = time.perf_counter()
        while not done:
            await asyncio.sleep(0)
            now = time.perf_counter()
            longest = max(longest, now - last)
            last = now

    watching = asyncio.create_task(watch())
    await asyncio.sleep(0)
    await call()
    done = True
    await watching
    return longest


# -- several processes -----------------------------------------------------------------------------


@contextmanager
def children(
    stack: ExitStack, function: str, count: int, *arguments: object
) -> Iterator[list[subprocess.Popen[str]]]:
    """So many processes that run ``function`` of this module; each says when it is ready."""
    code = f"import sys; from benchmarks import bench_redis; bench_redis.{function}(*sys.argv[1:])"
    started = [stack.enter_context(start(code, *arguments)) for _ in range(count)]
    for process in started:
        _line(process)
    try:
        yield started
    finally:
        for process in started:
            assert process.stdin
            with suppress(BrokenPipeError):
                process.stdin.close()


def _line(process: subprocess.Popen[str]) -> list[float]:
    assert process.stdout
    line = process.stdout.readline()
    if not line:
        raise RuntimeError("a benchmark's process ended early; its error is on stderr")
    return [float(number) for number in line.split()]


def _tell(process: subprocess.Popen[str], line: object = "go") -> None:
    assert process.stdin
    process.stdin.write(f"{line}\n")
    process.stdin.flush()


def serve_reads(url: str, prefix: str) -> None:
    """Whenever told to, read the key until it is not there any more; print when that was."""
    with tiers(url, prefix, **PATIENT) as cache:
        print(0, flush=True)
        for _ in sys.stdin:
            for _ in range(3):
                if cache.read([Lookup(KEY, (DOCS,))]) == [None]:
                    raise RuntimeError("this process does not see what was stored")
            print(1, flush=True)
            while cache.read([Lookup(KEY, (DOCS,))]) != [None]:
                time.sleep(0)  # else it would be the interpreter lock's 5 ms that are measured
            print(time.time(), flush=True)


def invalidation(effort: Effort) -> Iterator[Result]:
    """From the beginning of ``invalidate`` in one process to the first miss of another one that
    reads from its memory tier all the time; and what the call itself takes, which returns only
    when no process relies on the old token any more."""
    prefix = token_hex(4)
    gone: list[float] = []
    returned: list[float] = []
    with (
        server() as url,
        ExitStack() as stack,
        RedisCache(url, prefix=prefix) as cache,
        children(stack, "serve_reads", 1, url, prefix) as (other,),
    ):
        for _ in range(effort.scaled(1000, 20)):
            (token,) = cache.tag_tokens([DOCS])
            cache.write(KEY, Entry(b"payload", time.time(), None, ((DOCS, token),)))
            _tell(other)
            _line(other)
            began = time.time()
            cache.invalidate("docs")
            returned.append(time.time() - began)
            gone.append(_line(other)[0] - began)
    worst = sorted(gone)[math.ceil(0.99 * len(gone)) - 1]
    yield result(
        "an invalidation reaches another process's memory tier",
        "until invalidate() has returned",
        Comparison(gone, returned),
        target=5,
        measured=1000 * worst,
        measure="ms, p99",
    )


def serve_hammer(url: str, prefix: str, seconds: str) -> None:
    """Read as fast as it goes, compute what is a miss; print stale reads and hits.

    A value says which version of the data it was computed from.
    """
    stale = hits = 0
    client = redis.Redis.from_url(url)
    with tiers(url, prefix, **PATIENT) as cache:
        print(0, flush=True)
        sys.stdin.readline()
        ends = time.monotonic() + float(seconds)
        while time.monotonic() < ends:
            least = int(client.get(f"{prefix}:invalidated") or 0)
            for _ in range(20):
                (found,) = cache.read([Lookup(KEY, (DOCS,))])
                if found is not None:
                    hits += 1
                    stale += int(found.payload) < least
                    continue
                (token,) = cache.tag_tokens([DOCS])
                current: Any = client.get(f"{prefix}:current") or b"0"
                cache.write(KEY, Entry(current, time.time(), None, ((DOCS, token),)))
        print(stale, hits, flush=True)


def hammer(effort: Effort) -> Iterator[Result]:
    """Eight processes read through memory tiers while a ninth invalidates, for a minute."""
    prefix, seconds = token_hex(4), 60 * effort.size
    turns = 0
    with server() as url, ExitStack() as stack, RedisCache(url, prefix=prefix) as cache:
        client = redis.Redis.from_url(url)
        with children(stack, "serve_hammer", PROCESSES, url, prefix, seconds) as processes:
            for process in processes:
                _tell(process)
            ends = time.monotonic() + seconds
            while time.monotonic() < ends:
                turns += 1
                client.set(f"{prefix}:current", turns)
                cache.invalidate("docs")
                client.set(f"{prefix}:invalidated", turns)
            results = [_line(process) for process in processes]
        client.close()
    stale, hits = (int(sum(column)) for column in zip(*results, strict=True))
    yield result(
        f"{PROCESSES} processes hammering for {seconds:g} s",
        "hits; invalidations",
        Comparison([hits], [turns]),
        unit="",
        target=0,
        measured=stale,
        measure="stale reads",
    )


def serve_followers(url: str, prefix: str, how: str) -> None:
    """Ten threads and ten tasks that ask for one cold key, as an item or as a node's result; prints
    when the run, if it was here, ended and when the last of them was answered."""
    ended = math.nan
    finished: list[float] = []

    def compute() -> dict[str, Any]:
        nonlocal ended
        time.sleep(1.0)
        ended = time.time()
        return {"answer": "done"}

    def all_ask(ask: Callable[[], object], aask: Callable[[], Awaitable[object]]) -> None:
        def follow(_: int) -> None:
            ask()
            finished.append(time.time())

        async def follow_all() -> None:
            async def one() -> None:
                await aask()
                finished.append(time.time())

            await asyncio.gather(*[one() for _ in range(10)])
            await cache.aclose()

        with ThreadPoolExecutor(11) as pool:
            futures = [pool.submit(follow, n) for n in range(10)]
            futures.append(pool.submit(asyncio.run, follow_all()))
            for future in futures:
                future.result(60)

    def ask_items(state: Question) -> dict[str, Any]:
        items = get_cache("items")

        async def acompute() -> dict[str, Any]:
            return await asyncio.to_thread(compute)

        all_ask(
            lambda: items.get_or_set("key", compute), lambda: items.aget_or_set("key", acompute)
        )
        return {"answer": "done"}

    with RedisCache(url, prefix=prefix, **PATIENT) as cache:
        Backend.of(cache).deadline = PATIENT["timeout"]
        graph = one_node(True, Question, lambda state: compute(), cache=cache)
        builder: Any = StateGraph(Question)
        asking = builder.add_node("ask", ask_items).add_edge(START, "ask").compile(cache=cache)
        print(0, flush=True)
        sys.stdin.readline()
        if how == "node":
            all_ask(lambda: graph.invoke(QUESTION), lambda: graph.ainvoke(QUESTION))
        else:
            asking.invoke(QUESTION)
        print(ended, max(finished), flush=True)


def cold_key(effort: Effort) -> Iterator[Result]:
    """Eight processes of ten threads and ten tasks ask for one cold key: how often it was computed,
    and how long after that the last of them was answered."""
    yield from _cold_key(effort, "item", 20)
    yield from _cold_key(effort, "node", None)


def _cold_key(effort: Effort, how: str, target: float | None) -> Iterator[Result]:
    executions: list[int] = []
    lags: list[float] = []
    for _ in range(effort.at_most(5)):
        with server() as url, ExitStack() as stack:
            name, count = "serve_followers", PROCESSES
            with children(stack, name, count, url, token_hex(4), how) as processes:
                for process in processes:
                    _tell(process)
                answers = [_line(process) for process in processes]
        ends = [ended for ended, _ in answers if not math.isnan(ended)]
        executions.append(len(ends))
        lags.append(max(last for _, last in answers) - max(ends))
    run = [1.0] * len(lags)
    alternative = "the second that it takes"
    title = f"{PROCESSES} processes x 20 ask for one cold {how}"
    yield result(
        f"{title}: runs",
        alternative,
        Comparison([float(n) for n in executions], run),
        unit="",
        target=1,
        measured=max(executions),
        measure="runs",
    )
    slowest, note = 1000 * max(lags), ""
    if how == "node":
        runs = f"{PROCESSES * 20} runs of a graph have to end on {os.cpu_count()} cores"
        note = f"slowest of all rounds {slowest:.3g} ms, in which {runs}"
    yield result(
        f"{title}: last follower behind the leader",
        alternative,
        Comparison(lags, run),
        target=target,
        measured=slowest,
        measure="ms, slowest of all rounds",
        note=note,
    )


# -- without Redis ---------------------------------------------------------------------------------


def away(effort: Effort) -> Iterator[Result]:
    """A server that is not there any more, or that hangs: what a run costs once that is known."""
    for how in ("away", "hung"):
        for awaited in (False, True):
            yield _away(effort, how, awaited, False)
            yield _away(effort, how, awaited, True)


def _away(effort: Effort, how: str, awaited: bool, in_tiers: bool) -> Result:
    numbers = iter(range(10**9))

    def ask(graph: Any) -> Any:
        # no hits: the first tier would answer them
        question = {**QUESTION, "question": f"What is number {next(numbers)}?"}
        return graph.ainvoke(question) if awaited else graph.invoke(question)

    with private_server() as (url, process), event_loop() as loop:
        cache = (tiers if in_tiers else RedisCache)(url, prefix=token_hex(4))
        ours = one_node(True, Question, plain_answer, cache=cache)
        theirs = one_node(True, Question, plain_answer)
        mine, others = (
            each_awaited(loop, lambda g=graph: ask(g)) if awaited else each(lambda g=graph: ask(g))  # type: ignore[misc]
            for graph in (ours, theirs)
        )
        mine(3)
        if how == "away":
            process.kill()
            process.wait()
        else:
            process.send_signal(signal.SIGSTOP)
        try:
            mine(10)
            times = compare(mine, others, Effort(effort.at_most(31)))
        finally:
            process.send_signal(signal.SIGCONT)
            loop.run_until_complete(cache.aclose())
    return result(
        f"one node{', ainvoke' if awaited else ''}, {'tiers, ' if in_tiers else ''}Redis {how}",
        "no cache",
        times,
        target=1,
        measured=1000 * median([a - b for a, b in zip(times.ours, times.theirs, strict=True)]),
        measure="ms added",
        note="now and then one run looks whether it is back",
    )


ROWS: dict[str, Callable[[Effort], Iterator[Result]]] = {
    "tier-hit": tier_hit,
    "redis-hit": redis_hit,
    "fanout": fanout,
    "invalidation": invalidation,
    "hammer": hammer,
    "cold-key": cold_key,
    "away": away,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the JSON file."""
    packages = ("langgraph", "langgraph-perf", "redis")
    return program("bench_redis", __doc__, ROWS, packages, THOROUGH, QUICK, argv)


if __name__ == "__main__":
    sys.exit(main())
