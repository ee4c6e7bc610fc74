"""Ask the knowledge base cold, warm and in a new process; change its data; show what was saved.

Run it from the checkout: ``python -m examples.knowledge_base --help``.
"""

from __future__ import annotations

import argparse
import io
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from examples.knowledge_base import databases, models, redis_server
from examples.knowledge_base.databases import DatabaseError
from examples.knowledge_base.documents import knowledge_base
from examples.knowledge_base.graph import NODES, Context, build_graph
from examples.knowledge_base.models import (
    LOCAL_MODEL,
    MODEL_TYPES,
    ChatModel,
    Embedder,
    Endpoint,
    LocalModel,
    ModelError,
)
from examples.knowledge_base.report import (
    Pass,
    Progress,
    Tally,
    leased,
    nodes_table,
    passes_table,
    processes_table,
    resources_table,
    tallies,
    total,
)
from langgraph_perf import DiskCache, Keyed, LangGraphPerfError, MemoryCache, Shared, TieredCache
from langgraph_perf.caches.base import Cache
from langgraph_perf.resources import Resource

QUESTIONS = [
    "What does the with statement do?",
    "How can I catch an exception?",
    "What is a lambda expression?",
    "When are default parameter values evaluated?",
]
USERS = ["alice", "bob"]
CHECKOUT = Path(__file__).resolve().parents[2]
DSN_VARIABLE = "KNOWLEDGE_BASE_POSTGRES"
REDIS_VARIABLE = "KNOWLEDGE_BASE_REDIS"
PATIENCE = 10.0
"""Seconds to wait for a stored answer: a model takes longer on a machine that is that busy."""


class Asker:
    """Asks the graph questions, measures, and shows progress.

    Args:
        graph: see ``build_graph``.
        progress: where to show it.
        model: the name of the language model.

    Attributes:
        graph: what it asks.
        quoted: ids of the documents that answers quoted, in order.
    """

    def __init__(self, graph: Any, progress: Progress, model: str = "") -> None:
        self.quoted: list[str] = []
        self._model = model
        self.graph = graph
        self._progress = progress

    def ask_all(self, name: str, questions: list[str], users: list[str]) -> Pass:
        """Ask every question for every user."""
        done = Pass(name)
        leases, loads = leased(self.graph.perf.stats())
        self._progress.line(f"\n{name}")
        for question in questions:
            for user in users:
                done.answers += 1
                label = f"  {done.answers}/{len(questions) * len(users)} {user}: {question}"
                began = time.perf_counter()
                answer, nodes = self._ask(question, user, label)
                seconds = time.perf_counter() - began
                done.seconds += seconds
                done.nodes = {n: done.nodes.get(n, Tally()) + nodes[n] for n in nodes}
                ran = ", ".join(n for n in NODES if nodes[n].runs) or "nothing"
                self._progress.line(f"{label}  {seconds:.3f} s, ran {ran}")
                if nodes["generate"].runs:
                    self._progress.line(f"      {answer}")
        more_leases, more_loads = leased(self.graph.perf.stats())
        done.leases, done.loads = more_leases - leases, more_loads - loads
        if not done.leases:
            self._progress.line("  all from the cache: nothing was leased, nothing was loaded")
        return done

    def _ask(self, question: str, user: str, label: str) -> tuple[str, dict[str, Tally]]:
        before = self.graph.perf.stats()
        times: dict[str, float] = {}
        state: dict[str, Any] = {}
        for mode, event in self.graph.stream(
            {"query": question, "user_id": user},
            context=Context(user, self._model),
            stream_mode=["tasks", "values"],
        ):
            if mode == "values":
                state = event
            elif "input" in event:  # a node starts
                self._progress.status(f"{label}  {event['name']} ...")
                times[event["name"]] = time.perf_counter()
            else:
                times[event["name"]] = time.perf_counter() - times[event["name"]]
        nodes = tallies(before, self.graph.perf.stats())
        for name, seconds in times.items():
            if nodes[name].hits:
                nodes[name].hit_time = seconds
        self.quoted += [doc.id for doc in state["passages"]]
        return " ".join(state["answer"].text.split()), nodes


