"""Safe, declarative caching and resources for LangGraph nodes."""

from langgraph_perf.caches.disk import DiskCache
from langgraph_perf.caches.memory import MemoryCache
from langgraph_perf.caches.tiered import TieredCache
from langgraph_perf.errors import (
    CacheMiss,
    ConfigurationError,
    LangGraphPerfError,
    LeaseError,
    PoolClosed,
    PoolTimeout,
    ResourceError,
    TooManyWaiting,
)
from langgraph_perf.graph import StateGraph
from langgraph_perf.items import get_cache
from langgraph_perf.leases import alease, lease
from langgraph_perf.policy import CacheControl, CachePolicy
from langgraph_perf.resources import FromContext, Keyed, Pool, Shared, Use

__version__ = "0.1.0"

__all__ = [
    "CacheControl",
    "CacheMiss",
    "CachePolicy",
    "ConfigurationError",
    "DiskCache",
    "FromContext",
    "Keyed",
    "LangGraphPerfError",
    "LeaseError",
    "MemoryCache",
    "Pool",
    "PoolClosed",
    "PoolTimeout",
    "ResourceError",
    "Shared",
    "StateGraph",
    "TieredCache",
    "TooManyWaiting",
    "Use",
    "alease",
    "get_cache",
    "lease",
]
