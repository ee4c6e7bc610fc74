"""Redis between processes: invalidations, leases, one run for all, holders that die or hang."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection, wait
from typing import Any

import pytest
import redis
from langgraph.graph import START
from typing_extensions import TypedDict

from langgraph_perf import CachePolicy, MemoryCache, RedisCache, StateGraph, TieredCache
from langgraph_perf.caches.base import Cache, Entry, Lookup, tag_id
from tests.redis_server import Proxy, Server, new_prefix
from tests.test_single_flight import until

from .test_processes import ask, child

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="needs POSIX processes"),
    # other tests may have left idle threads; the children use none of their locks
    pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning"),
]

KEY = (("graph", "node"), "key")
DOCS = tag_id("docs")


def open_cache(url: str, prefix: str, kind: str = "redis", lease_seconds: float = 10.0) -> Cache:
    cache = RedisCache(url, prefix=prefix, lease_seconds=lease_seconds)
    return TieredCache(MemoryCache(), cache) if kind == "tiered" else cache


def serve(pipe: Connection, *args: Any) -> None:
    """Do what the test asks: ``(method, arguments)`` in, result out."""
    with open_cache(*args) as cache:
        pipe.send("ready")
        while True:
            try:
                method, given = pipe.recv()
            except EOFError:
                return
            pipe.send(getattr(cache, method)(*given))


@pytest.mark.parametrize("kind", ["redis", "tiered"])
@pytest.mark.parametrize("how", ["invalidate", "clear"])
def test_other_process_sees_it_at_once(redis_server: Server, kind: str, how: str) -> None:
    """Once an invalidation or clear has returned, the next lookup elsewhere is a miss."""
    where = (redis_server.url, new_prefix(), kind)
    with open_cache(*where) as cache, child(serve, *where) as (_, pipe):
        assert pipe.recv() == "ready"
        for i in range(20):
            (token,) = cache.tag_tokens([DOCS])
            stored = Entry(str(i).encode(), time.time(), None, ((DOCS, token),))
            cache.write(KEY, stored)
            for _ in range(3):  # the later ones come from the child's first tier
                assert ask(pipe, "read", [Lookup(KEY, (DOCS,))]) == [stored]
            if how == "invalidate":
                cache.invalidate("docs")
            else:
                cache.clear([KEY[0]])
            assert ask(pipe, "read", [Lookup(KEY)]) == [None]


def hammer(pipe: Connection, url: str, prefix: str, seconds: float) -> None:
    """Read as fast as it goes; compute what is a miss. The value says which version of the data
    it was computed from; a read may not be answered with one that was invalidated before it."""
    stale = hits = 0
    with (
        open_cache(url, prefix, "tiered") as cache,
        RedisCache(url, prefix=f"{prefix}:data") as data,
    ):
        line = data._line

        def version(name: str) -> int:
            (reply,) = line.execute([("GET", f"{prefix}:{name}")])
            return int(reply or 0)

        pipe.send("ready")
        pipe.recv()
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            least = version("invalidated")
            for _ in range(20):
                (found,) = cache.read([Lookup(KEY, (DOCS,))])
                if found is None:
                    (token,) = cache.tag_tokens([DOCS])
                    payload = str(version("current")).encode()
                    cache.write(KEY, Entry(payload, time.time(), None, ((DOCS, token),)))
                else:
                    hits += 1
                    stale += int(found.payload) < least
        pipe.send((stale, hits))


def test_no_stale_reads_under_load(redis_server: Server) -> None:
    """Four processes read through first tiers while a fifth invalidates: none is answered with
    what was invalidated before it asked."""
    prefix = new_prefix()
    with contextlib.ExitStack() as stack:
        pipes = [
            stack.enter_context(child(hammer, redis_server.url, prefix, 2.0))[1] for _ in range(4)
        ]
        assert [pipe.recv() for pipe in pipes] == ["ready"] * 4
        for pipe in pipes:
            pipe.send("go")
        turns = 0
        with open_cache(redis_server.url, prefix) as cache, redis_server.client() as client:
            ends = time.monotonic() + 2.0
            while time.monotonic() < ends:
                turns += 1
                client.set(f"{prefix}:current", turns)
                cache.invalidate("docs")
                client.set(f"{prefix}:invalidated", turns)
        results = [pipe.recv() for pipe in pipes]
    assert [stale for stale, _ in results] == [0] * 4
    assert sum(hits for _, hits in results) > 100
    assert turns > 5


def test_a_stopped_process_wakes_up_to_the_truth(redis_server: Server) -> None:
    """A process that hangs while something is invalidated does not keep the invalidation waiting,
    and serves nothing old when it goes on."""
    where = (redis_server.url, new_prefix(), "tiered")
    with open_cache(*where) as cache, child(serve, *where) as (process, pipe):
        assert pipe.recv() == "ready"
        for i in range(5):
            (token,) = cache.tag_tokens([DOCS])
            cache.write(KEY, Entry(str(i).encode(), time.time(), None, ((DOCS, token),)))
            for _ in range(20):
                assert ask(pipe, "read", [Lookup(KEY)])[0].payload == str(i).encode()
            os.kill(process.pid, signal.SIGSTOP)
            started = time.monotonic()
            cache.invalidate("docs")
            assert time.monotonic() - started < 15.0  # not for its deadline
            pipe.send(("read", [[Lookup(KEY)]]))
            os.kill(process.pid, signal.SIGCONT)
            assert pipe.recv() == [None]


# -- leases ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["killed", "stopped", "cut off"])
def test_a_holder_that_is_gone_is_replaced_and_fenced(redis_server: Server, how: str) -> None:
    """A holder that dies, hangs or loses its network is replaced within its lease, and its late
    result refused."""
    prefix, proxy = new_prefix(), Proxy(redis_server.port)
    where = (proxy.url, prefix, "redis", 200.0)
    with (
        child(serve, *where) as (process, pipe),
        open_cache(redis_server.url, prefix, "redis", 60.0) as cache,
    ):
        assert pipe.recv() == "ready"
        late = ask(pipe, "acquire", KEY)
        assert cache.acquire(KEY) is None
        if how == "killed":
            process.kill()
        elif how == "stopped":
            os.kill(process.pid, signal.SIGSTOP)
        else:
            proxy.deaf = True
        redis_server.age(prefix, 100.0)
        assert cache.acquire(KEY) is None
        redis_server.age(prefix, 100.0)
        lease = cache.acquire(KEY)
        assert lease is not None
        if how == "stopped":
            os.kill(process.pid, signal.SIGCONT)
        proxy.deaf = False
        proxy.reset()
        if how != "killed":
            assert ask(pipe, "renew", late) is None
            assert ask(pipe, "write", KEY, Entry(b"late", time.time()), late) is False
        assert cache.write(KEY, Entry(b"new", time.time()), lease)
        assert cache.read([Lookup(KEY)])[0].payload == b"new"
    proxy.close()


class State(TypedDict, total=False):
    query: str
    answer: str


def build(cache: Cache, node: Any) -> Any:
    builder = StateGraph(State).add_node("node", node, cache_policy=CachePolicy(version=1))
    return builder.add_edge(START, "node").compile(cache=cache)


def one_graph(pipe: Connection, url: str, prefix: str) -> None:
    """Five threads and five tasks that ask for one cold key, whose lease is a long one."""
    runs: list[float] = []

    def node(state: State) -> State:
        pipe.send("running")
        time.sleep(0.3)
        runs.append(time.monotonic())
        return {"answer": "done"}

    with open_cache(url, prefix, lease_seconds=60.0) as cache:
        graph = build(cache, node)
        pipe.send("ready")
        pipe.recv()
        finished: list[float] = []

        def follow(_: int) -> None:
            assert graph.invoke({"query": "q"})["answer"] == "done"
            finished.append(time.monotonic())

        async def follow_all() -> None:
            async def one() -> None:
                assert (await graph.ainvoke({"query": "q"}))["answer"] == "done"
                finished.append(time.monotonic())

            await asyncio.gather(*[one() for _ in range(5)])

        with ThreadPoolExecutor(6) as pool:
            threads = [pool.submit(follow, i) for i in range(5)]
            tasks = pool.submit(asyncio.run, follow_all())
            for future in (*threads, tasks):
                future.result(60)
        pipe.send((runs, max(finished)))


def test_one_run_between_processes(redis_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads and tasks of four processes that ask for one key run the node once, and those that
    wait are woken by its end rather than by the next look."""
    # so late that it is told apart from what a busy machine takes, also in the children
    monkeypatch.setattr("langgraph_perf._call.NOTIFIED", 60.0)
    monkeypatch.setattr("langgraph_perf.caches.redis._POLL", 60.0)
    prefix = new_prefix()
    with contextlib.ExitStack() as stack:
        pipes = [
            stack.enter_context(child(one_graph, redis_server.url, prefix))[1] for _ in range(4)
        ]
        assert [pipe.recv() for pipe in pipes] == ["ready"] * 4
        for pipe in pipes:
            pipe.send("go")
        results = []
        for pipe in pipes:
            while (said := pipe.recv()) == "running":
                pass
            results.append(said)
    (ended,) = [end for runs, _ in results for end in runs]
    # looks alone would take until the end of the lease
    assert max(finished for _, finished in results) - ended < 30.0


