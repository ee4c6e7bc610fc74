"""What wraps a node: it decides for each call whether and how the cache takes part."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.callbacks.base import BaseCallbackManager
from langchain_core.outputs import LLMResult
from langchain_core.runnables import Runnable, RunnableConfig, RunnableSequence
from langchain_core.runnables.config import ensure_config, var_child_runnable_config
from langchain_core.tracers.base import BaseTracer

# Private names of LangGraph, each with a test in tests/test_langgraph_internals.py
from langgraph._internal._constants import (
    CONFIG_KEY_RESUMING,
    CONFIG_KEY_RUNTIME,
    CONFIG_KEY_SCRATCHPAD,
)
from langgraph._internal._runnable import RunnableSeq
from langgraph.pregel._utils import _runnable_has_native_async

from langgraph_perf import keys, replay
from langgraph_perf._binding import BINDING, Binding
from langgraph_perf._call import Call, Ran, load
from langgraph_perf._drive import Caller, adrive, adrive_stream, drive, drive_stream
from langgraph_perf._flight import held_flights
from langgraph_perf.caches.base import Entry, tag_id
from langgraph_perf.codec import Allowlist
from langgraph_perf.errors import CacheMiss, ConfigurationError
from langgraph_perf.policy import CachePolicy, Scope, narrowest_scope, shortest, template_fields
from langgraph_perf.stats import NodeCounters

logger = logging.getLogger("langgraph_perf")

NAMESPACE = "langgraph_perf"
_MISSING = object()


class Uncached(Exception):
    """This call cannot take part in caching; the node just runs. ``reason`` is what is counted."""

    def __init__(self, reason: str, message: str | None = None) -> None:
        super().__init__(message or reason)
        self.reason = reason
        self.message = message


class NodeSpec:
    """What is known of a cached node before it runs.

    Args:
        graph: the compiled graph's name.
        name: the node's name.
        policy: its policy.
        code: the fingerprint of its code or the policy's ``version``; ``None`` if it has none,
            and then it always runs uncached.
        allowed: the types its results may be made of.
        has_subgraph: whether the node contains a graph that may be resumed inside it.
    """

    def __init__(
        self,
        graph: str,
        name: str,
        policy: CachePolicy,
        code: str | None,
        allowed: Allowlist,
        has_subgraph: bool,
    ) -> None:
        self.graph = graph
        self.name = name
        self.policy = policy
        self.code = code
        self.allowed = allowed
        self.has_subgraph = has_subgraph
        self.namespace = (NAMESPACE, graph, name)
        self.counters = NodeCounters()
        self._warned: set[str] = set()
        self._lock = threading.Lock()

    def warn(self, message: str) -> None:
        """Log a warning, the first time."""
        with self._lock:
            if message in self._warned or len(self._warned) > 100:
                return
            self._warned.add(message)
        logger.warning("node %r runs uncached: %s", self.name, message)


class CachedNode(Runnable[Any, Any]):
    """Runs in the place of a node's runnable."""

    def __init__(self, bound: Runnable[Any, Any], spec: NodeSpec) -> None:
        self.bound = bound
        self.spec = spec
        self.name = getattr(bound, "name", None)
        # LangGraph runs the steps of a sequence as steps of the node, without a run of their own
        is_sequence = isinstance(bound, RunnableSequence | RunnableSeq)
        self._steps: Sequence[Runnable[Any, Any]] = bound.steps if is_sequence else [bound]
        self._uses_executor = not _runnable_has_native_async(bound)

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
    ) -> _Attempt:
        config = config or ensure_config()
        attempt: _Attempt | None = kwargs.pop(_ATTEMPT, None)
        if attempt is None:
            attempt = _Attempt(self, input, config, kwargs)
            attempt.prepare()
        else:
            attempt.config = config
        return attempt


_ATTEMPT = "langgraph_perf_attempt"


class CachedSeq(RunnableSeq):
    """The node and its writers, as LangGraph puts them together.

    While nobody listens to callbacks, a hit skips the bookkeeping of a run that nobody would see
    and goes straight to the writers, which decide where the graph goes next.
    """

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """Answer from the cache, or run the node; then write."""
        attempt = self._unobserved(input, config, kwargs)
        if attempt is not None and attempt.call is not None:
            call = attempt.call
            found = attempt.looked_up(call.backend.read(call.lookup))
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
            found = attempt.looked_up(await call.backend.aread(call.lookup))
            if found is not None:
                for writer in self.steps[1:]:
                    await writer.ainvoke(found.value, config)
                return found.value
        return await super().ainvoke(input, config, **kwargs)

    def _unobserved(
        self, input: Any, config: RunnableConfig | None, kwargs: dict[str, Any]
    ) -> _Attempt | None:
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
        attempt = kwargs[_ATTEMPT] = _Attempt(node, input, config, {})
        attempt.prepare()
        if attempt.call is not None and attempt.call.mode == "refresh":
            return None
        return attempt


