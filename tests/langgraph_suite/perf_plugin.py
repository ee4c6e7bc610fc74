"""Runs LangGraph's own test suite with this library's ``StateGraph`` in place of the original.

A pytest plugin, loaded before the suite's modules import LangGraph's class. ``PERF_SUITE`` chooses:

* ``plain``: the class alone. A graph without policies must be LangGraph, object for object.
* ``wrapped``: every node that has no policy gets one, over a memory cache, with keys that never
  repeat. Nodes always run, through all of the library's machinery, and nobody may notice.
"""

from __future__ import annotations

import itertools
import os
from typing import Any

import langgraph.graph
import langgraph.graph.message
import langgraph.graph.state
from langgraph.typing import ContextT, InputT, OutputT, StateT

import langgraph_perf

StateGraph: Any = langgraph_perf.StateGraph

if os.environ.get("PERF_SUITE", "plain") == "wrapped":
    numbers = itertools.count()
    policy = langgraph_perf.CachePolicy(key=lambda state: next(numbers), version="suite")

    class _Wrapped(langgraph_perf.StateGraph[StateT, ContextT, InputT, OutputT]):
        def compile(self, checkpointer: Any = None, *, cache: Any = None, **kwargs: Any) -> Any:
            for spec in self.nodes.values():
                if spec.cache_policy is None and not spec.is_error_handler:
                    spec.cache_policy = policy  # type: ignore[assignment]
            return super().compile(
                checkpointer, cache=cache or langgraph_perf.MemoryCache(), **kwargs
            )

    _Wrapped.__name__ = _Wrapped.__qualname__ = "StateGraph"
    StateGraph = _Wrapped

langgraph.graph.StateGraph = StateGraph
langgraph.graph.message.StateGraph = StateGraph  # type: ignore[attr-defined]
langgraph.graph.state.StateGraph = StateGraph