def run_until_killed(pipe: Connection, url: str, prefix: str) -> None:
    def node(state: State) -> State:
        pipe.send("running")
        time.sleep(60)
        return {"answer": "never"}

    build(open_cache(url, prefix, "redis", 0.5), node).invoke({"query": "q"})


def test_a_killed_leader_is_followed(redis_server: Server) -> None:
    """Who waits for a leader in another process that is killed runs instead, within its lease."""
    prefix = new_prefix()
    with child(run_until_killed, redis_server.url, prefix) as (process, pipe):
        assert pipe.recv() == "running"
        with open_cache(redis_server.url, prefix, "redis", 0.5) as cache:
            graph = build(cache, lambda state: {"answer": "done"})
            killed = threading.Timer(0.2, process.kill)
            killed.start()
            started = time.monotonic()
            assert graph.invoke({"query": "q"})["answer"] == "done"
            assert time.monotonic() - started < 30.0  # its node would have taken a minute
            killed.join()


def first_one_never_ends(pipe: Connection, url: str, prefix: str) -> None:
    """Four threads and four tasks that ask for one cold key; the first run there is says so, and
    goes on until it is killed."""
    with (
        open_cache(url, prefix, "redis", 4.0) as cache,
        redis.Redis.from_url(url) as client,
    ):

        def node(state: State) -> State:
            if client.incr(f"{prefix}:runs") == 1:
                pipe.send("leads")
                time.sleep(60)
            return {"answer": "done"}

        graph = build(cache, node)
        pipe.send("ready")
        pipe.recv()

        async def follow_all() -> list[str]:
            runs = [graph.ainvoke({"query": "q"}) for _ in range(4)]
            return [found["answer"] for found in await asyncio.gather(*runs)]

        with ThreadPoolExecutor(5) as pool:
            tasks = pool.submit(asyncio.run, follow_all())
            answers = list(pool.map(lambda _: graph.invoke({"query": "q"})["answer"], range(4)))
            pipe.send(answers + tasks.result(30))


