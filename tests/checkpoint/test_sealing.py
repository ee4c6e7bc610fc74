"""What the checkpointer's serde hides is hidden in the cache as well."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.graph import START
from langgraph.graph import StateGraph as LangGraphStateGraph

from langgraph_perf import (
    CachePolicy,
    DiskCache,
    MemoryCache,
    Pool,
    RedisCache,
    StateGraph,
    TieredCache,
    get_cache,
)
from langgraph_perf._place import Place
from langgraph_perf._sealing import Seal
from langgraph_perf.caches.base import Cache
from langgraph_perf.checkpoint import PooledCheckpointer
from langgraph_perf.codec import DecodeError

from ..redis_server import Server, new_prefix
from .test_threads import State, counted, run

KEY = b"0123456789abcdef"
SECRETS = ("s3cret-query", "S3CRET-ANSWER", "s3cret-tag", "s3cret-item", "s3cret-thread")


def encrypted(key: bytes = KEY) -> InMemorySaver:
    return InMemorySaver(serde=EncryptedSerializer.from_pycryptodome_aes(key=key))


def build(cache: Cache, saver: Any, scope: Any = "global") -> tuple[Any, list[str]]:
    ran: list[str] = []

    def node(state: State) -> State:
        ran.append(state["query"])
        items = get_cache("items").get_or_set_many(
            ["s3cret-item"], lambda keys: [key * 2 for key in keys], tags=["s3cret-tag"]
        )
        one = get_cache("items").get_or_set("s3cret-item one", lambda: items[0])
        assert one == "s3cret-item" * 2
        return {"answer": "S3CRET-ANSWER"}

    policy = CachePolicy(
        scope=scope, version="1", key=["query"], tags=["s3cret-tag", "user:{query}"]
    )
    builder = StateGraph(State).add_node("answer", node, cache_policy=policy)
    builder.add_edge(START, "answer")
    return builder.compile(checkpointer=saver, cache=cache), ran


def ask(graph: Any) -> Any:
    return run(graph, "s3cret-thread", "s3cret-query")


@pytest.mark.parametrize("scope", ["global", "thread"])
def test_no_plaintext_on_disk(tmp_path: Path, scope: Any) -> None:
    """Every byte of the directory: no value, key field, tag, item or thread; hits all the same."""
    with DiskCache(tmp_path / "cache") as cache:
        graph, ran = build(cache, encrypted(), scope)
        for _ in range(2):
            assert ask(graph)["answer"] == "S3CRET-ANSWER"
        assert ran == ["s3cret-query"]
        stored = b"".join(path.read_bytes() for path in (tmp_path / "cache").iterdir())
        assert len(stored) > 10_000
        for secret in SECRETS:
            assert secret.encode() not in stored


def test_plaintext_is_found_without_encryption(tmp_path: Path) -> None:
    """The scan above can fail: with LangGraph's default serde it finds the value."""
    with DiskCache(tmp_path / "cache") as cache:
        graph, _ = build(cache, InMemorySaver())
        ask(graph)
        stored = b"".join(path.read_bytes() for path in (tmp_path / "cache").iterdir())
        assert b"S3CRET-ANSWER" in stored


@pytest.mark.parametrize("scope", ["global", "thread"])
def test_no_plaintext_in_redis(redis_server: Server, scope: Any) -> None:
    """Every key and every value in Redis: nothing readable; hits all the same."""
    import redis

    prefix = new_prefix()
    with (
        RedisCache(redis_server.url, prefix=prefix) as cache,
        redis.Redis.from_url(redis_server.url) as client,
    ):
        graph, ran = build(TieredCache(MemoryCache(), cache), encrypted(), scope)
        for _ in range(2):
            assert ask(graph)["answer"] == "S3CRET-ANSWER"
        assert ran == ["s3cret-query"]
        names: list[Any] = list(client.scan_iter(match=f"{prefix}:*"))
        assert len(names) > 3
        # a dump is what a backup of the server holds of it
        stored = b"".join([*names, *[client.dump(name) or b"" for name in names]])
        values = [client.get(name) for name in names if client.type(name) == b"string"]
        stored += b"".join([value for value in values if value])  # type: ignore[misc]
        for secret in SECRETS:
            assert secret.encode() not in stored


