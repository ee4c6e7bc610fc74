"""What LangGraph runs in the place of a node that has a policy."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from langchain_core.callbacks.base import BaseCallbackManager
from langchain_core.runnables import Runnable, RunnableConfig, RunnableSequence
from langchain_core.runnables.config import ensure_config

# private names of LangGraph, each with a test in tests/test_langgraph_internals.py
from langgraph._internal._runnable import RunnableSeq

from langgraph_perf._attempt import Attempt
from langgraph_perf._drive import adrive, adrive_stream, drive, drive_stream
from langgraph_perf._identity import NodeSpec
from langgraph_perf._patience import waiting


class CachedNode(Runnable[Any, Any]):
    """Runs in the place of a node's runnable."""

    def __init__(self, bound: Runnable[Any, Any], spec: NodeSpec) -> None:
        self.bound = bound
        self.spec = spec
        self.name = getattr(bound, "name", None)
        # LangGraph runs the steps of a sequence as steps of the node, without a run of their own
        self.steps: Sequence[Runnable[Any, Any]] = (
            bound.steps if isinstance(bound, RunnableSequence | RunnableSeq) else [bound]
        )

    # -- running ----------------------------------------------------------------------------------

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """Answer from the cache, or run the node."""
        attempt = self._attempt(input, config, kwargs)
        call = attempt.take_call()
        if call is None:
            return attempt.counted(attempt.invoke())
        return drive(call, attempt.invoke, attempt.caller)

    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """Like ``invoke``, without blocking the event loop."""
        attempt = self._attempt(input, config, kwargs)
        call = attempt.take_call()
        if call is None:
            return attempt.counted(await attempt.ainvoke())
        return await adrive(call, attempt.ainvoke, attempt.caller)

    def stream(
        self, input: Any, config: RunnableConfig | None = None, **kwargs: Any | None
    ) -> Iterator[Any]:
        """Stream the node's output; a stored result comes in one piece."""
        attempt = self._attempt(input, config, kwargs)
        call = attempt.take_call()
        if call is None:
            chunks, finish = attempt.stream()
            yield from chunks
            attempt.counted(finish())
        else:
            yield from drive_stream(call, attempt.stream, attempt.caller)

    async def astream(
        self, input: Any, config: RunnableConfig | None = None, **kwargs: Any | None
    ) -> AsyncIterator[Any]:
        """Like ``stream``, without blocking the event loop."""
        attempt = self._attempt(input, config, kwargs)
        call = attempt.take_call()
        if call is None:
            chunks, finish = attempt.astream()
            async for chunk in chunks:
                yield chunk
            attempt.counted(finish())
        else:
            async for chunk in adrive_stream(call, attempt.astream, attempt.caller):
                yield chunk

    def _attempt(
        self, input: Any, config: RunnableConfig | None, kwargs: dict[str, Any]
    ) -> Attempt:
        config = config or ensure_config()
        attempt: Attempt | None = kwargs.pop(_ATTEMPT, None)
        if attempt is None:
            attempt = Attempt(self, input, config, kwargs)
            attempt.prepare()
        else:
            attempt.config = config
        return attempt


_ATTEMPT = "langgraph_perf_attempt"


class CachedSeq(RunnableSeq):
    """The node and its writers, as LangGraph puts them together.

    While nobody listens to callbacks, a hit skips the bookkeeping of a run that nobody would see
    and goes straight to the writers, which decide where the graph goes next.

    Args:
        derived: the sequence LangGraph made of the node and its writers.
        node: what takes the place of the node in it.
        writers: the writers.
    """

    def __init__(
        self, derived: RunnableSeq, node: CachedNode, writers: Sequence[Runnable[Any, Any]]
    ) -> None:
        self.__dict__.update(derived.__dict__)  # names and tracing, whatever LangGraph keeps there
        self.steps = [node, *writers]

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """Answer from the cache, or run the node; then write."""
        attempt = self._unobserved(input, config, kwargs)
        if attempt is not None and attempt.call is not None:
            call = attempt.call
            with waiting(call.patience):
                entry = call.backend.read(call.lookup)
            found = attempt.looked_up(entry)
            if found is not None:
                for writer in self.steps[1:]:
                    writer.invoke(found.value, config)
                return found.value
        return super().invoke(input, config, **kwargs)

    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """Like ``invoke``, without blocking the event loop."""
        attempt = self._unobserved(input, config, kwargs)
        if attempt is not None and attempt.call is not None:
            call = attempt.call
            with waiting(call.patience):
                entry = await call.backend.aread(call.lookup)
            found = attempt.looked_up(entry)
            if found is not None:
                for writer in self.steps[1:]:
                    await writer.ainvoke(found.value, config)
                return found.value
        return await super().ainvoke(input, config, **kwargs)

    def _unobserved(
        self, input: Any, config: RunnableConfig | None, kwargs: dict[str, Any]
    ) -> Attempt | None:
        """The attempt, handed on to the node through ``kwargs``; ``None`` if somebody listens."""
        if config is None or kwargs:
            return None
        callbacks = config.get("callbacks")
        if isinstance(callbacks, BaseCallbackManager) and (
            callbacks.handlers or callbacks.inheritable_handlers
        ):
            return None
        node = self.steps[0]
        assert isinstance(node, CachedNode)
        attempt = kwargs[_ATTEMPT] = Attempt(node, input, config, {})
        attempt.prepare()
        if attempt.call is not None and attempt.call.mode == "refresh":
            return None
        return attempt
