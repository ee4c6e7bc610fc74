"""Which classes a payload may bring back."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from functools import cache

from langgraph_perf._codec_classes import find, parametrization, ref_of
from langgraph_perf._codec_format import DecodeError


@cache  # and not at import: not all of these modules need to be imported by then
def trusted() -> dict[str, type]:
    """The classes that come back even in strict mode: LangGraph trusts the same ones."""
    from langchain_core import messages as lc_messages
    from langchain_core.documents import Document
    from langgraph import types as lg_types
    from langgraph.store.base import Item, SearchItem

    messages = [
        getattr(lc_messages, name)
        for name in lc_messages.__all__
        if name.endswith(("Message", "MessageChunk"))
    ]
    names = ("Command", "Send", "Overwrite", "Interrupt", "TimeoutPolicy")
    others = [getattr(lg_types, name, None) for name in names]
    return {
        ref_of(cls): cls
        for cls in [*messages, *others, Document, Item, SearchItem]
        if isinstance(cls, type)
    }


@dataclasses.dataclass(frozen=True, init=False)
class Allowlist:
    """The classes that ``decode`` may restore besides the built-in ones; immutable.

    Standard library values, LangChain messages and documents, and LangGraph's ``Command``,
    ``Send``, ``Overwrite``, ``Interrupt`` and store items always come back. Other dataclasses,
    pydantic models, enums and named tuples come back when they are listed here, or, unless the mode
    is strict, when an already imported module has them under the stored name. Listing a generic
    model allows its parametrizations.

    Attributes:
        types: the listed classes.
        strict: whether only listed classes come back; ``None`` asks the environment variable
            ``LANGGRAPH_STRICT_MSGPACK``, as LangGraph does.
    """

    types: frozenset[type]
    strict: bool | None
    _named: Mapping[str, type | None] = dataclasses.field(repr=False, compare=False)

    def __init__(self, types: Iterable[type] = (), *, strict: bool | None = None) -> None:
        listed = frozenset(types)
        named: dict[str, type | None] = {}
        for cls in listed:
            if not isinstance(cls, type):
                raise TypeError(f"Allowlist takes classes, got {cls!r}")
            # two classes of one name: neither may be taken for the other
            named[ref_of(cls)] = None if ref_of(cls) in named else cls
        object.__setattr__(self, "types", listed)
        object.__setattr__(self, "strict", strict)
        object.__setattr__(self, "_named", named)

    @classmethod
    def of(cls, *types: type, strict: bool | None = None) -> Allowlist:
        """An allowlist of these classes.

        Raises:
            TypeError: one of them is not a class.
        """
        return cls(types, strict=strict)

    def extended(self, *types: type) -> Allowlist:
        """This allowlist with more classes."""
        return Allowlist(self.types.union(types), strict=self.strict)


def resolve(ref: str, allowed: Allowlist) -> type:
    """The class that a payload calls ``ref``.

    Raises:
        DecodeError: it is not allowed, or not there.
    """
    name, _, args = ref.partition("[")
    cls = trusted().get(name) or allowed._named.get(name)
    if cls is not None and args:
        cls = parametrization(cls, ref)
    if cls is None:
        cls = allowed._named.get(ref)
    if cls is not None:
        return cls
    strict = allowed.strict
    if strict is None:
        # the parsing of langgraph.checkpoint.serde
        flag = os.environ.get("LANGGRAPH_STRICT_MSGPACK", "false")
        strict = flag.lower() in ("1", "true", "yes")
    if strict:
        raise DecodeError(
            f"type {ref} is not allowed in strict mode: allow it with Allowlist.of(...), or "
            "leave strict mode (LANGGRAPH_STRICT_MSGPACK, Allowlist(strict=...))"
        )
    cls = find(ref)
    if cls is None:
        raise DecodeError(
            f"type {ref} is not in any imported module: import it before, or allow it with "
            "Allowlist.of(...)"
        )
    return cls
