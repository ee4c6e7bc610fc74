"""What every cache shares: entries, tag tokens, leases, and LangGraph's ``BaseCache`` on top.

A cache stores *entries*: opaque payload bytes with what is needed to decide whether they may be
served. The public methods (LangGraph's ``BaseCache`` and ``invalidate``) are written once here on
top of a handful of primitives that a backend implements.

Tags work by *tokens*. Each tag has one random token in the backend, made when it is first asked
for. An entry records the tokens its tags had **before** its computation began; it is served only
while every one of them is still current. Invalidating a tag drops its token: O(1), and whatever
was being computed meanwhile carries a dead token. A lost token (evicted, crashed) can only turn
hits into misses, never the other way round.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, ClassVar, NamedTuple, TypeVar

from langgraph.cache.base import BaseCache, FullKey, Namespace
from langgraph.checkpoint.serde.base import SerializerProtocol
from typing_extensions import Self

T = TypeVar("T")
logger = logging.getLogger("langgraph_perf")


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored result.

    Attributes:
        payload: the encoded value; opaque to caches.
        created: unix seconds when the value was stored.
        expires: unix seconds after which it is a miss; ``None`` never.
        deps: ``(tag, token)`` pairs taken before the computation began.
        seconds: how long the computation took, which is what a hit saves.
        tokens: language-model tokens the computation spent.
    """

    payload: bytes
    created: float
    expires: float | None = None
    deps: tuple[tuple[str, str], ...] = ()
    seconds: float = 0.0
    tokens: int = 0


class Lookup(NamedTuple):
    """What to look for: ``max_age`` (seconds) narrows the entry's own expiry."""

    key: FullKey
    tags: tuple[str, ...] = ()
    max_age: float | None = None


@dataclass(slots=True)
class Lease:
    """The right to compute one key, held across processes until ``expires`` (unix seconds).

    ``token`` is the fence: a write that carries a token which is no longer the holder's is refused.
    """

    key: FullKey
    token: str
    expires: float
    lost: bool = field(default=False)
