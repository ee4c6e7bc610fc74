"""Fork and interpreter exit, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

PREAMBLE = """
import asyncio, os, sys, threading, warnings
from langgraph_perf.resources import FromContext, Keyed, Pool, Registry, Shared, _reaper
warnings.simplefilter("ignore", DeprecationWarning)  # fork with threads, from Python 3.12 on

class Thing:
    def __init__(self):
        self.maker = os.getpid()

    def close(self):
        print("closed", os.getpid() == parent, flush=True)

    def __del__(self):  # what a child made itself it may drop
        if os.getpid() != self.maker:
            print("inherited object dropped", flush=True)

parent = os.getpid()
"""


def run(script: str, *, timeout: float = 100) -> str:
    """What a script prints; it must end by itself, successfully and without complaints."""
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**os.environ, "PYTHONWARNINGS": ""},
    )
    assert done.stderr == ""
    assert done.returncode == 0
    return done.stdout


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")


@needs_fork
def test_a_forked_child_starts_empty() -> None:
    """It makes its own objects and closes nothing that belongs to its parent."""
    out = run(
        """
        pool = Pool(Thing, max_size=1, close=Thing.close)
        models = Keyed(lambda key: Thing(), close=Thing.close)
        with pool.lease() as mine, models.lease("a"):
            pass
        if (child := os.fork()) == 0:
            assert pool.stats().size == models.stats().size == 0
            with pool.lease(timeout=0) as own:
                assert own is not mine
            stats = pool.stats()
            assert (stats.size, stats.idle, stats.leases) == (1, 1, 1), stats
            pool._core.hooks.close = None
            print("child is done", flush=True)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert pool.stats().size == 1
        pool.close()
        models.close()
        """
    )
    assert out.splitlines() == ["child is done", "closed True", "closed True"]


@needs_fork
def test_a_lease_held_across_a_fork_stays_the_parents() -> None:
    """The child leaves the block without resetting, closing or dropping anything."""
    out = run(
        """
        def reset(thing):
            print("reset", os.getpid() == parent, flush=True)

        pool = Pool(Thing, max_size=1, close=Thing.close, reset=reset)
        with pool.lease():
            child = os.fork()
        if child == 0:
            assert pool.stats().size == 0
            pool.close()
            sys.stdout.flush()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert pool.stats().idle == 1
        pool.close()
        """
    )
    assert out.splitlines() == ["reset True", "closed True"]


@needs_fork
def test_a_context_manager_entered_before_a_fork_stays_the_parents() -> None:
    """The child neither leaves it nor drops nor counts it, whoever holds the locks at that time."""
    out = run(
        """
        class Connection:
            def __enter__(self):
                return self

            def __exit__(self, *exc):
                print("left", os.getpid() == parent, flush=True)

            def __del__(self):
                if os.getpid() != parent:
                    print("inherited object dropped", flush=True)

        db = FromContext(Connection)
        forgotten = db.lease()
        forgotten.__enter__()
        unused = db.lease()
        with db.lease():
            db.turns._lock.acquire()  # like a thread that is not there in the child
            child = os.fork()
            if child != 0:
                db.turns._lock.release()
                assert os.waitpid(child, 0)[1] == 0
        if child == 0:
            del forgotten
            assert db.stats().in_use == db.stats().leases == 0
            parent = os.getpid()
            with unused:
                assert db.stats().in_use == db.stats().leases == 1

            async def use():
                async with db.alease():
                    pass

            asyncio.run(use())
            assert db.stats().leases == 2
            sys.stdout.flush()
            os._exit(0)
        forgotten.__exit__(None, None, None)
        assert (db.stats().in_use, db.stats().leases) == (0, 2)
        """
    )
    assert out.splitlines() == ["left True"] * 4


@needs_fork
def test_a_close_that_is_under_way_at_a_fork_stays_the_parents() -> None:
    """The child neither goes on with it nor begins it once more, though its loop was closed."""
    out = run(
        """
        import time
        from langgraph_perf.resources import _work

        closed = []

        async def create():
            return Thing()

        async def close(thing):
            thing.close()
            closed.append(thing)

        pool = Pool(create, max_size=1, close=close)

        async def use():
            async with pool.alease():
                pass

        loop = asyncio.new_event_loop()
        loop.run_until_complete(use())
        asyncio.run(pool.aclose())  # for when the loop goes on, which it does not
        loop.close()
        if (child := os.fork()) == 0:
            _work.in_background = lambda job: job()
            pool.close()
            sys.stdout.flush()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        pool.close()
        while not closed:
            time.sleep(0.001)
        """
    )
    assert out.splitlines() == ["closed True"]


@needs_fork
def test_a_child_takes_several_objects_whoever_held_the_lock() -> None:
    """The lock of the gates is renewed: another thread may have held it."""
    run(
        """
        from langgraph_perf.resources import registry
        resources = Registry({"db": Pool(Thing, max_size=2)})
        wanted = {"a": registry.Want("db"), "b": registry.Want("db")}
        registry._gates_lock.acquire()  # like a thread that is not there in the child
        child = os.fork()
        if child == 0:
            with resources.lease(wanted) as leased:
                assert leased["a"] is not leased["b"]
            os._exit(0)
        registry._gates_lock.release()
        assert os.waitpid(child, 0)[1] == 0
        """
    )


@needs_fork
def test_locks_of_a_run_are_free_in_a_child() -> None:
    """Whatever other threads were about when it was forked, graphs run there."""
    run(
        """
        from langgraph.graph import START
        from typing_extensions import TypedDict
        from langgraph_perf import CachePolicy, MemoryCache, StateGraph, _locks

        class State(TypedDict, total=False):
            answer: str

        builder = StateGraph(State).add_node(
            "node", lambda state, db: {"answer": "a"}, resources=["db"],
            cache_policy=CachePolicy(version=1),
        )
        graph = builder.add_edge(START, "node").compile(
            cache=MemoryCache(), resources={"db": Pool(Thing)}
        )
        graph.invoke({})
        locks = list(_locks._made)
        assert len(locks) > 5
        for lock in locks:
            lock.acquire()  # like threads that are not there in the child
        child = os.fork()
        if child == 0:
            graph.invoke({"answer": "b"})
            graph.perf.stats()
            os._exit(0)
        for lock in locks:
            lock.release()
        assert os.waitpid(child, 0)[1] == 0
        """
    )


@needs_fork
def test_forking_while_threads_use_the_pool() -> None:
    """The child does not inherit a lock that nobody will ever release."""
    out = run(
        """
        pool = Pool(Thing, max_size=2, max_idle=0.005)
        stop = threading.Event()

        def work():
            while not stop.is_set():
                with pool.lease():
                    pass

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        children = []
        for _ in range(20):
            if (child := os.fork()) == 0:
                with pool.lease(timeout=5):
                    pass
                os._exit(7)
            children.append(child)
        codes = {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children}
        stop.set()
        for thread in threads:
            thread.join()
        print(codes)
        """
    )
    assert out.splitlines()[-1] == "{7}"


@needs_fork
def test_the_reaper_and_private_threads_work_in_a_child() -> None:
    """Threads do not survive a fork; new ones are started when needed."""
    out = run(
        """
        closed = threading.Event()
        pool = Pool(object, max_idle=0.005, close=lambda thing: closed.set())

        async def use():
            async with pool.alease():
                pass

        asyncio.run(use())
        assert closed.wait(10)
        other = Shared(Thing, max_idle=1000)
        with other.lease():
            pass
        assert _reaper.shared.running
        if (child := os.fork()) == 0:
            closed.clear()
            asyncio.run(use())
            os._exit(0 if closed.wait(10) else 1)
        assert os.waitpid(child, 0)[1] == 0
        """
    )
    assert out == ""


def test_exit_with_everything_open() -> None:
    """Idle objects are closed; leased ones, waiters, loads and daemon threads do not hang it."""
    out = run(
        """
        idle = Pool(Thing, close=Thing.close)
        shared = Shared(Thing, max_idle=1000, close=Thing.close)
        keyed = Keyed(lambda key: Thing(), max_idle=1000, close=Thing.close)
        leased = Pool(Thing, max_size=1, close=Thing.close, timeout=None)
        with idle.lease(), shared.lease(), keyed.lease("a"), keyed.lease("b"):
            pass
        held = leased.lease()
        held.__enter__()
        loading = threading.Event()
        slow = Shared(lambda: (loading.set(), threading.Event().wait()))
        for resource in (leased, slow):
            def wait(resource=resource):
                with resource.lease():
                    pass
            threading.Thread(target=wait, daemon=True).start()
        assert loading.wait(10)
        print("exit", flush=True)
        """
    )
    assert out.splitlines() == ["exit"] + ["closed True"] * 4


def test_exit_closes_async_objects_as_well_as_can_be() -> None:
    """Of a loop that is closed, of one that is not, and of one that runs in a daemon thread."""
    out = run(
        """
        async def create():
            return asyncio.get_running_loop()

        async def close(loop):
            print(loop is asyncio.get_running_loop(), flush=True)

        async def use(pool):
            async with pool.alease():
                pass

        pools = [Pool(create, close=close) for _ in range(3)]
        asyncio.run(use(pools[0]))
        open_loop = asyncio.new_event_loop()
        open_loop.run_until_complete(use(pools[1]))
        busy = asyncio.new_event_loop()
        threading.Thread(target=busy.run_forever, daemon=True).start()
        asyncio.run_coroutine_threadsafe(use(pools[2]), busy).result(10)
        warnings.simplefilter("ignore")  # loops that are never closed
        """
    )
    assert sorted(out.split()) == ["False", "True", "True"]


def test_exit_does_not_wait_for_closes_that_hang() -> None:
    """Not for long, and not for each of them."""
    out = run(
        """
        import time
        from types import SimpleNamespace
        from langgraph_perf.resources import _core, _lifecycle, _work
        hung = []

        def monotonic():  # the time is over as soon as a close hangs, however late that begins
            return time.monotonic() + 1000 * len(hung)

        for module in (_core, _lifecycle, _work):
            module.time = SimpleNamespace(monotonic=monotonic)
        _lifecycle.EXIT_SECONDS = 60.0

        async def create():
            return 1

        async def close(obj):
            print("closing", flush=True)
            hung.append(obj)
            await asyncio.Event().wait()

        async def use(pool):
            async with pool.alease():
                pass

        dead, busy = (Pool(create, close=close) for _ in range(2))
        asyncio.run(use(dead))
        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, daemon=True).start()
        asyncio.run_coroutine_threadsafe(use(busy), loop).result(10)
        import logging
        logging.getLogger("langgraph_perf").addHandler(logging.NullHandler())
        # asyncio complains about the hanging task when its daemon thread is torn down
        logging.getLogger("asyncio").disabled = True
        """
    )
    assert out == "closing\n"


def test_exit_with_a_close_that_fails() -> None:
    """No traceback; the others are closed all the same."""
    out = run(
        """
        import logging
        logging.getLogger("langgraph_perf").addHandler(logging.NullHandler())

        def fail(thing):
            raise OSError

        bad = Pool(Thing, close=fail)
        good = Pool(Thing, close=Thing.close)
        with bad.lease(), good.lease():
            pass
        """
    )
    assert out == "closed True\n"


def test_exit_in_the_middle_of_a_sync_lease() -> None:
    """``sys.exit`` inside a block is like any other way out of it."""
    out = run(
        """
        pool = Pool(Thing, close=Thing.close)
        with pool.lease():
            sys.exit(0)
        """
    )
    assert out == "closed True\n"


def test_importing_needs_nothing_heavy() -> None:
    """Neither numpy nor any driver is imported, and no thread is started."""
    out = run(
        """
        heavy = {"numpy", "psycopg", "sqlalchemy", "redis", "diskcache", "torch"} & set(sys.modules)
        print([name for name in heavy if not name.startswith("_")], threading.active_count())
        """
    )
    assert out.split()[-1] == "1"
