"""RedisCache on its own: what it takes, what it sends, whose keys it touches."""

from __future__ import annotations

import asyncio
import gc
import logging
import operator
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Annotated, Any

import langgraph.graph
import langgraph.types
import pytest
import redis
import redis.asyncio
from langgraph.graph import END, START
from langgraph.types import Send
from redis.sentinel import Sentinel
from typing_extensions import TypedDict

from langgraph_perf import (
    CachePolicy,
    ConfigurationError,
    MemoryCache,
    RedisCache,
    StateGraph,
    TieredCache,
)
from langgraph_perf._backend import Backend
from langgraph_perf.caches import _bounded, _redis_commands, _redis_lines, _redis_listener
from langgraph_perf.caches._redis_connect import Source
from langgraph_perf.caches._redis_lines import Line, _Job
from langgraph_perf.caches._redis_listener import Buffer, Report
from langgraph_perf.caches.base import OWNED, Entry, Lookup, tag_id
from langgraph_perf.testing import KEY, entry
from tests.redis_server import Proxy, Server, free_port, new_prefix
from tests.servers import ask_again
from tests.test_single_flight import auntil, until

DOCS = tag_id("docs")


@pytest.fixture
def prefix() -> str:
    return new_prefix()


@pytest.fixture
def cache(redis_server: Server, prefix: str) -> Any:
    with RedisCache(redis_server.url, prefix=prefix) as cache:
        yield cache


def keys(n: int) -> list[Any]:
    return [(("n",), str(i)) for i in range(n)]


# -- what it takes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "URL ''"),
        ("localhost:6379", "URL 'localhost:6379'"),
        ("http://localhost", "URL 'http://localhost'"),
        ("redis://localhost:port/0", "URL 'redis://localhost:port/0'"),
        ("redis://localhost:99999999/0", "URL"),
        (None, "got None"),
        (42, "got 42"),
        (MemoryCache(), "got MemoryCache"),
        ({"password": "s3cret"}, "got dict;"),
        (Sentinel([("localhost", 1)]), "sentinel.master_for(name)"),
        ("redis://localhost/zero", "no database number"),
        ("redis://localhost/0?timeout=abc", "?timeout=abc"),
        ("redis://localhost/0?socket_timeout=abc", "?socket_timeout=abc"),
        ("redis://localhost/0?sockt_timeout=1", "accepted: socket_timeout"),
    ],
)
def test_what_is_no_server_is_refused(given: Any, message: str) -> None:
    """The error names what was given and what is accepted, and nothing is connected to."""
    with pytest.raises(ConfigurationError, match="url_or_client") as caught:
        RedisCache(given)
    assert message in str(caught.value)
    assert "accepted" in str(caught.value)


def test_errors_never_show_a_password() -> None:
    """A malformed URL is shown without its secret."""
    with pytest.raises(ConfigurationError) as caught:
        RedisCache("redis://user:s3cret@host:port/0?password=s3cret")
    assert "s3cret" not in str(caught.value)
    assert "user" in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "redis://:QQ@QQ/QQ@localhost:17391/0",
        "redis://:QQ/QQ@QQ@localhost:17391/0",
        "redis://:QQ#QQ@localhost:17391/0",
        "redis://:QQ?QQ@localhost:17391/0",
        "redis://localhost:17391/0?pasword=QQ",
        "redis://localhost:17391/zero?password=QQ",
    ],
)
def test_passwords_that_are_not_encoded(url: str) -> None:
    """They are refused with the way to write them, and no part of them is shown."""
    with pytest.raises(ConfigurationError) as caught:
        RedisCache(url)
    assert "QQ" not in str(caught.value)
    assert "percent-encoded" in str(caught.value) or "@" not in url


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_ping_says_what_is_wrong(own_server: Server, mode: str) -> None:
    """It names the server, the user and what to look at; the password it does not."""
    client = own_server.client()
    client.config_set("requirepass", "s3cret")
    place = f"127.0.0.1:{own_server.port}"
    client.close()
    for url, parts in {
        f"redis://{place}/0": [place, "it wants a password, and was given none"],
        f"redis://:wr0ng@{place}/0": [place, "WRONGPASS|invalid username-password"],
        f"redis://bob:wr0ng@{place}/0": [place, "as user 'bob'"],
        f"redis://:s3cret@{place}/99": [f"{place}, database 99", "no such database"],
        f"rediss://:s3cret@{place}/0": [place, "redis:// if this one does not"],
    }.items():
        # who speaks TLS to this one waits in vain; others get an answer, however long it takes
        seconds = 2.0 if url.startswith("rediss") else 20.0
        with RedisCache(url, timeout=seconds, connect_timeout=seconds) as cache:
            ping = cache.ping if mode == "sync" else lambda c=cache: asyncio.run(c.aping())
            with pytest.raises(ConfigurationError) as caught:
                ping()
            said = str(caught.value)
            for part in parts:
                assert re.search(part, said), said
            assert "s3cret" not in said
            assert "wr0ng" not in said


@pytest.mark.parametrize("clock", [5, None, "now"])
def test_clocks(clock: Any) -> None:
    """A clock that cannot be called is refused here, not in the first run."""
    with pytest.raises(ConfigurationError, match="clock: got"):
        RedisCache("redis://localhost:1", clock=clock)
    with pytest.raises(ConfigurationError, match="clock: got"):
        MemoryCache(clock=clock)


@pytest.mark.parametrize("prefix", ["", "a b", "a{b}", "a*", "é", "x" * 101, None, 7, b"lgp"])
def test_prefixes(prefix: Any) -> None:
    """A prefix that could match other keys, or split a key's slot, is refused."""
    with pytest.raises(ConfigurationError, match="prefix"):
        RedisCache("redis://localhost", prefix=prefix)


@pytest.mark.parametrize("field", ["timeout", "connect_timeout", "lease_seconds"])
@pytest.mark.parametrize("value", [0, -1, None, "1", True, float("nan")])
def test_times(field: str, value: Any) -> None:
    """Times are positive numbers of seconds."""
    with pytest.raises(ConfigurationError, match=field):
        RedisCache("redis://localhost", **{field: value})


def test_nothing_connects_before_it_is_used() -> None:
    """A server that is away does not keep a program from starting."""
    with RedisCache(f"redis://127.0.0.1:{free_port()}") as cache:
        assert cache.round_trips == 0


