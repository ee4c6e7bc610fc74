"""Every error this library raises on purpose.

::

    LangGraphPerfError
    ├── ConfigurationError (also ValueError)   a policy, cache, resource or cache_control is wrong
    ├── CacheMiss (also LookupError)           mode "only" met a call that is not stored
    ├── CacheClosed                            a closed cache was to tell others of a change
    └── ResourceError                          a resource could not be leased
        ├── PoolTimeout (also TimeoutError)    nothing came free in time
        ├── PoolClosed                         the pool was closed
        ├── TooManyWaiting                     the queue is at ``max_waiting``
        └── LeaseError                         a lease was used or given back twice

A failing cache backend raises none of them: the cache fails open, the run goes on uncached. But
``invalidate`` and ``clear`` raise whatever keeps them from being carried out.
"""

from __future__ import annotations


class LangGraphPerfError(Exception):
    """Base of every error of this library."""


class ConfigurationError(LangGraphPerfError, ValueError):
    """What was declared cannot work: names the field, what was given and what is accepted."""


class CacheMiss(LangGraphPerfError, LookupError):
    """``mode="only"`` forbids to run the node, and its result is not stored.

    Attributes:
        node: name of the node that would have had to run.
    """

    def __init__(self, node: str, message: str | None = None) -> None:
        super().__init__(
            message
            or f"node {node!r}: no stored result, and cache_control mode 'only' forbids running it"
        )
        self.node = node


class CacheClosed(LangGraphPerfError):
    """``invalidate``, ``clear`` or ``ping`` on a closed cache, whose entries others still see."""


class ResourceError(LangGraphPerfError):
    """A resource could not be leased or given back."""


class PoolTimeout(ResourceError, TimeoutError):
    """No resource came free within ``timeout`` seconds."""


class PoolClosed(ResourceError):
    """The pool is closed; it hands out nothing any more."""


class TooManyWaiting(ResourceError):
    """``max_waiting`` callers are already queueing."""


class LeaseError(ResourceError):
    """A lease is one-shot: it was released, or entered, a second time."""
