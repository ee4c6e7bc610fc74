"""The graph: retrieve → embed → select → generate.

Each node is cached under a policy of its own, and leases what it needs while its body runs, which
it does not on a hit.

How to choose a policy: what a node reads from its *state* belongs in ``key``; what it reads from
*elsewhere* (here the database) is a dependency, so it gets a tag, which whoever changes the data
invalidates; whose result it is belongs in ``vary``.

=========  ==================  ==============  =====================================
node       key                 varies by user  depends on
=========  ==================  ==============  =====================================
retrieve   the question        no              ``docs``
embed      the question        no              nothing
select     its candidates too  yes             ``docs``, ``user:…`` (preferred topics)
generate   its passages too    yes             ``user:…`` (style)
=========  ==================  ==============  =====================================

``generate`` needs no ``docs``: the passages in its key name the revisions of their documents, so an
edit redoes the answers that quote the edited document, and no others.

Resources are no part of a key, except for *which* model ``generate`` leases: ``model_type``, a
field that ``select`` chose by the user's style.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langgraph.cache.base import BaseCache
from langgraph.graph import END, START
from langgraph.runtime import Runtime
from typing_extensions import TypedDict

from examples.knowledge_base.documents import Document, knowledge_base
from examples.knowledge_base.models import MODEL_TYPES, Embedder, Vector
from langgraph_perf import CachePolicy, StateGraph, Use, get_cache, lease

NODES = ("retrieve", "embed", "select", "generate")
EMBEDDINGS = "doc-embeddings"
DAY = 86_400  # seconds
PASSAGES = 2
PREFERENCE = 0.1  # what a preferred topic adds to a cosine similarity
STYLES = {
    "brief": "Answer in one short sentence.",
    "detailed": "Answer in two sentences, the second one with an example.",
}
MODEL_FOR = {"brief": "small", "detailed": "precise"}  # model types by style


@dataclass(frozen=True)
class Context:
    """What a server knows about a call and the caller does not say.

    Attributes:
        user_id: who is asking.
        model: the name of the language model, of whatever type.
    """

    user_id: str
    model: str = ""


class Question(TypedDict):
    """The graph's input."""

    query: str
    user_id: str  # again, because tags are named from the state


class State(Question, total=False):
    """What the nodes add to the question."""

    candidates: list[Document]
    vector: Vector
    passages: list[Document]
    model_type: str
    answer: AIMessage  # a message, so that its tokens are counted


def retrieve(state: State, db: Any) -> dict[str, Any]:
    """Narrow the documents down to a few by the question's words."""
    return {"candidates": knowledge_base(db).search(state["query"])}


def embed(state: State, embedder: Embedder) -> dict[str, Any]:
    """Turn the question into a vector."""
    return {"vector": embedder.embed([state["query"]])[0]}


def select(state: State, runtime: Runtime[Context], db: Any) -> dict[str, Any]:
    """Keep the candidates nearest in meaning, the user's preferred topics first among equals."""
    documents = knowledge_base(db)
    profile = documents.profile(runtime.context.user_id)
    texts = {doc.id: doc.text for doc in documents.read([doc.id for doc in state["candidates"]])}

    def embed_documents(keys: Sequence[tuple[str, str, str]]) -> list[Vector]:
        # only here, where a document is new: what resources= names is leased for the whole node
        embedder: Embedder
        with lease("embedder") as embedder:
            return embedder.embed([f"{name}: {text}" for _, name, text in keys])

    # one entry per document and finer than the node: a document that changes costs one embedding.
    # The text itself is the key, so there is nothing to invalidate
    vectors = get_cache(EMBEDDINGS).get_or_set_many(
        [(Embedder.name, name, text) for name, text in texts.items()], embed_documents
    )
    score = {
        name: float(vector @ state["vector"]) + PREFERENCE * (name in profile.topics)
        for name, vector in zip(texts, vectors, strict=True)
    }
    nearest = sorted(score, key=lambda name: -score[name])[:PASSAGES]
    return {
        "passages": [doc for doc in state["candidates"] if doc.id in nearest],
        "model_type": MODEL_FOR[profile.style],
    }


def generate(
    state: State, runtime: Runtime[Context], db: Any, model: BaseChatModel
) -> dict[str, Any]:
    """Answer from the selected passages, in the user's style."""
    style = knowledge_base(db).profile(runtime.context.user_id).style
    kind = MODEL_TYPES[state["model_type"]]
    passages = "\n\n".join(f"[{doc.id}]\n{doc.text}" for doc in state["passages"])
    answer = model.invoke(
        [
            SystemMessage("You answer questions about Python."),
            HumanMessage(passages),
            AIMessage("I have read it. What is the question?"),
            # last, so that a server that keeps prefixes reads the passages once for all users
            HumanMessage(f"{state['query']} {STYLES[style]}"),
        ],
        max_tokens=kind.max_tokens,
        temperature=kind.temperature,
    )
    return {"answer": answer}


def build_graph(cache: BaseCache[Any], resources: Mapping[str, Any]) -> Any:
    """The compiled graph.

    Args:
        cache: where results are kept.
        resources: ``db``, connections; ``embedder``; ``models``, language models by model type.
    """
    builder = StateGraph(State, context_schema=Context, input_schema=Question)
    builder.add_node(
        "retrieve",
        retrieve,
        resources=["db"],
        cache_policy=CachePolicy(key=["query"], vary=(), tags=["docs"], ttl=DAY),
    )
    builder.add_node(
        "embed",
        embed,
        resources=["embedder"],
        cache_policy=CachePolicy(key=["query"], vary=()),
    )
    builder.add_node(
        "select",
        select,
        resources=["db"],
        cache_policy=CachePolicy(
            key=["query", "candidates"],
            vary=["context.user_id"],
            tags=["docs", "user:{user_id}"],
        ),
    )
    builder.add_node(
        "generate",
        generate,
        resources={"db": "db", "model": Use("models", key="model_type")},
        cache_policy=CachePolicy(
            key=["query", "passages"],
            vary=["context.user_id", "context.model"],
            tags=["user:{user_id}"],
        ),
    )
    for source, target in pairwise((START, *NODES, END)):
        builder.add_edge(source, target)
    return builder.compile(cache=cache, resources=resources)
