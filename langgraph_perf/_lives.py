"""Removing and copying what threads and runs own, in every cache that a graph uses."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from langgraph.cache.base import Namespace

from langgraph_perf._backend import Backend, owner_tag
from langgraph_perf._binding import BINDING, Binding, owner_forgotten
from langgraph_perf._owner import DEAD, made_in, run_id_of, thread_namespace
from langgraph_perf.caches.base import Cache

logger = logging.getLogger("langgraph_perf")


class Lives:
    """The threads of one graph, as its caches know them.

    An explicit order to remove something does not fail open: what a cache raises, the caller gets.

    Args:
        backends: gives the caches of the graph and of the graphs inside it.
        in_threads: whether a run that starts with this binding may store what a thread owns.
        tags: gives the tags that what threads own depends on besides, of the graph's nodes.
    """

    def __init__(
        self,
        backends: Callable[[], Iterable[Backend]],
        in_threads: Callable[[Binding], bool],
        tags: Callable[[], Sequence[str]],
    ) -> None:
        self._backends = backends
        self._in_threads = in_threads
        self._tags = tags

    @property
    def closed(self) -> bool:
        """Whether all its caches are closed, so that nobody uses them here any more."""
        backends = list(self._backends())
        return bool(backends) and all(backend.cache._closed for backend in backends)

    @property
    def _caches(self) -> list[Cache]:
        return [backend.cache for backend in self._backends() if backend.cache.supports_tags]

    def _forgotten(self, threads: Sequence[str]) -> tuple[list[Namespace], list[str]]:
        """The namespaces and tags of ``threads``, once the runs of this process know."""
        namespaces = [thread_namespace(str(thread)) for thread in threads]
        tags = [owner_tag(namespace) for namespace in namespaces]
        for backend in self._backends():
            for tag in tags:
                owner_forgotten(backend, tag)
        return namespaces, tags

    def forget(self, threads: Sequence[str]) -> None:
        """Remove what these threads own."""
        namespaces, tags = self._forgotten(threads)
        with at_the_end() as failures:
            for cache in self._caches if namespaces else ():
                with kept(failures):
                    # first the tags: who stores something from now on sees that it is too late
                    cache.drop_tags(tags)
                    cache.clear(namespaces)

    async def aforget(self, threads: Sequence[str]) -> None:
        """Like ``forget``, without blocking the event loop."""
        namespaces, tags = self._forgotten(threads)
        with at_the_end() as failures:
            for cache in self._caches if namespaces else ():
                with kept(failures):
                    await cache.adrop_tags(tags)
                    await cache.aclear(namespaces)

    def forget_runs(self, runs: Sequence[str], threads: Sequence[str]) -> None:
        """Remove what these threads own of these runs; of other threads it is never served again,
        and goes when it expires, is evicted, or its thread goes."""
        tags = [made_in(str(run)) for run in runs]
        with at_the_end() as failures:
            for cache in self._caches if runs else ():
                with kept(failures):
                    cache.drop_tags(tags)
                    for thread in threads:
                        cache.purge(thread_namespace(str(thread)))

    async def aforget_runs(self, runs: Sequence[str], threads: Sequence[str]) -> None:
        """Like ``forget_runs``, without blocking the event loop."""
        tags = [made_in(str(run)) for run in runs]
        with at_the_end() as failures:
            for cache in self._caches if runs else ():
                with kept(failures):
                    await cache.adrop_tags(tags)
                    for thread in threads:
                        await cache.apurge(thread_namespace(str(thread)))

    def copy(self, source: str, target: str) -> None:
        """Give ``target`` a copy of what ``source`` owns; what fails is computed again."""
        for cache in self._caches:
            old, new = thread_namespace(str(source)), thread_namespace(str(target))
            tag = owner_tag(new)
            try:
                (token,) = cache.tag_tokens([tag])
                cache.copy(old, new, {owner_tag(old): (tag, token)})
            except Exception as exc:
                _not_copied(cache, exc)

    async def acopy(self, source: str, target: str) -> None:
        """Like ``copy``, without blocking the event loop."""
        for cache in self._caches:
            old, new = thread_namespace(str(source)), thread_namespace(str(target))
            tag = owner_tag(new)
            try:
                (token,) = await cache.atag_tokens([tag])
                await cache.acopy(old, new, {owner_tag(old): (tag, token)})
            except Exception as exc:
                _not_copied(cache, exc)

    # -- when a run starts ----------------------------------------------------------------------

    def started(self, config: Any) -> None:
        """A run reads its thread's checkpoint: whatever is forgotten from now on, it must know."""
        for binding, backend, tags in self._unpinned(config):
            _pin(binding, backend, tags, backend.tokens(tags))

    async def astarted(self, config: Any) -> None:
        """Like ``started``, without blocking the event loop."""
        for binding, backend, tags in self._unpinned(config):
            _pin(binding, backend, tags, await backend.atokens(tags))

    def _unpinned(self, config: Any) -> list[tuple[Binding, Backend, list[str]]]:
        conf = config.get("configurable") or {}
        binding, thread = conf.get(BINDING), conf.get("thread_id")
        if not isinstance(binding, Binding) or thread is None or not self._in_threads(binding):
            return []
        tag, run_id = owner_tag(thread_namespace(str(thread))), run_id_of(config)
        tags = [tag, *self._tags(), *([] if run_id is None else [made_in(run_id)])]
        backends = {*self._backends(), *([binding.backend] if binding.backend else ())}
        return [
            (binding, backend, tags)
            for backend in backends
            if backend.cache.supports_tags and (backend, tag) not in binding.pins
        ]


def _pin(
    binding: Binding, backend: Backend, tags: Sequence[str], tokens: Sequence[str] | None
) -> None:
    """Have the run go by these tokens, the owner's first; without it, it stores nothing there."""
    for tag, token in zip(tags, tokens or (DEAD,), strict=False):
        binding.pins.setdefault((backend, tag), token)


@contextmanager
def at_the_end() -> Iterator[list[Exception]]:
    """One cache that fails must not keep the others from being told: errors are raised after."""
    failures: list[Exception] = []
    yield failures
    for failure in failures:
        raise failure


@contextmanager
def kept(failures: list[Exception]) -> Iterator[None]:
    try:
        yield
    except Exception as exc:
        failures.append(exc)


def _not_copied(cache: Cache, exc: Exception) -> None:
    logger.warning(
        "the results of a copied thread are computed again: copying them in %s failed: %s: %s",
        type(cache).__name__,
        type(exc).__name__,
        exc,
    )