class _Attempt:
    """One call of a cached node."""

    __slots__ = (
        "_asked",
        "_started",
        "_usage",
        "call",
        "caller",
        "config",
        "input",
        "kwargs",
        "node",
    )

    def __init__(
        self, node: CachedNode, input: Any, config: RunnableConfig, kwargs: dict[str, Any]
    ) -> None:
        self.node = node
        self.input = input
        self.config = config
        self.kwargs = kwargs
        self.call: Call | None = None
        self.caller = _NOBODY
        self._asked = False
        self._usage: _Usage | None = None
        self._started = 0.0

    # -- before -----------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Decide on ``call``, the call to make; ``None``: just run the node.

        Raises:
            CacheMiss: the node may not run, and the call cannot be looked up.
            ConfigurationError: the policy needs what this run does not have.
        """
        spec = self.node.spec
        conf = self.config.get("configurable") or {}
        binding: Binding | None = conf.get(BINDING)
        try:
            if binding is None or binding.backend is None:
                raise Uncached(
                    "no_cache", "neither its graph nor a parent graph was compiled with cache="
                )
            if self.kwargs:
                raise Uncached("arguments", "it was called with extra arguments")
            self.call, self.caller = self._call(spec, conf, binding)
        except Uncached as exc:
            if binding is not None and binding.control.for_node(spec.name).mode == "only":
                raise CacheMiss(
                    spec.name, f"node {spec.name!r} may not run (mode 'only') and {exc}"
                ) from None
            spec.counters.refused(exc.reason)
            if exc.message is not None:
                spec.warn(exc.message)

    def looked_up(self, entry: Entry | None) -> Ran | None:
        """What a first look at the cache makes of it."""
        assert self.call is not None
        found = None if entry is None else load(self.call, entry, "hit")
        if found is None:
            self.call.looked = True
        else:
            self.call = None
        return found

    def take_call(self) -> Call | None:
        """The call, for whoever makes it: kept here it would make a cycle, and LangGraph counts on
        a finished run being freed at once."""
        call, self.call = self.call, None
        return call

    def _call(
        self, spec: NodeSpec, conf: Mapping[str, Any], binding: Binding
    ) -> tuple[Call, Caller]:
        policy, backend = spec.policy, binding.backend
        assert backend is not None
        control = binding.control.for_node(spec.name)
        if control.mode == "bypass":
            raise Uncached("bypassed")
        if spec.code is None:
            raise Uncached("unkeyable")
        if _resumes(conf, spec.has_subgraph):
            # a human's answer is on its way into this task: it is nobody else's
            raise Uncached("resumed")
        runtime = conf.get(CONFIG_KEY_RUNTIME)
        scope = narrowest_scope(policy.scope, control.scope)
        digest = _key(spec, scope, self.input, runtime, conf, binding)
        tags = _tags(policy, self.input)
        if tags and not backend.cache.supports_tags:
            raise Uncached(
                "tags_unsupported",
                f"its policy has tags, which {type(backend.cache).__name__} cannot invalidate",
            )
        state, allowed = self.input, spec.allowed
        call = Call(
            name=spec.name,
            backend=backend,
            counters=spec.counters,
            key=(spec.namespace, digest),
            tags=tags,
            mode=control.mode,
            max_age=control.ttl,  # type: ignore[arg-type]
            ttl=shortest(policy.ttl, control.ttl),  # type: ignore[arg-type]
            jitter=policy.jitter,
            load=lambda payload: replay.unpack_result(payload, state, allowed),
            dump=lambda result: replay.pack_result(result, state),
            refuse=self._refuse,
            spent=self._spent,
            on_hit=lambda entry: _mark(self.config, entry, digest, backend.cache.clock()),
            nested=bool(held_flights.get()),
        )
        heartbeat = getattr(runtime, "heartbeat", _no_heartbeat)
        return call, Caller(heartbeat, binding.blocked_loop, self.node._uses_executor)

    # -- the body ---------------------------------------------------------------------------------

    def invoke(self) -> Ran:
        """Run the node in this thread."""
        with self._entered() as config:
            value = self.input
            for i, step in enumerate(self.node._steps):
                value = step.invoke(value, _step_config(config, i), **(self.kwargs if not i else {}))
        return self._ran(value)

    async def ainvoke(self) -> Ran:
        """Run the node in this task."""
        with self._entered() as config:
            value = self.input
            for i, step in enumerate(self.node._steps):
                kwargs = self.kwargs if not i else {}
                value = await step.ainvoke(value, _step_config(config, i), **kwargs)
        return self._ran(value)

    def stream(self) -> tuple[Iterator[Any], Callable[[], Ran]]:
        """Run the node in this thread, streaming."""
        total = _Total()

        def chunks() -> Iterator[Any]:
            with self._entered() as config:
                steps = self.node._steps
                stream = steps[0].stream(self.input, config, **self.kwargs)
                for i, step in enumerate(steps[1:], 1):
                    stream = step.transform(stream, _step_config(config, i))
                for chunk in stream:
                    total.add(chunk)
                    yield chunk

        return chunks(), lambda: self._ran(total.value)

    def astream(self) -> tuple[AsyncIterator[Any], Callable[[], Ran]]:
        """Run the node in this task, streaming."""
        total = _Total()

        async def chunks() -> AsyncIterator[Any]:
            with self._entered() as config:
                steps = self.node._steps
                stream = steps[0].astream(self.input, config, **self.kwargs)
                for i, step in enumerate(steps[1:], 1):
                    stream = step.atransform(stream, _step_config(config, i))
                async for chunk in stream:
                    total.add(chunk)
                    yield chunk

        return chunks(), lambda: self._ran(total.value)

    @contextmanager
    def _entered(self) -> Iterator[RunnableConfig]:
        """The node's config, so patched that what matters for storing can be seen."""
        config: RunnableConfig = {**self.config}
        conf = dict(config.get("configurable") or {})
        scratchpad = conf.get(CONFIG_KEY_SCRATCHPAD)
        if scratchpad is not None:
            conf[CONFIG_KEY_SCRATCHPAD] = self._watched(scratchpad)
            config["configurable"] = conf
        callbacks = config.get("callbacks")
        if isinstance(callbacks, BaseCallbackManager):
            self._usage = _Usage()
            callbacks = callbacks.copy()
            callbacks.add_handler(self._usage, inherit=True)
            config["callbacks"] = callbacks
        # ``interrupt()`` and models called without a config find it here
        token = var_child_runnable_config.set(config)
        self._started = time.perf_counter()
        try:
            yield config
        finally:
            try:
                var_child_runnable_config.reset(token)
            except ValueError:  # a stream that the garbage collector closes, in another context
                pass

    def _watched(self, scratchpad: Any) -> Any:
        def interrupt_counter() -> int:
            self._asked = True
            return scratchpad.interrupt_counter()  # type: ignore[no-any-return]

        def get_null_resume(consume: bool = False) -> Any:
            value = scratchpad.get_null_resume(consume)
            if consume and value is not None:
                self._asked = True
            return value

        return replace(
            scratchpad, interrupt_counter=interrupt_counter, get_null_resume=get_null_resume
        )

    def _ran(self, value: Any) -> Ran:
        seconds = time.perf_counter() - self._started
        return Ran(value, seconds, "asked_a_human" if self._asked else None)

    # -- after ------------------------------------------------------------------------------------

    def counted(self, ran: Ran) -> Any:
        """The value of an uncached run."""
        self.node.spec.counters.ran(ran.seconds, self._spent(ran.value))
        return ran.value

    def _refuse(self, value: Any) -> str | None:
        when = self.node.spec.policy.when
        if when is None:
            return None
        try:
            return None if when(value) else "when"
        except Exception as exc:
            self.node.spec.warn(f"its policy's when= raised {type(exc).__name__}: {exc}")
            return "when_raised"

    def _spent(self, value: Any) -> int:
        return (self._usage.tokens if self._usage else 0) or replay.spent_tokens(value)


