"""``get_cache``: a cache for work finer than a node, on the tiers of the graph that runs it."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import var_child_runnable_config
from langgraph.cache.base import FullKey

from langgraph_perf import keys
from langgraph_perf._binding import BINDING, SCOPE, Binding
from langgraph_perf._call import load
from langgraph_perf._drive import NOBODY, adrive, drive
from langgraph_perf._flight import Flight, held_flights
from langgraph_perf._gathering import (
    Gathering,
    gatherings,
    narrowed,
    part_of,
)
from langgraph_perf._identity import call_marks, call_owner
from langgraph_perf._joint import adrive_many, drive_many
from langgraph_perf._patience import waiting
from langgraph_perf._place import NOWHERE, Place
from langgraph_perf._sealing import Seal
from langgraph_perf._steps import Call, Done, Raised, Ran
from langgraph_perf._watch import Watch, current_config
from langgraph_perf.caches.base import TEMPLATE, Entry, Lookup, tag_id
from langgraph_perf.codec import DecodeError, EncodeError
from langgraph_perf.errors import CacheMiss, ConfigurationError
from langgraph_perf.policy import CacheControl, narrowest_scope, seconds, shortest
from langgraph_perf.stats import NodeCounters

K = TypeVar("K")
T = TypeVar("T")
logger = logging.getLogger("langgraph_perf")


def get_cache(namespace: str, config: RunnableConfig | None = None) -> ItemCache:
    """The item cache called ``namespace``, inside a node.

    Entries live in the cache that the graph was compiled with and are shared by all graphs that
    use the same name on it: nothing of the run or of the code is in their keys but the name and the
    key that they are given. Outside a run, or without a compiled cache, it just computes. The
    run's ``cache_control`` for the node applies to its items too, and items made in a node whose
    results belong to a thread or run (``scope=``) belong to it as well.

    Args:
        namespace: names the kind of work, such as ``"embeddings"``.
        config: the node's config; needed only where LangGraph cannot pass it along by itself
            (async nodes on Python 3.10).

    Raises:
        ConfigurationError: ``namespace`` is not a non-empty string.
    """
    if not isinstance(namespace, str) or not namespace:
        raise ConfigurationError(
            f"get_cache(namespace): got {namespace!r}; accepted: a non-empty string"
        )
    config = config or var_child_runnable_config.get() or {}
    binding: Binding | None = (config.get("configurable") or {}).get(BINDING)
    if binding is None or binding.backend is None:
        return ItemCache(namespace, NOWHERE, _NO_CONTROL, NodeCounters())
    conf, metadata = config.get("configurable") or {}, config.get("metadata") or {}
    control = binding.control.for_node(metadata.get("langgraph_node", ""))
    # what a node makes for one thread its items are made for
    scope = narrowest_scope(conf.get(SCOPE) or "global", control.scope)
    owner = call_owner(f"get_cache({namespace!r})", scope, conf, binding)
    place = Place(
        binding.backend,
        owner,
        call_marks(owner, config),
        Seal.of(binding.serde, binding.backend.cache),
        scope,
        part_of(conf),
        conf,
        binding.patience if binding.backend.cache.blocking else None,
        binding.types,
    )
    narrowed(place.around, scope)
    return ItemCache(namespace, place, control, binding.items.of(namespace), config)


class ItemCache:
    """What ``get_cache`` returns.

    Keys are any values that can be keyed (strings, numbers, tuples, dataclasses …), values any
    that can be stored; one that cannot is computed each time and logged once.
    """

    def __init__(
        self,
        namespace: str,
        place: Place,
        control: CacheControl,
        counters: NodeCounters,
        config: RunnableConfig | None = None,
    ) -> None:
        self.namespace = namespace
        self._place = place
        self._backend = place.backend
        self._control = control
        self._counters = counters
        self._config = config
        # a thread that the node starts by itself does not know them any more
        self._held = held_flights.get()
        self._leading: list[Flight] = []

    def get_or_set(
        self,
        key: Any,
        compute: Callable[[], T],
        *,
        ttl: float | timedelta | None = None,
        tags: Sequence[str] = (),
    ) -> T:
        """The stored value of ``key``, or what ``compute()`` returns, stored for next time.

        Of several callers at once, one computes. Nothing is stored when ``compute`` raises.

        Args:
            ttl: how long the value may be served, in seconds or as a ``timedelta``.
            tags: names it depends on, for ``cache.invalidate``.
        """
        _require_callable("get_or_set(compute=)", compute)
        call = self._call(key, ttl, tags)
        if call is None:
            return _not_awaitable(compute())

        watch = Watch()

        def body() -> Ran:
            with self._watched(watch):
                started = time.perf_counter()
                value = _not_awaitable(compute())
            return Ran(value, time.perf_counter() - started, watch.taint or self._place.taint)

        return drive(call, body, NOBODY)  # type: ignore[no-any-return]

    async def aget_or_set(
        self,
        key: Any,
        compute: Callable[[], Awaitable[T]],
        *,
        ttl: float | timedelta | None = None,
        tags: Sequence[str] = (),
    ) -> T:
        """Like ``get_or_set``, awaiting ``compute()``."""
        _require_callable("aget_or_set(compute=)", compute)
        call = self._call(key, ttl, tags)
        if call is None:
            return await _awaitable("aget_or_set", compute())

        watch = Watch()

        async def body() -> Ran:
            with self._watched(watch):
                started = time.perf_counter()
                value = await _awaitable("aget_or_set", compute())
            return Ran(value, time.perf_counter() - started, watch.taint or self._place.taint)

        return await adrive(call, body, NOBODY)  # type: ignore[no-any-return]

    def get_or_set_many(
        self,
        keys: Sequence[K],
        compute_many: Callable[[list[K]], Sequence[T]],
        *,
        ttl: float | timedelta | None = None,
        tags: Sequence[str] = (),
    ) -> list[T]:
        """One value for each of ``keys``, in order.

        ``compute_many`` is called with the keys that are not stored, each once, and returns their
        values in the same order. Keys that others compute are left to them, so it is called at
        most once; unless one of the others fails: then once more, for what that one owed.

        Raises:
            ValueError: ``compute_many`` returned another number of values than it got keys.
            ConfigurationError: it returned what has no order, such as a dict.
        """
        _require_callable("get_or_set_many(compute_many=)", compute_many)
        batch = _Batch(self, keys, ttl, tags)
        if batch.lookups:
            assert self._backend is not None
            with waiting(self._place.patience):
                batch.found(self._backend.read_many(batch.lookups))

        def body(numbers: Sequence[int]) -> list[Ran]:
            started = time.perf_counter()
            missing = batch.missing(numbers)
            with self._watched(batch.watch):
                values = compute_many(missing)
            return batch.computed(numbers, values, time.perf_counter() - started)

        batch.take(drive_many(batch.calls, body))
        if batch.uncached:
            body([])
        return batch.values

    async def aget_or_set_many(
        self,
        keys: Sequence[K],
        compute_many: Callable[[list[K]], Awaitable[Sequence[T]]],
        *,
        ttl: float | timedelta | None = None,
        tags: Sequence[str] = (),
    ) -> list[T]:
        """Like ``get_or_set_many``, awaiting ``compute_many``."""
        _require_callable("aget_or_set_many(compute_many=)", compute_many)
        batch = _Batch(self, keys, ttl, tags)
        if batch.lookups:
            assert self._backend is not None
            with waiting(self._place.patience):
                batch.found(await self._backend.aread_many(batch.lookups))

        async def body(numbers: Sequence[int]) -> list[Ran]:
            started = time.perf_counter()
            missing = batch.missing(numbers)
            with self._watched(batch.watch):
                values = await _awaitable("aget_or_set_many", compute_many(missing))
            return batch.computed(numbers, values, time.perf_counter() - started)

        batch.take(await adrive_many(batch.calls, body))
        if batch.uncached:
            await body([])
        return batch.values

    # -- inside -----------------------------------------------------------------------------------

    @property
    def _around(self) -> tuple[Gathering, ...]:
        # a thread that the node starts by itself has no context of its caller's
        here = gatherings.get()
        return (*self._place.around, *[known for known in here if known not in self._place.around])

    def _watched(self, watch: Watch) -> AbstractContextManager[None]:
        return current_config(watch.over(self._config) if self._config else None)

    def _call(self, key: Any, ttl: float | timedelta | None, tags: Sequence[str]) -> Call | None:
        limit = seconds("get_or_set(ttl=)", ttl)
        lookup = self._lookup(key, self._tags(tags), limit)
        return None if lookup is None else self._call_for(lookup)

    def _call_for(self, lookup: Lookup, looked: bool = False) -> Call:
        assert self._backend is not None
        return Call(
            name=f"get_cache({self.namespace!r})",
            backend=self._backend,
            counters=self._counters,
            key=lookup.key,
            tags=lookup.tags,
            mode=self._control.mode,
            max_age=lookup.max_age,
            ttl=shortest(lookup.max_age, self._place.expires),
            jitter=0.0,
            load=partial(self._place.load, lookup.key[1]),
            dump=partial(self._place.dump, lookup.key[1]),
            refuse=_store_all,
            spent=_no_tokens,
            on_hit=_unseen,
            held=held_flights.get() or self._held,
            suspects=self._leading,
            looked=looked,
            scope=self._place.scope,
            owner=self._place.owner,
            marks=self._place.marks,
            around=self._around,
            patience=self._place.patience,
        )

    def _tags(self, tags: Sequence[str]) -> tuple[str, ...]:
        if isinstance(tags, str) or not all(isinstance(tag, str) for tag in tags):
            raise ConfigurationError(f"tags: got {tags!r}; accepted: a list of strings")
        if tags and self._backend is not None and not self._backend.cache.supports_tags:
            raise ConfigurationError(
                f"tags: {type(self._backend.cache).__name__} cannot invalidate by tag; accepted: "
                "no tags, or compile(cache=) with MemoryCache, DiskCache or TieredCache"
            )
        for tag in tags:
            if TEMPLATE.search(tag):
                raise ConfigurationError(
                    f"tags: got {tag!r}, but items have no fields to fill in; accepted: the tag "
                    "itself, as in f\"user:{state['user_id']}\""
                )
        own = () if self._place.owner is None else (self._place.owner.tag,)
        return (*sorted({tag_id(tag) for tag in tags}), *own)

    def _lookup(self, key: Any, tags: tuple[str, ...], ttl: float | None) -> Lookup | None:
        """Where ``key`` is kept; ``None``: it is not."""
        if self._backend is None:
            return None
        if self._control.mode == "bypass":
            self._counters.refused("bypassed")
            return None
        if self._place.owner is not None and not self._backend.cache.supports_tags:
            self._counters.refused("tags_unsupported")
            return None
        patience = self._place.patience
        if patience is not None and patience.is_over(self._backend.cache.timeout):
            self._counters.refused("slow_cache")
            if self._control.mode == "only":
                raise CacheMiss(self.namespace, "mode 'only', and the cache is slow")
            return None
        max_age = shortest(ttl, self._control.ttl)  # type: ignore[arg-type]
        try:
            return self._place.lookup(self.namespace, key, tags, max_age)
        except keys.Unkeyable as exc:
            first = self._counters.refused("unkeyable")
            if first:
                logger.warning("get_cache(%r) computes uncached: %s", self.namespace, exc)
            if self._control.mode == "only":
                raise CacheMiss(self.namespace, f"mode 'only', and {exc}") from None
            return None


def _require_callable(where: str, compute: object) -> None:
    if not callable(compute):
        raise ConfigurationError(
            f"{where}: got {compute!r}; accepted: a function, which is called on a miss"
        )


def _awaitable(where: str, value: Awaitable[T]) -> Awaitable[T]:
    if not inspect.isawaitable(value):
        raise ConfigurationError(
            f"{where}(compute): got a plain function, which returned a {type(value).__name__}; "
            f"accepted: an async function, or {where[1:]} for a plain one"
        )
    return value


def _require_keys(keys: object) -> None:
    if not hasattr(keys, "__iter__") and not hasattr(keys, "__getitem__"):
        raise ConfigurationError(
            f"get_or_set_many(keys): got {keys!r:.100}; accepted: a list of keys"
        )
    if isinstance(keys, str | bytes):
        raise ConfigurationError(
            f"get_or_set_many(keys): got {keys!r:.100}; accepted: a list of keys; did you mean "
            f"[{keys!r:.100}]?"
        )


def _require_values(namespace: str, values: object) -> None:
    # an array of numpy, say, is as good as a list; what has no order of its own is not
    unordered = isinstance(values, str | bytes | Mapping | Set)
    if unordered or not (hasattr(values, "__len__") and hasattr(values, "__getitem__")):
        raise ConfigurationError(
            f"compute_many of get_cache({namespace!r}) returned a {type(values).__name__}; "
            "accepted: a list with the values in the order of the keys"
        )


def _not_awaitable(value: T) -> T:
    if inspect.iscoroutine(value):
        value.close()
        raise ConfigurationError(
            "get_or_set(compute=): got a coroutine function; accepted: a plain function, or "
            "aget_or_set in async code"
        )
    return value


class _Batch:
    """The state of one ``get_or_set_many``.

    Attributes:
        values: what it returns.
        lookups: what to look up first.
        uncached: the positions of keys that are computed each time, until they have been.
        calls: what is left to get for the others.
    """

    def __init__(
        self,
        cache: ItemCache,
        keys: Sequence[Any],
        ttl: float | timedelta | None,
        tags: Sequence[str],
    ) -> None:
        _require_keys(keys)
        self._cache = cache
        self._keys = list(keys)
        limit = seconds("get_or_set_many(ttl=)", ttl)
        tag_ids = cache._tags(tags)
        self.watch = Watch()
        self.values: list[Any] = [None] * len(self._keys)
        self.uncached: list[int] = []
        self._places: dict[FullKey, list[int]] = {}
        missed: list[Lookup] = []
        for position, key in enumerate(self._keys):
            lookup = cache._lookup(key, tag_ids, limit)
            if lookup is None:  # nothing tells whether two such keys are equal: each is its own
                self.uncached.append(position)
            elif lookup.key in self._places:
                self._places[lookup.key].append(position)
            else:
                self._places[lookup.key] = [position]
                missed.append(lookup)
        if self.uncached and cache._control.mode == "only":
            raise CacheMiss(cache.namespace)
        self.lookups = missed if cache._control.mode != "refresh" else []
        self.calls = [cache._call_for(lookup) for lookup in missed]

    def found(self, entries: Sequence[Entry | None]) -> None:
        """Take what is stored."""
        left = []
        for call, entry in zip(self.calls, entries, strict=True):
            served = None if entry is None else load(call, entry, "hit")
            if served is None:
                call.looked = True
                left.append(call)
            else:
                self._put(call, served.value)
        self.calls = left

    def missing(self, numbers: Sequence[int]) -> list[Any]:
        """The keys to compute: those of these calls, and what has none."""
        first = [self._places[self.calls[number].key][0] for number in numbers]
        return [self._keys[position] for position in (*first, *self.uncached)]

    def computed(self, numbers: Sequence[int], values: Sequence[Any], took: float) -> list[Ran]:
        """Take the values of ``missing``; returns those of the calls."""
        _require_values(self._cache.namespace, values)
        count = len(numbers) + len(self.uncached)
        if len(values) != count:
            raise ValueError(
                f"compute_many of get_cache({self._cache.namespace!r}) got {count} keys "
                f"and returned {len(values)} values; it must return one value for each key"
            )
        taint = self.watch.taint or self._cache._place.taint
        for position, value in zip(self.uncached, values[len(numbers) :], strict=True):
            self._cache._counters.miss()
            self._cache._counters.ran(took / count, 0)
            self.values[position] = value
        self.uncached = []
        return [Ran(values[index], took / count, taint) for index in range(len(numbers))]

    def take(self, done: Sequence[Done | None]) -> None:
        """Take what became of the calls.

        Raises:
            CacheMiss: nothing may be computed, and something is not stored.
        """
        for call, each in zip(self.calls, done, strict=True):
            if isinstance(each, Raised):
                raise each.error
            assert each is not None
            self._put(call, each.value)

    def _put(self, call: Call, value: Any) -> None:
        first, *again = self._places[call.key]
        self.values[first] = value
        if again:
            copied = _copies(call, value)
            for position in again:
                self.values[position] = copied()


def _copies(call: Call, value: Any) -> Callable[[], Any]:
    """Gives, each time, what one more call for the same key would get; ``value`` itself where it
    cannot be stored."""
    try:
        payload = call.dump(value)
        call.load(payload)
    except (EncodeError, DecodeError):
        return lambda: value
    return lambda: call.load(payload)


def _store_all(value: Any) -> None:
    return None


def _no_tokens(value: Any) -> int:
    return 0


def _unseen(entry: Entry) -> None:
    return None


_NO_CONTROL = CacheControl()
