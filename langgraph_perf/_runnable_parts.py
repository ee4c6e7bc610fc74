"""What runnables, tools, language models, channels and graphs are made of."""

from __future__ import annotations

from typing import Any

from langchain_core.language_models import BaseChatModel, BaseLanguageModel, BaseLLM
from langchain_core.language_models.chat_models import SimpleChatModel
from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool
from langgraph.channels.base import BaseChannel
from langgraph.func import _TaskFunction
from langgraph.graph import StateGraph
from langgraph.pregel import Pregel

from langgraph_perf._binding import users_part
from langgraph_perf._canonical import Plan, instance_state, mro_of, namespace_of
from langgraph_perf._code_walk import Walk, state

# what is there to watch a run, or says only what goes in and out
_WATCHING = frozenset(
    """
    callbacks callback_manager tags metadata verbose cache rate_limiter custom_get_token_ids trace
    trace_inputs func_accepts custom_input_type custom_output_type input_types
    """.split()  # noqa: SIM905
)
_NAME = frozenset(("name",))
_OUTSIDE = frozenset(("callbacks", "callback_manager", "cache", "rate_limiter"))


def runnable_plan(kind: type) -> Plan | None:
    """The plan of one of this module's kinds, or ``None``."""
    mro = mro_of(kind)
    for base, plan in _PLANS.items():
        if base in mro:
            return plan
    return None


def _runnable(walk: Walk, runnable: Any) -> bytes:
    return walk.here(runnable, _runnable_state)


def _runnable_state(walk: Walk, runnable: Any) -> bytes:
    # a tool's name is what a model calls; any other name is for traces
    leave = _WATCHING if isinstance(runnable, BaseTool) else _WATCHING | _NAME
    if not walk.library(type(runnable).__module__):
        leave = _OUTSIDE  # who knows what the user's own class does with the others
    out = b""
    config = instance_state(type(runnable))(runnable).get("config")
    if isinstance(config, dict):
        leave |= {"config"}
        out = walk.captured('.config["configurable"]', config.get("configurable"))
    return state(walk, runnable, leave) + out


def _model(walk: Walk, model: Any) -> bytes:
    return walk.here(model, _model_state)


def _model_state(walk: Walk, model: Any) -> bytes:
    for kind in mro_of(type(model)):
        if "_identifying_params" in namespace_of(kind):
            if kind in (BaseLanguageModel, BaseChatModel, SimpleChatModel, BaseLLM):
                break  # it says nothing about the model
            params = dict(model._identifying_params)
            out = walk.encode(type(model)) + walk.captured("._identifying_params", params)
            if not walk.library(type(model).__module__):
                # the user's own class may have fields that this does not tell of
                out += walk.attempt(lambda: state(walk, model, _OUTSIDE), lambda: b"")
            return out
    return state(walk, model, _WATCHING | _NAME)


def _channel(walk: Walk, channel: BaseChannel[Any, Any, Any]) -> bytes:
    own = instance_state(type(channel))(channel)
    kind = walk.or_type(own.get("typ"))
    return walk.encode(type(channel)) + kind + walk.or_type(own.get("operator"))


def _graph(walk: Walk, graph: Any) -> bytes:
    return walk.here(graph, _graph_parts)


def _graph_parts(walk: Walk, graph: Any) -> bytes:
    builder = getattr(graph, "builder", None)
    if builder is not None:
        parts = _builder_parts(builder)
    else:
        parts = {
            "nodes": {
                name: (node.bound, sorted(node.triggers), node.channels, list(node.writers))
                for name, node in graph.nodes.items()
            },
            "channels": dict(graph.channels),
            "context": graph.context_schema,
        }
    # it comes on top of what the graph is called with, and so is in no run's key
    parts["config"] = users_part((graph.config or {}).get("configurable") or {})
    parts["in and out"] = (graph.input_channels, graph.output_channels)
    parts["interrupts"] = (graph.interrupt_before_nodes, graph.interrupt_after_nodes)
    return b"".join(walk.captured(f".{name}", parts[name]) for name in sorted(parts))


def _builder(walk: Walk, builder: Any) -> bytes:
    parts = _builder_parts(builder)
    return b"".join(walk.captured(f".{name}", parts[name]) for name in sorted(parts))


def _builder_parts(builder: Any) -> dict[str, Any]:
    return {
        "nodes": {
            name: (
                spec.runnable,
                # of it are made what the node gets: with the defaults, validators and methods in it
                spec.input_schema,
                sorted(builder.schemas.get(spec.input_schema, ())),
                spec.defer,
            )
            for name, spec in builder.nodes.items()
        },
        "schemas": (
            builder.state_schema,
            builder.input_schema,
            builder.output_schema,
            builder.context_schema,
        ),
        "edges": sorted(builder.edges),
        "waiting": sorted(builder.waiting_edges),
        "branches": {
            start: {name: (branch.path, branch.ends) for name, branch in branches.items()}
            for start, branches in builder.branches.items()
        },
        "channels": dict(builder.channels),
    }


def _task(walk: Walk, task: Any) -> bytes:
    policies = (task.retry_policy, task.cache_policy, task.timeout)
    return b"K" + walk.captured(".func", task.func) + walk.captured(".policies", policies)


_PLANS: dict[type, Plan] = {
    _TaskFunction: _task,
    BaseLanguageModel: _model,
    Pregel: _graph,
    StateGraph: _builder,
    BaseChannel: _channel,
    BaseTool: _runnable,
    Runnable: _runnable,
}