def run(args: argparse.Namespace, progress: Progress) -> None:
    """The whole job. A child process (``--child``) only asks, and prints what it measured."""
    with ExitStack() as stack:
        stack.enter_context(progress.log(models.logger))
        stack.enter_context(progress.log(databases.logger))
        cache = stack.enter_context(opened_cache(args))
        db = stack.enter_context(database(args))
        resources: dict[str, Resource[Any]] = {
            "db": db,
            "embedder": Shared(Embedder, max_idle=300),
            "models": Keyed(loader(args), max_size=args.max_models, close=ChatModel.close),
        }
        graph = build_graph(cache, resources)
        stack.callback(graph.perf.close)
        asker = Asker(graph, progress, args.model)

        def ask(name: str) -> Pass:
            return asker.ask_all(name, args.questions, args.user)

        if args.child:
            for line in sys.stdin:
                print(ask(line.strip()).to_json(), flush=True)
            return
        with db.lease() as connection:
            if knowledge_base(connection).seed():
                cache.clear()  # whatever it holds was made from data that are gone

        # they will be needed, and loading them is not part of what the cache saves
        with resources["embedder"].lease():
            pass
        for model_type in list(MODEL_TYPES)[: args.max_models]:
            with resources["models"].lease(model_type):
                pass

        passes = [ask("first time")]
        stored = passes[0].answers - passes[0].nodes["generate"].runs
        if stored:
            progress.line(f"  not cold: {stored} answers were stored (--fresh starts anew)")
        passes.append(ask("again"))
        progress.line("\nnew process, on the same cache ...")
        with Child(args) as child:
            passes.append(child.ask("new process"))

        # data first, tag second: a node that reads in between stores nothing that is served later
        for edited in asker.quoted[:1]:  # none if no question matched any document
            with db.lease() as connection:
                knowledge_base(connection).edit(edited)
            cache.invalidate("docs")
            passes.append(ask(f"after an edit of document {edited!r}"))

        user = args.user[-1]
        with db.lease() as connection:
            documents = knowledge_base(connection)
            style = "brief" if documents.profile(user).style == "detailed" else "detailed"
            documents.set_style(user, style)
        cache.invalidate(f"user:{user}")
        passes.append(ask(f"after {user} asked for {style} answers"))

        tables = (
            passes_table(passes),
            nodes_table(total(passes)),
            resources_table(graph.perf.stats().resources),
        )
        for line in (line for table in tables for line in ["", *table]):
            progress.line(line)

        if args.redis is not None:

            def edit() -> None:
                with db.lease() as connection:
                    knowledge_base(connection).edit(asker.quoted[0])
                cache.invalidate("docs")

            three_processes(args, asker, edit if asker.quoted else lambda: None, progress)


def three_processes(
    args: argparse.Namespace, asker: Asker, edit: Callable[[], None], progress: Progress
) -> None:
    """This process and two others, each with a memory tier of its own, on one Redis."""
    progress.line("\nthree processes, each with a memory tier of its own, share one Redis ...")
    with Child(args) as second, Child(args) as third, ThreadPoolExecutor(3) as pool:

        def ask(title: str) -> None:
            quiet = Asker(asker.graph, Progress(io.StringIO()), args.model)
            asked = [
                pool.submit(quiet.ask_all, title, args.questions, args.user),
                pool.submit(second.ask, title),
                pool.submit(third.ask, title),
            ]
            for line in ["", *processes_table(title, [pass_.result() for pass_ in asked])]:
                progress.line(line)

        ask("all ask what Redis knows")
        ask("again: from their own memory")
        edit()
        progress.line(
            "\nwhat the edit outdated runs once more, in one of the three; the others wait for it,"
            "\nand a process that runs a node for the first time loads its models before ..."
        )
        ask("after one has edited a document and invalidated 'docs'")
        ask("again")


@contextmanager
def opened_cache(args: argparse.Namespace) -> Iterator[Cache]:
    """Where results are kept: in a directory, or with ``--redis`` in Redis behind memory."""
    with ExitStack() as stack:
        if args.redis is None:
            yield stack.enter_context(DiskCache(args.cache_dir, timeout=PATIENCE))
            return
        try:
            from langgraph_perf import RedisCache
        except ImportError as exc:
            raise DatabaseError(str(exc)) from exc
        if not args.redis:
            args.redis = stack.enter_context(redis_server.private_redis())
        redis = RedisCache(
            args.redis, prefix="knowledge_base", timeout=PATIENCE, connect_timeout=PATIENCE
        )
        redis.ping()
        yield stack.enter_context(TieredCache(MemoryCache(), redis))


@contextmanager
def database(args: argparse.Namespace) -> Iterator[Resource[Any]]:
    """The resource ``db``: connections to what ``--postgres`` names, or to a SQLite file."""
    if args.postgres is None:
        yield databases.sqlite(args.data_dir / "knowledge.db", fresh=args.fresh)
        return
    with ExitStack() as stack:
        if not args.postgres:
            server = databases.private_postgres(args.data_dir / "postgres")
            args.postgres = stack.enter_context(server)
        yield stack.enter_context(databases.postgres(args.postgres, fresh=args.fresh))


def loader(args: argparse.Namespace) -> Callable[[str], ChatModel]:
    """What loads a language model of a type: here, or by pointing to the endpoint given."""
    if args.base_url is None:
        return LocalModel.load
    endpoint = Endpoint(args.base_url, args.api_key)
    return lambda model_type: ChatModel(model=args.model, endpoint=endpoint)


