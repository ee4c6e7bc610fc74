"""The public surface as a user's type checker sees it; checked by mypy, never executed."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from typing import Any

from langchain_core.runnables import RunnableConfig
from langgraph.cache.memory import InMemoryCache
from langgraph.graph import START
from langgraph.runtime import Runtime
from langgraph.types import CachePolicy as LangGraphCachePolicy
from langgraph.types import RetryPolicy
from typing_extensions import TypedDict

from langgraph_perf import (
    CacheControl,
    CachePolicy,
    DiskCache,
    FromContext,
    Keyed,
    MemoryCache,
    Pool,
    RedisCache,
    Shared,
    StateGraph,
    TieredCache,
    Use,
    alease,
    get_cache,
    lease,
)
from langgraph_perf.resources import Resource, ResourceStats
from langgraph_perf.stats import NodeStats, Stats


class State(TypedDict, total=False):
    query: str
    answer: str


class Context(TypedDict):
    user_id: str


def node(state: State, runtime: Runtime[Context]) -> State:
    answer: str = get_cache("x").get_or_set("k", lambda: "v", ttl=60, tags=["t"])
    lengths: list[int] = get_cache("x").get_or_set_many(["a"], lambda keys: [len(k) for k in keys])
    return {"answer": answer * len(lengths)}


async def anode(state: State, config: RunnableConfig) -> State:
    async def compute() -> str:
        return "v"

    answer: str = await get_cache("x", config).aget_or_set("k", compute)
    return {"answer": answer}


builder = StateGraph(State, context_schema=Context)
builder.set_node_defaults(cache_policy=CachePolicy(ttl=60), retry_policy=RetryPolicy())
builder.add_node("a", node, cache_policy=CachePolicy(key=["query"], ttl=timedelta(hours=1)))
builder.add_node(anode, cache_policy=LangGraphCachePolicy(ttl=60))
builder.add_node("b", node, cache_policy=CachePolicy(key=lambda state: state["query"], vary=()))
builder.add_edge(START, "a").add_edge("a", "anode")
graph = builder.compile(
    cache=TieredCache(
        MemoryCache(max_bytes=1_000_000),
        DiskCache(".cache", size_limit=10**9),
        RedisCache("redis://x"),
    ),
    name="graph",
)
plain = builder.compile(cache=InMemoryCache())

result: dict[str, Any] | Any = graph.invoke({"query": "q"}, context={"user_id": "1"})
control = CacheControl(mode="refresh", ttl=5, nodes={"a": CacheControl(mode="use")})
bound = graph.with_config(configurable={"cache_control": control})
stats: Stats = bound.perf.stats()
bound.perf.forget_thread("t1")
on_fork = CachePolicy(scope="thread", on_fork="refresh")
one: NodeStats = stats.nodes["a"]
seconds: float = one.seconds_saved
graph.clear_cache(["a"])


# -- resources ------------------------------------------------------------------------------------


def connect() -> sqlite3.Connection:
    return sqlite3.connect(":memory:")


async def aconnect() -> sqlite3.Connection:
    return connect()


def sound(db: sqlite3.Connection) -> bool:
    return bool(db.execute("SELECT 1").fetchone())


async def asound(db: sqlite3.Connection) -> bool:
    return sound(db)


@contextmanager
def connected() -> Iterator[sqlite3.Connection]:
    yield connect()


@asynccontextmanager
async def aconnected() -> AsyncIterator[sqlite3.Connection]:
    yield connect()


def model(name: str) -> bytes:
    return name.encode()


def leasing(state: State, db: sqlite3.Connection, *, large: bytes) -> State:
    with lease("db", timeout=5) as other:
        other.execute("SELECT 1")
    return {"answer": f"{db} {large!r}"}


async def aleasing(state: State, config: RunnableConfig, model: bytes) -> State:
    async with alease("models", "small", config=config) as other:
        return {"answer": f"{model!r} {other}"}


pool: Pool[sqlite3.Connection] = Pool(
    connect,
    max_size=4,
    min_size=1,
    max_idle=60,
    max_lifetime=None,
    max_waiting=10,
    timeout=5,
    check=sound,
    reset=sqlite3.Connection.rollback,
    close=sqlite3.Connection.close,
)
apool: Pool[sqlite3.Connection] = Pool(aconnect, check=asound)
settings: Shared[dict[str, str]] = Shared(lambda: {"language": "en"}, max_idle=None)
models: Keyed[bytes] = Keyed(model, max_size=2)
driver: FromContext[sqlite3.Connection] = FromContext(connected)
adriver: FromContext[sqlite3.Connection] = FromContext(aconnected)
given: dict[str, Resource[Any]] = {"db": pool, "models": models, "settings": settings}

leasers = StateGraph(State)
leasers.add_node("a", leasing, resources={"db": "db", "large": Use("models", key="query")})
leasers.add_node(aleasing, resources={"model": Use("models", key=lambda state: state["query"])})
leasers.add_node("b", node, resources=[], cache_policy=CachePolicy())
leasers.add_edge(START, "a").add_edge("a", "aleasing")
leased = leasers.compile(resources=given)
with leased.perf.override(db=connect(), models=Keyed(model)):
    leased.invoke({"query": "q"})
with pool.lease() as lent, models.lease("small", timeout=1) as small, driver.lease() as driven:
    rows: list[Any] = lent.execute("SELECT 1").fetchall() + driven.execute("SELECT 1").fetchall()
    size: int = len(small)
of_pool: ResourceStats = leased.perf.stats().resources["db"]
waited: float = of_pool.longest_wait
leased.perf.close()


async def asynchronously() -> None:
    async with apool.alease() as db, settings.alease() as found, adriver.alease() as driven:
        language: str = found["language"]
        db.execute(language)
        driven.execute(language)
    await leased.perf.aclose()


unsized = Pool(connect, max_size="4")  # type: ignore[arg-type]
unused = leasers.add_node("c", leasing, resources=5)  # type: ignore[arg-type]
unowned = leasers.compile(resources={"db": connect()})  # type: ignore[dict-item]

wrong = CachePolicy(ttl="60")  # type: ignore[arg-type]
mode = CacheControl(mode="always")  # type: ignore[arg-type]
