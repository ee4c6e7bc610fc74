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
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

from examples.knowledge_base import models
from examples.knowledge_base.documents import KnowledgeBase
from examples.knowledge_base.graph import NODES, Context, build_graph
from examples.knowledge_base.models import ChatModel, Embedder, Endpoint, LocalServer, ModelError
from examples.knowledge_base.report import (
    Pass,
    Progress,
    Tally,
    nodes_table,
    passes_table,
    tallies,
    total,
)
from langgraph_perf import DiskCache, LangGraphPerfError

QUESTIONS = [
    "What does the with statement do?",
    "How can I catch an exception?",
    "What is a lambda expression?",
    "When are default parameter values evaluated?",
]
USERS = ["alice", "bob"]
CHECKOUT = Path(__file__).resolve().parents[2]


class Asker:
    """Asks the graph questions, measures, and shows progress.

    Attributes:
        quoted: ids of the documents that answers quoted, in order.
    """

    def __init__(self, graph: Any, progress: Progress) -> None:
        self.quoted: list[str] = []
        self._graph = graph
        self._progress = progress

    def ask_all(self, name: str, questions: list[str], users: list[str]) -> Pass:
        """Ask every question for every user."""
        done = Pass(name)
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
        return done

    def _ask(self, question: str, user: str, label: str) -> tuple[str, dict[str, Tally]]:
        before = self._graph.perf.stats()
        times: dict[str, float] = {}
        state: dict[str, Any] = {}
        for mode, event in self._graph.stream(
            {"query": question, "user_id": user},
            context=Context(user),
            stream_mode=["tasks", "values"],
        ):
            if mode == "values":
                state = event
            elif "input" in event:  # a node starts
                self._progress.status(f"{label}  {event['name']} ...")
                times[event["name"]] = time.perf_counter()
            else:
                times[event["name"]] = time.perf_counter() - times[event["name"]]
        nodes = tallies(before, self._graph.perf.stats())
        for name, seconds in times.items():
            if nodes[name].hits:
                nodes[name].hit_time = seconds
        self.quoted += [doc.id for doc in state["passages"]]
        return " ".join(state["answer"].text.split()), nodes


def run(args: argparse.Namespace, progress: Progress) -> None:
    """The whole job. A child process (``--child``) only asks, and prints what it measured."""
    documents = KnowledgeBase(args.data_dir / "knowledge.db")
    with ExitStack() as stack:
        stack.enter_context(progress.log(models.logger))
        cache = stack.enter_context(DiskCache(args.cache_dir))
        endpoint = stack.enter_context(served(args))
        model = ChatModel(model=args.model, endpoint=endpoint)
        embedder = Embedder()
        asker = Asker(build_graph(documents, embedder, model, cache), progress)

        def ask(name: str) -> Pass:
            return asker.ask_all(name, args.questions, args.user)

        if args.child:
            print(ask("new process").to_json())
            return
        if args.fresh:
            documents.path.unlink(missing_ok=True)
        if documents.seed():
            cache.clear()  # whatever it holds was made from a file that is gone

        # both will be needed, and loading them is not part of what the cache saves
        embedder.embed(["warm up"])
        endpoint()

        passes = [ask("first time")]
        stored = passes[0].answers - passes[0].nodes["generate"].runs
        if stored:
            progress.line(f"  not cold: {stored} answers were stored (--fresh starts anew)")
        passes.append(ask("again"))
        progress.line("\nnew process, on the same cache directory ...")
        passes.append(in_new_process(args))

        # data first, tag second: a node that reads in between stores nothing that is served later
        for edited in asker.quoted[:1]:  # none if no question matched any document
            documents.edit(edited)
            cache.invalidate("docs")
            passes.append(ask(f"after an edit of document {edited!r}"))

        user = args.user[-1]
        style = "brief" if documents.profile(user).style == "detailed" else "detailed"
        documents.set_style(user, style)
        cache.invalidate(f"user:{user}")
        passes.append(ask(f"after {user} asked for {style} answers"))

    for line in ["", *passes_table(passes), "", *nodes_table(total(passes))]:
        progress.line(line)


def served(args: argparse.Namespace) -> AbstractContextManager[Any]:
    """What tells the chat model its endpoint: the one given, or a server of our own."""
    if args.base_url is None:
        return LocalServer()
    return nullcontext(lambda: Endpoint(args.base_url, args.api_key))


def in_new_process(args: argparse.Namespace) -> Pass:
    """Ask everything again in a process of its own.

    Raises:
        ModelError: it failed; its message went to standard error.
    """
    command = [sys.executable, "-m", "examples.knowledge_base", "--child", "--model", args.model]
    command += [f"--cache-dir={args.cache_dir}", f"--data-dir={args.data_dir}"]
    command += [f"--question={question}" for question in args.questions]
    command += [f"--user={user}" for user in args.user]
    env = dict(os.environ)
    if args.base_url is not None:
        # not on the command line, which every user of the machine can read
        env |= {"OPENAI_BASE_URL": args.base_url, "OPENAI_API_KEY": args.api_key}
    child = subprocess.run(command, cwd=CHECKOUT, env=env, stdout=subprocess.PIPE, text=True)
    if child.returncode:
        raise ModelError("the new process failed")
    return Pass.from_json(child.stdout)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; exits with a message when it is wrong."""
    parser = argparse.ArgumentParser(prog="python -m examples.knowledge_base", description=__doc__)
    cache = Path(".cache")
    parser.add_argument("--cache-dir", type=Path, default=cache / "knowledge_base", metavar="DIR")
    parser.add_argument(
        "--data-dir", type=Path, default=cache / "knowledge_base_data", metavar="DIR"
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
    parser.add_argument("--questions", type=Path, metavar="FILE", help="one question per line")
    parser.add_argument("--question", action="append", help="a question; may be repeated")
    parser.add_argument("--user", action="append", help="who asks; may be repeated")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)

    if args.base_url is None:
        args.model = LocalServer.model
    elif not args.base_url.startswith(("http://", "https://")):
        parser.error(f"--base-url: got {args.base_url!r}; accepted: an http:// or https:// address")
    elif not args.model:
        parser.error("--model (or OPENAI_MODEL) is needed with --base-url")
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
    except (ModelError, LangGraphPerfError, OSError, sqlite3.Error) as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
