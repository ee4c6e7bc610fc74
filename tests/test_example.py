"""The knowledge-base example: what each node runs, hits and misses, and the program around it."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_core.outputs import ChatGeneration, ChatResult

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT))  # examples are run from the checkout, not installed

from examples.knowledge_base import databases  # noqa: E402
from examples.knowledge_base.__main__ import QUESTIONS, USERS, Asker, Child, main  # noqa: E402
from examples.knowledge_base.documents import KnowledgeBase, knowledge_base  # noqa: E402
from examples.knowledge_base.graph import EMBEDDINGS, NODES, Context, build_graph  # noqa: E402
from examples.knowledge_base.models import (  # noqa: E402
    MODEL_TYPES,
    ChatModel,
    Endpoint,
    LocalModel,
    ModelError,
)
from examples.knowledge_base.report import (  # noqa: E402
    Pass,
    Progress,
    Tally,
    nodes_table,
    passes_table,
    resources_table,
    total,
)
from langgraph_perf import DiskCache, Keyed, Shared  # noqa: E402
from langgraph_perf.resources import Resource, ResourceStats  # noqa: E402

# -- stand-ins for the models ---------------------------------------------------------------------

EMBEDDED: list[str] = []


class WordsEmbedder:
    """Texts that share words are near each other."""

    size = 64

    def embed(self, texts: Sequence[str]) -> list[Any]:
        EMBEDDED.extend(texts)
        vectors = []
        for text in texts:
            vector = np.ones(self.size, np.float32)
            for word in re.findall(r"\w+", text.lower())[:200]:
                vector[zlib.crc32(word.encode()) % self.size] += 1
            vectors.append(vector / np.linalg.norm(vector))
        return vectors


class EchoModel(BaseChatModel):
    """Answers with its type, the question and style it was asked for, and spends 100 tokens."""

    model_type: str = ""

    @property
    def _llm_type(self) -> str:
        return "echo"

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        message = AIMessage(
            f"{self.model_type}: {messages[-1].text.splitlines()[-1]}",
            usage_metadata={"input_tokens": 90, "output_tokens": 10, "total_tokens": 100},
        )
        return ChatResult(generations=[ChatGeneration(message=message)])


@dataclass
class Endpoints:
    """A real HTTP server with an OpenAI-style endpoint; ``reply`` may be replaced."""

    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    status: int = 200
    reply: Any = None
    asked: threading.Event = field(default_factory=threading.Event)
    answer: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def endpoint() -> Iterator[Endpoints]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            served.requests.append({"path": self.path, **body})
            served.keys.append(self.headers["Authorization"])
            served.asked.set()
            served.answer.wait(60)
            question = body["messages"][-1]["content"].splitlines()[-1]
            reply = served.reply or {
                "choices": [{"message": {"content": f"Answer to: {question}"}}],
                "usage": {"prompt_tokens": 90, "completion_tokens": 10, "total_tokens": 100},
            }
            data = json.dumps(reply).encode()
            self.send_response(served.status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        served = Endpoints(f"http://127.0.0.1:{server.server_port}/v1")
        served.answer.set()
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield served
        served.answer.set()
        server.shutdown()
        thread.join()


# -- the graph ------------------------------------------------------------------------------------


@dataclass
class Job:
    """The example's graph on a temporary directory."""

    documents: KnowledgeBase
    cache: DiskCache
    graph: Any
    asker: Asker
    out: io.StringIO

    def ask(self, name: str = "pass") -> Pass:
        return self.asker.ask_all(name, QUESTIONS, USERS)

    def leases(self) -> dict[str, int]:
        return {name: s.leases for name, s in self.graph.perf.stats().resources.items()}


@pytest.fixture(params=["sqlite", "postgres"])
def db(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Resource[Any]]:
    """Connections to an empty database of each kind."""
    if request.param == "sqlite":
        with ExitStack() as stack:
            pool = databases.sqlite(tmp_path / "data" / "knowledge.db")
            stack.callback(pool.close)
            yield pool
    else:
        dsn = request.getfixturevalue("postgres")
        with databases.postgres(dsn, fresh=True) as leases:
            yield leases


@pytest.fixture
def documents(db: Resource[Any]) -> Iterator[KnowledgeBase]:
    with db.lease() as connection:
        knowledge = knowledge_base(connection)
        assert knowledge.seed()
    with db.lease() as connection:
        yield knowledge_base(connection)


