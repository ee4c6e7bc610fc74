"""Safe, declarative caching and resources for LangGraph nodes."""

from langgraph_perf.caches.disk import DiskCache
from langgraph_perf.caches.memory import MemoryCache
from langgraph_perf.caches.tiered import TieredCache
from langgraph_perf.errors import (
    CacheMiss,
    ConfigurationError,
    LangGraphPerfError,
)
from langgraph_perf.graph import StateGraph
from langgraph_perf.items import get_cache
from langgraph_perf.policy import CacheControl, CachePolicy

__version__ = "0.1.0"

__all__ = [
    "CacheControl",
    "CacheMiss",
    "CachePolicy",
    "ConfigurationError",
    "DiskCache",
    "LangGraphPerfError",
    "MemoryCache",
    "StateGraph",
    "TieredCache",
    "get_cache",
]