async def test_ping_tells_what_is_wrong(own_server: Server) -> None:
    """Wrong port, wrong password, and something that is no Redis are told apart."""
    with own_server.client() as client:
        client.config_set("requirepass", "secret")
    port = own_server.port
    with RedisCache(f"redis://:secret@127.0.0.1:{port}", prefix="p") as cache:
        cache.ping()
        await cache.aping()
    for url, message in [
        (f"redis://127.0.0.1:{free_port()}", ": ConnectionError"),
        (f"redis://:wrong@127.0.0.1:{port}", "AuthenticationError"),
        (f"redis://127.0.0.1:{port}", "AuthenticationError"),
    ]:
        with RedisCache(url, prefix="p") as cache:
            with pytest.raises(ConfigurationError, match=message):
                cache.ping()
            with pytest.raises(ConfigurationError, match=message):
                await cache.aping()


async def check_both_ways(given: Any, prefix: str) -> None:
    """A cache made from ``given`` serves blocking and awaiting callers."""
    cache = RedisCache(given, prefix=prefix)
    await cache.awrite(KEY, entry(b"1"))
    assert await asyncio.to_thread(cache.read, [Lookup(KEY)]) == [entry(b"1")]
    await asyncio.to_thread(cache.write, KEY, entry(b"2"))
    assert await cache.aread([Lookup(KEY)]) == [entry(b"2")]
    await cache.aclose()


@pytest.mark.parametrize("options", ["", "?decode_responses=True", "?protocol=3", "?protocol=2"])
async def test_urls(redis_server: Server, prefix: str, options: str) -> None:
    """Whatever protocol and decoding a URL asks for."""
    await check_both_ways(redis_server.url + options, prefix)


@pytest.mark.parametrize("module", [redis, redis.asyncio])
@pytest.mark.parametrize("decode", [False, True])
async def test_clients(redis_server: Server, prefix: str, module: Any, decode: bool) -> None:
    """Clients of either kind serve both kinds of graphs, decoding or not, and stay open."""
    client = module.Redis.from_url(redis_server.url, decode_responses=decode)
    await check_both_ways(client, prefix)
    pong = client.ping()
    assert (await pong if module is redis.asyncio else pong) is True
    closed = client.aclose() if module is redis.asyncio else client.close()
    if module is redis.asyncio:
        await closed


@pytest.mark.parametrize("module", [redis, redis.asyncio])
def test_tls_settings_reach_both_kinds_of_connections(module: Any) -> None:
    """Certificates, password and database of a client hold for what blocks and what awaits."""
    client = module.Redis(
        host="example.org",
        port=7,
        db=3,
        username="u",
        password="p",
        ssl=True,
        ssl_ca_certs="ca.pem",
    )
    source = Source(client, 1.5, 2.5)
    assert source.connect is not None
    assert source.aconnect is not None
    for connection in (source.connect(), source.aconnect()):
        assert type(connection).__name__ == "SSLConnection"
        assert (connection.host, connection.port, connection.db) == ("example.org", 7, 3)
        assert (connection.username, connection.password) == ("u", "p")
        assert connection.ca_certs == "ca.pem"
        assert connection.socket_timeout == 1.5
        assert connection.socket_connect_timeout == 2.5


async def test_valkeys_own_scheme(redis_server: Server, prefix: str) -> None:
    """``valkey://`` is understood too."""
    await check_both_ways(redis_server.url.replace("redis://", "valkey://"), prefix)


async def test_unix_sockets(prefix: str) -> None:
    """A server without a port."""
    with Server() as server:
        pass
    path = f"{server.directory}.sock"
    with Server(options=("--unixsocket", path)):
        await check_both_ways(f"unix://{path}", prefix)
        await check_both_ways(redis.Redis(unix_socket_path=path), prefix)


async def test_sentinel(own_server: Server, prefix: str, tmp_path: Any) -> None:
    """The master is found through Sentinel."""
    port = free_port()
    config = tmp_path / "sentinel.conf"
    config.write_text(f"port {port}\nsentinel monitor main 127.0.0.1 {own_server.port} 1\n")
    with Server.sentinel(port, config):
        client = Sentinel([("127.0.0.1", port)], socket_timeout=5).master_for("main")
        await check_both_ways(client, prefix)
        aclient = redis.asyncio.Sentinel([("127.0.0.1", port)]).master_for("main")
        with pytest.raises(ConfigurationError, match="Sentinel"):
            RedisCache(aclient)


async def test_a_sentinel_that_hangs(own_server: Server, prefix: str, tmp_path: Any) -> None:
    """Asking a Sentinel for the master has a deadline, also when its client has none."""
    port = free_port()
    config = tmp_path / "sentinel.conf"
    config.write_text(f"port {port}\nsentinel monitor main 127.0.0.1 {own_server.port} 1\n")
    with Server.sentinel(port, config) as sentinel, own_server.client() as admin:
        before = set(threading.enumerate())
        finder = Sentinel([("127.0.0.1", port)])
        client = finder.master_for("main")
        with RedisCache(client, prefix=prefix) as cache:
            cache.ping()
            # only now: a busy machine may take longer for what is to be in time
            assert isinstance(cache._line, Line)
            cache.timeout = cache._line.connect_timeout = 1.0
            with sentinel.stopped():
                admin.client_kill_filter(_type="normal", skipme=True)
                started = time.monotonic()
                with pytest.raises(TimeoutError):
                    cache.read([Lookup(KEY)])
                with pytest.raises(TimeoutError):
                    await cache.aread([Lookup(KEY)])
                assert time.monotonic() - started < 10.0
        # those that hung go on now, and close what they have connected to
        until(lambda: before.issuperset(threading.enumerate()))
        for each in (client, *finder.sentinels):
            each.close()