class Documents:
    """A knowledge base each of whose calls takes a lease of its own, as the program does."""

    def __init__(self, db: Resource[Any]) -> None:
        self._db = db

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> Any:
            with self._db.lease() as connection:
                return getattr(knowledge_base(connection), name)(*args)

        return call


@pytest.fixture
def start(tmp_path: Path, db: Resource[Any]) -> Iterator[Callable[[], Job]]:
    with ExitStack() as stack:

        def job() -> Job:
            documents: Any = Documents(db)
            documents.seed()
            cache = stack.enter_context(DiskCache(tmp_path / "cache"))
            resources = {
                "db": db,
                "embedder": Shared(WordsEmbedder),
                "models": Keyed(lambda kind: EchoModel(model_type=kind), max_size=1),
            }
            graph = build_graph(cache, resources)
            EMBEDDED.clear()
            out = io.StringIO()
            return Job(documents, cache, graph, Asker(graph, Progress(out)), out)

        yield job


@pytest.fixture
def job(start: Callable[[], Job]) -> Job:
    return start()


def ran(done: Pass) -> list[int]:
    """How often each node ran, once it is sure that every call ran or hit."""
    for name in NODES:
        assert done.nodes[name].runs + done.nodes[name].hits == done.answers, name
        assert done.nodes[name].misses == done.nodes[name].runs, name
    return [done.nodes[name].runs for name in NODES]


def answers(job: Job, user: str) -> list[str]:
    """What ``user`` is told, straight from the graph."""
    return [
        job.graph.invoke({"query": q, "user_id": user}, context=Context(user))["answer"].text
        for q in QUESTIONS
    ]


def test_cold_pass_shares_only_what_users_share(job: Job) -> None:
    """Cold, search and query embedding run once per question, the rest once per user as well."""
    assert ran(job.ask()) == [4, 4, 8, 8]


def test_warm_pass_runs_nothing(job: Job) -> None:
    """Asked again, no node runs, nothing is embedded, and all tokens of the answers are saved."""
    job.ask()
    EMBEDDED.clear()
    warm = job.ask()
    assert ran(warm) == [0, 0, 0, 0]
    assert EMBEDDED == []
    assert warm.nodes["generate"].tokens_saved == 8 * 100


def test_warm_pass_leases_nothing(job: Job) -> None:
    """Where everything hits no resource is touched, and the program says so."""
    cold = job.ask()
    leases = job.leases()
    assert all(leases.values())
    assert cold.leases == sum(leases.values()) - 1  # one for the seed
    assert cold.loads >= 2
    said = "nothing was leased, nothing was loaded"
    assert said not in job.out.getvalue()
    warm = job.ask()
    assert job.leases() == leases
    assert (warm.leases, warm.loads) == (0, 0)
    assert said in job.out.getvalue()


def test_warm_from_disk(start: Callable[[], Job]) -> None:
    """Another graph on the same directory finds everything."""
    start().ask()
    again = start()
    assert ran(again.ask()) == [0, 0, 0, 0]
    assert EMBEDDED == []


def test_each_document_is_embedded_once(job: Job) -> None:
    """However many questions and users share a candidate, it is embedded once."""
    done = job.ask()
    candidates = {doc.id for q in QUESTIONS for doc in job.documents.search(q)}
    embedded = [text for text in EMBEDDED if text not in QUESTIONS]
    assert len(embedded) == len(set(embedded)) == len(candidates)
    assert done.nodes[EMBEDDINGS].misses == len(candidates)


def test_document_update(job: Job) -> None:
    """An edit costs one embedding, the searches, the selections, and the answers that quote it."""
    job.ask()
    edited = job.asker.quoted[0]
    quoting = sum(
        edited in job.asker.quoted[start : start + 2]
        for start in range(0, len(job.asker.quoted), 2)
    )
    assert 0 < quoting < 8, "the edit must concern some answers and not others"
    EMBEDDED.clear()
    job.documents.edit(edited)
    job.cache.invalidate("docs")
    done = job.ask()
    assert ran(done) == [4, 0, 8, quoting]
    assert done.nodes[EMBEDDINGS].misses == 1
    assert [text.partition(":")[0] for text in EMBEDDED] == [edited]