class _Usage(BaseCallbackHandler):
    """Adds up the tokens that language models report while a node runs."""

    run_inline = True  # else LangChain takes a thread of the loop's executor for each event

    def __init__(self) -> None:
        self.tokens = 0
        self._lock = threading.Lock()

    def on_llm_end(self, response: LLMResult, **kwargs: Any) -> None:
        for generations in response.generations:
            for generation in generations:
                message = getattr(generation, "message", None)
                usage = getattr(message, "usage_metadata", None) or {}
                with self._lock:
                    self.tokens += usage.get("total_tokens", 0)


class _Total:
    """Adds streamed chunks up as LangChain does."""

    def __init__(self) -> None:
        self.value: Any = None
        self._first = self._adds = True

    def add(self, chunk: Any) -> None:
        if self._first:
            self.value, self._first = chunk, False
            return
        if self._adds:
            try:
                self.value = self.value + chunk
                return
            except TypeError:
                self._adds = False
        self.value = chunk


def _no_heartbeat() -> None: ...


_NOBODY = Caller(_no_heartbeat)


def _resumes(conf: Mapping[str, Any], has_subgraph: bool) -> bool:
    """Whether this task may be handed a human's answer."""
    scratchpad = conf.get(CONFIG_KEY_SCRATCHPAD)
    if scratchpad is None:
        return False
    if scratchpad.resume or scratchpad.get_null_resume(False) is not None:
        return True
    return has_subgraph and bool(conf.get(CONFIG_KEY_RESUMING))