def test_without_the_extra() -> None:
    """Who has no redis package learns what to install, when it is asked for and not before."""
    code = (
        "import sys; sys.modules['redis'] = None\n"
        "import langgraph_perf\n"
        "try: langgraph_perf.RedisCache\n"
        "except ImportError as exc: print(exc)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'langgraph-perf[redis]'" in done.stdout


# -- what it sends --------------------------------------------------------------------------------


def test_entry_and_tokens_in_one_round_trip(cache: RedisCache) -> None:
    """A lookup that names its tags costs one trip; unforeseen tags cost another."""
    tags = [tag_id("a"), tag_id("b")]
    deps = tuple(zip(tags, cache.tag_tokens(tags), strict=True))
    cache.write(KEY, entry(deps=deps))
    before = cache.round_trips
    assert cache.read([Lookup(KEY, tuple(tags))] * 3)[0] is not None
    assert cache.round_trips == before + 1
    assert cache.read([Lookup(KEY, tuple(tags[:1]))])[0] is not None
    assert cache.round_trips == before + 3


async def test_what_comes_meanwhile_goes_out_together(cache: RedisCache) -> None:
    """Tasks and threads that ask at once share a few round trips."""
    some = keys(256)
    for key in some:
        cache.write(key, entry(key[1].encode()))
    await cache.aread([Lookup(KEY)])
    before = cache.round_trips
    found = await asyncio.gather(*[cache.aread([Lookup(key)]) for key in some])
    assert [e.payload for (e,) in found] == [key[1].encode() for key in some]
    assert cache.round_trips - before <= 3


def test_threads_share_round_trips(
    prefix: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one thread's request is under way, the others' gather."""

    def read(_: int) -> Any:
        return cache.read([Lookup(KEY)])[0]

    with RedisCache(proxy.url, prefix=prefix) as cache, ThreadPoolExecutor(32) as pool:
        cache.write(KEY, entry())
        line = cache._line
        assert isinstance(line, Line)
        carry = line._carry

        def under_way(batch: list[_Job]) -> None:
            monkeypatch.setattr(line, "_carry", carry)
            # it takes a busy machine a while to start them all; who is led for is among them
            until(lambda: len(line._queue) == 32)
            carry(batch)

        monkeypatch.setattr(line, "_carry", under_way)
        before = cache.round_trips
        found = list(pool.map(read, range(32)))
        assert found == [entry()] * 32
        assert cache.round_trips - before <= 8
        assert proxy.connections == 1


async def test_all_kinds_of_operations_share_a_connection(cache: RedisCache) -> None:
    """Each gets its own answer, also when another one's fails."""
    results = await asyncio.gather(
        cache.atag_tokens([DOCS]),
        cache.awrite(KEY, entry()),
        cache._async_line().execute([("NONSENSE",), ("ECHO", "x")]),
        cache.aacquire((("n",), "x")),
        cache.aread([Lookup(KEY)]),
    )
    assert len(results[0]) == 1
    assert results[1] is True
    assert isinstance(results[2][0], redis.ResponseError)
    assert results[2][1] == b"x"
    assert results[3] is not None


def test_scripts_survive_a_server_that_forgot_them(cache: RedisCache, redis_server: Server) -> None:
    """A script the server does not know (restarted, flushed) is sent in full."""
    assert cache.write(KEY, entry(b"1"))
    with redis_server.client() as client:
        client.script_flush()
    assert cache.write(KEY, entry(b"2"))
    with redis_server.client() as client:
        client.script_flush()
    assert asyncio.run(cache.awrite(KEY, entry(b"3")))
    assert cache.read([Lookup(KEY)]) == [entry(b"3")]


def test_a_follower_that_leaves_is_not_waited_for(
    redis_server: Server, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who gives up waiting, or is interrupted, while others use the line passes his turn on."""
    leads, go_on = threading.Event(), threading.Event()
    with RedisCache(redis_server.url, prefix=prefix) as cache, ThreadPoolExecutor(3) as pool:
        cache.ping()
        line = cache._line
        assert isinstance(line, Line)
        carry = line._carry

        def held(batch: list[_Job]) -> None:
            leads.set()
            assert go_on.wait(20)
            carry(batch)

        monkeypatch.setattr(line, "_carry", held)
        leader = pool.submit(cache.read, [Lookup(KEY)])
        assert leads.wait(20)
        cache.timeout = 0.05
        with pytest.raises(TimeoutError):
            cache.read([Lookup(KEY)])
        cache.timeout = 20.0

        def interrupted(job: _Job) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(line, "_follow", interrupted)
            with pytest.raises(KeyboardInterrupt):
                cache.read([Lookup(KEY)])
        go_on.set()
        assert leader.result(20) == [None]
        assert pool.submit(cache.read, [Lookup(KEY)]).result(20) == [None]
        assert not line._leader


@pytest.mark.parametrize("connected", [True, False])
def test_no_interruption_stops_a_line(redis_server: Server, prefix: str, connected: bool) -> None:
    """At whatever call a signal's handler raises, the next operation is carried out at once."""
    files = (_redis_lines.__file__, _redis_commands.__file__, _bounded.__file__)

    def interrupted(at: int) -> bool:
        calls = 0

        def handler(frame: Any, event: str, _: Any) -> None:
            nonlocal calls
            # where the interpreter looks for signals: on entering a function, after a C function
            if event in ("call", "c_return") and frame.f_code.co_filename in files:
                calls += 1
                if calls > at:
                    sys.setprofile(None)
                    raise KeyboardInterrupt

        sys.setprofile(handler)
        try:
            cache.read([Lookup(KEY)])
        except KeyboardInterrupt:
            return True
        finally:
            sys.setprofile(None)
        return False

    with RedisCache(redis_server.url, prefix=prefix, timeout=60.0, connect_timeout=60.0) as cache:
        line = cache._line
        assert isinstance(line, Line)
        at = 0
        while True:
            assert cache.read([Lookup(KEY)]) == [None]
            if not connected:
                line._drop()
            if not interrupted(at):
                break
            started = time.monotonic()
            assert cache.read([Lookup(KEY)]) == [None]
            # long before its deadline, and however busy the machine is
            assert time.monotonic() - started < 20.0
            assert not line._leader
            assert not line._queue
            at += 1
        assert at > 20


def test_a_leader_that_could_not_tell_is_found_out(redis_server: Server, prefix: str) -> None:
    """What he had begun may have been carried out, so it is not begun again."""
    with RedisCache(redis_server.url, prefix=prefix) as cache:
        line = cache._line
        assert isinstance(line, Line)
        lost = _Job([("SET", f"{prefix}:lost", "1")], time.monotonic() + 10)
        lost.begun = True
        line._queue.append(lost)
        assert cache.read([Lookup(KEY)]) == [None]
        assert isinstance(lost.error, ConnectionError)
        assert not line._queue
        with redis_server.client() as client:
            assert not client.exists(f"{prefix}:lost")


def test_a_connection_that_was_closed_meanwhile_is_made_anew(
    redis_server: Server, prefix: str, proxy: Proxy
) -> None:
    """An idle connection that somebody cut costs nothing but a new one."""
    with RedisCache(proxy.url, prefix=prefix) as cache:
        for i in range(3):
            assert cache.write(KEY, entry(str(i).encode()))
            proxy.reset()
        assert cache.read([Lookup(KEY)]) == [entry(b"2")]
        assert proxy.connections == 4


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_an_answer_that_drips_has_one_deadline(
    redis_server: Server, prefix: str, proxy: Proxy, mode: str
) -> None:
    """However many pieces an answer comes in, the operation ends in time."""
    with RedisCache(proxy.url, prefix=prefix) as cache:
        assert cache.write(KEY, entry(b"x" * 400_000))
        assert cache.read([Lookup(KEY)]) != [None]
        cache.timeout = 1.0  # what is to be in time may take a busy machine longer
        proxy.drip = 0.5  # fifty seconds in all

        async def read() -> None:
            await cache.aread([Lookup(KEY)])

        started = time.monotonic()
        with pytest.raises(TimeoutError):
            cache.read([Lookup(KEY)]) if mode == "sync" else asyncio.run(read())
        assert time.monotonic() - started < 20.0


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_closing_in_the_middle(redis_server: Server, prefix: str, proxy: Proxy, mode: str) -> None:
    """What is under way when a cache is closed ends, and no connection is made again."""
    cache = RedisCache(proxy.url, prefix=prefix, timeout=5.0)

    def check(line: Any, error: BaseException | None) -> None:
        assert isinstance(error, (ConnectionError, redis.ConnectionError))
        assert line._connection is None
        assert proxy.connections == 1

    async def amain() -> None:
        await cache.aping()
        proxy.delay = 10.0
        line = cache._async_line()
        before = cache.round_trips
        reading = asyncio.create_task(cache.aread([Lookup(KEY)]))
        while cache.round_trips == before:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0)
        await cache.aclose()
        (error,) = await asyncio.gather(reading, return_exceptions=True)
        assert isinstance(error, BaseException)
        check(line, error)

    if mode == "async":
        asyncio.run(amain())
        return
    cache.ping()
    proxy.delay = 10.0
    line = cache._line
    assert isinstance(line, Line)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(cache.read, [Lookup(KEY)])
        while not line._leader:
            time.sleep(0.001)
        cache.close()
        check(line, reading.exception(10))


def test_round_trips_are_never_uncounted(cache: RedisCache) -> None:
    """The trips of event loops that have ended are still counted."""
    counts = []
    for _ in range(3):
        asyncio.run(cache.aread([Lookup(KEY)]))
        gc.collect()
        counts.append(cache.round_trips)
    assert counts == [1, 2, 3]


async def test_what_is_large_is_packed_off_the_loop(cache: RedisCache) -> None:
    """Sealing and unsealing megabytes blocks no event loop."""
    threads = []
    pack, unseal = cache._write, cache._unsealed

    def noted(work: Any) -> Any:
        def run(*args: Any) -> Any:
            threads.append(threading.current_thread())
            return work(*args)

        return run

    cache._write, cache._unsealed = noted(pack), noted(unseal)  # type: ignore[method-assign]
    large = entry(b"x" * 1_000_000)
    assert await cache.awrite(KEY, large)
    assert await cache.aread([Lookup(KEY)]) == [large]
    assert threading.current_thread() not in threads
    assert len(threads) == 2


def test_many_tags(cache: RedisCache) -> None:
    """The time a lookup takes grows with the number of its tags, not faster."""
    some = [Lookup(key, tuple([tag_id(f"{key}{i}") for i in range(10_000)])) for key in keys(2)]
    started = time.thread_time()
    next(cache._reading(some))
    assert time.thread_time() - started < 0.5


def test_a_tag_whose_name_is_taken(cache: RedisCache, redis_server: Server) -> None:
    """What depends on it is not served; other tags are not concerned; invalidating it heals it."""
    cache.tag_tokens([DOCS])
    with redis_server.client() as client:
        (name,) = client.scan_iter(match=f"{cache.prefix}:1:t:*")
        client.delete(name)
        client.rpush(name, "theirs")
    bad, good = cache.tag_tokens([DOCS, tag_id("good")])
    assert cache.peek_tags([DOCS, tag_id("good")]) == {tag_id("good"): good}
    cache.write(KEY, entry(deps=((DOCS, bad),)))
    assert cache.read([Lookup(KEY)]) == [None]
    cache.invalidate("docs")
    store(cache)
    assert cache.read([Lookup(KEY)]) != [None]


def test_many_loops(cache: RedisCache) -> None:
    """Event loops come and go; each has its connection, which ends with it."""
    asyncio.run(cache.awrite(KEY, entry()))
    for _ in range(5):
        assert asyncio.run(cache.aread([Lookup(KEY)])) == [entry()]
    gc.collect()
    assert not cache._lines

    def in_a_thread(_: int) -> Any:
        return asyncio.run(cache.aread([Lookup(KEY)]))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(in_a_thread, range(8))) == [[entry()]] * 8


def test_closing_with_loops_around(redis_server: Server, prefix: str) -> None:
    """Connections of loops that stand still, run elsewhere, or are gone are all closed."""
    cache = RedisCache(redis_server.url, prefix=prefix)
    standing, gone = asyncio.new_event_loop(), asyncio.new_event_loop()
    running = asyncio.new_event_loop()
    thread = threading.Thread(target=running.run_forever)
    thread.start()
    for loop in (standing, gone):
        loop.run_until_complete(cache.awrite(KEY, entry()))
    asyncio.run_coroutine_threadsafe(cache.awrite(KEY, entry()), running).result(10)
    gone.run_until_complete(gone.shutdown_asyncgens())
    gone.close()
    cache.close()
    standing.run_until_complete(asyncio.sleep(0))
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0.01), running).result(10)
    running.call_soon_threadsafe(running.stop)
    thread.join()
    for loop in (standing, running):
        loop.close()
    assert not cache._lines