def test_a_killed_leader_costs_one_more_run(redis_server: Server) -> None:
    """However many threads and tasks of other processes wait for a leader that is killed, one of
    them runs, and the others get its result."""
    prefix = new_prefix()
    with contextlib.ExitStack() as stack, redis_server.client() as client:
        children = [
            stack.enter_context(child(first_one_never_ends, redis_server.url, prefix))
            for _ in range(4)
        ]
        for _, pipe in children:
            assert pipe.recv() == "ready"
        for _, pipe in children:
            pipe.send("go")
        (leads,) = wait([pipe for _, pipe in children], 30)
        assert leads.recv() == "leads"  # type: ignore[union-attr]
        (leader,) = [process for process, pipe in children if pipe is leads]
        others = [pipe for _, pipe in children if pipe is not leads]

        def all_wait() -> bool:
            channels = client.pubsub_channels(f"{prefix}:1:w:*")
            return [count for _, count in client.pubsub_numsub(*channels)] == [len(others)]

        until(all_wait)
        leader.kill()
        for pipe in others:
            assert pipe.poll(30)
            assert pipe.recv() == ["done"] * 8
        assert client.get(f"{prefix}:runs") == b"2"


def test_a_forked_child_has_connections_of_its_own(redis_server: Server) -> None:
    """After a fork parent and child go on, each on its own connections."""
    cache = open_cache(redis_server.url, new_prefix(), "tiered")
    cache.write(KEY, Entry(b"parent", time.time()))
    for _ in range(10):
        cache.read([Lookup(KEY)])

    def use(pipe: Connection) -> None:
        (found,) = cache.read([Lookup(KEY)])
        cache.write((("n",), "child"), Entry(b"child", time.time()))
        found_async = asyncio.run(cache.aread([Lookup(KEY)]))
        pipe.send((found and found.payload, found_async[0] and found_async[0].payload))

    with child(use) as (_, pipe):
        for _ in range(50):
            assert cache.read([Lookup(KEY)])[0].payload == b"parent"
        assert pipe.recv() == (b"parent", b"parent")
    assert cache.read([Lookup((("n",), "child"))])[0].payload == b"child"
    cache.close()


def test_forking_while_a_trip_is_counted(redis_server: Server) -> None:
    """A child needs nothing from the thread that was counting, which it does not have."""
    with RedisCache(redis_server.url, prefix=new_prefix()) as cache:
        cache.write(KEY, Entry(b"parent", time.time()))

        def use(pipe: Connection) -> None:
            (found,) = cache.read([Lookup(KEY)])
            pipe.send(found and found.payload)

        with cache._trips._lock, child(use) as (_, pipe):
            assert pipe.poll(20)
            assert pipe.recv() == b"parent"


async def test_forking_inside_a_loop(redis_server: Server) -> None:
    """A child that uses and drops what it inherited leaves the parent's connections alone."""
    cache = RedisCache(redis_server.url, prefix=new_prefix())
    await cache.awrite(KEY, Entry(b"parent", time.time()))
    # nothing here may keep in the child what it is to drop
    connection = id(cache._async_line()._connection)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            gc.collect()
            (found,) = cache.read([Lookup(KEY)])
            cache.close()
            gc.collect()
            code = 0 if found is not None else 2
        finally:
            os._exit(code)
    _, status = await asyncio.to_thread(os.waitpid, pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    for _ in range(3):
        (found,) = await cache.aread([Lookup(KEY)])
        assert found is not None
        assert found.payload == b"parent"
    assert id(cache._async_line()._connection) == connection
    await cache.aclose()
