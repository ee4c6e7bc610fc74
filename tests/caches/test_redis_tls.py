"""RedisCache over TLS: a real handshake, sync and async, and what ``ping`` says when it fails."""

from __future__ import annotations

import asyncio
import select
import socket
import ssl
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import redis
import redis.asyncio

from langgraph_perf import ConfigurationError, MemoryCache, RedisCache, TieredCache
from langgraph_perf.caches._redis_connect import Source, unusable
from langgraph_perf.caches.base import Lookup
from langgraph_perf.testing import KEY, entry
from tests.redis_server import Server, new_prefix

from .test_redis import check_both_ways, known, store

CERTIFICATE = Path(__file__).resolve().parents[1] / "localhost.pem"
"""It and its key; how they were made is said there."""


def take_off(near: socket.socket, far: socket.socket, context: ssl.SSLContext) -> None:
    """Hand on what comes over TLS from ``near`` without it to ``far``, and back, until one ends."""
    with suppress(OSError), far, near, context.wrap_socket(near, server_side=True) as tls:
        while True:
            ready = [tls] if tls.pending() else select.select([tls, far], [], [])[0]
            for source in ready:
                data = source.recv(65536)
                if not data:
                    return
                (far if source is tls else tls).sendall(data)


@pytest.fixture
def port(redis_server: Server) -> Iterator[int]:
    """Where the shared server is reached with TLS only."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)
    threads: list[threading.Thread] = []
    to = ("127.0.0.1", redis_server.port)

    def accept() -> None:
        with suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(to)
                threads.append(threading.Thread(target=take_off, args=(near, far, context)))
                threads[-1].start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        accepting = threading.Thread(target=accept)
        accepting.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        accepting.join(20)
    # what was connected is closed by now
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()


@pytest.mark.parametrize("kind", ["url", "client", "async client"])
async def test_tls(port: int, kind: str) -> None:
    """A URL and clients of both kinds connect, blocking and awaiting, and large values pass."""
    given: Any = f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={CERTIFICATE}"
    if kind != "url":
        given = (redis if kind == "client" else redis.asyncio).Redis.from_url(given)
    prefix = new_prefix()
    await check_both_ways(given, prefix)
    large = entry(b"x" * 3_000_000)
    cache = RedisCache(given, prefix=prefix, timeout=10.0)
    await asyncio.to_thread(cache.ping)
    await cache.aping()
    assert await cache.awrite(KEY, large)
    assert await asyncio.to_thread(cache.read, [Lookup(KEY)]) == [large]
    assert await cache.aread([Lookup(KEY)]) == [large]
    await cache.aclose()


def test_what_the_server_says_unasked_comes_over_tls(redis_server: Server, port: int) -> None:
    """Tiers know their tags without asking, and hear of what others invalidate."""
    url, prefix = f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={CERTIFICATE}", new_prefix()
    with (
        RedisCache(redis_server.url, prefix=prefix) as other,
        TieredCache(MemoryCache(), RedisCache(url, prefix=prefix)) as tiers,
    ):
        for turn in range(5):
            store(tiers, str(turn).encode())
            known(tiers, Lookup(KEY))
            other.invalidate("docs")
            assert tiers.read([Lookup(KEY)]) == [None]


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_ping_says_that_nobody_known_signed_the_certificate(port: int, mode: str) -> None:
    """The error names the server and the reason, and shows no password."""
    with (
        RedisCache(f"rediss://:s3cret@127.0.0.1:{port}/0") as cache,
        pytest.raises(ConfigurationError) as caught,
    ):
        cache.ping() if mode == "sync" else asyncio.run(cache.aping())
    assert f"127.0.0.1:{port}, database 0 cannot be used" in str(caught.value)
    assert "certificate verify failed" in str(caught.value)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("end", ["closes", "resets"])
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_ping_says_that_the_server_may_speak_tls(mode: str, end: str) -> None:
    """One that does not understand ends the connection, politely or not."""

    def refuse() -> None:
        with suppress(OSError):
            while True:
                near, _ = listener.accept()
                with near:
                    near.recv(100)
                    if end == "resets":
                        linger = struct.pack("ii", 1, 0)
                        near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        refusing = threading.Thread(target=refuse)
        refusing.start()
        with (
            RedisCache(f"redis://127.0.0.1:{listener.getsockname()[1]}") as cache,
            pytest.raises(ConfigurationError, match="rediss://"),
        ):
            cache.ping() if mode == "sync" else asyncio.run(cache.aping())
        listener.shutdown(socket.SHUT_RDWR)
        refusing.join(20)


@pytest.mark.parametrize(
    "said",
    [
        "Connection closed by server.",
        "Connection lost",
        "Error while reading from 127.0.0.1:1 : (104, 'Connection reset by peer')",
        "Error 32 while writing to socket. Broken pipe.",
    ],
)
def test_however_a_connection_ends_tls_may_be_why(said: str) -> None:
    """What is said depends on what we were doing when the server hung up."""
    source = Source("redis://127.0.0.1:1", 1, 1)
    assert "rediss://" in unusable(source, redis.ConnectionError(said))
    assert "rediss://" not in unusable(source, redis.ConnectionError("Connection refused"))
