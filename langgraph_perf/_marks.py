"""Which checkpointers are copies of one another, and so have their threads in common.

LangGraph copies a checkpointer to give the copy another serde, for each graph it is compiled with.
"""

from __future__ import annotations

from typing import Any

from langgraph.checkpoint.base import BaseCheckpointSaver

_NAME = "_langgraph_perf_mark"


class Mark:
    """What a checkpointer and its shallow copies have in common."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Mark:
        return Mark()

    def __reduce__(self) -> tuple[type[Mark], tuple[()]]:
        return Mark, ()


def mark(checkpointer: Any) -> None:
    """See to it that copies of ``checkpointer`` which are made from now on can be told."""
    if isinstance(checkpointer, BaseCheckpointSaver):
        own = getattr(checkpointer, "__dict__", None)
        if own is not None and "_saver" not in own:
            own.setdefault(_NAME, Mark())


def mark_of(checkpointer: Any) -> Any:
    """The mark, or the checkpointer itself if it has none."""
    return getattr(checkpointer, "__dict__", {}).get(_NAME, checkpointer)
