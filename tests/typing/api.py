"""The public surface as a user's type checker sees it; checked by mypy, never executed."""

from __future__ import annotations

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
    MemoryCache,
    RedisCache,
    StateGraph,
    TieredCache,
    get_cache,
)
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

wrong = CachePolicy(ttl="60")  # type: ignore[arg-type]
mode = CacheControl(mode="always")  # type: ignore[arg-type]