def test_user_update(job: Job) -> None:
    """A change of Bob's profile redoes Bob's selections and answers, and nothing of Alice's."""
    job.ask()
    alice, bob = answers(job, "alice"), answers(job, "bob")
    job.documents.set_style("bob", "brief")
    job.cache.invalidate("user:bob")
    assert ran(job.ask()) == [0, 0, 4, 4]
    assert answers(job, "alice") == alice
    assert all("short" in text for text in answers(job, "bob"))
    assert not any("short" in text for text in bob)


def test_no_answer_crosses_users(job: Job) -> None:
    """Each user is answered in their own style by a model for it, although they ask the same."""
    alice, bob = answers(job, "alice"), answers(job, "bob")
    assert all("short" in text and text.startswith("small:") for text in alice)
    assert all("example" in text and text.startswith("precise:") for text in bob)
    models = job.graph.perf.stats().resources["models"]
    assert (models.loads, models.size) == (2, 1)  # one made room for the other


def test_another_model_answers_anew(job: Job) -> None:
    """The model's name is in the key of its answers, and of nothing else."""
    job.ask()
    other = Asker(job.graph, Progress(io.StringIO()), "another")
    assert ran(other.ask_all("pass", QUESTIONS, USERS)) == [0, 0, 0, 8]


def test_question_without_candidates(job: Job) -> None:
    """A question that matches no document is answered without passages."""
    done = job.asker.ask_all("pass", ["?!"], ["alice"])
    assert done.answers == 1
    assert job.asker.quoted == []


# -- documents ------------------------------------------------------------------------------------


def test_seed_keeps_what_is_there(documents: KnowledgeBase) -> None:
    """Seeding fills an empty file only."""
    documents.edit("with")
    assert not documents.seed()
    assert documents.read(["with"])[0].revision == 2


@pytest.mark.parametrize("query", ['"', "a' OR 1=1 --", "NEAR( *", "with AND", "", "   ", "日本語"])
def test_any_question_can_be_searched(documents: KnowledgeBase, query: str) -> None:
    """No question is search syntax."""
    assert isinstance(documents.search(query), list)


def test_search_ranks_and_excerpts(documents: KnowledgeBase) -> None:
    """The best match comes first, as an excerpt of its text."""
    found = documents.search("What is a lambda expression?", limit=3)
    assert found[0].id == "lambda"
    assert len(found) == 3
    assert "anonymous" in found[0].text
    assert all(0 < len(doc.text) <= 400 for doc in found)


def test_edit_counts_revisions(documents: KnowledgeBase) -> None:
    """Each edit changes the text and the revision, and does not pile up."""
    seen = [documents.read(["with"])[0]]
    for revision in (2, 3):
        assert documents.edit("with") == revision
        seen.append(documents.read(["with"])[0])
    assert len({doc.text for doc in seen}) == 3
    assert len(seen[2].text) == len(seen[1].text)
    assert documents.search("with statement", 20) != []


def test_profiles(documents: KnowledgeBase) -> None:
    """A style is kept per user; who is unknown has the default profile, and can get one."""
    assert documents.profile("carol").style == "brief"
    documents.set_style("carol", "detailed")
    assert documents.profile("carol").style == "detailed"
    assert documents.profile("alice").topics == ("context-managers", "with")


def test_a_private_server_ends_with_its_process() -> None:
    """Killed without a chance to clean up, a program leaves no server behind."""
    import psycopg

    code = (
        "from examples.knowledge_base.databases import private_postgres\n"
        "with private_postgres() as dsn:\n    print(dsn, flush=True)\n    input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=CHECKOUT, stdin=-1, stdout=-1, text=True
    ) as process:
        assert process.stdout is not None
        dsn = process.stdout.readline()
        with psycopg.connect(dsn) as connection:
            process.kill()
            process.wait()
            with pytest.raises(psycopg.OperationalError):
                connection.execute("SELECT pg_sleep(60)")
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(dsn)
    left = Path(re.findall("host=(\\S+)", dsn)[0])
    deadline = time.monotonic() + 60
    while (left / "data" / "postmaster.pid").exists():
        assert time.monotonic() < deadline, "it never ended"
        time.sleep(0.01)
    shutil.rmtree(left)


# -- chat model -----------------------------------------------------------------------------------


def chat(endpoint: Endpoint) -> AIMessage:
    model = ChatModel(model="tiny", endpoint=endpoint)
    reply = model.invoke([HumanMessage("Why?")], max_tokens=40)
    assert isinstance(reply, AIMessage)
    return reply


