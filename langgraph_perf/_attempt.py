"""One attempt at running a cached node: whether the cache takes part, and how the body is run."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator, Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    contextmanager,
    nullcontext,
)
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from langchain_core.callbacks import (
    BaseCallbackHandler,
)
from langchain_core.callbacks.base import BaseCallbackManager
from langchain_core.outputs import LLMResult
from langchain_core.runnables import Runnable, RunnableConfig

# private names of LangGraph, each with a test in tests/test_langgraph_internals.py
from langgraph._internal._constants import (
    CONFIG_KEY_CHECKPOINTER,
    CONFIG_KEY_RUNTIME,
)
from langgraph.cache.base import Namespace
from langgraph.pregel._retry import _should_retry_on

from langgraph_perf import replay
from langgraph_perf._background import revalidate
from langgraph_perf._binding import BINDING, SCOPE, Binding
from langgraph_perf._call import load as load_entry
from langgraph_perf._drive import NOBODY, Caller
from langgraph_perf._flight import held_flights
from langgraph_perf._freshness import Freshness
from langgraph_perf._gathering import GATHERINGS, gatherings, narrowed, part_of
from langgraph_perf._identity import (
    NodeSpec,
    Uncached,
    call_key,
    call_marks,
    call_owner,
    call_part,
    call_tags,
)
from langgraph_perf._owner import RUN_SECONDS
from langgraph_perf._provenance import mark_hit, mark_run
from langgraph_perf._sealing import Seal
from langgraph_perf._steps import Call, Ran
from langgraph_perf._watch import Watch, current_config, resumes
from langgraph_perf.caches.base import Entry, namespace_tag
from langgraph_perf.errors import CacheMiss, ConfigurationError
from langgraph_perf.policy import CacheControl, Scope, narrowest_scope, shortest


class Node(Protocol):
    """What an attempt needs of the node.

    Attributes:
        steps: what to run, one after the other.
    """

    spec: NodeSpec
    steps: Sequence[Runnable[Any, Any]]


if TYPE_CHECKING:
    from langgraph_perf.resources import Registry, Want


class Attempt:
    """One call of a cached node."""

    __slots__ = (
        "_started",
        "_usage",
        "_watch",
        "call",
        "caller",
        "config",
        "input",
        "kwargs",
        "node",
        "scope",
    )

    def __init__(
        self, node: Node, input: Any, config: RunnableConfig, kwargs: dict[str, Any]
    ) -> None:
        self.node = node
        self.input = input
        self.config = config
        self.kwargs = kwargs
        self.call: Call | None = None
        self.caller = NOBODY
        self.scope: Scope = "global"
        self._watch = Watch()
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
        if spec.policy is None:
            return
        control = CacheControl() if binding is None else binding.control.for_node(spec.name)
        self.scope = narrowest_scope(spec.policy.scope, control.scope)
        # whatever becomes of the call: what is made of its result is not everybody's
        narrowed(part_of(conf), self.scope)
        try:
            if binding is None or binding.backend is None:
                raise Uncached(
                    "no_cache",
                    "neither its graph nor a parent graph of this library was compiled with cache=",
                )
            if self.kwargs:
                raise Uncached("arguments", "it was called with extra arguments")
            self.call, self.caller = self._call(spec, conf, binding)
        except Uncached as exc:
            if control.mode == "only":
                raise CacheMiss(
                    spec.name, f"node {spec.name!r} may not run (mode 'only') and {exc}"
                ) from None
            spec.counters.refused(exc.reason)
            if exc.message is not None:
                spec.warn(f"runs uncached: {exc.message}")

    def looked_up(self, entry: Entry | None) -> Ran | None:
        """What a first look at the cache makes of it."""
        assert self.call is not None
        if entry is not None and self.call.state(entry) != "fresh":
            return None  # that takes more than a look
        found = None if entry is None else load_entry(self.call, entry, "hit")
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
        assert policy is not None
        assert backend is not None
        control = binding.control.for_node(spec.name)
        if control.mode == "bypass":
            raise Uncached("bypassed")
        if spec.code is None:
            raise Uncached("unkeyable")
        patience = binding.patience if backend.cache.blocking else None
        if patience is not None and patience.is_over(backend.cache.timeout):
            raise Uncached("slow_cache")
        if spec.remembers and conf.get(CONFIG_KEY_CHECKPOINTER) is not None:
            raise Uncached("remembers", "a graph inside it remembers (checkpointer=True)")
        if resumes(conf, spec.has_subgraph):
            # a human's answer is on its way into this task: it is nobody else's
            raise Uncached("resumed")
        runtime = conf.get(CONFIG_KEY_RUNTIME)
        scope = self.scope
        tags: tuple[str, ...] = call_tags(policy, self.input, runtime, conf)
        seal = Seal.of(binding.serde, backend.cache)
        try:
            part = call_part(policy, self.input)
            digest = call_key(
                spec, self.input, part, tags, runtime, binding, seal is not None, conf
            )
        except ConfigurationError as exc:  # which object of a keyed resource it wants
            raise ConfigurationError(f"node {spec.name!r}: {exc}") from exc
        owner = call_owner(f"node {spec.name!r}", scope, conf, binding)
        namespace: Namespace = spec.namespace
        if owner is not None:
            namespace = owner.namespace
            if scope == "thread" or backend.cache.supports_tags:
                # the node's as well, for `clear_cache`
                tags += (owner.tag, namespace_tag(spec.namespace))
        if tags and not backend.cache.supports_tags:
            raise Uncached(
                "tags_unsupported",
                "its result depends on tags or belongs to a thread, neither of which "
                f"{type(backend.cache).__name__} can invalidate",
            )
        state, allowed = self.input, spec.allowed
        keyed = replay.ALL if policy.key is None else part[1]
        freshness: Freshness | None = None
        max_age = shortest(policy.ttl, control.ttl)  # type: ignore[arg-type]
        if policy.stale_while_revalidate or policy.stale_if_error:
            freshness = Freshness(
                policy.ttl,  # type: ignore[arg-type]
                policy.stale_while_revalidate or 0.0,  # type: ignore[arg-type]
                policy.stale_if_error or 0.0,  # type: ignore[arg-type]
                None if spec.has_subgraph else partial(revalidate, self),
                self._retried,
            )
            # what a run itself asks for is a limit for stale results as well
            max_age = shortest(freshness.ttl + freshness.grace, control.ttl)  # type: ignore[arg-type]
        inside = binding.control.for_nodes(spec.inside) if spec.inside else ()
        mode = control.mode
        if mode == "use" and any(asked.mode in ("refresh", "bypass") for asked in inside):
            mode = "refresh"  # or what is asked of a node inside would not come about
        for asked in inside:
            max_age = shortest(max_age, asked.ttl)  # type: ignore[arg-type]
        if mode == "use" and binding.forked and policy.on_fork == "refresh":
            mode = "refresh"

        def load(payload: bytes) -> Any:
            opened = payload if seal is None else seal.opened(digest, payload)
            return replay.unpack_result(opened, state, allowed, keyed)

        def dump(result: Any) -> bytes:
            payload = replay.pack_result(result, state, keyed)
            return payload if seal is None else seal.closed(digest, payload)

        call = Call(
            name=spec.name,
            backend=backend,
            counters=spec.counters,
            key=(namespace, digest),
            tags=tags,
            mode=mode,
            # the policy's ttl too: it may have become shorter since the entry was stored
            max_age=max_age,
            ttl=shortest(
                shortest(policy.ttl, control.ttl),  # type: ignore[arg-type]
                RUN_SECONDS if scope == "run" else None,
            ),
            jitter=policy.jitter,
            load=load,
            dump=dump,
            refuse=self.refuse,
            spent=self.spent,
            on_hit=lambda entry: mark_hit(self.config, spec, entry, digest, backend.cache.clock()),
            freshness=freshness,
            held=held_flights.get(),
            scope=scope,
            owner=owner,
            marks=call_marks(owner, self.config),
            around=part_of(conf),
            patience=patience,
        )
        heartbeat = getattr(runtime, "heartbeat", NOBODY.heartbeat)
        return call, Caller(heartbeat, binding.blocked_loop, not self.node.spec.native_async)

    def _retried(self, error: Exception) -> bool:
        """Whether LangGraph will run the node again after ``error``."""
        runtime = self.config["configurable"].get(CONFIG_KEY_RUNTIME)
        info = getattr(runtime, "execution_info", None)
        for policy in self.node.spec.retry:
            if _should_retry_on(policy, error):
                return bool(getattr(info, "node_attempt", 1) < policy.max_attempts)
        return False

    # -- the body ---------------------------------------------------------------------------------

    def invoke(self) -> Ran:
        """Run the node in this thread."""
        with self._entered() as config, self._leases() as leased:
            first, *others = self.node.steps
            value = first.invoke(self.input, config, **self.kwargs, **leased)
            for i, step in enumerate(others, 2):
                value = step.invoke(value, _step_config(config, i))
        return self._ran(value)

    async def ainvoke(self) -> Ran:
        """Run the node in this task."""
        with self._entered() as config:
            first, leases = self._aleases()
            async with leases as leased:
                _, *others = self.node.steps
                value = await first.ainvoke(self.input, config, **self.kwargs, **leased)
                for i, step in enumerate(others, 2):
                    value = await step.ainvoke(value, _step_config(config, i))
        return self._ran(value)

    def stream(self) -> tuple[Iterator[Any], Callable[[], Ran]]:
        """Run the node in this thread, streaming."""
        total = _Total()

        def chunks() -> Iterator[Any]:
            with self._entered() as config, self._leases() as leased:
                first, *others = self.node.steps
                stream = first.stream(self.input, config, **self.kwargs, **leased)
                for i, step in enumerate(others, 2):
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
                first, leases = self._aleases()
                async with leases as leased:
                    _, *others = self.node.steps
                    stream = first.astream(self.input, config, **self.kwargs, **leased)
                    for i, step in enumerate(others, 2):
                        stream = step.atransform(stream, _step_config(config, i))
                    async for chunk in stream:
                        total.add(chunk)
                        yield chunk

        return chunks(), lambda: self._ran(total.value)

    def _leases(self) -> AbstractContextManager[dict[str, Any]]:
        """The node's leases, by parameter; taken here, so only when its body runs."""
        if not self.node.spec.uses:
            return nullcontext({})
        registry, wanted, heartbeat = self._wanted(sync=True)
        return registry.lease(wanted, heartbeat=heartbeat, where=f"node {self.node.spec.name!r}")

    def _aleases(
        self,
    ) -> tuple[Runnable[Any, Any], AbstractAsyncContextManager[dict[str, Any]]]:
        """The node, and its leases like those of ``_leases``, without blocking the event loop."""
        first, spec = self.node.steps[0], self.node.spec
        if not spec.uses:
            return first, nullcontext({})
        registry, wanted, heartbeat = self._wanted(sync=False)
        leases = registry.alease(wanted, heartbeat=heartbeat, where=f"node {spec.name!r}")
        if spec.native_async:
            return first, leases
        # imported here: it brings the resources, which most graphs do without
        from langgraph_perf._thread_body import on_thread

        exclusive = not all(registry[use.name].shares for use in spec.uses.values())
        return on_thread(first, leases, exclusive)

    def _wanted(
        self, *, sync: bool
    ) -> tuple[Registry, dict[str, Hashable | Want], Callable[[], None]]:
        spec = self.node.spec
        conf = self.config.get("configurable") or {}
        binding: Binding | None = conf.get(BINDING)
        names = ", ".join(repr(use.name) for use in spec.uses.values())
        if binding is None or binding.resources is None:
            raise ConfigurationError(
                f"node {spec.name!r} asks for {names}, but neither its graph nor a parent graph "
                "was compiled with resources="
            )
        try:
            wanted: dict[str, Hashable | Want] = {
                parameter: use.want(self.input) for parameter, use in spec.uses.items()
            }
            for use in spec.uses.values():
                binding.resources.check(use, sync=sync)
        except ConfigurationError as exc:
            raise ConfigurationError(f"node {spec.name!r}: {exc}") from None
        heartbeat = getattr(conf.get(CONFIG_KEY_RUNTIME), "heartbeat", NOBODY.heartbeat)
        return binding.resources, wanted, heartbeat

    @contextmanager
    def _entered(self) -> Iterator[RunnableConfig]:
        """The node's config, so patched that what matters for storing can be seen."""
        mark_run(self.config)
        config = self._watch.over({**self.config})
        callbacks = config.get("callbacks")
        if isinstance(callbacks, BaseCallbackManager):
            self._usage = _Usage()
            callbacks = callbacks.copy()
            callbacks.add_handler(self._usage, inherit=True)
            config["callbacks"] = callbacks
        inside: dict[str, Any] = {}
        gathering = gatherings.get()
        if gathering:
            inside[GATHERINGS] = gathering
        if self.scope != "global":
            inside[SCOPE] = self.scope
        if inside:
            config["configurable"] = {**(config.get("configurable") or {}), **inside}
        with current_config(config):
            self._started = time.perf_counter()
            yield config

    def _ran(self, value: Any) -> Ran:
        seconds = time.perf_counter() - self._started
        binding = (self.config.get("configurable") or {}).get(BINDING)
        continued = isinstance(binding, Binding) and binding.continued
        return Ran(value, seconds, self._watch.taint or ("continued_inside" if continued else None))

    # -- after ------------------------------------------------------------------------------------

    def counted(self, ran: Ran) -> Any:
        """The value of an uncached run."""
        self.node.spec.counters.ran(ran.seconds, self.spent(ran.value))
        return ran.value

    def refuse(self, value: Any) -> str | None:
        """Why the policy does not want ``value`` stored."""
        policy = self.node.spec.policy
        when = policy.when if policy is not None else None
        if when is None:
            return None
        try:
            return None if when(value) else "when"
        except Exception as exc:
            self.node.spec.warn(
                f"its result is not stored: when= raised {type(exc).__name__}: {exc}"
            )
            return "when_raised"

    def spent(self, value: Any) -> int:
        """The tokens that language models reported while ``value`` was made."""
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


def _step_config(config: RunnableConfig, number: int) -> RunnableConfig:
    """The config LangGraph would give to a later step: same parent run, a step tag of its own."""
    callbacks = config.get("callbacks")
    if not isinstance(callbacks, BaseCallbackManager):
        return config
    callbacks = callbacks.copy()
    callbacks.remove_tags(["seq:step:1"])
    callbacks.add_tags([f"seq:step:{number}"], inherit=False)
    return {**config, "callbacks": callbacks}
