"""Checkpointers: what LangGraph keeps threads in, seen from the cache.

A graph compiled with a cache and a checkpointer has, as ``graph.checkpointer``, a stand-in for the
saver it was given. It can do exactly what that saver can, is taken for it by ``isinstance``, and
besides

* removes what a thread owns in the caches (``CachePolicy(scope="thread")``) with the thread:
  ``delete_thread``, ``prune`` with ``strategy="delete"`` and, for what single runs made,
  ``delete_for_runs``; ``copy_thread`` gives the copy its own;
* writes into each checkpoint's metadata, under ``"langgraph_perf"``, which nodes of its step were
  answered from the cache: ``{"cached": {node: {"count", "code", "hits": [{"step", "key",
  "age_seconds"}, ...]}}}``.

Whoever deletes threads through the bare saver calls ``graph.perf.forget_thread`` as well.
"""

from __future__ import annotations

from langgraph_perf._pooled_saver import PooledCheckpointer

__all__ = ["PooledCheckpointer"]