async def test_a_cancelled_reader_leaves_the_others_alone(cache: RedisCache) -> None:
    """Replies belong to whom they were meant for, whoever has left."""
    for key in keys(20):
        await cache.awrite(key, entry(key[1].encode()))
    for turn in range(20):
        tasks = [asyncio.create_task(cache.aread([Lookup(key)])) for key in keys(20)]
        for _ in range(turn % 5):
            await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert [e[0].payload for e in found[1::2]] == [str(i).encode() for i in range(1, 20, 2)]


async def test_the_loop_goes_on_while_much_is_read(cache: RedisCache) -> None:
    """Reading a thousand entries lets other tasks run after each few of them."""
    some = keys(1024)
    await asyncio.gather(*[cache.awrite(key, entry(b"x" * 2000)) for key in some])
    turns = 0

    async def tick() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    ticking = asyncio.create_task(tick())
    await asyncio.sleep(0)
    before = turns
    found = await cache.aread([Lookup(key) for key in some])
    ticking.cancel()
    assert None not in found
    # sixteen pieces are read, and then unpacked
    assert turns - before >= 2 * 15


class State(TypedDict, total=False):
    query: str
    numbers: Annotated[list[int], operator.add]


def fan_out(cache: Any) -> Any:
    """A graph whose superstep has 256 cached tasks."""

    async def work(state: Any) -> State:
        return {"numbers": [state["number"]]}

    builder = StateGraph(State)
    builder.add_node("work", work, cache_policy=CachePolicy(version=1, tags=["docs"]))
    builder.add_conditional_edges(
        START, lambda state: [Send("work", {"number": number}) for number in range(256)]
    )
    return builder.add_edge("work", END).compile(cache=cache)