def test_chat_model(endpoint: Endpoints) -> None:
    """A reply brings its text and its token usage; the request its key, limit and messages."""
    reply = chat(Endpoint(endpoint.url, "secret"))
    assert reply.text == "Answer to: Why?"
    assert reply.usage_metadata is not None
    assert reply.usage_metadata["total_tokens"] == 100
    (request,) = endpoint.requests
    assert request["path"] == "/v1/chat/completions"
    assert request["messages"] == [{"role": "user", "content": "Why?"}]
    assert (request["model"], request["max_tokens"]) == ("tiny", 40)
    assert endpoint.keys == ["Bearer secret"]


def test_where_a_model_is_served_is_not_its_identity() -> None:
    """Two endpoints of one model are one model; two models are not."""
    at = [ChatModel(model="m", endpoint=Endpoint(p))._get_llm_string() for p in "ab"]
    other = ChatModel(model="n", endpoint=Endpoint("a"))._get_llm_string()
    assert at[0] == at[1] != other


def test_refusal_is_a_clear_error(endpoint: Endpoints) -> None:
    """An HTTP error names the address, the status and what the server said."""
    endpoint.status, endpoint.reply = 401, {"error": "Invalid key"}
    with pytest.raises(ModelError, match=r"completions answered 401 .*Invalid key"):
        chat(Endpoint(endpoint.url))


def test_nobody_listening_is_a_clear_error() -> None:
    """A refused connection names the address."""
    with pytest.raises(ModelError, match=r"no model answers at http://127.0.0.1:1/v1/chat"):
        chat(Endpoint("http://127.0.0.1:1/v1"))


def test_foreign_reply_is_a_clear_error(endpoint: Endpoints) -> None:
    """A reply in another format is shown."""
    endpoint.reply = {"hello": "world"}
    with pytest.raises(ModelError, match=r"not an OpenAI-style reply.*hello"):
        chat(Endpoint(endpoint.url))


def test_local_models() -> None:
    """Types answer side by side, count their tokens, want their keys, and are gone once closed."""
    models = [LocalModel.load(model_type) for model_type in MODEL_TYPES]
    for model in models:
        reply = model.invoke([HumanMessage("Hello")], max_tokens=3)
        assert isinstance(reply, AIMessage)
        assert reply.text
        assert reply.usage_metadata is not None
        assert reply.usage_metadata["output_tokens"] == 3
        with pytest.raises(ModelError, match="answered 401"):
            chat(Endpoint(model.endpoint.url, "wrong"))
        model.close()
        with pytest.raises(ModelError, match="no model answers"):
            chat(model.endpoint)


# -- report ---------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_without_a_terminal() -> None:
    """What is not a terminal gets whole lines only: no status, no control characters."""
    out = io.StringIO()
    progress = Progress(out)
    progress.status("working")
    progress.line("done")
    assert out.getvalue() == "done\n"


def test_live_line_on_a_terminal() -> None:
    """A status replaces the one before it, and a line replaces the status."""
    out = Terminal()
    progress = Progress(out)
    progress.status("one")
    progress.status("two")
    progress.line("done")
    assert out.getvalue() == "\r\x1b[2Kone\r\x1b[2Ktwo\r\x1b[2Kdone\n"


def some_pass() -> Pass:
    nodes = {name: Tally(hits=2, saved=4.0, tokens_saved=7, hit_time=0.5) for name in NODES}
    nodes["generate"] = Tally(runs=1, hits=1, misses=1, saved=3.0, spent=2.0, hit_time=0.001)
    nodes[EMBEDDINGS] = Tally(misses=3)
    return Pass("a pass", answers=2, seconds=1.5, nodes=nodes, leases=7, loads=2)


def test_pass_survives_json() -> None:
    """A child's measurements arrive as they were."""
    assert Pass.from_json(some_pass().to_json()) == some_pass()


def cells(line: str) -> list[str]:
    return re.split(r"\s{2,}", line.strip())


