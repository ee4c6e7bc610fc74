"""Noticing that a computation asked a human, so that the answer is nobody else's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import var_child_runnable_config

# private names of LangGraph, with a test in tests/test_langgraph_internals.py
from langgraph._internal._constants import (
    CONFIG_KEY_RESUME_MAP,
    CONFIG_KEY_RESUMING,
    CONFIG_KEY_SCRATCHPAD,
)


class Watch:
    """Set over a config, it notices ``interrupt()`` in what runs with that config.

    Attributes:
        asked: whether a human was asked, or an answer was taken, at any depth.
    """

    def __init__(self) -> None:
        self.asked = False

    def over(self, config: RunnableConfig) -> RunnableConfig:
        """``config``, watched."""
        conf = config.get("configurable") or {}
        scratchpad = conf.get(CONFIG_KEY_SCRATCHPAD)
        if scratchpad is None:
            return config

        def interrupt_counter() -> int:
            self.asked = True
            return scratchpad.interrupt_counter()  # type: ignore[no-any-return]

        def get_null_resume(consume: bool = False) -> Any:
            value = scratchpad.get_null_resume(consume)
            if consume and value is not None:
                self.asked = True
            return value

        watched = replace(
            scratchpad, interrupt_counter=interrupt_counter, get_null_resume=get_null_resume
        )
        return {**config, "configurable": {**conf, CONFIG_KEY_SCRATCHPAD: watched}}

    @property
    def taint(self) -> str | None:
        """Why the result must not be stored, if it must not."""
        return "asked_a_human" if self.asked else None


@contextmanager
def current_config(config: RunnableConfig | None) -> Iterator[None]:
    """Make ``config`` the one that ``interrupt()`` and models called without one find."""
    if config is None:
        yield
        return
    token = var_child_runnable_config.set(config)
    try:
        yield
    finally:
        # a stream that the garbage collector closes ends in another context
        with suppress(ValueError):
            var_child_runnable_config.reset(token)


def resumes(conf: Mapping[str, Any], has_subgraph: bool) -> bool:
    """Whether this task may be handed a human's answer."""
    scratchpad = conf.get(CONFIG_KEY_SCRATCHPAD)
    if scratchpad is None:
        return False
    if scratchpad.resume or scratchpad.get_null_resume(False) is not None:
        return True
    # answers given by interrupt id may be for a graph inside the node, which LangGraph sees or not
    resuming = bool(conf.get(CONFIG_KEY_RESUMING))
    return resuming and (has_subgraph or bool(conf.get(CONFIG_KEY_RESUME_MAP)))