async def test_a_fan_out_costs_a_few_round_trips(cache: RedisCache) -> None:
    """256 distinct hits of one superstep are looked up in at most 8 round trips."""
    graph = fan_out(cache)
    await graph.ainvoke({"query": "q"})
    before = cache.round_trips
    answer = await graph.ainvoke({"query": "q"})
    assert sorted(answer["numbers"]) == list(range(256))
    assert graph.perf.stats().nodes["work"].hits == 256
    assert cache.round_trips - before <= 8


async def test_plain_langgraph_graphs(cache: RedisCache) -> None:
    """LangGraph's own graphs and policies are served, sync and async."""
    runs: list[str] = []

    def node(state: State) -> State:
        runs.append(state["query"])
        return {"numbers": [len(runs)]}

    builder = langgraph.graph.StateGraph(State)
    builder.add_node("node", node, cache_policy=langgraph.types.CachePolicy(ttl=60))
    graph = builder.add_edge(START, "node").compile(cache=cache)
    assert await asyncio.to_thread(graph.invoke, {"query": "q"}) == await graph.ainvoke(
        {"query": "q"}
    )
    assert runs == ["q"]
    await graph.aclear_cache()
    await graph.ainvoke({"query": "q"})
    assert runs == ["q", "q"]


# -- whose keys it touches ------------------------------------------------------------------------


def test_times_to_live_are_the_servers(
    cache: RedisCache, redis_server: Server, prefix: str
) -> None:
    """Entries, tokens and leases leave by themselves; an entry for ever does not."""
    now = time.time()
    cache.write((("n",), "60"), Entry(b"", now, now + 60))
    cache.write((("n",), "ever"), Entry(b"", now))
    cache.tag_tokens([DOCS])
    cache.acquire(KEY)
    with redis_server.client() as client:
        left = sorted(client.ttl(name) for name in client.scan_iter(match=f"{prefix}:*"))
    took = time.time() - now
    assert left[0] == -1
    assert 9 - took <= left[1] <= 10
    assert 59 - took <= left[2] <= 60
    assert 29 * 86400 < left[3] <= 30 * 86400


def test_tokens_in_use_stay(cache: RedisCache, redis_server: Server, prefix: str) -> None:
    """A token that is asked for lives on, however old."""
    first = cache.tag_tokens([DOCS])
    for _ in range(3):
        redis_server.age(prefix, 20 * 86400)
        assert cache.tag_tokens([DOCS]) == first


def test_neighbours_are_left_alone(cache: RedisCache, redis_server: Server, prefix: str) -> None:
    """Clearing touches only keys of exactly this prefix and this library."""
    digest = "0" * 64
    others = [
        f"{prefix}",
        f"{prefix}:users",
        f"{prefix}:1:e2:{{mine}}",
        f"{prefix}:1:e2:{{{digest}}}:x",
        f"{prefix}:1:e:x:{{{digest}}}",
        f"{prefix}:1:x:{{{digest}}}",
        f"{prefix}:2:e2:{{{digest}}}",
        f"x{prefix}:1:e2:{{{digest}}}",
    ]
    with redis_server.client() as client:
        for name in others:
            client.set(name, "theirs")
        with RedisCache(redis_server.url, prefix=f"{prefix}:1:e") as neighbour:
            neighbour.write(KEY, entry(b"neighbour"))
            cache.write(KEY, entry())
            cache.tag_tokens([DOCS])
            cache.clear([KEY[0]])
            cache.clear()
            assert neighbour.read([Lookup(KEY)]) == [entry(b"neighbour")]
            assert cache.read([Lookup(KEY)]) == [None]
            neighbour.clear()
        assert client.mget(others) == [b"theirs"] * len(others)
        left = set(client.scan_iter(match=f"{prefix}:*"))
        assert left == {name.encode() for name in others if name.startswith(f"{prefix}:")}


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_clearing_does_not_block_the_server(own_server: Server, mode: str) -> None:
    """``KEYS`` would keep everybody waiting for as long as it takes to walk over all keys."""
    owned = (OWNED, "thread", "1")
    with RedisCache(own_server.url) as cache, own_server.client() as client:
        for namespaces in (None, [KEY[0]], [owned], [KEY[0], owned]):
            for key in (KEY, (owned, "k")):
                assert cache.write(key, entry())
            cache.clear(namespaces) if mode == "sync" else asyncio.run(cache.aclear(namespaces))
            left = cache.read([Lookup(key) for key in (KEY, (owned, "k"))])
            cleared = namespaces or [KEY[0], owned]
            assert [e is None for e in left] == [KEY[0] in cleared, owned in cleared]
        commands = client.info("commandstats")
    assert "cmdstat_scan" in commands
    assert "cmdstat_keys" not in commands


@pytest.mark.parametrize("kind", ["string", "short", "list", "similar", "later version"])
def test_what_is_not_ours_is_neither_served_nor_overwritten(
    cache: RedisCache, redis_server: Server, kind: str
) -> None:
    """Something else under an entry's own name is a miss, stays, and is counted."""
    assert cache.write(KEY, entry())
    with redis_server.client() as client:
        (name,) = client.scan_iter(match=f"{cache.prefix}:1:e*")
        client.delete(name)
        if kind == "list":
            client.rpush(name, "theirs")
        else:
            theirs = {
                "string": b"theirs",
                "short": b"1",
                "similar": b"\x08\0\0\0LGP-not-ours",
                "later version": b"\x08\0\0\0XYZ\x02...",
            }
            client.set(name, theirs[kind])
        before = client.dump(name)
        assert cache.read([Lookup(KEY)]) == [None]
        assert cache.write(KEY, entry()) is False
        assert client.dump(name) == before
    assert cache.stats().refused == 1


def test_a_foreign_lease_keeps_nobody_waiting(cache: RedisCache, redis_server: Server) -> None:
    """What has a lease's name but no time to live is none: an error, not a wait for ever."""
    lease = cache.acquire(KEY)
    assert lease is not None
    with redis_server.client() as client:
        (name,) = client.scan_iter(match=f"{cache.prefix}:1:l:*")
        client.set(name, "theirs")
        with pytest.raises(ValueError, match="not a lease"):
            cache.acquire(KEY)
        assert cache.write(KEY, entry())  # which gives a lease back, if that is what it is
        assert client.get(name) == b"theirs"


def test_an_acquisition_whose_answer_got_lost(cache: RedisCache) -> None:
    """Asking again with the same token is answered the same."""
    asking = cache._acquiring(KEY)
    commands = next(asking)
    assert isinstance(commands, list)
    assert cache._line.execute([*commands, *commands]) == [1, 1]
    assert cache.acquire(KEY) is None