def test_tables() -> None:
    """Both tables are aligned, and their numbers are those of the passes."""
    cold = Pass("cold", 1, 1.5, 3, 1, some_pass().nodes)
    passes = [cold, Pass("warm", 2, 0.5, nodes=some_pass().nodes)]
    by_pass, by_node = passes_table(passes), nodes_table(total(passes))
    for lines in (by_pass, by_node):
        assert len({len(line) for line in lines}) == 1
    none = "0 of 2"
    counts = [none, none, none, "1 of 2", "3"]
    assert cells(by_pass[3]) == ["warm", "2", "0.50", "3.0x", *counts, "0", "0"]
    assert cells(by_pass[2])[-2:] == ["3", "1"]
    assert cells(passes_table(passes[1:])[2])[3] == "-", "there is no cold pass to compare with"
    assert cells(by_node[2]) == ["retrieve", "0", "4", "0", "-", "250.0", "8.0x", "8.00", "14"]
    assert cells(by_node[5]) == ["generate", "2", "2", "2", "2.000", "1.0", "3000.0x", "6.00", "0"]


def test_resources_table() -> None:
    """What is ours is counted; of a driver's own pool only the leases are known."""
    models = ResourceStats(size=2, max_size=4, leases=9, loads=3, load_seconds=1.5, longest_wait=2)
    head, _, ours, theirs = resources_table(
        {"models": models, "db": ResourceStats(leases=5, loads=5, longest_wait=0.25)}
    )
    assert len({len(head), len(ours), len(theirs)}) == 1
    assert cells(ours) == ["models", "9", "3", "1.50", "2000.0", "2", "4"]
    assert cells(theirs) == ["db", "5", "-", "-", "250.0", "-", "driver's"]


# -- the program ----------------------------------------------------------------------------------


def command(tmp_path: Path, *args: str) -> dict[str, Any]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("OPENAI_")}
    program = [sys.executable, "-m", "examples.knowledge_base"]
    program += [f"--cache-dir={tmp_path / 'cache'}", f"--data-dir={tmp_path / 'data'}", *args]
    return {"args": program, "cwd": CHECKOUT, "env": env, "text": True}


@pytest.mark.parametrize("database", [(), ("--postgres",)], ids=["sqlite", "postgres"])
def test_whole_job(tmp_path: Path, endpoint: Endpoints, database: tuple[str, ...]) -> None:
    """The program runs to its tables, and its new process finds everything stored.

    With PostgreSQL it starts a server of its own, which its new process uses too.
    """
    questions = tmp_path / "questions.txt"
    questions.write_text("What is a lambda expression?\n\nHow can I catch an exception?\n")
    options = (f"--base-url={endpoint.url}", "--api-key=s3cret", "--model=stub")
    run = command(tmp_path, *options, f"--questions={questions}", *database)
    first = subprocess.run(**run, capture_output=True, timeout=100)
    assert (first.returncode, first.stderr) == (0, "")
    rows = {row[0]: row[4:] for row in map(cells, first.stdout.splitlines()) if len(row) == 11}
    none = ["0 of 4"] * 4
    assert rows["first time"][:4] == ["2 of 4", "2 of 4", "4 of 4", "4 of 4"]
    assert rows["again"] == [*none, "0", "0", "0"]
    assert rows["new process"] == [*none, "0", "0", "0"]
    edited = rows["after an edit of document 'lambda'"][:5]
    assert edited == ["2 of 4", "0 of 4", "4 of 4", "2 of 4", "1"]
    assert rows["after bob asked for brief answers"][:5] == [*none[:2], "2 of 4", "2 of 4", "0"]
    resources = {row[0]: row[1:] for row in map(cells, first.stdout.splitlines()) if len(row) == 7}
    assert resources["db"][-1] == ("driver's" if database else "4")
    assert (resources["embedder"][1], resources["models"][1]) == ("1", "2")
    assert len(endpoint.requests) == 8
    assert set(endpoint.keys) == {"Bearer s3cret"}
    assert not re.search(r"\x1b|\r|s3cret", first.stdout)


