"""Safe, declarative caching and resources for LangGraph nodes."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from langgraph_perf.errors import (
    CacheClosed,
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

if TYPE_CHECKING:
    from langgraph_perf.caches.disk import DiskCache
    from langgraph_perf.caches.memory import MemoryCache
    from langgraph_perf.caches.redis import RedisCache
    from langgraph_perf.caches.tiered import TieredCache
    from langgraph_perf.resources import FromContext, Keyed, Pool, Shared, Use

__version__ = "0.1.0"

__all__ = [
    "CacheClosed",
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
    "RedisCache",
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

if find_spec("redis") is None:
    # ``import *`` imports all of them; by its name it can be asked for, and says what is missing
    # (type checkers, which would understand ``remove``, know it all the same)
    globals()["__all__"] = [name for name in __all__ if name != "RedisCache"]

# imported when they are first asked for: a graph needs one cache, and often no resources
_LATER = {
    "DiskCache": "caches.disk",
    "MemoryCache": "caches.memory",
    "RedisCache": "caches.redis",
    "TieredCache": "caches.tiered",
    **dict.fromkeys(("FromContext", "Keyed", "Pool", "Shared", "Use"), "resources"),
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