def test_a_lease_granted_to_nobody(redis_server: Server, prefix: str, proxy: Proxy) -> None:
    """Who is cancelled while asking for a lease, as when a loop ends, keeps nobody waiting."""
    with (
        RedisCache(proxy.url, prefix=prefix, lease_seconds=60) as cache,
        RedisCache(redis_server.url, prefix=prefix) as other,
    ):

        async def main() -> None:
            await cache.aping()
            proxy.delay = 3.0
            before = cache.round_trips
            asking = asyncio.create_task(cache.aacquire(KEY))
            while cache.round_trips == before:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0)
            with redis_server.client() as client:
                # it has been asked for, which the network alone does not promise
                await auntil(lambda: client.keys(f"{prefix}:1:l:*") != [])
            assert not asking.done()
            proxy.delay = 0.0  # for what is asked from now on

        asyncio.run(main())
        free_again(other)


def test_a_release_is_not_interrupted(redis_server: Server, prefix: str, proxy: Proxy) -> None:
    """A lease is given back however often who does it is cancelled, which counts afterwards."""
    with (
        RedisCache(proxy.url, prefix=prefix, lease_seconds=60, timeout=5.0) as cache,
        RedisCache(redis_server.url, prefix=prefix) as other,
    ):

        async def main() -> None:
            lease = await cache.aacquire(KEY)
            assert lease is not None
            proxy.delay = 0.2
            before = cache.round_trips
            task = asyncio.create_task(Backend.of(cache).arelease(lease))
            await asyncio.sleep(0)
            while cache.round_trips == before:
                task.cancel()
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert [t for t in asyncio.all_tasks() if t is not asyncio.current_task()] == []

        asyncio.run(main())
        free_again(other)


def free_again(cache: RedisCache) -> None:
    deadline = time.monotonic() + 20
    while (lease := cache.acquire(KEY)) is None:
        assert time.monotonic() < deadline
        cache.pause(KEY, 0.1)
    # it stays whoever's it is now
    time.sleep(0.3)
    assert cache.renew(lease) is not None


# -- the tokens of tiers --------------------------------------------------------------------------


def known(tiers: TieredCache, *lookups: Lookup) -> None:
    """Wait until hits of the first tier cost no round trip."""
    deadline = time.monotonic() + 20
    server = tiers.tiers[-1]
    assert isinstance(server, RedisCache)
    while True:
        before = server.round_trips
        assert None not in tiers.read(list(lookups))
        if server.round_trips == before:
            return
        assert time.monotonic() < deadline, "it never came to know its tags"
        time.sleep(0.002)


@pytest.fixture
def tiers(redis_server: Server, prefix: str) -> Any:
    with TieredCache(MemoryCache(), RedisCache(redis_server.url, prefix=prefix)) as tiers:
        yield tiers


def store(cache: Any, payload: bytes = b"value") -> None:
    (token,) = cache.tag_tokens([DOCS])
    cache.write(KEY, entry(payload, deps=((DOCS, token),)))