class Child:
    """A process of its own that asks everything again whenever it is told to."""

    def __init__(self, args: argparse.Namespace) -> None:
        command = [
            sys.executable,
            "-m",
            "examples.knowledge_base",
            "--child",
            "--model",
            args.model,
        ]
        command += [f"--cache-dir={args.cache_dir}", f"--data-dir={args.data_dir}"]
        command += [f"--question={question}" for question in args.questions]
        command += [f"--user={user}" for user in args.user]
        command.append(f"--max-models={args.max_models}")
        # addresses may hold passwords: not on the command line, which every user can read
        env = dict(os.environ)
        if args.postgres is not None:
            command.append("--postgres")
            env[DSN_VARIABLE] = args.postgres
        if args.redis is not None:
            command.append("--redis")
            env[REDIS_VARIABLE] = args.redis
        if args.base_url is not None:
            env |= {"OPENAI_BASE_URL": args.base_url, "OPENAI_API_KEY": args.api_key}
        self._process = subprocess.Popen(
            command, cwd=CHECKOUT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, name: str) -> Pass:
        """Ask everything.

        Raises:
            ModelError: it failed; its message went to standard error.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(f"{name}\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise ModelError("the new process failed")
        return Pass.from_json(answer)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exc_info: object) -> None:
        with suppress(BrokenPipeError):
            self._process.communicate()


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; exits with a message when it is wrong."""
    parser = argparse.ArgumentParser(prog="python -m examples.knowledge_base", description=__doc__)
    parser.add_argument("--cache-dir", type=Path, metavar="DIR", help="where results are cached")
    parser.add_argument(
        "--data-dir", type=Path, default=Path(".cache/knowledge_base_data"), metavar="DIR"
    )
    parser.add_argument("--fresh", action="store_true", help="forget cached results and data first")
    parser.add_argument(
        "--base-url",
        default=os.environ.get("OPENAI_BASE_URL"),
        help="an OpenAI-compatible endpoint, up to and including /v1 (default: $OPENAI_BASE_URL,"
        " else a small model in this process)",
    )
    parser.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY", ""))
    parser.add_argument("--model", default=os.environ.get("OPENAI_MODEL"))
    parser.add_argument(
        "--max-models", type=int, default=2, metavar="N", help="language models in memory at most"
    )
    parser.add_argument(
        "--postgres",
        nargs="?",
        const=os.environ.get(DSN_VARIABLE, ""),
        metavar="DSN",
        help="keep the documents in PostgreSQL instead of SQLite, in a schema of its own (default"
        f" DSN: ${DSN_VARIABLE}, else a private server that is started for it)",
    )
    parser.add_argument(
        "--redis",
        nargs="?",
        const=os.environ.get(REDIS_VARIABLE, ""),
        metavar="URL",
        help="keep results in Redis or Valkey, behind a memory tier, instead of in --cache-dir"
        f" (default URL: ${REDIS_VARIABLE}, else a private server that is started for it)",
    )
    parser.add_argument("--questions", type=Path, metavar="FILE", help="one question per line")
    parser.add_argument("--question", action="append", help="a question; may be repeated")
    parser.add_argument("--user", action="append", help="who asks; may be repeated")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)

    if args.base_url is None:
        args.model = LOCAL_MODEL
    elif not args.base_url.startswith(("http://", "https://")):
        parser.error(f"--base-url: got {args.base_url!r}; accepted: an http:// or https:// address")
    elif not args.model:
        parser.error("--model (or OPENAI_MODEL) is needed with --base-url")
    if args.max_models < 1:
        parser.error(f"--max-models: got {args.max_models}; accepted: a number of at least 1")
    asked = args.question or []
    if args.questions is not None:
        try:
            lines = args.questions.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as exc:
            parser.error(f"--questions: {exc}")
        asked = asked + [line.strip() for line in lines if line.strip()]
        if not asked:
            parser.error(f"--questions: {args.questions} holds no question")
    args.questions = asked or QUESTIONS
    args.user = args.user or USERS
    if args.cache_dir is None:
        # results from one database are none from the other
        name = "knowledge_base" if args.postgres is None else "knowledge_base_postgres"
        args.cache_dir = Path(".cache", name)
    args.cache_dir, args.data_dir = args.cache_dir.resolve(), args.data_dir.resolve()
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the job; returns the exit code."""
    args = parse(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model may answer in any script
    # a child's standard output carries its measurements and nothing else
    progress = Progress(io.StringIO() if args.child else sys.stdout)
    try:
        run(args, progress)
    except KeyboardInterrupt:
        progress.line("interrupted")
        return 130
    except (ModelError, DatabaseError, LangGraphPerfError, OSError, sqlite3.Error) as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