def test_interrupt_ends_quietly(tmp_path: Path, endpoint: Endpoints) -> None:
    """Ctrl-C in the middle of an answer ends the program at once and without a traceback."""
    endpoint.answer.clear()
    run = command(tmp_path, f"--base-url={endpoint.url}", "--model=stub")
    # a shell that runs the tests in the background has told them, and so this program, to ignore it
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(**run, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    finally:
        signal.signal(signal.SIGINT, inherited)
    with process:
        assert endpoint.asked.wait(60)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert out.endswith("interrupted\n")
    assert err == ""


def test_three_processes_share_one_redis(tmp_path: Path, endpoint: Endpoints) -> None:
    """What one has computed or invalidated holds for all; each result is computed once."""
    options = (f"--base-url={endpoint.url}", "--model=stub", "--user=alice", "--redis")
    run = command(tmp_path, *options, "--question=What is a lambda expression?")
    done = subprocess.run(**run, capture_output=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
    together = [cells(line) for line in done.stdout.splitlines() if line.startswith("all  ")]
    nothing, once = ["0", "0", "0", "0"], ["1", "0", "1", "1"]
    assert [row[1] for row in together] == ["3"] * 4
    assert [row[4:] for row in together] == [nothing, nothing, once, nothing]
    assert [together[i][3] for i in (0, 1, 3)] == ["12"] * 3  # of three processes all four nodes
    assert not list((tmp_path / "cache").glob("*"))


@pytest.mark.usefixtures("in_process")
def test_a_redis_that_cannot_be_used_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """A server that is not there ends the program with one line that says so."""
    assert main(["--redis=redis://127.0.0.1:1/0"]) == 1
    assert re.fullmatch(r"error: .*\n", capsys.readouterr().err)


@pytest.fixture
def in_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program on a temporary directory, without the real encoder and the new process."""
    nothing = Pass("new process", nodes={name: Tally() for name in (*NODES, EMBEDDINGS)})
    monkeypatch.setattr(Child, "__init__", lambda self, args: None)
    monkeypatch.setattr(Child, "__exit__", lambda *args: None)
    monkeypatch.setattr(Child, "ask", lambda self, name: nothing)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("examples.knowledge_base.__main__.Embedder", WordsEmbedder)


@pytest.mark.usefixtures("in_process")
def test_next_run_starts_warm_unless_fresh(
    endpoint: Endpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    """The next run finds everything stored and says so; ``--fresh`` starts from nothing."""
    args = [f"--base-url={endpoint.url}", "--model=stub"]
    rows = []
    for fresh in ([], [], ["--fresh"]):
        assert main([*args, *fresh]) == 0
        out = capsys.readouterr().out
        (row,) = [cells(line) for line in out.splitlines() if line.startswith("first time  ")]
        rows.append(row[-7:-2])
        assert ("not cold: 8 answers were stored" in out) == (len(rows) == 2)
    embeddings = rows[0][-1]
    assert int(embeddings) > 0
    assert rows[0] == rows[2] == ["4 of 8", "4 of 8", "8 of 8", "8 of 8", embeddings]
    assert rows[1] == ["0 of 8"] * 4 + ["0"]


@pytest.mark.usefixtures("in_process")
def test_unusable_directory_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A cache directory that cannot be ends the program with one line that names it."""
    (tmp_path / "file").touch()
    assert main(["--cache-dir=file/cache"]) == 1
    err = capsys.readouterr().err
    assert re.fullmatch(r"error: .*file/cache.*\n", err)


@pytest.mark.usefixtures("in_process")
def test_unreachable_database_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """A server that is not there ends the program with one line that names it."""
    assert main(["--base-url=http://h/v1", "--model=m", "--postgres=host=/nowhere/at/all"]) == 1
    err = capsys.readouterr().err
    assert re.fullmatch(r"error: PostgreSQL: .*/nowhere/at/all.*\n", err)


@pytest.mark.usefixtures("in_process")
def test_dead_endpoint_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An endpoint where nobody listens ends the program with one line that names it."""
    assert main(["--base-url=http://127.0.0.1:1/v1", "--model=stub"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: no model answers at http://127.0.0.1:1/v1")
    assert err.count("\n") == 1
    assert (tmp_path / ".cache" / "knowledge_base").is_dir()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--base-url=localhost:8080", "--model=m"], "--base-url: got 'localhost:8080'; accepted"),
        (["--base-url=http://localhost/v1"], "--model (or OPENAI_MODEL) is needed"),
        (["--questions=/nowhere/at/all"], "--questions: "),
        (["--questions=/dev/null"], "holds no question"),
        (["--max-models=0"], "--max-models: got 0; accepted: a number of at least 1"),
    ],
)
def test_bad_arguments(
    args: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A wrong argument is named before anything starts."""
    monkeypatch.delenv("OPENAI_MODEL", raising=False)
    with pytest.raises(SystemExit):
        main(args)
    assert message in capsys.readouterr().err