def test_first_tier_hits_cost_no_round_trip(
    tiers: TieredCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once its tags are known, a hit asks nobody, sync or async."""
    # a busy machine may keep the listener from renewing it for longer than a view holds
    monkeypatch.setattr("langgraph_perf.caches._redis_view.VIEW_SECONDS", 10.0)
    store(tiers)
    known(tiers, Lookup(KEY, (DOCS,)))
    found = [tiers.read([Lookup(KEY, (DOCS,))])[0] for _ in range(100)]
    assert found.count(None) == 0

    async def hits() -> int:
        server = tiers.tiers[-1]
        await tiers.aread([Lookup(KEY)])
        before = server.round_trips  # type: ignore[attr-defined]
        for _ in range(10):
            await tiers.aread([Lookup(KEY)])
        return int(server.round_trips - before)  # type: ignore[attr-defined]

    known(tiers, Lookup(KEY, (DOCS,)))
    assert asyncio.run(hits()) <= 1


@pytest.mark.parametrize("how", ["invalidate", "clear one", "clear all", "delete"])
def test_known_tokens_are_forgotten(
    tiers: TieredCache, cache: RedisCache, redis_server: Server, how: str
) -> None:
    """Whoever changes a token, once it has returned no first tier serves what depended on it."""
    for turn in range(5):
        store(tiers, str(turn).encode())
        known(tiers, Lookup(KEY))
        if how == "invalidate":
            cache.invalidate("docs")
        elif how == "clear one":
            cache.clear([KEY[0]])
        elif how == "clear all":
            cache.clear()
        else:
            # by hand: nobody waits for the views, but they hear of it
            with redis_server.client() as client:
                client.delete(*client.scan_iter(match=f"{cache.prefix}:1:t:*"))
            deadline = time.monotonic() + 10
            while tiers.read([Lookup(KEY)]) != [None]:
                assert time.monotonic() < deadline
        assert tiers.read([Lookup(KEY)]) == [None]


def test_a_flushed_server(own_server: Server) -> None:
    """When somebody empties the server, first tiers hear of it."""
    with TieredCache(MemoryCache(), RedisCache(own_server.url)) as tiers:
        store(tiers)
        known(tiers, Lookup(KEY))
        with own_server.client() as client:
            client.flushall()
        deadline = time.monotonic() + 10
        while tiers.read([Lookup(KEY)]) != [None]:
            assert time.monotonic() < deadline
        store(tiers)
        known(tiers, Lookup(KEY))


def test_a_server_that_tells_nothing(
    own_server: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where channels are forbidden, tiers ask, waiting polls, nothing fails; that is told once."""
    monkeypatch.setattr(_redis_listener, "_PAUSE_WHEN_REFUSED", 0.01)
    caplog.set_level(logging.DEBUG, "langgraph_perf")
    with own_server.client() as client:
        client.execute_command("ACL SETUSER limited on >pw ~* +@all -subscribe -publish -pubsub")
    url = f"redis://limited:pw@127.0.0.1:{own_server.port}/0"
    with RedisCache(url) as other, TieredCache(MemoryCache(), RedisCache(url)) as tiers:
        for turn in range(3):
            store(tiers, str(turn).encode())
            for _ in range(3):
                assert tiers.read([Lookup(KEY)])[0] is not None
            other.invalidate("docs")
            assert tiers.read([Lookup(KEY)]) == [None]
        lease = other.acquire(KEY)
        tiers.pause(KEY, 1.0)
        other.write(KEY, entry(b"done"), lease)
        assert other.read([Lookup(KEY)]) == [entry(b"done")]
        deadline = time.monotonic() + 60
        while caplog.text.count("Redis tells nothing unasked") < 4:
            assert time.monotonic() < deadline
            tiers.read([Lookup(KEY)])
    refused = [record for record in caplog.records if "unasked" in record.message]
    told = [record for record in refused if record.levelno == logging.WARNING]
    assert len(told) == len({record.thread for record in refused}) <= 2


async def test_what_was_stored_past_the_tiers_costs_a_few_round_trips(
    cache: RedisCache, tiers: TieredCache
) -> None:
    """A cold first tier in front of another program's entries is filled in a few round trips."""
    for key in keys(256):
        cache.write(key, entry(key[1].encode()))
    server = tiers.tiers[-1]
    assert isinstance(server, RedisCache)
    await server.aping()
    before = server.round_trips
    backend = Backend.of(tiers)
    found = await asyncio.gather(*[backend.aread(Lookup(key)) for key in keys(256)])
    assert [e and e.payload for e in found] == [key[1].encode() for key in keys(256)]
    assert server.round_trips - before <= 8


def test_what_was_stored_past_the_tiers_costs_one_look(
    cache: RedisCache, tiers: TieredCache
) -> None:
    """The token of a namespace is asked for once, and again after it has changed."""
    for key in keys(3):
        cache.write(key, entry(b"old"))
    server = tiers.tiers[-1]
    assert isinstance(server, RedisCache)
    tiers.read([Lookup(keys(1)[0])])
    before = server.round_trips
    for key in keys(3)[1:]:
        assert tiers.read([Lookup(key)])[0] is not None
    assert server.round_trips - before == 2
    cache.clear([("n",)])
    for key in keys(3):
        assert tiers.read([Lookup(key)]) == [None]
        cache.write(key, entry(b"new"))
    for key in keys(3):
        known(tiers, Lookup(key))
        (found,) = tiers.read([Lookup(key)])
        assert found is not None
        assert found.payload == b"new"


def test_a_token_from_after_a_read_is_not_taken(cache: RedisCache, tiers: TieredCache) -> None:
    """What was read before a clear is not served after it, although another reader has learnt the
    new token meanwhile."""
    cache.write(KEY, entry(b"old"))
    other = (KEY[0], "other")
    reading = tiers._reading([Lookup(KEY)])
    step = next(reading)
    while step.operation != "read":
        step = reading.send(getattr(step.cache, step.operation)(*step.args))
    old = step.cache.read(*step.args)
    cache.clear([KEY[0]])
    cache.write(other, entry(b"other"))
    assert tiers.read([Lookup(other)])[0] is not None
    step = reading.send(old)
    with suppress(StopIteration):
        while True:
            step = reading.send(getattr(step.cache, step.operation)(*step.args))
    assert tiers.read([Lookup(KEY)]) == [None]


def test_own_invalidations_count_at_once(
    tiers: TieredCache, redis_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone with the server, an invalidation need not wait, and counts from its return."""
    # what it would wait, told apart from what a busy machine takes
    monkeypatch.setattr("langgraph_perf.caches._redis_steps.VIEW_SECONDS", 10.0)
    with redis_server.client() as client:
        # one that is younger may have forgotten views in a crash
        until(lambda: client.info("server")["uptime_in_seconds"] > 1)
    for turn in range(20):
        store(tiers, str(turn).encode())
        known(tiers, Lookup(KEY))
        started = time.monotonic()
        tiers.invalidate("docs")
        assert time.monotonic() - started < 10.0
        assert tiers.read([Lookup(KEY)]) == [None]


def test_a_cut_view_serves_nothing(redis_server: Server, proxy: Proxy, prefix: str) -> None:
    """While nothing can be heard, no token is known; what changed meanwhile counts afterwards."""
    quick = RedisCache(proxy.url, prefix=prefix)
    with TieredCache(MemoryCache(), quick) as tiers:
        store(tiers)
        known(tiers, Lookup(KEY))
        quick.timeout = 1.0  # only now: a busy machine may take longer for what is to be in time
        proxy.deaf = True
        with RedisCache(redis_server.url, prefix=prefix) as other:
            other.invalidate("docs")  # waits for the view, which cannot hear it, to end
            assert tiers.read([Lookup(KEY)]) == [None]
            proxy.deaf = False
            proxy.reset()
            quick.timeout = 20.0
            assert tiers.read([Lookup(KEY)]) == [None]
            store(other, b"new")
        deadline = time.monotonic() + 20
        while tiers.read([Lookup(KEY)])[0] is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
            for tier in tiers._tiers:
                ask_again(tier)
        known(tiers, Lookup(KEY))
        assert tiers.read([Lookup(KEY)])[0].payload == b"new"  # type: ignore[union-attr]


@pytest.mark.parametrize("how", ["hangs", "breaks"])
def test_a_new_connection_brings_no_old_tokens_back(
    redis_server: Server, proxy: Proxy, prefix: str, how: str
) -> None:
    """What changed while the listener's connection was lost is not served after it has another one,
    although nobody has asked for its tags since."""
    last = RedisCache(proxy.url, prefix=prefix)
    other_key = (KEY[0], "other")
    with (
        TieredCache(MemoryCache(), last) as tiers,
        RedisCache(redis_server.url, prefix=prefix) as other,
    ):
        store(tiers)
        tiers.write(other_key, entry(b"other"))
        known(tiers, Lookup(KEY), Lookup(other_key))
        proxy.deaf = True
        if how == "breaks":
            proxy.reset()
        other.invalidate("docs")
        proxy.deaf = False
        proxy.reset()

        def warm() -> bool:
            for tier in tiers._tiers:
                ask_again(tier)
            before = last.round_trips
            return tiers.read([Lookup(other_key)]) != [None] and last.round_trips == before

        until(warm)
        assert tiers.read([Lookup(KEY)]) == [None]


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_view_outlives_its_connection(own_server: Server, prefix: str, mode: str) -> None:
    """Who does not know that the server dropped its connection serves nothing old either."""
    proxy = Proxy(own_server.port)
    with (
        RedisCache(own_server.url, prefix=prefix) as other,
        own_server.client() as client,
    ):
        for turn in range(5):
            proxy.keeps = False
            with TieredCache(MemoryCache(), RedisCache(proxy.url, prefix=prefix)) as tiers:
                store(other, str(turn).encode())
                known(tiers, Lookup(KEY))
                proxy.keeps = True
                client.client_kill_filter(_type="pubsub")
                if mode == "sync":
                    other.invalidate("docs")
                else:
                    asyncio.run(other.ainvalidate("docs"))
                assert tiers.read([Lookup(KEY)]) == [None]
                proxy.keeps = False
                proxy.reset()
    proxy.close()


def test_a_restarted_server_may_have_forgotten_views(own_server: Server, prefix: str) -> None:
    """Just after a restart an invalidation waits, as those who kept a view might not know."""
    with TieredCache(MemoryCache(), RedisCache(own_server.url, prefix=prefix)) as tiers:
        store(tiers)
        known(tiers, Lookup(KEY))
        # it says so for a second at least, which a busy machine may miss
        for _ in range(10):
            own_server.send(signal.SIGKILL)
            own_server.start()
            with RedisCache(own_server.url, prefix=prefix) as other, own_server.client() as client:
                started = time.monotonic()
                other.invalidate("docs")
                took = time.monotonic() - started
                if client.info("server")["uptime_in_seconds"] <= 1:
                    break
        assert took >= 0.05


def test_what_changes_while_it_is_asked_for_is_not_remembered(
    tiers: TieredCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token read before a change and answered after it is not taken for the current one."""
    # a busy machine may keep the listener from renewing it for longer than a view holds
    monkeypatch.setattr("langgraph_perf.caches._redis_view.VIEW_SECONDS", 10.0)
    store(tiers)
    known(tiers, Lookup(KEY))
    server = tiers.tiers[-1]
    assert isinstance(server, RedisCache)
    asking = server._peeking_tags([DOCS])
    commands = next(asking)
    replies = server._line.execute(commands)
    (token,) = server.tag_tokens([DOCS])
    assert server.knows([(DOCS, token)])
    server.invalidate("docs")
    with pytest.raises(StopIteration):
        asking.send(replies)
    assert not server.knows([(DOCS, token)])
    assert tiers.read([Lookup(KEY)]) == [None]


def test_the_listener_ends_with_its_cache(redis_server: Server, prefix: str) -> None:
    """Closed or forgotten, a cache leaves no thread behind."""

    before = set(threading.enumerate())  # of other tests, which may end meanwhile

    def listeners() -> int:
        threads = set(threading.enumerate()) - before
        return len([thread for thread in threads if thread.name == "langgraph-perf-redis"])

    tiers = TieredCache(MemoryCache(), RedisCache(redis_server.url, prefix=prefix))
    store(tiers)
    known(tiers, Lookup(KEY))
    assert listeners() == 1
    tiers.close()
    assert listeners() == 0
    tiers = TieredCache(MemoryCache(), RedisCache(redis_server.url, prefix=prefix))
    store(tiers)
    known(tiers, Lookup(KEY))
    del tiers
    gc.collect()
    until(lambda: listeners() == 0)  # another thread may have collected it, or it itself


# -- waiting for another's result -----------------------------------------------------------------


@pytest.mark.parametrize("key", [KEY, ((OWNED, "thread", "1"), "key")])
@pytest.mark.parametrize("how", ["write", "newer write", "release", "expire"])
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_who_waits_is_woken(
    cache: RedisCache,
    redis_server: Server,
    prefix: str,
    how: str,
    mode: str,
    key: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A pause ends when the lease is given back, with or without a result, and not when it would
    have ended anyway."""
    # however long a busy machine takes until the server tells
    monkeypatch.setattr("langgraph_perf.caches.redis._POLL", 10.0)
    cache.lease_seconds = 1.5 if how == "expire" else 100
    lease = cache.acquire(key)
    assert lease is not None
    with RedisCache(redis_server.url, prefix=prefix) as other, ThreadPoolExecutor(1) as pool:

        def wait() -> float:
            if mode == "sync":
                other.pause(key, 60.0)
            else:
                asyncio.run(other.apause(key, 60.0))
            return time.monotonic()

        waiting = pool.submit(wait)
        if how != "expire":  # before a busy machine gets that far it may have, which is as well
            subscribed(redis_server, prefix)
        started = time.monotonic()
        if how == "write":
            cache.write(key, entry(), lease)
        elif how == "newer write":
            cache.write(key, entry())
        elif how == "release":
            cache.release(lease)
        assert waiting.result(60) - started < 20.0


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_who_waits_does_not_look_again(
    cache: RedisCache,
    redis_server: Server,
    prefix: str,
    mode: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A pause lasts until there is word, and asks the server nothing after its first look."""
    # however long a busy machine takes until the server tells
    monkeypatch.setattr("langgraph_perf.caches.redis._POLL", 10.0)
    lease = cache.acquire(KEY)
    assert lease is not None
    with RedisCache(redis_server.url, prefix=prefix) as other, ThreadPoolExecutor(1) as pool:
        if mode == "sync":
            waiting = pool.submit(other.pause, KEY, 20.0)
        else:
            waiting = pool.submit(lambda: asyncio.run(other.apause(KEY, 20.0)))
        until(lambda: other.round_trips > 0 or waiting.done())
        started = time.monotonic()
        until(lambda: waiting.done() or time.monotonic() - started > 0.5)
        assert not waiting.done()
        assert other.round_trips == 1
        cache.release(lease)
        waiting.result(10)
        assert other.round_trips == 1


def subscribed(server: Server, prefix: str) -> None:
    """Wait until somebody waits for a lease."""
    deadline = time.monotonic() + 10
    with server.client() as client:
        while not client.pubsub_channels(f"{prefix}:1:w:*"):
            assert time.monotonic() < deadline


def test_a_pause_without_a_holder_ends_at_once(cache: RedisCache) -> None:
    """What was given back before anybody could wait is not waited for."""
    started = time.monotonic()
    cache.pause(KEY, 20.0)
    asyncio.run(cache.apause(KEY, 20.0))
    assert time.monotonic() - started < 5.0


# -- what the server says -------------------------------------------------------------------------


def test_messages_in_pieces() -> None:
    """RESP3 is understood however it is cut."""
    stream = (
        b"%1\r\n$6\r\nserver\r\n$6\r\nvalkey\r\n+OK\r\n:42\r\n_\r\n$-1\r\n"
        b">2\r\n$10\r\ninvalidate\r\n*2\r\n$1\r\na\r\n$3\r\nb\r\n\r\n"
        b">2\r\n$10\r\ninvalidate\r\n_\r\n-ERR no\r\n"
    )
    whole = list(Buffer().feed(stream))
    assert whole[:5] == [[b"server", b"valkey"], b"OK", b"42", None, None]
    assert isinstance(whole[5], Report)
    assert whole[5] == [b"invalidate", [b"a", b"b\r\n"]]
    assert whole[6] == [b"invalidate", None]
    assert isinstance(whole[7], Exception)
    for size in (1, 2, 3, 7, 50):
        buffer = Buffer()
        pieces = [stream[at : at + size] for at in range(0, len(stream), size)]
        messages = [message for piece in pieces for message in buffer.feed(piece)]
        assert messages[:7] == whole[:7]
        assert len(messages) == 8
