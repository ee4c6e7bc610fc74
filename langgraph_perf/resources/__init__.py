"""Resources that nodes lease: pooled, shared, keyed, or somebody else's.

Read it downwards: ``registry`` leases several resources at once; ``pool``, ``shared``, ``keyed``
and ``context`` are what users make; ``_lease`` drives, blocking or awaiting, what a core
(``_core``, ``_exclusive``, ``_shared``) decides; ``_work`` runs the users' functions; ``_reaper``
closes what is idle for too long.
"""

from langgraph_perf.resources._stats import ResourceStats
from langgraph_perf.resources.context import FromContext
from langgraph_perf.resources.keyed import MAX_OVERTAKE_SECONDS, Keyed
from langgraph_perf.resources.pool import Pool
from langgraph_perf.resources.registry import AsyncLeases, Leases, Registry
from langgraph_perf.resources.resource import Resource
from langgraph_perf.resources.shared import Shared
from langgraph_perf.resources.use import Use, Want

__all__ = [
    "MAX_OVERTAKE_SECONDS",
    "AsyncLeases",
    "FromContext",
    "Keyed",
    "Leases",
    "Pool",
    "Registry",
    "Resource",
    "ResourceStats",
    "Shared",
    "Use",
    "Want",
]