def _step_config(config: RunnableConfig, index: int) -> RunnableConfig:
    """The config LangGraph would give to a sequence's step: same parent run, its own step tag."""
    callbacks = config.get("callbacks")
    if index == 0 or not isinstance(callbacks, BaseCallbackManager):
        return config
    callbacks = callbacks.copy()
    callbacks.remove_tags(["seq:step:1"])
    callbacks.add_tags([f"seq:step:{index + 1}"], inherit=False)
    return {**config, "callbacks": callbacks}


def _key(
    spec: NodeSpec,
    scope: Scope,
    state: Any,
    runtime: Any,
    conf: Mapping[str, Any],
    binding: Binding,
) -> str:
    policy = spec.policy
    parts: list[tuple[str, Any]] = [("node", (*spec.namespace, spec.code))]
    if policy.key is None:
        parts.append(("state", state))
    elif callable(policy.key):
        try:
            parts.append(("key", policy.key(state)))
        except Exception as exc:
            raise Uncached("key_raised", f"key= raised {type(exc).__name__}: {exc}") from None
    else:
        chosen = {name: field(state, name) for name in policy.key}
        parts.append(("state", {k: v for k, v in chosen.items() if v is not _MISSING}))
    if policy.vary is None:
        parts.append(("context", getattr(runtime, "context", None)))
        parts.append(("configurable", binding.configurable))
    else:
        roots = {"context": getattr(runtime, "context", None), "configurable": binding.configurable}
        for name in policy.vary:
            root, *path = name.split(".")
            value: Any = roots[root]
            for step in path:
                value = field(value, step)
            parts.append((name, () if value is _MISSING else (value,)))
    if scope == "thread":
        thread = conf.get("thread_id")
        if thread is None:
            raise ConfigurationError(
                f"node {spec.name!r}: scope='thread' needs a thread, but the run has no thread_id; "
                "pass configurable={'thread_id': ...} or use scope='run' or 'global'"
            )
        parts.append(("thread", str(thread)))
    elif scope == "run":
        parts.append(("run", binding.run_id))
    try:
        return keys.digest(*parts)
    except keys.Unkeyable as exc:
        outside = exc.path.startswith(("context", "configurable"))
        way_out = (
            "vary= can leave it out of the key" if outside else "key= can leave it out of the key"
        )
        raise Uncached("unkeyable", f"{exc}; {way_out}") from None


def _tags(policy: CachePolicy, state: Any) -> tuple[str, ...]:
    """The ids of the tags that the result for this input depends on."""
    if not policy.tags:
        return ()
    if callable(policy.tags):
        try:
            names = policy.tags(state)
            if isinstance(names, str):
                names = [names]
            names = list(names)
        except Exception as exc:
            raise Uncached("tags_raised", f"tags= raised {type(exc).__name__}: {exc}") from None
    else:
        names = [_filled(tag, state) for tag in policy.tags]
    for name in names:
        if not isinstance(name, str):
            raise Uncached("tags_raised", f"tags= gave {name!r}, which is no string")
    return tuple(sorted({tag_id(name) for name in names}))


def _filled(tag: str, state: Any) -> str:
    values: dict[str, Any] = {}
    for name in template_fields(tag):
        value = field(state, name)
        # the text of anything else may differ between two equal values
        if value is _MISSING or not isinstance(value, str | int | float | bool | None):
            given = "is not in the input" if value is _MISSING else f"is a {type(value).__name__}"
            raise Uncached(
                "tags_raised",
                f"the tag {tag!r} takes the text of a string, number or None, but {name!r} {given}",
            )
        values[name] = value
    return tag.format_map(values)


def field(state: Any, name: str) -> Any:
    """``name`` of a mapping or an object; ``_MISSING`` if it has none."""
    if isinstance(state, Mapping):
        return state.get(name, _MISSING)
    return getattr(state, name, _MISSING)


def _mark(config: RunnableConfig, entry: Entry, digest: str, now: float) -> None:
    """Write into the trace of the node's run that it was answered from the cache."""
    callbacks = config.get("callbacks")
    if not isinstance(callbacks, BaseCallbackManager):
        return
    for handler in callbacks.handlers:
        if isinstance(handler, BaseTracer):
            run = handler.run_map.get(str(callbacks.parent_run_id))
            if run is not None:
                run.add_metadata(
                    {
                        "langgraph_perf": {
                            "cached": True,
                            "key": digest,
                            "age_seconds": max(0.0, now - entry.created),
                        }
                    }
                )