def test_another_key_does_not_open_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A graph with another key computes; one without encryption does not even come upon it."""
    with DiskCache(tmp_path / "cache") as cache:
        ask(build(cache, encrypted())[0])
        other, ran = build(cache, encrypted(b"fedcba9876543210"))
        assert ask(other)["answer"] == "S3CRET-ANSWER"
        assert len(ran) == 1
        assert other.perf.stats().nodes["answer"].refusals["undecodable"] == 1
        plain, ran = build(cache, InMemorySaver())
        ask(plain)
        assert len(ran) == 1
        assert not plain.perf.stats().nodes["answer"].refusals
    assert "a stored result is not served" in caplog.text


def test_a_cache_with_a_serde_of_its_own_keeps_it(tmp_path: Path) -> None:
    """Values are sealed once: with the cache's own serde, or else with the checkpointer's."""
    serde = EncryptedSerializer.from_pycryptodome_aes(key=KEY)
    with DiskCache(tmp_path / "a", serde=serde) as cache:
        assert Seal.of(serde, cache) is None
        assert Seal.of(serde, TieredCache(MemoryCache(), cache)) is None
        with DiskCache(tmp_path / "b") as other:
            for tiers in ([MemoryCache(serde=serde), other], [cache, other], [other, cache]):
                assert Seal.of(serde, TieredCache(*tiers)) is not None
    assert Seal.of(serde, MemoryCache(serde=serde)) is None
    assert Seal.of(JsonPlusSerializer(), MemoryCache()) is None
    assert Seal.of(None, MemoryCache()) is None
    assert Seal.of(serde, MemoryCache()) is not None


def test_a_seal_is_for_one_key() -> None:
    """What is moved to another key, not encrypted, or damaged is not opened."""
    seal = Seal(EncryptedSerializer.from_pycryptodome_aes(key=KEY))
    closed = seal.closed("k", b"payload")
    assert seal.opened("k", closed) == b"payload"
    plain = Seal(JsonPlusSerializer()).closed("k", b"payload")
    damaged = closed[:-1] + bytes([closed[-1] ^ 1])
    for name, sealed in (("other", closed), ("k", plain), ("k", damaged), ("k", b"")):
        with pytest.raises(DecodeError):
            seal.opened(name, sealed)


def test_a_serde_that_fails_costs_only_the_hit(caplog: pytest.LogCaptureFixture) -> None:
    """Sealing fails: the run goes on uncached, and says so once."""

    class Fails(JsonPlusSerializer):
        def dumps_typed(self, obj: Any) -> tuple[str, bytes]:
            if isinstance(obj, bytes):
                raise ValueError("no bytes, please")
            return super().dumps_typed(obj)

    node, ran = counted()
    builder = StateGraph(State).add_node("answer", node, cache_policy=CachePolicy(key=["query"]))
    builder.add_edge(START, "answer")
    graph: Any = builder.compile(checkpointer=InMemorySaver(serde=Fails()), cache=MemoryCache())
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            run(graph, "t")
    assert len(ran) == 2
    assert caplog.text.count("the checkpointer's serde failed") == 1


def test_graphs_inside_seal_with_the_same_serde(tmp_path: Path) -> None:
    """A subgraph's results are sealed as well."""
    with (
        DiskCache(tmp_path / "cache") as cache,
        SqliteSaver.from_conn_string(":memory:") as saver,
    ):
        saver.serde = EncryptedSerializer.from_pycryptodome_aes(key=KEY)
        inner = StateGraph(State)
        inner.add_node(
            "deep", lambda state: {"answer": "S3CRET-ANSWER"}, cache_policy=CachePolicy()
        )
        inner.add_edge(START, "deep")
        builder = StateGraph(State).add_node("sub", inner.compile())
        builder.add_edge(START, "sub")
        graph: Any = builder.compile(checkpointer=saver, cache=cache)
        assert ask(graph)["answer"] == "S3CRET-ANSWER"
        stored = b"".join(path.read_bytes() for path in (tmp_path / "cache").iterdir())
        assert b"S3CRET-ANSWER" not in stored
        assert cache.stats().entries == 1


def test_the_first_run_on_pooled_savers_is_sealed(tmp_path: Path) -> None:
    """What encrypts is known only once a saver was leased: by then the run reads its thread."""
    with DiskCache(tmp_path / "cache") as cache:
        pooled = PooledCheckpointer(Pool(encrypted))
        graph, _ = build(cache, pooled)
        ask(graph)
        pooled.close()
        stored = b"".join(path.read_bytes() for path in (tmp_path / "cache").iterdir())
        assert cache.stats().entries == 3
        for secret in SECRETS:
            assert secret.encode() not in stored


def test_items_of_one_kind_are_not_another_kinds() -> None:
    """A sealed item that is moved to another namespace is not found under its key there."""
    place = Place(seal=Seal(EncryptedSerializer.from_pycryptodome_aes(key=KEY)))
    names = {place.lookup(kind, "bob", (), None).key[1] for kind in ("salaries", "nicknames")}
    assert len(names) == 2


@pytest.mark.parametrize("outer", [StateGraph, LangGraphStateGraph])
def test_a_graph_inside_hides_what_its_own_saver_hides(tmp_path: Path, outer: Any) -> None:
    """Run on a thread of its own from a node of another graph, which keeps its own in the clear."""
    with DiskCache(tmp_path / "cache") as cache:
        inner, _ = build(cache, encrypted())
        builder = outer(State).add_node("outer", lambda state: ask(inner))
        builder.add_edge(START, "outer").compile(checkpointer=InMemorySaver()).invoke(
            {"query": "q"}, {"configurable": {"thread_id": "t"}}
        )
        assert cache.stats().entries > 0
        for file in (tmp_path / "cache").iterdir():
            raw = file.read_bytes()
            assert not [secret for secret in SECRETS if secret.encode() in raw]
